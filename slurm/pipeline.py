"""All stages as SLURM jobs, each after those whose results it reads (afterok).

    bash slurm/submit_pipeline.sh                                  # configs/10M, every stage that has a YAML there
    bash slurm/submit_pipeline.sh --configs configs/demo output=models/demo-slurm teacher:training.steps=600
    bash slurm/submit_pipeline.sh --stages teacher:babyllama-teacher-llama,student:babyllama
    bash slurm/submit_pipeline.sh --torchrun -- --partition=gpu --gpus-per-node=4 corpus:--gpus-per-node=0

Stages are named as in configs/: corpus, teacher, baseline, student, moep, ppo; `stage:NAME` reads NAME.yaml instead of
stage.yaml. Further ones: cache (captures the teachers' states; comes by itself before every student with
distillation.cache: true), scores (the demo's table) and figures. Overrides key=value go to every stage they concern: corpus.*,
tokenizer.* to stage 1, seed to all, the others to the training stages; NAME:key=value to one stage alone. Where an override moves
what a stage writes (output=, name=, corpus.output=), the stages that read it by its old place read it from the new one.
What stands behind `--` goes to sbatch, NAME:--option for one stage alone.

Every config and every input is checked before the first job is submitted. Jobs are submitted on hold and released together, so
that a refusal by sbatch on the way leaves nothing behind. From then on run/status.json of every run says pending, with the job's id.
"""

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from babylm.config import STAGES, CorpusConfig, RLConfig, RunConfig, StudentConfig
from babylm.run_folder import read_finished, require_finished, run_stage, write_status
from babylm.schema import UserError, apply_override, check, read_yaml
from custom_dataset import DataError, TextPart
from slurm.runs import WAITING, jobs_in_queue, read_status

SCRIPTS = {"corpus": "combine_babylm.py", "teacher": "train_teacher.py", "baseline": "train_baseline.py", "student": "train_student.py",
           "moep": "train_moep_student.py", "ppo": "ppo.py"}
LATER = ("scores", "figures")  # what is done with the finished runs
HUB_NAME = r"[\w-]+(/[\w.-]+)?"  # org/name or a bare hub name; whatever looks like a path is one


# ---- The plan -------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One job of the pipeline.

    Attributes:
        label: name of its YAML, or of the stage; the job's name in squeue, and in overrides for it alone.
        command: what follows `python`.
        makes: the folder that later stages may read.
        run: its run folder, where it keeps one.
        after: the jobs that must have ended well.
    """

    label: str
    command: list[str]
    makes: str = ""
    run: Path | None = None
    config: Any = None
    after: list["Job"] = field(default_factory=list)
    id: str = ""


@dataclass(frozen=True)
class Input:
    """What a config reads: the key that says so, the path, and what lies there."""

    key: str
    path: str
    kind: str  # corpus, validation, model, tokenizer


def inputs(config: Any) -> Iterator[Input]:
    """Everything that a stage reads and that an earlier one may have made."""
    if isinstance(config, CorpusConfig):
        if config.tokenizer.path:
            yield Input("tokenizer.path", config.tokenizer.path, "tokenizer")
        return
    yield Input("data.corpus", config.data.corpus, "validation" if isinstance(config, RLConfig) else "corpus")
    if config.data.eval_path:
        yield Input("data.eval_path", config.data.eval_path, "validation")
    if getattr(config.data, "tokenizer", None):
        yield Input("data.tokenizer", config.data.tokenizer, "tokenizer")
    if config.model.path:
        yield Input("model.path", config.model.path, "model")
    if isinstance(config, StudentConfig):
        if config.distillation.teacher:
            yield Input("distillation.teacher", config.distillation.teacher, "model")
        for number, entry in enumerate(config.distillation.teachers):
            yield Input(f"distillation.teachers.{number}.path", entry.path, "model")
    if isinstance(config, RLConfig):
        for number, reward in enumerate(config.rewards):
            for name in ("teacher", "model"):
                if getattr(reward, name, None) and not getattr(reward, "server", None):
                    yield Input(f"rewards.{number}.{name}", getattr(reward, name), "model")


def made(script: str, values: dict) -> str:
    """The folder that a stage with this YAML writes."""
    if script == SCRIPTS["corpus"]:
        return os.path.normpath((values.get("corpus") or {}).get("output", "corpus_split"))
    return os.path.normpath(Path(values.get("output", "models")) / str(values.get("name", "")))


def inside(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies in it (a milestone, say)."""
    return os.path.normpath(path) == folder or os.path.normpath(path).startswith(folder + os.sep)


def concerns(script: str, key: str) -> bool:
    """Whether an override without a stage's name is for this one."""
    of_stage_1 = key.split(".")[0] in ("corpus", "tokenizer", "download")
    return key == "seed" or of_stage_1 == (script == SCRIPTS["corpus"])


