"""The maths of every training term, as pure functions of tensors; nothing here knows a model, a file or a config.

Conventions, the same for every term: a *mean over predicted tokens*, in nats. Position t of a block predicts token t+1,
so a block of T tokens gives T-1 predictions, and every term is taken at the same positions 0 ... T-2.

Two ways lead to the same numbers. The plain formulas (`token_cross_entropy`, `token_divergence`, `logit_terms`) work on
whole logits and are the reference that the tests compare it with. `fused_linear_distillation` is what training uses: it
takes hidden states and output heads and never holds a [tokens, vocabulary] tensor.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORED = -100  # a target that is not predicted
NEVER = -1e9  # log-probability of an entry that is left out: exp gives 0, and 0 times a difference of two such is 0, not NaN
IN_CACHE, IN_FLIGHT = 2**17, 2**25  # logits (rows x vocabulary) worked on at once: on a CPU, on a GPU
ENTRIES_IN_CACHE = 4096  # entries of the vocabulary whose gradient is added at once on a CPU

# ---- Cross-entropy and divergences, on whole logits -----------------------------------------------------------------


@dataclass(frozen=True)
class LogitObjective:
    """What is computed from the logits: w_ce * CE + w_kl * T^2 * D(teacher, student), means over predicted tokens.

    Args:
        w_ce, w_kl: weights; with w_kl = 0 the teacher's logits are not needed.
        temperature: T > 0, softens both distributions inside D. T^2 keeps the size of its gradient (Hinton et al. 2015).
        label_smoothing: epsilon; CE against (1 - epsilon) * one-hot + epsilon / V (Szegedy et al. 2016).
        divergence: D, see `token_divergence`.
        jsd_beta: beta of the generalised Jensen-Shannon divergence.
        top_k, top_p: *approximations* of D, see `restrict`.
        combine: several teachers teach the mean of their `logits` or of their `probabilities` (at temperature T).
    """

    w_ce: float = 1.0
    w_kl: float = 0.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    top_k: int | None = None
    top_p: float | None = None
    combine: str = "logits"

    @property
    def closed_form(self) -> bool:
        """Whether the gradient is the closed form of `_forward_kl_and_ce`; anything else is differentiated by autograd."""
        return self.divergence == "forward_kl" and self.top_k is None and self.top_p is None


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


def teacher_log_probs(teacher_logits: list[torch.Tensor], temperature: float, weights: list[float] | None = None,
                      combine: str = "logits") -> torch.Tensor:
    """Log-probabilities of what one teacher, or several together, teach: [..., V] each -> [..., V].

    Args:
        teacher_logits: of each teacher.
        weights: of each teacher, summing to 1; default: equal.
        combine: "logits" = softmax of the weighted mean of logits / T (a normalised geometric mean of the distributions);
            "probabilities" = weighted mean of softmax(logits / T).
    """
    weights = weights or [1 / len(teacher_logits)] * len(teacher_logits)
    softened = [_full_precision(logits) / temperature for logits in teacher_logits]
    if combine == "logits":
        return F.log_softmax(sum(weight * logits for weight, logits in zip(weights, softened, strict=True)), dim=-1)
    if combine != "probabilities":
        raise ValueError(f"unknown combine {combine!r}: logits or probabilities")
    parts = [math.log(weight) + F.log_softmax(logits, dim=-1) for weight, logits in zip(weights, softened, strict=True) if weight > 0]
    return torch.logsumexp(torch.stack(parts), dim=0)


def token_divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str = "forward_kl", beta: float = 0.5) -> torch.Tensor:
    """Divergence between the teacher's p and the student's q, [..., V] log-probabilities each -> [...] nats, >= 0.

    forward_kl  KL(p || q) = sum p (log p - log q): covers all of the teacher's mass
    reverse_kl  KL(q || p): seeks its modes (MiniLLM: Gu et al. 2024)
    jsd         beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: generalised Jensen-Shannon divergence,
                equation 1 of GKD (Agarwal et al. 2024); 0 < beta < 1, and beta -> 0, divided by beta, is forward_kl.
    """
    if kind == "forward_kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    raise ValueError(f"unknown divergence {kind!r}: forward_kl, reverse_kl or jsd")


def _kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def token_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Forward KL(teacher || student) of the softened distributions at every predicted position, without the factor T^2.

    Hinton, Vinyals & Dean (2015), "Distilling the Knowledge in a Neural Network".

    Args:
        student_logits, teacher_logits: [B, T, V]; gradients flow into the student's alone if the teacher's are detached.
        temperature: T > 0.

    Returns:
        [B, T-1] float32 (float64 for float64 logits), in nats, >= 0 up to rounding.
    """
    log_q = F.log_softmax(_full_precision(student_logits[:, :-1]) / temperature, dim=-1)
    log_p = F.log_softmax(_full_precision(teacher_logits[:, :-1]) / temperature, dim=-1)
    return token_divergence(log_p, log_q)


