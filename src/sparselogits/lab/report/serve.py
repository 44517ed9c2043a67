"""Serve pages on the loopback interface, each rendered when it is requested."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer

from sparselogits.errors import InvalidArgumentError, SparseLogitsError

_HOST = "127.0.0.1"
PREFIX = "/window/"
"""URL path of a page, without the index of the window."""


class PageServer(HTTPServer):
    """HTTP server that renders `page(INDEX)` at http://127.0.0.1:PORT/window/INDEX.

    Requests for hosts other than 127.0.0.1 and localhost are rejected, because a web page whose
    host name resolves to this address could otherwise read the text of the cache.

    Args:
        page: function that returns the HTML of a window; if it raises a `SparseLogitsError`, the
            error's message is sent with status 404.
        first: index of the window to which `/` redirects.
        port: port to listen on; 0 for any free port.

    Raises:
        InvalidArgumentError: If the server cannot listen on the port.
    """

    def __init__(self, page: Callable[[int], str], *, first: int, port: int = 0) -> None:
        self.page, self.first = page, first
        try:
            super().__init__((_HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InvalidArgumentError(
                f"cannot listen on port {port} ({error}); give another port, or 0 for any free one"
            ) from error

    @property
    def address(self) -> str:
        """URL of the window `first`."""
        return f"http://{_HOST}:{self.server_port}{PREFIX}{self.first}"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 10

    def do_GET(self) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{_HOST}:{port}", f"localhost:{port}"):
            wrong_host = HTTPStatus.MISDIRECTED_REQUEST
            self._answer(wrong_host, "unknown host; use 127.0.0.1", "text/plain")
            return
        if self.path == "/":
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", f"{PREFIX}{self.server.first}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        number = self.path.removeprefix(PREFIX)
        if not self.path.startswith(PREFIX) or not number.isdecimal() or len(number) > 18:
            self._answer(HTTPStatus.NOT_FOUND, f"windows are at {PREFIX}NUMBER", "text/plain")
            return
        try:
            self._answer(HTTPStatus.OK, self.server.page(int(number)), "text/html")
        except SparseLogitsError as error:
            self._answer(HTTPStatus.NOT_FOUND, str(error), "text/plain")

    def _answer(self, status: HTTPStatus, text: str, kind: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Suppress the log of requests."""
