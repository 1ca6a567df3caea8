"""Stage 1: from raw *.train files to a clean, split, tokenised corpus.

Reads    <input>/*.train (2023's ten domains, 2024-26's six, or any names), or the embedded demo corpus
Writes   <output>/{train,val}_babylm.txt with {train,val}_documents.npy, manifest.json, tokenizer/, tokens/
Command  python combine_babylm.py --input train_10M --output corpus_split
         python combine_babylm.py --download strict-small          (10M words from the Hugging Face hub, then as above)
         python combine_babylm.py --config configs/demo/corpus.yaml
Expect   10M words in about a minute on two cores; memory does not grow with the corpus
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from babylm import cleaning, demo_corpus, hub, models
from babylm.config import CorpusConfig, CorpusSection, UserError, content_hash, identity, load
from babylm.run_folder import run_stage, write_json
from custom_dataset import DOCUMENT, file_sha256, open_store, tokenizer_fingerprint

RAW = np.dtype([("start", "<i8"), ("stop", "<i8"), ("words", "<i8"), ("hash", "<u8"), ("part", "i1")])  # part: 0 train, 1 val, -1 unused
PARTS = ("train", "val")
LONG_LINE_WORDS = 10  # shorter lines ("yeah .") repeat in any corpus; longer ones in both parts hint at a leak


def main() -> None:
    # ---- 1. Read the config -----------------------------------------------------------------------------------------
    config, flags = load(CorpusConfig, "configs/10M/corpus.yaml", __doc__, flags={
        "--input": {"key": "corpus.input", "help": "folder with *.train files"},
        "--output": {"key": "corpus.output", "help": "folder to write"},
        "--download": {"choices": ["strict-small", "strict"], "help": "fetch the published 10M or 100M corpus into --input first"}})
    section, source, target = config.corpus, Path(config.corpus.input), Path(config.corpus.output)
    if flags.download:
        hub.download_corpus(config.download, flags.download, source)
    if section.demo_words:
        _write_demo(source, section.demo_words, config.seed)
    files = sorted(source.glob("*.train")) or sorted(source.glob("*.dev"))
    if not files:
        raise UserError(f"{source} holds no *.train files: give --input a folder that does, or fetch the published corpus with "
                        "--download strict-small")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: remove it, or fetch it again")
    rules = {file.stem: _rules(file.stem, section) for file in files}
    tokenizer = models.load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None

    # ---- 2. Open the output folder ----------------------------------------------------------------------------------
    mine = {**identity(config), "files": {file.name: file_sha256(file) for file in files}}
    if tokenizer is not None:  # the folder it came from may hold another one next time
        mine["tokenizer"] = tokenizer_fingerprint(tokenizer)
    if _is_done(target, mine, config.fresh):
        print(f"{target} already holds this corpus: nothing to do")
    else:
        with tempfile.TemporaryDirectory(dir=target, prefix=".", suffix=".tmp") as scratch_folder:  # gone, however it ends
            # ---- 3. Clean every file into documents, and draw the validation part by document within it -----------------
            domains = {}
            for number, file in enumerate(files):
                scratch = Path(scratch_folder) / f"{file.stem}.clean"
                documents, report = clean(file, scratch, section, rules[file.stem])
                assign_parts(file.name, documents, section, sum(f.stat().st_size for f in files), file.stat().st_size,
                             [config.seed, number])
                domains[file.stem] = (scratch, documents, report)
                used = documents["words"][documents["part"] >= 0].sum()
                print(f"{file.name:<24} {report['words']:>12,} words  {len(documents):>7,} documents ({report['boundary']})  "
                      f"{used:>12,} used  {documents['words'][documents['part'] == 1].sum():>10,} for validation", flush=True)

            # ---- 4. Write the two parts, the tokenizer and the manifest ---------------------------------------------------
            duplicates = find_duplicates(domains, section.drop_duplicates)
            parts = {part: write_part(target, part, domains) for part in PARTS}
            trained_on = 0
            if tokenizer is None:
                print(f"training a tokenizer of {config.tokenizer.vocab_size:,} entries on the training text", flush=True)
                tokenizer = models.train_tokenizer(_texts(target, "train", parts), config.tokenizer.vocab_size,
                                                   config.tokenizer.min_frequency)
                trained_on = parts["train"]["words"]
            (target / "tokenizer").mkdir(exist_ok=True)
            models.save_tokenizer(tokenizer, target / "tokenizer")
            write_json(target / "manifest.json", {
                "identity": mine, "identity_hash": content_hash(mine), "seed": config.seed,
                "validation_fraction": section.validation_fraction, "domains": list(domains), "parts": parts, "duplicates": duplicates,
                "files": {name: report for name, (_, _, report) in domains.items()},
                "tokenizer": {"source": config.tokenizer.path or "trained here", "entries": len(tokenizer),
                              "trained_on_words": trained_on, "fingerprint": tokenizer_fingerprint(tokenizer),
                              "sha256": file_sha256(target / "tokenizer" / "tokenizer.json")}})
            shared = (f"{duplicates['documents']:,} documents and {duplicates['long_lines']:,} long lines of validation also stand in "
                      "training")
            print(f"{target}: {parts['train']['words']:,} words for training, {parts['val']['words']:,} for validation; {shared}"
                  f"{' and were left out of it' if duplicates['dropped_from_train'] else ''}", flush=True)
    if section.demo_words and section.demo_pairs:
        demo_corpus.write_minimal_pairs(target / "pairs", config.seed, section.demo_pairs)

    # ---- 5. Build the token store, so that later stages start at once ------------------------------------------------
    tokenizer = models.load_tokenizer(target / "tokenizer")
    for part in PARTS:
        if len(np.load(target / f"{part}_documents.npy")):
            open_store(target, part, tokenizer)


# ---- The steps in detail --------------------------------------------------------------------------------------------


def _write_demo(folder: Path, words: int, seed: int) -> None:
    """Generate the demo corpus; never over a file of the user's."""
    mark = folder / ".demo"  # says that the files beside it were generated
    if not mark.exists() and (theirs := sorted(folder.glob("*.train"))):
        raise UserError(f"{theirs[0]} was not made by the demo generator, which would overwrite it: choose another --input")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
    demo_corpus.write_corpus(folder, words, seed)


