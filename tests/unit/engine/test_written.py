"""JSON calls while they are decoded: what is allowed, forced and banned, for every tokenizer."""

from __future__ import annotations

import sys
from typing import Any

import jsonschema
import pytest
import torch

from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import TurnRules, decode_turn
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.engine.vocabulary import Vocabulary
from vpt_agent.engine.written import Offered, WrittenGrammar
from vpt_agent.errors import MissingExtraError, ToolDefinitionError, UserError
from vpt_agent.model.chat.qwen import StockQwen
from vpt_agent.model.chat.testing import chat_tokenizer, tiny_stock
from vpt_agent.tokens.table import IM_END
from vpt_agent.tool import read_calls
from vpt_agent.vision.policy import ImagePolicy

BOX = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 1000},
       "minItems": 4, "maxItems": 4}  # fmt: skip
ZOOM = Offered(
    "zoom",
    {
        "type": "object",
        "properties": {"box": BOX, "label": {"type": "string", "maxLength": 6}},
        "required": ["box"],
        "additionalProperties": False,
    },
)
CLOCK = Offered("clock", {"type": "object", "properties": {}, "additionalProperties": False})
CALL = '<tool_call>\n{"name": "zoom", "arguments": {"box": [1, 2, 3, 4]}}\n</tool_call>'


def vocabulary(call_tokens: bool = False, extra: tuple[str, ...] = ()) -> Vocabulary:
    tokenizer = chat_tokenizer(call_tokens=call_tokens)
    tokenizer.add_tokens(list(extra))
    return Vocabulary(tokenizer, end=tokenizer.convert_tokens_to_ids(IM_END))


def walk(grammar: WrittenGrammar, ids: list[int]) -> list[tuple[bool, bool]]:
    """For each id: whether the state before it was inside a call, and whether it was forced."""
    state, seen = grammar.start, []
    for token in ids:
        mask, forced = grammar.allowed(state), grammar.forced(state)
        assert forced in (None, token)
        assert mask is None or forced is not None or bool(mask[token])
        assert token not in grammar.banned(state, False)
        seen.append((state.kind is not None, forced is not None))
        state, event = grammar.step(state, token)
        assert event is None
    return seen


@pytest.mark.parametrize("call_tokens", [False, True])
def test_a_call_is_constrained_and_what_is_around_it_is_free(call_tokens: bool) -> None:
    words = vocabulary(call_tokens)
    grammar = WrittenGrammar(words, [ZOOM, CLOCK])
    before, inside, after = (words.ids(t.encode()) for t in ("So: ", CALL, " and more"))
    seen = walk(grammar, [*before, *inside, *after])
    tag = len(words.ids(b"<tool_call>"))
    assert [s for s, _ in seen[: len(before) + tag]] == [False] * (len(before) + tag)
    assert [s for s, _ in seen[len(before) + tag : len(before) + len(inside)]] == [True] * (
        len(inside) - tag
    )
    assert not any(s for s, _ in seen[len(before) + len(inside) :])
    forced = sum(f for _, f in seen)
    assert forced > 0.6 * len(inside), "names, brackets and the closing tag are no choices"


def test_a_second_call_and_another_tool() -> None:
    words = vocabulary()
    text = CALL + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    seen = walk(WrittenGrammar(words, [ZOOM, CLOCK]), words.ids(text.encode()))
    assert seen[-1] == (True, True)


def test_what_is_thought_is_no_call() -> None:
    words = vocabulary()
    thought = words.ids(b"<think>maybe <tool_call>? no</think>\n")
    grammar = WrittenGrammar(words, [ZOOM])
    seen = walk(grammar, [*thought, *words.ids(CALL.encode())])
    assert not any(inside for inside, _ in seen[: len(thought)])
    assert seen[-1] == (True, True)
    begun = WrittenGrammar(words, [ZOOM], thinking=True)
    assert not any(s for s, _ in walk(begun, words.ids(b"hm <tool_call> hm")))


@pytest.mark.parametrize("call_tokens", [False, True])
def test_where_no_call_may_begin_its_tag_cannot_be_completed(call_tokens: bool) -> None:
    words = vocabulary(call_tokens)
    tag = words.ids(b"<tool_call>")
    for grammar, full in (
        (WrittenGrammar(words, [ZOOM]), True),
        (WrittenGrammar(words, []), False),
    ):
        state = grammar.start
        for token in tag[:-1]:
            assert token not in grammar.banned(state, full)
            state, _ = grammar.step(state, token)
        assert tag[-1] in grammar.banned(state, full)


