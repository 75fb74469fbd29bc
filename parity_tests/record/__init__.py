"""Records what a training run computes, in PyTorch or in JAX, so that `parity_tests.compare` can compare two runs.

    with record.torch(model, optimizer) as a:      # the training loop as it is
        train()
    with record.jax(model) as b:                   # NNX, Linen, Equinox, or None: a function that calls record.tag
        for batch in batches:
            ...                                    # jitted or not
            b.step(loss=loss, grads=grads, params=params, state=opt_state, rate=rate)

files.py         the format, its writer and its reader        sketch.py     what is kept of large arrays
torch_hooks.py   hooks on modules and optimizer               recorder.py   what both recorders have in common
jax_taps.py      taps in jitted functions and scans

Only NumPy and the framework that is recorded are imported, and of jaxlm what imports neither.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity_tests.record.files import Record, read, record_of
from parity_tests.record.recorder import WHOLE

if TYPE_CHECKING:
    from parity_tests.record.jax_taps import JaxRecorder
    from parity_tests.record.torch_hooks import TorchRecorder

__all__ = ["Record", "jax", "read", "tag", "torch"]


def torch(
    model: Any, optimizer: Any = None, path: Path | str | None = None, whole: int = WHOLE, masks: Any = None
) -> "TorchRecorder":
    """Return a recorder of a torch.nn.Module, to be used as a context.

    `masks` is a record of JAX, its recorder or its folder: dropout drops what it dropped there, in the same order.

    `path` is the folder of the record (default: one that is removed at the end). Of arrays of more than `whole`
    elements, a sketch is kept.
    """
    from parity_tests.record.torch_hooks import TorchRecorder

    return TorchRecorder(model, optimizer, path, whole, None if masks is None else record_of(masks))


def jax(model: Any = None, path: Path | str | None = None, whole: int = WHOLE, params: Any = None) -> "JaxRecorder":
    """Return a recorder of a model of NNX, Linen or Equinox, or of functions that call `tag`; as `torch`.

    `params` are the start values; NNX and Equinox have theirs in the model.
    """
    from parity_tests.record.jax_taps import JaxRecorder

    return JaxRecorder(model, path, whole, params)


def tag(name: str, x: Any) -> Any:
    """Return an array of JAX, and record it where a recorder is open; inside jit, grad, vmap and scan as well."""
    from parity_tests.record import jax_taps

    return jax_taps.tag(name, x)
