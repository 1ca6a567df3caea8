"""PPO for language models (Schulman et al. 2017; with a KL penalty to a frozen reference, Ziegler et al. 2019).

One step: sample a batch of completions, score them, and take `ppo.epochs` x `ppo.minibatches` optimizer steps on

    -min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) + c_v value loss - c_H entropy (+ beta KL, with kl.where: loss)

each a mean over the completions' tokens (the end token included, nothing behind it), in nats. Dropout is off throughout: otherwise the
ratio is not 1 where nothing has changed yet.

Batches do not depend on the number of processes or on accumulation: every process holds the whole batch of completions, takes its
share of each minibatch, and weighs it by its tokens.
"""

import contextlib
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from transformers import PreTrainedModel

from babylm.config import KLSection, RLConfig
from babylm.plan import accumulation_steps
from babylm.run_folder import write_json
from babylm.schema import UserError
from interactive.rehearsal import rehearse
from interactive.rl_run import RLRun, load_state, save_state, tracked
from interactive.rollout import (
    Batch,
    Sample,
    body_and_head,
    collate,
    completion_logprobs,
    completion_states,
    switch_off_dropout,
    token_logprobs,
    unpack,
)

# ---- The maths ------------------------------------------------------------------------------------------------------
# Tensors are [B, R]: row = completion, column = its token; `mask` is True where there is one.


def advantages(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16), [B, R], 0 outside the mask.

    A_t = sum_k (gamma lam)^k delta_{t+k} with delta_t = r_t + gamma V_{t+1} - V_t. A completion ends with its last token, whether that
    is an end token or it was cut: the value behind it is 0.
    """
    result, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0.0)
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        result[:, t] = following
    return result


def whitened(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over the True places of `mask`; 0 elsewhere."""
    count = mask.sum().clamp(min=1)
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logprobs: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(-min(ratio A, clip(ratio) A), whether the clip was active), each [N]; ratio = exp(logprobs - old) (PPO, equation 7)."""
    ratio = (logprobs - old).exp()
    plain, clipped = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    return -torch.minimum(plain, clipped), clipped < plain


def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Half the squared error [N]; with `clip`, the larger of that and the error of the value held within old +- clip."""
    error = (values - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns).square())
    return 0.5 * error


def kl_loss(logprobs: torch.Tensor, old: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A loss [N] on sampled tokens whose gradient is that of KL(policy || reference): ratio x (logprobs - reference)^2 / 2.

    The log-ratio itself would not do as a loss: its gradient, grad log p, is 0 in the mean. Half its square has the gradient
    log(p / p_ref) grad log p, whose mean over p is that of the KL; `ratio` (held fixed) makes it a mean over p where the tokens were
    drawn from `old`. Its value is a biased estimate of KL: what is logged is the mean of the log-ratio.
    """
    ratio = (logprobs.detach() - old).exp()
    return 0.5 * ratio * (logprobs - reference).square()


def adapted(coefficient: float, kl: float, completions: int, section: KLSection) -> float:
    """The next KL coefficient (Ziegler et al. 2019, section 2.2): unchanged where it is fixed; by a fifth at most, so never below 0."""
    if section.control == "fixed":
        return coefficient
    error = min(max(kl / section.target - 1, -0.2), 0.2)
    return coefficient * (1 + error * min(completions / section.horizon, 1.0))


# ---- What is trained ------------------------------------------------------------------------------------------------


class PolicyWithValue(nn.Module):
    """The policy, and the value function beside it: all that PPO trains, in one module.

    Args:
        value: "head" reads the policy's last states; "model" has a body of its own, which starts as a copy of the policy's.
    """

    def __init__(self, model: PreTrainedModel, value: str):
        super().__init__()
        self.model = model
        self.halves = body_and_head(model, "policy")  # a tuple: parts of `model`, not registered a second time
        body, head = self.halves
        self.value_body = copy.deepcopy(body) if value == "model" else None
        self.value_head = nn.Linear(head.in_features, 1)
        nn.init.zeros_(self.value_head.weight)  # every value starts at 0: the first advantages are the returns themselves
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: Batch, temperature: float, entropy: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(log-probabilities in nats, values, entropies in nats or None) of the completions' tokens, each [N], row after row."""
        body, head = self.halves
        states = completion_states(body, batch)
        logits = head(states).float() / temperature
        logprobs = token_logprobs(logits, batch.targets[batch.mask])
        entropies = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1) if entropy else None
        value_states = states if self.value_body is None else completion_states(self.value_body, batch)
        return logprobs, self.value_head(value_states).squeeze(-1).float(), entropies


def optimizer_groups(policy: PolicyWithValue, config: RLConfig) -> list[dict]:
    """Parameter groups for AdamW: decay on matrices only, and the value function's own learning rate."""
    groups = []
    for value, lr in ((False, config.training.lr), (True, config.ppo.value_lr or config.training.lr)):
        named = [p for name, p in policy.named_parameters() if name.startswith("value_") is value]
        for matrices, decay in ((True, config.training.weight_decay), (False, 0.0)):
            groups.append({"params": [p for p in named if (p.ndim > 1) is matrices], "weight_decay": decay, "lr": lr, "peak_lr": lr})
    return [group for group in groups if group["params"]]


