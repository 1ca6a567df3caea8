"""Models and tokenizers as they are built, adapted, merged, saved and read again."""

import copy
import hashlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from babylm import losses, models
from babylm.config import LoraSection, ModelSection, TrainingSection
from babylm.run_folder import Preempted
from babylm.schema import UserError
from babylm.training import RunCallback
from custom_dataset import tokenizer_fingerprint

SHAPES = {"gpt2": {"layers": 2, "width": 64, "heads": 2, "max_positions": 64},
          "llama": {"architecture": "llama", "layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 128, "max_positions": 64}}
IDS = torch.randint(3, 500, (4, 32), generator=torch.Generator().manual_seed(0))


def built(tokenizer, seed=0, **keys):
    return models.build_model(ModelSection(**{**SHAPES["gpt2"], **keys}), tokenizer, seed).eval()


def saved(model, tokenizer, folder):
    folder.mkdir(parents=True, exist_ok=True)
    models.save_model(model, tokenizer, folder)
    return folder


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits.float()


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


# ---- Tokenizers -----------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_says_what_the_evaluation_needs(tokenizer, tmp_path):
    models.save_tokenizer(tokenizer, tmp_path, max_length=64)
    settings = config_of(tmp_path, "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in settings
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"]) == ("<s>", "</s>", "<pad>")
    assert settings["model_max_length"] == 64


def test_a_saved_tokenizer_prepends_the_start_token_and_separates_pairs(tokenizer, tmp_path):
    models.save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    plain = tokenizer("A dog slept.", add_special_tokens=False).input_ids
    other = tokenizer(" So did I.", add_special_tokens=False).input_ids
    assert again("A dog slept.").input_ids == [1, *plain] == [again.bos_token_id, *plain]
    assert again("A dog slept.", " So did I.").input_ids == [1, *plain, 2, *other]
    assert sorted(again("A dog")) == ["attention_mask", "input_ids"]
    batch = again(["A dog slept.", "I"], padding=True)
    assert batch.input_ids[1][-1] == again.pad_token_id == 0 and batch.attention_mask[1][-1] == 0


def test_a_saved_tokenizer_is_the_same_and_stays_the_same(tokenizer, tmp_path):
    """Also when it is saved again from its saved copy: no second start token, no other fingerprint."""
    first, second = tmp_path / "1", tmp_path / "2"
    for folder, source in ((first, lambda: tokenizer), (second, lambda: models.load_tokenizer(first))):
        folder.mkdir()
        models.save_tokenizer(source(), folder)
        again = models.load_tokenizer(folder)
        assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
        assert len(again) == len(tokenizer) and again.decode(again("Zoë said: “no”.").input_ids[1:]) == "Zoë said: “no”."
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()


def test_gpt2s_vocabulary_stays_as_it_is(shared, tmp_path):
    """50,257 entries, padding with the end-of-text token, which is also what it prepends."""
    tokenizer = models.load_tokenizer(shared / "data" / "gpt2_tokenizer")
    models.save_tokenizer(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == 50_257 and again.pad_token_id == again.eos_token_id == again.bos_token_id == 50_256
    assert again("Hello world").input_ids == [50_256, 15_496, 995]
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert models.model_config(ModelSection(), again).vocab_size == 50_257


def test_a_trained_tokenizer_has_no_entry_beyond_its_size(tokenizer):
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1 == 511
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]


def test_vocabularies_are_compared_by_content(tokenizer, tmp_path):
    other = models.train_tokenizer(["pack my box with five dozen liquor jugs " * 3, "how vexingly quick daft zebras jump"], 512, 1)
    other.add_tokens([f"<filler{n}>" for n in range(512 - len(other))])
    assert len(other) == len(tokenizer)
    models.save_tokenizer(other, tmp_path)
    with pytest.raises(UserError, match="the teacher .* has another vocabulary than the data: 512 entries against 512, 259"):
        models.require_same_vocabulary(str(tmp_path), tokenizer, "teacher")


@pytest.mark.parametrize("content, words", [
    ({}, "no tokenizer at"), ({"vocab.json": "{}", "merges.txt": "#version: 0.2\n"}, "tokenizer at"),
])
def test_a_missing_or_empty_tokenizer_is_an_error(tmp_path, content, words):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        models.load_tokenizer(tmp_path)


# ---- Building and saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [SHAPES["gpt2"], SHAPES["llama"], {"architecture": "gptj"}], ids=["gpt2", "llama", "gptj"])
def test_weights_are_drawn_from_the_seed_alone(tokenizer, keys):
    torch.manual_seed(99)
    first = built(tokenizer, seed=3, **keys).state_dict()
    torch.rand(7)
    second, other = built(tokenizer, seed=3, **keys).state_dict(), built(tokenizer, seed=4, **keys).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("architecture, tied, expected", [
    ("gpt2", None, True), ("llama", None, False), ("gptj", None, False), ("gpt2", False, False), ("llama", True, True),
])
def test_embeddings_are_tied_or_not_and_stay_so(tokenizer, tmp_path, architecture, tied, expected):
    """config.json says it outright (left out, versions of transformers differ), and a reloaded model computes the same."""
    model = built(tokenizer, architecture=architecture, tied=tied)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] += 1.0  # a head that differs from the embedding, unless they are one
    again = AutoModelForCausalLM.from_pretrained(saved(model, tokenizer, tmp_path))
    assert config_of(tmp_path)["tie_word_embeddings"] is expected
    assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight) is expected
    assert torch.equal(logits(again), logits(model))
    assert (tmp_path / "generation_config.json").is_file()
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_the_special_ids_of_a_model_are_those_of_its_tokenizer(tokenizer, tmp_path):
    saved(built(tokenizer), tokenizer, tmp_path)
    for name in ("config.json", "generation_config.json"):
        config = config_of(tmp_path, name)
        assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, 2)


