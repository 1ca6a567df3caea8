"""The one place that builds TrainingArguments and a Trainer: batch arithmetic, the log line, validation, milestones,
resume checkpoints, preemption, and the end of a run. Every training stage calls the same four functions, in this order:
`start_process`, `open_run`, `load_data`, `train`.

Under `torchrun` or `accelerate launch` every process runs all of it. Gradients are averaged, so that a step is the same however its
batch is spread; process 0 alone writes; a run may go on with another number of processes. Several nodes have to share the run folder;
corpus (with its token store) and teacher cache may be shared, or lie on each node: the first process there builds them under a lock
(flock: a shared file system must support it, as NFS 4 and Lustre mounted with `flock` do), the others wait.
"""

import contextlib
import copy
import datetime
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from babylm import models, parallel, scoring
from babylm.config import RunConfig
from babylm.distillation import Distiller, trainable_parameters
from babylm.ledger import word_ledger
from babylm.model_card import model_card
from babylm.plan import Plan, accumulation_steps, milestones_between, require_disk
from babylm.run_folder import (
    Preempted,
    RunFolder,
    StopRequest,
    folder_written_whole,
    read_finished,
    require_finished,
    saving,
    seal,
    write_json,
)
from babylm.schema import DRY_RUN, UserError
from custom_dataset import EvalBlocks, TextPart, TokenBlocks, open_store, tokenizer_fingerprint

PATIENCE = datetime.timedelta(hours=3)  # for processes that wait while process 0 scores a milestone; torch would give up after 10 minutes
RUN_FLAGS = {"--resume_path": {"key": "resume_path", "help": "resume from this checkpoint-<step> folder"}, **DRY_RUN}


# ---- Before training ------------------------------------------------------------------------------------------------


def start_process(config: RunConfig) -> torch.device:
    """Check launcher and hardware against the config, set threads, and join the process group if there is one."""
    parallel.read_launcher(config)
    device = models.choose_device(config.training)
    for tracker in config.logging.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"logging.trackers: {tracker} is not installed: pip install {tracker}, or take it off the list")
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    return PartialState(cpu=device.type == "cpu", timeout=PATIENCE).device  # with several GPUs: the one of this process


def open_run(config: RunConfig, stage: str, teachers: Sequence[str] = ()) -> RunFolder | None:
    """Check what the run reads and open its folder; None (with a line for the user) if the run is finished already.

    The run's identity holds the content of what is read: text, tokenizer and teacher weights, not where they lie.
    """
    for teacher in teachers:
        require_finished(teacher, f"{stage}: distillation.teacher")
    milestone_sets(config)  # mistakes in it are said before anything is written or computed
    data = {"train": TextPart(config.data.corpus, "train").sha256,
            "val": TextPart(config.data.eval_path or config.data.corpus, "val").sha256}
    tokenizer = models.load_tokenizer(tokenizer_path(config))
    data["tokenizer"] = tokenizer_fingerprint(tokenizer)
    if config.model.path:
        data["base"] = models.weights_fingerprint(config.model.path)
    for number, teacher in enumerate(teachers, 1):
        models.require_same_vocabulary(teacher, tokenizer, "teacher")
        data["teacher" if number == 1 else f"teacher{number}"] = models.weights_fingerprint(teacher)
    return open_folder(config, stage, data)


def open_folder(config: RunConfig, stage: str, data: dict[str, str]) -> RunFolder | None:
    """Open a run's folder, whose identity holds the fingerprints in `data`; None if the run is finished already."""
    state = PartialState()
    folder = RunFolder(config, stage, main=state.is_main_process)
    refused = None
    with state.main_process_first():  # the main process checks, records and cleans up before the others look
        try:
            folder.resume_from = folder.open(data)
        except UserError as error:
            if state.num_processes == 1:
                raise
            refused = error  # the others are waiting, and have to hear of it
    if state.num_processes > 1:
        parallel.raise_in_all(refused)
        parallel.require_same_view(folder, data)
    finished = None if config.dry_run and config.fresh else read_finished(folder.root)  # fresh: moved aside by now, or (dry run) not
    if finished:
        if state.is_main_process:
            print(f"{folder.root} is finished ({finished['steps']:,} steps, validation CE {finished['ce']:.4f}): "
                  "nothing to do; fresh=true starts over")
            folder.set_status("done")
        return None
    return folder


