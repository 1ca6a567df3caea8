"""Running the official pipeline on a run folder, and telling whether its results are ours: with a stand-in for the pipeline."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from babylm import models
from babylm.config import ModelSection
from babylm.schema import UserError
from babylm.scoring import sentence_logprobs
from eval import official

ROOT = Path(official.__file__).parents[1]
STANDIN = Path(__file__).with_name("official_standin")
PAIRS = {"agreement": [("the dog runs", "the dog run"), ("a cat sees us", "a cat see us"), ("the birds sing", "the birds sings"),
                       ("my friend eats", "my friend eat"), ("two men walk", "two men walks"), ("the girl is old", "the girl are old")],
         "order": [("we saw a red house", "we saw red a house"), ("he came at night", "he at came night"),
                   ("give it to me", "give to it me"), ("she has no time", "she no has time"), ("they live in town", "they in live town"),
                   ("it was cold", "was it cold")]}
WUG = [("today they bim, they bimmed", "today they bim, they bam", 0.9), ("today they fing, they finged", "today they fing, a fang", 0.2),
       ("today they zop, they zopped", "today they zop, they zept", 0.7)]
READING = [("He", "was", "", ""), ("He was", "old", "He", "was"), ("She wound up", "talking", "She wound", "up")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """models/tiny, a finished run with main, chck_1M and chck_2M, three models that differ. Read only."""
    root = tmp_path_factory.mktemp("run") / "models" / "tiny"
    texts = [sentence for pairs in PAIRS.values() for pair in pairs for sentence in pair] * 3
    tokenizer = models.train_tokenizer(texts, 300, 1)
    for seed, folder in enumerate((root, root / "chck_1M", root / "chck_2M")):
        folder.mkdir(parents=True)
        model = models.build_model(ModelSection(layers=1, width=16, heads=2, max_positions=64), tokenizer, seed)
        for parameter in model.parameters():
            parameter.data.mul_(5)  # far from uniform: what one model prefers, another does not
        models.save_model(model, tokenizer, folder)
    (root / "run").mkdir()
    (root / "run" / "finished.json").write_text("{}")
    return root


@pytest.fixture
def run(trained, tmp_path):
    """A copy of `trained` to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "models" / "tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with full_eval/ and fast_eval/, whose EWoK is not there. Read only."""
    root = tmp_path_factory.mktemp("data")
    for part, name in (("full_eval", "supplement_filtered"), ("fast_eval", "supplement_fast")):
        for folder in (name, "wug_past_tense", "reading"):
            (root / part / folder).mkdir(parents=True)
        for uid, pairs in PAIRS.items():
            (root / part / name / f"{uid}.jsonl").write_text("".join(
                json.dumps({"sentence_good": good, "sentence_bad": bad}) + "\n" for good, bad in pairs))
        (root / part / "wug_past_tense" / "wug_past.jsonl").write_text("".join(
            json.dumps({"sentences": f"{first}\t{second}", "ratio": ratio}) + "\n" for first, second, ratio in WUG))
        (root / part / "reading" / "reading_data.csv").write_text("item,word,prev_item,prev_word\n" + "".join(
            ",".join(row) + "\n" for row in READING))
    return root


