"""Puts the front door together: routes, error answers, and the middleware in its order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from bdh_batch.errors import BDHError, ConfigError, QueueFull, TooLate
from bdh_batch.http.errors import handle_error, handle_fault, handle_http_exception
from bdh_batch.http.gate import Gate
from bdh_batch.http.middleware import ApiKeys, BodyLimit, RateLimit, RequestContext
from bdh_batch.http.routes import Routes
from bdh_batch.settings import Auth, Settings
from bdh_batch.telemetry import Metrics


def create_app(settings: Settings, gate: Gate, metrics: Metrics) -> ASGIApp:
    """The ASGI application.

    Raises:
        ConfigError: keys are asked for, but there are none.
    """

    async def queue_full(request: Request, error: Exception) -> Response:
        metrics.refused("deadline" if isinstance(error, TooLate) else "queue_full")
        return await handle_error(request, error)

    routes = Routes(gate, metrics, settings).table()
    app = Starlette(
        routes=routes,
        middleware=_middleware(settings, metrics),
        exception_handlers={
            BDHError: handle_error,
            QueueFull: queue_full,
            HTTPException: handle_http_exception,
            Exception: handle_fault,
        },
    )
    app.router.redirect_slashes = False  # a path that is not there is a 404, with the error body
    # Outside Starlette, so that no answer goes without an id, not even that to a fault in the middleware.
    return RequestContext(app, metrics, [route.path for route in routes])


def _middleware(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """First listed is outermost: browsers can read refusals, and a wrong key costs no more than a look at it."""
    stack = []
    if settings.server.cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.server.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "openai-processing-ms", "retry-after", *RateLimit.HEADERS],
            )
        )
    if settings.auth.enabled:
        stack.append(Middleware(ApiKeys, keys=read_keys(settings.auth)))
    if settings.rate_limiting.enabled:
        rate = settings.rate_limiting.requests_per_minute
        stack.append(Middleware(RateLimit, requests_per_minute=rate, by_key=settings.auth.enabled, metrics=metrics))
    stack.append(Middleware(BodyLimit, most=settings.limits.max_body_bytes))
    return stack


def read_keys(auth: Auth) -> Sequence[str]:
    """The keys of the settings and of the key file."""
    keys = [key.get_secret_value() for key in auth.api_keys]
    if auth.api_keys_file is not None:
        keys += _keys_in(auth.api_keys_file)
    if not keys or not all(keys):
        raise ConfigError(
            "auth.enabled asks for keys: set auth.api_keys or auth.api_keys_file to ones that are not empty"
        )
    return keys


def _keys_in(file: Path) -> list[str]:
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"auth.api_keys_file: {file} cannot be read ({error})") from error
    keys = (line.partition("#")[0].strip() for line in lines)
    return [key for key in keys if key]
