"""training.eval_tasks: what is scored at milestones, that training does not notice, and what is said before it starts."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from babylm import models, training
from babylm.config import BaselineConfig, ModelSection
from babylm.schema import UserError, check
from eval import at_milestones, zero_shot

PASSING = {"seconds", "tokens_per_s"}  # what two equal runs may differ in
NOUNS, VERBS = ("dog", "cat", "boy", "girl", "man", "teacher"), ("sees", "likes", "finds", "hears")


def write_pairs(folder, count, seed):
    """`count` pairs of sentences for each of three UIDs; which one a model prefers changes with every step, and that is enough here."""
    draw, folder = random.Random(seed), Path(folder)
    folder.mkdir(parents=True)
    for uid in ("one", "two", "three"):
        def sentence():
            return f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)}."

        rows = [{"UID": uid, "field": "syntax", "linguistics_term": "agreement", "sentence_good": sentence(), "sentence_bad": sentence()}
                for _ in range(count)]
        (folder / f"{uid}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Evaluation data: blimp_fast/ and, one folder down, fast_eval/supplement_fast/."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_pairs(folder / "blimp_fast", 12, 1)
    write_pairs(folder / "fast_eval" / "supplement_fast", 9, 2)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, write_yaml):
    """A folder with run.yaml: 12 steps of dropout 0.1 (the random state matters), milestones at steps that also validate and save."""
    folder = tmp_path_factory.mktemp("quick")
    write_yaml(folder / "run.yaml", {
        "output": str(folder / "models"), "data": {"corpus": str(corpus), "seq_len": 32, "eval_blocks": 8},
        "model": {"layers": 2, "width": 32, "heads": 2, "max_positions": 32, "dropout": 0.1},
        "training": {"steps": 12, "batch_size": 8, "lr": 1e-2, "warmup_steps": 2, "device": "cpu"},
        "checkpoints": {"milestones": False, "extra_words": [600, 610, 1200], "save_steps": 5},
        "logging": {"logging_steps": 1, "eval_steps": 6}})
    return folder


@pytest.fixture(scope="module")
def run(home, in_process):
    """run("name", "key=value", ...) trains in this process; returns models/<name>."""

    def train(name, *overrides, **options):
        in_process("train_baseline", "--config", home / "run.yaml", f"name={name}", *overrides, **options)
        return home / "models" / name

    return train


@pytest.fixture(scope="module")
def asked(sets):
    return "training.eval_tasks=[blimp, supplement]", f"training.eval_data={sets}"


@pytest.fixture(scope="module")
def scored(run, asked):
    return run("scored", *asked)


@pytest.fixture(scope="module")
def plain(run):
    return run("plain")


def metrics(folder, *kinds):
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in PASSING} for row in found if row["kind"] in kinds]


def test_every_milestone_has_the_scores_that_its_folder_gets_afterwards(scored, sets, tmp_path):
    rows, flags = metrics(scored, "scores"), metrics(scored, "milestone")
    assert [row["name"] for row in rows] == ["chck_600", "chck_610", "chck_1200"] == [row["name"] for row in flags]
    assert [(row["step"], row["words"]) for row in rows] == [(row["step"], row["words"]) for row in flags]
    assert rows[0]["step"] == rows[1]["step"] < rows[2]["step"]
    chosen = at_milestones.open_sets(["blimp", "supplement"], sets, "2025")
    for row in rows:
        after, problems = zero_shot.score_model(scored / row["name"], tmp_path / row["name"], chosen, "causal",
                                                {"bf16": False, "batch_tokens": 2048, "fresh": False})
        assert not problems and row["tasks"].keys() == {"blimp_fast", "supplement_fast"}
        assert row["tasks"] == {name: {key: after[name][key] for key in ("score", "se", "n", "ties")} for name in after}
    assert rows[0]["tasks"]["blimp_fast"]["n"] == 36 and rows[0]["tasks"] != rows[2]["tasks"]


def test_training_is_bit_for_bit_the_same_with_and_without(scored, plain):
    assert metrics(plain, "scores") == [] and metrics(plain, "train", "eval") == metrics(scored, "train", "eval")
    for part in (".", "chck_600", "chck_1200"):
        mine, theirs = (load_file(folder / part / "model.safetensors") for folder in (scored, plain))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_killed_and_resumed_run_has_every_row_once(scored, run, asked, monkeypatch):
    """Killed right after its last milestone, a step behind the newest checkpoint: that milestone is reached once more."""
    end = training.RunCallback.on_step_end

    def killed(self, args, state, control, **rest):
        end(self, args, state, control, **rest)
        if state.global_step == metrics(scored, "scores")[-1]["step"]:
            raise MemoryError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(training.RunCallback, "on_step_end", killed)
        with pytest.raises(MemoryError):
            run("resumed", *asked)
    folder = scored.parent / "resumed"
    assert len(metrics(folder, "scores")) == 3
    run("resumed", *asked)
    assert metrics(folder, "scores") == metrics(scored, "scores")


@pytest.mark.parametrize("merged", ["true", "false"])
def test_adapters_are_scored_as_the_model_they_make(scored, home, in_process, sets, asked, tmp_path, merged):
    name = f"adapted-{merged}"
    in_process("train_teacher", "--config", home / "run.yaml", f"name={name}", *asked, "model.init=pretrained", f"model.path={scored}",
               "lora.mode=lora", "lora.rank=2", f"lora.merge_adapter={merged}", "checkpoints.extra_words=[600]")
    (row,) = metrics(home / "models" / name, "scores")
    chosen = at_milestones.open_sets(["blimp"], sets, "2025")
    model = models.load_causal_lm(str(home / "models" / name / "chck_600")) if merged == "true" else None
    if model is not None:
        assert row["tasks"]["blimp_fast"] == at_milestones.scores(model, models.load_tokenizer(scored), chosen)["blimp_fast"]
    assert row["tasks"]["blimp_fast"]["n"] == 36


def test_two_processes_score_once_and_neither_hangs(scored, home, asked, on_two_processes):
    on_two_processes("train_baseline", "--config", str(home / "run.yaml"), "name=two", *asked)
    rows = metrics(home / "models" / "two", "scores")
    assert [(row["name"], row["step"]) for row in rows] == [(row["name"], row["step"]) for row in metrics(scored, "scores")]


def test_modes_and_random_numbers_are_as_before(sets, tokenizer):
    model = models.build_model(ModelSection(layers=1, width=16, heads=2, max_positions=32, dropout=0.1), tokenizer, 0).train()
    model.transformer.wte.eval()  # a part that is kept out of training mode on purpose
    model.transformer.register_forward_hook(lambda *_: (torch.rand(3), None)[1])  # draws, as a noisy router would
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    found = at_milestones.scores(model, tokenizer, at_milestones.open_sets(["blimp"], sets, "2025"))
    assert torch.equal(torch.get_rng_state(), before) and [module.training for module in model.modules()] == modes
    assert found == at_milestones.scores(model, tokenizer, at_milestones.open_sets(["blimp"], sets, "2025"))  # without dropout
    assert found["blimp_fast"].keys() == {"score", "se", "n", "ties"}


def test_modes_are_restored_when_scoring_fails(sets, tokenizer):
    model = models.build_model(ModelSection(layers=1, width=16, heads=2, max_positions=32), tokenizer, 0).train()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        at_milestones.scores(model, tokenizer, at_milestones.open_sets(["blimp"], sets, "2025"))
    assert model.training


def test_a_tokenizer_without_start_token_is_scored_as_it_will_be_saved(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel()  # as GPT-2's, which adds nothing
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert plain("a dog").input_ids == tokenizer("a dog").input_ids[1:]
    saved = at_milestones.as_saved(plain)("a dog").input_ids
    assert saved == tokenizer("a dog").input_ids and saved[0] == tokenizer.bos_token_id


def test_reading_times_too(shared, tmp_path, tokenizer):
    (tmp_path / "reading").mkdir()
    lines = (shared / "data" / "eval_fast" / "reading" / "reading_data.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "reading" / "reading_data.csv").write_text("".join(lines[:60]), encoding="utf-8")
    model = models.build_model(ModelSection(layers=1, width=16, heads=2, max_positions=256), tokenizer, 0)
    chosen = at_milestones.open_sets(["reading"], tmp_path, "2025")
    at_milestones.require_fits(chosen, tokenizer, 256)
    assert at_milestones.scores(model, tokenizer, chosen)["reading"]["n"] == 59


# ---- Mistakes are said before anything is computed ----------------------------------------------------------------------


@pytest.mark.parametrize(("tasks", "data", "said"), [
    ("[blimpp]", "{sets}", "no such task: blimpp; this suite has blimp, supplement"),
    ("[blimp]", "{sets}/nowhere", "training.eval_data: there is no folder"),
    ("[blimp, ewok]", "{sets}", "ewok has no set in training.eval_data"),
    ("[blimp]", "{broken}", "blimp_fast/x.jsonl, line 2: not JSON"),
    ("[reading]", "{broken}", "reading_data.csv is missing"),
])
def test_mistakes_leave_no_run_behind(run, home, sets, tmp_path, tasks, data, said):
    (tmp_path / "blimp_fast").mkdir()
    (tmp_path / "reading").mkdir()
    (tmp_path / "blimp_fast" / "x.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a"}\n{"sentence')
    with pytest.raises(UserError, match=said):
        run("wrong", f"training.eval_tasks={tasks}", f"training.eval_data={data.format(sets=sets, broken=tmp_path)}")
    assert not (home / "models" / "wrong").exists()


def test_texts_beyond_the_positions_are_refused_before_the_first_step(run, home, tmp_path):
    (tmp_path / "blimp_fast").mkdir()
    row = {"sentence_good": "The dog " * 20, "sentence_bad": "The dogs"}
    (tmp_path / "blimp_fast" / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"x_0 of .*blimp_fast has \d+ tokens, but the model has 32 positions: take blimp off the list"):
        run("long", "training.eval_tasks=[blimp]", f"training.eval_data={tmp_path}")
    assert not (home / "models" / "long" / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("keys", "said"), [
    ({"eval_tasks": ["blimp"]}, "eval_tasks needs eval_data"), ({"eval_data": "x"}, "no eval_tasks"),
    ({"eval_tasks": ["blimp", "blimp"], "eval_data": "x"}, "names a task twice")])
def test_keys_that_belong_together(keys, said):
    with pytest.raises(UserError, match=f"training: .*{said}"):
        check(BaselineConfig, {"name": "a", "training": {"steps": 1, **keys}}, "x.yaml")


def test_no_milestone_within_the_budget_is_said(run, asked, capsys):
    run("none", *asked, "checkpoints.extra_words=[1M]", "training.steps=2")
    assert "training.eval_tasks: no milestone within" in capsys.readouterr().out


def test_other_tasks_are_no_other_run(run, scored, asked, capsys):
    run("scored", "training.eval_tasks=[blimp]", asked[1])
    assert "nothing to do" in capsys.readouterr().out
