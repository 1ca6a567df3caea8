"""One plotting style, and the figures: for visual.py, sweeps and evaluation. babylm/results.py reads what they show.

Figures are made without pyplot, inside `style()`.  A run's place in the list gives its look: pass the same list to all.
"""
import math
import os
from collections import Counter
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from babylm.results import X_AXES, number, points, scored

# Okabe and Ito's colours without yellow, which is too faint on white; the markers carry the difference in greyscale.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "os^DvPX<", ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY, KINDS, SCALES = "#666666", ("train", "validation"), ("linear", "log")
SMALL = {"fontsize": 6, "color": GREY, "textcoords": "offset points"}
UNTRAINED, CHANCE = {"linewidth": 0.9, "linestyle": (0, (4, 2))}, {"linewidth": 0.9, "linestyle": (0, (1, 1.5))}
FLAG = {"linestyle": "", "marker": "v", "markersize": 3.2, "markerfacecolor": "white", "markeredgewidth": 0.7}
LABELS = {"ce": "cross-entropy (nats/token)", "kl": "KL from teacher (nats/token)", "lr": "learning rate",
          "hidden": "distance of hidden states", "contrastive": "contrastive term (nats/token)",
          "balance": "load-balancing loss (1 = even)", "router_entropy": "router entropy (nats)",
          "reward": "reward", "completion_words": "words per completion", "entropy": "policy entropy (nats/token)"}
