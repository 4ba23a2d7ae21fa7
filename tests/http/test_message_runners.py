"""Loops of Anthropic's official client: it sends requests by itself, and uses the tools that are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anthropic

from tests.http.test_messages import ASKED, SCHEMA, USER

if TYPE_CHECKING:
    from tests.conftest import Server


def test_the_clients_runner_uses_tools_without_a_thread(tiny: Server) -> None:
    """It asks for a thread first, and sends all messages where it is refused one in the way that it knows."""
    entered: list[str] = []

    @anthropic.beta_tool(input_schema=SCHEMA)
    def enter(who: str) -> str:
        """Somebody enters."""
        entered.append(who)
        return "Here."

    asked: Any = ASKED | {"max_tokens": 200, "messages": [USER], "tool_choice": {"type": "tool", "name": "enter"}}
    with anthropic.Anthropic(base_url=tiny.url, api_key="none", max_retries=0, timeout=300) as client:
        runner = client.beta.messages.tool_runner(**asked, tools=[enter], max_iterations=2)
        assert [message.stop_reason for message in runner] == ["tool_use", "tool_use"]
    assert set(entered) <= {"Romeo", "Juliet"}
    assert len(entered) >= 2
