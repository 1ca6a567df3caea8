"""PPO: the maths against values worked by hand, what it learns, resuming, and the run around it."""

import json
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerFast

from babylm import models
from babylm.config import KLSection, ModelSection, MoEPModelSection, RLConfig
from babylm.run_folder import Preempted
from babylm.schema import UserError, check
from interactive import ppotrainer, rl_run, rollout
from interactive.judge import Interrupted
from interactive.ppotrainer import PolicyWithValue, PPOTrainer
from interactive.rollout import Sample, collate

LLAMA = {"architecture": "llama", "layers": 2, "width": 32, "heads": 2, "max_positions": 64}
GPT2 = {"layers": 2, "width": 32, "heads": 2, "max_positions": 64}


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32)


# ---- The maths ------------------------------------------------------------------------------------------------------


def test_advantages_are_those_worked_by_hand():
    # gamma 0.5, lambda 0.5. Row 1: deltas 1+0.5*2-1 = 1, 0+0.5*3-2 = -0.5, 2-3 = -1, so A = -1, -0.5-0.25 = -0.75, 1-0.1875 = 0.8125.
    # Row 2 ends after two tokens, and what stands behind them must not matter: deltas 0+0.5*4-2 = 0, 1-4 = -3; A = -3, -0.75.
    rewards, values = tensor([1, 0, 2], [0, 1, 50]), tensor([1, 2, 3], [2, 4, 99])
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
    assert ppotrainer.adapted(1.0, 9.0, 50, section) == pytest.approx(1.1)
    assert ppotrainer.adapted(1.0, 0.0, 50, section) == pytest.approx(0.9)
    assert ppotrainer.adapted(1.0, 0.0, 1000, section) == pytest.approx(0.8)  # a batch larger than the horizon must not turn the sign
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
    alone = [rollout.sample(model, tokenizer, [s.prompt], [seed], max_new_tokens=12)[0] for seed, s in enumerate(together, 1)]
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
    assert expected.max() > 0.01 and (share - expected).abs().max() < 0.008
    assert abs(float((share / expected)[expected > 0.01].mean()) - 1) < 0.05


