"""What a task is in PyTorch: jaxlm's task of the same name, with another model, loss and prediction.

Samples, scores, baseline and what to show a person know no framework and are inherited.
"""

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jaxlm import tasks
from jaxlm.config import Config
from jaxlm.data.sources import numbered
from torchlm.loss import Totals


class Task(tasks.Task):
    """One task with its settings. `model` and `batch` are what build_model and `samples` make."""

    def __init__(self, config: Config, classes: Sequence[str] = ()):
        self.config = config
        self.classes = tuple(classes) or numbered(config.data.n_classes)  # their names by number, of a classifier
        self.dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32

    @abc.abstractmethod
    def build_model(self, rngs: torch.Generator) -> nn.Module:
        """Return a model with start values."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: dict[str, Tensor], key: None) -> Totals:
        """Return sums over the batch: `loss`, `count`, and what `scores` needs."""

    @abc.abstractmethod
    def predict(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return what `show` needs of the model."""
