"""What the settings say of an upstream: which servers, by which protocol, and what they are asked for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

from bdh_batch.errors import ConfigError
from bdh_batch.system.sizes import parse_bytes

HOP_BY_HOP = frozenset(
    ("connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)
NEVER_PASSED = frozenset(("messages", "model", "prompt", "stream", "stream_options"))  # each API has its own
HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
METADATA_NAME = re.compile(r"[a-z0-9._-]+")
PORT = re.compile(r"[0-9]{1,5}")

Seconds = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Bytes = Annotated[PositiveInt, BeforeValidator(parse_bytes)]
DATATYPES = ("BYTES", "BOOL", "INT32", "INT64", "UINT32", "UINT64", "FP32", "FP64")


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise PydanticCustomError("url", "a URL as in http://host:8000/v1 is expected") from error
    if (
        port == 0
        or parts.scheme not in ("http", "https")
        or not parts.hostname
        or " " in value
        or parts.query
        or parts.fragment
    ):
        raise PydanticCustomError("url", "a URL as in http://host:8000/v1 is expected")
    if "@" in parts.netloc:
        raise PydanticCustomError("url", "a key does not belong into the URL: use key_env or key_file")
    return value.rstrip("/")


def _address(value: str) -> str:
    host, colon, port = value.rpartition(":")
    if not (colon and host and PORT.fullmatch(port) and 0 < int(port) < 65536) or set("/ ") & set(value):
        raise PydanticCustomError("address", "host:port is expected, as in 127.0.0.1:8001")
    return value


def _header(value: str) -> str:
    name = value.lower()
    if not HEADER_NAME.fullmatch(name) or name in HOP_BY_HOP:
        raise PydanticCustomError("header", "the name of a header that concerns the request is expected")
    return name


Url = Annotated[str, AfterValidator(_url)]
Address = Annotated[str, AfterValidator(_address)]
Header = Annotated[str, AfterValidator(_header)]
HeaderValue = Annotated[str, Field(pattern=r"^[\x20-\x7e]*$")]
Hidden = PlainSerializer(lambda values: dict.fromkeys(values, "***"), dict[str, str])  # they may hold secrets


class Entry(BaseModel):
    """The base of all parts of an upstream's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Upstream(Entry):
    """The options that all kinds of upstreams have."""

    id: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$",
        description="Name of the model in the API, and of the upstream in errors and metrics.",
    )
    aliases: list[str] = Field([], description="Other names that requests may use.")
    drop: list[str] = Field(
        [],
        description="Fields of requests that this upstream cannot express and that are left out; others are refused.",
    )
    defaults: dict[str, JsonValue] = Field(
        {}, description="Fields that the upstream gets where a request leaves them out, as in {max_tokens: 256}."
    )
    tokenizer: Path | None = Field(
        None,
        description="Model folder, or tokenizer.json, whose tokens are counted; null: usage that the upstream does "
        "not report is estimated, and says so.",
    )
    key_env: str | None = Field(None, description="Environment variable with the API key that the upstream gets.")
    key_file: Path | None = Field(None, description="File with that key.")
    headers: Annotated[dict[Header, HeaderValue], Hidden] = Field(
        {}, description="Headers, or gRPC metadata, of every request."
    )
    pass_headers: list[Header] = Field([], description="Headers of the client's that are passed on; no other is.")
    max_message_bytes: Bytes = Field(
        2**20, description="Largest message, event or line of the upstream; a larger one ends the request."
    )
    max_response_bytes: Bytes = Field(
        64 * 2**20, description="Longest text of one choice; a longer one ends the request."
    )
    max_requests: PositiveInt = Field(256, description="Most requests under way at the upstream; others wait.")
    connect_seconds: Seconds = Field(5.0, description="Seconds in which a connection has to stand.")
    first_token_seconds: Seconds = Field(120.0, description="Seconds from the request to its first token.")
    gap_seconds: Seconds = Field(60.0, description="Seconds between two tokens.")
    health_seconds: Seconds = Field(10.0, description="Seconds between two health checks of an endpoint.")
    failures: PositiveInt = Field(3, description="Failures in a row after which an endpoint is left alone for a while.")
    backoff_seconds: Seconds = Field(1.0, description="That while, doubled with every further failure.")
    max_backoff_seconds: Seconds = Field(60.0, description="The longest such while.")
    max_failovers: PositiveInt = Field(2, description="Endpoints that one request may lose; then it fails.")
    ours: bool | None = Field(
        None,
        description="Whether the endpoints are servers like this one, that generate the same: a stream whose endpoint "
        "is lost then goes on at another one. null finds out.",
    )

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.key_env is not None and self.key_file is not None:
            raise PydanticCustomError("key", "key_env cannot be used with key_file")
        own = {*self.headers, *(["authorization"] if self.key_env or self.key_file else [])}
        for name in own.intersection(self.pass_headers):
            raise PydanticCustomError("headers", "{name} is set here, and so cannot be passed on", {"name": name})
        return self

    @property
    def addresses(self) -> list[str]:
        """The endpoints."""
        raise NotImplementedError

    @property
    def target(self) -> str:
        """What is asked for there, as errors name it."""
        raise NotImplementedError

    def key(self) -> str | None:
        """Returns the API key. Raises ConfigError where it cannot be read."""
        where = f"upstreams.{self.id}"
        if self.key_env is not None:
            if not (key := os.environ.get(self.key_env, "").strip()):
                raise ConfigError(f"{where}.key_env: the environment has no {self.key_env}")
        elif self.key_file is not None:
            try:
                key = self.key_file.read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{where}.key_file: {self.key_file} cannot be read: {error}") from error
            if not key:
                raise ConfigError(f"{where}.key_file: {self.key_file} is empty")
        else:
            return None
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{where}: the key should be printable ASCII")
        return key


