"""What is printed before the first step, and the dry run of every stage: what it says, what it refuses, and that it writes nothing."""

import contextlib
import gc
import hashlib
import json
import re
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from babylm import models, plan, run_folder, teacher_cache, training
from babylm.config import (
    BaselineConfig,
    ContrastiveSection,
    DistillationSection,
    ModelSection,
    MoEPDistillationSection,
    MoEPModelSection,
    RLConfig,
    StudentConfig,
)
from babylm.distillation import Distiller, Teacher
from babylm.schema import UserError, check, identity
from custom_dataset import DataError, TokenBlocks, UnwrittenStore, open_store
from interactive import rehearsal
from interactive.ppotrainer import PolicyWithValue
from interactive.rollout import Sample, body_and_head, collate, completion_logprobs, switch_off_dropout

LLAMA = {"architecture": "llama", "layers": 2, "width": 32, "heads": 2, "ffn": 64, "max_positions": 64}
SETTINGS = {
    "data": {"seq_len": 32, "eval_blocks": 20},
    "model": LLAMA,
    "training": {"steps": 30, "batch_size": 8, "per_device_batch_size": 4, "lr": 3e-3, "warmup_steps": 2, "device": "cpu"},
    "checkpoints": {"milestones": False, "extra_words": [500, 1000, 2000, 10**6], "save_steps": 4},
    "logging": {"logging_steps": 1, "eval_steps": 10},
}

RL = {"data": {"seq_len": 32, "eval_blocks": 8}, "prompts": {"count": 20}, "generation": {"max_new_tokens": 8},
      "training": {"words": 2000, "batch_size": 8, "per_device_batch_size": 4, "device": "cpu"},
      "rewards": [{"kind": "length", "min_words": 2, "max_words": 9}], "checkpoints": {"milestones": False, "extra_words": [1000]}}


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, write_yaml):
    """A folder with a corpus/ of its own, without token stores, and run.yaml on it."""
    folder = tmp_path_factory.mktemp("plan")
    shutil.copytree(corpus, folder / "corpus", ignore=lambda *_: ["tokens"])
    data = {"corpus": str(folder / "corpus"), **SETTINGS["data"]}
    write_yaml(folder / "run.yaml", {"name": "x", "output": str(folder / "models"), **SETTINGS, "data": data})
    return folder


@pytest.fixture
def dry(home, in_process, capsys):
    """dry("train_student", "key=value", ...) -> what a dry run prints; it must leave every file and folder as it was."""

    def run(script, *overrides, config=home / "run.yaml"):
        before = snapshot(home)
        try:
            in_process(script, "--config", config, "--dry_run", *overrides)
        finally:
            assert snapshot(home) == before
        return capsys.readouterr().out

    return run


def snapshot(root):
    """{path: (type, size, time of change, content)} of everything below a folder."""
    found = {}
    for path in sorted([root, *root.rglob("*")]):
        about = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = (path.is_dir(), about.st_size if path.is_file() else 0, about.st_mtime_ns, content)
    return found


def head(output, name):
    """The lines of a plan that begin with `name`."""
    return [line.removeprefix(name).strip() for line in output.splitlines() if line.split(" ")[0] == name]


def distiller_of(architecture, dropout, tokenizer, terms=True):
    shape = {"width": 48, "heads": 3, "dropout": dropout, "max_positions": 64}
    moep = architecture == "moep"
    section = (MoEPModelSection(layers=4, parallel_width=24, **shape) if moep else
               ModelSection(layers=3, architecture=architecture, **{**shape, "heads": 2}))
    teacher = Teacher.from_model(models.build_model(ModelSection(layers=2, width=64, heads=2, max_positions=64), tokenizer, 0))
    schema = MoEPDistillationSection if moep else DistillationSection
    kept = {"contrastive": ContrastiveSection()} if terms else {}
    return Distiller(models.build_model(section, tokenizer, 0), [teacher], schema(teacher="t", alpha=0.1, temperature=2, **kept))


# ---- FLOPs ----------------------------------------------------------------------------------------------------------

TERMS = {  # with how many teachers, and what beside CE and KL
    "kd": (1, {}),
    "logits": (2, {"combine": "logits"}),
    "hidden": (1, {"hidden": {"weight": 1}}),
    "hidden alone": (1, {"hidden": {"weight": 1}, "w_ce": 0, "w_kl": 0}),
    "contrastive": (2, {"contrastive": {"dim": 96}}),
    "aux": (1, {"auxiliary": {"blocks": [1]}}),
    "aux without teacher": (0, {"auxiliary": {"blocks": [1, 2]}, "w_kl": 0}),
    "aux adaptive": (2, {"auxiliary": {"blocks": [1, 2], "weighting": "adaptive"}}),
    "aux features": (2, {"auxiliary": {"blocks": [1, 2], "weighting": "adaptive", "share_head": True, "feature_weight": 1}}),
}
SEQUENCES, LONG = 16, 136  # enough of them to hide what is counted as if every token were predicted, and the teachers' own figures


