"""Fine-tuning on GLUE: rows, truncation, pooling, the epoch that is chosen, what is refused, what a rerun repeats."""

import json
import random
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from babylm import models
from babylm.config import ModelSection, MoEPModelSection
from babylm.schema import UserError
from eval import classifier, finetune, glue

ROWS = {
    "boolq": {"question": "q", "passage": "p", "label": 1},
    "mnli": {"premise": "p", "hypothesis": "h", "label": 2},
    "mrpc": {"sentence1": "a", "sentence2": "b", "label": 1},
    "multirc": {"question": "q", "answer": "a", "paragraph": "p", "label": 0},
    "qqp": {"question1": "a", "question2": "b", "label": 0},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 0},
    "wsc": {"text": "t", "span1_text": "Mark", "span2_text": "him", "label": 1},
}
QUICK = ["training.epochs=6", "training.batch_size=8", "training.lr=3e-3", "training.dev_fraction=0.25", "seeds=[1]"]
RTE = glue.Task(first="{sentence1}", second="{sentence2}")


def section(*overrides):
    """The training section of a call with these overrides, for RTE."""
    config, tasks = finetune.read_config(finetune.CONFIG, overrides)
    return finetune.training_of(tasks["rte"], config.training)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made_up(n, seed, wrong=0.0):
    """RTE rows that one word of the second sentence decides; `wrong`: share of labels that are flipped."""
    draw, rows = random.Random(seed), []
    for i in range(n):
        label = i % 2
        nouns = [draw.choice(["dog", "cat", "ox", "child", "teacher"]) for _ in range(draw.randint(1, 6))]
        rows.append({"sentence1": "the " + " and the ".join(nouns), "sentence2": nouns[0] + (" sleeps" if label else " eats"),
                     "label": 1 - label if draw.random() < wrong else label})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with made-up files of RTE."""
    folder = tmp_path_factory.mktemp("glue")
    write_rows(folder / "rte.train.jsonl", made_up(96, 1))
    write_rows(folder / "rte.valid.jsonl", made_up(31, 2))
    return folder


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """checkpoints("gpt2") -> folder of a small random model far from uniform: gpt2, llama, moep or bert. Read only."""
    root = tmp_path_factory.mktemp("checkpoints")

    def build(name):
        torch.manual_seed(5)
        if name == "bert":
            return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                              intermediate_size=64, max_position_embeddings=64))
        if name == "moep":
            return models.build_model(MoEPModelSection(architecture="moep", layers=3, width=32, heads=2, parallel_width=16,
                                                       parallel_heads=2, max_positions=64), tokenizer, seed=5)
        return models.build_model(ModelSection(architecture=name, layers=2, width=32, heads=2, max_positions=64), tokenizer, seed=5)

    def path(name):
        if not (root / name).exists():
            (root / name).mkdir()
            model = build(name)
            with torch.no_grad():
                for parameter in model.parameters():
                    # Otherwise BERT's first token, which is classified, hardly sees the others.
                    parameter.mul_((10 if name == "bert" else 3) if parameter.dim() > 1 else 1)
            models.save_model(model, tokenizer, root / name)
        return root / name

    return path


@pytest.fixture
def call(monkeypatch):
    """call(model, ..., "key=value") runs the command in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
        finetune.main()

    return run


def encoded(checkpoint, rows, causal=True, limit=64):
    """The rows tokenised for a checkpoint, as `run` does it."""
    read = glue.Rows(Path("made-up"), [(row["sentence1"], row["sentence2"]) for row in rows], [row["label"] for row in rows],
                     list(range(len(rows))))
    return glue.tokenise(read, models.load_tokenizer(checkpoint), limit, "left" if causal else "right")


# ---- The config -----------------------------------------------------------------------------------------------------


def test_the_shipped_yaml_is_the_official_recipe_and_equals_the_schemas_defaults():
    config, tasks = finetune.read_config(finetune.CONFIG, [])
    assert config == finetune.Config() and list(tasks) == list(ROWS)
    used = {name: finetune.training_of(task, config.training) for name, task in tasks.items()}
    assert {name: (t.lr, t.batch_size, t.epochs) for name, t in used.items()} == {
        **dict.fromkeys(tasks, (3e-5, 32, 10)), "boolq": (3e-5, 16, 10), "multirc": (3e-5, 16, 10), "wsc": (3e-5, 32, 30)}
    assert {name for name, task in tasks.items() if task.metric == "f1"} == {"mrpc", "qqp"}
    assert tasks["mnli"].labels == [0, 1, 2]
    assert {name: task.size for name, task in tasks.items()} == {
        "boolq": 1635, "mnli": 4908, "mrpc": 204, "multirc": 2424, "qqp": 20215, "rte": 139, "wsc": 52}


