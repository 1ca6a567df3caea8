"""Stages as jobs of a real SLURM: chains, preemption, requeues and their bound, failures, arrays; and what is refused before a job exists.

Two clusters run on this machine (tests/slurm/cluster.sh): a stock one, and one that requeues jobs which end with code 75. Where SLURM
is not installed or we are not root, the tests that need them are skipped with the reason. What is real runs the stages themselves; "fake"
projects have scripts in their place that end in the one way that matters there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from babylm.config import BaselineConfig
from babylm.run_folder import RunFolder, seal, write_status
from babylm.schema import UserError, load
from slurm import pipeline, runs

ROOT = Path(pipeline.__file__).parents[1]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def wait_until(what, condition, seconds=400):
    """Poll `condition` until it is true; the deadline is for a machine with much else to do."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.1)
    return found


class Cluster:
    """A running SLURM."""

    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "etc" / "slurm.conf"), "BABYLM_SHARED": ""}

    def run(self, *command, cwd=None, **variables):
        done = subprocess.run([*map(str, command)], env={**self.env, **variables}, cwd=cwd, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, number):
        """What `scontrol show job` says of a job, as a dictionary."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", "--oneliner", number).split() if "=" in word)

    def tasks(self, number):
        """The same of every task of an array."""
        lines = self.run("scontrol", "show", "job", "--oneliner", number).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def wait(self, number):
        """Until a job, or every task of an array, is over; its state, or the set of theirs."""
        wait_until(f"job {number} is over", lambda: all(task["JobState"] in OVER for task in self.tasks(number)))
        states = {task["JobState"] for task in self.tasks(number)}
        return states.pop() if len(states) == 1 else states

    def states(self, number):
        return [task["JobState"] for task in self.tasks(number)]


@pytest.fixture(scope="module")
def clusters():
    """{"stock": Cluster, "requeue_exit": Cluster}"""
    missing = subprocess.run(["bash", CLUSTER, "check"], capture_output=True, text=True)
    if missing.returncode:
        pytest.skip(f"no real SLURM here: {missing.stderr.strip().removeprefix('error: ')}")
    lines = {"stock": [], "requeue_exit": ["RequeueExit=75", "JobFileAppend=1"]}
    found = {name: Cluster(name, Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))) for name in lines}  # a socket's path must be short
    try:
        starting = {name: subprocess.Popen(["bash", CLUSTER, "start", cluster.folder, *lines[name]], stdout=subprocess.DEVNULL,
                                           stderr=subprocess.PIPE, text=True) for name, cluster in found.items()}
        for name, process in starting.items():
            assert process.wait(60) == 0, f"{name}: {process.stderr.read()}"
            process.stderr.close()
        yield found
    finally:
        for stopping in [subprocess.Popen(["bash", CLUSTER, "stop", cluster.folder]) for cluster in found.values()]:
            stopping.wait(60)
        for cluster in found.values():
            shutil.rmtree(cluster.folder)


def make_project(folder, scripts=None):
    """A folder that looks like the repository: the real stages, or `scripts` {name: text} in their place."""
    folder.mkdir()
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("__pycache__", "*.out"))
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("babylm", "configs", "eval", "interactive"))]:
        if not scripts or path.name in ("babylm", "configs", "custom_dataset.py"):
            (folder / path.name).symlink_to(path)
    for name, text in (scripts or {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The real stages, and configs/tiny: the demo with models of a few thousand weights."""
    folder = make_project(tmp_path_factory.mktemp("real") / "project")
    configs = folder / "tiny"
    configs.mkdir()
    for file in (ROOT / "configs" / "demo").glob("*.yaml"):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        if file.stem == "corpus":
            values["corpus"] |= {"demo_words": "20K", "demo_pairs": 4}
            values["tokenizer"]["vocab_size"] = 512
        else:
            values["data"] |= {"seq_len": 32, "eval_blocks": 8}
            values["training"] |= {"steps": 2, "batch_size": 4, "precision": "fp32"}
            values["logging"]["eval_steps"] = 1000
        if file.stem in ("teacher", "baseline", "student"):
            values["model"] |= {"layers": 1, "width": 16, "heads": 2, "ffn": 16}
        if file.stem == "moep":
            values["model"] |= {"layers": 3, "width": 16, "heads": 2, "parallel_width": 8, "parallel_heads": 2, "experts": 2}
        if file.stem == "teacher":  # long enough for a signal to find it at work
            values["training"]["steps"] = 400
        if file.stem == "ppo":
            values["prompts"]["count"] = 8
            values["logging"]["eval_prompts"] = 4
            values["generation"]["max_new_tokens"] = 4
        (configs / file.name).write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder


