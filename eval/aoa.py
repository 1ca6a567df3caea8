"""When does a model learn a word, and do children learn them in the same order?

    python -m eval.aoa models/GPT2-Small-BabyLM-CE --data evaluation_data/full_eval/aoa
    python -m eval.aoa models/A --data <folder> --milestones chck_1M chck_10M --output results

reads   the milestones chck_* of a run; cdi_childes.json, the words and the contexts that they follow in child-directed speech;
        cdi_human.csv, the share of children who say a word at each month of age.
writes  results/<model>/main/zero_shot/causal/AoA_word/: surprisal.json in the official format, one record per word, context and
        milestone, in nats; ages.json with the curve and the two ages of every word; curves.png and curves.svg; steps/, what is
        scored already: an interrupted run goes on with the next milestone, and one on more milestones scores only these.

A word's surprisal is -ln p(word | context), summed over its tokens. Its curve is the mean over its contexts, at each milestone. A
model's age of acquisition is the number of words seen at which a sigmoid over log10(words), fitted to the curve, is half way
from its upper to its lower end; a child's is the month at which a sigmoid from 0 to 1, fitted to the shares, crosses one half. A
word whose age lies outside of what was measured, or whose curve is no falling sigmoid, is not learnt and is left out, by name.

Time: as many forward passes as there are milestones, each over all contexts; texts that begin alike are computed once.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerFast

from babylm import figures, models
from babylm.config import UserError
from babylm.run_folder import run_stage, write_json
from custom_dataset import file_sha256, tokenizer_fingerprint
from eval.compare import spearman
from eval.scorer import Request, Scorer
from eval.zero_shot import MILESTONE, completion_tokens, load_model, revisions

CONTEXTS, CHILDREN = "cdi_childes.json", "cdi_human.csv"
SOURCE = "they are part of the evaluation data of the BabyLM challenge (https://osf.io/ryjfm)"
MIN_MILESTONES = 5  # a sigmoid has four parameters
MIN_EXPLAINED = 0.5  # share of a curve's variance that its sigmoid must explain: less is noise, not learning


# ---- The data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A word and the contexts that it follows, stripped of outer spaces."""

    text: str
    contexts: tuple[str, ...]


