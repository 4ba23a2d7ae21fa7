"""What has come of a choice, from which another endpoint like the first goes on.

A token is determined by the weights, the prompt, the tokens before it and the seed. So another server with the same
model goes on behind the prompt and the tokens so far. It is given a few tokens less than there are, and has to generate
these again: that shows whether it goes on as the first would have. It would not where a token has a part of a
character, and the next one the rest. Then it generates all again, and that is compared, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO

from bdh_batch.upstreams.protocol import Fault, FaultKind, Piece, TextRequest

OVERLAP = 4  # tokens with text that are generated again
# With other fields, tokens that are part of the prompt are not what generated ones are: then all is generated again.
CONTINUABLE = frozenset(
    (
        *("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "logit_bias"),
        *("ignore_eos", "stop_token_ids", "allowed_token_ids", "skip_special_tokens", "priority", "cache_salt"),
        "add_special_tokens",  # nothing that is done to token ids
    )
)


class Continuation:
    """Records the pieces of a choice, and makes the request with which another endpoint goes on.

    Its text, and how many of its tokens are new, are those of what the client has not had yet.
    """

    def __init__(self, request: TextRequest) -> None:
        self._request = request
        self._sent = StringIO()  # what the client has, or is to have
        self._length = 0  # characters that the present endpoint has come to
        self._tokens: list[int] = []
        self._marks: deque[tuple[int, int]] = deque(maxlen=OVERLAP + 1)  # tokens and characters, where both go together
        self._whole = True  # whether all text came with its tokens
        self._extras = False
        self._most = 0  # tokens that were counted
        self._continues = True  # whether another endpoint is given tokens
        self._expected = ""  # the part of it that has to come again
        prompt = request.prompt
        self._prompt: Sequence[int] | None = None if prompt is None or isinstance(prompt, str) else prompt

    @property
    def lacks_prompt(self) -> bool:
        """Whether the prompt's token ids would spare computing all again."""
        return self._prompt is None and bool(self._marks)

    def know_prompt(self, ids: Sequence[int] | None) -> None:
        self._prompt = ids

    @property
    def prompt_tokens(self) -> int | None:
        """The length of the prompt, if its token ids are known: an endpoint that goes on has had a longer one."""
        return None if self._prompt is None else len(self._prompt)

    @property
    def request(self) -> TextRequest:
        """The request as the first endpoint got it."""
        return self._request

    @property
    def possible(self) -> bool:
        """Whether another endpoint can go on: what upstreams send beside text cannot be compared."""
        return not self._extras

    def take(self, piece: Piece) -> Piece:
        """Records a piece, and returns what is new of it.

        Raises:
            Fault: it is not what the endpoint before has sent.
        """
        if piece.prompt_ids is not None and self._prompt is None:
            self._prompt = piece.prompt_ids
        self._extras = self._extras or piece.extras is not None
        self._length += len(piece.text)
        self._tokens += piece.tokens
        self._whole = self._whole and bool(piece.tokens or not piece.text)
        if piece.text[-1:].isascii() and piece.text and self._whole:  # mostly, no part of a character is held back
            self._marks.append((len(self._tokens), self._length))
        return self._new(piece)

    def start_over(self) -> bool:
        """Has the next request generate all again. Returns whether that is something new: the last one did not."""
        before, self._continues = self._continues, False
        return before

    def next_request(self) -> TextRequest:
        """Returns the request for another endpoint, from which this record goes on."""
        tokens, characters = self._marks[0] if self._marks and self._can_continue() else (0, 0)
        del self._tokens[tokens:]
        self._length = characters
        self._expected = self._sent.getvalue()[characters:]
        self._marks.clear()
        self._whole = True
        if not tokens:
            return self._request
        assert self._prompt is not None
        self._marks.append((tokens, characters))
        fields = {**self._request.fields, "max_tokens": self._request.fields["max_tokens"] - tokens}
        return replace(self._request, prompt=[*self._prompt, *self._tokens], messages=None, fields=fields)

    def _new(self, piece: Piece) -> Piece:
        begin = min(len(self._expected), len(piece.text))
        if not self._expected.startswith(piece.text[:begin]):
            raise Fault(FaultKind.DIFFERS)
        self._expected = self._expected[begin:]
        if self._expected and piece.finish_reason is not None:
            raise Fault(FaultKind.DIFFERS)
        count = piece.count
        if piece.tokens:
            count = max(0, len(self._tokens) - self._most)
            self._most = max(self._most, len(self._tokens))
        text = piece.text[begin:]
        self._sent.write(text)
        return replace(piece, text=text, count=count)

    def _can_continue(self) -> bool:
        fields = self._request.fields
        within = (
            self._continues and isinstance(fields.get("max_tokens"), int) and self._marks[0][0] < fields["max_tokens"]
        )
        return within and self._prompt is not None and self._whole and CONTINUABLE.issuperset(fields)
