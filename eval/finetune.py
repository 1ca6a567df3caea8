"""GLUE: fine-tune models on the seven BabyLM tasks and report them beside the best constant answer.

    python -m eval.finetune models/GPT2-Small-BabyLM-CE models/GPT2-Small-Distilled --data glue_filtered
    python -m eval.finetune models/GPT2-Small-Distilled --data glue_filtered --tasks rte wsc training.mode=lora seeds=[1,2,3]

Reads   <data>/<task>.train.jsonl and <task>.valid.jsonl; tasks, fields and hyper-parameters from eval/finetune.yaml
Writes  results/<model>/<revision>/finetune/<task>/predictions.json and results.txt   the official files, of the first seed
        .../<task>/seeds/<seed>.json    one fine-tuning: settings, scores per epoch, predictions; what a rerun does not repeat
        .../<task>/summary.json, .../finetune/summary.json    mean and standard deviation over seeds, majority, trained parameters

Scores are over all seeds that lie there, whichever call made them; what lies there with other settings is an error.

The best epoch is chosen on a part of the training rows; the reported rows are predicted once, after that. A causal model is read at
its last token; at its first it has seen the start token alone and answers the same for every input. A constant answer is refused,
whatever its cause, and the command ends with code 1 after the other tasks. A seed gives the same numbers again, bit for bit on a CPU.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from pydantic import field_validator
from transformers import PreTrainedTokenizerFast

from babylm import models
from babylm.run_folder import require_finished, run_stage, write_json, write_text
from babylm.schema import Section, UserError, apply_override, check, identity, key, read_yaml
from custom_dataset import file_sha256
from eval.classifier import (
    Classifier,
    Lora,
    Refused,
    Training,
    best_constant,
    build_classifier,
    is_causal,
    load_encoder,
    predict,
    require_padding_is_harmless,
    scores,
    share_without_adapter,
    train,
)
from eval.glue import Rows, Task, Tokens, read_tasks, split, tokenise
from eval.reports import results_home, results_name

CONFIG = Path(__file__).with_name("finetune.yaml")
REPLACED = ("epochs", "batch_size", "lr")  # keys of the training section that a task may have of its own


# ---- What eval/finetune.yaml holds ----------------------------------------------------------------------------------


class Config(Section):
    seeds: list[int] = key([42, 43, 44], "one fine-tuning each", identity=False, min_length=1)
    training: Training = key(Training(), "how")
    lora: Lora = key(Lora(), "for mode: lora")

    @field_validator("seeds")
    @classmethod
    def each_seed_once(cls, value: list[int]) -> list[int]:
        if twice := [seed for seed, n in Counter(value).items() if n > 1]:
            raise ValueError(f"{twice[0]} stands there more than once: the same fine-tuning would be done again")
        return value


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
    path, name = model, results_name(model)
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
    if tokenizer.num_special_tokens_to_add(pair=True) <= tokenizer.num_special_tokens_to_add(pair=False):
        print(f"warning: {name}: its tokenizer puts nothing between the two texts of an input (tokenizers saved by this project do)")
    if training.mode == "lora" and (share := share_without_adapter(encoder)):
        print(f"warning: {name}: {share:.0%} of its weights outside the embeddings lie in no linear layer: LoRA leaves them as they are, "
              "training.mode=full trains them")
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
                         "model": models.checkpoint_fingerprint(path) if (path := Path(self.subject.path)).is_dir() else str(path),
                         self.train.path.name: file_sha256(self.train.path), self.valid.path.name: file_sha256(self.valid.path)}


def recorded(job: Job) -> dict[int, dict[str, Any]]:
    """{seed: record} of every seed that lies there, asked for or not, in their order. UserError if one had other settings: its
    summary would be overwritten."""
    records, settings = {}, job.settings()
    for path in (job.folder / "seeds").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        theirs = record.pop("settings")
        if changed := [f"  {at}: {theirs.get(at)!r} there, {settings.get(at)!r} now" for at in sorted(settings.keys() | theirs.keys())
                       if theirs.get(at) != settings.get(at)]:
            raise UserError(f"{path} was made with other settings:\n" + "\n".join(changed) + "\nGive another --output, or move "
                            f"{job.folder} away")
        records[record["seed"]] = record
    return dict(sorted(records.items()))


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
    """The seeds that are not `done`, each written as soon as it is. Returns, and writes, the task's summary: of all that lie there."""
    training, subject, side = job.training, job.subject, "left" if job.subject.causal else "right"
    fit, valid = (tokenise(rows, subject.tokenizer, subject.limit, side) for rows in (job.train, job.valid))
    print(f"{subject.name}, {job.name}: {len(job.train):,} training rows, {len(job.valid):,} reported; {training.mode}, pooling "
          f"{subject.pooling}, lr {training.lr:g}, {training.epochs} epochs of batches of {training.batch_size}; cut to {subject.limit} "
          f"tokens, both texts by the same share: {fit.cut} and {valid.cut} rows", flush=True)
    problems = []
    for seed in job.seeds:
        if seed in done:
            print(f"  {job.at(seed)}: done before")
            continue
        try:
            write_json(job.record(seed), {"settings": job.settings(), **fine_tune(job, fit, valid, seed)})
        except Refused as problem:
            problems.append(str(problem))
    records = recorded(job)  # read again: another process may have added seeds of its own
    if others := [str(seed) for seed in records if seed not in job.seeds]:
        print(f"  {subject.name}, {job.name}: the scores are also of seeds {', '.join(others)}, which lie there with the same settings")
    for seed, record in records.items():
        if record["largest_share"] == 100:
            first_of_causal = subject.causal and subject.pooling == "first"
            problems.append(f"{job.at(seed)}: every one of the {len(job.valid)} predictions is {record['predictions'][0]!r}. " + (
                "A causal model's first token sees nothing of the input: training.pooling=last" if first_of_causal else
                f"Try another training.lr, or more epochs (tasks.{job.name}.epochs)"))
    for problem in problems:
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
            "sd": statistics.stdev(values) if len(values) > 1 and not problems else None,
            "n": len(job.valid), "official_n": job.task.size,
            "majority": best_constant(job.valid.labels, job.task.metrics), "refused": problems,
            "seeds": {str(record["seed"]): {name: record[name] for name in shown} for record in records},
            "trained_parameters": records[0]["trained_parameters"] if records else None, "mode": job.training.mode,
            "pooling": job.subject.pooling, "limit": job.subject.limit, "cut_rows": {"train": cut[0], "valid": cut[1]}}


