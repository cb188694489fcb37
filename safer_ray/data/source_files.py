"""The files of a source, and what they are called: names are relative to the source, wherever it lies.

What lies below a source and is no part of it is left out, and told: hidden folders and files, files that hold no rows,
other splits than the one asked for, what this package has written (artifacts, finished or not, and audits), and where
the asking command itself writes. A folder that is named itself is
read; of an artifact, its rows alone; of an audit, what lies beside all that it has written.
"""

import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from safer_ray.config.sections import SourceConfig
from safer_ray.data.audit_files import OWN_FILES, REVIEWS
from safer_ray.data.hub import hub_splits, load_dataset
from safer_ray.data.partitions import check_partitions
from safer_ray.data.side_files import ALWAYS, side_files, some
from safer_ray.data.splits import USUAL, choose, of_split
from safer_ray.errors import UserError
from safer_ray.storage.artifacts import PLAN, SCRATCH, SETTINGS_FILE, SETTINGS_KEYS
from safer_ray.storage.files import as_path
from safer_ray.storage.locations import check_utf8
from safer_ray.storage.marks import MANIFEST, MANIFEST_KEYS
from safer_ray.storage.remote import Remote, fits
from safer_ray.storage.rows import ENDINGS, kind_of

ROWS = "pairs"  # the folder of pairs in an artifact that holds others, too
BOOKS = {MANIFEST, PLAN, "quarantine", "done", *SCRATCH}  # of an artifact, beside its rows
WRITTEN = {*OWN_FILES, REVIEWS}  # by audits, beside which data may lie
log = logging.getLogger(__name__)
_FROM_TABS = "pandas.read_csv(FILE, sep='\\t').to_csv(OTHER, index=False)"


class Found(NamedTuple):
    """The files of a source, and what was left out."""

    files: list[Path]
    left_out: dict[str, int]  # folder -> data files in it
    told: tuple[str, ...] = ()  # what else is left out, and what was chosen


def _is_hidden(path: Path) -> bool:
    return path.name.startswith((".", "_"))


def _has_data_name(path: Path) -> bool:
    return not _is_hidden(path) and path.name not in ALWAYS and kind_of(path)[0] is not None


def place_of(source: SourceConfig) -> Path:
    """Return what a source's path means: a file, a folder or a glob; a hub name stays one."""
    if source.path.startswith("hub:"):
        return Path(source.path)
    path = as_path(source.path)
    return path if isinstance(path, Remote) else Path(os.path.abspath(path))


def _before_magic(path: Path) -> Path:
    """Return the folder that a glob's first wildcard stands in."""
    while any(glob.has_magic(part) for part in path.parts):
        path = path.parent
    return path


def root_of(source: SourceConfig) -> Path:
    """Return the folder or file that the names of a source's files start from."""
    root = place_of(source)
    if isinstance(root, Remote) or not root.exists():  # of objects it is not asked: a bucket holds no file called `*`
        root = _before_magic(root)
    return root


def file_name(path: Path, source: SourceConfig) -> str:
    """Return a file's path inside the source's folder (or before a glob's first wildcard), else its base name."""
    root = root_of(source)
    return path.relative_to(root).as_posix() if path.is_relative_to(root) and path != root else path.name


def source_files(source: SourceConfig) -> list[Path]:
    """Return the files of a source, as `find_files` finds them."""
    return find_files(source).files


