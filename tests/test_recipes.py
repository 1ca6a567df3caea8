"""The shipped recipes are what was published: sizes, layer maps, effective lambda; and each -published file against its normalised twin."""

import functools
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from babylm import models
from babylm.config import BaselineConfig, CorpusConfig, ModelSection, MoEPModelSection, StudentConfig, TeacherConfig, student_schema
from babylm.config import __file__ as config_file
from babylm.losses import effective_lambda
from babylm.schema import apply_override, check, read_yaml
from modeling_moep import MoEPForCausalLM

SIZES = ("10M", "100M")
FOLDERS = {size: Path(config_file).parents[1] / "configs" / size for size in SIZES}
SCRIPTS = {"train_teacher.py": TeacherConfig, "train_student.py": StudentConfig}


@functools.cache
def recipes(size):
    """{stem: path} of every training config on the 16,000-entry vocabulary."""
    paths = {path.stem: path for path in sorted(FOLDERS[size].glob("*.yaml"))}
    return {stem: path for stem, path in paths.items() if str(read_yaml(path).get("data", {}).get("corpus")).startswith("corpus_bpe16k")}


def header(path):
    return re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0]


def is_teacher(stem):
    return "-teacher" in stem and "distillation" not in read_yaml(FOLDERS["10M"] / f"{stem}.yaml")


STEMS = sorted(recipes("10M"))
STUDENTS = [stem for stem in STEMS if not is_teacher(stem)]
PAIRS = [stem.removesuffix("-published") for stem in STEMS if stem.endswith("-published")]


@functools.cache
def runs(size):
    """{name: config} of every run that a command in the head of a recipe makes."""
    found = {}
    for path in recipes(size).values():
        for script, overrides in re.findall(r"^#   python (\w+\.py) --config \S+(.*)$", header(path), re.MULTILINE):
            values = read_yaml(path)
            for override in overrides.split():
                apply_override(values, override)
            config = check(SCRIPTS[script], values, str(path))
            assert config.name not in found
            found[config.name] = config
    return found


@functools.cache
def load(stem, size="10M"):
    path = FOLDERS[size] / f"{stem}.yaml"
    return check(TeacherConfig if is_teacher(stem) else StudentConfig, read_yaml(path), str(path))


