"""From settings to samples: what fits together, and one line for each thing that does not."""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import Config, TrainConfig
from jaxlm.data import embedded, loader, prepare, sources
from jaxlm.data.samples import CausalSamples, ClassifiedSamples, MaskedSamples, Samples
from jaxlm.errors import UserError

LINES = [f"line {i} says that the cat number {i * i % 101} sat on mat {i % 13}" for i in range(400)]
TABLE = "sentence\tlabel\n" + "".join(f"{line}\t{i % 2}\n" for i, line in enumerate(LINES))
CLASS_OF_TASK = {"mlm": MaskedSamples, "gpt": CausalSamples, "sst2": ClassifiedSamples}


@contextlib.contextmanager
def no_progress(title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "text.txt").write_text("\n".join(LINES))
    (folder / "table.tsv").write_text(TABLE)
    return folder


def prepared(folder: Path, task: str = "mlm", progress=no_progress, **settings) -> tuple[Config, prepare.Data]:
    """Return what `prepare` makes of a file in `folder`; settings are given as section__name=value."""
    values = {"task": task, "data.path": str(folder / ("table.tsv" if task == "sst2" else "text.txt"))}
    values |= {"data.cache_dir": str(folder / "cache"), "tokenizer.vocab_size": 300, "model.seq_len": 16}
    values |= {"tokenizer.kind": "bpe", "model.pad_id": -1} if task == "gpt" else {}
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    config = configs.build(values)

    def source() -> sources.Source:
        return embedded.sentences("sst2") if task == "sst2" else embedded.python_reference(config.data)

    return prepare.prepare(config, CLASS_OF_TASK[task], source, progress)


def failure(folder: Path, task: str = "mlm", **settings) -> str:
    with pytest.raises(UserError) as caught:
        prepared(folder, task, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: str) -> str:
    path.write_text(content, encoding="utf-8")
    return str(path)


# What comes out


@pytest.mark.parametrize("task", CLASS_OF_TASK)
def test_samples_of_all_parts_fit_the_model(folder, task):
    config, data = prepared(folder, task)
    assert config.model.vocab_size == data.tokenizer.get_vocab_size() <= 300
    for split in sources.SPLITS:
        samples = data.samples[split]
        assert type(samples) is CLASS_OF_TASK[task] and len(samples) > 10
        batch = samples.batch(np.arange(len(samples)), np.zeros(len(samples), int))
        assert batch["tokens"].shape == (len(samples), 16)
        assert 0 <= batch["tokens"].min() and batch["tokens"].max() < config.model.vocab_size
    assert data.source.description.startswith(config.data.path)


def test_parts_share_no_article(folder):
    _, data = prepared(folder, "sst2", model__seq_len=64)
    texts = {}
    for split, samples in data.samples.items():
        tokens = samples.batch(np.arange(len(samples)), np.zeros(len(samples), int))["tokens"]
        texts[split] = {data.tokenizer.decode(row.tolist()) for row in tokens}
    assert sum(map(len, texts.values())) == len(LINES) == len(set().union(*texts.values()))


def test_the_tokenizer_learns_from_train_alone(folder, tmp_path):
    marked = [line + (" q" * 30 if sources.split_of(line, Config().data) != "train" else "") for line in LINES]
    # The letter is in parts that are split off, and nowhere else.
    (tmp_path / "train.txt").write_text("\n".join(LINES))
    (tmp_path / "dev.txt").write_text("\n".join(marked))
    (tmp_path / "test.txt").write_text("\n".join(marked))
    _, data = prepared(tmp_path, data__path=str(tmp_path))
    assert data.tokenizer.token_to_id("c") is not None and data.tokenizer.token_to_id("q") is None


def test_a_larger_token_table_may_be_asked_for(folder):
    config, _ = prepared(folder, model__vocab_size=512)
    assert config.model.vocab_size == 512


