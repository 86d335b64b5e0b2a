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
from vpt_agent.data.pictures import row_views
from vpt_agent.data.rows import ImageRef, Message, Row, Rules, parse_image_path, read_row

__all__ = [
    "IGNORED",
    "Dropped",
    "Encoded",
    "GenerationPrompt",
    "ImageRef",
    "Message",
    "Row",
    "RowEncoder",
    "Rules",
    "infer_seqlen",
    "labels_of",
    "parse_image_path",
    "read_row",
    "row_views",
]
