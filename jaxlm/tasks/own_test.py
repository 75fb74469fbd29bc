"""Tasks of a user, in files of their own: they are predicted, evaluated, served and converted as the others are."""

import json
import re
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from starlette.testclient import TestClient

from jaxlm import config, predict, tasks
from jaxlm.data import cache
from jaxlm.data.samples import MaskedSamples
from jaxlm.errors import UserError
from jaxlm.inference import evaluation, http_api, load, predictors
from jaxlm.inference.batching import Engine
from jaxlm.model import Transformer
from jaxlm.tasks import flops, parameters
from jaxlm.tasks.gpt import Gpt
from jaxlm.tasks.mlm import Mlm
from jaxlm.tasks.pairs import Pairs
from jaxlm.tasks.readme_test import block
from jaxlm.tasks.sst2 import Sst2
from jaxlm.testing import tiny_runs
from jaxlm.training import resume, teacher
from jaxlm.weights import formats, snapshots

GUIDE = types.ModuleType("rating")
exec(block("python", "jaxlm/tasks/rating.py"), GUIDE.__dict__)
Rating: Any = GUIDE.Rating  # type: ignore[attr-defined]


class Plain(Rating):
    """As the guide's, without a word on how it answers."""

    answer = tasks.Task.answer


class Numpy(Rating):
    """Answers with numbers and arrays of NumPy."""

    def answer(self, prediction: Any) -> dict[str, Any]:
        return {"rating": np.float32(prediction), "both": [np.array([prediction, 1], np.float32), np.int64(1)]}


class Stars(Sst2):
    baseline_name = "the most frequent number of stars"


class Level(Sst2):
    """Derived from a task of classes, with one output."""

    build_model, loss, predict, scores = Rating.build_model, Rating.loss, Rating.predict, Rating.scores
    baseline, show = Rating.baseline, Rating.show

    def warning(self, totals: Any) -> str:
        return ""


class Words(Mlm):
    pass


class Verse(Gpt):
    pass


class Dialogue(Pairs):
    pass


class BagBase(nnx.Module):
    def __init__(self, n_ids: int, width: int, rngs: nnx.Rngs):
        self.table = nnx.Embed(n_ids, width, rngs=rngs)