def tokenizer_path(config: RunConfig) -> str:
    """Folder or hub name of the run's tokenizer: the one named in the config, or the one that stage 1 left."""
    return config.data.tokenizer or str(Path(config.data.corpus) / "tokenizer")


def milestone_sets(config: RunConfig) -> list[tuple[Any, Path]]:
    """(task, folder) of the sets that are scored at every milestone. UserError for what is not there or cannot be read."""
    if not config.training.eval_tasks:
        return []
    # Imported here: eval/ builds on babylm/, which does without it unless a config asks. A function passed in by the stages would
    # be cleaner on paper, but a stage that forgets to pass it would silently score nothing.
    from eval import at_milestones

    return at_milestones.open_sets(config.training.eval_tasks, Path(config.training.eval_data), config.training.eval_suite)


def require_sets_fit(sets: Sequence[tuple[Any, Path]], tokenizer: PreTrainedTokenizerFast, model: torch.nn.Module) -> None:
    """UserError if a text of `milestone_sets` is longer than the model has positions for."""
    if sets:
        from eval import at_milestones

        at_milestones.require_fits(sets, tokenizer, getattr(model.config, "max_position_embeddings", None))


def score_milestones(folder: RunFolder, reached: Sequence[str], where: dict[str, Any], model: torch.nn.Module,
                     tokenizer: PreTrainedTokenizerFast, sets: Sequence[tuple[Any, Path]]) -> str:
    """Score a model on `milestone_sets`: a row in metrics.jsonl for each milestone that this step reached. Returns a line for the user."""
    from eval import at_milestones

    began = time.monotonic()
    found = at_milestones.scores(model, tokenizer, sets)
    for name in reached:
        folder.append_metrics({"kind": "scores", **where, "name": name, "tasks": found})
    return "  scores: " + " | ".join(
        f"{name} {entry['score']:.2f} ± {entry['se']:.2f}" + (f" ({entry['ties']:.1%} ties)" if entry["ties"] else "")
        for name, entry in found.items()) + f" | {time.monotonic() - began:.1f} s"


@dataclass
class Data:
    """What a run reads: the tokenizer, all training items in order, and a fixed sample for validation."""

    tokenizer: PreTrainedTokenizerFast
    train: TokenBlocks
    val: EvalBlocks


def load_data(config: RunConfig) -> Data:
    """Open (or build) the token stores and lay out the training items of the whole run."""
    tokenizer = models.load_tokenizer(tokenizer_path(config))
    section, write = config.data, not config.dry_run
    train = TokenBlocks(open_store(section.corpus, "train", tokenizer, write=write), section.seq_len, config.seed,
                        random_chunk=section.random_chunk, offset_cycle=section.offset_cycle, offset_seed=section.offset_seed)
    train.items = total_steps(config, train) * config.training.batch_size
    val = EvalBlocks(open_store(section.eval_path or section.corpus, "val", tokenizer, write=write), section.seq_len, section.eval_blocks)
    return Data(tokenizer, train, val)


def total_steps(config: RunConfig, train: TokenBlocks) -> int:
    """Optimizer steps of the run, from whichever of steps, epochs and words the config gives."""
    training = config.training
    if training.steps:
        return training.steps
    items = math.ceil(training.epochs * train.blocks_per_epoch) if training.epochs else train.items_for_words(training.words)
    return math.ceil(items / training.batch_size)


# ---- Training -------------------------------------------------------------------------------------------------------


