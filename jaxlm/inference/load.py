"""Loading a trained model: weights (without optimizer state), settings, tokenizer."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer

from jaxlm import checkpoint
from jaxlm import config as configs
from jaxlm.config import BASE, Config
from jaxlm.data import tokenization
from jaxlm.errors import UserError, slow
from jaxlm.heads import BaseModel
from jaxlm.io import storage
from jaxlm.runtime import backend
from jaxlm.tasks import TASKS, Task, flops, parameters
from jaxlm.terminal import command
from jaxlm.training import resume
from jaxlm.training.resume import Start
from jaxlm.weights import formats, snapshots


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model, as built by `task.build_model`, and everything needed to use it."""

    start: Start  # the checkpoint and its metadata
    config: Config
    task: Task  # None without an output layer
    tokenizer: Tokenizer
    model: Any

    def has_probabilities(self) -> bool:
        """Return whether the softmax of the logits has a probability for each label: not with too few outputs."""
        is_classifier = parameters.model_kind(self.config.task) == "classifier"
        is_short = is_classifier and flops.n_logits(self.config)[1] < self.config.data.n_classes
        return self.task.has_probabilities and not is_short

    def __str__(self) -> str:
        return f"{self.start.path} (task {self.config.task}, step {self.start.info['step']:,})"


@slow("loading the model")
def load(source: str | Path, tokenizer: str = "", precision: str = "", needs_output: bool = True) -> LoadedModel:
    """Return the model of a run (its best checkpoint) or of a checkpoint, in any format that jaxlm.convert reads.

    `tokenizer` is a path as in tokenizer.path; `precision` is as in train.precision; "": that of the run. Raises
    UserError, also for a model without an output layer if `needs_output`.
    """
    start = resume.to_use(source)
    config = start.config()
    if config.task == BASE and needs_output:
        raise UserError(no_output(start))
    if precision:
        config = configs.replace(config, "train.precision", precision)
    read = _tokenizer(start, config, tokenizer)
    backend.configure(config)
    model = model_of(start, config)
    task: Any = None if config.task == BASE else TASKS[config.task](config, start.classes())
    return LoadedModel(start, config, task, read, model)


def no_output(start: Start) -> str:
    """Return the error line for a model without an output layer."""
    name = shlex.quote(str(start.path))
    return (
        f"{start.path}: it has no output layer; train one with {command('train')} --task TASK --init-from {name}, "
        f"see its attention with {command('serve')} --checkpoint {name}, or convert it with {command('convert')}"
    )


def _tokenizer(start: Start, config: Config, named: str) -> Tokenizer:
    assert start.path is not None, "a model is loaded from a checkpoint"
    own = (start.run or start.path.parent.parent) / "tokenizer.json"
    if not named and start.is_public():
        named = config.tokenizer.path
    elif not named and not storage.is_remote(own) and own.is_file():
        named = str(own)
    if not named:
        raise UserError(f"{start.path}: there is no tokenizer.json of its run; give it with --tokenizer.path")
    # A vocab.txt, unlike a tokenizer.json, does not say whether it ignores case.
    tokenizer = tokenization.read(dataclasses.replace(config.tokenizer, path=named))
    if start.info["tokenizer"] not in (None, "", tokenization.fingerprint(tokenizer)):
        raise UserError(f"{start.path}: it has another tokenizer than {named}; give its own with --tokenizer.path")
    if (n := tokenization.n_ids(tokenizer)) > config.model.vocab_size:
        raise UserError(
            f"tokenizer.path={named}: it has {n} tokens, but the model {config.model.vocab_size}; give that of its run"
        )
    return tokenizer


def load_model(path: str | Path) -> tuple[nnx.Module, Config]:
    """Return the model and the settings of a run (its best checkpoint) or checkpoint, as in `load`.

    The optimizer state is not read. A model without an output layer returns hidden states.
    """
    start = resume.to_use(path)
    return model_of(start, start.config()), start.config()


def model_of(start: Start, config: Config) -> nnx.Module:
    """Return the model of a checkpoint; `config` has its settings, possibly with another train.precision."""
    assert start.path is not None, "a model is loaded from a checkpoint"
    if config.task not in TASKS and config.task != BASE:
        raise UserError(
            f"{start.path}: task={config.task} is unknown here; there are {', '.join(TASKS)}; "
            "add its file and its line in TASKS (jaxlm/tasks/README.md)"
        )

    def build() -> nnx.Module:
        if config.task == BASE:
            return BaseModel(config.model, jnp.float32, nnx.Rngs(0))
        return TASKS[config.task](config).build_model(nnx.Rngs(0))

    model = nnx.eval_shape(build)
    graphdef, variables = nnx.split(model, nnx.Param)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), nnx.to_pure_dict(variables))
    if start.form == formats.RUN and configs.is_whole(start.settings()):
        params = checkpoint.read_parts(start.path, like)
    else:
        params = jax.device_put(snapshots.parts_of_file(start.path, config, tuple(like)), device)
    return nnx.merge(graphdef, params)
