"""When does a model learn a word, and do children learn them in the same order?

    python -m eval.aoa models/GPT2-Small-BabyLM-CE --data evaluation_data/full_eval/aoa
    python -m eval.aoa models/A --data <folder> --suite 2025 --milestones chck_1M chck_10M chck_100M --output results

reads   the milestones chck_* of a run; cdi_childes.json, the words and the contexts that they follow in child-directed speech;
        cdi_human.csv, the share of children who say a word at each month of age.
writes  results/<model>/main/zero_shot/<backend>/AoA_word/: surprisal.json and aoa_score.json in the official formats; ages.json with
        the curve and the two ages of every word and why there is none; curves.png and curves.svg; steps/<suite>/, what is scored
        already: an interrupted run goes on with the next milestone, and one on more milestones scores only these. Both suites
        write the same files, where each year's collation looks for them: the last call's are there, the other's come back at once.

A word's surprisal is -ln p(word | what stands before), summed over its tokens. That is the start token alone in the challenge of 2025
(for words of at least 20 contexts, with one record per context, all alike), and each context in 2026. The score is 2026's for both:
f(x) = a / (1 + exp(-b (x - c))) + d is fitted to minus the mean surprisal over x = log10(words seen + 1), and the model's age is where
f is half way from chance, n ln(vocabulary) for a word of n tokens, to the lowest mean surprisal; f is fitted to the shares over
months, and the children's age is where it crosses one half. Pearson's r over the words that have both is the score, but 0 where
p > 0.1 or with fewer than three words. Words without an age are left out, by name and reason.

Time: as many forward passes as there are milestones, each over all contexts; texts that begin alike are computed once. Then a minute
or two of fits: one that does not converge takes seconds until its 20,000 evaluations, which the official score allows, are spent.
"""

import argparse
import csv
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import expit, logit
from scipy.stats import pearsonr, spearmanr
from transformers import PreTrainedTokenizerFast

from babylm import figures, models
from babylm.run_folder import run_stage, write_json
from babylm.schema import UserError, milestone_words
from custom_dataset import file_sha256
from eval.reading import GAPS
from eval.reports import results_home
from eval.scorer import Request, Scorer
from eval.tasks import Item
from eval.zero_shot import BACKENDS, load_model, requests_of, revisions

CONTEXTS, CHILDREN = "cdi_childes.json", "cdi_human.csv"
MONTHS = range(16, 31)  # of age, that the official score looks at
SOURCE = "they are part of the evaluation data of the BabyLM challenge (https://osf.io/ryjfm)"
TOO_FEW = "fewer than 3 values"


@dataclass(frozen=True)
class Suite:
    """A year's pipeline: whether words follow the start token alone, how many contexts a word needs, records per milestone."""

    bos_only: bool
    min_contexts: int
    records: int


SUITES = {"2026": Suite(False, 1, 8005), "2025": Suite(True, 20, 6560)}
SMALL = [f"chck_{number}M" for number in (*range(1, 10), *range(10, 101, 10))]
TRACKS = {"strict-small": SMALL, "strict": [*SMALL, *(f"chck_{number}M" for number in range(200, 1001, 100))]}


# ---- The data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Word:
    """A word and the contexts that it follows, as they stand in the file."""

    text: str
    contexts: tuple[str, ...]


