"""A student taught from stored states is the one taught online; a cache that does not fit, or is not whole, is never read."""

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from babylm import models, teacher_cache, training
from babylm.config import StudentConfig
from babylm.distillation import Teacher
from babylm.run_folder import Preempted
from babylm.schema import UserError, load
from custom_dataset import tokenizer_fingerprint

ROOT = Path(training.__file__).parents[1]
PASSING = {"seconds", "tokens_per_s"}  # what two equal runs may differ in

# 14 steps of 8 blocks are more than two epochs, and blocks do not divide into batches. Dropout, so that a teacher that
# drew random numbers, or did not, would change the student.
SETTINGS = {
    "data": {"seq_len": 64, "eval_blocks": 11, "offset_cycle": 1},
    "model": {"layers": 2, "width": 16, "heads": 2, "max_positions": 64, "dropout": 0.1},
    "training": {"steps": 14, "batch_size": 8, "lr": 3e-3, "warmup_steps": 2, "device": "cpu"},
    "checkpoints": {"milestones": False, "save_steps": 1000},
    "logging": {"logging_steps": 1, "eval_steps": 7},
    "distillation": {"w_ce": 0.5, "w_kl": 1, "temperature": {"start": 3, "end": 1}},
}
LAYERS = {"gpt2": {1: 1, 3: 2}, "llama": {0: 0, 2: 2}}  # gptj: last -> last
TERMS = ["distillation.hidden={weight: 0.5, normalise: true}", "distillation.contrastive={dim: 8}",
         "distillation.auxiliary={blocks: [1], feature_weight: 0.1, dropout: 0}"]
ALL = ("gpt2", "llama", "gptj")
CASES = {  # teachers, offset_cycle, other settings
    "one": (["gpt2"], "null", []),
    "one-bf16": (["llama"], 2, ["training.precision=bf16"]),
    "adapter": (["adapter"], 1, []),
    "three": (ALL, 1, ["distillation.combine=probabilities"]),
    "three-bf16": (ALL, "null", ["training.precision=bf16"]),
    "hidden": (ALL, 2, TERMS),
    "hidden-bf16": (ALL, 1, [*TERMS, "training.precision=bf16", "distillation.cache_dtype=fp32"]),
    "mapped": (["gpt2"], 2, TERMS[:1]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory, small, write_yaml):
    """A folder with run.yaml (SETTINGS on the small corpus); output models/ and caches/ beside it."""
    folder = tmp_path_factory.mktemp("cache")
    write_yaml(folder / "run.yaml", {"name": "x", "output": str(folder / "models"), **SETTINGS,
                                     "data": {"corpus": str(small), **SETTINGS["data"]}})
    return folder


@pytest.fixture(scope="module")
def keys(home, teachers):
    """keys("hidden") -> overrides of a case, with a cache folder of its own."""

    def overrides(case, cache=None):
        names, cycle, others = CASES[case]
        entries = [{"path": str(path), "weight": weight, **({"layers": LAYERS[name]} if name in LAYERS and TERMS[0] in others else {})}
                   for weight, (name, path) in enumerate(zip(names, teachers(*names), strict=True), 1)]
        return [f"distillation.teachers={yaml.safe_dump(entries, default_flow_style=True, width=1e9).strip()}",
                f"distillation.cache_path={cache or home / 'caches' / case}", f"data.offset_cycle={cycle}", *others]

    return overrides


@pytest.fixture(scope="module")
def capture(home, in_process):
    """capture("key=value", ...) runs `python -m babylm.teacher_cache` in this process."""
    return lambda *overrides: in_process("babylm.teacher_cache", "--config", home / "run.yaml", *overrides)


@pytest.fixture(scope="module")
def captured(home, keys, capture):
    """captured("hidden") -> the cache folder of a case, made once. Copy it before damaging it."""

    def folder(case):
        if not (home / "caches" / case).exists():
            capture(*keys(case))
        return home / "caches" / case

    return folder


def fail(*_, **__):
    raise AssertionError("a teacher was loaded or run")


@contextlib.contextmanager
def no_teacher_may_be_loaded(*allowed):
    """Nothing but models below `allowed` may be read: the student's own, for the check of what was saved."""
    load_model = models.load_causal_lm
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((models, "load_teacher"), (Teacher, "from_model"), (Teacher, "states")):
            patch.setattr(owner, name, fail)
        patch.setattr(models, "load_causal_lm", lambda path, **options: load_model(path, **options)
                      if any(Path(path).is_relative_to(folder) for folder in allowed) else fail())
        yield


@pytest.fixture(scope="module")
def train(home, in_process):
    """train("name", "key=value", ..., cached=True) -> run folder. A cached run fails if it touches a teacher's body."""

    def run(name, *overrides, cached=False):
        with no_teacher_may_be_loaded(home / "models") if cached else contextlib.nullcontext():
            in_process("train_student", "--config", home / "run.yaml", f"name={name}", f"distillation.cache={cached}".lower(), *overrides)
        return home / "models" / name

    return run


@pytest.fixture
def opened(home, monkeypatch):
    """opened("key=value", ...) -> (teachers, data) as a cached student would get them."""

    def open_it(*overrides):
        arguments = ["--config", str(home / "run.yaml"), "distillation.cache=true", *overrides]
        monkeypatch.setattr(sys, "argv", ["train_student.py", *arguments])
        config, _ = load(StudentConfig, "", "", arguments)
        data = training.load_data(config)
        return teacher_cache.open_teachers(config, data), data

    return open_it


@pytest.fixture
def blocks_run(monkeypatch):
    """A list of the batch sizes that teachers are run on from here on."""
    seen, states = [], Teacher.states
    monkeypatch.setattr(Teacher, "states", lambda self, ids, wanted: seen.append(len(ids)) or states(self, ids, wanted))
    return seen


def rows(run):
    lines = (run / "run" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in PASSING} for line in lines]


