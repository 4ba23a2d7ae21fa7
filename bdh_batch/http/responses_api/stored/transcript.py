"""Turns that go on from stored responses with the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bdh_batch.backends.base import Backend
from bdh_batch.errors import InvalidRequest
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses_api.stored.records import Item, Stored
from bdh_batch.http.states.records import Beginning
from bdh_batch.messages import LatentSteps, Prompt, Text, latent_positions
from bdh_batch.messages.state import INVALID
from bdh_batch.text.tokenizer import decode


@dataclass(slots=True)
class Transcript:
    """The text of a conversation and its tokens, as far as they are known: those of a turn are kept for the next one.

    Args:
        model, name: the revision of the model, and what it is called.
        before: the response that it goes on from.
        goes_on: whether the prompt begins with all of that one's tokens.
        begun: how many tokens, of a state, come before those of the text.
        salt: of that state.
        prefix_salt: inside which its prefixes are cached.
        latent: the latent steps between the prompt and what is generated.
    """

    aside: Aside
    model: str
    name: str
    before: Stored | None = None
    goes_on: bool = False
    text: str = ""
    tokens: Sequence[int] = field(default=())
    begun: int = 0
    salt: str = ""
    prefix_salt: str = ""
    latent: LatentSteps | None = None

    @classmethod
    def of(cls, aside: Aside, model: ServedModel, before: Stored | None) -> Transcript:
        """Raises InvalidRequest: the conversation began in a state of another model."""
        if before is not None and before.begun and before.name != model.name:
            text = (
                f"The conversation began in a state of the model {before.name!r}: it cannot go on with {model.name!r}."
            )
            raise InvalidRequest(text, "previous_response_id", INVALID)
        return cls(aside, model.revision, model.name, before)

    def begin(self, begun: Beginning, tokens: Sequence[int]) -> None:
        self.begun, self.salt, self.tokens = len(begun.tokens), begun.salt, tokens

    async def tokenized(self, backend: Backend, text: Text, last: int | None) -> list[Prompt]:
        """The prompt of a text. Where it begins with the text of the response before, its tokens are that one's, as
        they were drawn, and those of the rest."""
        self.text = text.text
        before, size = self.before, len(self.text)
        end = None if before is None else await self.aside.run(size, self._end_of, before)
        if before is not None:
            self.begun, self.salt = before.begun, before.salt
        if before is None or end is None:
            prompts = await self._anew(backend, text, last)
            self.tokens = prompts[0].tokens
            return prompts
        self.goes_on = True
        if end == size:
            prompts = [Prompt(before.tokens, "input", latents=latent_positions(before.tokens))]
        else:
            ends = tuple(each - end for each in text.ends if each > end)
            (rest,) = await backend.tokenized(
                [("input", replace(text, text=text.text[end:], add_special=False, ends=ends))]
            )
            known = len(before.tokens)
            breaks = (known, *(known + at for at in rest.breaks))
            latents = latent_positions(before.tokens)
            prompts = [Prompt([*before.tokens, *rest.tokens], "input", breaks, latents)]
        self.tokens = prompts[0].tokens
        return prompts

    async def _anew(self, backend: Backend, text: Text, last: int | None) -> list[Prompt]:
        """The prompt of a text of which nothing is known, after the state that the conversation began in."""
        if self.before is None or not self.begun:
            return await backend.tokenized([("input", text)], last)
        (new,) = await backend.tokenized([("input", replace(text, add_special=False))])
        breaks = (self.begun, *(self.begun + at for at in new.breaks))
        known = self.before.tokens[: self.begun]
        return [Prompt([*known, *new.tokens], "input", breaks, latent_positions(known))]

    def _end_of(self, before: Stored) -> int | None:
        """Where the text of the response before ends in this one; None where this one does not begin with it."""
        length = before.length
        if length is None or before.model != self.model or length > len(self.text):
            return None
        return None if _digest(self.text[:length]) != before.digest else end_of(before.said, self.text, length)

    def stored(
        self,
        response: dict[str, Any],
        input: Sequence[Item],
        generated: str,
        tokens: Sequence[int],
        backend: Backend,
    ) -> Stored:
        """The response with what the next turn needs.

        Tokens that were generated are those of the text only where they decode to it: not where a stop string or an
        end of text was left out. Then the next turn has those of the prompt.
        """
        if not self.text:
            return Stored(response, input)
        thought = [] if self.latent is None else self.latent.tokens
        said, known = "", [*self.tokens, *thought]
        for drawn in (tokens, tokens[:-1]):  # the last one may be an end of text, which a template writes itself
            if decode(backend.tokenizer, drawn, True)[0] == generated:
                said, known = generated, [*known, *drawn]
                break
        read = len(self.tokens) + len(thought) + len(tokens) - 1  # the last one drawn has been read by nobody
        return Stored(
            *(response, input, len(self.text), _digest(self.text), self.model, min(read, len(known))),
            tokens=known,
            said=said,
            name=self.name,
            begun=self.begun,
            salt=self.salt,
            prefix_salt=self.prefix_salt,
        )


def end_of(said: str, text: str, at: int) -> int | None:
    """Where `said` ends in `text`, in which it begins at `at`; None where it does not.

    Templates trim what was said, or write a space before it: that makes it no other text.
    """
    if text.startswith(said, at):
        return at + len(said)
    bare = said.strip()
    begin = len(text) - len(text[at:].lstrip())
    if not bare or not text.startswith(bare, begin):
        return None
    end, after = begin + len(bare), said[len(said.rstrip()) :]
    return end + len(after) if text.startswith(after, end) else end


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
