"""A model hub on 127.0.0.1: one repository, its API, Range requests, and the failures of a real network on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """`files` by path. `drop_after` cuts every answer after so many bytes; `status` answers a path with an error."""

    files: dict[str, bytes]
    commit: str = COMMIT
    drop_after: int | None = None
    ranges: bool = True
    status: dict[str, int] = field(default_factory=dict)
    wrong_hash: set[str] = field(default_factory=set)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    page: int = 2
    url: str = ""

    def tree(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "figures"}]
        for path, content in self.files.items():
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()
            sha256 = hashlib.sha256(content).hexdigest()
            entry: dict[str, Any] = {"type": "file", "oid": blob, "size": len(content), "path": path}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            if path in self.wrong_hash:
                entry["oid"] = "f" * 40
                entry["lfs"] = {"oid": "f" * 64, "size": len(content)} if "lfs" in entry else None
            entries.append(entry)
        return entries


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, self.headers.get("Range")))
        if revision := re.fullmatch(r"/api/models/org/model/revision/(\w+)", self.path):
            self._json({"sha": hub.commit} if hub.commit.startswith(revision[1]) else {"sha": "9" * 40})
        elif tree := re.fullmatch(
            rf"/api/models/org/model/tree/{hub.commit}\?recursive=true(?:&cursor=(\d+))?", self.path
        ):
            self._tree(int(tree[1] or 0))
        elif found := re.fullmatch(rf"/org/model/resolve/{hub.commit}/(.+)", self.path):
            self._file(found[1])
        else:
            self.send_error(404)

    def _tree(self, first: int) -> None:
        entries = self.hub.tree()
        last = first + self.hub.page
        following = f"{self.hub.url}/api/models/org/model/tree/{self.hub.commit}?recursive=true&cursor={last}"
        self._json(entries[first:last], {"Link": f'<{following}>; rel="next"'} if last < len(entries) else {})

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        for name, text in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, path: str) -> None:
        if path not in self.hub.files or path in self.hub.status:
            self.send_error(self.hub.status.get(path, 404))
            return
        content = self.hub.files[path]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(start[1]) if start and self.hub.ranges else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        end = len(content) if self.hub.drop_after is None else first + self.hub.drop_after
        self.wfile.write(content[first:end])
        if end < len(content):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the test reads `requests`."""


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub on a free port, `hub.url` set."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
