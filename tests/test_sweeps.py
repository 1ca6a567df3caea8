"""sweep.py: what a grid becomes, what is run and what is not run again, and what its report says."""

import csv
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import sweep as sweep_script
from babylm import figures, sweep_report, sweeps
from babylm.config import StudentConfig
from babylm.schema import UserError, check, identity, read_yaml
from babylm.sweep_report import interval
from babylm.sweeps import SweepConfig, plan

ROOT = Path(sweep_script.__file__).parent
BASE = {"name": "base", "output": "elsewhere", "seed": 5, "model": {"layers": 1, "width": 16, "heads": 2, "max_positions": 64},
        "data": {"corpus": "corpus", "seq_len": 32}, "training": {"steps": 4, "batch_size": 2, "lr": 1e-3, "warmup_steps": 1}}
DISTILLATION = {"teacher": "models/teacher", "alpha": 0.5}


@pytest.fixture
def sweep(tmp_path, write_yaml):
    """sweep(grid, ..., <keys of a sweep>) -> a checked sweep over two base configs in tmp_path: baseline.yaml and student.yaml."""
    write_yaml(tmp_path / "baseline.yaml", BASE)
    write_yaml(tmp_path / "student.yaml", {**BASE, "distillation": DISTILLATION})

    def make(grid, **keys):
        values = {"name": "s", "output": str(tmp_path), "config": str(tmp_path / "student.yaml"), "grid": grid, **keys}
        return check(SweepConfig, json.loads(json.dumps(values)), "sweep.yaml")

    return make


# ---- What a grid becomes --------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_every_seed(sweep, tmp_path):
    made = sweep({"training.lr": [1e-3, 0.5], "distillation.temperature": [1, 2]}, seeds=[1, 2],
                 set={"training.steps": 7, "training.batch_size": 3})
    runs = plan(made, ["training.threads=1", "training.batch_size=4"])
    assert {(run.config.training.threads, run.config.training.batch_size) for run in runs} == {(1, 4)}  # what is said last counts
    assert [run.name for run in runs][:3] == ["lr0p001-temperature1-s1", "lr0p001-temperature1-s2", "lr0p001-temperature2-s1"]
    assert len(runs) == len({run.folder for run in runs}) == 8 and runs[0].folder == tmp_path / "s" / "lr0p001-temperature1-s1"
    got = {(run.config.training.lr, run.config.distillation.temperature.start, run.config.seed) for run in runs}
    assert got == {(lr, t, seed) for lr in (1e-3, 0.5) for t in (1, 2) for seed in (1, 2)}
    assert {(run.config.training.steps, run.config.training.threads) for run in runs} == {(7, 1)}
    for run in runs:  # what is checked is what its command will read
        [command] = run.commands()
        values = read_yaml(command[command.index("--config") + 1])
        for override in command[command.index("--config") + 2:]:
            sweeps.apply_override(values, override)
        assert command[1] == "train_student.py" and check(StudentConfig, values, "") == run.config


def test_points_have_names_and_may_be_of_several_stages(sweep, tmp_path):
    made = sweep({"words": {"250K": {"data.corpus": "small"}, "1M": {"data.corpus": "large"}},
                  "method": {"teacher": {"stage": "train_teacher.py", "config": str(tmp_path / "baseline.yaml")},
                             "KD": {"distillation.teacher": str(tmp_path / "s" / "words{words}-teacher-s{seed}")}}})
    runs = plan(made)
    assert [run.name for run in runs] == ["words250K-teacher-s5", "words250K-KD-s5", "words1M-teacher-s5", "words1M-KD-s5"]
    assert [run.stage for run in runs] == ["train_teacher.py", "train_student.py"] * 2
    assert [run.config.data.corpus for run in runs] == ["small", "small", "large", "large"]
    assert runs[3].reads() == {runs[2].folder} and runs[2].reads() == set() and runs[1].seed == 5  # the seed of the config
    assert [run.labels for run in runs][1] == {"words": "250K", "method": "KD"}


def test_a_cached_teacher_is_captured_first(sweep):
    [run] = plan(sweep({"distillation.cache": [True]}))
    capture, train = run.commands()
    assert capture[1:3] == ["-m", "babylm.teacher_cache"] and train[1] == "train_student.py" and capture[3:] == train[2:]


