"""Every command of the README runs, on models and texts that are small enough for a test."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import babylm.training  # noqa: F401 - loaded once, here: warm_python begins with it

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL_CORPUS = ["corpus.demo_words=30K", "corpus.demo_pairs=4", "tokenizer.vocab_size=512"]
TWO_STEPS = ["training.steps=2", "training.warmup_steps=1"]
# What makes a shipped recipe a model of a few thousand weights, trained for two steps on the demo corpus.
TINY = ["training.epochs=null", *TWO_STEPS, "training.batch_size=4", "training.per_device_batch_size=2", "training.precision=fp32",
        "data.corpus=data/demo-s9/corpus", "data.seq_len=32", "model.init=random", "model.path=null", "model.layers=1",
        "model.width=16", "model.heads=2", "logging.eval_steps=2"]


def commands() -> list[str]:
    """The commands of the README: lines of its bash blocks, and code in running text that starts with an interpreter."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).splitlines()
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace("\n", " ")
    inline = re.findall(r"`((?:python|bash|torchrun) [^`]+)`", prose)
    found = [re.sub(r"\s+#.*", "", line).strip() for line in blocks] + [code for code in inline if code != "torchrun --nproc_per_node 4"]
    return sorted({re.sub(r"\s+", " ", re.sub(r"\[.*?\]", "", command)).strip() for command in found if command})


