"""The word ledger: which text counts how often, what follows for the tracks of the challenge, and where it is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from babylm import ledger as ledgers
from babylm.config import RLConfig
from babylm.ledger import accounts, ledger_text, text_in_all, verdict
from custom_dataset import tokenizer_fingerprint

ROOT = Path(ledgers.__file__).parent.parent
MILLION = 1_000_000


def ledger(corpus="a", words=9 * MILLION, seen=None, before=None, tokenizer=None, base=None, teachers=(), generated=0):
    """The ledger of a run: tokenizer trained on the same text, one epoch, unless told otherwise."""
    seen = words if seen is None else seen
    return {"corpus_words": words, "corpus_sha256": corpus * 64, "words_seen": seen,
            "words_before_last_step": seen - 1000 if before is None else before, "generated_words": generated,
            "tokenizer": tokenizer or {"source": "corpus/tokenizer", "words": words, "sha256": corpus * 64},
            "base": base and {"path": "models/base", "ledger": base},
            "teachers": [{"path": f"models/t{number}", "ledger": one} for number, one in enumerate(teachers, 1)]}


def outside(path):
    return {"path": path, "ledger": None}


GPT2_TOKENIZER = {"source": "gpt2", "words": None, "sha256": None}
OLD = {"corpus_words": 9 * MILLION, "words_seen": 9 * MILLION, "tokenizer_words": 9 * MILLION, "generated_words": 0, "teachers": []}


@pytest.mark.parametrize(("record", "expected"), [
    (ledger(), "legal for strict-small"),
    (ledger(words=95 * MILLION), "legal for strict"),
    (ledger(words=101 * MILLION), "research only"),
    (ledger(teachers=[ledger(), ledger()]), "legal for strict-small"),  # taught on the same text: BabyLlama
    (ledger(teachers=[ledger(corpus="b")]), "legal for strict"),  # 18M words of text
    (ledger(teachers=[ledger(teachers=[ledger(corpus="b", words=95 * MILLION)])]), "research only"),
    (ledger(tokenizer={"source": "c/tokenizer", "words": 50 * MILLION, "sha256": "c" * 64}), "legal for strict"),
    (ledger(tokenizer=GPT2_TOKENIZER), "research only"),
    (ledger(generated=2 * MILLION), "legal for strict"),
    ({**ledger(), "teachers": [outside("gpt2-large")]}, "research only"),
    ({**ledger(), "base": outside("gpt2-large")}, "research only"),
    (ledger(teachers=[{**ledger(), "base": outside("gpt2-large")}]), "research only"),  # fine-tuned on the corpus, made elsewhere
    (OLD, "unknown"),
    (ledger(teachers=[OLD]), "unknown"),
    (ledger(words=101 * MILLION, teachers=[OLD]), "research only"),  # too much already, whatever the missing record would add
    (ledger(words=50 * MILLION, teachers=[OLD]), "unknown"),
])
def test_verdict(record, expected):
    decision, reasons = verdict(accounts(record))
    assert decision == expected
    assert [track for track, against in reasons.items() if not against] == {
        "legal for strict-small": ["strict-small", "strict"], "legal for strict": ["strict"]}.get(expected, [])


@pytest.mark.parametrize(("record", "reasons"), [
    ({**ledger(), "teachers": [outside("gpt2-large")]},
     ["teacher gpt2-large: its training text is unknown, and its distribution brings it into the budget"]),
    (ledger(teachers=[{**ledger(), "base": outside("gpt2-large")}]),
     ["base gpt2-large of teacher models/t1: its training text is unknown, and its weights bring it into the budget"]),
    (ledger(seen=95 * MILLION), ["this model: corpus: 95,000,000 words seen of a text of 9,000,000, more than 10 epochs"]),
    (ledger(words=11 * MILLION), ["11,000,000 words of text in all, above 10,000,000"]),
    (ledger(teachers=[ledger(corpus="b")]), ["18,000,000 words of text in all (2 different texts, each in full, even where they overlap)"]),
    (ledger(teachers=[OLD]), ["teacher models/t1: its record does not say corpus_sha256, words_before_last_step, tokenizer, base"]),
])
def test_reasons_name_what_and_how_much(record, reasons):
    found = verdict(accounts(record))[1]["strict-small"]
    assert len(found) == len(reasons) and all(reason in one for one, reason in zip(found, reasons, strict=True)), found


def test_the_step_that_reaches_ten_epochs_is_allowed_and_the_one_after_it_is_not():
    at = {"words": 10 * MILLION, "seen": 100 * MILLION + 2000}
    assert verdict(accounts(ledger(**at, before=100 * MILLION - 1)))[0] == "legal for strict-small"
    decision, reasons = verdict(accounts(ledger(**at, before=100 * MILLION)))
    assert decision == "research only" and "more than 10 epochs" in reasons["strict"][0]
    assert "100,002,000 words seen, above 100,000,000" in reasons["strict-small"][1]


def test_words_that_the_base_has_seen_are_repeats_and_those_of_a_teacher_are_not():
    again = ledger(seen=50 * MILLION, base=ledger(seen=50 * MILLION))
    assert "100,000,000 words seen of a text of 9,000,000" in verdict(accounts(again))[1]["strict"][0]
    taught = ledger(seen=50 * MILLION, teachers=[ledger(seen=50 * MILLION), ledger(seen=50 * MILLION)])
    assert verdict(accounts(taught))[0] == "legal for strict-small"
    base_of_teacher = ledger(seen=50 * MILLION, teachers=[ledger(base=ledger(seen=50 * MILLION))])
    assert sum(row.seen for row in accounts(base_of_teacher)) == 50 * MILLION


def test_short_runs_one_on_another_do_not_each_have_a_last_step():
    """Ten epochs, then runs of a single step: only the model's own last step may pass a limit."""
    chain = ledger(seen=90 * MILLION, before=90 * MILLION - 1000)
    assert verdict(accounts(chain))[0] == "legal for strict-small"
    for _ in range(3):
        chain = ledger(seen=1000, before=0, base=chain)
        assert verdict(accounts(chain))[0] == "research only"


