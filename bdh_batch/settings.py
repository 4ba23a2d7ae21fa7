"""Every option, typed, once. A YAML file < environment variables < the command line."""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

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
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from bdh_batch.errors import ConfigError
from bdh_batch.system import cache_folder
from bdh_batch.system.documents import Malformed, brief, listed, parse_json, read_text, shown
from bdh_batch.system.sizes import parse_bytes
from bdh_batch.system.yaml_documents import parse_yaml
from bdh_batch.upstreams.config import AnyUpstream

LONGEST_SHOWN = 100  # characters of an option that does not exist
ENV_PREFIX, ENV_DELIMITER = "BDH_", "__"
# What is given there is not repeated.
SECRET = (
    *("auth.api_keys", "rate_limiting.storage", "response_cache.storage", "store.encryption_key"),
    *("telemetry.otlp_endpoint", "upstreams"),
)
LISTS = {"models", "upstreams"}  # options that are lists of entries, beside the sections
MAX_PRIORITY = 1000  # of a request, above 0 and below


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


def _octal(value: object) -> object:
    """660 of a YAML file, and 0o660, to '660'."""
    return str(value).removeprefix("0o") if isinstance(value, str | int) else value


def _proxy(value: str) -> str:
    return value if value == "unix" else _network(value)


def _network(value: str) -> str:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise PydanticCustomError("network", "an address or a network is expected, as in 10.0.0.0/8") from None
    return str(network) if "/" in value else value  # uvicorn trusts none that is written with bits of a host


def _storage(value: str) -> str:
    if value != "memory" and not value.startswith(("redis://", "rediss://", "redis+unix://")):
        raise PydanticCustomError("storage", "memory, or a URL as in redis://host:6379/0, is expected")
    return value


def without_password(url: str) -> str:
    """'redis://:secret@host' to 'redis://***@host'; what follows a ? may hold one, too."""
    scheme, separator, rest = url.partition("?")[0].rpartition("://")
    return f"{scheme}{separator}***@{rest.rpartition('@')[2]}" if "@" in rest else f"{scheme}{separator}{rest}"


Bytes = Annotated[PositiveInt, BeforeValidator(parse_bytes)]
Strings = Annotated[list[str], BeforeValidator(_parse_list)]
Proxies = Annotated[list[Annotated[str, AfterValidator(_proxy)]], BeforeValidator(_parse_list)]
Storage = Annotated[str, AfterValidator(_storage), PlainSerializer(without_password, str)]
Collector = Annotated[AnyHttpUrl, PlainSerializer(lambda url: without_password(str(url)), str)]
Weights = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9a-f]{16}$")], Annotated[float, Field(ge=0.001, le=1000)]],
    BeforeValidator(_parse_mapping),
]
ModelId = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,128}$")]
Names = Annotated[list[ModelId], BeforeValidator(_parse_list)]
Devices = Annotated[list[Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]], BeforeValidator(_parse_list)]
Secrets = Annotated[
    list[SecretStr],
    BeforeValidator(_parse_list),
    PlainSerializer(lambda keys: ["***"] * len(keys), list[str]),
]


