"""Find how a reward model reads text: as its folder says, or as its user asks where that says nothing."""

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from safer_ray.config.head import HeadConfig
from safer_ray.config.read import explain_validation
from safer_ray.config.reading import (
    ASCII_ENDS,
    AUTO,
    DATE,
    ENDS,
    EVERY_SCRIPT,
    FLOAT32,
    PRECISION,
    Precision,
    Reading,
    SentenceEnds,
    is_file_name,
    template_text,
)
from safer_ray.errors import UserError
from safer_ray.reward.readable import check_default, check_template, check_tokenizer
from safer_ray.reward.templates import NO_DAY
from safer_ray.reward.text import CHAT, TEMPLATES, PairTokenizer, is_encoder
from safer_ray.storage.marks import MANIFEST
from safer_ray.storage.recipes import read_manifest

log = logging.getLogger(__name__)
SETTINGS = "safer_ray.json"  # beside the weights
DTYPE = "dtype"  # in what a manifest says of its artifact: the one that its values were computed in
SAID = ("template", "max_length", "frozen_layers", "pad", "arguments", "system", "truncation", "text", "head")


@dataclass(frozen=True)
class HowItReads:
    """The choices by which a model reads text, all made."""

    template: str = AUTO  # the tokenizer's own chat template where it has one
    max_length: int = 10**9
    frozen_layers: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    system: str = "template"
    truncation: str = "cut"
    text: str | None = None  # a chat template in place of the tokenizer's
    pad: int | None = None  # of an adapter made here: behind which its rewards are read, where its base has another
    head: HeadConfig | None = None  # which of several outputs is the reward
    sentence_ends: SentenceEnds = EVERY_SCRIPT
    inference_dtype: Precision | Literal["auto"] = AUTO
    made_here: bool = False  # trained here, or about to be: any format will do


def how_it_reads(directory: Path, reading: Reading) -> HowItReads:
    """Return how the model in a folder reads text.

    Raises:
        UserError: its settings are damaged, or say otherwise than its user does.
    """
    file = directory / SETTINGS
    if not file.is_file():
        return _as_bundled(asked_for(reading), directory)
    settings: dict[str, Any] = {}
    try:
        settings |= json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError):
        raise UserError(f"{file} is not a JSON object; export the model again, or delete the file") from None
    _check_settings(file, settings)
    try:
        settings["head"] = HeadConfig.model_validate(settings["head"]) if settings.get("head") is not None else None
    except ValidationError as error:
        raise explain_validation(error, f"{file} (head)") from None
    found = HowItReads(**{name: settings[name] for name in SAID if name in settings}, made_here=True)
    asked = asked_for(reading)
    if found.head is None:
        found = replace(found, head=asked.head)
    found = replace(found, sentence_ends=asked.sentence_ends, inference_dtype=asked.inference_dtype)
    found = _as_bundled(found, directory)
    for name in ("template", "arguments", "system", "truncation", "text", "head", ENDS, PRECISION):
        value = getattr(asked, name)
        if value not in (getattr(HowItReads(), name), getattr(found, name)):
            made = getattr(found, name)
            raise UserError(f"{directory.name} was made to be read with {name} {made!r}, not {value!r}; leave it out")
    return found


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    """Raises UserError where a value in a model's settings is none that is written there."""
    known = (AUTO, *TEMPLATES)
    if settings.get("template", AUTO) not in known:
        raise UserError(f"{file}: template {settings['template']!r} is unknown; choose {', '.join(known)}")
    for name, least in (("max_length", 1), ("frozen_layers", 0), ("pad", 0)):
        value = settings.get(name, least)
        if type(value) is not int or value < least:
            raise UserError(f"{file}: {name} is {value!r}, wanted a whole number from {least} on")
    checks = {"arguments": dict, "system": str, "truncation": str, "text": str}
    for name, kind in checks.items():
        if not isinstance(settings.get(name, kind()), kind):
            raise UserError(f"{file}: {name} is {settings[name]!r}; export the model again")


