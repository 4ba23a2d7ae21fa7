"""Runs a server on the command line: its log, what it says once it is ready or cannot start, and its exit code."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import partial

from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.observability import logs
from bdh_batch.settings import Resolved, Settings
from bdh_batch.system.documents import shown

log = logging.getLogger(__name__)

FAILED, CANNOT_START = 1, 2  # exit codes


def reason(error: Exception) -> str:
    return "there is not enough memory" if isinstance(error, MemoryError) else shown(error)


def warn(text: str) -> None:
    print(f"bdh-batch: {text}", file=sys.stderr)


def run_server(resolved: Resolved, serve: Callable[[], Coroutine[None, None, None]], process: str = "") -> int:
    """Serves until a signal, and logs meanwhile as the settings say; `process` is the name of a child."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever sees that SIGTERM is caught knows that both are
        signal.signal(number, lambda *_: os._exit(0))  # until the server has handlers of its own: nothing runs yet
    as_json = set_up_logs(resolved, process)
    import uvloop

    try:
        uvloop.run(serve())
    except (ConfigError, CheckpointError, MemoryError) as error:
        if not as_json:
            raise
        log.critical("%s", reason(error))
        return CANNOT_START
    return leave(0)


def set_up_logs(resolved: Resolved, process: str = "") -> bool:
    """Has this process log as the settings say, and warns of what is wrong with those. Returns whether it is JSON."""
    chosen = resolved.settings.server
    as_json = chosen.log_format == "json"
    logs.set_up(chosen.log_level, as_json, as_json if chosen.access_log is None else chosen.access_log, process)
    for text in resolved.warnings:
        log.warning("%s", text) if as_json else warn(text)
    return as_json


def leave(code: int) -> int:
    """Returns the exit code, if the interpreter can be taken down: not under the feet of a thread that still loads,
    compiles, or hangs in a step."""
    from bdh_batch.system.threads import left_behind

    if left_behind():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


def say_nothing(url: str, model: str) -> None:
    """For a child: its supervisor announces the server."""


def announcement(chosen: Settings) -> Callable[[str, str], None]:
    """Returns what tells that a server is ready: whoever started it, or the log where programs read that."""
    if chosen.server.log_format == "json":
        return lambda url, model: log.info("%s is ready at %s", model, url, extra={"fields": {"url": url}})
    return partial(_announce, chosen.auth.enabled, chosen.server.ui)


def _announce(with_key: bool, with_page: bool, url: str, model: str) -> None:
    prompt = '{"prompt": "ROMEO:\\n", "max_tokens": 200}'
    headers = "-H 'content-type: application/json'" + (" -H 'authorization: Bearer KEY'" if with_key else "")
    try:
        in_browser = with_page and not url.startswith("unix:")
        print(
            f"\n{model} is ready at {url}. {f'Open {url}/ui in a browser, or try' if in_browser else 'Try'}:\n",
            flush=True,
        )
        if url.startswith("unix:"):
            headers, url = f"--unix-socket {shlex.quote(url.removeprefix('unix:'))} {headers}", "http://localhost"
        print(f"  curl -s {url}/v1/completions {headers} -d '{prompt}'\n", flush=True)
    except OSError as error:  # a full disk, or a pipe that nobody reads any more
        log.warning("%s is ready at %s, which cannot be printed: %s", model, url, error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit tries once more, and fails


def unwritten(error: OSError) -> int:
    """The exit code of a command that cannot write; a reader who has left is no fault. Nothing is tried once more.
    Raises `error`, where it is a broken pipe and not that of standard output."""
    if isinstance(error, BrokenPipeError) and not _is_output_broken():
        raise error
    if sys.stdout is not None:
        with contextlib.suppress(io.UnsupportedOperation):  # it is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 0
    warn(reason(error))
    return FAILED


def _is_output_broken() -> bool:
    """Whether the reader of standard output has left."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.flush()
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
    except io.UnsupportedOperation:
        return False
    except OSError:
        return True
    return any(event & select.POLLERR for _, event in watched.poll(0))
