"""Inputs from outside a run: where sources lie, their names by content, and the accounts of `pairs`."""

import functools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from safer_ray import schema
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.config.sections import PairsConfig, RewardConfig, RunConfig, SourceConfig
from safer_ray.data.hub import PREFIX, pinned, split_name
from safer_ray.data.source_files import Found, file_name, find_files
from safer_ray.data.sources import NOTES, lines_of
from safer_ray.errors import UserError
from safer_ray.features.judge import load_probe
from safer_ray.features.language import FOREIGN, share_of_common_words
from safer_ray.formats.declaration import NO_PREFERENCE
from safer_ray.storage.accounts import read_entry
from safer_ray.storage.artifacts import DONE, Artifact, Place, Result, foreign, part_files
from safer_ray.storage.contents import content_hash
from safer_ray.storage.files import as_path, read_parquet, stamp, write_parquet
from safer_ray.storage.marks import Marks, together
from safer_ray.storage.quarantine import quarantine_rows
from safer_ray.storage.recipes import Input
from safer_ray.storage.remote import Remote

PACKAGE = "package:"
JOB_FOLDER = "_ray_pkg_"  # what Ray names the copies of working directories that jobs start in, and deletes afterwards
SAMPLE = 200  # pairs whose words are counted
log = logging.getLogger(__name__)


def durable_path(path: str | Path) -> Path:
    """An absolute path, since workers may have another current directory; below the home directory where that of this
    process is a job's, which goes away with the job; a URI as it is."""
    path = as_path(path)
    if isinstance(path, Remote) or path.is_absolute() or JOB_FOLDER not in str(Path.cwd()):
        return path.absolute()
    log.warning("%s is relative and a job's working directory is temporary: using %s", path, Path.home() / path)
    return Path.home() / path


def with_lasting_base(config: RewardConfig) -> RewardConfig:
    """The config, with local checkpoints named by their absolute path, and those on the hub by their commit."""
    named = {name: getattr(config, name) for name in ("base", "adapter_base")}
    return config.model_copy(update={name: lasting_name(n) for name, n in named.items() if isinstance(n, str)})


def lasting_name(base: str) -> str:
    """Return the name of a checkpoint that is the same in another folder, and tomorrow."""
    if base.startswith(PACKAGE):
        return base
    return pinned(base, "model") if base.startswith(PREFIX) else str(Path(base).absolute())


