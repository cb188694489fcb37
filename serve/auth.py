"""Who may ask: keys of which only hashes are kept, and sessions of people who signed in to the page with one."""

import base64
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

from safer_ray.errors import UserError
from safer_ray.keys import Key, digest_of, parse_keys

KEYS_VARIABLE = "SAFER_RAY_KEYS"  # lines of a keys file, or such separated by commas
SECRET_VARIABLE = "SAFER_RAY_SESSION_SECRET"  # without it, whoever reads the keys' hashes can sign a session with them
COOKIE = "safer_ray_session"
SESSION_S = 12 * 3600
NONCE_BYTES = 16
OWN_SITES = ("same-origin", "none")  # of Sec-Fetch-Site: a form of this page, or typed by hand


class Keys:
    """The keys that open the service, from a file or the environment; a changed file counts from the next request on.

    A file that becomes unreadable or wrong opens nothing until it is mended.
    """

    def __init__(self, file: Path | None = None, listed: tuple[Key, ...] = ()) -> None:
        self.file = file
        self.secret = os.environ.get(SECRET_VARIABLE, "").encode()
        self._stamp: tuple[int, int, int, int] | None = None
        self.listed = listed
        self._keys = listed
        if file is not None:
            self._stamp = _stamp(file)  # before it is read: what changes meanwhile is seen at the next request
            self._keys = _read_file(file)
            if not self._keys:
                raise UserError(f"{file} holds no key; write the line there that `safer-ray key NAME` prints")

    def __bool__(self) -> bool:
        """Whether a key is asked for at all."""
        return self.file is not None or bool(self._keys)

    def current(self) -> tuple[Key, ...]:
        """The keys of now."""
        if self.file is not None and (stamp := _stamp(self.file)) != self._stamp:
            self._stamp = stamp
            try:
                self._keys = _read_file(self.file)
            except UserError:
                self._keys = ()
        return self._keys

    def key_of(self, token: str) -> Key | None:
        """Return the key that a token is of, expired or not, in constant time; None: of none."""
        digest, found = digest_of(token), None
        for key in self.current():
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def name_of(self, token: str, now: float | None = None) -> str | None:
        """Return whose token it is; None: nobody's, or its key has expired."""
        key = self.key_of(token)
        return key.name if key is not None and key.is_open(_now(now)) else None

    # Sessions: what the cookie holds is signed, tells no key, and dies with its key. Every process that has the key
    # signs alike, so that they need not know of each other.

    def open_session(self, name: str, now: float | None = None) -> str:
        """Return a cookie's value for the holder of this key."""
        expiry = int(_now(now) + SESSION_S)
        said = f"{expiry}.{secrets.token_urlsafe(NONCE_BYTES)}.{base64.urlsafe_b64encode(name.encode()).decode()}"
        return f"{said}.{self._sign(said, self._named(name))}"

    def session_key(self, value: str, now: float | None = None) -> Key | None:
        """Return the key that a session was opened with; None: it is nobody's, it is over, or the key is."""
        said, _, signature = value.rpartition(".")
        try:
            expiry, _, encoded = said.split(".")
            key = self._named(base64.urlsafe_b64decode(encoded).decode())
            expires = int(expiry)
        except ValueError:
            return None
        if not signature.isascii() or not hmac.compare_digest(self._sign(said, key), signature):
            return None
        return key if key is not None and key.is_open(_now(now)) and _now(now) < expires else None

    def session_of(self, value: str, now: float | None = None) -> str | None:
        """Return whose session it is; None: of nobody, over, or its key is gone or expired."""
        key = self.session_key(value, now)
        return None if key is None else key.name

    def _named(self, name: str) -> Key | None:
        return next((key for key in self.current() if key.name == name), None)

    def _sign(self, said: str, key: Key | None) -> str:
        if key is None:
            return secrets.token_hex(32)  # equals nothing
        own = hmac.new(b"safer_ray session" + self.secret, key.digest.encode(), hashlib.sha256).digest()
        return hmac.new(own, said.encode(), hashlib.sha256).hexdigest()


def _now(now: float | None) -> float:
    return time.time() if now is None else now


def _read_file(path: Path) -> tuple[Key, ...]:
    try:
        return parse_keys(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"keys file {path} cannot be read: {reason}") from None


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    """Return what differs once a file was written or replaced, also by one of its size and modification time."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns


def find_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys that a file or the environment names; none: the service asks for none.

    Raises:
        UserError: they cannot be read.
    """
    listed = parse_keys(environment.get(KEYS_VARIABLE, ""), KEYS_VARIABLE)
    if file is not None and listed:
        raise UserError(f"keys come from {file} and from {KEYS_VARIABLE}; give one of them")
    return Keys(file, listed)


def bearer_of(header: str | None) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def is_own(headers: Mapping[str, str], scheme: str) -> bool:
    """Whether a form was sent by a page of this host: browsers tell it by Sec-Fetch-Site and Origin."""
    site, origin, host = (headers.get(name) for name in ("sec-fetch-site", "origin", "host"))
    if site is not None:
        return site in OWN_SITES
    return origin is None or origin in (f"{scheme}://{host}", f"https://{host}")  # none: no browser sent it
