"""What a run will be, before it is one: batch arithmetic, milestones, parameters, FLOPs, words, memory and disk, as every run
prints them before its first step; and what `--dry_run` adds, the time, measured on a few real micro-steps, with nothing written.
"""

import datetime
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule

from babylm import models, parallel
from babylm.config import RunConfig
from babylm.distillation import Distiller, Teacher, state_key, trainable_parameters
from babylm.losses import tokens_at_once
from babylm.run_folder import RunFolder, amount, existing_parent, free_bytes, require_space
from babylm.schema import UserError, milestone_name

if TYPE_CHECKING:
    from babylm.training import Data

MILLION = 1_000_000
# Revision names that the official evaluation loops over.
OFFICIAL_MILESTONES = [n * MILLION for n in (*range(1, 11), *range(20, 101, 10), *range(200, 1001, 100))]
EVALUATION_TOKENS = 344  # the longest item of the official evaluation (entity tracking)
LEARNED_POSITIONS = ("gpt2", "moep")  # a vector per position: those beyond the training blocks are never trained
MEASURE_SECONDS = 30.0  # about how long a dry run may run micro-steps; slower ones are measured on fewer sequences
AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- Arithmetic -----------------------------------------------------------------------------------------------------


def accumulation_steps(config: RunConfig, processes: int) -> tuple[int, int]:
    """(sequences per device and micro-step, micro-steps per optimizer step). UserError where they do not multiply out."""
    batch = config.training.batch_size
    if batch % processes:
        raise UserError(f"training.batch_size {batch} is not a multiple of the {processes} processes")
    share = batch // processes
    per_device = config.training.per_device_batch_size or share
    if share % per_device:
        raise UserError(f"training.batch_size {batch} on {processes} processes is {share} sequences each, which is not a multiple "
                        f"of per_device_batch_size {per_device}")
    return per_device, share // per_device


