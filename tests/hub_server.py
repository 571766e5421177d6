"""A small hub on 127.0.0.1: the part of its protocol that fetch uses, with switches for everything that goes wrong.

    GET /api/models/REPO/revision/REVISION?blobs=true   commit, and size and hash of every file
    GET /REPO/resolve/COMMIT/FILE                       the bytes; large files (*.safetensors, *.bin) are a redirect, as on the hub
    GET /cdn/REPO/COMMIT/FILE                           those, at `localhost`: another host, which must not see the token
Range is honoured, errors carry X-Error-Code. Every answer is kept in `answers`.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT, OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567", "f" * 40
REPO = "some-org/tiny"


@dataclass(frozen=True)
class Answer:
    """What was asked and answered; `num_bytes` of the body were sent."""

    path: str
    range: str | None
    token: str | None
    status: int
    num_bytes: int


@dataclass
class FakeHub:
    """The models (by name, by commit) and the switches."""

    models: dict[str, dict[str, dict[str, bytes]]]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    url: str = ""
    token: str | None = None  # that must be shown
    gated: bool = False  # the listing is open, the files are not
    cut_after: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its connection ends, each time
    is_down: bool = False  # connections end without an answer
    stop_after_cut: bool = False  # the first cut takes the hub down
    ignores_range: bool = False
    corrupt: set[str] = field(default_factory=set)  # files that come with their first byte changed
    longer: set[str] = field(default_factory=set)  # files that come with a byte too many
    error_body: bytes = b'{"error": "no"}'
    listing: dict[str, Any] = field(default_factory=dict)  # keys of the listing that are answered otherwise
    raw_listing: bytes | None = None  # instead of the whole listing
    extra_siblings: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def served(self, name: str) -> list[Answer]:
        """The answers about a file that carried bytes."""
        return [answer for answer in self.answers if answer.path.endswith(f"/{name}") and answer.status in (200, 206)]


@contextmanager
def fake_hub(models: dict[str, dict[str, dict[str, bytes]]]) -> Iterator[FakeHub]:
    """A hub that serves `models` until the block ends."""
    hub = FakeHub(models)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def sibling(name: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    if not is_large(name):
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"rfilename": name, "size": len(content), "blobId": git}
    lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return {"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.hub.is_down:
            self.close_connection = True
            return
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[0] == "api":
            self._list("/".join(parts[2:4]), unquote(parts[5]))
        elif parts[0] == "cdn":
            self._file("/".join(parts[1:3]), parts[3], unquote(parts[4]))
        else:
            self._resolve("/".join(parts[:2]), parts[3], unquote(parts[4]))

    def _list(self, repo: str, revision: str) -> None:
        hub = self.hub
        if repo not in hub.models or self._shows_no_token():
            return self._refuse(401, "RepoNotFound")
        commit = hub.revisions.get(revision, revision)
        if commit not in hub.models[repo]:
            return self._refuse(404, "RevisionNotFound")
        if hub.raw_listing is not None:
            return self._send(200, hub.raw_listing, {})
        siblings = [sibling(name, content) for name, content in hub.models[repo][commit].items()]
        document = {"id": repo, "sha": commit, "siblings": siblings + hub.extra_siblings} | hub.listing
        return self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        if self.hub.gated:
            return self._refuse(403, "GatedRepo")
        if self._shows_no_token():
            return self._refuse(401, "RepoNotFound")
        if is_large(name):
            port = self.server.server_address[1]
            return self._send(302, b"", {"Location": f"http://localhost:{port}/cdn/{repo}/{commit}/{name}"})
        return self._file(repo, commit, name)

    def _file(self, repo: str, commit: str, name: str) -> None:
        hub, content = self.hub, self.hub.models[repo][commit].get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        if name in hub.corrupt:
            content = bytes([content[0] ^ 1]) + content[1:]
        if name in hub.longer:
            content += b"x"
        asked = None if hub.ignores_range else self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}
        return self._send(206 if asked else 200, content[start:], headers, cut_after=hub.cut_after.get(name))

    def _shows_no_token(self) -> bool:
        return self.hub.token is not None and self.headers.get("Authorization") != f"Bearer {self.hub.token}"

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, self.hub.error_body, {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body if cut_after is None else body[:cut_after]
        cut = len(sent) < len(body)
        asked = self.headers
        self.hub.answers.append(
            Answer(urlsplit(self.path).path, asked.get("Range"), asked.get("Authorization"), status, len(sent))
        )
        self.hub.is_down |= cut and self.hub.stop_after_cut
        self.close_connection |= cut
        self.wfile.write(sent)
