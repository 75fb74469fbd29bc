"""Two texts with a label: the files that publishers of GLUE's tasks give away, and samples against `tokenizers`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxlm import config as configs
from jaxlm.config import DataConfig
from jaxlm.data import metrics
from jaxlm.data.cache import Split
from jaxlm.data.samples import ClassifiedSamples, ValuedSamples
from jaxlm.data.sources import Reads, open_source
from jaxlm.errors import UserError

BERT = {"pad": 0, "unknown": 1, "start": 2, "end": 3, "mask": 4}


# Files


def found(path: Path, reads: Reads = "labels", **settings: Any) -> tuple[dict[str, list[Any]], Any]:
    """Return (first text, second text, label) of each row, by split, and the source."""
    config = DataConfig(path=str(path), pair_column="auto", test_fraction=0.0, validation_fraction=0.0, **settings)
    source = open_source(config, reads)
    articles = list(source.articles())
    rows: dict[str, list[Any]] = {}
    for a, b in zip(articles[::2], articles[1::2], strict=True):
        assert (a.split, a.label) == (b.split, b.label) or math.isnan(a.label)
        rows.setdefault(a.split, []).append((a.text, b.text, a.label))
    return rows, source


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name.replace("__", ".").replace("9", "-")).write_text(text, encoding="utf-8")
    return folder


def test_mrpc_has_a_byte_order_mark_and_quotes_that_are_text(tmp_path: Path) -> None:
    head = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    train = '1\t70\t71\t"The bar\tThe "bar" is full.\n0\t72\t73\tOne.\t"Two\n'
    write(tmp_path, msr_paraphrase_train__txt=head + train, msr_paraphrase_test__txt=head + "1\t1\t2\tA\tB\n")
    rows, source = found(tmp_path)
    assert rows["train"] == [('"The bar', 'The "bar" is full.', 1), ("One.", '"Two', 0)]
    assert rows["test"] == [("A", "B", 1)] and source.classes == ("0", "1")


def test_stsb_is_a_csv_file_of_tabs_whose_rows_may_have_further_columns(tmp_path: Path) -> None:
    begin = "main-news\tMSRvid\t2012test\t0001\t"
    train = f'{begin}5.000\tA plane.\tAn "air plane.\n{begin}3.8\tOne, two.\tTwo.\tPDF\thttp://x\n'
    files = {name: train for name in ("sts9train__csv", "sts9dev__csv", "sts9test__csv")}
    rows, source = found(write(tmp_path, **files), "values")
    assert rows["train"] == [("A plane.", 'An "air plane.', 5.0), ("One, two.", "Two.", 3.8)]
    assert rows["validation"] == rows["test"] == rows["train"]
    assert source.has_values and not source.classes and not source.test_refusal


def test_mnli_has_two_validation_parts_and_many_columns(tmp_path: Path) -> None:
    head = "index\tpromptID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    row = "0\t1\t(S)\tA man.\tA person.\tneutral\t"
    dev = {
        f"dev_{kind}__tsv": f"{head}{row}{label}\n" for kind, label in (("matched", "neutral"), ("mismatched", "no"))
    }
    write(tmp_path, train__tsv=f"{head}{row}neutral\n{row}no\n", test_matched__tsv=head + row + "\n", **dev)
    rows, source = found(tmp_path)
    assert source.classes == ("neutral", "no")
    assert rows["validation"] == [("A man.", "A person.", 0)] and rows["test"] == [("A man.", "A person.", 1)]
    assert "not used, as the name says no part: test_matched.tsv" in source.notes


def test_wnli_has_a_part_of_train_as_val_beside_dev(tmp_path: Path) -> None:
    head, row = "index\tsentence1\tsentence2\tlabel\n", "0\tIt is short.\tJohn is.\t"
    train = f"{head}{row}1\n{row}0\n"
    rows, source = found(write(tmp_path, train__tsv=train, dev__tsv=train, val__tsv=f"{row}1\n"))
    assert len(rows["train"]) == len(rows["validation"]) == 2
    assert "not used beside dev: val.tsv" in source.notes


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        (("question1", "question2", "is_duplicate"), "1"),
        (("question", "sentence", "label"), "entailment"),
        (("premise", "hypothesis", "label"), "neutral"),
        (("text_a", "text_b", "labels"), "x"),
    ],
)
@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_usual_names_of_columns_are_known(tmp_path: Path, columns: tuple[str, ...], label: str, kind: str) -> None:
    values = [("a b", "c d", label), ("e", "f", f"{label}2")]
    if kind == "tsv":
        text = "\n".join("\t".join(row) for row in (columns, *values)) + "\n"
        (tmp_path / "a.tsv").write_text(text)
    elif kind == "jsonl":
        text = "\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in values)
        (tmp_path / "a.jsonl").write_text(text)
    else:
        import pyarrow as pa
        import pyarrow.parquet

        table = {name: list(column) for name, column in zip(columns, zip(*values, strict=True), strict=True)}
        pyarrow.parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    rows, _ = found(tmp_path / f"a.{kind}")
    assert rows["train"] == [("a b", "c d", 0), ("e", "f", 1)]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["a\tb\tgood", "a\tb\t1"], "line 2: the label 'good' is not a finite number"),
        (["a\tb\t", "a\tb\t1"], "line 2: the label is missing"),
        (["a\tb\t1", "a\tb\tnan"], "line 3: the label 'nan' is not a finite number"),
    ],
)
def test_what_is_no_number_is_named_with_its_line(tmp_path: Path, lines: list[str], said: str) -> None:
    (tmp_path / "a.tsv").write_text("\n".join(["text1\ttext2\tscore", *lines]) + "\n")
    with pytest.raises(UserError, match=said):
        found(tmp_path / "a.tsv", "values")


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence1\tlabel\na\t1\nb\t0\n")
    with pytest.raises(
        UserError, match=r"no column has a usual name; set data\.pair_column; there are sentence1, label"
    ):
        found(tmp_path / "a.tsv")


# Samples


def split_of(sizes: list[int], labels: list[float], dtype: type) -> Split:
    tokens, offsets = np.arange(5, 5 + sum(sizes), dtype=np.uint16), np.cumsum([0, *sizes])
    return Split(tokens, offsets, np.repeat(np.array(labels, dtype), 2), np.array(sizes, np.int64))


SIZES = [(3, 4), (0, 5), (9, 2), (2, 9), (9, 9), (8, 9), (9, 8), (1, 20), (20, 1), (6, 7), (0, 0)]


@pytest.mark.parametrize("seq_len", [8, 9, 16])
@pytest.mark.parametrize(("pair", "n_marks"), [("w2 $A w3 $B:1 w3:1", 3), ("w2 $A w3 w3 $B w3", 4)])  # BERT, RoBERTa
def test_two_texts_are_cut_as_tokenizers_cuts_them(pair: str, n_marks: int, seq_len: int) -> None:
    words = {f"w{i}": i for i in range(300)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = [("w2", 2), ("w3", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("w2 $A w3", pair, specials)
    tokenizer.enable_truncation(seq_len, strategy="longest_first")
    tokenizer.enable_padding(length=seq_len, pad_id=0, pad_token="w0")
    has_types = n_marks == 3
    settings = {"data.pair_column": "auto", "model.seq_len": seq_len, "model.segments": 2 if has_types else 1}
    split = split_of([n for sizes in SIZES for n in sizes], [1] * len(SIZES), np.int32)
    roles = BERT if has_types else BERT | {"separator": 3}
    samples = ClassifiedSamples(split, configs.build(settings), roles, 300)
    batch = samples.batch(np.arange(len(SIZES)), np.zeros(len(SIZES), int))
    for i in range(len(SIZES)):
        parts = [split.tokens[split.offsets[k] : split.offsets[k + 1]] for k in (2 * i, 2 * i + 1)]
        expected = tokenizer.encode(*(" ".join(f"w{j}" for j in part) for part in parts))
        assert batch["tokens"][i].tolist() == expected.ids
        assert ("types" in batch) == has_types
        if has_types:
            assert batch["types"][i].tolist() == expected.type_ids
        assert samples.lengths(np.array([i])) == sum(expected.attention_mask)
    assert samples.n_cut == sum(a + b > seq_len - n_marks for a, b in SIZES)


def test_a_causal_model_reads_the_last_of_two_texts() -> None:
    config = configs.build({"data.pair_column": "1", "model.seq_len": 8, "model.pooling": "last", "model.pad_id": -1})
    samples = ValuedSamples(split_of([2, 1, 4, 4], [0.5, -2], np.float32), config, {"article": 9}, 100)
    batch = samples.batch(np.arange(2), np.zeros(2, int))
    assert batch["tokens"].tolist() == [[9, 5, 6, 9, 7, 9, 9, 9], [9, 8, 9, 9, 12, 13, 14, 9]]
    assert batch["last"].tolist() == [5, 7] and batch["labels"].tolist() == [0.5, -2] and "types" not in batch


# Scores


def test_correlations_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 6, 200) / 2
    values = np.stack([labels, labels + random.normal(size=200).round(1)], axis=1)
    assert metrics.pearson(values) == pytest.approx(scipy.stats.pearsonr(*values.T).statistic, abs=1e-12)
    assert metrics.spearman(values) == pytest.approx(scipy.stats.spearmanr(*values.T).statistic, abs=1e-12)
    assert metrics.pearson(values * [0, 1]) == metrics.spearman(values * [1, 0]) == 0.0


def test_rows_of_values_are_joined_and_sums_are_added() -> None:
    sums: dict[str, Any] = {}
    for values in ([[1.0, 2.0]], [[3.0, 4.0], [math.nan, 5.0]]):
        metrics.add(sums, {"loss": np.float32(1.5), "values": np.array(values)})
    assert sums["loss"] == 3.0
    assert metrics.counted(sums["values"]).tolist() == [[1.0, 2.0], [3.0, 4.0]]


# Lengths


@pytest.mark.parametrize(
    ("settings", "expected", "said"),
    [
        ([], 24, True),
        (["--model.seq-len", "40"], 40, False),
        pytest.param(["--model.positions", "learned"], 24, True, marks=pytest.mark.slow),
        # That of the preset: rows hold several texts.
        pytest.param(["--data.pack", "documents"], 32, False, marks=pytest.mark.slow),
    ],
)
def test_the_length_of_samples_is_taken_from_the_data_unless_it_is_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], expected: int, said: bool
) -> None:
    from jaxlm import train

    # Of 100 texts, 95 have 17 to 20 words; with marks, of 19 to 22 tokens.
    texts = ["word " * (200 if i % 20 == 0 else 17 + i % 4) for i in range(100)]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{text}{i}\t{i % 2}\n" for i, text in enumerate(texts)))
    sizes = "--model.d-model 8 --model.n-heads 2 --model.n-layers 1 --train.max-steps 1 --train.batch-size 4".split()
    data = ["--data.path", str(tmp_path / "a.tsv"), "--data.cache-dir", str(tmp_path / "cache"), "--data.header", "yes"]
    split = ["--data.test-fraction", "0"]
    run = ["--run.dir", str(tmp_path / "run")]
    tokens = ["--tokenizer.vocab-size", "400"]
    assert train.main(["--task", "sst2", *data, *split, *sizes, *tokens, *run, *settings]) == 0
    out = capsys.readouterr().out
    assert f"of {expected} tokens, vocabulary" in out
    assert (f"note: model.seq_len={expected}, from the data: 95% of the samples of train are not longer" in out) == said
    assert f"seq_len = {expected}\n" in (tmp_path / "run" / "config.toml").read_text()
