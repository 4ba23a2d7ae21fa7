"""Writes the tables of the pages from what the program itself says: options, parameters, endpoints, statuses.

    python -m docs.tables      # rewrites every table between its two markers, in docs/

A table stands between `<!-- table: KIND NAME… -->` and `<!-- end of table -->`. A test holds the pages to this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import (
    chat_completion_stream_options_param,
    completion_create_params as chat_create_params,
)
from openai.types.responses import input_token_count_params, response_create_params
from pydantic import BaseModel

from bdh_batch import settings
from bdh_batch.http.anthropic.bodies import CountTokensBody, MessagesBody
from bdh_batch.http.docs.field_help import DEFAULTS as KNOWN, help_of
from bdh_batch.http.docs.openapi import openapi
from bdh_batch.http.request.sizes import MARK
from bdh_batch.http.request.strict import Wire
from bdh_batch.http.responses_api.bodies import InputTokensBody, ResponseBody
from bdh_batch.http.schema.requests import ChatBody, CompletionBody, StreamOptions
from bdh_batch.http.schema.text import DetokenizeBody, EmbeddingBody, TokenizeChat, TokenizeText
from bdh_batch.http.tensors.outputs import OUTPUTS
from bdh_batch.upstreams.config import GradioUpstream, HtmlSections, KServeUpstream, OpenAIUpstream, Upstream

FOLDER = Path(__file__).parent
TABLE = re.compile(r"(<!-- table: ([^\n]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Schema = Mapping[str, Any]
Rows = Iterator[Sequence[str]]
# What the entries of a list may have; those of one kind of upstream have what all have, too.
ENTRIES: Mapping[str, type[BaseModel]] = {
    "models": settings.ModelEntry,
    "upstreams": Upstream,
    "kserve": KServeUpstream,
    "openai": OpenAIUpstream,
    "gradio": GradioUpstream,
    "gradio.html": HtmlSections,
}
OPTION = re.compile(r"\b([a-z]+\.[a-z_]+)\b")  # as in an entry's help

BODIES: dict[str, type[Wire]] = {
    body.__name__: body
    for body in (
        *(CompletionBody, ChatBody, StreamOptions, EmbeddingBody, TokenizeText, TokenizeChat, DetokenizeBody),
        *(MessagesBody, CountTokensBody, ResponseBody, InputTokensBody),
    )
}
# The parameters that the API itself has, by body; of the others, all but OURS are vLLM's.
OPENAI: dict[str, set[str]] = {
    "CompletionBody": set(completion_create_params.CompletionCreateParamsStreaming.__annotations__)
    | set(completion_create_params.CompletionCreateParamsBase.__annotations__),
    "ChatBody": set(chat_create_params.CompletionCreateParamsStreaming.__annotations__)
    | set(chat_create_params.CompletionCreateParamsBase.__annotations__),
    "StreamOptions": set(chat_completion_stream_options_param.ChatCompletionStreamOptionsParam.__annotations__),
    "EmbeddingBody": set(embedding_create_params.EmbeddingCreateParams.__annotations__),
    "ResponseBody": set(response_create_params.ResponseCreateParamsStreaming.__annotations__)
    | set(response_create_params.ResponseCreateParamsBase.__annotations__),
    "InputTokensBody": set(input_token_count_params.InputTokenCountParams.__annotations__),
}
OURS = {"chunk_tokens", "latent_steps", "neurons", "state", "update_latent_memory"}
ENDPOINTS = {
    "CompletionBody": "completions",
    "ChatBody": "chat completions",
    "MessagesBody": "messages",
    "CountTokensBody": "token counts",
    "ResponseBody": "responses",
    "InputTokensBody": "input token counts",
}

DEFAULTS: dict[str, str] = {
    **{name: "`true`" if value is True else f"{value:g}" for name, value in KNOWN.items()},
    "add_generation_prompt": "`true`",
    "best_of": "`n`",
    "ChatBody.add_special_tokens": "as the template",
    "TokenizeChat.add_special_tokens": "as the template",
    "add_special_tokens": "`true`",
    "chunk_tokens": "1",
    "dimensions": "the model's width",
    "encoding_format": '`"float"`',
    "latent_steps": "the folder's, or 0",
    "ChatBody.logprobs": "`false`",
    "max_completion_tokens": "`max_tokens`",
    "model": "the served model",
    "parallel_tool_calls": "`true`",
    "ResponseBody.store": "`true`",
    "seed": "random",
    "tool_choice": '`"auto"` with `tools`',
    "top_logprobs": "0",
}
SIZES = ("_bytes", "_memory")  # how the names of options end that are sizes
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
WIDE = 2**53  # larger bounds are shown as powers of two


def rewritten(page: str) -> str:
    """The page with its tables as they should be."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(*found[2].split())}\n\n{found[3]}", page)


