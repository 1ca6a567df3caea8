"""The Distiller: every term against a computation by hand, its gradients, its schedules, and what it costs when it is off."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from babylm import losses
from babylm.config import DistillationSection, TeacherEntry
from babylm.distillation import Distiller, Teacher, state_key, trainable_parameters
from babylm.schema import Schedule, UserError

VOCABULARY, LENGTH = 40, 7
IDS = torch.randint(VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(0))


# ---- Tiny models, and a Distiller of them ---------------------------------------------------------------------------


def gpt2(seed=0, width=8, layers=3, dropout=0.0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=layers, n_head=2,
                                      resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.3,
                                      bos_token_id=0, eos_token_id=0))


def llama(seed=0, width=8, layers=3, kind=(LlamaConfig, LlamaForCausalLM), **settings):
    torch.manual_seed(seed)
    return kind[1](kind[0](vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                           num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3, pad_token_id=None, **settings))


def gptj(seed=0, width=8, layers=3):
    torch.manual_seed(seed)
    return GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=layers, n_head=2, rotary_dim=4,
                                      resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.3, bos_token_id=0, eos_token_id=0))


def section(entries=1, **settings):
    """A DistillationSection; `entries`: number of teachers, or the keys of each."""
    entries = [{}] * entries if isinstance(entries, int) else entries
    return DistillationSection(teachers=[{"path": f"teacher-{n}", **entry} for n, entry in enumerate(entries)],
                               **{"w_ce": 0, "w_kl": 0, **settings})


def build(settings, student=None, teachers=None, dtype=torch.float64):
    """A Distiller of GPT-2s in float64 (whose norms, unlike Llama's, do not pass through float32), in eval mode."""
    chosen = section(**settings)
    if teachers is None:
        teachers = [gpt2(1, width=12, layers=4), llama(2, width=16, layers=2)][:len(chosen.teachers)]
    held = [Teacher.from_model(model.to(dtype), entry) for model, entry in zip(teachers, chosen.teachers, strict=True)]
    torch.manual_seed(5)  # projections and classifiers
    return Distiller(student or gpt2(), held, chosen).to(dtype).eval()


def gradients(distiller, ids=IDS, **cached):
    """{name: gradient} of everything that is trained; zeros where there is none."""
    distiller.zero_grad()
    distiller(ids, **cached)["loss"].backward()
    return {name: parameter.grad.clone() if parameter.grad is not None else torch.zeros_like(parameter)
            for name, parameter in distiller.named_parameters()}


def difference(first, second):
    """Largest difference between two {name: gradient}, relative to the largest gradient."""
    assert first.keys() == second.keys()
    return float(max((first[name] - second[name]).abs().max() for name in first) / max(value.abs().max() for value in second.values()))


def counted(module, calls):
    """Append `module` to `calls` whenever it runs."""
    module.register_forward_hook(lambda *_: calls.append(module))
    return module


AUX = {"blocks": [1, 2], "weight": 0.5, "dropout": 0.0}
TERMS = {
    "ce": {"w_ce": 1},
    "smoothed ce": {"w_ce": 1, "label_smoothing": 0.1},
    "forward KL": {"w_kl": 1, "temperature": 2},
    "reverse KL": {"w_kl": 1, "temperature": 2, "divergence": "reverse_kl"},
    "JSD": {"w_kl": 1, "divergence": "jsd", "jsd_beta": 0.3},
    "top-k": {"w_kl": 1, "approximate_top_k": 5},
    "top-p": {"w_kl": 1, "approximate_top_p": 0.8},
    "two teachers": {"w_kl": 1, "entries": [{"weight": 1}, {"weight": 3}]},
    "probabilities": {"w_kl": 1, "entries": 2, "combine": "probabilities"},
    "batchmean": {"w_ce": 1, "w_kl": 1, "kl_reduction": "batchmean"},
    "hidden": {"hidden": {"weight": 1}},
    "hidden cosine": {"hidden": {"weight": 1, "loss": "cosine"}},
    "hidden normalised": {"hidden": {"weight": 1, "normalise": True}},
    "hidden map": {"hidden": {"weight": 1}, "entries": [{"layers": {0: 0, 2: 1, 4: 3}}]},
    "hidden of two": {"hidden": {"weight": 1}, "entries": [{"layers": {1: 1, 3: 2}, "weight": 3}, {}]},
    "contrastive": {"contrastive": {"weight": 1, "dim": 6}},
    "contrastive of two": {"contrastive": {"weight": 1, "dim": 6}, "entries": 2},
    "auxiliary": {"w_ce": 0.4, "w_kl": 0.6, "auxiliary": AUX},
    "auxiliary shared head": {"w_ce": 0.4, "w_kl": 0.6, "auxiliary": {**AUX, "share_head": True}},
    "auxiliary adaptive": {"w_ce": 0.4, "w_kl": 0.6, "temperature": 2, "auxiliary": {**AUX, "weighting": "adaptive"}},
    "auxiliary features": {"w_ce": 1, "entries": 2, "auxiliary": {**AUX, "feature_weight": 0.7}},
}
each_term = pytest.mark.parametrize("settings", TERMS.values(), ids=TERMS)
HIDDEN = {name: settings for name, settings in TERMS.items() if "hidden" in settings}
AUXILIARY = {name: settings for name, settings in TERMS.items() if "auxiliary" in settings}
MODULES = {name: settings for name, settings in TERMS.items() if {"hidden", "contrastive", "auxiliary"} & settings.keys()}


# ---- The value of every term ----------------------------------------------------------------------------------------


def outputs(model):
    """(logits, hidden states) at the predicted positions, of a whole model as transformers runs it."""
    output = model(input_ids=IDS, output_hidden_states=True)
    return output.logits[:, :-1], [states[:, :-1] for states in output.hidden_states]


def nll(logits):
    return -logits.log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)


