"""The commands `bdh-batch state list`, `export` and `import`: they ask a server that runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator

from bdh_batch.client.client import BDHClient
from bdh_batch.client.errors import ClientError
from bdh_batch.client.states import State

PAGE = 100
CANNOT_START = 2  # the exit code


def run(options: argparse.Namespace) -> int:
    """Runs the command that was given; returns its exit code."""
    try:
        opened = BDHClient(options.base_url, options.api_key)
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        print(f"bdh-batch: --{name.replace('_', '-')}: {problem}", file=sys.stderr)
        return CANNOT_START
    try:
        with opened as client:
            if options.action == "list":
                for state in _all(client):
                    print(json.dumps(state.to_dict()) if options.json else _line(state))
            elif options.action == "export":
                client.states.download(options.id, options.file)
                print(f"{options.id} is written to {options.file}", file=sys.stderr)
            else:
                print(client.states.upload(options.file, model=options.model, ttl=options.ttl).id)
    except (ClientError, OSError) as error:
        print(f"bdh-batch: {error}", file=sys.stderr)
        return 1
    return 0


def _all(client: BDHClient) -> Iterator[State]:
    page = client.states.list(limit=PAGE)
    while page:
        yield from page
        page = client.states.list(limit=PAGE, after=page[-1].id)


def _line(state: State) -> str:
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.created_at))
    named = "  ".join(f"{name}={value}" for name, value in state.metadata.items())
    return f"{state.id}  {state.model}  {created}  {state.tokens} tokens  {state.bytes} bytes  {named}".rstrip()
