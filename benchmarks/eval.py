"""The zero-shot evaluation against a plain implementation of the official procedure, on the same model and the same items.

    python -m benchmarks.eval --data evaluation_data --tokenizer models/GPT2-Small-BabyLM-CE [--whole] [--json FILE] [--quick]

Ways:

    plain  every candidate of every item computed whole, 64 items at a time, padded on the right to the longest; softmax over the
           whole vocabulary at all positions; sum over the candidate's tokens. Reading times: one context at a time
    ours   eval.scorer: one prefix tree of all texts, the vocabulary only where a token is scored

Both start from the items and end with one log-probability per candidate; tokenizing is part of both. A round is a block of
consecutive items that both ways score, in an order that alternates; their answers are compared before anything is timed, and
again in every round, to 1e-3 nats. The ratio is that of times in the same round.

The model is a GPT-2 of 12 layers x 768 with random weights (seed 0): the time does not depend on what it has learnt. EWoK's rows
are gated and not part of this project: the ones here are made up in its form (contexts of two sentences, two targets; each pair
of contexts once with either target as the right one), and how much they share is an assumption.

What entity tracking gains depends on how many items there are to share worlds: it is measured on blocks of several sizes, and
for the whole set with times in proportion: plain's from a random sample of items, ours from the first part of the prefix tree,
or from all of it with `--whole`.

Expect about ten minutes of CPU time, `--whole` about five more. Where other work shares the cores, `--threads 1` counts the CPU time
of this process and is the one to trust: two threads that wait for each other lose more than the machine's share.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from babylm import models
from babylm.run_folder import run_stage
from babylm.schema import UserError
from benchmarks import measure
from eval import reading
from eval.scorer import Request, Scorer
from eval.tasks import Item, find_sets, load_tasks, read_items
from eval.zero_shot import requests_of

TOLERANCE = 1e-3  # nats, of a candidate's summed log-probability
PLAIN_BATCH = 64  # items, officially
AIMS = {"blimp": 1.3, "ewok": 1.5, "entity_tracking": 10.0, "reading": 4.0}  # plain's time over ours, two cores
# Items in a block -> rounds. 200 items are one UID of BLiMP, 50 one of its supplement; 64 of entity tracking are one batch.
SIZES = {"blimp": {200: 3}, "supplement": {50: 3}, "ewok": {96: 3}, "entity_tracking": {4: 3, 64: 1}, "reading": {34: 3}}
QUICK_SIZES = {name: {4: 1, 2: 2} for name in SIZES}

Way = Callable[[Sequence], np.ndarray]  # items of a task -> log-probability of each candidate, in their order


# ---- The two ways -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def plain_items(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> np.ndarray:
    """The official procedure; all items have equally many candidates. [items * candidates] nats, an item's beside each other."""
    found = []
    for start in range(0, len(items), PLAIN_BATCH):
        batch = items[start: start + PLAIN_BATCH]
        columns = []
        for candidate in range(len(batch[0].texts)):
            pairs = [(item.prefixes[candidate], item.texts[candidate]) for item in batch]
            encoded = [tokenizer(prefix + text, return_offsets_mapping=True) for prefix, text in pairs]
            width = max(len(one.input_ids) for one in encoded)
            ids, seen, scored = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(3))
            for row, ((prefix, _), one) in enumerate(zip(pairs, encoded, strict=True)):
                length = len(one.input_ids)
                ids[row, :length], seen[row, :length] = torch.tensor(one.input_ids), 1
                scored[row, :length] = torch.tensor([int(end > len(prefix)) for _, end in one.offset_mapping])
            logprobs = model(input_ids=ids, attention_mask=seen).logits[:, :-1].log_softmax(-1)  # [B, T-1, V]
            chosen = logprobs.gather(2, ids[:, 1:, None])[..., 0] * scored[:, 1:]
            columns.append(chosen.double().sum(1).numpy())
        found.append(np.stack(columns, axis=1).reshape(-1))
    return np.concatenate(found)


