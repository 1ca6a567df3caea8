"""MoE-P as a model of transformers: caches, generation, files that load anywhere, Trainer, compile, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_moep import IDS, PATHS, TINY, WINDOWS, assert_same, built, gradients, padded_batch, routers_of, starve
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache, Trainer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_moep import ExpertLinear, ExpertNorm, MoEPConfig, MoEPForCausalLM, MoEPModel, Router

PROMPT = IDS[:, :6]


# ---- Caches ---------------------------------------------------------------------------------------------------------

CACHES = {"own": lambda config: None, "plain": lambda config: DynamicCache(), "sized": lambda config: DynamicCache(config=config)}


@PATHS
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cuts", [range(1, 13), [5, 12], [1, 4, 5, 10, 12], [11, 12]], ids=lambda cuts: "-".join(map(str, cuts)))
@torch.no_grad()
def test_logits_with_a_cache_equal_the_full_forward(path, window, cache, cuts):
    """Token by token, in chunks after a past, and both; a cache that knows the config drops keys outside the window."""
    model = built(path, sliding_window=window)
    expected, past, start, made = model(input_ids=IDS).logits, CACHES[cache](model.config), 0, []
    for cut in cuts:
        output = model(input_ids=IDS[:, start:cut], past_key_values=past)
        past, start = output.past_key_values, cut
        made.append(output.logits)
    assert_same(torch.cat(made, 1), expected)
    assert past.get_seq_length() == 12


@WINDOWS
@torch.no_grad()
def test_a_cache_that_knows_the_config_drops_keys_of_sliding_layers_alone(window):
    model = built(sliding_window=window)
    past = model(input_ids=IDS, past_key_values=DynamicCache(config=model.config)).past_key_values
    assert [layer.keys.shape[2] for layer in past.layers] == [12, 12, 12 if window is None else window - 1, 12]
    assert [layer.keys.shape[1] for layer in past.layers] == [4, 8, 8, 4]


@WINDOWS
@pytest.mark.parametrize("cache", CACHES)
@torch.no_grad()
def test_a_left_padded_batch_continues_from_its_cache(window, cache):
    model = built(sliding_window=window)
    ids, mask = padded_batch("left", 0)
    expected, past, start = model(input_ids=ids, attention_mask=mask).logits, CACHES[cache](model.config), 0
    for cut in (6, 11, 12, 13, 14):
        output = model(input_ids=ids[:, start:cut], attention_mask=mask[:, :cut], past_key_values=past)
        assert_same(output.logits[mask[:, start:cut].bool()], expected[:, start:cut][mask[:, start:cut].bool()])
        past, start = output.past_key_values, cut


@torch.no_grad()
def test_a_cache_is_made_only_when_asked_for():
    model = built()
    assert model(input_ids=IDS).past_key_values is not None
    assert model(input_ids=IDS, use_cache=False).past_key_values is None
    assert built(use_cache=False)(input_ids=IDS).past_key_values is None


@torch.no_grad()
def test_a_static_cache_is_an_error_and_not_a_wrong_result():
    model = built(pad_token_id=0)
    with pytest.raises(ValueError, match="static cache"):
        model(input_ids=PROMPT, past_key_values=StaticCache(config=model.config, max_cache_len=20))
    with pytest.raises(ValueError, match="static cache"):
        model.generate(PROMPT, max_new_tokens=2, cache_implementation="static")


# ---- Generation -----------------------------------------------------------------------------------------------------


def greedy(model, ids, **keys):
    return model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, **keys)


@PATHS
@WINDOWS
def test_greedy_generation_picks_the_best_of_the_full_forward_with_and_without_cache(path, window):
    model = built(path, sliding_window=window)
    ones, ids = torch.ones_like(PROMPT), PROMPT
    for _ in range(10):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    for keys in ({}, {"use_cache": False}):
        assert torch.equal(greedy(model, PROMPT, attention_mask=ones, **keys), ids)
    assert len(ids[:, 6:].unique()) > 2


@WINDOWS
def test_beam_search_and_sampling_run_and_do_not_depend_on_the_cache(window):
    model = built(sliding_window=window)
    for keys in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        made = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            made.append(model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, pad_token_id=0,
                                       use_cache=use_cache, **keys))
        assert made[0].shape == (3, 14) and torch.equal(*made)


@WINDOWS
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_prompts_generate_what_each_generates_alone(window, use_cache):
    model = built(sliding_window=window)
    ids, mask = padded_batch("left", 0)
    together = greedy(model, ids, attention_mask=mask, use_cache=use_cache)
    for row, length in enumerate((5, 12, 8)):
        prompt = IDS[row:row + 1, :length]
        assert together[row, 14:].tolist() == greedy(model, prompt, attention_mask=torch.ones_like(prompt))[0, length:].tolist()


def test_generation_beyond_the_positions_is_an_error_that_names_the_limit():
    model = built()
    assert model.generate(PROMPT, min_new_tokens=19, max_new_tokens=19, pad_token_id=0).shape == (3, 25)
    with pytest.raises(ValueError, match=r"25 tokens \(24 of them cached\) exceed the model's 24 positions \(max_position_embeddings\)"):
        model.generate(PROMPT, min_new_tokens=20, max_new_tokens=20, pad_token_id=0)


# ---- Files ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_checkpoint_has_everything_and_survives_saving_and_loading_twice(tmp_path):
    model = built(sliding_window=3, hidden_act="swiglu", pad_token_id=5, router_aux_loss_coef=0.25)
    expected = model(input_ids=IDS).logits
    for generation, folder in enumerate((tmp_path / "one", tmp_path / "two", tmp_path / "three")):
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["tie_word_embeddings"] is True and config["model_type"] == "moep"
        assert config["auto_map"] == {"AutoConfig": "modeling_moep.MoEPConfig", "AutoModel": "modeling_moep.MoEPModel",
                                      "AutoModelForCausalLM": "modeling_moep.MoEPForCausalLM"}
        assert (folder / "modeling_moep.py").read_bytes() == Path(sys.modules["modeling_moep"].__file__).read_bytes()
        if generation == 1:
            model = get_class_from_dynamic_module("modeling_moep.MoEPForCausalLM", folder).from_pretrained(folder)
            assert type(model) is not MoEPForCausalLM
        else:
            model = MoEPForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        assert model.lm_head.weight is model.model.wte.weight
        assert not model.training and torch.equal(model(input_ids=IDS).logits, expected)
        given = {"sliding_window": 3, "hidden_act": "swiglu", "pad_token_id": 5, "router_aux_loss_coef": 0.25, **TINY}
        assert {key: getattr(model.config, key) for key in given} == given


@torch.no_grad()
def test_an_untied_model_keeps_two_matrices(tmp_path):
    model = built(tie_word_embeddings=False)
    assert (model.lm_head.weight - model.model.wte.weight).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = MoEPForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight) and torch.equal(again.model.wte.weight, model.model.wte.weight)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert again.num_parameters() - built().num_parameters() == 64 * 32


@torch.no_grad()
def test_the_body_loads_from_the_whole_and_the_whole_from_the_body(tmp_path):
    model = built()
    model.save_pretrained(tmp_path / "whole")
    body = MoEPModel.from_pretrained(tmp_path / "whole")
    output, inner = model(input_ids=IDS, output_hidden_states=True), body(input_ids=IDS)
    assert torch.equal(inner.last_hidden_state, output.hidden_states[-1])
    body.save_pretrained(tmp_path / "body")
    again = MoEPForCausalLM.from_pretrained(tmp_path / "body")
    assert torch.equal(again(input_ids=IDS).logits, output.logits)


def test_values_given_on_loading_take_effect_or_are_refused(tmp_path):
    built().save_pretrained(tmp_path)
    model = MoEPForCausalLM.from_pretrained(tmp_path, sliding_window=3, expert_path="dense")
    assert_same(model(input_ids=IDS).logits, built(sliding_window=3)(input_ids=IDS).logits)
    assert model.model.shrink.router.path("cpu") == "dense"
    with pytest.raises(ValueError, match="expert_path must be one of auto, loop, dense, grouped, not 'fast'"):
        MoEPForCausalLM.from_pretrained(tmp_path, expert_path="fast")


def test_loading_a_checkpoint_that_lacks_a_weight_keeps_all_others(tmp_path):
    built().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.grow.router.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = MoEPForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert 0 < again["model.grow.router.weight"].std() < 0.04


def test_a_model_saved_where_the_code_lies_keeps_it(tmp_path):
    built().save_pretrained(tmp_path)
    code = (tmp_path / "modeling_moep.py").read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_moep.py").read_bytes() == code
    built().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "modeling_moep.py").exists()


ELSEWHERE = """
import importlib.util, json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