def test_a_completion_ends_with_its_first_end_token_even_where_that_is_the_pad_token(policies, tokenizer):
    model = models.load_causal_lm(str(policies("gpt2")))
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    script = iter([[pad, end, 7, 8], [9, pad, pad, end]])

    class Scripted(torch.nn.Module):
        config, device, training, generation_config = model.config, model.device, False, model.generation_config

        def generate(self, input_ids, **_):
            return torch.cat([input_ids, torch.tensor([next(script), next(script)])], 1)

    first, second = rollout.sample(Scripted(), tokenizer, ["a", "b"], [0, 1], max_new_tokens=4)
    assert first.completion_ids == [pad, end] and second.completion_ids == [9, pad, pad, end] and first.finished and second.finished


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer in the manner of Llama 2: words begin with a mark that stands for a space, unknown characters are bytes, and the
    decoder leaves out the first space of a text."""
    core = Tokenizer(tokenizer_models.BPE(unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.train_from_iterator(["the dog went home", "the dog ran"] * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    # No special tokens for transformers' own eyes but these: bytes are read as text.
    core = Tokenizer.from_str(json.dumps({**(held := json.loads(core.to_str())), "added_tokens": held["added_tokens"][:3]}))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def written(tokenizer, prompt, completion_ids):
    """The Sample of a model that writes these ids after the prompt."""

    class Scripted(torch.nn.Module):
        config, device, generation_config = GPT2Config(), torch.device("cpu"), GenerationConfig()

        def generate(self, input_ids, **_):
            return torch.cat([input_ids, torch.tensor([completion_ids])], 1)

    return rollout.sample(Scripted(), tokenizer, [prompt], [0], max_new_tokens=len(completion_ids))[0]


def test_a_completion_keeps_the_space_that_its_first_word_begins_with(metaspace):
    end = metaspace.eos_token_id
    went = metaspace("the dog went", add_special_tokens=False).input_ids[-1]
    assert metaspace.convert_ids_to_tokens(went) == "▁went" and metaspace.decode([went]) == "went"
    first = written(metaspace, "the dog", [went, end])
    assert (first.completion, first.words) == (" went", 1)
    assert written(metaspace, "the do", metaspace.convert_tokens_to_ids(["g", "▁went"])).completion == "g went"
    assert written(metaspace, "the dog", [end]).completion == ""
    # 日 is three bytes; a fourth that belongs to no character spoils the decoder's whole run of bytes, the prompt's among them
    assert written(metaspace, "the 日", metaspace.convert_tokens_to_ids(["<0x80>", "▁went"])).completion == "� went"
    assert written(metaspace, "the 日", metaspace("日", add_special_tokens=False).input_ids[-3:]).completion == "日"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=st.text(min_size=1), ids=st.lists(st.integers(0, 511), min_size=1, max_size=6))
def test_a_completion_in_bytes_is_decoded_as_it_would_be_alone(tokenizer, prompt, ids):
    assert rollout.text_after(tokenizer, tokenizer(prompt).input_ids, ids) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(("name", "temperature"), [("llama", 1.0), ("gpt2", 2.0)])
def test_log_probabilities_are_the_same_for_left_and_right_padding_and_for_the_sampler(policies, tokenizer, name, temperature):
    model, samples = sampled(policies(name), tokenizer)
    policy = PolicyWithValue(model, "head").eval()
    torch.nn.init.normal_(policy.value_head.weight)
    theirs = rollout.completion_logprobs(rollout.body_and_head(model, "model"), samples, temperature=temperature, batch_size=2)
    with torch.no_grad():
        right, left = (policy(collate(samples, left=left), temperature) for left in (False, True))
        torch.testing.assert_close(torch.cat(theirs), right[0])
        for ours, theirs in zip(right, left, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        found = iter(right[0].tolist())
        for s in samples:
            logits = (model(torch.tensor([s.prompt_ids + s.completion_ids])).logits[0] / temperature).log_softmax(-1)
            for place, token in enumerate(s.completion_ids, len(s.prompt_ids) - 1):
                assert next(found) == pytest.approx(float(logits[place, token]), abs=1e-4)
    assert next(found, None) is None


def test_the_gain_is_paired_by_completion():
    first, last = {"rewards": [0.0, 1.0, None, 2.0]}, {"rewards": [1.0, 3.0, 5.0, 2.0]}  # gains 1, 2, 0
    assert rl_run.paired_gain(first, last) == {"mean": 1.0, "se": pytest.approx(math.sqrt(1 / 3)), "n": 3}
    assert rl_run.paired_gain({}, {}) is None


def test_the_models_own_generation_config_does_not_bend_what_is_sampled(policies, tokenizer):
    model, plain = sampled(policies("llama"), tokenizer)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 12
    again = rollout.sample(model, tokenizer, [s.prompt for s in plain], [1, 2, 3], max_new_tokens=12)
    assert [s.completion_ids for s in again] == [s.completion_ids for s in plain]
    assert model.generation_config.repetition_penalty == 5.0


def test_a_judges_counts_are_those_of_all_processes():
    one = {"judge/calls": 4.0, "judge/parse_failures": 1.0, "judge/parse_failure_rate": 0.25}
    other = {"judge/calls": 16.0, "judge/parse_failures": 9.0, "judge/parse_failure_rate": 0.5625}
    assert rl_run._summed([one, other]) == {"judge/calls": 20.0, "judge/parse_failures": 10.0, "judge/parse_failure_rate": 0.5}


def test_trackers_get_plain_values(build):
    run, _ = build([low_tokens()])
    values = rl_run.tracked(run.config)
    assert values["training.lr"] == 1e-2 and all(isinstance(value, int | float | str) for value in values.values())


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
        values = {"name": "ppo", "output": str(folder or tmp_path), "seed": 3,
                  "data": {"corpus": str(corpus), "seq_len": 32, "eval_blocks": 4},
                  "model": {"path": str(policy or policies(name))}, "prompts": {"count": 40, "max_tokens": 3},
                  "generation": {"max_new_tokens": 6}, "rewards": [{"kind": "random"}],
                  "training": {"steps": 20, "batch_size": 64, "lr": 1e-2, "threads": 1},
                  "ppo": {"value_lr": 1e-2, "kl": {"coefficient": 0.0}},
                  "checkpoints": {"milestones": False, "save_steps": 4}, "logging": {"eval_prompts": 32, "logging_steps": 3}}
        for section, keys in sections.items():
            values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
        config = check(RLConfig, values, "test")
        AcceleratorState._reset_state()  # its precision is that of the first run in a process
        inputs = rl_run.load_inputs(config)
        opened = rl_run.open_run(config, inputs)
        policy, reference = (models.load_causal_lm(config.model.path) for _ in range(2))
        reference.requires_grad_(False).eval()
        run = rl_run.RLRun(config, opened, inputs, rl_run.load_validation(config, inputs), reference, rewards, torch.device("cpu"))
        return run, PPOTrainer(config, run, policy)

    make.folder = tmp_path
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
        "steps": 15})
    trainer.train()
    first, last = (rows(run, "eval")[place] for place in (0, -1))
    assert first["completion_tokens"] > 7 and last["completion_tokens"] < 4 and last["finished"] > 0.8


@pytest.mark.parametrize("kl", [{"coefficient": 5.0}, {"coefficient": 5.0, "where": "loss"},
                                {"coefficient": 1.0, "control": "adaptive", "target": 0.005, "horizon": 64}])
def test_a_large_kl_coefficient_holds_the_policy_near_the_reference(build, kl):
    run, trainer = build([low_tokens()], ppo={"value_lr": 1e-2, "kl": kl})
    trainer.train()
    last = rows(run, "eval")[-1]
    assert last["kl"] < 0.25 and last["reward"] < 0.4  # without it: more than 0.5, and more than 0.8


# ---- The update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision"), [("llama", "fp32"), ("gpt2", "fp32"), ("llama", "bf16")])
def test_before_the_first_change_the_ratio_is_1_and_the_kl_0(build, name, precision):
    run, trainer = build([low_tokens()], name=name, training={"precision": precision}, ppo={"epochs": 1, "kl": {"coefficient": 0.1}})
    samples = trainer.rollout()
    assert all(not s.values.any() for s in samples)  # the value of everything is 0 at first
    terms = trainer.update(samples)
    assert terms["kl"] == 0 and abs(terms["update_kl"]) < 1e-9 and terms["clipped"] == 0
    assert abs(terms["policy_loss"]) < 1e-5 and terms["grad_norm"] > 0  # whitened advantages: the loss is 0, its gradient is not


def test_gradient_checkpointing_brings_no_dropout_back(build):
    run, trainer = build([low_tokens()], training={"gradient_checkpointing": True}, ppo={"epochs": 1, "kl": {"coefficient": 0.1}})
    terms = trainer.update(trainer.rollout())  # Llama's attention dropout is no module of its own, and recomputing needs train mode
    assert trainer.policy.model.training and terms["kl"] == 0 and abs(terms["update_kl"]) < 1e-9
    assert run.reference.config.attention_dropout == trainer.policy.model.config.attention_dropout == 0.2


def test_every_weight_that_is_trained_is_in_the_optimizer_once(build):
    for value in ("head", "model"):
        _, trainer = build([low_tokens()], ppo={"value": value, "value_lr": 3e-2}, fresh=True)
        held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in trainer.policy.parameters())
        assert {group["peak_lr"] for group in trainer.optimizer.param_groups if id(trainer.policy.value_head.weight) in map(
            id, group["params"])} == {3e-2}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def test_what_fits_at_once_does_not_change_the_step(build):
    found = []
    for number, per_device in enumerate((None, 8, 16)):
        run, trainer = build([low_tokens()], folder=f"{build.folder}/{number}", training={"per_device_batch_size": per_device}, ppo={
            "minibatches": 2, "epochs": 2, "entropy_coefficient": 0.01, "kl": {"coefficient": 0.1, "where": "loss"}})
        samples = trainer.rollout()
        # Plain gradient descent: Adam's first steps only see a gradient's sign, which rounding turns where it is almost 0.
        trainer.optimizer = torch.optim.SGD([{"params": list(trainer.policy.parameters()), "peak_lr": 0.1}], lr=0.1)
        trainer.update(samples)
        found.append(weights(trainer))
    for name, values in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], values, rtol=0, atol=1e-6)


def test_tokens_behind_the_end_and_excluded_completions_teach_nothing(build):
    run, trainer = build([low_tokens()])
    samples = trainer.rollout()
    batch = collate(samples)
    assert batch.mask.sum() == sum(len(s.completion_ids) for s in samples)
    targets = trainer.targets(samples, batch)
    assert all(float(values[~batch.mask].abs().sum()) == 0 for values in targets.values())
    for sample, returns in zip(samples, targets["returns"], strict=True):  # all values are 0: the reward, discounted from its last token
        assert float(returns[0]) == pytest.approx(sample.reward * 0.95 ** (len(sample.completion_ids) - 1), abs=1e-6)
    run.rewards = [Toy(lambda ids: None if ids[0] < 250 else 1.0)]
    run.score(samples)
    left = [s for s in samples if s.reward is not None]
    assert 0 < len(left) < len(samples) and all(s.completion_ids[0] >= 250 for s in left)
    run.end_step(trainer.policy.model, samples, trainer.update(left))
    row = rows(run, "train")[-1]
    assert row["excluded"] == len(samples) - len(left) and row["reward"] == 1.0


# ---- The run --------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_without_completions_that_no_reward_could_be_given(build):
    run, trainer = build([Toy(lambda ids: None if ids[0] < 250 else 1.0)], training={"steps": 1})
    trainer.train()
    finished = json.loads((run.folder.run / "finished.json").read_text())
    assert 10 < finished["excluded"] < 54 and finished["reward"] == 1.0


def test_a_step_that_can_teach_nothing_stops_the_run(build):
    _, trainer = build([Toy(lambda ids: None, name="judge")])
    with pytest.raises(UserError, match="step 1: none of the 32 completions could be given a reward .judge."):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_the_run(build):
    run, trainer = build([Toy(lambda ids: math.nan)], logging={"eval_prompts": 0})
    with pytest.raises(UserError, match="became NaN or infinite at step 1"):
        trainer.train()
    assert not (run.folder.run / "finished.json").exists()


def test_a_policy_that_stops_writing_cannot_use_up_its_budget(build):
    run, trainer = build([low_tokens()], training={"steps": None, "words": 1000})
    silent = [Sample("A", "", [1], [2], True, reward=0.0)]
    with pytest.raises(UserError, match="less than a word in ten completions"):
        for _ in range(30):
            run.end_step(trainer.policy.model, silent, {})
    assert run.step == 20


def test_the_budget_of_words_and_its_milestones_count_what_is_generated(build):
    run, trainer = build([low_tokens()], training={"steps": None, "words": 150, "lr": 1e-4}, checkpoints={
        "every_words": 50, "milestones": False, "save_steps": 100}, logging={"logging_steps": 1, "eval_prompts": 0})
    trainer.train()
    steps, milestones = rows(run, "train"), rows(run, "milestone")
    assert steps[-1]["words"] >= 150 > steps[-2]["words"]
    assert [row["name"] for row in milestones] == [f"chck_{n}" for n in range(50, steps[-1]["words"] + 1, 50)]
    finished = json.loads((run.folder.run / "finished.json").read_text())
    assert finished["generated_words"] == finished["ledger"]["generated_words"] == steps[-1]["words"]
    for folder in (run.folder.root, run.folder.root / "chck_100"):
        assert models.load_tokenizer(folder)("a").input_ids[0] == run.tokenizer.bos_token_id
        models.load_causal_lm(str(folder))
    held, saved = weights(trainer), models.load_causal_lm(str(run.folder.root))
    assert all(torch.equal(held[f"model.{name}"], p) for name, p in saved.named_parameters())


def test_validations_have_the_same_prompts_and_the_same_noise_and_teach_nothing(build):
    run, trainer = build([low_tokens()])
    before = weights(trainer)
    first = run.validate(trainer.policy.model)
    run.progress.step = 7
    second = run.validate(trainer.policy.model)
    assert first["rewards"] == second["rewards"] and first["kl"] == second["kl"] == 0 and run.progress.words == 0
    assert all(torch.equal(before[name], p) for name, p in weights(trainer).items())
    prompts = run.prompts.batch(0, 8)
    trained = rollout.sample(trainer.policy.model, run.tokenizer, prompts, rl_run.seeds_of(3, 0, range(8)), max_new_tokens=6)
    assert [s.completion_ids for s in trained] != [s.completion_ids for s in rollout.sample(
        trainer.policy.model, run.tokenizer, run.prompts.batch(0, 8), rl_run.seeds_of(3, 0, range(8), "validation"), max_new_tokens=6)]


class Interrupting(Toy):
    """Sends this process a real signal while it scores its n-th batch."""

    def __init__(self, after):
        super().__init__(low_tokens().value)
        self.left = after

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().__call__(*args, **kwargs)


def test_a_resumed_run_ends_like_one_that_was_never_stopped(build, tmp_path):
    setting = {"training": {"steps": 5, "lr": 5e-3}, "logging": {"eval_prompts": 16, "eval_steps": 2, "logging_steps": 2, "samples": 2},
               "ppo": {"minibatches": 2, "kl": {"coefficient": 0.1, "control": "adaptive", "horizon": 50}}}
    whole, trainer = build([low_tokens()], folder=tmp_path / "whole", **setting)
    trainer.train()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    _, first = build([Interrupting(after=5)], folder=tmp_path / "cut", **setting)  # validations before step 1 and after step 2
    with pytest.raises(Preempted, match="SIGUSR1 at step 3"):
        first.train()
    with open(tmp_path / "cut/ppo/run/samples.jsonl", "a") as stream:  # what a run writes between its checkpoint and a SIGKILL
        stream.write(json.dumps({"kind": "train", "step": 4}) + "\n" + '{"kind": "tr')
    run, second = build([low_tokens()], folder=tmp_path / "cut", **setting)
    assert run.step == 3
    second.train()
    for number, handler in before.items():
        signal.signal(number, handler)
    ours, theirs = weights(second), weights(trainer)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def logged(which, file):
        timeless = {"seconds", "tokens_per_s"}
        lines = (which.folder.run / file).read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if name not in timeless} for line in lines]

    assert logged(run, "metrics.jsonl") == logged(whole, "metrics.jsonl") and logged(run, "samples.jsonl") == logged(whole, "samples.jsonl")
    assert not list(run.folder.root.glob("checkpoint-*"))


class Waiting(Toy):
    """Finds that the run is to stop while it waits for the scores of the n-th batch."""

    def __init__(self, after):
        super().__init__(low_tokens().value)
        self.left, self.judge = after, SimpleNamespace(should_stop=None)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.judge.should_stop():
            raise Interrupted
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize(("after", "newest"), [(1, None), (2, None), (3, 1), (4, 2), (5, 2)])
def test_a_run_that_stops_while_it_waits_for_scores_keeps_the_steps_it_has_done(build, after, newest):
    """The batches: a validation, two steps, the validation that belongs to the second of them, a third step."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    setting = {"training": {"steps": 3, "batch_size": 8}, "ppo": {"minibatches": 1, "value_lr": 1e-2},
               "logging": {"eval_prompts": 4, "eval_steps": 2, "logging_steps": 1}, "checkpoints": {"save_steps": 100}}
    run, trainer = build([Waiting(after)], **setting)
    continues = f"continues from {run.folder.root}/checkpoint-{newest}" if newest else "starts again"
    with pytest.raises(Preempted, match=f"SIGTERM while a judge was waited for; the same command {continues}"):
        trainer.train()
    assert [folder.name for folder in run.folder.checkpoints()] == ([f"checkpoint-{newest}"] if newest else [])
    run, trainer = build([low_tokens()], **setting)
    assert run.step == (newest or 0)
    trainer.train()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert [(row["kind"], row["step"]) for row in map(json.loads, run.folder.metrics.read_text().splitlines())] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("eval", 3)]


