"""One run = one folder `models/<name>/`: its record, its resume point, whether it finished, who may read it.

    <root>               the final model, loadable by AutoModelForCausalLM.from_pretrained
    chck_<N>M/           milestone checkpoints, kept for ever
    checkpoint-<step>/   resume state; the newest are kept while the run goes on, none after it finished
    run/                 config.yaml, identity.json, record.json, metrics.jsonl, status.json, finished.json

Everything is written under a temporary name and renamed, so that a file that is there is whole.
"""

import contextlib
import errno
import fcntl
import gc
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from babylm.config import RunConfig
from babylm.schema import UserError, content_hash, differing, identity
from custom_dataset import DataError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PREEMPTED_EXIT = 75  # EX_TEMPFAIL: a scheduler requeues, dependent jobs do not start
RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "peft", "bitsandbytes", "numpy")


# ---- Atomic files ---------------------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(values, indent=1, sort_keys=False) + "\n")


@contextlib.contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the name `path` when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        seal(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_aside(folder: Path) -> Path:
    """Rename a folder to the first free <name>-old<n>, and return that: nothing is deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-old{number}")).exists():
        number += 1
    os.rename(folder, aside)
    return aside


def seal(folder: Path) -> None:
    """Write `complete.json`, the sizes of all files, after flushing them to disk: what `is_whole` checks."""
    sizes = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "complete.json"):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
        sizes[str(file.relative_to(folder))] = file.stat().st_size
    write_json(folder / "complete.json", sizes)


def is_whole(folder: Path) -> bool:
    """Whether a sealed folder still has every file at its full size."""
    try:
        sizes = json.loads((folder / "complete.json").read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


# ---- Room on the disk ------------------------------------------------------------------------------------------------


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(parent for parent in [path, *path.resolve().parents] if parent.exists())


def require_space(needed: Sequence[tuple[str, Path, int]], advice: str) -> None:
    """UserError where files do not fit on their disks.

    Args:
        needed: (what, folder it goes to, bytes) of each kind of file; folders need not exist.
        advice: what to do about it.
    """
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for entry in needed:
        disks.setdefault(existing_parent(entry[1]).stat().st_dev, []).append(entry)
    for entries in disks.values():
        total, folder = sum(size for _, _, size in entries), entries[0][1]
        if total > (free := free_bytes(folder)):
            parts = " + ".join(f"{what} {amount(size)}" for what, _, size in entries)
            raise UserError(f"{amount(total)} are to be written ({parts}), but {amount(free)} are free for {folder}: {advice}")


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist."""
    return shutil.disk_usage(existing_parent(folder)).free


def amount(size: float) -> str:
    """A number of bytes for people: 812 B, 3.4 MB, 120 GB (powers of 1000)."""
    power = 0
    while size >= 999.5 and power < 4:
        size, power = size / 1000, power + 1
    return f"{size:.{int(size < 9.95 and power > 0)}f} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


# ---- The run --------------------------------------------------------------------------------------------------------


class RunFolder:
    """The folder of one run. Only the main process (rank 0) writes; others read.

    Args:
        config: the stage's config.
        stage: script name, such as "train_student.py".
        main: whether this process writes.
    """

    def __init__(self, config: RunConfig, stage: str, main: bool = True):
        self.config, self.stage, self.main = config, stage, main
        self.root = Path(config.output) / config.name
        self.run = self.root / "run"
        self.metrics = self.run / "metrics.jsonl"
        self.resume_from: Path | None = None  # set by whoever opened the run

    # -- before training

    def already_finished(self) -> dict | None:
        """The content of finished.json, if this run reached its end."""
        return read_finished(self.root)

    def open(self, data: dict[str, str]) -> Path | None:
        """Create the folder, or continue in it; write the record.

        Args:
            data: fingerprints of what is read, e.g. {"train": ..., "val": ..., "tokenizer": ..., "teacher": ...}. Part
                of the run's identity.

        Returns:
            The checkpoint to resume from, or None to start at step 0.

        Raises:
            UserError: the folder holds another run (the differing keys are listed), is not writable, or
                `resume_path` is no whole checkpoint.
        """
        mine = {**identity(self.config), **{f"fingerprint.{name}": value for name, value in data.items()}}
        if self.config.dry_run:
            return self._would_open(mine)
        requeued = self._requeued()
        if self.main:
            if self.config.fresh and self._holds_a_run() and not requeued:
                with _nobody_trains(self.run / "lock"):
                    print(f"fresh: moved the old {self.root} to {move_aside(self.root)}", flush=True)
            self._require_own(mine)
            if self.already_finished():
                return None  # nothing will be run: its record and metrics stay as they are
            try:
                self.run.mkdir(parents=True, exist_ok=True)
                _lock(self.run / "lock")
                write_json(self.run / "identity.json", mine)
            except OSError as error:
                raise self._unwritable(error.strerror) from error
            for stale in [*self.root.glob(".*.tmp"), *self.run.glob(".*.tmp")]:  # what a killed process was writing
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            write_text(self.run / "config.yaml", yaml.safe_dump(self.config.model_dump(), sort_keys=False))
            write_json(self.run / "record.json", {**self._record(mine, data), "requeued": requeued})
            self.set_status("pending")
        _opened.append(self)
        checkpoint = self._own_resume_point(mine, again=requeued)
        if self.main:
            step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
            for newer in self.checkpoints():  # resume_path went back: what lay beyond it is made again, as its metrics are
                if self.config.resume_path and not requeued and int(newer.name.split("-")[1]) > step:
                    shutil.rmtree(newer)
            self.forget_metrics_after(step)
        return checkpoint

    def _holds_a_run(self) -> bool:
        """Whether the folder holds more than the status of a job that waits for its turn."""
        return any(path not in (self.run, self.run / "status.json") for path in self.root.rglob("*"))

    def _requeued(self) -> bool:
        """Whether this SLURM job began the run, and was stopped and started again: `fresh` and `resume_path` were for its first start."""
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" or not (self.run / "record.json").is_file():
            return False
        record = json.loads((self.run / "record.json").read_text(encoding="utf-8"))
        # The main process has written what it found before the others look.
        return record.get("job") == slurm_job() if self.main else record["requeued"]

    def _would_open(self, mine: dict) -> Path | None:
        """What `open` would return or raise, with the disk left alone."""
        aside = self.config.fresh and self._holds_a_run()  # then all that is there counts for nothing
        with _nobody_trains(self.run / "lock"):
            pass
        if not aside:
            self._require_own(mine)
            if self.already_finished():
                return None
        existing = existing_parent(self.root)
        if not os.access(existing, os.W_OK):
            raise self._unwritable("Permission denied")
        if not existing.is_dir():
            raise self._unwritable(f"{existing} is a file")
        return None if aside and not self.config.resume_path else self._own_resume_point(mine)

    def _unwritable(self, reason: str | None) -> UserError:
        return UserError(f"cannot write to {self.root}: {reason}; choose another output= or free some space")

    def _require_own(self, mine: dict) -> None:
        """UserError where the folder holds something else than this run."""
        recorded = self.run / "identity.json"
        if recorded.is_file():
            if self.metrics.is_file() or self.checkpoints():  # else nothing was trained yet: it was refused, and then mended
                self._require_same(json.loads(recorded.read_text(encoding="utf-8")), mine)
        elif self._holds_a_run():
            raise UserError(f"{self.root} exists but is no run folder of this pipeline: choose another name=, "
                            "or fresh=true to move it aside")

    def _own_resume_point(self, mine: dict, again: bool = False) -> Path | None:
        """Where to continue, which must be of this run; `again`: a job's later start, for which `resume_path` was not meant."""
        checkpoint = self.newest_whole() if again else self.resume_point()
        if checkpoint and (theirs := checkpoint.parent / "run" / "identity.json").is_file():
            self._require_same(json.loads(theirs.read_text(encoding="utf-8")), mine)  # resume_path may lie in another run
        return checkpoint

    def keep(self, name: str) -> Path | None:
        """Folder run/<name> for what a stage keeps between its starts; None in a dry run, which keeps nothing."""
        return None if self.config.dry_run else self.run / name

    def _require_same(self, theirs: dict, mine: dict) -> None:
        changed = differing(theirs, mine, type(self.config))
        if not changed:
            return
        lines = [f"  {name}: {theirs.get(name)!r} there, {mine.get(name)!r} now" for name in changed]
        advice = (f"name={self.config.name}-s{self.config.seed}" if changed == ["seed"] else "another name=")
        raise UserError(f"{self.root} holds a run with other settings:\n" + "\n".join(lines) +
                        f"\nUse {advice}, put the settings back to resume it, or fresh=true to move it aside and start over")

    def _record(self, mine: dict, data: dict[str, str]) -> dict:
        import torch

        versions = {}
        for package in RECORDED_PACKAGES:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[package] = metadata.version(package)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        return {"stage": self.stage, "name": self.config.name, "seed": self.config.seed,
                "command": shlex.join([Path(sys.executable).name, *sys.argv]), "identity_hash": content_hash(mine), "data": data,
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "git_commit": _git("rev-parse", "HEAD"),
                "git_diff": _git("diff", "HEAD"), "python": platform.python_version(), "packages": versions,
                "device": device, "cpus": os.cpu_count(), "processes": int(os.environ.get("WORLD_SIZE", "1")),
                **({"job": job} if (job := slurm_job()) else {})}

    # -- resume

    def checkpoints(self) -> list[Path]:
        """checkpoint-<step> folders, oldest first, whole or not."""
        found = [p for p in self.root.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def resume_point(self) -> Path | None:
        """Where to continue: `resume_path`, or the newest whole checkpoint."""
        if self.config.resume_path:
            path = Path(self.config.resume_path)
            if not re.fullmatch(r"checkpoint-\d+", path.name) or not is_whole(path):
                raise UserError(f"resume_path: {path} is not a whole checkpoint-<step> folder; whole ones here: "
                                f"{', '.join(p.name for p in self.checkpoints() if is_whole(p)) or 'none'}")
            return path
        return self.newest_whole()

    def newest_whole(self) -> Path | None:
        """The newest whole checkpoint here, telling the user of damaged ones it passes over."""
        for checkpoint in reversed(self.checkpoints()):
            if is_whole(checkpoint):
                return checkpoint
            if self.main:
                print(f"warning: {checkpoint} is damaged (cut short while it was saved?): not used", flush=True)
        return None

    def rotate(self) -> None:
        """Delete all but the newest `checkpoints.keep` whole checkpoints."""
        whole = [p for p in self.checkpoints() if is_whole(p)]
        for old in whole[: -self.config.checkpoints.keep]:
            shutil.rmtree(old)

    def forget_metrics_after(self, step: int) -> None:
        """Drop metrics that a run wrote beyond the step it resumes from; they will be written again."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a kill
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    # -- while it runs

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        if self.main:
            with open(self.metrics, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")

    def set_status(self, state: str, reason: str = "") -> None:
        """run/status.json: pending, running, preempted, done or failed. What a batch script looks at."""
        if self.main and self.run.is_dir() and not self.config.dry_run:
            write_status(self.root, state, reason, slurm_job())

    def install_final(self, write: Callable[[Path], None]) -> None:
        """Let `write` fill a temporary folder with the final model, then move its files to the root."""
        staging = self.root / ".final.tmp"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            write(staging)
            for file in staging.iterdir():
                target = self.root / file.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(file, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def finish(self, result: dict[str, Any]) -> None:
        """The run reached its configured end: write finished.json and drop the resume state."""
        write_json(self.run / "finished.json", result)
        self.set_status("done")
        for checkpoint in self.checkpoints():
            shutil.rmtree(checkpoint)


def write_status(root: Path, state: str, reason: str = "", job: str | None = None) -> None:
    """<root>/run/status.json. `job`: the SLURM job that the run waits for or runs in (slurm/job.sh writes the same file)."""
    write_json(root / "run" / "status.json", {"state": state, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                                              **({"job": job} if job else {})})


def slurm_job() -> str | None:
    """The SLURM job that this process belongs to, as squeue shows it: 12, or 12_3 for a task of an array."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=20,
                              cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# ---- What the next stage may read -----------------------------------------------------------------------------------


def read_finished(root: Path) -> dict | None:
    """finished.json of a run folder, or None. UserError if it is damaged."""
    path = root / "run" / "finished.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and run the command in run/record.json again") from error


def require_finished(path: str, needed_by: str, script: str = "train_teacher.py") -> None:
    """Refuse a local run folder that is missing or unfinished, naming the command that makes it.

    A plain checkpoint folder without a run record (downloaded, say) passes if it holds a config.json; a name that is no
    local path is left to the hub.

    Args:
        needed_by: key or command that wants it, for the message; script: what makes such a run, named where no record does.
    """
    root = Path(path)
    if not root.exists():
        # org/name or a bare hub name; anything that looks like a local path is a mistake
        if re.fullmatch(r"[\w-]+(/[\w.-]+)?", path) and not path.startswith("models/"):
            return
        raise UserError(f"{needed_by}: {path} does not exist; make it first, for example: python {script} --config <its YAML> "
                        f"output={root.parent} name={root.name}")
    if (root / "run").is_dir() and read_finished(root) is None:
        record = json.loads((root / "run" / "record.json").read_text(encoding="utf-8")) if (root / "run" / "record.json").is_file() else {}
        command = record.get("command", f"python {script} name={root.name}")
        raise UserError(f"{needed_by}: {path} is an unfinished run; finish it first: {command}")
    if not ((root / "config.json").is_file() or (root / "adapter_config.json").is_file()):
        raise UserError(f"{needed_by}: {path} holds no model (no config.json)")


# ---- How every stage script starts and ends -------------------------------------------------------------------------


class Preempted(BaseException):  # so that no library swallows it
    """A signal asked the run to stop; its state is saved."""


class StopRequest:
    """Set by SIGTERM or SIGUSR1: the run then saves at the end of the step and stops."""

    def __init__(self) -> None:
        self.signal_name = ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.signal_name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.signal_name)


