"""Turns a checked body into the request that a backend gets: template, grammar, tokens. It does so here, and once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bdh_batch.backends.base import RawPrompt
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.client import Client, unless_left
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.schema.chat import ConversationBody
from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.http.schema.text import EmbeddingBody, EmbeddingChat
from bdh_batch.messages import GenerationRequest, Grammar, Text
from bdh_batch.text.sources import Source


@dataclass(frozen=True, slots=True)
class Preparation:
    """Makes one client's request complete.

    Args:
        size: bytes of its body.
        aside: where that is worked on if it is large.

    Its methods raise:
        InvalidRequest: it cannot be served.
        QueueFull, Unavailable: too many templates or grammars are worked on.
        ClientDisconnect: the client has gone.
    """

    client: Client
    model: ServedModel
    size: int
    aside: Aside

    async def generation(self, body: CompletionBody | ChatBody) -> GenerationRequest:
        model, origin = self.model, self.client.origin()
        await self.aside.run(self.size, body.check, model.defaults)
        prompts = await self._prompts(body)
        grammar = await self._grammar(await self.aside.run(self.size, body.source))
        last = body.last_tokens(model.defaults, model.max_model_len)
        tokenized = await model.backend.tokenized(prompts, last)
        return await self.aside.run(self.size, body.request, origin, tokenized, model.defaults, grammar)

    async def embedding(self, body: EmbeddingBody | EmbeddingChat) -> GenerationRequest:
        model, origin = self.model, self.client.origin()
        body.check_dimensions(model.width)
        prompts = await self._prompts(body)
        last = body.last_tokens(model.max_model_len)
        return body.request(origin, await model.backend.tokenized(prompts, last))

    async def rendered(self, body: ConversationBody) -> Text:
        """The prompt that the template makes of a conversation."""
        conversation = await self.aside.run(self.size, body.conversation)
        return await unless_left(self.client, self.model.template.render(conversation, self.aside.tenant))

    async def _prompts(self, body: ConversationBody | CompletionBody | EmbeddingBody) -> Sequence[RawPrompt]:
        if isinstance(body, ConversationBody):
            return [("messages", await self.rendered(body))]
        return await self.aside.run(self.size, body.prompts)

    async def _grammar(self, source: Source | None) -> Grammar | None:
        if source is None:
            return None
        return await unless_left(self.client, self.model.grammars.compile(source, self.aside.tenant))
