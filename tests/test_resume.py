"""A run that is stopped, killed or damaged on the way ends as if nothing had happened, or says why it cannot."""

import gc
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from babylm import run_folder, training
from babylm.config import BaselineConfig
from babylm.run_folder import RunFolder, is_whole, run_stage
from babylm.schema import UserError, load
from custom_dataset import open_store

ROOT = Path(training.__file__).parents[1]
FORK = multiprocessing.get_context("fork")
PASSING = {"seconds", "tokens_per_s"}  # what two equal runs may differ in

# 50 steps of 16 blocks are two and a half epochs, each with an offset of its own; dropout makes the random state matter;
# lines are logged, models validated and checkpoints saved at steps that do not coincide.
SETTINGS = {
    "data": {"seq_len": 128, "eval_blocks": 10},
    "model": {"layers": 2, "width": 32, "heads": 2, "max_positions": 128, "dropout": 0.1},
    "training": {"steps": 50, "batch_size": 16, "lr": 3e-3, "warmup_steps": 5, "device": "cpu"},
    "checkpoints": {"milestones": False, "every_words": "3K", "save_steps": 7, "keep": 2},
    "logging": {"logging_steps": 3, "eval_steps": 10},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, write_yaml):
    """A folder with run.yaml (SETTINGS on the small corpus, output models/ beside it)."""
    folder = tmp_path_factory.mktemp("resume")
    data = {"corpus": str(corpus), **SETTINGS["data"]}
    write_yaml(folder / "run.yaml", {"name": "x", "output": str(folder / "models"), **SETTINGS, "data": data})
    return folder


@pytest.fixture(scope="module")
def command(home):
    """command("train_student", "b", "key=value", ...) -> the arguments of that run, with models/teacher as its teacher."""

    def arguments(script, name, *overrides):
        teaching = [f"distillation.teacher={home}/models/teacher", "distillation.alpha=0.3"] if script == "train_student" else []
        return ["--config", str(home / "run.yaml"), f"name={name}", *teaching, *overrides]

    return arguments


@pytest.fixture(scope="module")
def stage(home, command, in_process):
    """stage("train_baseline", "b", "key=value", ...) runs a stage in this process to its end; returns models/b."""

    def run(script, name, *overrides):
        in_process(script, *command(script, name, *overrides))
        return home / "models" / name

    return run


class Child:
    """A stage in a process of its own, as `python <script>.py` would run it (forked, so that nothing is imported again)."""

    def __init__(self, script, arguments, log, before=None):
        stream = open(log, "w", buffering=1)  # noqa: SIM115 - it is the child's for as long as it lives

        def work():
            gc.freeze()  # see conftest.py
            for number in (1, 2):
                os.dup2(stream.fileno(), number)
            sys.stdout = sys.stderr = stream
            sys.argv, run_folder._opened[:] = [f"{script}.py", *arguments], []
            if before:
                before()
            run_stage(importlib.import_module(script).main)

        self.log = log
        self.process = FORK.Process(target=work)
        self.process.start()
        stream.close()

    def kill(self, number):
        os.kill(self.process.pid, number)

    def poll(self):
        return self.process.exitcode

    def wait(self):
        """The exit code (-9 after SIGKILL), as a shell's parent sees it."""
        self.process.join(120)
        assert self.process.exitcode is not None, "the process hangs"
        return self.process.exitcode

    def output(self):
        return Path(self.log).read_text()


class Script(Child):
    """The same as a fresh interpreter."""

    def __init__(self, script, arguments, log):
        self.log = log
        with open(log, "w") as stream:
            self.process = subprocess.Popen([sys.executable, str(ROOT / f"{script}.py"), *arguments], stdin=subprocess.DEVNULL,
                                            stdout=stream, stderr=subprocess.STDOUT)

    def poll(self):
        return self.process.poll()

    def wait(self):
        return self.process.wait(120)


@pytest.fixture(scope="module")
def launch(home, command):
    """launch("train_baseline", "b", "key=value", ..., kind=Child) starts a run and returns at once."""
    started = []

    def start(script, name, *overrides, kind=Child, **options):
        child = kind(script, command(script, name, *overrides), str(home / f"{name}.log"), **options)
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.process.kill()


