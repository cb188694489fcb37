"""The route of a request, as the router sees it."""

from collections.abc import MutableMapping
from typing import Any


def path_of(scope: MutableMapping[str, Any]) -> str:
    """Return the path that routes are found by: the one the client sent, without the prefix the application lies below.

    `Request.url` is no substitute: some versions of Starlette put it together from the Host header, which the client
    writes.
    """
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    inside = root and path.startswith(root) and path[len(root) :][:1] in ("", "/")
    return path[len(root) :] if inside else path
