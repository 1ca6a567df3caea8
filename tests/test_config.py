"""YAML and command line become a checked config, or a list of mistakes that says where each one is."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from babylm import config as config_module
from babylm.config import (
    BaselineConfig,
    CorpusConfig,
    DataSection,
    JudgeReward,
    LengthReward,
    MarginReward,
    MoEPStudentConfig,
    RewardEntry,
    RLConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    student_schema,
)
from babylm.schema import Schedule, Section, UserError, check, content_hash, default_of, differing, identity, key, load, read_yaml

ROOT = Path(config_module.__file__).parents[1]
SCHEMAS = (CorpusConfig, TeacherConfig, BaselineConfig, StudentConfig, MoEPStudentConfig, RLConfig)


class Rewarded(Section):
    """A section with `rewards`, entries of several kinds in one list, and one that stands beside it."""

    rewards: list[RewardEntry] = key(..., "what is rewarded", min_length=1)
    data: DataSection = key(DataSection(), "what is read")


ELSEWHERE = {"sweeps": "test_sweeps.py", "accelerate": "test_processes.py"}  # folders of YAML that is no stage's, and where it is tested
SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name not in ELSEWHERE)


def run(**changes):
    """The smallest valid values of a training stage, changed."""
    return {"name": "tiny", "training": {"steps": 5}, **changes}


def distil(**weights):
    return run(distillation={"teacher": "models/teacher", **weights})


def mistakes(schema, values):
    """The lines that `check` complains in, without the heading."""
    with pytest.raises(UserError) as caught:
        check(schema, values, "some.yaml")
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"some.yaml: {len(lines)} mistake(s) in the config"
    return [line.strip() for line in lines]


def sections_of(annotation):
    """The sections that a key holds, also where it may be left out or is a list of them, of one kind or several; a Schedule is a value."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Section) and annotation is not Schedule else []
    return [section for part in get_args(annotation) for section in sections_of(part)]


def is_section(field):
    return bool(sections_of(field.annotation))


def fields(schema, prefix=""):
    """(full path, field) of every key and section heading; a key that several kinds of an entry have comes once for each."""
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        for section in sections_of(field.annotation):
            yield from fields(section, f"{prefix}{name}.")


# ---- Mistakes in a config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "message"), [
    (run(logging={"loging_steps": 5}), "logging.loging_steps: unknown key; did you mean logging_steps?"),
    (run(modle={"layers": 2}), "modle: unknown key; did you mean model?"),
    (run(lr=1e-3), "lr: unknown key; did you mean training.lr?"),
    (run(training={"steps": 5, "seq_len": 64}), "training.seq_len: unknown key; did you mean data.seq_len?"),
    (run(lora={"rank": 8}), "lora: unknown key; known keys: name, output, seed, "),
    (run(checkpoints={"zzz": 1}), "checkpoints.zzz: unknown key; known keys: save_steps, keep, "),
    (run(training={"steps": "many"}), "training.steps: Input should be a valid integer"),
    (run(training={"steps": 2.5}), "training.steps: Input should be a valid integer"),
    (run(training={"steps": True}), "training.steps: got true, which is not a valid value here"),
    (run(training={"steps": 5, "lr": False}), "training.lr: got false, which is not a valid value here"),
    (run(training={"words": True}), "training.words: got true, which is not a valid value here"),
    (run(name=True), "name: got true, which is not a valid value here"),
    (run(training={"steps": 5, "lr": -1}), "training.lr: Input should be greater than 0 (given: -1)"),
    (run(training={"steps": 5, "lr": "nan"}), "training.lr: Input should be"),
    (run(model={"dropout": 1.0}), "model.dropout: Input should be less than 1 (given: 1.0)"),
    (run(training={"steps": 5, "schedule": "cosin"}), "training.schedule: Input should be 'cosine', 'linear' or 'constant'"),
    (run(training={"steps": 5, "compile": "perhaps"}), "training.compile: Input should be a valid boolean"),
    (run(training=[1, 2]), "training: Input should be a valid dictionary"),
    (run(logging=None), "logging: the section is empty: give it keys, or remove its heading"),
    ({"name": "tiny"}, "training: Field required"),
    ({"training": {"steps": 5}}, "name: Field required"),
    (run(name="v1.5"), "name 'v1.5' must hold neither dots"),
    (run(name="a/b"), "nor slashes"),
])
def test_a_mistake_is_named_with_its_path(values, message):
    (line,) = mistakes(BaselineConfig, values)
    assert message in line


def test_all_mistakes_are_shown_at_once():
    values = run(data={"seq_len": 2, "corpuss": "x"}, training={"steps": 5, "lr": 0}, logging=None, colour="red")
    paths = {line.split(":")[0] for line in mistakes(BaselineConfig, values)}
    assert paths == {"data.seq_len", "data.corpuss", "training.lr", "logging", "colour"}


@pytest.mark.parametrize("path", ["weight_decay", "grad_clip", "epochs"])
def test_infinity_is_not_a_setting(path):
    budget = {} if path == "epochs" else {"steps": 5}
    (line,) = mistakes(BaselineConfig, run(training={**budget, path: float("inf")}))
    assert line.startswith(f"training.{path}: ")