class Section(BaseModel):
    """The base of a section of the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Server(Section):
    """Where and for whom the server listens."""

    host: str = Field(
        "127.0.0.1", description="Address to listen on, or a name, for all its addresses; 0.0.0.0 for all of IPv4."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    uds: Path | None = Field(
        None,
        description="Path of a Unix socket to listen on instead of host and port. Sockets that systemd hands over go "
        "before either.",
    )
    uds_mode: Annotated[str, Field(pattern=r"^0?[0-7]{3}$"), BeforeValidator(_octal)] = Field(
        "660", description="Permissions of that socket, in octal."
    )
    allowed_hosts: Strings | None = Field(
        None,
        description='Names that requests may call this server by (the Host header), as in ["api.example.com", '
        '"*.example.com"], without ports; ["*"] is any. Health probes by address need a Host header of their own, or '
        "the address in this list. null is any, but where the server listens on loopback "
        "addresses only, without keys and trusted proxies, it is addresses, names without a dot, and names in "
        "localhost, local, internal and home.arpa, so that no web page on another name passes for this machine's own "
        "(DNS rebinding).",
    )
    workers: PositiveInt = Field(
        1,
        le=64,
        description="Processes that serve HTTP at one port. With more than one, engines have processes of their own "
        "(engine.replicas, else 1).",
    )
    max_loaded_models: PositiveInt | None = Field(
        None,
        description="Most of the `models` that are loaded at once; for one more, the one on demand that has been used "
        "least recently is unloaded. null is all of them.",
    )
    pid_file: Path | None = Field(
        None,
        description="Where a server of several processes writes its process id, for `bdh-batch reload`; null is a file "
        "of the user's that is named by the port.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="How long running streams may go on after SIGTERM."
    )
    cors_origins: Strings = Field(
        [],
        description='Origins of web pages that may call, as in ["https://chat.example.com"], also with credentials; '
        '["*"] is all, without credentials.',
    )
    sse_keepalive_seconds: float = Field(
        15.0,
        ge=0,
        allow_inf_nan=False,
        description="Silence after which a stream gets a comment, so that proxies keep it open; 0 is never.",
    )
    trusted_proxies: Proxies = Field(
        [],
        description="Addresses and networks of proxies whose x-forwarded-for is believed; unix stands "
        "for clients of server.uds.",
    )
    tls_cert: Path | None = Field(None, description="PEM file of the certificate and its chain; with it, HTTPS only.")
    tls_key: Path | None = Field(None, description="PEM file of its private key, without a passphrase.")
    ui: bool = Field(
        True,
        description="Whether browsers get a page at /ui, and at /, to talk to the model and to watch the server. The "
        "page is open to all; what it asks for takes the same keys as any request.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")
    log_format: Literal["text", "json"] = Field(
        "text", description="How it is logged: text, or JSON, one line an event, for programs that collect logs."
    )
    access_log: bool | None = Field(
        None,
        description="Whether each request is logged once it has ended, with its id, tenant, model, tokens and times, "
        "never its text; null is where log_format is json. Probes and scrapes are logged at log_level debug only.",
    )


class Model(Section):
    """What is served."""

    path: Path | None = Field(
        None,
        description="Model folder, .safetensors, .pt or .npz file, or a name that `bdh-batch model list` shows, where "
        "no file has it; null is the bundled model.",
    )
    name: str | None = Field(
        None, description="Name in the API; null is the registry's name, or that of the folder or file."
    )
    aliases: Strings = Field([], description="Other names that requests may use.")
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto takes CUDA where there is a GPU.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32",
        description="The dtype of the weights. On a CPU, bfloat16 is half the size with avx512_bf16, else widened.",
    )
    attention_window: NonNegativeInt | None = Field(
        None,
        description=(
            "Tokens that a token can look back on; 0 is all, null the model folder's attention_window, "
            "or else its trained_context."
        ),
    )
    layers: PositiveInt | None = Field(
        None, description="Layers of a .pt file that does not say how many it has; null is 6."
    )
    norm: Literal["every_layer", "final"] | None = Field(
        None,
        description="LayerNorm of the residual stream, after every layer or only after the last, of a model whose "
        "files do not say it; they may not be contradicted. null is what they say, else every_layer.",
    )
    rope_layout: Literal["interleaved", "half"] | None = Field(
        None,
        description="Which neurons RoPE turns together, 2i and 2i + 1, or i and i + rotary_dim / 2, of a model whose "
        "files do not say it. null is what they say, else interleaved.",
    )
    rope_theta: float | None = Field(
        None,
        gt=1,
        allow_inf_nan=False,
        description="RoPE's base, of a model whose files do not say it. null is what they say, else 65536, or 10000 "
        "where rope_layout is half.",
    )
    rotary_dim: NonNegativeInt | None = Field(
        None,
        description="How many neurons of a head RoPE turns, the first ones, of a model whose files do not say it. null "
        "is what they say, else all.",
    )
    max_model_len: PositiveInt | None = Field(
        131072,
        description="Most tokens of a prompt and its completion together; null is no limit (the state never grows).",
    )
    min_latent_steps: NonNegativeInt = Field(
        0, description="Least latent steps of a request, for a model that has them."
    )
    max_latent_steps: NonNegativeInt = Field(
        64, description="Most latent steps of a request, for a model that has them; each takes as long as a token."
    )


class ModelEntry(Section):
    """One of several models. What an entry does not give is as in the sections `model`, `engine` and `chat`."""

    id: ModelId = Field(description="Its name in the API.")
    path: Path | None = Field(None, description="As model.path.")
    aliases: Names = Field([], description="Other names that requests may use.")
    load: Literal["warm", "on_demand"] = Field(
        "warm", description="warm: loaded when the server starts. on_demand: loaded at its first request."
    )
    keep_alive: float = Field(
        300.0,
        ge=0,
        description="Seconds without a request after which a model on demand is unloaded; .inf is never.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="As model.device.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="As model.dtype.")
    attention_window: NonNegativeInt | None = Field(None, description="As model.attention_window.")
    layers: PositiveInt | None = Field(None, description="As model.layers.")
    norm: Literal["every_layer", "final"] | None = Field(None, description="As model.norm.")
    rope_layout: Literal["interleaved", "half"] | None = Field(None, description="As model.rope_layout.")
    rope_theta: float | None = Field(None, gt=1, allow_inf_nan=False, description="As model.rope_theta.")
    rotary_dim: NonNegativeInt | None = Field(None, description="As model.rotary_dim.")
    max_model_len: PositiveInt | None = Field(None, description="As model.max_model_len.")
    min_latent_steps: NonNegativeInt = Field(0, description="As model.min_latent_steps.")
    max_latent_steps: NonNegativeInt = Field(64, description="As model.max_latent_steps.")
    state_dtype: Literal["float32", "bfloat16"] = Field("float32", description="As engine.state_dtype.")
    state_memory: Bytes | None = Field(None, description="As engine.state_memory.")
    state_memory_share: float | None = Field(None, gt=0, le=0.95, description="As engine.state_memory_share.")
    replicas: PositiveInt | None = Field(None, le=64, description="As engine.replicas; null is 1.")
    devices: Devices = Field([], description="As engine.devices.")
    threads: PositiveInt | None = Field(None, description="As engine.threads.")
    template: Path | None = Field(None, description="As chat.template.")


Entries = TypeVar("Entries", bound=Sequence[ModelEntry | AnyUpstream])


def _different_names(entries: Entries) -> Entries:
    names = [name for entry in entries for name in (entry.id, *entry.aliases)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PydanticCustomError("names", "{name} is the name of more than one model", {"name": brief(twice[0])})
    return entries


def _as_given(entries: Sequence[ModelEntry | AnyUpstream]) -> list[dict[str, Any]]:
    return [entry.model_dump(mode="json", exclude_unset=True) for entry in entries]


ModelEntries = Annotated[
    list[ModelEntry],
    Field(max_length=64),
    BeforeValidator(_parse_list),
    AfterValidator(_different_names),
    PlainSerializer(_as_given),
]


Upstreams = Annotated[
    list[AnyUpstream],
    Field(max_length=256),
    BeforeValidator(_parse_list),
    AfterValidator(_different_names),
    PlainSerializer(_as_given),
]


class Engine(Section):
    """How the model is computed."""

    kernels: Literal["auto", "torch", "cpu", "triton"] = Field(
        "auto", description="Which implementation computes a step."
    )
    state_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="The dtype of the states; bfloat16 takes half the memory, and half the traffic of decoding.",
    )
    state_memory: Bytes | None = Field(
        None,
        description='Most memory for states, of running sequences and cached prefixes, as in "4 GiB"; null is a share '
        "of what is free. Without a GPU, memory is taken only as it is needed.",
    )
    state_memory_share: float | None = Field(
        None,
        gt=0,
        le=0.95,
        description="That share, where state_memory is null; null is 0.5 on a GPU, and 0.25 without one, but at most "
        "4 GiB, or where few states fit that, up to 0.5 for 4 of them.",
    )
    idle_release_seconds: float = Field(
        300.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after which main memory for unused states goes back to the system; 0 is never.",
    )
    file_memory: Bytes | None = Field(
        None,
        description="Host memory for states on their way from and to files, one each way at least; null is 512 MiB, or "
        "an eighth of what is free. A state that finds none when it should be saved is not.",
    )
    replicas: PositiveInt | None = Field(
        None,
        le=64,
        description="Engine processes. null: the engine runs in the server's own process. With engine processes, "
        "streams are resumed on another engine when one is lost.",
    )
    devices: Devices = Field(
        [],
        description="Devices of the engine processes, one for each, as in [cuda:0, cuda:1]; empty: all use "
        "model.device.",
    )
    heartbeat_seconds: float = Field(
        5.0, ge=0.2, le=600, description="Seconds without a heartbeat after which an engine process counts as lost."
    )
    max_failovers: PositiveInt = Field(
        2, description="Engines in a row that a request may lose without a token; then it ends with an error."
    )
    threads: PositiveInt | None = Field(
        None, description="CPU threads that compute; null is one per core, as far as CPU quotas go."
    )


class Scheduler(Section):
    """How requests are queued, batched and shared fairly."""

    max_running: PositiveInt = Field(
        256,
        description="Most sequences under way; where memory holds fewer states, they take time slices. If this is not "
        "set and there is no GPU, also at most 3/8 of the states that fit, but 64 at least: more compute no faster.",
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
    quantum_steps: PositiveInt = Field(
        64, description="Steps of a time slice, where not all running sequences fit memory."
    )
    queue_timeout: PositiveFloat | None = Field(
        None, allow_inf_nan=False, description="Seconds that a request may wait; null is no limit."
    )
    request_timeout: PositiveFloat | None = Field(
        None,
        allow_inf_nan=False,
        description="Seconds from a request's arrival to its end; a request may ask for less by x-request-timeout.",
    )
    top_priority: int = Field(
        0,
        ge=-MAX_PRIORITY,
        le=MAX_PRIORITY,
        description="The lowest priority of requests without a right of their own: without a key, or with a key "
        "without a top_priority. Lower goes first; less is refused with 403.",
    )
    priority_patience_seconds: PositiveFloat = Field(
        30.0,
        allow_inf_nan=False,
        description="Waiting this long, for a slot or a share of a step, raises a sequence to the highest priority.",
    )
    weights: Weights = Field(
        {}, description="Shares of API keys, by the first 16 hex digits of the key's SHA-256; others have 1."
    )
    trace_file: Path | None = Field(None, description="Where decisions are written as JSON lines; null is nowhere.")


class PrefixCache(Section):
    """The cache of prefixes."""

    enabled: bool = Field(
        True, description="Whether the states of prompts and completions are cached for later requests."
    )
    shared: bool = Field(False, description="Whether API keys share them; timing then reveals what others have asked.")
    entries: PositiveInt = Field(
        256,
        description="Most states on the device beside those of running sequences. Without a GPU, more than half of the "
        "states that fit are used only where requests asked for prefixes that were evicted.",
    )
    host_memory: Bytes | None = Field(
        None,
        description="Host memory for states, cached or preempted by swap; null is 1 GiB, or a quarter of what is free, "
        "beside a GPU, and none without one, where it would be copied from memory to memory, unless dtype is set.",
    )
    dtype: Literal["bfloat16", "int8"] | None = Field(
        None,
        description="The dtype of cached prefixes in host memory, which then holds nothing else: sequences are "
        "preempted by recompute, not by swap. int8 has a float32 scale for each row. What begins in such a prefix is "
        "slightly different from what was computed. null is engine.state_dtype, exact.",
    )
    min_tokens: PositiveInt = Field(32, description="Fewest tokens of a prefix that is cached or shared.")


class Speculative(Section):
    """Drafts: tokens that are checked together with a sequence's next one. They change no text."""

    method: Literal["ngram"] | None = Field(
        None,
        description="ngram: what came where the last tokens were before, in the prompt or the completion. Needs the "
        "cpu kernels, and a model without latent steps. null is none.",
    )
    num_speculative_tokens: PositiveInt = Field(
        8, le=64, description="Most tokens of a draft; fewer are tried where they come true too seldom to pay."
    )
    prompt_lookup_min: PositiveInt = Field(
        8, le=256, description="Fewest last tokens of a sequence that must have been there before."
    )


