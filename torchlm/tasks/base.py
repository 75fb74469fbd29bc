"""What a task is in PyTorch: jaxlm's task of the same name, with another model, loss and prediction.

Samples, scores, baseline and what to show a person know no framework and are inherited.
"""

import abc
import functools
from typing import Any

import torch
from torch import Tensor, nn

from jaxlm import tasks
from torchlm.loss import Totals


class Task(tasks.Task):
    """One task with its settings. `model` and `batch` are what build_model and `samples` make."""

    @functools.cached_property
    def dtype(self) -> Any:
        """The type of what the model computes."""
        return torch.bfloat16 if self.config.train.precision == "bfloat16" else torch.float32

    @abc.abstractmethod
    def build_model(self, rngs: torch.Generator) -> nn.Module:
        """Return a model with start values."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: dict[str, Tensor], key: None) -> Totals:
        """Return sums over the batch: `loss`, `count`, and what `scores` needs."""

    @abc.abstractmethod
    def predict(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return what `show` needs of the model."""
