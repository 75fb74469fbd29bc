"""Text to token ids: train a tokenizer, or read one from a file, a folder or the hub.

Trained vocabularies depend on nothing but the text and the settings: the same ids in every process.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import tokenizers
from tokenizers import (
    AddedToken,
    PreTokenizedString,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from jaxlm.config import TokenizerConfig
from jaxlm.data import hub
from jaxlm.errors import UserError, note, os_errors, slow, warn
from jaxlm.io import storage, temporary, utf8

# What a special token is called in the vocabularies people have.
NAMES = {
    # EuroBERT's pad ends texts as well; a token that no text has takes its place.
    "pad": ("[PAD]", "<pad>", "<|pad|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    "unknown": ("[UNK]", "<unk>"),
    "start": ("[CLS]", "<s>", "<|begin_of_text|>"),
    "end": ("[SEP]", "</s>", "<|end_of_text|>"),
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "article": ("<|endoftext|>", "</s>", "<|end_of_text|>"),
}
WORDPIECE_SPECIALS = tuple(NAMES[role][0] for role in ("pad", "unknown", "start", "end", "mask"))
UNTRAINED_SPECIALS = (*WORDPIECE_SPECIALS, NAMES["article"][0])  # of bytes and characters: for every task
LARGEST = 2**24  # tokens; what has a larger number is damaged
T = TypeVar("T")
TOKENIZER_CONFIG = "tokenizer_config.json"
BESIDE = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
# Of the files beside a tokenizer: classes that are read, the roles of special tokens, the keys that are read, those
# that are read with some values only, and those that change no token of a text.
CLASSES = ("BertTokenizer", "DistilBertTokenizer", "GPT2Tokenizer", "RobertaTokenizer")
BARE = ("PreTrainedTokenizer", "TokenizersBackend")  # classes of what tokenizer.json says, and no more
LISTS = ("additional_special_tokens", "extra_special_tokens")
ROLES = {"unk_token": "unknown", "cls_token": "start", "sep_token": "end", "pad_token": "pad", "mask_token": "mask"}
ROLES |= {"bos_token": "article", "eos_token": "article"}
BERT_KEYS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
READ = {*ROLES, *BERT_KEYS, "add_prefix_space", "added_tokens_decoder", "tokenizer_class"}
READ |= {"add_bos_token", "add_eos_token"}
ONLY: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True,),
    "never_split": (None, []),
    "wordpieces_prefix": ("##",),
    "continuing_subword_prefix": ("##", ""),
    "max_input_chars_per_word": (100,),
    "clean_text": (True,),
    "auto_map": (None,),
}
TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("do_lower_case", "tokenize_chinese_chars", "add_prefix_space"), (bool, "true or false")),
    **dict.fromkeys(LISTS, (list | dict | None, "a list")),
    "strip_accents": (bool | None, "true, false or null"),
}
UNUSED = set(
    # lengths, sides and forms of batches
    "model_max_length max_len max_length stride truncation truncation_strategy truncation_side padding padding_side "
    "pad_to_multiple_of pad_token_type_id model_input_names return_token_type_ids "
    # of decoded text, and places in the text
    "clean_up_tokenization_spaces errors trim_offsets spaces_between_special_tokens "
    # special tokens in a text are text here
    "split_special_tokens additional_special_tokens extra_special_tokens model_specific_special_tokens "
    "add_special_tokens "
    # where it came from and what it is for
    "name_or_path special_tokens_map_file tokenizer_file vocab_file merges_file backend is_local local_files_only "
    "from_slow legacy init_inputs processor_class chat_template use_fast transformers_version".split()
)
MOST_LETTERS = 1000  # of a word that a tokenizer is trained on; the time for one grows with more than its length
# Characters between words, as both kinds of tokenizer divide a text. There are further ones outside ASCII.
_SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_BERT_ENDS = (re.compile(rf"[{_SPACES}!-/:-@\[-`{{-~\u3400-\u4dbf\u4e00-\u9fff]"),)
# Words of GPT-2 are letters alone, digits alone, spaces alone, or others alone.
_BYTE_LEVEL_ENDS = tuple(map(re.compile, (r"[\W_]", rf"[^\W_]|[{_SPACES}]", rf"[^{_SPACES}]")))
ALPHABET_SIZE = 1000  # characters, at most, that get two tokens of their own; rarer ones become [UNK]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return {role: token id} for the special tokens that the tokenizer has; roles are the keys of NAMES."""
    found = ((role, tokenizer.token_to_id(name)) for role, names in NAMES.items() for name in reversed(names))
    return {role: token for role, token in found if token is not None}