def our_items(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> np.ndarray:
    """As eval.zero_shot does it. [items * candidates] nats."""
    return summed(model, item_requests(tokenizer, items))


def item_requests(tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> list[Request]:
    """One per candidate, in the items' order."""
    return [request for item in items for (request,) in requests_of(item, tokenizer, "causal")]


def summed(model: PreTrainedModel, requests: Sequence[Request]) -> np.ndarray:
    """[requests] nats."""
    found = np.full(len(requests), np.nan)
    for number, values in Scorer(model).logprobs(requests):
        found[number] = values.sum()
    return found


@torch.no_grad()
def plain_reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, str]]) -> np.ndarray:
    """Log-probability of each piece of each word and of the word before, one context at a time. [pieces] nats.

    The vocabulary is visited at all positions, as a model's forward pass does; the softmax is taken at the last only.
    """
    found = []
    for _, _, request in reading.requests(rows, tokenizer):
        (_, target), = request.targets
        found.append(float(model(input_ids=torch.tensor([request.ids])).logits[0, -1].log_softmax(-1)[target]))
    return np.array(found)


def our_reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[dict[str, str]]) -> np.ndarray:
    """The same from one prefix tree. [pieces] nats."""
    return summed(model, [request for _, _, request in reading.requests(rows, tokenizer)])


def require_equal(task: str, plain: np.ndarray, ours: np.ndarray) -> float:
    """The largest difference in nats; SystemExit where it is above the tolerance, or not finite."""
    errors = np.abs(plain - ours)
    if not errors.max() <= TOLERANCE:
        raise SystemExit(f"not equal: {task}, candidate {errors.argmax()} of {len(errors)} differs by {errors.max():.1e} nats")
    return float(errors.max())


# ---- Items ------------------------------------------------------------------------------------------------------------


def made_up_ewok(count: int) -> list[dict[str, str]]:
    """Rows in EWoK's form: a pair of contexts and a pair of targets, and the same with both exchanged."""
    names = [("Ali", "Sam"), ("Mary", "Tom"), ("Lena", "Ben"), ("Ida", "Max"), ("Nora", "Paul"), ("Eva", "Tim")]
    things = ["ball", "book", "cup", "lamp", "chair", "kite", "drum", "coat"]
    scenes = [
        ("spatial relations", "{x} puts the {t} {0} of {y}. Then {y} looks at it for a while.", ("in front", "at the back"),
         "The {t} is {0} {y} now.", ("before", "behind")),
        ("social properties", "{x} gives the {t} to {y} and {0}. Everybody in the room can see it.", ("smiles", "shouts"),
         "{y} thinks that {x} is very {0} today.", ("kind", "rude")),
        ("agent properties", "{x} wants the {t} of {y} and {0} it. {y} comes home in the evening.", ("takes", "leaves"),
         "{y} {0} the {t} in the house.", ("misses", "finds")),
    ]
    rows = []
    for (domain, context, contexts, target, targets), (x, y), thing in itertools.product(scenes, names, things):
        one, other = (context.format(word, x=x, y=y, t=thing) for word in contexts)
        right, wrong = (target.format(word, x=x, y=y, t=thing) for word in targets)
        for c1, c2, t1, t2 in ((one, other, right, wrong), (other, one, wrong, right)):
            rows.append({"Domain": domain, "ContextType": "direct", "Context1": c1, "Context2": c2, "Target1": t1, "Target2": t2})
    return rows[:count]


def ewok_items(count: int = 288) -> list[Item]:
    found = []
    for number, row in enumerate(made_up_ewok(count)):
        found.append(Item(row["Domain"], str(number), (row["Context1"],) * 2, (f" {row['Target1']}", f" {row['Target2']}"), 0, None))
    return found


def load(task: str, data: Path) -> list:
    """All items of a task (of reading: its rows), from the first of its sets in `data`; empty, with a line, where there is none."""
    if task == "ewok":
        return ewok_items()
    description = load_tasks()[task]
    folders = find_sets(description, data)
    if not folders:
        print(f"skipped: {task}, none of {', '.join(description.sets)} is in {data}", flush=True)
        return []
    fast = next((folder for folder in folders if folder.name.endswith("_fast")), folders[0])
    return reading.read_rows(fast / "reading_data.csv") if task == "reading" else read_items(description, fast)


