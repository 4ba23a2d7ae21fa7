"""Requests go to the engine with the least load, as far as a front end can know it."""

from __future__ import annotations

from pathlib import Path

from bdh_batch.backends.replica import Replica
from bdh_batch.backends.wire import Gain, Heartbeat, Start
from bdh_batch.errors import BDHError
from bdh_batch.messages import GenerationRequest, Origin, Prompt, SamplingParams
from tests.backends.engines import FakeEngine, engines

REQUEST = GenerationRequest(Origin("r-1"), [Prompt(b"a prompt")], 5, sampling=SamplingParams(), seeds=(7,))


class Unread:
    """A reader of what nobody wants."""

    id = "r-1"
    has_token = False

    def started(self, replica: Replica, error: BDHError | None) -> None: ...

    def gained(self, gain: Gain) -> None: ...


def begin(replica: Replica) -> int:
    return replica.start(Unread(), lambda stream: Start.of(stream, REQUEST, []))


async def test_load_is_what_was_reported_and_what_has_begun_and_ended_since(tmp_path: Path) -> None:
    async with engines(FakeEngine(tmp_path / "one.sock")) as backend:
        # Nothing is awaited from here on, so that the engine's own heartbeats do not come between.
        replica = backend.replicas["one"]
        streams = [begin(replica) for _ in range(2)]
        replica.take(Heartbeat(running=5, waiting=2))  # of which two are of this front end
        assert replica.outstanding == 7
        streams += [begin(replica) for _ in range(3)]
        assert replica.outstanding == 10
        for stream in streams[:4]:
            replica.abort(stream)
        assert replica.outstanding == 6
        streams = [streams[4], begin(replica)]
        replica.take(Heartbeat(running=0, waiting=0))  # sent before the engine has received them
        assert replica.outstanding == 2
        for stream in streams:
            replica.abort(stream)
        assert replica.outstanding == 0
