"""Every setting of a run: defaults, ranges, units, and where a value came from. Imports neither jax nor torch.

A run's settings are layers; a later layer wins: the defaults below, then the preset of the task
(`configs/<task>.toml`), then `--config` files and `--section.key value` in the order of the command line.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import shutil
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
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
    dir: str = ""  # folder of this run, made anew unless the run in it goes on; "": runs/<task>-<date>-<n>
    checkpoint_dir: str = ""  # folder of checkpoints, also gs://BUCKET/FOLDER (extra: gcs); "": in the run folder
    keep_checkpoints: Positive = 1  # of the last, besides the best


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    path: str = ""  # file with all of the text or the training part, or folder with a file a part; "": embedded
    validation_path: str = ""  # file of the validation part; "": a share of the source is split off
    test_path: str = ""  # file of the test part; "": a share of the source is split off
    hub: str = ""  # data set on the Hugging Face hub, such as wikitext or nyu-mll/glue
    hub_config: str = ""  # its configuration, such as wikitext-2-raw-v1 or sst2
    format: Literal["auto", "text", "wikitext", "csv", "tsv", "jsonl", "parquet"] = "auto"  # auto: by name and content
    header: Literal["auto", "yes", "no"] = "auto"  # first row of CSV and TSV files names the columns
    text_column: str = ""  # name, or number from 0, of the column with the text; "": by usual names
    label_column: str = ""  # name, or number from 0, of the column with the label; "": by usual names
    prompt_column: str = ""  # name, or number from 0, of the column with the prompt; "": by usual names
    answer_column: str = ""  # name, or number from 0, of the column with the answer; "": by usual names
    n_labels: Count = 0  # classes that the labels have to make; 0: as many as are found in the training part
    validation_fraction: Share = 0.1  # share of articles split off where the source has no validation part
    test_fraction: Share = 0.1  # share of articles split off where the source has no test part
    split_seed: Count = 0  # seed of the hash that splits articles
    mask_fraction: Annotated[float, Meta(gt=0, lt=1)] = 0.15  # share of positions that mlm masks
    n_maskings: Count = 0  # distinct maskings used round-robin by epoch; 0: a new one in each epoch
    cache_dir: str = ""  # folder of token caches and tokenizers; "": the user's cache folder

    @property
    def n_classes(self) -> int:
        """How many classes a classifier has; two in settings that have seen no data."""
        return self.n_labels or 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    path: str = ""  # tokenizer.json, vocab.txt, folder with vocab.json and merges.txt, or hub name; "": train one
    kind: Literal["wordpiece", "bpe"] = "wordpiece"  # what to train: WordPiece or byte-level BPE
    vocab_size: Annotated[int, Meta(ge=300, le=MOST)] = 4096  # tokens in a trained vocabulary, at most
    lowercase: bool = True  # a trained WordPiece ignores case and accents


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    d_model: Positive = 128  # width of the residual stream
    n_layers: Positive = 2  # blocks
    n_heads: Positive = 4  # attention heads; must divide d_model
    seq_len: Annotated[int, Meta(ge=4, le=MOST)] = 64  # positions of one sample, tokens
    vocab_size: Count = 0  # rows of the token table; 0: as many as the tokenizer has
    dropout: Share = 0.1  # on embeddings, attention weights and outputs, and inside the feed-forward
    positions: Literal["fixed", "learned", "rotary"] = "fixed"  # fixed: the original's table of sines
    tied_embedding: bool = False  # the output layer shares the token table
    final_norm: bool = False  # LayerNorm after the last block
    post_norm: bool = False  # LayerNorm after each residual sum, as BERT has it, instead of before
    embedding_norm: bool = False  # LayerNorm on tokens plus positions, as BERT has it; the table starts smaller
    norm_epsilon: Annotated[float, Meta(gt=0, le=1)] = 1e-5  # of all LayerNorms; BERT has 1e-12
    gelu: Literal["exact", "tanh"] = "exact"  # tanh: its approximation, as GPT-2 has it
    head_dense: Literal["none", "bert", "distilbert"] = "none"  # layer before the output: GELU (mlm), tanh or ReLU
    output_bias: bool = True  # of a tied output layer; false: it stays zero, since GPT-2 has none
    pad_id: Annotated[int, Meta(ge=-1, le=MOST)] = 0  # token id that attention and loss leave out; -1: none
    head_outputs: Literal["labels", "vocabulary"] = "labels"  # classifier outputs; vocabulary: the original's slip
    pooling: Literal["first", "last"] = "first"  # what a classifier reads: first token, or last one of a causal model
    attention: Literal["auto", "plain", "fused"] = "auto"  # auto: in one kernel where a device has it for the settings
    remat: Literal["none", "dots", "full"] = "none"  # made anew for gradients, to save memory: all but products, or all
    frozen_embedding: bool = False  # token table, also as a tied output layer, and learned positions are not trained
    frozen_layers: Count = 0  # blocks, from the lowest, that are not trained
    lora_rank: Count = 0  # of adapters, trained in place of the base; 0: none
    lora_alpha: Annotated[float, Meta(gt=0, le=1e6)] = 16.0  # adapters are scaled by this over lora_rank
    lora_products: str = "query,value"  # what has adapters, of query, key, value, output, fc1, fc2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    max_steps: Positive = 1000  # optimizer updates
    batch_size: Positive = 32  # samples of one batch, over all devices
    accumulate: Positive = 1  # batches summed into one update
    learning_rate: Rate = 1e-3  # peak rate
    min_learning_rate: Rate = 1e-4  # rate after the decay
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"  # of the rate, after the warmup
    warmup_steps: Count = 100  # updates of linear warmup from 0
    stable_steps: Count = 0  # wsd: updates at the peak rate, between the warmup and a linear decay
    decay_steps: Count = 0  # update at which the decay reaches its minimum; 0: max_steps
    rewarmup_steps: Count = 0  # updates from the rate of a checkpoint to another schedule, linearly
    cycle_steps: Count = 0  # length of each of the original's cycles of 1, 1 and 2 batches an update; 0: none
    cycle_amplitude: Share = 0.03  # share by which the rate rises, or falls where batches are two, within a cycle
    layer_decay: Annotated[float, Meta(gt=0, le=1)] = 1.0  # rate of a block over that of the one above; the head has 1
    weight_decay: Rate = 0.01  # decoupled, on matrices only
    beta1: Share = 0.9  # AdamW, first moment
    beta2: Share = 0.999  # AdamW, second moment
    epsilon: Annotated[float, Meta(gt=0, le=1)] = 1e-8  # AdamW
    group_by_length: bool = False  # samples of like length share a batch, which is cut to the longest, not to seq_len
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0  # global gradient norm is clipped to this
    eval_interval: Positive = 100  # updates between evaluations, each with a checkpoint and samples
    log_interval: Positive = 10  # updates between rows of metrics.jsonl
    seed: Count = 0  # of start values, order of samples, masking and dropout
    precision: Literal["float32", "bfloat16"] = "float32"  # of products; weights, moments and norms stay float32
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"  # a loss or gradient that is no number; skip: its update
    reset_optimizer: bool = False  # with --resume PATH: zero moments instead of those of the checkpoint
    switch_training: bool = False  # with --resume PATH or --init-from: the base model only, with a new output layer


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    teacher: str = ""  # run, checkpoint, or public model that a smaller one learns from; "": none
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 2.0  # of the distributions of teacher and student
    soft_weight: Rate = 5.0  # in the loss, of their divergence
    hard_weight: Rate = 2.0  # in the loss, of the cross-entropy with the labels
    cosine_weight: Rate = 1.0  # in the loss, of 1 - cosine of the last hidden states


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    data: Axis = -1  # devices that split a batch, each with a copy of the model; -1: all that are left
    fsdp: Axis = 1  # devices that split a batch and the model, whose matrices are gathered where they are used
    tensor: Axis = 1  # devices that split heads, hidden units and vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    coordinator: str = ""  # host:port of process 0; "": found on TPU VMs, in Slurm, JobSet and under torchrun
    n_processes: Count = 0  # of the run; 0: as found
    process: Annotated[int, Meta(ge=-1, le=MOST)] = -1  # number of this process, from 0; -1: as found
    timeout_s: Positive = 25  # seconds to wait for the other processes at the start


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    samples: bool = False  # print the samples of each evaluation, which the run folder always gets
    tensorboard: bool = False  # write TensorBoard event files to the run folder (extra: tensorboard)
    wandb: str = ""  # Weights & Biases project to log to (extra: wandb)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    task: str = "mlm"  # mlm, gpt, sst2, cola, pairs, or your own (jaxlm/tasks/README.md)
    resume: str = ""  # run, or one of its checkpoints, that goes on; auto: that in run.dir, a new run if there is none
    init_from: str = ""  # run, checkpoint, or public model by folder or hub name, whose base a new run starts with
    debug: bool = False  # show the traceback of an error in the input
    profile: Count = 0  # updates to trace, for the viewers that JAX has, with a table of where their time goes
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)


def _settings() -> dict[str, Any]:
    """Return {dotted name: type} of every setting."""
    settings: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config, include_extras=True).items():
        if dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind, include_extras=True)
            settings |= {f"{name}.{key}": hint for key, hint in hints.items()}
        else:
            settings[name] = kind
    return settings


SETTINGS = _settings()
# What a command is asked to do, which is not what a run is: a run's config.toml and its checkpoints have it not.
TRANSIENT = (
    *("resume", "debug", "profile", "run.dir", "run.checkpoint_dir"),
    *("train.reset_optimizer", "train.switch_training"),
    *("distributed.coordinator", "distributed.n_processes", "distributed.process", "distributed.timeout_s"),
)
BARE = {"profile": "5"}  # values of flags that are given without one
AXES = ("data", "fsdp", "tensor")  # of the mesh of devices
BASE = "base"  # in place of the task of a model without an output layer, and the kind of that model
LORA_PRODUCTS = ("query", "key", "value", "output", "fc1", "fc2")
COMMAND_LINE = "command line"
HELP = ("-h", "--help")
LEAST_COLUMNS = 10  # of the help, for which tyro would search for ever with a few
Layer = tuple[str, Any, str]  # dotted name, value, and where it came from


def presets_dir() -> Path:
    """Return the folder of presets: inside an installed package, beside the package in a checkout."""
    here = Path(__file__).parent
    return next((path for path in (here / "configs", here.parent / "configs") if path.is_dir()), here / "configs")


def given(argv: list[str]) -> dict[str, Any]:
    """Return the settings of a command line and the files that it names, without presets. Raises UserError."""
    layers = _command_line([arg for arg in argv if arg not in HELP])
    return {name: _convert(name, value, origin) for name, value, origin in layers}


def load(
    argv: list[str], prog: str = "python -m jaxlm.train", stored: Sequence[Layer] = (), has_preset: bool = True
) -> tuple[Config, dict[str, str]]:
    """Return the settings of a command line, and where each one that was set came from.

    `stored` are settings of a checkpoint, which go before those of the command line and after the preset of the task.

    Prints the help and exits if `argv` asks for it.
    Raises UserError for an unknown setting, a wrong type, a value out of range, or values that do not go together.
    """
    wants_help = [arg for arg in argv if arg in HELP]
    layers = list(_command_line([arg for arg in argv if arg not in wants_help]))
    task = next((value for name, value, _ in reversed([*stored, *layers]) if name == "task"), Config().task)
    layers = [*(_preset(task) if has_preset else ()), *stored, *layers]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, value, origin in layers:
        values[name] = _convert(name, value, origin)
        origins[name] = origin
    config = build(values)
    if (folder := config.run.checkpoint_dir) and not storage.is_remote(folder):  # config.toml is read from anywhere
        config = replace(config, "run.checkpoint_dir", str(Path(folder).absolute()))
    if wants_help:
        _print_help(config, prog)
    _check(config)
    return config, origins


def build(values: dict[str, Any]) -> Config:
    """Return the Config with the given {dotted name: value} in place of the defaults."""
    config = Config()
    for name, value in values.items():
        config = replace(config, name, value)
    return config


def replace(config: Config, name: str, value: Any) -> Config:
    """Return `config` with one setting, given by its dotted name, changed."""
    section, _, key = name.rpartition(".")
    if not section:
        return dataclasses.replace(config, **{key: value})
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: value})})


def get(config: Config, name: str) -> Any:
    """Return one setting by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def dump(config: Config) -> str:
    """Return the lasting settings as TOML, which `--config` reads back."""
    nested: dict[str, Any] = {}
    # Whoever has the folder of a run finds its checkpoints.
    for name, value in (flat(config) | {"run.checkpoint_dir": config.run.checkpoint_dir}).items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return tomli_w.dumps(nested)


