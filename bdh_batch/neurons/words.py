"""Which neurons tell words apart, by what they fire where a text has them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdh_batch.errors import ConfigError

SHOWN = 20  # neurons of each word


def occurrences(words: Sequence[str], text: str) -> list[list[int]]:
    """For each word, the offsets of its last bytes in `text` as UTF-8, where it is a word by itself.

    Raises:
        ConfigError: the text lacks one.
    """
    found = []
    for word in words:
        places = [match.end() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
        if not places:
            raise ConfigError(f"--words: the text does not have {word!r} as a word by itself")
        found.append(_bytes_before(text, places))
    return found


def _bytes_before(text: str, ends: Sequence[int]) -> list[int]:
    """For each of the ascending `ends`, in characters, the offset of the byte before it."""
    offsets, offset, begin = [], 0, 0
    for end in ends:
        offset += len(text[begin:end].encode())
        begin = end
        offsets.append(offset - 1)
    return offsets


@dataclass(frozen=True, slots=True)
class Telling:
    """A neuron that tells a word from the others.

    Args:
        neuron: its index among those of its layer.
        mean: its mean activation on the word's last token.
        others: on that of the other word for which it is largest; where there is no other word, on all tokens.
    """

    layer: int
    neuron: int
    mean: float
    others: float


class Words:
    """Adds up what fires on the last token of each word.

    Args:
        places: for each word, the positions of these tokens.
    """

    def __init__(
        self, words: Sequence[str], places: Sequence[Sequence[int]], layers: int, neurons: int, device: torch.device
    ) -> None:
        self.words = words
        self.counts = [len(some) for some in places]
        self._words_at: defaultdict[int, list[int]] = defaultdict(list)  # several may end in one token
        for word, some in enumerate(places):
            for place in some:
                self._words_at[place].append(word)
        self._sums = torch.zeros(len(words) + 1, layers, neurons, device=device)  # the last is of all tokens
        self._tokens = 0

    def add(self, first: int, fired: Tensor) -> None:
        """Adds what tokens from position `first` on fired, [layers, T, neurons]."""
        self._tokens += fired.shape[1]
        if len(self.words) == 1:
            self._sums[-1] += fired.sum(dim=1)
        for at in range(fired.shape[1]):
            for word in self._words_at.get(first + at, ()):
                self._sums[word] += fired[:, at]

    def telling(self) -> list[list[Telling]]:
        """For each word the neurons that tell it from the others best: those whose mean activation on it is furthest
        above the largest mean on another word."""
        means = self._sums / torch.tensor([*self.counts, max(1, self._tokens)], device=self._sums.device)[:, None, None]
        found = []
        for word in range(len(self.words)):
            rest = [other for other in range(len(self.words)) if other != word] or [-1]
            found.append(_furthest(means[word], means[rest].amax(dim=0)))
        return found


def _furthest(means: Tensor, others: Tensor) -> list[Telling]:
    """The neurons whose `means` [layers, neurons] are furthest above those of `others`."""
    margins = (means - others).flatten()
    best = margins.topk(min(SHOWN, len(margins)))
    found = []
    for at in best.indices[best.values > 0].tolist():
        layer, neuron = divmod(at, means.shape[1])
        found.append(Telling(layer, neuron, means[layer, neuron].item(), others[layer, neuron].item()))
    return found
