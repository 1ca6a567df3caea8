"""Reads what runs and evaluations wrote, for figures and tables: a run's metrics and scores, and results/<model>.

Nothing here is refused: what is missing, cut short or not finite is left out and named in `problems`.
"""

import json
import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from babylm.schema import milestone_words

X_AXES = {"steps": ("step", "optimizer steps"), "words": ("words", "words seen"), "time": ("seconds", "seconds")}


# ---- Runs -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    folder: Path
    name: str
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    scored: list[dict] = field(default_factory=list)      # at milestones: {"scores": {set: its score}, ...} (training.eval_tasks)
    milestones: dict[str, dict] = field(default_factory=dict)
    scores: dict | None = None
    finished: bool = False
    problems: list[str] = field(default_factory=list)     # for the user: what was missing, skipped or not finite

    @property
    def rewarded(self) -> bool:
        """Whether it learned from rewards (stage 6): its words are those it wrote."""
        return any("reward" in row for row in self.train + self.evals)

    @property
    def label(self) -> str:
        mark = " (unfinished)" if (self.train or self.evals) and not self.finished else ""
        return " " * self.name.startswith("_") + self.name + mark          # matplotlib hides labels that start with _


def number(value) -> float:
    """A finite float, or NaN for null, NaN, infinity and anything that is no number."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan


def _table(text):
    with suppress(ValueError):
        return value if isinstance(value := json.loads(text), dict) else None


def load_metrics(folder) -> Run:
    """Read run/metrics.jsonl, finished.json and scores.json of a run folder; what is wrong with them: `problems`."""
    folder = Path(os.path.abspath(folder))
    folder = folder.parent if folder.name == "run" else folder
    run, path = Run(folder, folder.name), folder / "run" / "metrics.jsonl"
    run.finished, score_path = path.with_name("finished.json").is_file(), path.with_name("scores.json")
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n") if path.is_file() else []
    for count, line in enumerate(lines, start=1):
        row = _table(line) if line.strip() else {}
        if row is None:
            run.problems.append(f"{path}:{count}: {'not a JSON object' if lines[count:] else 'cut short'}, skipped")
        elif row.get("kind") == "milestone":
            run.milestones[str(row.get("name")).removeprefix("chck_")] = row
        elif row.get("kind") in ("train", "eval", "scores"):
            rows = {"train": run.train, "eval": run.evals, "scores": run.scored}[row["kind"]]
            if row["kind"] == "scores":
                tasks = row.get("tasks") if isinstance(row.get("tasks"), dict) else {}
                row = {**row, "scores": {name: entry.get("score") for name, entry in tasks.items() if isinstance(entry, dict)}}
            # A resumed run repeats the steps after its last checkpoint: what it logged last is what counts.
            while rows and number(rows[-1].get("step")) >= number(row.get("step")):
                rows.pop()
            rows.append(row)
    gaps = Counter(f"{row['kind']} {key}" for row in run.train + run.evals for key, value in row.items()
                   if value is None or (isinstance(value, float) and not math.isfinite(value)))
    run.problems += [f"{path}: {what} is not finite {count} time(s): gaps" for what, count in gaps.items()]
    if score_path.is_file():
        run.scores = _table(score_path.read_bytes().decode("utf-8", errors="replace"))
        run.problems += [f"{score_path}: not a JSON object, ignored"] if run.scores is None else []
    if not (run.train or run.evals or run.scores):
        what = f"run/metrics.jsonl {'holds no numbers' if lines else 'is missing'}, and there is no run/scores.json"
        run.problems.append(what if folder.is_dir() else "no such folder")
    return run


def points(run, metric, x="words", window=1, log=False) -> dict:
    """{"train": (x, y), "validation": (x, y)}, each if it has a finite value; gaps are NaN, train is a running mean."""
    found, (outer, _, inner) = {}, metric.partition(".")                   # ce_by_domain.childes looks inside
    for kind, rows, width in (("train", run.train, window), ("validation", run.scored if outer == "scores" else run.evals, 1)):
        values = []
        for row in rows:
            table, key = (row[outer], inner) if isinstance(row.get(outer), dict) else (row, metric)
            if metric == "perplexity" and "ce" in row:                     # it is exp(CE) and nothing else
                table = {key: math.exp(min(number(row["ce"]), 700.0))}
            if key in table and not math.isnan(place := number(row.get(X_AXES[x][0]))):
                values.append((place, number(table[key])))
        place, y = np.array(values).reshape(-1, 2).T
        y = np.where(y > 0, y, np.nan) if log else y
        y = np.array([np.nanmean(y[max(0, i + 1 - width):i + 1]) if y[i] == y[i] else np.nan for i in range(len(y))])
        if np.isfinite(y).any():
            found[kind] = (place, y)
    return found


def scored(run, part) -> dict:
    """The table `pairs` or `by_domain` of a run's scores, without entries that are no tables themselves."""
    table = (run.scores or {}).get(part)
    return {key: value for key, value in table.items() if isinstance(value, dict)} if isinstance(table, dict) else {}


