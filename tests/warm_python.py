"""A `python` that has imported everything already, for tests that start scripts as processes of their own.

A cold start spends six seconds of CPU on importing torch, transformers and peft. The interpreter of this file spends none: a server
is forked from the test process before its first test, and the executable that `start` writes hands its arguments, environment,
folder and standard streams to it; a fork of the server becomes the script.

It is for what follows the start. Where the start itself is the subject, or a signal to the process, tests use `sys.executable`; and
so does the executable itself where it is given options or variables that are read when an interpreter or a library is loaded.

    start(folder) -> (the executable, its server's process id)
"""

import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

READ_WHEN_LOADED = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "OMP_", "MKL_", "CUDA_", "PYTHONHASHSEED", "PYTHONHOME", "PYTHONOPTIMIZE",
                    "PYTHONWARNINGS")  # beginnings of variables
FOLLOWED = {"HF_HOME", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_ENDPOINT"}  # by `run`


def read_when_loaded(environment) -> dict[str, str]:
    """The variables that a process which has loaded its libraries can no longer follow."""
    return {name: value for name, value in environment.items() if name.startswith(READ_WHEN_LOADED) and name not in FOLLOWED}


# ---- The executable: only the standard library, so that it starts in 30 ms -----------------------------------------------


def become(interpreter: str, place: str, arguments: list[str]) -> None:
    """Run `arguments` in a fork of the server and end as it ends; or become the cold `interpreter`."""
    options = [word for word in arguments[:1] if word == "-u"]
    what = arguments[len(options):]
    loaded = json.loads(Path(f"{place}.json").read_text())
    if not what or (what[0].startswith("-") and what[0] not in ("-m", "-c")) or read_when_loaded(os.environ) != loaded:
        os.execv(interpreter, [interpreter, *arguments])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(place)
        request = {"arguments": what, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        code = int(server.recv(100) or 70)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


# ---- The server -----------------------------------------------------------------------------------------------------------


def start(folder: Path) -> tuple[Path, int]:
    """Fork the server; write `folder`/python, which uses it. The server ends with the process that started it."""
    import accelerate.state  # noqa: F401 - `run` needs them
    import huggingface_hub.constants  # noqa: F401

    place, executable = folder / "socket", folder / "python"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(place))
    listener.listen(16)
    Path(f"{place}.json").write_text(json.dumps(read_when_loaded(os.environ)))
    executable.write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S '{__file__}' '{sys.executable}' '{place}' \"$@\"\n")
    executable.chmod(0o755)
    parent = os.getpid()
    server = os.fork()
    if server == 0:
        try:
            serve(listener, parent, str(executable))
        finally:
            os._exit(70)
    listener.close()
    return executable, server


def serve(listener: socket.socket, parent: int, executable: str) -> None:
    """Fork a process for every request until `parent` is gone."""
    kept = listener.fileno()
    os.closerange(3, kept)  # the parent's locks and pipes are not this process's
    os.closerange(kept + 1, 4096)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    running = 0
    while os.getppid() == parent:
        while running and os.waitpid(-1, os.WNOHANG)[0]:  # so that their CPU time counts as the tests'
            running -= 1
        if not select.select([listener], [], [], 1)[0]:
            continue
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                supervise(connection, executable)
            finally:
                os._exit(70)
        running += 1
        connection.close()


def supervise(connection: socket.socket, executable: str) -> None:
    """Run one request in a child; tell its exit code, or kill it where the asking process is gone."""
    request, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
    child = os.fork()
    if child == 0:
        connection.close()
        run(json.loads(request), streams, executable)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.send(str(code).encode())
    os._exit(0)


def run(request: dict, streams: list[int], executable: str) -> None:
    """Become the script: as the interpreter would run it, and never return."""
    import gc
    import importlib
    import logging
    import runpy
    import traceback
    import warnings

    from accelerate.state import AcceleratorState
    from huggingface_hub import constants

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 4096)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    importlib.reload(constants)  # the hub's client and transformers look there for every setting of theirs
    what, *rest = request["arguments"]
    sys.executable = executable
    sys.path[:0] = [str(Path(what).parent.resolve()) if what not in ("-m", "-c") else os.getcwd(),
                    *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    logging.getLogger().handlers.clear()  # pytest's
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.enable()
    code = 70
    try:
        if what == "-m":
            sys.argv = rest
            sys.modules.pop(rest[0], None)  # of a test that imported it: this run is its first
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif what == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [what, *rest]
            runpy.run_path(what, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    become(sys.argv[1], sys.argv[2], sys.argv[3:])