def flat(config: Config) -> dict[str, Any]:
    """Return {dotted name: value} of the lasting settings, as checkpoints have them."""
    return {name: get(config, name) for name in SETTINGS if name not in TRANSIENT}


def mesh_sizes(config: Config, n_devices: int) -> dict[str, int]:
    """Return the size of each axis of the mesh that the settings ask for.

    Raises UserError if the devices do not fill it, or a batch or the heads cannot be split over it.
    """
    sizes = {name: getattr(config.mesh, name) for name in AXES}
    shown = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items())
    known = math.prod(size for size in sizes.values() if size > 0)
    if n_devices % known or (-1 not in sizes.values() and n_devices != known):
        others = sizes["fsdp"] * sizes["tensor"]
        is_enough = sizes["data"] > 0 and others > 0 and n_devices % others == 0
        mend = "set mesh.data to -1" if is_enough else f"use divisors of {n_devices}, whose product divides it"
        raise UserError(f"{shown}: there are {n_devices} devices, and {known} does not fill them; {mend}")
    sizes = {name: n_devices // known if size == -1 else size for name, size in sizes.items()}
    n_parts = sizes["data"] * sizes["fsdp"]
    if config.train.batch_size % n_parts:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is not divisible by the {n_parts} parts of a batch "
            f"(mesh.data x mesh.fsdp); use {' or '.join(map(str, _fits(config.train.batch_size, n_parts)))}"
        )
    if config.model.n_heads % sizes["tensor"]:
        fits = [n for n in _fits(config.model.n_heads, sizes["tensor"]) if config.model.d_model % n == 0]
        heads = f"{' or '.join(map(str, fits))} heads, or " if fits else ""
        raise UserError(
            f"model.n_heads={config.model.n_heads} is not divisible by mesh.tensor={sizes['tensor']}; "
            f"use {heads}another mesh.tensor"
        )
    return sizes