def test_a_number_in_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: tiny\ntraining: {steps: 5, lr: 3e-4}\n")
    assert read_yaml(path)["training"]["lr"] == "3e-4", "PyYAML reads it as text, which is why this test exists"
    assert check(BaselineConfig, read_yaml(path), "run.yaml").training.lr == 3e-4


def test_a_numeric_name_is_a_name():
    assert check(BaselineConfig, run(name=7), "some.yaml").name == "7"


# ---- Values that must fit together ----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{"steps": 5}, {"epochs": 1.5}, {"words": 1000}])
def test_one_budget_is_enough(budget):
    check(BaselineConfig, run(training=budget), "some.yaml")


@pytest.mark.parametrize(("budget", "given"), [
    ({}, "none"), ({"steps": 5, "words": 1000}, "steps, words"), ({"steps": 5, "epochs": 1, "words": 1}, "steps, epochs, words"),
])
def test_no_budget_or_several_are_refused(budget, given):
    assert mistakes(BaselineConfig, run(training=budget)) == [
        f"training: give exactly one of steps, epochs, words (given: {given})"]


@pytest.mark.parametrize(("written", "words"), [
    ("100K", 100_000), ("1M", 1_000_000), ("2.5M", 2_500_000), ("1b", 1_000_000_000), ("10 k", 10_000), ("300", 300), (12, 12)])
def test_word_counts_may_be_abbreviated(written, words):
    assert check(BaselineConfig, run(training={"words": written}), "some.yaml").training.words == words


@pytest.mark.parametrize("written", ["0", "0K", "-1M", "10X", "1.5", "K", "1M words"])
def test_other_word_counts_are_refused(written):
    (line,) = mistakes(BaselineConfig, run(training={"words": written}))
    assert line.startswith("training.words: ")


def test_milestones_may_be_abbreviated():
    checkpoints = {"extra_words": ["100K", "1.5M"], "every_words": "2M"}
    got = check(BaselineConfig, run(checkpoints=checkpoints), "some.yaml").checkpoints
    assert (got.extra_words, got.every_words) == ([100_000, 1_500_000], 2_000_000)


@pytest.mark.parametrize(("given", "weights"), [
    ({"alpha": 0.25}, (0.25, 0.75)), ({"alpha": 0}, (0, 1)), ({"alpha": 1}, (1, 0)), ({"w_ce": 2, "w_kl": 0.5}, (2, 0.5))])
def test_distillation_weights(given, weights):
    got = check(StudentConfig, distil(**given), "some.yaml").distillation.weights
    assert [(weight.start, weight.end) for weight in got] == [(weight, weight) for weight in weights]


@pytest.mark.parametrize(("given", "message"), [
    ({"alpha": 0.5, "w_ce": 1}, "give either alpha or w_ce and w_kl, not both"),
    ({"alpha": 0.5, "w_ce": 1, "w_kl": 1}, "give either alpha or w_ce and w_kl, not both"),
    ({}, "give alpha, or w_ce and w_kl"),
    ({"w_kl": 1}, "w_ce and w_kl go together: give both"),
    ({"w_ce": 0, "w_kl": 0}, "w_ce and w_kl are both 0"),
    ({"alpha": 1.1}, "less than or equal to 1"),
])
def test_distillation_weights_are_given_once(given, message):
    (line,) = mistakes(StudentConfig, distil(**given))
    assert line.startswith("distillation") and message in line


BOTH = [{"path": "a"}, {"path": "b"}]
MAPPED = [{"path": "a", "layers": {1: 1, 3: 2}}, {"path": "b"}]


def several(teachers, **terms):
    return run(distillation={"teachers": teachers, "alpha": 0.5, **terms})


def alone(**terms):
    return run(distillation={"alpha": 1, **terms})


@pytest.mark.parametrize(("values", "message"), [
    (distil(alpha=0.5, teachers=BOTH), "give either teacher or teachers, not both"),
    (several([{"path": "a", "weight": 0}, {"path": "b", "weight": 0}]), "the weights of the teachers add up to 0"),
    (distil(alpha=0.5, approximate_top_k=8, approximate_top_p=0.9), "give either approximate_top_k or approximate_top_p, not both"),
    (distil(alpha=0.5, jsd_beta=0.3), "jsd_beta belongs to divergence: jsd, not to forward_kl"),
    (distil(alpha=0.5, jsd_beta=0.3, divergence="reverse_kl"), "jsd_beta belongs to divergence: jsd, not to reverse_kl"),
    (several(MAPPED), "teachers.layers is given but there is no section hidden to use it"),
    (run(distillation={"alpha": 0.5}), "w_kl needs a teacher: give teacher or teachers"),
    (alone(hidden={}), "hidden needs a teacher"),
    (alone(contrastive={}), "contrastive needs a teacher"),
    (alone(hidden={"weight": {"start": 0, "end": 0.1}}, contrastive={"weight": 0}), ": hidden needs a teacher"),
    (alone(cache=True), "cache needs a teacher"),
    (alone(auxiliary={"blocks": [1], "feature_weight": 0.5}), "auxiliary.feature_weight needs a teacher"),
    (distil(w_ce=0, w_kl=1, label_smoothing=0.1), "label_smoothing acts on the cross-entropy, but w_ce is 0"),
    (distil(alpha=0, label_smoothing=0.1), "label_smoothing acts on the cross-entropy, but w_ce is 0"),
    (distil(w_ce=0, w_kl=0, hidden={"weight": 0}, contrastive={"weight": 0}), "and so is every other term: nothing would be learned"),
    (distil(w_ce=0, w_kl=0, auxiliary={"blocks": [1]}), "nothing would be learned"),  # whose terms have the weights of CE and KL
    (several([{"path": "a", "device": "cpu"}], cache=True), "teachers.device has no meaning with cache: true"),
])
def test_terms_that_contradict_each_other_are_refused(values, message):
    (line,) = mistakes(StudentConfig, values)
    assert line.startswith("distillation: ") and message in line