def train(config: RunConfig, folder: RunFolder, data: Data, distiller: Distiller, device: torch.device) -> None:
    """Train to the configured end (resuming where the folder says so), save the final model and close the run; in a dry run, say
    what that would take.

    Raises:
        Preempted: SIGTERM or SIGUSR1 came; the state is saved.
        UserError: the loss or the weights became non-finite.
    """
    stop = None if config.dry_run else StopRequest()
    state = PartialState()
    require_positions("student", distiller.student, config.data.seq_len)
    for teacher in distiller.teachers:
        if teacher.model is not None:
            require_positions(f"teacher {teacher.entry.path}", teacher.model, config.data.seq_len)
    sets = milestone_sets(config)
    require_sets_fit(sets, data.tokenizer, distiller.student)
    per_device, accumulation = accumulation_steps(config, state.num_processes)
    steps = len(data.train) // config.training.batch_size
    plan = Plan(config, folder, data, distiller, steps, per_device, accumulation, device)
    plan.print()
    save_memory(distiller, config.training.gradient_checkpointing)
    copied = None
    if config.training.fsdp and state.num_processes > 1:
        if state.is_main_process:
            print(f"sharding   weights, gradients and optimizer state in {state.num_processes} parts; for saving, the main process keeps a "
                  "whole copy of the student in host memory", flush=True)
            copied = copy.deepcopy(distiller.student)
        distiller.shard(device)
    else:
        distiller.to_device(device)
    plan.print_memory()
    if config.dry_run:
        return plan.rehearse()
    require_disk(plan.needed())
    trainer = DistillTrainer(config, folder, data, distiller, steps, per_device, accumulation, stop, sets, copied)
    folder.set_status("running")
    trainer.train(resume_from_checkpoint=str(folder.resume_from) if folder.resume_from else None)
    if trainer.state.global_step < steps:
        again = [key for key in ("resume_path", "fresh") if getattr(config, key)]
        raise Preempted(f"{trainer.stopped_by} at step {trainer.state.global_step} of {steps}; the same command"
                        f"{' without ' + ' and '.join(again) if again else ''} continues there")
    trainer.finish()


def save_memory(distiller: Distiller, recompute: bool) -> None:
    """With `recompute` (training.gradient_checkpointing), blocks keep their inputs alone, and compute the rest again going backward."""
    if recompute:
        # Not the reentrant form, which gives no gradient where a block's input needs none (adapters on a frozen base), and whose
        # backward passes within the backward pass DDP and FSDP do not expect.
        distiller.student.activation_checkpointing_enable({"use_reentrant": False})


