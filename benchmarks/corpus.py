"""Stage 1 measured: the token store against encoding a file as one string, and peak memory against corpus size.

    python -m benchmarks.corpus --input train_10M --tokenizer <folder or hub name> [--rounds 3] [--json FILE] [--quick]

Time: both ways encode the same cleaned text in one process, in turns, and must give the same ids; reported is the ratio of
the medians. The store does more: it also marks words and documents and writes everything to disk.
Memory: stage 1 runs as a process of its own on 1, 2 and 4 copies of the corpus; reported is each one's peak resident size.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from babylm import models
from custom_dataset import TextPart, open_store


def stage_1(source: Path, folder: Path, name: str, tokenizer: str) -> Path:
    """Run combine_babylm.py on `source`; returns the corpus folder."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump({"corpus": {"input": str(source), "output": str(folder / name)}, "tokenizer": {"path": tokenizer}}))
    subprocess.run([sys.executable, "combine_babylm.py", "--config", str(config)], check=True, stdout=subprocess.DEVNULL)
    return folder / name


def time_both(corpus: Path, tokenizer, rounds: int) -> dict[str, float]:
    """Median seconds of the store and of one string, after checking that their ids are the same."""
    part = TextPart(corpus, "train")
    texts = [text for _, text in part]
    seconds: dict[str, list[float]] = {"store": [], "one_string": []}
    for _ in range(rounds):
        shutil.rmtree(corpus / "tokens", ignore_errors=True)
        began = time.perf_counter()
        store = open_store(corpus, "train", tokenizer)
        seconds["store"].append(time.perf_counter() - began)

        # The same token stream written the usual way: all documents joined by the special tokens, encoded at once.
        began = time.perf_counter()
        start, end = tokenizer.bos_token, tokenizer.eos_token
        text = end + end.join(texts) + end if start in (None, end) else start + f"{end}{start}".join(texts) + end
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids, dtype=store.ids.dtype)
        ids.tofile(corpus / "one_string.bin")
        seconds["one_string"].append(time.perf_counter() - began)
        if not np.array_equal(ids, store.ids):
            raise SystemExit("the two ways give different ids")
    return {name: statistics.median(values) for name, values in seconds.items()}


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_megabytes(source: Path, copies: int, folder: Path, tokenizer: str) -> tuple[int, float]:
    """(words, peak resident MB) of stage 1 on `copies` copies of a corpus, in a process of its own."""
    raw = folder / f"raw{copies}"
    raw.mkdir()
    for file in sorted(source.glob("*.train")):
        with open(raw / file.name, "wb") as out:
            for _ in range(copies):
                with open(file, "rb") as stream:
                    shutil.copyfileobj(stream, out)
                out.write(b"\n\n")
    config = folder / f"peak{copies}.yaml"
    target = folder / f"corpus{copies}"
    config.write_text(yaml.safe_dump({"corpus": {"input": str(raw), "output": str(target)}, "tokenizer": {"path": tokenizer}}))
    command = [sys.executable, "-c", PEAK, sys.executable, "combine_babylm.py", "--config", str(config)]
    kilobytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    words = sum(part["words"] for part in json.loads((target / "manifest.json").read_text())["parts"].values())
    shutil.rmtree(raw)
    shutil.rmtree(target)
    return words, kilobytes / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=Path("train_10M"))
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one round, one and two copies")
    args = parser.parse_args()
    tokenizer = models.load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = stage_1(args.input, folder, "timed", args.tokenizer)
        seconds = time_both(corpus, tokenizer, 1 if args.quick else args.rounds)
        own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        peaks = [peak_megabytes(args.input, copies, folder, args.tokenizer) for copies in ((1, 2) if args.quick else (1, 2, 4))]
    result = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version(), "seconds": seconds,
              "ratio": seconds["one_string"] / seconds["store"], "peak_mb_of_one_string_process": own_peak,
              "stage_1": [{"words": words, "peak_mb": peak} for words, peak in peaks]}
    print(f"one string {seconds['one_string']:.1f} s, token store {seconds['store']:.1f} s: {result['ratio']:.2f} times as fast "
          f"(load {result['load']:.1f} on {result['cpus']} cores); the process with the one string peaked at {own_peak:,.0f} MB")
    for words, peak in peaks:
        print(f"stage 1 on {words:>12,} words: peak {peak:,.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
