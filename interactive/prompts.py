"""The beginnings that a policy continues: read, cut in the policy's own tokens, checked, and dealt out by step.

A prompt is a text. What the policy then sees is its tokenizer's start token and the tokens of that text, so a text that
was cut after k tokens is kept only if the tokenizer reads it as exactly those k tokens again; where it does not (a
character cut in two, tokens that merge), the cut moves to the left, or the text is dropped and counted.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from babylm.config import PromptsSection
from babylm.run_folder import write_json
from babylm.schema import UserError, content_hash
from custom_dataset import TextPart, file_sha256, tokenizer_fingerprint

RULES = 1  # raise when the rules below change: older caches are then made again, never read
DATASETS = {"tinystories": ("roneneldan/TinyStories", "text"), "writingprompts": ("euclaise/writingprompts", "prompt"),
            "imdb": ("stanfordnlp/imdb", "text")}  # source -> (name on the hub, column)
SHUFFLE_ROWS = 25_000  # rows drawn from at a time: all of IMDB's training part, whose file has one class after the other
LONGEST_QUESTION = 20.0  # seconds until the hub has said which commit a revision is
CHARACTERS_PER_TOKEN = 100  # of a text, so much is encoded for each token that may be kept


@dataclass(frozen=True)
class Prompts:
    """Prompts of one run, and in which order it sees them.

    Attributes:
        texts: the prompts, without start token; empty ones never, equal ones only where the source repeats itself.
        source: in words, for the record.
        seed: of the order in which `batch` deals them out.
        longest: tokens of the longest prompt, start token not counted.
        dropped: {reason: times that a text did not become a prompt}.
        shortened: how many were cut further to the left than drawn.
        by_domain: {domain: prompts} for source corpus, else empty.
        hub: {"dataset", "revision", "commit"} of a data set on the hub, else None: a branch's name stays, what it names does not.
    """

    texts: list[str]
    source: str
    seed: int
    longest: int
    dropped: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    by_domain: dict[str, int] = field(default_factory=dict)
    hub: dict[str, str] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """A hash of the texts in their order; part of a run's identity."""
        return content_hash(self.texts)

    def batch(self, step: int, size: int) -> list[str]:
        """The `size` prompts of step 0, 1, 2, ...: a pure function of (texts, seed, step, size).

        Steps deal out one epoch after the other, each a permutation of its own, so that a resumed run sees what an
        uninterrupted one would have, and every prompt comes once before any comes twice.
        """
        if step < 0 or size < 1:
            raise ValueError(f"step {step} and size {size}: steps count from 0, a batch holds at least 1 prompt")
        return [self.texts[_permutation(self.seed, place // len(self.texts), len(self.texts))[place % len(self.texts)]]
                for place in range(step * size, (step + 1) * size)]

    def describe(self) -> str:
        """One line: what was kept, and what was not and why."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        parts = [f"{len(self):,} prompts from {self.source}", f"longest {self.longest:,} tokens"]
        parts += [f"dropped: {dropped}"] if dropped else []
        parts += [f"{self.shortened:,} cut shorter than drawn, so that they tokenise as they were cut"] if self.shortened else []
        return "; ".join(parts)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def load_prompts(section: PromptsSection, tokenizer: PreTrainedTokenizerFast, corpus: str, seed: int,
                 cache_dir: str | Path | None = None, write: bool = True, recorded: dict[str, str] | None = None) -> Prompts:
    """The prompts that a config asks for; the same arguments give the same prompts, of a data set on the hub as long as it stays the same.

    Args:
        section: the section `prompts` of stage 6.
        tokenizer: the policy's, whose tokens are counted.
        corpus: folder written by stage 1 (source: corpus).
        seed: draws the texts, the length of each cut, and the order of `Prompts.batch`.
        cache_dir: where prompts of a data set are kept, so that it is fetched once; None keeps nothing.
        write: False only reads what is kept there.
        recorded: `Prompts.hub` of the run that goes on, which keeps to its commit.

    Raises:
        UserError: a file or data set is missing, cannot be reached or lacks its column, or no text becomes a prompt.
        DataError: the corpus has no validation part.
    """
    if section.from_dataset:
        return _from_dataset(section, tokenizer, seed, cache_dir, write, recorded)
    if section.source == "corpus":
        return _from_corpus(section, tokenizer, corpus, seed)
    if section.source == "fixed":
        return _collect([section.text], section, tokenizer, seed, "prompts.text")
    texts = _read_file(Path(section.path), section.column or "prompt")
    order = np.random.default_rng([seed, 1]).permutation(len(texts))  # so that `count` draws from all of the file
    return _collect((texts[i] for i in order), section, tokenizer, seed, section.path)


# ---- From a text to a prompt ----------------------------------------------------------------------------------------


class Cutter:
    """Turns texts into prompts by the rules of a section, and counts what it drops.

    Args:
        section: limits, and whether texts are cut.
        tokenizer: the policy's.
        seed: with a text's number, draws the length of its cut.
    """

    def __init__(self, section: PromptsSection, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.section, self.tokenizer, self.seed = section, tokenizer, seed
        self.reader, self.plain = (type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()) for _ in range(2))
        for backend in (self.reader, self.plain):
            backend.no_padding()
            backend.no_truncation()
        self.plain.encode_special_tokens = True  # "</s>" within a text is text, as in the token store
        self.special = set(tokenizer.all_special_ids)
        self.dropped: Counter[str] = Counter()
        self.shortened = self.longest = 0

    def lengths(self, number: int) -> np.ndarray:
        """All lengths from min_tokens to max_tokens in an order drawn for text `number`; the first is its length."""
        low, high = self.section.min_tokens, self.section.max_tokens
        return low + np.random.default_rng([self.seed, 2, number]).permutation(high - low + 1)

    def prompt(self, text: Any, length: int) -> str | None:
        """The prompt made of a text, `length` tokens long where texts are cut; None (counted by reason) if there is none."""
        if not isinstance(text, str) or not text.strip():
            return self._drop("empty")
        text = text.strip()
        if self.section.source == "writingprompts":
            if len(text.split()) > self.section.max_words:
                return self._drop(f"of more than {self.section.max_words} words")
            text = " ".join(text.replace("[WP]", "Story idea: ").split()) + " Story:"
        return self._cut(text, length) if self.section.cuts else self._whole(text)

    def _whole(self, text: str) -> str | None:
        ids = self.reader.encode(text, add_special_tokens=False).ids
        if self.special & set(ids):
            return self._drop("with the name of a special token in their text")
        self.longest = max(self.longest, len(ids))
        return text

    def _cut(self, text: str, length: int) -> str | None:
        ids = self.plain.encode(text[: CHARACTERS_PER_TOKEN * self.section.max_tokens], add_special_tokens=False).ids
        if len(ids) < self.section.min_tokens:
            return self._drop(f"of fewer than {self.section.min_tokens} tokens")
        for kept in range(min(length, len(ids)), self.section.min_tokens - 1, -1):
            prompt = self.tokenizer.decode(ids[:kept], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if prompt.strip() and self.reader.encode(prompt, add_special_tokens=False).ids == ids[:kept]:
                self.shortened += kept < min(length, len(ids))
                self.longest = max(self.longest, kept)
                return prompt
        return self._drop("that tokenise otherwise once they are cut")

    def _drop(self, reason: str) -> None:
        self.dropped[reason] += 1


def _collect(texts: Iterable[Any], section: PromptsSection, tokenizer: PreTrainedTokenizerFast, seed: int, source: str) -> Prompts:
    """Prompts of the first texts that make one, up to `count`."""
    cutter, kept = Cutter(section, tokenizer, seed), []
    for number, text in enumerate(texts):
        prompt = cutter.prompt(text, int(cutter.lengths(number)[0]))
        if prompt is not None:
            kept.append(prompt)
            if len(kept) == section.count:
                break
    return _prompts(kept, cutter, source)


def _prompts(kept: list[str], cutter: Cutter, source: str, by_domain: dict[str, int] | None = None) -> Prompts:
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in cutter.dropped.items()) or "it holds no text"
        raise UserError(f"prompts: nothing in {source} became a prompt ({reasons}); change the limits in the section prompts, or its "
                        "source")
    section = cutter.section
    cut = f" (first {section.min_tokens} to {section.max_tokens} tokens)" if section.cuts else ""
    return Prompts(kept, source + cut, cutter.seed, cutter.longest, dict(cutter.dropped), cutter.shortened, by_domain or {})


# ---- Sources on this machine ----------------------------------------------------------------------------------------


def _from_corpus(section: PromptsSection, tokenizer: PreTrainedTokenizerFast, corpus: str, seed: int) -> Prompts:
    """Openings of validation documents, each domain by its share of words, no two alike.

    Where there are fewer documents than prompts, they are gone through again with another length for each.
    """
    part = TextPart(corpus, "val")
    part.verify()
    cutter = Cutter(section, tokenizer, seed)
    openings = [(domain, text.strip()[: CHARACTERS_PER_TOKEN * section.max_tokens]) for domain, text in part]
    words = np.bincount(part.documents["domain"], part.documents["words"], len(part.domains))
    seen: set[str] = set()

    def of_domain(domain: int) -> Iterator[str]:
        numbers = [number for number, (theirs, _) in enumerate(openings) if theirs == domain]
        numbers = np.random.default_rng([seed, 1, domain]).permutation(np.array(numbers, int))
        for again in range(section.max_tokens - section.min_tokens + 1):
            for number in numbers:
                prompt = cutter.prompt(openings[number][1], int(cutter.lengths(number)[again]))
                if prompt in seen:
                    cutter.dropped["seen before"] += 1
                elif prompt is not None:
                    seen.add(prompt)
                    yield prompt

    sources = {domain: of_domain(domain) for domain in range(len(part.domains)) if words[domain] > 0}
    taken, kept = Counter(), []
    while sources and len(kept) < section.count:
        domain = min(sources, key=lambda d: ((taken[d] + 1) / words[d], d))  # the one that lags furthest behind its share
        prompt = next(sources[domain], None)
        if prompt is None:
            del sources[domain]
        else:
            kept.append(prompt)
            taken[domain] += 1
    by_domain = {part.domains[domain]: count for domain, count in sorted(taken.items())}
    return _prompts(kept, cutter, f"the validation documents of {corpus}", by_domain)


def _read_file(path: Path, column: str) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"prompts.path: {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts.path: {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".txt":
        return [line for line in lines if line.strip()]
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"prompts.path: {path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"prompts.path: {path}, line {number} has no text in the field {column!r} (it has: {fields}); "
                            "name the field in prompts.column")
        texts.append(row[column])
    return texts


# ---- Data sets ------------------------------------------------------------------------------------------------------


def _from_dataset(section: PromptsSection, tokenizer: PreTrainedTokenizerFast, seed: int, cache_dir: str | Path | None,
                  write: bool, recorded: dict[str, str] | None) -> Prompts:
    default, column = DATASETS[section.source]
    name, column = section.dataset or default, section.column or column
    local = Path(name).is_dir()
    what = {"rules": RULES, "source": section.source, "dataset": _folder_fingerprint(Path(name)) if local else name,
            "revision": None if local else section.revision, "split": section.split, "column": column, "cut": section.cuts,
            "min_tokens": section.min_tokens, "max_tokens": section.max_tokens, "max_words": section.max_words,
            "count": section.count, "seed": seed, "tokenizer": tokenizer_fingerprint(tokenizer)}
    source, file, hub = f"column {column} of {name}", f"{section.source}-{content_hash(what)}", None
    if not local:
        hub = {"dataset": name, "revision": section.revision}
        if recorded and recorded.items() >= hub.items():
            hub = recorded
        else:
            hub["commit"] = _commit(section, name, Path(cache_dir) if cache_dir else None, file, what)
        what, file, source = what | hub, f"{file}-{hub['commit']}", f"{source}, commit {hub['commit'][:12]}"
    cache = Path(cache_dir) / f"{file}.json" if cache_dir else None
    if cache and cache.is_file():
        if (values := _read_cache(cache, what)) is not None:
            return Prompts(**values)
        print(f"{cache} is damaged or stale: making it again", flush=True)
    rows = _rows(section, name, column, seed, hub["commit"] if hub else None)
    prompts = replace(_collect(rows, section, tokenizer, seed, source), hub=hub)
    if cache and write:
        values = {name: getattr(prompts, name) for name in Prompts.__dataclass_fields__}
        try:
            write_json(cache, {"key": what, "hash": _values_hash(values), "prompts": values})
        except OSError as error:
            raise UserError(f"cannot write the prompts to {cache}: {error.strerror}; free some space or mend the folder") from error
    return prompts


def _commit(section: PromptsSection, name: str, cache_dir: Path | None, file: str, what: dict) -> str:
    """The commit that the revision names now; where the hub cannot be asked, the one whose prompts were kept last, and a line that says
    so. UserError where there is neither, or the hub has no such data set or revision."""
    if re.fullmatch("[0-9a-f]{40}", section.revision):
        return section.revision
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # by whatever name its own client has it

    try:
        return huggingface_hub.HfApi().dataset_info(name, revision=section.revision, timeout=LONGEST_QUESTION).sha
    except (OSError, ValueError, httpx.HTTPError) as error:
        answered = isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500
        kept = sorted(cache_dir.glob(f"{file}-*.json"), key=lambda cache: cache.stat().st_mtime) if cache_dir else []
        for cache in reversed(kept):
            hub = {"dataset": name, "revision": section.revision, "commit": cache.stem.rpartition("-")[2]}
            if not (answered or isinstance(error, ValueError)) and _read_cache(cache, what | hub) is not None:
                print(f"the hub cannot be asked which commit {name}, revision {section.revision}, is now ({_reason(error)}): taking the "
                      f"prompts of commit {hub['commit']}, kept in {cache}", flush=True)
                return hub["commit"]
        raise _unfetched(section, name, error) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no further message'}"


def _unfetched(section: PromptsSection, name: str, error: Exception) -> UserError:
    return UserError(f"prompts.source: {section.source}: {name} (revision {section.revision}, part {section.split!r}) cannot be "
                     f"fetched from the hub ({_reason(error)}). Without a network use prompts.source: corpus, or give a local copy "
                     "in prompts.dataset")


def _read_cache(cache: Path, what: dict) -> dict | None:
    """The stored fields of Prompts; None unless the file is whole and was made by the same key."""
    try:
        held = json.loads(cache.read_text(encoding="utf-8"))
        whole = held["key"] == what and held["hash"] == _values_hash(held["prompts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return held["prompts"] if whole else None


def _values_hash(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _folder_fingerprint(folder: Path) -> str:
    """A hash of the files of a local data set: names and contents, not where it lies."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    return content_hash({str(file.relative_to(folder)): file_sha256(file) for file in files})


def _rows(section: PromptsSection, name: str, column: str, seed: int, commit: str | None) -> Iterator[Any]:
    """The column's values, shuffled; only as much is fetched as is asked for (and SHUFFLE_ROWS to draw from). `commit`: None where the
    data set is a local one."""
    try:
        import datasets
        from huggingface_hub.utils import httpx
    except ImportError as error:
        raise UserError(f"prompts.source: {section.source} needs the package {error.name}: pip install {error.name}; or use "
                        "prompts.source: corpus") from None
    try:
        stream = datasets.load_dataset(name, split=section.split, streaming=True, revision=commit)
        for row in stream.shuffle(seed=seed, buffer_size=SHUFFLE_ROWS):
            if column not in row:
                raise UserError(f"prompts.column: {name} has no column {column!r}; it has: {', '.join(row)}")
            yield row[column]
    except (OSError, ValueError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        if commit is None:
            raise UserError(f"prompts.dataset: {name}, part {section.split!r}, cannot be read ({_reason(error)})") from error
        raise _unfetched(section, name, error) from error