def write_result(folder, predictions, report, items=None, name="best_temperature_report.txt"):
    """One data set's files; `predictions` {uid: [{...}]}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions.json").write_text(json.dumps({uid: {"predictions": rows} for uid, rows in predictions.items()}))
    (folder / name).write_text(report)
    if items is not None:
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def score_ours(root, results):
    """results/tiny: what an evaluator of ours writes for each revision, from the folders themselves."""
    for revision, folder in official.revisions_of(root).items():
        model, tokenizer = models.load_causal_lm(str(folder)).eval(), models.load_tokenizer(folder)
        backend = results / root.name / revision / "zero_shot" / "causal"
        predictions, items, accuracy = {}, [], {}
        for uid, pairs in PAIRS.items():
            scores = sentence_logprobs(model, tokenizer, [text for pair in pairs for text in pair]).reshape(-1, 2)
            chosen = scores.argmax(1)
            predictions[uid] = [{"id": f"{uid}_{n}", "pred": pair[chosen[n]]} for n, pair in enumerate(pairs)]
            items += [{"uid": uid, "id": f"{uid}_{n}", "scores": list(scores[n]), "pred": 0, "tie": False} for n in range(len(pairs))]
            accuracy[uid] = 100 * (chosen == 0).mean()
        report = "\n".join(["### UID ACCURACY", *(f"{uid}: {value:.2f}" for uid, value in accuracy.items()), "", "### AVERAGE ACCURACY",
                            f"{sum(accuracy.values()) / len(accuracy):.2f}"])
        name = "supplement_filtered" if revision == "main" else "supplement_fast"
        write_result(backend / "blimp" / name, predictions, f"TEMPERATURE: 1.00\n\n{report}\n", items)
        rows = []
        for n, (first, second, _) in enumerate(WUG):
            a, b = sentence_logprobs(model, tokenizer, [first, second])
            rows.append({"id": f"wug_past_{n}", "pred": first if a >= b else second, "prob": 1 / (1 + math.exp(b - a))})
        right = 100 * sum(row["pred"] == first for row, (first, *_) in zip(rows, WUG, strict=True)) / len(rows)
        report = f"TEMPERATURE: 1.00\n\n### UID ACCURACY\nwug_past: {right:.2f}\n\n### AVERAGE ACCURACY\n{right:.2f}\n"
        write_result(backend / "wug_past" / "wug_past_tense", {"wug_past": rows}, report, [])
        now = [-value for value in sentence_logprobs(model, tokenizer, [f"{item} {word}" for item, word, *_ in READING])]
        before = [-sentence_logprobs(model, tokenizer, [f"{item} {word}"])[0] if item else math.nan for *_, item, word in READING]
        mean = sum(now) / len(now)
        write_result(backend / "reading", {"reading": [{"id": n, "pred": x, "prev_pred": y} for n, (x, y) in
                                                       enumerate(zip(now, before, strict=True))]},
                     f"EYE TRACKING SCORE: {mean:.2f}\nSELF-PACED READING SCORE: {mean / 2:.2f}\n", name="report.txt")
    return results / root.name


def official_sh(*arguments, cwd, **env):
    return subprocess.run(["bash", str(ROOT / "eval" / "official.sh"), *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": sys.executable, **env}, stdin=subprocess.DEVNULL, timeout=120)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["official", *map(str, arguments)])
    official.main()


# ---- The whole way ----------------------------------------------------------------------------------------------------


def test_every_revision_is_scored_as_itself_and_the_results_are_ours(trained, data, tmp_path, monkeypatch, capsys, warm_python):
    """The stand-in loads local/tiny from the hub cache, in a process of its own; ours come from the folders."""
    clone = Path(shutil.copytree(STANDIN, tmp_path / "pipeline"))
    ours = score_ours(trained, tmp_path / "results")
    wrong_home = tmp_path / "other-hub"  # a user's own cache settings must not be read
    done = official_sh(clone, trained, "causal", data, "--python", warm_python, cwd=tmp_path, HF_HUB_CACHE=str(wrong_home),
                       PYTHON=str(warm_python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same: 54 predictions in 9 data sets, 0 ties aside" in done.stdout  # (2 x 6 + 3 + 3) x 3 revisions, and 3 sets each
    reports = {(clone / "results" / "tiny" / revision / "zero_shot" / "causal" / "reading" / "report.txt").read_text()
               for revision in ("main", "chck_1M", "chck_2M")}
    assert len(reports) == 3
    assert "eval_zero_shot.sh local/tiny causal" in done.stdout and "eval_zero_shot_fast.sh local/tiny chck_2M causal" in done.stdout
    assert "ended with code 2, with all predictions for which there are data" in done.stdout  # EWoK
    assert not wrong_home.exists() and ours.is_dir()
    call(monkeypatch, "run", clone, trained, "--data", data, "--ours", ours, "--python", "/bin/false")  # nothing is left to run
    assert capsys.readouterr().out.count("done before") == 3
    # The same comparison sees a pipeline that loads the final model for a milestone.
    shutil.rmtree(clone / "results" / "tiny" / "chck_1M")
    monkeypatch.setenv("STANDIN_BUG", "ignore_revision")
    with pytest.raises(UserError, match="differ in"):
        call(monkeypatch, "run", clone, trained, "--data", data, "--ours", ours, "--python", warm_python)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "/causal/" in line.split(" ")[0]}
    assert "DIFFERENT" in rows["chck_1M/causal/reading"] and "DIFFERENT" in rows["chck_1M/causal/wug_past/wug_past_tense"]
    assert "DIFFERENT" not in rows["main/causal/reading"] + rows["chck_2M/causal/reading"]


# ---- The hub cache ----------------------------------------------------------------------------------------------------


def test_the_cache_is_one_that_transformers_reads(trained, tmp_path):
    ids = official.build_cache(official.revisions_of(trained), "tiny", tmp_path)
    repository = tmp_path / "hub" / "models--local--tiny"
    assert list(ids) == ["main", "chck_1M", "chck_2M"] and len(set(ids.values())) == 3
    for revision, name in ids.items():
        assert len(name) == 40 and (repository / "refs" / revision).read_text() == name
    names = {file.name for file in (repository / "snapshots" / ids["main"]).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names and not names & {"run", "chck_1M"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        weights = [AutoModelForCausalLM.from_pretrained("local/tiny", revision=revision, cache_dir=tmp_path / "hub").transformer.wte.weight
                   for revision in ids]
    expected = [models.load_causal_lm(str(folder)).transformer.wte.weight for folder in official.revisions_of(trained).values()]
    assert all(a.equal(b) for a, b in zip(weights, expected, strict=True)) and not weights[0].equal(weights[1])


def test_a_cache_made_again_follows_the_weights_and_forgets_old_revisions(run, tmp_path):
    first = official.build_cache(official.revisions_of(run), "tiny", tmp_path)
    assert official.build_cache(official.revisions_of(run), "tiny", tmp_path) == first
    (run / "README.md").write_text("a model card with results")
    assert official.build_cache(official.revisions_of(run), "tiny", tmp_path) == first
    shutil.rmtree(run / "chck_1M")
    shutil.copy(run / "chck_2M" / "model.safetensors", run / "model.safetensors")
    second = official.build_cache(official.revisions_of(run), "tiny", tmp_path)
    repository = tmp_path / "hub" / "models--local--tiny"
    assert second["main"] != first["main"] and not (repository / "refs" / "chck_1M").exists()
    assert {folder.name for folder in (repository / "snapshots").iterdir()} == set(second.values())


def test_a_repository_that_was_downloaded_is_not_touched(trained, tmp_path):
    (tmp_path / "hub" / "models--local--tiny" / "blobs").mkdir(parents=True)
    with pytest.raises(UserError, match="was not made by this script"):
        official.build_cache(official.revisions_of(trained), "tiny", tmp_path)
    assert (tmp_path / "hub" / "models--local--tiny" / "blobs").is_dir()


def test_milestones_come_in_the_order_of_their_words(tmp_path):
    for name in ("chck_10M", "chck_2M", "chck_500K", "chck_1M", "chck_old", "checkpoint-3"):
        (tmp_path / name).mkdir()
    assert list(official.revisions_of(tmp_path)) == ["main", "chck_500K", "chck_1M", "chck_2M", "chck_10M"]


# ---- What is refused --------------------------------------------------------------------------------------------------


def edit_json(file, **changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


SPOILED = {
    "backend": (lambda root: edit_json(root / "chck_1M" / "tokenizer_config.json", backend="tokenizers"),
                r"chck_1M/tokenizer_config.json: the key \"backend\""),
    "class": (lambda root: edit_json(root / "tokenizer_config.json", tokenizer_class="TokenizersBackend"), "is 'TokenizersBackend'"),
    "no class": (lambda root: edit_json(root / "tokenizer_config.json", tokenizer_class=None), "tokenizer_class is None"),
    "inputs": (lambda root: edit_json(root / "tokenizer_config.json", model_input_names=None), "model_input_names is None"),
    "pad": (lambda root: edit_json(root / "tokenizer_config.json", pad_token=None), "no pad_token"),
    "bos": (lambda root: edit_json(root / "chck_2M" / "tokenizer.json", post_processor=None), "chck_2M/tokenizer.json: a text begins with"),
    "unfinished": (lambda root: (root / "run" / "finished.json").unlink(), "unfinished run"),
    "weights": (lambda root: (root / "chck_1M" / "model.safetensors").unlink(), "chck_1M has no weights"),
    "config": (lambda root: (root / "chck_1M" / "config.json").write_text("{"), "chck_1M/config.json is damaged"),
    "code": (lambda root: edit_json(root / "config.json", auto_map={"AutoConfig": "modeling_x.XConfig"}), "modeling_x.py is not beside it"),
    "cut": (lambda root: (root / "chck_1M" / "complete.json").write_text('{"model.safetensors": 1}'), "chck_1M is damaged"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_run_that_the_pipeline_would_score_wrongly_is_refused(run, what):
    assert list(official.check_run(run, "causal")) == ["main", "chck_1M", "chck_2M"]
    spoil, message = SPOILED[what]
    spoil(run)
    with pytest.raises(UserError, match=message):
        official.check_run(run, "causal")


@pytest.mark.parametrize(("name", "message"), [("tiny-1.5M", "holds a dot.*'tiny-1_5M'"), ("a--b", "no name for the hub"),
                                               ("-a", "no name"), ("a b", "no name")])
def test_a_name_that_breaks_the_results_or_the_hub_is_refused(run, name, message):
    with pytest.raises(UserError, match=message):
        official.check_run(run.rename(run.with_name(name)), "causal")


def test_a_causal_model_is_not_scored_as_a_masked_one(run):
    with pytest.raises(UserError, match="no mask_token"):
        official.check_run(run, "mlm")


def test_a_start_token_in_the_old_spelling_passes(run):
    edit_json(run / "tokenizer_config.json", bos_token={"__type": "AddedToken", "content": "<s>", "special": True})
    official.check_run(run, "causal")


def test_what_is_missing_is_said_before_anything_runs(trained, data, tmp_path, monkeypatch):
    clone = tmp_path / "pipeline"
    clone.mkdir()
    command = ["run", clone, trained, "--data", data, "--ours", tmp_path / "ours"]
    with pytest.raises(UserError, match="eval_zero_shot.sh does not exist.*no clone"):
        call(monkeypatch, *command)
    shutil.copytree(STANDIN, clone, dirs_exist_ok=True)
    with pytest.raises(UserError, match="no results of ours to compare with for main, chck_1M, chck_2M.*eval.zero_shot"):
        call(monkeypatch, *command)
    with pytest.raises(UserError, match="has no chck_3M; it has main, chck_1M, chck_2M"):
        call(monkeypatch, *command, "--revisions", "chck_3M")
    with pytest.raises(UserError, match="full_eval does not exist"):
        call(monkeypatch, "run", clone, trained, "--data", tmp_path)
    (clone / "local" / "tiny").mkdir(parents=True)
    with pytest.raises(UserError, match="would load it instead of the revisions"):
        call(monkeypatch, *command)
    assert not (tmp_path / "pipeline-hub").exists() and not (clone / "results").exists()


# ---- Running ----------------------------------------------------------------------------------------------------------


FAKE = """out=results/$(basename "$1")/$2/zero_shot/$3
for task in supplement_fast ewok_fast wug_past_tense reading; do  # "$4/supplement_fast" "$4/wug_past_tense" "$4/reading" "$4/ewok_fast"
  [ "$FAIL" = "$task" ] && continue
  place=$out/blimp/$task; [ $task = reading ] && place=$out/reading
  [ -d "$4/$task" ] && mkdir -p "$place" && echo "{}" > "$place/predictions.json"
