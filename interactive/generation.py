"""Text from a saved model, token by token: find run folders and milestones, load them safely, sample, and say what comes next.

No page and no terminal here: `interactive/chat.py` shows what this module makes. Nothing here needs gradio.

Which code runs: architectures that transformers knows, and MoE-P, run the code that is installed here, whatever lies beside
their weights. Any other modelling code is executed only from a run folder of this project (one with run/record.json, inside
the models folder), only from files that lie right in it, and only if all that Python could import from it is, byte for byte,
a file of this project, or if --trust_remote_code was given. Weights are read from safetensors alone; a pickle is never opened.
"""

import importlib.machinery
import importlib.util
import json
import math
import os
import re
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jinja2 import TemplateError
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Cache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from babylm import models
from babylm.run_folder import is_whole
from babylm.schema import Section, UserError, milestone_words

MAIN = "main"  # the final model at a run folder's root, and a hub repository's first revision
MAX_CHARACTERS = 200_000  # of a typed text; more than any model here has positions for
CACHED_MODELS = 3
CODE_RULE = ("GPT-2, Llama, the other architectures that transformers knows, and MoE-P run the code that is installed here. Other "
             "modelling code runs only from a run folder of this project, and only if it equals this project's own file")
ROOT = Path(__file__).resolve().parent.parent
IMPORTABLE = (*importlib.machinery.all_suffixes(), ".pyw", ".pyd")  # .py, .pyc, .so, ...
PLAIN_CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*", re.ASCII)  # module.Class: no folder, no other repository
PLAIN_WEIGHTS = re.compile(r"[\w.-]+\.safetensors", re.ASCII)


# ---- Settings -------------------------------------------------------------------------------------------------------


