import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import DataConfig, TrainConfig
from jaxlm.data import loader, prepare, samples
from jaxlm.data.mixture import RATES, Mix, Stretch
from jaxlm.data.position import Position
from jaxlm.errors import UserError

TRAIN = TrainConfig(max_steps=1000, batch_size=8, seed=3)


class Numbers:
    """Samples of one token, their number: which source, index and epoch a batch has can be read off."""

    reads, seq_len = "text", 4

    def __init__(self, source: int, n: int, length: int = 4):
        self.source, self.n, self.length, self.constants = source, n, length, {"bytes": n}

    def __len__(self) -> int:
        return self.n

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return np.full(len(indices), self.length)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        assert indices.max() < self.n
        return {"tokens": np.stack([np.full(len(indices), self.source), indices, epochs], axis=1)}

    def cut(self, batch: Any, length: int) -> Any:
        return batch

    def n_tokens(self, batch: Any) -> int:
        return len(batch["tokens"])


def mix(sources: list[dict[str, Any]], parts: list[Any], **settings: Any) -> Any:
    named = tuple({"name": f"s{i}", **source} for i, source in enumerate(sources))
    by_name = {source["name"]: part for source, part in zip(named, parts, strict=True)}
    return Mix(by_name, DataConfig(sources=named, **settings), {name: f"hash of {name}" for name in by_name})


def taken(samples: Any, n: int, train: TrainConfig = TRAIN, position: Position = loader.START, rows: Any = None) -> Any:
    """Return source, index and epoch of the samples of n updates, [n, B, 3]."""
    batches = itertools.islice(loader.training_batches(samples, train, position, rows), n)
    return np.concatenate([batch["tokens"] for batch in batches])


@pytest.mark.parametrize("rates", [[0.75, 0.25], [0.5, 0.3, 0.2], [0.999, 0.001], [1.0], [0.0, 1.0], [0.1] * 10])
def test_any_stretch_has_the_share_of_each_source_and_each_sample_once(rates: list[float]) -> None:
    whole = np.rint(np.array(rates) * RATES).astype(np.int64)
    whole[-1] += RATES - whole.sum()
    stretch = Stretch(100, np.arange(len(rates)) * 7, whole)
    source, number = stretch.at(np.arange(100, 5100))
    for i, rate in enumerate(rates):
        of_source = number[source == i]
        np.testing.assert_array_equal(of_source, 7 * i + np.arange(len(of_source)))
        used = np.cumsum(source == i)
        assert np.abs(used - rate * np.arange(1, 5001)).max() <= 2
    for place in (100, 101, 777, 5100):
        expected = np.bincount(source[: place - 100], minlength=len(rates))
        np.testing.assert_array_equal(stretch.counts(place) - 7 * np.arange(len(rates)), expected)


def test_weights_count_tokens_and_a_temperature_evens_them_out() -> None:
    parts = [Numbers(0, 500, length=2), Numbers(1, 40, length=4)]
    shares = {}
    for name, weights, settings in (
        ("given", [3, 1], {}),
        ("size", None, {}),
        ("even", None, {"temperature": 1000.0}),
    ):
        sources = [{} if weights is None else {"weight": weight} for weight in weights or [0, 0]]
        found = taken(mix(sources, parts, **settings), 200)[..., 0].ravel()
        tokens = np.array([2 * np.sum(found == 0), 4 * np.sum(found == 1)])
        shares[name] = tokens[0] / tokens.sum()
    assert shares["given"] == pytest.approx(0.75, abs=2e-3)
    assert shares["size"] == pytest.approx(1000 / 1160, abs=2e-3)
    assert shares["even"] == pytest.approx(0.5, abs=2e-3)


def test_a_source_is_passed_over_as_one_alone_is() -> None:
    """In a mix, the samples of a source come in the order that they have without the others."""
    found = taken(mix([{"weight": 3}, {"weight": 1}], [Numbers(0, 50), Numbers(1, 40)]), 40).reshape(-1, 3)
    for i, n in enumerate((50, 40)):
        alone = taken(Numbers(i, n), 40).reshape(-1, 3)
        of_source = found[found[:, 0] == i]
        np.testing.assert_array_equal(of_source, alone[: len(of_source)])


