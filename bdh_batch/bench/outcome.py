"""What became of one request.

Kinds of failure, which are counted apart:

connect_refused      no server listens there
connect_failed       no connection for another reason: no such host, no route, no TLS, no more files
timeout              the response was not whole within --request-timeout-sec
http_N               a response with status N
closed_before_answer the server closed before its response began
closed_mid_stream    the response ended before `data: [DONE]`
malformed_http       what came is not HTTP/1.1
malformed_sse        what came is not a stream of JSON events
error_event          the stream reported an error
no_tokens            a stream that ended well and bore no token
earlier_turn_failed  nothing was sent: an earlier turn of the conversation had failed
"""

from __future__ import annotations

from dataclasses import dataclass, field


class Failed(Exception):
    """A request that was not answered; `kind` is one of those above."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class Outcome:
    """One request and what became of it.

    Moments are seconds of `time.perf_counter`; zero where they did not come.
    """

    index: int
    due: float  # when it was to be sent
    turn_tokens: int  # of what is new in its prompt, as the data says
    earlier: Outcome | None = None  # the turn before, which is sent again
    begun: float = 0.0  # when the client set about it
    sent: float = 0.0  # when its bytes went to the socket
    times: list[float] = field(default_factory=list)  # when each event that contains tokens was read
    ended: float = 0.0  # when the last event of its text was read
    pieces: list[str] = field(default_factory=list)  # of its text
    listed_tokens: int = 0  # in its events, by token_ids or logprobs; an event without them counts as one
    listed_by: str = "events"
    reported_tokens: int | None = None  # by the server's usage
    reported_prompt_tokens: int | None = None  # tokens of the whole prompt, by the server's usage
    retokenized_tokens: int | None = None  # of its text, by a tokenizer
    failure: Failed | None = None
    complete: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def prompt_tokens(self) -> int:
        """Of the whole prompt: as the server reports, else the turn and all that was said before it."""
        total, turn = 0, self
        while turn.reported_prompt_tokens is None:
            total += turn.turn_tokens
            if turn.earlier is None:
                return total
            turn = turn.earlier
            total += turn.output_tokens
        return total + turn.reported_prompt_tokens

    @property
    def output_tokens(self) -> int:
        if self.reported_tokens is not None:
            return self.reported_tokens
        return self.listed_tokens if self.retokenized_tokens is None else self.retokenized_tokens

    @property
    def counted_by(self) -> str:
        """Whence `output_tokens` comes."""
        if self.reported_tokens is not None:
            return "usage"
        return self.listed_by if self.retokenized_tokens is None else "tokenizer"

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds between the events that contain tokens."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:])]

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first; none where there is no other."""
        return (self.ended - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None
