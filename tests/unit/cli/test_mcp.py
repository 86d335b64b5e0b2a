"""``vpt-agent mcp`` and ``ask --mcp``: what a person says and sees."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests.unit.serving.kit import TOOLS, over_http
from vpt_agent.agent import PerceptionAgent
from vpt_agent.cli import app
from vpt_agent.cli import ask as ask_module
from vpt_agent.cli import tools as tools_module
from vpt_agent.errors import MissingExtraError
from vpt_agent.serving import mcp_server
from vpt_agent.serving.tools import ServedTools
from vpt_agent.tool import PerceptionTool, ToolRegistry


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools_module, "installed", lambda: ToolRegistry(TOOLS))


def test_what_is_served_and_what_not() -> None:
    done = run("mcp", "--list")
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].startswith("open_image: Open a picture")
    assert "cut: Cut a box out of a picture." in lines
    assert lines[-2].startswith("steer: not served: it needs a control state")
    assert lines[-1].startswith("reencode: not served: it needs the encoder clip")
    only = run("mcp", "--list", "--only", "cut")
    assert [line.partition(":")[0] for line in only.output.splitlines()] == ["open_image", "cut"]


def test_what_lacks_something_is_not_served_and_is_an_error_when_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Weighed(PerceptionTool):
        """Weigh a thing."""

        name = "weigh"

        def run(self, arguments: object, context: object) -> str:
            return "heavy"

        def lacks(self) -> MissingExtraError:
            return MissingExtraError("it has no scales", got="/home/x", fix="get some")

    monkeypatch.setattr(tools_module, "installed", lambda: ToolRegistry([*TOOLS, Weighed]))
    lines = run("mcp", "--list").output.splitlines()
    assert lines[-1] == "weigh: not served: it has no scales; get some"
    assert not any(line.startswith("weigh: Weigh") for line in lines)
    named = run("mcp", "--list", "--only", "weigh")
    assert named.exit_code == 1
    assert "it has no scales" in named.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing"], "there is no such tool"),
        (["--root", "/"], "the whole machine is too much to allow"),
        (["--root", "/is/not/there"], "there is no such folder"),
        (["--seconds", "0"], "a call needs time"),
        (["--http", "--host", "0.0.0.0"], "other machines could use this server"),
    ],
)
def test_bad_input(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VPT_AGENT_MCP_TOKEN", raising=False)
    done = run("mcp", *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_how_it_is_served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def http(served: ServedTools, **options: Any) -> None:
        options.pop("ready")("http://here/mcp")
        seen.update(options, access=served.options.access, seconds=served.options.seconds)

    monkeypatch.setattr(mcp_server, "serve_http", http)
    monkeypatch.setenv("VPT_AGENT_MCP_TOKEN", "hush")
    done = run("mcp", "--http", "--port", "0", "--root", str(tmp_path), "--allow-urls",
               "--name", "pictures.test", "--seconds", "5")  # fmt: skip
    assert done.exit_code == 0
    assert "serving: http://here/mcp" in done.stderr
    assert "not served: steer: it needs a control state" in done.stderr
    access = seen.pop("access")
    assert (access.roots, access.urls, access.private) == ((tmp_path.resolve(),), True, False)
    assert seen == {
        "host": "127.0.0.1",
        "port": 0,
        "token": "hush",
        "names": ("pictures.test",),
        "seconds": 5.0,
    }


def test_without_the_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vpt_agent.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mcp_types", None)
    done = run("mcp", "--list")
    assert done.exit_code == 1
    assert "pip install 'vpt-agent[mcp]'" in done.stderr


def test_ask_with_the_tools_of_a_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    says = '<tool_call>{"name": "vpt-agent_cut", "arguments": {"box": [0, 0, 4, 2]}}</tool_call>'

    closed: list[bool] = []

    def load(model: str | None, **_: Any) -> PerceptionAgent:
        agent = PerceptionAgent.from_script([says, "Red."], ToolRegistry(), written=True)
        close = agent.close
        monkeypatch.setattr(agent, "close", lambda: (closed.append(True), close()))
        return agent

    monkeypatch.setattr(ask_module, "load_agent", load)
    picture = tmp_path / "p.png"
    Image.new("RGB", (40, 20), "red").save(picture)
    served = ServedTools(ToolRegistry(TOOLS))
    with over_http(served) as address:
        done = run("ask", str(picture), "What colour?", "--mcp", address)
    served.close()
    assert done.exit_code == 0, done.output
    assert done.stdout == "Red.\n"
    assert f"of {address}" in done.stderr
    assert "call: vpt-agent_cut call_1.p1 = 0, 0, 4, 2 of call_1.p1" in done.stderr
    wrong = run("ask", str(picture), "What?", "--mcp", "python 'x")
    assert wrong.exit_code == 2
    assert "this command cannot be read; where: --mcp" in wrong.stderr
    gone = run("ask", str(picture), "What?", "--mcp", "/is/not/there")
    assert gone.exit_code == 1
    assert "an MCP server does not answer as one" in gone.stderr
    # The servers that were started are let go whether the run went well or not.
    assert len(closed) == 3
