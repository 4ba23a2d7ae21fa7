"""A short form of the attacks and of the fuzzing: nothing that a client sends harms the server or its other clients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.stress import fuzz, hostile, payloads
from benchmarks.stress.attacks import ATTACKS

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
SERVER = ["--set", f"model.path={TINY}", "--set", "structured_output.compile_seconds=0.5"]
PATIENT = "120"  # seconds that /health may take here: how fast a busy machine is proves nothing
SMALLEST = (
    "grammar: chain of rules",
    "schema: chain of definitions in a tool",
    "schema: least integer",
    "compiler: multiples",
    "compiler: intersection",
    "fan-out: stop tokens",
    "fan-out: many sequences, left",
    "errors: messages",
    "bodies: empty lists",
    "bodies: template variables",
    "states: headers without end",
    "priority",
    "connections: pipelined behind",
    "template: crowd",
)


@pytest.mark.usefixtures("forked_servers")
def test_attacks_harm_nobody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SERVER, "--health", PATIENT, "--peace", "0.1", "--out", str(tmp_path)]
    code = hostile.main([*arguments, *SMALLEST])
    report = json.loads((tmp_path / "hostile.json").read_text())
    assert report["faults"] == []
    assert code == 0
    assert len(report["attacks"]) == len(SMALLEST)
    assert report["end"]["code"] == 0
    assert report["attacks"]["schema: least integer"]["told"].keys() <= {"200", "400"}
    assert report["attacks"]["priority: before all others"]["told"] == {"403": 4}
    assert report["attacks"]["states: headers without end"]["told"].keys() <= {"400", "429", "503"}
    assert report["attacks"]["errors: messages"]["told"] == {"400": 2}
    assert '"faults": []' in capsys.readouterr().out


@pytest.mark.usefixtures("forked_servers")
def test_random_requests_find_nothing(tmp_path: Path) -> None:
    arguments = [*SERVER, "--health", PATIENT, "--cases", "0-149"]
    code = fuzz.main([*arguments, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "fuzz.json").read_text())
    assert report["faults"] == []
    assert code == 0
    assert report["requests"] == 150
    assert report["statuses"].keys() <= {"200", "400", "403", "404", "429"}
    assert report["statuses"]["200"] > 10


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({"alive": False}, "the server died"),
        ({"failures": {"quiet stream ended": 2}}, "2 times quiet stream ended"),
        ({"told": {"500": 1}}, "1 attackers got 500"),
        ({"told": {"did not end": 1}}, "the attack did not end"),
        ({"health_longest_ms": 251.0}, "/health took 251.0 ms"),
        ({"mib": {"before": 10, "after": 111}}, "101 MiB did not come back"),
        ({}, None),
    ],
)
def test_what_is_wrong_is_seen(found: dict[str, object], fault: str | None) -> None:
    well = {
        "alive": True,
        "failures": {},
        "told": {"400": 2},
        "health_longest_ms": 250.0,
        "mib": {"before": 10, "after": 110},
    }
    faults = hostile.faults_of("x", well | found, 0.25)
    assert faults == ([] if fault is None else [f"x: {fault}"])


def test_attacks_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "NONSENSE", 50)  # of which more takes seconds, and is no other
    for attack in ATTACKS.values():
        if attack.together < 50:
            assert next(attack.payloads()) == next(attack.payloads())