def test_equal_texts_count_once_and_others_add_up():
    assert text_in_all(accounts(ledger(teachers=[ledger(), ledger(corpus="b", words=MILLION)], generated=500))) == 10 * MILLION + 500


def rewarded(generated=100_000, base=None, teachers=(), judges=()):
    """The ledger of a run of stage 6 on a base of one epoch."""
    own = ledger(words=0, seen=0, before=0, generated=generated, base=base or ledger(), teachers=teachers, tokenizer=ledger()["tokenizer"])
    return {**own, "judges": list(judges)}


def test_a_run_of_stage_6_reads_nothing_and_counts_what_it_writes():
    rows = accounts(rewarded())
    assert [row.what for row in rows if row.role == "this model"] == [] and text_in_all(rows) == 9 * MILLION + 100_000
    assert sum(row.seen for row in rows) == 9 * MILLION + 100_000 and verdict(rows)[0] == "legal for strict-small"
    assert verdict(accounts(rewarded(generated=2 * MILLION)))[0] == "legal for strict"  # 11M words of text
    assert verdict(accounts(rewarded(teachers=[ledger(corpus="b")])))[0] == "legal for strict"  # a reward model's text reaches it


@pytest.mark.parametrize(("judge", "legal"), [
    ("meta-llama/Llama-3.1-8B-Instruct", True), ("meta-llama/Meta-Llama-3.1-8B-Instruct", True), ("meta-llama/Llama-3.2-1B-Instruct", True),
    ("meta-llama/Llama-3.2-3B-Instruct", True), ("Qwen/Qwen3-8B", True), ("Qwen/Qwen2.5-0.5B-Instruct", True), ("Qwen/Qwen3.5-9B", True),
    ("Qwen/Qwen1.5-1.8B-Chat", True), ("Qwen/Qwen3-4B-Instruct-2507", True), ("Qwen3-8B", True),
    ("Qwen/Qwen2.5-14B-Instruct", False), ("Qwen/Qwen3-30B-A3B", False), ("Qwen/Qwen1.5-MoE-A2.7B", False), ("Qwen/Qwen3-8B-A80B", False),
    ("meta-llama/Llama-3.1-70B-Instruct", False), ("meta-llama/Llama-3.1-8B", False), ("meta-llama/Llama-3.2-11B-Instruct", False),
    ("gpt-4o", False), ("openai/gpt-4o", False), ("someone/Llama-3.1-8B-Instruct-gpt4-distill", False), ("someone/Qwen3-8B", False),
    ("someone/Llama-3.1-8B-Instruct", False), ("meta-llama/Llama-3.1-8B-Instruct-v2", False), ("meta-llama/Llama-3x1-8B-Instruct", False),
    ("my/meta-llama/Llama-3.1-8B-Instruct", False), ("meta-llama/Llama-3.1-8B-Instruct\n", False), ("", False)])
