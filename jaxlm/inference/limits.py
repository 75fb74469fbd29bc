"""What `python -m jaxlm.serve` lets its clients ask for. Its own file, because the command line has the same limits."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one client can ask for, and all of them at once."""

    requests: int = 256  # at once
    body: int = 65_536  # bytes
    new_tokens: int = 1000  # of a continuation
    seconds: float = 30.0  # to send a request, and again to answer it
