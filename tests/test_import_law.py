"""Which room may import which, and how large rooms and modules may be. A room that is missing from the table is an
error, too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bdh_batch"
SHARED = {"errors", "messages", "system"}
FRONT_DOOR = [PACKAGE / "http", *(each.parent for each in (PACKAGE / "http").glob("*/__init__.py"))]
STDLIB = set(sys.stdlib_module_names)
MOST_LINES, MOST_FILES = 400, 8
TABLES = {"settings.py"}  # long, but read by looking something up

# room: (rooms of the package it may import, packages it may import)
LAW: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "messages": ({"errors"}, {"msgspec"}),
    "system": ({"errors"}, {"google", "numpy", "platformdirs", "torch", "yaml"}),
    # Of upstreams no more than what the settings say of them.
    "settings": ({"errors", "system", "upstreams"}, {"pydantic", "pydantic_core", "yaml"}),
    "text": (SHARED, {"jinja2", "llguidance", "orjson", "tokenizers"}),
    "kernels": ({"errors"}, {"torch", "numpy", "numba", "llvmlite", "triton"}),
    "checkpoint": ({"errors", "system", "kernels"}, {"torch", "numpy", "safetensors"}),
    "registry": (
        {"errors", "system", "checkpoint", "__init__"},
        {"httpx", "huggingface_hub", "pydantic", "tqdm"},
    ),
    "scheduler": ({"errors", "messages"}, set()),
    "engine": (SHARED | {"scheduler", "kernels", "checkpoint", "settings"}, {"torch", "numpy", "xxhash"}),
    "backends": (SHARED | {"engine", "scheduler", "text"}, {"msgspec"}),
    "upstreams": (
        SHARED | {"backends", "text"},
        {"google", "grpc", "httpcore", "httpx", "httpx_sse", "orjson", "pydantic", "pydantic_core", "selectolax"}
        | {"tritonclient"},
    ),
    "observability": (SHARED | {"engine", "scheduler", "backends", "__init__"}, {"opentelemetry", "prometheus_client"}),
    "http": (
        SHARED | {"backends", "store", "text", "settings", "observability", "ui", "__init__"},
        {"starlette", "uvicorn", "httptools", "numpy", "orjson", "pydantic", "pydantic_core", "redis", "xxhash"},
    ),
    "ui": (set(), set()),
    "store": (
        {"errors", "messages", "backends", "settings", "system"},
        {"cachetools", "cryptography", "fsspec", "msgspec", "redis", "sqlalchemy"},
    ),
    "kserve": (
        SHARED | {"http", "observability", "settings"},
        {"google", "grpc", "grpc_health", "grpc_reflection", "starlette", "tritonclient"},
    ),
    "client": (set(), {"openai", "prometheus_client"}),
    # A server is measured over HTTP, whoever wrote it: nothing of this one's is at hand.
    "bench": ({"errors", "__init__"}, {"httptools", "orjson", "tokenizers", "uvloop"}),
    "plan": ({"errors", "system", "checkpoint", "text"}, {"torch"}),
    # What is wired together, and nowhere else.
    "processes": (
        SHARED
        | {"http", "kserve", "backends", "engine", "kernels", "text", "settings"}
        | {"observability", "registry", "store", "upstreams", "__init__"},
        {"platformdirs", "pydantic", "torch"},
    ),
    # The same, on clusters of others.
    "deploy": (
        {"errors", "backends", "http", "observability", "processes", "settings", "store", "system"},
        {"ray", "starlette"},
    ),
    # A way in beside HTTP: it makes the same bodies, which the same code serves.
    "llm": (
        SHARED | {"backends", "http", "processes", "settings", "store", "text"},
        {"lm_eval", "orjson", "starlette", "tqdm", "uvloop"},
    ),
    "shell": (
        {"errors", "http", "llm", "processes", "settings", "system"},
        {"numpy", "orjson", "starlette", "tqdm", "uvloop"},
    ),
    # A command of its own: the engine's parts without an engine.
    "neurons": (
        {"errors", "settings", "checkpoint", "kernels", "engine", "processes", "text"},
        {"numpy", "orjson", "torch", "tqdm"},
    ),
    "server": ({"errors", "processes", "engine", "settings", "observability"}, set()),
    "launch": ({"errors", "observability", "settings", "system"}, {"uvloop"}),
    "cli": (
        {"errors", "system", "settings", "http", "processes", "server", "bench", "plan", "registry", "__init__"}
        | {"client", "deploy", "launch", "neurons", "shell"},
        {"uvloop"},
    ),
    "__main__": ({"cli"}, set()),
    "__init__": (set(), set()),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def statements(module: Path) -> list[ast.Import | ast.ImportFrom]:
    """Those that import, also inside functions."""
    return [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(module: Path) -> Iterator[str]:
    for node in statements(module):
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


def may_import(room: str, name: str) -> bool:
    rooms, packages = LAW[room]
    top = name.split(".")[0]
    return target(name) in rooms | {room} if top == "bdh_batch" else top in packages | STDLIB


def test_a_module_imports_only_what_its_room_may() -> None:
    found = [(module, room_of(module), name) for module in modules() for name in imports(module)]
    assert len(found) > len(modules()) > 100
    assert [
        f"{module}: {room} must not import {name}" for module, room, name in found if not may_import(room, name)
    ] == []


def name_of(module: Path) -> str:
    return ".".join(module.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_leads_back_to_itself() -> None:
    """Imports for types count, and those inside functions."""
    names = {name_of(module) for module in modules()}
    graph = {
        name_of(module): {name for name in names_in(module) if name in names and name != name_of(module)}
        for module in modules()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def names_in(module: Path) -> Iterator[str]:
    """All that an import may name: `from a.b import c` is a.b, or its module c."""
    for node in statements(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [each for each in below if (PACKAGE.parent / f"{each.replace('.', '/')}.py").is_file()]
            yield from known or [node.module]


def test_a_module_is_read_in_one_sitting() -> None:
    lines = {str(module.relative_to(PACKAGE)): len(module.read_text().splitlines()) for module in modules()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES and name not in TABLES} == {}


def test_a_room_of_the_front_door_has_few_modules() -> None:
    rooms = {folder: [each for each in folder.glob("*.py") if each.stem != "__init__"] for folder in FRONT_DOOR}
    assert len(rooms) > 5
    assert {str(folder): len(files) for folder, files in rooms.items() if len(files) > MOST_FILES} == {}


def test_the_scheduler_knows_no_clock_and_no_thread() -> None:
    known = {name.split(".")[0] for module in (PACKAGE / "scheduler").glob("*.py") for name in imports(module)}
    assert known.isdisjoint({"asyncio", "threading", "time", "torch", "numpy"})
