"""A hub on this machine that huggingface_hub's own client uploads to over HTTP."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "t" * 34


@dataclass
class Hub:
    """What the hub has and how it behaves.

    Attributes:
        url: Its address.
        repos: Visibility of each repository.
        files: Committed files by 'owner/name/path'.
        requests: Method and path of every request.
        failing: Status that a request gets whose path contains the key.
    """

    url: str = ""
    repos: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        do_PUT = do_POST

        def _answer(self, body: bytes) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            status = next((code for key, code in hub.failing.items() if key in path), 200)
            if status == 200 and path.startswith("/api/") and not self._known():
                status = 401
            if status == 200 and self.command == "GET" and path.startswith("/api/models/"):
                status = 200 if path.removeprefix("/api/models/") in hub.repos else 404
            reply = _reply(hub, path, body) if status == 200 else {"error": "refused by the test"}
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _known(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    return Handler


def _reply(hub: Hub, path: str, body: bytes) -> Any:
    if path == "/api/whoami-v2":
        return {"name": "me", "type": "user", "orgs": []}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        hub.repos.setdefault(repo, asked.get("visibility", "public"))
        return {"url": f"{hub.url}/{repo}", "name": repo, "id": repo}
    if "/preupload/" in path:
        modes = {True: "lfs", False: "regular"}
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }
    if path.endswith("/info/lfs/objects/batch"):
        return {
            "transfer": "basic",
            "objects": [
                {**asked, "actions": {"upload": {"href": f"{hub.url}/large/{asked['oid']}?key=k"}}}
                for asked in json.loads(body)["objects"]
            ],
        }
    if path.startswith("/large/"):
        hub.large[path.removeprefix("/large/")] = body
        return {}
    if "/commit/" in path:
        repo = path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                hub.files[f"{repo}/{value['path']}"] = hub.large[value["oid"]]
        return {"commitUrl": f"{hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
    return {}
