"""Every option, typed, once. A YAML file < environment variables < the command line."""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    AnyHttpUrl,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from bdh_batch.documents import Malformed, brief, listed, parse_json, read_text, shown
from bdh_batch.errors import ConfigError
from bdh_batch.yaml_documents import parse_yaml

LONGEST_SHOWN = 100  # characters of an option that does not exist
ENV_PREFIX, ENV_DELIMITER = "BDH_", "__"
SECRET = ("auth.api_keys", "rate_limiting.storage", "telemetry.otlp_endpoint")  # what is given there is not repeated
UNITS = {
    "": 1,
    "b": 1,
    **{f"{u}{i}": s for k, u in enumerate("kmgt", 1) for i, s in (("ib", 2 ** (10 * k)), ("b", 1000**k))},
}


def _parse_bytes(value: object) -> object:
    """'4 GiB' to a number of bytes."""
    match = re.fullmatch(r"([\d.]+)\s*([a-zA-Z]*)", value.strip()) if isinstance(value, str) else None
    if match and match[2].lower() in UNITS:
        size = float(match[1]) * UNITS[match[2].lower()]
        return int(size) if math.isfinite(size) else value
    return value


def _parse_list(value: object) -> object:
    """'a,b' or '["a", "b"]' to a list: what an environment variable or a command line can say."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return parse_yaml(value)
        except Malformed:
            raise ValueError("a list as in [a, b] was expected") from None  # what was given may be a secret
    return [part.strip() for part in value.split(",") if part.strip()]


def _parse_mapping(value: object) -> object:
    """'{a: 2}' to a mapping: what an environment variable or a command line can say."""
    if not isinstance(value, str):
        return value
    try:
        return parse_yaml(value)
    except Malformed:
        raise ValueError("a mapping as in {label: 2} was expected") from None


def _one_worker(value: int) -> int:
    if value > 1:
        raise PydanticCustomError(
            "one_worker", "more than one worker is not supported; one batches all requests together"
        )
    return value


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise PydanticCustomError("network", "an address or a network is expected, as in 10.0.0.0/8") from None
    return value


def _storage(value: str) -> str:
    if value != "memory" and not value.startswith(("redis://", "rediss://", "redis+unix://")):
        raise PydanticCustomError("storage", "memory, or a URL as in redis://host:6379/0, is expected")
    return value


def without_password(url: str) -> str:
    """'redis://:secret@host' to 'redis://***@host'; what follows a ? may hold one, too."""
    scheme, separator, rest = url.partition("?")[0].rpartition("://")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else f"{scheme}{separator}{rest}"


Bytes = Annotated[PositiveInt, BeforeValidator(_parse_bytes)]
Strings = Annotated[list[str], BeforeValidator(_parse_list)]
Networks = Annotated[list[Annotated[str, AfterValidator(_network)]], BeforeValidator(_parse_list)]
Storage = Annotated[str, AfterValidator(_storage), PlainSerializer(without_password, str)]
Collector = Annotated[AnyHttpUrl, PlainSerializer(lambda url: without_password(str(url)), str)]
Weights = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9a-f]{16}$")], Annotated[float, Field(ge=0.001, le=1000)]],
    BeforeValidator(_parse_mapping),
]
Secrets = Annotated[
    list[SecretStr],
    BeforeValidator(_parse_list),
    PlainSerializer(lambda keys: ["***"] * len(keys), list[str]),
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(Section):
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    workers: Annotated[PositiveInt, AfterValidator(_one_worker)] = Field(
        1, description="Processes; 1 is what there is."
    )
    drain_seconds: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="How long running streams may go on after SIGTERM."
    )
    cors_origins: Strings = Field([], description='Origins that browsers may call from; ["*"] for all.')
    trusted_proxies: Networks = Field(
        [], description="Addresses and networks of proxies whose x-forwarded-for is believed."
    )
    tls_cert: Path | None = Field(None, description="PEM file of the certificate and its chain; with it, HTTPS only.")
    tls_key: Path | None = Field(None, description="PEM file of its private key, without a passphrase.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")


class Model(Section):
    path: Path | None = Field(None, description="Model folder, .pt or .safetensors file; null is the bundled model.")
    name: str | None = Field(None, description="Name in the API; null is the name of the folder or file.")
    aliases: Strings = Field([], description="Other names that requests may use.")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto takes CUDA where there is a GPU.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="Of the weights.")
    attention_window: NonNegativeInt | None = Field(
        None,
        description=(
            "Tokens that a token can look back on; 0 is all, null the model folder's attention_window, "
            "or else its trained_context."
        ),
    )
    layers: PositiveInt | None = Field(None, description="Layers of a .pt file that does not tell; null is 6.")
    max_model_len: PositiveInt | None = Field(
        131072, description="Most tokens of a prompt and its answer together; null is no limit (the state never grows)."
    )


class Engine(Section):
    kernels: Literal["auto", "torch", "cpu", "triton"] = Field(
        "auto", description="Which implementation computes a step."
    )
    state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Of the states; bfloat16 takes half the memory, and half the traffic of decoding."
    )
    state_memory: Bytes | None = Field(
        None, description='Memory for the states of running sequences, as in "4 GiB"; null is a share of what is free.'
    )
    state_memory_share: float = Field(0.5, gt=0, le=0.95, description="That share, where state_memory is null.")
    threads: PositiveInt | None = Field(
        None, description="CPU threads that compute; null is one per core, as far as CPU quotas go."
    )


class Scheduler(Section):
    max_running: PositiveInt = Field(
        256, description="Most sequences under way; where the memory holds fewer states, they take turns."
    )
    max_queued_requests: PositiveInt = Field(2048, description="Most requests that wait; one more is refused with 429.")
    max_queued_tokens: PositiveInt = Field(
        4 * 2**20, description="Most prompt tokens that wait; more is refused with 429."
    )
    prefill_tokens: PositiveInt = Field(
        256, le=65536, description="Most prompt tokens in a step, of all sequences together."
    )
    target_step_ms: float = Field(
        25.0,
        ge=0,
        allow_inf_nan=False,
        description="Milliseconds of a step beside running streams; prompts get less. 0: throughput first.",
    )
    quantum_steps: PositiveInt = Field(64, description="Steps of a turn, where sequences take turns.")
    queue_timeout: PositiveFloat | None = Field(
        None, allow_inf_nan=False, description="Seconds that a request may wait; null is no limit."
    )
    request_timeout: PositiveFloat | None = Field(
        None,
        allow_inf_nan=False,
        description="Seconds from a request's arrival to its end; a request may ask for less by x-request-timeout.",
    )
    weights: Weights = Field(
        {}, description="Shares of API keys, by the first 16 hex digits of the key's SHA-256; others have 1."
    )
    trace_file: Path | None = Field(None, description="Where decisions are written as JSON lines; null is nowhere.")


class PrefixCache(Section):
    enabled: bool = Field(True, description="Whether the states of prompts and answers stay for later requests.")
    shared: bool = Field(False, description="Whether API keys share them; timing then tells what others have asked.")
    entries: PositiveInt = Field(256, description="Most states on the device beside those of running sequences.")
    host_memory: Bytes | None = Field(
        None,
        description="Host memory for states, kept or suspended; null is 1 GiB, or a quarter of what is free, beside a "
        "GPU, and none without one, where it would be copied from memory to memory.",
    )
    min_tokens: PositiveInt = Field(32, description="Tokens that a beginning must have to be kept or shared.")


class Generation(Section):
    """What a request that does not say gets; null is what the folder's generation_config.json says, if it does."""

    max_tokens: PositiveInt | None = Field(None, description="Most tokens of an answer; else 256.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token; else 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Only the likeliest tokens that together reach this.")
    top_k: int | None = Field(None, ge=-1, description="Only this many of the likeliest tokens; 0 and -1 are off.")


