"""The Hugging Face hub: downloading the published corpora, and publishing a finished run with its model card, its record and a
revision for every milestone.

    python -m babylm.hub models/A                          prints the word ledger of a finished run, from run/finished.json
    python -m babylm.hub models/A --repo org/name --dry_run          lists what would be sent, with or without a network
    python -m babylm.hub models/A --repo org/name --license mit      sends it: milestones by their words, main last
    python -m babylm.hub models/A --repo org/name --space org/name-chat      and a Space that runs the chat with it

Run again after an interruption, it sends what is missing or differs. What others put there is never overwritten, unless told so.
A token with permission to write is taken from HF_TOKEN or `hf auth login`.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from babylm.config import DownloadSection
from babylm.export import GGUF_TYPES, Export, Options, Revision, digest, export_run, size_of, space_files
from babylm.ledger import ledger_text
from babylm.run_folder import read_finished, run_stage, write_text
from babylm.schema import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ATTEMPTS = 4  # of every request that a broken connection may have stopped, beside the client's own
WAIT = 2.0  # seconds before the second attempt; doubled each time
LOG_IN = "create a token that may write at https://huggingface.co/settings/tokens, then set HF_TOKEN or run: hf auth login"
LOADED = (".safetensors", ".bin", "adapter_config.json", ".index.json")  # a left-over file of these kinds would change what is loaded

Value = TypeVar("Value")


def download_corpus(section: DownloadSection, which: str, folder: Path) -> None:
    """Fetch a published corpus (its *.train files) into `folder`: with a progress bar, continuing what was cut off.

    Args:
        section: repository names.
        which: "strict-small" (10M words) or "strict" (100M words).
        folder: where the .train files go; files that are there and whole are not fetched again.

    Raises:
        UserError: no network, no such repository, access refused, or the repository holds no .train files.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # HTTPError: the base of all errors of its client

    repository = section.strict_small if which == "strict-small" else section.strict
    where = f"{repository} (revision {section.revision})"
    print(f"downloading {where} into {folder}", flush=True)
    try:
        # The commit is asked for first: without a network, snapshot_download would pass off whatever lies in the folder.
        commit = HfApi().dataset_info(repository, revision=section.revision).sha
        names = HfApi().list_repo_files(repository, repo_type="dataset", revision=commit)
        snapshot_download(repository, repo_type="dataset", revision=commit, local_dir=folder,
                          allow_patterns=["*.train", "*.train.txt"])
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no dataset {where}, or it needs a login (hf auth login): check download.* in the config") from error
    except (HTTPError, OSError) as error:  # OSError: also what the client raises when it is offline and has no copy
        raise UserError(f"could not download {where}: no network, or the hub did not answer ({type(error).__name__}). What has "
                        "arrived is kept: run the same command again, or put the .train files into the input folder yourself") from error
    files = [folder / name for name in sorted(names) if name.endswith((".train", ".train.txt"))]
    for file in files:  # some repositories keep them in a sub-folder, or add .txt
        target = folder / file.name.removesuffix(".txt")
        if target != file:  # the first one stays: it tells the next download what is here
            shutil.copyfile(file, target)
    if not files:
        raise UserError(f"the hub dataset {where} holds no .train files: check download.* in the config")