class Generation(Section):
    """What a request that does not say gets; null is what the folder's generation_config.json says, if it does."""

    max_tokens: PositiveInt | None = Field(None, description="Most tokens of a completion; else 256.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token; else 1.")
    top_p: float | None = Field(None, gt=0, le=1, description="Only the likeliest tokens that together reach this.")
    top_k: int | None = Field(None, ge=-1, description="Only this many of the likeliest tokens; 0 and -1 are off.")


class Chat(Section):
    """How conversations become prompts."""

    template: Path | None = Field(None, description="A file with a Jinja template to use instead of the model's.")
    parse_special_tokens: bool = Field(
        False, description="Whether text in messages that spells a special token becomes one, as the template's does."
    )


class Auth(Section):
    """API keys, and what is open without one."""

    enabled: bool = Field(
        False,
        description="Whether every path but probes, metrics and docs asks for a key: Authorization: Bearer KEY, or "
        "x-api-key: KEY.",
    )
    api_keys: Secrets = Field([], description="The keys, in plain.")
    api_keys_file: Path | None = Field(
        None, description="A file with more keys, as `bdh-batch keys` makes it, or one a line; changes are seen."
    )
    protect_metrics: bool = Field(False, description="Whether /metrics asks for a key, too.")
    protect_docs: bool = Field(False, description="Whether /docs and /openapi.json ask for a key, too.")


