"""The token cache: every article as token ids in memory-mapped arrays, made once per source, tokenizer and settings.

A corpus larger than memory works: building streams, and training touches only the pages it reads.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tokenizers import __version__ as library_version

from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.sources import SPLITS, Article, Source
from jaxlm.errors import UserError

FORMAT = 1  # raised when the files below change, so that older caches are not read
ABANDONED_S = 24 * 3600  # after this time, an unfinished cache is one that nobody writes any more
FILES: dict[str, Any] = {"offsets": np.int64, "labels": np.int32, "n_bytes": np.int64}


@dataclass(frozen=True)
class Split:
    """The articles of one split: article i has ids tokens[offsets[i] : offsets[i + 1]], without special tokens."""

    tokens: np.ndarray  # memory-mapped, narrowest unsigned type
    offsets: np.ndarray  # int64, one more than articles
    labels: np.ndarray  # int32, -1: none
    n_bytes: np.ndarray  # int64, length of the text in UTF-8

    def __len__(self) -> int:
        return len(self.labels)


def user_cache_dir(configured: str) -> Path:
    """Return the folder for caches: `configured`, or jaxlm in the user's cache folder."""
    return (
        Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxlm"
    )


def open_cache(
    source: Source, tokenizer: Tokenizer, cache_dir: Path, on_progress: Callable[[int], None] = lambda n_bytes: None
) -> dict[str, Split]:
    """Return the splits of `source` in tokens, from the cache or tokenized now.

    `on_progress` is told the bytes of text done so far. Raises UserError if the cache cannot be written; then, as
    after an interrupt, nothing of it stays.
    """
    key = f"{FORMAT} {source.fingerprint} {tokenizers.fingerprint(tokenizer)} {library_version}"
    folder = cache_dir / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not folder.exists():
        _build(source, tokenizer, folder, on_progress)
    meta = json.loads((folder / "meta.json").read_text())
    return {split: _open_split(folder, split, np.dtype(meta["dtype"])) for split in SPLITS}


def _open_split(folder: Path, split: str, dtype: np.dtype) -> Split:
    def mapped(name: str, dtype: Any) -> np.ndarray:
        path = folder / f"{split}.{name}"
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)

    return Split(mapped("tokens", dtype), **{name: mapped(name, kind) for name, kind in FILES.items()})


def _build(source: Source, tokenizer: Tokenizer, folder: Path, on_progress: Callable[[int], None]) -> None:
    dtype = np.dtype(np.uint16 if tokenizers.n_ids(tokenizer) <= 2**16 else np.uint32)
    temporary = folder.with_name(f"{folder.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        for left in folder.parent.glob(f"{folder.name}.*.tmp"):  # by a process that was killed
            if left == temporary or time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
        with contextlib.ExitStack() as stack:
            # Plain writes: a full disk under a memory map would kill the process instead of raising.
            files = {
                (split, name): stack.enter_context(open(temporary / f"{split}.{name}", "wb"))
                for split in SPLITS
                for name in ("tokens", *FILES)
            }
            _write(source.articles(), tokenizer, dtype, files, on_progress)
        (temporary / "meta.json").write_text(json.dumps({"dtype": dtype.name, "source": source.description}))
        _rename(temporary, folder)
    except OSError as error:
        raise UserError(
            f"{temporary}: the token cache cannot be written ({error.strerror}); "
            "free some space, or choose another folder with --data.cache-dir"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another process has made the same cache meanwhile
            raise


def _write(
    articles: Iterator[Article],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    files: Mapping[tuple[str, str], BinaryIO],
    on_progress: Callable[[int], None],
) -> None:
    """Tokenize the articles, many at a time on all cores, and append them to the files of their splits."""
    ends = dict.fromkeys(SPLITS, 0)
    n_bytes_done = 0
    for split in SPLITS:
        files[split, "offsets"].write(np.int64(0).tobytes())
    for chunk in tokenizers.chunks(articles, lambda article: len(article.text)):
        encodings = tokenizer.encode_batch_fast([article.text for article in chunk], add_special_tokens=False)
        for article, encoding in zip(chunk, encodings, strict=True):
            ids = np.asarray(encoding.ids, dtype)
            n_bytes = len(article.text.encode())
            ends[article.split] += len(ids)
            n_bytes_done += n_bytes
            files[article.split, "tokens"].write(ids.tobytes())
            for name, value in (("offsets", ends[article.split]), ("labels", article.label), ("n_bytes", n_bytes)):
                files[article.split, name].write(np.asarray(value, FILES[name]).tobytes())
        on_progress(n_bytes_done)
