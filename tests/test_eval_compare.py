"""Comparing models on the same items: the statistics against what is known of them, what is paired, what is said."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from babylm.schema import UserError
from eval import compare, reports
from eval.reading import CONTROLS, EYE_TRACKING, SELF_PACED, TEXTS

ROOT = Path(compare.__file__).parents[1]


def answers(right, uid="u"):
    """Lines of items.jsonl of one UID; `right` says which items are."""
    return [{"uid": uid, "id": f"{uid}_{n}", "scores": [-1.0, -2.0], "pred": int(not yes), "gold": 0, "correct": bool(yes), "tie": False}
            for n, yes in enumerate(right)]


@pytest.fixture
def model(tmp_path):
    """model("A", {"blimp/blimp_fast": lines, ...}, revision=..., backend=...) -> results/A."""

    def write(name, tasks, revision="main", backend="causal"):
        for task, lines in tasks.items():
            folder = tmp_path / "results" / name / revision / "zero_shot" / backend / task
            folder.mkdir(parents=True)
            (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return tmp_path / "results" / name

    return write


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call(*arguments) -> (the JSON it wrote, what it printed)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments), "--json", str(tmp_path / "out.json")])
        compare.main()
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return run


def paired(a, b):
    """Strata of equal weight from two lists of arrays of right answers."""
    return [(100 / len(a), np.asarray(y, int) - np.asarray(x, int)) for x, y in zip(a, b, strict=True)]


# ---- Statistics -------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_exact_binomial_test():
    for only_a, only_b in ((0, 0), (0, 5), (3, 9), (7, 7), (40, 61), (300, 350)):
        n, k = only_a + only_b, min(only_a, only_b)
        by_hand = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
        assert compare.mcnemar(only_a, only_b) == pytest.approx(by_hand, rel=1e-9)
        assert compare.mcnemar(only_b, only_a) == compare.mcnemar(only_a, only_b)
    assert compare.mcnemar(0, 5) == pytest.approx(0.0625)
    assert 0 < compare.mcnemar(20_000, 21_000) < 1e-5  # no overflow


def test_mcnemar_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for only_a, only_b in ((3, 9), (40, 61), (300, 350)):
        assert compare.mcnemar(only_a, only_b) == pytest.approx(stats.binomtest(only_a, only_a + only_b).pvalue, rel=1e-9)


def test_holm_by_hand():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x .01; 2 x .03; .04, but not below .06
    assert compare.holm([0.5, 0.9]) == [1.0, 1.0]
    assert compare.holm([0.02, None, 0.03]) == [0.04, None, 0.04]  # what was not tested is no comparison
    assert compare.holm([]) == []


@pytest.mark.parametrize(("uids", "per_uid"), [(1, 400), (8, 50), (30, 6)])
def test_p_is_uniform_where_the_models_are_equally_good(uids, per_uid):
    """Two models of the same accuracy in each UID: p below x in a share x of the cases, and never clearly more often."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(400):
        ability = rng.uniform(0.3, 0.9, (uids, 1))
        a, b = (rng.random((uids, per_uid)) < ability for _ in range(2))
        values.append(compare.swap_p(paired(a, b), 400, rng))
    values = np.array(values)
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        sampling = 3 * math.sqrt(level * (1 - level) / len(values))
        assert (values <= level).mean() < level + sampling
        assert (values <= level).mean() > level - sampling - 0.06  # a few equal counts make it a little careful


def test_p_is_careful_with_a_handful_of_items():
    """A bootstrap would say 0.01 here: no draw of 5 : 0 gives the other sign."""
    difference = np.array([1] * 5 + [0] * 95)
    p = compare.swap_p([(100.0, difference)], 20_000, np.random.default_rng(0))
    assert p == pytest.approx(compare.mcnemar(0, 5), abs=0.01)


@pytest.mark.parametrize(("uids", "per_uid"), [(1, 300), (10, 40), (60, 3)])
def test_the_interval_covers_the_true_difference(uids, per_uid):
    """95 % of the intervals hold the difference of the models' true scores, also where UIDs are small or unlike."""
    rng = np.random.default_rng(1)
    ability = rng.uniform(0.2, 0.7, (uids, 1))
    better = ability + rng.uniform(0.0, 0.3, (uids, 1))
    true = 100 * (better - ability).mean()
    covered = 0
    for _ in range(400):
        hardness = rng.random((uids, per_uid))  # the same items are hard for both, nine in ten
        luck = rng.random((uids, per_uid))
        a, b = hardness < ability, np.where(rng.random((uids, per_uid)) < 0.9, hardness, luck) < better
        low, high = compare.interval(compare.resample_accuracy(paired(a, b), 300, rng))
        covered += low <= true <= high
    assert 0.915 < covered / 400 < 0.98


