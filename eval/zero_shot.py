"""Zero-shot scores of a model, or of all milestones of a run, on the official evaluation sets.

    python -m eval.zero_shot models/GPT2-Small-BabyLM-CE --data evaluation_data
    python -m eval.zero_shot models/A models/B --milestones --tasks blimp supplement --output results
    python -m eval.zero_shot models/A --data evaluation_data --suite 2026
    python -m eval.zero_shot --check_data --data evaluation_data

reads   model folders (any that transformers loads) and the evaluation data; sets that are not there are skipped with a line.
writes  results/<model>/<revision>/zero_shot/<backend>/<task>/<set>/: predictions.json and a report in the official formats,
        items.jsonl with every candidate's log-probability; beside them summary.json, which a table is printed from.

An interrupted evaluation continues where it stopped; what is scored already is not scored again (`--fresh` does).
Time: the fast sets take about 45 s for a model of 2.5M parameters on one CPU core.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from babylm import models
from babylm.run_folder import run_stage, write_json
from babylm.schema import UserError, milestone_words
from eval import reading, reports
from eval.scorer import BATCH_TOKENS, Request, Scorer
from eval.tasks import SUITES, Item, Task, choose_tasks, data_files, find_sets, load_tasks, open_data, read_items, unlike_official

BACKENDS = ("causal", "mlm", "mntp")


# ---- From items to requests -----------------------------------------------------------------------------------------


def completion_tokens(tokenizer: PreTrainedTokenizerFast, prefix: str, text: str) -> tuple[tuple[int, ...], list[int]]:
    """(ids of the whole, positions of the tokens that end inside `text`); special tokens end nowhere."""
    encoded = tokenizer(prefix + text, return_offsets_mapping=True)
    return tuple(encoded.input_ids), [place for place, (_, end) in enumerate(encoded.offset_mapping) if end > len(prefix)]


def requests_of(item: Item, tokenizer: PreTrainedTokenizerFast, backend: str) -> list[list[Request]]:
    """What to ask for each candidate of an item: one request (causal), or one per scored token, which is masked."""
    found = []
    for prefix, text in zip(item.prefixes, item.texts, strict=True):
        ids, scored = completion_tokens(tokenizer, prefix, text)
        if backend == "causal":  # without a start token nothing predicts the first word: officially it is then not scored
            found.append([Request(ids, tuple((place - 1, ids[place]) for place in scored if place), item.id)])
        else:
            shift = 1 if backend == "mntp" else 0  # trained to predict the masked token one position earlier
            found.append([Request((*ids[:place], tokenizer.mask_token_id, *ids[place + 1:]), ((place - shift, ids[place]),), item.id)
                          for place in scored if place >= shift])
        if not any(request.targets for request in found[-1]):
            raise UserError(f"{item.id}: of {text!r} nothing can be scored (no token, or only a first one that nothing predicts): a text "
                            "without a log-probability would win every comparison")
    return found


# ---- Answers, kept as they come -------------------------------------------------------------------------------------


class Kept:
    """Log-probabilities of a set's requests in a file beside the results, so that an interrupted evaluation goes on with the rest.

    The file's first line says what the numbers are of; another model, data or option starts anew.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity, self.found = path, identity, {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines and _parsed(lines[0]) == identity:
            for row in filter(None, map(_parsed, lines[1:])):  # the last line may be half written
                self.found[row[0]] = row[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = path.open("w", encoding="utf-8")
        self.stream.write(json.dumps(identity) + "\n")
        for number, value in self.found.items():
            self.add(number, value)

    def add(self, number: int, value: float) -> None:
        self.found[number] = value
        self.stream.write(json.dumps([number, value]) + "\n")

    def flush(self) -> None:
        self.stream.flush()

    def remove(self) -> None:
        self.stream.close()
        self.path.unlink()


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def answer(scorer: Scorer, requests: Sequence[Request], kept: Kept, title: str) -> np.ndarray:
    """[requests]: the sum of each request's log-probabilities, in nats."""
    open_ = [number for number in range(len(requests)) if number not in kept.found]
    if len(open_) < len(requests):
        print(f"{title}: {len(requests) - len(open_):,} of {len(requests):,} texts were scored before; going on", flush=True)
    with tqdm(total=1, desc=title, unit="tok", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        def done(tokens: int, total: int) -> None:
            bar.total = total
            bar.update(tokens - bar.n)
            kept.flush()

        for place, values in scorer.logprobs([requests[number] for number in open_], done):
            kept.add(open_[place], float(values.sum()))
    return np.array([kept.found[number] for number in range(len(requests))])


# ---- One set ----------------------------------------------------------------------------------------------------------


def score_set(task: Task, data: Path, folder: Path, scorer: Scorer, tokenizer: PreTrainedTokenizerFast, backend: str,
              identity: dict[str, Any]) -> dict[str, Any]:
    """Score one set, write its files into `folder`, and return its summary."""
    kept = Kept(folder / "progress.jsonl", identity)
    if task.score == "reading":
        rows = reading.read_rows(data / "reading_data.csv")
        asked = reading.requests(rows, tokenizer, backend)
        values = answer(scorer, [request for _, _, request in asked], kept, task.title)
        found = reports.write_reading(folder, rows, reading.surprisals(rows, asked, values))
        uids = [task.name] * len(rows)
    else:
        items = read_items(task, data)
        asked = [requests_of(item, tokenizer, backend) for item in items]
        flat = [request for candidates in asked for requests in candidates for request in requests]
        scores = candidate_scores(task, asked, answer(scorer, flat, kept, f"{task.title} ({data.name})"))
        rows = reports.answers(items, scores)
        found = reports.summary(task, items, rows)
        uids = [item.uid for item in items]
        if scorer.bf16:
            found["bf16"] = effect_of_bf16(task, items, asked, scores, scorer)
        reports.write_set(folder, task, items, rows, found)
    if unlike := unlike_official(task, data.name, uids):
        found["unlike_official"] = unlike
    kept.remove()
    return found


def candidate_scores(task: Task, asked: Sequence[list[list[Request]]], values: np.ndarray) -> list[list[float]]:
    """For each item the score of each candidate, in nats (per token where the task says so), from the requests' log-probabilities."""
    place, scores = 0, []
    for candidates in asked:
        mine = []
        for requests in candidates:
            tokens = sum(len(request.targets) for request in requests)
            mine.append(float(values[place: place + len(requests)].sum()) / (max(1, tokens) if task.normalise else 1))
            place += len(requests)
        scores.append(mine)
    return scores


def effect_of_bf16(task: Task, items: Sequence[Item], asked: Sequence[list[list[Request]]], scores: Sequence[list[float]], scorer: Scorer,
                   ) -> dict[str, Any]:
    """What bfloat16 changes, on up to 500 items drawn with a seed: predictions that fp32 makes otherwise, and the largest
    difference of a candidate's score in nats."""
    chosen = sorted(np.random.default_rng(0).choice(len(items), size=min(500, len(items)), replace=False).tolist())
    some = [asked[number] for number in chosen]
    full = Scorer(scorer.model, masked=scorer.masked, trees=scorer.trees, batch_tokens=scorer.batch_tokens)
    flat = [request for candidates in some for requests in candidates for request in requests]
    values = dict(full.logprobs(flat))
    exact = candidate_scores(task, some, np.array([values[number].sum() for number in range(len(flat))]))
    pairs = [(one, scores[number]) for number, one in zip(chosen, exact, strict=True)]
    changed = sum(int(np.argmax(one) != np.argmax(other)) for one, other in pairs)
    largest = max(float(np.abs(np.subtract(one, other)).max()) for one, other in pairs)
    return {"items": len(chosen), "changed": changed, "largest_nats": largest}


# ---- One model ------------------------------------------------------------------------------------------------------


def load_model(path: Path, backend: str, untrained: bool) -> PreTrainedModel:
    """The model of a folder, or one of the same config with fresh weights (seed 0); fp32, eval mode, on a GPU if there is one."""
    kind = AutoModelForCausalLM if backend == "causal" else AutoModelForMaskedLM
    if untrained:
        torch.manual_seed(0)
        model = kind.from_config(AutoConfig.from_pretrained(path, trust_remote_code=True), trust_remote_code=True).float()
    elif backend == "causal":
        model = models.load_causal_lm(str(path))
    else:
        try:
            model = kind.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"cannot load {path} as a masked model: {error}") from error
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def revisions(folder: Path, milestones: bool, revision: str | None) -> dict[str, Path]:
    """{revision: folder} to score: `main`, one milestone, or all milestones and main in the order of their words.

    Raises:
        UserError: not a model folder, a revision that is not there (a name that is ignored would score main under it), or a
            dot in the name (the official pipeline files results under what stands before it).
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder (no config.json): is the run finished? Milestones lie in its chck_* folders")
    reports.results_name(folder)
    if revision and revision != "main":
        if not (folder / revision / "config.json").is_file():
            there = sorted(path.name for path in folder.glob("chck_*"))
            raise UserError(f"{folder} has no revision {revision}" + (f"; it has {', '.join(there)}" if there else ""))
        return {revision: folder / revision}
    found = {}
    if milestones:
        names = [(words, path) for path in folder.glob("chck_*/") if (words := milestone_words(path.name))]
        found = {path.name: path for _, path in sorted(names) if (path / "config.json").is_file()}
    return {**found, "main": folder}


def score_model(path: Path, output: Path, sets: Sequence[tuple[Task, Path]], backend: str, options: dict[str, Any],
                untrained: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Score one checkpoint on some sets. Returns ({set: summary}, problems); a set with bad data costs the others nothing."""
    home, name = output / "zero_shot" / backend, f"{output.parent.name} {output.name}"
    checkpoint = ("untrained " if untrained else "") + models.checkpoint_fingerprint(path, weights=not untrained)
    move_results_aside(home, checkpoint)
    tokenizer = models.load_tokenizer(path)
    scorer, problems, found = None, [], {}
    for task, data in sets:
        identity = {"checkpoint": checkpoint, "data": [content[:16] for content in data_files(data).values()],
                    "task": task.model_dump(exclude={"title", "source", "sizes", "chance"}), "bf16": options["bf16"]}
        folder = home / (task.folder if task.score == "reading" else f"{task.folder}/{data.name}")
        entry = read_summary(home).get(data.name)
        whole = entry is not None and entry["identity"] == identity and (folder / "items.jsonl").is_file()
        if not whole or options["fresh"]:
            if scorer is None:
                _warn_about(tokenizer, backend, path)
                scorer = Scorer(load_model(path, backend, untrained), masked=backend != "causal", batch_tokens=options["batch_tokens"],
                                bf16=options["bf16"])
            if entry is not None and entry["identity"] != identity:
                other = {"data": "of other files", "task": "by other rules", "bf16": "in another precision"}
                print(f"{name}  {data.name}: replaces {entry['score']:.2f}, scored "
                      + ", ".join(text for key, text in other.items() if entry["identity"].get(key) != identity[key]), flush=True)
            began = time.monotonic()
            try:
                scored = score_set(task, data, folder, scorer, tokenizer, backend, identity)
            except UserError as error:
                problems.append(f"{path.name}, {data.name}: {error}")
                print(f"error: {problems[-1]}", file=sys.stderr, flush=True)
                continue
            entry = {**scored, "kind": task.score, "chance": task.chance, "seconds": round(time.monotonic() - began, 1),
                     "identity": identity}
            # Read again: a call beside this one may have added a set.
            write_json(home / "summary.json", {"model": output.parent.name, "revision": output.name, "backend": backend,
                                               "tasks": {**read_summary(home), data.name: entry}})
            ties = f", {100 * entry['ties']:.1f} % ties" if entry["ties"] else ""
            print(f"{name}  {data.name}: {entry['score']:.2f} ± {entry['se']:.2f} ({entry['n']:,} items{ties}, {entry['seconds']} s)",
                  flush=True)
        found[data.name] = entry
        problems += remarks(entry, f"{path.name}, {data.name}")
    return found, problems


def read_summary(home: Path) -> dict[str, dict[str, Any]]:
    """{set: its entry} of <revision>/zero_shot/<backend>/summary.json; empty without one."""
    file = home / "summary.json"
    return json.loads(file.read_text(encoding="utf-8"))["tasks"] if file.is_file() else {}


def move_results_aside(home: Path, checkpoint: str) -> None:
    """Results of another checkpoint of this name are kept apart: one table must not mix two models."""
    if any(entry["identity"].get("checkpoint") != checkpoint for entry in read_summary(home).values()):
        number = 1
        while (aside := home.parents[1] / f"zero_shot-old{number}" / home.name).exists():
            number += 1
        aside.parent.mkdir(parents=True, exist_ok=True)
        home.rename(aside)
        print(f"{home} held results of another checkpoint of this name: moved to {aside}", flush=True)


def remarks(entry: dict[str, Any], where: str) -> list[str]:
    """Print what must be known about a score, whenever it was made; return what makes it worthless."""
    if "bf16" in entry:
        effect = entry["bf16"]
        print(f"  bf16: {effect['changed']} of {effect['items']} predictions are others than in fp32; scores differ by up to "
              f"{effect['largest_nats']:.2f} nats", flush=True)
    if "unlike_official" in entry:
        print(f"  {entry['unlike_official']}: the score is not comparable with published ones", flush=True)
    if entry["ties"] <= 0.5:
        return []
    problem = (f"{where}: {100 * entry['ties']:.0f} % of the answers are ties, which count as right officially: this model answers the "
               "same for everything")
    print(f"error: {problem}", file=sys.stderr, flush=True)
    return [problem]


def _warn_about(tokenizer: PreTrainedTokenizerFast, backend: str, path: Path) -> None:
    if backend == "causal" and tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids:
        print(f"warning: the tokenizer of {path} prepends no start token: the first word of a text is never scored", flush=True)
    if backend != "causal" and tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {path} has no mask token, which the backend {backend} needs; use the backend causal")


# ---- The data -------------------------------------------------------------------------------------------------------


def check_data(tasks: Sequence[Task], data: Path) -> list[str]:
    """Read every item of every set and compare their numbers with the official ones; print a line each; return what is wrong with
    those that are there."""
    problems = []
    for task in tasks:
        folders = find_sets(task, data)
        if not folders:
            print(f"{task.title}: none of {', '.join(task.sets)} in {data}; get it from: {task.source}")
        for folder in folders:
            try:
                uids = (["reading"] * len(reading.read_rows(folder / "reading_data.csv")) if task.score == "reading" else
                        [item.uid for item in read_items(task, folder)])
                unlike = unlike_official(task, folder.name, uids)
                whole = ", as many as the official set has, of each kind" if folder.name in task.sizes and not unlike else ""
                print(f"{task.title}: {folder}, {len(uids):,} items" + (f": {unlike}" if unlike else whole))
                problems += [f"{folder}: {unlike}"] if unlike else []
            except (UserError, FileNotFoundError) as error:
                problems.append(str(error))
                print(f"{task.title}: {error}")
    return problems


def chosen_sets(tasks: Sequence[Task], data: Path) -> list[tuple[Task, Path]]:
    """(task, folder) of every set that is there; a line for each task without any."""
    found = [(task, folder) for task in tasks for folder in find_sets(task, data)]
    for task in tasks:
        if not find_sets(task, data):
            print(f"skipped: {task.title}, none of {', '.join(task.sets)} is in {data} (from: {task.source})", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="models/NAME", help="model folders")
    parser.add_argument("--backend", choices=BACKENDS, default="causal")
    parser.add_argument("--data", type=Path, default=Path("evaluation_data"), help="folder or archive of the sets")
    parser.add_argument("--suite", default="2025", metavar="YEAR",
                        help=f"whose tasks: {' or '.join(SUITES)} (default: 2025), or a file like eval/tasks.yaml")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of the suite (default: all)")
    parser.add_argument("--output", type=Path, help="where results go (default: results, for other suites than 2025 results/<year>)")
    parser.add_argument("--milestones", action="store_true", help="also every chck_* of each model")
    parser.add_argument("--revision", help="one milestone, such as chck_1M, instead of the final model")
    parser.add_argument("--untrained", action=argparse.BooleanOptionalAction, default=True,
                        help="also an untrained model of the same config (default: yes)")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: faster in hardware that has it, scores change a little")
    parser.add_argument("--batch_tokens", type=int, default=BATCH_TOKENS, help=f"tokens per forward pass (default: {BATCH_TOKENS})")
    parser.add_argument("--check_data", action="store_true", help="count and verify the data, score nothing")
    parser.add_argument("--fresh", action="store_true", help="score again what is scored already")
    args = parser.parse_args()
    tasks = load_tasks(args.suite)
    chosen = choose_tasks(args.tasks, tasks)
    output = args.output or Path("results") / ("" if args.suite == "2025" else Path(args.suite).stem)
    if args.check_data:
        if check_data(chosen, open_data(args.data)):
            sys.exit(1)
        return
    if not args.models:
        raise UserError("give at least one model folder")
    jobs = {folder: revisions(folder, args.milestones, args.revision) for folder in args.models}  # names first: no score is made in vain
    for folder, count in Counter(map(reports.results_name, args.models)).items():
        if count > 1:
            raise UserError(f"several models are named {folder}: their results would lie in the same folder; use one --output each")
    for folder in args.models:
        reports.results_home(output, folder)
    sets = chosen_sets(chosen, open_data(args.data))
    if not sets:
        print(f"nothing to score: {args.data} holds none of the sets asked for", flush=True)
        return
    options = {"bf16": args.bf16, "batch_tokens": args.batch_tokens, "fresh": args.fresh}
    columns: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for folder, found in jobs.items():
        name = reports.results_name(folder)
        todo: list[tuple[str, Path, bool]] = [(revision, path, False) for revision, path in found.items()]
        if args.untrained:
            todo.append(("untrained", folder, True))
        for revision, path, untrained in todo:
            try:
                scored, wrong = score_model(path, output / name / revision, sets, args.backend, options, untrained)
            except UserError as error:  # a damaged checkpoint costs the others nothing
                scored, wrong = {}, [str(error)]
                print(f"error: {error}", file=sys.stderr, flush=True)
            problems += wrong
            if revision in ("main", "untrained", args.revision):
                columns[name if revision == "main" else f"{name} {revision}"] = scored
    if any(columns.values()):
        print("\n" + reports.table(columns))
        print(reports.phenomena(columns))
        print(reports.baseline_rows([task.name for task, _ in sets], args.suite))
    if problems:
        print(f"\n{len(problems)} problem(s):\n" + "\n".join(problems), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_stage(main)
