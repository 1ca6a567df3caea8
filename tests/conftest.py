"""What several test files need: one small finished corpus, a way to run a stage, and the optional folder of real data."""

import os

# Before numpy and torch are loaded, and for child processes: tests that run beside other work must not wait for a second thread.
os.environ.update(OMP_NUM_THREADS="1", RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import functools
import gc
import importlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import yaml

# torch, transformers and what imports them are imported where they are used: the process of pytest-xdist that hands out the
# tests reads this file too, and the others begin after it.

ROOT = Path(__file__).parent.parent
WARM = pytest.StashKey[Path]()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """The imports of all test files make a million objects that live as long as the process: no garbage is looked for meanwhile,
    nor among them ever after. What is imported then is what warm_python begins with."""
    gc.disable()
    try:
        result = yield
    finally:
        gc.enable()
        gc.freeze()
    if session.items:
        import torch
        import warm_python

        torch.set_num_threads(1)
        folder = tempfile.mkdtemp(prefix="warm-")  # short: the path of a socket has at most 107 characters
        session.config.stash[WARM], server = warm_python.start(Path(folder))
        session.config.add_cleanup(lambda: (os.kill(server, signal.SIGKILL), os.waitpid(server, 0), shutil.rmtree(folder)))
    return result


# Those that take longest, in this order: begun last, one would keep one of two processes busy while the other has nothing left to do.
BEGUN_FIRST = ("readme", "training", "slurm", "resume", "sweeps", "processes", "teacher_cache", "chat", "eval_zero_shot", "benchmarks")


def pytest_collection_modifyitems(items):
    """The longest files first (with --no-loadscope-reorder; pytest-xdist goes by the number of tests otherwise)."""
    place = {f"test_{name}.py": number for number, name in enumerate(BEGUN_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def write_yaml_file(path, values):
    """Write `values` as YAML, making the folders on the way; return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def run_stage_1(config, *overrides):
    """Run stage 1 in this process, as `python combine_babylm.py --config <config> <overrides>` would; errors are raised."""
    import combine_babylm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["combine_babylm.py", "--config", str(config), *map(str, overrides)])
        combine_babylm.main()


@pytest.fixture(scope="module", autouse=True)
def environment():
    """No file's tests leave variables behind, as gradio does: warm_python would start cold for all that follow in this process."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def write_yaml():
    """write_yaml(path, values) -> path."""
    return write_yaml_file


@pytest.fixture(scope="session")
def stage1():
    """stage1(config, "key=value", ...) runs stage 1 in this process."""
    return run_stage_1


@pytest.fixture(scope="session")
def warm_python(pytestconfig):
    """Path of a `python` that starts scripts and modules with everything imported: see warm_python.py. For processes whose start,
    and whose end by a signal, are not what is tested."""
    return pytestconfig.stash[WARM]


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

    from babylm import run_folder

    def run(script, *args, as_script=False):
        main = importlib.import_module(script).main
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
            patch.setattr(run_folder, "_opened", [])
            try:
                run_folder.run_stage(main) if as_script else main()
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    return run


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Folder of the six raw `<domain>.train` files of a demo corpus of about 20,000 words. Read only."""
    from babylm.demo_corpus import write_corpus

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
    from babylm import models

    return models.load_tokenizer(corpus / "tokenizer")


@pytest.fixture(scope="session")
def small(raw, corpus):
    """A corpus folder of about 2,000 words with the vocabulary of `corpus`: several epochs are a few steps."""
    folder = raw.parent / "small"
    run_stage_1(write_yaml_file(raw.parent / "small.yaml", {
        "corpus": {"input": str(raw), "output": str(folder), "max_words": 2000, "validation_fraction": 0.2},
        "tokenizer": {"path": str(corpus / "tokenizer")},
    }))
    return folder


TEACHERS = {"gpt2": {"layers": 3, "width": 24, "heads": 2}, "llama": {"architecture": "llama", "layers": 2, "width": 32, "heads": 2},
            "gptj": {"architecture": "gptj", "layers": 2, "width": 16, "heads": 2}}


@pytest.fixture(scope="session")
def teachers(tokenizer, tmp_path_factory):
    """teachers("gpt2", "llama", "gptj") -> folders of plain checkpoints with random weights, large enough to teach something;
    "adapter" is one of peft on a base that is a copy of gpt2. Read only."""
    import torch

    from babylm import models
    from babylm.config import ModelSection

    folder = tmp_path_factory.mktemp("teachers")

    def model(name):
        built = models.build_model(ModelSection(**TEACHERS[name], max_positions=64), tokenizer, seed=len(name))
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.mul_(3)
        return built

    def path(name):
        if not (folder / name).exists():
            (folder / name).mkdir()
            if name == "adapter":
                from peft import LoraConfig, get_peft_model

                (folder / "base").mkdir()
                models.save_model(model("gpt2"), tokenizer, folder / "base")
                adapted = get_peft_model(models.load_causal_lm(str(folder / "base")), LoraConfig(
                    task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False))
                models.save_model(adapted, tokenizer, folder / name)
            else:
                models.save_model(model(name), tokenizer, folder / name)
        return folder / name

    return lambda *names: [path(name) for name in names]


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

    from babylm.run_folder import run_stage

    def call(function):
        out, err = tmp_path / "child.out", tmp_path / "child.err"
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 70
            gc.freeze()  # the parent's objects: each collection would copy all their pages into this process
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


@pytest.fixture
def on_processes(tmp_path):
    """on_processes(4, "train_student", "--config", ..., before=f, codes={75}) runs a stage as torchrun would (gloo), in forked processes.

    `before(rank)` is called in each of them first, to change what it does. All must end with the same exit code, one of `codes`.
    Returns what each printed.
    """
    from accelerate.state import AcceleratorState

    from babylm import run_folder

    def call(count, script, *args, before=None, codes=(0,)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count),
                     "LOCAL_WORLD_SIZE": str(count)}
        logs, children = [tmp_path / f"rank{rank}.log" for rank in range(count)], []
        for rank, log in enumerate(logs):
            sys.stdout.flush()
            children.append(os.fork())
            if children[-1] == 0:
                code = 70
                gc.freeze()
                try:
                    with open(log, "w", buffering=1) as stream:
                        for number in (1, 2):
                            os.dup2(stream.fileno(), number)
                        sys.stdout = sys.stderr = stream
                        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                        AcceleratorState._reset_state(reset_partial_state=True)  # what runs in the parent left
                        sys.argv, run_folder._opened[:] = [f"{script}.py", *map(str, args)], []
                        try:
                            if before:
                                before(rank)
                            run_folder.run_stage(importlib.import_module(script).main)
                            code = 0
                        except SystemExit as end:
                            code = end.code
                        except BaseException:
                            traceback.print_exc()
                finally:
                    os._exit(code)  # a child never goes on with the tests
        found = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        texts = [log.read_text() for log in logs]
        assert len(set(found)) == 1 and found[0] in codes, f"exit codes {found}\n" + "\n".join(texts)
        return texts

    return call


@pytest.fixture
def on_two_processes(on_processes):
    """on_two_processes("train_student", "--config", ...) is `on_processes` with two."""
    return functools.partial(on_processes, 2)