done
echo "$2 $(command -v python) $HF_HOME $HF_HUB_OFFLINE $PYTHONPATH" >> log
"""


@pytest.fixture
def fake(tmp_path):
    """A clone whose fast script writes empty predictions and a log; the data set named in $FAIL fails."""
    clone = tmp_path / "pipeline"
    clone.mkdir()
    (clone / "eval_zero_shot_fast.sh").write_text(FAKE)
    return clone


def test_a_task_that_failed_is_not_hidden_by_the_results_of_an_earlier_model(fake, run, data, monkeypatch, capsys):
    command = ["run", fake, run, "--data", data, "--fast", "--no-compare", "--revisions", "main,chck_1M"]
    call(monkeypatch, *command)
    assert (fake / "log").read_text().count("\n") == 2
    call(monkeypatch, *command)
    assert (fake / "log").read_text().count("\n") == 2 and capsys.readouterr().out.count("done before") == 2
    shutil.copy(run / "chck_2M" / "model.safetensors", run / "chck_1M" / "model.safetensors")  # another model of the same name
    monkeypatch.setenv("FAIL", "wug_past_tense")
    with pytest.raises(UserError, match="left no predictions of chck_1M on wug_past_tense"):
        call(monkeypatch, *command)
    folder = fake / "results" / "tiny" / "chck_1M" / "zero_shot"
    assert (folder / "causal-old1" / "blimp" / "wug_past_tense" / "predictions.json").is_file()  # moved, not lost
    assert not (folder / "causal" / "scored.json").exists()
    monkeypatch.delenv("FAIL")
    call(monkeypatch, *command)
    assert (fake / "log").read_text().count("\n") == 4


def test_the_scripts_of_2026_lie_in_a_folder_of_their_own(fake, run, data, monkeypatch):
    (fake / "strict/scripts").mkdir(parents=True)
    (fake / "eval_zero_shot_fast.sh").rename(fake / "strict/scripts/eval_zero_shot_fast.sh")
    options = ["--data", data, "--fast", "--no-compare", "--revisions", "main"]
    with pytest.raises(UserError, match=r"give its folder strict/"):
        call(monkeypatch, "run", fake, run, *options)
    call(monkeypatch, "run", fake / "strict", run, *options)
    assert (fake / "strict/log").read_text().startswith("main ") and (fake / "strict/results").is_dir()


def test_the_pipeline_gets_its_own_python_and_no_network(fake, trained, data, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HOME", "/somewhere/else")
    call(monkeypatch, "run", fake, trained, "--data", data, "--fast", "--no-compare", "--revisions", "main", "--python", sys.executable)
    home = fake.with_name("pipeline-hub")
    assert (fake / "log").read_text().split() == ["main", str(home / "bin" / "python"), str(home), "1"]
    said = subprocess.run([home / "bin" / "python", "-c", "import sys; print(sys.prefix, *sys.argv[1:])", "a b"], check=True,
                          capture_output=True, text=True)
    assert said.stdout.strip() == f"{sys.prefix} a b"  # a link would have lost the virtual environment


FAKE_PYTHON = """#!/bin/sh
# As `python -m venv` and the environment's `python -m pip install -r <file>`: the latter fails on a line no-such-package.
case $2 in
  venv) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && echo "venv $4" >> "$LOG" ;;
  pip) for file in "$@"; do :; done; echo "pip $file" >> "$LOG"; ! grep no-such-package "$file" ;;
