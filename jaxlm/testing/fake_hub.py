"""A server of data sets of the Hugging Face hub: as much of its API as `datasets` and `huggingface_hub` use.

Which repositories there are, folders tell: OWNER/NAME. `gated` ones are refused, and the content of `closed` ones, too.
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
GATED = "Access to this data set is restricted. You must have access to it and be authenticated to access it."


class Hub(http.server.ThreadingHTTPServer):
    """Serves the repositories in a folder. `busy` are paths of files with how often each answers 503 first."""

    daemon_threads = True

    def __init__(self, folder: Path, gated: tuple[str, ...] = (), closed: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.gated, self.closed = folder, gated, closed
        self.busy, self.requests = Counter[str](), Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, asked: bytes = b"") -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.server.requests[path] += 1
        if path == "/":
            self._send(200, b"")
            return
        match = re.match(r"/(api/)?datasets/([^/]+/[^/]+)/?(.*)", path)
        if not match or not (self.server.folder / match[2]).is_dir():
            self._send(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return
        api, name, rest = match.groups()
        if name in self.server.gated or (name in self.server.closed and rest.endswith(".parquet")):
            self._send(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message=GATED)
            return
        folder = self.server.folder / name
        files = {x.relative_to(folder).as_posix(): x for x in sorted(folder.rglob("*")) if x.is_file()}
        if not api:
            self._file(files.get(rest.removeprefix("resolve/").partition("/")[2]))
        elif rest.startswith("tree/"):
            within = "".join(rest.split("/", 2)[2:])
            found = [_entry(x, file) for x, file in files.items() if x.startswith(within)]
            self._json(found) if found else self._send(404, b"", X_Error_Code="EntryNotFound")
        elif rest.startswith("paths-info/"):
            wanted = json.loads(asked)["paths"]
            self._json([_entry(x, file) for x, file in files.items() if x in wanted])
        else:
            siblings = [{"rfilename": x} for x in files]
            self._json({"_id": "1", "id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _file(self, file: Path | None) -> None:
        if not file:
            self._send(404, b"", X_Error_Code="EntryNotFound")
            return
        if self.server.busy[self.path] > 0 and self.command == "GET":
            self.server.busy[self.path] -= 1
            self._send(503, b"")
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{_hash(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            self._send(206, content[start:end], **headers)
            return
        self._send(200, content, **headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _entry(path: str, file: Path) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": _hash(file)}