def require_positions(role: str, model: torch.nn.Module, seq_len: int) -> None:
    """UserError if blocks are longer than the model has positions for."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit and seq_len > limit:
        raise UserError(f"data.seq_len {seq_len} exceeds the {limit} positions of the {role}: use shorter blocks, or a model with "
                        "more positions")


def collate(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stack equal-length blocks; nothing is padded or masked."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


@dataclass
class Progress:
    """What the next process needs beyond weights, optimizer and random state; saved as progress.json."""

    seconds: float = 0.0  # of training before this process
    best_ce: float | None = None
    best_step: int | None = None
    meter: dict[str, float] = field(default_factory=dict)  # sums since the last log line
    metered_steps: dict[str, float] = field(default_factory=dict)  # of each: a term whose weight is 0 is not computed


class DistillTrainer(Trainer):
    """A Trainer whose model is a Distiller, whose data order is the dataset's, and whose files are the run folder's."""

    # compute_loss returns the mean of a micro-batch: the Trainer must divide by the accumulation steps. Left at its
    # default, transformers 5 takes the loss as already divided, and the gradient grows with the accumulation.
    loss_is_scaled_for_ga = False

    def __init__(self, config: RunConfig, folder: RunFolder, data: Data, distiller: Distiller, steps: int, per_device: int,
                 accumulation: int, stop: StopRequest, sets: Sequence[tuple[Any, Path]] = (), copied: torch.nn.Module | None = None):
        """
        Args:
            sets: from `milestone_sets`.
            copied: where the distiller is sharded, on the main process: a copy of its student in host memory, which takes the
                gathered weights whenever it is saved.
        """
        self.config, self.folder, self.data, self.stop, self.sets, self.copied = config, folder, data, stop, sets, copied
        self.distiller = distiller
        self.ledger = word_ledger(config, tokenizer_path(config), tokenizer_fingerprint(data.tokenizer),
                                  [teacher.entry.path for teacher in distiller.teachers])
        self.stopped_by = ""
        self.progress = Progress()
        self._meter: dict[str, torch.Tensor] = {}
        self._metered_steps: dict[str, float] = {}
        self._began = self._window_began = time.monotonic()
        self._window_step = 0
        self._staging: str | None = None
        super().__init__(model=distiller, args=self._arguments(steps, per_device, accumulation), train_dataset=data.train,
                         data_collator=collate, callbacks=[RunCallback(self)])
        self.remove_callback(PrinterCallback)
        if self.accelerator.ddp_handler:  # TrainingArguments has no such key: gradients lie in what DDP sends, not beside it
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        self._first_bad_step = torch.tensor(sys.maxsize, device=self.args.device)

    def _arguments(self, steps: int, per_device: int, accumulation: int) -> TrainingArguments:
        training, on_cpu = self.config.training, PartialState().device.type == "cpu"
        arguments = TrainingArguments(
            output_dir=str(self.folder.root), max_steps=steps, seed=self.config.seed,
            per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
            learning_rate=training.lr, warmup_steps=training.warmup_steps, weight_decay=training.weight_decay,
            lr_scheduler_type={"constant": "constant_with_warmup"}.get(training.schedule, training.schedule),
            adam_beta1=training.beta1, adam_beta2=training.beta2, max_grad_norm=training.grad_clip,
            optim="adamw_torch_fused", bf16=training.precision == "bf16", fp16=training.precision == "fp16", use_cpu=on_cpu,
            # The run folder decides when to log, validate and save (RunCallback), so the Trainer's own strategies are off.
            logging_strategy="no", eval_strategy="no", save_strategy="no", logging_nan_inf_filter=False,
            report_to=self.config.logging.trackers or "none", run_name=self.config.name,
            disable_tqdm=not sys.stderr.isatty(), remove_unused_columns=False,
            dataloader_pin_memory=not on_cpu, ddp_find_unused_parameters=False)
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are used by several processes, never by DataParallel
        return arguments

    # -- data, loss

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        # The dataset is the whole run in order. Whatever the process count and accumulation, step s consumes items
        # s*batch_size ... (s+1)*batch_size - 1; and with one single "epoch" there is none to forget to set on resume.
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> torch.Tensor:
        terms = model(**inputs)
        share = 1 / self.args.gradient_accumulation_steps  # a run may be continued with another accumulation
        for name, value in terms.items():  # summed on the device; read only when a line is logged
            self._meter[name] = self._meter.get(name, 0.0) + share * value.detach().double()
            self._metered_steps[name] = self._metered_steps.get(name, 0.0) + share
        bad = torch.where(terms["loss"].detach().isfinite(), sys.maxsize, self.state.global_step + 1)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad)
        return terms["loss"]

    def require_finite(self, *, weights: bool = False) -> None:
        """Stop the run if a loss (or, on request, a weight) has become NaN or infinite, naming the step to go back to."""
        first_bad = self._first_bad_step
        if weights and not all(parallel.local(p).isfinite().all() for _, p in trainable_parameters(self.model)):
            first_bad = first_bad.clamp(max=self.state.global_step)
        step = int(self.accelerator.gather(first_bad[None]).min())  # all processes stop, or none
        if step < sys.maxsize:
            good = self.folder.newest_whole()
            raise UserError(f"the loss or the weights became NaN or infinite at step {step}; the last good checkpoint is "
                            f"{good or 'none'}. A lower training.lr, a longer warmup_steps, grad_clip or precision: fp32 may help "
                            "(another lr is another run: give it another name=)")

    # -- validation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Validate: mean CE (and KL) over all predicted tokens of the fixed blocks, in nats, overall and per domain."""
        with self.accelerator.autocast():
            return scoring.validate(self.model, self.data.val, self.args.per_device_train_batch_size, self.args.device)

    def _evaluate(self, *_: Any, **__: Any) -> dict[str, Any]:
        began = time.monotonic()
        row = {**self._where(), **self.evaluate()}
        self.control.should_evaluate = False  # done for this step: the end of an epoch asks once more
        self._window_began += time.monotonic() - began  # validation is not part of the training speed
        self.folder.append_metrics({"kind": "eval", **row})
        self._say(f"  validation at step {self.state.global_step:,}: " + self._show(row))
        if self.progress.best_ce is None or row["ce"] < self.progress.best_ce:
            self.progress.best_ce, self.progress.best_step = row["ce"], self.state.global_step
            if self.config.checkpoints.final == "best":
                self.require_finite(weights=True)
                student = self._whole_student()
                if self.folder.main:
                    with folder_written_whole(self._best(row["step"])) as best:
                        self._check_saved(student, self._export(student, best), best)
                    for older in self.folder.run.glob("best-*"):
                        if older != self._best(row["step"]):
                            shutil.rmtree(older)
                self.accelerator.wait_for_everyone()
        return row

    def _best(self, step: int | None) -> Path:
        """Where the weights of the best validation so far lie."""
        return self.folder.run / f"best-{step}"

    # -- log line

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One tidy line per logging step, on the screen and in metrics.jsonl."""
        if "grad_norm" not in logs:  # the Trainer's summary at the end of train()
            return
        self.control.should_log = False
        self.require_finite()
        names = list(self._meter)
        sums = torch.stack([torch.as_tensor(self._meter[name], device=self.args.device) for name in names])
        steps = sums.new_tensor([self._metered_steps[name] for name in names])
        means = (self.accelerator.reduce(sums, "mean") / steps).tolist()
        self._meter, self._metered_steps = {}, {}
        step, now = self.state.global_step, time.monotonic()
        rate = (step - self._window_step) / max(now - self._window_began, 1e-9)
        self._window_step, self._window_began = step, now
        tokens = self.config.training.batch_size * self.config.data.seq_len
        row = {"kind": "train", **self._where(), "total_steps": self.args.max_steps, **dict(zip(names, means, strict=True)),
               **self.distiller.scheduled(), "lr": logs["learning_rate"], "grad_norm": logs["grad_norm"], "tokens_per_s": rate * tokens}
        self.folder.append_metrics(row)
        left = datetime.timedelta(seconds=round((self.args.max_steps - step) / rate))
        self._say(f"step {step:>6,}/{self.args.max_steps:,} | words {row['words'] / 1000:,.1f}K | epoch {row['epoch']:.2f} | "
                  f"{self._show(row)} | lr {row['lr']:.2e} | grad {row['grad_norm']:.2f} | "
                  f"{row['tokens_per_s'] / 1000:,.1f}K tok/s | {left} left")
        if self.config.logging.trackers:
            super().log({name: value for name, value in row.items() if name != "kind"})

    def _where(self) -> dict[str, Any]:
        step = self.state.global_step
        items = step * self.config.training.batch_size
        return {"step": step, "words": self.data.train.words_through(items), "epoch": items / self.data.train.blocks_per_epoch,
                "seconds": round(self.seconds(), 2)}

    def seconds(self) -> float:
        """Seconds of this run so far, over all its processes one after the other."""
        return self.progress.seconds + time.monotonic() - self._began

    def _show(self, row: dict[str, Any]) -> str:
        names = [name for name in self.distiller.columns() if name in row and not name.startswith("teacher")]
        shown = [f"{name} {row[name]:.4f}" for name in names]
        return " | ".join(shown + ([f"perplexity {row['perplexity']:.2f}"] if "perplexity" in row else []))

    def _say(self, line: str) -> None:
        if self.folder.main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    # -- files

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Resume state, written under a hidden name, sealed with the size of every file, then renamed."""
        self.require_finite(weights=True)
        began = time.monotonic()
        name = f"checkpoint-{self.state.global_step}"
        staging, target = self.folder.root / f".{name}.tmp", self.folder.root / name
        try:
            with saving(target):
                self._staging = str(staging)
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                meter = {term: float(self.accelerator.reduce(value, "mean")) for term, value in self._meter.items()}
                if self.folder.main:
                    progress = {**self.progress.__dict__, "seconds": self.seconds(), "meter": meter, "metered_steps": self._metered_steps}
                    write_json(staging / name / "progress.json", progress)
                    seal(staging / name)
                    if target.exists():  # a damaged one of an earlier attempt
                        target.rename(staging / "damaged")
                    os.rename(staging / name, target)
                    self.folder.rotate()
        finally:
            self._staging = None
            if self.folder.main:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._window_began += time.monotonic() - began

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Everything that is trained, by the names of the Distiller; frozen weights can be read again from their source. All processes
        # come here where the model is sharded, otherwise the main one alone.
        trained = parallel.whole_tensors(trainable_parameters(self.model))
        if self.folder.main:
            os.makedirs(output_dir, exist_ok=True)
            save_file(trained, f"{output_dir}/trained.safetensors")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.distiller.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = parallel.whole_optimizer_state(self.optimizer)
        if self.folder.main:  # the files that an unsharded run writes
            torch.save(state, f"{output_dir}/optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), f"{output_dir}/scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.distiller.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = torch.load(f"{checkpoint}/optimizer.pt", map_location="cpu", mmap=True, weights_only=True)  # each process reads its parts
        parallel.load_optimizer_state(self.optimizer, saved)
        self.lr_scheduler.load_state_dict(torch.load(f"{checkpoint}/scheduler.pt", weights_only=True))

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # The Trainer's own asks a transformers model's config how it was sharded.
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        rank, world = self.args.process_index, self.args.world_size
        name = f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"
        if checkpoint and not Path(checkpoint, name).is_file():  # saved by fewer processes, or by one and now there are several
            torch.manual_seed(_seed_of(self.config.seed, rank, self.state.global_step))
        super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        saved = load_file(f"{resume_from_checkpoint}/trained.safetensors")
        mine = dict(trainable_parameters(self.model))
        if saved.keys() != mine.keys():
            raise UserError(f"{resume_from_checkpoint} holds other parameters than this run trains: "
                            f"{', '.join(sorted(saved.keys() ^ mine.keys())[:5])}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(parallel.cut_like(saved[name], parameter))
        self.progress = Progress(**json.loads(Path(resume_from_checkpoint, "progress.json").read_text(encoding="utf-8")))
        if self.config.checkpoints.final == "best" and not self._best(self.progress.best_step).is_dir():
            self.progress.best_ce = self.progress.best_step = None  # made after this checkpoint, or in another folder
        self._meter = {name: torch.tensor(value, dtype=torch.float64, device=self.args.device)
                       for name, value in self.progress.meter.items()}
        self._metered_steps = self.progress.metered_steps
        self._window_step = int(re.search(r"checkpoint-(\d+)", resume_from_checkpoint)[1])
        self._say(f"resuming from {resume_from_checkpoint}")

    def _whole_student(self) -> Any:
        """The student with all its weights; on other processes than the main one, where it is sharded, None. All must call it."""
        if not self.distiller.sharded:
            return self.model.student
        weights = parallel.whole_tensors(self.model.student.named_parameters())
        with torch.no_grad():
            for name, parameter in self.copied.named_parameters() if self.copied is not None else ():
                parameter.copy_(weights[name])
        return self.copied

    def _export(self, student: Any, target: Path) -> Any:
        """Write the student alone, as a model that loads anywhere; returns the model that was written."""
        if getattr(self.config, "lora", None) and self.config.lora.mode != "none" and self.config.lora.merge_adapter:
            student = models.merge_adapters(student)
        with saving(target):
            models.save_model(student, self.data.tokenizer, target)
        return student

    def save_milestones(self) -> None:
        """Save every milestone that this step's words have reached and that was not reached a step earlier."""
        step, batch = self.state.global_step, self.config.training.batch_size
        now, before = (self.data.train.words_through(s * batch) for s in (step, step - 1))
        reached = milestones_between(self.config, before, now)
        if not reached:
            return
        self.require_finite(weights=True)
        student = self._whole_student()
        for name in reached:
            if self.folder.main:
                with folder_written_whole(self.folder.root / name) as target:
                    self._export(student, target)
            self.folder.append_metrics({"kind": "milestone", **self._where(), "name": name})
            self._say(f"  milestone {name} at step {step:,} ({now:,} words)")
        if self.sets and self.folder.main:
            began = time.monotonic()
            self._say(score_milestones(self.folder, reached, self._where(), student, self.data.tokenizer, self.sets))
            self._window_began += time.monotonic() - began  # not part of the training speed
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """The configured end is reached: the final model goes to the root, then finished.json says so."""
        self.require_finite(weights=True)
        student = self._whole_student()
        if self.folder.main:
            use_best = self.config.checkpoints.final == "best"
            step = self.progress.best_step if use_best else self.state.global_step
            best = self._best(step)
            result = self._result(step)

            def write(target: Path) -> None:
                if use_best:
                    for file in best.iterdir():
                        if file.name != "complete.json":
                            shutil.copyfile(file, target / file.name)
                else:
                    self._check_saved(student, self._export(student, target), target)
                (target / "README.md").write_text(model_card(self.folder.root, result, model=target), encoding="utf-8")

            self.folder.install_final(write)
            self.folder.finish(result)
            if use_best:
                shutil.rmtree(best)
            self._say(f"finished {self.folder.root}: step {step:,} | {result['words_seen']:,} words | "
                      f"validation {self._show(result)} | {result['seconds']:.0f} s")
        self.accelerator.wait_for_everyone()

    def _check_saved(self, student: Any, model: Any, target: Path) -> None:
        """The model on disk must compute what was trained: also where adapters were merged (into `model`) or embeddings untied."""
        if not (target / "config.json").is_file():  # an unmerged adapter: nothing was changed on the way
            return
        sample = self.data.val[0]["input_ids"][None, :64]
        models.require_saved_equals(model, target, sample)
        if model is not student:
            difference = models.largest_logit_difference(student, model, sample)
            self._say(f"merged the adapters: logits differ by {difference:.1e} of the largest from base + adapters")
            if not difference < (1e-4 if self.config.training.precision == "fp32" else 5e-2):
                raise RuntimeError(f"merging changed the logits by {difference:.2g} of the largest: {self.folder.root} was not finished")

    def _result(self, step: int) -> dict[str, Any]:
        rows = [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]
        validation = next(row for row in reversed(rows) if row["kind"] == "eval" and row["step"] == step)
        seen = self.data.train.words_through(self.state.global_step * self.config.training.batch_size)
        at_step = self.data.train.words_through(step * self.config.training.batch_size)
        before = self.data.train.words_through((self.state.global_step - 1) * self.config.training.batch_size)
        ledger = {**self.ledger, "words_seen": seen, "words_before_last_step": before}
        kept = (*self.distiller.columns(), "perplexity", "ce_by_domain")
        return {"steps": self.state.global_step, "weights_from_step": step, "words_seen": at_step,
                "seconds": round(self.seconds(), 1), "parameters": models.count_parameters(self.model.student),
                **{name: validation[name] for name in kept if name in validation}, "ledger": ledger}


def _seed_of(seed: int, rank: int, step: int) -> int:
    """Of the dropout of one process, where no random state was saved for it."""
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0])


