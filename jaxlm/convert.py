"""The command `python -m jaxlm.convert`: converts training states between file formats, bit for bit.

formats.py has the formats.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxlm import cli, terminal
from jaxlm import config as configs
from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.errors import UserError, reported
from jaxlm.io import storage
from jaxlm.params.snapshot import Snapshot
from jaxlm.weights import formats, huggingface, snapshots
from jaxlm.weights.families import FAMILIES
from jaxlm.weights.formats import CHECKPOINT_1_2, RUN, SAFETENSORS, STATE_DICT, StoredFile


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Convert or inspect a file; return the exit status. Bad input exits with 2."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: do not occupy an accelerator
    args = _parse(sys.argv[1:] if argv is None else argv)
    if args.inspect:
        inspect(snapshots.load(huggingface.find(args.inspect)))
    else:
        _convert(args)
    return 0


def inspect(stored: StoredFile) -> None:
    """Print the content of a file or folder: metadata, numbers of parameters, and a table of its tensors."""
    from rich.table import Table

    from jaxlm.io.console import Console

    is_plain = not sys.stdout.isatty()
    console = Console()
    console.print(f"{stored.path}: {stored.form}")
    for key in ("format", "task", "step", "rate"):
        console.print(f"{key:<10}  {stored.info.get(key, 'unknown')}")
    counts: Counter[str] = Counter()
    for name, array in stored.weights.items():
        words = name.split(".")
        counts[".".join(words[:2] if words[0] == "base" else words[:1])] += array.size
    console.print(f"parameters  {counts.total():,}: {', '.join(f'{part} {n:,}' for part, n in counts.items())}")

    table = Table("name", "shape", "dtype", box=None if is_plain else Table().box, pad_edge=not is_plain)
    table.add_column("norm", justify="right")
    # Weights first.
    for name, array in sorted(formats.leaves(stored.tree), key=lambda leaf: leaf[0].startswith("opt")):
        norm = np.linalg.norm(array.astype(np.float64).ravel())
        table.add_row(name, str(list(array.shape)), str(array.dtype), f"{norm:.6g}")
    console.print(table)


def make_parser() -> cli.Parser:
    """Return the parser of the terminal.command line."""
    parser = cli.Parser(
        prog=terminal.command("convert"),
        usage="%(prog)s SOURCE TARGET [--config FILE] [--state-dict | --as FAMILY]\n       %(prog)s --inspect FILE",
        description=(
            "Converts a training state between jaxlm, torchlm, the original's checkpoint file 1.2 and safetensors: "
            "weights, head, optimizer moments, counters, stored rate and settings. No bit changes on any way and back."
        ),
    )
    source = (
        "what to convert: folder of a jaxlm run (its last checkpoint) or of one checkpoint, checkpoint file 1.2, "
        "state dict of torchlm, safetensors, folder or hub name of a model of transformers (PUBLIC_WEIGHTS.md)"
    )
    target = (
        "what to write, under a new name; NAME.pt: checkpoint file 1.2, as torchlm and the original have it; "
        "NAME.safetensors: all of it, settings as metadata; any other NAME: folder of a jaxlm run, or with --as of "
        "a model of transformers"
    )
    config = "settings of a SOURCE that has none: its run's config.toml"
    inspected = "print names, shapes, dtypes and norms of what is in a SOURCE, and stop"
    parser.add_argument("source", nargs="?", metavar="SOURCE", help=source)
    parser.add_argument("target", nargs="?", metavar="TARGET", help=target)
    parser.add_argument("--config", metavar="FILE", help=config)
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--state-dict", action="store_true", help="write TARGET as torchlm's state dict: weights alone")
    forms.add_argument("--as", dest="family", metavar="FAMILY", choices=FAMILIES, help=f"write {', '.join(FAMILIES)}")
    parser.add_argument("--inspect", metavar="FILE", help=inspected)
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.inspect and (args.source or args.config or args.state_dict or args.family):
        parser.error("--inspect FILE goes alone")
    if not args.inspect and args.target is None:
        parser.error("SOURCE and TARGET are missing" if args.source is None else "TARGET is missing")
    return args


def _convert(args: argparse.Namespace) -> None:
    config = configs.load(["--config", args.config])[0] if args.config else None
    source, target = huggingface.find(args.source), Path(args.target)
    form = {".pt": CHECKPOINT_1_2, ".safetensors": SAFETENSORS}.get(target.suffix, RUN)
    if args.state_dict and form != CHECKPOINT_1_2:
        raise UserError(f"{target}: --state-dict writes a file of torch.save; give it a name that ends in .pt")
    if args.family and form != RUN:
        mend = "give it a name that ends in neither .pt nor .safetensors"
        raise UserError(f"{target}: --as {args.family} makes a folder; {mend}")
    if args.state_dict or args.family:
        form = STATE_DICT if args.state_dict else formats.TRANSFORMERS + args.family
    stored = snapshots.load(source)
    snapshot = snapshots.to_snapshot(stored, config)
    has_adapters, snapshot = bool(snapshot.config.model.lora_rank), snapshot.merge_adapters()
    tokenizer = _tokenizer(source, snapshot) if args.family or form == RUN else None
    snapshots.write(target, snapshot, form, tokenizer)
    if has_adapters:
        kept = f"step {snapshot.info['step']}, adapters merged into the weights, no optimizer moments"
    elif form == STATE_DICT:
        kept = "only weights"
    elif args.family:
        kept = "no optimizer moments" + ("" if tokenizer else f"; no tokenizer, because {source} has none")
    elif snapshot.moments is None:
        kept = f"step {snapshot.info['step']}, no optimizer moments: they start at zero"
    else:
        kept = f"step {snapshot.info['step']}, optimizer moments of {snapshot.n_updates} updates"
    n_parameters = sum(array.size for array in snapshot.weights.values())
    print(f"{stored.path} ({stored.form}, task {snapshot.config.task}) -> {target} ({form})")
    print(f"{n_parameters:,} parameters in {len(snapshot.weights)} tensors; {kept}")


def _tokenizer(source: Path, snapshot: Snapshot) -> Tokenizer | None:
    """Return the tokenizer of a run, a checkpoint's run or a model of transformers; None if it is missing."""
    for folder in (source, source.parent.parent):
        if not storage.is_remote(folder) and any((folder / name).is_file() for name in huggingface.TOKENIZER):
            config = TokenizerConfig(path=str(folder), lowercase=snapshot.config.tokenizer.lowercase)
            tokenizer = tokenization.read(config)
            if snapshot.info["tokenizer"] in (None, tokenization.fingerprint(tokenizer)):
                return tokenizer
    return None


if __name__ == "__main__":
    sys.exit(main())
