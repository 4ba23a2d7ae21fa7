"""Log-probabilities of tokens, and the likeliest ones beside them: the log-softmax of the model's own scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdh_batch.messages import TokenScore

ROWS = 128  # of prompts, that are scored at a time: their logits take memory


def score(logits: Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenScore]:
    """A score for the token of each row of `logits` [rows, V] float32, with its row's `tops` likeliest tokens."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    values, likeliest = logprobs.topk(min(max(tops), logits.shape[-1]), dim=-1)
    rows = zip(tokens, own, likeliest.tolist(), values.tolist(), tops, strict=True)
    return [TokenScore(token, mine, list(zip(ids[:top], those[:top]))) for token, mine, ids, those, top in rows]
