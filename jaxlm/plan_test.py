"""Predictions of the plan against steps that run, counts by hand, and the compiler of TPUs where it is installed."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm import parallel, plan
from jaxlm.cost import compile_ahead, hlo, roofline, search
from jaxlm.cost.roofline import Sent, Step
from jaxlm.parallel_test import MESHES, OnMesh, run_with_8_devices, settings
from jaxlm.runtime.chips import chip
from jaxlm.tasks import TASKS

has_libtpu = importlib.util.find_spec("libtpu") is not None
STEP = Step(
    device="TPU v5 lite",
    n_devices=8,
    mesh={"data": 8, "fsdp": 1, "tensor": 1},
    n_parameters=10**9,
    weights=4 * 10**9,
    moments=8 * 10**9,
    activations=10**9,
    flops=394 * 10**12,
)
COMPILED = {"batches": 10, "temporary": 10**9, "code": 10**6, "traffic": 819 * 10**9, "compile_s": 1.0}


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxlm.plan", *args], text=True, capture_output=True)


def held(names: list[str]) -> dict[str, Any]:
    """Return what a device holds of states that have been made and trained, and what the plan has for it."""
    found = {}
    for name in names:
        config = settings("mlm", MESHES[name])
        on = OnMesh(config)
        state, _, _ = on.train(2)
        first = on.mesh.devices.flat[0]

        def on_first(tree: Any, first: Any = first) -> int:
            parts = [part for x in jax.tree.leaves(tree) for part in x.addressable_shards if part.device == first]
            return sum(part.data.nbytes for part in parts)

        real = [on_first(tree) for tree in (state.params, state.opt_state)]
        step = compile_ahead.measure(config, roofline.LOCAL)
        shapes = compile_ahead.batch(TASKS["mlm"](config), (config.train.accumulate, config.train.batch_size))
        batches = parallel.put_batch(on.mesh, {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}, axis=1)
        real.append(on_first([batches, state.step]) + jax.random.key_data(jax.random.key(0)).nbytes)
        found[name] = {"real": real, "planned": [step.weights, step.moments, step.batches]}
    return found


@pytest.mark.slow
def test_weights_and_moments_are_what_a_device_holds_in_training() -> None:
    found = run_with_8_devices(f"held({['fsdp 8', 'fsdp 2 x tensor 2 x data 2']})", "jaxlm.plan_test")
    for name, sizes in found.items():
        (weights, moments, batches), planned = sizes["real"], sizes["planned"]
        counts = 2 * 4  # of updates, in the states of Adam and of the rate
        assert planned[:2] == [weights, moments - counts], name
        assert planned[2] == batches + counts, name


def peak() -> dict[str, int]:
    """Return how much a step adds to the memory of this process, and what the plan has for it."""

    def most() -> int:
        # getrusage would count what the process was before it began this program, too.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    names = {"model.d_model": 256, "model.seq_len": 128, "model.vocab_size": 8000, "model.n_layers": 4}
    config = configs.build({"task": "gpt", "train.batch_size": 32, **names})
    mesh = parallel.make_mesh(config)
    update, (state, batches, _) = compile_ahead.abstract_update(config, mesh)
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), (state, batches))
    arguments = (*zeros, jax.device_put(jax.random.key(0), parallel.replicated(mesh)))
    compiled = update.lower(*arguments).compile()
    before = most()
    jax.block_until_ready(compiled(*arguments))
    after = most()
    step = compile_ahead.measure(config, roofline.LOCAL)
    sizes = {"temporary": step.temporary or 0, "activations": step.activations}
    return {"added": after - before, **{name: mesh.size * n for name, n in sizes.items()}}


@pytest.mark.slow
def test_temporary_memory_is_what_a_step_adds_to_its_process() -> None:
    found = run_with_8_devices("peak()", "jaxlm.plan_test")
    assert found["added"] == pytest.approx(found["temporary"], rel=0.2)
    assert 0.4 < found["activations"] / found["temporary"] < 1  # the rest are gradients and the logits'


def test_flops_are_those_of_the_model_and_what_remat_makes_anew() -> None:
    values = {"task": "gpt", "model.vocab_size": 50, "model.d_model": 24, "model.n_heads": 3, "train.batch_size": 4}
    steps = {}
    for remat in ("none", "dots", "full"):
        config = configs.build({**values, "model.remat": remat, "train.accumulate": 3})
        mesh = parallel.abstract_mesh((2, 1, 1))
        steps[remat] = compile_ahead.analytic(config, mesh, "TPU v4")
    T, D, L, samples = 64, 24, 2, 4 * 3 // 2
    block, attention, logits = 2 * T * 12 * D * D, 4 * T * T * D, 2 * T * D * 50
    assert steps["none"].flops == samples * 3 * (L * (block + attention) + logits)
    # All of a block but its last product, whose result no gradient needs; or attention alone, whose products have
    # dimensions of a batch.
    last = 2 * T * 4 * D * D
    assert steps["full"].flops - steps["none"].flops == samples * L * (block + attention - last)
    assert steps["dots"].flops - steps["none"].flops == samples * L * attention
    kept = [steps[remat].activations for remat in ("none", "dots", "full")]
    assert kept == sorted(kept, reverse=True) and kept[0] > 3 * kept[2]
    # What full keeps of each block is its input, for 2 samples of a device.
    assert kept[2] > 2 * L * T * D * 4


def test_traffic_of_a_step_without_loops_is_that_of_xlas_analysis() -> None:
    # With more than one block, XLA counts the loop's body once.
    config = configs.replace(settings("gpt", (1, 1, 1), **{"model.dropout": 0.0}), "model.n_layers", 1)
    update, arguments = compile_ahead.abstract_update(config, parallel.make_mesh(config, jax.devices()[:1]))
    compiled = update.lower(*arguments).compile()
    traffic = hlo.traffic(hlo.parse(compiled.as_text()))
    assert traffic == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.02)


def test_activations_are_split_as_the_mesh_splits_them() -> None:
    config = settings("gpt")
    whole, data, fsdp, tensor = (
        compile_ahead.activations(config, dict(zip(parallel.AXES, sizes, strict=True)))
        for sizes in ((1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 2))
    )
    assert data == fsdp == whole // 4
    assert whole // 2 < tensor < whole


def test_the_roofline_is_the_longest_of_three_times() -> None:
    config = configs.build({"task": "gpt", "train.max_steps": 3600, "train.precision": "bfloat16"})
    sent = (Sent("all-reduce", "data", 200 * 10**9, 2), Sent("all-gather", "tensor", 10**9, 0))
    found = roofline.plan(config, "v5e:2x4", dataclasses.replace(STEP, sent=sent, **COMPILED), price=1.5)
    assert [found.compute_s, found.memory_s, found.interconnect_s] == [2.0, 1.0, 2.0]  # 2 links of 50 GB/s
    assert (found.bound, found.update_s, found.hours, found.chip_hours, found.money) == ("compute", 2, 2, 16, 24)
    assert found.n_bytes == 13_001_000_010 and found.fits
    assert found.utilization == pytest.approx(found.model_flops / (8 * 197e12 * 2))
    slower = dataclasses.replace(STEP, sent=(Sent("all-reduce", "data", 10**12, 1),), **COMPILED)
    assert roofline.plan(config, "v5e:2x4", slower).bound == "interconnect"
    # float32 takes six products of bfloat16.
    whole = configs.replace(config, "train.precision", "float32")
    assert roofline.plan(whole, "v5e:2x4", slower).compute_s == 12
    # Of the original's cycle, a third of the updates take two batches.
    cycled = configs.replace(config, "train.cycle_steps", 100)
    assert roofline.plan(cycled, "v5e:2x4", slower).hours == pytest.approx(20 * 4 / 3)


def test_what_is_not_known_is_not_told() -> None:
    config = configs.build({"task": "gpt"})
    found = roofline.plan(config, "local", dataclasses.replace(STEP, device="cpu", **COMPILED))
    assert (found.limit, found.fits, found.update_s, found.utilization, found.chip_hours) == (None,) * 5
    found = roofline.plan(config, "v5e:2x4", STEP)  # not compiled
    assert found.n_bytes == 4e9 + 4e9 + 8e9 + 1e9 and found.memory_s is None
    # Two devices of JAX are a chip.
    assert roofline.plan(config, "tpu7x:2x2x1", dataclasses.replace(STEP, device="TPU7x")).n_chips == 4


@pytest.mark.parametrize(
    ("kind", "shape", "axes", "group", "links"),
    [
        ("TPU v5 lite", (2, 4), (8,), range(8), 2),  # two lines
        ("TPU v5 lite", (16, 16), (256,), range(256), 4),  # a torus
        ("TPU v5 lite", (16, 16), (16, 16), range(16), 2),  # a ring of it
        ("TPU v5 lite", (16, 16), (64, 4), range(4), 1),  # a part of a ring
        ("TPU v4", (4, 4, 4), (64,), range(64), 6),
        ("TPU v4", (2, 2, 4), (16,), range(16), 3),
        ("TPU v5", (4, 4, 4), (4, 16), range(16), 4),
    ],
)
def test_links_are_those_of_the_torus_that_a_group_extends_over(
    kind: str, shape: tuple[int, ...], axes: tuple[int, ...], group: range, links: int
) -> None:
    coords = [(*place, 0)[:3] for place in np.ndindex(*shape)]
    mesh: Any = SimpleNamespace(devices=np.array([SimpleNamespace(coords=x) for x in coords]).reshape(axes))
    known = chip(kind)
    assert known is not None and compile_ahead.n_links(mesh, list(group), known) == links


def test_candidates_of_a_sweep_take_the_same_samples_and_fit_the_devices() -> None:
    config = configs.build({"task": "gpt", "train.batch_size": 8, "train.accumulate": 32, "model.vocab_size": 50})
    found = list(search.candidates(config, 16, search.SWEPT))
    assert len(found) == len({json.dumps(configs.flat(x)) for x in found}) > 20
    for x in found:
        assert x.train.batch_size * x.train.accumulate == 256
        assert configs.mesh_sizes(x, 16) == dataclasses.asdict(x.mesh)
        assert x.mesh.tensor in (1, 2)  # 50 is not divisible by 4
    assert {x.model.remat for x in found} == {"none", "dots", "full"}
    assert len(list(search.candidates(configs.replace(config, "mesh.fsdp", 2), 2, ["remat"]))) == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--topology v5e:4", "error: --topology v5e:4: must be a kind of TPU and its shape, such as v5e:2x4"),
        ("--topology v9:2x2", "error: --topology v9:2x2: must be a kind of TPU"),
        ("--topology v5e:0x4", "error: --topology v5e:0x4: must be a kind of TPU"),
        ("--sweep meshes", "error: --sweep: 'meshes' is not one of mesh, batch, remat; did you mean mesh?"),
        ("--write best.toml", "error: --write needs --sweep"),
        ("--price -1", "error: --price -1.0: must be a number from 0"),
        ("--d-model 3", "error: --d-model: unknown setting; did you mean --model.d-model?"),
    ],
)
def test_bad_input_is_one_line(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        plan.main(args.split())
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(message) and told.count("\n") == 1


@pytest.mark.skipif(has_libtpu, reason="libtpu is installed")
def test_without_libtpu_the_plan_has_the_analytic_part_and_tells_the_extra() -> None:
    args = ["--task", "gpt", "--topology", "v5e:2x4", "--model.vocab-size", "1000", "--train.precision", "bfloat16"]
    done = run(*args, "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and "pip install 'jaxlm[tpu]'" in done.stderr
    assert (found["n_chips"], found["chip"], found["bound"], found["memory_s"]) == (8, "TPU v5e", "compute", None)
    assert found["tokens"] == 32 * 64 and found["step"]["weights"] == 4 * found["step"]["n_parameters"]


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_does() -> None:
    sizes = {"d-model": 1024, "n-layers": 24, "n-heads": 16, "seq-len": 1024, "vocab-size": 50304, "dropout": 0}
    args = [word for name, value in sizes.items() for word in (f"--model.{name}", str(value))]
    # 1.3 GB of weights, moments and gradients each, but activations of 16 samples.
    args += ["--train.precision", "bfloat16", "--train.batch-size", "64", "--topology", "v5e:2x2"]
    done = run("--task", "gpt", *args)
    assert done.returncode == plan.TOO_LARGE and "does not fit" in done.stdout
    told = done.stderr.splitlines()
    start = told.index("these fit:")
    assert any(line.startswith("the step does not fit on TPU v5e: ") for line in told[:start])
    assert "  --model.remat full" in told[start:]


@pytest.mark.slow
def test_a_sweep_writes_the_best_as_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "best.toml"
    args = ["--task", "gpt", "--train.batch-size", "4", "--sweep", "remat", "--write", str(path)]
    done = run(*args, "--model.vocab-size", "300", "--model.remat", "full", "--json")
    found = json.loads(done.stdout)
    assert len(found) == 3
    best = found[0]
    assert best["step"]["flops"] == min(x["step"]["flops"] for x in found)
    config, _ = configs.load(["--config", str(path)])
    assert config.model.remat == best["remat"] != "full" and config.train.batch_size == 4
    assert run(*args).returncode == 2  # the file is there


@pytest.mark.skipif(not has_libtpu, reason="needs the extra tpu")
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x2", "v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_steps_are_compiled_for_tpus_that_are_not_there(topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O1")  # which takes a third of the time
    sizes = {"model.d_model": 256, "model.seq_len": 128, "model.vocab_size": 1024, "mesh.fsdp": 2, "mesh.tensor": 2}
    config = configs.build({"task": "gpt", "train.precision": "bfloat16", "train.batch_size": 32, **sizes})
    step = search.measure(config, topology)
    found = roofline.plan(config, topology, step)
    assert (step.missing, step.too_large, step.n_devices, found.n_chips) == ("", "", 8, 8)
    assert step.mesh == {"data": 2, "fsdp": 2, "tensor": 2} and found.fits
    assert step.temporary and step.traffic and step.sent
    sent = {(x.kind, x.axes): x.n_bytes for x in step.sent}
    matrices, vocabulary = 2 * 12 * 256 * 256, 1024 * 256
    # A quarter of each matrix: at least forward, as bfloat16, and at most forward and backward, as float32.
    assert 2 * matrices / 4 <= sent["all-gather", "fsdp"] <= 2 * 4 * (matrices + 2 * vocabulary) / 4
    assert "all-reduce" in {x.kind for x in step.sent} and all(x.n_links in (1, 2, 3) for x in step.sent)
