"""Access control as plain ASGI: a caller is known by its key or address, and counted, before its request is read."""

from __future__ import annotations

from collections.abc import Container, Mapping

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bdh_batch.errors import BDHError
from bdh_batch.http.auth.caller import Caller, bearer, by_address, by_key
from bdh_batch.http.auth.keys import Key, KeyRing
from bdh_batch.http.auth.rates import Rates
from bdh_batch.http.errors import Unauthorized, error_response


class Admission:
    """Admits requests that carry a key, if there are keys, and that do not come too often.

    Requests without a right key count for their address, so that nobody can try keys without end.
    """

    def __init__(self, keys: KeyRing | None, rates: Rates) -> None:
        self._keys = keys
        self._rates = rates

    def known_keys(self) -> Mapping[str, Key]:
        """The keys that are known now, by their ids; none where none is asked for."""
        return {} if self._keys is None else self._keys.by_id

    async def remaining(self, caller: Caller) -> dict[str, dict[str, int]]:
        """What a caller has left of its limits."""
        return await self._rates.remaining(caller)

    def caller(self, given: str, address: Caller) -> Caller | None:
        """The caller by the key that is given, or by its address; None where a key is needed and that is none."""
        if self._keys is None:
            return address
        key = self._keys.find(given)
        return None if key is None else by_key(key)

    async def admit(self, given: str, address: Caller, standing: dict[str, str]) -> Caller:
        """Counts one request, and returns whose it is.

        Args:
            given: the key that it carries, or an empty string.
            address: the caller by its address.
            standing: is told where the caller stands, as headers.

        Raises:
            Unauthorized
            RateLimited
        """
        caller = self.caller(given, address)
        await self._rates.count_request(caller or address, standing)
        if caller is None:
            raise Unauthorized(
                "Incorrect API key provided."
                if given
                else "No API key provided. Send it in a header: Authorization: Bearer KEY, or x-api-key: KEY."
            )
        return caller


class Access:
    """Middleware that admits requests to all but open paths."""

    def __init__(self, app: ASGIApp, admission: Admission, open_paths: Container[str]) -> None:
        self._app = app
        self._admission = admission
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
                state["caller"] = await self._admission.admit(bearer(scope), state["caller"], state["standing"])
            except BDHError as refusal:
                await error_response(refusal)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _with_headers(send: Send, headers: dict[str, str]) -> Send:
    """`headers` are read when the response begins: what is learnt until then is sent."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(headers)
        await send(message)

    return wrapped
