import os
import time
from pathlib import Path

import pytest

import jaxlm.cache
from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import cache, sources, tokenization


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache folder with the tokens of three texts: a.txt, b.txt and c.txt, the last used 40 days ago."""
    for name in "abc":
        text = tmp_path / f"{name}.txt"
        text.write_text("".join(f"line {i} of {name}\n" for i in range(60)))
        source = sources.open_source(DataConfig(path=str(text)), "text")
        tokenizer = tokenization.cached(TokenizerConfig(kind="bytes"), lambda: iter(()), "", tmp_path / "cache")
        cache.open_cache(source, tokenizer, tmp_path / "cache")
    for file in path_of(tmp_path / "cache", "c").iterdir():
        os.utime(file, (time.time() - 40 * 86400,) * 2)
    return tmp_path / "cache"


def path_of(folder: Path, name: str) -> Path:
    return next(x.path for x in cache.records(folder) if f"/{name}.txt " in x.source)


def run(folder: Path, *argv: str) -> int:
    return jaxlm.cache.main([*argv, "--data.cache-dir", str(folder)])


def damage(folder: Path) -> None:
    path = path_of(folder, "b") / "train.tokens"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_list_tells_source_and_size(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(folder) == 0
    out = capsys.readouterr().out
    assert [x in out for x in ("a.txt", "b.txt", "c.txt", "40 d ago", "complete", "in all")] == [True] * 6


def test_verify_finds_a_byte_that_changed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(folder, "verify") == 0
    damage(folder)
    assert run(folder, "verify") == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    (bad,) = [line for line in lines if not line.endswith("complete")]
    assert bad.startswith(f"{path_of(folder, 'b')}: damaged: train.tokens is not as it was written; the next")


def test_clean_removes_what_is_damaged_begun_or_unused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    damage(folder)
    begun = folder / "tokens" / f"{'0' * 32}.host.999999999.tmp"
    begun.mkdir()
    (begun / "train.tokens").write_bytes(b"12")
    os.utime(begun / "train.tokens", (0, 0))
    os.utime(begun, (0, 0))
    kept = path_of(folder, "a")
    with pytest.raises(SystemExit) as error:  # there is no terminal to ask in
        run(folder, "clean")
    assert error.value.code == 2 and len(list((folder / "tokens").iterdir())) == 4
    assert run(folder, "clean", "--yes") == 0
    assert "removed 3 token caches, " in capsys.readouterr().out
    assert list((folder / "tokens").iterdir()) == [kept]
    assert run(folder, "clean", "--yes") == 0 and run(folder, "clean", "--yes", "--days", "0") == 0
    assert list((folder / "tokens").iterdir()) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path / "none")
    assert "there is no such folder; leave it out for" in capsys.readouterr().err
