"""gRPC settings for every connection inside the cluster: both ends notice within seconds that the other host is gone.

A process that dies closes its sockets; a host that vanishes, or a network that is cut, closes nothing, and a stream
without traffic would wait for ever. Each end therefore pings the other, also while a connection is idle, and a client's
pings are never counted against it. Servers and clients belong together: a server without `SERVER_OPTIONS` answers a
client with `CHANNEL_OPTIONS` by closing the connection (GOAWAY, too_many_pings). Knows nothing of who connects to whom.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc.aio

KEEPALIVE_MS = 5_000
MAX_MESSAGE_BYTES = 64 << 20
MAX_RECONNECT_MS = 1_000

Options = Sequence[tuple[str, int]]
OpenChannel = Callable[[str], grpc.aio.Channel]
"""From an address to a channel: what everybody who calls somebody is given, and a simulation replaces."""

_BOTH_ENDS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    # Decides together with the one above, and is a minute unless told.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

# Channels do not share connections: closing one must not depend on another.
CHANNEL_OPTIONS: Options = (
    *_BOTH_ENDS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_MS),
)

# One port, one server. The last two forgive any number of pings, so that both ends need not agree on their pace.
SERVER_OPTIONS: Options = (
    *_BOTH_ENDS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.max_ping_strikes", 0),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to a server of this cluster. Must be closed."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
