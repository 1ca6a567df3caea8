"""What a run computes, logs and leaves behind: the same whatever the accumulation and the number of processes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from babylm import models, training
from babylm.config import StudentConfig, TeacherConfig
from babylm.distillation import Distiller, Teacher
from babylm.run_folder import StopRequest
from babylm.schema import UserError, check, milestone_name, milestone_words
from custom_dataset import EvalBlocks, TokenBlocks, open_store

ROOT = Path(training.__file__).parents[1]

# A run of a second. No biases and no dropout: a bias whose gradient is zero but for rounding (GPT-2's on the keys) moves
# by a whole Adam step in a random direction, which would hide what the comparisons below are about.
SETTINGS = {
    "data": {"seq_len": 64, "eval_blocks": 30},
    "model": {"architecture": "llama", "layers": 2, "width": 32, "heads": 2, "ffn": 64, "max_positions": 64},
    "training": {"steps": 24, "batch_size": 16, "lr": 3e-3, "warmup_steps": 2, "schedule": "linear", "device": "cpu"},
    "checkpoints": {"milestones": False, "save_steps": 1000},
    "logging": {"logging_steps": 1, "eval_steps": 12},
}
MILESTONES = ["checkpoints.extra_words=[500, 1K, 2000, 2050, 2100, 1M]", "checkpoints.every_words=1500"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, write_yaml):
    """A folder with run.yaml (SETTINGS on the small corpus, output models/ beside it)."""
    folder = tmp_path_factory.mktemp("training")
    data = {"corpus": str(corpus), **SETTINGS["data"]}
    write_yaml(folder / "run.yaml", {"name": "x", "output": str(folder / "models"), **SETTINGS, "data": data})
    return folder


@pytest.fixture(scope="module")
def stage(home, in_process):
    """stage("train_student", "b", "key=value", ..., as_script=False) runs a stage in this process; returns the run folder models/b."""

    def run(script, name, *overrides, as_script=False):
        in_process(script, "--config", home / "run.yaml", f"name={name}", *overrides, as_script=as_script)
        return home / "models" / name

    return run


@pytest.fixture(scope="module")
def teacher(stage):
    """A finished teacher, wider than the students below."""
    return stage("train_teacher", "teacher", "model.width=48", "training.steps=30")


@pytest.fixture(scope="module")
def student_keys(teacher):
    return [f"distillation.teacher={teacher}", "distillation.alpha=0.3", "distillation.temperature=2"]


@pytest.fixture(scope="module")
def one_process(stage, student_keys):
    """The reference: a student with 16 sequences at once in one process."""
    return stage("train_student", "one", *student_keys, *MILESTONES)


@pytest.fixture(scope="module")
def accumulated(stage, student_keys):
    return stage("train_student", "accumulated", *student_keys, *MILESTONES, "training.per_device_batch_size=4")


@pytest.fixture(scope="module")
def two_processes(home, student_keys):
    """The same student on two real processes (gloo) as accelerate's launcher starts them, each with 2 x 4 sequences per step."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp.yaml"),
               "--num_processes", "2", "--main_process_port", "0", str(ROOT / "train_student.py"), "--config", str(home / "run.yaml"),
               "name=two", *student_keys, *MILESTONES, "training.per_device_batch_size=4"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "models" / "two"


def torchrun(home, name, *overrides):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train_student.py"),
            "--config", str(home / "run.yaml"), f"name={name}", *overrides]


def rows(run, kind):
    """Rows of metrics.jsonl; a last line that is still being written is none yet."""
    path = run / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [row for line in lines if line.endswith("\n") and (row := json.loads(line))["kind"] == kind]


def column(run, kind, name):
    return [row[name] for row in rows(run, kind)]


