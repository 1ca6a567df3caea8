"""Log-probabilities of tokens in many texts, each shared beginning computed once.

A `Request` is a text and which of its tokens to score. All requests of a task form a prefix tree: sorted, each text shares its longest
beginning with its neighbour. Pieces of the tree are packed into rows, in which a token sees its ancestors and nothing else, so that
nothing is padded and nothing is computed twice within a row. The vocabulary is only visited where a token is scored, and never as a
whole softmax (babylm.losses).

Entity tracking asks 16,000 questions about a few hundred worlds: this way its texts are an eighteenth of their tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from babylm import models
from babylm.losses import Head, LogitObjective, fused_linear_distillation
from babylm.schema import UserError

# Architectures that take a mask per token, [B, 1, T, T], with position_ids; `Scorer` checks that they do what it hopes for.
TREES = {"gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "moep"}
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Request:
    """A text and what is asked about it.

    Args:
        ids: tokens that the model reads.
        targets: (position, token) pairs: how likely is the token where the model has read ids[:position + 1]; for masked models,
            at the position itself.
        about: what an error message calls it.
    """

    ids: tuple[int, ...]
    targets: tuple[tuple[int, int], ...]
    about: str = ""


@dataclass
class Row:
    """A piece of the prefix tree. `ids`, `depths` [n]; `spans` (begin, end, ancestors) of the runs of tokens it is made of;
    `queries`: (node, token) -> [(request, place in its targets)]: what two texts ask alike is computed once."""

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, list[int]]] = field(default_factory=list)
    queries: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)

    def seen(self) -> torch.Tensor:
        """[n, n], True where a token sees another: its ancestors and itself."""
        mask = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for begin, end, ancestors in self.spans:
            mask[begin:end, ancestors] = True
            mask[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        return mask


def pack(requests: Sequence[Request], row_tokens: int | None = None) -> list[Row]:
    """The prefix tree of all requests, cut into rows of up to `row_tokens` (or one longer text). Tokens after the last target
    are left out. By default rows hold a few of the longest texts: every cut computes a beginning again, and attention
    costs the square of a row."""
    texts = [request.ids[: max((position for position, _ in request.targets), default=-1) + 1] for request in requests]
    row_tokens = row_tokens or min(1024, max(256, 3 * max(map(len, texts), default=0)))
    rows: list[Row] = []
    path: list[int] = []  # nodes of the text before, in the last row
    before: tuple[int, ...] = ()
    for number in sorted((number for number, text in enumerate(texts) if text), key=texts.__getitem__):
        text = texts[number]
        shared = _shared(text, before)
        if not rows or len(rows[-1].ids) + len(text) - shared > max(row_tokens, len(text)):
            rows.append(Row())
            path, shared = [], 0
        row, begin = rows[-1], len(rows[-1].ids)
        path = path[:shared]
        if len(text) > shared:
            row.spans.append((begin, begin + len(text) - shared, path))
            row.ids.extend(text[shared:])
            row.depths.extend(range(shared, len(text)))
            path = [*path, *range(begin, len(row.ids))]
        for place, (position, token) in enumerate(requests[number].targets):
            row.queries.setdefault((path[position], token), []).append((number, place))
        before = text
    return rows


def _shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return place
    return min(len(one), len(other))


class Scorer:
    """A causal or masked language model that answers requests.

    Args:
        model: in eval mode, on its device.
        masked: whether tokens see what follows them (then no beginning is shared).
        trees: pack texts into rows; default: where the architecture can. It is tried on the first requests and given up, with a
            line, where it does not give what plain batches give.
        batch_tokens: tokens per forward pass.
        bf16: compute products in bfloat16.
    """

    def __init__(self, model: PreTrainedModel, *, masked: bool = False, trees: bool | None = None, batch_tokens: int = BATCH_TOKENS,
                 row_tokens: int | None = None, bf16: bool = False):
        self.model, self.masked, self.batch_tokens, self.row_tokens, self.bf16 = model, masked, batch_tokens, row_tokens, bf16
        self.body, linear = (None, None) if masked else models.body_and_head(model)
        self.head = Head(linear.weight, linear.bias) if linear is not None else Head(None)
        windowed = getattr(model.config, "sliding_window", None) is not None and getattr(model.config, "use_sliding_window", True)
        can = model.config.model_type in TREES and not windowed and not masked
        self.trees = can if trees is None else trees
        self.tried = trees is not None or not can
        self.limit = getattr(model.config, "max_position_embeddings", None)

    def logprobs(self, requests: Sequence[Request], done: Callable[[int, int], None] = lambda tokens, total: None,
                 ) -> Iterator[tuple[int, np.ndarray]]:
        """(number of a request, its targets' log-probabilities in nats, [targets] float64), as they are finished.

        Raises:
            UserError: a text longer than the model's positions; a log-probability that is not finite.
        """
        yield from ((number, np.zeros(0)) for number, request in enumerate(requests) if not request.targets)
        if not any(request.targets for request in requests):
            return
        for request in requests:
            if self.limit is not None and len(request.ids) > self.limit:
                raise UserError(f"{request.about or 'a text'} has {len(request.ids)} tokens, but the model has {self.limit} positions: the "
                                "official evaluation needs 512")
        if not self.tried:
            self.tried, self.trees = True, self._trees_work(requests)
        rows = pack(requests, self.row_tokens) if self.trees else _separate(requests)
        missing = [len(request.targets) for request in requests]
        values = [np.zeros(count) for count in missing]
        total, tokens = sum(len(row.ids) for row in rows), 0
        for batch in self._batches(rows):
            owners = [(owner, value) for mine, value in zip((mine for row in batch for mine in row.queries.values()), self._run(batch),
                                                            strict=True) for owner in mine]
            for (number, place), value in owners:
                values[number][place] = value
                missing[number] -= 1
                if not missing[number]:
                    if not np.isfinite(values[number]).all():
                        raise UserError(f"the model gives {values[number].min()} as a log-probability in "
                                        f"{requests[number].about or 'a text'}: a model that answers NaN or infinity cannot be scored")
                    yield number, values[number]
            tokens += sum(len(row.ids) for row in batch)
            done(tokens, total)

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows of like length together, up to batch_tokens with padding."""
        batch: list[Row] = []
        for row in sorted(rows, key=lambda row: len(row.ids)):
            if batch and len(row.ids) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @torch.no_grad()
    def _run(self, batch: list[Row]) -> np.ndarray:
        """Log-probabilities of all queries of a batch of rows, in their order, float64."""
        device, width = self.model.device, max(len(row.ids) for row in batch)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in batch])
        if self.trees:
            seen = torch.eye(width, dtype=torch.bool).repeat(len(batch), 1, 1)
            for mask, row in zip(seen, batch, strict=True):
                mask[: len(row.ids), : len(row.ids)] = row.seen()
            depths = torch.tensor([row.depths + [0] * (width - len(row.ids)) for row in batch])
            keys = {"attention_mask": seen[:, None].to(device), "position_ids": depths.to(device)}
        else:
            keys = {"attention_mask": torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch], device=device)}
        queries = [(number, *query) for number, row in enumerate(batch) for query in row.queries]
        where, node, target = torch.tensor(queries, device=device).T
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            if self.body is not None and self.head.weight is not None:
                states = self.body(input_ids=ids.to(device), use_cache=False, **keys).last_hidden_state
            else:
                states = self.model(input_ids=ids.to(device), **keys).logits.float()
            terms = fused_linear_distillation(states[where, node], self.head, target, LogitObjective())
        return -terms.ce.double().cpu().numpy()

    def _trees_work(self, requests: Sequence[Request]) -> bool:
        """Whether rows of several texts give what each alone gives, on a few requests that share something."""
        some = sorted((request for request in requests if request.targets), key=lambda request: (len(request.ids), request.ids))[:6]
        answers = []
        for trees in (True, False):
            probe = Scorer(self.model, trees=trees, bf16=False)
            try:
                found = dict(probe.logprobs(some))
            except ValueError as error:  # code that came with an older checkpoint may know no such masks
                if not trees:
                    raise
                print(f"texts are scored one per row: {error}", flush=True)
                return False
            answers.append(np.concatenate([found[number] for number in range(len(some))]))
        worst = float(np.abs(answers[0] - answers[1]).max())
        if worst > 1e-3:
            print(f"texts are scored one per row: packed, their log-probabilities would be off by up to {worst:.1e} nats", flush=True)
        return worst <= 1e-3


def _separate(requests: Sequence[Request]) -> list[Row]:
    """A row for each text; one for equal ones."""
    found: dict[tuple[int, ...], Row] = {}
    for number, request in enumerate(requests):
        if not request.targets:
            continue
        row = found.setdefault(request.ids, Row(list(request.ids)))
        for place, (position, token) in enumerate(request.targets):
            row.queries.setdefault((position, token), []).append((number, place))
    return list(found.values())
