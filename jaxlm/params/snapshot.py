"""A training state of no framework."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.params import names
from jaxlm.params.names import Arrays, Shapes

Moments = tuple[Arrays, Arrays]  # first and second


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A training state of no framework; arrays are float32, and in model order."""

    config: Config
    info: dict[
        str, Any
    ]  # step, task, rate, tokenizer, sample_iter, val_loss; original_config where it comes from there
    weights: Arrays
    moments: Moments | None  # None: zero, as before the first update
    n_updates: int


def fitting(weights: Arrays, shapes: Shapes, parts: Sequence[str]) -> tuple[Arrays, Shapes]:
    """Return the weights and the shapes of some parts; of learned positions, only as many as the model has."""
    weights = {name: x for name, x in weights.items() if name.partition(".")[0] in parts}
    shapes = {name: shape for name, shape in shapes.items() if name.partition(".")[0] in parts}
    table = "base.embedding.position"
    if table in weights and table in shapes and len(weights[table]) > shapes[table][0]:
        weights[table] = weights[table][: shapes[table][0]]
    return weights, shapes


def merged(snapshot: Snapshot) -> Snapshot:
    """Return a training state whose adapters, if there are any, are part of the weights. These have no moments."""
    config = snapshot.config
    if not config.model.lora_rank:
        return snapshot
    weights = names.merged(config.model, snapshot.weights)
    return Snapshot(configs.replace(config, "model.lora_rank", 0), snapshot.info, weights, None, 0)
