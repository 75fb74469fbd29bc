"""The token cache: its content, when it is rebuilt, and that no incomplete file stays."""

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import cache, sources, tokenization
from jaxlm.data.cache import Split, open_cache
from jaxlm.data.sources import SPLITS, Article, Source
from jaxlm.errors import UserError
from jaxlm.io import temporary

KEY = "0123456789abcdef" * 2
LINES = [f"article {i} has {i % 7} words of {'x' * (i % 5)} and é" for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenization.train(TokenizerConfig(vocab_size=300), lambda: iter(LINES))


def word_tokenizer(n: int) -> Tokenizer:
    """Return a tokenizer of the words w0, w1 and so on, with their numbers as ids."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize("most", [50, 1_000_000])
def test_a_cache_without_duplicates_has_the_first_of_each(most: int, tmp_path: Path, monkeypatch, tokenizer) -> None:
    monkeypatch.setattr(tokenization.chunks, "__defaults__", (most,))
    random = np.random.default_rng(0)
    lines = [f"article {i} of a few" for i in random.integers(0, 90, 400)]
    (tmp_path / "text.txt").write_text("".join(f"{line}\n" for line in lines))
    config = DataConfig(path=str(tmp_path / "text.txt"), unique=True, test_fraction=0.0)
    source = sources.open_source(config, "text")
    splits = open_cache(source, tokenizer, tmp_path / "cache")
    for split in ("train", "validation"):
        all_of = [article.text for article in source.articles() if article.split == split]
        expected = [ids.ids for ids in tokenizer.encode_batch(list(dict.fromkeys(all_of)), add_special_tokens=False)]
        found = splits[split]
        assert [x.tolist() for x in np.split(found.tokens, found.offsets[1:-1])] == expected
        assert found.n_left_out == len(all_of) - len(expected) > 0
    assert open_cache(source, tokenizer, tmp_path / "cache")["train"].n_left_out == splits["train"].n_left_out
    other = sources.open_source(dataclasses.replace(config, unique=False), "text")
    assert len(open_cache(other, tokenizer, tmp_path / "cache")["train"]) > len(splits["train"])


class Counted:
    """A source that counts its passes."""

    def __init__(self, source: Source):
        self.n_passes = 0
        self.inner = source
        self.source = dataclasses.replace(source, articles=self.articles, parts=())

    def articles(self) -> Iterator[Article]:
        self.n_passes += 1
        return self.inner.articles()


def source_of(path: Path, **settings) -> Counted:
    return Counted(sources.open_source(DataConfig(path=str(path), **settings), "text"))


def memory_source(articles: list[Article]) -> Source:
    return Source("a source", "0" * 64, lambda: iter(articles), sum(len(a.text) for a in articles))


def rows(split: Split) -> list[tuple[list[int], int, int]]:
    """Return (ids, label, bytes) of each article."""
    ends = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    ids = [split.tokens[first:last].tolist() for first, last in ends]
    return list(zip(ids, split.labels.tolist(), split.n_bytes.tolist(), strict=True))


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# What it holds


def test_every_article_is_there_in_its_split_with_its_boundaries(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    counted = source_of(path)
    splits = open_cache(counted.source, tokenizer, tmp_path / "cache")
    expected: dict[str, list] = {split: [] for split in SPLITS}
    for article in counted.inner.articles():
        ids = tokenizer.encode(article.text, add_special_tokens=False).ids
        expected[article.split].append((ids, -1, len(article.text.encode())))
    assert {split: rows(splits[split]) for split in SPLITS} == expected
    assert all(len(splits[split]) > 10 for split in SPLITS)
    assert sum(int(part.n_bytes.sum()) for part in splits.values()) == sum(len(line.encode()) for line in LINES)


def test_articles_with_no_tokens_and_labels_are_kept(tmp_path):
    articles = [Article("train", "", 1), Article("test", "w3", 4), Article("train", "w1 w2", 0)]
    articles += [Article("train", " ", 2), Article("train", "w5", 3)]
    splits = open_cache(memory_source(articles), word_tokenizer(6), tmp_path)
    assert rows(splits["train"]) == [([], 1, 0), ([1, 2], 0, 5), ([], 2, 1), ([5], 3, 2)]
    assert rows(splits["test"]) == [([3], 4, 2)]
    assert rows(splits["validation"]) == [] and len(splits["validation"]) == 0
    assert splits["validation"].offsets.tolist() == [0]


def test_many_chunks_join_without_a_seam(tmp_path, monkeypatch):
    articles = [Article(SPLITS[i % 3], f"w{i} w{i + 1} " * (i % 4), -1) for i in range(500)]
    small = tokenization.chunks.__defaults__
    monkeypatch.setattr(tokenization.chunks, "__defaults__", (300,))
    told: list[int] = []
    splits = open_cache(memory_source(articles), word_tokenizer(600), tmp_path, told.append)
    monkeypatch.setattr(tokenization.chunks, "__defaults__", small)
    for k, split in enumerate(SPLITS):
        assert [ids for ids, _, _ in rows(splits[split])] == [[i, i + 1] * (i % 4) for i in range(k, 500, 3)]
    assert len(told) > 50 and told == sorted(told) and told[-1] == sum(len(a.text.encode()) for a in articles)


@pytest.mark.parametrize("n, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_are_of_the_narrowest_type_on_disk_and_not_in_memory(tmp_path, n, dtype):
    splits = open_cache(memory_source([Article("train", f"w{n - 1} w0", -1)]), word_tokenizer(n), tmp_path)
    tokens = splits["train"].tokens
    assert isinstance(tokens, np.memmap) and tokens.dtype == dtype and tokens.tolist() == [n - 1, 0]
    assert Path(str(tokens.filename)).stat().st_size == 2 * np.dtype(dtype).itemsize
    assert not tokens.flags.writeable


def test_tokens_are_counted_a_block_at_a_time(tmp_path, monkeypatch):
    articles = [Article("train", f"w{i % 9} w{i % 40}", -1) for i in range(100)]
    train = open_cache(memory_source(articles), word_tokenizer(50), tmp_path)["train"]
    expected = np.bincount(train.tokens).tolist()
    for block in (1, 7, 64, 1000):
        monkeypatch.setattr(cache, "BLOCK", block)
        assert train.token_counts().tolist() == expected


def test_a_vocabulary_with_gaps_counts_by_its_largest_id(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"w0": 0, "far": 70_000}, unk_token="w0"))
    splits = open_cache(memory_source([Article("train", "far", -1)]), tokenizer, tmp_path)
    assert splits["train"].tokens.tolist() == [70_000]


# When it is made


def test_second_opening_does_not_tokenize(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")
    counted = source_of(path)
    first = open_cache(counted.source, tokenizer, tmp_path / "cache")
    assert counted.n_passes == 1
    again = source_of(path)  # as a new process has it
    second = open_cache(again.source, tokenizer, tmp_path / "cache")
    assert again.n_passes == 0
    assert {split: rows(part) for split, part in second.items()} == {s: rows(part) for s, part in first.items()}


def test_a_changed_file_tokenizer_or_setting_makes_it_anew(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(LINES), encoding="utf-8")

    def made(tokenizer: Tokenizer = tokenizer, **settings) -> bool:
        counted = source_of(path, **settings)
        open_cache(counted.source, tokenizer, tmp_path / "cache")
        return counted.n_passes > 0

    assert made() and not made()
    other = tokenization.train(TokenizerConfig(vocab_size=300, lowercase=False), lambda: iter(LINES))
    assert made(other) and not made(other)
    for settings in ({"split_seed": 1}, {"validation_fraction": 0.2}, {"format": "wikitext"}):
        assert made(**settings) and not made(**settings), settings
    before = path.stat()
    path.write_text("\n".join(["Article 0" + LINES[0][9:], *LINES[1:]]), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time, one other letter
    assert path.stat().st_size == before.st_size and made() and not made()
    path.write_text("\n".join(LINES), encoding="utf-8")
    assert not made()  # the first cache is still there


def test_user_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert temporary.user_cache_dir("") == tmp_path / "jaxlm" and temporary.user_cache_dir("here") == Path("here")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert temporary.user_cache_dir("") == Path("/home/someone/.cache/jaxlm")


# What goes wrong


def test_failing_source_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    def articles() -> Iterator[Article]:
        yield from (Article("train", line, -1) for line in LINES)
        raise UserError("line 301 is bad")

    monkeypatch.setattr(tokenization.chunks, "__defaults__", (300,))
    with pytest.raises(UserError, match="line 301 is bad"):
        open_cache(Source("s", "0", articles, 1), tokenizer, tmp_path)
    assert leftovers(tmp_path) == []


def test_cache_folder_that_cannot_be_made_is_one_line(tmp_path, tokenizer):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="the token cache cannot be written .*--data.cache-dir"):
        open_cache(memory_source([Article("train", "x", -1)]), tokenizer, tmp_path / "file")
    assert leftovers(tmp_path) == ["file"]


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, tokenizer):
    articles = [Article("train", "many words " * 100, -1)] * 400
    with small_disk(tmp_path / "disk", "64k"):
        with pytest.raises(UserError, match=r"the token cache cannot be written \(No space left on device\)"):
            open_cache(memory_source(articles), tokenizer, tmp_path / "disk")
        assert leftovers(tmp_path) == []
        with pytest.raises(UserError, match=r"the tokenizer cannot be written \(No space left on device\)"):
            large = tokenization.train(TokenizerConfig(vocab_size=8000), lambda: (f"w{i} " for i in range(10_000)))
            tokenization.save(large, tmp_path / "disk" / "tokenizer.json")
        assert leftovers(tmp_path) == []
        open_cache(memory_source(articles[:5]), tokenizer, tmp_path / "disk")  # and a smaller one fits


BUILD = """
import signal
import sys
import time
from pathlib import Path
from jaxlm.config import TokenizerConfig
from jaxlm.data import cache, tokenization
from jaxlm.data.sources import Article, Source
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is off in what a shell starts in the background
def articles():
    for i in range(10**9):
        yield Article("train", "some words " * 10_000, -1)

words = tokenization.train(TokenizerConfig(vocab_size=300), lambda: iter(["some words"]))
cache.open_cache(Source("s", "0" * 64, articles, 1), words, Path(sys.argv[1]), lambda n: print(n, flush=True))
"""


@contextlib.contextmanager
def building(folder: Path) -> Iterator[subprocess.Popen]:
    """Start a process that builds an endless cache, and wait until it has written some of it."""
    command = [sys.executable, "-c", BUILD, str(folder)]
    root = Path(cache.__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and int(process.stdout.readline()) > 0
        yield process
    finally:
        process.kill()
        process.communicate()


def test_interrupt_leaves_nothing(tmp_path):
    with building(tmp_path) as process:
        assert any(name.endswith("train.tokens") for name in leftovers(tmp_path))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert leftovers(tmp_path) == []


def test_a_killed_build_is_never_read_and_is_cleared_away_later(tmp_path):
    with building(tmp_path) as process:
        process.kill()
        process.communicate()
    (left,) = (tmp_path / "tokens").iterdir()
    assert left.name.endswith(".tmp") and f".{process.pid}." in left.name

    words = tokenization.train(TokenizerConfig(vocab_size=300), lambda: iter(["some words"]))
    source = memory_source([Article("train", "some words", -1)])  # of the same fingerprint
    splits = open_cache(source, words, tmp_path)
    assert len(splits["train"]) == 1
    (key,) = (tmp_path / "tokens").iterdir()
    assert left.name.startswith(key.name)


def test_left_folder_of_the_same_process_number_is_no_obstacle(tmp_path, tokenizer):
    source = memory_source([Article("train", "x", -1)])
    open_cache(source, tokenizer, tmp_path)
    (key,) = (tmp_path / "tokens").iterdir()
    shutil.rmtree(key)
    left = key.with_name(f"{key.name}.{platform.node()}.{os.getpid()}.tmp")
    left.mkdir()
    (left / "train.tokens").write_bytes(b"half")
    assert len(open_cache(source, tokenizer, tmp_path)["train"]) == 1
    assert list((tmp_path / "tokens").iterdir()) == [key]


@pytest.mark.parametrize("owner", ["dead", "alive", "other host", "other host, long ago"])
def test_what_a_killed_build_left_is_removed_unless_its_process_may_still_write(tmp_path, tokenizer, owner):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    number = os.getppid() if owner == "alive" else finished.pid
    host = "elsewhere" if owner.startswith("other") else platform.node()
    folder = tmp_path / "tokens" / f"{KEY}.{host}.{number}.tmp"
    file = tmp_path / "tokenizers" / f"{KEY}-{KEY}.json.{host}.{number}.tmp"
    folder.mkdir(parents=True)
    file.parent.mkdir()
    for path in (folder / "train.tokens", file):
        path.write_bytes(b"half")
    for path in (folder / "train.tokens", folder, file):
        if "ago" in owner:
            os.utime(path, (time.time() - 2 * temporary.IDLE_S,) * 2)
    open_cache(memory_source([Article("train", "x", -1)]), tokenizer, tmp_path)  # another cache
    assert folder.exists() == file.exists() == (owner in ("alive", "other host"))


@pytest.mark.parametrize(
    "name",
    [
        *("docs/thesis.tmp", "docs/a.b.1234567.tmp", f"docs/{KEY}.host.1234567.tmp", "docs/folder.tmp/file"),
        *("tokens/mine.tmp", "tokens/a.b.1234567.tmp", f"tokens/{KEY}.tmp", "tokenizers/old.json.tmp"),
    ],
)
def test_files_of_a_user_in_the_cache_folder_are_never_removed(tmp_path, tokenizer, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text("not of jaxlm")
    for old in (path, path.parent):
        os.utime(old, (1, 1))
    open_cache(memory_source([Article("train", "x", -1)]), tokenizer, tmp_path)
    assert path.read_text() == "not of jaxlm"


def test_a_build_that_goes_on_is_not_removed_though_its_number_says_nothing(tmp_path, tokenizer):
    with building(tmp_path) as process:
        (left,) = (tmp_path / "tokens").iterdir()
        other = left.rename(left.with_name(left.name.replace(f".{process.pid}.", ".999999999.")))  # another container's
        open_cache(memory_source([Article("train", "x", -1)]), tokenizer, tmp_path)
        assert other.exists()
        process.kill()
        process.wait()
        open_cache(memory_source([Article("train", "x", -1)]), tokenizer, tmp_path)
        assert not other.exists()


def test_two_builders_at_once_agree(tmp_path, tokenizer):
    # The other one finishes while this one reads its source.
    source = memory_source([Article("train", line, -1) for line in LINES])

    def articles() -> Iterator[Article]:
        open_cache(source, tokenizer, tmp_path / "other")
        (tmp_path / "mine").mkdir(exist_ok=True)
        shutil.copytree(tmp_path / "other", tmp_path / "mine", dirs_exist_ok=True)
        return source.articles()

    splits = open_cache(dataclasses.replace(source, articles=articles, parts=()), tokenizer, tmp_path / "mine")
    assert len(splits["train"]) == len(LINES)
    assert len(list((tmp_path / "mine" / "tokens").iterdir())) == 1


# Damage


def patch(path: Path, content: bytes, at: int = 0) -> None:
    """Write into a file, and leave its time as it is."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, at: int = 0) -> None:
    patch(path, bytes([path.read_bytes()[at] ^ 1]), at)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def cut(path: Path, n: int) -> None:
    os.truncate(path, path.stat().st_size - n)


def in_its_place(path: Path, make: Callable[[Path], None]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


def without_sums(folder: Path) -> None:
    """Make a cache one of version 1.0, which had no checksums."""
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({name: meta[name] for name in ("dtype", "source")}))
    (folder / cache.CHECKED).unlink()


def built(tmp_path: Path, tokenizer: Tokenizer) -> tuple[Counted, dict[str, Split], Path]:
    articles = [Article(SPLITS[i % 3], line, i % 2) for i, line in enumerate(LINES)]
    counted = Counted(memory_source(articles))
    splits = open_cache(counted.source, tokenizer, tmp_path)
    (folder,) = (tmp_path / "tokens").iterdir()
    return counted, splits, folder


def without(key: str) -> Callable[[Path], None]:
    """Return a function that takes a key out of meta.json."""

    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        del meta[key]
        write(folder / "meta.json", json.dumps(meta).encode())

    return change


NAMES = [f"{split}.{name}" for split in SPLITS for name in ("tokens", *cache.FILES)]
DAMAGES: dict[str, Callable[[Path], None]] = {
    **{f"bit of {name}": lambda folder, name=name: flip(folder / name) for name in [*NAMES, "meta.json"]},
    "last bit": lambda folder: flip(folder / "train.tokens", -1 + (folder / "train.tokens").stat().st_size),
    "short": lambda folder: os.truncate(folder / "train.tokens", 100),
    "a byte less": lambda folder: cut(folder / "train.tokens", 1),
    "longer": lambda folder: patch(folder / "test.labels", b"1234", (folder / "test.labels").stat().st_size),
    "empty": lambda folder: os.truncate(folder / "test.offsets", 0),
    "empty meta.json": lambda folder: os.truncate(folder / "meta.json", 0),
    "other JSON": lambda folder: write(folder / "meta.json", b"[]"),
    "deep JSON": lambda folder: write(folder / "meta.json", b"[" * 100_000),
    "binary": lambda folder: write(folder / "meta.json", b"\xff\0"),
    "other type": lambda folder: write(folder / "meta.json", b'{"dtype": "float64"}'),
    "no type": lambda folder: write(folder / "meta.json", b'{"dtype": {}}'),
    "no sums": without("files"),
    "no sum of the sums": without("sum"),
    "missing": lambda folder: (folder / "validation.n_bytes").unlink(),
    "missing meta.json": lambda folder: (folder / "meta.json").unlink(),
    "folder": lambda folder: in_its_place(folder / "train.offsets", Path.mkdir),
    "nothing in it": lambda folder: in_its_place(folder, Path.mkdir),
    "a file": lambda folder: in_its_place(folder, Path.touch),
    "a link to nothing": lambda folder: in_its_place(folder, lambda path: path.symlink_to("nowhere")),
}
OLD_DAMAGES: dict[str, Callable[[Path], None]] = {
    "offsets": lambda folder: flip(folder / "train.offsets", 11),
    "first offset": lambda folder: flip(folder / "train.offsets", 0),
    "order of offsets": lambda folder: patch(folder / "train.offsets", np.int64([9, 1]).tobytes(), 8),
    "end": lambda folder: cut(folder / "test.tokens", 100),
    "a byte less": lambda folder: cut(folder / "train.tokens", 1),
    "articles": lambda folder: cut(folder / "test.labels", 4),
    "bytes": lambda folder: cut(folder / "test.n_bytes", 8),
    "ids": lambda folder: patch(folder / "train.tokens", np.uint16([60_000]).tobytes(), 100),
    "labels": lambda folder: patch(folder / "train.labels", np.int32([-2]).tobytes(), 100),
    "type": lambda folder: write(folder / "meta.json", b'{"dtype": "uint32"}'),
    "empty": lambda folder: os.truncate(folder / "meta.json", 0),
}


@pytest.mark.parametrize("name", [*DAMAGES, *(f"old: {name}" for name in OLD_DAMAGES)])
def test_a_damaged_cache_is_built_again_and_said_so(tmp_path, tokenizer, capsys, name):
    counted, before, folder = built(tmp_path, tokenizer)
    expected = {split: rows(before[split]) for split in SPLITS}
    if name.startswith("old: "):
        without_sums(folder)
        OLD_DAMAGES[name.removeprefix("old: ")](folder)
    else:
        DAMAGES[name](folder)
    counted.n_passes = 0
    after = open_cache(counted.source, tokenizer, tmp_path)
    assert counted.n_passes == 1 and {split: rows(after[split]) for split in SPLITS} == expected
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {folder}: the token cache is damaged (") and line.count("\n") == 1
    open_cache(counted.source, tokenizer, tmp_path)
    assert counted.n_passes == 1 and not capsys.readouterr().err
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [folder.name]


def test_who_has_a_cache_open_keeps_it_while_another_process_builds_it_again(tmp_path, tokenizer):
    counted, before, folder = built(tmp_path, tokenizer)
    expected = rows(before["train"])
    os.truncate(folder / "meta.json", 0)
    open_cache(counted.source, tokenizer, tmp_path)
    assert rows(before["train"]) == expected


def test_a_cache_of_an_older_version_gets_checksums_once(tmp_path, tokenizer, capsys):
    counted, before, folder = built(tmp_path, tokenizer)
    without_sums(folder)
    counted.n_passes = 0
    after = open_cache(counted.source, tokenizer, tmp_path)
    assert "has no checksums; its structure is right, and they are added" in capsys.readouterr().err
    open_cache(counted.source, tokenizer, tmp_path)
    assert not capsys.readouterr().err and counted.n_passes == 0
    assert {split: rows(after[split]) for split in SPLITS} == {split: rows(before[split]) for split in SPLITS}
    flip(folder / "train.tokens", 20)
    open_cache(counted.source, tokenizer, tmp_path)
    assert counted.n_passes == 1


def test_of_a_large_file_a_share_is_checked_at_each_start_and_all_once_it_has_moved(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 64)
    counted, _, folder = built(tmp_path, tokenizer)
    read: list[int] = []
    real = cache._sum_of_block

    def counted_sum(file, i):
        found = real(file, i)
        read.append(file.tell() - 64 * i)
        return found

    monkeypatch.setattr(cache, "_sum_of_block", counted_sum)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json")
    monkeypatch.setattr(cache, "CHECKED_BYTES", 128)
    open_cache(counted.source, tokenizer, tmp_path)
    assert 0 < sum(read) <= 12 * 128 < size / 4
    moved = folder.rename(tmp_path / "moved")
    shutil.copytree(moved, folder)  # as a copy to another disk
    for n_bytes in (size, 12 * 128):
        read.clear()
        open_cache(counted.source, tokenizer, tmp_path)
        assert sum(read) == size if n_bytes == size else 0 < sum(read) <= n_bytes
    flip(folder / "train.tokens", 1000)  # changes the time that cannot be set
    open_cache(counted.source, tokenizer, tmp_path)
    assert counted.n_passes == 2


def test_a_good_cache_is_used_where_nothing_can_be_written(tmp_path, tokenizer):
    with small_disk(tmp_path / "disk", "1m"):
        counted, before, folder = built(tmp_path / "disk", tokenizer)
        without_sums(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        after = open_cache(counted.source, tokenizer, tmp_path / "disk")
        assert counted.n_passes == 1 and rows(after["train"]) == rows(before["train"])
        del before, after  # which keep the disk in use
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        flip(folder / "train.offsets", 11)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\); .*--data.cache-dir"):
            open_cache(counted.source, tokenizer, tmp_path / "disk")


def test_a_cache_in_a_linked_folder_is_found_and_mended(tmp_path, tokenizer):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    counted, _, folder = built(tmp_path / "link", tokenizer)
    flip(folder / "train.tokens")
    open_cache(counted.source, tokenizer, tmp_path / "real")
    open_cache(counted.source, tokenizer, tmp_path / "link")
    assert counted.n_passes == 2