def state(run):
    return json.loads((run / "run" / "status.json").read_text())["state"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def milestone_folders(run):
    return {folder.name for folder in run.glob("chck_*")}


# ---- The batch ------------------------------------------------------------------------------------------------------


def student_config(corpus, output, **sections):
    values = {"name": "x", "output": str(output), **SETTINGS, "data": {"corpus": str(corpus), **SETTINGS["data"]},
              "distillation": {"teacher": "t", "alpha": 0.5}}
    return check(StudentConfig, {**values, **{name: {**values[name], **keys} for name, keys in sections.items()}}, "test")


@pytest.mark.parametrize("per_device, processes, expected", [
    (None, 1, (16, 1)), (4, 1, (4, 4)), (None, 2, (8, 1)), (4, 2, (4, 2)), (1, 16, (1, 1)),
])
def test_the_batch_is_spread_over_processes_and_micro_steps(per_device, processes, expected):
    config = student_config("c", "o", training={"per_device_batch_size": per_device})
    assert training.accumulation_steps(config, processes) == expected


@pytest.mark.parametrize("per_device, processes, words", [
    (None, 3, "multiple of the 3 processes"), (8, 4, "16 on 4 processes is 4 sequences"),
])
def test_a_batch_that_cannot_be_spread_is_an_error(per_device, processes, words):
    with pytest.raises(UserError, match=words):
        training.accumulation_steps(student_config("c", "o", training={"per_device_batch_size": per_device}), processes)


# ---- Accumulation and processes change nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("other", ["accumulated", "two_processes"])
def test_neither_accumulation_nor_processes_change_the_gradient(one_process, other, request):
    other = request.getfixturevalue(other)
    for name in ("grad_norm", "ce", "kl", "loss", "lr"):
        assert column(other, "train", name) == pytest.approx(column(one_process, "train", name), rel=2e-4), name
    ours, theirs = weights(one_process), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4), (name, (ours[name] - theirs[name]).abs().max())


@pytest.mark.parametrize("other", ["accumulated", "two_processes"])
def test_neither_accumulation_nor_processes_change_validation(one_process, other, request):
    """30 blocks do not divide into two processes' batches of 4: the last ones hold fewer, and none is counted twice."""
    for ours, theirs in zip(rows(one_process, "eval"), rows(request.getfixturevalue(other), "eval"), strict=True):
        assert theirs["ce"] == pytest.approx(ours["ce"], abs=1e-5)
        assert theirs["kl"] == pytest.approx(ours["kl"], abs=1e-5)
        assert theirs["ce_by_domain"] == pytest.approx(ours["ce_by_domain"], abs=2e-5)


@pytest.mark.parametrize("other", ["accumulated", "two_processes"])
def test_neither_accumulation_nor_processes_change_the_words(one_process, other, request):
    other = request.getfixturevalue(other)
    for kind in ("train", "eval", "milestone"):
        for name in ("step", "words", "epoch"):
            assert column(other, kind, name) == column(one_process, kind, name)
    assert column(other, "milestone", "name") == column(one_process, "milestone", "name")
    assert milestone_folders(other) == milestone_folders(one_process)


