"""The files of states: what was written is what is read, and what is not a whole state of this engine is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from bdh_batch.engine import state_files
from bdh_batch.engine.filling import CutOff, filled
from bdh_batch.engine.state_files import BadState, Interrupted, read_state, write_state
from bdh_batch.messages import StateLayout
from bdh_batch.scheduler.prefixes import pack
from bdh_batch.system.finite import is_finite
from bdh_batch.system.threads import DaemonThreads

TOKENS = pack([1, 2, 3, 70000])
LAYOUT = StateLayout("model", "F32", (3, 2, 40, 16), 0)
HALF = replace(LAYOUT, dtype="BF16", shape=(3, 2, 2, 40, 16), window=64)

T = TypeVar("T")
Change = Callable[[bytearray], object]


def numbers(layout: StateLayout) -> bytearray:
    bits = np.random.default_rng(0).integers(0, 2**16, layout.size // 2, dtype=np.uint16)
    return bytearray((bits & 0xBFFF).tobytes())  # in both dtypes none is infinite


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "state.safetensors"
    write_state(path, LAYOUT, TOKENS, memoryview(numbers(LAYOUT)))
    return path


def read(path: Path, layout: StateLayout = LAYOUT, tokens: bytes = TOKENS) -> bytearray:
    into = bytearray(layout.size)
    read_state(path, layout, tokens, memoryview(into))
    return into


@pytest.mark.parametrize("layout", [LAYOUT, HALF])
def test_what_is_written_is_read_and_other_libraries_read_it_too(tmp_path: Path, layout: StateLayout) -> None:
    path, state = tmp_path / "state", numbers(layout)
    write_state(path, layout, TOKENS, memoryview(state))
    assert read(path, layout) == state
    assert os.listdir(tmp_path) == ["state"]
    if layout is LAYOUT:
        np.testing.assert_array_equal(load_file(path)["state"], np.frombuffer(state, np.float32).reshape(layout.shape))


def test_who_keeps_a_file_may_add_to_its_metadata(file: Path) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"]["token_ids"] = "1 2 3 70000"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    assert read(file) == numbers(LAYOUT)


THINKING = replace(LAYOUT, hidden=16)
VECTOR = np.arange(16, dtype=np.float32).tobytes()


def test_a_hidden_vector_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    path, state, into, vector = tmp_path / "state", numbers(THINKING), bytearray(THINKING.size), bytearray(64)
    write_state(path, THINKING, TOKENS, memoryview(state), memoryview(VECTOR))
    read_state(path, THINKING, TOKENS, memoryview(into), memoryview(vector))
    assert (into, bytes(vector)) == (state, VECTOR)
    np.testing.assert_array_equal(load_file(path)["hidden"], np.arange(16, dtype=np.float32))
    damaged = bytearray(path.read_bytes())
    for change, reason in (
        (at_the_end(b"\1\2\3\4"), "checksum"),
        (at_the_end(np.float32(np.nan).tobytes()), "checksum"),
        (lambda content: content.__delitem__(slice(-4, None)), "cut off"),
        (in_header(b'"hidden":{"dtype":"F32"', b'"hidden":{"dtype":"F16"'), "bytes of state and hidden"),
    ):
        content = bytearray(damaged)
        change(content)
        path.write_bytes(content)
        with pytest.raises(BadState, match=reason):
            read_state(path, THINKING, TOKENS, memoryview(into), memoryview(vector))


@pytest.mark.parametrize(("written", "wanted"), [(LAYOUT, THINKING), (THINKING, LAYOUT)])
def test_a_state_with_a_vector_is_not_one_without(tmp_path: Path, written: StateLayout, wanted: StateLayout) -> None:
    write_state(tmp_path / "state", written, TOKENS, memoryview(numbers(written)), memoryview(VECTOR))
    with pytest.raises(BadState, match="header"):
        read_state(tmp_path / "state", wanted, TOKENS, memoryview(bytearray(wanted.size)), memoryview(bytearray(64)))


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (replace(LAYOUT, fingerprint="other"), "another model"),
        (replace(LAYOUT, dtype="BF16"), "engine.state_dtype"),
        (replace(LAYOUT, window=64), "attention window"),
        (replace(LAYOUT, shape=(3, 2, 16, 40)), "shape"),
    ],
)
def test_a_state_of_another_engine_is_refused_by_name(file: Path, layout: StateLayout, reason: str) -> None:
    with pytest.raises(BadState, match=reason):
        read(file, layout)


@pytest.mark.parametrize("tokens", [[], [1, 2, 3], [1, 2, 4, 70000], [1, 2, 3, 70000, 5]])
def test_a_state_after_other_tokens_is_refused(file: Path, tokens: list[int]) -> None:
    with pytest.raises(BadState, match="tokens"):
        read(file, tokens=pack(tokens))


def at_the_end(value: bytes) -> Change:
    return lambda content: content.__setitem__(slice(len(content) - len(value), None), value)


def in_header(old: bytes, new: bytes) -> Change:
    def change(content: bytearray) -> None:
        assert old in content[:1024]
        content[:] = content.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (bytearray.clear, "cut off"),
        (lambda content: content.__delitem__(slice(5, None)), "cut off"),
        (lambda content: content.__delitem__(slice(100, None)), "cut off"),
        (lambda content: content.pop(), "cut off"),
        (lambda content: content.append(0), "too much"),
        (at_the_end(b"\1\2\3\4"), "checksum"),
        (at_the_end(np.float32(np.nan).tobytes()), "checksum"),
        (lambda content: content.__setitem__(slice(8), b"\xff" * 8), "header"),  # of 2^64 bytes
        (lambda content: content.__setitem__(slice(8), (2**30).to_bytes(8, "little")), "header"),
        (lambda content: content.__setitem__(slice(8), bytes(8)), "header"),
        (lambda content: content.__setitem__(8, 0xFF), "header"),
        (in_header(b'"__metadata__"', b'"__metaData__"'), "header"),
        (in_header(b'"state":{', b'"State":{'), "header"),
        (in_header(b"[3,2,40,16]", b"[9,9,99,99]"), "shape"),
        (in_header(b"[3,2,40,16]", b"[[[[[]]]]]]"), "header"),
        (in_header(b"[3,2,40,16]", b'"manybytes"'), "shape"),
        (in_header(b'"data_offsets":[0,', b'"data_offsets":[8,'), "bytes"),
        (in_header(b'"tokens":"4"', b'"tokens":"9"'), "tokens"),
        (in_header(b'"format":"1"', b'"format":"2"'), "header"),
        (in_header(b'"xxh3_128":"', b'"xxh3_129":"'), "checksum"),
    ],
)
def test_a_damaged_or_lying_file_is_refused(file: Path, change: Change, reason: str) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    with pytest.raises(BadState, match=reason):
        read(file)


def test_a_header_of_deep_nesting_is_refused(file: Path) -> None:
    text = b"[" * 500_000
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(BadState, match="header"):
        read(file)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "state")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files can have 1,024 bytes, as on a disk that is full."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="large"):
        write_state(tmp_path / "state", LAYOUT, TOKENS, memoryview(numbers(LAYOUT)))
    assert os.listdir(tmp_path) == []


def test_a_state_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    state = numbers(LAYOUT)
    state[-4:] = np.float32(np.nan).tobytes()
    with pytest.raises(BadState, match="finite"):
        write_state(tmp_path / "state", LAYOUT, TOKENS, memoryview(state))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("dtype", "infinite", "size"), [("F32", 0x7F800000, 4), ("BF16", 0x7F80, 2)])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(dtype: str, infinite: int, size: int) -> None:
    def bits(*values: int) -> bytes:
        return b"".join(value.to_bytes(size, "little") for value in values)

    sign = 1 << (8 * size - 1)
    finite = [0, sign, 1, infinite - 1, infinite - 1 | sign]
    assert is_finite(bits(*finite), dtype)
    for bad in (infinite, infinite | sign, infinite + 1, infinite | sign | 1, sign - 1):
        for at in (0, 3, 5):
            assert not is_finite(memoryview(bits(*finite[:at], bad, *finite[at:])), dtype)


def test_a_state_larger_than_a_piece_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "PIECE", 1000)
    monkeypatch.setattr(state_files, "READ", 100)
    write_state(tmp_path / "state", LAYOUT, TOKENS, memoryview(numbers(LAYOUT)))
    assert read(tmp_path / "state") == numbers(LAYOUT)
    threads, go_on, into = DaemonThreads(1, "helper"), Event(), bytearray(LAYOUT.size)
    threads.submit(go_on.wait)
    try:
        read_state(tmp_path / "state", LAYOUT, TOKENS, memoryview(into), helper=threads)
    finally:
        go_on.set()
    assert into == numbers(LAYOUT), "without a helper that is busy"
    into = bytearray(LAYOUT.size)
    read_state(tmp_path / "state", LAYOUT, TOKENS, memoryview(into), helper=AtOnce(tmp_path / "state"))
    assert into == numbers(LAYOUT), "by the helper alone"


class AtOnce:
    """Does what it is given at once, then empties the file: nobody can read anything there that it has not read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def submit(self, function: Callable[..., T], /, *arguments: Any) -> Future[T]:
        future: Future[T] = Future()
        future.set_result(function(*arguments))
        os.truncate(self._path, 0)
        return future


