"""What the policy writes: sampling completions, and the log-probabilities of what was sampled.

A completion is the sampled tokens up to and including the first end token; what generation writes behind it is never looked at.
Prompts are padded on the left for sampling, prompts and completions on the right for everything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerFast

from babylm import models
from babylm.schema import UserError, content_hash


@dataclass
class Sample:
    """One completion and what is known of it.

    Attributes:
        prompt_ids, completion_ids: token ids, the start token and (where it was sampled) the end token included.
        reward: the weighted sum of `parts`; None where a reward could not be given: such a sample teaches nothing.
        logprobs, reference_logprobs, values, entropies: per token of the completion, [len(completion_ids)], in nats (values: reward).
    """

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    finished: bool
    reward: float | None = None
    parts: dict[str, float | None] = field(default_factory=dict)
    logprobs: torch.Tensor | None = None
    reference_logprobs: torch.Tensor | None = None
    values: torch.Tensor | None = None
    entropies: torch.Tensor | None = None

    @property
    def words(self) -> int:
        """Whitespace words that the completion adds to its prompt; one that it only finishes does not count."""
        return len((self.prompt + self.completion).split()) - len(self.prompt.split())


# ---- Sampling -------------------------------------------------------------------------------------------------------


class SeededSampling(LogitsProcessor):
    """Makes sampling of greedy decoding: the largest of log p + Gumbel noise is a draw from p (the Gumbel-max trick).

    Every row has noise of its own, drawn from its own seed: what is sampled depends neither on the other rows of the batch nor on
    what was sampled before, so a run that is resumed, or spread over other processes, samples the same.

    Args:
        seeds: one per row.
        temperature: divides the logits.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device):
        self.temperature = temperature
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self.temperature - noise.clamp_(min=torch.finfo(torch.float32).tiny).log_()


def seeds_of(seed: int, step: int, rows: range, purpose: str = "train") -> list[int]:
    """A seed for every row of a step's batch, the same however rows are spread over processes."""
    return [int(content_hash([purpose, seed, step, row]), 16) % 2**62 for row in rows]


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], seeds: Sequence[int], *,
           max_new_tokens: int, temperature: float = 1.0, batch_size: int | None = None) -> list[Sample]:
    """Let `model` complete every prompt, in eval mode (no dropout), one seed each.

    Args:
        max_new_tokens: longest completion; shorter ones end with an end token.
        batch_size: completions at once; default: all.

    Raises:
        UserError: prompt and completion together exceed the model's positions.
    """
    if not prompts:  # a process that has no share of them
        return []
    encoded = [tokenizer(prompt).input_ids for prompt in prompts]
    limit, longest = getattr(model.config, "max_position_embeddings", None), max(map(len, encoded))
    if limit and longest + max_new_tokens > limit:
        raise UserError(f"a prompt of {longest} tokens and generation.max_new_tokens {max_new_tokens} exceed the {limit} positions of the "
                        "model: use shorter prompts or completions")
    end = tokenizer.eos_token_id
    settings = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, use_cache=True,
                                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end)
    own, samples = model.generation_config, []
    model.generation_config = GenerationConfig()  # its penalties would fill what is not set here, and bend the distribution
    for start in range(0, len(prompts), batch_size or len(prompts)):
        rows = slice(start, start + (batch_size or len(prompts)))
        ids, mask = pad(encoded[rows], left=True, device=model.device)
        sampling = LogitsProcessorList([SeededSampling(seeds[rows], temperature, model.device)])
        with models.mode(model, training=False):
            written = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=sampling)
        for prompt, prompt_ids, row in zip(prompts[rows], encoded[rows], written[:, ids.shape[1]:].tolist(), strict=True):
            # Up to the first end token, by position: comparing with the pad token would cut at one that was sampled, and GPT-2's
            # pad token is its end token.
            length = row.index(end) + 1 if end in row else len(row)
            samples.append(Sample(prompt, text_after(tokenizer, prompt_ids, row[:length]), list(prompt_ids), row[:length],
                                  finished=row[length - 1] == end))
    model.generation_config = own
    return samples


