"""What both packages are to do, in no framework's words: settings, start weights, and a batch for each update."""

from dataclasses import dataclass

import numpy as np

from jaxlm.config import Config, TrainConfig
from jaxlm.params.names import Arrays
from jaxlm.tasks import TASKS, parameters
from jaxlm.training.teacher import Teacher

Batch = dict[str, np.ndarray]
CYCLE_AMPLITUDE = 0.03  # of the original's rate


@dataclass(frozen=True)
class Resume:
    """A checkpoint before update `step`, from which the run resumes with `train` and a re-warmup of `n_steps`."""

    step: int
    n_steps: int
    train: TrainConfig
    cycle_steps: int


@dataclass(frozen=True)
class Plan:
    """A training run. Arrays are under torchlm's names; `batches` has one entry an update, arrays [A, B, ...]."""

    name: str
    config: Config
    start: Arrays
    batches: list[Batch]
    evaluated: Batch  # arrays [B, ...]; scored without dropout, with `evaluated_weights` or else the final ones
    evaluated_weights: Arrays | None = None
    cycle_steps: int = 0  # of the original's cycle of rates; 0: none
    resume: Resume | None = None
    teacher: Teacher | None = None
    is_mean_of_means: bool = False  # the loss of accumulated batches is the mean of theirs, whatever they count


def random_weights(config: Config, seed: int) -> Arrays:
    """Return start weights of no special value: norms are not 1, biases not 0, and no two parts alike."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameters.shapes(config).items():
        spread = 0.3 if name.startswith("base.embedding") else shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        weights[name] = (random.normal(size=shape) * spread).astype(np.float32)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    if config.model.pad_id >= 0:
        weights["base.embedding.token.weight"][config.model.pad_id] = 0
    return weights


def random_batch(config: Config, random: np.random.Generator, batch_size: int, pad_share: float = 0.2) -> Batch:
    """Return samples as the task has them, of random tokens; sequences end in pads where the model has a pad."""
    model = config.model
    T, V = model.seq_len, model.vocab_size
    is_text = model.pad_id != 0
    tokens = random.integers(0 if is_text else 1, V, (batch_size, T), dtype=np.int32)
    lengths = random.integers(max(1, int((1 - 2 * pad_share) * T)), T + 1, batch_size)
    is_pad = np.arange(T) >= lengths[:, None]
    if model.pad_id >= 0:
        tokens[is_pad] = model.pad_id
    if parameters.model_kind(config.task) == "causal":
        labels = np.where(np.roll(is_pad, -1, axis=1), -1, np.roll(tokens, -1, axis=1)).astype(np.int32)
        if config.task == "pairs":  # the first are of the prompt
            labels[np.arange(T) < random.integers(0, lengths)[:, None]] = -1
        return {"tokens": tokens, "labels": labels}
    if config.task == "mlm":
        M = max(1, int(0.25 * T))
        positions = np.stack([random.permutation(T)[:M] for _ in range(batch_size)]).astype(np.int32)
        hidden = np.take_along_axis(tokens, positions, axis=1)
        labels = np.where(np.take_along_axis(is_pad, positions, axis=1), -1, hidden).astype(np.int32)
        np.put_along_axis(tokens, positions, np.where(labels < 0, hidden, V - 1), axis=1)
        return {"tokens": tokens, "labels": labels, "positions": positions}
    if config.task == "embed":
        pair = tokens[::-1] if model.pad_id < 0 else np.where(tokens == model.pad_id, tokens, tokens[:, ::-1])
        pair = np.where((tokens != model.pad_id) & (pair == model.pad_id), 1, pair)
        last = (lengths - 1).astype(np.int32)
        labels = np.zeros(batch_size, np.int32)
        return {"tokens": tokens, "last": last, "pair_tokens": pair, "pair_last": last, "labels": labels}
    if config.task == "tag":  # words of one or two tokens
        starts = (np.arange(T) > 0) & (random.random((batch_size, T)) < 0.7) & ~is_pad
        order = np.argsort(~starts, axis=1, kind="stable")  # the positions of words first
        is_word = np.take_along_axis(starts, order, axis=1)
        labels = np.where(is_word, random.integers(0, config.data.n_classes, (batch_size, T)), -1)
        positions = np.where(is_word, order, 0)
        return {"tokens": tokens, "labels": labels.astype(np.int32), "positions": positions.astype(np.int32)}
    batch = {"tokens": tokens, "labels": random.integers(0, config.data.n_classes, batch_size, dtype=np.int32)}
    if TASKS[config.task].samples.reads == "values":
        batch["labels"] = random.normal(size=batch_size).astype(np.float32)
    if TASKS[config.task].samples.reads == "sets":
        batch["labels"] = random.integers(0, 2, (batch_size, config.data.n_classes), dtype=np.int32)
    if config.data.pair_column and model.segments:
        begin = random.integers(1, lengths + 1)[:, None]  # of the second text
        batch["types"] = ((np.arange(T) >= begin) & ~is_pad).astype(np.int32)
    return batch | ({"last": (lengths - 1).astype(np.int32)} if model.pooling == "last" else {})


def random_plan(name: str, config: Config, seed: int, **changes: float) -> Plan:
    """Return a run of `config` on random samples; `changes` goes to random_batch."""
    random = np.random.default_rng(seed)
    train = config.train

    def accumulated() -> Batch:
        parts = [random_batch(config, random, train.batch_size, **changes) for _ in range(train.accumulate)]
        return {key: np.stack([part[key] for part in parts]) for key in parts[0]}

    batches = [accumulated() for _ in range(train.max_steps)]
    return Plan(
        name, config, random_weights(config, seed), batches, random_batch(config, random, train.batch_size, **changes)
    )
