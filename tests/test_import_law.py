"""Which room may import which. A room that is missing from the table is an error, too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bdh_batch"
SHARED = {"errors", "messages", "threads"}
STDLIB = set(sys.stdlib_module_names)

# room: (rooms of the package it may import, packages it may import)
LAW: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "messages": ({"errors"}, set()),
    "documents": ({"errors"}, set()),
    "yaml_documents": ({"documents"}, {"yaml"}),
    "machine": (set(), set()),
    "threads": (set(), set()),
    "keys": ({"errors"}, {"pydantic"}),
    "settings": ({"errors", "documents", "yaml_documents"}, {"pydantic", "pydantic_core", "yaml"}),
    "text": (SHARED | {"text", "documents"}, {"jinja2", "llguidance", "orjson", "tokenizers"}),
    "kernels": (SHARED | {"kernels"}, {"torch", "numpy", "numba", "llvmlite", "triton"}),
    "model": (SHARED | {"kernels", "model", "documents", "machine"}, {"torch", "numpy", "safetensors"}),
    "scheduler": (SHARED | {"scheduler"}, set()),
    "backends": (SHARED | {"backends", "scheduler", "text"}, set()),
    "telemetry": (SHARED | {"scheduler"}, {"prometheus_client"}),
    "spans": (SHARED | {"backends", "scheduler", "__init__"}, {"opentelemetry"}),
    "http": (
        SHARED | {"http", "backends", "text", "settings", "telemetry", "spans", "keys", "__init__"},
        {"starlette", "uvicorn", "httptools", "orjson", "pydantic", "pydantic_core", "redis"},
    ),
    "client": (set(), {"openai", "prometheus_client"}),
    # A server is measured over HTTP, whoever wrote it: nothing of this one's is at hand.
    "bench": ({"errors", "__init__"}, {"httptools", "orjson", "tokenizers", "uvloop"}),
    "offline": ({"errors", "model", "text"}, {"torch"}),
    "plan": ({"errors", "documents", "model", "offline"}, {"torch"}),
    "cli": ({"errors", "documents", "settings", "keys", "offline", "runtime", "bench", "plan", "__init__"}, {"uvloop"}),
    "runtime": (
        SHARED
        | {"http", "backends", "scheduler", "model", "kernels", "text", "settings", "telemetry", "spans", "keys"}
        | {"documents", "machine", "__init__"},
        {"torch", "pydantic"},
    ),
    "__main__": ({"cli"}, set()),
    "__init__": (set(), set()),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            if node.module == "bdh_batch":
                yield from (f"bdh_batch.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def target(name: str) -> str:
    """The room of `bdh_batch.room.module`; a name of the package itself is its `__init__`."""
    room = name.split(".")[1]
    return room if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file() else "__init__"


@pytest.mark.parametrize("module", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may(module: Path) -> None:
    room = room_of(module)
    rooms, packages = LAW[room]
    for name in imports(module):
        top = name.split(".")[0]
        if top == "bdh_batch":
            assert target(name) in rooms | {room}, f"{room} must not import {name}"
        else:
            assert top in packages | STDLIB, f"{room} must not import {name}"


def test_only_the_worker_and_the_mailbox_of_the_scheduler_know_asyncio() -> None:
    users = {module.stem for module in (PACKAGE / "scheduler").glob("*.py") if "asyncio" in set(imports(module))}
    assert users <= {"worker", "mailbox"}
