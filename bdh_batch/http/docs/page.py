"""The OpenAPI document as a page to read and to try requests from, in the style of the page at /ui. It is one file: it
needs nothing from any other server, and its policy has the browser refuse to load what might slip in.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from bdh_batch.ui.assets import assets

Json = dict[str, Any]

OWN_STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
STYLE = assets()["app.css"].content.decode() + OWN_STYLE
VIEWS = ("talk", "look", "watch")  # of the page at /ui
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "{} characters or more",
    "maxLength": "at most {} characters",
    "minItems": "{} or more",
    "maxItems": "at most {}",
    "maxProperties": "at most {} members",
    "pattern": "as {}",
}


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


POLICY = (
    f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def page(document: Json, has_ui: bool = True) -> bytes:
    """The whole page, as HTML; `has_ui`: whether the server has the page at /ui."""
    info = document["info"]
    return "".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="ui/icon.svg" type="image/svg+xml">' if has_ui else "",
            f"<title>{escape(info['title'])}</title><style>{STYLE}</style>",
            _header(info["title"], has_ui),
            '<main id="main" tabindex="-1"><article>',
            f"<h2>{escape(info['title'])} {escape(info['version'])}</h2>",
            f'<p>{_prose(info["description"])} <a href="openapi.json">openapi.json</a> has all of this for programs.',
            '<p class="row"><label for="key">API key, if one is asked for</label>',
            '<input id="key" type="password" autocomplete="off"><label for="find">Find</label>',
            '<input id="find" class="find" type="search" autocomplete="off" placeholder="completions">',
            *(_tag(tag, document) for tag in document["tags"]),
            '<section><h2 id="types">Types</h2>',
            *(_component(name, schema) for name, schema in sorted(document["components"]["schemas"].items())),
            f"</section></article></main><script>{SCRIPT}</script></html>",
        ]
    ).encode()


def _header(title: str, has_ui: bool) -> str:
    views = "".join(f'<a href="ui#{view}">{view.capitalize()}</a>' for view in VIEWS) if has_ui else ""
    home = f'<a href="ui">{escape(title)}</a>' if has_ui else escape(title)
    return (
        '<a class="skip" href="#main">Skip to content</a>'
        f'<header class="bar"><h1>{home}</h1><nav aria-label="Views">{views}'
        '<a href="docs" aria-current="page">API</a></nav>'
        '<div class="tools"><button type="button" id="theme">Theme: system</button></div></header>'
    )


def _tag(tag: Json, document: Json) -> str:
    described = "".join(
        _operation(path, method, operation, document["components"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if tag["name"] in operation["tags"]
    )
    return f"<section><h2>{escape(tag['name'])}</h2><p>{_prose(tag['description'])}{described}</section>"


def _operation(path: str, method: str, operation: Json, components: Json) -> str:
    parameters = [_resolved(parameter, components) for parameter in operation["parameters"]]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    return "".join(
        [
            f'<details id="{escape(operation["operationId"])}"><summary><b>{method}</b> <code>{escape(path)}</code> ',
            f"{escape(operation['summary'])}</summary><p>{_prose(operation.get('description', ''))}",
            f"<p>Body: {_type(body['schema'])}" if body else "",
            _table((f"{each['name']} ({each['in']})", _type(each["schema"]), each) for each in parameters),
            _responses(operation["responses"], components),
            _form(path, method, parameters, body),
            "</details>",
        ]
    )


def _responses(responses: Json, components: Json) -> str:
    rows, examples = [], ""
    for status, response in responses.items():
        described = _resolved(response, components)
        kinds = [_type(content["schema"]) for content in described.get("content", {}).values()]
        rows.append((status, "<br>or ".join(kinds), described))
        for content in described.get("content", {}).values():
            examples += "".join(_example(name, each["value"]) for name, each in content.get("examples", {}).items())
    return _table(rows) + examples


def _example(name: str, value: object) -> str:
    title = f"<summary>Example of a response: {escape(name)}</summary>"
    return f'<details>{title}<pre tabindex="0">{escape(_indented(value))}</pre></details>'


def _form(path: str, method: str, parameters: list[Json], body: Json | None) -> str:
    """Hidden where no script shows it."""
    examples = {} if body is None else {name: _indented(each["value"]) for name, each in body["examples"].items()}
    in_address = [each for each in parameters if each["in"] in ("path", "query")]
    return "".join(
        [
            f'<form hidden data-path="{escape(path)}" data-method="{method.upper()}">',
            *(
                f'<p><label>{each["name"]} <input name="{each["name"]}" data-in="{each["in"]}" '
                f'value="{escape(str(each.get("example", "")))}"></label>'
                for each in in_address
            ),
            '<div class="row">' if examples else "",
            *(
                f'<button type="button" class="small" data-example="{escape(text)}">{escape(name)}</button>'
                for name, text in examples.items()
            ),
            "</div>" if examples else "",
            '<details><summary>Fields</summary><div class="fields"></div></details>'
            f'<textarea name="body" aria-label="Body">{escape(next(iter(examples.values())))}</textarea>'
            if body
            else "",
            '<p><button class="primary">Send</button></p><pre tabindex="0"><output hidden></output></pre></form>',
        ]
    )


def _component(name: str, schema: Json) -> str:
    required = schema.get("required", [])
    rows = (
        (f"{field} *" if field in required else field, _type(described), described)
        for field, described in schema.get("properties", {}).items()
    )
    text = _prose(schema.get("description", ""))
    return f'<details id="{name}"><summary><code>{name}</code></summary><p>{text}{_table(rows)}</details>'


def _table(rows: Any) -> str:
    """Of names, types in HTML, and what has a description."""
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{type}<td>{_prose(described.get('description', ''))}"
        for name, type, described in rows
    )
    return f'<div class="table" tabindex="0"><table>{cells}</table></div>' if cells else ""


def _type(schema: Json) -> str:
    """What a value may be, in a few words of HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(map(_type, schema[word]))
    if "enum" in schema or "const" in schema:
        return ", ".join(
            f"<code>{escape(json.dumps(value))}</code>" for value in schema.get("enum", [schema.get("const")])
        )
    return ", ".join([_kind(schema), *_bounds(schema)])


def _kind(schema: Json) -> str:
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of ({_type(schema['items'])})"
    if kind == "object" and isinstance(values := schema.get("additionalProperties"), dict):
        return f"object of ({_type(values)})"
    if kind == "object" and "data" in schema.get("properties", {}):
        return f"events of ({_type(schema['properties']['data'])})"
    if "contentSchema" in schema:
        return f"{_type(schema['contentSchema'])} as JSON"
    return escape(kind)


def _bounds(schema: Json) -> Iterator[str]:
    for name, words in BOUNDS.items():
        if name in schema:
            yield escape(words.format(schema[name]))


def _resolved(value: Json, components: Json) -> Json:
    if "$ref" not in value:
        return value
    _, _, kind, name = value["$ref"].split("/")
    found: Json = components[kind][name]
    return found


def _prose(text: str) -> str:
    """Plain text with `code` in it."""
    parts = map(escape, text.split("`"))
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _indented(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
