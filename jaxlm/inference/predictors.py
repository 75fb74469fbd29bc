"""Predictors, which answer texts with a trained model: they fill masks, continue, reply, classify, tag and embed."""

import dataclasses
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from tokenizers import Tokenizer, decoders

from jaxlm import heads
from jaxlm.config import EMBED
from jaxlm.data import chat, tagged, tags, tokenization
from jaxlm.data.samples import IGNORED, ends, marks, separator
from jaxlm.data.sources import PROMPT_END
from jaxlm.errors import UserError
from jaxlm.inference import attention_maps, load
from jaxlm.inference.decode import Decoder, Sampling
from jaxlm.inference.load import LoadedModel
from jaxlm.io import utf8
from jaxlm.model import Transformer
from jaxlm.tasks.parameters import model_kind

N_ROWS = 16  # largest batch of texts
N_MASKS = 16  # masks that are predicted together, from any of the texts
MOST_PADDED = 1024  # texts are padded to model.seq_len up to this length; longer models also have halves of it
STREAMED = 4  # tokens that are decoded before the next piece is streamed
ENDINGS = {
    "article": "the end of the text",
    "length": "as many tokens as asked for",
    "positions": "the model has no more positions",
}
Answer = dict[str, Any]  # what --json prints for a text


class Predictor:
    """A trained model that answers texts. Called with some, it returns an answer for each; see Answer in USING.md.

    Raises UserError for a text that it cannot take, and for an option out of range.
    """

    wants = ""  # what it needs, for messages
    options: dict[str, Any] = {}  # with their defaults
    __call__: Callable[..., list[Answer]]

    def __init__(self, trained: LoadedModel):
        self.trained, self.tokenizer, self.model = trained, trained.tokenizer, trained.config.model
        self.has_attention = isinstance(trained.model.base, Transformer)
        self.is_byte_level = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        self.is_single = tokenization.is_single(self.tokenizer)
        self.specials = tokenization.specials_of(self.tokenizer, trained.config.tokenizer)
        self.takes_two = trained.task is not None and bool(trained.config.data.pair_column)
        self.empty = utf8.TAB if self.takes_two else ""  # by which each shape is compiled
        self.compiled_attention = jax.jit(attention_maps.weights)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, as the model gets them."""
        raise NotImplementedError

    def attention(self, text: str, layer: int, head: int) -> Answer:
        """Return the tokens of a text, and the attention weights from each to each; `layer` and `head` count from 0."""
        if not self.has_attention:
            raise UserError(f"{self.trained}: its base is no Transformer of model.py, so it has no attention to show")
        check("layer", layer, 0 <= layer < self.model.n_layers, f"0 to {self.model.n_layers - 1}")
        check("head", head, 0 <= head < self.model.n_heads, f"0 to {self.model.n_heads - 1}")
        ids = self.encode_any(text)
        ids_BT = self._padded([ids])
        types = self._types([text], ids_BT).values()
        (weights_TT,) = self.compiled_attention(self.trained.model.base, ids_BT, layer, head, *types)
        weights = np.asarray(weights_TT, np.float64)[: len(ids), : len(ids)].round(6).tolist()
        tokens = [self._token(i) for i in ids]
        return {**self.named(text), "layer": layer, "head": head, "tokens": tokens, "weights": weights}

    def texts(self, text: str) -> list[str]:
        """Return the input text, or for a model of two texts both of them, split at the tab. Raises UserError."""
        if not self.takes_two:
            return [text]
        first, tab, second = text.partition(utf8.TAB)
        if not tab:
            raise UserError("the model compares two texts; give the second with --pair, or behind a tab")
        return [first, second]

    def take_two(self) -> None:
        """Read two texts from now on: a public model does not say whether it was trained on one or two.

        Raises UserError for a run of one text.
        """
        if not self.takes_two and not (isinstance(self, Predict) and self.trained.start.is_public()):
            raise UserError(f"--pair: {self.trained} reads one text; leave --pair out")
        self.takes_two, self.empty = True, utf8.TAB

    def named(self, text: str) -> Answer:
        """Return the text, or both texts, as they are in answers."""
        return dict(zip(("text", "pair"), self.texts(text), strict=False))

    def _types(self, texts: Sequence[str], ids_BT: np.ndarray) -> dict[str, np.ndarray]:
        """Return the token types of texts, as an entry of the batch; empty if the model has no types."""
        return {}

    def encode_any(self, text: str) -> list[int]:
        """Return the token ids of a text, also of one that cannot be answered, such as one without a mask."""
        return self.encode(text)

    def shown(self, answer: Answer) -> str:
        """Return an answer as readable text."""
        raise NotImplementedError

    def _ids(self, text: str) -> list[int]:
        try:
            utf8.check(text)
        except ValueError as error:
            raise UserError(f"the text is {error}") from None
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _checked(self, ids: list[int]) -> list[int]:
        if len(ids) > self.model.seq_len:
            raise UserError(
                f"the text has {len(ids)} tokens, with special ones, but the model takes {self.model.seq_len} "
                "(model.seq_len); shorten it"
            )
        return ids

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[Sequence[str], np.ndarray, np.ndarray]]:
        """Yield batches of texts: ids [B, T] and last positions [B], padded to one of few shapes."""
        all_ids = [self.encode(text) for text in texts]
        for first in range(0, len(texts), N_ROWS):
            rows = _filled_up(all_ids[first : first + N_ROWS])
            last_B = np.array([len(ids) - 1 for ids in rows], np.int32)
            yield texts[first : first + N_ROWS], self._padded(rows), last_B

    def _padded(self, rows: Sequence[list[int]]) -> np.ndarray:
        longest, length = max(map(len, rows)), self.model.seq_len
        while length > MOST_PADDED and length >= 2 * longest:  # a shape for each length would have to be compiled
            length //= 2
        ids_BT = np.full((len(rows), length), max(self.model.pad_id, 0), np.int32)
        for row, ids in zip(ids_BT, rows, strict=True):
            row[: len(ids)] = ids
        return ids_BT

    def _token(self, i: int) -> str:
        return self.tokenizer.decode([i], skip_special_tokens=False)


class FillMasks(Predictor):
    """Predicts the words at [MASK]."""

    wants = "a text with [MASK] for each word to predict"
    options = {"top_k": 5}

    def __init__(self, trained: LoadedModel):
        super().__init__(trained)
        self.mask = self.specials["mask"]
        self.compiled_base = jax.jit(lambda model, ids_BT: model.base(ids_BT))
        self.compiled_head = jax.jit(_probabilities)

    def __call__(self, texts: Sequence[str], top_k: int = 5) -> list[Answer]:
        """`top_k` is the number of guesses for each mask."""
        check("top_k", top_k, 1 <= top_k <= self.model.vocab_size, f"1 to {self.model.vocab_size}")
        answers = []
        for some, ids_BT, _ in self._batches(texts):
            x_BTD = self.compiled_base(self.trained.model, ids_BT)
            guesses = self._guesses(x_BTD, np.argwhere(ids_BT == self.mask), top_k)
            for text, ids_T in zip(some, ids_BT, strict=False):
                masks = list(itertools.islice(guesses, int((ids_T == self.mask).sum())))
                filled = self._filled(text, [guesses[0]["token"] for guesses in masks])
                answers.append({"text": text, "filled": filled, "masks": masks})
        return answers

    def encode(self, text: str) -> list[int]:
        if len(self._parts(text)) == 1:
            raise UserError("there is no [MASK] in the text; put one where a word is to be guessed")
        return self.encode_any(text)

    def encode_any(self, text: str) -> list[int]:
        parts = self._parts(text)
        ids = itertools.chain.from_iterable([*self._ids(part), self.mask] for part in parts[:-1])
        first, last = ([self.specials[name]] if name in self.specials else [] for name in ends(self.trained.config))
        return self._checked([*first, *ids, *self._ids(parts[-1]), *last])

    def shown(self, answer: Answer) -> str:
        lines = [answer["filled"]]
        for i, guesses in enumerate(answer["masks"], start=1):
            told = "  ".join(f"{guess['token'].strip()} {guess['probability']:.3f}" for guess in guesses)
            lines.append(f"  [MASK]{f' {i}' if len(answer['masks']) > 1 else ''}: {told}")
        return "\n".join(lines)

    def _parts(self, text: str) -> list[str]:
        """Return the parts of the text between its masks, which may have the tokenizer's name or [MASK]."""
        first, *others = tokenization.NAMES["mask"]
        for name in others:
            text = text.replace(name, first)
        *before, last = text.split(first)
        # A byte-level token has the space before its word in it, and a mask stands for the whole token; but a public
        # tokenizer may say that the space is a token of its own.
        has_space = self.is_byte_level and not self.is_single
        if self.trained.config.tokenizer.marks == "file":
            has_space = has_space and self.tokenizer.get_added_tokens_decoder()[self.mask].lstrip
        return [part.rstrip() if has_space else part for part in before] + [last]

    def _guesses(self, x_BTD: Array, places_N2: np.ndarray, top_k: int) -> Iterator[list[Answer]]:
        """Yield the likeliest tokens at each place (row, position)."""
        for first in range(0, len(places_N2), N_MASKS):
            some = places_N2[first : first + N_MASKS]
            filled_up = np.resize(some, (N_MASKS, 2)).astype(np.int32)
            for p_V in np.asarray(self.compiled_head(self.trained.model, x_BTD, filled_up))[: len(some)]:
                ids = np.argsort(-p_V, kind="stable")[:top_k].tolist()
                yield [{"token": self._token(i), "id": i, "probability": float(p_V[i])} for i in ids]

    def _filled(self, text: str, tokens: list[str]) -> str:
        first, *rest = self._parts(text)
        for token, part in zip(tokens, rest, strict=True):
            continues_word = token.startswith("##")
            first = (first.rstrip() if continues_word else first) + token.removeprefix("##") + part
        return first