class BagHead(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.ln = nnx.LayerNorm(width, rngs=rngs)
        self.mix = nnx.Conv(width, width, (3,), rngs=rngs)
        self.out = nnx.Linear(width, 1, rngs=rngs)


class Bag(nnx.Module):
    """A model of no class of heads.py, whose base is no Transformer."""

    def __init__(self, n_ids: int, width: int, rngs: nnx.Rngs):
        self.base, self.head = BagBase(n_ids, width, rngs), BagHead(width, rngs)

    def __call__(self, tokens_BT: Any, key: Any = None, last_B: Any = None) -> Any:
        x_BTD = self.head.mix(self.head.ln(self.base.table(tokens_BT)))
        return self.head.out(x_BTD.mean(axis=1))


class Bags(Rating):
    def build_model(self, rngs: nnx.Rngs) -> Bag:
        return Bag(self.config.model.vocab_size, self.config.model.d_model, rngs)


class Listed(Bags):
    """Its model has a list, whose places have no names."""

    def build_model(self, rngs: nnx.Rngs) -> Bag:
        model = super().build_model(rngs)
        model.base.blocks = nnx.List([nnx.Linear(2, 3, rngs=rngs)])
        return model


class Sequence(Mlm):
    """A masked task with a model of its own."""

    def build_model(self, rngs: nnx.Rngs) -> Any:
        model = Bag(self.config.model.vocab_size, self.config.model.d_model, rngs)
        model.base = Transformer(self.config.model, False, jnp.float32, rngs)
        return model


TASKS: dict[str, Any] = {
    "rating": Rating,
    "plain": Plain,
    "numpy": Numpy,
    "stars": Stars,
    "level": Level,
    "words": Words,
    "verse": Verse,
    "dialogue": Dialogue,
    "bags": Bags,
    "listed": Listed,
    "sequence": Sequence,
}
OF_TASK = {"rating": 5, "plain": 5, "numpy": 5, "stars": 3, "level": 5, "bags": 5}  # numbers of labels
CAUSAL = tiny_runs.OF_TASK["gpt"]


@pytest.fixture(autouse=True)
def _added(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, task in TASKS.items():
        monkeypatch.setitem(tasks.TASKS, name, task)


def write(folder: Path, task: str, **settings: Any) -> Path:
    kind = {"data.n_labels": OF_TASK[task]} if task in OF_TASK else CAUSAL if task in ("verse", "dialogue") else {}
    return tiny_runs.write(folder / task, task, **(kind | settings))


@pytest.mark.parametrize(
    ("task", "text", "keys"),
    [
        ("rating", "the cat", {"text", "rating"}),
        ("plain", "the cat", {"text", "prediction"}),
        ("numpy", "the cat", {"text", "rating", "both"}),
        ("bags", "the cat", {"text", "rating"}),
        pytest.param("level", "the cat", {"text", "prediction"}, marks=pytest.mark.slow),
        pytest.param("stars", "the cat", {"text", "label", "probabilities"}, marks=pytest.mark.slow),
        pytest.param("words", "the [MASK] sat", {"text", "filled", "masks"}, marks=pytest.mark.slow),
        pytest.param("verse", "the cat", {"prompt", "continuation", "ending", "seed"}, marks=pytest.mark.slow),
        pytest.param("dialogue", "the cat", {"prompt", "continuation", "ending", "seed"}, marks=pytest.mark.slow),
    ],
)
def test_it_is_predicted_as_its_file_says(task: str, text: str, keys: set[str], tmp_path: Path) -> None:
    predictor = predict.load(write(tmp_path, task))
    (answer,) = predictor([text], **({"max_new_tokens": 3} if "prompt" in keys else {}))
    assert keys <= set(answer) and predictor.shown(answer) and json.loads(json.dumps(answer)) == answer
    if keys & {"rating", "prediction"}:
        model, trained = predictor.trained.model, predictor.trained
        tokens = predictor._padded([predictor.encode(text)])
        expected = float(trained.task.predict(model, {"tokens": tokens})[0])
        assert answer.get("rating", answer.get("prediction")) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize(
    ("task", "form"),
    [
        ("rating", formats.SAFETENSORS),
        ("bags", formats.SAFETENSORS),
        ("bags", formats.CHECKPOINT_1_2),
        ("words", formats.CHECKPOINT_1_2),
        *(
            pytest.param(task, form, marks=pytest.mark.slow)
            for task in ("rating", "stars", "level", "verse", "dialogue")
            for form in (formats.CHECKPOINT_1_2, formats.STATE_DICT)
        ),
    ],
)
def test_it_is_converted_and_back_bit_for_bit(task: str, form: str, tmp_path: Path) -> None:
    if form != formats.SAFETENSORS:
        pytest.importorskip("torch")
    run = write(tmp_path, task, **({"model.head_dense": "bert"} if task == "level" else {}))
    snapshot = snapshots.read(run)
    file = tmp_path / ("file.safetensors" if form == formats.SAFETENSORS else "file.pt")
    if task == "bags" and form == formats.CHECKPOINT_1_2:
        with pytest.raises(UserError, match=r"task=bags is none of heads.py.*safetensors"):
            snapshots.write(file, snapshot, form)
        return
    snapshots.write(file, snapshot, form)
    settings = snapshot.config if form == formats.STATE_DICT else None
    snapshots.write(tmp_path / "back", snapshots.read(file, settings), formats.RUN)
    again = snapshots.read(tmp_path / "back")
    assert list(again.weights) == list(snapshot.weights)
    assert all(np.array_equal(again.weights[name], x) for name, x in snapshot.weights.items())
    first, second = ({n: x.shape for n, x in checkpoint_leaves(path)} for path in (run, tmp_path / "back"))
    assert first == second  # the tree is the one that the model has, too


def checkpoint_leaves(path: Path) -> list[tuple[str, Any]]:
    model, _ = load.load_model(path)
    return list(formats.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)) and snapshots.load(path).tree))


def test_a_head_has_the_outputs_that_its_model_has(tmp_path: Path) -> None:
    for task, n_outputs in (("rating", 1), ("level", 1), ("stars", 3)):
        found = snapshots.config_of(snapshots.load(write(tmp_path, task)).info["config"], tmp_path)
        assert parameters.shapes(found)["head.linear.weight"] == (n_outputs, found.model.d_model)
        assert flops.n_logits(found) == (1, n_outputs)


