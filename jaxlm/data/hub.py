"""Data sets of the hub, and whether it can be reached."""

import contextlib
import hashlib
import json
import re
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.config import DataConfig
from jaxlm.data.parts import ANNOTATED, STEMS, Part, Reads, Row, Table, Wanted
from jaxlm.data.tables import BATCH, batch_rows, grouped
from jaxlm.errors import UserError, note
from jaxlm.io import temporary, utf8

PROBE_S = 2  # seconds to wait for the hub, so that bad input is reported within 5
DOWNLOADED = 200_000_000  # bytes of text, about; a larger set is streamed, unless `datasets` has it in its cache
GROWTH = 3  # times of its size that a Parquet or compressed file has as text, about
CLOSED = re.compile(r"\bgated\b|authenticat|\bprivate\b|cannot be accessed|\b40[13]\b")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
NO_HUB = "use a local file with --data.path FILE"


class _Split(NamedTuple):
    key: str
    content: str  # hash of the files and the settings of the builder
    n_bytes: int  # of text, about
    names: list[str]  # of the columns
    features: Mapping[str, Any]  # of the columns; {}: not known
    shards: list[Any]  # the rows of each, or the UserError for those that cannot be had now


def name_of(config: DataConfig) -> str:
    return " ".join(filter(None, (config.hub, config.hub_config)))


