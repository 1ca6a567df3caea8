"""Compare two or more models on the same items: is a gain more than the chance of which items were drawn?

    python -m eval.compare results/GPT2-Small-CE results/GPT2-Small-Distilled [results/<more> ...] [--revision main]
        [--backend causal] [--seed 0] [--resamples 10000] [--reading <data>/reading/reading_data.csv] [--json FILE]

Reads   results/<model>/<revision>/zero_shot/<backend>/<task>/<dataset>/items.jsonl, and reading/predictions.json
Writes  one table per pair of models, and FILE
Expect  seconds; reading, where asked for, about a minute per pair

Each score is the official one, in percent: the plain mean over UIDs; for entity tracking the mean over the UIDs of a split,
then over splits; for WUG 100 times Spearman's rho; for reading the gain in R² over the controls.  Of the difference, the table gives

- a 95 % paired bootstrap interval: items drawn anew, the same ones for both models, within each UID, as each UID has one vote;
- p, two-sided: if which of the two models gave which of their two answers to an item were the toss of a coin, how often the
  scores would differ as much.  (For WUG and reading, whose score is no mean over items: how often a bootstrap draw turns the
  sign.)  `Holm` is p after Holm's correction for all tasks and pairs in this call, and the verdict goes by it;
- how many items only one of the two gets right, and McNemar's exact test of these two counts.  It is the same coin, but lets
  every item count alike instead of every UID, and is not corrected.

All of it speaks of these two checkpoints on more items of this kind.  Whether one *method* is better than another is a
question about seeds: train several of each.
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from babylm.run_folder import run_stage, write_json
from babylm.schema import UserError
from custom_dataset import file_sha256
from eval.reading import read_rows, scores
from eval.reports import first_share

LEVEL = 0.05  # a verdict is given where the corrected p is below
READING_RESAMPLES = 1000  # at most: each is ten regressions on 1,700 rows
CHUNK = 1000  # resamples held in memory at once

Items = dict[tuple[str, str], dict[str, Any]]  # (uid, id) -> line of items.jsonl


@dataclass
class Comparison:
    """One line of the table. Scores, `difference` (b − a), `low` and `high` are in points of the official score.

    `low` and `high` are None where a UID has a single item, whose chance variation nothing tells; `p` is None where the score is
    undefined, and `verdict` says so. The counts are None for tasks whose items are not right or wrong.
    """

    task: str
    a: str
    b: str
    items: int
    score_a: float
    score_b: float
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    only_a: int | None = None
    only_b: int | None = None
    p_mcnemar: float | None = None
    verdict: str = ""


# ---- Reading results ------------------------------------------------------------------------------------------------


def backend_folder(model: Path, revision: str, backend: str) -> Path:
    """Where a model's results lie. UserError names what there is instead."""
    folder = model / revision / "zero_shot" / backend
    if not folder.is_dir():
        there = sorted(str(found.relative_to(model)) for found in model.glob("*/zero_shot/*")) if model.is_dir() else []
        raise UserError(f"{folder} does not exist; {model} holds {', '.join(there) or 'no results'}. Choose with --revision and --backend, "
                        "or score the model first: python -m eval.zero_shot")
    return folder


def task_files(folder: Path) -> dict[str, Path]:
    """{"blimp/blimp_fast": its items.jsonl, ...}; reading is not among them."""
    return {path.parent.relative_to(folder).as_posix(): path for path in sorted(folder.glob("*/*/items.jsonl"))}


