"""A server that says what a script says, in the official client's own types: for tests and demos.

It listens on the loopback address and answers ``POST .../chat/completions``, whole or as a stream.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from vpt_agent.errors import UserError

PIECE = 7
"""Letters of a piece of a stream."""


@dataclass(frozen=True)
class Say:
    """An answer: words, calls (name and arguments, which may be any text), and what was counted.
    ``broken`` ends the stream in its middle (``cut``), writes a line that is no JSON (``garbage``),
    an error (``error``), or stops without a reason of the end (``endless``)."""

    text: str = ""
    calls: Sequence[tuple[str, Mapping[str, Any] | str]] = ()
    finish: str | None = None
    refusal: str | None = None
    reasoning: str = ""
    prompt_tokens: int = 100
    cached_tokens: int = 0
    counts: bool = True
    broken: Literal["cut", "garbage", "error", "endless"] | None = None
    wait: float = 0.0


@dataclass(frozen=True)
class Fail:
    """An error instead of an answer. ``status`` 0 closes the connection without a word."""

    status: int
    message: str = "it did not work"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class ScriptedServer:
    """Use it in a ``with`` statement; :attr:`url` is its address, :attr:`requests` what was asked.

    ``script`` are its answers in order, the last one again and again. ``refuses`` are fields of a
    request, or ``images in tool messages``, that it answers with an error, as some servers do.
    """

    def __init__(self, script: Sequence[Say | Fail], *, refuses: Sequence[str] = ()) -> None:
        if not script:
            raise UserError("a script needs at least one answer", where="ScriptedServer")
        self.script, self.refuses = tuple(script), tuple(refuses)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self._given = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The ``base_url`` for clients."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ScriptedServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, body: dict[str, Any], key: str) -> Say | Fail:
        """The next answer to a request."""
        with self._lock:
            self.requests.append(body)
            self.keys.append(key)
            for name in self.refuses:
                if name in body or (name == "images in tool messages" and _tool_images(body)):
                    return Fail(422, f"Unsupported fields in the request: {name}")
            step = self.script[min(self._given, len(self.script) - 1)]
            self._given += 1
        if isinstance(step, Say) and step.wait:
            self._stopping.wait(step.wait)
        return step


def _tool_images(body: Mapping[str, Any]) -> bool:
    messages = body.get("messages", ())
    return any(m["role"] == "tool" and isinstance(m["content"], list) for m in messages)


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            """Answer one request."""
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length))
            step = server.answer(body, self.headers.get("authorization", ""))
            if isinstance(step, Fail):
                self._fail(step)
            elif body.get("stream"):
                self._stream(step, body)
            else:
                self._send(200, completion(step, body["model"]), {})

        def _fail(self, step: Fail) -> None:
            if not step.status:
                self.close_connection = True
                return
            error = {"error": {"message": step.message, "type": "error", "code": step.code}}
            self._send(step.status, json.dumps(error), step.headers)

        def _send(self, status: int, text: str, headers: Mapping[str, str]) -> None:
            data = text.encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, step: Say, body: Mapping[str, Any]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            counted = bool((body.get("stream_options") or {}).get("include_usage"))
            self.close_connection = True
            for line in lines(step, str(body["model"]), counted=counted):
                try:
                    self.wfile.write(f"data: {line}\n\n".encode())
                    self.wfile.flush()
                except OSError:
                    return  # the client has gone

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


def _finish(step: Say) -> str:
    return step.finish or ("tool_calls" if step.calls else "stop")


def _arguments(value: Mapping[str, Any] | str) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _usage(step: Say) -> dict[str, Any]:
    said = len(step.text) // 4 + 10 * len(step.calls) + 1
    return {
        "prompt_tokens": step.prompt_tokens,
        "completion_tokens": said,
        "total_tokens": step.prompt_tokens + said,
        "prompt_tokens_details": {"cached_tokens": step.cached_tokens},
    }


def completion(step: Say, model: str) -> str:
    """The answer as a ``ChatCompletion``."""
    from openai.types.chat import ChatCompletion

    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": name, "arguments": _arguments(arguments)},
        }
        for number, (name, arguments) in enumerate(step.calls)
    ]
    message: dict[str, Any] = {"role": "assistant", "content": step.text or None}
    message |= {"refusal": step.refusal, "reasoning_content": step.reasoning or None}
    if calls:
        message["tool_calls"] = calls
    made = ChatCompletion.model_validate(
        {
            "id": "chatcmpl-1",
            "created": 0,
            "model": model,
            "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": _finish(step), "message": message}],
            "usage": _usage(step) if step.counts else None,
        }
    )
    return made.model_dump_json(exclude_none=True)


def lines(step: Say, model: str, *, counted: bool) -> Iterator[str]:
    """The answer as lines of a stream of ``ChatCompletionChunk``s."""
    from openai.types.chat import ChatCompletionChunk

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        made = ChatCompletionChunk.model_validate(
            {
                "id": "chatcmpl-1",
                "created": 0,
                "model": model,
                "object": "chat.completion.chunk",
                "choices": [choice],
                **more,
            }
        )
        return made.model_dump_json(exclude_none=True)

    yield chunk({"role": "assistant", "content": ""})
    if step.reasoning:
        yield chunk({"reasoning_content": step.reasoning})
    for start in range(0, len(step.text), PIECE):
        yield chunk({"content": step.text[start : start + PIECE]})
        if step.broken in ("cut", "garbage", "error"):
            if step.broken == "garbage":
                yield "{this is no JSON"
            if step.broken == "error":
                yield json.dumps({"error": {"message": "the engine died", "type": "error"}})
            return
    if step.refusal:
        yield chunk({"refusal": step.refusal})
    for number, (name, arguments) in enumerate(step.calls):
        begin = {"index": number, "id": f"call_{number}", "type": "function"}
        yield chunk({"tool_calls": [begin | {"function": {"name": name, "arguments": ""}}]})
        text = _arguments(arguments)
        for start in range(0, len(text), PIECE):
            piece = {"index": number, "function": {"arguments": text[start : start + PIECE]}}
            yield chunk({"tool_calls": [piece]})
    if step.broken == "endless":
        return
    yield chunk({}, _finish(step))
    if counted and step.counts:
        last = ChatCompletionChunk.model_validate(
            {
                "id": "chatcmpl-1",
                "created": 0,
                "model": model,
                "object": "chat.completion.chunk",
                "choices": [],
                "usage": _usage(step),
            }
        )
        yield last.model_dump_json(exclude_none=True)
    yield "[DONE]"
