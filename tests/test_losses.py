"""The pure functions of babylm/losses.py on whole tensors, against values worked out by hand and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from babylm import losses
from babylm.losses import Head, LogitObjective

LN2, LN3 = math.log(2), math.log(3)
QUARTER, HALF = torch.tensor([[1 / 4, 3 / 4]], dtype=torch.float64).log(), torch.tensor([[1 / 2, 1 / 2]], dtype=torch.float64).log()
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


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


# ---- Divergences ----------------------------------------------------------------------------------------------------


def random_log_probs(seed, *shape):
    """[..., V] log-probabilities that `gradcheck` may move: not normalised by a softmax afterwards."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(-1)


@pytest.mark.parametrize("kind, beta, expected", [
    # p = (1/4, 3/4) is the teacher's, q = (1/2, 1/2) the student's
    ("forward_kl", 0.5, 1 / 4 * math.log(1 / 2) + 3 / 4 * math.log(3 / 2)),
    ("reverse_kl", 0.5, 1 / 2 * math.log(2) + 1 / 2 * math.log(2 / 3)),
    # m = (p + q) / 2 = (3/8, 5/8)
    ("jsd", 0.5, 1 / 2 * (1 / 4 * math.log(2 / 3) + 3 / 4 * math.log(6 / 5)) + 1 / 2 * (1 / 2 * math.log(4 / 3) + 1 / 2 * math.log(4 / 5))),
    # m = p / 4 + 3 q / 4 = (7/16, 9/16)
    ("jsd", 0.25, 1 / 4 * (1 / 4 * math.log(4 / 7) + 3 / 4 * math.log(4 / 3)) + 3 / 8 * (math.log(8 / 7) + math.log(8 / 9))),
])
def test_divergence_by_hand(kind, beta, expected):
    assert losses.token_divergence(QUARTER, HALF, kind, beta).item() == pytest.approx(expected, abs=1e-12)


def test_jsd_over_beta_tends_to_forward_kl_and_at_the_other_end_to_reverse_kl():
    p, q = random_log_probs(0, 4, 6), random_log_probs(1, 4, 6)
    forward, reverse = losses.token_divergence(p, q, "forward_kl"), losses.token_divergence(p, q, "reverse_kl")
    assert torch.allclose(losses.token_divergence(p, q, "jsd", 1e-6) / 1e-6, forward, rtol=1e-3)
    assert torch.allclose(losses.token_divergence(p, q, "jsd", 1 - 1e-6) / 1e-6, reverse, rtol=1e-3)
    assert not torch.allclose(forward, reverse, rtol=0.1)


@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_every_divergence_is_positive_and_0_for_equal_distributions(kind, beta):
    p, q = random_log_probs(2, 20, 6), random_log_probs(3, 20, 6)
    assert (losses.token_divergence(p, q, kind, beta) > 1e-3).all()
    assert losses.token_divergence(p, p, kind, beta).abs().max() < 1e-12


def test_jsd_is_bounded_where_both_kls_are_not():
    """Distributions that share no entry: the divergence is the entropy of (beta, 1 - beta)."""
    p, q = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    assert losses.token_divergence(p, q, "jsd", 0.5).item() == pytest.approx(LN2)
    assert losses.token_divergence(p, q, "jsd", 0.25).item() == pytest.approx(2 * LN2 - 3 / 4 * LN3)
    assert min(losses.token_divergence(p, q, kind).item() for kind in ("forward_kl", "reverse_kl")) == pytest.approx(200)


@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_gradients_of_every_divergence_agree_with_finite_differences(kind, beta):
    p, q = random_log_probs(4, 3, 5).requires_grad_(), random_log_probs(5, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: losses.token_divergence(p.log_softmax(-1), q.log_softmax(-1), kind, beta), (p, q))


def test_an_unknown_divergence_is_an_error():
    with pytest.raises(ValueError, match="forward_kl, reverse_kl or jsd"):
        losses.token_divergence(HALF, HALF, "kl")


# ---- Restriction to the teacher's likeliest entries -----------------------------------------------------------------

P = torch.tensor([0.05, 0.5, 0.15, 0.3], dtype=torch.float64).log()
Q = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=torch.float64).log()