def test_what_was_lost_in_saving_is_noticed(tokenizer, tmp_path):
    model = built(tokenizer, tied=False)
    models.require_saved_equals(model, saved(model, tokenizer, tmp_path), IDS)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"] * 1.01
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="differs from the one in memory"):
        models.require_saved_equals(model, tmp_path, IDS)


def test_pretrained_weights_need_the_tokenizer_they_were_made_with(tokenizer, tmp_path):
    other = models.train_tokenizer(["quite another text"], 300, 1)
    saved(built(other), other, tmp_path)
    with pytest.raises(UserError, match="the pretrained model .* has another vocabulary"):
        models.build_model(ModelSection(init="pretrained", path=str(tmp_path)), tokenizer, 0)


def test_a_teacher_with_a_resized_embedding_is_refused(tokenizer, tmp_path):
    model = built(tokenizer)
    model.resize_token_embeddings(520)
    with pytest.raises(UserError, match="predicts 520 entries but the tokenizer has 512"):
        models.load_teacher(str(saved(model, tokenizer, tmp_path)), tokenizer)


def test_parameters_and_flops_count_tied_matrices_once_and_the_head_once(tokenizer):
    tied, untied = built(tokenizer), built(tokenizer, tied=False)
    assert models.count_parameters(untied) - models.count_parameters(tied) == 512 * 64
    assert models.forward_flops_per_token(tied, 32) == models.forward_flops_per_token(untied, 32)
    assert models.forward_flops_per_token(built(tokenizer, max_positions=128), 32) == models.forward_flops_per_token(tied, 32)


# ---- Adapters, for real ---------------------------------------------------------------------------------------------

ADAPTED = {"data": {"seq_len": 32, "eval_blocks": 8},
           "training": {"steps": 6, "batch_size": 8, "lr": 2e-2, "warmup_steps": 0, "schedule": "constant", "device": "cpu"},
           "checkpoints": {"milestones": False, "save_steps": 1000}, "logging": {"logging_steps": 1, "eval_steps": 3}}


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, write_yaml):
    folder = tmp_path_factory.mktemp("adapters")
    data = {"corpus": str(corpus), **ADAPTED["data"]}
    write_yaml(folder / "run.yaml", {"name": "x", "output": "models", **ADAPTED, "data": data})
    return folder


