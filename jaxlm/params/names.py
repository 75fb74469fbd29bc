"""The same weights under two sets of names, jaxlm's and torchlm's.

jaxlm     tree of dicts, `base/blocks/attention/query/kernel`; a kernel is [in, out], blocks have a leading axis L
torchlm   state dict, `base.blocks.0.attention.query.weight`; a linear weight is [out, in], one tensor a block

torchlm/original.py has the names in the original's checkpoint files.

Arrays are NumPy; where only names change, tensors will do. Nothing here is rounded, so that every way and back is
equal bit for bit. Moments of an optimizer, one array a parameter, go the same ways.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.config import BASE, GATED, LORA_PRODUCTS, Config, ModelConfig
from jaxlm.errors import UserError

Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
Prefixes = tuple[str, str]  # what the original's names of the base model and of the head begin with

# Modules that PyTorch puts around a model or within it, and attributes by which others hold one.
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
_MOST_TOLD = 6  # differences in one error message


def shapes(config: Config, kind: str, n_outputs: int) -> Shapes:
    """Return torchlm's name and shape of every parameter of a model of heads.py, in model order.

    `kind` is "masked", "causal", "classifier" (with `n_outputs`), "tagger" or BASE. The order is PyTorch's, where a
    module's own
    parameters come before those of its parts.
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
        found: Shapes = {f"{name}.weight": (n_out, n_in)} | ({f"{name}.bias": (n_out,)} if has_bias else {})
        if name.startswith("base.") and name.rpartition(".")[2] in adapted:
            found |= {f"{name}.lora_a": (model.lora_rank, n_in), f"{name}.lora_b": (n_out, model.lora_rank)}
        return found

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
        for part, (n_in, n_out) in attention.items():
            result |= linear(f"{block}.attention.{part}", n_in, n_out, model.biases in ("all", "attention"))
        for part in ("query_norm", "key_norm") if model.qk_norm else ():
            result |= norm(f"{block}.attention.{part}", model.head_size)
        result |= norm(f"{block}.layernorm2")
        widths = {"fc1": (D, F), "up": (D, F), "fc2": (F, D)}
        for part in ("fc1", "up", "fc2") if model.mlp in GATED else ("fc1", "fc2"):
            result |= linear(f"{block}.feed_forward.{part}", *widths[part], model.biases in ("all", "feed_forward"))
    if model.final_norm:
        result |= norm("base.final_norm")
    if kind == BASE:
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
    """Return torchlm's names and shapes of a tree of jaxlm's arrays, or of their shapes.

    Raises UserError for a name that would not lead back to its array.
    """
    result: Shapes = {}
    for path, x in _leaves(tree):
        shape = x.shape[1:] if _is_stacked(path) else x.shape
        for name in (torch_names := _torch_names(path, x.shape, _n_stacked(tree))):
            if jax_path(name)[0] != path or any(key.isdecimal() for key in path):
                raise UserError(
                    f"its parameter {'/'.join(path)} would be {name} in other forms, which does not lead back to it; "
                    "call the module otherwise, and use attributes in place of a list"
                )
        result |= dict.fromkeys(torch_names, shape[::-1] if path[-1] in _TRANSPOSED else shape)
    return result


def lora_products(model: ModelConfig) -> list[str]:
    """Return the names of the linear layers of a block that have adapters."""
    named = [name.strip() for name in model.lora_products.split(",")] if model.lora_rank else []
    return [name for name in LORA_PRODUCTS if name in named]


def first_trained(model: ModelConfig, path: Sequence[str]) -> int | None:
    """Return from which block on a parameter is trained, None if it is in none.

    `path` is its name in parts, without the number of a block; what is outside of blocks counts as block 0.
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
    """Return what of a state dict, or of anything by torchlm's names, is trained: what an optimizer has moments of."""
    return {name: x for name, x in state.items() if is_trained(model, name)}


