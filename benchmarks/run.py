"""Wall time from raw text to a fixed validation CE, everything included: what distillation and the teacher cache save in the end.

    python -m benchmarks.run [--target 3.1] [--json FILE] [--quick] [key=value ...]

Runs the stage scripts as a user would, each as a process of its own, in a temporary folder: stage 1, the teacher, the baseline
(cross-entropy only), the student with its teacher run online, the capture, and the student on cached states. Counted for each
way: stage 1, the capture where there is one, and its training process from its start to the validation that first reaches the
target (default: the baseline's final CE). The teacher is taken as given; its own seconds are printed, but not counted.

Defaults: configs/demo/ on 100K words, so that the run has several epochs, with one block layout for all of them
(data.offset_cycle=1), as the cache wants it. key=value goes to every training stage, corpus.* and tokenizer.* to stage 1.
The CPU seconds beside the wall time are those of the same stages: on a machine with other work they are the steadier figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import measure

ROOT = Path(__file__).parent.parent
CORPUS_KEYS = ["corpus.demo_words=100K"]
TRAINING_KEYS = ["data.offset_cycle=1", "data.eval_blocks=64", "logging.eval_steps=25"]
QUICK_CORPUS_KEYS = ["corpus.demo_words=20K", "corpus.demo_pairs=4", "tokenizer.vocab_size=512"]
QUICK_KEYS = ["data.offset_cycle=1", "data.eval_blocks=4", "data.seq_len=32", "logging.eval_steps=2", "model.layers=1", "model.width=16",
              "model.heads=2", "model.ffn=32", "training.steps=4", "training.warmup_steps=1", "training.batch_size=4"]


@dataclass
class Process:
    """A stage that was run: seconds in all, and of every validation the seconds since the process started."""

    wall: float
    cpu: float
    validations: list[dict] = field(default_factory=list)

    def until(self, target: float) -> dict | None:
        """The first validation that reaches a CE."""
        return next((row for row in self.validations if row["ce"] <= target), None)


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return float("nan")


def stage(*command: object, metrics: Path | None = None) -> Process:
    """Run a stage to its end, watching its metrics.jsonl. SystemExit with its output where it fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        validations: list[dict] = []
        running, cpu = True, 0.0
        while running:
            running = process.poll() is None
            cpu = max(cpu_seconds(process.pid), cpu) if running else cpu
            rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics and metrics.is_file() else []
            for row in [row for row in rows if row["kind"] == "eval"][len(validations):]:
                validations.append({"step": row["step"], "ce": row["ce"], "wall": time.monotonic() - began, "cpu": cpu})
            time.sleep(0.05 if running else 0)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(map(str, command))} ended with code {process.returncode}\n{said.read()[-3000:]}")
    return Process(time.monotonic() - began, cpu, validations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("corpus", "teacher", "baseline", "student"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / f"configs/demo/{name}.yaml", help="config of this stage")
    parser.add_argument("--target", type=float, help="validation CE to reach; default: the baseline's final one")
    parser.add_argument("--quick", action="store_true", help="a tiny corpus and models, the baseline as the teacher, to see that "
                        "it works; the figures mean nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("keys", nargs="*", metavar="key=value")
    options = parser.parse_args()
    for_corpus = [key for key in options.keys if key.startswith(("corpus.", "tokenizer."))]
    corpus_keys = [*(QUICK_CORPUS_KEYS if options.quick else CORPUS_KEYS), *for_corpus]
    keys = [*(QUICK_KEYS if options.quick else TRAINING_KEYS), *(key for key in options.keys if key not in for_corpus)]
    where = measure.environment("cpu")
    measure.show_environment(where)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [f"data.corpus={folder / 'corpus'}", f"output={folder}", *keys]
        teacher = f"distillation.teacher={folder / ('baseline' if options.quick else 'teacher')}"

        def train(script: str, config: Path, run: str, *more: str) -> Process:
            found = stage(script, "--config", config, *common, f"name={run}", *more, metrics=folder / run / "run/metrics.jsonl")
            print(f"{run}: {found.wall:.0f} s, final CE {found.validations[-1]['ce']:.4f}", flush=True)
            return found

        first = stage("combine_babylm.py", "--config", options.corpus, "--input", folder / "raw", "--output", folder / "corpus",
                      *corpus_keys)
        print(f"stage 1: {first.wall:.0f} s", flush=True)
        baseline = train("train_baseline.py", options.baseline, "baseline")
        taught = baseline if options.quick else train("train_teacher.py", options.teacher, "teacher")
        ways = {"CE baseline": (baseline, None),
                "student, online": (train("train_student.py", options.student, "online", teacher), None)}
        capture = stage("-m", "babylm.teacher_cache", "--config", options.student, *common, teacher, "distillation.cache=true")
        print(f"capture: {capture.wall:.0f} s", flush=True)
        ways["student, cached"] = (train("train_student.py", options.student, "cached", teacher, "distillation.cache=true"), capture)

    target = options.target if options.target is not None else ways["CE baseline"][0].validations[-1]["ce"]
    rows = []
    for name, (run, captured) in ways.items():
        reached = run.until(target)
        row = {"way": name, "final_ce": run.validations[-1]["ce"], "steps": run.validations[-1]["step"], "stage_1": first.wall,
               "capture": captured.wall if captured else 0.0, "training": run.wall, "training_cpu": run.cpu, "reached": reached}
        if reached:
            row["seconds"] = first.wall + row["capture"] + reached["wall"]
            row["cpu_seconds"] = first.cpu + (captured.cpu if captured else 0.0) + reached["cpu"]
        rows.append(row)
    online, cached = ways["student, online"][0], ways["student, cached"][0]
    if not all(abs(a["ce"] - b["ce"]) <= 1e-3 * a["ce"] for a, b in zip(online.validations, cached.validations, strict=True)):
        raise SystemExit("not equal: the cached student's validation differs from the online one's by more than 0.1%")
    cells = []
    for row in rows:
        found, reached = [row["stage_1"], row["capture"]], row["reached"]
        found += [reached["wall"], row["seconds"], row["cpu_seconds"]] if reached else []
        cells.append([row["way"], *(f"{value:.1f}" for value in found), *["-"] * (5 - len(found)),
                      f"{reached['step']:,}" if reached else "-", f"{row['training']:.1f}", f"{row['final_ce']:.4f}"])
    measure.show(f"Seconds to a validation CE of {target:.4f} (the teacher's own {taught.wall:.0f} s are not counted)",
                 ["way", "stage 1", "capture", "training to target", "in all", "CPU s in all", "steps to target", "whole training",
                  "final CE"], cells)
    measure.write(options.json, {"environment": where, "target": target, "teacher_seconds": taught.wall, "ways": rows,
                                 "keys": keys, "corpus_keys": corpus_keys})


if __name__ == "__main__":
    main()
