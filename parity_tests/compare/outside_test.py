"""Ports that others made, names by themselves: transformers' models, Flax's, Equinox's, and optimizers."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from jaxlm import config as configs
from jaxlm.weights import huggingface
from parity_tests import compare, drift, families, record
from parity_tests.packages import Jaxlm
from parity_tests.plan import random_weights

SIZES: dict[str, Any] = {
    "gpt2": {"n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": None, "eos_token_id": None},
    "bert": {
        **{"max_position_embeddings": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3},
        **{"intermediate_size": 96, "pad_token_id": 0},
    },
}


def model_of(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **SIZES[family]))
    else:
        model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **SIZES[family]))
        torch.nn.init.zeros_(model.bert.embeddings.token_type_embeddings.weight)  # which jaxlm has not
    for name, x in model.named_parameters():
        if x.ndim == 1:  # ones and zeros are all alike
            torch.nn.init.normal_(x, mean=float(name.endswith("weight")), std=0.1)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_a_model_of_transformers_is_jaxlms(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path)
    stored = huggingface.load(tmp_path)
    state = Jaxlm(configs.build(stored.info["config"]), stored.weights, "float32")
    tokens = np.random.default_rng(0).integers(1, 50, (3, 36))
    with record.torch(model) as a:
        model(torch.from_numpy(tokens))

    def of(wrong: str = "") -> compare.Verdict:
        graph = nnx.merge(state.graphdef, state.params)
        if wrong:
            graph.base.blocks.feed_forward.config = configs.replace(state.config, "model.gelu", wrong).model
        graphdef = nnx.graphdef(graph)
        with record.jax(graph, params=state.params) as b:
            jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))(state.params, tokens.astype(np.int32))
        return compare.runs(a, b)

    found = of()
    assert found.passes, found.text()
    assert {x.stage for x in found.found} >= {"parameter", "forward"} and len(found.names.pairs) > 30
    wrong = of("exact" if family == "gpt2" else "tanh")
    assert wrong.first and wrong.causes[0].kind == "gelu", wrong.text()


@pytest.mark.slow
@pytest.mark.parametrize("family", families.SETTINGS)
def test_a_model_with_the_modern_block_is_jaxlms(family: str) -> None:
    config = drift.config_of(
        "mlm" if family == "ModernBERT" else "gpt", **(families._SIZES | families.SETTINGS[family])
    )
    start = random_weights(config, seed=10)
    model, names = families._model(family, config), families._names(family, config)
    state = {theirs: torch.tensor(np.concatenate([start[x] for x in ours])) for theirs, ours in names.items()}
    model.load_state_dict(state, strict=False)
    model.eval()
    tokens = np.random.default_rng(0).integers(1, config.model.vocab_size, (3, config.model.seq_len)).astype(np.int32)
    with record.torch(model) as a:
        model(torch.from_numpy(np.int64(tokens)))
    ours = Jaxlm(config, start, "float32")
    with record.jax(nnx.merge(ours.graphdef, ours.params), params=ours.params) as b:
        jax.jit(lambda params: nnx.merge(ours.graphdef, params)(tokens))(ours.params)
    found = compare.runs(a, b)
    assert found.passes, found.text()
    for i in range(config.model.n_layers):  # layers are recorded separately, also in scans and nested scans
        assert found.names.modules[f"model.layers.{i}"] == f"base.blocks.{i}"