def _more(value: str) -> str:
    if value in NEVER_PASSED:
        raise PydanticCustomError(
            "field", "a field besides {names} is expected", {"names": ", ".join(sorted(NEVER_PASSED))}
        )
    return value


class HttpUpstream(Upstream):
    """The base of upstreams that are asked by HTTP, at one URL or at several alike."""

    url: Url | None = Field(None, description="Base URL of the server.")
    endpoints: list[Url] = Field([], description="Base URLs of several servers with the same model.")
    ca_file: Path | None = Field(None, description="PEM file of the authorities to trust; null: the usual ones.")

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if (self.url is None) == (not self.endpoints):
            raise PydanticCustomError("endpoints", "url, or endpoints, is needed")
        return self

    @property
    def addresses(self) -> list[str]:
        return [*self.endpoints] if self.url is None else [self.url]


class OpenAIUpstream(HttpUpstream):
    """A server of OpenAI's API. Its URL ends where /chat/completions begins, mostly in /v1."""

    kind: Literal["openai"]
    model: str | None = Field(None, description="Name of the model there; null is the id.")
    include_usage: bool = Field(True, description="Whether streams are asked for their usage.")
    pass_fields: list[Annotated[str, AfterValidator(_more)]] = Field(
        [],
        description="Fields of requests that go on although this server does not know them, or keeps them as labels.",
    )

    @property
    def target(self) -> str:
        return f"the model {self.model or self.id!r}"


class HtmlSections(Entry):
    """How the HTML that an app puts into its texts becomes plain text."""

    thoughts: list[str] = Field(
        ["details.thought"], description="CSS selectors of sections that are thoughts: reasoning_content, if wanted."
    )
    remove: list[str] = Field(
        [
            *("details[style*='opacity:0.6']", "details[style*='opacity: 0.6']"),
            *("div[style*='color:#666']", "div[style*='color: #666']"),
        ],
        description="CSS selectors of what is taken out, as debug output and latencies.",
    )
    placeholders: list[str] = Field([], description="Texts that stand where there is none yet, as `Thinking...`.")
    max_tags: PositiveInt = Field(
        2048, le=8192, description="Most tags of a text, and most attributes in them; more end the request."
    )


