"""Text is read in one way by every reader: the same inputs give the same text, or the same refusal, in all of them."""

import argparse
import codecs
import gzip
import io
import json
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxlm import config as configs
from jaxlm import predict
from jaxlm.config import DataConfig, TokenizerConfig
from jaxlm.data import sources, tokenization
from jaxlm.errors import UserError
from jaxlm.io import utf8
from jaxlm.reporting import run_reader
from jaxlm.weights import huggingface


def articles(path: Path) -> Any:
    config = DataConfig(path=str(path), validation_fraction=0, test_fraction=0)
    return [article.text for article in sources.open_source(config, "text").articles()]


def vocabulary(path: Path) -> Any:
    if path.name in ("vocab.json", "merges.txt"):
        partner = path.with_name("merges.txt" if path.name == "vocab.json" else "vocab.json")
        partner.write_text(READERS[partner.name][0])
        path = path.with_name("vocab.json")
    tokenizer = tokenization.read(TokenizerConfig(path=str(path)))
    return tokenizer.get_vocab(), tokenizer.encode("thé").ids


def texts(path: Path) -> Any:
    return list(predict._texts(argparse.Namespace(texts=None, pairs=None, file=str(path))) or [])


def piped(path: Path) -> Any:
    return list(predict._lines("standard input", path.open("rb")))


TOKENIZER = tokenization.train(
    TokenizerConfig(kind="wordpiece", vocab_size=300, lowercase=False), lambda: iter(["thé th"])
).to_str()
PARTS = {"t": 0, "h": 1, "Ã": 2, "©": 3, "th": 4, "Ã©": 5}  # the bytes of é, as byte-level BPE writes them
TABLE = [f"{i} thé" for i in range(3)]
# What reads files of users: a name, a text that it understands, and how it is read.
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "data.txt": ("one\nthé\u2028\x85\x0b\x0c two\n", articles),
    "data.tsv": ("text\tn\n" + "".join(f"{x}\t1\n" for x in TABLE), articles),
    "data.csv": ("text,n\n" + "".join(f"{x},1\n" for x in TABLE), articles),
    "data.jsonl": ("".join(json.dumps({"text": x}, ensure_ascii=False) + "\n" for x in TABLE), articles),
    "data.txt.gz": ("one\nthé\n", articles),
    "data.txt.xz": ("one\nthé\n", articles),
    "given.txt": ("one\nthé\u2028\x85\x0b\x0c two\n", texts),
    "given.txt.gz": ("one\nthé\n", texts),
    "piped.txt": ("one\nthé\u2028\x85\x0b\x0c two\n", piped),
    "config.toml": ('[data]\npath = "thé"\n', lambda path: configs._file(path)[0][:2]),
    "run/config.toml": ('task = "gpt"\n[data]\npath = "thé"\n', lambda path: run_reader.read(path.parent).settings),
    "vocab.txt": ("[UNK]\nt\n##h\n##é\n\u2028\n\x85\n", vocabulary),
    "vocab.json": (json.dumps(PARTS, ensure_ascii=False), vocabulary),
    "merges.txt": ("#version: 0.2\nt h\nÃ ©\n", vocabulary),
    "tokenizer.json": (TOKENIZER, vocabulary),
    "tokenizer_config.json": ('{"do_lower_case": false, "é": 1}', lambda path: huggingface._ignores_case(path.parent)),
    "config.json": ('{"model_type": "thé"}', huggingface._read_json),
    "metadata.json": ('{"step": 1, "é": 2}', utf8.read_json),
}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))
    return path


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("change", ["mark", "crlf", "mark and crlf"])
def test_marks_and_line_ends_change_nothing(name: str, change: str, tmp_path: Path) -> None:
    text, read = READERS[name]
    path = write(tmp_path / name, text.encode())
    expected = read(path)
    changed = text.replace("\n", "\r\n") if "crlf" in change else text
    write(path, changed.encode("utf-8-sig" if "mark" in change else "utf-8"))
    assert read(path) == expected
    assert "\ufeff" not in repr(expected)


def damaged(text: str, data: bytes) -> bytes:
    """Return a text with its first character outside of ASCII in other bytes."""
    before = text[: place(text)]
    return before.encode() + data + text[len(before) + 1 :].encode()


def place(text: str) -> int:
    return next(i for i, character in enumerate(text) if not character.isascii())