def test_resampling_has_the_variance_of_the_score():
    """Of UIDs with three items, too, where n draws from n would have two thirds of it."""
    rng = np.random.default_rng(2)
    strata = [(1 / 50, rng.integers(-1, 2, 3)) for _ in range(50)]
    expected = sum(weight**2 * values.var(ddof=1) / len(values) for weight, values in strata)
    samples = compare.resample_accuracy(strata, 20_000, rng)
    assert samples.var() == pytest.approx(expected, rel=0.05)
    assert samples.mean() == pytest.approx(sum(weight * values.mean() for weight, values in strata), abs=0.005)


def test_spearman_shares_ranks_among_equals():
    ones = np.ones((1, 5))
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert compare.spearman(x, x**3, ones)[0] == pytest.approx(1.0)
    assert compare.spearman(x, -x, ones)[0] == pytest.approx(-1.0)
    y = np.array([1.0, 1.0, 2.0, 2.0, 3.0])  # ranks 1.5, 1.5, 3.5, 3.5, 5
    ranks = np.array([1.5, 1.5, 3.5, 3.5, 5.0])
    assert compare.spearman(x, y, ones)[0] == pytest.approx(np.corrcoef(x, ranks)[0, 1])
    assert np.isnan(compare.spearman(x, np.ones(5), ones)[0])


def test_spearman_of_a_resample_is_that_of_its_rows():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=20).round(1), rng.normal(size=20).round(1)
    counts = rng.multinomial(20, np.full(20, 1 / 20), size=8)
    rows = [np.repeat(np.arange(20), count) for count in counts]
    one_by_one = [compare.spearman(x[row], y[row], np.ones((1, 20)))[0] for row in rows]
    assert compare.spearman(x, y, counts) == pytest.approx(one_by_one)


def test_first_share_is_single_precision():
    assert reports.first_share([-1.0, -1.0]) == 0.5
    assert reports.first_share([-1000.0, -1000.0 - math.log(3)]) == pytest.approx(0.75, abs=1e-5)
    assert reports.first_share([0.0, -18.0]) == reports.first_share([0.0, -20.0]) == 1.0  # a tie there, not in double precision


def test_the_official_rho(shared):
    """Shares of the official pipeline, with the human ratios, give the rho that it reports."""
    golden = shared / "data" / "golden" / "official" / "tiny-gpt2" / "main" / "zero_shot" / "causal"
    for task, name, rho in (("wug_past", "wug_past_tense", "-0.17"), ("wug_adj", "wug_adj_nominalization", "0.63")):
        predictions = json.loads((golden / task / name / "predictions.json").read_text())[task]["predictions"]
        lines = (shared / "data" / "eval_fast" / name / f"{name}.jsonl").read_text().splitlines()
        shares = np.array([row["prob"] for row in predictions])
        ratios = np.array([json.loads(line)["ratio"] for line in lines])
        assert f"{compare.spearman(shares, ratios, np.ones((1, len(shares))))[0]:.2f}" == rho


# ---- Scores -----------------------------------------------------------------------------------------------------------


def test_the_score_is_the_plain_mean_over_uids(model, call):
    a = answers([1] * 90 + [0] * 10, "large") + answers([0] * 10, "small")
    b = answers([1] * 90 + [0] * 10, "large") + answers([1] * 5 + [0] * 5, "small")
    out, _ = call(model("A", {"blimp/x": a}), model("B", {"blimp/x": b}))
    (row,) = out["comparisons"]
    assert (row["score_a"], row["score_b"], row["difference"]) == pytest.approx((45, 70, 25))  # by items: 81.8 and 86.4
    assert (row["items"], row["only_a"], row["only_b"], row["p_mcnemar"]) == (110, 0, 5, 0.0625)


def test_ties_count_as_right_as_officially_and_are_told(model, call):
    """The first of equals is the right one; a model that always answers the same must not pass unnoticed."""
    a, b = answers([1] * 50 + [0] * 50), answers([1] * 90 + [0] * 10)
    for line in b[50:90]:
        line |= {"scores": [-1.0, -1.0], "tie": True, "correct": False}
    out, said = call(model("A", {"blimp/x": a}), model("B", {"blimp/x": b}))
    (row,) = out["comparisons"]
    assert (row["score_a"], row["score_b"]) == (50, 90) and "blimp/x: 40.0 % of B's answers are ties" in said and "of A's" not in said


