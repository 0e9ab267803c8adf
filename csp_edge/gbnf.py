"""GBNF grammars, checked before llama.cpp sees them.

llama.cpp prints a grammar that it can't parse to stderr, and loops without end on some that it can:
a repetition like {3,2}, or left recursion behind a rule that may be empty.
"""

import re
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

from csp_edge.errors import OptionError

MAX_BYTES = 2**18
MAX_DEPTH = 100
MAX_PATHS = 10**6
MAX_REPETITIONS = 2000
MAX_OPTIONAL = 300  # next to each other: what comes after any of them is kept, for each of them

_ESCAPE = r'\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\"\[\]-])'
_LITERAL = re.compile(rf'"(?:[^"\\]|{_ESCAPE})*"')
_CLASS = re.compile(rf"\[\^?(?:[^\]\\]|{_ESCAPE})*\]")
_TOKEN = re.compile(r"!?<[^>]*>")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_REPEAT = re.compile(r"\{[ \t]*(\d{1,9})[ \t]*(?:(,)[ \t]*(\d{1,9})?[ \t]*)?\}")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_OR_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")

_EMPTY_TERMINALS = ('""', "[]", "[^]")


@dataclass(slots=True)
class _Item:
    """A rule's name, a group, or neither: a terminal."""

    name: str | None = None
    group: "_Alternates" = field(default_factory=list)
    may_be_empty: bool = False


_Alternates: TypeAlias = list[list[_Item]]


def check(grammar: str) -> None:
    """Raises OptionError where llama.cpp can't use the grammar, from its rule `root` on."""
    if not isinstance(grammar, str):
        raise OptionError(f"grammar={grammar!r}: give GBNF as a string")
    try:
        n_bytes = len(grammar.encode())
    except UnicodeEncodeError:
        raise OptionError("grammar: not valid Unicode") from None
    if n_bytes > MAX_BYTES:
        raise OptionError(f"grammar: {n_bytes} bytes, and no more than {MAX_BYTES} are taken")
    if "\0" in grammar:
        raise OptionError("grammar: holds a NUL character")
    rules = _Parser(grammar).rules()
    if "root" not in rules:
        raise OptionError("grammar: no rule is called root")
    _check_left_recursion(rules)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def rules(self) -> dict[str, _Alternates]:
        rules: dict[str, _Alternates] = {}
        self._skip(_SPACE_OR_LINES)
        while self.at < len(self.text):
            name = self._take(_NAME) or self._fail("a rule's name")
            self._skip(_SPACE)
            if not self.text.startswith("::=", self.at):
                self._fail("::=")
            self.at += 3
            self._skip(_SPACE_OR_LINES)
            rules[name] = self._alternates(0)
            if self.at < len(self.text) and self.text[self.at] not in "\r\n":
                self._fail("a new line")
            self._skip(_SPACE_OR_LINES)
        for alternates in rules.values():
            for name in _names(alternates):
                if name not in rules:
                    raise OptionError(f"grammar: no rule is called {name}")
        return rules

    def _alternates(self, depth: int) -> _Alternates:
        if depth > MAX_DEPTH:
            raise OptionError(f"grammar: more than {MAX_DEPTH} brackets within each other")
        alternates = [self._sequence(depth)]
        while self.text.startswith("|", self.at):
            self.at += 1
            self._skip(_SPACE_OR_LINES)
            alternates.append(self._sequence(depth))
        return alternates

    def _sequence(self, depth: int) -> list[_Item]:
        items: list[_Item] = []
        space = _SPACE_OR_LINES if depth else _SPACE
        repeatable = False
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in "*+?{":
                if not repeatable:
                    self._fail("something before a repetition")
                least, most = self._repetition(char)
                items[-1].may_be_empty |= least == 0
                repeatable = most != 0
            elif char == "(":
                self.at += 1
                self._skip(_SPACE_OR_LINES)
                items.append(_Item(group=self._alternates(depth + 1)))
                if not self.text.startswith(")", self.at):
                    self._fail("a closing bracket")
                self.at += 1
                repeatable = True
            elif name := self._take(_NAME):
                items.append(_Item(name=name))
                repeatable = True
            elif char in '"[<!.':
                terminal = self._terminal(char)
                repeatable = terminal not in _EMPTY_TERMINALS
                items.append(_Item(may_be_empty=not repeatable))
            else:
                break
            self._skip(space)
        if sum(item.may_be_empty for item in items) > MAX_OPTIONAL:
            raise OptionError(
                f"grammar: more than {MAX_OPTIONAL} parts of one sequence may be left out: "
                "bring some together in a repetition"
            )
        return items

    def _terminal(self, char: str) -> str:
        if char == ".":
            self.at += 1
            return char
        pattern = {'"': _LITERAL, "[": _CLASS}.get(char, _TOKEN)
        return self._take(pattern) or self._fail(
            {'"': "a string", "[": "a character class"}.get(char, "a token")
        )

    def _repetition(self, char: str) -> tuple[int, int | None]:
        if char != "{":
            self.at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        match = _REPEAT.match(self.text, self.at) or self._fail("a repetition like {2} or {1,3}")
        self.at = match.end()
        least = int(match[1])
        most = int(match[3]) if match[3] else None if match[2] else least
        if most is not None and most < least or least > MAX_REPETITIONS:
            raise OptionError(
                f"grammar: repetition {match[0]}: give numbers in order, up to {MAX_REPETITIONS}"
            )
        return least, most

    def _skip(self, space: re.Pattern[str]) -> None:
        match = space.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        if not match:
            return ""
        self.at = match.end()
        return match[0]

    def _fail(self, expected: str) -> NoReturn:
        line = self.text.count("\n", 0, self.at) + 1
        found = self.text[self.at : self.at + 20].split("\n")[0]
        raise OptionError(f"grammar: line {line}: {expected} is missing at {found!r}")


