"""Compare a port of your own: a small classifier, in PyTorch and in Flax, that has nothing to do with jaxlm.

    python scripts/compare_own_port.py FOLDER

Trains both for 20 updates from the same weights, writes FOLDER/torch.npz, FOLDER/flax.npz and FOLDER/names.json, and
runs `python -m parity_tests.compare` on them. For your own port, write such files from your two training loops.
"""

import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from parity_tests.compare import command
from parity_tests.compare.arrays import renamed

N_UPDATES, RATE = 20, 0.01
# What a tensor of the first file is called in the second, and which of its axes go where.
NAMES = {
    r"(\d)\.weight": {"name": r"layers_\1/kernel", "axes": [1, 0]},
    r"(\d)\.bias": r"layers_\1/bias",
}
Run = dict[str, Any]  # arrays by name


def of_torch(model: torch.nn.Module, inputs: np.ndarray, labels: np.ndarray) -> Run:
    """Return the logits, first gradients, losses and final weights of a run in PyTorch."""
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    run, losses = {"logits0": model(x[0]).detach().numpy()}, []
    run |= {f"start/{name}": p.detach().numpy().copy() for name, p in model.named_parameters()}
    for i in range(N_UPDATES):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[i]), y[i])
        loss.backward()
        if i == 0:
            run |= {
                f"grad0/{name}": p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None
            }
        optimizer.step()
        losses.append(loss.item())
    weights = {f"weights/{name}": p.detach().numpy() for name, p in model.named_parameters()}
    return run | weights | {"loss": np.array(losses)}


def of_flax(params: dict, inputs: np.ndarray, labels: np.ndarray) -> Run:
    """Return the same of a run in Flax."""
    model = linen.Sequential([linen.Dense(16), linen.relu, linen.Dense(5)])
    optimizer = optax.adam(RATE)

    def loss(params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    gradient, state, losses = jax.jit(jax.value_and_grad(loss)), optimizer.init(params), []
    run = {"logits0": np.asarray(model.apply({"params": params}, inputs[0])), **_flat("start", params)}
    for i in range(N_UPDATES):
        value, grads = gradient(params, inputs[i], labels[i])
        if i == 0:
            run |= _flat("grad0", grads)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    return run | _flat("weights", params) | {"loss": np.array(losses)}


def _flat(kind: str, tree: dict) -> Run:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {f"{kind}/{'/'.join(part.key for part in path)}": np.asarray(x) for path, x in leaves}


def main(folder: Path) -> int:
    """Train both, write their runs, and compare them; return the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    inputs = random.normal(size=(N_UPDATES, 32, 7)).astype(np.float32)
    labels = random.integers(0, 5, (N_UPDATES, 32))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    weights = {f"/{name}": p.detach().numpy().copy() for name, p in model.named_parameters()}
    start: dict = {}
    for name, x in renamed(weights, NAMES).items():  # the same rules carry the start weights over
        _, layer, kind = name.split("/")
        start.setdefault(layer, {})[kind] = jnp.asarray(x)
    np.savez(folder / "torch.npz", **of_torch(model, inputs, labels))
    np.savez(folder / "flax.npz", **of_flax(start, inputs, labels))
    (folder / "names.json").write_text(json.dumps(NAMES, indent=1))
    return command.main(
        [str(folder / name) for name in ("torch.npz", "flax.npz")] + ["--names", str(folder / "names.json")]
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
