"""GRPO, RLOO and DPO learn a toy reward, stay near the reference when told to, and leave out what could not be scored."""

import importlib
import json
import math
import signal
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from babylm import models, run_folder
from babylm.config import ModelSection, MoEPModelSection, RLConfig
from babylm.run_folder import Preempted
from babylm.schema import UserError, check
from interactive import rl_run, rollout, trltrainer
from interactive.judge import Interrupted
from interactive.rollout import Sample

TOKEN = 266  # what the toy reward likes: a token that begins a word
SIZES = {"grpo": {"grpo": {"group": 4, "beta": 0.0}}, "rloo": {"rloo": {"group": 4, "beta": 0.0}},
         "dpo": {"dpo": {"prompts_per_round": 64, "beta": 0.1}}}


class Toy:
    """A reward made of a function of (prompt, completion ids)."""

    weight = 1.0

    def __init__(self, function, name="toy"):
        self.function, self.__name__, self.counts = function, name, Counter()

    def __call__(self, prompts, completions, completion_ids, **_):
        return [self.function(prompt, ids) for prompt, ids in zip(prompts, completion_ids, strict=True)]


@pytest.fixture(scope="module")
def students(tokenizer, tmp_path_factory):
    """students("gpt2") -> folder of a tiny checkpoint with dropout."""
    folder = tmp_path_factory.mktemp("students")

    def path(architecture):
        if not (folder / architecture).exists():
            (folder / architecture).mkdir()
            section = (MoEPModelSection(layers=3, width=16, heads=2, parallel_width=8, parallel_heads=2, max_positions=64)
                       if architecture == "moep" else
                       ModelSection(architecture=architecture, layers=1, width=16, heads=2, max_positions=64, dropout=0.3))
            model = models.build_model(section, tokenizer, seed=1)
            if architecture == "gpt2":  # a bandit with arms worth trying: the end and one token are likely enough to be met
                with torch.no_grad():
                    model.transformer.ln_f.bias[0] = 1
                    model.transformer.wte.weight[tokenizer.eos_token_id, 0], model.transformer.wte.weight[TOKEN, 0] = 4, 4
            models.save_model(model, tokenizer, folder / architecture)
        return folder / architecture

    return path


@pytest.fixture
def opened(tmp_path, corpus, students, monkeypatch):
    """opened("grpo", reward, training={...}, ...) -> (config, run, policy): a run of stage 6 with a toy reward, ready to train."""
    monkeypatch.setattr(run_folder, "_opened", [])
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # accelerate calls it in every train(): half a second with all that pytest holds

    def build(algorithm, function, name="run", student="gpt2", **changes):
        values = {"name": name, "output": str(tmp_path), "seed": 1, "algorithm": algorithm, "model": {"path": str(students(student))},
                  "data": {"corpus": str(corpus), "seq_len": 32, "eval_blocks": 2}, "prompts": {"count": 8, "max_tokens": 3},
                  "generation": {"max_new_tokens": 6}, "rewards": [{"kind": "random"}],
                  "checkpoints": {"milestones": False, "save_steps": 1000}, "logging": {"eval_prompts": 4, "logging_steps": 1}}
        values |= {key: values.get(key, {}) | change if isinstance(change, dict) else change for key, change in changes.items()}
        values[algorithm] = {**SIZES[algorithm][algorithm], **values.get(algorithm, {})}
        values["training"] = {"steps": 4, "batch_size": 32, "lr": 1e-2, "device": "cpu", **values.get("training", {})}
        config = check(RLConfig, values, "x.yaml")
        inputs = rl_run.load_inputs(config)
        folder = rl_run.open_run(config, inputs)
        policy, reference = (models.load_causal_lm(config.model.path) for _ in range(2))
        val = rl_run.load_validation(config, inputs)
        return config, rl_run.RLRun(config, folder, inputs, val, reference, [Toy(function)], torch.device("cpu")), policy

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield build
    for number, handler in handlers.items():  # a run takes them over
        signal.signal(number, handler)


def rows(run, kind):
    return [row for row in map(json.loads, run.folder.metrics.read_text().splitlines()) if row["kind"] == kind]


def gradients_of(state, trainer, steps=1):
    """Train, and return the gradients of the first `steps` optimizer steps, by name."""
    seen = []

    def note(*_):
        seen.append({name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None})

    state.optimizer.register_step_pre_hook(note)
    state.run.start(state.model)
    if state.config.algorithm == "dpo":
        trltrainer.dpo_round(trainer, state)
    else:
        trainer.train()
    return seen[:steps]