def test_overrides_reach_training_and_tasks_and_lora_has_its_own_rate():
    config, tasks = finetune.read_config(finetune.CONFIG, ["training.mode=lora", "tasks.wsc.epochs=7", "tasks.rte.lr=1e-3"])
    assert [finetune.training_of(tasks[name], config.training).lr for name in ("wsc", "rte")] == [3e-4, 1e-3]
    assert finetune.training_of(tasks["wsc"], config.training).epochs == 7


@pytest.mark.parametrize(("override", "message"), [
    ("tasks.rte.frist=x", r"tasks\.rte: 1 mistake.*\n.*frist: unknown key; did you mean first\?"),
    ("tasks.mnli.metric=f1", "metric f1 needs two labels, not 3"),
    ("training.poling=last", r"training\.poling: unknown key; did you mean pooling\?"),
    ("training.lr=0", r"training\.lr: .*greater than 0"),
    ("tasks=null", "tasks: expected the tasks"),
    ("seeds=[42,1,42]", "seeds: 42 stands there more than once"),
])
def test_mistakes_in_the_config_are_named(override, message):
    with pytest.raises(UserError, match=message):
        finetune.read_config(finetune.CONFIG, [override])


# ---- Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "texts"), {
    "boolq": ("q", "p"), "mnli": ("p", "h"), "mrpc": ("a", "b"), "multirc": ("Question: q Answer: a", "p"), "qqp": ("a", "b"),
    "rte": ("a", "b"), "wsc": ('Does "him" refer to "Mark" in this passage?', "t")}.items())
def test_every_task_reads_the_official_fields(tmp_path, name, texts):
    task = finetune.read_config(finetune.CONFIG, [])[1][name]
    path = write_rows(tmp_path / "x.jsonl", [ROWS[name], {**ROWS[name], "label": 1 - ROWS[name]["label"] % 2}])
    rows = glue.read_rows(path, name, task)
    assert rows.texts == [texts, texts] and rows.labels[0] == ROWS[name]["label"]
    # Questions on one passage share it: on both sides of the split, the passage alone would give the answer away.
    assert len(set(rows.groups)) == (1 if name in ("boolq", "multirc", "wsc") else 2)


def test_a_labels_place_in_the_list_is_its_class_and_its_value_is_predicted(tmp_path, checkpoints, call):
    """A label that is not its own index: class numbers must not leak into the predictions."""
    names = {0: "entailment", 1: "not_entailment"}
    for part, n in (("train", 48), ("valid", 20)):
        write_rows(tmp_path / f"rte.{part}.jsonl", [{**row, "label": names[row["label"]]} for row in made_up(n, 3)])
    call(checkpoints("gpt2"), "--data", tmp_path, "--output", tmp_path, "tasks.rte.labels=[not_entailment, entailment]", *QUICK)
    rows = glue.read_rows(tmp_path / "rte.valid.jsonl", "rte", glue.Task(
        first="{sentence1}", second="{sentence2}", labels=["not_entailment", "entailment"]))
    assert rows.labels == [1, 0] * 10
    folder = tmp_path / "gpt2/main/finetune/rte"
    answers = [row["pred"] for row in json.loads((folder / "predictions.json").read_text())["rte"]["predictions"]]
    right = sum(answer == names[row["label"]] for answer, row in zip(answers, made_up(20, 3), strict=True))
    assert set(answers) == set(names.values())
    assert json.loads((folder / "summary.json").read_text())["score"] == pytest.approx(100 * right / 20) and right >= 15


@pytest.mark.parametrize(("line", "message"), [
    ('{"sentence1": "a", "sent', r"rte\.train\.jsonl, line 3: not JSON \(cut short\?\).*fetch the file again"),
    ("[1]", r"line 3: not a JSON object: '\[1\]'"),
    ('{"premise": "a", "label": 1}', r"line 3: no field 'sentence1'; the row has premise, label\. Correct tasks\.rte in finetune\.yaml, "
                                     r"or with an override such as tasks\.rte\.first=\{premise\}"),
    ('{"sentence1": "a", "sentence2": null, "label": 1}', "line 3: the field 'sentence2' is no text but None"),
    ('{"sentence1": "a", "sentence2": "b", "label": -1}', r"line 3: the label -1 is not one of \[0, 1\].*hidden test sets"),
    ('{"sentence1": "a", "sentence2": "b"}', "line 3: no field 'label'"),
])
def test_a_broken_row_is_named_by_file_line_and_field(tmp_path, line, message):
    path = write_rows(tmp_path / "rte.train.jsonl", [ROWS["rte"], {**ROWS["rte"], "label": 1}])
    path.write_text(path.read_text() + line)
    with pytest.raises(UserError, match=message):
        glue.read_rows(path, "rte", RTE)