class GradioUpstream(HttpUpstream):
    """A Gradio app. Its URL is that of the app, without /gradio_api."""

    kind: Literal["gradio"]
    api: str = Field("chat", pattern=r"^[A-Za-z0-9_.-]+$", description="Name of the app's endpoint, without a slash.")
    inputs: list[JsonValue] = Field(
        ["{message}", "{history}"],
        description="What the endpoint is given, in its order: values, and {message}, {history}, {system}, {prompt} or "
        "a field of the request, as {temperature}.",
    )
    history: Literal["messages", "pairs"] = Field(
        "messages", description="How earlier messages are given: a list of messages, or pairs of texts."
    )
    system: str | None = Field(None, description="{system} where a conversation has no system message.")
    output: int = Field(0, ge=0, description="Which of the endpoint's outputs has the text or the conversation.")
    html: HtmlSections | None = Field(HtmlSections(), description="null: texts have no HTML, and stay as they are.")
    reasoning: bool = Field(False, description="Whether thoughts are passed on as reasoning_content.")

    @property
    def target(self) -> str:
        return f"the endpoint {self.api!r}"

    @property
    def placeholders(self) -> set[str]:
        """The names in braces of all inputs."""
        return {each[1:-1] for each in self.inputs if isinstance(each, str) and each[:1] + each[-1:] == "{}"}


class Tensor(Entry):
    """A tensor that a field of the request becomes."""

    name: str
    datatype: Literal["BYTES", "BOOL", "INT32", "INT64", "UINT32", "UINT64", "FP32", "FP64"]
    shape: list[int] = Field([1], description="Its shape; all is one element.")


def _tensors() -> dict[str, Tensor]:
    kinds = {"max_tokens": "INT32", "temperature": "FP32", "top_p": "FP32", "top_k": "INT32"}
    return {name: Tensor.model_validate({"name": name, "datatype": kind}) for name, kind in kinds.items()}


class Outputs(Entry):
    """The names of the tensors in a response; of several names, the first that is there."""

    text: list[str] = ["text", "token", "text_output"]
    finish_reason: list[str] = ["finish_reason"]
    token_ids: list[str] = ["token_ids"]


class KServeUpstream(Upstream):
    """A server of the KServe v2 protocol, asked by gRPC."""

    kind: Literal["kserve"]
    endpoints: list[Address] = Field(min_length=1, description="host:port of one server, or of several alike.")
    model: str | None = Field(None, description="Name of the model there, or of a capability; null is the id.")
    stream_model: str | None = Field(None, description="The name for ModelStreamInfer, where it is another one.")
    version: str = Field("", description="Version of the model.")
    streaming: bool | None = Field(
        None,
        description="Whether ModelStreamInfer is called, else ModelInfer; null: ModelInfer where there is no other.",
    )
    prompt: Tensor = Field(Tensor(name="prompt", datatype="BYTES"), description="The tensor with the prompt.")
    inputs: dict[str, Tensor] = Field(default_factory=_tensors, description="Fields of requests that become tensors.")
    parameters: list[str] = Field([], description="Fields of requests that become parameters of the request.")
    outputs: Outputs = Field(
        Outputs(),
        description="Names of the tensors text (by default text, token or text_output), "
        "finish_reason and token_ids in responses; each a list of those that there may be.",
    )
    pass_request_id: bool = Field(
        False,
        description="Whether requests have the same ids there as here, which clients may choose by x-request-id; else "
        "each has a random one.",
    )
    template: Path | None = Field(
        None,
        description="A file with a Jinja template that makes a prompt of a conversation; null is the built-in one.",
    )
    tls: bool = Field(False, description="Whether connections are encrypted.")
    ca_file: Path | None = Field(None, description="PEM file of the authorities to trust; null: the usual ones.")

    @model_validator(mode="after")
    def _metadata(self) -> Self:
        for name in (*self.headers, *self.pass_headers):
            if not METADATA_NAME.fullmatch(name) or name.startswith("grpc-") or name.endswith("-bin"):
                text = "gRPC has no metadata of text with the name {name}"
                raise PydanticCustomError("metadata", text, {"name": name})
        return self

    @property
    def addresses(self) -> list[str]:
        return [*self.endpoints]

    @property
    def target(self) -> str:
        return f"the model {self.model or self.id!r}"


AnyUpstream = Annotated[KServeUpstream | GradioUpstream | OpenAIUpstream, Field(discriminator="kind")]
