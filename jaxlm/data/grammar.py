"""Embedded demonstration data for sentences with labels and prompts with answers, from a small grammar of our own.

The tasks have the form of two GLUE tasks (Wang et al. 2018, https://arxiv.org/abs/1804.07461) but share no text with
them: `sst2` asks whether a film review is positive (1) or negative (0), `cola` whether a sentence is acceptable (1) or
not (0). Labels depend on how words are put together, so that word counts alone do not give them. A third one, `pairs`,
tells a fact and asks for a part of it, or for the same in other words. `tag` names people, places and firms, with the
same words in all three: those around them tell which it is. `embed` says a fact in two ways. Every test sentence has a
word that train lacks; half of validation is as new, with new words of its own. The words are in grammar.toml.
"""

import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {"train": 60000, "validation": 800, "test": 1000}
N_FEW = 8000  # for training of tag and embed, which learn more of a sentence than a label tells
NEW_SHARE = 0.2  # of the words from open classes outside train; each sentence gets at least one
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def _lists(value: Any) -> Any:
    """Return a value of the file with a list in the place of each string of words."""
    if isinstance(value, dict):
        return {name: _lists(part) for name, part in value.items()}
    return value.split() if isinstance(value, str) else value


WORDS = _lists(tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")))


class Writer:
    """Draws the words of a split."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self.one = rng.choice

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def word(self, kind: str) -> str:
        """Return a word of a class; outside train, some of an open class are the split's own."""
        words = WORDS[kind]
        if isinstance(words, dict):
            words = words[self.split if self.chance(NEW_SHARE) else "train"]
        return self.one(words)

    def name(self) -> str:
        if self.chance(0.5):
            return self.word("first_name").title()
        return (self.word("name_stem") + self.word("name_ending")).title()

    def framed(self, frames: str, *cores: str) -> list[str]:
        """Put each core sentence into the same frame; outside train, half of the frames are new ones."""
        frame = self.one(WORDS[frames][self.split if self.chance(0.5) else "train"])
        words = {"name": self.name(), "time": self.word("time")}
        return [frame.format(s=core, **words) for core in cores]


def sentences(task: str) -> dict[str, list[tuple[str, Any]]]:
    """Return by split the (sentence, label) pairs of sst2 or cola, (prompt, answer) of pairs, (words, tags) of tag,
    (sentence, paraphrase) of embed.

    They are the same ones on every call.
    """
    makers: dict[str, Callable[[Writer], list[tuple[str, Any]]]] = {
        "sst2": _review,
        "cola": _acceptability,
        "pairs": _request,
        "tag": _report,
        "embed": _paraphrase,
    }
    rng = random.Random(0)
    seen: set[str] = set()
    train_words: set[str] = set()
    splits = {}
    for split, size in (SIZES | ({"train": N_FEW} if task in ("tag", "embed") else {})).items():
        rows: list[tuple[str, Any]] = []
        while len(rows) < size:
            # Half of validation is like train, which keeps the best checkpoint from being one that is lucky on names.
            source = "train" if split == "validation" and len(rows) < size // 2 else split
            for text, label in makers[task](Writer(rng, source)):
                key = text.lower()
                is_new = key not in seen and (source == "train" or not train_words.issuperset(_words(key)))
                if is_new and len(rows) < size:
                    seen.add(key)
                    rows.append((text, label))
        if split == "train":
            train_words.update(word for text, _ in rows for word in _words(text.lower()))
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _words(text: str) -> list[str]:
    return text.replace(",", " ").replace(".", " ").split()


# Film reviews

SENTIMENTS, OPINIONS = ("bad", "good"), ("despised", "admired")  # by label


def _review(w: Writer) -> list[tuple[str, int]]:
    """Return one review: one clause; two clauses, whose main clause decides the label; or a negated clause."""
    label = w.rng.randrange(2)
    main, kind = _clause(w, label, w.chance(0.25)), w.rng.random()
    if kind < 0.3:
        other = _clause(w, 1 - label, w.chance(0.1))
        contrasts = [
            f"although {other} , {main}",
            f"{main} , although {other}",
            f"{other} , but {main}",
            f"despite the {w.word(SENTIMENTS[1 - label])} {w.word('aspect')} , {main}",
        ]
        # Without a frame, for two clauses with new words fill 32 tokens.
        return [(w.one(contrasts).lower(), label)]
    if kind < 0.4:
        outer = w.one(["nobody would say that", "i do not think that"])
        main = f"{outer} {_description(w, 1 - label, False)}"
    return [(text.lower(), label) for text in w.framed("review_frame", main)]


def _clause(w: Writer, label: int, is_negated: bool) -> str:
    """Return a clause with sentiment `label`, if `is_negated` by negating the opposite sentiment."""
    if w.chance(0.8):
        return _description(w, label, is_negated)
    opinion = w.word(OPINIONS[label ^ is_negated])
    who = w.one(["nobody", "i never", "hardly anyone"] if is_negated else ["everyone", "i", "we all"])
    return f"{who} {opinion} {_subject(w)}"


def _description(w: Writer, label: int, is_negated: bool) -> str:
    adjective = w.word(SENTIMENTS[label ^ is_negated])
    if w.chance(0.75):
        degree = w.word("negation") if is_negated else w.one(["", w.word("degree")])
        return " ".join(f"{_subject(w)} is {degree} {adjective}".split())
    name, article = w.name(), "an" if adjective[0] in VOWELS else "a"
    starts = ["this is not", f"{name} did not make"] if is_negated else ["this is", f"{name} made"]
    return f"{w.one(starts)} {article} {adjective} {w.word('film')}"


def _subject(w: Writer) -> str:
    aspect, film, name = w.word("aspect"), w.word("film"), w.name()
    new = {"validation": [f"the {aspect} in this {film}"], "test": [f"the {aspect} that {name} made"]}
    return w.one([f"the {aspect}", f"the {aspect} of this {film}", f"{name} 's {aspect}", *new.get(w.split, [])])


# Acceptability: each kind of violation returns a good and a bad sentence


def _acceptability(w: Writer) -> list[tuple[str, int]]:
    """Return a good sentence and, about every second time, the same sentence with one minimal violation."""
    violation = w.one([_agreement, _agreement, _reflexive, _argument, _order, _determiner, _auxiliary])
    good, bad = (text[0].upper() + text[1:] + "." for text in w.framed("cola_frame", *violation(w)))
    return [(good, 1), (bad, 0)] if w.chance(0.54) else [(good, 1)]


def _person(w: Writer, is_plural: bool, determiner: str = "") -> str:
    """Return a noun phrase; with the default determiners, only the noun shows its number."""
    determiner = determiner or w.word("either_number")
    trait = f"{w.word('trait')} " if w.chance(0.3) else ""
    return f"{determiner} {trait}{w.word('goods')}{w.word('trade')}{'s' * is_plural}"


def _object(w: Writer) -> str:
    return f"the {w.word('object')}{w.one(['', 's'])}"


def _modified(w: Writer, phrase: str) -> str:
    """Sometimes add a phrase whose noun may differ in number."""
    return phrase if w.chance(0.5) else f"{phrase} {w.word('preposition')} {_object(w)}"


def _agreement(w: Writer) -> tuple[str, str]:
    """The verb takes the number of its subject, whatever stands between them."""
    is_plural = w.chance(0.5)
    subject = _modified(w, _person(w, is_plural))
    trait, verb = w.word("trait"), w.word("intransitive")
    forms = w.one([(f"is {trait}", f"are {trait}"), (f"was {trait}", f"were {trait}"), (f"{verb}s", verb)])
    return f"{subject} {forms[is_plural]}", f"{subject} {forms[not is_plural]}"


def _reflexive(w: Writer) -> tuple[str, str]:
    """A reflexive takes the person and number of its subject."""
    kind = w.one(list(WORDS["right_reflexive"]))
    subject = kind if kind in ("I", "we") else _modified(w, _person(w, kind == "plural"))
    start = f"{subject} {w.word('reflexive_verb')}"
    good, bad = (w.one(WORDS[reflexives][kind]) for reflexives in ("right_reflexive", "wrong_reflexive"))
    return f"{start} {good}", f"{start} {bad}"


def _argument(w: Writer) -> tuple[str, str]:
    """A transitive verb needs an object and an intransitive verb cannot have one."""
    is_plural = w.chance(0.5)
    subject, thing = _person(w, is_plural), _object(w)
    ending = w.one(["ed", "" if is_plural else "s"])
    alone = ["", f" {w.word('preposition')} {thing}"]
    is_transitive = w.chance(0.5)
    start = f"{subject} {w.word('transitive' if is_transitive else 'intransitive')}{ending}"
    with_object, without = f"{start} {thing}", f"{start}{w.one(alone)}"
    return (with_object, without) if is_transitive else (without, with_object)


def _order(w: Writer) -> tuple[str, str]:
    """Swap a determiner and its noun, a preposition and its object, or an auxiliary and its verb."""
    subject, thing = _person(w, w.chance(0.5)), _object(w)
    verb, preposition = w.word("intransitive"), w.word("preposition")
    determiner, noun = thing.split()
    auxiliary = w.one(["will", "can", "must"])
    start = f"{subject} {verb}ed"
    swaps = [
        (f"{start} {preposition} {thing}", f"{start} {preposition} {noun} {determiner}"),
        (f"{start} {preposition} {thing}", f"{start} {thing} {preposition}"),
        (f"{subject} {auxiliary} {verb}", f"{subject} {verb} {auxiliary}"),
    ]
    return w.one(swaps)


def _determiner(w: Writer) -> tuple[str, str]:
    """A determiner takes the number of its noun."""
    is_plural = w.chance(0.5)
    good, bad = (w.word(number) for number in (("plural", "singular") if is_plural else ("singular", "plural")))
    verb = w.word("transitive")
    if w.chance(0.5):
        text = f"{_person(w, is_plural, '{}')} {verb}ed {_object(w)}"
    else:
        thing = w.word("object") + "s" * is_plural
        text = f"{_person(w, w.chance(0.5))} {verb}ed {{}} {thing}"
    return text.format(good), text.format(bad)


def _auxiliary(w: Writer) -> tuple[str, str]:
    """A modal takes the bare verb, 'had' the participle, and 'was' or 'were' the -ing form."""
    is_plural = w.chance(0.5)
    verb, thing = w.word("transitive"), _object(w)
    auxiliary = w.one(["will", "had", "were" if is_plural else "was"])
    endings = {"will": ("", "ed", "ing"), "had": ("ed", "", "ing")}.get(auxiliary, ("ing", "", "s"))
    start = f"{_modified(w, _person(w, is_plural))} {auxiliary} {verb}"
    return f"{start}{endings[0]} {thing}", f"{start}{w.one(endings[1:])} {thing}"


# Requests


def _request(w: Writer) -> list[tuple[str, str]]:
    """Return a fact with a request about it, and the answer: a part of the fact, or the fact in other words.

    Names are made up and times are numbers, in train as well: of few words, a model would learn each by heart instead
    of how to find what is asked for.
    """
    who = "".join(w.one(CONSONANTS) + w.one(VOWELS) for _ in range(w.one([2, 3]))).title()
    what, when = _person(w, w.chance(0.5), "the"), f"at {w.rng.randrange(1, 13)}:{w.rng.randrange(60):02}"
    verb, order = w.word("transitive"), w.one(["{who} {verb} {what} {when}.", "{when}, {who} {verb} {what}."])

    def said(verb: str) -> str:
        text = order.format(who=who, verb=verb, what=what, when=when)
        return text[0].upper() + text[1:]

    answers = {
        "Who was it?": who,
        "What was it?": what,
        "When was it?": when,
        "Deny it.": said(f"did not {verb}"),
        "Promise it.": said(f"will {verb}"),
    }
    request = w.one(list(answers))
    return [(f"{said(f'{verb}ed')} {request}", answers[request])]


# Names

NAMED = ("PER", "LOC", "ORG")  # people, places, firms


def _report(w: Writer) -> list[tuple[str, list[str]]]:
    """Return words joined by blanks, and their BIO tags. Any family name may be that of a place or in one of a firm."""
    words, tags = [], []
    for word in " ".join(w.one(WORDS["report"][part]) for part in ("opening", "clause", "ending")).split():
        if word in NAMED:
            family = (w.word("name_stem") + w.word("name_ending")).title()
            names = {
                "PER": [family, f"{w.word('first_name').title()} {family}"],
                "LOC": [family, f"{w.word('quarter').title()} {family}"],
                "ORG": [family, f"{family} {w.word('trade').title()}s", f"{family} and {w.name()}"],
            }
            name = w.one(names[word]).split()
            tags += [f"B-{word}", *[f"I-{word}"] * (len(name) - 1)]
            words += name
        else:
            words.append(word)
            tags.append("O")
    return [(" ".join(words), tags)]


# Paraphrases


def _paraphrase(w: Writer) -> list[tuple[str, str]]:
    """Return a sentence, and what it says in the passive; others of a batch share its names and verbs."""
    who, is_plural, when = w.word("first_name").title(), w.chance(0.5), w.one(["at noon", "at night", "today", "again"])
    what, verb = _person(w, is_plural, "the"), w.word("transitive")
    active = w.one(["{who} {verb}ed {what} {when}.", "{when} {who} {verb}ed {what}."])
    text = active.format(who=who, verb=verb, what=what, when=when)
    return [(text[0].upper() + text[1:], f"The {what[4:]} {'were' if is_plural else 'was'} {verb}ed by {who} {when}.")]
