"""What the responses of what operators watch look like."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from bdh_batch.http.docs.response_parts import Count, ResponseModel

Quantiles = list[float]
REASONS = (
    "`no_slot`: no slot is free; `max_running`: as many as may hold a state; `prefix`: another request computes the "
    "beginning of its prompt; `state_file`: its state is read from a file; `preempted`: another one has its slot; "
    "`step_full`: it runs, and the step had no time left; `copy`: it runs, and its state is being copied."
)


class ModelSample(ResponseModel):
    """One model in a sample."""

    running: Count
    waiting: Count
    slots: Count
    generated: float = Field(description="Tokens generated in a second.")
    prompt: float = Field(description="Prompt tokens computed in a second.")


class WatchSample(ResponseModel):
    """What the server has done since the sample before, and how busy it is. Quantiles are the 0.5, 0.95 and 0.99 ones,
    in seconds; null where there was nothing."""

    time: float = Field(description="Unix seconds.")
    generated: float = Field(description="Tokens generated in a second.")
    prompt: float = Field(description="Prompt tokens computed in a second.")
    steps: float = Field(description="Steps in a second, of all engines.")
    occupancy: float | None = Field(description="Sequences in a step, on average.")
    step_seconds: float | None = Field(description="Duration of a step, on average.")
    prefix_hits: float | None = Field(description="Share of the prompt tokens that cached prefixes had.")
    preemptions: Count
    running: Count = Field(description="Sequences that run.")
    waiting: Count = Field(description="Sequences that wait for their first slot.")
    swapped: Count = Field(description="Sequences that are preempted by swap.")
    slots: Count = Field(description="Slots to run in.")
    cached_prefixes: Count
    in_flight: Count = Field(description="Open HTTP requests.")
    first_token: Quantiles | None = Field(description="Seconds from arrival to the first token.")
    between_tokens: Quantiles | None = Field(description="Seconds between tokens of a sequence.")
    queue_time: Quantiles | None = Field(description="Seconds in the queue.")
    rejections: dict[str, Count] = Field(description="Requests refused, by reason.")
    failovers: dict[str, Count] = Field(description="Streams that went to another engine or endpoint, by reason.")
    ended: dict[str, Count] = Field(description="Sequences that ended, by `finish_reason`.")
    responses: dict[str, Count] = Field(description="HTTP responses, by the class of their status, as in `2xx`.")
    models: dict[str, ModelSample] = Field(description="The busiest models, by their names.")


class WatchHistory(ResponseModel):
    """The response of /watch/history."""

    seconds: float = Field(description="Between two samples.")
    samples: list[WatchSample]


class StepSequence(ResponseModel):
    """A sequence in a step, before it."""

    request: str = Field(description="The id of its request.")
    index: Count = Field(description="Which of the request's sequences it is.")
    tenant: str = Field(description="The label of its tenant: the id of a key, or a hash of an address.")
    priority: int
    prompt: Count = Field(description="Tokens of its prompt.")
    generated: Count = Field(description="Tokens generated so far.")
    tokens: Count = Field(description="Tokens that the step computes.")
    position: Count = Field(description="Of the first of them.")
    phase: Literal["prompt", "decode"]


class WaitingSequence(ResponseModel):
    """A sequence that is not in a step."""

    request: str
    index: Count
    tenant: str
    priority: int
    prompt: Count
    generated: Count
    reason: Literal["no_slot", "max_running", "prefix", "state_file", "preempted", "step_full", "copy"] = Field(
        description=REASONS
    )
    seconds: float = Field(description="Since something of it was computed, or it came.")


class RecordedStep(ResponseModel):
    """One step: what it computed, and who waited."""

    step: Count = Field(description="Its number.")
    planned: float = Field(description="Seconds on the engine's clock.")
    seconds: float = Field(description="How long it took.")
    error: str | None = Field(description="The kind of the error that it failed with.")
    decodes: Count = Field(description="Sequences that gained a token.")
    prompt_tokens: Count
    copies: Count = Field(description="States copied, in parts or whole.")
    slots: Count = Field(description="Slots to run in.")
    running: Count = Field(description="Sequences that hold one.")
    sequences: list[StepSequence] = Field(description="At most 64.")
    waiting_total: int
    waiting: list[WaitingSequence] = Field(description="The first 64 in rank.")


class EngineSteps(ResponseModel):
    """The steps of one process."""

    process: str
    steps: list[RecordedStep]


class RecordedSteps(ResponseModel):
    """The response of /watch/steps."""

    model: str
    engines: list[EngineSteps] = Field(description="Empty where an upstream has the model, or it is not loaded.")