# ---- The script -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moep(tokenizer, tmp_path_factory):
    """Folder of an untrained MoE-P model."""
    folder = tmp_path_factory.mktemp("moep") / "moep"
    folder.mkdir()
    section = MoEPModelSection(layers=3, width=16, heads=2, parallel_width=8, parallel_heads=2, max_positions=64)
    models.save_model(models.build_model(section, tokenizer, seed=1), tokenizer, folder)
    return folder


@pytest.fixture
def config(corpus, policies, teachers, tmp_path, write_yaml):
    """A complete YAML of stage 6 whose reward is a teacher's margin."""
    return write_yaml(tmp_path / "ppo.yaml", {
        "name": "rl", "output": str(tmp_path), "seed": 1, "algorithm": "ppo",
        "data": {"corpus": str(corpus), "seq_len": 32, "eval_blocks": 6}, "model": {"path": str(policies("llama"))},
        "prompts": {"count": 20, "max_tokens": 4}, "generation": {"max_new_tokens": 8},
        "rewards": [{"kind": "margin", "teacher": str(teachers("llama")[0])},
                    {"kind": "length", "min_words": 1, "max_words": 4, "weight": 0.1}],
        "training": {"steps": 2, "batch_size": 8, "lr": 1e-3, "device": "cpu", "threads": 1},
        "ppo": {"minibatches": 2, "kl": {"coefficient": 0.1}}, "checkpoints": {"every_words": 20, "save_steps": 1},
        "logging": {"logging_steps": 1, "eval_steps": 1, "eval_prompts": 6}})


