"""AdamW with the original's decay groups, Muon for matrices of blocks, and the original's clipping."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax import Array

from jaxlm.config import AXES, TrainConfig
from jaxlm.ops import matmul
from jaxlm.parallel import constrain
from jaxlm.params import muon


def make_optimizer(config: TrainConfig, rate: optax.Schedule, n_layers: int) -> optax.GradientTransformation:
    """Return AdamW with decoupled decay (arXiv 1711.05101, algorithm 2), or Muon; the count of updates drives the rate.

    `n_layers` are those of the model, also where some are frozen.
    """
    scale_moments = scale_by_adam(config.beta1, config.beta2, config.epsilon)

    def scale_rates(updates: optax.Updates, params: optax.Params) -> optax.Updates:
        return jax.tree.map(jnp.multiply, updates, rate_shares(params, config, n_layers))

    return optax.chain(
        scale_by_muon(config, scale_moments) if config.optimizer == "muon" else scale_moments,
        optax.add_decayed_weights(config.weight_decay, is_decayed),
        *([optax.stateless(scale_rates)] if config.layer_decay < 1 or config.optimizer == "muon" else []),
        optax.scale_by_learning_rate(rate),
    )


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Return Adam's scaling (arXiv 1412.6980, algorithm 1), with the state of optax.scale_by_adam.

    Optax's own takes 1 - 0.999**count in float32, which is off by 1.3e-5 of itself through the first updates, and
    each of their steps by half of that; PyTorch has it in float64.
    """

    def update(grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple[Any, Any]:
        count = optax.safe_increment(state.count)
        first = optax.tree.update_moment(grads, state.mu, beta1, 1)
        second = optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        # 1 - beta**count, without the cancellation.
        corrections = [-jnp.expm1(count * math.log(beta)) if beta else 1.0 for beta in (beta1, beta2)]

        def step(first: Array, second: Array) -> Array:
            return first / corrections[0] / (jnp.sqrt(second / corrections[1]) + epsilon)

        return jax.tree.map(step, first, second), optax.ScaleByAdamState(count, first, second)

    return optax.GradientTransformation(optax.scale_by_adam(beta1, beta2, epsilon).init, update)


def scale_by_muon(config: TrainConfig, others: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return Muon's update of the matrices of blocks, each layer's by itself, and `others` for all else.

    The state is that of scale_by_adam; its second moments are those of `others` alone. Not optax.contrib.muon: that
    corrects the bias of momentum and gradient, by different counts, which Keller Jordan and PyTorch leave (for random
    gradients, its second update is 9 to 18% apart from theirs), and its state has trees with gaps.
    """
    dtype = jnp.bfloat16 if config.precision == "bfloat16" else None
    beta = config.muon_momentum

    def init(params: optax.Params) -> optax.OptState:
        return optax.scale_by_adam().init(params)._replace(nu=optax.tree.zeros_like(_apart(params)[1]))

    def update(grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> tuple[Any, Any]:
        hidden, rest = _apart(grads)
        momentum, first = _apart(state.mu)
        steps, state = others.update(rest, optax.ScaleByAdamState(state.count, first, state.nu))
        momentum = optax.tree.update_moment(hidden, momentum, beta, 1)

        def step(grad: Array, momentum: Array) -> Array:
            ahead = (1 - beta) * grad + beta * momentum
            ahead = constrain(ahead, AXES)  # layers over all devices, each with whole matrices
            return muon.scale(config.muon_scale, *grad.shape[-2:]) * orthogonal(ahead, config.muon_coefficients, dtype)

        return _joined(jax.tree.map(step, hidden, momentum), steps), state._replace(mu=_joined(momentum, state.mu))

    return optax.GradientTransformation(init, update)


def orthogonal(x: Array, coefficients: str, dtype: Any = None) -> Array:
    """Return matrices [..., n_in, n_out] with their singular values brought near 1; matmuls are in `dtype`, or in x's.

    Five iterations of an odd polynomial of the fifth order, as params/muon.py has them.
    """
    multiply = functools.partial(matmul.einsum, dtype=dtype or x.dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.maximum(norm * muon.MARGIN[coefficients], muon.EPSILON)
    for a, b, c in muon.COEFFICIENTS[coefficients]:
        gram = multiply("...ik,...jk->...ij", x, x)
        x = a * x + multiply("...ij,...jk->...ik", b * gram + c * multiply("...ij,...jk->...ik", gram, gram), x)
    return x.mT if is_tall else x


def is_decayed(params: optax.Params) -> optax.Params:
    """Return which parameters decay: matrices with more than one row as PyTorch stores them, not biases or norms."""

    def decays(path: tuple, value: Array) -> bool:
        # Rank alone cannot tell: parameters of the blocks have a leading axis of layers.
        name = _names(path)[-1]
        rows = {"kernel": -1, "lora_a": -1, "lora_b": -1, "embedding": -2, "position": -2, "segment": -2}
        return name in rows and value.shape[rows[name]] > 1

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_shares(params: optax.Params, layer_decay: float, n_layers: int) -> optax.Params:
    """Return the share of the rate that each parameter has, arrays that broadcast; the head's and final norm's is 1.

    That of the top block is `layer_decay`, that of each below it again so much less, and the embedding's the least
    (BEiT, arXiv 2106.08254, appendix H). If the lowest blocks are frozen, `params` has only the others.
    """

    def share(path: tuple, value: Array) -> np.ndarray:
        part = _names(path)[:2]
        depths = [0]
        if part == ["base", "embedding"]:
            depths = [n_layers + 1]
        elif part == ["base", "blocks"]:
            depths = list(range(len(value), 0, -1))
        return np.array([layer_decay**depth for depth in depths], value.dtype).reshape(-1, *[1] * (value.ndim - 1))

    return jax.tree_util.tree_map_with_path(share, params)


def rate_shares(params: optax.Params, config: TrainConfig, n_layers: int) -> optax.Params:
    """Return the share of the rate that each parameter has, by its layer, and by Muon's rate."""

    def share(path: tuple, layer_share: np.ndarray) -> np.ndarray:
        is_hidden = config.optimizer == "muon" and muon.is_hidden(_names(path))
        return layer_share * config.muon_rate if is_hidden else layer_share

    return jax.tree_util.tree_map_with_path(share, layer_shares(params, config.layer_decay, n_layers))


def moments(opt_state: optax.OptState) -> tuple[Any, Any, Any]:
    """Return the first and the second moments, and the number of updates that they are of."""
    (adam,) = _parts(opt_state, optax.ScaleByAdamState)
    return adam.mu, adam.nu, adam.count


def with_moments(opt_state: optax.OptState, first: Any, second: Any, count: Any) -> optax.OptState:
    """Return the state with other moments."""
    return _changed(opt_state, optax.ScaleByAdamState, lambda part: part._replace(count=count, mu=first, nu=second))


def at_step(opt_state: optax.OptState, step: Any) -> optax.OptState:
    """Return the state with another number of updates made, which drives the rate."""
    return _changed(opt_state, optax.ScaleByScheduleState, lambda part: part._replace(count=step))


def _names(path: tuple) -> list[str]:
    """Return the names in a path of a tree."""
    return [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]


def _apart(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the part of a tree of parameters that Muon updates, and the rest."""
    leaves = traverse_util.flatten_dict(tree)
    hidden = {path: x for path, x in leaves.items() if muon.is_hidden(path)}
    rest = {path: x for path, x in leaves.items() if path not in hidden}
    return traverse_util.unflatten_dict(hidden), traverse_util.unflatten_dict(rest)


def _joined(hidden: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Return two parts of a tree as one."""
    return traverse_util.unflatten_dict(traverse_util.flatten_dict(hidden) | traverse_util.flatten_dict(rest))


def _parts(opt_state: optax.OptState, kind: type[Any]) -> list[Any]:
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda part: isinstance(part, kind))
    return [part for part in leaves if isinstance(part, kind)]


def _changed(opt_state: optax.OptState, kind: type[Any], change: Callable[[Any], Any]) -> optax.OptState:
    def fill(part: Any) -> Any:
        return change(part) if isinstance(part, kind) else part

    return jax.tree.map(fill, opt_state, is_leaf=lambda part: isinstance(part, kind))


def clip_by_global_norm(grads: optax.Updates, max_norm: float) -> tuple[optax.Updates, Array]:
    """Return the gradients scaled to a global norm of at most `max_norm`, and their norm before that.

    The 1e-6 is PyTorch's; optax.clip_by_global_norm has none.
    """
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda grad: grad * scale, grads), norm
