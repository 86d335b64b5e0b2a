"""The streaming grammar: reading anything, generating only calls."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt_agent.errors import UserError
from vpt_agent.tokens import (
    Grammar,
    GrammarState,
    ParsedCall,
    ParseError,
    PerceptionTable,
    ResolvedTable,
    call_tokens,
    check_cells,
    read_text,
)


def _table(grid: int = 8, controls: int = 1) -> ResolvedTable:
    table = PerceptionTable.published(("clip", "dino", "sam"), grid=grid, controls=controls)
    ids: dict[str, int] = {}
    return table.resolve(lambda token: ids.setdefault(token, len(ids) + 10))


TABLE = _table()
G = Grammar(TABLE)
REGION, CLIP = TABLE["region"], TABLE["clip"]
X, Y, S, E = REGION.x, REGION.y, REGION.start, REGION.end
assert CLIP.control is not None
C = CLIP.control
TEXT = 1
OWN = sorted(id_ for row in TABLE.rows for id_ in row.token_ids)


def _only(ids: list[int], grammar: Grammar = G) -> ParsedCall | ParseError:
    (event,) = grammar.read(ids)
    return event


def test_a_region_call_token_by_token() -> None:
    state = G.start
    for token in (TEXT, S, X[1], Y[2], X[3]):
        state, event = G.step(state, token)
        assert event is None
    assert state == GrammarState("region", (S, X[1], Y[2], X[3]))
    assert hash(state) == hash(GrammarState("region", (S, X[1], Y[2], X[3])))
    state, _ = G.step(state, Y[5])
    assert G.forced(state) == E
    state, event = G.step(state, E)
    assert state == G.start
    tokens = (S, X[1], Y[2], X[3], Y[5], E)
    assert event == ParsedCall("region", {"region": [1, 2, 3, 5]}, tokens)


@pytest.mark.parametrize(
    ("payload", "region"),
    [
        ([X[4], X[1], Y[3], Y[0]], [1, 0, 4, 3]),
        ([Y[5], X[2]], [2, 5, 2, 5]),
        ([X[1], X[1], X[1], Y[7]], [1, 7, 1, 7]),
        ([*X, *Y], [0, 0, 7, 7]),
    ],
)
def test_coordinates_are_read_in_any_order(payload: list[int], region: list[int]) -> None:
    event = _only([TEXT, S, *payload, E, TEXT])
    assert isinstance(event, ParsedCall)
    assert event.arguments == {"region": region}


@pytest.mark.parametrize(
    ("ids", "message", "tokens"),
    [
        ([S, E], "it has no x and y coordinate", [S, E]),
        ([S, X[1], E], "it has no y coordinate", [S, X[1], E]),
        ([S, Y[1], E], "it has no x coordinate", [S, Y[1], E]),
        ([S, X[1], Y[1]], "it has no end", [S, X[1], Y[1]]),
        ([S], "it has no end", [S]),
        ([S, X[1], TEXT, Y[1], E], "a token that has no place there", [S, X[1], TEXT]),
        ([S, X[1], C, Y[1], E], "a token that has no place there", [S, X[1], C]),
        ([CLIP.start, CLIP.end], "ends after 0 control", [CLIP.start, CLIP.end]),
        ([CLIP.start, C, C, CLIP.end], "no place there", [CLIP.start, C, C]),
        ([CLIP.start, C], "it has no end", [CLIP.start, C]),
        ([CLIP.start, TEXT], "no place there", [CLIP.start, TEXT]),
        ([CLIP.start, C, E], "no place there", [CLIP.start, C, E]),
    ],
)
def test_what_is_no_call_is_one_error(ids: list[int], message: str, tokens: list[int]) -> None:
    event = _only(ids)
    assert isinstance(event, ParseError)
    assert event.kind == "invalid_arguments"
    assert message in event.message
    assert event.tokens == tuple(tokens)
    assert event.call == ("clip" if ids[0] == CLIP.start else "region")


def test_messages_say_what_was_expected() -> None:
    event = _only([S, E])
    assert isinstance(event, ParseError)
    assert event.message == (
        "the region call is not well formed: it has no x and y coordinate; "
        "expected: start, coordinates, end"
    )


def test_stray_tokens_outside_a_call_are_text() -> None:
    assert G.read([X[0], Y[0], E, C, CLIP.end, TEXT]) == ()
    assert {X[0], Y[7], E, C, CLIP.end} <= G.strays
    assert S not in G.strays
    assert CLIP.start not in G.strays


def test_a_start_inside_a_call_gives_its_error_and_begins_anew() -> None:
    events = G.read([S, X[1], S, X[2], Y[3], E])
    assert [type(e) for e in events] == [ParseError, ParsedCall]
    assert isinstance(events[0], ParseError)
    assert "a region call began before its end" in events[0].message
    assert events[0].tokens == (S, X[1])
    assert events[1] == ParsedCall("region", {"region": [2, 3, 2, 3]}, (S, X[2], Y[3], E))


def test_several_calls_in_one_reading() -> None:
    ids = [S, X[0], Y[0], E, TEXT, CLIP.start, C, CLIP.end, S, Y[1], X[1], E]
    assert [e.kind for e in G.read(ids)] == ["region", "clip", "region"]


def test_more_control_tokens() -> None:
    table = _table(controls=3)
    grammar, row = Grammar(table), table["sam"]
    assert row.control is not None
    whole = call_tokens(table, "sam")
    assert whole == (row.start, row.control, row.control, row.control, row.end)
    assert grammar.read(whole) == (ParsedCall("sam", {}, whole),)
    state = grammar.start
    for token, following in itertools.pairwise(whole):
        state, _ = grammar.step(state, token)
        assert grammar.forced(state) == following
    (event,) = grammar.read((row.start, row.control, row.control, row.end))
    assert isinstance(event, ParseError)
    assert "ends after 2 control token(s)" in event.message


def test_kinds_that_are_not_offered() -> None:
    grammar = Grammar(TABLE, kinds=["region"])
    assert grammar.barred == {CLIP.start, TABLE["dino"].start, TABLE["sam"].start}
    assert G.barred == frozenset()
    event = _only([CLIP.start, C, CLIP.end], grammar)
    assert event == ParseError(
        "unknown_tool", "clip is not offered here; offered: region", (CLIP.start,), "clip"
    )
    events = grammar.read([S, CLIP.start, X[0], Y[0], E])
    assert [e.kind for e in events] == ["invalid_arguments"]
    assert Grammar(TABLE, kinds=()).barred == {row.start for row in TABLE.rows}
    with pytest.raises(UserError, match=r"no such perception kind.*got: zoom"):
        Grammar(TABLE, kinds=["zoom"])


def test_allowed_in_the_order_of_generation() -> None:
    state = G.start
    assert G.allowed(state) is None
    assert G.forced(state) is None
    expected = [set(X), set(Y), set(X[3:]), set(Y[6:]), {E}]
    for token, ids in zip((S, X[3], Y[6], X[3], Y[7]), expected, strict=True):
        state, _ = G.step(state, token)
        assert G.allowed(state) == ids


@pytest.mark.parametrize("grid", [4, 8, 16, 32])
def test_forced_calls_under_the_constraint_are_valid_regions(grid: int) -> None:
    table = _table(grid)
    grammar, rng = Grammar(table), random.Random(grid)
    for _ in range(250):
        state, event = grammar.step(grammar.start, table["region"].start)
        while event is None:
            state, event = grammar.step(state, rng.choice(sorted(grammar.allowed(state) or ())))
        assert isinstance(event, ParsedCall)
        assert len(event.tokens) == 6
        check_cells(event.arguments["region"], grid)
        assert call_tokens(table, "region", event.arguments["region"]) == event.tokens


IDS = st.lists(st.one_of(st.sampled_from(OWN), st.integers(-5, 200)), max_size=40)


@given(IDS, st.sampled_from([None, (), ("region",), ("clip", "sam")]))
def test_no_sequence_of_ids_raises(ids: list[int], kinds: tuple[str, ...] | None) -> None:
    grammar = Grammar(TABLE, kinds=kinds)
    state = grammar.start
    for at, id_ in enumerate(ids, 1):
        state, event = grammar.step(state, id_)
        if isinstance(event, ParsedCall) and event.kind == "region":
            check_cells(event.arguments["region"], 8)
        if event is not None:
            size = len(event.tokens)
            assert event.tokens in (tuple(ids[at - size : at]), tuple(ids[at - 1 - size : at - 1]))
            assert kinds is None or isinstance(event, ParseError) or event.kind in kinds
    error = grammar.finish(state)
    assert (error is None) == (state.kind is None)


@given(IDS, st.integers(0, 2**32))
def test_from_any_state_the_constraint_leads_to_a_call(ids: list[int], seed: int) -> None:
    rng, state = random.Random(seed), G.start
    for id_ in ids:
        state, _ = G.step(state, id_)
    if state.kind is None:
        return
    for _ in range(6):
        state, event = G.step(state, rng.choice(sorted(G.allowed(state) or ())))
        if event is not None:
            assert isinstance(event, ParsedCall)
            return
    pytest.fail("no call after six tokens")


def test_call_tokens_refuses() -> None:
    with pytest.raises(UserError, match=r"needs a region; where: region"):
        call_tokens(TABLE, "region")
    with pytest.raises(UserError, match=r"takes no region; where: clip"):
        call_tokens(TABLE, "clip", (0, 0, 1, 1))
    with pytest.raises(UserError, match="no region of the grid"):
        call_tokens(TABLE, "region", (0, 0, 8, 1))
    with pytest.raises(UserError, match="no such perception kind"):
        call_tokens(TABLE, "zoom")


def test_text_is_read_as_the_published_evaluation_does() -> None:
    table = TABLE.table
    row = table["clip"]
    (event,) = read_text(f"Yes. {row.start}", table)
    assert isinstance(event, ParsedCall)
    assert event.kind == "clip"
    (event,) = read_text(f"Yes. {row.start}", table, complete_controls=False)
    assert isinstance(event, ParseError)
    assert read_text("no call at all", table) == ()
    assert read_text("no kinds either", PerceptionTable(())) == ()
