"""The command `python -m jaxlm.predict`: predictions of a trained model for texts. USING.md has examples.

In Python, `predict.load(RUN)` returns the predictor for the model's task: FillMasks, Continue, Reply, Classify, Tag,
Embed or Predict. It computes in float32, regardless of the training precision.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jaxlm.cli import Parser
from jaxlm.errors import UserError, os_errors, reported
from jaxlm.io import utf8
from jaxlm.runtime import huge_pages
from jaxlm.terminal import command, dumps

if TYPE_CHECKING:  # the command line is parsed before slow imports
    from jaxlm.inference.predictors import Answer, Continue, Predictor

OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "threshold")
Numbered = tuple[str, str]  # a label such as "line 3: ", and the text


def load(checkpoint: str | Path, tokenizer: str = "", embeds: bool = False, chat: bool = False) -> "Predictor":
    """Return the predictor for the task of a model; if it `embeds`, Embed, of any model.

    `checkpoint` is a run (its best checkpoint is used) or a checkpoint of any format that jaxlm.convert reads.
    `tokenizer` is as in tokenizer.path, "": that of the run. `chat`: texts are messages, for a model with a chat
    template. Raises UserError.
    """
    from jaxlm.heads import LanguageModel
    from jaxlm.inference import load, predictors

    trained = load.load(checkpoint, tokenizer, precision="float32", needs_output=False)
    if embeds:
        return predictors.Embed(trained)
    if trained.task is None:
        return predictors.Look(trained)
    samples = trained.task.samples
    if chat and samples.model_kind != "causal":
        raise UserError(f"--chat: {trained} does not continue texts; leave --chat out")
    if chat:
        return predictors.Chat(trained)
    if samples.reads == "sets":
        return predictors.Labels(trained)
    if samples.model_kind == "classifier":
        return predictors.Classify(trained) if trained.has_probabilities() else predictors.Predict(trained)
    if samples.model_kind in ("tagger", "embedder"):
        return predictors.Tag(trained) if samples.model_kind == "tagger" else predictors.Embed(trained)
    if not isinstance(trained.model, LanguageModel):
        raise UserError(
            f"{checkpoint}: the model of task={trained.config.task} is a {type(trained.model).__name__}, but only a "
            "LanguageModel of heads.py can fill or continue a text; jaxlm.evaluate and jaxlm.convert take any model"
        )
    if samples.model_kind == "masked":
        return predictors.FillMasks(trained)
    return predictors.Reply(trained) if samples.reads == "pairs" else predictors.Continue(trained)


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Print predictions for a command line; return the exit status: 2 for bad input, also if only one text is bad."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    texts = _texts(args)
    predictor = load(args.checkpoint, getattr(args, "tokenizer.path"), args.query is not None, args.chat)
    if args.query is not None:
        return _search(predictor, args, texts)
    if args.pairs:
        predictor.take_two()
    predictor([])  # raises UserError for a model without predictions
    options = _given_options(args, predictor)
    print(predictor.trained, file=sys.stderr, flush=True)
    if texts is None:
        return _converse(predictor, options, args.json)
    return _answer_all(predictor, texts, options, args.json)


def _search(predictor: Any, args: argparse.Namespace, texts: Iterable[Numbered] | None) -> int:
    """Print the texts that are most like the query; return the exit status."""
    if texts is None:
        raise UserError("--query: give the texts to search by --file, --text or standard input")
    for answer in predictor.nearest(args.query, [text for _, text in texts], args.top_k or 10):
        print(dumps(answer) if args.json else f"{answer['similarity']:.4f}  {answer['text']}")
    return 0


def _answer_all(predictor: "Predictor", texts: Iterable[Numbered], options: dict[str, Any], as_json: bool) -> int:
    """Print predictions in batches, and errors for texts that cannot be encoded; return the exit status."""
    from jaxlm.inference.predictors import N_ROWS, Continue

    status = 0
    texts = iter(texts)
    while some := list(itertools.islice(texts, N_ROWS)):
        problems = {}
        for i, (name, text) in enumerate(some):
            try:
                predictor.encode(text)
            except UserError as error:
                status, problems[i] = 2, str(error)
                start = json.dumps(text if len(text) <= 40 else f"{text[:40]}...", ensure_ascii=False)
                print(f"error: {name}{error}: {start}", file=sys.stderr, flush=True)
        fine = [text for i, (_, text) in enumerate(some) if i not in problems]
        if isinstance(predictor, Continue) and not as_json and len(fine) == 1:
            _print_as_made(predictor, fine[0], options)
            continue
        answers = iter(predictor(fine, **options))
        for i, (_, text) in enumerate(some):
            answer = {"text": text, "error": problems[i]} if i in problems else next(answers)
            if as_json:
                print(dumps(answer), flush=True)
            elif i not in problems:
                print(predictor.shown(answer), flush=True)
                _print_end(answer)
    return status


def _print_as_made(predictor: "Continue", text: str, options: dict[str, Any]) -> None:
    pieces = predictor.stream(text, **options)
    first = next(pieces)  # raises UserError for bad options
    print(text, end=predictor.between, flush=True)
    for piece in itertools.chain([first], pieces):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        else:
            print()
            _print_end(piece)


def _print_end(answer: "Answer") -> None:
    """Print why a continuation ended, and the seed that reproduces it."""
    from jaxlm.inference.predictors import ENDINGS

    if "ending" in answer:
        line = f"[{answer['tokens']} tokens, seed {answer['seed']}; {ENDINGS[answer['ending']]}]"
        print(line, file=sys.stderr, flush=True)


def _converse(predictor: "Predictor", options: dict[str, Any], as_json: bool) -> int:
    """Answer texts typed by the user, until the end of input."""
    import readline  # noqa: F401  # editing and history of typed lines

    print(f"Type {predictor.wants}; Ctrl-D ends.", file=sys.stderr)
    try:
        while True:
            if text := input("> "):
                _answer_all(predictor, [("", text)], options, as_json)
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


def _texts(args: argparse.Namespace) -> Iterable[Numbered] | None:
    """Return the texts; None if the user types them."""
    if args.pairs:
        args.texts = list(map(utf8.joined, args.texts, args.pairs))
    if args.texts:
        return [(f"text {i}: " if len(args.texts) > 1 else "", text) for i, text in enumerate(args.texts, start=1)]
    if args.file:
        with os_errors(f"--file {args.file}: cannot be read"):
            return _lines(f"--file {args.file}", utf8.opened(Path(args.file)))
    return None if sys.stdin.isatty() else _lines("standard input", open(sys.stdin.fileno(), "rb", closefd=False))


def _lines(name: str, stream: IO[bytes]) -> Iterator[Numbered]:
    try:
        for i, line in enumerate(utf8.lines(stream, errors="surrogateescape"), start=1):
            if line.strip():
                yield f"line {i}: ", line
    except (OSError, ValueError, *utf8.DAMAGED) as error:
        raise UserError(f"{name}: cannot be read ({error})") from error


def _given_options(args: argparse.Namespace, predictor: "Predictor") -> dict[str, Any]:
    """Return the given options. Raises UserError for one that the task does not have."""
    given = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    flags = {name: f"--{name.replace('_', '-')}" for name in OPTIONS}
    for name in given:
        if name not in predictor.options:
            others = ", ".join(flags[other] for other in predictor.options)
            mend = f"there is {others}" if others else "leave it out"
            raise UserError(f"{flags[name]}: does not go with {predictor.trained}; {mend}")
    return given


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("predict"),
        description="Uses a trained model: mlm fills [MASK]s, gpt continues a text, pairs replies, classifiers label, "
        "tag finds names, embed gives vectors; your own task uses the predictor in its file.",
        epilog="Without a text, lines are read from standard input, or typed in a terminal.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run (its best checkpoint), checkpoint, or public model"
    )
    parser.add_argument(
        "--text", "--prompt", action="append", dest="texts", metavar="TEXT", help="input text; may be repeated"
    )
    parser.add_argument("--pair", action="append", dest="pairs", metavar="TEXT", help="second text of a pair")
    parser.add_argument("--file", metavar="FILE", help="file with a text in each line, or two with a tab between")
    parser.add_argument("--query", metavar="TEXT", help="print the texts most like this one, by their embeddings")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text")
    parser.add_argument("--chat", action="store_true", help="answer messages, by the chat template of a public model")
    parser.add_argument("--tokenizer.path", default="", metavar="FILE", help="tokenizer, if the run has none")
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="mlm: guesses for each mask (5); --query: texts (10); gpt: see below"
    )
    parser.add_argument("--threshold", type=float, metavar="P", help="multilabel: least probability of a label (0.5)")
    group = parser.add_argument_group(
        "gpt", "each token is drawn from the K likeliest, and of these from the fewest whose probabilities sum to P"
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="most new tokens (100)")
    group.add_argument("--temperature", type=float, metavar="X", help="divides the logits; 0: greedy decoding (0.8)")
    group.add_argument("--top-p", type=float, metavar="P", help="see above; 1: all tokens (0.95)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of sampling (random, and printed)")
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.texts and args.file:
        parser.error("--text and --file name two sources; give one")
    if args.pairs and args.query is not None:
        parser.error("--query compares single texts; leave --pair out")
    if args.pairs and len(args.pairs) != len(args.texts or ()):
        parser.error("--pair is the second text of a --text; give as many of each")
    return args


if __name__ == "__main__":
    huge_pages.ask()
    sys.exit(main())
