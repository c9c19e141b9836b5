"""HTTP servers of tests, on this machine alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any


class QuietHandler(BaseHTTPRequestHandler):
    """Answers without a line for each request; `server` is the one of `serving`."""

    server: Any

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(handler: type[QuietHandler], **attributes: Any) -> Iterator[Any]:
    """Run a server until the block ends; it has its `url`, and these attributes for its handler."""
    http: Any = HTTPServer(("127.0.0.1", 0), handler)
    vars(http).update(attributes, url=f"http://127.0.0.1:{http.server_port}")
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield http
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
