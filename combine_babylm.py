"""Stage 1: from raw *.train files to a clean, split, tokenised corpus.

Reads    <input>/*.train (2023's ten domains, 2024-26's six, or any names), or the embedded demo corpus
Writes   <output>/{train,val}_babylm.txt with {train,val}_documents.npy, manifest.json, tokenizer/, tokens/
Command  python combine_babylm.py --input train_10M --output corpus_split
         python combine_babylm.py --download strict-small          (10M words from the Hugging Face hub, then as above)
         python combine_babylm.py --config configs/demo/corpus.yaml
Expect   10M words in about a minute on two cores; memory does not grow with the corpus
"""

import json
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np

from babylm import cleaning, corpus, demo_corpus, hub, models
from babylm.config import CorpusConfig, CorpusSection
from babylm.run_folder import move_aside, run_stage, write_json
from babylm.schema import DRY_RUN, UserError, content_hash, identity, load
from custom_dataset import file_sha256, open_store, tokenizer_fingerprint


def main() -> None:
    # ---- 1. Read the config -----------------------------------------------------------------------------------------
    config, flags = load(CorpusConfig, "configs/10M/corpus.yaml", __doc__, flags={
        "--input": {"key": "corpus.input", "help": "folder with *.train files"},
        "--output": {"key": "corpus.output", "help": "folder to write"},
        "--download": {"choices": ["strict-small", "strict"], "help": "fetch the published 10M or 100M corpus into --input first"},
        **DRY_RUN})
    section, source, target = config.corpus, Path(config.corpus.input), Path(config.corpus.output)
    if flags.download and not config.dry_run:
        hub.download_corpus(config.download, flags.download, source)
    if section.demo_words:
        _refuse_foreign(source)
        if not config.dry_run:
            _write_demo(source, section.demo_words, config.seed)
    if config.dry_run and (flags.download or section.demo_words) and not any(source.glob("*.train")):
        what = f"the corpus {flags.download}" if flags.download else f"a demo corpus of about {section.demo_words:,} words"
        print(f"input      {source}: {what} would be written there first, so there is nothing to look at yet\n"
              "dry run    the config is valid, and nothing was written")
        return
    files = sorted(source.glob("*.train")) or sorted(source.glob("*.dev"))
    if not files:
        raise UserError(f"{source} holds no *.train files: give --input a folder that does, or fetch the published corpus with "
                        "--download strict-small")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty: remove it, or fetch it again")
    rules = _rules(files, section)
    tokenizer = models.load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None

    # ---- 2. Open the output folder ----------------------------------------------------------------------------------
    mine = {**identity(config), "files": {file.name: file_sha256(file) for file in files}}
    if tokenizer is not None:  # the folder it came from may hold another one next time
        mine["tokenizer"] = tokenizer_fingerprint(tokenizer)
    done = _is_done(target, mine, config.fresh)
    if config.dry_run:
        corpus.print_plan(config, files, rules, tokenizer, target, done)
        return
    if done:
        print(f"{target} already holds this corpus: nothing to do")
    else:
        _prepare(target, config.fresh)
        with tempfile.TemporaryDirectory(dir=target, prefix=".", suffix=".tmp") as scratch:  # gone, however it ends
            # ---- 3. Clean every file into documents, and draw the validation part by document within it -------------
            domains, all_bytes = [], sum(file.stat().st_size for file in files)
            for number, file in enumerate(files):
                domain = corpus.clean(file, Path(scratch, file.stem), section, rules[file.stem])
                corpus.assign_parts(domain, section, file.stat().st_size / all_bytes, [config.seed, number])
                domains.append(domain)
                _say(file, domain)

            # ---- 4. Write the two parts, the tokenizer and the manifest ---------------------------------------------
            duplicates = corpus.find_duplicates(domains, section.drop_duplicates)
            parts = {part: corpus.write_part(target, part, domains) for part in corpus.PARTS}
            trained_on = 0
            if tokenizer is None:
                print(f"training a tokenizer of {config.tokenizer.vocab_size:,} entries on the training text", flush=True)
                texts = (text.decode("utf-8") for domain in domains for text in domain.texts(0))
                tokenizer = models.train_tokenizer(texts, config.tokenizer.vocab_size, config.tokenizer.min_frequency)
                trained_on = parts["train"]["words"]
        (target / "tokenizer").mkdir(exist_ok=True)
        models.save_tokenizer(tokenizer, target / "tokenizer")
        write_json(target / "manifest.json", {  # last: a folder without it is no corpus
            "identity": mine, "identity_hash": content_hash(mine), "seed": config.seed,
            "validation_fraction": section.validation_fraction, "domains": [domain.name for domain in domains], "parts": parts,
            "duplicates": duplicates, "files": {domain.name: domain.report for domain in domains},
            "tokenizer": {"source": config.tokenizer.path or "trained here", "entries": len(tokenizer),
                          "trained_on_words": trained_on, "fingerprint": tokenizer_fingerprint(tokenizer),
                          "sha256": file_sha256(target / "tokenizer" / "tokenizer.json")}})
        print(f"{target}: {parts['train']['words']:,} words for training, {parts['val']['words']:,} for validation; "
              f"{duplicates['documents']:,} documents and {duplicates['long_lines']:,} long lines of validation also stand in training"
              f"{'; these documents were left out of it' if duplicates['dropped_from_train'] else ''}", flush=True)
    if section.demo_words and section.demo_pairs:
        demo_corpus.write_minimal_pairs(target / "pairs", config.seed, section.demo_pairs)

    # ---- 5. Build the token store, so that later stages start at once ------------------------------------------------
    tokenizer = models.load_tokenizer(target / "tokenizer")
    for part in corpus.PARTS:
        if len(np.load(target / f"{part}_documents.npy")):
            open_store(target, part, tokenizer)