def soft_kl(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def assert_equals_by_hand(distiller, expected):
    """The loss, and the gradient of every parameter with respect to it."""
    parameters = dict(distiller.named_parameters())
    by_hand = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    assert distiller(IDS)["loss"].item() == pytest.approx(expected.item(), rel=1e-9)
    by_hand = {name: torch.zeros_like(value) if grad is None else grad
               for (name, value), grad in zip(parameters.items(), by_hand, strict=True)}
    assert difference(gradients(distiller), by_hand) < 1e-7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_by_hand_and_the_logged_one_is_not_smoothed(smoothing):
    distiller = build({"w_ce": 0.7, "label_smoothing": smoothing})
    logits, _ = outputs(distiller.student)
    uniform = -logits.log_softmax(-1).mean(-1)
    assert_equals_by_hand(distiller, 0.7 * ((1 - smoothing) * nll(logits) + smoothing * uniform).mean())
    assert distiller(IDS)["ce"].item() == pytest.approx(nll(logits).mean().item())


@pytest.mark.parametrize("divergence, formula", [
    ({}, soft_kl),
    ({"divergence": "reverse_kl"}, lambda p, q: soft_kl(q, p)),
    ({"divergence": "jsd"}, lambda p, q: soft_kl(p, (p + q) / 2) / 2 + soft_kl(q, (p + q) / 2) / 2),
    ({"divergence": "jsd", "jsd_beta": 0.2}, lambda p, q: 0.2 * soft_kl(p, 0.2 * p + 0.8 * q) + 0.8 * soft_kl(q, 0.2 * p + 0.8 * q)),
])
@pytest.mark.parametrize("temperature", [1, 2, 3])
def test_divergences_by_hand(divergence, formula, temperature):
    distiller = build({"w_ce": 0.3, "w_kl": 0.7, "temperature": temperature, **divergence})
    logits, (taught, _) = outputs(distiller.student)[0], outputs(distiller.teachers[0].model)
    kl = formula((taught / temperature).softmax(-1), (logits / temperature).softmax(-1)).mean()
    assert_equals_by_hand(distiller, 0.3 * nll(logits).mean() + 0.7 * temperature**2 * kl)
    assert distiller(IDS)["kl"].item() == pytest.approx(kl.item())


def test_batchmean_multiplies_kl_by_the_predictions_per_sequence_and_not_the_logged_kl():
    """The logged KL stays a mean over tokens, so that curves of all recipes can be compared."""
    mean, batchmean = (build({"w_kl": 1, "kl_reduction": reduction}) for reduction in ("token_mean", "batchmean"))
    assert batchmean(IDS)["kl"].item() == mean(IDS)["kl"].item()
    assert batchmean(IDS)["loss"].item() == pytest.approx((LENGTH - 1) * mean(IDS)["loss"].item())
    expected = {name: (LENGTH - 1) * value for name, value in gradients(mean).items()}
    assert difference(gradients(batchmean), expected) < 1e-10


def state_distance(kind, ours, theirs):
    if kind.get("normalise"):
        ours, theirs = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for x in (ours, theirs))
    if kind.get("loss") == "cosine":
        return 1 - (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
    return (ours - theirs).square().mean(-1)


@pytest.mark.parametrize("settings", HIDDEN.values(), ids=HIDDEN)
def test_hidden_term_by_hand(settings):
    distiller = build(settings)
    ours, shares = outputs(distiller.student)[1], {1: [1], 2: [3 / 4, 1 / 4]}[len(distiller.teachers)]
    value = 0
    for number, (teacher, share) in enumerate(zip(distiller.teachers, shares, strict=True)):
        theirs, pairs = outputs(teacher.model)[1], teacher.entry.layers or {teacher.depth: 3}
        for place, (source, target) in enumerate(pairs.items()):
            projected = distiller.terms["hidden"].projections[number][place](ours[target])
            value = value + share / len(pairs) * state_distance(settings["hidden"], projected, theirs[source]).mean()
    assert_equals_by_hand(distiller, value)
    assert distiller(IDS)["hidden"].item() == pytest.approx(value.item())


@pytest.mark.parametrize("entries, shares", [(1, [1]), ([{"weight": 1}, {"weight": 4}], [0.2, 0.8])])
def test_contrastive_term_by_hand(entries, shares):
    """Position by position: which of the sequence's teacher states belongs to this student state?"""
    distiller = build({"entries": entries, "contrastive": {"weight": 0.3, "dim": 6, "temperature": 0.5}})
    term, values = distiller.terms["contrastive"], []
    ours = term.student_projection(outputs(distiller.student)[1][-1])
    for share, teacher, project in zip(shares, distiller.teachers, term.teacher_projections, strict=True):
        theirs = project(outputs(teacher.model)[1][-1])
        for sequence in range(4):
            for i in range(LENGTH - 1):
                scores = torch.stack([F.cosine_similarity(ours[sequence, i], theirs[sequence, j], dim=0) / 0.5 for j in range(LENGTH - 1)])
                values.append(share * (scores.exp().sum().log() - scores[i]))
    expected = torch.stack(values).sum() / (4 * (LENGTH - 1))
    assert_equals_by_hand(distiller, 0.3 * expected)
    assert distiller(IDS)["contrastive"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("weighting", ["fixed", "adaptive"])
@pytest.mark.parametrize("share_head", [False, True])
@pytest.mark.parametrize("feature_weight", [0, 0.7])
def test_auxiliary_term_by_hand(weighting, share_head, feature_weight):
    """Two classifiers; adaptive weights are their shares in a sequence's loss, without a gradient of their own."""
    distiller = build({"w_ce": 0.4, "w_kl": 0.6, "temperature": 2, "auxiliary": {
        **AUX, "weighting": weighting, "share_head": share_head, "feature_weight": feature_weight}})
    term, student = distiller.terms["auxiliary"], distiller.student
    logits, ours = outputs(student)
    taught, theirs = outputs(distiller.teachers[0].model)
    per_token, figures = [], {}

    def objective(values):
        ce, kl = nll(values), soft_kl((taught / 2).softmax(-1), (values / 2).softmax(-1))
        return 0.4 * ce + 0.6 * 4 * kl, ce, kl

    for block in ("1", "2"):
        first, last = term.features[block][0], student.lm_head if share_head else term.heads[block]
        loss, figures[f"aux{block}_ce"], figures[f"aux{block}_kl"] = objective(last(F.gelu(first(ours[int(block)]))))
        per_token.append(loss)
    sequences = torch.stack([loss.mean(1) for loss in per_token])
    weights = sequences.detach() / sequences.detach().sum(0) if weighting == "adaptive" else torch.full_like(sequences, 1 / 2)
    expected = objective(logits)[0].mean() + 0.5 * (weights * sequences).sum(0).mean()
    if feature_weight:
        distances = [(term.projections[block][0](ours[int(block)]) - theirs[-1]).square().mean(-1) for block in ("1", "2")]
        figures["aux_features"] = sum(distances) / 2
        expected = expected + 0.5 * 0.7 * figures["aux_features"].mean()
    assert_equals_by_hand(distiller, expected)
    logged = distiller(IDS)
    assert {name: logged[name].item() for name in figures} == pytest.approx({name: value.mean().item() for name, value in figures.items()})
    assert len(term.heads) == (0 if share_head else 2)


def test_auxiliary_classifiers_without_a_teacher_learn_from_the_text_alone():
    distiller = build({"entries": 0, "w_ce": 1, "auxiliary": AUX})
    assert set(distiller(IDS)) == {"loss", "ce", "aux1_ce", "aux2_ce"}
    logged = distiller(IDS)
    assert logged["loss"].item() == pytest.approx((logged["ce"] + 0.5 * (logged["aux1_ce"] + logged["aux2_ce"]) / 2).item())


def test_dropout_of_the_classifiers_acts_in_training_alone():
    distiller = build({"w_ce": 1, "auxiliary": {**AUX, "dropout": 0.5}})
    assert distiller(IDS)["aux1_ce"].item() == distiller(IDS)["aux1_ce"].item()
    distiller.train()
    assert distiller(IDS)["aux1_ce"].item() != distiller(IDS)["aux1_ce"].item()


# ---- Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", MODULES.values(), ids=MODULES)
def test_each_module_changes_the_students_gradients_and_has_gradients_of_its_own(settings):
    """A published study computed such terms without gradients, or kept their parameters from the optimizer."""
    bare = {name: value for name, value in settings.items() if name not in ("hidden", "contrastive", "auxiliary")}
    bare["entries"] = [{}] * len(build(settings).teachers)
    without = gradients(build({**bare, "w_ce": 1}))
    settings = {"w_ce": 1, **settings}
    distiller = build({**settings, "w_ce": 1})
    ours = gradients(distiller)
    own = {name for name in ours if name.startswith("terms.")}
    assert own and all(ours[name].abs().max() > 1e-6 for name in own)
    first_block = [name for name in without if ".h.0." in name and "c_attn.bias" not in name]
    touched = {name for name in without if not torch.allclose(ours[name], without[name], rtol=1e-3, atol=1e-9)}
    assert first_block and touched.issuperset(first_block)
    assert own <= {name for name, _ in trainable_parameters(distiller)}


@each_term
def test_each_term_alone_trains_the_student_from_its_first_block_on(settings):
    ours = gradients(build(settings))
    assert [name for name, value in ours.items() if ".h.0." in name and value.abs().max() < 1e-6] == []
    assert ours["student.transformer.wte.weight"].abs().max() > 1e-6


@each_term
def test_gradients_of_the_whole_loss_agree_with_finite_differences(settings):
    distiller = build(settings)
    if distiller.section.auxiliary and distiller.section.auxiliary.weighting == "adaptive":  # its weights are constants to the gradient
        term, kept = distiller.terms["auxiliary"], {}
        compute = term._weights
        term._weights = lambda *arguments: kept.setdefault("weights", compute(*arguments))
    ours, parameters = gradients(distiller), dict(distiller.named_parameters())
    generator = torch.Generator().manual_seed(3)
    names = ["student.transformer.wte.weight", "student.transformer.h.0.mlp.c_fc.weight", "student.transformer.h.1.attn.c_attn.weight",
             *(name for name in parameters if name.startswith("terms."))]
    for name in names:
        flat, entry = parameters[name].data.view(-1), int(torch.randint(parameters[name].numel(), (), generator=generator))
        values = []
        for step in (1e-5, -1e-5):
            flat[entry] += step
            with torch.no_grad():
                values.append(distiller(IDS)["loss"].item())
            flat[entry] -= step
        measured = (values[0] - values[1]) / 2e-5
        assert ours[name].view(-1)[entry].item() == pytest.approx(measured, rel=1e-4, abs=1e-7), name


@each_term
def test_the_gradient_of_four_sequences_is_the_mean_of_theirs(settings):
    """So that accumulation cannot change any term."""
    distiller = build(settings)
    alone = [gradients(distiller, IDS[number:number + 1]) for number in range(4)]
    mean = {name: sum(each[name] for each in alone) / 4 for name in alone[0]}
    assert difference(gradients(distiller), mean) < 1e-10
    assert difference(alone[0], mean) > 0.01  # the sequences do differ


@each_term
def test_the_gradient_of_four_sequences_is_the_mean_of_theirs_in_a_llama_in_float32(settings):
    distiller = build(settings, llama(), dtype=torch.float32)
    alone = [gradients(distiller, IDS[number:number + 1]) for number in range(4)]
    assert difference(gradients(distiller), {name: sum(each[name] for each in alone) / 4 for name in alone[0]}) < 2e-5


def test_the_gradient_of_the_sum_is_the_weighted_sum_of_the_gradients():
    parts = {"ce": {"w_ce": 1}, "kl": {"w_kl": 1, "temperature": 2}, "hidden": {"hidden": {"weight": 1}}}
    ce, kl, hidden = ({name: value for name, value in gradients(build(settings)).items() if name.startswith("student")}
                      for settings in parts.values())
    both = gradients(build({"w_ce": 0.25, "w_kl": 0.75, "temperature": 2, "hidden": {"weight": 0.1}}))
    expected = {name: 0.25 * ce[name] + 0.75 * kl[name] + 0.1 * hidden[name] for name in ce}
    assert difference({name: both[name] for name in ce}, expected) < 1e-10


# ---- Columns --------------------------------------------------------------------------------------------------------

EVERYTHING = {"w_ce": 0.4, "w_kl": 0.6, "temperature": 2, "hidden": {"weight": 0.1}, "contrastive": {"weight": 0.1, "dim": 6},
              "auxiliary": {**AUX, "feature_weight": 0.7}}


@pytest.mark.parametrize("settings", [*TERMS.values(), EVERYTHING, {**EVERYTHING, "entries": 2}, {"entries": 0, "w_ce": 1},
                                      {"entries": 0, "w_ce": 1, "auxiliary": AUX}],
                         ids=[*TERMS, "all", "all of two", "baseline", "auxiliary without teacher"])
def test_columns_name_exactly_what_validation_reports_at_every_position(settings):
    distiller = build(settings)
    with torch.no_grad():
        terms = distiller.token_terms(IDS)
    assert sorted(terms) == sorted(distiller.columns())
    assert {values.shape for values in terms.values()} == {(4, LENGTH - 1)}
    assert not any(values.requires_grad for values in terms.values())
    assert all(torch.isfinite(values).all() for values in terms.values())


@pytest.mark.parametrize("settings", [*TERMS.values(), {**EVERYTHING, "entries": 2}], ids=[*TERMS, "all"])
def test_the_figures_of_training_are_means_of_the_columns(settings):
    """Of the whole micro-batch, but for each teacher's own, which are those of every fourth token of its first sequence."""
    distiller = build(settings)
    columns, logged = distiller.token_terms(IDS), distiller(IDS)
    assert set(logged) <= {"loss", *columns} and len(logged) > 1
    for name in logged.keys() - {"loss"}:
        rows = columns[name][:1, ::4] if name.startswith("teacher") else columns[name]
        assert logged[name].item() == pytest.approx(rows.mean().item()), name
        assert not logged[name].requires_grad and logged[name].shape == ()


def test_validation_reports_ce_and_kl_also_where_their_weights_are_0():
    distiller = build({"w_ce": 1, "w_kl": 0})
    reference = build({"w_ce": 0.5, "w_kl": 0.5}).token_terms(IDS)
    terms = distiller.token_terms(IDS)
    assert set(terms) == {"ce", "kl", "teacher1_ce"}
    assert all(torch.allclose(terms[name], reference[name]) for name in terms)


# ---- Weight 0 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, keys", [("hidden", {}), ("contrastive", {}), ("auxiliary", {"blocks": [1]})])
def test_a_term_of_weight_0_is_not_built(name, keys):
    distiller = build({"w_ce": 1, "entries": 1, name: {**keys, "weight": 0}})
    assert len(distiller.terms) == 0 and all(part.startswith("student.") for part in distiller.state_dict())
    assert distiller.columns() == build({"w_ce": 1}).columns()
    on = build({"w_ce": 1, name: {**keys, "weight": 0.1}})
    assert list(on.terms) == [name] and any(part.startswith(f"terms.{name}.") for part in on.state_dict())


def test_a_teacher_whose_weight_is_0_is_not_run_in_training_but_is_in_validation():
    distiller, calls = build({"w_ce": 1, "w_kl": 0, "hidden": {"weight": 0}}), []
    counted(distiller.teachers[0].body, calls)
    assert set(distiller(IDS)) == {"loss", "ce"} and calls == []
    assert "kl" in distiller.token_terms(IDS) and len(calls) == 1


def test_classifiers_that_learn_from_the_text_alone_do_not_run_the_teacher():
    distiller, calls = build({"w_ce": 1, "w_kl": 0, "auxiliary": AUX}), []
    counted(distiller.teachers[0].body, calls)
    assert set(distiller(IDS)) == {"loss", "ce", "aux1_ce", "aux2_ce"} and calls == []
    assert sorted(distiller.token_terms(IDS)) == sorted(distiller.columns())


def test_a_teacher_runs_once_per_batch_however_many_terms_read_it():
    distiller, calls = build(EVERYTHING), []
    counted(distiller.teachers[0].body, calls)
    counted(distiller._halves[0], calls)
    distiller(IDS)
    assert calls == [distiller._halves[0], distiller.teachers[0].body]


def test_ce_of_weight_0_is_not_logged_in_training():
    assert set(build({"w_ce": 0, "w_kl": 1})(IDS)) == {"loss", "kl", "teacher1_ce"}


@pytest.mark.parametrize("weighting", ["fixed", "adaptive"])
def test_classifiers_without_an_objective_still_learn_from_features(weighting):
    """w_ce and w_kl are 0 (or are scheduled to end there): the shares in a loss of 0 are not 0 / 0."""
    distiller = build({"hidden": {"weight": 0.1}, "auxiliary": {**AUX, "weighting": weighting, "feature_weight": 1}})
    assert math.isfinite(distiller(IDS)["loss"].item())
    assert all(torch.isfinite(value).all() for value in gradients(distiller).values())


# ---- Schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, values", [
    ({"start": 4, "end": 1}, [4, 2.5, 1]),
    ({"start": 1, "end": 3}, [1, 2, 3]),
    ({"start": 4, "end": 1, "shape": "cosine"}, [4, 2.5, 1]),
    ({"start": 4, "end": 1, "until": 0.5}, [4, 1, 1]),
    ({"start": 4, "end": 1, "shape": "cosine", "until": 0.5}, [4, 1, 1]),
    (2, [2, 2, 2]),
])
def test_schedules_at_the_start_the_middle_and_the_end(settings, values):
    schedule = Schedule.model_validate(settings)
    assert [schedule.at(progress) for progress in (0, 0.5, 1)] == pytest.approx(values)