def table(kind: str, *names: str) -> str:
    head, *rows = KINDS[kind](*names)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def options(section: str) -> Rows:
    """Every option of a section."""
    schema = settings.Settings.model_json_schema()
    properties = _resolved(schema["properties"][section], schema)["properties"]
    yield "option", "type", "range", "default", "meaning"
    for option, (default, meaning) in settings.options().items():
        name, _, key = option.rpartition(".")
        if name == section:
            kind, bounds = _kind_and_range(key, properties[key], schema)
            yield f"`{key}`", kind, bounds, f"`{_default(key, default)}`", _escaped(meaning)


def entry(name: str) -> Rows:
    """Every option of an entry of a list of that name."""
    common = Upstream.model_fields if issubclass(ENTRIES[name], Upstream) and name != "upstreams" else {}
    fields = {key: field for key, field in ENTRIES[name].model_fields.items() if key not in common}
    schema = ENTRIES[name].model_json_schema()
    yield "option", "type", "range", "default", "meaning"
    for key, field in fields.items():
        kind, bounds = _kind_and_range(key, schema["properties"][key], schema)
        meaning = field.description or ""
        elsewhere = meaning.startswith("As ")  # then the default is that of the option there
        given = f"`{_default(key, field.get_default(call_default_factory=True))}`"
        default = "required" if field.is_required() else "as there" if elsewhere else given
        yield f"`{key}`", kind, bounds, default, OPTION.sub(r"`\1`", meaning)


def _kind_and_range(key: str, known: Schema, schema: Schema) -> tuple[str, str]:
    kind = "size" if key.endswith(SIZES) else _kind(known, schema)
    return kind, "" if kind == "size" else _range(known, schema)


def parameters(body: str) -> Rows:
    """Every parameter of a request's body that the server has."""
    schema = BODIES[body].model_json_schema()
    required, known_names = schema.get("required", ()), BODIES[body].names
    yield "parameter", "type", "range", "default", "same as", "meaning"
    for name in sorted(known_names, key=lambda name: (name not in required, name)):
        known = schema["properties"][name]
        default = "required" if name in required else _absent(body, name, _kind(known, schema))
        meaning = known.get("description") or help_of(body, name)
        yield f"`{name}`", _kind(known, schema), _range(known, schema), default, _origin(body, name), meaning


def refused(*bodies: str) -> Rows:
    """Parameters of the API that a body does not have, with the values that ask for nothing."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for body in bodies:
        for name, neutral in BODIES[body].unsupported.items():
            of, values = found.setdefault(name, ([], []))
            of.append(ENDPOINTS[body])
            values += [text for value in neutral if (text := f"`{json.dumps(value)}`") not in values]
    yield "parameter", "of", "accepted only as"
    for name, (of, values) in sorted(found.items()):
        yield f"`{name}`", " and ".join(of), ", ".join(["`null`", *values])


def endpoints() -> Rows:
    """Those that do the same share a line."""
    found: dict[str, list[str]] = {}
    for path, methods in openapi(settings.Settings())["paths"].items():
        for method, operation in methods.items():
            found.setdefault(operation["summary"], []).append(f"`{method.upper()} {path}`")
    yield "endpoint", "what it does"
    yield from ((", ".join(paths), summary) for summary, paths in found.items())
    yield "`GET /openapi.json`, `GET /docs`", "This API, for programs and for people"
    yield "`GET /ui`", "[The page](ui.md)"


def outputs() -> Rows:
    """The output tensors of KServe's protocol."""
    yield "output", "datatype", "shape", "of", "meaning"
    for name, output in OUTPUTS.items():
        of = "both" if output.whole and output.streamed else "streams" if output.streamed else "whole responses"
        needs = f" Needs the parameter `{output.parameter}`." if output.parameter else ""
        last = " In a stream, in the last response." if output.last else ""
        yield f"`{name}`", output.datatype, f"`{list(output.shape)}`", of, f"{output.help}{needs}{last}"