def _names(alternates: _Alternates) -> set[str]:
    names: set[str] = set()
    for sequence in alternates:
        for item in sequence:
            names |= {item.name} if item.name else _names(item.group)
    return names


def _check_left_recursion(rules: dict[str, _Alternates]) -> None:
    empty: set[str] = set()
    while more := {n for n, rule in rules.items() if n not in empty and _may_be_empty(rule, empty)}:
        empty |= more

    first = {name: _first(rule, empty) for name, rule in rules.items()}
    # llama.cpp walks every path from a rule to those it may begin with
    n_paths: dict[str, int] = {}
    for start in rules:
        path = [(start, iter(first[start]))]
        on_path = {start}
        while path:
            name, rest = path[-1]
            following = next((n for n in rest if n not in n_paths), None)
            if following in on_path:
                raise OptionError(f"grammar: rule {following} begins with itself")
            if following is not None:
                path.append((following, iter(first[following])))
                on_path.add(following)
                continue
            path.pop()
            on_path.discard(name)
            n_paths[name] = 1 + sum(n_paths[n] for n in first[name])
            if n_paths[name] > MAX_PATHS:
                raise OptionError(f"grammar: rule {name} begins in too many ways")


def _may_be_empty(alternates: _Alternates, empty: set[str]) -> bool:
    return any(all(_item_may_be_empty(item, empty) for item in rule) for rule in alternates)


def _item_may_be_empty(item: _Item, empty: set[str]) -> bool:
    if item.may_be_empty or item.name in empty:
        return True
    return bool(item.group) and _may_be_empty(item.group, empty)


def _first(alternates: _Alternates, empty: set[str]) -> list[str]:
    names: list[str] = []
    for rule in alternates:
        for item in rule:
            names += [item.name] if item.name else _first(item.group, empty)
            if not _item_may_be_empty(item, empty):
                break
    return names
