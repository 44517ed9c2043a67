"""Serve a local stand-in for the Hugging Face hub, with the requests that its client sends.

The server has one dataset repository in memory. The client is the installed `HfFileSystem` in a
separate process whose HF_ENDPOINT is this server; so paths, listings, ranges and commits are those
of the real client.
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0" * 40


class Hub:
    """Server with one repository: `files` by path, and the number of `commits`.

    Args:
        name: name of the dataset, `org/name`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a process that uses this server as the hub."""
        return {
            **{"HF_ENDPOINT": f"http://127.0.0.1:{self._server.server_address[1]}"},
            **{"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_nobody", "HF_HUB_DISABLE_XET": "1"},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"},
        }

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
        """Return the contents of a folder; None if it does not exist."""
        prefix = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path, data in self.files.items():
            if path.startswith(prefix):
                below = path.removeprefix(prefix)
                if recursive or "/" not in below:
                    found[path] = {"type": "file", "path": path, "size": len(data), "oid": REVISION}
                else:
                    inner = prefix + below.partition("/")[0]
                    found[inner] = {"type": "directory", "path": inner, "oid": REVISION}
        return list(found.values()) if found or not folder else None

    def commit(self, lines: bytes) -> None:
        self.commits += 1
        for entry in map(json.loads, lines.splitlines()):
            if entry["key"] == "file":
                value = entry["value"]
                self.files[value["path"]] = base64.b64decode(value["content"])


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            api = f"/api/datasets/{hub.name}"
            held = f"/datasets/{hub.name}/resolve/main/"
            if path in (api, f"{api}/revision/main"):
                self._say({"id": hub.name, "sha": REVISION, "private": False, "siblings": []})
            elif path.startswith(f"{api}/tree/main"):
                folder = path.removeprefix(f"{api}/tree/main").strip("/")
                found = hub.tree(folder, recursive="recursive=true" in url.query.lower())
                self._missing("EntryNotFound") if found is None else self._say(found)
            elif path.startswith(held) and path.removeprefix(held) in hub.files:
                self._send_range(hub.files[path.removeprefix(held)])
            else:
                self._missing("EntryNotFound" if hub.name in path else "RepoNotFound")

        def do_POST(self) -> None:
            body = self._body()
            api = f"/api/datasets/{hub.name}"
            if self.path == f"{api}/preupload/main":
                files = [f["path"] for f in json.loads(body)["files"]]
                modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
                self._say({"files": modes})
            elif self.path.startswith(f"{api}/commit/main"):
                hub.commit(body)
                address = f"http://127.0.0.1/datasets/{hub.name}/commit/{REVISION}"
                self._say({"commitUrl": address, "commitOid": REVISION, "success": True})
            elif self.path == "/api/validate-yaml":
                self._say({"errors": [], "warnings": []})
            else:
                self._missing("RepoNotFound")

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers["Content-Length"]))

        def _say(self, value: Any) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _missing(self, code: str) -> None:
            self._send(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

        def _send_range(self, data: bytes) -> None:
            asked = self.headers.get("Range")
            if asked is None:
                self._send(200, data, {"Accept-Ranges": "bytes"})
                return
            first, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            span = f"bytes {first}-{stop - 1}/{len(data)}"
            self._send(206, data[int(first) : stop], {"Content-Range": span})

        def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
