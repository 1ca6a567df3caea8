"""Real runs of stage 4 with several teachers and every term at once: what is trained, logged, saved, resumed and refused."""

import contextlib
import copy
import io
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from babylm import models, training
from babylm.config import TeacherEntry
from babylm.distillation import Teacher
from babylm.run_folder import Preempted
from babylm.schema import Schedule, UserError
from custom_dataset import EvalBlocks, open_store

PASSING = {"seconds", "tokens_per_s"}  # what two equal runs may differ in
STEPS = 9

# No biases and no dropout in the student, for the reason that test_training.py gives.
SETTINGS = {
    "data": {"seq_len": 32, "eval_blocks": 21},
    "model": {"architecture": "llama", "layers": 3, "width": 16, "heads": 2, "ffn": 32, "max_positions": 32},
    "training": {"steps": STEPS, "batch_size": 8, "lr": 3e-3, "warmup_steps": 1, "schedule": "linear", "device": "cpu"},
    "checkpoints": {"milestones": False, "save_steps": 1000},
    "logging": {"logging_steps": 1, "eval_steps": 6},
}
SCHEDULES = {"w_ce": {"start": 1, "end": 0.4}, "w_kl": {"start": 0.5, "end": 1.5, "shape": "cosine", "until": 0.5},
             "temperature": {"start": 4, "end": 1}, "w_hidden": {"start": 0.5, "end": 0.1}, "w_contrastive": {"start": 0.05, "end": 0.2}}
TERMS = {
    **{name: SCHEDULES[name] for name in ("w_ce", "w_kl", "temperature")},
    "hidden": {"weight": SCHEDULES["w_hidden"], "normalise": True},
    "contrastive": {"weight": SCHEDULES["w_contrastive"], "dim": 8},
    "auxiliary": {"blocks": [1, 2], "weight": 0.3, "weighting": "adaptive", "dropout": 0.1, "feature_weight": 0.2},
}
COLUMNS = {"ce", "kl", "hidden", "contrastive", "aux1_ce", "aux1_kl", "aux2_ce", "aux2_kl", "aux_features"}
TEACHERS = {f"teacher{number}_{name}" for number in (1, 2) for name in ("ce", "kl")}
STEADY = "distillation.auxiliary.dropout=0"


@pytest.fixture(scope="module")
def home(tmp_path_factory, small, write_yaml):
    """A folder with run.yaml (SETTINGS on the small corpus, output models/ beside it)."""
    folder = tmp_path_factory.mktemp("terms")
    write_yaml(folder / "run.yaml", {"name": "x", "output": str(folder / "models"), **SETTINGS,
                                     "data": {"corpus": str(small), **SETTINGS["data"]}})
    return folder


@pytest.fixture(scope="module")
def entries(teachers):
    """Two teachers of different depth, width and architecture; two states of each are mapped."""
    gpt2, llama = map(str, teachers("gpt2", "llama"))
    return [{"path": gpt2, "weight": 2, "layers": {1: 1, 3: 3}}, {"path": llama, "layers": {0: 0, 2: 2}}]


@pytest.fixture(scope="module")
def all_terms(entries):
    """The overrides that switch everything on."""
    return [flow("distillation", {"teachers": entries, **TERMS})]


def flow(key, value):
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1e9).strip().removesuffix('...').strip()}"


@pytest.fixture(scope="module")
def stage(home, in_process):
    """stage("train_student", "b", "key=value", ...) runs a stage in this process; returns the run folder models/b."""

    def run(script, name, *overrides):
        in_process(script, "--config", home / "run.yaml", f"name={name}", *overrides)
        return home / "models" / name

    return run


@pytest.fixture(scope="module")
def watched(stage, home):
    """watched("b", "key=value", ...) -> what a real run of train_student had in its hands; it may end by a signal."""

    def run(name, *overrides, script="train_student", stop_at=None):
        seen = SimpleNamespace(progress=[], trainer=None, initial=None, final=None, said=io.StringIO(), preempted=None)
        train, loss, step_end = training.train, training.DistillTrainer.compute_loss, training.RunCallback.on_step_end

        def see_train(config, folder, data, distiller, device):
            seen.distiller, seen.initial = distiller, copy.deepcopy(distiller.state_dict())
            try:
                train(config, folder, data, distiller, device)
            finally:
                seen.final = copy.deepcopy(distiller.state_dict())

        def see_loss(self, *args, **kwargs):
            seen.trainer = self
            seen.progress.append(self.distiller.progress)
            return loss(self, *args, **kwargs)

        def see_step_end(self, args, state, control, **rest):
            if state.global_step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_end(self, args, state, control, **rest)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(seen.said):
            patch.setattr(training, "train", see_train)
            patch.setattr(training.DistillTrainer, "compute_loss", see_loss)
            patch.setattr(training.RunCallback, "on_step_end", see_step_end)
            try:
                stage(script, name, *overrides)
            except Preempted as stop:
                seen.preempted = str(stop)
        seen.run = home / "models" / name
        return seen

    return run


