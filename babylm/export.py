"""What leaves this machine when a run is published: the files of every revision, the record without what is private, merged
adapters, a GGUF file for llama.cpp, and the folder of a Space that runs the chat.
"""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from transformers.utils.logging import disable_progress_bar

from babylm import models
from babylm.ledger import read_lines, read_values
from babylm.model_card import evaluation, model_card
from babylm.run_folder import is_whole, read_finished, require_finished
from babylm.schema import UserError, content_hash, milestone_words

PROJECT = Path(__file__).parent.parent
RECORD = ("config.yaml", "record.json", "metrics.jsonl", "finished.json")  # of run/: what a reader needs to check the card
GGUF_ARCHITECTURES = ("llama", "gpt2")  # of those built here, the ones that llama.cpp's converter knows (GPT-J and MoE-P it does not)
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
CHAT = "interactive/chat.py"
# What a checkpoint consists of. Anything else that lies in its folder was put there by hand, and is not ours to show.
MODEL_FILES = re.compile(r".*\.safetensors(\.index\.json)?|((adapter|generation)_)?config\.json|tokenizer(_config)?\.json|tokenizer\.model"
                         r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|modeling_\w+\.py")


@dataclass
class Revision:
    """A branch of the repository and its files.

    Attributes:
        files: path in the repository -> the file, or its content.
    """

    name: str
    files: dict[str, Path | bytes]


@dataclass
class Export:
    """A run as it will be published: milestones by their words, `main` last, so that what broke off never looks finished.

    Attributes:
        run_id: of the run, in every commit's title: tells what it made from what others did.
        notes: what the reader of a dry run must know.
        pending: files that are made only when something is sent, such as a GGUF file.
    """

    root: Path
    run_id: str
    revisions: list[Revision] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)


# ---- Hashes by which the hub knows a file -----------------------------------------------------------------------------


def size_of(file: Path | bytes) -> int:
    """Bytes."""
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def digest(file: Path | bytes, git: bool) -> str:
    """sha256 of the content, as LFS has it, or the sha1 of its git blob (with git's header before the content)."""
    found = hashlib.sha1(f"blob {size_of(file)}\0".encode()) if git else hashlib.sha256()
    if isinstance(file, bytes):
        found.update(file)
    else:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()


# ---- The record without what is private -------------------------------------------------------------------------------

# By their form: keys of well-known services, tokens behind Bearer, private keys, whoever logs in before the @ of an address.
SECRETS = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
                     r"|xox[a-z]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|wandb_v1_\w{16,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*)"
                     r"|(?<=://)(?!git@)[^/\s\"'<>]+(?=@)|(?i:(?<=\bbearer )(?=\S*\d|\S{20})[\w.~+/=-]{8,})"
                     r"|(?<=\b[Bb]asic )(?=\S*(?:[\d=]|[a-z][A-Z]))[A-Za-z0-9+/=]{12,}"
                     r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)")
# By their name: what stands behind `password:`, `api_key=`, `--token`. In JSON, the quotes may have a backslash before them.
QUOTED, BARE = r"""(?P<quote>\\*["'])(?P<quoted>[^\n]+?)(?=(?P=quote))""", r"""(?:\\\\|[^\s"',\\&])+"""
PASSWORDS = r"passw(?:or)?d|passphrase|passcode|secret|credentials?"
NAMED_SECRETS = re.compile(
    rf"""(?P<name>(?P<flag>--)?\b(?:[\w-]{{0,60}}[_-])?(?:(?P<password>{PASSWORDS})|(?P<token>token)|(?:api|access|secret|private|auth)[_-]?key"""
    rf"""(?:[_-]id)?|(?:auth|access|bearer)token|authorization|cookie|signature)\b\\*["']?(?:[^\S\n]*[=:][^\S\n]*|(?(flag)[^\S\n]+|(?!))))"""
    rf"""(?:{QUOTED}|(?P<bare>{BARE}))""", re.IGNORECASE)