def find_files(source: SourceConfig, apart: Sequence[Path] = ()) -> Found:
    """Find the files of a source, sorted by path, without what lies in folders `apart` below it; a hub name is fetched.

    Raises:
        UserError: a path that is missing, empty or of an unknown kind, a hub name that cannot be loaded, a split that
            is not there, a saved data set of which a selection is to be read, or a folder as of `check_partitions`.
    """
    if source.path.startswith("hub:"):
        return _on_hub(source)
    path = place_of(source)
    if path.is_file():
        if kind_of(path)[0] is None:
            tabs = path.name.lower().endswith((".tsv", ".tab"))
            remedy = f"; write it anew, say by {_FROM_TABS}" if tabs else ""
            raise UserError(f"{source.path}: unknown kind of file; supported are {ENDINGS}{remedy}")
        of_split([path.name], source.asked_split(), source.path)
        return Found([path], {})
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _saved(path, source.asked_split())
    if not path.is_dir() and not glob.has_magic(source.path):
        raise UserError(f"no file, folder or glob at {source.path}; check the path, or write hub:OWNER/NAME")
    below = _Below(path, apart)
    kept, left_out = below.part()
    for file in kept:
        check_utf8(file)
        if not isinstance(file, Remote) and not file.exists():
            raise UserError(
                f"{file} is a link that leads nowhere; put back what it leads to (`git annex get`, a whole download), "
                "or leave it out by a glob"
            )
    aside = side_files(kept)
    kept = [file for file in kept if file not in aside]
    told = below.told(aside)
    if not kept:
        where = f", other than those in {next(iter(left_out))}, which is left out" if left_out else ""
        raise UserError("; ".join([f"{source.path}: no data files there{where}", *told, f"supported are {ENDINGS}"]))
    names = [file.relative_to(below.root).as_posix() for file in kept]
    check_partitions(names)
    wanted, of_splits = of_split(names, source.asked_split(), source.path)
    return Found([file for file, is_one in zip(kept, wanted, strict=True) if is_one], left_out, (*told, *of_splits))


def _on_hub(source: SourceConfig) -> Found:
    asked = source.asked_split()
    told: tuple[str, ...] = ()
    splits = hub_splits(source.path)
    if splits and (asked is None or asked.isidentifier()):  # else it may be a slice: train[:1%]
        asked, told = choose(asked, splits, source.path)
    files = _saved(load_dataset(source.path, asked or USUAL), None).files
    return Found(files, {}, told)


