"""The benchmark of the evaluation runs, writes what it promises, and stops where the two ways do not agree."""

import csv
import json
import sys

import numpy as np
import pytest

from benchmarks import eval as bench
from eval import reading
from eval.scorer import Scorer

WORDS = ["the", "dog", "sees", "a", "cat", "and", "runs", "home", "now", "then"]


@pytest.fixture
def sets(tmp_path):
    """A data folder with eight items or more of each task, of texts of unlike length."""
    rng = np.random.default_rng(0)

    def text(most):
        return " ".join(rng.choice(WORDS, size=rng.integers(3, most)))

    def jsonl(name, rows):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name in ("blimp_fast/one.jsonl", "supplement_fast/two.jsonl"):
        jsonl(name, [{"UID": "one", "field": "syntax", "linguistics_term": "x", "sentence_good": f"{text(9)} good.",
                      "sentence_bad": f"{text(9)} bad."} for _ in range(12)])
    worlds = [f"Box 0 contains {text(12)}. Box 1 contains " for _ in range(2)]
    jsonl("entity_tracking_fast/regular.jsonl", [{"numops": n % 3, "input_prefix": worlds[n % 2],
                                                  "options": [f"{text(5)} {k}." for k in range(5)]} for n in range(12)])
    columns = [*reading.TEXTS, *reading.CONTROLS, *reading.EYE_TRACKING, reading.SELF_PACED, "prev_length"]
    path = tmp_path / "data" / "reading" / "reading_data.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="1.0")
        table.writeheader()
        for _ in range(8):
            table.writerow({"item": text(6), "word": "runs", "prev_item": text(5), "prev_word": "home"})
    return tmp_path / "data"


@pytest.fixture
def quick(sets, corpus, tmp_path, monkeypatch, capsys):
    """quick(*arguments, start_up=False) -> (its JSON, what it printed). Starting up takes a process of its own: once is enough."""

    def call(*arguments, start_up=False):
        if not start_up:
            monkeypatch.setattr(bench, "start_up", lambda *_: {"imports_s": 1.0, "load_s": 1.0})
        file = tmp_path / "result.json"
        given = ["--data", str(sets), "--tokenizer", str(corpus / "tokenizer"), "--json", str(file)]
        monkeypatch.setattr(sys, "argv", ["eval", "--quick", *given, *arguments])
        bench.main()
        return json.loads(file.read_text()), capsys.readouterr().out

    return call


def test_all_tasks(quick):
    result, said = quick(start_up=True)
    assert [(row["task"], row["items"], row["rounds"]) for row in result["rows"]] == [
        (task, size, rounds) for task in bench.SIZES for size, rounds in bench.QUICK_SIZES[task].items()]
    assert all(row["plain_s"] > 0 and row["ours_s"] > 0 and row["error"] < 1e-3 for row in result["rows"])
    assert result["start_up"].keys() == {"imports_s", "load_s"} and all(value > 0 for value in result["start_up"].values())
    whole = result["whole"]
    assert whole["items"] == 12 and whole["share"] == 1 and whole["compared"] == 10  # two sampled items of five options each
    assert whole["tokens"] > 4 * whole["tree_tokens"]
    assert all(f"aim: {task}" in said for task in bench.AIMS)


@pytest.mark.parametrize("task", ["blimp", "ewok", "entity_tracking", "reading"])
def test_it_stops_where_the_ways_differ(quick, monkeypatch, task):
    right = Scorer.logprobs

    def broken(self, requests, done=lambda tokens, total: None):
        for number, values in right(self, requests, done):
            yield number, values + 0.002 * (number == len(requests) - 1)

    monkeypatch.setattr(Scorer, "logprobs", broken)
    with pytest.raises(SystemExit, match=f"not equal: {task}"):
        quick("--tasks", task)


def test_every_timed_block_is_compared(quick, monkeypatch):
    """Not only the few items that are compared before the clock starts."""
    right, calls = bench.our_items, []

    def later_wrong(*arguments):
        calls.append(1)
        return right(*arguments) + (0.002 if len(calls) == 3 else 0)

    monkeypatch.setattr(bench, "our_items", later_wrong)
    with pytest.raises(SystemExit, match="not equal: blimp"):
        quick("--tasks", "blimp")
    assert len(calls) == 3


def test_the_whole_set_is_compared_where_both_answered(quick, monkeypatch):
    right = bench.measure_whole
    monkeypatch.setattr(bench, "measure_whole", lambda items, model, tokenizer, plain, *rest: right(
        items, model, tokenizer, lambda some: plain(some) + 0.002, *rest))
    with pytest.raises(SystemExit, match="not equal: entity tracking, whole"):
        quick("--tasks", "entity_tracking")


def test_answers_that_are_not_numbers_are_not_equal():
    with pytest.raises(SystemExit, match="not equal: blimp"):
        bench.require_equal("blimp", np.array([1.0, np.nan]), np.array([1.0, np.nan]))


def test_blocks_are_consecutive_and_whole():
    found = bench.blocks(list(range(11)), 4, 3, np.random.default_rng(0))
    assert sorted(found) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert bench.blocks([1, 2], 4, 3, np.random.default_rng(0)) == [[1, 2]]


def test_made_up_ewok_has_its_form():
    """Each pair of contexts twice: exchanged, and so are the targets."""
    rows = bench.made_up_ewok(288)
    assert len(rows) == 288 and len({tuple(row.values()) for row in rows}) == 288
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert (one["Context1"], one["Context2"], one["Target1"], one["Target2"]) == (
            other["Context2"], other["Context1"], other["Target2"], other["Target1"])
        assert one["Context1"] != one["Context2"] and one["Target1"] != one["Target2"]


def test_sets_that_are_missing(quick, sets, tmp_path):
    (sets / "reading").rename(tmp_path / "elsewhere")
    result, said = quick("--tasks", "ewok", "reading")
    assert {row["task"] for row in result["rows"]} == {"ewok"} and "skipped: reading, none of reading is in" in said
    with pytest.raises(bench.UserError, match="no evaluation data at .*nowhere: give --data"):
        quick("--data", str(tmp_path / "nowhere"))