def test_a_line_separator_inside_a_text_is_no_line_end(tmp_path):
    path = tmp_path / "rte.train.jsonl"
    rows = [{"sentence1": "a\u2028b\x85c", "sentence2": "d", "label": label} for label in (0, 1)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8")
    assert glue.read_rows(path, "rte", RTE).texts[1] == ("a\u2028b\x85c", "d")


def test_absent_tasks_are_skipped_with_a_line_half_present_ones_are_errors(tmp_path, data, capsys):
    tasks = finetune.read_config(finetune.CONFIG, [])[1]
    assert list(glue.read_tasks(data, tasks)) == ["rte"]
    out = capsys.readouterr().out
    assert f"boolq: skipped, {data} has no boolq.train.jsonl" in out
    assert "rte: not the official rte.valid.jsonl: 31 rows instead of 139: the score is not comparable" in out
    for size in (31, None):
        glue.read_tasks(data, {"rte": tasks["rte"].model_copy(update={"size": size})})
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="holds none of the tasks boolq, mnli"):
        glue.read_tasks(tmp_path, tasks)
    shutil.copy(data / "rte.train.jsonl", tmp_path)
    with pytest.raises(UserError, match=r"rte\.valid\.jsonl is missing beside rte\.train\.jsonl"):
        glue.read_tasks(tmp_path, tasks)
    write_rows(tmp_path / "rte.valid.jsonl", [ROWS["rte"]] * 3)
    with pytest.raises(UserError, match="3 rows with 1 different labels"):
        glue.read_tasks(tmp_path, tasks)


