"""The Triton kernels against the specification: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":  # where it is part of the gate, and missing it an error
    pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from bdh_batch.errors import ConfigError
from bdh_batch.kernels import triton_ops, tuning
from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.cuda import TritonKernels, rounds
from bdh_batch.kernels.decode_steps import bucket
from bdh_batch.kernels.torch_reference import TorchKernels, rotation
from bdh_batch.kernels.tuning import Blocks
from benchmarks.engine.synthetic import synthetic_weights
from tests.kernels.support import NOT_NUMBERS, Piece, alone, distance, feed, floats_of, model, states_for
from tests.kernels.test_conformance import read

pytestmark = pytest.mark.no_cover  # tracing would more than double what the interpreter takes

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 1e-4
TOLERANCE_OF = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of what rounds to weights' dtype
# So small that even tiny models have several of everything.
SMALL = Blocks(
    part=32, encode_tokens=16, encode_depth=16, token_pairs=4, chunk_tokens=16, chunk_values=16, span=32,
    contract_tokens=16, contract_neurons=16, contract_depth=16,
)  # fmt: skip
WINDOW = 12


class Poisoned:
    """Kernels that find nothing in their memory that a step could mistake for its own, with all tensors on DEVICE."""

    def __init__(
        self, weights: Weights, window: int = 0, blocks: Blocks = SMALL, max_tokens: int = 64, latent: bool = False
    ) -> None:
        self.kernels = TritonKernels(on_device(weights), window, blocks, max_tokens, latent)

    def warm(self, states: Tensor) -> None:
        self.kernels.warm(states)

    def forward(
        self, states: Tensor, batch: RaggedBatch, active: Tensor | None = None, fired: Tensor | None = None
    ) -> Tensor:
        work = self.kernels._work
        for tensor in (getattr(work, field.name) for field in fields(work)):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
        moved = replace(batch, tokens=batch.tokens.to(DEVICE), positions=batch.positions.to(DEVICE))
        return self.kernels.forward(states, moved, active, fired)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.kernels.logits(hidden).cpu()


def on_device(weights: Weights) -> Weights:
    names = ("embed", "encoder", "encoder_v", "decoder", "lm_head", "frequencies")
    return replace(weights, **{name: getattr(weights, name).to(DEVICE) for name in names})


def states_on_device(weights: Weights, slots: int, window: int = 0) -> Tensor:
    return states_for(weights, slots, window).to(DEVICE)


def text(length: int, vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


class TestConformance:
    @pytest.mark.parametrize(("length", "cuts"), [(65, []), (5, range(1, 5))], ids=["whole", "by token"])
    def test_alone(self, length: int, cuts: Sequence[int]) -> None:
        weights, tokens, expected = read("tiny")
        kernels = Poisoned(weights, blocks=Blocks(), max_tokens=128)
        logits = alone(kernels, states_on_device(weights, 1), tokens[0, :length], 0, cuts)
        assert distance(logits, expected[0, :length]) <= TOLERANCE

    def test_in_ragged_pieces_among_others(self) -> None:
        weights, tokens, expected = read("tiny")
        sequences = {3: tokens[0], 0: tokens[1], 2: text(65, 256)}
        steps: list[list[Piece]] = [
            [(2, 0, 1), (3, 0, 20), (0, 0, 33)],
            [(0, 33, 34), (2, 1, 20), (3, 20, 21)],
            [(3, 21, 65), (0, 34, 41)],
        ]
        kernels, states = Poisoned(weights, blocks=Blocks()), states_on_device(weights, 4)
        logits: dict[int, list[Tensor]] = {0: [], 2: [], 3: []}
        for pieces in steps:
            for (slot, _, _), part in zip(pieces, feed(kernels, states, sequences, pieces)):
                logits[slot].append(part)
        assert distance(torch.cat(logits[3]), expected[0]) <= TOLERANCE
        assert distance(torch.cat(logits[0]), expected[1, :41]) <= TOLERANCE

    def test_odd_sizes(self) -> None:
        weights, tokens, expected = read("odd-sizes")
        kernels = Poisoned(weights, blocks=Blocks())
        logits = alone(kernels, states_on_device(weights, 1), tokens[0, :10], 0, [8, 9])
        assert distance(logits, expected[0, :10]) <= TOLERANCE


@pytest.mark.parametrize("dtype", list(TOLERANCE_OF))
def test_weights_of_each_dtype(dtype: torch.dtype) -> None:
    weights = synthetic_weights(model(2, 1, 48, 96, 60), 0.3, dtype=dtype)
    tokens = text(22, 60)
    got = alone(Poisoned(weights), states_on_device(weights, 1), tokens, 0, [18, 19, 20])
    expected = alone(TorchKernels(weights), states_for(weights, 1), tokens, 0, [18, 19, 20])
    assert distance(got, expected) <= max(TOLERANCE_OF[dtype], TOLERANCE if DEVICE.type == "cuda" else 0)


def test_states_of_16_bits_are_rounded_sums() -> None:
    weights = synthetic_weights(model(2, 2, 32, 64, 60), 0.3)
    tokens = text(24, 60)
    states = states_on_device(weights, 1).bfloat16()
    got = alone(Poisoned(weights), states, tokens, 0, [20, 21, 22])
    right = states_for(weights, 1)
    expected = alone(TorchKernels(weights), right, tokens, 0, [20, 21, 22])
    assert distance(got, expected) <= 2e-2
    assert distance(states.cpu(), right) <= 1e-2


@triton.jit  # type: ignore[untyped-decorator]
def fold_many(states, addend, ROWS: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Every program is a token at its own position, with rows of its own."""
    o_row, o_d = tl.arange(0, ROWS), tl.arange(0, D)
    p_rows = states + (tl.program_id(0) * ROWS + o_row)[:, None] * D + o_d[None, :]
    m_rows = (o_row >= 0)[:, None] & (o_d >= 0)[None, :]
    b_q, b_x = tl.full([ROWS], 1.0, tl.float32), tl.load(addend + o_d)
    triton_ops.fold(
        p_rows, m_rows, True, o_row, b_q, b_x, tl.zeros([ROWS, D], tl.float32), triton_ops.noise(tl.program_id(0), o_d)
    )


