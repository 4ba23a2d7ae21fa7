"""The sequence, as the scheduler sees it: how many of its tokens were computed, and what decides when it runs.

Each concern is an object of its own: `Standing` (scheduling and what was charged), `Prefix` (sharing), `Times` (what
metrics ask for), `Completion` (text and sampling, which are the engine's), `Client` (where deltas go).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol

from bdh_batch.errors import BDHError
from bdh_batch.messages import Delta, FinishReason, Outcome, SamplingParams, SavedState, Segment
from bdh_batch.scheduler.prefix_index import Entry
from bdh_batch.scheduler.tenants import Tenant

QueueKey = tuple[int, str]  # names a queue: a priority, and a tenant


class Completion(Protocol):
    """Turns a sequence's tokens into deltas. The scheduler passes on what steps computed, and looks at the prompt."""

    prompt: Tokens[int]
    max_tokens: int
    sampling: SamplingParams | None
    latent_steps: int  # with which the prompt ends

    @property
    def needs_all(self) -> bool:
        """Whether all of the prompt has to be computed, without a cached prefix."""

    def segment(self, slot: int, start: int, tokens: Tokens[int], draws: bool) -> Segment:
        """Makes the segment that computes `tokens` from position `start` on and, with `draws`, draws the next token."""

    def take(self, segment: Segment, outcome: Outcome, row: int) -> Delta | None:
        """Takes what a step computed for `segment`, its row of `outcome`; returns a delta if there is one."""

    def restart(self) -> None:
        """Prepares for a lost state: prompt and generated tokens are computed again, with the same results."""

    def resume(self, tokens: Tokens[int]) -> None:
        """Begins after `tokens`, which another engine has returned. Raises InvalidRequest: they are not allowed."""


class Outbox(Protocol):
    """The receiver of a sequence's deltas; `index` distinguishes the sequences of one request."""

    def put(self, index: int, delta: Delta) -> None: ...


@dataclass(frozen=True, slots=True)
class Client:
    """The client that a sequence is computed for. Nothing here decides when it runs."""

    outbox: Outbox
    index: int = 0
    n: int = 1  # completions of its prompt, of which this is one
    span: object | None = None  # of the client's request, for those who watch


class Stage(Enum):
    """The stage of a sequence in the scheduler."""

    NEW = "new"  # the scheduler does not know it yet
    QUEUED = "queued"
    AWAITING_PREFIX = "awaiting_prefix"  # waits for a prefix that a running sequence computes
    AWAITING_STATE = "awaiting_state"  # waits for a state that is read from a file
    RUNNING = "running"
    SWAPPED = "swapped"  # preempted by swap: holds a state, and waits for its next time slice
    ENDED = "ended"

    __hash__ = object.__hash__  # members are compared by identity; an Enum's own hash is dear in every look-up


WAITING = (Stage.QUEUED, Stage.AWAITING_PREFIX, Stage.AWAITING_STATE)
HOLDING = (Stage.RUNNING, Stage.SWAPPED)  # a state


@dataclass(slots=True)
class Standing:
    """The fields that decide when a sequence is scheduled, and its tenant's charges. The scheduler's alone."""

    aged: bool = False  # whether it competes in the first priority there is, not in its own
    account: Tenant = field(default_factory=Tenant)
    due: float = 0.0  # when its prompt should be computed, or when it had its last token, or was preempted
    since: int = 0  # the step from which on it has run, or has not
    steps: int = 0  # since then, that computed something of it
    arrival: int = 0  # its number in the order of arrival
    served_at: float = 0.0  # when a step last computed something of it; before, when it arrived
    state_began: int = 0  # tokens generated before it was given its present state
    charged: int = 0  # tokens of the prompt that its tenant was charged for, or that were cached

    def charge(self, prompt_tokens: int, latent: bool = False) -> None:
        """Charges its tenant for so many tokens at the beginning of its prompt, each once. A `latent` step, which is
        the last of them, costs what a generated token does."""
        if (tokens := prompt_tokens - self.charged) > 0:
            self.account.charge(*((0, tokens) if latent else (tokens, 0)))
            self.charged = prompt_tokens