REWARDED = {"kl": "KL from reference (nats/token)", "words seen": "words generated"}  # what these are called in stage 6
RC = {**{key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}, "grid.linewidth": 0.5,
      "font.size": 7, "axes.labelsize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "legend.fontsize": 6.5,
      "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
      "xtick.major.size": 2.5, "ytick.major.size": 2.5, "axes.grid": True, "grid.color": "#E4E4E4",
      "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "babylm", "savefig.dpi": 200}
style = partial(matplotlib.rc_context, RC)    # `with style():` or `@style()`: the look, whatever matplotlibrc says


def si(value, _=None) -> str:
    """100000 -> 100K, 2560000 -> 2.56M, 0.0002 -> 2e-4."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size * 0.9999:
            return f"{value / size:.3g}{letter}"
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}" if 0 < abs(value) < 0.01 else f"{value:.4g}"


def look(index, **changes) -> dict:
    return {"color": COLOURS[index % 7], "marker": MARKERS[index % 8], "linestyle": DASHES[index // 7 % 4],
            "linewidth": 1.2, "markersize": 3.4, "markeredgecolor": "white", "markeredgewidth": 0.4, **changes}


def _legends(fig, shown, used=()):
    """Run names above the panels, the kinds of mark below them; the figure grows by the rows of names it needs."""
    lines = [Line2D([], [], label=run.label, **look(index)) for index, run in shown]
    columns = int((fig.get_figwidth() - 0.1) / (0.42 + 0.054 * max(len(run.label) for _, run in shown))) or 1
    fig.set_figheight(fig.get_figheight() + 0.13 * (math.ceil(len(lines) / columns) - 2))
    fig.legend(handles=lines, loc="outside upper left", ncols=columns, columnspacing=1.2, labelspacing=0.25)
    kinds = {"train": {"linewidth": 0.6}, "validation": look(0), "milestone": {"markeredgecolor": GREY, **FLAG},
             "untrained": UNTRAINED, "chance": CHANCE}
    keys = [Line2D([], [], label=kind, **{**how, "color": GREY}) for kind, how in kinds.items() if kind in used]
    if keys:
        fig.legend(handles=keys, loc="outside lower center", ncols=3, columnspacing=1.4)


@style()
def save(fig, path) -> list[Path]:
    """Write `<path>.png` and `<path>.svg`, each under a temporary name first; the same figure gives the same bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    written = [Path(f"{path}.png"), Path(f"{path}.svg")]
    for final, stamp in zip(written, ("Software", "Date"), strict=True):
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        fig.savefig(temporary, format=final.suffix[1:], metadata={stamp: None})
        os.replace(temporary, final)
    return written


def _ticks(axis, low, high, log=False):
    subs = (1,) if high > 2e3 * low else (1, 2, 5) if high > 10 * low else (1, 2, 3, 5)
    plain = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    axis.set_major_locator(LogLocator(subs=subs) if log and high > 3 * low else plain)
    axis.set_major_formatter(FuncFormatter(si))
    axis.set_minor_formatter(NullFormatter())


def curves(ax, runs, metric, x="words", window=1, log_y=False, names=True) -> set[str]:
    """Draw one metric of every run into `ax`; returns the kinds of mark used: train (thin), validation, milestone."""
    log_y, spots, (x_key, x_label) = log_y or metric == "perplexity", {}, X_AXES[x]
    drawn = [points(run, metric, x, window, log_y) for run in runs]
    end = max((place.max() for found in drawn for place, _ in found.values()), default=0) or 1
    unit, x_label = (1, x_label) if x != "time" or end <= 180 else (60, "minutes") if end < 10800 else (3600, "hours")
    end, above = end / unit, ax.transData + ScaledTranslation(0, 3.4 / 72, ax.figure.dpi_scale_trans)
    for index, (run, found) in enumerate(zip(runs, drawn, strict=True)):
        for kind, (place, y) in found.items():
            if kind == "train" and len(found) == 2:
                ax.plot(place / unit, y, color=COLOURS[index % 7], linewidth=0.6, alpha=0.45, zorder=2)
            else:                            # alone, train curves such as lr often coincide: dashes tell them apart
                dashes, every = DASHES[(index if kind == "train" else index // 7) % 4], max(1, len(y) // 12)
                ax.plot(place / unit, y, **look(index, linestyle=dashes, markevery=(index * every // 3 % every, every)))
        for name, row, (place, y) in ((*flag, curve) for flag in run.milestones.items() for curve in found.values()):
            where, place, y = number(row.get(x_key)) / unit, place[np.isfinite(y)] / unit, y[np.isfinite(y)]
            if place[0] - 0.02 * end <= where <= place[-1] + 0.02 * end:   # on the validation curve where it reaches
                spots[index, name] = (where, float(np.interp(where, place, y)))
    ax.margins(y=0.09)
    names_here = LABELS | REWARDED if any(run.rewarded for run in runs) else LABELS
    x_label = names_here.get(x_label, x_label)
    label = metric.replace("scores.", "score: ").replace("_", " ") if metric.startswith("scores.") else names_here.get(metric, metric)
    ax.set(xlabel=x_label, ylabel=label, xlim=(-0.02 * end, 1.04 * end), yscale=SCALES[log_y])
    train, validation = ([v for found in drawn if kind in found for v in found[kind][1] if v < 1e300] for kind in KINDS)
    low, high = min(train + validation, default=1), max(train + validation, default=1)
    _ticks(ax.xaxis, 0, end)
    to, back = (math.log, math.exp) if log_y else (float, float)
    lowest, best = to(low), to(max(validation, default=high))
    top = best + 0.35 * (best - lowest) if train and len(validation) > 1 else to(high)
    if to(high) - lowest > 1.15 * (top - lowest) > 0:       # the first steps would press the rest flat: cut, and say so
        ax.set_ylim(back(lowest - 0.05 * (top - lowest)), back(top + 0.05 * (top - lowest)))
        ax.annotate(f"cut: train up to {si(high)}", (1, 1), (0, -1), "axes fraction", ha="right", va="top", **SMALL)
        high = back(top)
    _ticks(ax.yaxis, low, high, log_y)
    for (index, _), spot in spots.items():
        ax.plot(*spot, transform=above, zorder=4, markeredgecolor=COLOURS[index % 7], **FLAG)
    flags, last = {name: spot for (_, name), spot in sorted(spots.items(), key=lambda item: item[1][1])}, -end
    for name, spot in sorted(flags.items(), key=lambda item: item[1]):      # each name once, over the highest curve
        if names and len(flags) <= 6 and spot[0] - last > 0.36 * end / ax.figure.get_figwidth():
            ax.annotate(name, spot, (0, 6.2), ha="center", va="bottom", zorder=5, **SMALL)
            last = spot[0]
    return {*(KINDS if any(len(found) == 2 for found in drawn) else ()), *(["milestone"] if flags else ())}


@style()
def curve_figure(runs, metrics, x="words", width=3.3, window=1, log_y=False):
    """A figure with one panel per metric that some run has (four: 2 x 2, fewer: one row), or None without any."""
    found = {m: [run for run in runs if points(run, m, x, 1, log_y or m == "perplexity")] for m in metrics}
    if not (metrics := [metric for metric in metrics if found[metric]]):
        return None
    columns = math.ceil(len(metrics) / (rows := 2 if len(metrics) > 3 else 1))
    fig = Figure(figsize=(width, 2.4 * rows if width / columns < 5 else 3.2), layout="constrained")
    used = [curves(fig.add_subplot(rows, columns, place + 1), runs, metric, x, window, log_y, len(metrics) == 1)
            for place, metric in enumerate(metrics)]
    _legends(fig, [pair for pair in enumerate(runs) if any(pair[1] in found[m] for m in metrics)], set().union(*used))
    return fig


def _dots(runs, tables, key, group, width, sign, title=""):
    """Rows by name, the best on average on top, the group shaded below; a marker per run, 95 % Wilson bars with n."""
    shown, means = [(index, run) for index, run in enumerate(runs) if tables[index]], {}
    for name in {name for table in tables for name in table}:
        values = [value for table in tables if (value := number(table.get(name, {}).get(key))) == value]
        means[name] = sum(values) / max(1, len(values))
    names = sorted(means, key=lambda name: (name in group, sign * means[name], name))
    fig = Figure(figsize=(width, 0.75 + len(names) * max(0.17, 0.055 * len(shown))), layout="constrained")
    ax, first = fig.subplots(), sum(name not in group for name in names)
    for (index, _), shift in zip(shown, np.linspace(-0.28, 0.28, len(shown)) if len(shown) > 1 else [0.0], strict=True):
        for place, name in enumerate(names):
            p, n = (number(tables[index].get(name, {}).get(part)) for part in (key, "n"))
            if n > 0 and 0 <= p <= 1:
                ends = p + 1.92 / n + np.array([-1.96, 1.96]) * math.sqrt(p * (1 - p) / n + 0.96 / n**2)
                ax.plot(ends / (1 + 3.84 / n), [place + shift] * 2, color=COLOURS[index % 7], linewidth=0.7, alpha=0.6)
            ax.plot(p, place + shift, **look(index, linestyle=""))
    if first < len(names):
        ax.axhspan(first - 0.5, len(names) - 0.4, color="#F1F1F1", zorder=0, linewidth=0)
        ax.annotate(title, (0.55, first - 0.5), (0, -1), ("axes fraction", "data"), ha="center", va="top", **SMALL)
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    _legends(fig, shown)
    return fig, ax


@style()
def pairs_plot(runs, width=3.3):
    """Accuracy on minimal pairs, long-distance phenomena apart, and the chance line; None without data."""
    tables = [scored(run, "pairs") for run in runs]
    if not any(tables):
        return None
    far = {name for table in tables for name, row in table.items() if row.get("long_distance")}
    fig, ax = _dots(runs, tables, "accuracy", far, width, -1, "long-distance")
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1.6)
    ax.set_xlabel("accuracy, with 95 % interval")
    return fig


@style()
def domains_plot(runs, width=3.3):
    """Perplexity per domain and over everything, on a log axis: a marker per run; None without data."""
    tables = [{**table, "all": run.scores} if (table := scored(run, "by_domain")) else {} for run in runs]
    if not any(tables):
        return None
    fig, ax = _dots(runs, tables, "perplexity", {"all"}, width, 1)
    ax.set(xscale="log", xlabel="validation perplexity (lower is better)")
    _ticks(ax.xaxis, *ax.get_xlim(), log=True)
    return fig


@style()
def experts_plot(run, width=6.8):
    """Which experts each router chose in the last validation: a panel for all text and one per domain; None without data.

    Rows are routers from input to output, columns experts; a cell is the expert's share of the choices, and the colours are
    centred on even use.
    """
    row = next((row for row in reversed(run.evals) if isinstance(row.get("load"), dict)), None)
    if row is None:
        return None
    tables = {"all text": row["load"], **row.get("load_by_domain", {})}
    routers = list(row["load"])
    even = 1 / len(row["load"][routers[0]])
    fig = Figure(figsize=(width, 0.9 + 0.16 * len(routers)), layout="constrained")
    panels = fig.subplots(1, len(tables), sharey=True)
    shares = [number(share) for table in tables.values() for router in table.values() for share in router.values()]
    largest = max([share for share in shares if math.isfinite(share)], default=even)
    for ax, (name, table) in zip(np.atleast_1d(panels), tables.items(), strict=True):
        shares = np.array([[number(share) for share in table[router].values()] for router in routers])
        image = ax.imshow(shares, cmap="RdBu_r", norm=TwoSlopeNorm(even, 0, max(largest, 1.01 * even)), aspect="auto")
        ax.set_title(name.replace("_", "\n"), fontsize=6.5)
        ax.set_xticks(range(shares.shape[1]), range(1, shares.shape[1] + 1))
        ax.set_yticks(range(len(routers)), [router.replace("layer", "layer ") for router in routers])
        ax.grid(visible=False)
        ax.tick_params(length=0)
    fig.supxlabel("expert", fontsize=7)
    fig.suptitle(f"{run.label}: share of a router's choices", fontsize=7, x=0.01, ha="left")
    bar = fig.colorbar(image, ax=panels, shrink=0.9, pad=0.01, ticks=[0, even, largest])
    bar.ax.set_yticklabels(["0", f"{even:.0%} even", f"{largest:.0%}"], fontsize=6)
    return fig


# ---- Evaluation results ---------------------------------------------------------------------------------------------


@style()
def scores_figure(runs, tasks, width=6.8):
    """A panel per evaluation set: score over words seen with a band of one standard error to each side, untrained score and chance.

    Args:
        runs: Results, drawn in this order.
        tasks: {task: (unit of its score, chance)}.

    Returns:
        The figure; None where no set of any run can be placed on the axis of words.
    """
    rows = {name: row for run in runs for table in run.tables.values() for name, row in table.items()}
    if not (sets := [name for name in rows if any(len(run.curve(name)) for run in runs)]):
        return None
    columns = min(3 if width > 5 else 1, len(sets))
    lines = math.ceil(len(sets) / columns)
    fig = Figure(figsize=(width if columns > 1 else 3.3, 0.35 + 1.75 * lines), layout="constrained")
    words = [value for run in runs for name in sets for value in run.curve(name)[:, 0]]
    low, high, used, before = min(words), max(words), set(), None
    log_x = bool(high > 20 * low)                 # official milestones: nine of nineteen lie in the first tenth
    for place, name in enumerate(sets):
        ax, (unit, chance) = fig.add_subplot(lines, columns, place + 1), tasks.get(rows[name]["task"], ("score", None))
        ax.set_title(name.replace("_", " "), fontsize=7)
        ax.set(xscale=SCALES[log_x], xlabel="words seen" if place >= columns * (lines - 1) else "",
               ylabel=unit if place % columns == 0 or unit != before else "")
        ax.set_xlim(*((low / 1.25, high * 1.25) if log_x else (-0.02 * high, 1.06 * high)))
        before = unit
        floors = [number(run.tables.get("untrained", {}).get(name, {}).get("score")) for run in runs]
        floors = [(index, floor) for index, floor in enumerate(floors) if math.isfinite(floor)]
        count = Counter(floor for _, floor in floors)
        for index, floor in floors:               # grey, unless runs differ: then whose it is must show
            own = len(count) > 1 and count[floor] == 1
            ax.axhline(floor, color=COLOURS[index % 7] if own else GREY, zorder=1.7, **UNTRAINED)
        if chance is not None:
            ax.axhline(chance, color=GREY, zorder=1.6, **CHANCE)
        used |= {*(["untrained"] if floors else []), *(["chance"] if chance is not None else [])}
        for index, run in enumerate(runs):
            x, y, error = run.curve(name).T
            if len(x) == 1:                       # a band has no width there
                ax.errorbar(x, y, error, color=COLOURS[index % 7], linewidth=0.8, capsize=1.5)
            else:
                ax.fill_between(x, y - error, y + error, color=COLOURS[index % 7], alpha=0.16, linewidth=0, zorder=2)
            ax.plot(x, y, **look(index, markersize=2.8, zorder=3))
        ax.margins(y=0.12)
        _ticks(ax.xaxis, low if log_x else 0, high, log_x)
        if high > 50 * low:                       # decades only: 50M and 100M would touch in a panel of this width
            ax.xaxis.set_major_locator(LogLocator())
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    _legends(fig, [(index, run) for index, run in enumerate(runs) if any(len(run.curve(name)) for name in sets)], used)
    return fig


# ---- Sweeps ---------------------------------------------------------------------------------------------------------


@style()
def lines_figure(lines, x_label, y_label, width=3.3):
    """A line per name over a numeric axis: mean over seeds, bars of one standard deviation, the values of single seeds as dots.

    Args:
        lines: {name: [(x, [value of each seed]), ...]}; "" names the only line there is.
    """
    fig = Figure(figsize=(width, 2.5), layout="constrained")
    ax, places = fig.subplots(), sorted({x for line in lines.values() for x, _ in line})
    for index, (name, line) in enumerate(lines.items()):
        line = sorted((x, values) for x, values in line if values)
        xs, means = [x for x, _ in line], [float(np.mean(values)) for _, values in line]
        spreads = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for _, values in line]
        ax.errorbar(xs, means, yerr=spreads if any(spreads) else None, capsize=2, elinewidth=0.7, **look(index, label=name or None))
        for x, values in line:
            ax.plot([x] * len(values), values, linestyle="", marker=".", markersize=2, color=COLOURS[index % 7], alpha=0.5)
    positive = [place for place in places if place > 0]
    if min(places) >= 0 and positive and max(places) > 3 * min(positive):  # symlog has room for a 0
        ax.set_xscale("log" if min(places) > 0 else "symlog", **({} if min(places) > 0 else {"linthresh": min(positive)}))
    ax.set_xticks(places, [si(place) for place in places])
    ax.set_xticks([], minor=True)
    ax.set(xlabel=x_label, ylabel=y_label)
    if any(lines):
        ax.legend()
    return fig


@style()
def heat_map(maps, rows, columns, label, width=3.3):
    """One panel per name, a cell per pair of values with the number in it; lower is better, and the lowest of all is framed.

    Args:
        maps: {name: [rows][columns] of numbers, NaN where there is none}; "" names the only panel.
        rows, columns: (axis, its labels).
    """
    tables = {name: np.array(values, dtype=float) for name, values in maps.items()}
    every = np.concatenate([table[np.isfinite(table)] for table in tables.values()])
    (row_axis, row_labels), (column_axis, column_labels) = rows, columns
    fig = Figure(figsize=(max(width, 0.5 + 0.55 * len(column_labels) * len(tables)), 0.9 + 0.3 * len(row_labels)), layout="constrained")
    panels = np.atleast_1d(fig.subplots(1, len(tables), sharey=True))
    for ax, (name, table) in zip(panels, tables.items(), strict=True):
        image = ax.imshow(table, cmap="viridis_r", vmin=every.min(), vmax=max(every.max(), every.min() + 1e-9), aspect="auto")
        ax.set_title(name, fontsize=7)
        ax.set_xticks(range(len(column_labels)), column_labels)
        ax.set_yticks(range(len(row_labels)), row_labels)
        ax.set_xlabel(column_axis)
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for (row, column), value in np.ndenumerate(table):
            if math.isfinite(value):
                dark = (every.max() - value) < 0.5 * (every.max() - every.min())
                ax.annotate(f"{value:.3f}", (column, row), ha="center", va="center", fontsize=6, color="white" if dark else "black")
                if value == every.min():
                    ax.add_patch(Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.5))
    panels[0].set_ylabel(row_axis)
    bar = fig.colorbar(image, ax=panels, pad=0.02)
    bar.set_label(label, fontsize=6)
    bar.ax.tick_params(labelsize=6)
    return fig