def student_of(architecture, tokenizer):
    shape = {"width": 64, "heads": 2, "max_positions": LONG}
    section = (MoEPModelSection(layers=4, parallel_width=48, parallel_heads=2, expert_path="loop", **shape) if architecture == "moep"
               else ModelSection(layers=3, architecture=architecture, dropout=0, **shape))
    return models.build_model(section, tokenizer, 0)


def counted_flops(distiller):
    """Per token, of a micro-step."""
    ids = torch.randint(3, 200, (SEQUENCES, LONG), generator=torch.Generator().manual_seed(0))
    return counted(lambda: distiller.train()(ids)["loss"].backward()) / ids.numel()


def counted(function):
    """FLOPs of a call as torch counts them: attention and sums into a matrix too, which it leaves out of itself."""
    sums = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=sums) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gptj", "moep"])
def test_flops_are_those_of_a_real_micro_step(tokenizer, architecture):
    distiller = Distiller(student_of(architecture, tokenizer))
    assert distiller.flops_per_token(LONG) == (pytest.approx(counted_flops(distiller), rel=0.005), 0)


@pytest.mark.parametrize("name", TERMS)
def test_flops_of_every_term(tokenizer, name):
    count, terms = TERMS[name]
    shapes = [{"layers": 2, "width": 48, "heads": 2}, {"architecture": "llama", "layers": 1, "width": 96, "heads": 2}][:count]
    teachers = [Teacher.from_model(models.build_model(ModelSection(max_positions=LONG, **shape), tokenizer, 0)) for shape in shapes]
    section = DistillationSection(teachers=[{"path": str(n)} for n in range(count)], **{"w_ce": 0.5, "w_kl": 0.5, **terms})
    distiller = Distiller(student_of("llama", tokenizer), teachers, section)
    assert sum(distiller.flops_per_token(LONG)) == pytest.approx(counted_flops(distiller), rel=0.005)


