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
    # step, task, rate, tokenizer, sample_iter, val_loss; original_config where it comes from there
    info: dict[str, Any]
    weights: Arrays
    moments: Moments | None  # None: zero, as before the first update
    n_updates: int

    def merged(self) -> "Snapshot":
        """Return the state with its adapters, if there are any, in the weights. These have no moments."""
        if not self.config.model.lora_rank:
            return self
        weights = names.merged(self.config.model, self.weights)
        return Snapshot(configs.replace(self.config, "model.lora_rank", 0), self.info, weights, None, 0)


def fitting(weights: Arrays, shapes: Shapes, parts: Sequence[str]) -> tuple[Arrays, Shapes]:
    """Return the weights and the shapes of some parts; of learned positions, only as many as the model has."""
    weights = {name: x for name, x in weights.items() if name.partition(".")[0] in parts}
    shapes = {name: shape for name, shape in shapes.items() if name.partition(".")[0] in parts}
    table = "base.embedding.position"
    if table in weights and table in shapes and len(weights[table]) > shapes[table][0]:
        weights[table] = weights[table][: shapes[table][0]]
    return weights, shapes