def test_the_development_split_is_seeded_and_keeps_groups_together():
    rows = glue.Rows(Path("x"), [("", "")] * 60, [0, 1] * 30, [i // 5 for i in range(60)])
    fit, dev = glue.split(rows, 0.2, seed=1)
    assert sorted(fit + dev) == list(range(60)) and 12 <= len(dev) <= 16
    assert not {i // 5 for i in fit} & {i // 5 for i in dev}
    assert glue.split(rows, 0.2, 1) == (fit, dev) != glue.split(rows, 0.2, 2)
    with pytest.raises(UserError, match="60 rows in 1 groups are too few"):
        glue.split(glue.Rows(Path("x"), [("", "")] * 60, [0, 1] * 30, [0] * 60), 0.2, 1)


# ---- Tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lengths", "budget", "kept"), [
    ((10, 20), 30, (10, 20)), ((10, 20), 15, (5, 10)), ((300, 100), 100, (75, 25)), ((5, 10_000), 500, (1, 499)),
    ((10_000, 5), 500, (499, 1)), ((40, 0), 10, (10, 0)), ((0, 40), 10, (0, 10)), ((0, 0), 10, (0, 0)),
])
def test_over_long_texts_lose_the_same_share_and_none_is_lost(lengths, budget, kept):
    assert glue.in_proportion(*lengths, budget) == kept


def test_inputs_are_what_the_tokenizer_makes_of_a_pair_and_are_cut_within_the_limit(checkpoints):
    """Separators survive the cut, both texts keep their beginnings, and what was cut is counted."""
    tokenizer = models.load_tokenizer(checkpoints("gpt2"))
    rows = [{"sentence1": "the dog sees", "sentence2": "no cat", "label": 0},
            {"sentence1": "the dog " * 60, "sentence2": "some cats " * 20, "label": 1}]
    tokens = encoded(checkpoints("gpt2"), rows)
    assert tokens.ids[0] == tokenizer("the dog sees", "no cat").input_ids and tokens.cut == 1
    first, second = (tokenizer(rows[1][name], add_special_tokens=False).input_ids for name in ("sentence1", "sentence2"))
    assert tokens.ids[1][0] == tokenizer.bos_token_id and len(tokens.ids[1]) == 64
    middle = tokens.ids[1].index(tokenizer.eos_token_id)
    kept = tokens.ids[1][1:middle], tokens.ids[1][middle + 1 :]
    assert kept == (first[: len(kept[0])], second[: len(kept[1])])
    assert len(kept[0]) / len(first) == pytest.approx(len(kept[1]) / len(second), abs=0.02)


def test_a_batch_pads_on_the_side_asked_for_and_batches_hold_every_row_once():
    tokens = glue.Tokens([[5], [6, 7, 8]], [[0], [0, 1, 1]], [1, 0], 0, 9, "left", True)
    inputs, labels = tokens.batch([0, 1], torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[9, 9, 5], [6, 7, 8]] and inputs["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0], [0, 1, 1]] and labels.tolist() == [1, 0]
    lengths = [random.Random(i).randint(1, 50) for i in range(203)]
    draw = torch.Generator().manual_seed(0)
    epochs = [classifier.batches_of(lengths, 4, draw) for _ in range(2)]
    assert epochs[0] != epochs[1] and all(sorted(sum(batches, [])) == list(range(203)) for batches in epochs)
    assert max(len(batch) for batch in epochs[0]) == 4 and sum(len(batch) < 4 for batch in epochs[0]) == 1


# ---- Pooling and padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_never_reads_a_pad(side):
    hidden = torch.arange(10.0).reshape(1, 5, 2)
    mask = torch.tensor([[0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]])
    real = hidden[:, mask[0].bool()]
    assert torch.equal(classifier.pool(hidden, mask, "first"), real[:, 0])
    assert torch.equal(classifier.pool(hidden, mask, "last"), real[:, -1])
    assert torch.equal(classifier.pool(hidden, mask, "mean"), real.mean(1))


@pytest.mark.parametrize("name", ["gpt2", "llama", "moep", "bert"])
@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
@torch.no_grad()
def test_a_rows_logits_do_not_depend_on_the_rest_of_its_batch(checkpoints, name, pooling):
    """Left padding moves GPT-2's positions unless they are given; right padding puts a pad where the last token is looked for."""
    encoder = classifier.load_encoder(str(checkpoints(name)))
    causal = classifier.is_causal(encoder)
    assert causal == (name != "bert")
    tokens = encoded(checkpoints(name), made_up(6, 4), causal)
    model = classifier.Classifier(encoder, pooling, causal, 2, 0.1).eval()
    together = model(**tokens.batch(range(6), torch.device("cpu"))[0])
    alone = torch.cat([model(**tokens.batch([i], torch.device("cpu"))[0]) for i in range(6)])
    assert len({len(ids) for ids in tokens.ids}) > 2
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - together[0]).abs().max() > 1e-3 or (causal and pooling == "first")


def test_a_model_that_padding_changes_is_refused(checkpoints):
    """What GPT-2 is when nobody tells it the positions."""
    model = classifier.Classifier(classifier.load_encoder(str(checkpoints("gpt2"))), "last", True, 2, 0.1)
    classifier.require_padding_is_harmless(model, "left")
    model.counts_positions = False
    with pytest.raises(UserError, match="GPT2Model: padding on the left changes the states of the other tokens by up to"):
        classifier.require_padding_is_harmless(model, "left")


def test_a_causal_model_is_read_at_its_last_token_others_at_their_first(checkpoints):
    read = {name: finetune.open_subject(str(checkpoints(name)), "main", section()) for name in ("gpt2", "moep", "bert")}
    assert {name: (subject.causal, subject.pooling) for name, subject in read.items()} == {
        "gpt2": (True, "last"), "moep": (True, "last"), "bert": (False, "first")}
    shorter = finetune.open_subject(str(checkpoints("gpt2")), "main", section("training.max_length=20"))
    assert (read["gpt2"].limit, shorter.limit) == (64, 20)


@torch.no_grad()
def test_a_causal_models_first_token_gives_every_input_the_same_answer(checkpoints):
    tokens = encoded(checkpoints("gpt2"), made_up(20, 4))
    model = classifier.Classifier(classifier.load_encoder(str(checkpoints("gpt2"))), "first", True, 2, 0.1)
    logits = classifier.predict(model, tokens, section(), "")
    assert torch.allclose(logits, logits[:1].expand(20, 2), atol=1e-6)


# ---- Loading --------------------------------------------------------------------------------------------------------


def broken_copy(source, target, change):
    """A copy of a checkpoint whose weights went through `change` (a dict, in place)."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_and_broken_weights_are_errors(checkpoints, tmp_path):
    lacking = broken_copy(checkpoints("gpt2"), tmp_path / "lacking", lambda weights: weights.pop("transformer.h.1.mlp.c_fc.weight"))
    with pytest.raises(UserError, match=r"lacks the weights h\.1\.mlp\.c_fc\.weight \(1 in all\)"):
        classifier.load_encoder(str(lacking))
    nan = broken_copy(checkpoints("gpt2"), tmp_path / "nan", lambda weights: weights["transformer.ln_f.weight"].fill_(torch.nan))
    with pytest.raises(UserError, match="hidden states are not finite"):
        finetune.open_subject(str(nan), "main", section())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter: merge it"):
        classifier.load_encoder(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="has no folder chck_1M"):
        finetune.open_subject(str(checkpoints("gpt2")), "chck_1M", section())


def test_the_head_is_drawn_from_the_seed_whatever_was_drawn_before(checkpoints):
    heads = []
    for seed in (1, 1, 2):
        torch.rand(len(heads) * 7 + 1)
        built = classifier.build_classifier(str(checkpoints("gpt2")), section(), classifier.Lora(), "last", True, 2, seed)
        heads.append(torch.cat([weight.flatten() for weight in built.head.parameters()]).cpu())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


# ---- Training -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls_to_its_floor():
    for schedule in ("cosine", "linear"):
        training = section(f"training.schedule={schedule}", "training.warmup_fraction=0.1")
        factors = [classifier.lr_factor(step, 100, training) for step in range(101)]
        assert factors[10] == max(factors) == 1 and factors[100] == pytest.approx(0.1) and 0 < factors[0] < 0.2
        assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert classifier.lr_factor(99, 100, section("training.schedule=constant", "training.warmup_fraction=0")) == 1


@pytest.mark.parametrize(("mode", "precision"), [("full", "fp32"), ("full", "bf16"), ("lora", "fp32")])
def test_what_is_meant_to_train_does_and_nothing_else(checkpoints, mode, precision):
    """LoRA trains its matrices and the head, not the base; both learn a task that one word decides."""
    faster = ["training.lr=1e-2"] if mode == "lora" else []
    training = section(f"training.mode={mode}", f"training.precision={precision}", *QUICK[:4], *faster)
    model = classifier.build_classifier(str(checkpoints("gpt2")), training, classifier.Lora(), "last", True, 2, 1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tokens = encoded(checkpoints("gpt2"), made_up(96, 1))
    classifier.train(model, tokens.take(range(72)), tokens.take(range(72, 96)), training, RTE, 1, "")
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    if mode == "lora":
        assert changed == {name for name in before if name.startswith("head.") or "lora_" in name}
        assert len([name for name in changed if "lora_" in name]) == 2 * 4 * 2
    else:
        assert changed == set(before)
    answers = classifier.predict(model, encoded(checkpoints("gpt2"), made_up(31, 2)), training, "").argmax(1).tolist()
    assert classifier.scores(answers, [row["label"] for row in made_up(31, 2)], ["accuracy"])["accuracy"] > 85


@pytest.mark.parametrize("name", ["gpt2", "llama", "moep", "bert"])
def test_what_lora_does_not_reach_is_printed(checkpoints, name, capsys):
    """The share is that of what peft has adapted: all matrices outside the embeddings, but for the experts of MoE-P."""
    model = classifier.build_classifier(str(checkpoints(name)), section("training.mode=lora"), classifier.Lora(), "last", True, 2, 1)
    adapted = sum(module.base_layer.weight.numel() for module in model.encoder.modules() if hasattr(module, "base_layer"))
    encoder = classifier.load_encoder(str(checkpoints(name)))
    whole = sum(weight.numel() for at, weight in encoder.named_parameters()
                if weight.dim() > 1 and not any(word in at for word in ("wte", "wpe", "embed")))
    assert classifier.share_without_adapter(encoder) == pytest.approx(1 - adapted / whole)
    assert (adapted < whole) == (name == "moep")
    finetune.open_subject(str(checkpoints(name)), "main", section("training.mode=lora"))
    lora = capsys.readouterr().out
    finetune.open_subject(str(checkpoints(name)), "main", section())
    said = f"{name}: {1 - adapted / whole:.0%} of its weights outside the embeddings lie in no linear layer: LoRA leaves them as they are"
    assert (said in lora) == (name == "moep") and "lie in no linear layer" not in capsys.readouterr().out


def test_the_weights_of_the_best_epoch_are_kept_and_not_those_of_the_last(checkpoints):
    training = section("training.epochs=5", "training.lr=3e-3", "training.schedule=constant", "training.batch_size=8")
    model = classifier.build_classifier(str(checkpoints("gpt2")), training, classifier.Lora(), "last", True, 2, 1)
    tokens = encoded(checkpoints("gpt2"), made_up(96, 1, wrong=0.3))
    dev = tokens.take(range(60, 96))
    history, best = classifier.train(model, tokens.take(range(60)), dev, training, RTE, 1, "")
    logits = classifier.predict(model, dev, training, "")
    assert F.cross_entropy(logits, torch.tensor(dev.labels)).item() == pytest.approx(history[best - 1]["dev_loss"], rel=1e-5)
    assert best < 5 and history[best - 1]["dev_accuracy"] == max(row["dev_accuracy"] for row in history)


def test_the_reported_rows_have_no_part_in_choosing_the_epoch(checkpoints, tmp_path, call):
    """With all their labels turned round, the same epoch is chosen and the same answers are given: the score is what is left."""
    folders = []
    for name in ("as is", "turned"):
        folder = tmp_path / name
        write_rows(folder / "rte.train.jsonl", made_up(96, 1, wrong=0.3))
        rows = made_up(30, 2)
        write_rows(folder / "rte.valid.jsonl", [{**row, "label": row["label"] ^ (name == "turned")} for row in rows])
        call(checkpoints("gpt2"), "--data", folder, "--output", folder, *QUICK, "training.schedule=constant")
        folders.append(json.loads((folder / "gpt2/main/finetune/rte/seeds/1.json").read_text()))
    first, second = folders
    assert first["epochs"] == second["epochs"] and first["best_epoch"] == second["best_epoch"]
    assert first["predictions"] == second["predictions"] and first["accuracy"] == pytest.approx(100 - second["accuracy"])
    assert first["accuracy"] != second["accuracy"]


def test_scores_and_the_best_constant_answer():
    answers, gold = [1, 1, 1, 0, 0, 1, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]
    assert classifier.scores(answers, gold, ["accuracy", "f1"]) == {"accuracy": 62.5, "f1": pytest.approx(100 * 2 * 2 / (2 * 2 + 2 + 1))}
    assert classifier.scores([0] * 8, [0] * 8, ["accuracy", "f1"]) == {"accuracy": 100, "f1": 0}
    # Three of eight are positive: "always 0" wins on accuracy, "always 1" on F1.
    assert classifier.best_constant(gold, ["accuracy", "f1"]) == {"accuracy": 62.5, "f1": pytest.approx(100 * 2 * 3 / (3 + 8))}
    assert classifier.best_constant([0, 1, 2, 2], ["accuracy"]) == {"accuracy": 50}


# ---- The command ----------------------------------------------------------------------------------------------------


def test_files_are_the_official_ones_and_the_summary_adds_the_spread(checkpoints, data, tmp_path, call, capsys):
    call(checkpoints("gpt2"), checkpoints("moep"), checkpoints("bert"), "--data", data, "--output", tmp_path, *QUICK, "seeds=[1,2]",
         "training.epochs=2", "tasks.rte.metric=f1")
    out = capsys.readouterr().out
    for name in ("gpt2", "moep", "bert"):
        folder = tmp_path / name / "main/finetune"
        predictions = json.loads((folder / "rte/predictions.json").read_text())["rte"]["predictions"]
        assert [row["id"] for row in predictions] == [f"rte_{i}" for i in range(31)] and {row["pred"] for row in predictions} == {0, 1}
        summary = json.loads((folder / "summary.json").read_text())
        task = summary["tasks"]["rte"]
        assert (summary["model"], summary["revision"], task["n"], task["refused"]) == (name, "main", 31, [])
        assert task["pooling"] == ("first" if name == "bert" else "last")
        assert task["majority"] == {"accuracy": pytest.approx(100 * 16 / 31), "f1": pytest.approx(100 * 2 * 15 / (15 + 31))}
        scores = [task["seeds"][seed]["f1"] for seed in ("1", "2")]
        assert task["score"] == pytest.approx(statistics.mean(scores)) and task["sd"] == pytest.approx(statistics.stdev(scores))
        gold = [row["label"] for row in made_up(31, 2)]
        right = sum(row["pred"] == label for row, label in zip(predictions, gold, strict=True)) / 31
        assert (folder / "rte/results.txt").read_text() == f"accuracy: {task['seeds']['1']['accuracy'] / 100}\nf1: {scores[0] / 100}\n"
        assert right == pytest.approx(task["seeds"]["1"]["accuracy"] / 100)
        encoder = classifier.load_encoder(str(checkpoints(name)))
        shares = [sum(row["pred"] == label for row in predictions) / 31 for label in (0, 1)]
        assert task["seeds"]["1"]["largest_share"] == pytest.approx(100 * max(shares))
        assert task["trained_parameters"] == models.count_parameters(encoder) + 33 * 32 + 33 * 2
        assert f"{task['score']:.1f} ± {task['sd']:.1f}" in out.splitlines()[-2]
    header, row, note = out.splitlines()[-3:]
    assert header.split() == ["task", "metric", "rows", "majority", "gpt2", "moep", "bert"]
    assert row.split()[:4] == ["rte", "f1", "31", f"{100 * 2 * 15 / (15 + 31):.1f}"]
    assert note.startswith("majority: the best score of one answer")


def test_an_interrupted_call_continues_with_the_missing_seed_and_a_seed_repeats_itself(checkpoints, data, tmp_path, call, capsys):
    quick = [*QUICK, "training.epochs=2", "training.lr=1e-3"]
    call(checkpoints("gpt2"), "--data", data, "--output", tmp_path / "a", *quick, "seeds=[1,2]")
    whole = {path.name: json.loads(path.read_text()) for path in (tmp_path / "a").rglob("seeds/*.json")}
    call(checkpoints("gpt2"), "--data", data, "--output", tmp_path / "b", *quick, "seeds=[2]")
    first = (tmp_path / "b/gpt2/main/finetune/rte/seeds/2.json").read_bytes()
    capsys.readouterr()
    call(checkpoints("gpt2"), "--data", data, "--output", tmp_path / "b", *quick, "seeds=[1,2]")
    out = capsys.readouterr().out
    assert "gpt2, rte, seed 2: done before" in out and "gpt2, rte, seed 1: done before" not in out
    assert (tmp_path / "b/gpt2/main/finetune/rte/seeds/2.json").read_bytes() == first
    again = {path.name: json.loads(path.read_text()) for path in (tmp_path / "b").rglob("seeds/*.json")}
    for record in (*whole.values(), *again.values()):
        record.pop("seconds")
    assert again == whole
    assert whole["1.json"]["epochs"] != whole["2.json"]["epochs"]


def test_scores_are_of_all_seeds_that_lie_there_and_the_predictions_of_the_first_asked_for(checkpoints, data, tmp_path, call, capsys):
    arguments = [checkpoints("gpt2"), "--data", data, "--output", tmp_path, *QUICK, "training.epochs=2"]
    call(*arguments)
    folder = tmp_path / "gpt2/main/finetune/rte"
    record = json.loads((folder / "seeds/1.json").read_text())
    others = {seed: {**record, "seed": seed, "accuracy": accuracy, "predictions": [seed % 2, *record["predictions"][1:]]}
              for seed, accuracy in ((10, 40.0), (9, 60.0))}
    for seed, other in others.items():
        (folder / f"seeds/{seed}.json").write_text(json.dumps(other))
    scored = [record["accuracy"], 60, 40]
    for seeds, unasked in (([1], "9, 10"), ([10, 9], "1"), ([9, 1, 10], None)):
        capsys.readouterr()
        call(*arguments, f"seeds={seeds}")
        out = capsys.readouterr().out
        assert (f"rte: the scores are also of seeds {unasked}, which lie there with the same settings" in out) == (unasked is not None)
        assert unasked or "also of seeds" not in out
        summary = json.loads((folder / "summary.json").read_text())
        assert list(summary["seeds"]) == ["1", "9", "10"]
        assert (summary["score"], summary["sd"]) == (pytest.approx(statistics.mean(scored)), pytest.approx(statistics.stdev(scored)))
        predictions = json.loads((folder / "predictions.json").read_text())["rte"]["predictions"]
        assert [row["pred"] for row in predictions] == {1: record, **others}[seeds[0]]["predictions"]


def test_results_of_other_settings_weights_or_rows_are_not_taken_for_these(checkpoints, data, tmp_path, call):
    arguments = ["--data", data, "--output", tmp_path, *QUICK, "training.epochs=2"]
    copied = shutil.copytree(checkpoints("gpt2"), tmp_path / "models/gpt2")
    call(copied, *arguments)
    for seed in (1, 2):  # a seed that does not lie there would put its summary in the place of the other's
        with pytest.raises(UserError, match=r"seeds/1\.json was made with other settings:\n  training\.lr: 0\.003 there, 0\.001 now\nGive"):
            call(copied, *arguments, "training.lr=1e-3", f"seeds=[{seed}]")
    weights = load_file(copied / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="  model: "):
        call(copied, *arguments)


def test_a_constant_answer_and_a_nan_loss_are_refused_and_the_other_tasks_kept(checkpoints, data, tmp_path, call, in_child):
    """The command as a process: code 1, the reasons on stderr, no score and no official files for what was refused."""
    for name in ("mrpc", "wsc"):
        for part in ("train", "valid"):
            rows = [json.loads(line) for line in (data / f"rte.{part}.jsonl").read_text().splitlines()]
            rows = [{**row, "text": row["sentence1"], "span1_text": "x", "span2_text": row["sentence2"]} for row in rows]
            write_rows(tmp_path / f"glue/{name}.{part}.jsonl", rows)
            shutil.copy(data / f"rte.{part}.jsonl", tmp_path / "glue")
    # WSC: a step of this size makes weights infinite; MRPC: one of this size moves nothing from a head that says one class.
    done = in_child(lambda: call(
        checkpoints("gpt2"), "--data", tmp_path / "glue", "--output", tmp_path, *QUICK, "tasks.wsc.epochs=2", "tasks.wsc.lr=1e30",
        "tasks.mrpc.first=same", "tasks.mrpc.second=same", "tasks.mrpc.epochs=1"))
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "gpt2, wsc, seed 1: the loss is nan in step 2 of " in done.stderr and "lower training.lr (1e+30)" in done.stderr
    assert "gpt2, mrpc, seed 1: every one of the 31 predictions is " in done.stderr
    folder = tmp_path / "gpt2/main/finetune"
    summary = json.loads((folder / "summary.json").read_text())["tasks"]
    assert {name: summary[name]["score"] is None for name in summary} == {"mrpc": True, "rte": False, "wsc": True}
    assert summary["mrpc"]["refused"] and summary["mrpc"]["seeds"]["1"]["largest_share"] == 100
    for file in ("predictions.json", "results.txt"):
        assert {path.parent.name for path in folder.rglob(file)} == {"rte"}
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith(("mrpc  ", "wsc  "))] == ["refused", "refused"]


def test_first_token_pooling_of_a_causal_model_is_warned_of_and_refused(checkpoints, data, tmp_path, call, capsys):
    """The official default: its score would be the share of one class, to the last digit."""
    for _ in range(2):  # what lies there is refused again, and not taught again
        with pytest.raises(UserError, match="A causal model's first token sees nothing of the input: training.pooling=last"):
            call(checkpoints("gpt2"), "--data", data, "--output", tmp_path, *QUICK, "training.pooling=first")
    out = capsys.readouterr().out
    assert "warning: gpt2 is causal: its first position sees the start token alone" in out and "seed 1: done before" in out
    record = json.loads((tmp_path / "gpt2/main/finetune/rte/seeds/1.json").read_text())
    assert record["largest_share"] == 100 and record["accuracy"] in (pytest.approx(100 * 16 / 31), pytest.approx(100 * 15 / 31))


def test_a_refused_seed_takes_back_what_an_earlier_call_reported(checkpoints, data, tmp_path, call):
    """Two seeds of which one collapsed have no mean, and no predictions to hand in."""
    arguments = ["--data", data, "--output", tmp_path, *QUICK]
    call(checkpoints("gpt2"), *arguments)
    folder = tmp_path / "gpt2/main/finetune/rte"
    assert (folder / "predictions.json").exists()
    record = json.loads((folder / "seeds/1.json").read_text())
    (folder / "seeds/2.json").write_text(json.dumps({**record, "seed": 2, "largest_share": 100.0}))
    for seeds in ([1, 2], [1]):  # also when it is not asked for: the mean of the others would flatter the model
        with pytest.raises(UserError, match="seed 2: every one of the 31 predictions"):
            call(checkpoints("gpt2"), *arguments, f"seeds={seeds}")
    assert not (folder / "predictions.json").exists() and not (folder / "results.txt").exists()
    assert json.loads((folder / "summary.json").read_text())["score"] is None


def test_a_tokenizer_that_puts_nothing_between_two_texts_is_warned_of(checkpoints, tmp_path, capsys):
    glued = shutil.copytree(checkpoints("gpt2"), tmp_path / "glued")
    tokenizer = json.loads((glued / "tokenizer.json").read_text())
    (glued / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    finetune.open_subject(str(glued), "main", section())
    assert "warning: glued: its tokenizer puts nothing between the two texts of an input" in capsys.readouterr().out


def test_mistakes_on_the_command_line_come_before_any_training(checkpoints, data, tmp_path, call):
    gpt2 = checkpoints("gpt2")
    with pytest.raises(UserError, match="no task named rtee in .*finetune.yaml; it has boolq"):
        call(gpt2, "--data", data, "--tasks", "rtee")
    with pytest.raises(UserError, match="no task named .*gpt2 in .*models stand before --tasks"):
        call("--data", data, "--tasks", "rte", gpt2)
    with pytest.raises(UserError, match="--tasks names no task; .*finetune.yaml has boolq, mnli"):
        call(gpt2, "--data", data, "--tasks", "training.lr=1")
    with pytest.raises(UserError, match="give at least one model folder"):
        call("training.lr=1", "--data", data)
    with pytest.raises(UserError, match="several models are named gpt2"):
        call(gpt2, tmp_path / "gpt2", "--data", data)
    with pytest.raises(UserError, match="fine-tuning: .*missing does not exist"):
        call(gpt2, tmp_path / "missing", "--data", data, "--output", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("words", [["rte", "wsc"], ["rte,wsc"], ["rte,", "wsc"]])
def test_tasks_are_words_or_a_list_with_commas_and_overrides_may_follow(checkpoints, data, tmp_path, call, capsys, words):
    call(checkpoints("gpt2"), "--data", data, "--output", tmp_path, *QUICK, "--tasks", *words, "seeds=[5]", "training.epochs=1")
    out = capsys.readouterr().out
    assert "wsc: skipped" in out and "boolq" not in out
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("seeds/*")] == ["gpt2/main/finetune/rte/seeds/5.json"]


def test_results_are_filed_under_the_name_of_the_folder(checkpoints, data, tmp_path, call, monkeypatch):
    """As by eval.zero_shot: `.` is no name, and two folders that differ after a dot are two models."""
    monkeypatch.chdir(checkpoints("gpt2"))
    assert finetune.open_subject(".", "main", section()).name == "gpt2"
    assert finetune.results_name("EleutherAI/pythia-1.4b") == "pythia-1.4b"
    dotted = shutil.copytree(checkpoints("gpt2"), tmp_path / "gpt.a")
    with pytest.raises(UserError, match=r"gpt\.a: the official pipeline files results under the name before a dot.*rename the folder"):
        call(dotted, "--data", data, "--output", tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_milestone_is_filed_under_its_revision(checkpoints, data, tmp_path, call):
    shutil.copytree(checkpoints("gpt2"), tmp_path / "run/chck_1M")
    shutil.copytree(checkpoints("gpt2"), tmp_path / "run", dirs_exist_ok=True)
    with pytest.raises(UserError, match="would lie inside the checkpoint"):
        call(tmp_path / "run", "--data", data, "--output", tmp_path, "--revision", "chck_1M", *QUICK)
    call(tmp_path / "run", "--data", data, "--output", tmp_path / "results", "--revision", "chck_1M", *QUICK)
    assert (tmp_path / "results/run/chck_1M/finetune/rte/predictions.json").is_file()
    assert not (tmp_path / "results/run/main").exists()


def test_real_rte_is_read_whole_and_no_row_is_cut(shared, capsys):
    """139 reported rows, as the official collation expects, and the published majority of 54.0."""
    task = finetune.read_config(finetune.CONFIG, [])[1]["rte"]
    train, valid = glue.read_tasks(shared / "data/glue", {"rte": task})["rte"]
    assert (len(train), len(valid)) == (2490, 139) and not capsys.readouterr().out
    assert classifier.best_constant(valid.labels, ["accuracy"])["accuracy"] == pytest.approx(54.0, abs=0.05)
    tokenizer = models.load_tokenizer(shared / "data/golden/tiny-gpt2")
    assert glue.tokenise(train, tokenizer, 512, "left").cut == 0
    assert glue.tokenise(valid, tokenizer, 64, "left").cut > 0
