"""The zero-shot tasks: what tasks.yaml says of each, which sets of them lie in a data folder, and their items."""

import json
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from babylm.config import UserError
from babylm.run_folder import folder_written_whole, is_whole

TASKS_FILE = Path(__file__).with_name("tasks.yaml")


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
    gold: str | None = None
    uid: str = ""
    groups: dict[str, str] = {}
    group_default: str | None = None
    average: str = Field("uids", pattern="^(uids|splits)$")
    score: str = Field("accuracy", pattern="^(accuracy|spearman|reading)$")
    normalise: str | None = Field(None, pattern="^length$")
    chance: float
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

    @property
    def names(self) -> tuple[str, ...]:
        """What the official predictions call the candidates: the scored text, or the whole where that is the same for all."""
        texts = tuple(text.removeprefix(" ") if prefix else text for prefix, text in zip(self.prefixes, self.texts, strict=True))
        return texts if len(set(texts)) > 1 else tuple(prefix + text for prefix, text in zip(self.prefixes, self.texts, strict=True))


def load_tasks(path: Path = TASKS_FILE) -> dict[str, Task]:
    """{name: Task} of a file like tasks.yaml. UserError names the file, the task and the key."""
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise UserError(f"{path}: not a mapping of task names to their descriptions")
        return {name: Task.model_validate({**entry, "name": name}) for name, entry in entries.items()}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def choose_tasks(names: list[str] | None, tasks: dict[str, Task]) -> list[Task]:
    """The tasks of these names, or all. UserError on a name that is none."""
    unknown = sorted(set(names or ()) - set(tasks))
    if unknown:
        raise UserError(f"no such task: {', '.join(unknown)}; tasks.yaml has {', '.join(tasks)}")
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
    folder that an archive holds."""
    inner = [path for path in data.iterdir() if path.is_dir()]
    roots = [data, *inner] if len(inner) == 1 else [data]
    places = [place for root in roots for place in (root, root / "full_eval", root / "fast_eval")]
    return [place / name for name in task.sets for place in places if (place / name).is_dir()]


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file. UserError names file and line of one that is cut short or not an object."""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number}: not JSON (cut short?): {line[:60]!r}; fetch the file again") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object: {line[:60]!r}")
        yield number, row


def read_items(task: Task, folder: Path) -> list[Item]:
    """All items of one set, in the files' order.

    Raises:
        UserError: no JSONL file, no row, a row that lacks a field (file and line are named), or fewer than two candidates.
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
            if len(item.texts) < 2:
                raise UserError(f"{file}, line {number}: {task.title} needs at least two candidates to choose from, not {len(item.texts)}")
            items.append(item)
    if not items:
        why = "its files are empty" if files else "no *.jsonl"
        raise UserError(f"{folder} holds no items of {task.title} ({why}); get it from: {task.source}")
    return items


def _item(task: Task, file: str, row: dict[str, Any], counts: dict[str, int]) -> Item:
    fields = {"file": file, **row}
    if task.name == "blimp" and "UID" not in row:
        fields["UID"] = file
    if task.options is not None:
        options = row[task.options]
        texts = tuple(options.split(task.separator) if task.separator else options)
        prefixes = (task.prefix.format_map(fields),) * len(texts)
    else:
        prefixes = tuple(candidate.prefix.format_map(fields) for candidate in task.candidates)
        texts = tuple(candidate.text.format_map(fields) for candidate in task.candidates)
    uid = task.uid.format_map(fields)
    index = counts[uid] = counts.get(uid, -1) + 1
    groups = {}
    for heading, name in task.groups.items():
        value = row.get(name, task.group_default)
        if value is not None:
            groups[heading] = {"syntax_semantics": "syntax/semantics"}.get(value, value)  # BLiMP spells it both ways
    return Item(uid, f"{uid}_{index}", prefixes, texts, None if task.score == "spearman" else int(row[task.gold]) if task.gold else 0,
                float(row["ratio"]) if task.score == "spearman" else None, groups, file)
