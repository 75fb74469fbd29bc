"""Blocks whose parameters are stacked along a leading axis: scan, slices, and rematerialization."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.config import ModelConfig
from jaxlm.parallel import is_one_device, platform

REMAT = {  # which activations of a block are kept for its gradients
    "dots": jax.checkpoint_policies.save_only_these_names("product"),
    "full": jax.checkpoint_policies.nothing_saveable,
}
RunBlock = Callable[[Array, Any, int], tuple[Array, Any]]  # (x, slice of the stacks, index of the block) -> (x, output)


def rematerialized(config: ModelConfig, run_block: RunBlock) -> RunBlock:
    """Return `run_block` with rematerialization as model.remat says: fewer activations are kept for gradients."""
    if config.remat == "none":
        return run_block
    return jax.checkpoint(run_block, policy=REMAT[config.remat], prevent_cse=False, static_argnums=2)


def is_unrolled(config: ModelConfig) -> bool:
    """Return whether to unroll a scan that needs gradients.

    A scan that is not unrolled copies the activations of each block to stacks for the gradients: a tenth of an update
    on a CPU, a fifth on a GPU. With rematerialization there is no unrolling, because XLA would merge the computation
    that is done twice, and keep its result after all.
    """
    return config.remat == "none" and is_one_device() and platform() in ("cpu", "gpu")


def blocks_of(config: ModelConfig, stacks: Any, first: int, last: int) -> Any:
    """Return the slice of blocks `first` to `last` - 1 from stacks of the parameters of all blocks.

    Without `first_norm`, block 0 has no layernorm1: that stack begins with block 1, and `first` is at least 1.
    """

    def cut(x: Array) -> Array:
        n_missing = config.n_layers - len(x)
        return x[first - n_missing : last - n_missing]

    return stacks if (first, last) == (0, config.n_layers) else jax.tree.map(cut, stacks)


def block_of(config: ModelConfig, stacks: Any, i: int) -> Any:
    """Return block `i` from the stacks. If block 0 has no layernorm1, it gets that of block 1 and does not use it."""
    return jax.tree.map(lambda x: x[max(i - config.n_layers + len(x), 0)], stacks)


def scan_blocks(
    config: ModelConfig, run_block: RunBlock, x: Array, stacks: Any, first: int, last: int, is_unrolled: bool = False
) -> tuple[Array, Any]:
    """Run blocks `first` to `last` - 1; return x, and the stacked second outputs of `run_block`.

    The scan is over groups of `config.period` blocks (local and global layers alternate with that period), so that one
    traced group serves all. The blocks before the first whole group run one by one.
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
