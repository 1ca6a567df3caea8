"""A MoE-P student in the Distiller: the load-balancing loss by hand, and every other term on states of two widths."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from babylm import models
from babylm.config import DistillationSection, MoEPDistillationSection
from babylm.distillation import Distiller, Teacher, state_key, trainable_parameters
from babylm.schema import UserError
from modeling_moep import MoEPConfig, MoEPForCausalLM

VOCABULARY, LENGTH = 40, 7
IDS = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))
ROUTERS = ["shrink", "layer1", "layer2", "grow"]
SHAPE = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 4, "parallel_hidden_size": 6,
         "parallel_attention_heads": 2, "parallel_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}


# ---- Tiny models, and a Distiller of them ---------------------------------------------------------------------------


def moep(seed=0, **changes):
    torch.manual_seed(seed)
    return MoEPForCausalLM(MoEPConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "initializer_range": 0.3, **SHAPE,
                                         **changes}))


def gpt2(seed=1):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=12, n_layer=4, n_head=2, resid_pdrop=0,
                                      embd_pdrop=0, attn_pdrop=0, initializer_range=0.3, bos_token_id=0, eos_token_id=0))


def llama(seed=2):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, pad_token_id=None,
                                        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3))


def build(dtype=torch.float64, student=None, entries=1, teachers=None, **settings):
    """A Distiller of a MoE-P student and of `entries` teachers (a number, or the keys of each), in eval mode; CE and KL off by default."""
    entries = [{}] * entries if isinstance(entries, int) else entries
    section = MoEPDistillationSection(teachers=[{"path": f"teacher-{n}", **entry} for n, entry in enumerate(entries)],
                                      **{"w_ce": 0, "w_kl": 0, "balance": {"weight": 0}, **settings})
    held = [Teacher.from_model(model.to(dtype), entry)
            for model, entry in zip(teachers or [gpt2(), llama()], section.teachers, strict=False)]
    torch.manual_seed(5)  # projections and classifiers
    return Distiller(student or moep(), held, section).to(dtype).eval()


def gradients(distiller, ids=IDS, loss=None, **cached):
    """{name: gradient} of everything that is trained; zeros where there is none."""
    distiller.zero_grad()
    (distiller(ids, **cached)["loss"] if loss is None else loss).backward()
    return {name: parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
            for name, parameter in distiller.named_parameters()}


def difference(first, second):
    """Largest difference between two {name: gradient}, relative to the largest gradient."""
    assert first.keys() == second.keys()
    return float(max((first[name] - second[name]).abs().max() for name in first) / max(value.abs().max() for value in second.values()))


def changed(first, second):
    """Names of the student's parameters whose gradients differ."""
    return {name for name in first if name.startswith("student.") and not torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-9)}


def outputs(model, ids=IDS):
    """(logits, hidden states, router logits or None) of a whole model as transformers runs it."""
    routed = {"output_router_logits": True} if model.config.model_type == "moep" else {}
    output = model(input_ids=ids, output_hidden_states=True, **routed)
    return output.logits[:, :-1], output.hidden_states, output.router_logits if routed else None


def nll(logits, ids=IDS):
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def choices(token, k):
    """The experts that a token chose, from its router logits [E]."""
    return sorted(range(len(token)), key=lambda expert: -token[expert].item())[:k]


def balance_by_hand(routers, k):
    """E * sum_e f_e P_e of every sequence and router, one after the other; their mean. f counts, P has the gradient."""
    values = []
    for logits in routers:
        for sequence in logits:
            chosen = [choices(token, k) for token in sequence]
            experts = range(sequence.shape[1])
            f = [sum(expert in each for each in chosen) / (k * len(sequence)) for expert in experts]
            p = [sum(token.exp()[expert] / token.exp().sum() for token in sequence) / len(sequence) for expert in experts]
            values.append(len(experts) * sum(f[expert] * p[expert] for expert in experts))
    return sum(values) / len(values)


