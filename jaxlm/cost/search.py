"""Candidate settings for a plan: the combinations of a sweep, and similar ones that fit.

Each is compiled by compile_ahead.py in a separate process. This file imports no framework, because only one process at
a time can use a local TPU.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.cost import roofline
from jaxlm.cost.roofline import LOCAL, Step
from jaxlm.errors import UserError, outside

SWEPT = ("mesh", "batch", "remat")
VOCABULARIES = {"openai-community/gpt2": 50257, "google-bert/bert-base-uncased": 30522}  # known without the hub
Change = dict[str, Any]  # setting -> value


def with_vocab_size(config: Config) -> Config:
    """Return the settings with the vocabulary size of their tokenizer; an upper bound if it is not trained yet."""
    if config.model.vocab_size:
        return config
    n = config.tokenizer.vocab_size
    if config.tokenizer.path in VOCABULARIES:
        n = VOCABULARIES[config.tokenizer.path]
    elif config.tokenizer.path:
        from jaxlm.data import tokenization  # slow to import

        n = tokenization.n_ids(tokenization.read(config.tokenizer))
    return configs.replace(config, "model.vocab_size", n)


def measure(config: Config, topology: str) -> Step:
    """Return the step of compile_ahead.measure, run in another process. Raises UserError, also if that crashes."""
    env = dict(os.environ)
    if topology != LOCAL:
        env |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    asked = json.dumps({"settings": configs.flat(config), "topology": topology})
    command = [sys.executable, "-m", "jaxlm.cost.compile_ahead"]
    done = subprocess.run(command, input=asked, env=env, text=True, capture_output=True)
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line or "***" in line), "")
        raise UserError(
            outside(RuntimeError(last))
            or f"the step could not be compiled for {topology} (exit status {done.returncode}): {last or 'no reason'}"
        ) from None
    if "error" in result:
        raise UserError(result["error"])
    return roofline.of_json(result)


def measured(tried: Sequence[Config], topology: str) -> Iterator[tuple[Config, Step | UserError]]:
    """Yield settings with their steps, or with an error, in order."""

    def one(config: Config) -> Step | UserError:
        try:
            return measure(config, topology)
        except UserError as error:
            return error

    with ThreadPoolExecutor(n_workers(topology)) as pool:
        yield from zip(tried, pool.map(one, tried), strict=True)


def n_workers(topology: str) -> int:
    """Return how many steps are compiled in parallel."""
    return 1 if topology == LOCAL else os.cpu_count() or 1


def n_devices(topology: str) -> int:
    """Return the number of devices of a topology."""
    if topology != LOCAL:
        return roofline.named(topology)[1]
    program = "from jaxlm.errors import reported\nwith reported(False):\n import jax\n print(jax.device_count())"
    counted = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if counted.returncode:
        raise UserError(counted.stderr.splitlines()[-1].removeprefix("error: "))
    return int(counted.stdout.splitlines()[-1])


def candidates(config: Config, n_devices: int, swept: Sequence[str]) -> Iterator[Config]:
    """Yield all combinations of the swept settings; all have the same number of samples per update."""
    n_samples = config.train.batch_size * config.train.accumulate
    choices: dict[str, list[Change]] = {
        "mesh": list(_meshes(config, n_devices)),
        "batch": [_batch(n_samples, 2**i) for i in range(8) if n_samples % 2**i == 0],
        "remat": [{"model.remat": name} for name in ("none", "dots", "full")],
    }
    yield from _possible(config, n_devices, itertools.product(*(choices[name] for name in SWEPT if name in swept)))


def nearer(config: Config, n_devices: int) -> Iterator[Config]:
    """Yield settings that need less memory, those with the fewest changes first."""
    n_samples, accumulate = config.train.batch_size * config.train.accumulate, config.train.accumulate
    dots, full = {"model.remat": "dots"}, {"model.remat": "full"}
    fsdp = {"mesh.data": -1, "mesh.fsdp": n_devices // max(config.mesh.tensor, 1)}
    halves = [_batch(n_samples, accumulate * 2**i) for i in (1, 2, 3) if n_samples % (accumulate * 2**i) == 0]
    changes: list[list[Change]] = [[dots]] if config.model.remat != "full" else []
    changes += [[full], *([half] for half in halves[:1]), [fsdp], [full, fsdp]]
    for half in halves:
        changes += [[full, half], [full, fsdp, half]]
    yield from (candidate for candidate in _possible(config, n_devices, changes) if candidate != config)


def changes(config: Config, other: Config) -> str:
    """Return the command-line options that change `config` to `other`."""
    before, after = configs.flat(config), configs.flat(other)
    return " ".join(f"--{name.replace('_', '-')} {after[name]}" for name in after if after[name] != before[name])


def _meshes(config: Config, n_devices: int) -> Iterator[Change]:
    """Yield meshes: data parallel, fsdp in groups of 8, and full fsdp, each with tensor 1, 2 and 4."""
    for tensor in (1, 2, 4):
        rest = n_devices // tensor
        splits = n_devices % tensor == 0 and config.model.vocab_size % tensor == 0
        for fsdp in sorted({1, min(8, rest), rest}) if splits else ():
            if rest % fsdp == 0 and config.model.d_model % fsdp == 0:
                yield {"mesh.data": rest // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def _batch(n_samples: int, accumulate: int) -> Change:
    return {"train.batch_size": n_samples // accumulate, "train.accumulate": accumulate}


def _possible(config: Config, n_devices: int, tried: Iterable[Iterable[Change]]) -> Iterator[Config]:
    """Yield the distinct settings after each series of changes whose mesh fits the devices."""
    seen: list[Config] = []
    for series in tried:
        candidate = config
        for name, value in itertools.chain.from_iterable(change.items() for change in series):
            candidate = configs.replace(candidate, name, value)
        try:
            configs.mesh_sizes(candidate, n_devices)
        except UserError:
            continue
        if candidate not in seen:
            seen.append(candidate)
            yield candidate