@pytest.fixture(scope="module")
def whole(watched, all_terms):
    """The reference: every term, uninterrupted."""
    return watched("whole", *all_terms)


def rows(run, kind=None):
    found = map(json.loads, (run / "run" / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in PASSING} for row in found if kind in (None, row["kind"])]


def at_step(schedule, step, steps=STEPS):
    return Schedule(**schedule).at((step - 1) / (steps - 1))


# ---- What is logged -------------------------------------------------------------------------------------------------


def test_a_train_row_holds_every_column_and_every_scheduled_value(whole):
    expected = {"kind", "step", "words", "epoch", "total_steps", "loss", "lr", "grad_norm"} | COLUMNS | TEACHERS | SCHEDULES.keys()
    for row in rows(whole.run, "train"):
        assert row.keys() == expected and all(np.isfinite(value) for name, value in row.items() if name != "kind")
    assert [row["step"] for row in rows(whole.run, "train")] == list(range(1, STEPS + 1))


def test_an_eval_row_and_the_result_hold_every_column(whole):
    for row in rows(whole.run, "eval"):
        assert row.keys() == {"kind", "step", "words", "epoch", "perplexity", "ce_by_domain"} | COLUMNS | TEACHERS
    finished = json.loads((whole.run / "run" / "finished.json").read_text())
    assert {name: finished[name] for name in COLUMNS | TEACHERS} == {name: rows(whole.run, "eval")[-1][name] for name in COLUMNS | TEACHERS}


def test_a_printed_line_shows_every_term_with_the_value_that_is_recorded(whole):
    said = whole.said.getvalue()
    for row in rows(whole.run):
        start = rf"^step +{row['step']}/" if row["kind"] == "train" else f"^  validation at step {row['step']}: "
        line = re.search(f"{start}.*$", said, re.MULTILINE)[0]
        assert {name for name in COLUMNS if f" {name} {row[name]:.4f} |" in line} == COLUMNS, line


def test_scheduled_values_are_logged_as_they_act(whole):
    """0 at the first step, 1 at the last."""
    for row in rows(whole.run, "train"):
        for name, schedule in SCHEDULES.items():
            assert row[name] == pytest.approx(at_step(schedule, row["step"])), (row["step"], name)
    first, last = rows(whole.run, "train")[0], rows(whole.run, "train")[-1]
    assert [first[name] for name in SCHEDULES] == [spec["start"] for spec in SCHEDULES.values()]
    assert [last[name] for name in SCHEDULES] == pytest.approx([spec["end"] for spec in SCHEDULES.values()])
    assert whole.progress == pytest.approx([step / (STEPS - 1) for step in range(STEPS)])


def test_the_loss_is_the_sum_of_what_is_logged_times_its_present_weight(stage, all_terms):
    run = stage("train_student", "summed", *all_terms, "distillation.auxiliary.weighting=fixed", "training.steps=4", "logging.eval_steps=4")
    for row in rows(run, "train"):
        logits = [row["w_ce"] * row[f"{of}ce"] + row["w_kl"] * row["temperature"] ** 2 * row[f"{of}kl"] for of in ("", "aux1_", "aux2_")]
        auxiliary = (logits[1] + logits[2]) / 2 + 0.2 * row["aux_features"]
        expected = logits[0] + row["w_hidden"] * row["hidden"] + row["w_contrastive"] * row["contrastive"] + 0.3 * auxiliary
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_column_is_the_mean_over_the_steps_that_computed_it(stage, entries):
    """A term whose weight has fallen to 0 is not computed any more."""
    terms = {"w_ce": 1, "w_kl": 0, "hidden": {"weight": {"start": 0.5, "end": 0, "until": 0.5}}}
    keys = [flow("distillation", {"teachers": entries, **terms}), "training.steps=8", "logging.eval_steps=8"]
    dense, sparse = stage("train_student", "dense", *keys), stage("train_student", "sparse", *keys, "logging.logging_steps=8")
    each = [row["hidden"] for row in rows(dense, "train") if "hidden" in row]
    assert len(each) == 4 and [row["w_hidden"] for row in rows(dense, "train")][4:] == [0] * 4
    first, last = rows(sparse, "train")
    assert first["hidden"] == pytest.approx(each[0]) and last["hidden"] == pytest.approx(np.mean(each[1:]), rel=1e-5)
    assert last["ce"] == pytest.approx(np.mean([row["ce"] for row in rows(dense, "train")[1:]]), rel=1e-5)