# ---- The load-balancing loss in the Distiller -----------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("w_kl, temperature, weight", [(0, 1, 1), (0.6, 2, 0.5), (0.6, 2, 0)])
def test_the_loss_is_ce_and_kl_and_balance_each_times_its_weight(k, w_kl, temperature, weight):
    """Value and gradient of every parameter, with the load-balancing loss computed in plain Python."""
    distiller = build(student=moep(num_experts_per_tok=k), w_ce=0.4, w_kl=w_kl, temperature=temperature, balance={"weight": weight})
    logits, _, routers = outputs(distiller.student)
    taught = (outputs(distiller.teachers[0].model)[0] / temperature).log_softmax(-1)
    kl = (taught.exp() * (taught - (logits / temperature).log_softmax(-1))).sum(-1).mean()
    balance = balance_by_hand(routers, k)
    expected = 0.4 * nll(logits).mean() + w_kl * temperature**2 * kl + weight * balance
    logged = distiller(IDS)
    assert logged["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert difference(gradients(distiller), gradients(distiller, loss=expected)) < 1e-5
    if weight:
        assert logged["balance"].item() == pytest.approx(balance.item(), rel=1e-5)
        assert logged["ce"].item() == pytest.approx(nll(logits).mean().item(), rel=1e-6)


def test_balance_is_of_each_sequence_and_not_of_the_batch():
    """So that the batch here tells the two apart, and accumulation changes nothing: 4 x 1 is 1 x 4."""
    distiller = build(w_ce=0.1, w_kl=0.1, balance={"weight": 1})
    routers = outputs(distiller.student)[2]
    whole_batch = balance_by_hand([logits.flatten(0, 1)[None] for logits in routers], 2).item()
    assert abs(distiller(IDS)["balance"].item() - whole_batch) > 1e-2
    alone = [gradients(distiller, IDS[number:number + 1]) for number in range(4)]
    assert difference(gradients(distiller), {name: sum(each[name] for each in alone) / 4 for name in alone[0]}) < 1e-5
    assert difference(alone[0], alone[1]) > 0.01  # the sequences do differ


def test_balance_changes_the_gradient_of_every_router_and_neither_ce_nor_kl():
    plain, balanced = (build(w_ce=0.4, w_kl=0.6, balance={"weight": weight}) for weight in (0, 0.5))
    touched = changed(gradients(balanced), gradients(plain))
    assert touched >= {name for name, _ in balanced.named_parameters() if "router" in name} and len(ROUTERS) == sum(
        "router" in name for name in touched)
    for both in ((plain(IDS), balanced(IDS)), (plain.token_terms(IDS), balanced.token_terms(IDS))):
        for name in ("ce", "kl", "teacher1_ce"):
            assert torch.equal(both[0][name], both[1][name])


def test_a_balance_of_weight_0_leaves_the_loss_alone_and_validation_still_reports_the_routers():
    off = build(w_ce=1, w_kl=1, balance={"weight": 0})
    stage4 = Distiller(off.student, off.teachers, DistillationSection(teacher="t", w_ce=1, w_kl=1)).eval()  # knows no balance at all
    for distiller in (off, stage4):
        logged = distiller(IDS)
        assert set(logged) == {"loss", "ce", "kl", "teacher1_ce"}
        assert logged["loss"].item() == pytest.approx((logged["ce"] + logged["kl"]).item())
        assert sorted(distiller.token_terms(IDS)) == sorted(distiller.columns()) and "load/grow/2" in distiller.columns()
        assert "balance" not in distiller.describe(LENGTH)


def test_in_training_only_balance_and_entropy_are_made():
    distiller = build(w_ce=1, entries=0, balance={"weight": 0.1}).train()
    assert set(distiller(IDS)) == {"loss", "ce", "balance", "router_entropy"}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_validation_reports_balance_entropy_and_shares_of_each_router_by_hand(k):
    distiller = build(student=moep(num_experts_per_tok=k), entries=0, w_ce=1)
    with torch.no_grad():
        columns, (_, _, routers) = distiller.token_terms(IDS), outputs(distiller.student)
    assert {values.shape for values in columns.values()} == {(4, LENGTH - 1)} and sorted(columns) == sorted(distiller.columns())
    entropies = []
    for name, logits in zip(ROUTERS, routers, strict=True):
        p = logits[:, :-1].softmax(-1)
        entropies.append(-(p * p.log()).sum(-1))
        assert torch.allclose(columns[f"entropy/{name}"].float(), entropies[-1].float(), atol=1e-6)
        for expert in range(3):
            share = [[(expert in choices(token, k)) / k for token in sequence[:-1]] for sequence in logits]
            assert columns[f"load/{name}/{expert}"].tolist() == pytest.approx(np.array(share), abs=1e-6)
    assert torch.allclose(columns["router_entropy"].float(), sum(entropies).float() / 4, atol=1e-6)
    assert columns["router_dropped"].abs().max() < 1e-6
    for number, value in enumerate(columns["balance"]):
        mine = balance_by_hand([logits[number:number + 1] for logits in routers], k)
        assert value.tolist() == pytest.approx([mine.item()] * (LENGTH - 1), rel=1e-5)


@pytest.mark.parametrize("progress, weight", [(0, 1), (0.25, 0.5), (0.5, 0), (1, 0)])
def test_the_weight_of_balance_may_follow_a_schedule(progress, weight):
    distiller = build(w_ce=0.2, balance={"weight": {"start": 1, "end": 0, "until": 0.5}})
    distiller.progress = progress
    reference = build(w_ce=0.2, balance={"weight": weight})
    assert difference(gradients(distiller), gradients(reference)) < 1e-10 and distiller.scheduled() == {"w_balance": weight}
    assert ("balance" in distiller(IDS)) == (weight > 0) and "+ (1 -> 0) balance" in distiller.describe(LENGTH)


# ---- Every other term on states of two widths: 8 at states 0, 1 and 4; 6 at states 2 and 3 --------------------------

AUX = {"blocks": [1, 2, 3], "weight": 0.5, "dropout": 0.0, "feature_weight": 0.3}
TERMS = {
    "hidden last": {"hidden": {"weight": 1}},
    "hidden narrow": {"hidden": {"weight": 1}, "entries": [{"layers": {1: 2, 2: 3}}]},
    "hidden wide": {"hidden": {"weight": 1, "loss": "cosine"}, "entries": [{"layers": {0: 0, 1: 1, 4: 4}}]},
    "hidden of two": {"hidden": {"weight": 1, "normalise": True}, "entries": [{"layers": {0: 1, 3: 3}}, {"layers": {1: 2, 2: 4}}]},
    "own heads": {"auxiliary": AUX},
    "shared head": {"auxiliary": {**AUX, "share_head": True, "weighting": "adaptive"}},
    "classifiers of two": {"auxiliary": {**AUX, "blocks": [2]}, "entries": 2},
    "contrastive": {"contrastive": {"weight": 1, "dim": 6}},
    "contrastive of two": {"contrastive": {"weight": 1, "dim": 6}, "entries": 2},
    "two teachers": {"w_kl": 1, "entries": [{"weight": 1}, {"weight": 3}]},
    "two teachers' probabilities": {"w_kl": 1, "entries": 2, "combine": "probabilities"},
}
each_term = pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)


