"""The messages between a front end and an engine process, and their frames: MessagePack behind four bytes of length.

A connection begins with `Hello`, and `Welcome` or `Refusal`. Then the front end sends `Start` and
`Abort`; the engine sends `Started`, one `Gains` for each step with tokens of the front end's sequences, and `Heartbeat`
at intervals.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec

from bdh_batch import errors
from bdh_batch.errors import BDHError, InvalidRequest, RetryLater
from bdh_batch.messages import Delta, GenerationRequest, Grammar, GrammarText, LogitBias, Progress, StateLayout

PROTOCOL = 7  # grows whenever a message changes
LENGTH = struct.Struct("<I")
MOST_BYTES = 2**28  # of a frame; a request may have a prompt of many tokens, a delta the logprobs of one
MOST_GREETING = 2**14  # bytes of the first frame, before the sender is authenticated


class Malformed(BDHError):
    """Raised where a peer sends bytes that are no message here. It ends the connection and has no HTTP status."""


class Hello(msgspec.Struct, tag=True):
    """The first message of a front end: it authenticates by the `secret` that the engine was started with."""

    protocol: int
    version: str
    secret: str


class Welcome(msgspec.Struct, tag=True):
    """The first message of an engine: its process, and the sizes of its model.

    Engines with the same `fingerprint` (weights, dtypes, kernels) generate the same tokens.
    """

    version: str
    pid: int
    model: str
    device: str
    fingerprint: str
    vocab_size: int
    width: int
    slots: int
    host_slots: int
    window: int
    layout: StateLayout | None = None
    latent_steps: bool = False


class Refusal(msgspec.Struct, tag=True):
    """The reason for which an engine closes the connection."""

    reason: str


class Start(msgspec.Struct, tag=True):
    """Starts a request, or resumes it where `progress` has an entry for each of its sequences.

    The prompts of `request` are sent without their tokens. `tokens` contains these, as int32.
    """

    stream: int
    request: GenerationRequest
    tokens: list[bytes]
    progress: list[Progress] = []

    @classmethod
    def of(cls, stream: int, request: GenerationRequest, progress: list[Progress]) -> Start:
        tokens = [array("i", iter(prompt.tokens)).tobytes() for prompt in request.prompts]
        prompts = [replace(prompt, tokens=()) for prompt in request.prompts]
        origin = replace(request.origin, span=None)
        return cls(stream, replace(request, origin=origin, prompts=prompts), tokens, progress)

    @property
    def whole(self) -> GenerationRequest:
        """The request with its prompts' tokens. Raises Malformed where it is not valid."""
        prompts = []
        for prompt, packed in zip(self.request.prompts, self.tokens, strict=True):
            tokens = array("i")
            tokens.frombytes(packed)
            prompts.append(replace(prompt, tokens=tokens))
        return replace(self.request, prompts=prompts)


class Started(msgspec.Struct, tag=True):
    """Says that a request was started, or, with `error`, why it was not."""

    stream: int
    error: BDHError | None = None


class Abort(msgspec.Struct, tag=True):
    """Ends a stream whose client has left."""

    stream: int


class Gain(msgspec.Struct, array_like=True, gc=False):  # nothing it holds leads back to it
    """A delta of one sequence of a stream. The first one has how many tokens of its prompt were taken from a cached
    prefix."""

    stream: int
    index: int
    cached_tokens: int
    delta: Delta


class Gains(msgspec.Struct, tag=True):
    """The deltas that one step brought to the sequences of one front end."""

    gains: list[Gain]


class Heartbeat(msgspec.Struct, tag=True):
    """Says that an engine lives, its load, and its `problem`, if it has one.

    `sequences` are all that have not ended, and `prompt_tokens` those of their prompts that are still to be computed.
    `leaving` asks front ends to move their streams to other engines.
    """

    sequences: int
    prompt_tokens: int
    problem: str | None = None
    leaving: bool = False


FromFront = Hello | Start | Abort
FromEngine = Welcome | Refusal | Started | Gains | Heartbeat


def packed_error(error: BDHError) -> list[Any]:
    """Returns an error's class, message and other arguments, as `unpacked_error` takes them."""
    facts: dict[str, Any] = {}
    if isinstance(error, InvalidRequest):
        facts = {"param": error.param, "code": error.code}
    elif isinstance(error, RetryLater):
        facts = {"retry_after": error.retry_after}
    return [type(error).__name__, error.message, facts]


def unpacked_error(packed: Sequence[Any]) -> BDHError:
    """Returns the error that `packed_error` packed. Raises Malformed where it is none."""
    match packed:
        case [str(name), str(message), dict(facts)]:
            kind = getattr(errors, name, None)
            if isinstance(kind, type) and issubclass(kind, BDHError):
                try:
                    return kind() if kind is errors.NotFinite else kind(message, **facts)
                except TypeError:
                    pass
    raise Malformed("an error of an unknown class")


def _encoded(value: Any) -> Any:
    if isinstance(value, LogitBias):
        return [value.tokens.tobytes(), value.amounts.tobytes()]
    if isinstance(value, BDHError):
        return packed_error(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} does not cross between processes")


def _decoded(kind: type, value: Any) -> Any:
    if kind is LogitBias and isinstance(value, list) and len(value) == 2:
        bias = LogitBias(array("q"), array("f"))
        bias.tokens.frombytes(value[0])
        bias.amounts.frombytes(value[1])
        return bias
    if kind is Grammar:
        return msgspec.convert(value, GrammarText)
    if kind is BDHError:
        return unpacked_error(value)
    raise TypeError(f"{kind.__name__} does not cross between processes")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encoded)


def frame(message: object) -> bytes:
    """Returns the bytes of a message, with its length before it."""
    packed = _encoder.encode(message)
    return LENGTH.pack(len(packed)) + packed


class Unpacker:
    """Turns received bytes into messages of the classes `kinds`."""

    def __init__(self, kinds: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kinds, dec_hook=_decoded)
        self._buffer = bytearray()
        self.most = MOST_GREETING

    def feed(self, data: bytes) -> list[Any]:
        """Returns the messages that are complete with `data`. Raises Malformed where there is something else."""
        self._buffer += data
        messages, at = [], 0
        while len(self._buffer) - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer, at)
            if length > self.most:
                raise Malformed(f"a message of {length:,} bytes")
            begin = at + LENGTH.size
            if len(self._buffer) < begin + length:
                break
            at = begin + length
            try:
                messages.append(self._decoder.decode(memoryview(self._buffer)[begin:at].tobytes()))
            except (msgspec.MsgspecError, ValueError, TypeError) as error:
                raise Malformed(str(error)) from error
        del self._buffer[:at]
        return messages
