"""A whole training step: forward, backward, clipping, AdamW. What the teacher costs, what its cache saves, what else matters.

    python -m benchmarks.step [--precision bf16] [--rounds 5] [--compile] [--json FILE] [--quick]
    python -m benchmarks.step --preset gpt2 --device cuda        GPT-2 Large teaches GPT-2 Small at 512 tokens; random weights

Ways, all with the same student, batch and optimizer (w_ce = w_kl = 0.5, T = 2 where there is a teacher):

    CE only                 no teacher: the floor
    online, plain loss      the teacher is run, and the loss is taken on whole logits (benchmarks.loss)
    online                  the teacher is run; the project's Distiller with its fused loss
    cached                  its states are read from the memory-mapped files of babylm.teacher_cache; its head is computed
    two teachers, online    the mean of two teachers' logits; ... and cached

Before anything is timed, the losses are compared: cached against online (bit for bit on a CPU), fused against plain.

The preset for CPUs is GPT-2 Large and Small at a quarter of their width: as there, the teacher's forward pass is about two
thirds of the online step's FLOPs. MFU counts the FLOPs of the models (Kaplan et al. 2020) against --peak_tflops.
The ablations change one thing at a time in the cached step, the cheapest with a teacher, where overheads show most.
"""

import argparse
import copy
import gc
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from babylm import models, plan, teacher_cache, training
from babylm.config import DistillationSection, TeacherEntry
from babylm.distillation import CROSS_ENTROPY, Distiller, Teacher, state_key
from babylm.losses import LogitObjective
from babylm.run_folder import StopRequest
from babylm.schema import fixed
from benchmarks import measure
from benchmarks.loss import plain_loss

OBJECTIVE = LogitObjective(w_ce=0.5, w_kl=0.5, temperature=2.0)
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # relative, of the loss: fused against plain, and on a GPU cached against online
BARS = {"online_over_cached": 2.4, "cached_over_ce": 1.2}  # on a CPU


@dataclass(frozen=True)
class Shape:
    """Models as (layers, width, heads), and the batch."""

    student: tuple[int, int, int] = (12, 192, 3)
    teacher: tuple[int, int, int] = (36, 320, 5)
    second_teacher: tuple[int, int, int] = (24, 256, 4)
    vocabulary: int = 12_564
    seq_len: int = 128
    batch: int = 8


PRESETS = {"cpu": Shape(), "gpt2": Shape((12, 768, 12), (36, 1280, 20), (24, 1024, 16), 50_257, 512, 32),
           "quick": Shape((2, 32, 2), (3, 48, 2), (2, 32, 2), 300, 16, 2)}


@dataclass(frozen=True)
class Way:
    """One way to make a step."""

    teachers: int = 1
    cached: bool = False
    plain: bool = False
    compiled: bool = False
    precision: str = "bf16"
    attention: str = "sdpa"
    adamw: str = "fused"
    micro_batches: int = 1
    item: bool = False  # read the loss after every micro-batch


WAYS = {"CE only": Way(teachers=0), "online, plain loss": Way(plain=True), "online": Way(), "cached": Way(cached=True),
        "two teachers, online": Way(teachers=2), "two teachers, cached": Way(teachers=2, cached=True)}
COMPILED = ("CE only", "online", "cached")


