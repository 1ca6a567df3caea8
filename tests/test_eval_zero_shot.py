"""eval/zero_shot.py and what it is made of: the official scores, files that others can read, and everything that could fool one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from babylm import models
from babylm.schema import UserError
from eval import reading, reports
from eval.agreement import read_gaps
from eval.tasks import Item, choose_tasks, find_sets, load_tasks, read_items, unlike_official
from eval.zero_shot import completion_tokens, requests_of, revisions

ROOT = Path(models.__file__).parents[1]
TASKS = load_tasks()
WORDS = ["the", "cat", "dog", "sees", "a", "bird", "old", "small", "child", "reads", "book", "in", "house", "and", "runs", "away", "with"]


def sentence(random, size):
    return " ".join(random.choice(WORDS, size)).capitalize() + "."


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with a little of every task, in the official formats."""
    folder, random = tmp_path_factory.mktemp("evaluation_data"), np.random.default_rng(0)

    def write(name, rows):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    for uid, field in (("agreement_1", "morphology"), ("islands", "syntax_semantics")):
        write(f"fast_eval/blimp_fast/{uid}.jsonl", [{"sentence_good": sentence(random, 5), "sentence_bad": sentence(random, 5), "UID": uid,
                                                     "field": field, "linguistics_term": "any"} for _ in range(6)])
    write("fast_eval/supplement_fast/turn_taking.jsonl", [{"sentence_good": f"A: {sentence(random, 3)}\nB: {sentence(random, 3)}",
                                                           "sentence_bad": sentence(random, 6)} for _ in range(5)])
    write("fast_eval/ewok_fast/ewok.jsonl", [{"Domain": domain, "ContextType": "direct", "Context1": sentence(random, 6), "Context2": "",
                                              "Target1": sentence(random, 3), "Target2": sentence(random, 3)}
                                             for domain in ("social", "spatial") for _ in range(4)])
    write("fast_eval/entity_tracking_fast/regular.jsonl", [
        {"numops": number % 2, "input_prefix": f"Box 0 contains the {random.choice(WORDS)}. Box 0 contains ",
         "options": [f"the {word}." for word in random.choice(WORDS, 5, replace=False)]} for number in range(8)])
    write("full_eval/comps/comps_base.jsonl", [{"property_phrase": "runs away", "prefix_acceptable": f"The {random.choice(WORDS)}",
                                                "prefix_unacceptable": f"An old {random.choice(WORDS)}"} for _ in range(6)])
    for name in ("wug_past_tense", "wug_adj_nominalization"):
        write(f"fast_eval/{name}/{name}.jsonl", [{"sentences": "\t".join(sentence(random, 4) for _ in range(2)),
                                                  "ratio": float(random.random())} for _ in range(9)])
    columns = ["item", "word", "prev_item", "prev_word", "Subtlex_log10", "length", "context_length", "prev_length",
               *reading.EYE_TRACKING, reading.SELF_PACED]
    lines = [",".join(columns)]
    for number in range(60):
        words = sentence(random, 6).split()
        place = number % 5
        texts = [" ".join(words[:place]) if place else "", words[place], " ".join(words[: place - 1]) if place > 1 else "",
                 words[place - 1] if place > 1 else ""]
        lines.append(",".join([*texts, *(f"{value:.3f}" for value in random.random(len(columns) - 4))]))
    path = folder / "fast_eval/reading/reading_data.csv"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def model(teachers, tmp_path):
    """A copy of a small causal checkpoint that a test may spoil."""
    return Path(shutil.copytree(teachers("gpt2")[0], tmp_path / "tiny"))


@pytest.fixture
def score(in_process, data, tmp_path, capsys):
    """score(model, ...options) -> (exit code, stdout, stderr); results go to tmp_path/results."""

    def run(*args, data=data):
        code = 0
        try:
            in_process("eval.zero_shot", *args, "--data", data, "--output", tmp_path / "results", as_script=True)
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


def read(folder, name="summary.json"):
    return json.loads((folder / name).read_text())


# ---- The official scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, backend, sets", [
    ("tiny-gpt2", "causal", ["supplement", "wug_past", "wug_adj", "reading"]), ("tinybert", "mlm", ["supplement"]),
    ("tinybert", "mntp", ["supplement"])])
def test_predictions_and_printed_scores_are_the_official_ones(shared, name, backend, sets, tmp_path, in_process):
    """On these sets here; on BLiMP and entity tracking, which take longer, a part of the items."""
    golden = shared / "data/golden"
    in_process("eval.zero_shot", golden / name, "--backend", backend, "--data", shared / "data/eval_fast", "--tasks", *sets,
               "--output", tmp_path, "--no-untrained")
    ours, official = (root / name / "main/zero_shot" / backend for root in (tmp_path, golden / "official"))
    compared = 0
    for file in sorted(official.rglob("predictions.json")):
        mine = ours / file.relative_to(official)
        if not mine.exists():
            continue
        compared += 1
        theirs, found = json.loads(file.read_text()), json.loads(mine.read_text())
        assert list(theirs) == sorted(theirs, key=list(theirs).index) and set(theirs) == set(found)
        for uid in theirs:
            for one, other in zip(theirs[uid]["predictions"], found[uid]["predictions"], strict=True):
                assert one["id"] == other["id"] and list(one) == list(other)
                assert one["pred"] == (pytest.approx(other["pred"], abs=1e-4) if uid == "reading" else other["pred"])
                for key in ("prob", "prev_pred"):
                    assert one.get(key) == pytest.approx(other.get(key), abs=1e-4, nan_ok=True)
        report = "report.txt" if file.parent.name == "reading" else "best_temperature_report.txt"
        assert sorted(file.with_name(report).read_text().split("\n")) == sorted(mine.with_name(report).read_text().split("\n"))
        if file.parent.name == "reading":
            assert {path.name for path in file.parent.iterdir()} < {path.name for path in mine.parent.iterdir()}
            for name in ("prediction.jsonl", "predictive_power.jsonl", "predictive_power_spillover.jsonl"):
                for one, other in zip(*(path.with_name(name).read_text().splitlines() for path in (file, mine)), strict=True):
                    one, other = json.loads(one), json.loads(other)
                    assert list(one) == list(other)
                    for key, value in one.items():
                        near = 1e-5 if key == "AIC" else 1e-3  # an AIC is large: a parameter more or less is 2 of 16,000
                        same = value == other[key] if isinstance(value, str) else np.allclose(value, other[key], near, 1e-6, equal_nan=True)
                        assert same, (name, key, value, other[key])
            assert file.with_name("correlations.txt").read_text() == mine.with_name("correlations.txt").read_text()
    assert compared == len(sets)


