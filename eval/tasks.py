"""The zero-shot tasks: what tasks.yaml says of each, which sets of them lie in a data folder, and their items."""

import json
import string
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from babylm.run_folder import folder_written_whole, is_whole
from babylm.schema import UserError
from custom_dataset import file_sha256

SUITES = {"2025": Path(__file__).with_name("tasks.yaml"), "2026": Path(__file__).with_name("tasks_2026.yaml")}


class Candidate(BaseModel):
    """A text to score, and what stands before it; both with {fields} of a row."""

    model_config = ConfigDict(extra="forbid")
    prefix: str = ""
    text: str


class Task(BaseModel):
    """One entry of tasks.yaml; the head of that file explains the keys."""

    model_config = ConfigDict(extra="forbid")
    name: str = ""
    title: str
    sets: list[str] = Field(min_length=1)
    folder: str
    candidates: list[Candidate] = []
    prefix: str = ""
    options: str | None = None
    separator: str | None = None
    skip_options: str | None = None
    gold: str | None = None
    uid: str = ""
    uid_names: dict[str, str] = {}
    predict: str = Field("text", pattern="^(text|whole)$")
    groups: dict[str, str] = {}
    group_default: str | None = None
    average: str = Field("uids", pattern="^(uids|splits)$")
    score: str = Field("accuracy", pattern="^(accuracy|spearman|reading)$")
    normalise: str | None = Field(None, pattern="^length$")
    chance: float
    sizes: dict[str, int | dict[str, int]] = {}
    source: str

    @model_validator(mode="after")
    def _texts(self) -> "Task":
        if self.score != "reading" and (bool(self.candidates) == bool(self.options) or not self.uid):
            raise ValueError("a task needs a uid, and either candidates or options")
        return self


@dataclass(frozen=True)
class Item:
    """One question: texts to choose from.

    `gold` is the index of the right candidate; None where people's answers are a `ratio` in favour of the first.
    """

    uid: str
    id: str
    prefixes: tuple[str, ...]
    texts: tuple[str, ...]
    gold: int | None
    ratio: float | None
    groups: dict[str, str] = field(default_factory=dict)
    split: str = ""
    names: tuple[str, ...] = ()  # what the official predictions call the candidates; default: the texts

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", self.names or self.texts)