def read_words(path: Path) -> list[Word]:
    """The words of cdi_childes.json. Words of one letter and words without contexts are left out, as they are officially.

    Raises:
        UserError: no such file, not JSON, or an entry that is malformed; file and word are named.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give --data, the folder of {CONTEXTS} and {CHILDREN}; {SOURCE}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); fetch the file again") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: not an object of words and their contexts, but a {type(entries).__name__}")
    words, left_out = [], []
    for text, found in entries.items():
        if not isinstance(found, list):
            raise UserError(f"{path}, word {text!r}: its contexts are a {type(found).__name__}, not a list")
        for number, entry in enumerate(found):
            if not isinstance(entry, dict) or not isinstance(entry.get("context"), str):
                raise UserError(f'{path}, word {text!r}, entry {number}: not of the form {{"context": text}}: {str(entry)[:60]}')
        if len(text) > 1 and found:
            words.append(Word(text, tuple(entry["context"].strip() for entry in found)))
        else:
            left_out.append(text)
    if not words:
        raise UserError(f"{path} holds no word of two letters or more with a context")
    if left_out:
        print(f"left out of {path.name}, as they are officially (one letter, or no context): {', '.join(map(repr, left_out))}", flush=True)
    return words


def read_children(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(months [M], {word: share of children who say it [M]}) of cdi_human.csv.

    Raises:
        UserError: no such file, no columns of months, a share that is none, or a word that is there twice.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give --data, the folder of {CONTEXTS} and {CHILDREN}; {SOURCE}") from None
    columns = sorted((name for name in (rows[0] if rows else {}) if name and name.strip().isdigit()), key=int)
    if len(columns) < 3 or "word" not in rows[0]:
        raise UserError(f"{path}: needs a column `word` and columns named after months (16, 17, ...); it has "
                        f"{', '.join(map(str, rows[0])) if rows else 'no rows'}")
    children: dict[str, np.ndarray] = {}
    for number, row in enumerate(rows, 2):
        if row["word"] in children:
            raise UserError(f"{path}, line {number}: the word {row['word']!r} is there a second time")
        shares = []
        for name in columns:
            try:
                shares.append(float(row[name] or ""))
            except ValueError:
                shares.append(-1.0)
            if not 0 <= shares[-1] <= 1:
                raise UserError(f"{path}, line {number}, word {row['word']!r}: {row[name]!r} at month {name} is no share from 0 to 1")
        children[row["word"]] = np.array(shares)
    return np.array([int(name) for name in columns], dtype=float), children


def choose_milestones(folder: Path, names: Sequence[str]) -> dict[str, tuple[Path, int]]:
    """{milestone: (its folder, words seen)} in the order of words; `names` are those wanted, or "all"."""
    found = {name: path for name, path in revisions(folder, True, None).items() if name != "main"}
    if not found:
        raise UserError(f"{folder} has no milestones chck_*: curves need several. Runs save them as they train (section `checkpoints`)")
    if unknown := [name for name in names if name != "all" and name not in found]:
        raise UserError(f"{folder} has no milestone {', '.join(unknown)}; it has {', '.join(found)}")
    return {name: (path, _words_seen(name)) for name, path in found.items() if "all" in names or name in names}


def _words_seen(name: str) -> int:
    match = MILESTONE.match(name)
    return int(match[1]) * {"K": 1000, "M": 1_000_000}[match[2]]


# ---- Surprisal ------------------------------------------------------------------------------------------------------


def requests(words: Sequence[Word], tokenizer: PreTrainedTokenizerFast) -> list[Request]:
    """One per word and context, in their order: the tokens that end beyond the context and the one space after it."""
    found = []
    for word in words:
        for number, context in enumerate(word.contexts):
            about = f"the word {word.text!r} after its context {number}"
            ids, scored = completion_tokens(tokenizer, f"{context} ", word.text.strip())
            targets = tuple((place - 1, ids[place]) for place in scored if place)
            if not targets:
                raise UserError(f"{about} ({context[:60]!r}): the tokenizer leaves nothing to score. Does it prepend a start token?")
            found.append(Request(ids, targets, about))
    return found


def surprisals(path: Path, words: Sequence[Word], identity: dict[str, str], kept: Path) -> list[float]:
    """Nats of every word after every context at one milestone, from `kept` where the same were scored before."""
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["identity"] == identity:
            return before["surprisals"]
    asked = requests(words, models.load_tokenizer(path))
    found = np.zeros(len(asked))
    for number, values in Scorer(load_model(path, "causal", False)).logprobs(asked):
        found[number] = -values.sum()
    write_json(kept, {"identity": identity, "surprisals": found.tolist()})
    return found.tolist()


def official(stem: str, words: Sequence[Word], milestones: dict[str, int], values: dict[str, list[float]]) -> dict[str, Any]:
    """The content of surprisal.json: records by milestone, word, context."""
    asked = [(word.text, number, context) for word in words for number, context in enumerate(word.contexts)]
    records = [{"step": step, "word_count": seen, "target_word": text, "context_id": number, "context": context, "surprisal": value}
               for step, seen in milestones.items() for (text, number, context), value in zip(asked, values[step], strict=True)]
    counts = {"total_steps": len(milestones), "completed_steps": len(milestones)}
    return {"metadata": {"model_name": stem, "use_bos_only": False, **counts}, "results": records}


def mean_curves(words: Sequence[Word], values: dict[str, list[float]]) -> np.ndarray:
    """[words, milestones] nats: the mean over each word's contexts."""
    sizes = [len(word.contexts) for word in words]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.stack([np.add.reduceat(np.array(mine), starts) / sizes for mine in values.values()], axis=1)


# ---- Ages -----------------------------------------------------------------------------------------------------------