def test_rewards_are_for_approved_teachers_to_give(judge, legal):
    """By the whole official name: what others made of an approved model, or call like one, is another model."""
    decision, reasons = verdict(accounts(rewarded(judges=[{"path": judge, "hub": judge}])))
    assert (decision == "legal for strict-small") is legal
    assert legal or f"rewards of {judge}: not known to be an approved teacher" in reasons["strict"][0]


@pytest.mark.parametrize("path", ["models/student-Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"])
def test_only_the_judges_own_name_approves_it(path):
    """Neither the name of a base that it judged, nor that of a folder."""
    judged = {**rewarded(judges=[{"path": "openai/gpt-4o", "hub": "openai/gpt-4o"}])}
    later = {**ledger(words=0, seen=0, before=0, generated=1000), "base": {"path": path, "ledger": judged}}
    [row] = [row for row in accounts(later) if row.role == "judge"]
    assert row.what == f"base {path}: rewards of openai/gpt-4o" and row.judge == "openai/gpt-4o"
    assert verdict(accounts(later))[0] == "research only"
    assert verdict(accounts(rewarded(judges=[{"path": path, "hub": None}])))[0] == "research only"


def test_judges_of_older_records_are_names_if_they_have_an_organisation():
    for judge, decision in (("Qwen/Qwen3-8B", "legal for strict-small"), ("Qwen3-8B", "research only")):
        assert verdict(accounts(rewarded(judges=[judge])))[0] == decision


def test_a_folder_is_the_hub_model_that_its_place_in_the_cache_says_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = "hub/models--Qwen--Qwen3-8B/snapshots/0123abc"
    for folder in ("Qwen/Qwen3-8B", "Qwen3-4B", cached, "hub/models--Qwen--Qwen3-8B/other/0123abc", "models/run"):
        Path(folder).mkdir(parents=True)
    named = {"Qwen/Qwen3-8B": None, "Qwen3-4B": None, "./Qwen3-4B": None, cached: "Qwen/Qwen3-8B", str(tmp_path / cached): "Qwen/Qwen3-8B",
             "hub/models--Qwen--Qwen3-8B/other/0123abc": None, "models/run": None, "Qwen/Qwen3-4B": "Qwen/Qwen3-4B", ".": None, "/": None}
    assert {path: ledgers._hub_name(path) for path in named} == named
    base = {"kind": "judge"}
    config = RLConfig(**{"name": "r", "model": {"path": "models/run"}, "training": {"steps": 1}, "rewards": [
        {**base, "model": "Qwen/Qwen3-8B"}, {**base, "model": "Qwen/Qwen3-8B", "server": "http://localhost:1/v1"}]})
    assert ledgers.rl_ledger(config, "f")["judges"] == [{"path": "Qwen/Qwen3-8B", "hub": None},
                                                        {"path": "Qwen/Qwen3-8B", "hub": "Qwen/Qwen3-8B"}]


def test_the_table_says_what_is_unknown_and_never_a_number_for_it():
    shown = ledger_text({**ledger(), "teachers": [outside("gpt2-large")]})
    assert "| teacher gpt2-large | unknown | - | - |" in shown and "at least 9,000,000" in shown
    assert "| this model: corpus | 9,000,000 | 9,000,000 | aaaaaaaa |" in shown and "Verdict: **research only**" in shown
    assert "- not shown to be legal for strict: teacher gpt2-large" in shown
    assert "not shown" not in ledger_text(ledger())


# ---- From real runs -----------------------------------------------------------------------------------------------------


