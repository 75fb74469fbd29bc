"""Models of transformers: a folder with config.json, model.safetensors and a tokenizer. PUBLIC_WEIGHTS.md has examples.

families.py says which are read and written. transformers itself is not needed, and nothing is unpickled.
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from jaxlm import config as configs
from jaxlm.config import BASE, EMBED, Config, ModelConfig, TokenizerConfig
from jaxlm.data import chat, tokenization
from jaxlm.data.labels import numbered
from jaxlm.errors import UserError, reason
from jaxlm.io import storage, utf8
from jaxlm.params import names
from jaxlm.params.names import Arrays, Shapes
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import parameters
from jaxlm.weights import formats, sentences
from jaxlm.weights.families import (
    CLASS_NAMES,
    CLASSES,
    FAMILIES,
    FIXED,
    GELU,
    OTHER_CLASSES,
    SETS,
    TAGS,
    UNUSED,
    UNUSED_KEYS,
    VALUE,
    Family,
)
from jaxlm.weights.formats import StoredFile

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MULTILABEL = "multi_label_classification"  # a problem_type
PICKLE = "pytorch_model.bin"
FILES = (
    WEIGHTS,
    f"{WEIGHTS}.index.json",
    PICKLE,
    f"{PICKLE}.index.json",
)  # of weights; the first that is there is read
TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
GENERATION = "generation_config.json"
POSITION, SEGMENT = "embedding.position", "embedding.segment"
ROPE = (
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
)  # what of rope_parameters is read; with llama3, too:
ROPE_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
Check = Callable[[str, bool, str], None]  # a key of config.json, whether it is right, and what it has to be


# Reading


def find(source: str | Path) -> Path:
    """Return the path of a run, a checkpoint or a model; one on the Hugging Face hub is downloaded by its name.

    Raises UserError if the hub does not have it or cannot be reached.
    """
    path = storage.run_path(source)
    if (path / "modules.json").is_file() and not is_model(path):  # of sentence-transformers, in its older form
        path = next(iter(sorted(path.glob("*_Transformer"))), path)
    if storage.is_remote(source) or path.exists() or not storage.is_hub_name(path):
        return path
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from jaxlm.data import hub

    failure = hub.unreachable(str(source))
    wanted = [CONFIG, GENERATION, *tokenization.BESIDE, *TOKENIZER]
    # The second only where there is nothing of the first.
    weights = (
        [WEIGHTS, f"{WEIGHTS}.index.json", "model-*.safetensors"],
        [PICKLE, f"{PICKLE}.index.json", "pytorch_*.bin"],
    )
    try:
        for patterns in weights:
            # What has been downloaded before needs no hub.
            found = huggingface_hub.snapshot_download(
                str(source), allow_patterns=[*wanted, *patterns], etag_timeout=3, local_files_only=bool(failure)
            )
            if any((Path(found) / name).is_file() for name in FILES):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = failure or reason(error)
        raise UserError(
            f"{source}: there is no such run or checkpoint, and no model on the hub that can be reached ({why})"
        ) from error
    return Path(found)


def is_model(path: Path) -> bool:
    """Return whether a folder is that of a model of transformers, whole or not."""
    return any((path / name).is_file() for name in (CONFIG, *FILES))


def load(path: Path) -> StoredFile:
    """Return the model in a folder. Raises UserError for what is not there, does not fit, or is not had here."""
    values = _read_json(path / CONFIG)
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{path / CONFIG}: model_type={kind}: can be read from {', '.join(FAMILIES)} only")
    family = FAMILIES[kind]
    settings = _settings(family, values, path / CONFIG)
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise UserError(f"{path}: there is no {WEIGHTS}; copy or download it, too")
    tree = _read_weights(file)
    is_tied = settings["model.tied_embedding"]
    tensors, is_bare = _tensors(family, is_tied, tree, file)
    task = _task_of(family, is_tied, values, tensors, is_bare)
    if task != CLASSES:  # the pooler of its base
        tensors = {name: x for name, x in tensors.items() if ".pooler.dense." not in name}
    if task == BASE:  # what is not of it are output layers that are of no use here
        tensors = {name: x for name, x in tensors.items() if name.startswith(family.prefix)}
    else:
        tensors = _without_others(family, task, values, tensors, file)
    if task == BASE and not family.is_causal and (pooling := sentences.pooling_of(path)):
        n = sentences.longest(path, settings["model.seq_len"])
        settings |= {"task": (task := EMBED), "model.pooling": pooling, "model.seq_len": n}
        if settings["model.positions"] == "learned":
            name = f"{family.module(POSITION)}.weight"
            tensors[name] = tensors[name][: n + family.first_position(settings["model.pad_id"])]
    class_names = _class_names(family, task, values, tensors, path / CONFIG) if task in (CLASSES, TAGS) else []
    settings["task"] = VALUE if task == CLASSES and not class_names else task
    if task == CLASSES and values.get("problem_type") == MULTILABEL:
        settings["task"] = SETS
    if class_names:
        settings["data.n_labels"] = len(class_names)
    if task == CLASSES:
        settings["model.classifier_bias"] = family.settings.get("classifier_bias", True)
        settings["model.pooling"] = _pooling(family, values, path / CONFIG)
    if family.is_causal and task != "gpt":
        settings["model.pooling"] = "last"
    fingerprint = None
    if any((path / name).is_file() for name in TOKENIZER):
        settings |= {"tokenizer.path": str(path), "tokenizer.lowercase": _ignores_case(path)}
        marks: Any = "file" if family.bases else "task"
        lowercase = settings["tokenizer.lowercase"]
        tokenizer = tokenization.read(TokenizerConfig(path=str(path), lowercase=lowercase, marks=marks))
        if family.bases:
            settings |= _special_tokens(family, values, settings["model.pad_id"], tokenizer, path)
        else:
            _check_ends(family, tokenizer, path)
        fingerprint = tokenization.fingerprint(tokenizer)
    config = configs.build(settings)
    weights = _weights(family, config, tensors, file)
    info = {"step": 0, "task": config.task, "rate": 0.0, "tokenizer": fingerprint, "val_loss": None, "config": settings}
    info["classes"] = () if class_names == _unnamed(len(class_names)) else tuple(class_names)
    return StoredFile(f"{formats.TRANSFORMERS}{family.type}", path, tree, weights, info)


def _read_weights(file: Path) -> Arrays:
    """Return the tensors of a file of weights, or of all that an index names. Raises UserError."""
    if not file.name.endswith(".index.json"):
        return formats.tensors_of(file)
    places = _read_json(file).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(x, str) and Path(x).name == x for x in places.values()):
        raise UserError(f"{file}: weight_map has to say which file beside it each tensor is in; copy it again")
    tensors: Arrays = {}
    for name in sorted(set(places.values())):
        if not (file.parent / name).is_file():
            raise UserError(f"{file}: its file {name} is not there; copy or download it, too")
        tensors |= formats.tensors_of(file.parent / name)
    if missing := sorted(places.keys() - tensors.keys()):
        raise UserError(f"{file}: {missing[0]} is not in {places[missing[0]]}; copy both again")
    return tensors


def _settings(family: Family, values: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the settings that config.json tells; their types and ranges are checked with those of all checkpoints."""

    def check(key: str, is_right: bool, rule: str) -> None:
        if not is_right:
            raise UserError(f"{source}: {key}={json.dumps(values.get(key))[:80]}: {rule}")

    keys, unused = family.keys, family.unused.split()
    fixed = {key: x for key, x in FIXED.items() if key not in (*keys.values(), *unused)} | family.fixed
    for key, value in fixed.items():
        check(key, values.get(key, value) == value, f"can be read with {json.dumps(value)} only")
    unknown = f"is not known here for model_type={family.type}; remove it if it does not change what the model computes"
    known = {*UNUSED_KEYS, *unused, *keys.values(), *family.dropouts, *fixed, *_keys_in_code(family)}
    for key in sorted(values.keys() - known):
        check(key, False, unknown)
    values = family.defaults | values
    settings = {f"model.{name}": x for name, x in family.settings.items() if name != "classifier_bias"}
    for name in ("d_model", "n_layers", "n_heads", "vocab_size", "seq_len"):
        value = values.get(keys[name])
        check(keys[name], type(value) is int and value > 0, "has to be a whole number above 0")
        settings[f"model.{name}"] = value
    d_model, n_heads = settings["model.d_model"], settings["model.n_heads"]
    if "width" in keys:
        widths = (4 * d_model, None if family.is_causal else 4 * d_model)
        check(
            keys["width"], values.get(keys["width"]) in widths, f"can be read with 4 x the width, {4 * d_model}, only"
        )
    usual = {"d_ff": 4 * d_model, "n_kv_heads": n_heads, "head_dim": d_model // n_heads, "head_hidden": d_model}
    for name in usual.keys() & keys.keys():  # 0: the usual value
        value = values.get(keys[name])
        is_left_out = value is None and name in ("n_kv_heads", "head_dim")
        check(keys[name], is_left_out or type(value) is int and value > 0, "has to be a whole number above 0")
        settings[f"model.{name}"] = 0 if is_left_out or value == usual[name] else value
    if d_model % n_heads and not settings.get("model.head_dim"):
        raise UserError(f"{source}: {keys['n_heads']}={n_heads} does not divide {d_model}")
    if "gelu" in keys:
        activation = str(values.get(keys["gelu"], family.activation))
        known_gelu = {name: kind for name, kind in GELU.items() if kind == family.settings.get("gelu", kind)}
        if activation not in known_gelu:
            raise UserError(f"{source}: {keys['gelu']}={activation}: can be read with {', '.join(known_gelu)} only")
        settings["model.gelu"] = known_gelu[activation]
    for name in {"tied_embedding", "output_bias"} & keys.keys():
        settings[f"model.{name}"] = value = values.get(keys[name], True)
        check(keys[name], isinstance(value, bool), "has to be true or false")
    settings["model.dropout"] = values.get(family.dropouts[0], 0.1)
    if "norm_epsilon" in keys:
        settings["model.norm_epsilon"] = values.get(keys["norm_epsilon"], 1e-5 if family.bases else family.epsilon)
    if "pad_id" in keys:
        value = values.get(keys["pad_id"], family.pad_id)
        pad_id = settings["model.pad_id"] = -1 if value is None else value
        is_token = isinstance(pad_id, int) and pad_id < settings["model.vocab_size"]
        check(keys["pad_id"], is_token, "has to be a token of the vocabulary")
    if "attention_bias" in family.read:
        biases = tuple(values.get(key, False) for key in ("attention_bias", "mlp_bias"))
        check("attention_bias", all(isinstance(x, bool) for x in biases), "and mlp_bias have to be true or false")
        kinds = {(False, False): "none", (True, False): "attention", (False, True): "feed_forward", (True, True): "all"}
        settings["model.biases"] = kinds[biases]
    if family.bases:
        settings |= _rotary(family, values, check) | _layers(family, values, settings["model.n_layers"], check)
    settings["model.seq_len"] -= family.first_position(settings["model.pad_id"])
    if family.segments:
        n_segments = settings["model.segments"] = values.get("type_vocab_size", 2)
        check("type_vocab_size", type(n_segments) is int and n_segments > 0, "has to be a whole number above 0")
    return settings


def _keys_in_code(family: Family) -> set[str]:
    """Return the keys of config.json that are read here, and not by the names in families.toml alone."""
    keys = {
        *family.read.split(),
        *({"classifier_pooling", family.old_pooling} if family.poolings else ()),
        family.window,
    }
    if family.bases:
        keys |= {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
    return keys | ({"global_rope_theta", "local_rope_theta"} if len(family.bases) > 1 else set())


def _rotary(family: Family, values: Mapping[str, Any], check: Check) -> dict[str, Any]:
    """Return the settings of rotary positions, which config.json tells in forms of several versions."""
    told = values.get("rope_scaling") or values.get("rope_parameters") or {}
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    check(key, isinstance(told, dict), "has to be an object")
    bases = values.get("rope_theta")
    if len(family.bases) == 1:
        parts = [{"rope_theta": family.bases[0] if bases is None else bases, **told}]
    else:
        named = [values.get(name) for name in ("global_rope_theta", "local_rope_theta")]
        if isinstance(bases, list):  # one for each layer
            kinds = _kinds(family, values, len(bases), check)
            named = [next((x for x, k in zip(bases, kinds, strict=True) if k == kind), None) for kind in KINDS]
        check("rope_theta", bases is None or isinstance(bases, list), "can be read as a list, one for each layer, only")
        check(key, not told or set(told) <= set(KINDS), f"has to have {' and '.join(KINDS)}")
        pairs = zip(KINDS, named, family.bases, strict=True)
        parts = [
            {"rope_theta": default if base is None else base, **(told.get(kind) or {})} for kind, base, default in pairs
        ]
    for part in parts:
        kind = part.get("rope_type", part.get("type", "default"))
        has_llama3 = kind == "llama3" and len(parts) == 1
        check(
            key, kind == "default" or has_llama3, "can be read with rope_type default, and of llama and others llama3"
        )
        check(
            key,
            part.keys() <= {*ROPE, *(ROPE_LLAMA3 if has_llama3 else ())},
            f"can be read with {', '.join(ROPE)} only",
        )
        check(key, part.get("partial_rotary_factor") in (None, 1), "can be read with partial_rotary_factor 1 only")
        is_number = isinstance(part["rope_theta"], int | float) and part["rope_theta"] > 1
        check("rope_theta", is_number, "has to be a number above 1")
    check("partial_rotary_factor", values.get("partial_rotary_factor") in (None, 1), "can be read with 1 only")
    settings = {"model.rotary_base": float(parts[0]["rope_theta"])}
    if len(parts) > 1:
        settings["model.rotary_base_local"] = float(parts[1]["rope_theta"])
    if parts[0].get("rope_type", parts[0].get("type")) == "llama3":
        ends = (parts[0].get("low_freq_factor"), parts[0].get("high_freq_factor"))
        check(key, ends == (1, 4), "can be read with low_freq_factor 1 and high_freq_factor 4 only")
        settings["model.rotary_scaling"] = float(parts[0]["factor"])
        length = parts[0].get("original_max_position_embeddings", values[family.keys["seq_len"]])
        settings["model.rotary_scaling_len"] = length
    return settings


KINDS = ("full_attention", "sliding_attention")  # of layers: global and local ones


def _kinds(family: Family, values: Mapping[str, Any], n_layers: int, check: Check) -> list[str]:
    """Return the kind of each layer, as config.json tells it in forms of several versions."""
    every = values.get("global_attn_every_n_layers", 3)
    check("global_attn_every_n_layers", type(every) is int and every > 0, "has to be a whole number above 0")
    kinds, widths = values.get("layer_types"), values.get("attention_windows")
    if widths is not None and "attention_windows" in family.read:
        check("attention_windows", isinstance(widths, list), "has to be a list")
        kinds = kinds or [KINDS[bool(width)] for width in widths]
    if kinds is None and not family.window:
        kinds = [KINDS[0]] * n_layers
    elif kinds is None and "global_attn_every_n_layers" in family.read:
        kinds = [KINDS[i % every > 0] for i in range(n_layers)]
    elif kinds is None:
        kinds = [KINDS[(i + 1) % 3 > 0] for i in range(n_layers)]
    is_right = isinstance(kinds, list) and len(kinds) == n_layers and set(kinds) <= set(KINDS)
    check("layer_types", is_right, f"has to have {' or '.join(KINDS)} for each of {n_layers} layers")
    return list(kinds)


def _layers(family: Family, values: Mapping[str, Any], n_layers: int, check: Check) -> dict[str, Any]:
    """Return the settings of global and local layers."""
    kinds = _kinds(family, values, n_layers, check)
    if KINDS[1] not in kinds:
        return {"model.window": 0, "model.global_every": 0}
    check("layer_types", bool(family.window), f"can be read with {KINDS[0]} only")
    width = values.get(family.window)
    if widths := [x for x in values.get("attention_windows") or [] if x]:
        check("attention_windows", len({*widths}) == 1, "has to have one width, of all local layers")
        width = widths[0]
    rule = "has to be a whole number, so large that a layer looks beyond each position"
    window = (
        (width // 2 - family.is_causal if family.window == "local_attention" else width) if type(width) is int else 0
    )
    check(family.window, window > 0, rule)
    settings = {"model.window": window, "model.global_every": 0, "model.global_first": True}
    is_global = [kind == KINDS[0] for kind in kinds]
    if any(is_global):
        usual = [(3, family.settings.get("first_norm", True) is False)]
        orders = usual + [(n, first) for n in range(2, n_layers + 1) for first in (True, False)]
        for every, first in orders:
            if is_global == [i % every == (0 if first else every - 1) for i in range(n_layers)]:
                return settings | {"model.global_every": every, "model.global_first": first}
        check(
            "layer_types", False, "can be read where global layers are each n-th, from the first or the n-th on, only"
        )
    return settings


def _pooling(family: Family, values: Mapping[str, Any], source: Path) -> str:
    """Return the setting for what a classifier reads of a text."""
    if family.is_causal:
        return "last"
    told = {key: values[key] for key in ("classifier_pooling", family.old_pooling) if key in values}
    named = {*told.values()} or {next(iter(family.poolings), "cls")}
    if len(named) > 1 or (family.poolings and not named <= family.poolings.keys()):
        key = next(iter(told))
        rule = f"can be read with {', '.join(family.poolings)} only, and the same in all such keys"
        raise UserError(f"{source}: {key}={json.dumps(told[key])}: {rule}")
    return family.poolings.get(named.pop(), "first")


def _tensors(family: Family, is_tied: bool, stored: Mapping[str, np.ndarray], source: Path) -> tuple[Arrays, bool]:
    """Return the tensors of a file under the names that transformers gives them today, none twice.

    And whether the names were those of the base model alone.
    """
    prefix, table = family.prefix, f"{family.modules['embedding.token']}.weight"
    stored = names.without_wrappers(stored, str(source))
    starts = (prefix, *(old.removeprefix("^") for old, new in family.renamed.items() if new == prefix))
    for name in stored:  # an attribute by which another model has held this one
        if name.endswith(f".{table}"):
            start = next((x for x in starts if f".{name}".endswith(f".{x}{table}")), "")
            stored = names.without_prefix(stored, name.removesuffix(f"{start}{table}"), str(source))
            break
    for pattern, new in family.renamed.items():
        stored = {re.sub(pattern, new, name): x for name, x in stored.items()}
    is_bare = not any(name.startswith(prefix) for name in stored)  # as openai-community/gpt2 is
    heads = (family.output, *(x for task in family.heads.values() for x in task.values() if not x.startswith(prefix)))
    tensors: Arrays = {}
    for name, array in stored.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # as bert-base-uncased has it
        if is_bare and not name.startswith(heads):
            name = prefix + name
        tensors[name] = names.exact(array)
    head = next((x["head"] for x in family.heads.values() if "head" in x), family.output)
    copies = [("weight", family.module("embedding.token")), ("bias", head)]
    for kind, module in copies if is_tied else copies[1:]:
        copy, name = f"{family.output}.{kind}", f"{module}.{kind}"
        if copy in tensors and not np.array_equal(array := tensors.pop(copy), tensors.setdefault(name, array)):
            mend = (
                "; set tie_word_embeddings=false"
                if "tied_embedding" in family.keys
                else ", but can be read as the same only"
            )
            raise UserError(f"{source}: {copy} is another than {name}{mend}")
    return {name: x for name, x in tensors.items() if not re.search(UNUSED, name)}, is_bare


def _task_of(
    family: Family, is_tied: bool, values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], is_bare: bool
) -> str:
    """Return the task whose output layer a file has, by its tensors, and by the class that config.json names."""
    told = values.get("architectures")
    named = str(told[0]) if isinstance(told, list) and told else ""
    fits = [task for task in family.heads if _has_head(family, task, tensors, is_tied)]
    if named.endswith(OTHER_CLASSES):
        fits = [task for task in fits if task not in (CLASSES, TAGS)]
    if CLASS_NAMES[TAGS] in named:  # it may still have the pooler of its base, as older files do
        fits = [task for task in fits if task != CLASSES]
    for task in fits:
        if named == family.class_name(task):
            return task
    return fits[0] if fits else BASE


def _without_others(family: Family, task: str, values: Mapping[str, Any], tensors: Arrays, source: Path) -> Arrays:
    """Return tensors without output layers of a class that transformers does not have; print what is left out."""
    named = str((values.get("architectures") or [""])[0])
    if not named or named in (family.class_name(known) for known in family.heads):
        return tensors
    kept = {name: x for name, x in tensors.items() if name.startswith((family.prefix, *family.heads[task].values()))}
    if others := sorted({name.rpartition(".")[0] for name in tensors.keys() - kept.keys()}):
        print(f"{source}: leaving out output layers of {named}: {', '.join(others)}", file=sys.stderr)
    return kept


def _has_head(family: Family, task: str, tensors: Mapping[str, np.ndarray], is_tied: bool) -> bool:
    """Return whether the tensors have those of an output layer; a tied one may have none of its own."""
    modules = family.heads.get(task)
    if modules is None:
        return False
    is_table = {"head.linear": is_tied and task in ("mlm", "gpt"), "head": "output_bias" in family.keys}
    expected = {ours: theirs for ours, theirs in modules.items() if not is_table.get(ours)}
    return all(f"{theirs}.{'bias' if ours == 'head' else 'weight'}" in tensors for ours, theirs in expected.items())


def _class_names(family: Family, task: str, values: Mapping[str, Any], tensors: Arrays, source: Path) -> list[str]:
    """Return the names of the classes by number, those that transformers makes up where they have none.

    None of a model with one output, which is a number: transformers takes it for one, too.
    """
    kind, n = values.get("problem_type"), len(tensors[f"{family.heads[task]['head.linear']}.weight"])
    if task == CLASSES and n == 1 and kind in (None, "regression"):
        return []
    if kind not in (None, "single_label_classification", *([MULTILABEL] if task == CLASSES else [])) or n < 2:
        what = "only classes, or one number, can be read"
        raise UserError(f"{source}: problem_type={json.dumps(kind)} with {n} outputs: {what}")
    stored = values.get("id2label") or dict(enumerate(_unnamed(n)))
    is_object = isinstance(stored, dict) and {str(i) for i in stored} == {str(i) for i in range(n)}
    by_number = {str(i): str(name).strip() for i, name in stored.items()} if is_object else {}
    if len({*by_number.values()}) < n or not all(by_number.values()):
        raise UserError(f"{source}: id2label={json.dumps(stored)}: has to have {n} different names, by 0 to {n - 1}")
    return [by_number[str(i)] for i in range(n)]


def _unnamed(n: int) -> list[str]:
    """Return what transformers calls classes without names."""
    return [f"LABEL_{i}" for i in range(n)]


def _check_ends(family: Family, tokenizer: Tokenizer, path: Path) -> None:
    """Raise UserError if a tokenizer.json puts other tokens around a text than are put there here."""
    if tokenizer.post_processor is None:
        return
    specials = tokenization.special_ids(tokenizer)
    ends = [[specials[role]] if role in specials and not family.is_causal else [] for role in ("start", "end")]
    expected = [*ends[0], *tokenizer.encode("a", add_special_tokens=False).ids, *ends[1]]
    if (ids := tokenizer.encode("a").ids) != expected:
        tokens = [" ".join(str(tokenizer.id_to_token(i)) for i in some) for some in (ids, expected)]
        raise UserError(
            f"{path / TOKENIZER[0]}: its post_processor makes {tokens[0]} of the text a: can be read with {tokens[1]} "
            "only; take it out of the file if the model does without"
        )


def _special_tokens(
    family: Family, values: Mapping[str, Any], pad_id: int, tokenizer: Tokenizer, path: Path
) -> dict[str, Any]:
    """Return the settings for tokens around a text, of the pad, and at the end of a continuation."""
    try:
        around = tokenization.marks_of_file(tokenizer)
    except UserError as error:
        raise UserError(f"{path}/{error}") from error
    specials = tokenization.special_ids(tokenizer)
    settings: dict[str, Any] = {"tokenizer.marks": "file"}
    if family.is_causal:
        if "article" not in specials:
            known = " or ".join(tokenization.NAMES["article"])
            raise UserError(f"{path / TOKENIZER[0]}: has no token for the end of a text: can be read with {known} only")
        generation = _read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
        told = [x.get("eos_token_id") for x in (values, generation)]
        ids = {i for x in told for i in (x if isinstance(x, list) else [x]) if i is not None}
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{path / CONFIG}: eos_token_id={json.dumps(told)}: has to be a token or a list of tokens")
        return settings | {"tokenizer.end_ids": ",".join(map(str, sorted(ids - {specials["article"]})))}
    if pad_id in {*around.values(), specials.get("mask")}:  # it would be hidden where it is no pad
        if specials.get("pad", pad_id) == pad_id:
            known = " or ".join(tokenization.NAMES["pad"])
            raise UserError(f"{path / CONFIG}: pad_token_id={pad_id}: also ends texts, and there is no {known} instead")
        settings["model.pad_id"] = specials["pad"]
    return settings


def _ignores_case(path: Path) -> bool:
    """Return whether a vocab.txt is one of words in lower case; a tokenizer.json says so itself."""
    file = path / tokenization.TOKENIZER_CONFIG
    return not file.is_file() or _read_json(file).get("do_lower_case", True) is not False


def _weights(family: Family, config: Config, tensors: Arrays, source: Path) -> Arrays:
    """Return the tensors of a file under our names. Raises UserError unless they are all those of the model."""
    places, position = _places(family, config), _position(family)
    expected = _shapes(family, config, places)
    names.check_shapes({name: x.shape for name, x in tensors.items()}, expected, str(source))
    if position:
        tensors = tensors | {position: tensors[position][family.first_position(config.model.pad_id) :]}
    weights: Arrays = {}
    for theirs, ours in places.items():
        array = tensors[theirs].T if re.search(family.transposed, theirs) else tensors[theirs]
        weights |= {name: np.ascontiguousarray(x) for name, x in zip(ours, np.split(array, len(ours)), strict=True)}
    if "head.bias" in parameters.shapes(config) and "head.bias" not in weights:
        weights["head.bias"] = np.zeros(config.model.vocab_size, np.float32)
    return weights


def _position(family: Family) -> str:
    """Return the name of the table of positions, "" if there is none."""
    return f"{family.module(POSITION)}.weight" if POSITION in family.modules else ""


def _places(family: Family, config: Config) -> dict[str, list[str]]:
    """Return the name of each tensor there, and of those here that are in it, one behind the other."""
    modules = {f"base.{ours}": family.module(ours) for ours in family.modules} | family.heads[_task(config)]
    places: dict[str, list[str]] = {}
    for ours in parameters.shapes(config):
        if ours == "head.bias" and not config.model.output_bias:
            continue
        is_table = ours in (f"base.{POSITION}", f"base.{SEGMENT}")
        module, _, kind = (f"{ours}.weight" if is_table else ours).rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        theirs = modules.get(module.replace(f".{number[0]}.", ".#.") if number else module)
        if theirs:
            places.setdefault(f"{theirs.replace('#', number[0] if number else '')}.{kind}", []).append(ours)
    return places


def _shapes(family: Family, config: Config, places: Mapping[str, list[str]]) -> Shapes:
    """Return the shape of each tensor there."""
    shapes, result = parameters.shapes(config), {}
    for theirs, ours in places.items():
        first, *others = shapes[ours[0]]
        if ours[0] == f"base.{POSITION}":
            first += family.first_position(config.model.pad_id)
        shape = (len(ours) * first, *others)
        result[theirs] = shape[::-1] if re.search(family.transposed, theirs) else shape
    return result


def _task(config: Config) -> str:
    """Return the task that a family has the head by."""
    kinds = {"causal": "gpt", "masked": "mlm", "tagger": TAGS, "embedder": BASE, BASE: BASE}
    return kinds.get(parameters.model_kind(config.task), CLASSES)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return utf8.read_json(path)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else reason(error)
        raise UserError(f"{path}: cannot be read ({why}); copy or download it again") from error


# Writing


def check(config: Config, family: Family) -> None:
    """Raise UserError, which names the settings, unless a family has models with these."""
    task = _task(config)
    if task not in family.heads or (config.task == EMBED and family.is_causal):
        tasks = [EMBED if name == BASE else name for name in family.heads if name != BASE or not family.is_causal]
        raise UserError(
            f"--as {family.type}: task={config.task}, but a model of {family.type} has {', '.join(tasks)} only"
        )
    model, kind, keys = config.model, parameters.model_kind(config.task), family.keys
    expected: dict[str, Any] = {"lora_rank": 0, "norm": "layernorm", "mlp": "gelu", "biases": "all", "qk_norm": False}
    expected |= {"first_norm": True, "window": 0, "rotary_scaling": 1.0, "head_dense": "none", "classifier_bias": True}
    expected |= family.settings
    for name in {"window"} if family.window else {"rotary_scaling"} if family.bases else ():
        del expected[name]
    if "attention_bias" in family.read and (model.biases in ("none", "attention") or "mlp_bias" in family.read):
        expected["biases"] = model.biases
    usual = dataclasses.replace(model, head_dense=expected["head_dense"])
    if names.head_layers(model, kind) == names.head_layers(usual, kind):
        del expected["head_dense"]
    if task == CLASSES:
        poolings = {*family.poolings.values()} or {"last" if family.is_causal else "first"}
        expected |= {"head_outputs": "labels", "pooling": model.pooling if model.pooling in poolings else min(poolings)}
    else:
        del expected["classifier_bias"]
    if task in (CLASSES, TAGS):
        for name in ("tied_embedding", "output_bias"):  # which make no difference to it
            expected.pop(name, None)
    if task in (TAGS, BASE):
        expected |= {"pooling": "last"} if family.is_causal else {}
    problems = [
        f"model.{name}={stored}, but a model of {family.type} has {value}"
        for name, value in expected.items()
        if (stored := getattr(model, name)) != value
    ]
    if "d_ff" not in keys and model.n_hidden != 4 * model.d_model:
        problems.append(f"model.d_ff={model.d_ff}, but a model of {family.type} has 4 x model.d_model")
    if "n_kv_heads" not in keys and model.kv_heads != model.n_heads:
        problems.append(f"model.n_kv_heads={model.n_kv_heads}, but a model of {family.type} has model.n_heads")
    if "head_dim" not in keys and model.head_size * model.n_heads != model.d_model:
        problems.append(f"model.head_dim={model.head_dim}, but a model of {family.type} has d_model / n_heads")
    if model.logit_softcap and task not in (CLASSES, TAGS):
        problems.append(f"model.logit_softcap={model.logit_softcap}, but a model of {family.type} has none")
    if model.segments and not family.segments:
        problems.append(f"model.segments={model.segments}, but a model of {family.type} has none")
    if family.has_positions_behind_pad and config.model.pad_id < 0:
        problems.append(f"model.pad_id={config.model.pad_id}, but positions of {family.type} begin behind its pad_id")
    if problems:
        raise UserError(f"--as {family.type}: {'; '.join(problems)}; only models with such settings can be written so")


def write(path: Path, snapshot: Snapshot, family: Family, tokenizer: Tokenizer | None) -> None:
    """Make a folder that transformers loads. Raises UserError as `check` does."""
    from safetensors.numpy import save

    config, model, task = snapshot.config, snapshot.config.model, _task(snapshot.config)
    check(config, family)
    skipped, position = family.first_position(model.pad_id), _position(family)
    tensors: Arrays = {}
    for theirs, ours in _places(family, config).items():
        array = np.concatenate([snapshot.weights[name] for name in ours])
        tensors[theirs] = np.ascontiguousarray(array.T) if re.search(family.transposed, theirs) else array
    if position:
        tensors[position] = np.pad(tensors[position], ((skipped, 0), (0, 0)))
    told = {name: getattr(model, name, None) for name in family.keys}
    told |= {"seq_len": model.seq_len + skipped, "width": 4 * model.d_model, "d_ff": model.n_hidden}
    told |= {
        "n_kv_heads": model.kv_heads,
        "head_dim": model.head_size,
        "head_hidden": model.head_hidden or model.d_model,
    }
    if "gelu" in family.keys:
        told["gelu"] = next(name for name, kind in GELU.items() if kind == model.gelu)
    values: dict[str, Any] = {
        "architectures": [family.class_name(task)],
        "model_type": family.type,
        "dtype": "float32",
        **family.fixed,
        "tie_word_embeddings": True,
        **{key: told[name] for name, key in family.keys.items()},
        **dict.fromkeys(family.dropouts, model.dropout),
        **_written_positions(family, model),
    }
    if "attention_bias" in family.read:
        values["attention_bias"] = model.biases in ("attention", "all")
    if "mlp_bias" in family.read:
        values["mlp_bias"] = model.biases in ("feed_forward", "all")
    if family.segments:
        values["type_vocab_size"] = model.segments or 2
        tensors.setdefault(family.segments, np.zeros((2, model.d_model), np.float32))
    if "pad_id" in family.keys and model.pad_id < 0:
        values[family.keys["pad_id"]] = None
    if task in (CLASSES, TAGS):
        n, class_names = parameters.n_outputs(config), snapshot.info.get("classes") or ()
        if n == 1:
            values["problem_type"] = "regression"
        if config.task == SETS:
            values["problem_type"] = MULTILABEL
        if tuple(class_names) in ((), numbered(n)):
            class_names = _unnamed(n)
        values["id2label"] = {str(i): name for i, name in enumerate(class_names)}
        values["label2id"] = {name: i for i, name in enumerate(class_names)}
        if family.poolings:
            values["classifier_pooling"] = next(key for key, x in family.poolings.items() if x == model.pooling)
    values |= _written_tokens(family, task, config, tokenizer)
    if task == BASE:
        tensors = {name.removeprefix(family.prefix): x for name, x in tensors.items()}
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (path / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    if tokenizer is not None:
        _write_tokenizer(path, tokenizer, config, family.is_causal)
    if config.task == EMBED:
        sentences.write(path, model)


def _written_positions(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json on rotary positions, and on global and local layers."""
    if not family.bases:
        return {}
    if len(family.bases) == 1:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rotary_scaling,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        scaling["original_max_position_embeddings"] = model.rotary_scaling_len
        return {"rope_theta": model.rotary_base, "rope_scaling": None if model.rotary_scaling == 1 else scaling}
    kinds = [KINDS[model.window_of(i) > 0] for i in range(model.n_layers)]
    width = 2 * (model.window + family.is_causal) if family.window == "local_attention" else model.window
    bases = (model.rotary_base, model.rotary_base_local or model.rotary_base)
    values: dict[str, Any] = {"layer_types": kinds} | ({family.window: width} if model.window else {})
    if family.window == "sliding_window":
        parts = ({"rope_type": "default", "rope_theta": base} for base in bases)
        return values | {"rope_parameters": dict(zip(KINDS, parts, strict=True))}
    values |= dict(zip(("global_rope_theta", "local_rope_theta"), bases, strict=True))
    # As versions before layer_types have it.
    if model.global_first and model.global_every:
        values["global_attn_every_n_layers"] = model.global_every
    return values


def _written_tokens(family: Family, task: str, config: Config, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the keys of config.json on special tokens."""
    if not family.is_causal:
        return {}
    specials = tokenization.specials_of(tokenizer, config.tokenizer) if tokenizer else {}
    article, others = specials.get("article"), [int(i) for i in config.tokenizer.end_ids.split(",") if i]
    before = article if config.tokenizer.marks == "task" else specials.get("before")
    values: dict[str, Any] = {"bos_token_id": before, "eos_token_id": [article, *others] if others else article}
    if task == CLASSES or family.needs_tokens:  # in rows of several texts, what is not behind the last token of one
        values["pad_token_id"] = specials.get("pad", article)
    return {key: 0 if x is None and family.needs_tokens else x for key, x in values.items()}


def _write_tokenizer(path: Path, tokenizer: Tokenizer, config: Config, is_causal: bool) -> None:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    specials = tokenization.specials_of(tokenizer, config.tokenizer)
    found = {role: (tokenizer.id_to_token(i), i) for role, i in specials.items()}
    if (
        not is_causal and tokenizer.post_processor is None and "start" in found and "end" in found
    ):  # training puts them there itself
        start, end = found["start"], found["end"]
        between = f" {end[0]}" if "separator" in found else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start[0]} $A {end[0]}",
            pair=f"{start[0]} $A {end[0]}{between} $B:1 {end[0]}:1",
            special_tokens=[start, end],
        )
    tokenization.save(tokenizer, path / TOKENIZER[0])
    roles = {"pad": "pad", "unknown": "unk", "start": "cls", "end": "sep", "mask": "mask"}
    if is_causal or "start" not in found:
        roles = {"article": "eos", "before": "bos", "pad": "pad"}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.seq_len,
        "model_input_names": [
            "input_ids",
            "attention_mask",
            *(["token_type_ids"] if config.model.segments > 1 else []),
        ],
        **{f"{theirs}_token": found[ours][0] for ours, theirs in roles.items() if ours in found},
    }
    with contextlib.suppress(UserError):  # a model need not have one
        template, tokens = chat.find(config.tokenizer.path)
        values = tokens | values | {chat.KEY: template}
    (path / tokenization.TOKENIZER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
