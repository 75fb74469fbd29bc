"""From settings to samples: source, tokenizer, token cache, and all checks that need no model."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm.config import Config, DataConfig
from jaxlm.data import cache, labels, mixture, packing, sources, tokenization
from jaxlm.data.cache import Split
from jaxlm.data.parts import ANNOTATED, LABELLED, OF_TWO, WITH_CLASSES
from jaxlm.data.samples import Samples
from jaxlm.data.sources import SPLITS, Source
from jaxlm.errors import UserError, slow
from jaxlm.io import temporary

# Called with a title and the number of bytes to read; inside the context, call the result with the bytes read so far.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


N_BEGINNING = 60  # characters shown of a document
SEQ_LEN_SHARE = 0.95  # of the samples of train, which fit into a model.seq_len that is taken from the data
FEW = 50  # articles: of fewer, a share of a tenth may well be none
MANY_PLACES = 1 << 20  # samples whose lengths tell those of all
TOKENIZER_BYTES = 200_000_000  # of text that a tokenizer is trained on, about; more text changes few of its tokens


@dataclass(frozen=True)
class Data:
    """What training reads. `samples` by split; there is no test score if `source.test_refusal` says so, or if the
    samples for test are none."""

    source: Source
    tokenizer: Tokenizer
    samples: dict[str, Samples]
    notes: tuple[str, ...]


def prepare(
    config: Config,
    samples_class: type[Any],
    embedded: Callable[[], Source],
    progress: Progress,
    classes: Sequence[str] = (),
    most_seq_len: int = 0,
) -> tuple[Config, Data]:
    """Return the samples of every split, and the settings with `model.vocab_size` and `data.n_labels` filled in.

    `classes` are as in `open_source`. With `most_seq_len`, `model.seq_len` is taken from the data, so many tokens at
    most. Raises UserError for a source, tokenizer or size that does not fit the settings.

    A tokenizer is trained on at most about TOKENIZER_BYTES: of more text, on articles chosen by a hash of each, so
    that they are spread evenly, the same in every process, and bounded in memory. Of URLs, on the first of that many.
    """
    configs_of = configs.source_configs(config)
    if config.data.sources and samples_class.reads in ANNOTATED:
        raise UserError(f"data.sources: task={config.task} reads one source; give its path as data.path")
    sources_of = {name: _source(own, samples_class, embedded, classes, name) for name, own in configs_of.items()}
    source = mixture.joined(sources_of) if config.data.sources else sources_of[""]
    if source.classes:
        config = configs.replace(config, "data.n_labels", len(source.classes))
    config = _with_documents(config, sources_of)
    cache_dir = temporary.user_cache_dir(config.data.cache_dir)

    last = ""
    long_words: list[tuple[str, int]] = []

    def training_texts() -> Iterator[str]:
        nonlocal last
        is_whole = config.tokenizer.kind == "characters" or source.is_remote
        share = 1 if is_whole else TOKENIZER_BYTES / max(source.n_bytes, 1)
        n_bytes = 0
        for article in source.articles():
            last = article.text
            n_bytes += len(last)
            if source.is_remote and n_bytes > TOKENIZER_BYTES:
                return  # what follows would be fetched for a few articles of it
            # Not the seed of a split, so that the choice does not depend on which articles are for training.
            if article.split == "train" and (share >= 1 or sources.hash_of(article.text, seed=-1) < share):
                yield article.text

    def on_long_word(length: int) -> None:
        long_words.append((source.place(last) if not long_words else "", length))

    tokenizer = tokenization.cached(config.tokenizer, training_texts, source.fingerprint, cache_dir, on_long_word)
    config = _with_vocab_size(config, tokenizer)
    specials = _specials(config, tokenizer, samples_class)
    notes = [*_other_task_note(config.task, source.classes), *source.notes, *_long_words_note(long_words)]
    samples: dict[str, dict[str, Samples]] = {split: {} for split in SPLITS}
    for name, own in configs.source_configs(config).items():
        with progress(f"tokenizing {name}".strip(), sources_of[name].n_bytes) as on_progress:
            splits = cache.open_cache(sources_of[name], tokenizer, cache_dir, on_progress)
        if most_seq_len:
            own, line = _with_seq_len(own, samples_class, splits["train"], specials, most_seq_len)
            config = configs.replace(config, "model.seq_len", own.model.seq_len)
            notes.append(line)
        with slow("cutting the texts into samples"):
            n_ids, scored = tokenization.n_ids(tokenizer), _without_overlap(own)
            for split, part in splits.items():
                as_read = own if split == "train" else scored
                samples[split][name] = packing.samples_of(samples_class, part, as_read, specials, n_ids)
        found = {split: samples[split][name] for split in SPLITS}
        _check_sizes(own, splits, found, bool(name))
        prefix = f"{name}: " if name else ""
        notes += [prefix + line for line in _notes(own, found, sources_of[name])]
        notes += [prefix + line for line in _beginnings_note(sources_of[name], found["train"])]
        if n_left_out := {split: part.n_left_out for split, part in splits.items() if part.n_left_out}:
            of_splits = ", ".join(f"{n:,} of {split}" for split, n in n_left_out.items())
            notes.append(f"{prefix}documents left out, as equal to one before (data.unique): {of_splits}")
        notes.append(prefix + document_note(own, splits["train"], found["train"]))
    config = _with_weights(config, samples_class, source.classes, samples["train"])
    if not config.data.sources:
        return config, Data(
            source, tokenizer, {split: of_source[""] for split, of_source in samples.items()}, (*notes,)
        )
    mixed: dict[str, Any] = {split: mixture.MixedSamples(samples[split]) for split in SPLITS}
    fingerprints = {name: one.fingerprint for name, one in sources_of.items()}
    if not len(mixed["validation"]):
        raise UserError("data.sources: no source has a validation part; give one a validation_fraction above 0")
    mixed["train"] = mixture.Mix(samples["train"], config.data, fingerprints)
    return config, Data(source, tokenizer, mixed, (*notes,))


def _with_weights(
    config: Config, samples_class: type[Any], classes: Sequence[str], samples: Mapping[str, Any]
) -> Config:
    """Return the settings with train.class_weights as a number for each class. Raises UserError."""
    if config.train.sampling == "weighted" and samples_class.reads != "labels":
        raise UserError(f"train.sampling=weighted: a sample of task={config.task} has no class; leave it out")
    if not config.train.class_weights or samples_class.reads not in ("labels", "tags"):
        return config
    found = np.asarray(samples[""].labels)
    counts = np.bincount(found[found >= 0].astype(np.int64), minlength=len(classes))
    numbers = labels.weights(config.train.class_weights, classes, counts.tolist())
    return configs.replace(config, "train.class_weights", ",".join(f"{x:.6g}" for x in numbers))


def _with_seq_len(
    config: Config, samples_class: type[Any], split: Split, specials: dict[str, int], most: int
) -> tuple[Config, str]:
    """Return the settings with the model.seq_len that SEQ_LEN_SHARE of the samples fit into, and a line that says so.

    It is a multiple of 8, or `most`.
    """
    whole = samples_class(split, configs.replace(config, "model.seq_len", most), specials, 0)
    lengths = whole.lengths(np.arange(len(whole)))
    longest = int(np.quantile(lengths, SEQ_LEN_SHARE, method="higher")) if len(lengths) else most
    seq_len = min(most, -(-longest // 8) * 8)
    line = f"model.seq_len={seq_len}, from the data: {SEQ_LEN_SHARE:.0%} of the samples of train are not longer"
    return configs.replace(config, "model.seq_len", seq_len), line


def _with_documents(config: Config, sources_of: Mapping[str, Source]) -> Config:
    """Return the settings with what separates the documents of each source."""
    if not config.data.sources:
        return configs.replace(config, "data.documents", sources_of[""].documents)
    resolved = ({**source, "documents": sources_of[source["name"]].documents} for source in config.data.sources)
    return configs.replace(config, "data.sources", tuple(resolved))


def part(
    config: Config,
    samples_class: type[Any],
    embedded: Callable[[], Source],
    tokenizer: Tokenizer,
    split: str,
    progress: Progress,
    classes: Sequence[str] = (),
) -> tuple[Source, Samples]:
    """Return the samples of one split as a model of these `classes` has them, and their source; there may be none.

    Raises UserError for a source or tokenizer that does not fit the settings.
    """
    source = _source(config, samples_class, embedded, classes)
    specials = _specials(config, tokenizer, samples_class)
    with progress("tokenizing", source.n_bytes) as on_progress:
        splits = cache.open_cache(source, tokenizer, temporary.user_cache_dir(config.data.cache_dir), on_progress)
    n_ids = tokenization.n_ids(tokenizer)
    return source, packing.samples_of(samples_class, splits[split], _without_overlap(config), specials, n_ids)


def _without_overlap(config: Config) -> Config:
    """Return the settings of samples that are scored: each token once."""
    return configs.replace(config, "data.stride", 0)


@slow("reading the data")
def _source(
    config: Config, samples_class: type[Any], embedded: Callable[[], Source], classes: Sequence[str], name: str = ""
) -> Source:
    if config.data.path or config.data.hub:
        known = classes if samples_class.reads in WITH_CLASSES else ()
        try:
            return sources.open_source(config.data, samples_class.reads, known)
        except UserError as error:
            if name:
                raise UserError(f"data.sources, {name}: {error}") from error
            raise
    source = embedded()
    if samples_class.reads != "labels" or source.classes:
        return source
    return dataclasses.replace(source, classes=tuple(classes) or labels.numbered(config.data.n_classes))


def _with_vocab_size(config: Config, tokenizer: Tokenizer) -> Config:
    """Return the settings with the rows of the token table: those of the tokenizer, unless there are to be more."""
    n_tokens, asked = tokenization.n_ids(tokenizer), config.model.vocab_size
    if asked and asked < n_tokens:
        rule = f"model.vocab_size={asked} is smaller than the vocabulary of the tokenizer, {n_tokens}"
        raise UserError(f"{rule}; raise it, or set it to 0 to take the tokenizer's")
    n = asked or n_tokens
    if config.model.pad_id >= n:
        rule = f"model.pad_id={config.model.pad_id} is not below the size of the vocabulary, {n}"
        raise UserError(f"{rule}; use the id of the tokenizer's pad, or -1 for none")
    return configs.replace(config, "model.vocab_size", n)


def _specials(config: Config, tokenizer: Tokenizer, samples_class: type[Any]) -> dict[str, int]:
    """Return the ids of the special tokens by role."""
    specials = tokenization.specials_of(tokenizer, config.tokenizer)
    roles = samples_class.roles(config.model)
    for role in roles:
        if role not in specials:
            names, needs = " or ".join(tokenization.NAMES[role][:2]), f"task={config.task}"
            setting, mend = f"tokenizer.path={config.tokenizer.path}", "choose another tokenizer"
            if not config.tokenizer.path:
                setting = f"tokenizer.kind={config.tokenizer.kind}"
                mend = f"set tokenizer.kind={'bpe' if config.tokenizer.kind == 'wordpiece' else 'wordpiece'}"
            if samples_class.reads in ANNOTATED and config.model.pooling == "last":
                needs, mend = f"{needs} with model.pooling=last", f"start from a GPT with --init-from, or {mend}"
            raise UserError(f"{setting}: the tokenizer has no {names}, which {needs} needs; {mend}")
    if "pad" in roles and specials["pad"] != config.model.pad_id:
        pad = specials["pad"]
        rule = f"model.pad_id={config.model.pad_id}, but the tokenizer's pad has the id {pad}"
        raise UserError(f"{rule}; use --model.pad-id {pad}")
    return specials


def _check_sizes(config: Config, splits: dict[str, Split], samples: dict[str, Samples], is_mixed: bool) -> None:
    """Raise UserError for too little text for one update or for validation, with the setting that helps.

    One of several sources may have a single sample to train on and, with data.validation_fraction=0, none to score.
    """
    name = config.data.path or config.data.hub or "the embedded text"
    n_scored = int(not is_mixed or config.data.validation_fraction > 0 or bool(config.data.validation_path))
    n_trained = 1 if is_mixed else config.train.batch_size * config.train.accumulate
    for split, needed in (("train", n_trained), ("validation", n_scored)):
        if (n := len(samples[split])) < needed:
            there = f"{len(splits[split])} articles with {len(splits[split].tokens)} tokens make {n} samples"
            needs = f"but {needed} are needed" + (" for one update" if split == "train" and not is_mixed else "")
            rule = f"{name}: the {split} part is too small: {there} of model.seq_len={config.model.seq_len}, {needs}"
            raise UserError(f"{rule}; {_mend(config, split, splits, samples)}")


def _mend(config: Config, split: str, splits: dict[str, Split], samples: dict[str, Samples]) -> str:
    """Return the mend for a split that has too few samples."""
    if n := len(samples[split]):
        accumulate = min(n, config.train.accumulate)
        also = f" and train.accumulate to {accumulate}" if accumulate < config.train.accumulate else ""
        return f"give more text, or set train.batch_size to {n // accumulate} or less{also}"
    if getattr(samples[split], "n_left_out", 0):
        shortest = int(np.diff(splits[split].offsets).reshape(-1, 2).sum(axis=1).min()) + 1
        return f"all pairs are longer: raise model.seq_len to {shortest} or more"
    if len(splits[split]):
        return "give text that the tokenizer has tokens for"
    can_be_file = bool(config.data.path or config.data.hub)
    file = "put some of the text into a file of its own, and name it with data.validation_path" if can_be_file else ""
    if sum(map(len, splits.values())) < FEW:
        return f"articles are split by a hash, and these are too few: {file or 'raise data.validation_fraction'}"
    fraction = f"set data.validation_fraction to {max(0.1, min(0.5, 2 * config.data.validation_fraction)):g} or so"
    return f"{fraction}, or {file}" if file else fraction


def _notes(config: Config, samples: dict[str, Samples], source: Source) -> Iterator[str]:
    is_embedded = not (config.data.path or config.data.hub)
    if is_embedded and samples["train"].reads != "text":
        for name in ("validation_fraction", "test_fraction", "split_seed"):
            if getattr(config.data, name) != getattr(DataConfig(), name):
                value = getattr(config.data, name)
                yield f"data.{name}={value} has no effect: the embedded sentences have parts of their own"
    if samples["train"].reads != "text" and not is_embedded:
        for name in ("documents", "stride", "unique"):
            if getattr(config.data, name) != getattr(DataConfig(), name):
                yield f"data.{name}={getattr(config.data, name)} has no effect: these samples are rows of a table"
    for name in ("validation_tokens", "final_tokens"):
        if samples["train"].reads in ANNOTATED and getattr(config.data, name) != getattr(DataConfig(), name):
            yield f"data.{name}={getattr(config.data, name)} has no effect: all samples with labels are scored"
    if not len(samples["test"]) and not source.test_refusal:
        yield "there is no test part, so there will be no test score"
    yield from length_notes(config, samples.values())


def _other_task_note(task: str, classes: Sequence[str]) -> Iterator[str]:
    has_entailment = any("entailment" in name for name in classes)
    if classes and task in ("mnli", "qnli", "rte") and not has_entailment or task in ("mrpc", "qqp") and has_entailment:
        yield f"the classes {labels.listed(classes)} are not those of {task}: are these the data of another task?"


def _long_words_note(words: list[tuple[str, int]]) -> Iterator[str]:
    if words:
        others = f", and {len(words) - 1:,} more words were" if len(words) > 1 else " was"
        yield (
            f"{words[0][0] or 'the data'}: a word of {words[0][1]:,} characters{others} cut into pieces of "
            f"{tokenization.MOST_LETTERS:,} to train the tokenizer; if it is no text, leave it out"
        )


def _beginnings_note(source: Source, samples: Samples) -> Iterator[str]:
    if samples.reads == "text" and not source.is_remote:
        texts = (article.text for article in source.articles() if article.split == "train")
        yield f"the first documents begin: {', '.join(repr(text[:N_BEGINNING]) for text in itertools.islice(texts, 2))}"


def document_note(config: Config, split: Split, samples: Samples) -> str:
    """Return a line on the documents of the training part, and how much of its samples is padding."""
    sizes = getattr(samples, "sizes", np.diff(split.offsets))
    if samples.reads in OF_TWO or getattr(samples, "n_texts", 1) == 2:
        sizes = sizes.reshape(-1, 2).sum(axis=1)
    spread = np.linspace(0, len(samples) - 1, min(len(samples), MANY_PLACES)).astype(np.int64)
    lengths, seq_len = samples.lengths(spread), config.model.seq_len
    padding, longest = 1 - lengths.mean() / seq_len, int(lengths.max())
    line = (
        f"{len(sizes):,} {'document' if len(sizes) == 1 else 'documents'} to train on, of {int(np.median(sizes)):,} "
        f"tokens (median) to {sizes.max():,}, {sizes.sum():,} in all; "
        f"{padding:.0%} of the positions of their samples are padding"
    )
    if padding <= 0.5 or config.train.group_by_length:
        return line
    if 2 * longest <= seq_len:  # nothing is cut then
        return f"{line}: set model.seq_len to {max(4, longest)}, the longest sample"
    mend = "train.group_by_length=true, by which a batch is as long as its longest sample"
    return f"{line}: set data.pack=documents, by which several share a row, or {mend}"


def length_notes(config: Config, samples: Collection[Samples]) -> Iterator[str]:
    """Yield a line on texts that are longer than a sample, if there are any."""
    if n_divided := sum(getattr(part, "n_divided", 0) for part in samples):
        yield f"{n_divided} sentences are longer than model.seq_len={config.model.seq_len} and read in several windows"
    if n_empty := sum(int(np.sum(np.diff(x.split.offsets) == 0)) for x in samples if x.reads in LABELLED):
        yield f"{n_empty} texts are empty, or have nothing that the tokenizer knows; they count like any other"
    n = sum(map(len, samples))
    for name, kind, what in (("n_cut", "texts", "are cut"), ("n_left_out", "pairs", "are left out")):
        if n_longer := sum(getattr(part, name, 0) for part in samples):
            n += n_longer if name == "n_left_out" else 0
            share = f"{n_longer} of {n} {kind} ({n_longer / n:.1%})"
            yield f"{share} are longer than model.seq_len={config.model.seq_len} and {what}"
