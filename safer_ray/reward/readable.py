"""Try on a few words whether a tokenizer knows text and its chat template renders some, before any row is read."""

from typing import Any

from safer_ray.errors import UserError
from safer_ray.reward.templates import ChatTemplate

WORDS = "Hello, what can I do for you today? 1 2 3 a b c 你好 今天 天气 Привет"
USER = {"role": "user", "content": "Hello, what can I do for you today?"}
ASSISTANT = {"role": "assistant", "content": "Tell me a story."}
SYSTEM = {"role": "system", "content": "You are a careful helper."}
TALKS = ([USER, ASSISTANT], [SYSTEM, USER, ASSISTANT], [USER], [ASSISTANT])


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """See that a tokenizer makes tokens of text, and tells where they lie.

    Raises:
        UserError: it knows no text, as one that transformers makes up where a folder holds none; or it is a slow one.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}) does not tell where tokens lie in a text; save a fast "
            "one (tokenizer.json) in its place"
        )
    own = set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder) - set(tokenizer.all_special_ids)
    try:
        ids = set(tokenizer(WORDS, add_special_tokens=False, verbose=False)["input_ids"])
    except Exception as error:  # noqa: BLE001 - whatever its settings lead to
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{name}: its tokenizer fails on a few words: {words}; copy its files again") from None
    if not own or not ids - set(tokenizer.all_special_ids):
        raise UserError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) makes "
            f"{'unknown tokens alone' if ids else 'no token'} of text: save there the one that the model was trained "
            "with"
        )


def check_default(name: str, tokenizer: Any) -> None:
    """See that one of a tokenizer's named chat templates is the default; it may have one without a name.

    Raises:
        UserError: none is.
    """
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"{name}: none of its chat templates ({', '.join(sorted(templates))}) is the default; keep the one that "
            "the model was trained with as chat_template.jinja"
        )


def check_template(name: str, template: ChatTemplate) -> None:
    """See that a chat template renders a conversation of one kind at least.

    Raises:
        UserError: it renders none; its own words are quoted.
    """
    from jinja2 import TemplateSyntaxError

    first: Exception | None = None
    for talk in TALKS:
        try:
            (text,) = template.texts([talk])
        except TemplateSyntaxError as error:
            raise UserError(
                f"{name}: its chat template has a syntax error in line {error.lineno}: {error.message}; mend it, or "
                "copy it again"
            ) from None
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            first = first or error
            continue
        if text.strip():
            return
    words = " ".join(str(first).split())[:200] if first else "it writes nothing"
    raise UserError(f"{name}: its chat template renders no conversation: {words}; mend it, or copy it again")
