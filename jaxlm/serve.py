"""The command `python -m jaxlm.serve`: a page and a JSON interface to a trained model. SERVE.md has examples."""

import argparse
import contextlib
import importlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator

from jaxlm import predict
from jaxlm.cli import Parser
from jaxlm.errors import ENDINGS, UserError, reported
from jaxlm.inference.limits import Limits
from jaxlm.runtime import huge_pages
from jaxlm.terminal import command

TOKEN = "JAXLM_TOKEN"  # an environment variable, because all users of a host can see command lines
N_BACKLOG = 2048  # connections waiting to be accepted, at most


@reported(debug=False)
def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, then finish the open requests; return the exit status."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    token = _token(args.host)
    for name in ("fastapi", "prometheus_client", "uvicorn"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{name} is not installed; pip install 'jaxlm[serve]'") from error
    with contextlib.closing(_bound(args.host, args.port)) as listening:
        _serve(listening, args, token)
    return 0


def _serve(listening: socket.socket, args: argparse.Namespace, token: str) -> None:
    import uvicorn

    from jaxlm.inference import http_api
    from jaxlm.inference.batching import Engine

    predictor = predict.load(args.checkpoint, getattr(args, "tokenizer.path"))
    if args.pair:
        predictor.take_two()
    limits = Limits(args.max_requests, args.max_body, args.max_new_tokens, args.timeout)
    _report(f"{predictor.trained}: compiling")
    with contextlib.closing(Engine(predictor)) as engine, _kept_from_ending():
        config = uvicorn.Config(
            http_api.make(engine, limits, token, _is_loopback(args.host)),
            log_level="warning",
            use_colors=False,  # terminal.Shown would escape them
            access_log=False,
            server_header=False,
            lifespan="off",
            backlog=N_BACKLOG,
            timeout_graceful_shutdown=round(limits.seconds) + 1,
        )
        listening.listen(N_BACKLOG)
        _report(f"serving http://{_name(listening)}/")
        uvicorn.Server(config).run([listening])
        _report("all requests are answered; stopped")


@contextlib.contextmanager
def _kept_from_ending() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM outside of uvicorn, which raises them again after its shutdown."""
    before = {number: signal.signal(number, lambda number, frame: None) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bound(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet."""
    with contextlib.ExitStack() as stack:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            bound = stack.enter_context(contextlib.closing(socket.socket(family, kind, proto)))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except (OSError, ValueError) as error:  # ValueError: a name that no host can have
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--host {host} --port {port}: cannot be served ({reason}); give another") from error
        stack.pop_all()
    return bound


def _name(bound: socket.socket) -> str:
    host, port, *_ = bound.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(host: str) -> str:
    token = os.environ.get(TOKEN, "")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(f"{TOKEN}: must be ASCII letters, digits and signs, as from `openssl rand -hex 16`")
    if not token and not _is_loopback(host):
        raise UserError(
            f"--host {host}: other hosts could use the model; set {TOKEN} in the environment to a secret that clients "
            "must send, as from `openssl rand -hex 16`"
        )
    return token


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog=command("serve"),
        description="Serves a page and a JSON interface to a trained model.",
        epilog=f"On another host than loopback, clients need the token in the environment variable {TOKEN}.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="run (its best checkpoint), checkpoint, or public model"
    )
    parser.add_argument("--tokenizer.path", default="", metavar="FILE", help="tokenizer, if the run has none")
    parser.add_argument("--pair", action="store_true", help="a public classifier compares two texts")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: only this host)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: any free one, which is printed (8000)")
    group = parser.add_argument_group("limits")
    for flag, default, metavar, text in (
        ("--max-requests", Limits.requests, "N", "concurrent requests; further ones are refused with 429"),
        ("--max-body", Limits.body, "BYTES", "of a request"),
        ("--max-new-tokens", Limits.new_tokens, "N", "gpt: of a continuation"),
        ("--timeout", Limits.seconds, "SECONDS", "to send a request, and to answer it"),
    ):
        kind = type(default)
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{text} ({default:g})")
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error(f"--port {args.port}: must be 0 to 65535")
    for name in ("max_requests", "max_body", "max_new_tokens", "timeout"):
        if not 0 < getattr(args, name) < 2**31:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0, and below {2**31}")
    return args


if __name__ == "__main__":
    huge_pages.ask()
    sys.exit(main())
