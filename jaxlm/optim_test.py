"""Decay groups by name, AdamW against its paper in float64, Muon against definition and PyTorch, clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx, traverse_util

from jaxlm import config as configs
from jaxlm import optim
from jaxlm.config import TrainConfig
from jaxlm.tasks import TASKS

BASE = {
    "base/embedding/token/embedding": True,
    "base/blocks/layernorm1/scale": False,
    "base/blocks/layernorm1/bias": False,
    "base/blocks/attention/query/kernel": True,
    "base/blocks/attention/query/bias": False,
    "base/blocks/attention/key/kernel": True,
    "base/blocks/attention/key/bias": False,
    "base/blocks/attention/value/kernel": True,
    "base/blocks/attention/value/bias": False,
    "base/blocks/attention/output/kernel": True,
    "base/blocks/attention/output/bias": False,
    "base/blocks/layernorm2/scale": False,
    "base/blocks/layernorm2/bias": False,
    "base/blocks/feed_forward/fc1/kernel": True,
    "base/blocks/feed_forward/fc1/bias": False,
    "base/blocks/feed_forward/fc2/kernel": True,
    "base/blocks/feed_forward/fc2/bias": False,
}
NORM = {"head/layernorm/scale": False, "head/layernorm/bias": False}
LINEAR = {"head/linear/kernel": True, "head/linear/bias": False}
FINAL_NORM = {"base/final_norm/scale": False, "base/final_norm/bias": False}


@pytest.mark.parametrize(
    ("task", "settings", "expected"),
    [
        ("mlm", {}, BASE | NORM | LINEAR),
        ("gpt", {}, BASE | LINEAR),
        ("sst2", {}, BASE | LINEAR),
        ("cola", {"model.n_layers": 1}, BASE | LINEAR),
        ("mlm", {"model.tied_embedding": True}, BASE | NORM | {"head/bias": False}),
        (
            "gpt",
            {"model.positions": "learned", "model.final_norm": True, "model.tied_embedding": True},
            BASE | FINAL_NORM | {"base/embedding/position": True, "head/bias": False},
        ),
        ("sst2", {"model.segments": 2}, BASE | LINEAR | {"base/embedding/segment": True}),
        ("sst2", {"model.segments": 1}, BASE | LINEAR | {"base/embedding/segment": False}),
        # PyTorch stores a linear layer with one output as a matrix of one row, which does not decay.
        ("sst2", {"model.head_outputs": "vocabulary", "model.vocab_size": 1}, BASE | LINEAR | {
            "base/embedding/token/embedding": False, "head/linear/kernel": False
        }),
    ],
)  # fmt: skip
def test_what_decays(task: str, settings: dict[str, Any], expected: dict[str, bool]) -> None:
    sizes = {"model.vocab_size": 11, "model.d_model": 12, "model.n_heads": 3, "model.seq_len": 5}
    config = configs.build({"task": task, **sizes, **settings})
    model = nnx.eval_shape(lambda: TASKS[task](config).build_model(nnx.Rngs(0)))
    mask = optim.is_decayed(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
    found = {"/".join(part.key for part in path): value for path, value in jax.tree.leaves_with_path(mask)}
    assert found == expected


@pytest.mark.parametrize(("beta1", "beta2", "epsilon"), [(0.8, 0.95, 1e-3), (0.9, 0.999, 1e-8), (0.0, 0.999, 1e-8)])
def test_five_updates_of_adamw_follow_the_paper(beta1: float, beta2: float, epsilon: float) -> None:
    config = TrainConfig(weight_decay=0.3, beta1=beta1, beta2=beta2, epsilon=epsilon)
    random = np.random.default_rng(0)
    numbers = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    params = {"kernel": 0.1 * numbers(3, 4), "bias": 0.1 * numbers(4)}
    gradients = [{"kernel": numbers(3, 4), "bias": numbers(4)} for _ in range(5)]
    rates = [0.0, 0.05, 0.1, 0.07, 0.02]

    optimizer = optim.make_optimizer(config, lambda i: jnp.array(rates)[i], 1)
    state = optimizer.init(params)
    got = params
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, got)
        got = optax.apply_updates(got, updates)

    for name, decay in (("kernel", 0.3), ("bias", 0.0)):
        # Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with the decay scaled by the whole rate.
        weight, m, v = params[name].astype(np.float64), 0.0, 0.0
        for t in range(1, 6):
            g = gradients[t - 1][name].astype(np.float64)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            step = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)
            weight = weight - rates[t - 1] * (step + decay * weight)
        # Steps of up to 0.1, each with a few roundings of 6e-8.
        np.testing.assert_allclose(got[name], weight, rtol=0, atol=1e-7)


def test_muon_updates_the_matrices_of_blocks_and_keeps_no_second_moment_of_them() -> None:
    sizes = {"model.vocab_size": 11, "model.d_model": 12, "model.n_heads": 3, "model.seq_len": 5}
    config = configs.build({"task": "mlm", "model.head_dense": "bert", "model.positions": "learned", **sizes})
    model = nnx.eval_shape(lambda: TASKS["mlm"](config).build_model(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    optimizer = optim.make_optimizer(TrainConfig(optimizer="muon"), lambda i: 0.1, 2)
    first, second, _ = optim.moments(jax.eval_shape(optimizer.init, params))
    by_muon = [
        "/".join(x) for x in traverse_util.flatten_dict(first).keys() - traverse_util.flatten_dict(second).keys()
    ]
    attention = [f"attention/{name}" for name in ("query", "key", "value", "output")]
    names = [*attention, "feed_forward/fc1", "feed_forward/fc2"]
    assert sorted(by_muon) == sorted(f"base/blocks/{name}/kernel" for name in names)
    assert jax.tree.structure(first) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("coefficients", "low", "high"), [("newton_schulz", 0.67, 1.15), ("polar_express", 0.86, 1.13)]
)
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 12, 40), (2, 40, 12)])
def test_singular_values_come_near_one_and_vectors_stay(
    shape: tuple[int, ...], coefficients: str, low: float, high: float
) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    x[0] *= 1e-3  # each matrix has its own norm
    left, _, right = np.linalg.svd(x, full_matrices=False)
    with jax.enable_x64(True):
        got = np.asarray(optim.orthogonal(jnp.asarray(x), coefficients))
    within = left.mT @ got @ right.mT
    np.testing.assert_allclose(within, within * np.eye(within.shape[-1]), atol=1e-12)
    sizes = np.diagonal(within, axis1=-2, axis2=-1)
    # Between the extremes of the composed polynomials, for singular values that are not below a hundredth of the norm.
    assert low < sizes.min() and sizes.max() < high, sizes


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not np.any(optim.orthogonal(jnp.zeros((2, 3, 4)), "polar_express"))


@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_muon_is_that_of_pytorch_but_for_its_bfloat16(shape: tuple[int, int], scale: Any, theirs: str) -> None:
    """Four updates, each from the same weights and momentum; torch.optim.Muon computes in bfloat16 alone."""
    random = np.random.default_rng(0)
    weight = torch.zeros(shape[::-1], requires_grad=True)
    pytorch = torch.optim.Muon([weight], lr=0.1, weight_decay=0.3, adjust_lr_fn=theirs)
    ours = optim.make_optimizer(TrainConfig(optimizer="muon", muon_scale=scale, weight_decay=0.3), lambda i: 0.1, 1)
    tree: Any = {"base": {"blocks": {"fc1": {"kernel": np.zeros((1, *shape), np.float32)}}}}
    state, start = ours.init(tree), weight.detach().numpy().T.copy()
    for _ in range(4):
        gradient = random.normal(size=shape).astype(np.float32)
        weight.grad = torch.tensor(gradient.T.copy())
        pytorch.step()
        grads = jax.tree.map(lambda x, gradient=gradient: gradient[None], tree)
        updates, state = ours.update(grads, state, jax.tree.map(lambda x, start=start: start[None], tree))
        want, start = weight.detach().numpy().T - start, weight.detach().numpy().T.copy()
        got = np.asarray(jax.tree.leaves(updates)[0][0])
        # Roundings of 2^-9 in each of 15 products, which the slope of the polynomial at small values enlarges.
        assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(want)
        assert abs(np.linalg.norm(got) / np.linalg.norm(want) - 1) < 0.005


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 4.9, 5.1, 1e6])
def test_clipping_is_that_of_pytorch(max_norm: float) -> None:
    gradients = {"a": np.array([[1.0, 2.0, 2.0]], np.float32), "b": np.array([4.0, 0.0], np.float32)}  # norm 5
    parameters = [torch.nn.Parameter(torch.zeros(x.shape)) for x in gradients.values()]
    for parameter, gradient in zip(parameters, gradients.values(), strict=True):
        parameter.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clipped, got_norm = optim.clip_by_global_norm(jax.tree.map(jnp.asarray, gradients), max_norm)
    assert got_norm == pytest.approx(float(norm), rel=1e-6)
    for got, parameter in zip(clipped.values(), parameters, strict=True):
        np.testing.assert_allclose(got, parameter.grad, rtol=1e-6)


def test_a_gradient_of_zero_stays_zero() -> None:
    clipped, norm = optim.clip_by_global_norm({"a": jnp.zeros(3)}, 1.0)
    assert norm == 0 and np.all(clipped["a"] == 0)
