"""Sources: formats, columns, labels, parts, the hash split, the hub, and one line for each thing that can be wrong."""

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxlm.config import DataConfig
from jaxlm.data import hub, sources, tables
from jaxlm.data.sources import Article, Reads, open_source, split_of
from jaxlm.errors import UserError

PACK = {"": lambda data: data, ".gz": gzip.compress, ".xz": lzma.compress}
TABLE = [("one", 1), ("null", 0), ('a "lone quote', 1), ("NA", 0), ("2020-01-01", 1), ("007", 0)]
WHOLE = {"validation_fraction": 0.0, "test_fraction": 0.0}  # all of a file is the train part


def write(path: Path, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](data))
    return str(path)


def write_parquet(path: Path, **columns: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def articles(reads: Reads = "text", **settings) -> list[Article]:
    return list(open_source(DataConfig(**settings), reads).articles())


def texts(path: str, **settings) -> list[str]:
    found = articles(path=path, **WHOLE | settings)
    assert {(article.split, article.label) for article in found} == {("train", -1)}
    return [article.text for article in found]


def rows(path: str, **settings) -> list[tuple[str, int]]:
    found = articles(reads="labels", path=path, **WHOLE | settings)
    return [(article.text, article.label) for article in found]


def failure(reads: Reads = "text", **settings) -> str:
    with pytest.raises(UserError) as caught:
        articles(reads, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def parts(found: list[Article]) -> dict[str, list[str]]:
    return {split: [a.text for a in found if a.split == split] for split in sources.SPLITS}


# Formats


@pytest.mark.parametrize("suffix", PACK)
def test_text_is_one_article_a_line(tmp_path, suffix):
    content = "\ufefffirst line\n\n  indented \u2028 kept \x0c\n \t\n= not\r\nlast, no newline"
    path = write(tmp_path / f"a.txt{suffix}", content)
    assert texts(path) == ["first line", "  indented \u2028 kept \x0c", "= not", "last, no newline"]


@pytest.mark.parametrize("suffix", PACK)
def test_wikitext_is_grouped_by_top_level_titles(tmp_path, suffix):
    content = " \n = One = \n \n Text . \n = = Part = = \n More . \n = = = Deep = = = \n \n = Two = \n \n End ."
    path = write(tmp_path / f"a.txt{suffix}", content)
    one = " = One = \n \n Text . \n = = Part = = \n More . \n = = = Deep = = = \n "
    assert texts(path) == [one, " = Two = \n \n End ."]
    assert len(texts(path, format="text")) == 7


def test_text_before_the_first_title_is_kept(tmp_path):
    path = write(tmp_path / "a.txt", "Preface .\n= One =\nText .\n")
    assert texts(path) == ["Preface .", "= One =\nText ."]
    assert texts(write(tmp_path / "b.txt", "No title .\nAt all .\n"), format="wikitext") == ["No title .\nAt all ."]


@pytest.mark.parametrize("suffix", PACK)
def test_tsv_keeps_quotes_and_odd_values(tmp_path, suffix):
    lines = ["\ufeffsentence\tlabel", *(f"{text}\t{label}" for text, label in TABLE)]
    assert rows(write(tmp_path / f"a.tsv{suffix}", "\n".join(lines))) == TABLE
    assert texts(write(tmp_path / f"b.tsv{suffix}", "\r\n".join(lines))) == [text for text, _ in TABLE]


@pytest.mark.parametrize("suffix", PACK)
def test_csv_keeps_quoted_fields_and_odd_values(tmp_path, suffix):
    content = '\ufeff"text",label\n"a, ""b""\nc",1\nnull,0\n\n2020-01-01,1\n,0\n'
    expected = [('a, "b"\nc', 1), ("null", 0), ("2020-01-01", 1), ("", 0)]
    path = write(tmp_path / f"a.csv{suffix}", content)
    assert rows(path) == expected
    assert texts(path) == [text for text, _ in expected if text]  # an empty text is no article, but a labelled row is


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["jsonl", "json"])
def test_json_lines_keep_their_text(tmp_path, name, suffix):
    lines = [json.dumps({"id": i, "text": text, "label": label}) for i, (text, label) in enumerate(TABLE)]
    assert rows(write(tmp_path / f"a.{name}{suffix}", "\ufeff" + "\n\n".join(lines))) == TABLE


@pytest.mark.parametrize("suffix", PACK)
def test_parquet(tmp_path, suffix):
    path = write_parquet(tmp_path / "a.parquet", text=[text for text, _ in TABLE], label=[label for _, label in TABLE])
    if suffix:
        path = write(tmp_path / f"a.parquet{suffix}", Path(path).read_bytes())
    assert rows(path) == TABLE


def test_many_rows_come_through_once_and_in_order(tmp_path):
    expected = [f"row {i}" for i in range(3 * tables.BATCH + 1)]
    assert texts(write(tmp_path / "a.txt", "\n".join(expected))) == expected
    assert texts(
        write(tmp_path / "a.tsv", "\n".join(["text\tid", *(f"{t}\t{i}" for i, t in enumerate(expected))]))
    ) == (expected)
    assert texts(write_parquet(tmp_path / "a.parquet", text=expected)) == expected


def test_path_may_hold_pattern_characters(tmp_path):
    assert texts(write(tmp_path / "[a] *?" / "b [1].txt", "one\n")) == ["one"]


def test_format_setting_wins_over_the_name(tmp_path):
    assert texts(write(tmp_path / "notes.md", "text,n\none,1\n"), format="csv") == ["one"]
    assert texts(str(tmp_path / "notes.md"), format="text") == ["text,n", "one,1"]


def test_local_file_needs_no_network_and_no_cache_folder(tmp_path):
    path = write(tmp_path / "a.txt", "one\n")
    (tmp_path / "home").write_text("a file, where the library would make its cache folder")
    code = f"""
import socket
import sys
socket.getaddrinfo = lambda *args, **settings: print("look-up of", args)
from jaxlm.config import DataConfig
from jaxlm.data.sources import open_source
source = open_source(DataConfig(path={path!r}, validation_fraction=0, test_fraction=0), "text")
print([article.text for article in source.articles()], [name for name in ("jax", "torch") if name in sys.modules])
"""
    assert run(code, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0") == "['one'] []\n"


# Formats by content


ANY_NAMES = [
    "README.md",
    "code.py",
    "server.log",
    "page.html",
    "wiki.train.tokens",
    "NOTES",
    "A.TXT",
    "b.Md.gz",
    "c.rst.xz",
]


@pytest.mark.parametrize("name", ANY_NAMES)
def test_text_is_read_whatever_its_name(tmp_path, name):
    lines = ["# A title, and more", "import os; x = 1", "a\tb", "{not json}", "<p>one</p>"]
    path = tmp_path / name
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""]("\n".join(lines).encode()))
    assert texts(str(path)) == lines
    path = write(tmp_path / "d" / name.replace("A.TXT", "e"), "= One =\nText .\n= Two =\nText .\n")
    assert len(texts(path)) == 2


