"""Shared by all commands: options, the console, and turning values into configs and contexts."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from safer_ray.cli.options import config_option, model_option, path_option, text_option
from safer_ray.errors import UserError
from safer_ray.storage.locations import check_utf8

if TYPE_CHECKING:
    from safer_ray.config.reading import Reading
    from safer_ray.config.sections import RayConfig, SourceConfig
    from safer_ray.pipeline.progress import Report
    from safer_ray.pipeline.runner import Runner
    from safer_ray.pipeline.stage import StageContext
    from safer_ray.storage.artifacts import Artifact

console = Console(highlight=False, soft_wrap=True, markup=False)  # paths and texts may hold brackets
state = {"verbose": False}
RAY = "ray."  # before the keys of the section in `--set`

ExistingPath = Annotated[Path, path_option()]
Model = Annotated[
    str,
    model_option(
        "--reward",
        help="A reward model: a folder, also of an adapter, FILE.gguf, hub:OWNER/NAME, package:MODULE/FOLDER.",
    ),
]
Out = Annotated[Path, path_option(help="The directory to write; it becomes the artifact.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what is there and start again.")]


class ServiceEnded(SystemExit):
    """The end of a service, which has said itself how it came."""


@contextlib.contextmanager
def at_work(name: str, config: "RayConfig", shards: int = 1) -> Iterator[tuple["Runner", "Report"]]:
    """The runner called `name`, its cluster joined or started, with room for models in `shards` parts, and what it
    reports to.

    Raises:
        UserError: no such runner, or no cluster that could do the work.
    """
    from safer_ray.pipeline.progress import report_on
    from safer_ray.pipeline.runner import LocalRunner

    with report_on(console) as report:
        if name == "local":
            yield LocalRunner(report.progress), report
        elif name == "ray":
            from safer_ray.distributed.session import ray_session

            with ray_session(config, shards, verbose=state["verbose"]):
                from safer_ray.distributed.ray_internals import logs_folder
                from safer_ray.distributed.ray_runner import RayRunner

                report.note("ray", logs=str(logs_folder()))
                yield RayRunner(config, report.progress), report
        else:
            raise UserError(f"--runner {name!r}: choose local (this process) or ray (a cluster)")


@contextlib.contextmanager
def one_stage(
    out: Path,
    fresh: bool,
    runner: str = "local",
    config: Path | None = None,
    reading: "Reading | None" = None,
    assignments: list[str] | None = None,
) -> Iterator["StageContext"]:
    """Yield the context in which one stage is run, with `out` as its place, locked; `config`, with those `assignments`
    laid over it that begin with `ray.`, says where and how wide a runner on Ray works; `reading` how a model that was
    not made here is read.

    Raises:
        UserError: `out` is a file, or in use, or there is no such runner, or it has no cluster to set.
    """
    from safer_ray.pipeline.inputs import durable_path
    from safer_ray.pipeline.stage import StageContext
    from safer_ray.storage.artifacts import Place
    from safer_ray.storage.lock import locked

    out = check_out(durable_path(out))
    ray, reward = ray_config(config, assignments, runner), config_section(config, "reward", None)
    options = {"shards": reward.shards, "reading": reading or reward.trusting()}
    if config is not None:
        options["max_refused_share"] = config_section(config, "pairs", None).max_refused_share
    lock = out.parent / f".lock-{out.name}"
    place = Place(out.parent, out=out, fresh=fresh, reads=(config,) if config else ())
    with emptied(out.parent), _gone(lock), locked(lock), at_work(runner, ray, reward.shards) as (where, _):
        yield StageContext(place, where, **options)


def check_out(out: Path) -> Path:
    """Return where `--out` leads to, behind links.

    Raises:
        UserError: it is a file, the root of the file system, or no text.
    """
    if "://" in str(out):
        return out
    if out.is_symlink() or ".." in out.parts:
        out = Path(os.path.realpath(out))
    check_utf8(out)
    if not out.absolute().name:
        raise UserError(f"{out} is the root of the file system; choose a folder in it as --out")
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"{out} is no folder, and --out is the folder to write; choose another --out")
    return out


@contextlib.contextmanager
def _gone(lock: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # another process waits for it
            lock.rmdir()


@contextlib.contextmanager
def emptied(folder: Path) -> Iterator[None]:
    """Afterwards `folder` and those above it are gone again, if they were not there before and nothing is in them."""
    folders = [] if "://" in str(folder) else [folder, *folder.parents]
    missing = [path for path in folders if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def show_artifact(artifact: "Artifact") -> None:
    rows = ", ".join(f"{count:,} {name}" for name, count in artifact.manifest["rows"].items())
    console.print(f"{artifact.name}  {rows}  ->  {artifact.path}")


def open_input(role: str, path: Path, reading: "Reading | None" = None) -> "Artifact":
    """Return what an option names; a reward model's files are found as `reading` says.

    Raises:
        UserError: nothing is there, or it does not hold what `role` wants.
    """
    from safer_ray.config.reading import AS_IT_COMES
    from safer_ray.pipeline.roles import open_as

    return open_as(role, path.absolute(), reading or AS_IT_COMES)  # workers may have another current directory


def open_model(name: str, reading: "Reading | None" = None) -> "Artifact":
    """Return the reward model that an option names: a folder or file, or one that is looked up, on the hub or in a
    package, by its content.

    Raises:
        UserError: there is none.
    """
    from safer_ray.storage.locations import is_name

    if not is_name(name):
        return open_input("reward", Path(name), reading)
    from safer_ray.reward.finished import model_path

    return open_input("reward", model_path(name), reading)


def build_config(model: type, **values: Any) -> Any:
    """A stage's config from command-line values; what is None keeps its default."""
    from pydantic import ValidationError

    from safer_ray.config.read import explain_validation

    try:
        return model(**{k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        raise explain_validation(error, "command line") from None


def build_source(assignments: list[str] | None, **values: Any) -> "SourceConfig":
    """Return a source from command-line values, with `--set` laid over them.

    Raises:
        UserError: a key that sources do not have, or a value that it does not take.
    """
    from pydantic import ValidationError

    from safer_ray.config.read import assigned, explain_validation
    from safer_ray.config.sections import SourceConfig

    given = {name: value for name, value in values.items() if value is not None}
    try:
        return SourceConfig.model_validate(given | assigned({}, assignments))
    except ValidationError as error:
        raise explain_validation(error, "command line", [*SourceConfig.model_fields]) from None


def split_assignments(assignments: list[str] | None) -> tuple[list[str], list[str]]:
    """Return the values of `--set` that are of the section `ray`, without its name, and the others."""
    given = assignments or []
    return [a.removeprefix(RAY) for a in given if a.startswith(RAY)], [a for a in given if not a.startswith(RAY)]


def ray_config(
    config: Path | None, assignments: list[str] | None, runner: str, actors: str | None = None
) -> "RayConfig":
    """Return the section `ray` of a run config, or its defaults, with `--set ray.KEY=VALUE` and `MIN:MAX` actors laid
    over it.

    Raises:
        UserError: such a value, or `actors`, is none; or the work is not done on a cluster.
    """
    from safer_ray.config.read import load_cluster

    ours, _ = split_assignments(assignments)
    if ours and runner == "local":
        raise UserError(f"--set {RAY}{ours[0]}: it sets a cluster; add --runner ray, or leave it out")
    if actors is not None:
        least, _, most = actors.partition(":")
        if not (least.isdecimal() and (most or least).isdecimal()):
            raise UserError(f"--actors {actors!r}: write it as MIN:MAX, say 1:8")
        ours = [*ours, f"min_actors={least}", f"max_actors={most or least}"]
    if config is not None:
        return load_cluster(config, ours)
    found: RayConfig = config_section(None, "ray", ours)
    return found


def only_of_cluster(assignments: list[str] | None) -> list[str] | None:
    """Return the values of `--set` of a command that has nothing else to set.

    Raises:
        UserError: one is not of the section `ray`.
    """
    if others := split_assignments(assignments)[1]:
        raise UserError(f"--set {others[0]}: of this command only the cluster is set, say {RAY}actor_gpus=1")
    return assignments


def config_section(config: Path | None, name: str, assignments: list[str] | None) -> Any:
    """One stage's section of a run config, or its defaults, with `--set` laid over them."""
    from pydantic import ValidationError

    from safer_ray.config.read import assigned, explain_validation, load_config
    from safer_ray.config.sections import RunConfig

    if config is not None:
        return getattr(load_config(config, [f"{name}.{a}" for a in assignments or []]), name)
    model = RunConfig.model_fields[name].annotation
    try:
        return model.model_validate(assigned({}, assignments))  # type: ignore[union-attr]
    except ValidationError as error:
        raise explain_validation(error, f"--set ({name})") from None


def reading_of(options: list[str] | None, trust_remote_code: bool, config: Path | None = None) -> "Reading":
    """Return how a model is read: as the section `reward` of a config says, with `--read` laid over it.

    Raises:
        UserError: an option that there is not, or a value that it does not take.
    """
    from pydantic import ValidationError

    from safer_ray.config.read import assigned, explain_validation
    from safer_ray.config.reading import ASCII_ENDS, ENDS, TRUSTED, Reading

    asked = config_section(config, "reward", None)
    given = {name: getattr(asked, name) for name in asked.model_fields_set if name in Reading.model_fields}
    if config is not None and config_section(config, "salience", None).mode == "paper":
        given[ENDS] = ASCII_ENDS  # as in a run of it
    try:
        reading = Reading.model_validate(given | assigned({}, options, "--read"))
    except ValidationError as error:
        raise explain_validation(error, "--read", [*Reading.model_fields]) from None
    if reading.adapter_base is not None:
        from safer_ray.pipeline.inputs import lasting_name  # here, since few models are adapters

        reading = reading.model_copy(update={"adapter_base": lasting_name(reading.adapter_base)})
    return reading.model_copy(update={TRUSTED: True}) if trust_remote_code else reading


Split = Annotated[
    str | None,
    text_option("--split", help="Of a saved data set, a hub name or a folder; default: train, or all files."),
]
Encoding = Annotated[
    str | None, text_option("--encoding", help="Of text that does not begin with a mark; default: UTF-8.")
]
RunnerName = Annotated[str, text_option("--runner", help="local: in this process; ray: on a cluster.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that a checkpoint brings, if it brings any.")
]
ReadOptions = Annotated[
    list[str] | None,
    text_option(
        "--read",
        help="How a model that was not trained here reads text: template=pair, system=fold, …; may be repeated.",
    ),
]
SourceSettings = Annotated[
    list[str] | None,
    text_option(
        "--set",
        help="Of the source, as a config has it: pairs=all, carried=[context], prefer=better, …; may be repeated.",
    ),
]
ConfigPath = Annotated[Path | None, config_option("--config", help="A run config; this stage's section of it is used.")]
ClusterConfig = Annotated[
    Path | None, config_option("--config", help="A run config, or a file with a section `ray`, which is used.")
]
Assignments = Annotated[list[str] | None, text_option("--set", help="key=value, may be repeated.")]
StageSettings = Annotated[
    list[str] | None,
    text_option("--set", help="key=value of this stage's section, or ray.KEY=VALUE of the cluster; may be repeated."),
]
AuditSettings = Annotated[
    list[str] | None,
    text_option(
        "--set",
        help="Of the source: pairs=all, carried=[context], …; or of the cluster: ray.actor_gpus=1, …; may be repeated.",
    ),
]
ClusterSettings = Annotated[
    list[str] | None, text_option("--set", help="Of the cluster: ray.actor_gpus=1, …; may be repeated.")
]