class Chat(Section):
    template: Path | None = Field(None, description="A file with a Jinja template to use instead of the model's.")
    parse_special_tokens: bool = Field(
        False, description="Whether text in messages that spells a special token becomes one, as the template's does."
    )


class Auth(Section):
    enabled: bool = Field(
        False, description="Whether all but probes, metrics and docs asks for a key: Authorization: Bearer KEY."
    )
    api_keys: Secrets = Field([], description="The keys.")
    api_keys_file: Path | None = Field(
        None, description="A file with more of them, as `bdh-batch keys` makes it, or one a line; changes are seen."
    )
    protect_metrics: bool = Field(False, description="Whether /metrics asks for one, too.")
    protect_docs: bool = Field(False, description="Whether /docs and /openapi.json do.")


class RateLimiting(Section):
    enabled: bool = Field(
        False, description="Whether each key (without a key, each address) is limited; a key's own limits always hold."
    )
    requests_per_minute: PositiveInt = Field(600, description="Requests in any minute; more are refused with 429.")
    tokens_per_minute: PositiveInt | None = Field(
        None, description="Tokens a minute, of prompts and of the most their answers may have; null is no limit."
    )
    storage: Storage = Field(
        "memory", description="Where is counted: memory, or the redis:// or rediss:// URL of one that servers share."
    )


