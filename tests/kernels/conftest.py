from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from bdh_batch.kernels.cache import MODULES, digest_of
from benchmarks import ROOT

COMPILING = pytest.StashKey[subprocess.Popen[str]]()
SOURCES = [*MODULES, ROOT / "benchmarks" / "engine" / "gpu_compile.py"]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begins to compile the Triton kernels, for `test_aot.py`, beside the first tests, which leave a core idle; but not
    where tests run beside tests.

    Where nothing has changed since the last run, its results stand. Else Triton's cache has what is as it was; it knows
    a kernel by its source, the functions it calls, its constants and options, and the compiler.
    """
    config = session.config
    if config.option.collectonly or not any(item.path.name == "test_aot.py" for item in session.items):
        return
    if not hasattr(config, "workerinput") and last_results(config) is None:
        begin_to_compile(config)


def pytest_itemcollected(item: pytest.Item) -> None:
    """On a GPU, draws add up rows as torch does it there, of which it warns under `_poisoned_memory`."""
    item.add_marker(pytest.mark.filterwarnings("ignore:.* does not have a deterministic implementation:UserWarning"))


def begin_to_compile(config: pytest.Config) -> None:
    folder = kept_in(config)
    config.stash[COMPILING] = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine.gpu_compile"],
        env=os.environ
        | ({"TRITON_CACHE_DIR": str(folder)} if folder else {})
        | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"},
        cwd=config.rootpath,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """Where the tests ended before they came to it, it ends with its children."""
    process = config.stash.get(COMPILING, None)
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def kept_in(config: pytest.Config) -> Path | None:
    """The folder of what is compiled: Triton's, which checkouts may share, else one of this checkout."""
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return Path(folder)
    return config.cache.mkdir("triton") if config.cache else None


def results_file(config: pytest.Config) -> Path | None:
    """Where the results are kept, by the sources that they are of."""
    sources = "-".join([version("triton"), version("torch"), digest_of(*SOURCES)])
    return folder / f"ahead-of-time-{sources}.json" if (folder := kept_in(config)) else None


def last_results(config: pytest.Config) -> str | None:
    """What was printed of the same sources by the same compiler, if that is known."""
    file = results_file(config)
    return file.read_text() if file and file.exists() else None


@pytest.fixture(scope="session")
def compiled_ahead(pytestconfig: pytest.Config) -> str:
    """What `benchmarks.engine.gpu_compile` prints."""
    known = last_results(pytestconfig)
    if known is not None:
        return known
    if COMPILING not in pytestconfig.stash:
        begin_to_compile(pytestconfig)
    process = pytestconfig.stash[COMPILING]
    output, problem = process.communicate()
    assert process.returncode == 0, problem
    if file := results_file(pytestconfig):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(output)
        partial.replace(file)  # whole, whoever reads it
    return output


@pytest.fixture(scope="session", autouse=True)
def _interpreter_works_out_once_what_stays() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from tests.kernels.interpreter import remember

    with pytest.MonkeyPatch.context() as patch:
        remember(patch)
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What torch.empty gives is NaN: an output that is not written shows."""
    # Without this, the next line has no effect.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