def test_the_shapes_of_schedules_differ_between_their_ends():
    at = {shape: Schedule(start=4, end=0, shape=shape, until=0.8).at for shape in ("linear", "cosine")}
    assert at["linear"](0.2) == pytest.approx(3)
    assert at["cosine"](0.2) == pytest.approx(2 + 2 * math.cos(math.pi / 4))
    assert at["linear"](0.8) == at["cosine"](0.9) == 0  # exactly: such a term is not computed


@pytest.mark.parametrize("progress, weight, temperature", [(0, 1, 4), (0.25, 0.5, 3.25), (0.5, 0, 2.5), (1, 0, 1)])
def test_scheduled_weights_and_temperature_enter_the_loss(progress, weight, temperature):
    distiller = build({"w_ce": {"start": 1, "end": 0, "until": 0.5}, "w_kl": 1, "temperature": {"start": 4, "end": 1}})
    distiller.progress = progress
    reference = build({"w_ce": weight, "w_kl": 1, "temperature": temperature})
    assert distiller(IDS)["loss"].item() == pytest.approx(reference(IDS)["loss"].item())
    assert difference(gradients(distiller), gradients(reference)) < 1e-10
    assert distiller.scheduled() == pytest.approx({"w_ce": weight, "temperature": temperature})


@pytest.mark.parametrize("name, keys", [("hidden", {}), ("contrastive", {"dim": 6}), ("auxiliary", {"blocks": [1]})])
def test_a_term_scheduled_to_0_is_no_longer_computed_and_its_parameters_get_zeros(name, keys):
    """Zeros, not None: DDP waits for a gradient of every parameter."""
    distiller = build({"w_ce": 1, "w_kl": 1, name: {**keys, "weight": {"start": 1, "end": 0, "until": 0.5}}})
    reference, calls = build({"w_ce": 1, "w_kl": 1}), []
    for module in distiller.terms[name].modules():
        counted(module, calls)
    distiller(IDS)
    assert calls
    calls.clear()
    distiller.progress = 0.7
    distiller(IDS)["loss"].backward()
    assert calls == []
    own = [parameter.grad for parameter in distiller.terms[name].parameters()]
    assert own and all(gradient is not None and not gradient.any() for gradient in own)
    distiller.zero_grad()
    assert set(distiller(IDS)) == set(reference(IDS))
    student = {part: value for part, value in gradients(distiller).items() if part.startswith("student.")}
    assert difference(student, gradients(reference)) < 1e-12
    assert sorted(distiller.token_terms(IDS)) == sorted(distiller.columns())  # validation still reports it


