"""One, two and four processes, with whole or sharded weights: the same run, written by one of them, that any number may go on with."""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import types

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from babylm import models, parallel, training
from babylm.config import DistillationSection, HiddenSection, ModelSection, MoEPModelSection, TeacherEntry, fixed
from babylm.distillation import Distiller, Teacher

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


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, write_yaml, teachers):
    """run.yaml (a student with two teachers' logits and states, on a corpus without token store), moep.yaml, plain.yaml."""
    folder = tmp_path_factory.mktemp("processes")
    shutil.copytree(corpus, folder / "corpus", ignore=shutil.ignore_patterns("tokens"))
    llama, gpt2 = teachers("llama", "gpt2")
    plain = {"name": "x", "output": str(folder / "models"), **SETTINGS, "data": {"corpus": str(folder / "corpus"), **SETTINGS["data"]}}
    write_yaml(folder / "plain.yaml", plain)
    write_yaml(folder / "run.yaml", {**plain, "distillation": {**TERMS, "teachers": [{"path": str(llama), "weight": 2}, {"path": str(gpt2)}]}})
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
    saves = training.save_file
    training.save_file = lambda tensors, path: (os.write(1, f"WROTE {path}\n".encode()), saves(tensors, path))


def both(*functions):
    return lambda rank: [function(rank) for function in functions]


def require_same_run(run, expected):
    """Every row, file and weight of an uninterrupted run on one process. Adam's first steps magnify rounding, hence 1e-4."""
    for kind in ("train", "eval", "milestone"):
        ours, theirs = rows(run, kind), rows(expected, kind)
        assert [(row["step"], row["words"], row.get("name")) for row in ours] == [(row["step"], row["words"], row.get("name")) for row in theirs]
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


def test_four_processes_then_one_then_two_train_what_one_does(home, one, on_processes):
    """Stopped by a signal to a single process each time. Four processes begin with nothing built."""
    run, built = home / "models" / "spread", home / "corpus" / "tokens"
    shutil.rmtree(built)
    begin = ["train_student", "--config", home / "run.yaml", "name=spread"]
    logs = on_processes(4, *begin, "training.per_device_batch_size=1", before=both(watch_writes, stop_at(4, of=4)), codes=[75])
    assert sum(len(re.findall(r"^tokenised ", log, re.M)) for log in logs) == 2, "training and validation text, once each"
    for rank, log in enumerate(logs[1:], 1):
        wrote = re.findall(r"^WROTE (.*)", log, re.M)
        assert [path for path in wrote if f"rng_state_{rank}." not in path and not re.search(r"/\.checkpoint-\d+\.tmp(/checkpoint-\d+)?$", path)] == []
    assert len(rows(run, "train")) == 4 and "metrics.jsonl" in logs[0] and "trained.safetensors" in logs[0]
    assert {path.name for path in (run / "checkpoint-4").glob("rng*")} == {f"rng_state_{rank}.pth" for rank in range(4)}
    on_processes(1, *begin, before=stop_at(8, of=1), codes=[75])
    on_processes(2, *begin, "training.per_device_batch_size=2", "training.gradient_checkpointing=true")
    require_same_run(run, one)


def test_sharded_weights_train_what_whole_ones_do(home, one, on_processes):
    """Student, projections and teachers in two parts, then whole on one process, then in four parts, as accelerate's launcher asks for."""
    run = home / "models" / "sharded"
    begin = ["train_student", "--config", home / "run.yaml", "name=sharded"]
    sharded = []

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