@pytest.mark.parametrize("folder, wanted, part", [("blimp_fast", "blimp", slice(0, None, 9)),
                                                  ("entity_tracking_fast", "entity_tracking", slice(0, 240))])
def test_a_part_of_blimp_and_entity_tracking_is_answered_as_officially(shared, folder, wanted, part):
    golden = shared / "data/golden"
    tokenizer, scored = models.load_tokenizer(golden / "tiny-gpt2"), models.load_causal_lm(str(golden / "tiny-gpt2")).eval()
    items = read_items(TASKS[wanted], shared / "data/eval_fast" / folder)[part]
    official = read(golden / "official/tiny-gpt2/main/zero_shot/causal" / wanted / folder, "predictions.json")
    from eval.scorer import Scorer

    asked = [requests_of(item, tokenizer, "causal") for item in items]
    values = dict(Scorer(scored).logprobs([request for item in asked for (request,) in item]))
    totals = iter([values[number].sum() for number in range(len(values))])
    for item in items:
        mine = [next(totals) for _ in item.texts]
        pred = official[item.uid]["predictions"][int(item.id.rsplit("_", 1)[1])]["pred"]
        assert item.names[int(np.argmax(mine))] == pred or np.ptp(sorted(mine)[-2:]) < 1e-4


# ---- Files and tables -------------------------------------------------------------------------------------------------


def test_every_task_is_scored_and_filed_where_the_official_pipeline_files_it(model, score, tmp_path, data):
    here = {path.name for path in model.iterdir()}
    code, out, err = score(model)
    assert (code, err) == (0, ""), out
    folder = tmp_path / "results/tiny/main/zero_shot/causal"
    for name in ("blimp/blimp_fast", "blimp/supplement_fast", "ewok/ewok_fast", "entity_tracking/entity_tracking_fast", "comps/comps",
                 "wug_past/wug_past_tense", "wug_adj/wug_adj_nominalization"):
        assert {path.name for path in (folder / name).iterdir()} == {"predictions.json", "best_temperature_report.txt", "items.jsonl"}
    assert {path.name for path in (folder / "reading").iterdir()} == {
        "predictions.json", "prediction.jsonl", "predictive_power.jsonl", "predictive_power_spillover.jsonl", "correlations.txt",
        "report.txt", "items.jsonl"}
    for items in folder.rglob("items.jsonl"):  # eval.official reads them all, those of reading times too
        assert len(read_gaps(items, 1e-4)) == (0 if items.parent.name == "reading" else len(items.read_text().splitlines()))
    summary = read(folder)
    assert (summary["model"], summary["revision"], summary["backend"]) == ("tiny", "main", "causal")
    assert len(summary["tasks"]) == 8
    assert all(entry["n"] and np.isfinite(entry["score"]) and entry["se"] >= 0 for entry in summary["tasks"].values())
    assert set(summary["tasks"]["blimp_fast"]["by"]) == {"FIELD", "LINGUISTICS_TERM", "UID"}
    assert set(summary["tasks"]["blimp_fast"]["by"]["FIELD"]) == {"morphology", "syntax/semantics"}
    assert set(summary["tasks"]["entity_tracking_fast"]["by"]["UID"]) == {"regular_0_ops", "regular_1_ops", "regular"}
    assert read(tmp_path / "results/tiny/untrained/zero_shot/causal")["tasks"].keys() == summary["tasks"].keys()
    assert "| set | items | tiny | tiny untrained | chance |" in out and "| entity_tracking_fast (not the official set) | 8 |" in out
    assert "2025 strict-small GPT-2 (official): blimp 67.29" in out
    assert "2026 strict" not in out and "not the official blimp_fast: 12 items instead of 13,400" in out
    assert "not the official reading: 60 items instead of 1,726" in out
    assert "not comparable" in out and summary["tasks"]["comps"]["unlike_official"].startswith("not the official comps: 6 items")
    assert {path.name for path in model.iterdir()} == here, "nothing is written into the checkpoint's folder"
    (prediction, *_), = (entry["predictions"] for entry in read(folder / "comps/comps", "predictions.json").values())
    assert list(read(folder / "comps/comps", "predictions.json")) == ["base"]  # what the leaderboard calls it, not comps_base
    assert prediction["id"] == "base_0" and prediction["pred"].endswith(" runs away"), "the whole sentence"
    target = read(folder / "ewok/ewok_fast", "predictions.json")["social"]["predictions"][0]["pred"]
    assert target in {text for item in read_items(TASKS["ewok"], data / "fast_eval/ewok_fast") for text in item.texts}