@pytest.mark.parametrize(("key", "message"), [("data", "of different files of this set"), ("task", "scored by different rules")])
def test_results_of_other_data_or_rules_are_not_paired(model, call, key, message):
    """The ids and right answers of two halves of a set of minimal pairs are the same."""
    a, b = (model(name, {"blimp/x": answers([1, 0, 1])}) for name in "AB")
    for folder, value in ((a, "one"), (b, "other")):
        identity = {"data": ["same"], "task": {"score": "accuracy"}} | {key: {"data": [value], "task": {"uid": value}}[key]}
        (folder / "main/zero_shot/causal/summary.json").write_text(json.dumps({"tasks": {"x": {"identity": identity}}}))
    with pytest.raises(UserError, match=f"x: the results in .* are {message}"):
        call(a, b)
    (b / "main/zero_shot/causal/summary.json").unlink()  # results of the official pipeline have none
    call(a, b)


def test_entity_tracking_is_the_mean_over_splits(model, call):
    a = [line for n in range(4) for line in answers([1, 1], f"regular_{n}_ops")] + answers([0, 0], "move_contents_1_ops")
    b = [line for n in range(4) for line in answers([1, 0], f"regular_{n}_ops")] + answers([0, 1], "move_contents_1_ops")
    tasks = ("entity_tracking/entity_tracking", "blimp/x")
    out, _ = call(model("A", dict.fromkeys(tasks, a)), model("B", dict.fromkeys(tasks, b)))
    rows = {row["task"]: row for row in out["comparisons"]}
    assert (rows[tasks[0]]["score_a"], rows[tasks[0]]["score_b"]) == pytest.approx((50, 50))
    assert (rows[tasks[1]]["score_a"], rows[tasks[1]]["score_b"]) == pytest.approx((80, 50))


def wug(shares, ratios):
    return [{"uid": "wug_past", "id": f"wug_past_{n}", "scores": [math.log(share), math.log(1 - share)], "pred": 0, "gold": None,
             "correct": None, "tie": False, "ratio": ratio} for n, (share, ratio) in enumerate(zip(shares, ratios, strict=True))]


def test_wug_is_rho_over_all_rows(model, call):
    rng = np.random.default_rng(0)
    ratios = rng.uniform(0.1, 0.9, 60)
    good, bad = np.clip(ratios + rng.normal(0, 0.05, 60), 0.01, 0.99), rng.uniform(0.1, 0.9, 60)
    a, b, c = (model(name, {"wug_past/wug_past_tense": wug(shares, ratios)}) for name, shares in (("A", bad), ("B", good), ("C", good**2)))
    (row,) = call(a, b)[0]["comparisons"]
    ranks = [np.argsort(np.argsort(values)) for values in (bad, good, ratios)]
    expected = [100 * np.corrcoef(rank, ranks[2])[0, 1] for rank in ranks[:2]]
    assert (row["score_a"], row["score_b"]) == pytest.approx(expected)
    assert row["low"] > 0 and row["p"] < 0.01 and row["verdict"] == "B is better" and row["only_a"] is None
    (row,) = call(b, c)[0]["comparisons"]  # other shares in the same order: the same rho, in every resample
    assert (row["difference"], row["low"], row["high"], row["p"]) == pytest.approx((0, 0, 0, 1), abs=1e-9)
    assert row["verdict"] == "no difference that these items can show"


def test_a_score_that_is_undefined_is_said_to_be(model, call):
    ratios = np.linspace(0.1, 0.9, 30)
    out, said = call(model("A", {"wug_adj/x": wug(ratios, ratios)}), model("B", {"wug_adj/x": wug(np.full(30, 0.5), ratios)}))
    assert out["comparisons"][0]["p"] is None and "not tested: the score is undefined" in said


# ---- Verdicts ---------------------------------------------------------------------------------------------------------


