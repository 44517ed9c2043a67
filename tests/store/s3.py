"""Run a local S3 server, and a proxy that fails requests as networks do.

The server is moto's, in a separate process. The proxy in front of the server counts requests, and
fails the next ones as a test selects: it answers 503 or 409, or closes the connection before the
request is forwarded, after its execution but before the response, or in the middle of a body.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from sparselogits.store.storage.objects import ObjectStorage

REFUSE, CONFLICT = "answer 503", "answer 409"
DROP_BEFORE, DROP_AFTER, DROP_MIDWAY = "drop before", "drop after", "drop midway"

_SERVE = """
import logging, sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class S3Server:
    """Running S3 server of moto, until `stop`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT")
        urllib.request.urlopen(request).close()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def environment(endpoint: str) -> dict[str, str]:
    """Return the environment variables to reach a server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass(frozen=True)
class S3:
    """New bucket, reached by the usual environment variables, directly or through `proxy`."""

    bucket: str
    endpoint: str
    proxy: Proxy | None = None

    @classmethod
    def reached(
        cls, server: S3Server, setenv: Callable[[str, str], None], proxy: Proxy | None = None
    ) -> S3:
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        server.make_bucket(bucket)
        endpoint = server.endpoint if proxy is None else proxy.endpoint
        for name, value in environment(endpoint).items():
            setenv(name, value)
        return cls(bucket, endpoint, proxy)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/some/cache"

    def objects(self) -> dict[str, bytes]:
        """Return all objects of the cache by name."""
        files = ObjectStorage(self.url)._open()[0]
        root = f"{self.bucket}/some/cache"
        return {p.removeprefix(f"{root}/"): files.cat_file(p) for p in files.find(root)}


class Proxy:
    """Proxy that forwards requests to a server, except those selected to fail."""

    def __init__(self, port: int) -> None:
        self.requests: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.ignores_conditions = False
        self._plan: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, port))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def fail(self, method: str, *faults: str, clear: bool = False) -> None:
        """Fail the next requests of a method in the given ways; `clear` cancels the rest."""
        with self._lock:
            kept = [] if clear else self._plan
            self._plan = kept + [(method, fault) for fault in faults]

    def fault_of(self, method: str, path: str) -> str | None:
        with self._lock:
            listing = method == "GET" and "list-type=2" in path
            self.requests["LIST" if listing else method] += 1
            for place, (planned, fault) in enumerate(self._plan):
                if planned == method:
                    del self._plan[place]
                    self.failed[fault] += 1
                    return fault
        return None

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: Proxy, port: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = proxy.fault_of(self.command, self.path)
            if fault == DROP_BEFORE:
                self.close_connection = True
            elif fault == REFUSE:
                self.answer(503, {}, b"<Error><Code>ServiceUnavailable</Code></Error>")
            elif fault == CONFLICT:
                self.answer(409, {}, b"<Error><Code>ConditionalRequestConflict</Code></Error>")
            else:
                self.carry_out(body, fault)

        def carry_out(self, body: bytes, fault: str | None) -> None:
            server = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = dict(self.headers)
            if proxy.ignores_conditions:
                headers.pop("If-None-Match", None)
            server.request(self.command, self.path, body, headers)
            response = server.getresponse()
            data = response.read()
            server.close()
            answered = dict(response.getheaders())
            if fault == DROP_AFTER:
                self.close_connection = True
            else:
                self.answer(response.status, answered, data, midway=fault == DROP_MIDWAY)

        def answer(
            self, status: int, headers: dict[str, str], data: bytes, *, midway: bool = False
        ) -> None:
            self.send_response_only(status)
            length = headers.get("Content-Length", str(len(data)))
            for name, value in {**headers, "Content-Length": length, "Connection": "close"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if midway else data)
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on  # noqa: N815

    return Handler