def submitted(printed):
    """{label: job id} of what submit_pipeline.sh printed."""
    return {label: number for number, label in re.findall(r"^ *(\d+)  (\S+) +python", printed, re.MULTILINE)}


def status(run):
    return json.loads((run / "run" / "status.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chain(clusters, project):
    """The demo's pipeline, submitted to the cluster with RequeueExit=75: (cluster, {label: job id}, the status that each run then had)."""
    cluster = clusters["requeue_exit"]
    jobs = submitted(cluster.run("bash", "slurm/submit_pipeline.sh", "--configs", "tiny", "output=models/tiny", cwd=project))
    return cluster, jobs, {run: status(project / "models/tiny" / run) for run in ("teacher", "student", "ppo")}


ENDLESS = "raise SystemExit(75)"
WRITES_ARGUMENTS = """
import os, sys
with open(f"arguments-{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}", "a") as stream:
    print(*sys.argv[1:], file=stream)
"""
# A stage of two processes that takes a second to save, as large models do (they: more than the half minute that torchrun would give).
DISTRIBUTED = """
import json, os, signal, sys, time
def say(state, reason):
    if os.environ["RANK"] == "0":
        os.makedirs("models/distributed/run", exist_ok=True)
        with open("models/distributed/run/status.json", "w") as stream:
            print(json.dumps({"state": state, "reason": reason}, indent=1), file=stream)
def save(number, frame):
    time.sleep(1)
    print(f"saved by {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", flush=True)
    say("preempted", "in time")
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
say("running", "")
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    print("listening", flush=True)
    time.sleep(60)
say("done", "")
"""
FAKES = {
    "combine_babylm.py": "",
    "train_teacher.py": ENDLESS,
    "train_baseline.py": "import os; os.kill(os.getpid(), 9)",
    "train_student.py": "open('student-ran', 'w')",
    "train_moep_student.py": WRITES_ARGUMENTS,
    "sweep.py": WRITES_ARGUMENTS,
    "visual.py": "open('figures-ran', 'w')",
    "eval/__init__.py": "",
    "eval/zero_shot.py": WRITES_ARGUMENTS,
}


@pytest.fixture(scope="module")
def fakes(clusters, tmp_path_factory):
    """{cluster: (project, {label: job id})} of pipelines that go wrong, on both clusters at the same time."""
    found = {}
    for name, cluster in clusters.items():
        folder = make_project(tmp_path_factory.mktemp(name) / "project", FAKES)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for key in ("SLURM_CONF", "PATH"):
                patch.setenv(key, cluster.env[key])
            patch.setenv("MAX_REQUEUES", "1")
            jobs = pipeline.plan(Path("configs/demo"), "corpus,teacher,baseline,student,figures", ["output=models"])
            pipeline.submit(jobs, ["--time=10:00", "corpus:--comment=first"], torchrun=False)
        found[name] = folder, {job.label: job.id for job in jobs}
    return found


# ---- A real SLURM ---------------------------------------------------------------------------------------------------


def test_arrays_share_out_seeds_milestones_and_runs_of_a_sweep(chain, fakes, clusters):
    cluster, (folder, _) = clusters["stock"], fakes["stock"]
    for revision in ("chck_1K", "chck_2K", "chck_3K"):
        (folder / "models/scored" / revision).mkdir(parents=True)

    def submit(*arguments):
        return cluster.run("sbatch", "--parsable", *arguments, cwd=folder).strip()

    seeds = submit("--array=3,5", "slurm/seeds.sbatch", "train_moep_student.py", "--config", "configs/demo/moep.yaml", "training.lr=1e-3")
    scores = submit("--array=0-1", "slurm/milestones.sbatch", "models/scored", "--data", "evaluation data")
    sweep = submit("--array=0-1", "slurm/sweep.sbatch", "configs/demo/moep.yaml", "training.threads=1")
    gaps = submit("--array=1,3", "slurm/milestones.sbatch", "models/scored", "--data", "evaluation data")
    assert {cluster.wait(job) for job in (seeds, scores, sweep)} == {"COMPLETED"} and cluster.wait(gaps) == "FAILED"
    assert "must have no gaps" in (folder / f"slurm/logs/milestones-{gaps}_1.out").read_text()
    assert not list(folder.glob(f"arguments-{gaps}_*"))

    def lines(job, task):
        return (folder / f"arguments-{job}_{task}").read_text().splitlines()

    for seed in (3, 5):
        assert lines(seeds, seed) == [f"--config configs/demo/moep.yaml training.lr=1e-3 seed={seed} name=moep-s{seed}"]
        found = status(folder / f"models/demo/moep-s{seed}")
        assert (found["state"], found["job"]) == ("done", f"{seeds}_{seed}")
    assert lines(scores, 0) == ["models/scored --data evaluation data",
                                "models/scored --revision chck_2K --no-untrained --data evaluation data"]
    assert lines(scores, 1) == [f"models/scored --revision chck_{n}K --no-untrained --data evaluation data" for n in (1, 3)]
    for task in (0, 1):
        assert lines(sweep, task) == [f"--config configs/demo/moep.yaml --run {task} training.threads=1"]


@pytest.mark.parametrize("name", ["stock", "requeue_exit"])
def test_what_is_always_preempted_or_fails_ends_and_takes_its_dependents_with_it(clusters, fakes, name, monkeypatch, capsys):
    cluster, (folder, jobs) = clusters[name], fakes[name]
    assert cluster.wait(jobs["corpus"]) == "COMPLETED"
    assert cluster.job(jobs["corpus"])["Comment"] == "first"
    assert cluster.wait(jobs["baseline"]) == "FAILED"
    assert cluster.wait(jobs["teacher"]) == "FAILED"
    teacher, baseline = status(folder / "models/teacher"), status(folder / "models/baseline")
    assert cluster.job(jobs["teacher"])["Restarts"] == "1"  # MAX_REQUEUES
    assert (teacher["state"], teacher["job"]) == ("failed", jobs["teacher"])
    assert teacher["reason"].startswith("given up after 1 requeues (MAX_REQUEUES): stopped, exit code 75")
    assert baseline["state"] == "failed"
    assert "exit code 137 (killed: more memory than the job asked for?)" in baseline["reason"]
    log = (folder / f"slurm/logs/teacher-{jobs['teacher']}.out").read_text()
    assert "start 1," in log and "start 2," in log and "goes back into the queue, 1 of at most 1 times" in log  # appended to
    assert cluster.wait(jobs["student"]) == cluster.wait(jobs["figures"]) == "CANCELLED"
    assert not (folder / "student-ran").exists() and not (folder / "figures-ran").exists()

    # The student's job is gone, so nobody could say that its run does not wait any more.
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    assert status(Path("models/student"))["state"] == "pending"
    runs.main(["status"])
    job, printed = jobs["student"], capsys.readouterr().out
    assert re.search(rf"models/student +failed +{job} +- +job {job} ended before the run began", printed), printed
    assert status(Path("models/student"))["state"] == "failed"


def test_a_pipeline_of_real_stages_goes_on_where_it_was_preempted(chain, project):
    cluster, jobs, at_first = chain
    assert list(jobs) == ["corpus", "teacher", "baseline", "student", "moep", "ppo", "scores", "figures"]
    assert {run: (found["state"], found["job"]) for run, found in at_first.items()} == {run: ("pending", jobs[run]) for run in at_first}
    teacher = project / "models/tiny/teacher"
    wait_until("the teacher trains", lambda: (teacher / "run/metrics.jsonl").is_file() or cluster.states(jobs["teacher"]) == ["FAILED"])
    cluster.run("scancel", "--signal=USR1", "--batch", jobs["teacher"])  # what comes before the time limit
    wait_until("the teacher is requeued", lambda: cluster.job(jobs["teacher"])["Restarts"] == "1")
    found = status(teacher)
    assert found["state"] == "preempted" and re.search(r"SIGUSR1 at step \d+ of 400.*1 of at most 10 times", found["reason"]), found
    assert cluster.job(jobs["student"])["JobState"] == "PENDING"
    stopped = int(re.search(r"at step (\d+)", found["reason"]).group(1))

    assert {label: cluster.wait(job) for label, job in jobs.items()} == dict.fromkeys(jobs, "COMPLETED")
    folders = [project / "models/tiny" / run for run in ("teacher", "baseline", "student", "moep", "ppo")]
    assert [status(folder)["state"] for folder in folders] == ["done"] * 5
    assert json.loads((project / "models/tiny/student/run/record.json").read_text())["job"] == jobs["student"]
    rows = [json.loads(line) for line in (teacher / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == sorted(set(steps)) and steps[-1] == 400
    log = (project / f"slurm/logs/teacher-{jobs['teacher']}.out").read_text()
    assert len(re.findall(r"^step +1/400", log, re.MULTILINE)) == 1, "it began again"  # and the log was appended to
    assert "start 2," in log and f"at step {stopped} of 400; the same command continues there" in log
    assert list((project / "figures/tiny").glob("*.png"))


def test_a_sweep_is_submitted_with_students_after_their_teachers(chain, clusters, project):
    """With the teacher preempted, and one teacher that fails: its own student alone is not started. What is done is not submitted again."""
    cluster = clusters["requeue_exit"]
    base = {"teacher": {"stage": "train_teacher.py", "config": "tiny/teacher.yaml"},
            "KD": {"config": "tiny/student.yaml", "distillation.teacher": "models/sw/{text}-teacher-s1"}}
    (project / "sw.yaml").write_text(yaml.safe_dump({
        "name": "sw", "seeds": [1], "grid": {"text": {"good": {}, "bad": {"data.corpus": "nowhere"}}, "method": base}}, sort_keys=False))
    submit = ["bash", "slurm/submit_sweep.sh", "sw.yaml", "training.threads=1"]
    planned = cluster.run(*submit, "--plan", cwd=project)
    assert re.findall(r"- +(\d.*)", planned) == ["0 good-teacher-s1, 2 bad-teacher-s1", "1 good-KD-s1, 3 bad-KD-s1  after these"]
    cluster.wait(chain[1]["corpus"])  # its text is read here too
    out = cluster.run(*submit, "--", "--time=20:00", cwd=project)
    first, second = re.findall(r"^ *(\d+)  \d", out, re.MULTILINE)
    student = project / "models/sw/good-KD-s1"
    assert (status(student)["state"], status(student)["job"]) == ("pending", f"{second}_1")
    again = subprocess.run(submit, cwd=project, env=cluster.env, capture_output=True, text=True)
    assert again.returncode == 1 and "which is in the queue" in again.stderr
    wait_until("the teacher trains", lambda: "step " in (project / f"slurm/logs/sw-{first}_0.out").read_text())
    cluster.run("scancel", "--signal=USR1", "--batch", f"{first}_0")
    assert cluster.wait(first) == {"COMPLETED", "FAILED"} and cluster.wait(second) == {"COMPLETED", "FAILED"}
    log = (project / f"slurm/logs/sw-{first}_0.out").read_text()
    assert "goes back into the queue" in log and "resuming from models/sw/good-teacher-s1/checkpoint-" in log
    assert (student / "run" / "finished.json").is_file() and status(student)["state"] == "done"
    assert "not started, because bad-teacher-s1 is not done" in (project / f"slurm/logs/sw-{second}_3.out").read_text()
    left = cluster.run(*submit, "--plan", cwd=project)
    assert re.findall(r"- +(\d.*)", left) == ["2 bad-teacher-s1", "3 bad-KD-s1  after these"]


def test_torchrun_hides_the_code_but_not_the_status(clusters, fakes):
    cluster, (folder, _) = clusters["stock"], fakes["stock"]
    (folder / "train_distributed.py").write_text(DISTRIBUTED)
    (folder / "distributed.yaml").write_text("name: distributed")
    stage = ["train_distributed.py", "--config", "distributed.yaml"]
    job = cluster.run("sbatch", "--parsable", "--nodes=1", "slurm/multi_node.sbatch", *stage, cwd=folder, PROCESSES_PER_NODE="2").strip()
    log = folder / f"slurm/logs/babylm-{job}.out"
    wait_until("both listen", lambda: log.is_file() and log.read_text().count("listening") == 2 or cluster.states(job)[0] in OVER)
    cluster.run("scancel", "--signal=TERM", job)  # to the steps alone, as at the begin of a grace period: to torchrun, too
    assert cluster.wait(job) == "COMPLETED"
    text = log.read_text()
    assert cluster.job(job)["Restarts"] == "1" and status(folder / "models/distributed")["state"] == "done", text
    assert "saved by 0 of 2" in text and "saved by 1 of 2" in text, "torchrun did not wait for them"
    assert "slurm/job.sh: in time; job" in text and "exitcode  : 75" in text  # what torchrun says before it ends with code 1


def test_a_cancelled_run_is_not_requeued_and_says_so(clusters, fakes):
    cluster, (folder, _) = clusters["stock"], fakes["stock"]
    (folder / "train_slow.py").write_text("import signal, sys, time\n"
                                          "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
                                          "print('listening', flush=True)\ntime.sleep(60)")
    (folder / "slow.yaml").write_text("name: slow")
    job = cluster.run("sbatch", "--parsable", "slurm/stage.sbatch", "train_slow.py", "--config", "slow.yaml", cwd=folder).strip()
    log = folder / f"slurm/logs/babylm-{job}.out"
    wait_until("it listens", lambda: log.is_file() and "listening" in log.read_text())
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    wait_until("the script ends", lambda: status(folder / "models/slow")["state"] != "pending")
    assert status(folder / "models/slow")["state"] == "failed" and "cancelled" in status(folder / "models/slow")["reason"]
    assert cluster.job(job)["Restarts"] == "0"


def test_all_jobs_or_none(clusters, fakes, monkeypatch):
    cluster, (folder, _) = clusters["stock"], fakes["stock"]
    monkeypatch.chdir(folder)
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, cluster.env[key])
    jobs = pipeline.plan(Path("configs/demo"), "corpus,teacher,student", ["output=models/refused"])
    with pytest.raises(UserError, match=r"nothing was submitted[^$]*invalid partition"):
        pipeline.submit(jobs, ["student:--partition=nowhere"], torchrun=False)
    assert [cluster.wait(job.id) for job in jobs if job.id] == ["CANCELLED", "CANCELLED"]
    with pytest.raises(UserError, match="sbatch option 'partition=all': write --option=value"):
        pipeline.submit(jobs, ["partition=all"], torchrun=False)

    # A run that waits for its turn is not submitted a second time.
    job = cluster.run("sbatch", "--parsable", "--hold", "--wrap", "true", "--output=/dev/null").strip()
    write_status(Path("models/refused/teacher"), "pending", "", job)
    with pytest.raises(UserError, match=rf"models/refused/teacher belongs to job {job}, which is in the queue \(PENDING"):
        pipeline.require_free(jobs, runs.jobs_in_queue())
    cluster.run("scancel", job)


# ---- What is refused before anything is submitted -------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty project with the shipped configs, as the working directory."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_a_plan_follows_what_is_moved(here):
    jobs = {job.label: job for job in pipeline.plan(Path("configs/demo"), None, [
        "output=models/b", "seed=2", "corpus.output=data/b", "teacher:name=T", "student:distillation.cache=true", "training.steps=5"])}
    assert {label: [other.label for other in job.after] for label, job in jobs.items()} == {
        "corpus": [], "teacher": ["corpus"], "baseline": ["corpus"], "student-cache": ["corpus", "teacher"],
        "student": ["corpus", "teacher", "student-cache"], "moep": ["corpus", "teacher"], "ppo": ["corpus", "student", "teacher"],
        "scores": ["teacher", "baseline", "student", "moep", "ppo"], "figures": ["teacher", "baseline", "student", "moep", "ppo", "scores"]}
    assert jobs["corpus"].command[3:] == ["seed=2", "corpus.output=data/b"]
    assert jobs["ppo"].command[3:] == ["output=models/b", "seed=2", "training.steps=5", "data.corpus=data/b", "model.path=models/b/student",
                                       "rewards.0.teacher=models/b/T"]
    assert jobs["student-cache"].command[:2] == ["-m", "babylm.teacher_cache"]
    assert jobs["student-cache"].command[2:] == jobs["student"].command[1:]
    folders = [f"models/b/{run}" for run in ("5-gram", "T", "baseline", "student", "moep", "ppo")]
    assert jobs["figures"].command == ["visual.py", *folders, "--table", "--output", "figures/b"]
    kept = pipeline.plan(Path("configs/demo"), "corpus,teacher,baseline", ["output=models/b", "baseline:data.corpus=data/demo/corpus"])
    assert [other.label for other in kept[2].after] == ["corpus"]  # what was said is left as it is


@pytest.mark.parametrize("wanted, overrides, message", [
    (None, [], r"(?s)corpus.yaml: corpus.input: train_10M holds no \*.train files.*--config configs/10M/corpus.yaml --download strict-"
               r"small.*"
               r"teacher.yaml: model.path: gpt2-large is neither .*hf download gpt2-large.*rewards.0.model: meta-llama.*stages leaves"),
    ("student", ["training.lrr=1"], r"(?s)student.yaml: 1 mistake.*training.lrr: unknown key; did you mean lr\?"),
    ("student", [], r"(?s)student.yaml: data.corpus: corpus_split/manifest.json is missing.*"
                    r"student.yaml: distillation.teacher: models/GPT2-Large-BabyLM does not exist; make it first"),
    ("baseline", ["corpus.demo_words=3"], "override corpus.demo_words: concerns none of the stages to run"),
    ("baseline", ["teacher:seed=1"], "teacher is none of the stages to run: baseline"),
    ("techer", [], "'techer' is no stage; did you mean teacher?"),
    ("teacher:nothing", [], "configs/10M/nothing.yaml: no such config file"),
    ("teacher,teacher", [], "name every stage once"),
    ("teacher,teacher:teacher-lora", ["name=x"], "teacher writes models/x, too"),
    ("figures", [], "figures needs a training stage before it"),
])
def test_what_is_missing_or_wrong_is_said_at_once(here, wanted, overrides, message):
    with pytest.raises(UserError, match=message):
        pipeline.plan(Path("configs/10M"), wanted, overrides)


def test_a_missing_input_is_said_once(here):
    with pytest.raises(UserError) as error:
        pipeline.plan(Path("configs/10M"), "corpus,baseline,teacher,student", [])
    assert "corpus_split" not in str(error.value) and "GPT2-Large-BabyLM" not in str(error.value)  # they will be made, or so it was planned
    with pytest.raises(UserError, match="nowhere: no such folder"):
        pipeline.plan(Path("nowhere"), None, [])
    Path("train_10M").mkdir()
    with pytest.raises(UserError, match="holds none of corpus.yaml"):
        pipeline.plan(Path("train_10M"), None, [])


def test_an_unfinished_teacher_is_refused(here, corpus):
    write_status(Path("models/GPT2-Large-BabyLM"), "pending", "", "7")
    with pytest.raises(UserError, match="models/GPT2-Large-BabyLM is an unfinished run; finish it first"):
        pipeline.plan(Path("configs/10M"), "student", [f"data.corpus={corpus}"])


def test_the_run_of_a_command(here):
    for script in ("train_student.py", "combine_babylm.py"):
        Path(script).touch()
    assert runs.run_of(["train_student.py"]) == Path("models/GPT2-Small-Distilled")
    assert runs.run_of(["train_student.py", "name=a", "--config=configs/demo/student.yaml", "output=b"]) == Path("b/a")
    assert runs.run_of(["train_student.py", "--dry_run"]) is None
    assert runs.run_of(["combine_babylm.py"]) is None and runs.run_of(["-m", "babylm.teacher_cache", "name=a"]) is None
    with pytest.raises(UserError, match=r"train_studnet.py: no such stage; did you mean train_student.py\?"):
        runs.run_of(["train_studnet.py"])
    with pytest.raises(UserError, match="no.yaml: no such config file"):
        runs.run_of(["train_student.py", "--config", "no.yaml"])
    with pytest.raises(UserError, match="names no run, so seeds cannot"):
        runs.main(["name", "combine_babylm.py"])


def test_a_batch_script_does_not_wait_for_torch():
    code = "import sys, slurm.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_without_slurm(here, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    with pytest.raises(UserError, match="sbatch is not installed: run this where SLURM is"):
        pipeline.main()
    with pytest.raises(UserError, match="squeue is not installed"):
        runs.jobs_in_queue()


def test_a_controller_that_does_not_answer_makes_no_run_stale(here, monkeypatch):
    (here / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1")
    (here / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    write_status(Path("models/a"), "running", "", "7")
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        runs.status([])
    assert status(Path("models/a"))["state"] == "running"


@pytest.mark.parametrize("name", ["stage", "seeds", "milestones", "sweep", "multi_node"])
def test_batch_scripts_outside_a_job_or_in_another_folder(name, tmp_path):
    for folder, message in ((ROOT, "this script runs inside a job: sbatch"), (tmp_path, "submit from the repository's root")):
        done = subprocess.run(["bash", ROOT / f"slurm/{name}.sbatch"], cwd=folder, capture_output=True, text=True,
                              env={key: value for key, value in os.environ.items() if not key.startswith("SLURM_")})
        assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize("times, reason", [(1, "cancelled: SIGTERM at step 3"), (9, "cancelled by scancel while it was at work")])
def test_a_signal_that_ends_what_the_batch_script_has_started_does_not_hide_the_reason(tmp_path, times, reason):
    """scancel may reach the script's own helpers: with stand-ins for SLURM's commands, the one that reads the status dies `times` times."""
    run, stand_ins = tmp_path / "models" / "x", tmp_path / "bin"
    stand_ins.mkdir()
    sed = shutil.which("sed")
    for name, text in {
            "scontrol": "echo JobId=7 JobState=CANCELLED Reason=None Restarts=0 x",
            "srun": f"""printf '{{\n "state": "preempted",\n "reason": "SIGTERM at step 3"\n}}\n' > {run}/run/status.json; exit 75""",
            "sed": f"""case $* in *'"state"'*|*'"reason"'*) echo x >> {tmp_path}/calls
                       (($(wc -l < {tmp_path}/calls) > {times})) || kill -TERM $$;; esac; exec {sed} "$@" """}.items():
        (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stand_ins / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    ended = subprocess.run(["bash", "-c", f"source slurm/job.sh; run_resumable {run} anything"], cwd=make_project(tmp_path / "project"),
                           env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0 and (status(run)["state"], status(run)["reason"]) == ("failed", reason), ended.stderr


def test_shell_files_parse():
    files = [*(ROOT / "slurm").glob("*.s*"), CLUSTER]
    assert len(files) >= 10
    for file in files:
        assert subprocess.run(["bash", "-n", file]).returncode == 0


# ---- The run folder under SLURM -------------------------------------------------------------------------------------


@pytest.fixture
def folder_of(tmp_path, write_yaml):
    """folder_of("key=value", ...) -> the RunFolder of a small baseline."""
    file = write_yaml(tmp_path / "run.yaml", {"name": "x", "output": str(tmp_path / "models"), "training": {"steps": 1}})
    return lambda *overrides: RunFolder(load(BaselineConfig, str(file), "", [*overrides])[0], "train_baseline.py")


def test_a_folder_that_only_waits_is_free(folder_of):
    folder = folder_of()
    write_status(folder.root, "pending", "job 7 waits", "7")
    assert folder.open({}) is None and status(folder.root)["state"] == "pending"
    other = folder_of("name=y")
    write_status(other.root, "pending")
    (other.root / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is no run folder of this pipeline"):
        other.open({})
    waiting = folder_of("name=z", "fresh=true")
    write_status(waiting.root, "pending", "", "7")
    waiting.open({})
    assert not list(waiting.root.parent.glob("z-old*"))


def test_fresh_and_resume_path_are_for_the_first_start_of_a_job(folder_of, monkeypatch):
    def trained(folder, *steps):
        folder.append_metrics({"step": steps[0]})
        for step in steps:
            (folder.root / f"checkpoint-{step}").mkdir(exist_ok=True)
            seal(folder.root / f"checkpoint-{step}")

    old = folder_of()
    old.open({})
    trained(old, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # preempted before its first start had come to the folder
    fresh = folder_of("fresh=true")
    assert fresh.open({}) is None
    assert (old.root.with_name("x-old1") / "checkpoint-1").is_dir() and status(fresh.root)["job"] == "7"
    trained(fresh, 2)
    again = folder_of("fresh=true")
    assert again.open({}) == again.root / "checkpoint-2" and not old.root.with_name("x-old2").exists()
    trained(again, 3)
    back = folder_of(f"resume_path={again.root}/checkpoint-2")
    assert back.open({}) == again.root / "checkpoint-3"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")  # another job of that number, or an interactive one
    assert back.open({}) == again.root / "checkpoint-2" and not (again.root / "checkpoint-3").exists()


def test_a_second_signal_does_not_keep_a_run_from_saying_that_it_was_preempted(in_child, tmp_path, folder_of):
    def work():
        folder = folder_of()
        folder.open({})
        write = folder.set_status

        def signal_while_writing(*said):
            os.kill(os.getpid(), 15)
            write(*said)

        folder.set_status = signal_while_writing
        os.kill(os.getpid(), 10)
        time.sleep(5)

    done = in_child(work)
    assert done.returncode == 75, done.stderr
    assert status(tmp_path / "models" / "x")["state"] == "preempted"