def test_progress_is_told_the_bytes_of_text(folder, tmp_path):
    told: list[tuple[str, int]] = []
    done: list[int] = []

    @contextlib.contextmanager
    def progress(title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
        told.append((title, n_bytes))
        yield done.append

    prepared(folder, progress=progress, data__cache_dir=str(tmp_path))
    n_bytes = len("\n".join(LINES).encode())
    assert told == [("tokenizing", n_bytes)]
    assert 0.95 * n_bytes < done[-1] <= n_bytes


def test_a_tokenizer_is_trained_on_a_bounded_and_spread_part(folder, tmp_path, monkeypatch):
    seen: list[str] = []
    real = prepare.tokenization.train

    def spied(config, texts, *others):
        seen[:] = list(texts())
        return real(config, texts, *others)

    monkeypatch.setattr(prepare.tokenization, "train", spied)
    prepared(folder, data__cache_dir=str(tmp_path / "a"))
    train = [line for line in LINES if line in set(seen)]
    assert seen == train and len(train) > 250  # all of train
    size = len("\n".join(LINES))
    monkeypatch.setattr(prepare, "TOKENIZER_BYTES", size // 4)
    prepared(folder, data__cache_dir=str(tmp_path / "b"))
    part = list(seen)
    assert 0.15 < len(part) / len(train) < 0.35 and set(part) < set(train)
    places = np.array([train.index(line) for line in part]) / len(train)
    assert abs(places.mean() - 0.5) < 0.15 and np.diff(places).max() < 0.15
    prepared(folder, data__cache_dir=str(tmp_path / "c"))
    assert seen == part


def test_a_long_word_is_named_with_its_line(folder, tmp_path):
    lines = [*LINES[:20], *["ACGT" * 1000] * 2, *LINES[20:]]
    path = write(tmp_path / "a.txt", "\n".join(lines))
    other = write(tmp_path / "b.txt", "\n".join(LINES))
    _, data = prepared(tmp_path, data__path=path, data__test_fraction=0.0, data__validation_path=other)
    expected = (
        f"{path}, line 21: a word of 4,000 characters, and 1 more words were cut into pieces of 1,000 to train the "
        "tokenizer; if it is no text, leave it out"
    )
    assert expected in data.notes
    _, again = prepared(tmp_path, data__path=path, data__test_fraction=0.0, data__validation_path=other)
    assert not any("cut into pieces" in note for note in again.notes)  # it is in the cache


def test_a_stride_is_for_training_and_what_separates_documents_is_kept(tmp_path):
    book = "\n\n".join(LINES)
    path = write(tmp_path / "book.txt", book)
    _, plain = prepared(tmp_path, "gpt", data__path=path)
    config, data = prepared(tmp_path, "gpt", data__path=path, data__stride=4)
    assert config.data.documents == "file" and len(data.samples["train"].split) == 1
    assert f"the first documents begin: {book[:60]!r}" in data.notes
    assert len(data.samples["train"]) == pytest.approx(4 * len(plain.samples["train"]), rel=0.01)
    assert len(data.samples["validation"]) == len(plain.samples["validation"])  # each token is scored once
    config = configs.replace(config, "data.cache_dir", str(tmp_path / "cache"))
    arguments = (config, CausalSamples, lambda: None, data.tokenizer, "test", no_progress)
    assert len(prepare.part(*arguments)[1]) == len(plain.samples["test"])


def test_hidden_test_labels_are_told(tmp_path):
    write(tmp_path / "train.tsv", TABLE)
    write(tmp_path / "dev.tsv", TABLE)
    write(tmp_path / "test.tsv", "sentence\tlabel\nthe cat\t-1\nthe mat\t-1\n")
    _, data = prepared(tmp_path, "sst2", data__path=str(tmp_path))
    assert "hidden (-1): no test score" in data.source.test_refusal
    assert not any("no test" in note for note in data.notes)  # said once


def test_notes_tell_of_no_test_part_and_of_cut_texts(folder):
    _, data = prepared(folder, "sst2", data__test_fraction=0.0, model__seq_len=12)
    assert any("no test score" in note for note in data.notes)
    cut = next(note for note in data.notes if "are cut" in note)
    lengths = [len(data.tokenizer.encode(line, add_special_tokens=False).ids) for line in LINES]
    n = sum(size > 10 for size in lengths)
    assert cut == f"{n} of 400 texts ({n / 400:.1%}) are longer than model.seq_len=12 and are cut"
    _, data = prepared(folder, "sst2", model__seq_len=64)
    assert not any("are cut" in note for note in data.notes)


def test_settings_of_parts_that_are_there_already_have_no_effect(folder, tmp_path):
    write(tmp_path / "train.tsv", TABLE)
    write(tmp_path / "dev.tsv", TABLE)
    settings = {"data__validation_fraction": 0.2, "data__test_fraction": 0.3, "data__split_seed": 1}
    _, data = prepared(tmp_path, "sst2", data__path=str(tmp_path), **settings)
    found = [note.partition(" has no effect")[0] for note in data.notes if "no effect" in note]
    assert found == ["data.validation_fraction=0.2"]  # the test part is split off, with the seed
    write(tmp_path / "test.tsv", TABLE)
    _, data = prepared(tmp_path, "sst2", data__path=str(tmp_path), **settings)
    found = [note.partition(" has no effect")[0] for note in data.notes if "no effect" in note]
    assert found == ["data.validation_fraction=0.2", "data.test_fraction=0.3", "data.split_seed=1"]
    _, data = prepared(folder, "sst2", data__path="", **settings)
    found = [note.partition(" has no effect")[0] for note in data.notes if "no effect" in note]
    assert found == ["data.validation_fraction=0.2", "data.test_fraction=0.3", "data.split_seed=1"]
    _, data = prepared(folder, data__path="", **settings)  # the embedded text is split
    assert not any("no effect" in note for note in data.notes)


# What does not fit


def test_too_little_text_for_one_update_tells_the_counts(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(LINES[:40]))
    config, data = prepared(tmp_path, data__path=path, train__batch_size=2)
    articles, n = len(data.samples["train"].windows.split), len(data.samples["train"])
    tokens = len(data.samples["train"].windows.split.tokens)
    assert prepared(tmp_path, data__path=path, train__batch_size=n)  # just enough
    message = failure(tmp_path, data__path=path, train__batch_size=n + 1)
    assert message.startswith(
        f"{path}: the train part is too small: {articles} articles with {tokens} tokens make {n} "
    )
    assert f"model.seq_len=16, but {n + 1} are needed for one update" in message
    assert f"but {2 * n} are needed" in failure(tmp_path, data__path=path, train__batch_size=n, train__accumulate=2)


def test_no_validation_part_names_the_settings(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(LINES))
    message = failure(tmp_path, data__path=path, data__validation_fraction=0.0)
    assert "the validation part is too small: 0 articles with 0 tokens make 0 samples" in message
    assert "data.validation_fraction" in message and "data.validation_path" in message


def test_missing_special_tokens_name_the_tokenizer_and_the_task(folder, tmp_path):
    message = failure(folder, tokenizer__kind="bpe")
    assert message.startswith("tokenizer.kind=bpe: the tokenizer has no [PAD] or <pad>, which task=mlm needs")
    message = failure(folder, "gpt", tokenizer__kind="wordpiece")
    assert message.startswith("tokenizer.kind=wordpiece: the tokenizer has no <|endoftext|> or </s>, which task=gpt")
    letters = "\n".join("abcdefghijklmnopqrstuvwxyz0123456789")
    path = write(tmp_path / "vocab.txt", f"[PAD]\n[UNK]\n[MASK]\n{letters}\n")
    message = failure(folder, "sst2", tokenizer__path=path)
    assert message.startswith(f"tokenizer.path={path}: the tokenizer has no [CLS] or <s>, which task=sst2 needs")
    assert prepared(folder, tokenizer__path=path)[1].samples["train"].n_start == 0  # mlm does without


def test_vocabulary_larger_than_the_models(folder):
    message = failure(folder, model__vocab_size=100)
    assert message.startswith("model.vocab_size=100 is smaller than the vocabulary of the tokenizer, 300")
    assert prepared(folder, model__vocab_size=300)


def test_ids_of_a_vocabulary_with_gaps_fit_the_model(folder, tmp_path):
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"aaaaabcdefgh", "line"]
    path = write(tmp_path / "vocab.txt", "\n".join(lines) + "\n")
    config, data = prepared(folder, tokenizer__path=path)
    assert config.model.vocab_size == len(lines) > data.tokenizer.get_vocab_size()
    batch = data.samples["train"].batch(np.arange(20), np.zeros(20, int))
    assert batch["labels"].max() == len(lines) - 1
    assert data.samples["train"].replacements.max() == len(lines) - 1  # random ids are of all the vocabulary


@pytest.mark.parametrize("task", ["mlm", "sst2"])
def test_pad_that_is_not_the_models(folder, task):
    message = failure(folder, task, model__pad_id=3)
    assert message == "model.pad_id=3, but the tokenizer's pad has the id 0; use --model.pad-id 0"
    assert failure(folder, task, model__pad_id=-1).startswith("model.pad_id=-1, but")


def test_pad_outside_the_vocabulary(folder):
    message = failure(folder, "gpt", model__pad_id=300)
    assert message.startswith("model.pad_id=300 is not below the size of the vocabulary, 300")
    assert prepared(folder, "gpt", model__pad_id=299)


def test_bad_source_leaves_no_cache(tmp_path):
    path = write(tmp_path / "a.tsv", TABLE + "one more\t7\n")
    message = failure(tmp_path, "sst2", data__path=path, data__n_labels=2)
    assert message.endswith(f"the rarest, 7, is first in {path}, line {len(LINES) + 2}")
    assert not (tmp_path / "cache").exists()


# How long documents are


def padding(samples: Samples, train: TrainConfig) -> float:
    """Return the share of padding in the batches of an epoch."""
    size = train.batch_size * train.accumulate
    batches = itertools.islice(loader.training_batches(samples, train), len(samples) // size)
    n_real = n = 0
    for batch in batches:
        n_real += sum(samples.n_tokens({name: x[i] for name, x in batch.items()}) for i in range(train.accumulate))
        n += batch["tokens"].size
    return 1 - n_real / n


def spread(n_words: int) -> str:
    """Return documents of one word to `n_words`, most of them short."""
    words = "the cat sat on that mat and a dog ran".split()
    return "\n".join(" ".join(words[(i + j) % 10] for j in range(1 + i % n_words // (1 + i % 9))) for i in range(600))


@pytest.mark.parametrize("task", CLASS_OF_TASK)
@pytest.mark.parametrize("kind", ["short", "of many lengths"])
def test_the_setting_that_is_named_lowers_the_share_of_padding(task, kind, tmp_path):
    n = 6 if kind == "short" else 70
    lines = spread(n).split("\n")
    name, content = "a.txt", "\n".join(lines)
    if task == "sst2":
        name, content = "a.tsv", "text\tlabel\n" + "".join(f"{line}\t{i % 2}\n" for i, line in enumerate(lines))
    settings = {"data__path": write(tmp_path / name, content), "model__seq_len": 64, "train__batch_size": 8}
    config, data = prepared(tmp_path, task, **settings)
    note = data.notes[-1]
    before = padding(data.samples["train"], config.train)
    match = re.fullmatch(
        r"(\d+) documents to train on, of (\d+) tokens \(median\) to (\d+), [\d,]+ in all; (\d+)% .*: set (.*)", note
    )
    assert match
    sizes = np.diff(
        data.samples["train"].split.offsets if task == "sst2" else data.samples["train"].windows.split.offsets
    )
    assert [int(match[i]) for i in (1, 2, 3)] == [len(sizes), int(np.median(sizes)), sizes.max()]
    assert abs(before - int(match[4]) / 100) < 0.02 and before > 0.5
    if kind == "short":
        assert match[5].startswith("model.seq_len to ") and match[5].endswith(", the longest sample")
        settings["model__seq_len"] = int(match[5].split()[2].rstrip(","))
    else:
        assert match[5].startswith("data.pack=documents") and " train.group_by_length=true" in match[5]
        settings["train__group_by_length"] = True
    config, mended = prepared(tmp_path, task, **settings)
    assert padding(mended.samples["train"], config.train) < 0.75 * before
    assert len(mended.samples["train"]) == len(data.samples["train"])  # nothing is cut
    assert task != "sst2" or mended.samples["train"].n_cut == data.samples["train"].n_cut


def test_documents_are_told_for_the_embedded_text_too(folder):
    _, data = prepared(folder, data__path="")
    assert re.fullmatch(
        r"\d+ documents to train on, of [\d,]+ tokens \(median\) to [\d,]+, [\d,]+ in all; \d+% of .*", data.notes[-1]
    )


@pytest.mark.parametrize("task", ["mlm", "gpt"])
def test_text_has_no_classes_though_the_checkpoint_of_its_run_counts_some(task, tmp_path):
    text = write(tmp_path / "text.txt", "".join(f"line {i} of words\n" for i in range(200)))
    config = configs.build({"task": task, "data.path": text, "model.seq_len": 16, "tokenizer.vocab_size": 300})
    config = configs.replace(config, "tokenizer.kind", "bpe" if task == "gpt" else "wordpiece")
    config = configs.replace(config, "data.cache_dir", str(tmp_path))
    _, data = prepare.prepare(config, CLASS_OF_TASK[task], None, no_progress, ("0", "1"))
    assert data.source.classes == ()