def fit_falling(x: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Where a falling sigmoid, fitted by least squares, is half way down; NaN where there is no such place within x.

    Args:
        x: [T] increasing.
        curves: [W, T].

    Returns:
        [W]. Middle and width of the sigmoid are tried on a grid, its two ends follow from each in closed form: so no start value
        and no step can miss the best fit. A middle at the edge of x is none: the curve was falling before, or falls still.
    """
    # Narrower than a quarter of a step, all sigmoids between two points are alike; wider than x, they are straight lines.
    narrowest = np.diff(x).max() / 4
    middles = np.linspace(x[0], x[-1], 201)
    middle, width = (grid.ravel() for grid in np.meshgrid(middles, np.geomspace(narrowest, x[-1] - x[0], 30), indexing="ij"))
    shape = _sigmoid(x, middle, width)
    shape -= shape.mean(1, keepdims=True)
    centred = curves - curves.mean(1, keepdims=True)
    spread = (shape**2).sum(1)[:, None]
    slope = shape @ centred.T / spread  # [grid, W]
    total = (centred**2).sum(1)
    explained = np.where(slope < 0, slope**2 * spread, -np.inf)
    best = explained.argmax(0)
    found = middle[best]
    falls = explained[best, np.arange(len(curves))] >= MIN_EXPLAINED * np.maximum(total, 1e-12)
    return np.where(falls & (found > middles[0]) & (found < middles[-1]), found, np.nan)


def fit_shares(months: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The month at which a rising sigmoid from 0 to 1, fitted by least squares to `shares` [W, M], crosses one half, to about a
    tenth; [W], NaN where that is before the first month or after the last."""
    middle, width = (grid.ravel() for grid in np.meshgrid(np.arange(months[0] - 24, months[-1] + 36, 0.1), np.geomspace(0.3, 20, 30),
                                                          indexing="ij"))
    shape = _sigmoid(months, middle, width)
    # |shape - shares|^2 without its term that no fit changes
    found = middle[((shape**2).sum(1)[:, None] - 2 * shape @ shares.T).argmin(0)]
    return np.where((found >= months[0]) & (found <= months[-1]), found, np.nan)


def _sigmoid(x: np.ndarray, middle: np.ndarray, width: np.ndarray) -> np.ndarray:
    """[grid, T] of x [T] and grids of middles and widths."""
    return 0.5 * (1 + np.tanh((x - middle[:, None]) / (2 * width[:, None])))


def ages(words: Sequence[Word], milestones: dict[str, int], curves: np.ndarray, months: np.ndarray,
         children: dict[str, np.ndarray]) -> dict[str, Any]:
    """The content of ages.json: a curve and two ages per word, who is left out and why, and how the ages correlate."""
    known = [word.text for word in words if word.text in children]
    child = dict(zip(known, fit_shares(months, np.stack([children[text] for text in known])), strict=True)) if known else {}
    enough = len(milestones) >= MIN_MILESTONES
    model = fit_falling(np.log10(list(milestones.values())), curves) if enough else np.full(len(words), np.nan)
    entries = {word.text: {"contexts": len(word.contexts), "surprisal": curve.tolist(), "words_seen": _number(10**age),
                           "months": _number(child.get(word.text, np.nan))}
               for word, curve, age in zip(words, curves, model, strict=True)}
    left_out = {"not learnt by the model": [text for text, entry in entries.items() if enough and entry["words_seen"] is None],
                "not learnt by children": [text for text in known if entries[text]["months"] is None],
                f"not in {CHILDREN}": [text for text in entries if text not in children]}
    pairs = np.array([(np.log10(entry["words_seen"]), entry["months"]) for entry in entries.values()
                      if entry["words_seen"] is not None and entry["months"] is not None]).reshape(-1, 2)
    found = {"n": len(pairs), "pearson": None, "spearman": None}
    if len(pairs) > 2 and (pairs.std(0) > 0).all():
        found |= {"pearson": float(np.corrcoef(pairs.T)[0, 1]), "spearman": float(spearman(*pairs.T, np.ones((1, len(pairs))))[0])}
    return {"milestones": milestones, "correlation": found, "left_out": left_out, "words": entries}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# ---- Figure ---------------------------------------------------------------------------------------------------------


@figures.style()
def figure(found: dict[str, Any], title: str) -> Figure:
    """Mean surprisal over words seen, by thirds of the words in the order in which children learn them, and the two ages."""
    seen, entries = list(found["milestones"].values()), list(found["words"].values())
    learnt = sorted((entry for entry in entries if entry["months"] is not None), key=lambda entry: entry["months"])
    groups = {f"all {len(entries)} words": entries}
    if len(learnt) >= 3:
        for name, third in zip(("early", "middle", "late"), np.array_split(np.array(learnt, dtype=object), 3), strict=True):
            groups[f"{name}: children at {third[0]['months']:.0f}-{third[-1]['months']:.0f} months"] = list(third)
    fig = Figure(figsize=(6.8, 2.6), layout="constrained")
    curves, dots = fig.subplots(1, 2)
    for index, (name, members) in enumerate(groups.items()):
        look = figures.look(index - 1) if index else {"color": figures.GREY, "linewidth": 2.0}
        curves.plot(seen, np.mean([entry["surprisal"] for entry in members], axis=0), label=name, **look)
    curves.set(xscale="log", xlabel="words seen", ylabel="mean surprisal (nats)", title=title)
    both = [(entry["months"], entry["words_seen"]) for entry in entries if None not in (entry["months"], entry["words_seen"])]
    dots.plot(*np.array(both).reshape(-1, 2).T, linestyle="", marker="o", markersize=2.6, color=figures.COLOURS[0], alpha=0.7)
    correlation = found["correlation"]
    said = "" if correlation["pearson"] is None else f", r = {correlation['pearson']:.2f}"
    dots.set(yscale="log", xlabel="age of children (months)", ylabel="words that the model had seen",
             title=f"age of acquisition, {correlation['n']} words{said}")
    curves.xaxis.set_major_formatter(figures.si)
    dots.yaxis.set_major_formatter(figures.si)
    curves.legend()
    return fig


# ---- All of it ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="models/NAME", help="a run's folder with milestones")
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {CONTEXTS} and {CHILDREN}")
    parser.add_argument("--milestones", nargs="+", default=["all"], metavar="chck_1M", help="which of them (default: all)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="where results go (default: results)")
    args = parser.parse_args()
    chosen = choose_milestones(args.model, args.milestones)
    words, (months, children) = read_words(args.data / CONTEXTS), read_children(args.data / CHILDREN)
    stem = args.model.resolve().name
    folder = args.output / stem / "main" / "zero_shot" / "causal" / "AoA_word"
    data = file_sha256(args.data / CONTEXTS)
    print(f"{stem}: {len(words):,} words in {sum(len(word.contexts) for word in words):,} contexts, {len(chosen)} milestones", flush=True)
    values = {}
    for name, (path, _) in chosen.items():
        identity = {"weights": models.weights_fingerprint(str(path)), "tokenizer": tokenizer_fingerprint(models.load_tokenizer(path)),
                    "data": data}
        values[name] = surprisals(path, words, identity, folder / "steps" / f"{name}.json")
        print(f"{name}: {np.mean(values[name]):.3f} nats per word", flush=True)
    milestones = {name: seen for name, (_, seen) in chosen.items()}
    write_json(folder / "surprisal.json", official(stem, words, milestones, values))
    found = ages(words, milestones, mean_curves(words, values), months, children)
    write_json(folder / "ages.json", found)
    figures.save(figure(found, stem), folder / "curves")
    report(found, folder)


def report(found: dict[str, Any], folder: Path) -> None:
    if len(found["milestones"]) < MIN_MILESTONES:
        print(f"no ages of the model: {len(found['milestones'])} milestones, but a sigmoid needs {MIN_MILESTONES}")
    for why, texts in found["left_out"].items():
        if texts:
            print(f"left out, {why} ({len(texts)}): {', '.join(texts)}")
    correlation = found["correlation"]
    if correlation["pearson"] is None:
        print(f"no correlation of ages: {correlation['n']} words are learnt by both")
    else:
        print(f"ages of acquisition, log10(words seen) against months: Pearson's r = {correlation['pearson']:.3f}, Spearman's rho = "
              f"{correlation['spearman']:.3f}, n = {correlation['n']} words")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_stage(main)
