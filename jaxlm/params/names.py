"""Parameter names and layouts of jaxlm and torchlm, and conversion between them.

jaxlm     tree of dicts, `base/blocks/attention/query/kernel`; a kernel is [in, out], blocks have a leading axis L
torchlm   state dict, `base.blocks.0.attention.query.weight`; a linear weight is [out, in], one tensor per block

Arrays are NumPy, or tensors if only names change. Conversions round nothing and are exact both ways, also for the
moments of an optimizer. torchlm/original.py has the names in the original's checkpoint files.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import BASE, GATED, LORA_PRODUCTS, Config, ModelConfig
from jaxlm.errors import UserError

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
Prefixes = tuple[str, str]  # prefixes of the original's names, for the base model and the head

# Prefixes that PyTorch's wrapper modules add to names, and attributes in which other models hold a base model.
_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = re.compile(r"(?!head\.)(.+?\.)??(base|((bert|distilbert|roberta)\.)?embeddings|(transformer\.)?wte)\.")
_LORA = ("lora_a", "lora_b")
_TRANSPOSED = ("kernel", *_LORA)
_HEAD_LAYERS: dict[str, dict[str, tuple[str, ...]]] = {  # by model.head_dense and kind of model
    "none": {"masked": ("layernorm",)},
    "bert": {"masked": ("dense", "layernorm"), "classifier": ("dense",)},
    "distilbert": {"masked": ("dense", "layernorm"), "classifier": ("dense",)},
    "modernbert": dict.fromkeys(("masked", "causal", "classifier", "tagger"), ("dense", "layernorm")),
    "eurobert": {"classifier": ("dense",)},
    "ultrabert": {"masked": ("dense", "dense2")},
}
_MOST_SHOWN = 6  # differences in one error message


def shapes(config: Config, kind: str, n_outputs: int) -> Shapes:
    """Return torchlm's name and shape of every parameter of a model of heads.py, in model order.

    `kind` is "masked", "causal", "classifier" (with `n_outputs`), "tagger", "embedder" or BASE. As in PyTorch, a
    module's own parameters come before those of its submodules.
    """
    model, adapted = config.model, lora_products(config.model)
    D, F, V = model.d_model, model.n_hidden, model.vocab_size
    HK = model.n_heads * model.head_size if model.head_dim else D
    GK = HK * model.kv_heads // model.n_heads
    attention = {"query": (D, HK), "key": (D, GK), "value": (D, GK), "output": (HK, D)}

    def norm(name: str, size: int = D) -> Shapes:
        kinds = {"layernorm": ("weight", "bias"), "rmsnorm_no_scale": ()}.get(model.norm, ("weight",))
        return {f"{name}.{kind}": (size,) for kind in kinds}

    def linear(name: str, n_in: int, n_out: int, has_bias: bool) -> Shapes:
        shapes: Shapes = {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if has_bias else {})
        if name.startswith("base.") and name.rpartition(".")[2] in adapted:
            shapes |= {f"{name}.lora_a": (model.lora_rank, n_in), f"{name}.lora_b": (n_out, model.lora_rank)}
        return shapes

    result: Shapes = {"base.embedding.position": (model.seq_len, D)} if model.positions == "learned" else {}
    if model.segments:
        result["base.embedding.segment"] = (model.segments, D)
    result["base.embedding.token.weight"] = (V, D)
    if model.embedding_norm:
        result |= norm("base.embedding.layernorm")
    for i in range(model.n_layers):
        block = f"base.blocks.{i}"
        if model.first_norm or i > 0:
            result |= norm(f"{block}.layernorm1")
        for layer, (n_in, n_out) in attention.items():
            result |= linear(f"{block}.attention.{layer}", n_in, n_out, model.biases in ("all", "attention"))
        for layer in ("query_norm", "key_norm") if model.qk_norm else ():
            result |= norm(f"{block}.attention.{layer}", model.head_size)
        result |= norm(f"{block}.layernorm2")
        widths = {"fc1": (D, F), "up": (D, F), "fc2": (F, D)}
        for layer in ("fc1", "up", "fc2") if model.mlp in GATED else ("fc1", "fc2"):
            result |= linear(f"{block}.feed_forward.{layer}", *widths[layer], model.biases in ("all", "feed_forward"))
    if model.final_norm:
        result |= norm("base.final_norm")
    if kind in ("embedder", BASE):
        return result
    if model.tied_embedding and kind not in ("classifier", "tagger"):
        result["head.bias"] = (V,)
    for name, (n_in, n_out) in head_layers(model, kind).items():
        is_norm = name == "layernorm"
        result |= norm("head.layernorm") if is_norm else linear(f"head.{name}", n_in, n_out, has_head_bias(model))
    if kind == "tagger":
        return result | linear("head.linear", D, config.data.n_classes, True)
    if kind == "classifier":
        n_outputs = V if model.head_outputs == "vocabulary" else n_outputs
        return result | linear("head.linear", D, n_outputs, model.classifier_bias)
    return result if model.tied_embedding else result | linear("head.linear", D, V, model.output_bias)


def head_layers(model: ModelConfig, kind: str) -> dict[str, tuple[int, int]]:
    """Return the layers before the output by name, and the widths of what goes in and out; `kind` as in `shapes`."""
    D, H = model.d_model, model.head_hidden or model.d_model
    widths = {"dense": (D, D), "layernorm": (D, D)}
    if model.head_dense == "ultrabert":
        widths = {"dense": (D, H), "dense2": (H, D)}
    return {name: widths[name] for name in _HEAD_LAYERS[model.head_dense].get(kind, ())}


def has_head_bias(model: ModelConfig) -> bool:
    """Return whether the dense layers before the output have a bias."""
    return model.biases == "all" or model.head_dense == "eurobert"


def shapes_of_tree(tree: Mapping[str, Any]) -> Shapes:
    """Return torchlm's names and shapes for a tree of jaxlm's arrays or their shapes.

    Raises UserError if a name cannot be converted back.
    """
    result: Shapes = {}
    for path, x in _leaves(tree):
        shape = x.shape[1:] if _is_stacked(path) else x.shape
        for name in (torch_names := _torch_names(path, x.shape, _n_stacked(tree))):
            if jax_path(name)[0] != path or any(key.isdecimal() for key in path):
                raise UserError(
                    f"its parameter {'/'.join(path)} would be {name} in other formats, which cannot be converted back; "
                    "rename the module, and use attributes instead of a list"
                )
        result |= dict.fromkeys(torch_names, shape[::-1] if path[-1] in _TRANSPOSED else shape)
    return result


def lora_products(model: ModelConfig) -> list[str]:
    """Return the names of the linear layers of a block that have adapters."""
    named = [name.strip() for name in model.lora_products.split(",")] if model.lora_rank else []
    return [name for name in LORA_PRODUCTS if name in named]


def first_trained(model: ModelConfig, path: Sequence[str]) -> int | None:
    """Return the first block in which a parameter is trained, None if it is frozen in all.

    `path` is its path in jaxlm's tree; parameters outside of blocks count as block 0.
    """
    if path[0] == "base" and model.lora_rank and path[-1] not in _LORA:
        return None
    if _is_stacked(path):
        return model.frozen_layers if model.frozen_layers < model.n_layers else None
    return None if tuple(path[:2]) == ("base", "embedding") and model.frozen_embedding else 0


def is_trained(model: ModelConfig, name: str) -> bool:
    """Return whether a parameter, by torchlm's name, is trained."""
    path, block = jax_path(name)
    first = first_trained(model, path)
    return first is not None and block >= first


