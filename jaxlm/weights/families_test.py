"""ModernBERT, Ettin's decoders, EuroBERT, UltraBERT, Llama and Qwen3, against transformers: small and random models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from jaxlm import config as configs
from jaxlm import convert, predict
from jaxlm.config import BASE
from jaxlm.errors import UserError
from jaxlm.inference import load
from jaxlm.weights import snapshots
from jaxlm.weights.families import CLASSES, FAMILIES, TAGS
from jaxlm.weights.family_tokenizers_test import TEMPLATE
from jaxlm.weights.family_tokenizers_test import write as write_tokenizer

T, D, V, C = 28, 16, 41, 3
LOGITS = 5e-6  # of the largest, as in huggingface_test.py
EXACT = 2e-6  # of the largest, in float64 but for their sines and cosines; measured: 8.5e-7
SIZES: dict[str, Any] = {
    **{"vocab_size": V, "hidden_size": D, "intermediate_size": 20, "num_attention_heads": 4},
    **{
        "max_position_embeddings": T,
        "id2label": {0: "O", 1: "B-X", 2: "I-X"},
        "bos_token_id": None,
        "eos_token_id": None,
    },
}
LLAMA = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 2}
# ModernBERT and UltraBERT have windows that are shorter than the texts here.
MODERN = SIZES | {"num_hidden_layers": 5, "local_attention": 8, "cls_token_id": None, "sep_token_id": None}
ROPES = {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 50.0}}
SCALED = {"rope_theta": 100.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA | {"pad_token_id": 0, "rope_parameters": SCALED}),
    "llama tied": ("llama", LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 6, "pad_token_id": 0, "tie_word_embeddings": True}),
    "modernbert": ("modernbert", MODERN | {"pad_token_id": 1, "rope_parameters": ROPES}),
    "modernbert untied": ("modernbert", MODERN | {"pad_token_id": 1, "tie_word_embeddings": False}),
    "modernbert mean": ("modernbert", MODERN | {"pad_token_id": 1, "classifier_pooling": "mean"}),
    "modernbert-decoder": (
        "modernbert-decoder",
        MODERN | {"rope_parameters": ROPES} | dict.fromkeys((f"{x}_token_id" for x in ("pad", "bos", "cls", "sep")), 0),
    ),
    "eurobert": ("eurobert", LLAMA | {"pad_token_id": 3}),
    "eurobert bos": ("eurobert", LLAMA | {"pad_token_id": 3, "classifier_pooling": "bos"}),
    "eurobert mean": ("eurobert", LLAMA | {"pad_token_id": 3, "classifier_pooling": "mean"}),
    "ultrabert": (
        "ultrabert",
        LLAMA | {"num_hidden_layers": 7, "sliding_window": 3, "pad_token_id": 0, "prediction_head_size": 10},
    ),
    "ultrabert mean": ("ultrabert", LLAMA | {"num_hidden_layers": 3, "pad_token_id": 0, "classifier_pooling": "mean"}),
}
KINDS = [
    *(f"{name} {head}" for name in CONFIGS for head in ("lm", "classes", "base") if " " not in name),
    *(f"{name} tags" for name in ("llama", "qwen3", "modernbert", "eurobert", "ultrabert")),
    *("llama tied lm", "modernbert untied lm", "modernbert mean classes"),
    *("eurobert bos classes", "eurobert mean classes", "ultrabert mean classes"),
]


def slow_but(*quick: str, of: Sequence[str] = KINDS) -> list[Any]:
    """Return kinds for a test, all but the quick ones only in slow runs."""
    assert set(quick) <= set(of)
    return [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow) for kind in of]


def family_of(kind: str) -> str:
    return CONFIGS[kind.rpartition(" ")[0]][0]


def class_of(kind: str) -> Any:
    family = FAMILIES[family_of(kind)]
    tasks = {"lm": "gpt" if family.is_causal else "mlm", "classes": CLASSES, "tags": TAGS, "base": BASE}
    task = tasks[kind.rpartition(" ")[2]]
    return getattr(transformers, family.class_name(task))


def model_of(kind: str, **changes: Any) -> Any:
    """Return a small model of transformers whose norms and biases are random, too."""
    name = kind.rpartition(" ")[0]
    model_class = class_of(kind)
    return randomized(model_class(model_class.config_class(**(CONFIGS[name][1] | changes))).eval())


def randomized(model: Any) -> Any:
    """Return a model after all its parameters got random values."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn(x.shape, generator=random) + (x.ndim == 1) * x)
    return model


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a kind to the folder of a small random model, and the model of transformers."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind.replace(" ", "_")
            made[kind] = folder, model_of(kind)
            made[kind][1].save_pretrained(folder)
        return made[kind]

    return get


