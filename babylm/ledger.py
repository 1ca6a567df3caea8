"""The word ledger: what text a model, its tokenizer, its base and its teachers have seen, from their own records, and which tracks
of the challenge that allows. Every model card carries it; `python -m babylm.hub models/NAME` prints it.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babylm.config import RLConfig, RunConfig
from babylm.run_folder import read_finished
from custom_dataset import TextPart

TRACKS = {"strict-small": 10_000_000, "strict": 100_000_000}  # words of text, each text counted once
EPOCHS = 10  # how often a text may be seen; over the whole limit, that is the limit of words seen
LEDGER_KEYS = ("corpus_words", "corpus_sha256", "words_seen", "words_before_last_step", "tokenizer", "generated_words", "base", "teachers")
BRINGS = {"tokenizer": "vocabulary brings", "base": "weights bring", "teacher": "distribution brings"}  # a helper's text into the budget

# Instruct models whose rewards the challenge allows, by their whole official names (a server may leave the organisation out); so are
# those of any language model below a billion parameters, which no name tells. What others made of such a model is another model.
APPROVED = re.compile(r"(meta-llama/)?((Meta-)?Llama-3\.1-8B|Llama-3\.2-[13]B)-Instruct"
                      r"|(Qwen/)?Qwen[\d.]*-(0[._]\d+|[1-8]([._]\d+)?|9)B(-Base|-Chat|-Instruct|-Thinking)?(-\d{4})?")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a model's folder in the hub's cache, which holds snapshots/<commit>


def word_ledger(config: RunConfig, tokenizer: str, fingerprint: str, teachers: list[str]) -> dict[str, Any]:
    """What a run learns from, as finished.json will hold it: a record that can be judged without the folders it names.

    Made before training, because a teacher's folder may be gone afterwards; the run adds its words_seen (repeats counted, to the
    last step) and words_before_last_step.

    Args:
        tokenizer: its path or hub name, and its fingerprint.
        teachers: paths of those whose distribution or states are learned from.
    """
    text = TextPart(config.data.corpus, "train")
    return {"corpus_words": int(text.documents["words"].sum()), "corpus_sha256": text.sha256, "generated_words": 0,
            "tokenizer": tokenizer_text(tokenizer, fingerprint), "base": _helper(config.model.path) if config.model.path else None,
            "teachers": [_helper(path) for path in teachers]}


def rl_ledger(config: RLConfig, fingerprint: str) -> dict[str, Any]:
    """The ledger of a run of stage 6, which reads no text of a corpus but learns from what it writes; the run adds generated_words.

    Models whose probabilities are rewards count as teachers: what they have read reaches the student through them. Judges, who give
    grades, are named in `judges`: {"path", "hub"}, where hub is the model's name on the hub or at its server, None for a folder.

    Args:
        fingerprint: of the student's tokenizer.
    """
    return {"corpus_words": 0, "corpus_sha256": None, "words_seen": 0, "words_before_last_step": 0, "generated_words": 0,
            "tokenizer": tokenizer_text(config.model.path, fingerprint), "base": _helper(config.model.path),
            "teachers": [_helper(entry.teacher if entry.kind == "margin" else entry.model) for entry in config.rewards
                         if entry.kind in ("margin", "likelihood")],
            "judges": [{"path": entry.model, "hub": entry.model if entry.server else _hub_name(entry.model)}
                       for entry in config.rewards if entry.kind == "judge"]}


def _hub_name(path: str) -> str | None:
    """Which hub model a name stands for; None for a folder, whatever it is called, unless it lies in the hub's cache."""
    if not Path(path).exists():
        return path
    *_, model, snapshots, _ = ["", "", "", *Path(path).absolute().parts]
    cached = CACHED.fullmatch(model) if snapshots == "snapshots" else None
    return f"{cached[1]}/{cached[2]}" if cached else None


