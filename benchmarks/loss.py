"""The loss head alone, forward and backward, from hidden states and output heads: the fused loss against its peers.

    python -m benchmarks.loss [--device cuda] [--tokens N] [--rounds 5] [--json FILE] [--quick]

Three jobs, each with its own reference (ratio 1.00):

    CE + KL  w_ce CE + w_kl T^2 KL(teacher || student), w_ce = w_kl = 0.5, T = 2
        plain          whole logits: F.linear, F.cross_entropy, F.kl_div of two log-softmaxes in fp32
        checkpointed   the plain formula on chunks of 512 tokens under torch.utils.checkpoint
        Liger          LigerFusedLinearJSDLoss(beta=0): beta = 0 is exactly KL(teacher || student); it has no factor T^2, so
                       weight_soft_loss is w_kl T^2; both terms are divided by the number of tokens, as here
        fused          babylm.losses.fused_linear_distillation, eager and with its elementwise body compiled
    KL       the second term alone; TRL's ChunkedDivergenceFunction(beta=0) computes it, without T^2, which is put on its sum
    CE       the first term alone: the floor, what a run without a teacher pays

Before anything is timed, loss and gradients of every way are compared with the plain formula in fp32; a difference larger
than the tolerance ends the program with an error. Peers that are not installed are left out, with a line that says so.

Memory is the peak above inputs during one call, less the head's gradient, which every way has to return. On a CPU it is the
resident size of a process that does nothing else, with an allocator that gives freed blocks back.
"""

import argparse
import functools
import gc
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from babylm import losses
from babylm.losses import Head, LogitObjective
from benchmarks import measure

OBJECTIVES = {"CE + KL": LogitObjective(w_ce=0.5, w_kl=0.5, temperature=2.0), "KL": LogitObjective(w_ce=0.0, w_kl=1.0, temperature=2.0),
              "CE": LogitObjective()}
SHAPES = {16_384: (512, 1024), 50_257: (768, 1280)}  # vocabulary -> width of student and teacher
# |loss / reference - 1| and |gradient - reference| / |reference|, reference: plain in fp32. bf16 keeps 8 bits: 0.4% per product.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (5e-3, 2e-2)}
BARS = {"time": 0.85, "memory": 1 / 40}  # of plain, on a CPU


@dataclass
class Inputs:
    """What a model's body hands over: fp32 states and fp32 heads, as under autocast."""

    states: torch.Tensor
    weight: torch.Tensor
    teacher_states: torch.Tensor
    teacher_weight: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def make(cls, tokens: int, vocabulary: int, student: int, teacher: int, device: str) -> "Inputs":
        """Random ones whose logits have a standard deviation of 2."""
        generator = torch.Generator().manual_seed(0)

        def random(rows: int, width: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, width, generator=generator).mul_(scale).to(device)

        return cls(random(tokens, student).requires_grad_(), random(vocabulary, student, 2 / student**0.5).requires_grad_(),
                   random(tokens, teacher), random(vocabulary, teacher, 2 / teacher**0.5),
                   torch.randint(vocabulary, (tokens,), generator=generator).to(device))

    def first(self, tokens: int) -> "Inputs":
        return replace(self, states=self.states.detach()[:tokens].requires_grad_(), teacher_states=self.teacher_states[:tokens],
                       targets=self.targets[:tokens])


# ---- The ways to compute it -----------------------------------------------------------------------------------------


def plain_loss(states: torch.Tensor, weight: torch.Tensor, teacher_states: torch.Tensor, teacher_weight: torch.Tensor,
               targets: torch.Tensor, objective: LogitObjective) -> torch.Tensor:
    """On whole logits, which are brought to fp32 before the softmax, as Hugging Face's models do."""
    logits = F.linear(states, weight).float()
    loss = objective.w_ce * F.cross_entropy(logits, targets) if objective.w_ce else 0.0
    if objective.w_kl:
        with torch.no_grad():
            log_p = F.log_softmax(F.linear(teacher_states, teacher_weight).float() / objective.temperature, dim=-1)
        log_q = F.log_softmax(logits / objective.temperature, dim=-1)
        loss = loss + objective.w_kl * objective.temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return loss


def plain(data: Inputs, objective: LogitObjective) -> torch.Tensor:
    return plain_loss(data.states, data.weight, data.teacher_states, data.teacher_weight, data.targets, objective)


def checkpointed(data: Inputs, objective: LogitObjective, chunk: int = 512) -> torch.Tensor:
    total = 0.0
    for start in range(0, len(data.targets), chunk):
        rows = slice(start, start + chunk)
        share = len(data.targets[rows]) / len(data.targets)
        total = total + share * checkpoint(plain_loss, data.states[rows], data.weight, data.teacher_states[rows], data.teacher_weight,
                                           data.targets[rows], objective, use_reentrant=False)
    return total