def test_a_kl_scheduled_to_0_no_longer_runs_the_teacher():
    distiller, calls = build({"w_ce": 1, "w_kl": {"start": 1, "end": 0}}), []
    counted(distiller.teachers[0].body, calls)
    distiller(IDS)
    distiller.progress = 1.0
    assert set(distiller(IDS)) == {"loss", "ce"} and len(calls) == 1


# ---- Teachers -------------------------------------------------------------------------------------------------------

MIXES = {
    "gpt2-llama": lambda: [gpt2(1, width=12, layers=2), llama(2, width=4)],
    "gptj-gpt2": lambda: [gptj(3, width=16, layers=2), gpt2(4, width=4)],  # GPT-J's head has a bias, GPT-2's none
    "llama-gptj-llama": lambda: [llama(5, width=4), gptj(6, width=8), llama(7, width=12, layers=1)],
    "gpt2": lambda: [gpt2(1, width=12)],
}


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("models", MIXES.values(), ids=MIXES)
def test_ensembles_by_hand(models, combine):
    """The weighted mean of the teachers' logits or probabilities; and each teacher's own CE and KL in the columns."""
    teachers = models()
    given = [1, 3, 4][:len(teachers)]
    distiller = build({"w_ce": 0.2, "w_kl": 0.8, "temperature": 2, "combine": combine, "entries": [{"weight": weight} for weight in given]},
                      teachers=teachers)
    logits, taught = outputs(distiller.student)[0], [outputs(teacher)[0] for teacher in teachers]
    shares = [weight / sum(given) for weight in given]
    if combine == "logits":
        p = (sum(share * values for share, values in zip(shares, taught, strict=True)) / 2).softmax(-1)
    else:
        p = sum(share * (values / 2).softmax(-1) for share, values in zip(shares, taught, strict=True))
    q = (logits / 2).softmax(-1)
    assert_equals_by_hand(distiller, 0.2 * nll(logits).mean() + 0.8 * 4 * soft_kl(p, q).mean())
    columns = distiller.token_terms(IDS)
    assert torch.allclose(columns["kl"], soft_kl(p, q))
    for number, values in enumerate(taught, 1):
        assert torch.allclose(columns[f"teacher{number}_ce"], nll(values))
        if len(taught) > 1:
            assert torch.allclose(columns[f"teacher{number}_kl"], soft_kl((values / 2).softmax(-1), q))
    assert ("teacher1_kl" in columns) == (len(taught) > 1)