# ---- What the hub has ------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """A revision against what the hub has of it.

    Attributes:
        exists: whether the branch is there.
        same, missing, differing: names of ours; `extra`: files there that are not ours.
        ours: whether the newest commit there was made for this run by this program (or holds nothing yet).
    """

    exists: bool
    same: list[str]
    missing: list[str]
    differing: list[str]
    extra: list[str]
    ours: bool

    @property
    def in_the_way(self) -> list[str]:
        """Files that would be replaced, or that would be loaded instead of ours."""
        return [*self.differing, *(name for name in self.extra if name.endswith(LOADED))]

    @property
    def done(self) -> bool:
        return self.exists and not self.missing and not self.in_the_way


class Repository:
    """A repository on the hub, as far as it is needed here.

    Args:
        api: a client with the token.
        repo: org/name; kind: model or space.
        run_id: stands in the title of every commit, so that the next call knows its own.
    """

    def __init__(self, api: "HfApi", repo: str, kind: str, run_id: str):
        self.api, self.repo, self.kind, self.run_id = api, repo, kind, run_id
        self.branches: dict[str, str] | None = None  # name -> commit; None where there is no repository
        self.private: bool | None = None

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{'spaces/' if self.kind == 'space' else ''}{self.repo}"

    def look(self) -> None:
        """Ask which branches there are."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            refs = self.api.list_repo_refs(self.repo, repo_type=self.kind)
            self.branches = {ref.name: ref.target_commit for ref in refs.branches}
            self.private = self.api.repo_info(self.repo, repo_type=self.kind).private
        except RepositoryNotFoundError:
            self.branches = None

    def create(self, private: bool) -> None:
        sdk = {"space_sdk": "gradio"} if self.kind == "space" else {}
        self.api.create_repo(self.repo, repo_type=self.kind, private=private, exist_ok=True, **sdk)
        self.look()

    def compare(self, revision: Revision) -> Comparison:
        """A revision's files against the hub's, by the hashes of their content."""
        if self.branches is None or revision.name not in self.branches:
            return Comparison(False, [], list(revision.files), [], [], True)
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=revision.name, repo_type=self.kind)
        there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id") and entry.path != ".gitattributes"}
        found = Comparison(True, [], [], [], [name for name in there if name not in revision.files], True)
        for name, file in revision.files.items():
            entry = there.get(name)
            if entry is None:
                found.missing.append(name)
            else:
                known = entry.lfs.sha256 if entry.lfs else entry.blob_id
                (found.same if digest(file, git=not entry.lfs) == known else found.differing).append(name)
        if there and (found.in_the_way or found.missing):
            newest = self.api.list_repo_commits(self.repo, revision=revision.name, repo_type=self.kind)[0]
            found.ours = newest.title.endswith(self._mark)
        return found

    @property
    def _mark(self) -> str:
        return f"(run {self.run_id})"

    def send(self, revision: Revision, state: Comparison, overwrite: bool) -> int:
        """One commit that makes the branch what it should be; returns the number of files sent.

        A new branch begins at the repository's first commit, where nothing but .gitattributes is: from main, it would inherit
        main's files.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if not state.exists:
            first = self.api.list_repo_commits(self.repo, revision="main", repo_type=self.kind)[-1].commit_id
            self.api.create_branch(self.repo, branch=revision.name, revision=first, repo_type=self.kind, exist_ok=True)
            self.look()
            state = self.compare(revision)
        changed = [*state.missing, *state.differing]
        gone = [name for name in state.extra if overwrite or name.endswith(LOADED)]
        if not (changed or gone):
            return 0
        files = {name: revision.files[name] for name in changed}
        additions = [CommitOperationAdd(name, file if isinstance(file, bytes) else str(file)) for name, file in files.items()]
        self.api.create_commit(self.repo, [*additions, *map(CommitOperationDelete, gone)], revision=revision.name, repo_type=self.kind,
                               commit_message=f"{revision.name} {self._mark}")
        self.look()
        return len(changed)


# ---- Errors --------------------------------------------------------------------------------------------------------------


@contextmanager
def explained(doing: str, api: "HfApi") -> Iterator[None]:
    """Turn what the hub's client raises into an error that says what happened and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except UserError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # the upload of a large file
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            status, said = cause.response.status_code, cause.server_message or str(cause).splitlines()[0]
            advice = {401: f"the token is not valid: {LOG_IN}",
                      403: "this token may not do that: give it permission to write, or take a name of your own account or organisation",
                      404: "no such repository, or this token may not see it: check --repo and the token",
                      409: "something else changed it at the same time: run the same command again",
                      412: "something else changed it at the same time: run the same command again"}.get(
                          status, "run the same command again later: what has arrived is not sent again" if status >= 500 or status == 429
                          else "the hub refuses it as it is")
            raise UserError(f"{doing}: {advice} (the hub answered {status}: {said})") from error
        if isinstance(cause, HTTPError | OSError):
            raise UserError(f"{doing}: no network, or {api.endpoint} did not answer ({type(cause).__name__}: {cause}). What has arrived is "
                            "kept: run the same command again") from error
        if isinstance(cause, ValueError):  # the card's metadata, checked by the hub before anything is sent
            raise UserError(f"{doing}: the hub refuses it: {cause}. Check --license and --dataset") from error
        raise


