"""The parameters of a task's model: names, shapes, and what the original calls them."""

import functools

from jaxlm.config import BASE, GLUE, Config
from jaxlm.errors import UserError
from jaxlm.params import names
from jaxlm.params.names import Prefixes, Shapes
from jaxlm.tasks import TASKS, Task

# Tasks whose models heads.py has; those of other tasks are built to look.
BUILT_IN = ("mlm", "gpt", "sst2", "cola", "pairs", "tag", "embed", "classify", "multilabel", "regress", *GLUE)


def model_kind(task: str) -> str:
    """Return "masked" or "causal" for a language model with outputs for the vocabulary, "tagger", "embedder", BASE, or
    else "classifier".
    """
    return BASE if task == BASE else TASKS[task].samples.model_kind if task in TASKS else "classifier"


def n_outputs(config: Config) -> int:
    """Return how many outputs a classifier has for a text: one for each class, or one that is the predicted number."""
    return 1 if config.task in TASKS and TASKS[config.task].samples.reads == "values" else config.data.n_classes


def prefixes(task: str) -> Prefixes:
    """Return what the original's names of the base model and of the head begin with."""
    return TASKS[task].original_prefixes if task in TASKS else Task.original_prefixes


def shapes(config: Config) -> Shapes:
    """Return torchlm's name and shape of every parameter of the task's model, in model order."""
    known = names.shapes(config, model_kind(config.task), n_outputs(config))
    if config.task in BUILT_IN or config.task not in TASKS:
        return known
    built = _built_shapes(config)
    return {name: built[name] for name in (*(x for x in known if x in built), *(x for x in built if x not in known))}


@functools.cache
def _built_shapes(config: Config) -> Shapes:
    """Return the names and shapes of the parameters of the model that a user's task builds."""
    from flax import nnx

    model = nnx.eval_shape(lambda: TASKS[config.task](config).build_model(nnx.Rngs(0)))
    try:
        return names.shapes_of_tree(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    except UserError as error:
        raise UserError(f"task={config.task}: {error}") from error
