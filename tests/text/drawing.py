"""Completions drawn at random from a grammar over bytes."""

from __future__ import annotations

import random

from bdh_batch.messages import Constraint

LIKELY = 0.9  # share of the tokens that are drawn of the likely ones, where any is allowed


def drawn(constraint: Constraint, chance: random.Random, most: int = 60, likely: bytes = b"") -> str:
    """One, as far as `most` tokens lead; empty where it has not ended by then."""
    text = b""
    while len(text) < most:
        mask = constraint.mask()
        allowed = range(256) if mask is None else [token for token in range(256) if mask[token >> 3] >> (token & 7) & 1]
        if not allowed:  # a grammar may lead to where nothing can follow, which ends the completion with an error
            return ""
        favoured = [token for token in likely if token in allowed] if mask is not None else []
        token = chance.choice(favoured if favoured and chance.random() < LIKELY else allowed)
        if not constraint.accept(token):
            return text.decode()
        text += bytes([token])
        if constraint.complete:
            return text.decode()
    return ""