def contents(cache):
    """{relative path: bytes} of all states and heads."""
    return {file.relative_to(cache): file.read_bytes() for file in [*cache.rglob("state-*"), *cache.rglob("head.safetensors")]}


def config_of(home, *overrides):
    return load(StudentConfig, "", "", ["--config", str(home / "run.yaml"), *overrides])[0]


# ---- Cached and online are the same run -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_student_taught_from_the_cache_is_the_one_taught_online(case, keys, captured, train):
    """To the last bit with one teacher; with several the same sums may be rounded differently in the last place."""
    captured(case)
    online, cached = train(f"{case}-online", *keys(case)), train(f"{case}-cached", *keys(case), cached=True)
    assert {row["kind"] for row in rows(cached)} == {"train", "eval"} and rows(cached)[-1]["epoch"] > 2
    if len(CASES[case][0]) == 1:
        assert rows(cached) == rows(online)
        assert (cached / "model.safetensors").read_bytes() == (online / "model.safetensors").read_bytes()
        return
    for theirs, ours in zip(rows(online), rows(cached), strict=True):
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            assert ours[name] == (value if isinstance(value, str | dict) else pytest.approx(value, rel=1e-5)) or name == "ce_by_domain"


@pytest.mark.parametrize("case, layouts", [("one", [0, 1, 2]), ("hidden", [0, 1]), ("adapter", [0])])
def test_exactly_the_layouts_of_the_offset_cycle_are_captured(case, layouts, home, keys, captured):
    data = training.load_data(config_of(home, *keys(case)))
    assert data.train.blocks_per_epoch % 8 and len(data.val) % 8, "whole batches alone would not test the last one"
    for folder in captured(case).iterdir():
        described = [json.loads(file.read_text()) for file in folder.glob("*/blocks.json")]
        assert sorted(meta["offset"] for meta in described if "offset" in meta) == sorted(map(data.train.offset, layouts))
        assert len(described) == len(layouts) + 1  # and validation
    assert not list(captured(case).rglob("*.partial"))


@pytest.mark.parametrize("case, states", [("one", [{3}]), ("hidden", [{1, 3}, {0, 2}, {2}])])
def test_the_states_that_the_terms_read_are_stored_and_no_others(case, states, captured, keys, home):
    config = config_of(home, *keys(case))
    fingerprint = tokenizer_fingerprint(training.load_data(config).tokenizer)
    for entry, wanted in zip(config.distillation.entries, states, strict=True):
        root = teacher_cache.teacher_folder(config, entry, fingerprint).root
        for folder in (path.parent for path in root.glob("*/blocks.json")):
            assert {path.name for path in folder.glob("state-*")} == {f"state-{state}.bin" for state in wanted}


