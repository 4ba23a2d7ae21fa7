"""Every flag of `bench serve`, typed, once. Names and meanings are those of `vllm bench serve`, where that has them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from bdh_batch.bench.sendable import check_sendable
from bdh_batch.errors import ConfigError

BACKENDS = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",  # vLLM's own name for the same
    "openai-chat": "/v1/chat/completions",
}
DATASETS = ("random", "sharegpt", "custom", "prefix_repetition", "multi-turn")
METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time", "e2el_including_client_queue")
NOT_SENT = ("dataset_path", "result_dir", "result_filename", "tokenizer", "seed")
LIMITED = ("ttft", "tpot", "e2el")
SAMPLING = (
    "ignore_eos",
    "logprobs",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)

Reader = Callable[[str], Any]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _number(name: str, wanted: str, read: Callable[[str], float], holds: Callable[[float], bool]) -> Reader:
    def parse(text: str) -> float:
        try:
            value = read(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"should be {wanted}, not {text!r}")
        return value

    parse.__name__ = name
    return parse


rate = _number("rate", "a number above 0, or inf", float, lambda value: value > 0)
seconds = _number("seconds", "a number of seconds, not below 0", float, lambda value: 0 <= value < math.inf)
milliseconds = _number(
    "milliseconds", "a number of milliseconds, not below 0", float, lambda value: 0 <= value < math.inf
)
above_zero = _number("seconds", "a number of seconds above 0", float, lambda value: 0 < value < math.inf)
finite = _number("number", "a finite number", float, math.isfinite)
ratio = _number("ratio", "a number from 0 to below 1", float, lambda value: 0 <= value < 1)
positive = _number("count", "a whole number above 0", int, lambda value: value > 0)
count = _number("count", "a whole number, not below 0", int, lambda value: value >= 0)
whole = _number("number", "a whole number", int, math.isfinite)
port = _number("port", "a port, 1 to 65535", int, lambda value: 1 <= value <= 65535)


def length_or_own(text: str) -> int | None:
    """A count of tokens; -1 is what the data says."""
    return None if text == "-1" else int(positive(text))


def json_object(text: str) -> dict[str, Any]:
    try:
        held = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is no JSON: {error}") from None
    if not isinstance(held, dict):
        raise argparse.ArgumentTypeError("should be a JSON object")
    return held


def pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.strip()):
        raise argparse.ArgumentTypeError(f"should be KEY=VALUE, not {text!r}")
    return name.strip(), value.strip()


def header(text: str) -> tuple[str, str]:
    name, value = pair(text)
    if not all("\x20" <= character < "\x7f" for character in name + value) or set(name) & set(" :"):
        raise argparse.ArgumentTypeError(f"should be a header's KEY=VALUE, in ASCII, not {text!r}")
    return name.lower(), value


def in_header(text: str) -> str:
    if not all("\x20" <= character < "\x7f" for character in text):
        raise argparse.ArgumentTypeError(f"should be ASCII that a header can hold, not {text!r}")
    return text


def limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    if name not in LIMITED:
        raise argparse.ArgumentTypeError(f"should be KEY:MILLISECONDS with a KEY of {', '.join(LIMITED)}, not {text!r}")
    return name, float(milliseconds(value))


def metrics(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if wrong := [name for name in names if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(METRICS)}")
    return names


def percentiles(text: str) -> tuple[float, ...]:
    percent = _number("percentile", "numbers from 0 to 100, as in 50,99", float, lambda value: 0 <= value <= 100)
    return tuple(percent(part) for part in text.split(","))


def flag(default: Any, text: str, read: Reader | None = None, **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "type": read, **more})


@dataclass(frozen=True)
class Options:
    """What is asked for; rates are per second, `…_sec` seconds, `…_len` tokens."""

    backend: str = flag("openai", "which API is asked: completions, or chat", choices=tuple(BACKENDS))
    base_url: str | None = flag(None, "the server, as in http://127.0.0.1:8000; else --host and --port")
    host: str = flag("127.0.0.1", "the server's host")
    port: int = flag(8000, "the server's port", port)
    endpoint: str | None = flag(None, "the path that is asked; else the backend's own")
    insecure: bool = flag(False, "believe any certificate")
    header: Sequence[tuple[str, str]] = flag((), "headers of each request", header, nargs="*", metavar="KEY=VALUE")
    model: str | None = flag(None, "the model; else the first that the server lists")
    served_model_name: str | None = flag(None, "its name in requests, if another")
    tokenizer: str | None = flag(
        None, "counts prompts: `bytes`, or a tokenizer.json or its folder; else the server's /tokenize, else a guess"
    )
    skip_tokenizer_init: bool = flag(False, "do not ask the server's /tokenize: guess")

    dataset_name: str = flag("random", "what prompts are made of", choices=DATASETS)
    dataset_path: str | None = flag(
        None, "sharegpt and multi-turn: JSON of conversations; custom: lines of {prompt, output_tokens}"
    )
    num_prompts: int = flag(1000, "requests in all", positive)
    seed: int = flag(0, "of prompts and arrivals: the same seed, the same load", whole)
    disable_shuffle: bool = flag(False, "take a file's entries in their order")
    no_oversample: bool = flag(False, "do not repeat a file's entries where they are too few")
    input_len: int | None = flag(None, "the same as --random-input-len", positive)
    output_len: int | None = flag(None, "for every dataset: tokens of a completion", positive)
    random_input_len: int = flag(1024, "tokens of a prompt, or of a turn", positive)
    random_output_len: int = flag(128, "tokens of a completion", positive)
    random_range_ratio: float = flag(0.0, "both lengths are drawn from ± this share of themselves", ratio)
    random_prefix_len: int = flag(0, "tokens that all prompts begin with, besides", count)
    prefix_repetition_prefix_len: int = flag(256, "tokens of each shared prefix", positive)
    prefix_repetition_suffix_len: int = flag(256, "tokens after it", positive)
    prefix_repetition_num_prefixes: int = flag(10, "how many prefixes there are", positive)
    prefix_repetition_output_len: int = flag(128, "tokens of a completion", positive)
    sharegpt_output_len: int | None = flag(None, "tokens of a completion; else those of the one in the file", positive)
    custom_output_len: int | None = flag(
        256, "tokens of a completion; -1: each line's output_tokens", length_or_own, metavar="N"
    )
    multi_turn_num_turns: int = flag(4, "turns of a conversation, at most as many as a file has", positive)
    multi_turn_think_time_sec: float = flag(0.0, "from a completion to the next turn", seconds)

    request_rate: float = flag(math.inf, "requests a second; inf: all at once, or as --max-concurrency lets them", rate)
    burstiness: float = flag(1.0, "1: a Poisson process; below, in bursts; above, more even (gamma); inf: even", rate)
    max_concurrency: int | None = flag(
        None, "requests (multi-turn: conversations) under way at once, at most", positive
    )
    ramp_up_strategy: str | None = flag(None, "the rate rises over the run", choices=("linear", "exponential"))
    ramp_up_start_rps: float | None = flag(None, "from this rate", rate)
    ramp_up_end_rps: float | None = flag(None, "to this one", rate)
    num_warmups: int = flag(0, "requests before the run, not measured", count)
    ready_check_timeout_sec: float = flag(
        0.0, "wait so long for a first good response, not measured; 0: do not", seconds
    )
    request_timeout_sec: float = flag(21600.0, "a request that takes longer has failed", above_zero)
    request_id_prefix: str = flag("", "of the header x-request-id; else a random one", in_header)

    ignore_eos: bool | None = flag(
        None,
        "completions have all their tokens; with random and prefix_repetition data unless --no-ignore-eos",
        action=argparse.BooleanOptionalAction,
    )
    logprobs: int | None = flag(None, "ask for so many per token", count)
    temperature: float | None = flag(None, "else the server's default", finite)
    top_p: float | None = flag(None, "else the server's default", finite)
    top_k: int | None = flag(None, "else the server's default", whole)
    min_p: float | None = flag(None, "else the server's default", finite)
    frequency_penalty: float | None = flag(None, "else the server's default", finite)
    presence_penalty: float | None = flag(None, "else the server's default", finite)
    repetition_penalty: float | None = flag(None, "else the server's default", finite)
    extra_body: Mapping[str, Any] | None = flag(None, "more of each request's body", json_object, metavar="JSON")

    percentile_metrics: tuple[str, ...] = flag(
        ("ttft", "tpot", "itl", "e2el"), f"what is reported, of {','.join(METRICS)}", metrics, metavar="A,B"
    )
    metric_percentiles: tuple[float, ...] = flag((50.0, 90.0, 99.0), "as in 50,90,99", percentiles, metavar="P,Q")
    goodput: Sequence[tuple[str, float]] = flag(
        (), "requests within all of these count as good, as in ttft:200 tpot:50", limit, nargs="+", metavar="KEY:MS"
    )
    save_result: bool = flag(False, "write a JSON file")
    save_detailed: bool = flag(False, "with what became of each request")
    append_result: bool = flag(False, "add it to the file as a line")
    result_dir: str = flag("", "the folder where the file goes; else this one")
    result_filename: str | None = flag(None, "its name; else {label}-{rate}qps-{model}-{date}.json")
    metadata: Sequence[tuple[str, str]] = flag((), "more that the file says", pair, nargs="*", metavar="KEY=VALUE")
    label: str | None = flag(None, "of the result; else the backend")
    disable_tqdm: bool = flag(False, "show no progress")

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return self.base_url or f"http://{host}:{self.port}"

    @property
    def path(self) -> str:
        return self.endpoint or BACKENDS[self.backend]

    @property
    def chats(self) -> bool:
        return self.backend == "openai-chat"

    @property
    def headers(self) -> Mapping[str, str]:
        return dict(self.header)

    @property
    def limits(self) -> Mapping[str, float]:
        """Milliseconds by metric, for goodput."""
        return dict(self.goodput)

    @property
    def open_loop(self) -> bool:
        """Whether requests come when they come, not when others end."""
        return self.max_concurrency is None or math.isfinite(self.request_rate) or self.ramp_up_strategy is not None

    @property
    def sampling(self) -> dict[str, Any]:
        asked = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in asked.items() if value is not None and value is not False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option in dataclasses.fields(Options):
        name = f"--{option.name.replace('_', '-')}"
        given = {key: value for key, value in option.metadata.items() if value is not None}
        if option.default is False:
            given["action"] = "store_true"
        if option.default not in (None, (), False, ""):
            given["help"] = f"{given['help']} (default {_shown(option.default)})"
        given["help"] = given["help"].replace("%", "%%")
        parser.add_argument(name, default=option.default, **given)


def _shown(default: Any) -> str:
    return (
        ",".join(f"{part:g}" if isinstance(part, float) else part for part in default)
        if isinstance(default, tuple)
        else str(default)
    )


def options_of(given: argparse.Namespace) -> Options:
    """The flags of a command line, looked at together.

    Raises ConfigError, naming the flag, where they cannot be.
    """
    options = Options(**{option.name: getattr(given, option.name) for option in dataclasses.fields(Options)})
    _check_sendable(options)
    _check_ramp(options)
    _check_data(options)
    suffix = "/chat/completions" if options.chats else "/completions"
    if not options.path.startswith("/") or not options.path.endswith(suffix) or options.path.split() != [options.path]:
        raise ConfigError(f"--endpoint {options.path}: with --backend {options.backend}, should end in {suffix}")
    return _completed(options)


def _check_sendable(options: Options) -> None:
    for option in dataclasses.fields(options):
        if option.name not in NOT_SENT:
            try:
                check_sendable(getattr(options, option.name))
            except ValueError as error:
                raise ConfigError(f"--{option.name.replace('_', '-')}: {error}") from None


def _check_ramp(options: Options) -> None:
    ends = (options.ramp_up_start_rps, options.ramp_up_end_rps)
    if options.ramp_up_strategy is None:
        if ends != (None, None):
            raise ConfigError("--ramp-up-strategy: should be given with --ramp-up-start-rps and --ramp-up-end-rps")
        return
    start, end = ends
    if start is None or end is None:
        raise ConfigError("--ramp-up-strategy: needs --ramp-up-start-rps and --ramp-up-end-rps")
    if not start <= end < math.inf:
        raise ConfigError("--ramp-up-end-rps: should be finite, and not below --ramp-up-start-rps")
    if math.isfinite(options.request_rate):
        raise ConfigError("--request-rate: with --ramp-up-strategy, the rate is the ramp's")


def _check_data(options: Options) -> None:
    needed = options.dataset_name in ("sharegpt", "custom")
    if needed and options.dataset_path is None:
        raise ConfigError(f"--dataset-path: needed by --dataset-name {options.dataset_name}")
    if not needed and options.dataset_name != "multi-turn" and options.dataset_path is not None:
        raise ConfigError(f"--dataset-path: {options.dataset_name} data is made, not read")


def _completed(options: Options) -> Options:
    """With what follows from other flags."""
    more: dict[str, Any] = {"request_id_prefix": options.request_id_prefix or f"bench-{uuid.uuid4().hex[:8]}-"}
    if options.ignore_eos is None:
        more["ignore_eos"] = options.dataset_name in ("random", "prefix_repetition") or (
            options.dataset_name == "multi-turn" and options.dataset_path is None
        )
    if options.input_len is not None:
        more["random_input_len"] = options.input_len
    if (length := options.output_len) is not None:
        more |= dict.fromkeys(("random_output_len", "prefix_repetition_output_len"), length)
        more |= dict.fromkeys(("sharegpt_output_len", "custom_output_len"), length)
    return dataclasses.replace(options, **more)
