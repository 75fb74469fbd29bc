"""Faults of the output layers: logits of language models, and classifiers."""

from parity_tests.faults.planting import both, edit, mirrored
from parity_tests.faults.targets import (
    at,
    classifier,
    classifier_head,
    classifier_shares,
    classifier_start,
    embedding,
    head_activation,
    head_prepared,
    lm_head,
)

MLM, COLA, BERT, GPT2 = "batch 0 of mlm", "batch 0 of cola", "BERT of transformers", "GPT-2 of transformers"
LAST = "GPT-2 of transformers that classifies"

FAULTS = [
    *both(
        "one type for both texts: the model of a classifier is not told the token types",
        "two texts",
        edit(
            classifier.jaxlm,
            ("self.base(tokens_BT, key, segments_BT, types_BT)", "self.base(tokens_BT, key, segments_BT)"),
        ),
        edit(classifier.torchlm, ("self.base(tokens_BT, segments_BT, types_BT)", "self.base(tokens_BT, segments_BT)")),
    ),
    *both(
        "types swapped: the first text has the embedding of the second",
        "two texts",
        edit(embedding.jaxlm, ("self.segment[...][types_BT]", "self.segment[...][1 - types_BT]")),
        edit(embedding.torchlm, ("self.segment[types_BT]", "self.segment[1 - types_BT]")),
    ),
    *mirrored(
        "no norm in the head: mlm's output without its LayerNorm", MLM, head_prepared, ("self.layernorm(_x)", "_x")
    ),
    *mirrored(
        "no dense layer in the head: mlm's output without BERT's dense layer",
        BERT,
        head_prepared,
        ("self.activation(_y)", "x"),
    ),
    *mirrored(
        "bias for GPT-2: the setting output_bias is ignored", GPT2, lm_head, ("_x * self.config.output_bias", "_x")
    ),
    *mirrored(
        "no bias in a tied head: a tied output layer without its bias", BERT, lm_head, ("self.config.output_bias", "0")
    ),
    *both(
        "untied: the output layer gives the tied table no gradient",
        GPT2,
        edit(lm_head.jaxlm, ("_linear(_x, table_VD, *_rest)", "_linear(_x, jax.lax.stop_gradient(table_VD), *_rest)")),
        edit(lm_head.torchlm, ("_linear(_x, table_VD, *_rest)", "_linear(_x, table_VD.detach(), *_rest)")),
    ),
    *mirrored(
        "masked positions off by one: logits of mlm taken one position to the right",
        MLM,
        at,
        ("_positions[:, :, None]", "(_positions[:, :, None] + 1) % x_BTD.shape[1]"),
    ),
    *mirrored("last for first: classifier on the last position", COLA, classifier_head, ("_x[:, 0]", "_x[:, -1]")),
    *mirrored(
        "mean for first: classifier on the mean over positions", COLA, classifier_head, ("_x[:, 0]", "_x.mean(axis=1)")
    ),
    *mirrored(
        "last position for last token: causal classifier on the last position, behind the text",
        LAST,
        classifier_head,
        ("_taken.squeeze(1)", "x_BTD[:, -1]"),
    ),
    *mirrored(
        "one before the last token: causal classifier a token early, which has not seen that the text ends",
        LAST,
        classifier_head,
        ("_last[:, None, None]", "_last[:, None, None] - 1"),
    ),
    *mirrored(
        "causal classifier sees what follows: classifier on the last token without a causal mask",
        LAST,
        classifier_start,
        ("_Transformer(config, self.is_causal, *_rest)", "_Transformer(config, False, *_rest)"),
    ),
    *mirrored(
        "tanh for ReLU: DistilBERT's head with BERT's tanh",
        "head of DistilBERT",
        head_activation,
        ("self.config.head_dense == 'bert'", "True"),
    ),
    *mirrored(
        "pads in the mean: a classifier's mean over a text counts the pads behind it",
        "mean of ModernBERT",
        classifier_shares,
        ("tokens_BT != self.base.config.pad_id", "tokens_BT == tokens_BT"),
    ),
    *mirrored(
        "mean of other texts: a classifier's mean over a packed text counts those beside it",
        "packed mean of sst2",
        classifier_shares,
        ("segments_BT[:, None] == _y", "(segments_BT[:, None] == _y) | (segments_BT[:, None] != _y)"),
    ),
    *mirrored(
        "late for mean: a classifier takes the mean of hidden states in place of that of logits",
        "mean of EuroBERT",
        classifier_head,
        ("self.config.pooling == 'late'", "False"),
    ),
    *mirrored(
        "no GELU in UltraBERT's head: its second layer is not followed by GELU",
        "head of UltraBERT",
        head_prepared,
        (
            "self.activation(getattr(self, _name)(_x))",
            "(self.dense2(_x) if _name == 'dense2' else self.activation(getattr(self, _name)(_x)))",
        ),
    ),
    *mirrored(
        "no norm in a causal head: Ettin's decoder without the layers before its output",
        "head of Ettin's decoder",
        head_prepared,
        ("self.layernorm(_x)", "self.layernorm(_x) * 0 + _x"),  # which leaves its parameters a gradient,
    ),
]
