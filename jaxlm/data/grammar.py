"""Embedded demonstration data for sentences with labels and prompts with answers, from a small grammar of our own.

The tasks have the form of two GLUE tasks (Wang et al. 2018, https://arxiv.org/abs/1804.07461) but share no text with
them: `sst2` asks whether a film review is positive (1) or negative (0), `cola` whether a sentence is acceptable (1) or
not (0). Labels depend on how words are put together, so that word counts alone do not give them. A third one, `pairs`,
tells a fact and asks for a part of it, or for the same in other words. Every test sentence has a word that train lacks;
half of validation is as new, with new words of its own.
"""

import random
from typing import Any

SPLITS = ("train", "validation", "test")
SIZES = {"train": 60000, "validation": 800, "test": 1000}
NEW_SHARE = 0.2  # of the words from open classes outside train; each sentence gets at least one

# Open word classes: validation and test have words of their own, since they must ask for more than known words.
# Words that decide a label (sentiment words, verbs) are the same everywhere: a new one could not be understood.
# New words are short, for a subword vocabulary cuts them into many pieces.
FIRST_NAMES = {
    "train": """anna martin clara oscar julia peter helen victor laura simon emma walter nina george alice hugo sarah
        felix maria henry rosa daniel irene thomas judith paul""".split(),
    "validation": "edith conrad lydia ralph greta stanley".split(),
    "test": "miriam bernard sylvia duncan leonard agnes rupert".split(),
}
# Family names are a stem and an ending: many rare names, so that a subword vocabulary has to keep the pieces.
NAME_STEMS = {
    "train": """ash black brook bur clay cliff cook cor cran dale dun east fair far gold gos grim green hal har hart
        hazel hill hin holm horn kings kirk lang led lin long lud mar mel mill new nor north oak or pem pen per pres
        prior queens red rock rush rad sal sand shel sil stan stock stan sun sut thorn thur ting tre tun up wal wans
        war wash west whit win wind wood wor wy""".split(),
    "validation": "birch cold frost fern tam".split(),
    "test": "bram elder glen maple raven swan".split(),
}
NAME_ENDINGS = "bury by croft dale den field ford ham land ley low man mere more ridge ton well wick worth".split()

FILMS = {
    "train": """film movie drama comedy thriller western documentary romance sequel remake cartoon blockbuster fable
        mystery melodrama picture feature production""".split(),
    "validation": "prequel parody trilogy epic".split(),
    "test": "biopic musical satire adaptation opera".split(),
}
ASPECTS = {
    "train": """plot script acting dialogue ending music story cast direction humour pacing photography soundtrack
        opening editing premise camerawork animation setting style tone subplot prologue""".split(),
    "validation": "narration makeup scenery singing".split(),
    "test": "finale lighting score rhythm imagery screenplay casting".split(),
}
DEGREES = {
    "train": "very really truly quite rather simply deeply so utterly always".split(),
    "validation": "thoroughly extremely unusually".split(),
    "test": "remarkably incredibly wildly surprisingly".split(),
}
GOOD = """superb brilliant charming moving clever delightful gripping fresh touching elegant thrilling inspiring
    wonderful excellent graceful lovely powerful dazzling masterful enjoyable beautiful impressive satisfying
    memorable engaging splendid""".split()
BAD = """dull boring tedious clumsy shallow dreadful tiresome lifeless stale bland awful weak messy predictable hollow
    pointless dreary terrible annoying ridiculous forgettable sloppy painful silly pretentious ugly""".split()
ADJECTIVES = (BAD, GOOD)
OPINIONS = ("hated loathed despised detested".split(), "enjoyed admired loved praised".split())
NEGATIONS = ["not", "never", "hardly", "far from", "anything but", "by no means"]

