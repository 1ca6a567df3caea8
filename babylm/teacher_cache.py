"""A teacher's hidden states on disk, read instead of running it.

    python -m babylm.teacher_cache --config configs/cpu/student.yaml distillation.cache=true

runs every teacher of a student's config once over every block that its run will see, and over the validation blocks, and
stores the states that its terms read: always the last one, which the output head turns into the exact logits at any
temperature and for any divergence, and those that `hidden` maps. With `distillation.cache: true` the student then loads the
teacher's head alone. Run the same command again and a capture that was stopped goes on; what is there is not made again. Of several
processes that are started at once, such as a job for each seed, the first captures and the others wait, also on other nodes that
share `cache_path`; where each node has one of its own, each captures.

    <cache_path>/<teacher>/             keyed by the teacher's weights, the tokenizer, precision and stored type
        head.safetensors  meta.json     output head; depth, width and the key in words
        <blocks>/                       keyed by the token store, block length, offset (or validation sample)
            state-<i>.bin               [blocks, T-1, width], memory-mapped; `state-<i>.partial` while it is being made

Capture computes batches of the size that training uses, so that on a CPU a cached run's loss equals the online one bit for
bit: in fp32, and in bf16 too, because the output head rounds its input to bf16 anyway. States that `hidden` maps are
stored rounded in bf16; cache_dtype: fp32 keeps them whole.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from babylm import models, plan, training
from babylm.config import StudentConfig, TeacherEntry, student_schema
from babylm.distillation import Teacher, state_key
from babylm.losses import Head
from babylm.run_folder import Preempted, StopRequest, require_finished, run_stage, write_json
from babylm.schema import DRY_RUN, UserError, content_hash, load
from custom_dataset import tokenizer_fingerprint

STORED = {"bf16": (torch.bfloat16, np.uint16), "fp16": (torch.float16, np.float16), "fp32": (torch.float32, np.float32)}


# ---- What there is to store -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """One fixed sequence of token blocks: a layout of the training text, or the validation sample."""

    name: str
    count: int
    key: dict
    read: Callable[[int], torch.Tensor]  # block number -> [T] ids


def block_sequences(data: training.Data) -> dict[int | str, Blocks]:
    """Every sequence of blocks that a run reads: {layout: ...} of training, and {"val": ...}."""
    train, val = data.train, data.val
    shape = {"seq_len": train.seq_len, "store": train.store.meta["files"]["ids.bin"]}
    found: dict[int | str, Blocks] = {
        layout: Blocks(f"layout {layout}", train.blocks_per_epoch,
                       {**shape, "offset": train.offset(layout), "blocks": train.blocks_per_epoch},
                       lambda block, layout=layout: train.block(layout, block))
        for layout in train.layouts()}
    sample = {"seq_len": val.seq_len, "store": val.store.meta["files"]["ids.bin"], "sample": val.blocks.tolist()}
    found["val"] = Blocks("validation", len(val), sample, lambda block: val.block(block))
    return found


@dataclass(frozen=True)
class TeacherFolder:
    """Where one teacher's states lie."""

    root: Path
    dtype: str
    key: dict

    def folder(self, blocks: Blocks) -> Path:
        return self.root / content_hash(blocks.key)

    def file(self, blocks: Blocks, state: int) -> Path:
        return self.folder(blocks) / f"state-{state}.bin"

    def block_bytes(self, blocks: Blocks, width: int) -> int:
        return (blocks.key["seq_len"] - 1) * width * plan.AUTOCAST[self.dtype].itemsize

    def whole(self, blocks: Blocks, state: int, width: int) -> bool:
        file = self.file(blocks, state)
        return file.is_file() and file.stat().st_size == blocks.count * self.block_bytes(blocks, width)