def blocks(items: list, size: int, rounds: int, rng: np.random.Generator) -> list[list]:
    """`rounds` blocks of `size` consecutive items that begin at random multiples of `size`: what share a beginning stay together."""
    size = min(size, len(items))
    starts = rng.permutation(len(items) // size)[:rounds] * size
    return [items[start: start + size] for start in starts]


# ---- Measuring --------------------------------------------------------------------------------------------------------


def measure_task(task: str, items: list, sizes: dict[int, int], ways: dict[str, Way], rng: np.random.Generator) -> list[dict]:
    """A row per block size: medians over the rounds, and the worst difference."""
    few = items[: min(sizes)][:8]
    checked = require_equal(task, ways["plain"](few), ways["ours"](few))  # also warms up
    print(f"{task}: log-probabilities of {len(few)} items differ by at most {checked:.1e} nats", flush=True)
    rows = []
    for size, rounds in sizes.items():
        chosen, times, errors = blocks(items, size, rounds, rng), {"plain": [], "ours": []}, [checked]
        for number, block in enumerate(chosen):
            answers = {}
            for name in ("plain", "ours") if number % 2 == 0 else ("ours", "plain"):
                def call(name=name, block=block, answers=answers):
                    answers[name] = ways[name](block)

                times[name].append(measure.seconds(call, "cpu"))
            errors.append(require_equal(task, answers["plain"], answers["ours"]))
        versus = measure.against(times["plain"], times["ours"])
        rows.append({"task": task, "items": len(chosen[0]), "of": len(items), "rounds": len(chosen), "plain_s": versus["seconds"],
                     "ours_s": statistics.median(times["ours"]), "ratio": versus["ratio"],
                     "range": [versus["ratio_min"], versus["ratio_max"]], "error": max(errors)})
        print(f"{task}: {rows[-1]['items']} items, {versus['ratio']:.2f} x", flush=True)
    return rows


def measure_whole(items: list[Item], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, plain: Way, sample: int, share: float,
                  rng: np.random.Generator) -> dict:
    """Times of a whole set: plain's in proportion to the tokens of a random sample, ours to the share of the tree that was run.

    The tree's rows come shortest first, but all but the last few are alike in length; a share of 1 is all of it.
    """
    requests = item_requests(tokenizer, items)
    per_item = len(requests) // len(items)
    numbers = sorted(rng.permutation(len(items))[:sample].tolist())
    expected = {}

    def run_plain():
        found = plain([items[number] for number in numbers]).reshape(-1, per_item)
        expected.update({number * per_item + k: value for number, row in zip(numbers, found, strict=True) for k, value in enumerate(row)})

    plain_s = measure.seconds(run_plain, "cpu")
    tokens = [len(request.ids) for request in requests]
    plain_s *= sum(tokens) / sum(tokens[number] for number in expected)
    progress, found = {"tokens": 0, "total": 1}, {}

    def run_ours():
        asked = item_requests(tokenizer, items)
        for number, values in Scorer(model).logprobs(asked, lambda done, total: progress.update(tokens=done, total=total)):
            found[number] = values.sum()
            if progress["tokens"] >= share * progress["total"] and share < 1:
                break

    ours_s = measure.seconds(run_ours, "cpu") * progress["total"] / progress["tokens"]
    both = sorted(set(found) & set(expected))
    if both:
        require_equal("entity tracking, whole", *(np.array([answers[number] for number in both]) for answers in (expected, found)))
    return {"items": len(items), "sample": sample, "plain_s": plain_s, "ours_s": ours_s, "ratio": plain_s / ours_s, "tokens": sum(tokens),
            "tree_tokens": progress["total"], "share": progress["tokens"] / progress["total"], "compared": len(both)}


START_UP = """
import json, sys, time
began = time.perf_counter()
import eval.zero_shot
from pathlib import Path
imported = time.perf_counter()
eval.zero_shot.models.load_tokenizer(sys.argv[1])
eval.zero_shot.load_model(Path(sys.argv[1]), "causal", False)
print(json.dumps({"imports_s": imported - began, "load_s": time.perf_counter() - imported}))
"""


def start_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Seconds that a new process takes to import the evaluation and to load this model and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        models.save_model(model, tokenizer, Path(folder))
        done = subprocess.run([sys.executable, "-c", START_UP, folder], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a process that only starts up ended with code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the evaluation sets: blimp_fast/ and so on")
    parser.add_argument("--tokenizer", required=True, help="folder of the tokenizer; its size is the model's vocabulary")
    parser.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the blocks")
    parser.add_argument("--whole", action="store_true", help="entity tracking: time ours on the whole set instead of a tenth of its tree")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round of a few items: does it run?")
    args = parser.parse_args()
    if not args.data.is_dir():
        raise UserError(f"no evaluation data at {args.data}: give --data, a folder that holds blimp_fast/, entity_tracking_fast/, reading/")
    layers, width, heads, sizes = (2, 32, 2, QUICK_SIZES) if args.quick else (12, 768, 12, SIZES)
    torch.set_num_threads(1 if args.quick else args.threads)
    torch.manual_seed(0)
    environment = measure.environment("cpu")
    measure.show_environment(environment)
    tokenizer = models.load_tokenizer(args.tokenizer)
    # Wider than GPT-2's initial 0.02, so that what a token sees makes a difference to its logits
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_layer=layers, n_embd=width, n_head=heads,
                                       initializer_range=0.05, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                       pad_token_id=tokenizer.pad_token_id)).eval()
    print(f"GPT-2, {layers} x {width}, vocabulary {len(tokenizer):,}: {models.count_parameters(model):,} parameters, random weights, fp32")

    result = {"environment": environment, "parameters": models.count_parameters(model), "rows": []}
    for task in args.tasks:
        items = load(task, args.data)
        if not items:
            continue
        functions = (plain_reading, our_reading) if task == "reading" else (plain_items, our_items)
        ways = {name: (lambda block, function=function: function(model, tokenizer, block))
                for name, function in zip(("plain", "ours"), functions, strict=True)}
        result["rows"] += measure_task(task, items, sizes[task], ways, np.random.default_rng(args.seed))
        if task == "entity_tracking":
            result["whole"] = measure_whole(items, model, tokenizer, ways["plain"], 2 if args.quick else 32, 1.0 if args.whole else 0.1,
                                            np.random.default_rng(args.seed))
    result["start_up"] = start_up(model, tokenizer)
    show(result)
    measure.write(args.json, result)


