"""Splits of a data set: which one of a saved dict or a hub name is read, and which one a file's name tells of."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePath, PurePosixPath
from typing import NamedTuple

from safer_ray.errors import UserError

USUAL = "train"
_WORDS = {  # as `datasets` knows them in names of files and folders
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(?:.*-)?(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b")
_NO_SPLITS = {"data", "part", "shard", "chunk"}  # of what writers call the pieces of one split
_BETWEEN = re.compile(r"[-._ \d]+")


class Choice(NamedTuple):
    """A split, and what there is to tell of the choice."""

    split: str
    told: tuple[str, ...]


def choose(asked: str | None, splits: Sequence[str], where: str) -> Choice:
    """Choose the split that is asked for; where none is, `train`, or the only one there is.

    Raises:
        UserError: there is none of that name, or several and no `train`.
    """
    split = asked or (splits[0] if len(splits) == 1 else USUAL)
    if split not in splits:
        raise UserError(
            f"{where} has no split {split!r}; it has {', '.join(splits)}: choose one by --split NAME (`split: NAME` "
            "in a config)"
        )
    others = [name for name in splits if name != split]
    if others:
        return Choice(split, (f"split {split} is read; left out: {', '.join(others)} (--split NAME reads another)",))
    return Choice(split, () if split in (asked, USUAL) else (f"split {split} is read, the only one there is",))


def split_of(name: str | PurePath) -> str | None:
    """Return the split that a file's name tells of, or else its folders: `data/test_prefs-00000-of-00001.parquet`,
    `dev.jsonl`, `train/0.parquet`; None where they tell of none."""
    *folders, file = PurePosixPath(name).parts
    shard = _SHARD.match(file)
    if shard and shard["split"] not in _NO_SPLITS:
        return _WORDS.get(shard["split"], shard["split"])
    return next((found for part in (file, *reversed(folders)) if (found := _word_in(part))), None)


def _word_in(name: str) -> str | None:
    words = re.sub("_", " ", name.lower())
    return next((_WORDS[word] for word in _BETWEEN.split(words) if word in _WORDS), None)


def of_split(names: Iterable[str], asked: str | None, where: str) -> tuple[list[bool], tuple[str, ...]]:
    """Return which files of a folder are of the split that is asked for, all where none is, and what to tell of it.

    Raises:
        UserError: there is none of that split; where no name tells of any, all are of `train`.
    """
    splits = [split_of(name) for name in names]
    held = Counter(split for split in splits if split)
    if asked is None:
        several = f"files of several splits are read: {_counted(held)} (--split NAME reads one)"
        return [True] * len(splits), (several,) if len(held) > 1 else ()
    wanted = _WORDS.get(asked, asked)
    if not held and wanted == USUAL:
        return [True] * len(splits), ()
    if wanted not in held:
        known = f"its files' names tell of {_counted(held)}" if held else "no file's name tells of a split"
        raise UserError(f"{where} has no split {asked!r}: {known}; choose another --split, or leave it out to read all")
    others = _counted(held - Counter({wanted: held[wanted]}) + Counter({"of no split": splits.count(None)}))
    return [split == wanted for split in splits], (f"split {asked} is read; left out: {others}",) if others else ()


def _counted(held: Counter[str]) -> str:
    return ", ".join(f"{split} ({count:,} file{'s' if count > 1 else ''})" for split, count in sorted(held.items()))
