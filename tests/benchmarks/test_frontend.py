"""The HTTP layer's benchmark: its clients count what is there, and it runs all of its systems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.client import COMPLETIONS
from benchmarks.reports import cells, document
from benchmarks.reports.compare import figures
from benchmarks.served import Served
from benchmarks.server import frontend
from benchmarks.server.frontend import (
    PARAMETERS,
    SYSTEMS,
    Crowd,
    System,
    beside_another,
    content,
    ratios_to_before,
    request,
    turn,
)
from tests.conftest import Server

SENT = b'HTTP/1.1 200 OK\r\n\r\n2d\r\ndata: {"choices":[{"text":"\\n\\n"}]}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n'
WITH_IDS = {"prompt": "Count these.", "return_token_ids": True}  # an event for each token, though its text may be none


async def test_events_are_counted_however_their_bytes_are_cut(tiny: Server) -> None:
    for length in range(1, len(SENT)):
        crowd = Crowd(Served(tiny.port, tiny.process.pid), b"", 1)
        for start in range(0, len(SENT), length):
            crowd.streams[0].data_received(SENT[start : start + length])
        assert crowd.streams[0].events == 2
        assert content(b"".join(crowd.streams[0].pieces)) == (2, 1)
        assert crowd.streams[0].reads == -(-len(SENT) // length)


@pytest.mark.parametrize("together", [1, 4])
async def test_a_stream_has_the_events_that_its_system_says(tiny: Server, together: int) -> None:
    body = {**WITH_IDS, "stream_options": {"chunk_tokens": together, "include_usage": True}}
    system = System("", COMPLETIONS, body, more=3, together=together)  # the prompt's tokens, the usage, the end
    crowd = Crowd(Served(tiny.port, tiny.process.pid), request(system, 10), 3)
    await crowd.run()
    stream = tiny.raw({**body, "max_tokens": 10, "temperature": 0.0, "stream": True})
    frames = stream.read_all().count(b"data: ")
    stream.close()
    assert {content(b"".join(stream.pieces)) for stream in crowd.streams} == {(10, system.more)}
    assert max(stream.events for stream in crowd.streams) <= system.events(10)
    assert frames <= system.events(10)


async def test_no_figure_where_events_are_missing(tiny: Server) -> None:
    wrong = System("", COMPLETIONS, WITH_IDS, more=5)
    with pytest.raises(SystemExit, match="a stream should have 10 tokens and 5 events without, but there were"):
        await turn("wrong", wrong, Served(tiny.port, tiny.process.pid), 2, 10)


def test_tokens_are_counted_also_where_events_have_several() -> None:
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "abc"}}]},
        {"choices": [{"index": 0, "text": "\n\n"}]},
        {"choices": [{"index": 0, "text": "", "token_ids": [1, 2]}]},
        {"choices": [], "usage": {}},
    ]
    body = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    assert content(b"HTTP/1.1 200 OK\r\n\r\n" + body + b"data: [DONE]\n\n") == (7, 3)
    assert content(body[:-1]) == (7, 1)  # the last one has not all come


def test_the_server_of_another_checkout_takes_its_turn_beside_its_own() -> None:
    names = [*beside_another(SYSTEMS)]
    assert [name for name in names if name not in SYSTEMS] == ["in step, before", "ahead, before"]
    assert names.index("in step, before") == names.index("in step") + 1
    found = ratios_to_before({"bare": [9.0], "ahead": [6.0, 6.0], "ahead, before": [2.0, 3.0]})
    assert list(found) == ["ahead"]
    assert found["ahead"]["value"] == pytest.approx(2.4)


@pytest.mark.usefixtures("forked_servers")
def test_all_systems_have_figures(tmp_path: Path) -> None:
    frontend.main(["--streams", "3", "--tokens", "60", "--rounds", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "frontend.json").read_text())
    assert set(report["sides"]) == set(SYSTEMS)
    assert set(report["server_us_per_token_more_than_plain"]) == set(PARAMETERS)
    assert all(system["events_per_second"] > 0 for system in report["sides"].values())
    assert all(system["events_per_read"] > 0 for system in report["sides"].values())
    for name, rounds in report["figures"].items():
        for key, each in rounds.items():
            assert each["value"] == pytest.approx(report["sides"][name][key], abs=1e-3)
    found = set(figures({"frontend": report}))
    assert found == {
        f"frontend/figures/{name}/{key}" for name in SYSTEMS for key in ("events_per_second", "server_us_per_token")
    }
    page = "\n".join(document.frontend(report, ""))
    assert all(f"| {cells.shown(each['events_per_second'])} |" in page for each in report["figures"].values())
    assert report["events_ratio_to"]["bare"]["ahead"]["value"] > 0