class Settings(Section):
    """How to draw the next token. `of` checks what came from a page or a terminal."""

    temperature: float = Field(0.8, ge=0, le=5)  # 0: always the likeliest token
    top_k: int = Field(0, ge=0, le=1_000_000)  # 0: of all tokens
    top_p: float = Field(0.95, gt=0, le=1)  # 1: of all tokens
    repetition_penalty: float = Field(1.0, ge=1, le=5)  # 1: none (Keskar et al. 2019)
    new_tokens: int = Field(80, ge=1, le=4096)
    seed: int = Field(1, ge=0, le=2**31 - 1)

    @classmethod
    def of(cls, **values: Any) -> "Settings":
        """Checked settings. UserError lists every value that is out of range or no number."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise UserError("; ".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}, not {problem['input']!r}"[:200]
                                      for problem in error.errors())) from error

    def processors(self) -> LogitsProcessorList:
        """What `generate` applies to the logits [1, V] for these settings, in its order."""
        found = LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature:
            if self.temperature != 1:
                found.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                found.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                found.append(TopPLogitsWarper(self.top_p))
        return found


# ---- Where models lie -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageModel:
    """A model that is ready to write, with its tokenizer.

    Attributes:
        positions: the most tokens that it can read at once.
        start: ids that its tokenizer puts before a text.
        ends: ids after which it says no more.
        notes: what a reader should know of how it was loaded.
    """

    run: str
    milestone: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    positions: int
    start: tuple[int, ...]
    ends: frozenset[int]
    notes: tuple[str, ...] = ()


class Models(Protocol):
    """A place with models: a folder of runs, or one repository of the hub."""

    title: str
    code_rule: str

    def runs(self) -> list[str]:
        """Names of the runs, as they are now."""

    def milestones(self, run: str) -> list[str]:
        """`main` if there is a final model, then chck_*, by words. UserError if there is no such run."""

    def has_chat_template(self, run: str, milestone: str) -> bool:
        """Whether its tokenizer brings a chat template; read without loading the model."""

    def load(self, run: str, milestone: str) -> LanguageModel:
        """The model, from memory where it was used lately. UserError says why it cannot be loaded."""


class _Kept:
    """The models used last, at most `capacity` of them; a folder whose files have changed since is loaded anew."""

    def __init__(self, capacity: int = CACHED_MODELS):
        self.capacity, self.loaded, self.lock = capacity, OrderedDict(), threading.Lock()

    def get(self, folder: Path, make: Callable[[], LanguageModel]) -> LanguageModel:
        stats = {file.name: file.stat() for file in folder.iterdir() if file.is_file()}
        key = (folder, tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items())))
        with self.lock:  # two that ask for one model load it once
            if key not in self.loaded:
                for old in [other for other in self.loaded if other[0] == folder]:
                    del self.loaded[old]
                while len(self.loaded) >= self.capacity:
                    self.loaded.popitem(last=False)
                self.loaded[key] = make()
            self.loaded.move_to_end(key)
            return self.loaded[key]


class ModelsFolder:
    """The run folders in a models folder: <name>, or one level deeper (<group>/<name>).

    Only names that a fresh look into the folder finds are loaded, so that no path, however written, leads outside.

    Args:
        root: the models folder.
        trust_remote_code: run modelling code that is not this project's, from run folders of this project.
        only: paths of run folders, to offer these alone, in this order.

    Raises:
        UserError: no such folder, nothing to load in it, or a path of `only` that is no run in it.
    """

    def __init__(self, root: str | Path = "models", trust_remote_code: bool = False, only: Sequence[str | Path] = ()):
        self.root = Path(root).resolve()
        self.title = self.root.name
        self.trust_remote_code, self.only, self._kept = trust_remote_code, [], _Kept()
        self.code_rule = CODE_RULE + (
            ". --trust_remote_code is on: code of any run folder of this project runs." if trust_remote_code
            else " (--trust_remote_code lifts the last condition).")
        if not self.root.is_dir():
            raise UserError(f"there is no models folder {root}: train a model first (bash demo.sh makes some in minutes), or give --models")
        for path in only:
            place = Path(path).resolve()
            if self.root not in place.parents:
                raise UserError(f"{path} is not inside the models folder {root}: give --models the folder it lies in")
            name = place.relative_to(self.root).as_posix()
            if name not in self._found():
                raise UserError(f"{path} is no run folder with a model (config.json and safetensors, or chck_*); "
                                f"in {root} there are: {', '.join(self._found()) or 'none'}")
            self.only.append(name)
        if not self.runs():
            raise UserError(f"no run folders with a model in {root}: train one first (bash demo.sh makes some in minutes), or give "
                            "--models")

    def runs(self) -> list[str]:
        return [name for name in self.only if name in self._found()] if self.only else self._found()

    def _found(self) -> list[str]:
        found = []
        for folder in self._folders(self.root):
            if self._milestones(folder):
                found.append(folder.name)
            else:
                found += [f"{folder.name}/{inner.name}" for inner in self._folders(folder) if self._milestones(inner)]
        return found

    def _folders(self, folder: Path) -> list[Path]:
        return [inner for inner in _listing(folder) if not inner.name.startswith(".") and inner.is_dir() and self._inside(inner)]

    def _inside(self, path: Path) -> bool:
        return self.root in path.resolve().parents

    def _milestones(self, folder: Path) -> list[str]:
        named = [inner.name for inner in self._folders(folder) if milestone_words(inner.name) is not None and is_whole(inner)]
        return [MAIN] * _holds_model(folder) + sorted(named, key=milestone_words)

    def milestones(self, run: str) -> list[str]:
        found = self._milestones(self.root / run) if run in self.runs() else []
        if not found:
            raise UserError(f"there is no run {str(run)[:80]!r} in {self.title} (any more): choose one of the list")
        return found

    def _place(self, run: str, milestone: str) -> Path:
        if milestone not in self.milestones(run):
            raise UserError(f"{run} has no milestone {str(milestone)[:80]!r} (any more): choose one of the list")
        folder = self.root / run if milestone == MAIN else self.root / run / milestone
        if not (files := _listing(folder)):
            raise UserError(f"{run} {milestone} went away just now: choose another of the list")
        if outside := self._link_outside([folder, *files]):
            raise UserError(f"{run} {milestone}: {outside} is a link to outside the models folder, which is never followed")
        return folder

    def _link_outside(self, files: Sequence[Path]) -> str | None:
        return next((file.name for file in files if not self._inside(file)), None)

    def has_chat_template(self, run: str, milestone: str) -> bool:
        return _has_chat_template(self._place(run, milestone))

    def load(self, run: str, milestone: str) -> LanguageModel:
        folder = self._place(run, milestone)
        code = None
        if (self.root / run / "run" / "record.json").is_file():
            code = "any" if self.trust_remote_code else "ours"
        try:
            return self._kept.get(folder, lambda: _load(folder, run, milestone, code, self._adapter_base))
        except UserError as error:  # where the folder lies is nobody's business on a shared page
            raise UserError(str(error).replace(f"{self.root}/", "").replace(str(self.root), self.title)) from error

    def _adapter_base(self, path: str) -> str:
        if Path(path).exists() and not self._inside(Path(path)):
            raise UserError(f"its adapter's base {Path(path).name} lies outside the models folder: merge the adapter, or give --models "
                            "a folder that holds both")
        if Path(path).is_dir() and (outside := self._link_outside(_listing(Path(path)))):
            raise UserError(f"its adapter's base {Path(path).name}: {outside} is a link to outside the models folder, which is never "
                            "followed")
        return path


class HubModels:
    """One repository of the Hugging Face hub, whose revisions chck_* are its milestones. No code of it ever runs.

    Args:
        repo: org/name.
        revision: what is offered first.
        endpoint: address of the hub, if it is not the usual one.

    Raises:
        UserError: no such repository, no network, or not allowed.
    """

    code_rule = "GPT-2, Llama, the other architectures that transformers knows, and MoE-P run the code that is installed here; " \
                "code in the repository never runs."

    def __init__(self, repo: str, revision: str = MAIN, endpoint: str | None = None):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        self.repo, self.title, self.endpoint, self._kept, self._folders = repo, repo, endpoint, _Kept(), {}
        try:
            refs = HfApi(endpoint=endpoint).list_repo_refs(repo)
        except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
            raise UserError(f"cannot list the revisions of {repo} on the hub: {_line(error)}; check the name, the network and, for a "
                            "private repository, the login (hf auth login)") from error
        named = {ref.name for ref in [*refs.branches, *refs.tags] if milestone_words(ref.name) is not None}
        first = [] if revision in named else [revision]
        self._revisions = first + sorted(named, key=milestone_words)
        if revision in named:
            self._revisions.remove(revision)
            self._revisions.insert(0, revision)

    def runs(self) -> list[str]:
        return [self.repo]

    def milestones(self, run: str) -> list[str]:
        if run != self.repo:
            raise UserError(f"this page shows {self.repo} alone")
        return list(self._revisions)

    def _download(self, run: str, milestone: str, *patterns: str) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        if milestone not in self.milestones(run):
            raise UserError(f"{self.repo} has no revision {str(milestone)[:80]!r}: choose one of the list")
        if (milestone, patterns) not in self._folders:
            try:
                self._folders[milestone, patterns] = Path(snapshot_download(self.repo, revision=milestone, endpoint=self.endpoint,
                                                                            allow_patterns=list(patterns)))
            except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
                raise UserError(f"cannot download {self.repo} at {milestone}: {_line(error)}") from error
        return self._folders[milestone, patterns]

    def has_chat_template(self, run: str, milestone: str) -> bool:
        return _has_chat_template(self._download(run, milestone, "tokenizer_config.json", "chat_template.jinja"))

    def load(self, run: str, milestone: str) -> LanguageModel:
        # Of the repository only what is data: no code, no pickles.
        folder = self._download(run, milestone, "*.json", "*.safetensors", "*.jinja", "merges.txt")
        try:
            return self._kept.get(folder, lambda: _load(folder, run, milestone, None, self._adapter_base))
        except UserError as error:
            raise UserError(str(error).replace(str(folder), f"{self.repo}@{milestone}")) from error

    def _adapter_base(self, path: str) -> str:
        if os.path.lexists(path):  # a repository must not choose among the folders of whoever reads it
            raise UserError("its adapter's base is a folder of this computer, not a repository of the hub: such a base is never loaded")
        return path


def _listing(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing where it went away meanwhile, as a run that is moved aside does."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _holds_model(folder: Path) -> bool:
    names = {path.name for path in _listing(folder)}
    return "adapter_model.safetensors" in names or ("config.json" in names and any(name.endswith(".safetensors") for name in names))


def _has_chat_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and bool(_read_json(settings, "tokenizer settings").get("chat_template")))


# ---- Loading --------------------------------------------------------------------------------------------------------


def _load(folder: Path, run: str, milestone: str, code: str | None, adapter_base: Callable[[str], str]) -> LanguageModel:
    """Load a folder that was found allowed.

    Args:
        code: modelling code that may be executed: None (no), "ours" (what equals this project's) or "any" (of this folder).
        adapter_base: checks where an adapter's base lies and returns it.
    """
    shown = f"{run} ({milestone})"
    notes = []
    adapter = (folder / "adapter_config.json").is_file()
    allowed = not adapter and _check_code(folder, shown, code, notes)
    _check_tokenizer(folder, shown)
    try:
        tokenizer = models.load_tokenizer(folder)
    except (TypeError, KeyError, AttributeError) as error:  # a config that garbles a key
        raise UserError(f"no tokenizer in {shown}: {_line(error)}") from error
    model = _load_adapter(folder, shown, adapter_base) if adapter else _load_weights(str(folder), shown, allowed)
    rows = model.get_output_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(f"{shown}: the tokenizer has {len(tokenizer):,} entries but the model predicts {rows:,}: one of them was changed "
                        "after training; copy the tokenizer that the model was trained with")
    inside, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    start = whole[:next(place for place in range(len(whole)) if whole[place:place + len(inside)] == inside)]
    ends = {tokenizer.eos_token_id}
    given = model.generation_config.eos_token_id if model.generation_config else None
    ends |= set(given) if isinstance(given, list) else {given}
    positions = getattr(model.config, "max_position_embeddings", None) or min(tokenizer.model_max_length, 10**6)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return LanguageModel(run, milestone, model, tokenizer, positions, tuple(start), frozenset(ends - {None}), tuple(notes))


def _check_code(folder: Path, shown: str, code: str | None, notes: list[str]) -> bool:
    """Whether modelling code in `folder` has to be and may be executed (see the top of this module). UserError if it may not."""
    config = _read_json(folder / "config.json", "config")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        changed = [file.name for file in sorted(folder.glob("*.py")) if not _is_ours(file)]
        if changed and config.get("auto_map"):
            notes.append(f"{', '.join(changed)} in this folder differs from this project's and was not run: the project's code was.")
        return False
    what = f"{shown} is a {kind!r} model, which needs modelling code of its own"
    # What a config names is read by transformers from wherever the name leads, so the names are checked before the files.
    if "configuration_files" in config:
        raise UserError(f"{what}, and its config names other config files, which are never read with such code")
    modules = {file.stem for file in folder.glob("*.py")}
    for name in _named_code(folder):
        if not PLAIN_CLASS.fullmatch(name) or name.split(".")[0] not in modules:
            raise UserError(f"{what}, and names {name!r}, which is no class in a file right in its folder: code of another repository or "
                            "folder never runs here")
    if code is None:
        raise UserError(f"{what}; such code runs only from run folders of this project (with run/record.json)")
    files, links = _importable(folder)
    if links:
        raise UserError(f"{what}, and {links[0]} in its folder is a link: code never runs through links")
    changed = [file.relative_to(folder).as_posix() for file in files if file.parent != folder or not _is_ours(file)]
    if not modules or (changed and code != "any"):
        raise UserError(f"{what}; {', '.join(changed) or 'the file'} is not this project's: start with --trust_remote_code if you trust it")
    return True


def _is_ours(file: Path) -> bool:
    """Whether a file equals, byte for byte, the file of that name at the top of this project."""
    return (ROOT / file.name).is_file() and (ROOT / file.name).read_bytes() == file.read_bytes()


def _named_code(folder: Path) -> list[str]:
    """Every class that an auto_map names, at any depth of any config beside the weights (model, generation, tokenizer, processor)."""
    def leaves(value: Any, inside: bool) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, inside or key == "auto_map")
        elif isinstance(value, list):
            for inner in value:
                yield from leaves(inner, inside)
        elif inside and value is not None:  # a tokenizer without a slow class has null in its place
            yield str(value)

    configs = [file for file in _listing(folder) if file.name.lower().endswith(".json") and "config" in file.name.lower()]
    return [name for file in configs for name in leaves(_read_json(file, "config"), False)]


def _importable(folder: Path) -> tuple[list[Path], list[str]]:
    """(files that Python could import from a folder and the folders in it, names of links among them); milestones, resume states and
    run/ are left out, since a load of this folder reads none of them."""
    files, links = [], []
    for place, folders, names in os.walk(folder):
        if Path(place) == folder:
            folders[:] = [name for name in folders if name != "run" and not name.startswith(("chck_", "checkpoint-"))]
        code = [name for name in names if name.lower().endswith(IMPORTABLE)]
        links += [name for name in [*folders, *code] if (Path(place) / name).is_symlink()]
        files += [Path(place) / name for name in code]
    return sorted(files), sorted(links)


def _check_tokenizer(folder: Path, shown: str) -> None:
    """UserError if the tokenizer's class is none: transformers takes the name of any class it has, models and pipelines included."""
    for name in ("tokenizer_config.json", "config.json"):
        named = _read_json(folder / name, "config").get("tokenizer_class") if (folder / name).is_file() else None
        if named is None:
            continue
        try:
            found = tokenizer_class_from_name(named) if isinstance(named, str) else object
        except (ImportError, RuntimeError):  # a class whose packages are not installed
            found = object
        if found is not None and not (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
            raise UserError(f"{shown}: {name} names {str(named)[:80]!r} as its tokenizer's class, which is no tokenizer that can be used "
                            "here")


def _check_weights(folder: Path, shown: str) -> None:
    """UserError if a file says that weights are to be read from anything but safetensors files right in this folder."""
    named = []
    for file in folder.glob("*.safetensors.index.json"):
        shards = _read_json(file, "index of the weights").get("weight_map")
        named += shards.values() if isinstance(shards, dict) else [shards]
    if (given := _read_json(folder / "config.json", "config").get("transformers_weights")) is not None:
        named.append(str(given).removesuffix(".index.json"))
    if strange := [name for name in named if not PLAIN_WEIGHTS.fullmatch(str(name))]:
        raise UserError(f"{shown}: its weights are to be read from {str(strange[0])[:80]!r}; only safetensors files right in its folder "
                        "are read")


def _load_weights(path: str, shown: str, allowed: bool) -> PreTrainedModel:
    """The model of a folder or of the hub's local cache, in fp32. UserError for damaged or missing weights."""
    if Path(path).is_dir():
        _check_weights(Path(path), shown)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=allowed, use_safetensors=True,
                                                             local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        # What transformers raises for damaged files, for a config that lacks or garbles a key, and for shapes that do not fit.
        raise UserError(f"cannot load {shown}: its files are damaged or incomplete ({type(error).__name__}: {_line(error)}). Choose "
                        "another milestone, or make this one again") from error
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers and goes on
        raise UserError(f"cannot load {shown}: the weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


def _load_adapter(folder: Path, shown: str, adapter_base: Callable[[str], str]) -> PreTrainedModel:
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{shown} is an adapter, and peft is not installed: pip install -r requirements.txt")
    from peft import PeftModel

    settings = _read_json(folder / "adapter_config.json", "adapter settings")
    if settings.get("peft_type") != "LORA" or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{shown}: only LoRA adapters in safetensors are loaded here")
    base = _cached(adapter_base(str(settings.get("base_model_name_or_path"))))
    if (Path(base) / "adapter_config.json").is_file():  # transformers would go on to the base that it names, wherever that is
        raise UserError(f"the base of {shown} is an adapter itself: merge it first")
    base = _load_weights(base, f"the base of {shown}", False)
    try:
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the adapter {shown}: {_line(error)}") from error


def _cached(name: str) -> str:
    """The folder of a hub model in the local cache, so that it is checked as a folder is; the name itself where it is not there."""
    if Path(name).exists():
        return name
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return name
    return str(Path(found).parent) if isinstance(found, str) else name


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the {what} {path}: {_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"the {what} {path} is no JSON object")
    return found


def _line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])[:300] or type(error).__name__


# ---- From a text to ids ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What a model reads: ids, the text as it is shown, and what was done to it."""

    ids: list[int]
    text: str
    notes: list[str] = field(default_factory=list)


BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn the direction of writing: a text then reads other than it is


def visible(text: str) -> str:
    """Text that a page or a terminal shows as it is: control characters become their pictures (ESC: ␛), so that none acts."""
    return "".join(character if character in "\n\t" else chr(0x2400 + ord(character)) if ord(character) < 32 else
                   "␡" if ord(character) == 127 else "�" if _acts(character) else character for character in text)


def _acts(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in BIDI


def clean(text: str) -> tuple[str, list[str]]:
    """A typed text without what is no text, and what was taken away: control characters other than newline and tab, halves of
    surrogate pairs, marks that turn the direction of writing, and all but the last 200,000 characters."""
    notes = []
    if len(text) > MAX_CHARACTERS:
        notes.append(f"The text has {len(text):,} characters: the first {len(text) - MAX_CHARACTERS:,} were cut off.")
        text = text[-MAX_CHARACTERS:]
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    kept = "".join(character for character in text if character in "\n\t" or not _acts(character))
    if len(kept) < len(text):
        notes.append(f"{_count(len(text) - len(kept), 'control character')} removed.")
    return kept, notes


def text_prompt(model: LanguageModel, text: str, new_tokens: int) -> Prompt:
    """A text to go on from: the tokenizer's start token, then the text, cut from the left to fit the model's positions.

    Special-token strings such as </s> are read as plain characters, and nothing that the tokenizer would add at the end is kept:
    after an end token, a model begins something new.

    Raises:
        UserError: the text is empty.
    """
    text, notes = clean(text)
    if not text.strip():
        raise UserError("There is no text yet: type the beginning of one, and the model goes on from there.")
    special = [name for name in model.tokenizer.all_special_tokens if name in text]
    if special:
        notes.append(f"{', '.join(special)}: read as plain characters, not as a special token.")
    if text[-1] == " ":
        notes.append("The text ends with a space. Most tokens begin with theirs: without it, the text goes on more naturally.")
    ids = model.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids  # it will be cut
    return _fitted(model, list(model.start), ids, text, new_tokens, notes)


def chat_prompt(model: LanguageModel, messages: Sequence[dict[str, str]], new_tokens: int) -> Prompt:
    """A conversation in the tokenizer's chat template; the oldest turns are left out until it fits the model's positions.

    Args:
        messages: {"role": "user" | "assistant", "content": text}, the user's last.

    Raises:
        UserError: no template, an empty message, or one that the template refuses.
    """
    if not model.tokenizer.chat_template:
        raise UserError(f"{model.run} ({model.milestone}) has no chat template: it is a base model, which continues texts. Choose "
                        "“Continue a text”, or a model that was tuned to chat.")
    said, notes = [], []
    for message in messages:
        text, found = clean(message["content"])
        without = _without_special_tokens(text, model.tokenizer)
        if message is messages[-1]:
            if not text.strip():
                raise UserError("There is no message yet: type one first.")
            notes += found + (["Special-token strings in your message were broken up, so that they are plain characters."]
                              if without != text else [])
        said.append({"role": message["role"], "content": without})
    room = _room(model, new_tokens)
    for left_out in range(0, len(said), 2):
        try:
            rendered = model.tokenizer.apply_chat_template(said[left_out:], tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"the chat template of {model.run} ({model.milestone}) refuses this conversation: {_line(error)}") from error
        ids = model.tokenizer(rendered, add_special_tokens=False, verbose=False).input_ids
        if len(ids) <= room:
            break
    if left_out:
        notes.append(f"The conversation is longer than the model's {model.positions} positions: the oldest {_count(left_out // 2, 'turn')} "
                     "left out.")
    return _fitted(model, [], ids, said[-1]["content"], new_tokens, notes)


def _without_special_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> str:
    while found := [name for name in tokenizer.all_special_tokens if name in text]:
        for name in found:
            text = text.replace(name, f"{name[0]} {name[1:]}" if len(name) > 1 else "")
    return text


def _room(model: LanguageModel, new_tokens: int) -> int:
    """How many tokens may come before the answer, of which at most a quarter of the positions is kept free."""
    return max(1, model.positions - min(new_tokens, model.positions // 4))


def _fitted(model: LanguageModel, start: list[int], ids: list[int], text: str, new_tokens: int, notes: list[str]) -> Prompt:
    room = max(1, _room(model, new_tokens) - len(start))
    if len(ids) > room:
        notes.append(f"The text is {len(ids):,} tokens long and the model has {model.positions:,} positions: the first "
                     f"{len(ids) - room:,} tokens were left out.")
        ids = ids[-room:]
        text = f"[…] {_decode(model.tokenizer, ids).lstrip('�')}" if start or text else text
    return Prompt(start + ids, text, notes)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing} was" if number == 1 else f"{number:,} {thing}s were"


# ---- Token by token -------------------------------------------------------------------------------------------------


REASONS = {"end": "ended with its end token", "length": "length reached", "positions": "last position reached", "stopped": "stopped"}


@dataclass(frozen=True)
class Step:
    """Where an answer stands.

    Attributes:
        text: all that was written so far; the bytes of a character that is not complete yet are held back.
        ids: the tokens of it, an end token included.
        seconds: spent computing.
        reason: why it is the last step (a key of REASONS), or None.
    """

    text: str
    ids: list[int]
    seconds: float
    reason: str | None


def stream(model: LanguageModel, ids: Sequence[int], settings: Settings, stop: Callable[[], bool] = lambda: False) -> Iterator[Step]:
    """Write on from `ids`, yielding a Step per token; the last one has a reason.

    The next token is computed when the caller asks for it: who no longer asks has stopped the computation. The same ids,
    settings and seed give the same tokens, and what `generate` gives for them.

    Args:
        stop: asked before each token.

    Raises:
        UserError: the model's output is not a number.
    """
    processors = settings.processors()
    generator = torch.Generator(model.model.device).manual_seed(settings.seed)
    everything = torch.tensor([list(ids)], device=model.model.device)
    before = _decode(model.tokenizer, list(ids[-8:]))  # some decoders treat a text's first token unlike the others
    cache, new, seconds, reason, text = None, [], 0.0, None, ""
    while reason is None:
        if stop():
            reason = "stopped"
        else:
            began = time.perf_counter()
            logits, cache = _logits(model, everything if cache is None else everything[:, -1:], cache)
            scores = processors(everything, logits)
            if settings.temperature:
                chosen = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            else:
                chosen = scores.argmax(-1, keepdim=True)
            new.append(int(chosen))
            everything = torch.cat([everything, chosen], dim=-1)
            if new[-1] in model.ends:
                reason = "end"
            elif len(new) >= settings.new_tokens:
                reason = "length"
            elif everything.shape[1] > model.positions:
                reason = "positions"
            seconds += time.perf_counter() - began
        written = new[:-1] if reason == "end" else new
        text = _decode(model.tokenizer, [*ids[-8:], *written])[len(before):]
        if reason is None:
            text = text.rstrip("�")  # maybe the first bytes of a character: the next token will tell
        yield Step(text, list(new), seconds, reason)


@torch.inference_mode()
def _logits(model: LanguageModel, ids: torch.Tensor, cache: Cache | None) -> tuple[torch.Tensor, Cache]:
    """([1, V] of the last position in fp32, the keys and values so far). UserError if they are not numbers.

    Inference mode ends here, before anything is yielded: it belongs to a thread, and the next token may be asked for by another.
    """
    output = model.model(input_ids=ids, past_key_values=cache, use_cache=True)
    logits = output.logits[:, -1].to(torch.float32, copy=True)
    if logits.isnan().any() or logits.isposinf().any() or logits.isneginf().all():
        raise UserError(f"{model.run} ({model.milestone}) computes values that are no numbers (NaN): its training diverged or its weights "
                        "are damaged. Choose another milestone.")
    return logits, output.past_key_values


def _decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---- What comes next ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextTokens:
    """A model's distribution over the next token, without any sampling settings.

    Attributes:
        tokens: (label, probability) of the likeliest ones.
        others: the probability of all the rest.
        entropy: in nats; exp of it is the number of equally likely tokens it is as undecided among.
    """

    tokens: list[tuple[str, float]]
    others: float
    entropy: float


def next_tokens(model: LanguageModel, ids: Sequence[int], count: int = 10) -> NextTokens:
    """What the model expects after `ids` (of which, if there are more than its positions, the last ones are read)."""
    if len(ids) > model.positions:
        start = list(model.start) if tuple(ids[:len(model.start)]) == model.start else []
        ids = start + list(ids[len(ids) - model.positions + len(start):])
    log_probabilities = _logits(model, torch.tensor([list(ids)], device=model.model.device), None)[0][0].double().log_softmax(-1)
    top, chosen = log_probabilities.topk(min(count, len(log_probabilities)))
    entropy = -(log_probabilities.exp() * log_probabilities.clamp(min=-1e9)).sum().item()
    shown = [(token_label(model.tokenizer, index), math.exp(value)) for value, index in zip(top.tolist(), chosen.tolist(), strict=True)]
    return NextTokens(shown, max(0.0, 1 - sum(value for _, value in shown)), entropy)


def token_label(tokenizer: PreTrainedTokenizerFast, index: int) -> str:
    """A token as one can read it: ␣ space, ⏎ newline, ⇥ tab, <C3> for bytes that are no whole character, special ones by name."""
    name = tokenizer.convert_ids_to_tokens(index)
    if name is None:
        return f"#{index}"  # a row of the embedding that no token has
    if index in tokenizer.added_tokens_decoder:
        return f"{visible(name)} (end)" if index == tokenizer.eos_token_id else visible(name)
    decoder = repr(tokenizer.backend_tokenizer.decoder)
    if "ByteLevel" in decoder:
        data = bytes(_BYTES[character] for character in name) if all(character in _BYTES for character in name) else name.encode()
    elif "ByteFallback" in decoder and (match := re.fullmatch("<0x([0-9A-F]{2})>", name)):
        data = bytes.fromhex(match[1])
    else:
        data = name.replace("▁", " ").encode()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return " ".join(f"<{byte:02X}>" for byte in data)
    return visible(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (Radford et al. 2019): itself if it is printable, the
    others in turn from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()
