"""A sweep: axes of values and seeds over a base config, every combination an ordinary run folder.

sweep.py is the command, sweep_report.py what came out. A sweep's YAML:

    name: lambda                        # runs go to <output>/<name>/<run>
    stage: train_student.py
    config: configs/10M/student.yaml    # every run is this, with the keys below
    set: {training.epochs: 2}           # for all of them
    grid:                               # every combination of one value of each axis
      distillation.temperature: [1, 2]  # a config key and its values,
      method:                           # or points with names, each with any keys (also stage and config);
        CE: {stage: train_baseline.py, config: configs/10M/baseline.yaml}
        KD: {distillation.teacher: "models/teacher-{words}"}     # {axis} stands for the value of another axis, {seed} for the seed
      words: {250K: {data.corpus: corpus_250K}, 1M: {data.corpus: corpus_split}}
    seeds: [1, 2, 3]
    control: {method: CE}               # what the other values of that axis are compared with, seed by seed
"""

import contextlib
import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import field_validator, model_validator

from babylm.config import STAGES, RunConfig
from babylm.run_folder import PREEMPTED_EXIT, read_finished
from babylm.schema import Section, UserError, apply_override, check, differing, identity, key, milestone_words, parse_word_count, read_yaml

SCHEMAS = {script: schema for script, schema in STAGES.items() if issubclass(schema, RunConfig)}  # those that make a run folder
OWN_KEYS = ("seed", "name", "output", "fresh", "resume_path")  # of a run, that the sweep itself gives
COLUMNS = ("run", "seed", "state", "steps", "words_seen", "parameters", "seconds", "ce", "perplexity")  # of a report: no axis is called so


class SweepConfig(Section):
    """`sweep.py`."""

    name: str = key(..., "runs go to <output>/<name>/<run>", min_length=1)
    output: str = key("models", "folder of all runs and sweeps")
    stage: str = key("train_student.py", "the script that every run is of, unless a point of the grid names another")
    config: str | None = key(None, "the base config of every run, unless a point of the grid names another")
    set: dict[str, Any] = key({}, "config keys of all runs, as {training.lr: 1e-3}")
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = key(
        ..., "axes: a config key with a list of values, or a name with points {label: {config key: value}}", min_length=1)
    seeds: list[int] = key([], "every combination with each of these; default: the seed of the config")
    control: dict[str, Any] = key({}, "{axis: value}: what the other values on these axes are compared with, all else equal")

    @field_validator("name")
    @classmethod
    def usable_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w-]+", value):
            raise ValueError(f"name {value!r} must hold letters, digits, - and _ only: it is a folder")
        return value

    @field_validator("grid", mode="before")
    @classmethod
    def lists_or_points(cls, value: Any) -> Any:
        for axis, values in value.items() if isinstance(value, dict) else ():
            if not isinstance(values, list) and not (isinstance(values, dict) and all(isinstance(keys, dict) for keys in values.values())):
                raise ValueError(f"{axis}: write a list of values of this key, or points {{name: {{key: value}}}}")
        return value

    @model_validator(mode="after")
    def axes_fit(self) -> "SweepConfig":
        problems = [f"grid.{axis} is empty" for axis, values in self.grid.items() if not values]
        problems += ["grid.seed: write `seeds`" if axis == "seed" else f"grid.{axis}: a report has a column of that name; choose another"
                     for axis in self.grid if axis in COLUMNS]
        for axis, values in self.grid.items():
            labels = [label_of(value) for value in values]
            problems += [f"grid.{axis}: {label} stands there twice" for label in dict.fromkeys(labels) if labels.count(label) > 1]
        for axis, value in self.control.items():
            if axis not in self.grid:
                problems.append(f"control.{axis} is no axis of the grid, which has {', '.join(self.grid)}")
            elif label_of(value) not in map(label_of, self.grid[axis]):
                problems.append(f"control.{axis}: {value} is none of its values, {', '.join(map(label_of, self.grid[axis]))}")
        if len(set(self.seeds)) < len(self.seeds):
            problems.append("seeds holds one twice")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def root(self) -> Path:
        """The folder of this sweep's runs."""
        return Path(self.output) / self.name