# ---- Models and steps -----------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The models that all ways start from, one batch of tokens, and the teachers' cached states of it."""

    shape: Shape
    device: str
    folder: Path
    teachers: list[Teacher] = field(default_factory=list)
    cached_files: dict = field(default_factory=dict)  # (teacher, precision) -> memory map

    def __post_init__(self):
        for number, shape in enumerate((self.shape.teacher, self.shape.second_teacher)):
            teacher = Teacher.from_model(self.model(shape, seed=number + 1), TeacherEntry(path=f"teacher{number + 1}"))
            teacher.to(torch.device(self.device))
            self.teachers.append(teacher)
        generator = torch.Generator().manual_seed(0)
        self.blocks = torch.randint(self.shape.vocabulary, (self.shape.batch, self.shape.seq_len), generator=generator)

    def model(self, shape: tuple[int, int, int], seed: int, attention: str = "sdpa") -> GPT2LMHeadModel:
        layers, width, heads = shape
        torch.manual_seed(seed)
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=self.shape.seq_len, vocab_size=self.shape.vocabulary,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation=attention)
        return GPT2LMHeadModel(config).to(self.device)

    def states(self, number: int, precision: str) -> np.memmap:
        """A teacher's last states of the batch, captured into a file as `babylm.teacher_cache` does it."""
        if (number, precision) not in self.cached_files:
            teacher = self.teachers[number]
            folder = teacher_cache.TeacherFolder(self.folder / f"teacher{number}-{precision}", precision, {})
            blocks = teacher_cache.Blocks("benchmark", self.shape.batch, {"seq_len": self.shape.seq_len}, lambda block: self.blocks[block])
            teacher_cache._capture(teacher, folder, blocks, [teacher.depth], self.shape.batch, plan.AUTOCAST[precision],
                                   torch.device(self.device), StopRequest())
            shape = (self.shape.batch, self.shape.seq_len - 1, teacher.width)
            self.cached_files[number, precision] = np.memmap(folder.file(blocks, teacher.depth), mode="r", shape=shape,
                                                             dtype=teacher_cache.STORED[precision][1])
        return self.cached_files[number, precision]


def without_body(teacher: Teacher) -> Teacher:
    return Teacher(teacher.head, teacher.depth, teacher.width, entry=teacher.entry)


