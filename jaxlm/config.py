"""Every setting of a run: defaults, ranges, units, and where a value came from. Imports neither jax nor torch.

A run's settings are layers; a later layer wins: the defaults below, then the preset of the task
(`configs/<task>.toml`), then `--arch NAME` (`configs/architectures/NAME.toml`), then `--config` files and
`--section.key value` in the order of the command line.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import operator
import os
import re
import shutil
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import tomli_w
from msgspec import Meta

from jaxlm import terminal
from jaxlm.errors import UserError, nearest
from jaxlm.io import storage, utf8

MOST = 2**31 - 1  # what the integers of the libraries below hold
Count = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Rate = Annotated[float, Meta(ge=0, le=1000)]
Axis = Annotated[int, Meta(ge=-1, le=MOST)]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    dir: str = ""  # folder of this run; must be new, unless --resume; "": runs/<task>-<date>-<n>
    checkpoint_dir: str = ""  # folder of checkpoints, also gs://BUCKET/FOLDER (extra: gcs); "": in the run folder
    keep_checkpoints: Positive = 1  # how many of the latest checkpoints to keep, besides the best one


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str = ""  # file with all data or the training split, or folder with one file per split; "": the embedded text
    validation_path: str = ""  # file of the validation split; "": split off from the source
    test_path: str = ""  # file of the test split; "": split off from the source
    hub: str = ""  # data set on the Hugging Face hub, such as wikitext or nyu-mll/glue
    hub_config: str = ""  # configuration of that data set, such as wikitext-2-raw-v1 or sst2
    # Several sources at once, NAME=PATH:WEIGHT, each by a flag of its own; more in [[data.sources]] of a file.
    sources: tuple[dict[str, Any], ...] = ()
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0  # source weights are raised to the power 1 / temperature
    weights_after: Count = 0  # update after which sources use their weight_after; 0: never
    format: Literal["auto", "text", "wikitext", "csv", "tsv", "jsonl", "parquet"] = "auto"  # auto: by name and content
    # What separates documents in plain text. file: nothing, each file is one document; auto: detected from the files.
    documents: Literal["auto", "file", "blank_line", "line", "wikitext", "column"] = "auto"
    unique: bool = False  # drop exact duplicates within a split; texts are compared by a hash
    stride: Count = 0  # gpt, mlm: tokens from one training window of a document to the next; 0: no overlap
    header: Literal["auto", "yes", "no"] = "auto"  # whether the first row of CSV and TSV files names the columns
    text_column: str = ""  # name, or number from 0, of the column with the text; "": detected by its name
    pair_column: str = ""  # name, or number from 0, of the column with a second text; auto: detected; "": none
    label_column: str = ""  # name, or number from 0, of the column with the label; "": detected by its name
    prompt_column: str = ""  # name, or number from 0, of the column with the prompt; "": detected
    answer_column: str = ""  # name, or number from 0, of the column with the answer; "": detected
    n_labels: Count = 0  # number of classes; 0: as many as the training split has
    validation_fraction: Share = 0.1  # share of articles for validation, if the source has no such split
    test_fraction: Share = 0.1  # share of articles for the test, if the source has no such split
    folds: Count = 0  # k-fold: parts of all but the test articles; one is for validation; 0: validation_fraction
    fold: Count = 0  # which one, from 0
    split_seed: Count = 0  # seed that assigns articles to splits, and chooses samples for validation_tokens
    validation_tokens: Count = 100_000  # gpt, mlm, pairs: tokens scored at each evaluation in training; 0: all
    final_tokens: Count = 0  # tokens of validation and test scored at the end; 0: all
    mask_fraction: Annotated[float, Meta(gt=0, lt=1)] = 0.15  # share of positions that mlm masks
    pack: Literal["none", "documents", "stream"] = "none"  # documents: several per row; stream: cut anywhere (gpt)
    n_maskings: Count = 0  # number of distinct maskings, one per epoch in turn; 0: a new one each epoch
    cache_dir: str = ""  # folder of token caches and trained tokenizers; "": the user's cache folder

    @property
    def n_classes(self) -> int:
        """How many classes a classifier has; two in settings that have seen no data."""
        return self.n_labels or 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    path: str = ""  # tokenizer.json, vocab.txt, folder with vocab.json and merges.txt, or hub name; "": train one
    # Kind of a new one. wordpiece and bpe (byte-level) are trained; bytes has 256 tokens, characters those of the text.
    kind: Literal["wordpiece", "bpe", "bytes", "characters"] = "wordpiece"
    vocab_size: Annotated[int, Meta(ge=300, le=MOST)] = 4096  # largest size of a trained vocabulary
    lowercase: bool = True  # whether a trained WordPiece ignores case and accents
    # Special tokens around a text. task: those of the task; file: those that tokenizer.json adds, if any.
    marks: Literal["task", "file"] = "task"
    end_ids: str = ""  # ids of further tokens that end a continuation, besides the end of text, as in 7,9


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    d_model: Positive = 128  # width of the residual stream
    n_layers: Positive = 2  # blocks
    n_heads: Positive = 4  # attention heads; must divide d_model, unless head_dim is given
    n_kv_heads: Count = 0  # heads of keys and values, each shared by n_heads / n_kv_heads queries; 0: n_heads
    head_dim: Count = 0  # dimensions of a head; 0: d_model / n_heads
    qk_norm: bool = False  # norm of the queries and keys of each head, as in Qwen3
    window: Count = 0  # positions on either side that local layers attend to (causal: before); 0: all are global
    global_every: Count = 0  # with a window, every n-th layer is global; 0: none
    global_first: bool = True  # global layers are 0, n, 2 n ... as in ModernBERT; false: n - 1, 2 n - 1 ...
    # Tokens per sample. If not set, classifiers and regressions with data.path or data.hub take it from the data.
    seq_len: Annotated[int, Meta(ge=4, le=MOST)] = 64
    vocab_size: Count = 0  # rows of the token embedding; 0: the size of the tokenizer
    dropout: Share = 0.1  # dropout rate of embeddings, attention weights and outputs, and in the feed-forward
    positions: Literal["fixed", "learned", "rotary"] = "fixed"  # how positions are encoded; fixed: sines and cosines
    rotary_base: Annotated[float, Meta(gt=1, le=1e12)] = 10000.0  # base of rotary positions; larger: for longer texts
    rotary_base_local: Annotated[float, Meta(ge=0, le=1e12)] = 0.0  # base of local layers; 0: rotary_base
    rotary_scaling: Annotated[float, Meta(ge=1, le=1e6)] = 1.0  # divides low frequencies: 8 in Llama 3.1, 32 in 3.2
    rotary_scaling_len: Positive = 8192  # longest context before rotary_scaling, in tokens
    tied_embedding: bool = False  # whether the output layer shares the token embedding
    norm: Literal["layernorm", "layernorm_no_bias", "rmsnorm", "rmsnorm_no_scale"] = "layernorm"  # kind of all norms
    final_norm: bool = False  # norm after the last block
    first_norm: bool = True  # norm before the attention of the first block; false: none, as in ModernBERT
    post_norm: bool = False  # norm after each residual sum, as in BERT, instead of before each sublayer
    embedding_norm: bool = False  # norm on token plus position embeddings, as in BERT; smaller initial embeddings
    norm_epsilon: Annotated[float, Meta(gt=0, le=1)] = 1e-5  # epsilon of all norms; BERT: 1e-12
    mlp: Literal["gelu", "geglu", "swiglu", "relu2"] = "gelu"  # feed-forward; geglu, swiglu: gated; relu2: squared ReLU
    gelu: Literal["exact", "tanh"] = "exact"  # tanh: its approximation, as in GPT-2
    d_ff: Count = 0  # hidden units of the feed-forward; 0: 4 x d_model
    biases: Literal["all", "attention", "feed_forward", "none"] = "all"  # which linear layers of a block have a bias
    initialization: Literal["original", "gpt2", "modernbert", "llama"] = "original"  # initial weights
    # Layers before the output. none: a norm (mlm); bert: dense, GELU, norm (mlm) or dense, tanh (classes); distilbert:
    # likewise with ReLU; modernbert: dense, GELU, norm; eurobert: dense, GELU (classes); ultrabert: two of these (mlm).
    head_dense: Literal["none", "bert", "distilbert", "modernbert", "eurobert", "ultrabert"] = "none"
    head_hidden: Count = 0  # hidden units between the two layers of head_dense=ultrabert; 0: d_model
    output_bias: bool = True  # bias of the vocabulary's logits; false: it stays zero, as GPT-2 and Llama have none
    logit_softcap: Annotated[float, Meta(ge=0, le=1e6)] = 0.0  # c of c tanh(x / c), for logits x of words; 0: no cap
    z_loss: Rate = 0.0  # weight in training of the squared logarithm of the softmax's denominator; PaLM: 1e-4
    pad_id: Annotated[int, Meta(ge=-1, le=MOST)] = 0  # token id of padding, which attention and loss ignore; -1: none
    segments: Count = 0  # number of token types; 2 distinguish two texts, as in BERT; 0: none
    head_outputs: Literal["labels", "vocabulary"] = "labels"  # vocabulary: one per token, a bug of the original
    # Hidden states that a classifier, or embed, uses. first: of the first token; last: of the last, for causal models;
    # mean: the mean over all tokens; late: the mean of the logits of all tokens.
    pooling: Literal["first", "last", "mean", "late"] = "first"
    classifier_bias: bool = True  # bias of the logits of classes; false: none, as in Llama
    attention: Literal["auto", "plain", "fused"] = "auto"  # fused: one kernel; auto: fused where possible
    remat: Literal["none", "dots", "full"] = "none"  # rematerialization: none, all but matmuls, or everything
    frozen_embedding: bool = False  # freeze the token embedding, a tied output layer, and learned positions
    frozen_layers: Count = 0  # how many blocks to freeze, from the lowest
    lora_rank: Count = 0  # rank of LoRA adapters, trained instead of the base; 0: none
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)] = 16.0  # adapters are scaled by lora_alpha / lora_rank
    lora_products: str = "query,value"  # matrices with adapters, of query, key, value, output, fc1, up, fc2

    @property
    def n_hidden(self) -> int:
        """How many hidden units a feed-forward has."""
        return self.d_ff or 4 * self.d_model

    @property
    def head_size(self) -> int:
        """How many dimensions a head has."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """How many heads of keys and values there are."""
        return self.n_kv_heads or self.n_heads

    @property
    def period(self) -> int:
        """After how many layers their kinds repeat."""
        return self.global_every if self.window and self.global_every else 1

    def window_of(self, layer: int) -> int:
        """Return how far a layer attends to either side; 0: to all positions."""
        is_global = self.global_every and layer % self.global_every == (
            0 if self.global_first else self.global_every - 1
        )
        return 0 if is_global else self.window


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    max_steps: Positive = 1000  # optimizer updates
    batch_size: Positive = 32  # samples of one batch on all devices together
    accumulate: Positive = 1  # batches per update (gradient accumulation)
    learning_rate: Rate = 1e-3  # peak rate
    min_learning_rate: Rate = 1e-4  # rate after the decay
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"  # rate after warmup
    warmup_steps: Count = 100  # updates of linear warmup from 0
    stable_steps: Count = 0  # wsd: updates at the peak rate, between warmup and linear decay
    decay_steps: Count = 0  # update at which the decay ends; 0: max_steps
    rewarmup_steps: Count = 0  # with --resume: updates of a linear ramp from the checkpoint's rate to this schedule
    cycle_steps: Count = 0  # length of the original's cycles of 1, 1 and 2 batches per update; 0: none
    cycle_amplitude: Share = 0.03  # share by which the rate rises within a cycle, or falls where updates have 2 batches
    layer_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0  # rate of a block relative to the block above; the head has 1
    weight_decay: Rate = 0.01  # decoupled weight decay, on matrices only
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the matrices of blocks, AdamW for all else
    muon_momentum: Share = 0.95  # Muon, decay of the momentum, which is Nesterov's
    muon_scale: Literal["rms", "spectral"] = "rms"  # rms: Moonshot's, for AdamW's rates; spectral: Keller Jordan's
    muon_coefficients: Literal["newton_schulz", "polar_express"] = "newton_schulz"  # of Muon's five iterations
    muon_rate: Annotated[float, Meta(gt=0, le=1000)] = 1.0  # rate of Muon's matrices, as a multiple of learning_rate
    beta1: Share = 0.9  # AdamW, decay of the first moment
    beta2: Share = 0.999  # AdamW, decay of the second moment
    epsilon: Annotated[float, Meta(gt=0, le=1)] = 1e-8  # AdamW, added to the denominator
    group_by_length: bool = False  # batch samples of similar length, padded to the longest of the batch, not to seq_len
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0  # largest global gradient norm
    eval_interval: Positive = 100  # updates between evaluations; each writes a checkpoint and samples
    patience: Count = 0  # stop after so many evaluations without a lower validation loss; 0: never
    log_interval: Positive = 10  # updates between rows of metrics.jsonl
    label_smoothing: Share = 0.0  # share of each label that all classes get alike, in training
    # Weights of classes in training: balanced, NAME=WEIGHT,... (others 1), or a number for each in order; "": none.
    class_weights: str = ""
    # How texts are drawn. weighted: with repetition, by class_weights, which then do not weigh the loss.
    sampling: Literal["shuffled", "weighted"] = "shuffled"
    seed: Count = 0  # seed of initial weights, sample order, masking and dropout
    precision: Literal["float32", "bfloat16"] = "float32"  # type of matmuls; weights, moments and norms stay float32
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"  # on NaN or infinity: stop, skip the update, or go back
    reset_optimizer: bool = False  # with --resume PATH: start with zero moments
    switch_training: bool = False  # with --resume PATH or --init-from: load only the base; new output layer

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each class; () without class_weights, or before the data are read."""
        is_read = re.fullmatch(r"[-+.,e0-9]+", self.class_weights)
        return tuple(map(float, self.class_weights.split(","))) if is_read else ()

    def label_rule(self, is_training: bool) -> dict[str, Any]:
        """Return the arguments of the cross-entropy of classes, by name; none outside training."""
        if not is_training:
            return {}
        return {"smoothing": self.label_smoothing, "weights": self.weights if self.sampling == "shuffled" else ()}


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    teacher: str = ""  # run, checkpoint, or public model to distill; "": none
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 2.0  # of the softmax of teacher and of student
    soft_weight: Rate = 5.0  # weight of their KL divergence in the loss
    hard_weight: Rate = 2.0  # weight of the cross-entropy with the labels
    cosine_weight: Rate = 1.0  # weight of 1 - cosine similarity of the last hidden states


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    data: Axis = -1  # devices that split a batch (data parallel); -1: all remaining ones
    fsdp: Axis = 1  # devices that split a batch and the weights, which are gathered for use
    tensor: Axis = 1  # devices that split heads, hidden units and vocabulary (tensor parallel)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    coordinator: str = ""  # host:port of process 0; "": detected (TPU VM, Slurm, JobSet, torchrun)
    n_processes: Count = 0  # number of processes; 0: detected
    process: Annotated[int, Meta(ge=-1, le=MOST)] = -1  # index of this process, from 0; -1: detected
    timeout_s: Positive = 25  # seconds to wait for the other processes at start


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    samples: bool = False  # print the samples of each evaluation; samples.txt always has them
    tensorboard: bool = False  # write TensorBoard event files to the run folder (extra: tensorboard)
    wandb: str = ""  # Weights & Biases project to log to (extra: wandb)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    # mlm, gpt, sst2, cola, pairs, tag, embed, classify, multilabel, regress, a task of GLUE (mrpc, qqp, stsb, mnli,
    # qnli, rte, wnli), or your own (jaxlm/tasks/README.md)
    task: str = "mlm"
    resume: str = ""  # run or checkpoint to resume; auto: the run in run.dir, or a new one if there is none
    init_from: str = ""  # run, checkpoint, or public model (folder or hub name) whose base model the run starts from
    debug: bool = False  # show the traceback of input errors
    profile: Count = 0  # updates to trace, 5 without a number; writes a trace, and prints where time goes
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)


