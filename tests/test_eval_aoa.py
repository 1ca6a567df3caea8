"""Ages of acquisition: surprisals against a plain loop, the official formats, each rule of the official score, and what continues."""

import csv
import json
import math
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares
from scipy.stats import pearsonr, spearmanr
from transformers import BertConfig, BertForMaskedLM

from babylm import models
from babylm.config import ModelSection
from babylm.schema import UserError, milestone_words
from eval import aoa
from eval.reports import results_home

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

    monkeypatch.setattr(aoa.figures, "save", lambda *_: None)  # takes longer than all else, and is tested as a command

    def run(model, data, *arguments, backend="causal"):
        monkeypatch.setattr(sys, "argv", ["aoa", str(model), "--data", str(data), "--output", str(tmp_path / "results"), "--backend",
                                          backend, *arguments])
        aoa.main()
        folder = tmp_path / "results" / model.name / "main" / "zero_shot" / backend / "AoA_word"
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
        (*step, word, number, context) for step in steps for word in WORDS for number, context in enumerate(WORDS[word])]
    assert found["metadata"] == {"model_name": "tiny", "use_bos_only": False, "total_steps": 3, "completed_steps": 3}
    assert all(list(r) == ["step", "word_count", "target_word", "context_id", "context", "surprisal"] for r in records)
    for record in records:
        wanted = plain_surprisal(run / record["step"], record["context"], record["target_word"])
        assert record["surprisal"] == pytest.approx(wanted, abs=1e-4), record
    assert len({round(r["surprisal"], 6) for r in records}) == len(records)  # each context counts, and each milestone
    means = [np.mean([r["surprisal"] for r in records if r["step"] == step and r["target_word"] == "dog"]) for step, _ in steps]
    assert ages["words"]["dog"]["surprisal"] == pytest.approx(means) and ages["words"]["dog"]["contexts"] == 3


def test_several_tokens_are_summed_and_the_context_is_not(tokenizer):
    words = [aoa.Word("banana", ("she eats a", "")), aoa.Word("dog", (" the  ",))]
    asked = aoa.requests(words, tokenizer, aoa.SUITES["2026"], "causal")
    for (request,), text, word in zip(asked, ("she eats a banana", " banana", "the dog"), ("banana", "banana", "dog"), strict=True):
        tokens = [token for _, token in request.targets]
        assert tokenizer.decode(tokens).strip() == word and (len(tokens) > 1 or word == "dog")
        assert tokenizer.decode(request.ids, skip_special_tokens=True) == text


MANY = {"dog": ["look at the"] * 12 + ["a"] * 8, "banana": [f"{n} of the" for n in range(21)], "in": ["we live"] * 19}


@torch.no_grad()
def test_in_2025_a_word_follows_two_start_tokens_and_is_computed_once(run, tmp_path, call, monkeypatch):
    texts, right = [], aoa.Scorer.logprobs
    monkeypatch.setattr(aoa.Scorer, "logprobs", lambda self, asked: texts.append(len(asked)) or right(self, asked))
    found, _, said = call(run, write_data(tmp_path / "aoa", MANY), "--suite", "2025")
    assert set(texts) == {2} and "fewer than 20 context(s)): 'in'" in said
    assert found["metadata"]["use_bos_only"] is True
    records = found["results"]
    assert [(r["step"], r["target_word"], r["context_id"], r["context"]) for r in records] == [
        (step, word, number, "BOS_ONLY") for step in ("chck_500K", "chck_2M", "chck_10M") for word in ("dog", "banana")
        for number in range(len(MANY[word]))]
    for step in ("chck_500K", "chck_10M"):
        tokenizer, model = models.load_tokenizer(run / step), models.load_causal_lm(str(run / step)).eval()
        for word in ("dog", "banana"):
            ids = [tokenizer.bos_token_id] * 2 + tokenizer(word, add_special_tokens=False).input_ids
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            wanted = -sum(float(logprobs[place - 1, ids[place]]) for place in range(2, len(ids)))
            mine = {r["surprisal"] for r in records if (r["step"], r["target_word"]) == (step, word)}
            assert len(mine) == 1 and mine.pop() == pytest.approx(wanted, abs=1e-4)
    assert "of surprisals after the start token alone, which 2025 scored otherwise" in said


