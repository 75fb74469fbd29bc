"""Models of transformers: a folder with config.json, model.safetensors and a tokenizer. PUBLIC_WEIGHTS.md has examples.

BERT, DistilBERT, RoBERTa and GPT-2 are read and written. transformers itself is not needed, and nothing is unpickled.
Segments (token types) are not kept apart: the row of the first is added to the table of positions.
"""

import dataclasses
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
from jaxlm.weights.formats import StoredFile

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLE = "pytorch_model.bin"
TOKENIZER = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
POSITION = "base.embedding.position"
CLASSES = "sst2"  # the task of a model that classifies, whatever its classes are
# Keys of config.json, and their only value that is read; where a key is not there, it has this value.
FIXED = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "directionality": "bidi",
    "quantization_config": None,
}
# Keys that change no output: those of training, of layers and models that are not read, of generation, which has
# settings of its own here, and what is only for people. Any other key is refused.
UNUSED_KEYS = frozenset(
    "architectures model_type transformers_version _name_or_path name_or_path _commit_hash language license tags "
    "finetuning_task task_specific_params id2label label2id num_labels _num_labels problem_type tokenizer_class "
    "dtype torch_dtype torchscript use_bfloat16 use_cache output_past return_dict use_return_dict output_attentions "
    "output_hidden_states gradient_checkpointing chunk_size_feed_forward reorder_and_upcast_attn _attn_implementation "
    "attn_implementation _attn_implementation_autoset _attn_implementation_internal transformers.js_config "
    "initializer_range initializer_factor classifier_dropout qa_dropout seq_classif_dropout type_vocab_size "
    "pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type tie_weights_ "
    "summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout n_ctx "
    "pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id cross_attention_hidden_size prefix "
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
    "tf_legacy_loss".split()
)
GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Neither weights of the model nor missed: constants, the sentence pairs of BERT's training, a layer that only it uses.
UNUSED = r"(position_ids|token_type_ids|\.attn\.bias|\.attn\.masked_bias)$|^cls\.seq_relationship\."


@dataclasses.dataclass(frozen=True)
class Family:
    """What models of one kind are called, and what they have. A # is the number of a block."""

    type: str  # model_type in config.json
    keys: dict[str, str]  # of config.json, by what they say
    dropouts: tuple[str, ...]  # keys of rates of dropout
    settings: dict[str, Any]  # ours, the same for all of them
    modules: dict[str, str]  # their names by ours
    heads: dict[str, tuple[str, dict[str, str]]]  # by task: their class, and modules of the head; the last that fits
    copies: dict[str, str]  # tensors that may be in the file a second time
    activation: str = "gelu"  # where config.json does not tell
    epsilon: float = 1e-12  # likewise
    segments: str = ""  # table of token types
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)  # further keys, as FIXED
    transposed: str = "^$"  # weights that are [in, out]

    def prefix(self) -> str:
        """Return what the names of the base model begin with, where there is an output layer."""
        return self.modules["base.embedding.token"].partition(".")[0] + "."

    def first_position(self, pad_id: int) -> int:
        """Return the row of the first token in the table of positions."""
        return pad_id + 1 if self.type == "roberta" else 0


def _bert(prefix: str) -> dict[str, str]:
    """Return the modules of BERT's base model."""
    layer = f"{prefix}.encoder.layer.#"
    return {
        "base.embedding.token": f"{prefix}.embeddings.word_embeddings",
        "base.embedding.position": f"{prefix}.embeddings.position_embeddings",
        "base.embedding.layernorm": f"{prefix}.embeddings.LayerNorm",
        **{f"base.blocks.#.attention.{x}": f"{layer}.attention.self.{x}" for x in ("query", "key", "value")},
        "base.blocks.#.attention.output": f"{layer}.attention.output.dense",
        "base.blocks.#.layernorm1": f"{layer}.attention.output.LayerNorm",
        "base.blocks.#.feed_forward.fc1": f"{layer}.intermediate.dense",
        "base.blocks.#.feed_forward.fc2": f"{layer}.output.dense",
        "base.blocks.#.layernorm2": f"{layer}.output.LayerNorm",
    }


