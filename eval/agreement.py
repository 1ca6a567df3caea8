"""Two folders results/<name>, the official pipeline's and ours, compared item by item: what `python -m eval.official compare` prints."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from babylm.schema import UserError


def read_json(file: Path) -> Any:
    """UserError names a file that is not there or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged, no JSON: {error}") from None


@dataclass
class Agreement:
    """How theirs and ours compare on one data set of one revision: a line of text per item and per printed score that differs.

    `tied` are items and `moved` the scores with such items, where a tie explains it.
    """

    where: str
    items: int
    different: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    moved: list[str] = field(default_factory=list)
    averages: tuple[str, str] = ("-", "-")  # theirs and ours


def compare_set(theirs: Path, ours: Path, where: str, tolerance: float, margin: float) -> Agreement:
    """Compare the folders of one data set.

    Args:
        theirs, ours: each with predictions.json and a report; ours with items.jsonl.
        where: how to call it.
        tolerance: nats by which surprisals may differ, and by which a WUG share may.
        margin: nats; an item whose two best candidates we score closer than this is a tie too.
    """
    a, b = (read_predictions(folder / "predictions.json") for folder in (theirs, ours))
    result = Agreement(where, len(a))
    gaps, tied_uids = read_gaps(ours / "items.jsonl", margin), set()
    for key in dict.fromkeys([*a, *b]):
        label = f"{key[0]} / {key[1]}"
        if key not in a or key not in b:
            result.different.append(f"{label}: only in {'ours' if key in b else 'theirs'}")
            continue
        unequal = [value for value in sorted({*a[key], *b[key]}) if not _same(a[key].get(value), b[key].get(value), tolerance)]
        if not unequal:
            continue
        text = f"{label}: " + "; ".join(f"{value} {a[key].get(value)!r} in theirs, {b[key].get(value)!r} in ours" for value in unequal)
        if unequal == ["pred"] and gaps.get(key) == 0:
            result.tied.append(text)
            tied_uids.add(key[0])
        else:
            result.different.append(text + (f"; our two best candidates are {gaps[key]:.2g} nats apart" if key in gaps else ""))
    uids = {uid for uid, _ in a}
    for name in ("best_temperature_report.txt", "report.txt"):
        if (theirs / name).is_file():
            x, y = read_report(theirs / name), read_report(ours / name)
            result.averages = _averages(x), _averages(y)
            for line in (line for line in dict.fromkeys([*x, *y]) if x.get(line) != y.get(line)):
                # A tie moves the score of its UID, and the means over several; not the score of another UID.
                uid = line.rsplit(", ", 1)[-1]
                explained = bool(tied_uids) and (uid in tied_uids or uid not in uids)
                text = f"{name}, {line}: {x.get(line, 'missing')} in theirs, {y.get(line, 'missing')} in ours"
                (result.moved if explained else result.scores).append(text)
    return result


def _same(x: Any, y: Any, tolerance: float) -> bool:
    if isinstance(x, (int, float)) and isinstance(y, (int, float)):
        return abs(x - y) <= tolerance or (math.isnan(x) and math.isnan(y))  # NaN in both where there is no previous word
    return x == y


def _averages(scores: dict[str, str]) -> str:
    averages = [value for name, value in scores.items() if name.startswith("AVERAGE") or name.endswith("SCORE")]
    return " ".join(averages) or "-"


def read_predictions(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """{(UID, id): prediction} of an official predictions.json. UserError names the file where it is none."""
    table = {}
    try:
        for uid, entry in read_json(file).items():
            for prediction in entry["predictions"]:
                key = uid, str(prediction["id"])
                if key in table:
                    raise UserError(f"{file}: the id {key[1]!r} of UID {uid!r} is there twice")
                table[key] = {name: value for name, value in prediction.items() if name != "id"}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no predictions.json of the pipeline ({error!r})") from None
    return table


def read_gaps(file: Path, margin: float) -> dict[tuple[str, str], float]:
    """{(uid, id): nats between our two best candidates}, 0 for a tie (marked as one, or within `margin`); empty without the file."""
    gaps = {}
    if not file.is_file():
        return gaps
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            if item["pred"] is not None:  # nothing is chosen in reading times
                best = sorted(map(float, item["scores"]))[-2:]
                gap = best[-1] - best[0]
                gaps[item["uid"], str(item["id"])] = 0.0 if item["tie"] or gap <= margin else gap
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: no item of ours ({error!r}); score this task again") from None
    return gaps


def read_report(file: Path) -> dict[str, str]:
    """{"<section>, <name>": number as printed} of a report of the pipeline; a section's lone number is named by the section."""
    scores: dict[str, str] = {}
    section = ""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("###"):
            section = line.lstrip("# ")
        elif ":" in line:
            name, number = line.rsplit(":", 1)
            scores[f"{section}, {name}" if section else name] = number.strip()
        else:
            scores[section] = line
    return scores


def result_folders(root: Path, backends: list[str], revisions: list[str] | None) -> Iterator[tuple[str, Path]]:
    """("<revision>/<backend>/<task>/<dataset>", folder) of all predictions under results/<name>."""
    for pattern in ("*/zero_shot/*/*/*/predictions.json", "*/zero_shot/*/reading/predictions.json"):
        for file in sorted(root.glob(pattern)):
            revision, _, backend, *task = file.parent.relative_to(root).parts
            if backend in backends and (revisions is None or revision in revisions):
                yield "/".join([revision, backend, *task]), file.parent


def report(theirs: Path, ours: Path, backends: list[str], revisions: list[str] | None, tolerance: float, margin: float) -> None:
    """Compare two folders results/<name>, print a table and the first differences; exit with code 1 on any that is no tie."""
    a, b = (dict(result_folders(root, backends, revisions)) for root in (theirs, ours))
    if not a:
        raise UserError(f"{theirs} holds no predictions of the pipeline ({', '.join(backends)}; revisions: "
                        f"{', '.join(revisions or ['any'])}): give the folder results/<name> in its clone")
    agreements = [compare_set(folder, b[where], where, tolerance, margin) for where, folder in a.items() if where in b]
    lines = [["revision/backend/task/data", "items", "same", "tied", "different", "theirs", "ours", ""]]
    for row in agreements:
        same = row.items - len(row.tied) - len(row.different)
        remark = "DIFFERENT" if row.different or row.scores else "scores differ, by ties" if row.moved else ""
        lines.append([row.where, str(row.items), str(max(same, 0)), str(len(row.tied)), str(len(row.different)), *row.averages, remark])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:-1]), line[-1]]).rstrip())
    for row in agreements:
        for kind, found in (("different", row.different), ("score", row.scores), ("tie", row.tied), ("score, by ties", row.moved)):
            for text in found[:5]:
                print(f"{kind}: {row.where}: {text}")
            if len(found) > 5:
                print(f"{kind}: {row.where}: and {len(found) - 5} more")
    missing = [where for where in a if where not in b]
    for where in missing:
        print(f"missing: ours has no {where}")
    for where in b:
        if where not in a:
            print(f"note: the pipeline did not score {where}: not compared")
    bad = [row for row in agreements if row.different or row.scores]
    sys.stdout.flush()
    if bad or missing:
        raise UserError(f"ours and the official results differ in {len(bad)} data sets, and {len(missing)} are missing in ours")
    print(f"the same: {sum(row.items for row in agreements):,} predictions in {len(agreements)} data sets, "
          f"{sum(len(row.tied) for row in agreements):,} ties aside")