class Vocabulary:
    """As much of a tokenizer as a model's config asks for."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, entries):
        self.entries = entries

    def __len__(self):
        return self.entries


@functools.cache
def parameters(section_json, entries):
    config = models.model_config(ModelSection.model_validate_json(section_json), Vocabulary(entries))
    with torch.device("meta"):
        return models.count_parameters(AutoModelForCausalLM.from_config(config))


def count(stem, entries=16_000, **changes):
    return parameters(load(stem).model.model_copy(update=changes).model_dump_json(), entries)


def flat(values, prefix=""):
    if not isinstance(values, dict):
        return {prefix: values}
    return {path: leaf for name, inner in values.items() for path, leaf in flat(inner, f"{prefix}.{name}".strip(".")).items()}


def differences(first, second):
    first, second = flat(read_yaml(first)), flat(read_yaml(second))
    return {path for path in first | second if first.get(path) != second.get(path)}


# ---- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stem", "published", "changes"), [
    ("babyllama", 58.34, {}),
    ("babyllama-teacher-gpt2", 704.93, {"max_positions": 256}),  # as published; ours holds 512, for the official evaluation
    ("babyllama-teacher-llama", 359.97, {}),
    ("babyllama2", 345.36, {}),
    ("babyllama2-teacher", 345.36, {}),
    ("distilledgpt-teacher-gpt2", 26.66, {"max_positions": 256}),
    ("distilledgpt", 26.66, {"max_positions": 256}),
    ("distilledgpt-teacher-llama", 38.74, {}),
])
def test_a_recipe_has_the_published_number_of_parameters(stem, published, changes):
    assert round(count(stem, **changes) / 1e6, 2) == published


@pytest.mark.parametrize("name, published", [("GPT2-97M", 97.54), ("Llama-16M", 16.58)])
def test_the_small_teachers_of_other_studies_come_from_the_changes_that_the_head_names(name, published):
    (path,) = [path for path in recipes("10M").values() if f"name={name} " in header(path)]
    values = read_yaml(path)
    for override in re.search(f"name={name} .*", header(path))[0].split():
        apply_override(values, override)
    config = check(TeacherConfig, values, str(path))
    section = config.model.model_copy(update={"max_positions": 256})
    assert config.name == name and round(parameters(section.model_dump_json(), 16_000) / 1e6, 2) == published


def test_babyllama2_is_untied():
    assert load("babyllama2").model.tied is False
    assert count("babyllama2", tied=True) == 329_995_200
    assert count("babyllama2", tied=True, entries=32_000) == count("babyllama2") == 345_355_200, "so the count alone decides nothing"


@pytest.mark.parametrize("stem", ["babyllama-gptj", "babyllama-gpt2"])
def test_students_of_other_architectures_are_of_like_size(stem):
    other, llama = load(stem).model, load("babyllama").model
    assert (other.layers, other.width, other.heads) == (llama.layers, llama.width, llama.heads)
    assert count(stem) == pytest.approx(count("babyllama"), rel=0.01)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stem", STEMS)
def test_the_number_of_parameters_that_a_file_states_is_right(stem, size):
    text = (FOLDERS[size] / f"{stem}.yaml").read_text(encoding="utf-8")
    stated = re.search(r"^  layers: .*?([\d,]{9,}) parameters", text, re.MULTILINE)[1]
    assert int(stated.replace(",", "")) == count(stem)


# ---- Teachers and layer maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stem", STUDENTS)
def test_every_teacher_is_made_by_a_shipped_command_with_the_same_vocabulary(stem, size):
    student = load(stem, size)
    for entry in student.distillation.entries:
        folder, name = entry.path.split("/")
        teacher = runs(size)[name]
        assert folder == teacher.output and teacher.data == student.data


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stem", STUDENTS)
def test_no_teacher_started_from_its_students_initial_weights(stem, size):
    student = load(stem, size)
    for entry in student.distillation.entries:
        teacher = runs(size)[entry.path.split("/")[1]]
        assert teacher.model != student.model or teacher.seed != student.seed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stem", STUDENTS)
def test_maps_and_classifiers_fit_the_depths_of_the_models(stem, size):
    student = load(stem, size)
    for entry in student.distillation.entries:
        depth = runs(size)[entry.path.split("/")[1]].model.layers
        assert all(0 <= theirs <= depth and 0 <= ours <= student.model.layers for theirs, ours in entry.layers.items())
        assert len(set(entry.layers.values())) == len(entry.layers)
        assert list(entry.layers.values()) == sorted(entry.layers.values()), "a deeper teacher state teaches a deeper student state"
    if student.distillation.auxiliary:
        assert set(student.distillation.auxiliary.blocks) <= set(range(1, student.model.layers))


def test_the_published_map_leaves_the_final_states_out_and_another_recipe_adds_them():
    published, final = load("dskd").distillation.teachers, load("dskd-final").distillation.teachers
    gpt2, llama = (entry.layers for entry in published)
    assert gpt2 == {0: 0, 3: 2, 6: 4, 9: 6, 12: 8, 15: 10, 18: 12, 21: 14, 23: 15}
    assert llama == {0: 0, 3: 1, 6: 3, 9: 5, 12: 7, 15: 9, 18: 11, 21: 13, 23: 15}
    assert [entry.layers for entry in final] == [{**layers, 24: 16} for layers in (gpt2, llama)]
    assert differences(FOLDERS["10M"] / "dskd.yaml", FOLDERS["10M"] / "dskd-final.yaml") == {
        "name", "distillation.teachers"}


# ---- Normalised and published -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("stem", "normalised", "published"), [  # by hand: w_kl / w_ce, times 127 predicted positions
    ("babyllama", 1, 127), ("babyllama2", 1, 127), ("distilledgpt", 1, 127), ("dskd", 0.1, 12.7), ("dskd-aux", 0.5, None),
    ("dskd-aux-one-teacher", 0.5, None), ("contrastive", 0.5, 63.5), ("hidden-state", 1, 127), ("babyllama-gptj", 1, None),
    ("babyllama-gpt2", 1, None), ("dskd-final", 0.1, None), ("self-distillation", 1, None), ("no-teacher", 0, None),
])
def test_effective_lambda(stem, normalised, published, size):
    for name, expected in ((stem, normalised), (f"{stem}-published", published)):
        if expected is None:
            assert name not in recipes(size)
            continue
        config = load(name, size)
        w_ce, w_kl = config.distillation.weights
        assert w_ce.constant and w_kl.constant
        weight = effective_lambda(w_ce.start, w_kl.start, config.distillation.kl_reduction, config.data.seq_len)
        assert weight == pytest.approx(expected)
        assert expected == 0 or f"effective lambda {expected:g}" in (FOLDERS[size] / f"{name}.yaml").read_text(encoding="utf-8")


def test_every_student_stands_in_the_table_of_lambdas():
    table = test_effective_lambda.pytestmark[0].args[1]
    assert {stem for stem, *_ in table} == {stem.removesuffix("-published") for stem in STUDENTS}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stem", PAIRS)
def test_a_published_recipe_differs_from_its_twin_in_what_it_says(stem, size):
    twin, published = FOLDERS[size] / f"{stem}.yaml", FOLDERS[size] / f"{stem}-published.yaml"
    changed = differences(twin, published)
    explained = {path for path in changed if re.search(  # its line says what was published
        rf"^ +{path.split('.')[-1]}: \S+ +# .*published", published.read_text(encoding="utf-8"), re.MULTILINE)}
    assert changed >= {"name", "distillation.kl_reduction"} and changed - explained == {"name"}
    first, second = flat(read_yaml(twin)), flat(read_yaml(published))
    assert (first["distillation.kl_reduction"], second["distillation.kl_reduction"]) == ("token_mean", "batchmean")
    for path in changed:
        if path.endswith(".weight") and second[path] == 0:  # a term that the published code never trained
            assert "no gradient" in header(published) and "weight is 0 here" in header(published)


@pytest.mark.parametrize("stem", STEMS)
def test_recipes_for_both_corpora_differ_in_names_and_paths_alone(stem):
    small, large = (FOLDERS[size] / f"{stem}.yaml" for size in SIZES)
    assert differences(small, large) <= {"name", "data.corpus", "logging.eval_steps", "distillation.teacher", "distillation.teachers"}
    text = large.read_text(encoding="utf-8").replace("corpus_bpe16k_100M  # 16", "corpus_bpe16k       # 16")
    text = re.sub(r"eval_steps: .*", "", text.replace("-100M", "").replace("100M", "10M"))
    assert text == re.sub(r"eval_steps: .*", "", small.read_text(encoding="utf-8"))


@pytest.mark.parametrize("size", SIZES)
def test_the_vocabulary_of_the_recipes_is_trained_as_published(size):
    path = FOLDERS[size] / "corpus-bpe16k.yaml"
    corpus = check(CorpusConfig, read_yaml(path), str(path))
    assert (corpus.tokenizer.path, corpus.tokenizer.vocab_size, corpus.tokenizer.min_frequency) == (None, 16_000, 2)
    assert {load(stem, size).data.corpus for stem in STEMS} == {corpus.corpus.output}
    assert set(recipes("10M")) == set(recipes(size))


# ---- MoE-P ----------------------------------------------------------------------------------------------------------------

MOEP = [(size, path.stem) for size in SIZES for path in sorted(FOLDERS[size].glob("moep*.yaml"))]
SHAPES = {"moep-paper": (16_384, 28_434_432), "moep-paper-control": (16_384, 27_782_400), "moep": (50_257, 41_441_664),
          "moep-control": (50_257, 40_789_632), "moep-127M": (50_257, 126_530_304), "moep-127M-published": (50_257, 126_530_304)}
CPU = FOLDERS["10M"].parent / "cpu"


def moep_load(path):
    values = read_yaml(path)
    return check(student_schema(values) if "distillation" in values else BaselineConfig, values, str(path))


def moep_parameters(path, entries):
    section = moep_load(path).model
    if not isinstance(section, MoEPModelSection):
        return parameters(section.model_dump_json(), entries)
    with torch.device("meta"):
        return models.count_parameters(MoEPForCausalLM(models.model_config(section, Vocabulary(entries))))


@pytest.mark.parametrize(("size", "stem"), MOEP)
def test_a_moep_recipe_states_its_number_of_parameters(size, stem):
    path, (entries, expected) = FOLDERS[size] / f"{stem}.yaml", SHAPES[stem]
    assert f"{expected:,} parameters" in re.search(r"^  layers: .*$", path.read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert moep_parameters(path, entries) == expected
    assert moep_load(path).data.corpus.startswith("corpus_bpe16384" if entries == 16_384 else "corpus_split")


def test_the_moep_recipes_are_shipped_for_both_corpora_and_start_from_the_defaults_of_the_paper():
    assert sorted(MOEP) == sorted((size, stem) for size in SIZES for stem in SHAPES)
    assert moep_load(FOLDERS["10M"] / "moep-paper.yaml").model == moep_load(FOLDERS["10M"] / "moep.yaml").model == MoEPModelSection()


@pytest.mark.parametrize("stem", [*SHAPES, "corpus-bpe16384"])
def test_moep_recipes_for_both_corpora_differ_in_names_paths_and_validation_steps_alone(stem):
    small, large = (FOLDERS[size] / f"{stem}.yaml" for size in SIZES)
    changed = {"corpus.input", "corpus.output"} if "corpus" in stem else {"name", "data.corpus", "logging.eval_steps"}
    first, second = flat(read_yaml(small)), flat(read_yaml(large))
    assert differences(small, large) == changed | ({"distillation.teacher"} & first.keys())
    for path in differences(small, large) - {"logging.eval_steps"}:
        sign = "-" if path in ("name", "distillation.teacher") else "_"
        assert second[path] == first[path].removesuffix("_10M") + sign + "100M"


@pytest.mark.parametrize("folder", [FOLDERS["10M"], FOLDERS["100M"], CPU], ids=lambda folder: folder.name)
def test_a_dense_control_differs_from_its_moep_recipe_in_the_model_and_in_balance_alone(folder):
    pairs = {"moep": "dense", "moep-none": "dense-none"} if folder is CPU else {"moep": "moep-control", "moep-paper": "moep-paper-control"}
    for stem, control in pairs.items():
        paths = folder / f"{stem}.yaml", folder / f"{control}.yaml"
        ours, theirs = map(moep_load, paths)
        changed = {path for path in differences(*paths) if not path.startswith("model.")}
        if isinstance(theirs, BaselineConfig):  # of stage 3: no section distillation, so its loss is the cross-entropy alone
            assert ours.distillation.weights[0].largest == 1 and ours.distillation.weights[1].largest == 0 and not ours.distillation.entries
            changed = {path for path in changed if path not in ("distillation.w_ce", "distillation.w_kl")}
        assert changed == {"name", "distillation.balance.weight"}
        assert (ours.model.layers, ours.model.width, ours.model.heads, ours.model.max_positions, ours.model.dropout) == (
            theirs.model.layers, theirs.model.width, theirs.model.heads, theirs.model.max_positions, theirs.model.dropout)


def test_the_cpu_study_compares_moep_and_dense_students_of_equal_size():
    entries = read_yaml(CPU / "corpus.yaml")["tokenizer"]["vocab_size"]
    counted = {stem: moep_parameters(CPU / f"{stem}.yaml", entries) for stem in ("moep", "moep-none", "dense", "dense-none")}
    assert entries == 8192
    assert counted == {"moep": 2_578_944, "moep-none": 2_578_944, "dense": 2_574_232, "dense-none": 2_574_232}
    assert counted["dense"] == pytest.approx(counted["moep"], rel=0.005)
    for stem, count in counted.items():
        assert f"{count:,} parameters" in (CPU / f"{stem}.yaml").read_text(encoding="utf-8")
    assert differences(CPU / "moep.yaml", CPU / "student.yaml") - {"name", "distillation.balance.weight"} == {
        path for path in differences(CPU / "moep.yaml", CPU / "student.yaml") if path.startswith("model.")}, "taught as student.yaml is"


@pytest.mark.parametrize("size", SIZES)
def test_the_published_moep_recipe_sums_its_kl_and_balances_nothing(size):
    twin, published = (FOLDERS[size] / f"moep-127M{suffix}.yaml" for suffix in ("", "-published"))
    assert differences(twin, published) == {"name", "distillation.kl_reduction", "distillation.balance.weight"}
    for path, reduction, weight, balance in ((twin, "token_mean", 1, 0.01), (published, "batchmean", 511, 0)):
        config = moep_load(path)
        w_ce, w_kl = config.distillation.weights
        assert effective_lambda(w_ce.start, w_kl.start, config.distillation.kl_reduction, config.data.seq_len) == pytest.approx(weight)
        assert (config.distillation.kl_reduction, config.distillation.balance.weight.largest) == (reduction, balance)
        assert f"effective lambda {weight}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("size", SIZES)
def test_the_teachers_and_vocabularies_of_moep_recipes_are_made_by_shipped_commands(size):
    folder = FOLDERS[size]
    shipped = {path: read_yaml(path) for path in folder.glob("*.yaml")}
    corpora = {config.corpus.output: config for path, values in shipped.items() if path.stem.startswith("corpus")
               for config in [check(CorpusConfig, values, path.name)]}
    teachers = {values["name"]: (path, check(TeacherConfig, values, path.name)) for path, values in shipped.items()
                if "lora" in values or "teacher" in path.stem and "distillation" not in values}
    for stem in SHAPES:
        config = moep_load(folder / f"{stem}.yaml")
        tokenizer = corpora[config.data.corpus].tokenizer
        assert tokenizer.path == "gpt2" if SHAPES[stem][0] == 50_257 else (tokenizer.path, tokenizer.vocab_size) == (None, 16_384)
        for entry in config.distillation.entries if hasattr(config, "distillation") else ():
            output, name = entry.path.split("/")
            path, teacher = teachers[name]
            assert teacher.output == output and teacher.data.corpus == config.data.corpus
            assert f"python train_teacher.py --config configs/{size}/{path.name}\n" in header(path)
    assert corpora[f"corpus_bpe16384{'' if size == '10M' else '_100M'}"].corpus.input == f"train_{size}"
