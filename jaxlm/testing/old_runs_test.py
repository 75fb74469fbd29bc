"""Runs and files that version 0.1.0 wrote (commit 1f422b5) are still read, resumed, used and converted.

parity_tests/old_runs.tar.xz has tiny runs of jaxlm (mlm, gpt, sst2, and lora: adapters over a frozen base) and of
torchlm after 4 of 8 updates, what jaxlm.convert made of them, and their data.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from jaxlm import predict, runs
from jaxlm.weights import snapshots

ARCHIVE = Path(__file__).parents[2] / "parity_tests" / "old_runs.tar.xz"
# SHA-256 of weights and moments, as that commit read them.
DIGESTS = {
    "mlm": "4a7271cdb8818e3c",
    "gpt": "ed778154378349b1",
    "sst2": "7134159e38002718",
    "lora": "12118b516172e966",
    "torch_mlm/checkpoints/4.pt": "ace61b2b420e9387",
    "gpt2": "c39f96ec8149b0c3",
    "sst2.safetensors": "7134159e38002718",
    "mlm.pt": "4a7271cdb8818e3c",
}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("name", DIGESTS)
def test_every_bit_is_read(name: str, old: Path) -> None:
    snapshot, digest = snapshots.read(old / name), hashlib.sha256()
    for tree in (snapshot.weights, *(snapshot.moments or ())):
        for tensor in sorted(tree):
            digest.update(tensor.encode() + tree[tensor].tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


def test_checkpoints_count_as_whole(old: Path) -> None:
    assert runs.main(["verify", *(str(old / name) for name in ("mlm", "gpt", "sst2", "lora", "torch_mlm"))]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlm", "gpt", "sst2", "lora", "torch_mlm"])
def test_a_run_resumes(name: str, old: Path) -> None:
    package = "torchlm" if name.startswith("torch") else "jaxlm"
    command = [
        sys.executable,
        "-m",
        f"{package}.train",
        "--resume",
        "auto",
        "--run.dir",
        name,
        "--train.max-steps",
        "8",
    ]
    env = os.environ | {"XDG_CACHE_HOME": str(old / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=old, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "after 4 updates" in done.stdout and "8 of 8 updates" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("mlm", "7 birds [MASK] on wire", {"text", "filled", "masks"}),
        ("mlm.pt", "7 birds [MASK] on wire", {"text", "filled", "masks"}),
        ("gpt", "7 birds", {"prompt", "continuation", "tokens", "ending", "seed"}),
        ("gpt2", "7 birds", {"prompt", "continuation", "tokens", "ending", "seed"}),
        ("sst2", "7 birds sit", {"text", "label", "probabilities"}),
        ("lora", "7 birds sit", {"text", "label", "probabilities"}),
    ],
)
def test_a_model_answers_as_before(name: str, text: str, expected: set[str], old: Path) -> None:
    tokenizer = str(old / "mlm" / "tokenizer.json") if name == "mlm.pt" else ""
    (answer,) = predict.load(old / name, tokenizer)([text])
    assert answer.keys() == expected
    if "label" in expected:
        assert answer["label"] in (0, 1) and len(answer["probabilities"]) == 2