def comments() -> dict[str, str]:
    """Return {dotted name: what the comment beside or above it says} of all settings."""
    sections: dict[str, type] = {"": Config}
    for name, hint in typing.get_type_hints(Config).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            sections[f"{name}."] = hint
    texts = {}
    for section, kind in sections.items():
        above: list[str] = []
        for line in inspect.getsource(kind).splitlines():
            if match := re.match(r"    # (.*)", line):
                above.append(match[1])
            elif match := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
                texts[section + match[1]] = match[2] or " ".join(above)
                above = []
    return texts


def _settings(kind: type, section: str = "") -> dict[str, Any]:
    """Return {dotted name: type} of the settings of a dataclass and its sections."""
    settings: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        is_section = dataclasses.is_dataclass(hint)
        settings |= _settings(hint, f"{name}.") if is_section else {f"{section}{name}": hint}
    return settings


SETTINGS = _settings(Config)
# Keys of one of several sources; the others are settings of [data] that say how it is read.
SOURCE = {"name": str, "weight": Rate, "weight_after": Rate, "epochs": Rate}
SOURCE_DATA = (
    *("path", "validation_path", "test_path", "hub", "hub_config", "format", "documents", "unique", "header"),
    *("text_column", "pair_column", "prompt_column", "answer_column", "validation_fraction", "test_fraction"),
)
# Settings of one invocation; not saved with the run.
TRANSIENT = (
    *("resume", "debug", "profile", "run.dir", "run.checkpoint_dir"),
    *("train.reset_optimizer", "train.switch_training"),
    *("distributed.coordinator", "distributed.n_processes", "distributed.process", "distributed.timeout_s"),
)
BARE = {"profile": "5"}  # values of numbers that are given without one, as their comments say
# What runs of a version without these settings did; their checkpoints do not store them.
BEFORE = {"data.validation_tokens": 0, "data.documents": "line"}
AXES = ("data", "fsdp", "tensor")  # of the mesh of devices
EMBED = "embed"  # the task of a model of embeddings, which has no output layer
BASE = "base"  # in place of the task of a model without an output layer, and the kind of that model
GATED = ("geglu", "swiglu")  # kinds of feed-forward with a third matrix, `up`
LORA_PRODUCTS = ("query", "key", "value", "output", "fc1", "up", "fc2")
FREEZING = ("model.frozen_embedding", "model.frozen_layers", "model.lora_rank")  # all 0: the whole model is trained
GLUE = ("mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")  # tasks that share the preset glue.toml
COMMAND_LINE = "command line"
HELP = ("-h", "--help")
LEAST_COLUMNS = 10  # of the help; with fewer, tyro never returns
Layer = tuple[str, Any, str]  # dotted name, value, and where it came from


