"""The box parser and the measures of referring expressions, on hand-worked answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nuwa.benchmarks import Example, get_benchmark
from nuwa.benchmarks.boxes import box_iou, parse_box, score_box
from nuwa.testbed.language import format_box

PARSED = [
    ("[0.1, 0.2, 0.3, 0.4]", [0.1, 0.2, 0.3, 0.4]),
    ("[0.1,0.2,0.3,0.4]", [0.1, 0.2, 0.3, 0.4]),
    ("[ 0.1 , 0.2 , 0.3 , 0.4 ]", [0.1, 0.2, 0.3, 0.4]),
    ("[\n0.1,\t0.2,\n0.3,\u00a00.4]", [0.1, 0.2, 0.3, 0.4]),
    ("[0 . 1, 0 .2, 0. 3, - 0.4]", [0.1, 0.2, 0.3, -0.4]),
    ("The dog is at [0, 0, 1, 1].", [0, 0, 1, 1]),
    ("[.5, 1., +1e-1, 2E0]", [0.5, 1.0, 0.1, 2.0]),
    ("[-0.1, 0, 1.2, 1]", [-0.1, 0, 1.2, 1]),
    ("[0.1, 0.2, 0.3, 0.4] or [0.5, 0.6, 0.7, 0.8]", [0.1, 0.2, 0.3, 0.4]),
    ("[see 1] [0.1, 0.2] then [0.5, 0.6, 0.7, 0.8]", [0.5, 0.6, 0.7, 0.8]),
    ("[[0.1, 0.2, 0.3, 0.4]]", [0.1, 0.2, 0.3, 0.4]),
    ('[{"bbox_2d": [1, 2, 3, 4], "label": "dog"}]', [1, 2, 3, 4]),
    ("", None),
    ("dog", None),
    ("0.1, 0.2, 0.3, 0.4", None),
    ("(0.1, 0.2, 0.3, 0.4)", None),
    ("[0.1, 0.2, 0.3, 0.4", None),
    ("[0.1, 0.2, 0.3]", None),
    ("[0.1, 0.2, 0.3, 0.4, 0.5]", None),
    ("[0.1 0.2 0.3 0.4]", None),
    ("[0.1, 0.2, 0.3, ]", None),
    ("[0.1, 0.2, 0.3, 0.4%]", None),
    ("[0.1.2, 0, 0, 1]", None),
    ("[nan, 0, inf, 1]", None),
    ("[1e999, 0, 0, 1]", None),
    ("[٠, 0, 1, 1]", None),
]


@pytest.mark.parametrize(("answer", "box"), PARSED)
def test_parse_box(answer, box):
    assert parse_box(answer, "normalized") == box


def test_pixels_are_divided_by_their_size():
    assert parse_box("[10, 5, 20, 10]", "pixels", (40, 20)) == [0.25, 0.25, 0.5, 0.5]


def test_the_coordinate_space_is_explicit():
    with pytest.raises(ValueError, match=r"^coordinate space 'percent' does not exist; choose normalized or pixels$"):
        parse_box("[1, 2, 3, 4]", "percent")
    with pytest.raises(ValueError, match=r"^boxes in pixels need a positive image size \(width, height\), got None$"):
        parse_box("no box at all", "pixels")
    with pytest.raises(ValueError, match=r"got \(0, 20\)$"):
        parse_box("[1, 2, 3, 4]", "pixels", (0, 20))


def test_the_testbeds_answers_parse():
    assert parse_box(format_box([12, 24, 24, 48], 96, 96), "normalized") == [0.12, 0.25, 0.38, 0.75]


UNIT = [0.0, 0.0, 1.0, 1.0]
# prediction, truth, overlap / union worked by hand
IOUS = [
    (UNIT, UNIT, 1.0),
    ([0, 0, 0.5, 1], UNIT, 0.5),
    ([0, 0, 2, 1], UNIT, 0.5),  # reaches out of the image: nothing is clamped
    ([0.5, 0.5, 1.5, 1.5], UNIT, 0.25 / 1.75),
    ([1, 0, 2, 1], UNIT, 0.0),  # touches
    ([2, 2, 3, 3], UNIT, 0.0),
    ([0.2, 0.2, 0.2, 0.8], UNIT, 0.0),  # no area
    ([0.2, 0.2, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], 0.0),  # union without area
    ([1, 0, 0, 1], UNIT, 0.0),  # inverted in x
    ([1, 1, 0, 0], UNIT, 0.0),  # inverted in both: the product of its sides is positive
    ([1, 1, 0, 0], [1, 1, 0, 0], 0.0),
    ([-1e308, -1e308, 1e308, 1e308], UNIT, 0.0),  # its area overflows
]


@pytest.mark.parametrize(("box", "truth", "iou"), IOUS)
def test_iou(box, truth, iou):
    assert box_iou(box, truth) == pytest.approx(iou, abs=1e-12)


def scores(iou: float, thresholds: str, center: int, parse_failure: int = 0) -> dict[str, float]:
    """``thresholds``: one digit for each of .1 .3 .5 .7 .9."""
    marks = {f"acc@0.{2 * place + 1}": float(digit) for place, digit in enumerate(thresholds)}
    return {"iou": iou, **marks, "center": center, "parse_failure": parse_failure}


SCORED = [
    ("[0, 0, 1, 1]", UNIT, scores(1, "11111", 1)),
    ("[0, 0, 0.5, 1]", UNIT, scores(0.5, "11100", 1)),
    ("[0, 0, 0.3, 1]", UNIT, scores(0.3, "11000", 1)),
    ("[0.5, 0, 1.5, 1]", UNIT, scores(1 / 3, "11000", 1)),  # its centre lies on the edge
    ("[0.6, 0, 1.6, 1]", UNIT, scores(0.25, "10000", 0)),
    ("[0.4, 0.4, 0.6, 0.6]", UNIT, scores(0.04, "00000", 1)),
    ("[1, 1, 0, 0]", UNIT, scores(0, "00000", 0)),  # inverted: even its centre does not count
    ("no box", UNIT, scores(0, "00000", 0, 1)),
    ("", UNIT, scores(0, "00000", 0, 1)),
]


@pytest.mark.parametrize("name", ["refcoco", "refcocoplus", "refcocog"])
@pytest.mark.parametrize(("answer", "truth", "expected"), SCORED)
def test_scores_of_answers(name, answer, truth, expected):
    assert get_benchmark(name).score(answer, {"box": truth}) == pytest.approx(expected, abs=1e-12)


def test_pixel_answers_score_against_their_size():
    benchmark = get_benchmark("refcoco", "pixels")
    truth = {"box": [0.25, 0.25, 0.75, 0.75], "size": [20, 10]}
    assert benchmark.score('```json\n[{"bbox_2d": [5, 2.5, 15, 7.5]}]\n```', truth)["iou"] == pytest.approx(1)
    assert benchmark.score("[0.25, 0.25, 0.75, 0.75]", truth)["iou"] < 0.01


def test_an_exact_half_reaches_the_threshold():
    # 0.5 in exact arithmetic, 0.49999999999999994 in floating point
    box, truth = [0.0, 0.1, 0.1, 0.6], [0.0, 0.1, 0.2, 0.6]
    assert box_iou(box, truth) == 0.49999999999999994
    assert score_box(box, truth)["acc@0.5"] == 1
    assert score_box([0, 0, 0.5 - 1e-6, 1], UNIT)["acc@0.5"] == 0


def test_the_aggregate_is_the_mean():
    benchmark = get_benchmark("refcoco")
    answers = ["[0, 0, 1, 1]", "[0, 0, 0.5, 1]", "[0.4, 0.4, 0.6, 0.6]", "none"]
    table = benchmark.score_table(answers, [{"box": UNIT}] * 4, [""] * 4)
    result = benchmark.aggregate(table)
    assert result == pytest.approx(
        {
            "iou": 1.54 / 4,
            "acc@0.1": 0.5,
            "acc@0.3": 0.5,
            "acc@0.5": 0.5,
            "acc@0.7": 0.25,
            "acc@0.9": 0.25,
            "center": 0.75,
            "parse_failure": 0.25,
        }
    )
    assert benchmark.headline == "acc@0.5"
    assert result == pytest.approx({name: table[name].mean() for name in table.select_dtypes("number")})


share = st.floats(-1, 2, allow_nan=False)
boxes = st.tuples(share, share, share, share)


@given(boxes, boxes)
def test_iou_is_symmetric_and_a_share(one, other):
    assert 0 <= box_iou(one, other) <= 1 + 1e-12
    assert box_iou(one, other) == box_iou(other, one)


@given(boxes, st.integers(1, 4000), st.integers(1, 4000), st.sampled_from(["", " ", "\n", "  "]))
def test_parsing_undoes_writing_in_both_spaces(box, width, height, blank):
    def write(values):
        return f"at [{blank}" + f"{blank},{blank}".join(repr(value) for value in values) + f"{blank}] [9, 9, 9, 9]"

    assert parse_box(write(box), "normalized") == list(box)
    pixels = [box[0] * width, box[1] * height, box[2] * width, box[3] * height]
    assert parse_box(write(pixels), "pixels", (width, height)) == pytest.approx(list(box), abs=1e-12)


def test_boxes_in_thousandths_are_asked_for_and_read_on_their_frame_whatever_the_images_size():
    benchmark = get_benchmark("refcoco", "thousandths")
    asked = benchmark.llava_v1(Example("1", "the red cup", {}, "", b""))
    assert "relative coordinates from 0 to 1000 as JSON" in asked
    assert asked.endswith('{"bbox_2d": [x1, y1, x2, y2]}: the red cup')
    truth = {"box": [0.25, 0.5, 0.75, 1.0]}
    for answer in ('```json\n[{"bbox_2d": [250, 500, 750, 1000]}]\n```', "<box>[[250, 500, 750, 1000]]</box>"):
        assert benchmark.score(answer, truth)["iou"] == 1
    assert benchmark.score("[0.25, 0.5, 0.75, 1.0]", truth)["iou"] < 0.01


def test_internvl_is_asked_between_its_own_tags_and_read_on_the_frame():
    benchmark = get_benchmark("refcocog", "ref_tags")
    asked = benchmark.prompt(Example("1", "the red cup", {}, "", b""), "llava_v1")
    assert asked == (
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>the red cup</ref>"
    )
    truth = {"box": [0.25, 0.5, 0.75, 1.0]}
    # As the model writes it, and as it comes without special tokens.
    for answer in ("<ref>the red cup</ref><box>[[250, 500, 750, 1000]]</box>", "the red cup[[250, 500, 750, 1000]]"):
        assert benchmark.score(answer, truth)["iou"] == 1
    assert benchmark.score("[0.25, 0.5, 0.75, 1.0]", truth)["iou"] < 0.01


def test_boxes_in_pixels_are_asked_for_in_pixels():
    asked = [
        get_benchmark("refcoco", variant).prompt(Example("refcoco:1:0", "the red cup", {}, "", b""), "llava_v1")
        for variant in ("as_published", "pixels")
    ]
    assert "bounded between 0 and 1" in asked[0] and asked[0].endswith("describes: the red cup")
    assert "in pixels as JSON" in asked[1] and asked[1].endswith('{"bbox_2d": [x1, y1, x2, y2]}: the red cup')
