"""One, two and four processes, with whole or sharded weights: the same run, written by one of them, that any number may go on with."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from babylm import models, parallel, training
from babylm.config import (
    BaselineConfig,
    LoraSection,
    ModelSection,
    MoEPModelSection,
    RLConfig,
    StudentConfig,
    TeacherConfig,
    TrainingSection,
)
from babylm.distillation import Distiller, Teacher
from babylm.run_folder import RunFolder
from babylm.schema import UserError, check
from interactive.rollout import switch_off_dropout
from modeling_moep import Router

ROOT = training.Path(training.__file__).parents[1]

# 12 steps of 8 sequences. No biases and no dropout, as in test_training.py. 17 validation blocks divide among no processes.
SETTINGS = {
    "data": {"seq_len": 32, "eval_blocks": 17},
    "model": {"architecture": "llama", "layers": 2, "width": 32, "heads": 2, "ffn": 64, "max_positions": 64, "tied": True},
    "training": {"steps": 12, "batch_size": 8, "lr": 3e-3, "warmup_steps": 2, "schedule": "linear", "device": "cpu"},
    "checkpoints": {"milestones": False, "save_steps": 3, "every_words": 400},
    "logging": {"logging_steps": 1, "eval_steps": 6},
}
TERMS = {"alpha": 0.4, "temperature": 2, "hidden": {"weight": 0.2, "loss": "mse"}}

PLAIN = {"name": "x", "training": {"steps": 1}}
LORA = {**PLAIN, "model": {"init": "pretrained", "path": "p"}, "lora": {"mode": "lora"}}
TAUGHT = {**PLAIN, "distillation": {"teacher": "t", "alpha": 0.5, "offload_teacher": True}}
REWARDED = {"name": "x", "model": {"path": "p"}, "algorithm": "ppo", "training": {"steps": 1}, "rewards": [{"kind": "random"}]}


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, write_yaml, teachers):
    """run.yaml (a student with two teachers' logits and states, on a corpus without token store), moep.yaml, plain.yaml."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(corpus, folder / "corpus", ignore=shutil.ignore_patterns("tokens"))
    llama, gpt2 = teachers("llama", "gpt2")
    plain = {"name": "x", "output": str(folder / "models"), **SETTINGS, "data": {"corpus": str(folder / "corpus"), **SETTINGS["data"]}}
    write_yaml(folder / "plain.yaml", plain)
    entries = [{"path": str(llama), "weight": 2}, {"path": str(gpt2)}]
    write_yaml(folder / "run.yaml", {**plain, "distillation": {**TERMS, "teachers": entries}})
    write_yaml(folder / "moep.yaml", {
        **plain, "model": {"architecture": "moep", "layers": 3, "width": 16, "heads": 2, "parallel_width": 8, "parallel_heads": 1,
                           "experts": 3, "max_positions": 32}, "distillation": {"alpha": 1}})
    return folder


def rows(run, kind):
    return [row for line in (run / "run/metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind]


def weights(run):
    return load_file(run / "model.safetensors")


def stop_at(step, of):
    """For `before`: SIGTERM reaches the last of `of` processes alone, in its first micro-step of `step`."""

    def before(rank):
        compute = training.DistillTrainer.compute_loss

        def stopping(self, *args, **kwargs):
            if self.state.global_step + 1 == step and rank == of - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return compute(self, *args, **kwargs)

        training.DistillTrainer.compute_loss = stopping

    return before


def watch_writes(rank):
    """For `before`: print whatever this process writes, makes, renames or deletes below models/."""

    def audit(event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            found = args[:1]
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            found = args[:2]
        else:
            return
        for path in found:
            if isinstance(path, str | os.PathLike) and "/models/" in os.fspath(path):
                os.write(1, f"WROTE {os.fspath(path)}\n".encode())

    sys.addaudithook(audit)
    # These open files where no audit hook sees it.
    saves, saves_any = training.save_file, torch.save
    training.save_file = lambda tensors, path: (os.write(1, f"WROTE {path}\n".encode()), saves(tensors, path))
    torch.save = lambda values, path, *args, **keys: (os.write(1, f"WROTE {path}\n".encode()), saves_any(values, path, *args, **keys))


def both(*functions):
    return lambda rank: [function(rank) for function in functions]


def require_same_run(run, expected):
    """Every row, file and weight of an uninterrupted run on one process. Adam's first steps magnify rounding, hence 1e-4."""
    for kind in ("train", "eval", "milestone"):
        ours, theirs = rows(run, kind), rows(expected, kind)
        assert [[row.get(name) for name in ("step", "words", "name")] for row in ours] == [
            [row.get(name) for name in ("step", "words", "name")] for row in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            for name in {"loss", "ce", "kl", "hidden", "grad_norm", "lr", "perplexity"} & other.keys():
                assert mine[name] == pytest.approx(other[name], rel=2e-4), (kind, mine["step"], name)
    assert rows(run, "eval")[-1]["ce"] == pytest.approx(rows(expected, "eval")[-1]["ce"], abs=1e-5)
    assert sorted(p.name for p in run.glob("chck_*")) == sorted(p.name for p in expected.glob("chck_*"))
    for folder in ["", *sorted(p.name for p in expected.glob("chck_*"))]:
        ours, theirs = weights(run / folder), weights(expected / folder)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert torch.allclose(ours[name], theirs[name], atol=1e-4), (folder, name, float((ours[name] - theirs[name]).abs().max()))


@pytest.fixture(scope="module")
def one(home, in_process):
    """The reference: uninterrupted, on one process."""
    in_process("train_student", "--config", home / "run.yaml", "name=one")
    return home / "models" / "one"


# ---- The same run, however it is spread -----------------------------------------------------------------------------


def test_a_dry_run_of_sharded_processes(home, on_processes):
    """All take part where weights are gathered, in as many micro-steps; one speaks, and nothing is written."""
    main, other = on_processes(2, "train_student", "--config", home / "run.yaml", "name=dry", "training.fsdp=true", "--dry_run")
    assert "in each process" in main and "on 2 processes" in main and "nothing was written" in main and "memory" not in other
    assert not (home / "models/dry").exists()


def test_four_processes_then_one_then_two_train_what_one_does(home, one, on_processes):
    """Stopped by a signal to a single process each time. Four processes begin with nothing built."""
    run, built = home / "models" / "spread", home / "corpus" / "tokens"
    shutil.rmtree(built)
    begin = ["train_student", "--config", home / "run.yaml", "name=spread"]
    logs = on_processes(4, *begin, "training.per_device_batch_size=1", before=both(watch_writes, stop_at(4, of=4)), codes=[75])
    assert sum(len(re.findall(r"^tokenised ", log, re.M)) for log in logs) == 2, "training and validation text, once each"
    for rank, log in enumerate(logs[1:], 1):
        own = rf"rng_state_{rank}\.pth$|/\.checkpoint-\d+\.tmp(/checkpoint-\d+)?$"  # its random state, and the folder for it
        assert [path for path in re.findall(r"^WROTE (.*)", log, re.M) if not re.search(own, path)] == []
    assert len(rows(run, "train")) == 4 and "metrics.jsonl" in logs[0] and "trained.safetensors" in logs[0]
    assert {path.name for path in (run / "checkpoint-4").glob("rng*")} == {f"rng_state_{rank}.pth" for rank in range(4)}
    on_processes(1, *begin, before=stop_at(8, of=1), codes=[75])
    on_processes(2, *begin, "training.per_device_batch_size=2", "training.gradient_checkpointing=true")
    require_same_run(run, one)


def test_sharded_weights_train_what_whole_ones_do(home, one, on_processes):
    """Student, projections and teachers in two parts, then whole on one process, then in four parts, as accelerate's launcher asks for."""
    run = home / "models" / "sharded"
    begin = ["train_student", "--config", home / "run.yaml", "name=sharded"]

    def look(_rank):
        shard = parallel.shard
        parallel.shard = lambda module, *args, **keys: (print(f"SHARDED {type(module).__name__}"), shard(module, *args, **keys))

    sharded = on_processes(2, *begin, "training.fsdp=true", "training.per_device_batch_size=2", "training.gradient_checkpointing=true",
                           before=both(look, stop_at(4, of=2)), codes=[75])
    assert all(re.findall(r"SHARDED (\w+)", log) == ["LlamaModel", "GPT2Model", "Distiller"] for log in sharded)
    saved = load_file(run / "checkpoint-4" / "trained.safetensors")
    assert saved["student.model.embed_tokens.weight"].shape == (512, 32) and "terms.hidden.projections.0.0.weight" in saved
    on_processes(1, *begin, "training.fsdp=true", before=stop_at(8, of=1), codes=[75])
    launched = lambda rank: os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")  # noqa: E731
    logs = on_processes(4, *begin, before=both(look, launched))
    assert "SHARDED Distiller" in logs[3]
    require_same_run(run, one)


@pytest.mark.parametrize("path", ["grouped", "loop"])
def test_a_sharded_mixture_of_experts_trains_what_a_whole_one_does(path, home, in_process, on_two_processes):
    keys = ["train_moep_student", "--config", home / "moep.yaml", f"model.expert_path={path}", "training.steps=4", "logging.eval_steps=2"]
    in_process(*keys, f"name=moep-whole-{path}")
    logs = on_two_processes(*keys, f"name=moep-sharded-{path}", "training.fsdp=true", "training.per_device_batch_size=2")
    assert not any("UserWarning" in log for log in logs)
    require_same_run(home / "models" / f"moep-sharded-{path}", home / "models" / f"moep-whole-{path}")


def test_dropout_differs_between_processes_and_is_the_same_again(home, on_two_processes):
    def before(_rank):
        compute = training.DistillTrainer.compute_loss

        def drawing(self, *args, **kwargs):
            print("STATE", hash(torch.get_rng_state().numpy().tobytes()))
            return compute(self, *args, **kwargs)

        training.DistillTrainer.compute_loss = drawing

    runs, found = [home / "models" / name for name in ("again-1", "again-2")], []
    for run in runs:
        logs = on_two_processes("train_baseline", "--config", home / "plain.yaml", f"name={run.name}", "model.architecture=gpt2",
                                "model.dropout=0.2", "training.steps=2", "logging.eval_steps=2", before=before)
        found.append([re.findall(r"STATE (\S+)", log) for log in logs])
    (first, second), again = found
    assert len(first) == 2 and not set(first) & set(second)
    assert weights(runs[0]).keys() and all(torch.equal(value, weights(runs[1])[name]) for name, value in weights(runs[0]).items())
    assert again == [first, second]


@pytest.mark.parametrize("path", ["grouped", "loop"])
def test_an_expert_without_tokens_on_one_process_changes_nothing(path, home, in_process, on_two_processes, monkeypatch):
    """Expert 0 gets no token of sequences 4 ... 7, which are the second process's: it has no part in that one's backward pass."""
    forward = Router.forward

    def before(rank, halves=1):
        def forward_without(self, tokens):
            routing, logits = forward(self, tokens)
            if self.training:
                mask = torch.zeros_like(logits)
                mask[len(mask) // 2 if halves == 2 else 0 if rank == 1 else len(mask):, 0] = -1e4
                logits = logits + mask
                routing = type(routing)(logits, self.k, self.path(tokens))
            return routing, logits

        Router.forward = forward_without

    keys = ["--config", home / "moep.yaml", f"model.expert_path={path}", "training.steps=2", "logging.eval_steps=2"]
    on_two_processes("train_moep_student", *keys, f"name=apart-{path}", before=before)
    monkeypatch.setattr(Router, "forward", forward)
    before(0, halves=2)
    in_process("train_moep_student", *keys, f"name=together-{path}")
    apart, together = (home / "models" / f"{name}-{path}" for name in ("apart", "together"))
    for ours, theirs in zip(rows(apart, "train"), rows(together, "train"), strict=True):
        assert [ours[name] for name in ("loss", "balance", "grad_norm")] == pytest.approx(
            [theirs[name] for name in ("loss", "balance", "grad_norm")], rel=2e-4)


# ---- Memory ---------------------------------------------------------------------------------------------------------


def first_leaf(block):
    """A module inside, with weights: hooks on the block itself would run outside what is recomputed."""
    return next(module for module in block.modules() if not list(module.children()) and list(module.parameters()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "moep", "adapters"])
def test_recomputed_activations_give_the_same_gradients(name, tokenizer, teachers):
    shape = {"layers": 3, "width": 16, "heads": 2, "max_positions": 32}
    if name == "moep":
        section = MoEPModelSection(**shape, parallel_width=8, parallel_heads=1)
    elif name == "adapters":  # on a frozen base: the blocks' inputs need no gradient
        section = ModelSection(init="pretrained", path=str(teachers("gpt2")[0]))
    else:
        section = ModelSection(architecture=name, **shape)
    ids, gradients, calls = torch.arange(3, 63).view(2, 30), [], []
    for recomputed in (False, True):
        model = models.build_adapted_model(section, LoraSection(mode="lora", dropout=0), TrainingSection(steps=1), tokenizer, 0) \
            if name == "adapters" else models.build_model(section, tokenizer, 0)
        switch_off_dropout(model)
        distiller = Distiller(model).train()
        training.save_memory(distiller, recomputed)
        first_leaf(parallel.blocks_of(distiller.student)[0]).register_forward_hook(lambda *_, now=recomputed: calls.append(now))
        distiller(ids)["loss"].backward()
        gradients.append([parameter.grad for parameter in distiller.parameters() if parameter.requires_grad])
    assert any(gradient.any() for gradient in gradients[1])
    assert calls == [False, True, True], "the block runs a second time in the backward pass"
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_a_teacher_whose_blocks_wait_elsewhere_computes_the_same(name, teachers, tokenizer):
    """With the CPU in the GPU's place: a block's weights are copies while it runs, and only then."""
    ids, at_work = torch.arange(3, 63).view(2, 30), []
    here, parked = (Teacher.from_model(models.load_teacher(str(teachers(name)[0]), tokenizer)) for _ in range(2))
    blocks = parallel.blocks_of(parked.model)
    parallel.park_blocks(parked.model, torch.device("cpu"))
    waiting = {parameter: parameter.data_ptr() for block in blocks for parameter in block.parameters()}
    assert waiting and len(waiting) < sum(1 for _ in parked.model.parameters())
    for block in blocks:
        first_leaf(block).register_forward_hook(lambda *_, block=block: at_work.append([p.data_ptr() == waiting[p]
                                                                                       for p in block.parameters()]))
    for _ in range(2):
        ours, theirs = (teacher.states(ids, range(teacher.depth + 1)) for teacher in (parked, here))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[state], theirs[state]) for state in theirs)
    assert len(at_work) == 2 * len(blocks) and not any(map(any, at_work))
    assert all(parameter.data_ptr() == place for parameter, place in waiting.items())


def test_offloading_is_asked_for_by_a_key_and_a_teacher_on_a_cpu_stays_as_it_is(teachers, tokenizer, monkeypatch):
    moved = []
    monkeypatch.setattr(parallel, "park_blocks", lambda model, device: moved.append(device))
    teacher = Teacher.from_model(models.load_teacher(str(teachers("llama")[0]), tokenizer))
    config = check(StudentConfig, TAUGHT, "test")
    distiller = Distiller(models.build_model(ModelSection(layers=1, width=8, heads=1), tokenizer, 0), [teacher], config.distillation)
    distiller.to_device(torch.device("cpu"))
    assert moved == []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    teacher.head = type(teacher.head)(None)
    distiller.to_device(torch.device("cuda"))
    assert moved == [torch.device("cuda")]


# ---- Launchers and nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_shipped_launch_configs(path):
    """As its own launcher reads them; their comments name commands and files that exist."""
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes > 1 and loaded.mixed_precision == "no" and not loaded.use_cpu
    assert loaded.distributed_type == ("FSDP" if path.stem == "fsdp" else "MULTI_GPU")
    assert (loaded.num_machines > 1) == ("multi_node" in path.stem) == bool(loaded.main_process_ip)
    assert loaded.fsdp_config.get("fsdp_version", 2) == 2
    for name in re.findall(r"\S+\.(?:py|yaml)\b", "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))):
        assert (ROOT / name).is_file() or (path.parent / name).is_file(), name


@pytest.mark.parametrize("launch", ["ddp", "fsdp"])
def test_accelerate_launch_starts_a_stage(launch, home, warm_python):
    done = subprocess.run([warm_python, "-m", "accelerate.commands.launch", "--config_file", ROOT / f"configs/accelerate/{launch}.yaml",
                           "--num_processes", "2", "train_baseline.py", "--config", home / "plain.yaml", f"name=launched-{launch}",
                           "training.steps=2", "logging.eval_steps=2"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 sequences = 2 process(es) x 4 x 1 accumulation" in done.stdout and ("sharding " in done.stdout) == (launch == "fsdp")
    assert done.stdout.count("finished ") == 1 and (home / "models" / f"launched-{launch}" / "run" / "finished.json").is_file()


FSDP = {"ACCELERATE_USE_FSDP": "true"}


@pytest.mark.parametrize("schema, values, environment, words", [
    (TeacherConfig, LORA, FSDP, "with lora.mode: lora only small adapters"),
    (StudentConfig, TAUGHT, FSDP, "offload_teacher does not go with training.fsdp"),
    (RLConfig, REWARDED, FSDP, "stage 6 is not sharded: use configs/accelerate/ddp.yaml"),
    (BaselineConfig, PLAIN, {**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params is not supported: use"),
    (BaselineConfig, PLAIN, {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use training.gradient_checkpointing=true"),
    (BaselineConfig, PLAIN, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
    (BaselineConfig, {**PLAIN, "training": {"steps": 1, "fsdp": True, "compile": True}}, {}, "training.compile: True does not go"),
    (BaselineConfig, {**PLAIN, "training": {"steps": 1, "fsdp": True, "precision": "fp16"}}, {}, "training.precision: fp16 does not go"),
])
def test_what_cannot_be_sharded_is_said_before_anything_is_read(schema, values, environment, words, monkeypatch):
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(words)):
        parallel.read_launcher(check(schema, values, "test"))


def test_the_launchers_precision_does_not_win_over_the_runs(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = check(BaselineConfig, PLAIN, "test")
    parallel.read_launcher(config)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no" and not config.training.fsdp


def test_a_node_that_does_not_see_the_run_folder_is_an_error(home, on_two_processes):
    def elsewhere(rank):
        sys.argv += [f"output={home / 'node-local'}"] if rank else []

    logs = on_two_processes("train_baseline", "--config", home / "plain.yaml", "name=lost", before=elsewhere, codes=[1])
    assert all("process 1 on" in log and "put output= on a file system that they share" in log for log in logs)


def test_what_the_main_process_refuses_ends_them_all_with_its_reason(home, one, on_two_processes):
    logs = on_two_processes("train_student", "--config", home / "run.yaml", f"name={one.name}", "training.lr=0.1", codes=[1])
    assert all("holds a run with other settings" in log and "Traceback" not in log for log in logs)


def test_a_node_that_reads_other_data_is_an_error(home, monkeypatch):
    config = check(BaselineConfig, {**PLAIN, "output": str(home)}, "test")
    folder = RunFolder(config, "train_baseline.py")
    folder.run.mkdir(parents=True)
    monkeypatch.setattr(parallel, "gather_object", lambda mine: [*mine, {**mine[0], "data": {"train": "b", "val": "v"}, "host": "node2"}])
    with pytest.raises(UserError, match="process 1 on node2 reads other data than process 0 on .*: train. Put corpus and models"):
        parallel.require_same_view(folder, {"train": "a", "val": "v"})
