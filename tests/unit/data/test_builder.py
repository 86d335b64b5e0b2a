"""The builder: annotations to rows that read as the published ones do, in the shares asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vpt_agent.data import RowError, load_rows, read_row, row_json
from vpt_agent.data.builder import (
    Annotation,
    Annotations,
    CocoAnnotations,
    Recipe,
    build_rows,
    make_row,
    write_rows,
)
from vpt_agent.data.builder.deal import counts_of, deal
from vpt_agent.errors import UserError
from vpt_agent.nano.scene import make_scene
from vpt_agent.tokens.grid import box_to_region, region_to_box
from vpt_agent.tokens.table import (
    REENCODE_TRIGGER,
    REGION_TRIGGER,
    PerceptionKind,
    PerceptionTable,
    own_kind,
)
from vpt_agent.types import Box


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two scenes and their questions with boxes, as JSON lines."""
    folder = tmp_path_factory.mktemp("scenes")
    lines = []
    for seed in range(2):
        scene = make_scene(seed, size=(672, 680))
        scene.image.save(folder / f"{seed}.png")
        for number, question in enumerate(scene.questions):
            lines.append({
                "image": f"{seed}.png", "question": question.question, "answer": question.answer,
                "boxes": [list(box) for box in question.regions], "id": f"{seed}-{number}",
            })  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    Image.new("RGB", (80, 40), "white").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def table(*, grid: int = 8, controls: int = 1) -> PerceptionTable:
    return PerceptionTable.published(("clip", "dino", "sam"), grid=grid, controls=controls)


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"shares": {"region": 1}} | options)


def test_a_region_row_has_the_published_form(small: Path) -> None:
    found = Annotation(
        str(small), "What is it?", "A cat", (Box(11, 6, 29, 14),), id="7", type="what"
    )
    asked = recipe(instruction="Answer using a single word.")
    got = row_json(make_row(found, "region", asked, trigger=True))
    assert got["messages"] == [
        {
            "role": "user",
            "content": "<image>\nWhat is it?\nAnswer using a single word.\n" + REGION_TRIGGER,
        },
        {
            "role": "assistant",
            "content": "<|region_token_start|><|x_1|><|y_1|><|x_2|><|y_2|><|region_token_end|>",
        },
        {"role": "user", "content": "<image>"},
        {"role": "assistant", "content": "Now answer the question.\nA cat"},
    ]
    assert got["images"] == [str(small), f"{small}_0,0,40,20"]
    assert got["meta"] == {
        "id": "7", "type": "what", "kind": "region", "tools": ["region"], "answer": "A cat",
        "trigger": True, "regions": [[1, 1, 2, 2]], "grid": 8,
    }  # fmt: skip
    assert row_json(read_row(got)) == got


def test_several_regions_are_numbered(small: Path) -> None:
    boxes = (Box(0, 0, 9, 4), Box(1, 1, 9, 4), Box(70, 30, 80, 40))
    found = Annotation(str(small), "q", "a", boxes)
    got = make_row(found, "region", recipe())
    assert got.messages[1].content.count("<|region_token_start|>") == 2  # equal cells are one
    assert got.messages[2].content == "Region 0: <image>\nRegion 1: <image>\n"
    assert len(got.pictures["<image>"]) == 3
    merged = make_row(found, "region", recipe(merge=True))
    assert merged.meta["regions"] == [[0, 0, 7, 7]]
    fits = build_rows([found], recipe(shares={"direct": 1, "region": 0.001}, max_regions=1))
    assert fits.kinds == {"direct": 1}


@pytest.mark.parametrize("grid", [4, 8, 16, 32])
@pytest.mark.parametrize("regions", ["published", "cover"])
def test_boxes_become_cells_of_any_grid(small: Path, grid: int, regions: Any) -> None:
    box = Box(33.5, 11, 47, 29.25)
    asked = recipe(table=table(grid=grid), regions=regions)
    got = make_row(Annotation(str(small), "q", "a", (box,)), "region", asked)
    cells = box_to_region(box, (80, 40), grid)
    assert got.meta["regions"] == [list(cells)]
    assert got.meta["grid"] == grid
    crop = got.pictures["<image>"][1].crop
    assert crop == tuple(region_to_box(cells, (80, 40), grid, regions))
    assert crop is not None
    assert crop[0] <= 34
    assert crop[2] >= 47


