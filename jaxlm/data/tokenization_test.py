"""Tokenizers: the same ids in every process, every form of file, the ids of the public library, and bad files."""

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.data.tokenization import WORDPIECE_SPECIALS, cached, fingerprint, n_ids, read, special_ids, train
from jaxlm.errors import UserError

WORDS = "the cat sat on a mat and The Dogs ran, naïve café; it's (not) 12.5% of them! Σίσυφος 東京 — re-read".split()
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(60)]
ODD_TEXTS = [
    "",
    " ",
    "The cat sat on a mat.",
    "unseen-words & símbolos: œuvre, 'quoted' \"double\" `tick`",
    "  leading\tand\r\ntrailing \u00a0 spaces \u2028 \u3000 ",
    "e\u0301 combining, full\uff57idth, ligature \ufb01, soft\u00adhyphen, zero\u200bwidth, \ufeffmark",
    "東京 and 中文字 mixed123with4digits 1,234.50 $5 €6 50%",
    "emoji 🙂👩‍👩‍👧 flags 🇩🇪 and control \x00\x07 \x7f \ufffd characters",
    "ΣΊΣΥΦΟΣ İstanbul straße ĞÜŞ",
    "a" * 99 + " " + "a" * 101 + " " + "the" * 80,
    "don't you'll we've I'm he'd isn't 'tis rock'n'roll",
    "don\u2019t  two  spaces\n\n\nthree newlines",
]


def texts() -> Iterator[str]:
    return iter(TEXTS)


def trained(**settings) -> Tokenizer:
    return train(TokenizerConfig(**{"vocab_size": 400} | settings), texts)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def failure(**settings) -> str:
    with pytest.raises(UserError) as caught:
        read(TokenizerConfig(**settings))
    return str(caught.value)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory) -> Path:
    """A folder with a vocab.txt of special tokens, characters and some words."""
    folder = tmp_path_factory.mktemp("bert")
    characters = sorted({c for text in [*TEXTS, *ODD_TEXTS] for c in text.lower() if c.isprintable() and c != " "})
    pieces = "the cat sat on mat ##s ##ing un ##se ##en word cafe naive".split()
    vocab = [*WORDPIECE_SPECIALS, *characters, *(f"##{c}" for c in characters if c.isalnum()), *pieces]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in dict.fromkeys(vocab)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gpt_folder(tmp_path_factory) -> Path:
    """A folder with vocab.json and merges.txt, as GPT-2 has them, made by hand."""
    folder = tmp_path_factory.mktemp("gpt")
    merges = ["t h", "th e", "Ġ the", "Ġ c", "Ġc a", "a t", "Ġ t", "Ġ Ġ", "' t", "1 2", "e r", "Ã ©"]
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    vocab += ["<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


# Training

TRAIN = """
import sys
from pathlib import Path
from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenization
texts = Path(sys.argv[1]).read_text(encoding="utf-8").split("\\n")
for kind in ("wordpiece", "bpe"):
    config = TokenizerConfig(kind=kind, vocab_size=600)
    tokenization.save(tokenization.train(config, lambda: iter(texts)), Path(sys.argv[2], kind + ".json"))
print([name for name in ("jax", "torch") if name in sys.modules])
"""


def test_training_gives_the_same_file_in_every_process(tmp_path):
    words = ["".join(random.Random(i).choices("abcdefghijklmnopé東", k=2 + i % 6)) for i in range(3000)]
    content = [" ".join(random.Random(i).choices(words, k=50)) for i in range(400)]  # with many ties between pairs
    (tmp_path / "texts").write_text("\n".join(content), encoding="utf-8")
    found: dict[str, set[str]] = {"wordpiece": set(), "bpe": set()}
    for seed, threads in (("0", "1"), ("1", "3")):
        folder = tmp_path / seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, str(tmp_path / "texts"), str(folder)],
            env=os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            cwd=Path(tokenization.__file__).parents[2],
            capture_output=True,
            text=True,
        )
        assert done.stdout == "[]\n", done.stderr
        for kind, hashes in found.items():
            hashes.add(hashlib.sha256((folder / f"{kind}.json").read_bytes()).hexdigest())
    assert {kind: len(hashes) for kind, hashes in found.items()} == {"wordpiece": 1, "bpe": 1}


