"""Data: rows of the published JSON, checked, as pictures, token ids and labels."""

from vpt_agent.data.encode import (
    IGNORED,
    Dropped,
    Encoded,
    GenerationPrompt,
    RowEncoder,
    infer_seqlen,
    labels_of,
)
from vpt_agent.data.mixture import Mixture
from vpt_agent.data.pictures import row_views
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

__all__ = [
    "IGNORED",
    "Dropped",
    "Encoded",
    "GenerationPrompt",
    "ImageRef",
    "Message",
    "Mixture",
    "Problem",
    "Row",
    "RowEncoder",
    "RowError",
    "Rules",
    "infer_seqlen",
    "labels_of",
    "parse_image_path",
    "read_row",
    "row_json",
    "row_views",
]
