"""The Triton kernels of a step. `cuda.py` launches them, `tuning.py` holds their block sizes, `README.md` derives them.

Names: `i_` a program's index, `o_` offsets, `m_` masks, `p_` pointers, `b_` block values; constants in capitals.

Every sum has an order that follows from the model and its block sizes alone: each program owns a fixed tile, partial
sums go to memory, and the kernel that reads them adds them up in order. So the bits of a sequence do not depend on who
shares its batch. Sums are float32 whatever the weights and the states are. What differs from step to step, such as
the number of tokens and where lists begin, is not specialised on: no step compiles anything.

A pair is two neighbouring neurons (2i, 2i + 1), which RoPE turns together; a part is a tile of PART neurons of a head.
"""

# mypy: ignore-errors
# ruff: noqa: N803, N806, SIM102
# Types here are Triton's; what is compiled away is written in capitals, and its `if` must stand alone.

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """c + a · b. PRECISION is that of float32 operands."""
    if INTERPRETED:  # the interpreter would multiply bfloat16's bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def layer_norm(b_row, m_row, D: tl.constexpr):
    """Of a row that is zero where the mask is false."""
    b_centred = tl.where(m_row, b_row - tl.sum(b_row, axis=0) / D, 0.0)
    b_variance = tl.sum(b_centred * b_centred, axis=0) / D
    return b_centred / tl.sqrt(b_variance + 1e-5)


@triton.jit
def relu(b):
    """Unlike a maximum, this keeps NaN, so that a broken state shows."""
    return tl.where(b <= 0, 0.0, b)


