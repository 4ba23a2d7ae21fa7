"""Serves the files of the page, with headers by which a browser loads nothing but them and runs no other script."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from bdh_batch.ui.assets import INDEX, Asset, assets

# Trusted Types: the browser refuses what would make elements, or scripts, of text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again by its tag: a new server's page is never mixed with an old
}


class Pages:
    """Handles requests for the page and its files."""

    async def page(self, request: Request) -> Response:
        return _respond(request, assets()[INDEX])

    async def file(self, request: Request) -> Response:
        """Raises HTTPException: there is no such file."""
        name = request.path_params["id"]
        if not name:  # relative links need the page's own address
            return RedirectResponse("../ui", 308)
        asset = assets().get(name)
        if asset is None:
            raise HTTPException(404)
        return _respond(request, asset)


def wants_page(request: Request) -> bool:
    """Whether a browser asks for a page to show, where programs get JSON."""
    return "text/html" in request.headers.get("accept", "")


def _respond(request: Request, asset: Asset) -> Response:
    headers = HEADERS | {"etag": asset.etag, "vary": "accept"}  # at /, programs get JSON
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if asset.etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
