"""Assembles the application: routes, error responses, and the middleware in its order."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from bdh_batch.errors import BDHError, QueueFull
from bdh_batch.http.auth.access import Access
from bdh_batch.http.auth.hosts import ANY, AllowedHosts
from bdh_batch.http.endpoints import open_paths
from bdh_batch.http.errors import handle_error, handle_fault, handle_http_exception
from bdh_batch.http.middleware import BodyLimit, Origins, RequestContext
from bdh_batch.http.routes import Routes
from bdh_batch.http.serving import Serving
from bdh_batch.settings import Settings


def create_app(serving: Serving, local_only: bool = False) -> ASGIApp:
    """The ASGI application. `local_only`: no other machine can connect."""

    async def queue_full(request: Request, error: Exception) -> Response:
        assert isinstance(error, BDHError)
        serving.count_refusal(error, getattr(request.state, "client", None))
        return await handle_error(request, error)

    routes = Routes(serving).table()
    app = Starlette(
        routes=routes,
        middleware=_middleware(serving, local_only),
        exception_handlers={
            BDHError: handle_error,
            QueueFull: queue_full,
            HTTPException: handle_http_exception,
            Exception: handle_fault,
        },
    )
    app.router.redirect_slashes = False  # a path that is not there is a 404, with the error body
    # Outside Starlette, so that no response goes without an id, not even that to a fault in the middleware.
    return RequestContext(app, serving.metrics, routes, serving.spans)


def _middleware(serving: Serving, local_only: bool) -> list[Middleware]:
    """First listed is outermost: browsers can read refusals, and a wrong key costs no more than a look at it."""
    settings = serving.settings
    server, limits = settings.server, settings.limits
    return [
        *_allowed_hosts(settings, local_only),
        Middleware(Origins, origins=server.cors_origins),
        Middleware(Access, admission=serving.admission, open_paths=open_paths(settings.auth)),
        Middleware(
            BodyLimit,
            most=limits.max_body_bytes,
            seconds=limits.body_seconds,
            origins=tuple(server.cors_origins),
            most_of_file=settings.store.max_state_bytes,
        ),
    ]


def _allowed_hosts(settings: Settings, local_only: bool) -> list[Middleware]:
    """Where nothing is set, a server that only this machine's programs reach is kept from web pages; one with keys
    needs no such thing, and one behind a proxy has that one's names."""
    server = settings.server
    if server.allowed_hosts is None:
        guarded = local_only and not settings.auth.enabled and not server.trusted_proxies
        return [Middleware(AllowedHosts, names=None)] if guarded else []
    return [] if ANY in server.allowed_hosts else [Middleware(AllowedHosts, names=server.allowed_hosts)]
