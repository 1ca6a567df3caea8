"""Scores of a model that is being trained: the sets of `training.eval_tasks`, at every milestone, for run/metrics.jsonl.

Scored by the same code as `python -m eval.zero_shot`, so that a milestone's row in metrics.jsonl is what that command gives for
its folder.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from babylm import models
from babylm.schema import UserError
from eval import reading, zero_shot
from eval.scorer import Scorer
from eval.tasks import Task, choose_tasks, find_sets, load_tasks, read_items

KEPT = ("score", "se", "n", "ties")


def open_sets(names: Sequence[str], data: Path, suite: str) -> list[tuple[Task, Path]]:
    """(task, folder) of every set of these tasks, each read once.

    Raises:
        UserError: an unknown suite or task, no such folder, a task without any set in it, or a set that cannot be read.
    """
    tasks = choose_tasks(list(names), load_tasks(suite))
    if not data.is_dir():
        raise UserError(f"training.eval_data: there is no folder {data}; it should hold sets such as blimp_fast/")
    found = []
    for task in tasks:
        folders = find_sets(task, data)
        if not folders:
            raise UserError(f"training.eval_tasks: {task.name} has no set in training.eval_data {data} (looked for "
                            f"{', '.join(task.sets)}, there and in its full_eval/ and fast_eval/); get it from: {task.source}")
        for folder in folders:
            _read(task, folder)
        found += [(task, folder) for folder in folders]
    return found


def _read(task: Task, folder: Path) -> list:
    if task.score != "reading":
        return read_items(task, folder)
    file = folder / "reading_data.csv"
    if not file.is_file():
        raise UserError(f"training.eval_tasks: {file} is missing; get it from: {task.source}")
    return reading.read_rows(file)


def as_saved(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer that is saved with a model: unlike the one the corpus was read with, it always prepends the start token."""
    with tempfile.TemporaryDirectory() as folder:
        models.save_tokenizer(tokenizer, Path(folder))
        return models.load_tokenizer(folder)


def require_fits(sets: Sequence[tuple[Task, Path]], tokenizer: PreTrainedTokenizerFast, positions: int | None) -> None:
    """UserError if a text of these sets is longer than a model's positions: said before training, not at the first milestone."""
    tokenizer = as_saved(tokenizer)
    for task, folder in sets if positions else ():
        rows = _read(task, folder)
        requests = ([request for _, _, request in reading.requests(rows, tokenizer)] if task.score == "reading" else
                    [request for item in rows for mine in zero_shot.requests_of(item, tokenizer, "causal") for request in mine])
        longest = max(requests, key=lambda request: len(request.ids))
        if len(longest.ids) > positions:
            raise UserError(f"training.eval_tasks: {longest.about} of {folder} has {len(longest.ids)} tokens, but the model has "
                            f"{positions} positions: take {task.name} off the list, or raise model.max_positions")


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sets: Sequence[tuple[Task, Path]]) -> dict[str, dict[str, Any]]:
    """{set: {"score", "se" (percent, or rho), "n", "ties" (share)}} of a causal model as it is, on its device.

    Training goes on afterwards as if nothing had happened: every module returns to the mode it was in, and random numbers that
    are drawn here are not missing there.
    """
    device, tokenizer = model.device, as_saved(tokenizer)
    with (torch.random.fork_rng([device] if device.type == "cuda" else []), tempfile.TemporaryDirectory() as files,
          models.mode(model, training=False)):
        scorer = Scorer(model)
        found = {folder.name: zero_shot.score_set(task, folder, Path(files, folder.name), scorer, tokenizer, "causal", {})
                 for task, folder in sets}
    return {name: {key: entry[key] for key in KEPT} for name, entry in found.items()}