def test_all_mistakes_are_said_before_anything_starts(sweep, tmp_path):
    with pytest.raises(UserError) as caught:
        plan(sweep({"training.lrr": [1, 2], "distillation.alpha": [0.5, 7]}))
    said = str(caught.value)
    assert said.count("training.lrr: unknown key; did you mean lr?") == 4 and said.count("distillation.alpha: Input should be less") == 2
    for grid, keys, message in (
            ({}, {}, "grid"),
            ({"training.lr": []}, {}, "grid.training.lr is empty"),
            ({"training.lr": [1, 1]}, {}, "1 stands there twice"),
            ({"training.lr": [1]}, {"control": {"method": "CE"}}, "control.method is no axis of the grid, which has training.lr"),
            ({"training.lr": [1]}, {"control": {"training.lr": 2}}, "2 is none of its values, 1"),
            ({"training.lr": [1]}, {"seeds": [1, 1]}, "seeds holds one twice"),
            ({"training.lr": [1]}, {"name": "a/b"}, "it is a folder"),
            ({"training.lr": 1}, {}, "training.lr: write a list of values of this key, or points"),
            ({"method": {"CE": 1}}, {}, "method: write a list of values of this key, or points"),
            ({"seed": [1, 2]}, {}, "grid.seed: write `seeds`"),
            ({"ce": {"a": {}}}, {}, "grid.ce: a report has a column of that name"),
            ({"training.lr": [1]}, {"sed": [1]}, "sed: unknown key")):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            sweep(grid, **keys)
    with pytest.raises(UserError, match="no such config file"):
        plan(sweep({"training.lr": [1]}, config=str(tmp_path / "none.yaml")))
    with pytest.raises(UserError, match="no config for"):
        plan(sweep({"training.lr": [1]}, config=None))
    with pytest.raises(UserError, match="stage 'x.py' is none of train_teacher.py"):
        plan(sweep({"m": {"a": {"stage": "x.py"}}}))
    with pytest.raises(UserError, match="stage 'train.py' is none of"):
        plan(sweep({"training.lr": [1]}, stage="train.py"))
    for given, extra in (({"set": {"name": "x"}}, ()), ({}, ["fresh=true"]), ({}, ["seed=9"])):
        with pytest.raises(UserError, match="(seed|name|fresh): given by the sweep itself"):
            plan(sweep({"training.lr": [1]}, **given), extra)
    with pytest.raises(UserError, match="two runs would be named a_b-s5"):
        plan(sweep({"m": {"a b": {}, "a,b": {"training.lr": 1}}}))
    # A name must say what a run is.
    with pytest.raises(UserError, match="a-s5 and b-s5 are the same run"):
        plan(sweep({"m": {"a": {"logging.logging_steps": 3}, "b": {}}}))
    with pytest.raises(UserError, match="grid: training.lr and m both set training.lr"):
        plan(sweep({"m": {"a": {"training.lr": 1}, "b": {}}, "training.lr": [2]}))
    for override, key in (("training.lr=2", "training.lr"), ("distillation.teachers.0.path=x", "distillation.teachers.0.path"),
                          ("distillation={teacher: t}", "distillation")):
        with pytest.raises(UserError, match=f"{key}: set by grid.(training.lr|distillation.teachers), so the name of a run would not say"):
            plan(sweep({"training.lr": [1], "distillation.teachers": [[{"path": "a"}]]}), [override])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baseline.yaml", "student.yaml"]


def test_what_is_read_comes_first(sweep, tmp_path):
    """However long the chain, in whatever order it is written; by any name of the folder, and of a milestone in it."""
    root = tmp_path / "s"
    points = {"last": {"distillation.teacher": str(root / "middle-s5" / "chck_1M")},
              "middle": {"distillation.teacher": str(root / "x" / ".." / "first-s5")}, "first": {}}
    runs = plan(sweep({"which": points}))
    assert [run.name for run in sweeps.in_order(runs)] == ["first-s5", "middle-s5", "last-s5"]
    runner, done = sweeps.Runner(runs), []
    runner._outcome = lambda run: done.append(run.name) or "done"
    assert runner.run() == 0 and done == ["first-s5", "middle-s5", "last-s5"]
    points["first"] = {"distillation.teacher": str(root / "last-s5")}
    with pytest.raises(UserError, match="these runs read each other, so none can be the first: last-s5, middle-s5, first-s5"):
        sweeps.Runner(plan(sweep({"which": points})))
    for number in (1, 0):
        points["first"] = {}
        runner = sweeps.Runner(plan(sweep({"which": points})), only=number)  # as a task of an array
        assert runner.run() == 1 and list(runner.outcomes.values()) == ["not started"]