def read_items(path: Path) -> Items:
    """The lines of one items.jsonl. UserError names file and line of one that is damaged or there twice."""
    items: Items = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            key = item["uid"], item["id"]
            scores = [float(score) for score in item["scores"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: no item of ours ({error!r}); score this task again") from None
        if key in items:
            raise UserError(f"{path}, line {number}: item {key[1]!r} of {key[0]!r} is there a second time; score this task again")
        if not all(map(math.isfinite, scores)):
            raise UserError(f"{path}, line {number}: a score of item {key[1]!r} is not finite; such a model's results mean nothing")
        items[key] = item
    if not items:
        raise UserError(f"{path} is empty: score this task again")
    return items


def origin(folder: Path, name: str) -> dict[str, Any]:
    """What the results of a set were made of, by the summary.json beside them: {"data": hashes of its files, "task": how it was
    scored}; empty where there is none (results of the official pipeline)."""
    path = folder / "summary.json"
    entry = json.loads(path.read_text(encoding="utf-8"))["tasks"].get(name, {}) if path.is_file() else {}
    return {key: entry["identity"][key] for key in ("data", "task") if "identity" in entry}


def require_same_data(name: str, a: Path, b: Path) -> None:
    """UserError where two folders <revision>/zero_shot/<backend> hold results of a set that were not made of the same files, or
    not scored alike: minimal pairs of two sets can have the same ids and the same right answers."""
    mine, theirs = origin(a, name), origin(b, name)
    for key, what in (("data", "of different files of this set"), ("task", "scored by different rules (of another year's suite?)")):
        if mine and theirs and mine[key] != theirs[key]:
            raise UserError(f"{name}: the results in {a} and {b} are {what}, so they cannot be paired. Score both alike")


def require_same_items(task: str, path_a: Path, a: Items, path_b: Path, b: Items) -> None:
    """Refuse to pair results on different items. UserError names the first difference.

    Items are numbered within their UID, so that two versions of a data set share most ids: what is known of an item besides
    (its right answer, its number of candidates, its human ratio) must agree, too.
    """
    for path, here, other_path, there in ((path_a, a, path_b, b), (path_b, b, path_a, a)):
        for uid, name in here:
            if (uid, name) not in there:
                raise UserError(f"{task}: not the same items, so they cannot be paired. {path} has {len(here):,}, {other_path} has "
                                f"{len(there):,}; the first that the second lacks: UID {uid!r}, id {name!r}. Score both on the same data")
    for key, item in a.items():
        mine = {"gold": item.get("gold"), "candidates": len(item["scores"]), "ratio": item.get("ratio")}
        theirs = {"gold": b[key].get("gold"), "candidates": len(b[key]["scores"]), "ratio": b[key].get("ratio")}
        if mine != theirs:
            raise UserError(f"{task}: the same ids for different items, so they cannot be paired. Item {key[1]!r} is {mine} in {path_a}, "
                            f"but {theirs} in {path_b}. Score both on the same data")


# ---- Statistics -----------------------------------------------------------------------------------------------------


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test: two-sided binomial p of two counts that are alike if both models are equally often right."""
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(values: list[float | None]) -> list[float | None]:
    """Holm's step-down correction of a family of p-values; those that are None are not part of it."""
    tested = sorted((value, index) for index, value in enumerate(values) if value is not None)
    result: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * value))
        result[index] = largest
    return result


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled differences [R]."""
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def sign_p(differences: np.ndarray) -> float:
    """Two-sided p that the sign is chance: where the interval of the resampled differences [R] would just reach zero.

    One is added to each count, as R resamples cannot show a p of 0.
    """
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(differences) + 1)))


def uid_weights(uids: list[str], by_split: bool) -> dict[str, float]:
    """Share of each UID in the official score, summing to 1: all alike, or for entity tracking alike within equal splits."""
    distinct = list(dict.fromkeys(uids))
    splits = {uid: uid.rsplit("_", 2)[0] if by_split else "" for uid in distinct}  # <split>_<n>_ops
    sizes = {split: list(splits.values()).count(split) for split in splits.values()}
    return {uid: 1 / (len(sizes) * sizes[splits[uid]]) for uid in distinct}


def resample_accuracy(strata: list[tuple[float, np.ndarray]], resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Resampled differences of a stratified accuracy, [resamples] as shares.

    Args:
        strata: per UID its weight and its items' differences, (right in b) − (right in a), each −1, 0 or 1; two items or more.
        resamples: how many draws.

    A draw of n items with replacement is a multinomial draw of how many are −1, 0 and 1. Of n items, n − 1 are drawn: the mean
    of n would vary by (n − 1)/n too little, which is half for the smallest UIDs and would add up over them.
    """
    total = np.zeros(resamples)
    for weight, values in strata:
        shares = [(values == value).mean() for value in (-1, 0, 1)]
        drawn = rng.multinomial(len(values) - 1, shares, size=resamples)
        total += weight * (drawn[:, 2] - drawn[:, 0]) / (len(values) - 1)
    return total