def test_teachers_are_frozen_and_stay_in_eval_mode():
    distiller = build({"w_ce": 1, "w_kl": 1, "hidden": {"weight": 1}}, teachers=[gpt2(1, dropout=0.5).train()]).train()
    model = distiller.teachers[0].model
    assert distiller.student.training and not any(part.training for part in model.modules())
    assert distiller(IDS)["kl"].item() == distiller(IDS)["kl"].item()  # dropout in the teacher would tell them apart
    distiller(IDS)["loss"].backward()
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_teachers_are_no_part_of_the_module():
    """What DDP, the optimizer and a checkpoint see is the student and the terms' own modules, each parameter once."""
    distiller = build({**EVERYTHING, "entries": 2})
    theirs = {id(parameter) for teacher in distiller.teachers for parameter in teacher.model.parameters()}
    ours = [id(parameter) for _, parameter in trainable_parameters(distiller)]
    assert len(set(ours)) == len(ours) and not theirs & set(ours)
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "terms"}
    assert not {teacher.model for teacher in distiller.teachers} & set(distiller.modules())


def test_what_terms_train_is_in_the_distillers_state_but_not_in_the_students():
    distiller = build(EVERYTHING)
    own = {name for name in distiller.state_dict() if name.startswith("terms.")}
    assert len(own) == 2 + 4 + 2 * (2 + 2 + 2)  # weight and bias: hidden 1; contrastive 2; two classifiers of 2, and a projection each
    assert list(distiller.student.state_dict()) == list(gpt2().state_dict())