def milestones_between(config: RunConfig, before: int, now: int) -> list[str]:
    """Folder names of the milestones m with before < m <= now (words), ascending: none is skipped by a large step."""
    section = config.checkpoints
    words = {*section.extra_words, *(OFFICIAL_MILESTONES if section.milestones else [])}
    if every := section.every_words:
        words |= set(range((before // every + 1) * every, now + 1, every))
    return [milestone_name(count) for count in sorted(words) if before < count <= now]


def untrained_positions(model: torch.nn.Module, seq_len: int) -> int | None:
    """The first learned position that blocks of `seq_len` never train, if the evaluation reads that far; else None."""
    config = model.config
    short = seq_len < min(EVALUATION_TOKENS, config.max_position_embeddings)
    return seq_len + 1 if config.model_type in LEARNED_POSITIONS and short else None


# ---- Memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-step's forward pass keeps for its backward pass: activations, what dropout and the fused loss keep (gradients
    of states and head), and, under autocast, the weights' copies in its type.

    Attributes:
        kept: of the whole micro-step.
        block: that one block adds when it is computed again in the backward pass; 0 without gradient checkpointing.
    """

    kept: int
    block: int = 0

    @property
    def peak(self) -> int:
        """Most that there is at a time."""
        return self.kept + self.block


def activations(distiller: Distiller, data: "Data", per_device: int, precision: str, device: torch.device) -> dict[bool, Activations]:
    """`measured_activations` of a micro-step of stages 2 to 5; no teacher is run.

    Args:
        distiller: on its device.
        per_device: sequences at once.
    """
    student = distiller.student
    base = student.get_base_model() if hasattr(student, "get_base_model") else student  # what peft wraps
    return measured_activations(lambda count: saved_bytes(distiller, stand_in_batch(distiller, data, count, device), precision),
                                base, per_device, device)


def measured_activations(kept_by: Callable[[int], int], model: torch.nn.Module, most: int, device: torch.device) -> dict[bool, Activations]:
    """{gradient checkpointing: what a forward pass of `most` sequences keeps}, measured on two and four and carried on in a straight
    line, in which it grows. Random numbers that are drawn here are not missing afterwards.

    Args:
        kept_by: bytes that the forward pass of a number of sequences keeps.
        model: whose blocks are recomputed, or not.

    Returns:
        False and, where the model knows how to recompute its blocks, True.
    """
    few = sorted({min(count, most) for count in (2, 4)})  # some kernels keep odd numbers of them otherwise
    kept = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for recomputed in (False, True) if model.supports_gradient_checkpointing else (False,):
            with checkpointing(model, recomputed):
                found = [kept_by(count) for count in few]
            kept[recomputed] = found[0] + (found[-1] - found[0]) * (most - few[0]) // max(few[-1] - few[0], 1)
    depth = model.config.num_hidden_layers
    return {recomputed: Activations(size, round(max(0, kept[False] - size) / depth) if recomputed else 0)
            for recomputed, size in kept.items()}


def stand_in_batch(distiller: Distiller, data: "Data", count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The run's first `count` blocks, and random numbers for the states of teachers, so that these need not be run."""
    blocks = [data.train[item] for item in range(count)]
    batch = {name: torch.stack([block[name] for block in blocks]).to(device) for name in blocks[0]}
    shape = (count, data.train.seq_len - 1)
    for number, teacher in enumerate(distiller.teachers):
        for state in Teacher.wanted_states(distiller.section, teacher.entry, teacher.depth) if teacher.body is not None else ():
            batch[state_key(number, state)] = torch.randn(*shape, teacher.width, device=device)
    return batch


def saved_bytes(distiller: Distiller, batch: dict[str, torch.Tensor], precision: str) -> int:
    """Bytes of all that a micro-step's forward pass saves for its backward pass."""
    with models.mode(distiller, training=True), uncompiled(distiller):
        return saved_by(lambda: forward(distiller, batch, precision), weight_tensors(distiller))


def saved_by(function: Callable[[], torch.Tensor], weights: Iterable[torch.Tensor]) -> int:
    """Bytes of all that `function` saves for the backward pass of its result, each piece of memory once, `weights` left out."""
    saved: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()  # held, so that no later one takes its place
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()  # held, as what it saved is
        # Looked up only now: some weights of a sharded model are whole by now, and others have been given back (0 bytes).
        known = {parallel.local(part).untyped_storage().data_ptr() for part in weights}
        size = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in known)
        del result
    return size


def weight_tensors(distiller: Distiller) -> Iterator[torch.Tensor]:
    """All that is there before a step: parameters and buffers of student, terms and teachers, and the teachers' heads."""
    yield from distiller.parameters()
    yield from distiller.buffers()
    yield from teacher_tensors(distiller)


def teacher_tensors(distiller: Distiller) -> Iterator[torch.Tensor]:
    """Parameters and buffers of the teachers, and their heads in the type in which the loss reads them."""
    for teacher in distiller.teachers:
        if teacher.model is not None:
            yield from teacher.model.parameters()
            yield from teacher.model.buffers()
        yield from (part for part in teacher.head if part is not None)
    heads, joint = distiller._heads or ([], None)
    for head in [*heads, *([joint] if joint else [])]:
        yield from (part for part in head if part is not None)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind some tensors, each piece once; of sharded ones, this process's part."""
    storages = [parallel.local(part).untyped_storage() for part in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def gradient_bytes(trained: Iterable[torch.nn.Parameter], processes: int, accumulation: int, views: bool) -> int:
    """Bytes of gradients and of DDP's buckets, from which they are sent to the other processes.

    Args:
        accumulation: micro-steps per optimizer step.
        views: whether gradients lie in the buckets. Those of micro-steps that are not sent do not: they are made before a bucket
            is looked at.
    """
    trained = list(trained)
    total = storage_bytes(trained)
    newest = max((whole_bytes([parameter]) for parameter in trained), default=0)  # made beside what it is added or copied to
    buckets = total if processes > 1 and (accumulation > 1 or not views) else 0
    return total + buckets + (newest if processes > 1 or accumulation > 1 else 0)


def gathered_bytes(distiller: Distiller) -> int:
    """Bytes that a sharded distiller has on the device at most beside its shards (parallel.shard).

    Embeddings, head and terms are whole from the forward pass to the end of the backward pass, where their gradients are too,
    and then what is sent of these. Of the blocks, one is computed while the next one's weights arrive and the last one's
    gradients leave. Before that, a teacher's embeddings and two of its blocks.
    """
    def parts(module: torch.nn.Module) -> tuple[int, int]:
        whole, *blocks = (whole_bytes(part.parameters()) for part in module.modules() if isinstance(part, FSDPModule))
        return whole - sum(blocks), max(blocks)

    rest, block = parts(distiller)
    moments = [rest + 4 * block, 2 * rest + block]
    for teacher in distiller.teachers:
        if teacher.body is not None and not teacher.entry.device:
            theirs, of_theirs = parts(teacher.body)
            moments.append(theirs + 2 * of_theirs)
    return rest + max(moments)


def whole_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of parameters, sharded ones with all their parts."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def forward(distiller: Distiller, batch: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
    """The loss of a micro-batch, under the run's autocast."""
    with torch.autocast(batch["input_ids"].device.type, dtype=AUTOCAST[precision], enabled=precision != "fp32"):
        return distiller(**batch)["loss"]


def uncompiled(distiller: Distiller) -> AbstractContextManager:
    """Without torch.compile, which takes minutes for a shape. (Importing what switches it off takes a second, so only where it is on.)"""
    return torch.compiler.set_stance("force_eager") if distiller.compiled else nullcontext()


@contextmanager
def checkpointing(model: torch.nn.Module, on: bool) -> Iterator[None]:
    """With a model's blocks recomputed in the backward pass, or not; afterwards as it was."""
    before, entered = model.is_activation_checkpointing, bool(getattr(model, "_require_grads_hooks", None))

    def switch(wanted: bool) -> None:
        if wanted and not model.is_activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        elif not wanted and model.is_activation_checkpointing:
            model.activation_checkpointing_disable()

    switch(on)
    try:
        yield
    finally:
        switch(before)
        if not (before or entered):  # switched on, it makes frozen embeddings ask for gradients too, and goes on doing so
            model.disable_input_require_grads()


# ---- The plan of a run of stages 2 to 5 -----------------------------------------------------------------------------


@dataclass
class Plan:
    """What `training.train` is about to do, and the words for it.

    Args:
        folder: as `open` left it: with `resume_from`, the run goes on there.
        steps: optimizer steps of the whole run.
        per_device, accumulation: of each process (accumulation_steps).
        device: of the student.
    """

    config: RunConfig
    folder: RunFolder
    data: "Data"
    distiller: Distiller
    steps: int
    per_device: int
    accumulation: int
    device: torch.device

    def __post_init__(self) -> None:
        self.processes = PartialState().num_processes
        self.begin = int(self.folder.resume_from.name.split("-")[1]) if self.folder.resume_from else 0  # step to go on from

    def say(self, head: str, line: str) -> None:
        if self.folder.main:
            print(f"{head:<10} {line}", flush=True)

    def print(self) -> None:
        """What follows from config, data and models alone."""
        config, data, distiller = self.config, self.data, self.distiller
        training, seq_len = config.training, config.data.seq_len
        batch, tokens = training.batch_size, training.batch_size * seq_len
        trained = sum(p.numel() for _, p in trainable_parameters(distiller))
        with uncompiled(distiller):
            student_flops, teacher_flops = distiller.flops_per_token(seq_len)
        cached = " (states from the cache)" if any(teacher.model is None for teacher in distiller.teachers) else ""
        share = f", teaching {teacher_flops / (teacher_flops + student_flops):.0%} of it{cached}" if teacher_flops else ""
        total = (student_flops + teacher_flops) * tokens * self.steps
        self.say("model", f"{models.count_parameters(distiller.student):,} parameters, {trained:,} trained; "
                 f"{(student_flops + teacher_flops) / 1e6:,.1f} MFLOP per token{share}; {total:.2g} FLOP in all")
        guess = "; estimated from a sample of the text, whose token store is not built yet" if data.train.store.estimated else ""
        self.say("data", f"{data.train.store.meta['words']:,} words = {len(data.train.store):,} tokens = "
                 f"{data.train.blocks_per_epoch:,} blocks of {seq_len}; validation on {len(data.val):,} blocks{guess}")
        self.say("batch", f"{batch} sequences = {self.processes} process(es) x {self.per_device} x {self.accumulation} accumulation; "
                 f"{tokens:,} tokens a step")
        self.say("budget", f"{self.steps:,} steps = {len(data.train) / data.train.blocks_per_epoch:.2f} epochs = {self.words:,} words seen")
        if config.model.init == "random" and (untrained := untrained_positions(distiller.student, seq_len)):
            self.say("warning", f"data.seq_len {seq_len}: the student's positions from {untrained} on stay random, but the official "
                     f"evaluation reads up to {EVALUATION_TOKENS} tokens at once")
        if training.eval_tasks and not milestones_between(config, 0, self.words):
            self.say("warning", f"training.eval_tasks: no milestone within {self.words:,} words, so nothing will be scored: "
                     "checkpoints.extra_words or every_words makes some")
        if training.warmup_steps >= self.steps:
            self.say("warning", f"training.warmup_steps {training.warmup_steps} >= {self.steps} steps: the peak learning rate is never "
                     "used")
        self.say("objective", distiller.describe(seq_len))
        compiled = ", compiled" if training.compile else ""
        self.say("device", f"{self.device}, {training.precision}{compiled}, {torch.get_num_threads()} CPU threads")

    @cached_property
    def words(self) -> int:
        """Words of the whole run, repeats counted."""
        return self.data.train.words_through(len(self.data.train))

    # -- memory and disk

    def print_memory(self) -> None:
        """What a process will hold while it trains; measured, so the models must be where they will be trained."""
        training, distiller = self.config.training, self.distiller
        if not (self.folder.main or distiller.sharded):  # all must take part where weights are gathered
            return
        found = activations(distiller, self.data, self.per_device, training.precision, self.device)
        if distiller.sharded:
            distiller.reshard()  # no backward pass has done it
        here, other = (found.get(on) for on in (training.gradient_checkpointing, not training.gradient_checkpointing))
        weights = storage_bytes([*distiller.parameters(), *distiller.buffers()])
        parameters = [parameter for _, parameter in trainable_parameters(distiller)]
        moments = 2 * storage_bytes(parameters)
        if distiller.sharded:  # the processes exchange gradients after every micro-step, block by block
            gradients, gathered = storage_bytes(parameters), gathered_bytes(distiller)
        else:
            gradients, gathered = gradient_bytes(parameters, self.processes, self.accumulation, views=True), 0
        teachers, elsewhere = (storage_bytes(part for part in teacher_tensors(distiller) if (part.device.type == self.device.type) is on_it)
                               for on_it in (True, False))  # elsewhere: distillation.offload_teacher
        logits = self._logit_bytes()
        total = weights + gradients + moments + gathered + teachers + here.peak + logits
        alternative = f"; {amount(other.peak)} with{'out' * training.gradient_checkpointing} gradient_checkpointing" if other else ""
        each = " in each process" if self.processes > 1 else ""
        self.say("memory", f"{amount(total)}{each} = weights {amount(weights)} + gradients {amount(gradients)} + Adam {amount(moments)}"
                 + (f" + gathered {amount(gathered)}" if gathered else "") + (f" + teacher {amount(teachers)}" if teachers else "")
                 + f" + logits {amount(logits)} + activations {amount(here.peak)} ({self.per_device} x {self.config.data.seq_len} tokens "
                 f"at once{', before compilation' * training.compile}{alternative})"
                 + (f"; {amount(elsewhere)} of teachers wait in host memory" if elsewhere else ""))

    def _logit_bytes(self) -> int:
        """What the fused loss holds of the student's and the teachers' logits at a time; whole ones count as activations."""
        distiller, entries = self.distiller, self.distiller.student.get_output_embeddings().weight.shape[0]
        rows = min(self.per_device * (self.config.data.seq_len - 1), tokens_at_once(entries, self.device.type))
        heads, joint = distiller._heads or ([], None)
        own = distiller._halves[1] is not None
        return (own + (1 if joint else len(heads))) * rows * entries * AUTOCAST[self.config.training.precision].itemsize

    def needed(self) -> list[tuple[str, Path, int]]:
        """(what, where to, bytes) of the files that are still to be written, as they lie side by side at the fullest moment."""
        config, section, root = self.config, self.config.checkpoints, self.folder.root
        trained = sum(p.numel() * p.element_size() for _, p in trainable_parameters(self.distiller))
        lora = getattr(config, "lora", None)
        as_adapter = lora is not None and lora.mode != "none" and not lora.merge_adapter
        model = trained if as_adapter else 4 * models.count_parameters(self.distiller.student)
        model += len(self.data.tokenizer.backend_tokenizer.to_str())
        milestones = milestones_between(config, self.data.train.words_through(self.begin * config.training.batch_size), self.words)
        there = 0 if self.begin == 0 else len(self.folder.checkpoints())
        saves = (self.steps - 1) // section.save_steps - self.begin // section.save_steps
        resume = max(0, min(section.keep, saves + there) + 1 - there)  # one more while it is written, or when a signal comes
        models_kept = 3 if section.final == "best" else 1  # the best so far, and the next one beside it
        found = [(f"{len(milestones)} milestone(s)", root, len(milestones) * model),
                 (f"{resume} resume checkpoint(s)", root, resume * 3 * trained), ("final model", root, models_kept * model)]
        stores = [self.data.train.store, self.data.val.store]
        tokens = {store.folder: len(store) * (store.ids.itemsize + 1) for store in stores if not store.folder.is_dir()}
        return [*found, *(("token store", folder, size) for folder, size in tokens.items())]

    # -- dry run

    def rehearse(self) -> None:
        """The rest of a dry run: the folder, the disk, and the time, by a few micro-steps of the real thing.

        Raises:
            UserError: what is to be written does not fit on the disk.
        """
        self.say("folder", describe_folder(self.folder, self.begin, self.steps))
        self.say("disk", disk(self.needed(), self.folder))
        with uncompiled(self.distiller):
            self._measure()
        say_nothing_written(self.folder)

    def _measure(self) -> None:
        config, training, data, distiller = self.config, self.config.training, self.data, self.distiller
        distiller.progress = 0.5  # a term whose schedule begins or ends at 0 is computed in between
        distiller.train()
        parameters = [parameter for _, parameter in trainable_parameters(distiller)]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(training.beta1, training.beta2), fused=True)

        def micro_step(count: int) -> None:
            blocks = [data.train[item % len(data.train)] for item in range(count)]
            batch = {name: torch.stack([block[name] for block in blocks]).to(self.device) for name in blocks[0]}
            forward(distiller, batch, training.precision).backward()

        def optimizer_step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, training.grad_clip or math.inf)
            optimizer.step()

        @torch.no_grad()
        def validate(count: int) -> None:
            blocks = [data.val[item % len(data.val)] for item in range(count)]
            batch = {name: torch.stack([block[name] for block in blocks]).to(self.device) for name in blocks[0] if name != "domains"}
            with torch.autocast(self.device.type, dtype=AUTOCAST[training.precision], enabled=training.precision != "fp32"):
                distiller.token_terms(**batch)
            if distiller.sharded:
                distiller.reshard()

        micro, count = per_sequence(micro_step, self.per_device, self.device)
        optimizer_step()  # its moments are made in the first one
        update = seconds(optimizer_step, self.device)
        distiller.eval()
        block, _ = per_sequence(validate, self.per_device, self.device)
        steps = self.steps - self.begin
        each = self.accumulation * self.per_device * micro + update
        validations = len([step for step in range(self.begin + 1, self.steps + 1)
                           if step % config.logging.eval_steps == 0 or step == self.steps])
        validation = math.ceil(len(data.val) / self.processes) * block
        part = "" if count == self.per_device else f", measured on {count} of them and scaled"
        alone = "" if self.processes == 1 else f" on {self.processes} processes, without what they say to each other"
        without = " and scores at milestones" if training.eval_tasks else ""
        eager = ", not compiled" * training.compile
        self.say("step", f"{self.accumulation} micro-step(s) of {micro * self.per_device:.3g} s ({self.per_device} sequences{part}{eager}) "
                 f"+ optimizer {update:.2g} s = {each:.3g} s; {training.batch_size * config.data.seq_len / each / 1000:,.1f}K tok/s")
        self.say("time", f"about {clock(steps * each + validations * validation)}{alone} = {steps:,} steps {clock(steps * each)} + "
                 f"{validations} validation(s) {clock(validations * validation)}; saving{without} not counted")
        self.say("used", peak_memory(self.device))


