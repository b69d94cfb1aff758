"""`GET /metrics` on a thread of its own, so that a slow scrape never holds up a token.

Knows a registry and a port. Raises OSError when the port is taken.
"""

from __future__ import annotations

import threading
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

POLL_S = 0.05


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = 10

    def log_message(self, format: str, *args: object) -> None:
        """One line for each scrape would drown the log."""


class MetricsServer:
    """Serves from construction to `close`. `port` 0 takes a free one; `address` tells which."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self._server = make_server(host, port, make_wsgi_app(registry), _Server, _QuietHandler)
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