def test_a_teachers_own_ce_is_that_of_the_model_in_its_folder(whole, entries, small, tokenizer):
    blocks = EvalBlocks(open_store(small, "val", tokenizer), 32, 21)
    ids = torch.stack([blocks[item]["input_ids"] for item in range(len(blocks))])
    for number, entry in enumerate(entries, 1):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(entry["path"]).eval()(ids).logits[:, :-1]
        ce = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert [row[f"teacher{number}_ce"] for row in rows(whole.run, "eval")] == pytest.approx([float(ce)] * 2, abs=1e-4)


# ---- What is trained and kept ---------------------------------------------------------------------------------------


def expected_modules():
    """Names of what the terms add to the student."""
    names = {f"terms.hidden.projections.{teacher}.{place}" for teacher in (0, 1) for place in (0, 1)}
    names |= {"terms.contrastive.student_projection", *(f"terms.contrastive.teacher_projections.{teacher}" for teacher in (0, 1))}
    for block in (1, 2):
        names |= {f"terms.auxiliary.features.{block}.0", f"terms.auxiliary.heads.{block}"}
        names |= {f"terms.auxiliary.projections.{block}.{teacher}" for teacher in (0, 1)}
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def test_everything_that_the_terms_add_is_optimized_and_changes(whole):
    names = {id(parameter): name for name, parameter in whole.distiller.named_parameters()}
    assert {name for name in names.values() if not name.startswith("student.")} == expected_modules()
    decay = {names[id(p)]: group["weight_decay"] for group in whole.trainer.optimizer.param_groups for p in group["params"]}
    assert decay.keys() == set(names.values())
    assert {name for name, value in decay.items() if not value} == {n for n in decay if "norm" in n or n.endswith("bias")}
    assert [name for name in decay if torch.equal(whole.initial[name], whole.final[name])] == []


def test_the_final_model_holds_the_student_alone(whole, home):
    saved = load_file(whole.run / "model.safetensors")
    assert {f"student.{name}" for name in saved} == {name for name in whole.final if name.startswith("student.")}
    assert all(torch.equal(value, whole.final[f"student.{name}"]) for name, value in saved.items())


def test_teachers_are_neither_changed_nor_part_of_the_module(whole, entries):
    assert not [name for name, _ in whole.distiller.named_modules() if "teacher" in name and not name.startswith("terms.")]
    for teacher, entry in zip(whole.distiller.teachers, entries, strict=True):
        saved = load_file(f"{entry['path']}/model.safetensors")
        assert all(torch.equal(value, teacher.model.state_dict()[name]) for name, value in saved.items())
        assert not teacher.model.training and not any(parameter.requires_grad for parameter in teacher.model.parameters())


# ---- Stopped and continued ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(watched, all_terms):
    """(first part, its checkpoint's parameters, second part) of a run that SIGTERM stopped at step 4."""
    first = watched("interrupted", *all_terms, stop_at=4)
    return first, load_file(first.run / "checkpoint-4" / "trained.safetensors"), watched("interrupted", *all_terms)


def test_a_resume_checkpoint_holds_all_that_the_terms_train(interrupted):
    first, saved, _ = interrupted
    assert first.preempted.startswith(f"SIGTERM at step 4 of {STEPS}")
    assert saved.keys() == {name for name, _ in first.distiller.named_parameters()} >= expected_modules()
    assert all(torch.equal(value, first.final[name]) for name, value in saved.items())


def test_a_run_stopped_and_resumed_under_schedules_ends_bit_identical(interrupted, whole):
    _, _, second = interrupted
    assert rows(second.run) == rows(whole.run)
    assert second.final.keys() == whole.final.keys()
    assert [name for name, value in whole.final.items() if not torch.equal(value, second.final[name])] == []
    assert (second.run / "model.safetensors").read_bytes() == (whole.run / "model.safetensors").read_bytes()


def test_a_resumed_run_goes_on_with_its_schedules_where_it_was(interrupted, whole):
    first, _, second = interrupted
    assert len(first.progress) == 4 and first.progress + second.progress == whole.progress
    assert second.progress[-1] == 1


# ---- The same whatever the accumulation and the number of processes -------------------------------------------------


@pytest.fixture(scope="module")
def steady(stage, all_terms):
    return stage("train_student", "steady", *all_terms, STEADY)


