"""The grammar's sentences: parts that share nothing, new words in test, labels that word counts do not give."""

import re
from collections import Counter

import pytest

from jaxlm.data import grammar

Rows = list[tuple[str, int]]
TASKS = ("sst2", "cola")


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, Rows]]:
    return {task: grammar.sentences(task) for task in TASKS}


def words(text: str) -> list[str]:
    return re.findall(r"[^\s,.]+", text.lower())


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_balance(made, task):
    for split, rows in made[task].items():
        assert len(rows) == grammar.SIZES[split]
        assert {label for _, label in rows} == {0, 1}
        share = sum(label for _, label in rows) / len(rows)
        assert 0.3 < share < 0.7, (split, share)
        # Sorted by nothing: each quarter is as balanced.
        quarter = rows[: len(rows) // 4]
        assert abs(sum(label for _, label in quarter) / len(quarter) - share) < 0.1


@pytest.mark.parametrize("task", TASKS)
def test_no_sentence_is_shared_or_repeated_or_both_good_and_bad(made, task):
    texts = [text.lower() for rows in made[task].values() for text, _ in rows]
    assert [text for text, n in Counter(texts).items() if n > 1] == []


@pytest.mark.parametrize("task", TASKS)
def test_every_test_sentence_has_a_word_that_train_lacks(made, task):
    known = {word for text, _ in made[task]["train"] for word in words(text)}
    new = [set(words(text)) - known for text, _ in made[task]["test"]]
    assert all(new)
    assert len(set().union(*new)) > 50  # and not always the same
    is_new = [bool(set(words(text)) - known) for text, _ in made[task]["validation"]]
    assert 0.4 < sum(is_new) / len(is_new) < 0.7  # half of validation is as new


@pytest.mark.parametrize("task", TASKS)
def test_words_that_decide_are_all_in_train(made, task):
    # What is new in test is names and things: a new word for good or bad could not be understood.
    train = {word for text, _ in made[task]["train"] for word in words(text)}
    if task == "sst2":
        assert {*grammar.WORDS["good"], *grammar.WORDS["bad"]} <= train
    else:
        stems = [*grammar.WORDS["transitive"], *grammar.WORDS["intransitive"]]
        assert all({verb, f"{verb}s", f"{verb}ed"} & train for verb in stems)


@pytest.mark.parametrize("task", TASKS)
def test_sentences_are_tidy(made, task):
    for rows in made[task].values():
        for text, _ in rows:
            assert text == " ".join(text.split()) and not re.search(r"[{}_|]", text), text
            if task == "sst2":
                assert text == text.lower()
            else:
                assert text[0].isupper() and text.endswith(".") and ".." not in text


def test_answers_are_in_their_prompts_and_names_are_new():
    made = grammar.sentences("pairs")
    known = {word for text, _ in made["train"] for word in words(text)}
    prompts = [text for rows in made.values() for text, _ in rows]
    assert len(set(prompts)) == len(prompts) and {split: len(rows) for split, rows in made.items()} == grammar.SIZES
    kinds = Counter()
    for prompt, answer in made["test"]:
        fact, request = re.fullmatch(r"(.+\.) (.+[?.])", prompt).groups()
        kinds[request] += 1
        assert set(words(prompt)) - known  # so that what is known by heart does not do
        new = set(words(answer)) - set(words(fact))
        assert not new if request.endswith("?") else len(new - {"did", "not", "will"}) == 1, (prompt, answer)
    assert len(kinds) == 5 and min(kinds.values()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_word_counts_do_not_give_the_label(made, task):
    """What a model must score, 0.85 on test, needs more than which words, or pairs of words, there are."""
    text_features = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    parts = {split: ([text for text, _ in rows], [label for _, label in rows]) for split, rows in made[task].items()}
    for longest, most in ((1, 0.7), (2, 0.8)):
        counter = text_features.CountVectorizer(token_pattern=r"[^\s,.]+", ngram_range=(1, longest))
        classifier = linear.LogisticRegression(solver="liblinear")
        classifier.fit(counter.fit_transform(parts["train"][0]), parts["train"][1])
        assert classifier.score(counter.transform(parts["test"][0]), parts["test"][1]) < most