def _rules(domain: str, section: CorpusSection) -> tuple[str, ...]:
    try:
        return cleaning.rules_for(domain, section.cleaning) if section.clean else ()
    except ValueError as error:
        raise UserError(f"corpus.cleaning: {error}") from None


def _is_done(target: Path, mine: dict, fresh: bool) -> bool:
    """Whether the folder holds exactly this corpus, whole. Anything else in it is never overwritten."""
    manifest_path = target / "manifest.json"
    if manifest_path.is_file():
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        expected = {target / part["file"]: part["sha256"] for part in manifest["parts"].values()}
        expected |= {target / f"{name}_documents.npy": part.get("index_sha256") for name, part in manifest["parts"].items()}
        expected[target / "tokenizer" / "tokenizer.json"] = manifest["tokenizer"].get("sha256")
        whole = all(path.is_file() and file_sha256(path) == digest for path, digest in expected.items())
        if manifest["identity_hash"] == content_hash(mine) and whole and not fresh:
            return True
        if manifest["identity_hash"] != content_hash(mine) and not fresh:
            changed = [name for name in mine if manifest["identity"].get(name) != mine[name]]
            raise UserError(f"{target} holds a corpus made with other settings or files ({', '.join(changed)}): choose another "
                            "--output, or fresh=true to move it aside")
    elif target.is_dir() and (foreign := [p.name for p in target.iterdir() if not _is_ours(p.name)]):
        raise UserError(f"{target} holds files that are not a corpus ({', '.join(sorted(foreign)[:3])}): choose another --output")
    if target.is_dir() and fresh and any(target.iterdir()):
        number = 1
        while (aside := target.with_name(f"{target.name}-old{number}")).exists():
            number += 1
        os.rename(target, aside)
        print(f"fresh: moved the old {target} to {aside}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        manifest_path.unlink(missing_ok=True)  # without it, a half-written folder is not taken for a corpus
        if not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}; choose another --output") from error
    return False


def _is_ours(name: str) -> bool:
    return name in ("tokenizer", "tokens", "pairs") or name.startswith(".") or any(name.startswith(f"{part}_") for part in PARTS)


def clean(file: Path, scratch: Path, section: CorpusSection, rules: tuple[str, ...]) -> tuple[np.ndarray, dict]:
    """Stream a raw file into `scratch` as clean documents; return their byte ranges [D] and a report for the manifest."""
    boundary = section.boundaries.get(file.stem, section.boundaries.get("default", "auto"))
    if boundary == "auto":
        boundary = cleaning.find_boundary(file, section.chunk_lines)
    cleaner, counts, rows, position = cleaning.Cleaner(rules), Counter(), [], 0
    lines = cleaning.decoded_lines(file, section.encoding_errors, counts)
    with open(scratch, "wb") as stream:
        for text, words in cleaning.documents(lines, boundary, cleaner, section.max_document_words, counts):
            data = text.encode("utf-8")
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            rows.append((position, position + len(data), words, digest, 0))
            position += stream.write(data)
    documents = np.array(rows, RAW)
    if len(documents) == 0:
        raise UserError(f"{file} holds no text (after cleaning): remove it, or change corpus.cleaning")
    report = {"sha256": file_sha256(file), "bytes": file.stat().st_size, "boundary": boundary, "documents": len(documents),
              "words": int(documents["words"].sum()), "rules": cleaner.counts, **counts}
    return documents, report


