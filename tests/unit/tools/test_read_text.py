"""read_text: rendered words come back; without the program the error says how to get it."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from typing import Any

import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.unit.tools.world import call, context, told, view
from vpt_agent.errors import MissingExtraError
from vpt_agent.tool import ToolContext
from vpt_tools import read_text as module
from vpt_tools.read_text import ReadText, read_text

PROGRAM = shutil.which("tesseract") is not None and find_spec("pytesseract") is not None
real = pytest.mark.skipif(
    not PROGRAM, reason="no tesseract here: apt-get install tesseract-ocr, pip install pytesseract"
)


@pytest.fixture(scope="module")
def page() -> ToolContext:
    image = Image.new("RGB", (400, 120), "white")
    draw, letters = ImageDraw.Draw(image), ImageFont.load_default(32)
    draw.text((20, 10), "Bolt M8 x 40", fill="black", font=letters)
    draw.text((20, 65), "Price 12.50", fill="black", font=letters)
    return context(view(image))


@real
def test_lines_of_a_rendered_page(page: ToolContext) -> None:
    result = call(read_text, page)
    assert result.text == "Bolt M8 x 40\nPrice 12.50"
    words = result.structured["words"]
    assert [w["text"] for w in words] == ["Bolt", "M8", "x", "40", "Price", "12.50"]
    left, top, right, bottom = words[4]["box"]
    assert 15 < left < 30
    assert 60 < top < bottom < 110
    assert 80 < right < 120
    assert all(0 <= w["sureness"] <= 100 for w in words)


@real
def test_a_part_of_a_picture_and_boxes_in_the_whole(page: ToolContext) -> None:
    result = call(read_text, page, box=[0, 60, 400, 120], one_line=True, show=True)
    assert result.text == "Price 12.50"
    assert 60 < result.structured["words"][0]["box"][1] < 85
    (shown,) = result.views
    assert shown.size == (400, 120)


@real
def test_no_text_is_no_error() -> None:
    result = call(read_text, context(view(Image.new("RGB", (200, 100), "white"))))
    assert result.ok
    assert result.text == "No text was found there."
    assert result.structured["words"] == []


@real
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"language": "xyz"}, "invalid_arguments", "xyz is not installed; there are: eng"),
        ({"language": "--help; rm"}, "invalid_arguments", "a name such as eng"),
        ({"language": "../../etc"}, "invalid_arguments", "a name such as eng"),
        ({"box": [900, 0, 950, 9]}, "box_outside", "outside the picture"),
        ({"box": [5, 5, 5, 9]}, "box_too_small", "no area"),
        ({"least": 101}, "invalid_arguments", "least"),
        ({"source": "x"}, "unknown_source", "no view 'x'"),
    ],
)
def test_what_is_wrong_is_told(
    page: ToolContext, arguments: dict[str, object], kind: str, message: str
) -> None:
    found, said = told(call(read_text, page, **arguments))
    assert found == kind
    assert message in said


@real
def test_a_program_that_hangs_or_fails_is_told(
    page: ToolContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pytesseract

    for error, message in [
        (RuntimeError("Tesseract process timeout"), "took too long"),
        (pytesseract.TesseractError(1, "it broke"), "could not read this picture"),
        (pytesseract.TesseractNotFoundError(), "cannot be run"),
    ]:

        def broken(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(pytesseract, "image_to_data", broken)
        kind, said = told(call(read_text, page))
        assert kind == "tool_failed"
        assert message in said


def test_without_the_package_or_the_program_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"extra ocr; .*pip install 'vpt-agent\[ocr\]'"):
        call(ReadText())
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs the program tesseract.*apt-get install"):
        call(ReadText())