def load_tasks(suite: str | Path = "2025") -> dict[str, Task]:
    """{name: Task} of a year's suite, or of a file like tasks.yaml. UserError names the file, the task and the key."""
    path = SUITES.get(str(suite), Path(suite))
    if not path.is_file():
        raise UserError(f"no suite {suite}: give {' or '.join(SUITES)}, or a file like eval/tasks.yaml")
    tasks = {}
    for name, entry in _entries(path).items():
        try:
            tasks[name] = Task.model_validate({**entry, "name": name})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}: {name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return tasks


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    """The tasks of a file; of one that begins with `changes: <file>`, those of that file with what this one says instead."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: not a mapping of task names to their descriptions")
    base = entries.pop("changes", None)
    if base is not None and (not (path.parent / str(base)).is_file() or (path.parent / str(base)).samefile(path)):
        raise UserError(f"{path}: changes: {base!r} is no other file beside it")
    whole = _entries(path.parent / base) if base else {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) and not (name in whole and entry is None):
            gone = f", or null for a task of {base} that is gone" if base else ""
            raise UserError(f"{path}: {name}: expected the keys of a task{gone}")
        whole[name] = None if entry is None else {**whole.get(name, {}), **entry}
    return {name: entry for name, entry in whole.items() if entry is not None}


def choose_tasks(names: list[str] | None, tasks: dict[str, Task]) -> list[Task]:
    """The tasks of these names, or all. UserError on a name that is none."""
    unknown = sorted(set(names or ()) - set(tasks))
    if unknown:
        raise UserError(f"no such task: {', '.join(unknown)}; this suite has {', '.join(tasks)}")
    return [task for name, task in tasks.items() if not names or name in names]


def open_data(path: Path) -> Path:
    """The folder of the evaluation data; a packed download (.zip, .tar.gz) is unpacked beside itself, once.

    Raises:
        UserError: there is nothing, or an archive that is damaged, has a password, or is of another kind.
    """
    if path.is_dir():
        return path
    if not path.is_file():
        raise UserError(f"no evaluation data at {path}: give --data, a folder that holds blimp_filtered/ or blimp_fast/ and so on, or the "
                        "packed download")
    folder = path.with_name(f"{path.name}.unpacked")
    if not is_whole(folder):
        print(f"unpacking {path} into {folder}", flush=True)
        with folder_written_whole(folder) as target:
            try:
                if zipfile.is_zipfile(path):
                    with zipfile.ZipFile(path) as archive:
                        archive.extractall(target)
                else:
                    with tarfile.open(path) as archive:
                        archive.extractall(target, filter="data")
            except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
                raise UserError(f"{path} is no whole .zip or .tar.gz ({error}): fetch it again") from None
            except RuntimeError as error:  # what zipfile raises for want of a password
                raise UserError(f"{path}: {error}; unpack it yourself and give the folder") from None
    return folder


def find_sets(task: Task, data: Path) -> list[Path]:
    """The folders of a task's sets that exist under a data path, or under its fast_eval/ or full_eval/, or in these of the one
    folder that an archive holds. A set that lies in several of them (the challenge's WUG and reading times do) is named once.

    Raises:
        UserError: folders of one name with different content, whose results would overwrite each other.
    """
    inner = [path for path in data.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]  # __MACOSX in archives
    roots = [data, *inner] if len(inner) == 1 else [data]
    places = [place for root in roots for place in (root, root / "full_eval", root / "fast_eval")]
    found = []
    for name in task.sets:
        first, *others = [place / name for place in places if (place / name).is_dir()] or [None]
        for other in others:
            if [*data_files(first).values()] != [*data_files(other).values()]:
                raise UserError(f"{first} and {other} are different sets of one name, and their results would lie in one folder: give "
                                "the one of them as --data, or each with an --output of its own")
        found += [first] if first else []
    return found


def data_files(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the files of a set that are read."""
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file.suffix in (".jsonl", ".csv")}


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file. UserError names file and line of one that is cut short or not an object."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:  # bytes that are no UTF-8, too
            shown = line[:60].decode("utf-8", errors="replace")
            raise UserError(f"{path}, line {number}: not JSON (cut short?): {shown!r}; fetch the file again") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object: {str(row)[:60]!r}")
        yield number, row


def read_items(task: Task, folder: Path) -> list[Item]:
    """All items of one set, in the files' order.

    Raises:
        UserError: no JSONL file, no row, a row that lacks a field or holds something else than it should (file and line are named),
            or fewer than two candidates.
    """
    items: list[Item] = []
    counts: dict[str, int] = {}
    files = sorted(folder.glob("*.jsonl"))
    for file in files:
        for number, row in rows(file):
            try:
                item = _item(task, file.stem, row, counts)
            except KeyError as error:
                raise UserError(f"{file}, line {number}: a row of {task.title} needs the field {error.args[0]!r}; it has "
                                f"{', '.join(row)}") from None
            except (ValueError, TypeError, AttributeError) as error:
                raise UserError(f"{file}, line {number}: no row of {task.title}: {error}") from None
            items += [item] if item else []
    if not items:
        why = "its files are empty" if files else "no *.jsonl"
        raise UserError(f"{folder} holds no items of {task.title} ({why}); get it from: {task.source}")
    return items


def _item(task: Task, file: str, row: dict[str, Any], counts: dict[str, int]) -> Item | None:
    fields = {"file": file, "UID": file, **row}
    if task.options is not None:
        options = row[task.options]
        texts = tuple(options.split(task.separator) if task.separator else options)
        if task.skip_options and any(task.skip_options in text for text in texts):
            return None
        prefixes = (_filled(task.prefix, fields),) * len(texts)
    else:
        prefixes = tuple(_filled(candidate.prefix, fields) for candidate in task.candidates)
        texts = tuple(_filled(candidate.text, fields) for candidate in task.candidates)
    gold = None if task.score == "spearman" else int(row[task.gold]) if task.gold else 0
    if len(texts) < 2:
        raise ValueError(f"it needs at least two candidates to choose from, not {len(texts)}")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"a candidate is empty, or no text: {texts}")  # nothing to score would be likelier than anything else
    if gold is not None and not 0 <= gold < len(texts):
        raise ValueError(f"{task.gold} is {gold}, but there are {len(texts)} candidates, counted from 0")
    uid = task.uid.format_map(fields)
    uid = task.uid_names.get(uid, uid)
    index = counts[uid] = counts.get(uid, -1) + 1
    groups = {}
    for heading, name in task.groups.items():
        value = row.get(name, task.group_default)
        if value is not None:
            groups[heading] = {"syntax_semantics": "syntax/semantics"}.get(value, value)  # BLiMP spells it both ways
    names = texts if task.predict == "text" else tuple(prefix + text for prefix, text in zip(prefixes, texts, strict=True))
    ratio = float(row["ratio"]) if task.score == "spearman" else None
    return Item(uid, f"{uid}_{index}", prefixes, texts, gold, ratio, groups, file, names)


def _filled(template: str, fields: dict[str, Any]) -> str:
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None and not isinstance(fields[name], str):
            raise ValueError(f"the field {name!r} is {fields[name]!r}, no text")
    return template.format_map(fields)


def unlike_official(task: Task, name: str, uids: Sequence[str]) -> str | None:
    """What distinguishes a set from the official one of its name: None, or a line with the counts that differ.

    Args:
        uids: of its items, one each.
    """
    sizes = task.sizes.get(name)
    if sizes is None:
        return None
    expected = {"total": sizes} if isinstance(sizes, int) else sizes
    counts = Counter(uid.lower() for uid in uids)  # BLiMP's own files disagree in upper case: principle_A, principle_a
    wrong = [f"{len(uids):,} items instead of {expected['total']:,}"] if len(uids) != expected.get("total", len(uids)) else []
    named = {uid: count for uid, count in expected.items() if uid not in ("total", "*")}
    for uid in sorted({*counts, *named}):
        should = named.get(uid, expected.get("*"))
        if should is not None and counts[uid] != should or should is None and named:
            wrong.append(f"{uid} has {counts[uid]:,} instead of {should or 0:,}")
    if not wrong:
        return None
    return f"not the official {name}: " + "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
