"""MoE-P, forward and backward: its three ways to compute experts, the plain loop, and a dense GPT-2 of equal size.

    python -m benchmarks.moep [--precision bf16] [--batch 8] [--seq_len 128] [--rounds 5] [--json FILE] [--quick]
    python -m benchmarks.moep --shape 127M --batch 16 --seq_len 512 --precision bf16 --compile --device cuda

Ways:

    plain loop            tests/moep_reference.py: block by block, every block on every token; GELU as transformers' GPT-2 has it
    ... one-call GELU     the same with torch's own GELU
    loop, grouped, dense  modeling_moep.py by its `expert_path`; with --compile also dense under torch.compile(fullgraph=True)
    GPT-2                 transformers' dense GPT-2 of the same depth and width: the control of equal size

Before anything is timed, logits and gradients of every way are compared with the plain loop's (in fp32). Then for the model
without its output head ("body": what differs) and with head and cross-entropy ("whole"): time against the plain loop in the same
round, dispatched operations, waits of the host for the device, and tokens/s, TFLOP/s and peak memory where it is measured.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from babylm.models import count_parameters, forward_flops_per_token
from benchmarks import measure
from modeling_moep import MoEPConfig, MoEPForCausalLM
from tests.moep_reference import LoopBlock, LoopMoEP

SHAPES = {"paper": {}, "127M": {"vocab_size": 50_257, "hidden_size": 768, "num_attention_heads": 12, "parallel_hidden_size": 384,
                                "parallel_attention_heads": 6},
          "cpu": {"vocab_size": 8192, "hidden_size": 128, "num_attention_heads": 4, "parallel_hidden_size": 64,
                  "parallel_attention_heads": 2, "num_hidden_layers": 7},  # configs/cpu/moep.yaml
          "quick": {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "parallel_hidden_size": 8, "parallel_attention_heads": 2,
                    "num_hidden_layers": 4}}
BAR = 1.35  # the plain loop's time over that of the fastest path: paper's shape, 8 x 128 tokens, CPU, fp32
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}


class Operations(TorchDispatchMode):
    """Counts what reaches torch's dispatcher."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class HostReads(TorchFunctionMode):
    """Counts calls that bring a value to the host, or whose result's shape depends on values: on a GPU, each one waits."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        one_argument_where = function is torch.where and len(args) == 1
        self.count += getattr(function, "__name__", "") in READS or one_argument_where
        return function(*args, **(kwargs or {}))


def counted(mode: type, call: Callable[[], object]) -> int:
    """How many of what `mode` counts a call makes."""
    with mode() as counter:
        call()
    return counter.count


class Plain(nn.Module):
    """The plain loop in the same three parts as the others: body, head, whole."""

    def __init__(self, model: MoEPForCausalLM, gelu: Callable | None = None):
        super().__init__()
        self.loop = LoopMoEP(model)
        if gelu:
            for module in self.loop.modules():
                if isinstance(module, LoopBlock):
                    module.gelu = gelu

    def body(self, ids: torch.Tensor) -> torch.Tensor:
        return self.loop.states(ids)[0]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.loop(ids)[0]


class Ours(nn.Module):
    """MoE-P by one expert path, or another causal model of transformers."""

    def __init__(self, model: nn.Module, path: str | None = None, compiled: bool = False):
        super().__init__()
        self.model, self.path = model, path
        self.run = torch.compile(model.base_model, fullgraph=True) if compiled else model.base_model

    def body(self, ids: torch.Tensor) -> torch.Tensor:
        if self.path:
            self.model.config.expert_path = self.path
        return self.run(input_ids=ids, use_cache=False).last_hidden_state

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.body(ids))


def passes(way: nn.Module, batches: list[torch.Tensor], part: str, precision: str) -> Callable[[], torch.Tensor]:
    """A forward and backward pass on the next batch; the gradients of the one before are dropped.

    Never twice the same batch in a row: with equal numbers of tokens per expert, products in bf16 on a CPU would find the
    kernels of the pass before in their cache, as no training step does.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    upcoming = itertools.cycle(batches)

    def call() -> torch.Tensor:
        ids = next(upcoming)
        way.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, dtype, enabled=precision != "fp32"):
            if part == "body":
                loss = way.body(ids).float().square().mean()
            else:
                following = F.pad(ids[:, 1:], (0, 1), value=-100)  # as transformers does: the logits are not copied
                loss = F.cross_entropy(way.logits(ids).flatten(0, 1).float(), following.flatten())
        loss.backward()
        return loss.detach()

    return call


