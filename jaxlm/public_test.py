"""Models of transformers, against transformers itself: small and random ones of each kind, made here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxlm import convert, public
from jaxlm.config import TokenizerConfig
from jaxlm.data import tokenizer as tokenizers

TEXTS = ["the cat sat on the mat and the dog sat on the log", "a dog and a cat, both of them old: what they saw"]
T, D, C = 24, 24, 3
KINDS = (*("bert", "distilbert", "roberta", "gpt2"), *("bert classes", "distilbert classes", "roberta classes"))
LOGITS = 5e-6  # of the largest; measured: 1.4e-6 between float32s, where each is up to 1.4e-6 from float64

Make = Callable[[str], tuple[Path, Any]]


def tokenizer_of(kind: str) -> Tokenizer:
    """Return a tokenizer with the special tokens of a kind of model."""
    family = kind.partition(" ")[0]
    if family != "roberta":
        config = TokenizerConfig(kind="bpe" if family == "gpt2" else "wordpiece", vocab_size=300)
        return tokenizers.train(config, lambda: iter(TEXTS))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=letters)
    )
    return tokenizer


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A function from a kind to the folder of a small random model, and the model of transformers."""
    import transformers

    made: dict[str, tuple[Path, Any]] = {}

    def model(kind: str) -> tuple[Path, Any]:
        if kind in made:
            return made[kind]
        tokenizer = tokenizer_of(kind)
        family, _, is_classes = kind.partition(" ")
        common = {"vocab_size": tokenizers.n_ids(tokenizer), "num_labels": C}
        bert = {"hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 4 * D}
        config: Any = {
            "bert": lambda: transformers.BertConfig(**common, **bert, max_position_embeddings=T),
            "distilbert": lambda: transformers.DistilBertConfig(
                **common, dim=D, n_layers=3, n_heads=4, hidden_dim=4 * D, max_position_embeddings=T
            ),
            "roberta": lambda: transformers.RobertaConfig(
                **common, **bert, max_position_embeddings=T + 2, type_vocab_size=1, layer_norm_eps=1e-5
            ),
            "gpt2": lambda: transformers.GPT2Config(
                **common, n_embd=D, n_layer=3, n_head=4, n_positions=T, bos_token_id=None, eos_token_id=None
            ),
        }[family]()
        name = public.FAMILIES[family].heads["sst2" if is_classes else "gpt" if family == "gpt2" else "mlm"][0]
        theirs = getattr(transformers, name)(config).eval()
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for x in theirs.parameters():  # norms are not left at 1 and 0, nor biases at 0
                x.copy_(0.3 * torch.randn(x.shape, generator=random) + (x.ndim == 1) * x)
        made[kind] = folder, theirs = tmp_path_factory.mktemp("models") / kind.replace(" ", "_"), theirs
        theirs.save_pretrained(folder)
        tokenizers.save(tokenizer, folder / "tokenizer.json")
        return folder, theirs

    return model


def inputs(pad_id: int, n_ids: int) -> tuple[np.ndarray, np.ndarray]:
    """Return texts [4, T], two of them as long as can be, and which of their tokens are real."""
    is_real = np.arange(T)[None] < np.array([T, T, T // 2, 3])[:, None]
    tokens = np.random.default_rng(0).integers(5, n_ids, (4, T))
    return np.where(is_real, tokens, max(pad_id, 0)).astype(np.int32), is_real


def logits_of(theirs: Any, tokens: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        result = theirs(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(is_real).long())
    return of_real(result.logits.numpy(), is_real)


def of_real(logits: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    return logits[is_real] if logits.ndim == 3 else logits


def ours(source: Path, tokens: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    import jax

    from jaxlm import checkpoint

    model, _ = checkpoint.load_model(source)
    return of_real(np.asarray(jax.jit(lambda model, x: model(x))(model, tokens)), is_real)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def written(source: Path, folder: Path, *args: str) -> Path:
    assert convert.main([str(source), str(folder), *args]) == 0
    return folder


# Logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, make: Make) -> None:
    from torchlm import checkpoint

    folder, theirs = make(kind)
    twin, config = checkpoint.load_model(folder)
    tokens, is_real = inputs(config.model.pad_id, config.model.vocab_size)
    want = logits_of(theirs, tokens, is_real)
    assert want.std() > 0.1
    assert apart(ours(folder, tokens, is_real), want) < LOGITS
    # Without rounding, which could hide a small mistake, such as another epsilon.
    state = dict(theirs.state_dict())
    if segments := public.FAMILIES[kind.partition(" ")[0]].segments:  # the sum with these is rounded when it is read
        positions = segments.replace("token_type", "position")
        state |= {positions: state[positions] + state[segments][:1], segments: 0 * state[segments]}
    exact_theirs = type(theirs)(theirs.config).double().eval()
    exact_theirs.load_state_dict(state)
    exact = logits_of(exact_theirs, tokens, is_real)
    with torch.no_grad():
        got = of_real(twin.double()(torch.from_numpy(tokens).long()).numpy(), is_real)
    assert apart(got, exact) < 1e-13


# Written back


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_back_is_loaded_by_transformers_and_here(kind: str, make: Make, tmp_path: Path) -> None:
    import transformers

    folder, theirs = make(kind)
    run = written(folder, tmp_path / "run")
    back = written(run, tmp_path / "back", "--as", kind.partition(" ")[0])
    auto = {"mlm": "MaskedLM", "gpt": "CausalLM", "sst2": "SequenceClassification"}[convert.load(run).info["task"]]
    again = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(back)
    assert type(again) is type(theirs)
    tokens, is_real = inputs(getattr(theirs.config, "pad_token_id", 0) or 0, theirs.config.vocab_size)
    assert apart(logits_of(again.eval(), tokens, is_real), logits_of(theirs, tokens, is_real)) < LOGITS
    weights = [convert.read(path).weights for path in (folder, run, back)]
    for name, array in weights[0].items():
        np.testing.assert_array_equal(array, weights[1][name])
        np.testing.assert_array_equal(array, weights[2][name])
