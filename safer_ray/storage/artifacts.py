"""Artifact directories: named by their recipe, complete when they hold a manifest, never half-written.

A stage works in `.partial-NAME/`, which survives a kill and is taken up again by the next run, and is renamed to
`NAME/` when its manifest is in place.
"""

import contextlib
import importlib.metadata
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.storage.contents import PLAN, SCRATCH, artifact_hash, content_hash, tables_in
from safer_ray.storage.files import (
    PLAN_LOST,
    as_path,
    damaged,
    make_folder,
    move,
    names_in,
    read_parquet,
    stamp,
    sync_tree,
    write_json,
    write_parquet,
)
from safer_ray.storage.fingerprints import begins_as, digest_of, needs_digest
from safer_ray.storage.locations import check_utf8
from safer_ray.storage.marks import MANIFEST, RED_TEAM_MARK, mark_files, marks_of, together
from safer_ray.storage.recipes import Artifact, Recipe, Result, read_manifest
from safer_ray.storage.replacing import check_doomed, check_kind, check_outside

DONE = "done"  # the folder of what is finished of a stage
SETTINGS_FILE = "audit.json"  # in the folder of an audit
SETTINGS_KEYS = {"auditor", "source", "scores", "path"}
PACKAGES = ("safer_ray", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "regex", "rensa")


@dataclass(frozen=True)
class Fragment:
    """A numbered range of rows of one file: the unit of work, of commit and of resume."""

    number: int
    source: int  # index of the source
    path: str
    start: int  # first row, 0-based
    stop: int  # one past the last
    size: int  # bytes of the file, as far as it was planned
    etag: str  # modification time in ns, as text, or an object's ETag
    offset: int = 0  # byte at which row `start` begins, where the file can be entered there
    digest: str = ""  # sha256 of the first `size` bytes; empty where nobody took it
    file: str = ""  # what row keys call the file: its name relative to the source; empty in plans of old


def open_artifact(path: Path, stage: str | None = None) -> Artifact:
    """The artifact at `path`, or the foreign directory or file there, named by its content.

    Raises:
        UserError: nothing there, a torn manifest or somebody else's, or an artifact of another stage.
    """
    if not path.exists():
        raise UserError(f"no such {stage or 'input'}: {path}; check the path, or run the stage that writes it")
    if not (path / MANIFEST).is_file():
        return foreign(path, f"{stage or 'foreign'}:{content_hash(path)}")
    manifest = read_manifest(path)
    found, name = manifest["stage"], manifest["name"]
    if stage is not None and found != stage:
        raise UserError(f"{path} holds {found!r}, wanted {stage!r}; pass the directory of that stage")
    return Artifact(path, name, manifest)


def foreign(path: Path, name: str) -> Artifact:
    """A directory or file that is no artifact, under a name that tells its content, with what it is known to carry."""
    found = marks_of(path)
    licence = {"licence": list(found.licence)} if found.licence else {}
    return Artifact(path, name, licence | ({"red_team": True} if found.red_team else {}))


def part_name(number: int) -> str:
    return f"part-{number:08}.parquet"


def part_files(directory: Path) -> list[Path]:
    """The Parquet files directly in `directory`, by name.

    Raises:
        UserError: there are none.
    """
    files = tables_in(directory)
    if not files:
        raise UserError(f"no Parquet files in {directory}; pass the directory that a stage wrote")
    for file in files:
        check_utf8(file)
    return files


def read_parts(directory: Path, columns: list[str] | None = None) -> pa.Table:
    """All parts of a directory as one table, in fragment order."""
    return pa.concat_tables([read_parquet(path, columns) for path in part_files(directory)])


def part_fragments(directory: Path) -> list[Fragment]:
    """The parts of an artifact as fragments: one each, so downstream parts keep their numbers and their rows."""
    fragments = []
    for number, path in enumerate(part_files(directory)):
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            raise damaged(path, error) from None
        fragments.append(Fragment(number, 0, str(path), 0, rows, *stamp(path), file=path.name))
    return fragments


def read_fragment(fragment: Fragment, columns: list[str] | None = None) -> pa.Table:
    """The rows of a Parquet fragment."""
    return read_parquet(Path(fragment.path), columns).slice(fragment.start, fragment.stop - fragment.start)


def save_plan(fragments: list[Fragment], directory: Path) -> list[Fragment]:
    """Write `plan.parquet`, or return the one that is there if it names the same files, wherever these lie now.

    Raises:
        UserError: an input changed since the plan was made, or it is gone.
    """
    path = directory / PLAN
    if not path.exists():
        check_unplanned(directory)
        # Once, when planned: on going on a changed time alone is forgiven where the bytes are the same.
        fragments = with_digests(fragments)
        write_plan(fragments, path)
        return fragments
    names = {fragment.path: fragment.file for fragment in fragments}  # which a plan of old does not tell
    planned = [replace(f, file=f.file or names.get(f.path, f.path)) for f in read_plan(path)]
    # The common case, which costs no reading of files.
    if planned == fragments:
        return planned
    now = {_identity(fragment): fragment for fragment in fragments}
    known = {_identity(fragment): fragment for fragment in planned}
    # A file that went or came changes which rows a fragment's number means, so parts that are done would be of others.
    for identity in sorted(known.keys() ^ now.keys()):
        _refuse(now.get(identity) or known[identity], directory)
    for identity, fragment in now.items():
        if not begins_as(as_path(fragment.path), (fragment.size, fragment.etag), known[identity]):
            _refuse(fragment, directory)
    return [replace(f, path=now[_identity(f)].path, etag=now[_identity(f)].etag) for f in planned]


