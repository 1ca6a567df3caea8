"""The runs of a sweep as arrays of jobs: one array for those that read none of the others, one for those that read these, and so on.

    bash slurm/submit_sweep.sh configs/sweeps/lambda.yaml --plan                          # check every config; submit nothing
    bash slurm/submit_sweep.sh configs/sweeps/lambda.yaml -- --partition=gpu --gpus=1     # what stands behind -- goes to sbatch
    bash slurm/submit_sweep.sh configs/sweeps/cpu-data-size.yaml --most 4 training.threads=1

Runs that are done are left out, so that the same command submits again what failed. An array begins when the one before has ended,
however its runs ended (afterany): each run looks by itself whether what it reads is done, and one that failed stops no others.
"""

import argparse
import subprocess

from babylm.run_folder import run_stage, write_status
from babylm.schema import UserError, check, read_yaml
from babylm.sweeps import PlannedRun, SweepConfig, plan, waves
from slurm.pipeline import read_command, slurm_command
from slurm.runs import WAITING, jobs_in_queue, read_status


def left_to_do(runs: list[PlannedRun]) -> list[list[int]]:
    """Numbers of the runs that are not done, a list for each array. UserError where a folder holds another run."""
    states = [run.state() for run in runs]
    if others := [f"{run.folder} ({', '.join(run.other_settings())})" for run, state in zip(runs, states, strict=True)
                  if state == "other settings"]:
        raise UserError(f"these folders hold runs with other settings: {'; '.join(others)}: move them away, or give the sweep another name")
    return [numbers for wave in waves(runs) if (numbers := [number for number in wave if states[number] != "done"])]


def require_free(runs: list[PlannedRun]) -> None:
    """UserError if a run is in the hands of a job that is in the queue already."""
    queue = jobs_in_queue()
    for run in runs:
        if (run.folder / "run" / "status.json").is_file():
            found = read_status(run.folder, queue)
            if found.queue and found.state in WAITING:
                raise UserError(f"nothing was submitted: {run.folder} belongs to job {found.job}, which is in the queue ({found.queue}): "
                                f"wait for it, or scancel {found.job}")


def submit(sweep: SweepConfig, runs: list[PlannedRun], arrays: list[list[int]], command: list[str], options: list[str],
           most: int) -> list[str]:
    """Submit the arrays on hold, note their tasks in the runs' status, and release them together; or submit none.

    Args:
        command: what follows slurm/sweep.sbatch.
        options: of sbatch; most: tasks of an array at a time, 0 for all.

    Returns:
        The job id of each array.
    """
    jobs: list[str] = []
    try:
        for numbers in arrays:
            waits = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
            array = f"--array={','.join(map(str, numbers))}" + (f"%{most}" if most else "")
            jobs.append(slurm_command("sbatch", "--parsable", "--hold", f"--job-name={sweep.name}", array, *waits, *options,
                                      "slurm/sweep.sbatch", *command).split(";")[0])
        for job, numbers in zip(jobs, arrays, strict=True):
            for number in numbers:
                write_status(runs[number].folder, "pending", f"job {job}_{number} waits", f"{job}_{number}")
        slurm_command("scontrol", "release", *jobs)
    except BaseException as error:
        if jobs:
            subprocess.run(["scancel", *jobs])
        if isinstance(error, UserError):
            raise UserError(f"nothing was submitted (what was, is cancelled): {error}") from None
        raise
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(prog="bash slurm/submit_sweep.sh", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a sweep")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="runs at a time (default: as many as the cluster lets)")
    parser.add_argument("--plan", action="store_true", help="check everything and print the arrays; submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, for every run")
    args, options = read_command(parser)
    sweep = check(SweepConfig, read_yaml(args.config), args.config)
    runs = plan(sweep, args.overrides)
    arrays = left_to_do(runs)
    if not arrays:
        print(f"all {len(runs)} runs are done: python sweep.py --config {args.config} --report")
        return
    jobs = ["-"] * len(arrays)
    if not args.plan:
        require_free(runs)
        jobs = submit(sweep, runs, arrays, [args.config, *args.overrides], options, args.most)
    for place, (job, numbers) in enumerate(zip(jobs, arrays, strict=True)):
        after = f"  after {jobs[place - 1] if jobs[0] != '-' else 'these'}" if place else ""
        print(f"{job:>8}  {', '.join(f'{number} {runs[number].name}' for number in numbers)}{after}")
    if not args.plan:
        print(f"logs: slurm/logs/sweep-<job>_<task>.out   status: bash slurm/status.sh   all away: scancel {' '.join(jobs)}")


if __name__ == "__main__":
    run_stage(main)