# ---- Evaluation results ---------------------------------------------------------------------------------------------

NEEDED = {"task", "kind", "chance", "score", "se", "n", "ties"}    # of an entry of summary.json


@dataclass(eq=False)
class Results:
    """What results/<model> holds for one backend. `tables`: {revision: {set: its entry of summary.json}}, as they come."""

    folder: Path
    name: str
    tables: dict[str, dict[str, dict]] = field(default_factory=dict)
    words: dict[str, float] = field(default_factory=dict)      # of each revision that can be placed, ascending
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return " " * self.name.startswith("_") + self.name

    @property
    def final(self) -> str | None:
        """The revision that stands for the model: main, or the last milestone where main is not scored."""
        return "main" if "main" in self.tables else next(reversed(self.words), None)

    def curve(self, name) -> np.ndarray:
        """[points, 3]: words seen, score and its standard error of one set, in the order of words.

        The milestone of the last step is the final model by another name (its words are the mark that this step passed): it is
        left out where the final model has a score.
        """
        end = self.words.get("main", 0) if name in self.tables.get("main", {}) else 0
        found = [(self.words[revision], table[name]) for revision, table in self.tables.items() if revision in self.words and name in table
                 and (revision == "main" or abs(self.words[revision] - end) > 0.005 * end)]
        return np.array(sorted((words, number(row["score"]), number(row["se"])) for words, row in found)).reshape(-1, 3)


def load_results(folder, models="models") -> list[Results]:
    """Read results/<model>: every revision's summary.json; one Results per backend.

    The final model's words are those of <models>/<model>/run/finished.json; without it, those of the last milestone.
    """
    folder, found, problems = Path(os.path.abspath(folder)), {}, []
    files = sorted(folder.glob("*/zero_shot/*/summary.json"))
    for revision in sorted(folder.glob("*/")):
        known = revision.name in ("main", "untrained") or milestone_words(revision.name)
        only_glue = (revision / "finetune").is_dir() and not (revision / "zero_shot").is_dir()
        if known and not only_glue and not any(revision in file.parents for file in files):
            problems.append(f"{revision} holds no zero_shot/<backend>/summary.json: not scored to the end of one set yet, not drawn")
    for file in files:
        revision, backend = file.parents[2].name, file.parent.name
        table = (_table(file.read_bytes().decode("utf-8", errors="replace")) or {}).get("tasks")
        if not isinstance(table, dict):
            problems.append(f"{file}: not a whole summary of scores (cut short?), not drawn: score this revision again")
            continue
        results = found.setdefault(backend, Results(folder, folder.name if backend == "causal" else f"{folder.name} ({backend})"))
        whole = {name: row for name, row in table.items() if isinstance(row, dict) and row.keys() >= NEEDED
                 and math.isfinite(number(row["score"]))}
        problems += [f"{file}: {name} has no finite score, or lacks one of {', '.join(sorted(NEEDED))}: not drawn"
                     for name in table if name not in whole]
        results.tables[revision] = whole
    finished = Path(models, folder.name, "run", "finished.json")
    for results in found.values():
        placed = {revision: words for revision in results.tables if (words := milestone_words(revision))}
        last = max(placed.values(), default=None)
        if "main" in results.tables:
            seen = number((_table(finished.read_text(encoding="utf-8", errors="replace")) or {}).get("words_seen")
                          if finished.is_file() else None)
            if math.isnan(seen):
                problems.append(f"{finished} does not say how many words {folder.name} has seen: its final score is drawn "
                                + ("at its last milestone" if last else "nowhere; give the folder of its run with --models"))
            if not math.isnan(seen) or last:
                placed["main"] = last if math.isnan(seen) else seen
        results.words = dict(sorted(placed.items(), key=lambda pair: pair[1]))
        missing: dict[tuple, list[str]] = {}                   # sets that are missing at the same revisions share a line
        for name in sorted({name for table in results.tables.values() for name in table}):
            gaps = tuple(revision for revision in ["untrained", *results.words] if name not in results.tables.get(revision, {name: None}))
            missing.setdefault(gaps, []).append(name)
        for gaps, names in missing.items():
            if gaps:
                some = ", ".join(gaps[:3]) + (f" and {len(gaps) - 3} more" if len(gaps) > 3 else "")
                problems.append(f"{results.name}: {', '.join(names)} {'are' if names[1:] else 'is'} not scored at {some}")
    if not files and not problems:
        problems.append(f"{folder} holds no scores" if folder.is_dir() else f"{folder}: no such folder")
    several = list(found.values()) or [Results(folder, folder.name)]
    several[0].problems = problems
    return several
