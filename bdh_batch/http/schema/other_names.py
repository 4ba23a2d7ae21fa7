"""The fields of requests that other APIs and servers have: those that are not built; and those that have other
names, of which an error says what they are called here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bdh_batch.errors import BDHError, InvalidRequest
from bdh_batch.http.request.strict import Neutral

Patterns = Sequence[tuple[re.Pattern[str], str]]
MESSAGE = re.compile(r"^messages\[(\d+)\]")

# Known to OpenAI's API or to other servers', and not built: the values besides null that ask for nothing.
GENERATION: Neutral = {
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options", "prompt_cache_options"), ()),
    **dict.fromkeys(("chat_template", "guided_whitespace_pattern"), ()),
    "cache_prompt": (True,),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_decoding_backend": ("auto", "guidance", "lm-format-enforcer", "outlines", "xgrammar"),
    "include_reasoning": (True, False),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "num_beams": (1,),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "repeat_penalty": (1,),
    "safe_prompt": (False,),
    "service_tier": ("auto", "default", "flex"),
    "spaces_between_special_tokens": (True, False),
    "suffix": ("",),
    "tfs_z": (1,),
    "top_a": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
}
# Of these an upstream is given none: what they ask for would not be passed back.
UNRELAYED = {
    *("audio", "detokenize", "function_call", "functions", "kv_transfer_params", "logits_processors", "modalities"),
    *("moderation", "web_search_options"),
}
TOOLS: Neutral = {"tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False)}
COMPLETION: Neutral = {**GENERATION, **TOOLS, "top_logprobs": (0,)}
CHAT: Neutral = {**GENERATION, "best_of": (1,)}
STREAM_OPTIONS: Neutral = {"include_obfuscation": (False,)}

_NAMES = {
    "bad_words_ids": "bad_words, with texts",
    "beam_width": "best_of",
    "cache_prompt": "the server's option prefix_cache.enabled",
    "details": "logprobs",
    "do_sample": "temperature, where 0 always takes the likeliest token",
    "ebnf": "structured_outputs.grammar",
    "format": "response_format",
    "grammar": "structured_outputs.grammar",
    "inputs": "prompt, and for embeddings input",
    "instructions": "a message with the role system",
    "json_schema": "response_format",
    "max_context_length": "the server's option model.max_model_len",
    "max_gen_len": "max_tokens",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_tokens_to_sample": "max_tokens",
    "min_length": "min_tokens",
    "min_new_tokens": "min_tokens",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "num_beams": "best_of",
    "num_ctx": "the server's option model.max_model_len",
    "num_generations": "n",
    "num_predict": "max_tokens",
    "num_return_sequences": "n",
    "prompt_token_ids": "prompt, which takes token ids",
    "random_seed": "seed",
    "regex": "structured_outputs.regex",
    "rep_pen": "repetition_penalty",
    "repeat_penalty": "repetition_penalty",
    "return_logprob": "logprobs",
    "sampling_seed": "seed",
    "stop_sequences": "stop",
    "system": "a message with the role system",
    "top_logprobs_num": "top_logprobs",
    "top_n_tokens": "top_logprobs",
    "truncate": "truncate_prompt_tokens",
}
_NOTHING_LIKE_IT = frozenset(
    (
        *("dry_multiplier", "dynatemp_range", "mirostat", "mirostat_eta", "mirostat_tau", "penalty_alpha", "tfs_z"),
        *("top_a", "typical", "typical_p", "xtc_probability", "xtc_threshold"),
    )
)
_HINTS = {
    **{name: f"Here that is {meant}." for name, meant in _NAMES.items()},
    **dict.fromkeys(_NOTHING_LIKE_IT, "Here there are temperature, top_k, top_p, min_p and the penalties."),
    "extra_body": "What is in it belongs beside the other parameters.",
    "options": "What is in it belongs beside the other parameters, under the names that OpenAI has for it.",
    "parameters": "What is in it belongs beside the other parameters, under the names that OpenAI has for it.",
    "sampling_params": "What is in it belongs beside the other parameters.",
}


def hint(name: str) -> str:
    """What to use instead of a parameter of that name; empty where nothing is known of it."""
    return _HINTS.get(name, "")


@dataclass(frozen=True)
class Names:
    """The client's names of what a chat body has.

    Args:
        origins: the field that each message of the chat comes from.
        patterns: of other fields, with what they come from.
    """

    origins: Sequence[str]
    patterns: Patterns = ()

    def of(self, error: BDHError) -> BDHError:
        """Returns the error about a field of the chat body as one about the client's."""
        if not isinstance(error, InvalidRequest) or error.param is None:
            return error
        name = self.field(error.param)
        text = error.message
        if text.startswith(error.param):
            text = name + text.removeprefix(error.param)
        return type(error)(text, name, error.code)

    def field(self, param: str) -> str:
        """What the client calls a field of the chat body."""
        if (found := MESSAGE.match(param)) and int(found[1]) < len(self.origins):
            return self.origins[int(found[1])]
        for pattern, name in self.patterns:
            if pattern.match(param):
                return pattern.sub(name, param)
        return param

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Errors about fields of the chat body are about the client's."""
        try:
            yield
        except InvalidRequest as error:
            raise self.of(error) from error
