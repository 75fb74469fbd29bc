"""A training state as NumPy arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.params import muon, names
from jaxlm.params.names import Arrays, Shapes

POSITION = "base.embedding.position"  # the table of learned positions
Moments = tuple[Arrays, Arrays]  # first and second


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A training state as float32 NumPy arrays, in model order, by torchlm's names."""

    config: Config
    info: dict[str, Any]  # step, task, rate, tokenizer, sample_iter, val_loss; original_config in files of the original
    weights: Arrays
    moments: Moments | None  # None: zero, before the first update; params/muon.py: which parameters have a second one
    n_updates: int

    def moments_or_zeros(self) -> Moments:
        """Return the moments of the trained parameters, zero before the first update."""
        zeros = {name: np.zeros_like(x) for name, x in names.trained(self.config.model, self.weights).items()}
        return self.moments or (zeros, muon.with_second_moment(self.config.train, zeros))

    def merge_adapters(self) -> "Snapshot":
        """Return the state with LoRA adapters, if any, merged into the weights; without moments then."""
        if not self.config.model.lora_rank:
            return self
        weights = names.merge_adapters(self.config.model, self.weights)
        return Snapshot(configs.replace(self.config, "model.lora_rank", 0), self.info, weights, None, 0)

    def weights_for(self, shapes: Shapes, parts: Sequence[str], source: str, is_base: bool = False) -> Arrays:
        """Return the weights for some parts of a model with parameters of these shapes.

        Learned positions are cut to the model's. With `is_base`, the model belongs to another run: adapters of the
        snapshot are merged. Raises UserError, which begins with `source`, if the weights do not fit.
        """
        weights = dict((self.merge_adapters() if is_base else self).weights)
        if POSITION in weights and POSITION in shapes:
            weights[POSITION] = weights[POSITION][: shapes[POSITION][0]]
        shapes = names.without_adapters(shapes) if is_base else shapes
        return names.check(_of_parts(weights, parts), _of_parts(shapes, parts), source)


def _of_parts(arrays: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    return {name: x for name, x in arrays.items() if name.partition(".")[0] in parts}