# Reading


def given(argv: list[str]) -> dict[str, Any]:
    """Return the settings of a command line and the files that it names, without presets. Raises UserError."""
    layers = _command_line([arg for arg in argv if arg not in HELP])
    return {name: _convert(name, value, origin) for name, value, origin in layers}


def load(
    argv: list[str], prog: str = "python -m jaxlm.train", stored: Sequence[Layer] = (), has_preset: bool = True
) -> tuple[Config, dict[str, str]]:
    """Return the settings of a command line, and where each one that was set came from.

    `stored` are settings of a checkpoint. They override the preset of the task; the command line overrides them.

    Prints the help and exits if `argv` asks for it.
    Raises UserError for an unknown setting, a wrong type, a value out of range, or values that do not go together.
    """
    layers = [*stored, *_command_line([arg for arg in argv if arg not in HELP])]
    task = next((value for name, value, _ in reversed(layers) if name == "task"), Config().task)
    layers = [*(_preset(task) if has_preset else ()), *layers]
    config = build({name: _convert(name, value, origin) for name, value, origin in layers})
    if (folder := config.run.checkpoint_dir) and not storage.is_remote(folder):  # config.toml is read from anywhere
        config = replace(config, "run.checkpoint_dir", str(Path(folder).absolute()))
    if any(arg in HELP for arg in argv):
        _print_help(config, prog)
    _check(config)
    return config, {name: origin for name, _, origin in layers}


