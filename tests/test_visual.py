"""Stage 7 on real files: what is read, what is drawn, what is said when files are missing or damaged."""

import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

import visual
from babylm import figures

SCRIPT = Path(visual.__file__)


def rows(steps=100, kl=True, bad_at=None, final=3.5):
    """Lines of a metrics file: training every 5 steps, validation every 20, one milestone."""
    for step in range(5, steps + 1, 5):
        place = {"step": step, "words": step * 1000, "seconds": step * 0.5, "epoch": step / steps}
        ce = math.nan if step == bad_at else final + 6 * math.exp(-step / 20)
        train = {"kind": "train", **place, "ce": ce, "loss": ce, "lr": 1e-3 * (1 - step / steps), "hidden": 1 / step}
        yield {**train, "kl": ce / 4} if kl else train
        if step == 50:
            yield {"kind": "milestone", **place, "name": "chck_50K"}
        if step % 20 == 0:
            yield {"kind": "eval", **place, "ce": ce, "perplexity": math.exp(ce), "ce_by_domain": {"childes": ce - 1},
                   **({"kl": ce / 5} if kl else {})}


def scores(**changes):
    domains = ("bnc_spoken", "childes", "gutenberg", "open_subtitles", "simple_wiki", "switchboard")
    return {"name": "x", "kind": "neural", "parameters": 2_560_000, "words_seen": 1_000_000, "seconds": 120.0,
            "ce": 3.9, "perplexity": 49.4, "pairs_mean": 0.75,
            "by_domain": {name: {"ce": 3.1, "perplexity": 22.2 + place} for place, name in enumerate(domains)},
            "pairs": {"agreement_simple": {"accuracy": 0.9, "n": 200, "long_distance": False},
                      "agreement_pp": {"accuracy": 0.6, "n": 200, "long_distance": True}}, **changes}


