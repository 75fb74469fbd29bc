"""Weights of classes: balanced, by name and by number, and what is no weight."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.data import labels, prepare
from jaxlm.errors import UserError
from jaxlm.tasks import TASKS
from jaxlm.training.log import RunLog


def test_weights_are_balanced_by_name_or_by_number() -> None:
    classes, counts = ("a", "b=c", "d"), [6, 3, 0]
    weights = labels.weights("balanced", classes, counts)
    assert weights == (0.75, 1.5, 1.0)  # of what does not occur, the weight is for smoothing alone
    assert np.dot(weights, counts) == sum(counts)
    assert labels.weights("b=c=2, d=0", classes, counts) == (1, 2, 0)
    assert labels.weights("3,1,0.5", classes, counts) == (3, 1, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2", "train.class_weights=1,2: there are 3 classes, pos, neg, none; write NAME=WEIGHT"),
        ("poss=2", "'poss' is none of the classes pos, neg, none; did you mean pos?"),
        ("pos=x", "the weight of pos, 'x', is no number of 0 or more"),
        ("pos=-1", "the weight of pos, '-1', is no number"),
        ("0,0,0", "all weights are 0"),
    ],
)
def test_what_is_no_weight_is_said(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        labels.weights(text, ("pos", "neg", "none"), [1, 1, 1])
    assert said in str(error.value)
    with pytest.raises(UserError, match="all weights are 0, for the classes of the training texts"):
        labels.weights("0,0,1", ("pos", "neg", "none"), [1, 1, 0])


def prepared(folder: Path, task: str = "classify", **settings: Any) -> configs.Config:
    (folder / "train.tsv").write_text(
        "text\tlabel\n" + "".join(f"text {i}\t{'yes' if i % 4 else 'no'}\n" for i in range(80))
    )
    data = {"data.path": str(folder / "train.tsv"), "data.cache_dir": str(folder), "tokenizer.vocab_size": 300}
    data |= {"data.test_fraction": 0.0, "data.validation_fraction": 0.1}
    config = configs.build({"task": task, "train.batch_size": 4, **data, **settings})
    kind = TASKS[task]
    return prepare.prepare(config, kind.samples, kind(config).embedded, RunLog(stderr=True).pass_bar)[0]


def test_settings_get_the_numbers_that_the_training_part_has(tmp_path: Path) -> None:
    config = prepared(tmp_path, **{"train.class_weights": "balanced"})
    no, yes = config.train.weights
    assert 2.5 < no / yes < 3.6
    assert prepared(tmp_path, **{"train.class_weights": config.train.class_weights}) == config
    config = prepared(tmp_path, **{"train.class_weights": "no=3", "train.sampling": "weighted"})
    assert config.train.weights == (3, 1) and config.train.label_rule(True) == {"smoothing": 0.0, "weights": ()}
    with pytest.raises(UserError, match="a sample of task=mlm has no class"):
        prepared(tmp_path, "mlm", **{"train.class_weights": "1,2", "train.sampling": "weighted"})


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--train.sampling weighted", "drawn by train.class_weights; give them"),
        ("--train.sampling weighted --train.class-weights balanced --data.pack documents", "set data.pack=none"),
        ("--train.label-smoothing 0.1 --model.head-outputs vocabulary", "has outputs that are no class"),
    ],
)
def test_settings_that_do_not_go_together_are_said(argv: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        configs.load(["--task", "sst2", *argv.split()])
    assert said in str(error.value)


def test_data_of_another_task_and_empty_texts_are_noted(tmp_path: Path) -> None:
    rows = "".join(f"text {i}\t{'pair' * (i > 1)}\t{i % 2}\n" for i in range(80))
    (tmp_path / "train.tsv").write_text(f"sentence1\tsentence2\tlabel\n{rows}")
    data = {"data.path": str(tmp_path / "train.tsv"), "data.cache_dir": str(tmp_path), "tokenizer.vocab_size": 300}
    noted = {}
    for task in ("rte", "wnli"):
        config = configs.build({"task": task, "data.pair_column": "auto", "train.batch_size": 4, **data})
        kind = TASKS[task]
        noted[task] = prepare.prepare(config, kind.samples, kind(config).embedded, RunLog(stderr=True).pass_bar)[
            1
        ].notes
    other = "the classes 0, 1 are not those of rte: are these the data of another task?"
    assert other in noted["rte"] and not any("another task" in note for note in noted["wnli"])
    assert any(note.startswith("2 texts are empty") for note in noted["wnli"])
