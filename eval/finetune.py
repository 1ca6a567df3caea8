"""GLUE: fine-tune models on the seven BabyLM tasks and report them beside the best constant answer.

    python -m eval.finetune models/GPT2-Small-BabyLM-CE models/GPT2-Small-Distilled --data glue_filtered
    python -m eval.finetune models/GPT2-Small-Distilled --data glue_filtered --tasks rte,wsc training.mode=lora seeds=[1,2,3]

Reads   <data>/<task>.train.jsonl and <task>.valid.jsonl; tasks, fields and hyper-parameters from eval/finetune.yaml
Writes  results/<model>/<revision>/finetune/<task>/predictions.json and results.txt   the official files, of the first seed
        .../<task>/seeds/<seed>.json    one fine-tuning: settings, scores per epoch, predictions; what a rerun does not repeat
        .../<task>/summary.json, .../finetune/summary.json    mean and standard deviation over seeds, majority, trained parameters

The best epoch is chosen on a part of the training rows; the reported rows are predicted once, after that. A causal model is read at
its last token, with padding on the left and positions counted from the first real token. At its first token it has seen the start
token alone and answers the same for every input: a constant answer is refused, whatever its cause, and the command ends with code 1
after the other tasks. A seed gives the same numbers again, bit for bit on a CPU.
"""

import argparse
import inspect
import json
import math
import statistics
import string
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from pydantic import model_validator
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from babylm import models
from babylm.config import Section, UserError, apply_override, check, identity, key, read_yaml
from babylm.run_folder import require_finished, run_stage, write_json, write_text
from custom_dataset import file_sha256, tokenizer_fingerprint

CONFIG = Path(__file__).with_name("finetune.yaml")
REPLACED = ("epochs", "batch_size", "lr")  # keys of the training section that a task may have of its own


class Refused(UserError):
    """A fine-tuning whose result must not be reported; the other tasks go on."""


# ---- What eval/finetune.yaml holds ----------------------------------------------------------------------------------


class Training(Section):
    mode: Literal["full", "lora"] = key("full", "train all weights, or LoRA matrices; the head always")
    pooling: Literal["auto", "last", "first", "mean"] = key("auto", "token whose last hidden state is classified")
    lr: float | None = key(None, "highest learning rate; null: 3e-5, and 3e-4 for LoRA", gt=0)
    epochs: int = key(10, "passes over the training rows", ge=1)
    batch_size: int = key(32, "rows per optimizer step", ge=1)
    eval_batch_size: int = key(64, "rows per forward pass without gradients", ge=1, identity=False)
    schedule: Literal["cosine", "linear", "constant"] = key("cosine", "of the learning rate after the warm-up")
    warmup_fraction: float = key(0.06, "share of all steps in which the learning rate rises", ge=0, lt=1)
    min_lr_fraction: float = key(0.1, "share of the learning rate that is left at the end", ge=0, le=1)
    weight_decay: float = key(0.01, "of AdamW", ge=0)
    head_dropout: float = key(0.1, "in the classification head", ge=0, lt=1)
    max_length: int = key(512, "tokens per input, special tokens included", ge=8)
    dev_fraction: float = key(0.1, "share of the training rows that chooses the epoch", gt=0, lt=1)
    precision: Literal["fp32", "bf16"] = key("fp32", "bf16: autocast")


class Lora(Section):
    rank: int = key(8, "of the matrices", ge=1)
    alpha: float = key(16, "their product is scaled by alpha/rank", gt=0)
    dropout: float = key(0.05, "on their input", ge=0, lt=1)


class Config(Section):
    seeds: list[int] = key([42, 43, 44], "one fine-tuning each", identity=False, min_length=1)
    training: Training = key(Training(), "how")
    lora: Lora = key(Lora(), "for mode: lora")


