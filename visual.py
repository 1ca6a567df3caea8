"""Stage 7: draw what the runs logged, and compare their scores.

Reads   models/<name>/run/metrics.jsonl, finished.json and, where a model has been scored, scores.json;
        with --results: results/<name>/<revision>/zero_shot/<backend>/summary.json (written by python -m eval.zero_shot)
Writes  figures/<metric>.png and .svg (column width), overview.png and .svg (page width), and for scored models
        pairs.png/.svg (minimal pairs) and domains.png/.svg (perplexity per domain);
        experts-<name>.png/.svg (which experts each router chose, by domain) for mixture-of-experts students;
        rewards.png/.svg (reward, KL from the reference, cross-entropy, length) for runs that learned from rewards, which are drawn apart;
        with --results: scores.png/.svg (a panel per evaluation set, scores over words seen), and a table of the final scores
Run     python visual.py models/GPT2-Small-BabyLM-CE models/GPT2-Small-Distilled --x words --table
        python visual.py --results results/GPT2-Small-BabyLM-CE results/GPT2-Small-Distilled
Expect  a few seconds and under 200 MB, without a GPU; a run that is still training can be drawn as often as you like

Thin light lines are training batches, lines with markers are validation, triangles are milestone checkpoints.  A value
that is not finite leaves a gap, and is reported; a run without finished.json is marked as unfinished.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from pathlib import Path

from babylm.figures import curve_figure, domains_plot, experts_plot, pairs_plot, save, scores_figure, si
from babylm.results import load_metrics, load_results, number, points, scored

DEFAULT = "ce,kl,perplexity,lr"
REWARDS = ("reward", "kl", "ce", "completion_words")
SHORT = {"bnc_spoken": "bnc", "childes": "child", "gutenberg": "gutb", "open_subtitles": "subt", "simple_wiki": "wiki",
         "switchboard": "swbd"}


# ---------------------------------------------------------------- words about runs

def final_numbers(run) -> str:
    """One line per run: how far it came, and the last value of what it measured."""
    rows, parts = run.train + run.evals, []
    for key, name in (("step", "steps"), ("words", "words")):
        reached = [value for row in rows if not math.isnan(value := number(row.get(key)))]
        parts += [f"{si(max(reached)) if key == 'words' else f'{max(reached):.0f}'} {name}"] if reached else []
    for name, kind, metric in (("train CE", "train", "ce"), ("val CE", "validation", "ce"),
                               ("val KL", "validation", "kl"), ("val perplexity", "validation", "perplexity"),
                               ("reward", "validation", "reward")):
        if kind in (found := points(run, metric)):
            value = found[kind][1][-1]
            parts.append(f"{name} {value:.4g}" if math.isfinite(value) else f"{name} not finite")
    return f"{run.label}: " + (", ".join(parts) or "scores only")


def mean_accuracy(run, long_distance=False) -> float:
    rows = [row for row in scored(run, "pairs").values() if row.get("long_distance") or not long_distance]
    values = [value for row in rows if not math.isnan(value := number(row.get("accuracy")))]
    return sum(values) / len(values) if values else number(None if long_distance else run.scores.get("pairs_mean"))


def table(runs, limit=120) -> str:
    """Scores as aligned text: one row per scored run, perplexity per domain under shortened headers."""
    runs = [run for run in runs if run.scores is not None]
    domains = sorted({name for run in runs for name in scored(run, "by_domain")})
    short = {name: SHORT.get(name, name[:5]) for name in domains}
    lines = [["model", "params", "words", "val CE", "ppl", *short.values(), "pairs", "long", "secs"]]
    for run in runs:
        ppl = [number(run.scores.get("perplexity"))]
        ppl += [number(scored(run, "by_domain").get(name, {}).get("perplexity")) for name in domains]
        cells = [si(number(run.scores.get("parameters"))), si(number(run.scores.get("words_seen"))),
                 f"{number(run.scores.get('ce')):.3f}", *(f"{v:.1f}" if v < 1000 else si(v) for v in ppl),
                 f"{mean_accuracy(run):.3f}", f"{mean_accuracy(run, long_distance=True):.3f}",
                 f"{number(run.scores.get('seconds')):.0f}"]
        lines.append([run.name, *("-" if cell == "nan" else cell for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = max(12, limit - sum(widths[1:]) - 2 * len(widths[1:]))
    if widths[0] > room:                        # cut names in the middle: what tells runs apart is often the end
        for line in lines:
            if len(line[0]) > room:
                line[0] = line[0][:room - room // 2 - 1] + "…" + line[0][-(room // 2):]
        widths[0] = room
    text = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    text.insert(1, "-" * len(text[0]))
    if domains:
        text.append("ppl by domain: " + ", ".join(f"{mark} {name}" for name, mark in short.items() if mark != name))
    return "\n".join(text)


def over_seeds(runs) -> list[str]:
    """Mean and sample standard deviation of every model that was scored with several seeds.

    Runs belong together by folder name, with or without the -s<seed> that the scripts suggest.
    """
    groups, lines = {}, []
    for run in runs:
        if run.scores is not None:
            groups.setdefault(re.sub(r"-s\d+$", "", run.folder.name), []).append(run)
    for name, group in groups.items():
        parts = []
        for title, digits, value in (("val CE", 3, lambda run: number(run.scores.get("ce"))),
                                     ("perplexity", 1, lambda run: number(run.scores.get("perplexity"))),
                                     ("pairs", 3, mean_accuracy), ("long", 3, lambda run: mean_accuracy(run, long_distance=True))):
            values = [value(run) for run in group]
            if len(values) > 1 and all(map(math.isfinite, values)):
                parts.append(f"{title} {statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        if parts:
            lines.append(f"{name}, {len(group)} seeds: " + ", ".join(parts))
    return lines


def write(figure, path, dry_run) -> None:
    """Save a figure and say so; in a dry run, only say so."""
    print(*("would write", f"{path}.png", f"{path}.svg") if dry_run else ("wrote", *save(figure, path)))


# ---------------------------------------------------------------- evaluation results

UNITS = {"accuracy": "accuracy (%)", "spearman": "Spearman's rho", "reading": "variance explained (%)"}


def draw_results(folders, models, output, width, dry_run=False) -> int:
    """Draw and tabulate results/<model> folders; the exit code."""
    from eval import reports  # here, because it loads torch, which curves of runs do without

    runs = [results for folder in dict.fromkeys(folder.rstrip("/") for folder in folders) for results in load_results(folder, models)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.parent.name}/{run.name}"
        for problem in run.problems:
            print(f"warning: {problem}", file=sys.stderr)
    rows = [row for run in runs for table in run.tables.values() for row in table.values()]
    figure = scores_figure(runs, {row["task"]: (UNITS[row["kind"]], row["chance"]) for row in rows}, width)
    if figure is not None:
        write(figure, output / "scores", dry_run)
    columns = {}
    for run in runs:
        for revision in filter(None, (run.final, "untrained" if "untrained" in run.tables else None)):
            columns[run.name if revision == "main" else f"{run.name} {revision}"] = run.tables[revision]
    if not any(columns.values()):
        print("no scores to show: python -m eval.zero_shot models/NAME --milestones --data <evaluation data> writes them",
              file=sys.stderr)
        return 2
    print("\n" + reports.table(columns))
    return 0


def main(argv=None) -> int:
    # ------------------------------------------------------------ 1. read the command
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="For example: visual.py models/*")
    parser.add_argument("folders", nargs="*", metavar="models/NAME", help="run folders, drawn in this order")
    parser.add_argument("--results", nargs="+", metavar="results/NAME", help="instead of runs: scores over words seen, and a table")
    parser.add_argument("--models", default="models", help="with --results: folder of the runs, for the words they saw (default: models)")
    parser.add_argument("--x", choices=("steps", "words", "time"), default="words", help="default: words")
    parser.add_argument("--metrics", help=f"comma-separated, any logged name (default: {DEFAULT}, and scores.<set> of training.eval_tasks)")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="mean of the last N training points")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="folder; default: figures")
    parser.add_argument("--width", type=float, choices=(3.3, 6.8), default=3.3, help="inches: one column or the page")
    parser.add_argument("--log_y", action="store_true", help="logarithmic vertical axes (perplexity always has one)")
    parser.add_argument("--dry_run", action="store_true", help="say what would be drawn; write nothing")
    parser.add_argument("--table", action="store_true", help="print the scores as a table, too")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        parser.error("--smooth needs a number of points, 1 or more")
    if bool(args.folders) == bool(args.results):
        parser.error("give run folders (models/NAME ...), or --results results/NAME ...")
    if args.results:
        return draw_results(args.results, args.models, args.output, 6.8, args.dry_run)

    # ------------------------------------------------------------ 2. read the runs
    runs = [load_metrics(folder) for folder in dict.fromkeys(folder.rstrip("/") for folder in args.folders)]
    names = [run.folder.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.parent.name}/{run.folder.name}"
        for problem in run.problems:
            print(f"warning: {run.name}: {problem}", file=sys.stderr)
    kept = [run for run in runs if run.train or run.evals or run.scores is not None]
    named = [name.strip() for name in (args.metrics or DEFAULT).split(",") if name.strip()]
    at_milestones = [f"scores.{name}" for run in kept for row in run.scored for name in row["scores"]] if args.metrics is None else []
    metrics = list(dict.fromkeys([*named, *at_milestones]))

    # ------------------------------------------------------------ 3. draw
    rewarded, others = ([run for run in kept if run.rewarded is kind] for kind in (True, False))
    plain = others or kept  # their words are those they wrote, and their KL is from another model: not on one axis with the others
    figures = {name: curve_figure(plain, [name], args.x, args.width, args.smooth, args.log_y) for name in metrics}
    figures["overview"] = curve_figure(plain, DEFAULT.split(","), args.x, 6.8, args.smooth, args.log_y)
    if rewarded:
        figures["rewards"] = curve_figure(rewarded, REWARDS, args.x, 6.8, args.smooth, args.log_y)
    if any(scored(run, "pairs") for run in kept):
        figures |= {"pairs": pairs_plot(kept, args.width), "domains": domains_plot(kept, args.width)}
    figures |= {f"experts-{run.name}": figure for run in kept if (figure := experts_plot(run)) is not None}
    for name, figure in figures.items():
        if figure is not None:
            write(figure, args.output / name.replace("/", "-"), args.dry_run)
        elif kept and name in metrics:
            print(f"note: no run has a finite value of {name}: not drawn")

    # ------------------------------------------------------------ 4. say what was drawn
    for run in kept:
        print(final_numbers(run))
    if args.table:
        scores = any(run.scores is not None for run in kept)
        print("\n" + table(kept) if scores else "no run has run/scores.json: no table", *over_seeds(kept), sep="\n")
    if not any(figures.values()):
        print("nothing to draw:", *(f"  {run.folder}: {'; '.join(run.problems) or 'no finite values'}" for run in runs),
              "A training stage writes run/metrics.jsonl: `python train_teacher.py`, `python train_baseline.py` or "
              "`python train_student.py`,\neach with --config configs/<run>.yaml; scoring writes run/scores.json.",
              sep="\n", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
