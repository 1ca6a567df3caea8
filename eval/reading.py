"""Reading times: how much of what eye tracking and self-paced reading measure does a model's surprisal explain?

Surprisal of a word after its sentence so far, -ln p(word | context) in nats, as the official pipeline computes it: the word is
tokenized alone, without a space before it; after each of its pieces the piece's text is appended to the context and the whole
is tokenized anew. A masked model is asked at the first of three masks after the context. A score is 100 times the share of the
variance left by the controls that surprisal explains.
"""

import csv
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats
from transformers import PreTrainedTokenizerFast

from babylm.schema import UserError
from eval.scorer import Request

EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
MEASURES = (*EYE_TRACKING, SELF_PACED, "ELAN", "LAN", "N400", "P600", "EPNP", "PNP")  # the last six: event-related potentials
MASKS = 3  # that stand for the rest of a sentence
CONTROLS = ("Subtlex_log10", "length", "context_length")
TEXTS = ("item", "word", "prev_item", "prev_word")
# What the official pipeline's CSV reader takes for a gap. One context is the word "None": it is put back where it is a context, as
# the official pipeline does by accident, and stays a gap where it is the context of the previous word.
GAPS = ("", "None", "nan", "NaN", "NA", "N/A", "null", "NULL")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of reading_data.csv. UserError names the columns that are missing, or the line of a row that is cut short or holds no
    number where one belongs."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from None
    needed = {*TEXTS, *CONTROLS, *EYE_TRACKING, SELF_PACED, "prev_length"}
    if missing := sorted(needed - set(rows[0] if rows else ())):
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: is it the reading_data.csv of the evaluation data?")
    for number, row in enumerate(rows, 2):
        if None in row.values() or None in row:
            raise UserError(f"{path}, line {number}: {'fewer' if None in row.values() else 'more'} fields than the header has")
        for name in (*CONTROLS, "prev_length", *(name for name in MEASURES if name in row)):
            try:
                _number(row[name])
            except ValueError:
                raise UserError(f"{path}, line {number}: {name} is {row[name]!r}, no number") from None
    return rows


def requests(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast, backend: str = "causal") -> list[tuple[int, int, Request]]:
    """(row, 0 for its word or 1 for the word before, one Request per piece of that word)."""
    found = []
    for number, row in enumerate(rows):
        words = [(context_of(row), row["word"])]
        if row["prev_item"] not in GAPS and row["prev_word"] not in GAPS:
            words.append((row["prev_item"], row["prev_word"]))
        about = f"row {number} of the reading times"
        for which, (context, word) in enumerate(words):
            for place, piece in enumerate(tokenizer(word, add_special_tokens=False).input_ids):
                text = tokenizer.decode([piece])
                target = tokenizer(text, add_special_tokens=False).input_ids if place else [piece]
                ids, position = _asked(context, tokenizer, backend)
                if position < 0 or not target:
                    raise UserError(f"{about}: the tokenizer makes nothing of {text if position >= 0 else context!r}")
                found.append((number, which, Request(ids, ((position, target[0]),), about)))
                context += text
    return found


def context_of(row: dict[str, str]) -> str:
    return row["item"] if row["item"] not in GAPS else "None"


def _asked(context: str, tokenizer: PreTrainedTokenizerFast, backend: str) -> tuple[tuple[int, ...], int]:
    """(what the model reads, the position whose output predicts what follows the context)."""
    if backend == "causal":
        ids = tuple(tokenizer(context).input_ids)
        return ids, len(ids) - 1
    ids = tuple(tokenizer(context + MASKS * tokenizer.mask_token).input_ids)
    behind = ids[-1] != tokenizer.mask_token_id  # an end token
    return ids, len(ids) - MASKS - behind - (backend == "mntp")


def surprisals(rows: Sequence[dict[str, str]], asked: Sequence[tuple[int, int, Request]], logprobs: Sequence[float]) -> np.ndarray:
    """[rows, 2] nats: of each row's word and of the word before it, NaN where there is none."""
    found = np.full((len(rows), 2), np.nan)
    for (row, which, _), value in zip(asked, logprobs, strict=True):
        found[row, which] = np.nan_to_num(found[row, which]) - value
    return found