@pytest.fixture(scope="module")
def stop_after(home, launch):
    """stop_after("train_baseline", "b", step, SIGTERM) runs until a line of `step` or later is logged, then sends the signal."""

    def stop(script, name, step, number, *overrides, **options):
        child, run = launch(script, name, *overrides, **options), home / "models" / name
        while child.poll() is None and last_step(run) < step:
            time.sleep(0.005)
        assert child.poll() is None, child.output()
        child.kill(number)
        return child

    return stop


def metrics(run):
    path = run / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.is_file() else []


def last_step(run):
    return max((row["step"] for row in metrics(run)), default=0)


def status(run):
    return json.loads((run / "run" / "status.json").read_text())


def finished(run):
    return json.loads((run / "run" / "finished.json").read_text())


def checkpoints(run):
    return sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def newest_step(run):
    return int(checkpoints(run)[-1].name.split("-")[1])


def without_time(rows):
    return [{name: value for name, value in row.items() if name not in PASSING} for row in rows]


def require_same_run(run, reference):
    """Final weights, every milestone and every logged figure are equal to the last bit."""
    assert without_time(metrics(run)) == without_time(metrics(reference))
    assert without_time([finished(run)]) == without_time([finished(reference)])
    files = {path.relative_to(reference) for path in reference.rglob("model.safetensors")}
    assert {path.relative_to(run) for path in run.rglob("model.safetensors")} == files and len(files) > 3
    for file in files:
        assert (run / file).read_bytes() == (reference / file).read_bytes(), file


@pytest.fixture(scope="module")
def teacher(stage):
    """With dropout in its config, which must not act while it teaches."""
    return stage("train_teacher", "teacher", "model.width=48", "training.steps=20", "checkpoints.every_words=null")


@pytest.fixture(scope="module")
def reference(stage, teacher):
    """Uninterrupted runs, by script."""
    runs = {}

    def run(script):
        if script not in runs:
            runs[script] = stage(script, f"reference-{script}")
        return runs[script]

    return run


@pytest.fixture(scope="module")
def stopped_run(stop_after, home, teacher):
    """A student that SIGTERM stopped in its second epoch, with two checkpoints. Copy it before use: see `stopped`."""
    assert stop_after("train_student", "template", 24, signal.SIGTERM).wait() == 75
    assert len(checkpoints(home / "models" / "template")) == 2
    return home / "models" / "template"


@pytest.fixture
def stopped(stopped_run, home, request):
    """A copy of the stopped run, under a name of its own."""
    return Path(shutil.copytree(stopped_run, home / "models" / f"stopped-{abs(hash(request.node.nodeid))}"))


# ---- Stopped and continued ------------------------------------------------------------------------------------------

EXIT = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGKILL: -9}


@pytest.mark.parametrize("script, signals", [
    ("train_baseline", [signal.SIGTERM]),
    ("train_baseline", [signal.SIGUSR1, signal.SIGKILL]),
    ("train_student", [signal.SIGKILL, signal.SIGTERM]),
], ids=lambda value: "-".join(s.name for s in value) if isinstance(value, list) else value)
def test_a_stopped_run_ends_as_an_uninterrupted_one(script, signals, reference, stop_after, stage, home):
    """Stopped once or twice at random places of the second and third epoch, between two log lines more often than not."""
    expected = reference(script)
    name = f"{script}-{'-'.join(number.name for number in signals)}"
    run, place = home / "models" / name, random.Random(name)
    for at, number in zip(sorted(place.sample(range(22, 42), len(signals))), signals, strict=True):
        child = stop_after(script, name, at, number)
        assert child.wait() == EXIT[number], child.output()
        assert not (run / "run" / "finished.json").exists() and not (run / "model.safetensors").exists()
        if number != signal.SIGKILL:
            step = newest_step(run)
            assert status(run)["state"] == "preempted" and f"{number.name} at step {step} of 50" in status(run)["reason"]
            assert f"preempted: {number.name} at step {step} of 50" in child.output()
    stage(script, name)
    assert status(run)["state"] == "done"
    require_same_run(run, expected)


