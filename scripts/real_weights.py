"""Compares published weights in jaxlm with transformers: ids, hidden states, logits; and again written back.

    python scripts/real_weights.py FOLDER texts.txt
    python scripts/real_weights.py --random SmolLM2-135M    # random weights of a published configuration, random ids

The file has a text in each line. Needs transformers and PyTorch.
"""

import argparse
import json
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxlm import convert, predict
from jaxlm.inference import load
from jaxlm.weights import huggingface, snapshots
from jaxlm.weights.families import FAMILIES

TOKENS = {"bos_token_id": 50281, "eos_token_id": 50282, "cls_token_id": 50281, "sep_token_id": 50282}
MODERNBERT = {
    **TOKENS,
    **{"pad_token_id": 50283, "vocab_size": 50368, "max_position_embeddings": 8192, "norm_eps": 1e-5},
    **{"hidden_activation": "gelu", "classifier_activation": "gelu", "classifier_pooling": "mean"},
    **{"local_attention": 128, "global_attn_every_n_layers": 3, "tie_word_embeddings": True, "decoder_bias": True},
    **{"global_rope_theta": 160000.0, "local_rope_theta": 10000.0, "position_embedding_type": "absolute"},
    **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), False),
    **dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"), 0.0),
}
# Ettin's sizes are those of table 1 of arXiv 2507.11412, its other settings ModernBERT's.
ETTIN = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 7, "num_attention_heads": 4}
# config.json as published, but for settings of training and names of versions.
PUBLISHED: dict[str, dict[str, Any]] = {
    "ModernBERT-base": {
        **{"architectures": ["ModernBertForMaskedLM"], "model_type": "modernbert"},
        **{"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12},
        **MODERNBERT,
    },
    "Ettin-encoder-17M": {
        "architectures": ["ModernBertForMaskedLM"],
        "model_type": "modernbert",
        **ETTIN,
        **MODERNBERT,
    },
    "Ettin-decoder-17M": {
        **{"architectures": ["ModernBertDecoderForCausalLM"], "model_type": "modernbert-decoder"},
        **ETTIN,
        **MODERNBERT,
    },
    "SmolLM2-135M": {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "is_llama_config": True},
        **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0},
        **{"hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664},
        **{"intermediate_size": 1536, "max_position_embeddings": 8192, "num_attention_heads": 9},
        **{"num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-05},
        **{"rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True},
        **{"torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49152},
    },
}
LENGTHS = (512, 300, 40)  # of random texts: longer and shorter than the windows


def main() -> None:
    """Print how many texts have equal ids, and the largest differences of hidden states and logits."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("texts", type=Path, nargs="?")
    parser.add_argument("--random", choices=PUBLISHED)
    args = parser.parse_args()
    if args.random:
        with tempfile.TemporaryDirectory() as target:
            compare(made(args.random, Path(target) / "model"), [])
    elif args.texts:
        lines = args.texts.read_text(encoding="utf-8").splitlines()
        compare(huggingface.find(args.folder), [line for line in lines if line.strip()])
    else:
        parser.error("give FOLDER and a file of texts, or --random")


def made(name: str, folder: Path) -> Path:
    """Write random weights of a published configuration, without a tokenizer."""
    folder.mkdir()
    text = json.dumps(PUBLISHED[name], indent=2)
    (folder / "config.json").write_text(text)
    model = getattr(transformers, PUBLISHED[name]["architectures"][0])(transformers.AutoConfig.from_pretrained(folder))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            if x.ndim == 1:  # norms are not left at 1, nor biases at 0
                x += 0.1 * torch.randn(x.shape, generator=random)
    model.to(torch.float32).save_pretrained(folder)
    (folder / "config.json").write_text(text)  # as published, and not as transformers writes it
    return folder


def compare(source: Path, texts: list[str]) -> None:
    """Print what `main` says; without texts, of random ids."""
    config = snapshots.read(source).config
    family = FAMILIES[huggingface.load(source).form.split()[-1]]
    model_class = getattr(transformers, family.class_name(huggingface._task(config)))
    if texts:
        predictor: Any = predict.load(source, embeds=config.task in ("base", "embed"))
        ids = [getattr(predictor, "encode_any", predictor.encode)(text) for text in texts]
    else:
        random = np.random.default_rng(0)
        ids = [random.integers(1, config.model.vocab_size - 100, n).tolist() for n in LENGTHS]
    print(
        f"{date.today()}, {platform.machine()}, {model_class.__name__}, transformers {transformers.__version__}: "
        f"{len(ids)} texts, {sum(map(len, ids)):,} tokens"
    )
    with tempfile.TemporaryDirectory() as target:
        back = Path(target) / "back"
        assert convert.main([str(source), f"{target}/run"]) == 0
        assert convert.main([f"{target}/run", str(back), "--as", family.type]) == 0
        results = {"jaxlm": ours(source, ids), "written back, in transformers": theirs(model_class, back, ids)}
        tokenizers = {"jaxlm": ids, "written back, in transformers": ids_of(back, texts)} if texts else {}
    expected = theirs(model_class, source, ids)
    for name, outputs in results.items():
        print(f"{name}:")
        if texts:
            n_equal = sum(a == b for a, b in zip(tokenizers[name], ids_of(source, texts), strict=True))
            print(f"  ids equal in {n_equal} of {len(texts)} texts")
        for kind, (a, b) in {kind: (outputs[kind], expected[kind]) for kind in expected}.items():
            apart, largest = np.abs(a - b).max(), np.abs(b).max()
            same = f"; the likeliest token is the same at {np.mean(a.argmax(1) == b.argmax(1)):.2%}"
            print(
                f"  {kind}: at most {apart:.1e} apart, the largest is {largest:.1f}{same if kind == 'logits' else ''}"
            )


def ids_of(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in texts]


def ours(folder: Path, ids: list[list[int]]) -> dict[str, np.ndarray]:
    """Return hidden states [N, D], and logits [N, V] of a language model, of all tokens."""
    model, config = load.load_model(folder)
    tokens_BT = np.full((len(ids), max(map(len, ids))), max(config.model.pad_id, 0), np.int32)
    for row, text in zip(tokens_BT, ids, strict=True):
        row[: len(text)] = text
    is_real_BT = np.arange(tokens_BT.shape[1]) < np.array([len(text) for text in ids])[:, None]
    hidden = jax.jit(lambda model, tokens_BT: model.base(tokens_BT))
    outputs = {"hidden states": np.asarray(hidden(model, tokens_BT))[is_real_BT]}
    if config.task in ("mlm", "gpt"):
        logits = jax.jit(lambda model, tokens_BT: model(tokens_BT))
        outputs["logits"] = np.asarray(logits(model, tokens_BT))[is_real_BT]
    return outputs


def theirs(model_class: Any, folder: Path, ids: list[list[int]]) -> dict[str, np.ndarray]:
    """Return the same, of a folder that transformers loads; each text alone."""
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for text in ids:
            result = model(input_ids=torch.tensor([text]), output_hidden_states=True)
            outputs.setdefault("hidden states", []).append(result.hidden_states[-1][0].numpy())
            if "logits" in result:
                outputs.setdefault("logits", []).append(result.logits[0].numpy())
    return {kind: np.concatenate(x) for kind, x in outputs.items()}


if __name__ == "__main__":
    main()