class _Below:
    """Everything below the root of a source that is a folder or a glob; each folder is looked at once."""

    def __init__(self, place: Path, apart: Sequence[Path]) -> None:
        self.root = place if place.is_dir() else _before_magic(place)
        pattern = self.pattern = place.relative_to(self.root).parts
        self.hidden = not any(part.startswith((".", "_")) for part in pattern)  # else a glob names hidden folders
        self.apart = {real_path(path) for path in apart}
        self.known: dict[Path, Path | None] = {}
        self.files: list[Path]
        if isinstance(self.root, Remote):  # of objects nothing more need be asked
            flat = len(pattern) == 1 and "**" not in pattern
            everything = set(self.root.glob(*pattern) if flat else self.root.rglob("*"))
            self.is_there: Callable[[Path], bool] = everything.__contains__
            wanted = (file for file in everything if not pattern or fits(file.relative_to(self.root).parts, pattern))
            self._part_by_name(wanted)
            return
        self.is_there = Path.is_file
        paths = map(Path, glob.iglob(str(place), recursive=True)) if pattern else place.rglob("*")
        self._part_by_name(path for path in paths if path.is_file() or (path.is_symlink() and not path.exists()))

    def _part_by_name(self, files: Iterable[Path]) -> None:
        found = sorted(files)
        self.files = [file for file in found if _has_data_name(file)]
        self.others = [file for file in found if not _has_data_name(file)]
        self._look_at_root()

    def told(self, aside: set[Path]) -> tuple[str, ...]:
        """Return which files are left out for their names, or since they are some that lie `aside`."""
        others = [file for file in self.others if not self._book(file) and not self._left_out(file.parent)]
        hidden, known = set(filter(_is_hidden, others)), {file for file in others if kind_of(file)[0] is not None}
        named = (
            ("hidden files are left out", hidden & known),
            ("files that hold no rows are left out", (known | aside) - hidden),
            ("files of other kinds are not read", {*others} - hidden - known),
        )
        return tuple(f"{what}: {some([self._name(file) for file in sorted(files)])}" for what, files in named if files)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix().encode(errors="replace").decode()

    def _look_at_root(self) -> None:
        """See which names in the root are no data: what an audit wrote, or an artifact beside its rows."""
        self.written = WRITTEN if self._is_audit(self.root) else set()
        self.is_artifact = not self.written and is_artifact(self.root, self.is_there)
        rows = self.root / ROWS
        self.has_pairs = self.is_artifact and any(file.is_relative_to(rows) for file in self.files)
        asked = {f"{folder}/{SETTINGS_FILE}" for folder in self.apart}  # of the command itself, which begins with that
        own = [f for f in self.files if f.name == SETTINGS_FILE and real_path(f) in asked and _holds(f, SETTINGS_KEYS)]
        self.files = [file for file in self.files if file not in own]

    def part(self) -> tuple[list[Path], dict[str, int]]:
        """Part the files of the source from those in folders that are no part of it, which are counted."""
        found = {file: self._book(file) or self._left_out(file.parent) for file in self.files}
        left_out = Counter(str(folder) for folder in found.values() if folder is not None)
        left_out.update(self._behind_links())
        return [file for file, folder in found.items() if folder is None], dict(left_out)

    def _book(self, file: Path) -> Path | None:
        """Return what of a root that is an audit or an artifact a file belongs to, if that is no data: what an audit
        wrote; beside the rows of an artifact all but `pairs/` where it has that, as curated sets do."""
        if not (self.written or self.is_artifact) or not file.is_relative_to(self.root):
            return None
        name = file.relative_to(self.root).parts[0]
        is_beside = name != ROWS if self.has_pairs else name in (self.written or BOOKS)
        return self.root / name if is_beside else None

    def _behind_links(self) -> dict[str, int]:
        """Count the data files behind links to folders, which a listing does not follow: they may go in rings."""
        if self.pattern or isinstance(self.root, Remote):
            return {}
        links = [path for path in self.root.rglob("*") if path.is_symlink() and path.is_dir()]
        counts = {str(link): sum(map(_has_data_name, link.rglob("*"))) for link in links}
        return {link: count for link, count in counts.items() if count}

    def _left_out(self, folder: Path) -> Path | None:
        """Return the folder, or the one above it, that is no part of the source; None where all are."""
        if folder == self.root or not folder.is_relative_to(self.root):
            return None
        if folder not in self.known:
            self.known[folder] = self._left_out(folder.parent) or (folder if self._is_apart(folder) else None)
        return self.known[folder]

    def _is_apart(self, folder: Path) -> bool:
        hidden = self.hidden and _is_hidden(folder) and "=" not in folder.name  # `_a=1` is a partition, as for Spark
        if hidden or real_path(folder) in self.apart:
            return True
        return self._is_audit(folder) or is_artifact(folder, self.is_there)

    def _is_audit(self, folder: Path) -> bool:
        return self.is_there(folder / SETTINGS_FILE) and _holds(folder / SETTINGS_FILE, SETTINGS_KEYS)


def is_artifact(folder: Path, is_there: Callable[[Path], bool] = Path.is_file) -> bool:
    """Return whether a folder holds a manifest of ours."""
    return is_there(folder / MANIFEST) and _holds(folder / MANIFEST, MANIFEST_KEYS)


def real_path(path: Path) -> str:
    """Return where a path of this machine leads to; the URI of an object."""
    return str(path) if isinstance(path, Remote) else os.path.realpath(path)


def _holds(path: Path, keys: set[str]) -> bool:
    """Return whether a file is a JSON object with these keys."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and tree.keys() >= keys


def _saved(folder: Path, asked: str | None) -> Found:
    """Find the Arrow files of a `save_to_disk` folder, or of one split of a saved dict."""
    choice = None
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            choice = choose(asked, [*map(str, splits)], str(folder))
            folder = folder / choice.split
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
        own, chosen = state.get("_split"), state.get("_indices_data_files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is a damaged save_to_disk folder ({error!r}); save it again") from error
    if chosen:
        raise UserError(
            f"{folder} holds a selection of its rows (_indices_data_files in state.json), which is not read; write the "
            "rows themselves: load_from_disk(FOLDER).flatten_indices().save_to_disk(OTHER)"
        )
    if choice is None and asked is not None:
        choose(asked, [own if isinstance(own, str) else USUAL], str(folder))
    return Found(files, {}, choice.told if choice else ())