class Look(Predictor):
    """Shows the attention of a model without an output layer, which cannot answer."""

    wants = "a text"

    def __call__(self, texts: Sequence[str]) -> list[Answer]:
        raise UserError(load.no_output(self.trained.start))

    def encode(self, text: str) -> list[int]:
        return self._checked(self._framed(*map(self._ids, self.texts(text))))

    def _framed(self, *parts: Sequence[int]) -> list[int]:
        """Return the ids of a text, or of two, with the special tokens around them."""
        first, last = ([] if i is None else [i] for i in marks(self.trained.config, self.specials))
        begins = [first, separator(self.trained.config, self.specials)]
        return [
            *itertools.chain.from_iterable([*begin, *ids, *last] for begin, ids in zip(begins, parts, strict=False))
        ]

    def _types(self, texts: Sequence[str], ids_BT: np.ndarray) -> dict[str, np.ndarray]:
        if not self.takes_two or self.model.segments < 2:
            return {}
        types_BT = np.zeros_like(ids_BT)
        n_end = int(marks(self.trained.config, self.specials)[1] is not None)
        for row, text in zip(types_BT, texts, strict=False):
            n = len(self.encode(text))
            row[n - n_end - len(self._ids(self.texts(text)[1])) : n] = 1
        return {"types": types_BT}


