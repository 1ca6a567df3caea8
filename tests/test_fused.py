"""fused_linear_distillation, which training uses, against the plain formulas on whole logits and autograd."""

import shutil
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from babylm import losses
from babylm.losses import IGNORED, Head, LogitObjective, fused_linear_distillation

# ---- A case, and the plain formula on it ----------------------------------------------------------------------------


@dataclass
class Case:
    """Everything that goes into a fused call; the student's part are leaves with gradients."""

    states: torch.Tensor
    head: Head
    targets: torch.Tensor
    objective: LogitObjective
    teacher_states: list
    teacher_heads: list
    weights: list | None = None
    token_weights: torch.Tensor | None = None

    @property
    def trained(self):
        return [part for part in (self.states, self.head.weight, self.head.bias) if part is not None and part.requires_grad]

    def fused(self, **options):
        return fused_linear_distillation(
            self.states, self.head, self.targets, self.objective, teacher_states=self.teacher_states, teacher_heads=self.teacher_heads,
            weights=self.weights, token_weights=self.token_weights, **options)

    def plain(self):
        """(loss, ce, kl) from whole logits; autograd makes the gradients."""
        taught = [F.linear(states, *head) for states, head in zip(self.teacher_states, self.teacher_heads, strict=True)]
        logits = F.linear(self.states, *self.head) if self.head.weight is not None else self.states
        loss, ce, kl = losses.logit_terms(logits, taught, self.targets, self.objective, self.weights)
        loss = loss if self.token_weights is None else loss * self.token_weights
        return loss.sum() / max(1, int((self.targets != IGNORED).sum())), ce, kl

    def double(self):
        """The same numbers in float64."""
        wide = [part.detach().double().requires_grad_() if part is not None else None for part in (self.states, *self.head)]
        return Case(wide[0], Head(*wide[1:]), self.targets, self.objective, [part.double() for part in self.teacher_states],
                    [Head(*(part.double() if part is not None else None for part in head)) for head in self.teacher_heads],
                    self.weights, self.token_weights.double() if self.token_weights is not None else None)