def swap_p(strata: list[tuple[float, np.ndarray]], resamples: int, rng: np.random.Generator) -> float:
    """Two-sided p of a stratified accuracy's difference when, at every item, the two models' answers change places by a coin.

    Only items that one of the two gets right matter: of k in a UID, the b's get Binomial(k, ½). Unlike a bootstrap p this one
    holds for a handful of such items, too: five against none is p = 0.06 here, as in McNemar's test, and would be 0.01 there.
    """
    observed, total = 0.0, np.zeros(resamples)
    for weight, values in strata:
        observed += weight * values.mean()
        unequal = int(np.abs(values).sum())
        total += weight * (2 * rng.binomial(unequal, 0.5, size=resamples) - unequal) / len(values)
    as_large = (np.abs(total) >= abs(observed) - 1e-9).sum()  # equal but for rounding counts as equal
    return float((as_large + 1) / (resamples + 1))


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's rho in R resamples of n rows; NaN where a resample has no spread.

    Args:
        x, y: [n] values.
        counts: [R, n] how often each row is in each resample; ones for the data as they are.

    Returns:
        [R]. Equal values share their mean rank, and in a resample a row that is there twice is such a case.
    """
    ranks = []
    for values in (x, y):
        _, group = np.unique(values, return_inverse=True)
        sizes = np.zeros((len(counts), group.max() + 1))
        np.add.at(sizes.T, group, counts.T)
        ranks.append((np.cumsum(sizes, axis=1) - (sizes - 1) / 2)[:, group])
    n = counts.sum(1, keepdims=True)
    centred = [rank - (counts * rank).sum(1, keepdims=True) / n for rank in ranks]
    covariance, *variances = ((counts * p * q).sum(1) for p, q in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2))
    spread = np.sqrt(variances[0] * variances[1])
    return np.divide(covariance, spread, out=np.full(len(counts), np.nan), where=spread > 1e-9)


def bootstrap_rows(score: Callable[[np.ndarray], np.ndarray], rows: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """score(counts [R, rows]) of `resamples` draws of all rows with replacement, in chunks; stacked along the first axis."""
    sizes = [min(CHUNK, resamples - start) for start in range(0, resamples, CHUNK)]
    return np.concatenate([score(rng.multinomial(rows, np.full(rows, 1 / rows), size=size)) for size in sizes])


# ---- One task, two models -------------------------------------------------------------------------------------------


def compare_accuracy(task: str, names: tuple[str, str], a: Items, b: Items, resamples: int, seed: int, by_split: bool) -> Comparison:
    """A task whose items are right or wrong. UserError where an item of either says neither."""
    for name, items in zip(names, (a, b), strict=True):
        for (uid, key), item in items.items():
            if not (isinstance(item.get("pred"), int) and isinstance(item.get("gold"), int)):
                raise UserError(f"{task}, {name}: item {key!r} of UID {uid!r} has \"pred\": {item.get('pred')!r} and \"gold\": "
                                f"{item.get('gold')!r}, no numbers of candidates; score this task again")
    right = {uid: [] for uid, _ in a}
    for key in a:
        right[key[0]].append((a[key]["pred"] == a[key]["gold"], b[key]["pred"] == b[key]["gold"]))
    answers = {uid: np.array(pairs, dtype=int) for uid, pairs in right.items()}  # [items, 2]
    weights = uid_weights([uid for uid, _ in a], by_split)
    score_a, score_b = (100 * sum(weight * answers[uid][:, side].mean() for uid, weight in weights.items()) for side in (0, 1))
    every = np.concatenate(list(answers.values()))
    only_a, only_b = int((every[:, 0] > every[:, 1]).sum()), int((every[:, 0] < every[:, 1]).sum())
    result = Comparison(task, *names, len(every), score_a, score_b, score_b - score_a, only_a=only_a, only_b=only_b,
                        p_mcnemar=mcnemar(only_a, only_b))
    strata = [(100 * weight, answers[uid][:, 1] - answers[uid][:, 0]) for uid, weight in weights.items()]
    if len(alone := [stratum for stratum in strata if len(stratum[1]) == 1]) > 1:  # GlobalPIQA: each item a UID; one stratum together
        strata = [stratum for stratum in strata if len(stratum[1]) > 1]
        strata.append((sum(weight for weight, _ in alone), np.concatenate([values for _, values in alone])))
    result.p = swap_p(strata, resamples, np.random.default_rng(seed))
    if min(len(values) for _, values in strata) > 1:
        result.low, result.high = interval(resample_accuracy(strata, resamples, np.random.default_rng(seed)))
    return result


def compare_wug(task: str, names: tuple[str, str], a: Items, b: Items, resamples: int, seed: int) -> Comparison:
    """Spearman's rho, times 100, of the first candidate's share with the human ratio, over all rows."""
    for (uid, key), item in a.items():
        if not isinstance(item.get("ratio"), (int, float)):
            raise UserError(f"{task}, {names[0]}: item {key!r} of UID {uid!r} has no human \"ratio\"; score this task again")
    ratios = np.array([item["ratio"] for item in a.values()])
    shares = [np.array([first_share(items[key]["scores"]) for key in a]) for items in (a, b)]

    def rhos(counts: np.ndarray) -> np.ndarray:
        return 100 * np.stack([spearman(share, ratios, counts) for share in shares], axis=1)

    (score_a, score_b), = rhos(np.ones((1, len(a))))
    result = Comparison(task, *names, len(a), float(score_a), float(score_b), float(score_b - score_a))
    return tested(result, bootstrap_rows(rhos, len(a), resamples, np.random.default_rng(seed)), np.array_equal(*shares))


def compare_reading(names: tuple[str, str], rows: list[dict[str, str]], a: np.ndarray, b: np.ndarray, resamples: int,
                    seed: int) -> list[Comparison]:
    """Both reading scores, from `pred` and `prev_pred` of either model, [2, rows] in nats.

    Words of one sentence are not independent of each other, so whole sentences are drawn, not words.
    """
    sentences: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        sentences.setdefault(row["sent_id"], []).append(index)
    members = list(sentences.values())

    def both(chosen: list[int]) -> list[list[float]]:
        drawn = [rows[index] for index in chosen]
        values = [scores(drawn, model[0, chosen], model[1, chosen]) for model in (a, b)]
        return [[value[kind] for value in values] for kind in ("eye_tracking", "self_paced")]

    whole = both(list(range(len(rows))))
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(members), size=len(members)) for _ in range(resamples))
    samples = np.array([both([index for sentence in draw for index in members[sentence]]) for draw in draws])  # [R, 2 kinds, 2 models]
    same = np.array_equal(a, b, equal_nan=True)
    return [tested(Comparison(f"reading ({kind})", *names, len(rows), *pair, pair[1] - pair[0]), samples[:, index], same)
            for index, (kind, pair) in enumerate(zip(("eye tracking", "self-paced"), whole, strict=True))]


def tested(result: Comparison, samples: np.ndarray, same: bool) -> Comparison:
    """Fill in interval and p from the scores of both models in each resample, [R, 2]."""
    if same:
        result.low, result.high, result.p, result.verdict = 0.0, 0.0, 1.0, "the same scores on every row"
    elif not np.isfinite(samples).all() or not math.isfinite(result.difference):
        result.verdict = "not tested: the score is undefined, on these items or on some resamples of them (all values alike)"
    else:
        differences = samples[:, 1] - samples[:, 0]
        result.low, result.high, result.p = *interval(differences), sign_p(differences)
    return result


# ---- All tasks, all pairs -------------------------------------------------------------------------------------------


def reading_rows(path: Path, models: dict[str, Path]) -> list[dict[str, str]]:
    """Rows of reading_data.csv, with their sentences. UserError if the models' surprisals are of another file."""
    try:
        rows = read_rows(path)
    except OSError as error:
        raise UserError(f"--reading {path}: {error.strerror}") from None
    if "sent_id" not in rows[0]:
        raise UserError(f"--reading {path}: not the reading data (it has no column sent_id)")
    for name, folder in models.items():
        made_of = origin(folder, "reading").get("data")
        if made_of and made_of != [file_sha256(path)[:16]]:
            raise UserError(f"--reading {path} is not the file that {name} was scored on: give that one, or score reading again")
    return rows


