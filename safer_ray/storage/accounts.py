"""Accounts of what is finished of a stage: the `done` entries of its fragments, with their accounts; the metrics of a
training."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safer_ray.errors import SaferError, UserError
from safer_ray.storage.artifacts import DONE, Fragment, part_name
from safer_ray.storage.background import map_ordered
from safer_ray.storage.files import names_in, read_json, remove, sync_tree, threads_for, write_json
from safer_ray.storage.remote import Remote

METRICS = "metrics.json"  # of a training that ended, in its state
ENTRY = re.compile(r"\d{8}\.json")
PARTS = "part-????????.parquet"
FACTS = ("read", "written", "quarantined", "reasons")  # of every entry
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """Accounts of a mapped stage; input rows = written + quarantined + left out by the source's `part`."""

    read: int
    written: int
    quarantined: int
    reasons: dict[str, int]


def entry_name(fragment: Fragment) -> str:
    return f"{fragment.number:08}.json"


def pending(fragments: Sequence[Fragment], directory: Path) -> list[Fragment]:
    """Return plan minus done; a fragment whose `done` entry is torn is not done."""
    names = names_in(directory / DONE)
    torn = _torn(directory, names)
    return [f for f in fragments if entry_name(f) not in names or entry_name(f) in torn]


def forget_torn(directory: Path) -> None:
    """Delete `done` entries that are not whole, each with a line in the log: their fragments are done again."""
    for name in sorted(_torn(directory, names_in(directory / DONE))):
        log.warning("%s is empty or torn; its fragment is done again", directory / DONE / name)
        remove(directory / DONE / name)


def _torn(directory: Path, names: set[str]) -> set[str]:
    """Return the entries that are not whole; an object of a store always is."""
    if isinstance(directory, Remote):
        return set()
    return {name for name in names if ENTRY.fullmatch(name) and not _is_whole(directory / DONE / name)}


def _is_whole(path: Path) -> bool:
    try:
        return _is_entry(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return False
    except IsADirectoryError:
        raise UserError(f"{path} is a folder where a file belongs; move it away, or choose another folder") from None


def _is_entry(tree: Any) -> bool:
    if not isinstance(tree, dict):
        return False
    counted = all(type(tree.get(name)) is int and tree[name] >= 0 for name in FACTS[:3])
    reasons = tree.get("reasons")
    return counted and isinstance(reasons, dict) and all(type(number) is int for number in reasons.values())


def read_entry(path: Path) -> dict[str, Any]:
    """Return a `done` entry.

    Raises:
        UserError: it is missing or damaged.
    """
    found = read_json(path)
    if not _is_entry(found):
        raise UserError(
            f"{path} is no account of a fragment; delete it, then run the same command again: it does those rows again"
        )
    return dict(found)


def count(directory: Path, planned: Sequence[Fragment] = ()) -> Counts:
    """Sum of the `done` entries.

    Raises:
        UserError: one is damaged, or it is of other rows than the planned fragment of its number.
    """
    wanted = {entry_name(fragment): rows_of(fragment) for fragment in planned}
    totals: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    paths = sorted((directory / DONE).glob("*.json"))
    for path, entry in zip(paths, map_ordered(read_entry, paths, threads_for(directory)), strict=True):
        # Entries of old do not say what rows they are of; they are believed.
        if entry.get("of", found := wanted.get(path.name)) != found and found:
            raise UserError(
                f"{path} is the account of {entry['of']}, and the plan has {found} under that number; delete it, then "
                "run the same command again: it does those rows again"
            )
        totals.update({name: entry[name] for name in FACTS[:3]})
        reasons.update(entry["reasons"])
    return Counts(totals["read"], totals["written"], totals["quarantined"], dict(reasons))


def close(stage: str, planned: Sequence[Fragment], directory: Path, folder: Path | None = None) -> Counts:
    """Sum of the `done` entries of a stage that is finished: one of every planned fragment, and no other.

    So with the parts in `folder`, where every fragment has one there.

    Raises:
        SaferError: fragments are not done or lack their part, or there is what belongs to no planned fragment.
    """
    missing = pending(planned, directory)
    if missing:
        raise SaferError(unfinished(stage, missing, len(planned)))
    _compare(stage, {entry_name(fragment) for fragment in planned}, directory / DONE, "*.json")
    if folder is not None:
        _compare(stage, {part_name(fragment.number) for fragment in planned}, folder, PARTS)
    return count(directory, planned)


def _compare(stage: str, wanted: set[str], folder: Path, pattern: str) -> None:
    """Raises SaferError unless the files of a pattern in a folder are those wanted."""
    found = {name for name in names_in(folder) if fnmatchcase(name, pattern)}
    if missing := sorted(wanted - found):
        raise SaferError(
            f"{stage}: {folder / missing[0]} is missing, though its fragment is done ({len(missing)} such files); "
            f"delete the `{DONE}` entry of that number, and run the same command again"
        )
    if strange := sorted(found - wanted):
        raise SaferError(
            f"{stage}: {folder / strange[0]} is of no planned fragment ({len(strange)} such files, {len(wanted)} "
            "fragments planned); move it away, or start again with --fresh"
        )


def unfinished(stage: str, missing: Sequence[Fragment], total: int, why: str = "") -> str:
    """Return the line for a stage that did not come to its end: what is missing, and how to go on."""
    first = missing[0]
    return (
        f"{stage}: {len(missing)} of {total} fragments are not done, first number {first.number} "
        f"({first.path}, rows {first.start} to {first.stop - 1}){why}; "
        "run the same command again: finished work is kept"
    )


def rows_of(fragment: Fragment) -> str:
    """Return which rows a fragment is, as its `done` entry says."""
    return f"{fragment.file}#{fragment.start}-{fragment.stop - 1}"


def entry(read: int, written: int, reasons: Sequence[str], **facts: Any) -> dict[str, Any]:
    """Return what is written down of a finished fragment."""
    kinds = dict(Counter(reason.split(":")[0] for reason in reasons))
    return {"read": read, "written": written, "quarantined": len(reasons), "reasons": kinds, **facts}


# Trainings


def trained_already(state: Path) -> dict[str, Any] | None:
    """The metrics of a training that ended, but whose artifact was not closed; what is torn tells none."""
    try:
        return dict(json.loads((state / METRICS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None


def close_training(metrics: dict[str, Any], state: Path) -> None:
    """Write down that a training has ended, once what it made is on the disk."""
    sync_tree(state.parent)
    write_json(metrics, state / METRICS)