def test_a_run_is_what_it_was_made_with(sweep, tmp_path):
    """Another setting, corpus or teacher is another run; a run that was refused before it trained is none."""
    [run] = plan(sweep({"training.lr": [1e-3]}))
    finish(run, 4.0)
    assert run.state() == "done"
    for key, value in (("training.lr", 2e-3), ("data.corpus", "other"), ("distillation.teacher", "models/other")):
        [other] = plan(sweep({"which": {"lr0p001": {key: value}}}))
        assert other.folder == run.folder and other.state() == "other settings" and other.other_settings() == [key]
    assert plan(sweep({"training.lr": [1e-3]}, set={"logging.logging_steps": 3}))[0].state() == "done"
    (run.folder / "run" / "metrics.jsonl").unlink()
    (run.folder / "run" / "finished.json").unlink()
    assert other.other_settings() == [] and other.state() == "new"


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_planned(path, monkeypatch):
    """Its name is its file's, its head says the command, and its runs differ in what their names say."""
    monkeypatch.chdir(ROOT)
    sweep = check(SweepConfig, read_yaml(path), str(path))
    runs = plan(sweep)
    what = {json.dumps([run.stage, identity(run.config), run.config.data.corpus, sorted(map(str, run.reads()))]) for run in runs}
    assert sweep.name == path.stem and len(what) == len(runs)
    head = path.read_text().partition("\nname:")[0]
    assert f"#   python sweep.py --config configs/sweeps/{path.name}" in head and "--report" in head


# ---- The report -----------------------------------------------------------------------------------------------------


def finish(run, ce, **more):
    """The record that a finished run leaves, as far as a report reads it."""
    (run.folder / "run").mkdir(parents=True, exist_ok=True)
    (run.folder / "run" / "metrics.jsonl").write_text("")
    (run.folder / "run" / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump()))
    fingerprints = {"fingerprint.train": "x", "fingerprint.val": run.config.data.corpus, "fingerprint.tokenizer": "t"}
    (run.folder / "run" / "identity.json").write_text(json.dumps({**identity(run.config), **fingerprints}))
    (run.folder / "run" / "finished.json").write_text(json.dumps({"steps": 4, "words_seen": 100, "ce": ce, "loss": 1 / ce, **more}))


@pytest.fixture
def reported(sweep, tmp_path, capsys):
    """reported(sweep, {run: CE, ...}) -> (rows of report.csv, text of report.md, printed), of runs finished by hand."""

    def make(made, ces, **results):
        runs = plan(made)
        for run in runs:
            if run.name in ces:
                finish(run, ces[run.name])
        for name, score in results.items():
            folder = tmp_path / "results" / name.replace("__", "-") / "main" / "zero_shot" / "causal"
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps({"tasks": {"blimp_fast": {"score": score}}}))
        capsys.readouterr()
        sweep_report.report(made, runs, tmp_path / "results")
        root = tmp_path / made.name
        return list(csv.DictReader((root / "report.csv").open())), (root / "report.md").read_text(), capsys.readouterr().out

    return make


def test_means_spreads_and_paired_differences(sweep, reported):
    made = sweep({"method": {"CE": {"distillation.alpha": 1.0}, "KD": {}}}, seeds=[1, 2, 3], control={"method": "CE"})
    ces = {"CE-s1": 4.4, "CE-s2": 4.6, "CE-s3": 4.5, "KD-s1": 4.3, "KD-s2": 4.0, "KD-s3": 4.1}
    rows, text, out = reported(made, ces, KD__s1=60.0, KD__s2=62.0, KD__s3=61.0, CE__s1=55.0, CE__s2=58.0, CE__s3=56.0)
    assert text.strip() in out
    # Paired by seed: -0.1, -0.6, -0.4; t(0.975, 2) = 4.3027; sd = 0.25166; half = 4.3027 * 0.25166 / sqrt(3) = 0.6252
    assert "| KD | 3 | **4.133** ± 0.153 | -0.367 ± 0.625 |" in text
    assert "| CE | 3 | 4.500 ± 0.100 |  |" in text  # the control is compared with nothing
    assert "61.00 ± 1.00 | +4.67 ± 1.43 |" in text  # 5, 4, 5
    perplexities = [math.exp(ce) for name, ce in ces.items() if name.startswith("KD")]
    assert f"{statistics.mean(perplexities):.1f} ± {statistics.stdev(perplexities):.1f}" in text  # of each run, not of the mean
    assert [row["run"] for row in rows] == list(ces) and rows[4]["ce"] == "4.0" and rows[4]["method"] == "KD" and rows[4]["seed"] == "2"
    assert float(rows[3]["perplexity"]) == math.exp(4.3) and rows[3]["blimp_fast"] == "60.0" and rows[3]["words_seen"] == "100"


