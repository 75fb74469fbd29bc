"""Files of a real server on loopback, which cuts connections, answers 503, is slow, and changes its files."""

import gzip
import http.server
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import cache, remote, sources, tokenization
from jaxlm.errors import UserError

N_SHARDS, N_ROWS = 6, 400
Fault = Callable[[Any, bytes, int], bytes | None]  # (handler, content, start) -> what is sent; None: it has answered


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges and ETags; `faults` are used up by path, one for each request of content."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.sent, self.tags = (
            folder,
            dict[str, list[Fault]](),
            Counter[str](),
            Counter[str](),
        )
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, has_body: bool) -> None:
        name = self.path.strip("/")
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        content, start = path.read_bytes(), 0
        if match := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        sent: bytes | None = content[start:]
        if has_body and (faults := self.server.faults.get(name)):
            sent = faults.pop(0)(self, content, start)
            if sent is None:
                return
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{name}-{self.server.tags[name]}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if has_body:
            self.wfile.write(sent or b"")
            self.server.sent[name] += len(sent or b"")
            self.close_connection = True


def cut(handler: Any, content: bytes, start: int) -> bytes:
    return content[start : start + max(1, len(content) // 3)]


def busy(handler: Any, content: bytes, start: int) -> None:
    handler.send_error(503)


def slow(handler: Any, content: bytes, start: int) -> bytes:
    time.sleep(0.5)
    return content[start:]


def changed(handler: Any, content: bytes, start: int) -> bytes:
    handler.server.tags[handler.path.strip("/")] += 1
    return content[start:]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as found:
        yield found
        found.shutdown()


def rows(shard: int) -> list[str]:
    return [f"shard {shard} has row {i} of some words that are told apart by {shard * i}" for i in range(N_ROWS)]


def write_shards(folder: Path) -> None:
    """Write JSON Lines, compressed in two ways and not."""
    for i in range(N_SHARDS):
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows(i)).encode()
        path = folder / f"part-{i:02}.jsonl"
        if i % 3 == 2:
            with pa.CompressedOutputStream(str(path), "zstd") as stream:
                stream.write(lines)
        else:
            path.write_bytes(gzip.compress(lines) if i % 3 else lines)


def config_of(server: Server, tmp_path: Path, name: str = "part-{00..05}.jsonl", **settings: Any) -> DataConfig:
    return DataConfig(path=f"{server.url}/{name}", cache_dir=str(tmp_path / "cache"), **settings)


def built(config: DataConfig) -> dict[str, list[str]]:
    """Return the text of each article of a source, by split, from the token cache."""
    tokenizer = tokenization.cached(TokenizerConfig(kind="bytes"), lambda: iter(()), "", Path(config.cache_dir))
    splits = cache.open_cache(sources.open_source(config, "text"), tokenizer, Path(config.cache_dir))
    return {
        name: [tokenizer.decode(x.tokens[a:b].tolist()) for a, b in itertools.pairwise(x.offsets)]
        for name, x in splits.items()
    }


def expected(n: int = N_SHARDS) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for i in range(n):
        for row in rows(i):
            found[sources.split_of(row, DataConfig())].append(row)
    return found


def test_shards_of_any_compression_are_those_of_local_files(server: Server, tmp_path: Path) -> None:
    write_shards(server.folder)
    config = config_of(server, tmp_path)
    assert built(config) == expected()
    sent = dict(server.sent)
    assert len(sent) == N_SHARDS and built(config) == expected()
    assert dict(server.sent) == sent, "the token cache is found without reading the files again"
    assert not [x for x in (tmp_path / "cache" / "downloads").iterdir() if x.suffix != ".json"], "nothing is left"


def test_faults_that_pass_change_nothing(server: Server, tmp_path: Path) -> None:
    write_shards(server.folder)
    server.faults = {"part-00.jsonl": [cut, cut, busy], "part-01.jsonl": [busy, slow], "part-04.jsonl": [cut] * 2}
    assert built(config_of(server, tmp_path)) == expected()
    assert not any(server.faults.values())
    sizes = {path.name: path.stat().st_size for path in server.folder.iterdir()}
    assert dict(server.sent) == sizes, "a lost connection resumes where it was"


def test_parquet_with_faults_and_one_that_is_truncated(server: Server, tmp_path: Path) -> None:
    for i in range(3):
        table = pa.table({"text": rows(i)})
        pyarrow.parquet.write_table(table, server.folder / f"{i}.parquet", row_group_size=100)
    server.faults = {"1.parquet": [cut]}
    config = config_of(server, tmp_path, "{0..2}.parquet")
    assert built(config) == expected(3)
    path = server.folder / "1.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    server.tags["1.parquet"] += 1
    with pytest.raises(UserError, match=r"http://\S+/1.parquet: cannot be read as parquet: "):
        built(config)


def test_what_does_not_pass_is_told_in_one_line(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    write_shards(server.folder)
    server.faults = {"part-01.jsonl": [changed]}
    with pytest.raises(
        UserError, match=r"part-01.jsonl: has changed while it was read .*; run again to begin with the"
    ):
        built(config_of(server, tmp_path))
    assert built(config_of(server, tmp_path)) == expected(), "a new run takes the new file"
    server.faults = {"part-03.jsonl": [busy] * 99}
    with pytest.raises(
        UserError, match=r"part-03.jsonl: cannot be fetched \(HTTP Error 503.*; run again, which continues"
    ):
        built(config_of(server, tmp_path, "part-03.jsonl"))
    with pytest.raises(
        UserError, match=r"data.path=http://\S+/part-06.jsonl: the server answers 404 .*; check the URL"
    ):
        built(config_of(server, tmp_path, "part-{05..06}.jsonl"))
    with pytest.raises(UserError, match="its name tells no format; set data.format"):
        (server.folder / "file").write_text("text")
        built(config_of(server, tmp_path, "file"))
    with pytest.raises(UserError, match="a classifier looks at all labels first; fetch the file"):
        sources.open_source(config_of(server, tmp_path), "labels")
    with pytest.raises(
        UserError, match=r"(?i)data.path=s3://bucket/x.txt: .*s3fs.*; or give http\(s\), or a local file"
    ):
        sources.open_source(DataConfig(path="s3://bucket/x.txt", cache_dir=str(tmp_path)), "text")


def test_a_server_that_is_gone_is_not_needed_again(
    server: Server, tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    write_shards(server.folder)
    config = config_of(server, tmp_path)
    assert built(config) == expected()
    server.shutdown()
    server.server_close()
    assert built(config) == expected()
    assert "cannot be reached" in capfd.readouterr().err
    with pytest.raises(UserError, match="cannot be reached"):
        built(config_of(server, tmp_path, "part-00.jsonl"))


def test_what_fsspec_reads_is_read_in_order(server: Server, tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    write_shards(server.folder)
    for path in server.folder.iterdir():
        fs.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    config = DataConfig(path="memory://corpus/*.jsonl", cache_dir=str(tmp_path / "cache"))
    assert built(config) == expected()


def test_a_disk_without_room_is_told_before_it_is_full(server: Server, tmp_path: Path, monkeypatch: Any) -> None:
    write_shards(server.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    monkeypatch.setattr(tokenization.chunks, "__defaults__", (10_000,))
    with pytest.raises(UserError, match=r"the token cache needs about 0.0 GB more, and 0.0 GB are free; free some"):
        built(config_of(server, tmp_path))
    assert not list((tmp_path / "cache" / "tokens").iterdir())


BUILD = """
import json, sys
from jaxlm.config import DataConfig
from jaxlm.data import cache, hub, remote_test, tokenization
cache.KEPT_EVERY, hub.DOWNLOADED = 20_000, 0
count = tokenization.chunks
tokenization.chunks = lambda items, size_of: count(items, size_of, most=10_000)
tokenized = 0
write = cache._append
def append(split, rows, has_values, files):
    global tokenized
    tokenized += len(rows)
    print(tokenized, flush=True)
    return write(split, rows, has_values, files)
cache._append = append
remote_test.built(DataConfig(**json.loads(sys.argv[1])))
"""


def check_killed_builds(tmp_path: Path, **settings: Any) -> None:
    """Kill two builds of the cache of N_SHARDS * N_ROWS articles, tear a file, and let the third end."""
    command = [sys.executable, "-c", BUILD, json.dumps(settings | {"cache_dir": str(tmp_path / "cache")})]
    n_all, n_tokenized = N_SHARDS * N_ROWS, []
    for point in (700, 1500, n_all):  # articles, after which the process is killed
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stderr
            n = 0
            for line in process.stdout:
                n = int(line)
                if sum(n_tokenized) + n >= point < n_all:
                    process.kill()
                    break
            n_tokenized.append(n)
            err = process.stderr.read()
        assert ("continues an unfinished token cache" in err) == (len(n_tokenized) > 1), err
        (left, *_) = [*(tmp_path / "cache" / "tokens").glob("*.tmp"), None]
        if left and len(n_tokenized) == 2:
            (left / "train.tokens").write_bytes((left / "train.tokens").read_bytes() + b"torn")
    assert n_all <= sum(n_tokenized) < n_all + 2 * 400, n_tokenized
    assert [x.suffix for x in (tmp_path / "cache" / "tokens").iterdir()] == [""]


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_without_tokenizing_again(server: Server, tmp_path: Path) -> None:
    write_shards(server.folder)
    config = config_of(server, tmp_path)
    check_killed_builds(tmp_path, path=config.path)
    assert built(config) == expected()


@pytest.mark.slow
def test_what_a_killed_build_has_left_is_checked(server: Server, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    write_shards(server.folder)
    monkeypatch.setattr(cache, "KEPT_EVERY", 20_000)
    monkeypatch.setattr(tokenization.chunks, "__defaults__", (10_000,))
    config = config_of(server, tmp_path)
    server.faults = {"part-04.jsonl": [busy] * 99}
    with pytest.raises(UserError, match="part-04.jsonl: cannot be fetched"):
        built(config)
    (left,) = (tmp_path / "cache" / "tokens").glob("*.tmp")
    content = bytearray((left / "train.tokens").read_bytes())
    content[100] ^= 1
    (left / "train.tokens").write_bytes(content)
    server.faults = {}
    assert built(config) == expected()
    assert (
        "a token cache that was begun before is damaged (train.tokens is not as it was written)"
        in capfd.readouterr().err
    )