def _fits(size: int, n_parts: int) -> list[int]:
    """Return the nearest sizes that so many parts divide."""
    lower = size // n_parts * n_parts
    return [n for n in (lower, lower + n_parts) if n]


def _command_line(argv: list[str]) -> typing.Iterator[Layer]:
    """Yield (name, value, origin) for each setting of the command line and of the files it names, in order."""
    args = list(argv)
    while args:
        flag, equals, value = args.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"argument {flag!r} is not a setting: write --section.key value (--help lists them)")
        name = flag[2:].replace("-", "_")
        if name != "config" and name not in SETTINGS:
            raise UserError(f"{flag}: unknown setting{_nearest_flag(name)} (--help lists them)")
        if not equals:
            bare = "true" if SETTINGS.get(name) is bool else BARE.get(name)
            if bare and (not args or args[0].startswith("--")):
                value = bare
            elif args and not args[0].startswith("--"):
                value = args.pop(0)
            else:
                raise UserError(f"{flag}: value is missing; write {flag} VALUE")
        if name == "config":
            yield from _file(Path(value))
        else:
            yield name, value, COMMAND_LINE


def is_unicode(text: str) -> bool:
    """Return whether a text has no bytes of a path that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _nearest_flag(name: str) -> str:
    return nearest(name, ["config", *SETTINGS]).replace("mean ", "mean --").replace("_", "-")


def _file(path: Path) -> list[Layer]:
    """Return (name, value, origin) for each setting in a TOML file, or in a preset: NAME, or configs/NAME.toml.

    An installed package has no folder `configs` beside the user, but its presets.
    """
    if not path.exists() and path.parent in (Path(), Path("configs")):
        preset = presets_dir() / f"{path.name.removesuffix('.toml')}.toml"
        if not preset.is_file():
            names = [found.stem for found in sorted(presets_dir().glob("*.toml"))]
            raise UserError(
                f"--config {path}: there is no such file, nor such a preset{nearest(preset.stem, names)}; there are "
                f"{', '.join(names)}"
            )
        path = preset
    try:
        content = utf8.from_toml(utf8.read(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: cannot be read as TOML: {error}") from error
    layers = []
    for section, entry in content.items():
        pairs = {f"{section}.{key}": value for key, value in entry.items()} if isinstance(entry, dict) else None
        layers += [
            (name, value, str(path)) for name, value in (pairs if pairs is not None else {section: entry}).items()
        ]
    for name, _, _ in layers:
        if name not in SETTINGS:
            raise UserError(f"{path}: {name}: unknown setting{nearest(name, SETTINGS)}")
    return layers


def _preset(task: Any) -> list[Layer]:
    """Return the settings of the task's preset, the TOML file of its name whose `task` it is."""
    tasks = [p.stem for p in sorted(presets_dir().glob("*.toml")) if ("task", p.stem, str(p)) in _file(p)]
    if task not in tasks:
        is_own = str(task).isidentifier() and (Path(__file__).parent / "tasks" / f"{task}.py").is_file()
        if is_own or task == BASE:
            return []
        match = difflib.get_close_matches(str(task), tasks, n=1)
        hint = f"; did you mean {match[0]}?" if match else ""
        raise UserError(
            f"task={task}: unknown task{hint}; there are {', '.join(tasks)}; to add one: jaxlm/tasks/README.md"
        )
    return _file(presets_dir() / f"{task}.toml")


