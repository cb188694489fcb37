"""Keys of the scoring service: tokens that are shown once, and the hashes that are kept of them."""

import hashlib
import re
import secrets
from collections import Counter
from datetime import UTC, datetime
from typing import NamedTuple

from safer_ray.errors import UserError

PREFIX = "safer_"
KEY = re.compile(r"([A-Za-z0-9][\w.@-]{0,63}):sha256:([0-9a-f]{64})", re.ASCII)
LEAST_DAYS = 0.001  # that a key lasts, whose line tells seconds
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
NUMBER = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
FORM = "NAME:sha256:HEX, then any of expires=2027-01-31T00:00:00Z, requests=N, pairs=N (a minute), parted by spaces"


class Key(NamedTuple):
    """A caller's name and the SHA-256 of its token; a token has 256 random bits, so no slow hash is needed."""

    name: str
    digest: str
    expires: float | None = None  # seconds since the epoch; None: never
    requests: int | None = None  # a minute, at most
    pairs: int | None = None

    def is_open(self, now: float) -> bool:
        """Return whether the key has not expired."""
        return self.expires is None or now < self.expires

    @property
    def line(self) -> str:
        """The key's line in a keys file."""
        said = [f"{self.name}:sha256:{self.digest}"]
        said += (
            [] if self.expires is None else [f"expires={datetime.fromtimestamp(self.expires, UTC):%Y-%m-%dT%H:%M:%SZ}"]
        )
        said += [f"{name}={count}" for name in ("requests", "pairs") if (count := getattr(self, name)) is not None]
        return " ".join(said)


def new_key(
    name: str, expires: float | None = None, requests: int | None = None, pairs: int | None = None
) -> tuple[str, str]:
    """A token, to be shown once, and its line for a keys file.

    Raises:
        UserError: a name, a time or a limit that such a line cannot hold.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    key = Key(name, digest_of(token), expires, requests, pairs)
    if not KEY.fullmatch(f"{name}:sha256:{key.digest}"):
        raise UserError(f"key name {name!r}: wanted 1 to 64 letters, digits, and . _ @ -, a letter or digit first")
    for limit, count in (("requests", requests), ("pairs", pairs)):
        if count is not None and not NUMBER.fullmatch(str(count)):
            raise UserError(f"key {name}: {limit} {count} a minute; wanted 1 to 999999999")
    return token, key.line


def expiry_in(days: float, now: float) -> float:
    """When a key that is made now and lasts so many days expires, in seconds since the epoch.

    Raises:
        UserError: no such time.
    """
    if not LEAST_DAYS <= days <= 36_500:
        raise UserError(f"--days {days:g}: wanted {LEAST_DAYS} (a minute and a half) or more, at most 36500")
    return now + 86_400 * days


def digest_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def parse_keys(text: str, source: str) -> tuple[Key, ...]:
    """Keys from lines `NAME:sha256:HEX [expires=TIME] [requests=N] [pairs=N]`; empty ones and those that begin with #
    are left out.

    Raises:
        UserError: another line, which is not shown, since it may be a token.
    """
    keys = []
    for number, line in enumerate(re.split(r"[\n,]", text), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if (key := _parse(line)) is None:
            raise UserError(f"{source}, line {number}: wanted {FORM}, as `safer-ray key` prints it")
        keys.append(key)
    twice = [name for name, count in Counter(key.name for key in keys).items() if count > 1]
    if twice:
        raise UserError(f"{source}: two keys are named {twice[0]!r}; name each of them otherwise")
    return tuple(keys)


def _parse(line: str) -> Key | None:
    """The key that a line tells; None where it tells none, or anything else beside it."""
    first, *more = line.split()
    found = KEY.fullmatch(first)
    told = dict(word.partition("=")[::2] for word in more)
    if not found or len(told) < len(more) or not told.keys() <= {"expires", "requests", "pairs"}:
        return None
    expires = told.pop("expires", None)
    if any(not NUMBER.fullmatch(count) for count in told.values()):
        return None
    until = None if expires is None else _time(expires)
    if expires is not None and until is None:
        return None
    return Key(found[1], found[2], until, **{limit: int(count) for limit, count in told.items()})


def _time(text: str) -> float | None:
    """Seconds since the epoch of a time in UTC to the second; None where it is no such time."""
    try:
        return datetime.fromisoformat(text).timestamp() if TIME.fullmatch(text) else None
    except ValueError:
        return None
