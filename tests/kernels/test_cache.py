"""Compiled kernels are kept where that can be done; whatever is wrong with what was kept, they compute the same."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
import pytest

from bdh_batch.kernels import cache


def twice(number: int) -> int:
    return 2 * number


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled functions are kept, once there are some."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture(autouse=True)
def not_yet_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", [])


def hits(sources: tuple[str, ...] = ("as it is",)) -> int:
    """How often a fresh function was found compiled, called once. What it computes must be right."""
    dispatcher: Any = numba.njit(twice)
    cache.keep_compiled(dispatcher, sources)
    assert dispatcher(21) == 42
    return sum(dispatcher.stats.cache_hits.values())


def files(folder: Path, suffix: str) -> Iterator[Path]:
    yield from folder.rglob(f"*{suffix}")


def signed(body: bytes) -> bytes:
    """As a file of the cache ends: its digest is right."""
    return body + hashlib.sha256(body).digest()


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one bit": flip,
    "zeros": lambda content: bytes(len(content)),
    "nonsense": lambda content: b"nonsense",
    "another version": lambda content: signed(b"cbdh_batch.kernels.simd\nNoSuchType\n."),
    "another package": lambda content: signed(b"cno_such_package\nNoSuchType\n."),
}


def test_a_function_is_compiled_once_until_its_sources_change(folder: Path) -> None:
    assert [hits(), hits(), hits(("changed",)), hits(("changed",))] == [0, 1, 0, 1]


def test_copies_of_the_same_sources_share_what_was_compiled(tmp_path: Path) -> None:
    locate = cache._Provided.get_suitable_cache_subpath
    for name, text in (("one/kernels", "a = 1"), ("two/kernels", "a = 1"), ("three/kernels", "a = 2")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "module.py").write_text(text)
    one, two, three = (locate(str(tmp_path / name / "kernels" / "module.py")) for name in ("one", "two", "three"))
    assert one == two != three


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_what_is_damaged_is_compiled_again_and_kept_again(folder: Path, suffix: str, damage: str) -> None:
    hits()
    (file,) = files(folder, suffix)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert [hits(), hits()] == [0, 1]


def test_a_cache_that_was_deleted_is_made_again(folder: Path) -> None:
    hits()
    shutil.rmtree(folder)
    assert [hits(), hits()] == [0, 1]


def test_a_full_disk_is_told_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache._Files, "_open_for_write", full)
    assert [hits(), hits()] == [0, 0]
    assert len(caplog.messages) == 1
    assert "No space left on device" in caplog.text
    assert "NUMBA_CACHE_DIR" in caplog.text


def unwritable(self: Any) -> None:
    raise PermissionError(13, "Permission denied")


def test_without_a_folder_that_can_be_written_functions_are_compiled_every_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache._Result, "_locator_classes", [])
    assert [hits(), hits()] == [0, 0]
    assert len(caplog.messages) == 1
    assert cache.NO_FOLDER in caplog.text


def test_a_folder_that_can_only_be_read_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hits()
    assert not caplog.messages
    for locator in cache._Result._locator_classes:
        if not issubclass(locator, cache._Readable):
            monkeypatch.setattr(locator, "ensure_cache_path", unwritable)
    assert [hits(), hits()] == [1, 1]
    assert len(caplog.messages) == 1


def test_triton_gets_a_new_folder_where_its_own_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert cache.choose_triton_cache({"TRITON_CACHE_DIR": str(tmp_path / "own")}) is None
    assert cache.choose_triton_cache({"TRITON_HOME": str(tmp_path)}) is None
    assert not caplog.messages
    (tmp_path / "file").touch()
    other = cache.choose_triton_cache({"TRITON_HOME": str(tmp_path / "file")})
    assert other is not None
    assert Path(other).is_dir()
    assert len(caplog.messages) == 1
    Path(other).rmdir()