def choose(configs: Path, wanted: str | None) -> list[tuple[str, str]]:
    """(stage, label) of every stage to run, in the pipeline's order. UserError for names that are none."""
    if not configs.is_dir():
        raise UserError(f"--configs {configs}: no such folder")
    if wanted is None:
        chosen = [(stage, stage) for stage in SCRIPTS if (configs / f"{stage}.yaml").is_file()]
        if not chosen:
            raise UserError(f"--configs {configs} holds none of {', '.join(f'{stage}.yaml' for stage in SCRIPTS)}")
        corpus = read_yaml(configs / "corpus.yaml").get("corpus") if ("corpus", "corpus") in chosen else None
        return [*chosen, *([("scores", "scores")] if (corpus or {}).get("demo_pairs") else []), ("figures", "figures")]
    order = [*SCRIPTS, *LATER]
    chosen = []
    for item in filter(None, wanted.split(",")):
        stage, _, name = item.partition(":")
        if stage not in order:
            near = difflib.get_close_matches(stage, order, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(order)}"
            raise UserError(f"--stages: {stage!r} is no stage; {hint}")
        chosen.append((stage, name or stage))
    labels = [label for _, label in chosen]
    if not chosen or len(set(labels)) < len(labels):
        raise UserError(f"--stages {wanted}: name every stage once" if chosen else "--stages: name at least one stage")
    return sorted(chosen, key=lambda pair: order.index(pair[0]))


def plan(configs: Path, wanted: str | None, overrides: Iterable[str]) -> list[Job]:
    """The jobs, in an order in which each comes after those that it waits for.

    Args:
        configs: folder of YAMLs.
        wanted: "stage,stage:NAME,..."; None for every stage that has a YAML.
        overrides: key=value or NAME:key=value.

    Raises:
        UserError: lists everything that is wrong with the configs and with what they read.
    """
    chosen = choose(configs, wanted)
    problems: list[str] = []
    labels = [label for _, label in chosen]
    common: list[str] = []
    own: dict[str, list[str]] = {label: [] for label in labels}
    for override in overrides:
        label, colon, rest = override.partition(":")
        if colon and re.fullmatch(r"[\w.-]+", label):
            if label not in own:
                raise UserError(f"override {override!r}: {label} is none of the stages to run: {', '.join(labels)}")
            own[label].append(rest)
        else:
            common.append(override)
    jobs: list[Job] = []
    moved: dict[str, str] = {}  # where a YAML says that something is made -> where it will be
    for stage, label in chosen:
        try:
            if stage in LATER:
                jobs.append(_later(stage, jobs))
            else:
                job = _training(SCRIPTS[stage], label, configs / f"{label}.yaml", common, own[label], jobs, moved, problems)
                if isinstance(job.config, StudentConfig) and job.config.distillation.cache:
                    jobs.append(_cache(job, jobs))
                jobs.append(job)
        except (UserError, DataError) as error:
            problems.append(str(error))
    for key in {override.partition("=")[0] for override in common}:
        if not any(concerns(SCRIPTS.get(stage, ""), key) for stage, _ in chosen if stage in SCRIPTS):
            problems.append(f"override {key}: concerns none of the stages to run")
    if problems:
        raise UserError("nothing was submitted:\n" + "\n".join(problems) + "\n(--stages leaves stages out)")
    return jobs


def _training(script: str, label: str, path: Path, common: list[str], own: list[str], jobs: list[Job], moved: dict[str, str],
              problems: list[str]) -> Job:
    """The job of a stage with a YAML. What it lacks is added to `problems`: whoever reads its result need not complain, too."""
    values = read_yaml(path)
    before = made(script, values)
    overrides = [*(override for override in common if concerns(script, override.partition("=")[0])), *own]
    for override in overrides:
        apply_override(values, override)
    schema = STAGES[script]
    moved[before] = made(script, values)
    given = {override.partition("=")[0] for override in overrides}
    for read in inputs(check(schema, values, str(path))):
        for old, new in moved.items():
            if old != new and old != before and inside(read.path, old) and read.key not in given:
                overrides.append(f"{read.key}={new}{os.path.normpath(read.path)[len(old):]}")
                apply_override(values, overrides[-1])
    config = check(schema, values, str(path))
    job = Job(label, [script, "--config", str(path), *overrides], made(script, values), config=config)
    job.run = Path(job.makes) if isinstance(config, RunConfig) else None
    if twin := next((other.label for other in jobs if other.makes == job.makes), None):
        raise UserError(f"{path}: {twin} writes {job.makes}, too: give one of them another name=")
    for read in inputs(config):
        makers = [other for other in jobs if other.makes and inside(read.path, other.makes)]
        job.after += [maker for maker in makers if maker not in job.after]
        if not makers:
            _note(problems, require_input, read, str(path), script)
    _note(problems, require_other_inputs, config, str(path))
    return job


