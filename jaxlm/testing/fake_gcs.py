"""A server of gs:// for tests: as much of Google's JSON API, with its preconditions, as TensorStore and gcsfs use."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

BUCKET = "bucket"
HERE = f"/storage/v1/b/{BUCKET}"
NONE = 0, b""


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    objects: dict[str, tuple[int, bytes]] = {}  # generation and content, by name
    lock = threading.RLock()
    n_writes = 0

    def parse_request(self) -> bool:
        is_right = super().parse_request()
        url = urlsplit(self.path) if is_right else urlsplit("")
        self.query = dict(parse_qsl(url.query))
        self.name = unquote(url.path.partition(f"{HERE}/o/")[2]) or self.query.get("name", "")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if is_right else b""
        return is_right

    def do_GET(self) -> None:
        generation, content = self.objects.get(self.name, NONE)
        if not self.name:
            self.list_objects()
        elif not generation:
            self.answer(404)
        elif self.query.get("ifGenerationNotMatch") == str(generation):
            self.answer(304)
        elif self.query.get("alt") != "media":
            self.answer(200, self.about(self.name))
        elif found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            place = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            self.answer(206 if first <= last else 416, content[first : last + 1], generation, place)
        else:
            self.answer(200, content, generation)

    def list_objects(self) -> None:
        prefix, items, folders = self.query.get("prefix", ""), [], set()
        for name in sorted(x for x in self.objects if x.startswith(prefix) and x >= self.query.get("startOffset", "")):
            inner, slash, _ = name.removeprefix(prefix).partition("/")
            if "delimiter" in self.query and slash:
                folders.add(f"{prefix}{inner}/")
            else:
                items.append(json.loads(self.about(name)))
        about = {"name": BUCKET, "items": items, "prefixes": sorted(folders)}
        self.answer(200 if HERE in self.path else 404, json.dumps(about).encode())

    def do_POST(self) -> None:
        name, _, new = self.name.partition("/moveTo/o/")
        with self.lock:
            if self.path.startswith("/batch"):
                names = [unquote(x) for x in re.findall(rf"DELETE {HERE}/o/(\S+)", self.body.decode())]
                codes = [204 if self.objects.pop(x, None) else 404 for x in names]
                parts = "".join(f"--cut\r\n\r\nHTTP/1.1 {code} -\r\n\r\n{{}}\r\n" for code in codes)
                self.answer(200, f"{parts}--cut--".encode(), 0, {"Content-Type": "multipart/mixed; boundary=cut"})
            elif self.query.get("uploadType") == "resumable":  # its content comes next, in one piece
                there = urlencode({"uploadType": "media", "name": json.loads(self.body)["name"]})
                url = f"http://{self.headers['Host']}/upload{HERE}/o?{there}"
                self.answer(200, headers={"Location": url})
            elif self.is_as_wanted(name) and (not new or name in self.objects):
                Handler.n_writes += 1
                content = self.objects.pop(name)[1] if new else self.body
                self.objects[new or name] = self.n_writes, content
                self.answer(200, self.about(new or name))
            else:
                self.answer(404 if new else 412)

    def do_DELETE(self) -> None:
        with self.lock:
            self.answer(412 if not self.is_as_wanted(self.name) else 204 if self.objects.pop(self.name, 0) else 404)

    def is_as_wanted(self, name: str) -> bool:
        return self.query.get("ifGenerationMatch") in (None, str(self.objects.get(name, NONE)[0]))

    def about(self, name: str) -> bytes:
        generation, content = self.objects[name]
        about = {"name": name, "bucket": BUCKET, "size": str(len(content)), "generation": str(generation)}
        return json.dumps(about).encode()

    def answer(self, code: int, body: bytes = b"", generation: int = 0, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        own = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in {**own, "x-goog-generation": str(generation), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served() -> Iterator[tuple[dict[str, str], dict[str, tuple[int, bytes]]]]:
    """Serve an empty gs://bucket: the variables by which a process finds it, and what is in it."""
    Handler.objects = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *args: None  # type: ignore[method-assign]  # of answers that nobody waits for
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
        variables = dict.fromkeys(names, f"http://127.0.0.1:{server.server_port}")
        yield variables | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}, Handler.objects
        server.shutdown()
