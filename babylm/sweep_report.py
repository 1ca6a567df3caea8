"""What came out of a sweep: a table and a figure, by validation CE, with differences to a control at the same seed.

`sweep.py --report` is the command; babylm/sweeps.py says what a sweep is.
"""

import csv
import io
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import special

from babylm import figures
from babylm.run_folder import read_finished, write_text
from babylm.schema import UserError
from babylm.sweeps import PlannedRun, SweepConfig, label_of, number_of

MEASURED_ON = "measured_on"  # of a row: for comparing, not for the tables
MEASURES = {"ce": ("validation CE", 3), "perplexity": ("perplexity", 1)}  # evaluation scores have names of their own, and two digits


@dataclass
class Point:
    """The runs of one combination, which differ in their seed alone.

    labels: {axis: its value}; values: {measure: {seed: value}}; measured_on: {seed: what the CE was measured on}; control: the point it
    is compared with, None if it is one itself.
    """

    labels: dict[str, str]
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    measured_on: dict[int, str] = field(default_factory=dict)
    control: "Point | None" = None

    def differences(self, measure: str) -> list[float]:
        """This point minus its control, for every seed that both have; of CE, where text and tokenizer are the same."""
        theirs = self.control.values.get(measure, {}) if self.control else {}
        return [value - theirs[seed] for seed, value in self.values.get(measure, {}).items()
                if seed in theirs and (measure != "ce" or self.measured_on[seed] == self.control.measured_on[seed])]

    def mean(self, measure: str) -> float:
        """Over seeds; NaN without a value."""
        return statistics.fmean(self.values.get(measure, {}).values() or [math.nan])