assert not any(map(importlib.util.find_spec, ("modeling_moep", "babylm", "moep_reference")))
remote = {"trust_remote_code": True}
given, folders = torch.load(sys.argv[1]), sys.argv[2:]
made = []
for folder in folders:
    config = AutoConfig.from_pretrained(folder, **remote)
    assert (config.model_type, config.num_experts, config.sliding_window) == ("moep", 4, 3)
    model = AutoModelForCausalLM.from_pretrained(folder, **remote)
    assert model.lm_head.weight is model.model.wte.weight and not model.training
    again = folder + "-again"
    model.save_pretrained(again)
    model.config.save_pretrained(again)
    config = json.load(open(again + "/config.json"))
    assert len(config["auto_map"]) == 3 and config.get("tie_word_embeddings", True), config
    with torch.no_grad():
        logits = model(**given).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(again, **remote)(**given).logits, logits)
        hidden = AutoModel.from_pretrained(folder, **remote)(**given).last_hidden_state
        assert torch.allclose(hidden @ model.lm_head.weight.T, logits, atol=1e-5)
    tokens = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False))
    losses = []
    for _ in range(2):
        model.train().zero_grad()
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        losses.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        model.gradient_checkpointing_enable()
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*losses))
    made.append((logits, tokens, losses[0][0]))