class Task(Section):
    first: str = key(..., "first text of an input, with {fields} of the row")
    second: str | None = key(None, "second text")
    label: str = key("label", "field of the label")
    labels: list[int | str] = key([0, 1], "its values, in the order of the classes", min_length=2)
    metric: Literal["accuracy", "f1"] = key("accuracy", "chooses the epoch and is the score; f1: of the second label")
    group_by: str | None = key(None, "field whose rows stay on one side of the development split")
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


def read_config(path: Path, overrides: Sequence[str]) -> tuple[Config, dict[str, Task]]:
    """(config, tasks) of a YAML file and key=value overrides. UserError lists the mistakes of a section with their keys."""
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    tasks = values.pop("tasks", None)
    if not isinstance(tasks, dict) or not tasks:
        raise UserError(f"{path}: tasks: expected the tasks, each with its fields; found {tasks!r}")
    return check(Config, values, str(path)), {name: check(Task, task, f"{path}: tasks.{name}") for name, task in tasks.items()}


def training_of(task: Task, training: Training) -> Training:
    """The training section with a task's own values in place, and the learning rate resolved."""
    own = {name: getattr(task, name) for name in REPLACED if getattr(task, name) is not None}
    default = {"lr": training.lr or (3e-4 if training.mode == "lora" else 3e-5)}
    return training.model_copy(update=default | own)


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
    with open(path, encoding="utf-8") as stream:  # not splitlines(): it also breaks at U+2028, which JSON allows in a string
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON ({error}): is the file whole? Copy it again") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected an object with fields, found {type(row).__name__}")
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
        raise UserError(f"{where}: no field {field!r}; the row has {', '.join(row)}. Correct tasks.{name} in {CONFIG.name}, or with an "
                        f"override such as tasks.{name}.first={{{next(iter(row), 'field')}}}")
    return row[field]


def read_tasks(folder: Path, tasks: dict[str, Task]) -> dict[str, tuple[Rows, Rows]]:
    """{task: (training rows, reported rows)} of those that `folder` holds; a line for each that it does not."""
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


# ---- The classifier -------------------------------------------------------------------------------------------------


def pool(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """One state per row, [B, D], of hidden states [B, T, D]: found by the mask [B, T], so that no padding is ever read."""
    if how == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)
    position = mask.argmax(1) if how == "first" else mask.shape[1] - 1 - mask.flip(1).argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


