"""Models of transformers: a folder with config.json, model.safetensors and a tokenizer. PUBLIC_WEIGHTS.md has examples.

families.py says which are read and written. transformers itself is not needed, and nothing is unpickled. Segments
(token types) are not kept apart: the row of the first is added to the table of positions.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from jaxlm import config as configs
from jaxlm.config import BASE, Config, TokenizerConfig
from jaxlm.data import tokenization
from jaxlm.data.labels import numbered
from jaxlm.errors import UserError, reason
from jaxlm.io import storage, utf8
from jaxlm.params import names
from jaxlm.params.names import Arrays, Shapes
from jaxlm.params.snapshot import Snapshot
from jaxlm.tasks import parameters
from jaxlm.weights import formats
from jaxlm.weights.families import CLASS_NAMES, CLASSES, FAMILIES, FIXED, GELU, TAGS, UNUSED, UNUSED_KEYS, Family
from jaxlm.weights.formats import StoredFile

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLE = "pytorch_model.bin"
TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
POSITION = "embedding.position"


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
    wanted = [CONFIG, WEIGHTS, *tokenization.BESIDE, *TOKENIZER]
    try:
        # What has been downloaded before needs no hub.
        found = huggingface_hub.snapshot_download(
            str(source), allow_patterns=wanted, etag_timeout=3, local_files_only=bool(failure)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        why = failure or reason(error)
        raise UserError(
            f"{source}: there is no such run or checkpoint, and no model on the hub that can be reached ({why})"
        ) from error
    return Path(found)


def is_model(path: Path) -> bool:
    """Return whether a folder is that of a model of transformers, whole or not."""
    return any((path / name).is_file() for name in (CONFIG, WEIGHTS, f"{WEIGHTS}.index.json", PICKLE))


def load(path: Path) -> StoredFile:
    """Return the model in a folder. Raises UserError for what is not there, does not fit, or is not had here."""
    values = _read_json(path / CONFIG)
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{path / CONFIG}: model_type={kind}: can be read from {', '.join(FAMILIES)} only")
    family = FAMILIES[kind]
    settings = _settings(family, values, path / CONFIG)
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path}: there is no {WEIGHTS}; {_other_weights(path, values)}")
    stored = formats.load_safetensors(path / WEIGHTS)
    tensors = _tensors(family, stored.weights, path / WEIGHTS)
    # One that tags may still have the pooler of its base, as older files do.
    is_tagger = CLASS_NAMES[TAGS] in str(values.get("architectures"))
    task = next(x for x in family.heads if _has_head(family, x, tensors) and not (is_tagger and x == CLASSES))
    if task != CLASSES:
        tensors = {name: x for name, x in tensors.items() if ".pooler.dense." not in name}
    if task == BASE:  # what is not of it are output layers that are of no use here
        tensors = {name: x for name, x in tensors.items() if name.startswith(family.prefix)}
    settings["task"] = task
    class_names = _class_names(family.heads[task], values, tensors, path / CONFIG) if task in (CLASSES, TAGS) else []
    if class_names:
        settings["data.n_labels"] = len(class_names)
    fingerprint = None
    if any((path / name).is_file() for name in TOKENIZER):
        settings |= {"tokenizer.path": str(path), "tokenizer.lowercase": _ignores_case(path)}
        config = TokenizerConfig(path=str(path), lowercase=settings["tokenizer.lowercase"])
        tokenizer = tokenization.read(config)
        _check_ends(family, tokenizer, path)
        fingerprint = tokenization.fingerprint(tokenizer)
    weights = _weights(family, configs.build(settings), tensors, values.get("type_vocab_size", 2), path / WEIGHTS)
    info = {"step": 0, "task": task, "rate": 0.0, "tokenizer": fingerprint, "val_loss": None, "config": settings}
    info["classes"] = () if class_names == _unnamed(len(class_names)) else tuple(class_names)
    return StoredFile(f"{formats.TRANSFORMERS}{family.type}", path, stored.tree, weights, info)


def _other_weights(path: Path, values: Mapping[str, Any]) -> str:
    """Return what a folder has in place of WEIGHTS, and what to do."""
    if not any((path / f"{name}{index}").is_file() for name in (WEIGHTS, PICKLE) for index in ("", ".index.json")):
        return "copy or download it, too"
    class_names = values.get("architectures")
    kind = class_names[0] if isinstance(class_names, list) and class_names else "AutoModel"
    mend = f'transformers.{kind}.from_pretrained("{path}").save_pretrained("NEW", max_shard_size="100GB")'
    if (path / f"{WEIGHTS}.index.json").is_file():
        return f"its weights are in several files, which are not read: {mend} makes one; copy its tokenizer there"
    return f"{PICKLE} is a pickle that could run code: where you trust it, {mend} makes one; copy its tokenizer there"


def _settings(family: Family, values: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the settings that config.json tells; their types and ranges are checked with those of all checkpoints."""

    def check(key: str, is_right: bool, rule: str) -> None:
        if not is_right:
            raise UserError(f"{source}: {key}={json.dumps(values.get(key))[:80]}: {rule}")

    keys = family.keys
    for key, value in (FIXED | family.fixed).items():
        check(key, values.get(key, value) == value, f"can be read with {json.dumps(value)} only")
    unknown = f"is not known here for model_type={family.type}; remove it if it does not change what the model computes"
    for key in sorted(values.keys() - UNUSED_KEYS - {*keys.values(), *family.dropouts, *FIXED, *family.fixed}):
        check(key, False, unknown)
    settings = {f"model.{name}": value for name, value in family.settings.items()}
    for name in ("d_model", "n_layers", "n_heads", "vocab_size", "seq_len"):
        value = values.get(keys[name])
        check(keys[name], type(value) is int and value > 0, "has to be a whole number above 0")
        settings[f"model.{name}"] = value
    d_model, n_heads = settings["model.d_model"], settings["model.n_heads"]
    widths = (4 * d_model, None if family.is_causal else 4 * d_model)
    check(keys["width"], values.get(keys["width"]) in widths, f"can be read with 4 x the width, {4 * d_model}, only")
    if d_model % n_heads:
        raise UserError(f"{source}: {keys['n_heads']}={n_heads} does not divide {d_model}")
    activation = str(values.get(keys["gelu"], family.activation))
    known = {name: kind for name, kind in GELU.items() if kind == family.settings.get("gelu", kind)}
    if activation not in known:
        raise UserError(f"{source}: {keys['gelu']}={activation}: can be read with {', '.join(known)} only")
    settings["model.gelu"] = known[activation]
    settings["model.dropout"] = values.get(family.dropouts[0], 0.1)
    if "norm_epsilon" in keys:
        settings["model.norm_epsilon"] = values.get(keys["norm_epsilon"], family.epsilon)
    if "pad_id" in keys:
        value = values.get(keys["pad_id"], family.pad_id)
        pad_id = settings["model.pad_id"] = -1 if value is None else value
        is_token = isinstance(pad_id, int) and pad_id < settings["model.vocab_size"]
        check(keys["pad_id"], is_token, "has to be a token of the vocabulary")
    settings["model.seq_len"] -= family.first_position(settings["model.pad_id"])
    return settings