@pytest.mark.parametrize("name", ["rows", "rows.data", "rows.dat.gz", "rows.log"])
@pytest.mark.parametrize(
    "content",
    [
        "text,label\none,1\ntwo,0\n",
        "Sentence\tlabel\none\t1\ntwo\t0\n",
        '{"text": "one", "label": 1}\n{"text": "two", "label": 0}\n',
        "text;label\none;1\ntwo;0\n",
    ],
    ids=["csv", "tsv", "jsonl", "semicolons"],
)
def test_tables_are_recognized_by_their_first_rows(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert rows(path) == [("one", 1), ("two", 0)]
    assert texts(path) == ["one", "two"]
    assert texts(write(tmp_path / "a.txt", content)) == content.splitlines()  # the name says what it is
    assert rows(str(tmp_path / "a.txt")) == [("one", 1), ("two", 0)]  # which has no labels


def test_compressed_files_and_parquet_are_recognized_without_their_ending(tmp_path):
    for name, pack in (("a", gzip.compress), ("b.txt", lzma.compress), ("c.csv", gzip.compress)):
        (tmp_path / name).write_bytes(pack(b"text\none\n"))
    assert texts(str(tmp_path / "a")) == texts(str(tmp_path / "b.txt")) == ["text", "one"]
    assert texts(str(tmp_path / "c.csv")) == ["one"]
    content = Path(write_parquet(tmp_path / "a.parquet", text=["one"])).read_bytes()
    for name in ("rows", "rows.txt", "rows.csv", "rows.jsonl"):
        for pack in (bytes, gzip.compress, lzma.compress):
            (tmp_path / name).write_bytes(pack(content))
            assert texts(str(tmp_path / name)) == ["one"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


@pytest.mark.parametrize("name", ["a.parquet", "a.txt", "a.csv", "a.jsonl", "a.txt.gz", "a.csv.xz", "a.parquet.gz"])
def test_what_stands_in_for_a_file_is_named(tmp_path, name):
    path = write(tmp_path / name, "")
    Path(path).write_bytes(POINTER)
    assert failure(path=path) == (
        f"{path}: is a pointer of Git LFS, not the file itself; run git lfs pull in its folder"
    )
    Path(path).write_bytes(b"\n<!DOCTYPE html>\n<html>text, label</html>\n")
    if name == "a.txt":
        assert len(texts(path)) == 2  # HTML can be what is to be learned
    else:
        assert "not the file itself; download the raw file" in failure(path=path)


PDF, PNG = b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n\x03\x10", b"\x89PNG\r\n\x1a\n\0"


@pytest.mark.parametrize("content", [bytes(range(256)), PDF, PNG])
@pytest.mark.parametrize("name", ["a", "a.pdf", "a.txt", "a.jsonl"])
def test_binary_files_are_refused_whatever_their_name(tmp_path, name, content):
    assert f"{name}: is binary, or text in UTF-16" in failure(path=write(tmp_path / name, content))


def test_a_folder_of_texts_leaves_out_what_is_hidden_binary_or_empty(tmp_path):
    write(tmp_path / "README.md", "read\n")
    write(tmp_path / "b.py", "code\n")
    write(tmp_path / ".hidden", "hidden\n")
    write(tmp_path / "d.png", PNG)
    write(tmp_path / "e.pdf", PDF)
    write(tmp_path / "empty.py", "")
    source = open_source(DataConfig(path=str(tmp_path), **WHOLE), "text")
    assert [article.text for article in source.articles()] == ["read", "code"]
    assert "not used (hidden, binary or empty): .hidden, d.png, e.pdf, empty.py" in source.notes
    assert any(note.startswith("each line of a text file is a document of its own: ") for note in source.notes)
    for i in range(10):
        write(tmp_path / f"f{i}.bin", b"\0")
    assert any("9 more" in note for note in open_source(DataConfig(path=str(tmp_path), **WHOLE), "text").notes)
    write(tmp_path / "train.md", "train\n")
    write(tmp_path / "valid", "valid\n")
    found = parts(articles(path=str(tmp_path), **WHOLE))
    assert found["train"] == ["train"] and found["validation"] == ["valid"]


def test_a_folder_without_text_says_what_it_has(tmp_path):
    write(tmp_path / "d.png", PNG)
    (tmp_path / "more").mkdir()
    assert "no file of text in it, only d.png, more; name a folder or file with text" in failure(path=str(tmp_path))


# Sources as they were read when these figures were written down: fingerprint, and hash and number of the articles.
TEXT = "\ufefffirst line\n\n  indented \u2028 kept \x0c\n \t\n= not\r\nlone\rcarriage\nlast, no newline"
WIKITEXT = " \n = One = \n \n Text . \n = = Part = = \n More . \n = Two = \n \n End ."
CSV = '\ufeff"text",label\n"a, ""b""\nc",1\nnull,0\n\n2020-01-01,1\n,0\n"x"y,1\nz"q",0\r\n"cr\r\nlf",1\n'
TSV = 'sentence\tlabel\none\t1\na "lone quote\t1\nNA\t0\n007\t0'
JSONL = '\ufeff{"id": 0, "text": "one", "label": 1}\n\n{"id": 1, "text": "n\\u00e9", "label": 0}\n'
PAIRS_JSONL = '{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n'
RECORDED: dict[str, tuple[dict[str, str], Reads, dict, str]] = {
    "text": ({"a.txt": TEXT}, "text", {}, "30a50c9a 72c198e2 6"),
    "gzip": ({"a.txt.gz": TEXT}, "text", {}, "30a50c9a 72c198e2 6"),
    "xz": ({"a.txt.xz": TEXT}, "text", {}, "30a50c9a 72c198e2 6"),
    "wikitext": ({"a.txt": WIKITEXT}, "text", {}, "e14ac882 b21d194c 2"),
    "wikitext as text": ({"a.txt": WIKITEXT}, "text", {"format": "text"}, "e631c6c2 c8e74a7c 6"),
    "csv": ({"a.csv": CSV}, "text", {}, "ebc8a88f 69c35dea 6"),
    "csv labels": ({"a.csv": CSV}, "labels", {}, "4c6fda3d bc7add8f 7"),
    "tsv": ({"a.tsv": TSV}, "text", {}, "a2ffd6fb 7c2f9ff7 4"),
    "tsv labels": ({"a.tsv": TSV}, "labels", {}, "ca90a16a 0716411f 4"),
    "jsonl": ({"a.jsonl": JSONL}, "text", {}, "ce9cb8bf 54b96591 2"),
    "jsonl labels": ({"a.jsonl": JSONL}, "labels", {}, "48da5363 4aeb15df 2"),
    "pairs": ({"a.jsonl": PAIRS_JSONL}, "pairs", {}, "e8a06ae8 2ded2de6 4"),
    "parts": (
        {"train.txt": "one\ntwo\n", "dev.txt": "three\n", "other.txt": "four\n"},
        "text",
        {},
        "60d249c7 e7879187 3",
    ),
    "files": ({"a.txt": "one\ntwo\n", "b.csv": "text\nthree\n", "c.log": "log\n"}, "text", {}, "4fd501f5 765b81f4 3"),
    "md as csv": ({"a.md": "text,n\none,1\n"}, "text", {"format": "csv"}, "590141c2 78bd195f 1"),
    "split": (
        {"a.txt": "\n".join(f"article {i}" for i in range(100))},
        "text",
        {"split_seed": 3, "validation_fraction": 0.1, "test_fraction": 0.3},
        "30c06a24 071c92ae 100",
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_sources_are_read_as_ever(name, tmp_path):
    files, reads, settings, expected = RECORDED[name]
    for file, content in files.items():
        write(tmp_path / file, content)
    path = tmp_path if len(files) > 1 else tmp_path / next(iter(files))
    source = open_source(DataConfig(path=str(path), **WHOLE | settings), reads)
    found = list(source.articles())
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert f"{source.fingerprint[:8]} {digest[:8]} {len(found)}" == expected


# Columns


def test_columns_by_name_and_number(tmp_path):
    path = write(tmp_path / "a.csv", "id,stars,body\n7,1,good\n8,0,bad\n")
    assert rows(path, text_column="body", label_column="stars") == [("good", 1), ("bad", 0)]
    assert rows(path, text_column="2", label_column="1", header="yes") == [("good", 1), ("bad", 0)]
    assert texts(path, text_column="body") == ["good", "bad"]
    path = write_parquet(tmp_path / "a.parquet", id=[7], stars=[1], body=["good"])
    assert rows(path, text_column="2", label_column="stars", n_labels=2) == [("good", 1)]


def test_usual_names_in_order_of_preference(tmp_path):
    assert rows(write(tmp_path / "a.csv", "review,Sentence,target,Label\nr,s,0,1\n"), n_labels=2) == [("s", 1)]


def test_header_auto_yes_and_no(tmp_path):
    headless = write(tmp_path / "a.tsv", "good\t1\nbad\t0\n")
    columns = {"text_column": "0", "label_column": "1"}
    assert rows(headless, **columns) == [("good", 1), ("bad", 0)]
    assert rows(headless, header="yes", n_labels=2, **columns) == [("bad", 0)]
    headed = write(tmp_path / "b.tsv", "sentence\tlabel\ngood\t1\n")
    assert rows(headed, n_labels=2) == rows(headed, n_labels=2, header="yes") == [("good", 1)]
    assert texts(headed, header="no", text_column="0") == ["sentence", "good"]
    assert texts(write(tmp_path / "c.csv", "only column\nno header\n")) == ["only column", "no header"]


def test_columns_of_the_same_name_are_refused_in_every_format(tmp_path):
    twice = {
        "a.csv": "text,id,text,label,n,n\none,7,two,1,0,0\n",
        "a.tsv": "text\tid\ttext\tlabel\tn\tn\none\t7\ttwo\t1\t0\t0\n",
        "b.csv": "text;id;text;label;n;n\none;7;two;1;0;0\n",
        "a.parquet": "",
    }
    columns = {name: pa.array([value]) for name, value in zip("abcdef", ["one", 7, "two", 1, 0, 0], strict=True)}
    table = pa.table(columns).rename_columns(["text", "id", "text", "label", "n", "n"])
    for name, content in twice.items():
        path = write(tmp_path / name, content)
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(table, path)
        for settings in ({}, {"text_column": "text"}):
            message = failure("labels", path=path, **settings)
            assert f"{path}: columns 0 (text) and 2 (text) have the same name; set data.text_column to" in message
        assert rows(path, text_column="2", n_labels=2) == [("two", 1)]  # the mend; that n is there twice is harmless
        assert texts(path, text_column="0") == ["one"]
        assert failure("labels", path=path, text_column="0", label_column="n").count("4 (n) and 5 (n)") == 1
    path = write(tmp_path / "a.jsonl", '{"text": "one", "n": 1, "n": 2}\n{"n": 1, "text": "a", "text": "b"}\n')
    assert f"{path}, line 2: the object has 'text' more than once; keep one of them" in failure(path=path)
    assert texts(write(tmp_path / "b.jsonl", '{"text": "one", "n": 1, "n": 2, "m": {"n": 1, "n": 2}}\n')) == ["one"]


def test_usual_names_that_differ_in_case_only_are_refused(tmp_path):
    content = "Text,text,LABEL,Label\none,two,1,0\n"
    for path in (
        write(tmp_path / "a.csv", content),
        write(tmp_path / "a.tsv", content.replace(",", "\t")),
        write(tmp_path / "a.jsonl", '{"Text": "one", "text": "two", "LABEL": 1, "Label": 0}\n'),
        write_parquet(tmp_path / "a.parquet", Text=["one"], text=["two"], LABEL=[1], Label=[0]),
    ):
        assert "columns 0 (Text) and 1 (text) have the same name; set data.text_column" in failure(path=path)
        message = failure("labels", path=path, text_column="text")
        assert "columns 2 (LABEL) and 3 (Label) have the same name; set data.label_column" in message
        assert rows(path, text_column="1", label_column="Label", n_labels=2) == [("two", 0)]
        assert rows(path, text_column="Text", label_column="2", n_labels=2) == [("one", 1)]
    hub = tmp_path / "hub"
    write_parquet(hub / "train.parquet", Text=["one"], text=["two"])
    assert "columns 0 (Text) and 1 (text) have the same name" in failure(hub=str(hub))
    assert [article.text for article in articles(hub=str(hub), text_column="1", **WHOLE)] == ["two"]


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "tsv"])
@pytest.mark.parametrize("delimiter", [";", "|", "\t", ","])
def test_tables_with_another_delimiter(tmp_path, suffix, delimiter):
    quoted = f'"it is good{delimiter} really"' if (delimiter, suffix) != ("\t", "tsv") else '"it is good'
    lines = [("text", "label"), (quoted, "1"), ("bad, or so" if delimiter != "," else "bad", "0")]
    path = write(tmp_path / f"a.{suffix}", "\n".join(delimiter.join(line) for line in lines))
    expected = [line[0] if '"it is good' == line[0] else line[0].strip('"') for line in lines[1:]]
    assert rows(path) == list(zip(expected, [1, 0], strict=True))
    assert texts(path) == expected
    path = write(tmp_path / f"b.{suffix}", "\n".join(delimiter.join(line) for line in lines[1:]))
    assert rows(path, text_column="0", label_column="1") == list(zip(expected, [1, 0], strict=True))


def test_a_column_of_text_with_semicolons_is_one_column(tmp_path):
    lines = ["one; two", "three; four"]
    assert texts(write(tmp_path / "a.csv", "\n".join(lines))) == lines


def test_missing_column_names_setting_file_and_columns(tmp_path):
    path = write(tmp_path / "a.csv", "text,stars\ngood,1\n")
    assert f"data.text_column=txt: no such column in {path}" in failure(path=path, text_column="txt")
    message = failure("labels", path=path)
    assert path in message and "data.label_column" in message and "text, stars" in message
    assert "there are 0 (good), 1 (1)" in failure(path=write(tmp_path / "b.csv", "good,1\n"))
    assert "data.label_column=5" in failure("labels", path=path, label_column="5")
    assert "'text'" in failure(path=write(tmp_path / "a.jsonl", '{"text": "a"}\n{"txt": "b"}\n'))
    assert "type int" in failure(path=write(tmp_path / "b.jsonl", '{"text": 5}\n'))
    assert "type int" in failure(path=write_parquet(tmp_path / "a.parquet", text=[1]))


def test_a_first_row_of_more_than_a_megabyte_is_read_whole(tmp_path):
    names = [f"{i:0200}" for i in range(9000)]
    path = write(tmp_path / "a.csv", ",".join([*names, "text"]) + "\n" + "0," * 9000 + "one\n")
    assert texts(path) == ["one"]
    long = "a word " * 200_000
    path = write(tmp_path / "b.csv", f'"{long}",1\n"two",0\n')
    assert rows(path, text_column="0", label_column="1") == [(long, 1), ("two", 0)]


def test_row_with_too_many_fields_is_an_error(tmp_path):
    rule = "the row has 3 columns, but the first one has 2; take the tab out of a cell"
    assert f"line 3: {rule}" in failure(path=write(tmp_path / "a.tsv", "text\tn\none\t1\ntwo\t2\t3\n"))
    assert f"line 2: {rule}" in failure(path=write(tmp_path / "b.tsv", "text\tn\none\t1\t2\n"))


def test_text_has_no_labels(tmp_path):
    message = failure("labels", path=write(tmp_path / "a.txt", "one\n"))
    assert "a.txt" in message and "label column" in message


# Parts


def cola(folder: Path) -> Path:
    write(folder / "in_domain_train.tsv", "gj04\t1\t\tIt's \"fine.\ngj04\t0\t*\tFine it.\n")
    write(folder / "in_domain_dev.tsv", "cj99\t1\t\tGood.\n")
    write(folder / "out_of_domain_dev.tsv", "clc95\t0\t*\tBad it.\n")
    return folder


# Pairs


PAIRS = [("one and one?", "two"), ("2020-01-01", "007"), ('a "lone quote', "null"), ("one and one?", "2")]


def pairs(path: str, **settings) -> list[tuple[str, str]]:
    found = articles(reads="pairs", path=path, **WHOLE | settings)
    assert {(article.split, article.label) for article in found} == {("train", -1)}
    assert all(article.text.endswith("\n") for article in found[::2])
    return [
        (prompt.text.removesuffix("\n"), answer.text) for prompt, answer in zip(found[::2], found[1::2], strict=True)
    ]


def test_pairs_of_every_format(tmp_path):
    lines = [json.dumps({"id": i, "response": b, "instruction": a}) for i, (a, b) in enumerate(PAIRS)]
    assert pairs(write(tmp_path / "a.jsonl", "\n".join(lines))) == PAIRS
    prompts, answers = zip(*PAIRS, strict=True)
    assert pairs(write_parquet(tmp_path / "a.parquet", prompt=list(prompts), answer=list(answers))) == PAIRS
    rows = "".join(f"{a}\t{b}\n" for a, b in PAIRS)
    assert pairs(write(tmp_path / "a.tsv", f"Question\tAnswer\n{rows}")) == PAIRS
    assert pairs(write(tmp_path / "b.tsv", rows), prompt_column="0", answer_column="1") == PAIRS
    path = write(tmp_path / "c.tsv", f"ask\treply\n{rows}")
    assert pairs(path, prompt_column="ask") == PAIRS
    source = open_source(DataConfig(path=path, prompt_column="ask", **WHOLE), "pairs")
    swapped = DataConfig(path=path, prompt_column="reply", answer_column="ask", **WHOLE)
    assert source.fingerprint != open_source(swapped, "pairs").fingerprint


def test_equal_prompts_are_in_one_part(tmp_path):
    lines = [json.dumps({"prompt": f"prompt {i % 50}", "answer": f"answer {i}"}) for i in range(500)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    found = articles(reads="pairs", path=path, validation_fraction=0.2, test_fraction=0.2)
    assert [article.split for article in found[::2]] == [article.split for article in found[1::2]]
    of_prompt: dict[str, set[str]] = {}
    for article in found[::2]:
        of_prompt.setdefault(article.text, set()).add(article.split)
    assert len(of_prompt) == 50 and all(len(parts) == 1 for parts in of_prompt.values())
    assert len({article.split for article in found}) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "answer": 7}, "line 2: the answer is of type int, not a string"),
        ({"prompt": None, "answer": "b"}, "line 2: the prompt is missing; mend it or set data.prompt_column"),
        ({"prompt": "a", "answer": " "}, "line 2: the answer is empty; write one, or leave the row out"),
        ({"prompt": "a"}, "line 2: the object has no 'answer'"),
    ],
)
def test_a_bad_pair_names_the_line(row, message, tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join([json.dumps({"prompt": "a", "answer": "b"}), json.dumps(row)]))
    assert message in failure("pairs", path=path)