def without_adapters(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a state dict, or of shapes, is in a model without adapters, too."""
    return {name: x for name, x in arrays.items() if not name.endswith(_LORA)}


def merge_adapters(model: ModelConfig, weights: Arrays) -> Arrays:
    """Return a state dict with its adapters, if there are any, added to the weights that they adapt."""
    result = without_adapters(weights)
    for name in [name for name in weights if name.endswith(_LORA[0])]:
        layer = name.removesuffix(_LORA[0])
        lora_a, lora_b, weight = (weights[layer + part].astype(np.float64) for part in (*_LORA, "weight"))
        scale = model.lora_alpha / model.lora_rank
        result[f"{layer}weight"] = (weight + scale * lora_b @ lora_a).astype(weights[f"{layer}weight"].dtype)
    return result


def decay_groups(wanted: Shapes) -> tuple[list[str], list[str]]:
    """Return the names that decay and those that do not, each in model order: PyTorch's optimizer counts them so."""
    decayed = [name for name, shape in wanted.items() if len(shape) > 1 and shape[0] > 1]
    return decayed, [name for name in wanted if name not in decayed]


def check(state: Mapping[str, Any], wanted: Shapes, source: str) -> dict[str, Any]:
    """Return the arrays or tensors of `state` in the order of `wanted`.

    Raises UserError, which begins with `source`, for names or shapes that differ from `wanted`.
    """
    check_shapes({name: tuple(array.shape) for name, array in state.items()}, wanted, source)
    return {name: state[name] for name in wanted}


def check_shapes(found: Shapes, wanted: Shapes, source: str) -> None:
    """Raise UserError, which begins with `source`, for names or shapes that differ from `wanted`."""
    problems = [f"{name} {list(wanted[name])} is missing" for name in wanted if name not in found]
    problems += [f"{name} {list(found[name])} is not in the model" for name in found if name not in wanted]
    problems += [
        f"{name} has the shape {list(found[name])}, but the model needs {list(wanted[name])}"
        for name in wanted
        if found.get(name, wanted[name]) != wanted[name]
    ]
    if problems:
        more = f"; and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
        raise UserError(f"{source}: weights of another model: {'; '.join(problems[:_MOST_TOLD])}{more}")


def unwrapped(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return a state dict under the names that its model has alone, not in DataParallel, torch.compile or a module.

    Raises UserError, which begins with `source`, if it is of several models.
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
    """Return float16 and bfloat16 as float32, which has all their numbers; other types as they are."""
    return array.astype(np.float32) if str(array.dtype) in ("float16", "bfloat16") else array


def to_torch(params: Mapping[str, Any], first_block: int = 0) -> Arrays:
    """Return jaxlm's tree of arrays as torchlm's state dict (in the tree's order; `check` puts it in the model's).

    The blocks of a tree of moments begin with the first that is trained. Stacks that are shorter than others end with
    the same block as those (without model.first_norm).
    """
    state: Arrays = {}
    n_stacked = _n_stacked(params)
    for path, array in _leaves(params):
        blocks = np.asarray(array) if _is_stacked(path) else [np.asarray(array)]
        for name, block in zip(_torch_names(path, array.shape, first_block + n_stacked), blocks, strict=True):
            state[name] = np.ascontiguousarray(block.T if path[-1] in _TRANSPOSED else block)
    return state


def to_jax(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return torchlm's state dict, with all blocks or all from one on, as jaxlm's tree of arrays."""
    leaves: dict[str, dict[int, np.ndarray]] = {}
    for name, array in state.items():
        path, block = jax_path(name)
        leaves.setdefault("/".join(path), {})[block] = array.T if path[-1] in _TRANSPOSED else array
    tree: dict[str, Any] = {}
    for name, blocks in leaves.items():
        *parents, last = name.split("/")
        place = tree
        for part in parents:
            place = place.setdefault(part, {})
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
    """Return how many blocks the longest stack of a tree has."""
    return max((x.shape[0] for path, x in _leaves(tree) if _is_stacked(path)), default=0)


def _torch_names(path: list[str], shape: Sequence[int], n_blocks: int) -> list[str]:
    """Return torchlm's names of a parameter of jaxlm, one for each block that is in it; the last ends `n_blocks`."""
    words = [*path[:-1], "weight" if path[-1] == _weight(path) else path[-1]]
    if not _is_stacked(path):
        return [".".join(words)]
    return [".".join([*words[:2], str(n_blocks - shape[0] + i), *words[2:]]) for i in range(shape[0])]


def jax_path(name: str) -> tuple[list[str], int]:
    """Return the path of a parameter of torchlm in jaxlm's tree, and the number of its block."""
    path = name.split(".")
    block = int(path.pop(2)) if _is_stacked(path) else 0
    return [*path[:-1], _weight(path) if path[-1] == "weight" else path[-1]], block


def _weight(path: Sequence[str]) -> str:
    """Return what jaxlm calls torchlm's `weight` of the module that a parameter is in."""
    return "embedding" if path[-2] == "token" else "scale" if "norm" in path[-2] else "kernel"
