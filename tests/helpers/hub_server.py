"""A server on the loopback address that speaks as much of the hub's API as a push needs, and fails where it is told to.

Repositories are kept in memory. Files over a limit go the way of large ones: announced, uploaded by hash, then named in
the commit; a commit that names a hash that did not arrive is refused, as by the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_only_for_this_test"
LARGE = 4096
"""Bytes from which a file is a large one."""


class Hub:
    """What the server holds, and what it is to do wrong."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.fail: dict[str, int] = {}
        """Part of a path -> the status that requests to it end with."""
        self.truncates: str | None = None
        """A file whose size is listed a byte short."""
        self.requests: list[str] = []
        self.role = "write"
        self.url = ""

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name]["files"]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def answer(self, status: int, value: Any = None, error: str = "") -> None:
        body = json.dumps({} if value is None else value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_one(self) -> None:
        path, data = self.path.partition("?")[0], self.body()
        self.hub.requests.append(f"{self.command} {path}")
        for part, status in self.hub.fail.items():
            if part in f"{self.command} {path}":
                return self.answer(status, {"error": f"as told, with {TOKEN}"})
        if path.startswith("/blobs/"):
            return self.receive(path.removeprefix("/blobs/"), data)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            access = {"accessToken": {"role": self.hub.role}}
            return self.answer(200, {"type": "user", "name": "me", "orgs": [], "auth": access})
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.announce(json.loads(data))
        return self.repository(path.removeprefix("/api/models/").split("/"), data)

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.repositories:
            return self.answer(409, {"error": "exists"})
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repositories[name] = {"private": bool(private), "files": {}, "commits": 0}
        return self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def announce(self, asked: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{one['oid']}"}}} for one in asked["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def receive(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "hash"})
        self.hub.blobs[oid] = data
        return self.answer(200)

    def repository(self, parts: list[str], data: bytes) -> None:
        name, what = "/".join(parts[:2]), parts[2:]
        found = self.hub.repositories.get(name)
        if found is None:
            return self.answer(404, {"error": "Repository not found"}, error="RepoNotFound")
        if what[:1] == ["preupload"]:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(data)["files"]
            ]
            return self.answer(200, {"files": modes})
        if what[:1] == ["commit"]:
            return self.commit(name, found, data)
        listed = [self.listing(path, content) for path, content in sorted(found["files"].items())]
        oid = f"{found['commits']:040x}"
        return self.answer(200, {"id": name, "sha": oid, "private": found["private"], "siblings": listed, "tags": []})

    def listing(self, path: str, content: bytes) -> dict[str, Any]:
        size = len(content) - (path == self.hub.truncates)
        entry: dict[str, Any] = {"rfilename": path, "size": size, "blobId": hashlib.sha1(content).hexdigest()}
        if len(content) > LARGE:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
        return entry

    def commit(self, name: str, found: dict[str, Any], data: bytes) -> None:
        added = {}
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.answer(400, {"error": "an object is missing"})
                added[value["path"]] = self.hub.blobs[value["oid"]]
        found["files"].update(added)
        found["commits"] += 1
        oid = f"{found['commits']:040x}"
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OfThisHub", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
