"""EleutherAI's harness, with a task of its own: log-likelihoods, rolling ones, and text until a stop string. Over HTTP,
and with the model in the process of the harness."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from conftest import ROOT, START_SECONDS, Endpoint
from lm_eval.tasks import TaskManager

TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_choice: ['to be', 'a horse']\ndoc_to_target: 0\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: byte_perplexity}]\n",
    "until": "output_type: generate_until\ndoc_to_target: a\n"
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 20, temperature: 0}\nmetric_list: [{metric: exact_match}]\n",
}


@pytest.mark.parametrize("kind", TASKS)
def test_task(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", endpoint.key)
    lines = [json.dumps({"text": text}) for text in ("Or not", "My kingdom for", "Speak,")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\ntest_split: test\n"
    text = "" if kind == "rolling" else "{{text}}"
    (tmp_path / "task.yaml").write_text(f"task: {kind}\n{data}doc_to_text: '{text}'\n{TASKS[kind]}")
    result = lm_eval.simple_evaluate(
        "local-completions",
        model_args={
            "model": endpoint.model,
            "base_url": f"{endpoint.url}/completions",
            "tokenizer_backend": "remote",
            "auth_token": endpoint.key,
            "custom_prefix_token_id": 10,  # the prefix_token_id of /tokenizer_info, which the harness does not read
            "num_concurrent": 2,
            "max_length": 4096,
        },
        tasks=[kind],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    over_http = [sample["filtered_resps"] for sample in result["samples"][kind]]
    assert len(over_http) == 3
    in_process = evaluated_in_process(tmp_path, kind)
    for one, other in zip(flat(in_process), flat(over_http), strict=True):
        assert math.isclose(one, other, abs_tol=1e-3) if isinstance(other, float) else one == other


def evaluated_in_process(folder: Path, kind: str) -> list[Any]:
    """The responses of a task with `LLM`."""
    command = [
        os.environ["BDH_PYTHON"],
        Path(__file__).parent / "harness.py",
        sysconfig.get_path("purelib"),
        folder,
        kind,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode == 0, done.stderr
    responses: list[Any] = json.loads((folder / "result.json").read_text())
    return responses


def flat(value: object) -> list[Any]:
    return [part for each in value for part in flat(each)] if isinstance(value, list | tuple) else [value]
