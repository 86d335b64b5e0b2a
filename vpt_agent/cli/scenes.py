"""Generated scenes as rows of the published JSON, for ``vpt-agent nano scenes`` and ``train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpt_agent.nano.alphabet import Split


def write_scenes(folder: Path, *, count: int, seed: int = 0, split: Split = "train") -> Path:
    """Draw ``count`` scenes into ``folder``, and one region row of each; returns ``rows.json``.

    The same arguments give the same files. Scene ``seed`` is the first. The file of rows is
    written last: where it is, all pictures are.
    """
    from vpt_agent.nano.scene import make_scene

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(seed, seed + count):
        scene = make_scene(number, split=split)
        name = f"scene{number}.png"
        scene.image.save(folder / name)
        asked = scene.questions[0]
        rows.append(region_row(name, scene.size, asked.question, asked.regions[0], asked.answer))
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def region_row(
    name: str, size: tuple[int, int], question: str, box: tuple[int, int, int, int], answer: str
) -> dict[str, Any]:
    """The row of one question: look at ``box`` (pixels of the picture ``name``), then answer."""
    from vpt_agent.nano.tokenizer import KIND
    from vpt_agent.tokens.grid import box_to_region, region_to_box

    cells = box_to_region(box, size, KIND.grid)
    tokens = (KIND.x_token, KIND.y_token, KIND.x_token, KIND.y_token)
    corners = [spell(cell) for spell, cell in zip(tokens, cells, strict=True)]
    crop = ",".join(str(int(edge)) for edge in region_to_box(cells, size, KIND.grid, "cover"))
    texts = (
        f"{KIND.tag}\n{question}",
        f"{KIND.start}{''.join(corners)}{KIND.end}",
        KIND.tag,
        answer,
    )
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]
    return {"messages": messages, "images": [name, f"{name}_{crop}"]}
