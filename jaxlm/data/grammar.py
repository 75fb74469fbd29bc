"""Embedded demonstration data for two sentence-classification tasks, made in memory from a small grammar of our own.

The tasks have the form of two GLUE tasks (Wang et al. 2018, https://arxiv.org/abs/1804.07461) but share no text with
them: `sst2` asks whether a film review is positive (1) or negative (0), `cola` whether a sentence is acceptable (1) or
not (0). Labels depend on how the words are put together, so word counts alone do not give them. Validation and test
use words and templates that train lacks.
"""

import random

SPLITS = ("train", "validation", "test")
SIZES = {"train": 8000, "validation": 800, "test": 1000}

# Open word classes: every split has words of its own, because test must ask for more than known words.
# Words that decide a label (sentiment words, verbs) are the same everywhere: a new one could not be understood.
FIRST_NAMES = {
    "train": """anna martin clara oscar julia peter helen victor laura simon emma walter nina george alice hugo sarah
        felix maria henry rosa daniel irene thomas judith paul""".split(),
    "validation": "edith conrad lydia ralph greta stanley".split(),
    "test": "miriam bernard sylvia duncan ophelia leonard agnes rupert".split(),
}
# Family names are a stem and an ending: many rare names, so that a subword vocabulary has to keep the pieces.
NAME_STEMS = {
    "train": """ash black brook clay cliff cook dale east fair green hart hazel hill holm kirk lang lin long mar mill
        north oak red rock rush sand shel stan stock thorn ting wal wash west whit win wood""".split(),
    "validation": "birch cold frost fern penn".split(),
    "test": "bram elder glen maple raven silver".split(),
}
NAME_ENDINGS = "bury by croft dale den field ford ham land ley low man mere more ridge ton well wick worth".split()

FILMS = {
    "train": """film movie drama comedy thriller western documentary romance sequel remake cartoon blockbuster fable
        mystery melodrama picture feature production""".split(),
    "validation": "prequel parody trilogy epic".split(),
    "test": "biopic musical satire adaptation anthology whodunit".split(),
}
ASPECTS = {
    "train": """plot script acting dialogue ending music story cast direction humour pacing photography soundtrack opening
        editing premise hero villain camerawork animation setting romance chemistry costume dance suspense action
        message structure style tone subplot title prologue""".split(),
    "validation": "narration choreography climax makeup scenery singing".split(),
    "test": "screenplay finale lighting score rhythm wardrobe storytelling atmosphere imagery heroine".split(),
}
DEGREES = {
    "train": "very really truly quite rather simply deeply so utterly always".split(),
    "validation": "thoroughly extremely unusually".split(),
    "test": "remarkably incredibly wildly surprisingly consistently".split(),
}
GOOD = """superb brilliant charming funny moving clever delightful gripping fresh touching witty elegant thrilling inspiring
    wonderful excellent graceful tender lovely powerful dazzling masterful enjoyable beautiful impressive satisfying
    memorable engaging sincere lively splendid imaginative""".split()
BAD = """dull boring tedious clumsy shallow dreadful tiresome lifeless stale bland awful weak messy predictable flat hollow
    pointless dreary terrible annoying ridiculous forgettable sloppy painful lazy silly wooden confusing pretentious
    poor ugly laughable""".split()
ADJECTIVES = (BAD, GOOD)
OPINIONS = (
    "hated loathed despised detested resented mocked".split(),
    "enjoyed admired loved praised liked adored".split(),
)
NEGATIONS = ["not", "never", "hardly", "far from", "anything but", "by no means"]

# Person nouns are compounds ("lampmaker"): the second part is always known and shows the number of a new compound.
TRADE_GOODS = {
    "train": """lamp clock book glass shoe boat piano candle toy basket bread cheese tea coffee flower carpet hat
        mirror wagon saddle rope barrel button ribbon sword bottle flag tent wheel kettle pepper sugar honey melon
        apple onion silk linen leather copper marble timber paper ink soap stamp coin map globe drum flute bell kite
        puppet mask ring knife ladder chair pipe""".split(),
    "validation": "trumpet pillow walnut pottery brick chain".split(),
    "test": "lantern violin garlic velvet canoe goblet statue umbrella cactus tin".split(),
}
TRADES = "maker seller painter keeper cleaner collector dealer mender carrier owner buyer designer builder trader".split()
OBJECTS = {
    "train": """window door table letter ticket wall garden bridge engine parcel camera curtain blanket bucket picture
        fence poster tower cottage fountain station market museum theatre kitchen tunnel barn river""".split(),
    "validation": "cupboard monument chapel gate bench".split(),
    "test": "wardrobe cathedral harbour staircase vineyard tractor orchard pavilion".split(),
}
TRAITS = {
    "train": """happy tired famous clever young proud hungry angry quiet rich polite nervous busy cheerful lonely brave
        gentle stubborn honest lazy""".split(),
    "validation": "grumpy wealthy careful modest".split(),
    "test": "jealous elderly playful reckless curious friendly".split(),
}
TIMES = {
    "train": "yesterday|last week|in the morning|after lunch|at noon|last winter|on sunday|before dinner".split("|"),
    "validation": "at midnight|last spring|during the storm".split("|"),
    "test": "this autumn|after the concert|on christmas eve|at sunrise".split("|"),
}
TRANSITIVE = """avoid inspect repair mention destroy discover select reject neglect confront request obtain demand
    detest collect protect""".split()
