"""The systems under test: a server, by `bench serve` over HTTP, and the engine in process.

Each takes a load and how many streams it has at once, and returns what `bench serve` calls `output_throughput` and
`request_throughput`; a server, all else that it saves. The program ends where a completion is missing or not whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from bdh_batch import settings
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.loading import LoadedEngine, start_worker
from bdh_batch.engine.worker import Worker
from bdh_batch.messages import Delta
from bdh_batch.observability.engine_metrics import EngineMetrics
from bdh_batch.scheduler.sequence import Client, Sequence as Generation
from benchmarks import ROOT
from benchmarks.engine.play import Silent
from benchmarks.engine.static import Job
from benchmarks.server import loads
from benchmarks.server.loads import Request

SECONDS = 600  # of one run; what takes longer hangs
TEMPERATURE = 0.8
Figures = dict[str, Any]
System = Callable[[Sequence[Request], int], Figures]  # a load, and how many streams it has at once


class Remote:
    """A server, measured by `bench serve`."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __call__(self, load: Sequence[Request], streams: int) -> Figures:
        return self.run(load, "--max-concurrency", str(streams))

    def run(self, load: Sequence[Request], *flags: str) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            loads.write(Path(folder, "load.jsonl"), load)
            found = self._bench(Path(folder), len(load), flags)
        if found["completed"] != len(load) or found["total_output_tokens"] != loads.tokens(load):
            sys.exit(
                f"{found['completed']} of {len(load)} requests were completed, with {found['total_output_tokens']} of "
                f"{loads.tokens(load)} tokens ({found['failures']}): no figure is worth printing."
            )
        return found

    def _bench(self, folder: Path, requests: int, flags: Sequence[str]) -> Figures:
        command = (
            f"{sys.executable} -m bdh_batch bench serve --base-url http://127.0.0.1:{self._port} --tokenizer bytes "
            f"--dataset-name custom --dataset-path {folder}/load.jsonl --custom-output-len -1 --disable-shuffle "
            f"--num-prompts {requests} --ignore-eos --temperature {TEMPERATURE} --disable-tqdm --save-result "
            f"--result-dir {folder} --result-filename result.json"
        )
        environment = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
        done = subprocess.run(
            [*command.split(), *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        if done.returncode:
            sys.exit(f"bench serve ended with {done.returncode}: {done.stderr or done.stdout}")
        found: Figures = json.loads((folder / "result.json").read_text())
        return found


class InProcess:
    """The engine with its scheduler and worker, without HTTP or text."""

    def __init__(self, engine: LoadedEngine, chosen: settings.Settings) -> None:
        self._engine, self._settings = engine, chosen

    def __call__(self, load: Sequence[Request], streams: int) -> Figures:
        return uvloop.run(self._run(loads.jobs(load), streams))

    async def _run(self, jobs: Sequence[Job], streams: int) -> Figures:
        worker = start_worker(self._settings, self._engine, EngineMetrics(CollectorRegistry(), "benchmark"))
        try:
            crowd = Crowd(worker, jobs)
            began = time.perf_counter()
            crowd.begin(streams)
            await crowd.over
            seconds = time.perf_counter() - began
        finally:
            worker.close()
        wanted = [job.length for job in jobs]
        if crowd.lengths != wanted:
            sys.exit("A completion in process has not its length: no figure is worth printing.")
        return {"output_throughput": sum(wanted) / seconds, "request_throughput": len(jobs) / seconds}


class Crowd:
    """So many jobs under way at once; where one ends, the next begins."""

    def __init__(self, worker: Worker, jobs: Sequence[Job]) -> None:
        self._worker, self._jobs = worker, jobs
        self._begun = 0
        self._open = len(jobs)
        self.lengths = [0] * len(jobs)
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, many: int) -> None:
        sequences = [
            Generation("", Completion(job.prompt, job.length, job.sampling, Silent()), Client(self, index))
            for index, job in enumerate(self._jobs[self._begun : self._begun + many], self._begun)
        ]
        self._begun += len(sequences)
        if sequences:
            self._worker.submit(sequences)

    def put(self, index: int, delta: Delta) -> None:
        self.lengths[index] += len(delta.tokens)
        if delta.finish_reason is not None:
            self._open -= 1
            self.begin(1)
            if not self._open:
                self.over.set_result(None)