def write_task(job: Job, records: dict[int, dict], result: dict[str, Any]) -> None:
    """The task's summary, and the official files of the first seed asked for; where a seed was refused there are none."""
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
    parser.add_argument("models", nargs="*", metavar="MODEL | key=value", help="model folders or hub names; keys of the YAML to override")
    parser.add_argument("--data", required=True, type=Path, help="folder with <task>.train.jsonl and <task>.valid.jsonl")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--config", type=Path, default=CONFIG, help="tasks and hyper-parameters (default: eval/finetune.yaml)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="only these; models stand before this option")
    parser.add_argument("--revision", default="main", help="a milestone inside each run folder, for example chck_10M")
    args = parser.parse_intermixed_args()
    transformers.utils.logging.set_verbosity_error()  # its report of the unused output layer; missing weights are an error here

    # An option of several words takes all that follow: overrides are told by their sign, wherever they stand.
    config, tasks = read_config(args.config, [word for word in args.models + args.tasks if "=" in word])
    paths = [word for word in args.models if "=" not in word]
    named = [name for word in args.tasks if "=" not in word for name in word.split(",") if name]
    if unknown := [name for name in named if name not in tasks]:
        raise UserError(f"--tasks: no task named {', '.join(unknown)} in {args.config}; it has {', '.join(tasks)} (models stand before "
                        "--tasks)")
    if args.tasks and not named:
        raise UserError(f"--tasks names no task; {args.config} has {', '.join(tasks)}")
    if not paths:
        raise UserError("give at least one model folder")
    if twice := [name for name, n in Counter(map(results_name, paths)).items() if n > 1]:
        raise UserError(f"several models are named {twice[0]}: their results would lie in the same folder; use one --output each")
    rows = read_tasks(args.data, {name: tasks[name] for name in named or tasks})
    for path in paths:
        results_home(args.output, path)
    subjects = [open_subject(path, args.revision, config.training) for path in paths]
    jobs = [Job(subject, name, tasks[name], training_of(tasks[name], config.training), config.lora, config.seeds, *parts,
                args.output / subject.name / subject.revision / "finetune" / name) for subject in subjects for name, parts in rows.items()]
    done = [recorded(job) for job in jobs]  # of all, so that other settings are an error before the first hour of training

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