def scores(rows: Sequence[dict[str, str]], pred: np.ndarray, prev_pred: np.ndarray) -> dict[str, float]:
    """{"eye_tracking", "self_paced"} in percent: 100 (R2 with - R2 without) / (1 - R2 without), ordinary least squares.

    Controls of eye tracking: log frequency, length, context length and their products in pairs; mean over four measures. Of
    self-paced reading also the length and the surprisal of the word before. Rows with gaps are left out.
    """
    explained = {spillover: power(rows, pred, prev_pred, spillover, (SELF_PACED,) if spillover else EYE_TRACKING)
                 for spillover in (False, True)}
    shares = {spillover: [100 * one["Change in R2 from baseline"] / (1 - one["R2"] + one["Change in R2 from baseline"]) for one in found]
              for spillover, found in explained.items()}
    return {"eye_tracking": float(np.mean(shares[False])), "self_paced": shares[True][0]}


def power(rows: Sequence[dict[str, str]], pred: np.ndarray, prev_pred: np.ndarray, spillover: bool,
          measures: Sequence[str] = MEASURES) -> list[dict[str, float | str]]:
    """What surprisal adds to the prediction of each measure that the data has: the lines of predictive_power.jsonl, or, with the
    word before among the controls, of predictive_power_spillover.jsonl."""
    controls = [column(rows, name) for name in CONTROLS] + ([column(rows, "prev_length"), prev_pred] if spillover else [])
    found = []
    for name in (name for name in measures if name in rows[0]):
        measured = column(rows, name)
        whole = np.isfinite(np.column_stack([measured, *controls, pred])).all(1)
        base = [values[whole] for values in controls]
        base += [one * other for one, other in combinations(base, 2)]
        without, with_it = (_least_squares(measured[whole], columns) for columns in (base, [*base, pred[whole]]))
        found.append({"Predicted variable": name, "Coefficient": with_it["last"], "Number of standard deviations": with_it["t"],
                      "P-value": with_it["p"], "R2": with_it["r2"], "Change in R2 from baseline": with_it["r2"] - without["r2"],
                      "AIC": with_it["aic"], "Change in AIC from baseline": with_it["aic"] - without["aic"]})
    return found


def column(rows: Sequence[dict[str, str]], name: str) -> np.ndarray:
    """[rows], NaN where there is a gap."""
    return np.array([_number(row[name]) for row in rows])


def _number(text: str) -> float:
    return float(text) if text not in GAPS else np.nan


def _least_squares(measured: np.ndarray, columns: list[np.ndarray]) -> dict[str, float]:
    """R2 and AIC of a regression with an intercept, and the last column's coefficient with its t and p."""
    design = np.column_stack([np.ones(len(measured)), *columns])
    rows, width = len(design), int(np.linalg.matrix_rank(design))
    inverse = np.linalg.pinv(design)
    fit = inverse @ measured
    squares = float(((measured - design @ fit) ** 2).sum())
    error = float(np.sqrt(squares / (rows - width) * (inverse[-1] ** 2).sum()))  # (X'X)^-1 = X^+ (X^+)'
    t = float(fit[-1]) / error if error else float("inf")
    return {"r2": 1 - squares / float(((measured - measured.mean()) ** 2).sum()), "last": float(fit[-1]), "t": t,
            "p": float(2 * stats.t.sf(abs(t), rows - width)), "aic": rows * (np.log(2 * np.pi * squares / rows) + 1) + 2 * width}


def correlations(rows: Sequence[dict[str, str]], pred: np.ndarray) -> dict[str, float]:
    """Pearson's correlation of surprisal with each measure, over the rows that have both."""
    found = {}
    for name in (name for name in MEASURES if name in rows[0]):
        measured = column(rows, name)
        whole = np.isfinite(measured) & np.isfinite(pred)
        found[name] = float(np.corrcoef(measured[whole], pred[whole])[0, 1])
    return found
