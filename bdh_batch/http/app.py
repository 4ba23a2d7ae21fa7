"""Assembles the application: routes, error responses, and the middleware in its order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from bdh_batch.errors import BDHError, QueueFull, TooLate
from bdh_batch.http.auth.access import Access
from bdh_batch.http.auth.hosts import ANY, AllowedHosts
from bdh_batch.http.auth.keys import KeyRing
from bdh_batch.http.auth.quota import Quota
from bdh_batch.http.auth.rates import Rates
from bdh_batch.http.endpoints import open_paths
from bdh_batch.http.errors import handle_error, handle_fault, handle_http_exception
from bdh_batch.http.gate import Gate
from bdh_batch.http.middleware import BodyLimit, Origins, RequestContext
from bdh_batch.http.routes import Routes
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Settings

if TYPE_CHECKING:
    from bdh_batch.observability.spans import Spans


def create_app(
    settings: Settings,
    gate: Gate,
    metrics: Metrics,
    keys: KeyRing | None,
    spans: Spans | None = None,
    local_only: bool = False,
) -> ASGIApp:
    """The ASGI application.

    Args:
        keys: without them, none is asked for.
        local_only: no other machine can connect.

    Raises:
        ConfigError: what the rates are counted in cannot be reached.
    """
    rates = Rates(settings.rate_limiting, metrics)

    async def queue_full(request: Request, error: Exception) -> Response:
        reason = "deadline" if isinstance(error, TooLate) else "queue_full"
        metrics.refused(reason, getattr(request.state, "model", None))
        return await handle_error(request, error)

    quota = Quota(rates, settings.limits.max_prompt_tokens, settings.scheduler.top_priority)
    routes = Routes(gate, metrics, settings, quota).table()
    app = Starlette(
        routes=routes,
        middleware=_middleware(settings, keys, rates, local_only),
        exception_handlers={
            BDHError: handle_error,
            QueueFull: queue_full,
            HTTPException: handle_http_exception,
            Exception: handle_fault,
        },
    )
    app.router.redirect_slashes = False  # a path that is not there is a 404, with the error body
    # Outside Starlette, so that no response goes without an id, not even that to a fault in the middleware.
    return RequestContext(app, metrics, [route.path for route in routes], spans)


def _middleware(settings: Settings, keys: KeyRing | None, rates: Rates, local_only: bool) -> list[Middleware]:
    """First listed is outermost: browsers can read refusals, and a wrong key costs no more than a look at it."""
    server, limits = settings.server, settings.limits
    return [
        *_allowed_hosts(settings, local_only),
        Middleware(Origins, origins=server.cors_origins),
        Middleware(Access, keys=keys, rates=rates, open_paths=open_paths(settings.auth)),
        Middleware(
            BodyLimit, most=limits.max_body_bytes, seconds=limits.body_seconds, origins=tuple(server.cors_origins)
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