def test_candidates_are_what_the_tokens_after_the_prefix_say(model, data):
    """Summed by hand from the model's own softmax."""
    tokenizer, lm = models.load_tokenizer(model), models.load_causal_lm(str(model)).eval()
    item = read_items(TASKS["ewok"], data / "fast_eval/ewok_fast")[0]
    assert item.texts[0].startswith(" ") and not item.prefixes[0].endswith(" ")
    for prefix, text, (request,) in zip(item.prefixes, item.texts, requests_of(item, tokenizer, "causal"), strict=True):
        before, whole = len(tokenizer(prefix).input_ids), tokenizer(prefix + text).input_ids
        assert whole[0] == tokenizer.bos_token_id and [place + 1 for place, _ in request.targets] == list(range(before, len(whole)))
        assert [token for _, token in request.targets] == whole[before:]
    ids, scored = completion_tokens(tokenizer, "", "The cat.")
    assert scored == list(range(1, len(ids))), "all but the start token"
    with torch.no_grad():
        lm(input_ids=torch.tensor([ids]))


def test_a_masked_token_is_asked_for_in_its_place_or_one_earlier(shared):
    tokenizer = models.load_tokenizer(shared / "data/golden/tinybert")
    item = Item("u", "u_0", ("", ""), ("The cat runs.", "A cat."), 0, None)
    (ids, scored), found = completion_tokens(tokenizer, "", "The cat runs."), requests_of(item, tokenizer, "mlm")[0]
    assert len(found) == len(scored)
    for request, place in zip(found, scored, strict=True):
        assert request.ids[place] == tokenizer.mask_token_id and request.targets == ((place, ids[place]),)
        assert request.ids[:place] + request.ids[place + 1:] == ids[:place] + ids[place + 1:]
    early = requests_of(item, tokenizer, "mntp")[0]
    assert [request.targets[0] for request in early] == [(place - 1, ids[place]) for place in scored if place]


def test_accuracy_is_the_mean_over_uids_and_for_entity_tracking_over_splits():
    def one(uid, hit, split="s"):
        return Item(uid, "x", ("", ""), ("a", "b"), 0, None, {}, split), {"pred": 0 if hit else 1, "gold": 0, "correct": hit}

    pairs = [one("u", True), one("u", True), one("u", False), one("v", False)]
    items, rows = zip(*pairs, strict=True)
    score, error = reports.accuracy(TASKS["blimp"], items, rows)
    assert score == pytest.approx(100 * (2 / 3 + 0) / 2) and error == pytest.approx(100 * np.sqrt(2 / 9 / 3) / 2)
    pairs = [one("a_0_ops", True, "a"), one("a_1_ops", False, "a"), one("b_0_ops", True, "b")]
    items, rows = zip(*pairs, strict=True)
    assert reports.accuracy(TASKS["entity_tracking"], items, rows)[0] == pytest.approx(100 * (0.5 + 1) / 2)
    assert reports.accuracy(TASKS["blimp"], items, rows)[0] == pytest.approx(100 * 2 / 3)