def test_what_has_no_pairs(tmp_path):
    assert "a text file has no pairs; give a table" in failure("pairs", path=write(tmp_path / "a.txt", "one\ntwo\n"))
    path = write(tmp_path / "a.csv", "prompt,text\na,b\n")
    assert "no column has a usual name; set data.answer_column; there are prompt, text" in failure("pairs", path=path)
    assert "data.answer_column=txt: no such column" in failure("pairs", path=path, answer_column="txt")


def test_cola_raw_release_needs_no_settings(tmp_path):
    expected = [
        Article("train", "It's \"fine.", 1),
        Article("train", "Fine it.", 0),
        Article("validation", "Good.", 1),
        Article("test", "Bad it.", 0),
    ]
    assert articles("labels", path=str(cola(tmp_path))) == expected
    assert articles(path=str(tmp_path)) == [article._replace(label=-1) for article in expected]


@pytest.mark.parametrize(
    "names", [("TRAIN.txt", "Valid.txt", "test.txt"), ("train.raw.txt.gz", "val.txt", "test.txt.xz")]
)
def test_folder_names_tell_the_parts(tmp_path, names):
    for name in names:
        write(tmp_path / name, name)
    write(tmp_path / "other.txt", "other")
    source = open_source(DataConfig(path=str(tmp_path)), "text")
    assert [article[:2] for article in source.articles()] == list(zip(sources.SPLITS, names, strict=True))
    assert any("other.txt" in note for note in source.notes)


