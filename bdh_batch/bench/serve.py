"""`bench serve`, from its flags to its exit code: model, data, first response, warm-up, run, report."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime

import uvloop

from bdh_batch.bench import result_file
from bdh_batch.bench.client import Client
from bdh_batch.bench.data import Conversation, Prompt, conversations
from bdh_batch.bench.load import Measured, measure, offsets
from bdh_batch.bench.metrics import metrics_of
from bdh_batch.bench.options import Options
from bdh_batch.bench.outcome import Failed, Outcome
from bdh_batch.bench.report import Report
from bdh_batch.bench.texts import Writer
from bdh_batch.bench.tokens import Tokens, choose
from bdh_batch.errors import ConfigError

INTERRUPTED = 130
RETRY_SECONDS = 0.5


def serve(options: Options) -> int:
    """0 where anything was completed, 1 where nothing was, 130 where the run was interrupted.

    Raises ConfigError where it cannot begin.
    """
    _allow_many_files()
    with contextlib.suppress(asyncio.CancelledError):  # before the run there is nothing to report
        report = uvloop.run(_interruptible(options))
        if report.measured.interrupted:
            return INTERRUPTED
        return 0 if report.metrics.completed else 1
    print("interrupted before the run began", file=sys.stderr)
    return INTERRUPTED


async def _interruptible(options: Options) -> Report:
    """Ctrl-C cancels the work, which ends with what it has; a second one ends the program as it always does."""
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(bench(options))

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        work.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    return await work


async def bench(options: Options) -> Report:
    """Makes ready, runs, prints and saves. Raises ConfigError where it cannot begin."""
    client = Client(options, os.environ.get("OPENAI_API_KEY"))
    try:
        patience = Patience(options)
        await patience.until_good(lambda: _listening(client))
        client.model = client.model or await _first_model(client, options)
        date = datetime.now().astimezone()
        path = result_file.result_path(options, options.model or client.model, date)
        tokens = await choose(options.tokenizer, client.question, client.model, options.skip_tokenizer_init)
        said = await _data(options, tokens)
        begins = offsets(options, said)
        await patience.until_good(lambda: _try(client, said[0][0], 0))
        await _warm_up(options, client, said[0][0])
        gc.collect()
        gc.freeze()  # what is there now stays, and need not be looked at while times are taken
        report = await _measured(options, client, said, begins, tokens)
    finally:
        client.close()
    print(report.table())
    if path is not None:
        result_file.write(path, report.saved(), options.append_result)
        print(f"Saved in {path}")
    return report


async def _measured(
    options: Options, client: Client, said: list[Conversation], begins: list[float], tokens: Tokens
) -> Report:
    date = datetime.now().astimezone()
    measured = await measure(options, client, said, begins)
    gc.unfreeze()
    if not measured.interrupted:
        try:
            await _count_texts(measured, tokens)
        except asyncio.CancelledError:  # what was not counted yet has its events as its count
            measured.interrupted = True
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
    metrics = metrics_of(measured, options, tokens.name)
    return Report(options, options.model or client.model, tokens.name, date, measured, metrics)


async def _first_model(client: Client, options: Options) -> str:
    try:
        return str((await client.question("GET", "/v1/models"))["data"][0]["id"])
    except Failed as failed:
        raise ConfigError(
            f"--model: not given, and {options.url} does not report it: {failed.kind}: {failed}"
        ) from None
    except (KeyError, IndexError, TypeError):
        raise ConfigError(f"--model: not given, and {options.url} lists none") from None


async def _data(options: Options, tokens: Tokens) -> list[Conversation]:
    try:
        return await conversations(options, await Writer.with_tokens(tokens))
    except (Failed, KeyError, TypeError) as error:
        raise ConfigError(f"--tokenizer: {tokens.name} failed over the data: {error!r}") from None


class Patience:
    """Asks again until --ready-check-timeout-sec is over; not at all where that is 0. Nothing of it is measured."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._left = options.ready_check_timeout_sec  # for attempts, whatever comes between them

    async def until_good(self, attempt: Callable[[], Awaitable[Failed | None]]) -> None:
        """Raises ConfigError where no attempt ended in time without failure."""
        patience = self._options.ready_check_timeout_sec
        if not patience:
            return
        silence = Failed("timeout", "the response was not complete in time")
        failure: Failed | None = silence
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._left):
                while (failure := await attempt()) is not None:  # noqa: ASYNC110 - a server announces no event
                    await asyncio.sleep(RETRY_SECONDS)
        except TimeoutError:
            last = failure or silence
            raise ConfigError(
                f"--ready-check-timeout-sec {patience:g}: no good response of {self._options.url}: {last.kind}: {last}"
            ) from None
        self._left -= time.perf_counter() - began


async def _listening(client: Client) -> Failed | None:
    """Whether there is a server that is not about to be ready: one that knows no models is none of these."""
    try:
        await client.question("GET", "/v1/models")
    except Failed as failed:
        if failed.kind == "http_503" or not failed.kind.startswith("http_"):
            return failed
    return None


async def _warm_up(options: Options, client: Client, prompt: Prompt) -> None:
    """Says what failed, as a run that was not warmed is another one."""
    limit = asyncio.Semaphore(options.max_concurrency or max(1, options.num_warmups))

    async def warm(number: int) -> Failed | None:
        async with limit:
            return await _try(client, prompt, number)

    ended = await asyncio.gather(*map(warm, range(options.num_warmups)))
    for kind, number in Counter(failed.kind for failed in ended if failed is not None).items():
        print(f"WARNING: of {options.num_warmups} warm-up requests {number} failed: {kind}", file=sys.stderr)


async def _try(client: Client, prompt: Prompt, number: int) -> Failed | None:
    """Numbers below zero: these requests are none of the run's."""
    outcome = Outcome(-1 - number, time.perf_counter(), prompt.tokens)
    await client.ask(outcome, prompt, (), lambda tokens: None)
    return outcome.failure


async def _count_texts(measured: Measured, tokens: Tokens) -> None:
    """Where a server reports no tokens, their number is that of the text's."""
    if not tokens.exact:
        return
    for outcome in measured.completed:
        if outcome.counted_by == "events":
            with contextlib.suppress(Failed):  # the server is gone; then the events are counted, as the report says
                outcome.retokenized_tokens = await tokens.count(outcome.text)


def _allow_many_files() -> None:
    """Each connection is a file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