def test_the_better_one_is_named_whichever_side_it_is_on(model, call):
    worse, better = answers([1] * 60 + [0] * 40), answers([1] * 80 + [0] * 20)
    a, b, c = model("A", {"blimp/x": worse}), model("B", {"blimp/x": better}), model("C", {"blimp/x": better})
    for pair, difference in (((a, b), 20), ((b, a), -20)):
        out, said = call(*pair)
        assert out["comparisons"][0]["difference"] == pytest.approx(difference) and "B is better" in said and "A is better" not in said
    (row,) = call(b, c)[0]["comparisons"]
    assert (row["verdict"], row["p"], row["p_mcnemar"]) == ("right on the same items", 1, 1)


def test_a_third_of_a_point_is_called_what_it_is(model, call):
    a, b = answers([1] * 600 + [0] * 33 + [1] * 30 + [0] * 337), answers([1] * 600 + [1] * 33 + [0] * 30 + [0] * 337)
    (row,) = call(model("A", {"blimp/x": a}), model("B", {"blimp/x": b}))[0]["comparisons"]
    assert row["difference"] == pytest.approx(0.3) and row["low"] < 0 < row["high"]
    assert row["verdict"] == "no difference that these items can show"


def test_what_only_many_comparisons_show_may_be_chance(model, call):
    """6 : 0 in one task of five: p = 0.03, corrected 0.16."""
    same, a, b = answers([1, 0] * 30), answers([1] * 50 + [0] * 10), answers([1] * 56 + [0] * 4)
    quiet = {f"blimp/x{n}": same for n in range(4)}
    out, said = call(model("A", {"blimp/x": a, **quiet}), model("B", {"blimp/x": b, **quiet}))
    row = next(row for row in out["comparisons"] if row["task"] == "blimp/x")
    assert row["p"] < 0.05 < row["p_holm"] and row["p_holm"] == pytest.approx(5 * row["p"])
    assert row["verdict"] == "may be chance: 5 comparisons were made" and row["verdict"] in said


def test_three_models_are_three_pairs_that_share_one_correction(model, call):
    tasks = [{"blimp/x": answers([1] * n + [0] * (60 - n))} for n in (20, 30, 40)]
    folders = [model(name, task) for name, task in zip("ABC", tasks, strict=True)]
    out, said = call(*folders)
    assert [(row["a"], row["b"]) for row in out["comparisons"]] == list(itertools.combinations("ABC", 2))
    alone = call(*folders[:2])[0]["comparisons"][0]
    assert {key: out["comparisons"][0][key] for key in ("low", "high", "p")} == {key: alone[key] for key in ("low", "high", "p")}
    assert alone["p_holm"] == alone["p"] and out["comparisons"][0]["p_holm"] > alone["p"]
    assert said.count("A = ") == 3


def test_a_uid_with_one_item_has_no_interval_but_a_p(model, call):
    a, b = answers([0] * 20) + answers([0], "alone"), answers([1] * 20) + answers([1], "alone")
    (row,) = call(model("A", {"ewok/x": a}), model("B", {"ewok/x": b}))[0]["comparisons"]
    assert row["low"] is None and row["p"] < 0.001 and row["verdict"] == "B is better"


def test_uids_of_one_item_each_are_one_stratum(model, call):
    """GlobalPIQA: every question is a UID of its own."""
    a = [line for n in range(40) for line in answers([n % 2], f"u{n}")]
    b = [line for n in range(40) for line in answers([n % 4 != 0], f"u{n}")]
    row, = call(model("A", {"x/x": a}), model("B", {"x/x": b}))[0]["comparisons"]
    whole, = call(model("C", {"x/x": answers([n % 2 for n in range(40)])}),
                  model("D", {"x/x": answers([n % 4 != 0 for n in range(40)])}))[0]["comparisons"]
    for key in ("score_a", "score_b", "low", "high", "p"):
        assert row[key] == pytest.approx(whole[key]), key


def test_how_a_task_is_scored_is_read_from_its_results(model, call):
    """A task of one's own: neither its name nor its ids say that it is averaged over splits, or a rank correlation."""
    lines = [line for n in range(4) for line in answers([1, 1], f"one_{n}_ops")] + answers([0, 0], "two_1_ops")
    ratios = np.linspace(0.1, 0.9, 30)
    a, b = (model(name, {"mine/x": lines, "other/y": wug(ratios, ratios)}) for name in "AB")
    for folder in (a, b):
        identity = {"x": {"score": "accuracy", "average": "splits"}, "y": {"score": "spearman", "average": "uids"}}
        (folder / "main/zero_shot/causal/summary.json").write_text(json.dumps(
            {"tasks": {name: {"identity": {"data": [], "task": task}} for name, task in identity.items()}}))
    rows = {row["task"]: row for row in call(a, b)[0]["comparisons"]}
    assert rows["mine/x"]["score_a"] == pytest.approx(50) and rows["other/y"]["score_a"] == pytest.approx(100)


