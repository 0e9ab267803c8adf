"""MileBench's rules of scoring, by hand."""

import pytest

from csp_edge.eval.scoring import choice_label, normalize, score

CHOICES = ["Opened the door.", "Closed the book.", "Sat on the sofa.", "Took the cup/glass."]


@pytest.mark.parametrize(
    "text, expected",
    [
        (" The\ncat,\tsat. ", "the cat sat"),
        ("cup/glass", "cup glass"),
        # next to a space once, and it goes everywhere
        ("cup/glass / mug", "cupglass  mug"),
        ("well-known -ish", "wellknown ish"),
        # a comma between digits, and all marks go
        ("1,295 cup/glass", "1295 cupglass"),
        ("(well-known)", "well known"),
        ("3.50 of 4.", "3.50 of 4"),
        ("U.S.A", "usa"),
        ("'\"quoted\"'", "quoted"),
        ("O'Connor & $5", "o'connor & $5"),
        ("a." * 33, "a" * 33 + "."),
        ("...", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("B", 1),
        ("b.", 1),
        ("B. Closed the book.", 1),
        ("(B) Closed the book", 1),
        ("The person closed the book, I think.", 1),
        ("closedthebook", 1),
        # a label with its choice goes before a choice that stands earlier
        ("Not opened the door but B. Closed the book.", 1),
        # of two choices the one that comes first in the text
        ("Closed the book, then opened the door.", 1),
        ("Opened the door, then closed the book.", 0),
        ("A", 0),
        # no answer is C, not B
        ("", 0),
        # "b" is the one letter that is a label, whatever word it is in
        ("number", 1),
        ("bob", 0),
        ("The answer is B", 0),
        ("none", 0),
    ],
)
def test_choice(prediction, right):
    assert score("choice", prediction, CHOICES[1], CHOICES) == right


def test_no_answer_is_c():
    assert score("choice", " . ", CHOICES[2], CHOICES) == 1


def test_choice_with_a_mark_that_expressions_escape_is_found_but_not_recognised():
    prices = ["$3.50", "$4.50"]
    assert score("choice", "It was $4.50", prices[1], prices) == 0
    assert score("choice", "B. $4.50", prices[1], prices) == 1
    assert score("choice", "B", prices[1], prices) == 1


def test_choices_of_one_beginning():
    images = [f"image{i + 1}" for i in range(30)]
    assert score("choice", "image2", images[1], images) == 1
    assert score("choice", "image12", images[11], images) == 0
    assert score("choice", "image12", images[0], images) == 1
    assert score("choice", "AD", images[29], images) == 1
    # of a label of two letters the first counts
    assert score("choice", "AD. image30", images[29], images) == 0


def test_the_answer_must_be_one_of_the_choices():
    with pytest.raises(ValueError):
        score("choice", "A", "Left the room.", CHOICES)
    with pytest.raises(ValueError):
        score("choice", "A", "Left the room.")


def test_choice_label():
    assert [choice_label(i) for i in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]


@pytest.mark.parametrize(
    "metric, prediction, answer, expected",
    [
        ("needle", "The number is 1234567.", "1234567", 1),
        ("needle", "It is 12345678", "1234567", 0),
        ("needle", "New York", "new york", 0),  # a word, not two
        ("contains", "It was in New York.", "new york", 1),
        ("contains", "reddish", "red", 1),
        ("contains", "blue", "red", 0),
        ("contains", "", "red", 0),
        ("exact", " Green cross , orange moon\n", "green cross, orange moon", 1),
        ("exact", "top left", "left", 0),
        ("exact", "12", "1", 0),
        ("exact", "", "1", 0),
    ],
)
def test_words(metric, prediction, answer, expected):
    assert score(metric, prediction, answer) == expected


def f(hits, n_said, n_right):
    precision, recall = hits / n_said, hits / n_right
    return 2 * precision * recall / (precision + recall + 1e-8)


@pytest.mark.parametrize(
    "prediction, answer, expected",
    [
        ("one car left", "one car left", f(3, 3, 3)),
        # cat, sat, on, mat of 5 distinct words each
        ("The cat sat on the mat.", "a cat sat on a mat", f(4, 5, 5)),
        ("mat the on sat", "sat on the mat", f(1, 4, 4)),
        ("red red red red", "red", f(1, 1, 1)),
        ("nothing alike", "something else", 0),
        ("", "something", 0),
        ("?!", "something", 0),
        # the period in a number ends a sentence: "3" and "5 cars"
        ("3.5 cars", "3 cars", f(2, 3, 2)),
        # "b", "1 a", "1" and "a", "1 b", "1": each word in some two of them
        ("b.1 a.1", "a.1 b.1", f(3, 3, 3)),
        # of 34 periods two are left, and between them a sentence of one empty word
        ("a" + " ." * 34, "a", f(1, 2, 1)),
        # a a or b a: skipping the prediction's last word first leads to b a
        ("a b a", "a a b", f(2, 2, 2)),
        ("a a b", "a b a", f(1, 2, 2)),
    ],
)
def test_rouge_l(prediction, answer, expected):
    assert score("rouge-l", prediction, answer) == pytest.approx(expected, abs=1e-15)


def test_rouge_l_of_a_long_text():
    words = " ".join(f"w{i}" for i in range(1200))
    assert score("rouge-l", words, words) == f(1200, 1200, 1200)