SOURCES = [
    {"weight": 3, "weight_after": 1},
    {"weight": 1, "weight_after": 1, "epochs": 2},
    {"weight": 0.5, "weight_after": 4},
]


@pytest.mark.parametrize("step", [1, 13, 19, 20, 21, 30, 47])
def test_a_run_that_resumes_takes_the_samples_that_it_would_have(step: int) -> None:
    samples = mix(SOURCES, [Numbers(0, 50), Numbers(1, 20), Numbers(2, 30)], weights_after=20)
    whole = taken(samples, 60)
    per_update = np.array([np.bincount(update[:, 0], minlength=3) for update in whole])
    assert per_update[:20, 2].sum() == pytest.approx(20 * 8 / 9, abs=2) and per_update[:, 1].sum() == 40
    assert per_update[40:, 2].sum() == pytest.approx(20 * 8 * 0.8, abs=3), "of the weights 1 to 4, without the second"
    state = samples.state(TRAIN, Position(), 8 * step)
    again = Position(step, 8 * step, mix=state)
    np.testing.assert_array_equal(taken(samples, 60 - step, position=again), whole[step:])
    later = samples.state(TRAIN, again, 8 * 50)
    assert later == samples.state(TRAIN, Position(), 8 * 50)
    rows = [taken(samples, 60 - step, position=again, rows=np.arange(i, 8, 2)) for i in range(2)]
    for i in range(2):
        np.testing.assert_array_equal(rows[i], whole[step:, i::2])


def test_updates_of_another_size_take_every_sample_once() -> None:
    samples = mix(SOURCES, [Numbers(0, 50), Numbers(1, 20), Numbers(2, 30)], weights_after=20)
    first = taken(samples, 10).reshape(-1, 3)
    train = TrainConfig(max_steps=1000, batch_size=4, accumulate=3, seed=3)
    position = Position(10, 80, mix=samples.state(TRAIN, Position(), 80))
    rest = np.concatenate(
        [b["tokens"].reshape(-1, 3) for b in itertools.islice(loader.training_batches(samples, train, position), 20)]
    )
    for i in range(3):
        found = np.concatenate([x[x[:, 0] == i] for x in (first, rest)])
        np.testing.assert_array_equal(found, taken(Numbers(i, [50, 20, 30][i]), 60).reshape(-1, 3)[: len(found)])


def test_a_new_phase_brings_other_sources_and_each_goes_on_where_it_was() -> None:
    first = mix([{"weight": 1}, {"weight": 1}], [Numbers(0, 50), Numbers(1, 20)])
    before = taken(first, 10).reshape(-1, 3)
    state = first.state(TRAIN, Position(), 80)
    named = ({"name": "s1", "weight": 1}, {"name": "s2", "weight": 3})
    second: Any = Mix(
        {"s1": Numbers(1, 20), "s2": Numbers(2, 30)},
        DataConfig(sources=named),
        {"s1": "hash of s1", "s2": "hash of s2"},
    )
    position = Position(10, 80, mix=state)
    after = taken(second, 20, position=position).reshape(-1, 3)
    assert np.bincount(after[:, 0]).tolist() == [0, 40, 120]
    of_second = np.concatenate([x[x[:, 0] == 1] for x in (before, after)])
    np.testing.assert_array_equal(of_second, taken(Numbers(1, 20), 60).reshape(-1, 3)[: len(of_second)])
    third = second.state(TRAIN, position, 240)["sources"]
    assert third["hash of s0"] == {"name": "s0", "rate": 0, "before": 0, "used": 40}, "it may come back"
    assert third["hash of s1"]["used"] == 80


def test_epochs_that_end_before_the_run_are_refused() -> None:
    samples = mix([{"epochs": 2}, {"epochs": 1}], [Numbers(0, 50), Numbers(1, 20)])
    with pytest.raises(
        UserError, match="epochs of all sources end after 120 samples, but train.max_steps=1000 takes 8,000"
    ):
        taken(samples, 1)


# From settings to samples