@dataclass(slots=True)
class Prefix:
    """What a sequence shares with others of its `cache_namespace` and `salt`: the prefixes of its prompt."""

    cache_namespace: str = ""
    salt: str = ""
    breaks: Tokens[int] = ()  # positions, ascending, at which prefixes end that others are likely to have
    packed: bytes = b""  # the prompt, where it may be shared
    namespace: str = ""  # inside which it may be
    cuts: list[int] = field(default_factory=list)  # ascending positions at which its state is wanted
    expects: Entry | None = None  # the state that it waited for
    loaded: Entry | None = None  # the state that was read for it from a file; it is not among the cached ones
    cached: int = 0  # tokens that another sequence had computed


@dataclass(slots=True)
class Times:
    """When something of a sequence happened for the first or last time, in seconds; None before."""

    arrived: float = 0.0
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    gap: float = 0.0  # before the last token, since the one before it or since arrival

    def gained(self, now: float) -> None:
        """Records the time of one more token."""
        last = self.last_token
        if last is None:
            last, self.first_token = self.arrived, now
        self.gap, self.last_token = now - last, now

    @property
    def in_queue(self) -> float | None:
        """Seconds until the sequence first got a slot; None where it has had none."""
        return None if self.scheduled is None else self.scheduled - self.arrived

    @property
    def to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrived


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation. Times are seconds on the clock that the worker passes in.

    It waits until `queue_deadline` at most, and ends by `deadline`; a lower `priority` goes first. It runs in the share
    of `tenant`, which weighs `weight` if that is said. It begins in `state`, and its own is written to `save_to`.
    """

    watches: ClassVar[bool] = False  # whether the neurons that its tokens fire are shown: `WatchedSequence`

    id: str
    completion: Completion
    client: Client
    latents: Tokens[int] = ()  # positions of the prompt's latent steps, ascending
    prefix: Prefix = field(default_factory=Prefix)
    times: Times = field(default_factory=Times)

    tenant: str = ""
    weight: float | None = None
    priority: int = 0
    queue_deadline: float | None = None
    deadline: float | None = None
    state: SavedState | None = None
    state_optional: bool = False  # whether it is computed from its tokens where the state cannot be read
    save_to: str | None = None

    prompt: Tokens[int] = field(init=False)
    stage: Stage = field(default=Stage.NEW, init=False)
    standing: Standing = field(default_factory=Standing, init=False)
    slot: int | None = field(default=None, init=False)
    computed: int = field(default=0, init=False)  # tokens that have entered the state
    generated: list[int] = field(default_factory=list, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: BDHError | None = field(default=None, init=False)  # why, where that is ERROR
    decoding: Segment | None = field(default=None, init=False)  # its share of the next step while it decodes, kept up

    def __post_init__(self) -> None:
        self.prompt = self.completion.prompt

    @property
    def may_recompute(self) -> bool:
        """Whether its state is computed from its tokens where it cannot be read; it always is once it has begun."""
        return self.state_optional or bool(self.generated) or self.times.scheduled is not None

    @property
    def queue_key(self) -> QueueKey:
        """The queue that it waits in."""
        return self.priority, self.tenant

    @property
    def pending(self) -> int:
        """Tokens that are known but have not entered the state yet."""
        return len(self.prompt) + len(self.generated) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether the last token that was drawn for it is all that is pending."""
        return bool(self.generated) and self.pending == 1

    @property
    def unwatched(self) -> int:
        """Of the next tokens, how many come before the first whose neurons are shown, where any are."""
        return self.pending

    @property
    def until_cut(self) -> int:
        """Tokens that are pending up to where its state is wanted next, or a latent step comes."""
        cut = self.prefix.cuts[0] - self.computed if self.prefix.cuts else self.pending
        latents = self.latents
        if not latents or latents[-1] <= self.computed:
            return cut
        return min(cut, latents[bisect_right(latents, self.computed)] - self.computed)

    @property
    def at_latent(self) -> bool:
        """Whether a latent step comes next. That is a segment of its own, in a step as a stream's token is."""
        latents = self.latents
        if not latents or latents[-1] < self.computed:
            return False
        return latents[bisect_left(latents, self.computed)] == self.computed

    def decode_segment(self) -> Segment:
        """The one token that was drawn last as a share of a step, which is used again for as long as the slot stays; or
        a latent step."""
        if self.decoding is not None:
            return self.decoding
        segment = self.segment(1)
        if self.decodes:
            self.decoding = segment
        return segment

    def segment(self, tokens: int) -> Segment:
        """Makes the segment of the next `tokens` pending ones; with all of them, a new token is drawn."""
        assert self.slot is not None
        known = self.known(self.computed, self.computed + tokens)
        return self.completion.segment(self.slot, self.computed, known, draws=tokens == self.pending)

    def known(self, start: int, end: int) -> Tokens[int]:
        """Its tokens from `start` to `end`, of the prompt and of the completion."""
        split = len(self.prompt)
        if end <= split:
            return self.prompt[start:end]
        return [*self.prompt[start:], *self.generated[max(0, start - split) : end - split]]

    def take(self, segment: Segment, outcome: Outcome, row: int, now: float) -> Delta | None:
        """Takes what a step computed for `segment`, its row of `outcome`, and charges its tenant; returns a delta if
        there is one."""
        standing, tokens = self.standing, segment.tokens
        self.computed += len(tokens)
        standing.steps += 1
        standing.served_at = now
        if standing.charged < len(self.prompt):
            standing.charge(min(self.computed, len(self.prompt)), latent=tokens[0] < 0)
        if segment.sampling is not None:
            standing.account.charge_generated()
            standing.due = now
        elif tokens[0] < 0:
            standing.due = now
        delta = self.completion.take(segment, outcome, row)
        if delta is None:
            return None
        if delta.tokens:
            self.generated += delta.tokens
            self.times.gained(now)
            if segment is self.decoding:
                segment.start, segment.tokens = self.computed, tuple(delta.tokens)  # the client has the list
        if delta.finish_reason is not None:
            self.finish_reason, self.error = delta.finish_reason, delta.error
            if delta.finish_reason is FinishReason.ERROR:
                delta.save_error = self._not_saved
        return delta

    def resume(self, tokens: Tokens[int]) -> None:
        """Begins after `tokens`, which another engine has generated and returned.

        Raises:
            InvalidRequest: its constraint does not take them.
        """
        self.completion.resume(tokens)
        self.generated += tokens

    def restart(self) -> None:
        """Prepares for a lost state: prompt and generated tokens are computed again, with the same results."""
        self.computed, self.prefix.cuts, self.decoding = 0, [], None
        self.completion.restart()

    def begin(self, now: float) -> None:
        """It has been given a state, its first one or another one for one that was lost. What was `computed` of that
        already costs its tenant nothing."""
        self.standing.state_began = len(self.generated)
        self.standing.charged = max(self.standing.charged, self.computed)
        if self.times.scheduled is None:
            self.times.scheduled = now

    def leave_slot(self) -> int:
        """Takes the slot from the sequence and returns it."""
        slot, self.slot = self.slot, None
        assert slot is not None
        return slot

    def fail(self, error: BDHError | None) -> Delta:
        """Ends it with an error, or without one where its client has left."""
        self.finish_reason, self.error = FinishReason.ABORT if error is None else FinishReason.ERROR, error
        return Delta(finish_reason=self.finish_reason, error=error, save_error=self._not_saved)

    @property
    def _not_saved(self) -> str | None:
        """What is said of its state, where it was to be saved and has not become complete."""
        return None if self.save_to is None else "The response is not complete."
