"""Rematerialization of blocks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from jaxlm.config import ModelConfig

REMAT: dict[str, list[Any]] = {  # which activations of a block are kept for its gradients
    "dots": [torch.ops.aten.mm.default, torch.ops.aten.addmm.default],
    "full": [],
}
RunBlock = Callable[..., Tensor]  # (block, x, places) -> x


def rematerialized(config: ModelConfig, run_block: RunBlock) -> RunBlock:
    """Return `run_block` with rematerialization as model.remat says: fewer activations are kept for gradients."""
    if config.remat == "none" or not torch.is_grad_enabled():
        return run_block
    kept = functools.partial(create_selective_checkpoint_contexts, REMAT[config.remat])
    return functools.partial(checkpoint, run_block, use_reentrant=False, context_fn=kept)