class RateLimiting(Section):
    """Limits per minute for each caller."""

    enabled: bool = Field(
        False, description="Whether each key (without a key, each address) is limited; a key's own limits always hold."
    )
    requests_per_minute: PositiveInt = Field(600, description="Requests in any minute; more are refused with 429.")
    tokens_per_minute: PositiveInt | None = Field(
        None,
        description="Tokens in any minute, of prompts and of their completions at most; null is no limit.",
    )
    storage: Storage = Field(
        "memory",
        description="What counts them: memory, or the redis:// or rediss:// URL of a Redis that servers share.",
    )


class ResponseCache(Section):
    """Responses to requests that determine them (temperature 0, or a seed), kept for the same request of one caller."""

    enabled: bool = Field(False, description="Whether responses are kept; a replayed one has the header x-cache: hit.")
    storage: Storage = Field(
        "memory",
        description="Where they are kept: memory, of each process, or the redis:// or rediss:// URL of a Redis that "
        "servers share.",
    )
    ttl_seconds: PositiveFloat = Field(
        600.0, le=30 * 86400, allow_inf_nan=False, description="Seconds that a response is kept."
    )
    max_bytes: Bytes = Field(64 * 2**20, description="Most memory for them; a Redis has a limit of its own.")
    max_entry_bytes: Bytes = Field(2**20, description="Largest response that is kept.")


