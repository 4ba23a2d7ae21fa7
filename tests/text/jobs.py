"""Jobs for a sandbox that do what they are reported, bad things included."""

from __future__ import annotations

import ctypes
import os
import time

from bdh_batch.text.sandbox_process import Prepared, Refused

held: list[bytes] = []


def prepare(setup: bytes) -> Prepared:
    if setup == b"refuse":
        raise Refused("there is no such setup")
    if setup == b"die":
        os._exit(3)
    return Prepared(lambda job: work(*job.split(b" ", 1)), b"ready: " + setup)


def work(name: bytes, argument: bytes = b"") -> bytes:
    if name == b"echo":
        return argument
    if name == b"pid":
        return str(os.getpid()).encode()
    if name == b"spin":
        while True:
            pass
    if name == b"sleep":
        time.sleep(float(argument))
    if name == b"hold":
        held.append(b"x" * int(argument))
    if name == b"signal":
        os.kill(os.getpid(), int(argument))
    if name == b"recurse":
        ctypes.CDLL(None).qsort(*_endless())
    if name == b"refuse":
        raise Refused(argument.decode())
    if name == b"bug":
        raise ValueError("a bug of ours")
    return b"done"


def _endless() -> tuple[ctypes.Array[ctypes.c_char], int, int, object]:
    """What has the C library sort, and while it compares, sort again."""
    array = ctypes.create_string_buffer(2)

    def compare(first: int, second: int) -> int:
        ctypes.CDLL(None).qsort(array, 2, 1, callback)
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(compare)
    return array, 2, 1, callback
