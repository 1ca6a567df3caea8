"""The maths of the loss, against values worked out by hand, and the Distiller that adds its terms up."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from babylm import losses
from babylm.distillation import Distiller, trainable_parameters

LN2, LN3 = math.log(2), math.log(3)


def random_case(seed, batch=2, length=5, entries=7, dtype=torch.float64):
    """(student logits, teacher logits, ids) of a batch."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(batch, length, entries, generator=generator, dtype=dtype) for _ in range(2))
    return student, teacher, torch.randint(entries, (batch, length), generator=generator)


# ---- Cross-entropy --------------------------------------------------------------------------------------------------


def test_cross_entropy_by_hand():
    """Two entries; logits (0, ln 3) are probabilities (1/4, 3/4): -ln of the *next* token's, in nats."""
    logits = torch.tensor([[[0.0, LN3], [0.0, LN3], [0.0, 0.0], [50.0, -50.0]]])
    ids = torch.tensor([[1, 0, 1, 1]])
    expected = torch.tensor([[2 * LN2, 2 * LN2 - LN3, LN2]])  # 0 after position 0, 1 after 1, 1 after 2
    assert torch.allclose(losses.token_cross_entropy(logits, ids), expected)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    ids = torch.arange(6).view(2, 3)
    assert torch.allclose(losses.token_cross_entropy(torch.zeros(2, 3, 1000), ids), torch.tensor(math.log(1000)))


# ---- KL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, expected", [
    # p = (1/4, 3/4), q = (1/2, 1/2)
    (1.0, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
    # halved logits: p = (1, sqrt 3) / (1 + sqrt 3)
    (2.0, LN2 + (math.sqrt(3) * LN3 / 2) / (1 + math.sqrt(3)) - math.log(1 + math.sqrt(3))),
])
def test_kl_by_hand(temperature, expected):
    teacher = torch.tensor([[[0.0, LN3], [9.0, 9.0]]])
    student = torch.zeros(1, 2, 2)
    assert losses.token_kl(student, teacher, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_kl_goes_from_teacher_to_student():
    """Where the teacher is sure and the student is not, KL(teacher || student) is ln 2; the other way it has no bound."""
    teacher, student = torch.tensor([[[0.0, -60.0]] * 2]), torch.zeros(1, 2, 2)
    assert losses.token_kl(student, teacher).item() == pytest.approx(LN2)
    assert losses.token_kl(teacher, student).item() > 20


@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 8))
@settings(max_examples=40, deadline=None)
def test_kl_is_a_divergence(seed, temperature):
    student, teacher, _ = random_case(seed)
    kl = losses.token_kl(student, teacher, temperature)
    assert (kl >= -1e-12).all() and kl.max() > 1e-3
    assert losses.token_kl(teacher, teacher, temperature).abs().max() < 1e-12
    # A constant added to all logits of a position changes no probability; nor does another order of the vocabulary.
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    shifted = losses.token_kl(student[..., order] + student[..., :1], teacher[..., order] - 5, temperature)
    assert torch.allclose(shifted, kl, atol=1e-10)
    # A sequence costs the same whatever stands beside it in the batch.
    assert torch.allclose(losses.token_kl(student.flip(0), teacher.flip(0), temperature), kl.flip(0), atol=1e-12)


def test_temperature_squared_keeps_the_gradient():
    """Hinton et al.'s reason for T^2: at high T the gradient tends to (centred student - centred teacher) / V, whatever T is."""
    student, teacher, _ = random_case(3)
    student.requires_grad_()
    (200.0**2 * losses.token_kl(student, teacher, 200.0).sum()).backward()
    centred = student.detach() - student.detach().mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True)
    assert torch.allclose(student.grad[:, :-1], centred[:, :-1] / 7, atol=0.02)


