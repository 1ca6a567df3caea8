"""What the benchmarks share: what they ran on, interleaved rounds, peak memory, and the table at the end.

Time on a CPU with one thread is the CPU time of this process: other processes cannot stretch it, and on an idle machine it
equals the wall time. With more threads it is the wall time; on a GPU the time between two CUDA events.
"""

import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

PEERS = ("liger-kernel", "trl")
NOT_INSTALLED = "not installed: pip install -r benchmarks/requirements.txt"


def environment(device: str) -> dict:
    """Versions and hardware; printed above every table and kept in the JSON."""
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {**{package: version(package) for package in ("torch", "transformers", *PEERS)}, "python": platform.python_version(),
            "cpu": found[1] if found else platform.processor(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0], "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}


def show_environment(found: dict) -> None:
    versions = ", ".join(f"{package} {found[package] or 'not installed'}" for package in ("torch", "transformers", *PEERS))
    print(f"{versions}, Python {found['python']}\n{found['cpu']}, {found['cpus']} cores, {found['threads']} thread(s), "
          f"load average {found['load']:.1f}; device {found['device']}", flush=True)


# ---- Time -----------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call; see the module's docstring for the clock."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    call()
    return clock() - began


def interleave(calls: dict[str, Callable[[], object]], rounds: int, device: str, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of every call in every round. Each round makes all calls, in an order that rotates."""
    names = list(calls)
    for name in names if warm_up else ():
        calls[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(seconds(calls[name], device))
    return found


def against(times: list[float], reference: list[float]) -> dict[str, float]:
    """Median seconds, and time relative to the reference of the same round: median, smallest and largest."""
    ratios = [mine / theirs for mine, theirs in zip(times, reference, strict=True)]
    return {"seconds": statistics.median(times), "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


# ---- Memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Peak memory of a call above what is held before it: allocated on a GPU, resident on a CPU (call it in a process of its own)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before: imports, inputs, warm-up
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def available_bytes() -> int:
    """Memory that a new process can have without swapping."""
    info = Path("/proc/meminfo")
    return int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1]) * 1024 if info.exists() else sys.maxsize


def in_child(module: str, *arguments: str) -> dict:
    """What `python -m <module> <arguments>` prints as its last line, JSON; freed memory goes back to the system at once there."""
    honest = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1", "MKL_DISABLE_FAST_MM": "1"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], env={**os.environ, **honest}, cwd=Path(__file__).parent.parent,
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} ended with code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- Output ---------------------------------------------------------------------------------------------------------


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table, padded so that it reads well on a screen."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    print(f"\n{title}\n")
    for line in lines:
        cells = [cell.rjust(width) if re.match(r"[\d.,-]+$", cell) else cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def write(path: Path | None, result: dict) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