class Classifier(nn.Module):
    """A language model's body, a pooled state, and the two-layer head of the official evaluation.

    Args:
        encoder: gives last_hidden_state [B, T, D].
        pooling: "last", "first" or "mean".
        causal: padding is on the left, and positions are counted from the first real token.
        classes: number of labels.
        dropout: in the head.
    """

    def __init__(self, encoder: PreTrainedModel, pooling: str, causal: bool, classes: int, dropout: float):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.pooling = encoder, pooling
        # GPT-2 counts positions from the first column, padding included, unless it is told.
        self.counts_positions = causal and "position_ids" in inspect.signature(encoder.forward).parameters
        self.head = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, width), nn.GELU(),
                                  nn.LayerNorm(width, elementwise_affine=False), nn.Dropout(dropout), nn.Linear(width, classes))

    def states(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Last hidden states [B, T, D] of a batch as `Tokens.batch` makes it."""
        if self.counts_positions:
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.encoder(attention_mask=attention_mask, **inputs).last_hidden_state

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits [B, classes]."""
        return self.head(pool(self.states(attention_mask, **inputs), attention_mask, self.pooling))


def load_encoder(path: str) -> PreTrainedModel:
    """A model's body in fp32. UserError if it cannot be loaded whole: what is missing would be random weights."""
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter: merge it into its base first (lora.merge in the config that trained it)")
    try:
        encoder, report = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=Path(path).exists(),
                                                    output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if missing := [name for name in report["missing_keys"] if not name.startswith("pooler.")]:
        raise UserError(f"{path} lacks the weights {', '.join(sorted(missing)[:3])} ({len(missing)} in all): it would start half random")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # BERT's: no masked model has trained it, and nothing here reads it
    encoder.config.use_cache = False
    return encoder


@torch.no_grad()
def is_causal(encoder: PreTrainedModel) -> bool:
    """Whether the first position ignores what follows it: asked of the model itself, with two inputs of four tokens."""
    ids = torch.tensor([[3, 4, 5, 6], [3, 7, 8, 9]])
    output = encoder.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    if getattr(output, "last_hidden_state", None) is None:
        raise UserError(f"{type(encoder).__name__} gives no last_hidden_state: AutoModel must map to the body of the model")
    if not output.last_hidden_state.isfinite().all():
        raise UserError(f"{encoder.name_or_path}: its hidden states are not finite numbers; the checkpoint is broken")
    first = output.last_hidden_state[:, 0]
    return torch.allclose(first[0], first[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def require_padding_is_harmless(classifier: Classifier, side: str) -> None:
    """UserError if padding on `side` changes the states of the real tokens: scores would depend on the rest of the batch."""
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.long)
    around = (3, 0) if side == "left" else (0, 3)
    alone = classifier.eval().states(mask, input_ids=ids)
    padded = classifier.states(F.pad(mask, around), input_ids=F.pad(ids, around))[:, around[0] : around[0] + 4]
    if not torch.allclose(alone, padded, rtol=1e-3, atol=1e-4):
        raise UserError(f"{type(classifier.encoder).__name__}: padding on the {side} changes the states of the other tokens by up to "
                        f"{(alone - padded).abs().max():.2g}: its forward must honour attention_mask and position_ids")


def build_classifier(path: str, training: Training, lora: Lora, pooling: str, causal: bool, classes: int, seed: int) -> Classifier:
    """A classifier with a head drawn from `seed`, whatever was drawn before."""
    torch.manual_seed(seed)
    classifier = Classifier(load_encoder(path), pooling, causal, classes, training.head_dropout)
    if training.mode == "lora":
        models.require_adapter_packages("lora")
        from peft import LoraConfig, get_peft_model

        transposed = any(isinstance(module, transformers.pytorch_utils.Conv1D) for module in classifier.encoder.modules())
        # The head lies outside of what peft freezes.
        classifier.encoder = get_peft_model(classifier.encoder, LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", fan_in_fan_out=transposed))
    return classifier.to("cuda" if torch.cuda.is_available() else "cpu")


# ---- Training -------------------------------------------------------------------------------------------------------


def lr_factor(step: int, steps: int, training: Training) -> float:
    """What the learning rate is multiplied by in step 0 ... steps-1: a rise, then a fall to min_lr_fraction."""
    warmup = int(training.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[training.schedule]
    return training.min_lr_fraction + (1 - training.min_lr_fraction) * shape


def precision(training: Training, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bf16")


@torch.no_grad()
def predict(classifier: Classifier, tokens: Tokens, training: Training, where: str) -> torch.Tensor:
    """Logits [rows, classes] in fp32 on the CPU, in the order of the rows; Refused if one is not finite."""
    classifier.eval()
    device = next(classifier.parameters()).device
    order = sorted(range(len(tokens.ids)), key=lambda i: len(tokens.ids[i]))  # rows of like length pad little
    logits = torch.zeros(len(order), classifier.head[-1].out_features)
    for start in range(0, len(order), training.eval_batch_size):
        chosen = order[start : start + training.eval_batch_size]
        inputs, _ = tokens.batch(chosen, device)
        with precision(training, device):
            logits[chosen] = classifier(**inputs).float().cpu()
    if not logits.isfinite().all():
        broken = int((~logits.isfinite()).any(1).sum())
        raise Refused(f"{where}: {broken} of {len(logits)} answers are not finite numbers; lower training.lr ({training.lr:g})")
    return logits


def scores(answers: Sequence[int], gold: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """{"accuracy": percent, "f1": percent, of class 1} of answers [N] to N rows."""
    pairs = Counter(zip(answers, gold, strict=True))
    both, either = 2 * pairs[1, 1], sum((a == 1) * n + (g == 1) * n for (a, g), n in pairs.items())
    values = {"accuracy": 100 * sum(n for (a, g), n in pairs.items() if a == g) / len(gold), "f1": 100 * both / either if either else 0.0}
    return {name: values[name] for name in names}


def best_constant(gold: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """The best that one answer for every row can score, per metric: the majority class's share; for F1, always class 1."""
    constant = [scores([label] * len(gold), gold, names) for label in sorted(set(gold))]
    return {name: max(row[name] for row in constant) for name in names}


def batches_of(lengths: Sequence[int], size: int, draw: torch.Generator) -> list[list[int]]:
    """All indices in batches of `size`, in an order drawn anew; rows of like length are put together, so that they pad little.

    Sorted are only 16 batches' worth of drawn rows at a time, so that which rows meet differs from epoch to epoch.
    """
    pools = [sorted(pool.tolist(), key=lambda i: lengths[i]) for pool in torch.randperm(len(lengths), generator=draw).split(16 * size)]
    batches = [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]


def train(classifier: Classifier, fit: Tokens, dev: Tokens, training: Training, task: Task, seed: int,
          where: str) -> tuple[list[dict], int]:
    """Train, and leave the weights of the best epoch on `dev` in place: by the task's metric, the lower loss where it ties.

    Returns:
        (one row per epoch: {"epoch", "loss" on the training rows, "dev_loss" (both nats), "dev_accuracy", ("dev_f1")}, best epoch).

    Raises:
        Refused: the loss is not finite.
    """
    device = next(classifier.parameters()).device
    weights = {name: weight for name, weight in classifier.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=training.lr, weight_decay=training.weight_decay)
    steps = training.epochs * math.ceil(len(fit.ids) / training.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, training))
    draw, lengths = torch.Generator().manual_seed(seed), [len(ids) for ids in fit.ids]
    history: list[dict] = []
    best, best_epoch, kept = (-math.inf, -math.inf), 0, {}
    for epoch in range(1, training.epochs + 1):
        began, losses = time.monotonic(), []
        classifier.train()
        for chosen in batches_of(lengths, training.batch_size, draw):
            inputs, labels = fit.batch(chosen, device)
            with precision(training, device):
                logits = classifier(**inputs)
            loss = F.cross_entropy(logits.float(), labels)
            losses.append(loss.item() * len(chosen))
            if not math.isfinite(losses[-1]):
                raise Refused(f"{where}: the loss is {loss.item()} in step {schedule.last_epoch + 1} of {steps} (epoch {epoch}); lower "
                              f"training.lr ({training.lr:g}), or train in fp32 if this was bf16")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        logits = predict(classifier, dev, training, where)
        measured = scores(logits.argmax(1).tolist(), dev.labels, task.metrics)
        row = {"epoch": epoch, "loss": sum(losses) / len(fit.ids), "dev_loss": F.cross_entropy(logits, torch.tensor(dev.labels)).item(),
               **{f"dev_{name}": value for name, value in measured.items()}}
        if (measured[task.metric], -row["dev_loss"]) > best:
            best, best_epoch = (measured[task.metric], -row["dev_loss"]), epoch
            kept = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        history.append(row)
        print(f"  {where}, epoch {epoch}/{training.epochs}: loss {row['loss']:.4f}, development loss {row['dev_loss']:.4f} and "
              f"{task.metric} {measured[task.metric]:.1f}, {time.monotonic() - began:.0f} s", flush=True)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(kept[name])
    return history, best_epoch


# ---- One model, one task --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model to fine-tune: where it lies, under which name and revision its results are filed, how it is read."""

    path: str
    name: str
    revision: str
    tokenizer: PreTrainedTokenizerFast
    causal: bool
    pooling: str
    limit: int  # tokens per input


def open_subject(model: str, revision: str, training: Training) -> Subject:
    """Check that a model can be fine-tuned, before anything is: finished, loadable whole, padding without effect."""
    path = model
    if revision != "main":
        path = str(Path(model) / revision)
        if not Path(path).is_dir():
            raise UserError(f"--revision: {model} has no folder {revision}; it is read from a local run folder (models/<name>/chck_10M)")
    require_finished(path, "fine-tuning")
    tokenizer, encoder = models.load_tokenizer(path), load_encoder(path)
    causal = is_causal(encoder)
    require_padding_is_harmless(Classifier(encoder, "last", causal, 2, 0.0), "left" if causal else "right")
    pooling = training.pooling if training.pooling != "auto" else "last" if causal else "first"
    limit = min(training.max_length, getattr(encoder.config, "max_position_embeddings", training.max_length), tokenizer.model_max_length)
    name = Path(model).stem
    if name != Path(model).name:
        print(f"warning: {model}: results are filed under {name!r}, as the official evaluation does: it takes what follows a dot for a "
              "file's ending")
    if tokenizer.num_special_tokens_to_add(pair=True) <= tokenizer.num_special_tokens_to_add(pair=False):
        print(f"warning: {name}: its tokenizer puts nothing between the two texts of an input (tokenizers saved by this project do)")
    if causal and pooling == "first":
        print(f"warning: {name} is causal: its first position sees the start token alone, so that every input looks the same")
    return Subject(path, name, revision, tokenizer, causal, pooling, limit)


@dataclass(frozen=True)
class Job:
    """One task on one model: `train` and `valid` are its rows, `folder` is <output>/<model>/<revision>/finetune/<task>."""

    subject: Subject
    name: str
    task: Task
    training: Training
    lora: Lora
    seeds: list[int]
    train: Rows
    valid: Rows
    folder: Path

    def at(self, seed: int) -> str:
        return f"{self.subject.name}, {self.name}, seed {seed}"

    def record(self, seed: int) -> Path:
        return self.folder / "seeds" / f"{seed}.json"

    def settings(self) -> dict[str, Any]:
        """All that a fine-tuning's numbers depend on, apart from the seed."""
        values = {f"training.{at}": value for at, value in identity(self.training).items()}
        values |= {f"lora.{at}": value for at, value in identity(self.lora).items() if self.training.mode == "lora"}
        own = {at: value for at, value in identity(self.task).items() if at not in REPLACED}
        values |= {f"tasks.{self.name}.{at}": value for at, value in own.items()}
        return values | {"training.pooling": self.subject.pooling, "limit": self.subject.limit,
                         "model": models.weights_fingerprint(self.subject.path), "tokenizer": tokenizer_fingerprint(self.subject.tokenizer),
                         self.train.path.name: file_sha256(self.train.path), self.valid.path.name: file_sha256(self.valid.path)}


def done_before(job: Job) -> dict[int, dict[str, Any]]:
    """{seed: record} of what an earlier call finished; UserError if that had other settings."""
    records, settings = {}, job.settings()
    for seed in filter(lambda seed: job.record(seed).is_file(), job.seeds):
        records[seed] = json.loads(job.record(seed).read_text(encoding="utf-8"))
        theirs = records[seed].pop("settings")
        if changed := [f"  {at}: {theirs.get(at)!r} there, {settings.get(at)!r} now" for at in sorted(settings.keys() | theirs.keys())
                       if theirs.get(at) != settings.get(at)]:
            raise UserError(f"{job.record(seed)} was made with other settings:\n" + "\n".join(changed) + "\nGive another --output, or "
                            f"move {job.folder} away")
    return records


def fine_tune(job: Job, fit: Tokens, valid: Tokens, seed: int) -> dict[str, Any]:
    """One fine-tuning on the training rows `fit`, as it is written to seeds/<seed>.json. Refused if a number is not finite."""
    began = time.monotonic()
    inner, dev = split(job.train, job.training.dev_fraction, seed)
    classifier = build_classifier(job.subject.path, job.training, job.lora, job.subject.pooling, job.subject.causal,
                                  len(job.task.labels), seed)
    history, best_epoch = train(classifier, fit.take(inner), fit.take(dev), job.training, job.task, seed, job.at(seed))
    answers = predict(classifier, valid, job.training, job.at(seed)).argmax(1).tolist()
    return {"seed": seed, **scores(answers, valid.labels, job.task.metrics),
            "largest_share": 100 * max(Counter(answers).values()) / len(answers), "best_epoch": best_epoch, "epochs": history,
            "rows_trained_on": len(inner), "rows_held_out": len(dev),
            "trained_parameters": sum(weight.numel() for weight in classifier.parameters() if weight.requires_grad),
            "seconds": round(time.monotonic() - began, 1), "predictions": [job.task.labels[answer] for answer in answers]}


def run(job: Job, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The seeds that are not `done`, each written as soon as it is. Returns, and writes, the task's summary."""
    training, subject, side = job.training, job.subject, "left" if job.subject.causal else "right"
    fit, valid = (tokenise(rows, subject.tokenizer, subject.limit, side) for rows in (job.train, job.valid))
    print(f"{subject.name}, {job.name}: {len(job.train):,} training rows, {len(job.valid):,} reported; {training.mode}, pooling "
          f"{subject.pooling}, lr {training.lr:g}, {training.epochs} epochs of batches of {training.batch_size}; cut to {subject.limit} "
          f"tokens, both texts by the same share: {fit.cut} and {valid.cut} rows", flush=True)
    records, problems = {}, []
    for seed in job.seeds:
        try:
            if seed in done:
                records[seed] = done[seed]
                print(f"  {job.at(seed)}: done before")
            else:
                records[seed] = fine_tune(job, fit, valid, seed)
                write_json(job.record(seed), {"settings": job.settings(), **records[seed]})
            if records[seed]["largest_share"] == 100:
                first_of_causal = subject.causal and subject.pooling == "first"
                raise Refused(f"{job.at(seed)}: every one of the {len(job.valid)} predictions is {records[seed]['predictions'][0]!r}. " + (
                    "A causal model's first token sees nothing of the input: training.pooling=last" if first_of_causal else
                    f"Try another training.lr, or more epochs (tasks.{job.name}.epochs)"))
        except Refused as problem:
            problems.append(str(problem))
            print(f"refused: {problem}", flush=True)
    result = summary(job, list(records.values()), (fit.cut, valid.cut), problems)
    write_task(job, records, result)
    return result


def summary(job: Job, records: list[dict], cut: tuple[int, int], problems: list[str]) -> dict[str, Any]:
    """What is reported of a task; scores and shares in percent.

    `score` is null where a seed was refused: the mean of the others would flatter the model. `largest_share` is that of the most
    frequent answer: close to 100, a score says little more than the majority does.
    """
    values, shown = [record[job.task.metric] for record in records], (*job.task.metrics, "largest_share", "best_epoch")
    return {"metric": job.task.metric, "score": None if problems else statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 and not problems else None, "n": len(job.valid),
            "majority": best_constant(job.valid.labels, job.task.metrics), "refused": problems,
            "seeds": {str(record["seed"]): {name: record[name] for name in shown} for record in records},
            "trained_parameters": records[0]["trained_parameters"] if records else None, "mode": job.training.mode,
            "pooling": job.subject.pooling, "limit": job.subject.limit, "cut_rows": {"train": cut[0], "valid": cut[1]}}


def write_task(job: Job, records: dict[int, dict], result: dict[str, Any]) -> None:
    """The task's summary, and the official files of the first seed; where a seed was refused there are none."""
    official = job.folder / "predictions.json", job.folder / "results.txt"
    if result["refused"]:
        for path in official:
            path.unlink(missing_ok=True)
    else:
        first = records[job.seeds[0]]
        predictions = [{"id": f"{job.name}_{i}", "pred": pred} for i, pred in enumerate(first["predictions"])]
        write_json(official[0], {job.name: {"predictions": predictions}})
        write_text(official[1], "".join(f"{metric}: {first[metric] / 100}\n" for metric in job.task.metrics))
    write_json(job.folder / "summary.json", result)


# ---- The command ----------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, dict]]) -> str:
    """Scores in percent, a task per line: the best constant answer, then each model's mean and standard deviation over seeds.

    Args:
        results: {model: {task: summary}}, the same tasks for every model.
    """
    tasks = next(iter(results.values()))
    majority = {task: shown["majority"][shown["metric"]] for task, shown in tasks.items()}
    lines = [["task", "metric", "rows", "majority", *results]]
    lines += [[task, shown["metric"], f"{shown['n']:,}", f"{majority[task]:.1f}", *(_cell(own[task]) for own in results.values())]
              for task, shown in tasks.items()]
    if len(tasks) > 1:
        every = [[shown["score"] for shown in own.values()] for own in results.values()]
        lines.append([f"mean of {len(tasks)}", "", "", f"{statistics.fmean(majority.values()):.1f}",
                      *("refused" if None in scored else f"{statistics.fmean(scored):.1f}" for scored in every)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [[cell.ljust(width) if at < 2 else cell.rjust(width) for at, (cell, width) in enumerate(zip(line, widths, strict=True))]
            for line in lines]
    note = "majority: the best score of one answer for every row (for F1: always the second label)"
    return "\n".join(["  ".join(row) for row in rows] + [note])


def _cell(shown: dict) -> str:
    if shown["score"] is None:
        return "refused"
    return f"{shown['score']:.1f}" + (f" ± {shown['sd']:.1f}" if shown["sd"] is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL | key=value", help="model folders or hub names; keys of the YAML to override")
    parser.add_argument("--data", required=True, type=Path, help="folder with <task>.train.jsonl and <task>.valid.jsonl")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="tasks and hyper-parameters (default: eval/finetune.yaml)")
    parser.add_argument("--tasks", help="only these, comma-separated")
    parser.add_argument("--revision", default="main", help="a milestone inside each run folder, for example chck_10M")
    args = parser.parse_intermixed_args()
    transformers.utils.logging.set_verbosity_error()  # its report of the unused output layer; missing weights are an error here

    config, tasks = read_config(args.config, [word for word in args.models if "=" in word])
    wanted = args.tasks.split(",") if args.tasks else list(tasks)
    if unknown := [name for name in wanted if name not in tasks]:
        raise UserError(f"--tasks: no task named {', '.join(unknown)} in {args.config}; it has {', '.join(tasks)}")
    paths = [word for word in args.models if "=" not in word]
    if not paths:
        raise UserError("give at least one model folder before the overrides")
    if twice := [name for name, n in Counter(Path(path).stem for path in paths).items() if n > 1]:
        raise UserError(f"several models are named {twice[0]}: their results would lie in the same folder; use one --output each")
    rows = read_tasks(args.data, {name: tasks[name] for name in wanted})
    subjects = [open_subject(path, args.revision, config.training) for path in paths]
    jobs = [Job(subject, name, tasks[name], training_of(tasks[name], config.training), config.lora, config.seeds, *parts,
                args.output / subject.name / subject.revision / "finetune" / name) for subject in subjects for name, parts in rows.items()]
    done = [done_before(job) for job in jobs]  # of all, so that other settings are an error before the first hour of training

    results: dict[str, dict[str, dict]] = {subject.name: {} for subject in subjects}
    for job, records in zip(jobs, done, strict=True):
        results[job.subject.name][job.name] = run(job, records)
        # From what lies there, so that a call for other tasks, or one beside this, adds to it.
        home = job.folder.parent
        found = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(home.glob("*/summary.json"))}
        write_json(home / "summary.json", {"model": job.subject.name, "revision": job.subject.revision, "tasks": found})
    print(table(results))
    if problems := [line for tasks_of in results.values() for result in tasks_of.values() for line in result["refused"]]:
        raise UserError("refused, and without a score:\n" + "\n".join(f"  {line}" for line in problems))


if __name__ == "__main__":
    run_stage(main)
