"""Run the unmodified official evaluation pipeline on a run folder with all its milestones, and compare its results with ours.

    bash eval/official.sh <clone> models/<name> [causal|mlm|mntp] [data folder]        makes its environment, then calls `run`
    python -m eval.official run <clone> models/<name> --python <its Python>            check, cache, run, compare
    python -m eval.official compare <clone>/results/<name> results/<name>              only compare

Every revision gets its own scores only if the pipeline is given a name on the hub: with a local path it ignores the revision
and scores the final model again and again.  So the run folder is laid out, by links, as a hub cache: <hub>/hub/models--local--<name>
holds a snapshot for main and for each chck_*, and the pipeline runs offline on `local/<name>`.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from babylm.models import checkpoint_files
from babylm.run_folder import is_whole, move_aside, require_finished, run_stage, write_json, write_text
from babylm.schema import UserError, milestone_words
from custom_dataset import file_sha256
from eval.agreement import read_json, report

BACKENDS = ("causal", "mlm", "mntp")
ORG = "local"  # of the name on the made-up hub


@dataclass(frozen=True)
class Script:
    """A command line of the pipeline, run in the root of its clone, and the folder of data it is for.

    `file` lies in that root (2025), or in its scripts/ (2026, whose root is the folder strict/ of babylm-eval).
    """

    file: str
    arguments: tuple[str, ...]
    data: str

    def inside(self, clone: Path) -> str:
        """Its path in a clone. UserError where there is none."""
        for path in (self.file, f"scripts/{self.file}"):
            if (clone / path).is_file():
                return path
        inner = " (give its folder strict/)" if (clone / "strict").is_dir() else ""
        raise UserError(f"{clone / self.file} does not exist: {clone} is no clone of the official pipeline{inner}, or of a version with "
                        "another command line (then correct FULL and FAST in eval/official.py)")


# All that is assumed about the pipeline's command line; everything else is read from the results it writes.
DATA = "evaluation_data"  # in the clone, where no data folder is given
FULL = Script("eval_zero_shot.sh", ("{model}", "{backend}", "{data}"), "full_eval")
FAST = Script("eval_zero_shot_fast.sh", ("{model}", "{revision}", "{backend}", "{data}"), "fast_eval")


# ---- Is the checkpoint what the pipeline needs? ---------------------------------------------------------------------


def revisions_of(root: Path) -> dict[str, Path]:
    """{"main": the run folder, "chck_1M": ..., ...}, milestones in the order of their words."""
    found = [(words, folder) for folder in root.glob("chck_*") if folder.is_dir() and (words := milestone_words(folder.name))]
    return {"main": root} | {folder.name: folder for _, folder in sorted(found)}


def check_run(root: Path, backend: str) -> dict[str, Path]:
    """The revisions of a finished run. UserError where the pipeline would refuse it or score it wrongly, without saying so."""
    name = root.resolve().name
    if "." in name:
        raise UserError(f"{root}: the name holds a dot. The pipeline files results under what stands before the last one, "
                        f"{Path(name).stem!r}, where two models can meet: rename the folder to {name.replace('.', '_')!r}")
    if not re.fullmatch(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*", name) or len(name) > 90:
        raise UserError(f"{root}: no name for the hub (letters, digits, _, single - inside, 90 characters at most): rename the folder")
    if not root.is_dir():
        raise UserError(f"{root} does not exist: give the folder of a finished run")
    require_finished(str(root), "the official evaluation")
    revisions = revisions_of(root)
    for folder in revisions.values():
        check_checkpoint(folder, backend)
    return revisions


def check_checkpoint(folder: Path, backend: str) -> None:
    """One folder with a model. UserError names the file and the key that are wrong."""
    if (folder / "complete.json").is_file() and not is_whole(folder):
        raise UserError(f"{folder} is damaged: a file is missing or cut short. Make the run again, or copy the folder anew")
    for needed in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / needed).is_file():
            raise UserError(f"{folder} has no {needed}, without which the pipeline cannot load it")
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no weights (*.safetensors)")
    settings = read_json(folder / "config.json")
    for target in settings.get("auto_map", {}).values():
        module = folder / f"{str(target).split('.')[0]}.py"
        if not module.is_file():
            raise UserError(f"{folder / 'config.json'}: auto_map names {target}, but {module.name} is not beside it")
    _check_tokenizer(folder, backend)


def _check_tokenizer(folder: Path, backend: str) -> None:
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    advice = "save it with babylm.models.save_tokenizer"
    if "backend" in settings:
        raise UserError(f"{file}: the key \"backend\" is of transformers 5, and the pipeline's 4.51 cannot load such a tokenizer: {advice}")
    if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
        raise UserError(f"{file}: tokenizer_class is {settings.get('tokenizer_class')!r}, which the pipeline's transformers 4.51 cannot "
                        f"load: {advice}, which writes \"PreTrainedTokenizerFast\"")
    inputs = settings.get("model_input_names")
    if backend == "causal" and (inputs is None or "token_type_ids" in inputs):
        raise UserError(f"{file}: model_input_names is {inputs!r}. Transformers 4.51 then gives a causal model token_type_ids, and GPT-2 "
                        f"adds them to its inputs: {advice}, which writes [\"input_ids\", \"attention_mask\"]")
    if not settings.get("pad_token"):
        raise UserError(f"{file} names no pad_token, which the pipeline needs to make batches: {advice}")
    if backend != "causal" and not settings.get("mask_token"):
        raise UserError(f"{file} names no mask_token: this is no model for {backend}; a causal one is scored with causal")
    starts = [_token(settings[key]) for key in ("bos_token", "cls_token") if settings.get(key)]
    encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").tokens
    if encoded[:1] not in [[start] for start in starts]:
        raise UserError(f"{folder / 'tokenizer.json'}: a text begins with {encoded[:1]}, not with the start token {starts}. The pipeline "
                        f"adds none, so the first word of each sentence would not be scored: {advice}")


def _token(value: str | dict) -> str:
    return value["content"] if isinstance(value, dict) else value


# ---- A hub cache by hand --------------------------------------------------------------------------------------------


def snapshot_id(folder: Path) -> str:
    """40 hex digits, as a commit has: a hash of a checkpoint's file names and contents."""
    digest = hashlib.sha1()
    for file in checkpoint_files(folder):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def build_cache(revisions: dict[str, Path], name: str, home: Path) -> dict[str, str]:
    """Lay out checkpoints as a hub cache under `home`, as symbolic links; an earlier one of the same name is replaced.

    Args:
        revisions: {revision: folder of a checkpoint}.
        name: of the repository, local/<name>.
        home: what HF_HOME will be.

    Returns:
        {revision: snapshot id}. Equal checkpoints share a snapshot.

    Raises:
        UserError: there is a repository of that name that was not made here.
    """
    repository = home / "hub" / f"models--{ORG}--{name}"
    marker = repository / "made-by-eval-official"
    if repository.exists() and not marker.is_file():
        raise UserError(f"{repository} exists and was not made by this script: choose another --hub")
    shutil.rmtree(repository, ignore_errors=True)
    ids = {revision: snapshot_id(folder) for revision, folder in revisions.items()}
    write_text(marker, "links into a run folder; made anew at each call\n")
    for revision, folder in revisions.items():
        snapshot = repository / "snapshots" / ids[revision]
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in checkpoint_files(folder):
            link = snapshot / file.name
            if not link.is_symlink():
                link.symlink_to(file.resolve())
        write_text(repository / "refs" / revision, ids[revision])  # no newline: the hub client reads it as it stands
    return ids


