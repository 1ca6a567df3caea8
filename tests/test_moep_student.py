"""Stage 5 as a user runs it: from the YAML and a teacher to a folder that loads anywhere, stopped, cached, on two processes."""

import contextlib
import importlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_moep_terms import ROUTERS, balance_by_hand, outputs

from babylm import models, plan, training
from babylm.config import ModelSection, MoEPModelSection, MoEPStudentConfig, StudentConfig, student_schema
from babylm.distillation import Teacher
from babylm.schema import UserError, check, identity
from custom_dataset import EvalBlocks, open_store
from modeling_moep import MoEPForCausalLM

ROOT = Path(training.__file__).parents[1]


# ---- Configs --------------------------------------------------------------------------------------------------------


def run(**changes):
    return {"name": "tiny", "training": {"steps": 5}, "data": {"seq_len": 8}, "distillation": {"w_ce": 1, "w_kl": 0}, **changes}


@pytest.mark.parametrize("model, messages", [
    ({"expert": 3}, ["model.expert: unknown key; did you mean experts?"]),
    ({"kv_heads": 2}, ["model.kv_heads: unknown key; "]),
    ({"experts": 0, "activation": "relu"}, ["model.experts: Input should be greater", "model.activation: Input should be 'gelu_new' or"]),
    ({"layers": 1}, ["model.layers: Input should be greater than or equal to 2"]),
    ({"width": 100, "parallel_width": 50, "experts_per_token": 5, "path": "x"}, [  # all at once, in one line
        "model: width 100 is not a multiple of heads 6; parallel_width 50 is not a multiple of parallel_heads 3; "
        "experts_per_token 5 exceeds experts 4; init: pretrained and path go together: give both or neither"]),
    ({"init": "pretrained"}, ["model: init: pretrained and path go together"]),
    ({"max_positions": 8, "sliding_window": 0}, ["model.sliding_window: Input should be greater than or equal to 1"]),
    ({"architecture": "gpt2"}, ["model.architecture: gpt2 is a student of stage 4: python train_student.py"]),
])
def test_mistakes_in_a_moep_model_are_named(model, messages):
    with pytest.raises(UserError) as caught:
        check(MoEPStudentConfig, run(model=model), "some.yaml")
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == len(messages) and all(message in line for message, line in zip(messages, lines, strict=True))


def test_balance_is_a_key_of_stage_5_alone_and_cannot_be_all_that_is_learned():
    balanced = {"w_ce": 1, "w_kl": 0, "balance": {"weight": 0.5}}
    assert check(MoEPStudentConfig, run(distillation=balanced), "y").distillation.balance.weight.start == 0.5
    assert check(MoEPStudentConfig, run(), "y").distillation.balance.weight.start == 0.01
    for schema, distillation, message in [
        (StudentConfig, balanced, "distillation.balance: unknown key"),
        (MoEPStudentConfig, {**balanced, "balance": {"wieght": 1}}, "distillation.balance.wieght: unknown key; did you mean weight?"),
        (MoEPStudentConfig, {**balanced, "balance": {"weight": -1}}, "distillation.balance.weight: must not be negative"),
        (MoEPStudentConfig, {**balanced, "w_ce": 0}, "nothing would be learned"),
    ]:
        with pytest.raises(UserError) as caught:
            check(schema, run(distillation=distillation), "some.yaml")
        assert message in str(caught.value) and str(caught.value).startswith("some.yaml: 1 mistake(s)")


def test_the_schema_of_a_student_goes_by_its_architecture():
    assert student_schema(run(model={"architecture": "moep"})) is MoEPStudentConfig
    for values in (run(), run(model={"architecture": "gpt2"}), run(model=None), run(model=[1]), {}):
        assert student_schema(values) is StudentConfig


