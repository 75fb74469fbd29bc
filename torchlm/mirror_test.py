"""That torchlm mirrors jaxlm: files, definitions, arguments, parameters; and the lines that PORTING.md quotes."""

import ast
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jaxlm import config as configs
from jaxlm import tasks as jaxlm_tasks
from jaxlm.params import names
from jaxlm.tasks.parameters import shapes as shapes_of
from torchlm import tasks as torchlm_tasks

ROOT = Path(__file__).parent.parent
MIRRORED = (
    *("__init__", "model", "heads", "loss", "step", "distill", "optim", "schedule", "parallel", "generate"),
    *("checkpoint", "loop", "train"),
    *("ops/__init__", "ops/layers", "ops/activations", "ops/token_positions", "ops/dropout"),
    *("ops/plain_attention", "ops/stacks"),
    *("tasks/__init__", "tasks/base", "tasks/mlm", "tasks/gpt", "tasks/classify", "tasks/sst2", "tasks/cola"),
    *("tasks/pairs", "tasks/multilabel", "tasks/regress", "tasks/tag", "tasks/embed"),
)

# What one framework needs and the other does not, with the reason. All else must be in both.
ONLY_JAX = {
    "model": {"DROPOUTS": "explicit keys"},
    "ops/plain_attention": dict.fromkeys(("Attend", "Mask.queries_BT"), "a cache of keys and values, and kernels"),
    "ops/dropout": {"keeps": "PyTorch has it"},
    "ops/stacks": dict.fromkeys(
        ("is_unrolled", "blocks_of", "block_of", "scan_blocks"), "stacks of the parameters of all blocks"
    ),
    "heads": {"LanguageModel.loss": "logits and loss in one pass that never has all logits"},
    "optim": {
        "scale_by_adam": "Optax's own rounds the bias correction",
        "scale_by_muon": "torchlm has an optimizer, Muon",
        **dict.fromkeys(("moments", "with_moments", "at_step"), "a state without names"),
    },
    "parallel": dict.fromkeys(
        (
            *("AXES", "BATCH", "RULES", "rule", "shardings", "rows_of_table", "table", "constrain"),
            *("abstract_mesh", "is_one_device", "platform", "is_one_cpu"),
        ),
        "parameters in parts, which DDP has not",
    ),
    "checkpoint": dict.fromkeys(
        ("CONTENTS", "parts_of", "frozen_of", "remove_unfinished", "with_parts", "read_parts"), "parts of an array tree"
    )
    | dict.fromkeys(("silence_failed_saves", "new_checkpointer", "Checkpoints.new_checkpointer"), "threads of Orbax")
    | dict.fromkeys(("restore", "Checkpoints.restore"), "jaxlm.weights reads files of torchlm, and is above both"),
    "loop": dict.fromkeys(("Compiled.shardings", "Compiled.model"), "DDP keeps all parameters on each device"),
    "step": {
        "TrainState.params": "an array tree beside the model",
        **dict.fromkeys(("TrainState.opt_state", "Rule.optimizer"), "beside the optimizer"),
        "Rule.model": "a module knows which of its parameters are trained",
    },
}
ONLY_TORCH = {
    "model": {"Embedding.table_TD": "a constant on the device; JAX compiles it in"},
    "optim": dict.fromkeys(("Muon", "Muon.__init__", "Muon.step"), "jaxlm has a transformation, scale_by_muon"),
    "schedule": {"Schedule": "Optax has the type"},
    "step": {"TrainState.model": "holds the parameters", "TrainState.optimizer": "holds its state"},
    "parallel": {
        name: "processes that work as one have to say so"
        for name in (
            *("Mesh", "Mesh.rank", "Mesh.size", "Mesh.device", "mean_of_processes", "n_processes", "single"),
            *("gradients_exchanged", "sum_over_processes", "from_first", "copy_from_first"),
            *("wait", "joined"),
        )
    },
    "checkpoint": dict.fromkeys(
        ("KEYS", "OWN", "with_snapshot", "content", "write", "read", "weights"), "the original's file format"
    )
    | {"model_for": "tasks that only jaxlm has", "Checkpoints.path": "loop.restored reads it"},
    "loop": {"restored": "jaxlm.weights reads files of torchlm, and is above its checkpoint.py"},
}
# Arguments that only jaxlm has: what products compute in (autocast), explicit keys, a source of keys for no values, and
# what cached decoding gives.
JAX_ARGUMENTS = {
    *("dtype", "key", "dropout_key", "dropout_keys", "rngs"),
    *("positions_BT", "seq_len", "attend", "axes", "layer"),
}
ARGUMENTS = {  # (jaxlm's, torchlm's) where they differ otherwise
    "model.Block.__init__": (
        ["self", "config", "is_causal", "dtype", "rngs"],
        ["self", "config", "is_causal", "rngs", "layer"],
    ),
    "ops/layers.initial_weights": (["config", "std"], ["x", "config", "rngs", "std"]),
    "ops/dropout.dropout": (["x", "rate", "key"], ["x", "rate", "is_training"]),
    "ops/plain_attention.hidden": (["mask", "T", "S"], ["mask", "T", "device"]),
    "optim.make_optimizer": (["config", "rate", "n_layers"], ["config", "model"]),
    "optim.layer_shares": (["params", "layer_decay", "n_layers"], ["model", "layer_decay"]),
    "optim.rate_shares": (["params", "config", "n_layers"], ["model", "config"]),
    "optim.is_decayed": (["params"], ["parameter"]),
    "optim.clip_by_global_norm": (["grads", "max_norm"], ["parameters", "max_norm"]),
    "parallel.replicated": (["mesh"], ["mesh", "model"]),
    "step.init_state": (["params", "optimizer", "model"], ["model", "optimizer"]),
    "loop.begin": (["run", "fresh", "shardings"], ["run", "fresh"]),
    "parallel.make_mesh": (["config", "devices"], ["config"]),
    "parallel.put_batch": (["mesh", "batch", "axis"], ["mesh", "batch"]),
    "loop.evaluate": (
        ["run", "compiled", "params", "name", "status"],
        ["run", "compiled", "model", "name", "status"],
    ),
}