def test_all_contradictions_are_shown_at_once():
    (line,) = mistakes(StudentConfig, run(distillation={"alpha": 0.5, "jsd_beta": 0.3, "approximate_top_k": 8, "approximate_top_p": 0.9}))
    assert [part in line for part in ("w_kl needs a teacher", "either approximate_top_k", "jsd_beta belongs")] == [True] * 3


@pytest.mark.parametrize("values", [
    distil(alpha=0.5, divergence="jsd", jsd_beta=0.3),
    distil(w_ce=0, w_kl=0, hidden={"weight": {"start": 0, "end": 0.1}}),
    distil(w_ce={"start": 0, "end": 1}, w_kl=0, label_smoothing=0.1),
    alone(hidden={"weight": 0}, contrastive={"weight": 0}),
    alone(auxiliary={"blocks": [1]}),
    several(MAPPED, hidden={}), several([{"path": "a"}, {"path": "b", "weight": 0}], cache=True),
    alone(),
])
def test_terms_that_go_together_are_taken(values):
    check(StudentConfig, values, "some.yaml")


def test_a_teacher_of_weight_0_is_left_out():
    got = check(StudentConfig, several([{"path": "a", "weight": 0}, {"path": "b", "weight": 3}]), "some.yaml").distillation
    assert [entry.path for entry in got.entries] == ["b"]


@pytest.mark.parametrize(("values", "messages"), [
    (distil(alpha=0.5, hiden={}), ["distillation.hiden: unknown key; did you mean hidden?"]),
    (distil(alpha=0.5, hidden={"wieght": 1}), ["distillation.hidden.wieght: unknown key; did you mean weight?"]),
    (distil(alpha=0.5, hidden={"weight": {"start": 1, "end": 0, "untill": 0.5}}),
     ["distillation.hidden.weight.untill: unknown key; did you mean until?"]),
    (distil(alpha=0.5, temperature={"start": 1, "end": 2, "shap": "linear"}),
     ["distillation.temperature.shap: unknown key; did you mean shape?"]),
    (distil(w_ce={"start": 1, "end": 0, "untill": 0.5}, w_kl=1), ["distillation.w_ce.untill: unknown key; did you mean until?"]),
    (distil(w_ce=1, w_kl={"strat": 1, "start": 1, "end": 2}), ["distillation.w_kl.strat: unknown key; did you mean start?"]),
    (several([{"path": "a"}, {"path": "b", "wieght": 1}]), ["distillation.teachers.1.wieght: unknown key; did you mean weight?"]),
    (several([{"pth": "a"}]),
     ["distillation.teachers.0.path: Field required", "distillation.teachers.0.pth: unknown key; did you mean path?"]),
    (distil(alpha=0.5, auxiliary={"blocks": [1], "share_heads": True}),
     ["distillation.auxiliary.share_heads: unknown key; did you mean share_head?"]),
    (distil(alpha=0.5, contrastive={"tau": 1}), ["distillation.contrastive.tau: unknown key; known keys: weight, temperature, dim"]),
    (run(temperature=2), ["temperature: unknown key; did you mean distillation.temperature?"]),
    (run(share_head=True), ["share_head: unknown key; did you mean distillation.auxiliary.share_head?"]),
])
def test_an_unknown_key_of_a_nested_section_is_named_with_its_whole_path(values, messages):
    assert mistakes(StudentConfig, {"distillation": {"teacher": "t", "alpha": 0.5}, **values}) == messages