def with_retries(work: Callable[[], Value], say: Callable[[str], None] = print) -> Value:
    """`work` again, a few times, while the network or the hub fails; anything else is raised at once."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except (HTTPError, OSError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            answered = isinstance(cause, HfHubHTTPError) and cause.response is not None
            passing = cause.response.status_code >= 500 or cause.response.status_code == 429 if answered else isinstance(
                cause, HTTPError | OSError)
            if not passing or attempt == ATTEMPTS:
                raise
            wait = WAIT * 2 ** (attempt - 1)
            say(f"  {type(cause).__name__}: trying again in {wait:g} s ({attempt} of {ATTEMPTS - 1})")
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


# ---- Publishing ------------------------------------------------------------------------------------------------------------


def publish(export: Export, options: Options, api: "HfApi", private: bool = False, overwrite: bool = False,
            space: str | None = None) -> None:
    """Send every revision that the hub does not have yet, main last, and a Space if one is asked for.

    Raises:
        UserError: no valid token, no permission, no network, or a revision that holds something else and that this run did not
            make. All of these are found before anything is sent, as far as the hub says so.
    """
    with explained("logging in", api):
        user = api.whoami()["name"]
    repositories = [(Repository(api, options.repo, "model", export.run_id), export.revisions)]
    if space:
        files = space_files(options.repo, space, options.licence)
        repositories.append((Repository(api, space, "space", export.run_id), [Revision("main", dict(files))]))
    for repository, revisions in repositories:
        with explained(f"looking at {repository.url}", api):
            with_retries(repository.look)
            require_ours(repository, revisions, overwrite)
        if private and repository.private is False:
            raise UserError(f"{repository.url} is there already and is public: --private cannot hide it. Change it in its settings, or "
                            "choose another name")
    for repository, revisions in repositories:
        if repository.branches is None:
            with explained(f"creating {repository.url} as {user}", api):
                with_retries(lambda repository=repository: repository.create(private))
            print(f"created {repository.url}{' (private)' if private else ''}", flush=True)
        sent = 0
        for revision in revisions:
            with explained(f"sending {revision.name} to {repository.url}", api):
                count = with_retries(lambda revision=revision, repository=repository: send(repository, revision, overwrite))
            sent += bool(count)
            print(f"  {revision.name}: " + (f"{count} file{'s' if count > 1 else ''} sent" if count else "is there already"), flush=True)
        print(f"published {repository.url}: {sent} of {len(revisions)} revision{'s' if len(revisions) > 1 else ''} sent now", flush=True)


def send(repository: Repository, revision: Revision, overwrite: bool) -> int:
    """Compare anew, then send the rest: after a broken connection nobody knows whether the last commit was taken."""
    state = repository.compare(revision)
    return 0 if state.done and not (overwrite and state.extra) else repository.send(revision, state, overwrite)


def require_ours(repository: Repository, revisions: list[Revision], overwrite: bool) -> None:
    """UserError if a revision holds other content than ours that this run did not put there."""
    if overwrite or repository.branches is None:
        return
    for revision in revisions:
        state = repository.compare(revision)
        if state.in_the_way and not state.ours:
            some = ", ".join(state.in_the_way[:3]) + (" and others" if len(state.in_the_way) > 3 else "")
            raise UserError(f"{repository.url}, revision {revision.name}: there with other content: {some}; and its newest commit is not "
                            "of this run. Choose another name, or --overwrite to replace what is there")


def describe(export: Export, options: Options, api: "HfApi | None", private: bool, space: str | None) -> None:
    """Print what `publish` would do. Asks the hub what is there, where `api` is given and the network is; sends nothing."""
    from huggingface_hub.errors import HTTPError

    repositories: list[tuple[str, str, list[Revision]]] = [("model", options.repo, export.revisions)]
    if space:
        repositories.append(("space", space, [Revision("main", dict(space_files(options.repo, space, options.licence)))]))
    print("dry run: nothing is sent")
    for kind, name, revisions in repositories:
        repository = Repository(api, name, kind, export.run_id) if api else None
        states: dict[str, Comparison] = {}
        try:
            if repository is None:
                known = "what the hub has was not asked"
            else:
                repository.look()
                states = {revision.name: repository.compare(revision) for revision in revisions}
                known = ("would be created" if repository.branches is None else "is there"
                         + {True: ", private", False: ", public", None: ""}[repository.private])
        except (HTTPError, OSError) as error:
            repository, known = None, f"what the hub has is unknown ({type(error).__name__}: no network, or it did not answer)"
        print(f"\n{kind} {name}{' (--private)' if private else ''}: {known}")
        for revision in revisions:
            state, total = states.get(revision.name), sum(map(size_of, revision.files.values()))
            does = "" if state is None else ("new" if not state.exists else "is there already" if state.done else
                                             f"{len(state.missing)} missing, {len(state.differing)} with other content"
                                             + ("" if state.ours else ", NOT of this run: refused without --overwrite"))
            print(f"  revision {revision.name}: {len(revision.files)} files, {_bytes(total)}{f' - {does}' if does else ''}")
            for file, content in revision.files.items():
                print(f"    {file}  {_bytes(size_of(content))}")
            for file in export.pending if kind == "model" and revision.name == "main" else ():
                print(f"    {file}  is made when it is sent")
    print("".join(f"\nnote: {note}" for note in export.notes))


def _bytes(count: int) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def write_space(folder: Path, repo: str, space: str, licence: str | None) -> None:
    """Write the Space's files into a new folder. UserError if something is there."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--space_dir {folder} is not empty: choose another folder")
    files = space_files(repo, space, licence)
    for name, content in files.items():
        write_text(folder / name, content.decode("utf-8"))
    print(f"wrote {len(files)} files into {folder}: pip install -r requirements.txt && python app.py, there")


