"""MoE-P: a small causal language model whose middle layers are token-wise mixtures of parallel transformer blocks.

    embeddings -> block(hidden_size) -> MoE shrink -> parallel layers -> MoE grow -> block(hidden_size) -> norm -> tied head

A *parallel layer* holds `num_experts` narrow transformer blocks (attention and feed-forward, each with its own weights) and
a router that picks `num_experts_per_tok` of them for every token; the output is the mixture of the picked blocks' outputs,
with the router's probabilities renormalised over those picked. *Shrink* and *grow* are mixtures of linear experts that
change the width. The defaults are the published configuration: 28.43M parameters.

This file imports torch and transformers only, and is copied into every checkpoint, so that `AutoModelForCausalLM` and
`AutoModel` load one anywhere with `trust_remote_code=True`. It runs on transformers 4.51 and 5.

How it is fast: attention needs the keys of every token in every block, so one matrix product makes K and V of all blocks and
one call attends in all their heads; the rest (queries, output projection, feed-forward) is computed only for the blocks that
a token has picked. `config.expert_path` says how (see `Routing`).
"""

from collections.abc import Sequence
from itertools import pairwise
from math import inf

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

EXPERT_PATHS = ("auto", "loop", "dense", "grouped")


class MoEPConfig(PretrainedConfig):
    """Configuration of a MoE-P model.

    Args:
        vocab_size: entries of the vocabulary.
        hidden_size: width of the embeddings, of the first and the last block, and of what the head reads.
        num_attention_heads: heads of the first and the last block.
        intermediate_size: inner width of their feed-forward; default 4 x hidden_size.
        num_hidden_layers: all layers: the first block, num_hidden_layers - 2 parallel layers, the last block.
        parallel_hidden_size: width of the parallel layers.
        parallel_attention_heads: heads of each of their blocks.
        parallel_intermediate_size: inner width of their feed-forward; default 4 x parallel_hidden_size.
        num_experts: blocks in a parallel layer, and linear experts in shrink and grow.
        num_experts_per_tok: how many of them a token uses.
        hidden_act: "gelu_new" (two matrices), or "swiglu" (three matrices of the same inner width).
        max_position_embeddings: learned positions; longer inputs are an error.
        sliding_window: tokens that every second parallel layer attends to, the token itself included; None = all.
        dropout, attention_dropout: on embeddings and residual branches; on attention weights.
        router_aux_loss_coef: weight of the load-balancing loss in `MoEPForCausalLM(..., labels=...)` in training mode.
        output_router_logits: return the routers' logits and the load-balancing loss.
        expert_path: "loop", "dense", "grouped", or "auto" (see `Routing`); changes speed, not results.

    Raises:
        ValueError: lists every value that is out of range or does not fit another.
    """

    model_type = "moep"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, vocab_size=16384, hidden_size=384, num_attention_heads=6, intermediate_size=None, num_hidden_layers=12,
                 parallel_hidden_size=192, parallel_attention_heads=3, parallel_intermediate_size=None, num_experts=4,
                 num_experts_per_tok=2, hidden_act="gelu_new", max_position_embeddings=512, sliding_window=None, dropout=0.0,
                 attention_dropout=0.0, layer_norm_epsilon=1e-5, initializer_range=0.02, router_aux_loss_coef=0.01,
                 output_router_logits=False, expert_path="auto", use_cache=True, bos_token_id=None, eos_token_id=None,
                 pad_token_id=None, tie_word_embeddings=True, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = 4 * (hidden_size or 0) if intermediate_size is None else intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.parallel_hidden_size = parallel_hidden_size
        self.parallel_attention_heads = parallel_attention_heads
        self.parallel_intermediate_size = (4 * (parallel_hidden_size or 0) if parallel_intermediate_size is None
                                           else parallel_intermediate_size)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.sliding_window = sliding_window
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        self.expert_path = expert_path
        self.use_cache = use_cache
        self.check()
        kwargs.pop("layer_types", None)
        kwargs["auto_map"] = {"AutoConfig": "modeling_moep.MoEPConfig", "AutoModel": "modeling_moep.MoEPModel",
                              "AutoModelForCausalLM": "modeling_moep.MoEPForCausalLM"}
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
                         tie_word_embeddings=tie_word_embeddings, **kwargs)

    def check(self) -> None:
        """Raise a ValueError that lists every value that is out of range or does not fit another."""
        if problems := self._problems():
            raise ValueError("MoEPConfig: " + "; ".join(problems))

    @property
    def layer_types(self) -> list[str]:
        """What each layer attends to. transformers sizes its caches by this; without, it would cut the keys of every layer."""
        windows = [self.sliding_window is not None and 0 < layer < self.num_hidden_layers - 1 and layer % 2 == 0
                   for layer in range(self.num_hidden_layers)]
        return ["sliding_attention" if window else "full_attention" for window in windows]

    def _problems(self) -> list[str]:
        positive = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "parallel_hidden_size",
                    "parallel_attention_heads", "parallel_intermediate_size", "num_experts", "num_experts_per_tok",
                    "max_position_embeddings")
        found = [f"{name} must be a positive integer, not {getattr(self, name)!r}" for name in positive
                 if type(getattr(self, name)) is not int or getattr(self, name) < 1]
        if type(self.num_hidden_layers) is not int or self.num_hidden_layers < 2:
            found.append(f"num_hidden_layers counts the first and the last block too: at least 2, not {self.num_hidden_layers!r}")
        if self.sliding_window is not None and (type(self.sliding_window) is not int or self.sliding_window < 1):
            found.append(f"sliding_window must be a positive number of tokens or None, not {self.sliding_window!r}")
        if self.hidden_act not in ("gelu_new", "swiglu"):
            found.append(f"hidden_act must be gelu_new or swiglu, not {self.hidden_act!r}")
        if self.expert_path not in EXPERT_PATHS:
            found.append(f"expert_path must be one of {', '.join(EXPERT_PATHS)}, not {self.expert_path!r}")
        for name, below in (("dropout", 1), ("attention_dropout", 1), ("router_aux_loss_coef", inf), ("initializer_range", inf),
                            ("layer_norm_epsilon", inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < below:
                found.append(f"{name} must be a number from 0 to below {below}, not {value!r}")
        if found:  # the rest compares numbers with each other
            return found
        for width, heads in (("hidden_size", "num_attention_heads"), ("parallel_hidden_size", "parallel_attention_heads")):
            if getattr(self, width) % getattr(self, heads):
                found.append(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        if self.num_experts_per_tok > self.num_experts:
            found.append(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        return found

    @property
    def residual_initializer_range(self) -> float:
        """Standard deviation of the projections into the residual stream, two per layer (GPT-2)."""
        return self.initializer_range / (2 * self.num_hidden_layers) ** 0.5

    @property
    def hidden_state_sizes(self) -> list[int]:
        """Width of each of the num_hidden_layers + 1 `hidden_states`: embeddings, outputs of the layers, what the head reads."""
        return [self.hidden_size] * 2 + [self.parallel_hidden_size] * (self.num_hidden_layers - 2) + [self.hidden_size]


# ---- Routing --------------------------------------------------------------------------------------------------------


class Routing:
    """Who goes where: the tokens of a batch, sent to the experts that each has picked, and brought together again.

    `rows` are the (token, expert) pairs that are computed. `linear` applies each expert's matrix to its rows; the layers
    that use a Routing need not know how. Three ways, with equal results:

    * loop     one matrix product per expert on the rows sorted by expert. Needs the number of rows per expert on the host.
    * grouped  the same rows in one grouped product; nothing comes to the host.
    * dense    every expert on every token, unpicked ones weighted with 0: more arithmetic, but of fixed shape, so that
               `torch.compile(fullgraph=True)` takes it.

    No expert has a capacity: no token is ever dropped.

    Args:
        logits: [N, E] of the router, fp32.
        k: experts per token.
        path: "loop", "grouped" or "dense".
    """

    def __init__(self, logits: torch.Tensor, k: int, path: str):
        picked, experts = logits.topk(k, dim=-1)
        # The router's probabilities, renormalised over those picked; [N, k]. Of one alone that would be 1 and teach the router
        # nothing: there the probability itself weighs the branch (Fedus et al. 2021, equation 2).
        self.weights = picked.softmax(dim=-1) if k > 1 else logits.softmax(dim=-1).gather(1, experts)
        self.path, self.k, self.num_experts = path, k, logits.shape[1]
        if path == "dense":
            self.gates = torch.zeros_like(logits).scatter(1, experts, self.weights)  # [N, E]
            return
        self.experts, self.order = experts.flatten().sort(stable=True)  # of each row; which of the N*k choices it is
        self.inverse = self.order.argsort()
        self.tokens = self.order // k
        self.slots = self.tokens * self.num_experts + self.experts  # each row's place in [places, E], where `place` puts it
        self.places = len(logits)
        # Where each expert's rows end; torch.bincount would make the host wait on a GPU.
        numbers = torch.arange(self.num_experts, device=logits.device)
        ends = torch.searchsorted(self.experts, numbers, right=True, out_int32=True)
        if path == "loop":  # the one thing that the host must know
            self.counts = [end - start for start, end in pairwise([0, *ends.tolist()])]
        else:
            self.ends = ends
            self.one_hot = self.experts.unsqueeze(1) == numbers  # [rows, E]

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, D] -> rows: every token once per expert that computes it."""
        if self.path == "dense":
            return tokens.expand(self.num_experts, *tokens.shape)
        return _Spread.apply(tokens, self.tokens, self.inverse, self.k)

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """[N, E, D], one value per token and expert -> rows."""
        if self.path == "dense":
            return values.transpose(0, 1)
        return _Select.apply(values.flatten(0, 1), self.slots)

    def place(self, rows: torch.Tensor) -> torch.Tensor:
        """rows -> [N, E, D], 0 for pairs without a row: what `select` undoes. After `move_up` [B * seats, E, D]."""
        if self.path == "dense":
            return rows.transpose(0, 1)
        return _Place.apply(rows, self.slots, self.places * self.num_experts).view(-1, self.num_experts, rows.shape[-1])

    def move_up(self, batch: int) -> torch.Tensor | None:
        """Close the gaps that a sequence's tokens have left in an expert's column of `place`: [B * seats, E, D], with as many
        seats per sequence as the fullest column needs. Attention of fewer queries than tokens costs less. How many, the host
        must know: on a GPU it would wait for that.

        Returns:
            [B, seats, E]: the position in its sequence of the token on each seat, the last one on empty seats. None if
            less than a fifth of the places would go: then all is as it was.
        """
        length = self.places // batch
        column = self.experts * batch + self.tokens // length  # rows are sorted by it
        starts = torch.searchsorted(column, torch.arange(self.num_experts * batch + 1, device=column.device))
        seats = int(starts.diff().max())
        if seats > 0.8 * length:
            return None
        rank = torch.arange(len(column), device=column.device) - starts[column]
        self.slots = (self.tokens // length * seats + rank) * self.num_experts + self.experts
        self.places = batch * seats
        positions = self.tokens.new_full((self.places * self.num_experts,), length - 1)
        return positions.index_copy_(0, self.slots, self.tokens % length).view(batch, seats, self.num_experts)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """rows [..., in], weight [E, out, in], bias [E, out] -> rows [..., out], each by its own expert."""
        rows, weight, bias = as_autocast_would(rows, weight, bias)
        if self.path == "dense":
            return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2))
        if self.path == "grouped":
            # The biases as a product: the derivative of indexing would add row after row.
            self.one_hot = self.one_hot.to(rows.dtype)
            return F.grouped_mm(rows, weight.transpose(1, 2), offs=self.ends).addmm_(self.one_hot, bias)
        return _LoopLinear.apply(rows, weight, bias, self.counts)

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """rows -> [N, D]: every token's mixture of what its experts made, in fp32 or wider where weights are."""
        if self.path == "dense":
            return (self.gates.T.unsqueeze(-1) * rows).sum(0)
        return (self.weights.unsqueeze(-1) * _Permute.apply(rows, self.inverse, self.order).view(-1, self.k, rows.shape[-1])).sum(1)


def as_autocast_would(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """The factors of a product in autocast's type, where it is on: custom functions and grouped products do not know it."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


# Autograd's own derivative of indexing adds row after row into zeros: slow, and in no fixed order on a GPU. The indices here
# are permutations, or name no row twice, so that their derivatives are gathers and plain copies.


class _Permute(torch.autograd.Function):
    """rows[order], where inverse[order] = 0, 1, 2, ..."""

    @staticmethod
    def forward(ctx, rows, order, inverse):
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Spread(torch.autograd.Function):
    """tokens[index], where `inverse` brings the k rows of each token together."""

    @staticmethod
    def forward(ctx, tokens, index, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return tokens.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]).view(-1, ctx.k, grad.shape[-1]).sum(1), None, None, None


class _Select(torch.autograd.Function):
    """values[index], where no index stands twice."""

    @staticmethod
    def forward(ctx, values, index):
        ctx.save_for_backward(index)
        ctx.total = len(values)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.total, grad.shape[1]).index_add_(0, ctx.saved_tensors[0], grad), None


class _Place(torch.autograd.Function):
    """`total` rows of zeros, with rows[i] at index[i], where no index stands twice: forward and backward of _Select, swapped."""

    @staticmethod
    def forward(ctx, rows, index, total):
        ctx.save_for_backward(index)
        return rows.new_zeros(total, rows.shape[1]).index_add_(0, index, rows)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _LoopLinear(torch.autograd.Function):
    """rows @ weight[e].T + bias[e] for the counts[e] rows of each expert e, written into one tensor without copies."""

    @staticmethod
    def forward(ctx, rows, weight, bias, counts):
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        result = rows.new_empty(len(rows), weight.shape[1])
        for mine, theirs, matrix, offset in zip(rows.split(counts), result.split(counts), weight.mT, bias, strict=True):
            torch.addmm(offset, mine, matrix, out=theirs)
        return result

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        grad = grad.contiguous()
        below, its, offsets = torch.empty_like(rows), torch.empty_like(weight), weight.new_empty(weight.shape[:2])
        by_expert = [tensor.split(ctx.counts) for tensor in (rows, grad, below)]
        columns = grad.T.split(ctx.counts, dim=1)
        for mine, above, target, column, matrix, product, total in zip(*by_expert, columns, weight, its, offsets, strict=True):
            torch.mm(above, matrix, out=target)
            torch.mm(column, mine, out=product)  # an expert without rows gets zeros, not None
            torch.sum(above, 0, out=total)
        return below, its, offsets, None


class Router(nn.Module):
    """A linear map of standardised tokens to one logit per expert, in fp32 whatever the autocast type: small differences decide.

    On the residual stream itself, whose norm grows from layer to layer and step to step, routers soon choose with certainty
    and learn no more.
    """

    def __init__(self, width: int, config: MoEPConfig):
        super().__init__()
        self.k, self.config = config.num_experts_per_tok, config
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))

    def forward(self, tokens: torch.Tensor) -> tuple[Routing, torch.Tensor]:
        """[N, width] -> (Routing, logits [N, E] fp32)."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.float(), self.weight.float())
        return Routing(logits, self.k, self.path(tokens)), logits

    def path(self, tokens: torch.Tensor) -> str:
        """The way of computing that `auto` stands for. CPU: measured; elsewhere the one without a wait for the host."""
        if self.config.expert_path != "auto":
            return self.config.expert_path
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return "dense"
        # In bf16 a CPU makes a kernel for every new number of rows, which costs more than small products save.
        in_bf16 = torch.is_autocast_enabled("cpu") or self.weight.dtype == torch.bfloat16
        if in_bf16 and self.config.parallel_hidden_size < 128:
            return "dense"
        widths = self.config.hidden_size, self.config.parallel_hidden_size, self.config.parallel_intermediate_size
        can_group = hasattr(F, "grouped_mm") and tokens.dtype != torch.float64 and not any(width % 8 for width in widths)
        return "grouped" if can_group else "loop"


def load_balancing_loss(router_logits: Sequence[torch.Tensor], k: int, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """E * sum_e f_e * P_e per sequence, mean over the routers: [B], dimensionless (Fedus et al. 2021, equation 4).

    f_e is the share of the sequence's choices that went to expert e, P_e the mean probability that its router gives to e.
    At uniform routing it is 1; where all tokens choose the same k experts with certainty it is E / k. The choices f have no
    gradient, the probabilities P have. Per sequence and not per batch, so that gradient accumulation changes nothing.

    Args:
        router_logits: [B, T, E] of each router.
        k: experts per token.
        attention_mask: [B, T], 0 at padding, which is not counted.
    """
    logits = torch.stack(tuple(router_logits)).float()  # [R, B, T, E]
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(k, dim=-1).indices, 1.0 / k)
    count = logits.new_ones(logits.shape[1:3]) if attention_mask is None else attention_mask.to(logits.dtype)
    share = count.unsqueeze(-1) / count.sum(1).clamp(min=1)[:, None, None]
    f, p = (chosen * share).sum(2), (probabilities * share).sum(2)  # [R, B, E]
    return logits.shape[-1] * (f * p).sum(-1).mean(0)


# ---- Layers ---------------------------------------------------------------------------------------------------------


class ExpertLinear(nn.Module):
    """One linear map per expert; `Routing.linear` applies them."""

    def __init__(self, experts: int, width_in: int, width_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width_out, width_in))
        self.bias = nn.Parameter(torch.empty(experts, width_out))


class ExpertNorm(nn.Module):
    """Scale and shift of one LayerNorm per expert, [E, width]; the experts share the standardised input."""

    def __init__(self, experts: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.bias = nn.Parameter(torch.empty(experts, width))

    def fold(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The linear maps weight [..., E, out, width], bias [..., E, out] that do to standardised input what scale, shift and
        the given maps do one after the other: cheaper than making E scaled copies of every token."""
        # Expanded first, so that the backward pass sums one dimension after the other: a CPU is slow at two at once.
        scale, shift = (mine.expand(*weight.shape[:-2], -1).unsqueeze(-2) for mine in (self.weight, self.bias))
        return weight * scale, bias + (weight * shift).sum(-1)


class MixtureLinear(nn.Module):
    """A token-wise mixture of linear experts: shrink and grow."""

    def __init__(self, config: MoEPConfig, width_in: int, width_out: int):
        super().__init__()
        self.epsilon = config.layer_norm_epsilon
        self.router = Router(width_in, config)
        self.experts = ExpertLinear(config.num_experts, width_in, width_out)
        # There is no residual branch around it: drawn so that the stream keeps its scale through the mean of k random maps.
        self.experts.initializer_range = (config.num_experts_per_tok / width_in) ** 0.5

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, in] -> ([B, T, out], router logits [B, T, E])."""
        tokens = hidden.flatten(0, 1)
        routing, logits = self.router(F.layer_norm(tokens, tokens.shape[-1:], eps=self.epsilon))
        rows = routing.linear(routing.spread(tokens), self.experts.weight, self.experts.bias)
        mixed = routing.combine(rows).to(hidden.dtype)
        return mixed.view(*hidden.shape[:2], -1), logits.view(*hidden.shape[:2], -1)


class Attention:
    """What the layers of one forward pass share: the masks, the cache, the dropout."""

    def __init__(self, config: MoEPConfig, length: int, past: int, attention_mask: torch.Tensor | None, cache: Cache | None,
                 device: torch.device, training: bool):
        self.cache, self.dropout = cache, config.attention_dropout if training else 0.0
        self.eager = config._attn_implementation == "eager"
        self.windows = [kind == "sliding_attention" for kind in config.layer_types]
        self.causal = past == 0 and length > 1 and attention_mask is None  # then SDPA makes the mask itself
        self.full = self.sliding = None
        query = torch.arange(past, past + length, device=device)[:, None]
        keys = torch.arange(past + length, device=device)[None]
        self.triangle = keys <= query
        if attention_mask is not None and attention_mask.dim() == 4:
            self.full = attention_mask
        elif attention_mask is not None:  # a padded position sees itself: a row without any key would be NaN
            self.full = self.triangle & (attention_mask[:, None, None, :].bool() | (keys == query))
        elif past and length > 1:
            self.full = self.triangle
        if any(self.windows):
            near = self.triangle & (query - keys < config.sliding_window)
            self.sliding = near if self.full is None else near & self.full

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, layer: int,
                 positions: torch.Tensor | None = None) -> torch.Tensor:
        """q [B, T, width], k and v alike -> [B, T, width] of layer number `layer`; with `positions` [B, S, E] q and the result are
        [B, S, width]: the queries of each of E groups of heads are of S tokens of their own."""
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.cache is not None:
            k, v = self.cache.update(k, v, layer)
        mask = self.sliding if self.windows[layer] else self.full
        if mask is not None:
            mask = mask[..., -k.shape[2]:]  # a cache may have let go of keys outside the window
        causal = self.causal and mask is None
        if positions is not None:
            mask, causal = self.rows(self.triangle if mask is None else mask, positions, heads, q.dtype), False
        # In bf16 on a CPU the backward pass of torch's fused attention takes three times as long as the products written out.
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if self.eager or slow:
            attended = eager_attention(q, k, v, self.triangle if causal else mask, self.dropout)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout, is_causal=causal)
        return attended.transpose(1, 2).flatten(2)

    @staticmethod
    def rows(mask: torch.Tensor, positions: torch.Tensor, heads: int, dtype: torch.dtype) -> torch.Tensor:
        """What the tokens at `positions` [B, S, E] see: the mask's rows, [B, heads, S, keys], 0 where they do and -inf elsewhere."""
        batch, seats, groups = positions.shape
        table = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        if mask.dim() == 4:  # one for each sequence
            first = torch.arange(batch, device=mask.device) * mask.shape[-2]
            positions = positions + first[:, None, None] * (mask.shape[0] > 1)
        index = positions.transpose(1, 2).unsqueeze(2).expand(-1, -1, heads // groups, -1)
        return table.flatten(0, -2).index_select(0, index.flatten()).view(batch, heads, seats, -1)


def eager_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float,
                    ) -> torch.Tensor:
    """What F.scaled_dot_product_attention computes, operation by operation; attn_mask is True where a key is seen, or added."""
    with torch.autocast(q.device.type, enabled=False):  # in bf16 too softmax adds in fp32: wider inputs would gain nothing
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            scores = scores + attn_mask
        elif attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        return F.dropout(scores.softmax(-1), dropout_p) @ v


def activation(inner: torch.Tensor, kind: str) -> torch.Tensor:
    """gelu_new, or SwiGLU of the two halves."""
    if kind == "swiglu":
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(inner, approximate="tanh")


class Block(nn.Module):
    """A pre-norm transformer block, as in GPT-2."""

    def __init__(self, config: MoEPConfig, layer: int):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.layer, self.heads, self.act = layer, config.num_attention_heads, config.hidden_act
        self.attn_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.up_proj = nn.Linear(width, inner * (2 if self.act == "swiglu" else 1))
        self.down_proj = nn.Linear(inner, width)
        self.out_proj.initializer_range = self.down_proj.initializer_range = config.residual_initializer_range
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: torch.Tensor, attention: Attention) -> torch.Tensor:
        q, k, v = self.qkv(self.attn_norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + self.dropout(self.out_proj(attention(q, k, v, self.heads, self.layer)))
        return hidden + self.dropout(self.down_proj(activation(self.up_proj(self.mlp_norm(hidden)), self.act)))


class ParallelLayer(nn.Module):
    """`num_experts` pre-norm transformer blocks side by side; each token's output is the mixture of the blocks it picked."""

    def __init__(self, config: MoEPConfig, layer: int):
        super().__init__()
        width, inner, experts = config.parallel_hidden_size, config.parallel_intermediate_size, config.num_experts
        self.layer, self.heads, self.act = layer, experts * config.parallel_attention_heads, config.hidden_act
        self.epsilon = config.layer_norm_epsilon
        self.router = Router(width, config)
        self.attn_norm = ExpertNorm(experts, width)
        self.qkv = ExpertLinear(3 * experts, width, width)  # Q of all blocks, K of all blocks, V of all blocks
        self.out_proj = ExpertLinear(experts, width, width)
        self.mlp_norm = ExpertNorm(experts, width)
        self.up_proj = ExpertLinear(experts, width, inner * (2 if self.act == "swiglu" else 1))
        self.down_proj = ExpertLinear(experts, inner, width)
        self.out_proj.initializer_range = self.down_proj.initializer_range = config.residual_initializer_range
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: torch.Tensor, attention: Attention) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, width] -> ([B, T, width], router logits [B, T, E])."""
        (batch, length, width), experts = hidden.shape, self.router.weight.shape[0]
        tokens, normed = hidden.flatten(0, 1), F.layer_norm(hidden, (width,), eps=self.epsilon)
        routing, logits = self.router(normed.flatten(0, 1))

        attended = self.attend(normed, routing, attention).view(-1, experts, width)

        # From here on, only what was picked.
        branch = self.dropout(routing.linear(routing.select(attended), self.out_proj.weight, self.out_proj.bias))
        middle = F.layer_norm(routing.spread(tokens) + branch, (width,), eps=self.epsilon)
        inner = routing.linear(middle, *self.mlp_norm.fold(self.up_proj.weight, self.up_proj.bias))
        branch = branch + self.dropout(routing.linear(activation(inner, self.act), self.down_proj.weight, self.down_proj.bias))

        # A mixture of (token + branch) with weights that add up to 1 is the token and the mixture of the branches.
        mixed = hidden + routing.combine(branch).to(hidden.dtype).view(batch, length, width)
        return mixed, logits.view(batch, length, experts)

    def attend(self, normed: torch.Tensor, routing: Routing, attention: Attention) -> torch.Tensor:
        """Attention on standardised [B, T, width], [B, T or fewer, E * width]: where `routing.place` puts queries, 0 elsewhere.

        K and V are of every token in every block, as they serve tokens that have picked other blocks than it has; Q is only of
        tokens that have picked the block.
        """
        (batch, length, width), experts = normed.shape, self.router.weight.shape[0]
        weight, bias = self.attn_norm.fold(self.qkv.weight.view(3, experts, width, width), self.qkv.bias.view(3, experts, width))
        normed, weight, bias = as_autocast_would(normed, weight, bias)
        if routing.path == "dense":
            return attention(*F.linear(normed, weight.flatten(0, 2), bias.flatten()).chunk(3, dim=-1), self.heads, self.layer)
        (weight_q, weight_kv), (bias_q, bias_kv) = weight.split([1, 2]), bias.split([1, 2])
        # Worth it where torch's fused attention runs on a CPU; and short, because every block then needs a mask of its own.
        short = length <= 128 and normed.device.type == "cpu" and normed.dtype == torch.float32
        positions = routing.move_up(batch) if short else None
        q = routing.place(routing.linear(routing.spread(normed.flatten(0, 1)), weight_q[0], bias_q[0]))
        k, v = F.linear(normed, weight_kv.flatten(0, 2), bias_kv.flatten()).chunk(2, dim=-1)
        return attention(q.view(batch, -1, experts * width), k, v, self.heads, self.layer, positions)


# ---- Models ---------------------------------------------------------------------------------------------------------


class MoEPPreTrainedModel(PreTrainedModel):
    """What transformers must know of both models, and the initialisation."""

    config_class = MoEPConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True
    _no_split_modules = ["Block", "ParallelLayer", "MixtureLinear"]

    def __init__(self, config: MoEPConfig, *args, **kwargs):
        config.check()  # from_pretrained(..., key=value) sets values of a finished config
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As GPT-2: normal, biases 0, projections into the residual stream smaller by the square root of their number.

        Each parameter is drawn once, by the module that owns it: transformers 5 silently ignores a second draw.
        """
        std = getattr(module, "initializer_range", self.config.initializer_range)
        if isinstance(module, nn.LayerNorm | ExpertNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Embedding | ExpertLinear | Router):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class MoEPModel(MoEPPreTrainedModel):
    """Token ids -> hidden states."""

    _auto_class = "AutoModel"  # makes save_pretrained and push_to_hub put this file beside the weights

    def __init__(self, config: MoEPConfig):
        super().__init__(config)
        wide, narrow, depth = config.hidden_size, config.parallel_hidden_size, config.num_hidden_layers
        self.wte = nn.Embedding(config.vocab_size, wide)
        self.wpe = nn.Embedding(config.max_position_embeddings, wide)
        self.dropout = nn.Dropout(config.dropout)
        self.first = Block(config, 0)
        self.shrink = MixtureLinear(config, wide, narrow)
        self.layers = nn.ModuleList(ParallelLayer(config, layer) for layer in range(1, depth - 1))
        self.grow = MixtureLinear(config, narrow, wide)
        self.last = Block(config, depth - 1)
        self.final_norm = nn.LayerNorm(wide, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
                position_ids: torch.Tensor | None = None, past_key_values: Cache | None = None,
                inputs_embeds: torch.Tensor | None = None, use_cache: bool | None = None, output_hidden_states: bool | None = None,
                output_router_logits: bool | None = None, output_attentions: bool | None = None, return_dict: bool | None = None,
                **kwargs) -> MoeModelOutputWithPast | tuple:
        """Hidden states of a batch.

        Args:
            input_ids: [B, T]; or inputs_embeds: [B, T, hidden_size].
            attention_mask: [B, cached + T], 0 at padding on either side; default: no padding. Padding is known from here
                alone, never from the ids: a real token may equal the pad token. Or [B, 1, T, cached + T], boolean: which
                keys each token sees, instead of all before it (several texts, or a tree of them, in one row).
            position_ids: [B, T]; default: counted from each sequence's first unpadded token. A mask per token needs them.
            past_key_values: keys and values of what came before.
            output_hidden_states: embeddings, output of each layer, and in the last place what the head reads; their widths
                are config.hidden_state_sizes.
            output_router_logits: [B, T, E] of shrink, of each parallel layer, and of grow.

        Raises:
            ValueError: more tokens than positions, both or neither of ids and embeddings, a mask of another shape,
                attention weights asked for (SDPA makes none); or a static cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("MoE-P: give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("MoE-P returns no attention weights: its fused attention never makes them")
        embeds = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        length = embeds.shape[1]
        checkpointing = self.gradient_checkpointing and self.training
        use_cache = (self.config.use_cache if use_cache is None else use_cache) and not checkpointing
        cache = past_key_values if past_key_values is not None or not use_cache else DynamicCache()
        if getattr(cache, "is_compileable", False):
            raise ValueError("MoE-P: a static cache hands out keys of tokens that are not there yet; use a DynamicCache")
        past = int(cache.get_seq_length()) if cache is not None else 0
        position_ids = self._positions(length, past, attention_mask, position_ids, embeds.device)
        attention = Attention(self.config, length, past, attention_mask, cache, embeds.device, self.training)

        def run(layer, *inputs):
            return self._gradient_checkpointing_func(layer.__call__, *inputs) if checkpointing else layer(*inputs)

        hidden = self.dropout(embeds + self.wpe(position_ids))
        states, routers = [hidden], []
        hidden = run(self.first, hidden, attention)
        states.append(hidden)
        hidden, logits = run(self.shrink, hidden)
        routers.append(logits)
        for layer in self.layers:
            hidden, logits = run(layer, hidden, attention)
            states.append(hidden)
            routers.append(logits)
        hidden, logits = run(self.grow, hidden)
        routers.append(logits)
        hidden = self.final_norm(run(self.last, hidden, attention))
        states.append(hidden)

        wants = {"states": self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
                 "routers": self.config.output_router_logits if output_router_logits is None else output_router_logits}
        output = MoeModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=cache if use_cache else None,
            hidden_states=tuple(states) if wants["states"] else None, router_logits=tuple(routers) if wants["routers"] else None)
        return output if return_dict is not False else output.to_tuple()

    def _positions(self, length: int, past: int, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None,
                   device: torch.device) -> torch.Tensor:
        limit = self.config.max_position_embeddings
        by_token = attention_mask is not None and attention_mask.dim() == 4
        if by_token and (attention_mask.dtype != torch.bool or position_ids is None or self.config.sliding_window is not None):
            raise ValueError("MoE-P: a mask per token must be boolean, needs position_ids, and goes with no sliding_window")
        if past + length > limit and not by_token:
            raise ValueError(f"MoE-P: {past + length} tokens{f' ({past} of them cached)' if past else ''} exceed the model's {limit} "
                             "positions (max_position_embeddings): shorten the input or generate fewer tokens")
        if attention_mask is not None and not by_token and (attention_mask.dim() != 2 or attention_mask.shape[1] != past + length):
            raise ValueError(f"MoE-P: attention_mask must be [batch, {past + length}] ({past} cached and {length} new tokens), not "
                             f"{list(attention_mask.shape)}")
        if position_ids is not None:
            # On a GPU looking would cost a wait; the embedding refuses them there, less clearly.
            if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.max() >= limit:
                raise ValueError(f"MoE-P: position_ids reach {int(position_ids.max())}, but the model has positions 0 ... {limit - 1}")
            return position_ids
        if attention_mask is not None:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        return torch.arange(past, past + length, device=device)[None]


class MoEPForCausalLM(MoEPPreTrainedModel, GenerationMixin):
    """MoE-P with a language-model head."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.wte.weight"}  # transformers 4.51 reads the keys, 5 both

    def __init__(self, config: MoEPConfig):
        super().__init__(config)
        self.model = MoEPModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward_flops_per_token(self, seq_len: int) -> float:
        """Multiply-adds of a forward pass, times 2, per token: of the picked blocks only, apart from K and V; attention
        at full length, the head included, the embedding lookup and the routers not (Kaplan et al. 2020, appendix)."""
        config, gates = self.config, 2 if self.config.hidden_act == "swiglu" else 1
        wide, narrow, picked = config.hidden_size, config.parallel_hidden_size, config.num_experts_per_tok
        block = 4 * wide**2 + (gates + 1) * wide * config.intermediate_size + 2 * seq_len * wide
        parallel = (config.num_experts * (2 * narrow**2 + 2 * seq_len * narrow)
                    + picked * (2 * narrow**2 + (gates + 1) * narrow * config.parallel_intermediate_size))
        products = 2 * block + (config.num_hidden_layers - 2) * parallel + 2 * picked * wide * narrow + wide * config.vocab_size
        return 2.0 * products

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
                position_ids: torch.Tensor | None = None, past_key_values: Cache | None = None,
                inputs_embeds: torch.Tensor | None = None, labels: torch.Tensor | None = None, use_cache: bool | None = None,
                output_hidden_states: bool | None = None, output_router_logits: bool | None = None,
                output_attentions: bool | None = None, return_dict: bool | None = None, logits_to_keep: int | torch.Tensor = 0,
                **kwargs) -> MoeCausalLMOutputWithPast | tuple:
        """Logits [B, T, V], and with `labels` [B, T] (-100 = not scored) the loss. Other arguments as `MoEPModel.forward`.

        `loss` is the cross-entropy in nats per token; in training mode config.router_aux_loss_coef x the load-balancing loss
        is added, which is also returned alone as `aux_loss` when asked for by `output_router_logits`.
        """
        wants_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        balance = labels is not None and self.training and self.config.router_aux_loss_coef > 0
        body = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                          past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                          output_hidden_states=output_hidden_states, output_router_logits=wants_routers or balance,
                          output_attentions=output_attentions)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(body.last_hidden_state[:, kept])
        loss = auxiliary = None
        if body.router_logits is not None:
            padded = attention_mask is not None and attention_mask.dim() == 2
            new = attention_mask[:, -body.last_hidden_state.shape[1]:] if padded else None
            auxiliary = load_balancing_loss(body.router_logits, self.config.num_experts_per_tok, new).mean()
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if balance:
                total = kwargs.get("num_items_in_batch")  # of all batches whose losses are accumulated: this is one's share of them
                share = 1.0 if total is None else (labels[..., 1:] != -100).sum() / total
                loss = loss + self.config.router_aux_loss_coef * share * auxiliary
        output = MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=auxiliary if wants_routers else None, logits=logits, past_key_values=body.past_key_values,
            hidden_states=body.hidden_states, router_logits=body.router_logits if wants_routers else None)
        return output if return_dict is not False else output.to_tuple()
