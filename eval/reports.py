"""From scored candidates to predictions, official files, a summary with standard errors, and the table."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy import special, stats

from babylm.run_folder import write_json, write_text
from babylm.schema import UserError
from eval import reading
from eval.tasks import SUITES, Item, Task

BASELINES = Path(__file__).with_name("baselines.yaml")
RESAMPLES = 500  # for standard errors that have no formula


def answers(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """One row per item: what items.jsonl holds. The prediction is the first candidate with the largest score, as officially;
    `correct` says whether it is right and no other is as likely: a model that answers the same for everything is not right."""
    rows = []
    for item, values in zip(items, scores, strict=True):
        values = [float(value) for value in values]
        best = values.index(max(values))
        tie = values.count(values[best]) > 1
        row = {"uid": item.uid, "id": item.id, "scores": values, "pred": best, "gold": item.gold,
               "correct": None if item.gold is None else best == item.gold and not tie, "tie": tie}
        rows.append(row if item.ratio is None else {**row, "ratio": item.ratio})
    return rows


# ---- Scores ---------------------------------------------------------------------------------------------------------


def accuracy(task: Task, items: Sequence[Item], rows: Sequence[dict[str, Any]], strict: bool = False) -> tuple[float, float]:
    """(percent, standard error): the plain mean over uids, for entity tracking over the uids of a split and then over splits.

    Officially a tie goes to the first candidate, which is the right one; `strict` counts it as wrong. The error is that of a
    stratified sample: each uid's p (1 - p) / n.
    """
    hits: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for item, row in zip(items, rows, strict=True):
        hits[item.split if task.average == "splits" else ""][item.uid].append(row["correct"] if strict else row["pred"] == row["gold"])
    means, variances = [], []
    for uids in hits.values():
        shares = [(np.mean(values), len(values)) for values in uids.values()]
        means.append(np.mean([share for share, _ in shares]))
        # A uid of a single item says nothing of its own spread (GlobalPIQA has no others): these are one stratum together.
        alone = np.mean([share for share, count in shares if count == 1] or [0])
        spread = [share * (1 - share) / count if count > 1 else alone * (1 - alone) for share, count in shares]
        variances.append(sum(spread) / len(shares) ** 2)
    return 100 * float(np.mean(means)), 100 * float(np.sqrt(np.sum(variances)) / len(means))


def first_share(scores: Sequence[float]) -> float:
    """Softmax over the candidates' log-probabilities: what falls to the first.

    In single precision, as the official pipeline has it: shares that round to 1 are ties for its rank correlation.
    """
    return float(special.softmax(np.asarray(scores, dtype=np.float32))[0])


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; NaN where one side is constant."""
    return float(stats.spearmanr(one, other).statistic) if np.ptp(one) and np.ptp(other) else float("nan")


