"""eval/scorer.py: the prefix tree gives what every text alone gives, computes little, and refuses what cannot be scored."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from babylm.schema import UserError
from eval.scorer import Request, Scorer, pack
from modeling_moep import MoEPConfig, MoEPForCausalLM

VOCAB = 50
GPT2 = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {"vocab_size": VOCAB, "max_position_embeddings": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24, "tie_word_embeddings": True}
MOEP = {"vocab_size": VOCAB, "max_position_embeddings": 40, "hidden_size": 16, "num_attention_heads": 2, "parallel_hidden_size": 8,
        "parallel_attention_heads": 2, "num_hidden_layers": 4}


def built(kind="gpt2", **keys):
    torch.manual_seed(3)
    makers = {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(**{**GPT2, **keys})),
              "llama": lambda: LlamaForCausalLM(LlamaConfig(**{**LLAMA, **keys})),
              "moep": lambda: MoEPForCausalLM(MoEPConfig(**{**MOEP, **keys})),
              "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                                         intermediate_size=24, max_position_embeddings=40))}
    model = makers[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that answers differ
    return model


def texts(count=40, seed=0):
    """Requests that share beginnings of many lengths, some of them equal, some with several targets at one place."""
    random = np.random.default_rng(seed)
    stems = [tuple(random.integers(VOCAB, size=size).tolist()) for size in (3, 9, 17)]
    found = []
    for number in range(count):
        stem = stems[number % 3][: random.integers(1, 18)]
        ids = (0, *stem, *random.integers(VOCAB, size=random.integers(1, 8)).tolist())
        places = sorted(random.choice(len(ids) - 1, size=min(3, len(ids) - 1), replace=False).tolist())
        found.append(Request(ids, tuple((place, int(ids[place + 1])) for place in places) + ((len(ids) - 1, 7),), f"text {number}"))
    return [*found, found[0], found[1]]


@torch.no_grad()
def expected(model, requests, masked=False):
    answers = []
    for request in requests:
        logs = model(input_ids=torch.tensor([request.ids])).logits[0].log_softmax(-1)
        answers.append([float(logs[place, token]) for place, token in request.targets])
    return answers


def found_by(scorer, requests):
    answers = dict(scorer.logprobs(requests))
    assert sorted(answers) == list(range(len(requests)))
    return [answers[number].tolist() for number in range(len(requests))]


def assert_equal(found, wanted):
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert mine == pytest.approx(theirs, abs=2e-5), number


@pytest.mark.parametrize("trees", [True, False, None])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "moep"])
@pytest.mark.parametrize("row_tokens", [None, 20])
def test_every_log_probability_is_that_of_the_text_alone(kind, trees, row_tokens):
    model, requests = built(kind), texts()
    scorer = Scorer(model, trees=trees, row_tokens=row_tokens, batch_tokens=100)
    assert_equal(found_by(scorer, requests), expected(model, requests))
    assert scorer.trees is (trees is not False), "what this architecture can"


def test_masked_models_see_what_follows_and_share_nothing():
    model = built("bert")
    requests = [Request(request.ids, ((len(request.ids) // 2, 9),)) for request in texts()]
    assert_equal(found_by(Scorer(model, masked=True, batch_tokens=90), requests), expected(model, requests))


@pytest.mark.parametrize("kind, keys", [("moep", {"sliding_window": 3}), ("bert", {})])
def test_architectures_that_cannot_are_scored_one_text_per_row(kind, keys):
    model, requests = built(kind, **keys), texts(10)
    scorer = Scorer(model, masked=kind == "bert")
    assert not scorer.trees
    assert_equal(found_by(scorer, requests), expected(model, requests))


@pytest.mark.parametrize("failure", ["other numbers", "ValueError"])
def test_a_model_that_takes_the_mask_but_does_something_else_is_found_out(failure, monkeypatch, capsys):
    model, requests = built(), texts()
    right = model.transformer.forward

    def wrong(*args, attention_mask=None, **keys):
        by_token = attention_mask is not None and attention_mask.dim() == 4
        if by_token and failure == "ValueError":
            raise ValueError("a mask of two dimensions, please")
        return right(*args, attention_mask=None if by_token else attention_mask, **keys)

    monkeypatch.setattr(model.transformer, "forward", wrong)
    scorer = Scorer(model)
    assert_equal(found_by(scorer, requests), expected(model, requests))
    assert not scorer.trees and "texts are scored one per row" in capsys.readouterr().out


@pytest.mark.parametrize("bf16", [False, True])
def test_bf16_is_an_option_and_off_by_default(bf16):
    model, requests = built(n_embd=64, n_head=4), texts()
    scorer = Scorer(model, bf16=True) if bf16 else Scorer(model)
    difference = np.abs(np.concatenate(found_by(scorer, requests)) - np.concatenate(expected(model, requests))).max()
    assert (1e-3 < difference < 1.5) if bf16 else difference < 2e-5


# ---- The tree -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=25), st.integers(1, 40))
def test_every_text_is_a_path_of_some_row(lists, row_tokens):
    requests = [Request(tuple(ids), ((len(ids) - 1, 5),)) for ids in lists]
    rows, seen = pack(requests, row_tokens), set()
    for row in rows:
        assert len(row.ids) == len(row.depths) <= max(row_tokens, max(map(len, lists)))
        mask = row.seen()
        for (node, token), owners in row.queries.items():
            path = [place for place in range(len(row.ids)) if mask[node, place]]
            for number, place in owners:
                assert token == 5 and place == 0 and number not in seen
                seen.add(number)
                assert [row.ids[place] for place in path] == list(lists[number])
                assert [row.depths[place] for place in path] == list(range(len(path)))
    assert seen == set(range(len(requests)))


def test_in_one_row_every_shared_beginning_stands_once_and_nothing_after_the_last_target():
    one, other, third = (0, 1, 2, 3, 4), (0, 1, 2, 9, 9, 9), (0, 1, 2, 3, 8)
    requests = [Request(ids, ((len(ids) - 2, ids[-1]),)) for ids in (one, other, third)]
    (row,) = pack(requests)
    assert sorted(row.ids) == [0, 1, 2, 3, 9, 9], "the last token of each is asked for, not read"
    assert len(row.queries) == 3
    (row,) = pack([Request(one, ((2, 3), (3, 4))), Request(third, ((2, 3), (3, 8)))])
    assert len(row.queries) == 3, "what both ask at one place is asked once"


# ---- What cannot be scored ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trees", [True, False])
def test_over_long_texts_are_named_with_the_models_limit(trees):
    requests = [*texts(3), Request(tuple(range(41)), ((40, 1),), "entity_7")]
    with pytest.raises(UserError, match="entity_7 has 41 tokens, but the model has 40 positions"):
        list(Scorer(built(), trees=trees).logprobs(requests))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_answers_nan_is_refused(value):
    model = built()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = value
    with pytest.raises(UserError, match="a model that answers NaN or infinity cannot"):
        list(Scorer(model, trees=True).logprobs(texts(3)))


@pytest.mark.parametrize("trees", [True, False, None])
def test_nothing_asked_is_nothing_done(trees):
    model, requests = built(), texts(5)
    assert list(Scorer(model, trees=trees).logprobs([])) == []
    unasked = Request((0, 1, 2), ())
    assert [(number, value.tolist()) for number, value in Scorer(model, trees=trees).logprobs([unasked, unasked])] == [(0, []), (1, [])]
    assert_equal(found_by(Scorer(model, trees=trees), [unasked, *requests, unasked]), expected(model, [unasked, *requests, unasked]))