def test_folder_of_unnamed_files_is_one_source(tmp_path):
    write(tmp_path / "a.txt", "one\ntwo\n")
    write(tmp_path / "b.csv", "text\nthree\n")
    write(tmp_path / ".hidden.txt", "hidden\n")
    write(tmp_path / "c.log", "log\n")
    assert texts(str(tmp_path)) == ["one", "two", "three"]
    assert open_source(DataConfig(path=str(tmp_path), **WHOLE), "text").description == f"{tmp_path} (2 files, 0.0 MB)"


def test_folder_without_train_is_an_error(tmp_path):
    valid = write(tmp_path / "valid.txt", "one\ntwo\n")
    write(tmp_path / "test.txt", "three\n")
    message = failure(path=str(tmp_path))
    assert "no train part" in message and f"--data.path {valid}" in message
    found = parts(articles(path=valid, test_path="test.txt", validation_fraction=0.0))
    assert found == {"train": ["one", "two"], "validation": [], "test": ["three"]}


def test_named_file_wins_over_the_folder(tmp_path):
    train = "".join(f"train {i}\t{i % 2}\n" for i in range(200))
    write(tmp_path / "train.tsv", "sentence\tlabel\n" + train)
    write(tmp_path / "dev.tsv", "sentence\tlabel\ndev\t1\n")
    source = open_source(DataConfig(path=str(tmp_path)), "labels")
    found = parts(list(source.articles()))
    assert found["validation"] == ["dev"] and len(found["test"]) > 5
    assert source.notes == ("no test part: 10 % of articles split off by hash (data.test_fraction)",)
    assert "each line of a text file is a document of its own" not in source.notes
    source = open_source(DataConfig(path=str(tmp_path), test_path="dev.tsv"), "labels")
    found = parts(list(source.articles()))
    assert found["test"] == ["dev"] and len(found["validation"]) > 5 and "dev" not in found["validation"]
    assert source.description == f"{tmp_path} (2 tsv files, 0.0 MB)"


def test_conflicting_files_are_errors(tmp_path):
    train = write(tmp_path / "train.txt", "one\n")
    dev = write(tmp_path / "dev.txt", "two\n")
    assert "data.path and data.test_path are both" in failure(path=train, test_path=train)
    assert "both" in failure(path=train, test_path=dev, validation_path=dev)
    write(tmp_path / "valid.txt", "three\n")
    assert "dev.txt and valid.txt" in failure(path=str(tmp_path))
    assert "is a folder" in failure(path=train, test_path=str(tmp_path))


# The hash split