class Store(Section):
    """Stored responses, and states that other requests begin from."""

    path: Path | None = Field(
        None,
        description="Folder where they are stored, which several servers may share; null is a temporary one, in memory "
        "where /dev/shm has room for max_bytes, which is removed when the server ends.",
    )
    max_records: PositiveInt = Field(10_000, description="Most responses and states; the least recently used go.")
    max_bytes: Bytes = Field(
        2**30,
        description="Most bytes of all; the least recently used go, files of states before responses.",
    )
    max_bytes_per_key: Bytes | None = Field(
        None, description="Most bytes of one key, or without keys of one address; null is max_bytes."
    )
    ttl_seconds: PositiveFloat = Field(
        30 * 86400.0, allow_inf_nan=False, description="Seconds that they are stored, unless a request says less."
    )
    response_states: bool = Field(
        True,
        description="Whether the states of responses are stored, too: then the next turn computes what is new in it, "
        "also after a restart; else all that no prefix cache has.",
    )
    max_state_bytes: Bytes = Field(2**29, description="Largest state that can be uploaded.")
    recent_requests: int = Field(
        256,
        ge=0,
        description="Completions of which a process remembers the tokens for a while, in memory: a state can be saved "
        "by their x-request-id.",
    )
    encryption_key: SecretStr | None = Field(
        None,
        description="Key that they are encrypted with at rest: 32 bytes in base64, as `openssl rand -base64 32` "
        "prints. null is no encryption.",
    )
    encryption_key_file: Path | None = Field(None, description="File with that key instead.")