class Limits(Section):
    max_body_bytes: Bytes = Field(4 * 2**20, description="Largest request body; more is refused with 413.")
    max_header_bytes: Bytes = Field(32 * 1024, description="Largest head of a request; more is refused with 431.")
    header_seconds: PositiveFloat = Field(20.0, description="In which a request's headers have to come.")
    body_seconds: PositiveFloat = Field(60.0, description="In which its body has to; slower ones are refused with 408.")
    keep_alive_seconds: PositiveFloat = Field(
        75.0, description="That an idle connection is kept; longer than clients do, so that they are who close it."
    )
    max_n: PositiveInt = Field(16, description="Most answers to one prompt (n).")
    max_prompts: PositiveInt = Field(128, description="Most prompts in one request.")
    max_prompt_tokens: PositiveInt | None = Field(
        None, description="Most tokens of a prompt; null is no limit but model.max_model_len."
    )
    max_stop: PositiveInt = Field(16, description="Most stop strings.")
    max_stop_bytes: Bytes = Field(1024, description="Longest stop string, in bytes of UTF-8.")
    max_schema_bytes: Bytes = Field(64 * 1024, description="Largest schema or grammar that an answer has to follow.")


class Api(Section):
    unknown_fields: Literal["refuse", "ignore"] = Field("refuse", description="What to do with unknown body fields.")


class Health(Section):
    stall_seconds: PositiveFloat = Field(
        60.0, allow_inf_nan=False, description="Work without a step for so long turns /health to 503."
    )
    failed_steps: PositiveInt = Field(3, description="So many failed steps on end do, too, until one succeeds.")


class Telemetry(Section):
    otlp_endpoint: Collector | None = Field(
        None,
        description=(
            "Where spans are sent (OTLP over HTTP), as in http://localhost:4318; null is nowhere. The environment's "
            "OTEL_ options hold, as OTEL_EXPORTER_OTLP_HEADERS."
        ),
    )


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    server: Server = Server()
    model: Model = Model()
    engine: Engine = Engine()
    scheduler: Scheduler = Scheduler()
    prefix_cache: PrefixCache = PrefixCache()
    generation: Generation = Generation()
    chat: Chat = Chat()
    auth: Auth = Auth()
    rate_limiting: RateLimiting = RateLimiting()
    limits: Limits = Limits()
    api: Api = Api()
    health: Health = Health()
    telemetry: Telemetry = Telemetry()


@dataclass(frozen=True)
class Resolved:
    """Settings, for each dotted option the source that set it, and what was left out of account, a line for each."""

    settings: Settings
    origins: Mapping[str, str]
    warnings: Sequence[str] = ()

    def show(self) -> str:
        """All options as YAML, secrets masked, each with its origin."""
        lines, section = [], ""
        for option, value in flatten(self.settings.model_dump(mode="json")):
            name, key = option.split(".")
            if name != section:
                lines.append(f"{name}:")
                section = name
            lines.append(f"  {key}: {_scalar(value)}  # {self.origins.get(option, 'default')}")
        return "\n".join(lines)


def load(config: Path | None = None, overrides: Iterable[tuple[str, object]] = ()) -> Resolved:
    """Merges a YAML file, the environment and the command line.

    Args:
        config: a YAML file of sections and keys.
        overrides: (dotted option, value) pairs of the command line.

    Raises:
        ConfigError: an unreadable file, an unknown option (with the nearest known one), a value that does not fit.
    """
    merged: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    environment, warnings = _environment_options()
    for origin, options in (
        (f"file {config}", _file_options(config)),
        ("environment", environment),
        ("command line", overrides),
    ):
        for option, value in options:
            _known(option, origin)
            if isinstance(value, str) and "\0" in value:  # no path may have one, and nothing else needs it
                raise ConfigError(f"{option} ({origin}): holds a NUL character")
            section, key = option.split(".")
            merged.setdefault(section, {})[key] = value
            origins[option] = origin
    try:
        return Resolved(Settings.model_validate(merged), origins, warnings)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from error


def bytes_of(text: str, option: str) -> int:
    """A size as an option would be given it, '8 GiB'; errors name the `option`."""
    try:
        return TypeAdapter(Bytes).validate_python(text)
    except ValidationError as error:
        raise ConfigError(f"{option}: should be a number of bytes, as in '8 GiB', not {brief(text)}") from error


def options() -> dict[str, tuple[Any, str]]:
    """Every dotted option with its default and its help."""
    found = {}
    for name, section in Settings.model_fields.items():
        for key, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            found[f"{name}.{key}"] = (field.default, field.description or "")
    return found


