"""What a config is made of, and how a file becomes a checked one: the building blocks of babylm/config.py, which holds the keys.

One YAML is one named, complete run. `load` reads it, applies command-line overrides (`training.lr=1e-4`), validates
everything at once and either returns the stage's config or exits with all mistakes listed, each with its full path.

Keys are marked as *identity* or not. A run folder can be resumed only by a config whose identity keys are equal:
those that define the model, the data, the loss and the optimisation. Where a file lies, how often a line is logged
and on how many processes the batch is spread are not part of what a run *is*.
"""

import argparse
import difflib
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)


class UserError(Exception):
    """Something a user can mend in a file or a command: shown without a traceback, before compute is spent."""


# ---- The building blocks of the schema ------------------------------------------------------------------------------


def key(default: Any, meaning: str, *, identity: bool = True, **limits: Any) -> Any:
    """A config key: `default` (`...` = required), what it means, whether it is part of a run's identity, its range."""
    return Field(default, description=meaning, json_schema_extra={"identity": identity}, **limits)


def parse_word_count(value: Any) -> Any:
    """'100K' -> 100_000, '1M' -> 1_000_000, '2.5M' -> 2_500_000; anything else passes through to the type check."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB])", value.strip(), re.IGNORECASE)):
        return round(float(match[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[match[2].upper()])
    return value


WordCount = Annotated[int, BeforeValidator(parse_word_count), Field(ge=1)]


def milestone_name(words: int) -> str:
    """1_000_000 -> chck_1M, 100_000 -> chck_100K, 1_500_000 -> chck_1500K: no dots, because evaluation cuts names there."""
    size, letter = next((size, letter) for size, letter in ((1_000_000, "M"), (1000, "K"), (1, "")) if words % size == 0)
    return f"chck_{words // size}{letter}"


def milestone_words(name: str) -> int | None:
    """chck_100K -> 100_000, chck_1M -> 1_000_000; None for main, untrained and names that are no milestone."""
    match = re.fullmatch(r"chck_(\d+)([KM]?)", name)
    return int(match[1]) * {"": 1, "K": 1000, "M": 1_000_000}[match[2]] if match else None


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, numbers may be written `3e-4` (YAML alone reads that as text)."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, validate_default=False, protected_namespaces=(),
                              allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def refuse_empty(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("the section is empty: give it keys, or remove its heading to take the defaults")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def refuse_bool_as_number(cls, value: Any, info: Any) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError(f"got {str(value).lower()}, which is not a valid value here")
        return value


class StageConfig(Section):
    """Base of what `load` makes for a stage. How it was called (--dry_run) goes with it, but is no key: neither identity nor recorded."""

    _dry_run: bool = PrivateAttr(False)

    @property
    def dry_run(self) -> bool:
        """Whether everything is to be checked and told, and nothing written."""
        return self._dry_run


# ---- Numbers that change over training ------------------------------------------------------------------------------


class Schedule(Section):
    """A number that may change over training: in YAML a plain number, or {start: 4, end: 1, shape: cosine, until: 0.5}."""

    start: float = key(..., "value at the first step")
    end: float = key(..., "value from `until` on")
    shape: Literal["linear", "cosine"] = key("linear", "how it gets there")
    until: float = key(1.0, "share of the run's steps after which it stays at `end`", gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def plain_number(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{value!r} is no number: write one, or a schedule such as {{start: 4, end: 1, shape: cosine}}") from None
        return {"start": value, "end": value} if isinstance(value, int | float) else value

    @model_serializer(mode="wrap")
    def as_written(self, write: Any) -> Any:
        return self.start if self.constant else write(self)

    @property
    def constant(self) -> bool:
        """Whether it is one number throughout."""
        return self.start == self.end

    @property
    def largest(self) -> float:
        """The largest value it takes (both shapes are monotonic)."""
        return max(self.start, self.end)

    def at(self, progress: float) -> float:
        """The value at `progress` in 0 ... 1, the share of the run's steps that is done."""
        done = min(progress / self.until, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def __str__(self) -> str:
        return f"{self.start:g}" if self.constant else f"({self.start:g} -> {self.end:g})"


def _from_zero(value: Schedule) -> Schedule:
    if min(value.start, value.end) < 0:
        raise ValueError("must not be negative")
    return value


def _above_zero(value: Schedule) -> Schedule:
    if min(value.start, value.end) <= 0:
        raise ValueError("must be greater than 0")
    return value


Weight = Annotated[Schedule, AfterValidator(_from_zero)]
Temperature = Annotated[Schedule, AfterValidator(_above_zero)]


def fixed(value: float) -> Schedule:
    """A Schedule that is one number throughout."""
    return Schedule(start=value, end=value)


# ---- From files and flags to a config -------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """yaml.SafeLoader, but a key that stands twice is an error: PyYAML alone silently keeps the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):  # {{ name }}: a template that nobody filled in
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key_node.value in seen:
                raise UserError(f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}: key "
                                  f"{key_node.value!r} stands twice in the same section")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict:
    """The mapping in a YAML file. UserError names file and line of a syntax error, a missing or an empty file."""
    try:
        with open(path, encoding="utf-8") as stream:
            values = yaml.load(stream, Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(values).__name__}; is the file empty?")
    return values