_BERT_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "width": "intermediate_size",
    "gelu": "hidden_act",
    "norm_epsilon": "layer_norm_eps",
    "pad_id": "pad_token_id",
}
_BERT_SETTINGS = {
    "model.positions": "learned",
    "model.final_norm": False,
    "model.post_norm": True,
    "model.embedding_norm": True,
    "model.head_dense": "bert",
    "model.tied_embedding": True,
    "model.output_bias": True,
}

BERT = Family(
    type="bert",
    keys=_BERT_KEYS,
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    settings=_BERT_SETTINGS,
    modules=_bert("bert"),
    heads={
        "mlm": (
            "BertForMaskedLM",
            {
                "head": "cls.predictions",
                "head.dense": "cls.predictions.transform.dense",
                "head.layernorm": "cls.predictions.transform.LayerNorm",
            },
        ),
        "sst2": ("BertForSequenceClassification", {"head.dense": "bert.pooler.dense", "head.linear": "classifier"}),
        BASE: ("BertModel", {}),
    },
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    segments="bert.embeddings.token_type_embeddings.weight",
)
DISTILBERT = Family(
    type="distilbert",
    keys={
        "d_model": "dim",
        "n_layers": "n_layers",
        "n_heads": "n_heads",
        "vocab_size": "vocab_size",
        "seq_len": "max_position_embeddings",
        "width": "hidden_dim",
        "gelu": "activation",
        "pad_id": "pad_token_id",
    },
    dropouts=("dropout", "attention_dropout"),
    settings=_BERT_SETTINGS | {"model.head_dense": "distilbert", "model.norm_epsilon": 1e-12},
    modules={
        "base.embedding.token": "distilbert.embeddings.word_embeddings",
        "base.embedding.position": "distilbert.embeddings.position_embeddings",
        "base.embedding.layernorm": "distilbert.embeddings.LayerNorm",
        "base.blocks.#.attention.query": "distilbert.transformer.layer.#.attention.q_lin",
        "base.blocks.#.attention.key": "distilbert.transformer.layer.#.attention.k_lin",
        "base.blocks.#.attention.value": "distilbert.transformer.layer.#.attention.v_lin",
        "base.blocks.#.attention.output": "distilbert.transformer.layer.#.attention.out_lin",
        "base.blocks.#.layernorm1": "distilbert.transformer.layer.#.sa_layer_norm",
        "base.blocks.#.feed_forward.fc1": "distilbert.transformer.layer.#.ffn.lin1",
        "base.blocks.#.feed_forward.fc2": "distilbert.transformer.layer.#.ffn.lin2",
        "base.blocks.#.layernorm2": "distilbert.transformer.layer.#.output_layer_norm",
    },
    heads={
        "mlm": (
            "DistilBertForMaskedLM",
            {"head": "vocab_projector", "head.dense": "vocab_transform", "head.layernorm": "vocab_layer_norm"},
        ),
        "sst2": ("DistilBertForSequenceClassification", {"head.dense": "pre_classifier", "head.linear": "classifier"}),
        BASE: ("DistilBertModel", {}),
    },
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    fixed={"sinusoidal_pos_embds": False},
)
ROBERTA = Family(
    type="roberta",
    keys=_BERT_KEYS,
    dropouts=BERT.dropouts,
    settings=_BERT_SETTINGS | {"model.gelu": "exact"},  # of its head, whatever the blocks have
    modules=_bert("roberta"),
    heads={
        "mlm": (
            "RobertaForMaskedLM",
            {"head": "lm_head", "head.dense": "lm_head.dense", "head.layernorm": "lm_head.layer_norm"},
        ),
        "sst2": (
            "RobertaForSequenceClassification",
            {"head.dense": "classifier.dense", "head.linear": "classifier.out_proj"},
        ),
        BASE: ("RobertaModel", {}),
    },
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    segments="roberta.embeddings.token_type_embeddings.weight",
)
GPT2 = Family(
    type="gpt2",
    keys={
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "vocab_size": "vocab_size",
        "seq_len": "n_positions",
        "width": "n_inner",
        "gelu": "activation_function",
        "norm_epsilon": "layer_norm_epsilon",
    },
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    settings={
        "model.positions": "learned",
        "model.final_norm": True,
        "model.post_norm": False,
        "model.embedding_norm": False,
        "model.pad_id": -1,
        "model.tied_embedding": True,
        "model.output_bias": False,
    },
    modules={
        "base.embedding.token": "transformer.wte",
        "base.embedding.position": "transformer.wpe",
        # One behind the other, in the order that is ours, too.
        **{f"base.blocks.#.attention.{x}": "transformer.h.#.attn.c_attn" for x in ("query", "key", "value")},
        "base.blocks.#.attention.output": "transformer.h.#.attn.c_proj",
        "base.blocks.#.layernorm1": "transformer.h.#.ln_1",
        "base.blocks.#.feed_forward.fc1": "transformer.h.#.mlp.c_fc",
        "base.blocks.#.feed_forward.fc2": "transformer.h.#.mlp.c_proj",
        "base.blocks.#.layernorm2": "transformer.h.#.ln_2",
        "base.final_norm": "transformer.ln_f",
    },
    heads={"gpt": ("GPT2LMHeadModel", {})},
    copies={"lm_head.weight": "transformer.wte.weight"},
    activation="gelu_new",
    epsilon=1e-5,
    fixed={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    transposed=r"\.(c_attn|c_proj|c_fc)\.weight$",
)
FAMILIES = {family.type: family for family in (BERT, DISTILBERT, ROBERTA, GPT2)}


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
    family = FAMILIES.get(str(values.get("model_type")))
    if family is None:
        raise UserError(
            f"{path / CONFIG}: model_type={values.get('model_type')}: can be read from {', '.join(FAMILIES)} only"
        )
    settings = _settings(family, values, path / CONFIG)
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path}: there is no {WEIGHTS}; {_other_weights(path, values)}")
    stored = formats.load_safetensors(path / WEIGHTS)
    tensors = _tensors(family, stored.weights, path / WEIGHTS)
    task = next(task for task in family.heads if _has_head(family, task, tensors))
    if task == BASE:  # what is not of it are output layers that are of no use here
        tensors = {name: x for name, x in tensors.items() if name.startswith(family.prefix())}
    settings["task"] = task
    class_names: tuple[str, ...] = ()
    if task == CLASSES:
        settings["data.n_labels"] = _n_labels(family, values, tensors, path / CONFIG)
        class_names = _class_names(values, settings["data.n_labels"], path / CONFIG)
    fingerprint = None
    if any((path / name).is_file() for name in TOKENIZER):
        settings |= {"tokenizer.path": str(path), "tokenizer.lowercase": _ignores_case(path)}
        config = TokenizerConfig(path=str(path), lowercase=settings["tokenizer.lowercase"])
        tokenizer = tokenization.read(config)
        _check_ends(family, tokenizer, path)
        fingerprint = tokenization.fingerprint(tokenizer)
    weights = _weights(family, configs.build(settings), tensors, values.get("type_vocab_size", 2), path / WEIGHTS)
    info = {"step": 0, "task": task, "rate": 0.0, "tokenizer": fingerprint, "val_loss": None, "config": settings}
    info["classes"] = class_names
    return StoredFile(f"{formats.TRANSFORMERS}{family.type}", path, stored.tree, weights, info)


