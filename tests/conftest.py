"""What several test files need: one small finished corpus, a way to run a stage, and the optional folder of real data."""

import importlib
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml

import combine_babylm
from babylm import models, run_folder
from babylm.demo_corpus import write_corpus
from babylm.run_folder import run_stage

ROOT = Path(combine_babylm.__file__).parent
torch.set_num_threads(1)
os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # for child processes too


def write_yaml_file(path, values):
    """Write `values` as YAML, making the folders on the way; return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def run_stage_1(config, *overrides):
    """Run stage 1 in this process, as `python combine_babylm.py --config <config> <overrides>` would; errors are raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["combine_babylm.py", "--config", str(config), *map(str, overrides)])
        combine_babylm.main()


@pytest.fixture(scope="session")
def write_yaml():
    """write_yaml(path, values) -> path."""
    return write_yaml_file


@pytest.fixture(scope="session")
def stage1():
    """stage1(config, "key=value", ...) runs stage 1 in this process."""
    return run_stage_1


@pytest.fixture(scope="session")
def run_script():
    """run_script("train_baseline.py", "--config", ..., check=True, env={}, cwd=...) runs a stage as a process of its own."""

    def run(script, *args, check=True, env=None, cwd=None):
        done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True,
                              env={**os.environ, **(env or {})}, cwd=cwd or ROOT, stdin=subprocess.DEVNULL, timeout=300)
        if check and done.returncode:
            pytest.fail(f"{script} ended with code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture(scope="session")
def in_process():
    """in_process("train_student", "--config", ..., as_script=False) runs a stage in this process, to its end.

    Errors are raised; `as_script=True` turns them into a message and an exit code, as the script does.
    """

    def run(script, *args, as_script=False):
        main = importlib.import_module(script).main
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
            patch.setattr(run_folder, "_opened", [])
            try:
                run_stage(main) if as_script else main()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    return run


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Folder of the six raw `<domain>.train` files of a demo corpus of about 20,000 words. Read only."""
    folder = tmp_path_factory.mktemp("demo") / "raw"
    write_corpus(folder, words=20_000, seed=1)
    return folder


@pytest.fixture(scope="session")
def corpus(raw):
    """The corpus folder that stage 1 made of `raw`: both parts, tokenizer/ of 512 entries, tokens/. Read only."""
    folder = raw.parent / "corpus"
    run_stage_1(write_yaml_file(raw.parent / "corpus.yaml", {
        "seed": 1,
        "corpus": {"input": str(raw), "output": str(folder), "validation_fraction": 0.1},
        "tokenizer": {"vocab_size": 512},
    }))
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus):
    """The tokenizer of `corpus`, loaded."""
    return models.load_tokenizer(corpus / "tokenizer")


@pytest.fixture
def make(tmp_path):
    """make({"name.train": text or bytes}, "key=value", ..., <keys of the section corpus>) -> the folder that stage 1 wrote."""

    def build(files, *overrides, **section):
        raw, folder = tmp_path / "raw", tmp_path / "corpus"
        raw.mkdir(exist_ok=True)
        for name, text in files.items():
            (raw / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        section = {"input": str(raw), "output": str(folder), "clean": False, "validation_fraction": 0.0, **section}
        run_stage_1(write_yaml_file(tmp_path / "corpus.yaml", {"seed": 3, "corpus": section, "tokenizer": {"vocab_size": 300}}), *overrides)
        return folder

    return build


@pytest.fixture(scope="session")
def shared():
    """A folder of real data that is not part of the repository; tests that need it are skipped without it."""
    path = os.environ.get("BABYLM_SHARED")
    if not path or not Path(path).is_dir():
        pytest.skip("BABYLM_SHARED names no folder")
    return Path(path)


@pytest.fixture
def in_child(tmp_path):
    """in_child(function) -> CompletedProcess: call it in a forked process, as a script would (exit code, stdout, stderr)."""

    def call(function):
        out, err = tmp_path / "child.out", tmp_path / "child.err"
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 70
            try:
                with open(out, "w") as stdout, open(err, "w") as stderr:
                    os.dup2(stdout.fileno(), 1)
                    os.dup2(stderr.fileno(), 2)
                    sys.stdout, sys.stderr = stdout, stderr
                    try:
                        run_stage(function)
                        code = 0
                    except SystemExit as end:
                        code = end.code
                    except BaseException:
                        traceback.print_exc()
            finally:
                os._exit(code)  # a child never goes on with the tests
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return subprocess.CompletedProcess("child", code, out.read_text(), err.read_text())

    return call