def _convert(name: str, value: Any, origin: str) -> Any:
    """Return `value` as the setting's type; text is parsed if it comes from the command line."""
    on_command_line = origin == COMMAND_LINE
    if name.endswith("_column") and type(value) is int:  # the number of a column, as TOML has it
        value = str(value)
    try:
        return msgspec.convert(value, SETTINGS[name], strict=not on_command_line)
    except msgspec.ValidationError as error:
        shown = f"--{name.replace('_', '-')} {value}" if on_command_line else f"{origin}: {name} = {value!r}"
        rule = str(error).partition(" - at")[0].replace("`", "")
        rule = rule[0].lower() + rule[1:]
        choices = typing.get_args(SETTINGS[name])
        if typing.get_origin(SETTINGS[name]) is Literal:
            rule = f"must be one of {', '.join(choices)}"
        raise UserError(f"{shown}: {rule} (default: {get(Config(), name)!r})") from error


def check_model(config: Config) -> None:
    """Raise UserError for settings that no model can have together."""
    model = config.model
    if model.d_model % model.n_heads:
        lower = model.d_model // model.n_heads * model.n_heads
        fits = " or ".join(str(n) for n in (lower, lower + model.n_heads) if n)
        raise UserError(f"model.d_model={model.d_model} is not divisible by model.n_heads={model.n_heads}; use {fits}")
    if model.positions == "fixed" and model.d_model % 2:
        raise UserError(
            f"model.d_model={model.d_model} is odd, but model.positions=fixed needs pairs of columns; use an even one, "
            "or --model.positions learned"
        )
    if model.positions == "rotary" and model.d_model // model.n_heads % 2:
        size = model.d_model // model.n_heads
        raise UserError(
            f"model.positions=rotary needs an even head size, not model.d_model / model.n_heads = {size}; "
            "change one of these, or use --model.positions learned"
        )
    if model.frozen_layers > model.n_layers:
        raise UserError(
            f"model.frozen_layers={model.frozen_layers}: there are model.n_layers={model.n_layers} blocks; lower it"
        )
    if model.lora_rank:
        named = [name.strip() for name in model.lora_products.split(",")]
        for name in named:
            if name not in LORA_PRODUCTS:
                raise UserError(
                    f"model.lora_products={model.lora_products}: {name!r} is none{nearest(name, LORA_PRODUCTS)}; "
                    f"give some of {','.join(LORA_PRODUCTS)}"
                )
        if model.lora_rank > model.d_model:
            raise UserError(
                f"model.lora_rank={model.lora_rank} is above model.d_model={model.d_model}, the rank that a product "
                "can have; lower it"
            )
        if model.frozen_layers == model.n_layers:
            raise UserError(
                f"model.frozen_layers={model.frozen_layers} leaves no block with adapters that are trained; lower it, "
                "or set model.lora_rank=0"
            )