def definitions(path: Path) -> dict[str, list[str] | None]:
    """Return the public names of a file and of its classes, in order, with the arguments of functions."""
    found: dict[str, list[str] | None] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = prefix + {"__call__": "forward"}.get(node.name, node.name)
                if node.name.startswith("_") and not node.name.startswith("__"):
                    continue
                found[name] = [a.arg for a in node.args.args] if isinstance(node, ast.FunctionDef) else None
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({f"{prefix}{target.id}": None for target in targets if not target.id.startswith("_")})

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return found


def test_torchlm_has_the_mirrored_files_and_no_other() -> None:
    files = [path for path in (ROOT / "torchlm").rglob("*.py") if not path.stem.endswith(("_test", "conftest"))]
    found = {path.relative_to(ROOT / "torchlm").with_suffix("").as_posix() for path in files}
    assert found == {*MIRRORED, "load", "original"}  # jaxlm/inference/load.py, and the original's checkpoint file
    assert all((ROOT / "jaxlm" / f"{name}.py").is_file() for name in MIRRORED)


@pytest.mark.parametrize("name", MIRRORED)
def test_public_names_their_order_and_arguments_are_the_same(name: str) -> None:
    ours, theirs = (definitions(ROOT / package / f"{name}.py") for package in ("torchlm", "jaxlm"))
    extra, missing = set(ours) - set(theirs), set(theirs) - set(ours)
    if name.startswith("tasks/"):
        # Inherited from jaxlm; a task of torchlm has its model, loss and prediction only, and says what its loss takes.
        assert {own for own in ours if "." in own} <= {
            f"{kind}.{method}"
            for kind in ("Task", "Mlm", "Gpt", "Classify", "Pairs", "Multilabel", "Regress", "Tag", "Embed")
            for method in ("packs", "dtype", "build_model", "loss", "totals", "predict")
        }
        assert not extra
    else:
        assert extra == ONLY_TORCH.get(name, {}).keys()
        only_jax = ONLY_JAX.get(name, {}).keys()
        assert {one for one in missing if one.partition(".")[0] not in only_jax} <= only_jax
    common = [one for one in theirs if one in ours]
    assert [one for one in ours if one in theirs] == common
    for one in common:
        pair = (theirs[one], ours[one])
        if f"{name}.{one}" in ARGUMENTS:
            assert pair == ARGUMENTS[f"{name}.{one}"]
        elif theirs[one] is not None:
            without = [a for a in theirs[one] if a not in JAX_ARGUMENTS or a in ours[one]]
            assert ours[one] == without, one


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model.positions": "learned", "model.tied_embedding": True, "model.post_norm": True, "model.pad_id": -1},
        {"model.positions": "rotary", "model.final_norm": True, "model.head_outputs": "vocabulary"},
        {"model.lora_rank": 2, "model.lora_products": "fc2,key"},
        {"model.embedding_norm": True, "model.head_dense": "bert", "model.tied_embedding": True},
        {
            "model.head_dense": "modernbert",
            "model.biases": "none",
            "model.pooling": "mean",
            "model.classifier_bias": False,
        },
        {"model.head_dense": "eurobert", "model.biases": "none", "model.pooling": "late", "model.output_bias": False},
        {"model.head_dense": "ultrabert", "model.head_hidden": 7, "model.biases": "none", "model.output_bias": False},
        {"model.norm": "rmsnorm", "model.mlp": "swiglu", "model.d_ff": 7, "model.biases": "attention"},
        {"model.n_kv_heads": 1, "model.head_dim": 6, "model.qk_norm": True, "model.first_norm": False},
        {"model.norm": "layernorm_no_bias", "model.mlp": "relu2", "model.biases": "feed_forward"},
        {
            **{"model.norm": "rmsnorm_no_scale", "model.mlp": "geglu", "model.biases": "none"},
            **{"model.head_dense": "bert", "model.output_bias": False, "model.lora_rank": 2},
            "model.lora_products": "up,fc2",
        },
    ],
)
@pytest.mark.parametrize("task", list(jaxlm_tasks.TASKS))
def test_parameters_are_the_same_up_to_the_naming_rules(task: str, options: dict[str, Any]) -> None:
    sizes = {"vocab_size": 11, "d_model": 12, "n_heads": 3, "seq_len": 5, "n_layers": 3}
    config = configs.build({"task": task, **{f"model.{name}": x for name, x in sizes.items()}, **options})
    model = torchlm_tasks.TASKS[task](config).build_model(torch.Generator())
    sizes_by_name = {name: tuple(x.shape) for name, x in model.named_parameters()}
    assert list(sizes_by_name.items()) == list(shapes_of(config).items())
    assert list(model.state_dict()) == list(sizes_by_name)

    build = jaxlm_tasks.TASKS[task](config).build_model
    shapes = nnx.eval_shape(lambda: nnx.to_pure_dict(nnx.split(build(nnx.Rngs(0)), nnx.Param)[1]))
    state = names.to_torch(jax.tree.map(lambda x: np.zeros(x.shape), shapes))
    assert {name: x.shape for name, x in state.items()} == sizes_by_name


