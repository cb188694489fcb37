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
SECRET_VARIABLE = "SAFER_RAY_SESSION_SECRET"  # signs sessions in several processes alike; by default each has its own
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
        self.secret = os.environ.get(SECRET_VARIABLE, "").encode() or secrets.token_bytes(32)
        self._stamp: tuple[int, int] | None = None
        self.listed = listed
        self._keys = listed
        if file is not None:
            self._keys = _read_file(file)
            self._stamp = _stamp(file)
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

    def name_of(self, token: str) -> str | None:
        """Whose token it is, in a time that does not depend on it; None: nobody's."""
        digest, name = digest_of(token), None
        for key in self.current():
            if hmac.compare_digest(key.digest, digest):
                name = key.name
        return name

    # Sessions: what the cookie holds is signed, tells no key, and dies with its key

    def open_session(self, name: str, now: float | None = None) -> str:
        """A cookie's value for the holder of this key."""
        expiry = int((time.time() if now is None else now) + SESSION_S)
        said = f"{expiry}.{secrets.token_urlsafe(NONCE_BYTES)}.{base64.urlsafe_b64encode(name.encode()).decode()}"
        return f"{said}.{self._sign(said, name)}"

    def session_of(self, value: str, now: float | None = None) -> str | None:
        """Whose session it is; None: of nobody, expired, or its key is gone."""
        said, _, signature = value.rpartition(".")
        try:
            expiry, _, encoded = said.split(".")
            name = base64.urlsafe_b64decode(encoded).decode()
            expires = int(expiry)
        except ValueError:
            return None
        if not signature.isascii() or not hmac.compare_digest(self._sign(said, name), signature):
            return None
        return name if (time.time() if now is None else now) < expires else None

    def _sign(self, said: str, name: str) -> str:
        digest = next((key.digest for key in self.current() if key.name == name), None)
        if digest is None:
            return secrets.token_hex(32)  # equals nothing
        return hmac.new(self.secret, f"{digest}.{said}".encode(), hashlib.sha256).hexdigest()


def _read_file(path: Path) -> tuple[Key, ...]:
    try:
        return parse_keys(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"keys file {path} cannot be read: {reason}") from None


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


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