def test_a_control_is_taken_with_all_else_equal(sweep, reported):
    made = sweep({"words": {"250K": {}, "1M": {"training.lr": 1e-2}}, "method": {"CE": {"distillation.alpha": 1.0}, "KD": {}}},
                 control={"method": "CE"})
    _, text, _ = reported(made, {"words250K-CE-s5": 4.5, "words250K-KD-s5": 4.4, "words1M-CE-s5": 4.3, "words1M-KD-s5": 4.0})
    assert "| 250K | KD | 1 | 4.400 | -0.100 |" in text and "| 1M | KD | 1 | **4.000** | -0.300 |" in text
    assert "Best by validation CE: words 1M, method KD " in text


def test_an_interval_is_student_s(sweep):
    middle, half = interval([-0.4, -0.3, -0.4])
    assert middle == pytest.approx(-11 / 30) and half == pytest.approx(4.302653 * (1 / 300) ** 0.5 / 3**0.5, rel=1e-6)
    assert interval([0.2])[0] == 0.2 and math.isnan(interval([0.2])[1])


def test_the_best_is_that_of_lowest_ce_and_not_of_lowest_loss(sweep, reported):
    """The loss of a small w_ce is small whatever the model does: `finish` writes a loss that falls as the CE grows."""
    _, text, _ = reported(sweep({"distillation.alpha": [0.9, 0.1]}), {"alpha0p9-s5": 4.0, "alpha0p1-s5": 4.2})
    assert "Best by validation CE: distillation.alpha 0.9 " in text and "(one seed: none)" in text and "**4.000**" in text


def test_what_is_not_done_is_in_no_mean_and_said(sweep, reported, tmp_path):
    made = sweep({"training.lr": [1e-3, 1e-2]}, seeds=[1, 2])
    other = plan(sweep({"training.lr": [1e-2]}, seeds=[2], set={"training.steps": 9}))[0]
    finish(other, 1.0)  # a run of other settings under a name of this sweep
    rows, text, _ = reported(made, {"lr0p001-s1": 4.0, "lr0p01-s1": 4.2})
    assert [row["state"] for row in rows] == ["done", "new", "done", "other settings"]
    assert "| 0.001 | 1 | **4.000** |" in text and "lr0p001-s2 is not done (new)" in text
    assert "lr0p01-s2 is not done (other settings)" in text
    with pytest.raises(UserError, match=r"none of the 1 runs in .* is done \(1 new\): python sweep.py"):
        reported(sweep({"training.lr": [1]}, name="empty"), {})
    with pytest.raises(UserError, match=r"\(3 other settings, 1 new\).* differ in training.(lr, training.)?steps: give the report"):
        reported(sweep({"training.lr": [1e-3, 1e-2]}, seeds=[1, 2], set={"training.steps": 5}), {})


def test_what_was_measured_on_other_text_is_not_compared(sweep, reported):
    """Here the corpus stands for its validation text (`finish`); seq_len is another way to measure something else."""
    for key, values in (("data.corpus", ["a", "b"]), ("data.seq_len", [16, 32])):
        made = sweep({"what": {str(value): {key: value} for value in values}, "method": {"CE": {"distillation.alpha": 1.0}, "KD": {}}},
                     name=key.replace(".", "-"), control={"method": "CE"})
        runs = [run.name for run in plan(made)]
        _, text, out = reported(made, dict(zip(runs, (4.5, 4.4, 3.3, 3.0), strict=True)))
        assert "No best" in text and "**" not in text and "no figure" in out
        assert "| 4.400 | -0.100 |" in text and "| 3.000 | -0.300 |" in text  # each with a control of its own kind
        made = sweep({"what": {str(value): {key: value} for value in values}}, name=f"{key.replace('.', '-')}-2",
                     control={"what": str(values[0])})
        _, text, _ = reported(made, {run.name: 4.0 for run in plan(made)})
        assert "0.000" not in text.replace("4.000", "")