def test_how_experts_are_computed_is_not_what_a_run_is_but_the_weight_of_balance_is():
    def keys(model=None, weight=0.01):
        values = run(model={"architecture": "moep", **(model or {})}, distillation={"w_ce": 1, "w_kl": 0, "balance": {"weight": weight}})
        return identity(check(MoEPStudentConfig, values, "y"))

    assert keys() == keys({"expert_path": "dense"}) and keys()["distillation.balance.weight"] == 0.01
    assert all(keys() != other for other in (keys(weight=0.02), keys(weight={"start": 0.01, "end": 0}), keys({"experts_per_token": 1}),
                                             keys({"parallel_width": 96}), keys({"sliding_window": 8}), keys({"activation": "swiglu"})))


def test_every_key_of_the_section_reaches_the_model(tokenizer):
    section = MoEPModelSection(layers=5, width=24, heads=3, ffn=40, parallel_width=16, parallel_heads=2, parallel_ffn=24, experts=5,
                               experts_per_token=3, activation="swiglu", sliding_window=9, tied=False, max_positions=33, dropout=0.2,
                               expert_path="dense")
    config = models.build_model(section, tokenizer, 0).config
    assert models.state_widths(config) == [24, 24, 16, 16, 16, 24]
    assert [getattr(config, name) for name in (
        "vocab_size", "num_attention_heads", "intermediate_size", "parallel_attention_heads", "parallel_intermediate_size", "num_experts",
        "num_experts_per_tok", "hidden_act", "sliding_window", "tie_word_embeddings", "max_position_embeddings", "dropout",
        "attention_dropout", "expert_path")] == [len(tokenizer), 3, 40, 2, 24, 5, 3, "swiglu", 9, False, 33, 0.2, 0.2, "dense"]


# ---- Real runs ------------------------------------------------------------------------------------------------------

PASSING = {"seconds", "tokens_per_s"}  # what two equal runs may differ in
MODEL = {"architecture": "moep", "layers": 4, "width": 16, "heads": 2, "parallel_width": 8, "parallel_heads": 2, "experts": 3,
         "experts_per_token": 2, "max_positions": 64, "dropout": 0.1}  # dropout, so that the state of the random numbers matters
