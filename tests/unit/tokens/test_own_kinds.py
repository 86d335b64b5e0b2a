"""Kinds of one's own: the pattern of a text, calls that carry one, and what a manifest keeps."""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt_agent.errors import UserError
from vpt_agent.tokens import (
    Grammar,
    ParsedCall,
    ParseError,
    PerceptionKind,
    PerceptionTable,
    ResolvedTable,
    TextPattern,
    call_tokens,
    own_kind,
    read_text,
)
from vpt_agent.tokens.table import PUBLISHED, REGION

SUM = own_kind("sum", payload="text", pattern=r"\d{1,3}[\-+*]\d{1,3}", argument="expression")
KEY = own_kind("part", tool="stock", payload="text", pattern=r"[A-Z]{2}-? ?\d?", argument="key")
NOW = own_kind("now", payload="none")
ZOOM = own_kind("zoom", payload="grid", grid=4)
AGAIN = own_kind("again", payload="control")
KINDS = (*PUBLISHED.values(), SUM, KEY, NOW, ZOOM, AGAIN)


def resolved(*kinds: PerceptionKind) -> ResolvedTable:
    ids: dict[str, int] = {}
    return PerceptionTable(kinds or KINDS).resolve(lambda t: ids.setdefault(t, len(ids) + 10))


TABLE = resolved()
G = Grammar(TABLE)

PATTERNS = [
    r"\d{1,3}[\-+*]\d{1,3}",
    r"[A-Z]{2}-? ?\d?",
    r"a?b?c",
    r"[a-c]{0,2}b{1,2}\.",
    r"x{3}",
    r"[\]\\^-]\{",
    r"\d?\d?\d{2}",
]


@pytest.mark.parametrize("source", PATTERNS)
def test_a_pattern_means_what_it_means_to_re(source: str) -> None:
    pattern, rng = TextPattern.parse(source), random.Random(source)
    inside = pattern.characters
    for _ in range(400):
        text = "".join(rng.choice(inside) for _ in range(rng.randint(0, pattern.longest + 1)))
        assert pattern.fits(text) == (re.fullmatch(source, text) is not None), text
    assert not pattern.fits("\0")
    assert not pattern.fits(inside[0] * (pattern.longest + 1))


@pytest.mark.parametrize("source", PATTERNS)
def test_every_beginning_can_be_brought_to_an_end(source: str) -> None:
    pattern, rng = TextPattern.parse(source), random.Random(source)
    for _ in range(200):
        text = ""
        while True:
            found = pattern.following(text)
            assert found is not None
            characters, may_end = found
            assert characters or may_end
            assert may_end == pattern.fits(text)
            if may_end and (not characters or rng.random() < 0.3):
                break
            text += rng.choice(characters)
        assert re.fullmatch(source, text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a+", r"cannot be used; where: 'a\+', character 1; got: \+"),
        ("(ab)", r"cannot be used.*got: \("),
        ("a|b", r"got: \|"),
        ("a.", r"got: \."),
        ("[^a]", "a class of what may not stand there"),
        ("[a", "a class that is empty or has no end"),
        ("[]a", "a class that is empty or has no end"),
        ("[z-a]", "got: z-a"),
        (r"[\d-z]", "got: 0123456789-z"),
        ("a{2,1}", r"got: \{2,1\}"),
        ("a{,3}", r"got: \{,3\}"),
        ("a\\", r"got: \\"),
        (r"\w", r"got: \\w"),
        ("", "length that it cannot have.*got: 0 to 0"),
        ("a?", "got: 0 to 1 characters"),
        ("a{300}", "got: 300 to 300 characters"),
        ("é", "plain ASCII only.*got: 'é'"),
        ("a\n", "plain ASCII only"),
    ],
)
def test_patterns_that_are_none(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextPattern.parse(source)


def test_a_text_call_token_by_token() -> None:
    whole = call_tokens(TABLE, "sum", text="12+7")
    assert len(whole) == 6
    assert G.read((1, *whole, 1)) == (ParsedCall("sum", {"expression": "12+7"}, whole),)
    ids = dict(zip(SUM.characters, TABLE["sum"].characters, strict=True))
    digits = {ids[c] for c in "0123456789"}
    state, _ = G.step(G.start, whole[0])
    assert G.allowed(state) == digits
    state, _ = G.step(state, ids["1"])
    assert G.allowed(state) == digits | {ids[c] for c in "+-*"}
    for token in whole[2:-1]:
        state, event = G.step(state, token)
        assert event is None
    assert G.allowed(state) == digits | {whole[-1]}
    assert G.forced(state) is None


def test_characters_outside_a_call_are_text() -> None:
    letters = set(TABLE["sum"].characters)
    assert not letters & G.strays
    assert G.read(sorted(letters)) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [("12+", "'12[+]' is no whole text"), ("", "'' is no whole text")],
)
def test_a_text_that_is_none_is_one_error(text: str, message: str) -> None:
    ids = dict(zip(SUM.characters, TABLE["sum"].characters, strict=True))
    row = TABLE["sum"]
    (event,) = G.read((row.start, *(ids[c] for c in text), row.end))
    assert isinstance(event, ParseError)
    assert re.search(message, event.message)
    assert event.message.endswith(
        r"expected: start, text like \d{1,3}[\-+*]\d{1,3}, one character a token, end"
    )
    (event,) = G.read((row.start, ids["+"]))
    assert isinstance(event, ParseError)
    assert "no place there" in event.message


