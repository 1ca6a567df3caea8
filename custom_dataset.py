"""The one token dataset that every stage reads. It knows no models and imports nothing else of this project.

Three layers, from disk to batch:

1. `TextPart`     one part (train or val) of a corpus folder written by stage 1: a UTF-8 text file beside an index of its
                  documents (byte range and domain), so that a document may hold blank lines and still be one document;
2. `TokenStore`   the same documents as one flat, memory-mapped stream of token ids, keyed by the hashes of text and
                  tokenizer, with a mark per token that says how many words begin in it: words are counted, never guessed;
3. `TokenBlocks`  the stream cut into blocks of fixed length in an order that is a pure function of (seed, item), and
                  `EvalBlocks`, a fixed sample of blocks with the domain of every token.

No padding and no masking: labels are the inputs.
"""

import contextlib
import copy
import hashlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout

DOCUMENT = np.dtype([("start", "<i8"), ("stop", "<i8"), ("words", "<i8"), ("domain", "u1")])  # byte range in the text
TOKEN_DOCUMENT = np.dtype([("start", "<i8"), ("domain", "u1")])  # position in the token stream
STORE_FORMAT = 1  # raise when the layout on disk changes: older stores are then rebuilt, never read


class DataError(Exception):
    """Data on disk is missing, damaged or does not fit; the message names the file and what to do."""


# ---- 1. Text written by stage 1 -------------------------------------------------------------------------------------