# Person nouns are compounds ("lampmaker"): the second part is always known and shows the number of a new compound.
TRADE_GOODS = {
    "train": """lamp clock book glass shoe boat piano candle toy basket bread cheese tea coffee flower carpet hat
        mirror wagon saddle rope barrel button ribbon sword bottle flag tent wheel kettle pepper sugar honey melon
        apple onion silk linen leather copper marble timber paper ink soap stamp coin map globe drum flute bell kite
        puppet mask ring knife ladder chair pipe""".split(),
    "validation": "trumpet pillow walnut pottery brick chain".split(),
    "test": "lantern violin garlic velvet canoe goblet statue cactus tin".split(),
}
TRADES = (
    "maker seller painter keeper cleaner collector dealer mender carrier owner buyer designer builder trader".split()
)
OBJECTS = {
    "train": """window door table letter ticket wall garden bridge engine parcel camera curtain blanket bucket picture
        fence poster tower cottage fountain station market kitchen tunnel barn""".split(),
    "validation": "cupboard monument gate bench".split(),
    "test": "cathedral harbour orchard tractor pavilion statue".split(),
}
TRAITS = {
    "train": """happy tired hungry angry quiet polite nervous busy cheerful lonely calm sleepy thirsty bored proud
        worried""".split(),
    "validation": "grumpy confident restless".split(),
    "test": "jealous playful reckless curious friendly".split(),
}
# They fit every tense, and none is a place.
TIMES = {
    "train": "in the morning|after lunch|at noon|in winter|on Sunday|before dinner|at night".split("|"),
    "validation": "at midnight|in spring|during the storm".split("|"),
    "test": "in autumn|after the concert|on Christmas Eve|at sunrise".split("|"),
}
# Regular verbs only: they take "s", "ed" and "ing" without further change.
TRANSITIVE = "avoid mention destroy discover reject neglect obtain demand abandon inspect".split()
INTRANSITIVE = "yawn cough faint disappear linger shiver wait moan groan frown".split()
REFLEXIVE_VERBS = "blamed praised trusted warned helped protected doubted described defended criticised".split()
# By subject: the reflexives that fit, and some that cannot ("themselves" may refer to one person).
REFLEXIVES = {
    "singular": (["himself", "herself"], ["myself", "ourselves"]),
    "plural": (["themselves"], ["himself", "herself"]),
    "I": (["myself"], ["themselves", "himself", "ourselves"]),
    "we": (["ourselves"], ["themselves", "herself", "myself"]),
}
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
PREPOSITIONS = "near behind beside under".split()
SINGULAR = "this that every each".split()
PLURAL = "these those many several".split()
EITHER_NUMBER = "the my our their the".split()

WORD_CLASSES = {
    "first_name": FIRST_NAMES,
    "name_stem": NAME_STEMS,
    "film": FILMS,
    "aspect": ASPECTS,
    "degree": DEGREES,
    "goods": TRADE_GOODS,
    "object": OBJECTS,
    "trait": TRAITS,
    "time": TIMES,
}

# Sentence frames round a core {s}; the label of the core is the label of the sentence.
REVIEW_FRAMES = {
    "train": ["{s}"] * 4 + ["in the end , {s}", "{name} said that {s}", "{s} , {name} wrote", "it is clear that {s}"],
    "validation": ["to be honest , {s}", "{name} insists that {s}"],
    "test": ["according to {name} , {s}", "{name} wrote that {s}", "{s} , i think"],
}
COLA_FRAMES = {
    "train": ["{s}"] * 5
    + ["{s} {time}", "{time} {s}", "{time}, {s}", "we heard that {s}", "it is true that {s}", "it seems that {s}"]
    + ["{name} says that {s}", "as {name} told us, {s}", "{s}, according to {name}", "{s}, as {name} claims"],
    "validation": ["{name} believes that {s}", "it turned out that {s}", "{s}, as we heard"],
    "test": ["according to {name}, {s}", "it is obvious that {s}", "{s}, or so {name} claims"],
}


def sentences(task: str) -> dict[str, list[tuple[str, Any]]]:
    """Return the (sentence, label) pairs of sst2 or cola, or the (prompt, answer) pairs of pairs, by split.

    They are the same ones on every call.
    """
    make = {"sst2": _review, "cola": _acceptability, "pairs": _request}[task]
    rng = random.Random(0)
    seen: set[str] = set()
    train_words: set[str] = set()
    splits = {}
    for split in SPLITS:
        rows: list[tuple[str, Any]] = []
        while len(rows) < SIZES[split]:
            # Half of validation is like train, which keeps the best checkpoint from being one that is lucky on names.
            source = "train" if split == "validation" and len(rows) < SIZES[split] // 2 else split
            for text, label in make(rng, source):
                key = text.lower()
                is_new = key not in seen and (source == "train" or not train_words.issuperset(_words(key)))
                if is_new and len(rows) < SIZES[split]:
                    seen.add(key)
                    rows.append((text, label))
        if split == "train":
            train_words.update(word for text, _ in rows for word in _words(text.lower()))
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _words(text):
    return text.replace(",", " ").replace(".", " ").split()


def _word(rng, split, word_class):
    """Return a word; outside train, some are of the split's own words."""
    return rng.choice(WORD_CLASSES[word_class][split if rng.random() < NEW_SHARE else "train"])


def _name(rng, split):
    if rng.random() < 0.5:
        return _word(rng, split, "first_name").title()
    return (_word(rng, split, "name_stem") + rng.choice(NAME_ENDINGS)).title()