def _tensors(family: Family, stored: Mapping[str, np.ndarray], source: Path) -> Arrays:
    """Return the tensors of a file under the names that transformers gives them today, and none twice."""
    prefix = family.prefix
    is_bare = not any(name.startswith(prefix) for name in stored)  # as openai-community/gpt2 is
    heads = (family.output, *(x for task in family.heads.values() for x in task.values() if not x.startswith(prefix)))
    tensors: Arrays = {}
    for name, array in stored.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # as bert-base-uncased has it
        if is_bare and not name.startswith(heads):
            name = prefix + name
        tensors[name] = names.exact(array)
    head = family.heads.get("mlm", {}).get("head", family.output)
    for kind, module in (("weight", family.module("embedding.token")), ("bias", head)):
        copy, name = f"{family.output}.{kind}", f"{module}.{kind}"
        if copy in tensors and not np.array_equal(array := tensors.pop(copy), tensors.setdefault(name, array)):
            raise UserError(f"{source}: {copy} is another than {name}, but can be read as the same only")
    return {name: x for name, x in tensors.items() if not re.search(UNUSED, name)}


def _has_head(family: Family, task: str, tensors: Mapping[str, np.ndarray]) -> bool:
    modules = family.heads.get(task)
    return modules is not None and all(
        f"{theirs}.{'bias' if ours == 'head' else 'weight'}" in tensors for ours, theirs in modules.items()
    )


