"""Each line on bad input names what helps: following it, as a user would, leads to data that can be trained on."""

import contextlib
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxlm import config as configs
from jaxlm.config import DataConfig
from jaxlm.data import embedded, prepare
from jaxlm.data.samples import CausalSamples, ClassifiedSamples, MaskedSamples, PairSamples
from jaxlm.data.sources import split_of
from jaxlm.errors import UserError

LINES = [f"line {i} says that the cat number {i * i % 101} sat on mat {i % 13}" for i in range(200)]
TEXT = "\n".join(LINES) + "\n"
TABLE = "text,label\n" + "".join(f"{line},{i % 2}\n" for i, line in enumerate(LINES))
PAIRS = "".join(json.dumps({"prompt": line, "answer": "the cat"}) + "\n" for line in LINES)
SAMPLES = {"mlm": MaskedSamples, "gpt": CausalSamples, "sst2": ClassifiedSamples, "pairs": PairSamples}
Change = Callable[[Path], Any]  # of the folder that the files are in; may return settings


@dataclass
class Case:
    files: dict[str, str | bytes]  # by name; data.path is the first
    message: str  # a pattern that is in what is said
    mend: dict[str, Any] | Change  # settings, in which {} is the folder, or a change of files
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = "mlm"
    then: "tuple[str, dict[str, Any] | Change] | None" = None  # a second message, and its mend