def label_of(value: Any) -> str:
    """A value as it stands in names and tables: 0.5, 250K, true."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def number_of(label: str) -> float | None:
    """A label as a number (250K is one), or None."""
    with contextlib.suppress(ValueError):
        return float(parse_word_count(label))
    return None


# ---- The runs -------------------------------------------------------------------------------------------------------


@dataclass
class PlannedRun:
    """One run of a sweep."""

    name: str
    labels: dict[str, str]  # {axis: its value here}
    seed: int
    stage: str
    source: str  # its base config
    overrides: list[str]  # as on the stage's command line
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.output) / self.config.name

    @property
    def place(self) -> Path:
        """Its run folder, by its one absolute name."""
        return self.folder.resolve()

    def commands(self) -> Iterator[list[str]]:
        """What has to be executed, in order: a student that reads its teachers from the cache needs that first."""
        arguments = ["--config", self.source, *self.overrides]
        if (distillation := getattr(self.config, "distillation", None)) and distillation.cache:
            yield [sys.executable, "-m", "babylm.teacher_cache", *arguments]
        yield [sys.executable, self.stage, *arguments]

    def reads(self) -> set[Path]:
        """Run folders of the models that it starts from or learns from."""
        distillation = getattr(self.config, "distillation", None)
        paths = [entry.path for entry in distillation.entries] if distillation else []
        paths += [getattr(reward, name, None) for reward in getattr(self.config, "rewards", []) for name in ("teacher", "model")]
        folders = {Path(path).resolve() for path in [*paths, self.config.model.path] if path}
        return {folder.parent if milestone_words(folder.name) else folder for folder in folders}

    def what(self) -> str:
        """What it is, whatever its name: equal for two runs that would compute the same."""
        config = self.config.model_dump()
        return json.dumps([self.stage, identity(self.config), [_at(config, path) for path in _paths(config)]], sort_keys=True)

    def other_settings(self) -> list[str]:
        """Keys in which the run that lies in its folder differs from it: what a stage would refuse, and also other paths."""
        recorded = self.folder / "run" / "identity.json"
        if not recorded.is_file() or not ((self.folder / "run" / "metrics.jsonl").is_file() or any(self.folder.glob("checkpoint-*"))):
            return []  # nothing was trained
        theirs = {name: value for name, value in json.loads(recorded.read_text(encoding="utf-8")).items()
                  if not name.startswith("fingerprint.")}
        changed = differing(theirs, identity(self.config), type(self.config))
        # Paths are no identity of a run, which knows the content of what it read; but two runs of a sweep may differ in nothing else.
        written, now = read_yaml(self.folder / "run" / "config.yaml"), self.config.model_dump()
        return changed + [path for path in _paths(now) if _at(written, path) != _at(now, path)]

    def state(self) -> str:
        """done, other settings, what run/status.json says of a run that is not done, or new (begun, if there is a log but no folder).

        A run is done if it finished with this very config. Text and teachers are not read again; the stage does that for a run
        that is started.
        """
        if self.other_settings():
            return "other settings"
        if read_finished(self.folder):
            return "done"
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "run" / "status.json").read_text(encoding="utf-8"))["state"]
        return "begun" if self.log.is_file() else "new"  # it never came to have a folder

    @property
    def log(self) -> Path:
        """What it printed, over all its starts."""
        return self.folder.with_name(f"{self.name}.log")


def _paths(config: dict[str, Any]) -> list[str]:
    """The keys of a config that say what is read."""
    lists = [f"{name}.{number}.{part}" for name, entries in (("distillation.teachers", _at(config, "distillation.teachers") or []),
                                                             ("rewards", config.get("rewards") or []))
             for number in range(len(entries)) for part in ("path", "teacher", "model")]
    return ["data.corpus", "data.eval_path", "data.tokenizer", "model.path", "distillation.teacher", *lists]


def _at(values: Any, path: str) -> Any:
    """The value at a.b.0.c in nested mappings and lists; None where there is none."""
    for part in path.split("."):
        if isinstance(values, list):
            values = values[int(part)] if int(part) < len(values) else None
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values


def plan(sweep: SweepConfig, overrides: Sequence[str] = ()) -> list[PlannedRun]:
    """Every run of a sweep, in the order of its grid (the first axis slowest, seeds fastest).

    Args:
        overrides: further key=value for every run, such as training.threads=1.

    Raises:
        UserError: lists what is wrong with any run's config, before any of them starts.
    """
    runs, problems, sources = [], [], {}
    named = {axis for axis, points in sweep.grid.items() if isinstance(points, dict)}  # whose labels say it all
    for values in itertools.product(*([(label_of(value), value) for value in axis] for axis in sweep.grid.values())):
        labels = {axis: label for axis, (label, _) in zip(sweep.grid, values, strict=True)}
        keys = {"stage": sweep.stage, "config": sweep.config, **sweep.set}
        given_by: dict[str, str] = {}  # {key: its axis}
        for (axis, points), (label, value) in zip(sweep.grid.items(), values, strict=True):
            mine = points[label] if isinstance(points, dict) else {axis: value}
            problems += [f"grid: {axis} and {other} both set {name}, so the name of a run would not say what it is"
                         for name in mine for key_, other in given_by.items() if _overlap(name, key_)]
            given_by |= dict.fromkeys(mine, axis)
            keys |= mine
        problems += [f"{name}: set by grid.{axis}, so the name of a run would not say what it is: change the grid instead"
                     for name in (override.partition("=")[0] for override in overrides)
                     for key_, axis in given_by.items() if _overlap(name, key_)]
        stage, source = keys.pop("stage"), keys.pop("config")
        if stage not in SCHEMAS:
            raise UserError(f"stage {stage!r} is none of {', '.join(SCHEMAS)}")
        if source is None:
            raise UserError(f"no config for {labels}: give `config`, the YAML that every run starts from")
        if source not in sources:
            sources[source] = read_yaml(source)
        base = sources[source]
        if clash := [name for name in [*keys, *(override.partition("=")[0] for override in overrides)] if name in OWN_KEYS]:
            raise UserError(f"{', '.join(clash)}: given by the sweep itself, for every run; write `seeds`, `name` or `output` of the sweep")
        for seed in sweep.seeds or [base.get("seed", 0)]:
            name = _run_name(labels, named, seed)
            given = [f"{path}={_written(value, {**labels, 'seed': str(seed)})}" for path, value in keys.items()]
            given += [*overrides, f"seed={seed}", f"name={name}", f"output={sweep.root}"]
            keyed = copy.deepcopy(base)
            try:
                for override in given:
                    apply_override(keyed, override)
                runs.append(PlannedRun(name, labels, seed, stage, source, given, check(SCHEMAS[stage], keyed, source)))
            except UserError as error:
                problems.append(f"{name}: {error}")
    names = [run.name for run in runs]
    problems += [f"two runs would be named {name}" for name in dict.fromkeys(names) if names.count(name) > 1]
    same: dict[str, str] = {}
    for run in runs:
        if (first := same.setdefault(run.what(), run.name)) != run.name:
            problems.append(f"{first} and {run.name} are the same run: their keys differ in nothing that matters")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return runs


def _overlap(one: str, other: str) -> bool:
    """Whether two keys set the same thing, as distillation and distillation.alpha do."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _run_name(labels: dict[str, str], named: set[str], seed: int) -> str:
    """alpha0p5-KD-s1: no dots, because evaluation cuts names there; a number, or the value of a key, after what it is of."""
    parts = [label if axis in named and number_of(label) is None else axis.split(".")[-1] + label for axis, label in labels.items()]
    return re.sub(r"[^\w-]+", "_", "-".join(parts).replace(".", "p")) + f"-s{seed}"


