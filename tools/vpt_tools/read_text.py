"""Read printed text with Tesseract."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from typing import Any

from PIL import Image
from pydantic import Field

from vpt_agent.errors import MissingExtraError, ModelRetry, ToolFailed, VPTError
from vpt_agent.tool import PerceptionTool, PixelBox, ToolArguments, ToolContext, ToolOutput
from vpt_agent.types import Box
from vpt_agent.vision.frames import clamp
from vpt_tools import _draw

LEAST_HEIGHT = 320
"""Pixels: Tesseract wants letters some 30 pixels high, so smaller parts are enlarged."""

MOST_TIMES = 4
_LANGUAGE = re.compile(r"[a-zA-Z_]{2,24}(?:\+[a-zA-Z_]{2,24}){0,3}")


class ReadArguments(ToolArguments):
    """Where to read, and how."""

    box: PixelBox | None = None
    language: str = Field(
        default="eng", description="Tesseract's name of the language: eng, deu, fra, eng+deu ..."
    )
    one_line: bool = Field(default=False, description="the part is a single line of text")
    least: float = Field(default=30, ge=0, le=100, description="sureness of a word, 0 to 100")
    show: bool = Field(default=False, description="show where the words are, too")
    source: str | None = Field(
        default=None, description="id of the picture to read in; the latest one by default"
    )


class ReadText(PerceptionTool):
    """Read the printed text in a picture or in a part of it, letter by letter."""

    name = "read_text"
    arguments = ReadArguments
    needs = frozenset({"view"})
    timeout = 60.0
    concurrency = 2
    extra = "ocr"
    licence = "Apache-2.0"

    def lacks(self) -> VPTError | None:
        """pytesseract, or the program that it calls."""
        if find_spec("pytesseract") is None:
            return MissingExtraError(
                "read_text needs the extra ocr",
                got="pytesseract is not installed",
                fix="pip install 'vpt-agent[ocr]', and the program: apt-get install tesseract-ocr",
            )
        if shutil.which("tesseract") is None:
            return MissingExtraError(
                "read_text needs the program tesseract",
                got="pytesseract is installed, but there is no tesseract on the PATH",
                fix="apt-get install tesseract-ocr (other systems: see Tesseract's own page)",
            )
        return None

    def setup(self, device: str) -> None:
        """See that all is there."""
        error = self.lacks()
        if error is not None:
            raise error

    def run(self, arguments: ReadArguments, context: ToolContext) -> ToolOutput:
        """The text, line by line, and each word with its box in the view."""
        view = context.require_view()
        if not _LANGUAGE.fullmatch(arguments.language):
            raise ModelRetry("language is a name such as eng or eng+deu")
        whole = Box(0, 0, *view.size)
        box = whole if arguments.box is None else clamp(arguments.box, view.size)
        part = view.image.crop((int(box.left), int(box.top), int(box.right), int(box.bottom)))
        times = min(MOST_TIMES, max(1.0, LEAST_HEIGHT / part.height))
        if times > 1:
            size = (round(part.width * times), round(part.height * times))
            part = part.resize(size, Image.Resampling.BICUBIC)
        words = self._words(part, arguments)
        for word in words:
            left, top, right, bottom = (v / times for v in word["box"])
            word["box"] = [round(v, 1) for v in (left + box.left, top + box.top,
                                                 right + box.left, bottom + box.top)]  # fmt: skip
        lines: dict[tuple[int, ...], list[str]] = {}
        for word in words:
            lines.setdefault(word.pop("line"), []).append(word["text"])
        text = "\n".join(" ".join(line) for line in lines.values())
        drawn = []
        if arguments.show:
            named = [(word["box"], str(word["text"])) for word in words]
            drawn = [context.redrawn(view, _draw.boxes(view.image, named))]
        return ToolOutput(
            views=drawn,
            text=text or "No text was found there.",
            structured={"text": text, "words": words, "of": view.id},
        )

    def _words(self, part: Image.Image, arguments: ReadArguments) -> list[dict[str, Any]]:
        """Words that are sure enough, with boxes in pixels of ``part``."""
        import pytesseract

        mode = 7 if arguments.one_line else 3
        seconds = 0.9 * (self.timeout or 60.0)  # the program is ended before the call is
        try:
            data = pytesseract.image_to_data(
                part,
                lang=arguments.language,
                config=f"--psm {mode}",
                timeout=seconds,
                output_type=pytesseract.Output.DICT,
            )
        except pytesseract.TesseractNotFoundError as error:
            raise ToolFailed("the program tesseract cannot be run") from error
        except pytesseract.TesseractError as error:
            if "language" in str(error):
                known = ", ".join(sorted(pytesseract.get_languages())[:12])
                raise ModelRetry(
                    f"the language {arguments.language} is not installed; there are: {known}"
                ) from error
            raise ToolFailed("tesseract could not read this picture") from error
        except RuntimeError as error:  # pytesseract's word for its timeout
            raise ToolFailed("tesseract took too long for this picture") from error
        rows = zip(data["text"], data["conf"], data["left"], data["top"], data["width"],
                   data["height"], data["block_num"], data["par_num"], data["line_num"],
                   strict=True)  # fmt: skip
        return [
            {
                "text": text.strip(),
                "sureness": round(float(sure), 1),
                "box": [left, top, left + width, top + height],
                "line": (block, paragraph, line),
            }
            for text, sure, left, top, width, height, block, paragraph, line in rows
            if text.strip() and float(sure) >= arguments.least
        ]


read_text = ReadText()