def default_yaml() -> str:
    """`config/default.yaml`: every option with its default and its help."""
    lines = [
        "# Every option of bdh_batch with its default. `bdh-batch serve --config FILE` reads a file like this one; an",
        "# environment variable (BDH_SERVER__PORT=9000) wins over it, the command line (--set server.port=9000).",
    ]
    section = ""
    for option, (default, text) in options().items():
        name, key = option.split(".")
        if name != section:
            lines += ["", f"{name}:"]
            section = name
        lines += [f"  # {text}{_choices(option)}", f"  {key}: {_scalar(default)}"]
    return "\n".join(lines) + "\n"


def flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, keys in values.items():
        for key, value in keys.items():
            yield f"{section}.{key}", value


def _choices(option: str) -> str:
    section, key = option.split(".")
    annotation = Settings.model_fields[section].annotation.model_fields[key].annotation  # type: ignore[union-attr]
    choices = get_args(annotation) if getattr(annotation, "__origin__", None) is Literal else ()
    return f" One of: {', '.join(map(str, choices))}." if len(choices) > 1 else ""


def _scalar(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _file_options(config: Path | None) -> Iterator[tuple[str, Any]]:
    if config is None:
        return
    try:
        values = parse_yaml(read_text(config))
    except (OSError, Malformed) as error:
        raise ConfigError(f"--config: {config} cannot be read: {error}") from error
    if values is None:
        return
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {config} should hold sections, as in `server: {{port: 8000}}`")
    yield from _section_options(values, f"file {config}")


def _section_options(values: Mapping[str, Any], origin: str) -> Iterator[tuple[str, Any]]:
    for section, keys in values.items():
        if section not in Settings.model_fields:
            name = str(section)[:LONGEST_SHOWN]
            near = difflib.get_close_matches(name, Settings.model_fields, 1, 0)
            raise ConfigError(f"unknown section {shown(name)} ({origin}); did you mean {near[0]}?")
        if not isinstance(keys, dict | None):
            raise ConfigError(f"{section} ({origin}): should hold options, as in `{section}: {{key: value}}`")
        for key, value in (keys or {}).items():
            yield f"{section}.{key}", value


def _environment_options() -> tuple[list[tuple[str, Any]], list[str]]:
    """What BDH_SECTION__OPTION, and BDH_SECTION with a JSON object, say; and a warning of the others that begin so.

    An option goes before a whole section. The others are none of ours: for a service called `bdh`, Kubernetes sets
    BDH_PORT, BDH_SERVICE_HOST and their like in every container beside it.
    """
    of_sections: list[tuple[str, Any]] = []
    of_options: list[tuple[str, Any]] = []
    others = []
    for name, value in sorted(os.environ.items()):
        if not name.upper().startswith(ENV_PREFIX):
            continue
        words = name[len(ENV_PREFIX) :].lower()
        if ENV_DELIMITER in words:
            option = words.replace(ENV_DELIMITER, ".")
            _known(option, f"environment variable {name}")
            of_options.append((option, None if value == "null" else value))
        elif words in Settings.model_fields and (section := _json_object(value)) is not None:
            of_sections += _section_options({words: section}, f"environment variable {name}")
        else:
            others.append(name)
    return of_sections + of_options, [_ignored(others)] if others else []


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        values = parse_json(text)
    except Malformed:
        return None
    return values if isinstance(values, dict) else None


def _ignored(names: Sequence[str]) -> str:
    return (
        f"not used, though set in the environment: {listed(map(shown, names), ', ')}. An option is {ENV_PREFIX}SECTION"
        f"{ENV_DELIMITER}OPTION, as in {ENV_PREFIX}SERVER{ENV_DELIMITER}PORT; a whole section is a JSON object"
    )


def _known(option: str, origin: str) -> None:
    """Refuses an option that does not exist, with the nearest that does."""
    known = options()
    if option in known:
        return
    option = option[:LONGEST_SHOWN]
    section = option.partition(".")[0]
    siblings = [other for other in known if other.startswith(f"{section}.")]
    near = difflib.get_close_matches(option, siblings or known, 1, 0)
    raise ConfigError(f"unknown option {shown(option)} ({origin}); did you mean {near[0]}?")


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """One line that names every option at fault."""
    parts = []
    for problem in error.errors():
        option = ".".join(map(str, problem["loc"][:2]))
        given = "" if option in SECRET else f", not {brief(problem['input'])}"
        parts.append(f"{option} ({origins.get(option, 'default')}): {problem['msg']}{given}")
    return listed(parts)