def statuses() -> Rows:
    yield "status", "when"
    for status, response in openapi(settings.Settings())["components"]["responses"].items():
        if status.isdecimal():
            yield status, response["description"]


KINDS: dict[str, Callable[..., Rows]] = {
    "options": options,
    "entry": entry,
    "request": parameters,
    "refused": refused,
    "endpoints": endpoints,
    "outputs": outputs,
    "statuses": statuses,
}


def _origin(body: str, name: str) -> str:
    if issubclass(BODIES[body], CountTokensBody):
        return "Anthropic"
    if name in OPENAI.get(body, ()):
        return "OpenAI"
    if body == "CompletionBody" and name in OPENAI["ChatBody"]:
        return "OpenAI's chat"
    return "ours" if name in OURS else "vLLM"


def _absent(body: str, name: str, kind: str) -> str:
    """What a parameter is where a request does not have it."""
    known = DEFAULTS.get(f"{body}.{name}") or DEFAULTS.get(name)
    return known or ("`false`" if kind == "boolean" else "none")


def _default(key: str, value: object) -> str:
    if isinstance(value, int) and key.endswith(SIZES):
        return _size(value)
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=1000).split("\n")[0]


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str | list | dict) else str(value)


def _size(value: int) -> str:
    for name, unit in UNITS:
        if value % unit == 0:
            return f"{value // unit} {name}"
    return f"{value} bytes"


def _escaped(text: str) -> str:
    """A `*` of an option's help is a star."""
    return text.replace("*", r"\*").replace("<", r"\<")


def _kinds(schema: Schema, root: Schema) -> Iterator[Schema]:
    """What a value may be, without null."""
    schema = _resolved(schema, root)
    if "type" not in schema and "anyOf" in schema:
        for kind in schema["anyOf"]:
            yield from _kinds(kind, root)
    elif schema.get("type") != "null":
        yield schema


def _resolved(schema: Schema, root: Schema) -> Schema:
    while "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        schema = root["$defs"][name]
    return schema


def _kind(schema: Schema, root: Schema) -> str:
    return " or ".join(dict.fromkeys(_named(kind, root) for kind in _kinds(schema, root)))


def _named(schema: Schema, root: Schema) -> str:
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return " or ".join(f"`{value}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'], root)}" if "items" in schema else "list"
    return str(schema.get("type", "any JSON"))


def _range(schema: Schema, root: Schema) -> str:
    return "; ".join(dict.fromkeys(filter(None, (_bounds(kind) for kind in _kinds(schema, root)))))


def _bounds(schema: Schema) -> str:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if limit := schema.get(MARK):
        return f"at most `limits.{limit}`" if least is None else f"{_number(least)} to `limits.{limit}`"
    if least is not None and most is not None:
        return f"{_number(least)} to {_number(most)}"
    parts = [
        *([f"at least {_number(least)}"] if least is not None else ()),
        *([f"above {_number(above)}"] if above is not None else ()),
        *([f"at most {_number(most)}"] if most is not None else ()),
        *([f"below {_number(below)}"] if below is not None else ()),
    ]
    return ", ".join(parts)


def _number(value: float) -> str:
    if abs(value) < WIDE:
        return f"{value:g}" if isinstance(value, float) else str(value)
    whole = int(value)
    sign, power = "-" if whole < 0 else "", abs(whole).bit_length()
    return f"{sign}2^{power - 1}" if abs(whole) == 2 ** (power - 1) else f"{sign}2^{power}-1"


def main() -> None:
    for page in sorted(FOLDER.glob("*.md")):
        text = page.read_text("utf-8")
        if (new := rewritten(text)) != text:
            page.write_text(new, "utf-8")
            print(f"{page.name}: tables are rewritten")


if __name__ == "__main__":
    main()