@pytest.mark.parametrize("spread", ["4 x 2", "two processes"])
def test_neither_accumulation_nor_processes_change_a_run_with_every_term(spread, steady, stage, all_terms, on_two_processes, home):
    keys = [*all_terms, STEADY, "training.per_device_batch_size=2"]
    if spread == "4 x 2":
        other = stage("train_student", "accumulated", *keys)
    else:
        on_two_processes("train_student", "--config", home / "run.yaml", "name=two", *keys)
        other = home / "models" / "two"
    for ours, theirs in zip(rows(steady), rows(other), strict=True):
        compared = ours.keys() - {"kind", "ce_by_domain"} - (TEACHERS if ours["kind"] == "train" else set())  # of one sequence there
        for name in compared:
            assert theirs[name] == pytest.approx(ours[name], rel=2e-4), (ours["step"], name)
    ours, theirs = load_file(steady / "model.safetensors"), load_file(other / "model.safetensors")
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4), name


def test_hidden_states_alone_teach_on_two_processes_too(stage, entries, on_two_processes, home):
    """The untied output head then gets no gradient at all, for which DDP would wait."""
    keys = [flow("distillation", {"teachers": entries, "w_ce": 0, "w_kl": 0, "hidden": {}}), "training.steps=3", "logging.eval_steps=3"]
    one = stage("train_student", "hidden-one", *keys)
    on_two_processes("train_student", "--config", home / "run.yaml", "name=hidden-two", *keys)
    assert [row["hidden"] for row in rows(home / "models" / "hidden-two")] == pytest.approx([row["hidden"] for row in rows(one)], rel=2e-4)


# ---- Teachers -------------------------------------------------------------------------------------------------------


def test_without_teachers_stage_4_trains_what_stage_3_trains(stage):
    student, baseline = stage("train_student", "control", "distillation.alpha=1"), stage("train_baseline", "baseline")
    assert (student / "model.safetensors").read_bytes() == (baseline / "model.safetensors").read_bytes()
    assert rows(student) == rows(baseline)


def test_a_student_with_every_term_begins_with_the_weights_of_the_baseline(whole, stage):
    """What the terms add draws its random numbers after the student."""
    baseline = stage("train_baseline", "first", "training.steps=1", "logging.eval_steps=1")
    assert rows(baseline, "train")[0]["ce"] == rows(whole.run, "train")[0]["ce"]


def test_an_adapter_teaches_what_base_and_adapter_compute(stage, teachers, tokenizer):
    from peft import PeftModel

    (adapter,) = teachers("adapter")
    ids = torch.arange(5, 25)[None]
    together = PeftModel.from_pretrained(models.load_causal_lm(str(adapter.parent / "base")), adapter).eval()
    teacher = Teacher.from_model(models.load_teacher(str(adapter), tokenizer))
    with torch.no_grad():
        expected = together(input_ids=ids).logits[:, :-1]
        found = F.linear(teacher.states(ids, [teacher.depth])[teacher.depth], *teacher.head)
        with together.disable_adapter():
            base = together(input_ids=ids).logits[:, :-1]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) and not torch.allclose(base, expected, rtol=0.01, atol=0.1)
    run = stage("train_student", "adapted", f"distillation.teacher={adapter}", "distillation.alpha=0.5", "training.steps=2",
                "logging.eval_steps=2")
    assert all(row["kl"] > 0 for row in rows(run, "train"))
    recorded = json.loads((run / "run" / "identity.json").read_text())
    assert recorded["fingerprint.teacher"] == models.weights_fingerprint(str(adapter))