def test_the_cache_holds_the_states_of_the_predicted_positions_of_each_block(captured, keys, home, teachers):
    config = config_of(home, *keys("hidden"))
    data, cache = training.load_data(config), captured("hidden")
    sequences = {meta.get("offset", "val"): path.parent.name for path in cache.glob("gpt2-*/*/blocks.json")
                 if (meta := json.loads(path.read_text()))}
    last = data.train.blocks_per_epoch - 1
    for name, path in zip(ALL, teachers(*ALL), strict=True):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        (root,) = cache.glob(f"{name}-*")
        for sequence, number, ids in [(data.train.offset(0), 0, data.train.block(0, 0)), ("val", 5, data.val.block(5)),
                                      (data.train.offset(1), last, data.train.block(1, last))]:
            with torch.no_grad():
                every = model(ids[None], output_hidden_states=True).hidden_states
            for file in (root / sequences[sequence]).glob("state-*.bin"):
                expected = every[int(file.stem.split("-")[1])][0, :-1]
                stored = np.fromfile(file, np.float32).reshape(-1, 63, expected.shape[1])[number]
                assert np.allclose(stored, expected, rtol=1e-4, atol=1e-4), (name, sequence, file.name)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_states_of_half_the_size_teach_nearly_the_same(dtype, keys, capture, train, home, captured):
    cache = home / "caches" / dtype
    overrides = [*keys("mapped", cache), f"distillation.cache_dtype={dtype}", "training.steps=4", "logging.eval_steps=4"]
    capture(*overrides)
    half, whole = ({file.parent.name: file.stat().st_size for file in folder.rglob("state-3.bin")}
                   for folder in (cache, captured("mapped")))
    assert half and all(2 * size == whole[blocks] for blocks, size in half.items())
    run = train(f"half-{dtype}", *overrides, cached=True)
    exact = train(f"whole-{dtype}", *keys("mapped"), "training.steps=4", "logging.eval_steps=4")
    for ours, theirs in zip(rows(run), rows(exact), strict=True):
        for name in ("kl", "hidden", "teacher1_ce"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.02) and ours[name] != theirs[name]


def test_neither_accumulation_nor_processes_change_a_cached_run(captured, keys, train, home, on_two_processes):
    captured("hidden")
    student = ["model.architecture=llama", "model.dropout=0", *keys("hidden")]  # no biases: see test_training.py
    one = train("spread-one", *student, cached=True)
    four = train("spread-four", *student, "training.per_device_batch_size=2", cached=True)
    with no_teacher_may_be_loaded(home / "models"):
        on_two_processes("train_student", "--config", home / "run.yaml", "name=spread-two", "distillation.cache=true", *student,
                         "training.per_device_batch_size=2")
    weights = load_file(one / "model.safetensors")
    for other in (four, home / "models" / "spread-two"):
        for ours, theirs in zip(rows(one), rows(other), strict=True):
            shared = [name for name in ours if not (ours["kind"] == "train" and name.startswith("teacher"))]  # of the first sequence
            for name in shared:
                assert theirs[name] == (ours[name] if name == "kind" else pytest.approx(ours[name], rel=2e-4)), (ours["step"], name)
        found = load_file(other / "model.safetensors")
        assert all(torch.allclose(value, found[name], atol=1e-4) for name, value in weights.items())


# ---- Whose cache it is ----------------------------------------------------------------------------------------------


def test_two_seeds_share_a_cache_where_their_offsets_have_a_seed_of_their_own(keys, capture, home, opened, capsys):
    overrides = [*keys("one", home / "caches" / "seeds"), "data.offset_cycle=2", "data.offset_seed=7"]
    capture(*overrides, "seed=0")
    with no_teacher_may_be_loaded():
        capture(*overrides, "seed=1")
        (teacher,), data = opened(*overrides, "seed=1")
    assert capsys.readouterr().out.count(", complete") == 3
    layout, block = data.train.locate(5)[1:]
    (file,) = (path.with_name("state-3.bin") for path in (home / "caches" / "seeds").glob("*/*/blocks.json")
               if json.loads(path.read_text()).get("offset") == data.train.offset(layout))
    stored = np.fromfile(file, np.float32).reshape(-1, 63, teacher.width)[block]
    assert np.array_equal(data.train[5]["teacher0_state3"].numpy(), stored)
    with pytest.raises(UserError, match=r"layout \d of state 3 of .* has not been captured"):
        opened(*overrides[:-1], "seed=1")


