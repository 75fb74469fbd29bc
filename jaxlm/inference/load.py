"""A trained model as the commands have it that use one: weights without those of the optimizer, settings, tokenizer."""

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
from jaxlm.config import BASE, Config, TokenizerConfig
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
    """A model, and what it needs to be used. `model` is what `task.build_model` makes."""

    start: Start  # the checkpoint, and what it tells of itself
    config: Config
    task: Task  # None, without an output layer
    tokenizer: Tokenizer
    model: Any

    def has_probabilities(self) -> bool:
        """Return whether the softmax of the logits is of the labels, which it is not with fewer outputs than labels."""
        is_classifier = parameters.model_kind(self.config.task) == "classifier"
        is_short = is_classifier and flops.n_logits(self.config)[1] < self.config.data.n_classes
        return self.task.has_probabilities and not is_short

    def __str__(self) -> str:
        return f"{self.start.path} (task {self.config.task}, step {self.start.info['step']:,})"


@slow("loading the model")
def load(source: str | Path, tokenizer: str = "", precision: str = "", needs_output: bool = True) -> LoadedModel:
    """Return the model of a run (its best checkpoint) or of one checkpoint, in any form that jaxlm.convert reads.

    `tokenizer` is a path as in tokenizer.path; "": that of the run. `precision` is as in train.precision; "": that of
    the run. Raises UserError, also for a model without an output layer if that is needed.
    """
    found = resume.to_use(source)
    config = found.config()
    if config.task == BASE and needs_output:
        raise UserError(no_output(found))
    if precision:
        config = configs.replace(config, "train.precision", precision)
    read = _tokenizer(found, config, tokenizer)
    backend.configure(config)
    model = model_of(found, config)
    task: Any = None if config.task == BASE else TASKS[config.task](config, found.classes())
    return LoadedModel(found, config, task, read, model)


def no_output(found: Start) -> str:
    """Return what can be done with a model without an output layer."""
    name = shlex.quote(str(found.path))
    return (
        f"{found.path}: it has no output layer; train one with {command('train')} --task TASK --init-from {name}, "
        f"see its attention with {command('serve')} --checkpoint {name}, or convert it with {command('convert')}"
    )


def _tokenizer(found: Start, config: Config, named: str) -> Tokenizer:
    assert found.path is not None, "nothing was found"
    own = (found.run or found.path.parent.parent) / "tokenizer.json"
    if not named and found.is_public():
        named = config.tokenizer.path
    elif not named and not storage.is_remote(own) and own.is_file():
        named = str(own)
    if not named:
        raise UserError(f"{found.path}: there is no tokenizer.json of its run; give it with --tokenizer.path")
    # What has no tokenizer.json of its own may have a vocab.txt, where case is a setting.
    read = tokenization.read(TokenizerConfig(path=named, lowercase=config.tokenizer.lowercase))
    wanted = found.info["tokenizer"]
    if wanted and wanted != tokenization.fingerprint(read):
        raise UserError(f"{found.path}: its tokenizer is another than {named}; give its own with --tokenizer.path")
    if (n := tokenization.n_ids(read)) > config.model.vocab_size:
        raise UserError(
            f"tokenizer.path={named}: it has {n} tokens, but the model {config.model.vocab_size}; give that of its run"
        )
    return read


def load_model(path: str | Path) -> tuple[nnx.Module, Config]:
    """Return the model of a checkpoint, of any form that jaxlm.convert reads, and its settings.

    A run has that of its best checkpoint. Nothing of jaxlm's optimizer is read. A model without an output layer returns
    hidden states.
    """
    found = resume.to_use(path)
    return model_of(found, found.config()), found.config()


def model_of(found: Start, config: Config) -> nnx.Module:
    """Return the model of a checkpoint that was found; `config` has its settings, but for train.precision, say."""
    assert found.path is not None, "nothing was found"
    if config.task not in TASKS and config.task != BASE:
        raise UserError(
            f"{found.path}: task={config.task} is unknown here; there are {', '.join(TASKS)}; "
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
    if found.form == formats.RUN and configs.is_whole(found.settings()):
        params = checkpoint.restored(found.path, like)
    else:
        params = jax.device_put(snapshots.parts_of_file(found.path, config, tuple(like)), device)
    return nnx.merge(graphdef, params)