def read_reading(path: Path, rows: int) -> np.ndarray:
    """`pred` and `prev_pred` of a reading predictions.json, [2, rows] in nats; NaN where a row has no previous word."""
    try:
        predictions = json.loads(path.read_text(encoding="utf-8"))["reading"]["predictions"]
        values = np.array([[row["pred"], row["prev_pred"]] for row in predictions], dtype=float).T
        ids = [row["id"] for row in predictions]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no reading predictions ({error!r}); score reading again") from None
    if ids != list(range(rows)):
        raise UserError(f"{path} has {len(ids):,} predictions, but --reading has {rows:,} rows: they are not of the same data")
    return values


def verdict(comparison: Comparison, family: int) -> str:
    """In plain words, what the corrected p allows to say."""
    if comparison.verdict:
        return comparison.verdict
    if comparison.only_a == comparison.only_b == 0:
        return "right on the same items"
    if comparison.p_holm < LEVEL:
        return f"{comparison.b if comparison.difference > 0 else comparison.a} is better"
    if comparison.p < LEVEL:
        return f"may be chance: {family} comparisons were made"
    return "no difference that these items can show"


def compare_all(models: dict[str, Path], resamples: int, seed: int, reading_csv: Path | None) -> tuple[list[Comparison], list[str]]:
    """Every task that all models have, for every pair of models.

    Args:
        models: {name: its <revision>/zero_shot/<backend> folder}, two or more.
        reading_csv: the CSV behind the reading predictions, or None to leave reading out.

    Returns:
        (comparisons, notes on what was left out). Every comparison draws from the same seed: what else is compared in the
        same call changes nothing but Holm's correction.
    """
    files = {name: task_files(folder) for name, folder in models.items()}
    every = list(dict.fromkeys(task for found in files.values() for task in found))
    lacking = {task: [name for name in files if task not in files[name]] for task in every}
    notes = [f"{task}: not compared, missing in {', '.join(names)}" for task, names in lacking.items() if names]
    pairs = list(itertools.combinations(models, 2))
    results: list[Comparison] = []
    for task in (task for task in every if not lacking[task]):
        items = {name: read_items(files[name][task]) for name in models}
        rules = origin(next(iter(models.values())), task.rsplit("/", 1)[-1]).get("task", {})  # by name where nothing says them
        wug = rules.get("score", "spearman" if task.startswith("wug") else "") == "spearman"
        by_split = rules.get("average", "splits" if task.startswith("entity_tracking") else "") == "splits"
        compare = compare_wug if wug else functools.partial(compare_accuracy, by_split=by_split)
        for name in models:
            tied = np.mean([bool(item.get("tie")) for item in items[name].values()])
            if tied > 0.01 and not wug:
                notes.append(f"{task}: {100 * tied:.1f} % of {name}'s answers are ties, which count as right, as officially")
        for a, b in pairs:
            require_same_data(task.rsplit("/", 1)[-1], models[a], models[b])
            require_same_items(task, files[a][task], items[a], files[b][task], items[b])
            results.append(compare(task, (a, b), items[a], items[b], resamples, seed))
    predictions = {name: folder / "reading" / "predictions.json" for name, folder in models.items()}
    without = [name for name, path in predictions.items() if not path.is_file()]
    if without and len(without) < len(models):
        notes.append(f"reading: not compared, missing in {', '.join(without)}")
    elif not without and reading_csv is None:
        notes.append("reading: not compared; give its data with --reading <data>/reading/reading_data.csv")
    elif not without:
        rows = reading_rows(reading_csv, models)
        for a, b in pairs:
            require_same_data("reading", models[a], models[b])
        values = {name: read_reading(path, len(rows)) for name, path in predictions.items()}
        if resamples > READING_RESAMPLES:
            notes.append(f"reading: {READING_RESAMPLES:,} resamples (of sentences), as each takes regressions")
        for a, b in pairs:
            results += compare_reading((a, b), rows, values[a], values[b], min(resamples, READING_RESAMPLES), seed)
    if not results:
        raise UserError("the models have no task in common: nothing to compare.\n" + "\n".join(notes))
    family = sum(result.p is not None for result in results)
    for result, corrected in zip(results, holm([result.p for result in results]), strict=True):
        result.p_holm = corrected
        result.verdict = verdict(result, family)
    if 2 * family / (resamples + 1) >= LEVEL:
        notes.append(f"{family} comparisons and {resamples:,} resamples: no corrected p can be below {LEVEL}; give more --resamples")
    return results, notes


