"""Runs for the tests of what uses a trained model: tiny, with random weights and a tokenizer of a few sentences."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm.config import Config, TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.params import names
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import parameters
from jaxlm.training import resume
from jaxlm.weights import formats

TEXTS = ["the cat sat on the mat and the dog sat on the log", "a dog and a cat, both of them old: what they saw"]
SIZES = {"d_model": 12, "n_heads": 3, "seq_len": 16, "n_layers": 2, "positions": "rotary"}
OF_TASK: dict[str, dict[str, Any]] = {
    "mlm": {},
    "gpt": {"tokenizer.kind": "bpe", "model.pad_id": -1},
    "sst2": {"data.n_labels": 3},
    "pairs": {"tokenizer.kind": "bpe", "model.pad_id": -1},
    "cola": {"model.head_outputs": "vocabulary"},
    "tag": {"data.n_labels": 3},
    "embed": {"model.pooling": "mean"},
}


def write(
    folder: Path,
    task: str,
    losses: dict[int, float | None] | None = None,
    tokenizer: Tokenizer | None = None,
    classes: Sequence[str] = (),
    **settings: Any,
) -> Path:
    """Write a run with a checkpoint for each step of `losses`, by default for step 3 alone; return its folder."""
    sizes = {f"model.{name}": value for name, value in SIZES.items()}
    config = configs.build({"task": task, "tokenizer.vocab_size": 300, **sizes, **OF_TASK.get(task, {}), **settings})
    tokenizer = tokenizer or tokenization.train(config.tokenizer, lambda: iter(TEXTS))
    config = configs.replace(config, "model.vocab_size", tokenization.n_ids(tokenizer))
    (folder / "checkpoints").mkdir(parents=True)
    tokenization.save(tokenizer, folder / "tokenizer.json")
    (folder / "config.toml").write_text(configs.dump(config), encoding="utf-8")
    fingerprint = tokenization.fingerprint(tokenization.read(TokenizerConfig(path=str(folder / "tokenizer.json"))))
    for step, loss in (losses or {3: None}).items():
        info = {"step": step, "task": task, "rate": 0.1, "sample_iter": 4 * step, "val_loss": loss, "skipped": []}
        info |= {"classes": classes} if classes else {}  # checkpoints of earlier versions have no names
        snapshot = Snapshot(config, info | {"tokenizer": fingerprint}, weights(config, step), None, step)
        formats.WRITERS[formats.RUN](folder / "made", snapshot)
        (folder / "made" / "checkpoints" / str(step)).rename(folder / "checkpoints" / str(step))
        shutil.rmtree(folder / "made")
    (folder / resume.LOCK).touch()
    return folder


def weights(config: Config, seed: int) -> names.Arrays:
    """Return random weights, large enough for answers that differ."""
    random = np.random.default_rng(seed)
    shapes = parameters.shapes(config)
    return {name: (random.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32) for name, shape in shapes.items()}
