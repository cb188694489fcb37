"""Say how a reward model is to read text, where its own files leave that open."""

import hashlib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from safer_ray.config.head import HeadConfig
from safer_ray.config.values import Frozen, LocalName
from safer_ray.errors import UserError

TEMPLATES = ("auto", "chat", "plain", "pair", "raw")
DATE = "date"  # of the arguments of a template: the day that it takes for today
TRUSTED = "trust_remote_code"
FOUND_BY = (TRUSTED, "adapter_base", "bin_weights")  # say which files are read; these are named by what they hold
ENDS = "sentence_ends"
SentenceEnds = Literal["every_script", "ascii"]
EVERY_SCRIPT: SentenceEnds = "every_script"
ASCII_ENDS: SentenceEnds = "ascii"  # of the published method, and of bundles that name no rule
PRECISION = "inference_dtype"
Precision = Literal["float32", "bfloat16", "float16"]
FLOAT32: Precision = "float32"  # of what does not say, too
AUTO: Literal["auto"] = "auto"


# YAML makes a day of 2026-01-31.
_DAYS = BeforeValidator(lambda value: value.isoformat() if isinstance(value, date) else value)


class Reading(Frozen):
    """Choose how text is put to a model and which output is its reward, where the model's own files leave that open."""

    template: LocalName = "auto"
    """`chat` (the tokenizer's own), `pair` (prompt and response as two texts, as encoders do), `plain` (Human: and
    Assistant: turns), `raw` (one text behind the other), a file with a template in Jinja, or `auto`: `chat`, and
    without a template of its own `pair` for an encoder, else `plain`."""
    template_arguments: dict[str, Annotated[bool | int | float | str, _DAYS]] = Field(default_factory=dict)
    """Given to a chat template; `date` (YYYY-MM-DD) is what it takes for today."""
    system: Literal["template", "fold"] = "template"
    """`fold` puts a system message before the first user message."""
    truncation: Literal["cut", "quarantine"] = "cut"
    """Cut a side that is longer than the model reads, or refuse the pair."""
    head: HeadConfig | None = Field(default=None, exclude_if=lambda value: value is None)
    """Makes one reward of several outputs."""
    sentence_ends: SentenceEnds = EVERY_SCRIPT
    """Where a sentence ends: behind the marks of every script, or (`ascii`) behind those of the published list
    `[.,?!;\\n]` alone."""
    inference_dtype: Precision | Literal["auto"] = AUTO
    """In what a model computes where it is only read; its head, the standardisation of vectors and the autoencoder stay
    in float32. `auto`: `bfloat16` on a GPU for weights of 16 bits, else `float32`. Rewards and scores of 16 bits are
    equal within a bound, not to 1e-5 (docs/own-data.md)."""
    trust_remote_code: bool = False
    """Whether Python code that the checkpoint brings may run."""
    adapter_base: LocalName | None = None
    """Of an adapter, the model that it is merged into, where that is not the one that its `adapter_config.json` names:
    a folder, a GGUF file, `hub:OWNER/NAME[@REVISION]` or `package:MODULE/FOLDER`."""
    bin_weights: bool = False
    """Whether weights in PyTorch's own files (`pytorch_model.bin`) are read where there are no safetensors; of what is
    pickled in them, numbers alone are loaded."""

    def asked(self, *left_out: str) -> dict[str, Any]:
        """Return what changes values and is not left to the model's own files, but for some of it."""
        fields = set(Reading.model_fields) - {*FOUND_BY, *left_out}
        if self.inference_dtype == FLOAT32:
            fields.discard(PRECISION)  # as in the recipes that were made when there was no other
        return self._by_content(self.model_dump(mode="json", include=fields, exclude_defaults=True))

    def recorded(self, *inputs: str) -> dict[str, Any]:
        return self._by_content(super().recorded(*inputs))

    def _by_content(self, values: dict[str, Any]) -> dict[str, Any]:
        """Values in which a template in a file is named by what it says."""
        if is_file_name(self.template):
            values["template"] = f"sha256:{hashlib.sha256(template_text(self.template).encode()).hexdigest()}"
        return values

    def trusting(self) -> "Reading":
        """Return the reading of a model that says by itself how it reads text; only whose code may run is said here,
        and what is no matter of the model: where sentences end, and in what it computes."""
        kept = {TRUSTED, ENDS, PRECISION}
        return Reading.model_validate(self.model_dump(include=kept))

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.template not in TEMPLATES and not is_file_name(self.template):
            raise ValueError(
                f"no template is called {self.template!r}; choose {', '.join(TEMPLATES)}, or a .jinja file"
            )
        day = self.template_arguments.get(DATE)
        if day is not None:
            try:
                date.fromisoformat(str(day))
            except ValueError:
                raise ValueError(f"template_arguments.date is {day!r}; write it as YYYY-MM-DD") from None
        return self


def is_file_name(template: str) -> bool:
    """Return whether a template is named by a file that holds it."""
    return template.endswith((".jinja", ".jinja2", ".j2", ".txt")) or "/" in template


def template_text(file: str) -> str:
    """Return the template in a file.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the template {file}: {' '.join(str(error).split())}") from None
    if not text.strip():
        raise UserError(f"the template {file} is empty; write one into it, or leave it out")
    return text


AS_IT_COMES = Reading()
