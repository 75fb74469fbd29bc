"""Peak memory and time of building a token cache from text that a server on loopback generates: flat or not.

    python scripts/bench_memory.py vocab.txt --megabytes 1000 5000

Each size is built in a process of its own, from shards of JSON Lines of 25 MB that are generated as they are asked for,
so that the disk holds the cache and a few shards. `vocab.txt` is of WordPiece, and gives the words, too.
"""

import argparse
import http.server
import json
import multiprocessing
import multiprocessing.connection
import random
import shutil
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import cache, sources, tokenization

SHARD = 25_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1000, 5000], help="of text (1000 5000)")
    parser.add_argument("--trace", action="store_true", help="print memory while each is built")
    args = parser.parse_args()
    words = [x for x in args.vocabulary.read_text(encoding="utf-8").split("\n") if x.isalpha()]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.shard = lru_cache(8)(lambda number: shard(number, words))  # type: ignore[attr-defined]
        context = multiprocessing.get_context("spawn")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        peaks = []
        for megabytes in args.megabytes:
            url = f"http://127.0.0.1:{server.server_address[1]}/{{0000..{megabytes * 1_000_000 // SHARD - 1:04}}}.jsonl"
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=build, args=(url, args.vocabulary, args.trace, sender))
            child.start()
            sender.close()
            peak, n_bytes, wall_s, cpu_s = receiver.recv()
            child.join()
            peaks.append(peak)
            print(
                f"{n_bytes / 1e6:,.0f} MB of text: {peak / 1e6:,.0f} MB of memory at most, {wall_s:,.0f} s, "
                f"{cpu_s:,.0f} CPU s, {peak / peaks[0] - 1:+.1%} of memory beside the first",
                flush=True,
            )
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{self.path}"')
        self.send_header("Content-Length", str(SHARD))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.server.shard(int(self.path[1:5])))  # type: ignore[attr-defined]

    do_GET = do_HEAD


def shard(number: int, words: list[str]) -> bytes:
    """Return JSON Lines of about SHARD bytes, of articles of 20 to 5,000 words as frequent as in languages."""
    drawn = random.Random(number)
    rows, size = list[bytes](), 0
    weights = [1 / (i + 10) for i in range(len(words))]
    pool = drawn.choices(words, weights, k=500_000)
    while size < SHARD:
        n, start = int(20 * 250 ** drawn.random()), drawn.randrange(len(pool) - 5000)
        text = f"{number} {size} " + " ".join(pool[start : start + n])
        rows.append(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        size += len(rows[-1])
    # The last row is cut off, and the row before it filled up with blanks.
    return b"".join(rows[:-1]).rstrip().ljust(SHARD - 1) + b"\n"


def build(url: str, vocabulary: Path, has_trace: bool, sender: multiprocessing.connection.Connection) -> None:
    folder = Path(tempfile.mkdtemp())
    n_bytes = 0

    def on_progress(n: int) -> None:
        nonlocal n_bytes
        if has_trace and n // 5_000_000 > n_bytes // 5_000_000:
            print(
                f"{n / 1e6:,.0f} MB: {memory('VmRSS') / 1e6:,.0f} MB, {memory('VmHWM') / 1e6:,.0f} at most", flush=True
            )
        n_bytes = n

    try:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        source = sources.open_source(DataConfig(path=url, cache_dir=str(folder)), "text")
        tokenizer = tokenization.read(TokenizerConfig(path=str(vocabulary)))
        cache.open_cache(source, tokenizer, folder, on_progress)
        sender.send((memory("VmHWM"), n_bytes, time.perf_counter() - began_s, time.process_time() - cpu_s))
    finally:
        shutil.rmtree(folder)


def memory(name: str) -> int:
    """Return a size of this process in bytes: not that of getrusage, which begins with the parent's."""
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