def test_the_same_seed_gives_the_same_numbers(model, call):
    rng = np.random.default_rng(0)
    a, b = (model(name, {"blimp/x": answers(rng.random(80) < 0.6)}) for name in "AB")
    first, second, other = call(a, b)[0], call(a, b)[0], call(a, b, "--seed", 1)[0]
    assert first == second and first["comparisons"] != other["comparisons"]


def test_too_few_resamples_for_a_verdict_are_told(model, call):
    a, b = (model(name, {f"blimp/x{n}": answers([value] * 30) for n in range(4)}) for name, value in (("A", 0), ("B", 1)))
    assert "give more --resamples" in call(a, b, "--resamples", 100)[1]
    assert "give more --resamples" not in call(a, b)[1]


# ---- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    (lambda lines: lines[:-1], r"10, .* has 9; the first that the second lacks: UID 'u', id 'u_9'"),
    (lambda lines: [*lines[:3], lines[3] | {"id": "u_77"}, *lines[4:]], "the second lacks: UID 'u', id 'u_3'"),
    (lambda lines: [*lines[:3], lines[3] | {"uid": "v"}, *lines[4:]], "the second lacks: UID 'u', id 'u_3'"),
    (lambda lines: [*lines[:3], lines[3] | {"gold": 1}, *lines[4:]], "Item 'u_3' is {'gold': 0,"),
    (lambda lines: [*lines[:3], lines[3] | {"scores": [-1, -2, -3]}, *lines[4:]], "same ids for different items"),
    (lambda lines: [*lines[:3], lines[3] | {"ratio": 0.5}, *lines[4:]], "same ids for different items"),
])
def test_different_items_are_not_paired(model, call, change, message):
    lines = answers([1, 0] * 5)
    a, b = model("A", {"blimp/x": lines}), model("B", {"blimp/x": change(lines)})
    with pytest.raises(UserError, match=message):
        call(a, b)
    with pytest.raises(UserError, match="blimp/x: .*cannot be paired.*A/main/zero_shot/causal/blimp/x/items.jsonl"):
        call(b, a)


def test_the_order_of_the_items_does_not_matter(model, call):
    a, b = answers([1, 1, 0, 0] * 10), answers([1, 0, 1, 0] * 10)
    straight = call(model("A", {"blimp/x": a}), model("B", {"blimp/x": b}))[0]["comparisons"][0]
    turned = call(model("C", {"blimp/x": a}), model("D", {"blimp/x": b[::-1]}))[0]["comparisons"][0]
    assert (turned["only_a"], turned["only_b"]) == (straight["only_a"], straight["only_b"]) == (10, 10)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 3: no item of ours"), ('{"uid": "u"}', "line 3: no item of ours"),
    ('{"uid": "u", "id": "u_0", "scores": [1, 2]}', "line 3: item 'u_0' of 'u' is there a second time"),
    ('{"uid": "u", "id": "u_2", "scores": [NaN, 1]}', "line 3: a score of item 'u_2' is not finite"),
    ('{"uid": "u", "id": "u_2", "scores": [0, 1], "gold": 0, "pred": null}', "item 'u_2' of UID 'u' has \"pred\": None"),
])
def test_a_damaged_line_is_named(model, call, line, message):
    a, b = (model(name, {"blimp/x": answers([1, 0])}) for name in "AB")
    for folder in (a, b):
        with open(folder / "main" / "zero_shot" / "causal" / "blimp" / "x" / "items.jsonl", "a") as stream:
            stream.write(line + "\n")
    with pytest.raises(UserError, match=message):
        call(a, b)


def test_tasks_that_one_lacks_are_named_and_left_out(model, call):
    lines = answers([1, 0])
    a, b, c = model("A", {"blimp/x": lines, "ewok/y": lines}), model("B", {"blimp/x": lines}), model("C", {"comps/z": lines})
    out, said = call(a, b)
    assert [row["task"] for row in out["comparisons"]] == ["blimp/x"] and "ewok/y: not compared, missing in B" in said
    with pytest.raises(UserError, match="no task in common"):
        call(a, c)


