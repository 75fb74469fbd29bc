"""The models of transformers that are read and written. families.toml has what each calls its settings and modules."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from jaxlm.config import BASE

CLASSES = "sst2"  # the task of a model that classifies, whatever its classes are
TAGS = "tag"
CLASS_NAMES = {
    **{"mlm": "ForMaskedLM", "gpt": "LMHeadModel", CLASSES: "ForSequenceClassification"},
    **{TAGS: "ForTokenClassification", BASE: "Model"},
}
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
UNUSED = r"(position_ids|token_type_ids|\.attn\.bias|\.attn\.masked_bias)$|^cls\.seq_relationship\."


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
    output: str  # the module whose weight is the token table, and whose bias that of the head, a second time
    is_causal: bool = False
    activation: str = "gelu"  # where config.json does not tell
    epsilon: float = 1e-12  # likewise
    pad_id: int = 0  # likewise
    has_positions_behind_pad: bool = False  # position 0 is row pad_id + 1 of the table
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)  # further keys, as FIXED
    transposed: str = "^$"  # weights that are [in, out]

    def module(self, ours: str) -> str:
        """Return the name of a module of the base model."""
        return f"{self.prefix}{self.modules[ours]}"

    @property
    def segments(self) -> str:
        """The table of token types, "" if there is none."""
        return f"{self.module('embedding.segment')}.weight" if "embedding.segment" in self.modules else ""

    def first_position(self, pad_id: int) -> int:
        """Return the row of the first token in the table of positions."""
        return pad_id + 1 if self.has_positions_behind_pad else 0


_FILE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
FAMILIES = {kind: Family(type=kind, **entries) for kind, entries in _FILE["families"].items()}
UNUSED_KEYS = frozenset(_FILE["unused_keys"].split())
