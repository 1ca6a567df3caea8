"""GRPO, RLOO and online DPO on TRL's trainers. TRL computes advantages and losses; what it writes and when it stops is the run's.

What TRL does otherwise, and why it is not left to it here:

- it samples in train mode (with dropout), from the global random state: here `rollout.sample` writes, in eval mode, every completion
  from a seed of its own, and dropout is off in the updates too, so that log-probabilities of rollout and update agree;
- it pads prompts on the left and gives no positions: a model with learned positions (GPT-2) then scores other log-probabilities than
  it sampled by. Here positions are counted from the first real token;
- a completion without a reward gets advantage 0 from it, but its KL stays in GRPO's loss and its place in the mean: here neither;
- DPO decodes, appends an end token to every text, also one that was cut at its limit, and tokenises again: here it gets the tokens
  that were sampled;
- it writes pad and end tokens into the model's config, model cards into the run folder, and reports its use to a server: not here.

TRL is imported where it is used: installations that do not train by these algorithms need not have it.
"""

import contextlib
import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from babylm.config import RLConfig
from babylm.schema import UserError
from babylm.training import accumulation_steps
from interactive.rehearsal import rehearse
from interactive.rl_run import RLRun, load_state, save_state, tracked
from interactive.rollout import Sample, body_and_head, completion_logprobs, sample, seeds_of, switch_off_dropout

ENDLESS = 10**9  # optimizer steps: the run's budget ends training, not the Trainer's count
TIE = 1e-9  # rewards that differ by no more are equal


def train(config: RLConfig, run: RLRun, model: PreTrainedModel) -> None:
    """Train `model` by config.algorithm (grpo, rloo or dpo) until the run's budget is used up; resume where the run folder says so.

    Args:
        model: the policy, on the run's device.

    Raises:
        Preempted: a signal asked the run to stop; its state is saved.
        UserError: trl is not installed, batches do not divide, or a step failed.
    """
    require_trl(config.algorithm)
    if config.dry_run:
        if config.algorithm == "dpo":
            pairs_per_device(config, run.state.num_processes)
        switch_off_dropout(model)
        return rehearse(run, model)
    with warnings.catch_warnings():
        # TRL and the Trainer warn of names of their own.
        warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
        _train(PolicyState(config, run, model))


def _train(state: "PolicyState") -> None:
    config, run = state.config, state.run
    grouped = config.algorithm in ("grpo", "rloo")
    trainer = group_trainer(state) if grouped else dpo_trainer(state)
    if config.logging.trackers:
        from accelerate.tracking import filter_trackers

        trainer.accelerator.log_with = filter_trackers(config.logging.trackers, str(run.folder.run))
        trainer.accelerator.init_trackers(config.name, config=tracked(config))
    run.start(state.model)
    if grouped and not run.done:
        trainer.train()
    while not run.done:
        dpo_round(trainer, state)
    run.finish(state.model)


def require_trl(algorithm: str) -> None:
    """UserError unless TRL, and what it needs, can be imported."""
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError(f"algorithm: {algorithm} needs the package {error.name}: pip install {error.name}; or use algorithm: ppo") from None


# ---- What both kinds of trainer share -------------------------------------------------------------------------------


