"""Requests to a server by the official client: on a thread, tried again, adapted to the server."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from vpt_agent.errors import MissingExtraError, ServerError, UserError
from vpt_agent.model.remote.completion import BrokenAnswerError, Completion, streamed, whole
from vpt_agent.model.remote.messages import Entry, ImagePlace, as_messages
from vpt_agent.model.remote.options import RemoteOptions

OPTIONAL = (
    "stream_options",
    "tool_choice",
    "seed",
    "top_p",
    "temperature",
    "max_completion_tokens",
    "max_tokens",
)
"""Fields that a request can do without, where a server refuses them. (Of the last two, one takes
the place of the other.)"""
PASSING = (408, 409, 425, 429)
"""Statuses after which it makes sense to try again, besides 500 and above."""


@dataclass(frozen=True)
class Piece:
    """Words, as they come."""

    text: str


@dataclass(frozen=True)
class Trouble:
    """An attempt that came to nothing; see :class:`vpt_agent.trace.RequestFailed`."""

    attempt: int
    error: str
    message: str
    status: int | None = None
    wait: float | None = None
    left_out: str | None = None


@dataclass(frozen=True)
class Done:
    """The answer; ``attempts`` says how often it was asked for."""

    completion: Completion
    attempts: int
    seconds: float


class TooLong:
    """The server said that the conversation is longer than its model can hold."""


class Expired:
    """The time was over before the answer."""


Item = Piece | Trouble | Done | TooLong | Expired


@dataclass(frozen=True)
class Question:
    """What is asked: a conversation, the tools, and how the answer is chosen."""

    entries: tuple[Entry, ...]
    system: str | None
    tools: Sequence[Mapping[str, Any]] = ()
    choice: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Asking:
    """One request in progress: its items as futures, one after another."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._ready: deque[Item | BaseException] = deque()
        self._waiting: Future[Item] | None = None
        self._timer: threading.Timer | None = None

    def next(self) -> Future[Item]:
        """A future of the next item. It raises what ended the request."""
        future: Future[Item] = Future()
        with self._lock:
            if self._ready:
                _settle(future, self._ready.popleft())
            else:
                self._waiting = future
        return future

    def put(self, item: Item | BaseException) -> None:
        """The next item; after :meth:`stop` nobody hears it."""
        with self._lock:
            if self.stopped.is_set():
                return
            waiting, self._waiting = self._waiting, None
            if waiting is None:
                self._ready.append(item)
        if waiting is not None:
            _settle(waiting, item)

    def until(self, seconds: float | None) -> None:
        """Give :class:`Expired` in so many seconds, whatever the network does then."""
        if seconds is None:
            return
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        self.put(Expired())
        self.stop()

    def stop(self) -> None:
        """Nobody waits any more: the thread ends as soon as it can."""
        self.stopped.set()
        if self._timer is not None:
            self._timer.cancel()


def _settle(future: Future[Item], item: Item | BaseException) -> None:
    if isinstance(item, BaseException):
        future.set_exception(item)
    else:
        future.set_result(item)