def test_missing_results_name_what_there_is(model, call):
    a, b = model("A", {"blimp/x": answers([1])}), model("B", {"blimp/x": answers([1])}, revision="chck_1M", backend="mlm")
    with pytest.raises(UserError, match=r"holds chck_1M/zero_shot/mlm\. Choose with --revision"):
        call(a, b)
    with pytest.raises(UserError, match="given twice"):
        call(a, a.parent / "." / "A")
    with pytest.raises(UserError, match="holds no results"):
        call(a, a.with_name("missing"))


def test_folders_of_one_name_are_told_apart(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place / "A").mkdir(parents=True)
    assert list(compare.model_names([tmp_path / "one" / "A", tmp_path / "two" / "A"])) == ["one/A", "two/A"]


# ---- Reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reading(model, tmp_path):
    """Two models with reading predictions -> (their folders, CSV): all measured times are alike, and B's surprisal is close to them."""
    rng = np.random.default_rng(0)
    rt = rng.normal(size=120)
    file = tmp_path / "reading_data.csv"
    columns = ["sent_id", *TEXTS, *CONTROLS, "prev_length", *EYE_TRACKING, SELF_PACED]
    lines = [[n // 6, *"abcd", *rng.random(4), *[value] * 5] for n, value in enumerate(rt)]
    file.write_text("\n".join(",".join(map(str, line)) for line in [columns, *lines]) + "\n")
    folders = []
    for name, noise in (("A", 5.0), ("B", 0.2)):
        folder = model(name, {"blimp/x": answers([1, 0])})
        pred = rt + noise * rng.normal(size=120)
        rows = [{"id": n, "pred": value, "prev_pred": math.nan if n == 0 else 1.0} for n, value in enumerate(pred)]
        place = folder / "main" / "zero_shot" / "causal" / "reading"
        place.mkdir()
        (place / "predictions.json").write_text(json.dumps({"reading": {"predictions": rows}}))
        folders.append(folder)
    return folders, file


def test_reading_is_compared_where_its_data_are_given(reading, call, monkeypatch):
    folders, file = reading
    out, said = call(*folders)
    assert len(out["comparisons"]) == 1 and "give its data with --reading" in said
    out, said = call(*folders, "--reading", file, "--resamples", 200)
    rows = {row["task"]: row for row in out["comparisons"]}
    assert list(rows) == ["blimp/x", "reading (eye tracking)", "reading (self-paced)"]
    assert rows["reading (eye tracking)"]["verdict"] == "B is better" and rows["reading (eye tracking)"]["only_a"] is None
    monkeypatch.setattr(compare, "READING_RESAMPLES", 50)
    assert "reading: 50 resamples (of sentences)" in call(*folders, "--reading", file)[1]


def test_reading_of_other_data_is_refused(reading, call, tmp_path):
    folders, file = reading
    whole = file.read_text()
    file.write_text("\n".join(whole.splitlines()[:-1]))
    with pytest.raises(UserError, match="has 120 predictions, but --reading has 119 rows"):
        call(*folders, "--reading", file)
    with pytest.raises(UserError, match="No such file"):
        call(*folders, "--reading", tmp_path / "nowhere.csv")
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="lacks the columns RTfirstfix"):
        call(*folders, "--reading", file)
    file.write_text(whole.replace("sent_id", "sentence"))
    with pytest.raises(UserError, match="no column sent_id"):
        call(*folders, "--reading", file)
    file.write_text(whole)
    summary = folders[1] / "main" / "zero_shot" / "causal" / "summary.json"
    summary.write_text(json.dumps({"tasks": {"reading": {"identity": {"data": ["another"], "task": {}}}}}))
    with pytest.raises(UserError, match="is not the file that B was scored on"):
        call(*folders, "--reading", file)
    summary.unlink()
    (folders[1] / "main" / "zero_shot" / "causal" / "reading" / "predictions.json").unlink()
    assert "reading: not compared, missing in B" in call(*folders)[1]


# ---- The command ------------------------------------------------------------------------------------------------------


def test_the_command_line(model, tmp_path, warm_python):
    a, b = (model(name, {"blimp/x": answers(right)}) for name, right in (("A", [1, 0] * 50), ("B", [1, 1] * 50)))
    done = subprocess.run([sys.executable, "-m", "eval.compare", str(a), str(b)], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "A = A, B = B (main, causal" in done.stdout and "B is better" in done.stdout and "train several seeds" in done.stdout
    failed = subprocess.run([warm_python, "-m", "eval.compare", str(a), str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True,
                            check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