def require_equal(ways: dict[str, nn.Module], ids: torch.Tensor) -> None:
    """SystemExit unless every way has the plain loop's logits and gradients, to 1e-5 in fp32."""
    plain = ways["plain loop"]
    passes(plain, [ids], "whole", "fp32")()
    logits, wanted = plain.logits(ids), {name: p.grad.clone() for name, p in plain.loop.named_parameters()}
    for name, way in ways.items():
        if name == "GPT-2":
            continue
        passes(way, [ids], "whole", "fp32")()
        named = way.loop.named_parameters() if isinstance(way, Plain) else way.model.named_parameters()
        found = {name.removeprefix("model."): p.grad for name, p in named}
        found = found if isinstance(way, Plain) else LoopMoEP.renamed(found)
        differences = [(way.logits(ids) - logits).detach(), *(found[key] - wanted[key] for key in wanted)]
        error = max(float(difference.abs().max()) for difference in differences)
        print(f"{name}: logits and gradients differ from the plain loop's by at most {error:.1e}", flush=True)
        if not error <= 1e-5:
            raise SystemExit(f"not equal: {name} differs from the plain loop by {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="paper")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also the dense path under torch.compile(fullgraph=True)")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for MFU")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.batch, args.seq_len, args.rounds = "quick", 2, 16, 1
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False  # equality first
    found = measure.environment(args.device)
    measure.show_environment(found)

    model = MoEPForCausalLM(MoEPConfig(max_position_embeddings=max(512, args.seq_len), **SHAPES[args.shape]))
    config = model.config
    control = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_position_embeddings, n_embd=config.hidden_size,
        n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, n_inner=552 if args.shape == "cpu" else None))  # as configs/cpu/dense.yaml
    ways = {"plain loop": Plain(model), "... one-call GELU": Plain(model, lambda x: F.gelu(x, approximate="tanh")),
            **{path: Ours(model, path) for path in ("loop", "grouped", "dense")}}
    if args.compile:
        ways["dense, compiled"] = Ours(model, "dense", compiled=True)
    ways["GPT-2"] = Ours(control)
    for way in ways.values():
        way.to(args.device)
    batches = [torch.randint(config.vocab_size, (args.batch, args.seq_len), device=args.device) for _ in range(args.rounds + 3)]
    ids = batches[0]
    print(f"{args.shape}: {count_parameters(model):,} parameters (GPT-2: {count_parameters(control):,}); "
          f"{args.batch} x {args.seq_len} tokens, {args.precision}", flush=True)
    require_equal(ways, ids)
    torch.backends.cuda.matmul.allow_tf32 = True

    flops = {"GPT-2": forward_flops_per_token(control, args.seq_len)}
    result = {"environment": found, "arguments": {key: str(value) for key, value in vars(args).items()}, "rows": []}
    for part in ("body", "whole"):
        calls = {name: passes(way, batches, part, args.precision) for name, way in ways.items()}
        operations = {name: counted(Operations, call) for name, call in calls.items() if "compiled" not in name}
        reads = {name: counted(HostReads, call) for name, call in calls.items() if "compiled" not in name}
        times = measure.interleave(calls, args.rounds, args.device)
        rows = []
        for name, series in times.items():
            versus, median = measure.against(times["plain loop"], series), statistics.median(series)
            tokens = ids.numel() / median
            row = {"part": part, "way": name, "ms": 1000 * median, "speedup": versus["ratio"],
                   "range": [versus["ratio_min"], versus["ratio_max"]],
                   "operations": operations.get(name), "host_reads": reads.get(name), "tokens_per_s": tokens}
            if args.device == "cuda":
                row["peak_mb"] = measure.peak_bytes(calls[name], args.device) / 1e6
            if part == "whole" and name != "plain loop" and not name.startswith("..."):
                row["tflops"] = 3 * flops.get(name, forward_flops_per_token(model, args.seq_len)) * tokens / 1e12
                if args.peak_tflops:
                    row["mfu"] = row["tflops"] / args.peak_tflops
            rows.append(row)
        result["rows"] += rows
        show(part, rows)
    paths = [row for row in result["rows"] if row["way"] in ("loop", "grouped", "dense")]
    fastest = {part: max((row for row in paths if row["part"] == part), key=lambda row: row["speedup"]) for part in ("body", "whole")}
    print(f"\nfastest expert path here: {fastest['body']['way']} without head, {fastest['whole']['way']} with head")
    if (args.device, args.shape, args.precision, args.batch, args.seq_len) == ("cpu", "paper", "fp32", 8, 128):
        print(f"aim: {BAR} x the plain loop's speed; measured {fastest['body']['speedup']:.2f} and {fastest['whole']['speedup']:.2f}")
    measure.write(args.json, result)


def show(part: str, rows: list[dict]) -> None:
    optional = [name for name in ("tflops", "mfu", "peak_mb") if any(name in row for row in rows)]
    header = ["way", "ms", "speed-up over the plain loop", "range", "operations", "host reads", "tokens/s", *optional]
    measure.show({"body": "Without head", "whole": "With head and cross-entropy"}[part], header,
                 [[row["way"], f"{row['ms']:,.1f}", f"{row['speedup']:.2f}", f"{row['range'][0]:.2f}-{row['range'][1]:.2f}",
                   *("-" if row[key] is None else f"{row[key]:,}" for key in ("operations", "host_reads")), f"{row['tokens_per_s']:,.0f}",
                   *(f"{row[name]:,.3f}" if name in row else "-" for name in optional)] for row in rows])


if __name__ == "__main__":
    main()