def collect(runs: Sequence[PlannedRun], results: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(a row per run, what was noticed): its place in the grid, its state and, if it is done, what it reached.

    Validation CE is that of run/scores.json (`python -m babylm.scoring`: the whole validation part) if every finished run has
    it, else that of the end of training (data.eval_blocks of it). Scores are those of results/<run>/main (`python -m eval.zero_shot`).
    """
    done = [run for run in runs if run.state() == "done"]
    scored = [run.folder / "run" / "scores.json" for run in done]
    whole = bool(scored) and all(path.is_file() for path in scored)
    notes = [f"validation CE is that of {'run/scores.json (the whole validation part)' if whole else 'the end of training'}"]
    if not whole and any(path.is_file() for path in scored):
        notes.append("some runs have a run/scores.json and some have none, so none was used")
    rows = []
    for run in runs:
        row: dict[str, Any] = {"run": run.name, **run.labels, "seed": run.seed, "state": run.state()}
        if run in done:
            finished = read_finished(run.folder)
            found = json.loads((run.folder / "run" / "scores.json").read_text(encoding="utf-8")) if whole else finished
            row[MEASURED_ON] = json.dumps(found.get("validation") if whole else _validation_of(run), sort_keys=True)
            row |= {name: finished[name] for name in ("steps", "words_seen", "parameters", "seconds") if name in finished}
            row |= {"ce": found["ce"], "perplexity": math.exp(found["ce"])}
            ended = (run.folder / "run" / "finished.json").stat().st_mtime
            notes += [f"{run.name} was finished before {place.name}, which it reads, was: made again since?" for place in run.reads()
                      if (other := place / "run" / "finished.json").is_file() and other.stat().st_mtime > ended]
            summary = results / run.name / "main" / "zero_shot" / "causal" / "summary.json"
            if summary.is_file() and summary.stat().st_mtime < ended:
                notes.append(f"{summary} is older than the run: not used; score it again")
            elif summary.is_file():
                row |= {name: entry["score"] for name, entry in json.loads(summary.read_text(encoding="utf-8"))["tasks"].items()}
        else:
            notes.append(f"{run.name} is not done ({row['state']}): it is in no mean")
        rows.append(row)
    return rows, notes


def _validation_of(run: PlannedRun) -> dict[str, Any]:
    """What a run's CE at the end of training was measured on."""
    recorded = json.loads((run.folder / "run" / "identity.json").read_text(encoding="utf-8"))
    data = run.config.data
    return {"text": recorded.get("fingerprint.val"), "tokenizer": recorded.get("fingerprint.tokenizer"),
            "seq_len": data.seq_len, "eval_blocks": data.eval_blocks}


def points_of(sweep: SweepConfig, runs: Sequence[PlannedRun], rows: Sequence[dict[str, Any]]) -> list[Point]:
    """The combinations of the grid in its order, each with its values over seeds and its control."""
    points: dict[tuple, Point] = {}
    for run, row in zip(runs, rows, strict=True):
        point = points.setdefault(tuple(run.labels.values()), Point(run.labels))
        for measure in measures_of([row]):
            point.values.setdefault(measure, {})[run.seed] = row[measure]
        if MEASURED_ON in row:
            point.measured_on[run.seed] = row[MEASURED_ON]
    for point in points.values():
        labels = {**point.labels, **{axis: label_of(value) for axis, value in sweep.control.items()}}
        if sweep.control and labels != point.labels:
            point.control = points[tuple(labels.values())]
    return list(points.values())


def measures_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """ce, perplexity and the evaluation scores that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names[names.index("ce"):] if "ce" in names else []


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """(mean, half the 95 % confidence interval by Student's t over seeds); NaN for the second with one seed."""
    if len(differences) < 2:
        return statistics.fmean(differences), math.nan
    quantile = float(special.stdtrit(len(differences) - 1, 0.975))
    return statistics.fmean(differences), quantile * statistics.stdev(differences) / math.sqrt(len(differences))


def table(sweep: SweepConfig, points: Sequence[Point], measures: Sequence[str]) -> str:
    """Markdown: a row per combination; mean ± standard deviation over seeds, difference to the control ± 95 % interval."""
    compared = any(point.control for point in points)
    heads, best = [], best_of(points)
    for measure in measures:
        title = MEASURES.get(measure, (measure, 2))[0]
        heads += [title, f"{title} - control"] if compared and measure != "perplexity" else [title]
    lines = [f"| {' | '.join([*sweep.grid, 'seeds', *heads])} |", "|" + "---|" * (len(sweep.grid) + 1 + len(heads))]
    for point in points:
        cells = [*point.labels.values(), str(len(point.values.get("ce", {})))]
        for measure in measures:
            digits, values = MEASURES.get(measure, (measure, 2))[1], list(point.values.get(measure, {}).values())
            mean = f"{point.mean(measure):.{digits}f}" if values else "-"
            mean = f"**{mean}**" if point is best and measure == "ce" else mean
            cells.append(mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""))
            if compared and measure != "perplexity":
                differences = point.differences(measure)
                middle, half = interval(differences) if differences else (math.nan, math.nan)
                shown = f"{middle:+.{digits}f} ± {half:.{digits}f}" if not math.isnan(half) else f"{middle:+.{digits}f}"
                shown += f" ({len(differences)} seeds)" if 1 <= len(differences) < len(values) else ""
                cells.append(shown if differences else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparable(points: Sequence[Point]) -> bool:
    """Whether all CEs were measured on the same text, in the tokens of the same vocabulary and in blocks of the same length."""
    return len({what for point in points for what in point.measured_on.values()}) < 2


def best_of(points: Sequence[Point]) -> Point | None:
    """The point of lowest mean validation CE, of those that have most seeds: the weighted loss of another weighting is another quantity.
    None where the CEs cannot be compared."""
    if not comparable(points):
        return None
    most = max(len(point.values.get("ce", {})) for point in points)
    done = [point for point in points if len(point.values.get("ce", {})) == most > 0]
    return min(done, key=lambda point: point.mean("ce"), default=None)


def report(sweep: SweepConfig, runs: Sequence[PlannedRun], results: Path) -> list[Path]:
    """Write report.csv (a row per run), report.md and, for one or two numeric axes, a figure into the sweep's folder; print the table."""
    rows, notes = collect(runs, results)
    points = points_of(sweep, runs, rows)
    measures = measures_of(rows)
    if not measures:
        states = Counter(row["state"] for row in rows)
        others = sorted({name for run in runs for name in run.other_settings()})
        found = ", ".join(f"{count} {state}" for state, count in states.items())
        raise UserError(f"none of the {len(runs)} runs in {sweep.root} is done ({found}): python sweep.py --config <this file> runs them"
                        + (f". Those with other settings differ in {', '.join(others)}: give the report the same key=value as the runs"
                           if others else ""))
    with_seeds = any(len(point.values.get("ce", {})) > 1 for point in points)
    best = best_of(points)
    text = [f"# {sweep.name}", "", table(sweep, points, measures), "",
            "Mean ± standard deviation over seeds" + ("" if with_seeds else " (one seed: none)")
            + ("; differences to " + ", ".join(f"{axis} {label_of(value)}" for axis, value in sweep.control.items())
               + " at the same seed, ± 95 % interval (Student's t over seeds; these cover what differs between seeds, not what all "
               "share, such as the text, and are not corrected for their number)" if sweep.control else "") + ".",
            "Best by validation CE: " + ", ".join(f"{axis} {label}" for axis, label in best.labels.items())
            + " (chosen on the text that it is reported on)." if best else
            "No best: runs were validated on different text, with different tokenizers or in blocks of different lengths, so their CEs "
            "(nats per token) cannot be compared, and differences stand only where they can. Bits per byte can, on the same text: "
            "run/scores.json (python -m babylm.scoring).", "",
            *(f"- {note}" for note in notes)]
    if measures == ["ce", "perplexity"]:
        text.append(f"- no evaluation scores; to make some: python -m eval.zero_shot {sweep.root}/*/ --output {results} --data <its data>")
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != MEASURED_ON]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    written = [sweep.root / "report.csv", sweep.root / "report.md"]
    for path, content in zip(written, (stream.getvalue(), "\n".join(text) + "\n"), strict=True):
        write_text(path, content)
    print("\n".join(text))
    if figure := draw(points):
        written += figures.save(figure, sweep.root / "report")
    else:
        print("no figure: that takes one or two axes of numbers, or two of names, and CEs that can be compared")
    return written


def axes_to_draw(points: Sequence[Point]) -> dict[str, list[str]]:
    """{axis: its labels, ascending} of the axes of numbers (250K is one); where there are none, but just two axes, {axis: its labels}."""
    found = {axis: list(dict.fromkeys(point.labels[axis] for point in points)) for axis in points[0].labels}
    several = {axis: labels for axis, labels in found.items() if len(labels) > 1}
    numeric = {axis: sorted(labels, key=number_of) for axis, labels in several.items()
               if all(number_of(label) is not None for label in labels)}
    return numeric or (several if len(several) == 2 else {})


def draw(points: Sequence[Point]) -> Any:
    """Validation CE over the axes of numbers: a line per other combination for one, a heat map each for two (which may be of names, if
    they are all there is); None for others, and where the CEs cannot be compared."""
    axes = axes_to_draw(points)
    if len(axes) not in (1, 2) or not comparable(points):
        return None
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(", ".join(label for axis, label in point.labels.items() if axis not in axes), []).append(point)
    if len(axes) == 1:
        [axis] = axes
        lines = {name: [(number_of(point.labels[axis]), list(point.values.get("ce", {}).values())) for point in group]
                 for name, group in groups.items()}
        return figures.lines_figure(lines, _short(axis), "validation CE (nats/token)")
    (rows, row_labels), (columns, column_labels) = axes.items()
    maps = {}
    for name, group in groups.items():
        cells = {(point.labels[rows], point.labels[columns]): point.mean("ce") for point in group}
        maps[name] = [[cells.get((row, column), math.nan) for column in column_labels] for row in row_labels]
    return figures.heat_map(maps, (_short(rows), row_labels), (_short(columns), column_labels), "validation CE (nats/token)")


def _short(axis: str) -> str:
    """A config key without its section: distillation.hidden.weight -> hidden.weight."""
    return axis.partition(".")[2] or axis