def fused(data: Inputs, objective: LogitObjective, compiled: bool = False) -> torch.Tensor:
    teachers = [data.teacher_states], [Head(data.teacher_weight)]
    teacher_states, teacher_heads = teachers if objective.w_kl else ([], [])
    return losses.fused_linear_distillation(data.states, Head(data.weight), data.targets, objective, teacher_states=teacher_states,
                                            teacher_heads=teacher_heads, compiled=compiled).loss


def liger(data: Inputs, objective: LogitObjective, compiled: bool = False) -> torch.Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(objective.w_ce, objective.w_kl * objective.temperature**2, beta=0.0, temperature=objective.temperature,
                                   compiled=compiled)
    return loss(data.states, data.weight, data.teacher_states, data.teacher_weight, data.targets)


def trl(data: Inputs, objective: LogitObjective) -> torch.Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(data.states, data.weight, None, data.teacher_states, data.teacher_weight, None, 0.0,
                                            objective.temperature)
    return objective.w_kl * objective.temperature**2 * kl.mean()


COMPILED = functools.partial(fused, compiled=True)
WAYS: dict[str, dict[str, Callable]] = {
    "CE + KL": {"plain": plain, "checkpointed": checkpointed, "Liger": liger, "Liger, compiled": functools.partial(liger, compiled=True),
                "fused": fused, "fused, compiled": COMPILED},
    "KL": {"plain": plain, "TRL": trl, "fused": fused},
    "CE": {"plain": plain, "fused": fused, "fused, compiled": COMPILED},
}


def missing(name: str) -> bool:
    """Whether a way needs a package that is not installed."""
    package = {"Liger": "liger_kernel", "TRL": "trl"}.get(name.split(",")[0])
    return package is not None and importlib.util.find_spec(package) is None


def chosen(job: str, options: argparse.Namespace) -> dict[str, Callable]:
    return {name: way for name, way in WAYS[job].items() if not missing(name) and (options.compile or "compiled" not in name)
            and (not options.ways or name in options.ways or name == "plain")}