@pytest.mark.parametrize(
    ("kind", "prefix"), [("clip", "clip"), ("dino", "detection"), ("sam", "seg")]
)
def test_re_encoding_rows(small: Path, kind: str, prefix: str) -> None:
    asked = recipe(table=table(controls=2))
    got = row_json(make_row(Annotation(str(small), "q", "a"), kind, asked, trigger=True))
    texts = [m["content"] for m in got["messages"]]
    control = f"<|{prefix}_action|>"
    assert texts == [
        f"<image>\nq\n{REENCODE_TRIGGER}",
        f"<|{prefix}_action_start|>{control}{control}<|{prefix}_action_end|>",
        f"<{prefix}_image>",
        "a",
    ]
    assert got["images"] == got[f"{prefix}_images"] == [str(small)]


def test_kinds_of_ones_own(small: Path) -> None:
    shown = {"placeholder": "<|pad|>", "tag": "<depth_image>", "encoder": "base"}
    depth = PerceptionKind(name="depth", tool="depth", start="<|d|>", end="<|/d|>",
                           payload="control", control="<|c|>", **shown)  # type: ignore[arg-type]  # fmt: skip
    clock = PerceptionKind(name="clock", tool="clock", start="<|t|>", end="<|/t|>", payload="none",
                           placeholder="<|pad|>", tag="<image>", encoder="none")  # fmt: skip
    asked = recipe(table=PerceptionTable((depth, clock)), shares={"clock": 1, "depth": 1})
    found = Annotation(str(small), "When?", "At noon", result="12:00")
    texts = [m.content for m in make_row(found, "clock", asked).messages]
    assert texts == ["<image>\nWhen?", "<|t|><|/t|>", "12:00", "At noon"]
    plain = Annotation(str(small), "How far?", "Near")
    got = make_row(plain, "depth", asked)
    assert row_json(got)["depth_images"] == [str(small)]
    assert build_rows([plain, found], asked).kinds == {"clock": 1, "depth": 1}
    with pytest.raises(RowError, match=r"a row of the kind clock needs the result"):
        make_row(plain, "clock", asked)


def test_shares_are_kept_and_the_seed_decides(scenes: Path) -> None:
    annotations = list(Annotations(scenes / "questions.jsonl"))
    shares = {"region": 0.5, "clip": 0.25, "direct": 0.25}
    asked = recipe(shares=shares, trigger=0.5, rows=8, seed=3)
    built = build_rows(annotations, asked)
    assert built.kinds == {"region": 4, "clip": 2, "direct": 2}
    assert built.triggers == {"region": 2, "clip": 1}
    assert sum(r.meta.get("trigger", False) for r in built.rows) == 3
    assert built.unused == len(annotations) - 8
    assert len({r.meta["id"] for r in built.rows}) == 8
    assert build_rows(annotations, asked).rows == built.rows
    assert build_rows(annotations, recipe(shares=shares, rows=8, seed=4)).rows != built.rows
    free = build_rows(annotations, recipe(shares=shares, trigger=0))
    assert not any(REGION_TRIGGER in r.messages[0].content for r in free.rows)
    assert len(free.rows) == len(annotations) - free.unused >= len(annotations) - 3


def test_written_rows_are_good_rows(scenes: Path) -> None:
    built = build_rows(
        Annotations(scenes / "questions.jsonl"),
        recipe(shares={"region": 2, "clip": 1, "sam": 1, "direct": 1}, table=table(grid=16)),
    )
    for name in ("rows.json", "rows.jsonl"):
        assert write_rows(built.rows, scenes / name) == len(built.rows)
        rows = load_rows(scenes / name)
        assert [r.messages for r in rows] == [r.messages for r in built.rows]
        assert [r.pictures["<image>"] for r in rows] == [r.pictures["<image>"] for r in built.rows]
        assert rows.check(pictures="pixels", table=table(grid=16)).ok
        assert rows.check(pictures="none").counts["calls"] > 0  # of another grid
    raw = json.loads((scenes / "rows.json").read_text(encoding="utf-8"))
    assert raw[0]["images"][0] in ("0.png", "1.png")
    write_rows(built.rows, scenes / "rows.json", absolute=True, overwrite=True)
    raw = json.loads((scenes / "rows.json").read_text(encoding="utf-8"))
    assert raw[0]["images"][0].startswith(str(scenes))
    with pytest.raises(UserError, match=r"never written over another one; where: .*rows\.json"):
        write_rows(built.rows, scenes / "rows.json")
    with pytest.raises(UserError, match=r"written to \.json or \.jsonl files"):
        write_rows(built.rows, scenes / "rows.csv")
    with pytest.raises(UserError, match=r"the file cannot be written; where: .*x\.json"):
        write_rows(built.rows, scenes / "0.png" / "x.json")
    write_rows([], scenes / "none.json")
    assert len(load_rows(scenes / "none.json")) == 0


