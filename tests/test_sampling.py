import random
import re

import numpy as np
import pytest

from csp_edge import gbnf
from csp_edge.errors import ModelError, OptionError
from csp_edge.sampling import Sampler, Sampling, TextStream, schema_to_grammar

TEXT = "Zwölf Boxkämpfer 🥊 jagen <|stop|> Viktor — 12 €."


def streamed(data, cuts, **options):
    stream = TextStream(**options)
    edges = [0, *sorted(cuts), len(data)]
    pieces = [stream.push(data[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    return [*pieces, stream.flush()]


def test_characters_are_never_split():
    data = TEXT.encode()
    assert "".join(streamed(data, range(1, len(data)))) == TEXT
    for piece in streamed(data, range(1, len(data))):
        assert "\N{REPLACEMENT CHARACTER}" not in piece


@pytest.mark.parametrize(
    "stop", ["<|stop|>", ["Viktor", "<|stop|>"], ["🥊"], ["missing"], "Z", "€."]
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_break(stop):
    stops = [stop] if isinstance(stop, str) else stop
    expected = TEXT[: min((i for s in stops if (i := TEXT.find(s)) >= 0), default=None)]
    data = TEXT.encode()
    draw = random.Random(1)
    for _ in range(200):
        cuts = draw.sample(range(1, len(data)), draw.randrange(len(data) - 1))
        assert "".join(streamed(data, cuts, stop=stop)) == expected


def test_what_may_become_a_stop_string_is_held_back():
    stream = TextStream(stop=["STOP"])
    assert [stream.push(piece) for piece in (b"a S", b"T", b"ART ", b"ST", b"OP b")] == [
        "a ", "", "START ", "", "",
    ]  # fmt: skip
    assert stream.stopped
    assert stream.flush() == ""
    assert TextStream(stop="ab").push(b"xa") == "x"


def test_an_incomplete_character_at_the_end_is_replaced():
    assert streamed("€".encode()[:2], []) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_a_lead_is_dropped_once():
    assert streamed(b"  blue", [1], lead=" ") == ["", " blue", ""]
    assert streamed(b"blue", [1], lead=" ") == ["b", "lue", ""]
    assert streamed(b"<think>x", [3, 5], lead="<think>") == ["", "", "x", ""]
    assert streamed(b"<th", [1], lead="<think>") == ["", "", "<th"]


@pytest.mark.parametrize("stop", ["", [""], [None], ["a", ""], [b"a"]])
def test_bad_stop_strings(stop):
    if stop == "":
        with pytest.raises(OptionError, match="stop=''"):
            TextStream(stop)
        return
    with pytest.raises(OptionError, match="stop="):
        TextStream(stop)


@pytest.mark.parametrize(
    "option",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": 2**31},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repeat_penalty": 0},
        {"frequency_penalty": float("inf")},
        {"presence_penalty": None},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 1.0},
    ],
)
def test_settings_out_of_range(option):
    ((name, value),) = option.items()
    with pytest.raises(OptionError) as error:
        Sampling(**option)
    assert str(error.value).startswith(f"{name}={value!r}: give ")


@pytest.fixture
def sampler(smollm2):
    made = []

    def make(grammar=None, **options):
        made.append(Sampler(smollm2.engine.model, Sampling(**options), grammar))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def logits(smollm2):
    return (
        np.random.default_rng(7).normal(0, 3, smollm2.engine.tokenizer.n_vocab).astype(np.float32)
    )


def test_temperature_0_takes_the_likeliest(sampler, logits):
    greedy = sampler()
    assert [greedy.sample(logits) for _ in range(3)] == [logits.argmax()] * 3
    assert sampler(temperature=2.0, top_k=1).sample(logits) == logits.argmax()
    assert sampler(temperature=2.0, top_k=0, top_p=1e-6, min_p=0).sample(logits) == logits.argmax()


def test_a_seed_draws_the_same_again(sampler, logits):
    def draw(seed):
        drawing = sampler(temperature=1.5, seed=seed)
        return [drawing.sample(logits) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_only_the_top_k_are_drawn(sampler, logits):
    drawing = sampler(temperature=5.0, top_k=3, top_p=1.0, min_p=0.0, seed=0)
    assert {drawing.sample(logits) for _ in range(100)} == set(np.argsort(logits)[-3:])


@pytest.mark.parametrize(
    "penalty", [{"repeat_penalty": 9.0}, {"presence_penalty": 30.0}, {"frequency_penalty": 30.0}]
)
def test_penalties_keep_from_repeating(sampler, logits, penalty):
    penalized = sampler(**penalty)
    assert len({penalized.sample(logits) for _ in range(5)}) == 5


def written(smollm2, drawing, logits, n=20):
    tokens = []
    while len(tokens) < n and (token := drawing.sample(logits)) is not None:
        if smollm2.engine.tokenizer.ends(token):
            break
        tokens.append(token)
    return b"".join(map(smollm2.engine.tokenizer.piece, tokens)).decode()


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_grammar_is_followed(smollm2, sampler, logits, temperature):
    for seed in range(5):
        drawing = sampler(
            'root ::= ("yes" | "no") ", " [0-9]{3}', temperature=temperature, seed=seed
        )
        word, digits = written(smollm2, drawing, logits).split(", ")
        assert word in ("yes", "no")
        assert digits.isdigit()
        assert len(digits) == 3


def test_a_grammar_that_no_token_can_follow_ends_the_answer(smollm2, sampler, logits):
    # a lone continuation byte: no token's text has one
    drawing = sampler(r'root ::= "a" [\U0010FFFE]')
    logits[:] = -np.inf
    logits[100] = 0
    assert sampler('root ::= "x"').sample(np.full_like(logits, -np.inf)) is None
    assert drawing.sample(np.full_like(logits, -np.inf)) is None


def test_damaged_logits_are_an_error(sampler, logits):
    logits[5] = np.nan
    with pytest.raises(ModelError, match="NaN"):
        sampler().sample(logits)


GOOD = [
    'root ::= "a"',
    'root ::= a | b\na ::= "x" b?\nb ::= [a-z]+ # a comment\n',
    'root ::= ( "a" |\n "b" )* "c"\r\n\n# end',
    r'root ::= "\"" [^"\\\x00-\x1F]* "\"" "é" [α-ω] [a\]b-] .',
    'root ::= "a"{2} "b"{1,} "c"{0,3} ("d" "e"){,2}'.replace("{,2}", "{0,2}"),
    'root ::= x root "y" | "z"\nx ::= "("',
    'root ::= "" | "a" root',
]
BAD = {
    "": "no rule is called root",
    'start ::= "a"': "no rule is called root",
    "root": "line 1: ::= is missing at ''",
    'root ::= "a': "line 1: a string is missing",
    'root ::= "\\q"': "line 1: a string is missing",
    "root ::= [a-z": "line 1: a character class is missing",
    'root ::= ("a"': "line 1: a closing bracket is missing",
    'root ::= "a")': "line 1: a new line is missing",
    "root ::= other": "no rule is called other",
    'root ::= "a"\nx = "b"': "line 2: ::= is missing",
    "root ::= * ": "something before a repetition",
    'root ::= ""+': "something before a repetition",
    'root ::= "a"{0}{2}': "something before a repetition",
    'root ::= "a"{x}': "a repetition like",
    'root ::= "a"{3,2}': "repetition {3,2}",
    'root ::= "a"{99999}': "repetition {99999}",
    'root ::= root "a" | "b"': "rule root begins with itself",
    'root ::= a\na ::= b "x"\nb ::= a': "begins with itself",
    'root ::= b root "y" | "x"\nb ::= c\nc ::= ""': "rule root begins with itself",
    "root ::= " + "(" * 5000: "brackets within each other",
    "root ::= <a": "a token is missing",
    'root ::= "a\0"': "NUL",
    'root ::= "\ud800"': "not valid Unicode",
    "root ::= " + '"a" ' * 100000: "bytes",
    "\n".join(f"r{i} ::= r{i + 1} | r{i + 1}" for i in range(60)) + '\nr60 ::= "a"\nroot ::= r0': (
        "begins in too many ways"
    ),
}


@pytest.mark.parametrize("grammar", GOOD)
def test_good_grammars(sampler, grammar):
    gbnf.check(grammar)
    sampler(grammar)


@pytest.mark.parametrize("grammar", BAD, ids=range(len(BAD)))
def test_broken_grammars_are_told_and_nothing_is_printed(smollm2, capfd, grammar):
    with pytest.raises(OptionError) as error:
        Sampler(smollm2.engine.model, Sampling(), grammar)
    assert BAD[grammar] in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_json_schema_becomes_a_grammar(sampler):
    schema = {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blue"]},
            "n": {"type": "integer"},
            # names, and data, that read like keywords
            "minimum": {"const": {"format": "any"}, "default": {"not": 3}},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
            "at": {"type": "string", "format": "date-time"},
            "child": {"$ref": "#/definitions/child"},
        },
        "required": ["colour", "n"],
        "definitions": {"child": {"type": "object", "properties": {"x": {"type": "number"}}}},
    }
    sampler(schema_to_grammar(schema))
    sampler(schema_to_grammar('{"type": "string"}'))
    sampler(schema_to_grammar({}))


@pytest.mark.parametrize(
    "schema",
    [
        "{",
        "[]",
        "3",
        {"type": "strange"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/schema.json"},
        {"type": "string", "pattern": "no anchors"},
        {"x": {1, 2}},
    ],
)
def test_broken_schemas(schema):
    with pytest.raises(OptionError, match="json_schema"):
        schema_to_grammar(schema)


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        ({"type": "integer", "minimum": 3}, "minimum=3"),
        ({"type": "object", "properties": {"a": {"format": "email"}}}, "format='email'"),
        ({"type": "array", "items": {"multipleOf": 2}}, "multipleOf=2"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems=True"),
        ({"anyOf": [{"type": "object", "patternProperties": {"a": {}}}]}, "patternProperties="),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string", "not": {}}}}, "not="),
    ],
)
def test_what_a_grammar_would_not_keep_to(schema, name):
    with pytest.raises(OptionError, match=re.escape(name) + ".*can't be kept to: leave it out"):
        schema_to_grammar(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**9},
        {"type": "object", "properties": {"a": {"type": "array", "maxItems": 10**9}}},
        {"type": "string", "pattern": "^a{1000000000}$"},
    ],
)
def test_a_schema_of_endless_repetitions(schema):
    with pytest.raises(OptionError, match="repeat 2000 times at most"):
        schema_to_grammar(schema)


def test_numbers_in_a_pattern_that_repeat_nothing():
    assert "2024" in schema_to_grammar({"type": "string", "pattern": "^2024-[0-9]{4}-9999$"})


def test_numbers_beyond_a_float():
    for options in {"temperature": 10**400}, {"top_p": 10**400}:
        with pytest.raises(OptionError, match="give"):
            Sampling(**options)


def test_a_grammar_of_endless_choices():
    with pytest.raises(OptionError, match="more than 300 parts"):
        gbnf.check("root ::= " + '"a"? ' * 301)
    gbnf.check("root ::= " + '"a"? ' * 300)