class Step:
    """A student, its optimizer, and `self()`: one training step of a way."""

    def __init__(self, bench: Bench, way: Way):
        self.bench, self.way = bench, way
        teachers = bench.teachers[: way.teachers]
        if way.cached:
            for number in range(way.teachers):
                bench.states(number, way.precision)
            teachers = [without_body(teacher) for teacher in teachers]
        elif way.compiled:  # compiling changes a module in place
            teachers = [Teacher.from_model(copy.deepcopy(teacher.model), teacher.entry) for teacher in teachers]
        student = bench.model(bench.shape.student, seed=0, attention=way.attention).train()
        section = CROSS_ENTROPY if not teachers else DistillationSection(
            w_ce=fixed(OBJECTIVE.w_ce), w_kl=fixed(OBJECTIVE.w_kl), temperature=fixed(OBJECTIVE.temperature),
            teachers=[teacher.entry for teacher in teachers])
        self.distiller = Distiller(student, teachers, section, compiled=way.compiled)
        self.halves = models.body_and_head(student)
        kind = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}[way.adamw]
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.1, **kind)

    def batch(self) -> dict[str, torch.Tensor]:
        """As the data loader makes it: block by block from the files, stacked, brought to the device."""
        items = []
        for block in range(self.bench.shape.batch):
            item = {"input_ids": self.bench.blocks[block]}
            for number in range(self.way.teachers if self.way.cached else 0):
                values = torch.from_numpy(np.array(self.bench.states(number, self.way.precision)[block]))
                item[state_key(number, self.bench.teachers[number].depth)] = values.view(teacher_cache.STORED[self.way.precision][0])
            items.append(item)
        return {name: values.to(self.bench.device, non_blocking=True) for name, values in training.collate(items).items()}

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.bench.device, dtype=torch.bfloat16, enabled=self.way.precision == "bf16"):
            if not self.way.plain:
                return self.distiller(**batch)["loss"]
            ids, (teacher,) = batch["input_ids"], self.distiller.teachers
            body, head = self.halves
            states = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            theirs = teacher.states(ids, [teacher.depth])[teacher.depth].flatten(0, 1)
            return plain_loss(states, head.weight, theirs, teacher.head.weight, ids[:, 1:].flatten(), OBJECTIVE)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        batch = self.batch()
        parts = [dict(zip(batch, values, strict=True)) for values in zip(*(value.chunk(self.way.micro_batches) for value in batch.values()),
                                                                         strict=True)]
        for part in parts:
            loss = self.loss(part) / len(parts)
            loss.backward()
            if self.way.item:
                loss.item()
        torch.nn.utils.clip_grad_norm_(self.distiller.student.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def first_loss(self) -> float:
        return self.loss(self.batch()).item()

    def flops(self) -> tuple[float, float]:
        """Of a step: the student's, forward and backward, and the teachers' (their heads', where the states are cached)."""
        shape = self.bench.shape
        student = 3 * models.forward_flops_per_token(self.distiller.student, shape.seq_len)
        teachers = sum(teacher.flops_per_token(shape.seq_len) for teacher in self.distiller.teachers)
        return student * shape.batch * shape.seq_len, teachers * shape.batch * shape.seq_len


# ---- Equality -------------------------------------------------------------------------------------------------------


def check(steps: dict[str, Step], precision: str, device: str) -> dict[str, float]:
    """Losses of the untrained students. SystemExit where two ways that should agree do not."""
    found = {name: step.first_loss() for name, step in steps.items()}
    pairs = [("online", "online, plain loss", TOLERANCE[precision]), ("online, compiled", "online", TOLERANCE[precision]),
             ("CE only, compiled", "CE only", TOLERANCE[precision]), ("cached, compiled", "cached", TOLERANCE[precision])]
    exact = 0.0 if device == "cpu" else TOLERANCE[precision]
    pairs += [("cached", "online", exact), ("two teachers, cached", "two teachers, online", exact)]
    for mine, reference, allowed in pairs:
        if mine in found and reference in found and not abs(found[mine] - found[reference]) <= allowed * found[reference]:
            raise SystemExit(f"not equal: {mine} has the loss {found[mine]:.8f}, {reference} has {found[reference]:.8f}; "
                             f"relative difference allowed: {allowed:g}")
    return found


# ---- The ablations --------------------------------------------------------------------------------------------------


def ablations(bench: Bench, base: Way, rounds: int, device: str, with_compile: bool) -> list[dict]:
    """One thing at a time in the cached step; each group's first row is its reference."""
    micro = min(4, bench.shape.batch)
    groups = {"precision": {"fp32": replace(base, precision="fp32"), "bf16 autocast": replace(base, precision="bf16")},
              "attention": {"eager": replace(base, attention="eager"), "SDPA": base},
              f"{micro} micro-batches": {".item() after each": replace(base, micro_batches=micro, item=True),
                                         "read once": replace(base, micro_batches=micro)}}
    if with_compile:
        groups["torch.compile"] = {"off": base, "on": replace(base, compiled=True)}
    rows = []
    for name, ways in groups.items():
        steps = {setting: Step(bench, way) for setting, way in ways.items()}
        rows += _group(name, measure.interleave(steps, rounds, device))
    updates: dict[str, Callable] = {}
    for kind in ("for-loop", "foreach", "fused"):
        step = Step(bench, replace(base, adamw=kind))
        step()  # gradients
        updates[kind] = step.optimizer.step
    return rows + _group("AdamW update alone", measure.interleave(updates, 3 * rounds, device))


def _group(name: str, times: dict[str, list[float]]) -> list[dict]:
    reference = next(iter(times.values()))
    return [{"what": name, "setting": setting, **measure.against(values, reference)} for setting, values in times.items()]


# ---- The table ------------------------------------------------------------------------------------------------------


def memory_of(spec: dict) -> dict:
    """Peak of one way's step in this process: above weights and optimizer state, and (on a GPU) in all."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Shape(**{name: tuple(value) if isinstance(value, list) else value for name, value in spec["shape"].items()}),
                      spec["device"], Path(folder))
        way = Way(**spec["way"])
        step = Step(bench, way)
        if way.cached or not way.teachers:  # a run of its own would not hold the teachers' bodies
            bench.teachers = [without_body(teacher) for teacher in bench.teachers]
        step()
        step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        above = measure.peak_bytes(step, spec["device"])
        return {"above": above, "peak": torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else None}


def named_ways(options: argparse.Namespace) -> dict[str, Way]:
    ways = {name: replace(way, precision=options.precision) for name, way in WAYS.items()}
    if options.compile:
        ways |= {f"{name}, compiled": replace(ways[name], compiled=True) for name in COMPILED}
    return {name: way for name, way in ways.items() if not options.ways or name in options.ways}


def shape_of(options: argparse.Namespace) -> Shape:
    preset = PRESETS["quick" if options.quick else options.preset]
    given = {name: getattr(options, name) for name in ("student", "teacher", "second_teacher", "vocabulary", "seq_len", "batch")}
    return replace(preset, **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "gpt2"), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="bf16")
    for name in ("student", "teacher", "second_teacher"):
        parser.add_argument(f"--{name}", type=int, nargs=3, metavar=("LAYERS", "WIDTH", "HEADS"), help="instead of the preset's")
    for name in ("vocabulary", "seq_len", "batch"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also the compiled ways; default: on a GPU")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, help="also peak memory, each way in a process of its own; "
                        "default: on a GPU")
    parser.add_argument("--ablations", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ways", nargs="+", help=f"only these of: {', '.join(WAYS)}, and (with --compile) '<way>, compiled'")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the device, for MFU; default: an H200's dense bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; the figures mean nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(memory_of(json.loads(options.child))))
        return
    options.compile = options.device == "cuda" if options.compile is None else options.compile
    options.memory = options.device == "cuda" if options.memory is None else options.memory
    options.rounds = 1 if options.quick else options.rounds
    shape, ways = shape_of(options), named_ways(options)
    where = measure.environment(options.device)
    measure.show_environment(where)
    folder = Path(tempfile.mkdtemp())
    try:
        bench = Bench(shape, options.device, folder)
        steps = {name: Step(bench, way) for name, way in ways.items()}
        found = check(steps, options.precision, options.device)
        times = measure.interleave(steps, options.rounds, options.device)
        rows = []
        for name, step in steps.items():
            student, teachers = step.flops()
            row = {"way": name, **measure.against(times[name], times.get("CE only", times[name])), "loss": found[name],
                   "teacher_share": teachers / (student + teachers)}
            row["tokens_per_s"] = shape.batch * shape.seq_len / row["seconds"]
            row["tflops"] = (student + teachers) / row["seconds"] / 1e12
            rows.append(row)
        steps.clear()
        gc.collect()
        for row in rows if options.memory else ():
            spec = json.dumps({"shape": asdict(shape), "way": asdict(ways[row["way"]]), "device": options.device})
            row["memory"] = measure.in_child("benchmarks.step", "--child", spec)
        others = ablations(bench, Way(cached=True, precision=options.precision), options.rounds, options.device,
                           options.compile) if options.ablations else []
    finally:
        shutil.rmtree(folder)

    header = ["way", "ms per step", "of CE only", "range", "tokens/s", "TFLOP/s", "teacher's share"]
    cells = [[row["way"], f"{row['seconds'] * 1000:,.1f}", f"{row['ratio']:.2f}", f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
              f"{row['tokens_per_s']:,.0f}", f"{row['tflops']:.3g}", f"{row['teacher_share']:.0%}"] for row in rows]
    if options.device == "cuda":
        header.append("MFU")
        cells = [[*line, f"{row['tflops'] / options.peak_tflops:.1%}"] for line, row in zip(cells, rows, strict=True)]
    if options.memory:
        header.append("peak memory, GB" if options.device == "cuda" else "peak above weights, MB")
        cells = [[*line, f"{row['memory']['peak'] / 1e9:.1f}" if options.device == "cuda" else f"{row['memory']['above'] / 1e6:,.0f}"]
                 for line, row in zip(cells, rows, strict=True)]
    measure.show(f"Steps: {options.precision}, student {shape.student}, teacher {shape.teacher}, vocabulary {shape.vocabulary:,}, "
                 f"{shape.batch} x {shape.seq_len} tokens, {options.rounds} rounds", header, cells)
    if others:
        measure.show("One thing at a time, in the cached step", ["what", "setting", "ms", "of the first", "range"],
                     [[row["what"], row["setting"], f"{row['seconds'] * 1000:,.1f}", f"{row['ratio']:.2f}",
                       f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"] for row in others])
    speed = speedups(times)
    for name, value in speed.items():
        print(f"{name}: {value:.2f}")
    measure.write(options.json, {"environment": where, "shape": asdict(shape), "precision": options.precision, "steps": rows,
                                 "ablations": others, "speedups": speed})


def speedups(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of what the bars are about: online over cached (at least 2.4), cached over CE only (at most 1.2)."""
    def ratio(mine: str, reference: str) -> float:
        return measure.against(times[mine], times[reference])["ratio"]

    pairs = [("online", "cached"), ("online, plain loss", "cached"), ("cached", "CE only"), ("online, plain loss", "online"),
             ("two teachers, online", "two teachers, cached"), ("online, compiled", "cached, compiled")]
    return {f"{mine} / {reference}": ratio(mine, reference) for mine, reference in pairs if mine in times and reference in times}


if __name__ == "__main__":
    main()
