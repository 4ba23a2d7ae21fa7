"""A sandbox without a process: jobs run where they are asked for, and nothing bounds them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from bdh_batch.text import probation, template
from bdh_batch.text.chat import ChatTemplate, TemplateSource
from bdh_batch.text.grammar import Grammars
from bdh_batch.text.sandbox_process import Prepared
from bdh_batch.text.vocabulary import Vocabulary

T = TypeVar("T")


class Inline:
    def __init__(self, prepared: Prepared) -> None:
        self._work = prepared.work

    async def run(self, job: bytes, tenant: str, then: Callable[[bytes], Awaitable[T]]) -> T:
        return await then(self._work(job))


def inline_template(source: TemplateSource) -> ChatTemplate:
    prepared = template.prepare(source.setup)
    return ChatTemplate(source, Inline(prepared), prepared.ready)


def inline_grammars(vocabulary: Vocabulary, most_bytes: int = 2**16, small: int = 4096) -> Grammars:
    return Grammars(vocabulary, Inline(Prepared(probation.work_for(vocabulary))), most_bytes, small=small)