INTRANSITIVE = """yawn laugh cough faint disappear linger wander shiver wait moan groan frown loiter listen sneer
    appear""".split()
REFLEXIVE = "blamed praised trusted warned helped protected doubted described defended criticised rewarded".split()
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
    "test": ["according to {name} , {s}", "i must admit that {s}", "friends warned me : {s}"],
}
COLA_FRAMES = {
    "train": ["{s}"] * 4 + ["{s} {time}", "{time} {s}", "{name} says that {s}", "we heard that {s}"],
    "validation": ["{name} expects that {s}", "it turned out that {s}"],
    "test": ["according to {name} , {s}", "it is obvious that {s}", "{s} , or so {name} claims"],
}


def sentences(task: str) -> dict[str, list[tuple[str, int]]]:
    """Return the (sentence, label) pairs of `task` ("sst2" or "cola") by split, the same ones on every call."""
    make = {"sst2": _review, "cola": _acceptability}[task]
    rng = random.Random(0)
    seen = set()
    splits = {}
    for split in SPLITS:
        rows = []
        while len(rows) < SIZES[split]:
            # Half of validation looks like train, the other half is as new as test, but with words of its own.
            source = "train" if split == "validation" and rng.random() < 0.5 else split
            for text, label in make(rng, source):
                if text.lower() not in seen and len(rows) < SIZES[split]:
                    seen.add(text.lower())
                    rows.append((text, label))
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _word(rng, split, word_class):
    return rng.choice(WORD_CLASSES[word_class][split])


def _name(rng, split):
    if rng.random() < 0.5:
        return _word(rng, split, "first_name")
    return _word(rng, split, "name_stem") + rng.choice(NAME_ENDINGS)


def _framed(rng, split, frames, cores):
    """Put each core sentence into the same frame; outside train, half of the frames are new ones."""
    frame = rng.choice(frames[split if rng.random() < 0.5 else "train"])
    words = {"name": _name(rng, split), "time": _word(rng, split, "time")}
    return [frame.format(s=core, **words) for core in cores]


# Film reviews


def _review(rng, split):
    """Return one review: one clause, two clauses of which the main one decides, or a negated clause."""
    label = rng.randrange(2)
    main, kind = _clause(rng, split, label), rng.random()
    if kind < 0.5:
        core = main
    elif kind < 0.85:
        other = _clause(rng, split, 1 - label)
        contrasts = [
            f"although {other} , {main}",
            f"{main} , although {other}",
            f"{other} , but {main}",
            f"despite the {rng.choice(ADJECTIVES[1 - label])} {_word(rng, split, 'aspect')} , {main}",
        ]
        core = rng.choice(contrasts)
    else:
        outer = rng.choice(["nobody would say that", "i do not think that"])
        core = f"{outer} {_clause(rng, split, 1 - label, negated=False)}"
    return [(text, label) for text in _framed(rng, split, REVIEW_FRAMES, [core])]


def _clause(rng, split, label, negated=None):
    """Return a clause with sentiment `label`, half of them by negating the opposite sentiment."""
    if negated is None:
        negated = rng.random() < 0.3
    aspect, film, name = _word(rng, split, "aspect"), _word(rng, split, "film"), _name(rng, split)
    adjective = rng.choice(ADJECTIVES[label ^ negated])
    subjects = [f"the {aspect}", f"the {aspect} of this {film}", f"the {aspect} by {name}"]
    if split == "validation":
        subjects = [f"the {aspect} in this {film} by {name}"]
    if split == "test":
        subjects += [f"the {aspect} that {name} wrote", f"the {film} and its {aspect} that i saw"]
    kind = rng.random()
    if kind < 0.6:
        before = rng.choice(NEGATIONS) if negated else rng.choice(["", _word(rng, split, "degree")])
        text = f"{rng.choice(subjects)} is {before} {adjective}"
    elif kind < 0.8:
        text = f"{rng.choice(['this is', name + ' made'])} {'not' if negated else ''} {_a(adjective)} {film}"
    else:
        opinion = rng.choice(OPINIONS[label ^ negated])
        who = rng.choice(["nobody", "i never", "hardly anyone"] if negated else ["everyone", "i", "we all"])
        text = f"{who} {opinion} {rng.choice(subjects)}"
    return " ".join(text.split())


