"""Scores against plain loops: sentences, minimal pairs, validation text, the n-gram yardstick."""

import json
import math
import shutil
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from babylm import losses, models, scoring
from babylm.config import ModelSection
from babylm.run_folder import write_json
from babylm.schema import UserError
from custom_dataset import EvalBlocks, open_store

SENTENCES = ["The dog that saw the cats sleeps.", "Zoë!", "She", "", "“No,” said the ox, “never again in this house.”", "a a a a a a"]


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    """Folder of a finished run: a random model with its tokenizer, which prepends the start token."""
    tokenizer = models.load_tokenizer(corpus / "tokenizer")
    folder = tmp_path_factory.mktemp("scoring") / "random"
    folder.mkdir()
    model = models.build_model(ModelSection(layers=2, width=32, heads=2, max_positions=64), tokenizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform
    models.save_model(model, tokenizer, folder)
    write_json(folder / "run" / "finished.json", {"words_seen": 7, "seconds": 1.5})
    return folder


@pytest.fixture(scope="module")
def model(saved):
    return models.load_causal_lm(str(saved)).eval()


@pytest.fixture(scope="module")
def scorer(saved):
    return models.load_tokenizer(saved)


# ---- Sentences ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model, tokenizer, sentence):
    """One token after the other, each from the prefix alone."""
    ids = tokenizer(sentence).input_ids
    assert ids[0] == tokenizer.bos_token_id
    total = 0.0
    for t in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double()
        total += (logits[ids[t]] - torch.logsumexp(logits, 0)).item()
    return total


def test_a_sentence_scores_the_sum_over_all_its_tokens(model, scorer):
    """The first word included, from the start token; not normalised by length; in the order given."""
    expected = [by_hand(model, scorer, sentence) for sentence in SENTENCES]
    assert scoring.sentence_logprobs(model, scorer, SENTENCES) == pytest.approx(expected, abs=1e-3)
    assert expected[3] == 0 and max(expected[:3]) < -5


@pytest.mark.parametrize("batch_tokens", [1, 20, 10_000])
def test_padding_and_batching_do_not_change_scores(model, scorer, batch_tokens):
    alone = [scoring.sentence_logprobs(model, scorer, [sentence])[0] for sentence in SENTENCES]
    assert scoring.sentence_logprobs(model, scorer, SENTENCES, batch_tokens=batch_tokens) == pytest.approx(alone, abs=1e-3)


def test_a_model_in_training_is_scored_without_dropout_and_left_in_training(scorer):
    model = models.build_model(ModelSection(layers=1, width=32, heads=2, max_positions=64, dropout=0.5), scorer, 0).train()
    first, second = (scoring.sentence_logprobs(model, scorer, SENTENCES[:1]) for _ in range(2))
    assert first == second and model.training


def test_a_sentence_beyond_the_models_positions_is_named(model, scorer):
    with pytest.raises(UserError, match="the model has 64 positions, but this sentence has .* tokens: 'so so so"):
        scoring.sentence_logprobs(model, scorer, ["fine", "so " * 70])


def test_nan_is_refused_and_names_the_sentence(saved, scorer):
    """Compared with >, NaN would make every pair wrong; with not <, every pair right."""
    broken = models.load_causal_lm(str(saved))
    token = scorer(" cats", add_special_tokens=False).input_ids[0]
    broken.transformer.wte.weight.data[token] = math.nan
    broken.lm_head.weight = torch.nn.Parameter(models.load_causal_lm(str(saved)).lm_head.weight.data)
    with pytest.raises(UserError, match=r"not finite \(first: 'Some cats sleep'"):
        scoring.sentence_logprobs(broken, scorer, ["She", "Some cats sleep"])


# ---- Minimal pairs --------------------------------------------------------------------------------------------------


def write_pairs(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pair(good, bad, **rest):
    return {"sentence_good": good, "sentence_bad": bad, **rest}


def test_accuracy_is_per_uid_and_a_tie_is_no_success(tmp_path):
    folder = write_pairs(tmp_path, a=[pair("g4", "b1", UID="x"), pair("g1", "b2", UID="x"), pair("g3", "b3", UID="x")],
                         b=[pair("g2", "b1", long_distance=True)])
    table = scoring.pair_accuracy(scoring.read_pairs(folder), lambda sentences: np.array([float(s[1:]) for s in sentences]))
    assert table == {"x": {"accuracy": pytest.approx(1 / 3), "n": 3, "ties": 1, "long_distance": False},
                     "b": {"accuracy": 1.0, "n": 1, "ties": 0, "long_distance": True}}


def test_a_model_that_answers_the_same_for_everything_scores_0(tmp_path):
    rows = scoring.read_pairs(write_pairs(tmp_path, a=[pair("x", "y")] * 5))
    assert scoring.pair_accuracy(rows, lambda sentences: np.zeros(len(sentences)))["a"] == {
        "accuracy": 0.0, "n": 5, "ties": 5, "long_distance": False}


def test_a_real_model_is_right_where_it_finds_the_good_sentence_likelier(model, scorer, tmp_path):
    rows = scoring.read_pairs(write_pairs(tmp_path, a=[pair(a, b) for a in SENTENCES[:3] for b in SENTENCES[4:]]))
    right = sum(by_hand(model, scorer, row["sentence_good"]) > by_hand(model, scorer, row["sentence_bad"]) for row in rows)
    table = scoring.pair_accuracy(rows, lambda sentences: scoring.sentence_logprobs(model, scorer, sentences))
    assert table["a"]["accuracy"] == pytest.approx(right / 6)


@pytest.mark.parametrize("line", ['{"sentence_good": "a", "sentence_b', '{"sentence_good": "a"}', "", "[1]"])
def test_a_row_that_is_no_pair_names_file_and_line(tmp_path, line):
    folder = write_pairs(tmp_path, fine=[pair("a", "b")], torn=[pair("a", "b")] * 2)
    with open(folder / "torn.jsonl", "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(UserError, match=r"torn\.jsonl, line 3: not a minimal pair"):
        scoring.read_pairs(folder)


def test_a_line_separator_inside_a_sentence_ends_no_row(tmp_path):
    row = {"sentence_good": "one\u2028two", "sentence_bad": "one\x85three"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row["pair"] for row in scoring.read_pairs(tmp_path)] == [("one\u2028two", "one\x85three")]


def test_a_folder_without_pairs_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no minimal pairs"):
        scoring.read_pairs(tmp_path)


# ---- Validation text ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def val(corpus, tokenizer):
    return open_store(corpus, "val", tokenizer)


@torch.no_grad()
def ce_by_hand(model, store, seq_len):
    """{domain: list of nats}, block by block and token by token."""
    values = defaultdict(list)
    starts = store.documents["start"].tolist()
    for first in range(0, len(store) - seq_len + 1, seq_len):
        ids = torch.from_numpy(store.ids[first : first + seq_len].astype(np.int64))
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        for t in range(1, seq_len):
            document = max(i for i, start in enumerate(starts) if start <= first + t)
            values[store.domains[store.documents["domain"][document]]].append(-logprobs[t - 1, ids[t]].item())
    return values


def test_domain_sums_equal_a_plain_loop(model, val):
    """Whatever the batches; a block that crosses from one domain into another counts for both."""
    expected = ce_by_hand(model, val, 32)
    blocks = EvalBlocks(val, 32, len(val))

    def terms(batch):
        assert batch.keys() == {"input_ids"}, "the domains are not the model's business"
        ce = losses.token_cross_entropy(model(**batch).logits, batch["input_ids"])
        return {"ce": ce, "kl": 2 * ce}

    for size in (1, 7):
        batches = [range(i, min(i + size, len(blocks))) for i in range(0, len(blocks), size)]
        counts, sums = scoring.domain_sums(terms, blocks, batches, torch.device("cpu"))
        assert {name: n for name, n in zip(val.domains, counts.tolist(), strict=True) if n} == {n: len(v) for n, v in expected.items()}
        row = scoring.means(counts, sums, val.domains)
        everything = [value for values in expected.values() for value in values]
        assert row["ce"] == pytest.approx(np.mean(everything), abs=1e-5) and row["kl"] == pytest.approx(2 * row["ce"])
        assert row["perplexity"] == pytest.approx(math.exp(row["ce"]))
        assert row["ce_by_domain"] == pytest.approx({name: np.mean(values) for name, values in expected.items()}, abs=1e-4)


def test_a_domain_without_tokens_is_left_out_and_perplexity_may_overflow():
    row = scoring.means(torch.tensor([2.0, 0.0]), {"ce": torch.tensor([2000.0, 0.0])}, ["a", "b"])
    assert row == {"ce": 1000.0, "perplexity": math.inf, "ce_by_domain": {"a": 1000.0}}


# ---- The n-gram yardstick -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 5])
def test_an_ngram_model_is_a_distribution(order):
    """After any context, seen or not, the probabilities of all tokens sum to 1 and none is 0."""
    rng = np.random.default_rng(order)
    stream = rng.integers(0, 6, 400) * rng.integers(0, 2, 400)
    ngram = scoring.NgramModel(order, 8).fit(stream)
    for context in ([], [0], [3, 0, 0, 5], [7, 7, 7, 7], stream[:4].tolist()):
        total = sum(math.exp(ngram.logprobs(np.array([*context, token]))[-1]) for token in range(8))
        assert total == pytest.approx(1.0, abs=1e-9)


def test_a_bigram_model_by_hand():
    """Stream a b a c a b: too few counts for estimated discounts, so each is 0.75.

    Continuation counts: a follows b and c, b follows a, c follows a; P1(w) = (c - .75)/4 + (3 * .75 / 4) / 3, so
    P1(b) = .0625 + .1875 = .25. After a came b, c, b: P2(b|a) = (2 - .75)/3 + (2 * .75 / 3) * P1(b).
    """
    ngram = scoring.NgramModel(2, 3).fit(np.array([0, 1, 0, 2, 0, 1]))
    assert math.exp(ngram.logprobs(np.array([0, 1]))[1]) == pytest.approx(1.25 / 3 + 0.5 * 0.25)


def test_an_ngram_model_learns_what_its_context_tells():
    """After `2`, `3` and `4` take turns: that needs what stood three tokens before."""
    stream = np.tile([1, 2, 3, 1, 2, 4], 200)
    first, second, fifth = (-scoring.NgramModel(order, 5).fit(stream).logprobs(stream[:60]).mean() for order in (1, 2, 5))
    assert fifth < 0.2 < second < 0.5 < 1 < first


def test_token_ids_beyond_the_vocabulary_are_an_error():
    with pytest.raises(ValueError, match=r"lie in \[0, 5\)"):
        scoring.NgramModel(2, 5).fit(np.array([5]))


# ---- Tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def score(monkeypatch, corpus):
    """score("models/x", ...) runs the command of this module on the small corpus."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["scoring", *map(str, arguments), "--corpus", str(corpus), "--seq_len", "32"])
        scoring.main()

    return run


def test_the_command_scores_a_run_and_fits_an_ngram_row(score, saved, model, scorer, corpus, val, tokenizer, tmp_path):
    run = shutil.copytree(saved, tmp_path / "random")
    pairs = write_pairs(tmp_path / "pairs", a=[pair("The dogs sleep.", "The dogs sleeps."), pair("He saw it.", "It him saw.")])
    score(run, "--pairs", pairs, "--ngram", tmp_path / "ngram")
    neural, ngram = (json.loads((tmp_path / name / "run" / "scores.json").read_text()) for name in ("random", "ngram"))

    expected = ce_by_hand(model, val, 32)
    assert neural["ce"] == pytest.approx(np.mean([v for values in expected.values() for v in values]), abs=1e-4)
    assert neural["perplexity"] == pytest.approx(math.exp(neural["ce"]))
    size = (corpus / "val_babylm.txt").stat().st_size
    assert neural["bits_per_byte"] == pytest.approx(neural["ce"] / math.log(2) * len(val) / size)
    assert neural["validation"] == ngram["validation"] and neural["validation"]["seq_len"] == 32
    assert {name: row["ce"] for name, row in neural["by_domain"].items()} == pytest.approx(
        {name: np.mean(values) for name, values in expected.items()}, abs=1e-3)
    assert (neural["words_seen"], neural["kind"], neural["parameters"]) == (7, "neural", models.count_parameters(model))
    assert neural["pairs_mean"] == neural["pairs"]["a"]["accuracy"]

    train = open_store(corpus, "train", tokenizer)
    fitted = scoring.NgramModel(5, len(tokenizer)).fit(np.asarray(train.ids))
    nats = [-fitted.logprobs(val.ids[i : i + 32])[1:] for i in range(0, len(val) - 31, 32)]
    assert ngram["kind"] == "5-gram" and ngram["words_seen"] == train.meta["words"]
    assert ngram["ce"] == pytest.approx(np.mean(nats), abs=1e-9)
    counts = Counter(np.asarray(train.ids).tolist())
    unigram = -np.mean([math.log((counts[i] + 1) / (len(train) + len(tokenizer))) for i in np.asarray(val.ids).tolist()])
    assert ngram["ce"] < unigram - 0.5, "five tokens tell more than one"


def test_an_unfinished_run_is_not_scored(score, saved, tmp_path):
    run = shutil.copytree(saved, tmp_path / "unfinished")
    (run / "run" / "finished.json").unlink()
    with pytest.raises(UserError, match="is an unfinished run"):
        score(run)


def test_another_evaluation_corpus_is_read_with_the_models_own_vocabulary(score, saved, corpus, raw, stage1, write_yaml, tmp_path, scorer):
    """That corpus has a tokenizer of its own: its text counts, not its tokenizer."""
    other = tmp_path / "other"
    stage1(write_yaml(tmp_path / "other.yaml", {"corpus": {"input": str(raw), "output": str(other), "validation_fraction": 1.0},
                                                "tokenizer": {"path": str(foreign_tokenizer(tmp_path))}}))
    run = shutil.copytree(saved, tmp_path / "random")
    score(run, "--eval", other)
    scores = json.loads((run / "run" / "scores.json").read_text())
    expected = ce_by_hand(models.load_causal_lm(str(saved)).eval(), open_store(other, "val", scorer), 32)
    assert scores["ce"] == pytest.approx(np.mean([v for values in expected.values() for v in values]), abs=1e-4)


def test_a_model_of_another_vocabulary_is_not_scored(score, saved, tmp_path):
    foreign = foreign_tokenizer(tmp_path)
    run = shutil.copytree(saved, tmp_path / "foreign")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(foreign / name, run / name)
    with pytest.raises(UserError, match="another vocabulary than the data"):
        score(run)


def foreign_tokenizer(tmp_path):
    folder = tmp_path / "foreign-tokenizer"
    folder.mkdir()
    models.save_tokenizer(models.train_tokenizer(["other words make other merges, every time"] * 9, 300, 1), folder)
    return folder
