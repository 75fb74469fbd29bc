"""The models of transformers that are read and written. families.toml has what each calls its settings and modules."""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.config import BASE

CLASSES = "sst2"  # the task of a model that classifies, whatever its classes are
VALUE = "regress"  # likewise, if it predicts a number: its one output is called as those of classes
SETS = "multilabel"  # likewise, if a text may have several classes
TAGS = "tag"
CLASS_NAMES = {
    **{"mlm": "ForMaskedLM", "gpt": "ForCausalLM", CLASSES: "ForSequenceClassification"},
    **{TAGS: "ForTokenClassification", BASE: "Model"},
}
# Ends of the names of classes whose output layers are not read, although their tensors may be called as others are.
OTHER_CLASSES = ("ForMultipleChoice", "ForQuestionAnswering")
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
GELU = {"gelu": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
# Neither weights of the model nor missed: constants, the sentence pairs of BERT's training, a layer that only it uses.
UNUSED = (
    r"(position_ids|token_type_ids|\.attn\.bias|\.attn\.masked_bias|rotary_emb\.\w*inv_freq)$|^cls\.seq_relationship\."
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What models of one kind are called, and what they have."""

    type: str  # model_type in config.json
    name: str  # begins the names of its classes
    prefix: str  # of the base model, where there is an output layer
    dropouts: list[str]  # keys of rates of dropout
    keys: dict[str, str]  # of config.json, by ours
    settings: dict[str, Any]  # ours, of section model, the same for all of them
    modules: dict[str, str]  # of the base model, by ours
    heads: dict[str, dict[str, str]]  # by task: modules of the output layer, by ours; the first that fits is read
    output: str  # the module whose weight is the token table if tied, and whose bias that of the head, a second time
    is_causal: bool = False
    activation: str = "gelu"  # where config.json does not tell
    epsilon: float = 1e-12  # likewise
    pad_id: int = 0  # likewise
    has_positions_behind_pad: bool = False  # position 0 is row pad_id + 1 of the table
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)  # further keys, as FIXED
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)  # values of keys that config.json does not have
    transposed: str = "^$"  # weights that are [in, out]
    bases: list[float] = dataclasses.field(default_factory=list)  # rotary: of global and of local layers, if not told
    window: str = ""  # the key of the width of local layers
    poolings: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # values of classifier_pooling, the default first
    old_pooling: str = ""  # what that key was called before
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)  # how other versions begin names, as patterns
    needs_tokens: bool = False  # config.json must not say that there is no special token of a kind
    read: str = ""  # further keys that are read
    unused: str = ""  # further keys that change no output

    def module(self, ours: str) -> str:
        """Return the name of a module of the base model."""
        return f"{self.prefix}{self.modules[ours]}"

    def class_name(self, task: str) -> str:
        """Return the name of the class with the output layer of a task."""
        return "GPT2LMHeadModel" if (self.name, task) == ("GPT2", "gpt") else f"{self.name}{CLASS_NAMES[task]}"

    @property
    def segments(self) -> str:
        """The table of token types, "" if there is none."""
        return f"{self.module('embedding.segment')}.weight" if "embedding.segment" in self.modules else ""

    def first_position(self, pad_id: int) -> int:
        """Return the row of the first token in the table of positions."""
        return pad_id + 1 if self.has_positions_behind_pad else 0


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries with those of `own` in their place, table by table but for `heads`; "" takes one out."""
    result = dict(base)
    for name, value in own.items():
        is_table = isinstance(value, dict) and name != "heads"
        result[name] = _merged(base.get(name, {}), value) if is_table else value
    return {name: value for name, value in result.items() if value != "" and name != "like"}


_FILE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FAMILIES: dict[str, Family] = {}
_entries: dict[str, dict[str, Any]] = {"": {}}
for _kind, _own in _FILE["families"].items():
    _entries[_kind] = _merged(_entries[_own.get("like", "")], _own)
    FAMILIES[_kind] = Family(type=_kind, **_entries[_kind])
UNUSED_KEYS = frozenset(_FILE["unused_keys"].split())
