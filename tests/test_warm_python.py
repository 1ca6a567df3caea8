"""The interpreter that other tests start scripts with behaves as a cold one does."""

import os
import signal
import subprocess
import sys
import time

PROGRAM = """
import os, sys
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("MARK"), sys.stdin.read(), "torch" in sys.modules)
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def call(python, *arguments, **options):
    return subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, timeout=60, **options)


def test_arguments_folder_streams_environment_and_code_reach_the_program(warm_python, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "__init__.py").write_text("")
    for how in (["-c", PROGRAM], ["program.py"], ["-m", "program"], ["-u", "program.py"]):
        here, cold = (call(python, *how, 3, "a b", cwd=tmp_path, input="said", env={**os.environ, "MARK": "x"})
                      for python in (warm_python, sys.executable))
        assert (here.returncode, here.stderr) == (cold.returncode, cold.stderr) == (3, "to stderr\n")
        assert here.stdout == cold.stdout.replace("False", "True")


def test_errors_end_it_with_a_traceback_or_their_message(warm_python):
    for program in ("sys.exit('no')", "1 / 0", "os.kill(os.getpid(), 9)"):
        here, cold = (call(python, "-c", f"import os, sys\n{program}") for python in (warm_python, sys.executable))
        assert here.returncode == cold.returncode != 0 and here.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


def test_variables_that_libraries_read_when_they_are_loaded_start_a_cold_one(warm_python):
    program = "import os, sys; print(os.environ.get('HF_MODULES_CACHE'), 'torch' in sys.modules)"
    assert call(warm_python, "-c", program, env={**os.environ, "HF_MODULES_CACHE": "/x"}).stdout == "/x False\n"
    program = "import sys; warm = 'torch' in sys.modules; from huggingface_hub import constants; print(constants.HF_HUB_CACHE, warm)"
    assert call(warm_python, "-c", program, env={**os.environ, "HF_HOME": "/x"}).stdout == "/x/hub True\n"
    assert call(warm_python, "-I", "-c", "import sys; print(sys.flags.isolated, 'torch' in sys.modules)").stdout == "1 False\n"


def test_a_program_ends_with_the_process_that_asked_for_it(warm_python, tmp_path):
    mark = tmp_path / "pid"
    asking = subprocess.Popen([warm_python, "-c", f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"])
    while not mark.exists() or not mark.read_text():
        time.sleep(0.01)
    asking.kill()
    asking.wait()
    for _ in range(500):
        try:
            os.kill(int(mark.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    raise AssertionError("it goes on")
