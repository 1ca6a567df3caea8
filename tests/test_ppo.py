"""PPO: the maths against values worked by hand, what it learns, resuming, and the run around it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from babylm import models
from babylm.config import KLSection, ModelSection, RLConfig, check
from interactive import ppotrainer, rl_run, rollout
from interactive.ppotrainer import PPOTrainer, PolicyWithValue
from interactive.rollout import Sample, collate

LLAMA = {"architecture": "llama", "layers": 2, "width": 32, "heads": 2, "max_positions": 64}
GPT2 = {"layers": 2, "width": 32, "heads": 2, "max_positions": 64}


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


# ---- The maths ------------------------------------------------------------------------------------------------------


def test_advantages_are_those_worked_by_hand():
    # gamma 0.5, lambda 0.5. Row 1: deltas 1+0.5*2-1 = 1, 0+0.5*3-2 = -0.5, 2-3 = -1, so A = -1, -0.5-0.25 = -0.75, 1-0.1875 = 0.8125.
    # Row 2 ends after two tokens, and what stands behind them must not matter: deltas 0+0.5*4-2 = 0, 1-4 = -3; A = -3, -0.75.
    rewards, values = tensor([1, 0, 2], [0, 1, 99]), tensor([1, 2, 3], [2, 4, 99])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    found = ppotrainer.advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    assert torch.equal(found, tensor([0.8125, -0.75, -1], [-0.75, -3, 0]))


def test_with_gamma_and_lambda_1_the_return_is_the_sum_of_what_follows():
    rewards, values = torch.randn(4, 7), torch.randn(4, 7)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    found = ppotrainer.advantages(rewards, values, mask, 1.0, 1.0) + values
    for row, length in enumerate((7, 3, 1, 5)):
        later = rewards[row, :length].flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(found[row, :length], later)


def test_whitening_sees_only_what_is_there():
    values, mask = tensor([1, 2, 50], [3, 70, 90]), torch.tensor([[True, True, False], [True, False, False]])
    found = ppotrainer.whitened(values, mask)
    torch.testing.assert_close(found, tensor([-math.sqrt(1.5), 0, 0], [math.sqrt(1.5), 0, 0]))


def test_the_policy_loss_is_clipped_only_where_that_is_worse():
    old = torch.zeros(6)
    logprobs = torch.tensor([1.5, 0.5, 1.1, 1.5, 0.5, 0.9]).log()
    advantage = tensor([1, 1, 1, -1, -1, -1])[0]
    loss, clipped = ppotrainer.policy_loss(logprobs, old, advantage, 0.2)
    torch.testing.assert_close(loss, -tensor([1.2, 0.5, 1.1, -1.5, -0.8, -0.9])[0])
    assert clipped.tolist() == [True, False, False, False, True, False]


def test_the_value_loss_takes_the_larger_error():
    values, old, returns = tensor([3, 0.1])[0], tensor([0, 0])[0], tensor([3, 1])[0]
    torch.testing.assert_close(ppotrainer.value_loss(values, old, returns, 0.2), tensor([0.5 * 2.8**2, 0.5 * 0.9**2])[0])
    torch.testing.assert_close(ppotrainer.value_loss(values, old, returns, None), tensor([0, 0.5 * 0.9**2])[0])


@pytest.mark.parametrize("old_is_policy", [True, False])
def test_the_gradient_of_the_kl_loss_is_that_of_kl(old_is_policy):
    generator = torch.Generator().manual_seed(0)
    logits, other, behind = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    log_p, log_ref = logits.log_softmax(0), other.log_softmax(0)
    log_old = log_p.detach() if old_is_policy else behind.log_softmax(0)
    exact, = torch.autograd.grad((log_p.exp() * (log_p - log_ref)).sum(), logits, retain_graph=True)
    sampled, = torch.autograd.grad((log_old.exp() * ppotrainer.kl_loss(log_p, log_old, log_ref)).sum(), logits)  # mean over all tokens
    torch.testing.assert_close(sampled, exact)


def test_the_adaptive_coefficient_moves_towards_its_target_by_bounded_steps():
    section = KLSection(control="adaptive", target=0.1, horizon=100)
    assert ppotrainer.adapted(1.0, 0.11, 50, section) == pytest.approx(1 + 0.1 * 0.5)
    assert ppotrainer.adapted(1.0, 9.0, 50, section) == pytest.approx(1.1) and ppotrainer.adapted(1.0, 0.0, 50, section) == pytest.approx(0.9)
    assert ppotrainer.adapted(1.0, 9.0, 50, KLSection(control="fixed")) == 1.0


# ---- What is sampled ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(tokenizer, tmp_path_factory):
    """policies("llama") -> folder of a small model with dropout that has not been trained: its samples are nearly uniform."""
    folder = tmp_path_factory.mktemp("policies")

    def path(name):
        if not (folder / name).exists():
            (folder / name).mkdir()
            built = models.build_model(ModelSection(**{"llama": LLAMA, "gpt2": GPT2}[name], dropout=0.2), tokenizer, seed=1)
            models.save_model(built, tokenizer, folder / name)
        return folder / name

    return path


def sampled(path, tokenizer, prompts=("The dog", "A", "She was seen by the old"), seeds=(1, 2, 3), **settings):
    model = models.load_causal_lm(str(path))
    return model, rollout.sample(model, tokenizer, list(prompts), list(seeds), **{"max_new_tokens": 12, **settings})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sampling_depends_neither_on_the_batch_nor_on_dropout(policies, tokenizer, name):
    model, together = sampled(policies(name), tokenizer)
    model.train()
    alone = [rollout.sample(model, tokenizer, [s.prompt], [seed], max_new_tokens=12)[0] for s, seed in zip(together, (1, 2, 3), strict=True)]
    assert [s.completion_ids for s in alone] == [s.completion_ids for s in together] and model.training
    again = rollout.sample(model, tokenizer, ["A"], [5], max_new_tokens=12)[0]
    assert again.completion_ids != together[1].completion_ids


def test_samples_follow_the_distribution_at_the_temperature(policies, tokenizer):
    model = models.load_causal_lm(str(policies("llama"))).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        logits = model(torch.tensor([tokenizer("The").input_ids])).logits[0, -1]
    drawn = rollout.SeededSampling(range(20_000), 2.0, torch.device("cpu"))(None, logits.expand(20_000, -1)).argmax(1)
    expected = (logits / 2).softmax(0)
    share = torch.bincount(drawn, minlength=len(expected)) / 20_000
    assert expected.max() > 0.01 and (share - expected).abs().max() < 0.008 and abs(float((share / expected)[expected > 0.01].mean()) - 1) < 0.05


def test_a_completion_ends_with_its_first_end_token_even_where_that_is_the_pad_token(policies, tokenizer):
    model = models.load_causal_lm(str(policies("gpt2")))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    script = iter([[pad, end, 7, 8], [9, pad, pad, end]])

    class Scripted(torch.nn.Module):
        config, device, training = model.config, model.device, False

        def generate(self, input_ids, **_):
            return torch.cat([input_ids, torch.tensor([next(script), next(script)])], 1)

    first, second = rollout.sample(Scripted(), tokenizer, ["a", "b"], [0, 1], max_new_tokens=4)
    assert first.completion_ids == [pad, end] and second.completion_ids == [9, pad, pad, end] and first.finished and second.finished


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_log_probabilities_are_the_same_for_left_and_right_padding_and_for_the_sampler(policies, tokenizer, name):
    model, samples = sampled(policies(name), tokenizer)
    policy = PolicyWithValue(model, "head").eval()
    with torch.no_grad():
        right, left = (policy(collate(samples, left=left), 1.0) for left in (False, True))
        for ours, theirs in zip(right, left, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        found = iter(right[0].tolist())
        for s in samples:
            logits = model(torch.tensor([s.prompt_ids + s.completion_ids])).logits[0].log_softmax(-1)
            for place, token in enumerate(s.completion_ids, len(s.prompt_ids) - 1):
                assert next(found) == pytest.approx(float(logits[place, token]), abs=1e-4)
    assert next(found, None) is None


def test_words_of_a_completion_are_those_it_adds():
    def words(prompt, completion):
        return Sample(prompt, completion, [], [], True).words

    assert words("The do", "g ran") == 1 and words("The dog", " ran off") == 2 and words("The", "") == 0 and words("a ", "b") == 1


# ---- What is learned ------------------------------------------------------------------------------------------------


class Toy:
    """A reward that a test can understand."""

    weight, counts = 1.0, {}

    def __init__(self, value, name="toy"):
        self.value, self.__name__ = value, name

    def __call__(self, prompts, completions, completion_ids=(), **_):
        return [self.value(ids) for ids in completion_ids]


def low_tokens():
    """A bandit: the share of tokens among the first 100 of 512; an untrained policy gets a fifth."""
    return Toy(lambda ids: sum(token < 100 for token in ids) / len(ids))


@pytest.fixture
def build(policies, corpus, tmp_path):
    """build(reward, **sections) -> (run, trainer) of a tiny PPO run that has not begun."""

    def make(rewards, name="llama", policy=None, folder=None, **sections):
        values = {"name": "ppo", "output": str(folder or tmp_path), "seed": 3, "data": {"corpus": str(corpus), "seq_len": 32, "eval_blocks": 4},
                  "model": {"path": str(policy or policies(name))}, "prompts": {"count": 40, "max_tokens": 3},
                  "generation": {"max_new_tokens": 6}, "rewards": [{"kind": "random"}],
                  "training": {"steps": 20, "batch_size": 64, "lr": 1e-2, "threads": 1}, "ppo": {"value_lr": 1e-2, "kl": {"coefficient": 0.0}},
                  "checkpoints": {"milestones": False, "save_steps": 4}, "logging": {"eval_prompts": 32, "logging_steps": 3}}
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
        config = check(RLConfig, values, "test")
        inputs = rl_run.load_inputs(config)
        opened = rl_run.open_run(config, inputs)
        policy, reference = (models.load_causal_lm(config.model.path) for _ in range(2))
        reference.requires_grad_(False).eval()
        run = rl_run.RLRun(config, opened, inputs, reference, rewards, torch.device("cpu"))
        return run, PPOTrainer(config, run, policy)

    return make


def rows(run, kind):
    return [row for line in run.folder.metrics.read_text().splitlines() if (row := json.loads(line))["kind"] == kind]


@pytest.mark.parametrize("setting", [{}, {"value": "model"}, {"kl": {"coefficient": 0.01, "where": "loss"}, "entropy_coefficient": 0.001}])
def test_a_policy_learns_to_prefer_tokens(build, setting):
    run, trainer = build([low_tokens()], ppo={"value_lr": 1e-2, "kl": {"coefficient": 0.0}, **setting})
    trainer.train()
    first, last = (rows(run, "eval")[place] for place in (0, -1))
    assert first["reward"] < 0.3 and first["kl"] == 0 and last["reward"] > 0.8 and last["kl"] > 0.5
    train = rows(run, "train")
    assert train[0]["kl"] == 0 and train[-1]["reward"] > train[0]["reward"] and train[-1]["entropy"] < train[0]["entropy"]


def test_a_policy_learns_a_length(build):
    run, trainer = build([Toy(lambda ids: -abs(len(ids) - 2))], generation={"max_new_tokens": 8}, training={
        "steps": 25, "batch_size": 32, "lr": 5e-3, "threads": 1})
    trainer.train()
    first, last = (rows(run, "eval")[place] for place in (0, -1))
    assert first["completion_tokens"] > 7 and last["completion_tokens"] < 4 and last["finished"] > 0.8


@pytest.mark.parametrize("kl", [{"coefficient": 5.0}, {"coefficient": 5.0, "where": "loss"},
                                {"coefficient": 1.0, "control": "adaptive", "target": 0.005, "horizon": 16}])
def test_a_large_kl_coefficient_holds_the_policy_near_the_reference(build, kl):
    run, trainer = build([low_tokens()], ppo={"value_lr": 1e-2, "kl": kl})
    trainer.train()
    last = rows(run, "eval")[-1]
    assert last["kl"] < 0.1 and last["reward"] < 0.4