def _note(problems: list[str], check_it: Callable[..., None], *arguments: Any) -> None:
    try:
        check_it(*arguments)
    except (UserError, DataError) as error:
        problems.append(str(error))


def _cache(student: Job, jobs: list[Job]) -> Job:
    """The job that captures the states of a student's teachers; the student waits for it."""
    cache = Job(f"{student.label}-cache", ["-m", "babylm.teacher_cache", *student.command[1:]], after=list(student.after))
    cache.after += [other for other in jobs if other.command[:2] == cache.command[:2]]  # one at a time: they may share a folder
    student.after.append(cache)
    return cache


def _later(stage: str, jobs: list[Job]) -> Job:
    """Scores or figures of all runs that the jobs before make."""
    runs = [job for job in jobs if job.run]
    if not runs:
        raise UserError(f"--stages: {stage} needs a training stage before it")
    folders = [job.makes for job in runs]
    if stage == "scores":
        corpus = runs[0].config.data.corpus
        command = ["-m", "babylm.scoring", *folders, "--corpus", corpus, "--seq_len", str(runs[0].config.data.seq_len)]
        stage_1 = next((job.config for job in jobs if isinstance(job.config, CorpusConfig)), None)
        if stage_1 and stage_1.corpus.demo_pairs:
            command += ["--ngram", str(Path(runs[0].config.output) / "5-gram"), "--pairs", str(Path(corpus) / "pairs")]
        return Job(stage, command, after=runs)
    scores = [job for job in jobs if job.label == "scores"]
    output = Path(runs[0].config.output)
    if scores and "--ngram" in scores[0].command:
        folders = [scores[0].command[scores[0].command.index("--ngram") + 1], *folders]
    command = ["visual.py", *folders, *(["--table"] if scores else []), "--output", str(Path("figures", *output.parts[1:]))]
    return Job(stage, command, after=[*runs, *scores])


# ---- What must be there before anything is submitted ----------------------------------------------------------------


def require_input(read: Input, source: str, script: str) -> None:
    """UserError or DataError, naming the YAML and its key, for an input that no job makes and that is not there."""
    where = f"{source}: {read.key}"
    if read.kind in ("corpus", "validation"):
        try:
            for part in ("train", "val") if read.kind == "corpus" and read.key == "data.corpus" else ("val",):
                TextPart(read.path, part)
        except DataError as error:
            raise UserError(f"{where}: {error}") from None
    elif read.kind == "tokenizer":
        if not Path(read.path).is_dir():
            _require_fetched(read.path, where, "tokenizer_config.json")
    else:
        require_finished(read.path, where, "train_student.py" if script == "ppo.py" and read.key == "model.path" else "train_teacher.py")
        if not Path(read.path).exists():
            _require_fetched(read.path, where, "config.json")


def _require_fetched(name: str, where: str, file: str, kind: str = "model") -> None:
    """UserError unless a hub name is in the cache, where jobs may not ask the hub (HF_HUB_OFFLINE)."""
    if not re.fullmatch(HUB_NAME, name):
        raise UserError(f"{where}: {name} does not exist")
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() not in ("1", "ON", "YES", "TRUE"):
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, file, repo_type=kind), str):
        raise UserError(f"{where}: {name} is neither a folder here nor in the cache of the Hugging Face hub, which jobs cannot reach "
                        f"(HF_HUB_OFFLINE in slurm/environment.sh): on a machine with a network, HF_HUB_OFFLINE=0 hf download "
                        f"{'' if kind == 'model' else '--repo-type dataset '}{name}")


def require_other_inputs(config: Any, source: str) -> None:
    """UserError for raw text, evaluation sets and prompts that are not there."""
    if isinstance(config, CorpusConfig):
        section = config.corpus
        raw = Path(section.input)
        if not section.demo_words and not [*raw.glob("*.train"), *raw.glob("*.dev")]:
            raise UserError(f"{source}: corpus.input: {raw} holds no *.train files; fetch the published corpus on a machine with a "
                            f"network: python combine_babylm.py --config {source} --download strict-small")
        return
    if config.training.eval_tasks:
        from babylm.training import milestone_sets  # here, because it imports transformers

        milestone_sets(config)
    if isinstance(config, RLConfig):
        prompts = config.prompts
        if prompts.source == "file" and not Path(prompts.path).is_file():
            raise UserError(f"{source}: prompts.path: {prompts.path} does not exist")
        if prompts.from_dataset and not (prompts.dataset and Path(prompts.dataset).is_dir()):
            from interactive.prompts import DATASETS

            _require_fetched(prompts.dataset or DATASETS[prompts.source][0], f"{source}: prompts", "README.md", "dataset")