def _hashed(path: Path) -> str:
    """A file or a folder by its content, which is read again where a size or a modification time has changed."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return _hashed_as(str(path), tuple((str(file), *stamp(file)) for file in files))


@functools.lru_cache(maxsize=4096)
def _hashed_as(path: str, stamps: tuple[tuple[str, int, str], ...]) -> str:
    return content_hash(Path(path))


def resolve_source(source: SourceConfig, corpus: Artifact | None) -> SourceConfig:
    """A source with a path that says where it lies: in the corpus, or at which commit on the hub."""
    path = source.path
    if path.startswith("corpus:"):
        assert corpus is not None
        path = str(corpus.path / path.removeprefix("corpus:"))
    elif path.startswith(PREFIX):
        path = pinned(path, "dataset")
    return source.model_copy(update={"path": path})


def find_source(resolved: SourceConfig, place: Place, source: SourceConfig) -> Found:
    """The files of a source, without what this command itself writes below it."""
    if source.path.startswith("corpus:"):
        path = Path(resolved.path)
        return find_files(resolved) if path.exists() else Found([path], {})  # a dry run makes no corpus
    return find_files(resolved, [place.out] if place.out else [place.root])


def source_input(source: SourceConfig, resolved: SourceConfig, found: Found, corpus: Artifact | None) -> Input:
    """A source as a recipe names it: its files by name and content, and never where it lies; what its files say of
    themselves is read with them."""
    if source.path.startswith("corpus:"):
        assert corpus is not None
        return file_of(corpus, source.path.removeprefix("corpus:"))
    if resolved.path.startswith(PREFIX) and split_name(resolved.path)[1] is not None:
        return Input(resolved.path)
    named = schema.to_json([[file_name(file, resolved), _file_hash(file)] for file in found.files])
    return Input(named, paths=tuple(found.files))


def _file_hash(file: Path) -> str:
    """A file by its content, an object by what its store says of it."""
    if not isinstance(file, Remote):
        return _hashed(file)
    size, etag = stamp(file)
    return f"{size}-{etag}"


def file_of(artifact: Artifact, name: str) -> Input:
    return Input(f"{artifact.name}/{name}", (artifact,))


def place_of_run(config: RunConfig, *, fresh: bool = False, **options: Any) -> Place:
    """Return where the artifacts of a run go; with `fresh`, none is deleted that its sources, base, probe or text lie
    in."""
    reads: list[Path] = []
    if fresh:
        local = [source for source in config.sources if not source.path.startswith(("corpus:", PREFIX))]
        reads += [file for source in local for file in find_files(source).files]
        reward = config.reward
        named = (
            config.judge.exchanges,
            reward.base,
            reward.use,
            reward.adapter_base,
            config.sae.warm_start and config.sae.warm_start.text,
        )
        reads += [Path(name) for name in named if isinstance(name, str)]
    return Place(durable_path(config.root) / config.name, fresh=fresh, reads=reads, **options)


def check_file(path: Path) -> None:
    """Raises UserError where there is no file."""
    if not path.is_file():
        raise UserError(f"no such file: {path}; check the path")


def file_input(path: Path) -> Artifact:
    """A file by its content.

    Raises:
        UserError: there is none.
    """
    check_file(path)
    return foreign(path, f"{path.name}:{_hashed(path)}")


def base_input(base: str, reading: Reading = AS_IT_COMES) -> Artifact | Input:
    """A checkpoint to train on from, by its content, or by its name and commit on the hub; a local one may be a reward
    model of ours. An adapter's name tells that of its base, too.

    Raises:
        UserError: a local one lacks weights, or holds such as are not read.
    """
    if base.startswith(PREFIX) and not Path(split_name(base)[0]).exists():
        return Input(base)
    from safer_ray.reward.bases import check_weights_of, resolve_base  # here, since it imports transformers

    path = Path(resolve_base(base)[0])
    check_weights_of(path, reading.bin_weights)
    return with_adapter_base(foreign(path, _hashed(path)), reading)


def with_adapter_base(artifact: Artifact, reading: Reading) -> Artifact:
    """Return a reward model that, where it is an adapter, is named by what it is merged into, too, and carries what
    that carries.

    Raises:
        UserError: the base is not there, or not known.
    """
    from safer_ray.reward.bases import adapter_base, checkpoint_of

    own = adapter_base(str(artifact.path), artifact.path, reading)
    if own is None:
        return artifact
    checkpoint_of(str(artifact.path), reading)
    base = base_input(lasting_name(own), reading.model_copy(update={"adapter_base": None}))
    marks = together(*(each.marks for each in (artifact, base) if isinstance(each, Artifact)))
    carried = {"licence": list(marks.licence), "red_team": marks.red_team}
    return Artifact(artifact.path, f"{artifact.name}+{base.name}", artifact.manifest | carried)


def resolve_exchanges(name: str, corpus: Artifact | None) -> tuple[str, Input]:
    """The probe's path or name, and what it is in a recipe."""
    if name.startswith("corpus:"):
        assert corpus is not None
        file = name.removeprefix("corpus:")
        return str(corpus.path / file), file_of(corpus, file)
    return name, Input(schema.to_json(load_probe(name).model_dump(mode="json")), paths=(Path(name),))


