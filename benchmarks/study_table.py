"""The methods of a study side by side: mean and standard deviation over seeds, and paired differences to a control.

    python -m benchmarks.study_table models/cpu --control baseline

reads run/scores.json (whole validation set; `python -m babylm.scoring`) of every finished run in a folder, or
run/finished.json where a run was not scored. Runs named <method>-s<seed> are one method. Prints Markdown.
"""

import argparse
import json
import math
import re
import statistics
from pathlib import Path


def read_runs(folder: Path, only: tuple[str, ...] = ("",)) -> dict[str, dict[str, float]]:
    """{method: {seed: validation CE in nats}} of the finished runs in `folder` whose names begin with one of `only`."""
    runs: dict[str, dict[str, float]] = {}
    for finished in sorted(folder.glob("*/run/finished.json")):
        scores = finished.with_name("scores.json")
        ce = json.loads((scores if scores.is_file() else finished).read_text(encoding="utf-8"))["ce"]
        name = finished.parent.parent.name
        if not name.startswith(only):
            continue
        method, seed = re.fullmatch(r"(.*?)(?:-s(\d+))?", name).groups()
        runs.setdefault(method, {})[seed or "-"] = ce
    return runs


def spread(values: list[float], digits: int = 3, sign: str = "") -> str:
    """'mean ± sample standard deviation', without the second where there is one value."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(runs: dict[str, dict[str, float]], control: str) -> str:
    """Markdown rows, best first; differences are paired by seed, so only seeds that both have are counted."""
    lines = [f"| run | seeds | validation CE | perplexity | CE - {control}, same seed |", "|---|---|---|---|---|"]
    for method, by_seed in sorted(runs.items(), key=lambda item: statistics.mean(item[1].values())):
        ces = list(by_seed.values())
        paired = [ce - runs[control][seed] for seed, ce in by_seed.items() if seed in runs.get(control, {})]
        difference = "" if method == control or not paired else spread(paired, sign="+")
        lines.append(f"| {method} | {len(ces)} | {spread(ces)} | {spread([math.exp(ce) for ce in ces], 1)} | {difference} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of run folders")
    parser.add_argument("--control", default="baseline", help="method that the others are compared with (default: baseline)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="START", help="leave out runs whose names begin otherwise")
    args = parser.parse_args()
    runs = read_runs(args.folder, tuple(args.only))
    if not runs:
        raise SystemExit(f"error: no finished runs in {args.folder}")
    print(table(runs, args.control))


if __name__ == "__main__":
    main()
