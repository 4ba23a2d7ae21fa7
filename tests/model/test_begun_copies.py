"""Which copies of a plan are left to the kernels: only those of which nothing shows that they are made last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.begun_copies import begun_copies
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.messages import Copy, Plan, SamplingParams, Segment

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
DEVICE, SLOTS, PARTS = 5, 8, 2  # slots from DEVICE on are not in the kernels' reach
GREEDY = SamplingParams(temperature=0.0)

States = dict[int, list[str]]  # what each part of a state is, by slot


def segments_of(*slots: int, start: int = 9) -> list[Segment]:
    return [Segment(slot, start, [1], None) for slot in slots]


def left(plan: Plan) -> dict[int, Copy]:
    return begun_copies(plan, lambda slot: slot < DEVICE)


def make(copy: Copy, states: States) -> None:
    if copy.moves:
        states[copy.source], states[copy.target] = states[copy.target], states[copy.source]
    else:
        count = PARTS // copy.parts
        part = slice(copy.begin * count, copy.end * count)
        states[copy.target][part] = states[copy.source][part]


def outcome(plan: Plan, begun: dict[int, Copy]) -> States:
    """What is in all slots after `plan`; the kernels read all states before they write one, or the other way round."""
    states = {slot: [f"{slot}.{part}" for part in range(PARTS)] for slot in range(SLOTS)}
    for copy in plan.copies:
        if begun.get(copy.target) is not copy:
            make(copy, states)
    for slot in plan.releases:
        states[slot] = ["released"] * PARTS
    for segment in plan.segments:
        if segment.start == 0:
            states[segment.slot] = ["cleared"] * PARTS
    for segment in plan.segments:
        if segment.slot in begun:
            states[segment.slot] = list(states[begun[segment.slot].source])
        states[segment.slot] = [f"{part}+" for part in states[segment.slot]]
    return states


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    slots = st.integers(0, SLOTS - 1)
    copies = []
    for source, target in draw(st.lists(st.tuples(slots, slots), max_size=6)):
        if source != target:
            kinds = [Copy(source, target), Copy(source, target, 0, 1, 2), Copy(source, target, 1, 2, 2)]
            moved = Copy(source, target, moves=True)
            copies.append(draw(st.sampled_from([*kinds, Copy(source, target, 0, 2, 2), moved])))
    computed = draw(st.lists(st.integers(0, DEVICE - 1), unique=True, min_size=1))
    segments = [Segment(slot, draw(st.sampled_from([0, 9, 9])), [1], None) for slot in computed]
    releases = draw(st.sets(slots, max_size=2)) - set(computed)
    return Plan(draw(st.permutations(segments)), copies, [*releases])


@given(plans())
def test_nothing_shows_that_they_are_made_last(plan: Plan) -> None:
    begun = left(plan)
    assert outcome(plan, begun) == outcome(plan, {})
    assert all(copy.target == slot and copy.source < DEVICE for slot, copy in begun.items())


@pytest.mark.parametrize(
    ("plan", "targets"),
    [
        (Plan(segments_of(1, 2, 3), [Copy(0, 1), Copy(0, 2), Copy(0, 3)]), {1, 2, 3}),
        (Plan(segments_of(1), [Copy(1, 6), Copy(0, 1, 0, 4, 4)]), {1}),
        (Plan(segments_of(1), [Copy(6, 0), Copy(0, 1)]), {1}),
        (Plan(segments_of(1), [Copy(0, 1), Copy(1, 6)]), set()),
        (Plan(segments_of(0, 1), [Copy(0, 1)]), set()),
        (Plan(segments_of(2), [Copy(0, 1)]), set()),
        (Plan(segments_of(1), [Copy(0, 1, 1, 4, 4)]), set()),
        (Plan(segments_of(1), [Copy(6, 1)]), set()),
        (Plan(segments_of(1), [Copy(0, 1, moves=True)]), set()),
        (Plan(segments_of(1), [Copy(0, 1)], releases=[0]), set()),
        (Plan(segments_of(1, start=0), [Copy(0, 1)]), set()),
    ],
    ids=[
        "forks", "evicted before", "source comes before", "target is read", "source is computed", "not computed",
        "the last parts", "from the host", "moved", "source is released", "cleared",
    ],
)  # fmt: skip
def test_which_are_left(plan: Plan, targets: set[int]) -> None:
    assert set(left(plan)) == targets


def test_the_runner_leaves_them_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of three beside a state that goes to the host, and one that was read from a file: the same bits as after
    copies in a step of their own."""
    model = load_model(TINY, torch.float32, torch.device("cpu"))
    copied: list[tuple[int, ...]] = []
    copy = StatePool.copy

    def counted(pool: StatePool, *asked: Any) -> None:
        copied.append(asked[:2])
        copy(pool, *asked)

    monkeypatch.setattr(StatePool, "copy", counted)
    prompt, forks, host, read = [*range(40)], (1, 2, 3), 5, 6
    copies = [Copy(0, host), *(Copy(0, slot) for slot in forks), Copy(read, 4)]
    segments = [Segment(slot, 40, [slot, 7, 9], GREEDY) for slot in forks] + [Segment(4, 40, [8], GREEDY)]
    outcomes = []
    for plans in ([Plan(segments, copies)], [Plan([], copies), Plan(segments)]):
        pool = StatePool(model.config, 5, torch.device("cpu"), host_slots=1, transfer_slots=1)
        runner = Runner(CpuKernels(model.weights), pool)
        runner.run(Plan([Segment(0, 0, prompt, None)]))
        runner.run(Plan([], [Copy(0, read)]))
        copied.clear()
        drawn = [runner.run(plan).drawn for plan in plans][-1]
        assert len(copied) == (1 if len(plans) == 1 else len(copies))
        outcomes.append((drawn, pool.rows.clone(), pool.memory(read).tobytes()))
    (drawn, rows, file), (same_drawn, same_rows, same_file) = outcomes
    assert (drawn, file) == (same_drawn, same_file)
    assert torch.equal(rows, same_rows)
