"""Sweeps and studies: a grid of config keys, methods and seeds, each combination an ordinary run folder, and their report.

Reads    configs/sweeps/<name>.yaml (babylm/sweeps.py says what may stand in it) and the configs that it names
Writes   <output>/<sweep>/<run>/ : run folders; <run>.log; with --report: report.csv, report.md, report.png and .svg
Command  python sweep.py --config configs/sweeps/lambda.yaml               # runs what is not done yet, one after the other
         python sweep.py --config configs/sweeps/lambda.yaml --jobs 2      # two at a time
         python sweep.py --config configs/sweeps/lambda.yaml --report      # what came out, chosen by validation CE
         bash slurm/submit_sweep.sh configs/sweeps/lambda.yaml     # as SLURM arrays: --run N runs one of them, --count counts
Expect   the sum of its runs. The same command goes on where it was stopped; a run that fails is reported and stops no other.
"""

import argparse
import sys
from pathlib import Path

from babylm import sweep_report, sweeps
from babylm.run_folder import run_stage
from babylm.schema import UserError, check, read_yaml


def main() -> None:
    # ---- 1. Read the command ----------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of a sweep")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--run", type=int, metavar="N", help="only run number N, counted from 0, as a SLURM array does")
    parser.add_argument("--results", type=Path, help="with --report: folder of evaluation results (default: results/<sweep>)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, for every run, e.g. training.threads=1")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry_run", action="store_true", help="list the runs, their keys and their state; run nothing")
    what.add_argument("--count", action="store_true", help="print the number of runs")
    what.add_argument("--report", action="store_true", help="collect results of what is done")
    args = parser.parse_intermixed_args()
    if args.jobs < 1:
        raise UserError("--jobs needs a number of runs, 1 or more")

    # ---- 2. Plan the runs: every config is checked before one of them starts ----------------------------------------
    sweep = check(sweeps.SweepConfig, read_yaml(args.config), args.config)
    runs = sweeps.plan(sweep, args.overrides)
    if args.run is not None and not 0 <= args.run < len(runs):
        raise UserError(f"--run {args.run}: {args.config} has {len(runs)} runs, numbered from 0")

    # ---- 3. Run them, or say what they are --------------------------------------------------------------------------
    if args.count:
        print(len(runs))
    elif args.dry_run:
        for number, run in enumerate(runs):
            print(f"{number:>3}  {run.state():<14}  {run.folder}:  python {run.stage} --config {run.source} {' '.join(run.overrides)}")
    elif args.report:
        print("wrote", *sweep_report.report(sweep, runs, args.results or Path("results") / sweep.name))
    else:
        sys.exit(sweeps.Runner(runs, args.jobs, only=args.run).run())


if __name__ == "__main__":
    run_stage(main)
