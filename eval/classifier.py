"""A language model that classifies texts: its body, the head on a pooled state, and one fine-tuning of them.

A causal model is read at its last token, with padding on the left and positions counted from the first real token. At its first
token it has seen the start token alone and answers the same for every input.
"""

import inspect
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel

from babylm import models
from babylm.schema import Section, UserError, key
from eval.glue import Task, Tokens


class Refused(UserError):
    """A fine-tuning whose result must not be reported; the other tasks go on."""


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


def share_without_adapter(encoder: PreTrainedModel) -> float:
    """Share, from 0 to 1, of the weights in matrices outside the embeddings that LoRA does not reach.

    Those of MoE-P's experts are stacked into tensors, in no linear layer. peft's `target_parameters` does not help: it acts in a
    module's forward, and these are read without one.
    """
    held = [(isinstance(module, nn.Linear | transformers.pytorch_utils.Conv1D),
             sum(weight.numel() for weight in module.parameters(recurse=False) if weight.dim() > 1))
            for module in encoder.modules() if not isinstance(module, nn.Embedding)]
    return 1 - sum(weights for linear, weights in held if linear) / sum(weights for _, weights in held)


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