# ---- Running it -----------------------------------------------------------------------------------------------------


def pipeline_environment(home: Path, python: Path) -> dict[str, str]:
    """Environment of the pipeline: its own `python`, the made-up hub and no other, no network.

    Its scripts say `python`, so a `python` that calls the given one is put first on PATH.
    """
    wrapper = home / "bin" / "python"
    write_text(wrapper, f'#!/bin/sh\nexec {shlex.quote(os.path.abspath(python))} "$@"\n')
    wrapper.chmod(0o755)
    # These would take precedence over HF_HOME, or bring our packages into its Python.
    dropped = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_MODULES_CACHE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "PATH": f"{wrapper.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def data_sets(clone: Path, script: Script, data: Path) -> list[str]:
    """Names of the data sets that a script asks for and the data folder has; UserError if there are none."""
    file = clone / script.inside(clone)
    folder = data / script.data
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: get the pipeline's data (its README says where), or give the folder that holds "
                        f"{FULL.data}/ and {FAST.data}/; with --fast, {FAST.data}/ is enough")
    text = file.read_text(encoding="utf-8")
    found = sorted(child.name for child in folder.iterdir() if child.is_dir() and re.search(rf"/{re.escape(child.name)}\b", text))
    if not found:
        raise UserError(f"{folder} holds none of the data sets that {script.file} asks for")
    return found


def missing_results(folder: Path, sets: list[str]) -> list[str]:
    """Data sets without predictions in <revision>/zero_shot/<backend>/: a script goes on after a task that failed."""
    there = {path.parent.name for path in [*folder.glob("*/*/predictions.json"), *folder.glob("reading/predictions.json")]}
    return [name for name in sets if name not in there]