def test_small_addends_are_not_lost_to_states_of_16_bits() -> None:
    """bfloat16 knows no number between 256 and 258: what is added shows in how often the sum goes up."""
    tokens, rows = 200, 8
    addend = torch.linspace(0, 2, 16)
    states = torch.full((tokens, rows, 16), 256.0, dtype=torch.bfloat16, device=DEVICE)
    fold_many[(tokens,)](states, addend.to(DEVICE), rows, 16)
    found = states.float().cpu()
    assert ((found == 256) | (found == 258)).all()
    assert (found.mean(dim=(0, 1)) - 256 - addend).abs().max() < 0.1


@triton.jit  # type: ignore[untyped-decorator]
def round_many(values, rounded, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Every program rounds all values by noise of its own."""
    o_value = tl.arange(0, COUNT)
    b_noise = triton_ops.noise(tl.program_id(0), o_value)
    p_rounded = rounded + tl.program_id(0) * COUNT + o_value
    tl.store(p_rounded, triton_ops.rounded_at_random(tl.load(values + o_value), b_noise))


def test_what_is_no_number_stays_none_and_infinity_stays_what_it_is() -> None:
    values = torch.cat([floats_of(NOT_NUMBERS), torch.tensor([torch.inf, -torch.inf] * 4)])
    rounded = torch.zeros(200, len(values), dtype=torch.bfloat16, device=DEVICE)
    round_many[(len(rounded),)](values.to(DEVICE), rounded, len(values))
    found = rounded.float().cpu()
    assert found[:, :8].isnan().all()
    assert (found[:, 8:] == values[8:]).all()


def test_the_same_bits_in_a_decode_step_and_beside_a_prompt() -> None:
    weights = synthetic_weights(model(2, 2, 32, 64, 40), 0.3)
    kernels, sequences = Poisoned(weights), {slot: text(18, 40, slot) for slot in range(4)}
    states = states_on_device(weights, 4)
    feed(kernels, states, sequences, [(slot, 0, 4) for slot in range(3)])
    alike = [states, states.clone()]
    together = feed(kernels, alike[0], sequences, [(slot, 4, 5) for slot in range(3)])
    beside = feed(kernels, alike[1], sequences, [(3, 0, 18), *((slot, 4, 5) for slot in reversed(range(3)))])
    assert torch.equal(torch.cat(together), torch.cat(beside[:0:-1]))
    assert torch.equal(alike[0][:3], alike[1][:3])


@pytest.mark.parametrize("window", [0, WINDOW])
def test_the_same_bits_where_a_prompt_is_cut_between_tiles(window: int) -> None:
    weights = synthetic_weights(model(2, 1, 32, 64, 40), 0.3)
    tile = WINDOW // 2 if window else SMALL.chunk_tokens
    tokens = text(2 * tile + 5, 40)
    whole, cut = states_on_device(weights, 1, window), states_on_device(weights, 1, window)
    kernels = Poisoned(weights, window)
    logits = alone(kernels, whole, tokens, 0, [])
    assert torch.equal(logits, alone(kernels, cut, tokens, 0, [tile, 2 * tile]))
    assert torch.equal(whole, cut)


@pytest.mark.parametrize(("dtype", "window"), [(torch.float32, 0), (torch.bfloat16, WINDOW)], ids=["32", "16"])
def test_the_same_bits_whether_a_prompt_ends_in_a_step_of_its_own(dtype: torch.dtype, window: int) -> None:
    """What is drawn after a prompt must not depend on how much else there was to do."""
    weights = synthetic_weights(model(1, 1, 16, 32, 16), 0.3, dtype=dtype)
    tokens = {0: text(19, 16), 1: text(4, 16, 1)}
    alike = [states_on_device(weights, 2, window).to(dtype) for _ in range(3)]
    kernels = Poisoned(weights, window)

    def last(states: Tensor, *steps: list[Piece]) -> Tensor:
        """What follows all tokens of slot 0, after these steps."""
        for pieces in steps:
            logits = feed(kernels, states, tokens, pieces, [end == len(tokens[slot]) for slot, _, end in pieces])
        return logits[-1][-1]

    alone = last(alike[0], [(0, 0, 18)], [(0, 18, 19)])
    assert torch.equal(alone, last(alike[1], [(0, 0, 19)]))
    assert torch.equal(alone, last(alike[2], [(1, 0, 3), (0, 0, 18)], [(1, 3, 4), (0, 18, 19)]))
    assert torch.equal(alike[0][0], alike[1][0])
    assert torch.equal(alike[0][0], alike[2][0])


def test_a_prompt_of_two_tokens_takes_them_in_their_order() -> None:
    weights = synthetic_weights(model(2, 1, 32, 64, 40), 0.3)
    tokens, states, right = {0: text(2, 40)}, states_on_device(weights, 1), states_for(weights, 1)
    (got,) = feed(Poisoned(weights), states, tokens, [(0, 0, 2)], [True])
    assert distance(got, alone(TorchKernels(weights), right, tokens[0], 0, [])) <= TOLERANCE
    assert distance(states.cpu(), right) <= TOLERANCE


def test_a_segment_longer_than_a_round() -> None:
    weights = synthetic_weights(model(2, 1, 17, 34, 40), 0.3)
    sequences = {0: text(3, 40), 1: text(37, 40, 1), 2: text(5, 40, 2)}
    pieces = [(slot, 0, len(row)) for slot, row in sequences.items()]
    kernels, states, right = Poisoned(weights, max_tokens=16), states_on_device(weights, 3), states_for(weights, 3)
    got = feed(kernels, states, sequences, pieces)
    for mine, expected in zip(got, feed(TorchKernels(weights), right, sequences, pieces)):
        assert distance(mine, expected) <= TOLERANCE
    assert distance(states.cpu(), right) <= TOLERANCE
    assert torch.equal(got[1], alone(kernels, states_on_device(weights, 1), sequences[1], 0, []))


@pytest.mark.parametrize(
    ("window", "length", "cuts"),
    [(WINDOW, 20, []), (4, 8, range(1, 8)), (WINDOW, 20, [5, 6, 7, 14])],
    ids=["whole", "by token", "in chunks"],
)
def test_a_window_across_blocks(window: int, length: int, cuts: Sequence[int]) -> None:
    weights = synthetic_weights(model(2, 1, 34, 68, 50), 0.3)
    tokens = text(length, 50)
    mine, right = states_on_device(weights, 2, window), states_for(weights, 2, window)
    got = alone(Poisoned(weights, window), mine, tokens, 1, cuts)
    assert distance(got, alone(TorchKernels(weights, window), right, tokens, 1, cuts)) <= TOLERANCE
    assert distance(mine.cpu(), right) <= TOLERANCE


def test_a_window_across_fifty_blocks() -> None:
    weights = synthetic_weights(model(1, 1, 16, 32, 50), 0.3)
    tokens = text(51 * 2 + 1, 50)
    got = alone(Poisoned(weights, 4, max_tokens=128), states_on_device(weights, 1, 4), tokens, 0, [60, 61])
    expected = alone(TorchKernels(weights, 4), states_for(weights, 1, 4), tokens, 0, [60, 61])
    assert distance(got, expected) <= TOLERANCE


@pytest.mark.parametrize(("lengths", "neurons"), [((1, 1, 1), 64), ((1, 1, 1), 34), ((1, 9, 1), 64)])
def test_a_broken_state_shows_and_stays_with_its_sequence(lengths: tuple[int, ...], neurons: int) -> None:
    weights = synthetic_weights(model(2, 2, neurons // 2, neurons, 40), 0.5)
    kernels, sequences = Poisoned(weights), {slot: text(9, 40, slot) for slot in range(3)}
    pieces = [(slot, 0, length) for slot, length in enumerate(lengths)]
    states = states_on_device(weights, 3)
    states[1] = torch.nan
    healthy, broken, other = feed(kernels, states, sequences, pieces)
    right_states = states_on_device(weights, 3)
    right = feed(kernels, right_states, sequences, pieces)
    assert broken.isnan().all()
    assert torch.equal(healthy, right[0])
    assert torch.equal(other, right[2])
    assert torch.equal(states[[0, 2]], right_states[[0, 2]])


def test_other_slots_are_left_alone() -> None:
    weights = synthetic_weights(model(2, 2, 17, 34, 40), 0.5)
    states = states_on_device(weights, 5) + 3.0
    feed(Poisoned(weights), states, {1: text(9, 40), 3: text(1, 40)}, [(1, 0, 9), (3, 0, 1)])
    feed(Poisoned(weights), states, {3: text(2, 40)}, [(3, 1, 2)])
    assert (states[[0, 2, 4]] == 3.0).all()
    assert not (states[1] == 3.0).all()


@pytest.mark.parametrize("position", [0, 1, 12345, 1_000_003, 2**28 + 1])
def test_angles_far_out(position: int) -> None:
    weights = synthetic_weights(model(1, 1, 32, 512, 40), 0.5)
    kernels = Poisoned(weights, blocks=Blocks(), max_tokens=1)
    batch = RaggedBatch(text(1, 40), torch.tensor([position]), [0, 1], [0])
    kernels.forward(states_on_device(weights, 1), batch)
    cos, sin = rotation(weights.frequencies, batch.positions)
    assert (kernels.kernels._work.cos[:1].cpu() - cos).abs().max() <= 5e-7
    assert (kernels.kernels._work.sin[:1].cpu() - sin).abs().max() <= 5e-7


def test_rounds_keep_segments_whole_and_no_two_pieces_of_one_together() -> None:
    found = list(rounds([0, 3, 4, 24, 25, 27], [7, 1, 5, 0, 2], [False, True, True, True, False], 8))
    assert found == [
        (0, [0, 3, 4], [7, 1], [False, True]),
        (4, [0, 8], [5], [False]),
        (12, [0, 8], [5], [False]),
        (20, [0, 4, 5, 7], [5, 0, 2], [True, True, False]),
    ]


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(count, 48) for count in (1, 2, 3, 5, 33, 48)] == [1, 2, 4, 8, 48, 48]


def test_block_sizes_are_kept_by_gpu_and_shape(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    assert tuning.load_blocks("a", file) == Blocks()
    tuning.save_blocks("a", Blocks(part=64), file)
    tuning.save_blocks("b", Blocks(span=64), file)
    assert tuning.load_blocks("a", file) == Blocks(part=64)
    assert tuning.load_blocks("c", file) == Blocks()
    file.write_text('{"a": {"parts": 3}}')
    with pytest.raises(ConfigError, match=r"tuned\.json: not block sizes"):
        tuning.load_blocks("a", file)


def test_the_search_takes_the_fastest_of_each_kernel() -> None:
    def cost(blocks: Blocks) -> float:
        return abs(blocks.part - 128) + abs(blocks.span - 128) + (float("inf") if blocks.chunk_tokens == 16 else 0)

    best = tuning.search(cost)
    assert (best.part, best.span, best.chunk_tokens) == (128, 128, 32)
    assert asdict(best)["encode_tokens"] == 64


def test_what_fires_is_counted_as_the_specification_does_and_changes_nothing() -> None:
    weights = synthetic_weights(model(2, 1, 16, 32, 40), 0.3)
    for lengths in ([1, 1, 1], [1, 5, 1], [9]):
        bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        positions = torch.cat([torch.arange(length) for length in lengths])
        batch = RaggedBatch(text(bounds[-1], 40), positions, bounds, range(len(lengths)))
        found, expected = torch.full((2,), torch.nan, device=DEVICE), torch.full((2,), torch.nan)
        kernels = Poisoned(weights, max_tokens=8)
        looked = kernels.forward(states_on_device(weights, 3), batch, found)
        assert torch.equal(looked, kernels.forward(states_on_device(weights, 3), batch))
        TorchKernels(weights).forward(states_for(weights, 3), batch, expected)
        torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=0)
