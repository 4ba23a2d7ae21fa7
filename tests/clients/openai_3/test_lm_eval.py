"""EleutherAI's harness, with a task of its own: log-likelihoods, rolling ones, and text until a stop string."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval
import pytest
from conftest import Endpoint
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
    assert len(result["samples"][kind]) == 3