# A password's line in YAML: it may hold spaces and quotes.
PASSWORD_LINES = re.compile(rf"""(?im)^([^\S\n]*(?:- )?(?:\w*_)?(?:{PASSWORDS}|authorization):[^\S\n]+)(?!["'])([^\n]+)$""")
# Hexadecimal digits are secrets only behind a name that says key or login: commits and fingerprints have to stay.
KEYED_HEX = re.compile(r"""((?:\b|_)(?:key|login)\b\\*["']?[\s=:]{1,3}\\*["']?)[0-9a-f]{32,}\b""", re.IGNORECASE)
SERVERS = re.compile(
    r"""(?:(?<=server)|(?<=base_url)|(?<=endpoint))(\\*["']?[^\S\n]*[=:][^\S\n]*\\*["']?)\w+://[^\s"',<>`\\]+""", re.IGNORECASE)
INTERNAL = re.compile(  # hosts that are not public: numbers, names without a dot or in a private domain; this computer's own may stay
    r"""(?:(?<=://)|(?<=<left\ out>@))(?!localhost\b|127\.0\.0\.1\b)(?:\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-f:.]+\]|[\w-]+(?=:\d)
        |[\w.-]+\.(?:local|localdomain|internal|intranet|lan|corp|home|cluster|svc))(?::\d+)?(?![\w.-])
    |(?:(?<=http://)|(?<=https://))(?!localhost\b)[\w-]+(?=[/\s"'`,]|$)
    |(?<![\w.])(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}:\d+\b""", re.IGNORECASE | re.VERBOSE)
# An absolute path with a folder in it; behind a letter, a dot or a slash, a slash begins no path (and/or, ./a, https://). In quotes,
# and to the end of a line of YAML, its parts may hold single spaces.
SPACED = r"""(?:[^\s/"'\\`]| (?![\s/~-]))+"""
PATHS = re.compile(rf"""(?m)(?<=["'])(?:~[\w.-]*|/{SPACED})(?:/{SPACED})+/?(?=\\*["'])|(?<=[:-] )(?:~[\w.-]*|/{SPACED})(?:/{SPACED})+/?$"""
                   r"""|\bfile://[\w.-]*(?:/[\w.@+~=%()-]+)+/?|(?<![\w./~<>…-])(?:~[\w.-]*|/[\w.@+~=%()-]+)(?:/[\w.@+~=%()-]+)+/?""")
LEFT_OUT = "<left out>"


def without_private(text: str) -> tuple[str, list[str]]:
    """A text with what looks like a secret or a server's address taken out and absolute paths shortened, and what was changed:
    "2 absolute paths" and the like.

    Paths inside the project become relative to it, of others the last part stays: a user's folders are nobody's business.
    """
    counts = {"secret": 0, "server address": 0, "absolute path": 0}

    def named(match: re.Match) -> str:
        value = match["quoted"] or match["bare"]
        if match["password"]:
            kept = value.lower() in ("null", "none", "true", "false", "~", "{", "[", "|", ">") or value.startswith(LEFT_OUT.split()[0])
        else:  # special tokens such as <pad> and counts of tokens are no secrets
            kept = len(value) < 8 or value.startswith("<") or (match["token"] and re.fullmatch(r"[\d.,_]+(e[+-]?\d+)?[})\]]*", value, re.I))
        if kept:
            return match[0]
        counts["secret"] += 1
        return match["name"] + (match["quote"] or "") + LEFT_OUT

    def line(match: re.Match) -> str:
        if match[2].strip().lower() in ("null", "none", "~", "") or match[2].startswith("<"):
            return match[0]
        counts["secret"] += 1
        return match[1] + LEFT_OUT

    def shorten(match: re.Match) -> str:
        counts["absolute path"] += 1
        parts = Path(match[0].removeprefix("file://")).parts
        return "…/" + "/".join(parts[-2:] if parts[-1].startswith("chck_") else parts[-1:])

    text = NAMED_SECRETS.sub(named, PASSWORD_LINES.sub(line, text))
    for pattern, kind, instead in ((KEYED_HEX, "secret", rf"\1{LEFT_OUT}"), (SECRETS, "secret", LEFT_OUT),
                                   (SERVERS, "server address", rf"\1{LEFT_OUT}"), (INTERNAL, "server address", LEFT_OUT)):
        text, changed = pattern.subn(instead, text)
        counts[kind] += changed
    for folder, instead in ((PROJECT, ""), (Path.home(), "~/")):  # as they are: their names may hold spaces
        text = re.sub(rf"(?<![\w.~-]){re.escape(str(folder))}/", instead, text)
    text = PATHS.sub(shorten, text)
    return text, [f"{count} {what}{'' if count == 1 else 'es' if what.endswith('s') else 's'}" for what, count in counts.items() if count]