def marks_of_file(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the tokens that a tokenizer.json puts "before" and "after" a text, where it puts any."""
    text, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    places = [i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text]
    around = (whole[: places[0]], whole[places[0] + len(text) :]) if places else ([], whole)
    if not places or max(map(len, around)) > 1:
        tokens = " ".join(str(tokenizer.id_to_token(i)) for i in whole)
        raise UserError(
            f"tokenizer.json: its post_processor makes {tokens} of the text a, but only one token before and one after "
            "a text can be used; change it in the file, or set tokenizer.marks=task"
        )
    return {name: ids[0] for name, ids in zip(("before", "after"), around, strict=True) if ids}


def specials_of(tokenizer: Tokenizer, config: TokenizerConfig) -> dict[str, int]:
    """Return {role: token id} as special_ids; with tokenizer.marks=file also what the file puts around a text.

    "separator" stands between the end of a text and a second text, where there is such a token.
    """
    specials = special_ids(tokenizer) | (marks_of_file(tokenizer) if config.marks == "file" else {})
    end = specials.get("after" if config.marks == "file" else "end")
    return specials | ({"separator": end} if end is not None and _has_separator(tokenizer) else {})


def _has_separator(tokenizer: Tokenizer) -> bool:
    """Return whether two texts have two end tokens between them, as RoBERTa's <s> a </s> </s> b </s>."""
    if tokenizer.post_processor is None:  # of all such models in transformers, these names tell it
        return {"<s>", "</s>"} <= tokenizer.get_vocab().keys()
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    return len(tokenizer.encode("a", "a").ids) == len(tokenizer.encode("a").ids) + 2 + len(alone)


def n_ids(tokenizer: Tokenizer) -> int:
    """Return one more than the largest token id; a vocabulary may have gaps, as where a vocab.txt repeats a line."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a hash of all that tokenizer.json says; another version of the library may still split otherwise."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def cached(
    config: TokenizerConfig,
    texts: Callable[[], Iterator[str]],
    corpus: str,
    cache_dir: Path,
    on_long_word: Callable[[int], None] = lambda length: None,
) -> Tokenizer:
    """Return the tokenizer of `config`, trained on `texts()` unless the cache has it for this `corpus` fingerprint.

    A file of the cache has its checksum in its name; a damaged one is removed, with a warning. Raises UserError if the
    tokenizer cannot be read or the cache cannot be written.
    """
    if config.path:
        return read(config)
    settings = f"{corpus} {config.kind} {config.vocab_size} {config.lowercase} {tokenizers.__version__}"
    key = hashlib.sha256(settings.encode()).hexdigest()[:32]
    for path in sorted((cache_dir / "tokenizers").glob(f"{key}*.json")):
        try:
            return _checked(path, key)
        except FileNotFoundError:  # another process has just renamed it
            continue
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            warn(f"{path}: the cached tokenizer is damaged ({reason}); it is removed and trained again")
            with contextlib.suppress(OSError):
                storage.remove(path)
    with slow("training the tokenizer"):
        content = train(config, texts, on_long_word).to_str()
    tokenizer = Tokenizer.from_str(content)
    save(tokenizer, _with_checksum(cache_dir / "tokenizers" / key, content.encode()))
    return _as_used(tokenizer)


def _with_checksum(path: Path, content: bytes) -> Path:
    return path.with_name(f"{path.name}-{hashlib.sha256(content).hexdigest()[:32]}.json")


def _checked(path: Path, key: str) -> Tokenizer:
    """Return a tokenizer of the cache. Raises OSError or ValueError if it is not as it was written."""
    content = path.read_bytes()
    named = _with_checksum(path.with_name(key), content)
    is_old = path.stem == key  # of a version that kept no checksum in the name
    if path != named and not is_old:
        raise ValueError("it is not as it was written")
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(str(error)) from error
    if not tokenizer.get_vocab_size() or n_ids(tokenizer) != tokenizer.get_vocab_size():
        raise ValueError("its tokens are not numbered from 0 without a gap")
    if is_old:
        note(f"{path}: this cached tokenizer of an older version has no checksum; it can be read, and gets one")
        with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
            path.rename(named)
    return _as_used(tokenizer)


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json; the file is there whole or not at all. Raises UserError if it cannot be written."""
    mend = "free some space, or choose another folder with --data.cache-dir"
    with os_errors(f"{path}: the tokenizer cannot be written", mend):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace_text(path, tokenizer.to_str())


def train(
    config: TokenizerConfig,
    texts: Callable[[], Iterator[str]],
    on_long_word: Callable[[int], None] = lambda length: None,
) -> Tokenizer:
    """Return a tokenizer trained on texts(), which is read twice for WordPiece, and for bytes not at all.

    `on_long_word` gets the length of each word that is cut, while its text is the last one that texts() has yielded.
    """
    if config.kind == "bytes":
        return _single(sorted(pre_tokenizers.ByteLevel.alphabet()), of_bytes=True)
    if config.kind == "characters":
        characters: set[str] = set()
        for text in texts():
            characters.update(text)
        return _single(sorted(characters), of_bytes=False)
    if config.kind == "bpe":
        tokenizer = _byte_level(models.BPE())
        bpe_trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(chunks(_short_words(tokenizer, texts(), on_long_word), len), bpe_trainer)
        # Behind the learned tokens, as in GPT-2, so that id 0 is "!" there and here.
        tokenizer.add_special_tokens([NAMES["article"][0]])
        return tokenizer

    # The trainer numbers the characters that continue a word in the order of a hash table, and breaks ties between
    # merges by these numbers. Given to it in sorted order as special tokens, they cannot vary.
    draft = _wordpiece({}, config.lowercase)
    letters = _alphabet(draft.normalizer, texts(), min(ALPHABET_SIZE, config.vocab_size // 4))
    seed = [*WORDPIECE_SPECIALS, *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=config.vocab_size,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=seed,
        show_progress=False,
    )
    draft.train_from_iterator(chunks(_short_words(draft, texts(), on_long_word), len), trainer)
    vocab = draft.get_vocab()
    vocab = {token: i for i, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    return _wordpiece(vocab, config.lowercase)


def read(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, vocab.txt, vocab.json with merges.txt, a folder of these, or the hub.

    What tokenizer_config.json, special_tokens_map.json and added_tokens.json beside it say is followed, and where it
    cannot be, refused by name. Raises UserError for that, and if there is no tokenizer or it cannot be read.
    """
    path = _file_of(Path(config.path))
    values = _values(path)
    try:
        if path.name.endswith("vocab.json"):
            tokenizer = _byte_level(_bpe(path), values.get("add_prefix_space") is True)
            tokenizer.add_special_tokens([name for names in NAMES.values() for name in names if _has(tokenizer, name)])
        elif path.suffix == ".txt":
            # splitlines() would split at U+2028 and others. A blank line at the end is no token.
            lines = _text(path).rstrip("\n").split("\n")
            vocab = {line: i for i, line in enumerate(lines)}
            if "[UNK]" not in vocab:
                mend = "give the vocab.txt of a WordPiece tokenizer"
                raise UserError(f"tokenizer.path={config.path}: no [UNK] among its {len(vocab)} lines; {mend}")
            tokenizer = _wordpiece(vocab, values.get("do_lower_case", config.lowercase), values)
        else:
            tokenizer = Tokenizer.from_str(_text(path))
        _check_use(tokenizer)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, and for a panic a BaseException
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)[:200] or type(error).__name__
        rule = f"{path.name} cannot be read as a tokenizer: {reason}"
        mend = "fetch it again, or save it with the program that made it"
        raise UserError(f"tokenizer.path={config.path}: {rule}; {mend}") from error
    # What ends a text and a continuation is then told elsewhere.
    are_checked = tuple(key for key in ROLES if config.marks == "task" or key not in ("bos_token", "eos_token"))
    _apply(tokenizer, values, path, are_checked)
    return _as_used(tokenizer)


def _text(path: Path) -> str:
    """Return the text of a file of a tokenizer. Raises OSError, or ValueError for another file in its place."""
    text = utf8.read(path)
    if why := utf8.stand_in(text[: utf8.START].encode()):
        raise ValueError(why)
    return text


def _bpe(path: Path) -> models.BPE:
    """Return the model of a vocab.json and its merges.txt. Raises UserError if they are not there or do not fit."""
    merges = path.with_name(path.name.replace("vocab.json", "merges.txt"))
    if not merges.is_file():
        raise UserError(f"{path}: there is no {merges.name} beside it; fetch it, too, or give a tokenizer.json")
    vocab = utf8.from_json(_text(path))
    try:
        with os_errors(f"{merges}: cannot be read", "fetch it again"):
            lines = _text(merges).split("\n")
    except ValueError as error:
        raise UserError(f"{merges}: cannot be read ({error}); fetch it again") from error
    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < 2**32 for i in vocab.values()):
        raise ValueError("it is not an object of tokens and their numbers")
    pairs = []
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#version"):
            first, _, second = line.partition(" ")
            if not all(token in vocab for token in (first, second, first + second)):
                rule = f"{line[:80]!r} is not a merge of two tokens of {path.name}"
                raise UserError(f"{merges}, line {number}: {rule}; fetch both files from the same place")
            pairs.append((first, second))
    return models.BPE(vocab, pairs)


def _check_use(tokenizer: Tokenizer) -> None:
    """Raise ValueError, or what the library raises, unless a tokenizer can be used, with the same ids each time."""
    if not tokenizer.get_vocab():
        raise ValueError("its vocabulary is empty")
    if n_ids(tokenizer) > LARGEST:
        raise ValueError(f"the number {n_ids(tokenizer) - 1:,} of a token is above {LARGEST:,}")
    if getattr(tokenizer.model, "dropout", None):
        raise ValueError(f"dropout={tokenizer.model.dropout} gives other tokens each time; set it to null in the file")
    tokenizer.encode_batch_fast(["", "The cats' caf\u00e9 \u4e2d\u6587 \U0001f642 \x00 12.5%\n"])


def _values(path: Path) -> dict[str, Any]:
    """Return what the files beside a tokenizer say of it. Raises UserError for a key that cannot be followed."""
    prefix = path.name.removesuffix("vocab.json") if path.name.endswith("vocab.json") else ""
    values: dict[str, Any] = {}
    for name in BESIDE:
        file = path.with_name(prefix + name)
        if not file.is_file():
            continue
        try:
            told = utf8.from_json(utf8.read(file))
            if not isinstance(told, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); mend it, or remove it") from error
        if name == "added_tokens.json":
            told = {"added_tokens_decoder": {str(i): {"content": token} for token, i in told.items()}}
        # As in transformers: the older files count where the newer one does not list its tokens.
        values = told | values if "added_tokens_decoder" in values else values | told
    is_whole = path.suffix == ".json" and not path.name.endswith("vocab.json")
    file = path.with_name(prefix + TOKENIZER_CONFIG)
    if "tokenizer_class" not in values and not is_whole:  # older models have it here
        file = path.with_name("config.json")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            values["tokenizer_class"] = utf8.from_json(utf8.read(file)).get("tokenizer_class")
    kind = str(values.get("tokenizer_class") or "").removesuffix("Fast")
    if is_whole and kind and kind not in CLASSES:
        # As in transformers, tokenizer.json alone counts for what is of no class, and most of it for other classes.
        values = {} if kind in BARE else {key: values[key] for key in BERT_KEYS if key in values}
    suitable = CLASSES[:2] if path.suffix == ".txt" else CLASSES[2:]
    if not is_whole and kind and kind not in suitable:
        mend = "load it with transformers, and give the tokenizer.json that save_pretrained writes"
        rule = f"{path.name} can be read for {' and '.join(suitable)} only"
        raise UserError(f"{file}: tokenizer_class={kind}: {rule}; {mend}")
    file = path.with_name(prefix + TOKENIZER_CONFIG)
    for key, value in values.items():
        if key in ONLY and value not in ONLY[key]:
            only = " or ".join(json.dumps(x) for x in ONLY[key])
            raise UserError(f"{file}: {key}={json.dumps(value)}: can be read with {only} only; change the file")
        kinds, needed = TYPES.get(key, (object, ""))
        if not isinstance(value, kinds):
            raise UserError(f"{file}: {key}={json.dumps(value)}: has to be {needed}")
        if key not in READ | ONLY.keys() | UNUSED and not key.endswith("_token"):
            mend = "remove it if it does not change how texts are divided"
            raise UserError(f"{file}: {key}={json.dumps(value)[:80]}: is not known here; {mend}")
        # A tokenizer.json has a step of its own that puts special tokens around a text, and BERT's have no such keys.
        if key in ("add_bos_token", "add_eos_token") and value and path.name.endswith("vocab.json"):
            raise UserError(f"{file}: {key}=true: can be read with false only; give a tokenizer.json instead")
    return values


def _apply(tokenizer: Tokenizer, values: dict[str, Any], path: Path, are_checked: Iterable[str]) -> None:
    """Add tokens, and compare the rest of `values`. Raises UserError for what the tokenizer does otherwise."""
    file, is_wordpiece = path.with_name(TOKENIZER_CONFIG), isinstance(tokenizer.model, models.WordPiece)
    added = values.get("added_tokens_decoder") or {}
    lists = [x for key in LISTS for x in values.get(key) or []]
    names = {_content(value) for value in (*values.values(), *lists)}
    try:
        for i, token in sorted((int(i), dict(token)) for i, token in added.items()):
            is_special = token.pop("special", token["content"] in names)
            if not is_special or not _has(tokenizer, token["content"]):
                (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([AddedToken(**token)])
            if (now := tokenizer.token_to_id(token["content"])) != i:
                rule = f"{token['content']!r} has the number {i} there, but {now} in {path.name}"
                raise UserError(f"{file}: added_tokens_decoder: {rule}; give files of the same tokenizer")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: added_tokens_decoder cannot be read ({error}); mend it") from error
    specials = special_ids(tokenizer)
    for key in are_checked:
        role = ROLES[key]
        name = _content(values.get(key))
        if key == "bos_token" and "start" in specials:
            role = "start"
        # BERT's have no bos and eos, GPT-2's no use for unk and pad.
        is_used = not is_wordpiece if key in ("bos_token", "eos_token") else is_wordpiece or "start" in specials
        if role in ("start", "end", "mask") or is_used:
            expected = tokenizer.id_to_token(specials[role]) if role in specials else None
            if name is not None and tokenizer.token_to_id(name) != specials.get(role):
                can = f"{path.name} has {expected}" if expected else f"can be read as {' or '.join(NAMES[role])} only"
                raise UserError(f"{file}: {key}={json.dumps(name)}: {can}; use one name in both files")
    if path.suffix == ".txt" or path.name.endswith("vocab.json"):
        return
    if is_wordpiece and any(key in values for key in BERT_KEYS):
        normalizer = _bert_normalizer(values.get("do_lower_case", True), values)
        probe = "\u00c0\u00c9e\u0301 \u4e2d\u6587 Stra\u00dfe \u0130"
        if (tokenizer.normalizer or normalizers.Sequence([])).normalize_str(probe) != normalizer.normalize_str(probe):
            told = ", ".join(f"{key}={json.dumps(values[key])}" for key in BERT_KEYS if key in values)
            raise UserError(f"{file}: {told}: {path.name} does otherwise; make them the same")
    if "add_prefix_space" in values and not is_wordpiece and tokenizer.pre_tokenizer is not None:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str("a")
        if values["add_prefix_space"] is not (pieces[0][0] != "a"):
            value = json.dumps(values["add_prefix_space"])
            raise UserError(f"{file}: add_prefix_space={value}: {path.name} does otherwise; make them the same")


def _content(token: Any) -> str | None:
    """Return the text of a special token, which may be an object."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _as_used(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # A special token spelled out in a text is text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _has(tokenizer: Tokenizer, name: str) -> bool:
    return tokenizer.token_to_id(name) is not None


def _file_of(path: Path) -> Path:
    """Return the file to read for a path of a file or folder, or a name on the hub."""
    for file in (path, *(path / name for name in ("tokenizer.json", "vocab.txt", "vocab.json"))):
        if file.is_file():
            return file
    if path.is_dir():
        names = "tokenizer.json, vocab.txt or vocab.json with merges.txt"
        raise UserError(f"tokenizer.path={path}: the folder has no {names}")
    if not storage.is_hub_name(path):
        raise UserError(f"tokenizer.path={path}: there is no such file or folder")
    return _from_hub(str(path))


def _from_hub(name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if failure := hub.unreachable(name):
            raise ConnectionError(failure)
        return Path(huggingface_hub.hf_hub_download(name, "tokenizer.json", etag_timeout=3))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        rule = f"neither a file here nor a tokenizer on the hub that can be reached ({reason})"
        mend = "give a local tokenizer.json, vocab.txt or vocab.json"
        raise UserError(f"tokenizer.path={name}: {rule}; {mend}") from error


def _single(letters: list[str], of_bytes: bool) -> Tokenizer:
    """Return a tokenizer with a token for each letter, which stands for a byte or is a character; others are [UNK]."""
    vocab = {token: i for i, token in enumerate([*UNTRAINED_SPECIALS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token=NAMES["unknown"][0]))
    # Line by line, for speed: the library takes longer for each character of a longer word.
    lines: Any = pre_tokenizers.Split("\n", "merged_with_previous")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, in_bytes]) if of_bytes else lines
    tokenizer.decoder = decoders.ByteLevel() if of_bytes else decoders.Fuse()
    tokenizer.add_special_tokens(list(UNTRAINED_SPECIALS))
    return tokenizer


def is_single(tokenizer: Tokenizer) -> bool:
    """Return whether each token is one character or one byte."""
    is_bytes = isinstance(tokenizer.decoder, decoders.ByteLevel) and n_ids(tokenizer) <= 256 + len(UNTRAINED_SPECIALS)
    return is_bytes or isinstance(tokenizer.decoder, decoders.Fuse)


def _wordpiece(vocab: dict[str, int], lowercase: bool, values: Mapping[str, Any] = MappingProxyType({})) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = _bert_normalizer(lowercase, values)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([name for name in WORDPIECE_SPECIALS if _has(tokenizer, name)])
    return tokenizer


def _bert_normalizer(lowercase: bool, values: Mapping[str, Any]) -> normalizers.Normalizer:
    return normalizers.BertNormalizer(
        lowercase=lowercase,
        strip_accents=values.get("strip_accents"),
        handle_chinese_chars=values.get("tokenize_chinese_chars", True),
    )


def _byte_level(model: models.BPE, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _alphabet(normalizer: normalizers.Normalizer, texts: Iterable[str], size: int) -> list[str]:
    """Return the `size` most frequent characters of the normalised texts, sorted."""
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(text)
    normal: collections.Counter[str] = collections.Counter()
    for character, count in counts.items():
        normal.update({part: count for part in normalizer.normalize_str(character) if not part.isspace()})
    return sorted(sorted(normal, key=lambda character: (-normal[character], character))[:size])


def _short_words(tokenizer: Tokenizer, texts: Iterable[str], on_long_word: Callable[[int], None]) -> Iterator[str]:
    """Return the texts, cut where a word of the tokenizer has more than MOST_LETTERS characters."""
    ends = _BYTE_LEVEL_ENDS if isinstance(tokenizer.model, models.BPE) else _BERT_ENDS
    # At once: while it is trained, a tokenizer waits for the end before it gives them.
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer

    def pieces(text: str) -> Iterator[str]:
        cuts = [0]
        for first, last in _runs(text, ends) if len(text) > MOST_LETTERS else ():
            words = PreTokenizedString(text[first:last])
            if normalizer is not None:
                words.normalize(normalizer.normalize)
            pre_tokenizer.pre_tokenize(words)
            for _, (start, end), _ in words.get_splits("original", "char"):
                if end - start > MOST_LETTERS:
                    on_long_word(end - start)
                    cuts += range(first + start + MOST_LETTERS, first + end, MOST_LETTERS)
        return (text[start:end] for start, end in itertools.pairwise([*cuts, len(text)]))

    return itertools.chain.from_iterable(map(pieces, texts))


def _runs(text: str, ends: Iterable[re.Pattern[str]]) -> list[tuple[int, int]]:
    """Return the places, in order, between the `ends` of words that have more than MOST_LETTERS characters.

    Looks for an end in each half of that length, and so at few of the characters.
    """
    half = MOST_LETTERS // 2
    places = []
    for end in ends:
        last = 0
        for start in range(0, len(text) - half + 1, half):
            if start >= last and not end.search(text, start, start + half):
                first = start
                while first > last and not end.match(text, first - 1):
                    first -= 1
                found = end.search(text, start + half)
                last = found.start() if found else len(text)
                if last - first > MOST_LETTERS:
                    places.append((first, last))
    return sorted(set(places))


def chunks(items: Iterable[T], size_of: Callable[[T], int], most: int = 1_000_000) -> Iterator[list[T]]:
    """Group items until their sizes sum to `most`: enough to tokenize in parallel, little enough for any memory."""
    chunk: list[T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item) + 64  # what an empty item costs, too
        if size >= most:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
