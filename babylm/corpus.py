"""From raw files to the two parts of a corpus: reading, document boundaries, the split by document, duplicates, writing.

Text is streamed. What stays in memory is one small row per document, and a hash per long line of the validation part.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from babylm.cleaning import Cleaner
from babylm.config import CorpusConfig, CorpusSection
from babylm.run_folder import amount, existing_parent, free_bytes, require_space
from babylm.schema import UserError
from custom_dataset import DOCUMENT, DataError, file_sha256

PARTS = ("train", "val")
# part: an index into PARTS, or -1 for a document that is not used
CLEAN = np.dtype([("start", "<i8"), ("stop", "<i8"), ("words", "<i8"), ("hash", "<u8"), ("part", "i1")])
LONG_LINE_WORDS = 10  # shorter lines ("yeah .") repeat in any corpus; longer ones in both parts hint at a leak


# ---- Reading a raw file ---------------------------------------------------------------------------------------------

LONGEST_LINE = 1 << 22  # bytes; a longer line is cut at a space, so that no file can fill the memory
LONGEST_DOCUMENT = 10_000  # lines
_HEADING = re.compile(rb"\s*= = = .* = = =\s*")


def find_boundary(path: Path, chunk_lines: int) -> str:
    """What separates documents in a raw file: "heading" (`= = = Title = = =`), "blank" lines, or "lines:<chunk_lines>"
    where the file marks nothing. A mark has to stand between two documents at least, or it separates nothing; and a few
    stray blank lines in a long file (documents of more than LONGEST_DOCUMENT lines on average) are no marks either."""
    headings = breaks = lines = 0
    inside = False
    with open(path, "rb") as stream:
        for line in iter(lambda: stream.readline(LONGEST_LINE), b""):
            line = line.removeprefix(b"\xef\xbb\xbf")
            headings += line.lstrip().startswith(b"= = = ") and _HEADING.fullmatch(line) is not None
            visible = bool(line.strip())
            lines += visible
            breaks += visible and not inside
            inside = visible
    if headings >= 2:
        return "heading"
    return "blank" if breaks >= 2 and lines <= breaks * LONGEST_DOCUMENT else f"lines:{chunk_lines}"


def decoded_lines(path: Path, errors: str, counts: dict[str, int]) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends; Windows line ends and a byte-order mark are removed and counted.

    Raises:
        DataError: bytes that are not UTF-8, with file and byte offset, where `errors` is "strict".
    """
    position, rest = 0, b""
    with open(path, "rb") as stream:
        for raw in iter(lambda: stream.readline(LONGEST_LINE), b""):
            raw, rest = rest + raw, b""
            if len(raw) >= LONGEST_LINE and not raw.endswith(b"\n"):
                cut = raw.rfind(b" ") + 1
                if not cut:  # no space at all: step back over the bytes that continue a character
                    cut = len(raw) - 1
                    while cut > 1 and raw[cut] & 0xC0 == 0x80:
                        cut -= 1
                raw, rest = raw[:cut], raw[cut:]
                counts["long_lines_cut"] += 1
            yield _decode(raw, path, position, errors, counts)
            position += len(raw)
    if rest:
        yield _decode(rest, path, position, errors, counts)


def _decode(raw: bytes, path: Path, position: int, errors: str, counts: dict[str, int]) -> str:
    try:
        line = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise DataError(f"{path}: byte {raw[error.start]:#04x} at offset {position + error.start:,} is not UTF-8; convert the file, "
                            "or set corpus.encoding_errors to replace or ignore") from None
        counts["undecodable_lines"] += 1
        line = raw.decode("utf-8", errors)
    if position == 0 and line.startswith("\ufeff"):
        line = line[1:]
        counts["byte_order_marks"] += 1
    if line.endswith("\r\n"):
        counts["windows_line_ends"] += 1
    return line.rstrip("\r\n")