torch.save(made, sys.argv[1] + ".made")
"""


@pytest.mark.parametrize("interpreter", [
    sys.executable,
    pytest.param(os.environ.get("MOEP_TRANSFORMERS_451"), marks=pytest.mark.skipif(
        not os.environ.get("MOEP_TRANSFORMERS_451"), reason="MOEP_TRANSFORMERS_451 names no Python with transformers 4.51")),
], ids=["here", "transformers-4.51"])
def test_checkpoints_load_anywhere_without_this_repository_and_compute_the_same(interpreter, tmp_path):
    """Loads by all three Auto classes, generates, is saved again and trains with checkpointing, in a process that has torch and
    transformers only; two checkpoints, in folders whose names are no names for a module."""
    ids, mask = padded_batch("left", 0)
    given, expected, folders = {"input_ids": ids, "attention_mask": mask}, [], []
    for seed, name in enumerate(("first.run 1", "second-run/checkpoint-2")):
        model = built(seed=seed, sliding_window=3)
        folders.append(str(tmp_path / name))
        model.save_pretrained(folders[-1])
        with torch.no_grad():
            logits = model(**given).logits
        tokens = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected.append((logits, tokens, model.train()(**given, labels=ids).loss.detach()))
    (tmp_path / "empty").mkdir()
    torch.save(given, tmp_path / "given.pt")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))}
    done = subprocess.run([interpreter, "-I", "-c", ELSEWHERE, str(tmp_path / "given.pt"), *folders], cwd=tmp_path / "empty",
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=180,
                          env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for found, wanted in zip(torch.load(tmp_path / "given.pt.made"), expected, strict=True):
        assert_same(found[0], wanted[0], 1e-6)
        assert torch.equal(found[1], wanted[1])
        assert_same(found[2], wanted[2], 1e-6)


def test_this_process_loads_two_checkpoints_by_all_auto_classes(tmp_path):
    for seed in range(2):
        model = built(seed=seed)
        model.save_pretrained(tmp_path / f"run{seed}")
        folder, expected = tmp_path / f"run{seed}", model(input_ids=IDS, output_hidden_states=True)
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).to_dict().keys() >= set(TINY)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)(input_ids=IDS).logits, expected.logits)
        body = AutoModel.from_pretrained(folder, trust_remote_code=True)(input_ids=IDS)
        assert torch.equal(body.last_hidden_state, expected.hidden_states[-1])


# ---- What transformers expects of a model ---------------------------------------------------------------------------


@PATHS
@torch.no_grad()
def test_hidden_states_have_the_sizes_that_the_config_names(path):
    model = built(path)
    body = model.model(input_ids=IDS, output_hidden_states=True)
    assert [state.shape for state in body.hidden_states] == [(3, 12, width) for width in model.config.hidden_state_sizes]
    assert model.config.hidden_state_sizes == [32, 32, 16, 16, 32]
    assert torch.equal(body.hidden_states[-1], body.last_hidden_state)
    assert torch.equal(body.hidden_states[0], model.model.wte(IDS) + model.model.wpe.weight[:12])
    assert_same(body.hidden_states[1], model.model.first(body.hidden_states[0], causal))
    assert model(input_ids=IDS).hidden_states is None


@PATHS
def test_texts_that_share_a_beginning_can_lie_in_one_row_of_any_length(path):
    """A tree: three tokens, then two continuations of two; with a second copy of all, longer than the model has positions."""
    model = built(path, max_position_embeddings=6).eval()
    stem, ends = IDS[0, :3], (IDS[1, :2], IDS[2, :2])
    row = torch.cat([stem, *ends] * 2)[None]
    positions = torch.tensor([0, 1, 2, 3, 4, 3, 4] * 2)[None]
    tree = torch.ones(7, 7).tril().bool()
    tree[5:, 3:5] = False
    seen = torch.block_diag(tree, tree).bool()[None, None]
    packed = model(input_ids=row, attention_mask=seen, position_ids=positions, use_cache=False).logits[0]
    for copy in (packed[:7], packed[7:]):
        for end, found in zip(ends, (copy[[0, 1, 2, 3, 4]], copy[[0, 1, 2, 5, 6]]), strict=True):
            assert_same(found, model(input_ids=torch.cat([stem, end])[None]).logits[0])
    for wrong in ({"position_ids": None}, {"attention_mask": seen.long()}):
        with pytest.raises(ValueError, match="a mask per token must be boolean, needs position_ids"):
            model(**{"input_ids": row, "attention_mask": seen, "position_ids": positions} | wrong)
    with pytest.raises(ValueError, match="goes with no sliding_window"):
        built(path, sliding_window=3)(input_ids=row, attention_mask=seen, position_ids=positions)


def causal(q, k, v, heads, layer):
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@PATHS
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(path, reentrant):
    model = built(path, sliding_window=3, dropout=0.2, attention_dropout=0.2).train()
    mask = padded_batch("left", 0)[1][:, 2:]
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        output = model(input_ids=IDS, attention_mask=mask, labels=IDS)
        results.append((output.loss, {name: gradient.clone() for name, gradient in gradients(model, output.loss).items()}))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert output.past_key_values is None
    (loss, wanted), (again, found) = results
    assert torch.equal(loss, again)
    for name, gradient in wanted.items():
        assert_same(found[name], gradient, 1e-6, name)


@torch.no_grad()
def test_gradient_checkpointing_recomputes_the_layers(monkeypatch):
    model, calls = built().train(), []
    monkeypatch.setattr(Router, "path", lambda self, device, path=Router.path: calls.append(1) or path(self, device))
    model.gradient_checkpointing_enable()
    with torch.enable_grad():
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(calls) == 2 * 4


@torch.no_grad()
def test_resizing_the_embeddings_keeps_them_tied_and_the_logits_of_old_tokens():
    model = built()
    expected = model(input_ids=IDS).logits
    model.resize_token_embeddings(80)
    assert model.lm_head.weight is model.model.wte.weight and model.config.vocab_size == 80
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits.shape == (3, 12, 80) and torch.equal(output.logits[..., :64], expected) and output.loss.isfinite()


@PATHS
def test_labels_of_minus_100_are_not_scored(path):
    model, labels = built(path), IDS.clone()
    labels[:, :5], labels[1] = -100, -100
    output = model(input_ids=IDS, labels=labels)
    kept = labels[:, 1:] != -100
    chosen = output.logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None])[..., 0]
    assert_same(output.loss, -chosen[kept].mean(), 1e-6)


@torch.no_grad()
def test_embeddings_tuples_and_the_last_logits_alone_can_be_asked_for():
    model = built()
    expected = model(input_ids=IDS)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, expected.logits)
    loss, logits, past = model(input_ids=IDS, labels=IDS, return_dict=False)
    assert torch.equal(logits, expected.logits) and loss.dim() == 0 and past.get_seq_length() == 12
    assert torch.equal(model.model(input_ids=IDS, return_dict=False, use_cache=False)[0], model.model(input_ids=IDS).last_hidden_state)
    for keep, places in ((1, [11]), (3, [9, 10, 11]), (torch.tensor([2, 5]), [2, 5])):
        assert_same(model(input_ids=IDS, logits_to_keep=keep).logits, expected.logits[:, places], 1e-6)


@torch.no_grad()
def test_a_model_made_on_the_meta_device_computes_what_its_loaded_weights_say():
    model = built()
    with torch.device("meta"):
        empty = MoEPForCausalLM(MoEPConfig(**TINY))
    assert not list(empty.buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    empty.tie_weights()
    assert torch.equal(empty.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("path, dtype", [*((path, torch.bfloat16) for path in ("loop", "dense", "grouped")), ("loop", torch.float64),
                                         ("dense", torch.float64), ("auto", torch.float64)])
def test_models_of_other_types_train(path, dtype):
    """grouped_mm knows no float64. In bf16 rounded inputs may pick another expert, so that few tokens differ much."""
    expected = built(path).train()(input_ids=IDS, labels=IDS)
    model = built(path).to(dtype).train()
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits.dtype == dtype
    difference = (output.logits.float() - expected.logits).norm() / expected.logits.norm()
    assert difference < (0.25 if dtype == torch.bfloat16 else 1e-5)
    assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients(model, output.loss).values())
    assert model.lm_head.weight is model.model.wte.weight


@pytest.mark.parametrize("path, window, padded", [("dense", None, False), ("auto", 3, True)])
def test_without_graph_breaks_the_compiled_dense_path_equals_eager_and_auto_is_dense_there(path, window, padded):
    """aot_eager: traces forward and backward as inductor would, without a C++ compiler."""
    torch._dynamo.reset()
    model = built(path, sliding_window=window).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    keys = {"attention_mask": padded_batch("left", 0)[1][:, 2:]} if padded else {}
    expected = model(input_ids=IDS, labels=IDS, use_cache=False, **keys)
    wanted = {name: gradient.clone() for name, gradient in gradients(model, expected.loss).items()}
    output = compiled(input_ids=IDS, labels=IDS, use_cache=False, **keys)
    assert_same(output.logits, expected.logits)
    for name, gradient in gradients(model, output.loss).items():
        assert_same(gradient, wanted[name], message=name)


@pytest.mark.parametrize("keys, in_fp32, in_bf16", [({}, "grouped", "dense"), ({"parallel_hidden_size": 128}, "grouped", "grouped"), (
    {"parallel_hidden_size": 132, "parallel_attention_heads": 3}, "loop", "loop"), ({"parallel_intermediate_size": 36}, "loop", "dense")])
def test_auto_is_grouped_on_a_cpu_where_it_can_be_but_dense_for_small_products_in_bf16_and_dense_elsewhere(keys, in_fp32, in_bf16):
    tokens = torch.zeros(2, 32)
    model = built(**keys)
    router = model.model.shrink.router
    assert (router.path(tokens), router.path(tokens.to("meta")), router.path(tokens.double())) == (in_fp32, "dense", "loop")
    with torch.autocast("cpu", torch.bfloat16):
        assert router.path(tokens) == in_bf16
    model(input_ids=IDS, labels=IDS).loss.backward()  # as it says, the path can
    assert router.to(torch.bfloat16).path(tokens.bfloat16()) == in_bf16
    assert built("grouped").model.shrink.router.path(tokens) == "grouped"


def test_where_torch_has_no_grouped_product_auto_is_loop(monkeypatch):
    monkeypatch.delattr(F, "grouped_mm")
    assert built().model.shrink.router.path(torch.zeros(2, 32)) == "loop"


def test_a_seed_makes_the_weights():
    def made(seed):
        torch.manual_seed(seed)
        return MoEPForCausalLM(MoEPConfig(**TINY)).state_dict()

    one, other, third = made(1), made(1), made(2)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not torch.equal(one["model.wte.weight"], third["model.wte.weight"])


def test_weights_start_as_gpt2s_do():
    """Deviation 0.02; into the residual stream 0.02 / sqrt(2 x layers); shrink and grow keep the scale; biases 0, norms 1."""
    torch.manual_seed(0)
    model = MoEPForCausalLM(MoEPConfig(**{**TINY, "hidden_size": 64, "parallel_hidden_size": 64}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.numel() > 1000:
            expected = 0.02 / 8 ** 0.5 if name.endswith(("out_proj.weight", "down_proj.weight")) else 0.02
            expected = (model.config.num_experts_per_tok / 64) ** 0.5 if ".experts." in name else expected
            assert 0.93 * expected < parameter.std() < 1.07 * expected, name


def test_trainer_decays_every_matrix_and_no_bias_and_no_norm():
    model = built(hidden_act="swiglu")
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    matrices, others = ({f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}
                        for kinds in (nn.Linear | nn.Embedding | ExpertLinear | Router, nn.LayerNorm | ExpertNorm))
    assert decayed - {"lm_head.weight"} == matrices - {"lm_head.weight"}
    assert not decayed & others and not any("bias" in name for name in decayed)
    every = {name for name, _ in model.named_parameters()}
    assert every == (matrices - {"lm_head.weight"}) | others | {name for name in every if name.endswith("bias")}


# ---- Several processes ----------------------------------------------------------------------------------------------


def skewed():
    """Two of the four experts get no token at all."""
    return starve(built("loop", router_aux_loss_coef=0.1), 1, 2).train()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = DistributedDataParallel(skewed(), find_unused_parameters=False)
    ids = IDS[:2][rank:rank + 1]
    for _ in range(2):
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    torch.save({name: parameter.grad for name, parameter in model.module.named_parameters()}, f"{folder}/gradients{rank}.pt")


def test_two_processes_have_the_gradients_of_one_on_the_whole_batch_also_where_experts_get_no_token(tmp_path, warm_python):
    """DDP would wait for ever, or complain at the second step, if an expert without tokens got no gradient."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_moep_transformers as here; here.work(int(sys.argv[2]), sys.argv[3])"
    children = [subprocess.Popen([warm_python, "-c", program, Path(__file__).parent, str(rank), tmp_path]) for rank in range(2)]
    try:
        assert [child.wait(120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    model = skewed()
    output = model(input_ids=IDS[:2], labels=IDS[:2], output_router_logits=True)
    assert {expert for logits in output.router_logits for expert in logits.topk(2).indices.flatten().tolist()} == {0, 3}
    one, other = (torch.load(tmp_path / f"gradients{rank}.pt") for rank in range(2))
    for name, gradient in gradients(model, output.loss).items():
        assert torch.equal(one[name], other[name])
        assert_same(one[name], gradient, message=name)
    assert all(router.weight.grad.any() for router in routers_of(model))
