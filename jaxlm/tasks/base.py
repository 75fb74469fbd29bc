"""What a task is: a model, its samples, a loss and scores, and what to show a person."""

import abc
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tokenizers import Tokenizer

from jaxlm.config import Config
from jaxlm.data import metrics
from jaxlm.data.labels import numbered
from jaxlm.data.samples import Batch
from jaxlm.data.sources import Source

if TYPE_CHECKING:  # JAX is imported where a model is built: torchlm has these tasks, too
    from flax import nnx
    from jax import Array

    from jaxlm.loss import Totals


class Task(abc.ABC):
    """One task with its settings. `model` and `batch` are what build_model and `samples` make."""

    samples: ClassVar[type[Any]]  # class of data/samples.py that makes the batches
    settings: ClassVar[tuple[str, ...]] = ()  # settings that only such tasks use; elsewhere they warn
    baseline_name: ClassVar[str]  # what `baseline` guesses
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "bits_per_byte")  # of the scores
    original_prefixes: ClassVar[tuple[str, str]] = ("base", "head")  # of the names in the original's files
    packs: ClassVar[bool] = False  # the `loss` of this class takes packed rows: it passes on `segments`
    ranks: ClassVar[bool] = False  # jaxlm.evaluate scores all samples together, by the method `ranked`
    has_probabilities: ClassVar[bool] = False  # the softmax of the logits is of the labels: jaxlm.predict gives it

    def __init__(self, config: Config, classes: Sequence[str] = ()):
        self.config = config
        self.classes = tuple(classes) or numbered(config.data.n_classes)  # their names by number, of a classifier

    @classmethod
    def can_pack(cls) -> bool:
        """Return whether the class that has the `loss` says that it takes packed rows; one that overrides it has to."""
        owner = next(kind for kind in cls.__mro__ if "loss" in vars(kind))
        return bool(vars(owner).get("packs", False))

    @functools.cached_property
    def dtype(self) -> Any:
        """The type of what the model computes."""
        import jax.numpy as jnp

        return jnp.bfloat16 if self.config.train.precision == "bfloat16" else jnp.float32

    @abc.abstractmethod
    def embedded(self) -> Source:
        """Return the articles to use where the settings name no source."""

    @abc.abstractmethod
    def build_model(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """Return a model with start values; all its variables are nnx.Param."""

    @abc.abstractmethod
    def loss(self, model: Any, batch: dict[str, "Array"], key: "Array | None") -> "Totals":
        """Return sums over the batch: `loss`, `count`, and what `scores` needs. With a key, dropout is on."""

    def loss_with_logits(self, model: Any, batch: dict[str, "Array"]) -> "tuple[Totals, Array]":
        """Return what `loss` does without dropout, and the logits behind it, as jaxlm.evaluate needs them.

        For tasks with probabilities. XLA runs a model once that is called twice alike.
        """
        return self.loss(model, batch, None), self.logits(model, batch)

    def logits(self, model: Any, batch: dict[str, Any], key: Any = None) -> Any:
        """Return the logits that probabilities are of."""
        return model(batch["tokens"], key, batch.get("positions", batch.get("last")))

    @abc.abstractmethod
    def predict(self, model: Any, batch: dict[str, "Array"]) -> "Array":
        """Return what `show` needs of the model, compiled."""

    @abc.abstractmethod
    def scores(self, totals: Any) -> metrics.Scores:
        """Return the scores of summed totals, the most telling first; `loss` is among them."""

    @abc.abstractmethod
    def baseline(self, samples: Any) -> metrics.Scores:
        """Return the scores of the best guess that looks at no input, for samples of the class `samples`."""

    @abc.abstractmethod
    def show(self, batch: Batch, predictions: Any, tokenizer: Tokenizer) -> str:
        """Return the samples of a batch with what the model makes of them, for a person."""

    def answer(self, prediction: Any) -> dict[str, Any]:
        """Return what jaxlm.predict answers about a text, in values of JSON; `prediction` is what `predict` returns.

        Used by tasks of labels without probabilities.
        """
        return {"prediction": prediction.tolist()}

    def label(self, i: int) -> int | str:
        """Return the name of class `i`; its number where that is its name, and where there is no such class."""
        return i if self.has_numbers() or not 0 <= i < len(self.classes) else self.classes[i]

    def has_numbers(self) -> bool:
        """Return whether the names of the classes are their numbers."""
        return self.classes == numbered(len(self.classes))

    def warning(self, totals: Any) -> str:
        """Return one line on totals that look like a collapsed model, or ""."""
        return ""
