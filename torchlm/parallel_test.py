"""What processes share, in two real ones, and what each gets of a batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jaxlm import config as configs
from jaxlm.config import Config
from jaxlm.errors import UserError
from torchlm import parallel
from torchlm.parallel import Mesh

CPU = torch.device("cpu")
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from jaxlm.config import Config
from torchlm import parallel

mesh = parallel.make_mesh(Config())
told = {"sizes": [mesh.size, parallel.n_processes()]}
with parallel.joined(mesh, Config()) as config:
    print("printed by", mesh.rank)
    told["run_dir"] = config.run.dir
    told["sums"] = {name: x.item() for name, x in parallel.sum_over_processes(
        {"a": torch.tensor(mesh.rank + 1), "b": torch.tensor(0.5)}).items()}
    is_told = parallel.any_process(mesh, lambda rank: mesh.rank == rank)
    told["any"] = [is_told(rank) for rank in (0, 1, 2)]
    told["mean"] = parallel.mean_of_processes(mesh, 0.25 + mesh.rank)
    told["first"] = parallel.from_first(f"told by {mesh.rank}")

    torch.manual_seed(mesh.rank)
    plain = torch.nn.Linear(2, 1)
    model = parallel.replicated(mesh, torch.nn.Linear(2, 1))
    told["same_start"] = [x.item() for x in model.module.weight.flatten()]
    for i in range(2):
        with parallel.gradients_exchanged(model, is_last=i == 1):
            model(torch.full((1, 2), 10.0 ** i * (mesh.rank + 1))).sum().backward()
        told[f"gradient{i}"] = model.module.weight.grad.flatten().tolist()
    parallel.copy_from_first(mesh, plain)
    told["copied"] = [x.item() for x in plain.weight.flatten()]
    told["single"] = parallel.single(model) is model.module
    parallel.wait(mesh)
    del model
told["threads"] = [Path(f"/proc/self/task/{i}/comm").read_text() for i in os.listdir("/proc/self/task")]
with open(f"{sys.argv[1]}/{mesh.rank}.json", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Return what two processes found, and the folder they ran in."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "program.py").write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [*torchrun, "program.py", "."], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stdout.splitlines() if "printed" in line] == ["printed by 0"]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_totals_and_flags_are_of_all_processes(told: list[dict]) -> None:
    for one in told:
        assert one["sizes"] == [2, 2]
        assert one["sums"] == {"a": 3, "b": 1.0}
        assert one["any"] == [True, True, False]
        assert one["mean"] == 0.75
        assert one["first"] == "told by 0"
        assert [name for name in one["threads"] if "gloo" in name] == []  # they would abort a process that ends


def test_parameters_are_those_of_the_first_process(told: list[dict]) -> None:
    assert told[0]["same_start"] == told[1]["same_start"]
    assert told[0]["copied"] == told[1]["copied"]
    assert told[0]["copied"] != told[0]["same_start"]
    assert told[0]["single"] and told[1]["single"]


def test_gradients_are_exchanged_with_the_last_batch_only(told: list[dict]) -> None:
    assert [one["gradient0"] for one in told] == [[1.0, 1.0], [2.0, 2.0]]
    assert [one["gradient1"] for one in told] == [[16.5, 16.5]] * 2  # the mean of 1 + 10 and 2 + 20


def test_only_the_first_process_has_the_run_folder(told: list[dict]) -> None:
    assert told[0]["run_dir"] == ""
    assert told[1]["run_dir"] and not Path(told[1]["run_dir"]).exists()


def test_each_process_has_its_slice_of_the_batch() -> None:
    batch = {"tokens": np.arange(24).reshape(3, 4, 2).astype(np.int32), "labels": np.arange(12).reshape(3, 4)}
    rows = [parallel.local_samples(Mesh(rank, 2, CPU), 4) for rank in (0, 1)]
    assert [part.tolist() for part in rows] == [[0, 1], [2, 3]]
    for part in rows:
        on_device = parallel.put_batch(Mesh(1, 2, CPU), {name: x[:, part] for name, x in batch.items()})
        for name, x in batch.items():
            assert on_device[name].dtype == torch.int64
            np.testing.assert_array_equal(on_device[name], x[:, part])


def test_a_batch_that_processes_cannot_share_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"train.batch_size=6 is not divisible by the 4 processes; use 4 or 8"):
        parallel.make_mesh(configs.build({"train.batch_size": 6}))


def test_one_process_needs_no_group() -> None:
    mesh = parallel.make_mesh(Config())
    assert (mesh.rank, mesh.size) == (0, 1)
    totals = {"a": torch.tensor(2)}
    assert parallel.sum_over_processes(totals) is totals
    with parallel.joined(mesh, config := Config()) as same:
        assert same is config
    model = torch.nn.Linear(2, 1)
    assert parallel.single(parallel.replicated(mesh, model)) is model