def _record_files(root: Path, card: str, notes: list[str]) -> dict[str, Path | bytes]:
    """run/ and the card as they may be read by everyone; `notes` gets a line for each file that is not what lies here."""
    texts = {"README.md": card}
    for name in RECORD:
        if (root / "run" / name).is_file():
            texts[f"run/{name}"] = (root / "run" / name).read_text(encoding="utf-8")
    record = json.loads(texts.get("run/record.json", "{}"))
    if diff := record.get("git_diff"):
        said = f"left out when this was published: {len(diff.splitlines())} lines, sha256 {hashlib.sha256(diff.encode()).hexdigest()[:16]}"
        texts["run/record.json"] = json.dumps({**record, "git_diff": said}, indent=1) + "\n"
        notes.append(f"run/record.json: its git_diff ({len(diff.splitlines())} lines) is not sent: it could hold anything")
    files: dict[str, Path | bytes] = {}
    for name, text in texts.items():
        cleaned, changed = without_private(text)
        if changed:
            notes.append(f"{name}: {' and '.join(changed)} taken out")
        files[name] = cleaned.encode("utf-8")
    return files


# ---- The run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What whoever publishes decides: see the arguments of babylm.hub."""

    repo: str
    licence: str | None = None
    datasets: tuple[str, ...] = ()
    results: Path = Path("results")
    keep_adapter: bool = False
    gguf: str | None = None
    llama_cpp: Path | None = None


def export_run(root: Path, options: Options, work: Path, dry_run: bool = False) -> Export:
    """Check a finished run and say what its revisions hold; nothing is sent.

    Args:
        work: an empty folder for what has to be made (merged models, a GGUF file).
        dry_run: a GGUF file is named and not made.

    Raises:
        UserError: unfinished, damaged, an adapter without a base that others can have, or no GGUF of this architecture.
    """
    if not root.is_dir():
        raise UserError(f"{root} is no run folder: it does not exist")
    require_finished(str(root), "publishing")
    finished = read_finished(root)
    if finished is None or "ledger" not in finished:
        raise UserError(f"{root} is no finished run (no run/finished.json with a ledger): only runs of this pipeline are published")
    disable_progress_bar()
    record, rows = read_values(root / "run" / "record.json"), list(read_lines(root / "run" / "metrics.jsonl"))
    config = yaml.safe_load((root / "run" / "config.yaml").read_text(encoding="utf-8"))
    export = Export(root, content_hash({"identity": record.get("identity_hash"), "started": record.get("started"), "name": root.name})[:12])
    folders = milestone_folders(root)
    for name in [row["name"] for row in rows if row.get("kind") == "milestone" and row["name"] not in folders]:
        export.notes.append(f"{name}: run/metrics.jsonl names this milestone, but its folder is not here: it is not sent")
    require_readable(root)
    if options.gguf:  # said before anything is merged
        require_gguf(root, options)
    for name, folder in folders.items():
        export.revisions.append(Revision(name, _model_files(folder, config, options, work / name, export.notes)))
    files = _model_files(root, config, options, work / "main", export.notes)
    model = work / "main" if (work / "main" / "config.json").is_file() else root
    gguf = f"{root.name}-{options.gguf}.gguf" if options.gguf else None
    if gguf and dry_run:
        export.pending.append(gguf)
    elif gguf:
        files[gguf] = convert_to_gguf(model, work / gguf, options)
    scores, notes = evaluation(root, options.results)
    export.notes += notes
    card = model_card(root, finished, model, options.repo, options.licence, options.datasets, scores, gguf)
    export.revisions.append(Revision("main", {**files, **_record_files(root, card, export.notes)}))
    return export