def make_case(objective, seed=0, tokens=11, entries=13, width=5, teacher_widths=(4,), bias=True, dtype=torch.float64, ignored=0.2,
              token_weights=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def head(width):
        return Head(3 * draw(entries, width) / width**0.5, draw(entries) if bias else None)

    targets = torch.randint(entries, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    shares = torch.rand(max(1, len(teacher_widths)), generator=generator, dtype=torch.float64) + 0.1
    student = head(width)
    return Case(draw(tokens, width).requires_grad_(), Head(*(part.requires_grad_() if part is not None else None for part in student)),
                targets, objective, [draw(tokens, theirs) for theirs in teacher_widths], [head(theirs) for theirs in teacher_widths],
                (shares / shares.sum()).tolist() if len(teacher_widths) > 1 else None,
                torch.rand(tokens, generator=generator, dtype=torch.float64).to(dtype) if token_weights else None)


def error(ours, expected):
    """Largest difference relative to the largest value; 0 where both are 0 throughout."""
    assert ours.shape == expected.shape and torch.isfinite(ours).all()
    return float((ours.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def assert_equals_plain(case, tolerance, **options):
    terms = case.fused(**options)
    reference = case.double()
    loss, ce, kl = reference.plain()
    errors = {"loss": error(terms.loss.detach(), loss.detach()), "ce": error(terms.ce, ce.detach()), "kl": error(terms.kl, kl.detach())}
    ours, expected = torch.autograd.grad(terms.loss, case.trained), torch.autograd.grad(loss, reference.trained)
    names = ("states", "weight", "bias") if case.head.weight is not None else ("logits",)
    errors |= {name: error(mine, theirs) for name, mine, theirs in zip(names, ours, expected, strict=False)}
    assert max(errors.values()) <= tolerance, errors


OBJECTIVES = {
    "ce": LogitObjective(),
    "smoothed": LogitObjective(w_ce=0.7, label_smoothing=0.1),
    "kd": LogitObjective(w_ce=0.5, w_kl=0.5, temperature=2.0),
    "kl-T1": LogitObjective(w_ce=0.0, w_kl=1.0),
    "kl-T3": LogitObjective(w_ce=0.1, w_kl=0.9, temperature=3.0, label_smoothing=0.2),
    "reverse_kl": LogitObjective(w_ce=0.3, w_kl=0.7, temperature=2.0, divergence="reverse_kl"),
    "jsd": LogitObjective(w_ce=0.3, w_kl=0.7, divergence="jsd", jsd_beta=0.2),
    "top_k": LogitObjective(w_ce=0.3, w_kl=0.7, temperature=2.0, top_k=4),
    "top_p": LogitObjective(w_ce=0.3, w_kl=0.7, top_p=0.8),
    "probabilities": LogitObjective(w_ce=0.3, w_kl=0.7, temperature=2.0, combine="probabilities"),
}
each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def teachers_for(objective, several=False):
    return () if not objective.w_kl else (4, 6) if several or objective.combine == "probabilities" else (4,)


# ---- Equality with the plain formula --------------------------------------------------------------------------------


@st.composite
def cases(draw, dtype):
    teacher_widths = tuple(draw(st.lists(st.integers(3, 7), max_size=3)))
    alpha = draw(st.sampled_from([0.0, 0.3, 1.0]))
    kind = draw(st.sampled_from([{}, {}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "jsd_beta": 0.3}, {"top_k": 3},
                                 {"top_p": 0.7}]))
    objective = LogitObjective(
        w_ce=alpha if teacher_widths else 1.0, w_kl=1 - alpha if teacher_widths else 0.0,
        temperature=draw(st.sampled_from([1.0, 2.0, 0.7, 4.0])), label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        combine=draw(st.sampled_from(["logits", "probabilities"])), **kind)
    return make_case(objective, draw(st.integers(0, 10**6)), draw(st.integers(1, 24)), draw(st.integers(4, 30)), draw(st.integers(3, 9)),
                     teacher_widths, draw(st.booleans()), dtype, draw(st.sampled_from([0.0, 0.3, 1.1])), draw(st.booleans()))


@given(case=cases(torch.float64), chunk=st.integers(1, 30), rows_in_cache=st.sampled_from([1, 40, 2**18]))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_fused_equals_plain_in_float64(case, chunk, rows_in_cache):
    with patch.object(losses, "IN_CACHE", rows_in_cache):
        assert_equals_plain(case, 1e-10, chunk=chunk)


@given(case=cases(torch.float32), chunk=st.integers(1, 30), rows_in_cache=st.sampled_from([1, 40, 2**18]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_fused_equals_plain_in_float32(case, chunk, rows_in_cache):
    with patch.object(losses, "IN_CACHE", rows_in_cache):
        assert_equals_plain(case, 1e-5, chunk=chunk)


@each_objective
@pytest.mark.parametrize("chunk", [1, 4, 11, 12, None])  # 11 tokens: 4 leaves a last chunk of 3
def test_the_size_of_a_chunk_changes_nothing(objective, chunk):
    assert_equals_plain(make_case(objective, teacher_widths=teachers_for(objective)), 1e-10, chunk=chunk)


@each_objective
def test_gradients_agree_with_finite_differences(objective):
    case = make_case(objective, tokens=5, entries=6, width=3, teacher_widths=teachers_for(objective, several=True), token_weights=True)

    def loss(states, weight, bias):
        case.states, case.head = states, Head(weight, bias)
        return case.fused(chunk=2).loss

    assert torch.autograd.gradcheck(loss, case.trained)


@each_objective
def test_positions_that_are_all_ignored_cost_nothing(objective):
    case = make_case(objective, teacher_widths=teachers_for(objective), ignored=1.1)
    terms = case.fused(chunk=4)
    assert terms.loss == 0 and not terms.ce.any() and not terms.kl.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(terms.loss, case.trained))


def test_the_loss_is_a_mean_over_the_targets_that_are_not_ignored():
    case = make_case(LogitObjective(), tokens=6, ignored=0.0)
    whole = case.fused()
    case.targets[3:] = IGNORED
    half = case.fused()
    assert half.loss.item() == pytest.approx(whole.ce[:3].mean().item())
    assert half.ce.tolist() == [*whole.ce[:3].tolist(), 0, 0, 0]


def test_token_weights_scale_each_tokens_loss_and_not_the_logged_terms():
    case = make_case(OBJECTIVES["kd"], tokens=4, ignored=0.0)
    plain = case.fused(chunk=3)
    per_token = 0.5 * plain.ce + 0.5 * 4 * plain.kl
    case.token_weights = torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    weighted = case.fused(chunk=3)
    assert weighted.loss.item() == pytest.approx(((per_token[1] + 2 * per_token[2]) / 4).item())
    assert torch.equal(weighted.ce, plain.ce) and torch.equal(weighted.kl, plain.kl)
    states = torch.autograd.grad(weighted.loss, case.states)[0]
    assert [bool(row.any()) for row in states] == [False, True, True, False]


def test_the_logged_ce_is_not_smoothed_and_the_logged_kl_lacks_T_squared():
    objective = LogitObjective(w_ce=0.5, w_kl=0.5, temperature=2.0, label_smoothing=0.3)
    smoothed, bare = make_case(objective).fused(), make_case(LogitObjective(temperature=2.0)).fused()
    assert torch.equal(smoothed.ce, bare.ce) and torch.equal(smoothed.kl, bare.kl)
    case = make_case(objective)
    log_q, log_p = (F.linear(states, *head).div(2).log_softmax(-1)
                    for states, head in ((case.states, case.head), (case.teacher_states[0], case.teacher_heads[0])))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1) * (case.targets != IGNORED)
    assert torch.allclose(smoothed.kl, expected)


@each_objective
def test_a_head_used_twice_and_as_embedding_gets_the_sum_of_its_gradients(objective):
    """Tied weights, and an auxiliary classifier that shares the output head."""
    case = make_case(objective, teacher_widths=teachers_for(objective))
    ids = torch.arange(11) % 13

    def loss(term):
        case.states = torch.tanh(case.head.weight[ids])
        first = term()[0]
        case.states = torch.sin(2 * case.states)
        return first + 0.5 * term()[0]

    ours, expected = (torch.autograd.grad(loss(term), case.head) for term in (lambda: case.fused(chunk=4), case.plain))
    assert max(error(*pair) for pair in zip(ours, expected, strict=True)) < 1e-10


@each_objective
def test_states_that_are_logits_already(objective):
    case = make_case(objective, teacher_widths=teachers_for(objective))
    case.states, case.head = 3 * torch.randn(11, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), Head(None)
    before = case.states.clone()
    case.states.requires_grad_()
    assert_equals_plain(case, 1e-10, chunk=4)
    assert torch.equal(case.states, before), "the logits given were overwritten"


def test_extreme_logits_give_finite_values():
    """A student and a teacher that are sure of different entries; exponentials underflow."""
    for temperature in (1.0, 2.0, 3.0):
        objective = LogitObjective(w_ce=0.5, w_kl=0.5, temperature=temperature)
        case = make_case(objective, dtype=torch.float32, ignored=0.0)
        case.head, case.teacher_heads = Head((300 * case.head.weight.detach()).requires_grad_()), [Head(300 * case.teacher_heads[0].weight)]
        assert_equals_plain(case, 1e-5)


# ---- Several teachers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kd", "kl-T3", "reverse_kl", "top_k"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_joint_head_equals_separate_teachers(name, bias):
    case = make_case(OBJECTIVES[name], teacher_widths=(4, 6, 3), bias=bias)
    separate = case.fused(chunk=4)
    expected = torch.autograd.grad(separate.loss, case.trained)
    states = losses.joint_states(case.teacher_states, case.weights)
    head = losses.joint_head(case.teacher_heads, case.weights)
    case.teacher_states, case.teacher_heads, case.weights = [states], [head], None
    joint = case.fused(chunk=4)
    assert error(joint.loss.detach(), separate.loss.detach()) < 1e-10 and error(joint.kl, separate.kl) < 1e-10
    assert max(error(*pair) for pair in zip(torch.autograd.grad(joint.loss, case.trained), expected, strict=True)) < 1e-10


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_the_weights_of_teachers_count_and_are_equal_by_default(combine):
    case = make_case(LogitObjective(w_ce=0.0, w_kl=1.0, combine=combine), teacher_widths=(4, 6))
    values = []
    for case.weights in (None, [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]):
        values.append(case.fused().loss.item())
    alone = []
    for number in (0, 1):
        one = make_case(case.objective, teacher_widths=(4, 6))
        one.weights, one.teacher_states, one.teacher_heads = None, [one.teacher_states[number]], [one.teacher_heads[number]]
        alone.append(one.fused().loss.item())
    assert values[0] == pytest.approx(values[1])
    assert values[2:] == pytest.approx(alone)
    assert abs(values[2] - values[3]) > 1e-3


def test_distillation_without_a_teacher_is_an_error():
    with pytest.raises(ValueError, match="no teacher"):
        make_case(LogitObjective(w_kl=0.5), teacher_widths=()).fused()


# ---- What is differentiated, and what is not ------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen += [tuple(part.shape) for part in (out if isinstance(out, tuple | list) else [out]) if isinstance(part, torch.Tensor)]
        return out

    @property
    def largest(self):
        return max(torch.Size(shape).numel() for shape in self.seen)


@each_objective
def test_no_tensor_of_tokens_times_vocabulary_is_made(objective):
    tokens, entries, chunk = 300, 200, 20
    case = make_case(objective, tokens=tokens, entries=entries, width=5, teacher_widths=teachers_for(objective, several=True))
    with Shapes() as ours:
        torch.autograd.grad(case.fused(chunk=chunk).loss, case.trained)
    with Shapes() as plain:
        torch.autograd.grad(case.plain()[0], case.trained)
    copies = 2 if objective.combine == "probabilities" else 1  # a stack of the teachers' log-probabilities
    assert ours.largest <= copies * chunk * entries
    assert plain.largest >= tokens * entries  # so the recorder would have seen it


@pytest.mark.parametrize("name", ["kd", "jsd"])
def test_without_gradients_the_values_are_the_same_and_no_gradient_is_made(name):
    case = make_case(OBJECTIVES[name], tokens=40, width=7)
    weight_shape = tuple(case.head.weight.shape)
    with Shapes() as trained:
        terms = case.fused(chunk=16)
    with torch.no_grad(), Shapes() as validated:
        bare = case.fused(chunk=16)
    assert [torch.equal(*pair) for pair in zip(terms, bare, strict=True)] == [True] * 3
    assert terms.loss.requires_grad and not any(part.requires_grad for part in (*bare, terms.ce, terms.kl))
    assert weight_shape in trained.seen and (40, 7) in trained.seen  # the buffers of dW and of the states' gradient
    assert weight_shape not in validated.seen and (40, 7) not in validated.seen


@pytest.mark.parametrize("frozen", ["head", "states"])
def test_what_is_frozen_gets_no_gradient_and_no_buffer(frozen):
    case = make_case(OBJECTIVES["kd"], tokens=40, width=7)
    expected = dict(zip(("states", "weight", "bias"), torch.autograd.grad(case.fused().loss, case.trained), strict=True))
    for part in case.head if frozen == "head" else [case.states]:
        part.requires_grad_(False)
    with Shapes() as recorded:
        loss = case.fused(chunk=16).loss
    loss.backward()
    parts = {"states": case.states, "weight": case.head.weight, "bias": case.head.bias}
    got = {name for name, part in parts.items() if part.grad is not None}
    assert got == ({"states"} if frozen == "head" else {"weight", "bias"})
    assert all(torch.allclose(parts[name].grad, expected[name]) for name in got)
    assert (tuple(case.head.weight.shape) if frozen == "head" else (40, 7)) not in recorded.seen


def test_teachers_and_token_weights_get_no_gradient():
    case = make_case(OBJECTIVES["jsd"], token_weights=True)
    others = [case.teacher_states[0], *case.teacher_heads[0], case.token_weights]
    for part in others:
        part.requires_grad_()
    case.fused().loss.backward()
    assert [part.grad for part in others] == [None] * 4 and case.states.grad is not None


@pytest.mark.parametrize("name", ["kd", "jsd"])
def test_the_gradient_scales_with_what_comes_from_above(name):
    case = make_case(OBJECTIVES[name])
    once = torch.autograd.grad(case.fused().loss, case.trained)
    thrice = torch.autograd.grad(3 * case.fused().loss + 5, case.trained)
    assert all(torch.allclose(3 * one, three, rtol=1e-12) for one, three in zip(once, thrice, strict=True))


def test_backward_twice_gives_the_same_gradient():
    case = make_case(OBJECTIVES["kd"])
    loss = case.fused().loss
    first, second = (torch.autograd.grad(loss, case.trained, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# ---- Low precision --------------------------------------------------------------------------------------------------


@each_objective
def test_under_autocast_close_to_the_plain_result_and_gradients_have_the_parameters_type(objective):
    case = make_case(objective, tokens=60, width=16, teacher_widths=teachers_for(objective), dtype=torch.float32)
    exact = torch.autograd.grad(case.plain()[0], case.trained)
    with torch.autocast("cpu", torch.bfloat16):
        ours, (loss, _, _) = case.fused(chunk=16), case.plain()
    assert ours.loss.dtype == ours.ce.dtype == ours.kl.dtype == torch.float32
    gradients, plain = torch.autograd.grad(ours.loss, case.trained), torch.autograd.grad(loss, case.trained)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    assert error(ours.loss.detach(), loss.detach()) < 5e-3
    for mine, theirs, reference in zip(gradients, plain, exact, strict=True):
        assert error(mine, reference) < max(0.02, 2 * error(theirs, reference))


def test_products_run_in_the_type_of_autocast():
    """The logits are those of a linear layer under autocast, bit for bit."""
    case = make_case(OBJECTIVES["ce"], tokens=20, dtype=torch.float32, ignored=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours, logits = case.fused().ce, F.linear(case.states, *case.head)
    assert logits.dtype == torch.bfloat16
    assert torch.allclose(ours, F.cross_entropy(logits.float(), case.targets, reduction="none"), atol=1e-5)
    assert not torch.allclose(ours, case.fused().ce, atol=1e-4)


def test_the_gradient_of_the_head_is_summed_over_chunks_in_float32():
    """Many small chunks: what bf16 sums would lose is several times what the products' own rounding costs."""
    case = make_case(LogitObjective(), tokens=1024, entries=8, width=4, dtype=torch.float32, ignored=0.0)
    case.states.data[:, 0] = 1.0  # entries of dW that grow with every chunk
    case.targets[:] = 0
    reference = case.double()
    expected = torch.autograd.grad(reference.plain()[0], reference.head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(case.fused(chunk=4).loss, case.head.weight)[0]
        total = torch.zeros(8, 4, dtype=torch.bfloat16)
        for start in range(0, 1024, 4):
            logits = F.linear(case.states[start:start + 4], *case.head).detach().float()
            gradient = logits.softmax(-1) - F.one_hot(case.targets[start:start + 4], 8)
            total += gradient.bfloat16().T @ case.states[start:start + 4].detach().bfloat16()
    assert ours.dtype == torch.float32
    assert error(ours, expected) < 0.01
    assert error(total / 1024, expected) > 5 * error(ours, expected)


def test_gradients_of_bf16_states_are_not_all_too_large_or_too_small():
    """The factor 1/N must not be rounded to bf16: every gradient would be off by the same share, up to 0.4% (1/999: 0.17%)."""
    case = make_case(OBJECTIVES["kd"], tokens=999, width=32, dtype=torch.bfloat16, ignored=0.0)
    reference = case.double()
    expected = torch.autograd.grad(reference.plain()[0], reference.states)[0]
    ours = torch.autograd.grad(case.fused().loss, case.states)[0].double()
    assert (ours * expected).sum() / expected.square().sum() == pytest.approx(1, abs=1e-3)


# ---- Compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
def test_compiled_equals_eager():
    case = make_case(LogitObjective(w_ce=0.5, w_kl=0.5, temperature=2.0, label_smoothing=0.1), tokens=20, dtype=torch.float32,
                     token_weights=True)
    assert_equals_plain(case, 1e-5, chunk=16, compiled=True)