def read_words(path: Path, suite: Suite) -> list[Word]:
    """The words of cdi_childes.json. Words of one letter and words with too few contexts are left out, as they are officially.

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
        if len(text) > 1 and len(found) >= suite.min_contexts:
            words.append(Word(text, tuple(entry["context"] for entry in found)))
        else:
            left_out.append(text)
    few = f"fewer than {suite.min_contexts} context(s)"
    if not words:
        raise UserError(f"{path} holds no word but of one letter or with {few}")
    if left_out:
        print(f"left out of {path.name}, as they are officially (one letter, or {few}): {', '.join(map(repr, left_out))}", flush=True)
    return words


def read_children(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(months [M], {word: share of children who say it [M], NaN where the file has a gap}) of cdi_human.csv. Of a word that is
    there twice the first row counts, as officially, and a line says so.

    Raises:
        UserError: no such file, no columns of months, or a share that is none.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give --data, the folder of {CONTEXTS} and {CHILDREN}; {SOURCE}") from None
    columns = [str(month) for month in MONTHS if rows and str(month) in rows[0]]
    if len(columns) < 3 or "word" not in rows[0]:
        raise UserError(f"{path}: needs a column `word` and columns named after months (16, 17, ...); it has "
                        f"{', '.join(map(str, rows[0])) if rows else 'no rows'}")
    children: dict[str, np.ndarray] = {}
    for number, row in enumerate(rows, 2):
        shares = []
        for name in columns:
            try:
                shares.append(math.nan if row[name] in GAPS else float(row[name] or ""))
            except ValueError:
                shares.append(-1.0)
            if not (math.isnan(shares[-1]) or 0 <= shares[-1] <= 1):
                raise UserError(f"{path}, line {number}, word {row['word']!r}: {row[name]!r} at month {name} is no share from 0 to 1")
        if row["word"] in children:
            print(f"{path}, line {number}: the word {row['word']!r} is there a second time; the first counts, as officially", flush=True)
        children.setdefault(row["word"], np.array(shares))
    return np.array([int(name) for name in columns], dtype=float), children


def choose_milestones(folder: Path, names: Sequence[str]) -> dict[str, tuple[Path, int]]:
    """{milestone: (its folder, words seen)} in the order of words; `names` are those wanted, or "all"."""
    found = {name: path for name, path in revisions(folder, True, None).items() if name != "main"}
    if not found:
        raise UserError(f"{folder} has no milestones chck_*: curves need several. Runs save them as they train (section `checkpoints`)")
    if unknown := [name for name in names if name != "all" and name not in found]:
        raise UserError(f"{folder} has no milestone {', '.join(unknown)}; it has {', '.join(found)}")
    return {name: (path, milestone_words(name)) for name, path in found.items() if "all" in names or name in names}


# ---- Surprisal ------------------------------------------------------------------------------------------------------


def requests(words: Sequence[Word], tokenizer: PreTrainedTokenizerFast, suite: Suite, backend: str) -> list[list[Request]]:
    """What to ask for each word and context, in their order, or for each word after the start token: the tokens that end beyond what
    stands before it. A tokenizer that prepends a start token itself puts a second one there, as it does officially."""
    if suite.bos_only and tokenizer.bos_token is None:
        raise UserError("the tokenizer has no start token, after which --suite 2025 scores words; use --suite 2026")
    if backend != "causal" and tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer has no mask token, which the backend {backend} needs; use the backend causal")
    found = []
    for word in words:
        for number, start in enumerate([tokenizer.bos_token] if suite.bos_only else [f"{text.strip()} " for text in word.contexts]):
            about = f"the word {word.text!r} after {'the start token' if suite.bos_only else f'its context {number}'}"
            found += requests_of(Item("", about, (start,), (word.text.strip(),), None, None), tokenizer, backend)
            if not any(request.targets for request in found[-1]):
                raise UserError(f"{about} ({start[:60]!r}): the tokenizer leaves nothing to score. Does it prepend a start token?")
    return found


def surprisals(path: Path, words: Sequence[Word], suite: Suite, backend: str, identity: dict[str, str], kept: Path) -> list[float]:
    """Nats of every word in every context at one milestone, from `kept` where the same were scored before."""
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["identity"] == identity:
            return before["surprisals"]
    asked = requests(words, models.load_tokenizer(path), suite, backend)
    owners = [number for number, mine in enumerate(asked) for _ in mine]
    found = np.zeros(len(asked))
    scorer = Scorer(load_model(path, backend, False), masked=backend != "causal")
    for number, values in scorer.logprobs([request for mine in asked for request in mine]):
        found[owners[number]] -= values.sum()
    if suite.bos_only:
        found = np.repeat(found, [len(word.contexts) for word in words])
    write_json(kept, {"identity": identity, "surprisals": found.tolist()})
    return found.tolist()


def official(stem: str, words: Sequence[Word], suite: Suite, milestones: dict[str, int], values: dict[str, list[float]]) -> dict[str, Any]:
    """The content of surprisal.json: records by milestone, word, context."""
    asked = [(word.text, number, "BOS_ONLY" if suite.bos_only else context) for word in words
             for number, context in enumerate(word.contexts)]
    records = [{"step": step, "word_count": seen, "target_word": text, "context_id": number, "context": context, "surprisal": value}
               for step, seen in milestones.items() for (text, number, context), value in zip(asked, values[step], strict=True)]
    counts = {"total_steps": len(milestones), "completed_steps": len(milestones)}
    return {"metadata": {"model_name": stem, "use_bos_only": suite.bos_only, **counts}, "results": records}


def completeness(words: Sequence[Word], suite: Suite, milestones: dict[str, int]) -> str:
    """What the official collation would say. It wants a number of records per milestone, and a track's milestones, no more, no less."""
    count, track = sum(len(word.contexts) for word in words), "strict" if max(milestones.values()) > 100_000_000 else "strict-small"
    lacks, spare = [name for name in TRACKS[track] if name not in milestones], [name for name in milestones if name not in TRACKS[track]]
    whole = count == suite.records and not lacks + spare
    return (f"{'a' if whole else 'not a'} complete submission: {count:,} records per milestone (officially {suite.records:,})"
            + (f"; {track} lacks {', '.join(lacks)}" if lacks else f"; all milestones of {track}")
            + (f"; {', '.join(spare)} {'is' if len(spare) == 1 else 'are'} not in {track}" if spare else ""))