def _class_names(modules: Mapping[str, str], values: Mapping[str, Any], tensors: Arrays, source: Path) -> list[str]:
    """Return the names of the classes by number, those that transformers makes up where they have none."""
    kind, n = values.get("problem_type"), len(tensors[f"{modules['head.linear']}.weight"])
    if kind not in (None, "single_label_classification") or n < 2:
        raise UserError(f"{source}: problem_type={json.dumps(kind)} with {n} outputs: only classes can be read")
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


def _ignores_case(path: Path) -> bool:
    """Return whether a vocab.txt is one of words in lower case; a tokenizer.json says so itself."""
    file = path / tokenization.TOKENIZER_CONFIG
    return not file.is_file() or _read_json(file).get("do_lower_case", True) is not False


def _weights(family: Family, config: Config, tensors: Arrays, n_segments: Any, source: Path) -> Arrays:
    """Return the tensors of a file under our names. Raises UserError unless they are all those of the model."""
    places, position = _places(family, config), f"{family.module(POSITION)}.weight"
    expected = _shapes(family, config, places)
    if family.segments:
        expected[family.segments] = (n_segments, config.model.d_model)
    names.check_shapes({name: x.shape for name, x in tensors.items()}, expected, str(source))
    tensors = tensors | {position: tensors[position][family.first_position(config.model.pad_id) :]}
    if family.segments and tensors[family.segments][0].any():
        tensors[position] = tensors[position] + tensors[family.segments][0]
    weights: Arrays = {}
    for theirs, ours in places.items():
        array = tensors[theirs].T if re.search(family.transposed, theirs) else tensors[theirs]
        weights |= {name: np.ascontiguousarray(x) for name, x in zip(ours, np.split(array, len(ours)), strict=True)}
    if family.is_causal:
        weights["head.bias"] = np.zeros(config.model.vocab_size, np.float32)
    return weights


def _places(family: Family, config: Config) -> dict[str, list[str]]:
    """Return the name of each tensor there, and of those here that are in it, one behind the other."""
    modules = {f"base.{ours}": family.module(ours) for ours in family.modules} | family.heads[_task(config)]
    places: dict[str, list[str]] = {}
    for ours in parameters.shapes(config):
        module, _, kind = (f"{ours}.weight" if ours == f"base.{POSITION}" else ours).rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        theirs = modules.get(module.replace(f".{number[0]}.", ".#.") if number else module)
        if theirs:  # else it is the bias that GPT-2 has not
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
    kinds = {"causal": "gpt", "masked": "mlm", "tagger": TAGS, BASE: BASE}
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
    if task not in family.heads:
        tasks = [name for name in family.heads if name != BASE]
        raise UserError(
            f"--as {family.type}: task={config.task}, but a model of {family.type} has {', '.join(tasks)} only"
        )
    expected = family.settings | {"lora_rank": 0, "norm": "layernorm", "mlp": "gelu", "biases": "all"}
    expected |= {"qk_norm": False, "window": 0, "first_norm": True}
    if task in (CLASSES, TAGS):
        expected |= {"head_outputs": "labels", "pooling": "first"}
        for name in ("tied_embedding", "output_bias", *(["head_dense"] if task == TAGS else [])):
            expected.pop(name, None)  # which make no difference to it
    problems = [
        f"model.{name}={stored}, but a model of {family.type} has {value}"
        for name, value in expected.items()
        if (stored := getattr(config.model, name)) != value
    ]
    if config.model.n_hidden != 4 * config.model.d_model:
        problems.append(f"model.d_ff={config.model.d_ff}, but a model of {family.type} has 4 x model.d_model")
    if config.model.kv_heads != config.model.n_heads:
        problems.append(f"model.n_kv_heads={config.model.n_kv_heads}, but a model of {family.type} has model.n_heads")
    if config.model.head_size * config.model.n_heads != config.model.d_model:
        problems.append(f"model.head_dim={config.model.head_dim}, but a model of {family.type} has d_model / n_heads")
    if config.model.logit_softcap and task not in (CLASSES, TAGS):
        problems.append(f"model.logit_softcap={config.model.logit_softcap}, but a model of {family.type} has none")
    if family.has_positions_behind_pad and config.model.pad_id < 0:
        problems.append(f"model.pad_id={config.model.pad_id}, but positions of {family.type} begin behind its pad_id")
    if problems:
        raise UserError(f"--as {family.type}: {'; '.join(problems)}; only models with such settings can be written so")