def open_parts(
    config: DataConfig, reads: Reads, named: Collection[str], notes: list[str], cache_dir: Path
) -> list[Part]:
    """Return the parts of a data set but those of the splits `named`. Raises UserError for one that cannot be had.

    A set of more than DOWNLOADED bytes is streamed, a part for each shard; but not for a classifier, which looks at all
    labels first. Both ways have the same rows in the same order.
    """
    is_wikitext = reads == "text" and (config.hub_config or Path(config.hub).name).startswith("wikitext")
    found, is_remote = _open(config, reads, is_wikitext, cache_dir)
    parts = []
    for key, content, n_bytes, names, features, shards in found:
        split = STEMS.get(key.lower(), "")
        if not split:
            notes.append(f"not used, as the name says no part: {key}")
        if not split or split in named:
            continue
        name = f"{name_of(config)}, {key}"
        used = Wanted(config, reads, split).columns(name, names)
        text, label, pair = (None if column is None else names[column] for column in used)
        feature = features.get(label) if label else None
        class_names = tuple(getattr(getattr(feature, "feature", feature), "names", None) or ())  # also of lists
        for i, shard in enumerate(shards, start=1):
            read = partial(_rows, config, shard, text, label, pair, is_wikitext)
            table = Table(read, (text, label, is_wikitext), class_names, pair)
            of_shard = f"{name}, shard {i} of {len(shards)}" if len(shards) > 1 else name
            parts.append(Part(of_shard, split, "hub", content, n_bytes // len(shards), table, is_remote))
    return parts


def _rows(
    config: DataConfig, shard: Any, text: Any, label: str | None, pair: str | None, is_wikitext: bool
) -> Iterator[Row]:
    if isinstance(shard, UserError):
        raise shard
    columns = list(dict.fromkeys(filter(None, (text, label, pair))))
    try:
        batches = shard.select_columns(columns).with_format("arrow").iter(batch_size=BATCH)
        found = batch_rows((batch.to_pydict() for batch in batches), text, label, pair)
        yield from grouped(found) if is_wikitext else found
    except Exception as error:
        if isinstance(error, OSError) and CLOSED.search(str(error)):
            raise _refusal(config, "", error) from error
        raise


def _open(config: DataConfig, reads: Reads, is_whole: bool, cache_dir: Path) -> tuple[list[_Split], bool]:
    """Return the splits of a data set, and whether they are streamed; each is one shard if it `is_whole`.

    Where the hub cannot be reached, they are those in the cache of `datasets`, or what was last found out about them,
    by which a token cache is found. Raises UserError.
    """
    datasets, failure = library(), ""
    if not Path(config.hub).is_dir():
        failure = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else unreachable(name_of(config))
    key = json.dumps([config.hub, config.hub_config, is_whole])
    stored = cache_dir / "downloads" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        with warnings.catch_warnings(action="ignore"), _offline() if failure else contextlib.nullcontext():
            found = [] if reads in ANNOTATED else _streamed(config, is_whole)
            if not found:
                return _downloaded(config), False
    except Exception as error:  # of the library, of the hub's client, of the builders: of many types
        refusal = _refusal(config, failure, error)
        if failure and reads not in ANNOTATED:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                last = [_Split(a, b, c, d, {}, [refusal]) for a, b, c, d in utf8.read_json(stored)["splits"]]
                note(f"data.hub={name_of(config)}: the hub cannot be reached ({failure}); taken to be what it was last")
                return last, True
        raise refusal from error
    with contextlib.suppress(OSError):
        stored.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace_text(stored, json.dumps({"splits": [split[:4] for split in found]}))
    return found, True


def _downloaded(config: DataConfig) -> list[_Split]:
    found = library().load_dataset(config.hub, config.hub_config or None)
    return [
        _Split(str(key), rows._fingerprint, rows.data.nbytes, rows.column_names, rows.features, [rows])
        for key, rows in found.items()
    ]


def _streamed(config: DataConfig, is_whole: bool) -> list[_Split]:
    """Return the splits of a set that is to be streamed; none of one that is small or downloaded already."""
    builder = library().load_dataset_builder(config.hub, config.hub_config or None)
    if Path(builder.cache_dir).is_dir() or sum((sizes := _sizes(builder)).values()) <= DOWNLOADED:
        return []
    found = []
    for key, rows in builder.as_streaming_dataset().items():
        n = 1 if is_whole else rows.num_shards
        shards = [rows.shard(num_shards=n, index=i) for i in range(n)] if n > 1 else [rows]
        # The fingerprint that the same rows have when they are downloaded.
        content = builder._get_dataset_fingerprint(key)
        names = list(rows.features or next(iter(rows), {}))
        found.append(_Split(str(key), content, sizes.get(str(key), 0), names, {}, shards))
    return found


def _sizes(builder: Any) -> dict[str, int]:
    """Return about how many bytes of text each split has; {} where nothing tells it."""
    import fsspec

    sizes = {str(key): info.num_bytes or 0 for key, info in (builder.info.splits or {}).items()}
    if any(sizes.values()):
        return sizes
    for key, urls in (builder.config.data_files or {}).items():
        sizes[str(key)] = 0
        for url in urls:
            fs, path = fsspec.core.url_to_fs(url)
            is_packed = Path(url).suffix in (".parquet", *utf8.COMPRESSED)
            sizes[str(key)] += (fs.size(path) or 0) * (GROWTH if is_packed else 1)
    return sizes


def _refusal(config: DataConfig, failure: str, error: Exception) -> UserError:
    """Return the UserError for a data set that cannot be read; `failure` is why the hub cannot be reached, if so."""
    name, reason = name_of(config), " ".join(str(error).split())[:300].rstrip(".")
    if "LocalEntryNotFoundError" in reason:  # something answered, such as the log-in page of a network
        failure = "what answers is not the hub"
    if not failure and CLOSED.search(reason):
        mend = f"ask for access on its page of the hub, then {LOG_IN}"
        if "cannot be accessed" in reason:
            mend = f"check data.hub; if the set is private, {LOG_IN}"
        return UserError(f"data.hub={name}: not open to this account: {reason}; {mend}")
    if not failure:
        return UserError(f"data.hub={name}: {reason}; check data.hub and data.hub_config")
    cache = reason if isinstance(error, ValueError) else "it is not in the cache"
    return UserError(f"data.hub={name}: the hub cannot be reached ({failure}) and {cache}; {NO_HUB}")


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