def presets_dir() -> Path:
    """Return the folder of presets: inside an installed package, beside the package in a checkout."""
    here = Path(__file__).parent
    return next((path for path in (here / "configs", here.parent / "configs") if path.is_dir()), here / "configs")


def by_dotted_name(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in the content of a TOML file as {dotted name: value}."""
    settings: dict[str, Any] = {}
    for name, value in content.items():
        settings |= {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
    return settings


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name in their sections, as a TOML file has them."""
    content: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, key = name.rpartition(".")
        (content.setdefault(section, {}) if section else content)[key] = value
    return content


def is_unicode(text: str) -> bool:
    """Return whether a text has no bytes of a path that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _command_line(argv: list[str]) -> Iterator[Layer]:
    """Yield (name, value, origin) for each setting of the command line and of the files it names, in order.

    Those of --arch come first, wherever it stands.
    """
    args, others = list(argv), list[Layer]()
    sources: list[dict[str, Any]] = []
    while args:
        flag, equals, value = args.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"argument {flag!r} is not a setting: write --section.key value (--help lists them)")
        name = flag[2:].replace("-", "_")
        if name not in ("arch", "config") and name not in SETTINGS:
            hint = nearest(name, ["arch", "config", *SETTINGS]).replace("mean ", "mean --").replace("_", "-")
            raise UserError(f"{flag}: unknown setting{hint} (--help lists them)")
        if not equals:
            has_value = bool(args) and not args[0].startswith("--")
            bare = "true" if SETTINGS.get(name) is bool else BARE.get(name)
            if not has_value and not bare:
                meaning = "" if name == "config" else f" ({comments()[name]}; default: {get(Config(), name)})"
                raise UserError(f"{flag}: value is missing{meaning}; write {flag} VALUE")
            value = args.pop(0) if has_value else bare or ""
        if name == "arch":
            yield from _architecture(value)
        elif name == "config":
            others += _file(Path(value))
        elif name == "data.sources":
            sources.append(_source(value))
        else:
            others.append((name, value, COMMAND_LINE))
    yield from others
    if sources:
        yield ("data.sources", sources, COMMAND_LINE)


def _source(text: str) -> dict[str, Any]:
    """Return the source that NAME=PATH:WEIGHT is; the weight may be missing."""
    name, _, path = text.partition("=")
    before, _, weight = path.rpartition(":")
    is_weighted = before and re.fullmatch(r"[-+]?([0-9.]+(e[-+]?[0-9]+)?|nan|inf)", weight)
    return {"name": name} | ({"path": before, "weight": weight} if is_weighted else {"path": path} if path else {})


def _architecture(name: str) -> list[Layer]:
    """Return the settings of a named architecture, configs/architectures/NAME.toml."""
    paths = {path.stem: path for path in sorted((presets_dir() / "architectures").glob("*.toml"))}
    if name not in paths:
        raise UserError(f"--arch {name}: unknown architecture{nearest(name, paths)}; there are {', '.join(paths)}")
    return _file(paths[name])


def _file(path: Path) -> list[Layer]:
    """Return (name, value, origin) for each setting in a TOML file, or in a preset: NAME, or configs/NAME.toml.

    Presets are found from any folder, as an installed package has them inside.
    """
    if not path.exists() and path.parent in (Path(), Path("configs")):
        preset = presets_dir() / f"{path.name.removesuffix('.toml')}.toml"
        if not preset.is_file():
            names = [other.stem for other in sorted(presets_dir().glob("*.toml"))]
            hint = f"{nearest(preset.stem, names)}; there are {', '.join(names)}"
            raise UserError(f"--config {path}: there is no such file, nor such a preset{hint}")
        path = preset
    try:
        content = utf8.from_toml(utf8.read(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: cannot be read as TOML: {error}") from error
    settings = by_dotted_name(content)
    for name in settings:
        if name not in SETTINGS:
            raise UserError(f"{path}: {name}: unknown setting{nearest(name, SETTINGS)}")
    return [(name, value, str(path)) for name, value in settings.items()]


def task_presets() -> dict[str, list[Layer]]:
    """Return the settings of the presets that have the name of their task."""
    presets = {path.stem: _file(path) for path in sorted(presets_dir().glob("*.toml"))}
    return {name: layers for name, layers in presets.items() if any(x[:2] == ("task", name) for x in layers)}


def _preset(task: Any) -> list[Layer]:
    """Return the settings of the task's preset; of a task of one's own, none."""
    presets = task_presets()
    if str(task) in presets:
        return presets[str(task)]
    if task in GLUE:
        path = presets_dir() / "glue.toml"
        return [("task", task, str(path)), ("data.hub_config", task, str(path)), *_file(path)]
    is_own = str(task).isidentifier() and (Path(__file__).parent / "tasks" / f"{task}.py").is_file()
    if is_own or task == BASE:
        return []
    names = sorted({*presets, *GLUE, "classify", "multilabel", "regress"})  # the last three need no preset
    hint = f"{nearest(str(task), names)}; there are {', '.join(names)}; to add one: jaxlm/tasks/README.md"
    raise UserError(f"task={task}: unknown task{hint}")


def _convert(name: str, value: Any, origin: str) -> Any:
    """Return `value` as the setting's type; text is parsed if it comes from the command line."""
    is_text = origin == COMMAND_LINE
    if name.endswith("_column") and type(value) is int:  # the number of a column, as TOML has it
        value = str(value)
    if name == "data.sources" and isinstance(value, list) and all(isinstance(source, dict) for source in value):
        found = [_convert_source(source, origin) for source in value]
        return tuple(sorted(found, key=lambda source: source.get("name", "")))
    try:
        return msgspec.convert(value, SETTINGS[name], strict=not is_text)
    except msgspec.ValidationError as error:
        given = f"--{name.replace('_', '-')} {value}" if is_text else f"{origin}: {name} = {value!r}"
        rule = str(error).partition(" - at")[0].replace("`", "")
        rule = rule[0].lower() + rule[1:]
        if typing.get_origin(SETTINGS[name]) is Literal:
            rule = f"must be one of {', '.join(typing.get_args(SETTINGS[name]))}"
        raise UserError(f"{given}: {rule} (default: {get(Config(), name)!r})") from error


def _convert_source(source: Mapping[str, Any], origin: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in source.items():
        try:
            if key in SOURCE:
                found[key] = msgspec.convert(value, SOURCE[key], strict=origin != COMMAND_LINE)
            elif key in SOURCE_DATA:
                found[key] = _convert(f"data.{key}", value, origin)
            else:
                raise UserError(f"{key}: unknown key{nearest(key, [*SOURCE, *SOURCE_DATA])}")
        except (UserError, msgspec.ValidationError) as error:
            rule = str(error) if isinstance(error, UserError) else f"{key}={value!r}: {error}"
            raise UserError(
                f"{origin}: data.sources, {source.get('name', 'a source without a name')}: {rule}"
            ) from error
    return found


def source_configs(config: Config) -> dict[str, Config]:
    """Return the settings for each of several sources, by its name; {"": config} of one alone."""
    found = {}
    for source in config.data.sources:
        own = {key: value for key, value in source.items() if key in SOURCE_DATA}
        found[source["name"]] = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(), **own))
    return found or {"": config}


