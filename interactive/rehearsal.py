"""What a run of stage 6 costs: FLOPs and memory, as every run prints them before its first step; and its dry run: how long it would
take, by a few completions of the real thing."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from babylm import models, plan
from babylm.config import RLConfig
from babylm.run_folder import amount
from interactive import reward
from interactive.judge import ServerJudge
from interactive.rollout import (
    Batch,
    Sample,
    body_and_head,
    collate,
    completion_logprobs,
    completion_states,
    sample,
    seeds_of,
    token_logprobs,
)

if TYPE_CHECKING:
    from interactive.rl_run import RLRun

Learn = Callable[[Batch], torch.Tensor]


# ---- FLOPs and memory -----------------------------------------------------------------------------------------------


def flops_per_token(run: "RLRun", model: PreTrainedModel, trained: torch.nn.Module) -> dict[str, float]:
    """{"writing", "reading", "learning"}: FLOPs of a step per token of prompts and completions, both as long as they get.

    As `models.forward_flops_per_token` counts them; the head reads completions alone, and learning costs three forward passes.
    Attention is counted to all tokens, also while writing, where those to come are not there yet. What rewards cost is not counted.
    """
    _, passes, times, _ = shape_of_step(run.config)
    length, head = run.longest, 2.0 * model.get_output_embeddings().weight.numel()
    body = models.forward_flops_per_token(model, length) - head
    forward = body + head * run.config.generation.max_new_tokens / length
    value = body if getattr(trained, "value_body", None) is not None else 0.0
    return {"writing": forward, "reading": passes * forward + value, "learning": times * 3 * (forward + value)}


def memory(run: "RLRun", model: PreTrainedModel, trained: torch.nn.Module) -> str:
    """What a process will hold while it learns, in words: activations are measured on a few completions of random tokens, as long as
    prompts and completions get. No random state and no weight is changed.

    Args:
        model: the policy, on the run's device.
        trained: all that the optimizer changes.
    """
    config, processes = run.config, run.state.num_processes
    share = config.training.batch_size // processes // (config.ppo.minibatches if config.algorithm == "ppo" else 1)
    at_once = min(plan.accumulation_steps(config, processes)[0], share)
    generator = torch.Generator().manual_seed(0)

    def kept_by(count: int) -> int:
        ids = torch.randint(model.config.vocab_size, (count, run.longest), generator=generator).tolist()
        split = run.longest - config.generation.max_new_tokens
        batch = collate([Sample("", "", row[:split], row[split:], finished=False) for row in ids], run.device)
        # Blocks are recomputed in train mode only.
        with models.mode(trained, training=model.is_activation_checkpointing), run.autocast():
            return plan.saved_by(lambda: _loss(trained, model, config)(batch), [*weights, *frozen])

    weights = [*trained.parameters(), *trained.buffers()]
    frozen = [part for one in [run.reference, *(one for r in run.rewards for one in models_of(r))]
              for part in [*one.parameters(), *one.buffers()]]
    found = plan.measured_activations(kept_by, model, at_once, run.device)
    recomputed = config.training.gradient_checkpointing
    here, other = (found.get(on) for on in (recomputed, not recomputed))
    gradients = plan.gradient_bytes(trained.parameters(), processes, math.ceil(share / at_once),
                                    views=config.algorithm == "ppo")
    sizes = {"weights": plan.storage_bytes(weights), "gradients": gradients, "Adam": 2 * plan.storage_bytes(trained.parameters()),
             "reference and rewards": plan.storage_bytes(frozen), "activations and logits": here.peak}
    alternative = f"; {amount(other.peak)} with{'out' * recomputed} gradient_checkpointing" if other else ""
    return (amount(sum(sizes.values())) + " in each process" * (processes > 1) + " = "
            + " + ".join(f"{name} {amount(size)}" for name, size in sizes.items())
            + f" ({at_once} completions at once, of up to {run.longest} tokens with their prompts{alternative})")


# ---- The dry run ----------------------------------------------------------------------------------------------------


def rehearse(run: "RLRun", model: PreTrainedModel, trained: torch.nn.Module | None = None, learn: Learn | None = None) -> None:
    """Write, reward, read and learn from a few completions; print the plan, the time, the disk. No file is written, the
    weights are left as they are, and a judge on a server is asked nothing beyond the one question that opens it.

    Args:
        model: the policy, on the run's device.
        trained: all that the optimizer changes; default: the policy.
        learn: makes of a batch of completions a scalar whose gradient costs what the algorithm's does; default: of their
            log-probabilities.

    Raises:
        UserError: what is to be written does not fit on the disk.
    """
    config, trained, processes = run.config, trained or model, run.state.num_processes
    per_device, _ = plan.accumulation_steps(config, processes)
    learn = learn or _loss(trained, model, config)
    run.print_plan(model, trained)
    weights = list(trained.parameters())

    rewards = [r for r in run.rewards if not isinstance(getattr(getattr(r, "judge", None), "backend", None), ServerJudge)]
    prompts, held, every = run.prompts.batch(0, per_device), [], []

    def write(count: int) -> None:
        with run.autocast():
            held[:] = sample(model, run.tokenizer, prompts[:count], seeds_of(config.seed, len(every), range(count)),
                             max_new_tokens=config.generation.max_new_tokens, temperature=config.generation.temperature)
        every.extend(held)
        reward.combine(rewards, [s.prompt for s in held], [s.completion for s in held],
                       completion_ids=[s.completion_ids for s in held], prompt_ids=[s.prompt_ids for s in held])

    def read(count: int) -> None:
        with run.autocast():
            completion_logprobs(body_and_head(run.reference, "reference"), _first(held, count), temperature=config.generation.temperature)

    def forward(count: int) -> torch.Tensor:
        with run.autocast():
            return learn(collate(_first(held, count), run.device))

    writing, at_once = plan.per_sequence(write, per_device, run.device)
    reading, _ = plan.per_sequence(read, at_once, run.device)
    learning, _ = plan.per_sequence(lambda count: forward(count).backward(), at_once, run.device)
    optimizer = torch.optim.AdamW(weights, lr=0.0, fused=True)
    optimizer.step()  # its moments are made in the first one
    update = plan.seconds(optimizer.step, run.device)

    completions, passes, times, updates = shape_of_step(config)
    step = completions / processes * (writing + passes * reading + times * learning) + updates * update
    words, tokens = (sum(values) / len(every) for values in ([s.words for s in every], [len(s.completion_ids) for s in every]))
    steps = _steps_left(run, completions, words)
    in_all = config.training.words or round(run.progress.words + (steps or 0) * completions * words)
    run.say(f"step       {completions:,} completions x (writing and rewards {writing:.2g} s + {passes} reading(s) {reading:.2g} s + "
            f"{times} learning(s) {learning:.2g} s) + {updates} optimizer step(s) {update:.2g} s = {step:.3g} s; measured on {at_once} at "
            f"a time, of {tokens:.1f} tokens and {words:.1f} words")
    without = "a judge's answers, " * (len(rewards) < len(run.rewards)) + "validation and saving not counted"
    run.say(f"time       about {plan.clock(steps * step)} on {processes} process(es) = {steps:,} steps, {in_all:,} words generated as long "
            f"as they stay so long; {without}" if steps is not None else
            f"time       no estimate: a budget of {config.training.words:,} words, but the completions that were measured have none")

    run.say(f"disk       {plan.disk(run.needed(model, trained, in_all), run.folder)}")
    run.say(f"folder     {plan.describe_folder(run.folder, run.step)}")
    run.say(f"used       {plan.peak_memory(run.device)}")
    plan.say_nothing_written(run.folder)


def shape_of_step(config: RLConfig) -> tuple[int, int, int, int]:
    """(completions, passes that only read each of them, times that each is learned from, optimizer steps) of one step of the run."""
    size, section = config.training.batch_size, getattr(config, config.algorithm)
    if config.algorithm == "ppo":  # read by policy and reference
        return size, 2, section.epochs, section.epochs * section.minibatches
    if config.algorithm == "dpo":  # two completions to a pair
        return 2 * section.prompts_per_round, 2, section.epochs, section.epochs * math.ceil(2 * section.prompts_per_round / size)
    return size, 1 + (section.epochs > 1), section.epochs, section.epochs


def models_of(one: Any) -> list[torch.nn.Module]:
    """The models that a reward runs in this process."""
    holders = [getattr(one, name, None) for name in ("teacher", "reference", "scorer")]
    holders.append(getattr(getattr(one, "judge", None), "backend", None))
    return [model for holder in holders if isinstance(model := getattr(holder, "model", None), torch.nn.Module)]


def _loss(trained: torch.nn.Module, model: PreTrainedModel, config: RLConfig) -> Learn:
    """A scalar of a batch of completions whose gradient costs what the algorithm's does: of their log-probabilities, and PPO's values."""
    temperature = config.generation.temperature
    if trained is not model:  # ppotrainer.PolicyWithValue
        return lambda batch: sum(part.mean() for part in trained(batch, temperature, bool(config.ppo.entropy_coefficient))[:2])
    body, head = body_and_head(model, "policy")
    return lambda batch: token_logprobs(head(completion_states(body, batch)).float() / temperature, batch.targets[batch.mask]).mean()


def _first(samples: list[Sample], count: int) -> list[Sample]:
    """`count` samples, again from the first where there are fewer."""
    return [samples[number % len(samples)] for number in range(count)]


def _steps_left(run: "RLRun", completions: int, words: float) -> int | None:
    budget = run.config.training
    if budget.steps:
        return budget.steps - run.step
    return math.ceil(max(0, budget.words - run.progress.words) / (completions * words)) if words else None
