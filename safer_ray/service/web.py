"""The page's routes: forms, results, features. It works without JavaScript and keeps nothing that is sent."""

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile

from safer_ray.service.api import FailedPair, ScoredPair
from safer_ray.service.auth import COOKIE
from safer_ray.service.problems import Problem, overloaded
from safer_ray.service.rate_limits import RateLimited, counted_pairs, pairs_at_once
from safer_ray.service.render import error_page, examples, respond
from safer_ray.service.request_limits import Limits, LimitsOf, chars_of
from safer_ray.service.request_parsing import Read, Unread
from safer_ray.service.results import (
    by_suspicion,
    carried,
    columns_left_out,
    feature_figure,
    scored_row,
    show,
    without_score,
)
from safer_ray.service.service import Service
from safer_ray.service.uploads import MAX_ROWS, Line, TooManyRows, parse_row, read_lines, read_one, scored_lines
from safer_ray.service.verdict import DETECTORS

FIELDS = ("prompt", "chosen", "rejected")
BLANK = dict.fromkeys((*FIELDS, "row"), "")
NAME_CHARS = 200  # of a file, as shown
MAX_FIELDS = 8  # of a form; the parser looks at each separator, also where no field stands between two
CHUNK = 32  # pairs of an upload that go to the service together
PATIENCE_S = 60.0  # how long an upload waits for a service that is busy
UNSAFE_NAME = re.compile(r"[^A-Za-z0-9_.-]+")

Result = ScoredPair | FailedPair
Form = Mapping[str, str]


class Notice(NamedTuple):
    """The notice above the form when the service gave no answer."""

    title: str
    detail: str


class View(NamedTuple):
    """A request's way to a page."""

    service: Service
    request: Request

    def page(
        self, template: str, status: int = 200, headers: Mapping[str, str] | None = None, **values: Any
    ) -> Response:
        return respond(template, status, headers, signed_in=COOKIE in self.request.cookies, **values)

    async def home(
        self, form: Form, status: int = 200, headers: Mapping[str, str] | None = None, **more: Any
    ) -> Response:
        """The form, with what was entered, what is wrong with it, or its result."""
        unset: dict[str, Any] = {"errors": {}, "notice": None, "shown": None, "chosen_example": ""}
        told = {"info": await self.service.info(), "examples": examples(), "detectors": DETECTORS, "max_rows": MAX_ROWS}
        return self.page("home.html", status, headers, here="/", form=form, **told, **unset | more)

    async def unanswered(self, form: Form, problem: Problem) -> Response:
        """The form as it was, and when to come again."""
        kept = "what you entered is still here" if any(form.values()) else "the file has to be sent anew"
        busy = "This key has scored its pairs." if isinstance(problem, RateLimited) else "The service is busy."
        title = busy if problem.status_code == 429 else "The scorer does not answer."
        notice = Notice(title, f"Try again in {retry_after(problem):.0f} s; {kept}.")
        return await self.home(form, problem.status_code, notice=notice, headers=problem.headers)

    async def scored(
        self, name: str, lines: Sequence[Line], results: Sequence[Result | None], as_file: bool
    ) -> Response:
        """A scored file: as a page, or as the file itself."""
        info = await self.service.info()
        rows = (scored_row(*row, info.name, info.red_team) for row in zip(lines, results, strict=True))
        stem = UNSAFE_NAME.sub("-", name.rpartition(".")[0] or name)[:80].strip("-.") or "pairs"
        download = f"{stem}.scored.jsonl"
        if as_file:
            headers = {"Content-Disposition": f'attachment; filename="{download}"', "Cache-Control": "no-store"}
            return StreamingResponse(scored_lines(rows), 200, headers, "application/jsonl")

        def page() -> Response:
            scored = by_suspicion(lines, results)
            return self.page(
                "upload.html",
                here="/",
                red_team=info.red_team,
                filename=name,
                download_name=download,
                scored=scored,
                flagged=sum(row.result.flag for row in scored),
                errors=without_score(lines, results),
                left_out=columns_left_out(lines),
                carried=carried(list(rows), scored),
            )

        return await run_in_threadpool(page)


def pages(service: Service, limits: LimitsOf) -> APIRouter:
    """The routes of the page."""
    router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

    @router.get("/")
    async def home(request: Request, example: Annotated[str, Query(max_length=40)] = "") -> Response:
        chosen = next((pair for pair in examples() if pair.name == example), None)
        form = BLANK if chosen is None else BLANK | {name: getattr(chosen, name) for name in FIELDS}
        return await View(service, request).home(form, chosen_example=example)

    @router.post("/")
    async def score(request: Request) -> Response:
        return await score_form(View(service, request), limits())

    @router.post("/upload")
    async def upload(request: Request) -> Response:
        return await score_file(View(service, request), limits())

    @router.get("/features")
    async def features(request: Request) -> Response:
        found = sorted(await service.features(), key=lambda feature: (-abs(feature.salience or 0.0), feature.id))
        view = View(service, request)
        return view.page("features.html", here="/features", info=await service.info(), features=found)

    @router.get("/features/{feature_id}")
    async def feature(request: Request, feature_id: int) -> Response:
        found = await service.feature(feature_id)
        if found is None:
            return error_page(404, f"This auditor has no selected feature {feature_id}.")
        ids = sorted(summary.id for summary in await service.features())
        at = ids.index(feature_id)
        return View(service, request).page(
            "feature.html",
            here="/features",
            feature=found,
            figure=feature_figure(found),
            before=ids[at - 1] if at else None,
            after=ids[at + 1] if at + 1 < len(ids) else None,
            strongest=max((context.value for context in found.contexts), default=0.0),
        )

    return router