def _print_help(config: Config, prog: str) -> None:
    """Print the help with the values of the settings as defaults, and exit."""
    import tyro

    width = max(shutil.get_terminal_size().columns, LEAST_COLUMNS)
    if len(f"usage: {prog} [-h] [OPTIONS]") > width:
        prog = prog.rpartition(" ")[2]
    description = terminal.wrapped(
        "Trains a small language model. Settings come in layers, later wins: the preset of the task, then "
        "--arch NAME (a design of the model, such as modernbert), then --config FILE (TOML, or the name of a preset; "
        "repeatable) and --section.key VALUE in the order given. The "
        f"defaults below are those of task {config.task}; for others, name another with --task. "
        "Several sources at once: --data.sources NAME=PATH:WEIGHT, once for each. "
        "Several runs with their mean: --seeds N --folds N --run.dir FOLDER.",
        width,
    )
    options = (tyro.conf.FlagConversionOff,)
    os.environ["COLUMNS"] = str(width)  # for tyro
    with contextlib.redirect_stdout(terminal.raw(sys.stdout)), contextlib.suppress(SystemExit):  # it has colours
        tyro.cli(
            Config,
            args=["--help"],
            default=replace(config, "data.sources", ()),
            prog=prog,
            description=description,
            config=options,
        )
    sys.stdout.flush()  # here, where it is known what to do if nobody reads it
    sys.exit(0)


