"""Data: rows of the published JSON, checked, as pictures, token ids and labels.

Two types, one conversation. A :class:`Row` is the conversation as it lies on disk: text with tags,
paths of pictures, and what else is known (``meta``). It belongs to no model, and is what files,
builders, mixtures and converters hold. A :class:`vpt_agent.types.Record` is the same conversation
as one model has it: token ids in spans that say what was given, sampled, forced, or seen. Training,
evaluation and traces all take Records: :class:`RowEncoder` makes one of a row and its views
(``encoded.record``, with labels beside it), ``trace.record()`` one of a run, and
:mod:`vpt_agent.data.builder` makes rows of runs, which encode to the run's own ids again.

    file, list, table ── load_rows / stream_rows ──> Row ── RowEncoder ──> Record, labels
    annotations ── builder ──> Row ── row_json / write_rows ──> file
    run folder ── builder.rows_from_trace ──> Row;  trace.record() ──> Record
"""

from vpt_agent.data.check import Depth, problems
from vpt_agent.data.encode import (
    IGNORED,
    Dropped,
    Encoded,
    GenerationPrompt,
    RowEncoder,
    infer_seqlen,
    labels_of,
)
from vpt_agent.data.files import open_dataset
from vpt_agent.data.mixture import Mixture
from vpt_agent.data.pictures import row_views
from vpt_agent.data.report import CheckReport
from vpt_agent.data.retarget import retarget
from vpt_agent.data.rows import (
    ImageRef,
    Message,
    Problem,
    Row,
    RowError,
    Rules,
    parse_image_path,
    read_row,
    row_json,
)
from vpt_agent.data.source import Reading, Rows, RowStream, load_rows, stream_rows

__all__ = [
    "IGNORED",
    "CheckReport",
    "Depth",
    "Dropped",
    "Encoded",
    "GenerationPrompt",
    "ImageRef",
    "Message",
    "Mixture",
    "Problem",
    "Reading",
    "Row",
    "RowEncoder",
    "RowError",
    "RowStream",
    "Rows",
    "Rules",
    "infer_seqlen",
    "labels_of",
    "load_rows",
    "open_dataset",
    "parse_image_path",
    "problems",
    "read_row",
    "retarget",
    "row_json",
    "row_views",
    "stream_rows",
]