def mean_curves(words: Sequence[Word], values: dict[str, list[float]]) -> np.ndarray:
    """[words, milestones] nats: the mean over each word's contexts."""
    sizes = [len(word.contexts) for word in words]
    starts = np.cumsum([0, *sizes[:-1]])
    return np.stack([np.add.reduceat(np.array(mine), starts) / sizes for mine in values.values()], axis=1)


# ---- Ages -----------------------------------------------------------------------------------------------------------


def chances(words: Sequence[Word], tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Nats of each word if all tokens were equally likely: as many times ln(vocabulary) as the word adds tokens to "The"."""
    before, *whole = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in ("The", *(f"The {word.text}" for word in words)))
    return [max(1, count - before) * math.log(tokenizer.vocab_size) for count in whole]


def child_age(months: np.ndarray, shares: np.ndarray) -> float | str:
    """The month at which half of the children say a word, or why there is none; both [M], NaN where a share is missing."""
    x, y = months[~np.isnan(shares)], shares[~np.isnan(shares)]
    if len(x) < 3:
        return TOO_FEW
    return _crossing(x, y, [1, 0.1, x.mean(), 0], ([0, 0, x[0], -0.5], [2, 1, x[-1], 0.5]), level=0.5, least=0, evaluations=1000)


def model_age(seen: np.ndarray, curve: np.ndarray, chance: float) -> float | str:
    """log10(words seen + 1) where a word's surprisal is half way from chance to its minimum, or why there is none.

    Args:
        seen: [T] words, increasing.
        curve: [T] mean surprisal, nats.
        chance: nats.
    """
    x, y = np.log10(seen + 1), -curve
    if len(x) < 3:
        return TOO_FEW
    low, high, spread = y.min(), y.max(), np.ptp(y)
    bounds = [0, 0, x[0] - 1, low - 2 * spread - 1], [10 * spread + 1, 100, x[-1] + 1, high + 1]
    return _crossing(x, y, [spread, 1, x.mean(), low], bounds, level=(high - chance) / 2, least=1e-6, evaluations=20_000)


def _crossing(x: np.ndarray, y: np.ndarray, start: list[float], bounds: tuple[list[float], list[float]], *, level: float, least: float,
              evaluations: int) -> float | str:
    """Where a / (1 + exp(-b (x - c))) + d, fitted to y [T] by least squares, crosses `level` within x, or why it does not. `start` and
    `bounds` are of a, b, c, d; a fit of which a or b is not above `least` is flat."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, which is not asked for
            (a, b, c, d), _ = curve_fit(lambda x, a, b, c, d: a * expit(b * (x - c)) + d, x, y, start, bounds=bounds, maxfev=evaluations)
    except RuntimeError:
        return "the fit fails"
    if min(a, b) <= least:
        return "the fit is flat"
    if not d < level < a + d:
        return "the fit never crosses the threshold"
    found = c + logit((level - d) / a) / b
    return float(found) if x[0] <= found <= x[-1] else "the fit crosses the threshold outside of what was measured"


def ages(words: Sequence[Word], milestones: dict[str, int], curves: np.ndarray, chance: Sequence[float], months: np.ndarray,
         children: dict[str, np.ndarray]) -> dict[str, Any]:
    """The content of ages.json: a curve [T] and two ages per word, who is left out and why, how the ages correlate, and the score."""
    seen, entries, left_out, pairs = np.array(list(milestones.values()), dtype=float), {}, {}, []
    for word, curve, nats in zip(words, curves, chance, strict=True):
        found = {"model": model_age(seen, curve, nats),
                 "children": child_age(months, children[word.text]) if word.text in children else f"not in {CHILDREN}"}
        for who, why in found.items():
            if isinstance(why, str):
                left_out.setdefault(f"{who}: {why}", []).append(word.text)
        model, child = (None if isinstance(age, str) else age for age in found.values())
        entries[word.text] = {"contexts": len(word.contexts), "surprisal": curve.tolist(), "chance": nats,
                              "words_seen": None if model is None else 10**model - 1, "months": child}
        if model is not None and child is not None:
            pairs.append((model, child))
    correlation = {"n": len(pairs), "pearson": None, "p": None, "spearman": None}
    if len(pairs) > 2 and np.ptp(pairs, axis=0).all():
        x, y = zip(*pairs, strict=True)
        r, p = pearsonr(x, y)
        correlation |= {"pearson": float(r), "p": float(p), "spearman": float(spearmanr(x, y).statistic)}
    counts = correlation["p"] is not None and correlation["p"] <= 0.1
    return {"milestones": milestones, "correlation": correlation, "score": correlation["pearson"] if counts else 0.0,
            "left_out": left_out, "words": entries}


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
    said = "" if correlation["pearson"] is None else f", r = {correlation['pearson']:.2f}, p = {correlation['p']:.2g}"
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
    parser.add_argument("--suite", choices=SUITES, default="2026", help="2026: words after their contexts (default); 2025: after the start "
                                                                        "token alone")
    parser.add_argument("--backend", choices=BACKENDS, default="causal")
    parser.add_argument("--milestones", nargs="+", default=["all"], metavar="chck_1M", help="which of them (default: all)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="where results go (default: results)")
    args = parser.parse_args()
    suite, chosen = SUITES[args.suite], choose_milestones(args.model, args.milestones)
    words, (months, children) = read_words(args.data / CONTEXTS, suite), read_children(args.data / CHILDREN)
    home = results_home(args.output, args.model)
    stem, folder = home.name, home / "main" / "zero_shot" / args.backend / "AoA_word"
    data = file_sha256(args.data / CONTEXTS)
    print(f"{stem}: {len(words):,} words in {sum(len(word.contexts) for word in words):,} contexts, {len(chosen)} milestones", flush=True)
    values = {}
    for name, (path, _) in chosen.items():
        tokenizer = models.load_tokenizer(path)
        identity = {"checkpoint": models.checkpoint_fingerprint(path), "data": data}
        values[name] = surprisals(path, words, suite, args.backend, identity, folder / "steps" / args.suite / f"{name}.json")
        print(f"{name}: {np.mean(values[name]):.3f} nats per word", flush=True)
    milestones = {name: seen for name, (_, seen) in chosen.items()}
    write_json(folder / "surprisal.json", official(stem, words, suite, milestones, values))
    print(f"fitting the curves of {len(words):,} words", flush=True)
    curves = mean_curves(words, values)
    found = {"suite": args.suite, **ages(words, milestones, curves, chances(words, tokenizer), months, children)}
    write_json(folder / "ages.json", found)
    write_json(folder / "aoa_score.json", {"aoa": found["score"]})
    figures.save(figure(found, stem), folder / "curves")
    print(completeness(words, suite, milestones))
    report(found, folder)


def report(found: dict[str, Any], folder: Path) -> None:
    for why, texts in found["left_out"].items():
        print(f"left out, {why} ({len(texts)}): {', '.join(texts)}")
    correlation = found["correlation"]
    if correlation["pearson"] is None:
        print(f"no correlation of ages: {correlation['n']} words have both, or all the same")
    else:
        print(f"ages of acquisition, log10(words seen) against months: Pearson's r = {correlation['pearson']:.3f}, p = "
              f"{correlation['p']:.3g}, Spearman's rho = {correlation['spearman']:.3f}, n = {correlation['n']} words")
    of = ", of surprisals after the start token alone, which 2025 scored otherwise" if SUITES[found["suite"]].bos_only else ""
    cut = "" if found["score"] else ": 0 by its rule for fewer than 3 words or p > 0.1"
    print(f"score as 2026 defines it{of}: {found['score']:.3f}{cut}")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_stage(main)