@pytest.mark.parametrize("change, words", [
    (["data.seq_len=32"], "layout 0 of state 3 of .*gpt2 has not been captured"),
    (["data.random_chunk=false"], "layout 0 of state 3 of .*gpt2 has not been captured"),
    (["seed=1"], r"layout \d of state 3 of .*gpt2 has not been captured"),
    (["training.steps=30"], "layout 3 of state 3 of .*gpt2 has not been captured"),
    (["data.eval_blocks=5"], "validation of state 3 of .*gpt2 has not been captured"),
    (["training.precision=bf16"], r"\(with these weights, this vocabulary and precision\) are not in"),
    (["training.precision=bf16", "distillation.cache_dtype=fp32"], r"\(with these weights, this vocabulary and precision\) are not in"),
    (["distillation.cache_dtype=bf16"], r"\(with these weights, this vocabulary and precision\) are not in"),
    (["distillation.hidden={}", "distillation.teachers=[{path: PATH, layers: {1: 1}}]"], "layout 0 of state 1 of .*gpt2 has not been"),
], ids=lambda value: value[0].split("=")[0] if isinstance(value, list) else "")
def test_a_cache_of_other_blocks_precision_or_states_is_not_taken(change, words, captured, keys, opened, teachers):
    captured("one")
    opened(*keys("one"))
    change = [part.replace("PATH", str(teachers("gpt2")[0])) for part in change]
    with pytest.raises(UserError, match=words) as caught:
        opened(*keys("one"), *change)
    assert "Make it with: python -m babylm.teacher_cache --config" in str(caught.value) and change[0].split("{")[0] in str(caught.value)


def test_a_teacher_that_has_moved_keeps_its_cache_and_one_with_other_weights_does_not(captured, keys, opened, teachers, tmp_path):
    captured("one")
    moved = shutil.copytree(teachers("gpt2")[0], tmp_path / "gpt2")
    opened(*keys("one"), f"distillation.teachers=[{{path: {moved}}}]")
    weights = load_file(moved / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"\(with these weights, this vocabulary and precision\) are not in"):
        opened(*keys("one"), f"distillation.teachers=[{{path: {moved}}}]")


def test_the_cache_of_another_vocabulary_is_not_taken(captured, keys, opened, teachers, tmp_path):
    """The same weights under another tokenizer, on the same text tokenised with that."""
    captured("one")
    other = models.train_tokenizer(["zebras vex quickly jumping foxes who hum, as buzzing dwarves do"] * 50, 512, 1)
    folder = shutil.copytree(teachers("gpt2")[0], tmp_path / "gpt2")
    models.save_tokenizer(other, folder)
    with pytest.raises(UserError, match=r"\(with these weights, this vocabulary and precision\) are not in"):
        opened(*keys("one"), f"distillation.teachers=[{{path: {folder}}}]", f"data.tokenizer={folder}")


def test_an_adapter_on_another_base_has_another_cache(captured, keys, opened, teachers):
    (adapter,) = teachers("adapter")
    captured("adapter")
    opened(*keys("adapter"))
    file, before = adapter.parent / "base" / "model.safetensors", (adapter.parent / "base" / "model.safetensors").read_bytes()
    try:
        weights = load_file(file)
        weights["transformer.ln_f.bias"] += 1e-3
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="with these weights"):
            opened(*keys("adapter"))
    finally:
        file.write_bytes(before)


# ---- A cache that is not whole --------------------------------------------------------------------------------------


@pytest.fixture
def copied(captured, tmp_path):
    """copied("one") -> a copy of a case's cache."""
    return lambda case: Path(shutil.copytree(captured(case), tmp_path / "cache"))


def test_a_cache_that_was_cut_short_is_refused_by_name_and_size(copied, keys, train, home):
    cache = copied("one")
    file = max(cache.rglob("state-3.bin"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(UserError, match=re.escape(f"{file} is cut short: {size - 1:,} bytes instead of {size:,}. Make it with: python -m")):
        train("short", *keys("one", cache), cached=True)
    assert not (home / "models" / "short" / "run" / "metrics.jsonl").exists()


def test_a_state_that_was_captured_in_part_is_refused(copied, keys, opened):
    cache = copied("one")
    file = next(cache.rglob("state-3.bin"))
    file.rename(file.with_suffix(".partial"))
    with pytest.raises(UserError, match=r"of state 3 of .*gpt2 has not been captured \(or not to its end\)"):
        opened(*keys("one", cache))


@pytest.mark.parametrize("name", ["head.safetensors", "meta.json"])
def test_a_cache_without_its_head_is_refused(copied, keys, opened, name):
    cache = copied("one")
    next(cache.rglob(name)).unlink()
    with pytest.raises(UserError, match="are not in"):
        opened(*keys("one", cache))


def test_a_whole_cache_is_not_made_again(captured, keys, capture, capsys):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in captured("hidden").rglob("*") if file.is_file()}
    capsys.readouterr()
    with no_teacher_may_be_loaded():
        capture(*keys("hidden"))
    assert capsys.readouterr().out.count(", complete") == 9  # three teachers, two layouts and validation
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in captured("hidden").rglob("*") if file.is_file()}


