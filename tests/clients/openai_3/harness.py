"""Runs a task of the harness with a model in this process, for a test: with the project's own Python, and behind its
packages those of the harness."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(sys.argv[1])

import lm_eval
from lm_eval.tasks import TaskManager

from bdh_batch import LLM
from bdh_batch.llm.harness import HarnessLM

folder, kind = Path(sys.argv[2]), sys.argv[3]
manager = TaskManager(include_path=str(folder), include_defaults=False)
with LLM() as llm:
    result = lm_eval.simple_evaluate(HarnessLM(llm), tasks=[kind], task_manager=manager, bootstrap_iters=0)
(folder / "result.json").write_text(json.dumps([each["filtered_resps"] for each in result["samples"][kind]]))