def test_split_is_by_text_and_seed_not_by_position(tmp_path):
    lines = [f"article {i}" for i in range(2000)]
    path = write(tmp_path / "a.txt", "\n".join(lines + lines[:50]))
    found = articles(path=path)
    assert Counter(article.text for article in found) == Counter(lines + lines[:50])
    split = parts(found)
    assert 130 < len(split["validation"]) < 280 and 130 < len(split["test"]) < 280
    of = {article.text: article.split for article in found}
    assert all(article.split == of[article.text] for article in found)  # equal articles share a part
    write(tmp_path / "a.txt", "\n".join(reversed(lines[500:])))
    assert all(article.split == of[article.text] for article in articles(path=path))
    assert {article.text: article.split for article in articles(path=path, split_seed=1)} != of
    config = DataConfig()
    assert all(split_of(text, config) == part for text, part in of.items())
    assert {text for text in lines if split_of(text, config, given=["validation"]) == "test"} == set(split["test"])


def test_split_is_the_documented_hash():
    # blake2b of "0\0article 0" and so on, computed once and written down: a change would move articles between parts.
    found = [split_of(f"article {i}", DataConfig(validation_fraction=0.3, test_fraction=0.3)) for i in range(8)]
    assert found == "train test train validation train train validation train".split()


def test_articles_can_be_called_again_and_fingerprint_follows_content(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
    config = DataConfig(path=path, **WHOLE)
    source = open_source(config, "text")
    assert list(source.articles()) == list(source.articles())
    assert re.fullmatch("[0-9a-f]{64}", source.fingerprint)
    assert open_source(config, "text").fingerprint == source.fingerprint
    assert open_source(DataConfig(path=path), "text").fingerprint != source.fingerprint
    packed = write(tmp_path / "b.txt.gz", "one\ntwo\nthree\n")
    assert open_source(DataConfig(path=packed, **WHOLE), "text").fingerprint == source.fingerprint
    write(tmp_path / "a.txt", "one\ntwo\nThree\n")
    assert open_source(config, "text").fingerprint != source.fingerprint


def test_split_that_leaves_nothing_to_train_on_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", "one\n")
    seed = next(s for s in range(100) if split_of("one", DataConfig(split_seed=s)) == "test")
    assert "1 articles all fall" in failure(path=path, split_seed=seed, documents="line")
    seed = next(s for s in range(100) if split_of("one", DataConfig(split_seed=s)) == "train")
    notes = open_source(DataConfig(path=path, split_seed=seed, documents="line"), "text").notes
    assert "no article fell into the validation part" in notes and "no article fell into the test part" in notes


# Labels


# name: (labels as Python has them, the classes that they make)
KINDS: dict[str, tuple[list[Any], list[str]]] = {
    "numbers from 0": ([0, 1, 0, 1], ["0", "1"]),
    "numbers from 1": ([1, 2, 2, 1], ["1", "2"]),
    "numbers with a gap": ([10, 2, 9, 10], ["2", "9", "10"]),
    "numbers below 0": ([1, -1, 1, -1], ["-1", "1"]),
    "numbers of many digits": ([2**63, 1, 10**30, 1], ["1", str(2**63), str(10**30)]),
    "numbers with a point": ([2.0, 1.0, 3.0, 1.0], ["1", "2", "3"]),
    "words": (["positive", "negative", "neutral", "positive"], ["negative", "neutral", "positive"]),
    "words of any letters": (["très bon", "плохо", "très bon", "a b"], ["a b", "très bon", "плохо"]),
    "words with a number": (["2 stars", "1 star", "1 star", "2 stars"], ["1 star", "2 stars"]),
    "true and false": ([True, False, False, True], ["false", "true"]),
}
TEXTS = ["one", "two", "three", "four"]


def labelled(folder: Path, form: str, labels: list[Any], texts: Sequence[str] = TEXTS) -> str:
    """Write a file of texts with labels, as the libraries of tables write one."""
    path = folder / f"a.{form.partition(' ')[0]}"
    if form in ("csv", "tsv"):
        separator = {"csv": ",", "tsv": "\t"}[form]
        return write(
            path, "".join(f"{a}{separator}{b}\n" for a, b in [("text", "label"), *zip(texts, labels, strict=True)])
        )
    if form == "jsonl":
        lines = [json.dumps({"text": a, "label": b}) for a, b in zip(texts, labels, strict=True)]
        return write(path, "\n".join(lines) + "\n")
    column: Any = labels
    if form == "parquet with categories":
        column = pa.array(labels).dictionary_encode()
    return write_parquet(path, text=list(texts), label=column)


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "parquet", "parquet with categories"])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_kind_make_classes(tmp_path, kind, form):
    labels, classes = KINDS[kind]
    if form == "parquet with categories" and kind == "true and false":
        pytest.skip("Arrow has no categories of these")
    if form.startswith("parquet") and kind == "numbers of many digits":
        pytest.skip("Arrow has no such integers")
    path = labelled(tmp_path, form, labels)
    source = open_source(DataConfig(path=path, **WHOLE), "labels")
    assert list(source.classes) == classes
    names = [str(int(label) if isinstance(label, float) else label).lower() for label in labels]
    assert [classes[article.label] for article in source.articles()] == names
    assert rows(path, n_labels=len(classes)) == rows(path)  # which is a check only


def test_labels_are_stripped_and_one_in_every_spelling(tmp_path):
    path = labelled(tmp_path, "csv", [" yes", "no  ", "yes", "no"])
    assert open_source(DataConfig(path=path, **WHOLE), "labels").classes == ("no", "yes")
    path = labelled(tmp_path, "csv", ["1.0", "01", " 2", "+2"])
    assert [label for _, label in rows(path)] == [0, 0, 1, 1]
    path = labelled(tmp_path, "csv", ["1.000e+00", "2e+0", "1.", "20.0E-1"])  # as NumPy writes numbers
    assert [label for _, label in rows(path)] == [0, 1, 0, 1]
    path = labelled(tmp_path, "csv", ["True", "FALSE", "true", "False"])
    assert [label for _, label in rows(path)] == [1, 0, 1, 0]


def test_classes_that_are_much_alike_or_rare_are_noted(tmp_path):
    for first, second in (("Good", "good"), ("very good", "verygood"), ("cafe\u0301", "caf\u00e9"), ("\uff11", "1")):
        path = labelled(tmp_path, "csv", [first, second, "bad", "bad"])
        notes = " ".join(open_source(DataConfig(path=path, n_labels=3, **WHOLE), "labels").notes)
        alike = " and ".join(map(repr, sorted((first, second))))
        assert f"{alike} look alike: they differ in case, blanks or codes of letters only" in notes
        assert "2 of 3 classes have one article to learn from, such as " in notes


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["good", "", "bad", "good"], ["line 3", "label is missing", "data.label_column"]),
        (["good", "  ", "bad", "good"], ["line 3", "label is missing"]),
        (["1", "0", "1.5", "0"], ["line 4: label '1.5' is no class", "--task regress"]),
        ([".5", "0", "1", "0"], ["line 2: label '.5' is no class"]),
        (["1", "0", "nan", "0"], ["line 4: label 'nan' is no class"]),
        (["1", "0", "1.5e-3", "0"], ["line 4: label '1.5e-3' is no class"]),
        (["1", "0", "good", "0"], ["line 4: label 'good' is a word", "0, 1, good", "data.n_labels=3"]),
        (["good", "good", "good", "good"], ["all labels", "are good", "two classes or more"]),
    ],
)
def test_labels_that_make_no_classes_are_named_with_their_line(tmp_path, labels, said):
    message = failure("labels", path=labelled(tmp_path, "csv", labels), **WHOLE)
    assert all(words in message for words in said), message


