"""Access control as plain ASGI: a caller is known by its key or address, and counted, before its request is read."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh_batch.errors import BDHError
from bdh_batch.http.auth.caller import Caller, bearer, by_address, by_key
from bdh_batch.http.auth.keys import KeyRing
from bdh_batch.http.auth.rates import Rates
from bdh_batch.http.errors import Unauthorized, error_response


class Access:
    """Admits requests that carry a key, if there are keys, and that do not come too often.

    Requests without a right key count for their address, so that nobody can try keys without end.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing | None, rates: Rates, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._rates = rates
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["caller"], state["standing"] = by_address(scope), {}
        # A preflight carries no key by design; the request that follows it does.
        if scope["path"] not in self._open and scope["method"] != "OPTIONS":
            send = _with_headers(send, state["standing"])
            try:
                state["caller"] = await self._let_in(scope, state["caller"], state["standing"])
            except BDHError as refusal:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _let_in(self, scope: Scope, caller: Caller, standing: dict[str, str]) -> Caller:
        given = bearer(scope)
        key = None if self._keys is None else self._keys.find(given)
        if key is not None:
            caller = by_key(key)
        await self._rates.count_request(caller, standing)
        if self._keys is not None and key is None:
            raise Unauthorized(
                "Incorrect API key provided."
                if given
                else "No API key provided. Send it in a header: Authorization: Bearer KEY."
            )
        return caller


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    """`headers` are read when the response begins: what is learnt until then is sent."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return wrapped