def _other_weights(path: Path, values: Mapping[str, Any]) -> str:
    """Return what a folder has in place of WEIGHTS, and what to do."""
    if not any((path / f"{name}{index}").is_file() for name in (WEIGHTS, PICKLE) for index in ("", ".index.json")):
        return "copy or download it, too"
    names_of_classes = values.get("architectures")
    kind = names_of_classes[0] if isinstance(names_of_classes, list) and names_of_classes else "AutoModel"
    mend = f'transformers.{kind}.from_pretrained("{path}").save_pretrained("NEW", max_shard_size="100GB")'
    if (path / f"{WEIGHTS}.index.json").is_file():
        return f"its weights are in several files, which are not read: {mend} makes one; copy its tokenizer there"
    return f"{PICKLE} is a pickle that could run code: where you trust it, {mend} makes one; copy its tokenizer there"


def _settings(family: Family, values: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the settings that config.json tells."""
    for key, value in (FIXED | family.fixed).items():
        if values.get(key, value) != value:
            raise UserError(f"{source}: {key}={json.dumps(values[key])}: can be read with {json.dumps(value)} only")
    read = {*family.keys.values(), *family.dropouts, *FIXED, *family.fixed}
    for key in sorted(values.keys() - UNUSED_KEYS - read):
        raise UserError(
            f"{source}: {key}={json.dumps(values[key])[:80]}: is not known here for model_type={family.type}; remove "
            "it if it does not change what the model computes"
        )
    sizes = {}
    for name in ("d_model", "n_layers", "n_heads", "vocab_size", "seq_len"):
        key = family.keys[name]
        if type(values.get(key)) is not int or values[key] < 1:
            raise UserError(f"{source}: {key}={json.dumps(values.get(key))}: has to be a whole number above 0")
        sizes[f"model.{name}"] = values[key]
    width, n_heads, key = 4 * sizes["model.d_model"], sizes["model.n_heads"], family.keys["width"]
    if values.get(key) not in (width, None if family is GPT2 else width):
        raise UserError(f"{source}: {key}={json.dumps(values.get(key))}: can be read with 4 x the width, {width}, only")
    if sizes["model.d_model"] % n_heads:
        raise UserError(f"{source}: {family.keys['n_heads']}={n_heads} does not divide {sizes['model.d_model']}")
    activation = values.get(family.keys["gelu"], family.activation)
    found = {**family.settings, **sizes, "model.gelu": GELU.get(str(activation))}
    if found["model.gelu"] != family.settings.get("model.gelu", found["model.gelu"]) or not found["model.gelu"]:
        known = [name for name, kind in GELU.items() if kind == family.settings.get("model.gelu", kind)]
        raise UserError(f"{source}: {family.keys['gelu']}={activation}: can be read with {', '.join(known)} only")
    found |= {"model.dropout": values.get(family.dropouts[0], 0.1)}
    if "norm_epsilon" in family.keys:
        found["model.norm_epsilon"] = values.get(family.keys["norm_epsilon"], family.epsilon)
    if "pad_id" in family.keys:
        pad_id = values.get(family.keys["pad_id"], 1 if family is ROBERTA else 0)
        found["model.pad_id"] = -1 if pad_id is None else pad_id
        if not isinstance(found["model.pad_id"], int) or found["model.pad_id"] >= sizes["model.vocab_size"]:
            raise UserError(f"{source}: pad_token_id={pad_id}: has to be a token of the vocabulary")
    found["model.seq_len"] -= family.first_position(found["model.pad_id"])
    # Types and ranges are looked at where all settings of checkpoints are.
    return found


def _tensors(family: Family, stored: Mapping[str, np.ndarray], source: Path) -> Arrays:
    """Return the tensors of a file under the names that transformers gives them today, and none twice."""
    prefix = family.prefix()
    is_bare = not any(name.startswith(prefix) for name in stored)  # as openai-community/gpt2 is
    heads = tuple(x for _, modules in family.heads.values() for x in modules.values() if not x.startswith(prefix))
    tensors: Arrays = {}
    for name, array in stored.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))  # as bert-base-uncased has it
        if is_bare and not name.startswith(heads or ("lm_head.",)):
            name = prefix + name
        # No number that these types have is changed.
        tensors[name] = names.exact(array)
    for copy, name in family.copies.items():
        if copy in tensors and not np.array_equal(array := tensors.pop(copy), tensors.setdefault(name, array)):
            raise UserError(f"{source}: {copy} is another than {name}, but can be read as the same only")
    if not _has_head(family, CLASSES, tensors):
        tensors = {name: x for name, x in tensors.items() if ".pooler.dense." not in name}
    return {name: x for name, x in tensors.items() if not re.search(UNUSED, name)}


def _has_head(family: Family, task: str, tensors: Mapping[str, np.ndarray]) -> bool:
    if task not in family.heads:
        return False
    kinds = {"head": "bias"}
    modules = family.heads[task][1]
    return all(f"{theirs}.{kinds.get(ours, 'weight')}" in tensors for ours, theirs in modules.items())


def _n_labels(family: Family, values: Mapping[str, Any], tensors: Arrays, source: Path) -> int:
    kind = values.get("problem_type")
    n_labels = len(tensors[f"{family.heads[CLASSES][1]['head.linear']}.weight"])
    if kind not in (None, "single_label_classification") or n_labels < 2:
        raise UserError(f"{source}: problem_type={json.dumps(kind)} with {n_labels} outputs: only classes can be read")
    return n_labels


def _class_names(values: Mapping[str, Any], n: int, source: Path) -> tuple[str, ...]:
    """Return the names of the classes by number; () where they have none but those that transformers makes up."""
    stored = values.get("id2label") or {}
    is_object = isinstance(stored, dict) and {str(i) for i in stored} == {str(i) for i in range(n)}
    names = tuple(str(stored[str(i)]).strip() for i in range(n)) if is_object else ()
    if stored and (len({*names}) < n or not all(names)):
        raise UserError(f"{source}: id2label={json.dumps(stored)}: has to have {n} different names, by 0 to {n - 1}")
    return () if names == tuple(f"LABEL_{i}" for i in range(n)) else names


def _check_ends(family: Family, tokenizer: Tokenizer, path: Path) -> None:
    """Raise UserError if a tokenizer.json puts other tokens around a text than are put there here."""
    if tokenizer.post_processor is None:
        return
    specials = tokenization.special_ids(tokenizer)
    ends = [[specials[role]] if role in specials and family is not GPT2 else [] for role in ("start", "end")]
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
    places, wanted = _places(family, config), _shapes(family, config)
    skipped, position = family.first_position(config.model.pad_id), f"{family.modules[POSITION]}.weight"
    wanted[position] = (config.model.seq_len + skipped, config.model.d_model)
    if family.segments:
        wanted[family.segments] = (n_segments, config.model.d_model)
    names.check_shapes({name: x.shape for name, x in tensors.items()}, wanted, str(source))
    tensors = tensors | {position: tensors[position][skipped:]}
    if family.segments and tensors[family.segments][0].any():
        tensors[position] = tensors[position] + tensors[family.segments][0]
    weights: Arrays = {}
    for theirs, ours in places.items():
        array = tensors[theirs].T if re.search(family.transposed, theirs) else tensors[theirs]
        weights |= dict(zip(ours, np.split(array, len(ours)), strict=True))
    weights = {name: np.ascontiguousarray(x) for name, x in weights.items()}
    if family is GPT2:
        weights["head.bias"] = np.zeros(config.model.vocab_size, np.float32)
    return weights


def _places(family: Family, config: Config) -> dict[str, list[str]]:
    """Return the name of each tensor there, and of those here that are in it, one behind the other."""
    modules = family.modules | family.heads[_task(config)][1]
    places: dict[str, list[str]] = {}
    for ours in parameters.shapes(config):
        module, _, kind = (f"{ours}.weight" if ours == POSITION else ours).rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        module = re.sub(r"(?<=\.)\d+(?=\.)", "#", module)
        if module in modules:  # else it is the bias that GPT-2 has not
            theirs = modules[module].replace("#", number[0] if number else "")
            places.setdefault(f"{theirs}.{kind}", []).append(ours)
    return places


def _shapes(family: Family, config: Config) -> Shapes:
    """Return the shape of each tensor there; of the positions, those that are here."""
    shapes, result = parameters.shapes(config), {}
    for theirs, ours in _places(family, config).items():
        shape = (sum(shapes[name][0] for name in ours), *shapes[ours[0]][1:])
        result[theirs] = shape[::-1] if re.search(family.transposed, theirs) else shape
    return result


def _task(config: Config) -> str:
    """Return the task that a family has the head by."""
    return {"causal": "gpt", "masked": "mlm", BASE: BASE}.get(parameters.model_kind(config.task), CLASSES)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = utf8.from_json(utf8.read(path))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else reason(error)
        raise UserError(f"{path}: cannot be read ({why}); copy or download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is no object of JSON; copy or download it again")
    return values


# Writing


def check(config: Config, family: Family) -> None:
    """Raise UserError, which names the settings, unless a family has models with these."""
    task = _task(config)
    if task not in family.heads:
        tasks = [name for name in family.heads if name != BASE]
        raise UserError(
            f"--as {family.type}: task={config.task}, but a model of {family.type} has {' and '.join(tasks)} only"
        )
    wanted = family.settings | {"model.lora_rank": 0}
    if task == CLASSES:
        wanted |= {"model.head_outputs": "labels", "model.pooling": "first"}
        for name in ("model.tied_embedding", "model.output_bias"):  # which make no difference to it
            del wanted[name]
    problems = [
        f"{name}={configs.get(config, name)}, but a model of {family.type} has {value}"
        for name, value in wanted.items()
        if configs.get(config, name) != value
    ]
    if family is ROBERTA and config.model.pad_id < 0:
        problems.append(f"model.pad_id={config.model.pad_id}, but positions of {family.type} begin behind its pad_id")
    if problems:
        raise UserError(f"--as {family.type}: {'; '.join(problems)}; only models with such settings can be written so")


def write(path: Path, snapshot: Snapshot, family: Family, tokenizer: Tokenizer | None) -> None:
    """Make a folder that transformers loads. Raises UserError as `check` does."""
    config, model = snapshot.config, snapshot.config.model
    check(config, family)
    skipped, position = family.first_position(model.pad_id), f"{family.modules[POSITION]}.weight"
    tensors: Arrays = {}
    for theirs, ours in _places(family, config).items():
        array = np.concatenate([snapshot.weights[name] for name in ours])
        tensors[theirs] = np.ascontiguousarray(array.T) if re.search(family.transposed, theirs) else array
    tensors[position] = np.pad(tensors[position], ((skipped, 0), (0, 0)))
    sizes = {name: getattr(model, name) for name in family.keys if hasattr(model, name)}
    sizes |= {"seq_len": model.seq_len + skipped, "width": 4 * model.d_model}
    sizes["gelu"] = next(name for name, kind in GELU.items() if kind == model.gelu)
    values: dict[str, Any] = {
        "architectures": [family.heads[_task(config)][0]],
        "model_type": family.type,
        "dtype": "float32",
        **{key: sizes[name] for name, key in family.keys.items()},
        **dict.fromkeys(family.dropouts, model.dropout),
        "tie_word_embeddings": True,
    }
    if family.segments:
        values["type_vocab_size"] = 2
        tensors[family.segments] = np.zeros((2, model.d_model), np.float32)
    if "pad_id" in family.keys and model.pad_id < 0:
        values[family.keys["pad_id"]] = None
    if _task(config) == CLASSES:
        names_of = snapshot.info.get("classes") or ()
        n = config.data.n_classes
        if tuple(names_of) in ((), numbered(n)):
            names_of = [f"LABEL_{i}" for i in range(n)]
        labels = {str(i): name for i, name in enumerate(names_of)}
        values |= {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}}
    if family is GPT2:
        article = tokenization.special_ids(tokenizer).get("article") if tokenizer else None
        values |= {"bos_token_id": article, "eos_token_id": article}

    if _task(config) == BASE:
        tensors = {name.removeprefix(family.prefix()): x for name, x in tensors.items()}

    from safetensors.numpy import save

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
