from __future__ import annotations

from benchmarks.server.before import compared


def test_what_is_compared_is_this_checkout_to_the_other() -> None:
    rounds = [({"HTTP": 30.0, "batch 1": 4.0}, {"HTTP": 10.0, "batch 1": 8.0}) for _ in range(3)]
    figures = compared(rounds)
    assert {name: each["ratio"]["value"] for name, each in figures.items()} == {"HTTP": 3.0, "batch 1": 0.5}
    assert figures["HTTP"]["now"]["rounds"] == [30.0] * 3
    assert figures["HTTP"]["before"]["better"] == "higher"