@pytest.mark.parametrize(
    ("form", "labels", "said"),
    [
        ("jsonl", ["a", None, "b", "a"], "line 2: the label is missing"),
        ("jsonl", ["a", ["b"], "b", "a"], "line 2: the label is of type list"),
        ("jsonl", [1, float("nan"), 2, 1], "line 2: the label is missing"),
        ("jsonl", [1, 0.5, 2, 1], "line 2: label 0.5 is no class"),
        ("jsonl", [1, True, 2, 1], "line 2: label 'true' is a word"),
        ("parquet", [1.0, float("nan"), 2.0, 1.0], "row 2: the label is missing"),
        ("parquet", [1, None, 2, 1], "row 2: the label is missing"),
        ("parquet", [True, None, False, True], "row 2: the label is missing"),
    ],
)
def test_bad_label_is_found_in_every_format(tmp_path, form, labels, said):
    assert said in failure("labels", path=labelled(tmp_path, form, labels), **WHOLE)


def test_number_of_a_bad_label_counts_blank_lines(tmp_path):
    path = write(tmp_path / "a.csv", '\ntext,label\n"a\nb",1\nx,1\n"c\n\nd",0\ny,0\ne,9\n')
    message = failure("labels", path=path, n_labels=2, **WHOLE)
    assert "data.n_labels=2, but the labels make 3 classes, 0, 1, 9; correct" in message
    assert message.endswith(f"the rarest, 9, is first in {path}, line 10")


def test_column_of_texts_is_not_taken_for_that_of_labels(tmp_path):
    texts = [f"text {i}" for i in range(30)]
    path = labelled(tmp_path, "csv", texts, texts)
    message = failure("labels", path=path, **WHOLE)
    assert "30 labels make 30 or more classes" in message and "data.label_column" in message
    assert len(open_source(DataConfig(path=path, n_labels=30, **WHOLE), "labels").classes) == 30
    path = labelled(tmp_path, "csv", [f"{i % 15}" for i in range(30)], texts)
    assert len(open_source(DataConfig(path=path, **WHOLE), "labels").classes) == 15


@pytest.mark.parametrize("first", [("stars", "1", "0", "1"), ("mood", "good", "bad", "good", "bad")])
def test_name_of_a_column_is_no_class(tmp_path, first):
    path = write(tmp_path / "b.csv", "".join(f"t{i},{label}\n" for i, label in enumerate(first)))
    columns = {"text_column": "0", "label_column": "1"}
    message = failure("labels", path=path, **columns, **WHOLE)
    assert f"line 1: label {first[0]!r} is in no other row" in message and "data.header=yes" in message
    assert len(rows(path, header="yes", **columns)) == len(first) - 1
    n = len({*first})
    assert len(rows(path, header="no", n_labels=n, **columns)) == len(first)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_label_that_train_lacks_is_named_with_its_row(tmp_path, split):
    write(tmp_path / "train.tsv", "text\tlabel\none\tgood\ntwo\tbad\n")
    write(tmp_path / f"{split}.tsv", "text\tlabel\none\tbad\n\ntwo\tgoood\n")
    message = failure("labels", path=str(tmp_path), validation_fraction=0, test_fraction=0)
    assert f"{split}.tsv, line 4: label 'goood' is none of the classes bad, good; did you mean good?" in message


def test_label_that_only_a_part_split_off_has_is_named_with_its_row(tmp_path):
    config = DataConfig(path=str(tmp_path / "a.csv"), test_fraction=0)
    rare = next(f"text {i}" for i in range(100) if split_of(f"text {i}", config) == "validation")
    labelled(tmp_path, "csv", ["a", "b", "a", "c"], ["one", "two", "four", rare])
    assert "line 5: label 'c' is none of the classes a, b" in failure("labels", path=config.path, test_fraction=0)