def show(result: dict) -> None:
    measure.show("Plain against ours", ["task", "items", "of", "plain (s)", "ours (s)", "ratio", "range", "largest difference (nats)"],
                 [[row["task"], f"{row['items']:,}", f"{row['of']:,}", f"{row['plain_s']:,.2f}", f"{row['ours_s']:,.2f}",
                   f"{row['ratio']:.2f}", f"{row['range'][0]:.2f}-{row['range'][1]:.2f}", f"{row['error']:.0e}"] for row in result["rows"]])
    final = {row["task"]: row["ratio"] for row in result["rows"]}
    if whole := result.get("whole"):
        final["entity_tracking"] = whole["ratio"]
        print(f"\nentity tracking, the whole set of {whole['items']:,} items: {whole['ratio']:.1f} x\n"
              f"  plain {whole['plain_s']:,.0f} s, in proportion to {whole['sample']} random items\n"
              f"  ours  {whole['ours_s']:,.0f} s, in proportion to {whole['share']:.0%} of the tree\n"
              f"  {whole['tokens']:,} tokens of texts, {whole['tree_tokens']:,} in the tree, "
              f"{whole['tokens'] / whole['tree_tokens']:.1f} x fewer\n"
              f"  {whole['compared']} candidates that both answered are equal\n")
    for task, aim in AIMS.items():
        if task in final:
            print(f"aim: {task} {aim} x; measured {final[task]:.2f}: {'reached' if final[task] >= aim else 'missed'}")
    found = result["start_up"]
    print(f"start-up of a process: imports {found['imports_s']:.1f} s, model and tokenizer {found['load_s']:.1f} s")


if __name__ == "__main__":
    run_stage(main)