def milestone_folders(root: Path) -> dict[str, Path]:
    """{chck_1M: its folder}, in the order of their words. UserError names those that are not whole."""
    words = {path: milestone_words(path.name) for path in root.glob("chck_*/")}
    found = {path.name: path for path in sorted(filter(words.get, words), key=words.get)}
    if damaged := [name for name, path in found.items() if not is_whole(path)]:
        raise UserError(f"{root}: {', '.join(damaged)} {'is' if len(damaged) == 1 else 'are'} not whole (files are missing or cut short "
                        "against complete.json). Copy it again from where it was trained, or delete it to publish without it")
    return found


def require_readable(folder: Path) -> None:
    """UserError unless the weights of a final model (which has no complete.json) can be read to their end."""
    weights = sorted(folder.glob("*.safetensors"))
    try:
        for file in weights:
            with safe_open(file, framework="pt") as stream:  # checks that the header's offsets fit the file's size
                stream.keys()
        if not weights:
            raise UserError(f"{folder} holds no weights (*.safetensors): copy it again from where it was trained")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}: its weights are damaged ({error}): copy it again from where it was trained") from error


def _model_files(folder: Path, config: dict[str, Any], options: Options, merged: Path, notes: list[str]) -> dict[str, Path | bytes]:
    """Weights, config, tokenizer and own code of a checkpoint; of an adapter, those of the model it is merged into (in `merged`)."""
    settings = read_values(folder / "adapter_config.json")
    if settings and options.keep_adapter:
        base = settings["base_model_name_or_path"]
        if Path(base).exists() or base.startswith(("/", ".", "models/")):
            raise UserError(f"--keep_adapter: the base of {folder} is the folder {base}, which nobody else has: leave --keep_adapter away, "
                            "and the merged model is sent")
    elif settings:
        merge(folder, config, merged)
        notes.append(f"{folder.name}: the adapter is merged into its base, {Path(settings['base_model_name_or_path']).name}")
        folder = merged
    files = {file.name: file for file in models.checkpoint_files(folder)}
    if others := [name for name in files if not MODEL_FILES.fullmatch(name)]:
        notes.append(f"{folder.name}: {', '.join(others)} {'is' if len(others) == 1 else 'are'} no part of a model: not sent")
    return {name: file for name, file in files.items() if name not in others}


def merge(folder: Path, config: dict[str, Any], target: Path) -> None:
    """Write the plain model that base and adapter make together, and check that it loads with the same weights."""
    lora = config.get("lora", {})
    model = models.load_adapted_model(folder, lora.get("mode", "lora"), config["training"]["precision"])
    plain = models.merge_adapters(model)
    target.mkdir(parents=True)
    models.save_model(plain, models.load_tokenizer(folder), target)
    models.require_saved_equals(plain, target, plain.dummy_inputs["input_ids"] % plain.config.vocab_size)


# ---- GGUF ----------------------------------------------------------------------------------------------------------------


