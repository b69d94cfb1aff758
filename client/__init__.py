"""What applications import. Needs grpcio and protobuf, nothing else; may import `proto` only."""

from pdserve.client.async_client import AsyncClient, AsyncStream
from pdserve.client.request import Chat, GenerateOptions, Prompt
from pdserve.client.results import Completion, Delta, Health, ModelInfo, Timings, Usage
from pdserve.client.sync_client import Client, Stream

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Chat",
    "Client",
    "Completion",
    "Delta",
    "GenerateOptions",
    "Health",
    "ModelInfo",
    "Prompt",
    "Stream",
    "Timings",
    "Usage",
]