def test_teachers_run_under_the_students_autocast():
    distiller, seen = build({"w_ce": 1, "w_kl": 1}, llama(), [llama(1, width=12)], torch.float32), []
    for model in (distiller.student, distiller.teachers[0].model):
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        terms = distiller(IDS)
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert {value.dtype for value in terms.values()} == {torch.float32}


@pytest.mark.parametrize("settings", [*TERMS.values(), EVERYTHING], ids=[*TERMS, "all"])
def test_under_autocast_every_term_stays_close_and_every_gradient_has_its_parameters_type(settings):
    distiller = build(settings, llama(), dtype=torch.float32)
    exact = distiller(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        ours = distiller(IDS)
    assert {name: value.item() for name, value in ours.items()} == pytest.approx(
        {name: value.item() for name, value in exact.items()}, rel=0.05, abs=0.02)
    assert ours["loss"].dtype == torch.float32
    ours["loss"].backward()
    assert all(parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all() for parameter in distiller.parameters()
               if parameter.grad is not None)


def test_a_kl_without_a_teacher_is_an_error():
    with pytest.raises(ValueError, match="no teacher"):
        Distiller(gpt2(), [], section(w_kl=1))


def test_a_teacher_whose_logits_are_no_plain_linear_layer_is_refused():
    with pytest.raises(UserError, match="the teacher odd .* more than one linear layer"):
        Teacher.from_model(llama(kind=(GraniteConfig, GraniteForCausalLM), logits_scaling=4.0), TeacherEntry(path="odd"))


# ---- Layer maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [{5: 1}, {1: 4}, {0: 0, 4: 4}])
def test_a_map_beyond_a_models_states_is_an_error_that_says_what_there_is(layers):
    with pytest.raises(UserError, match=r"layer map of teacher-0 .* states 0 \.\.\. 4 and the student 0 \.\.\. 3"):
        build({"entries": [{"layers": layers}], "hidden": {"weight": 1}})


@pytest.mark.parametrize("layers, message", [({-1: 2}, "numbered from 0"), ({1: -1}, "numbered from 0"), ({1: 2, 3: 2}, "mapped twice")])
def test_an_impossible_map_is_an_error_in_the_config(layers, message):
    with pytest.raises(ValidationError, match=message):
        TeacherEntry(path="t", layers=layers)


def test_two_teachers_may_teach_the_same_student_state():
    distiller = build({"entries": [{"layers": {1: 2}}, {"layers": {2: 2}}], "hidden": {"weight": 1}})
    assert [len(each) for each in distiller.terms["hidden"].projections] == [1, 1]


def test_the_default_map_is_from_last_to_last_state():
    """What the heads read: after the final norm."""
    default, spelt = build({"hidden": {"weight": 1}}), build({"entries": [{"layers": {4: 3}}], "hidden": {"weight": 1}})
    assert default.terms["hidden"].maps == spelt.terms["hidden"].maps == [[(4, 3)]]
    assert default(IDS)["hidden"].item() == spelt(IDS)["hidden"].item()
    with torch.no_grad():
        distance = default.terms["hidden"].projections[0][0](default.student.transformer(IDS).last_hidden_state) \
            - default.teachers[0].body(IDS).last_hidden_state
    assert default(IDS)["hidden"].item() == pytest.approx(distance[:, :-1].square().mean().item())


@pytest.mark.parametrize("blocks", [[3], [1, 9]])
def test_a_classifier_on_the_last_block_or_beyond_is_an_error(blocks):
    with pytest.raises(UserError, match="of the student's 3 blocks, 1 ... 2 can have a classifier"):
        build({"w_ce": 1, "auxiliary": {"blocks": blocks}})


# ---- Cached teacher states ------------------------------------------------------------------------------------------

CACHED = {"w_ce": 0.3, "w_kl": 0.7, "temperature": 2, "hidden": {"weight": 0.2}, "contrastive": {"weight": 0.1, "dim": 6},
          "auxiliary": {**AUX, "weighting": "adaptive", "feature_weight": 0.5}}


def cached_copy(distiller):
    """The same Distiller with heads of teachers alone."""
    heads = [Teacher(teacher.head, teacher.depth, teacher.width, entry=teacher.entry) for teacher in distiller.teachers]
    other = Distiller(copy.deepcopy(distiller.student), heads, distiller.section).eval()
    other.load_state_dict(distiller.state_dict())
    return other


@pytest.mark.parametrize("entries", [[{"layers": {0: 0, 2: 1, 4: 3}}], [{"layers": {1: 2}}, {}]], ids=["one", "two"])
def test_cached_states_give_the_very_same_loss_and_gradients(entries):
    online = build({**CACHED, "entries": entries}, llama(), dtype=torch.float32)
    states = {state_key(number, state): values for number, teacher in enumerate(online.teachers)
              for state, values in teacher.states(IDS, Teacher.wanted_states(online.section, teacher.entry, teacher.depth)).items()}
    cached = cached_copy(online)
    assert torch.equal(cached(IDS, **states)["loss"], online(IDS)["loss"])
    ours, theirs = gradients(cached, **states), gradients(online)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first, second = cached.token_terms(IDS, **states), online.token_terms(IDS)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_states_cached_in_bf16_give_the_very_same_kl_under_bf16_autocast():
    """The head rounds its input to bf16 anyway."""
    online = build({"w_ce": 0.3, "w_kl": 0.7, "temperature": 2, "entries": 2}, llama(), dtype=torch.float32)
    cached = cached_copy(online)
    with torch.autocast("cpu", torch.bfloat16):
        states = {state_key(number, teacher.depth): teacher.states(IDS, [teacher.depth])[teacher.depth].bfloat16()
                  for number, teacher in enumerate(online.teachers)}
        ours, theirs = cached(IDS, **states), online(IDS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_only_the_states_that_a_term_reads_are_wanted():
    entry = TeacherEntry(path="t", layers={0: 0, 2: 1})
    mapped, off = (section([{"layers": entry.layers}], w_ce=1, hidden={"weight": weight}) for weight in (0.1, 0))
    assert Teacher.wanted_states(mapped, entry, 4) == [0, 2, 4]
    assert Teacher.wanted_states(off, entry, 4) == [4]


# ---- Students whose logits are no plain linear layer ----------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"w_ce": 1}, {"w_ce": 0.3, "w_kl": 0.7, "temperature": 2}, TERMS["JSD"],
                                      {**TERMS["two teachers"], "w_ce": 1}], ids=str)
