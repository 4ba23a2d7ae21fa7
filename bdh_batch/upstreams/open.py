"""Opens upstreams from their settings."""

from __future__ import annotations

from pathlib import Path

from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.text.folder import load_text
from bdh_batch.text.tokenizer import TokenIdsOnly, Tokenizer
from bdh_batch.upstreams.backend import UpstreamBackend
from bdh_batch.upstreams.choice import Route
from bdh_batch.upstreams.config import AnyUpstream, GradioUpstream, OpenAIUpstream
from bdh_batch.upstreams.endpoints import Endpoints, Observer
from bdh_batch.upstreams.gradio import GradioConnector
from bdh_batch.upstreams.openai import OpenAIConnector
from bdh_batch.upstreams.protocol import Connector


def open_upstream(upstream: AnyUpstream, timeout: float | None, observer: Observer) -> UpstreamBackend:
    """Returns the backend of an upstream. It asks nobody before it is started, on the event loop.

    Args:
        timeout: seconds that a request may take in all; None is no limit.

    Raises:
        ConfigError: a key, a tokenizer or a certificate cannot be read.
    """
    connector = _connector(upstream)
    route = Route(upstream, connector, Endpoints(upstream, connector), observer)
    return UpstreamBackend(route, _tokenizer(upstream), timeout)


def _connector(upstream: AnyUpstream) -> Connector:
    if isinstance(upstream, OpenAIUpstream):
        return OpenAIConnector(upstream)
    if isinstance(upstream, GradioUpstream):
        return GradioConnector(upstream)
    try:
        from bdh_batch.upstreams.kserve import KServeConnector  # an extra: needed only for this kind
    except ImportError as error:
        text = f"gRPC is not installed ({error}); pip install 'bdh-batch[kserve]'"
        raise ConfigError(f"upstreams.{upstream.id}.kind: {text}") from error
    return KServeConnector(upstream)


def _tokenizer(upstream: AnyUpstream) -> Tokenizer | None:
    if upstream.tokenizer is None:
        return None
    where = f"upstreams.{upstream.id}.tokenizer"
    path: Path = upstream.tokenizer
    try:
        tokenizer = load_text(path if path.is_dir() else path.parent).tokenizer
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if isinstance(tokenizer, TokenIdsOnly):
        raise ConfigError(f"{where}: {path} has no tokenizer")
    return tokenizer