def test_dealing_finds_a_way_where_there_is_one() -> None:
    a, b, c = frozenset("rc"), frozenset("cd"), frozenset("r")
    fits = [a] * 2 + [b] * 2 + [c] * 2
    dealt = deal(fits, {"c": 1, "r": 1, "d": 1}, 6)
    assert Counter(dealt) == {"r": 2, "c": 2, "d": 2}
    assert all(kind in fit for kind, fit in zip(dealt, fits, strict=True) if kind)
    assert Counter(deal([c] * 5 + [b], {"r": 1, "d": 1}, None)) == {"r": 2, "d": 1, None: 3}
    assert counts_of({"a": 1, "b": 1, "c": 1}, 5) == {"a": 2, "b": 2, "c": 1}
    with pytest.raises(
        UserError, match=r"cannot fill these shares; got: r: 4 fit, d: 2 fit; expected: r: 3, d: 3"
    ):
        deal(fits, {"r": 1, "d": 1}, 6)
    with pytest.raises(UserError, match=r"cannot fill these shares; got: r: 0 fit"):
        deal([], {"r": 1}, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": {}}, r"the shares sum to nothing; got: \{\}; expected: shares of region, clip"),
        ({"shares": {"region": 0}}, r"the shares sum to nothing"),
        ({"shares": {"region": -1}}, r"a share is a number.*where: shares, region; got: -1"),
        ({"shares": {"zoom": 1}}, r"no such perception kind; got: zoom"),
        ({"trigger": 2}, r"trigger is a share; got: 2; expected: 0 to 1"),
        ({"max_regions": 0}, r"a region row has a region; where: max_regions"),
        ({"rows": 0}, r"at least one row is made; where: rows; got: 0"),
    ],
)
def test_recipes_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(**options)


def test_inline_kinds_have_no_rows() -> None:
    kind = PerceptionKind(
        name="zoom", tool="zoom", start="<|z|>", end="<|/z|>", payload="none",
        placeholder="<|p|>", tag="<image>", encoder="base", result="inline",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"results inside an assistant's turn.*shares, zoom"):
        recipe(table=PerceptionTable((kind,)), shares={"zoom": 1})


def test_bad_annotations_are_raised_or_counted(small: Path) -> None:
    good = {"image": "a.png", "question": "q", "answer": "a", "boxes": [0, 0, 20, 20]}
    bad: list[tuple[Any, str]] = [
        (3, r"an annotation is a JSON object.*got: int"),
        ({"image": "a.png", "question": "q"}, r"lacks its answer.*expected: a key answer"),
        (good | {"image": "b.png"}, r"there is no such file; where: annotations, row 0, .*b\.png"),
        (good | {"image": 3}, r"this is no picture.*got: int"),
        (good | {"boxes": [[0, 0, 90, 20]]}, r"leaves its picture.*xyxy inside 80 x 40 pixels"),
        (good | {"boxes": [[9, 9, 9, 20]]}, r"a box is empty or leaves its picture"),
        (good | {"boxes": [[0, 0, float("nan"), 20]]}, r"a box is empty or leaves its picture"),
        (good | {"boxes": [[0, 0, 20]]}, r"a box is four numbers.*got: 3 numbers"),
        (good | {"boxes": ["x"]}, r"a box is four numbers.*got: 'x'"),
        (good | {"boxes": "all"}, r"boxes are a list.*got: 'all'"),
        (good | {"question": " "}, r"question is a text"),
        (good | {"kinds": 3}, r"kinds are names.*got: 3"),
        (good | {"answer": "see <image>"}, r"spells the tag of a picture.*got: <image>"),
    ]
    for item, message in bad:
        with pytest.raises(RowError, match=message):
            build_rows(Annotations([item], folder=small.parent), recipe())
    found = Annotations([good, *(item for item, _ in bad)], folder=small.parent)
    built = build_rows(found, recipe(), on_error="skip")
    assert len(built.rows) == 1
    assert (built.report.rows, built.report.good) == (14, 1)
    assert built.report.counts == {"not_a_row": 9, "missing_pictures": 1, "crops_outside": 3}
    assert built.to_dict()["annotations"]["good"] == 1
    with pytest.raises(RowError, match=r"a region row needs a box"):
        make_row(Annotation(str(small), "q", "a"), "region", recipe())
    with pytest.raises(RowError, match=r"no such file; where: annotation, none\.png"):
        build_rows([Annotation("none.png", "q", "a")], recipe(shares={"direct": 1}))