def test_a_script_stopped_by_sigterm_exits_with_75_and_continues(reference, stop_after, stage, home):
    """The whole way, from a fresh interpreter."""
    expected = reference("train_student")
    child = stop_after("train_student", "script", 9, signal.SIGTERM, kind=Script)
    assert child.wait() == 75, child.output()
    require_same_run(stage("train_student", "script"), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_while_things_are_loaded_exits_with_75_too(number, launch, teacher, home, corpus, tokenizer):
    """The run waits for another process that builds its token store; there is no step yet that could be finished first."""
    name = f"loading-{number.name}"
    run = home / "models" / name
    store = open_store(corpus, "train", tokenizer).folder
    with FileLock(f"{store}.lock"):
        child = launch("train_student", name)
        while "waiting for it" not in child.output() and child.poll() is None:
            time.sleep(0.01)
        child.kill(number)
        time.sleep(0.2)
    assert child.wait() == 75, child.output()
    assert status(run)["state"] == "preempted" and number.name in status(run)["reason"]


def test_a_signal_at_the_last_step_lets_the_run_finish(stop_after, home):
    """Nothing is left to continue: 75 would requeue a job whose model is already there."""
    child = stop_after("train_baseline", "late", 10, signal.SIGTERM, "training.steps=10")
    assert child.wait() == 0, child.output()
    assert status(home / "models" / "late")["state"] == "done"


def test_only_the_newest_checkpoints_are_kept(stopped_run):
    steps = [int(path.name.split("-")[1]) for path in checkpoints(stopped_run)]
    assert len(steps) == 2 and all(is_whole(path) for path in checkpoints(stopped_run))
    assert steps[0] == (steps[1] - 1) // 7 * 7, "the last periodic one, and the one that the signal caused"


# ---- Damaged checkpoints --------------------------------------------------------------------------------------------


def open_folder(run, *overrides):
    config, _ = load(BaselineConfig, "", "", ["--config", str(run.parents[1] / "run.yaml"), f"name={run.name}", *overrides])
    return RunFolder(config, "train_baseline.py")


@pytest.mark.parametrize("damage", [
    *(f"cut {name}" for name in ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
                                 "progress.json", "complete.json")),
    "remove complete.json", "remove optimizer.pt",
])
def test_a_damaged_checkpoint_is_never_resumed_from(stopped, damage, capsys):
    older, newest = checkpoints(stopped)
    action, name = damage.split()
    if action == "cut":
        os.truncate(newest / name, (newest / name).stat().st_size // 2)
    else:
        (newest / name).unlink()
    assert open_folder(stopped).resume_point() == older
    assert f"{newest} is damaged" in capsys.readouterr().out


def test_a_run_continues_from_the_older_checkpoint_and_says_so(stopped, stage, reference, capsys):
    """The newest is cut short, and a kill has left two more that were never completed."""
    older, newest = checkpoints(stopped)
    os.truncate(newest / "trained.safetensors", 1000)
    shutil.copytree(older, stopped / ".checkpoint-48.tmp" / "checkpoint-48")
    shutil.copytree(older, stopped / "checkpoint-49", ignore=shutil.ignore_patterns("complete.json"))
    stage("train_student", stopped.name)
    output = capsys.readouterr().out
    assert f"{newest} is damaged" in output and f"{stopped / 'checkpoint-49'} is damaged" in output
    assert f"resuming from {older}" in output
    assert not list(stopped.glob(".*"))
    require_same_run(stopped, reference("train_student"))


def test_rotation_never_counts_a_damaged_checkpoint_as_one_that_is_kept(stopped):
    older, newest = checkpoints(stopped)
    (newest / "optimizer.pt").unlink()
    open_folder(stopped, "checkpoints.keep=1").rotate()
    assert older.exists()


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process cannot be set here")
@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt"])
def test_a_disk_that_fills_up_while_saving_is_an_error_and_costs_no_earlier_checkpoint(stopped, launch, file):
    """Once the run goes on, nothing may be written beyond the middle of `file`."""
    before = checkpoints(stopped)
    room = (before[0] / file).stat().st_size // 2
    if file == "optimizer.pt":
        assert room > (before[0] / "trained.safetensors").stat().st_size * 0.9
        room += 20_000  # the weights fit
    child = launch("train_student", stopped.name, "checkpoints.every_words=null", "checkpoints.save_steps=10")
    while "resuming from" not in child.output() and child.poll() is None:
        time.sleep(0.005)
    resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (room, room))
    assert child.wait() == 1
    assert "could not save" in child.output() and "Free some space" in child.output() and "Traceback" not in child.output()
    assert checkpoints(stopped) == before and all(map(is_whole, before)) and not list(stopped.glob(".*"))
    assert status(stopped)["state"] == "failed"