def inputs(kind: str, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts [4, T], two as long as can be, and which of their tokens are real.

    None is so short that a pad is farther than a window from all tokens: theirs are NaN there.
    """
    lengths = (T, T, T - 2, T - 3)
    is_real = np.arange(T)[None] < np.array(lengths)[:, None]
    tokens = np.random.default_rng(0).integers(5, V, (4, T))
    return np.where(is_real, tokens, max(pad_id, 0)), is_real


def theirs_of(model: Any, tokens: np.ndarray, is_real: np.ndarray) -> torch.Tensor:
    result = model(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(is_real).long())
    return result[0]


def arguments(config: configs.Config, tokens: np.ndarray, is_real: np.ndarray) -> tuple[Any, ...]:
    """Return what a model is called with, beside the tokens."""
    if config.task == TAGS:
        return None, np.tile(np.arange(T), (len(tokens), 1))
    is_read_last = config.task == CLASSES and config.model.pooling == "last"
    return (None, is_real.sum(axis=1) - 1) if is_read_last else ()


def of_real(x: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    return x[is_real] if x.ndim == 3 else x


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize(
    "kind",
    slow_but("llama lm", "qwen3 lm", "eurobert lm", "modernbert-decoder lm", "modernbert base", "ultrabert base"),
)
def test_outputs_are_those_of_transformers(kind: str, make: Any) -> None:
    from torchlm.load import load_model

    folder, theirs = make(kind)
    twin, config = load_model(folder)
    tokens, is_real = inputs(kind, config.model.pad_id)
    with torch.no_grad():
        want = of_real(theirs_of(theirs, tokens, is_real).numpy(), is_real)
    assert want.std() > 0.1
    args = arguments(config, tokens, is_real)
    model, _ = load.load_model(folder)
    assert apart(of_real(np.asarray(model(np.int32(tokens), *args)), is_real), want) < LOGITS
    # Without rounding, which could hide a small mistake.
    double = model_of(kind).double()
    with torch.no_grad():
        exact = of_real(theirs_of(double, tokens, is_real).numpy(), is_real)
        args = tuple(torch.from_numpy(x) if x is not None else None for x in args)
        got = of_real(twin.double()(torch.from_numpy(tokens), *args).numpy(), is_real)
    assert apart(got, exact) < EXACT


@pytest.mark.parametrize("kind", slow_but(*(f"{name} classes" for name in FAMILIES if name in CONFIGS)))
def test_what_is_written_back_is_loaded_by_transformers_and_here(kind: str, make: Any, tmp_path: Path) -> None:
    folder, theirs = make(kind)
    assert convert.main([str(folder), str(tmp_path / "run")]) == 0
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "back"), "--as", family_of(kind)]) == 0
    again, report = class_of(kind).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokens, is_real = inputs(kind, theirs.config.pad_token_id or 0)
    for i in range(4):  # one by one: a classifier that is causal finds the last token of several by a pad
        text, real = tokens[i : i + 1, : is_real[i].sum()], is_real[i : i + 1, is_real[i]]
        with torch.no_grad():
            want, got = (theirs_of(x.eval(), text, real).numpy() for x in (theirs, again))
        assert apart(got, want) < LOGITS
    weights = [snapshots.read(path).weights for path in (folder, tmp_path / "run", tmp_path / "back")]
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])
        np.testing.assert_array_equal(array, weights[2][name])


# Used


def with_tokenizer(kind: str, folder: Path, **changes: Any) -> tuple[Path, Any]:
    """Write a small random model with a tokenizer as its family has it; return the folder and the model."""
    name = {"llama": "llama 3", "qwen3": "qwen3", "eurobert": "eurobert"}
    write_tokenizer(name.get(family_of(kind), "modernbert"), folder)
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    pad = tokens.get("[PAD]", tokens.get("<|endoftext|>", 1))
    model = model_of(kind, vocab_size=len(tokens), pad_token_id=pad, **changes)
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "modernbert-decoder"])
def test_a_greedy_continuation_is_that_of_transformers_and_stops_at_each_end(name: str, tmp_path: Path) -> None:
    folder, theirs = with_tokenizer(f"{name} lm", tmp_path, max_position_embeddings=64)
    answers = predict.load(folder)
    ids = answers.encode("The cat's mat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    want = tokenizer("The cat's mat")["input_ids"]
    assert ids == (want[:-1] if name == "modernbert-decoder" else want)  # [SEP] would end the prompt

    def continued(end: int | None) -> list[int]:
        options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        tokens = torch.tensor([ids])
        made = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        return made[0, len(ids) :].tolist()

    (answer,) = answers(["The cat's mat"], temperature=0, max_new_tokens=20)
    made = continued(None)
    assert answers.tokenizer.decode(made) == answer["continuation"] and answer["tokens"] == 20
    end = next(i for i in made if made.index(i) > 1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 1]}))
    (answer,) = predict.load(folder)(["The cat's mat"], temperature=0, max_new_tokens=20)
    assert (answer["tokens"], answer["ending"]) == (len(continued(end)), "article")


@pytest.mark.slow
def test_a_message_is_answered_by_the_chat_template(tmp_path: Path) -> None:
    folder, theirs = with_tokenizer("qwen3 lm", tmp_path, max_position_embeddings=64)
    with pytest.raises(UserError, match="^--chat: the model has no chat template"):
        predict.load(folder, chat=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "The cat"}]
    want = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    answers = predict.load(folder, chat=True)
    assert answers.encode("The cat") == want
    made = theirs.generate(torch.tensor([want]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    (answer,) = answers(["The cat"], temperature=0, max_new_tokens=9)
    assert answer["continuation"] == answers.tokenizer.decode(made[0, len(want) :].tolist())
    assert convert.main([str(folder), str(tmp_path / "back"), "--as", "qwen3"]) == 0
    assert predict.load(tmp_path / "back", chat=True).encode("The cat") == want