def test_flops_of_a_moep_student_with_a_teacher(tokenizer):
    section = MoEPDistillationSection(teacher="t", alpha=0.5)
    distiller = Distiller(student_of("moep", tokenizer), [Teacher.from_model(student_of("gpt2", tokenizer))], section)
    assert sum(distiller.flops_per_token(LONG)) == pytest.approx(counted_flops(distiller), rel=0.005)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("architecture, settings", [
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),  # the first block's keys and scores then need less of a backward pass
    ("llama", {"target_modules": ["q_proj", "k_proj", "v_proj"], "layers_to_transform": [2]}),  # nothing below is differentiated
    ("gptj", {"target_modules": "all-linear"}),
])
def test_flops_of_adapters_on_a_frozen_base(tokenizer, architecture, settings):
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(student_of(architecture, tokenizer), LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    distiller, state = Distiller(student), torch.get_rng_state()
    found = sum(distiller.flops_per_token(LONG))
    assert torch.equal(torch.get_rng_state(), state) and not any(layer._forward_hooks for layer in student.modules())
    assert found == pytest.approx(counted_flops(distiller), rel=0.02 if settings["target_modules"] == ["q_proj", "v_proj"] else 0.005)
    assert found < 0.9 * 3 * models.forward_flops_per_token(student, LONG)


def test_the_plan_prints_the_flops_of_all_that_is_computed(home, dry):
    """The review's finding: a classifier on a block left the printed number as it was."""
    plain, terms = (float(re.search(r"([\d.,]+) MFLOP", dry("train_student", "distillation={w_ce: 1, w_kl: 0}", *more))[1])
                    for more in ((), ("distillation.auxiliary.blocks=[1]",)))
    assert terms - plain == pytest.approx(6 * (32 * 32 + 32 * 512) / 1e6, abs=0.1)


# ---- Memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture, dropout", [("gpt2", 0.1), ("llama", 0.1), ("gptj", 0.0), ("moep", 0.0)])
def test_activations_are_what_a_real_micro_step_keeps(corpus, tokenizer, architecture, dropout, precision):
    data = SimpleNamespace(train=TokenBlocks(open_store(corpus, "train", tokenizer), 48, seed=0))
    distiller, device = distiller_of(architecture, dropout, tokenizer), torch.device("cpu")
    distiller.eval()
    state = torch.get_rng_state()
    found = plan.activations(distiller, data, 16, precision, device)
    assert torch.equal(torch.get_rng_state(), state)  # a run draws the same numbers, whether it was measured or not
    assert not any(part.training for part in distiller.modules()) and not distiller.student.is_activation_checkpointing
    assert not distiller.student.get_input_embeddings()._forward_hooks  # that would ask for gradients of frozen embeddings
    assert all(parameter.grad is None for parameter in distiller.parameters())
    ids = torch.stack([data.train[item]["input_ids"] for item in range(16)])
    for recomputed, estimate in found.items():
        with plan.checkpointing(distiller.student, recomputed):
            real = plan.saved_bytes(distiller, {"input_ids": ids}, precision)  # the teacher is run here
        assert estimate.kept == pytest.approx(real, rel=0.05)
    assert set(found) == {False, True} and found[True].peak < found[False].peak
    assert found[True].block and not found[False].block


def test_saved_bytes_are_counted_once_and_without_weights():
    weight = torch.randn(10, 20, requires_grad=True)
    x = torch.randn(5, 10, requires_grad=True)

    def twice():
        y = (x @ weight).exp()  # keeps x, and y: 5 x 20
        return (y * y).sum()  # keeps y again

    assert plan.saved_by(twice, [weight]) == 4 * (5 * 10 + 5 * 20)
    assert plan.saved_by(twice, []) == 4 * (5 * 10 + 5 * 20 + 10 * 20)


def test_a_block_that_is_recomputed_is_counted_as_large_as_it_is(corpus, tokenizer):
    data = SimpleNamespace(train=TokenBlocks(open_store(corpus, "train", tokenizer), 48, seed=0))
    distiller = distiller_of("llama", 0.0, tokenizer, terms=False)
    block = plan.activations(distiller, data, 4, "fp32", torch.device("cpu"))[True].block
    body = distiller.student.model
    hidden = torch.randn(4, 48, 48, requires_grad=True)
    places = torch.arange(48)[None]
    embeddings = body.rotary_emb(hidden, places)
    real = plan.saved_by(lambda: body.layers[0](hidden, position_embeddings=embeddings, position_ids=places), list(distiller.parameters()))
    assert block == pytest.approx(real, rel=0.1)


WIDE = ["model={architecture: llama, layers: 3, width: 128, heads: 2, max_positions: 64, tied: false}", "training.steps=4",
        "training.batch_size=4", "data.seq_len=8"]  # few tokens: what there is beside activations counts


def exact_amounts(rank):
    plan.amount = lambda size: f"{size} B"


def printed_memory(output):
    """{part: bytes} of a memory line printed after `exact_amounts`; "all" is their sum."""
    line, = head(output, "memory")
    return {"all": int(line.split()[0]), **{name: int(size) for name, size in re.findall(r"[=+] (\w+) (\d+) B", line)}}


def profile_two_steps(rank):
    """Print the most that was allocated at a time, from here to the end of the second step."""
    started, callback = profile(activities=[ProfilerActivity.CPU], profile_memory=True), training.RunCallback
    started.start()
    end = callback.on_step_end

    def on_step_end(self, args, state, *rest, **kwargs):
        if state.global_step == 2:
            started.stop()
            events = [event for event in started.profiler.kineto_results.events() if event.name() == "[memory]"]
            sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
            print("PEAK", max(np.cumsum(sizes)), flush=True)
        return end(self, args, state, *rest, **kwargs)

    callback.on_step_end = on_step_end
    # The weights are the same in all processes, and copies that gloo's own threads give back would never be seen to go.
    torch.nn.parallel.distributed._sync_module_states = lambda **_: None


@pytest.mark.parametrize("per_device", [2, 1])
def test_the_memory_line_covers_what_ddp_holds(home, corpus, on_two_processes, per_device):
    """Without accumulation gradients lie in DDP's buckets; with it, beside them."""
    main, _ = on_two_processes("train_baseline", "--config", home / "run.yaml", f"output={home / 'pairs'}", f"name=ddp-{per_device}", *WIDE,
                               f"data.corpus={corpus}", f"training.per_device_batch_size={per_device}", "logging.eval_steps=100",
                               before=lambda rank: (exact_amounts(rank), profile_two_steps(rank)))
    said, (peak,) = printed_memory(main), map(int, re.findall(r"PEAK (\d+)", main))
    assert 0.97 * peak <= said["all"] < 1.1 * peak  # the elementwise part of the loss has temporaries that are not counted
    assert said["gradients"] == pytest.approx((1 if per_device == 2 else 2) * said["weights"], rel=0.2)


def watch_gathered(rank):
    """Print the most that all tensors which Python can see, activations not, hold at the points where a block's gradients are done."""
    most, reduce = [0], FSDPParamGroup.post_backward

    def held():
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        tensors += [found.grad for found in tensors if found.is_leaf and found.grad is not None]
        storages = [(found.to_local() if isinstance(found, DTensor) else found).untyped_storage() for found in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def post_backward(self, *args, **kwargs):
        before = held()
        result = reduce(self, *args, **kwargs)
        most[0] = max(most[0], before, held())
        return result

    callback = training.RunCallback
    end = callback.on_step_end

    def on_step_end(self, args, state, *rest, **kwargs):
        if state.global_step == 2:
            print("PEAK", most[0], flush=True)
        return end(self, args, state, *rest, **kwargs)

    FSDPParamGroup.post_backward, callback.on_step_end = post_backward, on_step_end


@pytest.mark.parametrize("name, terms", [("plain", "{w_ce: 1, w_kl: 0}"), ("aux", "{w_ce: 1, w_kl: 0, auxiliary: {blocks: [1, 2]}}")])
def test_the_memory_line_covers_what_sharding_gathers(home, corpus, on_two_processes, name, terms):
    main, other = on_two_processes("train_student", "--config", home / "run.yaml", f"output={home / 'pairs'}", f"name=fsdp-{name}", *WIDE,
                                   f"data.corpus={corpus}", f"distillation={terms}", "training.fsdp=true", "logging.eval_steps=100",
                                   "training.per_device_batch_size=2", before=lambda rank: (exact_amounts(rank), watch_gathered(rank)))
    said, (peak,) = printed_memory(main), map(int, re.findall(r"PEAK (\d+)", other))  # the main process has a whole copy for saving
    covered = said["weights"] + said["gradients"] + said["Adam"] + said["gathered"]
    assert peak <= covered < 1.4 * peak
    assert said["weights"] + said["gradients"] + said["Adam"] < 0.9 * peak


def test_amounts_are_readable():
    assert [run_folder.amount(size) for size in (0, 812, 1000, 9949, 12_345, 9.99e6, 1.2e9, 9.996e11, 3e15)] == [
        "0 B", "812 B", "1.0 KB", "9.9 KB", "12 KB", "10 MB", "1.2 GB", "1.0 TB", "3000 TB"]


# ---- Stages 2 to 5 --------------------------------------------------------------------------------------------------


def test_a_dry_run_of_a_student_says_it_all(home, dry, teachers, corpus, tokenizer):
    teacher, = teachers("gpt2")
    keys = [f"distillation.teacher={teacher}", "distillation.alpha=0.5"]
    out = dry("train_student", *keys)
    steps, seq_len, batch = 30, 32, 8
    blocks = TokenBlocks(open_store(corpus, "train", tokenizer), seq_len, seed=0, items=steps * batch)
    parameters = models.count_parameters(models.build_model(ModelSection(**LLAMA), tokenizer, 0))
    assert f"{parameters:,} parameters, {parameters:,} trained" in head(out, "model")[0] and "MFLOP per token" in head(out, "model")[0]
    epochs, words = steps * batch / blocks.blocks_per_epoch, blocks.words_through(steps * batch)
    assert head(out, "budget") == [f"30 steps = {epochs:.2f} epochs = {words:,} words seen"]
    assert "1 process(es) x 4 x 2 accumulation" in head(out, "batch")[0]
    memory, = head(out, "memory")
    assert re.search(r"weights \S+ KB \+ gradients \S+ KB \+ Adam \S+ KB \+ teacher \S+ KB \+ logits .* \+ activations .* "
                     r"\(4 x 32 tokens at once; .* with gradient_checkpointing\)", memory)
    disk, = head(out, "disk")
    reached = sum(milestone <= words for milestone in (500, 1000, 2000))
    assert reached >= 2 and f"{reached} milestone(s)" in disk and "3 resume checkpoint(s)" in disk and "token store" in disk
    assert head(out, "folder") == [f"{home / 'models' / 'x'}: new; starts at step 0"]
    assert "2 micro-step(s)" in head(out, "step")[0] and "30 steps" in head(out, "time")[0] and "3 validation(s)" in head(out, "time")[0]
    assert "nothing was written" in out.splitlines()[-1] and "estimated" not in out


@pytest.mark.parametrize("script, keys, words", [
    ("train_baseline", ["training.gradient_checkpointing=true", "training.precision=bf16"], "without gradient_checkpointing"),
    ("train_moep_student", ["model={layers: 3, width: 16, heads: 2, parallel_width: 8, parallel_heads: 2, max_positions: 64}",
                            "distillation={w_ce: 1, w_kl: 0}"], "0.01 balance"),
    ("train_teacher", ["--use_lora", "model={init: pretrained, path: BASE}", "lora.targets=[c_attn]"], "trained"),
])
def test_every_training_stage_has_a_dry_run(dry, teachers, script, keys, words):
    base, = teachers("gpt2")
    out = dry(script, *[key.replace("BASE", str(base)) for key in keys])
    assert words in out and "nothing was written" in out.splitlines()[-1]
    if script == "train_teacher":
        whole, trained = (int(count.replace(",", "")) for count in re.findall(r"([\d,]+) (?:parameters|trained)", out)[:2])
        assert trained < whole / 5  # Adam and checkpoints hold the adapters alone


def test_a_dry_run_knows_what_lies_in_the_folder(home, dry, corpus, in_process, monkeypatch, capsys):
    script, run = "train_baseline", ["name=half", f"data.corpus={corpus}", "training.steps=9", "training.per_device_batch_size=null"]
    in_process(script, "--config", home / "run.yaml", *run)
    out = capsys.readouterr().out
    memory, = head(out, "memory")  # of a run that is no dry one
    assert re.search(r"activations .* \(8 x 32 tokens at once; .* with gradient_checkpointing\)", memory)
    assert out.index("memory  ") < out.index("step      1/9")
    finished = home / "models" / "half" / "run" / "finished.json"
    assert "is finished" in dry(script, *run)

    finished.unlink()
    (home / "models" / "half" / "checkpoint-4").mkdir()
    run_folder.seal(home / "models" / "half" / "checkpoint-4")
    out = dry(script, *run)
    assert "goes on from" in head(out, "folder")[0] and "(step 4 of 9)" in head(out, "folder")[0] and "= 5 steps" in head(out, "time")[0]
    with pytest.raises(UserError, match=r"holds a run with other settings:\n  training.lr: 0.003 there, 0.1 now"):
        dry(script, *run, "training.lr=0.1")
    out = dry(script, *run, "training.lr=0.1", "fresh=true")
    assert "moved aside (fresh); starts at step 0" in head(out, "folder")[0] and "= 9 steps" in head(out, "time")[0]

    monkeypatch.setattr(run_folder, "_locks", {})  # as another process sees the lock, which this one still holds
    with pytest.raises(UserError, match="is being trained by another process"):
        dry(script, *run)


@pytest.mark.parametrize("script, keys, words", [
    ("train_student", ["distillation={teacher: models/none, alpha: 0.5}"], "models/none does not exist; make it first"),
    ("train_student", ["distillation={teacher: GPT2, alpha: 0.5}", "data.tokenizer=OTHER"], "has another vocabulary than the data"),
    ("train_baseline", ["training.per_device_batch_size=3"], "not a multiple of per_device_batch_size 3"),
    ("train_baseline", ["model.init=pretrained", "model.path=GPT2", "data.seq_len=128"], "exceeds the 64 positions of the student"),
    ("train_baseline", ["data.corpus=nowhere"], "manifest.json is missing"),
    ("train_baseline", ["training.device=cuda"], "sees no CUDA GPU"),
    ("train_baseline", ["trainig.lr=1", "seed=-1"], "2 mistake.s. in the config"),
])
def test_a_dry_run_refuses_what_the_run_would(dry, home, teachers, tokenizer, script, keys, words, tmp_path):
    base, = teachers("gpt2")
    if any("OTHER" in key for key in keys):
        models.save_tokenizer(models.train_tokenizer(["abc abd abe " * 50], 300, 2), tmp_path)
    with pytest.raises((UserError, DataError), match=words):
        dry(script, *[key.replace("GPT2", str(base)).replace("OTHER", str(tmp_path)) for key in keys])


def test_a_run_that_does_not_fit_on_the_disk_is_refused_with_numbers(dry, home, in_process, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"MB are to be written \(.*milestone.* resume checkpoint.* final model .*\), but 100 KB are free"):
        dry("train_baseline")
    with pytest.raises(SystemExit) as ended:
        in_process("train_baseline", "--config", home / "run.yaml", "--dry_run", as_script=True)
    assert ended.value.code == 1 and "but 100 KB are free" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["train_baseline", "ppo"])
def test_a_real_run_is_refused_too_before_its_first_step(script, corpus, teachers, in_process, write_yaml, tmp_path, monkeypatch, capsys):
    settings = {"name": "no-room", "output": str(tmp_path), **SETTINGS, "data": {"corpus": str(corpus), **SETTINGS["data"]}}
    if script == "ppo":
        policy, = teachers("gpt2")
        settings |= {"model": {"path": str(policy)}, **RL, "data": {"corpus": str(corpus), **RL["data"]}}
        del settings["logging"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"to be written \(.*resume checkpoint.* final model .*\), but 100 KB are free"):
        in_process(script, "--config", write_yaml(tmp_path / "run.yaml", settings))
    assert not re.search("^step ", capsys.readouterr().out, re.MULTILINE) and not list((tmp_path / "no-room").rglob("*.safetensors"))


def test_disk_counts_what_is_written_side_by_side(home, corpus, tokenizer):
    config = check(BaselineConfig, {"name": "n", "output": str(home / "models"), **SETTINGS, "data": {"corpus": str(corpus), "seq_len": 32},
                                    "checkpoints": {"milestones": False, "save_steps": 10, "keep": 2, "final": "best"}}, "test")
    data = training.load_data(config)
    distiller = Distiller(models.build_model(config.model, tokenizer, 0))
    made = plan.Plan(config, run_folder.RunFolder(config, "test"), data, distiller, 30, 4, 2, torch.device("cpu"))
    parameters = 4 * models.count_parameters(distiller.student)
    sizes = {what.split(" ", 1)[-1]: (what, size) for what, _, size in made.needed()}
    assert sizes["resume checkpoint(s)"] == ("3 resume checkpoint(s)", 9 * parameters)  # 2 kept and 1 being written, weights and 2 moments
    assert sizes["model"][1] == 3 * (parameters + len(tokenizer.backend_tokenizer.to_str()))  # the best, the next best, the final one
    assert "token store" not in sizes  # it is there already


# ---- What a store would hold ----------------------------------------------------------------------------------------


def test_a_store_in_memory_is_the_store_on_disk(home, corpus, tokenizer):
    built, held = open_store(corpus, "train", tokenizer), open_store(home / "corpus", "train", tokenizer, write=False)
    assert isinstance(held, UnwrittenStore) and not held.estimated and not (home / "corpus" / "tokens").exists()
    assert np.array_equal(held.ids, built.ids) and np.array_equal(held.word_starts, built.word_starts)
    assert np.array_equal(held.documents, built.documents) and held.meta["words"] == built.meta["words"]
    assert held.meta["files"]["ids.bin"] == built.meta["files"]["ids.bin"]
    assert not isinstance(open_store(corpus, "train", tokenizer, write=False), UnwrittenStore)  # it is read where it exists


def test_a_large_text_is_estimated_and_said_to_be(home, corpus, tokenizer, dry, monkeypatch):
    monkeypatch.setattr(UnwrittenStore, "SAMPLE_BYTES", 20_000)
    built, held = open_store(corpus, "train", tokenizer), open_store(home / "corpus", "train", tokenizer, write=False)
    assert held.estimated and len(held) == pytest.approx(len(built), rel=0.05)
    assert held.meta["words"] == pytest.approx(built.meta["words"], rel=0.02)
    places = np.arange(len(held))
    shares = [np.bincount(store.domain_of(places[:len(store)]), minlength=len(store.domains)) / len(store) for store in (held, built)]
    assert np.abs(shares[0] - shares[1]).max() < 0.1
    assert "estimated from a sample" in head(dry("train_baseline"), "data")[0]


# ---- Time -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each, most, expected", [(0.01, 8, 8), (1.0, 32, 7), (20.0, 32, 1), (20.0, 1, 1), (0.5, 1, 1)])
def test_slow_steps_are_measured_on_fewer_sequences(monkeypatch, each, most, expected):
    called = []
    monkeypatch.setattr(plan, "seconds", lambda function, device: function() or each * called[-1])
    found, count = plan.per_sequence(called.append, most, torch.device("cpu"))
    assert found == pytest.approx(each) and count == expected
    assert sum(called) * each < max(2 * plan.MEASURE_SECONDS, 1.01 * each)


def test_a_dry_run_is_no_part_of_what_a_run_is(home):
    config = check(StudentConfig, {"name": "n", **SETTINGS, "distillation": {"w_ce": 1, "w_kl": 0}}, "test")
    before = identity(config), config.model_dump()
    config._dry_run = True
    assert config.dry_run and (identity(config), config.model_dump()) == before
    with pytest.raises(UserError, match="dry_run: unknown key"):
        check(BaselineConfig, {"name": "n", "training": {"steps": 1}, "dry_run": True}, "test")


# ---- The teacher cache, stages 1, 6 and 7 ---------------------------------------------------------------------------


def test_the_teacher_cache_says_its_bytes_and_time(home, teachers, monkeypatch, capsys):
    teacher, = teachers("gpt2")
    before = snapshot(home)
    monkeypatch.setattr("sys.argv", ["teacher_cache", "--config", str(home / "run.yaml"), "--dry_run", f"distillation.teacher={teacher}",
                                     "distillation.alpha=0.5"])
    teacher_cache.main()
    out = capsys.readouterr().out
    assert snapshot(home) == before
    assert "GB to be made" in out and re.search(r"about \d:\d\d:\d\d for [\d,]+ blocks", out) and "nothing was written" in out


def test_stage_1_reads_its_files_and_writes_nothing(home, raw, write_yaml, dry, tmp_path):
    config = write_yaml(tmp_path / "corpus.yaml", {"corpus": {"input": str(raw), "output": str(home / "new"), "validation_fraction": 0.1},
                                                   "tokenizer": {"vocab_size": 512}})
    out = dry("combine_babylm", config=config)
    files = sorted(raw.glob("*.train"))
    words = sum(len(file.read_text(encoding="utf-8").split()) for file in files)
    assert len(head(out, "input")) == len(files) + 1 and f"{words:,} words" in head(out, "input")[-1]
    assert "512 entries, trained here" in head(out, "tokenizer")[0] and head(out, "folder") == [f"{home / 'new'}: new"]
    with pytest.raises(UserError, match=r"holds a corpus made with other settings or files \(seed"):
        dry("combine_babylm", f"corpus.output={home / 'corpus'}", config=config)
    assert "moved aside" in head(dry("combine_babylm", f"corpus.output={home / 'corpus'}", "fresh=true", config=config), "folder")[0]
    demo = dry("combine_babylm", f"corpus.input={home / 'nothing'}", "corpus.demo_words=1000", config=config)
    assert "would be written there first" in demo
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "bad.train").write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(DataError, match="offset 5 is not UTF-8"):
        dry("combine_babylm", f"corpus.input={tmp_path / 'raw'}", config=config)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dpo"])