def test_trained_wordpiece_has_the_special_tokens_first():
    tokenizer = trained()
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert special_ids(tokenizer) == {"pad": 0, "unknown": 1, "start": 2, "end": 3, "mask": 4}


def test_trained_bpe_has_a_real_token_at_0_and_the_end_of_text_last():
    tokenizer = trained(kind="bpe")
    assert tokenizer.id_to_token(0) == "!"
    assert special_ids(tokenizer) == {"article": n_ids(tokenizer) - 1}
    assert tokenizer.id_to_token(n_ids(tokenizer) - 1) == "<|endoftext|>"


ODD = ("", "a", "The cat\r\n\n sat\t on <|endoftext|> [MASK]", "caf\u00e9 \u4e2d\U0001f642\x00\ufeff")


@pytest.mark.parametrize("text", ODD)
def test_bytes_and_characters_lose_nothing(text):
    for kind, units in (("bytes", list(text.encode())), ("characters", list(text))):
        tokenizer = train(TokenizerConfig(kind=kind), lambda: iter([text, "other\nletters"]))
        tokenizer.encode_special_tokens = True  # as `cached` and `read` return it
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert len(ids) == len(units) and len(set(ids)) == len(set(units)) and tokenizer.decode(ids) == text
        known = set(text + "other\nletters")
        assert tokenizer.get_vocab_size() == 6 + (256 if kind == "bytes" else len(known))
        assert tokenization.special_ids(tokenizer) == dict(zip(tokenization.NAMES, range(6), strict=True))
        assert tokenization.is_single(tokenizer)
    assert not any(tokenization.is_single(trained(kind=kind)) for kind in ("wordpiece", "bpe"))


def test_a_character_that_was_not_in_the_text_is_unknown():
    tokenizer = train(TokenizerConfig(kind="characters"), lambda: iter(["bac"]))
    assert tokenizer.encode("abxcx\n", add_special_tokens=False).ids == [6, 7, 1, 8, 1, 1]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("size", [300, 350])
def test_trained_vocabulary_is_at_most_as_large_as_asked(kind, size):
    # More characters than there is room for.
    content = ["".join(chr(0x4E00 + (7 * i + j) % 900) for j in range(60)) + " the cat sat" for i in range(300)]
    tokenizer = train(TokenizerConfig(kind=kind, vocab_size=size), lambda: iter(content))
    assert n_ids(tokenizer) == tokenizer.get_vocab_size() <= size
    assert sorted(tokenizer.get_vocab().values()) == list(range(n_ids(tokenizer)))


def test_training_learns_frequent_words():
    assert trained().encode("The cat", add_special_tokens=False).tokens == ["the", "cat"]
    assert trained(kind="bpe").encode("and the cat", add_special_tokens=False).tokens[1:] == ["Ġthe", "Ġcat"]


def test_rare_characters_are_unknown_and_frequent_ones_are_not(monkeypatch):
    monkeypatch.setattr(tokenization, "ALPHABET_SIZE", 2)
    tokenizer = train(TokenizerConfig(vocab_size=300), lambda: iter(["aaa bbb aaa c"]))
    assert 1 not in ids(tokenizer, "a b aaa bbb ab") and ids(tokenizer, "c") == [1]


def test_lowercase_setting():
    small, large = trained(), trained(lowercase=False)
    assert ids(small, "THE Café") == ids(small, "the cafe")
    assert ids(large, "The") != ids(large, "the") and ids(large, "café") != ids(large, "cafe")


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_byte_level_bpe_loses_nothing(text):
    tokenizer = trained(kind="bpe")
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


