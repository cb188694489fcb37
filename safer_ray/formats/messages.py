"""Messages in every spelling that data sets give them, as lists of role, content and what else a message says.

A message is `{role, content}`, with `more` where it has other fields: JSON of these (`tool_calls`, `name`,
`reasoning_content`), which chat templates render and exports write back. Null and empty fields are as if absent.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from json.encoder import encode_basestring
from types import MappingProxyType
from typing import Any

from safer_ray.formats.declaration import Messages, Refused, as_mapping, parsed_json, type_name
from safer_ray.schema import to_json

MORE = "more"  # the key of a message's other fields
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
SPOKEN = (  # fields beside a message's content that are part of what it says
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "thought", "refusal"),
)
MEDIA = ("images", "image", "image_url", "audio", "video", "videos", "input_audio", "file")
ROLES = MappingProxyType(  # what other formats call them
    {
        "human": "user",
        "prompter": "user",
        "gpt": "assistant",
        "bot": "assistant",
        "chatbot": "assistant",
        "chatgpt": "assistant",
        "model": "assistant",
        "ai": "assistant",
        "observation": "tool",
        "ipython": "tool",
    }
)
_COMMON = ("user", "assistant", "system")  # no set: what data sets hold as a role may be of any kind
_KNOWN = frozenset({*_COMMON, "developer", "tool", "function", "function_call", *ROLES})
_LISTS = ("messages", "conversations", "conversation")  # a mapping that holds one of these alone is that list
_JSON = re.compile(r'\s*(?:"\s*)*(?:\[\s*|\{\s*\\*"(?:messages|conversations?)\\*"\s*:\s*\[\s*)?\{\s*\\*"(\w+)\\*"\s*:')
_REPR = re.compile(r"\s*+(?:array\()?\s*+\[?\s*+\{\s*+'\w+'\s*:")
_REPR_ROLE = re.compile(r"'(?:role|from)': *'")
_KEYS = {*ROLE_KEYS, *CONTENT_KEYS}
_FIRSTS = frozenset('[{" \n\t\r')  # of texts that may hold messages
_NESTED = 3  # times that messages may have been written as JSON


def as_messages(value: Any, name: str) -> Messages:
    """Return a list of messages, one message, or a mapping of lists, as messages; those that say nothing are left out.

    Raises:
        Refused: it is none of these, or says nothing; the text names the place.
    """
    messages = []
    for i, item in enumerate(listed(value, name)):
        message = _plain_message(item) or _message(item, f"{name}[{i}]")
        if message is not None:
            messages.append(message)
    if not messages:
        raise Refused(f"empty text: {name}")
    return messages


def _plain_message(item: Any) -> dict[str, str] | None:
    """Return a message in by far the most frequent form, of which nothing needs to be changed; else None."""
    if not isinstance(item, dict) or len(item) != 2:
        return None
    role, said = item.get("role"), item.get("content")
    if role in _COMMON and isinstance(said, str) and said and not said.isspace():
        return {"role": role, "content": said}
    return None


def listed(value: Any, name: str) -> list[Any]:
    """Return the items of a list of messages, of one message, or of a mapping that holds or is such a list.

    Raises:
        Refused: it is none of these.
    """
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if len(value) == 1 and isinstance(inner := next(iter(value.values())), list) and next(iter(value)) in _LISTS:
            return inner
        if any(isinstance(value.get(key), list) for key in ROLE_KEYS):
            return _transposed(value, name)
        return [value]
    raise Refused(f"wrong type: {name} is {type_name(value)}, wanted messages")


def _transposed(columns: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the messages of a mapping of lists, as Arrow gives sequences of mappings."""
    lists = {key: values for key, values in columns.items() if values is not None}
    lengths = {len(values) if isinstance(values, list) else -1 for values in lists.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise Refused(f"wrong type: {name} is a mapping of lists of different lengths, wanted messages")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _message(item: Any, place: str) -> dict[str, str] | None:
    """Return a message; None of one that says nothing."""
    if isinstance(item, list) and item:
        item = as_mapping(item)  # as Arrow gives maps
    if not isinstance(item, dict):
        raise Refused(f"wrong type: {place} is {type_name(item)}, wanted a message with role and content")
    role = _role(item, place)
    key = next((key for key in (*CONTENT_KEYS, "parts") if item.get(key) not in (None, "", [])), None)
    said = "" if key is None else _content(item[key], f"{place}.{key}")
    more = _more(item, key, place)
    if not role:
        raise Refused(f"wrong type: {place}.role is null, wanted text")
    if not said.strip() and not any(name in more for name in SPOKEN):
        if more and role.strip().lower() not in ("tool", "function", "observation", "ipython"):
            raise Refused(f"message without content: {place} has {', '.join(more)} alone")
        if not more:
            return None
    if role not in _COMMON and (known := role.strip().lower()) in _KNOWN:
        role = ROLES.get(known, known)
    return {"role": role, "content": said, MORE: to_json(more)} if more else {"role": role, "content": said}


def _role(item: dict[str, Any], place: str) -> str | None:
    for key in ROLE_KEYS:
        value = item.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise Refused(f"wrong type: {place}.{key} is {type_name(value)}, wanted text")
            return value
    return None


def _content(value: Any, place: str) -> str:
    """Return a content that is text, or parts of type text, joined by newlines as servers join them."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    return "\n".join(_part(part, f"{place}[{i}]" if isinstance(value, list) else place) for i, part in enumerate(parts))


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Refused(f"wrong type: {place} is {type_name(part)}, wanted text or content parts")
    if not part.keys() & {"type", "text", *MEDIA}:
        raise Refused(f"wrong type: {place} is mapping, wanted text or content parts")
    kind = part.get("type")
    other = next((name for name in MEDIA if part.get(name) is not None), None)
    if kind not in (None, "text", "input_text", "output_text") or other:
        raise Refused(f"unread content: {place} is a part of type {kind or other}; pairs hold text alone")
    if not isinstance(part.get("text"), str):
        raise Refused(f"wrong type: {place}.text is {type_name(part.get('text'))}, wanted text")
    return part["text"]


def _more(item: dict[str, Any], content_key: str | None, place: str) -> dict[str, Any]:
    """Return a message's fields beside role and content; of what this package wrote, those that it packed."""
    role_key = next((key for key in ROLE_KEYS if item.get(key) is not None), None)
    fields = {key: _without_nulls(value) for key, value in item.items() if key not in (role_key, content_key)}
    if isinstance(packed := fields.get(MORE), str):
        try:
            inner = parsed_json(packed)
        except Refused:
            inner = None
        if isinstance(inner, dict):
            fields = {**inner, **{key: value for key, value in fields.items() if key != MORE}}
    said = {key: value for key, value in fields.items() if value is not None and value not in ("", [], {})}
    for key in MEDIA:
        if key in said:
            raise Refused(f"unread field: {place}.{key}; pairs hold text alone")
    return said


def _without_nulls(value: Any) -> Any:
    """Return a value without the null keys of its mappings, which Arrow fills in where another row has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def fields_of(message: dict[str, Any]) -> dict[str, Any]:
    """Return all fields of a message as its source had them: role, content, and what `more` packs."""
    packed = message.get(MORE)
    return {"role": message["role"], "content": message["content"], **(json.loads(packed) if packed else {})}


def messages_json(messages: Sequence[dict[str, str]]) -> str:
    """Return what `to_json` does of messages, in a third of its time: ids and groups are hashes of it."""
    written = []
    for message in messages:
        said, role = encode_basestring(message["content"]), encode_basestring(message["role"])
        more = f'"more":{encode_basestring(message[MORE])},' if MORE in message else ""
        written.append(f'{{"content":{said},{more}"role":{role}}}')
    return f"[{','.join(written)}]"


def characters(messages: Messages) -> int:
    """Return how many characters messages have, their other fields included."""
    count = 0
    for message in messages:
        count += len(message["content"]) + len(message.get(MORE) or "")
    return count


def written_as_json(text: str, name: str) -> Any:
    """Return the messages that a text holds as JSON, also of JSON in JSON; None where it is plain text.

    Raises:
        Refused: it begins as messages do, but is no JSON, say Python's repr of them.
    """
    if text[:1] not in _FIRSTS and not text.startswith("array("):
        return None
    if _REPR.match(text) and _REPR_ROLE.search(text):
        raise Refused(
            f"not JSON: {name} holds messages as Python's repr writes them; write them by json.dumps, or as a list"
        )
    found = _JSON.match(text)
    if found is None or not (f'"{ROLE_KEYS[0]}' in text or f'"{ROLE_KEYS[1]}' in text or '\\"' in text):
        return None
    value: Any = text
    try:
        for _ in range(_NESTED):
            if isinstance(value, str):
                value = parsed_json(value)
    except Refused as reason:
        if found[1] in _KEYS and "Extra data" not in str(reason):  # else it is JSON that more text follows
            why = str(reason).removeprefix("not JSON: ")
            raise Refused(f"not JSON: {name} begins as messages in JSON do, but {why}") from None
        return None
    return value if looks_like_messages(value) else None


def looks_like_messages(value: Any) -> bool:
    """Return whether a value is a message, or a list that begins with one, of a role that is known."""
    if isinstance(value, dict) and len(value) == 1:
        value = next((value[key] for key in _LISTS if key in value), value)
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict) or first.keys().isdisjoint((*CONTENT_KEYS, *SPOKEN)):
        return False
    role = next((first[key] for key in ROLE_KEYS if first.get(key) is not None), None)
    return isinstance(role, str) and role.strip().lower() in _KNOWN


def same_beginning(one: Sequence[dict[str, str]], two: Sequence[dict[str, str]]) -> int:
    """Return how many messages both begin with, by what `spoken` tells of each."""
    for count, (left, right) in enumerate(zip(one, two, strict=False)):
        said, other = left["content"], right["content"]
        if left["role"] != right["role"] or (said != other and said.strip() != other.strip()):
            return count
        if (MORE in left or MORE in right) and spoken([left]) != spoken([right]):
            return count
    return min(len(one), len(two))


def say_the_same(one: Sequence[dict[str, str]], two: Sequence[dict[str, str]]) -> bool:
    """Return whether messages say the same: `spoken` of both is equal."""
    return len(one) == len(two) == same_beginning(one, two)


def look_the_same(one: Sequence[dict[str, str]], two: Sequence[dict[str, str]]) -> bool:
    """Return whether messages differ at most in whitespace and in how their characters are composed (NFC, NFD)."""
    return len(one) == len(two) and all(
        left["role"] == right["role"] and left.get(MORE) == right.get(MORE) and _looks_as(left, right)
        for left, right in zip(one, two, strict=True)
    )


def _looks_as(left: dict[str, str], right: dict[str, str]) -> bool:
    """Return whether contents look the same; most differ in their first words, and are known by these."""
    texts = left["content"], right["content"]
    one, two = (_shown(" ".join(text.split(None, 3)[:3])) for text in texts)
    return one == two and _shown(" ".join(texts[0].split())) == _shown(" ".join(texts[1].split()))


def _shown(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def spoken(messages: Sequence[dict[str, str]]) -> list[tuple[str, str, str]]:
    """Return what messages say without their incidental fields, ids and times, for comparing prompts."""
    return [
        (message["role"], message["content"].strip(), _spoken(more) if (more := message.get(MORE)) else "")
        for message in messages
    ]


def without_incidents(messages: Messages) -> Messages:
    """Return messages without their incidental fields, ids and times: what tells prompts apart."""
    return [_without_incidents(message) if message.get(MORE) else message for message in messages]


def _without_incidents(message: dict[str, str]) -> dict[str, str]:
    said = _spoken(message[MORE])
    bare_message = {name: text for name, text in message.items() if name != MORE}
    return bare_message | {MORE: said} if said else bare_message


def _spoken(more: str) -> str:
    said = {key: value for key, value in json.loads(more).items() if key in SPOKEN}
    return to_json(said) if said else ""
