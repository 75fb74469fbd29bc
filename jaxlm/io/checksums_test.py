"""Damage to any file of a real checkpoint is reported with the name of the file."""

import json
import shutil
from pathlib import Path

import pytest

from jaxlm.errors import UserError
from jaxlm.io import checksums
from jaxlm.training import resume
from jaxlm.training.resume_test import flip, snapshot_of
from jaxlm.weights import formats


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    formats.WRITERS[formats.RUN](folder, snapshot_of(3))
    return folder / "checkpoints" / "3"


def files(checkpoint: Path) -> list[str]:
    found = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()]
    assert len(found) > 20 and {name.partition("/")[0] for name in found} >= {"base", "head", "optimizer", "info"}
    return sorted(found)


def test_a_whole_checkpoint_has_a_sum_of_each_file(checkpoint: Path) -> None:
    assert checksums.damage(checkpoint) == "" and checksums.is_finished(checkpoint)
    assert set(json.loads((checkpoint / checksums.FILE).read_text())) == set(files(checkpoint))


CHANGED = "does not match its checksum"


@pytest.mark.parametrize(("harm", "told"), [("flip", CHANGED), ("cut", CHANGED), ("lose", "is missing")])
def test_damage_to_each_file_is_told_by_its_name(harm: str, told: str, checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "3")
    for name in files(checkpoint):
        path = copy / name
        content = path.read_bytes()
        if harm == "lose":
            path.unlink()
        elif harm == "cut":
            path.write_bytes(content[:-1])
        else:
            flip(path, len(name) * 7919 % len(content))
        what = checksums.damage(copy)
        assert what.startswith(name), (name, what)
        if name != checksums.FILE:
            assert what == f"{name} {told}"
            # What only wants other parts does not mind.
            part, others = name.partition("/")[0], {"base", "head", "optimizer", "info"} - {name.partition("/")[0]}
            assert checksums.damage(copy, [part]) == (what if "/" in name else "")
            assert checksums.damage(copy, others) == ""
        path.write_bytes(content)
    assert checksums.damage(copy) == ""


def test_a_file_that_cannot_be_read_is_told(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "3")
    shutil.move(copy / "info" / "metadata", tmp_path / "kept")
    (copy / "info" / "metadata").mkdir()
    assert checksums.damage(copy) == "info/metadata cannot be read (Is a directory)"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe"]
)
def test_checksums_of_any_content_are_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / checksums.FILE).write_bytes(content)
    assert checksums.damage(tmp_path) == "checksums.json is damaged"


def test_half_a_checkpoint_is_none(checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    copy = shutil.copytree(checkpoint, run / "checkpoints" / "3")
    (copy / checksums.FILE).unlink()  # written last, and removed first
    assert not checksums.is_finished(copy)
    assert "save is incomplete" in checksums.damage(copy)
    shutil.rmtree(copy / "optimizer")
    with pytest.raises(UserError, match="there is no checkpoint of a run"):
        resume.find({"resume": str(run)}, formats.RUN)
    with pytest.raises(UserError, match=f"{copy}: damaged: .* save is incomplete"):
        resume.find({"resume": str(copy)}, formats.RUN)
