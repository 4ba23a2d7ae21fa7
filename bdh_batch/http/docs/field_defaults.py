"""What fields of generation requests stand for where they are left out, for the OpenAPI document."""

from __future__ import annotations

from bdh_batch.http.schema.requests import Defaults
from bdh_batch.messages import SamplingParams
from bdh_batch.settings import Generation

BODIES = ("CompletionBody", "ChatBody", "ResponseBody", "MessagesBody")
SERVED = ("max_tokens", "temperature", "top_p", "top_k")  # which the settings, or a model's folder, may set
_SERVED, _DRAWN = Defaults(), SamplingParams()
DEFAULTS: dict[str, float | bool] = {
    **{name: getattr(_SERVED, name) for name in SERVED},
    **{
        name: getattr(_DRAWN, name) for name in ("frequency_penalty", "min_p", "presence_penalty", "repetition_penalty")
    },
    **{"min_tokens": 0, "n": 1, "priority": 0},
    **{"skip_special_tokens": True, "update_latent_memory": True},
}


def defaults(generation: Generation) -> dict[str, float | bool]:
    """By the names of fields. Of those of `SERVED`, a folder's generation_config.json may say others."""
    return DEFAULTS | generation.model_dump(include=set(SERVED), exclude_none=True)