def _written(value: Any, labels: dict[str, str]) -> str:
    """A value as an override has it; {axis} in a text becomes that axis' label, {seed} the seed."""
    text = json.dumps(value)
    for axis, label in labels.items():
        text = text.replace("{" + axis + "}", label)
    return text


# ---- Running them ---------------------------------------------------------------------------------------------------


def in_order(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """`runs`, each after those of them that it reads, else as they come. UserError if some read each other."""
    writers, left, ordered = {run.place: run for run in runs}, list(runs), []
    while left:
        ready = [run for run in left if not any(other in left for path in run.reads() if (other := writers.get(path)))]
        if not ready:
            raise UserError(f"these runs read each other, so none can be the first: {', '.join(run.name for run in left)}")
        ordered += ready
        left = [run for run in left if run not in ready]
    return ordered


def waves(runs: Sequence[PlannedRun]) -> list[list[int]]:
    """Numbers of the runs that can be at work together, each wave after the ones that it reads: one array of jobs each."""
    writers: dict[Path, PlannedRun] = {run.place: run for run in runs}
    depth: dict[Path, int] = {}
    for run in in_order(runs):
        depth[run.place] = max((depth[path] + 1 for path in run.reads() if path in writers), default=0)
    return [[number for number, run in enumerate(runs) if depth[run.place] == wave] for wave in range(max(depth.values()) + 1)]


class Runner:
    """Runs what is not done yet, some at a time; a run that fails is reported and stops none but those that read it.

    Args:
        runs: of `plan`.
        jobs: how many at a time.
        only: the number of a single run, whose output goes to the screen instead of <sweep>/<run>.log.
    """

    def __init__(self, runs: Sequence[PlannedRun], jobs: int = 1, only: int | None = None):
        self.runs, self.jobs, self.to_screen = list(runs), jobs, only is not None
        self.chosen = in_order(runs) if only is None else [runs[only]]
        self.ended = {run.place: threading.Event() for run in self.chosen}
        self.outcomes: dict[str, str] = {}
        self.stopped_by = ""
        self._active: set[subprocess.Popen] = set()
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run all; returns the exit code: 0, 1 if any is not done, 75 if a signal stopped it (the same command continues)."""
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
        # One that is ignored stays ignored: nohup has seen to that.
        before = {number: signal.signal(number, self._stop) for number in signals if signal.getsignal(number) != signal.SIG_IGN}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                for future in [pool.submit(self._one, run) for run in self.chosen]:
                    future.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        counts = Counter(self.outcomes.values())
        if len(self.chosen) > 1:
            print(f"{len(self.chosen)} runs: " + ", ".join(f"{count} {state}" for state, count in counts.items()), flush=True)
        return PREEMPTED_EXIT if self.stopped_by or "preempted" in counts else int(counts.keys() != {"done"})

    def _one(self, run: PlannedRun) -> None:
        try:
            for place in run.reads() & self.ended.keys():
                self.ended[place].wait()
            self.outcomes[run.name] = self._outcome(run)
        except (OSError, UserError) as error:  # a folder that cannot be written, a record that cannot be read
            self._say(f"[{self.runs.index(run) + 1}/{len(self.runs)}] {run.folder}: FAILED: {error}")
            self.outcomes[run.name] = "failed"
        finally:
            self.ended[run.place].set()

    def _outcome(self, run: PlannedRun) -> str:
        where = f"[{self.runs.index(run) + 1}/{len(self.runs)}] {run.folder}"
        state, others = run.state(), run.other_settings()
        if state == "done":
            self._say(f"{where}: done, CE {read_finished(run.folder)['ce']:.4f}")
            return "done"
        if others:
            self._say(f"{where}: FAILED: the folder holds a run with other settings ({', '.join(others)}): move it away, or give the sweep "
                      "another name")
            return "failed"
        if missing := [other.name for other in self.runs if other.place in run.reads() and other.state() != "done"]:
            self._say(f"{where}: not started, because {', '.join(missing)} is not done")
            return "not started"
        if self.stopped_by:
            return "not started"
        log, began = run.log, time.monotonic()
        begins = state in ("new", "begun", "pending")
        self._say(f"{where}: {'starts' if begins else 'continues'}" + ("" if self.to_screen else f" (log: {log})"))
        code = 0
        for command in run.commands():
            code = code or self._execute(command, log)
        spent = timedelta(seconds=round(time.monotonic() - began))
        if code == 0 and run.state() == "done":
            self._say(f"{where}: done in {spent}, CE {read_finished(run.folder)['ce']:.4f}")
            return "done"
        if code in (PREEMPTED_EXIT, -signal.SIGTERM, -signal.SIGUSR1):  # the last two: it was still loading its packages
            self._say(f"{where}: preempted after {spent}; the same command continues")
            return "preempted"
        said = "" if self.to_screen else "\n    " + "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:])
        self._say(f"{where}: FAILED with exit code {code} after {spent}{said}")
        return "failed"

    def _execute(self, command: list[str], log: Path) -> int:
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.nullcontext() if self.to_screen else open(log, "a", encoding="utf-8") as stream:
            with self._lock:
                if self.stopped_by:
                    return PREEMPTED_EXIT
                # A session of its own: Ctrl-C reaches this process alone, which asks the run to save and stop.
                process = subprocess.Popen(command, stdout=stream, stderr=stream and subprocess.STDOUT, start_new_session=True)
                self._active.add(process)
                if self.stopped_by:  # while it was being started
                    process.terminate()
            code = process.wait()
            with self._lock:
                self._active.discard(process)
        return code

    def _stop(self, number: int, _frame: Any) -> None:
        self.stopped_by = signal.Signals(number).name
        self._say(f"{self.stopped_by}: runs that are at work are asked to save and stop")
        for process in list(self._active):
            process.terminate()

    def _say(self, line: str) -> None:
        os.write(1, f"{line}\n".encode())  # one piece, from any thread or signal