def test_a_run_starts_from_its_base(tmp_path: Path) -> None:
    settings = {"task": "stars", "init_from": str(write(tmp_path, "verse"))}
    start = resume.find(settings, formats.RUN)
    assert start.parts == ("base",)
    assert ("model.pooling", "last", str(start.path)) in start.layers("stars")  # since it is causal
    assert resume.find(settings | {"task": "gpt"}, formats.RUN).parts == ("base", "head")


@pytest.mark.parametrize(("task", "can"), [("stars", True), ("words", True), ("verse", False), ("rating", False)])
def test_it_is_distilled_if_it_has_totals_of_logits(task: str, can: bool, tmp_path: Path) -> None:
    start = resume.to_use(write(tmp_path, task))
    if can:
        teacher.check(start.config(), start.config(), is_start=False)
    else:
        with pytest.raises(UserError, match=f"task={task} has no distillation"):
            teacher.check(start.config(), start.config(), is_start=False)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["rating", "plain", "bags"])
def test_it_is_served(task: str, tmp_path: Path) -> None:
    predictor = predict.load(write(tmp_path, task))
    engine = Engine(predictor)
    try:
        with TestClient(http_api.make(engine, http_api.Limits()), base_url="http://localhost") as client:
            (expected,) = predictor(["the cat"])
            assert client.post("/predict", json={"text": "the cat"}).json() == pytest.approx(expected)
            page = client.get("/").text
            assert '"kind": "predict"' in page and client.get("/docs").status_code == 200
            has_map = client.post("/attention", json={"text": "the cat"}).status_code == 200
            assert has_map == (task != "bags") and f'"layers": {2 if has_map else 0}' in page
    finally:
        engine.close()


@pytest.mark.parametrize(
    "task", ["bags", *(pytest.param(x, marks=pytest.mark.slow) for x in ("rating", "level", "stars"))]
)
def test_it_is_evaluated_with_its_worst_errors(task: str, tmp_path: Path) -> None:
    trained = predict.load(write(tmp_path, task)).trained
    labels = np.arange(30) % 3
    ids = [trained.tokenizer.encode(text).ids for text in tiny_runs.TEXTS] * 15
    offsets = np.cumsum([0, *map(len, ids)])
    n_bytes = np.array([1] * 30)
    split = cache.Split(np.concatenate(ids).astype(np.uint16), offsets, n_bytes, labels)
    specials = predictors.Predict(trained).specials
    samples = trained.task.samples(split, trained.config, specials, trained.config.model.vocab_size)
    found = evaluation.evaluate(trained, samples)
    assert all(score.low <= score.value <= score.high for score in found.scores.values())
    measures = [error.loss for error in found.worst]
    assert len(measures) == evaluation.N_WORST and measures == sorted(measures, reverse=True)
    if task == "stars":
        assert found.confusion and found.worst[0].probability == pytest.approx(np.exp(-measures[0]), rel=1e-4)
        return
    worst = found.worst[0]
    assert worst.probability is None and (worst.predicted - worst.label) ** 2 == pytest.approx(worst.loss, rel=1e-4)
    shown = predict.load(tmp_path / task)([worst.text])[0]
    assert shown.get("rating", shown.get("prediction")) == pytest.approx(worst.predicted, abs=0.006)


def test_what_cannot_be_done_is_said_in_one_line(tmp_path: Path) -> None:
    own = config.build({"task": "listed", "model.vocab_size": 300, "model.d_model": 12, "model.n_heads": 3})
    with pytest.raises(UserError, match=r"task=listed: its parameter base/blocks/0/\w+ .*attributes instead of a list"):
        parameters.shapes(own)
    assert MaskedSamples.model_kind == "masked"
    with pytest.raises(UserError, match=r"task=sequence is a Bag, .* jaxlm.evaluate and jaxlm.convert take any model"):
        predict.load(write(tmp_path, "sequence"))


def test_what_is_known_without_jax_is_what_the_tasks_say() -> None:
    assert {*parameters.BUILT_IN} == {*tasks.TASKS} - {*TASKS}


def test_a_task_needs_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "__file__", str(tmp_path / "config.py"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "configs").mkdir()
    with pytest.raises(UserError, match=re.escape("task=rating: unknown task")):
        config.load(["--task", "rating"])
    (tmp_path / "tasks" / "rating.py").touch()
    found, _ = config.load(["--task", "rating"])
    assert found == config.build({"task": "rating"})
