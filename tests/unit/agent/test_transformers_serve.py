"""``transformers serve`` on the loopback address, with a real checkpoint that can call a tool."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.model.chat.speaking import save_speaking
from vpt_agent.model.remote import RemoteOptions
from vpt_agent.tool import PixelBox, SourceView, ToolRegistry, perception_tool
from vpt_agent.types import Limits

pytest.importorskip("fastapi", reason="transformers serve needs fastapi")
pytest.importorskip("uvicorn", reason="transformers serve needs uvicorn")

CALL = {"name": "where", "arguments": {"box": [0, 0, 500, 1000]}}


@perception_tool
def where(view: SourceView, box: PixelBox) -> list:
    """Tell a box, and show it."""
    whole = [round(v) for v in box]
    return [f"{view.id}: {whole}", view.image.crop(whole)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    from transformers.cli.serve import Serve

    folder = tmp_path_factory.mktemp("speaking")
    save_speaking(folder, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", "A cat.")
    port = free_port()
    server = Serve(
        force_model=str(folder), host="127.0.0.1", port=port, device="cpu", non_blocking=True
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    for _ in range(200):
        try:
            with urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
            break
        except URLError:
            time.sleep(0.1)
    yield f"http://127.0.0.1:{port}/v1", str(folder)
    server.kill_server()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_served_model_calls_a_tool_and_answers(
    served: tuple[str, str], stream: bool, tmp_path: Path
) -> None:
    url, model = served
    agent = PerceptionAgent.from_server(
        model,
        url,
        tools=ToolRegistry([where]),
        options=RemoteOptions(stream=stream, calls="text", backoff=0.05),
    )
    image = Image.fromarray(np.zeros((80, 120, 3), np.uint8))
    answer = agent.run("What is there?", image=image, seed=1, trace=tmp_path / "run")
    assert (answer.status, answer.text) == ("answered", "A cat.")
    assert answer.results[0].text == "image_1: [0, 0, 60, 80]"
    assert answer.results[0].views[0].size == (60, 80)
    answered = [e for e in answer.trace.events if e.type == "request_answered"]
    assert [e.completion_tokens for e in answered] == [2, 2]
    assert answered[1].prompt_tokens > answered[0].prompt_tokens > 4


def test_native_tools_are_taken_by_the_server_too(served: tuple[str, str]) -> None:
    url, model = served
    agent = PerceptionAgent.from_server(
        model, url, tools=ToolRegistry([where]), options=RemoteOptions(stream=False)
    )
    image = Image.new("RGB", (40, 40))
    answer = agent.run("What?", image=image, limits=Limits(rounds=2), seed=1)
    # It reads no calls out of its model's words, so they are found there.
    assert [call.arguments["box"] for call in answer.calls] == [[0, 0, 20, 40]]
    assert (answer.text, answer.usage.requests) == ("A cat.", 2)