def apply_override(values: dict, override: str) -> None:
    """Set one `a.b=value` (value in YAML syntax) in a nested mapping, in place; `a.0.b` reaches into the first entry of a list."""
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise UserError(f"override {override!r}: write it as key=value, for example training.lr=1e-4")
    *sections, leaf = path.split(".")
    for section in sections:
        values = values[_entry(values, section, override)] if isinstance(values, list) else values.setdefault(section, {})
        if not isinstance(values, dict | list):
            raise UserError(f"override {override!r}: {section} is not a section")
    try:
        values[_entry(values, leaf, override) if isinstance(values, list) else leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {text!r} is not a YAML value") from None


def _entry(values: list, part: str, override: str) -> int:
    if not re.fullmatch(r"[0-9]+", part) or int(part) >= len(values):
        raise UserError(f"override {override!r}: {part!r} is no entry of the list, which has {len(values)}, numbered from 0")
    return int(part)


def check(schema: type[Section], values: dict, source: str) -> Any:
    """`values` as a validated `schema`; UserError lists every mistake with its path, and the nearest known key."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {error.error_count()} mistake(s) in the config"]
        lines += [f"  {_explain(schema, problem)}" for problem in error.errors()]
        raise UserError("\n".join(lines)) from None


def _explain(schema: type[Section], problem: dict) -> str:
    where, sections = _place(schema, [part for part in problem["loc"] if not str(part).startswith("function-")])
    path = ".".join(map(str, where))
    if problem["type"] == "extra_forbidden":
        (section, *_), unknown = sections, str(where[-1])
        near = difflib.get_close_matches(unknown, section.model_fields, n=1, cutoff=0.5)
        siblings = [kind for kind in _alternatives(schema, section) if unknown in kind.model_fields]
        elsewhere = [name for name in _key_paths(schema) if name.split(".")[-1] == unknown]
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(section.model_fields)}"
        if siblings:
            hint = f"{_tag(section)} has none of this name, but {' and '.join(map(_tag, siblings))} ha{'s' if len(siblings) == 1 else 've'}"
        elif elsewhere:
            hint = f"did you mean {elsewhere[0]}?"
        return f"{path}: unknown key; {hint}"
    given = problem["input"]
    if problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
        if not isinstance(given, dict):
            return f"{path}: expected a section with the key kind (given: {given!r})"
        kinds = [_tag(kind) for kind in sections]
        near = difflib.get_close_matches(str(given.get("kind")), kinds, n=1, cutoff=0.5)
        return (f"{path}.kind: " + (f"{given['kind']!r} is unknown; " if "kind" in given else "Field required; ")
                + (f"did you mean {near[0]}?" if near else f"one of {', '.join(kinds)}"))
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, dict) or problem["type"] in ("missing", "value_error") else f" (given: {given!r})"
    return f"{path or 'config'}: {message}{shown}"


def _place(schema: type[Section], location: list) -> tuple[list, list[type[Section]]]:
    """(location as the user writes it, the section in which it ends; several where only an unknown `kind` would tell which)."""
    where, sections = [], [schema]
    for part in location:
        if len(sections) > 1 and isinstance(part, str):  # pydantic names the kind that was chosen, which stands in no path
            sections = [section for section in sections if _tag(section) == part]
            continue
        where.append(part)
        if len(sections) == 1 and part in sections[0].model_fields:
            sections = _sections_of(sections[0].model_fields[part].annotation)
    return where, sections


def _tag(section: type[Section]) -> str:
    """What `kind` says of a section that is one of several."""
    return get_args(section.model_fields["kind"].annotation)[0]


def _alternatives(schema: type[Section], section: type[Section]) -> list[type[Section]]:
    """The other sections that could have stood in the place of `section`; none where its key holds only that one."""
    for field in schema.model_fields.values():
        inner = _sections_of(field.annotation)
        if section in inner:
            return [kind for kind in inner if kind is not section]
        for other in inner:
            if found := _alternatives(other, section):
                return found
    return []


def _sections_of(annotation: Any) -> list[type[Section]]:
    """The Sections that a key holds, also where it is optional, a list of them, or one of several kinds; none for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_of(part)]