class Remote:
    """One model behind a server. ``client`` is an official client of one's own, instead of one for
    ``base_url`` and ``api_key`` (None: the environment's ``OPENAI_API_KEY``)."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        options: RemoteOptions | None = None,
        client: Any = None,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise UserError("a server needs the name of its model", got=repr(model))
        self.model, self.base_url = model, base_url
        self.options = options or RemoteOptions()
        self._api = _library()
        self._client = client or self._made(base_url, api_key)
        self._rng = random.Random()  # spreads the retries of many runs
        self._lock = threading.Lock()
        self.left_out: dict[str, None] = {}  # what this server refused, in order
        self.images: ImagePlace = "user" if self.options.tool_images == "user" else "tool"

    def _made(self, base_url: str | None, api_key: str | None) -> Any:
        # A server of one's own mostly wants no key, but the client wants one always.
        key = api_key or os.environ.get("OPENAI_API_KEY") or ("none" if base_url else None)
        if key is None:
            raise UserError(
                "a hosted model needs a key",
                where="from_server",
                fix="pass api_key=, set OPENAI_API_KEY, or name your own server with base_url=",
            )
        return self._api.OpenAI(
            base_url=base_url, api_key=key, max_retries=0, timeout=self.options.timeout
        )

    def ask(self, question: Question, *, seconds: float | None = None) -> Asking:
        """Start a request; ``seconds`` is all the time there is (None: no end)."""
        asking = Asking()
        asking.until(seconds)
        thread = threading.Thread(
            target=self._work, args=(asking, question, seconds), name="vpt-remote", daemon=True
        )
        thread.start()
        return asking

    def _work(self, asking: Asking, question: Question, seconds: float | None) -> None:
        try:
            self._try(asking, question, seconds)
        except BaseException as error:  # raised again by the run that waits
            asking.put(error)

    def _try(self, asking: Asking, question: Question, seconds: float | None) -> None:
        began = time.monotonic()
        attempt = 1
        while not asking.stopped.is_set():
            left = None if seconds is None else seconds - (time.monotonic() - began)
            sent = self._body(question)
            try:
                completion = self._once(sent, asking, left)
            except self._api.errors as error:
                if not self._goes_on(asking, error, attempt, sent):
                    return
                attempt += not isinstance(error, self._api.refused)
                continue
            asking.put(Done(completion, attempt, time.monotonic() - began))
            return

    def _goes_on(
        self, asking: Asking, error: Exception, attempt: int, sent: Mapping[str, Any]
    ) -> bool:
        """Whether to try again; what happened is told. Raises where nothing helps."""
        status = getattr(error, "status_code", None)
        message = _message(error)
        trouble = Trouble(attempt, type(error).__name__, message, status)
        if isinstance(error, self._api.refused):
            if _too_long(error, message):
                asking.put(TooLong())
                return False
            left_out = self._without(message, sent)
            if left_out is None:
                asking.put(trouble)
                hint = None
                if "tool" in message.lower() and "tools" in sent:
                    hint = "start the server with its parser of tool calls, or use calls='text'"
                raise ServerError(
                    "the server refuses the request", where=self._where(), got=message, fix=hint
                ) from error
            asking.put(replace(trouble, wait=0.0, left_out=left_out))
            return True
        if status is not None and status < 500 and status not in PASSING:
            asking.put(trouble)
            raise UserError(
                "the server does not take this request",
                where=self._where(),
                got=f"{status}: {message}",
                fix="check base_url, the model's name and api_key",
            ) from error
        if attempt > self.options.retries:
            asking.put(trouble)
            raise ServerError(
                "the server did not answer",
                where=self._where(),
                got=f"{type(error).__name__}: {message}, after {attempt} attempts",
                fix="see whether it runs and can be reached; retries= and timeout= give more time",
            ) from error
        wait = self._wait(error, attempt)
        asking.put(replace(trouble, wait=wait))
        return not asking.stopped.wait(wait)

    def _where(self) -> str:
        return f"{self.model} at {self.base_url or 'the official address'}"

    def _wait(self, error: Exception, attempt: int) -> float:
        """Seconds before the next attempt: what the server asks for, or longer each time."""
        headers: Any = getattr(getattr(error, "response", None), "headers", {})
        try:
            asked = float(headers.get("retry-after"))
        except (TypeError, ValueError):
            asked = math.nan  # it does not ask, or for a date
        if math.isfinite(asked):
            return min(max(0.0, asked), self.options.longest_wait)
        wait: float = min(self.options.backoff * 2 ** (attempt - 1), self.options.longest_wait)
        with self._lock:
            return wait * self._rng.uniform(0.75, 1.25)

    def _without(self, message: str, sent: Mapping[str, Any]) -> str | None:
        """What to leave out from now on, so that the server may take the request; None: nothing."""
        with self._lock:
            for name in OPTIONAL:
                if name in message and name in sent and name not in self.left_out:
                    self.left_out[name] = None
                    return name
            pictures = any(
                m["role"] == "tool" and isinstance(m["content"], list) for m in sent["messages"]
            )
            if pictures and self.options.tool_images == "auto" and self.images == "tool":
                self.images = "user"
                return "pictures in messages of tools"
        return None

    def _body(self, question: Question) -> dict[str, Any]:
        """The fields of the request."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": as_messages(question.entries, system=question.system, images=self.images),
            **question.settings,
        }
        limit = body.pop("limit", None)
        if limit is not None:
            names = (self.options.token_limit, "max_tokens", "max_completion_tokens")
            known = [name for name in names if name not in self.left_out]
            if known:
                body[known[0]] = limit
        if question.tools:
            body["tools"] = list(question.tools)
            if question.choice is not None:
                body["tool_choice"] = question.choice
        if self.options.stream:
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
        if self.options.extra:
            body["extra_body"] = dict(self.options.extra)
        return {name: value for name, value in body.items() if name not in self.left_out}

    def _once(self, body: dict[str, Any], asking: Asking, left: float | None) -> Completion:
        timeout = self.options.timeout if left is None else min(left, self.options.timeout)
        response = self._client.chat.completions.create(**body, timeout=max(timeout, 0.001))
        if not body.get("stream"):
            return whole(response)
        try:
            return streamed(_wanted(response, asking), lambda text: asking.put(Piece(text)))
        finally:
            response.close()


def _wanted(chunks: Any, asking: Asking) -> Any:
    """The chunks, as long as somebody waits for them."""
    for chunk in chunks:
        if asking.stopped.is_set():
            return
        yield chunk


def _message(error: Exception) -> str:
    """What the server said, in one line."""
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else None
    said = inner.get("message") if isinstance(inner, dict) else inner
    text = said if isinstance(said, str) and said else str(error) or type(error).__name__
    return " ".join(text.split())[:500]


def _too_long(error: Exception, message: str) -> bool:
    """Whether a request was refused because the conversation is too long."""
    code = str(getattr(error, "code", "") or "")
    words = message.lower()
    return code == "context_length_exceeded" or "maximum context length" in words


@dataclass(frozen=True)
class _Library:
    """What is used of the official client. ``errors`` are those of requests; ``refused`` the
    answers that say that the request cannot be served as it is."""

    OpenAI: Callable[..., Any]
    errors: tuple[type[Exception], ...]
    refused: tuple[type[Exception], ...]


def _library() -> _Library:
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError(
            "models behind servers are talked to with the official OpenAI client",
            fix='pip install "vpt-agent[openai]"',
        ) from error
    # What breaks while a stream is read comes from the client's own HTTP library: httpx2, or httpx
    # below version 3.
    base = openai.DefaultHttpxClient.__mro__[1]
    transport = importlib.import_module(base.__module__.partition(".")[0])
    broken = (
        BrokenAnswerError,
        OSError,
        openai.APIError,
        transport.HTTPError,
        # A line of a stream that is no JSON, no text, or nested without end.
        json.JSONDecodeError,
        UnicodeDecodeError,
        RecursionError,
    )
    return _Library(
        openai.OpenAI,
        broken,
        (openai.BadRequestError, openai.UnprocessableEntityError),
    )