class Embed(Look):
    """Returns the embedding of a text, by any model with a base; its output layer is not used.

    `pooling` is as in model.pooling, "": that of the model, and where it has none, the last token of a causal model and
    else the mean. What is longer than the model takes is cut.
    """

    wants = "a text to embed"

    def __init__(self, trained: LoadedModel, pooling: str = ""):
        super().__init__(trained)
        is_causal = model_kind(trained.config.task) == "causal" or self.model.pooling == "last"
        is_own = not is_causal or self.model.pooling == "last" or trained.config.tokenizer.marks == "file"
        self.marks = marks(trained.config, self.specials) if is_own else (self.specials["article"],) * 2
        has_own = trained.config.task == EMBED
        self.pooling = pooling or (self.model.pooling if has_own else "last" if is_causal else "mean")
        self.compiled = jax.jit(
            lambda model, ids_BT, last_B: heads.embeddings(model.base(ids_BT), last_B, self.pooling)
        )

    def __call__(self, texts: Sequence[str]) -> list[Answer]:
        vectors = self.vectors(texts, is_short=False).astype(np.float64).tolist()
        return [{"text": text, "vector": vector} for text, vector in zip(texts, vectors, strict=True)]

    def vectors(self, texts: Sequence[str], is_short: bool = True) -> np.ndarray:
        """Return the embeddings of texts, float32 [N, D] of length 1.

        Texts of like length go together. If rows are `is_short`, they are as long as the next power of two, which
        compiles a few shapes; else as long as the model takes.
        """
        all_ids = [self.encode(text) for text in texts]
        order = np.argsort([len(ids) for ids in all_ids], kind="stable")
        found_ND = np.zeros((len(texts), self.model.d_model), np.float32)
        for first in range(0, len(texts), N_ROWS):
            some = order[first : first + N_ROWS]
            rows = _filled_up([all_ids[i] for i in some])
            longest = max(8, 1 << (len(rows[-1]) - 1).bit_length()) if is_short else self.model.seq_len
            last_B = np.array([len(ids) - 1 for ids in rows], np.int32)
            vectors_BD = self.compiled(self.trained.model, self._padded(rows)[:, :longest], last_B)
            found_ND[some] = np.asarray(vectors_BD)[: len(some)]
        return found_ND

    def nearest(self, query: str, texts: Sequence[str], top_k: int) -> list[Answer]:
        """Return the texts whose embeddings have the largest cosines with that of the query, the largest first."""
        vectors_ND = self.vectors([query, *texts])
        cosines_N = vectors_ND[1:] @ vectors_ND[0]
        order = np.argsort(-cosines_N, kind="stable")[:top_k].tolist()
        return [{"query": query, "text": texts[i], "similarity": float(cosines_N[i])} for i in order]

    def encode(self, text: str) -> list[int]:
        first, last = ([] if i is None else [i] for i in self.marks)
        ids = self._ids(text)[: self.model.seq_len - len(first) - len(last)]
        return [*first, *ids, *last] or [self.specials["article"]]

    def shown(self, answer: Answer) -> str:
        first = "  ".join(f"{x:.4f}" for x in answer["vector"][:4])
        return f"{first}  ... ({len(answer['vector'])} numbers)  {answer['text']}"


