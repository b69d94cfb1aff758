"""How the two ends of a link meet: the sink listens, the source connects and shows that it was invited.

The address carries a secret, so that a stray or stale connection never becomes a link. The socket serves to exchange
the addresses of the link proper, within one deadline, and is closed then. Knows nothing of torch.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from contextlib import suppress

from pdserve.kv_transfer.link import Deadline
from pdserve.proto.errors import TransferFailed

_TOKEN_BYTES = 16
_HELLO_S = 1.0  # a connection that does not introduce itself in this time is dropped
_FRAME = struct.Struct("<HI")  # lengths of key and value
_MAX_VALUE_BYTES = 1 << 16


class Listener:
    """One listening socket on one address, for one invitation."""

    def __init__(self, host: str) -> None:
        try:
            family, *_, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self._socket = socket.create_server(where[:2], family=family, backlog=4)
        except OSError as error:
            raise TransferFailed(f"cannot listen for links on {host}: {error}") from error
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self.address = f"{host}:{self._socket.getsockname()[1]}/{self._token.hex()}"

    def accept(self, deadline: Deadline) -> Channel:
        """The invited peer's connection; any other is dropped. Raises `TransferFailed` at the deadline."""
        while True:
            try:
                self._socket.settimeout(deadline.left_s())
                connection, _ = self._socket.accept()
            except OSError as error:
                raise TransferFailed(f"the source did not come to the link: {error}") from error
            channel = Channel(connection)
            try:
                token = channel.read(_TOKEN_BYTES, Deadline(min(_HELLO_S, deadline.left_s())))
            except TransferFailed:
                channel.close()
                continue
            if hmac.compare_digest(token, self._token):
                return channel
            channel.close()

    def close(self) -> None:
        self._socket.close()


class Channel:
    """A connected socket that carries (key, value) pairs, both ways."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection

    def put(self, key: str, value: bytes, deadline: Deadline) -> None:
        name = key.encode()
        self.write(_FRAME.pack(len(name), len(value)) + name + value, deadline)

    def next(self, deadline: Deadline) -> tuple[str, bytes]:
        """The next pair of the peer's."""
        num_key_bytes, num_value_bytes = _FRAME.unpack(self.read(_FRAME.size, deadline))
        if num_value_bytes > _MAX_VALUE_BYTES:
            raise TransferFailed(f"the peer sent {num_value_bytes} bytes while opening the link")
        key = self.read(num_key_bytes, deadline)
        return key.decode(errors="replace"), self.read(num_value_bytes, deadline)

    def write(self, data: bytes, deadline: Deadline) -> None:
        try:
            self._socket.settimeout(deadline.left_s())
            self._socket.sendall(data)
        except OSError as error:
            raise TransferFailed(f"the peer went away while the link was opened: {error}") from error

    def read(self, num_bytes: int, deadline: Deadline) -> bytes:
        received = bytearray()
        while len(received) < num_bytes:
            try:
                self._socket.settimeout(deadline.left_s())
                part = self._socket.recv(num_bytes - len(received))
            except OSError as error:
                raise TransferFailed(f"the peer went away while the link was opened: {error}") from error
            if not part:
                raise TransferFailed("the peer hung up while the link was opened")
            received += part
        return bytes(received)

    def close(self) -> None:
        """The peer notices at once, whoever still refers to the socket."""
        with suppress(OSError):  # it is not connected any more
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(address: str, deadline: Deadline) -> Channel:
    """Go to the sink that listens at `address`. Raises `TransferFailed`."""
    where, _, token = address.rpartition("/")
    host, _, port = where.rpartition(":")
    try:
        invitation = bytes.fromhex(token)
        connection = socket.create_connection((host, int(port)), timeout=deadline.left_s())
    except (OSError, ValueError, OverflowError) as error:
        raise TransferFailed(f"cannot reach the sink of the link at {where}: {error}") from error
    channel = Channel(connection)
    try:
        channel.write(invitation, deadline)
    except TransferFailed:
        channel.close()
        raise
    return channel