def _framed(rng, split, frames, cores):
    """Put each core sentence into the same frame; outside train, half of the frames are new ones."""
    frame = rng.choice(frames[split if rng.random() < 0.5 else "train"])
    words = {"name": _name(rng, split), "time": _word(rng, split, "time")}
    return [frame.format(s=core, **words) for core in cores]


# Film reviews


def _review(rng, split):
    """Return one review: one clause, two clauses of which the main one decides, or a negated clause."""
    label = rng.randrange(2)
    main, kind = _clause(rng, split, label, rng.random() < 0.25), rng.random()
    if kind < 0.3:
        other = _clause(rng, split, 1 - label, rng.random() < 0.1)
        contrasts = [
            f"although {other} , {main}",
            f"{main} , although {other}",
            f"{other} , but {main}",
            f"despite the {rng.choice(ADJECTIVES[1 - label])} {_word(rng, split, 'aspect')} , {main}",
        ]
        # Without a frame, for two clauses with new words fill 32 tokens.
        return [(rng.choice(contrasts).lower(), label)]
    if kind < 0.4:
        outer = rng.choice(["nobody would say that", "i do not think that"])
        main = f"{outer} {_description(rng, split, 1 - label, False)}"
    return [(text.lower(), label) for text in _framed(rng, split, REVIEW_FRAMES, [main])]


def _clause(rng, split, label, is_negated):
    """Return a clause with sentiment `label`, if `is_negated` by negating the opposite sentiment."""
    if rng.random() < 0.8:
        return _description(rng, split, label, is_negated)
    opinion = rng.choice(OPINIONS[label ^ is_negated])
    who = rng.choice(["nobody", "i never", "hardly anyone"] if is_negated else ["everyone", "i", "we all"])
    return f"{who} {opinion} {_subject(rng, split)}"


def _description(rng, split, label, is_negated):
    adjective = rng.choice(ADJECTIVES[label ^ is_negated])
    if rng.random() < 0.75:
        degree = rng.choice(NEGATIONS) if is_negated else rng.choice(["", _word(rng, split, "degree")])
        return " ".join(f"{_subject(rng, split)} is {degree} {adjective}".split())
    name, article = _name(rng, split), "an" if adjective[0] in "aeiou" else "a"
    starts = ["this is not", f"{name} did not make"] if is_negated else ["this is", f"{name} made"]
    return f"{rng.choice(starts)} {article} {adjective} {_word(rng, split, 'film')}"


def _subject(rng, split):
    aspect, film, name = _word(rng, split, "aspect"), _word(rng, split, "film"), _name(rng, split)
    subjects = [f"the {aspect}", f"the {aspect} of this {film}", f"{name} 's {aspect}"]
    new = {"validation": [f"the {aspect} in this {film}"], "test": [f"the {aspect} that {name} made"]}
    return rng.choice(subjects + new.get(split, []))


# Acceptability


def _acceptability(rng, split):
    """Return a good sentence and, about every second time, the same sentence with one minimal violation."""
    violation = rng.choice([_agreement, _agreement, _reflexive, _argument, _order, _determiner, _auxiliary])
    texts = _framed(rng, split, COLA_FRAMES, violation(rng, split))
    good, bad = (text[0].upper() + text[1:] + "." for text in texts)
    return [(good, 1), (bad, 0)] if rng.random() < 0.54 else [(good, 1)]


def _person(rng, split, is_plural, determiner=None):
    """Return a noun phrase; with the default determiners, only the noun shows its number."""
    determiner = determiner or rng.choice(EITHER_NUMBER)
    trait = _word(rng, split, "trait") if rng.random() < 0.3 else ""
    noun = _word(rng, split, "goods") + rng.choice(TRADES) + ("s" if is_plural else "")
    return " ".join([determiner, trait, noun]).replace("  ", " ")


def _object(rng, split):
    return f"the {_word(rng, split, 'object')}{rng.choice(['', 's'])}"


def _modified(rng, split, phrase):
    """Sometimes add a phrase whose noun may differ in number."""
    return phrase if rng.random() < 0.5 else f"{phrase} {rng.choice(PREPOSITIONS)} {_object(rng, split)}"


def _agreement(rng, split):
    """The verb takes the number of its subject, whatever stands between them."""
    is_plural = rng.random() < 0.5
    subject = _modified(rng, split, _person(rng, split, is_plural))
    trait, verb = _word(rng, split, "trait"), rng.choice(INTRANSITIVE)
    forms = rng.choice([(f"is {trait}", f"are {trait}"), (f"was {trait}", f"were {trait}"), (f"{verb}s", verb)])
    return f"{subject} {forms[is_plural]}", f"{subject} {forms[not is_plural]}"


