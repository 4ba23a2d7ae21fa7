"""Three gauges under the names that vLLM gives them, for programs that look for no others.

Such a program, as the endpoint picker of Kubernetes' inference gateway, takes the first sample of a name that it finds.
So there is one for each model, over all of its engine processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean

GAUGES: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "num_requests_running": ("Sequences that run, in all engines", sum),
    "num_requests_waiting": ("Sequences that wait for their first slot, in all engines", sum),
    "kv_cache_usage_perc": ("Share of the slots to run in that are held, 0 to 1, the mean of all engines", fmean),
}
QUOTED = rb'"(?:[^"\\]|\\.)*"'
SAMPLE = re.compile(
    rb"^bdh_(%b)\{((?:[^\"}]|%b)*)\} (\S+)$" % ("|".join(GAUGES).encode(), QUOTED), re.MULTILINE
)  # by the text, as it is scraped many times a second
MODEL = re.compile(rb"(?:^|,)(model_name=%b)" % QUOTED)


def vllm_names(page: bytes) -> bytes:
    """Returns what is to be added to a page of metrics, in Prometheus' text format."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in GAUGES}  # by name, then by the model's label
    for name, labels, value in SAMPLE.findall(page):
        if (model := MODEL.search(labels)) is not None:
            values[name.decode()].setdefault(model[1].decode(), []).append(float(value))
    lines = []
    for name, (text, combined) in GAUGES.items():
        if values[name]:
            lines += [f"# HELP vllm:{name} {text}", f"# TYPE vllm:{name} gauge"]
            lines += [f"vllm:{name}{{{model}}} {float(combined(some))}" for model, some in values[name].items()]
    return "".join(f"{line}\n" for line in lines).encode()