class Limits(Section):
    """Bounds of requests and connections."""

    max_body_bytes: Bytes = Field(4 * 2**20, description="Largest request body; more is refused with 413.")
    max_header_bytes: Bytes = Field(32 * 1024, description="Largest head of a request; more is refused with 431.")
    header_seconds: PositiveFloat = Field(
        20.0, description="Seconds in which a request's headers have to come; slower ones are refused with 408."
    )
    body_seconds: PositiveFloat = Field(
        60.0, description="Seconds in which a request's body has to come; slower ones are refused with 408."
    )
    write_seconds: PositiveFloat = Field(
        60.0,
        description="Seconds in which a client has to take some of what waits for it; else its connection is closed.",
    )
    keep_alive_seconds: PositiveFloat = Field(
        75.0,
        description="Seconds that an idle connection is kept; longer than clients do, so that they close it.",
    )
    max_values: PositiveInt = Field(
        2**19,
        description="Most JSON values in a body, all token ids of its prompts included; more are refused with 400.",
    )
    max_neurons: PositiveInt = Field(
        2**20,
        description="Most neurons that a response may show: tokens x layers x `neurons.top`; about 45 bytes each.",
    )
    max_strings: PositiveInt = Field(2**17, description="Most strings in a body, the names of members included.")
    max_containers: PositiveInt = Field(2**16, description="Most lists and objects in a body.")
    max_depth: int = Field(128, ge=1, le=250, description="How deep lists and objects of a body may be nested.")
    max_members: PositiveInt = Field(
        1024, description="Most members of an object with free names: metadata, a schema, template variables."
    )
    max_label_length: PositiveInt = Field(
        4096, description="Longest name, id or label, in characters; texts may fill the body."
    )
    max_messages: PositiveInt = Field(4096, description="Most messages of a conversation.")
    max_background: PositiveInt = Field(
        64, description="Most responses in the background at a time; half of them for one caller."
    )
    max_background_bytes: Bytes = Field(
        2 * 2**20, description="Most bytes of the events of one in the background that can be read; the newest stay."
    )
    max_parts: PositiveInt = Field(1024, description="Most parts of a message's content.")
    max_tools: PositiveInt = Field(128, description="Most tools, and most calls of tools in one message.")
    max_connections: PositiveInt | None = Field(
        None,
        description="Most open connections; one more is refused with 503. null is 32768, or as many as the limit of "
        "open files has room for, which is raised as far as the system allows.",
    )
    max_connections_per_address: PositiveInt | None = Field(
        None,
        description="Most of one IPv4 address or one /64 of IPv6; one more is refused with 429, and null is half of "
        "all. Those of server.trusted_proxies and of server.uds count in all only.",
    )
    max_buffered_bytes: Bytes = Field(
        256 * 2**20,
        description="Most bytes of all requests that are held, from their arrival to their response; beyond, the "
        "largest that have not come whole are refused with 503.",
    )
    max_n: PositiveInt = Field(16, description="Most choices for one prompt (n, best_of).")
    max_prompts: PositiveInt = Field(128, description="Most prompts in one request.")
    max_inputs: PositiveInt = Field(2048, description="Most inputs in one request for embeddings.")
    max_prompt_tokens: PositiveInt | None = Field(
        None, description="Most tokens of a prompt; null is no limit but model.max_model_len."
    )
    max_stop: PositiveInt = Field(16, description="Most stop strings.")
    max_stop_bytes: Bytes = Field(1024, description="Longest stop string, in bytes of UTF-8.")
    max_stop_token_ids: PositiveInt = Field(1024, description="Most tokens of stop_token_ids.")
    max_logit_bias: PositiveInt = Field(1024, description="Most tokens of logit_bias.")
    max_bad_words: PositiveInt = Field(256, description="Most texts of bad_words.")
    max_bad_word_bytes: Bytes = Field(128, description="Longest of them, in bytes of UTF-8.")
    max_allowed_token_ids: PositiveInt = Field(2**17, description="Most tokens of allowed_token_ids.")
    max_choices: PositiveInt = Field(8192, description="Most alternatives of structured_outputs.choice.")
    max_schema_bytes: Bytes = Field(
        512 * 1024,
        description="Largest schema or grammar that a response has to follow, and largest list of tools; what one "
        "costs to compile is bounded by the section structured_output.",
    )


class Sandbox(Section):
    """Chat templates, and grammars before they are compiled, run in processes with bounds."""

    processes: PositiveInt = Field(
        2, description="Jobs at a time, of templates and of grammars each; a tenant has at most one less, but for 1."
    )
    max_queued: PositiveInt = Field(2048, description="Most jobs that wait; one more is refused with 429.")
    max_queued_bytes: Bytes = Field(64 * 2**20, description="Most bytes of waiting jobs; more is refused with 429.")
    queue_seconds: PositiveFloat = Field(
        10.0, allow_inf_nan=False, description="Seconds that a job may wait; then it is refused with 429."
    )
    template_seconds: PositiveFloat = Field(
        5.0, allow_inf_nan=False, description="Seconds of processor time that a template may take for a conversation."
    )
    template_memory: Bytes = Field(512 * 2**20, description="Memory that a template may take for a conversation.")


class StructuredOutput(Section):
    """Bounds of compiling schemas and grammars."""

    compile_seconds: PositiveFloat = Field(
        2.0, allow_inf_nan=False, description="Seconds of processor time that a schema or grammar may take to compile."
    )
    grammar_memory: Bytes = Field(64 * 2**20, description="Memory that a schema or grammar may take to compile.")
    cache_memory: Bytes = Field(256 * 2**20, description="Memory for compiled schemas and grammars that are cached.")


class Api(Section):
    """How strict the API is."""

    unknown_fields: Literal["refuse", "ignore"] = Field("refuse", description="What to do with unknown body fields.")