@pytest.mark.parametrize(("values", "message"), [
    (distil(alpha=0.5, temperature=0), "distillation.temperature: must be greater than 0"),
    (distil(alpha=0.5, temperature={"start": 2, "end": 0}), "distillation.temperature: must be greater than 0"),
    (distil(alpha=0.5, temperature="hot"), "distillation.temperature: 'hot' is no number"),
    (distil(alpha=0.5, temperature=True), "distillation.temperature: got true, which is not a valid value here"),
    (distil(alpha=0.5, temperature=[4, 1]), "distillation.temperature: Input should be a valid dictionary"),
    (distil(alpha=0.5, temperature={"start": 4}), "distillation.temperature.end: Field required"),
    (distil(alpha=0.5, temperature={"start": 4, "end": 1, "until": 0}), "distillation.temperature.until: Input should be greater than 0"),
    (distil(alpha=0.5, temperature={"start": 4, "end": 1, "until": 1.5}), "temperature.until: Input should be less than or equal to 1"),
    (distil(alpha=0.5, temperature={"start": 4, "end": 1, "shape": "step"}), "temperature.shape: Input should be 'linear' or 'cosine'"),
    (distil(alpha=0.5, temperature={"start": "inf", "end": 1}), "distillation.temperature.start: Input should be a finite number"),
    (distil(w_ce=-1, w_kl=1), "distillation.w_ce: must not be negative"),
    (distil(w_ce=1, w_kl={"start": 1, "end": -0.1}), "distillation.w_kl: must not be negative"),
    (distil(alpha=0.5, hidden={"weight": -1}), "distillation.hidden.weight: must not be negative"),
    (distil(alpha=0.5, hidden=True), "distillation.hidden: got true"),
    (distil(alpha=0.5, auxiliary={}), "distillation.auxiliary.blocks: Field required"),
    (distil(alpha=0.5, auxiliary={"blocks": []}), "distillation.auxiliary.blocks: List should have at least 1 item"),
    (distil(alpha=0.5, auxiliary={"blocks": [0, 1]}), "distillation.auxiliary.blocks: blocks are numbered from 1, each at most once"),
    (distil(alpha=0.5, auxiliary={"blocks": [1, 1]}), "distillation.auxiliary.blocks: blocks are numbered from 1, each at most once"),
    (distil(alpha=0.5, auxiliary={"blocks": [1], "feature_weight": -1}), "distillation.auxiliary.feature_weight: Input should be"),
    (distil(alpha=0.5, contrastive={"temperature": 0}), "distillation.contrastive.temperature: Input should be greater than 0"),
    (distil(alpha=0.5, approximate_top_p=1), "distillation.approximate_top_p: Input should be less than 1"),
    (distil(alpha=0.5, label_smoothing=1), "distillation.label_smoothing: Input should be less than 1"),
    (distil(alpha=0.5, divergence="jsd", jsd_beta=0), "distillation.jsd_beta: Input should be greater than 0"),
    (several(["a", "b"][:1]), "distillation.teachers.0: Input should be a valid dictionary"),
    (several([{"path": "a", "weight": -1}]), "distillation.teachers.0.weight: Input should be greater than or equal to 0"),
    (several([{"path": ""}]), "distillation.teachers.0.path: String should have at least 1 character"),
    (several([{"path": "a", "layers": {2: 1, 3: 1}}], hidden={}), "teachers.0.layers: student state 1 is mapped twice (also from"),
    (several([{"path": "a", "layers": {-1: 1}}], hidden={}), "distillation.teachers.0.layers: states are numbered from 0"),
    (several([{"path": "a", "layers": {1: -1}}], hidden={}), "distillation.teachers.0.layers: states are numbered from 0"),
])
def test_a_bad_value_of_a_term_is_named_with_its_path(values, message):
    (line,) = mistakes(StudentConfig, values)
    assert message in line


@pytest.mark.parametrize(("shape", "until", "expected"), [
    ("linear", 1.0, [4, 3.25, 2.5, 1.75, 1]), ("linear", 0.5, [4, 2.5, 1, 1, 1]),
    ("cosine", 1.0, [4, 3.5607, 2.5, 1.4393, 1]), ("cosine", 0.5, [4, 2.5, 1, 1, 1]),
])
def test_a_schedule_goes_from_its_start_to_its_end_and_stays_there(shape, until, expected):
    schedule = Schedule(start=4, end=1, shape=shape, until=until)
    assert [schedule.at(progress) for progress in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("schema", "values", "message"), [
    (BaselineConfig, run(model={"width": 100, "heads": 12}), "width 100 is not a multiple of heads 12"),
    (BaselineConfig, run(model={"init": "pretrained"}), "init: pretrained needs model.path"),
    (BaselineConfig, run(model={"path": "gpt2"}), "set init: pretrained, or remove path"),
    (BaselineConfig, run(model={"kv_heads": 3}), "kv_heads 3 needs architecture llama"),
    (BaselineConfig, run(model={"architecture": "llama", "width": 36, "heads": 12}), "even width per head"),
    (BaselineConfig, run(data={"seq_len": 64}, model={"max_positions": 32}), "data.seq_len 64 exceeds model.max_positions 32"),
    (BaselineConfig, run(training={"steps": 5, "batch_size": 6, "per_device_batch_size": 4}), "not a multiple of per_device_batch_size"),
    (BaselineConfig, run(checkpoints={"final": "best"}), "checkpoints.final: best needs logging.eval_steps <= training.steps"),
    (TeacherConfig, run(lora={"mode": "lora"}), "set model.init: pretrained and model.path"),
    (CorpusConfig, {"corpus": {"boundaries": {"qed": "line:3"}}}, "qed: 'line:3' is not one of auto, blank, heading, lines:N"),
    (CorpusConfig, {"corpus": {"boundaries": {"qed": "lines:0"}}}, "qed: 'lines:0' is not one of"),
    (CorpusConfig, {"corpus": {"validation_fraction": 1.0}}, "tokenizer.path"),  # there is no text to train a tokenizer on
])
def test_values_that_contradict_each_other_are_refused(schema, values, message):
    (line,) = mistakes(schema, values)
    assert message in line