def text_after(tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
    """What `ids` add to the text of `prompt_ids`, special tokens left out.

    Decoded alone they would begin a text: tokenizers in the manner of SentencePiece leave out the space that a text begins with.
    """
    before, whole = (tokenizer.decode(one, skip_special_tokens=True) for one in (list(prompt_ids), [*prompt_ids, *ids]))
    if whole.startswith(before):
        return whole[len(before):]
    return tokenizer.decode(list(ids), skip_special_tokens=True)  # its first bytes make the prompt's last ones no character any more


def pad(rows: Sequence[Sequence[int]], left: bool = False, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask), both [len(rows), longest]; padded places hold 0 in both."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)


# ---- Log-probabilities ----------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Samples as tensors.

    Attributes:
        input_ids, attention_mask: prompt and completion, [B, L].
        positions: [B, R], for every token of a completion the place in the row whose logits predict it.
        targets: [B, R], the tokens themselves.
        mask: [B, R], True where there is one. R is the longest completion.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def collate(samples: Sequence[Sample], device: torch.device | str = "cpu", left: bool = False) -> Batch:
    """Samples as one Batch; the padding may be on either side and changes nothing but where things stand."""
    ids, attention = pad([s.prompt_ids + s.completion_ids for s in samples], left=left, device=device)
    targets, mask = pad([s.completion_ids for s in samples], device=device)
    first = torch.tensor([len(s.prompt_ids) - 1 for s in samples], device=device)
    if left:  # counted from where the row really begins
        first += ids.shape[1] - attention.sum(1)
    positions = (first[:, None] + torch.arange(targets.shape[1], device=device)).clamp(max=ids.shape[1] - 1)
    return Batch(ids, attention, positions, targets, mask.bool())


def completion_states(body: nn.Module, batch: Batch) -> torch.Tensor:
    """The body's last hidden states where completions are predicted, [number of completion tokens, width], row after row."""
    places = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    states = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=places, use_cache=False).last_hidden_state
    rows = torch.arange(len(states), device=states.device)[:, None].expand_as(batch.positions)
    return states[rows[batch.mask], batch.positions[batch.mask]]


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at the targets, in nats: logits [N, V], targets [N] -> [N]."""
    return -F.cross_entropy(logits, targets, reduction="none")


def unpack(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What stands at the True places of `mask` [B, R], row after row, [N] -> [B, R], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


@torch.no_grad()
def completion_logprobs(halves: tuple[nn.Module, nn.Linear], samples: Sequence[Sample], *, temperature: float = 1.0,
                        batch_size: int | None = None) -> list[torch.Tensor]:
    """For every sample: the log-probabilities of its completion's tokens, in nats, [len(completion_ids)] on the CPU.

    Args:
        halves: body and output head of the model that is asked (`body_and_head`).
        batch_size: samples at once; default: all.
    """
    body, head = halves
    found: list[torch.Tensor] = []
    for start in range(0, len(samples), batch_size or len(samples)):
        batch = collate(samples[start:start + (batch_size or len(samples))], head.weight.device)
        logits = head(completion_states(body, batch)).float() / temperature
        found += token_logprobs(logits, batch.targets[batch.mask]).cpu().split(batch.mask.sum(1).tolist())
    return found


def body_and_head(model: PreTrainedModel, role: str) -> tuple[nn.Module, nn.Linear]:
    """A causal model's two halves. UserError where its output head is no plain linear layer."""
    body, head = models.body_and_head(model)
    if head is None:
        raise UserError(f"the {role} is a {model.config.model_type} whose logits do not come from one linear layer: stage 6 cannot use it")
    return body, head


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, those that are functions in its attention (Llama) included; its config keeps them."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