def teacher_folder(config: StudentConfig, entry: TeacherEntry, tokenizer_hash: str) -> TeacherFolder:
    """The cache folder of a teacher under this config: another teacher, vocabulary, precision or type has another."""
    section = config.distillation
    dtype = config.training.precision if section.cache_dtype == "auto" else section.cache_dtype
    key = {"weights": models.weights_fingerprint(entry.path), "tokenizer": tokenizer_hash,
           "precision": config.training.precision, "dtype": dtype}
    root = Path(section.cache_path or Path(config.data.corpus) / "teacher_cache")
    return TeacherFolder(root / f"{Path(entry.path).name}-{content_hash(key)}", dtype, key)


# ---- Capture --------------------------------------------------------------------------------------------------------


def main() -> None:
    config, _ = load(student_schema, "configs/10M/student.yaml", __doc__, flags=DRY_RUN)
    if not config.distillation.entries:
        raise UserError("distillation: the config has no teacher, so there is nothing to cache")
    device = training.start_process(config)
    for entry in config.distillation.entries:
        require_finished(entry.path, "teacher cache: distillation.teacher")
    data = training.load_data(config)
    tokenizer_hash = tokenizer_fingerprint(data.tokenizer)
    folders = [teacher_folder(config, entry, tokenizer_hash) for entry in config.distillation.entries]
    shapes = [_shape(entry.path) for entry in config.distillation.entries]
    wanted = [Teacher.wanted_states(config.distillation, entry, depth)
              for entry, (depth, _) in zip(config.distillation.entries, shapes, strict=True)]
    sequences = list(block_sequences(data).values())

    missing, total = 0, 0
    for entry, folder, (_, width), states in zip(config.distillation.entries, folders, shapes, wanted, strict=True):
        for blocks in sequences:
            size = blocks.count * folder.block_bytes(blocks, width)
            absent = sum(size - _partial_bytes(folder.file(blocks, state)) for state in states if not folder.whole(blocks, state, width))
            total, missing = total + size * len(states), missing + absent
            print(f"cache      {entry.path}, {blocks.name}: {blocks.count:,} blocks, states {', '.join(map(str, states))}, "
                  f"{size * len(states) / 1e9:.2f} GB{'' if absent else ', complete'}")
    _require_space(folders[0].root.parent, missing)
    print(f"cache      {total / 1e9:.2f} GB in all, {missing / 1e9:.2f} GB to be made in {folders[0].root.parent}", flush=True)
    if not missing:
        return
    stop = None if config.dry_run else StopRequest()
    for entry, folder, (depth, width), states in zip(config.distillation.entries, folders, shapes, wanted, strict=True):
        if config.dry_run:
            if todo := [blocks for blocks in sequences if not all(folder.whole(blocks, state, width) for state in states)]:
                _print_time(config, _load(config, entry, data, device), todo, states, device)
            continue
        with _alone(folder.root, stop):
            if all(folder.whole(blocks, state, width) for blocks in sequences for state in states):
                continue
            teacher = _load(config, entry, data, device)
            save_file({name: part.detach().cpu().contiguous() for name, part in teacher.head._asdict().items() if part is not None},
                      folder.root / ".head.tmp")
            os.replace(folder.root / ".head.tmp", folder.root / "head.safetensors")
            write_json(folder.root / "meta.json", {"teacher": entry.path, "depth": depth, "width": width, **folder.key})
            per_device, _ = training.accumulation_steps(config, 1)
            for blocks in sequences:
                absent = [state for state in states if not folder.whole(blocks, state, width)]
                if absent:
                    _capture(teacher, folder, blocks, absent, per_device, plan.AUTOCAST[config.training.precision], device, stop)
    print("cache      complete" if not config.dry_run else "dry run    all is well, and nothing was written", flush=True)


def _load(config: StudentConfig, entry: TeacherEntry, data: training.Data, device: torch.device) -> Teacher:
    teacher = Teacher.from_model(models.load_teacher(entry.path, data.tokenizer), entry)
    training.require_positions(f"teacher {entry.path}", teacher.model, config.data.seq_len)
    teacher.to(device, config.distillation.offload_teacher)
    return teacher