class TextPart:
    """The documents of `<folder>/<part>_babylm.txt`, in file order.

    Attributes:
        domains: domain names; a document's `domain` is an index into them.
        documents: [D] structured array DOCUMENT.
        sha256: of the text file, as recorded in the manifest.
    """

    def __init__(self, folder: str | Path, part: str):
        self.folder, self.part = Path(folder), part
        self.path = self.folder / f"{part}_babylm.txt"
        manifest_path = self.folder / "manifest.json"
        if not manifest_path.is_file():
            raise DataError(f"{manifest_path} is missing: {self.folder} was not (completely) written by stage 1; "
                            f"run: python combine_babylm.py --output {self.folder}")
        try:
            self.manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            self.manifest["domains"], self.manifest["parts"][part]["sha256"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{manifest_path} is damaged: remove it and run combine_babylm.py again") from None
        self.domains: list[str] = self.manifest["domains"]
        self.sha256: str = self.manifest["parts"][part]["sha256"]
        index = self.folder / f"{part}_documents.npy"
        if not index.is_file() or file_sha256(index) != self.manifest["parts"][part].get("index_sha256"):
            raise DataError(f"{index} is missing or not the one that manifest.json describes: run combine_babylm.py again")
        self.documents = np.load(index)
        if len(self.documents) == 0:
            raise DataError(f"{self.path} holds no documents: choose another corpus.validation_fraction and run "
                            f"combine_babylm.py again (it is {self.manifest['validation_fraction']} now)")

    def verify(self) -> None:
        """Raise DataError unless the text file is the one that the manifest describes (it may have been edited)."""
        if not self.path.is_file() or file_sha256(self.path) != self.sha256:
            raise DataError(f"{self.path} is not the file that manifest.json describes (edited, cut short or deleted?): "
                            "run combine_babylm.py again")

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield (domain index, text) per document; reads one document at a time."""
        with open(self.path, "rb") as stream:
            for document in self.documents:
                stream.seek(document["start"])
                yield int(document["domain"]), stream.read(document["stop"] - document["start"]).decode("utf-8")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- 2. The token store ---------------------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what a tokenizer does to text: vocabulary, merges, normalisation, splitting, special ids.

    Two tokenizers with equal fingerprints give the same ids for the same text. Size alone proves nothing. What only
    decorates (templates, padding, offsets) is left out: a model's own copy prepends a start token and is still the same.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = json.loads(json.dumps(state.get("pre_tokenizer")), object_hook=lambda d: {k: v for k, v in d.items() if k != "trim_offsets"})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"].get("merges", [])]
    added = [token for token in state.get("added_tokens", []) if not token["special"]]  # cut out of the text before all else
    content = [sorted(tokenizer.get_vocab().items()), merges, state["model"]["type"], state.get("normalizer"), splitter,
               tokenizer.bos_token_id, tokenizer.eos_token_id, *added]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TokenStore:
    """A memory-mapped stream of token ids with word marks and document starts.

    Attributes:
        ids: [N] uint16 or uint32 token ids; every document is enclosed in the tokenizer's start and end token, or
            (where it has only one, as GPT-2) preceded and followed by its end-of-text token.
        word_starts: [N] uint8, the number of whitespace-separated words that begin in each token.
        documents: [D] structured array TOKEN_DOCUMENT.
        domains: names for `documents["domain"]`.
        meta: what `meta.json` says: hashes, counts, `words` (the sum of word_starts).
        estimated: whether it only stands for a store that is not there (UnwrittenStore).
    """

    estimated = False

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.domains: list[str] = self.meta["domains"]
        self.ids = np.memmap(folder / "ids.bin", dtype=self.meta["dtype"], mode="r")
        self.word_starts = np.memmap(folder / "words.bin", dtype=np.uint8, mode="r")
        self.documents = np.load(folder / "documents.npy")

    def __len__(self) -> int:
        return len(self.ids)

    def domain_of(self, positions: np.ndarray) -> np.ndarray:
        """Domain index of each token position; any shape in, the same shape out."""
        return self.documents["domain"][np.searchsorted(self.documents["start"], positions, side="right") - 1]


class UnwrittenStore(TokenStore):
    """What the store in `folder` would hold, in memory, for those who must not write.

    Of a text larger than SAMPLE_BYTES every n-th document is tokenised, and the result repeated up to the words of the whole text:
    `estimated` is then True, and the number of tokens (and blocks) an estimate.
    """

    SAMPLE_BYTES = 32_000_000

    def __init__(self, folder: Path, text: TextPart, tokenizer: Any, fingerprint: str):
        self.folder, self.domains = folder, text.domains
        every = min(max(1, -(-int(text.documents["stop"][-1]) // self.SAMPLE_BYTES)), len(text.documents))
        self.estimated = every > 1
        part = copy.copy(text)
        part.documents = text.documents[::every]
        ids_file, words_file = io.BytesIO(), io.BytesIO()
        documents, self.meta = _tokenise(part, tokenizer, fingerprint, ids_file, words_file)
        ids, marks = np.frombuffer(ids_file.getvalue(), self.meta["dtype"]), np.frombuffer(words_file.getvalue(), np.uint8)
        if self.estimated:
            length = round(len(ids) * int(text.documents["words"].sum()) / max(self.meta["words"], 1))
            shifts = [(documents["start"] + begin, documents["domain"]) for begin in range(0, length, len(ids))]
            documents = np.zeros(len(shifts) * len(documents), TOKEN_DOCUMENT)
            documents["start"], documents["domain"] = (np.concatenate(column) for column in zip(*shifts, strict=True))
            documents = documents[documents["start"] < length]
            ids, marks = np.resize(ids, length), np.resize(marks, length)
        self.ids, self.word_starts, self.documents = ids, marks, documents
        self.meta |= {"tokens": len(ids), "words": int(marks.sum(dtype=np.int64)), "documents": len(documents),
                      "files": {"ids.bin": hashlib.sha256(ids).hexdigest(), "words.bin": hashlib.sha256(marks).hexdigest()}}


def open_store(corpus: str | Path, part: str, tokenizer: Any, *, wait_s: float = -1, write: bool = True) -> TokenStore:
    """Open the token store of one part of a corpus folder; build it first where there is none that is whole.

    Args:
        corpus: folder written by stage 1.
        part: "train" or "val".
        tokenizer: a fast transformers tokenizer.
        wait_s: how long to wait while another process builds the same store (-1: as long as it takes).
        write: False leaves the disk alone: without a whole store there, the result is an UnwrittenStore.

    Raises:
        DataError: no such corpus, text changed since stage 1, tokenizer without an end token, disk full, or `wait_s` over.
    """
    text = TextPart(corpus, part)
    text.verify()
    fingerprint = tokenizer_fingerprint(tokenizer)
    content = [STORE_FORMAT, text.sha256, hashlib.sha256(text.documents.tobytes()).hexdigest(), fingerprint]
    store_key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    folder = text.folder / "tokens" / f"{part}-{store_key}"
    # Without a lock: a corpus that others share with us, read-only, or a process that must not write.
    if folder.is_dir() and not (write and os.access(folder.parent, os.W_OK)) and _store_fault(folder) is None:
        return TokenStore(folder)
    if not write:
        if not os.access(folder.parent if folder.parent.is_dir() else text.folder, os.W_OK):
            raise _unwritable(folder, "Permission denied")
        return UnwrittenStore(folder, text, tokenizer, fingerprint)
    try:
        folder.parent.mkdir(exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        with contextlib.suppress(Timeout), lock.acquire(timeout=0):
            return _open_or_build(folder, text, tokenizer, fingerprint)
        print(f"another process is {'checking' if folder.is_dir() else 'building'} {folder}: waiting for it", flush=True)
        with lock.acquire(timeout=wait_s):
            return _open_or_build(folder, text, tokenizer, fingerprint)
    except Timeout:
        raise DataError(f"{folder} is still being built by another process after {wait_s:.0f} s") from None
    except OSError as error:
        raise _unwritable(folder, error.strerror or error) from error


def _unwritable(folder: Path, reason: Any) -> DataError:
    return DataError(f"cannot write the token store {folder}: {reason}; free some space or choose another corpus folder; nothing "
                     "half-written is kept")


def _open_or_build(folder: Path, text: TextPart, tokenizer: Any, fingerprint: str) -> TokenStore:
    fault = _store_fault(folder)
    if fault is None:
        return TokenStore(folder)
    if fault != "missing":
        print(f"{folder} is damaged ({fault}): building it again", flush=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _build(temporary, text, tokenizer, fingerprint)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenStore(folder)


def _store_fault(folder: Path) -> str | None:
    """What is wrong with the store in `folder`: None if it is whole, "missing" if there is none."""
    if not folder.is_dir():
        return "missing"
    try:
        files = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "meta.json is missing or unreadable"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_sha256(folder / name) != digest:
            return f"{name} is cut short or changed"
    return None


def _build(folder: Path, text: TextPart, tokenizer: Any, fingerprint: str) -> None:
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "words.bin", "wb") as words_file:
        documents, meta = _tokenise(text, tokenizer, fingerprint, ids_file, words_file)
    np.save(folder / "documents.npy", documents)
    meta["files"] = {name: file_sha256(folder / name) for name in ("ids.bin", "words.bin", "documents.npy")}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _tokenise(text: TextPart, tokenizer: Any, fingerprint: str, ids_file: BinaryIO, words_file: BinaryIO) -> tuple[np.ndarray, dict]:
    """Write ids and word marks of all documents into two files; (documents, meta without hashes of files)."""
    start_id, end_id = document_tokens(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    encoder = WordMarkingEncoder(tokenizer)
    documents = np.zeros(len(text.documents), TOKEN_DOCUMENT)
    position = words = 0
    began, shown = time.monotonic(), time.monotonic()

    def write(ids: np.ndarray, marks: np.ndarray) -> None:
        nonlocal position, words
        ids_file.write(ids.astype(dtype).tobytes())
        words_file.write(marks.tobytes())
        position += len(ids)
        words += int(marks.sum())

    no_mark = np.zeros(1, np.uint8)
    if start_id is None:  # one end-of-text token before the first document, so that its first word is predicted too
        write(np.array([end_id]), no_mark)
    for index, (domain, ids, marks) in enumerate(encoder.stream(text)):
        documents[index] = (position, domain)
        if start_id is not None:
            write(np.array([start_id]), no_mark)
        write(ids, marks)
        write(np.array([end_id]), no_mark)
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            share = text.documents["stop"][index] / text.documents["stop"][-1]
            left = (shown - began) * (1 - share) / share
            print(f"  tokenising {text.path}: {share:.0%}, {words:,} words, {left:.0f} s left", flush=True)
    if start_id is None:
        documents["start"][0] = 0  # the leading end-of-text token belongs to the first document
    meta = {"tokens": position, "words": words, "documents": len(documents), "domains": text.domains,
            "dtype": np.dtype(dtype).name, "text_sha256": text.sha256, "tokenizer": fingerprint}
    print(f"tokenised {text.path}: {words:,} words, {position:,} tokens ({position / max(words, 1):.2f} per word), "
          f"{len(documents):,} documents in {time.monotonic() - began:.1f} s", flush=True)
    return documents, meta


def document_tokens(tokenizer: Any) -> tuple[int | None, int]:
    """(start, end) ids that enclose a document; start is None where the tokenizer has one end-of-text token for both."""
    start_id, end_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end_id is None:
        raise DataError(f"tokenizer {tokenizer.name_or_path} has no end-of-text token: documents could not be told apart; "
                        "set eos_token in its tokenizer_config.json")
    if max(end_id, start_id or 0) >= len(tokenizer):
        raise DataError(f"tokenizer {tokenizer.name_or_path}: special token id {max(end_id, start_id or 0)} lies outside "
                        f"its {len(tokenizer)} entries")
    return (None if start_id in (None, end_id) else start_id), end_id


class WordMarkingEncoder:
    """Encodes documents in batches and finds the words that begin in each token.

    A word is what `str.split()` yields. Where the tokens' own bytes concatenate to the text (byte-level BPE), their
    lengths place every word start by array arithmetic; other tokenizers go through the slower character offsets.
    Text that looks like a special token ("<|endoftext|>" in a web page) is encoded as the plain text that it is.
    """

    BATCH_CHARACTERS = 1 << 20
    PIECE_CHARACTERS = 1 << 18  # longer documents are encoded in pieces, cut where byte-level splitting cuts anyway

    def __init__(self, tokenizer: Any):
        self.backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()
        splitter = json.loads(self.backend.to_str()).get("pre_tokenizer") or {}
        self.byte_level = splitter.get("type") == "ByteLevel" and not splitter.get("add_prefix_space")
        self.token_bytes = np.zeros(self.backend.get_vocab_size(), np.int64)
        if self.byte_level:  # byte-level vocabularies write one character per byte
            for token, index in self.backend.get_vocab().items():
                self.token_bytes[index] = len(token)

    def stream(self, documents: Iterator[tuple[int, str]]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (domain, ids [n], word marks [n]) for each (domain, text), encoding a batch at a time on all cores."""
        batch: list[tuple[int, str]] = []
        size = 0
        for domain, text in documents:
            batch.append((domain, text))
            size += len(text)
            if size >= self.BATCH_CHARACTERS:
                yield from self._encode(batch)
                batch, size = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[tuple[int, str]]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        pieces = [self._pieces(text) for _, text in batch]
        flat = [piece for parts in pieces for piece in parts]
        encode = self.backend.encode_batch_fast if self.byte_level else self.backend.encode_batch
        encoded = iter(encode(flat, add_special_tokens=False))
        for (domain, text), parts in zip(batch, pieces, strict=True):
            encodings = [next(encoded) for _ in parts]
            ids = np.concatenate([np.array(encoding.ids, np.int64) for encoding in encodings])
            if self.byte_level:
                ends = np.cumsum(self.token_bytes[ids])
                starts, length = _word_starts(text)
                if len(ids) and ends[-1] != length:
                    raise DataError(f"the tokens of a document that begins {text[:40]!r} do not spell its text: "
                                    "this tokenizer loses bytes")
            else:
                starts = np.array([match.start() for match in re.finditer(r"\S+", text)], np.int64)
                ends, shift = [], 0
                for encoding, part in zip(encodings, parts, strict=True):
                    ends += [shift + end for _, end in encoding.offsets]
                    shift += len(part)
                ends = np.maximum.accumulate(np.array(ends, np.int64)) if ends else np.zeros(0, np.int64)
            # A word begins in the first token that reaches beyond its first character.
            first = np.minimum(np.searchsorted(ends, starts, side="right"), len(ids) - 1) if len(ids) else starts[:0]
            yield domain, ids, np.bincount(first, minlength=len(ids)).astype(np.uint8)

    def _pieces(self, text: str) -> list[str]:
        if len(text) <= self.PIECE_CHARACTERS or not self.byte_level:
            return [text]
        pieces, start = [], 0
        while len(text) - start > self.PIECE_CHARACTERS:
            # A line break, or the space before a word, between two visible characters: no token can span it.
            cut = re.compile(r"(?<=\S)\n(?=\S)|(?<=\S)(?= \S)").search(text, start + self.PIECE_CHARACTERS // 2)
            if cut is None:
                break
            pieces.append(text[start : cut.end()])
            start = cut.end()
        return [*pieces, text[start:]]


_SPACES = np.zeros(0x110000, bool)
_SPACES[[point for point in range(0x110000) if chr(point).isspace()]] = True


def _word_starts(text: str) -> tuple[np.ndarray, int]:
    """(byte positions in UTF-8 at which whitespace-separated words begin, length in bytes)."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    ends = np.cumsum(lengths)
    visible = ~_SPACES[points]
    first = visible & ~np.concatenate([[False], visible[:-1]])
    return (ends - lengths)[first], int(ends[-1]) if len(ends) else 0


# ---- 3. Blocks ------------------------------------------------------------------------------------------------------


class TokenBlocks(torch.utils.data.Dataset):
    """A whole run's training data as one long list: item i is a pure function of (store, seq_len, seed, i).

    Epoch e shuffles all blocks by (seed, e) and cuts the stream at an offset drawn from (offset_seed, e mod offset_cycle),
    its *layout*. Because the order needs no state, a resumed run, another process count or another accumulation sees the
    same items at the same steps, and batches may cross from one epoch into the next, so that no block is dropped.

    Args:
        store: the token store.
        seq_len: tokens per block, T.
        seed: of order and offsets.
        random_chunk: False cuts every epoch at offset 0.
        offset_cycle: number of different layouts; None: every epoch has its own.
        offset_seed: draws the offsets; None: `seed`.
        items: length of the run in blocks (steps x batch size); default: one epoch.

    Raises:
        DataError: the store holds fewer tokens than one block.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int, *, random_chunk: bool = True,
                 offset_cycle: int | None = None, offset_seed: int | None = None, items: int | None = None):
        self.store, self.seq_len, self.seed = store, seq_len, seed
        self.random_chunk, self.offset_cycle = random_chunk, offset_cycle
        self.offset_seed = seed if offset_seed is None else offset_seed
        self.extras: Callable[[int, int], dict[str, torch.Tensor]] | None = None
        slack = seq_len - 1 if random_chunk else 0  # the largest offset: every layout then has equally many blocks
        self.blocks_per_epoch = (len(store) - slack) // seq_len
        if self.blocks_per_epoch < 1:
            raise DataError(f"{store.folder} holds {len(store):,} tokens, fewer than one block of data.seq_len={seq_len}"
                            f"{' at every offset (data.random_chunk)' if random_chunk else ''}: use more text or shorter blocks")
        self.items = self.blocks_per_epoch if items is None else items
        self._epoch: int | None = None
        self._layout_words: dict[int, int] = {}  # words of a whole epoch, by layout

    def __len__(self) -> int:
        return self.items

    def layout(self, epoch: int) -> int:
        """Which of the offset layouts an epoch uses; what a teacher cache is keyed by."""
        return epoch % self.offset_cycle if self.offset_cycle else epoch

    def offset(self, layout: int) -> int:
        """First token of block 0 in a layout, in 0 ... seq_len - 1."""
        return int(np.random.default_rng([self.offset_seed, 1, layout]).integers(self.seq_len)) if self.random_chunk else 0

    def layouts(self) -> list[int]:
        """The layouts that the run's items come from."""
        return sorted({self.layout(epoch) for epoch in range(-(-self.items // self.blocks_per_epoch))})

    def block(self, layout: int, block: int) -> torch.Tensor:
        """[T] int64 ids of one block of a layout."""
        start = self.offset(layout) + block * self.seq_len
        return torch.from_numpy(self.store.ids[start : start + self.seq_len].astype(np.int64))

    def locate(self, item: int) -> tuple[int, int, int]:
        """(epoch, layout, block) of an item."""
        epoch, position = divmod(item, self.blocks_per_epoch)
        self._enter(epoch)
        return epoch, self.layout(epoch), int(self._order[position])

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        """{"input_ids": [T] int64}, and what `extras(layout, block)` gives beside it, where that is set."""
        if not 0 <= item < self.items:
            raise IndexError(item)
        _, layout, block = self.locate(item)
        return {"input_ids": self.block(layout, block), **(self.extras(layout, block) if self.extras else {})}

    def words_through(self, items: int) -> int:
        """Words in the first `items` items of the run, over all processes: the ledger that milestones go by."""
        epoch, position = divmod(items, self.blocks_per_epoch)
        if position == 0 and epoch > 0:
            epoch, position = epoch - 1, self.blocks_per_epoch
        self._enter(epoch)
        return int(self._words_before + self._words[position])

    def items_for_words(self, words: int) -> int:
        """The smallest number of items that holds at least `words` words (repeats counted)."""
        epoch = 0
        while True:
            self._enter(epoch)
            if self._words_before + self._words[-1] >= words:
                return epoch * self.blocks_per_epoch + int(np.searchsorted(self._words, words - self._words_before))
            if self._words[-1] == 0:
                raise DataError(f"{self.store.folder} holds no words")
            epoch += 1

    def _enter(self, epoch: int) -> None:
        """Make the order, offset and word counts of an epoch current."""
        if epoch == self._epoch:
            return
        layouts = [self.layout(earlier) for earlier in range(epoch)]
        for layout in set(layouts) - self._layout_words.keys():
            self._layout_words[layout] = int(self._block_words(layout).sum())
        self._words_before = sum(self._layout_words[layout] for layout in layouts)
        self._order = np.random.default_rng([self.seed, 2, epoch]).permutation(self.blocks_per_epoch)
        self._words = np.concatenate([[0], np.cumsum(self._block_words(self.layout(epoch))[self._order])])
        self._epoch = epoch

    def _block_words(self, layout: int) -> np.ndarray:
        start = self.offset(layout)
        marks = self.store.word_starts[start : start + self.blocks_per_epoch * self.seq_len]
        return np.add.reduce(marks.reshape(self.blocks_per_epoch, self.seq_len), axis=1, dtype=np.int64)


class EvalBlocks(torch.utils.data.Dataset):
    """A fixed sample of blocks for validation, the same for every run on the same store.

    Args:
        store: the validation store.
        seq_len: tokens per block, T.
        count: at most this many blocks, drawn without replacement with a fixed seed and kept in text order.

    Items are {"input_ids": [T] int64, "domains": [T] int64}, and what `extras(item)` gives beside them, where that is set; a
    domain indexes `store.domains`.
    """

    SEED = 1

    def __init__(self, store: TokenStore, seq_len: int, count: int):
        self.store, self.seq_len = store, seq_len
        available = len(store) // seq_len
        if available < 1:
            raise DataError(f"{store.folder} holds {len(store):,} tokens, fewer than one block of data.seq_len={seq_len}: "
                            "hold out more text (corpus.validation_fraction) or use shorter blocks")
        chosen = np.random.default_rng(self.SEED).permutation(available)[:count]
        self.blocks = np.sort(chosen)
        self.extras: Callable[[int], dict[str, torch.Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, item: int) -> torch.Tensor:
        """[T] int64 ids."""
        start = int(self.blocks[item]) * self.seq_len
        return torch.from_numpy(self.store.ids[start : start + self.seq_len].astype(np.int64))

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        start = int(self.blocks[item]) * self.seq_len
        positions = np.arange(start, start + self.seq_len)
        return {"input_ids": self.block(item),
                "domains": torch.from_numpy(self.store.domain_of(positions).astype(np.int64)),
                **(self.extras(item) if self.extras else {})}
