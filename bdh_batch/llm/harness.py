"""EleutherAI's evaluation harness (`lm_eval`), which is not a dependency, with a model in the same process:

import lm_eval
from bdh_batch import LLM
from bdh_batch.llm.harness import HarnessLM

with LLM("path/to/folder") as llm:
    lm_eval.simple_evaluate(HarnessLM(llm), tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lm_eval.api.model import LM

from bdh_batch.errors import InvalidRequest
from bdh_batch.llm.llm import LLM
from bdh_batch.llm.params import SamplingParams

MOST_TOKENS = 256  # of a completion whose task does not say
OTHER_NAMES = {"until": "stop", "max_gen_toks": "max_tokens", "max_new_tokens": "max_tokens"}


class HarnessLM(LM):  # type: ignore[misc]
    """A model as the harness asks for it."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self._llm = llm

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [_split(*request.args) for request in requests]
        scored = self._llm.score(pairs, use_tqdm=not disable_tqdm)
        return [(each.outputs.score, each.outputs.is_greedy) for each in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        return [each.outputs.score for each in self._llm.score(texts, use_tqdm=not disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [request.args[0] for request in requests]
        params = [sampling_of(request.args[1]) for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        return [each.outputs[0].text for each in outputs]


def sampling_of(given: Mapping[str, Any]) -> SamplingParams:
    """A task's `generation_kwargs`. Raises InvalidRequest: one has no meaning here."""
    kwargs = {OTHER_NAMES.get(name, name): value for name, value in given.items() if name != "do_sample"}
    known = {each.name for each in fields(SamplingParams)}
    if unknown := kwargs.keys() - known:
        name = sorted(unknown)[0]
        raise InvalidRequest(f"generation_kwargs.{name}: is not known here.", f"generation_kwargs.{name}")
    kwargs.setdefault("max_tokens", MOST_TOKENS)
    if not given.get("do_sample", given.get("temperature")):
        kwargs["temperature"] = 0.0
    return SamplingParams(**kwargs)


def _split(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of a context belongs to what follows, as in the harness's own models."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
