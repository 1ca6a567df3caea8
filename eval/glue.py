"""The GLUE tasks of BabyLM as data: what a task is, the rows of its files, the development split, tokens with their padding."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import model_validator
from transformers import PreTrainedTokenizerFast

from babylm.schema import Section, UserError, key
from eval.tasks import rows as json_rows


class Task(Section):
    first: str = key(..., "first text of an input, with {fields} of the row")
    second: str | None = key(None, "second text")
    label: str = key("label", "field of the label")
    labels: list[int | str] = key([0, 1], "its values, in the order of the classes", min_length=2)
    metric: Literal["accuracy", "f1"] = key("accuracy", "chooses the epoch and is the score; f1: of the second label")
    group_by: str | None = key(None, "field whose rows stay on one side of the development split")
    size: int | None = key(None, "rows that are reported officially", ge=1, identity=False)
    epochs: int | None = key(None, "instead of training.epochs", ge=1)
    batch_size: int | None = key(None, "instead of training.batch_size", ge=1)
    lr: float | None = key(None, "instead of training.lr", gt=0)

    @model_validator(mode="after")
    def f1_is_of_two_classes(self) -> "Task":
        if self.metric == "f1" and len(self.labels) != 2:
            raise ValueError(f"metric f1 needs two labels, not {len(self.labels)}")
        return self

    @property
    def metrics(self) -> list[str]:
        return ["accuracy", "f1"] if self.metric == "f1" else ["accuracy"]


# ---- Rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """One JSONL file. `texts`: (first, second or None) per row; `labels`: class per row; `groups`: rows that belong together."""

    path: Path
    texts: list[tuple[str, str | None]]
    labels: list[int]
    groups: list[str | int]

    def __len__(self) -> int:
        return len(self.labels)


def read_rows(path: Path, name: str, task: Task) -> Rows:
    """The rows of a task's file. UserError names file, line and field of a row that is not whole, or not as the task says."""
    texts, labels, groups = [], [], []
    for number, row in json_rows(path):
        where = f"{path}, line {number}"
        fill = [_filled(template, row, where, name) for template in (task.first, task.second)]
        for field in filter(None, (task.label, task.group_by)):
            _require(field, row, where, name)
        if row[task.label] not in task.labels:
            raise UserError(f"{where}: the label {row[task.label]!r} is not one of {task.labels}; correct tasks.{name}.labels, or "
                            "take a file with labels (the hidden test sets have none)")
        texts.append((fill[0], fill[1]))
        labels.append(task.labels.index(row[task.label]))
        groups.append(str(row[task.group_by]) if task.group_by else len(groups))
    if len(set(labels)) < 2:
        raise UserError(f"{path}: {len(labels)} rows with {len(set(labels))} different labels: there is nothing to tell apart")
    return Rows(path, texts, labels, groups)


def _filled(template: str | None, row: dict, where: str, name: str) -> str | None:
    if template is None:
        return None
    for _, field, _, _ in string.Formatter().parse(template):
        if field is not None and not isinstance(_require(field, row, where, name), str):
            raise UserError(f"{where}: the field {field!r} is no text but {row[field]!r}; correct tasks.{name}")
    return template.format(**row)


def _require(field: str, row: dict, where: str, name: str) -> Any:
    if field not in row:
        raise UserError(f"{where}: no field {field!r}; the row has {', '.join(row)}. Correct tasks.{name} in finetune.yaml, or with an "
                        f"override such as tasks.{name}.first={{{next(iter(row), 'field')}}}")
    return row[field]


def read_tasks(folder: Path, tasks: dict[str, Task]) -> dict[str, tuple[Rows, Rows]]:
    """{task: (training rows, reported rows)} of those that `folder` holds; a line for each that it does not, and for each
    whose reported rows are not as many as the official ones."""
    if not folder.is_dir():
        raise UserError(f"--data: {folder} is no folder; give the one with rte.train.jsonl, rte.valid.jsonl, ...")
    found = {}
    for name, task in tasks.items():
        train, valid = folder / f"{name}.train.jsonl", folder / f"{name}.valid.jsonl"
        if not train.exists() and not valid.exists():
            print(f"{name}: skipped, {folder} has no {train.name}")
        elif not (train.exists() and valid.exists()):
            raise UserError(f"{valid if train.exists() else train} is missing beside {train.name if train.exists() else valid.name}")
        else:
            found[name] = read_rows(train, name, task), read_rows(valid, name, task)
            if task.size not in (None, len(found[name][1])):
                print(f"{name}: not the official {valid.name}: {len(found[name][1]):,} rows instead of {task.size:,}: the score is not "
                      "comparable with published ones")
    if not found:
        raise UserError(f"--data: {folder} holds none of the tasks {', '.join(tasks)} (<task>.train.jsonl, <task>.valid.jsonl)")
    return found