SETTINGS = {
    "data": {"seq_len": 32, "eval_blocks": 21},
    "model": MODEL,
    "training": {"steps": 8, "batch_size": 8, "lr": 3e-3, "warmup_steps": 1, "device": "cpu"},
    "checkpoints": {"milestones": False, "every_words": 400, "save_steps": 1000},
    "logging": {"logging_steps": 1, "eval_steps": 4},
    "distillation": {"w_ce": 0.4, "w_kl": 0.6, "temperature": 2, "balance": {"weight": 0.1}},
}
TEXT_ALONE = "distillation={w_ce: 1, w_kl: 0, balance: {weight: 0.1}}"
ON_ITS_OWN = """
import json, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ids, found = torch.from_numpy(np.load(sys.argv[1])), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("a").input_ids
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())
    found[folder] = {"ce": float(ce), "file": sys.modules[type(model).__module__].__file__}
assert "babylm" not in sys.modules and "modeling_moep" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, small, write_yaml, teachers):
    """A folder with run.yaml (SETTINGS on the small corpus, taught by a GPT-2); output models/ beside it."""
    folder = tmp_path_factory.mktemp("moep")
    write_yaml(folder / "run.yaml", {"name": "x", "output": str(folder / "models"), **SETTINGS,
                                     "data": {"corpus": str(small), **SETTINGS["data"]},
                                     "distillation": {"teacher": str(teachers("gpt2")[0]), **SETTINGS["distillation"]}})
    return folder


@pytest.fixture(scope="module")
def stage(home, in_process):
    """stage("name", "key=value", ..., script="train_moep_student") runs a stage in this process; returns models/name."""

    def train(name, *overrides, script="train_moep_student"):
        in_process(script, "--config", home / "run.yaml", f"name={name}", *overrides)
        return home / "models" / name

    return train


@pytest.fixture(scope="module")
def whole(home, run_script, tmp_path_factory):
    """(run folder, what it said) of the distilled student, trained by the script in a process of its own and in another folder."""
    done = run_script("train_moep_student.py", "--config", home / "run.yaml", "name=whole", cwd=tmp_path_factory.mktemp("elsewhere"))
    return home / "models" / "whole", done.stdout


@pytest.fixture(scope="module")
def blocks(small, tokenizer):
    """The validation blocks of every run here, and their ids [21, 32] and domains [21, 31] of the predicted tokens."""
    chosen = EvalBlocks(open_store(small, "val", tokenizer), 32, 21)
    items = [chosen[number] for number in range(len(chosen))]
    return chosen, torch.stack([item["input_ids"] for item in items]), torch.stack([item["domains"] for item in items])[:, 1:]


def flow(key, value):
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1e9).strip()}"


def rows(run, kind=None):
    found = map(json.loads, (run / "run" / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in PASSING} for row in found if kind in (None, row["kind"])]


def require_same_run(first, second):
    """Every logged figure and all saved weights are equal to the last bit."""
    assert rows(first) == rows(second)
    files = {path.relative_to(second) for path in second.rglob("model.safetensors")}
    assert {path.relative_to(first) for path in first.rglob("model.safetensors")} == files and len(files) > 2
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def saved_models(run):
    return [run, *sorted(run.glob("chck_*"))]


def test_final_model_and_milestones_load_anywhere_and_the_reported_ce_is_that_of_their_logits(whole, blocks, tmp_path):
    """In a fresh interpreter that sees neither this repository nor modules that another test has left in the cache."""
    run, _ = whole
    assert [row["name"] for row in rows(run, "milestone")] == [path.name for path in saved_models(run)[1:]] == ["chck_400", "chck_800"]
    for folder in saved_models(run):
        assert (folder / "modeling_moep.py").read_bytes() == (ROOT / "modeling_moep.py").read_bytes()
    np.save(tmp_path / "ids.npy", blocks[1].numpy())
    done = subprocess.run([sys.executable, "-I", "-c", ON_ITS_OWN, "ids.npy", *map(str, saved_models(run))], cwd=tmp_path, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(Path(each["file"]).is_relative_to(tmp_path / "modules") for each in found.values())
    last = rows(run, "eval")[-1]
    assert found[str(run)]["ce"] == pytest.approx(last["ce"], abs=1e-5) and last["balance"] > 0.9, "0.1 x balance is not in the CE"
    assert len({each["ce"] for each in found.values()}) == 3


def test_validation_rows_hold_what_the_routers_of_the_saved_model_do(whole, blocks):
    """Every router's shares and entropy, overall and by domain, counted here from its logits at the predicted positions."""
    run, _ = whole
    chosen, ids, domains = blocks
    row = rows(run, "eval")[-1]
    assert row.keys() == {"kind", "step", "words", "epoch", "ce", "kl", "teacher1_ce", "balance", "router_entropy", "router_dropped",
                          "entropy", "load", "entropy_by_domain", "load_by_domain", "perplexity", "ce_by_domain"}
    with torch.no_grad():
        _, _, routers = outputs(MoEPForCausalLM.from_pretrained(run).eval(), ids)
    tables = {"all": torch.ones_like(domains, dtype=bool), **{chosen.store.domains[d]: domains == d for d in domains.unique().tolist()}}
    assert tables.keys() == {"all", *row["load_by_domain"]} == {"all", *row["entropy_by_domain"], *row["ce_by_domain"]} and len(tables) > 3
    for domain, where in tables.items():
        load, entropy = (row[kind] if domain == "all" else row[f"{kind}_by_domain"][domain] for kind in ("load", "entropy"))
        assert list(load) == list(entropy) == ROUTERS
        for name, logits in zip(ROUTERS, routers, strict=True):
            tokens = logits[:, :-1][where]
            shares = np.bincount(tokens.topk(2).indices.flatten(), minlength=3) / (2 * len(tokens))
            assert list(load[name].values()) == pytest.approx(shares, abs=1e-3) and list(load[name]) == ["0", "1", "2"]
            assert sum(load[name].values()) == pytest.approx(1)
            assert entropy[name] == pytest.approx(float(torch.distributions.Categorical(logits=tokens).entropy().mean()), abs=1e-4)
    assert row["balance"] == pytest.approx(balance_by_hand(routers, 2).item(), abs=1e-4)
    assert row["router_entropy"] == pytest.approx(np.mean(list(row["entropy"].values())))