@pytest.fixture(scope="module")
def masked(tokenizer, run, tmp_path_factory):
    """A masked model with a milestone. Read only."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    own = models.load_tokenizer(run)
    own.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(own), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                       intermediate_size=24, max_position_embeddings=40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    for place in (folder, folder / "chck_1M"):
        model.save_pretrained(place)
        own.save_pretrained(place)
    return folder


@torch.no_grad()
@pytest.mark.parametrize(("backend", "shift"), [("mlm", 0), ("mntp", 1)])
def test_masked_models_see_each_token_masked(masked, data, call, backend, shift):
    found, _, _ = call(masked, data, backend=backend)
    tokenizer, model = models.load_tokenizer(masked), BertForMaskedLM.from_pretrained(masked).eval()
    for record in found["results"]:
        text, total = f"{record['context'].strip()} {record['target_word']}", 0
        encoded = tokenizer(text, return_offsets_mapping=True)
        for place, (_, end) in enumerate(encoded.offset_mapping):
            if end > len(text) - len(record["target_word"]):
                ids = list(encoded.input_ids)
                ids[place] = tokenizer.mask_token_id
                logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                total -= float(logprobs[place - shift, encoded.input_ids[place]])
        assert record["surprisal"] == pytest.approx(total, abs=1e-4)


def test_as_a_command_with_its_figure(run, data, tmp_path, monkeypatch, in_child):
    monkeypatch.setattr(sys, "argv", ["aoa", str(run), "--data", str(data), "--output", str(tmp_path / "results"), "--milestones",
                                      "chck_10M", "chck_2M"])
    done = in_child(lambda: runpy.run_module("eval.aoa", run_name="__main__"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results/tiny/main/zero_shot/causal/AoA_word"
    assert {path.name for path in folder.iterdir()} == {"surprisal.json", "aoa_score.json", "ages.json", "curves.png", "curves.svg",
                                                          "steps"}
    assert json.loads((folder / "aoa_score.json").read_text()) == {"aoa": 0.0}
    for line in ("4 words in 7 contexts, 2 milestones", "left out, model: fewer than 3 values (4): dog, banana, in, mummy",
                 "no correlation of ages: 0 words", "score as 2026 defines it: 0.000: 0 by its rule for fewer than 3 words",
                 "not a complete submission: 7 records per milestone (officially 8,005); strict-small lacks chck_1M, chck_3M"):
        assert line in done.stdout, line
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


def test_each_suite_keeps_its_own_surprisals(run, tmp_path, call, loaded):
    data = write_data(tmp_path / "aoa", MANY)
    before, _, _ = call(run, data, "--milestones", "chck_2M")
    other, _, _ = call(run, data, "--milestones", "chck_2M", "--suite", "2025")
    assert len(loaded) == 2 and len(other["results"]) == 41
    loaded.clear()
    again, _, _ = call(run, data, "--milestones", "chck_2M")
    assert not loaded and again == before


# ---- The official score -----------------------------------------------------------------------------------------------


SMALL = [*range(1, 10), *range(10, 101, 10)]
SEEN = {f"chck_{n}M": n * 1_000_000 for n in SMALL}


def plain_fit(x, y, start, low, high, evaluations):
    """a, b, c, d by least squares, one residual at a time."""
    def residuals(parameters):
        a, b, c, d = parameters
        return [a / (1 + math.exp(-b * (x[i] - c))) + d - y[i] for i in range(len(x))]

    found = least_squares(residuals, start, bounds=(low, high), max_nfev=evaluations)
    return found.x if found.success else None


def plain_score(records, rows, tokenizer):
    """(score, r, {word: (log10 of the model's age, child's age)}) of the official records and the rows of cdi_human.csv."""
    found = {}
    for word in dict.fromkeys(record["target_word"] for record in records):
        row = next((row for row in rows if row["word"] == word), None)
        points = [(month, float(row[str(month)])) for month in MONTHS if row[str(month)]] if row else []
        if len(points) < 3:
            continue
        x, y = zip(*points, strict=True)
        fit = plain_fit(x, y, [1, 0.1, sum(x) / len(x), 0], [0, 0, x[0], -0.5], [2, 1, x[-1], 0.5], 1000)
        if fit is None or fit[0] <= 0 or fit[1] <= 0 or not fit[3] < 0.5 < fit[0] + fit[3]:
            continue
        child = fit[2] - math.log(fit[0] / (0.5 - fit[3]) - 1) / fit[1]
        if not x[0] <= child <= x[-1]:
            continue
        steps, x, y = [], [], []
        for step in dict.fromkeys(record["word_count"] for record in records):
            mine = [record["surprisal"] for record in records if record["target_word"] == word and record["word_count"] == step]
            steps.append(step)
            x.append(math.log10(step + 1))
            y.append(-sum(mine) / len(mine))
        pieces = len(tokenizer.tokenize(f"The {word}")) - len(tokenizer.tokenize("The"))
        threshold = (max(1, pieces) * math.log(tokenizer.vocab_size) - max(y)) / 2
        wide = max(y) - min(y)
        a, b, c, d = plain_fit(x, y, [wide, 1, sum(x) / len(x), min(y)], [0, 0, min(x) - 1, min(y) - 2 * wide - 1],
                               [10 * wide + 1, 100, max(x) + 1, max(y) + 1], 20000)
        if a > 1e-6 and b > 1e-6 and d < -threshold < a + d:
            log = c - math.log(a / (-threshold - d) - 1) / b
            if steps[0] <= 10**log - 1 <= steps[-1]:
                found[word] = (log, child)
    r, p = pearsonr(*zip(*found.values(), strict=True)) if len(found) >= 3 else (0, 1)
    return (r if p <= 0.1 else 0), r, found


def random_data(folder, tokenizer, related, seed=0):
    """(words, values, path of cdi_human.csv): noisy curves of 40 words in several contexts each; shares with gaps, in the words' own
    order or in any. Some words are never learnt, by the model, by children, or by both, and some are in one list only."""
    random = np.random.default_rng(seed)
    names = ["dog", "cat", "in", "mummy", "banana", "peekaboo", "grandmother", "butterfly", *(f"word{n}" for n in range(32))]
    words = [aoa.Word(name, tuple(f"context {n}" for n in range(random.integers(1, 6)))) for name in names]
    x, order, values = np.log10(list(SEEN.values())), np.linspace(0, 1, len(names)), {step: [] for step in SEEN}
    for word, place, chance in zip(words, random.permutation(order) if not related else order, aoa.chances(words, tokenizer), strict=True):
        age, width, low = 5.9 + 2.2 * place, random.uniform(0.1, 0.4), random.uniform(0.1, 0.6) * chance
        for _ in word.contexts:
            curve = low + random.uniform(0.9, 1.2) * (chance - low) / (1 + np.exp((x - age) / width)) + random.exponential(0.4, len(x))
            for step, value in zip(SEEN, curve.tolist(), strict=True):
                values[step].append(value)
    months = np.arange(16, 31)
    with (folder / aoa.CHILDREN).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["word", "category", *MONTHS])
        for number, name in enumerate(names[2:]):
            age, width = 15 + 18 * order[number] + random.normal(0, 2), random.uniform(0.4, 4)
            shares = np.clip(random.uniform(0.6, 1) / (1 + np.exp((age - months) / width)) + random.normal(0, 0.03, 15), 0, 1)
            kept = random.random(15) > (0.15 if number % 9 else 0.95)
            table.writerow([name, "x", *(f"{share:.3f}" if there else "" for share, there in zip(shares, kept, strict=True))])
    return words, values, folder / aoa.CHILDREN


@pytest.mark.parametrize(("related", "seed"), [(True, 0), (False, 6)])
def test_ages_and_score_equal_a_plain_implementation(tokenizer, tmp_path, related, seed):
    words, values, path = random_data(tmp_path, tokenizer, related, seed)
    records = aoa.official("A", words, aoa.SUITES["2026"], SEEN, values)["results"]
    with path.open(newline="") as file:
        score, r, wanted = plain_score(records, list(csv.DictReader(file)), tokenizer)
    found = aoa.ages(words, SEEN, aoa.mean_curves(words, values), aoa.chances(words, tokenizer), *aoa.read_children(path))
    both = {word: entry for word, entry in found["words"].items() if None not in (entry["words_seen"], entry["months"])}
    assert 15 < len(wanted) < 35 and both.keys() == wanted.keys()
    for word, (log, months) in wanted.items():
        assert (both[word]["words_seen"], both[word]["months"]) == pytest.approx((10**log - 1, months), rel=1e-3), word
    assert found["score"] == pytest.approx(score, abs=1e-4) and found["correlation"]["pearson"] == pytest.approx(r, abs=1e-4)
    assert found["correlation"]["n"] == len(wanted)
    assert found["correlation"]["spearman"] == pytest.approx(spearmanr(*zip(*wanted.values(), strict=True)).statistic)
    assert bool(score) is related and abs(r) > 0.01
    json.dumps(found, allow_nan=False)


def rising(x, a, b, c, d=0.0):
    return a / (1 + np.exp(-b * (np.asarray(x) - c))) + d


def test_children_learn_a_word_where_half_of_them_say_it():
    months = np.arange(16.0, 31)
    assert aoa.child_age(months, rising(months, 1, 0.6, 22)) == pytest.approx(22, abs=1e-3)
    # not the middle of a curve that ends below one, or begins above zero
    assert aoa.child_age(months, rising(months, 0.8, 0.6, 22)) == pytest.approx(22 - math.log(0.8 / 0.5 - 1) / 0.6, abs=1e-3)
    assert aoa.child_age(months, rising(months, 0.8, 0.6, 22, 0.1)) == pytest.approx(22, abs=1e-3)
    # b is at most 1: a step between 21 and 22 months is fitted by the steepest curve that is allowed, as far as a and d give way
    step = (months > 21).astype(float)
    assert aoa.child_age(months, step) == pytest.approx(21.5, abs=0.01)
    for shares, why in ((rising(months, 1, 0.6, 15.5), "outside of what was measured"), (rising(months, 1, 0.6, 31), "outside"),
                        (rising(months, 0.4, 0.6, 22), "never crosses"), (np.where(months < 29, np.nan, 0.5), "fewer than 3")):
        assert why in aoa.child_age(months, shares)


def test_missing_shares_are_no_zeros():
    months = np.arange(16.0, 31)
    shares = rising(months, 1, 0.6, 24)
    shares[[0, 5, 9, 14]] = np.nan
    assert aoa.child_age(months, shares) == pytest.approx(24, abs=1e-3)
    # months without a share are not measured: the middle c may not lie there, nor the age
    shares = np.where(months > 21, np.nan, rising(months, 1.9, 0.8, 22))
    a, b, c, d = plain_fit(months[:6], shares[:6], [1, 0.1, 18.5, 0], [0, 0, 16, -0.5], [2, 1, 21, 0.5], 1000)
    assert aoa.child_age(months, shares) == pytest.approx(c - math.log(a / (0.5 - d) - 1) / b, abs=1e-4) and c < 21.001
    assert aoa.child_age(months, rising(months, 1, 0.6, 25)) == pytest.approx(25, abs=1e-3)
    assert isinstance(aoa.child_age(months, np.where(months > 23, np.nan, rising(months, 1, 0.6, 25))), str)


def test_a_model_learns_a_word_half_way_from_chance_to_its_minimum():
    seen, x = np.array(list(SEEN.values()), float), np.log10(np.array(list(SEEN.values())) + 1.0)
    curve = 12 - rising(x, 9, 8, 6.8)
    for chance in (9.0, 12.0, 14.0):
        wanted = 6.8 - math.log(9 / (12 - (chance + curve.min()) / 2) - 1) / 8
        assert aoa.model_age(seen, curve, chance) == pytest.approx(wanted, abs=1e-3)
    step = np.where(seen < 9.5e6, 12.0, 3.0)  # b is at most 100: as steep as a step between two milestones
    assert math.log10(9e6) < aoa.model_age(seen, step, 18.0) < 7
    for other, chance, why in ((curve, 30.0, "never crosses"), (12 - rising(x, 9, 8, 5.9), 12.0, "outside of what was measured"),
                               (5 + x, 18.0, "flat"), (curve[::-1], 12.0, "the fit")):
        assert why in aoa.model_age(seen, other, chance), why
    assert aoa.model_age(seen[:2], curve[:2], 12.0) == aoa.TOO_FEW
    assert isinstance(aoa.model_age(seen[::9], curve[::9], 12.0), float)  # three are enough


def test_words_seen_count_from_one():
    """log10(words + 1), which few words show: the fit is exact over it."""
    seen = np.array([0.0, 1, 2, 4, 8, 16, 32, 64])
    age = aoa.model_age(seen, 12 - rising(np.log10(seen + 1), 9, 6, 0.9), 12.0)
    assert age == pytest.approx(0.9, abs=0.02)
    words = [aoa.Word(f"word{n}", ("x",)) for n in range(2)]
    found = aoa.ages(words, dict(zip("abcdefgh", seen.tolist(), strict=True)), np.stack([12 - rising(np.log10(seen + 1), 9, 6, 0.9)] * 2),
                     [12.0] * 2, np.arange(16.0, 31), {})
    assert found["words"]["word0"]["words_seen"] == pytest.approx(10**age - 1)


def test_chance_grows_with_the_tokens_that_a_word_adds(tokenizer):
    words = [aoa.Word(text, ("x",)) for text in ("dog", "grandmother", "banana")]
    for word, nats in zip(words, aoa.chances(words, tokenizer), strict=True):
        pieces = len(tokenizer.tokenize(f"The {word.text}")) - len(tokenizer.tokenize("The"))
        assert nats == pytest.approx(pieces * math.log(tokenizer.vocab_size)) and (pieces > 1 or word.text == "dog")


def test_chance_is_of_one_token_at_least():
    def adds_nothing(text, add_special_tokens):
        return SimpleNamespace(input_ids=[5])

    adds_nothing.vocab_size = 100
    assert aoa.chances([aoa.Word("dog", ("x",))], adds_nothing) == pytest.approx([math.log(100)])


def test_added_tokens_are_no_part_of_the_vocabulary_by_chance(masked):
    tokenizer = models.load_tokenizer(masked)
    assert aoa.chances([aoa.Word("in", ("x",))], tokenizer) == pytest.approx([math.log(len(tokenizer) - 1)])


def correlated(model, children):
    """ages() of words that are learnt at `model`, log10 words, and `children`, months."""
    words = [aoa.Word(f"word{n}", ("x",)) for n in range(len(model))]
    x, months = np.log10(np.array(list(SEEN.values())) + 1.0), np.arange(16.0, 31)
    curves = np.stack([12 - rising(x, 9, 8, age) for age in model])
    return aoa.ages(words, SEEN, curves, [12.0] * len(words), months, {word.text: rising(months, 1, 0.6, age) for word, age in
                                                                       zip(words, children, strict=True)})


def test_a_correlation_that_may_be_chance_scores_zero():
    found = correlated([6.3, 6.6, 6.9, 7.2, 7.5], [18, 27, 20, 26, 22])
    wanted = pearsonr([6.3, 6.6, 6.9, 7.2, 7.5], [18, 27, 20, 26, 22])
    assert found["correlation"]["pearson"] == pytest.approx(wanted.statistic, abs=0.01) and wanted.pvalue > 0.1
    assert found["correlation"]["p"] == pytest.approx(wanted.pvalue, abs=0.01) and found["score"] == 0
    found = correlated([6.3, 6.6, 6.9, 7.2, 7.5], [18, 23, 20, 25, 25])
    assert 0.05 < found["correlation"]["p"] < 0.1 and found["score"] == found["correlation"]["pearson"] > 0.8
    found = correlated([6.3, 6.6, 6.9, 7.2, 7.5], [26, 25, 23, 20, 18])
    assert found["score"] < -0.9
    assert correlated([6.3, 6.9], [18, 22])["correlation"] == {"n": 2, "pearson": None, "p": None, "spearman": None}
    assert correlated([6.3, 6.9], [18, 22])["score"] == correlated([6.3] * 3, [18, 20, 22])["score"] == 0


def test_who_is_left_out_is_named_with_the_reason(monkeypatch):
    words = [aoa.Word(name, ("x",)) for name in ("dog", "never", "late", "unknown", "gaps")]
    x, months = np.log10(np.array(list(SEEN.values())) + 1.0), np.arange(16.0, 31)
    curve = 12 - rising(x, 9, 8, 7)
    curves = np.stack([curve, curve, curve, curve, curve])
    children = {"dog": rising(months, 1, 0.6, 20), "never": rising(months, 1, 0.6, 20), "late": rising(months, 1, 0.6, 40),
                "gaps": np.where(months > 17, np.nan, 0.2)}
    found = aoa.ages(words, SEEN, curves, [12.0, 30.0, 12.0, 12.0, 12.0], months, children)
    assert found["left_out"] == {"model: the fit never crosses the threshold": ["never"], "children: the fit never crosses the threshold":
                                 ["late"], "children: not in cdi_human.csv": ["unknown"], "children: fewer than 3 values": ["gaps"]}
    assert found["words"]["unknown"]["words_seen"] and found["words"]["unknown"]["months"] is None
    right, evaluations = aoa.curve_fit, []

    def sometimes(function, x, *rest, **keys):
        evaluations.append(keys["maxfev"])
        if len(x) == len(months):
            raise RuntimeError("Optimal parameters not found")
        return right(function, x, *rest, **keys)

    monkeypatch.setattr(aoa, "curve_fit", sometimes)
    assert aoa.ages(words[:1], SEEN, curves[:1], [12.0], months, children)["left_out"] == {"children: the fit fails": ["dog"]}
    assert evaluations == [20_000, 1000]


def test_the_figure_shows_both_ages():
    found = correlated([6.3, 6.6, 6.9, 7.2, 7.5], [18, 20, 22, 24, 26])
    drawn = aoa.figure(found, "A").axes[1]
    assert drawn.lines[0].get_xdata() == pytest.approx([18, 20, 22, 24, 26], abs=0.01)
    assert np.log10(drawn.lines[0].get_ydata()) == pytest.approx([6.3, 6.6, 6.9, 7.2, 7.5], abs=0.1)
    assert "5 words, r = 1.00, p = " in drawn.get_title()


@pytest.mark.parametrize(("suite", "count", "more", "said"), [
    ("2026", 8005, [], r"^a complete submission: 8,005 records per milestone \(officially 8,005\); all milestones of strict-small$"),
    ("2025", 6560, [f"chck_{n}M" for n in range(200, 1001, 100)], r"^a complete .* \(officially 6,560\); all milestones of strict$"),
    ("2025", 8005, [], r"^not a complete submission: 8,005 records per milestone \(officially 6,560\); all milestones of strict-small$"),
    ("2026", 8005, ["chck_500K"], r"^not a complete .*; all milestones of strict-small; chck_500K is not in strict-small$"),
    ("2026", 8005, ["chck_1000M"], r"^not a complete .*; strict lacks chck_200M, chck_300M, .*, chck_900M$"),
])
def test_a_submission_is_complete_or_what_it_lacks_is_said(suite, count, more, said):
    steps = {**SEEN, **{name: milestone_words(name) for name in more}}
    line = aoa.completeness([aoa.Word("dog", ("x",) * 5), aoa.Word("cat", ("x",) * (count - 5))], aoa.SUITES[suite], steps)
    assert re.search(said, line), line


def test_means_are_over_each_words_own_contexts():
    words = [aoa.Word("a1", ("x",) * 3), aoa.Word("b1", ("x",)), aoa.Word("c1", ("x",) * 2)]
    assert aoa.mean_curves(words, {"s": [1, 2, 6, 10, 4, 8], "t": [0, 0, 3, 5, 1, 1]}).tolist() == [[3, 1], [10, 5], [6, 1]]


# ---- Errors -----------------------------------------------------------------------------------------------------------


def test_words_of_one_letter_or_without_contexts_are_left_out(tmp_path, capsys):
    data = write_data(tmp_path / "aoa", {"a": ["x"], "dog": ["the"], "cat": []})
    assert [word.text for word in aoa.read_words(data / aoa.CONTEXTS, aoa.SUITES["2026"])] == ["dog"]
    assert "'a', 'cat'" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [
    ('{"dog": [{"context": "the"}', r"cdi_childes.json: not JSON"),
    ('["dog"]', r"cdi_childes.json: not an object .* but a list"),
    ('{"dog": {"context": "the"}}', r"cdi_childes.json, word 'dog': its contexts are a dict, not a list"),
    ('{"dog": [{"context": "the"}, {"text": "a"}]}', r"cdi_childes.json, word 'dog', entry 1: not of the form"),
    ('{"dog": [{"context": null}]}', r"cdi_childes.json, word 'dog', entry 0: not of the form"),
    ('{"a": [{"context": "the"}]}', r"holds no word but of one letter or with fewer than 1 context"),
])
def test_malformed_contexts_are_named(tmp_path, text, message):
    path = tmp_path / aoa.CONTEXTS
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        aoa.read_words(path, aoa.SUITES["2026"])


@pytest.mark.parametrize(("text", "message"), [
    ("", "cdi_human.csv: needs a column `word` .* it has no rows"),
    ("item,16,17,18\ndog,0,0,1\n", "needs a column `word` .* it has item, 16, 17, 18"),
    ("word,16,17,18\ndog,0.1,much,1\n", "line 2, word 'dog': 'much' at month 17 is no share"),
    ("word,16,17,18\ndog,0.1,17,1\n", "line 2, word 'dog': '17' at month 17 is no share"),
    ("word,16,17,18\ndog,0.1,inf,1\n", "line 2, word 'dog': 'inf' at month 17 is no share"),
    ("word,16,17,18\ndog,0.1\n", "line 2, word 'dog': None at month 17 is no share"),
])
def test_malformed_shares_are_named(tmp_path, text, message):
    path = tmp_path / aoa.CHILDREN
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        aoa.read_children(path)


def test_columns_are_the_months_in_their_order_and_gaps_stay_gaps(tmp_path, capsys):
    path = tmp_path / aoa.CHILDREN
    path.write_text("lemma,18,word,16,30,8,31,17\nx,0.3,dog,0.1,0.9,0.2,0.2,\nx,NA,cat,nan,1,0,0,0.5\nx,1,dog,1,1,1,1,1\n")
    months, children = aoa.read_children(path)
    assert months.tolist() == [16, 17, 18, 30]
    assert np.array_equal(children["dog"], [0.1, np.nan, 0.3, 0.9], equal_nan=True)
    assert np.array_equal(children["cat"], [np.nan, 0.5, np.nan, 1], equal_nan=True)
    assert "line 4: the word 'dog' is there a second time; the first counts" in capsys.readouterr().out


def test_results_never_go_into_the_checkpoint(run, tmp_path):
    for output in (run.parent, run / "results"):
        with pytest.raises(UserError, match="would lie inside the checkpoint"):
            results_home(output, run)
    assert results_home(tmp_path / "results", run) == tmp_path / "results" / run.name
    assert results_home(tmp_path, "org/name-1.4b") == tmp_path / "name-1.4b"  # of the hub


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


def test_a_tokenizer_without_the_token_that_is_needed_is_named(run, data, call, tmp_path):
    with pytest.raises(UserError, match="no mask token, which the backend mlm needs"):
        call(run, data, backend="mlm")
    without = models.load_tokenizer(run)
    without.bos_token = None
    with pytest.raises(UserError, match="no start token, after which --suite 2025 scores words"):
        aoa.requests([aoa.Word("dog", ("x",))], without, aoa.SUITES["2025"], "causal")