def describe_folder(folder: RunFolder, begin: int, steps: int | None = None) -> str:
    """Where a run would be written, and what it would do with what is there."""
    of = f" of {steps:,}" if steps else ""
    state = f"goes on from {folder.resume_from} (step {begin:,}{of})" if folder.resume_from else "starts at step 0"
    if folder.config.fresh and folder.root.exists():
        return f"{folder.root}: what is there is moved aside (fresh); {state}"
    return f"{folder.root}: {'exists' if folder.root.exists() else 'new'}; {state}"


def require_disk(needed: list[tuple[str, Path, int]]) -> None:
    """UserError where what a run is to write does not fit on its disk."""
    require_space(needed, "free some space, choose another output=, or keep fewer checkpoints (checkpoints.keep, milestones, extra_words, "
                  "every_words)")


def disk(needed: list[tuple[str, Path, int]], folder: RunFolder) -> str:
    """What is to be written, in words. UserError where it does not fit."""
    require_disk(needed)
    return (f"{amount(sum(size for *_, size in needed))} = " + " + ".join(f"{what} {amount(size)}" for what, _, size in needed)
            + f"; {amount(free_bytes(folder.root))} free in {existing_parent(folder.root)}")


def say_nothing_written(folder: RunFolder) -> None:
    """The last line of a dry run."""
    if folder.main:
        print("dry run    all is well, and nothing was written; the same command without --dry_run trains", flush=True)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of a call, work of a GPU included; of several processes, which must all call it, that of the slowest."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    spent = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(spent, torch.distributed.ReduceOp.MAX)
    return spent.item()


def per_sequence(step: Callable[[int], None], most: int, device: torch.device) -> tuple[float, int]:
    """(seconds per sequence, sequences at once) of `step(sequences)`: the median of three after a warm-up, on `most` sequences or,
    where that would take longer than MEASURE_SECONDS, on fewer; a single one that takes so long alone is not repeated."""
    first = seconds(lambda: step(1), device)
    if most == 1 or first * 4 > MEASURE_SECONDS:
        again = [] if first * 4 > MEASURE_SECONDS else [seconds(lambda: step(1), device) for _ in range(3)]
        return statistics.median(again or [first]), 1
    second = seconds(lambda: step(1), device)  # without what only the first one has to do
    count = max(1, min(most, int(MEASURE_SECONDS / 4 / second)))
    step(count)
    return statistics.median(seconds(lambda: step(count), device) for _ in range(3)) / count, count


def clock(length: float) -> str:
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(length)))


def peak_memory(device: torch.device) -> str:
    """What this process has held at most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = f"{amount(torch.cuda.max_memory_allocated(device))} of GPU memory and " if device.type == "cuda" else ""
    return f"{gpu}{amount(peak)} of memory at most while this was measured, libraries included"
