"""Our tools in the hands of the official client: in this process, over HTTP, over stdio."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters

from tests.unit.serving.kit import (
    TOOLS,
    data_url,
    kind,
    over_http,
    pictures,
    sleep,
    talk,
    texts,
)
from vpt_agent.errors import ToolDefinitionError, UserError
from vpt_agent.serving.mcp_server import http_app, is_loopback, make_server, serve_http
from vpt_agent.serving.tools import ServedTools, ServeOptions
from vpt_agent.serving.workspace import Room
from vpt_agent.tool import Access, ToolRegistry, perception_tool

ERAS = ["legacy", "auto"]
"""With sessions, and the protocol of 2026 without."""


@pytest.fixture
def served() -> Iterator[ServedTools]:
    made = ServedTools(ToolRegistry(TOOLS))
    yield made
    made.close()


@pytest.fixture
def address(served: ServedTools) -> Iterator[str]:
    with over_http(served) as url:
        yield url


def test_the_list_says_how_a_picture_is_given_and_leaves_out_what_needs_a_model(
    served: ServedTools,
) -> None:
    async def work(client: Client) -> None:
        listed = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert list(listed) == ["open_image", "cut", "seen", "break_down", "sleep", "own_image"]
        schema = listed["cut"].input_schema
        assert schema["properties"]["image"]["description"].startswith(
            "the picture to look at: a data URL"
        )
        assert schema["required"] == ["box"]
        assert "image" not in listed["break_down"].input_schema["properties"]
        assert listed["own_image"].input_schema["properties"]["image"] == {"type": "integer"}
        assert "open_image" in (client.instructions or "")
        refused = await client.call_tool("steer", {})
        assert kind(refused) == "unknown_tool"
        assert "not served: it needs a control state" in texts(refused)[0]
        assert kind(await client.call_tool("curt", {})) == "unknown_tool"

    talk(make_server(served), work)
    assert set(served.left_out) == {"steer", "reencode"}
    assert "the encoder clip of a model" in served.left_out["reencode"]


@pytest.mark.parametrize("mode", ERAS)
def test_a_picture_comes_with_a_call_and_is_named_by_the_next(address: str, mode: str) -> None:
    async def work(client: Client) -> None:
        first = await client.call_tool("cut", {"image": data_url("blue"), "box": [0, 0, 10, 20]})
        assert not first.is_error
        assert [image.size for image in pictures(first)] == [(10, 20)]
        assert first.structured_content["result"] == {"colour": [0, 0, 255]}
        (view,) = first.structured_content["views"]
        assert (view["size"], view["box"]) == ([10, 20], [0, 0, 10, 20])
        assert f"{view['id']}: 10 x 20 pixels, box 0, 0, 10, 20 of {view['of']}" in texts(first)

        again = await client.call_tool("cut", {"source": view["id"], "box": [5, 5, 10, 10]})
        assert again.structured_content["views"][0]["box"] == [5, 5, 10, 10]
        assert again.structured_content["views"][0]["of"] == view["of"]
        whole = await client.call_tool("cut", {"source": view["of"], "box": [30, 0, 40, 20]})
        assert whole.structured_content["views"][0]["box"] == [30, 0, 40, 20]
        ids = {r.structured_content["views"][0]["id"] for r in (first, again, whole)}
        assert len(ids) == 3

    talk(address, work, mode=mode)


@pytest.mark.parametrize("mode", ERAS)
def test_a_picture_is_opened_once_for_several_calls(address: str, mode: str) -> None:
    async def work(client: Client) -> None:
        opened = await client.call_tool("open_image", {"image": data_url("green")})
        (view,) = opened.structured_content["views"]
        assert texts(opened) == [f"{view['id']}: 40 x 20 pixels"]
        assert pictures(opened) == []
        shown = await client.call_tool("open_image", {"image": data_url("green"), "show": True})
        assert [image.size for image in pictures(shown)] == [(40, 20)]
        result = await client.call_tool("own_image", {"image": 7, "source": view["id"]})
        assert texts(result) == [f"{view['id']} 7"]
        assert kind(await client.call_tool("open_image", {"image": "data:x"})) == (
            "invalid_arguments"
        )

    talk(address, work, mode=mode)


def test_with_a_session_the_picture_opened_last_is_looked_at(address: str) -> None:
    async def work(client: Client) -> None:
        for colour in ("red", "blue"):
            await client.call_tool("open_image", {"image": data_url(colour)})
        result = await client.call_tool("cut", {"box": [0, 0, 4, 4]})
        assert result.structured_content["result"] == {"colour": [0, 0, 255]}
        assert result.structured_content["views"][0]["of"] == "image_2"

    talk(address, work, mode="legacy")


@pytest.mark.parametrize("mode", ERAS)
def test_no_client_sees_what_another_opened(address: str, mode: str) -> None:
    async def work() -> None:
        async with Client(address, mode=mode) as one, Client(address, mode=mode) as other:
            opened = await one.call_tool("open_image", {"image": data_url()})
            mine = opened.structured_content["views"][0]["id"]
            assert texts(await other.call_tool("seen", {})) == ["nothing"]
            if mode == "legacy":
                assert texts(await one.call_tool("seen", {})) == ["image_1"]
                refused = await other.call_tool("cut", {"source": mine, "box": [0, 0, 4, 4]})
                assert kind(refused) == "unknown_source"
            # The same name of one's own picture is another picture.
            own = await other.call_tool("open_image", {"image": data_url("blue")})
            source = own.structured_content["views"][0]["id"]
            got = await other.call_tool("cut", {"source": source, "box": [0, 0, 4, 4]})
            assert got.structured_content["result"] == {"colour": [0, 0, 255]}
            guesses = ["image_1", "0" * 32 + "-image_1", mine[:-9] + "0" * 9 if len(mine) > 9
                       else "session x"]  # fmt: skip
            async with Client(address, mode=mode) as third:
                for guess in guesses:
                    refused = await third.call_tool("cut", {"source": guess, "box": [0, 0, 4, 4]})
                    assert kind(refused) == "unknown_source"
            if mode == "auto":
                mixed = await one.call_tool("cut", {"source": mine, "box": [0, 0, 4, 4]})
                assert not mixed.is_error

    asyncio.run(work())


def test_the_session_of_another_client_cannot_be_named(served: ServedTools, address: str) -> None:
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    async def work() -> None:
        async with Client(address, mode="legacy") as victim:
            await victim.call_tool("open_image", {"image": data_url()})
            (key,) = served.spaces._held
            stolen = httpx2.AsyncClient(headers={"mcp-session-id": key.removeprefix("session ")})
            async with Client(streamable_http_client(address, http_client=stolen)) as thief:
                assert thief.protocol_version.startswith("2026-")
                assert texts(await thief.call_tool("seen", {})) == ["nothing"]
                refused = await thief.call_tool("cut", {"source": "image_1", "box": [0, 0, 4, 4]})
                assert kind(refused) == "unknown_source"
            assert texts(await victim.call_tool("seen", {})) == ["image_1"]

    asyncio.run(work())


def test_ids_of_two_conversations_are_not_mixed(address: str) -> None:
    async def work(client: Client) -> None:
        ids = []
        for _ in range(2):
            opened = await client.call_tool("open_image", {"image": data_url()})
            ids.append(opened.structured_content["views"][0]["id"])
        assert ids[0].split("-")[0] != ids[1].split("-")[0]
        refused = await client.call_tool("break_down", {"how": ids[0], "other": ids[1]})
        assert "these views are not of one conversation" in texts(refused)[0]

    talk(address, work)


def test_errors_are_one_line_of_a_listed_kind_and_tell_nothing_of_this_machine(
    served: ServedTools, caplog: pytest.LogCaptureFixture
) -> None:
    picture = data_url()
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("cut", {"box": [1, 1, 9, 9]}, "unknown_source", "no picture"),
        ("cut", {"image": picture, "box": [1, 2]}, "invalid_arguments", "box"),
        ("cut", {"image": picture, "box": [90, 0, 99, 9]}, "box_outside", ""),
        ("cut", {"image": picture, "box": [1, 1, 9, 9], "source": "image_1"}, "invalid_arguments",
         "give image or source, not both"),
        ("cut", {"image": 5, "box": [1, 1, 9, 9]}, "invalid_arguments", "image: the picture"),
        ("cut", {"image": "/etc/passwd", "box": [1, 1, 9, 9]}, "invalid_arguments",
         "no files may be read here"),
        ("cut", {"image": "http://127.0.0.1/", "box": [1, 1, 9, 9]}, "invalid_arguments",
         "addresses are not fetched here"),
        ("break_down", {"how": "tool"}, "tool_failed", "the lens is dirty"),
        ("break_down", {"how": "author"}, "tool_failed", "no result can be"),
        ("break_down", {"how": "other"}, "tool_failed", "RuntimeError"),
        ("sleep", {"seconds": 9}, "timeout", "longer than 0.3 s"),
    ]  # fmt: skip

    async def work(client: Client) -> None:
        for name, arguments, expected, message in cases:
            result = await client.call_tool(name, arguments)
            assert result.is_error, (name, arguments, texts(result))
            assert kind(result) == expected, texts(result)
            assert message in texts(result)[0]
            assert "Traceback" not in texts(result)[0]
            assert "/home" not in texts(result)[0]
            assert "\n" not in texts(result)[0]

    talk(make_server(served), work)
    assert "secret.key" in caplog.text, "whoever runs the server finds the whole of it"
    held = served.spaces.of("local").seen()
    assert list(held) == ["image_1"], "a call with wrong arguments opens no picture"


def test_files_under_the_servers_folders(tmp_path: Path) -> None:
    import base64

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(base64.b64decode(data_url().partition(",")[2]))
    (tmp_path / "b.png").write_bytes((tmp_path / "in" / "a.png").read_bytes())
    options = ServeOptions(access=Access(roots=(tmp_path / "in",)))
    served = ServedTools(ToolRegistry(TOOLS), options)

    async def work(client: Client) -> None:
        assert "path of a file" in (client.instructions or "")
        for path in ("a.png", str(tmp_path / "in" / "a.png")):
            assert not (await client.call_tool("open_image", {"image": path})).is_error
        for path in ("../b.png", str(tmp_path / "b.png"), "/etc/passwd", "a.png/../../b.png"):
            assert kind(await client.call_tool("open_image", {"image": path})) == (
                "invalid_arguments"
            )

    talk(make_server(served), work)
    served.close()


def test_a_client_holds_a_bounded_number_of_views_and_pixels() -> None:
    options = ServeOptions(room=Room(views=3, pixels=3000, clients=2), longest=20)
    served = ServedTools(ToolRegistry(TOOLS), options)

    async def work(client: Client) -> None:
        for _ in range(5):
            await client.call_tool("open_image", {"image": data_url()})
        assert texts(await client.call_tool("seen", {})) == ["image_3 image_4 image_5"]
        big = await client.call_tool("open_image", {"image": data_url(size=(50, 50)), "show": True})
        assert pictures(big)[0].size == (20, 20)
        assert texts(big) == ["image_6: 50 x 50 pixels; shown as 20 x 20"]
        assert texts(await client.call_tool("seen", {})) == ["image_6"]
        gone = await client.call_tool("cut", {"source": "image_5", "box": [0, 0, 9, 9]})
        assert kind(gone) == "unknown_source"

    talk(make_server(served), work)
    for session in "abc":
        served.spaces.of(session)
    assert len(served.spaces) == 2
    served.close()
    assert len(served.spaces) == 0


def test_a_client_that_ends_its_session_leaves_no_views(served: ServedTools, address: str) -> None:
    async def work(client: Client) -> None:
        await client.call_tool("open_image", {"image": data_url()})
        assert len(served.spaces) == 1

    talk(address, work, mode="legacy")
    deadline = time.monotonic() + 5
    while len(served.spaces) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(served.spaces) == 0


@pytest.mark.parametrize("mode", ERAS)
def test_a_client_that_goes_away_cancels_its_call(address: str, mode: str) -> None:
    stopped = threading.Event()
    sleep.timeout = 30.0

    async def work(client: Client) -> None:
        asked = asyncio.ensure_future(client.call_tool("sleep", {"seconds": 20.0}))
        await asyncio.sleep(0.3)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        stopped.set()

    try:
        began = time.monotonic()
        talk(address, work, mode=mode)
        assert stopped.is_set()
        while any(t.name == "vpt-tool-sleep" for t in threading.enumerate()):
            assert time.monotonic() - began < 10, "the tool goes on"
            time.sleep(0.02)
    finally:
        sleep.timeout = 0.3


def test_a_token_is_asked_for(served: ServedTools) -> None:
    import httpx2

    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    with over_http(served, token="hush") as url, httpx2.Client() as plain:
        for headers in ({}, {"Authorization": "Bearer hus"}, {"Authorization": "hush"}):
            answer = plain.post(url, json=body, headers=headers)
            assert (answer.status_code, answer.text) == (401, "a bearer token is needed")
        answer = plain.post(url, json=body, headers={"Authorization": "Bearer hush"})
        assert answer.status_code != 401


def test_a_page_under_another_name_is_refused(served: ServedTools, address: str) -> None:
    import httpx2

    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    with httpx2.Client() as plain:
        assert plain.post(address, json=body, headers={"Host": "evil.test"}).status_code == 421
        origin = {"Origin": "http://evil.test"}
        assert plain.post(address, json=body, headers=origin).status_code == 403


def test_a_body_that_is_too_large_is_refused() -> None:
    import httpx2

    served = ServedTools(ToolRegistry(TOOLS), ServeOptions(access=Access(max_bytes=1000)))
    with over_http(served) as url, httpx2.Client() as plain:
        assert plain.post(url, content=b"x" * 100_000).status_code == 413
    served.close()


def test_other_machines_need_a_token(served: ServedTools) -> None:
    with pytest.raises(UserError, match=r"other machines could use.*VPT_AGENT_MCP_TOKEN"):
        http_app(served, host="0.0.0.0")
    assert http_app(served, host="0.0.0.0", token="hush") is not None
    assert all(map(is_loopback, ("localhost", "::1", "127.0.0.9")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "example.org", "10.0.0.1")))


def test_an_address_that_is_taken(served: ServedTools, address: str) -> None:
    port = int(address.split(":")[2].partition("/")[0])
    with pytest.raises(UserError, match=r"this address cannot be served at.*in use"):
        serve_http(served, host="127.0.0.1", port=port)


def test_the_servers_own_name_is_taken() -> None:
    @perception_tool(name="open_image")
    def other() -> str:
        """Another one."""
        return ""

    with pytest.raises(ToolDefinitionError, match=r"open_image, which is the server's own.*rename"):
        ServedTools(ToolRegistry([other]))


@pytest.mark.parametrize("mode", ERAS)
def test_over_stdio(mode: str, tmp_path: Path) -> None:
    start = "from vpt_agent.cli import main; main()"
    params = StdioServerParameters(
        command=sys.executable,
        args=["-c", start, "mcp", "--root", str(tmp_path)],
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )

    async def work(client: Client) -> None:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert {"open_image", "crop_region"} <= names
        assert "reencode_clip" not in names
        got = await client.call_tool(
            "crop_region", {"image": data_url(size=(800, 400)), "box": [0, 0, 400, 200]}
        )
        assert got.structured_content["views"][0]["box"] == [0, 0, 400, 200]
        assert pictures(got)[0].size == (400, 200)
        named = await client.call_tool(
            "crop_region", {"source": "image_1", "box": [400, 200, 800, 400]}
        )
        assert named.structured_content["views"][0]["box"] == [400, 200, 800, 400]

    talk(params, work, mode=mode)
