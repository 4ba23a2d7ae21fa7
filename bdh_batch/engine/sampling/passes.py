"""Drawing from rows of logits in main memory, as compiled passes over them. `draw.py` is the specification.

Each row gets, bit by bit, what the specification's operators give: float32 where they are float32, running sums in
float64, ties in token order. The one thing these passes leave to torch is the softmax between two of them, whose bits
depend on the machine's vectors. A pass goes over the rows one by one, so no row depends on its company.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bdh_batch.kernels.drawing import NO_TOKEN, ROW, WORDS
from bdh_batch.kernels.vector import compiled, inlined

OFFSETS = {name: offset for name, (_, offset, *_) in (ROW.fields or {}).items()}  # in bytes
# Columns of a row's record, read as float32, and read as int64, of which it has WORDS.
NUMBERS = ROW.itemsize // 4
TEMPERATURE, TOP_P, LEAST = (OFFSETS[name] // 4 for name in ("temperature", "top_p", "least"))
KEPT, SEED = (OFFSETS[name] // 8 for name in ("kept", "seed"))

REFUSED = np.finfo(np.float32).min  # the logit of a token that a mask refuses
INFINITE = 0x7F800000  # the bits of float32's infinity
DIGITS = 256  # of the sort's passes: bytes
BYTES = 4
FEW = 128  # tokens, up to which counting who comes before each takes less than a radix sort

Floats = np.ndarray[Any, np.dtype[np.float32]]
Integers = np.ndarray[Any, np.dtype[np.int32]]
Longs = np.ndarray[Any, np.dtype[np.int64]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@compiled
def scale(
    logits: Floats, bits: Integers, pitch: int, vocabulary: int, numbers: Floats, words: Longs, masks: Bytes,
    mask_of: Integers, mask_size: int, tokens: Longs, hot: Longs, scaled: Floats,
) -> tuple[int, int]:  # fmt: skip
    """Chooses the likeliest token of rows with temperature 0, and scales the others.

    Args:
        logits: one row behind the other, each `pitch` after the one before; `bits` are the same as int32.
        numbers: [rows, NUMBERS]; `words` are the same as [rows, WORDS].
        masks: packed bits, `mask_size` bytes each; `mask_of` [rows] names each row's, or is −1.
        tokens: [rows], gets the tokens; NO_TOKEN where a logit is not finite.
        hot: gets the rows that are to be drawn, in order.
        scaled: [rows, vocabulary], gets theirs without gaps: (logit − largest) / temperature, −∞ below `min_p`.

    Returns:
        How many rows are hot, and how many of them `order` is for.
    """
    count = filtered = 0
    for row in range(len(tokens)):
        first, to = row * pitch, count * vocabulary
        largest, finite = _largest(logits, bits, first, vocabulary)
        source, begin = logits, first
        if finite and mask_of[row] >= 0:
            largest = _mask(logits, first, vocabulary, masks, mask_of[row] * mask_size, mask_size, scaled, to)
            source, begin = scaled, to
        temperature = numbers[row * NUMBERS + TEMPERATURE]
        tokens[row] = NO_TOKEN
        if not finite:
            continue
        if temperature <= 0:
            tokens[row] = _find(source, begin, vocabulary, largest)
            continue
        least = numbers[row * NUMBERS + LEAST]
        for token in range(vocabulary):
            value = (source[begin + token] - largest) / temperature
            scaled[to + token] = value if value >= least else -np.float32(np.inf)
        hot[count] = row
        count += 1
        filtered += words[row * WORDS + KEPT] > 0
    return count, filtered


@inlined
def _largest(logits: Floats, bits: Integers, first: int, vocabulary: int) -> tuple[np.float32, bool]:
    """The largest logit of a row, and whether all are finite. Integers in the order of the floats whose bits they are
    let the compiler use vectors."""
    most, least = np.int32(-INFINITE - 1), np.int32(INFINITE)
    for at in range(first, first + vocabulary):
        key = bits[at] ^ (bits[at] >> np.int32(31) & np.int32(0x7FFFFFFF))
        most, least = max(most, key), min(least, key)
    finite = bool(most < INFINITE and least > -INFINITE - 1)
    return np.int32(most ^ (most >> np.int32(31) & np.int32(0x7FFFFFFF))).view(np.float32), finite


@inlined
def _find(values: Floats, begin: int, count: int, wanted: np.float32) -> int:
    for at in range(count):
        if values[begin + at] == wanted:
            return at
    return 0


@inlined
def _mask(
    logits: Floats, first: int, vocabulary: int, masks: Bytes, mask: int, mask_size: int, out: Floats, to: int
) -> np.float32:
    """Copies a row with REFUSED for tokens whose bits are 0, or lie beyond the mask; returns its largest logit."""
    largest = np.float32(REFUSED)
    for token in range(vocabulary):
        allowed = token >> 3 < mask_size and masks[mask + (token >> 3)] >> (token & 7) & 1 == 1
        value = logits[first + token] if allowed else np.float32(REFUSED)
        out[to + token] = value
        largest = max(largest, value)
    return largest


@compiled
def order(
    scaled: Floats, bits: Integers, vocabulary: int, words: Longs, hot: Longs, count: int, filtered: Longs,
    sizes: Longs, ordered: Floats, ranking: Integers, keys: Integers, spare: Integers, counts: Longs,
) -> None:  # fmt: skip
    """Orders the tokens that may be kept of each of the `count` hot rows that has a `top_k` or a `top_p`: the likeliest
    first, equal ones as they come.

    Args:
        bits: those of `scaled`, as int32; a scaled row has no number above 0.
        filtered: gets those rows, by their index among the hot ones; `sizes`: how many tokens are ordered of each.
        ordered: [rows, vocabulary], gets their values without gaps, −∞ behind those that are ordered.
        ranking: [rows, vocabulary], gets the tokens in that order.
        keys, spare: [vocabulary], `counts`: [BYTES * DIGITS]: scratch.
    """
    found = 0
    for index in range(count):
        kept = min(words[hot[index] * WORDS + KEPT], vocabulary)
        if not kept:
            continue
        first, to = index * vocabulary, found * vocabulary
        size = _candidates(bits, first, vocabulary, ranking, to, keys)
        if size > kept:
            size = _smallest(keys, size, kept, ranking, to)
        if size <= FEW:
            _rank_few(keys, size, ranking, to, spare)
        else:
            _rank(bits, first, size, ranking, to, spare, counts)
        for at in range(size):
            ordered[to + at] = scaled[first + ranking[to + at]]
        ordered[to + size : to + vocabulary] = -np.float32(np.inf)
        filtered[found], sizes[found] = index, size
        found += 1


@inlined
def _key(bits: Integers, at: int) -> int:
    """Rises as numbers at or below 0 fall; both zeros have the same."""
    return int(bits[at] & np.int32(0x7FFFFFFF))


@inlined
def _candidates(bits: Integers, first: int, vocabulary: int, ranking: Integers, to: int, keys: Integers) -> int:
    """Writes down the tokens of a row that are not at −∞, and their keys; returns how many there are."""
    size = 0
    for token in range(vocabulary):
        key = _key(bits, first + token)
        keys[size], ranking[to + size] = key, token
        size += key < INFINITE
    return size


@inlined
def _smallest(keys: Integers, size: int, kept: int, ranking: Integers, to: int) -> int:
    """Leaves those of `size` tokens that have the `kept` smallest keys, of equal ones the first; returns `kept`.

    The last key that stays is found by halving: counting is what vectors do best, and takes the same for any values."""
    low, high = 0, INFINITE
    while low < high:
        middle = np.int32((low + high) >> 1)
        reached = 0
        for at in range(size):
            reached += keys[at] <= middle
        if reached >= kept:
            high = int(middle)
        else:
            low = int(middle) + 1
    equal = kept  # how many tokens with that key stay
    for at in range(size):
        equal -= keys[at] < low
    left = 0
    for at in range(size):
        key = keys[at]
        stays = key < low or (key == low and equal > 0)
        equal -= key == low
        keys[left], ranking[to + left] = key, ranking[to + at]
        left += stays
    return kept


@inlined
def _rank_few(keys: Integers, size: int, ranking: Integers, to: int, spare: Integers) -> None:
    """A token's rank is the number of those before it. Counting them takes less than a radix sort where there are few
    tokens, and as little a time for any values."""
    for at in range(size):
        key, rank = keys[at], 0
        for other in range(at):
            rank += keys[other] <= key
        for other in range(at + 1, size):
            rank += keys[other] < key
        spare[rank] = ranking[to + at]
    for at in range(size):
        ranking[to + at] = spare[at]


@inlined
def _rank(bits: Integers, first: int, size: int, ranking: Integers, to: int, spare: Integers, counts: Longs) -> None:
    """A radix sort, byte by byte from the lowest on: stable, and in a time that does not depend on the values."""
    counts[:] = 0
    for at in range(size):
        key = _key(bits, first + ranking[to + at])
        for byte in range(BYTES):
            counts[byte * DIGITS + (key >> (8 * byte) & 0xFF)] += 1
    any_key = _key(bits, first + ranking[to])
    for byte in range(BYTES):
        digits = byte * DIGITS
        if counts[digits + (any_key >> (8 * byte) & 0xFF)] == size:
            continue  # all have the same
        ahead = 0
        for digit in range(digits, digits + DIGITS):
            ahead, counts[digit] = ahead + counts[digit], ahead
        for at in range(size):
            token = ranking[to + at]
            digit = digits + (_key(bits, first + token) >> (8 * byte) & 0xFF)
            spare[counts[digit]] = token
            counts[digit] += 1
        for at in range(size):
            ranking[to + at] = spare[at]


@compiled
def keep_likeliest(
    scaled: Floats, vocabulary: int, numbers: Floats, hot: Longs, filtered: Longs, sizes: Longs, count: int,
    ordered: Floats, ranking: Integers, probabilities: Floats,
) -> None:  # fmt: skip
    """Sets all but the likeliest tokens that together reach `top_p`, and are in `top_k`, to −∞ in the `count` filtered
    rows of `scaled`. `probabilities` is the softmax of `ordered`; the rest is as in `order`."""
    for number in range(count):
        at, to = number * vocabulary, filtered[number] * vocabulary
        top_p = numbers[hot[filtered[number]] * NUMBERS + TOP_P]
        scaled[to : to + vocabulary] = -np.float32(np.inf)
        together = 0.0
        for rank in range(sizes[number]):
            share = probabilities[at + rank]
            together += np.float64(share)
            ahead = np.float32(together) - share
            if rank == 0 or ahead < top_p:  # the likeliest always stays
                scaled[to + ranking[at + rank]] = ordered[at + rank]


@compiled
def draw(
    probabilities: Floats, vocabulary: int, words: Longs, positions: Longs, hot: Longs, count: int, tokens: Longs,
    sums: Doubles,
) -> None:  # fmt: skip
    """Draws a token for each of the `count` hot rows of `probabilities`, by its seed and position.

    Args:
        words: [rows, WORDS].
        positions: [rows].
        tokens: [rows], gets them.
        sums: [vocabulary]: scratch, for running sums.
    """
    for index in range(count):
        row, begin = hot[index], index * vocabulary
        total = 0.0
        for at in range(vocabulary):
            total += np.float64(probabilities[begin + at])
            sums[at] = total
        # Rounding must not reach past the last token that has any probability: scale by the sum, stay below it.
        target = min(_uniform(words[row * WORDS + SEED], positions[row]) * total, total * (1 - 1e-12))
        tokens[row] = min(int(np.searchsorted(sums[:vocabulary], target, side="right")), vocabulary - 1)


@compiled
def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: Philox4x32-10 of 64 bits of each."""
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1 = np.uint64(position) & word, np.uint64(position) >> half
    c2, c3 = np.uint64(0), np.uint64(0)
    k0, k1 = np.uint64(seed) & word, np.uint64(seed) >> half
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = product1 >> half ^ c1 ^ k0, product1 & word
        c2, c3 = product0 >> half ^ c3 ^ k1, product0 & word
        k0, k1 = k0 + np.uint64(0x9E3779B9) & word, k1 + np.uint64(0xBB67AE85) & word
    return (np.float64(c0 >> np.uint64(5)) * 2.0**26 + np.float64(c1 >> np.uint64(6))) * 2.0**-53