def documents(lines: Iterator[str], boundary: str, cleaner: Cleaner, max_words: int, counts: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Group lines into clean documents and yield (text, words) of each.

    Lines of a document are joined by line breaks; blank lines inside it (paragraphs, where blank lines are not the
    boundary) survive as one. A document of more than `max_words` words is cut at a line end.
    """
    chunk = int(boundary.split(":")[1]) if boundary.startswith("lines:") else 0
    held: list[str] = []
    words = raw_lines = 0

    def flush() -> Iterator[tuple[str, int]]:
        nonlocal words, raw_lines
        text = "\n".join(held).strip("\n")
        if text:
            yield text, words
        held.clear()
        words = raw_lines = 0

    for line in lines:
        if not line.strip():
            if boundary == "blank":
                yield from flush()
            elif held and held[-1]:
                held.append("")
            continue
        if boundary == "heading" and _HEADING.fullmatch(line.encode()) or chunk and raw_lines == chunk:
            yield from flush()
        raw_lines += 1
        cleaned = cleaner.line(line)
        if cleaned is None:
            continue
        count = len(cleaned.split())
        if held and words + count > max_words:
            counts["long_documents_cut"] += 1
            yield from flush()
        held.append(cleaned)
        words += count
    yield from flush()


# ---- Before anything is written -------------------------------------------------------------------------------------


def print_plan(config: CorpusConfig, files: list[Path], rules: dict[str, tuple[str, ...]], tokenizer: Any, target: Path,
               done: bool) -> None:
    """The rest of a dry run of stage 1: read the raw files through, and say what would be made of them.

    Args:
        rules: cleaning rules by file stem.
        tokenizer: the one that the config names, None where one is trained.
        done: whether `target` holds this corpus already.

    Raises:
        DataError: bytes that are not UTF-8.
        UserError: what is to be written does not fit on the disk.
    """
    section, size, words = config.corpus, sum(file.stat().st_size for file in files), 0
    for file in files:
        found = sum(len(line.split()) for line in decoded_lines(file, section.encoding_errors, Counter()))
        words += found
        print(f"input      {file}: {amount(file.stat().st_size)}, {found:,} words before cleaning; documents by "
              f"{boundary_of(file, section)}; {len(rules[file.stem])} cleaning rules", flush=True)
    drawn = f", of which about {section.max_words:,} are drawn" if section.max_words else ""
    print(f"input      {len(files)} file(s), {amount(size)}, {words:,} words{drawn}; {section.validation_fraction:.1%} of every domain is "
          "for validation")
    entries = len(tokenizer) if tokenizer is not None else config.tokenizer.vocab_size
    print(f"tokenizer  {entries:,} entries, " + (f"from {config.tokenizer.path}" if tokenizer is not None else
                                              f"trained here; pairs seen {config.tokenizer.min_frequency} times are merged"))
    aside = config.fresh and target.is_dir() and any(target.iterdir())
    print(f"folder     {target}: " + ("already holds this corpus, nothing to do" if done else
                                   "what is there is moved aside (fresh)" if aside else "exists" if target.exists() else "new"))
    if not done:
        share = min(1.0, section.max_words / max(words, 1)) if section.max_words else 1.0
        # All clean text, and the parts drawn from it; rarely are there more than two tokens to a word, each with a byte for its word mark.
        needed = [("clean text", target, round(size * (1 + share))),
                  ("token store", target, round(2 * words * share) * (3 if entries <= 2**16 else 5))]
        require_space(needed, "free some space, or choose another --output")
        print(f"disk       at most about {amount(sum(part for *_, part in needed))}; {amount(free_bytes(target))} free in "
              f"{existing_parent(target)}")
    print("dry run    all is well, and nothing was written; the same command without --dry_run makes the corpus", flush=True)


def boundary_of(file: Path, section: CorpusSection) -> str:
    """The boundary rule of a raw file: "heading", "blank" or "lines:N"."""
    rule = section.boundaries.get(file.stem, section.boundaries.get("default", "auto"))
    return find_boundary(file, section.chunk_lines) if rule == "auto" else rule


# ---- From files to parts --------------------------------------------------------------------------------------------


@dataclass
class Domain:
    """One raw file on its way into the corpus.

    Attributes:
        name: the domain, the file's stem.
        scratch: its clean documents, one after the other.
        documents: [D] structured array CLEAN: byte range in `scratch`, words, content hash, and the part it is drawn for.
        report: what the manifest says of the file.
    """

    name: str
    scratch: Path
    documents: np.ndarray
    report: dict[str, Any]

    def texts(self, part: int) -> Iterator[bytes]:
        """The documents drawn for a part (an index into PARTS), as UTF-8, one at a time."""
        with open(self.scratch, "rb") as stream:
            for document in self.documents[self.documents["part"] == part]:
                stream.seek(document["start"])
                yield stream.read(document["stop"] - document["start"])


def clean(file: Path, scratch: Path, section: CorpusSection, rules: tuple[str, ...]) -> Domain:
    """Stream a raw file into `scratch` as clean documents."""
    boundary = boundary_of(file, section)
    cleaner, counts, rows, position = Cleaner(rules), Counter(), [], 0
    lines = decoded_lines(file, section.encoding_errors, counts)
    with open(scratch, "wb") as stream:
        for text, words in documents(lines, boundary, cleaner, section.max_document_words, counts):
            data = text.encode("utf-8")
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            rows.append((position, position + len(data), words, digest, 0))
            position += stream.write(data)
    table = np.array(rows, CLEAN)
    if len(table) == 0:
        raise UserError(f"{file} holds no text (after cleaning): remove it, or change corpus.cleaning")
    report = {"sha256": file_sha256(file), "bytes": file.stat().st_size, "boundary": boundary, "documents": len(table),
              "words": int(table["words"].sum()), "rules": cleaner.counts, **counts}
    return Domain(file.stem, scratch, table, report)


def assign_parts(domain: Domain, section: CorpusSection, share_of_text: float, seed: list[int]) -> None:
    """Draw every document of a domain for training, validation or (beyond corpus.max_words) neither.

    Documents are taken in seeded order until the share of words is reached. Every domain gives at least one document to
    validation and keeps one for training, unless the share is 0 or 1.
    """
    order = np.random.default_rng(seed).permutation(len(domain.documents))
    words, part = domain.documents["words"], domain.documents["part"]
    share = section.validation_fraction
    least = 2 if 0 < share < 1 else 1  # documents that a domain needs, however small its budget
    if section.max_words:
        budget, taken, chosen = section.max_words * share_of_text, 0, 0
        part[:] = -1
        for index in order:
            if taken + words[index] <= budget or chosen < least:
                part[index] = 0
                taken += words[index]
                chosen += 1
        order = order[part[order] == 0]
    if share == 1:
        part[order] = 1
    elif share > 0:
        if len(order) < 2:
            raise UserError(f"{domain.name} has a single document, so it cannot be in training and validation both: give its "
                            "boundary as lines:N (corpus.boundaries), or set validation_fraction to 0 or 1")
        wanted, taken = share * words[order].sum(), 0
        for index in order[:-1]:
            if taken >= wanted:
                break
            if taken + words[index] - wanted <= wanted - taken:  # a long one that overshoots by more than it fills is passed over
                part[index] = 1
                taken += words[index]
        if taken == 0:
            part[order[np.argmin(words[order])]] = 1


def find_duplicates(domains: list[Domain], drop: bool) -> dict[str, int]:
    """Count validation documents, and long validation lines, that also stand in training; `drop` takes such documents out."""
    everything = np.concatenate([domain.documents for domain in domains])
    held_out = np.unique(everything["hash"][everything["part"] == 1])
    shared = np.intersect1d(held_out, everything["hash"][everything["part"] == 0])
    dropped = 0
    if drop:
        for domain in domains:
            again = (domain.documents["part"] == 0) & np.isin(domain.documents["hash"], shared)
            domain.documents["part"][again] = -1
            dropped += int(again.sum())
    lines = {hash(line) for line in _long_lines(domains, 1)}
    repeated = {hashed for line in _long_lines(domains, 0) if (hashed := hash(line)) in lines}
    return {"documents": len(shared), "long_lines": len(repeated), "long_lines_in_validation": len(lines), "dropped_from_train": dropped}


def _long_lines(domains: list[Domain], part: int) -> Iterator[bytes]:
    for domain in domains:
        for text in domain.texts(part):
            yield from (line for line in text.split(b"\n") if line.count(b" ") >= LONG_LINE_WORDS - 1)


def write_part(target: Path, part: str, domains: list[Domain]) -> dict[str, Any]:
    """Write <part>_babylm.txt (documents separated by a blank line) and <part>_documents.npy; return the manifest's entry."""
    rows, position, per_domain = [], 0, {}
    path, index_path = target / f"{part}_babylm.txt", target / f"{part}_documents.npy"
    with open(path, "wb") as out:
        for number, domain in enumerate(domains):
            chosen = domain.documents[domain.documents["part"] == PARTS.index(part)]
            per_domain[domain.name] = {"documents": len(chosen), "words": int(chosen["words"].sum()),
                                       "bytes": int((chosen["stop"] - chosen["start"]).sum())}
            for words, text in zip(chosen["words"], domain.texts(PARTS.index(part)), strict=True):
                rows.append((position, position + len(text), words, number))
                position += out.write(text) + out.write(b"\n\n")
    index = np.array(rows, DOCUMENT)
    np.save(index_path, index)
    return {"file": path.name, "sha256": file_sha256(path), "index_sha256": file_sha256(index_path), "bytes": path.stat().st_size,
            "documents": len(index), "words": int(index["words"].sum()), "domains": per_domain}
