"""Ages of acquisition: surprisals against a plain loop, the official format, the fits, and what continues after an interruption."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from babylm import models
from babylm.config import ModelSection, UserError
from eval import aoa

ROOT = Path(aoa.__file__).parents[1]
WORDS = {"dog": ["the child sees the", "", "look at the "], "banana": ["she eats a"],
         "in": ["the dog is", "we live"], "mummy": ["where is"]}
MONTHS = range(16, 31)


def write_data(folder, words=WORDS, ages=None):
    """Both files; children learn the words at `ages` months, by default one after the other from 18."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {word: [{"context": text, "word_in_context_stats": {"count": 1}} for text in contexts] for word, contexts in words.items()}
    (folder / aoa.CONTEXTS).write_text(json.dumps(entries))
    with (folder / aoa.CHILDREN).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["word", *MONTHS])
        for place, word in enumerate(words):
            age = (ages or {}).get(word, 18 + 2 * place)
            table.writerow([word, *(f"{1 / (1 + np.exp(-(month - age) / 1.5)):.4f}" for month in MONTHS)])
    return folder


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A folder with a final model and milestones of 500K, 2M and 10M words; random weights, each its own. Read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for seed, name in enumerate(("", "chck_10M", "chck_2M", "chck_500K")):
        model = models.build_model(ModelSection(layers=1, width=16, heads=2, max_positions=64), tokenizer, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        (folder / name).mkdir(parents=True, exist_ok=True)
        models.save_model(model, tokenizer, folder / name)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "aoa")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(model, data, *arguments) -> (surprisal.json, ages.json, what was printed)."""

    def run(model, data, *arguments):
        monkeypatch.setattr(sys, "argv", ["aoa", str(model), "--data", str(data), "--output", str(tmp_path / "results"), *arguments])
        aoa.main()
        folder = tmp_path / "results" / model.name / "main" / "zero_shot" / "causal" / "AoA_word"
        return (json.loads((folder / "surprisal.json").read_text()), json.loads((folder / "ages.json").read_text()),
                capsys.readouterr().out)

    return run


@torch.no_grad()
def plain_surprisal(folder, context, word):
    """One text at a time, the whole softmax."""
    tokenizer, model = models.load_tokenizer(folder), models.load_causal_lm(str(folder)).eval()
    text = f"{context.strip()} {word}"
    encoded = tokenizer(text, return_offsets_mapping=True)
    logprobs = model(input_ids=torch.tensor([encoded.input_ids])).logits[0].log_softmax(-1)
    return -sum(float(logprobs[place - 1, token]) for place, (token, (_, end)) in
                enumerate(zip(encoded.input_ids, encoded.offset_mapping, strict=True)) if end > len(text) - len(word))


# ---- Surprisal --------------------------------------------------------------------------------------------------------


def test_records_are_official_and_equal_a_plain_loop(run, data, call):
    found, ages, _ = call(run, data)
    records = found["results"]
    steps = [("chck_500K", 500_000), ("chck_2M", 2_000_000), ("chck_10M", 10_000_000)]  # by words, without main
    assert [(r["step"], r["word_count"], r["target_word"], r["context_id"], r["context"]) for r in records] == [
        (*step, word, number, context.strip()) for step in steps for word in WORDS for number, context in enumerate(WORDS[word])]
    assert found["metadata"] == {"model_name": "tiny", "use_bos_only": False, "total_steps": 3, "completed_steps": 3}
    assert all(list(r) == ["step", "word_count", "target_word", "context_id", "context", "surprisal"] for r in records)
    for record in records:
        wanted = plain_surprisal(run / record["step"], record["context"], record["target_word"])
        assert record["surprisal"] == pytest.approx(wanted, abs=1e-4), record
    assert len({round(r["surprisal"], 6) for r in records}) == len(records)  # each context counts, and each milestone
    means = [np.mean([r["surprisal"] for r in records if r["step"] == step and r["target_word"] == "dog"]) for step, _ in steps]
    assert ages["words"]["dog"]["surprisal"] == pytest.approx(means) and ages["words"]["dog"]["contexts"] == 3


def test_several_tokens_are_summed_and_the_context_is_not(tokenizer):
    words = [aoa.Word("banana", ("she eats a", ""))]
    for request, context in zip(aoa.requests(words, tokenizer), words[0].contexts, strict=True):
        tokens = [token for _, token in request.targets]
        assert tokenizer.decode(tokens).strip() == "banana" and len(tokens) > 1
        assert tokenizer.decode(request.ids, skip_special_tokens=True) == f"{context} banana"


def test_as_a_command_with_its_figure(run, data, tmp_path):
    done = subprocess.run([sys.executable, "-m", "eval.aoa", run, "--data", data, "--output", tmp_path / "results", "--milestones",
                           "chck_10M", "chck_2M"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results/tiny/main/zero_shot/causal/AoA_word"
    assert {path.name for path in folder.iterdir()} == {"surprisal.json", "ages.json", "curves.png", "curves.svg", "steps"}
    assert "4 words in 7 contexts, 2 milestones" in done.stdout and "no ages of the model: 2 milestones" in done.stdout
    drawn = (folder / "curves.svg").read_text()
    assert "early: children at 18" in drawn and "mean surprisal (nats)" in drawn


# ---- Continuing -------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """The folders of the models that are loaded, as they are."""
    right, names = aoa.load_model, []
    monkeypatch.setattr(aoa, "load_model", lambda path, *rest: names.append(path.name) or right(path, *rest))
    return names


def test_an_interrupted_run_goes_on_with_the_next_milestone(run, data, call, loaded, monkeypatch):
    right = aoa.Scorer.logprobs

    def until_the_third(self, *arguments):
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return right(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(aoa.Scorer, "logprobs", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            call(run, data)
    assert loaded == ["chck_500K", "chck_2M", "chck_10M"]
    loaded.clear()
    found, _, _ = call(run, data)
    assert loaded == ["chck_10M"] and len(found["results"]) == 21


def test_other_data_or_weights_are_scored_anew(run, data, call, loaded, tmp_path):
    model = shutil.copytree(run, tmp_path / "other")
    call(model, data)
    loaded.clear()
    shutil.copy(run / "model.safetensors", model / "chck_2M")
    before, _, _ = call(model, data)
    assert loaded == ["chck_2M"]
    loaded.clear()
    write_data(data, {**WORDS, "dog": ["the child sees a"] * 3})
    after, _, _ = call(model, data)
    assert loaded == ["chck_500K", "chck_2M", "chck_10M"]
    assert after["results"][0]["surprisal"] != before["results"][0]["surprisal"]


# ---- Ages -------------------------------------------------------------------------------------------------------------


SEEN = {f"chck_{n}M": n * 1_000_000 for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)}


def falling(age, low=3.0, high=12.0, width=0.15):
    """A curve over SEEN that is half way down at `age` words."""
    return low + (high - low) / (1 + np.exp((np.log10(list(SEEN.values())) - np.log10(age)) / width))


def test_a_sigmoids_middle_is_found():
    x, wanted = np.log10(list(SEEN.values())), np.array([1.7e6, 4e6, 1.2e7, 3.3e7, 6e7])
    curves = np.stack([falling(age) for age in wanted])
    assert 10 ** aoa.fit_falling(x, curves) == pytest.approx(wanted, rel=0.03)
    noisy = curves + np.random.default_rng(0).normal(0, 0.3, curves.shape)
    assert 10 ** aoa.fit_falling(x, noisy) == pytest.approx(wanted, rel=0.2)


def test_what_does_not_fall_is_not_learnt():
    x, rng = np.log10(list(SEEN.values())), np.random.default_rng(1)
    noise = 8 + rng.normal(0, 0.1, len(x))
    curves = np.stack([falling(1e7)[::-1], np.full(len(x), 8.0), noise, falling(1e9), falling(1e7)])
    assert np.isfinite(aoa.fit_falling(x, curves)).tolist() == [False, False, False, False, True]


def test_the_month_at_which_half_of_the_children_say_it():
    months, wanted = np.arange(16.0, 31), np.array([17.3, 22.0, 29.1, 34.0, 12.0])
    shares = 1 / (1 + np.exp(-(months - wanted[:, None]) / 2.5))
    found = aoa.fit_shares(months, shares)
    assert found[:3] == pytest.approx(wanted[:3], abs=0.15)
    assert np.isnan(found[3:]).all()  # not half yet at the last month; more than half already at the first


def test_ages_of_both_correlate_and_the_rest_is_listed():
    order = [1.5e6, 3e6, 8e6, 2e7, 6e7]
    words = [aoa.Word(f"word{n}", ("x",)) for n in range(5)] + [aoa.Word(name, ("x",)) for name in ("never", "late", "unknown")]
    curves = np.stack([*map(falling, order), np.full(len(SEEN), 9.0), falling(1e7), falling(1e7)])
    months = np.arange(16.0, 31)
    children = {word.text: 1 / (1 + np.exp(-(months - age) / 2)) for word, age in
                zip(words, [18, 20, 22, 24, 26, 21, 40], strict=False)}
    found = aoa.ages(words, SEEN, curves, months, children)
    assert found["left_out"] == {"not learnt by the model": ["never"], "not learnt by children": ["late"],
                                 "not in cdi_human.csv": ["unknown"]}
    assert found["correlation"]["n"] == 5
    wanted = np.corrcoef(np.log10(order), [18, 20, 22, 24, 26])[0, 1]  # over log words: over words it would be 0.87
    assert found["correlation"]["pearson"] == pytest.approx(wanted, abs=0.005)
    assert found["correlation"]["spearman"] == pytest.approx(1.0)
    assert [found["words"][f"word{n}"]["words_seen"] for n in range(5)] == pytest.approx(order, rel=0.03)
    json.dumps(found, allow_nan=False)
    assert aoa.figure(found, "A").axes[1].lines[0].get_xdata() == pytest.approx([18, 20, 22, 24, 26], abs=0.15)


def test_means_are_over_each_words_own_contexts():
    words = [aoa.Word("a1", ("x",) * 3), aoa.Word("b1", ("x",)), aoa.Word("c1", ("x",) * 2)]
    assert aoa.mean_curves(words, {"s": [1, 2, 6, 10, 4, 8], "t": [0, 0, 3, 5, 1, 1]}).tolist() == [[3, 1], [10, 5], [6, 1]]


def test_few_words_or_milestones_give_no_correlation(run, data, call):
    _, ages, said = call(run, data)
    assert ages["correlation"] == {"n": 0, "pearson": None, "spearman": None}
    assert "no ages of the model: 3 milestones, but a sigmoid needs 5" in said and "no correlation of ages" in said
    assert ages["left_out"]["not learnt by the model"] == []  # not known


# ---- Errors -----------------------------------------------------------------------------------------------------------


def test_words_of_one_letter_or_without_contexts_are_left_out(tmp_path, capsys):
    data = write_data(tmp_path / "aoa", {"a": ["x"], "dog": ["the"], "cat": []})
    assert [word.text for word in aoa.read_words(data / aoa.CONTEXTS)] == ["dog"]
    assert "'a', 'cat'" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [
    ('{"dog": [{"context": "the"}', r"cdi_childes.json: not JSON"),
    ('["dog"]', r"cdi_childes.json: not an object .* but a list"),
    ('{"dog": {"context": "the"}}', r"cdi_childes.json, word 'dog': its contexts are a dict, not a list"),
    ('{"dog": [{"context": "the"}, {"text": "a"}]}', r"cdi_childes.json, word 'dog', entry 1: not of the form"),
    ('{"dog": [{"context": null}]}', r"cdi_childes.json, word 'dog', entry 0: not of the form"),
    ('{"a": [{"context": "the"}]}', r"holds no word of two letters or more"),
])
def test_malformed_contexts_are_named(tmp_path, text, message):
    path = tmp_path / aoa.CONTEXTS
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        aoa.read_words(path)


@pytest.mark.parametrize(("text", "message"), [
    ("", "cdi_human.csv: needs a column `word` .* it has no rows"),
    ("item,16,17,18\ndog,0,0,1\n", "needs a column `word` .* it has item, 16, 17, 18"),
    ("word,16,17,18\ndog,0.1,much,1\n", "line 2, word 'dog': 'much' at month 17 is no share"),
    ("word,16,17,18\ndog,0.1,17,1\n", "line 2, word 'dog': '17' at month 17 is no share"),
    ("word,16,17,18\ndog,0.1,nan,1\n", "line 2, word 'dog': 'nan' at month 17 is no share"),
    ("word,16,17,18\ndog,0.1\n", "line 2, word 'dog': None at month 17 is no share"),
    ("word,16,17,18\ndog,0,0,1\ndog,0,0,1\n", "line 3: the word 'dog' is there a second time"),
])
def test_malformed_shares_are_named(tmp_path, text, message):
    path = tmp_path / aoa.CHILDREN
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        aoa.read_children(path)


def test_columns_are_taken_in_the_order_of_months(tmp_path):
    path = tmp_path / aoa.CHILDREN
    path.write_text("lemma,16,word,8,12\nx,0.3,dog,0.1,0.2\n")
    months, children = aoa.read_children(path)
    assert months.tolist() == [8, 12, 16] and children["dog"].tolist() == [0.1, 0.2, 0.3]


def test_what_is_missing_is_named(run, data, call, tmp_path):
    with pytest.raises(UserError, match="has no milestone chck_3M; it has chck_500K, chck_2M, chck_10M"):
        call(run, data, "--milestones", "chck_3M")
    with pytest.raises(UserError, match="has no milestones chck_"):
        call(run / "chck_2M", data)
    with pytest.raises(UserError, match=r"cdi_childes.json does not exist: give --data"):
        call(run, tmp_path)
    (data / aoa.CHILDREN).unlink()
    with pytest.raises(UserError, match=r"cdi_human.csv does not exist: give --data"):
        call(run, data)


def test_a_context_that_is_too_long_is_named(run, tmp_path, call):
    data = write_data(tmp_path / "aoa", {"dog": ["the", "look " * 70]})
    with pytest.raises(UserError, match="the word 'dog' after its context 1 has .* tokens, but the model has 64 positions"):
        call(run, data)
