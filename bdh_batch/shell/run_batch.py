"""`bdh-batch run-batch`: the requests of a file, as OpenAI's Batch API has them, and a file of their responses."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import orjson
import uvloop
from starlette.types import ASGIApp
from tqdm import tqdm

from bdh_batch.errors import BDHError, ConfigError, QueueFull
from bdh_batch.http.app import create_app
from bdh_batch.llm.choosing import in_process
from bdh_batch.llm.window import Job, Window, window_for
from bdh_batch.processes.in_process import InProcess
from bdh_batch.settings import Settings
from bdh_batch.shell.batch_input import BadLine, BatchInput, BatchRequest, Line
from bdh_batch.shell.batch_output import BatchOutput
from bdh_batch.shell.in_process_app import Response, post

BUSY = (429, 503)
RARELY = 10.0  # seconds between progress reports where nobody watches them move
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ALL_WELL, SOME_FAILED = 0, 1


class EngineFailed(BDHError):
    """Ends a run whose engine computes no more: what has no response yet gets it from the next run."""


def run_batch(settings: Settings, source: Path, target: Path) -> int:
    """Responds to what has no response yet, and returns the exit code.

    Raises ConfigError, CheckpointError: it cannot begin, or not write.
    """
    lines = BatchInput(source, settings.limits.max_body_bytes)
    if target.exists() and target.samefile(source):
        raise ConfigError(f"-o: {target} is the input")
    try:
        with BatchOutput(target, lines.digests) as output:
            before, code = output.lines, ALL_WELL
            if before < len(lines):
                code = uvloop.run(_Run(settings, lines, output).to_its_end())
            _report(f"{output.lines - before} of {len(lines)} lines are new in {target}, {output.failed} of all failed")
            return code or (SOME_FAILED if output.failed else ALL_WELL)
    except EngineFailed as error:
        _report(error.message)
        return SOME_FAILED
    except OSError as error:
        raise ConfigError(f"-o: {target}: {error.strerror}; the same command goes on from here") from error


class _Run:
    """One run over the lines of a file."""

    def __init__(self, settings: Settings, lines: BatchInput, output: BatchOutput) -> None:
        self._settings = settings
        self._lines = lines
        self._output = output
        self._signal = 0

    async def to_its_end(self) -> int:
        """Returns 0, or, where a signal ended it, the exit code that says so."""
        running, loop = asyncio.ensure_future(self._run()), asyncio.get_running_loop()

        def interrupt(number: int) -> None:
            self._signal = number
            running.cancel()

        for number in SIGNALS:
            loop.add_signal_handler(number, interrupt, number)
        try:
            await running
        except asyncio.CancelledError:
            if not self._signal:
                raise
            _report("interrupted: the same command goes on from here")
            return 128 + self._signal
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)
        return 0

    async def _run(self) -> None:
        model = in_process(self._settings)
        host = await InProcess.open(model, model.settings)
        try:
            await respond(create_app(host.serving), window_for(model.settings.scheduler), self._lines, self._output)
        finally:
            await host.close()


async def respond(app: ASGIApp, window: Window, lines: BatchInput, output: BatchOutput) -> None:
    """Responds to all lines that have no response yet, so many at a time as there is room for.

    Raises:
        OSError: the output cannot be written.
        EngineFailed
    """
    shown = sys.stderr.isatty()
    with tqdm(
        total=len(lines), initial=output.lines, desc="Responses", unit="line", mininterval=0.1 if shown else RARELY
    ) as bar:

        def count(_: None = None) -> None:
            bar.update(1)

        await window.all(_jobs(app, window, lines, output, count), count)


def _jobs(
    app: ASGIApp, window: Window, lines: BatchInput, output: BatchOutput, refused: Callable[[], None]
) -> Iterator[Job[None]]:
    for index, line in enumerate(lines.lines()):
        if output.has(line):
            continue
        try:
            request = lines.request(index, line)
        except BadLine as error:
            output.refuse(line, error)
            refused()
            continue
        sequences = min(request.sequences, window.most)
        yield Job(sequences, partial(_respond, app, window, sequences, request, line, output))


async def _respond(
    app: ASGIApp, window: Window, sequences: int, request: BatchRequest, line: Line, output: BatchOutput
) -> None:
    last: list[Response] = []

    async def asked() -> Response:
        last[:] = [await post(app, request.url, request.body)]
        if last[0].status in BUSY:
            raise QueueFull("", int(last[0].headers.get("retry-after", "1")))
        return last[0]

    try:
        response = await window.admitted(sequences, asked)
    except QueueFull:
        [response] = last
        if response.status != 429:
            text = orjson.loads(response.body)["error"]["message"]
            raise EngineFailed(f"{text} The same command goes on from here.") from None
    output.respond(line, request.custom_id, response)


def _report(text: str) -> None:
    print(f"bdh-batch: {text}", file=sys.stderr)