@pytest.mark.parametrize("changed", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_the_fingerprint_of_an_adapter_changes_with_its_base_and_with_itself(teachers, tmp_path, changed):
    (adapter,) = teachers("adapter")
    for name in ("adapter", "base"):
        shutil.copytree(adapter.parent / name, tmp_path / name)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    before = models.weights_fingerprint(str(tmp_path / "adapter"))
    assert before == models.weights_fingerprint(str(adapter)), "where base and adapter lie makes no difference"
    weights = load_file(tmp_path / changed)
    weights[next(iter(weights))].view(-1)[0] += 1
    save_file(weights, tmp_path / changed, metadata={"format": "pt"})
    assert models.weights_fingerprint(str(tmp_path / "adapter")) != before


def test_a_body_lies_where_its_entry_says_and_its_head_with_the_student(teachers, tokenizer):
    for device in (None, "meta"):
        entry = TeacherEntry(path=str(teachers("gpt2")[0]), device=device)
        teacher = Teacher.from_model(models.load_teacher(entry.path, tokenizer), entry)
        teacher.to(torch.device("cpu"))
        assert {parameter.device.type for parameter in teacher.model.transformer.h.parameters()} == {device or "cpu"}
        assert teacher.head.weight.device.type == "cpu"


def test_naming_the_device_of_a_teacher_changes_nothing_else(stage, entries, whole):
    placed = [{**entry, "device": "cpu"} for entry in entries]
    run = stage("train_student", "placed", flow("distillation", {"teachers": placed, **TERMS}))
    assert rows(run) == rows(whole.run)


# ---- Whose run it is ------------------------------------------------------------------------------------------------


def copied(entries, folder, *, louder=None):
    """The entries with copies of their teachers below `folder`; the weights of number `louder` are changed a little."""
    moved = []
    for number, entry in enumerate(entries):
        path = shutil.copytree(entry["path"], folder / f"teacher{number}")
        moved.append({**entry, "path": str(path)})
        if number == louder:
            weights = load_file(path / "model.safetensors")
            next(iter(weights.values())).view(-1)[0] += 1e-3
            save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return moved


@pytest.mark.parametrize("number, name", [(0, "fingerprint.teacher"), (1, "fingerprint.teacher2")])
def test_other_weights_of_any_teacher_make_it_another_run(whole, stage, entries, tmp_path, number, name):
    moved = copied(entries, tmp_path, louder=number)
    with pytest.raises(UserError, match=rf"holds a run with other settings:\n  {name}: '\w+' there, '\w+' now\nUse"):
        stage("train_student", "whole", flow("distillation", {"teachers": moved, **TERMS}))


def test_teachers_that_have_moved_leave_it_the_same_run(whole, stage, entries, tmp_path, capsys):
    stage("train_student", "whole", flow("distillation", {"teachers": copied(entries, tmp_path), **TERMS}))
    assert "is finished" in capsys.readouterr().out


# ---- Refused before anything is spent -------------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    ({"layers": {4: 1}}, r"layer map of .*gpt2 .*state 4.*the teacher has states 0 \.\.\. 3"),
    ({"layers": {3: 4}}, r"layer map of .*gpt2 sends state 3 to 4, but .* and the student 0 \.\.\. 3"),
])
def test_a_layer_map_beyond_a_model_is_refused_before_training(stage, entries, home, change, words):
    name = f"beyond-{next(iter(change['layers']))}"
    with pytest.raises(UserError, match=words):
        stage("train_student", name, flow("distillation", {"teachers": [{**entries[0], **change}, entries[1]], **TERMS}))
    assert not (home / "models" / name / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("blocks", [[1, 3], [4]])
def test_a_classifier_on_the_last_block_is_refused_before_training(stage, all_terms, home, blocks):
    with pytest.raises(UserError, match=r"distillation.auxiliary.blocks: of the student's 3 blocks, 1 \.\.\. 2 can have a classifier"):
        stage("train_student", f"classifiers{len(blocks)}", *all_terms, f"distillation.auxiliary.blocks={blocks}")
    assert not (home / "models" / f"classifiers{len(blocks)}" / "run" / "metrics.jsonl").exists()


def test_a_mistake_that_was_refused_before_training_can_be_mended_under_the_same_name(stage, all_terms):
    """Nothing was trained under the settings that the folder records."""
    with pytest.raises(UserError, match="distillation.auxiliary.blocks"):
        stage("train_student", "mended", *all_terms, "distillation.auxiliary.blocks=[3]")
    run = stage("train_student", "mended", *all_terms, "training.steps=1", "logging.eval_steps=1")
    assert json.loads((run / "run" / "identity.json").read_text())["distillation.auxiliary.blocks"] == [1, 2]


def test_a_second_teacher_with_another_vocabulary_is_refused_before_training(stage, entries, home, tmp_path):
    other = models.train_tokenizer(["zebras vex quickly jumping foxes who hum, as buzzing dwarves do"] * 50, 512, 1)
    moved = copied(entries, tmp_path)
    models.save_tokenizer(other, tmp_path / "teacher1")
    with pytest.raises(UserError, match="the teacher .*teacher1 has another vocabulary than the data"):
        stage("train_student", "foreign", flow("distillation", {"teachers": moved, **TERMS}))
    assert not (home / "models" / "foreign").exists()


def test_an_unfinished_teacher_among_several_is_refused(stage, entries, home, tmp_path):
    (tmp_path / "early" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match="early is an unfinished run"):
        stage("train_student", "early", flow("distillation", {"teachers": [entries[0], {"path": str(tmp_path / "early")}], **TERMS}))
    assert not (home / "models" / "early").exists()
