"""HTTP around a service: routes, keys, limits, headers, errors. Knows no Ray, no torch."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles

from safer_ray.service.access import Access, sign_in_routes
from safer_ray.service.api import AuditorInfo, FeatureDetail, Features, Health, ScoreRequest, ScoreResponse
from safer_ray.service.auth import Keys
from safer_ray.service.headers import Headers, OnAnswer
from safer_ray.service.problem_pages import ProblemPages
from safer_ray.service.problems import (
    Problem,
    ProblemDetails,
    documented,
    handle_problems,
    overloaded,
    too_late,
    unavailable,
)
from safer_ray.service.rate_limits import Rates, counted_pairs
from safer_ray.service.render import STATIC
from safer_ray.service.request_limits import LimitBodies, Limits, LimitsOf, check_sizes, read_json
from safer_ray.service.request_parsing import read_pairs
from safer_ray.service.service import Service
from safer_ray.service.web import pages

API_VERSION = "1.0.0"
DESCRIPTION = "Says which preference pairs teach a reward model the wrong thing, and which sentences made them so."
READY_S = 5.0
SECURED: dict[str, Any] = {"security": [{"bearer": []}, {}]}  # by a key, where the service has any


class LimitedRequest(Request):
    """A request whose JSON is counted before it is parsed and before anything is made of it."""

    def __init__(self, request: Request, limits: Limits) -> None:
        super().__init__(request.scope, request.receive)
        self.limits = limits

    async def json(self) -> Any:
        tree = read_json(await self.body(), self.limits)
        check_sizes(tree, self.limits)
        return tree


def limited_route(service: Service, limits: LimitsOf) -> type[APIRoute]:
    """Routes that read JSON within limits, and nothing where there is no room for more."""

    class LimitedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def limited(request: Request) -> Response:
                if service.full():
                    raise overloaded()
                return await handle(LimitedRequest(request, limits()))

            return limited

    return LimitedRoute


def create_api(
    service: Service,
    limits: Limits | LimitsOf | None = None,
    keys: Keys | None = None,
    hosts: Sequence[str] = (),
    on_answer: OnAnswer | None = None,
    ingresses: int = 1,
) -> FastAPI:
    """The application, one of `ingresses` alike. `hosts` are the names that it answers to; none: to all. `on_answer` is
    told of every answer."""
    fixed = limits if isinstance(limits, Limits) else Limits()
    current = limits if callable(limits) else lambda: fixed
    keys = keys or Keys()
    api = FastAPI(
        title="safer_ray",
        version=API_VERSION,
        description=DESCRIPTION,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    handle_problems(api)
    api.include_router(scoring_routes(service, current))
    api.include_router(telling_routes(service))
    api.include_router(health_routes(service))
    api.include_router(sign_in_routes(keys))
    api.include_router(pages(service, current))
    api.mount("/static", StaticFiles(directory=STATIC), name="static")
    api.openapi = lambda: document_of(api)  # type: ignore[method-assign]
    api.add_middleware(LimitBodies, limits=current)
    api.add_middleware(Access, keys=keys, hosts=tuple(hosts), rates=Rates(ingresses))
    api.add_middleware(ProblemPages)
    api.add_middleware(Headers, on_answer=on_answer)
    return api


def scoring_routes(service: Service, limits: LimitsOf) -> APIRouter:
    router = APIRouter(route_class=limited_route(service, limits))

    @router.post(
        "/v1/score",
        response_model=ScoreResponse,
        responses=documented(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504),
        tags=["scores"],
        openapi_extra=SECURED,
    )
    async def score(request: ScoreRequest, asked: Request) -> Response:
        """Score each pair; what is wrong with one is told in its place."""
        seconds = limits().answer_s
        with counted_pairs(asked.scope, len(request.pairs)):
            try:
                async with asyncio.timeout(seconds):
                    results = await service.score(read_pairs(request, limits()), request.explain)
            except TimeoutError:
                raise too_late(seconds) from None
        answer = ScoreResponse(auditor=results.auditor, red_team=results.red_team, results=results)
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


def telling_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["auditor"])
    responses = documented(401, 403, 429, 500)

    @router.get("/auditor", responses=responses, openapi_extra=SECURED)
    async def auditor() -> AuditorInfo:
        """The bundle that pairs are scored by, and the reference that they are compared with."""
        return await service.info()

    @router.get("/features", responses=responses, openapi_extra=SECURED)
    async def features() -> Features:
        """The features that make up the score."""
        return Features(auditor=(await service.info()).name, features=await service.features())

    @router.get("/features/{feature_id}", responses=documented(401, 403, 404, 422, 429, 500), openapi_extra=SECURED)
    async def feature(feature_id: int) -> FeatureDetail:
        """One of them: how it was judged, where and how strongly it fires."""
        found = await service.feature(feature_id)
        if found is None:
            raise Problem(404, f"feature {feature_id} is none of this auditor's; GET /v1/features lists them")
        return found

    return router


def health_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["health"])
    is_ready = shared(service.ready)

    @router.get("/healthz", responses=documented(500, 503))
    async def healthz() -> Health:
        """200 where this process answers."""
        if not await service.health():
            raise unavailable("this process is shutting down")
        return Health(status="ok")

    @router.get("/readyz", responses=documented(500, 503))
    async def readyz() -> Health:
        """200 where the bundle is loaded and a scorer answers in time."""
        if not await is_ready():
            raise unavailable(f"no scorer answers within {READY_S:g} s; try again")
        return Health(status="ok")

    return router


def shared(ask: Callable[[], Awaitable[bool]]) -> Callable[[], Awaitable[bool]]:
    """Return the question such that all who ask while an answer is awaited get that one, False after READY_S seconds:
    anybody may ask, and each question of its own would take room at a scorer."""
    asked: asyncio.Task[bool] | None = None

    async def answer() -> bool:
        try:
            async with asyncio.timeout(READY_S):
                return await ask()
        except TimeoutError:
            return False

    async def join() -> bool:
        nonlocal asked
        if asked is None or asked.done():
            asked = asyncio.create_task(answer())
        return await asyncio.shield(asked)  # whoever goes away does so alone

    return join


def document_of(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: errors are problem details everywhere, keys are bearer tokens."""
    if api.openapi_schema is None:
        document = get_openapi(
            title=api.title,
            version=api.version,
            description=api.description,
            routes=api.routes,
            openapi_version="3.1.0",
        )
        parts = document["components"]
        for unused in ("HTTPValidationError", "ValidationError"):
            parts["schemas"].pop(unused, None)
        parts["schemas"]["ProblemDetails"] = ProblemDetails.model_json_schema()
        parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        api.openapi_schema = document
    return api.openapi_schema
