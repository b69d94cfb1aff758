"""What the sync and the async client set up alike: channel options, address check, health call.

Knows channels, not calls: which method is called when is the clients' business.
"""

from __future__ import annotations

import re
from typing import Any

from pdserve.client.results import Health
from pdserve.client.standard import MESSAGES
from pdserve.proto.errors import InvalidRequest

DEFAULT_TIMEOUT_S = 600.0
HEALTH_TIMEOUT_S = 10.0
MAX_MESSAGE_BYTES = 64 << 20

# A channel of its own connection: two clients in one process never share a back-off or a stream limit.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
]

HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^:/\s\[\]]+):(\d{1,5})")
OTHER_SCHEMES = ("unix:", "unix-abstract:", "dns:", "ipv4:", "ipv6:", "xds:")

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_STATES = {0: Health.UNKNOWN, 1: Health.SERVING, 2: Health.NOT_SERVING}


def checked_endpoint(endpoint: str) -> str:
    """`host:port` (or a gRPC target with its scheme), or `InvalidRequest`."""
    if endpoint.startswith(OTHER_SCHEMES):
        return endpoint
    match = HOST_PORT.fullmatch(endpoint)
    if match is None or not 0 < int(match[2]) < 65536:
        raise InvalidRequest("endpoint", f"{endpoint!r} is not host:port")
    return endpoint


def health_call(channel: Any) -> Any:
    """The standard health check as a multi-callable of this channel, sync or async."""
    request, response = MESSAGES["HealthCheckRequest"], MESSAGES["HealthCheckResponse"]
    return channel.unary_unary(
        HEALTH_METHOD, request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )


def health_request() -> Any:
    return MESSAGES["HealthCheckRequest"]()


def health_from_wire(response: Any) -> Health:
    return HEALTH_STATES.get(response.status, Health.UNKNOWN)
