"""Tokenizers as Llama, Qwen3, ModernBERT, EuroBERT and SmolLM2 have them, trained here, against AutoTokenizer."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxlm.config import TokenizerConfig
from jaxlm.data import chat, tokenization
from jaxlm.errors import UserError

WORDS = [
    "The",
    " cat's",
    "  ",
    "\n\n",
    "\t",
    "naïve",
    "e\u0301",
    "\u4e2d\u6587",
    "\u0434\u0430",
    "\U0001f642",
    "\U0001f468\u200d\U0001f469",
    "12345",
    "3.14",
    "_x_",
    "¿",
    "\u00a0",
    "\u3000",
]
WORDS += [
    "don't",
    "I'LL",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "[MASK]",
    "[CLS]",
    "<|im_start|>user",
    "\x00",
    "\u200b",
    "ﬁ",
    "\r\n",
    "…",
    "#!/",
    "مرحبا",
]
TEXTS = ["", " ", *WORDS, *(a + b for a, b in itertools.product(WORDS, WORDS[::2]))][:500]
# Of the published files.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
KINDS = {  # special tokens, class, template of what is around a text, and the tokens before and after it
    "llama 3": (
        ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
        "PreTrainedTokenizerFast",
        "<|begin_of_text|> $A",
    ),
    # As its file says. LlamaTokenizer of transformers 5 has other steps, which take a text's first blank for theirs.
    "llama 2": (("<unk>", "<s>", "</s>"), "PreTrainedTokenizerFast", "<s> $A"),
    "qwen3": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "Qwen2Tokenizer", ""),
    "smollm2": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "GPT2Tokenizer", ""),
    "eurobert": (  # its pad ends texts as well
        ("<|begin_of_text|>", "<|end_of_text|>", "<|mask|>", "<|reserved_special_token_0|>"),
        "PreTrainedTokenizerFast",
        "<|begin_of_text|> $A <|end_of_text|>",
    ),
    "modernbert": (
        ("<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"),
        "PreTrainedTokenizerFast",
        "[CLS] $A [SEP]",
    ),
}


def write(kind: str, folder: Path) -> None:
    """Write a tokenizer as models of a kind have theirs, with a small vocabulary."""
    specials, name, template = KINDS[kind]
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama 2", unk_token="<unk>" if kind == "llama 2" else None))
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("smollm2", "modernbert"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "llama 2":
        letters = [f"<0x{i:02X}>" for i in range(256)]
    elif kind in ("llama 3", "eurobert", "qwen3"):
        split = pre_tokenizers.Split(Regex(QWEN if kind == "qwen3" else LLAMA3), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    elif kind == "smollm2":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), in_bytes])
    else:
        tokenizer.pre_tokenizer = in_bytes
    tokenizer.decoder = decoders.ByteLevel()
    if kind in ("qwen3", "modernbert"):
        tokenizer.normalizer = normalizers.NFC()
    if kind == "llama 2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(pieces)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*specials, *letters] if kind == "llama 2" else list(specials),
        initial_alphabet=[] if kind == "llama 2" else letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The cat's mat. They don't like naïve cats, 12 of them."] * 9, trainer)
    if kind == "modernbert":
        tokenizer.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    if template:
        around = [(token, tokenizer.token_to_id(token)) for token in template.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values: dict[str, Any] = {"tokenizer_class": name, "model_max_length": 99}
    roles = {
        "modernbert": {"cls": 2, "sep": 3, "pad": 4, "mask": 5, "unk": 1},
        "llama 2": {"unk": 0, "bos": 1, "eos": 2},
    }
    roles |= {
        "llama 3": {"bos": 0, "eos": 1},
        "eurobert": {"bos": 0, "eos": 1, "pad": 1, "mask": 2},
        "qwen3": {"eos": 2, "pad": 0},
        "smollm2": {"bos": 1, "eos": 2, "pad": 2, "unk": 0},
    }
    values |= {f"{role}_token": specials[i] for role, i in roles[kind].items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = tokenization.read(TokenizerConfig(path=str(tmp_path), marks="file"))
    around = tokenization.marks_of_file(ours)
    before, after = ([around[name]] if name in around else [] for name in ("before", "after"))
    assert len(TEXTS) > 200
    ours.encode_special_tokens = False  # as within a chat template; else special tokens in a text are text
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False), repr(text)
        assert [*before, *ids, *after] == theirs.encode(text), repr(text)
    ours.encode_special_tokens = True
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), repr(text)


TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@pytest.mark.parametrize("place", ["config", "file", "list"])
def test_a_chat_template_makes_what_transformers_makes(place: str, tmp_path: Path) -> None:
    write("smollm2", tmp_path)
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match="^--chat: the model has no chat template"):
        chat.find(str(tmp_path))
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    else:
        other = {"name": "tool_use", "template": "x"}
        told = TEMPLATE if place == "config" else [other, {"name": "default", "template": TEMPLATE}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | {"chat_template": told}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello", "  two\n lines ", "<|im_end|> \u4e2d\u6587 {{ 1 }}"):
        messages = [{"role": "user", "content": text}]
        want = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert chat.rendered(*chat.find(str(tmp_path))[:1], text, chat.find(str(tmp_path))[1]) == want


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "{% if %}"]
)
def test_a_template_that_fails_or_reaches_out_is_one_line(template: str) -> None:
    with pytest.raises(UserError, match="^--chat: the model's chat template fails: .*; leave --chat out$"):
        chat.rendered(template, "x", {})