def test_a_student_with_scaled_logits_falls_back_to_whole_logits(settings):
    """Its logits are head(states) / 4: the fused loss of the head alone would be another one."""
    student = llama(kind=(GraniteConfig, GraniteForCausalLM), logits_scaling=4.0)
    distiller = build(settings, student)
    assert distiller._halves[1] is None and "whole logits" in distiller.describe(LENGTH)
    logits, taught = outputs(student)[0], [outputs(teacher.model)[0] for teacher in distiller.teachers]
    objective = losses.LogitObjective(w_ce=settings.get("w_ce", 0), w_kl=settings.get("w_kl", 0), jsd_beta=0.3,
                                      temperature=settings.get("temperature", 1), divergence=settings.get("divergence", "forward_kl"))
    loss = losses.logit_terms(logits.flatten(0, 1), [values.flatten(0, 1) for values in taught], IDS[:, 1:].flatten(), objective,
                              distiller.shares)[0]
    assert_equals_by_hand(distiller, loss.mean())
    assert sorted(distiller.token_terms(IDS)) == sorted(distiller.columns())


def test_terms_on_states_refuse_such_a_student():
    with pytest.raises(UserError, match="one linear layer of its last hidden state"):
        build({"hidden": {"weight": 1}}, llama(kind=(GraniteConfig, GraniteForCausalLM), logits_scaling=4.0))


