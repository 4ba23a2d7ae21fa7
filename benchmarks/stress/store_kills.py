"""Processes that store conversations are killed at random moments: is all there that they were told is stored?

    python -m benchmarks.stress.store_kills               # 200 kills, some minutes
    python -m benchmarks.stress.store_kills --kills 10

A process puts records, gives them states, and deletes some of them, eight at a time, and says what was acknowledged. It
is killed; the store is opened, and compared with what was said: no record or state may be missing or damaged, none that
was deleted may be there, no file without a record. Half of the stores are encrypted. Writes `store_kills.json`; exit
code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import text

from bdh_batch.settings import Store as Chosen
from bdh_batch.store.opening import open_store
from bdh_batch.store.postgresql import Postgresql
from bdh_batch.store.records import Record, Store
from bdh_batch.store.sqlite import Sqlite

KIND, OWNER = "response", "me"
AT_A_TIME = 8
STATE_REPEATS = 10_000  # of a record's id, in its state
MOST_LINES = 40  # that are said before it is due
LONGEST_SECONDS = 0.4  # from then to the kill
KEY = base64.b64encode(bytes(range(32))).decode()


def opened(path: Path, encrypted: bool, url: str | None = None) -> Store:
    key = KEY if encrypted else None
    return open_store(Chosen(path=path, url=url, max_records=10**6, max_bytes=2**40, encryption_key=key))


def state_of(id: str) -> bytes:
    return id.encode() * STATE_REPEATS


async def write(path: Path, first: int, encrypted: bool, url: str | None) -> None:
    """Stores conversations until it is killed. Says what was acknowledged, a line each."""
    store = opened(path, encrypted, url)

    async def converse(number: int) -> None:
        while True:
            record = Record(f"r{number}", KIND, OWNER, time.time(), body=b'{"number": %d}' % number, tokens=bytes(1000))
            await store.put(record)
            print("put", record.id, flush=True)
            new = store.new_state()
            new.path.write_bytes(state_of(record.id))
            await store.adopt(new.id, record)
            print("state", record.id, flush=True)
            if number % 3 == 0:
                print("deleting", record.id, flush=True)
                await store.delete(KIND, record.id, OWNER)
                print("deleted", record.id, flush=True)
            number += AT_A_TIME

    await asyncio.gather(*(converse(first + each) for each in range(AT_A_TIME)))


@dataclass
class Kills:
    """Kills processes that write to one store, and looks what is left of what they were told.

    Args:
        url: of a database that is shared; else it is SQLite's.

    Attributes:
        wrong: what was not as it should be.
    """

    path: Path
    encrypted: bool = False
    random: random.Random = field(default_factory=random.Random)
    said: dict[str, set[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    opening_seconds: list[float] = field(default_factory=list)
    url: str | None = None

    async def once(self, number: int) -> None:
        """One process, its end, and a look at the store."""
        await asyncio.to_thread(self._kill, number * 1_000_000)
        began = time.perf_counter()
        store = opened(self.path, self.encrypted, self.url)
        self.opening_seconds.append(time.perf_counter() - began)
        try:
            await self._compare(store)
        finally:
            await store.close()
        self._look_at_files()

    def _kill(self, first: int) -> None:
        command = [sys.executable, "-m", "benchmarks.stress.store_kills", "--write", str(self.path), str(first)]
        command += [str(int(self.encrypted)), self.url or ""]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with process, closing(process.stdout) as lines:  # type: ignore[type-var]
            assert lines is not None
            begun = [lines.readline() for _ in range(self.random.randrange(1, MOST_LINES))]  # however slow it is
            time.sleep(self.random.uniform(0, LONGEST_SECONDS))
            process.send_signal(signal.SIGKILL)
            for line in [*begun, *lines]:  # with what it had said before it was killed
                if line.endswith("\n"):
                    what, _, id = line.strip().partition(" ")
                    self.said.setdefault(what, set()).add(id)

    async def _compare(self, store: Store) -> None:
        leaving = self.said.get("deleting", set())
        for id in self.said.get("put", set()):
            record = await store.get(KIND, id, OWNER)
            if record is None:
                if id not in leaving:
                    self.wrong.append(f"{id} is missing")
            elif id in self.said.get("deleted", set()):
                self.wrong.append(f"{id} was deleted, and is there")
            elif id in self.said.get("state", set()) and await content(store, record) != state_of(id):
                self.wrong.append(f"the state of {id} is missing or damaged")
        for id in list(leaving):  # the next looks need not be for them
            for known in self.said.values():
                known.discard(id)
            await store.delete(KIND, id, OWNER)

    def _look_at_files(self) -> None:
        driver = Sqlite(self.path / "records.sqlite3") if self.url is None else Postgresql(self.url, 60.0)
        with driver.reading.connect() as database:
            if self.url is None and (verdict := database.exec_driver_sql("PRAGMA integrity_check").scalar()) != "ok":
                self.wrong.append(f"the database: {verdict}")
            rows = set(database.execute(text("SELECT id FROM states")).scalars())
            # Where files are not part of transactions, what a killed process has begun is on a list.
            begun = set(database.execute(text("SELECT id FROM gone UNION SELECT id FROM coming")).scalars())
        driver.close()
        files = {path.name.partition(".")[0] for path in (self.path / "states").iterdir()}
        self.wrong += [f"{id} is an orphan" for id in (files - begun) ^ rows]
        self.wrong += [f"{path} is left" for path in (self.path / "work").iterdir()]


async def content(store: Store, record: Record) -> bytes | None:
    """The state of `record` as its file has it, or None where it has none."""
    file = await store.state_file(record)
    if file is None:
        return None
    try:
        return file.path.read_bytes()
    finally:
        file.close()


async def run(kills: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {"kills": kills, "acknowledged": 0, "wrong": []}
    seconds = []
    for encrypted in (False, True):
        with tempfile.TemporaryDirectory(prefix="store-kills-") as folder:
            killing = Kills(Path(folder), encrypted, random.Random(seed + encrypted))
            for number in range(kills // 2):
                await killing.once(number)
                if number % 10 == 9:
                    print(f"  {number + 1} kills, {len(killing.said['put'])} records", flush=True)
            found["acknowledged"] += sum(len(ids) for ids in killing.said.values())
            found["wrong"] += killing.wrong
            seconds += killing.opening_seconds
    return {**found, "slowest_opening_s": max(seconds)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.stress.store_kills",
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder; else benchmarks/results")
    parser.add_argument("--write", nargs=4, metavar=("PATH", "FIRST", "ENCRYPTED", "URL"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.write is not None:
        path, first, encrypted, url = chosen.write
        asyncio.run(write(Path(path), int(first), encrypted == "1", url or None))
        return
    from benchmarks.report import report_head, results_folder, write_report  # which the processes that write do without

    head = report_head(["msgspec"])
    found = asyncio.run(run(chosen.kills, chosen.seed))
    write_report((chosen.out or results_folder()) / "store_kills.json", {**head, **found})
    print(json.dumps(found))
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
