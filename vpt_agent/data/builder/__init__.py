"""The builder: rows from annotations with boxes, and from recorded runs."""

from vpt_agent.data.builder.annotations import Annotation, Annotations, BoxFormat, read_box
from vpt_agent.data.builder.build import DIRECT, Built, Recipe, build_rows, make_row, region_cells
from vpt_agent.data.builder.coco import CocoAnnotations
from vpt_agent.data.builder.traces import (
    TracedCall,
    encoded_from_trace,
    rows_from_trace,
    run_folders,
    traced_calls,
)
from vpt_agent.data.builder.write import write_json, write_rows

__all__ = [
    "DIRECT",
    "Annotation",
    "Annotations",
    "BoxFormat",
    "Built",
    "CocoAnnotations",
    "Recipe",
    "TracedCall",
    "build_rows",
    "encoded_from_trace",
    "make_row",
    "read_box",
    "region_cells",
    "rows_from_trace",
    "run_folders",
    "traced_calls",
    "write_json",
    "write_rows",
]