def test_tasks_share_all_but_model_loss_and_prediction() -> None:
    assert list(torchlm_tasks.TASKS) == list(jaxlm_tasks.TASKS)
    for name, task in torchlm_tasks.TASKS.items():
        for method in (
            "embedded",
            "scores",
            "baseline",
            "show",
            "warning",
            "samples",
            "settings",
            "baseline_name",
            "lower_is_better",
        ):
            assert getattr(task, method) is getattr(jaxlm_tasks.TASKS[name], method), (name, method)
        for method in ("build_model", "loss", "predict"):
            assert getattr(task, method).__module__.startswith("torchlm."), (name, method)


def test_each_line_that_the_porting_page_quotes_is_in_its_file() -> None:
    text = (ROOT / "torchlm" / "PORTING.md").read_text(encoding="utf-8")
    files: list[str] = []
    n_quoted = 0
    for line in text.splitlines():
        if not line.startswith("|"):
            files = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if all(re.fullmatch(r"(jaxlm|torchlm)/(ops/)?\w+\.py", cell) for cell in cells):
            files = cells
        elif files and set(cells) != {"---"}:
            assert len(cells) == len(files) == 2, line
            for file, cell in zip(files, cells, strict=True):
                if cell:
                    quoted = re.fullmatch(r"`(.+)`", cell.replace(r"\|", "|"))
                    assert quoted, line
                    lines = {x.strip() for x in (ROOT / file).read_text(encoding="utf-8").splitlines()}
                    assert quoted[1] in lines, f"{file}: {quoted[1]}"
                    n_quoted += 1
    assert n_quoted > 60
