"""The Distiller: one nn.Module that holds the student and everything else that is trained, and whose forward returns
the terms of the loss. DDP, accumulation, saving and resuming therefore treat all trained parameters alike.

Every training stage uses it. Without a teacher the only term is the cross-entropy: that is a baseline, and it is how
teachers themselves are trained. A new term is a method that returns [B, T-1] values or a scalar, a weight in `weights`
and, if it trains something, a submodule created in `__init__`.
"""

from collections.abc import Iterable

import torch
from torch import nn

from babylm import losses


class Distiller(nn.Module):
    """loss = w_ce * CE + w_kl * T^2 * KL(teacher || student), every term a mean over predicted tokens, in nats.

    Args:
        student: causal language model to train.
        teacher: causal language model to learn from, or None for cross-entropy only. It is frozen here, put into eval
            mode for good, and is no submodule: it is neither saved, nor counted, nor given to DDP or the optimizer.
        w_ce, w_kl: weights; a term with weight 0 is not computed in training.
        temperature: T.
        kl_reduction: "token_mean", or "batchmean" to reproduce published runs (see losses.reduce_kl).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, *, w_ce: float = 1.0, w_kl: float = 0.0,
                 temperature: float = 1.0, kl_reduction: str = "token_mean"):
        super().__init__()
        if teacher is None and w_kl:
            raise ValueError("w_kl is positive but there is no teacher")
        self.student = student
        self._teacher = (teacher.requires_grad_(False).eval(),) if teacher is not None else None  # a tuple hides it from nn.Module
        self.w_ce, self.w_kl = w_ce, w_kl
        self.temperature, self.kl_reduction = temperature, kl_reduction

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, or None."""
        return self._teacher[0] if self._teacher else None

    def to_device(self, device: torch.device) -> "Distiller":
        """Move the teacher along with the student (as a non-submodule it does not follow `.to`)."""
        if self._teacher:
            self._teacher[0].to(device)
        return self.to(device)

    def token_terms(self, input_ids: torch.Tensor, *, everything: bool = False) -> dict[str, torch.Tensor]:
        """Each term at each predicted position.

        Args:
            input_ids: [B, T] int64; no padding, so no attention mask.
            everything: also the terms whose weight is 0 (validation reports CE always).

        Returns:
            {"ce": [B, T-1], "kl": [B, T-1]} in nats; KL without its factor T^2.
        """
        logits = self.student(input_ids=input_ids, use_cache=False).logits
        terms = {}
        if self.w_ce or everything:
            terms["ce"] = losses.token_cross_entropy(logits, input_ids)
        if self.teacher is not None and (self.w_kl or everything):
            with torch.no_grad():
                teacher_logits = self.teacher(input_ids=input_ids, use_cache=False).logits
            terms["kl"] = losses.token_kl(logits, teacher_logits, self.temperature)
        return terms

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalars {"loss", "ce", "kl"}: `loss` to be differentiated, the others means over tokens, to be logged."""
        terms = self.token_terms(input_ids)
        loss = input_ids.new_zeros((), dtype=torch.float32)
        if "ce" in terms:
            loss = loss + self.w_ce * terms["ce"].mean()
        if "kl" in terms:
            loss = loss + self.w_kl * self.temperature**2 * losses.reduce_kl(terms["kl"], self.kl_reduction)
        return {"loss": loss, **{name: values.detach().mean() for name, values in terms.items()}}

    def describe(self, seq_len: int) -> str:
        """The loss in one line, with the effective lambda that recipes are compared by."""
        if self.teacher is None:
            return "loss = CE"
        weight = losses.effective_lambda(self.w_ce, self.w_kl, self.kl_reduction, seq_len)
        return (f"loss = {self.w_ce:g} CE + {self.w_kl:g} T^2 KL(teacher || student), T = {self.temperature:g}, "
                f"{self.kl_reduction}: effective lambda = {weight:g}")


def trainable_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Named parameters that an optimizer step changes: what a resume checkpoint has to hold."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