async def score_form(view: View, limits: Limits) -> Response:
    """The result of the pair that was entered, or the form with what is wrong."""
    if (await view.request.body()).count(b"&") > MAX_FIELDS and not view.request.headers.get(
        "content-type", ""
    ).startswith("multipart/"):
        raise Problem(400, f"a form of more than {MAX_FIELDS} fields; this one has {len(BLANK)}")
    sent = await view.request.form(max_files=0, max_fields=MAX_FIELDS)
    form = BLANK | {name: str(sent[name]) for name in BLANK if name in sent}
    try:
        row = parse_row(form["row"]) if form["row"].strip() else {name: form[name] for name in FIELDS}
        pair = read_one(row, limits)
        with counted_pairs(view.request.scope, 1):
            [result] = await view.service.score([pair], explain=True)
    except Unread as error:
        return await view.home(form, 422, errors=errors_of(form, error.reason.detail))
    except Problem as problem:
        return await view.unanswered(form, problem)
    if isinstance(result, FailedPair):
        return await view.home(form, 422, errors=errors_of(form, result.error.detail))
    return await view.home(form, shown=show(pair, result, await view.service.info()))


async def score_file(view: View, limits: Limits) -> Response:
    """The scores of the file that was sent, or the form with what is wrong."""
    if view.service.full():  # before anything is made of the file
        return await view.unanswered(BLANK, overloaded())
    if not view.request.headers.get("content-type", "").startswith("multipart/"):  # else each separator is looked at
        return await view.home(BLANK, 422, errors={"file": "No file was chosen."})
    try:
        async with view.request.form(max_files=1, max_fields=4) as sent:
            file = sent.get("file")
            if not isinstance(file, UploadFile) or not file.filename:
                return await view.home(BLANK, 422, errors={"file": "No file was chosen."})
            name, as_file = file.filename[:NAME_CHARS], sent.get("answer") == "file"
            lines = await run_in_threadpool(read_lines, await file.read(), limits)
        if not lines:
            return await view.home(BLANK, 422, errors={"file": f"{name} is empty."})
        results = await score_lines(view, lines, limits)
    except TooManyRows as reason:
        return await view.home(BLANK, 413, errors={"file": f"{name} has {reason}."})
    except Problem as problem:
        return await view.unanswered(BLANK, problem)
    return await view.scored(name, lines, results, as_file)


async def score_lines(view: View, lines: Sequence[Line], limits: Limits) -> list[Result | None]:
    """The result of each line, None where it holds no pair; chunk after chunk, so that others get their turn between.

    Raises:
        Problem: the service had no answer to a chunk for PATIENCE_S.
    """
    pairs = [line.pair for line in lines if line.pair is not None]
    results: list[Result] = []
    for chunk in chunks_of(pairs, pairs_at_once(view.request.scope, CHUNK), limits.chars):
        results += await _patiently(view, chunk)
    scored = iter(results)
    return [None if line.pair is None else next(scored) for line in lines]


def chunks_of(pairs: Sequence[Read], most: int, chars: int) -> Iterator[list[Read]]:
    """Return the pairs in order, as many together as a request may hold: `most`, and of `chars` characters in all."""
    chunk: list[Read] = []
    room = chars
    for pair in pairs:
        size = chars_of([pair.pair.prompt, pair.pair.chosen, pair.pair.rejected])
        if chunk and (len(chunk) == most or size > room):
            yield chunk
            chunk, room = [], chars
        chunk.append(pair)
        room -= size
    if chunk:
        yield chunk


async def _patiently(view: View, pairs: Sequence[Read]) -> list[Result]:
    """Scores a chunk, and comes again as the service asks while it is busy."""
    waited = 0.0
    while True:
        try:
            with counted_pairs(view.request.scope, len(pairs)):
                return list(await view.service.score(pairs, explain=True))
        except Problem as problem:
            waited += (pause := retry_after(problem))
            if waited > PATIENCE_S:
                raise
            await asyncio.sleep(pause)


def retry_after(problem: Problem) -> float:
    """Seconds after which to come again."""
    return float((problem.headers or {}).get("Retry-After", 1))


def errors_of(form: Form, reason: str) -> dict[str, str]:
    """A reason by the field that it is about."""
    if form["row"].strip():
        return {"row": f"{reason}."}
    if reason == "equal responses":
        return {"rejected": "Both responses are the same; there is nothing to prefer."}
    field = next((name for name in FIELDS if re.search(rf"\b{name}\b", reason)), "prompt")
    return {field: "This field is empty." if reason.startswith("empty text") else f"{reason}."}
