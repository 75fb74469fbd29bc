"""The command `python -m jaxlm.convert`: a training state from one form of file into another, with every bit kept.

formats.py says what the forms are. `read` and `write` are for programs.
"""

import argparse
import contextlib
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm import terminal
from jaxlm.config import Config, TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.errors import UserError, nearest, reported, slow
from jaxlm.io import storage, utf8
from jaxlm.params import names
from jaxlm.params.names import Arrays
from jaxlm.tasks import parameters
from jaxlm.weights import formats, huggingface
from jaxlm.weights.formats import CHECKPOINT_1_2, RUN, SAFETENSORS, STATE_DICT, Snapshot, Stored

TABLE = "base.embedding.token.weight"


def main(argv: list[str] | None = None) -> int:
    """Convert or inspect as the command line says; return the exit status. Bad input exits with 2."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave an accelerator to who trains on it
    with reported(debug=False):
        args = _parse(sys.argv[1:] if argv is None else argv)
        if args.inspect:
            inspect(load(huggingface.find(args.inspect)))
        else:
            config = configs.load(["--config", args.config])[0] if args.config else None
            _convert(huggingface.find(args.source), Path(args.target), config, args.state_dict, args.family)
    return 0


def read(path: Path, config: Config | None = None) -> Snapshot:
    """Return the training state in a file or folder; `config` is that of a file of bare weights.

    Raises UserError if it cannot be read, or if its tensors are not those of the model that its settings tell.
    """
    return _snapshot(load(path), config)


@slow("writing the model")
def write(path: Path, snapshot: Snapshot, form: str, tokenizer: Tokenizer | None = None) -> None:
    """Write a training state in a form of formats.py. Raises UserError if `path` exists or cannot be written.

    With the form of a model of transformers, its weights alone; `tokenizer` is that of a folder.

    Under its name there is never half of one.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: is there already; give a new name, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: the folder {path.absolute().parent} does not exist; make it first")
    if form in (CHECKPOINT_1_2, STATE_DICT):
        formats.need_torch(path)
    n_bytes = sum(array.nbytes for array in snapshot.weights.values()) * (1 if snapshot.moments is None else 3)
    n_free = shutil.disk_usage(path.absolute().parent).free
    if n_free < n_bytes:
        raise UserError(f"{path}: needs {n_bytes / 1e6:,.1f} MB, but {n_free / 1e6:,.1f} MB are free; free some space")
    temporary = path.with_name(f".jaxlm.{os.getpid()}.tmp")
    try:
        if form.startswith(formats.TRANSFORMERS):
            huggingface.write(
                temporary, snapshot, huggingface.FAMILIES[form.removeprefix(formats.TRANSFORMERS)], tokenizer
            )
        else:
            formats.WRITERS[form](temporary, snapshot)
        if form == RUN and tokenizer is not None:
            tokenization.save(tokenizer, temporary / "tokenizer.json")
        temporary.rename(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {formats.reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()


def merged(snapshot: Snapshot) -> Snapshot:
    """Return a training state whose adapters, if there are any, are part of the weights. These have no moments."""
    config = snapshot.config
    if not config.model.lora_rank:
        return snapshot
    weights = names.merged(config.model, snapshot.weights)
    return Snapshot(configs.replace(config, "model.lora_rank", 0), snapshot.info, weights, None, 0)


@slow("reading the model")
def load(path: Path) -> Stored:
    """Return what is in a file or folder, its form told by its content. Raises UserError if it is of none."""
    if path.is_dir():
        return huggingface.load(path) if huggingface.is_model(path) else formats.load_run(path)
    try:
        with open(path, "rb") as file:
            start = file.read(utf8.START)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if start[4:9] == b"\0\0\0\0{":  # behind the length of the header, whose first byte is any
        return formats.load_safetensors(path)
    if start.startswith((b"PK", b"\x80")):  # a zip archive, or the bare pickle of old
        return formats.load_torch(path)
    if why := utf8.stand_in(start):
        raise UserError(f"{path}: is {why}")
    raise UserError(
        f"{path}: neither a file of torch.save nor safetensors, nor the folder of a jaxlm run; give one of these"
    )


def inspect(stored: Stored) -> None:
    """Print what is in a file or folder: what it tells of itself, parameters by part, and a table of its tensors."""
    from rich.table import Table

    from jaxlm.training.log import Console

    is_plain = not sys.stdout.isatty()
    console = Console()
    console.print(f"{stored.path}: {stored.form}")
    for key in ("format", "task", "step", "rate"):
        console.print(f"{key:<10}  {stored.info.get(key, 'not told')}")
    counts: dict[str, int] = {}
    for name, array in stored.weights.items():
        words = name.split(".")
        part = ".".join(words[:2] if words[0] == "base" else words[:1])
        counts[part] = counts.get(part, 0) + array.size
    parts = ", ".join(f"{part} {n:,}" for part, n in counts.items())
    console.print(f"parameters  {sum(counts.values()):,}: {parts}")

    table = Table("name", "shape", "dtype", box=None if is_plain else Table().box, pad_edge=not is_plain)
    table.add_column("norm", justify="right")
    # Weights first.
    for name, array in sorted(formats.leaves(stored.tree), key=lambda leaf: leaf[0].startswith("opt")):
        norm = np.linalg.norm(array.astype(np.float64).ravel())
        table.add_row(name, str(list(array.shape)), str(array.dtype), f"{norm:.6g}")
    console.print(table)


class Parser(argparse.ArgumentParser):
    """Of the commands on runs and their files: what is wrong with a command line is told as any other bad input."""

    color = False  # Python 3.14 has colours, which a safe stream would show as escapes

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows how to call it)")

    def format_help(self) -> str:
        """Return the help, in lines that fit the terminal."""
        return terminal.wrapped(super().format_help(), shutil.get_terminal_size().columns)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m jaxlm.convert",
        usage="%(prog)s SOURCE TARGET [--config FILE] [--state-dict | --as FAMILY]\n       %(prog)s --inspect FILE",
        description=(
            "Converts a training state between jaxlm, torchlm, the original's checkpoint file 1.2 and safetensors: "
            "weights, head, optimizer moments, counters, stored rate and settings. No bit changes on any way and back."
        ),
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help=(
            "what to convert: folder of a jaxlm run (its last checkpoint) or of one checkpoint, checkpoint file 1.2, "
            "state dict of torchlm, safetensors, folder or hub name of a model of transformers (PUBLIC_WEIGHTS.md)"
        ),
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help=(
            "what to write, under a new name; NAME.pt: checkpoint file 1.2, as torchlm and the original have it; "
            "NAME.safetensors: all of it, settings as metadata; any other NAME: folder of a jaxlm run, or with --as of "
            "a model of transformers"
        ),
    )
    parser.add_argument("--config", metavar="FILE", help="settings of a SOURCE that has none: its run's config.toml")
    parser.add_argument("--state-dict", action="store_true", help="write TARGET as torchlm's state dict: weights alone")
    parser.add_argument(
        "--as",
        dest="family",
        metavar="FAMILY",
        choices=huggingface.FAMILIES,
        help=f"write {', '.join(huggingface.FAMILIES)}",
    )
    parser.add_argument(
        "--inspect", metavar="FILE", help="print names, shapes, dtypes and norms of what is in a SOURCE, and stop"
    )
    args = parser.parse_args(argv)
    if args.state_dict and args.family:
        parser.error("--state-dict and --as are two forms; give one of them")
    if args.inspect and (args.source or args.config or args.state_dict or args.family):
        parser.error("--inspect FILE goes alone")
    if not args.inspect and args.target is None:
        parser.error("SOURCE and TARGET are missing" if args.source is None else "TARGET is missing")
    return args


