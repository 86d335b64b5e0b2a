"""A judge's reply is a score, or is refused with a reason."""

from __future__ import annotations

import pytest

from vpt_agent.evaluation import read_verdict


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("score: 1", 1.0),
        ("score: <0.5>", 0.5),
        ("Score: 0", 0.0),
        ("**Score:** 0.8.", 0.8),
        ("score: .5", 0.5),
        ("score = 0.25", 0.25),
        ("The 1st answer is close. score: 0.2", 0.2),
        ("score: 0.2, so the score: 0.2", 0.2),
        ("0.75", 0.75),
        (" 1.0.\n", 1.0),
    ],
)
def test_a_plain_score(reply: str, score: float) -> None:
    assert read_verdict(reply).score == score


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "no score"),
        ("no digits", "no score"),
        ("The answer has 1 error", "no score"),
        ("0..5", "no score"),
        ("score: 0.2 or score: 0.4", "several scores: 0.2, 0.4"),
        ("score: 5/10", "5/10 is not a plain number"),
        ("score: 0,8", "0,8 is not a plain number"),
        ("score: 80%", "80% is not a plain number"),
        ("score: -1", "-1 is not a plain number"),
        ("score: 2", "2 is not a plain number"),
        ("10", "10 is not a plain number"),
        ("01", "01 is not a plain number"),
        ("score: 1.5", "1.5 is above 1"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(reply: str, reason: str) -> None:
    verdict = read_verdict(reply)
    assert verdict.score is None
    assert reason in verdict.reason