def _key_paths(schema: type[Section], prefix: str = "") -> list[str]:
    paths = []
    for name, field in schema.model_fields.items():
        sections = [section for section in _sections_of(field.annotation) if section is not Schedule]
        paths += [path for section in sections for path in _key_paths(section, f"{prefix}{name}.")] or [prefix + name]
    return list(dict.fromkeys(paths))


def identity(config: Section) -> dict[str, Any]:
    """The keys that make a run the run it is, as {"training.lr": 0.001, ...}; compared before a run is resumed."""
    keys: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, Schedule):
            keys[name] = value.model_dump()
        elif isinstance(value, Section):
            keys |= {f"{name}.{inner}": held for inner, held in identity(value).items()}
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            keys |= {f"{name}.{i}.{inner}": held for i, entry in enumerate(value) for inner, held in identity(entry).items()}
        elif field.json_schema_extra["identity"]:
            keys[name] = value
    return json.loads(json.dumps(keys))  # the same types as after a round trip through run/identity.json


def default_of(schema: type[Section], path: str) -> Any:
    """The default of a key such as training.beta2, as `identity` writes it; `...` where it has none, or not one alone."""
    sections, defaults = [schema], []
    for part in path.split("."):
        if not part.isdigit():  # the place of an entry in a list
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [inner for field in fields for inner in _sections_of(field.annotation)]
            defaults = [... if field.is_required() else field.get_default(call_default_factory=True) for field in fields]
    if len(defaults) != 1 or defaults[0] is ...:
        return ...
    return json.loads(json.dumps(defaults[0].model_dump() if isinstance(defaults[0], Section) else defaults[0]))


def differing(theirs: dict[str, Any], mine: dict[str, Any], schema: type[Section]) -> list[str]:
    """Names of the settings in which a recorded identity differs from another.

    A key that `theirs` lacks because it was made before there was one does not differ, where `mine` has its default: that is told by
    other keys of the same section, which a section that was left out altogether does not have.
    """
    def added(name: str) -> bool:
        section = name.rpartition(".")[0]
        return (name not in theirs and any(other.rpartition(".")[0] == section for other in theirs)
                and mine[name] == default_of(schema, name))

    return [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name) and not added(name)]


def content_hash(values: Any) -> str:
    """A short hash of JSON-able values, for names and keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


DRY_RUN = {"--dry_run": {"action": "store_true", "help": "check everything, print sizes and an estimate of the time; write nothing"}}


def load(schema: type[Section] | Callable[[dict], type[Section]], default_path: str, description: str, arguments: list[str] | None = None,
         flags: dict[str, dict] | None = None) -> tuple[Any, argparse.Namespace]:
    """Read a stage's command line and YAML.

    Args:
        schema: the stage's config class, or a function that picks it by what the YAML says.
        default_path: YAML used without --config.
        description: the script's docstring, shown by --help.
        arguments: command line without the program name; default: sys.argv[1:].
        flags: further options, {"--use_lora": {"action": "store_true", "key": "lora.mode", "value": "lora"}, ...}; a
            flag with `key` becomes an override of that config key (with `value`, or with what the user gave).
            DRY_RUN among them makes `config.dry_run` what the user says.

    Returns:
        (config, parsed arguments).

    Raises:
        UserError: lists every mistake in the file and the overrides.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=default_path, help=f"YAML file (default: {default_path})")
    targets = {}
    for flag, options in (flags or {}).items():
        options = dict(options)
        targets[flag.lstrip("-")] = (options.pop("key", None), options.pop("value", None))
        parser.add_argument(flag, **options)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the YAML, e.g. training.lr=1e-4 seed=2")
    args = parser.parse_intermixed_args(arguments)

    values = read_yaml(args.config)
    for name, (path, value) in targets.items():
        given = getattr(args, name)
        if path and given:
            apply_override(values, f"{path}={json.dumps(value if value is not None else given)}")
    for override in args.overrides:
        apply_override(values, override)
    config = check(schema if isinstance(schema, type) else schema(values), values, str(args.config))
    config._dry_run = getattr(args, "dry_run", False)
    return config, args
