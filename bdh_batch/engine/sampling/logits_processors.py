"""Changes logits by sampling parameters before tokens are drawn: bias, penalties, bans.

Only the entries that change are touched; a row without sampling parameters of this kind costs nothing. The order and
the formulas are vLLM's: bias; then, on the tokens that came, the repetition penalty (prompt and completion), the
frequency and the presence penalty (completion); then bans.

What changes comes as arrays of int64 and float32 that requests keep, and is read where it lies. In main memory, a
compiled loop goes over each row's entries: a row of 50,000 costs about a fifth of a millisecond. For a GPU, the entries
of all rows are sent as one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_batch.kernels.vector import compiled, inlined
from bdh_batch.messages import LogitsProcessors

BANNED = -1e30  # the logit of a banned token: below all that a bias or a penalty can do, and still finite
_FARTHEST = 1e29  # from 0, that penalties can move a logit

RowProcessors = Sequence[tuple[int, LogitsProcessors]]  # each with its row of the logits
Floats = np.ndarray[Any, np.dtype[np.float32]]
Longs = np.ndarray[Any, np.dtype[np.int64]]


def process_logits(logits: Tensor, processors: RowProcessors) -> None:
    """Changes rows of `logits` [rows, V] float32 in place, each by the logits processors of its sequence."""
    if logits.device.type == "cpu":
        process_in_main_memory(logits, processors)
    else:
        process_on_device(logits, processors)


def process_in_main_memory(logits: Tensor, processors: RowProcessors) -> None:
    """Changes rows of `logits` [rows, V] float32 on the CPU, one after the other."""
    values = logits.numpy()
    for row, processor in processors:
        own, sampling = values[row], processor.sampling
        if (bias := sampling.logit_bias) is not None:
            _add(own, np.frombuffer(bias.tokens, np.int64), np.frombuffer(bias.amounts, np.float32))
        if processor.prompt:
            _repeat(own, np.frombuffer(processor.prompt, np.int64), sampling.repetition_penalty)
        if processor.generated:
            _penalise(
                own,
                np.frombuffer(processor.generated, np.int64),
                np.frombuffer(processor.times, np.int64),
                np.frombuffer(processor.repeated, np.int64),
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        if bans := processor.bans:
            _ban(own, np.frombuffer(bans, np.int64))


@compiled
def _add(logits: Floats, tokens: Longs, amounts: Floats) -> None:
    for at in range(len(tokens)):
        logits[tokens[at]] += amounts[at]


@compiled
def _repeat(logits: Floats, tokens: Longs, repetition: float) -> None:
    for token in tokens:
        logits[token] = _moved(logits[token], repetition, 0.0)


@compiled
def _penalise(
    logits: Floats,
    tokens: Longs,
    times: Longs,
    repeated: Longs,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    for at in range(len(tokens)):
        less = frequency * times[at] + presence
        logits[tokens[at]] = _moved(logits[tokens[at]], 1.0 if repeated[at] else repetition, less)


@inlined
def _moved(logit: float, repetition: float, less: float) -> float:
    """In float64, as a repetition penalty may be any number above 0. What is not finite stays, so that it shows."""
    exact = np.float64(logit)
    if not np.isfinite(exact):
        return exact
    exact = (exact / repetition if exact > 0 else exact * repetition) - less
    return min(max(exact, -_FARTHEST), _FARTHEST)


@compiled
def _ban(logits: Floats, tokens: Longs) -> None:
    for token in tokens:
        logits[token] = BANNED


def process_on_device(logits: Tensor, processors: RowProcessors) -> None:
    """Changes rows of `logits` [rows, V] float32 on a device, the entries of all rows together."""
    if biased := [(row, bias) for row, processor in processors if (bias := processor.sampling.logit_bias) is not None]:
        where = _entries(logits, [(row, bias.tokens) for row, bias in biased])
        logits[where] += _on(logits, [bias.amounts for _, bias in biased], torch.float32)
    if repeating := [(row, processor) for row, processor in processors if processor.prompt]:
        where = _entries(logits, [(row, processor.prompt) for row, processor in repeating])
        factors = [[processor.sampling.repetition_penalty] for _, processor in repeating]
        (repetition,) = _for_each(logits, factors, [len(processor.prompt) for _, processor in repeating])
        logits[where] = _moved_all(logits[where], repetition, 0.0)
    if counting := [(row, processor) for row, processor in processors if processor.generated]:
        where = _entries(logits, [(row, processor.generated) for row, processor in counting])
        times, repeated = (
            _on(logits, [getattr(processor, name) for _, processor in counting], torch.int64)
            for name in ("times", "repeated")
        )
        of_row = [processor.sampling for _, processor in counting]
        numbers = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in of_row]
        repetition, frequency, presence = _for_each(
            logits, numbers, [len(processor.generated) for _, processor in counting]
        )
        repetition = torch.where(repeated > 0, 1.0, repetition)
        logits[where] = _moved_all(logits[where], repetition, frequency * times + presence)
    if banned := [(row, bans) for row, processor in processors if (bans := processor.bans)]:
        logits[_entries(logits, banned)] = BANNED


def _moved_all(logits: Tensor, repetition: Tensor, less: Tensor | float) -> Tensor:
    """As `_moved`."""
    exact = logits.double()
    moved = torch.where(exact > 0, exact / repetition, exact * repetition) - less
    return torch.where(exact.isfinite(), moved.clamp(-_FARTHEST, _FARTHEST), exact).float()


def _for_each(logits: Tensor, numbers: Sequence[Sequence[float]], lengths: Sequence[int]) -> Sequence[Tensor]:
    """Each row's numbers repeated for its so many entries, in float64: a tensor [entries] for each column."""
    counts = torch.tensor(lengths, device=logits.device)
    columns = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
    return columns.repeat_interleave(counts, dim=0, output_size=sum(lengths)).unbind(dim=1)


def _entries(logits: Tensor, tokens_of_rows: Sequence[tuple[int, array[int]]]) -> tuple[Tensor, Tensor]:
    """Where those tokens of those rows lie in `logits`; no entry twice."""
    rows = torch.tensor([row for row, _ in tokens_of_rows], device=logits.device)
    lengths = torch.tensor([len(tokens) for _, tokens in tokens_of_rows], device=logits.device)
    tokens = _on(logits, [tokens for _, tokens in tokens_of_rows], torch.int64)
    return rows.repeat_interleave(lengths, output_size=len(tokens)), tokens


def _on(logits: Tensor, arrays: Iterable[array[Any]], dtype: torch.dtype) -> Tensor:
    """Numbers as they lie in memory, one array behind the other, as a tensor beside `logits`."""
    return torch.frombuffer(bytearray().join(arrays), dtype=dtype).to(logits.device)