class RunCallback(TrainerCallback):
    """Decides, at the end of every step, whether to log, validate, save, or stop."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer._began = self.trainer._window_began = time.monotonic()
        if args.process_index:  # else all processes would drop the same units
            torch.manual_seed(_seed_of(args.seed, args.process_index, 0))
        if self.trainer.stop:
            raise Preempted(f"{self.trainer.stop.signal_name} before the first step; the same command starts again")

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer.distiller.progress = state.global_step / max(args.max_steps - 1, 1)  # 0 at the first step, 1 at the last

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        trainer, config, step = self.trainer, self.trainer.config, state.global_step
        last = step == args.max_steps
        if args.device.type == "cpu":  # reading the flag costs nothing here; on a GPU it waits for the next log line
            trainer.require_finite()
        trainer.save_milestones()
        control.should_log = step % config.logging.logging_steps == 0 or last or step == 1
        control.should_evaluate = step % config.logging.eval_steps == 0 or last
        control.should_save = step % config.checkpoints.save_steps == 0 and not last
        if not last and self._stop_requested():
            trainer.stopped_by = trainer.stop.signal_name or "a signal to another process"
            control.should_save = control.should_training_stop = True

    def _stop_requested(self) -> bool:
        """Whether any process was asked to stop: all must leave at the same step."""
        asked = bool(self.trainer.stop)
        if self.trainer.args.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=self.trainer.args.device)
        return bool(self.trainer.accelerator.reduce(flag, "sum") > 0)