KEYS = {"model": {"layers": 1, "width": 16, "heads": 2, "max_positions": 32}, "training": {"steps": 3, "batch_size": 4, "warmup_steps": 1},
        "logging": {"logging_steps": 3, "eval_steps": 3}, "checkpoints": {"extra_words": [50]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_yaml, in_process, small):
    """run("train_student", "name", "key=value", ...) -> (folder, ledger) of a run of three steps on the folder `small`."""
    home = tmp_path_factory.mktemp("ledger")
    config = write_yaml(home / "run.yaml", {"output": str(home / "models"), **KEYS,
                                            "data": {"corpus": str(small), "seq_len": 16, "eval_blocks": 4}})

    def train(script, name, *overrides):
        in_process(script, "--config", config, f"name={name}", *overrides)
        return home / "models" / name, json.loads((home / "models" / name / "run" / "finished.json").read_text())["ledger"]

    return train


@pytest.fixture(scope="module")
def student(run):
    teacher, _ = run("train_teacher", "teacher")
    return run("train_student", "student", f"distillation.teacher={teacher}", "distillation.alpha=0.5")


def test_a_real_run_follows_its_teacher_and_its_tokenizer_to_their_texts(student, corpus, small):
    folder, record = student
    words = {path.name: json.loads((path / "manifest.json").read_text())["parts"]["train"] for path in (corpus, small)}
    rows = accounts(record)
    assert [row.what.split(":")[0] for row in rows] == ["this model"] * 2 + [f"teacher {folder.parent / 'teacher'}"] * 2
    assert [(row.words, row.sha256) for row in rows] == [(words[name]["words"], words[name]["sha256"]) for name in ("small", "corpus") * 2]
    assert text_in_all(rows) == words["corpus"]["words"] + words["small"]["words"]  # the tokenizer's text is another, larger one
    assert verdict(rows)[0] == "legal for strict-small" and 0 < record["words_before_last_step"] < record["words_seen"]
    card = (folder / "README.md").read_text()
    assert ledger_text(record) in card and "Verdict: **legal for strict-small**" in card


def test_the_command_prints_the_ledger(student, tmp_path, warm_python):
    folder, record = student

    def call(python, *arguments):
        return subprocess.run([python, "-m", "babylm.hub", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
                              env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120)

    done = call(sys.executable, folder)
    assert done.returncode == 0 and ledger_text(record) in done.stdout, done.stderr
    done = call(warm_python, folder, tmp_path)
    assert done.returncode == 1 and f"error: {tmp_path} is no finished run" in done.stderr and "Traceback" not in done.stderr


def test_a_base_is_followed_and_one_without_a_record_is_outside(run, student, teachers):
    folder, _ = student
    again, record = run("train_teacher", "again", "model.init=pretrained", f"model.path={folder}")
    assert record["base"]["ledger"]["teachers"][0]["path"].endswith("teacher")
    assert sum(row.seen for row in accounts(record)) == record["words_seen"] + record["base"]["ledger"]["words_seen"]
    _, record = run("train_teacher", "foreign", "model.init=pretrained", f"model.path={teachers('gpt2')[0]}")
    assert verdict(accounts(record))[0] == "research only"


def test_a_milestone_is_followed_to_its_run(student, run):
    folder, record = student
    metrics = folder / "run/metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text('{"kind": "tra\n' + whole)  # what a kill in the middle of a line leaves
    _, taught = run("train_student", "early", f"distillation.teacher={folder / 'chck_50'}", "distillation.alpha=0.5")
    milestone = json.loads(next(line for line in whole.splitlines() if '"chck_50"' in line))
    by_then = {"words_seen": milestone["words"], "words_before_last_step": milestone["words"]}
    assert taught["teachers"][0]["ledger"] == {**record, **by_then} and 50 <= milestone["words"] < record["words_seen"]


def test_a_tokenizer_is_believed_only_with_its_own_fingerprint(student, small, tokenizer):
    folder, record = student
    mine = tokenizer_fingerprint(tokenizer)
    for path in (small / "tokenizer", folder, folder / "chck_50"):
        assert ledgers.tokenizer_text(str(path), mine) == record["tokenizer"]
        assert ledgers.tokenizer_text(str(path), "another")["words"] is None
    assert ledgers.tokenizer_text("gpt2", mine) == {"source": "gpt2", "words": None, "sha256": None}
