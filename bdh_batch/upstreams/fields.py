"""Which fields of a request an upstream is given.

What it cannot express is refused by name, or left out where the settings say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from bdh_batch.errors import UnsupportedParameter

HERE = frozenset(("model", "stream", "stream_options", "n", "best_of", "max_tool_calls"))  # what is done on this side
STOPS = frozenset(("stop", "include_stop_str_in_output"))
UNRELAYED = frozenset(("return_token_ids", "prompt_logprobs"))  # what they ask for is not passed back
# Where an upstream cannot express a field, the values with which it asks for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "ignore_eos": (False,),
    "latent_steps": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "priority": (0,),
    "reasoning_effort": ("none",),
    "prompt_logprobs": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_k": (0, -1),
    "top_logprobs": (0,),
    "top_p": (1,),
    "update_latent_memory": (True,),
}
# Fields that others stand for.
OTHER_NAMES = {"max_completion_tokens": "max_tokens"}


def passed_on(
    upstream: str,
    fields: Mapping[str, Any],
    expressed: Collection[str] | None,
    drop: Collection[str],
    cuts_here: bool,
) -> dict[str, Any]:
    """Returns the fields that the upstream is given.

    Args:
        expressed: those that it can be given; None is all.
        drop: those that are left out where it cannot.
        cuts_here: whether texts are cut at stop strings on this side.

    Raises:
        UnsupportedParameter: one of the others asks for something.
    """
    passed = {}
    done_here = HERE | STOPS if cuts_here else HERE
    for given, value in fields.items():
        name = given if expressed is None or given in expressed else OTHER_NAMES.get(given, given)
        if name in done_here or _asks_for_nothing(given, value, name, expressed):
            continue
        if expressed is None and given in drop:
            continue  # the upstream takes fields in general, and not this one
        if name not in UNRELAYED and (expressed is None or name in expressed):
            passed[name] = value
        elif given not in drop:
            text = f"{given} is not supported by this model's upstream, {upstream!r} (upstreams.drop can leave it out)."
            raise UnsupportedParameter(text, given)
    return passed


def _asks_for_nothing(given: str, value: object, name: str, expressed: Collection[str] | None) -> bool:
    if name not in UNRELAYED and (expressed is None or name in expressed):
        return False
    if given == "tool_choice" and value == "auto":
        return True  # it goes with tools, which are refused by themselves
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL.get(given, ()))