def edit(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def rename(old: str, new: str) -> Change:
    def change(folder: Path) -> dict[str, Any]:
        (folder / old).rename(folder / new)
        return {"data.path": str(folder / new)}

    return change


def with_validation(folder: Path) -> dict[str, Any]:
    (folder / "own.txt").write_text(TEXT)
    return {"data.validation_path": str(folder / "own.txt")}


def with_validation_alone(folder: Path) -> dict[str, Any]:
    return with_validation(folder) | {"data.test_fraction": 0.0}


def parquet(names: list[str]) -> Change:
    def change(folder: Path) -> None:
        columns = [pa.array(LINES), pa.array([i % 2 for i in range(len(LINES))]), pa.array(LINES)]
        table = pa.table(dict(zip("abc", columns, strict=True))).rename_columns(names)
        pyarrow.parquet.write_table(table, folder / "a.parquet")

    return change


def as_lines(data: bytes) -> bytes:
    """What jq -c '.[]' makes of an array, and jq -c . of an object that is spread over lines."""
    value = json.loads(data)
    return "".join(json.dumps(row) + "\n" for row in (value if isinstance(value, list) else [value])).encode()


def one(split: str) -> str:
    """Return a document that falls into a split."""
    return next(text for text in (line * 9 for line in LINES) if split_of(text, DataConfig()) == split)


OBJECTS = [{"text": line, "label": i % 2} for i, line in enumerate(LINES)]
CASES: dict[str, Case] = {
    # Encodings
    "latin-1": Case(
        {"a.txt": TEXT.replace("cat", "ch\xe4t").encode("latin-1")},
        "is not UTF-8 at byte 23 .*iconv -f LATIN1 -t UTF-8 OLD > NEW",
        edit("a.txt", lambda data: data.decode("latin-1").encode()),
    ),
    "UTF-16": Case(
        {"a.txt": TEXT.encode("utf-16")},
        "is UTF-16, not UTF-8; convert it, as with iconv -f UTF-16 ",
        edit("a.txt", lambda data: data.decode("utf-16").encode()),
    ),
    "UTF-16 without a mark": Case(
        {"a.txt": TEXT.encode("utf-16-le")},
        "is binary, or text in UTF-16; .*iconv -f UTF-16LE ",
        edit("a.txt", lambda data: data.decode("utf-16-le").encode()),
    ),
    # Files
    "no such file": Case({"a.txt": TEXT}, "did you mean a.txt", {"data.path": "{}/a.txt"}, {"data.path": "{}/b.txt"}),
    "no such folder": Case(
        {"a.txt": TEXT}, "its folder does not exist", {"data.path": "{}/a.txt"}, {"data.path": "{}/c/a.txt"}
    ),
    "an empty file": Case({"a.txt": ""}, "is empty; give a file with text", edit("a.txt", lambda _: TEXT.encode())),
    "blank lines": Case(
        {"a.txt": "\n \n"}, "no article in it; give a file with text", edit("a.txt", lambda _: TEXT.encode())
    ),
    "not compressed": Case(
        {"a.txt.gz": b"" + TEXT.encode()}, "rename it if it is not compressed", rename("a.txt.gz", "a.txt")
    ),
    "damaged compression": Case(
        {"a.txt.gz": gzip.compress(TEXT.encode())[:-9]},
        "compress it again",
        edit("a.txt.gz", lambda _: gzip.compress(TEXT.encode())),
    ),
    "a folder for a split": Case(
        {"a.txt": TEXT, "d/b.txt": TEXT},
        "is a folder; name a file in it",
        {"data.validation_path": "{}/d/b.txt"},
        {"data.validation_path": "{}/d"},
    ),
    "one file for two splits": Case(
        {"a.txt": TEXT, "b.txt": TEXT},
        "are both .*; leave one of them out",
        {"data.test_path": ""},
        {"data.validation_path": "b.txt", "data.test_path": "b.txt"},
    ),
    "no file to train on": Case(
        {"d/valid.txt": TEXT, "d/test.txt": TEXT},
        "name a file, such as --data.path .*/d/valid.txt, and other files as data.validation_path and data.test_path",
        {"data.path": "{}/d/valid.txt", "data.validation_path": "{}/d/test.txt"},
        {"data.path": "{}/d"},
    ),
    "two files of a split": Case(
        {"d/dev.txt": TEXT, "d/valid.txt": TEXT, "d/train.txt": TEXT},
        "dev.txt and valid.txt are each the validation part; move all but one elsewhere",
        lambda folder: (folder / "d" / "dev.txt").unlink(),
        {"data.path": "{}/d"},
    ),
    "a folder of other things": Case(
        {"d/a.png": b"\x89PNG\r\n\x1a\n\0", "a.txt": TEXT},
        "name a folder or file with text",
        {"data.path": "{}/a.txt"},
        {"data.path": "{}/d"},
    ),
    "a folder of folders": Case(
        {"d/sub/a.txt": TEXT},
        "no file of text in it, only sub; name a folder",
        {"data.path": "{}/d/sub"},
        {"data.path": "{}/d"},
    ),
    # Tables
    "text has no labels": Case(
        {"a.txt": TEXT, "b.csv": TABLE}, "give a table .* with a label column", {"data.path": "{}/b.csv"}, task="sst2"
    ),
    "unusual names": Case(
        {"a.csv": TABLE.replace("text,label", "body,stars")},
        "set data.text_column; there are 0 .body., 1 .stars.",
        {"data.text_column": "body"},
        task="sst2",
        then=("set data.label_column; there are body, stars", {"data.label_column": "stars"}),
    ),
    "unusual names by number": Case(
        {"a.csv": TABLE.replace("text,label", "body,stars")},
        "set data.text_column; there are 0 .body., 1 .stars.",
        {"data.text_column": "0", "data.label_column": "1"},
        task="sst2",
        then=("data.header=yes", {"data.header": "yes"}),
    ),
    "a wrong name": Case(
        {"a.csv": TABLE}, "did you mean text", {"data.text_column": "text"}, {"data.text_column": "txt"}
    ),
    "a name like none": Case(
        {"a.jsonl": "".join(json.dumps(row) + "\n" for row in OBJECTS)},
        "set data.text_column to one of them; there are text, label",
        {"data.text_column": "text"},
        {"data.text_column": "zzz"},
    ),
    "a column of numbers": Case(
        {"a.jsonl": "".join(json.dumps({"text": i, "body": row["text"]}) + "\n" for i, row in enumerate(OBJECTS))},
        "the text is of type int, not a string; set data.text_column",
        {"data.text_column": "body"},
    ),
    "columns of one name in CSV": Case(
        {"a.csv": TABLE.replace("text,label", "text,text").replace(",1\n", ",one\n")},
        "set data.text_column to the number of one",
        {"data.text_column": "0"},
    ),
    "columns of one name in Parquet": Case(
        {"a.parquet": b""},
        "set data.text_column to the number of one",
        {"data.text_column": "2"},
        {"": parquet(["text", "label", "text"])},
        "sst2",
    ),
    "names that differ in case": Case(
        {"a.parquet": b""},
        "set data.text_column to the number of one",
        {"data.text_column": "2"},
        {"": parquet(["Text", "label", "text"])},
        "sst2",
    ),
    "a key twice": Case(
        {"a.jsonl": '{"text": "a", "text": "b"}\n' + "".join(json.dumps(row) + "\n" for row in OBJECTS)},
        "line 1: the object has 'text' more than once; keep one of them",
        edit("a.jsonl", lambda data: data.replace(b'"text": "a", ', b"")),
    ),
    "names that differ in blanks": Case(
        {"a.csv": TABLE.replace("text,label", "text,label,label ").replace("\n", ",\n").replace(" ,\n", " \n")},
        "columns 1 .label. and 2 .label . have the same name; set data.label_column to the number of one",
        {"data.label_column": "1"},
        task="sst2",
    ),
    "a name with a blank": Case(
        {"a.csv": TABLE.replace("text,label", "text, stars")},
        "set data.label_column; there are text,  stars",
        {"data.label_column": "stars"},
        task="sst2",
    ),
    "Excel's first line": Case(
        {"a.csv": "sep=;\n" + TABLE.replace(",", ";")},
        "line 1: sep=; is for Excel alone; remove this line",
        edit("a.csv", lambda data: data.partition(b"\n")[2]),
        task="sst2",
    ),
    "a line above the table": Case(
        {"a.csv": "# exported\n" + TABLE},
        "there is 0 .# exported. alone: the first line has to be a row",
        edit("a.csv", lambda data: data.partition(b"\n")[2]),
        task="sst2",
    ),
    "another delimiter": Case(
        {"a.csv": TABLE.replace(",", "^")},
        "there is 0 .text.label. alone: the first line has to be a row, its columns separated by , ; . or a tab",
        edit("a.csv", lambda data: data.replace(b"^", b"|")),
        task="sst2",
    ),
    "lines that are no JSON": Case(
        {"a.jsonl": TEXT}, "or set data.format=text to read lines as they are", {"data.format": "text"}
    ),
    "a long number": Case(
        {"a.jsonl": '{"text": "a", "n": ' + "9" * 5000 + "}\n" + "".join(json.dumps(row) + "\n" for row in OBJECTS)},
        "line 1: has a number of more than 4,300 digits; shorten it, or put it in quotes",
        edit("a.jsonl", lambda data: re.sub(rb"9{5000}", lambda match: b'"' + match[0] + b'"', data)),
    ),
    "a comma in a cell": Case(
        {"a.csv": TABLE.replace("line 7 says", "line 7, says")},
        "line 9: the row has 3 columns, but the first one has 2; put a cell with , in it into quotes",
        edit("a.csv", lambda data: re.sub(rb"line 7,[^,\n]*", lambda match: b'"' + match[0] + b'"', data)),
        task="sst2",
    ),
    "a tab in a cell": Case(
        {"a.tsv": TABLE.replace(",", "\t").replace("line 7 says", "line 7\tsays")},
        "line 9: .* take the tab out of a cell",
        edit("a.tsv", lambda data: data.replace(b"line 7\tsays", b"line 7 says")),
        task="sst2",
    ),
    "an open quote": Case(
        {"a.csv": TABLE.replace("line 7 says", '"line 7 says')},
        "line 9: a quote opens a cell that never ends; close it",
        edit("a.csv", lambda data: data.replace(b"\nline 8", b"\nline 8").replace(b'"line 7 says', b"line 7 says")),
        task="sst2",
    ),
    "JSON that is an array": Case(
        {"a.json": json.dumps(OBJECTS)},
        r"is not a JSON object; write one a line, as with jq -c '\.\[\]' OLD > NEW",
        edit("a.json", as_lines),
    ),
    "JSON over several lines": Case(
        {"a.json": json.dumps({"text": TEXT * 3}, indent=1)},
        "line 1: not JSON: .*write one object a line, as with jq -c . OLD > NEW",
        edit("a.json", as_lines),
        {
            "data.validation_path": "own.txt",
            "data.test_fraction": 0.0,
            "": lambda folder: with_validation(folder) and None,
        },
    ),
    "half of a surrogate pair": Case(
        {"a.jsonl": '{"text": "a \\ud83d b"}\n' + "".join(json.dumps(row) + "\n" for row in OBJECTS)},
        r"line 1: \\ud83d is half of a surrogate pair, not a character; write both halves, or leave it out",
        edit("a.jsonl", lambda data: data.replace(b"\\ud83d", b"\\ud83d\\ude00")),
    ),
    "a key that is not there": Case(
        {"a.jsonl": "".join(json.dumps(row) + "\n" for row in OBJECTS) + '{"txt": "a"}\n'},
        "line 201: the object has no 'text'; add it",
        edit("a.jsonl", lambda data: data.replace(b"txt", b"text")),
    ),
    "an empty answer": Case(
        {"a.jsonl": PAIRS + '{"prompt": "a", "answer": " "}\n'},
        "the answer is empty; write one, or leave the row out",
        edit("a.jsonl", lambda data: data.rpartition(b'{"prompt"')[0]),
        task="pairs",
    ),
    # Sizes
    "one document, to train on": Case(
        {"a.txt": one("train")},
        "these are too few: put some of the text into a file of its own, and name it with data.validation_path",
        with_validation,
        {"data.documents": "line"},
    ),
    "one document, to test on": Case(
        {"a.txt": one("test")},
        "all fall into other parts by hash; name other text with data.validation_path and set data.test_fraction=0",
        with_validation_alone,
        {"data.documents": "line"},
    ),
    "a few documents": Case(
        {"a.txt": "\n".join([line for line in LINES if split_of(line, DataConfig()) == "train"][:4])},
        "these are too few: put some of the text into a file of its own, and name it with data.validation_path",
        with_validation,
        {"train.batch_size": 1},
    ),
    "no share for validation": Case(
        {"a.txt": TEXT},
        "set data.validation_fraction to 0.1 or so",
        {"data.validation_fraction": 0.1},
        {"data.validation_fraction": 0.0},
    ),
    "a large batch": Case(
        {"a.txt": TEXT},
        r"set train.batch_size to (\d+) or less$",
        {"train.batch_size": r"\1"},
        {"train.batch_size": 5000},
    ),
    "many batches for an update": Case(
        {"a.txt": TEXT},
        r"set train.batch_size to (\d+) or less and train.accumulate to (\d+)$",
        {"train.batch_size": r"\1", "train.accumulate": r"\2"},
        {"train.accumulate": 5000},
    ),
    "pairs that are too long": Case(
        {"a.jsonl": PAIRS},
        r"all pairs are longer: raise model.seq_len to (\d+) or more",
        {"model.seq_len": r"\1"},
        {"model.seq_len": 8, "train.batch_size": 1},
        "pairs",
    ),
    "one column for two settings": Case(
        {"a.csv": TABLE},
        "data.text_column and data.label_column are both column text; set each to its own; there are text, label",
        {"data.label_column": "label"},
        {"data.label_column": "text"},
        "sst2",
    ),
    "one file for two parts": Case(
        {"a.txt": TEXT},
        "data.path and data.validation_path are both .*a.txt; leave out the second",
        {"data.validation_path": ""},
        {"data.validation_path": "{}/a.txt"},
    ),
    # Tokenizers
    "a vocabulary without words": Case(
        {"a.txt": TEXT, "vocab.txt": "[PAD]\nthe\n"},
        "no .UNK. among its 2 lines; give the vocab.txt of a WordPiece tokenizer",
        edit("vocab.txt", lambda data: data + b"[UNK]\n[CLS]\n[SEP]\n[MASK]\n"),
        {"tokenizer.path": "{}/vocab.txt"},
    ),
    "BPE for mlm": Case(
        {"a.txt": TEXT}, "set tokenizer.kind=wordpiece", {"tokenizer.kind": "wordpiece"}, {"tokenizer.kind": "bpe"}
    ),
    "WordPiece for gpt": Case(
        {"a.txt": TEXT}, "set tokenizer.kind=bpe", {"tokenizer.kind": "bpe"}, {"tokenizer.kind": "wordpiece"}, "gpt"
    ),
    "another pad": Case({"a.txt": TEXT}, r"use --model.pad-id (\d+)", {"model.pad_id": r"\1"}, {"model.pad_id": 3}),
    "a small table": Case(
        {"a.txt": TEXT}, "set it to 0 to take the tokenizer's", {"model.vocab_size": 0}, {"model.vocab_size": 100}
    ),
    "no place for the cache": Case(
        {"a.txt": TEXT, "c": "a file"},
        "choose another folder with --data.cache-dir",
        {"data.cache_dir": "{}/other"},
        {"data.cache_dir": "{}/c"},
    ),
}


@contextlib.contextmanager
def no_progress(title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def prepared(folder: Path, task: str, settings: dict[str, Any]) -> prepare.Data:
    values = {"task": task, "data.cache_dir": str(folder / "cache"), "tokenizer.vocab_size": 300, "model.seq_len": 64}
    values |= {"train.batch_size": 1, "tokenizer.kind": "bpe" if task in ("gpt", "pairs") else "wordpiece"}
    values |= {"model.pad_id": -1} if task in ("gpt", "pairs") else {}
    values |= {name: x.replace("{}", str(folder)) if isinstance(x, str) else x for name, x in settings.items()}
    config = configs.build(values)
    return prepare.prepare(config, SAMPLES[task], lambda: embedded.python_reference(config.data), no_progress)[1]


@pytest.mark.parametrize("name", CASES)
def test_following_the_mend_leads_on(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    for file, content in case.files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = {"data.path": str(tmp_path / next(iter(case.files)))} | case.settings
    if make := settings.pop("", None):
        make(tmp_path)
    for message, mend in [(case.message, case.mend), *([case.then] if case.then else [])]:
        with pytest.raises(UserError) as caught:
            prepared(tmp_path, case.task, settings)
        match = re.search(message, str(caught.value))
        assert match, str(caught.value)
        for key, value in ((mend(tmp_path) or {}) if callable(mend) else mend).items():
            number = match.expand(value) if isinstance(value, str) and value.startswith("\\") else value
            settings[key] = int(number) if number is not value else value
    data = prepared(tmp_path, case.task, settings)
    assert len(data.samples["train"]) and len(data.samples["validation"])