def test_two_processes_stopped_by_a_signal_leave_at_the_same_step_and_one_goes_on(home, stage, one_process, student_keys):
    """SIGTERM to the launcher; it hides the exit code 75, so the status file has to tell. The rest runs on one process."""
    run = home / "models" / "stopped"
    keys = [*student_keys, *MILESTONES, "training.per_device_batch_size=4", "logging.logging_steps=5"]
    launcher = subprocess.Popen(torchrun(home, "stopped", *keys), stdin=subprocess.DEVNULL, cwd=home,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while launcher.poll() is None and not any(row["step"] >= 5 for row in rows(run, "train")):
            time.sleep(0.01)
        launcher.send_signal(signal.SIGTERM)
        output, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    assert state(run) == "preempted", output
    assert not (run / "run" / "finished.json").exists()
    stage("train_student", "stopped", *keys)
    assert state(run) == "done"
    for kind in ("eval", "milestone"):
        assert column(run, kind, "words") == column(one_process, kind, "words")
    ce, windows = column(one_process, "train", "ce"), [(0, 1), (1, 5), (5, 10), (10, 15), (15, 20), (20, 24)]
    assert column(run, "train", "ce") == pytest.approx([np.mean(ce[a:b]) for a, b in windows], rel=2e-4)
    assert all(torch.allclose(value, weights(one_process)[name], atol=1e-4) for name, value in weights(run).items())


# ---- Words and milestones -------------------------------------------------------------------------------------------


def words_by_decoding(store, tokenizer, start, stop):
    """Words that begin in tokens start ... stop-1: text is decoded and split at white space; the store's marks are not read."""
    opened = int(store.documents["start"][np.searchsorted(store.documents["start"], start, side="right") - 1])

    def count(end):
        text = tokenizer.decode(store.ids[opened:end].astype(int), clean_up_tokenization_spaces=False)
        return len(text.replace("<s>", " ").replace("</s>", " ").split())

    return count(stop) - count(start)


def test_words_seen_are_the_words_of_the_items_seen(one_process, corpus, tokenizer):
    """More than an epoch of blocks, decoded one by one."""
    store = open_store(corpus, "train", tokenizer)
    blocks = TokenBlocks(store, 64, seed=0, items=24 * 16)
    seen, after_step = 0, []
    for item in range(len(blocks)):
        _, layout, block = blocks.locate(item)
        start = blocks.offset(layout) + 64 * block
        assert blocks[item]["input_ids"].tolist() == store.ids[start : start + 64].tolist()
        seen += words_by_decoding(store, tokenizer, start, start + 64)
        if (item + 1) % 16 == 0:
            after_step.append(seen)
    assert column(one_process, "train", "words") == after_step
    finished = json.loads((one_process / "run" / "finished.json").read_text())
    assert finished["words_seen"] == finished["ledger"]["words_seen"] == after_step[-1]


def test_every_milestone_reached_is_saved_once_at_its_step(one_process):
    words = [0, *column(one_process, "train", "words")]
    wanted = sorted({500, 1000, 2000, 2050, 2100} | set(range(1500, words[-1] + 1, 1500)))
    names = {500: "chck_500", 1000: "chck_1K", 2050: "chck_2050", 2100: "chck_2100", 1500: "chck_1500"}
    expected = [(names.get(count, f"chck_{count // 1000}K" if count % 1000 == 0 else f"chck_{count}"),
                 next(step for step, seen in enumerate(words) if seen >= count)) for count in wanted]
    milestones = rows(one_process, "milestone")
    assert [(row["name"], row["step"]) for row in milestones] == expected
    assert len({row["step"] for row in milestones}) < len(milestones), "several in one step were meant to be tested"
    assert milestone_folders(one_process) == {name for name, _ in expected}


def test_a_milestone_is_a_whole_model(one_process):
    """It holds the weights of its step: those of step 1, taken at a learning rate of 0, are the initial ones."""
    tokenizer = AutoTokenizer.from_pretrained(one_process / "chck_1K")
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    first, later = (AutoModelForCausalLM.from_pretrained(one_process / name) for name in ("chck_1K", "chck_3K"))
    assert not torch.equal(first.lm_head.weight, later.lm_head.weight)
    assert (one_process / "chck_1K" / "generation_config.json").is_file()


@pytest.mark.parametrize("words, name", [
    (1_000_000, "chck_1M"), (100_000_000, "chck_100M"), (100_000, "chck_100K"), (1_500_000, "chck_1500K"), (1_234, "chck_1234"),
])
def test_milestone_names_hold_no_dot(words, name):
    assert milestone_name(words) == name and milestone_words(name) == words


def test_the_official_milestones_are_19_for_strict_small_and_28_for_strict():
    config = student_config("c", "o", checkpoints={"milestones": True})
    small = training.milestones_between(config, 0, 100_000_000)
    assert small == [f"chck_{n}M" for n in (*range(1, 11), *range(20, 101, 10))] and len(small) == 19
    assert training.milestones_between(config, 100_000_000, 10**9) == [f"chck_{n}00M" for n in range(2, 11)]
    assert training.milestones_between(config, 1_000_000, 1_999_999) == []
    assert training.milestones_between(config, 999_999, 1_000_000) == ["chck_1M"]


def test_a_word_budget_ends_with_the_step_that_reaches_it(corpus, tmp_path, tokenizer):
    config = student_config(corpus, tmp_path, training={"steps": None, "words": 5000})
    data = training.load_data(config)
    steps = len(data.train) // 16
    assert data.train.words_through(16 * steps) >= 5000 > data.train.words_through(16 * (steps - 1))


# ---- What is logged -------------------------------------------------------------------------------------------------


def test_the_log_holds_every_term_apart(one_process):
    for row in rows(one_process, "train"):
        assert row["loss"] == pytest.approx(0.3 * row["ce"] + 0.7 * 4 * row["kl"], rel=1e-5)
        assert row.keys() >= {"step", "total_steps", "words", "epoch", "lr", "grad_norm", "tokens_per_s", "seconds"}
    assert column(one_process, "train", "step") == list(range(1, 25))


def test_a_log_line_is_the_mean_over_its_steps(one_process, stage, student_keys):
    """Steps 1, 5, 10, ...: the first line tells of step 1 alone, the next ones of all steps since."""
    sparse = stage("train_student", "sparse", *student_keys, "logging.logging_steps=5")
    ce = column(one_process, "train", "ce")
    windows = [(0, 1), (1, 5), (5, 10), (10, 15), (15, 20), (20, 24)]
    assert column(sparse, "train", "ce") == pytest.approx([np.mean(ce[a:b]) for a, b in windows], rel=1e-6)


def test_validation_is_ce_and_kl_of_the_model_itself(one_process, teacher, corpus, tokenizer):
    """Recomputed block by block with the saved models; perplexity is exp(CE) and not of the mixture."""
    store = open_store(corpus, "val", tokenizer)
    student, master = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (one_process, teacher))
    ce, kl, domains = [], [], []
    blocks = EvalBlocks(store, 64, 30)
    with torch.no_grad():
        for item in (blocks[i] for i in range(len(blocks))):
            ids = item["input_ids"][None]
            log_q = student(ids).logits[0, :-1]
            ce += F.cross_entropy(log_q, ids[0, 1:], reduction="none").tolist()
            log_q, log_p = (z.double().div(2).log_softmax(-1) for z in (log_q, master(ids).logits[0, :-1]))
            kl += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
            domains += [store.domains[d] for d in item["domains"][1:]]
    row = rows(one_process, "eval")[-1]
    assert row["ce"] == pytest.approx(np.mean(ce), abs=1e-5)
    assert row["kl"] == pytest.approx(np.mean(kl), abs=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(np.mean(ce)), rel=1e-5)
    assert row["ce_by_domain"] == pytest.approx({d: np.mean([v for v, where in zip(ce, domains, strict=True) if where == d])
                                                 for d in set(domains)}, abs=1e-5)
    finished = json.loads((one_process / "run" / "finished.json").read_text())
    assert (finished["ce"], finished["kl"], finished["perplexity"]) == (row["ce"], row["kl"], row["perplexity"])