def _convert(source: Path, target: Path, config: Config | None, as_state_dict: bool, family: str | None) -> None:
    form = {".pt": CHECKPOINT_1_2, ".safetensors": SAFETENSORS}.get(target.suffix, RUN)
    if as_state_dict:
        if form != CHECKPOINT_1_2:
            raise UserError(f"{target}: --state-dict writes a file of torch.save; give it a name that ends in .pt")
        form = STATE_DICT
    if family:
        if form != RUN:
            raise UserError(
                f"{target}: --as {family} makes a folder; give it a name that ends in neither .pt nor .safetensors"
            )
        form = formats.TRANSFORMERS + family
    stored = load(source)
    snapshot = merged(_snapshot(stored, config))
    tokenizer = _tokenizer(source, snapshot) if family or form == RUN else None
    write(target, snapshot, form, tokenizer)
    n_parameters = sum(array.size for array in snapshot.weights.values())
    if config_of(stored.info.get("config", {}), source).model.lora_rank:
        kept = f"step {snapshot.info['step']}, adapters merged into the weights, no optimizer moments"
    elif form == STATE_DICT:
        kept = "nothing but weights"
    elif family:
        kept = "no optimizer moments" + ("" if tokenizer else f"; no tokenizer, since there is none with {source}")
    elif snapshot.moments is None:
        kept = f"step {snapshot.info['step']}, no optimizer moments: they start at zero"
    else:
        kept = f"step {snapshot.info['step']}, optimizer moments of {snapshot.n_updates} updates"
    print(f"{stored.path} ({stored.form}, task {snapshot.config.task}) -> {target} ({form})")
    print(f"{n_parameters:,} parameters in {len(snapshot.weights)} tensors; {kept}")