def test_a_token_that_holds_the_tag_and_more() -> None:
    extra = ('>\n{"name', ">hello", 'x<tool_call>\n{"name": "clo', "<tool_call>{", "call>?")
    words = vocabulary(extra=extra)
    good, bad, whole, begun, wrong = (words.spelled.index(t.encode()) for t in extra)
    grammar = WrittenGrammar(words, [ZOOM, CLOCK])
    state = grammar.start
    assert not {whole, begun} & grammar.banned(state, False)
    assert {whole, begun} <= grammar.banned(state, True)
    assert grammar.step(state, whole)[0].kind == "call"
    for token in words.ids(b"<tool_"):
        state, _ = grammar.step(state, token)
    assert wrong in grammar.banned(state, False)
    for token in words.ids(b"call"):
        state, _ = grammar.step(state, token)
    banned = grammar.banned(state, False)
    assert bad in banned
    assert good not in banned
    inside, _ = grammar.step(state, good)
    assert inside.kind == "call"
    assert words.spelled[grammar.forced(inside)] == b'"'
    # A model that is not constrained may do it all the same: then it is text.
    assert grammar.step(state, bad)[0].kind is None


def test_a_turn_that_must_begin_with_a_call() -> None:
    words = vocabulary()
    grammar = WrittenGrammar(words, [ZOOM, CLOCK], must=[CLOCK])
    state, said = grammar.start, []
    while state.kind is not None:
        token = grammar.forced(state)
        assert token is not None, "a tool without arguments leaves nothing to choose"
        said.append(token)
        state, _ = grammar.step(state, token)
    wanted = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    assert words.text(said).decode() == wanted
    thinking = WrittenGrammar(words, [CLOCK], must=[CLOCK], thinking=True)
    assert words.text(thinking.start.before).startswith(b"</think>\n\n<tool_call>")


def test_a_schema_that_contradicts_itself_is_its_author_s_fault() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 1}},
        "required": ["a"],
    }
    grammar = WrittenGrammar(vocabulary(), [Offered("odd", schema)])
    with pytest.raises(ToolDefinitionError, match=r"cannot constrain a call.*odd"):
        walk(grammar, vocabulary().ids(b"<tool_call>"))


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        def __len__(self) -> int:
            return 3

        def get_added_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(UserError, match=r"cannot be used to constrain.*Slow.*fast tokenizer"):
        Vocabulary(Slow(), end=0)


def test_without_the_extra_the_error_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("llguidance")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"vpt-agent\[json\]"):
        vocabulary()


@pytest.mark.parametrize("call_tokens", [False, True])
def test_random_weights_always_write_calls_that_fit(call_tokens: bool, figures: Any) -> None:
    net, tokenizer = tiny_stock("qwen2_vl", call_tokens=call_tokens)
    words = Vocabulary(tokenizer, end=tokenizer.convert_tokens_to_ids(IM_END))
    engine = Engine(StockQwen(net), ImagePolicy(kind="native"))
    prompt = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    runs = []
    for seed in range(12):
        grammar = WrittenGrammar(words, [ZOOM, CLOCK], must=[ZOOM])
        rules = TurnRules(
            grammar=grammar,
            end=-1,
            stop=frozenset(),
            starts=frozenset(),
            ban=grammar.banned,
            max_new_tokens=140,
            max_calls=1,
        )
        runs.append(_story(engine, prompt, Sampler(Sampling(1.0, seed=seed)), rules))
    turns = engine.drive(runs)
    removed, sampled, forced = [], 0, 0
    for turn in turns:
        ids = [i for span in turn.spans for i in span.ids]
        # What chance says behind the call may look like the end of a thought.
        text, closed, _ = tokenizer.decode(ids).partition("</tool_call>")
        found = read_calls(text + closed, cut=True)
        (call,) = found.items
        jsonschema.validate(dict(call.arguments), dict(ZOOM.schema))
        assert call.repairs == ()
        assert len(turn.removed) == len(turn.drawn) == len(ids)
        removed += turn.removed
        sampled += sum(len(s.ids) for s in turn.spans if s.source == "sampled")
        forced += sum(len(s.ids) for s in turn.spans if s.source == "forced")
    assert all(0 <= r <= 1 for r in removed)
    figures(
        "JSON calls of random weights",
        tags="one token" if call_tokens else "letters",
        calls=len(turns),
        valid=len(turns),
        sampled=sampled,
        forced=forced,
        mean_mass_removed=sum(removed) / len(removed),
    )


def _story(engine: Engine, prompt: list[int], sampler: Sampler, rules: TurnRules) -> Any:
    from vpt_agent.engine.parts import Tokens

    session = engine.session()
    fed = yield from session.feed([Tokens(prompt)])
    return (yield from decode_turn(session, fed[-1].logits[-1], sampler, rules))


def test_a_mask_narrower_than_the_logits_allows_nothing_beyond() -> None:
    logits = torch.zeros(10)
    logits[9] = 5.0
    allowed = torch.tensor([False, True, True])
    choice = Sampler(Sampling()).choose(logits, allowed=allowed, banned=[1])
    assert choice.token == 2
    assert choice.free == 9
    assert choice.removed == pytest.approx(1 - float(torch.softmax(logits, 0)[2]))


def test_unconstrained_grammar_leaves_everything_free() -> None:
    grammar = WrittenGrammar(None, [ZOOM], must=[ZOOM])
    state = grammar.start
    assert (state.kind, grammar.allowed(state), grammar.forced(state)) == (None, None, None)
    assert grammar.step(state, 5)[0] is state
    assert grammar.banned(state, True) == frozenset()
