"""Metrics of several processes as one page: each sample says which process it is from."""

from __future__ import annotations

from collections.abc import Mapping


def merge(expositions: Mapping[str, bytes]) -> bytes:
    """One exposition of several, in Prometheus' text format, by the names of their processes.

    Every sample gets the label `process`. A metric's help and type are written once, and its samples together.
    """
    heads: dict[str, list[str]] = {}  # of a metric, by its name
    samples: dict[str, list[str]] = {}
    for process, exposition in expositions.items():
        name = ""
        for line in exposition.decode().split("\n")[:-1]:
            if not line.startswith("# "):
                samples.setdefault(name, []).append(_labelled(line, process))
                continue
            name = line.split(" ", 3)[2]
            head = heads.setdefault(name, [])
            if line not in head and len(head) < 2:
                head.append(line)
    lines = [line for name, head in heads.items() for line in (*head, *samples.get(name, ()))]
    return "".join(f"{line}\n" for line in lines).encode()


def _labelled(sample: str, process: str) -> str:
    label = f'process="{process}"'
    name, brace, rest = sample.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"