def write(path: Path, snapshot: Snapshot, family: Family, tokenizer: Tokenizer | None) -> None:
    """Make a folder that transformers loads. Raises UserError as `check` does."""
    from safetensors.numpy import save

    config, model, task = snapshot.config, snapshot.config.model, _task(snapshot.config)
    check(config, family)
    skipped, position = family.first_position(model.pad_id), f"{family.module(POSITION)}.weight"
    tensors: Arrays = {}
    for theirs, ours in _places(family, config).items():
        array = np.concatenate([snapshot.weights[name] for name in ours])
        tensors[theirs] = np.ascontiguousarray(array.T) if re.search(family.transposed, theirs) else array
    tensors[position] = np.pad(tensors[position], ((skipped, 0), (0, 0)))
    told = {name: getattr(model, name, None) for name in family.keys}
    told |= {"seq_len": model.seq_len + skipped, "width": 4 * model.d_model}
    told["gelu"] = next(name for name, kind in GELU.items() if kind == model.gelu)
    values: dict[str, Any] = {
        "architectures": [f"{family.name}{CLASS_NAMES[task]}"],
        "model_type": family.type,
        "dtype": "float32",
        **{key: told[name] for name, key in family.keys.items()},
        **dict.fromkeys(family.dropouts, model.dropout),
        "tie_word_embeddings": True,
    }
    if family.segments:
        values["type_vocab_size"] = 2
        tensors[family.segments] = np.zeros((2, model.d_model), np.float32)
    if "pad_id" in family.keys and model.pad_id < 0:
        values[family.keys["pad_id"]] = None
    if task in (CLASSES, TAGS):
        n, class_names = config.data.n_classes, snapshot.info.get("classes") or ()
        if tuple(class_names) in ((), numbered(n)):
            class_names = _unnamed(n)
        values["id2label"] = {str(i): name for i, name in enumerate(class_names)}
        values["label2id"] = {name: i for i, name in enumerate(class_names)}
    if family.is_causal:
        article = tokenization.special_ids(tokenizer).get("article") if tokenizer else None
        values |= {"bos_token_id": article, "eos_token_id": article}
    if task == BASE:
        tensors = {name.removeprefix(family.prefix): x for name, x in tensors.items()}
    path.mkdir()
    (path / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (path / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    if tokenizer is not None:
        _write_tokenizer(path, tokenizer, model.seq_len)


def _write_tokenizer(path: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    found = {role: (tokenizer.id_to_token(i), i) for role, i in tokenization.special_ids(tokenizer).items()}
    if tokenizer.post_processor is None and "start" in found and "end" in found:  # training puts them there itself
        start, end = found["start"], found["end"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start[0]} $A {end[0]}",
            pair=f"{start[0]} $A {end[0]} $B {end[0]}",
            special_tokens=[start, end],
        )
    tokenization.save(tokenizer, path / TOKENIZER[0])
    roles = {"pad": "pad", "unknown": "unk", "start": "cls", "end": "sep", "mask": "mask"}
    if "start" not in found:
        roles = {"article": "eos"}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        **{f"{theirs}_token": found[ours][0] for ours, theirs in roles.items() if ours in found},
    }
    (path / tokenization.TOKENIZER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