def tokenizer_text(path: str, fingerprint: str) -> dict[str, Any]:
    """{"source", "words", "sha256"} of the text that a tokenizer was trained on; words and sha256 are None where no record says.

    A corpus folder's manifest says whether its tokenizer was trained there or where it came from, and so does a run's ledger.
    A record of a tokenizer with another fingerprint is not believed: the folder has been written anew since.
    """
    followed: set[str] = set()
    while path not in followed:
        followed.add(path)
        manifest = read_values(Path(path).parent / "manifest.json") if Path(path).name == "tokenizer" else {}
        entry, run = manifest.get("tokenizer", {}), _run_of(path)
        if entry.get("fingerprint") == fingerprint:
            if entry["trained_on_words"]:
                return {"source": path, "words": entry["trained_on_words"], "sha256": manifest["parts"]["train"]["sha256"]}
            path = entry["source"]
        elif run and read_values(run / "run" / "identity.json").get("fingerprint.tokenizer") == fingerprint:
            return (_helper(path)["ledger"] or {}).get("tokenizer", {"source": path, "words": None, "sha256": None})
    return {"source": path, "words": None, "sha256": None}


def read_values(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _run_of(path: str) -> Path | None:
    """The finished run that a model folder belongs to: itself, or what holds it where it is a milestone; None for checkpoints without
    a record and for hub names."""
    folder = Path(path)
    return next((root for root in (folder, folder.parent if folder.name.startswith("chck_") else folder) if read_finished(root)), None)


def _helper(path: str) -> dict[str, Any]:
    """A base or teacher and its ledger; None without a record. A milestone has seen what its run had by then."""
    root = _run_of(path)
    ledger = read_finished(root).get("ledger") if root else None
    if ledger and root != Path(path):
        rows = [row for row in read_lines(root / "run" / "metrics.jsonl")
                if row.get("kind") == "milestone" and row["name"] == Path(path).name]
        counted = ["generated_words"] if ledger.get("generated_words") else ["words_seen", "words_before_last_step"]  # stage 6 reads none
        ledger |= dict.fromkeys(counted, rows[-1]["words"]) if rows else {}
    return {"path": path, "ledger": ledger}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file like metrics.jsonl, one dict each; a line that a killed run left half written is passed over."""
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():  # a text may hold other ends of lines
        with contextlib.suppress(ValueError):
            yield json.loads(line)


@dataclass(frozen=True)
class Account:
    """A text that the model, or a helper of it, was trained on.

    Attributes:
        what: whose text it is.
        role: this model, base, teacher, tokenizer, generated, judge.
        words: of the text, None where it is unknown; sha256: of its content, by which equal texts are counted once.
        seen, before: words of it that the model's own weights have seen, to the last step and to the one before, repeats counted.
        missing: what a record ought to say and does not.
        judge: who gives grades, by its name on the hub; empty for a folder that no record names.
    """

    what: str
    role: str
    words: int | None = None
    sha256: str | None = None
    seen: int = 0
    before: int = 0
    missing: str = ""
    judge: str = ""


def accounts(ledger: dict[str, Any], what: str = "this model", role: str = "this model", own: bool = True) -> list[Account]:
    """All texts of a ledger, those of its base and teachers included, and of theirs.

    Args:
        own: whether what was seen shaped the weights of the model itself: of a base it did, of a teacher it did not.
    """
    if absent := [key for key in LEDGER_KEYS if key not in ledger]:
        return [Account(what, role, missing=f"its record does not say {', '.join(absent)} (an older version wrote it): train it again")]
    # Only the run itself may end with the step that reaches a limit: what its base had seen, it had seen before.
    last = ledger["words_before_last_step"] if role == "this model" else ledger["words_seen"]
    seen, before = (ledger["words_seen"], last) if own else (0, 0)
    rows = [Account(f"{what}: corpus", role, ledger["corpus_words"], ledger["corpus_sha256"], seen, before)]
    rows = rows if ledger["corpus_words"] else []  # learning from rewards reads no text
    tokenizer, generated = ledger["tokenizer"], ledger["generated_words"]
    rows.append(Account(f"{what}: tokenizer {tokenizer['source']}", "tokenizer", tokenizer["words"], tokenizer["sha256"]))
    if generated:
        rows.append(Account(f"{what}: generated", "generated", generated, None, *(generated, generated) if own else (0, 0)))
    for judge in ledger.get("judges", []):
        # An older record has the path alone, in which a folder cannot be told from a name without an organisation.
        path, hub = (judge, judge if "/" in judge else None) if isinstance(judge, str) else (judge["path"], judge["hub"])
        rows.append(Account(f"{what}: rewards of {path}", "judge", 0, judge=hub or ""))
    for kind, helper in [*([("base", ledger["base"])] if ledger["base"] else []), *(("teacher", one) for one in ledger["teachers"])]:
        name = f"{kind} {helper['path']}" + (f" of {what}" if what != "this model" else "")
        rows += accounts(helper["ledger"], name, kind, own and kind == "base") if helper["ledger"] is not None else [Account(name, kind)]
    return rows


def text_in_all(rows: list[Account]) -> int:
    """Words of all texts that are known, those of equal content counted once. Texts that only overlap count in full, each."""
    return sum({row.sha256 or row.what: row.words for row in rows if row.words is not None}.values())


def verdict(rows: list[Account]) -> tuple[str, dict[str, list[str]]]:
    """(verdict, {track: why not}): legal for strict-small, legal for strict, research only, or unknown where a record says too little.

    The step that reaches a limit of words seen is the last one allowed: a run ends with a whole batch.
    """
    texts: dict[str, list[Account]] = {}
    for row in rows:
        if row.words is not None and row.seen:
            texts.setdefault(row.sha256 or row.what, []).append(row)
    outside = [f"{row.what}: its training text is unknown, and its {BRINGS[row.role]} it into the budget"
               for row in rows if row.words is None and not row.missing]
    outside += [f"{row.what}: not known to be an approved teacher (Llama 3.1 8B, 3.2 3B or 1B Instruct, Qwen up to 9B, any model below 1B)"
                for row in rows if row.role == "judge" and not APPROVED.fullmatch(row.judge)]
    repeats = [f"{same[0].what}: {sum(row.seen for row in same):,} words seen of a text of {same[0].words:,}, more than {EPOCHS} epochs"
               for same in texts.values() if same[0].role != "generated" and sum(row.before for row in same) >= EPOCHS * same[0].words]
    missing = [f"{row.what}: {row.missing}" for row in rows if row.missing]
    reasons, open_ = {}, []
    for track, limit in TRACKS.items():
        against = [*outside, *repeats]
        if (total := text_in_all(rows)) > limit:
            count = len({row.sha256 or row.what for row in rows if row.words is not None})
            in_full = f" ({count} different texts, each in full, even where they overlap)" if count > 1 else ""
            against.append(f"{total:,} words of text in all{in_full}, above {limit:,}")
        if sum(row.before for row in rows) >= EPOCHS * limit:
            against.append(f"{sum(row.seen for row in rows):,} words seen, above {EPOCHS * limit:,}")
        open_ += [track] if missing and not against else []
        reasons[track] = against or missing
    legal = [track for track in TRACKS if not reasons[track]]
    return f"legal for {legal[0]}" if legal else "unknown" if open_ else "research only", reasons


def ledger_text(ledger: dict[str, Any]) -> str:
    """The ledger as a table, the verdict, and its reasons, in Markdown."""
    rows = accounts(ledger)
    lines = ["| text | words | seen by the model, repeats counted | content |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row.what} | {'unknown' if row.words is None else f'{row.words:,}'} | {f'{row.seen:,}' if row.seen else '-'} "
                     f"| {row.sha256[:8] if row.sha256 else '-'} |")
    unknown = any(row.words is None for row in rows)
    lines.append(f"| **in all, equal content counted once** | {'at least ' if unknown else ''}{text_in_all(rows):,} "
                 f"| {sum(row.seen for row in rows):,} | |")
    decision, reasons = verdict(rows)
    lines += ["", f"Verdict: **{decision}** (limits: " + ", ".join(f"{track} {limit:,} words of text" for track, limit in TRACKS.items()) +
              f"; each text seen at most {EPOCHS} times).", ""]
    lines += [f"- not shown to be legal for {track}: {reason}" for track, against in reasons.items() for reason in against]
    return "\n".join(lines).rstrip()