def probabilities(pair):
    return [[round(value, 10) for value in part.exp().tolist()] for part in pair]


def test_top_k_keeps_the_teachers_likeliest_entries_and_renormalises_both():
    p, q = probabilities(losses.restrict(P, Q, top_k=2))
    assert (p, q) == ([0.625, 0.375], [round(1 / 3, 10), round(2 / 3, 10)])  # 0.5 and 0.3 of 0.8; 0.1 and 0.2 of 0.3


@pytest.mark.parametrize("top_p, p, q", [
    (0.45, [0, 1, 0, 0], [0, 1, 0, 0]),  # one entry holds 0.5 already
    (0.6, [0, 5 / 8, 0, 3 / 8], [0, 1 / 3, 0, 2 / 3]),
    (0.9, [0, 10 / 19, 3 / 19, 6 / 19], [0, 1 / 6, 1 / 2, 1 / 3]),
    (0.99, [0.05, 0.5, 0.15, 0.3], [0.4, 0.1, 0.3, 0.2]),
])
def test_top_p_keeps_the_smallest_set_of_at_least_that_mass_in_place(top_p, p, q):
    ours = losses.restrict(P, Q, top_p=top_p)
    assert torch.allclose(ours[0].exp(), torch.tensor(p, dtype=torch.float64))
    assert torch.allclose(ours[1].exp(), torch.tensor(q, dtype=torch.float64))


def test_more_entries_than_there_are_change_nothing():
    p, q = losses.restrict(P, Q, top_k=99)
    assert losses.token_divergence(p, q).item() == pytest.approx(losses.token_divergence(P, Q).item())


@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_left_out_entries_add_nothing_to_any_divergence(kind, beta):
    """In float32, where the log-probability that stands for 0 is far from exact."""
    p, q = losses.restrict(P.float(), Q.float(), top_p=0.6)
    alone = losses.token_divergence(torch.tensor([5 / 8, 3 / 8]).log(), torch.tensor([1 / 3, 2 / 3]).log(), kind, beta)
    assert losses.token_divergence(p, q, kind, beta).item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("restriction", [{"top_k": 3}, {"top_p": 0.7}])
@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_gradients_of_restricted_divergences_agree_with_finite_differences(kind, beta, restriction):
    p, q = random_log_probs(6, 3, 6).requires_grad_(), random_log_probs(7, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, q: losses.token_divergence(*losses.restrict(p.log_softmax(-1), q.log_softmax(-1), **restriction), kind, beta), (p, q))