@pytest.mark.parametrize("kind", [SUM, KEY, ZOOM, NOW, AGAIN], ids=lambda k: k.name)
def test_a_thousand_calls_under_the_constraint_are_calls(kind: PerceptionKind) -> None:
    rng, seen = random.Random(kind.name), set()
    for _ in range(1000):
        state, event = G.step(G.start, TABLE[kind.name].start)
        while event is None:
            state, event = G.step(state, rng.choice(sorted(G.allowed(state) or ())))
        assert isinstance(event, ParsedCall)
        assert event.kind == kind.name
        if kind.payload == "text":
            text = event.arguments[kind.argument]
            assert re.fullmatch(kind.pattern, text)
            assert call_tokens(TABLE, kind.name, text=text) == event.tokens
        seen.add(event.tokens)
    assert (len(seen) > 40) == (kind.payload in ("text", "grid"))


OWN = sorted({i for row in TABLE.rows for i in (*row.token_ids, *row.characters)})


@given(st.lists(st.one_of(st.sampled_from(OWN), st.integers(-5, 300)), max_size=30))
def test_no_sequence_of_ids_raises_and_each_state_has_a_way_on(ids: list[int]) -> None:
    state = G.start
    for token in ids:
        state, _ = G.step(state, token)
        if state.kind is not None:
            assert G.allowed(state)
    while state.kind is not None:
        state, event = G.step(state, min(G.allowed(state) or ()))
        if event is not None:
            assert isinstance(event, ParsedCall)


def test_calls_as_text() -> None:
    table = PerceptionTable(KINDS)
    said = [
        SUM.call_text(text="3*3"),
        KEY.call_text(text="AB- 7"),
        NOW.call_text(),
        ZOOM.call_text(region=[0, 1, 2, 3]),
        AGAIN.call_text(),
    ]
    text = f"Wait: {' then '.join(said)}, 4-4 AB."
    calls = read_text(text, table)
    assert [(c.kind, c.arguments) for c in calls if isinstance(c, ParsedCall)] == [
        ("sum", {"expression": "3*3"}),
        ("part", {"key": "AB- 7"}),
        ("now", {}),
        ("zoom", {"region": [0, 1, 2, 3]}),
        ("again", {}),
    ]
    assert len(calls) == 5


def test_calls_that_do_not_fit_their_kind() -> None:
    with pytest.raises(UserError, match=r"spelled otherwise; where: sum; got: no argument.*text="):
        SUM.call_text()
    with pytest.raises(UserError, match=r"spelled otherwise; where: now; got: a text"):
        NOW.call_text(text="x")
    with pytest.raises(UserError, match=r"spelled otherwise; where: sum; got: a grid"):
        SUM.call_text(region=[0, 0, 0, 0])
    with pytest.raises(UserError, match=r"text cannot stand in a call; where: sum; got: '3'"):
        SUM.call_text(text="3")
    with pytest.raises(UserError, match=r"this kind needs a text; where: sum"):
        call_tokens(TABLE, "sum")
    with pytest.raises(UserError, match=r"this kind takes no text; where: region"):
        call_tokens(TABLE, "region", (0, 0, 1, 1), text="x")
    with pytest.raises(UserError, match="only a text payload has a pattern; where: x; got: none"):
        own_kind("x", payload="none", pattern="a")
    with pytest.raises(UserError, match="fills an argument of its tool, by name; where: x"):
        own_kind("x", payload="text", pattern="a")
    for name in ("Sum", "", "9a", "region", "detection", "a b"):
        with pytest.raises(UserError, match="cannot be the name of a perception kind of your own"):
            own_kind(name, payload="none")


def test_a_manifest_keeps_kinds_and_says_nothing_new_of_the_published_ones() -> None:
    table = PerceptionTable(KINDS)
    manifest = table.to_manifest()
    assert PerceptionTable.from_manifest(manifest) == table
    for row in manifest["kinds"][:4]:
        assert not {"pattern", "argument"} & set(row)
    by_name = {row["name"]: row for row in manifest["kinds"]}
    assert by_name["sum"]["pattern"] == SUM.pattern
    assert by_name["part"]["tool"] == "stock"


def test_published_tokens_keep_their_place() -> None:
    before, after = (PerceptionTable(k).tokens_to_add() for k in (tuple(PUBLISHED.values()), KINDS))
    assert after[1][: len(REGION.grid_tokens) + 2] == before[1][: len(REGION.grid_tokens) + 2]
    assert [t for t in after[1] if t in before[1]] == before[1]
    assert not set(after[1]) & set(SUM.characters)
    pairs = itertools.combinations([SUM, KEY, NOW, ZOOM, AGAIN], 2)
    assert not any(set(a.own_tokens) & set(b.own_tokens) for a, b in pairs)