# Access by name


def build(values: dict[str, Any]) -> Config:
    """Return the Config with the given {dotted name: value} in place of the defaults."""
    config = Config()
    for name, value in values.items():
        config = replace(config, name, value)
    return config


def replace(config: Config, name: str, value: Any) -> Config:
    """Return `config` with one setting, given by its dotted name, changed."""
    section, _, key = name.rpartition(".")
    if section:
        key, value = section, dataclasses.replace(getattr(config, section), **{key: value})
    return dataclasses.replace(config, **{key: value})


def get(config: Config, name: str) -> Any:
    """Return one setting by its dotted name."""
    return operator.attrgetter(name)(config)


def dump(config: Config) -> str:
    """Return the lasting settings as TOML, which `--config` reads back."""
    # The folder of the checkpoints, too, so that they are found by the folder of the run.
    return tomli_w.dumps(nested(flat(config) | {"run.checkpoint_dir": config.run.checkpoint_dir}))


def flat(config: Config) -> dict[str, Any]:
    """Return {dotted name: value} of the lasting settings, as checkpoints have them."""
    values = {name: get(config, name) for name in SETTINGS if name not in TRANSIENT}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def is_whole(settings: Mapping[str, Any]) -> bool:
    """Return whether the whole model is trained, by settings with dotted names."""
    return not any(settings.get(name) for name in FREEZING)


# Checks of several settings together