class PolicyState:
    """The policy, without dropout, its optimizer, and how both are stored; loaded from the run's checkpoint where it resumes.

    Attributes:
        terms: sums and counts of what the present step reports, {name: [sum, count]}.
    """

    def __init__(self, config: RLConfig, run: RLRun, model: PreTrainedModel):
        self.config, self.run, self.model = config, run, model
        switch_off_dropout(model)
        section = config.training
        groups = [{"params": [p for p in model.parameters() if (p.ndim > 1) is matrices], "weight_decay": decay}
                  for matrices, decay in ((True, section.weight_decay), (False, 0.0))]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=section.lr,
                                           betas=(section.beta1, section.beta2), fused=True)
        self.terms: dict[str, list[float]] = {}
        self._held = [(owner, name, getattr(owner, name, None)) for owner in (model.config, model.generation_config)
                      for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
        if run.folder.resume_from:
            load_state(run.folder.resume_from, model, self.optimizer, run.device)

    def keep_special_tokens(self) -> None:
        """Undo what TRL and the Trainer wrote into the model's config: the trained model is saved with the ids it came with."""
        for owner, name, value in self._held:
            setattr(owner, name, value)

    def set_learning_rate(self) -> None:
        """The rate of the run's next step, by the run's own schedule (its end is in words, which no scheduler knows)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.training.lr * self.run.learning_rate_share()

    def report(self, **terms: float) -> None:
        """Add to the step's means."""
        for name, value in terms.items():
            held = self.terms.setdefault(name, [0.0, 0])
            held[0], held[1] = held[0] + value, held[1] + 1

    def take_terms(self) -> dict[str, float]:
        """The means of what was reported since the last call."""
        means = {name: total / count for name, (total, count) in self.terms.items()}
        self.terms = {}
        return means

    def require_finite(self, loss: float, norm: float) -> None:
        """UserError before the optimizer would take a step that destroys the weights."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            good = self.run.folder.newest_whole()
            raise UserError(f"the loss or the gradient became NaN or infinite at step {self.run.step + 1}; the last good checkpoint is "
                            f"{good or 'none'}. A lower training.lr, grad_clip or precision: fp32 may help (another lr is another run: "
                            "give it another name=)")

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into a folder."""
        save_state(folder, self.model, self.optimizer)


def trainer_arguments(state: PolicyState, per_device: int, accumulation: int) -> dict[str, Any]:
    """The arguments that the configs of all TRL trainers take."""
    training, run = state.config.training, state.run
    return {"output_dir": str(run.folder.run), "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation,
            "learning_rate": training.lr, "lr_scheduler_type": "constant", "max_grad_norm": training.grad_clip, "seed": state.config.seed,
            # In bf16 accelerate would replace the model's forward, and its body and head would then compute otherwise than it does.
            "bf16": False, "fp16": False, "use_cpu": run.device.type == "cpu",
            "gradient_checkpointing": training.gradient_checkpointing, "router_aux_loss_coef": 0.0,
            # The run decides when to log, validate and save.
            "logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "logging_nan_inf_filter": False, "remove_unused_columns": False, "dataloader_pin_memory": run.device.type != "cpu"}


def quiet(base: type) -> type:
    """A TRL trainer class without its telemetry and its own logging, that notes losses and gradient norms in its PolicyState."""

    class Quiet(base):
        policy_state: PolicyState
        _loss = 0.0

        def _send_telemetry(self) -> None:
            pass

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            self._metrics["train"].clear()

        def compute_loss_context_manager(self) -> contextlib.ExitStack:
            contexts = super().compute_loss_context_manager()
            contexts.enter_context(self.policy_state.run.autocast())
            return contexts

        def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*args, **options)
            self._loss += float(loss)  # TRL and the Trainer have divided it by the micro-steps
            return loss

        def _get_grad_norm(self, *args: Any, **options: Any) -> Any:
            norm = float(super()._get_grad_norm(*args, **options))
            loss = float(self.accelerator.reduce(torch.tensor(self._loss, device=self.args.device), "mean"))
            self._loss = 0.0
            self.policy_state.require_finite(loss, norm)
            self.policy_state.report(loss=loss, grad_norm=norm, lr=self.policy_state.optimizer.param_groups[0]["lr"])
            return norm

    Quiet.__name__ = base.__name__
    return Quiet


class StepCallback(TrainerCallback):
    """Tells the run of steps."""

    def __init__(self, state: PolicyState):
        self.policy_state = state

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.policy_state.keep_special_tokens()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.policy_state.set_learning_rate()


# ---- GRPO and RLOO --------------------------------------------------------------------------------------------------


class GroupCallback(StepCallback):
    """Ends a step of the run when its batch of completions has been learned from `epochs` times."""

    trainer: Any

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.num_iterations == 0:
            self.trainer.end_step()
            control.should_training_stop = self.policy_state.run.done


def group_trainer(state: PolicyState) -> Any:
    """TRL's GRPOTrainer or RLOOTrainer, as config.algorithm says, that samples, scores, excludes and stops by the run.

    The losses are TRL's: GRPO as a mean over the tokens of the whole batch (its `dapo` normalisation, which accumulation does not
    change), advantages divided by their group's standard deviation; RLOO per completion, KL in the reward.
    """
    import trl
    from datasets import Dataset
    from trl.trainer.utils import add_fused_lm_head

    config, run, algorithm = state.config, state.run, state.config.algorithm
    section = getattr(config, algorithm)
    per_device, accumulation = accumulation_steps(config, run.state.num_processes)
    base, settings = ((trl.GRPOTrainer, trl.GRPOConfig) if algorithm == "grpo" else (trl.RLOOTrainer, trl.RLOOConfig))
    own = {"loss_type": "dapo"} if algorithm == "grpo" else {}
    # beta 0 here: with another value TRL would load a reference model of its own; the run's is given to it below.
    arguments = settings(**trainer_arguments(state, per_device, accumulation), max_steps=ENDLESS, num_generations=section.group, beta=0.0,
                         max_completion_length=config.generation.max_new_tokens, temperature=config.generation.temperature,
                         epsilon=section.clip, num_iterations=section.epochs, shuffle_dataset=False, **own)

    class GroupTrainer(quiet(base)):
        loss_is_scaled_for_ga = algorithm == "grpo"  # RLOO's loss is the mean of a micro-batch
        policy_state = state
        samples: Sequence[Sample] = ()  # of this process
        everyone: Sequence[Sample] = ()  # of all

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            size = config.training.batch_size
            share = size // run.state.num_processes  # rows in order: TRL takes `group` rows after each other for one prompt
            rows = range(share * run.state.process_index, share * (run.state.process_index + 1))
            prompts = run.prompts.batch(run.step, size // section.group)
            with run.autocast():
                self.samples = sample(self.accelerator.unwrap_model(self.model_wrapped), run.tokenizer,
                                      [prompts[row // section.group] for row in rows], seeds_of(config.seed, run.step, rows),
                                      max_new_tokens=config.generation.max_new_tokens, temperature=config.generation.temperature,
                                      batch_size=per_device)
            run.score(self.samples)
            self.everyone = run.gather(rows, self.samples)
            torch.manual_seed(run.seed_of("order"))  # TRL shuffles the batch: a resumed run must do it alike
            batch = super()._generate_and_score_completions([{"prompt": s.prompt} for s in self.samples])
            return self._without_excluded(batch)

        def _without_excluded(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            scored = torch.tensor([s.reward is not None for s in self.samples], device=self.accelerator.device)
            if algorithm == "grpo":
                batch["completion_mask"] = batch["completion_mask"] * scored[:, None]
                batch["num_items_in_batch"] = self.accelerator.gather(batch["completion_mask"].sum()).sum()
            else:  # advantage 0 already; the mean that TRL takes over all rows becomes one over the scored ones
                count = sum(s.reward is not None for s in self.everyone)
                batch["advantages"] = batch["advantages"] * len(self.everyone) / count
            return batch

        def _tokenize_prompts(self, prompts: Any) -> tuple:
            return [s.prompt_ids for s in self.samples], None, {}

        def _generate_single_turn(self, *_: Any, **__: Any) -> Any:
            ids = [s.completion_ids for s in self.samples]
            return (ids, None) if algorithm == "grpo" else ids

        def _calculate_rewards(self, *_: Any, **__: Any) -> torch.Tensor:
            rewards = [math.nan if s.reward is None else s.reward for s in self.samples]
            return self.accelerator.gather(torch.tensor(rewards, dtype=torch.float32, device=self.accelerator.device)[:, None])

        def _get_per_token_logps_and_entropies(self, model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                                               logits_to_keep: int, batch_size: int | None = None, **_: Any) -> tuple:
            found = []
            labels = input_ids.masked_fill(attention_mask == 0, -100)
            labels[:, :-logits_to_keep] = -100
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)  # prompts are padded on the left
            for rows in torch.arange(len(input_ids)).split(batch_size or len(input_ids)):
                chosen = slice(int(rows[0]), int(rows[-1]) + 1)
                with run.autocast():
                    outputs = model(input_ids=input_ids[chosen], attention_mask=attention_mask[chosen], position_ids=positions[chosen],
                                    labels=labels[chosen], fused_lm_head=True)
                found.append((outputs.log_probs[:, -logits_to_keep:],
                              None if outputs.entropy is None else outputs.entropy[:, -logits_to_keep:]))
            logprobs, entropies = zip(*found, strict=True)
            return torch.cat(logprobs), None if entropies[0] is None else torch.cat(entropies), None

        def end_step(self) -> None:
            names = {"kl": "kl", "entropy": "entropy", "clip_ratio/region_mean": "clipped"}
            for theirs, ours in names.items():
                if values := [value for value in self._metrics["train"].pop(theirs, ()) if math.isfinite(value)]:
                    state.report(**{ours: sum(values) / len(values)})
            self._metrics["train"].clear()
            _end_step(self, state, self.everyone, state.take_terms())

    callback = GroupCallback(state)
    placeholder = Dataset.from_dict({"prompt": [""] * (config.training.batch_size // section.group * 64)})  # prompts come from the run
    trainer = GroupTrainer(model=state.model, reward_funcs=_reward, args=arguments, train_dataset=placeholder, callbacks=[callback],
                           processing_class=_for_trl(run.tokenizer), optimizers=(state.optimizer, _constant(state.optimizer)))
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer
    if section.beta:
        add_fused_lm_head(run.reference, temperature=config.generation.temperature)
        trainer.beta, trainer.ref_model = section.beta, run.reference
    return trainer


def _reward(**_: Any) -> list[float]:
    raise NotImplementedError("rewards come from the run")


def _constant(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def _for_trl(tokenizer: Any) -> Any:
    """A copy that TRL may change."""
    return copy.deepcopy(tokenizer)


def _end_step(trainer: Any, state: PolicyState, samples: Sequence[Sample], terms: dict[str, float]) -> None:
    row = state.run.end_step(state.model, samples, terms)
    if state.config.logging.trackers and row:
        trainer.accelerator.log(row, step=state.run.step)
    state.run.save_or_stop(state.save)


# ---- DPO in rounds --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, by their places in the round's list of samples."""

    chosen: int
    rejected: int


def rank(samples: Sequence[Sample]) -> tuple[list[Pair], dict[str, int]]:
    """Pairs (better, worse) of neighbouring samples, 0 with 1, 2 with 3, ..., and what was left out.

    Returns:
        (pairs, {"pairs", "ties", "excluded_pairs"}); a tie teaches nothing, and neither does a pair with an excluded side.
    """
    pairs, ties, excluded = [], 0, 0
    for first in range(0, len(samples), 2):
        one, other = samples[first].reward, samples[first + 1].reward
        if one is None or other is None:
            excluded += 1
        elif abs(one - other) <= TIE:
            ties += 1
        else:
            pairs.append(Pair(first, first + 1) if one > other else Pair(first + 1, first))
    return pairs, {"pairs": len(pairs), "ties": ties, "excluded_pairs": excluded}


def pairs_per_device(config: RLConfig, processes: int) -> tuple[int, int]:
    """(pairs per device and micro-step, micro-steps per optimizer step): training.batch_size counts completions, two to a pair."""
    per_device, accumulation = accumulation_steps(config, processes)
    if per_device % 2:
        raise UserError(f"algorithm: dpo learns from pairs, but a device would get {per_device} completions at once (training.batch_size, "
                        "per_device_batch_size): take even numbers")
    return per_device // 2, accumulation


def dpo_trainer(state: PolicyState) -> Any:
    """TRL's DPOTrainer, which `dpo_round` gives the pairs of one round after the other."""
    import trl
    from datasets import Dataset
    from trl.trainer.utils import add_fused_lm_head

    config, run = state.config, state.run
    per_device, accumulation = pairs_per_device(config, run.state.num_processes)

    class RoundTrainer(quiet(trl.DPOTrainer)):
        policy_state = state

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # token ids already: those that were sampled

        def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    arguments = trl.DPOConfig(**trainer_arguments(state, per_device, accumulation), beta=config.dpo.beta, max_length=None,
                              num_train_epochs=1)
    nothing = Dataset.from_list([{"prompt_ids": [0], "chosen_ids": [0], "rejected_ids": [0]}])
    trainer = RoundTrainer(model=state.model, ref_model=run.reference, args=arguments, train_dataset=nothing,
                           callbacks=[StepCallback(state)], processing_class=_for_trl(run.tokenizer),
                           optimizers=(state.optimizer, _constant(state.optimizer)))
    trainer.remove_callback(PrinterCallback)
    # Log-probabilities at the temperature that was sampled with, which TRL's DPO does not know.
    add_fused_lm_head(state.model, temperature=config.generation.temperature, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer.precompute_ref_logps, trainer.ref_model = True, None  # dpo_round brings those of the reference along
    state.keep_special_tokens()
    return trainer


def dpo_round(trainer: Any, state: PolicyState) -> None:
    """One step of the run: sample two completions per prompt from the present policy, score and rank them, learn from the pairs."""
    config, run = state.config, state.run
    section, processes = config.dpo, run.state.num_processes
    per_device = pairs_per_device(config, processes)[0]
    rows = range(2 * section.prompts_per_round)[run.state.process_index::processes]
    prompts = run.prompts.batch(run.step, section.prompts_per_round)
    temperature = config.generation.temperature
    with run.autocast():
        mine = sample(state.model, run.tokenizer, [prompts[row // 2] for row in rows], seeds_of(config.seed, run.step, rows),
                      max_new_tokens=config.generation.max_new_tokens, temperature=temperature, batch_size=2 * per_device)
        for name, model in (("logprobs", state.model), ("reference_logprobs", run.reference)):
            found = completion_logprobs(body_and_head(model, "policy"), mine, temperature=temperature, batch_size=2 * per_device)
            for scored, values in zip(mine, found, strict=True):
                setattr(scored, name, values)
    run.score(mine)
    samples = run.gather(rows, mine)
    pairs, counts = rank(samples)
    kl = torch.cat([s.logprobs - s.reference_logprobs for s in samples]).mean()
    terms = {"kl": float(kl), **counts}
    if pairs:
        from datasets import Dataset

        items = round_items(pairs, samples, state)
        trainer.train_dataset = Dataset.from_list(items)
        trainer.train()
        terms |= state.take_terms()
        filled = len(items) / (section.epochs * len(pairs))
        terms["loss"] = terms["loss"] * filled - math.log(2) * (filled - 1)  # without the pairs that fill a batch: log 2 each
    _end_step(trainer, state, samples, terms)


def round_items(pairs: Sequence[Pair], samples: Sequence[Sample], state: PolicyState) -> list[dict[str, Any]]:
    """What DPOTrainer's collator takes, `dpo.epochs` times in an order drawn from (seed, step): ids, and the reference's log-probs.

    The last batch is filled with pairs of a completion and itself, whose gradient is 0: every pair of a round then weighs the same,
    on any number of processes and with any accumulation.
    """
    section, run, items = state.config.dpo, state.run, []
    name = "reference_logprobs" if section.reference == "start" else "logprobs"

    def item(better: Sample, worse: Sample) -> dict[str, Any]:
        return {"prompt_ids": better.prompt_ids, "chosen_ids": better.completion_ids, "rejected_ids": worse.completion_ids,
                "ref_chosen_logps": float(getattr(better, name).sum()), "ref_rejected_logps": float(getattr(worse, name).sum())}

    for epoch in range(section.epochs):
        generator = torch.Generator().manual_seed(run.seed_of(f"epoch {epoch}"))
        order = torch.randperm(len(pairs), generator=generator).tolist()
        items += [item(samples[pairs[place].chosen], samples[pairs[place].rejected]) for place in order]
    same = samples[pairs[0].chosen]
    return items + [item(same, same)] * (-len(items) % (state.config.training.batch_size // 2))