def test_stage_6_writes_a_few_completions_and_no_file(home, teachers, write_yaml, tmp_path, dry, algorithm):
    if algorithm != "ppo":
        pytest.importorskip("trl")
    policy, teacher = teachers("gpt2", "llama")
    settings = {"name": "rl", "output": str(home / "models"), "algorithm": algorithm, "model": {"path": str(policy)}, **RL,
                "data": {"corpus": str(home / "corpus"), **RL["data"]},
                "rewards": [{"kind": "margin", "teacher": str(teacher)}, *RL["rewards"]]}
    out = dry("ppo", config=write_yaml(tmp_path / "rl.yaml", settings))
    assert "2,000 words generated" in head(out, "budget")[0] and "nothing was written" in out.splitlines()[-1]
    completions = 2 * 128 if algorithm == "dpo" else 8
    assert head(out, "step")[0].startswith(f"{completions} completions x") and re.search(r"about \d", head(out, "time")[0])
    costs = r"MFLOP per token of prompts and completions: writing [\d.]+ \+ reading [\d.]+ \+ learning [\d.]+$"
    assert re.search(costs, head(out, "model")[0])
    memory, = head(out, "memory")
    assert re.search(r"= weights \S+ [KM]B \+ gradients \S+ [KM]B \+ Adam \S+ [KM]B \+ reference and rewards \S+ [KM]B \+ activations and "
                     r"logits \S+ [KM]B \(4 completions at once, of up to \d+ tokens with their prompts; \S+ [KM]B with grad", memory)
    assert "1 milestone(s)" in head(out, "disk")[0] and "new; starts at step 0" in head(out, "folder")[0]
    if algorithm == "ppo":
        settings["ppo"] = {"minibatches": 3}
        with pytest.raises(UserError, match="not a multiple of ppo.minibatches 3"):
            dry("ppo", config=write_yaml(tmp_path / "rl.yaml", settings))