class KServe(Section):
    """KServe v2 (Open Inference Protocol): gRPC, and REST below /v2."""

    grpc_port: int | None = Field(
        None, ge=1, le=65535, description="Port for gRPC; null is off. REST is at server.port, below /v2, in any case."
    )
    grpc_host: str | None = Field(
        None, description="Address or name to listen on for gRPC; null is server.host. server.tls_cert holds here, too."
    )
    model_version: Annotated[str, Field(pattern="^[A-Za-z0-9._-]{1,64}$")] = Field(
        "1", description="The version that models have; requests for another one are refused."
    )
    max_calls: PositiveInt = Field(
        1024,
        description="Most gRPC calls under way, streams included; one more is refused with RESOURCE_EXHAUSTED. Each "
        "may hold a message of limits.max_body_bytes.",
    )
    max_calls_per_caller: PositiveInt | None = Field(
        None, description="Most of one key, or without keys of one address; null is half of all."
    )
    max_connections: PositiveInt = Field(
        4096, description="Most gRPC connections that are open; one more is closed at once."
    )
    max_stream_requests: PositiveInt = Field(
        64,
        description="Most requests of one ModelStreamInfer call at a time; others are read when one has ended.",
    )
    idle_seconds: PositiveFloat = Field(
        600.0,
        allow_inf_nan=False,
        description="Seconds that a call of ModelStreamInfer, or of reflection, stays open without a request.",
    )


class Ray(Section):
    """`bdh-batch ray up`: front ends and engines on a cluster of Ray."""

    address: Annotated[str, Field(pattern=r"^(auto|[^\s/]+:\d{1,5})$")] | None = Field(
        None,
        description="The cluster's head node, as in 10.0.0.1:6379, or auto for the cluster that this machine is part "
        "of; null starts one on this machine, which ends with the server.",
    )
    max_replicas: PositiveInt | None = Field(
        None,
        le=1024,
        description="Most engines of a model; between engine.replicas and this, Ray starts and ends engines as their "
        "load says. null is engine.replicas, always so many.",
    )
    target_load: float = Field(
        0.75,
        gt=0,
        le=100,
        description="Sequences that run and wait, for each that the engines can run at once, above which there is one "
        "more engine.",
    )
    upscale_seconds: float = Field(
        10.0, ge=0, allow_inf_nan=False, description="How long the load has to ask for more engines."
    )
    downscale_seconds: float = Field(
        300.0, ge=0, allow_inf_nan=False, description="How long the load has to ask for fewer engines."
    )
    gpus_per_engine: float | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs that an engine reserves, a part of one as in 0.5 included; null is 1 where model.device is "
        "cuda, else none.",
    )
    start_seconds: PositiveFloat = Field(
        600.0, allow_inf_nan=False, description="Seconds in which all of it has to be ready; else it does not start."
    )


class Health(Section):
    """When the server reports that it is unhealthy."""

    stall_seconds: PositiveFloat = Field(
        60.0, allow_inf_nan=False, description="Seconds of work without a step after which /health turns to 503."
    )
    failed_steps: PositiveInt = Field(
        3, description="Failed steps in a row after which /health turns to 503, until one succeeds."
    )


class Telemetry(Section):
    """Where spans are exported, and what metrics are called."""

    otlp_endpoint: Collector | None = Field(
        None,
        description=(
            "Where spans are sent (OTLP over HTTP), as in http://localhost:4318; null is nowhere. The environment's "
            "OTEL_ options hold, as OTEL_EXPORTER_OTLP_HEADERS."
        ),
    )
    vllm_metrics: bool = Field(
        False,
        description="Whether /metrics also has vllm:num_requests_running, vllm:num_requests_waiting and "
        "vllm:kv_cache_usage_perc, one sample a model over all engine processes, as endpoint pickers of Kubernetes' "
        "inference gateway look for them.",
    )