N = 4 * tokenization.MOST_LETTERS + 10
LONG_WORDS = {  # text, pieces of the longest word for each kind of tokenizer (1: a word for it is short)
    "letters": ("ACGT" * (N // 4), 5, 5),
    "behind a word": ("some words " + "ACGT" * (N // 4) + " more", 5, 5),
    "in a line": ("first line\n" + "x" * N + "\nlast line", 5, 5),
    "digits": ("0123456789" * (N // 10), 5, 5),
    "accents": ("e\u0301" * (N // 2), 5, 1),
    "capitals": ("É" * N, 5, 5),
    "kana": ("あいう" * (N // 3), 5, 5),
    "Chinese": ("東京" * (N // 2), 1, 5),
    "digits and letters": ("a1" * (N // 2), 5, 1),
    "control characters": ("a\x1c" * (N // 2), 5, 1),
    "zero-width": ("a\u200b" * (N // 2), 5, 1),
    "punctuation": ("!?" * (N // 2), 1, 5),
    "underscores": ("_" * N, 1, 5),
    "spaces": ("a" + " " * N + "b", 1, 5),
    "line ends": ("\n" * N, 1, 5),
    "emoji": ("🙂" * N, 5, 5),
    "words of a line of code": ("f(x);a=b{c}" * (N // 11), 1, 1),
    "short enough": ("x" * tokenization.MOST_LETTERS + " y", 1, 1),
    "one more": ("x" * (tokenization.MOST_LETTERS + 1) + " y", 2, 2),
}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("name", LONG_WORDS)
def test_long_words_are_cut_before_training_and_others_are_not(kind, name):
    text, *pieces = LONG_WORDS[name]
    draft = trained(kind=kind)
    lengths: list[int] = []
    cut = list(tokenization._short_words(draft, ["before", text, "after"], lengths.append))
    assert "".join(cut) == f"before{text}after" and cut[0] == "before" and cut[-1] == "after"
    assert len(cut) - 2 == pieces[kind == "bpe"] and len(lengths) == (len(cut) > 3)
    for part in cut:
        words = draft.pre_tokenizer.pre_tokenize_str(draft.normalizer.normalize_str(part) if draft.normalizer else part)
        assert max((last - first for _, (first, last) in words), default=0) <= tokenization.MOST_LETTERS + 1


def test_a_long_line_of_short_words_is_learned_from_as_before():
    code = "".join(random.Random(0).choices(["f(x)", "{a.b}", "if(", "return;", "foo", "=1,"], k=5000))
    for kind in ("wordpiece", "bpe"):
        lengths: list[int] = []
        assert list(tokenization._short_words(trained(kind=kind), [code], lengths.append)) == [code] and not lengths


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_word_of_two_million_letters_trains_a_tokenizer_in_seconds(kind):
    # A hundredth of it takes half a minute where it is not cut.
    word = "".join(random.Random(0).choices("ACGT", k=200_000))
    lengths: list[int] = []
    tokenizer = train(TokenizerConfig(kind=kind, vocab_size=300), lambda: iter(["some text", word]), lengths.append)
    assert lengths == [200_000] and n_ids(tokenizer) == 300
    assert tokenizer.encode(word, add_special_tokens=False).ids  # and it can be used


# The cache of trained tokenizers


def test_trained_tokenizer_is_cached_by_corpus_and_settings(tmp_path):
    calls = []

    def counted() -> Iterator[str]:
        calls.append(1)
        return texts()

    def open_cached(corpus: str = "corpus", **settings) -> str:
        calls.clear()
        return cached(TokenizerConfig(**{"vocab_size": 400} | settings), counted, corpus, tmp_path).to_str()

    first = open_cached()
    assert calls and open_cached() == first and not calls  # read, not trained
    for change in ({"corpus": "other"}, {"vocab_size": 401}, {"lowercase": False}, {"kind": "bpe"}):
        open_cached(**change)
        assert calls, change
    assert open_cached() == first and not calls
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".json"] * 5  # nothing temporary


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_letter(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"##a"', b'"##A"'))
    assert path.read_bytes() != content


def repeated_token(path: Path) -> None:
    content = path.read_text()
    path.write_text(content.replace('"##a"', '"a"'))


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "is_old"),
    [(damage, False) for damage in (empty, cut, other_letter, repeated_token, folder_in_its_place)]
    + [(damage, True) for damage in (empty, cut, repeated_token, folder_in_its_place)],
)
def test_a_damaged_tokenizer_of_the_cache_is_trained_again(tmp_path, capsys, damage, is_old):
    first = cached(TokenizerConfig(vocab_size=400), texts, "corpus", tmp_path).to_str()
    (path,) = (tmp_path / "tokenizers").iterdir()
    if is_old:
        path = path.rename(path.with_name(path.name.partition("-")[0] + ".json"))
    damage(path)
    assert cached(TokenizerConfig(vocab_size=400), texts, "corpus", tmp_path).to_str() == first
    line = capsys.readouterr().err
    assert line.startswith(f"warning: {path}: the cached tokenizer is damaged (") and line.count("\n") == 1
    assert cached(TokenizerConfig(vocab_size=400), iter, "corpus", tmp_path).to_str() == first
    assert not capsys.readouterr().err and len(list((tmp_path / "tokenizers").iterdir())) == 1


def test_a_cached_tokenizer_of_an_older_version_gets_a_checksum_once(tmp_path, capsys):
    first = cached(TokenizerConfig(vocab_size=400), texts, "corpus", tmp_path).to_str()
    (path,) = (tmp_path / "tokenizers").iterdir()
    path.rename(path.with_name(path.name.partition("-")[0] + ".json"))
    assert cached(TokenizerConfig(vocab_size=400), iter, "corpus", tmp_path).to_str() == first
    assert "has no checksum; it can be read, and gets one" in capsys.readouterr().err
    assert cached(TokenizerConfig(vocab_size=400), iter, "corpus", tmp_path).to_str() == first
    assert not capsys.readouterr().err and list((tmp_path / "tokenizers").iterdir()) == [path]


def test_trained_tokenizer_is_reused_by_its_path(tmp_path):
    # A pre-training run stores it; a fine-tuning names it.
    first = cached(TokenizerConfig(vocab_size=400), texts, "corpus", tmp_path / "cache")
    tokenization.save(first, tmp_path / "run" / "tokenizer.json")

    def untouched() -> Iterator[str]:
        raise AssertionError("a tokenizer from a file is not trained")

    for path in (tmp_path / "run" / "tokenizer.json", tmp_path / "run"):
        again = cached(TokenizerConfig(path=str(path)), untouched, "other corpus", tmp_path / "cache")
        assert fingerprint(again) == fingerprint(first)
        assert [ids(again, text) for text in ODD_TEXTS] == [ids(first, text) for text in ODD_TEXTS]


def test_fingerprint_follows_the_vocabulary_and_the_normalisation():
    first = fingerprint(trained())
    assert fingerprint(trained()) == first
    others = [trained(lowercase=False), trained(kind="bpe"), train(TokenizerConfig(vocab_size=400), lambda: iter("ab"))]
    assert first not in {fingerprint(tokenizer) for tokenizer in others}
    vocab = {token: i for token, i in trained().get_vocab().items()}
    changed = tokenization._wordpiece(vocab, lowercase=False)
    assert fingerprint(changed) != first  # the same vocabulary, other ids


def test_failed_save_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written.*--data.cache-dir"):
        tokenization.save(trained(), tmp_path / "file" / "tokenizer.json")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        tokenization.save(trained(), tmp_path / "tokenizer.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "tokenizer.json"]


# Reading


def test_a_vocab_txt_numbers_its_lines(bert_folder):
    lines = (bert_folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    tokenizer = read(TokenizerConfig(path=str(bert_folder / "vocab.txt")))
    assert [tokenizer.id_to_token(i) for i in range(n_ids(tokenizer))] == lines
    assert special_ids(tokenizer) == {"pad": 0, "unknown": 1, "start": 2, "end": 3, "mask": 4}
    assert tokenizer.encode("The cats", add_special_tokens=False).tokens == ["the", "cat", "##s"]
    assert ids(read(TokenizerConfig(path=str(bert_folder))), "The cats") == ids(tokenizer, "The cats")
    cased = read(TokenizerConfig(path=str(bert_folder), lowercase=False))
    assert cased.encode("The cats", add_special_tokens=False).tokens == ["[UNK]", "cat", "##s"]


def test_odd_lines_of_a_vocab_txt_keep_their_numbers(tmp_path):
    path = tmp_path / "vocab.txt"
    # A line separator and a form feed are tokens in public vocabularies, not ends of lines.
    path.write_bytes("[PAD]\r\n[UNK]\r\n\u2028\r\n\x0c\r\na\r\nb\r\na\r\nc".encode())
    tokenizer = read(TokenizerConfig(path=str(path)))
    assert ids(tokenizer, "b c a") == [5, 7, 6]
    assert n_ids(tokenizer) == 8 and tokenizer.get_vocab_size() == 7  # the repeated line leaves a gap


def test_vocab_json_is_read_with_its_merges(gpt_folder):
    tokenizer = read(TokenizerConfig(path=str(gpt_folder)))
    assert tokenizer.encode(" the cat", add_special_tokens=False).tokens == ["Ġthe", "Ġca", "t"]
    assert ids(read(TokenizerConfig(path=str(gpt_folder / "vocab.json"))), " the cat") == ids(tokenizer, " the cat")
    assert special_ids(tokenizer) == {"article": n_ids(tokenizer) - 1}
    for text in ODD_TEXTS:
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


def test_prefixed_vocab_json_finds_its_own_merges(gpt_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / f"gpt2_{name}").write_bytes((gpt_folder / name).read_bytes())
    tokenizer = read(TokenizerConfig(path=str(tmp_path / "gpt2_vocab.json")))
    assert tokenizer.encode(" the", add_special_tokens=False).tokens == ["Ġthe"]


def test_a_tokenizer_json_that_pads_and_cuts_does_so_no_more(tmp_path):
    tokenizer = trained()
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = read(TokenizerConfig(path=str(tmp_path / "tokenizer.json")))
    assert len(ids(again, "the cat sat on a mat")) == 6
    assert [len(encoding.ids) for encoding in again.encode_batch(["the", "the cat"])] == [1, 2]


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_special_tokens_spelled_out_in_a_text_are_text(tmp_path, kind):
    tokenizer = cached(TokenizerConfig(kind=kind, vocab_size=400), texts, "corpus", tmp_path)
    specials = set(special_ids(tokenizer).values()) - {special_ids(tokenizer).get("unknown")}
    text = "the [MASK] and [CLS] [PAD] <|endoftext|> </s>"
    assert specials.isdisjoint(ids(tokenizer, text))


def test_roles_of_other_names():
    model = models.BPE({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5}, [])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    found = special_ids(tokenizer)
    assert found == {"pad": 1, "unknown": 3, "start": 0, "end": 2, "mask": 4, "article": 2}


# The ids of the public library


def test_ids_of_a_vocab_txt_are_those_of_transformers(bert_folder):
    transformers = pytest.importorskip("transformers")
    for lowercase in (True, False):
        theirs = transformers.BertTokenizerFast.from_pretrained(str(bert_folder), do_lower_case=lowercase)
        ours = read(TokenizerConfig(path=str(bert_folder), lowercase=lowercase))
        assert len(theirs) == n_ids(ours)
        for text in ODD_TEXTS + TEXTS[:5]:
            assert ids(ours, text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_ids_of_a_vocab_json_are_those_of_transformers(gpt_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast.from_pretrained(str(gpt_folder))
    ours = read(TokenizerConfig(path=str(gpt_folder)))
    assert len(theirs) == n_ids(ours)
    for text in ODD_TEXTS + TEXTS[:5]:
        assert ids(ours, text) == theirs(text)["input_ids"], text


DIFFICULT = [
    *ODD_TEXTS,
    "ÀÉÎ Über café e\u0301 中文字x中 ñ Ñ a\u0301\u0300",
    "new<x> <x>new a<x>b  <x>  c <X> cat<x>cat",
]


def added(**flags) -> dict[str, Any]:
    return {"added_tokens_decoder": {"N": {"content": "<x>", "special": False, "normalized": False} | flags}}


# What tokenizer_config.json says; and what the refusal names, beside a vocab.txt or vocab.json, and beside a
# tokenizer.json. Where that is "", it is followed as in transformers.
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("bert", {}, "", ""),
    ("bert", {"do_lower_case": False}, "", "tokenizer.json does otherwise"),
    ("bert", {"strip_accents": False}, "", "tokenizer.json does otherwise"),
    ("bert", {"strip_accents": True, "do_lower_case": False}, "", "tokenizer.json does otherwise"),
    ("bert", {"strip_accents": False, "do_lower_case": False}, "", "tokenizer.json does otherwise"),
    ("bert", {"tokenize_chinese_chars": False}, "", "tokenizer.json does otherwise"),
    ("bert", {"do_lower_case": "yes"}, 'do_lower_case="yes": has to be true or false', "has to be true or false"),
    ("bert", {"strip_accents": 0}, "strip_accents=0: has to be true, false or null", "has to be true, false or null"),
    ("bert", {"additional_special_tokens": 5}, "additional_special_tokens=5: has to be a list", "has to be a list"),
    ("bert", {"do_basic_tokenize": False}, "do_basic_tokenize=false: can be read with true only", "do_basic_tokenize"),
    ("bert", {"never_split": ["cat"]}, 'never_split=["cat"]: can be read with null or [] only', "never_split"),
    ("bert", {"wordpieces_prefix": "@@"}, 'wordpieces_prefix="@@"', "wordpieces_prefix"),
    ("bert", {"clean_up_tokenization_spaces": True, "model_max_length": 3, "padding_side": "left"}, "", ""),
    ("bert", {"unk_token": "[UNK]", "bos_token": None}, "", ""),
    ("bert", {"unk_token": "<unk>"}, 'unk_token="<unk>": vocab.txt has [UNK]', "tokenizer.json has [UNK]"),
    ("bert", {"cls_token": "<cls>"}, 'cls_token="<cls>": vocab.txt has [CLS]', "tokenizer.json has [CLS]"),
    ("bert", {"pad_token": "[SEP]"}, 'pad_token="[SEP]": vocab.txt has [PAD]', "tokenizer.json has [PAD]"),
    ("bert", {"subword": "x"}, 'subword="x": is not known here', "is not known here"),
    ("bert", added(), "", ""),
    ("bert", added(single_word=True), "", ""),
    ("bert", added(lstrip=True, rstrip=True), "", ""),
    ("bert", added(content="<X>", normalized=True), "", ""),
    (
        "bert",
        {"added_tokens_decoder": {"9999": {"content": "<x>"}}},
        "has the number 9999 there",
        "has the number",
    ),
    ("bert", {"added_tokens_decoder": {"x": 1}}, "added_tokens_decoder cannot be read", "cannot be read"),
    ("gpt2", {}, "", ""),
    ("gpt2", {"add_prefix_space": True}, "", "add_prefix_space=true: tokenizer.json does otherwise"),
    ("gpt2", {"add_bos_token": True}, "add_bos_token=true: can be read with false only", ""),
    ("gpt2", {"errors": "strict", "trim_offsets": False, "pad_token": "[PAD]"}, "", ""),
    ("gpt2", {"eos_token": "a"}, 'eos_token="a": vocab.json has <|endoftext|>', "tokenizer.json has"),
    ("gpt2", added(), "", ""),
    ("gpt2", added(lstrip=True, rstrip=True), "", ""),
]


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize(("kind", "told", "refusal", "refusal_of_json"), CASES)
def test_what_tokenizer_config_says_is_followed_or_refused_by_name(
    tmp_path, bert_folder, gpt_folder, kind, told, refusal, refusal_of_json, is_whole
):
    transformers = pytest.importorskip("transformers")
    theirs_of = {"bert": transformers.BertTokenizer, "gpt2": transformers.GPT2Tokenizer}[kind]
    folder = shutil.copytree(bert_folder if kind == "bert" else gpt_folder, tmp_path / "model")
    n = n_ids(read(TokenizerConfig(path=str(folder))))
    values = json.loads(json.dumps(told).replace('"N"', f'"{n}"'))
    if is_whole:
        theirs_of.from_pretrained(folder).save_pretrained(folder)
        values = json.loads((folder / "tokenizer_config.json").read_text()) | values
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if expected := refusal_of_json if is_whole else refusal:
        message = failure(path=str(folder))
        assert message.startswith(f"{folder}/tokenizer_config.json: ") and expected in message and "\n" not in message
        return
    ours, theirs = read(TokenizerConfig(path=str(folder))), theirs_of.from_pretrained(folder)
    for text in DIFFICULT:
        assert ids(ours, text) == theirs(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    ("kind", "name"), [("bert", "BertJapaneseTokenizer"), ("bert", "RobertaTokenizerFast"), ("gpt2", "Qwen2Tokenizer")]
)
def test_a_vocabulary_of_another_class_is_refused(tmp_path, bert_folder, gpt_folder, file, kind, name):
    folder = shutil.copytree(bert_folder if kind == "bert" else gpt_folder, tmp_path / "model")
    (folder / file).write_text(json.dumps({"tokenizer_class": name}))
    message = failure(path=str(folder))
    readable = (
        "vocab.txt can be read for BertTokenizer and" if kind == "bert" else "vocab.json can be read for GPT2Token"
    )
    assert message.startswith(f"{folder}/{file}: tokenizer_class={name.removesuffix('Fast')}: {readable}")


@pytest.mark.parametrize(
    ("name", "is_followed"),
    [("PreTrainedTokenizerFast", False), ("TokenizersBackend", False), ("MPNetTokenizer", True)],
)
def test_a_tokenizer_json_of_another_class_is_compared_where_transformers_changes_it(
    tmp_path, bert_folder, name, is_followed
):
    tokenization.save(read(TokenizerConfig(path=str(bert_folder))), tmp_path / "tokenizer.json")
    values = {"tokenizer_class": name, "do_lower_case": False, "other": 1}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    if is_followed:
        assert "do_lower_case=false: tokenizer.json does otherwise" in failure(path=str(tmp_path))
    else:
        assert ids(read(TokenizerConfig(path=str(tmp_path))), "The CAT") == ids(
            read(TokenizerConfig(path=str(bert_folder))), "The CAT"
        )


def test_older_files_beside_a_vocab_txt_are_followed(tmp_path, bert_folder):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(bert_folder, tmp_path / "model")
    n = n_ids(read(TokenizerConfig(path=str(folder))))
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": n}))
    (folder / "special_tokens_map.json").write_text('{"unk_token": {"content": "[UNK]", "lstrip": false}}')
    ours, theirs = read(TokenizerConfig(path=str(folder))), transformers.BertTokenizer.from_pretrained(folder)
    assert [ids(ours, x) for x in DIFFICULT] == [theirs(x, add_special_tokens=False)["input_ids"] for x in DIFFICULT]
    (folder / "special_tokens_map.json").write_text('{"unk_token": "[SEP]"}')
    assert 'unk_token="[SEP]": vocab.txt has [UNK]' in failure(path=str(folder))
    (folder / "special_tokens_map.json").write_text("[" * 100_000)
    assert failure(path=str(folder)).startswith(f"{folder}/special_tokens_map.json: cannot be read (nested too deeply")


# Errors


def odd(kind: str = "wordpiece", vocab: Any = None, **changes: Any) -> bytes:
    """Return a tokenizer.json with other values in its model."""
    values = json.loads(trained(kind=kind).to_str())
    values["model"] |= {"vocab": values["model"]["vocab"] if vocab is None else vocab} | changes
    return json.dumps(values if vocab is None else values | {"added_tokens": []}).encode()


ODD_FILES: dict[str, Callable[[], bytes]] = {
    "empty vocabulary": lambda: odd(vocab={}),
    "empty vocabulary of BPE": lambda: odd("bpe", vocab={}, merges=[]),
    "no model": lambda: b'{"version": "1.0", "model": null}',
    "other model": lambda: odd(type="Unigram"),
    "list": lambda: b"[]",
    "types": lambda: odd(vocab={"a": "b"}),
    "large number": lambda: odd(vocab={"[UNK]": 0, "a": 2**32 - 1}),
    "no unknown token": lambda: odd(vocab={"a": 0}),
    "random": lambda: odd("bpe", dropout=0.5),
    "deep": lambda: b'{"model":' * 100_000,
    "pickle": lambda: pickle.dumps({"model": 1}),
    "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n",
    "nothing": lambda: b"",
    "cut": lambda: odd()[:-40],
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_an_odd_tokenizer_json_is_one_line(tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes(ODD_FILES[name]())
    message = failure(path=str(tmp_path))
    start = f"tokenizer.path={tmp_path}: tokenizer.json cannot be read as a tokenizer: "
    assert message.startswith(start) and message.endswith("or save it with the program that made it")
    assert "\n" not in message


def test_merges_that_do_not_fit_are_named_with_their_line(tmp_path, gpt_folder):
    folder = shutil.copytree(gpt_folder, tmp_path / "model")
    for line in ("x yy", "x", "x  y", "Ġt he"):
        (folder / "merges.txt").write_text(f"#version: 0.2\nt h\n{line}\n", encoding="utf-8")
        message = failure(path=str(folder))
        assert message.startswith(f"{folder}/merges.txt, line 3: {line!r} is not a merge of two tokens of vocab.json; ")
    (folder / "merges.txt").write_text("t h\r\n")
    assert read(TokenizerConfig(path=str(folder))).encode("th").tokens == ["th"]
    for content in ("[]", '{"a": -1}', '{"a": 1.5}', '{"a": "b"}'):
        (folder / "vocab.json").write_text(content)
        assert "not an object of tokens and their numbers" in failure(path=str(folder))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "a pointer of Git LFS, not the file itself"),
        (b"<!DOCTYPE html>\n", "a page of HTML"),
        (b"", "empty; copy or download it again"),
        (b"t h\n\xe9 a\n", "not UTF-8 at byte 4"),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_the_one_that_is_named(tmp_path, gpt_folder, content, reason):
    folder = shutil.copytree(gpt_folder, tmp_path / "model")
    (folder / "merges.txt").write_bytes(content)
    assert failure(path=str(folder)).startswith(f"{folder}/merges.txt: cannot be read ({reason}")
    for name in ("vocab.txt", "tokenizer.json", "vocab.json"):
        (tmp_path / name).write_bytes(content)
        (tmp_path / "merges.txt").write_text("t h\n")
        assert f"{name} cannot be read as a tokenizer: {reason}" in failure(path=str(tmp_path / name))


def test_blank_lines_at_the_end_of_a_vocab_txt_are_no_tokens(tmp_path, bert_folder):
    content = (bert_folder / "vocab.txt").read_bytes()
    expected = fingerprint(read(TokenizerConfig(path=str(bert_folder))))
    for end in (b"\n", b"\n\n", b"\r\n"):
        (tmp_path / "vocab.txt").write_bytes(content + end)
        assert fingerprint(read(TokenizerConfig(path=str(tmp_path)))) == expected


def test_paths_that_lead_nowhere(tmp_path):
    for path in (tmp_path / "no.json", tmp_path / "no" / "vocab.txt", tmp_path / "nothing"):
        assert failure(path=str(path)) == f"tokenizer.path={path}: there is no such file or folder"
    assert failure(path="no-such.json") == "tokenizer.path=no-such.json: there is no such file or folder"
    message = failure(path=str(tmp_path))
    assert (
        message.startswith(f"tokenizer.path={tmp_path}: the folder has no tokenizer.json") and "merges.txt" in message
    )


def test_files_that_are_no_tokenizer(tmp_path, gpt_folder):
    def write(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    assert "cannot be read as a tokenizer" in failure(path=write("a.json", b"{}"))
    assert "cannot be read as a tokenizer" in failure(path=write("b.json", b"not json"))
    assert "cannot be read as a tokenizer" in failure(path=write("c.json", b"\xff\xfe\0"))
    message = failure(path=write("a.txt", b"some\nother\ntext\n"))
    assert f"tokenizer.path={tmp_path}/a.txt: no [UNK] among its 3 lines" in message
    assert "cannot be read as a tokenizer" in failure(path=write("b.txt", b"[UNK]\n\xff\n"))
    write("vocab.json", (gpt_folder / "vocab.json").read_bytes())
    message = failure(path=str(tmp_path / "vocab.json"))
    assert message.startswith(f"{tmp_path}/vocab.json: there is no merges.txt beside it; ")


def test_unreachable_hub_names_the_setting(monkeypatch):
    from huggingface_hub import constants

    # A port of this machine that nothing listens on.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("it was asked for long")
    )
    message = failure(path="some-group/some-model")
    assert message.startswith("tokenizer.path=some-group/some-model: ") and "give a local tokenizer.json" in message


# Chunks


def test_chunks_keep_every_item_in_order_and_stay_small():
    items = ["a" * (i % 97) for i in range(5000)]
    found = list(tokenization.chunks(items, len, most=2000))
    assert [item for chunk in found for item in chunk] == items
    assert len(found) > 50 and all(sum(map(len, chunk)) < 2000 + 97 for chunk in found)
    assert max(map(len, tokenization.chunks([""] * 5000, len, most=2000))) < 50  # empty items cost, too