# ---- What both share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(5))
def test_both_terms_use_positions_0_to_T_minus_2(position):
    """Logits at position t change element t of both terms and no other; those at the last position change nothing."""
    student, teacher, ids = random_case(0)
    changed = student.clone()
    changed[:, position, 0] += 2
    for term in (lambda z: losses.token_cross_entropy(z, ids), lambda z: losses.token_kl(z, teacher)):
        assert term(student).shape == (2, 4)
        touched = (term(changed) != term(student)).any(0)
        assert touched.tolist() == [position == t for t in range(4)]


def test_cross_entropy_at_t_reads_only_the_token_at_t_plus_1():
    student, _, ids = random_case(1)
    for position in range(5):
        other = ids.clone()
        other[:, position] = (other[:, position] + 1) % 7
        touched = (losses.token_cross_entropy(student, other) != losses.token_cross_entropy(student, ids)).all(0)
        assert touched.tolist() == [position == t + 1 for t in range(4)]


def test_gradients_agree_with_finite_differences():
    student, teacher, ids = random_case(2, batch=1, length=4, entries=5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.token_cross_entropy(z, ids), student)
    assert torch.autograd.gradcheck(lambda z: losses.token_kl(z, teacher, 2.0), student)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: losses.token_kl(student.detach(), p, 2.0), teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast_first(dtype):
    student, teacher, ids = random_case(4, entries=2000, dtype=torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    for half, full in ((losses.token_cross_entropy(student, ids), losses.token_cross_entropy(student.float(), ids)),
                       (losses.token_kl(student, teacher, 2.0), losses.token_kl(student.float(), teacher.float(), 2.0))):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


# ---- Reductions -----------------------------------------------------------------------------------------------------


def test_batchmean_is_token_mean_times_the_predictions_per_sequence():
    student, teacher, _ = random_case(5, batch=3, length=9)
    kl = losses.token_kl(student, teacher)
    assert losses.reduce_kl(kl, "token_mean").item() == pytest.approx(kl.sum().item() / (3 * 8))
    assert losses.reduce_kl(kl, "batchmean").item() == pytest.approx(8 * losses.reduce_kl(kl, "token_mean").item())
    # and it is what published code computed
    published = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(student[:, :-1], -1), F.softmax(teacher[:, :-1], -1))
    assert losses.reduce_kl(kl, "batchmean").item() == pytest.approx(published.item())


def test_an_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match="token_mean or batchmean"):
        losses.reduce_kl(torch.zeros(1, 1), "mean")


@pytest.mark.parametrize("arguments, expected", [
    ((0.5, 0.5), 1.0),
    ((0.1, 0.9), 9.0),
    ((0.5, 0.5, "batchmean", 129), 128.0),
    ((1.0, 0.1, "token_mean", 129), 0.1),
    ((1.0, 0.0), 0.0),
    ((0.0, 1.0), math.inf),
])
def test_effective_lambda(arguments, expected):
    assert losses.effective_lambda(*arguments) == pytest.approx(expected)


# ---- The Distiller --------------------------------------------------------------------------------------------------

IDS = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(0))


def tiny(seed, width=16, dropout=0.0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=width, n_layer=2, n_head=2, resid_pdrop=dropout,
                                      embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.3, bos_token_id=0, eos_token_id=0))


def distiller(**settings):
    return Distiller(tiny(0), tiny(1, width=24, dropout=0.5), **settings)


def gradients(module):
    module.zero_grad()
    module(IDS)["loss"].backward()
    return {name: parameter.grad.clone() for name, parameter in module.student.named_parameters()}