class Settings(BaseModel):
    """All settings of the server, by section."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    server: Server = Server()
    model: Model = Model()
    models: ModelEntries = Field(
        [],
        description="Several models instead of the one in the section `model`, as in [{id: small, path: small}, "
        "{id: large, path: models/large, load: on_demand}].",
    )
    upstreams: Upstreams = Field(
        [],
        description="Servers of others whose models are served here, too, as in [{id: gpt, kind: openai, "
        'url: "https://api.openai.com/v1", key_env: OPENAI_API_KEY}]; docs/gateway.md has the options of each kind.',
    )
    engine: Engine = Engine()
    scheduler: Scheduler = Scheduler()
    prefix_cache: PrefixCache = PrefixCache()
    speculative: Speculative = Speculative()
    generation: Generation = Generation()
    chat: Chat = Chat()
    auth: Auth = Auth()
    rate_limiting: RateLimiting = RateLimiting()
    response_cache: ResponseCache = ResponseCache()
    store: Store = Store()
    limits: Limits = Limits()
    sandbox: Sandbox = Sandbox()
    structured_output: StructuredOutput = StructuredOutput()
    api: Api = Api()
    kserve: KServe = KServe()
    ray: Ray = Ray()
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
            name, _, key = option.rpartition(".")
            if name != section and name:
                lines.append(f"{name}:")
            section = name
            lines.append(f"{'  ' if name else ''}{key}: {_scalar(value)}  # {self.origins.get(option, 'default')}")
        return "\n".join(lines)


def load(
    config: Path | None = None, overrides: Iterable[tuple[str, object]] = (), by: str = "command line"
) -> Resolved:
    """Merges a YAML file, the environment and the command line.

    Args:
        config: a YAML file of sections and keys.
        overrides: (dotted option, value) pairs of the command line.
        by: what those are called, where they are of something else.

    Raises:
        ConfigError: an unreadable file, an unknown option (with the nearest known one), a value that does not fit.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    environment, warnings = _environment_options()
    for origin, options in (
        (f"file {config}", _file_options(config)),
        ("environment", environment),
        (by, overrides),
    ):
        for option, value in options:
            _known(option, origin)
            if isinstance(value, str) and "\0" in value:  # no path may have one, and nothing else needs it
                raise ConfigError(f"{option} ({origin}): holds a NUL character")
            section, _, key = option.rpartition(".")
            (merged.setdefault(section, {}) if section else merged)[key] = value
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
    """Every option with its default and its help: those of sections are dotted, a list has its own name."""
    found = {}
    for name, section in Settings.model_fields.items():
        for option, field in _fields(name, section):
            found[option] = (field.default, field.description or "")
    return found


def _fields(name: str, section: FieldInfo) -> Iterator[tuple[str, FieldInfo]]:
    """The options of a section of that name; the list itself, where it is a list."""
    if name in LISTS:
        yield name, section
    else:
        for key, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            yield f"{name}.{key}", field


def default_yaml() -> str:
    """`config/default.yaml`: every option with its default and its help."""
    lines = [
        "# Every option of bdh_batch with its default. `bdh-batch serve --config FILE` reads a file like this one; an",
        "# environment variable (BDH_SERVER__PORT=9000) wins over it, the command line (--set server.port=9000).",
    ]
    section = ""
    for option, (default, text) in options().items():
        name, _, key = option.rpartition(".")
        indent = "  " if name else ""
        if name != section:
            lines += ["", f"{name}:"] if name else [""]
            section = name
        lines += [f"{indent}# {text}{_choices(option)}", f"{indent}{key}: {_scalar(default)}"]
    return "\n".join(lines) + "\n"


def flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, keys in values.items():
        if section in LISTS:
            yield section, keys
            continue
        for key, value in keys.items():
            yield f"{section}.{key}", value


def _choices(option: str) -> str:
    section, _, key = option.rpartition(".")
    if not section:
        return ""
    annotation = Settings.model_fields[section].annotation.model_fields[key].annotation  # type: ignore[union-attr]
    choices = get_args(annotation) if getattr(annotation, "__origin__", None) is Literal else ()
    return f" One of: {', '.join(map(str, choices))}." if len(choices) > 1 else ""


def _scalar(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
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
        if section in LISTS:
            yield section, [] if keys is None else keys
            continue
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
        if not name.upper().startswith(ENV_PREFIX) or name == cache_folder.VARIABLE:
            continue
        words = name[len(ENV_PREFIX) :].lower()
        if ENV_DELIMITER in words:
            option = words.replace(ENV_DELIMITER, ".")
            _known(option, f"environment variable {name}")
            of_options.append((option, None if value == "null" else value))
        elif words in LISTS:
            of_options.append((words, value))
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
        option = _place(problem["loc"])
        name = option.partition("[")[0]
        given = "" if option in SECRET or name in SECRET else f", not {brief(problem['input'])}"
        text = "kind is needed, one of kserve, gradio, openai" if "union_tag" in problem["type"] else problem["msg"]
        parts.append(f"{option} ({origins.get(name, 'default')}): {text}{given}")
    return listed(parts)


def _place(location: Sequence[str | int]) -> str:
    """('server', 'port') to server.port, ('models', 0, 'path') to models[0].path, ('upstreams', 0, 'openai', 'url') to
    upstreams[0].url."""
    if location[0] not in LISTS:
        return ".".join(map(str, location[:2]))
    first, *rest = [*location[:2], *location[3:]] if location[0] == "upstreams" else location[:3]
    return str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
