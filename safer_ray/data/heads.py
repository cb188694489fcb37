"""Read the first rows of a file for its format, and for what holds of all of its rows."""

import functools
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from safer_ray.config.sections import SourceConfig
from safer_ray.data.rows import parse_row
from safer_ray.data.shapes import shape_of
from safer_ray.errors import UserError
from safer_ray.formats.declaration import Refused
from safer_ray.formats.registry import AUTO, check_options, look_at
from safer_ray.formats.tables import Table
from safer_ray.storage.files import as_path
from safer_ray.storage.rows import read_rows

HEAD = 100  # rows that are looked at


def table_as_stamped(path: Path, etag: str, source: SourceConfig) -> Table:
    """Return what the head of a file, as it was stamped, says of it; it is read once a process.

    Raises:
        UserError: the file is damaged, its columns fit no preference format, or not the options of its source.
    """
    return _table_of(str(path), etag, source) if etag else _table(path, source)


@functools.lru_cache(maxsize=1024)
def _table_of(uri: str, etag: str, source: SourceConfig) -> Table:
    return _table(as_path(uri), source)


def _table(path: Path, source: SourceConfig) -> Table:
    """Return the source's format, or the one that is detected (canonical where no row can be read), with what else the
    first rows say."""
    head = list(islice(_readable(path, source.encoding), HEAD))
    if source.format == AUTO and (instead := shape_of(head)):
        raise UserError(f"{path}: {instead}")
    try:
        found = look_at(head, source.format, source.options())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if source.format == AUTO:
        try:
            check_options(found.format, source.asked())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return found


def _readable(path: Path, encoding: str | None) -> Iterator[dict[str, Any]]:
    """Yield the rows at the head of a file that can be read."""
    for _, raw, refused in read_rows(path, 0, 10 * HEAD, encoding=encoding):
        with suppress(Refused):
            if refused is None:
                yield parse_row(raw)
