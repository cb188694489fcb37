"""Keys of the scoring service: tokens that are shown once, and the hashes that are kept of them."""

import hashlib
import re
import secrets
from typing import NamedTuple

from safer_ray.errors import UserError

PREFIX = "safer_"
KEY_LINE = re.compile(r"([A-Za-z0-9][\w.@-]{0,63}):sha256:([0-9a-f]{64})", re.ASCII)


class Key(NamedTuple):
    """A caller's name and the SHA-256 of its token; a token has 256 random bits, so no slow hash is needed."""

    name: str
    digest: str


def new_key(name: str) -> tuple[str, str]:
    """A token, to be shown once, and its line for a keys file.

    Raises:
        UserError: a name that such a line cannot hold.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    line = f"{name}:sha256:{digest_of(token)}"
    if not KEY_LINE.fullmatch(line):
        raise UserError(f"key name {name!r}: wanted 1 to 64 letters, digits, and . _ @ -, a letter or digit first")
    return token, line


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def parse_keys(text: str, source: str) -> tuple[Key, ...]:
    """Keys from lines `NAME:sha256:HEX`; empty ones and those that begin with # are left out.

    Raises:
        UserError: another line, which is not shown, since it may be a token.
    """
    keys = []
    for number, line in enumerate(re.split(r"[\n,]", text), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not (found := KEY_LINE.fullmatch(line)):
            raise UserError(f"{source}, line {number}: wanted NAME:sha256:HEX as `safer-ray key` prints it")
        keys.append(Key(found[1], found[2]))
    names = [key.name for key in keys]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{source}: two keys are named {twice!r}; name each of them otherwise")
    return tuple(keys)