def step(way: Callable, data: Inputs, objective: LogitObjective, precision: str) -> float:
    """One forward and backward from gradients that are None; the gradients stay in `data`."""
    data.states.grad = data.weight.grad = None
    with torch.autocast(data.states.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = way(data, objective)
    loss.backward()
    return loss.detach()


# ---- Equality, time, memory -----------------------------------------------------------------------------------------


def check(job: str, ways: dict[str, Callable], data: Inputs, precision: str) -> dict[str, dict[str, float]]:
    """Relative errors of every way against plain in fp32. SystemExit where one is larger than its tolerance."""
    reference = step(plain, data, OBJECTIVES[job], "fp32").item()
    states, weight = data.states.grad, data.weight.grad
    found = {}
    for name, way in ways.items():
        loss = step(way, data, OBJECTIVES[job], precision).item()
        errors = {"loss": abs(loss / reference - 1), "states": ((data.states.grad - states).norm() / states.norm()).item(),
                  "head": ((data.weight.grad - weight).norm() / weight.norm()).item()}
        found[name] = errors
        allowed = TOLERANCE[precision]
        if not (errors["loss"] <= allowed[0] and max(errors["states"], errors["head"]) <= allowed[1]):
            raise SystemExit(f"not equal: {job}, {name}, {precision}, vocabulary {len(weight):,}: loss {loss:.7f} against {reference:.7f}, "
                             f"relative errors {errors}, allowed {allowed[0]:g} of the loss and {allowed[1]:g} of a gradient")
    return found


def time_job(job: str, data: Inputs, precision: str, options: argparse.Namespace) -> list[dict]:
    ways = chosen(job, options)
    errors = check(job, ways, data, precision)  # it warms every way up, too
    calls = {name: functools.partial(step, way, data, OBJECTIVES[job], precision) for name, way in ways.items()}
    times = measure.interleave(calls, options.rounds, options.device, warm_up=False)
    data.states.grad = data.weight.grad = None
    return [{"job": job, "way": name, "precision": precision, "vocabulary": len(data.weight), "tokens": len(data.targets),
             **measure.against(times[name], times["plain"]), "error": errors[name]} for name in ways]


def memory_of(spec: dict) -> dict:
    """Peak bytes of one way above its inputs and the head's gradient, in this process."""
    data = Inputs.make(spec["tokens"], spec["vocabulary"], *spec["widths"], spec["device"])
    if spec["precision"] == "bf16":  # a frozen head is cast once per run (Distiller), not in every call
        data = replace(data, teacher_weight=data.teacher_weight.bfloat16())
    way, objective = WAYS[spec["job"]][spec["way"]], OBJECTIVES[spec["job"]]
    step(way, data if "compiled" in spec["way"] else data.first(64), objective, spec["precision"])  # loads code, compiles
    data.states.grad = data.weight.grad = None
    gc.collect()
    peak = measure.peak_bytes(lambda: step(way, data, objective, spec["precision"]), spec["device"])
    return {"bytes": peak - data.weight.numel() * data.weight.element_size()}


def memory_job(job: str, tokens: int, vocabulary: int, widths: tuple[int, int], precision: str, options: argparse.Namespace) -> list[dict]:
    rows = []
    for name in ("plain", "fused") if options.quick else chosen(job, options):
        spec = {"job": job, "way": name, "tokens": tokens, "vocabulary": vocabulary, "widths": widths, "precision": precision,
                "device": options.device}
        needed = 9 * 4 * tokens * vocabulary if name == "plain" else 2**31
        if options.device == "cpu" and needed > measure.available_bytes():
            print(f"memory of {job}, {name}, {precision}: skipped, it needs about {needed / 1e9:.0f} GB", flush=True)
            continue
        found = memory_of(spec) if options.device == "cuda" else measure.in_child("benchmarks.loss", "--child", json.dumps(spec))
        rows.append({**spec, **found})
    whole = next((row["bytes"] for row in rows if row["way"] == "plain"), None)
    for row in rows:
        row["plain_over_this"] = whole / row["bytes"] if whole and row["bytes"] > 0 else None
    return rows


# ---- The table ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=2048, help="N of the timed calls")
    parser.add_argument("--memory_tokens", type=int, default=8192, help="N of the memory figures")
    parser.add_argument("--vocabularies", type=int, nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE))
    parser.add_argument("--jobs", nargs="+", choices=tuple(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--ways", nargs="+", help='only these and plain, e.g. fused "Liger, compiled" TRL')
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("time", "memory"), help="one half of the measurements")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="measure the compiled ways, too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; the figures mean nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(memory_of(json.loads(options.child))))
        return
    shapes = {vocabulary: SHAPES[vocabulary] for vocabulary in options.vocabularies}
    largest = max(shapes)
    if options.quick:
        options.tokens, options.memory_tokens, options.rounds, options.compile, shapes, largest = 96, 512, 1, False, {512: (32, 48)}, 512
    torch.backends.cuda.matmul.allow_tf32 = False
    where = measure.environment(options.device)
    measure.show_environment(where)
    for package in ("Liger", "TRL"):
        if missing(package):
            print(f"{package}: {measure.NOT_INSTALLED}")

    times, memory = [], []
    for vocabulary, widths in shapes.items() if options.only != "memory" else ():
        data = Inputs.make(options.tokens, vocabulary, *widths, options.device)
        for precision in options.precisions:
            rows = [row for job in options.jobs for row in time_job(job, data, precision, options)]
            times += rows
            measure.show(f"Time: {precision}, vocabulary {vocabulary:,}, widths {widths[0]} and {widths[1]}, {options.tokens:,} tokens, "
                         f"{options.rounds} rounds", ["job", "way", "ms", "of plain", "range", "error of d states, d head"],
                         [[row["job"], row["way"], f"{row['seconds'] * 1000:,.0f}", f"{row['ratio']:.2f}",
                           f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
                           f"{row['error']['states']:.0e}, {row['error']['head']:.0e}"] for row in rows])
    if options.quick:  # of each process one figure is enough to see that it works
        options.jobs, options.precisions = options.jobs[:1], options.precisions[:1]
    for precision in options.precisions if options.only != "time" else ():
        rows = [row for job in options.jobs for row in memory_job(job, options.memory_tokens, largest, shapes[largest], precision, options)]
        memory += rows
        measure.show(f"Peak memory above inputs and head gradient: {precision}, vocabulary {largest:,}, {options.memory_tokens:,} tokens",
                     ["job", "way", "MB", "plain / this"],
                     [[row["job"], row["way"], f"{row['bytes'] / 1e6:,.0f}",
                       f"{row['plain_over_this']:.1f}" if row["plain_over_this"] else "-"] for row in rows])
    bars = verdict(times, memory) if options.device == "cpu" and not options.quick else {}
    for name, met in bars.items():
        print(f"bar        {name}: {'met' if met else 'MISSED'}")
    measure.write(options.json, {"environment": where, "time": times, "memory": memory, "bars": bars})


def verdict(times: list[dict], memory: list[dict]) -> dict[str, bool]:
    """The project's bars on a CPU, of what was measured."""
    times, memory = ([row for row in rows if (row["job"], row["way"]) == ("CE + KL", "fused")] for rows in (times, memory))
    bars = {f"fused takes at most {BARS['time']} of plain's time, {row['precision']}, vocabulary {row['vocabulary']:,}":
            row["ratio"] <= BARS["time"] for row in times}
    return bars | {f"fused holds at most 1/{1 / BARS['memory']:.0f} of plain's memory, {row['precision']}":
                   row["plain_over_this"] >= 1 / BARS["memory"] for row in memory if row["plain_over_this"]}


if __name__ == "__main__":
    main()
