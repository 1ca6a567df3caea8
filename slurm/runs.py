"""What the batch scripts ask about runs: where the run of a command lies, how it is named, and what all runs are doing.

    python -m slurm.runs folder train_student.py --config configs/10M/student.yaml seed=2     # prints models/GPT2-Small-Distilled
    python -m slurm.runs name train_student.py --config configs/10M/student.yaml              # prints GPT2-Small-Distilled
    python -m slurm.runs status [models/NAME ...]                                             # bash slurm/status.sh

Imports no torch: a batch script waits for it before every start.
"""

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from babylm.config import STAGES
from babylm.schema import UserError, apply_override, check, read_yaml

# The YAML that a stage reads without --config.
DEFAULTS = {"combine_babylm.py": "corpus", "train_teacher.py": "teacher", "train_baseline.py": "baseline", "train_student.py": "student",
            "train_moep_student.py": "moep", "ppo.py": "ppo"}
WAITING = ("pending", "running", "preempted")  # states that need a job behind them


def run_of(command: Sequence[str]) -> Path | None:
    """The run folder `<output>/<name>` of a stage's command line (without `python`); None for what keeps none.

    Raises:
        UserError: there is no such stage, or its YAML (with the overrides) is none that it would take.
    """
    if not command:
        raise UserError("which stage? for example: train_student.py --config configs/10M/student.yaml")
    script, rest = command[0], list(command[1:])
    if script == "-m" or "--dry_run" in rest:
        return None
    if not Path(script).is_file():
        near = difflib.get_close_matches(script, STAGES, n=1)
        raise UserError(f"{script}: no such stage; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(STAGES)}"))
    schema, default = STAGES.get(Path(script).name), DEFAULTS.get(Path(script).name)
    path, overrides = f"configs/10M/{default}.yaml" if default else None, []
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            path = rest.pop(0)
        elif word.startswith("--config="):
            path = word.partition("=")[2]
        elif "=" in word and not word.startswith("-"):
            overrides.append(word)
    if path is None:
        return None
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    if schema:
        check(schema, values, path)
    return Path(values.get("output", "models")) / values["name"] if "name" in values else None


# ---- What all runs are doing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunStatus:
    """One run's status.json beside what squeue says of its job ("" where it knows none)."""

    folder: Path
    state: str
    reason: str
    job: str
    queue: str

    @property
    def stale(self) -> str:
        """What has become of a run that no job stands behind any more; "" if its status is true."""
        if not self.job or self.queue or self.state not in ("pending", "running"):
            return ""
        if self.state == "pending":
            return f"job {self.job} ended before the run began (cancelled, or a job that it waited for failed)"
        return (f"job {self.job} ended without a word (killed, out of memory or time, or its node failed); the same command continues "
                "from the last checkpoint")


def jobs_in_queue() -> dict[str, str]:
    """{job id as squeue shows it, 12 or 12_3: state and, for a job that waits, why}. UserError where squeue does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError("squeue is not installed: run this where SLURM is, on the cluster's login node") from None
    except subprocess.TimeoutExpired:
        raise UserError("squeue did not answer for a minute: is the cluster's controller down?") from None
    if done.returncode:
        raise UserError(f"squeue: {done.stderr.strip()}")
    rows = [line.split("|") for line in done.stdout.splitlines() if line]
    return {job: state if reason == "None" else f"{state} ({reason})" for job, state, reason in rows}


def read_status(folder: Path, queue: dict[str, str]) -> RunStatus:
    """A run folder's status.json. UserError if it has none that can be read."""
    file = folder / "run" / "status.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return RunStatus(folder, values["state"], values["reason"], values.get("job", ""), queue.get(values.get("job"), ""))
    except FileNotFoundError:
        raise UserError(f"{folder} is no run folder (no {file.relative_to(folder)})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; the next start of the run writes it anew") from None


def status(folders: list[Path]) -> None:
    """Print a line per run; runs that claim to wait or run, but have no job any more, are marked as failed."""
    folders = folders or sorted(file.parents[1] for depth in ("*", "*/*") for file in Path("models").glob(f"{depth}/run/status.json"))
    if not folders:
        raise UserError("models/ holds no runs; give their folders: bash slurm/status.sh <folder> ...")
    queue = jobs_in_queue()
    rows = [("run", "status", "job", "squeue", "")]
    for folder in folders:
        found = read_status(folder, queue)
        state, reason = found.state, found.reason
        if found.stale and os.access(folder / "run", os.W_OK):
            from babylm.run_folder import write_status  # here, because it needs torch

            state, reason = "failed", found.stale
            write_status(folder, state, reason, found.job)
        if state == "preempted" and not found.queue:
            reason += "; no job is in the queue for it: submit it again"
        rows.append((str(folder), state, found.job or "-", found.queue or "-", reason))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]).rstrip())


def main(arguments: list[str]) -> None:
    """`folder` or `name` of a command, or `status`."""
    if arguments[:1] == ["status"]:
        status([Path(folder) for folder in arguments[1:]])
        return
    if arguments[:1] not in (["folder"], ["name"]):
        raise UserError("usage: python -m slurm.runs folder|name <stage> --config <YAML> [key=value ...], or status [models/NAME ...]")
    folder = run_of(arguments[1:])
    if arguments[0] == "name" and folder is None:
        raise UserError(f"{' '.join(arguments[1:])}: its config names no run, so seeds cannot have runs of their own")
    print("" if folder is None else folder if arguments[0] == "folder" else folder.name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