def check_unplanned(directory: Path, folders: Sequence[str] = ()) -> None:
    """Raises UserError where a folder without a plan holds what was done by one: nobody knows of which rows."""
    for folder in (DONE, *folders):
        if made := sorted(name for name in names_in(directory / folder) if not name.startswith(".")):
            raise UserError(
                f"{directory / folder / made[0]} was done by a plan, but {directory / PLAN} is gone, which says what "
                f"rows it is of ({len(made):,} such files); put that file back, or start again with --fresh, which "
                "does all of them again"
            )


def _identity(fragment: Fragment) -> tuple[int, str, int]:
    """Return what a file is known by, but for its bytes."""
    return fragment.source, fragment.file, fragment.size


def _refuse(fragment: Fragment, directory: Path) -> None:
    raise UserError(
        f"{fragment.path} changed since the unfinished run in {directory} began; "
        "put it back, or start again with --fresh"
    )


def with_digests(fragments: Sequence[Fragment]) -> list[Fragment]:
    """Fragments that know the bytes of their files, each of which is read once."""
    files = {(f.path, f.size): f.etag for f in fragments if not f.digest and needs_digest(as_path(f.path), f.etag)}
    digests = {key: digest_of(as_path(key[0]), key[1]) for key in files}
    return [replace(f, digest=f.digest or digests.get((f.path, f.size), "")) for f in fragments]


def write_plan(fragments: Sequence[Fragment], path: Path) -> None:
    columns = {name: [getattr(f, name) for f in fragments] for name in Fragment.__dataclass_fields__}
    write_parquet(pa.table(columns), path)


def read_plan(path: Path) -> list[Fragment]:
    """The fragments that `write_plan` wrote; none where there is no plan.

    Raises:
        UserError: it is damaged, or no plan of ours.
    """
    if not path.exists():
        return []
    rows = read_parquet(path)
    known = {name: pa.int64() if kind is int else pa.string() for name, kind in Fragment.__annotations__.items()}
    strange = [f.name for f in rows.schema if known.get(f.name) != f.type or rows[f.name].null_count]
    missing = sorted({"number", "source", "path", "start", "stop", "size", "etag"} - set(rows.column_names))
    if strange or missing:
        raise UserError(f"{path} is no plan of ours: {(strange + missing)[0]!r} is not as it should be; {PLAN_LOST}")
    return [Fragment(**row) for row in rows.to_pylist()]


def versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _close(recipe: Recipe, result: Result, seconds: float, partial: Path) -> None:
    """Write the manifest of what a stage wrote; it comes last, when the files are marked and on the disk."""
    marks = together(recipe.inherited, result.own)
    told: dict[str, Any] = {"red_team": marks.red_team}
    if marks.red_team:
        told["red_team_from"] = recipe.red_team_from + ["itself"] * result.own.red_team
        mark_files(partial, {PLAN, "done", *SCRATCH})
    # The manifest is what makes it an artifact: all else has to be on the disk before it, or a power cut may leave
    # one that looks whole, with empty files.
    sync_tree(partial)
    values = asdict(result)
    wall_seconds = values.pop("wall_seconds")
    del values["own"]
    manifest = {
        "stage": recipe.stage,
        "name": recipe.name,
        "version": recipe.version,
        "config": recipe.config,
        "inputs": recipe.names,
        "packages": versions(),
        "wall_seconds": round(seconds if wall_seconds is None else wall_seconds, 3),
        **values,
        "licence": list(marks.licence),
        **told,
        "content_sha256": artifact_hash(partial),
    }
    write_json(manifest, partial / MANIFEST)


def _is_closed(partial: Path) -> bool:
    """Return whether a whole manifest is there."""
    try:
        return (partial / MANIFEST).is_file() and bool(open_artifact(partial).manifest)
    except UserError:
        return False