_locks: dict[Path, int] = {}  # file descriptors, held until this process ends, however it ends


def _lock(path: Path) -> None:
    """Refuse to start a run that another process is running: two would overwrite each other's checkpoints and metrics."""
    if path.resolve() not in _locks:
        _locks[path.resolve()] = _locked(path)


def _locked(path: Path) -> int:
    """The descriptor of a locked file; UserError if another process has locked it."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{path.parent.parent} is being trained by another process: wait for it, or choose another name=") from None
    return lock


@contextlib.contextmanager
def _nobody_trains(path: Path) -> Iterator[None]:
    """Within this, no other process trains in the run folder of this lock, which may be renamed."""
    if not path.is_file():
        yield  # nobody ever has
        return
    place = path.resolve()
    lock = _locked(path) if place not in _locks else None  # else held since an earlier run in this process
    try:
        yield
    finally:
        if lock is None and not path.exists():  # moved
            lock = _locks.pop(place)
        if lock is not None:
            os.close(lock)


_opened: list[RunFolder] = []  # by this process: whose status.json has to be kept true if it ends early


def run_stage(main: Callable[[], None]) -> None:
    """Run a script's main and keep run/status.json true, however it ends.

    Mistakes of the user and full disks are shown without a traceback (exit code 1); a signal that asks the process to stop
    ends it with code 75, at once while things are being loaded, at the end of the step while a model trains.
    """

    def stop_now(number: int, _frame: Any) -> None:
        raise Preempted(f"{signal.Signals(number).name} before the first step; the same command starts again")

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop_now)
    if not gc.get_freeze_count():
        gc.freeze()  # what the imports made stays: searching it for garbage takes a second and a half when the process ends
    try:
        main()
    except Preempted as stop:
        for number in (signal.SIGTERM, signal.SIGUSR1):  # a scheduler may repeat itself: the end is under way
            signal.signal(number, signal.SIG_IGN)
        _set_status("preempted", str(stop))
        print(f"preempted: {stop}", flush=True)
        sys.exit(PREEMPTED_EXIT)
    except (UserError, DataError) as error:
        _set_status("failed", str(error))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _set_status("failed", "interrupted by Ctrl-C")
        print("interrupted: the same command continues from the newest checkpoint", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:
        _set_status("failed", "".join(traceback.format_exception_only(error)).strip())
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            print(f"error: {error.filename or 'a file'} could not be written: {error.strerror}; free some space and run the same "
                  "command again", file=sys.stderr)
            sys.exit(1)
        raise


def _set_status(state: str, reason: str) -> None:
    for folder in _opened:
        with contextlib.suppress(OSError):  # the disk may be full: the error itself is worth more than its record
            folder.set_status(state, reason)


@contextlib.contextmanager
def saving(what: Path) -> Iterator[None]:
    """Turn the ways in which torch, safetensors and the system report a failed write into one error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
            raise
        raise UserError(f"could not save {what}: {error}. Free some space and run the same command again: it continues from "
                        "the last whole checkpoint") from error
