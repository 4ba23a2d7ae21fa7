"""Makes methods of calls: with the docstring and the parameters of the function that builds the call."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from bdh_batch.client.calls import Call

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Sender(Protocol):
    """Sends calls."""

    def send(self, call: Call[Result]) -> Result: ...


class AsyncSender(Protocol):
    """As Sender, with asyncio."""

    def send(self, call: Call[Result]) -> Awaitable[Result]: ...


def describe(method: Any, build: Callable[..., Any]) -> None:
    """Gives `method` the docstring of `build`, and its parameters after `self`, for introspection."""
    update_wrapper(method, build)
    signature = inspect.signature(build)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])


def now(build: Callable[Arguments, Call[Result]]) -> Callable[Concatenate[Any, Arguments], Result]:
    def method(self: Sender, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return self.send(build(*args, **kwargs))

    describe(method, build)
    return method


def awaited(build: Callable[Arguments, Call[Result]]) -> Callable[Concatenate[Any, Arguments], Awaitable[Result]]:
    def method(self: AsyncSender, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Awaitable[Result]:
        return self.send(build(*args, **kwargs))

    describe(method, build)
    return method
