"""Records in this process's memory: what has been used least recently goes where there is no room."""

from __future__ import annotations

from collections import OrderedDict

from bdh_batch.store.record import Record

MOST_RECORDS, MOST_BYTES = 10_000, 256 * 2**20


class MemoryRecords:
    """Keeps records in memory, within bounds on their number and their bytes."""

    def __init__(self, most_records: int = MOST_RECORDS, most_bytes: int = MOST_BYTES) -> None:
        self._records: OrderedDict[tuple[str, str, str], Record] = OrderedDict()
        self._most_records, self._most_bytes = most_records, most_bytes
        self._bytes = 0

    async def put(self, record: Record) -> None:
        key = (record.kind, record.id, record.owner)
        self._forget(key)
        self._records[key] = record
        self._bytes += record.size
        while len(self._records) > self._most_records or self._bytes > self._most_bytes:
            self._forget(next(iter(self._records)))

    async def get(self, kind: str, id: str, owner: str) -> Record | None:
        if (found := self._records.get((kind, id, owner))) is not None:
            self._records.move_to_end((kind, id, owner))
        return found

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        return self._forget((kind, id, owner))

    def _forget(self, key: tuple[str, str, str]) -> bool:
        if (record := self._records.pop(key, None)) is None:
            return False
        self._bytes -= record.size
        return True