# ---- The file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "message"), [
    (b"", "expected a mapping of sections, found NoneType; is the file empty?"),
    (b"# only a comment\n", "is the file empty?"),
    (b"- a\n- b\n", "expected a mapping of sections, found list"),
    (b"name: a\n\tb: 2\n", "not valid YAML: .* line 2, column 1"),
    (b"name: [a,\n", "not valid YAML: .* line 2"),
    (b"name: \xff\n", "not valid YAML: .*byte 0xff"),
    (b"name: {{ name }}\n", "not valid YAML|stands|mapping"),
    (b"name: a\nseed: 1\nname: b\n", "line 3: key 'name' stands twice in the same section"),
    (b"data:\n  seq_len: 8\n  seq_len: 9\n", "line 3: key 'seq_len' stands twice in the same section"),
])
def test_a_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert re.search(message, str(caught.value)) and str(caught.value).startswith(str(path))


def test_the_same_key_in_two_sections_is_no_duplicate(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: {x: 1}\nb: {x: 1}\n")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_config_that_is_no_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
        read_yaml(tmp_path / name)


# ---- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, write_yaml):
    """command(schema, values, *arguments, flags=...) -> the config that a stage would get."""

    def parse(schema, values, *arguments, flags=None):
        path = write_yaml(tmp_path / "run.yaml", values)
        return load(schema, str(path), "a stage", list(arguments), flags)[0]

    return parse


def test_overrides_reach_every_depth(command):
    got = command(BaselineConfig, run(), "training.lr=1e-4", "seed=2", "checkpoints.extra_words=[10K, 20K]", "data.corpus=x=y")
    assert (got.training.lr, got.seed, got.checkpoints.extra_words, got.data.corpus) == (1e-4, 2, [10_000, 20_000], "x=y")


def test_an_override_can_take_a_value_away(command):
    assert command(BaselineConfig, run(), "training.steps=null", "training.epochs=2").training.epochs == 2


def test_overrides_and_flags_may_stand_in_any_order(command, tmp_path, write_yaml):
    other = write_yaml(tmp_path / "other.yaml", run(seed=5))
    got = command(BaselineConfig, run(), "training.lr=1e-4", "--config", str(other), "name=later")
    assert (got.seed, got.training.lr, got.name) == (5, 1e-4, "later")


@pytest.mark.parametrize(("override", "message"), [
    ("seed", "write it as key=value"), ("=3", "write it as key=value"), ("seed.deep=1", "seed is not a section"),
    ("seed=[1", "'[1' is not a YAML value"), ("training.lrr=1", "training.lrr: unknown key; did you mean lr?"),
    ("training.lr=fast", "training.lr: Input should be a valid number"),
])
def test_a_bad_override_is_named(command, override, message):
    with pytest.raises(UserError) as caught:
        command(BaselineConfig, run(seed=1), override)
    assert message in str(caught.value)


LORA_FLAGS = {"--use_lora": {"action": "store_true", "key": "lora.mode", "value": "lora"},
              "--resume_path": {"key": "resume_path"}}


@pytest.mark.parametrize(("arguments", "mode"), [([], "none"), (["--use_lora"], "lora")])
def test_a_flag_sets_the_key_it_stands_for(command, arguments, mode):
    values = run(model={"init": "pretrained", "path": "gpt2"})
    assert command(TeacherConfig, values, *arguments, flags=LORA_FLAGS).lora.mode == mode


def test_a_flag_with_a_value_sets_its_key(command):
    got = command(TeacherConfig, run(), "--resume_path", "models/a: b/checkpoint-5", flags=LORA_FLAGS)
    assert got.resume_path == "models/a: b/checkpoint-5"


def test_a_flag_keeps_the_rest_of_its_section(command):
    values = run(model={"init": "pretrained", "path": "gpt2"}, lora={"rank": 3})
    assert command(TeacherConfig, values, "--use_lora", flags=LORA_FLAGS).lora.rank == 3


# ---- One list, entries of several kinds -------------------------------------------------------------------------------

JUDGE, MARGIN, LENGTH = {"kind": "judge"}, {"kind": "margin", "teacher": "models/t"}, {"kind": "length", "min_words": 5, "max_words": 9}


def test_an_entry_becomes_the_section_of_its_kind():
    judge, margin, length = check(Rewarded, {"rewards": [JUDGE, MARGIN, {**LENGTH, "weight": "-5e-1"}]}, "some.yaml").rewards
    assert (type(judge), type(margin), type(length)) == (JudgeReward, MarginReward, LengthReward)
    assert (judge.weight, length.weight, margin.normalise) == (1.0, -0.5, "token")


@pytest.mark.parametrize(("rewards", "messages"), [
    ([JUDGE, {**MARGIN, "wieght": 1}], ["rewards.1.wieght: unknown key; did you mean weight?"]),
    ([{"kind": "margin", "techer": "t"}], ["rewards.0.teacher: Field required", "rewards.0.techer: unknown key; did you mean teacher?"]),
    ([{**MARGIN, "max_words": 3}], ["rewards.0.max_words: unknown key; margin has none of this name, but length has"]),
    ([{**MARGIN, "model": "gpt2"}], ["rewards.0.model: unknown key; margin has none of this name, but likelihood and judge have"]),
    ([{**MARGIN, "seq_len": 3}], ["rewards.0.seq_len: unknown key; did you mean data.seq_len?"]),
    ([{"kind": "random", "zzz": 3}], ["rewards.0.zzz: unknown key; known keys: weight, kind"]),
    ([{"kind": "margn", "teacher": "t"}], ["rewards.0.kind: 'margn' is unknown; did you mean margin?"]),
    ([{"kind": "zzz"}], ["rewards.0.kind: 'zzz' is unknown; one of margin, likelihood, judge, length, repetition, random"]),
    ([{"kind": True}], ["rewards.0.kind: True is unknown; one of margin, likelihood, judge, length, repetition, random"]),
    ([JUDGE, {"weight": 2}], ["rewards.1.kind: Field required; one of margin, likelihood, judge, length, repetition, random"]),
    ([None], ["rewards.0: expected a section with the key kind (given: None)"]),
    (["judge"], ["rewards.0: expected a section with the key kind (given: 'judge')"]),
    ([], ["rewards: List should have at least 1 item after validation, not 0 (given: [])"]),
    ({"kind": "judge"}, ["rewards: Input should be a valid list"]),
    ([{**MARGIN, "weight": True}], ["rewards.0.weight: got true, which is not a valid value here"]),
    ([{**MARGIN, "weight": "inf"}], ["rewards.0.weight: Input should be a finite number (given: 'inf')"]),
    ([{**LENGTH, "min_words": 10}], ["rewards.0: min_words 10 exceeds max_words 9"]),
    ([{**JUDGE, "server": "localhost:8000"}], ["rewards.0.server: 'localhost:8000' is no base address such as http://localhost:8000/v1 "
                                               "(no user name, no query)"]),
    ([{**JUDGE, "criteria": ["wit", "Wit"]}], ["rewards.0.criteria: each criterion once"]),
    ([{**JUDGE, "criteria": ["wit: 3 |"]}], ["rewards.0.criteria: 'wit: 3 |' is not made of words: letters, with single spaces or hyphens "
                                             "between them"]),
    ([{**JUDGE, "timeout": 0}, {**LENGTH, "slack": 0}], ["rewards.0.timeout: Input should be greater than 0 (given: 0)",
                                                         "rewards.1.slack: Input should be greater than or equal to 1 (given: 0)"]),
])
def test_a_mistake_in_an_entry_is_named_with_its_path_as_written(rewards, messages):
    assert mistakes(Rewarded, {"rewards": rewards}) == messages


def test_a_key_that_only_entries_have_is_found_from_outside():
    (line,) = mistakes(Rewarded, {"rewards": [JUDGE], "normalise": "token"})
    assert line == "normalise: unknown key; did you mean rewards.normalise?"


def test_an_override_reaches_into_an_entry(command):
    got = command(Rewarded, {"rewards": [JUDGE, MARGIN]}, "rewards.1.weight=0.5", "rewards.0={kind: random}").rewards
    assert [entry.kind for entry in got] == ["random", "margin"] and got[1].weight == 0.5


@pytest.mark.parametrize("override", ["rewards.2.weight=1", "rewards.-1.weight=1", "rewards.first.weight=1", "rewards.2={kind: random}"])
def test_an_override_of_an_entry_that_is_not_there_is_refused(command, override):
    with pytest.raises(UserError, match="is no entry of the list, which has 2, numbered from 0"):
        command(Rewarded, {"rewards": [JUDGE, MARGIN]}, override)


REWARDS = {"rewards": [JUDGE, MARGIN, LENGTH, {"kind": "likelihood", "model": "gpt2"}, {"kind": "repetition"}]}


@pytest.mark.parametrize("override", [
    "rewards.0={kind: random}", "rewards.0.weight=2", "rewards.0.model=other", "rewards.0.criteria=[wit]", "rewards.0.max_grade=5",
    "rewards.0.retries=1", "rewards.0.temperature=1", "rewards.0.max_new_tokens=99", "rewards.0.max_characters=99",
    "rewards.1.normalise=sequence", "rewards.1.baseline=none", "rewards.2.slack=3", "rewards.2.min_words=1", "rewards.2.max_words=99",
    "rewards.3.model=other", "rewards.4.n=2"])
def test_what_is_rewarded_changes_the_identity(command, override):
    assert identity(command(Rewarded, REWARDS)) != identity(command(Rewarded, REWARDS, override))


@pytest.mark.parametrize("override", [
    "rewards.0.server=http://other:8000/v1", "rewards.0.api_key_variable=KEY", "rewards.0.rubric=moved.txt", "rewards.0.batch_size=1",
    "rewards.0.device=cpu", "rewards.0.workers=1", "rewards.0.timeout=9", "rewards.0.attempts=2", "rewards.0.backoff=0",
    "rewards.1.teacher=moved", "rewards.1.batch_size=1", "rewards.1.device=cuda:1", "rewards.3.device=cpu"])
def test_where_a_reward_runs_and_where_its_files_lie_do_not_change_the_identity(command, override):
    assert identity(command(Rewarded, REWARDS)) == identity(command(Rewarded, REWARDS, override))


# ---- Identity ---------------------------------------------------------------------------------------------------------

NOT_IDENTITY = {  # where things lie, how often something is said or saved, how the work is spread; spelled out on purpose
    "name", "output", "fresh", "resume_path", "data.corpus", "data.tokenizer", "data.eval_path", "training.per_device_batch_size",
    "model.expert_path",
    "training.compile", "training.fsdp", "training.gradient_checkpointing", "training.device", "training.threads", "training.eval_tasks",
    "training.eval_data", "training.eval_suite", "checkpoints.save_steps",
    "checkpoints.keep", "checkpoints.milestones", "checkpoints.extra_words", "checkpoints.every_words", "logging.logging_steps",
    "logging.trackers", "lora.merge_adapter", "distillation.teacher", "distillation.teachers.path",
    "distillation.teachers.device", "distillation.cache",
    "distillation.offload_teacher", "distillation.cache_path", "corpus.input", "corpus.output",
    "download.strict_small", "download.strict", "download.revision", "rewards.teacher", "rewards.batch_size", "rewards.device",
    "rewards.server", "rewards.api_key_variable", "rewards.rubric", "rewards.workers", "rewards.timeout", "rewards.attempts",
    "rewards.backoff", "prompts.dataset", "prompts.path", "logging.samples",
}


@pytest.mark.parametrize("schema", (*SCHEMAS, Rewarded))
def test_every_key_says_what_it_means(schema):
    assert [path for path, field in fields(schema) if len(field.description or "") < 3] == []


@pytest.mark.parametrize("schema", (*SCHEMAS, Rewarded))
def test_every_key_is_marked_as_identity_or_not(schema):
    marked = {path: field.json_schema_extra["identity"] for path, field in fields(schema) if not is_section(field)}
    assert {path for path, is_identity in marked.items() if not is_identity} == NOT_IDENTITY & marked.keys()


@pytest.mark.parametrize(("path", "value"), [("seed", 3), ("data.seq_len", 64), ("training.lr", 1e-3), ("model.layers", 2)])
def test_what_a_run_is_changes_its_identity(command, path, value):
    assert identity(command(BaselineConfig, run())) != identity(command(BaselineConfig, run(), f"{path}={value}"))


@pytest.mark.parametrize("override", ["logging.logging_steps=3", "training.device=cpu", "training.per_device_batch_size=8",
                                      "data.corpus=elsewhere", "checkpoints.keep=5", "name=other", "fresh=true"])
def test_where_and_how_it_runs_does_not_change_its_identity(command, override):
    assert identity(command(BaselineConfig, run())) == identity(command(BaselineConfig, run(), override))


def test_alpha_and_the_weights_it_stands_for_are_recorded_as_given(command):
    assert identity(command(StudentConfig, distil(alpha=0.5)))["distillation.alpha"] == 0.5


ALL_TERMS = several([{"path": "a", "weight": 2, "layers": {1: 1, 3: 2}, "device": "cpu"}, {"path": "b"}], alpha=None, w_ce=0.5,
                    w_kl={"start": 1, "end": 0.5}, temperature={"start": 4, "end": 1}, hidden={}, auxiliary={"blocks": [1]}, contrastive={})
ALL_TERMS["data"] = {"offset_cycle": 2}


@pytest.mark.parametrize("override", [
    "distillation.teachers=[{path: a, weight: 1, layers: {1: 1, 3: 2}}, {path: b}]",
    "distillation.teachers=[{path: a, weight: 2, layers: {1: 1, 2: 2}}, {path: b}]",
    "distillation.teachers=[{path: a, weight: 2, layers: {1: 1, 3: 2}}]",
    "distillation.w_ce=0.6", "distillation.w_kl=1", "distillation.w_kl={start: 1, end: 0.5, until: 0.9}",
    "distillation.temperature={start: 4, end: 1, shape: cosine}", "distillation.temperature=4", "distillation.combine=probabilities",
    "distillation.divergence=jsd", "distillation.approximate_top_k=8", "distillation.approximate_top_p=0.9",
    "distillation.label_smoothing=0.1", "distillation.kl_reduction=batchmean", "distillation.cache_dtype=bf16",
    "distillation.contrastive=null", "distillation.hidden.weight=0.2", "distillation.hidden.weight={start: 0.1, end: 0}",
    "distillation.hidden.loss=cosine", "distillation.hidden.normalise=true", "distillation.auxiliary=null",
    "distillation.auxiliary.blocks=[2]", "distillation.auxiliary.weighting=adaptive", "distillation.auxiliary.share_head=true",
    "distillation.auxiliary.dropout=0", "distillation.auxiliary.feature_weight=1", "distillation.contrastive.temperature=2",
    "distillation.contrastive.dim=8", "data.offset_seed=3", "data.offset_cycle=3",
])
def test_every_setting_of_a_term_changes_the_identity(command, override):
    assert identity(command(StudentConfig, ALL_TERMS)) != identity(command(StudentConfig, ALL_TERMS, override))


@pytest.mark.parametrize("override", [
    "distillation.teachers=[{path: moved, weight: 2, layers: {1: 1, 3: 2}}, {path: there, device: cuda:1}]",
    "distillation.cache_path=/elsewhere", "distillation.teachers=[{path: a, weight: 2, layers: {1: 1, 3: 2}}, {path: b, weight: 1.0}]",
    "distillation.hidden={weight: {start: 0.1, end: 0.1, shape: cosine}}",  # a schedule that does not move is a number
])
def test_where_a_teacher_lies_and_runs_does_not_change_the_identity(command, override):
    assert identity(command(StudentConfig, ALL_TERMS)) == identity(command(StudentConfig, ALL_TERMS, override))


def test_reading_the_states_from_a_cache_does_not_change_the_identity(command):
    values = distil(alpha=0.5, temperature={"start": 2, "end": 1})
    assert identity(command(StudentConfig, values)) == identity(command(StudentConfig, values, "distillation.cache=true"))


def test_the_identity_of_schedules_and_layer_maps_survives_json(command):
    keys = identity(command(StudentConfig, ALL_TERMS))
    assert keys["distillation.teachers.0.layers"] == {"1": 1, "3": 2} and keys["distillation.w_ce"] == 0.5
    assert keys["distillation.temperature"] == {"start": 4.0, "end": 1.0, "shape": "linear", "until": 1.0}
    assert content_hash(keys) == content_hash(identity(command(StudentConfig, ALL_TERMS)))


# ---- The configs that are shipped ---------------------------------------------------------------------------------------


def schema_of(values, path):
    """The schema that a shipped file is meant for: by the sections only one stage has, else by its name."""
    if "corpus" in values:
        return CorpusConfig
    if "distillation" in values:
        return student_schema(values)
    if "algorithm" in values:
        return RLConfig
    return TeacherConfig if "lora" in values or "teacher" in path.stem else BaselineConfig


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_is_valid(path):
    values = read_yaml(path)
    check(schema_of(values, path), values, str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_head_of_a_shipped_config_names_its_stage_and_its_command(path):
    head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0]
    stage = int(re.search(r"Stage (\d)", head)[1])
    assert SCHEMAS[stage - 1] is schema_of(read_yaml(path), path)
    for script, shipped in re.findall(r"python (\w+\.py) --config (\S+)", head):
        assert ROOT / shipped == path and script in (SCHEMAS[stage - 1].__doc__ or "")


def test_a_key_that_was_added_since_makes_no_other_run():
    """A folder made before a key existed is still that run, as long as the key has its default; a section left out is no such thing."""
    command = check(StudentConfig, distil(alpha=0.5), "")
    mine = identity(command)
    older = {name: value for name, value in mine.items() if name not in ("training.beta2", "distillation.temperature")}
    assert differing(older, mine, StudentConfig) == []
    changed = identity(check(StudentConfig, distil(alpha=0.5, temperature=2), ""))
    assert differing(older, changed, StudentConfig) == ["distillation.temperature"]
    assert differing(mine, older, StudentConfig) == ["training.beta2", "distillation.temperature"]  # a key that is gone
    with_hidden = identity(check(StudentConfig, distil(alpha=0.5, hidden={"weight": 1.0}), ""))
    assert {"distillation.hidden.weight", "distillation.hidden.loss"} <= set(differing(mine, with_hidden, StudentConfig))
    assert differing(mine, {**mine, "fingerprint.teacher2": "x"}, StudentConfig) == ["fingerprint.teacher2"]
    assert default_of(StudentConfig, "name") is ... and default_of(StudentConfig, "training.beta2") == 0.999
    assert default_of(RLConfig, "rewards.0.kind") is ...


def test_configs_are_shipped_for_every_stage():
    assert {schema_of(read_yaml(path), path) for path in SHIPPED} == set(SCHEMAS)


def test_no_two_shipped_runs_share_a_folder():
    folders = [(values["output"], values["name"]) for values in map(read_yaml, SHIPPED) if "name" in values]
    assert sorted(folders) == sorted(set(folders))


def test_a_config_survives_being_written_and_read(command, tmp_path):
    for values in (distil(alpha=0.5), ALL_TERMS):
        got = command(StudentConfig, values, "training.lr=3e-4")
        assert StudentConfig.model_validate(yaml.safe_load(yaml.safe_dump(got.model_dump()))) == got


def test_every_training_stage_has_the_keys_of_a_run():
    shared = set(RunConfig.model_fields)
    assert all(shared <= set(schema.model_fields) for schema in SCHEMAS[1:])