# ---- Where to continue ----------------------------------------------------------------------------------------------


def test_resume_path_takes_another_checkpoint(stopped, stage, reference, capsys):
    older, _ = checkpoints(stopped)
    stage("train_student", stopped.name, "--resume_path", str(older))
    assert f"resuming from {older}" in capsys.readouterr().out
    require_same_run(stopped, reference("train_student"))


def test_a_run_that_went_back_to_an_older_checkpoint_loses_no_rows_when_it_is_stopped_again(stopped, launch, stage, reference):
    """Stopped before its first new checkpoint: the newer one of the old attempt lies beyond the rows that are left."""
    older, _ = checkpoints(stopped)
    child = launch("train_student", stopped.name, f"resume_path={older}")
    while "resuming from" not in child.output() and child.poll() is None:
        time.sleep(0.002)
    child.kill(signal.SIGKILL)
    assert child.wait() == -9, child.output()
    stage("train_student", stopped.name)
    require_same_run(stopped, reference("train_student"))


def test_resume_path_must_be_a_whole_checkpoint(stopped, stage):
    older, newest = checkpoints(stopped)
    (newest / "complete.json").unlink()
    for path in (newest, stopped / "run", stopped / "checkpoint-1"):
        with pytest.raises(UserError, match=f"not a whole checkpoint-<step> folder; whole ones here: {older.name}"):
            stage("train_student", stopped.name, f"resume_path={path}")


def test_resume_path_of_another_run_is_refused(stopped, stage, home):
    """Its weights were made with another seed: continuing from them would be neither of the two runs."""
    with pytest.raises(UserError, match="seed"):
        stage("train_student", "newcomer", "seed=5", f"resume_path={checkpoints(stopped)[-1]}")


def test_what_is_reported_and_how_the_batch_is_spread_may_change(stopped, stage, reference):
    stage("train_student", stopped.name, "logging.logging_steps=1", "checkpoints.save_steps=1000", "checkpoints.keep=1",
          "training.per_device_batch_size=4", "training.threads=1")
    ours, theirs = ({(row["kind"], row["step"]): row for row in metrics(run)} for run in (stopped, reference("train_student")))
    assert ours.keys() > theirs.keys()
    assert {place: ours[place]["words"] for place in theirs} == {place: row["words"] for place, row in theirs.items()}
    assert finished(stopped)["ce"] == pytest.approx(finished(reference("train_student"))["ce"], abs=0.05)


# ---- Another run in the same folder ---------------------------------------------------------------------------------


def test_another_seed_suggests_another_name(stopped, stage):
    with pytest.raises(UserError, match=f"seed: 0 there, 3 now\nUse name={stopped.name}-s3"):
        stage("train_student", stopped.name, "seed=3")


def test_changed_settings_are_listed(stopped, stage):
    with pytest.raises(UserError) as caught:
        stage("train_student", stopped.name, "model.layers=3", "training.lr=1e-3", "data.seq_len=64", "distillation.alpha=0.5")
    for line in ("model.layers: 2 there, 3 now", "training.lr: 0.003 there, 0.001 now", "data.seq_len: 128 there, 64 now",
                 "distillation.alpha: 0.3 there, 0.5 now"):
        assert line in str(caught.value)
    assert newest_step(stopped) > 0 and status(stopped)["state"] == "preempted", "the run itself is left as it was"