@torch.no_grad()
def _print_time(config: StudentConfig, teacher: Teacher, todo: list[Blocks], states: list[int], device: torch.device) -> None:
    """How long it takes to run a teacher over the blocks of `todo`, measured on a few."""
    precision, left = plan.AUTOCAST[config.training.precision], sum(blocks.count for blocks in todo)

    def capture(count: int) -> None:
        ids = torch.stack([todo[0].read(block % todo[0].count) for block in range(count)]).to(device)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            teacher.states(ids, states)

    seconds, count = plan.per_sequence(capture, training.accumulation_steps(config, 1)[0], device)
    print(f"cache      {teacher.entry.path}: about {plan.clock(left * seconds)} for {left:,} blocks (measured on {count} at once)",
          flush=True)


@contextmanager
def _alone(folder: Path, stop: StopRequest) -> Iterator[None]:
    """Hold the lock of a teacher's folder; wait for it as long as another process captures, or until a signal asks to stop."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, waiting = FileLock(folder / "lock"), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1 if waiting else 0)
        except Timeout:
            if not waiting:
                print(f"cache      another process is capturing {folder}: waiting for it", flush=True)
            if stop:
                raise Preempted(f"{stop.signal_name} while another process captured {folder}; the same command starts again") from None
            waiting = True
    try:
        yield
    finally:
        lock.release()


def _shape(path: str) -> tuple[int, int]:
    """(blocks, width) of a teacher, from its config alone."""
    config = models.load_config(path)
    return config.num_hidden_layers, config.hidden_size


def _partial_bytes(file: Path) -> int:
    partial = file.with_suffix(".partial")
    return partial.stat().st_size if partial.is_file() else 0


def _require_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in [folder, *folder.resolve().parents] if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(f"the teacher cache needs {needed / 1e9:.1f} GB more in {folder}, but {free / 1e9:.1f} GB are free: give "
                        "distillation.cache_path on a larger disk, a smaller data.offset_cycle (each layout is stored), or cache=false")


@torch.no_grad()
def _capture(teacher: Teacher, folder: TeacherFolder, blocks: Blocks, states: list[int], batch: int, precision: torch.dtype,
             device: torch.device, stop: StopRequest) -> None:
    """Append states block by block to `.partial` files, from where the shortest of them ends; rename them when complete."""
    where = folder.folder(blocks)
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / "blocks.json", {"name": blocks.name, "blocks": blocks.count, **blocks.key, "sample": "..."})
    size = folder.block_bytes(blocks, teacher.width)
    files = {state: folder.file(blocks, state) for state in states}
    with ExitStack() as opened:
        begin = min(_partial_bytes(file) for file in files.values()) // size // batch * batch  # batches as training has them
        streams = {state: opened.enter_context(open(file.with_suffix(".partial"), "ab")) for state, file in files.items()}
        for stream in streams.values():
            stream.truncate(begin * size)
        bar = opened.enter_context(tqdm(total=blocks.count, initial=begin, unit=" blocks", desc=blocks.name,
                                        disable=not sys.stderr.isatty()))
        began, said = time.monotonic(), time.monotonic()
        for start in range(begin, blocks.count, batch):
            stop_at = min(start + batch, blocks.count)
            ids = torch.stack([blocks.read(block) for block in range(start, stop_at)]).to(device)
            with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                found = teacher.states(ids, states)
            for state, values in found.items():
                streams[state].write(_bytes(values, folder.dtype))
            done = stop_at
            bar.update(len(ids))
            if time.monotonic() - said > 20 and bar.disable:
                said = time.monotonic()
                rate = (done - begin) / (said - began)
                left = timedelta(seconds=round((blocks.count - done) / rate))
                print(f"cache      {teacher.entry.path}, {blocks.name}: {done:,}/{blocks.count:,} blocks | "
                      f"{rate * ids.shape[1] / 1000:,.1f}K tok/s | {left} left", flush=True)
            if stop and done < blocks.count:
                raise Preempted(f"{stop.signal_name} after {done:,} of {blocks.count:,} blocks; the same command continues there")
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
        for file in files.values():
            os.replace(file.with_suffix(".partial"), file)


def _bytes(values: torch.Tensor, dtype: str) -> bytes:
    torch_type, numpy_type = STORED[dtype]
    stored = values.to(torch_type).cpu().contiguous()
    if not stored.isfinite().all():
        raise UserError(f"a state of the teacher does not fit {dtype} (infinite or NaN): use distillation.cache_dtype=bf16 or fp32")
    return (stored.view(torch.uint16) if numpy_type is np.uint16 else stored).numpy().tobytes()  # numpy knows no bfloat16


# ---- Reading --------------------------------------------------------------------------------------------------------


def open_teachers(config: StudentConfig, data: training.Data) -> list[Teacher]:
    """The teachers that a student's config names: whole models, or with `cache: true` heads whose states come with the data.

    In that case `data.train` and `data.val` get the states beside each block.

    Raises:
        UserError: a part of the cache is missing or cut short; the message names the command that makes it.
    """
    section, tokenizer_hash = config.distillation, tokenizer_fingerprint(data.tokenizer)
    if not section.cache:
        return [Teacher.from_model(models.load_teacher(entry.path, data.tokenizer), entry) for entry in section.entries]
    sequences = block_sequences(data)
    teachers, readers = [], []  # readers: (key in the batch, {layout or "val": memory map}, stored type)
    for number, entry in enumerate(section.entries):
        folder = teacher_folder(config, entry, tokenizer_hash)
        if not (folder.root / "meta.json").is_file() or not (folder.root / "head.safetensors").is_file():
            raise UserError(_missing(f"the states of {entry.path} (with these weights, this vocabulary and precision) are not in "
                                     f"{folder.root.parent}"))
        meta, head = json.loads((folder.root / "meta.json").read_text(encoding="utf-8")), load_file(folder.root / "head.safetensors")
        teachers.append(Teacher(Head(head["weight"], head.get("bias")), meta["depth"], meta["width"], entry=entry))
        for state in Teacher.wanted_states(section, entry, meta["depth"]):
            maps = {}
            for name, blocks in sequences.items():
                file = folder.file(blocks, state)
                if not file.is_file():
                    raise UserError(_missing(f"{blocks.name} of state {state} of {entry.path} has not been captured (or not to its end)"))
                if not folder.whole(blocks, state, meta["width"]):
                    raise UserError(_missing(f"{file} is cut short: {file.stat().st_size:,} bytes instead of "
                                             f"{blocks.count * folder.block_bytes(blocks, meta['width']):,}"))
                shape = (blocks.count, config.data.seq_len - 1, meta["width"])
                maps[name] = np.memmap(file, dtype=STORED[folder.dtype][1], mode="r", shape=shape)
            readers.append((state_key(number, state), maps, STORED[folder.dtype][0]))

    def states(layout: int | str, block: int) -> dict[str, torch.Tensor]:
        return {key: torch.from_numpy(np.array(maps[layout][block])).view(torch_type) for key, maps, torch_type in readers}

    data.train.extras = states
    data.val.extras = lambda block: states("val", block)
    return teachers


def _missing(what: str) -> str:
    arguments = shlex.join(argument for before, argument in zip(sys.argv, sys.argv[1:], strict=False)
                           if not argument.startswith("--resume_path") and before != "--resume_path")
    return (f"distillation.cache is true, but {what}. Make it with: python -m babylm.teacher_cache {arguments}\n"
            "(or run the teacher: distillation.cache=false)")


if __name__ == "__main__":
    run_stage(main)