def _check(config: Config) -> None:
    """Raise UserError for settings that are fine alone but do not go together."""
    train, data = config.train, config.data
    for name in SETTINGS:
        if isinstance(value := get(config, name), str) and not is_unicode(value):
            raise UserError(
                f"{name}={value!r}: has bytes that are not UTF-8, which config.toml cannot hold; "
                "give another name, or a link to it"
            )
    if storage.is_remote(config.run.dir):
        raise UserError(f"run.dir={config.run.dir}: has to be a local folder; only run.checkpoint_dir can be another")
    check_model(config)
    if train.min_learning_rate > train.learning_rate:
        raise UserError(
            f"train.min_learning_rate={train.min_learning_rate} is above train.learning_rate={train.learning_rate}; "
            "lower it"
        )
    end = train.decay_steps or train.max_steps
    if train.schedule == "wsd" and train.warmup_steps + train.stable_steps > end:
        raise UserError(
            f"train.stable_steps={train.stable_steps} and train.warmup_steps={train.warmup_steps} end after the decay, "
            f"at update {end}; lower them, or raise train.{'decay_steps' if train.decay_steps else 'max_steps'}"
        )
    distill = config.distill
    if not distill.soft_weight and not distill.hard_weight and not distill.cosine_weight:
        raise UserError("distill.soft_weight, .hard_weight and .cosine_weight are all 0; raise one of them")
    axes = {f"mesh.{name}": getattr(config.mesh, name) for name in AXES}
    for name, size in axes.items():
        if size == 0:
            raise UserError(f"{name}=0: a mesh has no side of no devices; use 1 or more, or -1 for all that are left")
    if len(free := [name for name, size in axes.items() if size == -1]) > 1:
        raise UserError(f"{'=-1 and '.join(free)}=-1: only one can be what is left; give a number for the others")
    given = (bool(config.distributed.coordinator), config.distributed.n_processes > 0, config.distributed.process >= 0)
    if any(given) and not all(given):
        raise UserError("distributed.coordinator, .n_processes and .process go together; give all three, or none")
    if data.n_labels == 1:
        raise UserError("data.n_labels=1: a classifier has two classes or more; leave it out to have those of the data")
    if data.path and data.hub:
        raise UserError(f"data.path={data.path} and data.hub={data.hub} name two sources; give one of them")
    if data.validation_fraction + data.test_fraction >= 1:
        raise UserError(
            f"data.validation_fraction={data.validation_fraction} and data.test_fraction={data.test_fraction} "
            "leave nothing to train on; their sum must be below 1"
        )