def test_the_loss_is_the_weighted_sum_of_its_terms():
    module = distiller(w_ce=0.3, w_kl=0.7, temperature=2.0)
    student, teacher = module.student(IDS).logits, module.teacher(IDS).logits
    ce = F.cross_entropy(student[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    kl = F.kl_div(F.log_softmax(student[:, :-1] / 2, -1), F.softmax(teacher[:, :-1] / 2, -1), reduction="none").sum(-1).mean()
    terms = module(IDS)
    assert terms["ce"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx(0.3 * ce.item() + 0.7 * 4 * kl.item(), rel=1e-5)


def test_batchmean_weighs_the_loss_but_not_the_logged_kl():
    """The logged KL stays a mean over tokens, so that curves of all recipes can be compared."""
    mean, batchmean = (distiller(w_ce=0.0, w_kl=1.0, kl_reduction=reduction)(IDS) for reduction in ("token_mean", "batchmean"))
    assert batchmean["kl"].item() == pytest.approx(mean["kl"].item())
    assert batchmean["loss"].item() == pytest.approx(7 * mean["loss"].item())


@pytest.mark.parametrize("weights", [{"w_ce": 1.0, "w_kl": 0.0}, {"w_ce": 0.0, "w_kl": 1.0}])
def test_each_term_alone_trains_every_parameter_of_the_student(weights):
    untrained = [name for name, gradient in gradients(distiller(**weights)).items() if not gradient.abs().sum() > 0]
    assert untrained == []


def test_the_gradient_of_the_sum_is_the_sum_of_the_gradients():
    ce, kl = gradients(distiller(w_ce=1.0, w_kl=0.0)), gradients(distiller(w_ce=0.0, w_kl=1.0, temperature=2.0))
    both = gradients(distiller(w_ce=0.25, w_kl=0.75, temperature=2.0))
    for name in both:
        assert torch.allclose(both[name], 0.25 * ce[name] + 0.75 * kl[name], atol=1e-6), name
    assert not torch.allclose(ce["transformer.wte.weight"], kl["transformer.wte.weight"], atol=1e-4)


def test_the_teacher_is_frozen_and_stays_in_eval_mode():
    module = distiller(w_ce=0.5, w_kl=0.5).train()
    assert module.student.training and not any(part.training for part in module.teacher.modules())
    first, second = module(IDS)["kl"], module(IDS)["kl"]  # a dropout of 0.5 in the teacher would tell them apart
    assert torch.equal(first, second)
    module(IDS)["loss"].backward()
    assert all(not p.requires_grad and p.grad is None for p in module.teacher.parameters())


def test_the_teacher_is_no_part_of_the_module():
    """What DDP, the optimizer and a checkpoint see is the student alone."""
    module = distiller(w_ce=0.5, w_kl=0.5)
    student = {f"student.{name}" for name, _ in module.student.named_parameters()}
    assert {name for name, _ in module.named_parameters()} == student
    assert {name for name, _ in trainable_parameters(module)} == student
    assert all(name.startswith("student.") for name in module.state_dict())
    assert module.teacher not in list(module.modules())


def test_a_term_of_weight_0_is_not_computed_in_training_but_is_in_validation():
    module = distiller(w_ce=1.0, w_kl=0.0)
    calls = []
    module.teacher.register_forward_hook(lambda *_: calls.append(1))
    assert set(module(IDS)) == {"loss", "ce"} and not calls
    assert set(module.token_terms(IDS, everything=True)) == {"ce", "kl"} and calls
    assert set(distiller(w_ce=0.0, w_kl=1.0)(IDS)) == {"loss", "kl"}


def test_the_teacher_runs_under_the_students_autocast():
    module = distiller(w_ce=0.5, w_kl=0.5)
    seen = []
    for model in (module.student, module.teacher):
        model.lm_head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        terms = module(IDS)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert terms["loss"].dtype == terms["kl"].dtype == torch.float32


def test_kl_without_a_teacher_is_an_error():
    with pytest.raises(ValueError, match="no teacher"):
        Distiller(tiny(0), w_kl=1.0)


def test_the_description_names_the_effective_lambda():
    assert Distiller(tiny(0)).describe(128) == "loss = CE"
    assert distiller(w_ce=0.5, w_kl=0.5, temperature=2.0, kl_reduction="batchmean").describe(129).endswith("lambda = 128")