def require_free(jobs: list[Job], queue: dict[str, str]) -> None:
    """UserError if a run is in the hands of a job that is in the queue already."""
    for job in jobs:
        if job.run and (job.run / "run" / "status.json").is_file():
            found = read_status(job.run, queue)
            if found.queue and found.state in WAITING:
                raise UserError(f"nothing was submitted: {job.run} belongs to job {found.job}, which is in the queue ({found.queue}): "
                                f"wait for it, scancel {found.job}, or give another name= or output=")


# ---- Submission -----------------------------------------------------------------------------------------------------


def slurm_command(*command: str) -> str:
    """What a command of SLURM prints. UserError, with what it says, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{' '.join(command)}\n{(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def submit(jobs: list[Job], options: list[str], torchrun: bool) -> None:
    """Submit all on hold, note their ids in the runs' status, and release them together; or submit none.

    Args:
        options: of sbatch; NAME:--option is for one job alone.
        torchrun: training stages through slurm/multi_node.sbatch.
    """
    labels = [job.label for job in jobs]
    for option in options:
        if (label := option.partition(":")[0]) and not option.startswith("-") and label not in labels:
            raise UserError(f"sbatch option {option!r}: write --option=value, or NAME:--option=value for one of {', '.join(labels)}")
    try:
        for job in jobs:
            own = [option.partition(":")[2] for option in options if option.startswith(f"{job.label}:")]
            common = [option for option in options if option.startswith("-")]
            waits = [f"--dependency=afterok:{':'.join(other.id for other in job.after)}"] if job.after else []
            script = "slurm/multi_node.sbatch" if torchrun and job.run else "slurm/stage.sbatch"
            job.id = slurm_command("sbatch", "--parsable", "--hold", "--kill-on-invalid-dep=yes", f"--job-name={job.label}", *waits,
                                   *common, *own, script, *job.command).split(";")[0]  # id;cluster where there are several
        for job in jobs:
            if job.run and not read_finished(job.run):
                waits_for = f" for {', '.join(other.id for other in job.after)}" if job.after else ""
                write_status(job.run, "pending", f"job {job.id} waits{waits_for}", job.id)
        slurm_command("scontrol", "release", ",".join(job.id for job in jobs))
    except BaseException as error:
        submitted = [job for job in jobs if job.id]
        if submitted:
            subprocess.run(["scancel", *(job.id for job in submitted)])
        for job in submitted:
            if job.run and (job.run / "run" / "status.json").is_file() and read_status(job.run, {}).job == job.id:
                write_status(job.run, "failed", f"job {job.id} was cancelled: not all jobs could be submitted")
        if isinstance(error, UserError):
            raise UserError(f"nothing was submitted (what was, is cancelled): {error}") from None
        raise


def read_command(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """(arguments, what stands behind `--`, for sbatch). UserError where something is to be submitted and there is no SLURM."""
    words = sys.argv[1:]
    behind = words.index("--") if "--" in words else len(words)
    args = parser.parse_intermixed_args(words[:behind])
    if not args.plan and not shutil.which("sbatch"):
        raise UserError("sbatch is not installed: run this where SLURM is, on the cluster's login node (--plan works everywhere)")
    return args, words[behind + 1:]


def main() -> None:
    parser = argparse.ArgumentParser(prog="bash slurm/submit_pipeline.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=Path("configs/10M"), help="folder of YAMLs (default: configs/10M)")
    parser.add_argument("--stages", help="comma-separated: stage or stage:NAME (default: all that have a YAML, and figures)")
    parser.add_argument("--torchrun", action="store_true", help="training stages through slurm/multi_node.sbatch")
    parser.add_argument("--plan", action="store_true", help="check everything and print the jobs; submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="[NAME:]key=value", help="any key of the YAMLs")
    args, options = read_command(parser)
    jobs = plan(args.configs, args.stages, args.overrides)
    if not args.plan:
        require_free(jobs, jobs_in_queue())
        submit(jobs, options, args.torchrun)
    width = max(len(job.label) for job in jobs)
    for job in jobs:
        after = f"  after {', '.join(other.id or other.label for other in job.after)}" if job.after else ""
        done = "  (finished already)" if job.run and read_finished(job.run) else ""
        print(f"{job.id or '-':>8}  {job.label:<{width}}  python {' '.join(job.command)}{after}{done}")
    if not args.plan:
        print("logs: slurm/logs/<stage>-<job>.out   status: bash slurm/status.sh   all away: scancel " + " ".join(job.id for job in jobs))


if __name__ == "__main__":
    run_stage(main)