def split(rows: Rows, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(indices to train on, indices that choose the epoch), drawn by whole groups from `seed`. UserError if one is empty."""
    members: dict[str | int, list[int]] = {}
    for index, group in enumerate(rows.groups):
        members.setdefault(group, []).append(index)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled, dev = [list(members.values())[i] for i in order], []
    while shuffled and len(dev) < max(1, round(fraction * len(rows))):
        dev += shuffled.pop()
    if not shuffled:
        raise UserError(f"{rows.path}: {len(rows)} rows in {len(members)} groups are too few to hold out {fraction:.0%} of them "
                        "(training.dev_fraction)")
    return sorted(index for group in shuffled for index in group), sorted(dev)


# ---- Tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows: ids and segment ids per row, and how many rows were cut. Padding is made per batch, on `side`."""

    ids: list[list[int]]
    segments: list[list[int]]
    labels: list[int]
    cut: int
    pad: int
    side: Literal["left", "right"]
    with_segments: bool

    def take(self, indices: Sequence[int]) -> "Tokens":
        """Some of the rows; `cut` still counts all."""
        return replace(self, **{name: [getattr(self, name)[i] for i in indices] for name in ("ids", "segments", "labels")})

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """({"input_ids", "attention_mask", ...}: [B, longest of these rows], labels [B]), int64."""
        width = max(len(self.ids[i]) for i in indices)

        def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
            space = [[fill] * (width - len(row)) for row in rows]
            pairs = zip(space, rows, strict=True) if self.side == "left" else zip(rows, space, strict=True)
            return torch.tensor([a + b for a, b in pairs], device=device)

        inputs = {"input_ids": padded([self.ids[i] for i in indices], self.pad),
                  "attention_mask": padded([[1] * len(self.ids[i]) for i in indices], 0)}
        if self.with_segments:
            inputs["token_type_ids"] = padded([self.segments[i] for i in indices], 0)
        return inputs, torch.tensor([self.labels[i] for i in indices], device=device)


def in_proportion(first: int, second: int, budget: int) -> tuple[int, int]:
    """How many tokens of two texts are kept when only `budget` fit: each loses the same share, none is lost altogether."""
    if first + second <= budget:
        return first, second
    kept = round(budget * first / (first + second))
    if first and second:
        kept = min(max(kept, 1), budget - 1)
    return kept, budget - kept


def tokenise(rows: Rows, tokenizer: PreTrainedTokenizerFast, limit: int, side: Literal["left", "right"]) -> Tokens:
    """Rows as the tokenizer's own pair template makes them, of at most `limit` tokens: over-long texts lose their ends."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    pair = rows.texts[0][1] is not None
    budget = limit - tokenizer.num_special_tokens_to_add(pair=pair)
    firsts = backend.encode_batch([first for first, _ in rows.texts], add_special_tokens=False)
    seconds = backend.encode_batch([second or "" for _, second in rows.texts], add_special_tokens=False)
    ids, segments, cut = [], [], 0
    for first, second in zip(firsts, seconds, strict=True):
        cut += len(first.ids) + len(second.ids) > budget
        keep = in_proportion(len(first.ids), len(second.ids), budget)
        first.truncate(keep[0])
        second.truncate(keep[1])
        whole = backend.post_process(first, second if pair else None)
        ids.append(whole.ids)
        segments.append(whole.type_ids)
    if not all(ids):
        raise UserError(f"{rows.path}: row {ids.index([]) + 1} has no tokens: its texts are empty and the tokenizer adds no start token")
    return Tokens(ids, segments, rows.labels, cut, tokenizer.pad_token_id or 0, side, "token_type_ids" in tokenizer.model_input_names)
