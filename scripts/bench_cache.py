"""How fast a token cache is built, beside `datasets.map` with the same tokenizer; and how fast batches are made of it.

    python scripts/bench_cache.py articles.jsonl.xz vocab.txt

Both read the same JSON Lines, of the first 100 MB of text, in turns; the times are medians. Batches are of packed and
unpacked rows of 128 tokens, by one thread.
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

TEXT_BYTES = 100_000_000
ROUNDS = 3
N_BATCHES, BATCH_SIZE = 200, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("articles", type=Path)
    parser.add_argument("vocabulary", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = write_text(args.articles, folder / "text.jsonl")
        tokenizer = tokenization.read(TokenizerConfig(path=str(args.vocabulary)))
        times: dict[str, list[float]] = {"datasets.map": [], "token cache": []}
        for _ in range(ROUNDS):
            times["datasets.map"].append(seconds(lambda: mapped(folder, tokenizer)))
            shutil.rmtree(folder / "tokens", ignore_errors=True)
            times["token cache"].append(seconds(lambda: built(folder, tokenizer)))
        medians = {what: statistics.median(found) for what, found in times.items()}
        for what, median in medians.items():
            print(f"{what}: {median:.1f} s, {n_bytes / median / 1e6:.1f} MB/s")
        print(f"ratio {medians['datasets.map'] / medians['token cache']:.2f}")
        load(built(folder, tokenizer)["train"], tokenizer)


def write_text(source: Path, target: Path) -> int:
    n_bytes = 0
    with lzma.open(source, "rt", encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        for line in lines:
            n_bytes += len(json.loads(line)["text"].encode())
            out.write(line)
            if n_bytes >= TEXT_BYTES:
                break
    return n_bytes


def seconds(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def mapped(folder: Path, tokenizer: tokenization.Tokenizer) -> None:
    """Tokenize as a user of `datasets` does, with a process for each core and batches of its usual size."""
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
        made_s = seconds(lambda: [rows.batch(*order(x)) for x in places])  # noqa: B023
        print(f"batches, data.pack={pack}: {N_BATCHES * BATCH_SIZE * 128 / made_s:,.0f} positions/s")


if __name__ == "__main__":
    main()