def test_means_by_domain_weighted_with_their_tokens_are_the_overall_means(whole, blocks):
    run, _ = whole
    chosen, _, domains = blocks
    share = {chosen.store.domains[d]: float((domains == d).float().mean()) for d in domains.unique().tolist()}
    for row in rows(run, "eval"):
        assert row["router_dropped"] == pytest.approx(0, abs=1e-9) and row["perplexity"] == math.exp(row["ce"])
        assert sum(share[name] * row["ce_by_domain"][name] for name in share) == pytest.approx(row["ce"])
        for router in ROUTERS:
            assert sum(share[name] * row["entropy_by_domain"][name][router] for name in share) == pytest.approx(row["entropy"][router])
            for expert, value in row["load"][router].items():
                assert sum(share[name] * row["load_by_domain"][name][router][expert] for name in share) == pytest.approx(value)


def test_train_rows_hold_balance_and_entropy_alone_and_the_loss_is_their_weighted_sum(whole):
    run, _ = whole
    found = rows(run, "train")
    assert [row["step"] for row in found] == list(range(1, 9))
    for row in found:
        assert row.keys() == {"kind", "step", "words", "epoch", "total_steps", "loss", "lr", "grad_norm", "ce", "kl", "teacher1_ce",
                              "balance", "router_entropy"}
        assert row["loss"] == pytest.approx(0.4 * row["ce"] + 0.6 * 4 * row["kl"] + 0.1 * row["balance"], rel=1e-6)
    assert found[-1]["ce"] < found[0]["ce"] and 0 < found[0]["router_entropy"] <= math.log(3)


def test_what_is_said_names_the_loss_and_the_routers_and_the_card_says_how_to_load_it(whole):
    run, said = whole
    assert "+ 0.1 balance, T = 2, token_mean: effective lambda = 1.5" in said
    assert " | balance " in said and " | router_dropped 0.0000" in said.replace("-0.0000", "0.0000") and "load/" not in said
    assert "trust_remote_code=True" in (run / "README.md").read_text() and "`train_moep_student.py`" in (run / "README.md").read_text()


def test_a_run_stopped_by_sigterm_and_resumed_ends_bit_identical(whole, home, in_child, stage):
    """The process that gets the signal is a real one; another goes on."""

    def stopped():
        step_end = training.RunCallback.on_step_end

        def with_signal(self, args, state, control, **rest):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_end(self, args, state, control, **rest)

        training.RunCallback.on_step_end = with_signal  # in the child alone
        sys.argv = ["train_moep_student.py", "--config", str(home / "run.yaml"), "name=stopped"]
        importlib.import_module("train_moep_student").main()

    done = in_child(stopped)
    assert done.returncode == 75 and "SIGTERM at step 3 of 8" in done.stdout + done.stderr, done.stdout + done.stderr
    assert (home / "models" / "stopped" / "checkpoint-3").is_dir() and not (home / "models" / "stopped" / "model.safetensors").exists()
    require_same_run(stage("stopped"), whole[0])


def test_a_student_taught_from_the_cache_is_the_one_taught_online(whole, home, stage, in_process, monkeypatch):
    """`python -m babylm.teacher_cache` takes the YAML of stage 5."""
    in_process("babylm.teacher_cache", "--config", home / "run.yaml", f"distillation.cache_path={home / 'cache'}")
    assert len(list((home / "cache").rglob("state-3.bin"))) == 2

    def refuse(*_, **__):
        raise AssertionError("a teacher was loaded or run")

    for owner, name in ((models, "load_teacher"), (Teacher, "from_model"), (Teacher, "states")):
        monkeypatch.setattr(owner, name, refuse)
    require_same_run(stage("cached", "distillation.cache=true", f"distillation.cache_path={home / 'cache'}"), whole[0])


