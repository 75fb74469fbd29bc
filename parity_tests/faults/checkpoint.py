"""Faults of conversion: weights that torchlm or the original has stored, as jaxlm's parameters."""

from parity_tests.faults.planting import both, edit
from parity_tests.faults.targets import to_jax

MLM = "batch 0 of mlm"

FAULTS = [
    *both(
        "square kernels as they are: conversion transposes only weights that do not fit otherwise",
        MLM,
        edit(to_jax, ("_x.T if _is_kernel else _x", "_x.T if _is_kernel and len(set(_x.shape)) > 1 else _x")),
        None,
    ),
    *both(
        "blocks reversed: conversion stacks the blocks from the last",
        MLM,
        edit(to_jax, ("sorted(_blocks)", "sorted(_blocks, reverse=True)")),
        None,
    ),
]
