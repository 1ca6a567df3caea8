"""Log-probabilities of text under any model: validation CE per domain, sentences, minimal pairs; used by training, by the
demo and by evaluation. Everything is in nats.

    python -m babylm.scoring models/demo/teacher models/demo/student --corpus data/demo/corpus --pairs data/demo/corpus/pairs
    python -m babylm.scoring --ngram models/demo/5-gram --corpus data/demo/corpus --pairs data/demo/corpus/pairs

writes `run/scores.json` into each model's folder; the second fits a 5-gram model on the training part and scores it alike.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from babylm import models
from babylm.distillation import Distiller
from babylm.run_folder import read_finished, require_finished, run_stage, write_json
from babylm.schema import UserError
from custom_dataset import EvalBlocks, TextPart, TokenStore, open_store, tokenizer_fingerprint

Terms = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]  # {"input_ids": [B, T], ...} -> {name: [B, T-1] nats}


# ---- Validation text ------------------------------------------------------------------------------------------------


@torch.no_grad()
def validate(distiller: Distiller, blocks: EvalBlocks, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Mean CE, and every other figure of the distiller, over all predicted tokens of the blocks, as `means` returns them.

    Each process takes its share of the batches and the sums are added, so the figures do not depend on the number of processes, which
    must all call it.
    """
    state = PartialState()
    first, stride = state.process_index * batch_size, state.num_processes * batch_size
    mine = [range(start, min(start + batch_size, len(blocks))) for start in range(first, len(blocks), stride)]

    def terms(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return distiller.token_terms(**batch)

    with models.mode(distiller, training=False):
        counts, sums = domain_sums(terms, blocks, mine, device)
        if distiller.sharded:  # processes with a batch less help the others to gather weights
            missing = -(-len(blocks) // stride) - len(mine)
            domain_sums(terms, blocks, [range(1)] * missing, device)
            distiller.reshard()  # what the backward pass does in training
    # A process without blocks has no terms, but must join the sum: the names are the same everywhere.
    names = distiller.columns()
    table = torch.stack([counts] + [sums.get(name, torch.zeros_like(counts)) for name in names])
    if state.num_processes > 1:
        torch.distributed.all_reduce(table)
    counts, *columns = table.cpu()
    return means(counts, dict(zip(names, columns, strict=True)), blocks.store.domains)


@torch.no_grad()
def domain_sums(terms: Terms, blocks: EvalBlocks, chosen: Iterable[Sequence[int]], device: torch.device,
                ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum per-token values over the domains of the predicted tokens.

    Args:
        terms: maps a batch (input_ids [B, T], and cached teacher states if the blocks carry them) to values [B, T-1] per term.
        blocks: validation blocks.
        chosen: batches of indices into `blocks`.

    Returns:
        (number of predicted tokens per domain [D], {term: sum per domain [D]}), float64 on `device`.
    """
    counts = torch.zeros(len(blocks.store.domains), dtype=torch.float64, device=device)
    sums: dict[str, torch.Tensor] = {}
    for batch in chosen:
        items = [blocks[index] for index in batch]
        stacked = {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}
        domain = stacked.pop("domains")[:, 1:].flatten()
        counts += torch.bincount(domain, minlength=len(counts))
        for name, values in terms(stacked).items():
            sums.setdefault(name, torch.zeros_like(counts)).scatter_add_(0, domain, values.double().flatten())
    return counts, sums


def means(counts: torch.Tensor, sums: dict[str, torch.Tensor], domains: list[str]) -> dict[str, Any]:
    """{"ce": ..., "perplexity": exp(ce), "ce_by_domain": {...}} and the mean of every other term, from `domain_sums`.

    A term named `load/grow/0` is what a part of a model did: its means are nested, row["load"]["grow"]["0"], and are given
    per domain too, row["load_by_domain"]["childes"]["grow"]["0"].
    """
    row: dict[str, Any] = {name: float(values.sum() / counts.sum()) for name, values in sums.items() if "/" not in name}
    for name in (name for name in sums if "/" in name):
        kind, *path = name.split("/")
        _nest(row, [kind, *path], float(sums[name].sum() / counts.sum()))
        for i, domain in enumerate(domains):
            if counts[i] > 0:
                _nest(row, [f"{kind}_by_domain", domain, *path], float(sums[name][i] / counts[i]))
    row["perplexity"] = perplexity(row["ce"])
    row["ce_by_domain"] = {name: float(sums["ce"][i] / counts[i]) for i, name in enumerate(domains) if counts[i] > 0}
    return row


def _nest(table: dict, path: list[str], value: float) -> None:
    *outer, last = path
    for name in outer:
        table = table.setdefault(name, {})
    table[last] = value


def perplexity(ce: float) -> float:
    """exp(CE), and nothing else; infinite where that overflows."""
    return math.exp(ce) if ce < 700 else math.inf


# ---- Sentences ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sentence_logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], *,
                      batch_tokens: int = 4096) -> np.ndarray:
    """Log-probability of each whole sentence, [len(sentences)] float64 in nats: the sum over its tokens, not normalised.

    The tokenizer prepends the start token itself (see models.save_tokenizer), so that the first word is scored too.
    Batches hold sentences of like length, padded on the right, up to `batch_tokens` tokens.

    Raises:
        UserError: a sentence is longer than the model's positions, or the model gives a log-probability that is not finite.
    """
    encoded = [tokenizer(sentence).input_ids for sentence in sentences]
    limit = model.config.max_position_embeddings
    for sentence, ids in zip(sentences, encoded, strict=True):
        if len(ids) > limit:
            raise UserError(f"the model has {limit} positions, but this sentence has {len(ids)} tokens: {sentence[:80]!r}")
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    result = np.zeros(len(encoded))
    device, start = model.device, 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(encoded[order[stop]]) <= batch_tokens:
            stop += 1
        batch = order[start:stop]
        width = len(encoded[batch[-1]])
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            ids[row, : len(encoded[index])] = torch.tensor(encoded[index])
            mask[row, : len(encoded[index])] = 1
        with models.mode(model, training=False):
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[:, :-1].float()
        token = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device), reduction="none").view(len(batch), -1)
        result[batch] = -(token.double() * mask[:, 1:].to(device)).sum(1).cpu().numpy()
        start = stop
    if not np.isfinite(result).all():
        first = sentences[int(np.argmin(np.isfinite(result)))]
        raise UserError(f"the model gives log-probabilities that are not finite (first: {first!r})")
    return result


def read_pairs(folder: str | Path) -> list[dict[str, Any]]:
    """All rows of a folder of BLiMP-format JSONL files. UserError names file and line of a row that is not one."""
    rows = []
    for path in sorted(Path(folder).glob("*.jsonl")):
        # Not splitlines: a sentence may hold other characters that Python takes for the end of a line.
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
            try:
                row = json.loads(line)
                rows.append({**row, "UID": row.get("UID", path.stem), "pair": (row["sentence_good"], row["sentence_bad"])})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not a minimal pair in BLiMP's format ({error!r})") from None
    if not rows:
        raise UserError(f"{folder} holds no minimal pairs (*.jsonl)")
    return rows


def pair_accuracy(rows: Sequence[dict[str, Any]], logprobs: Callable[[Sequence[str]], np.ndarray]) -> dict[str, Any]:
    """{UID: {"accuracy", "n", "ties", "long_distance"}}: the share of pairs whose good sentence is strictly likelier.

    A tie is no success: a model that answers the same for everything must not look perfect.
    """
    scores = logprobs([sentence for row in rows for sentence in row["pair"]]).reshape(-1, 2)
    table: dict[str, Any] = {}
    for row, (good, bad) in zip(rows, scores, strict=True):
        entry = table.setdefault(row["UID"], {"accuracy": 0, "n": 0, "ties": 0, "long_distance": bool(row.get("long_distance"))})
        entry["n"] += 1
        entry["accuracy"] += int(good > bad)
        entry["ties"] += int(good == bad)
    for entry in table.values():
        entry["accuracy"] /= entry["n"]
    return table


# ---- The n-gram yardstick -------------------------------------------------------------------------------------------


class NgramModel:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1999, section 3.6 and equation 26).

    The highest order counts n-grams; every lower order counts the distinct tokens that an n-gram
    follows (continuation counts). Each order takes a discount D1, D2 or D3+ from counts of 1, 2 and
    3 or more and gives the mass it took to the order below; the last one below is uniform over the
    vocabulary, so no token has probability zero.

    All tables are sorted arrays and all look-ups binary searches: an n-gram is known by its row,
    and its key is (row of its first n-1 tokens) x vocab_size + last token.
    """

    def __init__(self, order: int, vocab_size: int):
        if order < 1 or vocab_size < 1:
            raise ValueError(f"order and vocab_size must be at least 1, not {order}, {vocab_size}")
        self.order = order
        self.vocab_size = vocab_size
        self.levels: list[dict[str, np.ndarray]] = []

    def fit(self, ids: np.ndarray) -> "NgramModel":
        """Count a flat stream of token ids, shape (tokens,); returns the model itself."""
        ids = self._checked(ids)
        if not len(ids):
            raise ValueError("cannot fit an n-gram model on an empty stream")
        orders = range(1, min(self.order, len(ids)) + 1)
        keys, rows, firsts = [], [np.zeros(len(ids), dtype=np.int64)], []
        for n in orders:
            # rows[n][i] is the n-gram that starts at token i.
            last = ids[n - 1 :]
            table, first, row = np.unique(
                rows[-1][: len(last)] * self.vocab_size + last, return_index=True, return_inverse=True
            )
            keys.append(table)
            firsts.append(first)
            rows.append(row.reshape(-1))
        self.levels = []
        for n in orders:
            if n == orders[-1]:
                counts = np.bincount(rows[n], minlength=len(keys[n - 1]))
            else:
                # One for each distinct (n+1)-gram that ends in this n-gram. The n-gram that opens
                # the stream follows nothing and may count 0; its context then backs off further.
                counts = np.bincount(rows[n][firsts[n] + 1], minlength=len(keys[n - 1]))
            self.levels.append(self._level(keys[n - 1], counts))
        return self

    def _level(self, keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Discount one order: what each n-gram keeps, and what each context gives away."""
        contexts = keys // self.vocab_size
        discounts = self._discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(contexts, weights=counts)
        given = np.bincount(contexts, weights=discounts)
        share = 1.0 / np.maximum(total, 1.0)
        return {
            "keys": keys,
            "kept": (counts - discounts) * share[contexts],
            "given": np.where(total > 0, given * share, 1.0),
        }

    @staticmethod
    def _discounts(counts: np.ndarray) -> np.ndarray:
        """(0, D1, D2, D3+) from the counts of counts; absolute discounts where those are empty."""
        n1, n2, n3, n4 = (float((counts == c).sum()) for c in (1, 2, 3, 4))
        if min(n1, n2, n3) == 0:
            return np.array([0.0, 0.75, 0.75, 0.75])
        y = n1 / (n1 + 2 * n2)
        d = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        # Small or artificial texts give estimates outside what the formula assumes.
        return np.clip(d, [0.0, 0.05, 0.05, 0.05], [0.0, 0.95, 1.95, 2.95])

    def logprobs(self, ids: np.ndarray) -> np.ndarray:
        """Log-probability in nats of each token given its up to order-1 predecessors.

        `ids` has shape (tokens,), and so has the result; the first token has its unigram value.
        """
        ids = self._checked(ids)
        if not self.levels:
            raise RuntimeError("fit the model before asking it for log-probabilities")
        probs = np.full(len(ids), 1.0 / self.vocab_size)
        context = np.zeros(len(ids), dtype=np.int64)  # row of the (n-1)-gram before each token, or -1
        for level in self.levels:
            known = (context >= 0) & (context < len(level["given"]))
            row, found = self._find(level["keys"], context * self.vocab_size + ids, known)
            given = level["given"][np.where(known, context, 0)]
            kept = np.where(found, level["kept"][row], 0.0)
            probs = np.where(known, kept + given * probs, probs)
            # The n-gram that ends at token i-1 is the context of token i at the next order.
            context = np.full(len(ids), -1, dtype=np.int64)
            context[1:] = np.where(found, row, -1)[:-1]
        return np.log(probs)

    @staticmethod
    def _find(table: np.ndarray, keys: np.ndarray, wanted: np.ndarray):
        """Rows of `keys` in a sorted table, and which of them are there."""
        row = np.minimum(np.searchsorted(table, keys), len(table) - 1)
        return row, wanted & (table[row] == keys)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64).reshape(-1)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token ids must lie in [0, {self.vocab_size})")
        return ids


def ngram_sentence_logprobs(model: NgramModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str]) -> np.ndarray:
    """What `sentence_logprobs` is for neural models: nats per whole sentence, the start token given."""
    encoded = [np.array(tokenizer(sentence).input_ids) for sentence in sentences]
    return np.array([model.logprobs(ids)[1:].sum() for ids in encoded])


# ---- Scores of a run ------------------------------------------------------------------------------------------------


def about(text: TextPart, store: TokenStore, tokenizer: PreTrainedTokenizerFast, seq_len: int) -> dict[str, Any]:
    """What a CE was measured on: two are comparable where all of it is equal."""
    return {"text": text.sha256, "bytes": text.path.stat().st_size, "tokens": len(store), "tokenizer": tokenizer_fingerprint(tokenizer),
            "seq_len": seq_len}


def bits_per_byte(ce: float, validation: dict[str, Any]) -> float:
    """Bits for a byte of the text, which do not depend on the tokenizer: mean CE (nats per token) x tokens / bytes / ln 2.

    Args:
        validation: from `about`.
    """
    return ce * validation["tokens"] / validation["bytes"] / math.log(2)


def score(ce: dict[str, Any], pairs: dict[str, Any] | None, validation: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """The content of scores.json."""
    by_domain = {name: {"ce": value, "perplexity": perplexity(value)} for name, value in ce["ce_by_domain"].items()}
    result = {**facts, "ce": ce["ce"], "perplexity": ce["perplexity"], "bits_per_byte": bits_per_byte(ce["ce"], validation),
              "validation": validation, "by_domain": by_domain}
    if pairs:
        result |= {"pairs": pairs, "pairs_mean": float(np.mean([entry["accuracy"] for entry in pairs.values()]))}
    return result


def score_model(folder: Path, store: TokenStore, data_tokenizer: PreTrainedTokenizerFast, validation: dict[str, Any],
                rows: list[dict] | None) -> dict[str, Any]:
    """Score a finished run on every block of the validation store, and on minimal pairs if given."""
    require_finished(str(folder), "scoring")
    tokenizer, model = models.load_tokenizer(folder), models.load_causal_lm(str(folder)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    models.require_same_vocabulary(str(folder), data_tokenizer, "model")
    blocks = EvalBlocks(store, validation["seq_len"], len(store))
    ce = validate(Distiller(model), blocks, 16, model.device)
    pairs = pair_accuracy(rows, lambda sentences: sentence_logprobs(model, tokenizer, sentences)) if rows else None
    finished = read_finished(folder) or {}
    return score(ce, pairs, validation, name=folder.name, kind="neural", parameters=models.count_parameters(model),
                 words_seen=finished.get("words_seen"), seconds=finished.get("seconds"))


def score_ngram(folder: Path, corpus: str, store: TokenStore, validation: dict[str, Any], rows: list[dict] | None,
                order: int = 5) -> dict[str, Any]:
    """Fit an n-gram model on the training part of a corpus and score it as a neural model is scored."""
    began = time.monotonic()
    tokenizer = models.load_tokenizer(Path(corpus) / "tokenizer")
    train = open_store(corpus, "train", tokenizer)
    ngram = NgramModel(order, len(tokenizer)).fit(np.asarray(train.ids))
    seconds = time.monotonic() - began

    def terms(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ce": torch.stack([torch.from_numpy(-ngram.logprobs(row.numpy())[1:]) for row in batch["input_ids"]])}

    blocks = EvalBlocks(store, validation["seq_len"], len(store))
    counts, sums = domain_sums(terms, blocks, [range(len(blocks))], torch.device("cpu"))
    pairs = pair_accuracy(rows, lambda sentences: ngram_sentence_logprobs(ngram, tokenizer, sentences)) if rows else None
    return score(means(counts, sums, store.domains), pairs, validation, name=folder.name, kind=f"{order}-gram", parameters=None,
                 words_seen=train.meta["words"], seconds=round(seconds, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="models/NAME", help="finished run folders")
    parser.add_argument("--corpus", required=True, help="folder of stage 1: training part for the n-gram, validation to score")
    parser.add_argument("--eval", dest="eval_path", help="score the validation part of this corpus folder instead")
    parser.add_argument("--pairs", help="folder of minimal pairs, *.jsonl in BLiMP's format")
    parser.add_argument("--ngram", type=Path, metavar="models/NAME", help="also fit a 5-gram model, and write its scores here")
    parser.add_argument("--seq_len", type=int, default=128, help="tokens per validation block (default: 128)")
    args = parser.parse_args()

    tokenizer = models.load_tokenizer(Path(args.corpus) / "tokenizer")
    store = open_store(args.eval_path or args.corpus, "val", tokenizer)
    validation = about(TextPart(args.eval_path or args.corpus, "val"), store, tokenizer, args.seq_len)
    rows = read_pairs(args.pairs) if args.pairs else None
    if args.ngram:
        write_json(args.ngram / "run" / "scores.json", score_ngram(args.ngram, args.corpus, store, validation, rows))
    for run in args.runs:
        write_json(run / "run" / "scores.json", score_model(run, store, tokenizer, validation, rows))


if __name__ == "__main__":
    run_stage(main)
