"""Errors as RFC 9457 problem details: one line that says what to do, no stack trace, no text of a request."""

import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

PROBLEM_JSON = "application/problem+json"
logger = logging.getLogger("safer_ray.serve")


class ProblemDetails(BaseModel):
    """RFC 9457."""

    type: str = Field("about:blank", description="what the status says, and nothing beyond")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str


class Problem(HTTPException):
    """Ends a request with this status."""

    headers: Mapping[str, str]

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, dict(headers or {}))

    @property
    def status(self) -> int:
        return self.status_code

    def __reduce__(self) -> tuple[type["Problem"], tuple[int, str, Mapping[str, str]]]:
        return Problem, (self.status, self.detail, self.headers)


def overloaded(retry_after_s: float = 1.0) -> Problem:
    """There is no room for more requests."""
    after = max(1, math.ceil(retry_after_s))
    return Problem(429, f"too many requests wait already; try again in {after} s", {"Retry-After": str(after)})


def unavailable(detail: str, retry_after_s: float = 2.0) -> Problem:
    """There is no scorer, for now."""
    return Problem(503, detail, {"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def too_late(seconds: float) -> Problem:
    """The scorer may still be at work."""
    return Problem(504, f"no answer within {seconds:g} s; send fewer pairs or try again", {"Retry-After": "5"})


def respond_with(problem: HTTPException) -> JSONResponse:
    status = problem.status_code
    title = HTTPStatus(status).phrase
    details = ProblemDetails(type="about:blank", title=title, status=status, detail=str(problem.detail))
    return JSONResponse(details.model_dump(), status, problem.headers, PROBLEM_JSON)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of these answers."""
    content = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def explain_errors(errors: Sequence[Any]) -> str:
    """The first problem of a body in one line, with its place; what was sent there is left out."""
    first, *rest = errors
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ") + (f" (and {len(rest)} more)" if rest else "")
    return f"{place.removeprefix('.')}: {message}"


def log_without_texts(error: BaseException) -> None:
    """Return where an error came from; its message may quote a text, so only its kind is told."""
    frames = traceback.extract_tb(error.__traceback__)
    places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-8:]))
    logger.error("%s at %s", type(error).__name__, places)


def log_at_once() -> None:
    """Let this replica's errors reach its log file as they come; what goes to standard error instead lies in a buffer
    of Serve's until a thousand lines have come."""
    logger.handlers = logging.getLogger("ray.serve").handlers[:]
    logger.propagate = False


def handle_problems(api: FastAPI) -> None:
    """All errors of an application become problem details."""

    @api.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        return respond_with(Problem(422, explain_errors(error.errors())))

    @api.exception_handler(HTTPException)
    async def refused(_request: Request, error: HTTPException) -> JSONResponse:
        return respond_with(error)


def internal_error(error: Exception) -> Problem:
    """Return what is told of an error that nobody foresaw; where it came from is in the log."""
    log_without_texts(error)
    return Problem(500, "the service failed at this request; its log says where")