# ---- The command -------------------------------------------------------------------------------------------------------


def print_ledger(run: Path) -> None:
    """The word ledger of a finished run. UserError if it is none."""
    finished = read_finished(run)
    if finished is None or "ledger" not in finished:
        raise UserError(f"{run} is no finished run (no run/finished.json with a ledger): finish it by the command that its "
                        "run/record.json names")
    print(f"{run}\n\n{ledger_text(finished['ledger'])}\n")


def require_repo_name(name: str, option: str) -> None:
    """UserError unless a name can be one of the hub's."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("it needs the form org/name")
    except HFValidationError as error:
        raise UserError(f"{option} {name}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="models/NAME", help="finished runs; one, where --repo is given")
    parser.add_argument("--repo", metavar="ORG/NAME", help="publish the run as this repository of the hub")
    parser.add_argument("--dry_run", action="store_true", help="list what would be sent, and send nothing")
    parser.add_argument("--private", action="store_true", help="create the repository as a private one")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there, whoever put it there")
    parser.add_argument("--license", dest="licence", help="licence of the weights, by the hub's name for it (mit, apache-2.0, other ...)")
    parser.add_argument("--dataset", action="append", default=[], metavar="ORG/NAME", help="hub dataset of the text, for the metadata")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where eval.zero_shot wrote its scores (default: results)")
    parser.add_argument("--keep_adapter", action="store_true", help="send an unmerged adapter as it is (its base must be on the hub)")
    parser.add_argument("--gguf", choices=GGUF_TYPES, help="also send a GGUF file, made by llama.cpp's converter (Llama and GPT-2)")
    parser.add_argument("--llama_cpp", type=Path, metavar="DIR", help="a clone of llama.cpp, for --gguf")
    parser.add_argument("--space", metavar="ORG/NAME", help="also create a Space that runs the chat with this model")
    parser.add_argument("--space_dir", type=Path, metavar="DIR", help="only write the Space's files into this folder")
    args = parser.parse_args()
    runs = [Path(run) for run in args.runs]
    if not args.repo:
        given = [action.option_strings[0] for action in parser._actions if action.dest not in ("help", "runs", "repo")
                 and getattr(args, action.dest) != action.default]
        if given:
            raise UserError(f"{', '.join(given)}: only with --repo org/name; without it, the word ledger is printed")
        for run in runs:
            print_ledger(run)
        return
    if len(runs) != 1:
        raise UserError(f"--repo takes one run: {', '.join(args.runs)} were given")
    require_repo_name(args.repo, "--repo")
    if args.space:
        require_repo_name(args.space, "--space")
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    token = get_token()
    if not (token or args.dry_run or args.space_dir):
        raise UserError(f"no token of the Hugging Face hub was found: {LOG_IN}")
    if args.space_dir:
        write_space(args.space_dir, args.repo, args.space or f"{args.repo}-chat", args.licence)
        return
    if not os.isatty(2):
        disable_progress_bars()  # a log file is no place for moving bars
    options = Options(args.repo, args.licence, tuple(args.dataset), args.results, args.keep_adapter, args.gguf, args.llama_cpp)
    work = Path(tempfile.mkdtemp(prefix="babylm-hub-"))
    try:
        export = export_run(runs[0], options, work, args.dry_run)
        api = HfApi(token=token or False)
        if args.dry_run:
            describe(export, options, api, args.private, args.space)
            if not token:
                print(f"note: no token was found; before publishing, {LOG_IN}")
        else:
            for note in export.notes:
                print(f"note: {note}", flush=True)
            publish(export, options, api, args.private, args.overwrite, args.space)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    run_stage(main)