def _reflexive(rng, split):
    """A reflexive takes the person and number of its subject."""
    kind = rng.choice(list(REFLEXIVES))
    subject = kind if kind in ("I", "we") else _modified(rng, split, _person(rng, split, kind == "plural"))
    start = f"{subject} {rng.choice(REFLEXIVE_VERBS)}"
    good, bad = REFLEXIVES[kind]
    return f"{start} {rng.choice(good)}", f"{start} {rng.choice(bad)}"


def _argument(rng, split):
    """A transitive verb needs an object and an intransitive verb cannot have one."""
    is_plural = rng.random() < 0.5
    subject, thing = _person(rng, split, is_plural), _object(rng, split)
    ending = rng.choice(["ed", "" if is_plural else "s"])
    alone = ["", f" {rng.choice(PREPOSITIONS)} {thing}"]
    if rng.random() < 0.5:
        start = f"{subject} {rng.choice(TRANSITIVE)}{ending}"
        return f"{start} {thing}", f"{start}{rng.choice(alone)}"
    start = f"{subject} {rng.choice(INTRANSITIVE)}{ending}"
    return f"{start}{rng.choice(alone)}", f"{start} {thing}"


def _order(rng, split):
    """Swap a determiner and its noun, a preposition and its object, or an auxiliary and its verb."""
    subject, thing = _person(rng, split, rng.random() < 0.5), _object(rng, split)
    verb, preposition = rng.choice(INTRANSITIVE), rng.choice(PREPOSITIONS)
    determiner, noun = thing.split()
    auxiliary = rng.choice(["will", "can", "must"])
    start = f"{subject} {verb}ed"
    swaps = [
        (f"{start} {preposition} {thing}", f"{start} {preposition} {noun} {determiner}"),
        (f"{start} {preposition} {thing}", f"{start} {thing} {preposition}"),
        (f"{subject} {auxiliary} {verb}", f"{subject} {verb} {auxiliary}"),
    ]
    return rng.choice(swaps)


def _determiner(rng, split):
    """A determiner takes the number of its noun."""
    is_plural = rng.random() < 0.5
    good, bad = (rng.choice(determiners) for determiners in ((PLURAL, SINGULAR) if is_plural else (SINGULAR, PLURAL)))
    verb = rng.choice(TRANSITIVE)
    if rng.random() < 0.5:
        text = f"{_person(rng, split, is_plural, '{}')} {verb}ed {_object(rng, split)}"
    else:
        thing = _word(rng, split, "object") + ("s" if is_plural else "")
        text = f"{_person(rng, split, rng.random() < 0.5)} {verb}ed {{}} {thing}"
    return text.format(good), text.format(bad)


def _auxiliary(rng, split):
    """A modal takes the bare verb, 'had' the participle, and 'was' or 'were' the -ing form."""
    is_plural = rng.random() < 0.5
    verb, thing = rng.choice(TRANSITIVE), _object(rng, split)
    auxiliary = rng.choice(["will", "had", "were" if is_plural else "was"])
    endings = {"will": ("", "ed", "ing"), "had": ("ed", "", "ing")}.get(auxiliary, ("ing", "", "s"))
    start = f"{_modified(rng, split, _person(rng, split, is_plural))} {auxiliary} {verb}"
    return f"{start}{endings[0]} {thing}", f"{start}{rng.choice(endings[1:])} {thing}"


# Requests


def _request(rng, split):
    """Return a fact with a request about it, and the answer: a part of the fact, or the fact in other words.

    Names are made up and times are numbers, in train as well: of few words, a model would learn each by heart instead
    of how to find what is asked for.
    """
    who = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.choice([2, 3]))).title()
    what, when = _person(rng, split, rng.random() < 0.5, "the"), f"at {rng.randrange(1, 13)}:{rng.randrange(60):02}"
    verb, order = rng.choice(TRANSITIVE), rng.choice(["{who} {verb} {what} {when}.", "{when}, {who} {verb} {what}."])

    def said(verb):
        text = order.format(who=who, verb=verb, what=what, when=when)
        return text[0].upper() + text[1:]

    answers = {
        "Who was it?": who,
        "What was it?": what,
        "When was it?": when,
        "Deny it.": said(f"did not {verb}"),
        "Promise it.": said(f"will {verb}"),
    }
    request = rng.choice(list(answers))
    return [(f"{said(f'{verb}ed')} {request}", answers[request])]