@pytest.fixture(scope="module")
def project(tmp_path_factory, warm_python):
    """A copy of the repository in which `bash demo.sh` was run, briefly, with the environment that runs these tests: every stage
    as a process that starts from nothing."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    made_here = (".git", ".venv", "models", "data", "figures", "results", "corpus_*", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made_here))
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    for stamp, source in (("requirements.installed", "requirements.txt"), ("requirements.tests.installed", "tests/requirements.txt")):
        shutil.copyfile(ROOT / source, folder / ".venv" / stamp)
    done = run(folder, ["bash", "demo.sh", "--seed", "9", *SMALL_CORPUS, *TWO_STEPS])
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(folder / "data/demo-s9/raw", folder / "train_10M")
    shutil.copytree(folder / "data/demo-s9/raw", folder / "dev")
    for file in (folder / "dev").glob("*.train"):
        file.rename(file.with_suffix(".dev"))
    shutil.copytree(folder / "data/demo-s9/corpus/pairs", folder / "evaluation_data/full_eval/blimp_filtered")
    for part in ("train", "valid"):
        rows = [{"sentence1": "The cat runs.", "sentence2": "A dog sees it.", "label": number % 2, "idx": number} for number in range(40)]
        (folder / "glue_filtered").mkdir(exist_ok=True)
        (folder / f"glue_filtered/rte.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("baseline", "student"):  # what eval.compare reads
        done_too = run(folder, [str(warm_python), "-m", "eval.zero_shot", f"models/demo-s9/{name}", "--data", "evaluation_data",
                                "--no-untrained"])
        assert done_too.returncode == 0, done_too.stdout + done_too.stderr
    return folder, done.stdout


def run(folder: Path, command: list[str], **variables: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    env.pop("BABYLM_SHARED", None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)


def small(command: str) -> list[str]:
    """A README command as it is run here."""
    words = re.sub(r"\[.*?\]|\\\|", "", command).replace("<folder>", "data/demo-s9/corpus/pairs").split()
    words = [word.split("|")[0] if "steps|time" in word else word for word in words]
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", *["2" if word == "4" else word for word in words[1:]]]
    text = " ".join(words)
    if re.search(r"train_\w+\.py|teacher_cache", text):
        words += [*TINY, f"name={'-'.join(re.findall(r'[a-z]+', text))}"]
        words += ["distillation.teacher=models/demo-s9/teacher"] if re.search("student|teacher_cache", text) else []
        words += ["model.layers=3", "model.parallel_width=8", "model.parallel_heads=2"] if "train_moep" in text else []
        words += ["training.batch_size=64", "training.per_device_batch_size=64"] if "teacher_cache" in text else []
    if "combine_babylm.py --input" in text:
        words += ["tokenizer.path=null", "tokenizer.vocab_size=512"]
    if "interactive.chat" in text:
        words += [] if "--terminal" in words else ["--terminal"]  # which ends with its input; the page is tested in a browser
        words = ["models/demo-s9" if word == "models" else word for word in words]
    stand_ins = {"models/A": "teacher", "models/B": "student", "models/5-gram": "5-gram", "models/GPT2-Small-BabyLM-CE": "baseline",
                 "models/GPT2-Small-Distilled": "student", "models/GPT2-Small-Distilled-RL": "ppo"}
    if "ppo.py" in text:
        words += ["training.words=null", "training.steps=2", "training.batch_size=4", "training.precision=fp32", "data.seq_len=32",
                  "data.corpus=data/demo-s9/corpus", "data.eval_blocks=4", "model.path=models/demo-s9/student", "prompts.source=corpus",
                  "rewards=[{kind: random}]", "generation.max_new_tokens=4", "logging.eval_prompts=4", "name=rl"]
    words = [f"models/demo-s9/{stand_ins[word]}" if word in stand_ins else word for word in words]
    words = [f"results/{stand_ins[word.replace('results', 'models')]}" if word.startswith("results/") else word for word in words]
    if "babylm.scoring" in text:
        words = ["data/demo-s9/corpus" if word == "corpus_split" else word for word in words]
    if "cpu_study.sh" in text:
        words += ["teacher", "--seed", "1", *TWO_STEPS, "model.layers=1", "data.eval_blocks=4"]
    if re.search(r"benchmarks\.(loss|step|moep|run|eval|ppo)", text):
        words += ["--quick"]
    if "benchmarks.corpus" in text:
        words += ["--quick", "--tokenizer", "data/demo-s9/corpus/tokenizer"]
    if "submit_pipeline.sh" in text or "submit_sweep.sh" in text:
        words += ["--plan"]  # all that can be done without a cluster; tests/test_slurm.py has one
    if "sweep.py" in text and "--report" not in text:
        words += ["--dry_run"]
    if words[-1] == "test.sh":
        words += ["--collect-only", "tests/test_losses.py"]
    return words


def test_the_demo_ends_with_its_table_and_figures(project):
    folder, said = project
    rows = re.findall(r"^(5-gram|teacher|baseline|student|moep|ppo) .*", said, re.MULTILINE)
    assert rows == ["5-gram", "teacher", "baseline", "student", "moep", "ppo"]
    drawn = {path.name for path in (folder / "figures/demo-s9").iterdir()}
    assert {"overview.png", "pairs.png", "domains.png", "ce.svg", "experts-moep.png", "rewards.png"} <= drawn


@pytest.mark.parametrize("command", [command for command in commands() if command != "bash demo.sh"])
def test_readme_command_runs(project, command, warm_python):
    """Every `python` of these, the scripts' and torchrun's too, is a warm one: the demo has started every stage cold."""
    folder, _ = project
    warm = {"PATH": f"{warm_python.parent}:{os.environ['PATH']}", "PYTHON": str(warm_python)}
    if "--download" in command:  # there is no hub here: it has to say so
        done = run(folder, small(command), **warm, HF_ENDPOINT="http://127.0.0.1:9")
        assert done.returncode == 1 and "could not download" in done.stderr
        return
    done = run(folder, small(command), **({} if command == "bash test.sh" else warm))
    if "eval.finetune" in command:  # nothing can be learnt from these rows: it has to say so
        assert done.returncode == 1 and "every one of the 40 predictions is" in done.stderr + done.stdout, done.stdout + done.stderr
        return
    if "sweep.py" in command and "--report" in command:  # of a sweep of which nothing was run
        assert done.returncode == 1 and "none of the 24 runs" in done.stderr, done.stdout + done.stderr
        return
    if "--check_data" in command:  # a small stand-in is not the official data: it has to say so
        assert done.returncode == 1 and "not the official blimp" in done.stdout, done.stdout + done.stderr
        return
    assert done.returncode == 0, f"{' '.join(small(command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_files_that_the_readme_names_exist():
    names = {name.removeprefix("./") for name in re.findall(r"[\w./-]+\.(?:py|sh|yaml)\b", README)} - {"config.yaml"}
    ours = [f"/{file.relative_to(ROOT)}" for place in ROOT.iterdir() if place.name != ".venv"  # what is installed is not ours
            for file in (place.rglob("*") if place.is_dir() else [place])]
    assert not [name for name in names if not any(file.endswith(f"/{name}") for file in ours)]