class Predict(Look):
    """Returns the prediction of a task for a text."""

    def __init__(self, trained: LoadedModel):
        super().__init__(trained)
        self.compiled = jax.jit(self._outputs)

    def __call__(self, texts: Sequence[str]) -> list[Answer]:
        answers = []
        for some, ids_BT, last_B in self._batches(texts):
            batch = {"tokens": ids_BT, "labels": np.full_like(last_B, IGNORED)}
            batch |= {"last": last_B} if self.model.pooling == "last" else {}
            batch |= self._types(some, ids_BT)
            outputs = np.asarray(self.compiled(self.trained.model, batch))
            answers += [
                {**self.named(text), **self._answer(output)} for text, output in zip(some, outputs, strict=False)
            ]
        return answers

    def shown(self, answer: Answer) -> str:
        told = {name: x for name, x in answer.items() if name not in ("text", "pair")}
        values = {name: f"{x:.4g}" if isinstance(x, float) else x for name, x in told.items()}
        return f"{'  '.join(f'{name} {x}' for name, x in values.items())}  {_shown_texts(answer)}"

    def _outputs(self, model: Any, batch: dict[str, Array]) -> Array:
        return self.trained.task.predict(model, batch)

    def _answer(self, output: np.ndarray) -> Answer:
        # A task may answer with NumPy numbers and arrays, which JSON lacks.
        answer = json.dumps(self.trained.task.answer(output), default=lambda x: np.asarray(x).tolist())
        return dict(json.loads(answer))