# ---- The steps in detail --------------------------------------------------------------------------------------------


DEMO_MARK = ".demo"  # says that the files beside it were generated


def _refuse_foreign(folder: Path) -> None:
    if not (folder / DEMO_MARK).exists() and (theirs := sorted(folder.glob("*.train"))):
        raise UserError(f"{theirs[0]} was not made by the demo generator, which would overwrite it: choose another --input")


def _write_demo(folder: Path, words: int, seed: int) -> None:
    """Generate the demo corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEMO_MARK).touch()
    demo_corpus.write_corpus(folder, words, seed)


def _say(file: Path, domain: corpus.Domain) -> None:
    words, part = domain.documents["words"], domain.documents["part"]
    print(f"{file.name:<24} {words.sum():>12,} words  {len(words):>7,} documents ({domain.report['boundary']})  "
          f"{words[part >= 0].sum():>12,} used  {words[part == 1].sum():>10,} for validation", flush=True)


def _rules(files: list[Path], section: CorpusSection) -> dict[str, tuple[str, ...]]:
    """The cleaning rules of every file; UserError for a rule or a domain in the config that does not exist."""
    known = {"default", *(cleaning.domain_of(file.name) for file in files), *(file.stem for file in files)}
    for name, keys in (("boundaries", section.boundaries), ("cleaning", section.cleaning)):
        if unknown := set(keys) - known:
            raise UserError(f"corpus.{name}: there is no file for {', '.join(sorted(unknown))}; the files are "
                            f"{', '.join(file.name for file in files)}")
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            rules = {file.stem: cleaning.rules_for(file.stem, section.cleaning) if section.clean else () for file in files}
    except ValueError as error:
        raise UserError(f"corpus.cleaning: {error}") from None
    for note in notes:
        print(f"note: {note.message}", flush=True)
    return rules


def _is_done(target: Path, mine: dict, fresh: bool) -> bool:
    """Whether the folder holds exactly this corpus, whole. Anything else in it is never overwritten."""
    manifest_path = target / "manifest.json"
    if manifest_path.is_file():
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{manifest_path} is damaged: remove it and run the same command again") from None
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
    return False


def _prepare(target: Path, fresh: bool) -> None:
    """Make the output folder ready to be written; with `fresh`, what is in it is moved aside."""
    if target.is_dir() and fresh and any(target.iterdir()):
        print(f"fresh: moved the old {target} to {move_aside(target)}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "manifest.json").unlink(missing_ok=True)  # without it, a half-written folder is not taken for a corpus
        if not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}; choose another --output") from error


def _is_ours(name: str) -> bool:
    return name in ("tokenizer", "tokens", "pairs") or name.startswith(".") or any(name.startswith(f"{part}_") for part in corpus.PARTS)


if __name__ == "__main__":
    run_stage(main)
