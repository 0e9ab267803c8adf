"""Scores of answers: exact match for the built-in suite, and MileBench's.

MileBench's rules (arXiv 2404.18532, and what its public evaluation does) are kept to the letter,
with their quirks, so that scores compare with published ones to the last digit.
"""

import re
import string
from collections.abc import Sequence
from typing import Literal, TypeAlias

from csp_edge.errors import OptionError

Metric: TypeAlias = Literal["exact", "choice", "needle", "contains", "rouge-l"]

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# MileBench passes re.UNICODE where the number of replacements goes
_MAX_PERIODS = 32
# MileBench compares the choice it found with the choice as escaped for a regular expression
_ESCAPED = frozenset("\\.^$*+?{}[]|()")


def score(metric: Metric, prediction: str, answer: str, choices: Sequence[str] = ()) -> float:
    """How right a prediction is, in [0, 1].

    Args:
        metric: "exact": the same words, whatever their case and punctuation. "choice": the
            right one of the choices was picked. "needle": the answer is one of the prediction's
            words. "contains": it stands in the prediction. "rouge-l": F of ROUGE-L.
        choices: for "choice", with the answer among them.

    Raises:
        ValueError: for "choice", the answer is none of the choices.
    """
    said, right = normalize(prediction), normalize(answer)
    match metric:
        case "exact":
            return float(said.split() == right.split())
        case "choice":
            options = [normalize(choice) for choice in choices]
            label = choice_label(options.index(right))
            return float(_picked(said, options) == label)
        case "needle":
            return float(right in said.split())
        case "contains":
            return float(right in said)
        case "rouge-l":
            return rouge_l(said, right)


def normalize(text: str) -> str:
    """Text as MileBench compares it: lower case, without most punctuation.

    A mark goes if it stands next to a space anywhere in the text, or if the text has a comma
    between digits; else it becomes a space. Periods go, the first 32, but for those before a digit.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = re.search(r"\d,\d", text)
    gone = {mark for mark in _PUNCTUATION if has_number or f"{mark} " in text or f" {mark}" in text}
    text = text.translate({ord(mark): "" if mark in gone else " " for mark in _PUNCTUATION})
    text = re.sub(r"\.(?!\d)", "", text, count=_MAX_PERIODS)
    return text.strip("'").strip('"').strip().lower()


def choice_label(i: int) -> str:
    """A to Z, then AA to ZZ.

    Raises:
        OptionError: there are no more.
    """
    letters = string.ascii_uppercase
    if i >= 27 * 26:
        raise OptionError(f"{i + 1} choices: {27 * 26} can be told apart, leave some out")
    return letters[i] if i < 26 else letters[i // 26 - 1] + letters[i % 26]


def _picked(said: str, choices: Sequence[str]) -> str:
    """The label of the choice that a prediction names, or what is no label.

    The first of these that holds: it is empty, which is C; it has a label with its choice after it,
    and of the label the first letter counts; it has a choice, spaces aside; and else all its
    letters that are labels, in one string. All texts are normalized.
    """
    if not said:
        return "C"
    labels = [choice_label(i) for i in range(len(choices))]
    labelled = [normalize(f"{a} {b}") for a, b in zip(labels, choices, strict=True)]
    if found := _first_of(labelled, said):
        return found[0].upper()
    texts = [normalize(choice).replace(" ", "") for choice in choices]
    found = _first_of(texts, said.replace(" ", ""))
    if found is not None and not _ESCAPED & set(found):
        return labels[texts.index(found)]
    return "".join(char.upper() for char in said if char.upper() in labels)


def _first_of(wanted: Sequence[str], text: str) -> str | None:
    """What is found first in the text, and of several at one place what is wanted first."""
    match = re.search("|".join(map(re.escape, wanted)), text)
    return match[0] if match else None


# The package MileBench uses, rouge 1.0.1, has had no release since 2021 and recurses once for each
# word, so that long texts end it. These give its figures to the last digit.
def rouge_l(prediction: str, reference: str) -> float:
    """F of summary-level ROUGE-L (Lin 2004, section 3.2), counted in distinct words.

    Sentences end at periods. For every two of them, one of each text, take their longest common
    subsequence: the hits are the words in any of those.
    """
    said, right = _sentences(prediction), _sentences(reference)
    n_said = len({word for sentence in said for word in sentence})
    n_right = len({word for sentence in right for word in sentence})
    if not n_said or not n_right:
        return 0.0
    n_hits = len({word for x in right for y in said for word in _common_subsequence(x, y)})
    precision, recall = n_hits / n_said, n_hits / n_right
    return 2.0 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    # a sentence of spaces alone has one word, the empty one
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
    """The words of a longest common subsequence, last first.

    Of several the one that is found from the ends, with words of `y` skipped before those of `x`.
    """
    lengths = [[0] * (len(y) + 1)]
    for word in x:
        above, row = lengths[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)

    words = []
    i, j = len(x), len(y)
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.append(x[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
