"""Data sets that are streamed: from a folder, and from a real server of the API of the hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from jaxlm.config import DataConfig
from jaxlm.data import hub, sources
from jaxlm.data.remote_test import N_SHARDS, built, check_killed_builds, expected, rows
from jaxlm.testing.fake_hub import COMMIT, Hub


def write_set(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(N_SHARDS):
        path = folder / f"train-{i:05}-of-{N_SHARDS:05}.parquet"
        pyarrow.parquet.write_table(pa.table({"text": rows(i)}), path, row_group_size=150)
    return str(folder)


def test_a_streamed_set_is_that_which_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(hub=write_set(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "DOWNLOADED", 0)
    streamed = sources.open_source(config, "text")
    assert streamed.is_remote and len(streamed.parts) == N_SHARDS and built(config) == expected()
    assert [x.text for x in streamed.parts[2]()] == rows(2), "a part is a shard: those before it are not read"
    monkeypatch.setattr(hub, "DOWNLOADED", 10**9)
    downloaded = sources.open_source(config, "text")
    assert not downloaded.is_remote and downloaded.fingerprint == streamed.fingerprint
    assert list(downloaded.articles()) == list(streamed.articles())
    monkeypatch.setattr(hub, "DOWNLOADED", 0)
    assert not sources.open_source(config, "text").is_remote, "what is downloaded already is not streamed"


def test_wikitext_is_streamed_across_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [[" = One = \n", " Text . \n"], [" more . \n", " = Two = \n", " End . \n"]]
    for i, of_shard in enumerate(lines):
        path = tmp_path / "wikitext-tiny" / f"train-{i:05}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pa.table({"text": of_shard}), path)
    monkeypatch.setattr(hub, "DOWNLOADED", 0)
    settings: Any = {"validation_fraction": 0.0, "test_fraction": 0.0, "cache_dir": str(tmp_path / "cache")}
    source = sources.open_source(DataConfig(hub=str(tmp_path / "wikitext-tiny"), **settings), "text")
    assert source.is_remote
    assert [x.text for x in source.articles()] == [" = One = \n Text . \n more . ", " = Two = \n End . "]


def test_a_streamed_file_that_is_damaged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(hub=write_set(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "set" / f"train-00002-of-{N_SHARDS:05}.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(hub, "DOWNLOADED", 0)
    with pytest.raises(sources.UserError, match="train, shard 3 of 6: cannot be read: .*; run again, which continues"):
        built(config)


# A server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    write_set(tmp_path / "served" / "group" / "set")
    write_set(tmp_path / "served" / "group" / "closed")
    (tmp_path / "served" / "group" / "gated").mkdir()
    with Hub(tmp_path / "served", gated=("group/gated",), closed=("group/closed",)) as found:
        for name, value in {"HF_ENDPOINT": found.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, value)
        yield found
        found.shutdown()


OPEN = """
import json, sys
from jaxlm.config import DataConfig
from jaxlm.data import hub, remote, remote_test
from jaxlm.errors import UserError
hub.DOWNLOADED = 0
remote.WAIT_S = 0
for settings in json.loads(sys.argv[1]):
    try:
        print(json.dumps(remote_test.built(DataConfig(cache_dir=sys.argv[2], **settings))))
    except UserError as error:
        print(json.dumps([str(error)]))
"""


def opened(tmp_path: Path, *settings: dict[str, str]) -> list[Any]:
    """Return the texts of sources, or the line that refuses each, in a new process."""
    command = [sys.executable, "-c", OPEN, json.dumps(settings), str(tmp_path / "cache")]
    root = str(Path(sources.__file__).parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_hub_is_streamed_and_what_is_wrong_is_told(server: Hub, tmp_path: Path) -> None:
    shard = f"/datasets/group/set/resolve/{COMMIT}/train-00001-of-{N_SHARDS:05}.parquet"
    server.busy[shard] = 2
    of_set, gated, private, closed, *addresses = opened(
        tmp_path,
        {"hub": "group/set"},
        {"hub": "group/gated"},
        {"hub": "group/none"},
        {"hub": "group/closed"},
        {"path": f"hf://datasets/group/set/train-{{00000..00005}}-of-{N_SHARDS:05}.parquet"},
        {"path": "hf://datasets/group/set/train.parquet"},
        {"path": "hf://datasets/group/none/train.parquet"},
        {"path": "hf://datasets/group/gated/train.parquet"},
        {"path": "hf://dataset/group/set/train.parquet"},
        {"path": "hf://datasets/group"},
        {"path": "hf://group/set/train.parquet"},
    )
    assert of_set == expected() and server.busy[shard] == 0
    assert not list((tmp_path / "home").rglob("*.arrow")), "nothing but tokens is kept"
    ask, log_in = "ask for access on its page of the hub, then ", "log in with `hf auth login`, or set HF_TOKEN"
    form, check = (
        "; write hf://datasets/OWNER/NAME/FILE",
        f"; check the name; if it is not public, ask for access, and {log_in}",
    )
    found, *refused = addresses
    assert found == expected()
    for (line,), what, mend in zip(
        [gated, private, closed, *refused],
        [*["not open to this account"] * 3, "there is no such file", *["not found"] * 2, *["Invalid"] * 2, "not found"],
        [f"; {ask}{log_in}", f"; check data.hub; if the set is private, {log_in}", f"; {ask}{log_in}"]
        + ["; check the name", check, check, form, form, form],
        strict=True,
    ):
        assert what in line and line.endswith(mend), line


@pytest.mark.slow
def test_a_streamed_build_that_is_killed_goes_on(server: Hub, tmp_path: Path) -> None:
    check_killed_builds(tmp_path, hub="group/set")
    (found,) = opened(tmp_path, {"hub": "group/set"})
    assert found == expected()
    server.shutdown()
    server.server_close()
    first, other = opened(tmp_path, {"hub": "group/set"}, {"hub": "group/closed"})
    assert first == expected(), "what is in the token cache needs no hub"
    assert "the hub cannot be reached" in other[0]