@pytest.mark.parametrize(
    ("box_format", "box"),
    [
        ("xyxy", [8, 4, 16, 20]),
        ("xywh", [8, 4, 8, 16]),
        ("xyxy_1", [0.1, 0.1, 0.2, 0.5]),
        ("xyxy_1000", [100, 100, 200, 500]),
    ],
)
def test_boxes_and_columns_as_they_come(small: Path, box_format: Any, box: list[float]) -> None:
    item = {"pic": "a.png", "q": {"en": "why?"}, "answers": ["no", "yes", "yes"],
            "objects": {"bbox": [box, {"bbox": box}]}}  # fmt: skip
    columns = {"image": "pic", "question": "q.en", "answer": "answers", "boxes": "objects.bbox"}
    got = next(
        iter(Annotations([item], columns=columns, box_format=box_format, folder=small.parent))
    )
    assert isinstance(got, Annotation)
    assert (got.question, got.answer) == ("why?", "yes")
    assert got.boxes == (pytest.approx((8, 4, 16, 20)),) * 2
    with pytest.raises(UserError, match=r"no such field; where: columns; got: quest; expected: im"):
        Annotations([item], columns={"quest": "q"})
    with pytest.raises(UserError, match=r"unknown format of boxes; got: yxyx"):
        Annotations([item], box_format="yxyx")  # type: ignore[arg-type]


def test_an_annotation_may_say_what_it_becomes(small: Path) -> None:
    item = {"image": "a.png", "question": "q", "answer": "a", "boxes": [[0, 0, 9, 9]]}
    items = [item | {"kinds": kinds} for kinds in ("clip", ["direct"], None)]
    built = build_rows(
        Annotations(items, folder=small.parent),
        recipe(shares={"region": 1, "clip": 1, "direct": 1}),
    )
    became = {r.where[-1]: r.meta["kind"] for r in built.rows}
    assert became == {"0": "clip", "1": "direct", "2": "region"}


def test_pictures_of_a_table_become_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = Image.effect_noise((60, 40), 90).convert("RGB")
    made = datasets.Dataset.from_dict(
        {"image": [image, image], "question": ["q", "r"], "answer": ["a", "b"],
         "objects": [{"bbox": [[0, 0, 30, 20]]}, {"bbox": []}]}
    ).cast_column("image", datasets.Image())  # fmt: skip
    options: Any = {"columns": {"boxes": "objects.bbox"}, "box_format": "xywh"}
    for source in (made, made.to_iterable_dataset()):
        found = Annotations(source, pictures=tmp_path / "pictures", **options)
        built = build_rows(found, recipe(shares={"region": 1, "direct": 1}))
        assert built.kinds == {"region": 1, "direct": 1}
        (path,) = (tmp_path / "pictures").iterdir()  # equal pixels are one file
        assert Image.open(path).tobytes() == image.tobytes()
        assert {r.pictures["<image>"][0].path for r in built.rows} == {str(path)}
    with pytest.raises(UserError, match=r"must be written to files.*name a folder"):
        list(Annotations(made, **options))
    broken = [{"image": b"no", "question": "q", "answer": "a"}]
    with pytest.raises(RowError, match=r"not a picture that can be read"):
        build_rows(Annotations(broken, pictures=tmp_path / "pictures"), recipe())