@each_term
def test_each_term_changes_the_students_gradients_and_trains_its_own_modules(settings):
    base = {"w_ce": 0.5, "balance": {"weight": 0.1}}
    distiller, plain = build(**base, **settings), build(**base)
    ours, without = gradients(distiller), gradients(plain)
    first = {name for name in without if ".first." in name or "shrink.experts" in name}
    narrow = {name for name in without if ".layers.0." in name}
    assert first and narrow and changed({name: ours[name] for name in without}, without) >= first | narrow
    own = {name for name in ours if name.startswith("terms.")}
    assert bool(own) == ("w_kl" not in settings) and all(ours[name].abs().max() > 1e-6 for name in own)
    assert {name for name, _ in trainable_parameters(distiller)} == ours.keys() == {name for name, _ in distiller.named_parameters()}
    assert sorted(distiller.token_terms(IDS)) == sorted(distiller.columns())


@each_term
def test_the_gradient_of_four_sequences_is_the_mean_of_theirs_with_each_term(settings):
    distiller = build(**{"w_ce": 0.1, "balance": {"weight": 0.5}, **settings})
    alone = [gradients(distiller, IDS[number:number + 1]) for number in range(4)]
    assert difference(gradients(distiller), {name: sum(each[name] for each in alone) / 4 for name in alone[0]}) < 1e-5


def test_narrow_and_wide_states_are_projected_up_to_the_teachers_width():
    distiller = build(hidden={"weight": 1}, entries=[{"layers": {0: 1, 2: 2, 4: 4}}])
    projections = distiller.terms["hidden"].projections[0]
    assert [(layer.in_features, layer.out_features) for layer in projections] == [(8, 12), (6, 12), (8, 12)]
    ours, theirs = outputs(distiller.student)[1], outputs(distiller.teachers[0].model)[1]
    value = sum((layer(ours[mine]) - theirs[given])[:, :-1].square().mean()
                for layer, (given, mine) in zip(projections, {0: 1, 2: 2, 4: 4}.items(), strict=True)) / 3
    assert distiller(IDS)["hidden"].item() == pytest.approx(value.item())