@pytest.mark.parametrize("value", ["head", "model"])
def test_a_real_run_of_stage_6_prints_what_its_dry_run_did(home, teachers, write_yaml, tmp_path, dry, in_process, capsys, monkeypatch,
                                                           value):
    policy, = teachers("gpt2")
    config = write_yaml(tmp_path / "rl.yaml", {
        "name": "rl", "output": str(tmp_path), "model": {"path": str(policy)}, **RL, "data": {"corpus": str(home / "corpus"), **RL["data"]},
        "training": {**RL["training"], "words": 20}, "algorithm": "ppo", "ppo": {"value": value, "minibatches": 4}})
    expected = dry("ppo", config=config)
    measure, changes = rehearsal.memory, []

    def watched(run, model, trained):
        before = torch.get_rng_state(), [part.training for part in trained.modules()], model.is_activation_checkpointing
        began = time.perf_counter()
        line = measure(run, model, trained)
        assert time.perf_counter() - began < 3  # 0.1 s where nothing else is computed
        changes.append(not torch.equal(before[0], torch.get_rng_state()) or before[1] != [part.training for part in trained.modules()]
                       or before[2] != model.is_activation_checkpointing or any(p.grad is not None for p in trained.parameters()))
        return line

    monkeypatch.setattr(rehearsal, "memory", watched)
    shutil.copytree(home / "corpus", tmp_path / "corpus")
    in_process("ppo", "--config", config, f"data.corpus={tmp_path / 'corpus'}")
    out = capsys.readouterr().out
    assert changes == [False] and out.index("memory  ") < out.index("step ")
    assert "(2 completions at once" in head(out, "memory")[0]  # a minibatch has no more
    for name in ("model", "memory"):
        assert head(out, name) == head(expected, name)


