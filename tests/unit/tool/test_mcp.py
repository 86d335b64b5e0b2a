"""Tools of an MCP server of the official SDK in our registry, and what if it misbehaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.serving.kit import TOOLS, over_http
from tests.unit.tool.mcp_parts import make_server
from vpt_agent.agent import PerceptionAgent
from vpt_agent.errors import MissingExtraError, ServerError, ToolDefinitionError, UserError
from vpt_agent.serving.tools import ServedTools
from vpt_agent.tool import ToolContext, ToolRegistry, execute, mcp_link
from vpt_agent.types import Box, ToolCall, ToolResult, View

PROGRAM = Path(__file__).with_name("mcp_parts.py")
COMMAND = [sys.executable, str(PROGRAM)]
VIEWS = {
    name: View(name, Image.new("RGB", size, colour), name, Box(0, 0, *size), size)
    for name, size, colour in (("image_1", (8, 4), "red"), ("image_2", (6, 6), "blue"))
}


def call(tool: Any, **arguments: object) -> ToolResult:
    made = ToolCall("c1", tool.name, arguments, "json")
    return execute(tool, made, lambda: ToolContext(views=VIEWS))


@pytest.fixture(scope="module")
def parts() -> Iterator[ToolRegistry]:
    registry = ToolRegistry()
    registry.mount_mcp(make_server(), prefix="p_", pictures="image")
    yield registry
    registry.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def links() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "vpt-mcp"]


def test_names_schemas_contracts(parts: ToolRegistry) -> None:
    names = [tool.full_name for tool in parts]
    assert names == [
        "p_picture@1", "p_fail@1", "p_find_part@1", "p_look@1", "p_slow@1", "p_odd_name@1",
        "p_environment@1", "p_change@1",
    ]  # fmt: skip
    tool = parts["p_find_part"]
    assert tool.description == "Say where a part lies."
    assert tool.json_schema()["properties"]["name"]["pattern"] == "^[a-z]+$", "shown whole"
    assert parts.owner("p_odd_name") == "odd/name é of the MCP server MCPServer"
    assert len(parts.contracts()["p_look@1"]) == 64
    look = parts["p_look"]
    assert set(look.json_schema()["properties"]) == {"word", "source"}
    assert look.json_schema()["required"] == ["word"]
    assert look.needs == {"view"}


def test_calls_are_checked_here_and_answered_there(parts: ToolRegistry) -> None:
    result = call(parts["p_find_part"], name="bolt", most="2")
    assert result.structured == {"name": "bolt", "shelf": 7, "most": 2}
    assert result.metadata["repairs"] == ["most: '2' was read as 2"]
    assert "shelf" in (result.text or "")
    for wrong in ({}, {"name": []}, {"name": "bolt", "most": "many"}):
        error = call(parts["p_find_part"], **wrong).error
        assert error is not None
        assert error.kind == "invalid_arguments"
    # A pattern is the server's to check: its words come back in one line.
    error = call(parts["p_find_part"], name="BOLT").error
    assert error is not None
    assert error.kind == "tool_failed"
    assert "\n" not in error.message


def test_pictures_both_ways(parts: ToolRegistry) -> None:
    result = call(parts["p_picture"], colour="lime")
    (view,) = result.views
    assert (view.size, view.image.getpixel((0, 0)), result.text) == (
        (30, 10),
        (0, 255, 0),
        "a picture",
    )
    assert call(parts["p_look"], word="one").text == "one: (8, 4) (255, 0, 0) none"
    assert call(parts["p_look"], word="two", source="image_2").text == (
        "two: (6, 6) (0, 0, 255) none"
    )
    error = call(parts["p_look"], word="x", source="image_9").error
    assert error is not None
    assert error.kind == "unknown_source"


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("ours", "box_outside", "too far"),
        ("raise", "tool_failed", "the drawer is stuck"),
        ("broken", "tool_failed", "sent a picture that cannot be used"),
        ("many", "tool_failed", "sent more than 16 pictures"),
    ],
)
def test_what_goes_wrong_there_is_a_listed_kind(
    parts: ToolRegistry, how: str, kind: str, message: str
) -> None:
    error = call(parts["p_fail"], how=how).error
    assert error is not None
    assert error.kind == kind
    assert message in error.message


def test_long_and_odd_content_is_bounded(parts: ToolRegistry) -> None:
    result = call(parts["p_fail"], how="long")
    assert len(result.text or "") == 20_000
    assert result.structured is None
    assert not set(result.text or "") & {"\x00", "\x1b"}
    other = call(parts["p_fail"], how="other")
    assert other.text == (
        "[audio left out]\n[manual: parts://manual]\nwords\n[parts://c: data, left out]"
    )
    assert [view.size for view in other.views] == [(2, 2)]


def test_a_slow_call_ends_in_time_and_the_next_works(parts: ToolRegistry) -> None:
    slow = parts["p_slow"]
    slow.timeout = 0.3
    try:
        result = call(slow, seconds=1.0)
        assert result.error is not None
        assert result.error.kind == "timeout"
        assert "abandoned" not in result.metadata, "its thread has ended"
    finally:
        slow.timeout = 60.0
    assert call(parts["p_find_part"], name="nut").ok


def test_a_server_that_is_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPT_TEST_SECRET", "hush")
    before, files = len(links()), open_files()
    registry = ToolRegistry()
    wanted = ["environment", "fail", "find_part"]
    environment, fail, find = registry.mount_mcp(COMMAND, only=wanted, env={"PARTS": "1"})
    assert environment.name == "Parts_more_environment"
    assert registry.owner(find.name) == f"find_part of the MCP server {Path(sys.executable).name}"
    assert len(links()) == before, "mounting hangs up again"

    names = (call(environment).text or "").split()
    assert "PARTS" in names
    assert "VPT_TEST_SECRET" not in names
    assert len(links()) == before + 1, "one connection for all its tools"

    error = call(fail, how="die").error
    assert error is not None
    assert (error.kind, error.message) == ("tool_failed", "the MCP server of this tool is gone")
    assert call(find, name="nut").ok, "it is started again"
    assert len(links()) == before + 1
    registry.close()
    assert len(links()) == before
    assert open_files() <= files


@pytest.mark.parametrize("told", [True, False])
def test_a_tool_that_the_server_changed_is_not_called(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_link, "FRESH", 1000.0 if told else 0.3)
    registry = ToolRegistry()
    find, change = registry.mount_mcp(make_server(), only=["find_part", "change"])
    assert call(find, name="nut").ok
    assert call(change, tell=told).text == "changed"
    deadline = time.monotonic() + 5
    while (error := call(find, name="nut").error) is None or "not called" not in error.message:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert error.kind == "tool_failed"
    assert error.message == "the MCP server changed this tool since it was mounted: not called"
    registry.close()


def test_a_tool_that_is_gone_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    server, registry = make_server(), ToolRegistry()
    (find,) = registry.mount_mcp(server, only=["find_part"])
    server.remove_tool("find_part")
    error = call(find, name="nut").error
    assert error is not None
    assert error.message == "the MCP server does not have this tool any more"
    registry.close()


def test_two_mounts_conflict_by_name_and_both_owners_are_named(parts: ToolRegistry) -> None:
    before = parts.contracts()
    with pytest.raises(
        ToolDefinitionError, match=r"two tools are called p_find_part@1.*find_part of the MCP"
    ):
        parts.mount_mcp(make_server(), prefix="p_", only=["find_part"])
    assert parts.contracts() == before, "all or none"


def test_a_tool_that_cannot_be_one_is_reported_by_name_when_it_is_asked_for() -> None:
    from mcp.server.lowlevel import Server
    from mcp_types import ListToolsResult, Tool

    async def listed(*_: object) -> ListToolsResult:
        schemas: list[dict[str, Any]] = [
            {"type": "object"},
            {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1/x.json"}}},
            {"type": "object", "properties": {"x": {"description": "y" * 70_000}}},
            {"type": "object", "properties": {"x": {"type": "nothing"}}},
        ]
        tools = [Tool(name=f"t{i}", input_schema=schema) for i, schema in enumerate(schemas)]
        return ListToolsResult(tools=tools)

    registry = ToolRegistry()
    tools = registry.mount_mcp(Server("odd", on_list_tools=listed))
    assert [tool.name for tool in tools] == ["odd_t0"]
    assert tools[0].description == "t0"
    assert [failed.name for failed in registry.failed] == ["odd_t1", "odd_t2", "odd_t3"]
    reasons = [failed.error for failed in registry.failed]
    assert "nothing is fetched to check a call" in reasons[0]
    assert "the schema of a tool is too large" in reasons[1]
    assert "is no JSON Schema" in reasons[2]
    with pytest.raises(ToolDefinitionError, match="installed but did not load"):
        registry["odd_t1"]


def test_a_pattern_that_takes_ages_is_not_tried_here() -> None:
    from mcp.server.lowlevel import Server
    from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool

    schema = {
        "type": "object",
        "properties": {"x": {"type": "string", "pattern": "^(a+)+$"}},
        "patternProperties": {"^(b+)+$": {"type": "integer"}},
        "additionalProperties": False,
    }

    async def listed(*_: object) -> ListToolsResult:
        return ListToolsResult(tools=[Tool(name="t", input_schema=schema)])

    async def answered(*_: object) -> CallToolResult:
        return CallToolResult(content=[TextContent(text="fine")])

    registry = ToolRegistry()
    (tool,) = registry.mount_mcp(Server("s", on_list_tools=listed, on_call_tool=answered))
    began = time.monotonic()
    assert call(tool, x="a" * 60 + "!", **{"b" * 60 + "!": 1}).text == "fine"
    assert time.monotonic() - began < 5
    registry.close()


@pytest.mark.parametrize(
    ("server", "options", "error", "message"),
    [
        ("parts", {}, UserError, "this is no MCP server; got: parts; expected: an http"),
        ([], {}, UserError, "the command that starts an MCP server is empty"),
        (["/is/not/there"], {}, ServerError, "does not answer as one; where: there"),
        ([sys.executable, "-c", "print('hello')"], {"connect_timeout": 5.0}, ServerError,
         "does not answer as one.*start it by hand"),
        (["sleep", "60"], {"connect_timeout": 0.5}, ServerError, "nothing in 0.5 s"),
        ("http://user:hush@127.0.0.1:9/mcp", {"connect_timeout": 5.0}, ServerError,
         "where: http://127.0.0.1:9/mcp"),
        (make_server(), {"only": ["nothing"]}, UserError, "has no such tool.*find_part"),
    ],
)  # fmt: skip
def test_what_cannot_be_mounted(
    server: object, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    registry, before = ToolRegistry(), links()
    with pytest.raises(error, match=message) as caught:
        registry.mount_mcp(server, **options)
    assert "hush" not in str(caught.value)
    assert len(registry) == 0
    assert [link for link in links() if link not in before] == []


def test_an_argument_for_pictures_that_is_not_there() -> None:
    registry = ToolRegistry()
    tools = registry.mount_mcp(make_server(), only=["look", "slow"], pictures={"look": "photo"})
    assert [tool.remote for tool in tools] == ["slow"]
    assert "a tool has no such argument for a picture" in registry.failed[0].error


def test_without_the_sdk_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(MissingExtraError, match=r"need the official SDK.*vpt-agent\[mcp\]"):
        ToolRegistry().mount_mcp(COMMAND)


def test_our_own_server_mounted_in_our_own_registry() -> None:
    served = ServedTools(ToolRegistry(TOOLS))
    registry = ToolRegistry()
    with over_http(served) as address:
        registry.mount_mcp(address, prefix="far_", pictures="image", only=["cut", "sleep"])
        result = call(registry["far_cut"], box=[0, 0, 4, 2], source="image_2")
        assert result.structured == {"colour": [0, 0, 255]}
        assert result.text == '{"colour": [0, 0, 255]}', "names that hold over there are left out"
        assert [view.size for view in result.views] == [(4, 2)]
        error = call(registry["far_cut"], box=[90, 90, 95, 95]).error
        assert error is not None
        assert error.kind == "box_outside"
        registry.close()
    served.close()


def test_a_token_is_sent() -> None:
    served = ServedTools(ToolRegistry(TOOLS))
    with over_http(served, token="hush") as address:
        with pytest.raises(ServerError, match="does not answer as one"):
            ToolRegistry().mount_mcp(address)
        assert ToolRegistry().mount_mcp(address, token="hush")
    served.close()


@pytest.mark.parametrize("written", [True, False])
def test_an_agent_uses_them(parts: ToolRegistry, written: bool, tmp_path: Path) -> None:
    from vpt_agent.tokens import PerceptionTable, own_kind

    picture = Image.new("RGB", (64, 64), "green")
    if written:
        says = '<tool_call>{"name": "p_look", "arguments": {"word": "seen"}}</tool_call>'
        agent = PerceptionAgent.from_script([says, "Green."], parts, written=True)
    else:
        kind = own_kind("p_look", payload="text", pattern="[a-z]{4}", argument="word")
        says = kind.call_text(text="seen")
        table = PerceptionTable((kind,))
        agent = PerceptionAgent.from_script([says, "Green."], parts, table=table)
    answer = agent.run("What colour?", image=picture, trace=tmp_path / "run")
    assert answer.text == "Green."
    assert answer.results[0].text == "seen: (64, 64) (0, 128, 0) none"
    started = answer.trace.events[0]
    assert started.tools["p_look@1"] == parts["p_look"].contract_hash
    agent.close()


def test_the_sdk_is_not_loaded_for_tools_at_hand() -> None:
    code = "import sys; import vpt_agent.tool; print('mcp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
