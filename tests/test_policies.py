import dataclasses
import math

import pytest

from csp_edge.errors import PolicyError
from csp_edge.policies import CSP, Full, Resolved, parse_budget, policy


@pytest.mark.parametrize(
    ("csp", "n_tokens", "expected"),
    [
        (CSP(), 1000, (200, 8, 16)),
        (CSP(), 100, (128, 8, 16)),
        (CSP(0.2), 1000, (200, 8, 16)),
        (CSP(0.2), 100, (20, 8, 5)),
        (CSP(0.2), 10, (2, 8, 1)),
        (CSP(0.2), 1, (1, 1, 1)),
        (CSP(512), 100, (512, 8, 16)),
        (CSP(1), 100, (1, 8, 1)),
        (CSP(1.0), 100, (100, 8, 16)),
        (CSP(0.29), 100, (29, 8, 7)),  # though 0.29 * 100 < 29
        (CSP(0.001), 100, (1, 8, 1)),
        (CSP(50, window=0.1, recent=0.1), 100, (50, 10, 10)),
        (CSP(5, window=1.0, recent=0.5), 100, (5, 100, 5)),
        (CSP(5, window=0.001, recent=0.001), 100, (5, 1, 0)),
        (CSP(5, window=100, recent=5), 100, (5, 100, 5)),
        (CSP(5, recent=0), 100, (5, 8, 0)),
        (CSP(5, recent=0.0), 100, (5, 8, 0)),
    ],
)
def test_resolve(csp: CSP, n_tokens: int, expected: tuple[int, int, int]) -> None:
    assert csp.resolve(n_tokens) == Resolved(*expected, lookahead=16)
    ahead = dataclasses.replace(csp, lookahead=3).resolve(n_tokens)
    assert ahead == Resolved(*expected, lookahead=3)


@pytest.mark.parametrize(("n_tokens", "window"), [(100, 32), (20, 20)])
def test_resolve_without_pictures(n_tokens: int, window: int) -> None:
    assert CSP(10).resolve(n_tokens, has_pictures=False) == Resolved(10, window, 5)
    assert CSP(10, lookahead=4).resolve(n_tokens, has_pictures=False).lookahead == 4
    assert CSP(10, window=3).resolve(n_tokens, has_pictures=False) == Resolved(10, 3, 5)


def test_resolve_refuses_what_the_prompt_is_too_short_for() -> None:
    with pytest.raises(PolicyError, match=r"window=64 is larger than the prompt \(12 tokens\)"):
        CSP(window=64).resolve(12)
    with pytest.raises(PolicyError, match=r"recent=8 is larger than the budget \(2 cells"):
        CSP(0.2, recent=8).resolve(10)


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.1, 1.1, math.nan, math.inf, True, "20%"])
def test_budget_out_of_range(budget: object) -> None:
    with pytest.raises(PolicyError, match="^budget="):
        CSP(budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("lookahead", [-1, 257, 1.0, True, "4", math.nan])
def test_lookahead_out_of_range(lookahead: object) -> None:
    with pytest.raises(PolicyError, match="^lookahead=.*give an int from 0 to 256, or None"):
        CSP(lookahead=lookahead)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["window", "recent"])
@pytest.mark.parametrize("value", [-1, -0.5, 1.5, math.nan, False, "4"])
def test_window_and_recent_out_of_range(name: str, value: object) -> None:
    with pytest.raises(PolicyError, match=f"^{name}="):
        CSP(**{name: value})  # type: ignore[arg-type]


def test_window_of_nothing() -> None:
    with pytest.raises(PolicyError, match="^window=0:"):
        CSP(window=0)


@pytest.mark.parametrize(
    "options",
    [
        {"cross_ratio": -0.1},
        {"cross_ratio": 1.1},
        {"cross_ratio": math.nan},
        {"cross_ratio": True},
        {"cross_ratio": "auto"},
        {"n_score": -1},
        {"n_score": math.inf},
        {"n_score": None},
        {"sink": 0},
        {"sink": -1.0},
        {"sink": math.nan},
        {"sink": "masses"},
        {"sink": True},
    ],
)
def test_other_settings_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match=f"^{next(iter(options))}=") as error:
        CSP(**options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_settings_in_range() -> None:
    CSP(cross_ratio=0, n_score=0, sink="mass")
    CSP(cross_ratio=1.0, n_score=2.5, sink=1)


def test_policies_are_values() -> None:
    assert CSP(0.2) == CSP(budget=0.2) != CSP(0.3)
    assert len({CSP(), CSP(), Full(), Full()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        CSP().budget = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        CSP(0.2, 32)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "budget"),
    [("20%", 0.2), ("29%", 0.29), (" 12.5 % ", 0.125), ("100%", 1.0), ("0.2", 0.2), ("512", 512)],
)
def test_parse_budget(text: str, budget: float) -> None:
    parsed = parse_budget(text)
    assert parsed == budget
    assert type(parsed) is type(budget)


@pytest.mark.parametrize(
    "text", ["", "%", "0", "0%", "-1", "-5%", "101%", "1.5", "nan", "nan%", "inf%", "many", "1e3"]
)
def test_parse_budget_refuses(text: str) -> None:
    with pytest.raises(PolicyError, match="budget"):
        parse_budget(text)


def test_policy_by_name() -> None:
    assert policy("full") == Full()
    assert policy("csp", budget=100, sink="mass") == CSP(100, sink="mass")


def test_policy_refuses() -> None:
    with pytest.raises(PolicyError, match=r"unknown policy 'h3o': choose one of csp, full"):
        policy("h3o")
    with pytest.raises(PolicyError, match="policy 'full' has no setting 'budget'"):
        policy("full", budget=0.2)
    with pytest.raises(PolicyError, match="^budget=0:"):
        policy("csp", budget=0)


def test_numbers_beyond_a_float():
    for options in {"distance": 10**400}, {"n_score": 10**400}, {"sink": 10**400}:
        with pytest.raises(PolicyError, match="give"):
            CSP(**options)