def test_a_file_that_was_lost_is_made_again_alone(copied, captured, keys, capture, blocks_run):
    cache = copied("mapped")
    lost = max(cache.rglob("state-1.bin"), key=lambda path: path.stat().st_size)
    count = json.loads((lost.parent / "blocks.json").read_text())["blocks"]
    lost.unlink()
    capture(*keys("mapped", cache))
    assert sum(blocks_run) == count and contents(cache) == contents(captured("mapped"))


# ---- Stopped and continued ------------------------------------------------------------------------------------------


@pytest.fixture
def stop_capture(home, in_child):
    """stop_capture(SIGTERM, 3, "key=value", ...) -> what a capture left behind that got the signal in its third batch."""

    def stop(number, batch, *overrides):
        def work():
            states, calls = Teacher.states, itertools.count(1)

            def count(self, ids, wanted):
                if next(calls) == batch:
                    os.kill(os.getpid(), number)
                return states(self, ids, wanted)

            Teacher.states = count
            sys.argv = ["teacher_cache.py", "--config", str(home / "run.yaml"), *overrides]
            teacher_cache.main()

        return in_child(work)

    return stop


def test_a_capture_stopped_by_sigterm_exits_with_75_and_goes_on_where_it_was(stop_capture, keys, captured, capture, tmp_path, blocks_run,
                                                                            home):
    data = training.load_data(config_of(home, *keys("mapped")))
    count = data.train.blocks_per_epoch
    done = stop_capture(signal.SIGTERM, 3, *keys("mapped", tmp_path))
    assert done.returncode == 75, done.stdout + done.stderr
    assert f"preempted: SIGTERM after 24 of {count} blocks; the same command continues there" in done.stdout
    assert {file.name for file in tmp_path.rglob("state-*")} == {"state-1.partial", "state-3.partial"}
    capture(*keys("mapped", tmp_path))
    assert sum(blocks_run) == 2 * count + len(data.val) - 24
    assert contents(tmp_path) == contents(captured("mapped"))


def test_a_capture_killed_half_way_goes_on_from_the_last_batch_that_every_state_has(stop_capture, keys, captured, capture, tmp_path,
                                                                                  blocks_run, home):
    """One of two files ends in the middle of a block."""
    data = training.load_data(config_of(home, *keys("mapped")))
    assert stop_capture(signal.SIGKILL, 5, *keys("mapped", tmp_path)).returncode == -9
    (ragged,) = tmp_path.rglob("state-1.partial")
    assert ragged.stat().st_size > 25 * 63 * 24 * 4
    os.truncate(ragged, 20 * 63 * 24 * 4 + 100)
    capture(*keys("mapped", tmp_path))
    assert sum(blocks_run) == 2 * data.train.blocks_per_epoch + len(data.val) - 16
    assert contents(tmp_path) == contents(captured("mapped"))


def test_of_two_processes_that_capture_at_once_one_does_and_the_other_waits(keys, captured, tmp_path, on_two_processes, home):
    def before(rank):
        states, other = Teacher.states, tmp_path / f"rank{1 - rank}.log"

        def counted(self, ids, wanted):
            deadline = time.monotonic() + 60
            while "is capturing" not in other.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            print(f"RAN {len(ids)}")
            return states(self, ids, wanted)

        Teacher.states = counted

    cache = tmp_path / "cache"
    logs = on_two_processes("babylm.teacher_cache", "--config", home / "run.yaml", *keys("mapped", cache), before=before)
    data = training.load_data(config_of(home, *keys("mapped")))
    ran = sorted(sum(map(int, re.findall(r"RAN (\d+)", log))) for log in logs)
    assert ran == [0, 2 * data.train.blocks_per_epoch + len(data.val)]
    assert sum("another process is capturing" in log for log in logs) == 1
    assert contents(cache) == contents(captured("mapped"))


