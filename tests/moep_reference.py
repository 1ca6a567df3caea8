"""MoE-P written the obvious way, block by block and expert by expert: what modeling_moep.py must equal, and must beat.

Made of torch's own modules, with the weights of a `MoEPForCausalLM` copied in. Every block of a parallel layer runs on
every token; linear experts run on the tokens that picked them, one expert after the other.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from modeling_moep import MoEPConfig, MoEPForCausalLM


class LoopBlock(nn.Module):
    gelu = staticmethod(ACT2FN["gelu_new"])  # as transformers' GPT-2 has it: several elementwise operations

    def __init__(self, width: int, heads: int, inner: int, config: MoEPConfig, window: int | None):
        super().__init__()
        self.heads, self.window, self.swiglu = heads, window, config.hidden_act == "swiglu"
        self.attn_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.up_proj = nn.Linear(width, inner * (2 if self.swiglu else 1))
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.attn_norm(x)).split(width, dim=2))
        if self.window:
            distance = torch.arange(length, device=x.device)[:, None] - torch.arange(length, device=x.device)[None]
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < self.window))
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out_proj(attended.transpose(1, 2).reshape(batch, length, width))
        inner = self.up_proj(self.mlp_norm(x))
        if self.swiglu:
            gate, up = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = self.gelu(inner)
        return x + self.down_proj(inner)


class LoopMixture(nn.Module):
    """A router and its experts: linear maps on the tokens that picked them, or blocks on all tokens."""

    def __init__(self, config: MoEPConfig, width: int, experts: list[nn.Module]):
        super().__init__()
        self.k, self.router, self.experts = config.num_experts_per_tok, nn.Linear(width, len(experts), bias=False), nn.ModuleList(experts)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.router(F.layer_norm(x, x.shape[-1:]))
        weights, picked = logits.softmax(-1).topk(self.k, dim=-1)
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        result = 0.0 if isinstance(self.experts[0], nn.Linear) else x
        for number, expert in enumerate(self.experts):
            if isinstance(expert, nn.Linear):
                tokens, slots = torch.where((picked == number).flatten(0, 1))
                made = weights.flatten(0, 1)[tokens, slots, None] * expert(x.flatten(0, 1)[tokens])
                result = result + made.new_zeros(x.shape[0] * x.shape[1], made.shape[1]).index_add(0, tokens, made)
            else:
                result = result + (weights * (picked == number)).sum(-1, keepdim=True) * (expert(x) - x)
        return result.view(*x.shape[:2], -1), logits


class LoopMoEP(nn.Module):
    """input_ids [B, T] -> (logits [B, T, V], router logits of every router)."""

    def __init__(self, model: MoEPForCausalLM):
        super().__init__()
        config, body = model.config, model.model
        wide, narrow = config.hidden_size, config.parallel_hidden_size

        def block(layer: int) -> LoopBlock:
            window = config.sliding_window if config.layer_types[layer] == "sliding_attention" else None
            if 0 < layer < config.num_hidden_layers - 1:
                return LoopBlock(narrow, config.parallel_attention_heads, config.parallel_intermediate_size, config, window)
            return LoopBlock(wide, config.num_attention_heads, config.intermediate_size, config, window)

        self.wte, self.wpe = nn.Embedding(config.vocab_size, wide), nn.Embedding(config.max_position_embeddings, wide)
        self.first, self.last = block(0), block(config.num_hidden_layers - 1)
        self.shrink = LoopMixture(config, wide, [nn.Linear(wide, narrow) for _ in range(config.num_experts)])
        self.layers = nn.ModuleList(LoopMixture(config, narrow, [block(layer) for _ in range(config.num_experts)])
                                    for layer in range(1, config.num_hidden_layers - 1))
        self.grow = LoopMixture(config, narrow, [nn.Linear(narrow, wide) for _ in range(config.num_experts)])
        self.final_norm = nn.LayerNorm(wide, config.layer_norm_epsilon)
        self.load_state_dict(self.renamed(dict(body.state_dict())))

    @staticmethod
    def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of a `MoEPModel` by name (weights or gradients), cut into those of the single experts here."""
        found = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in ("shrink", "grow") and rest.startswith("experts."):
                for number, part in enumerate(value):
                    found[f"{kind}.experts.{number}.{rest.removeprefix('experts.')}"] = part
            elif kind == "layers" and ".router." not in name:
                layer, _, rest = rest.partition(".")
                experts = len(value) // 3 if rest.startswith("qkv.") else len(value)
                parts = value.view(3, experts, *value.shape[1:]).transpose(0, 1).flatten(1, 2) if rest.startswith("qkv.") else value
                for number, part in enumerate(parts):
                    found[f"layers.{layer}.experts.{number}.{rest}"] = part
            else:
                found[name] = value
        return found

    def states(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the head reads, and the routers' logits."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        x, routers = self.first(x), []
        for mixture in (self.shrink, *self.layers, self.grow):
            x, logits = mixture(x)
            routers.append(logits)
        return self.final_norm(self.last(x)), routers

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        states, routers = self.states(input_ids)
        return states @ self.wte.weight.T, routers