def run_revision(clone: Path, script: Script, name: str, revision: str, snapshot: str, backend: str, data: Path, home: Path,
                 python: Path) -> None:
    """Let the pipeline score one revision, unless it has done so for the same checkpoint and data.

    Results of another checkpoint are moved aside first: a task that fails would leave them to be taken for this one's.

    Raises:
        UserError: a data set that is there was left out.
    """
    sets = data_sets(clone, script, data)
    folder = clone / "results" / name / revision / "zero_shot" / backend
    stamp = folder / "scored.json"
    made_of = {"snapshot": snapshot, "script": script.file, "data": str(data.resolve() / script.data), "sets": sets}
    if stamp.is_file() and read_json(stamp) == made_of and not missing_results(folder, sets):
        print(f"{revision}: done before", flush=True)
        return
    if folder.exists():
        print(f"{revision}: moved earlier results to {move_aside(folder)}", flush=True)
    values = {"model": f"{ORG}/{name}", "revision": revision, "backend": backend, "data": str(data.resolve() / script.data)}
    command = ["bash", script.inside(clone), *(argument.format(**values) for argument in script.arguments)]
    print(f"{revision}: {shlex.join(command)}", flush=True)
    code = subprocess.run(command, cwd=clone, env=pipeline_environment(home, python), check=False).returncode
    missing = missing_results(folder, sets)
    if missing:
        raise UserError(f"the official pipeline left no predictions of {revision} on {', '.join(missing)} (exit code {code}). Its output "
                        f"is above; the command, in {clone}: {shlex.join(command)}")
    if code:  # of the script's last task alone, which may be one whose data are not there
        print(f"{revision}: {script.file} ended with code {code}, with all predictions for which there are data", flush=True)
    write_json(stamp, made_of)


def run(args: argparse.Namespace) -> None:
    """Check, cache, run all revisions, compare."""
    args.clone, root = args.clone.resolve(), args.model.resolve()
    revisions = check_run(args.model, args.backend)
    if args.revisions:
        unknown = [name for name in args.revisions.split(",") if name not in revisions]
        if unknown:
            raise UserError(f"--revisions: {args.model} has no {', '.join(unknown)}; it has {', '.join(revisions)}")
        revisions = {name: revisions[name] for name in args.revisions.split(",")}
    scripts = {name: FULL if name == "main" and not args.fast else FAST for name in revisions}
    data = args.data or args.clone / DATA
    for script in dict.fromkeys(scripts.values()):
        sets = data_sets(args.clone, script, data)
        if args.check:
            print(f"{script.file} on {data / script.data}: {', '.join(sets)}; not on any that are not there", flush=True)
    if (args.clone / ORG / root.name).exists():
        raise UserError(f"{args.clone / ORG / root.name} exists: the pipeline would load it instead of the revisions; move it away")
    ours = args.ours or Path("results") / root.name
    lacking = [name for name in revisions if not (ours / name / "zero_shot" / args.backend).is_dir()]
    if lacking and not args.no_compare:
        raise UserError(f"{ours} has no results of ours to compare with for {', '.join(lacking)} ({args.backend}): score them with "
                        f"python -m eval.zero_shot, name the folder with --ours, or give --no-compare")
    if args.check:
        return
    home = (args.hub or args.clone.with_name(f"{args.clone.name}-hub")).resolve()
    ids = build_cache(revisions, root.name, home)
    for name, script in scripts.items():
        run_revision(args.clone, script, root.name, name, ids[name], args.backend, data, home, args.python)
    if not args.no_compare:
        report(args.clone / "results" / root.name, ours, [args.backend], list(revisions), args.tolerance, args.tie_margin)


# ---- The command line -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.official", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--tolerance", type=float, default=1e-3,
                        help="by which surprisals (nats) and WUG shares may differ (default: 0.001); text must be equal")
    shared.add_argument("--tie-margin", type=float, default=0.0, metavar="NATS",
                        help="also call a tie what our two best candidates leave closer than this (default: 0)")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", parents=[shared], help="check, build the hub cache, run the pipeline, compare")
    runs.add_argument("clone", type=Path, help="clone of the official pipeline")
    runs.add_argument("model", type=Path, metavar="models/NAME", help="finished run folder")
    runs.add_argument("--backend", choices=BACKENDS, default="causal")
    runs.add_argument("--data", type=Path, help=f"folder with {FULL.data}/ and {FAST.data}/ (default: {DATA}/ in the clone)")
    runs.add_argument("--fast", action="store_true", help="score main on the fast data too: minutes instead of hours")
    runs.add_argument("--revisions", metavar="main,chck_1M", help="only these (default: main and all milestones)")
    runs.add_argument("--python", type=Path, default=Path(sys.executable), help="what the pipeline runs in (default: this Python)")
    runs.add_argument("--hub", type=Path, help="where the hub cache is made (default: <clone>-hub)")
    runs.add_argument("--ours", type=Path, help="our results (default: results/NAME)")
    runs.add_argument("--no-compare", action="store_true", help="only run the pipeline")
    runs.add_argument("--check", action="store_true", help="only check that everything is there")
    compares = commands.add_parser("compare", parents=[shared], help="compare the pipeline's results with ours")
    compares.add_argument("theirs", type=Path, metavar="CLONE/results/NAME")
    compares.add_argument("ours", type=Path, metavar="results/NAME")
    compares.add_argument("--backend", choices=BACKENDS, help="only this one")
    compares.add_argument("--revisions", metavar="main,chck_1M", help="only these")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    else:
        report(args.theirs, args.ours, [args.backend] if args.backend else list(BACKENDS),
               args.revisions.split(",") if args.revisions else None, args.tolerance, args.tie_margin)


if __name__ == "__main__":
    run_stage(main)