def test_validation_runs_without_dropout_and_leaves_training_as_it_was(stage):
    """With dropout, a run that validates at every step ends with the weights of one that validates once."""
    keys = ["model.architecture=gpt2", "model.dropout=0.3", "training.steps=6"]
    often, once = stage("train_baseline", "often", *keys, "logging.eval_steps=1"), stage("train_baseline", "once", *keys)
    assert (often / "model.safetensors").read_bytes() == (once / "model.safetensors").read_bytes()
    assert column(often, "eval", "ce")[-1] == column(once, "eval", "ce")[-1]
    assert column(often, "eval", "ce")[0] != pytest.approx(column(often, "train", "ce")[0], abs=1e-6)


def test_student_and_baseline_of_one_seed_start_equal_and_of_two_do_not(one_process, student_keys, stage):
    """Same weights, same blocks: step 1 has the same CE to the last bit, although a teacher was loaded in between.

    At T = 2 the loss takes the exponentials of the CE from those of the KL, which may round otherwise.
    """
    keys = ["training.steps=1", "logging.eval_steps=1"]
    same, other = stage("train_baseline", "same", *keys), stage("train_baseline", "other", *keys, "seed=1")
    taught = stage("train_student", "taught", *student_keys, *keys, "distillation.temperature=1")
    assert column(same, "train", "ce") == column(taught, "train", "ce")
    assert column(same, "train", "ce") == pytest.approx(column(one_process, "train", "ce")[:1], rel=1e-6)
    assert column(other, "train", "ce") != column(same, "train", "ce")


