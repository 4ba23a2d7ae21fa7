"""Between conversations and the values of a Gradio app's inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bdh_batch.upstreams.config import GradioUpstream
from bdh_batch.upstreams.counting import texts_of
from bdh_batch.upstreams.protocol import Fault, FaultKind, TextRequest

SYSTEM = ("system", "developer")
MOST_MESSAGES = 65536  # that an output may have


def inputs_of(upstream: GradioUpstream, request: TextRequest) -> list[Any]:
    """Returns the values of the endpoint's inputs, in their order.

    Raises:
        Fault: the conversation is nothing that the app could be given.
    """
    system, earlier, last = _conversation(request, upstream.system)
    values: dict[str, Any] = {
        "message": last,
        "prompt": last,
        "system": system,
        "history": _pairs(earlier) if upstream.history == "pairs" else earlier,
        **request.fields,
    }
    names = {f"{{{name}}}": name for name in upstream.placeholders}
    return [values.get(names[each]) if isinstance(each, str) and each in names else each for each in upstream.inputs]


def _conversation(request: TextRequest, system: str | None) -> tuple[str | None, list[dict[str, str]], str]:
    """Returns the system prompt, the messages before the last one, and that one's text."""
    if request.messages is None:
        if not isinstance(request.prompt, str):
            raise Fault(FaultKind.REFUSED, "it takes texts, not token ids", "prompt")
        return system, [], request.prompt
    said = [(str(message["role"]), _text(message)) for message in request.messages]
    told = [text for role, text in said if role in SYSTEM]
    turns = [{"role": role, "content": text} for role, text in said if role not in SYSTEM]
    if not turns or turns[-1]["role"] != "user":
        raise Fault(FaultKind.REFUSED, "the last message should be the user's", "messages")
    if any(turn["role"] not in ("user", "assistant") for turn in turns):
        raise Fault(FaultKind.REFUSED, "it takes messages of user, assistant and system", "messages")
    return "\n\n".join(told) if told else system, turns[:-1], turns[-1]["content"]


def _text(message: Mapping[str, Any]) -> str:
    return "\n".join(texts_of(message.get("content")))


def _pairs(turns: Sequence[Mapping[str, str]]) -> list[list[str | None]]:
    """Returns each of the user's texts with the response to it; None where one is missing."""
    pairs: list[list[str | None]] = []
    for turn in turns:
        if turn["role"] == "user":
            pairs.append([turn["content"], None])
        elif pairs and pairs[-1][1] is None:
            pairs[-1][1] = turn["content"]
        else:
            pairs.append([None, turn["content"]])
    return pairs


def said_in(data: object, output: int) -> tuple[str, str]:
    """Returns the text, and the thoughts, that an endpoint's outputs hold so far: the text itself, or, of a
    conversation, what the assistant has said since the user's last message.

    Raises:
        Fault: there are none.
    """
    if not isinstance(data, list) or len(data) <= output:
        raise Fault(FaultKind.MALFORMED, f"no output {output}")
    value = data[output]
    if isinstance(value, dict) and "value" in value and "role" not in value:
        value = value["value"]
    if isinstance(value, str | None):
        return value or "", ""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or len(value) > MOST_MESSAGES:
        raise Fault(FaultKind.MALFORMED, "neither a text nor a conversation")
    if value and isinstance(value[-1], list | tuple):
        return _of_pair(value[-1]), ""
    return _of_messages(value)


def _of_pair(pair: Sequence[object]) -> str:
    if len(pair) != 2:
        raise Fault(FaultKind.MALFORMED, "no pair of texts")
    return _content(pair[1])


def _of_messages(messages: Sequence[object]) -> tuple[str, str]:
    texts: list[str] = []
    thoughts: list[str] = []
    for message in reversed(messages):
        if not isinstance(message, dict):
            raise Fault(FaultKind.MALFORMED, "a message is no object")
        if message.get("role") != "assistant":
            break
        metadata = message.get("metadata")
        titled = isinstance(metadata, dict) and metadata.get("title")
        (thoughts if titled else texts).append(_content(message.get("content")))
    return "".join(reversed(texts)), "\n".join(reversed(thoughts))


def _content(content: object) -> str:
    """Returns the text of a message: a text, or a list of parts; what is no text, as a picture, has none."""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, str | list | None):
        raise Fault(FaultKind.MALFORMED, "a message has no text")
    return "".join(texts_of(content))