def test_spearman_shares_ranks_among_equals():
    assert reports.spearman(np.array([1.0, 2, 2, 4]), np.array([1.0, 3, 2, 4])) == pytest.approx(0.9486833)
    assert reports.spearman(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    assert np.isnan(reports.spearman(np.ones(4), np.arange(4.0)))


def test_surprisal_explains_what_it_was_made_of():
    random = np.random.default_rng(0)
    surprisal, noise = random.random(400), random.random(400)
    measured = (*reading.EYE_TRACKING, reading.SELF_PACED)
    rows = [{**{name: str(random.random()) for name in (*reading.CONTROLS, "prev_length")},
             **{name: str(surprisal[number] + 0.001 * noise[number]) for name in measured}} for number in range(400)]
    found = reading.scores(rows, surprisal, random.random(400))
    assert found["eye_tracking"] > 99.9 and found["self_paced"] > 99.9
    chance = reading.scores(rows, random.random(400), random.random(400))
    assert 0 <= chance["eye_tracking"] < 2


# ---- What could fool one -----------------------------------------------------------------------------------------------


def spoil(model, change):
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def test_a_model_that_answers_nan_gets_no_score(model, score, tmp_path):
    spoil(model, lambda weights: weights["transformer.ln_f.bias"].fill_(float("nan")))
    code, out, err = score(model, "--tasks", "blimp", "supplement", "--no-untrained")
    assert code == 1 and err.count("a model that answers NaN or infinity") >= 2
    assert re.search("nan as a log-probability in (islands|agreement_1)_", err)
    assert not (tmp_path / "results/tiny/main/zero_shot/causal/blimp/blimp_fast/predictions.json").exists()


def test_a_model_that_answers_the_same_for_everything_is_called_that(model, score, tmp_path):
    def same(weights):
        for value in weights.values():
            value.zero_()

    spoil(model, same)
    data = tmp_path / "pairs/blimp_fast"
    data.mkdir(parents=True)
    rows = [{"sentence_good": "the cat sees the dog", "sentence_bad": "the dog sees the cat", "UID": "u", "field": "f",
             "linguistics_term": "t"}] * 3
    (data / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = score(model, "--tasks", "blimp", "--no-untrained", data=tmp_path / "pairs")
    summary = read(tmp_path / "results/tiny/main/zero_shot/causal")["tasks"]["blimp_fast"]
    assert (summary["score"], summary["strict"], summary["ties"]) == (100, 0, 1), "officially a tie is right"
    assert code == 1 and "100 % of the answers are ties" in err and "100.0 % ties: 0.00 without" in out


def test_every_milestone_has_its_own_scores_and_a_name_that_is_not_there_is_refused(model, score, tmp_path, teachers):
    for name in ("chck_2M", "chck_900K", "chck_10M"):
        shutil.copytree(teachers("gpt2")[0], model / name)
        spoil(model / name, lambda weights, name=name: weights["transformer.wte.weight"].mul_(len(name)))
    code, out, err = score(model, "--milestones", "--tasks", "blimp", "ewok", "--no-untrained")
    assert code == 0, err
    assert re.findall(r"tiny (\S+)  blimp_fast", out) == ["chck_900K", "chck_2M", "chck_10M", "main"], "in the order of their words"
    found = [read(tmp_path / "results/tiny" / name / "zero_shot/causal/ewok/ewok_fast", "predictions.json") for name in ("chck_2M", "main")]
    lines = [(tmp_path / "results/tiny" / name / "zero_shot/causal/ewok/ewok_fast/items.jsonl").read_text() for name in ("chck_2M", "main")]
    assert lines[0] != lines[1] and found
    code, _, err = score(model, "--revision", "chck_3M")
    assert code == 1 and "has no revision chck_3M; it has chck_10M, chck_2M, chck_900K" in err
    assert revisions(model, False, "chck_2M") == {"chck_2M": model / "chck_2M"} and revisions(model, False, None) == {"main": model}


def test_a_dot_in_the_name_and_a_folder_that_is_no_model_are_refused_before_anything_is_scored(model, score, tmp_path):
    dotted = model.rename(model.with_name("tiny-0.5"))
    code, out, err = score(dotted)
    assert code == 1 and "rename the folder" in err and not (tmp_path / "results").exists()
    code, _, err = score(tmp_path / "nothing")
    assert code == 1 and "is no model folder" in err


def test_a_tokenizer_without_a_start_token_is_warned_about_and_scored_as_officially(model, score):
    settings = json.loads((model / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (model / "tokenizer.json").write_text(json.dumps(settings))
    code, out, _ = score(model, "--tasks", "blimp", "--no-untrained")
    assert code == 0 and "prepends no start token: the first word of a text is never scored" in out


def test_half_precision_checkpoints_are_scored_in_full(model, score, tmp_path):
    spoil(model, lambda weights: [weights.__setitem__(name, value.half()) for name, value in list(weights.items())])
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "dtype": "float16", "torch_dtype": "float16"}))
    code, _, err = score(model, "--tasks", "blimp", "--no-untrained")
    assert code == 0, err
    folder = tmp_path / "results/tiny/main/zero_shot/causal/blimp/blimp_fast"
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    lm, tokenizer = models.load_causal_lm(str(model)).eval(), models.load_tokenizer(model)
    assert lm.dtype == torch.float32
    text = read(folder, "predictions.json")["agreement_1"]["predictions"][0]["pred"]
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        logs = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
    assert max(rows[0]["scores"]) == pytest.approx(float(logs), abs=1e-4)


def test_an_over_long_item_is_named_and_costs_the_other_tasks_nothing(model, score, tmp_path):
    data = tmp_path / "long"
    for name, size in (("supplement_fast", 90), ("blimp_fast", 3)):
        (data / name).mkdir(parents=True)
        row = {"sentence_good": "the cat " * size, "sentence_bad": "the dog.", "UID": "u", "field": "f", "linguistics_term": "t"}
        (data / name / "u.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = score(model, "--no-untrained", data=data)
    assert code == 1 and re.search(r"u_0 has \d+ tokens, but the model has 64 positions", err) and "blimp_fast: " in out
    assert set(read(tmp_path / "results/tiny/main/zero_shot/causal")["tasks"]) == {"blimp_fast"}


def test_bf16_says_what_it_changes(model, score, tmp_path):
    code, out, err = score(model, "--tasks", "blimp", "--no-untrained", "--bf16")
    assert code == 0, err
    assert re.search(r"bf16: \d of 12 predictions are others than in fp32; scores differ by up to 0\.\d+ nats", out)
    assert read(tmp_path / "results/tiny/main/zero_shot/causal")["tasks"]["blimp_fast"]["bf16"]["largest_nats"] > 0
    _, out, _ = score(model, "--tasks", "blimp", "--no-untrained")
    assert "tiny main  blimp_fast" in out and "bf16" not in out, "another option is another score"
    assert "blimp_fast, tiny, by field: morphology " in out


# ---- Bad data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, message", [
    ('{"sentence_good": "A.", "sentence_bad": "B.", "UID": "u"}\n{"sentence_go', r"u.jsonl, line 2: not JSON \(cut short\?\)"),
    ('[1, 2]\n', "u.jsonl, line 1: not a JSON object"),
    ('{"sentence_good": "A.", "UID": "u"}\n', "u.jsonl, line 1: a row of BLiMP needs the field 'sentence_bad'; it has sentence_good, UID"),
    ("", "holds no items of BLiMP"),
    ('{"sentence_good": "", "sentence_bad": "B.", "UID": "u"}\n', "u.jsonl, line 1: no row of BLiMP: a candidate is empty, or no text"),
    ('{"sentence_good": "A.", "sentence_bad": null, "UID": "u"}\n', "line 1: no row of BLiMP: the field 'sentence_bad' is None, no text"),
    (b'{"sentence_good": "\xff", "sentence_bad": "B.", "UID": "u"}\n', r"u.jsonl, line 1: not JSON"),
])
def test_bad_files_are_named_with_their_line_and_other_tasks_are_kept(model, score, tmp_path, text, message, data):
    mixed = tmp_path / "mixed"
    shutil.copytree(data / "fast_eval", mixed)
    (mixed / "blimp_fast/islands.jsonl").unlink()
    (mixed / "blimp_fast/agreement_1.jsonl").unlink()
    (mixed / "blimp_fast/u.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = score(model, "--no-untrained", "--tasks", "blimp", "supplement", data=mixed)
    assert code == 1 and re.search(message, err), err
    assert set(read(tmp_path / "results/tiny/main/zero_shot/causal")["tasks"]) == {"supplement_fast"}
    code, out, err = score("--check_data", "--tasks", "blimp", "supplement", data=mixed)
    assert code == 1 and re.search(message, out) and "supplement_fast, 5 items" in out


@pytest.mark.parametrize("task, row, message", [
    ("wug_past", {"sentences": "a\tb", "ratio": "x"}, "line 1: no row of WUG past tense: could not convert string to float: 'x'"),
    ("wug_past", {"sentences": "a", "ratio": 1}, "needs at least two candidates to choose from, not 1"),
    ("global_piqa_nonparallel", {"example_id": "e", "prompt": "p", "solution0": "a", "solution1": "b", "label": 2},
     "label is 2, but there are 2 candidates, counted from 0"),
    ("global_piqa_nonparallel", {"example_id": "e", "prompt": "p", "solution0": "a", "solution1": "b", "label": "B"}, "no row of Glo"),
    ("entity_tracking", {"numops": 0, "input_prefix": "p", "options": [1, 2]}, "line 1: no row of entity tracking"),
])
def test_rows_that_say_something_else_are_named(tmp_path, task, row, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        read_items({**load_tasks("2026"), **TASKS}[task], tmp_path)


def test_check_data_counts_what_is_there_and_says_where_to_get_the_rest(score, data):
    code, out, _ = score("--check_data")
    assert code == 1 and f"BLiMP: {data / 'fast_eval/blimp_fast'}, 12 items: not the official blimp_fast" in out
    assert "60 items: not the official reading: 60 items instead of 1,726" in out
    code, out, _ = score("--check_data", "--suite", "2026", "--tasks", "global_piqa_parallel")
    assert code == 0 and "GlobalPIQA (parallel): none of" in out and "https://huggingface.co" in out


def test_check_data_knows_the_official_sets(shared, score):
    code, out, _ = score("--check_data", data=shared / "data/eval_fast")
    assert code == 0 and out.count("as many as the official set has") == 6 and "13,400 items, as many" in out
    code, out, _ = score("--check_data", "--suite", "2026", data=shared / "data/eval_fast")
    assert code == 0 and "2,238 items, as many" in out, "questions about empty boxes are gone"


def test_counts_that_differ_from_the_official_ones_are_named():
    uids = ["regular_0_ops"] * 606 + ["regular_1_ops"] * 607 + ["regular_2_ops"] * 606 + ["regular_3_ops"] * 606 + ["regular_4_ops"] * 568
    assert unlike_official(TASKS["entity_tracking"], "entity_tracking_fast", uids + ["regular_5_ops"] * 159) is None
    assert unlike_official(TASKS["entity_tracking"], "entity_tracking_fast", uids) == (
        "not the official entity_tracking_fast: 2,993 items instead of 3,152; regular_5_ops has 0 instead of 159")
    told = unlike_official(TASKS["entity_tracking"], "entity_tracking_fast", uids + ["odd_0_ops"] * 159)
    assert told == "not the official entity_tracking_fast: odd_0_ops has 159 instead of 0; regular_5_ops has 0 instead of 159"
    assert unlike_official(TASKS["supplement"], "supplement_fast", ["a"] * 200 + ["b"] * 50).endswith("a has 200 instead of 50")
    assert unlike_official(TASKS["blimp"], "my_own", ["a"]) is None
    filtered = [uid.replace("principle_a", "principle_A") for uid, count in TASKS["blimp"].sizes["blimp_filtered"].items()
                for _ in range(count) if uid != "total"]
    assert unlike_official(TASKS["blimp"], "blimp_filtered", filtered) is None, "as the rows spell them"
    for tasks in (TASKS, load_tasks("2026")):
        for task in tasks.values():
            for sizes in task.sizes.values():
                named = [count for uid, count in sizes.items() if uid not in ("total", "*")] if isinstance(sizes, dict) else []
                assert not named or sum(named) == sizes["total"], task.name


def test_sets_that_are_absent_are_skipped_and_unknown_tasks_refused(model, score, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, _ = score(model, data=tmp_path / "empty")
    assert code == 0 and out.count("skipped: ") == len(TASKS) and "nothing to score: " in out
    code, _, err = score(model, "--tasks", "blimp", "glimp")
    assert code == 1 and "no such task: glimp; this suite has blimp, supplement" in err
    code, _, err = score(model, data=tmp_path / "nowhere")
    assert code == 1 and "no evaluation data at" in err


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_a_packed_download_is_unpacked_once(score, tmp_path, data, kind):
    (tmp_path / "packed").mkdir()
    shutil.copytree(data, tmp_path / "packed/evaluation_data")
    archive = Path(shutil.make_archive(tmp_path / "download", kind, tmp_path / "packed"))
    _, out, _ = score("--check_data", data=archive)
    assert "unpacking" in out and "blimp_fast, 12 items" in out and "comps, 6 items" in out
    _, out, _ = score("--check_data", data=archive)
    assert "unpacking" not in out and "blimp_fast, 12 items" in out
    broken = archive.with_name(f"broken{archive.suffix}")
    broken.write_bytes(archive.read_bytes()[: len(archive.read_bytes()) // 2])
    code, _, err = score("--check_data", data=broken)
    assert code == 1 and "is no whole .zip or .tar.gz" in err and not broken.with_name(f"{broken.name}.unpacked").exists()


def test_reading_times_of_another_file_are_refused(model, score, tmp_path):
    (tmp_path / "r/reading").mkdir(parents=True)
    (tmp_path / "r/reading/reading_data.csv").write_text("item,word\na,b\n")
    code, _, err = score(model, "--tasks", "reading", "--no-untrained", data=tmp_path / "r")
    assert code == 1 and "lacks the columns RTfirstfix" in err
    (tmp_path / "r/reading/reading_data.csv").unlink()
    code, _, err = score(model, "--tasks", "reading", "--no-untrained", data=tmp_path / "r")
    assert code == 1 and "cannot read" in err and "reading_data.csv" in err and "Traceback" not in err


def test_tasks_are_data(tmp_path):
    text = (ROOT / "eval/tasks.yaml").read_text()
    assert list(load_tasks()) == [task.name for task in choose_tasks(None, TASKS)]
    (tmp_path / "tasks.yaml").write_text(text.replace("chance: 20.0", "chanse: 20.0"))
    with pytest.raises(UserError, match="tasks.yaml: entity_tracking: chan"):
        load_tasks(tmp_path / "tasks.yaml")
    with pytest.raises(UserError, match="no suite 2024: give 2025 or 2026"):
        load_tasks("2024")
    for text, message in (("changes: missing.yaml", "changes: 'missing.yaml' is no other file beside it"),
                          ("changes: own.yaml", "is no other file"), ("changes: 5", "changes: 5 is no other file"),
                          ("changes: tasks.yaml\nblmip: null", "blmip: expected the keys of a task, or null for a task of tasks.yaml"),
                          ("- blimp", "not a mapping"), ("a: {", "own.yaml")):
        (tmp_path / "own.yaml").write_text(text)
        (tmp_path / "tasks.yaml").write_text((ROOT / "eval/tasks.yaml").read_text())
        with pytest.raises(UserError, match=message):
            load_tasks(tmp_path / "own.yaml")
    (tmp_path / "tasks.yaml").write_text("mine:\n  title: Mine\n  sets: [mine]\n  folder: mine\n  uid: '{file}'\n  chance: 50\n"
                                         "  candidates: [{text: '{good}'}, {text: '{bad}'}]\n  source: me\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/x.jsonl").write_text('{"good": "a", "bad": "b"}\n')
    (task,) = load_tasks(tmp_path / "tasks.yaml").values()
    assert [item.texts for item in read_items(task, find_sets(task, tmp_path)[0])] == [("a", "b")]


def test_the_tasks_of_2026_are_a_file_of_changes(model, score, tmp_path, data):
    new = load_tasks("2026")
    assert [name for name in TASKS if name not in new] == ["wug_past", "wug_adj"]
    assert [name for name in new if name not in TASKS] == ["global_piqa_parallel", "global_piqa_nonparallel"]
    assert new["blimp"] == TASKS["blimp"] and new["reading"] == TASKS["reading"]
    places = {}
    for name, task, rows in (
            ("ewok_fast", "ewok", [{"Domain": "d", "ContextType": "direct", "Context1": "It is hot.", "Context2": "It is cold.",
                                    "Target1": "The ice melts.", "Target2": "The ice stays."}]),
            ("entity_tracking_fast", "entity_tracking", [{"numops": 0, "input_prefix": "Box 1 contains ", "options": options} for options in
                                                         (["the cup.", "nothing."], ["the cup.", "the hat."])]),
            ("global_piqa_parallel", "global_piqa_parallel", [{"example_id": f"eng_{n}", "prompt": "To dry a cup,", "label": n, **{
                f"solution{k}": word for k, word in enumerate(("use a cloth", "use a towel and then the sun", "use water", "wait"))}}
                                                              for n in (0, 3)])):
        places[task] = tmp_path / "new" / name
        places[task].mkdir(parents=True)
        (places[task] / "eng_latn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (item,) = read_items(new["ewok"], places["ewok"])
    assert (item.prefixes, item.texts) == (("It is hot.", "It is cold."), (" The ice melts.", " The ice melts."))
    assert item.names == ("It is hot. The ice melts.", "It is cold. The ice melts.")
    (old,) = read_items(TASKS["ewok"], places["ewok"])
    assert (old.prefixes, old.texts) == (("It is hot.",) * 2, (" The ice melts.", " The ice stays.")) and old.names == old.texts
    assert [item.texts for item in read_items(new["entity_tracking"], places["entity_tracking"])] == [("the cup.", "the hat.")]
    assert len(read_items(TASKS["entity_tracking"], places["entity_tracking"])) == 2
    code, out, err = score(model, "--suite", "2026", "--no-untrained", data=tmp_path / "new")
    assert (code, err) == (0, "") and "2026 strict-small GPT-2 (official): ewok 50.63, entity_tracking 19.10, global_piqa 35.09" in out
    folder = tmp_path / "results/tiny/main/zero_shot/causal/global_piqa_parallel/global_piqa_parallel"
    predictions = read(folder, "predictions.json")
    assert list(predictions) == ["eng_0", "eng_3"] and [len(entry["predictions"]) for entry in predictions.values()] == [1, 1]
    rows = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in rows] == [0, 3] and rows[0]["scores"] == rows[1]["scores"]
    tokenizer, lm = models.load_tokenizer(model), models.load_causal_lm(str(model)).eval()
    (ids, scored) = completion_tokens(tokenizer, "To dry a cup,", " use a towel and then the sun")
    with torch.no_grad():
        logits = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    mean = np.mean([logits[place - 1, ids[place]].item() for place in scored])
    assert rows[0]["scores"][1] == pytest.approx(mean, abs=1e-4), "nats per token of the completion"
    assert predictions["eng_0"]["predictions"][0]["pred"].startswith(" ")


@pytest.mark.parametrize("template, first", [("<s> $A </s>", 3), ("<s> $A", 3), ("$A </s>", 2)])
def test_the_first_mask_is_found_with_and_without_an_end_token(template, first):
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "<mask>", "the", "cat"])}, "<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>")
    row = dict.fromkeys(reading.TEXTS, "") | {"item": "the cat", "word": "cat"}
    ((_, _, mlm),), ((_, _, mntp),) = (reading.requests([row], tokenizer, name) for name in ("mlm", "mntp"))
    assert mlm.ids[first:first + 3] == (3, 3, 3) and mlm.targets == ((first, 5),) and mntp.targets == ((first - 1, 5),)


@pytest.mark.parametrize("backend, early", [("mlm", 0), ("mntp", 1)])
def test_surprisals_of_masked_models_are_read_at_the_first_of_three_masks(shared, backend, early, tmp_path, in_process):
    """Against a plain loop over the context with its masks, one forward pass per piece of a word."""
    golden = shared / "data/golden/tinybert"
    (tmp_path / "few/reading").mkdir(parents=True)
    lines = (shared / "data/eval_fast/reading/reading_data.csv").read_text().split("\n")
    (tmp_path / "few/reading/reading_data.csv").write_text("\n".join(lines[:41]) + "\n")
    in_process("eval.zero_shot", golden, "--backend", backend, "--data", tmp_path / "few", "--tasks", "reading", "--output", tmp_path,
               "--no-untrained")
    found = read(tmp_path / "tinybert/main/zero_shot" / backend / "reading", "predictions.json")["reading"]["predictions"]
    from transformers import AutoModelForMaskedLM

    tokenizer, lm = models.load_tokenizer(golden), AutoModelForMaskedLM.from_pretrained(golden, dtype=torch.float32).eval()
    several = 0
    for row, entry in list(zip(reading.read_rows(tmp_path / "few/reading/reading_data.csv"), found, strict=True))[:12]:
        context, total = row["item"], 0.0
        pieces = tokenizer(row["word"], add_special_tokens=False).input_ids
        several += len(pieces) > 1
        for place, piece in enumerate(pieces):
            ids = tokenizer(context + tokenizer.mask_token * 3).input_ids
            first = ids.index(tokenizer.mask_token_id)
            assert ids[first:first + 3] == [tokenizer.mask_token_id] * 3
            text = tokenizer.decode([piece])
            target = tokenizer(text, add_special_tokens=False).input_ids[0] if place else piece
            with torch.no_grad():
                total -= lm(input_ids=torch.tensor([ids])).logits[0, first - early].log_softmax(-1)[target].item()
            context += text
        assert entry["pred"] == pytest.approx(total, abs=1e-4)
    assert several


# ---- Continuing -------------------------------------------------------------------------------------------------------


def test_what_is_scored_is_not_scored_again_unless_the_model_or_the_data_changed(model, score, tmp_path, data):
    score(model, "--tasks", "blimp", "supplement", "--no-untrained")
    code, out, _ = score(model, "--tasks", "blimp", "supplement", "--no-untrained")
    assert code == 0 and "tiny main" not in out and "| blimp_fast (not the official set) | 12 |" in out
    assert "12 items instead of 13,400" in out, "said again, though nothing was scored"
    _, out, _ = score(model, "--tasks", "blimp", "--no-untrained", "--fresh")
    assert "tiny main  blimp_fast" in out
    folder = tmp_path / "results/tiny/main/zero_shot/causal"
    assert set(read(folder)["tasks"]) == {"blimp_fast", "supplement_fast"}, "others are kept"
    (folder / "blimp/blimp_fast/items.jsonl").unlink()
    _, out, _ = score(model, "--tasks", "blimp", "supplement", "--no-untrained")
    assert "tiny main  blimp_fast" in out and "tiny main  supplement_fast" not in out, "its files come back"
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    with (changed / "fast_eval/supplement_fast/turn_taking.jsonl").open("a") as stream:
        stream.write('{"sentence_good": "The cat.", "sentence_bad": "Cat the."}\n')
    _, out, _ = score(model, "--tasks", "supplement", "--no-untrained", data=changed)
    assert re.search(r"supplement_fast: replaces \d+\.\d\d, scored of other files", out)


@pytest.mark.parametrize("change", ["weights", "config.json", "tokenizer.json"])
def test_results_of_another_checkpoint_are_moved_aside(model, score, tmp_path, change):
    """Weights, config, tokenizer: a score follows from all of them, and one table must not mix two models."""
    score(model, "--tasks", "blimp", "supplement", "--no-untrained")
    if change == "weights":
        spoil(model, lambda weights: weights["transformer.ln_f.weight"].mul_(-1))
    elif change == "config.json":
        config = json.loads((model / change).read_text())
        (model / change).write_text(json.dumps({**config, "activation_function": "relu"}))
    else:
        tokenizer = json.loads((model / change).read_text())
        (model / change).write_text(json.dumps({**tokenizer, "post_processor": None}))
    _, out, _ = score(model, "--tasks", "blimp", "--no-untrained")
    assert "tiny main  blimp_fast" in out and "held results of another checkpoint of this name: moved to" in out
    assert set(read(tmp_path / "results/tiny/main/zero_shot/causal")["tasks"]) == {"blimp_fast"}
    assert set(read(tmp_path / "results/tiny/main/zero_shot-old1/causal")["tasks"]) == {"blimp_fast", "supplement_fast"}


def test_what_would_overwrite_or_spoil_is_refused(model, score, tmp_path, in_process):
    twin = Path(shutil.copytree(model, tmp_path / "twin/tiny"))
    code, _, err = score(model, twin, "--tasks", "blimp")
    assert code == 1 and "several models are named tiny" in err
    with pytest.raises(UserError, match="would lie inside the checkpoint"):
        in_process("eval.zero_shot", model, "--data", tmp_path, "--output", model.parent)


def test_a_damaged_checkpoint_costs_the_others_nothing(model, score, tmp_path):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    code, out, err = score(model, broken, "--tasks", "supplement", "--no-untrained")
    assert code == 1 and "cannot load the model" in err and "broken" in err and "Traceback" not in err
    assert "| supplement_fast (not the official set) | 5 |" in out


def test_items_that_are_alone_in_their_uid_have_a_standard_error_together():
    rows = [{"pred": int(number % 4 == 0), "gold": 0, "correct": number % 4 != 0} for number in range(100)]
    items = [Item(f"u{number}", "x", ("", ""), ("a", "b"), 0, None) for number in range(100)]
    found = reports.accuracy(load_tasks("2026")["global_piqa_nonparallel"], items, rows)
    assert found == pytest.approx((75, 100 * (0.75 * 0.25 / 100) ** 0.5))


def test_the_untrained_row_follows_the_config(model, score, tmp_path, teachers):
    score(model, "--tasks", "supplement")
    before = read(tmp_path / "results/tiny/untrained/zero_shot/causal")["tasks"]["supplement_fast"]["identity"]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_layer": 1}))
    score(model, "--tasks", "supplement")
    assert read(tmp_path / "results/tiny/untrained/zero_shot/causal")["tasks"]["supplement_fast"]["identity"] != before


def test_a_set_in_both_folders_is_scored_once_and_two_that_differ_are_refused(score, model, tmp_path, data):
    """The challenge's full_eval/ and fast_eval/ both hold the WUG sets and the reading times."""
    both = Path(shutil.copytree(data, tmp_path / "both"))
    shutil.copytree(both / "fast_eval/wug_past_tense", both / "full_eval/wug_past_tense")
    assert [path.parent.name for path in find_sets(TASKS["wug_past"], both)] == ["full_eval"]
    _, out, _ = score(model, "--tasks", "wug_past", "--no-untrained", data=both)
    assert out.count("tiny main  wug_past_tense") == 1
    with (both / "full_eval/wug_past_tense/wug_past_tense.jsonl").open("a") as stream:
        stream.write('{"sentences": "a\\tb", "ratio": 1}\n')
    code, _, err = score(model, "--tasks", "wug_past", data=both)
    assert code == 1 and "are different sets of one name" in err


def test_a_killed_evaluation_goes_on_with_the_texts_that_are_left(model, data, tmp_path, warm_python):
    """A real process, killed while it scores, then run again: the same files as in one go."""
    many = tmp_path / "many/blimp_fast"
    many.mkdir(parents=True)
    random = np.random.default_rng(1)
    for uid in range(20):
        rows = [{"sentence_good": sentence(random, 20), "sentence_bad": sentence(random, 20), "UID": f"u{uid}", "field": "f",
                 "linguistics_term": "t"} for _ in range(60)]
        (many / f"u{uid}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["-m", "eval.zero_shot", model, "--data", many.parent, "--no-untrained", "--batch_tokens", "256"]
    progress = tmp_path / "cut/tiny/main/zero_shot/causal/blimp/blimp_fast/progress.jsonl"
    child = subprocess.Popen([sys.executable, *command, "--output", tmp_path / "cut"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while child.poll() is None and (not progress.exists() or progress.read_text().count("\n") < 60):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not progress.with_name("predictions.json").exists()
    with progress.open("a") as stream:
        stream.write("[17, -3")  # half a line
    kept = len({json.loads(line)[0] for line in progress.read_text().split("\n")[1:-1]})
    again = subprocess.run([warm_python, *command, "--output", tmp_path / "cut"], cwd=ROOT, capture_output=True, text=True, check=True)
    said = re.search(r"BLiMP \(blimp_fast\): ([\d,]+) of 2,400 texts were scored before", again.stdout)
    assert said and kept - 1 <= int(said[1].replace(",", "")) <= kept + 1 and not progress.exists()
    subprocess.run([warm_python, *command, "--output", tmp_path / "whole"], cwd=ROOT, capture_output=True, check=True)
    for name in ("predictions.json", "best_temperature_report.txt"):
        cut, whole = ((tmp_path / which / "tiny/main/zero_shot/causal/blimp/blimp_fast" / name).read_text() for which in ("cut", "whole"))
        assert cut == whole, name


def test_what_another_model_had_answered_is_not_taken_up(model, score, tmp_path):
    score(model, "--tasks", "supplement", "--no-untrained")
    folder = tmp_path / "results/tiny/main/zero_shot/causal/blimp/supplement_fast"
    right = (folder / "items.jsonl").read_text()
    identity = {**read(folder.parents[1])["tasks"]["supplement_fast"]["identity"], "checkpoint": "another"}
    (folder / "progress.jsonl").write_text(json.dumps(identity) + "\n" + "".join(f"[{number}, {-number}]\n" for number in range(10)))
    _, out, _ = score(model, "--tasks", "supplement", "--no-untrained", "--fresh")
    assert "were scored before" not in out and (folder / "items.jsonl").read_text() == right


def test_the_official_scripts_usage(model, data, tmp_path, warm_python):
    script = ROOT / "eval/eval_zero_shot.sh"
    environment = {**os.environ, "PYTHON": str(warm_python)}
    (tmp_path / "small/wug_past_tense").mkdir(parents=True)
    shutil.copy(data / "fast_eval/wug_past_tense/wug_past_tense.jsonl", tmp_path / "small/wug_past_tense")
    done = subprocess.run(["bash", script, "tiny", "causal", "small"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results/tiny/main/zero_shot/causal/wug_past/wug_past_tense/best_temperature_report.txt").exists()
    done = subprocess.run(["bash", script, "tiny"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: eval/eval_zero_shot.sh <model path>" in done.stderr