def assign_parts(name: str, documents: np.ndarray, section: CorpusSection, all_bytes: int, file_bytes: int, seed: list[int]) -> None:
    """Set `part` of every document of one domain, in place: drawn in seeded order until the share of words is reached.

    Every domain gives at least one document to validation and keeps one for training, unless the share is 0 or 1.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    words = documents["words"]
    share = section.validation_fraction
    least = 2 if 0 < share < 1 else 1  # documents that a domain needs, however small its budget
    if section.max_words:
        budget, taken, chosen = section.max_words * file_bytes / all_bytes, 0, 0
        documents["part"] = -1
        for index in order:
            if taken + words[index] <= budget or chosen < least:
                documents["part"][index] = 0
                taken += words[index]
                chosen += 1
        order = [index for index in order if documents["part"][index] == 0]
    if share == 1:
        documents["part"][order] = 1
    elif share > 0:
        if len(order) < 2:
            raise UserError(f"{name} has a single document, so it cannot be in training and validation both: give its "
                            "boundary as lines:N (corpus.boundaries), or set validation_fraction to 0 or 1")
        wanted, taken = share * words[order].sum(), 0
        for index in order[:-1]:
            if taken >= wanted:
                break
            # a long document that would overshoot by more than it fills is passed over, once there is another one
            if taken == 0 or taken + words[index] - wanted <= wanted - taken:
                documents["part"][index] = 1
                taken += words[index]


def find_duplicates(domains: dict, drop: bool) -> dict[str, int]:
    """Count validation documents, and long validation lines, that also stand in training; `drop` takes such documents out."""
    everything = np.concatenate([documents for _, documents, _ in domains.values()])
    held_out = np.unique(everything["hash"][everything["part"] == 1])
    shared = np.intersect1d(held_out, everything["hash"][everything["part"] == 0])
    dropped = 0
    if drop:
        for _, documents, _ in domains.values():
            again = (documents["part"] == 0) & np.isin(documents["hash"], shared)
            documents["part"][again] = -1
            dropped += int(again.sum())
    lines = {hash(line) for line in _long_lines(domains, 1)}
    repeated = {hashed for line in _long_lines(domains, 0) if (hashed := hash(line)) in lines}
    return {"documents": len(shared), "long_lines": len(repeated), "long_lines_in_validation": len(lines), "dropped_from_train": dropped}


def _long_lines(domains: dict, part: int):
    for scratch, documents, _ in domains.values():
        with open(scratch, "rb") as stream:
            for document in documents[documents["part"] == part]:
                stream.seek(document["start"])
                for line in stream.read(document["stop"] - document["start"]).split(b"\n"):
                    if line.count(b" ") >= LONG_LINE_WORDS - 1:
                        yield line


def write_part(target: Path, part: str, domains: dict) -> dict:
    """Write <part>_babylm.txt (documents separated by a blank line) and <part>_documents.npy; return the manifest's entry."""
    rows, position, per_domain = [], 0, {}
    path = target / f"{part}_babylm.txt"
    with open(path, "wb") as out:
        for number, (name, (scratch, documents, _)) in enumerate(domains.items()):
            chosen = documents[documents["part"] == PARTS.index(part)]
            per_domain[name] = {"documents": len(chosen), "words": int(chosen["words"].sum()),
                                "bytes": int((chosen["stop"] - chosen["start"]).sum())}
            with open(scratch, "rb") as stream:
                for document in chosen:
                    stream.seek(document["start"])
                    length = out.write(stream.read(document["stop"] - document["start"]))
                    rows.append((position, position + length, document["words"], number))
                    position += length + out.write(b"\n\n")
    index = np.array(rows, DOCUMENT)
    np.save(target / f"{part}_documents.npy", index)
    return {"file": path.name, "sha256": file_sha256(path), "index_sha256": file_sha256(target / f"{part}_documents.npy"),
            "bytes": path.stat().st_size, "documents": len(index),
            "words": int(index["words"].sum()), "domains": per_domain}


def _texts(target: Path, part: str, parts: dict):
    """The texts of a part, one at a time, before there is a manifest."""
    with open(target / parts[part]["file"], "rb") as stream:
        for document in np.load(target / f"{part}_documents.npy"):
            stream.seek(document["start"])
            yield stream.read(document["stop"] - document["start"]).decode("utf-8")


if __name__ == "__main__":
    run_stage(main)