@pytest.mark.parametrize("share_head, narrow, wide", [(False, (6, 6), (8, 8)), (True, (6, 8), (8, 8))])
def test_a_classifier_reads_the_width_of_its_block_and_a_shared_head_gets_what_it_expects(share_head, narrow, wide):
    distiller = build(w_ce=1, auxiliary={**AUX, "blocks": [1, 2], "feature_weight": 0, "share_head": share_head})
    term, ours = distiller.terms["auxiliary"], outputs(distiller.student)[1]
    assert [(layer[0].in_features, layer[0].out_features) for layer in term.features.values()] == [wide, narrow]
    for block in (1, 2):
        head = distiller.student.lm_head if share_head else term.heads[str(block)]
        ce = nll(head(F.gelu(term.features[str(block)][0](ours[block])))[:, :-1]).mean()
        assert distiller(IDS)[f"aux{block}_ce"].item() == pytest.approx(ce.item(), rel=1e-6)


@pytest.mark.parametrize("entries", [[{"layers": {0: 0, 2: 2, 4: 4}}], [{"layers": {1: 3}}, {}]], ids=["one", "two"])
def test_cached_teacher_states_give_a_moep_student_the_very_same_loss(entries):
    online = build(torch.float32, entries=entries, w_ce=0.3, w_kl=0.7, temperature=2, hidden={"weight": 0.2}, auxiliary=AUX,
                   contrastive={"weight": 0.1, "dim": 6}, balance={"weight": 0.1})
    states = {state_key(number, state): values for number, teacher in enumerate(online.teachers)
              for state, values in teacher.states(IDS, Teacher.wanted_states(online.section, teacher.entry, teacher.depth)).items()}
    heads = [Teacher(teacher.head, teacher.depth, teacher.width, entry=teacher.entry) for teacher in online.teachers]
    cached = Distiller(copy.deepcopy(online.student), heads, online.section).eval()
    cached.load_state_dict(online.state_dict())
    assert torch.equal(cached(IDS, **states)["loss"], online(IDS)["loss"])
    ours, theirs = gradients(cached, **states), gradients(online)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_moep_teacher_teaches_its_logits_and_its_wide_states():
    distiller = build(student=moep(9), teachers=[moep(3)], entries=[{"layers": {0: 2, 1: 3, 4: 4}}], w_kl=1, hidden={"weight": 1})
    taught, logits = outputs(distiller.teachers[0].model)[0].log_softmax(-1), outputs(distiller.student)[0].log_softmax(-1)
    logged = distiller(IDS)
    assert logged["kl"].item() == pytest.approx((taught.exp() * (taught - logits)).sum(-1).mean().item(), rel=1e-6)
    assert logged["hidden"].item() > 0 and not any(parameter.requires_grad for parameter in distiller.teachers[0].model.parameters())


@pytest.mark.parametrize("layers", [{2: 2}, {0: 0, 3: 4}])
def test_narrow_states_of_a_moep_teacher_cannot_be_mapped(layers):
    with pytest.raises(UserError, match=r"distillation.teachers: state [23] of teacher-0 is 6 wide: only states as wide as .*\(8\)"):
        build(teachers=[moep(3)], entries=[{"layers": layers}], hidden={"weight": 1})


# ---- What a forward pass costs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, products", [  # multiply-adds per token at T = 7, with E = 3
    ({}, 2 * 624 + 2 * (3 * 156 + 2 * 216) + 2 * 2 * 48 + 320),  # wide block 8*24 + 2*7*8 + 8*8 + 2*8*16, head 8*40; narrow block:
    ({"num_experts_per_tok": 1}, 2 * 624 + 2 * (3 * 156 + 216) + 2 * 48 + 320),  # 6*12 + 2*7*6 in all experts, 6*12 + 2*6*12 if chosen
    ({"num_experts_per_tok": 3}, 2 * 624 + 2 * (3 * 156 + 3 * 216) + 2 * 3 * 48 + 320),
    ({"hidden_act": "swiglu"}, 2 * (624 + 128) + 2 * (3 * 156 + 2 * 288) + 2 * 2 * 48 + 320),  # one matrix more of 8*16 and of 6*12
])
def test_the_cost_of_a_forward_pass_by_hand(changes, products):
    assert models.forward_flops_per_token(moep(**changes), LENGTH) == 2 * products