# ---- The table ------------------------------------------------------------------------------------------------------


def table(results: list[Comparison]) -> str:
    """The comparisons of one pair of models as aligned text."""

    def p_value(value: float | None) -> str:
        return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"

    lines = [["task", "items", "A", "B", "B-A", "95 % interval", "p", "Holm", "only A", "only B", "McNemar", "verdict"]]
    for row in results:
        ends = "-" if row.low is None else f"[{row.low:+.2f}, {row.high:+.2f}]"
        counts = ["-" if count is None else str(count) for count in (row.only_a, row.only_b)]
        lines.append([row.task, str(row.items), f"{row.score_a:.2f}", f"{row.score_b:.2f}", f"{row.difference:+.2f}", ends,
                      p_value(row.p), p_value(row.p_holm), *counts, p_value(row.p_mcnemar), row.verdict])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = [map(str.rjust, line[1:-1], widths[1:-1]) for line in lines]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *cells, line[-1]]) for line, cells in zip(lines, numbers, strict=True))


def model_names(folders: list[Path]) -> dict[str, Path]:
    """{name to show: folder}: the folder's name, with its parent's where two are alike. UserError where one is given twice."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a model is given twice: comparing it with itself says nothing")
    names = [folder.resolve().name for folder in folders]
    return {(name if names.count(name) == 1 else f"{folder.resolve().parent.name}/{name}"): folder
            for name, folder in zip(names, folders, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="results/NAME", help="two or more folders of results")
    parser.add_argument("--revision", default="main", help="main, or a milestone such as chck_10M (default: main)")
    parser.add_argument("--backend", default="causal", help="causal, mlm or mntp (default: causal)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap draws (default: 10000)")
    parser.add_argument("--reading", type=Path, metavar="CSV", help="reading_data.csv: compare the reading scores, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparisons here, too")
    args = parser.parse_args()
    if len(args.models) < 2:
        parser.error("give two models or more")
    if args.resamples < 100:
        parser.error("--resamples: 100 or more, or the ends of an interval are noise")
    names = model_names(args.models)
    folders = {name: backend_folder(folder, args.revision, args.backend) for name, folder in names.items()}
    results, notes = compare_all(folders, args.resamples, args.seed, args.reading)
    for a, b in itertools.combinations(names, 2):
        print(f"A = {a}, B = {b} ({args.revision}, {args.backend}; points of the official score, for WUG 100 rho)")
        print(table([result for result in results if (result.a, result.b) == (a, b)]), end="\n\n")
    print(*notes, sep="\n", end="\n" if notes else "")
    print("This is about these checkpoints on more such items; for a claim about methods, train several seeds of each.")
    if args.json:
        write_json(args.json, {"revision": args.revision, "backend": args.backend, "seed": args.seed, "resamples": args.resamples,
                               "comparisons": [asdict(result) for result in results], "notes": notes})


if __name__ == "__main__":
    run_stage(main)