def test_one_kind_of_validation_and_no_stale_scores(sweep, reported, tmp_path):
    made = sweep({"training.lr": [1e-3, 1e-2]})
    runs = plan(made)
    ces = {run.name: 4.0 for run in runs}
    _, text, _ = reported(made, ces, lr0p001__s5=50.0)
    (runs[0].folder / "run" / "scores.json").write_text('{"ce": 3.0, "validation": {"text": "a"}}')
    assert "4.000" in text and "50.00" in text
    old = time.time() - 100
    os.utime(tmp_path / "results" / "lr0p001-s5" / "main" / "zero_shot" / "causal" / "summary.json", (old, old))
    rows, text, _ = reported(made, ces)
    assert rows[0]["ce"] == "4.0" and "some runs have a run/scores.json and some have none" in text
    assert "older than the run" in text and "50.00" not in text
    (runs[1].folder / "run" / "scores.json").write_text('{"ce": 3.5, "validation": {"text": "a"}}')
    rows, text, _ = reported(made, ces)
    assert [row["ce"] for row in rows] == ["3.0", "3.5"] and "the whole validation part" in text and "Best by" in text
    (runs[1].folder / "run" / "scores.json").write_text('{"ce": 3.5, "validation": {"text": "b"}}')
    assert "No best" in reported(made, ces)[1]


def test_figures(sweep, reported, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path, save=figures.save: drawn.append(figure) or save(figure, path))
    grid = sweep({"lambda": {"1": {"distillation.alpha": 0.5}, "9": {"distillation.alpha": 0.1}}, "distillation.temperature": [2, 1]})
    names = [run.name for run in plan(grid)]  # the temperatures are drawn in ascending order
    reported(grid, dict(zip([names[number] for number in (1, 0, 3)], (4.2, 4.3, 4.1), strict=True)))  # the fourth: an empty cell
    [panel, _] = drawn[-1].axes
    assert panel.images[0].get_array().tolist()[0] == [4.2, 4.3] and panel.get_ylabel() == "lambda" and panel.get_xlabel() == "temperature"
    assert [text.get_text() for text in panel.texts] == ["4.200", "4.300", "4.100"]
    [frame] = panel.patches
    assert (round(frame.get_x() + 0.48), round(frame.get_y() + 0.46)) == (0, 1)  # the lowest
    lines = sweep({"words": {"250K": {}, "1M": {"data.offset_seed": 3}}, "method": {"CE": {"training.lr": 1e-2}, "KD": {}}},
                  name="lines", seeds=[1, 2])
    ces = {run.name: 4 + number / 10 for number, run in enumerate(plan(lines))}
    reported(lines, ces)
    [ax] = drawn[-1].axes
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["CE", "KD"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["250K", "1M"]
    assert ax.containers[0][0].get_xydata().tolist() == [[250_000, pytest.approx(4.05)], [1_000_000, pytest.approx(4.45)]]
    assert Image.open(tmp_path / "lines" / "report.png").size[0] > 300
    reported(sweep({"method": {"a": {"training.lr": 1e-2}, "b": {}}}, name="none"), {"a-s5": 4.0, "b-s5": 4.1})
    assert len(drawn) == 2 and not (tmp_path / "none" / "report.png").exists()  # nothing numeric to draw
    named = sweep({"distillation.divergence": ["forward_kl", "jsd"], "data.random_chunk": [True, False]}, name="named")
    reported(named, {run.name: 4 + number for number, run in enumerate(plan(named))})
    assert drawn[2].axes[0].images[0].get_array().tolist() == [[4, 5], [6, 7]]
    assert [tick.get_text() for tick in drawn[2].axes[0].get_yticklabels()] == ["forward_kl", "jsd"]


# ---- Running --------------------------------------------------------------------------------------------------------


def test_runs_that_can_be_at_work_together(sweep, tmp_path):
    root = tmp_path / "s"
    points = {"KD": {"distillation.teacher": str(root / "words{words}-teacher-s5")}, "teacher": {},
              "last": {"distillation.teacher": str(root / "words{words}-KD-s5")}}
    made = sweep({"words": {"250K": {"data.corpus": "small"}, "1M": {"data.corpus": "large"}}, "method": points})
    assert sweeps.waves(plan(made)) == [[1, 4], [0, 3], [2, 5]]


def test_what_cannot_be_written_or_read_is_a_failed_run(sweep, tmp_path, capfd):
    runs = plan(sweep({"training.lr": [1, 2]}))
    finish(runs[0], 4.0)
    (runs[0].folder / "run" / "finished.json").write_text("{")
    runs[1].folder.mkdir()
    runs[1].log.mkdir()  # a log that cannot be written
    assert sweeps.Runner(runs).run() == 1
    said = capfd.readouterr().out
    assert "lr1-s5: FAILED: " in said and "finished.json is damaged" in said and "2 runs: 2 failed" in said
    assert "lr2-s5: FAILED: [Errno 21] Is a directory" in said


def test_a_signal_that_is_ignored_stays_ignored(sweep):
    runner, seen = sweeps.Runner(plan(sweep({"training.lr": [1]}))), []
    runner._outcome = lambda run: seen.append([signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)]) or "done"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert runner.run() == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [[signal.SIG_IGN, runner._stop]]
    assert runner.run() == 0 and seen[1] == [runner._stop] * 2 and signal.getsignal(signal.SIGHUP) == before