def _drop_if_nothing_is_done(partial: Path) -> None:
    """Remove what a refused command began where no part, checkpoint or refused row is in it."""
    if all(file.name == PLAN for file in partial.rglob("*") if not file.is_dir()):
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class Place:
    """The place of artifacts: `root/NAME` by recipe, or exactly `out`."""

    root: Path
    out: Path | None = None
    fresh: bool = False
    kept: Collection[str] = ()  # names that `fresh` does not make again
    dry: bool = False  # name artifacts, build none
    reads: Sequence[Path] = ()  # what the command reads besides the inputs of its recipes; it is never deleted
    on_stage: Callable[[str, Artifact | None], None] = lambda name, artifact: None
    building: dict[Path, Recipe] = field(default_factory=dict, repr=False, compare=False)  # by partial directory

    def path(self, recipe: Recipe) -> Path:
        return self.out or self.root / recipe.name

    def partial(self, recipe: Recipe) -> Path:
        """Return where it is built."""
        return self.path(recipe).with_name(f".partial-{recipe.name}")

    def find(self, recipe: Recipe) -> Artifact | None:
        """The complete artifact of this recipe, if it is there.

        Raises:
            UserError: `out` holds something else, or lies in an input; or `fresh` would delete what is read.
        """
        path, fresh = self.path(recipe), self.fresh and recipe.name not in self.kept
        if self.out:
            check_outside(path, recipe.folders)
        if fresh:
            check_doomed((path, self.partial(recipe)), (*self.reads, *recipe.paths))
        if not path.exists():
            return None
        if not (path / MANIFEST).is_file():
            if not path.is_dir() or any(path.iterdir()):
                raise UserError(f"{path} is not empty and holds no artifact; choose another --out")
            return None
        if fresh:
            if self.out:
                check_kind(path, recipe.stage)
            return None
        artifact = open_artifact(path)
        if artifact.name != recipe.name:
            raise UserError(
                f"{path} holds {artifact.name}, this command makes {recipe.name}: the config or the inputs differ; "
                "choose another --out, or start again with --fresh"
            )
        if recipe.inherited.red_team and not artifact.red_team:
            return None  # made before marks were handed on; it is made again
        return artifact

    def metadata(self, directory: Path) -> dict[str, str]:
        """Return what the tables say that are written below `directory`, where something is built, of what it is made
        of."""
        recipe = self.building.get(directory)
        return RED_TEAM_MARK if recipe and recipe.inherited.red_team else {}

    def make(self, recipe: Recipe, build: Callable[[Path], Result]) -> Artifact:
        """The artifact of `recipe`: found complete, or built in its partial directory and renamed when whole."""
        return self.make_all([recipe], lambda partials: {name: build(path) for name, path in partials.items()})[0]

    def make_all(
        self, recipes: Sequence[Recipe], build: Callable[[dict[str, Path]], dict[str, Result]]
    ) -> list[Artifact]:
        """As `make`, of several recipes; those missing are built by one call, from names to partial directories."""
        unique = {recipe.name: recipe for recipe in recipes}
        made = {name: artifact for name, recipe in unique.items() if (artifact := self.find(recipe)) is not None}
        for name, artifact in made.items():
            self.on_stage(name, artifact)
        missing = {name: recipe for name, recipe in unique.items() if name not in made}
        for name in missing:
            self.on_stage(name, None)
        if self.dry:
            made |= {name: Artifact(self.path(recipe), name) for name, recipe in missing.items()}
        elif missing:
            for artifact in self._build(missing, build):
                made[artifact.name] = artifact
                self.on_stage(artifact.name, artifact)
        return [made[recipe.name] for recipe in recipes]

    def _build(
        self, recipes: dict[str, Recipe], build: Callable[[dict[str, Path]], dict[str, Result]]
    ) -> Iterator[Artifact]:
        # Beside where they end, on the same file system: there the rename that publishes them is atomic.
        partials = {name: self.partial(recipe) for name, recipe in recipes.items()}
        with explain_disk_errors(self.root):
            for partial in partials.values():
                self._begin(partial)
            # One may be whole already: its command was killed between the manifest and the rename.
            todo = {name: partial for name, partial in partials.items() if not _is_closed(partial)}
            self.building.update({partial: recipes[name] for name, partial in todo.items()})
            began = time.time()
            try:
                results = build(todo) if todo else {}
            except UserError:
                for partial in todo.values():
                    _drop_if_nothing_is_done(partial)
                raise
            for name, result in results.items():
                _close(recipes[name], result, time.time() - began, todo[name])
            for name, partial in partials.items():
                self.building.pop(partial, None)
                yield self._finish(recipes[name], partial)

    def _begin(self, partial: Path) -> None:
        if self.fresh:
            shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        for torn in [file for file in partial.rglob(".*") if file.is_file()]:
            torn.unlink()  # what a killed process wrote beside and did not rename

    def _finish(self, recipe: Recipe, partial: Path) -> Artifact:
        path = self.path(recipe)
        for scratch in SCRATCH:
            shutil.rmtree(partial / scratch, ignore_errors=True)
        _open_to_all_readers(partial)
        # A rename takes the place of nothing that holds files; `find` has seen that what is here may go.
        if path.exists():
            shutil.rmtree(path)
        move(partial, path)
        return open_artifact(path)


def _open_to_all_readers(partial: Path) -> None:
    """Give weights, which safetensors writes for their owner alone, the mode of the files beside them."""
    mode = (partial / MANIFEST).stat().st_mode & 0o777
    for file in partial.rglob("*.safetensors"):
        if not file.is_symlink():
            file.chmod(mode)
