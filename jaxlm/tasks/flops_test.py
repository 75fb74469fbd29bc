"""Peak rates by device name, and model flops against counts by hand and XLA's own count."""

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import loop, parallel
from jaxlm.data import samples
from jaxlm.runtime.chips import chip
from jaxlm.tasks import TASKS, flops

SIZES = {"vocab_size": 30, "d_model": 12, "n_layers": 1, "n_heads": 3, "seq_len": 20, "dropout": 0.0}


def settings(task: str) -> configs.Config:
    sizes = {f"model.{name}": value for name, value in SIZES.items()}
    return configs.build({"task": task, "train.batch_size": 2, "train.accumulate": 1, **sizes})


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("TPU v2", "TPU v2"),
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 SXM 16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_chips_are_known_by_the_names_that_jax_has_for_them(device_kind: str, name: str) -> None:
    found = chip(device_kind)
    assert found is not None and found.name == name


def test_what_is_not_in_the_table_is_not_guessed() -> None:
    assert [chip(kind) for kind in ("cpu", "NVIDIA L40", "NVIDIA GeForce GT430", "TPU v9", "TPU v4 lite")] == [None] * 5


def test_rates_of_tpus_are_those_that_jax_has_for_its_kernels() -> None:
    from jax._src.pallas.mosaic import tpu_info

    for kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        version, ours = tpu_info.chip_version_from_device_kind(kind), chip(kind)
        assert version is not None and ours is not None
        theirs = tpu_info.get_tpu_info_for_chip(version, 1)
        n_cores = 2 if kind in ("TPU v4", "TPU v5") else 1  # one device of two cores
        # The old pages are lower by as much; JAX has v5p's memory slower than the page.
        assert ours.flops == pytest.approx(n_cores * theirs.bf16_ops_per_second, rel=0.13), kind
        assert ours.hbm_bytes_per_s == pytest.approx(n_cores * theirs.mem_bw_bytes_per_second, rel=0.2), kind
        assert ours.hbm_bytes == pytest.approx(n_cores * theirs.hbm_capacity_bytes, rel=0.08), kind


def test_flops_of_a_model_are_those_counted_by_hand() -> None:
    # BERT base: 12 layers of 12 d^2 parameters in products, d 768, 512 positions, 76 of them masked.
    values = {"model.d_model": 768, "model.n_layers": 12, "model.seq_len": 512, "model.vocab_size": 30522}
    config = configs.build({"task": "mlm", **values})
    weights, attention, logits = 2 * 512 * 84_934_656, 12 * 4 * 512 * 512 * 768, 2 * 76 * 768 * 30_522
    assert flops.forward_flops(config) == weights + attention + logits
    config = configs.build({"task": "mlm", **values, "train.batch_size": 32, "train.accumulate": 8})
    assert flops.flops_per_update(config) == 256 * 3 * (weights + attention + logits)
    # Logits at every position; at one, over two classes.
    assert flops.forward_flops(configs.build({**values, "task": "gpt"})) == weights + attention + 2 * 512 * 768 * 30_522
    assert flops.forward_flops(configs.build({**values, "task": "sst2"})) == weights + attention + 2 * 768 * 2


def test_flops_of_a_gated_model_are_those_counted_by_hand() -> None:
    values = {"model.d_model": 64, "model.n_layers": 3, "model.seq_len": 16, "model.vocab_size": 100}
    gated = {"task": "gpt", **values, "model.mlp": "swiglu", "model.d_ff": 96}
    weights, attention, logits = 2 * 16 * 3 * (4 * 64 * 64 + 3 * 64 * 96), 3 * 4 * 16 * 16 * 64, 2 * 16 * 64 * 100
    assert flops.forward_flops(configs.build(gated)) == weights + attention + logits
    # Four heads of queries of 32 dimensions and one of keys; one layer of three is global, the others see 3 positions.
    shared = gated | {"model.n_heads": 4, "model.n_kv_heads": 1, "model.head_dim": 32}
    weights_of_shared = weights + 2 * 16 * 3 * 64 * (2 * 128 + 2 * 32 - 4 * 64)
    assert flops.forward_flops(configs.build(shared)) == weights_of_shared + 2 * attention + logits
    local = shared | {"model.window": 3, "model.global_every": 3}
    for task, n_pairs in (("gpt", 16 + 13 * 3 + 2 + 1), ("mlm", 16 + 2 * (13 * 3 + 2 + 1))):
        config = configs.build(local | {"task": task, "data.mask_fraction": 0.99})
        n_logits = flops.n_logits(config)[0]
        pairs = 4 * 128 * (16 * 16 + 2 * n_pairs)
        assert flops.forward_flops(config) == weights_of_shared + pairs + 2 * n_logits * 64 * 100
    adapters = 2 * 16 * 3 * 4 * (64 + 96)
    adapted = configs.build(gated | {"model.lora_rank": 4, "model.lora_products": "up"})
    assert flops.forward_flops(adapted) == weights + attention + logits + adapters


@pytest.mark.parametrize("task", ["mlm", pytest.param("gpt", marks=pytest.mark.slow)])
def test_flops_are_those_that_xla_counts_in_the_products_of_an_update(task: str) -> None:
    """XLA counts elementwise work as well; only products grow with the square of the width."""
    counts = []
    for d_model in (48, 96, 192):
        config = configs.replace(settings(task), "model.d_model", d_model)
        fresh, compiled = loop.build(config, TASKS[task](config), parallel.make_mesh(config, jax.devices()[:1]))
        labels = np.zeros((2, flops.n_logits(config)[0]), np.int32)
        batch = {"tokens": np.zeros((2, 20), np.int32), "labels": labels}
        if task == "mlm":
            batch["positions"] = labels

        def loss(params, compiled=compiled, batch=batch):  # type: ignore[no-untyped-def]
            return compiled.totals(params, batch)["loss"]

        cost = jax.jit(jax.grad(loss)).lower(jax.eval_shape(fresh).params).cost_analysis()
        counts.append((cost["flops"], flops.flops_per_update(config)))
    (a, x), (b, y), (c, z) = counts
    # f(4w) - 3 f(2w) + 2 f(w) is 6 a w^2 for f(w) = a w^2 + b w + c.
    assert c - 3 * b + 2 * a == pytest.approx(z - 3 * y + 2 * x, rel=1e-3)


def test_masked_positions_are_as_many_as_the_samples_have() -> None:
    config, specials = settings("mlm"), {"pad": 0, "mask": 1, "start": 2, "end": 3}
    split = samples.Split(np.arange(4, 30), np.array([0, 26]), np.array([-1]), np.array([60]))
    batch = samples.MaskedSamples(split, config, specials, 30).batch(np.array([0]), np.array([0]))
    assert batch["labels"].shape == (1, flops.n_logits(config)[0])