def warnings(config: Config, origins: dict[str, str], of_other_tasks: Iterable[str]) -> list[str]:
    """Return a line for each setting that the user gave and that cannot do in this run what it says."""
    data, given = config.data, config.data.path or config.data.hub
    has_files = data.path or data.validation_path or data.test_path
    tokenizer = Path(config.tokenizer.path)
    reads_vocab_txt = tokenizer.suffix == ".txt" or (
        (tokenizer / "vocab.txt").is_file() and not (tokenizer / "tokenizer.json").is_file()
    )
    without_effect = {
        "data.hub_config": not data.hub and "there is no data.hub",
        "data.format": not has_files and "no local file is read",
        "data.header": not has_files and "no local file is read",
        "data.text_column": not given and "the data is the embedded default",
        "data.label_column": not given and "the data is the embedded default",
        "data.prompt_column": not given and "the data is the embedded default",
        "data.answer_column": not given and "the data is the embedded default",
        "data.validation_path": not given and "the data is the embedded default (give data.path too)",
        "data.test_path": not given and "the data is the embedded default (give data.path too)",
        "data.validation_fraction": data.validation_path and "data.validation_path is given",
        "data.test_fraction": data.test_path and "data.test_path is given",
        "tokenizer.kind": config.tokenizer.path and "tokenizer.path is given",
        "tokenizer.vocab_size": config.tokenizer.path and "tokenizer.path is given",
        "tokenizer.lowercase": (
            (config.tokenizer.path and not reads_vocab_txt and "tokenizer.path is given")
            or (not config.tokenizer.path and config.tokenizer.kind == "bpe" and "tokenizer.kind=bpe keeps case")
        ),
        "model.output_bias": not config.model.tied_embedding and "model.tied_embedding=False",
        "train.stable_steps": config.train.schedule != "wsd" and f"train.schedule={config.train.schedule}",
        "model.frozen_embedding": config.model.lora_rank and "model.lora_rank freezes the base",
        "model.lora_alpha": not config.model.lora_rank and "model.lora_rank=0",
        "model.lora_products": not config.model.lora_rank and "model.lora_rank=0",
        "train.cycle_amplitude": not config.train.cycle_steps and "train.cycle_steps=0",
        "train.reset_optimizer": config.resume in ("", "auto") and "it goes with --resume PATH",
        "train.switch_training": (config.resume in ("", "auto") and not config.init_from)
        and "it goes with --resume PATH and --init-from",
        **{
            f"distill.{name}": not config.distill.teacher and "there is no distill.teacher"
            for name in ("temperature", "soft_weight", "hard_weight", "cosine_weight")
        },
        **dict.fromkeys(of_other_tasks, f"task={config.task} does not use it"),
    }
    presets = str(presets_dir())
    train, model = config.train, config.model
    lines = []
    if (
        (model.frozen_embedding or model.frozen_layers or model.lora_rank)
        and not config.init_from
        and not config.resume
    ):
        lines.append("what is frozen keeps its random start values: there is no base to start from (--init-from)")
    if train.warmup_steps >= train.max_steps:
        lines.append(
            f"train.warmup_steps={train.warmup_steps} is not below train.max_steps={train.max_steps}: "
            "the rate never reaches train.learning_rate"
        )
    if 0 < train.decay_steps <= train.warmup_steps:
        lines.append(
            f"train.decay_steps={train.decay_steps} is not above train.warmup_steps={train.warmup_steps}: "
            "the rate drops to train.min_learning_rate at once after the warmup"
        )
    return lines + [
        f"{name}={get(config, name)} has no effect: {reason}"
        for name, reason in without_effect.items()
        if reason and not origins.get(name, presets).startswith(presets) and get(config, name) != get(Config(), name)
    ]


def _print_help(config: Config, prog: str) -> None:
    """Print the help with the values of the settings as defaults, and exit."""
    import tyro

    width = max(shutil.get_terminal_size().columns, LEAST_COLUMNS)
    if len(f"usage: {prog} [-h] [OPTIONS]") > width:
        prog = prog.rpartition(" ")[2]
    description = terminal.wrapped(
        "Trains a small language model. Settings come in layers, later wins: the preset of the task, then "
        "--config FILE (TOML, or the name of a preset; repeatable) and --section.key VALUE in the order given.",
        width,
    )
    options = (tyro.conf.FlagConversionOff,)
    os.environ["COLUMNS"] = str(width)  # for tyro
    with contextlib.redirect_stdout(terminal.raw(sys.stdout)):  # the help has colours
        tyro.cli(Config, args=["--help"], default=config, prog=prog, description=description, config=options)
    sys.exit(0)


FREEZING = ("model.frozen_embedding", "model.frozen_layers", "model.lora_rank")  # 0 in all: all is trained


def is_whole(settings: Mapping[str, Any]) -> bool:
    """Return whether all is trained, by settings with dotted names."""
    return not any(settings.get(name) for name in FREEZING)