def _a(word):
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# Acceptability


def _acceptability(rng, split):
    """Return a good sentence and, about every second time, the same sentence with one minimal violation."""
    violation = rng.choice([_agreement, _agreement, _reflexive, _argument, _order, _determiner, _auxiliary])
    good, bad = (
        text[0].upper() + text[1:] + "." for text in _framed(rng, split, COLA_FRAMES, violation(rng, split))
    )
    return [(good, 1), (bad, 0)] if rng.random() < 0.54 else [(good, 1)]


def _person(rng, split, plural, determiner=None):
    """Return a noun phrase; with the default determiners, only the noun shows its number."""
    determiner = determiner or rng.choice(EITHER_NUMBER)
    trait = _word(rng, split, "trait") if rng.random() < 0.3 else ""
    noun = _word(rng, split, "goods") + rng.choice(TRADES) + ("s" if plural else "")
    return " ".join([determiner, trait, noun]).replace("  ", " ")


def _object(rng, split):
    return f"the {_word(rng, split, 'object')}{rng.choice(['', 's'])}"


def _modified(rng, split, phrase):
    """Sometimes add a phrase whose noun may differ in number; test adds longer ones."""
    if rng.random() < 0.5:
        return phrase
    place = f"{rng.choice(PREPOSITIONS)} {_object(rng, split)}"
    if split == "test" and rng.random() < 0.5:
        place += f" of {_name(rng, split)}"
    return f"{phrase} {place}"


def _agreement(rng, split):
    """The verb takes the number of its subject, whatever stands between them."""
    plural = rng.random() < 0.5
    subject = _modified(rng, split, _person(rng, split, plural))
    trait, intransitive = _word(rng, split, "trait"), rng.choice(INTRANSITIVE)
    forms = [
        (f"is {trait}", f"are {trait}"),
        (f"was {trait}", f"were {trait}"),
        (f"{intransitive}s", intransitive),
    ]
    singular_form, plural_form = rng.choice(forms)
    good, bad = (plural_form, singular_form) if plural else (singular_form, plural_form)
    return f"{subject} {good}", f"{subject} {bad}"


def _reflexive(rng, split):
    """A reflexive takes the number of its subject."""
    plural = rng.random() < 0.5
    verb, one = rng.choice(REFLEXIVE), rng.choice(["himself", "herself"])
    subject = f"{_modified(rng, split, _person(rng, split, plural))} {verb}"
    good, bad = ("themselves", one) if plural else (one, "themselves")
    return f"{subject} {good}", f"{subject} {bad}"


def _argument(rng, split):
    """A transitive verb needs an object and an intransitive verb cannot have one."""
    subject = _person(rng, split, rng.random() < 0.5)
    thing = _object(rng, split)
    place = f"{rng.choice(PREPOSITIONS)} {thing}"
    if rng.random() < 0.5:
        start = f"{subject} {rng.choice(TRANSITIVE)}ed"
        return f"{start} {thing}", rng.choice([start, f"{start} {place}"])
    start = f"{subject} {rng.choice(INTRANSITIVE)}ed"
    return rng.choice([start, f"{start} {place}"]), f"{start} {thing}"


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
    plural = rng.random() < 0.5
    good, bad = (PLURAL, SINGULAR) if plural else (SINGULAR, PLURAL)
    good, bad, slot = rng.choice(good), rng.choice(bad), rng.random()
    phrase = _person(rng, split, plural, "{}")
    if slot < 0.5:
        text = f"{phrase} {rng.choice(TRANSITIVE)}ed {_object(rng, split)}"
    else:
        text = f"{_person(rng, split, rng.random() < 0.5)} {rng.choice(TRANSITIVE)}ed {phrase}"
    return text.format(good), text.format(bad)


def _auxiliary(rng, split):
    """A modal takes the bare verb, 'had' the participle, and 'was' or 'were' the -ing form."""
    plural = rng.random() < 0.5
    verb, thing = rng.choice(TRANSITIVE), _object(rng, split)
    auxiliary = rng.choice(["will", "had", "were" if plural else "was"])
    endings = {"will": ("", "ed", "ing"), "had": ("ed", "", "ing")}.get(auxiliary, ("ing", "", "s"))
    start = f"{_modified(rng, split, _person(rng, split, plural))} {auxiliary} {verb}"
    return f"{start}{endings[0]} {thing}", f"{start}{rng.choice(endings[1:])} {thing}"