@pytest.fixture(scope="module")
def stage(home, in_process):
    """stage("train_teacher", "b", "key=value", ...) runs a stage in this process, in the folder `home`; returns models/b."""

    def run(script, name, *overrides):
        if script == "train_teacher":
            overrides = ("lora.rank=4", "lora.alpha=16", "lora.dropout=0", *overrides)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(home)
            in_process(script, "--config", "run.yaml", f"name={name}", *overrides)
        return home / "models" / name

    return run


@pytest.fixture(scope="module")
def base(home, tokenizer):
    """base("gpt2") -> folder of a pretrained model. GPT-2 has Conv1D layers, Llama Linear ones."""

    def path(architecture):
        folder = home / "base" / architecture
        if not folder.exists():
            saved(built(tokenizer, seed=11, **SHAPES[architecture]), tokenizer, folder)
        return folder

    return path


@pytest.fixture(scope="module")
def adapter(stage, base):
    """adapter("gpt2", "lora") -> run folder of an adapter that was trained and not merged."""
    runs = {}

    def run(architecture, mode):
        if (architecture, mode) not in runs:
            runs[architecture, mode] = stage("train_teacher", f"{architecture}-{mode}", "model.init=pretrained",
                                             f"model.path={base(architecture)}", f"lora.mode={mode}", "lora.merge_adapter=false")
        return runs[architecture, mode]

    return run


def with_adapter(base, mode, folder):
    """Base and adapter as peft puts them together; the base in 4 bits for QLoRA."""
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                   bnb_4bit_compute_dtype=torch.float32)
    options = {"quantization_config": quantised} if mode == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else some CPUs round to bf16 and repack the weights on the first call
    return PeftModel.from_pretrained(model, folder)


