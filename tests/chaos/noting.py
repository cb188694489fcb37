"""`safer-ray audit`, whose actors write down every fragment that they begin: what is begun twice was redone."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from safer_ray.audit import run as audit_run
from safer_ray.cli import app as cli
from safer_ray.storage.work import BatchFn, MapJob

NOTES = "SAFER_RAY_TEST_NOTES"  # the folder where they do
_job = audit_run.Audit.job


class Noted:
    """A batch function that writes down the first row of every table before it works on it."""

    def __init__(self, notes: Path, make: Callable[[], BatchFn]) -> None:
        self.function = make()
        notes.mkdir(parents=True, exist_ok=True)
        self.notes = notes / f"{os.getpid()}"

    def __call__(self, rows: pa.Table) -> pa.Table:
        with self.notes.open("a", encoding="utf-8") as notes:
            notes.write(rows["row_key"][0].as_py() + "\n")
        return self.function(rows)


def noted_job(audit: audit_run.Audit) -> MapJob:
    job = _job(audit)
    return replace(job, make=partial(Noted, Path(os.environ[NOTES]), job.make))


def begun_again(notes: Path) -> int:
    """Fragments that were begun more than once, as often as they were."""
    begun = Counter(line for path in notes.iterdir() for line in path.read_text(encoding="utf-8").splitlines())
    return begun.total() - len(begun)


if __name__ == "__main__":
    import noting  # by its own name, as actors import it

    audit_run.Audit.job = noting.noted_job
    cli.main()
