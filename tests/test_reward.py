"""Rewards against values worked out by hand or by plain forward passes, and the sum of several."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml

from babylm import models
from babylm.config import (
    JudgeReward,
    LengthReward,
    LikelihoodReward,
    MarginReward,
    ModelSection,
    MoEPModelSection,
    RandomReward,
    RepetitionReward,
)
from babylm.schema import UserError
from interactive import reward as reward_module
from interactive.judge import SHIPPED_RUBRIC
from interactive.reward import CompletionScorer, Reward, build_rewards, combine, reward_fingerprints

PROMPTS = ["The cat", "She said that the old man", "We"]
COMPLETIONS = [" sat on the mat.", " was", " went home and then we went home again."]


@pytest.fixture(scope="module")
def sampled(tokenizer):
    """Completions as a sampler gives them: ids, the end token where one was sampled (not in the second)."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in COMPLETIONS]
    return [[*ids[0], tokenizer.eos_token_id], ids[1], [*ids[2], tokenizer.eos_token_id]]


@pytest.fixture(scope="module")
def reference(teachers):
    """The frozen starting policy: another model than the teacher."""
    return models.load_causal_lm(str(teachers("llama")[0])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teacher(teachers):
    return models.load_causal_lm(str(teachers("gpt2")[0])).eval()


def build(tokenizer, *entries, reference=None, seed=0, **options):
    return build_rewards(entries, tokenizer, reference, "cpu", seed, None, **options)


def by_hand(model, prompt, completion):
    """Log-probabilities of a completion, one row at a time, from a whole softmax in double precision."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    table = logits.log_softmax(-1)
    return torch.stack([table[len(prompt) + place - 1, token] for place, token in enumerate(completion)])


# ---- The learned grammar reward -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("normalise", "baseline", "batch_size"), [
    ("token", "reference", 32), ("token", "reference", 2), ("sequence", "reference", 32), ("token", "none", 1), ("sequence", "none", 3)])
def test_the_margin_is_what_two_plain_forward_passes_give(tokenizer, teachers, teacher, reference, sampled, normalise, baseline,
                                                              batch_size):
    entry = MarginReward(kind="margin", teacher=str(teachers("gpt2")[0]), normalise=normalise, baseline=baseline, batch_size=batch_size)
    (margin,) = build(tokenizer, entry, reference=reference)
    got = margin(PROMPTS, COMPLETIONS, completion_ids=sampled)
    for prompt, completion, value in zip(tokenizer(PROMPTS).input_ids, sampled, got, strict=True):
        assert prompt[0] == tokenizer.bos_token_id
        expected = by_hand(teacher, prompt, completion)
        if baseline == "reference":
            expected = expected - by_hand(reference, prompt, completion)
        assert value == pytest.approx(float(expected.mean() if normalise == "token" else expected.sum()), abs=1e-4)


def test_the_margin_of_a_model_over_itself_is_zero(tokenizer, teachers, teacher, sampled):
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(teachers("gpt2")[0])), reference=teacher.requires_grad_(False))
    assert margin(PROMPTS, COMPLETIONS, completion_ids=sampled) == [0.0, 0.0, 0.0]


def test_what_lies_after_the_end_token_is_no_part_of_a_completion(tokenizer, teachers, reference, sampled):
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(teachers("gpt2")[0])), reference=reference)
    padded = [ids + [tokenizer.pad_token_id] * 4 + [7] if ids[-1] == tokenizer.eos_token_id else ids for ids in sampled]
    assert margin(PROMPTS, COMPLETIONS, completion_ids=padded) == margin(PROMPTS, COMPLETIONS, completion_ids=sampled)
    without = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in sampled]
    unlike = [a != b for a, b in zip(margin(PROMPTS, COMPLETIONS, completion_ids=without),
                                     margin(PROMPTS, COMPLETIONS, completion_ids=sampled), strict=True)]
    assert unlike == [True, False, True], "the end token itself is scored where it was sampled"


def test_prompts_are_read_as_they_were_sampled_from(tokenizer, teachers, reference, sampled):
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(teachers("gpt2")[0])), reference=reference)
    ids = tokenizer(PROMPTS).input_ids
    assert (margin(PROMPTS, COMPLETIONS, completion_ids=sampled, prompt_ids=ids) == margin(PROMPTS, COMPLETIONS, completion_ids=sampled)
            != margin(PROMPTS, COMPLETIONS, completion_ids=sampled, prompt_ids=[row[1:] for row in ids]))
    alone = margin(["", ""], COMPLETIONS[:2], completion_ids=sampled[:2], prompt_ids=[[], [tokenizer.bos_token_id]])
    assert alone == margin(["", ""], COMPLETIONS[:2], completion_ids=sampled[:2])


def test_neighbours_in_a_batch_change_nothing(tokenizer, teachers, reference, sampled):
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(teachers("gpt2")[0])), reference=reference)
    together = margin(PROMPTS, COMPLETIONS, completion_ids=sampled)
    alone = [margin(PROMPTS[i: i + 1], COMPLETIONS[i: i + 1], completion_ids=sampled[i: i + 1])[0] for i in range(3)]
    assert together == pytest.approx(alone, abs=1e-4)


def test_a_completion_of_no_tokens_has_no_reward(tokenizer, teachers, reference, sampled):
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(teachers("gpt2")[0])), reference=reference)
    none, some = margin(PROMPTS[:2], ["", COMPLETIONS[1]], completion_ids=[[], sampled[1]])
    assert none is None and some is not None


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "moep"])
def test_logits_made_in_chunks_and_at_the_completions_alone_are_the_same(teachers, tokenizer, sampled, family, monkeypatch):
    if family == "moep":
        section = MoEPModelSection(layers=3, width=16, heads=2, parallel_width=8, parallel_heads=2, max_positions=64)
        model = models.build_model(section, tokenizer, seed=0)
    else:
        model = models.load_causal_lm(str(teachers(family)[0]))
    model.eval().requires_grad_(False)
    prompts = tokenizer(PROMPTS).input_ids
    monkeypatch.setattr(reward_module, "LOGIT_VALUES", 3 * len(tokenizer))  # three rows of logits at a time
    scorer = CompletionScorer(model, 2, "it")
    assert scorer.head is not None
    whole = CompletionScorer(model, 2, "it")
    whole.head = None  # as where a model has no plain output head
    found = zip(prompts, sampled, scorer.logprobs(prompts, sampled), whole.logprobs(prompts, sampled), strict=True)
    for prompt, completion, one, other in found:
        expected = by_hand(model, prompt, completion)
        torch.testing.assert_close(one, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-4)


def test_models_reward_in_eval_mode_and_are_frozen(tokenizer, sampled, tmp_path):
    policy = models.build_model(ModelSection(layers=1, width=16, heads=2, max_positions=64, dropout=0.5), tokenizer, seed=0)
    models.save_model(policy, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="its weights are not frozen .*is it the policy itself"):
        build(tokenizer, MarginReward(kind="margin", teacher=str(tmp_path)), reference=policy)
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(tmp_path)), reference=policy.train().requires_grad_(False))
    margin.teacher.model.train()  # as a trainer does with everything it knows
    policy.train()
    assert margin(PROMPTS, COMPLETIONS, completion_ids=sampled) == [0.0, 0.0, 0.0]
    assert not any(parameter.requires_grad for parameter in margin.teacher.model.parameters())


def test_with_the_sum_and_a_coefficient_of_one_the_objective_is_minus_the_kl_to_the_teacher(tokenizer, teachers, teacher, reference):
    """E[r] - KL(policy || reference) = -KL(policy || teacher), on every completion of one token of a tiny policy, exactly."""
    prompt, vocabulary = tokenizer(PROMPTS[:1]).input_ids[0], range(len(tokenizer))
    entry = MarginReward(kind="margin", teacher=str(teachers("gpt2")[0]), normalise="sequence", batch_size=512)
    (margin,) = build(tokenizer, entry, reference=reference)
    rewards = torch.tensor(margin(PROMPTS[:1] * len(tokenizer), [""] * len(tokenizer), completion_ids=[[token] for token in vocabulary]))

    def log_probabilities(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)

    policy = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(1)).double().log_softmax(-1)

    def kl(other):
        return float((policy.exp() * (policy - other)).sum())

    objective = float((policy.exp() * rewards).sum()) - kl(log_probabilities(reference))
    assert objective == pytest.approx(-kl(log_probabilities(teacher)), abs=1e-4)


# ---- Likelihood -----------------------------------------------------------------------------------------------------


def test_a_model_of_the_same_vocabulary_scores_the_sampled_tokens(tokenizer, teachers, teacher, sampled):
    (likelihood,) = build(tokenizer, LikelihoodReward(kind="likelihood", model=str(teachers("gpt2")[0])))
    got = likelihood(PROMPTS, COMPLETIONS, completion_ids=sampled)
    expected = [float(by_hand(teacher, prompt, ids).mean()) for prompt, ids in zip(tokenizer(PROMPTS).input_ids, sampled, strict=True)]
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model with a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    own = models.train_tokenizer(["the cat sat on the mat and we went home"] * 3, 290, 1)
    models.save_model(models.build_model(ModelSection(layers=1, width=16, heads=2, max_positions=32), own, seed=5), own, folder)
    return folder


def test_a_model_of_another_vocabulary_reads_the_text_itself(tokenizer, foreign, sampled):
    (likelihood,) = build(tokenizer, LikelihoodReward(kind="likelihood", model=str(foreign)))
    own, model = models.load_tokenizer(foreign), models.load_causal_lm(str(foreign)).eval()
    prompt, ids = own("The cat").input_ids, own("The cat sat on the mat.").input_ids
    assert ids[: len(prompt)] == prompt and prompt[0] == own.bos_token_id
    got = likelihood(PROMPTS[:1], COMPLETIONS[:1], completion_ids=sampled[:1])
    assert got == pytest.approx([float(by_hand(model, prompt, ids[len(prompt):]).mean())], abs=1e-4)


def test_what_another_vocabulary_cannot_score_has_no_reward(tokenizer, foreign):
    (likelihood,) = build(tokenizer, LikelihoodReward(kind="likelihood", model=str(foreign)))
    empty, long, fine = likelihood(["a", "a", ""], ["", "xyz" * 40, " cat"], completion_ids=[[2], [5] * 9, [6]])
    assert (empty, long) == (None, None) and fine is not None


def test_special_tokens_in_letters_stay_letters(tokenizer, foreign):
    (likelihood,) = build(tokenizer, LikelihoodReward(kind="likelihood", model=str(foreign)))
    (_,), (ids,) = likelihood._read_again(["a"], [" cat</s>"])
    assert likelihood.own.eos_token_id not in ids and likelihood.own.decode(ids) == " cat</s>"


# ---- Length, repetition, chance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "expected"), [
    (0, 0.0), (1, 0.2), (3, 0.6), (5, 1.0), (7, 1.0), (8, 1.0), (9, 0.8), (12, 0.2), (13, 0.0), (500, 0.0)])
def test_the_length_window_falls_to_nothing_on_both_sides(tokenizer, words, expected):
    (length,) = build(tokenizer, LengthReward(kind="length", min_words=5, max_words=8, slack=5))
    assert length(["x"], [" word\n" * words], completion_ids=[[1]]) == [pytest.approx(expected)]


@pytest.mark.parametrize(("text", "n", "expected"), [
    ("", 3, 0.0), ("one two", 3, 0.0), ("one two three four", 3, 0.0), ("a b c a b c", 3, -1 / 4), ("A b c. a B c.", 3, -2 / 6),
    ("no no no no no", 3, -2 / 3), ("no no no no no", 1, -4 / 5), ("!" * 102, 3, -0.99), ("a b a b", 2, -1 / 3)])
def test_repetition_is_the_share_of_n_grams_seen_before(tokenizer, text, n, expected):
    (repetition,) = build(tokenizer, RepetitionReward(kind="repetition", n=n))
    assert repetition(["a b c a b c"], [text], completion_ids=[[1]]) == [pytest.approx(expected)]


def test_chance_follows_from_seed_prompt_and_tokens_alone(tokenizer):
    many = {"prompts": ["a"] * 2000, "completions": ["x"] * 2000, "completion_ids": [[number] for number in range(2000)]}
    (chance,), (again,), (other,) = (build(tokenizer, RandomReward(kind="random"), seed=seed) for seed in (1, 1, 2))
    values = chance(**many)
    torch.rand(3)  # what else draws in a run
    assert values == again(**{name: held[::-1] for name, held in many.items()})[::-1] and values != other(**many)
    assert values[:5] != chance(**{**many, "prompts": ["b"] * 2000})[:5]
    assert len(set(values)) == 2000 and 0 <= min(values) < 0.01 and 0.99 < max(values) < 1
    assert sum(values) / 2000 == pytest.approx(0.5, abs=0.03)


# ---- The sum --------------------------------------------------------------------------------------------------------


class Fixed(Reward):
    """A reward whose values are given."""

    def __init__(self, name, weight, values, **counts):
        super().__init__(name, SimpleNamespace(weight=weight))
        self.values, self.new = values, counts

    def __call__(self, prompts, completions, **kwargs):
        self.counts.update(self.new)
        return self.values


def test_the_sum_excludes_a_completion_whose_part_is_missing():
    rewards = [Fixed("a", 2.0, [1.0, 2.0, None, 4.0]), Fixed("b", -0.5, [1.0, None, 1.0, 2.0])]
    scores = combine(rewards, ["p"] * 4, ["c"] * 4, completion_ids=[[1]] * 4)
    assert scores.total == [1.5, None, None, 7.0] and scores.parts == {"a": [1.0, 2.0, None, 4.0], "b": [1.0, None, 1.0, 2.0]}
    assert scores.stats == pytest.approx({
        "mean": 4.25, "std": 2.75, "excluded": 2, "excluded_share": 0.5, "a/mean": 7 / 3, "a/std": math.sqrt(14 / 9), "a/excluded": 1,
        "b/mean": 4 / 3, "b/std": math.sqrt(2 / 9), "b/excluded": 1})
    json.dumps(scores.stats, allow_nan=False)


def test_a_weight_of_zero_is_watched_only():
    scores = combine([Fixed("a", 1.0, [1.0]), Fixed("b", 0.0, [None])], ["p"], ["c"])
    assert scores.total == [1.0] and scores.stats["b/excluded"] == 1 and scores.stats["excluded"] == 0


def test_where_nothing_was_judged_there_is_no_mean():
    scores = combine([Fixed("a", 1.0, [None, None])], ["p"] * 2, ["c"] * 2)
    assert scores.total == [None, None] and scores.stats == {"excluded": 2, "excluded_share": 1.0, "a/excluded": 2}


def test_counts_are_those_of_the_batch():
    judge = Fixed("judge", 1.0, [1.0], calls=4, parse_failures=1)
    for _ in range(2):
        stats = combine([judge], ["p"], ["c"]).stats
        assert (stats["judge/calls"], stats["judge/parse_failures"], stats["judge/parse_failure_rate"]) == (4, 1, 0.25)


def test_a_reward_that_loses_a_completion_is_an_error():
    with pytest.raises(ValueError, match="a gave 1 rewards for 2 completions"):
        combine([Fixed("a", 1.0, [1.0])], ["p"] * 2, ["c"] * 2)


def test_names_are_unique(tokenizer):
    window = LengthReward(kind="length", min_words=1, max_words=2, weight=3)
    rewards = build(tokenizer, window, RandomReward(kind="random"), window, window)
    assert [reward.__name__ for reward in rewards] == ["length", "random", "length_2", "length_3"] and rewards[0].weight == 3
    assert set(combine(rewards, ["p"], ["c"], completion_ids=[[1]]).parts) == {"length", "random", "length_2", "length_3"}


# ---- Before anything is computed ------------------------------------------------------------------------------------


def test_content_and_not_place_is_what_a_reward_is(tokenizer, teachers, tmp_path):
    moved = tmp_path / "moved.txt"
    moved.write_text(SHIPPED_RUBRIC.read_text())

    def fingerprints(teacher, rubric=None):
        judge = JudgeReward(kind="judge", server="http://localhost:1/v1", rubric=rubric)
        return reward_fingerprints([MarginReward(kind="margin", teacher=str(teacher)), judge], tokenizer)

    gpt2, llama = teachers("gpt2", "llama")
    (tmp_path / "copy").symlink_to(gpt2)
    first = fingerprints(gpt2)
    assert first == fingerprints(tmp_path / "copy", str(moved)) and set(first) == {"reward0.teacher", "reward1.rubric"}
    assert first["reward0.teacher"] != fingerprints(llama)["reward0.teacher"]
    moved.write_text(SHIPPED_RUBRIC.read_text() + "Be kind.\n")
    assert first["reward1.rubric"] != fingerprints(gpt2, str(moved))["reward1.rubric"]


def test_what_cannot_reward_is_refused_before_it_is_loaded(tokenizer, teachers, foreign, reference, tmp_path):
    def refused(entry, **options):
        with pytest.raises(UserError) as caught:
            build(tokenizer, entry, **options)
        return str(caught.value)

    gpt2 = str(teachers("gpt2")[0])
    unfinished = tmp_path / "unfinished"
    (unfinished / "run").mkdir(parents=True)
    (unfinished / "config.json").write_text("{}")
    assert "rewards.0.teacher: " in (said := refused(MarginReward(kind="margin", teacher="models/none"))) and "does not exist" in said
    assert "is an unfinished run" in refused(MarginReward(kind="margin", teacher=str(unfinished)))
    assert "rewards.0.model: " in refused(LikelihoodReward(kind="likelihood", model="models/none"))
    assert "has another vocabulary" in refused(MarginReward(kind="margin", teacher=str(foreign)), reference=reference)
    assert "set baseline: none" in refused(MarginReward(kind="margin", teacher=gpt2))
    assert "rewards.0.device: gpu9 is no device" in refused(MarginReward(kind="margin", teacher=gpt2, device="gpu9"), reference=reference)
    assert ("rewards.0.teacher: it has 64 positions, but prompts and completions have up to 66 tokens"
            in refused(MarginReward(kind="margin", teacher=gpt2), reference=reference, longest=66))
    build(tokenizer, MarginReward(kind="margin", teacher=gpt2), reference=reference, longest=65)


def test_a_text_too_long_for_the_teacher_stops_the_run(tokenizer, teachers, reference):
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(teachers("gpt2")[0])), reference=reference)
    with pytest.raises(UserError, match="margin: the teacher .* has 64 positions, but prompt and completion have 66 tokens"):
        margin(["x"], ["x"], completion_ids=[[5] * 64], prompt_ids=[[1, 5]])
    assert None not in margin(["x"], ["x"], completion_ids=[[5] * 63], prompt_ids=[[1, 5]])


def test_a_teacher_that_answers_nan_stops_the_run(tokenizer, teachers, reference, sampled):
    (margin,) = build(tokenizer, MarginReward(kind="margin", teacher=str(teachers("gpt2")[0])), reference=reference)
    with torch.no_grad():
        margin.teacher.model.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(UserError, match="gives log-probabilities that are not finite"):
        margin(PROMPTS, COMPLETIONS, completion_ids=sampled)


def test_rewards_of_tokens_say_when_they_get_none(tokenizer):
    (chance,) = build(tokenizer, RandomReward(kind="random"))
    with pytest.raises(ValueError, match="pass completion_ids"):
        chance(["p"], ["c"])
    with pytest.raises(ValueError, match="plain texts, not conversations"):
        chance([[{"role": "user", "content": "p"}]], ["c"], completion_ids=[[1]])


def test_a_shared_model_is_loaded_once(tokenizer, teachers):
    path = str(teachers("gpt2")[0])
    margin, likelihood = build(tokenizer, MarginReward(kind="margin", teacher=path, baseline="none"),
                               LikelihoodReward(kind="likelihood", model=path))
    assert margin.teacher.model is likelihood.scorer.model


def test_the_sections_can_be_written_into_a_run_record():
    entries = [MarginReward(kind="margin", teacher="t"), LengthReward(kind="length", min_words=1, max_words=2)]
    assert [row["kind"] for row in yaml.safe_load(yaml.safe_dump([entry.model_dump() for entry in entries]))] == ["margin", "length"]
