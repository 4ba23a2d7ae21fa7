"""Writes docs/performance.md from a folder of results: every number in it is one of theirs.

    python -m benchmarks.reports.document  # of this machine's folder
    python -m benchmarks.reports.document --results folder --out elsewhere.md

What a folder lacks has no section. What `make bench` does not run lies in the folder above it.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report import suite_folder
from benchmarks.reports import by_themselves, experiments
from benchmarks.reports.cells import Lines, Report, number, shown, table

NAMES = {
    "server": "this server",
    "engine": "its engine, in process",
    "one_at_a_time": "one at a time, same kernels",
    "upstream": "one at a time, upstream's `generate`",
    "static": "static batches, same kernels",
    "dense": "continuous batching, dense states in torch",
    "step": "CPU kernels",
    "step_bfloat16": "CPU kernels, states of bfloat16",
    "dense_per_sequence": "dense states, one sequence after the other",
    "dense_batched": "dense states, the whole batch at once",
    "prefill": "a prompt, CPU kernels",
    "prefill_bfloat16": "a prompt, CPU kernels, states of bfloat16",
}


def document(results: Path, home: Path) -> str:
    """The page, with links as from the folder `home`."""
    lines = [
        "# Performance",
        "",
        "Made from the results of `make bench` by `python -m benchmarks.reports.document`; nothing is typed by hand.",
        "A figure is the median of rounds in which all systems took turns, with the interval that holds 95 % of the",
        "medians of resampled rounds: with 3 rounds it is no more than their range, which holds the true median three",
        "times in four.",
        "",
        "What is short was measured in several repetitions, spread over the run, of which each is a round. What drifts",
        "from one run to the next is in no interval. `python -m benchmarks.reports.compare A B` says what got slower",
        "between two folders, and goes by the rounds.",
    ]
    above = {**by_themselves.SECTIONS, **experiments.SECTIONS}
    for folder, sections in ((results, SECTIONS), (results.parent, above)):
        link = os.path.relpath(folder, home)
        for name, section in sections.items():
            file = folder / f"{name}.json"
            if file.is_file():
                report = json.loads(file.read_text())
                lines += ["", *section(report, link), "", f"[`{file.name}`]({link}/{file.name})"]
    return "\n".join(lines) + "\n"


def judged(ratio: Report) -> tuple[str, str]:
    verdict = "" if "goal" not in ratio else f"{ratio['goal']}: {'met' if ratio['met'] else 'missed'}"
    return shown(ratio), verdict


def named(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


# The sections, by their files


def suite(report: Report, link: str) -> Lines:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield "## The run"
    yield ""
    yield f"{machine['cpu']}, {machine['threads']} threads, {machine['system']}; {versions}."
    parts = report["parts"].values()
    commits = " and ".join(dict.fromkeys(part["commit"] for part in parts))
    yield f"{report['date']}, commit {commits}, {sum(part['seconds'] for part in parts) / 60:.0f} minutes."
    if report["quick"]:
        yield ""
        yield "**A quick run, to see whether it works: its figures say nothing.**"


def server(report: Report, link: str) -> Lines:
    yield "## The server over HTTP"
    parts = {"against": against, "heavy_tailed": heavy_tailed, "curve": curve, "first_token": first_token}
    for name, part in parts.items():
        if name in report:
            yield ""
            yield from part(report[name], link)
    yield ""
    yield f"Options of all servers: {', '.join(f'`{option}`' for option in report['options'])}."
    yield f"Prompts have {report['prompt_tokens']} tokens, temperature is {report['temperature']}."


def against(scenario: Report, link: str) -> Lines:
    yield f"{scenario['streams']} streams, completions of {scenario['answer_tokens']} tokens, each the same load:"
    yield ""
    ratios = {"engine": "to_engine", **{name: f"to_{name}" for name in scenario["sides"]}}
    rows = []
    for name, system in scenario["sides"].items():
        ratio = scenario["ratios"].get(ratios[name])
        rows.append(
            [named(name), system["requests"], shown(system["tokens_per_s"]), *(judged(ratio) if ratio else ("", ""))]
        )
    yield from table(["", "requests", "tokens/s", "this server is so many times it", "goal"], *rows)
    yield from strain(scenario["sides"])


def heavy_tailed(scenario: Report, link: str) -> Lines:
    lengths = scenario["answer_tokens"]
    yield f"{scenario['streams']} streams, {scenario['requests']} completions whose lengths have a heavy tail: median"
    static = scenario["batch_of_static"]
    yield f"{lengths['median']}, longest {lengths['max']}. Static batches of {static}; a padded one"
    by_batch = (f"{number(rows)} in batches of {batch}" for batch, rows in scenario["rows_computed_to_needed"].items())
    yield f"computes more rows than are needed, in this order of arrival {', '.join(by_batch)} times as many:"
    yield ""
    rows = [[named(name), shown(system["tokens_per_s"])] for name, system in scenario["sides"].items()]
    yield from table(["", "tokens/s"], *rows, ["ratio", " ".join(judged(scenario["ratios"]["to_static"]))])
    yield from strain(scenario["sides"])


def curve(scenario: Report, link: str) -> Lines:
    yield f"![throughput against latency]({link}/server-curve.svg)"
    yield ""
    head = ["", "streams", "tokens/s", "ms of a completion, mean", "ms to the first token, p99", "ms a token, median"]
    keys = ("tokens_per_s", "mean_answer_ms", "p99_first_token_ms", "median_token_ms")
    rows = [
        [named(name), point["streams"], *(shown(point[key]) for key in keys)]
        for name, points in scenario["sides"].items()
        for point in points
    ]
    yield from table(head, *rows)


def first_token(scenario: Report, link: str) -> Lines:
    systems = {
        "one request at a time": "unloaded",
        f"Poisson arrivals at {scenario['share_of_saturation']:.0%} of the saturated rate": "loaded",
    }
    rows = [
        [name, scenario["requests"][key], shown(scenario[key]["p99_first_token_ms"])] for name, key in systems.items()
    ]
    ratio = " ".join(judged(scenario["ratios"]["loaded_to_unloaded"]))
    yield from table(["", "requests", "ms to the first token, p99"], *rows, ["ratio", "", ratio])
    yield ""
    yield f"Saturated: {shown(scenario['saturation_requests_per_s'])} requests/s."
    yield from strain({name: scenario[key] for name, key in systems.items()})


def strain(systems: Mapping[str, Report]) -> Lines:
    """Where the client may have been what was measured."""
    for name, system in systems.items():
        if signs := system.get("client", {}).get("signs_of_strain"):
            yield ""
            yield f"The client's own strain, {named(name)}: {'; '.join(signs)}."


def engine(report: Report, link: str) -> Lines:
    yield "## The engine in process"
    if batches := report.get("batches"):
        yield ""
        yield f"![tokens/s by batch size]({link}/engine-batches.svg)"
        yield ""
        rows = [[each["batch"], shown(each["figure"]), number(each["ms_per_step"])] for each in batches]
        yield from table(["sequences that decode", "tokens/s", "ms a step"], *rows)
    if contexts := report.get("contexts"):
        yield ""
        yield f"![cost against context]({link}/engine-contexts.svg)"
        yield ""
        first = contexts["by_context"][0]["context"]
        rows = [
            [each["context"], shown(each["figure"]), shown(each[f"ratio_to_{first}"])]
            for each in contexts["by_context"]
        ]
        yield from table(["context", f"µs a token, batch of {contexts['batch']}", f"to that at {first}"], *rows)
    if mixes := report.get("mixes"):
        yield ""
        rows = [
            [
                f"{each['decoders']} decode, {each['prompts']} in their prompts",
                *(number(each[key]) for key in ("decoded_tokens_per_s", "prefilled_tokens_per_s")),
                shown(each["figure"]),
            ]
            for each in mixes
        ]
        yield from table(["", "decoded tokens/s", "prompt tokens/s", "ms a step"], *rows)


def kernels(report: Report, link: str) -> Lines:
    yield "## Kernels"
    yield ""
    batch, prompt = report["decode"]["batch"], report["prefill"]["tokens"]
    yield f"A decode step of {batch} sequences, and a prompt of {prompt} tokens:"
    yield ""
    yield from table(["", "tokens/s"], *([named(name), shown(each)] for name, each in report["figures"].items()))
    yield ""
    yield f"![pass by pass]({link}/kernels-passes.svg)"


def gpu_kernels(report: Report, link: str) -> Lines:
    yield "## The GPU's kernels, without a GPU"
    yield ""
    model, compiler = report["model"], f"Triton {report['versions']['triton']}"
    yield "Nothing here was measured: it is what the compiler left, and an estimate. upstream's default model"
    yield f"({model['layers']} layers, {model['heads']} heads of {model['neurons']:,} neurons, width {model['width']}),"
    yield f"compiled for {report['chip']} by {compiler}, with the block sizes where nothing was tuned. Programs:"
    yield "side by side on a multiprocessor. In flight: groups of loads that are still under way where the main loop"
    yield "waits for the oldest. What `rotation` has on its stack is for sines of large angles, which it has none of."
    for dtype, kernels in report["resources"].items():
        yield ""
        head = [f"{dtype} weights and states", "registers", "stack, bytes", "shared, bytes", "warps", "programs"]
        keys = ("registers", "stack", "shared", "warps", "programs", "in_flight")
        rows = [[f"`{name}`", *(f"{taken[key]:,}" for key in keys)] for name, taken in kernels.items()]
        yield from table([*head, "in flight"], *rows)
    yield ""
    yield from gpu_estimates(report["estimates"])


def gpu_estimates(found: Report) -> Lines:
    """A decode step of bfloat16 on paper."""
    given = found["assumptions"]
    rate, products = given["memory_bytes_per_s"] / 1e12, given["products_per_s"] / 1e12
    load, launch = given["latency_s"] * 1e6, given["launch_s"] * 1e6
    yield "A decode step's kernels on an H200, on paper, bf16. The bound is the matrices of"
    yield f"each layer once, and the rows that fired, read and written, at {rate:g} TB/s. Assumed:"
    yield f"{given['fired']:.0%} of the neurons fire, a kernel reaches {given['memory_share']:.0%} of that rate,"
    yield f"a load takes {load:g} µs, a launch in a graph {launch:g} µs, products run at {products:.0f} TFLOP/s."
    yield "Before: the kernels up to November 2026, by the same assumptions; an earlier estimate"
    yield "gave them 12, 42 and 58 % of the bound."
    yield ""
    rows = [
        [
            each["batch"],
            *(number(us) for us in (each["bound_us"], each["before"]["us"], each["now"]["us"])),
            *(f"{each[name]['percent_of_bound']:.0f} %" for name in ("before", "now")),
        ]
        for each in found["by_batch"]
    ]
    yield from table(["sequences", "bound, µs", "before, µs", "now, µs", "before, of the bound", "now"], *rows)
    if around := found.get("around"):
        yield ""
        yield from around_the_kernels(around, given)


def around_the_kernels(around: Report, given: Report) -> Lines:
    """What of a step is neither forward pass nor logits."""
    copy, operator = given["copy_s"] * 1e6, given["operator_s"] * 1e6
    yield "Around them, a step sends its inputs, draws, and brings its tokens back, whatever its size, by a copy"
    yield f"of {copy:g} µs and a launch by the host of {operator:g} µs. Drawing is part of the graph now; before, it"
    yield "was launched operator by operator, and each of its parameters was sent:"
    yield ""
    rows = [
        [f"{kind}, {name}", each["copies"], each["launched"], each["in_graph"], number(each["us"])]
        for kind in ("plain", "filtered")
        for name, kinds in around.items()
        for each in [kinds[kind]]
    ]
    yield from table(["", "copies", "launched by the host", "in the graph", "µs"], *rows)


def scheduler(report: Report, link: str) -> Lines:
    yield "## Scheduling"
    yield ""
    yield f"Planning, committing and publishing a step of {report['running']} sequences, nothing computed:"
    yield ""
    rows = [
        [name, shown(scenario["figure"]), number(scenario["all"]["p99_ms"])]
        for name, scenario in report["milliseconds_a_step"].items()
    ]
    yield from table(["", "ms a step", "p99"], *rows)


def serving(report: Report, link: str) -> Lines:
    yield "## Beside other load"
    if scenario := report.get("prompt"):
        yield ""
        yield f"{scenario['streams']} streams decode, and a prompt of {scenario['prompt_tokens']:,} tokens arrives:"
        yield ""
        yield f"![gaps between tokens]({link}/serving-gaps.svg)"
        yield ""
        rows = [
            [
                f"{each['target_step_ms']:g}",
                number(each["without_p99_gap_ms"]),
                shown(each["figure"]),
                shown(each["p99_gap_ratio"]),
            ]
            for each in scenario["by_target"]
        ]
        head = ["`scheduler.target_step_ms`", "ms between tokens, p99, without", "beside it", "ratio"]
        yield from table(head, *rows)
    if scenario := report.get("keys"):
        yield ""
        yield f"One tenant sends one request at a time, another one {scenario['flood']} at once; and two that flood:"
        yield ""
        yield f"![fairness]({link}/serving-fairness.svg)"
        yield ""
        rows = [
            [
                each["max_running"],
                shown(each["figure_alone"]),
                shown(each["figure"]),
                number(each["both_unfinished"]["jain"]),
            ]
            for each in scenario["by_max_running"]
        ]
        head = [
            "`scheduler.max_running`",
            "ms to the first token, alone",
            "beside the flood",
            "Jain's index of two floods",
        ]
        yield from table(head, *rows)


def frontend(report: Report, link: str) -> Lines:
    yield "## The front end"
    yield ""
    yield f"{report['streams']} streams of {report['tokens']} tokens, with an engine that computes nothing:"
    yield ""
    rows = [
        [name, shown(system["events_per_second"]), shown(system["server_us_per_token"])]
        for name, system in report["figures"].items()
    ]
    yield from table(["", "events/s", "µs of the server's processor time a token"], *rows)
    yield ""
    rows = [
        [f"{name} to {other}", shown(ratio)]
        for other, ratios in report["events_ratio_to"].items()
        for name, ratio in ratios.items()
    ]
    yield from table(["events/s", "ratio"], *rows)


SECTIONS: dict[str, Callable[[Report, str], Lines]] = {
    "suite": suite,
    "server": server,
    "engine-cpu": engine,
    "serving": serving,
    "kernels-cpu": kernels,
    "gpu-kernels": gpu_kernels,
    "scheduler": scheduler,
    "frontend": frontend,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.reports.document",
    )
    parser.add_argument("--results", type=Path, default=suite_folder())
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    chosen = parser.parse_args(argv)
    if not any((chosen.results / f"{name}.json").is_file() for name in SECTIONS):
        parser.error(f"--results {chosen.results}: has no results; `make bench` makes some")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(document(chosen.results, chosen.out.parent))


if __name__ == "__main__":
    main()