def restrict(log_p: torch.Tensor, log_q: torch.Tensor, top_k: int | None = None,
             top_p: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both distributions on the teacher's likeliest entries alone, renormalised there: an approximation of the divergence.

    Args:
        log_p, log_q: [..., V] log-probabilities of teacher and student.
        top_k: keep the teacher's k likeliest entries; the result is [..., k].
        top_p: keep the smallest set that holds at least this much of the teacher's mass; others get probability 0 in both.

    What lies outside is not taught at all, so the approximation is biased: at T = 2 the 64 likeliest entries can hold
    little of the mass.
    """
    if top_k is not None:
        log_p, kept = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1)
        log_q = log_q.gather(-1, kept)
    if top_p is not None:
        ordered, index = log_p.sort(dim=-1, descending=True)
        mass = ordered.exp()
        outside = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, index, mass.cumsum(-1) - mass >= top_p)
        log_p, log_q = log_p.masked_fill(outside, NEVER), log_q.masked_fill(outside, NEVER)
    return log_p - log_p.logsumexp(-1, keepdim=True), log_q - log_q.logsumexp(-1, keepdim=True)


def logit_terms(student_logits: torch.Tensor, teacher_logits: list[torch.Tensor], targets: torch.Tensor, objective: LogitObjective,
                weights: list[float] | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-token loss, CE and divergence by the plain formulas, differentiable.

    Args:
        student_logits, each of teacher_logits: [N, V]; no teachers: the divergence is 0.
        targets: [N] int64; `IGNORED` ones cost 0.
        weights: of the teachers, summing to 1; default: equal.

    Returns:
        (loss, ce, divergence), [N] each, in nats. `ce` is never smoothed and the divergence lacks its factor T^2: they are
        what is logged. loss = w_ce * smoothed CE + w_kl * T^2 * divergence.
    """
    log_q1 = F.log_softmax(_full_precision(student_logits), dim=-1)
    ce = F.nll_loss(log_q1, targets, reduction="none", ignore_index=IGNORED)
    smooth, kept = objective.label_smoothing, targets != IGNORED
    hard = (1 - smooth) * ce - smooth * log_q1.mean(-1) * kept if smooth else ce
    if not teacher_logits:
        return objective.w_ce * hard, ce, torch.zeros_like(ce)
    log_p = teacher_log_probs(teacher_logits, objective.temperature, weights, objective.combine)
    log_q = F.log_softmax(_full_precision(student_logits) / objective.temperature, dim=-1)
    if objective.top_k is not None or objective.top_p is not None:
        log_p, log_q = restrict(log_p, log_q, objective.top_k, objective.top_p)
    divergence = token_divergence(log_p, log_q, objective.divergence, objective.jsd_beta) * kept
    return objective.w_ce * hard + objective.w_kl * objective.temperature**2 * divergence, ce, divergence


def reduce_kl(kl: torch.Tensor, reduction: str) -> torch.Tensor:
    """[B, T-1] per-token KL -> scalar.

    `token_mean` is the mean over all predicted tokens. `batchmean` divides the sum by the number of sequences alone, as
    torch's KLDivLoss(reduction="batchmean") does on [B, T, V]: T-1 times as much. It reproduces published runs, whose
    "alpha = 0.5" therefore meant a KL weight of about the sequence length.
    """
    return kl.mean() * kl_scale(reduction, kl.shape[-1] + 1)


def kl_scale(reduction: str, seq_len: int) -> int:
    """What a reduction multiplies the mean over tokens by, in blocks of `seq_len` tokens."""
    if reduction not in ("token_mean", "batchmean"):
        raise ValueError(f"unknown kl_reduction {reduction!r}: token_mean or batchmean")
    return seq_len - 1 if reduction == "batchmean" else 1


def effective_lambda(w_ce: float, w_kl: float, reduction: str = "token_mean", seq_len: int = 2) -> float:
    """The weight of T^2 * KL relative to CE when both are means over tokens: the figure to compare recipes by."""
    return kl_scale(reduction, seq_len) * w_kl / w_ce if w_ce else float("inf")


def _full_precision(logits: torch.Tensor) -> torch.Tensor:
    """bf16 and fp16 logits in float32: a log-softmax over a vocabulary in 8 bits of mantissa loses small probabilities."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


# ---- Hidden states --------------------------------------------------------------------------------------------------


def state_distance(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse", normalise: bool = False) -> torch.Tensor:
    """Distance of two states per token, [..., D] each -> [...]; no unit.

    Args:
        kind: "mse", the mean over D of the squared difference, or "cosine", 1 - cos (0 ... 2).
        normalise: first give each state mean 0 and variance 1 over its D dimensions, as a layer norm without weights does.
            Without it, tokens and layers whose states have a large norm dominate the mean.
    """
    student, teacher = _full_precision(student), _full_precision(teacher)
    if normalise:
        student, teacher = (F.layer_norm(states, states.shape[-1:]) for states in (student, teacher))
    if kind == "mse":
        return (student - teacher).square().mean(-1)
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, teacher, dim=-1)
    raise ValueError(f"unknown state distance {kind!r}: mse or cosine")


def info_nce(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Contrastive term: which teacher state of the sequence belongs to this student state? (van den Oord et al. 2018)

    -log( exp(cos(s_i, t_i) / tau) / sum_j exp(cos(s_i, t_j) / tau) ), j over all positions of the *same* sequence, so that
    neither batch size nor accumulation changes it.

    Args:
        student, teacher: [B, T, d], projected to a common width.
        temperature: tau > 0.

    Returns:
        [B, T] nats; log T where the states tell nothing apart.
    """
    student, teacher = F.normalize(_full_precision(student), dim=-1), F.normalize(_full_precision(teacher), dim=-1)
    with torch.autocast(student.device.type, enabled=False):  # cosines in 8 bits of mantissa, divided by tau, are off by 0.05 nats
        similarity = student @ teacher.transpose(1, 2) / temperature
    own = torch.arange(similarity.shape[1], device=similarity.device).expand(similarity.shape[:2])
    return F.cross_entropy(similarity.flatten(0, 1), own.flatten(), reduction="none").view(own.shape)


# ---- The fused loss: from hidden states and heads to loss and gradients ---------------------------------------------


class Head(NamedTuple):
    """An output head: logits = states @ weight.T + bias. weight [V, D]; bias [V] or None.

    `weight` None says that the states are logits already: for models whose logits are more than one matrix product.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None


class FusedTerms(NamedTuple):
    """`loss` is a scalar and differentiable; `ce` and `kl` are [N] per token in nats, detached, for logging."""

    loss: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor


def fused_linear_distillation(states: torch.Tensor, head: Head, targets: torch.Tensor, objective: LogitObjective, *,
                              teacher_states: list[torch.Tensor] = (), teacher_heads: list[Head] = (),
                              weights: list[float] | None = None, token_weights: torch.Tensor | None = None,
                              chunk: int | None = None, compiled: bool = False) -> FusedTerms:
    """CE and distillation straight from hidden states, chunk by chunk: no [N, V] tensor is ever held.

    Gradients are made in the forward pass, while a chunk's logits are at hand, and scaled in the backward pass; without
    gradients (validation) they are not made. Forward KL and CE use their closed form; other divergences and top-k/top-p go
    through autograd, one chunk at a time. The head's gradient is accumulated over chunks in float32.

    Args:
        states: [N, D] student states that the head reads, already without each block's last position.
        head: the student's.
        targets: [N] int64, the next token of each; `IGNORED` ones cost nothing.
        objective: weights, temperature, divergence. Its w_kl needs teachers.
        teacher_states, teacher_heads: [N, D_k] and the head of each teacher; never differentiated. For a mean of logits,
            `joint_states` and `joint_head` make several teachers one product.
        weights: of the teachers, summing to 1; default: equal.
        token_weights: [N] factors on each token's loss (not on the logged terms).
        chunk: tokens at a time; default: as many as make 17M logits on a CPU (64 MB in float32), 134M on a GPU.
        compiled: compile the elementwise body with torch.compile (needs a C++ compiler on CPUs).

    Returns:
        FusedTerms. loss = sum(token loss) / number of targets that are not ignored.

    Under autocast the products run in its type, as a plain linear layer's would.
    """
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    if objective.w_kl and not teacher_states:
        raise ValueError("w_kl is positive but there is no teacher")
    entries = head.weight.shape[0] if head.weight is not None else states.shape[-1]
    chunk = chunk or tokens_at_once(entries, device)
    work = _Work(objective, list(teacher_states), list(teacher_heads), weights, token_weights, chunk, compiled, dtype,
                 torch.is_grad_enabled())
    return FusedTerms(*_Fused.apply(states, head.weight, head.bias, targets, work))


def tokens_at_once(entries: int, device: str) -> int:
    """How many tokens' logits over a vocabulary the fused loss holds by default."""
    return max(32, (2**24 if device == "cpu" else 2**27) // entries)


def joint_states(states: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """States [..., D_k] of teachers whose logits are averaged -> [..., sum of D_k], to be read by their `joint_head`:
    sum_k w_k (h_k W_k^T + b_k) is a single product of [w_1 h_1, w_2 h_2, ...] with [W_1, W_2, ...].
    """
    return torch.cat([weight * theirs for weight, theirs in zip(weights, states, strict=True)], dim=-1)


def joint_head(heads: list[Head], weights: list[float]) -> Head:
    """The one head of teachers whose logits are averaged: weight [V, sum of D_k], of which each teacher's is a slice."""
    biases = [weight * head.bias for weight, head in zip(weights, heads, strict=True) if head.bias is not None]
    return Head(torch.cat([head.weight for head in heads], dim=1), sum(biases) if biases else None)


class _Work(NamedTuple):
    """Everything about a fused call that is not differentiated."""

    objective: LogitObjective
    teacher_states: list[torch.Tensor]
    teacher_heads: list[Head]
    weights: list[float] | None
    token_weights: torch.Tensor | None
    chunk: int
    compiled: bool
    dtype: torch.dtype
    with_gradient: bool


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, targets, work):
        need_states, need_weight, need_bias = (need and work.with_gradient for need in ctx.needs_input_grad[:3])
        with torch.autocast(states.device.type, enabled=False):
            head = _cast(Head(weight, bias), work.dtype)
            teachers = [_cast(teacher, work.dtype) for teacher in work.teacher_heads]
            full = torch.float64 if work.dtype == torch.float64 else torch.float32
            ce, kl, loss = (torch.empty(len(targets), dtype=full, device=states.device) for _ in range(3))
            count = (targets != IGNORED).sum().clamp(min=1)
            states_grad = torch.empty_like(states) if need_states else None
            weight_grad = torch.zeros_like(weight, dtype=full) if need_weight else None
            bias_grad = torch.zeros_like(bias, dtype=full) if need_bias else None
            # Memory for one chunk's logits, used again by every chunk: fresh pages would cost a CPU a tenth of the time.
            room, *rooms = (_room(part, min(work.chunk, len(targets))) for part in (head, *teachers))
            for start in range(0, len(targets), work.chunk):
                rows = slice(start, start + work.chunk)
                chunk_states = states[rows].to(work.dtype)
                logits = _logits(chunk_states, head, room)
                if head.weight is None and need_states:
                    logits = logits.clone()  # the gradient is written over the logits
                taught = [_logits(theirs[rows].to(work.dtype), teacher, theirs_room)
                          for theirs, teacher, theirs_room in zip(work.teacher_states, teachers, rooms, strict=True)]
                factors = work.token_weights[rows] if work.token_weights is not None else None
                gradient = need_states or need_weight or need_bias
                loss[rows], ce[rows], kl[rows] = _chunk(logits, taught, targets[rows], factors, work, gradient)
                # `logits` holds the gradient of the chunk's summed loss now.
                if need_states:
                    states_grad[rows] = logits @ head.weight if head.weight is not None else logits
                if need_weight:
                    _accumulate(weight_grad, logits, chunk_states)
                if need_bias:
                    bias_grad += logits.sum(0, dtype=full)
        ctx.save_for_backward(states_grad, weight_grad, bias_grad, count)
        ctx.dtypes = (states.dtype, weight.dtype if weight is not None else None, bias.dtype if bias is not None else None)
        ctx.mark_non_differentiable(ce, kl)
        return loss.sum() / count, ce, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _ce, _kl):
        *gradients, count = ctx.saved_tensors
        scale = grad / count  # only here: 1/N would push small fp16 gradients below what fp16 can hold
        scaled = (g if g is None else (g * scale).to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return *scaled, None, None


def _cast(head: Head, dtype: torch.dtype) -> Head:
    return Head(*(part.to(dtype) if part is not None else None for part in head))


def _room(head: Head, rows: int) -> torch.Tensor | None:
    return head.weight.new_empty(rows, len(head.weight)) if head.weight is not None else None


def _logits(states: torch.Tensor, head: Head, room: torch.Tensor | None) -> torch.Tensor:
    """Logits of a head, written into the first rows of `room`."""
    if head.weight is None:
        return states
    if head.bias is None:
        return torch.mm(states, head.weight.T, out=room[: len(states)])
    return torch.addmm(head.bias, states, head.weight.T, out=room[: len(states)])


def _accumulate(total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor) -> None:
    """total [V, D] += gradient [n, V].T @ states [n, D]; the sum over chunks is kept in float32."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, states)
    elif gradient.is_cuda:
        total += torch.mm(gradient.T, states, out_dtype=total.dtype)
    else:  # slices of the vocabulary: they stay in the cache, and no [V, D] product is held beside the sum
        for part, slope in zip(total.split(ENTRIES_IN_CACHE), gradient.split(ENTRIES_IN_CACHE, dim=1), strict=True):
            part += slope.T @ states


def _chunk(logits: torch.Tensor, taught: list[torch.Tensor], targets: torch.Tensor, factors: torch.Tensor | None, work: _Work,
           gradient: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, ce, kl) of n tokens, [n] each; with `gradient`, `logits` [n, V] is overwritten by d(sum of loss)/d(logits)."""
    objective = work.objective
    # On a CPU a few rows at a time stay in its cache through all passes over them; a GPU wants few large kernels, but not
    # too large: without compilation every pass has a float32 result of its own.
    step = len(logits) if work.compiled else max(1, (IN_CACHE if logits.device.type == "cpu" else IN_FLIGHT) // logits.shape[1])
    body = _compiled_body() if work.compiled else _forward_kl_and_ce
    parts = []
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        student, goal = logits[rows], targets[rows]
        teachers = [part[rows] for part in taught]
        scale = factors[rows] if factors is not None else None
        if objective.closed_form:
            goals = _goal(teachers, objective, work.weights)
            loss, ce, kl, slope = body(student, goals, goal, objective.w_ce, objective.w_kl, objective.temperature,
                                       objective.label_smoothing, gradient)
        else:
            loss, ce, kl, slope = _by_autograd(student, teachers, goal, work, gradient)
        if scale is not None:
            loss = loss * scale
        if gradient:
            student.copy_(slope if scale is None else slope * scale[:, None])
        parts.append((loss, ce, kl))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _goal(teachers: list[torch.Tensor], objective: LogitObjective, weights: list[float] | None) -> torch.Tensor | None:
    """Logits at temperature T (up to a constant per row) of what is taught: [n, V] float, or None without a teacher."""
    if not teachers:
        return None
    if len(teachers) == 1:
        return teachers[0]
    # Any log-probabilities are logits; times T, because the body divides by it.
    return objective.temperature * teacher_log_probs(teachers, objective.temperature, weights, objective.combine)


def _forward_kl_and_ce(student: torch.Tensor, teacher: torch.Tensor | None, targets: torch.Tensor, w_ce: float, w_kl: float,
                       temperature: float, smoothing: float, gradient: bool,
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """CE and forward KL of [n, V] logits by their closed form, and the gradient with respect to the student's:
    w_ce (q_1 - target) + w_kl T (q_T - p_T), because d(T^2 KL)/dz = T (q_T - p_T).
    """
    kept, index = targets != IGNORED, targets.clamp(min=0)[:, None]
    z = _full_precision(student)
    z = z - z.amax(-1, keepdim=True)
    # At T = 1 and 2 one exponential serves both softmaxes: exp(z) = exp(z/2)^2.
    exp_t = z.exp() if temperature == 1 or teacher is None else (z / temperature).exp_()
    exp_1 = exp_t if temperature == 1 or teacher is None else exp_t.square() if temperature == 2 else z.exp()
    sum_1 = exp_1.sum(-1, keepdim=True)
    log_sum_1 = sum_1.log()
    ce = (log_sum_1 - z.gather(-1, index)).squeeze(-1) * kept
    hard = ce if smoothing == 0 else (1 - smoothing) * ce + smoothing * (log_sum_1.squeeze(-1) - z.mean(-1)) * kept
    loss, kl, slope = w_ce * hard, torch.zeros_like(ce), None
    if teacher is not None:
        taught = _full_precision(teacher)
        taught = taught - taught.amax(-1, keepdim=True)
        exp_p = taught.exp() if temperature == 1 else (taught / temperature).exp_()
        sum_p, sum_t = exp_p.sum(-1, keepdim=True), sum_1 if exp_t is exp_1 else exp_t.sum(-1, keepdim=True)
        # KL = sum p (log p - log q) = sum p (z_teacher - z_student) / T - log sum_p + log sum_q; the sum is a row-wise dot product
        gap = torch.bmm(exp_p[:, None], taught.sub_(z)[..., None]).squeeze(-1) / (sum_p * temperature)
        kl = (gap - sum_p.log() + sum_t.log()).squeeze(-1) * kept
        loss = loss + w_kl * temperature**2 * kl
    if gradient:  # w_ce (q_1 - target) + w_kl T (q_T - p), 0 where the target is ignored
        rows = kept[:, None].to(z.dtype)
        slope = exp_1 * (rows * w_ce / sum_1)
        if teacher is not None:
            slope.addcmul_(exp_t, rows * (w_kl * temperature) / sum_t)
            slope.addcmul_(exp_p, rows * (-w_kl * temperature) / sum_p)
        slope.scatter_add_(-1, index, rows * (-w_ce * (1 - smoothing)))
        if smoothing:
            slope -= rows * (w_ce * smoothing / student.shape[-1])
    return loss, ce, kl, slope


@functools.cache
def _compiled_body():
    return torch.compile(_forward_kl_and_ce, dynamic=True)


def _by_autograd(student: torch.Tensor, teachers: list[torch.Tensor], targets: torch.Tensor, work: _Work,
                 gradient: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `_forward_kl_and_ce` returns, for any objective."""
    with torch.set_grad_enabled(gradient):
        leaf = _full_precision(student).detach().requires_grad_(gradient)
        loss, ce, kl = logit_terms(leaf, teachers, targets, work.objective, work.weights)
        slope = torch.autograd.grad(loss.sum(), leaf)[0] if gradient else None
    return loss.detach(), ce.detach(), kl.detach(), slope
