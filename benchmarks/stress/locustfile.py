"""Locust's users for a server of the OpenAI API: they stream completions and chats, and pause in between.

    python -m locust -f benchmarks/stress/locustfile.py -H http://127.0.0.1:8000 --tags steady  # see its web page
    LOAD_STAGES=16x60,64x60 python -m locust -f benchmarks/stress/locustfile.py --headless …    # users x seconds
    make load                                                                                   # see load.py

Scenarios, by tag: `steady`, `burst` (some at once), `long` (prompts), `leaving` (before the end), `keys` (of unequal
requests). Rows of the statistics, by type, each for every scenario (of those that leave, only how many did):

    answer      whole completions, in ms, and failures by the kinds of `bench serve`; no other is in the Aggregated row
    ttft        ms to the first token
    gap         ms between the events that carry tokens
    tokens/s    of a completion of some length after its first token: a rate, where the head of the column says ms
    429         refusals, which are no failures: ms until they came
    left        streams that their client left, as it meant to: ms until then

Streams are read line by line with the client below FastHttpUser: reading by FastHttpUser itself waits until a block is
full, which holds several tokens, and HttpUser takes many times the time. The clock is read as a line comes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent
import orjson
import psutil
from gevent import GreenletExit
from gevent.pool import Group
from geventhttpclient.client import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError, HTTPSocketResponse
from locust import LoadTestShape, User, events, stats, tag, task
from locust.env import Environment
from locust.exception import CatchResponseError, StopTest

from bdh_batch.bench.outcome import Failed, Outcome
from bdh_batch.bench.reading import Stream

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
TEXT = Path(__file__).parents[2] / "tests" / "data" / "shakespeare-validation.txt"
STAGES = "LOAD_STAGES"
BURST = 8  # streams at once
SPAWN_RATE = 100.0  # users a second, at each stage of a ramp
LONGEST_COMPLETION = 4  # times the mean
PATIENCE_SECONDS = 60.0  # after a refusal, whatever it says
RATED_TOKENS = 8  # that a completion needs for a rate: of two that come together it would be anything
TIMEOUT_SECONDS = 120.0  # without a byte
SAMPLE_SECONDS = 0.25
CSV_SECONDS = 0.5  # between the writings of locust's CSV; there is none at the end
# So geventhttpclient's errors begin where the server closed.
ENDED = ("Incomplete response.", "connection closed", "('Invalid EOF state'")


stats.CSV_STATS_INTERVAL_SEC = CSV_SECONDS  # type: ignore[assignment]  # gevent.sleep takes it


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: ArgumentParser) -> None:
    options = parser.add_argument_group("streams")
    options.add_argument("--text", default=str(TEXT), help="the file that prompts are cut from")
    options.add_argument("--api-keys", default="", help="of the users, as in a,b; scenario `keys` uses all of them")
    options.add_argument("--think", type=float, default=1.0, help="seconds between a completion and the next request")
    options.add_argument("--answer-tokens", type=int, default=64, help="on the average: lengths have a tail")
    options.add_argument("--long-prompt", type=int, default=4096, help="characters of a long one")
    options.add_argument(
        "--samples", default="", help="a file for what was seen four times a second: users, tokens, memory"
    )
    options.add_argument("--server-pid", type=int, default=0, help="whose memory is sampled")


class Tally:
    """What all users of this process have seen."""

    def __init__(self) -> None:
        self.tokens = self.prompt_tokens = self.answers = self.refused = self.left = 0
        self.stopped = 0  # streams of users that locust took away, as there were to be fewer
        self.failures: Counter[str] = Counter()

    def count(self, tokens: int) -> None:
        self.tokens += tokens


TALLY = Tally()  # Locust makes users itself, and gives them nothing but their environment


class Reader(User):
    """One person at a time asks, reads and pauses; a refusal makes it wait as long as it says."""

    numbers = itertools.count()

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        if self.host is None:
            raise StopTest("--host: should say where the server is, as in http://127.0.0.1:8000")
        options: Any = environment.parsed_options
        self.options = options
        self.draw = random.Random(next(self.numbers))
        self.text = Path(options.text).read_text()
        self.keys = [key for key in options.api_keys.split(",") if key]
        self.http = HTTPClient.from_url(self.host, concurrency=BURST, network_timeout=TIMEOUT_SECONDS)

    def wait_time(self) -> float:
        return float(self.options.think * self.draw.uniform(0.5, 1.5))

    def on_stop(self) -> None:
        self.http.close()

    @tag("steady")
    @task(6)
    def complete(self) -> None:
        self.stream("completion", COMPLETIONS, self.completion())

    @tag("steady")
    @task(4)
    def chat(self) -> None:
        messages = [{"role": "user", "content": self.prompt(200)}]
        self.stream("chat", CHATS, {"messages": messages, "max_completion_tokens": self.length()})

    @tag("burst")
    @task(1)
    def burst(self) -> None:
        together = Group()
        for _ in range(BURST):
            together.spawn(self.stream, "burst", COMPLETIONS, self.completion())
        try:
            together.join()
        finally:  # locust may take the user away
            together.kill()

    @tag("long")
    @task(1)
    def long_prompt(self) -> None:
        body = {"prompt": self.prompt(self.options.long_prompt), "max_tokens": self.length()}
        self.stream("long prompt", COMPLETIONS, body)

    @tag("leaving")
    @task(1)
    def leave(self) -> None:
        """Asks for more than it reads: it is gone before the end, sometimes with the first token."""
        leave_after = self.draw.randrange(1, 20)
        self.stream("leaving", COMPLETIONS, self.completion() | {"max_tokens": 1000}, leave_after=leave_after)

    @tag("keys")
    @task(1)
    def mixed_keys(self) -> None:
        """The first key wants the most."""
        keys = self.keys or [""]
        number = min(int(self.draw.expovariate(1.0)), len(keys) - 1)
        self.stream(f"key {number + 1}", COMPLETIONS, self.completion(), key=keys[number])

    def completion(self) -> dict[str, Any]:
        return {"prompt": self.prompt(self.draw.randrange(32, 256)), "max_tokens": self.length()}

    def prompt(self, length: int) -> str:
        start = self.draw.randrange(max(1, len(self.text) - length))
        return self.text[start : start + length]

    def length(self) -> int:
        mean: int = self.options.answer_tokens
        return max(1, min(LONGEST_COMPLETION * mean, round(self.draw.expovariate(1 / mean))))

    def stream(
        self, scenario: str, path: str, body: Mapping[str, Any], key: str | None = None, leave_after: int | None = None
    ) -> None:
        """Asks, reads and reports to the statistics what came of it.

        Args:
            key: else the first of the user's.
            leave_after: so many events with tokens; None is never.
        """
        outcome = Outcome(0, 0.0, 0)
        began = outcome.sent = time.perf_counter()
        try:
            response = self._ask(path, body, key if key is not None else "".join(self.keys[:1]))
            refused = response.status_code == 429
            whole = bool(response.read()) if refused else self._read(response, outcome, leave_after)
        except (Failed, OSError, HTTPParseError) as error:
            self._failed(scenario, began, kind_of(error))
            return
        except GreenletExit:
            TALLY.stopped += 1
            raise
        if refused:
            self._refused(scenario, began, response)
        elif whole:
            self._answered(scenario, outcome)
        else:
            TALLY.left += 1
            self._log("left", scenario, time.perf_counter() - began)

    def _ask(self, path: str, body: Mapping[str, Any], key: str) -> HTTPSocketResponse:
        content = orjson.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        return self.http.request("POST", path, content, headers)

    def _read(self, response: HTTPSocketResponse, outcome: Outcome, leave_after: int | None) -> bool:
        """Whether it was read to its end. Raises Failed, or what the connection does, where there is no good one."""
        stream = Stream(outcome, TALLY.count)
        stream.begin(response.status_code, str(response.get("content-type", "")))
        try:
            if response.status_code != 200:
                stream.take(response.read(), time.perf_counter())
            while stream.failure is None and (line := response.readline(b"\n")):
                stream.take(line, time.perf_counter())
                if leave_after is not None and len(outcome.times) >= leave_after:
                    return False
            stream.finish()
            return True
        finally:
            response.release()  # which closes the connection where there is more to read

    def _answered(self, scenario: str, outcome: Outcome) -> None:
        TALLY.answers += 1
        TALLY.prompt_tokens += outcome.prompt_tokens
        self._request(scenario, outcome.ended - outcome.sent)
        self._log("ttft", scenario, outcome.first - outcome.sent)
        for gap in outcome.gaps:
            self._log("gap", scenario, gap)
        if outcome.per_token and outcome.output_tokens >= RATED_TOKENS:
            self._log("tokens/s", scenario, 1e-3 / outcome.per_token)

    def _refused(self, scenario: str, began: float, response: HTTPSocketResponse) -> None:
        TALLY.refused += 1
        self._log("429", scenario, time.perf_counter() - began)
        asked = str(response.get("retry-after", "1"))
        gevent.sleep(min(PATIENCE_SECONDS, float(asked) if asked.isdecimal() else 1.0))

    def _failed(self, scenario: str, began: float, kind: str) -> None:
        TALLY.failures[kind] += 1
        self._request(scenario, time.perf_counter() - began, CatchResponseError(kind))
        gevent.sleep(0.1)  # a server that is down is not asked again at once

    def _request(self, scenario: str, seconds: float, error: Exception | None = None) -> None:
        self.environment.events.request.fire(
            request_type="answer",
            name=scenario,
            response_time=1e3 * seconds,
            response_length=0,
            exception=error,
            context={},
        )

    def _log(self, kind: str, scenario: str, seconds: float) -> None:
        """A row that stays out of the Aggregated one, where ms to a first token and between tokens have no business."""
        self.environment.stats.get(scenario, kind).log(1e3 * seconds, 0)


def kind_of(error: Failed | OSError | HTTPParseError) -> str:
    """One of those in `bdh_batch/bench/outcome.py`."""
    match error:
        case Failed():
            return error.kind
        case HTTPConnectionClosed():
            return "closed_before_answer"
        case HTTPParseError():
            return "closed_mid_stream" if str(error).startswith(ENDED) else "malformed_http"
        case ConnectionRefusedError():
            return "connect_refused"
        case TimeoutError():
            return "timeout"
        case ConnectionResetError() | BrokenPipeError():
            return "closed_mid_stream"
    return "connect_failed"


def stages(text: str) -> list[tuple[int, float]]:
    """Users and the second until which they are enough, of `16x60,64x60`: users x seconds."""
    found, end = [], 0.0
    for part in text.split(",") if text else []:
        users, _, seconds = part.partition("x")
        try:
            end += float(seconds)
            found.append((int(users), end))
        except ValueError:
            raise SystemExit(f"{STAGES}: should be USERSxSECONDS, as in 16x60,64x60, not {text!r}") from None
    return found


class Ramp(LoadTestShape):
    """As many users at a time as the stages say, then the end; without stages, locust's own options hold."""

    planned = stages(os.environ.get(STAGES, ""))
    abstract = not planned

    def tick(self) -> tuple[int, float] | None:
        elapsed: float = self.get_run_time()  # type: ignore[no-untyped-call]
        users = next((users for users, end in self.planned if elapsed < end), None)
        return None if users is None else (users, SPAWN_RATE)