def test_bf16_trains_and_keeps_fp32_weights(stage, student_keys, one_process):
    run = stage("train_student", "bf16", *student_keys, "training.precision=bf16")
    assert {value.dtype for value in weights(run).values()} == {torch.float32}
    ce = column(run, "train", "ce")
    assert ce == pytest.approx(column(one_process, "train", "ce"), rel=0.02)
    assert ce != column(one_process, "train", "ce")


# ---- What is trained ------------------------------------------------------------------------------------------------


class WithProjection(Distiller):
    """A Distiller with something of its own to train, which no term of this repository knows."""

    def __init__(self, student, teachers, section):
        super().__init__(student, teachers, section)
        self.projection = torch.nn.Linear(32, 8)

    def forward(self, input_ids, **cached):
        hidden = self.student(input_ids=input_ids, output_hidden_states=True).hidden_states[-1]
        terms = super().forward(input_ids, **cached)
        return {**terms, "loss": terms["loss"] + self.projection(hidden).square().mean()}


@pytest.fixture
def open_distillation(corpus, teacher, tmp_path):
    """(config, folder, data, teacher) of a student run of two steps that has not begun."""

    def open_it(**sections):
        sections = {"training": {"steps": 2, "precision": "bf16"}, "logging": {"eval_steps": 1},
                    "distillation": {"teacher": str(teacher)}, **sections}
        config = student_config(corpus, tmp_path / "models", **sections)
        training.start_process(config)
        folder = training.open_run(config, "train_student.py", teachers=[str(teacher)])
        data = training.load_data(config)
        return config, folder, data, Teacher.from_model(models.load_teacher(str(teacher), data.tokenizer))

    return open_it