def trained(model: ModelConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trained entries of a state dict, or of another dict by torchlm's names."""
    return {name: x for name, x in state.items() if is_trained(model, name)}


def without_adapters(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state dict, or of shapes, that are not LoRA adapters."""
    return {name: x for name, x in arrays.items() if not name.endswith(_LORA)}


def merge_adapters(model: ModelConfig, weights: Arrays) -> Arrays:
    """Return a state dict with its LoRA adapters, if any, merged into the weights."""
    result = without_adapters(weights)
    for name in [name for name in weights if name.endswith(_LORA[0])]:
        layer = name.removesuffix(_LORA[0])
        lora_a, lora_b, weight = (weights[layer + kind].astype(np.float64) for kind in (*_LORA, "weight"))
        scale = model.lora_alpha / model.lora_rank
        result[f"{layer}weight"] = (weight + scale * lora_b @ lora_a).astype(weights[f"{layer}weight"].dtype)
    return result


def decay_groups(shapes: Shapes) -> tuple[list[str], list[str]]:
    """Return the names with and without weight decay, in model order: the order of PyTorch's optimizer state."""
    decayed = [name for name, shape in shapes.items() if len(shape) > 1 and shape[0] > 1]
    return decayed, [name for name in shapes if name not in decayed]


def check(state: Mapping[str, Any], expected: Shapes, source: str) -> dict[str, Any]:
    """Return the arrays or tensors of `state` in the order of `expected`.

    Raises UserError, which begins with `source`, if names or shapes differ.
    """
    check_shapes({name: tuple(array.shape) for name, array in state.items()}, expected, source)
    return {name: state[name] for name in expected}


def check_shapes(shapes: Shapes, expected: Shapes, source: str) -> None:
    """Raise UserError, which begins with `source`, if names or shapes differ from the expected ones."""
    problems = [f"{name} {list(expected[name])} is missing" for name in expected if name not in shapes]
    problems += [f"{name} {list(shapes[name])} is not in the model" for name in shapes if name not in expected]
    problems += [
        f"{name} has the shape {list(shapes[name])}, but the model needs {list(expected[name])}"
        for name in expected
        if shapes.get(name, expected[name]) != expected[name]
    ]
    if problems:
        more = f"; and {len(problems) - _MOST_SHOWN} more" if len(problems) > _MOST_SHOWN else ""
        raise UserError(f"{source}: weights of another model: {'; '.join(problems[:_MOST_SHOWN])}{more}")


def unwrapped(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a state dict without the prefixes of DataParallel, torch.compile or an outer module.

    Raises UserError, which begins with `source`, if it has several models.
    """
    result = without_wrappers(state, source)
    prefix = max((found[1] or "" for name in result if (found := _OUTER.match(name))), key=len, default="")
    return without_prefix(result, prefix, source)


def without_wrappers(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a state dict without what DataParallel, torch.compile and the like put into its names.

    Raises UserError, which begins with `source`, if a name is there twice then.
    """
    result: dict[str, Any] = {}
    for name, x in state.items():
        if (plain := _WRAPPERS.sub("", name)) in result:
            raise UserError(f"{source}: has {plain} twice, once as {name}; save the state dict of one model")
        result[plain] = x
    return result


def without_prefix(state: dict[str, Any], prefix: str, source: str) -> dict[str, Any]:
    """Return a state dict without what all its names begin with.

    Raises UserError, which begins with `source`, if one does not begin so.
    """
    if others := [name for name in state if not name.startswith(prefix)]:
        raise UserError(f"{source}: some names begin with {prefix}, not {others[0]}; save the state dict of one model")
    return {name.removeprefix(prefix): x for name, x in state.items()}


def exact(array: np.ndarray) -> np.ndarray:
    """Return float16 and bfloat16 arrays as float32, which is exact; others unchanged."""
    return array.astype(np.float32) if str(array.dtype) in ("float16", "bfloat16") else array


def to_torch(params: Mapping[str, Any], first_block: int = 0) -> Arrays:
    """Return jaxlm's tree of arrays as torchlm's state dict, in the order of the tree (`check` reorders it).

    The blocks of a tree of moments begin at `first_block`. Shorter stacks (without model.first_norm) end with the same
    block as longer ones.
    """
    state: Arrays = {}
    n_stacked = _n_stacked(params)
    for path, array in _leaves(params):
        blocks = np.asarray(array) if _is_stacked(path) else [np.asarray(array)]
        for name, block in zip(_torch_names(path, array.shape, first_block + n_stacked), blocks, strict=True):
            state[name] = np.ascontiguousarray(block.T if path[-1] in _TRANSPOSED else block)
    return state


def to_jax(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return torchlm's state dict, with all blocks or only the upper ones, as jaxlm's tree of arrays."""
    leaves: dict[str, dict[int, np.ndarray]] = {}
    for name, array in state.items():
        path, block = jax_path(name)
        leaves.setdefault("/".join(path), {})[block] = array.T if path[-1] in _TRANSPOSED else array
    tree: dict[str, Any] = {}
    for name, blocks in leaves.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        is_stacked = _is_stacked([*parents, last])
        place[last] = np.stack([blocks[i] for i in sorted(blocks)]) if is_stacked else np.ascontiguousarray(blocks[0])
    return tree


def _leaves(tree: Mapping[Any, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, str(name)))
        else:
            yield [*path, str(name)], value


def _is_stacked(path: Sequence[str]) -> bool:
    """Return whether a parameter of jaxlm has a leading axis of blocks."""
    return list(path[:2]) == ["base", "blocks"]


def _n_stacked(tree: Mapping[str, Any]) -> int:
    """Return the number of blocks in the longest stack of a tree."""
    return max((x.shape[0] for path, x in _leaves(tree) if _is_stacked(path)), default=0)


def _torch_names(path: list[str], shape: Sequence[int], n_blocks: int) -> list[str]:
    """Return torchlm's names of a jaxlm parameter, one per block in it; the last one is block `n_blocks` - 1."""
    words = [*path[:-1], "weight" if path[-1] == _weight(path) else path[-1]]
    if not _is_stacked(path):
        return [".".join(words)]
    return [".".join([*words[:2], str(n_blocks - shape[0] + i), *words[2:]]) for i in range(shape[0])]


def jax_path(name: str) -> tuple[list[str], int]:
    """Return the path of a torchlm parameter in jaxlm's tree, and the number of its block."""
    path = name.split(".")
    block = int(path.pop(2)) if _is_stacked(path) else 0
    return [*path[:-1], _weight(path) if path[-1] == "weight" else path[-1]], block


def _weight(path: Sequence[str]) -> str:
    """Return jaxlm's name for torchlm's `weight`, which depends on the module."""
    return "embedding" if path[-2] == "token" else "scale" if "norm" in path[-2] else "kernel"