def policy_of(tokenizer, value, length=40, written=24):
    """A run, its policy and what PPO trains of it, and a batch of completions as long as they get."""
    config = check(RLConfig, {"name": "n", "model": {"path": "p"}, **RL, "algorithm": "ppo", "generation": {"max_new_tokens": written},
                              "training": {"steps": 1, "batch_size": 8, "device": "cpu"}, "ppo": {"value": value, "epochs": 3}}, "test")
    model = models.build_model(ModelSection(layers=3, width=64, heads=2, max_positions=64), tokenizer, 0)
    switch_off_dropout(model)
    run = SimpleNamespace(config=config, longest=length, reference=model, rewards=[], device=torch.device("cpu"),
                          state=SimpleNamespace(num_processes=1), autocast=contextlib.nullcontext)
    ids = torch.randint(3, 200, (8, length), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [Sample("", "", row[:length - written], row[length - written:], False) for row in ids]
    return run, model, PolicyWithValue(model, value).eval(), samples


@pytest.mark.parametrize("value", ["head", "model"])
def test_flops_of_stage_6_are_those_of_its_passes(tokenizer, value):
    run, model, trained, samples = policy_of(tokenizer, value)
    found, tokens = rehearsal.flops_per_token(run, model, trained), 8 * 40
    loss, batch = rehearsal._loss(trained, model, run.config), collate(samples)
    assert found["learning"] == pytest.approx(3 * counted(lambda: loss(batch).backward()) / tokens, rel=0.005)
    with torch.no_grad():
        read = counted(lambda: (loss(batch), completion_logprobs(body_and_head(model, "policy"), samples)))
    assert found["reading"] == pytest.approx(read / tokens, rel=0.02)  # with the four tokens that body_and_head looks at


def test_the_memory_line_of_stage_6_holds_what_a_micro_step_keeps(tokenizer, monkeypatch):
    monkeypatch.setattr(rehearsal, "amount", lambda size: f"{size} B")
    run, model, trained, samples = policy_of(tokenizer, "head")
    said = printed_memory(f"memory {rehearsal.memory(run, model, trained)}")
    real = plan.saved_by(lambda: rehearsal._loss(trained, model, run.config)(collate(samples)), trained.parameters())
    assert int(re.search(r"activations and logits (\d+)", rehearsal.memory(run, model, trained))[1]) == pytest.approx(real, rel=0.02)
    weights = 4 * sum(parameter.numel() for parameter in trained.parameters())
    assert said["gradients"] == weights and said["Adam"] == 2 * weights
    run.state.num_processes = 2
    in_two = printed_memory(f"memory {rehearsal.memory(run, model, trained)}")
    assert "in each process" in rehearsal.memory(run, model, trained) and weights < in_two["gradients"] < 2 * weights
    run.config.algorithm = "grpo"
    in_two = printed_memory(f"memory {rehearsal.memory(run, model, trained)}")
    assert in_two["gradients"] >= 2 * weights  # TRL's DDP sends from buckets of its own


def test_a_judge_keeps_no_grades_in_a_dry_run(home):
    config = check(BaselineConfig, {"name": "n", "output": str(home / "models"), "training": {"steps": 1}}, "test")
    folder = run_folder.RunFolder(config, "test")
    assert folder.keep("judge") == folder.run / "judge"
    config._dry_run = True
    assert folder.keep("judge") is None


def test_stage_7_lists_what_it_would_draw(home, tmp_path, capsys):
    import visual

    run = tmp_path / "models" / "a" / "run"
    run.mkdir(parents=True)
    rows = [{"kind": kind, "step": step, "words": 100 * step, "seconds": step, "ce": 5.0 / step, "lr": 1e-3, "perplexity": 2.0}
            for step in (1, 2) for kind in ("train", "eval")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = snapshot(tmp_path)
    assert visual.main([str(tmp_path / "models" / "a"), "--output", str(tmp_path / "figures"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert f"would write {tmp_path / 'figures' / 'ce'}.png" in out and "wrote" not in out and snapshot(tmp_path) == before