@pytest.mark.parametrize("helped", [True, False])
def test_a_file_that_is_cut_off_while_it_is_read_is_read_no_further(tmp_path: Path, helped: bool) -> None:
    (tmp_path / "state").write_bytes(bytes(range(100)))
    memory, threads = memoryview(bytearray(160)), DaemonThreads(1, "helper") if helped else None
    pieces = [memory[at : at + 40] for at in range(0, 160, 40)]
    read: list[bytes] = []
    with (tmp_path / "state").open("rb") as file, pytest.raises(CutOff):
        read.extend(map(bytes, filled(file.fileno(), pieces, 5, threads)))
    assert read == [bytes(range(5, 45)), bytes(range(45, 85))]


def test_a_state_that_is_not_wanted_any_more_is_read_no_further(tmp_path: Path) -> None:
    write_state(tmp_path / "state", LAYOUT, TOKENS, memoryview(numbers(LAYOUT)))
    goes_on = iter([False])  # it is asked once
    with pytest.raises(Interrupted):
        read_state(
            tmp_path / "state", LAYOUT, TOKENS, memoryview(bytearray(LAYOUT.size)), goes_on=lambda: next(goes_on)
        )


KILLED = """
import sys, time
from pathlib import Path
from bdh_batch.engine import state_files
from tests.model.test_state_files import LAYOUT, TOKENS, numbers
def halting(file, piece):
    print("written", flush=True)
    original(file, piece[:len(piece) // 2])
    time.sleep(600)
original, state_files._write = state_files._write, halting
state_files.write_state(Path(sys.argv[1]), LAYOUT, TOKENS, memoryview(numbers(LAYOUT)))
"""


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "state")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".partial")