def require_gguf(root: Path, options: Options) -> None:
    """UserError unless llama.cpp's converter is there and knows this architecture as it is configured."""
    shape = models.load_config(str(root))
    if shape.model_type not in GGUF_ARCHITECTURES:
        raise UserError(f"--gguf: llama.cpp's converter does not know the architecture {shape.model_type} of {root} (of those built here, "
                        f"it knows {' and '.join(GGUF_ARCHITECTURES)}): publish without --gguf")
    if shape.model_type == "gpt2" and shape.n_inner not in (None, 4 * shape.n_embd):
        raise UserError(f"--gguf: llama.cpp's converter takes the feed-forward layer of every GPT-2 for 4 x {shape.n_embd} wide; that "
                        f"of {root} is {shape.n_inner} wide, and the file would be wrong. Publish without --gguf")
    if options.keep_adapter and (root / "adapter_config.json").is_file():
        raise UserError("--gguf needs the merged model: leave --keep_adapter away")
    if options.llama_cpp is None or not (options.llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise UserError(f"--gguf needs --llama_cpp, a clone of https://github.com/ggml-org/llama.cpp with convert_hf_to_gguf.py in it; "
                        f"{options.llama_cpp or 'none'} was given")


# The converter knows a byte-level BPE by a hash of the ids that a text gets, so it refuses every vocabulary that is trained here,
# though the rule that splits text into words is GPT-2's. Where tokenizer.json says that it is, the answer "gpt-2" is put in.
GPT2_SPLITTING = """
import importlib.util, sys
from pathlib import Path

script = Path(sys.argv[1])
sys.argv = sys.argv[1:]
sys.path.insert(0, str(script.parent))
spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", script)
converter = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(converter)
classes = {value for module in list(sys.modules.values()) if str(getattr(module, "__file__", None) or "").startswith(str(script.parent))
           for value in list(vars(module).values()) if isinstance(value, type) and "get_vocab_base_pre" in vars(value)}
if not classes:
    sys.exit("this converter has no get_vocab_base_pre: it is another version than those that were tried")
for one in classes:
    def known_or_gpt2(self, tokenizer, known=one.get_vocab_base_pre):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            print("splitting as GPT-2 does, which tokenizer.json says")
            return "gpt-2"

    one.get_vocab_base_pre = known_or_gpt2
converter.main()
"""


def convert_to_gguf(model: Path, target: Path, options: Options) -> Path:
    """Run llama.cpp's converter on a model folder; returns the file it wrote.

    Raises:
        UserError: it failed (its last lines are shown), or the tokenizer splits text otherwise than GPT-2's and is unknown to it.
    """
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    splits = tokenizer.get("pre_tokenizer") or {}
    like_gpt2 = (splits.get("type") == "ByteLevel" and splits.get("use_regex", True) and not splits.get("add_prefix_space")
                 and tokenizer.get("normalizer") is None)
    script = str((options.llama_cpp / "convert_hf_to_gguf.py").resolve())
    shape = read_values(model / "config.json")
    source = model
    if shape["model_type"] == "gpt2" and "n_ctx" not in shape:  # transformers 5 no longer writes it, the converter reads it
        source = target.parent / "for_gguf"
        source.mkdir()
        for file in models.checkpoint_files(model):
            (source / file.name).symlink_to(file.resolve())
        (source / "config.json").unlink()
        (source / "config.json").write_text(json.dumps({**shape, "n_ctx": shape["n_positions"]}), encoding="utf-8")
    command = [sys.executable, *(["-c", GPT2_SPLITTING] if like_gpt2 else []), script, str(source), "--outfile", str(target), "--outtype",
               options.gguf]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not target.is_file():
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise UserError(f"--gguf: {script} failed:\n{last}\nMend what it says (it needs its own packages: pip install gguf sentencepiece), "
                        "or publish without --gguf")
    shutil.rmtree(target.parent / "for_gguf", ignore_errors=True)
    return target


# ---- A Space that runs the chat -------------------------------------------------------------------------------------------

TOP = ("interactive", "babylm", "eval", "custom_dataset", "modeling_moep")  # this project's own modules


def space_files(repo: str, space: str, licence: str | None = None) -> dict[str, bytes]:
    """The files of a Space that shows a published model: app.py, requirements.txt, README.md, and the modules that the chat imports.

    Args:
        repo: the model, org/name.
        space: the Space, org/name.

    Raises:
        UserError: this copy of the project has no chat, or a package that it imports is neither pinned nor installed.
    """
    if not (PROJECT / CHAT).is_file():
        raise UserError(f"--space: {PROJECT / CHAT} is not there: take a whole copy of this project")
    modules, packages = _imports_of(CHAT)
    installed = metadata.packages_distributions()  # {"yaml": ["PyYAML"]}: some are imported by another name
    if missing := sorted(name for name in packages if name not in installed):
        raise UserError(f"--space: the chat imports {', '.join(missing)}, which is not installed: pip install -r requirements.txt")
    needed = sorted({installed[name][0] for name in packages} | {"gradio", "transformers", "tokenizers", "huggingface_hub"}, key=str.lower)
    text = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    pins = {name: metadata.version(name) for name in needed} | dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.M))
    title = space.split("/")[1]
    header = {"title": title, "emoji": "💬", "colorFrom": "blue", "colorTo": "green", "sdk": "gradio", "sdk_version": pins["gradio"],
                "python_version": f"{sys.version_info[0]}.{sys.version_info[1]}", "app_file": "app.py", "pinned": False, "models": [repo],
                **({"license": licence} if licence else {})}
    readme = (f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\nA page that lets "
              f"[{repo}](https://huggingface.co/{repo}) write, a small language model of the BabyLM pipeline. It continues text; it was "
              "not taught to answer.\n")
    app = f'"""Shows {repo} on a page; the code is that of the pipeline which trained it."""\n\nfrom interactive.chat import space\n\n' \
          f'space("{repo}").launch()\n'
    files = {name: (PROJECT / name).read_bytes() for name in modules}
    return {**files, "app.py": app.encode(), "README.md": readme.encode(),
            "requirements.txt": "".join(f"{name}=={pins[name]}\n" for name in needed).encode()}