# ---- Training -------------------------------------------------------------------------------------------------------


class PPOTrainer:
    """Trains `model` to the end of the run's budget; resumes where the run folder says so.

    Args:
        run: what all algorithms of stage 6 share: prompts, rewards, budget, record.
        model: the policy, on the run's device. The reference is the run's.
    """

    def __init__(self, config: RLConfig, run: RLRun, model: PreTrainedModel):
        self.config, self.run = config, run
        training = config.training
        self.accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(training.precision, training.precision),
                                       cpu=run.device.type == "cpu", log_with=config.logging.trackers or None,
                                       project_dir=str(run.folder.run),  # gradients lie in what DDP sends, not beside it:
                                       kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
        processes = self.accelerator.num_processes
        if training.batch_size // config.ppo.minibatches % processes:
            raise UserError(f"a minibatch of {training.batch_size // config.ppo.minibatches} completions (training.batch_size / "
                            f"ppo.minibatches) is not a multiple of the {processes} processes")
        self.micro = min(accumulation_steps(config, processes)[0], training.batch_size // config.ppo.minibatches // processes)
        switch_off_dropout(model)
        self.policy = PolicyWithValue(model, config.ppo.value).to(run.device).eval()
        if training.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers recomputes in train mode only; without dropout that changes nothing else
        self.optimizer = torch.optim.AdamW(optimizer_groups(self.policy, config), betas=(training.beta1, training.beta2), fused=True)
        self.coefficient = config.ppo.kl.coefficient
        if run.folder.resume_from:
            self._load(run.folder.resume_from)
        self.parallel = self.accelerator.prepare_model(self.policy) if processes > 1 else self.policy
        self.reference = body_and_head(run.reference, "reference")

    def train(self) -> None:
        """Step after step until the budget is used up. Preempted where a signal asked for it; UserError where a step fails."""
        run = self.run
        if self.config.dry_run:
            return rehearse(run, self.policy.model, self.policy, self._first_loss)
        if self.config.logging.trackers:
            self.accelerator.init_trackers(self.config.name, config=tracked(self.config))
        run.start(self.policy.model, self.policy)
        while not run.done:
            samples = self.rollout()
            terms = self.update([sample for sample in samples if sample.reward is not None])  # the others are counted, and teach nothing
            last = run.end_step(self.policy.model, samples, terms)
            if self.config.logging.trackers and last:
                self.accelerator.log(last, step=run.step)
            run.save_or_stop(self._save)
        run.finish(self.policy.model)

    def _first_loss(self, batch: Batch) -> torch.Tensor:
        logprobs, values, _ = self.policy(batch, self.config.generation.temperature, bool(self.config.ppo.entropy_coefficient))
        return logprobs.mean() + values.mean()

    # -- completions

    def rollout(self) -> list[Sample]:
        """The step's batch of completions, scored, with log-probabilities and values: the same list in every process."""
        state, config = self.accelerator, self.config
        rows = range(config.training.batch_size)[state.process_index::state.num_processes]
        with self.accelerator.autocast():
            samples = self.run.sample(self.policy.model, rows)
        self.run.score(samples)
        with self.accelerator.autocast(), torch.no_grad():
            for start in range(0, len(samples), self.micro):
                part = samples[start:start + self.micro]
                batch = collate(part, self.run.device)
                logprobs, values, entropies = self.policy(batch, config.generation.temperature)
                reference = completion_logprobs(self.reference, part, temperature=config.generation.temperature)
                lengths = batch.mask.sum(1).tolist()
                columns = [values.cpu().split(lengths) for values in (logprobs, values, entropies)]
                for sample, *found in zip(part, *columns, reference, strict=True):
                    sample.logprobs, sample.values, sample.entropies, sample.reference_logprobs = found
        return self.run.gather(rows, samples)

    # -- learning

    def targets(self, samples: Sequence[Sample], batch: Batch) -> dict[str, torch.Tensor]:
        """What the losses compare with, each [B, R]: old log-probs and values, reference log-probs, advantages, returns."""
        ppo, mask = self.config.ppo, batch.mask
        old, reference, values = (unpack(torch.cat([getattr(sample, name) for sample in samples]).to(mask.device), mask)
                                  for name in ("logprobs", "reference_logprobs", "values"))
        rewards = torch.zeros_like(old)
        ends = mask.sum(1) - 1
        rewards[torch.arange(len(samples), device=mask.device), ends] = torch.tensor([s.reward for s in samples], device=mask.device)
        if ppo.kl.where == "reward":
            rewards = rewards - self.coefficient * (old - reference) * mask
        advantage = advantages(rewards, values, mask, ppo.gamma, ppo.gae_lambda)
        returns = advantage + values
        return {"old": old, "reference": reference, "values": values, "returns": returns,
                "advantage": whitened(advantage, mask) if ppo.whiten else advantage}

    def losses(self, outputs: tuple[torch.Tensor, ...], mask: torch.Tensor, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums over the tokens of a micro-batch: `loss`, which is differentiated, and what is logged."""
        ppo = self.config.ppo
        logprobs, values, entropy = outputs
        old, reference, old_values, returns, advantage = (targets[name][mask] for name in
                                                          ("old", "reference", "values", "returns", "advantage"))
        policy, clipped = policy_loss(logprobs, old, advantage, ppo.clip)
        value = value_loss(values, old_values, returns, ppo.value_clip)
        loss = policy + ppo.value_coefficient * value
        if ppo.entropy_coefficient:
            loss = loss - ppo.entropy_coefficient * entropy
        if ppo.kl.where == "loss" and self.coefficient:
            loss = loss + self.coefficient * kl_loss(logprobs, old, reference)
        ratio = logprobs.detach() - old
        return {"loss": loss.sum(), "policy_loss": policy.detach().sum(), "value_loss": value.detach().sum(),
                "clipped": clipped.sum().float(), "update_kl": (ratio.exp() - 1 - ratio).sum()}

    def update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """All optimizer steps of one batch; returns what the log line shows: means over tokens (and over the optimizer steps)."""
        config, state = self.config, self.accelerator
        batch = collate(samples, self.run.device)
        targets = self.targets(samples, batch)
        lr = self.run.learning_rate_share()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr
        sums: dict[str, float] = {}
        size = math.ceil(len(samples) / config.ppo.minibatches)  # excluded samples leave smaller minibatches
        updates = 0
        for epoch in range(config.ppo.epochs):
            generator = torch.Generator().manual_seed(self.run.seed_of(f"epoch {epoch}"))
            order = torch.randperm(len(samples), generator=generator)
            for minibatch in order.split(size):
                found = self._step(minibatch, samples, targets, state.process_index, state.num_processes)
                updates += 1
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
        kl = (targets["old"] - targets["reference"]).sum() / batch.mask.sum()
        variance = targets["returns"][batch.mask].var(unbiased=False).clamp(min=1e-12)
        explained = 1 - (targets["returns"] - targets["values"])[batch.mask].var(unbiased=False) / variance
        entropy = torch.cat([sample.entropies for sample in samples]).mean()
        terms = {"kl": float(kl), "entropy": float(entropy), "kl_coefficient": self.coefficient, "explained_variance": float(explained),
                 "lr": lr * config.training.lr, **{name: value / updates for name, value in sums.items()}}
        self.coefficient = adapted(self.coefficient, float(kl), len(samples), config.ppo.kl)
        return terms

    def _step(self, minibatch: torch.Tensor, samples: Sequence[Sample], targets: dict[str, torch.Tensor], rank: int,
              processes: int) -> dict[str, float]:
        """One optimizer step on the samples with these indices, of which this process takes its share."""
        tokens = sum(len(samples[i].completion_ids) for i in minibatch.tolist())
        mine = minibatch[rank::processes].split(self.micro) or (minibatch[:0],)
        most = math.ceil(math.ceil(len(minibatch) / processes) / self.micro)  # of any process: all must join every backward pass
        totals: dict[str, torch.Tensor] = {}
        for number in range(most):
            chosen = mine[number] if number < len(mine) and len(mine[number]) else minibatch[:1]
            counts = number < len(mine) and len(mine[number]) > 0
            rows = [samples[i] for i in chosen.tolist()]
            part = collate(rows, self.run.device)
            width = part.mask.shape[1]
            held = {name: values[chosen.to(values.device), :width] for name, values in targets.items()}
            last = number == most - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.parallel):
                with self.accelerator.autocast():
                    outputs = self.parallel(part, self.config.generation.temperature, bool(self.config.ppo.entropy_coefficient))
                found = self.losses(outputs, part.mask, held)
                # The mean over the minibatch's tokens, whoever holds them: gradients are averaged over processes.
                share = processes / tokens if counts else 0.0
                self.accelerator.backward(found["loss"] * share)
            for name, value in found.items():
                totals[name] = totals.get(name, 0.0) + value.detach() * share
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.training.grad_clip or math.inf)
        names = list(totals)
        means = self.accelerator.reduce(torch.stack([totals[name] for name in names]), "mean").tolist()
        result = {**dict(zip(names, means, strict=True)), "grad_norm": float(norm)}
        if not all(map(math.isfinite, result.values())):
            good = self.run.folder.newest_whole()
            raise UserError(f"the loss or the gradient became NaN or infinite at step {self.run.step + 1}; the last good checkpoint is "
                            f"{good or 'none'}. A lower training.lr or ppo.value_lr, grad_clip or precision: fp32 may help (another lr "
                            "is another run: give it another name=)")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    # -- resume state

    def _save(self, folder: Path) -> None:
        save_state(folder, self.policy, self.optimizer)
        write_json(folder / "ppo.json", {"kl_coefficient": self.coefficient})

    def _load(self, folder: Path) -> None:
        load_state(folder, self.policy, self.optimizer, self.run.device)
        self.coefficient = json.loads((folder / "ppo.json").read_text(encoding="utf-8"))["kl_coefficient"]