def _as_bundled(how: HowItReads, directory: Path) -> HowItReads:
    """Return how a model is read that lies in `directory`: in a bundle, sentences end as they did for its codes, and it
    computes in their dtype; one that does not say them was made before other rules than the published one, or before
    other dtypes than float32."""
    try:
        manifest = read_manifest(directory.parent) if (directory.parent / MANIFEST).is_file() else {}
    except UserError:  # somebody else's file of that name
        manifest = {}
    if manifest.get("stage") != "auditor":
        return how
    facts = manifest.get("metrics", {})
    return replace(how, sentence_ends=facts.get(ENDS, ASCII_ENDS), inference_dtype=facts.get(DTYPE, FLOAT32))


def asked_for(reading: Reading, made_here: bool = False) -> HowItReads:
    """Return how a model's user wants it to be read; a template in a file is read."""
    text = None
    template = reading.template
    if is_file_name(template):
        text, template = template_text(template), CHAT
    arguments = dict(reading.template_arguments)
    return HowItReads(
        template,
        frozen_layers=0,
        arguments=arguments,
        system=reading.system,
        truncation=reading.truncation,
        text=text,
        head=reading.head,
        sentence_ends=reading.sentence_ends,
        inference_dtype=reading.inference_dtype,
        made_here=made_here,
    )


def settings_of(pairs: PairTokenizer) -> dict[str, Any]:
    """Return how a model reads text, as the file beside its weights says it; what is left to its own files is left
    out."""
    said: dict[str, Any] = {"template": pairs.template, "max_length": pairs.limit}
    arguments = dict(pairs.arguments)
    if pairs.template == CHAT and pairs.chat.reads_the_day:
        arguments[DATE] = pairs.chat.day.isoformat()
    if arguments:
        said["arguments"] = arguments
    if pairs.fold:
        said["system"] = "fold"
    if not pairs.cuts:
        said["truncation"] = "quarantine"
    if pairs.text is not None:
        said["text"] = pairs.text
    return said


def pair_tokenizer(tokenizer: Any, how: HowItReads, limit: int, name: str) -> PairTokenizer:
    """Return how a model reads pairs; said in a line where that is made up for it.

    Raises:
        UserError: a tokenizer that does not say where its tokens lie, or a template that cannot be used.
    """
    check_tokenizer(name, tokenizer)
    template = how.template
    if template == AUTO:
        template = _template_of(tokenizer, name, how.made_here)
    if template == CHAT and how.text is None and not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template; set `template` to pair, plain, raw or a .jinja file")
    pairs = PairTokenizer(
        tokenizer,
        template,
        limit,
        how.arguments,
        how.system == "fold",
        how.truncation == "cut",
        how.text,
        how.sentence_ends,
    )
    if template != CHAT:
        if how.arguments or pairs.fold:
            raise UserError(f"{name}: template {template!r} takes no template_arguments and folds no system message")
        return pairs
    if how.text is None:
        check_default(name, tokenizer)
    check_template(name, pairs.chat)
    if pairs.chat.reads_the_day and DATE not in how.arguments:
        log.warning(
            "%s: its chat template writes today's date; %s is taken, whenever this runs; set template_arguments.date "
            "for another",
            name,
            NO_DAY,
        )
    return pairs


def _template_of(tokenizer: Any, name: str, made_here: bool) -> str:
    """Return the template of a model that names none; one line says it where it is made up."""
    if tokenizer.chat_template:
        return CHAT
    if not made_here and is_encoder(tokenizer):
        log.warning(
            "%s has no chat template: prompt and response are read as tokenizer(prompt, response), a prompt of several "
            "messages as Human: and Assistant: turns; set `template` for another format",
            name,
        )
        return "pair"
    log.warning("%s has no chat template: pairs are read as Human: and Assistant: turns", name)
    return "plain"