def mesh_sizes(config: Config, n_devices: int) -> dict[str, int]:
    """Return the size of each axis of the mesh that the settings ask for.

    Raises UserError if the devices do not fill it, or a batch or the heads cannot be split over it.
    """
    shown = functools.partial(_shown, config)
    sizes = {name: getattr(config.mesh, name) for name in AXES}
    known = math.prod(size for size in sizes.values() if size > 0)
    if n_devices % known or (-1 not in sizes.values() and n_devices != known):
        others = sizes["fsdp"] * sizes["tensor"]
        is_enough = sizes["data"] > 0 and others > 0 and n_devices % others == 0
        mend = "set mesh.data to -1" if is_enough else f"use divisors of {n_devices}, whose product divides it"
        axes = ", ".join(shown(f"mesh.{name}") for name in AXES)
        raise UserError(f"{axes}: there are {n_devices} devices, and {known} does not fill them; {mend}")
    sizes = {name: n_devices // known if size == -1 else size for name, size in sizes.items()}
    n_parts, n_tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    if config.train.batch_size % n_parts:
        fits = _either(_multiples(config.train.batch_size, n_parts))
        rule = f"is not divisible by the {n_parts} parts of a batch (mesh.data x mesh.fsdp)"
        raise UserError(f"{shown('train.batch_size')} {rule}; use {fits}")
    if config.model.n_heads % n_tensor:
        heads = [n for n in _multiples(config.model.n_heads, n_tensor) if config.model.d_model % n == 0]
        mend = f"{_either(heads)} heads, or another mesh.tensor" if heads else "another mesh.tensor"
        raise UserError(f"{shown('model.n_heads')} is not divisible by mesh.tensor={n_tensor}; use {mend}")
    if config.model.kv_heads % n_tensor:
        mend = "a multiple of it, or another mesh.tensor"
        raise UserError(f"{shown('model.n_kv_heads')} is not divisible by mesh.tensor={n_tensor}; use {mend}")
    return sizes


def check_model(config: Config) -> None:
    """Raise UserError for settings that no model can have together."""
    model, shown = config.model, functools.partial(_shown, config)
    head_size = model.head_size
    if not re.fullmatch(r"(\d+(,\d+)*)?", config.tokenizer.end_ids):
        raise UserError(f"{shown('tokenizer.end_ids')}: has to be ids of tokens with commas between them, as in 7,9")
    if model.d_model % model.n_heads and not model.head_dim:
        fits = _either(_multiples(model.d_model, model.n_heads))
        raise UserError(f"{shown('model.d_model')} is not divisible by {shown('model.n_heads')}; use {fits}")
    if model.n_heads % model.kv_heads:
        rule = f"does not divide {shown('model.n_heads')}, whose queries share its keys"
        raise UserError(f"{shown('model.n_kv_heads')} {rule}; use a divisor, or 0")
    if model.window and model.global_every == 1:
        raise UserError("model.global_every=1: all layers are global, none has the window; raise it, or set window=0")
    if not model.first_norm and (model.post_norm or model.n_layers == 1):
        rule = "goes with several blocks that have norms before their sublayers"
        raise UserError(f"model.first_norm=False {rule}; set it to true, or model.post_norm=false and more n_layers")
    if model.positions == "fixed" and model.d_model % 2:
        rule = "is odd, but model.positions=fixed needs pairs of columns"
        raise UserError(f"{shown('model.d_model')} {rule}; use an even one, or --model.positions learned")
    if model.positions == "rotary" and head_size % 2:
        size = "model.head_dim" if model.head_dim else "model.d_model / model.n_heads"
        rule = f"needs an even head size, not {size} = {head_size}"
        raise UserError(f"model.positions=rotary {rule}; change one of these, or use --model.positions learned")
    if model.frozen_layers > model.n_layers:
        raise UserError(f"{shown('model.frozen_layers')}: there are {shown('model.n_layers')} blocks; lower it")
    if not model.lora_rank:
        return
    for name in model.lora_products.split(","):
        if (name := name.strip()) not in LORA_PRODUCTS:
            mend = f"{nearest(name, LORA_PRODUCTS)}; give some of {','.join(LORA_PRODUCTS)}"
            raise UserError(f"{shown('model.lora_products')}: {name!r} is none{mend}")
        if name == "up" and model.mlp not in GATED:
            raise UserError(f"{shown('model.lora_products')}: up needs model.mlp={_either(GATED)}; leave it out")
    if model.lora_rank > model.d_model:
        rule = f"is above {shown('model.d_model')}, the rank that a product can have"
        raise UserError(f"{shown('model.lora_rank')} {rule}; lower it")
    if model.frozen_layers == model.n_layers:
        rule = "leaves no block with adapters that are trained"
        raise UserError(f"{shown('model.frozen_layers')} {rule}; lower it, or set model.lora_rank=0")


def _check(config: Config) -> None:
    """Raise UserError for settings that are valid alone but conflict with each other."""
    train, data, distill, distributed = config.train, config.data, config.distill, config.distributed
    shown = functools.partial(_shown, config)
    for name in SETTINGS:
        if isinstance(value := get(config, name), str) and not is_unicode(value):
            rule = "has bytes that are not UTF-8, which config.toml cannot hold"
            raise UserError(f"{name}={value!r}: {rule}; give another name, or a link to it")
    if storage.is_remote(config.run.dir):
        raise UserError(f"{shown('run.dir')}: has to be a local folder; only run.checkpoint_dir can be another")
    check_model(config)
    if train.min_learning_rate > train.learning_rate:
        raise UserError(f"{shown('train.min_learning_rate')} is above {shown('train.learning_rate')}; lower it")
    end = "decay_steps" if train.decay_steps else "max_steps"
    if train.schedule == "wsd" and train.warmup_steps + train.stable_steps > getattr(train, end):
        rule = f"end after the decay, at update {getattr(train, end)}"
        steps = f"{shown('train.stable_steps')} and {shown('train.warmup_steps')}"
        raise UserError(f"{steps} {rule}; lower them, or raise train.{end}")
    if (train.label_smoothing or train.class_weights) and config.model.head_outputs == "vocabulary":
        name = "train.label_smoothing" if train.label_smoothing else "train.class_weights"
        raise UserError(f"{shown(name)}: model.head_outputs=vocabulary has outputs that are no class; set it to labels")
    if config.task == "multilabel" and distill.teacher:
        raise UserError(f"{shown('distill.teacher')}: task=multilabel has no softmax to learn from; leave it out")
    if train.sampling == "weighted" and (not train.class_weights or data.pack != "none"):
        mend = "set data.pack=none" if train.class_weights else "give them, such as --train.class-weights balanced"
        raise UserError(f"train.sampling=weighted: single texts are drawn by train.class_weights; {mend}")
    if not (distill.soft_weight or distill.hard_weight or distill.cosine_weight):
        raise UserError("distill.soft_weight, .hard_weight and .cosine_weight are all 0; raise one of them")
    axes = {f"mesh.{name}": getattr(config.mesh, name) for name in AXES}
    zero, free = ([name for name, size in axes.items() if size == n] for n in (0, -1))
    if zero:
        raise UserError(f"{zero[0]}=0: a mesh has no side of no devices; use 1 or more, or -1 for all that are left")
    if len(free) > 1:
        raise UserError(f"{'=-1 and '.join(free)}=-1: only one can be what is left; give a number for the others")
    if len({bool(distributed.coordinator), distributed.n_processes > 0, distributed.process >= 0}) > 1:
        raise UserError("distributed.coordinator, .n_processes and .process go together; give all three, or none")
    if data.stride > config.model.seq_len:
        rule = f"is above {shown('model.seq_len')}, so that text between windows would be left out"
        raise UserError(f"{shown('data.stride')} {rule}; lower it, or leave it out")
    if config.model.pooling == "late" and config.task in (EMBED, "tag"):
        raise UserError(f"model.pooling=late: task={config.task} has no logits of a text; use first, last or mean")
    if data.n_labels == 1:
        raise UserError("data.n_labels=1: a classifier has two classes or more; leave it out to have those of the data")
    if data.folds and not (data.path or data.hub or data.sources):
        raise UserError(f"{shown('data.folds')}: the embedded data has parts of its own; give a file with data.path")
    if data.folds == 1 or data.fold >= max(data.folds, 1):
        raise UserError(
            f"{shown('data.fold')} is none of {shown('data.folds')}; give 2 folds or more, and one from 0 on"
        )
    if data.path and data.hub:
        raise UserError(f"{shown('data.path')} and {shown('data.hub')} name two sources; give one of them")
    _check_sources(data)
    if data.pack != "none" and train.group_by_length:
        raise UserError(f"{shown('data.pack')} fills all rows; set train.group_by_length=false, or data.pack=none")
    if data.validation_fraction + data.test_fraction >= 1:
        shares = f"{shown('data.validation_fraction')} and {shown('data.test_fraction')}"
        raise UserError(f"{shares} leave nothing to train on; their sum must be below 1")


def _check_sources(data: DataConfig) -> None:
    """Raise UserError for sources that conflict with each other."""
    what, names = "data.sources", [source.get("name", "") for source in data.sources]
    if names and (root := data.path or data.hub):
        raise UserError(f"{what} and {root} both name what to train on; give it as one of the sources, or leave it out")
    for source, name in zip(data.sources, names, strict=True):
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise UserError(
                f"{what}: the name {name!r} has to be of letters, digits, _ . and -; write NAME=PATH:WEIGHT"
            )
        if names.count(name) > 1:
            raise UserError(f"{what}: two have the name {name}; rename one")
        if bool(source.get("path")) == bool(source.get("hub")):
            raise UserError(f"{what}, {name}: give either its path, as in NAME=PATH:WEIGHT, or its hub")
    for key in ("weight", "weight_after"):
        given = [source[key] for source in data.sources if key in source]
        if given and (len(given) < len(names) or not sum(given)):
            raise UserError(f"{what}: give every source a {key}, one of them above 0, or none of them")
    if any("weight_after" in source for source in data.sources) != bool(names and data.weights_after):
        raise UserError("data.weights_after and the weight_after of each source go together; give both, or neither")


def warnings(config: Config, origins: dict[str, str], of_other_tasks: Iterable[str]) -> list[str]:
    """Return a line for each setting that the user gave and that has no effect in this run."""
    data, tokenizer, model, train = config.data, config.tokenizer, config.model, config.train
    distill, shown = config.distill, functools.partial(_shown, config)
    has_files = data.path or data.validation_path or data.test_path or data.sources
    is_embedded = not data.path and not data.hub and not data.sources
    path, has_path = Path(tokenizer.path), tokenizer.path and "tokenizer.path is given"
    is_vocab_txt = path.suffix == ".txt" or (path / "vocab.txt").is_file() and not (path / "tokenizer.json").is_file()
    keeps_case = not is_vocab_txt if has_path else tokenizer.kind != "wordpiece"
    is_untrained = tokenizer.kind in ("bytes", "characters") and f"{shown('tokenizer.kind')} is not trained"
    is_new = config.resume in ("", "auto")
    no_base, no_teacher = is_new and not config.init_from, not distill.teacher and "there is no distill.teacher"
    no_rotary = model.positions != "rotary" and shown("model.positions")
    no_muon = train.optimizer != "muon" and shown("train.optimizer")
    no_fraction = data.validation_path and "data.validation_path is given" or data.folds and shown("data.folds")
    without_effect = {  # settings, and why they have no effect if they have none
        "data.hub_config": not data.hub and "there is no data.hub",
        "data.unique": is_embedded and "the data is the embedded default",
        "data.temperature": not data.sources and "there are no data.sources",
        "data.format data.header data.documents": not has_files and "no local file is read",
        "data.text_column data.pair_column data.label_column": is_embedded and "the data is the embedded default",
        "data.prompt_column data.answer_column": is_embedded and "the data is the embedded default",
        "data.validation_path data.test_path": is_embedded and "the data is the embedded default (give data.path too)",
        "data.validation_fraction": no_fraction,
        "data.test_fraction": data.test_path and "data.test_path is given",
        "tokenizer.kind": has_path,
        "tokenizer.vocab_size": has_path or is_untrained,
        "tokenizer.lowercase": keeps_case and (has_path or f"{shown('tokenizer.kind')} keeps case"),
        "model.rotary_base model.rotary_base_local model.rotary_scaling": no_rotary,
        "train.label_smoothing train.class_weights": distill.teacher and "the loss is that of distill.*",
        "model.rotary_scaling_len": no_rotary or model.rotary_scaling == 1 and shown("model.rotary_scaling"),
        "model.rotary_base_local model.global_every": not model.window and shown("model.window"),
        "model.global_first": not (model.window and model.global_every) and shown("model.global_every"),
        "model.gelu": model.mlp not in ("gelu", "geglu") and model.head_dense == "none" and shown("model.mlp"),
        "data.stride": data.pack == "stream" and shown("data.pack"),
        "train.stable_steps": train.schedule != "wsd" and shown("train.schedule"),
        "model.frozen_embedding": model.lora_rank and "model.lora_rank freezes the base",
        "model.z_loss": distill.teacher and "distill.teacher is given",
        "model.lora_alpha model.lora_products": not model.lora_rank and shown("model.lora_rank"),
        "train.cycle_amplitude": not train.cycle_steps and shown("train.cycle_steps"),
        "train.optimizer": model.lora_rank and "model.lora_rank freezes the matrices of blocks",
        "train.muon_momentum train.muon_scale train.muon_coefficients train.muon_rate": no_muon,
        "train.reset_optimizer": is_new and "it goes with --resume PATH",
        "train.switch_training": no_base and "it goes with --resume PATH and --init-from",
        "distill.temperature distill.soft_weight distill.hard_weight distill.cosine_weight": no_teacher,
        " ".join(of_other_tasks): f"{shown('task')} does not use it",
    }
    reasons = {name: reason for names, reason in without_effect.items() if reason for name in names.split()}
    lines = []
    if not is_whole(flat(config)) and not config.init_from and not config.resume:
        lines.append("frozen parameters keep random initial values: there is no base model; give one by --init-from")
    if train.warmup_steps >= train.max_steps:
        effect = "the rate never reaches train.learning_rate"
        lines.append(f"{shown('train.warmup_steps')} is not below {shown('train.max_steps')}: {effect}")
    if 0 < train.decay_steps <= train.warmup_steps:
        effect = "the rate drops to train.min_learning_rate at once after the warmup"
        lines.append(f"{shown('train.decay_steps')} is not above {shown('train.warmup_steps')}: {effect}")
    presets = str(presets_dir())
    return lines + [
        f"{shown(name)} has no effect: {reason}"
        for name, reason in reasons.items()
        if not origins.get(name, presets).startswith(presets) and get(config, name) != get(Config(), name)
    ]


def _shown(config: Config, name: str) -> str:
    """Return a setting as messages show it: name=value."""
    return f"{name}={get(config, name)}"


def _multiples(size: int, n: int) -> list[int]:
    """Return the multiples of `n` next to a size."""
    return [multiple for multiple in (size // n * n, size // n * n + n) if multiple]


def _either(values: Iterable[Any]) -> str:
    return " or ".join(map(str, values))
