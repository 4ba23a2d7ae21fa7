"""Turns a checked body into the request that a backend gets: template, grammar, tokens. It does so here, and once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from bdh_batch.backends.base import Backend, RawPrompt, TextBackend
from bdh_batch.errors import InvalidRequest, UnsupportedParameter
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.client import Client, unless_left
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.schema.chat import ConversationBody
from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.http.schema.text import EmbeddingBody, EmbeddingChat
from bdh_batch.http.states.records import Beginning
from bdh_batch.messages import GenerationRequest, Grammar, Origin, Prompt, Text, Written
from bdh_batch.store.records import Store
from bdh_batch.text.sources import Source

# Fields of a chat that are done with once its template has made a prompt.
OF_TEMPLATES = frozenset(("add_generation_prompt", "continue_final_message", "chat_template_kwargs"))
TOKENS_IN_A_MICROSECOND = 50  # that are copied, about


class Tokens(Protocol):
    """Tokenizes the text of a conversation, of which it may know a part."""

    async def tokenized(self, backend: Backend, text: Text, last: int | None) -> list[Prompt]:
        """As `Backend.tokenized`."""

    def begin(self, begun: Beginning, tokens: Sequence[int]) -> None:
        """Is told that they come after those of a state, and so of all `tokens` of the prompt."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """Makes one client's request complete.

    Args:
        size: bytes of its body.
        aside: where that is worked on if it is large.
        records: where states are that requests begin in.
        most_values: token ids that a request may have; see `limits.max_values`.

    Its methods raise:
        InvalidRequest: it cannot be served.
        NotFound, StoreFailed: the state that it begins in is not there, or cannot be read.
        QueueFull, Unavailable: too many templates or grammars are worked on.
        ClientDisconnect: the client has gone.
    """

    client: Client
    model: ServedModel
    size: int
    aside: Aside
    records: Store
    most_values: int

    async def generation(self, body: CompletionBody | ChatBody, tokens: Tokens | None = None) -> GenerationRequest:
        """
        Args:
            tokens: knows those of the conversation's text, perhaps in part.
        """
        model, origin = self.model, self.client.origin()
        await self.aside.run(self.size, body.check, model.defaults)
        if isinstance(model.backend, TextBackend):
            return await self._passed_on(model.backend, origin, body)
        latent = body.latent(model.defaults)
        steps = 0 if latent is None else latent.count
        if body.state is None:
            made = await self._anew(body, tokens, steps)
        else:
            made = await self._going_on(body, body.state, tokens, steps)
        return replace(made, latent=latent)

    async def _anew(self, body: CompletionBody | ChatBody, tokens: Tokens | None, steps: int) -> GenerationRequest:
        model, origin = self.model, self.client.origin()
        prompts = await self._prompts(body)
        grammar = await self._grammar(await self.aside.run(self.size, body.source))
        last = body.last_tokens(model.defaults, self._room(steps))
        tokenized = await self._tokenized(prompts, last, tokens)
        return await self.aside.run(self.size, body.request, origin, tokenized, model.defaults, grammar)

    def _room(self, taken: int) -> int | None:
        """Tokens that the model takes beside so many; None is no limit."""
        most = self.model.max_model_len
        return None if most is None else max(1, most - taken)

    async def _going_on(
        self, body: CompletionBody | ChatBody, state: str, tokens: Tokens | None, steps: int
    ) -> GenerationRequest:
        """As `generation`, of a request that begins in a state: its prompts come after what that has read."""
        model = self.model
        begun = await Beginning.of(self.records, self.client, model, state)
        prompts = await self._prompts(body)
        if not body.add_special_tokens:  # what belongs at the beginning of a text is there already
            prompts = [
                (param, replace(each, add_special=False) if isinstance(each, Text) else each) for param, each in prompts
            ]
        grammar = await self._grammar(await self.aside.run(self.size, body.source))
        known = len(begun.tokens)
        last = body.last_tokens(model.defaults, self._room(known + steps))
        tokenized = await self._tokenized(prompts, last, tokens)
        cost = max(self.size, known * len(tokenized) // TOKENS_IN_A_MICROSECOND)
        whole = await self.aside.run(cost, begun.before, tokenized, self.most_values)
        if tokens is not None:
            tokens.begin(begun, whole[0].tokens)
        request = await self.aside.run(self.size, body.request, self.client.origin(), whole, model.defaults, grammar)
        # It is of the model's layout: a file that cannot be read all the same is damaged, and only the time tells.
        return replace(request, state=begun.state, state_optional=True, salt=begun.salt + request.salt)

    async def _passed_on(
        self, backend: TextBackend, origin: Origin, body: CompletionBody | ChatBody
    ) -> GenerationRequest:
        """As `generation`, of a request for an upstream: what is passed on is what the client wrote."""
        if body.state is not None:
            raise UnsupportedParameter("state: This model is an upstream's, which has no states here.", "state")
        if body.neurons is not None:
            raise UnsupportedParameter("neurons: This model is an upstream's, which does not show them.", "neurons")
        fields = dict(await self.aside.run(self.size, getattr, body, "written"))
        messages, given = fields.pop("messages", None), fields.pop("prompt", None)
        if isinstance(body, ChatBody) and not backend.takes_messages:
            rendered = await self.rendered(body)
            messages, given = None, rendered.text
            fields = {name: value for name, value in fields.items() if name not in OF_TEMPLATES}
            if not rendered.add_special:
                fields["add_special_tokens"] = False
        prompts = [] if given is None else body.prompt if isinstance(body, CompletionBody) else [given]
        came = self.client.headers
        headers = {name: came[name] for name in backend.pass_headers if name in came}
        written = Written(prompts, messages, fields, headers)
        written, counted = await backend.accept(written, "messages" if isinstance(body, ChatBody) else "prompt")
        request = await self.aside.run(self.size, body.request, origin, counted, self.model.defaults, None)
        return replace(request, written=written)

    async def embedding(self, body: EmbeddingBody | EmbeddingChat) -> GenerationRequest:
        model, origin = self.model, self.client.origin()
        if isinstance(model.backend, TextBackend):
            raise InvalidRequest("This model is an upstream's, which only generates texts.", "model")
        body.check_dimensions(model.width)
        prompts = await self._prompts(body)
        last = body.last_tokens(model.max_model_len)
        return body.request(origin, await model.backend.tokenized(prompts, last))

    async def rendered(self, body: ConversationBody) -> Text:
        """The prompt that the template makes of a conversation."""
        conversation = await self.aside.run(self.size, body.conversation)
        return await unless_left(self.client, self.model.template.render(conversation, self.aside.tenant))

    async def _tokenized(self, prompts: Sequence[RawPrompt], last: int | None, tokens: Tokens | None) -> list[Prompt]:
        text = prompts[0][1]
        if tokens is not None and isinstance(text, Text):
            return await tokens.tokenized(self.model.backend, text, last)
        return await self.model.backend.tokenized(prompts, last)

    async def _prompts(self, body: ConversationBody | CompletionBody | EmbeddingBody) -> Sequence[RawPrompt]:
        if isinstance(body, ConversationBody):
            return [("messages", await self.rendered(body))]
        return await self.aside.run(self.size, body.prompts)

    async def _grammar(self, source: Source | None) -> Grammar | None:
        if source is None:
            return None
        return await unless_left(self.client, self.model.grammars.compile(source, self.aside.tenant))