# ---- Several teachers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine, temperature, weights, ratio", [
    # Logits (0, ln 3) and (0, 0); `ratio` is p(second entry) / p(first)
    ("logits", 1.0, None, 3 ** (1 / 2)),
    ("logits", 2.0, None, 3 ** (1 / 4)),
    ("logits", 1.0, [0.25, 0.75], 3 ** (1 / 4)),
    ("probabilities", 1.0, None, 5 / 3),  # the mean of (1/4, 3/4) and (1/2, 1/2) is (3/8, 5/8)
    ("probabilities", 1.0, [0.25, 0.75], 9 / 7),  # (7/16, 9/16)
    ("probabilities", 2.0, None, (1 / 2 + 3 ** (1 / 2) / (1 + 3 ** (1 / 2))) / (1 / 2 + 1 / (1 + 3 ** (1 / 2)))),
    ("probabilities", 1.0, [0.0, 1.0], 1.0),
])
def test_mean_of_teachers_by_hand(combine, temperature, weights, ratio):
    teachers = [torch.tensor([[0.0, LN3]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)]
    taught = losses.teacher_log_probs(teachers, temperature, weights, combine).exp()
    assert taught.sum().item() == pytest.approx(1)
    assert (taught[0, 1] / taught[0, 0]).item() == pytest.approx(ratio)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_several_times_the_same_teacher_is_that_teacher(combine):
    _, teacher, _ = random_case(8)
    assert torch.allclose(losses.teacher_log_probs([teacher] * 3, 2.0, [0.5, 0.2, 0.3], combine), (teacher / 2).log_softmax(-1))


def test_an_unknown_combination_is_an_error():
    with pytest.raises(ValueError, match="logits or probabilities"):
        losses.teacher_log_probs([HALF, HALF], 1.0, combine="votes")


# ---- All terms of logits --------------------------------------------------------------------------------------------


def test_label_smoothing_by_hand_and_the_logged_ce_is_not_smoothed():
    """q = (1/4, 3/4), target 1, epsilon 0.2: the smoothed target is (0.1, 0.9)."""
    loss, ce, _ = losses.logit_terms(QUARTER, [], torch.tensor([1]), LogitObjective(w_ce=2.0, label_smoothing=0.2))
    assert ce.item() == pytest.approx(-math.log(3 / 4))
    assert loss.item() == pytest.approx(2 * (-0.1 * math.log(1 / 4) - 0.9 * math.log(3 / 4)))


def test_logit_terms_by_hand():
    """Student (1/2, 1/2) and teacher (1/4, 3/4), softened by T = 2 to (1, sqrt 3) / (1 + sqrt 3); the divergence is logged without T^2."""
    loss, ce, kl = losses.logit_terms(HALF, [QUARTER], torch.tensor([0]), LogitObjective(w_ce=0.3, w_kl=0.7, temperature=2.0))
    expected = LN2 + (math.sqrt(3) * LN3 / 2) / (1 + math.sqrt(3)) - math.log(1 + math.sqrt(3))
    assert (ce.item(), kl.item()) == (pytest.approx(LN2), pytest.approx(expected))
    assert loss.item() == pytest.approx(0.3 * LN2 + 0.7 * 4 * expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_targets_cost_nothing_and_change_no_other_token(smoothing):
    student, teacher, targets = (values[0] for values in random_case(9))
    objective = LogitObjective(w_kl=1.0, label_smoothing=smoothing)
    ignored = targets.clone()
    ignored[2] = losses.IGNORED
    for with_it, without in zip(losses.logit_terms(student, [teacher], targets, objective),
                                losses.logit_terms(student, [teacher], ignored, objective), strict=True):
        assert without[2] == 0 and with_it[2] > 0
        assert torch.equal(without[[0, 1, 3, 4]], with_it[[0, 1, 3, 4]])


@pytest.mark.parametrize("settings", [
    {}, {"divergence": "reverse_kl"}, {"divergence": "jsd", "jsd_beta": 0.2}, {"top_k": 3}, {"top_p": 0.7}, {"combine": "probabilities"},
], ids=str)
def test_gradients_of_the_logit_terms_agree_with_finite_differences(settings):
    student, first, targets = (values[0] for values in random_case(10))
    second = random_case(11)[0][0]
    objective = LogitObjective(w_ce=0.4, w_kl=0.6, temperature=2.0, label_smoothing=0.1, **settings)
    assert torch.autograd.gradcheck(lambda z: losses.logit_terms(z, [first, second], targets, objective, [0.3, 0.7]),
                                    student.requires_grad_())


# ---- Hidden states --------------------------------------------------------------------------------------------------


def test_state_distances_by_hand():
    student, teacher = torch.tensor([[[1.0, 3.0], [1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [2.0, 2.0]]])
    assert torch.allclose(losses.state_distance(student, teacher, "mse"), torch.tensor([[(1 + 4) / 2, (1 + 4) / 2]]))
    cosine = torch.tensor([[1 - 3 / math.sqrt(10), 1 - 1 / math.sqrt(2)]])
    assert torch.allclose(losses.state_distance(student, teacher, "cosine"), cosine)


def test_normalised_distance_by_hand():
    """(1, 3) becomes (-1, 1), (9, 5) becomes (1, -1): each difference is 2."""
    distance = losses.state_distance(torch.tensor([1.0, 3.0]), torch.tensor([9.0, 5.0]), "mse", normalise=True)
    assert distance.item() == pytest.approx(4, abs=1e-4)


def test_normalising_removes_scale_and_shift_of_a_state():
    student, teacher = random_case(12)[:2]
    plain, moved = (losses.state_distance(student, states, normalise=True) for states in (teacher, 50 * teacher + 3))
    assert torch.allclose(plain, moved, atol=1e-3)
    assert not torch.allclose(losses.state_distance(student, teacher), losses.state_distance(student, 50 * teacher + 3), atol=1)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_gradients_of_state_distances_agree_with_finite_differences(kind, normalise):
    student, teacher = (values.requires_grad_() for values in random_case(13)[:2])
    assert torch.autograd.gradcheck(lambda s, t: losses.state_distance(s, t, kind, normalise), (student, teacher))


def test_half_precision_states_are_upcast_first():
    student, teacher = (values.bfloat16() for values in random_case(14)[:2])
    for kind in ("mse", "cosine"):
        assert torch.equal(losses.state_distance(student, teacher, kind), losses.state_distance(student.float(), teacher.float(), kind))


def test_an_unknown_state_distance_is_an_error():
    with pytest.raises(ValueError, match="mse or cosine"):
        losses.state_distance(HALF, HALF, "l1")


# ---- InfoNCE --------------------------------------------------------------------------------------------------------


def test_info_nce_of_states_that_tell_nothing_apart_is_log_T():
    value = losses.info_nce(torch.randn(2, 7, 4), torch.ones(2, 7, 4), 0.1)
    assert value.shape == (2, 7)
    assert torch.allclose(value, torch.tensor(math.log(7)), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_info_nce_by_hand(temperature):
    """Orthogonal states, the student's of any length: cosine 1 with their own, 0 with the 2 others; and the wrong way round."""
    student, teacher = 7 * torch.eye(3)[None], torch.eye(3)[None]
    right, wrong = losses.info_nce(student, teacher, temperature), losses.info_nce(student, teacher[:, [1, 2, 0]], temperature)
    total = math.exp(1 / temperature) + 2
    assert torch.allclose(right, torch.tensor(math.log(total) - 1 / temperature), atol=1e-5)
    assert torch.allclose(wrong, torch.tensor(math.log(total)), atol=1e-5)


def test_the_candidates_of_info_nce_are_teacher_states_not_student_states():
    """s_1 is like both teacher states, s_2 like its own alone: the sum runs over teacher positions j for a fixed i."""
    student = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])
    value = losses.info_nce(student, torch.eye(2)[None], 1.0)
    assert torch.allclose(value, torch.tensor([[LN2, math.log(1 + math.e) - 1]]))


def test_negatives_of_info_nce_are_those_of_the_own_sequence():
    student, teacher, _ = random_case(15, batch=3)
    whole = losses.info_nce(student, teacher, 0.5)
    for number in range(3):
        alone = losses.info_nce(student[number:number + 1], teacher[number:number + 1], 0.5)
        assert torch.allclose(whole[number], alone[0], atol=1e-12)


def test_gradients_of_info_nce_agree_with_finite_differences():
    student, teacher = (values.requires_grad_() for values in random_case(16)[:2])
    assert torch.autograd.gradcheck(lambda s, t: losses.info_nce(s, t, 0.5), (student, teacher))


def test_info_nce_is_computed_in_full_precision_under_autocast():
    """A cosine in bf16 is off by 1/500, which a temperature of 0.1 makes 0.02 nats."""
    student, teacher = (values.float() for values in random_case(17, length=16)[:2])
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.info_nce(student, teacher, 0.1)
    assert torch.allclose(value, losses.info_nce(student, teacher, 0.1), atol=1e-4)


# ---- Several teachers as one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_the_joint_head_gives_the_weighted_mean_of_the_teachers_logits(biases):
    generator = torch.Generator().manual_seed(18)
    states = [torch.randn(3, 4, width, generator=generator, dtype=torch.float64) for width in (2, 5)]
    heads = [Head(torch.randn(6, width, generator=generator, dtype=torch.float64),
                  torch.randn(6, generator=generator, dtype=torch.float64) if bias else None)
             for width, bias in zip((2, 5), biases, strict=True)]
    joint_states, joint = losses.joint_states(states, [0.25, 0.75]), losses.joint_head(heads, [0.25, 0.75])
    first, second = (F.linear(theirs, *head) for theirs, head in zip(states, heads, strict=True))
    assert torch.allclose(F.linear(joint_states, *joint), 0.25 * first + 0.75 * second)
