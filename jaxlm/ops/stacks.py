"""Blocks whose parameters are stacked along a leading axis: how they are scanned, cut out, and rematerialized."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.config import ModelConfig
from jaxlm.parallel import is_one_device, platform

REMAT = {  # what is kept of a block for its gradients
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
    "full": jax.checkpoint_policies.nothing_saveable,
}
RunBlock = Callable[[Array, Any, int], tuple[Array, Any]]  # x, what a block has of the stacks, and its number


def rematerialized(config: ModelConfig, run_block: RunBlock) -> RunBlock:
    """Return what runs a block and keeps less for its gradients, by `model.remat`."""
    if config.remat == "none":
        return run_block
    return jax.checkpoint(run_block, policy=REMAT[config.remat], prevent_cse=False, static_argnums=2)


def is_unrolled(config: ModelConfig) -> bool:
    """Return whether a scan that has gradients is compiled block by block.

    Where one block is compiled, what all keep for their gradients is copied to stacks: a tenth of a step on a CPU, a
    fifth on a GPU. Not with rematerialization: between blocks XLA would find that it computes things twice, and keep
    them.
    """
    return config.remat == "none" and is_one_device() and platform() in ("cpu", "gpu")


def blocks_of(config: ModelConfig, stacks: Any, first: int, last: int) -> Any:
    """Return the blocks from `first` to before `last`, of stacks of the parameters of all blocks.

    Without `first_norm`, block 0 has no layernorm1: that stack begins with block 1, and `first` is at least 1.
    """

    def cut(x: Array) -> Array:
        n_missing = config.n_layers - len(x)
        return x[first - n_missing : last - n_missing]

    return stacks if (first, last) == (0, config.n_layers) else jax.tree.map(cut, stacks)


def block_of(config: ModelConfig, stacks: Any, i: int) -> Any:
    """Return one block of such stacks; block 0 gets that of block 1 where it has none, and does not use it."""
    return jax.tree.map(lambda x: x[max(i - config.n_layers + len(x), 0)], stacks)


def scan_blocks(
    config: ModelConfig,
    run_block: RunBlock,
    x: Array,
    stacks: Any,
    first: int,
    last: int,
    is_unrolled: bool = False,
) -> tuple[Array, Any]:
    """Run the blocks from `first` to before `last`; return x, and stacks of what `run_block` returns second.

    The scan is over groups of so many blocks that all groups are alike; those before the first group run one by one.
    """
    n = config.period
    n_groups = (last - max(first, int(not config.first_norm))) // n
    first_grouped = last - n_groups * n
    apart = []
    for i in range(first, first_grouped):
        x, out = run_block(x, block_of(config, stacks, i), i)
        apart.append(out)

    def run_group(x: Array, group: Any) -> tuple[Array, Any]:
        if n == 1:
            return run_block(x, group, first_grouped)
        outs = []
        for i in range(n):
            x, out = run_block(x, jax.tree.map(lambda y, i=i: y[i], group), first_grouped + i)
            outs.append(out)
        return x, jax.tree.map(lambda *ys: jnp.stack(ys), *outs)

    grouped = blocks_of(config, stacks, first_grouped, last)
    if n > 1:
        grouped = jax.tree.map(lambda y: y.reshape(-1, n, *y.shape[1:]), grouped)
    x, outs = jax.lax.scan(run_group, x, grouped, unroll=max(1, n_groups) if is_unrolled else 1)
    if n > 1:
        outs = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), outs)
    return x, jax.tree.map(lambda y, *ys: jnp.concatenate([jnp.stack(ys), y]) if ys else y, outs, *apart)