def test_the_script_trains_a_moep_student_and_says_what_it_did(config, moep, in_process, tmp_path, capsys):
    in_process("ppo", "--config", config, f"model.path={moep}")
    said = capsys.readouterr().out
    assert "rewards    1 x margin + 0.1 x length" in said and re.search(r"reward/margin -?\d", said) and "finished" in said
    root = tmp_path / "rl"
    model = models.load_causal_lm(str(root))
    assert model.config.model_type == "moep" and (root / "modeling_moep.py").is_file() and list(root.glob("chck_*"))
    card = (root / "README.md").read_text()
    assert "ppo.py" in card and "generated" in card
    held = json.loads((root / "run" / "finished.json").read_text())
    assert held["before"]["kl"] == 0 and held["before"]["ce"] != held["ce"] and held["ledger"]["corpus_words"] == 0
    samples = [json.loads(line) for line in (root / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in samples} == {"train", "validation"} and set(samples[0]["parts"]) == {"margin", "length"}
    in_process("ppo", "--config", config, f"model.path={moep}")
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="rewards.1.max_words: 4 there, 5 now"):
        in_process("ppo", "--config", config, f"model.path={moep}", "rewards.1.max_words=5")


def test_two_processes_train_what_one_trains(config, in_process, on_two_processes, tmp_path):
    in_process("ppo", "--config", config)
    on_two_processes("ppo", "--config", config, f"output={tmp_path / 'two'}")
    one, two = (models.load_causal_lm(str(folder / "rl")).state_dict() for folder in (tmp_path, tmp_path / "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-3  # two steps of Adam at 1e-3: signs of tiny gradients
    rows = [[json.loads(line) for line in (folder / "rl/run/metrics.jsonl").read_text().splitlines()]
            for folder in (tmp_path, tmp_path / "two")]
    assert [(row["kind"], row["words"]) for row in rows[0]] == [(row["kind"], row["words"]) for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        for name in {"ce", "reward", "grad_norm", "value_loss"} & ours.keys():  # Adam does not see the gradient's scale: its norm does
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=1e-3), name


@pytest.mark.parametrize(("override", "message"), [
    ("training.batch_size=9", "training.batch_size 9 is not a multiple of ppo.minibatches 2"),
    ("checkpoints.final=best", "checkpoints.final: best goes by validation CE"),
    ("algorithm=grpo", "section ppo is given, but algorithm is grpo"),
    ("training.epochs=2", "training.epochs: unknown key"),
    ("training.words=5", "give exactly one of steps, words"),
    ("generation.max_new_tokens=70", "has 64 positions, but prompts and completions have up to 75"),
    ("model.path=models/none", "models/none does not exist"),
    ("rewards.0.teacher=models/none", "models/none does not exist"),
    ("rewards=[{kind: random}] generation.max_new_tokens=70", "has 64 positions, but prompts and completions have up to 75"),
    ("ppo.kl.coefficient=0 ppo.kl.control=adaptive", "coefficient is 0: start it above 0"),
    ("ppo.kl.wher=loss", "ppo.kl.wher: unknown key; did you mean where?"),
])
def test_mistakes_are_named_before_anything_is_computed(config, in_process, override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        in_process("ppo", "--config", config, *re.findall(r"\S+=(?:\[.*?\]|\S+)", override))