@triton.jit
def sum_rows(p_rows, o_d, m_d, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum [D] of ROWS rows that lie one behind the other."""
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for r in range(0, ROWS, BLOCK_R):
        o_r = r + tl.arange(0, BLOCK_R)
        m = (o_r < ROWS)[:, None] & m_d[None, :]
        b_sum += tl.load(p_rows + o_r[:, None] * D + o_d[None, :], mask=m, other=0.0)
    return tl.sum(b_sum, axis=0)


@triton.jit(do_not_specialize_on_alignment=["tokens", "vectors"])
def embed_kernel(tokens, embed, vectors, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x [T, D] = layer_norm(embed[tokens]); but row k of `vectors` [K, D], unless that is None, for a token −1 − k."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    token = tl.load(tokens + i_t)
    m_row = m_d if vectors is None else m_d & (token >= 0)
    b_x = layer_norm(tl.load(embed + token * D + o_d, mask=m_row, other=0.0).to(tl.float32), m_d, D)
    if vectors is not None:
        b_vector = tl.load(vectors + (-1 - token) * D + o_d, mask=m_d & (token < 0), other=0.0)
        b_x = tl.where(token < 0, b_vector, b_x)
    tl.store(x + i_t * D + o_d, b_x, mask=m_d)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def rotation_kernel(positions, frequencies, cos, sin, N: tl.constexpr, BLOCK_A: tl.constexpr):
    """cos and sin [T, N / 2] of each token's angles, once for all layers and heads.

    A float32 frequency times a position below 2^29 is exact in float64, so whole turns drop out without error.
    """
    i_a = tl.program_id(0)
    i_t = tl.program_id(1).to(tl.int64)
    o_a = i_a * BLOCK_A + tl.arange(0, BLOCK_A)
    m_a = o_a < N // 2
    b_turns = tl.load(frequencies + 2 * o_a, mask=m_a, other=0.0).to(tl.float64)
    b_turns *= tl.load(positions + i_t).to(tl.float64)
    b_turns -= tl.floor(b_turns + 0.5)
    b_angles = (b_turns * 6.283185307179586).to(tl.float32)
    tl.store(cos + i_t * (N // 2) + o_a, tl.cos(b_angles), mask=m_a)
    tl.store(sin + i_t * (N // 2) + o_a, tl.sin(b_angles), mask=m_a)


@triton.jit
def product(
    p_a, p_b, m_t, m_n, K: tl.constexpr, STRIDE_B: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, BLOCK_N] = a [.., K] · b [K, ..]; `p_a` points to the rows' starts, `p_b` to the columns'."""
    b_sum = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_a = tl.load(p_a[:, None] + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b[None, :] + o_k[:, None] * STRIDE_B, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_sum = dot(b_a.to(b_b.dtype), b_b, b_sum, PRECISION)
    return b_sum


@triton.jit(do_not_specialize=["T"])
def encode_kernel(
    x, encoder, fired, pairs, counts, T, H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, PART: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fired [T, H, N] = relu(x · encoder), and for each part of each token the list of the pairs that fired.

    `pairs` [T, H, parts, PART / 2] holds them as offsets in their part, rising, `counts` [T, H, parts] how many.
    """
    i_p, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    PARTS: tl.constexpr = (N + PART - 1) // PART
    o_t = tl.program_id(2).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_n = i_p * PART + tl.arange(0, PART)
    m_t, m_n = o_t < T, o_n < N
    b_sum = product(x + o_t * D, encoder + i_h * D * N + o_n, m_t, m_n, D, N, BLOCK_T, PART, BLOCK_K, PRECISION)
    b_fired = relu(b_sum).to(fired.dtype.element_ty)
    o_row = o_t * H + i_h
    tl.store(fired + o_row[:, None] * N + o_n[None, :], b_fired, mask=m_t[:, None] & m_n[None, :])
    b_on = (b_fired != 0) & m_n[None, :] if N % PART else b_fired != 0  # behind N, NaN · 0 fires, and has no state
    b_hit = tl.max(tl.reshape(b_on.to(tl.int32), [BLOCK_T, PART // 2, 2]), axis=2)
    b_rank = tl.cumsum(b_hit, axis=1) - b_hit
    o_part = o_row * PARTS + i_p
    b_pair = tl.broadcast_to(tl.arange(0, PART // 2)[None, :], [BLOCK_T, PART // 2])
    m_pair = (b_hit > 0) & m_t[:, None]
    tl.store(pairs + o_part[:, None] * (PART // 2) + b_rank, b_pair.to(tl.int16), mask=m_pair)
    tl.store(counts + o_part, tl.sum(b_hit, axis=1), mask=m_t)


@triton.jit
def noise(position, o_d):
    """Random bits [columns] that follow from a token's position: the finaliser of MurmurHash3 (Appleby)."""
    b_bits = (position + 1).to(tl.uint32) * (o_d + 1).to(tl.uint32) * 0x9E3779B1
    b_bits = (b_bits ^ (b_bits >> 16)) * 0x85EBCA6B
    b_bits = (b_bits ^ (b_bits >> 13)) * 0xC2B2AE35
    return b_bits >> 16


@triton.jit
def rounded_at_random(b_sum, b_noise):
    """bfloat16 by the odds of `b_noise`. NaN stays NaN: to the GPU's, 0x7FFFFFFF, noise would be added up to −0.0."""
    b_bits = b_sum.to(tl.uint32, bitcast=True)
    b_bits = tl.where(b_sum == b_sum, b_bits + b_noise, b_bits | 0x400000)
    return (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def fold(p_rows, m_rows, added, o_row, b_q, b_x, b_y, b_noise):
    """State rows, read and written once: returns y + q ∘ S, and adds q ⊗ x to S. y is summed over rows later.
    S is not written unless `added`.

    A sum that is kept in bfloat16 is rounded up or down by odds that keep its mean: to the nearest, a state that has
    grown would drop every small addend.
    """
    b_rows = tl.load(p_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_sum = b_rows + b_q[:, None] * b_x[None, :]
    if p_rows.dtype.element_ty == tl.bfloat16:
        b_shift = (o_row.to(tl.uint32) * 0x9E3779B1) >> 16
        tl.store(p_rows, rounded_at_random(b_sum, (b_noise[None, :] + b_shift[:, None]) & 0xFFFF), mask=m_rows & added)
    else:
        tl.store(p_rows, b_sum, mask=m_rows & added)
    return b_y + b_q[:, None] * b_rows


@triton.jit
def turned_pairs(p_fired, p_cos, p_sin, o_pair, m_pair):
    """q = rope(fired) of some pairs: of their even neurons, and of their odd ones."""
    b_even = tl.load(p_fired + 2 * o_pair, mask=m_pair, other=0.0).to(tl.float32)
    b_odd = tl.load(p_fired + 2 * o_pair + 1, mask=m_pair, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_pair, mask=m_pair, other=0.0)
    b_sin = tl.load(p_sin + o_pair, mask=m_pair, other=0.0)
    return b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos


@triton.jit
def start_block(p_rows, p_earlier, m_rows):
    """The oldest block leaves the window: S −= A, then A = S."""
    b_rows = tl.load(p_rows, mask=m_rows, other=0.0).to(tl.float32)
    b_rows -= tl.load(p_earlier, mask=m_rows, other=0.0).to(tl.float32)
    tl.store(p_rows, b_rows.to(p_rows.dtype.element_ty), mask=m_rows)
    tl.store(p_earlier, b_rows.to(p_rows.dtype.element_ty), mask=m_rows)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["positions", "singles", "slots"])
def attend_token_kernel(
    x, fired, pairs, counts, cos, sin, positions, singles, slots, states, reads, layer,
    L: tl.constexpr, H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """One part of one head's state for a single token: y = q · S, then S += q ⊗ x, in one pass.

    Goes by the list of pairs that fired, which is loaded once and stays in registers: an iteration's rows, which are no
    others' rows, are on their way while earlier ones are added up. `singles` are the tokens, `slots` their states; a
    slot of −1 pads a batch, and with LATENT, −2 − s is slot s, whose state is read and not added to. `reads` [T, H,
    parts, D] gets this part's share of y.
    """
    i_p, i_h, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot = tl.load(slots + i_s)
    added = True
    if LATENT:
        added = slot >= 0
        slot = tl.where(slot < -1, -2 - slot, slot)
    if slot < 0:
        return
    PARTS: tl.constexpr = (N + PART - 1) // PART
    PAIRS: tl.constexpr = PART // 2
    BLOCKS: tl.constexpr = 2 if HALF > 0 else 1
    i_t = tl.load(singles + i_s)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_part = (i_t * H + i_h) * PARTS + i_p
    first = i_p * PAIRS
    p_state = states + ((slot * L + layer) * BLOCKS * H + i_h) * N * D + o_d[None, :]
    p_fired, p_cos, p_sin = fired + (i_t * H + i_h) * N, cos + i_t * (N // 2), sin + i_t * (N // 2)
    b_x = tl.load(x + i_t * D + o_d, mask=m_d, other=0.0)
    b_y = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    count = tl.load(counts + o_part)
    position = tl.load(positions + i_t)
    b_noise = noise(position, o_d)

    if HALF > 0:
        if position % HALF == 0:
            for i in range(0, PART, BLOCK_P):
                o_row = i_p * PART + i + tl.arange(0, BLOCK_P)
                p_rows = p_state + o_row[:, None] * D
                start_block(p_rows, p_rows + H * N * D, (o_row < N)[:, None] & m_d[None, :])
            tl.debug_barrier()  # other threads of this program read those rows now

    o_list = tl.arange(0, PAIRS)
    m_list = o_list < count
    b_pairs = first + tl.load(pairs + o_part * PAIRS + o_list, mask=m_list, other=0).to(tl.int32)
    b_evens, b_odds = turned_pairs(p_fired, p_cos, p_sin, b_pairs, m_list)
    for i in tl.range(0, count, BLOCK_P, num_stages=STAGES):
        o_entry = i + tl.arange(0, BLOCK_P)
        o_even = 2 * tl.gather(b_pairs, o_entry, 0)
        b_even, b_odd = tl.gather(b_evens, o_entry, 0), tl.gather(b_odds, o_entry, 0)
        p_rows, m_rows = p_state + o_even[:, None] * D, (o_entry < count)[:, None] & m_d[None, :]
        b_y = fold(p_rows, m_rows, added, o_even, b_even, b_x, b_y, b_noise)
        b_y = fold(p_rows + D, m_rows, added, o_even + 1, b_odd, b_x, b_y, b_noise)
    tl.store(reads + o_part * D + o_d, tl.sum(b_y, axis=0), mask=m_d)


@triton.jit
def tile_index(position, HALF: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which tile of at most BLOCK_C positions, none of which crosses a block of the window, a position lies in."""
    if HALF > 0:
        return position // HALF * ((HALF + BLOCK_C - 1) // BLOCK_C) + position % HALF // BLOCK_C
    return position // BLOCK_C


@triton.jit
def tile_bounds(index, HALF: tl.constexpr, BLOCK_C: tl.constexpr):
    """The positions of a tile: the first, and the one behind the last."""
    if HALF > 0:
        PER_BLOCK: tl.constexpr = (HALF + BLOCK_C - 1) // BLOCK_C
        block = index // PER_BLOCK
        begin = block * HALF + index % PER_BLOCK * BLOCK_C
        return begin, tl.minimum(begin + BLOCK_C, (block + 1) * HALF)
    return index * BLOCK_C, (index + 1) * BLOCK_C


@triton.jit
def turned_tile(fired, cos, sin, o_row, o_t, o_n, m_t, N: tl.constexpr):
    """q [tokens, neurons]: some tokens' activations after RoPE, the neurons in their order."""
    m = m_t[:, None] & (o_n < N)[None, :]
    p_row, p_angle = o_row[:, None] * N, o_t[:, None] * (N // 2) + (o_n // 2)[None, :]
    b_own = tl.load(fired + p_row + o_n[None, :], mask=m, other=0.0).to(tl.float32)
    b_other = tl.load(fired + p_row + (o_n ^ 1)[None, :], mask=m, other=0.0).to(tl.float32)
    b_sign = tl.where(o_n % 2 == 0, -1.0, 1.0)
    b_cos = tl.load(cos + p_angle, mask=m, other=0.0)
    return b_own * b_cos + b_sign[None, :] * b_other * tl.load(sin + p_angle, mask=m, other=0.0)


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["positions", "segments"])
def attend_chunk_kernel(
    x, fired, cos, sin, positions, segments, states, reads, layer,
    L: tl.constexpr, H: tl.constexpr, D: tl.constexpr, N: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile [PART, BLOCK_V] of one head's state taken through all tokens of a segment, read and written once.

    For a tile of tokens, y = Q · S + tril(Q · Qᵀ, −1) · X, then S += Qᵀ · X. Each part adds its own neurons' share of
    Q · Qᵀ, so that neither Q nor the scores ever lie in memory. Tiles of tokens begin at fixed positions, so a prompt
    cut at multiples of BLOCK_C gives the same bits as a whole one. `segments` [.., 3] are first token, end, slot.
    """
    VALUES: tl.constexpr = (D + BLOCK_V - 1) // BLOCK_V
    PARTS: tl.constexpr = (N + PART - 1) // PART
    BLOCKS: tl.constexpr = 2 if HALF > 0 else 1
    i_p, i_v = tl.program_id(0) // VALUES, tl.program_id(0) % VALUES
    i_h, i_s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, end = tl.load(segments + 3 * i_s), tl.load(segments + 3 * i_s + 1)
    slot = tl.load(segments + 3 * i_s + 2)
    start = tl.load(positions + first)
    stop = start + end - first
    o_n, o_v, o_c = i_p * PART + tl.arange(0, PART), i_v * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_C)
    m_v = o_v < D
    m_state = (o_n < N)[:, None] & m_v[None, :]
    o_state = ((slot * L + layer) * BLOCKS * H + i_h) * N * D + o_n[:, None] * D + o_v[None, :]
    b_state = tl.load(states + o_state, mask=m_state, other=0.0).to(tl.float32)
    for index in range(tile_index(start, HALF, BLOCK_C), tile_index(stop - 1, HALF, BLOCK_C) + 1):
        begin, until = tile_bounds(index, HALF, BLOCK_C)
        begin, until = tl.maximum(begin, start), tl.minimum(until, stop)
        if HALF > 0:
            if begin % HALF == 0:
                p_earlier = states + o_state + H * N * D
                b_state -= tl.load(p_earlier, mask=m_state, other=0.0).to(tl.float32)
                tl.store(p_earlier, b_state.to(states.dtype.element_ty), mask=m_state)
        o_t = first + begin - start + o_c
        m_t = o_c < until - begin
        m_x = m_t[:, None] & m_v[None, :]
        b_q = turned_tile(fired, cos, sin, o_t * H + i_h, o_t, o_n, m_t, N)
        b_x = tl.load(x + o_t[:, None] * D + o_v[None, :], mask=m_x, other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_q), input_precision=PRECISION)
        b_scores = tl.where(o_c[:, None] > o_c[None, :], b_scores, 0.0)
        b_y = tl.dot(b_q, b_state, input_precision=PRECISION)
        b_y = tl.dot(b_scores, b_x, b_y, input_precision=PRECISION)
        b_state = tl.dot(tl.trans(b_q), b_x, b_state, input_precision=PRECISION)
        p_reads = reads + ((o_t * H + i_h) * PARTS + i_p)[:, None] * D + o_v[None, :]
        tl.store(p_reads, b_y, mask=m_x)
    tl.store(states + o_state, b_state.to(states.dtype.element_ty), mask=m_state)


@triton.jit
def normalise_kernel(reads, normed, D: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """normed [T, H, D] = layer_norm(y), y summed over the parts, in the precision that products take."""
    i_r = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_y = sum_rows(reads + i_r * PARTS * D, o_d, m_d, PARTS, D, BLOCK_R, BLOCK_D)
    tl.store(normed + i_r * D + o_d, layer_norm(b_y, m_d, D).to(normed.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["T"])
def contract_kernel(
    normed, fired, gates, decoder, shares, T, H: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SPAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SPAN neurons' share of (fired ∘ relu(normed · gatesᵀ)) · decoder, to `shares` [T, H · spans, D].

    `gates` [H · N, D] are encoder_v with a neuron's column as a row, as in `decoder`: an iteration's tiles of rows are
    on their way while earlier ones are multiplied. The gated product, n wide, never lies in memory.
    """
    SPANS: tl.constexpr = (N + SPAN - 1) // SPAN
    i_s, i_h = tl.program_id(0), (tl.program_id(0) // SPANS).to(tl.int64)
    o_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < T, o_d < D
    o_row = o_t * H + i_h
    m_x = m_t[:, None] & m_d[None, :]
    if BLOCK_K >= BLOCK_D:
        b_normed = tl.load(normed + o_row[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
    b_z = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for n in tl.range(0, SPAN, BLOCK_N, num_stages=STAGES):
        o_n = i_s % SPANS * SPAN + n + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        o_tile, m_tile = (i_h * N + o_n)[:, None] * D + o_d[None, :], m_n[:, None] & m_d[None, :]
        if BLOCK_K < BLOCK_D:
            p_a, p_b = normed + o_row * D, gates + (i_h * N + o_n) * D
            b_gate = product(p_a, p_b, m_t, m_n, D, 1, BLOCK_T, BLOCK_N, BLOCK_K, PRECISION)
        else:
            b_gate = tl.trans(tl.load(gates + o_tile, mask=m_tile, other=0.0))
            b_gate = dot(b_normed, b_gate, tl.zeros([BLOCK_T, BLOCK_N], tl.float32), PRECISION)
        b_rows = tl.load(decoder + o_tile, mask=m_tile, other=0.0)
        b_fired = tl.load(fired + o_row[:, None] * N + o_n[None, :], mask=m_t[:, None] & m_n[None, :], other=0.0)
        b_z = dot((b_fired.to(tl.float32) * relu(b_gate)).to(b_rows.dtype), b_rows, b_z, PRECISION)
    tl.store(shares + (o_t * (H * SPANS) + i_s)[:, None] * D + o_d[None, :], b_z, mask=m_x)


@triton.jit
def finish_kernel(
    shares, x, D: tl.constexpr, SHARES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """x = layer_norm(x + layer_norm(z)), z summed over its shares; without NORM, x = x + layer_norm(z)."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_z = sum_rows(shares + i_t * SHARES * D, o_d, m_d, SHARES, D, BLOCK_R, BLOCK_D)
    b_x = tl.load(x + i_t * D + o_d, mask=m_d, other=0.0) + layer_norm(b_z, m_d, D)
    if NORM:
        b_x = layer_norm(b_x, m_d, D)
    tl.store(x + i_t * D + o_d, b_x, mask=m_d)


@triton.jit(do_not_specialize=["T"])
def logits_kernel(
    x, lm_head, logits, T, D: tl.constexpr, V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """logits [T, V] = x · lm_head"""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t, m_n = o_t < T, o_n < V
    b_sum = product(x + o_t * D, lm_head + o_n, m_t, m_n, D, V, BLOCK_T, BLOCK_N, BLOCK_K, PRECISION)
    tl.store(logits + o_t[:, None] * V + o_n[None, :], b_sum, mask=m_t[:, None] & m_n[None, :])
