"""How fast a token cache is built, beside `datasets.map` with the same tokenizer; and how fast batches are made of it.

    python scripts/bench_cache.py articles.jsonl.xz vocab.txt --megabytes 100

Both read the same JSON Lines, in turns; the times are medians. Other programs on the machine disturb the CPU time of
all cores less. The tokenizer alone is the bound of both. Batches are of packed and unpacked rows of 128
tokens, by one thread.
"""

import argparse
import json
import lzma
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jaxlm import config as configs
from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import cache, hub, loader, packing, samples, sources, tokenization

N_BATCHES, BATCH_SIZE = 200, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("articles", type=Path)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("--megabytes", type=int, default=100, help="of text (100)")
    parser.add_argument("--rounds", type=int, default=3, help="of both (3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = write_text(args.articles, folder / "text.jsonl", args.megabytes * 1_000_000)
        tokenizer = tokenization.read(TokenizerConfig(path=str(args.vocabulary)))
        texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").open(encoding="utf-8")]
        times: dict[str, list[tuple[float, float]]] = {"datasets.map": [], "token cache": [], "tokenizer alone": []}
        for _ in range(args.rounds):
            times["datasets.map"].append(seconds(lambda: mapped(folder, tokenizer)))
            shutil.rmtree(folder / "tokens", ignore_errors=True)
            times["token cache"].append(seconds(lambda: built(folder, tokenizer)))
            times["tokenizer alone"].append(seconds(lambda: tokenized(texts, tokenizer)))
        medians = {what: [statistics.median(x) for x in zip(*found, strict=True)] for what, found in times.items()}
        for what, (wall_s, cpu_s) in medians.items():
            ratios = [x / y for x, y in zip(medians["datasets.map"], medians[what], strict=True)]
            print(
                f"{what}: {wall_s:.1f} s, {cpu_s:.1f} CPU s, {n_bytes / cpu_s / 1e6:.1f} MB / CPU s; "
                f"{ratios[0]:.2f} and {ratios[1]:.2f} times as fast as datasets.map"
            )
        load(built(folder, tokenizer)["train"], tokenizer)


def write_text(source: Path, target: Path, most: int) -> int:
    n_bytes = 0
    with lzma.open(source, "rt", encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for line in lines:
            n_bytes += len(json.loads(line)["text"].encode())
            out.write(line)
            if n_bytes >= most:
                break
    return n_bytes


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the time that work takes, and that of the processors."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def tokenized(texts: list[str], tokenizer: tokenization.Tokenizer) -> None:
    for chunk in tokenization.chunks(iter(texts), len):
        tokenizer.encode_batch_fast(chunk, add_special_tokens=False)


def mapped(folder: Path, tokenizer: tokenization.Tokenizer) -> None:
    """Tokenize as a user of `datasets` does, in batches of its usual size, each by all cores."""
    datasets = hub.library()
    shutil.rmtree(folder / "arrow", ignore_errors=True)
    found = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), cache_dir=str(folder / "arrow"))
    found["train"].map(
        lambda batch: {"ids": [x.ids for x in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]},
        batched=True,
        remove_columns=found["train"].column_names,
    )


def built(folder: Path, tokenizer: tokenization.Tokenizer) -> dict[str, cache.Split]:
    source = sources.open_source(DataConfig(path=str(folder / "text.jsonl")), "text")
    return cache.open_cache(source, tokenizer, folder)


def load(split: cache.Split, tokenizer: tokenization.Tokenizer) -> None:
    for pack in ("none", "documents"):
        settings = {"task": "mlm", "model.seq_len": 128, "data.pack": pack, "train.batch_size": BATCH_SIZE}
        config = configs.build(settings)
        specials, n_ids = tokenization.special_ids(tokenizer), tokenization.n_ids(tokenizer)
        rows = packing.samples_of(samples.MaskedSamples, split, config, specials, n_ids)
        order = loader.order_of(rows, config.train)
        places = np.arange(N_BATCHES * BATCH_SIZE).reshape(N_BATCHES, -1)
        _, cpu_s = seconds(lambda: [rows.batch(*order(x)) for x in places])  # noqa: B023
        print(f"batches, data.pack={pack}: {N_BATCHES * BATCH_SIZE * 128 / cpu_s:,.0f} positions / CPU s")


if __name__ == "__main__":
    main()