def tell_language(pairs: Path, exchanges: str) -> None:
    """Tell in a line where pairs do not seem to be in the language of the probe, whose ratings then say little."""
    rows = read_parquet(part_files(pairs)[0], ["chosen", "rejected"]).slice(0, SAMPLE)
    texts = [m["content"] for name in rows.column_names for messages in rows[name].to_pylist() for m in messages]
    share = share_of_common_words(load_probe(exchanges), texts)
    if share is not None and share < FOREIGN:
        log.warning(
            "pairs: %.0f%% of their words are among the commonest of the probe %s, of pairs in its language 40%% or "
            "more: its ratings will say little of these; write a probe in their language (judge.exchanges)",
            *(100 * share, exchanges),
        )


def _take_duplicates(path: Path, seen: set[str], quarantine: Path | None) -> tuple[int, int]:
    """Rows kept and duplicate ids found in one part; with a `quarantine` folder the duplicates are moved there."""
    rows = read_parquet(path)
    twice = []
    for key in rows["pair_id"].to_pylist():
        twice.append(key in seen)
        seen.add(key)
    if not any(twice) or quarantine is None:
        return len(rows), sum(twice)
    mask = pa.array(twice)
    refused = [
        {**row, "position": int(row["row_key"].rpartition("#")[2]), "stage": "pairs"}
        | {"reason": f"duplicate id: an earlier row is {row['pair_id']}, too; `pairs.duplicates: keep` keeps both"}
        for row in rows.filter(mask).select(["row_key", "pair_id", "source"]).to_pylist()
    ]
    write_parquet(schema.table(refused, schema.QUARANTINE), quarantine / f"duplicates-{path.name}")
    write_parquet(rows.filter(pc.invert(mask)), path)
    return len(rows) - len(refused), len(refused)


def close_pairs(out: Path, read: int, config: PairsConfig) -> Result:
    """Deal with duplicate ids, check the share refused, and close the accounts.

    Raises:
        UserError: more than `max_refused_share` was refused, or nothing is left.
    """
    seen: set[str] = set()
    quarantine = out / "quarantine" if config.duplicates == "quarantine" else None
    counts = [_take_duplicates(path, seen, quarantine) for path in part_files(out)]
    written = sum(kept for kept, _ in counts)
    refused_rows = quarantine_rows(out)
    reasons = Counter(reason.split(":")[0] for reason in refused_rows["reason"].to_pylist())
    common = ", ".join(f"{name} ({n})" for name, n in reasons.most_common(3))
    undecided = reasons[NO_PREFERENCE]
    if (failed := len(refused_rows) - undecided) > config.max_refused_share * (read - undecided):
        first = next(text for text in refused_rows["reason"].to_pylist() if not text.startswith(NO_PREFERENCE))
        raise UserError(
            f"pairs: {failed} of {read} rows were refused, more than pairs.max_refused_share "
            f"{config.max_refused_share}: {common}; the first: {first}; see {out / 'quarantine'}"
        )
    if not written:
        raise UserError(f"pairs: no pairs left of {read} rows; {common or 'check the sources and their `part`'}")
    rows_by_kind = {"read": read, "pairs": written, "quarantined": len(refused_rows)}
    rows_by_kind["left_out"] = read - written - len(refused_rows)
    duplicates = reasons["duplicate id"] if quarantine else sum(found for _, found in counts)
    licences = Marks(tuple(s.licence for s in config.sources if s.licence))
    told = _told(out)
    for line in lines_of(told, written):
        log.warning("pairs: %s", line)
    return Result(rows_by_kind, {"reasons": dict(reasons), "duplicates": duplicates, **told}, own=licences)


def _told(out: Path) -> dict[str, Any]:
    """Return the sums of what the fragments' `done` entries say of their pairs (`told_of`)."""
    entries = [read_entry(path) for path in sorted((out / DONE).glob("*.json"))]
    notes = sum((Counter(entry.get(NOTES, {})) for entry in entries), Counter())
    return {"contradicted": sum(entry.get("contradicted", 0) for entry in entries), NOTES: dict(notes)}