def test_a_sweep_of_real_runs(corpus, tmp_path, write_yaml, in_child, warm_python):
    """A student that reads a teacher of the same sweep, and a run that fails; stopped by a signal, gone on with, recognised as done."""
    base = {**BASE, "data": {**BASE["data"], "corpus": str(corpus), "eval_blocks": 4}, "checkpoints": {"milestones": False}}
    teacher = write_yaml(tmp_path / "teacher.yaml", base)
    student = write_yaml(tmp_path / "student.yaml", {**base, "distillation": DISTILLATION})
    root = tmp_path / "real"
    points = {"of_failing": {"distillation.teacher": str(root / "failing-s1")},
              "student": {"distillation.teacher": str(root / "teacher-s1")},
              "failing": {"stage": "train_baseline.py", "config": str(teacher), "data.corpus": str(tmp_path / "no")},
              "teacher": {"stage": "train_teacher.py", "config": str(teacher), "training.steps": 300}}

    def written(path):
        return path.read_text() if path.exists() else ""

    def sweep_of(names, *args, stop=False):
        file = write_yaml(tmp_path / "sweep.yaml", {"name": "real", "output": str(tmp_path), "config": str(student), "seeds": [1],
                                                    "grid": {"which": {name: points[name] for name in names}}})
        def stop_at_work():
            while "step " not in written(root / "teacher-s1.log"):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)

        def main():
            if stop:
                threading.Thread(target=stop_at_work, daemon=True).start()
            else:  # no signal is sent to what is started then
                sys.executable = str(warm_python)
            sys.argv = ["sweep.py", "--config", str(file), *args]
            sweep_script.main()

        return in_child(main)

    first = sweep_of(points, stop=True)
    assert first.returncode == 75, first.stdout + first.stderr
    assert "teacher-s1: preempted after" in first.stdout and "4 runs: " in first.stdout
    assert "failing-s1: FAILED with exit code 1" in first.stdout and "no/manifest.json is missing" in first.stdout
    assert "of_failing-s1: not started, because failing-s1 is not done" in first.stdout
    [checkpoint] = (root / "teacher-s1").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert step < 300 and json.loads((root / "teacher-s1" / "run" / "status.json").read_text())["state"] == "preempted"

    second = sweep_of(["student", "teacher"], "--jobs", "2")
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"resuming from {checkpoint}" in (root / "teacher-s1.log").read_text() and "2 runs: 2 done" in second.stdout
    assert second.stdout.index("teacher-s1: done") < second.stdout.index("student-s1: starts")  # listed first, but it reads the other
    assert (root / "student-s1" / "run" / "finished.json").is_file()

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    third = sweep_of(["student", "teacher"])
    assert third.returncode == 0 and "student-s1: done, CE" in third.stdout and "starts" not in third.stdout
    points["student"]["training.lr"] = 1e-2
    fourth = sweep_of(["student", "teacher"])
    assert fourth.returncode == 1 and "student-s1: FAILED: the folder holds a run with other settings" in fourth.stdout
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    listed = sweep_of(["student", "teacher"], "--dry_run").stdout.splitlines()
    assert len(listed) == 2 and "other settings" in listed[0] and "done" in listed[1] and "python train_teacher.py --config" in listed[1]
    assert sweep_of(["student", "teacher"], "--count").stdout == "2\n"
    assert "numbered from 0" in sweep_of(["student", "teacher"], "--run", "2").stderr
    assert sweep_of(["student", "teacher"], "--run", "1").stdout.startswith(f"[2/2] {root / 'teacher-s1'}: done")
