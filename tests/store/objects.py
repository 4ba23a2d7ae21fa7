"""Runs an object store: moto's S3, over HTTP at a port of this machine, which can be made to fail."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from moto import settings
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.iam.models import iam_backends
from moto.moto_server.werkzeug_app import create_backend_app
from moto.s3.models import S3Backend, s3_backends
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.conftest import HANG_SECONDS, free_port

REGION = "us-east-1"
BUCKET = "states"
USER = "bdh"
ALLOWED = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


class Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Says nothing."""


class ObjectServer:
    """An S3 server with one bucket.

    Attributes:
        held: is set when a request is held.
        key, secret: of its one user.
    """

    def __init__(self) -> None:
        users = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
        users.create_user(REGION, USER)
        users.put_user_policy(USER, "all", json.dumps(ALLOWED))
        self._key = users.create_access_key(USER)
        self.key, self.secret = self._key.access_key_id, self._key.secret_access_key
        self.port = free_port()
        self.held = threading.Event()
        self._holds = ""  # which part of what comes for requests is held: "responses" or "bodies"
        self._goes = threading.Event()
        self._app = create_backend_app("s3")
        self._server: Any = None
        self._backend.create_bucket(BUCKET, REGION)

    @property
    def environment(self) -> dict[str, str]:
        """What clients need."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def _backend(self) -> S3Backend:
        return s3_backends[DEFAULT_ACCOUNT_ID]["aws"]

    def empty(self) -> None:
        """Removes all objects."""
        self._backend.buckets[BUCKET].keys.clear()

    def names(self) -> list[str]:
        """Of all objects in the bucket."""
        return sorted(self._backend.buckets[BUCKET].keys)

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self.port, self._respond, threaded=True, request_handler=Silent)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Connections are refused from now on."""
        self._release()
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def failing(self, how: str) -> Iterator[None]:
        """Within it, it "refuses", "says nothing", "has no bucket" or "refuses the key"."""
        with contextlib.ExitStack() as ends:
            match how:
                case "refuses":
                    self.stop()
                    ends.callback(self.start)
                case "says nothing":
                    ends.enter_context(self.holding("responses"))
                case "has no bucket":
                    buckets, accounts = self._backend.buckets, s3_backends.bucket_accounts
                    ends.callback(buckets.__setitem__, BUCKET, buckets.pop(BUCKET))
                    ends.callback(accounts.__setitem__, BUCKET, accounts.pop(BUCKET))
                case "refuses the key":
                    ends.enter_context(self.checking())
                    ends.callback(setattr, self._key, "secret_access_key", self.secret)
                    self._key.secret_access_key = "another"
                case _:
                    raise ValueError(how)
            yield

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Within it, requests have to be signed by its user."""
        usual = settings.INITIAL_NO_AUTH_ACTION_COUNT
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
        try:
            yield
        finally:
            settings.INITIAL_NO_AUTH_ACTION_COUNT = usual

    @contextlib.contextmanager
    def holding(self, what: str) -> Iterator[None]:
        """Within it, requests are taken, and get no response, or only a part of its body."""
        self.held.clear()
        self._goes.clear()
        self._holds = what
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        self._holds = ""
        self._goes.set()

    def _respond(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self._holds == "responses":
            self._hold()
        found: Iterable[bytes] = self._app(environ, start_response)
        return self._slowly(found) if self._holds == "bodies" else found

    def _slowly(self, body: Iterable[bytes]) -> Iterator[bytes]:
        for piece in body:
            yield piece[: len(piece) // 2]
            self._hold()
            yield piece[len(piece) // 2 :]

    def _hold(self) -> None:
        self.held.set()
        self._goes.wait(HANG_SECONDS)
