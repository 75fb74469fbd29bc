"""Faults of embeddings: what of a text is in its vector, and which texts are its negatives."""

from parity_tests.faults.planting import both, edit, mirrored
from parity_tests.faults.targets import embed_loss, embeddings

BERT = "BERT of transformers that embeds"

FAULTS = [
    *mirrored(
        "mean over pads: the mean of a text has its padding", BERT, embeddings, ("_at <= last_B[:, None]", "_at >= 0")
    ),
    *mirrored(
        "mean without the end: the last token is left out",
        BERT,
        embeddings,
        ("_at <= last_B[:, None]", "_at < last_B[:, None]"),
    ),
    *both(
        "vectors of any length: embeddings are not normalised",
        BERT,
        edit(embeddings.jaxlm, ("_x / jnp.maximum(*_rest)", "_x")),
        edit(embeddings.torchlm, ("nn.functional.normalize(_x, dim=1)", "_x")),
    ),
    *mirrored(
        "texts of pairs: each pair is to find its text, not each text its pair",
        BERT,
        embed_loss,
        ("_scale * _text @ _pair.T", "_scale * _pair @ _text.T"),
    ),
    *mirrored(
        "scale of one: cosines go into the softmax as they are",
        BERT,
        embed_loss,
        ("_scale * _text @ _pair.T", "_text @ _pair.T"),
    ),
    *both(
        "filler is a negative: texts that fill up a batch count as negatives",
        BERT,
        edit(embed_loss.jaxlm, ("_where(_is_real, _scores, -1e9)", "_scores")),
        edit(embed_loss.torchlm, ("torch.where(_is_real, _scores, -1e9)", "_scores")),
    ),
]
