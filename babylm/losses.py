"""The maths of every training term, as pure functions of tensors; nothing here knows a model, a file or a config.

Conventions, the same for every term: a *mean over predicted tokens*, in nats. Position t of the logits predicts token
t+1, so a block of T tokens gives T-1 predictions, and CE and KL are taken at the same positions 0 ... T-2.
"""

import torch
import torch.nn.functional as F


def token_cross_entropy(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every next token.

    Args:
        logits: [B, T, V] of a causal model on `input_ids`.
        input_ids: [B, T] int64.

    Returns:
        [B, T-1] float32 (float64 for float64 logits), in nats: element t is -log p(input_ids[t+1] | input_ids[..t]).
    """
    flat = _full_precision(logits[:, :-1]).flatten(0, 1)
    return F.cross_entropy(flat, input_ids[:, 1:].flatten(), reduction="none").view(input_ids.shape[0], -1)


def token_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Forward KL divergence of the softened distributions at every predicted position, without the factor T^2.

    KL(p || q) = sum_v p_v (log p_v - log q_v), with p = softmax(teacher / T) and q = softmax(student / T): Hinton,
    Vinyals & Dean (2015), "Distilling the Knowledge in a Neural Network".

    Args:
        student_logits, teacher_logits: [B, T, V]; gradients flow into the student's alone if the teacher's are detached.
        temperature: T > 0.

    Returns:
        [B, T-1] float32 (float64 for float64 logits), in nats, >= 0 up to rounding.
    """
    log_q = F.log_softmax(_full_precision(student_logits[:, :-1]) / temperature, dim=-1)
    log_p = F.log_softmax(_full_precision(teacher_logits[:, :-1]) / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def reduce_kl(kl: torch.Tensor, reduction: str) -> torch.Tensor:
    """[B, T-1] per-token KL -> scalar.

    `token_mean` is the mean over all predicted tokens. `batchmean` divides the sum by the number of sequences alone, as
    torch's KLDivLoss(reduction="batchmean") does on [B, T, V]: T-1 times as much. It reproduces published runs, whose
    "alpha = 0.5" therefore meant a KL weight of about the sequence length.
    """
    if reduction == "token_mean":
        return kl.mean()
    if reduction == "batchmean":
        return kl.sum() / kl.shape[0]
    raise ValueError(f"unknown kl_reduction {reduction!r}: token_mean or batchmean")


def effective_lambda(w_ce: float, w_kl: float, reduction: str = "token_mean", seq_len: int = 2) -> float:
    """The weight of T^2 * KL relative to CE when both are means over tokens: the figure to compare recipes by."""
    scale = seq_len - 1 if reduction == "batchmean" else 1
    return scale * w_kl / w_ce if w_ce else float("inf")


def _full_precision(logits: torch.Tensor) -> torch.Tensor:
    """bf16 and fp16 logits in float32: a log-softmax over a vocabulary in 8 bits of mantissa loses small probabilities."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