def test_everything_trainable_is_in_the_optimizer_and_nothing_else(open_distillation):
    config, folder, data, master = open_distillation()
    module = WithProjection(models.build_model(config.model, data.tokenizer, 0), [master], config.distillation)
    trainer = training.DistillTrainer(config, folder, data, module, 2, 16, 1, StopRequest())
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [{names[id(p)]: group["weight_decay"] for p in group["params"]} for group in trainer.optimizer.param_groups]
    decay = {name: value for group in groups for name, value in group.items()}
    assert decay.keys() == set(names.values())
    assert {name for name, value in decay.items() if value == 0} == {
        name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert not {id(p) for p in master.model.parameters()} & names.keys()


def test_a_projection_is_trained_and_resumed_but_not_part_of_the_final_model(open_distillation):
    config, folder, data, master = open_distillation(checkpoints={"save_steps": 1})
    module = WithProjection(models.build_model(config.model, data.tokenizer, 0), [master], config.distillation)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    saved = []
    original = folder.rotate
    folder.rotate = lambda: (saved.append(load_file(folder.checkpoints()[-1] / "trained.safetensors")), original())
    training.train(config, folder, data, module, torch.device("cpu"))
    unchanged = [name for name, value in module.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []
    assert saved[0].keys() == before.keys()
    assert not any("projection" in name for name in weights(folder.root))


def test_the_teacher_of_a_bf16_run_computes_in_bf16(open_distillation):
    config, folder, data, master = open_distillation()
    seen = set()
    up = master.model.model.layers[0].mlp.up_proj
    up.register_forward_hook(lambda _module, _inputs, values: seen.add((values.dtype, up.training)))
    module = Distiller(models.build_model(config.model, data.tokenizer, 0), [master], config.distillation)
    training.train(config, folder, data, module, torch.device("cpu"))
    assert seen == {(torch.bfloat16, False)}


# ---- The final model ------------------------------------------------------------------------------------------------

USE_ELSEWHERE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
answers = []
for path in sys.argv[1:]:
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    inputs = tokenizer("The dog", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    answers.append({"text": tokenizer.decode(output[0]), "new": output.shape[1] - inputs.input_ids.shape[1],
                    "tied": model.config.tie_word_embeddings, "inputs": sorted(inputs)})
print(json.dumps(answers))
"""


def test_the_final_model_loads_and_generates_in_another_process_elsewhere(one_process, tmp_path):
    paths = [str(one_process), str(one_process / "chck_3K")]
    done = subprocess.run([sys.executable, "-c", USE_ELSEWHERE, *paths], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}, timeout=120)
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout.splitlines()[-1]):
        assert answer["text"].startswith("<s>The dog") and 1 <= answer["new"] <= 5
        assert answer["inputs"] == ["attention_mask", "input_ids"] and answer["tied"] is False


def test_the_root_holds_the_final_model_and_its_record(one_process, teacher):
    files = {path.name for path in one_process.iterdir() if path.is_file()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert not list(one_process.glob("checkpoint-*")) and not list(one_process.glob(".*"))
    assert state(one_process) == "done"
    finished = json.loads((one_process / "run" / "finished.json").read_text())
    assert finished["steps"] == finished["weights_from_step"] == 24
    card = (one_process / "README.md").read_text()
    assert f"{finished['words_seen']:,} words seen" in card and "weights of step 24 of 24" in card and f"{finished['ce']:.4f}" in card
    ledger = finished["ledger"]
    assert ledger["tokenizer"]["sha256"] == ledger["corpus_sha256"] and ledger["generated_words"] == 0
    assert [entry["path"] for entry in ledger["teachers"]] == [str(teacher)]
    assert ledger["teachers"][0]["ledger"]["words_seen"] > 0
    record = json.loads((one_process / "run" / "record.json").read_text())
    assert record["stage"] == "train_student.py" and record["seed"] == 0 and "torch" in record["packages"]


def test_final_best_takes_the_weights_of_the_best_validation(stage, teacher):
    """A trained model is ruined by a huge learning rate; the first step, still at a rate of 0, remains the best."""
    run = stage("train_teacher", "best", "model.init=pretrained", f"model.path={teacher}", "training.steps=4", "training.lr=1.0",
                "training.warmup_steps=3", "logging.eval_steps=1", "checkpoints.final=best")
    ce = column(run, "eval", "ce")
    assert ce[0] == min(ce) < ce[-1]
    finished = json.loads((run / "run" / "finished.json").read_text())
    assert finished["weights_from_step"] == 1 and finished["ce"] == ce[0] and finished["steps"] == 4
    assert all(torch.equal(value, weights(teacher)[name]) for name, value in weights(run).items())
    assert "weights of step 1 of 4" in (run / "README.md").read_text()
    assert "weights_from_step" in finished and "complete.json" not in os.listdir(run)


# ---- NaN ------------------------------------------------------------------------------------------------------------


def all_finite(file):
    return all(value.isfinite().all() for value in load_file(file).values())


def test_weights_that_overflow_stop_the_run_and_are_never_saved(stage, home, capsys):
    """A weight decay that multiplies every matrix by a million at each step: NaN after a few."""
    run = home / "models" / "overflow"
    keys = ["training.lr=1", "training.warmup_steps=0", "training.schedule=constant", "training.weight_decay=1e6", "training.grad_clip=0",
            "checkpoints.save_steps=1", "checkpoints.every_words=200", "logging.eval_steps=2", "checkpoints.final=best"]
    with pytest.raises(SystemExit) as ended:
        stage("train_baseline", "overflow", *keys, "checkpoints.keep=9", as_script=True)
    message = capsys.readouterr().err
    step = int(message.split("at step ")[1].split(";")[0])
    good = run / f"checkpoint-{step - 1}"
    assert ended.value.code == 1 and step > 1
    assert f"the last good checkpoint is {good}" in message and "training.lr" in message
    assert state(run) == "failed" and not (run / "run" / "finished.json").exists()
    saved = [*run.rglob("trained.safetensors"), *run.rglob("model.safetensors")]
    assert good / "trained.safetensors" in saved and len(saved) > 2
    assert all(all_finite(file) for file in saved), "NaN was saved"
    assert not (run / "model.safetensors").exists()

    with pytest.raises(UserError, match=f"the last good checkpoint is {good}"):  # not the one it went back to, long rotated away
        stage("train_baseline", "overflow", *keys, "checkpoints.keep=1", f"resume_path={run}/checkpoint-1")


def test_a_nan_at_the_first_step_says_that_there_is_no_checkpoint(stage, teacher, home, tmp_path):
    """The weights that the run starts from hold a NaN."""
    poisoned = AutoModelForCausalLM.from_pretrained(teacher)
    poisoned.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    models.save_model(poisoned, models.load_tokenizer(teacher), tmp_path)
    with pytest.raises(SystemExit) as ended:
        stage("train_teacher", "poisoned", "model.init=pretrained", f"model.path={tmp_path}", as_script=True)
    assert ended.value.code == 1
    status = json.loads((home / "models" / "poisoned" / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "at step 1; the last good checkpoint is none" in status["reason"]


# ---- Refused before anything is spent -------------------------------------------------------------------------------


def test_a_teacher_with_another_vocabulary_of_the_same_size_is_refused_before_training(stage, teacher, home, tmp_path, corpus):
    ours = models.load_tokenizer(corpus / "tokenizer")
    other = models.train_tokenizer(["zebras vex quickly jumping foxes who hum, as buzzing dwarves do"] * 50, 512, 1)
    while len(other) < len(ours):
        other.add_tokens(f"<filler{len(other)}>")
    models.save_model(AutoModelForCausalLM.from_pretrained(teacher), other, tmp_path)
    assert len(models.load_tokenizer(tmp_path)) == len(ours)
    with pytest.raises(UserError, match=r"another vocabulary than the data: 512 entries against 512.*tokenizer\.path="):
        stage("train_student", "foreign", f"distillation.teacher={tmp_path}", "distillation.alpha=0.5")
    assert not (home / "models" / "foreign").exists()


@pytest.mark.parametrize("keys, words", [
    (["training.precision=fp16"], "fp16 needs a CUDA GPU.*bf16 or fp32"),
    pytest.param(["training.device=cuda"], "torch sees no CUDA GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")),
])
def test_what_the_hardware_lacks_is_said_before_anything_is_read(stage, home, keys, words):
    with pytest.raises(UserError, match=words):
        stage("train_baseline", "hardware", "data.corpus=nowhere", *keys)
    assert not (home / "models" / "hardware").exists()


def test_adapters_need_a_pretrained_model(corpus):
    with pytest.raises(UserError, match="lora.mode: lora adapts pretrained weights"):
        check(TeacherConfig, {"name": "x", "training": {"steps": 1}, "lora": {"mode": "lora"}}, "test")