def test_a_process_that_waits_for_anothers_capture_can_be_stopped(tmp_path):
    class Stop:
        signal_name = "SIGTERM"

    with FileLock(tmp_path / "lock"), pytest.raises(Preempted, match="SIGTERM while another process captured"):
        with teacher_cache._alone(tmp_path, Stop()):
            pass


# ---- Refused before anything is spent -------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_an_error_before_a_teacher_is_loaded(keys, capture, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with no_teacher_may_be_loaded(), pytest.raises(UserError, match="needs 0.0 GB more in .*, but 0.0 GB are free: give"):
        capture(*keys("one", tmp_path / "new" / "cache"))
    assert not (tmp_path / "new").exists()


def test_only_what_is_missing_has_to_fit_on_the_disk(keys, captured, capture, stop_capture, tmp_path, monkeypatch):
    stop_capture(signal.SIGTERM, 3, *keys("mapped", tmp_path))
    whole, there = (sum(file.stat().st_size for file in folder.rglob("state-*")) for folder in (captured("mapped"), tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=whole - there - 1))
    with pytest.raises(UserError, match="the teacher cache needs"):
        capture(*keys("mapped", tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=whole - there))
    capture(*keys("mapped", tmp_path))


def test_states_that_fp16_cannot_hold_are_refused_and_fit_bf16(keys, capture, teachers, tmp_path):
    loud = shutil.copytree(teachers("gpt2")[0], tmp_path / "loud")
    weights = load_file(loud / "model.safetensors")
    weights["transformer.ln_f.weight"] *= 1e6
    save_file(weights, loud / "model.safetensors", metadata={"format": "pt"})
    overrides = [*keys("one", tmp_path / "cache"), f"distillation.teachers=[{{path: {loud}}}]", "data.offset_cycle=1"]
    with pytest.raises(UserError, match=r"does not fit fp16 \(infinite or NaN\): use distillation.cache_dtype=bf16 or fp32"):
        capture(*overrides, "distillation.cache_dtype=fp16")
    assert not list((tmp_path / "cache").rglob("*.bin"))
    capture(*overrides, "distillation.cache_dtype=bf16")
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 2


def test_a_config_without_a_teacher_has_nothing_to_cache(capture):
    with pytest.raises(UserError, match="no teacher, so there is nothing to cache"):
        capture("distillation.w_kl=0")


def test_a_layer_map_beyond_the_teacher_is_an_error_before_it_is_loaded(capture, teachers, tmp_path):
    with no_teacher_may_be_loaded(), pytest.raises(UserError, match=r"layer map of .*gpt2 .*states 0 \.\.\. 3"):
        capture(f"distillation.teachers=[{{path: {teachers('gpt2')[0]}, layers: {{4: 2}}}}]", "distillation.hidden={}",
                f"distillation.cache_path={tmp_path}")


# ---- The command in the message -------------------------------------------------------------------------------------


def test_the_command_in_the_message_makes_the_cache_when_it_is_copied(train, keys, home, teachers, warm_python):
    """Pasted into a shell, word for word: with spaces, brackets and flags of the stage itself."""
    overrides = [*keys("one", home / "a cache"), "data.offset_cycle=1", "training.steps=2", "logging.eval_steps=2"]
    with pytest.raises(UserError) as caught:
        train("pasted", *overrides, "fresh=true", cached=True)
    command = re.search("Make it with: (python -m babylm.teacher_cache .*)", str(caught.value))[1]
    path = f"{warm_python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("cache      complete\n"), done.stdout + done.stderr
    train("pasted", *overrides, cached=True)


@pytest.mark.parametrize("resume", [["--resume_path", "models/x/checkpoint-5"], ["--resume_path=models/x/checkpoint-5"], []])
def test_the_command_in_the_message_is_one_that_the_capture_understands(resume, keys, opened, monkeypatch, home):
    """Also where the stage was resumed by hand, and where the file leaves the name to the command line."""
    (home / "nameless.yaml").write_text((home / "run.yaml").read_text().replace("name: x\n", ""))
    arguments = ["--config", str(home / "nameless.yaml"), "name=y", *keys("one"), "data.seq_len=16", *resume]
    monkeypatch.setattr(sys, "argv", ["train_student.py", *arguments])
    command = re.search("Make it with: python -m babylm.teacher_cache (.*)", teacher_cache._missing("it is gone"))[1]
    config, _ = load(StudentConfig, "", "", shlex.split(command))
    assert (config.data.seq_len, config.distillation.entries[0].path) == (16, config_of(home, *keys("one")).distillation.entries[0].path)