# What a text is made into, and what the refusal says.
CONVERT = "{0}, not UTF-8; convert it, as with iconv -f {0} -t UTF-8 OLD > NEW"
BINARY = "binary, or text in UTF-16"
REFUSED: dict[str, tuple[Callable[[str], bytes], str]] = {
    "utf-16": (lambda text: text.encode("utf-16"), CONVERT.format("UTF-16")),
    "utf-16-be": (lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"), CONVERT.format("UTF-16")),
    "utf-32": (lambda text: text.encode("utf-32"), CONVERT.format("UTF-32")),
    "utf-32-be": (lambda text: codecs.BOM_UTF32_BE + text.encode("utf-32-be"), CONVERT.format("UTF-32")),
    "utf-16 without a mark": (lambda text: text.encode("utf-16-le"), BINARY),
    "a NUL": (lambda text: damaged(text, b"\0"), BINARY),
    "latin-1": (lambda text: damaged(text, b"\xe9"), "not UTF-8 at byte"),
    "a surrogate": (lambda text: damaged(text, "\ud800".encode("utf-8", "surrogatepass")), "not UTF-8 at byte"),
    "cut": (lambda text: text[: place(text)].encode() + b"\xc3", "not UTF-8 at byte"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_utf8_is_refused_alike(name: str, kind: str, tmp_path: Path) -> None:
    text, read = READERS[name]
    change, message = REFUSED[kind]
    path = write(tmp_path / name, change(text))
    if read in (texts, piped) and not kind.startswith("utf"):  # one bad line is refused by itself
        lines = [line for _, line in read(path)]
        assert len(lines) == 2 and not refusal(lines[0]) and message in refusal(lines[1])
        return
    with pytest.raises((UserError, ValueError)) as caught:
        found = read(path)
        utf8.check(found[0][1])  # of what is read line by line
    assert message in str(caught.value)
    if "byte" in message:
        assert f"at byte {place(text)} " in str(caught.value)  # before it, all is ASCII


def refusal(text: str) -> str:
    try:
        utf8.check(text)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32", "LATIN1"])
def test_following_the_mend_helps(encoding: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "thé\n".encode(encoding))
    with pytest.raises(ValueError) as caught:
        utf8.read(path)
    command = str(caught.value).partition("as with ")[2].replace("OLD", "a.txt").replace("NEW", "b.txt")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert utf8.read(tmp_path / "b.txt") == "thé\n"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_blocks_make_no_difference(size: int) -> None:
    data = "aé\u2028\U0001f600 end".encode()
    assert "".join(utf8.decoded(data[i : i + size] for i in range(0, len(data), size))) == data.decode()
    bad = data + b"\xff tail"
    with pytest.raises(ValueError, match=f"at byte {len(data)} "):
        list(utf8.decoded(bad[i : i + size] for i in range(0, len(bad), size)))


def test_a_line_that_is_too_long_is_cut_and_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utf8, "LONGEST", 10)
    lines = list(utf8.lines(io.BytesIO(b"a" * 10 + b"\n" + b"b" * 35 + b"\r\n" + b"c\n\nd")))
    assert lines == ["a" * 10, "b" * 11, "c", "", "d"]
    assert [bool(refusal(line)) for line in lines] == [False, True, False, False, False]


@pytest.mark.parametrize("read", [utf8.from_json, utf8.from_toml])
def test_deep_nesting_is_refused(read: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        read(("a = " if read is utf8.from_toml else "") + "[" * 100_000 + "]" * 100_000)


@pytest.mark.parametrize("read", [utf8.from_json, utf8.from_toml])
def test_a_page_of_html_is_named(read: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="a page of HTML .*download the raw file"):
        read("<!DOCTYPE html>\n<html></html>")


@pytest.mark.parametrize("read", [utf8.from_json, utf8.from_toml])
def test_a_number_of_too_many_digits_is_refused(read: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="has a number of more than 4,300 digits; shorten it, or put it in quotes"):
        read(("a = " if read is utf8.from_toml else "") + "9" * 5000)


@pytest.mark.parametrize("text", ["\\ud800", "a\\uDFFF", "\\udce9"])
def test_half_of_a_surrogate_pair_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"\\ud[0-9a-f]{3} is half of a surrogate pair, not a character; write both"):
        utf8.from_json(f'["{text}"]')
    assert utf8.from_json('"\\ud83d\\ude00"') == "\U0001f600"
