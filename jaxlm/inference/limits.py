"""Limits of `python -m jaxlm.serve`, shared by its command line and its HTTP interface."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of requests."""

    requests: int = 256  # concurrent, of all clients
    body: int = 65_536  # bytes
    new_tokens: int = 1000  # of a continuation
    seconds: float = 30.0  # to send a request, and again to answer it
