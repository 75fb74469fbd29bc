"""The command `python -m jaxlm.embed`: the embeddings of texts, as a file of NumPy. USING.md has an example."""

import sys
from pathlib import Path
from typing import Any

from jaxlm.cli import Parser
from jaxlm.errors import UserError, os_errors, reported
from jaxlm.io import temporary, utf8
from jaxlm.runtime import huge_pages
from jaxlm.terminal import command


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Write embeddings as the command line says; return the exit status. Bad input exits with 2."""
    args = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    if not args.out.endswith(".npy"):
        raise UserError(f"--out {args.out}: has to end in .npy; give such a name")
    try:
        with os_errors(f"--file {args.file}: cannot be read"):
            texts = list(utf8.lines(utf8.opened(Path(args.file))))
    except (ValueError, *utf8.DAMAGED) as error:
        raise UserError(f"--file {args.file}: cannot be read ({error}); give a file of text") from error
    if not texts:
        raise UserError(f"--file {args.file}: is empty; write a text in each line")
    import numpy as np

    from jaxlm.inference import load, predictors

    found = load.load(args.checkpoint, getattr(args, "tokenizer.path"), precision="float32", needs_output=False)
    embed = predictors.Embed(found, args.pooling)
    vectors_ND = embed.vectors(texts)
    with os_errors(f"--out {args.out}: cannot be written"), temporary.replacing(Path(args.out)) as new:
        with open(new, "wb") as file:
            np.save(file, vectors_ND)
    print(
        f"{args.out}: {len(vectors_ND):,} vectors of {vectors_ND.shape[1]} numbers, by {found}, {embed.pooling} pooling"
    )
    return 0


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("embed"),
        description="Writes the embedding of each line of a file: float32, of length 1, a row for each line.",
    )
    options: dict[str, Any] = {"required": True, "metavar": "FILE"}
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run (its best checkpoint), checkpoint, or public model"
    )
    parser.add_argument("--file", help="file with a text in each line", **options)
    parser.add_argument("--out", help="NumPy file to write, NAME.npy", **options)
    parser.add_argument(
        "--pooling",
        default="",
        choices=("mean", "first", "last"),
        help="mean over all tokens, or one token (as trained; untrained: mean, or last for a causal model)",
    )
    parser.add_argument("--tokenizer.path", default="", metavar="FILE", help="tokenizer, if the run has none")
    return parser


if __name__ == "__main__":
    huge_pages.ask()
    sys.exit(main())
