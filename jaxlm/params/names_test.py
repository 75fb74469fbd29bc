"""The three sets of names against the real models, the recorded original, and each other."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlm import config as configs
from jaxlm import optim
from jaxlm.config import Config
from jaxlm.errors import UserError
from jaxlm.params import names
from jaxlm.tasks import TASKS, parameters
from torchlm.original import from_original, to_original

CASES = Path(__file__).parents[2] / "parity_tests" / "cases"
OPTIONS = [
    {},
    {"model.positions": "learned", "model.tied_embedding": True, "model.post_norm": True},
    {"model.positions": "rotary", "model.final_norm": True, "model.head_outputs": "vocabulary"},
    {"model.embedding_norm": True, "model.head_dense": "bert", "model.segments": 2},
    {"model.head_dense": "modernbert", "model.biases": "none", "model.pooling": "mean", "model.classifier_bias": False},
    {"model.head_dense": "eurobert", "model.biases": "none", "model.pooling": "late", "model.output_bias": False},
    {"model.head_dense": "ultrabert", "model.head_hidden": 7, "model.biases": "none", "model.output_bias": False},
]


def config_of(task: str, **settings: object) -> Config:
    sizes = {"vocab_size": 11, "d_model": 12, "n_heads": 3, "seq_len": 5, "n_layers": 2}
    return configs.build({"task": task, **{f"model.{name}": value for name, value in sizes.items()}, **settings})


def tree_of(config: Config) -> dict:
    """Return random parameters of jaxlm's model, without building it."""
    task = TASKS[config.task](config)
    shapes = nnx.eval_shape(lambda: nnx.to_pure_dict(nnx.split(task.build_model(nnx.Rngs(0)), nnx.Param)[1]))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: random.standard_normal(x.shape).astype(x.dtype), shapes)


def assert_same_tree(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("task, options", list(itertools.product(TASKS, OPTIONS)))
def test_names_and_shapes_are_those_of_the_model_and_every_way_back_is_equal(task: str, options: dict) -> None:
    config = config_of(task, **options)
    tree = tree_of(config)
    state = names.check(names.to_torch(tree), parameters.shapes(config), "tree")
    assert_same_tree(names.to_jax(state), tree)
    back = from_original(to_original(state, parameters.prefixes(task)), parameters.prefixes(task))
    assert list(back) == list(state)
    assert all(back[name] is array for name, array in state.items())
    assert all(array.flags.c_contiguous for array in state.values())


def test_kernels_are_transposed_and_blocks_taken_apart() -> None:
    tree = tree_of(config_of("gpt"))
    state = names.to_torch(tree)
    fc1 = tree["base"]["blocks"]["feed_forward"]["fc1"]["kernel"]
    np.testing.assert_array_equal(state["base.blocks.1.feed_forward.fc1.weight"], fc1[1].T)
    np.testing.assert_array_equal(state["base.embedding.token.weight"], tree["base"]["embedding"]["token"]["embedding"])


def test_twelve_blocks_keep_their_order() -> None:
    config = configs.replace(config_of("gpt"), "model.n_layers", 12)
    tree = tree_of(config)
    state = names.to_torch(tree)
    assert_same_tree(names.to_jax(dict(sorted(state.items()))), tree)  # in the order of text: 0, 1, 10, 11, 2 ...


@pytest.mark.parametrize("task", ["mlm", "gpt", "sst2", "cola"])
def test_names_of_the_recorded_original(task: str) -> None:
    recorded = np.load(CASES / task / "arrays.npz")
    arrays = {name.removeprefix("init/"): recorded[name] for name in recorded if name.startswith("init/")}
    sizes = json.loads((CASES / task / "case.json").read_text())
    sizes = {f"model.{name}": sizes[name] for name in ("vocab_size", "d_model", "n_layers", "seq_len")}
    config = config_of(task, **sizes, **{"model.head_outputs": "vocabulary"})
    state = from_original(arrays, parameters.prefixes(task))
    assert list(names.check(state, parameters.shapes(config), task)) == list(state)  # in model order, too
    back = to_original(state, parameters.prefixes(task))
    # Left out: the position table, and the future masks of gpt.
    assert {name.rpartition(".")[2] for name in arrays.keys() - back.keys()} <= {"pe", "bias"}
    assert len(arrays) - len(back) == 1 + (config.model.n_layers if task == "gpt" else 0)
    assert all(back[name] is arrays[name] for name in back)


def test_missing_extra_and_misshaped_tensors_are_named_with_their_shapes() -> None:
    config = config_of("mlm")
    state = names.to_torch(tree_of(config))
    state["head.extra.weight"] = state.pop("head.layernorm.weight")[:7]
    state["base.blocks.1.feed_forward.fc1.weight"] = state["base.blocks.1.feed_forward.fc1.weight"].T
    with pytest.raises(UserError) as error:
        names.check(state, parameters.shapes(config), "weights.pt")
    assert str(error.value) == (
        "weights.pt: weights of another model: head.layernorm.weight [12] is missing; head.extra.weight [7] is not in "
        "the model; base.blocks.1.feed_forward.fc1.weight has the shape [12, 48], but the model needs [48, 12]"
    )


def test_a_model_of_another_size_is_told_in_a_line_of_bearable_length() -> None:
    config = config_of("mlm")
    with pytest.raises(UserError, match="; and 30 more$"):
        names.check(
            names.to_torch(tree_of(config)), parameters.shapes(configs.replace(config, "model.d_model", 15)), "x"
        )


def test_unknown_names_of_an_original_file_stay_for_the_check_to_tell() -> None:
    arrays = {"bert.encoder_blocks.0.gate.weight": np.zeros(3), "other": np.zeros(2)}
    state = from_original(arrays, parameters.prefixes("mlm"))
    assert set(state) == {"base.blocks.0.gate.weight", "other"}


@pytest.mark.parametrize("options", OPTIONS)
def test_decay_groups_are_those_of_the_optimizer(options: dict) -> None:
    config = config_of("mlm", **options)
    tree = tree_of(config)
    mask = jax.tree.map(lambda x, is_decayed: np.full(x.shape, is_decayed), tree, optim.is_decayed(tree))
    decayed = {name for name, array in names.to_torch(mask).items() if array.all()}
    groups = names.decay_groups(parameters.shapes(config))
    assert set(groups[0]) == decayed
    assert groups[0] + groups[1] == sorted(parameters.shapes(config), key=lambda name: name not in decayed)