@pytest.mark.parametrize("saved", [None, ["lm_head"]], ids=["head frozen", "head trained"])
def test_a_lora_student_trains_its_adapters_and_its_loss_is_the_models(saved):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=saved))
    distiller = build({"w_ce": 0.3, "w_kl": 0.7, "hidden": {"weight": 1}, "auxiliary": AUX}, student)
    head = student.base_model.model.lm_head
    assert distiller._halves[1] is (head.modules_to_save["default"] if saved else head)
    assert torch.allclose(distiller.token_terms(IDS)["ce"], nll(outputs(student)[0]), atol=1e-6)
    distiller(IDS)["loss"].backward()
    trained = {name for name, parameter in distiller.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert any("lora_B" in name for name in trained) and any(name.startswith("terms.hidden") for name in trained)
    assert any("lm_head" in name for name in trained) == bool(saved)
    assert trained <= {name for name, _ in trainable_parameters(distiller)}
    assert not any("base_layer" in name or "embed_tokens" in name for name in trained)


# ---- What it says of itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, line", [
    ({"entries": 0, "w_ce": 1}, "loss = CE"),
    ({"alpha": 0.5, "w_ce": None, "w_kl": None, "temperature": 2, "kl_reduction": "batchmean"},
     "loss = 0.5 CE + 0.5 T^2 KL(teacher || student), T = 2, batchmean: effective lambda = 128"),
    ({"w_ce": 1, "w_kl": {"start": 1, "end": 0}, "divergence": "jsd"},
     "loss = 1 CE + (1 -> 0) T^2 JSD(beta 0.5), T = 1, token_mean: effective lambda = 1 at the start"),
    ({"w_ce": 1, "w_kl": 1, "divergence": "reverse_kl", "approximate_top_k": 8, "label_smoothing": 0.1},
     "loss = 1 CE (label smoothing 0.1) + 1 T^2 KL(student || teacher) on the top 8 entries (an approximation), T = 1, "
     "token_mean: effective lambda = 1"),
    ({"w_ce": 1, "hidden": {"weight": 0.3}}, "loss = 1 CE + 0.3 hidden"),
])
def test_the_description_names_every_term_and_the_effective_lambda(settings, line):
    assert build(settings).describe(129) == line


def test_the_description_of_an_ensemble_names_the_shares():
    distiller = build({"w_kl": 1, "combine": "probabilities", "entries": [{"weight": 1}, {"weight": 3}]})
    assert distiller.describe(129).endswith("; mean of probabilities of 0.25 teacher-0, 0.75 teacher-1")


def test_a_distiller_without_a_section_is_cross_entropy_alone():
    distiller = Distiller(gpt2().eval())
    assert set(distiller(IDS)) == {"loss", "ce"} and distiller.describe(LENGTH) == "loss = CE"
    assert distiller(IDS)["loss"].item() == pytest.approx(nll(outputs(distiller.student)[0]).mean().item(), rel=1e-5)
    assert [type(part) for part in distiller.terms.values()] == [] and isinstance(distiller, nn.Module)
