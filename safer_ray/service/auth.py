"""Who may ask: keys of which only hashes are kept, and sessions of people who signed in to the page with one."""

import base64
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from safer_ray.errors import UserError
from safer_ray.service.keys import Key, digest_of, parse_keys
from safer_ray.service.problems import logger

KEYS_VARIABLE = "SAFER_RAY_KEYS"  # lines of a keys file, or such separated by commas
SECRET_VARIABLE = "SAFER_RAY_SESSION_SECRET"  # without it, whoever reads the keys' hashes can sign a session with them
COOKIE = "safer_ray_session"
SESSION_S = 12 * 3600
NONCE_BYTES = 16
SETTLED_S = 0.5  # without a change, after which a file that was written in place is whole
GRACE_S = 10.0
OWN_SITES = ("same-origin", "none")  # of Sec-Fetch-Site: a form of this page, or typed by hand


class Keys:
    """The keys that open the service, from a file or the environment.

    A file that is replaced whole counts from the next request on. One that is written in place counts when nothing has
    changed in it for SETTLED_S, since it may be read half-written before. The keys before it hold meanwhile, and for
    GRACE_S where the file is gone, empty or wrong; after that it opens nothing until it is mended. Both are logged.
    """

    def __init__(
        self, file: Path | None = None, listed: tuple[Key, ...] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.file = file
        self.secret = os.environ.get(SECRET_VARIABLE, "").encode()
        self.listed = listed
        self._clock = clock
        self._stamp: Stamp | None = None
        self._read_at: float | None = None  # when a changed file is read; None: it has been
        self._closed_at: float | None = None  # when the keys before a file that cannot be used end
        if file is not None:
            self._stamp = _stamp(file)  # before it is read: what changes meanwhile is seen at the next request
            listed = _read_file(file)
        self._use(listed)

    def __bool__(self) -> bool:
        """Return whether a key is asked for at all."""
        return self.file is not None or bool(self._by_digest)

    def _use(self, keys: tuple[Key, ...]) -> None:
        self._by_digest = {key.digest: key for key in keys}
        self._by_name = {key.name: key for key in keys}

    def _look(self, file: Path) -> None:
        """Take over what has changed in the file, when it may."""
        now, stamp = self._clock(), _stamp(file)
        if stamp != self._stamp:
            # A new inode is a rename, which is whole at once; the same one may be half written.
            replaced = stamp is not None and self._stamp is not None and stamp.inode != self._stamp.inode
            self._stamp, self._read_at = stamp, now if replaced else now + SETTLED_S - _age(file, SETTLED_S)
        if self._read_at is not None and now >= self._read_at:
            self._read_at = None
            try:
                self._use(_read_file(file))
                self._closed_at = None
            except UserError as error:
                if self._closed_at is None:
                    # From the file's own change on, so that all processes close at one moment, whenever they looked.
                    left = GRACE_S - _age(file, GRACE_S)
                    self._closed_at = now + left
                    logger.error("%s; the keys before it hold for %.0f s more", error, left)
        if self._closed_at is not None and now >= self._closed_at and self._by_digest:
            logger.error("keys file %s opens nothing until it is mended", file)
            self._use(())

    def key_of(self, token: str) -> Key | None:
        """Return the key that a token is of, expired or not; None: of none.

        It is found by its hash, of which nobody can choose a part: how long that takes tells nothing of a token.
        """
        if self.file is not None:
            self._look(self.file)
        return self._by_digest.get(digest_of(token))

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
        # compare_digest raises TypeError at other characters, which strangers may send.
        if not signature.isascii() or not hmac.compare_digest(self._sign(said, key), signature):
            return None
        return key if key is not None and key.is_open(_now(now)) and _now(now) < expires else None

    def session_of(self, value: str, now: float | None = None) -> str | None:
        """Return whose session it is; None: of nobody, over, or its key is gone or expired."""
        key = self.session_key(value, now)
        return None if key is None else key.name

    def _named(self, name: str) -> Key | None:
        if self.file is not None:
            self._look(self.file)
        return self._by_name.get(name)

    def _sign(self, said: str, key: Key | None) -> str:
        if key is None:
            return secrets.token_hex(32)  # equals nothing
        # By the key's hash, so that a session dies with its key and no list is needed; with the secret, where there is,
        # since whoever reads the hashes could sign otherwise.
        own = hmac.new(b"safer_ray session" + self.secret, key.digest.encode(), hashlib.sha256).digest()
        return hmac.new(own, said.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _now(now: float | None) -> float:
    return time.time() if now is None else now


def _read_file(path: Path) -> tuple[Key, ...]:
    try:
        keys = parse_keys(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UserError(f"keys file {path} cannot be read: {reason}") from None
    if not keys:
        raise UserError(f"{path} holds no key; write the line there that `safer-ray key NAME` prints")
    return keys


class Stamp(NamedTuple):
    """A file's mark, which differs once it was written or replaced, also by one of its size and modification time."""

    inode: int
    size: int
    modified: int
    changed: int


def _stamp(path: Path) -> Stamp | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return Stamp(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _age(path: Path, most: float) -> float:
    """Return the seconds since a file was changed or, where it is gone, its folder was: 0 to `most`, also by a clock
    that differs from this one."""
    try:
        changed = path.stat().st_ctime if path.exists() else path.parent.stat().st_mtime
    except OSError:
        return most
    return min(max(time.time() - changed, 0.0), most)


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
    """Return whether a form was sent by a page of this host: browsers tell it by Sec-Fetch-Site and Origin."""
    site, origin, host = (headers.get(name) for name in ("sec-fetch-site", "origin", "host"))
    if site is not None:
        return site in OWN_SITES
    return origin is None or origin in (f"{scheme}://{host}", f"https://{host}")  # none: no browser sent it
