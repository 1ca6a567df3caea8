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
from babylm import figures, results

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
    place, y = results.points(results.load_metrics(folder), "ce")["validation"]
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
    assert len(results.load_metrics(folder).train) == 20


def test_a_resumed_run_is_drawn_once(make):
    first, again = list(rows()), [row for row in rows(final=2.0) if row["step"] > 60]
    run = results.load_metrics(make("resumed", first + again))
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
    runs, before = [results.load_metrics(make("a", rows()))], dict(matplotlib.rcParams)
    first, second = (figures.save(figures.curve_figure(runs, ["ce", "lr"]), tmp_path / name / "f") for name in "xy")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["f.png", "f.svg"]
    assert dict(matplotlib.rcParams) == before


def test_many_runs_fit(make, tmp_path):
    runs = [results.load_metrics(make(f"run-{i}", rows(final=3 + i / 10))) for i in range(9)]
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
    run = results.Run(Path("a"), "a", [{"step": i, "ce": v} for i, v in enumerate([1.0, 3.0, None, 5.0])])
    np.testing.assert_allclose(results.points(run, "ce", "steps", window=2)["train"][1], [1, 2, np.nan, 5])


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
    panels = drawn(figures.experts_plot(results.load_metrics(moep)))
    assert list(panels) == ["all text", "childes", "simple_wiki"]
    np.testing.assert_allclose(panels["all text"], [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    np.testing.assert_allclose(panels["simple_wiki"], [[0.9, 0.1, 0.0], [0.1, 0.2, 0.7]])


@pytest.mark.parametrize("lines", [list(rows()), [], [routed(load=None)], [routed(load=0.3)]], ids=["dense", "none", "null", "number"])
def test_a_run_without_shares_has_no_figure_of_experts(make, lines):
    assert figures.experts_plot(results.load_metrics(make("a", lines))) is None


@pytest.mark.parametrize(("shares", "gaps"), [(((None, 0.8, 0.2), (0.1, 0.2, 0.7)), 1), (((0.1, math.nan, 0.2), (None, 0.2, 0.7)), 2),
                                              (((None, None, None), (None, None, None)), 6)])
def test_shares_that_are_not_finite_leave_gaps_in_the_figure_of_experts(make, out, shares, gaps):
    figure = figures.experts_plot(results.load_metrics(make("diverged", [routed(shares=shares)])))
    figures.save(figure, out / "experts")
    assert np.isnan(np.ma.filled(drawn(figure)["all text"], np.nan)).sum() == gaps and has_ink(out / "experts.png")


@pytest.mark.parametrize("shares", [((1.0, 0.0, 0.0), (1.0, 0.0, 0.0)), ((1 / 3,) * 3, (1 / 3,) * 3)], ids=["one", "even"])
def test_extreme_and_even_shares_can_be_drawn(make, shares):
    figures.experts_plot(results.load_metrics(make("a", [routed(shares=shares, load_by_domain={})]))).canvas.draw()


def test_a_single_expert_or_router_can_be_drawn(make):
    figures.experts_plot(results.load_metrics(make("a", [routed(load={"shrink": {"0": 1.0}}, load_by_domain={})]))).canvas.draw()


def test_the_experts_of_runs_with_one_folder_name_are_told_apart(make, out):
    assert visual.main([make("x/moep", [routed()]), make("y/moep", [routed()]), "--metrics", "ce", "--output", str(out)]) == 0
    assert {path.name for path in out.glob("experts*.png")} == {"experts-x-moep.png", "experts-y-moep.png"}


# ---- Scores over words seen ---------------------------------------------------------------------------------------------


def entry(score, task="blimp", **changes):
    kind, chance = ("accuracy", 50) if task == "blimp" else ("spearman", 0)
    return {"task": task, "kind": kind, "chance": chance, "score": score, "se": 1.0, "n": 200, "ties": 0.0, "strict": score, **changes}


@pytest.fixture
def scored_model(tmp_path):
    """scored_model(name, {revision: {set: entry}}, words=..., backend=...) -> results/<name>; with words, its run is there too."""
    def build(name, revisions, words=None, backend="causal"):
        for revision, table in revisions.items():
            folder = tmp_path / "results" / name / revision / "zero_shot" / backend
            folder.mkdir(parents=True)
            (folder / "summary.json").write_text(json.dumps({"model": name, "revision": revision, "backend": backend, "tasks": table}))
        if words:
            record = tmp_path / "models" / name / "run"
            record.mkdir(parents=True)
            (record / "finished.json").write_text(json.dumps({"words_seen": words}))
        return str(tmp_path / "results" / name)
    return build


CURVE = {"chck_100K": {"blimp_fast": entry(52)}, "chck_1M": {"blimp_fast": entry(60)}, "chck_2M": {"blimp_fast": entry(63)},
         "main": {"blimp_fast": entry(64), "wug_past_tense": entry(0.4, "wug_past", se=0.1)},
         "untrained": {"blimp_fast": entry(50.5), "wug_past_tense": entry(0.1, "wug_past")}}


def draw_results(out, tmp_path, *folders):
    return visual.main(["--results", *folders, "--models", str(tmp_path / "models"), "--output", str(out)])


def test_scores_are_drawn_over_words_and_the_final_ones_printed(scored_model, out, tmp_path):
    one = scored_model("student", CURVE, words=2_500_000)
    other = scored_model("baseline", {"main": {"blimp_fast": entry(61)}}, words=2_000_000)
    done = subprocess.run([sys.executable, "-W", "error", str(SCRIPT), "--results", one, other, "--models", str(tmp_path / "models"),
                           "--output", str(out)], check=False, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"scores.png", "scores.svg"} and has_ink(out / "scores.png")
    words = set(svg_words(out / "scores.svg"))
    assert {"student", "baseline", "untrained", "chance", "words seen"} <= words
    assert {"blimp fast", "wug past tense", "accuracy (%)", "Spearman's rho"} <= words
    assert "| blimp_fast | 200 | 64.00 ± 1.00 | 50.50 ± 1.00 | 61.00 ± 1.00 | 50 |" in done.stdout
    assert "| wug_past_tense | 200 | 0.40 ± 0.10 | 0.10 ± 1.00 | - | 0 |" in done.stdout


def test_a_curve_is_in_the_order_of_words_and_ends_with_the_final_model(scored_model, tmp_path):
    revisions = {"chck_10M": {"blimp_fast": entry(3)}, **{name: {"blimp_fast": row["blimp_fast"]} for name, row in CURVE.items()}}
    (run,) = results.load_results(scored_model("a", revisions, words=20_000_321), tmp_path / "models")
    np.testing.assert_allclose(run.curve("blimp_fast"), [[1e5, 52, 1], [1e6, 60, 1], [2e6, 63, 1], [1e7, 3, 1], [20_000_321, 64, 1]])
    (run,) = results.load_results(scored_model("b", revisions, words=10_000_321), tmp_path / "models")
    assert list(run.curve("blimp_fast")[-1]) == [10_000_321, 64, 1] and len(run.curve("blimp_fast")) == 4  # chck_10M is that very model
    assert run.final == "main" and run.problems == []


def test_the_last_milestone_stays_on_curves_that_the_final_model_has_no_part_in(scored_model, tmp_path):
    """The official protocol: fast sets at milestones, full ones for the final model."""
    fast = {f"chck_{n}M": {"blimp_fast": entry(50 + n), "both": entry(n)} for n in (1, 2, 3)}
    (run,) = results.load_results(scored_model("a", {**fast, "main": {"blimp_filtered": entry(60), "both": entry(9)}}, words=3_000_321),
                                  tmp_path / "models")
    assert run.curve("blimp_fast")[:, 0].tolist() == [1e6, 2e6, 3e6] and run.curve("blimp_filtered").tolist() == [[3_000_321, 60, 1]]
    assert run.curve("both")[:, :2].tolist() == [[1e6, 1], [2e6, 2], [3_000_321, 9]]
    assert run.problems == ["a: blimp_fast is not scored at main", "a: blimp_filtered is not scored at chck_1M, chck_2M, chck_3M"]


def test_scores_at_milestones_have_panels_of_their_own(make, out):
    """training.eval_tasks writes them; a resumed run's are counted once."""
    lines = [*rows()] + [{"kind": "scores", "step": step, "words": step * 1000, "seconds": step, "name": f"chck_{step}K",
                                          "tasks": {"blimp_fast": {"score": score, "se": 1.0, "n": 10, "ties": 0}}}
                                         for step, score in ((40, 51.0), (80, 77.0), (80, 53.0))]
    run = make("a", lines)
    (x, y), = results.points(results.load_metrics(run), "scores.blimp_fast").values()
    assert x.tolist() == [40_000, 80_000] and y.tolist() == [51.0, 53.0]
    assert visual.main([run, "--output", str(out)]) == 0
    assert "score: blimp fast" in " ".join(svg_words(out / "scores.blimp_fast.svg")) and (out / "ce.png").exists()


@pytest.mark.parametrize(("revisions", "at", "said"), [(CURVE, 2e6, "at its last milestone"), ({"main": CURVE["main"]}, None, "--models")])
def test_unknown_words_of_the_final_model_are_said(scored_model, tmp_path, revisions, at, said):
    (run,) = results.load_results(scored_model("a", revisions), tmp_path / "models")
    assert run.words.get("main") == at and any("finished.json" in problem and said in problem for problem in run.problems)
    assert len(run.curve("blimp_fast")) == (3 if at else 0)


def test_broken_and_missing_results_are_named_and_the_others_drawn(scored_model, out, tmp_path, capsys):
    folder = Path(scored_model("a", {**CURVE, "chck_3M": {"blimp_fast": entry(math.nan), "comps": {"task": "comps"}}}, words=4_000_000))
    broken = folder / "chck_1M" / "zero_shot" / "causal" / "summary.json"
    broken.write_text(broken.read_text()[:60])
    (folder / "chck_4M").mkdir()
    assert draw_results(out, tmp_path, str(folder), str(tmp_path / "results" / "gone")) == 0
    captured = capsys.readouterr()
    for part in (f"{broken}: not a whole summary", f"{folder / 'chck_4M'} holds no zero_shot", "blimp_fast has no finite score",
                 "comps has no finite score", "wug_past_tense is not scored at chck_100K, chck_2M, chck_3M", "gone: no such folder"):
        assert part in captured.err
    assert "64.00 ± 1.00" in captured.out and has_ink(out / "scores.png")
    (run,) = results.load_results(folder, tmp_path / "models")
    assert list(run.curve("blimp_fast")[:, 0]) == [1e5, 2e6, 4e6]


def test_no_scores_at_all_say_what_makes_them(scored_model, out, tmp_path, capsys):
    assert draw_results(out, tmp_path, scored_model("a", {"main": {}})) == 2
    assert "python -m eval.zero_shot models/NAME --milestones" in capsys.readouterr().err and not out.exists()


def test_two_backends_are_two_curves_and_equal_names_are_told_apart(scored_model, tmp_path, out):
    scored_model("x/a", CURVE)
    runs = results.load_results(scored_model("x/a", {"main": CURVE["main"]}, backend="mlm"), tmp_path / "models")
    assert {run.name for run in runs} == {"a", "a (mlm)"}
    assert draw_results(out, tmp_path, str(tmp_path / "results" / "x" / "a"), scored_model("y/a", CURVE)) == 0
    assert {"x/a", "y/a"} <= set(svg_words(out / "scores.svg"))


def test_the_panels_of_all_tasks_do_not_touch(scored_model, tmp_path):
    sets = {f"set_{number}_with_a_long_name": entry(50 + number) for number in range(8)}
    revisions = [*(f"chck_{words}M" for words in (1, 2, 3, 5, 10, 20, 50)), "main", "untrained"]
    folder = scored_model("a", dict.fromkeys(revisions, sets), words=100_000_000)
    figure = figures.scores_figure(results.load_results(folder, tmp_path / "models"), {"blimp": ("accuracy (%)", 50.0)})
    figures.save(figure, tmp_path / "scores")
    boxes = [ax.get_tightbbox() for ax in figure.axes] + [part.get_window_extent() for part in (*figure.legends, *figure.texts)]
    assert not any(one.overlaps(two) for place, one in enumerate(boxes) for two in boxes[:place])
    for ax in figure.axes:
        labels = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert len(labels) > 1 and all(left.x1 + 2 < right.x0 for left, right in zip(labels, labels[1:], strict=False))


def test_runs_and_results_are_not_mixed(make, capsys):
    for arguments in ([], [make("a", rows()), "--results", "results/a"]):
        with pytest.raises(SystemExit):
            visual.main(arguments)
        assert "--results results/NAME" in capsys.readouterr().err


def test_runs_that_learned_from_rewards_are_drawn_apart(make, out, capsys):
    rewarded = [{"kind": kind, "step": step, "words": 40 * step, "seconds": step, "reward": step / 100 - 1, "kl": step / 1000,
                 "ce": 3.5 + step / 500, "completion_words": 30.0, "reward/margin": 0.5}
                for step in range(0, 101, 10) for kind in ("train", "eval")]
    assert visual.main([make("ppo", rewarded), make("student", rows()), "--output", str(out)]) == 0
    words = svg_words(out / "rewards.svg")
    assert {"reward", "KL from reference (nats/token)", "words generated", "words per completion", "ppo"} <= set(words)
    assert "student" not in words and "ppo" not in svg_words(out / "overview.svg")
    assert "words seen" in svg_words(out / "overview.svg") and has_ink(out / "rewards.png")
    assert "reward 0" in capsys.readouterr().out
    assert visual.main([make("alone", rewarded), "--output", str(out / "alone")]) == 0
    assert "words generated" in svg_words(out / "alone" / "ce.svg")