def resampled(statistic: Callable[[np.ndarray], Any], count: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Standard deviation of statistic(indices), a number or several, over bootstrap samples of `count` items, seeded."""
    generator = np.random.default_rng(0)
    return np.nanstd([statistic(generator.integers(count, size=count)) for _ in range(resamples)], axis=0)


def summary(task: Task, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Score and standard error of a set (percent, or rho), number of items, share of ties, and scores by uid and group."""
    ties = float(np.mean([row["tie"] for row in rows]))
    if task.score == "spearman":
        shares, ratios = (np.array(values) for values in ([first_share(row["scores"]) for row in rows], [item.ratio for item in items]))
        score, error = spearman(shares, ratios), float(resampled(lambda chosen: spearman(shares[chosen], ratios[chosen]), len(rows)))
        return {"task": task.name, "score": score, "se": error, "n": len(rows), "ties": ties}
    score, error = accuracy(task, items, rows)
    strict, _ = accuracy(task, items, rows, strict=True)
    return {"task": task.name, "score": score, "se": error, "n": len(rows), "ties": ties, "strict": strict,
            "by": breakdown(task, items, rows)}


def breakdown(task: Task, items: Sequence[Item], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """{heading: {name: percent of its items}}: by uid, and by each group of the task."""
    hits: dict[str, dict[str, list[bool]]] = {heading: defaultdict(list) for heading in [*task.groups, "UID"]}
    for item, row in zip(items, rows, strict=True):
        for heading, name in {**item.groups, "UID": item.uid}.items():
            hits[heading][name].append(row["pred"] == row["gold"])
    found = {heading: {name: 100 * float(np.mean(values)) for name, values in sorted(names.items())} for heading, names in hits.items()}
    if task.average == "splits":
        for split in sorted({item.split for item in items}):
            uids = {item.uid for item in items if item.split == split}
            found["UID"][split] = float(np.mean([found["UID"][uid] for uid in sorted(uids)]))
    return found


# ---- Files ----------------------------------------------------------------------------------------------------------


def results_name(model: str | Path) -> str:
    """What a model's results are filed under: the name of its folder, or what follows org/ in a hub name. UserError on a dot in a
    folder's name."""
    name = Path(model).resolve().name
    if Path(model).is_dir() and "." in name:
        raise UserError(f"{model}: the official pipeline files results under the name before a dot, where two models can meet: rename the "
                        "folder")
    return name


def results_home(output: Path, model: str | Path) -> Path:
    """<output>/<name>, where a model's results go. UserError where that lies inside the checkpoint."""
    home = output / results_name(model)
    if Path(model).is_dir() and home.resolve().is_relative_to(Path(model).resolve()):
        raise UserError(f"--output {output}: the results would lie inside the checkpoint {model}; choose another folder")
    return home


def write_set(folder: Path, task: Task, items: Sequence[Item], rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """predictions.json and best_temperature_report.txt as the official pipeline writes them, and items.jsonl."""
    predictions: dict[str, dict[str, list]] = {}
    for item, row in zip(items, rows, strict=True):
        entry = {"id": item.id, "pred": item.names[row["pred"]]}
        if task.score == "spearman":
            entry["prob"] = first_share(row["scores"])
        predictions.setdefault(item.uid, {"predictions": []})["predictions"].append(entry)
    write_json(folder / "predictions.json", predictions)
    _write_lines(folder / "items.jsonl", rows)
    if task.score == "spearman":
        sections = {"UID SPEARMAN'S RHO": {"avg": found["score"]}, "AVERAGE SPEARMAN'S RHO": found["score"]}
    else:
        order = sorted(found["by"], key=lambda heading: ("FIELD", "UID").index(heading) if heading in ("FIELD", "UID") else 2)
        sections = {f"{heading} ACCURACY": found["by"][heading] for heading in order} | {"AVERAGE ACCURACY": found["score"]}
    lines = ["TEMPERATURE: 1.00", ""]
    for heading, values in sections.items():
        lines += [f"### {heading}", *([f"{name}: {value:.2f}" for name, value in values.items()] if isinstance(values, dict)
                                      else [f"{values:.2f}"]), ""]
    write_text(folder / "best_temperature_report.txt", "\n".join(lines) + "\n")


def write_reading(folder: Path, rows: Sequence[dict[str, str]], values: np.ndarray) -> dict[str, Any]:
    """What the official pipeline writes of reading times, and items.jsonl; returns the summary."""
    pred, before = values.T
    found = reading.scores(rows, pred, before)
    entries = [{"id": number, "pred": float(one), "prev_pred": float(two)} for number, (one, two) in enumerate(values)]
    write_text(folder / "predictions.json", json.dumps({"reading": {"predictions": entries}}))  # NaN where there is no word before
    _write_lines(folder / "prediction.jsonl", [{"Index": number, "Sentence": reading.context_of(row), "Word": row["word"],
                                                "Logprob": float(one), "Prev_Logprob": float(two)}
                                               for number, (row, (one, two)) in enumerate(zip(rows, values, strict=True))])
    _write_lines(folder / "items.jsonl", [{"uid": "reading", "id": entry["id"], "scores": [entry["pred"], entry["prev_pred"]], "pred": None,
                                           "gold": None, "correct": None, "tie": False} for entry in entries])
    _write_lines(folder / "predictive_power.jsonl", reading.power(rows, pred, before, spillover=False))
    _write_lines(folder / "predictive_power_spillover.jsonl", reading.power(rows, pred, before, spillover=True))
    write_text(folder / "correlations.txt", "".join(f"{name}\t{value:.4f}\n" for name, value in reading.correlations(rows, pred).items()))
    write_text(folder / "report.txt", f"EYE TRACKING SCORE: {found['eye_tracking']:.2f}\n"
                                      f"SELF-PACED READING SCORE: {found['self_paced']:.2f}\n")

    def part(index: np.ndarray) -> list[float]:
        both = list(reading.scores([rows[i] for i in index], *values[index].T).values())
        return [*both, float(np.mean(both))]

    *each, error = resampled(part, len(rows), 50).tolist()
    return {"task": "reading", "score": float(np.mean(list(found.values()))), "n": len(rows), "ties": 0.0, "se": error,
            "by": {"MEASURE": found}, "by_se": {"MEASURE": dict(zip(found, each, strict=True))}}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- The table ------------------------------------------------------------------------------------------------------


def table(columns: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown: a row per scored set, a column per model (score ± standard error, ties where there are any), then chance.

    Args:
        columns: {name of a model: {name of a set: its summary}}.
    """
    sets = list(dict.fromkeys(name for found in columns.values() for name in found))
    lines = [f"| set | items | {' | '.join(columns)} | chance |", "|---|---|" + "---|" * (len(columns) + 1)]
    for name in sets:
        entries = [found.get(name) for found in columns.values()]
        one = next(entry for entry in entries if entry)
        cells = ["-" if entry is None else f"{entry['score']:.2f} ± {entry['se']:.2f}" +
                 (f" ({100 * entry['ties']:.1f} % ties: {entry['strict']:.2f} without)" if entry["ties"] and "strict" in entry else "")
                 for entry in entries]
        mark = " (not the official set)" if any("unlike_official" in entry for entry in entries if entry) else ""
        lines.append(f"| {name}{mark} | {one['n']:,} | {' | '.join(cells)} | {one['chance']:g} |")
    return "\n".join(lines)


def phenomena(columns: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line per set and model with the percentages of its groups (fields, terms, domains); those of uids are in the reports."""
    lines = []
    for name in dict.fromkeys(name for found in columns.values() for name in found):
        for model, found in columns.items():
            for heading, values in found.get(name, {}).get("by", {}).items():
                if 1 < len(values) <= 20:
                    lines.append(f"{name}, {model}, by {heading.lower().replace('_', ' ')}: "
                                 + ", ".join(f"{key} {value:.1f}" for key, value in values.items()))
    return "\n".join(lines)


def baseline_rows(names: Sequence[str], suite: str) -> str:
    """Published scores of the tasks of these names, as lines: those of 2026 with its suite, the others with the other suites."""
    of_2026 = suite == "2026" or Path(suite).resolve() == SUITES["2026"]
    lines = []
    for title, values in yaml.safe_load(BASELINES.read_text(encoding="utf-8")).items():
        known = {name: value for name, value in values.items() if any(one.startswith(name) for one in names)}
        if known and title.startswith("2026") == of_2026:
            lines.append(f"{title}: " + ", ".join(f"{name} {value:.2f}" for name, value in known.items()))
    return "\n".join(lines)