esac
"""


def test_the_environment_is_made_once_per_requirements(tmp_path):
    """With stand-ins for the Python that makes it, and for ours, which only says how it was called."""
    for name, text in (("bin/python3.12", FAKE_PYTHON), ("bin/echoing", '#!/bin/sh\necho "$@"\n'), ("pipeline/README.md", "")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    requirements, log, venv = tmp_path / "requirements.txt", tmp_path / "log", tmp_path / "pipeline-venv"
    command = ["pipeline/", "models/tiny", "mlm", "data", "--requirements", "requirements.txt", "--fast", "--ours", "my results"]

    def call_it(text):
        requirements.write_text(text)
        log.write_text("")
        done = official_sh(*command, cwd=tmp_path, PYTHON=str(tmp_path / "bin" / "echoing"), LOG=str(log),
                           PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        return done, log.read_text().splitlines()

    made = [f"venv {venv}", f"pip {requirements}"]
    for _ in range(2):  # a broken one does not count as made
        broken, steps = call_it("no-such-package\n")
        assert broken.returncode != 0 and steps == made
    first, steps = call_it("some-package\n")
    assert first.returncode == 0 and steps == made
    common = f"-m eval.official run {tmp_path}/pipeline models/tiny --backend mlm --fast --ours my results --data data"
    assert first.stdout.splitlines()[0] == f"{common} --check"  # before time is spent on the environment
    assert first.stdout.splitlines()[-1] == f"{common} --python {venv}/bin/python"
    again, steps = call_it("some-package\n")
    assert again.returncode == 0 and steps == []
    assert call_it("some-package==2\n")[1] == made


def test_a_wrong_command_says_how(tmp_path):
    done = official_sh("only-one", cwd=tmp_path)
    assert done.returncode == 2 and "bash eval/official.sh <clone" in done.stderr
    missing = official_sh("nowhere", "models/x", cwd=tmp_path)
    assert missing.returncode == 1 and "nowhere does not exist" in missing.stderr


# ---- Comparing --------------------------------------------------------------------------------------------------------


REPORT = "### UID ACCURACY\na: {}\nb: {}\n\n### AVERAGE ACCURACY\n{}\n"


@pytest.fixture
def both(tmp_path):
    """both(theirs, ours, tie=(), ...) writes one set of two UIDs with two items each for either side -> (theirs, ours)."""

    def build(theirs, ours, reports=("50.00", "50.00", "50.00"), tie=(), gap=1.0, ours_reports=None):
        keys = [("a", "a_0"), ("a", "a_1"), ("b", "b_0"), ("b", "b_1")]
        for side, texts, scores in (("theirs", theirs, reports), ("ours", ours, ours_reports or reports)):
            predictions = {}
            for (uid, key), text in zip(keys, texts, strict=False):
                predictions.setdefault(uid, []).append({"id": key, "pred": text})
            items = [{"uid": uid, "id": key, "scores": [-10.0, -10.0 - gap], "pred": 0, "tie": key in tie} for uid, key in keys]
            write_result(tmp_path / side / "main" / "zero_shot" / "causal" / "blimp" / "set", predictions, REPORT.format(*scores),
                         items if side == "ours" else None)
        return tmp_path / "theirs", tmp_path / "ours"

    return build


def test_equal_results_are_the_same(both, monkeypatch, capsys):
    call(monkeypatch, "compare", *both("xyxy", "xyxy"))
    assert "the same: 4 predictions in 1 data sets, 0 ties aside" in capsys.readouterr().out


def test_a_prediction_that_differs_is_an_error_that_names_it(both, monkeypatch, capsys):
    with pytest.raises(UserError, match="differ in 1 data sets"):
        call(monkeypatch, "compare", *both("xyxy", "xyxx", gap=2e-6))
    out = capsys.readouterr().out
    assert "different: main/causal/blimp/set: b / b_1: pred 'y' in theirs, 'x' in ours; our two best candidates are 2e-06 nats apart" in out


def test_ties_are_listed_apart_and_explain_the_scores_that_they_move(both, monkeypatch, capsys):
    moved = ("50.00", "0.00", "25.00")
    call(monkeypatch, "compare", *both("xyxy", "xyxx", tie=["b_1"], ours_reports=moved))
    out = capsys.readouterr().out
    assert "tie: main/causal/blimp/set: b / b_1" in out and "1 ties aside" in out and "scores differ, by ties" in out
    with pytest.raises(UserError):  # the tie is in b, and does not explain a's score
        call(monkeypatch, "compare", *both("xyxy", "xyxx", tie=["b_1"], ours_reports=("0.00", "0.00", "0.00")))
    line = "score: main/causal/blimp/set: best_temperature_report.txt, UID ACCURACY, a: 50.00 in theirs, 0.00 in ours"
    assert line in capsys.readouterr().out


def test_a_margin_widens_what_is_a_tie(both, monkeypatch):
    call(monkeypatch, "compare", *both("xyxy", "xyxx", gap=2e-6), "--tie-margin", "1e-5")


def test_a_score_that_is_printed_otherwise_is_a_difference(both, monkeypatch, capsys):
    with pytest.raises(UserError):
        call(monkeypatch, "compare", *both("xyxy", "xyxy", ours_reports=("50.00", "50.00", "50.01")))
    line = "score: main/causal/blimp/set: best_temperature_report.txt, AVERAGE ACCURACY: 50.00 in theirs, 50.01 in ours"
    assert line in capsys.readouterr().out


def test_items_that_only_one_has_are_differences(both, monkeypatch, capsys):
    with pytest.raises(UserError):
        call(monkeypatch, "compare", *both("xyxy", "xyx"))
    with pytest.raises(UserError):
        call(monkeypatch, "compare", *both("xyx", "xyxy"))
    out = capsys.readouterr().out
    assert "b / b_1: only in theirs" in out and "b / b_1: only in ours" in out


def test_sets_that_only_one_has(both, monkeypatch, capsys):
    theirs, ours = both("xyxy", "xyxy")
    extra = Path("main", "zero_shot", "causal", "comps", "comps")
    shutil.copytree(ours / "main" / "zero_shot" / "causal" / "blimp" / "set", ours / extra)
    call(monkeypatch, "compare", theirs, ours)
    assert "did not score main/causal/comps/comps" in capsys.readouterr().out
    shutil.move(ours / extra, theirs / extra)
    with pytest.raises(UserError, match="1 are missing in ours"):
        call(monkeypatch, "compare", theirs, ours)
    with pytest.raises(UserError, match="no predictions of the pipeline"):
        call(monkeypatch, "compare", theirs, ours, "--revisions", "chck_1M")


def test_reading_is_compared_to_a_tolerance(tmp_path, monkeypatch, capsys):
    def write(side, pred, prev):
        write_result(tmp_path / side / "main" / "zero_shot" / "causal" / "reading",
                     {"reading": [{"id": 0, "pred": pred, "prev_pred": prev}]}, "EYE TRACKING SCORE: 0.17\n", name="report.txt")
        return tmp_path / side

    theirs = write("theirs", 11.75237, math.nan)
    call(monkeypatch, "compare", theirs, write("ours", 11.75241, math.nan))
    for pred, prev in ((11.76, math.nan), (11.75237, 3.0), (math.nan, math.nan)):
        with pytest.raises(UserError):
            call(monkeypatch, "compare", theirs, write("ours", pred, prev))
    assert "reading / 0: prev_pred nan in theirs, 3.0 in ours" in capsys.readouterr().out
    # What we write of reading times holds two surprisals of a word, and no candidates: they are never a tie.
    (tmp_path / "ours/main/zero_shot/causal/reading/items.jsonl").write_text(
        json.dumps({"uid": "reading", "id": 0, "scores": [11.0, 11.0], "pred": None, "gold": None, "correct": None, "tie": False}) + "\n")
    with pytest.raises(UserError):
        call(monkeypatch, "compare", theirs, write("ours", 12.4, math.nan), "--tie-margin", "1")
    assert "tie:" not in capsys.readouterr().out


def test_damaged_files_are_named(both, monkeypatch):
    theirs, ours = both("xyxy", "xyxy")
    place = Path("main", "zero_shot", "causal", "blimp", "set")
    (ours / place / "items.jsonl").write_text('{"uid": "a", "id": "a_0", "scores": [1, 2], "pred": 0, "tie": false}\n{"uid"\n')
    with pytest.raises(UserError, match="items.jsonl, line 2: no item of ours"):
        call(monkeypatch, "compare", theirs, ours)
    (theirs / place / "predictions.json").write_text('{"a": {"predictions": [{"id": "a_0", "pred": "x"}, {"id": "a_0", "pred": "y"}]}}')
    with pytest.raises(UserError, match="the id 'a_0' of UID 'a' is there twice"):
        call(monkeypatch, "compare", theirs, ours)
    (theirs / place / "predictions.json").write_text("[1]")
    with pytest.raises(UserError, match="predictions.json is no predictions.json"):
        call(monkeypatch, "compare", theirs, ours)


def test_the_real_pipelines_files_are_read(shared, tmp_path, monkeypatch, capsys):
    theirs = shared / "data" / "golden" / "official" / "tiny-gpt2"
    ours = Path(shutil.copytree(theirs, tmp_path / "ours"))
    call(monkeypatch, "compare", theirs, ours)
    assert "18,778 predictions in 6 data sets" in capsys.readouterr().out
    file = ours / "main" / "zero_shot" / "causal" / "blimp" / "blimp_fast" / "best_temperature_report.txt"
    file.write_text(file.read_text().replace("semantics: 45.06", "semantics: 45.07"))
    with pytest.raises(UserError):
        call(monkeypatch, "compare", theirs, ours)
    assert "FIELD ACCURACY, semantics: 45.06 in theirs, 45.07 in ours" in capsys.readouterr().out
