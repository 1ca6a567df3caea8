"""The benchmarks run, write what they promise, and stop where two ways that should agree do not."""

import json
import sys

import pytest
import torch

from babylm import losses
from benchmarks import loss, measure, moep, ppo, run, step
from modeling_moep import Routing


@pytest.fixture
def quick(tmp_path, monkeypatch, capsys):
    """quick(module, *arguments) -> (its JSON, what it printed)."""

    def call(module, *arguments):
        file = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, "--quick", "--json", str(file), *arguments])
        module.main()
        return json.loads(file.read_text()), capsys.readouterr().out

    return call


def test_loss(quick):
    result, said = quick(loss)
    assert result.keys() == {"environment", "time", "memory", "bars"}
    assert {(row["job"], row["way"], row["precision"]) for row in result["time"]} >= {
        (job, way, precision) for job in ("CE + KL", "KL", "CE") for way in ("plain", "fused") for precision in ("fp32", "bf16")}
    assert all(row["seconds"] > 0 and row["error"].keys() == {"loss", "states", "head"} for row in result["time"])
    assert [row["way"] for row in result["memory"]] == ["plain", "fused"] and all(row["bytes"] > 0 for row in result["memory"])
    assert ("Liger: not installed" in said) == loss.missing("Liger")
    assert {"torch", "transformers", "cpu", "threads", "load", "device"} <= result["environment"].keys()


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_loss_stops_where_the_ways_differ(quick, monkeypatch, wrong):
    right = losses.fused_linear_distillation

    def broken(states, *arguments, **options):
        terms = right(states, *arguments, **options)
        return terms._replace(loss=terms.loss * 1.001 if wrong == "loss" else terms.loss + 0.1 * (states - states.detach()).sum())

    monkeypatch.setattr(losses, "fused_linear_distillation", broken)
    with pytest.raises(SystemExit, match="not equal: CE [+] KL, fused"):
        quick(loss)


def test_step(quick):
    result, _ = quick(step)
    assert result.keys() == {"environment", "shape", "precision", "steps", "ablations", "speedups"}
    rows = {row["way"]: row for row in result["steps"]}
    assert list(rows) == list(step.WAYS)
    assert rows["cached"]["loss"] == rows["online"]["loss"]
    assert rows["online"]["teacher_share"] > rows["cached"]["teacher_share"] > rows["CE only"]["teacher_share"] == 0
    assert all(row["seconds"] > 0 and row["tokens_per_s"] > 0 for row in rows.values())
    assert {row["what"] for row in result["ablations"]} == {"precision", "attention", "2 micro-batches", "AdamW update alone"}
    assert {"online / cached", "online, plain loss / cached", "cached / CE only"} <= result["speedups"].keys()


@pytest.mark.parametrize("part", ["plain loss", "cache"])
def test_step_stops_where_the_ways_differ(quick, monkeypatch, part):
    if part == "plain loss":
        right = step.plain_loss
        monkeypatch.setattr(step, "plain_loss", lambda *arguments: 1.01 * right(*arguments))
    else:
        stored = step.teacher_cache._bytes
        monkeypatch.setattr(step.teacher_cache, "_bytes", lambda values, dtype: stored(values.flip(0), dtype))
    with pytest.raises(SystemExit, match="not equal"):
        quick(step)


def test_ppo(quick):
    result, said = quick(ppo, "--judge")
    assert result["difference"] < 1e-4 and set(result["seconds"]) == {*ppo.PHASES, "plain update"}
    assert "completions/s" in said and "is not in the asked-for form" in said  # a judge of random weights


def test_ppo_stops_where_the_updates_differ(quick, monkeypatch):
    right = ppo.ours
    monkeypatch.setattr(ppo, "ours", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(SystemExit, match="differ by 0.01 of their norm"):
        quick(ppo)


def test_the_presets_teachers_take_two_thirds_of_the_step():
    """As GPT-2 Large does when it teaches GPT-2 Small."""
    for preset in ("cpu", "gpt2"):
        shape = step.PRESETS[preset]

        def forward(layers, width, _, shape=shape):  # Kaplan et al.: 12 layers width^2 and the head; attention scores
            return 2 * (12 * layers * width**2 + shape.vocabulary * width) + 4 * shape.seq_len * width * layers

        teacher, student = forward(*shape.teacher), 3 * forward(*shape.student)
        assert teacher / (teacher + student) == pytest.approx(0.67, abs=0.03), preset


def test_moep(quick):
    result, said = quick(moep)
    assert [(row["part"], row["way"]) for row in result["rows"]] == [
        (part, way) for part in ("body", "whole") for way in ("plain loop", "... one-call GELU", "loop", "grouped", "dense", "GPT-2")]
    rows = {row["way"]: row for row in result["rows"] if row["part"] == "body"}
    assert [rows[way]["host_reads"] for way in ("plain loop", "loop", "grouped", "dense")] == [8, 4 + 2, 2, 0]  # 2: how many queries
    assert rows["dense"]["operations"] < rows["grouped"]["operations"] < rows["loop"]["operations"] < rows["plain loop"]["operations"]
    assert all(row["ms"] > 0 and row["tokens_per_s"] > 0 for row in result["rows"])
    assert "fastest expert path here" in said


@pytest.mark.parametrize("path", ["loop", "grouped", "dense"])
def test_moep_stops_where_the_ways_differ(quick, monkeypatch, path):
    right = Routing.combine
    monkeypatch.setattr(Routing, "combine", lambda self, rows: right(self, rows) * (1.01 if self.path == path else 1.0))
    with pytest.raises(SystemExit, match=f"not equal: {path} differs"):
        quick(moep)


def test_run(quick, monkeypatch, warm_python):
    monkeypatch.setattr(sys, "executable", str(warm_python))
    result, said = quick(run)
    assert [row["way"] for row in result["ways"]] == ["CE baseline", "student, online", "student, cached"]
    baseline, online, cached = result["ways"]
    assert baseline["reached"]["step"] == 4 and baseline["final_ce"] == result["target"]
    assert baseline["seconds"] == pytest.approx(baseline["stage_1"] + baseline["reached"]["wall"])
    assert cached["capture"] > 0 == online["capture"]
    assert cached["final_ce"] == pytest.approx(online["final_ce"], rel=1e-3)
    assert "steps to target" in said


def test_run_stops_where_the_cached_student_is_another(quick, monkeypatch):
    def stage(script, *arguments, metrics=None):
        return run.Process(1.0, 1.0, [{"step": 2, "ce": 3.0 + ("name=cached" in arguments), "wall": 1.0, "cpu": 1.0}])

    monkeypatch.setattr(run, "stage", stage)
    with pytest.raises(SystemExit, match="not equal: the cached student"):
        quick(run)


def test_a_stage_that_fails_ends_the_run_with_its_output():
    with pytest.raises(SystemExit, match="boom"):
        run.stage("-c", "raise ValueError('boom')")


def test_peak_memory_is_what_was_held_at_once():
    """40 MB and then 80 MB, the first freed before: 80, not 120; and nothing of the 200 MB that were there before."""
    def pages(megabytes):
        return torch.ones(megabytes * 250_000)

    def call():
        first = pages(40)
        del first
        return pages(80)

    held = pages(200)
    peak = measure.peak_bytes(call, "cpu") / 1e6
    del held
    assert 75 < peak < 100