@pytest.mark.parametrize("weight", [0.1, 0])
def test_a_student_learns_from_the_text_alone(stage, weight):
    run = stage(f"text-{weight}".replace(".", ""), TEXT_ALONE, f"distillation.balance.weight={weight}", "checkpoints.final=best")
    for row in rows(run, "train"):
        assert row["loss"] == pytest.approx(row["ce"] + weight * row.get("balance", 0), rel=1e-6)
        assert ("balance" in row) == ("router_entropy" in row) == (weight > 0) and "kl" not in row
    assert all(row["balance"] > 0.9 and row["load"].keys() == set(ROUTERS) and "kl" not in row for row in rows(run, "eval"))
    assert all((folder / "modeling_moep.py").is_file() for folder in saved_models(run))


def test_every_term_in_a_run_with_two_teachers(stage, teachers):
    gpt2, llama = map(str, teachers("gpt2", "llama"))
    entries = [{"path": gpt2, "layers": {1: 2, 3: 4}}, {"path": llama, "layers": {0: 1, 1: 3}}]
    terms = {"teachers": entries, "w_ce": 0.4, "w_kl": 0.6, "balance": {"weight": {"start": 0.2, "end": 0}}, "contrastive": {"dim": 8},
             "hidden": {"weight": 0.2}, "auxiliary": {"blocks": [1, 2], "share_head": True, "feature_weight": 0.1}}
    run = stage("terms", flow("distillation", terms))
    terms = {"hidden", "contrastive", "aux1_ce", "aux1_kl", "aux2_ce", "aux2_kl", "aux_features", "teacher2_kl"}
    found = rows(run, "train")
    assert all(math.isfinite(row[name]) for name in terms for row in found + rows(run, "eval"))
    assert [row["w_balance"] for row in found] == pytest.approx(np.linspace(0.2, 0, 8))
    assert ["balance" in row for row in found] == [True] * 7 + [False]
    assert not [name for name in MoEPForCausalLM.from_pretrained(run).state_dict() if "terms" in name]


@pytest.fixture(scope="module")
def steady(stage):
    return stage("steady", "model.dropout=0", "training.steps=4")


@pytest.mark.parametrize("spread", ["4 x 2", "two processes", "recomputed", "dense"])
def test_however_it_is_computed_a_run_is_the_same(spread, steady, home, stage, on_two_processes):
    how = {"recomputed": "training.gradient_checkpointing=true", "dense": "model.expert_path=dense"}
    keys, name = ["model.dropout=0", "training.steps=4", how.get(spread, "training.per_device_batch_size=2")], spread.replace(" ", "")
    if spread == "two processes":
        on_two_processes("train_moep_student", "--config", home / "run.yaml", f"name={name}", *keys)
    else:
        stage(name, *keys)
    for ours, theirs in zip(rows(steady), rows(home / "models" / name), strict=True):
        for column in {"loss", "ce", "kl", "balance", "router_entropy", "perplexity"} & ours.keys():
            assert theirs[column] == pytest.approx(ours[column], rel=1e-3), (ours["step"], column)
    first, second = (rows(path, "eval")[-1] for path in (steady, home / "models" / name))
    assert second["ce"] == pytest.approx(first["ce"], rel=1e-4)
    for router in ROUTERS:
        assert list(second["load"][router].values()) == pytest.approx(list(first["load"][router].values()), abs=5e-3)


def test_a_finished_moep_run_teaches_a_dense_student_and_its_ce_is_the_one_that_it_reported(whole, stage):
    taught = [{"path": str(whole[0]), "layers": {1: 1, 4: 2}}]
    distillation = flow("distillation", {"teachers": taught, "alpha": 0.5, "hidden": {"weight": 0.1}})
    keys = ["model={layers: 2, width: 16, heads: 2, max_positions: 64}", "training.steps=2", "logging.eval_steps=2"]
    run = stage("taught-by-moep", *keys, distillation, script="train_student")
    row = rows(run, "eval")[-1]
    assert row["teacher1_ce"] == pytest.approx(rows(whole[0], "eval")[-1]["ce"], abs=1e-5) and row["kl"] > 0 and row["hidden"] > 0
    assert "balance" not in row and "load" not in row
    with pytest.raises(UserError, match="state 2 of .*whole is 8 wide: only states as wide as what its head reads .16. can be mapped"):
        stage("narrow", *keys, distillation.replace("1: 1", "2: 1"), script="train_student")