class Samples:
    """Looks four times a second at what the users have read and at the server's memory."""

    def __init__(self, environment: Environment) -> None:
        options: Any = environment.parsed_options
        self._environment = environment
        self._file = Path(options.samples)
        self._server = psutil.Process(options.server_pid) if options.server_pid else None
        self._found: list[dict[str, float | None]] = []
        self._began = time.perf_counter()
        self._loop = gevent.spawn(self._watch)

    def _watch(self) -> None:
        while True:
            self._found.append(self._sample())
            gevent.sleep(SAMPLE_SECONDS)

    def _sample(self) -> dict[str, float | None]:
        runner, server = self._environment.runner, self._server
        return {
            "seconds": time.perf_counter() - self._began,
            "users": 0 if runner is None else runner.user_count,
            "tokens": TALLY.tokens,
            "prompt_tokens": TALLY.prompt_tokens,
            "answers": TALLY.answers,
            "refused": TALLY.refused,
            "rss": None if server is None else rss_of(server),
            "client_cpu_seconds": time.process_time(),
        }

    def write(self) -> None:
        self._loop.kill()
        tally = {name: getattr(TALLY, name) for name in ("answers", "refused", "left", "stopped", "failures")}
        self._file.write_text(json.dumps({**tally, "samples": self._found}))


def rss_of(process: psutil.Process) -> int | None:
    """None where it has ended, also if nobody has taken note of that yet."""
    try:
        return process.memory_info().rss or None
    except psutil.NoSuchProcess:
        return None


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def watch(environment: Environment, **_: object) -> None:
    options: Any = environment.parsed_options
    if options.samples:
        samples = Samples(environment)
        environment.events.test_stop.add_listener(lambda **_: samples.write())  # type: ignore[no-untyped-call]


@events.test_stop.add_listener  # type: ignore[untyped-decorator]
def wait_for_the_csv(environment: Environment, **_: object) -> None:
    options: Any = environment.parsed_options
    if options.csv_prefix:
        gevent.sleep(1.5 * CSV_SECONDS)