class Classify(Predict):
    """Classifies a text."""

    wants = "a text to classify"

    def _outputs(self, model: Any, batch: dict[str, Array]) -> Array:
        return jax.nn.softmax(self.trained.task.logits(model, batch))

    def _answer(self, output: np.ndarray) -> Answer:
        # The original's head has an output for each token of the vocabulary; the others are not classes.
        task, i, p = self.trained.task, int(output.argmax()), output[: len(self.trained.task.classes)].tolist()
        named = p if task.has_numbers() else dict(zip(task.classes, p, strict=True))
        return {"label": task.label(i) if i < len(p) else None, "probabilities": named}

    def shown(self, answer: Answer) -> str:
        p = answer["probabilities"]
        told = "  ".join(f"{name}: {x:.3f}" for name, x in (p.items() if isinstance(p, dict) else enumerate(p)))
        label = "none" if answer["label"] is None else answer["label"]
        return f"label {label}  ({told})  {_shown_texts(answer)}"


class Labels(Predict):
    """Predicts the labels of a text: those whose probability is above the threshold."""

    wants = "a text to label"
    options = {"threshold": 0.5}

    def __call__(self, texts: Sequence[str], threshold: float = 0.5) -> list[Answer]:
        check("threshold", threshold, 0 <= threshold <= 1, "0 to 1")
        answers = super().__call__(texts)
        for answer in answers:
            answer["labels"] = [name for name, p in answer["probabilities"].items() if p > threshold]
        return answers

    def shown(self, answer: Answer) -> str:
        told = "  ".join(f"{name}: {x:.3f}" for name, x in answer["probabilities"].items())
        return f"labels {', '.join(answer['labels']) or 'none'}  ({told})  {_shown_texts(answer)}"