def test_more_labels_where_n_labels_says_so(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\none\t2\n")
    assert rows(path, n_labels=3) == [("one", 2)]
    assert open_source(DataConfig(path=path, n_labels=3, **WHOLE), "labels").classes == ("0", "1", "2")


def test_numbers_of_classes_have_the_fingerprint_that_they_always_had(tmp_path):
    path = labelled(tmp_path, "csv", [0, 1, 0, 1])
    content = [["train", "csv", [0, 1, True], hashlib.sha256(Path(path).read_bytes()).hexdigest()]]
    settings = ["", "", True, 0, {"test": 0.0, "validation": 0.0}, content]
    expected = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    for given in ({}, {"n_labels": 2}, {"n_labels": 5}):
        source = open_source(DataConfig(path=path, **given, **WHOLE), "labels")
        assert source.fingerprint == expected
    # Ids of a token cache are those of the classes, so another order of them is other data.
    found = {
        open_source(DataConfig(path=path, **WHOLE), "labels", order).fingerprint for order in (["1", "0"], ["0", "1"])
    }
    assert len(found) == 2 and expected in found


# classes of a model, labels of a file, numbers of these
KNOWN: dict[str, tuple[list[str], list[Any], list[int]]] = {
    "the same words": (["b", "a"], ["a", "b", "a", "b"], [1, 0, 1, 0]),
    "some of the words": (["c", "b", "a"], ["a", "c", "a", "c"], [2, 0, 2, 0]),
    "another case": (["POSITIVE", "NEGATIVE"], ["positive", "negative", "positive", "negative"], [0, 1, 0, 1]),
    "their numbers": (["NEGATIVE", "POSITIVE"], [0, 1, 0, 1], [0, 1, 0, 1]),
    "another spelling of numbers": (["1.0", "02"], [1, 2.0, "01", 2], [0, 1, 0, 1]),
    "another spelling of words": (["True", " caf\u00e9"], ["TRUE", "Cafe\u0301", "true", "caf\u00e9"], [0, 1, 0, 1]),
    "true and false": (["0", "1"], [True, False, "TRUE", "false"], [1, 0, 1, 0]),
    "names that transformers makes up": (["0", "1"], ["LABEL_1", "LABEL_0", "LABEL_0", "LABEL_1"], [1, 0, 0, 1]),
    "such names of words": (["no", "yes"], ["LABEL_1", "LABEL_0", "LABEL_0", "LABEL_1"], [1, 0, 0, 1]),
    "other numbers": (["2", "1"], [1, 2, 1, 2], [1, 0, 1, 0]),
    "no names": (["0", "1", "2"], [0, 2, 0, 2], [0, 2, 0, 2]),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_labels_are_matched_with_the_classes_of_a_model(tmp_path, kind):
    classes, labels, ids = KNOWN[kind]
    path = labelled(tmp_path, "csv", labels)
    source = open_source(DataConfig(path=path, **WHOLE), "labels", classes)
    assert list(source.classes) == classes
    assert [article.label for article in source.articles()] == ids


@pytest.mark.parametrize(
    ("classes", "label"),
    [(["a", "b"], "c"), (["1", "2"], 0), (["NEGATIVE", "POSITIVE"], 2), (["0", "1"], "good"), (["a", "A"], "á")],
)
def test_label_that_a_model_does_not_know_is_named_with_its_row(tmp_path, classes, label):
    path = labelled(tmp_path, "jsonl", [label, label, label, label])
    with pytest.raises(UserError, match=f"line 1: label '{label}' is none of the classes {classes[0]}, {classes[1]}"):
        open_source(DataConfig(path=path, **WHOLE), "labels", classes)


def test_names_that_a_data_set_declares_are_its_classes(tmp_path):
    """A file in Parquet as `datasets` writes it, and the data set itself; both have numbers with names."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    table = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 0, 1]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    for settings in ({"path": str(tmp_path / "train.parquet")}, {"hub": str(tmp_path)}):
        source = open_source(DataConfig(**settings, **WHOLE), "labels")
        assert source.classes == ("pos", "neg")
        assert [article.label for article in source.articles()] == [1, 0, 0, 1]
        # A checkpoint of a version without names can resume.
        other = open_source(DataConfig(**settings, **WHOLE), "labels", ["0", "1"])
        assert other.fingerprint == source.fingerprint and other.classes == ("0", "1")
        assert list(other.articles()) == list(source.articles())


def glue(folder: Path, test: str) -> str:
    write(folder / "train.tsv", "sentence\tlabel\none\t1\ntwo\t0\n")
    write(folder / "dev.tsv", "sentence\tlabel\nthree\t1\n")
    write(folder / "test.tsv", test)
    return str(folder)


def test_hidden_test_labels_refuse_a_test_score(tmp_path):
    path = glue(tmp_path, "sentence\tlabel\nfour\t-1\nfive\t-1\n")
    source = open_source(DataConfig(path=path), "labels")
    assert source.test_refusal == (
        f"the test labels of {path}/test.tsv are hidden (-1): no test score; use --data.test-path with a labelled file"
    )
    assert [article for article in source.articles() if article.split == "test"] == [
        Article("test", "four", -1),
        Article("test", "five", -1),
    ]
    assert open_source(DataConfig(path=path, test_path="dev.tsv", validation_fraction=0.0), "labels").test_refusal == ""
    assert open_source(DataConfig(path=path), "text").test_refusal == ""
    source = open_source(DataConfig(path=glue(tmp_path, "index\tsentence\n0\tfour\n")), "labels")
    assert "test.tsv has no label column: no test score" in source.test_refusal


def test_some_hidden_labels_are_an_error(tmp_path):
    path = glue(tmp_path, "sentence\tlabel\nfour\t-1\nfive\t1\n")
    assert "test.tsv, line 2: label -1" in failure("labels", path=path)
    path = glue(tmp_path, "sentence\tlabel\nfour\t1\nfive\t-1\n")
    assert "test.tsv, line 3: label '-1'" in failure("labels", path=path)


# Files that cannot be used


def test_missing_file_has_a_hint(tmp_path):
    write(tmp_path / "corpus.txt", "one\n")
    assert "did you mean corpus.txt?" in failure(path=str(tmp_path / "corpsu.txt"))
    assert "folder does not exist" in failure(path=str(tmp_path / "no" / "a.txt"))
    message = failure(path=str(tmp_path / "corpus.txt"), test_path="tset.txt")
    assert message.startswith("data.test_path=tset.txt: no such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tmp_path):
    path = write(tmp_path / "a.txt", "one\n")
    Path(path).chmod(0)
    assert path in failure(path=path) and "permission" in failure(path=path).lower()


@pytest.mark.parametrize("content", ["", "\ufeff", "\n \n\t\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.txt.gz", "a.txt.xz"])
def test_empty_file(tmp_path, name, content):
    path = write(tmp_path / name, content)
    message = failure(path=path)
    assert path in message and ("is empty" in message or "no article" in message)


def test_table_without_rows(tmp_path):
    assert "no article" in failure(path=write(tmp_path / "a.csv", "text,label\n"))
    assert "no article" in failure(path=write_parquet(tmp_path / "a.parquet", text=[]))
    (tmp_path / "empty").mkdir()
    assert "nothing" in failure(path=str(tmp_path / "empty"))


@pytest.mark.parametrize("suffix", PACK)
def test_binary_file(tmp_path, suffix):
    path = write(tmp_path / f"a.txt{suffix}", b"some text\0and more")
    assert f"{path}: is binary" in failure(path=path)


@pytest.mark.parametrize("suffix", PACK)
def test_not_utf8_names_the_byte(tmp_path, suffix):
    path = write(tmp_path / f"a.txt{suffix}", "é".encode() + b"abc\nd\xe9f")
    assert f"{path}: is not UTF-8 at byte 7" in failure(path=path)
    # A character across the border of two blocks is fine; a wrong byte after it is found; so is a cut one at the end.
    long = b"a" * ((1 << 20) - 1) + "é".encode()
    assert len(texts(write(tmp_path / f"b.txt{suffix}", long))[0]) == 1 << 20
    assert f"at byte {(1 << 20) - 1} " in failure(path=write(tmp_path / f"c.txt{suffix}", long[:-1] + b"b"))
    assert f"at byte {(1 << 20) + 1}" in failure(path=write(tmp_path / f"d.txt{suffix}", long + b"\xff"))
    assert f"at byte {(1 << 20) - 1}" in failure(path=write(tmp_path / f"e.txt{suffix}", long[:-1]))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.xz", "a.tsv.gz", "a.jsonl.xz"])
def test_damaged_compression(tmp_path, name):
    path = tmp_path / name
    write(path, "text\tn\n" + "".join(f"line {i}\t{i * i}\n" for i in range(2000)))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:200] + b"\x55" * 50 + whole[250:], b"not compressed\n"):
        path.write_bytes(content)
        assert f"{path}: the compressed file is damaged" in failure(path=str(path))


def test_bad_json_names_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": "b"\n')
    assert f"{path}, line 3: not JSON" in failure(path=path)
    assert "line 1" in failure(path=write(tmp_path / "b.json", '[{"text": "a"}]\n'))
    assert "line 2" in failure(path=write(tmp_path / "c.json", '{"text": "a"}\n{"text": "\\ud800"}\n'))


def test_damaged_tables(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet", text=[f"row {i}" for i in range(3000)]))
    whole = path.read_bytes()
    for content in (b"not parquet at all", whole[: len(whole) // 2], whole[:500] + bytes(5000) + whole[5500:]):
        path.write_bytes(content)
        assert f"{path}: cannot be read as parquet" in failure(path=str(path))
    path = Path(write(tmp_path / "a.csv", 'text,label\n"never closed,1\nb,0\n'))
    assert f"{path}, line 2: a quote opens a cell that never ends" in failure(path=str(path))


def test_large_files_are_checked_as_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHECK_LIMIT", 10)
    write(tmp_path / "a.tsv", "text\tlabel\none\t1\ntwo\t7\n")
    write(tmp_path / "b.tsv", "text\tlabel\none\t1\ntwo\t8\n")
    config = DataConfig(path=str(tmp_path / "a.tsv"), validation_path="b.tsv", test_fraction=0)
    source = open_source(config, "labels")
    assert source.classes == ("1", "7")
    with pytest.raises(UserError, match="b.tsv, line 3: label '8'"):
        list(source.articles())


# What is too large


N_BLOCKS = 80  # of a million characters each, decompressed


def blocks(*, start: str = "", block: str = "a" * 1_000_000, n: int = N_BLOCKS, end: str = "") -> Iterator[bytes]:
    yield start.encode()
    for _ in range(n):
        yield block.encode()
    yield end.encode()


BOMBS: dict[str, tuple[str, dict, str]] = {
    "a line": ("a.txt.gz", {}, "a.txt.gz: has a line longer than 67,108,864 characters"),
    "a line in xz": ("a.txt.xz", {}, "a.txt.xz: has a line longer than 67,108,864 characters"),
    "a line behind others": ("a.md.gz", {"start": "one\ntwo\n"}, "a.md.gz: has a line longer"),
    "JSON": ("a.jsonl.gz", {"start": '{"text": "', "end": '"}\n'}, "a.jsonl.gz: has a line longer"),
    "a cell": ("a.csv.gz", {"start": 'text,label\n"', "end": '",1\n'}, "a.csv.gz: has a line longer"),
    "a cell of many lines": (
        "a.csv.gz",
        {"start": 'text,label\nb,1\n"', "block": ("a" * 99 + "\n") * 10_000, "end": '",1\n'},
        "a.csv.gz, line 3: the row is longer than 67,108,864 characters",
    ),
    "a header": (
        "a.csv.gz",
        {"start": "text", "block": ",a" * 500_000, "n": 20},
        "columns or more, but 10,000 can be read",
    ),
    "a row": (
        "a.csv.gz",
        {"start": "text,label\nb", "block": ",a" * 500_000, "n": 20},
        "a.csv.gz, line 2: the row has 10,000,001 columns, but the first one has 2",
    ),
    "an article": (
        "a.txt.gz",
        {"start": " = Title = \n", "block": ("a" * 99 + "\n") * 10_000},
        "the article at line 1 is longer than 67,108,864 characters",
    ),
    "keys": (
        "a.jsonl.gz",
        {"start": '{"text": "a"', "block": "".join(f',"{i:08}":0' for i in range(100_000)), "n": 40, "end": "}\n"},
        "a.jsonl.gz: has 100,001 columns or more, but 10,000 can be read",
    ),
    "nested JSON": ("a.jsonl", {"start": '{"text": ', "block": "[" * 1_000_000, "n": 1}, "line 1: nested too deeply"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_what_is_too_large_is_refused_in_bounded_memory(name, tmp_path):
    file, settings, message = BOMBS[name]
    opener = {".gz": partial(gzip.open, compresslevel=1), ".xz": partial(lzma.open, preset=0)}
    with opener.get(Path(file).suffix, open)(tmp_path / file, "wb") as out:
        out.writelines(blocks(**settings))
    text, peak = refused(tmp_path / file)
    assert message in text
    assert peak < 1.5e9


@pytest.mark.slow
def test_a_parquet_file_that_repeats_a_large_value_is_refused_in_bounded_memory(tmp_path):
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["a" * 70_000_000]))
    pyarrow.parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1e6
    text, peak = refused(tmp_path / "a.parquet")
    assert "row 1: the text is longer than 67,108,864 characters" in text
    assert peak < 3e9


def refused(path: Path) -> tuple[str, float]:
    """Return what a new process says of a file, and the bytes that it had at most."""
    code = f"""
from jaxlm.config import DataConfig
from jaxlm.data.sources import open_source
from jaxlm.errors import UserError
try:
    for _ in open_source(DataConfig(path={str(path)!r}), "text").articles():
        pass
except UserError as error:
    print(int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024, error)
"""
    peak, _, text = run(code).partition(" ")
    return text, float(peak)


# The hub


def hub_folder(folder: Path) -> str:
    write_parquet(folder / "train.parquet", sentence=["one", "two"], label=[1, 0], idx=[0, 1])
    write_parquet(folder / "test.parquet", sentence=["three"], label=[-1], idx=[0])
    return str(folder)


def test_hub_set_with_hidden_labels(tmp_path):
    hub = hub_folder(tmp_path / "set")
    source = open_source(DataConfig(hub=hub, **WHOLE), "labels")
    expected = [Article("train", "one", 1), Article("train", "two", 0), Article("test", "three", -1)]
    assert list(source.articles()) == list(source.articles()) == expected
    assert "are hidden (-1): no test score" in source.test_refusal
    assert source.description == f"{hub} (train, test)"
    assert any("no validation part" in note for note in source.notes)
    assert open_source(DataConfig(hub=hub, **WHOLE), "labels").fingerprint == source.fingerprint
    test = write(tmp_path / "mine.tsv", "text\tlabel\nfour\t1\n")
    source = open_source(DataConfig(hub=hub, test_path=test, **WHOLE), "labels")
    assert source.test_refusal == "" and list(source.articles())[-1] == Article("test", "four", 1)
    assert "data.text_column=nothing: no such column" in failure("labels", hub=hub, text_column="nothing")
    write_parquet(tmp_path / "set" / "train.parquet", sentence=["one", "two"], label=[1, 5], idx=[0, 1])
    message = failure("labels", hub=hub, n_labels=3)
    assert "data.n_labels=3, but the labels make 2 classes, 1, 5" in message and f"{hub}, train, row 1" in message


def test_hub_wikitext_is_grouped(tmp_path):
    lines = ["", " = One = \n", " Text . \n", " = = Part = = \n", " = Two = \n", " End . \n"]
    write_parquet(tmp_path / "wikitext-tiny" / "train.parquet", text=lines)
    found = articles(hub=str(tmp_path / "wikitext-tiny"), **WHOLE)
    assert [article.text for article in found] == [" = One = \n Text . \n = = Part = = ", " = Two = \n End . "]


def test_hub_errors_are_one_line(tmp_path):
    hub = hub_folder(tmp_path / "set")
    assert "no_such_config" in failure(hub=hub, hub_config="no_such_config")
    write_parquet(tmp_path / "other" / "test.parquet", text=["one"])
    assert "no train part, only test" in failure(hub=str(tmp_path / "other"))


def run(code: str, **environment: str) -> str:
    """Return what a new process prints: the library reads its settings when it is imported."""
    settings = os.environ | environment
    root = str(Path(sources.__file__).parents[2])
    return subprocess.run([sys.executable, "-c", code], env=settings, cwd=root, capture_output=True, text=True).stdout


OPEN = """
import sys
from jaxlm.config import DataConfig
from jaxlm.data.sources import open_source
from jaxlm.errors import UserError
try:
    print(list(open_source(DataConfig(hub="some-group/some-set", hub_config={config!r}), "text").articles()))
except UserError as error:
    print(error)
print([name for name in ("jax", "torch") if name in sys.modules])
"""


def test_shards_of_a_split_are_read_together(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        write_parquet(tmp_path / f"{name}.parquet", text=[f"row of {name}"])
    found = articles(path=str(tmp_path), test_fraction=0.0)
    assert [(article.split, article.text) for article in found] == [
        ("train", "row of train-00000-of-00002"),
        ("train", "row of train-00001-of-00002"),
        ("validation", "row of validation-00000-of-00001"),
    ]


def test_unreachable_hub_is_one_line(tmp_path):
    # A port of this machine that nothing listens on.
    out = run(OPEN.format(config="c"), HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert out.startswith("data.hub=some-group/some-set c: the hub cannot be reached (")
    assert out.endswith("use a local file with --data.path FILE\n[]\n") and len(out.splitlines()) == 2


def test_cached_hub_set_is_used_when_the_hub_cannot_be_reached(tmp_path):
    datasets = hub.library()
    write_parquet(tmp_path / "set" / "train.parquet", text=["kept"])
    data = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "made"))
    made = Path(data["train"].cache_files[0]["filename"]).parent
    name = "some-group___some-set"
    home = tmp_path / "home" / "datasets" / name / "default" / "0.0.0" / made.name
    shutil.copytree(made, home)
    for file in home.iterdir():
        file.rename(home / re.sub(r"^.*-train", "some-set-train", file.name))
    info = json.loads((home / "dataset_info.json").read_text())
    (home / "dataset_info.json").write_text(json.dumps(info | {"config_name": "default", "dataset_name": "some-set"}))
    out = run(OPEN.format(config=""), HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert out == "[Article(split='train', text='kept', label=-1)]\n[]\n", out