def rows(run, kind="train"):
    return [row for row in map(json.loads, (run / "run" / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def file_hash(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


BOTH = pytest.mark.parametrize("architecture", ["gpt2", "llama"])


@BOTH
@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_merging_keeps_what_base_and_adapter_compute(adapter, base, tokenizer, tmp_path, architecture, mode):
    """After saving and loading, in fp32 and without peft. The update itself is far larger than the tolerance."""
    folder = adapter(architecture, mode)
    together = with_adapter(base(architecture), mode, folder)
    before = {name: value.clone() for name, value in together.state_dict().items()}
    merged = models.merge_adapters(together)
    again = AutoModelForCausalLM.from_pretrained(saved(merged, tokenizer, tmp_path))
    expected = logits(together)
    assert torch.equal(logits(models.load_adapted_model(folder, mode, "fp32")), expected)
    scale = expected.abs().max()
    with together.disable_adapter():
        update = (logits(together) - expected).abs().max() / scale
    assert update > 0.05
    assert (logits(again) - expected).abs().max() / scale < 1e-4
    assert all(torch.equal(value, before[name]) for name, value in together.state_dict().items()), "the model itself was changed"
    assert not hasattr(again.config, "quantization_config") and "lora" not in " ".join(again.state_dict())


@BOTH
def test_a_4_bit_base_is_written_out_before_merging(adapter, base, architecture):
    """Merged weights = what the 4 bits mean + B A alpha / rank, to rounding in fp32; merged *into* 4 bits they would be off by more
    than the update itself in places."""
    together = with_adapter(base(architecture), "qlora", adapter(architecture, "qlora"))
    merged, compared = models.merge_adapters(together), 0
    for name, module in together.get_base_model().named_modules():
        if not hasattr(module, "lora_A"):
            continue
        weight = module.base_layer.weight
        plain = merged.get_submodule(name)
        result = plain.weight.T if isinstance(plain, Conv1D) else plain.weight
        update = (module.lora_B["default"].weight @ module.lora_A["default"].weight) * module.scaling["default"]
        assert torch.allclose(result, dequantize_4bit(weight.data, weight.quant_state).float() + update, atol=1e-6), name
        compared += 1
    assert compared >= 8


@BOTH
def test_gradients_flow_through_a_4_bit_base_after_validation_too(base, tokenizer, architecture):
    """bitsandbytes repacks 4-bit weights in eval mode on some CPUs, for inference only: what follows must still be trained."""
    section = ModelSection(init="pretrained", path=str(base(architecture)))
    model = models.build_adapted_model(section, LoraSection(mode="qlora", dropout=0.0), TrainingSection(steps=1), tokenizer, 0)

    def gradients():
        model.train().zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    logits(model)
    after = gradients()
    assert before.keys() == after.keys() and before
    for name in before:
        assert torch.equal(before[name], after[name]), name


@BOTH
def test_an_adapter_that_is_not_merged_can_teach(adapter, stage, architecture):
    folder = adapter(architecture, "lora")
    assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()
    run = stage("train_student", f"taught-{architecture}", f"distillation.teacher=models/{folder.name}", "distillation.alpha=0.5",
                "training.steps=2", "logging.eval_steps=1", *(f"model.{k}={v}" for k, v in SHAPES["gpt2"].items()))
    assert all(math.isfinite(row["kl"]) and row["kl"] > 0 for row in rows(run))


def test_an_adapter_teacher_whose_base_has_code_is_refused_and_nobody_is_asked(teachers, tmp_path, monkeypatch):
    [adapter] = teachers("adapter")
    base, taught = shutil.copytree(adapter.parent / "base", tmp_path / "base"), shutil.copytree(adapter, tmp_path / "adapter")
    for file, keys in ((base / "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}),
                       (taught / "adapter_config.json", {"base_model_name_or_path": str(base)})):
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    (base / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()")
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(UserError, match="cannot load the teacher .*contains custom code"):
        models.load_teacher(str(taught), models.load_tokenizer(adapter))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("architecture, mode", [("gpt2", "qlora"), ("llama", "lora")])
def test_a_merged_run_is_one_plain_model(stage, base, adapter, architecture, mode, capsys):
    """Trained as the unmerged one was, to the last bit, and merged by the run itself."""
    files = list(base(architecture).iterdir())
    before = [file_hash(file) for file in files]
    run = stage("train_teacher", f"merged-{architecture}-{mode}", "model.init=pretrained", f"model.path={base(architecture)}",
                f"--use_{mode}")
    assert "merged the adapters: logits differ by" in capsys.readouterr().out
    unmerged = adapter(architecture, mode)
    assert [row["ce"] for row in rows(run)] == [row["ce"] for row in rows(unmerged)]
    expected = logits(with_adapter(base(architecture), mode, unmerged))
    difference = (logits(AutoModelForCausalLM.from_pretrained(run)) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-4
    assert rows(run, "eval")[-1]["ce"] < math.log(512)
    assert not (run / "adapter_config.json").exists()
    assert [file_hash(file) for file in files] == before, "the base was changed"


def test_only_the_adapter_is_trained(adapter):
    run = adapter("llama", "lora")
    trained = load_file(run / "adapter_model.safetensors")
    assert trained and all("lora_" in name for name in trained)
    assert all(value.abs().max() > 0 for value in trained.values()), "lora_B starts at 0"


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_embeddings_trained_in_full_are_not_tied_again(stage, base, mode):
    """GPT-2's one matrix becomes two, both trained. What is saved computes what was trained; read as tied it would not."""
    keys = ["model.init=pretrained", f"model.path={base('gpt2')}", f"lora.mode={mode}", "lora.modules_to_save=[wte, lm_head]"]
    run = stage("train_teacher", f"embeddings-{mode}", *keys)
    unmerged = stage("train_teacher", f"embeddings-{mode}-unmerged", *keys, "lora.merge_adapter=false")
    assert config_of(run)["tie_word_embeddings"] is False
    weights = load_file(run / "model.safetensors")
    initial = load_file(base("gpt2") / "model.safetensors")["transformer.wte.weight"]
    embedding, head = weights["transformer.wte.weight"], weights["lm_head.weight"]
    assert all((a - b).abs().max() > 1e-2 for a, b in ((embedding, head), (embedding, initial), (head, initial)))
    expected = logits(with_adapter(base("gpt2"), mode, unmerged))
    again = AutoModelForCausalLM.from_pretrained(run)
    assert (logits(again) - expected).abs().max() / expected.abs().max() < 1e-4
    again.config.tie_word_embeddings = True
    again.tie_weights()
    assert (logits(again) - expected).abs().max() / expected.abs().max() > 1e-2


def test_an_adapter_run_resumes(stage, base, home):
    """Stopped by a real signal at step 3; its checkpoint holds the adapter and not the base."""
    keys = ["model.init=pretrained", f"model.path={base('llama')}", "lora.mode=lora", "lora.dropout=0.1"]
    whole = stage("train_teacher", "whole", *keys)
    run = home / "models" / "interrupted"
    with pytest.raises(Preempted, match="SIGTERM at step 3 of 6"):
        stop_at_step_3(lambda: stage("train_teacher", "interrupted", *keys))
    trained = load_file(run / "checkpoint-3" / "trained.safetensors")
    assert trained and all("lora_" in name for name in trained)
    stage("train_teacher", "interrupted", *keys)
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def stop_at_step_3(work):
    """Send SIGTERM to this process at the end of the third step."""
    original = RunCallback.on_step_end

    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", on_step_end)
        return work()


def test_an_adapter_run_does_not_resume_on_another_base(stage, base, home, tokenizer):
    """The frozen weights are not in the checkpoint: with others the adapter would mean something else."""
    keys = ["model.init=pretrained", f"model.path={home}/base/changing", "lora.mode=lora"]
    saved(built(tokenizer, seed=1), tokenizer, home / "base" / "changing")
    with pytest.raises(Preempted):
        stop_at_step_3(lambda: stage("train_teacher", "moved", *keys))
    saved(built(tokenizer, seed=2), tokenizer, home / "base" / "changing")
    with pytest.raises(UserError, match="fingerprint"):
        stage("train_teacher", "moved", *keys)


def test_an_adapter_loads_from_any_folder(stage, base, home, tmp_path):
    """In another process, started elsewhere, although the config named the base by a relative path."""
    run = stage("train_teacher", "relative", "model.init=pretrained", f"model.path={base('gpt2').relative_to(home)}",
                "--use_lora", "lora.merge_adapter=false", "training.steps=1", "logging.eval_steps=1")
    script = "import sys; from transformers import AutoModelForCausalLM as M; print(M.from_pretrained(sys.argv[1]).num_parameters())"
    done = subprocess.run([sys.executable, "-c", script, str(run)], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr[-800:]


@pytest.mark.parametrize("mode, missing", [("lora", ["peft"]), ("qlora", ["bitsandbytes"]), ("qlora", ["peft", "bitsandbytes"])])
def test_a_missing_package_is_named_before_anything_is_read(stage, home, monkeypatch, mode, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    with pytest.raises(UserError, match=f"lora.mode: {mode} needs {' and '.join(missing)}: pip install"):
        stage("train_teacher", "lacking", "model.init=pretrained", "model.path=nowhere", "data.corpus=nowhere", f"lora.mode={mode}")
    assert not (home / "models" / "lacking").exists()


def test_an_unknown_module_is_named_beside_those_there_are(base, tokenizer):
    with pytest.raises(UserError, match="no module named q_proj; it has .*c_attn"):
        models.build_adapted_model(ModelSection(init="pretrained", path=str(base("gpt2"))), LoraSection(mode="lora", targets=["q_proj"]),
                                   TrainingSection(steps=1), tokenizer, 0)


def test_4_bit_parameters_are_counted_by_number(base, tokenizer):
    section, training = ModelSection(init="pretrained", path=str(base("llama"))), TrainingSection(steps=1)
    plain, packed = (models.build_adapted_model(section, LoraSection(mode=mode), training, tokenizer, 0) for mode in ("lora", "qlora"))
    assert models.count_parameters(packed) == models.count_parameters(plain)
    assert models.forward_flops_per_token(packed, 32) == models.forward_flops_per_token(plain, 32)
    assert models.training_flops_per_token(packed, 32) == models.training_flops_per_token(plain, 32)


def test_a_llama_trains_its_start_token_where_padding_has_the_same_id(tokenizer):
    """GPT-2's vocabulary has one special token for everything, and an embedding's padding row gets no gradient."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token
    model = models.build_model(ModelSection(architecture="llama", layers=1, width=16, heads=2, max_positions=32), tokenizer, seed=1)
    ids = torch.tensor([[tokenizer.bos_token_id, 5, 6, 7]])
    losses.token_cross_entropy(model(input_ids=ids).logits, ids).mean().backward()
    start = tokenizer.bos_token_id
    assert model.get_input_embeddings().weight[start].any() and model.get_input_embeddings().weight.grad[start].any()
