"""Simon Willison's `llm`: a command, and a library below it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Endpoint
from scene import Scene

MODELS = """
- model_id: bdh
  model_name: {model}
  api_base: {url}
  api_key_name: openai
  supports_schema: true
  supports_tools: true
- model_id: bdh-text
  model_name: {model}
  api_base: {url}
  api_key_name: openai
  completion: true
"""


@pytest.fixture
def folder(endpoint: Endpoint, tmp_path: Path) -> Path:
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.format(model=endpoint.model, url=endpoint.url))
    (tmp_path / "keys.json").write_text(json.dumps({"openai": endpoint.key}))
    return tmp_path


def llm(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        env={"LLM_USER_PATH": str(folder), "HOME": str(folder), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat(folder: Path) -> None:
    assert llm(folder, "-m", "bdh", "-o", "max_tokens", "20", "-s", "You are Romeo.", "Speak.").strip()
    assert llm(folder, "-m", "bdh", "-o", "max_tokens", "20", "--no-stream", "Speak.").strip()
    assert llm(folder, "-c", "-o", "max_tokens", "20", "Go on.").strip()


def test_completion(folder: Path) -> None:
    assert llm(folder, "-m", "bdh-text", "-o", "max_tokens", "20", "ROMEO:").strip()


def test_an_object(folder: Path) -> None:
    schema = json.dumps(Scene.model_json_schema())
    Scene.model_validate_json(llm(folder, "-m", "bdh", "--schema", schema, "Speak."))
