"""What a perception tool is."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, JsonValue

from vpt_agent.errors import ToolDefinitionError, VPTError
from vpt_agent.tool.arguments import ArgumentSpec, JsonSchema, ToolArguments, argument_spec
from vpt_agent.tool.context import ToolContext
from vpt_agent.tool.ready import Ready, Slots
from vpt_agent.tool.text import split_docstring

if TYPE_CHECKING:
    from vpt_agent.tool.output import ToolReturn

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_NEED = re.compile(r"view|control|encoder:[a-z0-9_]+")
_RESERVED = ("auto", "none", "required")


class NoArguments(ToolArguments):
    """The arguments of a tool that takes none."""


class PerceptionTool:
    """A tool with state: inherit, set ``name``, write :meth:`run` or :meth:`run_batch`.

    (A plain function becomes a tool with :func:`vpt_agent.tool.perception_tool`.)

    ``name`` and ``version`` identify it; raise ``version`` when its contract changes.
    ``description`` is what the model chooses it by (default: the class docstring). ``arguments``
    is a pydantic model (a subclass of :class:`ToolArguments`) or a JSON Schema. ``needs`` names
    what it cannot do without: ``view``, ``control`` (a hidden state: perception tokens only),
    ``encoder:<kind>``. ``timeout`` is in seconds for one call, None for no limit; ``batch_size``
    the calls that :meth:`run_batch` takes at once, of one run or of several; ``concurrency`` how
    many calls or batches may run at the same time (1: the tool need not be safe for threads);
    ``device`` where it runs (None: the model's); ``setup_timeout`` how long a call waits for
    :meth:`setup`; ``max_retries`` how often the model may correct a call. ``always_run`` is for a
    tool whose answer to the same call may change during a run (a camera, a clock): for others, the
    second of two equal calls is answered without running. ``licence`` and ``extra`` (what to
    install) stand in the catalogue. ``takes_calls_of`` maps full names of older versions to their
    contract hashes: calls of those mean the same here, so a model that was trained with one of them
    was trained with this.

    A tool may be asked again for a call whose batch failed, so a call must have no lasting effect.
    """

    name: str = ""
    version: int = 1
    description: str = ""
    arguments: type[BaseModel] | Mapping[str, JsonValue] = NoArguments
    needs: frozenset[str] = frozenset()
    timeout: float | None = 60.0
    batch_size: int = 1
    concurrency: int = 1
    device: str | None = None
    setup_timeout: float | None = 600.0
    max_retries: int = 2
    always_run: bool = False
    licence: str = ""
    extra: str = ""
    takes_calls_of: Mapping[str, str] = MappingProxyType({})

    _lock: threading.Lock
    _ready: Ready
    _slots: Slots | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "description" not in vars(cls) and cls.__doc__:
            cls.description = split_docstring(cls.__doc__)[0]
        if vars(cls).get("name"):
            check_definition(cls, f"{cls.__module__}.{cls.__qualname__}")

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Made here and not in ``__init__``, which authors override."""
        tool = super().__new__(cls)
        tool._lock, tool._ready = threading.Lock(), Ready()
        return tool

    def setup(self, device: str) -> None:
        """Load what the tool needs; called once in a process before the first call, and again for
        another device or after :meth:`close`."""

    # Any: authors write the class of their arguments here.
    def run(self, arguments: Any, context: ToolContext) -> ToolReturn:
        """Do one call. ``arguments`` is an instance of :attr:`arguments` (or a dict).

        Gives text, a view or picture, visual features, a dict, a :class:`ToolOutput`, or a list
        of these. Raises :class:`ModelRetry` for what the model can correct and
        :class:`ToolFailed` for what it cannot.
        """
        return self._single(self.run_batch([(arguments, context)]))

    def run_batch(self, items: Sequence[tuple[Any, ToolContext]]) -> Sequence[ToolReturn]:
        """Do several calls at once, at most :attr:`batch_size`; one result each, in order.

        A call that fails may stand in the list as its exception; others are not touched by it.
        """
        return [self.run(arguments, context) for arguments, context in items]

    def close(self) -> None:
        """Let go of what :meth:`setup` took; called when the last agent that used it is closed."""

    def lacks(self) -> VPTError | None:
        """What has to be done before the tool can be called: its error, or None. An installed tool
        that lacks something is not offered to models. Asked often: look, do not load."""
        return None

    def source_of(self, arguments: Mapping[str, object], views: Sequence[str]) -> object:
        """The id of the view that a call is about, None for the default one. ``views`` are the ids
        of the run's views in order; what is none of them is told as an unknown source."""
        return arguments.get("source")

    # -- what the library reads ---------------------------------------------------------------

    @property
    def full_name(self) -> str:
        """Name with version: ``crop_region@1``."""
        return f"{self.name}@{self.version}"

    @property
    def owner(self) -> str:
        """Where the tool is defined: module and name."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    @cached_property
    def spec(self) -> ArgumentSpec:
        """The object that makes the schema and checks the calls."""
        return argument_spec(self.arguments, where=self.owner)

    def json_schema(self) -> JsonSchema:
        """JSON Schema of the arguments, as models and outside clients see it."""
        copy: JsonSchema = json.loads(json.dumps(self.spec.schema))
        return copy

    @cached_property
    def contract_hash(self) -> str:
        """SHA-256 of name, version, description and schema: equal contracts, equal hashes."""
        contract = {
            "name": self.name,
            "version": self.version,
            "description": self.description,
            "schema": self.spec.schema,
        }
        text = json.dumps(contract, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def openai_schema(self) -> dict[str, JsonValue]:
        """The tool as the OpenAI and Hermes conventions describe a function."""
        function: JsonValue = {
            "name": self.name,
            "description": self.description,
            "parameters": self.json_schema(),
        }
        return {"type": "function", "function": function}

    @property
    def slots(self) -> Slots:
        """The slots of this tool, for all agents of the process."""
        with self._lock:
            if self._slots is None:
                self._slots = Slots(self.concurrency)
            return self._slots

    def prepare(self, device: str, *, seconds: float | None = None) -> None:
        """Have :meth:`setup` done, unless it was, for :attr:`device` or else ``device``. Safe from
        any thread; see :meth:`vpt_agent.tool.ready.Ready.prepare`."""
        setup = None if type(self).setup is PerceptionTool.setup else self.setup
        self._ready.prepare(setup, self.device or device, seconds=seconds)

    def hold(self) -> None:
        """An agent uses the tool from now on."""
        self._ready.hold()

    def let_go(self) -> None:
        """An agent uses the tool no more; the last one closes it."""
        self._ready.let_go(self.close)

    def release(self) -> None:
        """Close the tool if it is set up; the next call sets it up again."""
        self._ready.release(self.close)

    def _single(self, results: Sequence[ToolReturn]) -> ToolReturn:
        if len(results) != 1:
            raise ToolDefinitionError(
                "run_batch gives one result for each call",
                where=self.owner,
                got=len(results),
                expected=1,
            )
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    def __repr__(self) -> str:
        return f"<perception tool {self.full_name} of {self.owner}>"


def check_definition(tool: PerceptionTool | type[PerceptionTool], where: str) -> None:
    """Raise :class:`ToolDefinitionError` for what an author can get wrong."""

    def wrong(what: str, got: object, expected: str) -> ToolDefinitionError:
        return ToolDefinitionError(what, where=where, got=repr(got), expected=expected)

    if not isinstance(tool.name, str) or not _NAME.fullmatch(tool.name):
        words = "letters, digits, _ and -, at most 64, not beginning with a digit"
        raise wrong("this cannot be the name of a tool", tool.name, words)
    if tool.name in _RESERVED:
        raise wrong("this name is a tool_choice, not a tool", tool.name, "another name")
    if isinstance(tool.version, bool) or not isinstance(tool.version, int) or tool.version < 1:
        raise wrong("the version of a tool is a number", tool.version, "1 or more")
    if not isinstance(tool.description, str) or not tool.description.strip():
        words = "a docstring, or description="
        raise wrong("a tool needs a description: models choose by it", tool.description, words)
    # A bare string fails too: its letters are no needs.
    unknown = sorted(str(n) for n in tool.needs if not _NEED.fullmatch(str(n)))
    if unknown:
        words = "a set of 'view', 'control', 'encoder:<kind>'"
        raise wrong("a tool needs something that is not known", unknown, words)
    for seconds in (tool.timeout, tool.setup_timeout):
        if seconds is not None and not seconds > 0:
            raise wrong("a timeout is a number of seconds", seconds, "more than 0, or None")
    for name, least in (("batch_size", 1), ("concurrency", 1), ("max_retries", 0)):
        number = getattr(tool, name)
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            got = f"{name}={number!r}"
            raise wrong("a tool has an impossible number", got, f"{name} >= {least}")
    cls = tool if isinstance(tool, type) else type(tool)
    if cls.run is PerceptionTool.run and cls.run_batch is PerceptionTool.run_batch:
        raise wrong("a tool does nothing", cls.__name__, "a method run or run_batch")
    argument_spec(tool.arguments, where=where)