def _tokenizer(source: Path, snapshot: Snapshot) -> Tokenizer | None:
    """Return the tokenizer of a run, of the run of a checkpoint, or of a model of transformers; None if it is gone."""
    for folder in (source, source.parent.parent):
        if not storage.is_remote(folder) and any((folder / name).is_file() for name in huggingface.TOKENIZER):
            config = TokenizerConfig(path=str(folder), lowercase=snapshot.config.tokenizer.lowercase)
            tokenizer, wanted = tokenization.read(config), snapshot.info["tokenizer"]
            if wanted in (None, tokenization.fingerprint(tokenizer)):
                return tokenizer
    return None


def _snapshot(stored: Stored, config: Config | None) -> Snapshot:
    """Return the training state in what was loaded, checked against the model of its settings."""
    path, info = stored.path, stored.info
    if info and config:
        raise UserError(f"--config: {path} has settings of its own; leave --config away")
    if not info and not config:
        raise UserError(f"{path}: bare weights without settings; give those of their run with --config FILE")
    if config is None:
        config = config_of(info["config"], path)
        if info["task"] != config.task:
            raise UserError(
                f"{path}: it is of task {info['task']}, but its settings are of task {config.task}; save it again"
            )
    else:
        info = {"step": 0, "task": config.task, "rate": 0.0, "tokenizer": None}
        if not config.model.vocab_size and TABLE in stored.weights:  # settings from before the tokenizer was known
            config = configs.replace(config, "model.vocab_size", len(stored.weights[TABLE]))
    shapes = parameters.shapes(config)
    weights = _checked(stored.weights, shapes, str(path) if stored.info else f"{path}, with the settings of --config")
    shapes = names.trained(config.model, shapes)
    moments, n_updates = formats.moments(stored, shapes, config.model.frozen_layers)
    if moments is not None:
        first = _checked(moments[0], shapes, f"{path}: first moments of the optimizer")
        moments = first, _checked(moments[1], shapes, f"{path}: second moments of the optimizer")
    train = config.train
    info = {"sample_iter": info["step"] * train.batch_size * train.accumulate, "val_loss": None} | info
    info = {name: value for name, value in info.items() if name not in ("config", "format")}
    return Snapshot(config, info, weights, moments if n_updates else None, n_updates)


def config_of(settings: Mapping[str, Any], path: Path) -> Config:
    """Return stored settings, {dotted name: value}, as Config; those that did not exist then have their defaults."""
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in configs.SETTINGS:
            raise UserError(
                f"{path}: its setting {name} is unknown here{nearest(name, configs.SETTINGS)}; "
                "use the jaxlm that wrote it, or a newer one"
            )
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    try:
        config = msgspec.convert(nested, Config)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: in its settings: {error}; convert the run that it is from again") from error
    if not_finite := [name for name, x in settings.items() if isinstance(x, float) and not math.isfinite(x)]:
        raise UserError(
            f"{path}: its setting {not_finite[0]} is no finite number; convert the run that it is from again"
        )
    try:
        configs.check_model(config)
    except UserError as error:
        raise UserError(f"{path}: in its settings: {error}") from error
    return config


def _checked(arrays: Mapping[str, np.ndarray], shapes: names.Shapes, source: str) -> Arrays:
    """Return the arrays in model order. Raises UserError if they are not those of the model, or not float32."""
    arrays = {name: names.exact(x) for name, x in names.check(arrays, shapes, source).items()}
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise UserError(
                f"{source}: {name} is {array.dtype}, but can be read as float32, float16 or bfloat16 only; "
                "save it again as float32, as with tensor.float() in PyTorch"
            )
    return arrays


if __name__ == "__main__":
    sys.exit(main())