def test_coco(small: Path) -> None:
    folder = small.parent
    boxes = {
        "images": [{"id": 1, "file_name": "a.png", "width": 80, "height": 40}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 2, "bbox": [10, 5, 20, 10]},
            {"id": 6, "image_id": 1, "category_id": 2, "bbox": [60, 5, 10, 10]},
            {"id": 7, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10]},
        ],
        "categories": [{"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    questions = [
        {"image_id": 1, "question": "How many cats?", "answer": "2", "category": "cat"},
        {"image_id": 1, "question": "What is left?", "answer": "a dog", "annotation_ids": [7]},
        {"image_id": 1, "question": "Is it day?", "question_id": 9},
        {"image_id": 1, "question": "Own?", "answer": "yes", "bbox": [0, 0, 8, 8]},
        {"image_id": 4, "question": "Where?", "answer": "nowhere"},
        {"image_id": 1, "question": "q", "answer": "a", "annotation_ids": [99]},
        {"image_id": 1, "question": "q"},
    ]
    captions = {"annotations": [{"image_id": 1, "id": 3, "caption": "Two cats and a dog."}]}
    answers = {"annotations": [{"question_id": 9, "multiple_choice_answer": "yes"}]}
    for name, data in {"boxes": boxes, "questions": {"questions": questions}, "answers": answers,
                       "captions": captions}.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    found = list(
        CocoAnnotations(folder / "boxes.json", folder / "questions.json",
                        answers=folder / "answers.json")
    )  # fmt: skip
    good = [a for a in found if isinstance(a, Annotation)]
    assert [(a.question, a.answer, a.boxes) for a in good] == [
        ("How many cats?", "2", (Box(10, 5, 30, 15), Box(60, 5, 70, 15))),
        ("What is left?", "a dog", (Box(0, 0, 10, 10),)),
        ("Is it day?", "yes", ()),
        ("Own?", "yes", (Box(0, 0, 8, 8),)),
    ]
    errors = [str(a) for a in found if isinstance(a, RowError)]
    assert "names no picture of the boxes' file; where: questions.json, entry 4" in errors[0]
    assert "names boxes that are not there" in errors[1]
    assert "answer is a text" in errors[2]
    (told,) = CocoAnnotations(folder / "boxes.json", folder / "captions.json")
    assert isinstance(told, Annotation)
    assert (told.question, told.boxes) == ("Describe the image.", ())
    lines = folder / "q.jsonl"
    lines.write_text("\n".join(map(json.dumps, [*questions[:2], 3])) + "\n{", encoding="utf-8")
    assert (
        len([a for a in CocoAnnotations(folder / "boxes.json", lines) if isinstance(a, Annotation)])
        == 2
    )
    built = build_rows(good, recipe(shares={"region": 3, "clip": 1}))
    assert built.kinds == {"region": 3, "clip": 1}
    for file, message in (
        ("captions.json", r"no file of COCO's layout"),
        ("none.json", r"cannot be read as JSON"),
    ):
        with pytest.raises(UserError, match=message):
            CocoAnnotations(folder / file, lines)
    (folder / "odd.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no list of entries; where: .*odd\.json"):
        list(CocoAnnotations(folder / "boxes.json", folder / "odd.json"))


def test_a_text_kind_takes_its_argument_from_the_annotation(small: Path) -> None:
    kind = own_kind("lookup", payload="text", pattern="[A-Z]{1,4}", argument="key")
    asked = recipe(table=PerceptionTable((kind,)), shares={"lookup": 1, "direct": 1})
    found = Annotation(str(small), "q", "a", argument="KEY", result="seven")
    texts = [m.content for m in make_row(found, "lookup", asked).messages]
    assert texts[1:3] == [kind.call_text(text="KEY"), "seven"]
    without = Annotation(str(small), "q", "a", result="seven")
    assert build_rows([without, found], asked).kinds == {"lookup": 1, "direct": 1}
    with pytest.raises(RowError, match=r"a row of the kind lookup needs the argument"):
        make_row(without, "lookup", asked)


def test_a_folder_for_pictures_must_be_one(small: Path) -> None:
    item = {"image": small.read_bytes(), "question": "q", "answer": "a"}
    with pytest.raises(UserError, match=r"a picture cannot be written; where: .*a\.png"):
        list(Annotations([item], pictures=small / "pictures"))