class Tag(Look):
    """Finds the spans that a tagger is trained to mark. A text of any length is read in windows."""

    wants = "a text to find names in"

    def __init__(self, trained: LoadedModel):
        super().__init__(trained)
        self.n_before = int(marks(trained.config, self.specials)[0] is not None)
        self.content = self.model.seq_len - len(self._framed([]))
        self.compiled = jax.jit(lambda model, ids_BT, at_BT: jax.nn.softmax(model(ids_BT, None, at_BT)))

    def __call__(self, texts: Sequence[str]) -> list[Answer]:
        words = [list(tags.WORD.finditer(text)) for text in texts]
        windows = [window for some in words for window in self._windows([match[0] for match in some])]
        p_NC: list[np.ndarray] = []  # one for each window of words
        for first in range(0, len(windows), N_ROWS):
            rows = _filled_up(windows[first : first + N_ROWS])
            ids_BT, at_BT = (self._padded([list(row[i]) for row in rows]) for i in (0, 1))
            for (_, at), p_TC in zip(
                windows[first:], np.asarray(self.compiled(self.trained.model, ids_BT, at_BT)), strict=False
            ):
                p_NC += [p_C for k, p_C in zip(at, p_TC, strict=False)]
        found = iter(p_NC)
        return [self._answer(text, some, [next(found) for _ in some]) for text, some in zip(texts, words, strict=True)]

    def encode(self, text: str) -> list[int]:
        return self._ids(text)

    def encode_any(self, text: str) -> list[int]:
        return super().encode(text)

    def shown(self, answer: Answer) -> str:
        lines = [
            f"  {x['type']}  {x['text']}  ({x['start']} to {x['end']}, {x['probability']:.3f})" for x in answer["spans"]
        ]
        return "\n".join([answer["text"], *(lines or ["  none"])])

    def _windows(self, words: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield the ids of each window of a text, and the position of the first token of each of its words."""
        nothing = [self.specials.get("unknown", 0)]
        all_ids = [self._ids(f" {word}") or nothing for word in words]
        begins = tagged.windows([len(ids) for ids in all_ids], self.content)
        for begin, end in itertools.pairwise([*begins, len(words)]):
            some = all_ids[begin:end]
            ids = list(itertools.chain.from_iterable(some))[: self.content]
            yield self._framed(ids), np.cumsum([self.n_before, *map(len, some)])[:-1].tolist()

    def _answer(self, text: str, words: Sequence[re.Match[str]], p_NC: Sequence[np.ndarray]) -> Answer:
        task: Any = self.trained.task
        best = [task.tags[int(p_C.argmax())] for p_C in p_NC]
        found = []
        for kind, first, end in tags.spans(best):
            a, b = words[first].start(), words[end - 1].end()
            p = min(float(p_C.max()) for p_C in p_NC[first:end])
            found.append({"type": kind, "start": a, "end": b, "text": text[a:b], "probability": p})
        return {"text": text, "spans": found}


@dataclasses.dataclass(eq=False)
class Continuation:
    """A prompt that is being continued."""

    text: str
    prompt: list[int]
    options: dict[str, Any]  # all of them, with defaults
    told: str = ""  # the text that was sent already


class Continue(Predictor):
    """Continues prompts."""

    wants = "the beginning of a text"
    between = ""  # text between a prompt and its continuation
    options = {"max_new_tokens": 100, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "seed": None}

    def __init__(self, trained: LoadedModel):
        super().__init__(trained)
        self.stop = self.specials["article"]
        has_own = trained.config.tokenizer.marks == "file" and not self.between
        before = self.specials.get("before") if has_own else self.stop
        self.before = [] if before is None else [before]
        self.stops = (self.stop, *map(int, filter(None, trained.config.tokenizer.end_ids.split(","))))
        self.decoder = Decoder(trained.model, self.stops)

    def __call__(self, texts: Sequence[str], **options: Any) -> list[Answer]:
        """Continue each text as if it were alone. `options` as in `stream`; the default seed is random."""
        options = self.checked(options)
        begun = [Continuation(text, self.encode(text), options) for text in texts]
        answers = []
        for first in range(0, len(texts), N_ROWS):
            some = begun[first : first + N_ROWS]
            *_, (made, _) = self._made(_filled_up(some), options["max_new_tokens"])
            answers += [self._answer(one, ids) for one, ids in zip(some, made, strict=False)]
        return answers

    def stream(self, text: str, **options: Any) -> Iterator[str | Answer]:
        """Yield the continuation of a text in pieces while it is decoded, and then the answer.

        `max_new_tokens`: most tokens to make. `temperature`: what logits are divided by; 0 is the likeliest token,
        always. `top_k`: draw from so many likeliest tokens; 0: from all. `top_p`: draw from the fewest likeliest tokens
        whose probabilities sum to this. `seed`: of the random numbers.
        """
        begun = Continuation(text, self.encode(text), self.checked(options))
        for (ids,), is_over in self._made([begun], STREAMED):
            yield from self.pieces(begun, ids, is_over)

    def encode(self, text: str) -> list[int]:
        return self._checked([*self.before, *self._ids(text + self.between)] or [self.stop])

    def shown(self, answer: Answer) -> str:
        return f"{answer['prompt']}{self.between}{answer['continuation']}"

    def pieces(self, begun: Continuation, ids: list[int], is_over: bool) -> Iterator[str | Answer]:
        """Yield the new final text of a continuation whose tokens so far are `ids`; at its end, also the answer."""
        text = self._text(begun, ids)
        ready = text if is_over else self._ready(text)
        if ready.startswith(begun.told) and ready != begun.told:
            yield ready[len(begun.told) :]
            begun.told = ready
        if is_over:
            yield self._answer(begun, ids)

    def _made(self, begun: Sequence[Continuation], n_at_once: int) -> Iterator[tuple[list[list[int]], bool]]:
        """Yield the tokens so far of each continuation, and whether it has ended. All have the same options."""
        prompts, options = [one.prompt for one in begun], begun[0].options
        sampling = Sampling(*([options[name]] * len(prompts) for name in Sampling._fields))
        most_new = options["max_new_tokens"]
        rows = self.decoder.begin(prompts, most_new, self.decoder.room(max(map(len, prompts)) + most_new))
        is_over = False
        while not is_over:
            rows = self.decoder.extend(rows, sampling, n_at_once)
            tokens_BS, n_B = np.asarray(rows.tokens_BS), np.asarray(rows.n_B)
            is_over = bool(np.all(n_B >= np.asarray(rows.end_B)))
            yield [row[len(p) : n].tolist() for row, p, n in zip(tokens_BS, prompts, n_B, strict=True)], is_over

    def _answer(self, begun: Continuation, ids: list[int]) -> Answer:
        ending = "length" if len(ids) == begun.options["max_new_tokens"] else "positions"
        return {
            "prompt": begun.text,
            "continuation": self._text(begun, ids),
            "tokens": len(ids),
            "ending": "article" if ids[-1] in self.stops else ending,
            "seed": begun.options["seed"],
        }

    def _text(self, begun: Continuation, ids: list[int]) -> str:
        # The text between two tokens depends on both of them.
        before, whole = (self.tokenizer.decode(begun.prompt[len(self.before) :] + more) for more in ([], ids))
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(ids)

    def _ready(self, text: str) -> str:
        """Return the part of a text that later tokens cannot change."""
        if self.is_byte_level:
            return text.rstrip("\ufffd")  # the last token may end inside a character of several bytes
        if self.is_single:
            return text
        return text[: max(text.rfind(" "), 0)]  # the next token may be a piece of the last word, or punctuation

    def checked(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return all options, with a seed. Raises UserError for one out of range."""
        options = self.options | given
        if unknown := options.keys() - self.options:
            raise TypeError(f"there is no option {', '.join(unknown)}; there are {', '.join(self.options)}")
        if options["seed"] is None:
            options["seed"] = secrets.randbelow(10**6)
        check("max_new_tokens", options["max_new_tokens"], options["max_new_tokens"] >= 1, "1 or more")
        check("temperature", options["temperature"], 0 <= options["temperature"] < np.inf, "0 or more")
        check("top_k", options["top_k"], 0 <= options["top_k"] < 2**31, "0 (all) or more")
        check("top_p", options["top_p"], 0 < options["top_p"] <= 1, "above 0, and 1 (all) at most")
        check("seed", options["seed"], 0 <= options["seed"] < 2**32, "0 or more, below 2^32")
        return options


class Reply(Continue):
    """Answers prompts, by default greedily."""

    wants = "a prompt to answer"
    between = PROMPT_END
    options = Continue.options | {"temperature": 0.0}


class Chat(Continue):
    """Answers a message by the chat template of a public model. Special tokens in the message count as such."""

    wants = "a message"

    def __init__(self, trained: LoadedModel):
        self.template, self.tokens = chat.find(trained.config.tokenizer.path)
        super().__init__(trained)
        self.reads_specials = Tokenizer.from_str(self.tokenizer.to_str())
        self.reads_specials.encode_special_tokens = False

    def encode(self, text: str) -> list[int]:
        self._ids(text)  # raises UserError if it is not a text
        ids = self.reads_specials.encode(chat.rendered(self.template, text, self.tokens), add_special_tokens=False).ids
        return self._checked(ids or [self.stop])

    def shown(self, answer: Answer) -> str:
        return str(answer["continuation"])


def _probabilities(model: Any, x_BTD: Array, places_N2: Array) -> Array:
    """Return the probabilities of the tokens at each place, [N, V]."""
    x_ND = x_BTD[places_N2[:, 0], places_N2[:, 1]]
    return jax.nn.softmax(model.head(x_ND[None], model.base.embedding.token.embedding[...])[0])


def _shown_texts(answer: Answer) -> str:
    return " | ".join(answer[name] for name in ("text", "pair") if name in answer)


def check(name: str, value: Any, is_fine: bool, rule: str) -> None:
    if not is_fine:
        raise UserError(f"--{name.replace('_', '-')} {value}: has to be {rule}")


def _filled_up(rows: list[Any]) -> list[Any]:
    """Return rows, padded by copies of the last one, so that few batch sizes are compiled."""
    return rows + rows[-1:] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
