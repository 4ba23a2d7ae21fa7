"""A thin client on top of the official `openai` one, for what that lacks: `pip install 'bdh-batch[client]'`.

Knows the server by its HTTP interface alone.
"""

from bdh_batch.client.client import AsyncBDHClient, BDHClient
from bdh_batch.client.errors import (
    ClientError,
    ContextLengthExceeded,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    QueueFull,
    QueueTimeout,
    RateLimited,
    RetryLater,
    RunTimeout,
    ServerFailed,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnknownParameter,
    Unreachable,
    UnsupportedParameter,
)
from bdh_batch.client.parameters import ChatParameters, CompletionParameters, StreamOptions, StructuredOutputs
from bdh_batch.client.responses import Metrics, Score, ServerInfo, Text, TokenizerInfo, Tokens
from bdh_batch.client.states import AsyncStates, State, States

__all__ = [
    "AsyncBDHClient",
    "AsyncStates",
    "BDHClient",
    "ChatParameters",
    "ClientError",
    "CompletionParameters",
    "ContextLengthExceeded",
    "DeadlineExceeded",
    "Forbidden",
    "InvalidRequest",
    "Metrics",
    "ModelNotFound",
    "NotFound",
    "QueueFull",
    "QueueTimeout",
    "RateLimited",
    "RetryLater",
    "RunTimeout",
    "Score",
    "ServerFailed",
    "ServerInfo",
    "State",
    "States",
    "StreamOptions",
    "StructuredOutputs",
    "Text",
    "TokenizerInfo",
    "Tokens",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnknownParameter",
    "Unreachable",
    "UnsupportedParameter",
]