def prepared(tmp_path: Path, *argv: str, kind: Any = samples.CausalSamples) -> prepare.Data:
    for i, name in enumerate("ab"):
        lines = (f"text {name} number {j} of {i * 9}" for j in range(100 + 50 * i))
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    settings = "--task gpt --tokenizer.kind bytes --model.vocab-size 0 --model.seq-len 64 --train.batch-size 2"
    config, _ = configs.load([*settings.split(), f"--data.cache-dir={tmp_path / 'cache'}", *argv])
    from contextlib import contextmanager

    @contextmanager
    def progress(title: str, total: int) -> Any:
        yield lambda n: None

    return prepare.prepare(config, kind, lambda: None, progress)[1]  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("pack", ["none", "documents", "stream"])
def test_batches_of_two_sources_are_those_of_each(pack: str, tmp_path: Path) -> None:
    flags = [f"--data.pack={pack}"]
    both = prepared(tmp_path, *flags, *(x for n in "ab" for x in ("--data.sources", f"{n}={tmp_path}/{n}.txt:1")))
    train: Any = both.samples["train"]
    batch = next(loader.training_batches(train, TrainConfig(max_steps=9, batch_size=16)))
    places = loader.order_of(train, TrainConfig(max_steps=9, batch_size=16))(np.arange(16))
    for i, name in enumerate("ab"):
        alone = prepared(tmp_path, *flags, "--data.path", f"{tmp_path}/{name}.txt")
        n_before = train.begins[i]
        rows = (places[0] >= n_before) & (places[0] < train.ends[i])
        assert 0 < rows.sum() < 16
        expected = alone.samples["train"].batch(places[0][rows] - n_before, places[1][rows])
        for key, x in expected.items():
            np.testing.assert_array_equal(batch[key][0][rows], x)
        part = both.samples["validation"].parts[name]  # type: ignore[union-attr]
        assert len(part) == len(alone.samples["validation"]) > 0
    assert "a: " in both.source.description and len(both.source.fingerprint.split()) == 2


@pytest.mark.parametrize(
    "argv, rule",
    [
        (["--data.sources", "a=x.txt:1", "--data.sources", "b=y.txt"], "give every source a weight"),
        (["--data.sources", "a=x.txt:1", "--data.sources", "a=y.txt:2"], "two have the name a; rename one"),
        (["--data.sources", "x.txt"], "x.txt: give either its path, as in NAME=PATH:WEIGHT, or its hub"),
        (["--data.sources", "a=x.txt:-1"], "data.sources, a: weight='-1'"),
        (["--data.sources", "a=x.txt:nan"], "data.sources, a: weight"),
        (["--data.sources", "a b=x.txt"], "the name 'a b' has to be of letters"),
        (["--data.sources", "a=x.txt", "--data.path", "y.txt"], "y.txt both name what to train on"),
        (["--data.sources", "a=x.txt", "--data.weights-after", "5"], "weight_after of each source go together"),
    ],
)
def test_sources_that_do_not_fit_are_refused(argv: list[str], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        configs.load(argv)


def test_sources_of_a_file_have_settings_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    source = '[[data.sources]]\nname = "{}"\n{}\n'
    file.write_text(
        source.format("web", 'path = "w"\ntext_column = "body"\nweight = 3')
        + source.format("b", 'hub = "h"\nweight = 1')
    )
    config, _ = configs.load(["--config", str(file), "--data.text-column", "t"])
    own = configs.source_configs(config)
    assert {name: (x.data.path, x.data.hub, x.data.text_column) for name, x in own.items()} == {
        "b": ("", "h", "t"),
        "web": ("w", "", "body"),
    }
    copy = tmp_path / "config.toml"
    copy.write_text(configs.dump(config))
    assert configs.load(["--config", str(copy)])[0] == config
    file.write_text(source.format("web", 'paht = "w"'))
    with pytest.raises(UserError, match="data.sources, web: paht: unknown key; did you mean path?"):
        configs.load(["--config", str(file)])


def test_an_error_names_its_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.sources, b: data.path=.*none.txt: no such file"):
        prepared(tmp_path, *("--data.sources", f"a={tmp_path}/a.txt", "--data.sources", f"b={tmp_path}/none.txt"))


def test_a_classifier_has_one_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task=gpt reads one source; give its path as data.path"):
        prepared(
            tmp_path,
            *(x for n in "ab" for x in ("--data.sources", f"{n}={tmp_path}/{n}.txt:1")),
            kind=samples.ClassifiedSamples,
        )
