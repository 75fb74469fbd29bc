"""Data sets of the hub, and whether it can be reached."""

import contextlib
import re
import threading
import warnings
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jaxlm.config import DataConfig
from jaxlm.data.parts import STEMS, Part, Reads, Row, Table, Wanted
from jaxlm.data.tables import BATCH, batch_rows, grouped
from jaxlm.errors import UserError

PROBE_S = 2  # seconds to wait for the hub, so that bad input is reported within 5


def name_of(config: DataConfig) -> str:
    return " ".join(filter(None, (config.hub, config.hub_config)))


def open_parts(config: DataConfig, reads: Reads, named: Collection[str], notes: list[str]) -> list[Part]:
    """Return the parts of a data set but those of the splits `named`. Raises UserError for one that cannot be had."""
    is_wikitext = reads == "text" and (config.hub_config or Path(config.hub).name).startswith("wikitext")
    parts = []
    for key, rows in _load(config).items():
        split = STEMS.get(str(key).lower(), "")
        if not split:
            notes.append(f"not used, as the name says no part: {key}")
        if not split or split in named:
            continue
        name, names = f"{name_of(config)}, {key}", rows.column_names
        used = Wanted(config, reads, split).columns(name, names)
        text, label, pair = (None if column is None else names[column] for column in used)
        feature = rows.features[label] if label else None
        class_names = tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())  # also of lists
        read = partial(_rows, rows, text, label, pair, is_wikitext)
        table = Table(read, (text, label, is_wikitext), class_names, pair)
        parts.append(Part(name, split, "hub", rows._fingerprint, rows.data.nbytes, table))
    return parts


def _rows(rows: Any, text: Any, label: str | None, pair: str | None, is_wikitext: bool) -> Iterator[Row]:
    columns = list(dict.fromkeys(filter(None, (text, label, pair))))
    batches = rows.select_columns(columns).with_format("arrow").iter(batch_size=BATCH)
    found = batch_rows((batch.to_pydict() for batch in batches), text, label, pair)
    return grouped(found) if is_wikitext else found


def _load(config: DataConfig) -> Any:
    """Return a data set, from the cache where the hub cannot be reached. Raises UserError."""
    name, datasets, failure = name_of(config), library(), ""
    if not Path(config.hub).is_dir():
        failure = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else unreachable(name)
    try:
        with warnings.catch_warnings(action="ignore"), _offline() if failure else contextlib.nullcontext():
            return datasets.load_dataset(config.hub, config.hub_config or None)
    except Exception as error:  # of the library, of the hub's client, of the builders: of many types
        reason = " ".join(str(error).split())[:300]
        if "LocalEntryNotFoundError" in reason:  # something answered, such as the log-in page of a network
            failure = "what answers is not the hub"
        if not failure and re.search(r"gated|authenticat|private|\b40[13]\b", reason):
            mend = "ask for access on its page of the hub, then log in with `hf auth login`, or set HF_TOKEN"
            raise UserError(f"data.hub={name}: not open to this account: {reason}; {mend}") from error
        if not failure:
            raise UserError(f"data.hub={name}: {reason}; check data.hub and data.hub_config") from error
        cache = reason if isinstance(error, ValueError) else "it is not in the cache"
        mend = "use a local file with --data.path FILE"
        raise UserError(f"data.hub={name}: the hub cannot be reached ({failure}) and {cache}; {mend}") from error


def library() -> Any:
    """Return the library `datasets` with bars, log lines and use counts off; imported late because that takes 0.8 s."""
    import datasets
    import huggingface_hub

    # Else each call for a local file reports its use to the hub, and waits seconds for the answer without a network.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # Else a stream imports torch where it is installed: seconds and 200 MB for nothing.
    datasets.config.TORCH_AVAILABLE = False
    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    return datasets


def unreachable(name: str) -> str:
    """Return why the hub does not answer, within PROBE_S; "" if it does, and where it is not to be asked."""
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.is_offline_mode():
        return ""
    failure = f"no answer for {name} in {PROBE_S} seconds"

    def ask() -> None:
        nonlocal failure
        try:
            # Whoever waits gives up before.
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=2 * PROBE_S)
            failure = ""
        except Exception as error:  # the client's own and those of the system
            failure = " ".join(str(error).split())[:100] or type(error).__name__

    # A thread, because the look-up of a name heeds no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return failure


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Have `datasets` go to its cache at once: it would try an unreachable hub many times."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