def test_a_model_of_another_architecture_is_not_trained_as_moep(stage, teachers):
    """Nothing would be routed or balanced."""
    (path,) = teachers("gpt2")
    with pytest.raises(UserError, match="model.path: .*gpt2 holds a gpt2, not a MoE-P model"):
        stage("foreign", TEXT_ALONE, f"model={{architecture: moep, init: pretrained, path: {path}}}")


def test_a_moep_model_can_be_trained_further(whole, stage):
    run = stage("further", TEXT_ALONE, f"model={{architecture: moep, init: pretrained, path: {whole[0]}}}", "training.steps=2",
                "logging.eval_steps=2")
    first = rows(run, "train")[0]
    assert first["ce"] < rows(whole[0], "train")[0]["ce"] and first["balance"] > 0.9
    assert (run / "modeling_moep.py").read_bytes() == (ROOT / "modeling_moep.py").read_bytes()


@pytest.mark.parametrize("script, architecture, belongs", [
    ("train_student", "moep", "the student of stage 5: python train_moep_student.py"),
    ("train_moep_student", "gpt2", "a student of stage 4: python train_student.py")])
def test_the_yaml_of_the_other_stage_is_told_its_script(home, in_process, capsys, script, architecture, belongs):
    with pytest.raises(SystemExit):
        in_process(script, "--config", home / "run.yaml", "name=wrong", f"model.architecture={architecture}", as_script=True)
    assert f"model.architecture: {architecture} is {belongs} --config <this file>" in capsys.readouterr().err
    assert not (home / "models" / "wrong").exists()


# ---- Positions that are never trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("section, seq_len, first", [
    (MoEPModelSection(width=16, heads=2, parallel_width=8, parallel_heads=2, layers=2), 128, 129),
    (ModelSection(width=16, heads=2, layers=1), 128, 129), (ModelSection(width=16, heads=2, layers=1), 343, 344),
    (ModelSection(width=16, heads=2, layers=1), 344, None), (ModelSection(width=16, heads=2, layers=1), 512, None),
    (ModelSection(width=16, heads=2, layers=1, max_positions=128), 128, None),
    (ModelSection(width=16, heads=2, layers=1, max_positions=200), 128, 129),
    (ModelSection(width=16, heads=2, layers=1, architecture="llama"), 128, None),
    (ModelSection(width=16, heads=2, layers=1, architecture="gptj"), 128, None),
], ids=str)
def test_positions_that_blocks_never_reach_but_the_evaluation_reads(section, seq_len, first, tokenizer):
    assert plan.untrained_positions(models.build_model(section, tokenizer, 0), seq_len) == first


PLAIN = "layers: 1, width: 16, heads: 2"


@pytest.mark.parametrize("keys, warned", [
    ([f"model={{{PLAIN}, max_positions: 64}}"], True),
    ([f"model={{{PLAIN}, max_positions: 32}}"], False),
    ([f"model={{{PLAIN}, max_positions: 64, architecture: llama}}"], False),
    ([f"model={{{PLAIN}, max_positions: 512}}", "data.seq_len=512", "training.batch_size=1"], False),
    (["model={init: pretrained, path: GPT2}"], False),
], ids=str)
def test_a_student_is_warned_of_positions_that_stay_random(keys, warned, stage, teachers):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        stage(f"warned-{abs(hash(str(keys)))}", *[key.replace("GPT2", str(teachers("gpt2")[0])) for key in keys], "training.steps=1",
              "logging.eval_steps=1", "checkpoints.every_words=null", "distillation={alpha: 1}", script="train_student")
    assert ("the student's positions from 33 on stay random" in said.getvalue()) == warned == ("stay random" in said.getvalue())


def test_a_moep_student_is_warned_too(whole):
    assert ("warning    data.seq_len 32: the student's positions from 33 on stay random, but the official evaluation reads up to 344 "
            "tokens at once") in whole[1]
