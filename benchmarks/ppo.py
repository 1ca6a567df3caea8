"""PPO: completions per second and where a step's time goes, and the update against a plain one.

    python -m benchmarks.ppo [--shape cpu|small] [--judge] [--precision fp32|bf16] [--rounds N] [--device cuda] [--json FILE] [--quick]

Shapes: cpu = Llama 4 x 160, 8,192 entries (the CPU study's student); small = GPT-2 Small, 50,257 entries. Weights are random, so
completions end by chance alone: lengths are drawn from a uniform distribution instead, as if an end token had been sampled there.

The plain update makes logits of whole rows, prompts and padding included, and the entropy beside them, as most published code does;
this project's makes logits where completions are predicted, and entropies in the update only where the loss asks for them. Both
gradients are compared before anything is timed. With --judge, an instruct-shaped model of random weights (Llama, 1B) grades in
this process: its answers cannot be parsed, so every one is asked for --retries times; what it shows is time and memory.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from babylm.config import PPOSection
from babylm.models import train_tokenizer
from benchmarks import measure
from interactive.ppotrainer import PolicyWithValue, advantages, policy_loss, value_loss, whitened
from interactive.rollout import Sample, body_and_head, collate, completion_logprobs, sample, unpack

SHAPES = {"cpu": {"vocab": 8192, "width": 160, "layers": 4, "heads": 5, "batch": 64, "tokens": 64},
          "small": {"vocab": 50_257, "width": 768, "layers": 12, "heads": 12, "batch": 32, "tokens": 90},
          "quick": {"vocab": 300, "width": 16, "layers": 1, "heads": 2, "batch": 4, "tokens": 6}}
PHASES = ("sample", "score", "log-probabilities", "update")


def student(shape: dict[str, Any], kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "small":
        config = GPT2Config(vocab_size=shape["vocab"], n_embd=shape["width"], n_layer=shape["layers"], n_head=shape["heads"])
    else:
        config = LlamaConfig(vocab_size=shape["vocab"], hidden_size=shape["width"], num_hidden_layers=shape["layers"],
                             num_attention_heads=shape["heads"], intermediate_size=shape["width"] * 8 // 3 // 8 * 8,
                             tie_word_embeddings=True, max_position_embeddings=512)
    return AutoModelForCausalLM.from_config(config).eval()


def targets_of(samples: list[Sample], batch: Any, section: PPOSection) -> dict[str, torch.Tensor]:
    """What both updates compare with: a reward of 1 for completions of an even number of tokens."""
    old = unpack(torch.cat([s.logprobs for s in samples]).to(batch.mask.device), batch.mask)
    rewards = torch.zeros_like(old)
    ends = batch.mask.sum(1) - 1
    rewards[torch.arange(len(samples)), ends] = (ends % 2).float()
    advantage = advantages(rewards, torch.zeros_like(old), batch.mask, section.gamma, section.gae_lambda)
    return {"old": old, "advantage": whitened(advantage, batch.mask), "returns": advantage}


def objective(logprobs: torch.Tensor, values: torch.Tensor, targets: dict[str, torch.Tensor], mask: torch.Tensor,
              section: PPOSection) -> torch.Tensor:
    loss, _ = policy_loss(logprobs, targets["old"][mask], targets["advantage"][mask], section.clip)
    value = value_loss(values, torch.zeros_like(values), targets["returns"][mask], section.value_clip)
    return (loss + section.value_coefficient * value).mean()


def plain(policy: PolicyWithValue, batch: Any, targets: dict[str, torch.Tensor], section: PPOSection) -> torch.Tensor:
    """Logits of whole rows, log-softmax, gather; the entropy too, with its weight of 0."""
    found = policy.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False)
    everything = F.log_softmax(found.logits.float(), -1)
    entropy = -(everything.exp() * everything).sum(-1)
    chosen = everything[:, :-1].gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    values = policy.value_head(found.hidden_states[-1]).squeeze(-1).float()
    logprobs, values, entropies = (held.gather(1, batch.positions)[batch.mask] for held in (chosen, values, entropy))
    return objective(logprobs, values, targets, batch.mask, section) - section.entropy_coefficient * entropies.mean()


def ours(policy: PolicyWithValue, batch: Any, targets: dict[str, torch.Tensor], section: PPOSection) -> torch.Tensor:
    logprobs, values, _ = policy(batch, 1.0, entropy=False)
    return objective(logprobs, values, targets, batch.mask, section)


def gradient(policy: PolicyWithValue, call: Any) -> torch.Tensor:
    policy.zero_grad(set_to_none=True)
    call().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def judge_model(tokenizer: PreTrainedTokenizerFast, folder: Path, quick: bool) -> Any:
    """A random model of an instruct model's shape, opened as a judge of this process."""
    from babylm.config import JudgeReward
    from interactive.judge import open_judge

    shape = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32} if quick else shape
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return JudgeReward, open_judge, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("cpu", "small"), default="cpu")
    parser.add_argument("--judge", action="store_true", help="score with an instruct-shaped random model in this process")
    parser.add_argument("--retries", type=int, default=0, help="of the judge, whose answers are never parsed (default: 0)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="seconds, on a toy shape")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape, device = SHAPES["quick" if args.quick else args.shape], torch.device(args.device)
    environment = measure.environment(args.device)
    measure.show_environment(environment)

    model, reference = (student(shape, args.shape if not args.quick else "quick").to(device) for _ in range(2))
    policy, section = PolicyWithValue(model, "head").to(device).eval(), PPOSection()
    tokenizer = train_tokenizer(["the cat sees the dog and the dog sees the cat " * 9], 300, 2)
    prompts, seeds = ["the dog sees"] * shape["batch"], list(range(shape["batch"]))
    lengths = torch.randint(shape["tokens"] // 4, shape["tokens"] + 1, (shape["batch"],), generator=torch.Generator().manual_seed(1))
    held: dict[str, Any] = {}

    def autocast() -> Any:
        return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.precision == "bf16")

    def sampling() -> None:
        with autocast():
            held["samples"] = sample(model, tokenizer, prompts, seeds, max_new_tokens=shape["tokens"])
        for one, length in zip(held["samples"], lengths.tolist(), strict=True):
            one.completion_ids = one.completion_ids[:length]

    def scoring() -> None:
        if args.judge:
            held["judge"].grade([f"{one.prompt} {number} {held['count']}" for number, one in enumerate(held["samples"])],
                                [one.completion for one in held["samples"]])
            held["count"] += 1

    def log_probabilities() -> None:
        with autocast(), torch.no_grad():
            batch = collate(held["samples"], device)
            logprobs, *_ = policy(batch, 1.0)
            for one, values in zip(held["samples"], logprobs.cpu().split(batch.mask.sum(1).tolist()), strict=True):
                one.logprobs = values
            completion_logprobs(body_and_head(reference, "reference"), held["samples"])
        held["batch"], held["targets"] = batch, targets_of(held["samples"], batch, section)

    def updating(way: Any) -> torch.Tensor:
        with autocast():
            return gradient(policy, lambda: way(policy, held["batch"], held["targets"], section))

    with tempfile.TemporaryDirectory() as folder:
        if args.judge:
            entry, open_judge, path = judge_model(tokenizer, Path(folder), args.quick)
            entry = entry(kind="judge", model=str(path), retries=args.retries, max_new_tokens=8 if args.quick else 64,
                          batch_size=shape["batch"])
            held |= {"judge": open_judge(entry, device, 0, None), "count": 0}
        sampling()
        log_probabilities()
        mine, theirs = updating(ours), updating(plain)
        difference = float((mine - theirs).norm() / theirs.norm())
        if not difference < (1e-4 if args.precision == "fp32" else 5e-2):
            raise SystemExit(f"the gradients of both updates differ by {difference:.2g} of their norm: nothing is timed")
        times = measure.interleave({"sample": sampling, "score": scoring, "log-probabilities": log_probabilities,
                                    "update": lambda: updating(ours), "plain update": lambda: updating(plain)}, args.rounds, args.device)
        peaks = {name: measure.peak_bytes(lambda way=way: updating(way), args.device) for name, way in (("update", ours),
                                                                                                     ("plain update", plain))}
    medians = {name: sorted(found)[len(found) // 2] for name, found in times.items()}
    step = sum(medians[name] * (section.epochs if name == "update" else 1) for name in PHASES)
    ratio = measure.against(times["update"], times["plain update"])
    tokens = int(lengths.sum())
    measure.show(f"One PPO step: {shape['batch']} completions of {tokens / shape['batch']:.0f} tokens, {section.epochs} epochs, "
                 f"{args.precision}: {step:.2f} s, {shape['batch'] / step:.1f} completions/s", ["phase", "seconds", "share"],
                 [[name, f"{medians[name]:.3f}" + (f" x {section.epochs}" if name == "update" else ""),
                   f"{medians[name] * (section.epochs if name == 'update' else 1) / step:.0%}"] for name in PHASES])
    print(f"\nupdate / plain update: {ratio['ratio']:.2f} ({ratio['ratio_min']:.2f}-{ratio['ratio_max']:.2f}) of the time, "
          f"{peaks['update'] / 2**20:,.0f} MB against {peaks['plain update'] / 2**20:,.0f} MB at the peak; gradients equal to "
          f"{difference:.1e}")
    measure.write(args.json, {"environment": environment, "args": {k: str(v) for k, v in vars(args).items()}, "seconds": times,
                              "ratio": ratio, "peaks": peaks, "difference": difference, "completions_per_s": shape["batch"] / step})


if __name__ == "__main__":
    main()