def logprobs_by_hand(model, sample, temperature):
    """Log-probabilities of a completion's tokens, from one row without padding, [R]."""
    ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
    logits = model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.completion_ids)[:, None])[:, 0]


def require_close(found, loss, model):
    """The gradients of `loss` on `model` are those that were found."""
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4 * largest, msg=name)
    assert largest > 1e-3


def perturbed(model):
    """The model with other weights: a reference that differs from the policy from the first step on."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


# ---- Learning -------------------------------------------------------------------------------------------------------


def likes_a_token(_, ids):
    return ids.count(TOKEN) / len(ids)


def likes_short(_, ids):
    return -len(ids) / 6


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "dpo"])
@pytest.mark.parametrize(("reward", "precision"), [(likes_a_token, "fp32"), (likes_short, "bf16")])
def test_a_toy_reward_is_learned(opened, algorithm, reward, precision, monkeypatch):
    base_trainer = importlib.import_module("trl.trainer.base_trainer")
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *_, **__: pytest.fail("TRL reported its use to a server"))
    steps = 3 if algorithm == "dpo" else 9
    config, run, policy = opened(algorithm, reward, training={"steps": steps, "lr": 2e-2, "precision": precision},
                                 logging={"eval_prompts": 32, "logging_steps": 100, "eval_steps": steps - 1})
    policy.config.pad_token_id = None  # as in models whose pad token is their end token
    trltrainer.train(config, run, policy)
    first, middle, last = rows(run, "eval")
    assert middle["step"] == steps - 1 and last["reward"] - first["reward"] > 0.3
    assert last["kl"] > 0.3, "nothing holds the policy back here: what is held back in the next test was free to move"
    saved = models.load_causal_lm(str(run.folder.root))
    assert saved.config.pad_token_id is None, "TRL wrote its own"
    assert saved.config.resid_pdrop == 0.3, "dropout is off in training, not in the model's config"
    assert "generated_from_trainer" not in (run.folder.root / "README.md").read_text() and not (run.folder.run / "README.md").exists()


@pytest.mark.parametrize("algorithm, student", [("grpo", "llama"), ("rloo", "gpt2"), ("dpo", "llama"), ("grpo", "moep")])
def test_in_bf16_every_pass_computes_in_it_and_the_update_scores_what_the_rollout_did(opened, algorithm, student):
    own = {"beta": 0.1, **({"prompts_per_round": 16} if algorithm == "dpo" else {})}  # one optimizer step in every step of the run
    config, run, policy = opened(algorithm, lambda _, ids: sum(ids) % 7, student=student, training={"steps": 2, "precision": "bf16"},
                                 logging={"eval_steps": 1, "eval_prompts": 4}, **{algorithm: own})
    start = models.load_causal_lm(config.model.path)
    inner = next(module for name, module in policy.base_model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D))
    passes, written, scored, score = set(), [], [], run.score

    def seen(module, inputs, output):
        if not run.done:  # what is saved in the end is compared in full precision
            passes.add((torch.is_grad_enabled(), output.dtype))

    inner.register_forward_hook(seen)

    def note(model, args, inputs, outputs):
        if inputs.get("fused_lm_head") and torch.is_grad_enabled() and run.step == 0:
            scored.extend(zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], outputs.log_probs.detach(), strict=True))

    def kept(samples):
        score(samples)
        written.append(samples)

    policy.register_forward_hook(note, with_kwargs=True)
    run.score = kept
    trltrainer.train(config, run, policy)
    assert passes == {(True, torch.bfloat16), (False, torch.bfloat16)} and policy.dtype == torch.float32
    assert [row["step"] for row in rows(run, "eval")] == [0, 1, 2] and all(math.isfinite(row["ce"]) for row in rows(run, "eval"))
    with run.autocast():  # the second batch that was scored is the first one to learn from
        found = rollout.completion_logprobs(rollout.body_and_head(start, "policy"), written[1])
    sampled = {(*s.prompt_ids, *s.completion_ids): values for s, values in zip(written[1], found, strict=True)}
    assert len(scored) > 16
    for ids, there, labels, logprobs in scored:
        torch.testing.assert_close(logprobs[labels[1:] != -100], sampled[tuple(ids[there == 1].tolist())], rtol=0, atol=0.03)
    assert rows(run, "train")[0]["kl"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("algorithm, lr", [("grpo", 3e-3), ("rloo", 3e-3), ("dpo", 1e-3)])
def test_a_large_beta_holds_the_policy_near_the_reference(opened, algorithm, lr):
    """With these learning rates and 15 steps (5 rounds), KL comes to 1.7 (grpo, rloo, beta 0) and 0.55 (dpo, beta 0.1)."""
    config, run, policy = opened(algorithm, likes_a_token, training={"steps": 5 if algorithm == "dpo" else 15, "lr": lr},
                                 logging={"eval_prompts": 32, "logging_steps": 100}, **{algorithm: {"beta": 10.0}})
    trltrainer.train(config, run, policy)
    assert 0 < rows(run, "eval")[-1]["kl"] < 0.3


# ---- Gradients by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_device", [16, 4])
@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_gradients_are_those_of_the_scored_completions_alone(opened, algorithm, per_device):
    """One test for many traps: dropout, left padding, positions, tokens after the end, accumulation, excluded completions."""

    def some(_, ids):  # excludes about a third; the groups of one prompt keep 0 to 4 completions
        return None if sum(ids) % 3 == 0 else ids.count(TOKEN) / len(ids)

    beta, temperature = 0.3, 0.7
    config, run, policy = opened(algorithm, some, generation={"temperature": temperature, "max_new_tokens": 6},
                                 training={"steps": 1, "batch_size": 16, "per_device_batch_size": per_device, "grad_clip": 0},
                                 **{algorithm: {"beta": beta}})
    perturbed(run.reference)
    start = models.load_causal_lm(config.model.path)  # in eval mode
    state = trltrainer.PolicyState(config, run, policy)
    trainer = trltrainer.group_trainer(state)
    (found,) = gradients_of(state, trainer)
    samples = trainer.everyone
    assert len({len(s.prompt_ids) for s in samples}) > 1 and len({len(s.completion_ids) for s in samples}) > 1
    groups = [samples[i : i + 4] for i in range(0, 16, 4)]
    assert all(len({s.prompt for s in group}) == 1 for group in groups) and len({group[0].prompt for group in groups}) == 4
    assert {0 < sum(s.reward is not None for s in group) < 4 for group in groups} >= {True}
    again = rollout.sample(start, run.tokenizer, [s.prompt for s in samples], rollout.seeds_of(1, 0, range(16)), max_new_tokens=6,
                           temperature=temperature)
    assert [s.completion_ids for s in again] == [s.completion_ids for s in samples], "sampled otherwise than the policy does in eval mode"

    terms, tokens, scored = [], 0, 0
    for group in groups:
        valid = [s for s in group if s.reward is not None]
        logprobs = [logprobs_by_hand(start, s, temperature) for s in valid]
        with torch.no_grad():
            reference = [logprobs_by_hand(run.reference, s, temperature) for s in valid]
        rewards = torch.tensor([s.reward for s in valid])
        scored += len(valid)
        if algorithm == "grpo":
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4) if len(valid) > 1 else torch.zeros(len(valid))
        else:
            rewards = rewards - beta * torch.tensor([float((p.detach() - r).sum()) for p, r in zip(logprobs, reference, strict=True)])
            total, others = rewards.sum(), len(valid) - 1
            advantages = rewards - (total - rewards) / others if others > 0 else torch.zeros(len(valid))
        for advantage, mine, theirs in zip(advantages, logprobs, reference, strict=True):
            tokens += len(mine)
            if algorithm == "grpo":
                kl = (theirs - mine).exp() - (theirs - mine) - 1
                ratio = (mine - mine.detach()).exp()  # 1, but not its gradient
                terms.append(((beta * kl - advantage) * ratio).sum())
            else:
                terms.append(-advantage * (mine.sum() - mine.sum().detach()).exp())
    require_close(found, torch.stack(terms).sum() / (tokens if algorithm == "grpo" else scored), start)
    assert rows(run, "train")[0]["excluded"] == 16 - scored > 0


@pytest.mark.parametrize("reference, per_device", [("start", 64), ("round", 8)])
def test_dpo_learns_from_the_sampled_tokens_of_untied_pairs(opened, reference, per_device):
    def some(prompt, ids):
        return None if sum(ids) % 5 == 0 else float(ids.count(TOKEN) > 0)

    beta, temperature = 0.2, 0.7
    config, run, policy = opened("dpo", some, generation={"temperature": temperature, "max_new_tokens": 6},
                                 dpo={"beta": beta, "reference": reference, "prompts_per_round": 32},
                                 training={"steps": 1, "batch_size": 64, "per_device_batch_size": per_device, "grad_clip": 0})
    perturbed(run.reference)
    start = models.load_causal_lm(config.model.path)
    state = trltrainer.PolicyState(config, run, policy)
    (found,) = gradients_of(state, trltrainer.dpo_trainer(state))
    samples = rollout.sample(start, run.tokenizer, [p for p in run.prompts.batch(0, 32) for _ in range(2)],
                             rollout.seeds_of(1, 0, range(64)), max_new_tokens=6, temperature=temperature)
    assert any(not s.finished for s in samples), "one that was cut at its limit: TRL would append an end token"
    losses, ties, excluded = [], 0, 0
    for one, other in zip(samples[::2], samples[1::2], strict=True):
        a, b = some("", one.completion_ids), some("", other.completion_ids)
        if a is None or b is None:
            excluded += 1
        elif a == b:
            ties += 1
        else:
            better, worse = (one, other) if a > b else (other, one)
            old = run.reference if reference == "start" else models.load_causal_lm(config.model.path)
            with torch.no_grad():
                theirs = logprobs_by_hand(old, better, temperature).sum() - logprobs_by_hand(old, worse, temperature).sum()
            mine = logprobs_by_hand(start, better, temperature).sum() - logprobs_by_hand(start, worse, temperature).sum()
            losses.append(-torch.nn.functional.logsigmoid(beta * (mine - theirs)))
    require_close(found, torch.stack(losses).sum() / 32, start)  # of a batch that the pairs do not fill
    row = rows(run, "train")[0]
    assert row["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert (row["pairs"], row["ties"], row["excluded_pairs"]) == (len(losses), ties, excluded)
    assert min(len(losses), ties, excluded) > 0


def test_pairs_are_ranked_and_what_is_left_out_is_counted():
    rewards = [1.0, 2.0, 3.0, 1.0, 0.5, 0.5, None, 1.0, 2.0, None, None, None, 0.3, 0.1 + 0.2]
    samples = [Sample("", "", [1], [2], True, reward=reward) for reward in rewards]
    pairs, counts = trltrainer.rank(samples)
    assert [(p.chosen, p.rejected) for p in pairs] == [(1, 0), (2, 3)]
    assert counts == {"pairs": 2, "ties": 2, "excluded_pairs": 3}


@pytest.mark.parametrize("student", ["gpt2", "llama", "gptj"])
def test_no_dropout_is_left_once_it_is_switched_off(students, student):
    model = models.load_causal_lm(str(students(student))).train()
    ids = torch.arange(3, 40)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    rollout.switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


# ---- Budget, resume, errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, changes", [("rloo", {}), ("dpo", {"dpo": {"prompts_per_round": 16}})])
def test_words_generated_end_the_run_and_place_milestones(opened, algorithm, changes):
    config, run, policy = opened(algorithm, lambda _, ids: sum(ids) % 7, checkpoints={"milestones": False, "extra_words": [30]},
                                 training={"steps": None, "words": 60, "lr": 1e-4}, **changes)
    trltrainer.train(config, run, policy)
    words = [row["words"] for row in rows(run, "train")]
    assert words[-1] >= 60 > words[-2] > 0 and run.folder.already_finished()["generated_words"] == words[-1]
    assert rows(run, "milestone")[0]["name"] == "chck_30"
    models.load_causal_lm(str(run.folder.root / "chck_30"))


@pytest.mark.parametrize("algorithm, changes", [
    ("grpo", {"grpo": {"epochs": 2, "beta": 0.04}, "training": {"per_device_batch_size": 8}}),
    ("rloo", {"rloo": {"beta": 0.05}}),
    ("dpo", {"dpo": {"epochs": 2, "reference": "round", "prompts_per_round": 8}, "training": {"batch_size": 8}})])
def test_a_resumed_run_ends_with_the_same_weights(opened, algorithm, changes):
    changes = {**changes, "training": {"steps": 4, "schedule": "linear", "warmup_steps": 2, **changes.get("training", {})}}
    config, whole, policy = opened(algorithm, likes_a_token, name="whole", **changes)
    trltrainer.train(config, whole, policy)

    config, run, policy = opened(algorithm, likes_a_token, name="stopped", **changes)
    scored = run.score

    def stop_in_step_2(samples):
        scored(samples)
        run.stop.signal_name = "SIGTERM" if run.step == 1 else ""

    run.score = stop_in_step_2
    with pytest.raises(Preempted, match="SIGTERM at step 2; the same command continues there"):
        trltrainer.train(config, run, policy)
    config, run, policy = opened(algorithm, likes_a_token, name="stopped", **changes)
    assert run.step == 2
    scored = run.score

    def stop_while_a_judge_is_waited_for(samples):
        if run.step == 3:
            run.stop.signal_name = "SIGUSR1"
            run.rewards[0].function = waits
        scored(samples)

    def waits(*_):
        raise Interrupted

    run.score = stop_while_a_judge_is_waited_for
    with pytest.raises(Preempted, match="SIGUSR1 while a judge was waited for; the same command continues from .*/checkpoint-3"):
        trltrainer.train(config, run, policy)
    config, run, policy = opened(algorithm, likes_a_token, name="stopped", **changes)
    assert run.step == 3
    trltrainer.train(config, run, policy)
    ends = [load_file(r.folder.root / "model.safetensors") for r in (whole, run)]
    start = models.load_causal_lm(config.model.path).state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert any(not torch.equal(ends[0][name], start[name]) for name in ends[0])
    rates = dict(zip(range(1, 5), [0.5e-2, 0.75e-2, 0.5e-2, 0.25e-2], strict=True))  # linear over the budget, after the warm-up
    found = {row["step"]: row["lr"] for row in rows(whole, "train") if "lr" in row}  # a round without pairs takes no step
    assert len(found) > 1 and found == pytest.approx({step: rates[step] for step in found})
    passing = {"seconds", "tokens_per_s"}
    assert [{k: v for k, v in row.items() if k not in passing} for row in rows(whole, "train")] == [
        {k: v for k, v in row.items() if k not in passing} for row in rows(run, "train")]


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_a_failing_reward_or_step_stops_the_run(opened, algorithm):
    def fails(*_):
        raise RuntimeError("the judge is gone")

    config, run, policy = opened(algorithm, fails, name="a", logging={"eval_prompts": 0})
    with pytest.raises(RuntimeError, match="the judge is gone"):
        trltrainer.train(config, run, policy)
    assert not run.folder.already_finished()

    config, run, policy = opened(algorithm, lambda *_: None, name="b", logging={"eval_prompts": 0})
    with pytest.raises(UserError, match="none of the (32|128) completions could be given a reward"):
        trltrainer.train(config, run, policy)

    def poisons(_, ids):  # the weights break between sampling and learning
        policy.transformer.h[0].mlp.c_fc.weight.data.fill_(torch.nan)
        return likes_a_token(_, ids)

    config, run, policy = opened(algorithm, poisons, name="c", logging={"eval_prompts": 0})
    with pytest.raises(UserError, match="NaN or infinite at step 1"):
        trltrainer.train(config, run, policy)


def test_what_is_missing_or_does_not_divide_is_said_before_anything_is_computed(opened, monkeypatch):
    config, run, policy = opened("dpo", likes_a_token, training={"batch_size": 30, "per_device_batch_size": 15})
    with pytest.raises(UserError, match="a device would get 15 completions at once"):
        trltrainer.train(config, run, policy)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="algorithm: dpo needs the package trl: pip install trl"):
        trltrainer.train(config, run, policy)


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "dpo"])
def test_two_processes_train_what_one_trains(algorithm, corpus, students, in_process, on_two_processes, tmp_path, write_yaml, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    config = write_yaml(tmp_path / "run.yaml", {
        "name": algorithm, "output": str(tmp_path / "one"), "algorithm": algorithm, "model": {"path": str(students("gpt2"))},
        "data": {"corpus": str(corpus), "seq_len": 32, "eval_blocks": 3}, "prompts": {"count": 8, "max_tokens": 3},
        "generation": {"max_new_tokens": 6}, "rewards": [{"kind": "length", "min_words": 1, "max_words": 2}],
        "checkpoints": {"milestones": False, "save_steps": 1000, "every_words": 40}, "logging": {"eval_prompts": 3, "logging_steps": 1},
        "training": {"steps": 2, "batch_size": 16, "lr": 1e-3, "device": "cpu", "warmup_steps": 0, "schedule": "constant"},
        algorithm: {"prompts_per_round": 16, "beta": 0.1} if algorithm == "dpo" else {"group": 4, "beta": 0.04}})
    in_process("ppo", "--config", config)
    on_two_processes("ppo", "--config", config, f"output={tmp_path / 'two'}", "training.per_device_batch_size=4")
    one, two = (tmp_path / name / algorithm for name in ("one", "two"))
    ours, theirs = ([json.loads(line) for line in (run / "run/metrics.jsonl").read_text().splitlines()] for run in (one, two))
    assert [[row.get(key) for key in ("kind", "step", "words", "name")] for row in ours] == [
        [row.get(key) for key in ("kind", "step", "words", "name")] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in {"ce", "reward"} & mine.keys() | ({"grad_norm"} if (mine["kind"], mine["step"]) == ("train", 1) else set()):
            assert mine[name] == pytest.approx(other[name], rel=1e-2 if mine["step"] == 2 else 1e-4), (mine["step"], name)  # Adam's signs
