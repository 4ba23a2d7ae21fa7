"""Chat messages to a prompt, by a template in a sandbox: the model folder's, or plain `role: content` lines.

What clients write does not become special tokens, unless the settings say so (`stand_ins.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from bdh_batch.errors import CheckpointError, InvalidRequest
from bdh_batch.messages import Text
from bdh_batch.text.job_queue import QueueLimits
from bdh_batch.text.sandbox import JobFailed, Runs, Sandbox, Work
from bdh_batch.text.sandbox_process import JobLimits, Refused
from bdh_batch.text.template import Rendered, decoded

log = logging.getLogger(__name__)

# A response begins with white space, which no prompt ends with: in a later turn it gets no other, so that the prompt
# begins with the very text that was generated.
DEFAULT_TEMPLATE = """\
{%- if tools %}system: You may call these functions: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message.role }}:\
{% if message.role != 'assistant' or message.content is not string or not message.content[:1].isspace() %} {% endif %}\
{{ message.content }}{% for call in message.tool_calls %}\
<tool_call>{"name": {{ call.function.name | tojson }}, "arguments": {% if call.function.arguments is string %}\
{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}}</tool_call>\
{% endfor %}

{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""

MODULE = "bdh_batch.text.template"
DEVELOPER = "developer"
JOBS = 500  # conversations that one worker renders
RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation, and how it becomes a prompt.

    Args:
        add_generation_prompt: whether the prompt ends where the assistant's response begins.
        continue_final: whether the response continues the last message.
        variables: for the template, such as `tools`.
        add_special: whether the tokenizer adds what it puts around a text; None leaves it to the template.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    continue_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_special: bool | None = None


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A chat template as a model folder has it; without a `source`, the built-in one.

    Args:
        name: of where it is from, for errors.
        special: texts that clients cannot write as special tokens, the longest first.
        names: of special tokens, such as `bos_token`.
    """

    source: str | None = None
    name: str = "the built-in template"
    special: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def setup(self) -> bytes:
        """For the sandbox."""
        source = DEFAULT_TEMPLATE if self.source is None else self.source
        return orjson.dumps({"source": source, "special": list(self.special), "names": dict(self.names)})


class ChatTemplate:
    """Renders conversations to prompts, in a sandbox.

    Args:
        sandbox: one that has prepared `source`.
        ready: what the preparation reported.
    """

    def __init__(self, source: TemplateSource, sandbox: Runs, ready: bytes) -> None:
        setup_result = orjson.loads(ready)
        self._sandbox = sandbox
        self._tokens = {chr(int(code, 16)): token for code, token in setup_result["tokens"].items()}
        self._guards = bool(source.special)
        # Most know no such role, and leave its messages out or write a role that their model has never seen.
        self._knows_developers = source.source is None or DEVELOPER in source.source
        # Templates write out what belongs around a conversation; the built-in one cannot.
        self.is_built_in = self._add_special = source.source is None
        if setup_result["unsure"]:
            text = "%s: it puts %s together from pieces; they stay text (chat.parse_special_tokens makes them tokens)"
            log.warning(text, source.name, ", ".join(setup_result["unsure"]))

    async def render(self, conversation: Conversation, tenant: str = "") -> Text:
        """The prompt.

        Raises:
            InvalidRequest: the template refuses these messages, or takes too long or too much memory for them.
            QueueFull, Unavailable: not now.
        """
        if not self._knows_developers:
            conversation = _without_developers(conversation)
        try:
            rendered = await self._rendered(conversation, tenant)
        except (Refused, JobFailed) as error:
            objects = _with_objects(conversation)
            if isinstance(error, JobFailed) or objects is None:
                raise _rejected(error) from error
            try:
                rendered = await self._rendered(objects, tenant)
            except (Refused, JobFailed) as again:
                raise _rejected(again) from again
        add_special = self._add_special if conversation.add_special is None else conversation.add_special
        return Text(rendered.text, add_special, self._tokens if self._guards else None, rendered.ends)

    async def _rendered(self, conversation: Conversation, tenant: str) -> Rendered:
        try:
            job = _job(conversation)
        except orjson.JSONEncodeError as error:
            raise InvalidRequest(f"messages: They cannot be encoded as JSON ({error}).", "messages") from error
        return await self._sandbox.run(job, tenant, _decoded)


class NoTemplate:
    """Stands for the template of a model that gets conversations as they are: an upstream's."""

    async def render(self, conversation: Conversation, tenant: str = "") -> Text:
        raise InvalidRequest("messages: This model's upstream renders conversations itself.", "messages")


def _rejected(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"messages: The chat template rejected them: {str(error).rstrip('.')}.", "messages")


def open_template(
    source: TemplateSource, seconds: float, memory: int, queue: QueueLimits
) -> tuple[Sandbox, ChatTemplate]:
    """A template in a sandbox of its own. Blocks until that is ready.

    Args:
        seconds, memory: that a conversation may take.

    Raises:
        CheckpointError: the template does not compile.
    """
    limits = JobLimits(seconds, memory, jobs=JOBS)
    options = ("sandbox.template_seconds", "sandbox.template_memory")
    sandbox = Sandbox(Work(MODULE, source.setup, limits, *options), queue)
    try:
        return sandbox, ChatTemplate(source, sandbox, sandbox.wait_until_ready())
    except Refused as error:
        sandbox.close()
        raise CheckpointError(f"{source.name}: {error}") from error
    except BaseException:
        sandbox.close()
        raise


def warm_up(sandbox: Sandbox) -> None:
    """Has a template's sandbox render a conversation, so that no request waits for what is done once."""
    sandbox.warm_up(_job(Conversation([{"role": "user", "content": "Hello"}])))


def _with_objects(conversation: Conversation) -> Conversation | None:
    """The same with an object around arguments of calls that are text, being cut or no object: some templates go over
    the names of all arguments, and reject text. None where there are no such arguments."""
    messages: list[Mapping[str, Any]] = []
    for message in conversation.messages:
        calls = [_with_object(call) for call in message.get("tool_calls") or ()]
        messages.append({**message, "tool_calls": calls} if calls else message)
    return replace(conversation, messages=messages) if messages != list(conversation.messages) else None


def _with_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    return {**call, "function": {**function, "arguments": {"arguments": function["arguments"]}}}


def _without_developers(conversation: Conversation) -> Conversation:
    """The same with `system` as the role of what OpenAI's newer clients call a developer's messages."""
    messages = [
        {**message, "role": "system"} if message["role"] == DEVELOPER else message for message in conversation.messages
    ]
    return replace(conversation, messages=messages)


def _job(conversation: Conversation) -> bytes:
    return orjson.dumps(
        {
            "messages": conversation.messages,
            "variables": conversation.variables,
            "add_generation_prompt": conversation.add_generation_prompt,
            "continue_final": conversation.continue_final,
        }
    )


async def _decoded(said: bytes) -> Rendered:
    return decoded(said)
