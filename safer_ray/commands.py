"""What the commands share: options, the console, and turning values into configs and stages."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from safer_ray.errors import UserError

if TYPE_CHECKING:
    from safer_ray.artifacts import Artifact
    from safer_ray.pipeline import Stages

console = Console(highlight=False, soft_wrap=True)
state = {"verbose": False, "fresh": False}

ExistingPath = Annotated[Path, typer.Option()]
Out = Annotated[Path, typer.Option(help="The directory to write; it becomes the artifact.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what is there and start again.")]


@contextlib.contextmanager
def training_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A callback that draws training progress on a terminal."""
    from safer_ray.runner import progress

    with progress("training", quiet=False) as bar:
        task = bar.add_task("training", total=None, visible=False)

        def show(stage: str, step: int, total: int) -> None:
            bar.update(task, completed=step, total=total, visible=step < total)

        yield show


def stages_at(
    out: Path, on_step: Callable[[str, int, int], None], fresh: bool = False, root: Path | None = None
) -> "Stages":
    from safer_ray.artifacts import Place
    from safer_ray.pipeline import Stages
    from safer_ray.runner import LocalRunner

    place = Place(root or out.parent, out=None if root else out, fresh=fresh)
    return Stages(place, LocalRunner(quiet=False), on_step=on_step)


@contextlib.contextmanager
def one_stage(out: Path, fresh: bool) -> Iterator["Stages"]:
    """The stages with `out` as the place of the one that is run, locked."""
    from safer_ray.lock import locked

    lock = out.parent / f".lock-{out.name}"
    try:
        with locked(lock), training_bar() as on_step:
            yield stages_at(out, on_step, fresh)
    finally:
        with contextlib.suppress(OSError):  # another process waits for it
            lock.rmdir()


def show_artifact(artifact: "Artifact") -> None:
    rows = ", ".join(f"{count:,} {name}" for name, count in artifact.manifest["rows"].items())
    console.print(f"{artifact.name}  {rows}  ->  {artifact.path}")


def open_input(path: Path, stage: str | None = None) -> "Artifact":
    from safer_ray.artifacts import open_artifact

    return open_artifact(path, stage)


def build_config(model: type, **values: Any) -> Any:
    """A stage's config from command-line values; what is None keeps its default."""
    from pydantic import ValidationError

    from safer_ray.config import explain_validation

    try:
        return model(**{k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise explain_validation(error, "command line") from None


def config_section(config: Path | None, name: str, assignments: list[str] | None) -> Any:
    """One stage's section of a run config, or its defaults with `--set` laid over them."""
    import yaml
    from pydantic import ValidationError

    from safer_ray.config import RunConfig, explain_validation, load_config

    if config is not None:
        return getattr(load_config(config, [f"{name}.{a}" for a in assignments or []]), name)
    values = {}
    for assignment in assignments or []:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r}: write it as key=value, say epochs=2")
        values[key] = yaml.safe_load(value)
    model = RunConfig.model_fields[name].annotation
    try:
        return model.model_validate(values)  # type: ignore[union-attr]
    except ValidationError as error:
        raise explain_validation(error, f"--set ({name})") from None


ConfigPath = Annotated[Path | None, typer.Option("--config", help="A run config; this stage's section of it is used.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="key=value, may be repeated.")]
