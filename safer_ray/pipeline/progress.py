"""Report what a run does: a bar on a terminal, else a JSON line for every stage and every minute of it; each
line has the id of the run."""

import contextlib
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from safer_ray.storage.background import heartbeat

if TYPE_CHECKING:
    from safer_ray.storage.artifacts import Artifact

RUN_ID = os.environ.get("SAFER_RAY_RUN_ID") or uuid.uuid4().hex[:8]
LINE_SECONDS = 60.0  # between two lines of a stage that takes so long


class Report(Protocol):
    """Receives progress events."""

    def stage(self, name: str, artifact: "Artifact | None") -> None:
        """A stage begins (None), or its artifact is there: made now, or found."""
        ...

    def progress(self, stage: str, done: int, total: int, rows: int = 0) -> None:
        """So many fragments or training steps of a stage are done; the last fragment had so many rows."""
        ...

    def note(self, event: str, **facts: str) -> None:
        """Something that helps to see what goes on."""
        ...


def json_line(event: str, **facts: Any) -> None:
    """One event on stderr as a line of JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    print(json.dumps({"time": now, "run": RUN_ID, "event": event, **facts}), file=sys.stderr, flush=True)


class JsonLog(logging.Handler):
    """Log records as JSON lines."""

    def emit(self, record: logging.LogRecord) -> None:
        json_line("log", level=record.levelname, logger=record.name, message=record.getMessage())


@dataclass
class Pace:
    """The pace of a stage since its first event; the time before that is unknown, and so left out."""

    began: float
    done: int
    rows: int = 0
    first: int = 0  # rows of what was done by then
    last: int = 0  # what was done when it was last heard of

    def told(self, now: float, done: int, total: int) -> dict[str, float]:
        """Rows a second and seconds left; nothing at first."""
        if done == self.done:
            self.first = self.rows
            return {}
        seconds = now - self.began
        left = {"seconds_left": round(seconds / (done - self.done) * (total - done))}
        rate = (self.rows - self.first) / max(seconds, 1e-9)
        return left | ({"rows_per_s": round(rate, 1)} if rate else {})


def _pace(pace: Pace | None, now: float, done: int) -> Pace:
    """The pace of a stage that has got so far; a new one where it has begun again, with another model."""
    pace = Pace(now, done) if pace is None or done < pace.last else pace
    pace.last = done
    return pace


@dataclass
class Watch:
    """When something was last heard of the stage under way, and what."""

    moved: float
    stage: str = ""
    at: tuple[int, int] | None = None  # so many of so many

    def sees(self, stage: str, at: tuple[int, int] | None = None) -> None:
        if (stage, at) != (self.stage, self.at):
            self.moved, self.stage, self.at = time.monotonic(), stage, at

    def still(self) -> tuple[float, str] | None:
        """Seconds for which nothing has moved and how far the stage is; None where something has for a minute."""
        seconds = time.monotonic() - self.moved
        if not self.stage or seconds < LINE_SECONDS:
            return None
        return seconds, f"at {self.at[0]} of {self.at[1]}" if self.at else "under way"


def _stage(artifact: str = "") -> str:
    return artifact.rpartition("-")[0]


class JsonLines:
    """Every stage when it is there, and how far it is once a minute, as a line of JSON on stderr."""

    def __init__(self) -> None:
        self.begun: list[str] = []  # and not yet there
        self.said: dict[str, float] = {}
        self.paces: dict[str, Pace] = {}
        self.watch = Watch(time.monotonic())

    def look(self) -> None:
        """Say that nothing moves, where nothing does."""
        if found := self.watch.still():
            json_line("waiting", stage=self.watch.stage, state=found[1], unchanged_s=round(found[0]))

    def note(self, event: str, **facts: str) -> None:
        json_line(event, **facts)

    def stage(self, name: str, artifact: "Artifact | None") -> None:
        if artifact is None:
            self.begun.append(name)
            self.watch.sees(_stage(name))
            return
        facts = {"seconds": artifact.manifest["wall_seconds"], "rows": artifact.manifest["rows"]}
        state = "made" if name in self.begun else "found"
        json_line("stage", stage=_stage(name), artifact=name, state=state, **facts)
        self.begun = [other for other in self.begun if other != name]
        self.watch.sees(_stage(*self.begun[-1:]))

    def progress(self, stage: str, done: int, total: int, rows: int = 0) -> None:
        now = time.monotonic()
        self.watch.sees(stage, (done, total))
        pace = self.paces[stage] = _pace(self.paces.get(stage), now, done)
        pace.rows += rows
        told = pace.told(now, done, total)
        if now - max(self.said.get(stage, pace.began), pace.began) >= LINE_SECONDS:
            self.said[stage] = now
            json_line("progress", stage=stage, done=done, total=total, **told)


class Terminal:
    """A line for every stage, and one bar for what is under way."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self.console = console
        self.bar = bar
        self.task: TaskID = bar.add_task("", visible=False, rate="")
        self.paces: dict[str, Pace] = {}
        self.begun: list[str] = []  # and not yet there
        self.watch = Watch(time.monotonic())

    def look(self) -> None:
        """Say that nothing moves, where nothing does."""
        if found := self.watch.still():
            self.console.print(f"{self.watch.stage} is {found[1]}, unchanged for {found[0]:.0f} s", style="dim")

    def note(self, event: str, **facts: str) -> None:
        self.console.print(f"{event}: " + ", ".join(f"{name} {fact}" for name, fact in facts.items()), style="dim")

    def stage(self, name: str, artifact: "Artifact | None") -> None:
        self.bar.update(self.task, visible=False)
        if artifact is None:
            self.begun.append(name)
        elif name in self.begun:
            self.begun.remove(name)
            self.console.print(
                Text.assemble(("made ", "green"), f" {name:<26} {artifact.manifest['wall_seconds']:7.1f} s")
            )
        else:
            self.console.print(f"found {name}", style="dim")
        self.watch.sees(_stage(*self.begun[-1:]))

    def progress(self, stage: str, done: int, total: int, rows: int = 0) -> None:
        now = time.monotonic()
        self.watch.sees(stage, (done, total))
        pace = self.paces[stage] = _pace(self.paces.get(stage), now, done)
        pace.rows += rows
        rate = pace.told(now, done, total).get("rows_per_s")
        told = f"{rate:,.0f} rows/s" if rate else ""
        self.bar.update(self.task, description=stage, completed=done, total=total, rate=told, visible=done < total)


@contextlib.contextmanager
def report_on(console: Console) -> Iterator[Report]:
    """A terminal gets lines and a bar, anything else JSON lines; both are told once a minute where nothing moves."""
    if not console.is_terminal:
        lines = JsonLines()
        with heartbeat(LINE_SECONDS, lines.look):
            yield lines
        return
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        terminal = Terminal(console, bar)
        with heartbeat(LINE_SECONDS, terminal.look):
            yield terminal