def _imports_of(start: str) -> tuple[list[str], set[str]]:
    """(files of this project that `start` needs, top-level names of packages that they import as they are loaded).

    Own modules are followed wherever they are imported; packages that are imported inside functions are left out, except those of
    `start` itself: they belong to what the chat does not use (training adapters, reading corpora).
    """
    todo, files, packages = _files_of(start.removesuffix(".py").replace("/", ".")), set(), set()
    while todo:
        name = todo.pop()
        if name in files:
            continue
        files.add(name)
        tree = ast.parse((PROJECT / name).read_text(encoding="utf-8"))
        at_load = set(_statements_at_load(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for module in names:
                if module.split(".")[0] in TOP:
                    todo += _files_of(module)
                elif module.split(".")[0] not in sys.stdlib_module_names and (node in at_load or name == start):
                    packages.add(module.split(".")[0])
    data = {str(file.relative_to(PROJECT)) for folder in {str(Path(name).parent) for name in files} - {"."}
            for file in (PROJECT / folder).iterdir() if file.suffix in (".txt", ".css", ".js", ".yaml", ".jinja", ".md")}
    return sorted(files | data), packages


def _statements_at_load(tree: ast.Module) -> Sequence[ast.AST]:
    """Nodes that run when the module is loaded: not those inside functions, nor what only type checkers read."""
    found: list[ast.AST] = []
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.append(node)
        todo += ast.iter_child_nodes(node)
    return found


def _files_of(module: str) -> list[str]:
    """The file of a module of this project and the __init__.py of the packages above it; empty for a name inside a module."""
    parts = module.split(".")
    found = [f"{'/'.join(parts[:depth])}/__init__.py" for depth in range(1, len(parts) + 1)] + [f"{'/'.join(parts)}.py"]
    return [name for name in found if (PROJECT / name).is_file()]