def test_another_text_is_refused(stopped, stage, corpus, tmp_path, raw, stage1, write_yaml):
    other = tmp_path / "other"
    stage1(write_yaml(tmp_path / "c.yaml", {"corpus": {"input": str(raw), "output": str(other), "validation_fraction": 0.2},
                                            "tokenizer": {"path": str(corpus / "tokenizer")}}))
    with pytest.raises(UserError, match="fingerprint.train"):
        stage("train_student", stopped.name, f"data.corpus={other}")


def test_the_same_data_and_teacher_may_have_moved(stopped, stage, corpus, teacher, tmp_path, reference):
    moved, master = shutil.copytree(corpus, tmp_path / "corpus"), shutil.copytree(teacher, tmp_path / "teacher")
    stage("train_student", stopped.name, f"data.corpus={moved}", f"distillation.teacher={master}")
    assert (stopped / "model.safetensors").read_bytes() == (reference("train_student") / "model.safetensors").read_bytes()


def test_other_weights_of_the_teacher_are_refused(stopped, stage, teacher, tmp_path):
    other = shutil.copytree(teacher, tmp_path / "teacher")
    weights = load_file(other / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="fingerprint.teacher"):
        stage("train_student", stopped.name, f"distillation.teacher={other}")


def test_a_folder_that_is_no_run_is_left_alone(home, stage):
    (home / "models" / "mine").mkdir(parents=True)
    (home / "models" / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no run folder of this pipeline"):
        stage("train_baseline", "mine")


def test_fresh_moves_the_old_folder_aside(stopped, stage, capsys):
    before = {path.relative_to(stopped): path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    stage("train_student", stopped.name, "fresh=true", "training.steps=2", "logging.eval_steps=1", "seed=4")
    aside = stopped.with_name(f"{stopped.name}-old1")
    assert f"moved the old {stopped} to {aside}" in capsys.readouterr().out
    assert {path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()} == before
    assert metrics(stopped)[0]["step"] == 1 and finished(stopped)["steps"] == 2


# ---- Finished -------------------------------------------------------------------------------------------------------


def test_a_finished_run_started_again_says_so_and_changes_nothing(teacher, launch, home):
    kept = {path.relative_to(teacher): path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
    child = launch("train_teacher", "teacher", "model.width=48", "training.steps=20", "checkpoints.every_words=null")
    assert child.wait() == 0
    assert f"{teacher} is finished (20 steps" in child.output() and "fresh=true starts over" in child.output()
    assert status(teacher)["state"] == "done"
    changed = [str(name) for name, content in kept.items() if (teacher / name).read_bytes() != content]
    assert not set(changed) - {"run/status.json"}


def test_an_unfinished_teacher_is_refused_with_the_command_that_finishes_it(stopped, stage, home):
    with pytest.raises(UserError, match=r"is an unfinished run; finish it first: .*train_student.py --config .*name=template"):
        stage("train_student", "early", f"distillation.teacher={stopped}")
    assert not (home / "models" / "early").exists()


def test_a_missing_teacher_is_refused_with_the_command_that_makes_it(stage, home):
    with pytest.raises(UserError, match="does not exist; make it first, for example: python train_teacher.py --config .* name=nobody"):
        stage("train_student", "early", f"distillation.teacher={home}/models/nobody")


def test_a_run_that_is_going_on_is_not_started_twice(home, stage):
    """A first process holds the folder; a second one has to leave it alone."""
    folder = home / "models" / "twice"
    (folder / "run").mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(run_folder.__file__).parent.parent)!r})
from babylm.run_folder import _lock
_lock(Path({str(folder / "run" / "lock")!r}))
print("held", flush=True)
time.sleep(100)
"""], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="twice is being trained by another process"):
            run_folder._lock(folder / "run" / "lock")
        for keys in (["fresh=true"], ["--dry_run"], ["fresh=true", "--dry_run"]):  # nor is it moved from under the first
            with pytest.raises(UserError, match="twice is being trained by another process"):
                stage("train_baseline", "twice", *keys)
        assert [path.name for path in folder.parent.glob("twice*")] == ["twice"]
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    run_folder._lock(folder / "run" / "lock")  # the lock goes with the process that held it, killed or not
