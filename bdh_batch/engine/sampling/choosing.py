"""From the logits of a step to its tokens: log-probabilities, logits processors, masks, the draw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bdh_batch.engine.sampling.draw import sample
from bdh_batch.engine.sampling.host_sampler import HostSampler, PackedParameters, pack
from bdh_batch.engine.sampling.logits_processors import RowProcessors, process_logits
from bdh_batch.engine.sampling.logprobs import rows_of, token_logprobs
from bdh_batch.engine.sampling.passes import Longs
from bdh_batch.messages import SamplingParams, TokenLogprob

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
Tokens = list[int | None]


class Chooser:
    """Chooses a token for each row of logits. What it draws with follows from where the logits lie: compiled passes in
    main memory, torch's operators on a device; the tokens are the same.

    It belongs to one thread: it has buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = HostSampler() if device.type == "cpu" else None
        self._sample = self._host or sample

    def choose(
        self,
        logits: Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        processors: RowProcessors = (),
        masks: Sequence[bytes | None] = (),
    ) -> tuple[list[int | None], dict[int, TokenLogprob]]:
        """Draws a token for each row of `logits`, after logits processors and masks.

        Args:
            logits: [rows, V] float32; it is changed.
            params: the sampling parameters of each row.
            positions: of the tokens to be drawn, in their sequences.
            processors: the rows that have logits processors, with them.
            masks: which tokens each row may draw, in the packed bits of `messages.Constraint`, or empty.

        Returns:
            A token for each row, None where none can be drawn; and logprobs by row, where they are asked for.
        """
        wanted = [row for row, each in enumerate(params) if each.logprobs is not None]
        raw = rows_of(logits, wanted) if wanted else None  # a copy: processors change the others
        if processors:
            process_logits(logits, processors)
        tokens = self.draw(logits, params, positions, masks)
        if raw is None:
            return tokens, {}
        # The logprobs of a row without a token are not returned to anybody.
        tops = [params[row].logprobs or 0 for row in wanted]
        logprobs = token_logprobs(raw, [tokens[row] or 0 for row in wanted], tops)
        return tokens, dict(zip(wanted, logprobs))

    def pack(self, params: Sequence[SamplingParams]) -> PackedParameters | None:
        """The parameters of rows that `draw_packed` can draw by, again and again; None on a device."""
        return None if self._host is None else pack(params)

    def draw_packed(self, logits: Tensor, packed: PackedParameters, positions: Longs) -> list[int | None]:
        """As `draw`, of rows in main memory without masks, by what `pack` gave; `positions` are [rows]."""
        host = self._host
        assert host is not None, "on a device nothing is packed"
        return drawn_together(
            len(positions),
            lambda: host.draw(logits, packed, positions),
            lambda row: host.draw(logits[row : row + 1], packed.of(row, row + 1), positions[row : row + 1]),
        )

    def draw(
        self,
        logits: Tensor,
        params: Sequence[SamplingParams],
        positions: Sequence[int],
        masks: Sequence[bytes | None] = (),
    ) -> list[int | None]:
        """Draws a token for each row of `logits` [rows, V] float32; one that fails gets None, the others a token."""
        return drawn_together(
            len(params),
            lambda: self._sample(logits, params, positions, masks),
            lambda row: self._sample(logits[row : row + 1], [params[row]], [positions[row]], masks[row : row + 1]),
        )


def drawn_together(rows: int, together: Callable[[], Tokens], alone: Callable[[int], Tokens]) -> Tokens:
    """What `together` draws for all rows. Where it fails, each is drawn `alone`: one that fails has None.

    Raises:
        MemoryError, torch.OutOfMemoryError: it is for the caller to do with less.
    """
    try:
        return together()
    except OUT_OF_MEMORY:
        raise
    except Exception:
        log.exception("drawing %d tokens failed; they are drawn one by one", rows)
    drawn: Tokens = []
    for row in range(rows):
        try:
            drawn += alone(row)
        except OUT_OF_MEMORY:
            raise
        except Exception:
            log.exception("drawing for row %d failed", row)
            drawn.append(None)
    return drawn
