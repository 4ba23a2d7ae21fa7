"""Latent steps: positions of a sequence at which the final hidden vector of the position before enters, and no token.

Where the tokens of a sequence are listed, a latent step has a number below zero in its place: in an engine's prompts
and segments, in cached prefixes, in what is stored of a conversation or a state. So all of a sequence follows from one
list, as it does without latent steps: draws by seed and position, replay, failover, preemption, prefixes.
Clients send token ids, which are never below zero; they ask for latent steps by their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bdh_batch.errors import InvalidRequest, UnsupportedParameter

LATENT = -1  # a latent step that enters the state as a token does
LATENT_FROZEN = -2  # one that only reads it; positions go on
STEPS, UPDATES, EFFORT = "latent_steps", "update_latent_memory", "reasoning_effort"  # fields of requests
NO_EFFORT = "none"


@dataclass(frozen=True, slots=True)
class LatentSteps:
    """The latent steps of a request: after its prompt, and before its first token, which is drawn from the last.

    Args:
        frozen: whether they only read the state.
    """

    count: int
    frozen: bool = False

    @property
    def tokens(self) -> list[int]:
        """What stands for them after the tokens of a prompt."""
        return [LATENT_FROZEN if self.frozen else LATENT] * self.count


def latent_positions(tokens: Sequence[int]) -> tuple[int, ...]:
    """The positions of latent steps among `tokens`, ascending."""
    if not tokens or min(tokens) >= 0:
        return ()
    return tuple(at for at, token in enumerate(tokens) if token < 0)


@dataclass(frozen=True, slots=True)
class LatentOptions:
    """How many latent steps requests to a model that has them may ask for, and what they get that do not.

    Args:
        least, most: by `model.min_latent_steps` and `model.max_latent_steps`.
        default: by the model folder, which gives way to these bounds.
        efforts: what the folder says that each `reasoning_effort` is.
    """

    least: int = 0
    most: int = 64
    default: int = 0
    efforts: Mapping[str, int] = field(default_factory=dict)

    def asked(self, steps: int | None, effort: str | None, frozen: bool, scores: bool) -> LatentSteps:
        """The latent steps of a request that asks for `steps`, or an `effort`, or both, or leaves it open.

        Args:
            scores: whether nothing is generated, and the request is about its prompt alone: then there are none.

        Raises:
            InvalidRequest
        """
        if effort is not None:
            meant = self._meant_by(effort)
            if steps not in (None, meant):
                text = f"latent_steps is {steps}, and reasoning_effort {effort!r} is {meant} steps; give one of them."
                raise InvalidRequest(text, STEPS)
            steps = meant
        param = STEPS if effort is None else EFFORT
        if scores:
            if steps:
                text = f"{param} cannot be used with max_tokens: 0: latent steps come after the prompt."
                raise InvalidRequest(text, param)
            return LatentSteps(0)
        if steps is None:
            return LatentSteps(max(self.least, min(self.default, self.most)), frozen)
        for wrong, bound, option in (
            (steps > self.most, f"at most {self.most}", "model.max_latent_steps"),
            (steps < self.least, f"at least {self.least}", "model.min_latent_steps"),
        ):
            if wrong:
                raise InvalidRequest(f"{param}: {steps} latent steps; this model takes {bound} ({option}).", param)
        return LatentSteps(steps, frozen)

    def _meant_by(self, effort: str) -> int:
        if (steps := self.efforts.get(effort)) is not None:
            return steps
        if effort == NO_EFFORT:
            return 0
        if not self.efforts:
            text = "reasoning_effort: the model's generation_config.json does not say how many latent steps that is."
            raise UnsupportedParameter(text, EFFORT)
        known = ", ".join(map(repr, {NO_EFFORT: 0, **self.efforts}))
        raise InvalidRequest(f"reasoning_effort: {effort[:64]!r} is none of this model's: {known}.", EFFORT)


def refuse_latent_steps(steps: int | None, effort: str | None, frozen: bool) -> None:
    """Raises UnsupportedParameter where a request asks for latent steps, of a model that has none."""
    asked = {STEPS: bool(steps), EFFORT: effort not in (None, NO_EFFORT), UPDATES: frozen}
    for param, given in asked.items():
        if given:
            raise UnsupportedParameter(f"{param} is not supported: this model has no latent steps.", param)
