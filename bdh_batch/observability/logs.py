"""How a process logs: in text for people, or in JSON for programs that collect logs, one line an event.

Imports nothing of the package: a supervisor, which stays small, logs so, too.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType

ACCESS = "bdh_batch.access"  # the logger of requests that have ended
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Writes an event as one line of JSON: time, level, logger, message, process, and what its `fields` say.

    Fields are those that this package gives an event, as in `log.info(…, extra={"fields": {"request_id": id}})`. What
    else libraries attach to theirs is left out.

    Args:
        process: the name of this process among several of one server, as in metrics; or an empty string.
    """

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = {"process": process} if process else {}

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            "pid": record.process,
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            event |= {"error": record.exc_info[0].__name__, "traceback": self.formatException(record.exc_info)}
        if record.stack_info:
            event["stack"] = self.formatStack(record.stack_info)
        return json.dumps(event, default=str)  # in ASCII: half a character of a client's is no fault here


def set_up(level: str, as_json: bool, access: bool, process: str = "") -> None:
    """Has this process log to standard error.

    Args:
        level: the least that is logged: debug, info, warning or error.
        as_json: one line of JSON an event, uncaught exceptions and warnings included; else text.
        access: whether requests are logged once they have ended.
        process: see `JsonFormatter`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(process) if as_json else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("httpx").setLevel(max(logging.WARNING, logging.root.level))  # it logs every request
    logging.getLogger(ACCESS).setLevel(logging.NOTSET if access else logging.CRITICAL)
    if as_json:
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = _uncaught_in_thread


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger("bdh_batch").critical("the process ends", exc_info=(kind, error, traceback))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = "" if args.thread is None else args.thread.name
        found = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger("bdh_batch").error("the thread %s has ended", name, exc_info=found)