@pytest.fixture
def make(tmp_path):
    """Make a run folder: make(name, lines, finished=..., tail=..., scores=...)."""
    def build(name, lines=None, finished=True, tail="", scores=None):
        record = tmp_path / "models" / name / "run"
        record.mkdir(parents=True)
        if lines is not None:
            (record / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
        if finished:
            (record / "finished.json").write_text("{}")
        if scores is not None:
            (record / "scores.json").write_text(json.dumps(scores))
        return str(record.parent)
    return build


@pytest.fixture
def out(tmp_path):
    return tmp_path / "figures"


def svg_words(path):
    return [text for element in ElementTree.parse(path).iter() if (text := (element.text or "").strip())]


def has_ink(path):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    return pixels.std() > 5 and (pixels < 128).sum() > 500


def test_the_script_draws_several_runs(make, out, tmp_path):
    baseline, student = make("baseline_ce", rows(kl=False)), make("student", rows(final=3.2), finished=False)
    done = subprocess.run([sys.executable, "-W", "error", str(SCRIPT), baseline, student, "--output", str(out)],
                          check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {"ce", "kl", "perplexity", "lr", "overview"}
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        assert has_ink(out / f"{name}.png")
        assert f"{name}.svg" in done.stdout
        words = svg_words(out / f"{name}.svg")
        assert "student (unfinished)" in words
        assert ("baseline_ce" in words) == (name != "kl")          # without a teacher there is no KL to name
    assert {"train", "validation", "milestone", "50K", "words seen"} <= set(svg_words(out / "ce.svg"))
    for name, width in (("ce", 660), ("overview", 1360)):
        with Image.open(out / f"{name}.png") as image:
            assert image.size[0] == width
    assert "baseline_ce: 100 steps, 100K words" in done.stdout and "val perplexity" in done.stdout


@pytest.mark.parametrize(("x", "label"), [("steps", "optimizer steps"), ("time", "seconds")])
def test_x_axes(make, out, x, label):
    assert visual.main([make("a", rows()), "--x", x, "--metrics", "ce", "--output", str(out)]) == 0
    assert label in svg_words(out / "ce.svg")


def test_long_times_are_in_minutes_and_hours(make, out):
    slow = [{**row, "seconds": row["step"] * 400} for row in rows()]
    assert visual.main([make("a", slow), "--x", "time", "--metrics", "ce", "--output", str(out)]) == 0
    assert "hours" in svg_words(out / "ce.svg")


def test_any_logged_term_and_nested_values(make, out, capsys):
    options = ["--metrics", "hidden,ce_by_domain.childes,typo", "--smooth", "3", "--log_y", "--width", "6.8"]
    assert visual.main([make("a", rows()), *options, "--output", str(out)]) == 0
    assert has_ink(out / "hidden.png") and has_ink(out / "ce_by_domain.childes.png") and not (out / "typo.png").exists()
    assert "no run has a finite value of typo" in capsys.readouterr().out


def test_values_that_are_not_finite_leave_gaps_and_are_reported(make, out, capsys):
    lines = list(rows(bad_at=40)) + [{"kind": "eval", "step": 120, "words": 120000, "seconds": 60, "ce": math.inf},
                                     {"kind": "eval", "step": 140, "words": 140000, "seconds": 70, "ce": None}]
    folder = make("diverged", lines)
    assert visual.main([folder, "--metrics", "ce", "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert "train ce is not finite 1 time(s)" in captured.err and "eval ce is not finite 3 time(s)" in captured.err
    assert "val CE not finite" in captured.out and has_ink(out / "ce.png")
    place, y = figures.points(figures.load_metrics(folder), "ce")["validation"]
    assert len(place) == 7 and np.isnan(y[[1, 5, 6]]).all() and np.isfinite(y[[0, 2, 3, 4]]).all()


def test_nothing_finite_is_nothing_to_draw(make, out, capsys):
    lines = [{"kind": "train", "step": 1, "words": 10, "seconds": 1, "ce": math.nan, "lr": None}]
    assert visual.main([make("nan", lines), "--output", str(out)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_half_written_and_foreign_lines_are_named(make, out, capsys):
    folder = make("killed", [*rows(), 17], finished=False, tail='{"kind":"train","step":105,"wor')
    count = sum(1 for _ in rows())
    assert visual.main([folder, "--metrics", "ce", "--output", str(out)]) == 0
    message = capsys.readouterr().err
    assert f"metrics.jsonl:{count + 1}: not a JSON object" in message
    assert f"metrics.jsonl:{count + 2}: cut short" in message


def test_a_cut_inside_a_character_is_survived(make):
    folder = make("killed", rows())
    with open(Path(folder, "run", "metrics.jsonl"), "ab") as file:
        file.write('{"kind":"train","note":"é'.encode()[:-1])
    assert len(figures.load_metrics(folder).train) == 20


def test_a_resumed_run_is_drawn_once(make):
    first, again = list(rows()), [row for row in rows(final=2.0) if row["step"] > 60]
    run = figures.load_metrics(make("resumed", first + again))
    steps = [row["step"] for row in run.train]
    assert steps == sorted(set(steps)) and len(run.milestones) == 1
    assert run.train[-1]["ce"] == again[-2]["ce"] and [row["step"] for row in run.evals] == [20, 40, 60, 80, 100]


def test_missing_and_empty_runs(make, out, tmp_path, capsys):
    empty, bare, gone = make("empty", []), make("bare"), str(tmp_path / "models" / "gone")
    assert visual.main([empty, bare, gone, "--output", str(out)]) == 2
    message = capsys.readouterr().err
    for part in (empty, bare, gone, "no such folder", "holds no numbers", "is missing", "python train_baseline.py"):
        assert part in message
    assert not out.exists()
    assert visual.main([empty, make("good", rows()), gone, "--metrics", "ce", "--output", str(out)]) == 0
    assert "warning: gone: no such folder" in capsys.readouterr().err


def test_runs_with_one_name_are_told_apart(make, out):
    folders = [make("x/student", rows()), make("y/student", rows())]
    assert visual.main([*folders, "--metrics", "ce", "--output", str(out)]) == 0
    assert {"x/student", "y/student"} <= set(svg_words(out / "ce.svg"))


def test_odd_names_stay_readable(make, out):
    assert visual.main([make("_a$b$", rows()), make("c^_{2}", rows()), "--metrics", "ce", "--output", str(out)]) == 0
    assert {"_a$b$", "c^_{2}"} <= set(svg_words(out / "ce.svg"))


def test_scores_are_drawn(make, out, capsys):
    ngram = make("ngram", finished=False, scores=scores(parameters=None, pairs={"agreement_pp": {"accuracy": 0.5}}))
    assert visual.main([make("student", rows(), scores=scores()), ngram, "--metrics", "ce", "--output", str(out)]) == 0
    for name in ("pairs", "domains"):
        assert has_ink(out / f"{name}.png") and {"student", "ngram"} <= set(svg_words(out / f"{name}.svg"))
    assert {"agreement pp", "long-distance"} <= set(svg_words(out / "pairs.svg"))
    assert {"open subtitles", "all"} <= set(svg_words(out / "domains.svg"))
    assert "ngram: scores only" in capsys.readouterr().out and "ngram" not in svg_words(out / "ce.svg")


def test_table(make, out, capsys):
    long_name = "GPT2-Small-Distilled-with-a-very-long-name-and-more-s2"
    folders = [make("student", rows(), scores=scores()), make("unscored", rows()),
               make(long_name, scores=scores(pairs=None, pairs_mean=0.5, perplexity=math.inf, seconds=None))]
    assert visual.main([*folders, "--table", "--metrics", "lr", "--output", str(out)]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len(lines) == 5 and all(len(line) <= 120 for line in lines)
    header = lines[0].split()
    assert header[:3] == ["model", "params", "words"] and header[-3:] == ["pairs", "long", "secs"] and "swbd" in header
    expected = "student 2.56M 1M 3.900 49.4 22.2 23.2 24.2 25.2 26.2 27.2 0.750 0.600 120"
    assert lines[2].split() == expected.split()
    assert lines[3].split()[0].endswith("more-s2") and lines[3].split()[4] == "-"
    assert lines[3].split()[-3:] == ["0.500", "-", "-"]
    assert len({len(line) for line in lines[:4]}) == 1


def test_damaged_scores_are_reported(make, out, capsys):
    folder = make("student", rows())
    Path(folder, "run", "scores.json").write_text('{"ce": 3.')
    assert visual.main([folder, "--table", "--metrics", "lr", "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert "scores.json: not a JSON object" in captured.err and "no table" in captured.out


def test_figures_are_the_same_every_time_and_leave_nothing_behind(make, tmp_path):
    runs, before = [figures.load_metrics(make("a", rows()))], dict(matplotlib.rcParams)
    first, second = (figures.save(figures.curve_figure(runs, ["ce", "lr"]), tmp_path / name / "f") for name in "xy")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["f.png", "f.svg"]
    assert dict(matplotlib.rcParams) == before


def test_many_runs_fit(make, tmp_path):
    runs = [figures.load_metrics(make(f"run-{i}", rows(final=3 + i / 10))) for i in range(9)]
    figure = figures.curve_figure(runs, ["ce"])
    figures.save(figure, tmp_path / "many")
    axes = figure.axes[0].get_window_extent()
    assert all(not axes.overlaps(legend.get_window_extent()) for legend in figure.legends)
    assert axes.height > 0.4 * figure.bbox.height
    marks = {(figures.look(i)["color"], figures.look(i)["marker"]) for i in range(9)}
    assert len(marks) == 9


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (950, "950"), (100_000, "100K"), (1e6, "1M"), (2.5e9, "2.5B"),
                                             (2e-4, "2e-4"), (0.05, "0.05")])
def test_short_numbers(value, text):
    assert figures.si(value) == text


def test_running_mean_skips_gaps():
    run = figures.Run(Path("a"), "a", [{"step": i, "ce": v} for i, v in enumerate([1.0, 3.0, None, 5.0])])
    np.testing.assert_allclose(figures.points(run, "ce", "steps", window=2)["train"][1], [1, 2, np.nan, 5])


# ---- Which experts a router chose ---------------------------------------------------------------------------------------


def routed(shares=((0.5, 0.3, 0.2), (0.1, 0.2, 0.7)), **changes):
    """A validation row of a mixture-of-experts run with two routers, three experts and two domains."""
    table = {name: {str(number): share for number, share in enumerate(row)} for name, row in zip(("shrink", "layer1"), shares, strict=True)}
    return {"kind": "eval", "step": 200, "words": 200_000, "seconds": 100, "ce": 3.0, "perplexity": math.exp(3), "load": table,
            "load_by_domain": {"childes": table, "simple_wiki": {**table, "shrink": {"0": 0.9, "1": 0.1, "2": 0.0}}}, **changes}


def drawn(figure):
    """{title: shares} of the panels of an experts figure."""
    return {ax.get_title().replace("\n", "_"): np.asarray(ax.images[0].get_array()) for ax in figure.axes if ax.get_title()}


def test_the_experts_of_the_last_validation_are_drawn_overall_and_by_domain(make, out, capsys):
    old = routed(shares=((0.0, 0.0, 1.0), (1.0, 0.0, 0.0)), step=150)
    moep, dense = make("moep", [*rows(), old, routed()]), make("dense", rows())
    assert visual.main([dense, moep, "--metrics", "ce", "--output", str(out)]) == 0
    assert {path.name for path in out.iterdir() if path.name.startswith("experts")} == {"experts-moep.png", "experts-moep.svg"}
    assert has_ink(out / "experts-moep.png") and "experts-moep.svg" in capsys.readouterr().out
    assert {"shrink", "layer 1", "all text", "childes", "1", "2", "3"} <= set(svg_words(out / "experts-moep.svg"))
    panels = drawn(figures.experts_plot(figures.load_metrics(moep)))
    assert list(panels) == ["all text", "childes", "simple_wiki"]
    np.testing.assert_allclose(panels["all text"], [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    np.testing.assert_allclose(panels["simple_wiki"], [[0.9, 0.1, 0.0], [0.1, 0.2, 0.7]])


@pytest.mark.parametrize("lines", [list(rows()), [], [routed(load=None)], [routed(load=0.3)]], ids=["dense", "none", "null", "number"])
def test_a_run_without_shares_has_no_figure_of_experts(make, lines):
    assert figures.experts_plot(figures.load_metrics(make("a", lines))) is None


@pytest.mark.parametrize(("shares", "gaps"), [(((None, 0.8, 0.2), (0.1, 0.2, 0.7)), 1), (((0.1, math.nan, 0.2), (None, 0.2, 0.7)), 2),
                                              (((None, None, None), (None, None, None)), 6)])
def test_shares_that_are_not_finite_leave_gaps_in_the_figure_of_experts(make, out, shares, gaps):
    figure = figures.experts_plot(figures.load_metrics(make("diverged", [routed(shares=shares)])))
    figures.save(figure, out / "experts")
    assert np.isnan(np.ma.filled(drawn(figure)["all text"], np.nan)).sum() == gaps and has_ink(out / "experts.png")


@pytest.mark.parametrize("shares", [((1.0, 0.0, 0.0), (1.0, 0.0, 0.0)), ((1 / 3,) * 3, (1 / 3,) * 3)], ids=["one", "even"])
def test_extreme_and_even_shares_can_be_drawn(make, shares):
    figures.experts_plot(figures.load_metrics(make("a", [routed(shares=shares, load_by_domain={})]))).canvas.draw()


def test_a_single_expert_or_router_can_be_drawn(make):
    figures.experts_plot(figures.load_metrics(make("a", [routed(load={"shrink": {"0": 1.0}}, load_by_domain={})]))).canvas.draw()


def test_the_experts_of_runs_with_one_folder_name_are_told_apart(make, out):
    assert visual.main([make("x/moep", [routed()]), make("y/moep", [routed()]), "--metrics", "ce", "--output", str(out)]) == 0
    assert {path.name for path in out.glob("experts*.png")} == {"experts-x-moep.png", "experts-y-moep.png"}
