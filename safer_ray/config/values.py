"""The base class of all sections of a config."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler

from safer_ray.errors import UserError
from safer_ray.storage.locations import a_source, is_name, on_disk

Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]


def explained(check: Callable[..., Any]) -> Callable[..., Any]:
    """Return a check whose refusal is one of pydantic, which names the field."""

    def checked(*values: Any) -> Any:
        try:
            return check(*values)
        except UserError as error:
            raise ValueError(str(error)) from None

    return checked


def _explained(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same of a check of texts and paths alone."""
    return lambda value: explained(check)(value) if isinstance(value, str | Path) else value


@dataclass(frozen=True)
class _Known(AfterValidator):
    """A check by names, which the JSON schema lists too."""

    names: Callable[[], Collection[str]]

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": list(self.names())}


def known(what: str, names: Callable[[], Collection[str]]) -> AfterValidator:
    """Return what makes a field accept the names of `what` alone, and say them where it is given another."""

    def checked(value: str) -> str:
        if value not in names():
            raise ValueError(f"no {what} is called {value!r}; choose one of {', '.join(names())}")
        return value

    return _Known(checked, names)


def _name_on_disk(value: str | Path) -> str:
    value = str(value)
    return value if is_name(value) else str(on_disk(value))


# Every field that names a file or a folder is one of these.
LocalPath = Annotated[Path, BeforeValidator(_explained(on_disk))]
LocalName = Annotated[str, BeforeValidator(_explained(_name_on_disk))]  # a path, or a name that something else resolves
OrLocalName = BeforeValidator(_explained(_name_on_disk))  # in front of a union, so that its error is the one told
AnyPlace = Annotated[str, AfterValidator(_explained(a_source))]  # also the URI of an object store


class Frozen(BaseModel):
    """Immutable; a misspelt key is an error, and so is a number that is none or infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Fields that no recipe holds: they change no result, or what they name enters the recipe as an input.
    unrecorded: ClassVar[frozenset[str]] = frozenset()

    def recorded(self, *inputs: str) -> dict[str, Any]:
        """Return what a recipe holds of this section, as JSON has it: all but the `unrecorded` fields of it and of the
        sections in it, and but those that this recipe names as `inputs`."""
        return self.model_dump(mode="json", exclude=_unrecorded(self) | dict.fromkeys(inputs, True))


def _unrecorded(value: Any) -> dict[Any, Any]:
    """Return what pydantic shall leave out of a section, or of several in a tuple or by name."""
    left_out: dict[Any, Any] = {}
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Frozen):
        left_out, inside = dict.fromkeys(value.unrecorded, True), value
    elif isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, tuple):
        inside = enumerate(value)
    return {key: found for key, each in inside if (found := _unrecorded(each))} | left_out
