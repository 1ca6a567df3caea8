"""Rewards: what reinforcement learning teaches a policy to get more of.

Each reward is a callable in the form that TRL's trainers take,

    reward(prompts: list[str], completions: list[str], **kwargs) -> list[float | None]

where `kwargs` hold `completion_ids` (the sampled tokens of each completion, its end token included where one was sampled) and
perhaps `prompt_ids` (without them prompts are tokenised again). None means that the completion could not be judged: it is
left out and counted, and never earns something in between. `build_rewards` makes the rewards of a config; `combine` adds them up by
their weights and says how each of them was distributed.

What each is for, and how it can be gamed:
- `margin`, a learned grammar reward: what a stronger teacher finds likelier than the policy's starting point did;
- `likelihood`: what some model finds likely. Alone it favours text that is easy to predict, up to endless repetition;
- `judge`: the grades of an instruct model (interactive/judge.py);
- `length` and `repetition`: no use alone, but they close the two commonest ways around the others;
- `random`: nothing at all, the control.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from babylm import models
from babylm.config import JudgeReward, LengthReward, LikelihoodReward, MarginReward, RandomReward, RepetitionReward, RewardSection
from babylm.run_folder import require_finished
from babylm.schema import UserError
from custom_dataset import file_sha256, tokenizer_fingerprint
from interactive.judge import SHIPPED_RUBRIC, Judge, Rubric, open_judge, weights_fingerprint

LOGIT_VALUES = 2**26  # logits held in fp32 at a time: 256 MiB

Ids = list[int]
Parts = list[float | None]


# ---- Log-probabilities of completions -------------------------------------------------------------------------------


class CompletionScorer:
    """A frozen causal model's log-probabilities of the tokens of completions.

    Rows are padded on the right and masked; logits are computed at the completions' tokens alone and in chunks, so that nothing of
    the size [batch, tokens, vocabulary] exists (unless the model has no plain output head: then in its own precision).

    Args:
        model: on its device; put into eval mode. Its weights must be frozen, so that it cannot be the policy by mistake.
        batch_size: completions per forward pass.
        about: what error messages call it.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, about: str):
        if any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"{about}: its weights are not frozen (requires_grad): is it the policy itself? Give a frozen copy")
        self.model, self.batch_size, self.about = model, batch_size, about
        self.body, self.head = models.body_and_head(model)
        self.limit = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def logprobs(self, prompts: Sequence[Ids], completions: Sequence[Ids]) -> list[torch.Tensor]:
        """log p(token | prompt, tokens before it) in nats, float64 [len(completion)] on the CPU, for each completion.

        Args:
            prompts: token ids, at least one each (the start token), without padding.
            completions: token ids, without padding.

        Raises:
            UserError: a text has no room in the model's positions, or a log-probability is not finite.
        """
        self.model.eval()
        result: list[torch.Tensor] = [torch.zeros(0, dtype=torch.float64)] * len(prompts)
        rows = [[*prompt, *completion][:-1] for prompt, completion in zip(prompts, completions, strict=True)]  # nothing follows the last
        if self.limit and (longest := max(map(len, rows), default=0)) > self.limit:
            raise UserError(f"{self.about} has {self.limit} positions, but prompt and completion have {longest + 1} tokens: shorten them, "
                            "or choose a model with more positions")
        order = sorted((number for number in range(len(rows)) if completions[number]), key=lambda number: len(rows[number]))
        for begin in range(0, len(order), self.batch_size):
            chosen = order[begin: begin + self.batch_size]
            width = len(rows[chosen[-1]])
            ids = torch.tensor([rows[number] + [0] * (width - len(rows[number])) for number in chosen])
            read = torch.tensor([[1] * len(rows[number]) + [0] * (width - len(rows[number])) for number in chosen])
            asked = torch.zeros_like(read, dtype=torch.bool)  # positions whose next token belongs to the completion
            for row, number in enumerate(chosen):
                asked[row, len(prompts[number]) - 1: len(rows[number])] = True
            targets = torch.tensor([token for number in chosen for token in completions[number]])
            values = self._of_targets(ids, read, asked, targets)
            if not values.isfinite().all():
                raise UserError(f"{self.about} gives log-probabilities that are not finite: it cannot reward anything")
            for number, own in zip(chosen, values.split([len(completions[number]) for number in chosen]), strict=True):
                result[number] = own
        return result

    def _of_targets(self, ids: torch.Tensor, read: torch.Tensor, asked: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        device = self.model.device
        inputs = {"input_ids": ids.to(device), "attention_mask": read.to(device), "use_cache": False}
        asked, targets = asked.to(device), targets.to(device)
        if self.head is None:
            states, head = self.model(**inputs).logits[asked], lambda logits: logits
        else:
            states, head = self.body(**inputs).last_hidden_state[asked], self.head
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        rows = max(1, LOGIT_VALUES // vocabulary)
        return torch.cat([-F.cross_entropy(head(some).float(), goal, reduction="none")
                          for some, goal in zip(states.split(rows), targets.split(rows), strict=True)]).double().cpu()


# ---- The rewards ----------------------------------------------------------------------------------------------------


class Reward:
    """What all rewards have: `__name__` (unique in a run; the log's name of it), `weight` in the sum, `counts` for the log."""

    def __init__(self, name: str, entry: RewardSection):
        self.__name__ = name
        self.weight = entry.weight
        self.counts: Counter[str] = Counter()

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> Parts:
        """The reward of each completion, None where there is none."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__name__}, weight {self.weight:g})"


class Margin(Reward):
    """The learned grammar reward: how much likelier a stronger teacher finds a completion than the policy's starting point does.

        r(x, y) = 1/|y| * sum_t [log p_teacher(y_t | x, y_<t) - log p_reference(y_t | x, y_<t)]        nats per token

    over the tokens of the completion y, its end token included, after the prompt x; `normalise: sequence` leaves the 1/|y| out.
    Subtracting the reference takes away what is merely frequent: words that both models expect earn nothing.

    With the sum, and a KL coefficient of 1 in the objective, the teacher itself is what is being learned. Write P for probabilities
    of whole completions, P(y|x) = prod_t p(y_t | x, y_<t); then r = log P_teacher(y|x) - log P_reference(y|x) and

        E_policy[r] - KL(policy || reference)
            = E_policy[log P_teacher - log P_reference] - E_policy[log P_policy - log P_reference]
            = E_policy[log P_teacher - log P_policy]
            = -KL(policy || teacher),

    at most 0, and 0 only where the policy is the teacher (on whatever prompts are drawn; on beginnings, where completions are
    cut off at a length; and with tokens drawn from the policy as it is: temperature 1, no top-k, no top-p). In general a
    coefficient b has its optimum at P_reference^(1-1/b) * P_teacher^(1/b), normalised: b > 1 stops between the two, b < 1 goes
    beyond the teacher, which is where a reward begins to be exploited. This is on-policy distillation by reverse KL with a
    sequence-level signal. With the mean per token the optimum has no such form: a given advantage in nats is worth less in a
    long completion.
    """

    def __init__(self, name: str, entry: MarginReward, tokenizer: PreTrainedTokenizerFast, teacher: PreTrainedModel,
                 reference: PreTrainedModel | None):
        super().__init__(name, entry)
        self.tokenizer, self.per_token = tokenizer, entry.normalise == "token"
        self.teacher = CompletionScorer(teacher, entry.batch_size, f"{name}: the teacher {entry.teacher}")
        self.reference = CompletionScorer(reference, entry.batch_size, f"{name}: the reference") if entry.baseline == "reference" else None

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> Parts:
        before, sampled = sampled_tokens(self.tokenizer, prompts, self.__name__, kwargs)
        margins = self.teacher.logprobs(before, sampled)
        if self.reference:
            margins = [one - other for one, other in zip(margins, self.reference.logprobs(before, sampled), strict=True)]
        return [_sum_or_mean(values, self.per_token) for values in margins]


class Likelihood(Reward):
    """Mean log-probability per token of the completion under a given model, in nats.

    A model with the policy's vocabulary scores the sampled tokens, the end token included. Another reads prompt and completion
    with its own tokenizer, after its own start token, and scores the tokens that end inside the completion; that a text ended is
    then not scored, and a completion without text, or too long for the model, has no reward (None).
    """

    def __init__(self, name: str, entry: LikelihoodReward, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel,
                 its_tokenizer: PreTrainedTokenizerFast):
        super().__init__(name, entry)
        self.scorer = CompletionScorer(model, entry.batch_size, f"{name}: the model {entry.model}")
        self.tokenizer = tokenizer
        self.own = None if tokenizer_fingerprint(its_tokenizer) == tokenizer_fingerprint(tokenizer) else its_tokenizer

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> Parts:
        if self.own is None:
            before, tokens = sampled_tokens(self.tokenizer, prompts, self.__name__, kwargs)
        else:
            before, tokens = self._read_again(prompts, completions)
        return [_sum_or_mean(values, per_token=True) for values in self.scorer.logprobs(before, tokens)]

    def _read_again(self, prompts: list[str], completions: list[str]) -> tuple[list[Ids], list[Ids]]:
        before, after = [], []
        start = self.own.bos_token_id if self.own.bos_token_id is not None else self.own.eos_token_id
        for prompt, completion in zip(prompts, completions, strict=True):
            # split_special_tokens: a policy must not write "</s>" in letters and have it read as the end token
            read = self.own(prompt + completion, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
            first = next((place for place, (_, end) in enumerate(read.offset_mapping) if end > len(prompt)), len(read.input_ids))
            ids = [start, *read.input_ids] if start is not None else read.input_ids
            first = first + 1 if start is not None else max(first, 1)  # without a start token nothing predicts the first one
            fits = not self.scorer.limit or len(ids) - 1 <= self.scorer.limit
            before.append(ids[:first] if fits else [0])
            after.append(ids[first:] if fits else [])
        return before, after


class Judged(Reward):
    """The sum of a judge's grades over the highest possible sum, 0 ... 1; None where the judge gave none."""

    def __init__(self, name: str, entry: JudgeReward, judge: Judge):
        super().__init__(name, entry)
        self.judge, self.counts = judge, judge.counts
        self.highest = len(entry.criteria) * entry.max_grade

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> Parts:
        return [sum(grades.values()) / self.highest if grades else None for grades in self.judge.grade(prompts, completions)]


class Length(Reward):
    """1 where the completion has min_words ... max_words words (split at whitespace), falling in a straight line to 0 at `slack`
    words outside. It cannot be raised by writing on and on."""

    def __init__(self, name: str, entry: LengthReward):
        super().__init__(name, entry)
        self.window, self.slack = (entry.min_words, entry.max_words), entry.slack

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> Parts:
        low, high = self.window
        return [max(0.0, 1 - max(low - words, words - high, 0) / self.slack) for words in (len(text.split()) for text in completions)]


class Repetition(Reward):
    """Minus the share of n-grams that occurred before within the completion: 0 where all differ, towards -1 where one is repeated.

    The units are words and single punctuation marks, upper and lower case alike. Fewer than n of them repeat nothing: 0.
    """

    def __init__(self, name: str, entry: RepetitionReward):
        super().__init__(name, entry)
        self.n = entry.n

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> Parts:
        return [self._of(re.findall(r"\w+|[^\w\s]", text.casefold())) for text in completions]

    def _of(self, units: list[str]) -> float:
        grams = list(zip(*(units[begin:] for begin in range(self.n)), strict=False))
        return len(set(grams)) / len(grams) - 1 if grams else 0.0


class Random(Reward):
    """Uniform in 0 ... 1, drawn from (seed, prompt, sampled tokens): the same whenever the same completion comes up, so that a
    resumed run is rewarded as the uninterrupted one was."""

    def __init__(self, name: str, entry: RandomReward, seed: int):
        super().__init__(name, entry)
        self.seed = seed

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> Parts:
        sampled = _completion_ids(self.__name__, prompts, kwargs)
        return [int.from_bytes(hashlib.sha256(json.dumps([self.seed, prompt, ids]).encode()).digest()[:6]) / 2**48
                for prompt, ids in zip(prompts, sampled, strict=True)]


def _sum_or_mean(values: torch.Tensor, per_token: bool) -> float | None:
    if not len(values):
        return None  # nothing was sampled: there is nothing to reward
    return float(values.mean() if per_token else values.sum())


def _completion_ids(name: str, prompts: Sequence[str], kwargs: dict[str, Any]) -> list[Ids]:
    if kwargs.get("completion_ids") is None:
        raise ValueError(f"{name} rewards the sampled tokens: pass completion_ids=[[...], ...] beside prompts and completions")
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{name}: prompts must be plain texts, not conversations")
    return [[int(token) for token in ids] for ids in kwargs["completion_ids"]]


def sampled_tokens(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], name: str, kwargs: dict[str, Any],
                   ) -> tuple[list[Ids], list[Ids]]:
    """(prompt ids, completion ids) of each row: what the policy read and sampled.

    Prompts come from `prompt_ids` or, without it, are tokenised as a sampler does, the tokenizer prepending its start token; an
    empty one is the start token alone. What lies after the first end token of a completion is padding and left out.
    """
    end, start = tokenizer.eos_token_id, tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    given = kwargs.get("prompt_ids")
    before = [[int(token) for token in ids] for ids in given] if given is not None else tokenizer(list(prompts)).input_ids
    sampled = [ids[: ids.index(end) + 1] if end in ids else ids for ids in _completion_ids(name, prompts, kwargs)]
    return [ids or [start] for ids in before], sampled


# ---- From a config to rewards ---------------------------------------------------------------------------------------


def reward_fingerprints(entries: Sequence[RewardSection], tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Check what the rewards read, and say what it is: part of a run's identity, like the data (RunFolder.open).

    Weights and the rubric are known by their content, so that they may be moved but not changed; hub names stand for themselves.

    Returns:
        {"reward0.teacher": hash, "reward1.rubric": hash, ...}.

    Raises:
        UserError: a model is missing or unfinished or has another vocabulary than it must have; what is wrong with the rubric.
    """
    found = {}
    for number, entry in enumerate(entries):
        where, prefix = f"rewards.{number}", f"reward{number}"
        if isinstance(entry, MarginReward):
            require_finished(entry.teacher, f"{where}.teacher")
            models.require_same_vocabulary(entry.teacher, tokenizer, "teacher")
            found[f"{prefix}.teacher"] = weights_fingerprint(entry.teacher)
        elif isinstance(entry, LikelihoodReward):
            require_finished(entry.model, f"{where}.model")
            found[f"{prefix}.model"] = weights_fingerprint(entry.model)
        elif isinstance(entry, JudgeReward):
            Rubric.read(entry.rubric, entry.criteria, entry.max_grade)
            found[f"{prefix}.rubric"] = file_sha256(entry.rubric or SHIPPED_RUBRIC)
            if not entry.server:
                require_finished(entry.model, f"{where}.model")
                found[f"{prefix}.model"] = weights_fingerprint(entry.model)
    return found


def build_rewards(entries: Sequence[RewardSection], tokenizer: PreTrainedTokenizerFast, reference: PreTrainedModel | None,
                  device: str | torch.device, seed: int, cache_dir: str | Path | None, longest: int | None = None) -> list[Reward]:
    """The rewards of a config, ready to be called.

    Args:
        entries: `rewards` of the config.
        tokenizer: the policy's.
        reference: the frozen starting policy, needed by `margin` with `baseline: reference`.
        device: where models run that have no device of their own.
        seed: of the run; draws random rewards and a judge's retries.
        cache_dir: folder for a judge's grades; None keeps them in memory.
        longest: tokens of the longest prompt and completion together, if known: models without room for it are refused here.

    Raises:
        UserError: a model is missing, unfinished, of another vocabulary or too short; a judge does not answer; what is wrong with
            the rubric. All that can be said without loading a model is said first.
    """
    reward_fingerprints(entries, tokenizer)
    devices = [_device(getattr(entry, "device", None) or device, f"rewards.{number}.device") for number, entry in enumerate(entries)]
    for number, entry in enumerate(entries):
        if isinstance(entry, MarginReward) and entry.baseline == "reference" and reference is None:
            raise UserError(f"rewards.{number}: baseline: reference needs the frozen starting policy, but got none: set baseline: none")
    rewards: list[Reward] = []
    loaded: dict[tuple[str, torch.device], PreTrainedModel] = {}  # two entries may share a model
    for number, (entry, place) in enumerate(zip(entries, devices, strict=True)):
        same = sum(before.kind == entry.kind for before in entries[:number])
        name = entry.kind + (f"_{same + 1}" if same else "")
        if isinstance(entry, MarginReward):
            teacher = _frozen(loaded, entry.teacher, place, lambda entry=entry: models.load_teacher(entry.teacher, tokenizer))
            rewards.append(Margin(name, entry, tokenizer, teacher, reference))
            _require_room(rewards[-1].teacher, longest, f"rewards.{number}.teacher")
        elif isinstance(entry, LikelihoodReward):
            model = _frozen(loaded, entry.model, place, lambda entry=entry: models.load_causal_lm(entry.model))
            rewards.append(Likelihood(name, entry, tokenizer, model, models.load_tokenizer(entry.model)))
            if rewards[-1].own is None:
                _require_room(rewards[-1].scorer, longest, f"rewards.{number}.model")
        elif isinstance(entry, JudgeReward):
            rewards.append(Judged(name, entry, open_judge(entry, place, seed, cache_dir, f"rewards.{number}")))
        elif isinstance(entry, LengthReward):
            rewards.append(Length(name, entry))
        elif isinstance(entry, RepetitionReward):
            rewards.append(Repetition(name, entry))
        elif isinstance(entry, RandomReward):
            rewards.append(Random(name, entry, seed))
        else:
            raise TypeError(f"rewards.{number}: no reward is known for {type(entry).__name__}")
    return rewards


def _frozen(loaded: dict, path: str, device: torch.device, load: Any) -> PreTrainedModel:
    if (path, device) not in loaded:
        loaded[path, device] = load().eval().requires_grad_(False).to(device)
    return loaded[path, device]


def _device(name: str | torch.device, where: str) -> torch.device:
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{where}: {name} is no device of this machine ({str(error).splitlines()[0]}): try cpu or cuda:0") from None


def _require_room(scorer: CompletionScorer, longest: int | None, where: str) -> None:
    if longest and scorer.limit and longest - 1 > scorer.limit:
        raise UserError(f"{where}: it has {scorer.limit} positions, but prompts and completions have up to {longest} tokens: shorten them, "
                        "or choose a model with more positions")


# ---- The sum --------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Rewards of a batch of completions.

    Attributes:
        total: sum of weight x part for each completion; None where a part with a weight other than 0 is None.
        parts: {name of a reward: its values, not weighted}.
        stats: for the log: `mean` and `std` (of the population) of the totals and, after the reward's name and a slash, of every part,
            over those that are not None; `excluded` completions and `excluded_share`; what a judge counted in this batch (`judge/calls`,
            `judge/retries`, `judge/parse_failures`, `judge/cache_hits`, `judge/ungraded`) and `judge/parse_failure_rate`, the share
            of its answers that were not in the asked-for form. What is not defined (a mean of nothing) is left out.
    """

    total: Parts
    parts: dict[str, Parts]
    stats: dict[str, float]


def combine(rewards: Sequence[Reward], prompts: list[str], completions: list[str], **kwargs: Any) -> Scores:
    """Call every reward and add them up by their weights.

    Args:
        rewards: from `build_rewards`; a weight of 0 is computed and logged, but neither adds to nor excludes anything.
        prompts, completions: texts, one for each completion.
        kwargs: `completion_ids`, perhaps `prompt_ids`, passed on.
    """
    parts: dict[str, Parts] = {}
    counted: dict[str, float] = {}
    for reward in rewards:
        before = dict(reward.counts)
        parts[reward.__name__] = values = reward(prompts, completions, **kwargs)
        if len(values) != len(completions):
            raise ValueError(f"{reward.__name__} gave {len(values)} rewards for {len(completions)} completions")
        new = {name: count - before.get(name, 0) for name, count in reward.counts.items()}
        counted |= {f"{reward.__name__}/{name}": float(count) for name, count in new.items()}
        if new.get("calls"):
            counted[f"{reward.__name__}/parse_failure_rate"] = new["parse_failures"] / new["calls"]
    weights = {reward.__name__: reward.weight for reward in rewards if reward.weight}
    total: Parts = []
    for number in range(len(completions)):
        row = [(weight, parts[name][number]) for name, weight in weights.items()]
        total.append(None if any(value is None for _, value in row) else math.fsum(weight * value for weight, value in row))
    excluded = total.count(None)
    stats = _moments("", total) | {"excluded": float(excluded), "excluded_share": excluded / len(total) if total else 0.0}
    for name, values in parts.items():
        stats |= _moments(f"{name}/", values) | {f"{name}/excluded": float(values.count(None))}
    return Scores(total, parts, stats | counted)


def _moments(prefix: str, values: Parts) -> dict[str, float]:
    known = [value for value in values if value is not None]
    if not known:
        return {}
    mean = math.fsum(known) / len(known)
    return {f"{prefix}mean": mean, f"{prefix}std": math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))}
