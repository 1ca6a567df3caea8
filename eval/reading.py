"""Reading times: how much of what eye tracking and self-paced reading measure does a model's surprisal explain?

Surprisal of a word after its sentence so far, -ln p(word | context) in nats, as the official pipeline computes it: the word is
tokenized alone, without a space before it; after each of its pieces the piece's text is appended to the context and the whole
is tokenized anew. A score is 100 times the share of the variance left by the controls that surprisal explains.
"""

import csv
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from babylm.config import UserError
from eval.scorer import Request

EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
CONTROLS = ("Subtlex_log10", "length", "context_length")
TEXTS = ("item", "word", "prev_item", "prev_word")
# What the official pipeline's CSV reader takes for a gap. One context is the word "None": it is put back where it is a context, as
# the official pipeline does by accident, and stays a gap where it is the context of the previous word.
GAPS = ("", "None", "nan", "NaN", "NA", "N/A", "null", "NULL")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of reading_data.csv. UserError names the columns that are missing, or the line of a row that is cut short."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {*TEXTS, *CONTROLS, *EYE_TRACKING, SELF_PACED, "prev_length"}
    if missing := sorted(needed - set(rows[0] if rows else ())):
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: is it the reading_data.csv of the evaluation data?")
    for number, row in enumerate(rows, 2):
        if None in row.values() or None in row:
            raise UserError(f"{path}, line {number}: {'fewer' if None in row.values() else 'more'} fields than the header has")
    return rows


def requests(rows: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, int, Request]]:
    """(row, 0 for its word or 1 for the word before, one Request per piece of that word)."""
    found = []
    for number, row in enumerate(rows):
        words = [(row["item"] if row["item"] not in GAPS else "None", row["word"])]
        if row["prev_item"] not in GAPS and row["prev_word"] not in GAPS:
            words.append((row["prev_item"], row["prev_word"]))
        for which, (context, word) in enumerate(words):
            for piece in tokenizer(word, add_special_tokens=False).input_ids:
                text = tokenizer.decode([piece])
                ids = tuple(tokenizer(context).input_ids)
                target = tokenizer(text, add_special_tokens=False).input_ids
                if not ids or not target:
                    raise UserError(f"row {number} of the reading times: the tokenizer makes nothing of {context if not ids else text!r}")
                found.append((number, which, Request(ids, ((len(ids) - 1, target[0]),), f"row {number} of the reading times")))
                context += text
    return found


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
    columns = {name: np.array([float(row[name]) if row[name] not in GAPS else np.nan for row in rows])
               for name in (*CONTROLS, *EYE_TRACKING, SELF_PACED, "prev_length")}
    controls = [columns[name] for name in CONTROLS]
    eyes = [_explained(columns[name], controls, pred) for name in EYE_TRACKING]
    return {"eye_tracking": float(np.mean(eyes)),
            "self_paced": _explained(columns[SELF_PACED], [*controls, columns["prev_length"], prev_pred], pred)}


def _explained(measured: np.ndarray, controls: list[np.ndarray], pred: np.ndarray) -> float:
    whole = np.isfinite(np.column_stack([measured, *controls, pred])).all(1)
    base = [column[whole] for column in controls]
    base += [one * other for one, other in combinations(base, 2)]
    without, with_it = (_r_squared(measured[whole], columns) for columns in (base, [*base, pred[whole]]))
    return 100 * (with_it - without) / (1 - without)


def _r_squared(measured: np.ndarray, columns: list[np.ndarray]) -> float:
    design = np.column_stack([np.ones(len(measured)), *columns])
    fit = np.linalg.lstsq(design, measured, rcond=None)[0]
    return float(1 - ((measured - design @ fit) ** 2).sum() / ((measured - measured.mean()) ** 2).sum())
