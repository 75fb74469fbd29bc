"""The published configurations of real_weights.py are read as they are, and make models of their published sizes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import real_weights

from jaxlm import config as configs
from jaxlm.tasks import parameters
from jaxlm.weights import huggingface
from jaxlm.weights.families import FAMILIES

SIZES = {"ModernBERT-base": 149.7, "Ettin-encoder-17M": 16.9, "Ettin-decoder-17M": 16.9, "SmolLM2-135M": 134.5}


@pytest.mark.parametrize("name", real_weights.PUBLISHED)
def test_a_published_configuration_is_read_as_it_is(name: str, tmp_path: Path) -> None:
    values = real_weights.PUBLISHED[name]
    family = FAMILIES[values["model_type"]]
    (tmp_path / "config.json").write_text(json.dumps(values))
    settings = huggingface._settings(family, huggingface._read_json(tmp_path / "config.json"), tmp_path)
    config = configs.build(settings | {"task": "gpt" if family.is_causal else "mlm"})
    shapes = parameters.shapes(config)
    if not config.model.output_bias:  # which is there, but stays zero
        del shapes["head.bias"]
    assert round(float(sum(map(np.prod, shapes.values()))) / 1e6, 1) == SIZES[name]


@pytest.mark.slow
@pytest.mark.longest
def test_random_weights_of_a_published_configuration_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["real_weights.py", "--random", "Ettin-decoder-17M"])
    real_weights.main()
    apart = [float(x) for x in re.findall(r"at most (\S+) apart", capsys.readouterr().out)]
    assert len(apart) == 4 and max(apart) < 1e-5  # logits of up to 1.6; measured: 1.3e-6
