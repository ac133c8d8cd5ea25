"""Named protocols: what each asks, allows and counts as right, typed out from the harnesses, not from the code."""

from __future__ import annotations

import math
from collections import Counter

import pyarrow as pa
import pytest

from nuwa.benchmarks import BENCHMARKS, PROTOCOLS, TESTBED, Example, ProtocolError, get_benchmark
from nuwa.benchmarks.boxes import pixel_iou, unpad_box, whole_boxes
from nuwa.registry import UnknownName

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
# benchmark → answer tokens on LLaVA-1.5 under lmms-eval 0.7.2 and 0.3.4; None: not asked
HARNESS_LIMITS = {
    "refcoco": (1024, 1024),
    "refcocoplus": (1024, 1024),
    "refcocog": (1024, 1024),
    "gqa": (16, 16),
    "pope": (128, 128),
    "vqav2": (16, 16),
    "textvqa": (1024, 1024),
    "scienceqa": (16, 16),
    "mme": (16, 16),
    "mmbench": (1024, 1024),
    "mmbench_cn": (256, 256),
    "seedbench": (1024, 1024),
    "mmmu": (128, 16),
    "mmvet": (1024, 1024),
    "docvqa": (32, 32),
    "infovqa": (32, 32),
    "ocrbench": (128, 128),
    "chartqa": (16, 16),
    "mmstar": (1024, 1024),
    "hallusionbench": (128, 128),
    "realworldqa": (16, 16),
    "ai2d": (16, 16),
    "vizwiz": (1024, 1024),
}


@pytest.mark.parametrize("name", sorted(HARNESS_LIMITS))
def test_limits_are_the_harnesss(name):
    for protocol, limit in zip(("lmms_eval", "lmms_eval_0_3"), HARNESS_LIMITS[name], strict=True):
        benchmark = get_benchmark(name, None, protocol)
        assert benchmark.limit("llava") == benchmark.limit("llava_next") == limit
        # what a task does not limit, the class of Qwen2.5-VL limits to 128
        sets_none = name.startswith("refcoco") or name in ("textvqa", "seedbench", "mmstar", "vizwiz")
        assert benchmark.limit("qwen2_5_vl") == (128 if sets_none else limit)
        assert benchmark.metric and benchmark.protocol == protocol


def test_every_benchmark_of_the_harness_is_listed_here():
    known = {name for name, variants in BENCHMARKS.items() if any("lmms_eval" in one.rules for one in variants)}
    assert known == set(HARNESS_LIMITS)


def test_the_testbeds_own_protocol_changes_nothing():
    for name, variants in BENCHMARKS.items():
        assert get_benchmark(name, None, TESTBED) is variants[0]
        for benchmark in variants:
            assert benchmark.under(TESTBED) is benchmark and benchmark.protocol == TESTBED and not benchmark.metric
            assert benchmark.limit() == benchmark.limit("llava") == benchmark.max_new_tokens


def test_a_protocol_names_its_own_variant():
    assert get_benchmark("pope", None, "llava").variant == "first_sentence"
    assert get_benchmark("pope", None, "lmms_eval").variant == "exact"
    assert get_benchmark("textvqa", None, "llava").variant == "ocr", "LLaVA's published score is with OCR words"
    assert get_benchmark("textvqa", None, "lmms_eval").variant == "no_ocr"
    assert get_benchmark("refcoco", None, "vscan").variant == "pixels"
    assert get_benchmark("refcoco", None, "lmms_eval").variant == "as_published"


@pytest.mark.parametrize(
    ("name", "variant", "protocol", "message"),
    [
        (
            "gqa",
            None,
            "lmms-eval",
            "protocol 'lmms-eval' is unknown; allowed: llava, lmms_eval, lmms_eval_0_3, testbed, vscan; "
            "did you mean 'lmms_eval'?",
        ),
        ("gqa", None, "vscan", "protocol of gqa 'vscan' is unknown; allowed: llava, lmms_eval, lmms_eval_0_3, testbed"),
        (
            "pope",
            "exact",
            "llava",
            "protocol of pope:exact 'llava' is unknown; allowed: lmms_eval, lmms_eval_0_3, testbed",
        ),
    ],
)
def test_unknown_protocols_say_what_exists(name, variant, protocol, message):
    with pytest.raises(UnknownName) as caught:
        get_benchmark(name, variant, protocol)
    assert str(caught.value).startswith(message)


def test_a_protocol_refuses_models_it_was_never_run_on():
    with pytest.raises(ProtocolError) as caught:
        get_benchmark("refcoco", None, "vscan").limit("llava")
    assert str(caught.value) == (
        "prepare.protocol: 'vscan' is not run on llava models; it is on: qwen2_5_vl; choose another protocol or model"
    )
    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert get_benchmark("chartqa", None, "lmms_eval").limit(family) == 16
        assert get_benchmark("refcoco", None, "lmms_eval").limit(family) == 128
    with pytest.raises(ProtocolError) as caught:
        get_benchmark("mmmu", None, "lmms_eval").limit("qwen3_vl")
    assert str(caught.value) == (
        "prepare.protocol: 'lmms_eval' asks qwen3_vl models mmmu in other words, which are not written here; choose another "
        "protocol or model, or leave the benchmark out"
    )
    assert get_benchmark("mmmu", None, "lmms_eval").limit("qwen2_vl") == 128
    with pytest.raises(ProtocolError, match="'llava' is not run on qwen2_5_vl models; it is on: llava, llava_next"):
        get_benchmark("gqa", None, "llava").limit("qwen2_5_vl")
    assert set(PROTOCOLS) == {"testbed", "lmms_eval", "lmms_eval_0_3", "llava", "vscan"}


def example(question: str, **parts) -> Example:
    return Example("x:1", question, parts.pop("truth", {}), "", b"", parts)


# (benchmark, protocol, example, text behind the image)
OPTIONS = {"options": {"A": "stone", "B": "banana"}}
PROMPTS = [
    ("vqav2", "lmms_eval", example("How many dogs?"), "How many dogs?" + WORD),
    ("vqav2", "lmms_eval_0_3", example("How many dogs?"), "How many dogs?"),
    ("textvqa", "lmms_eval", example("what is IT?", ocr_tokens=["A"]), "What is it?" + WORD),
    ("textvqa:ocr", "lmms_eval", example("what is IT?", ocr_tokens=[]), "What is it?\nReference OCR token: " + WORD),
    (
        "textvqa",
        "llava",
        example("what is IT?", ocr_tokens=["A", "b"]),
        "what is IT?\nReference OCR token: A, b" + WORD,
    ),
    (
        "mmbench",
        "lmms_eval",
        example("Which?", truth=OPTIONS, published_hint="It grows.", published_options=OPTIONS["options"]),
        "It grows. Which? There are several options:\nA. stone\nB. banana\n" + LETTER,
    ),
    (
        "mmbench",
        "llava",
        example("Which?", truth=OPTIONS, hint="It grows."),
        "It grows.\nWhich?\nA. stone\nB. banana" + LETTER,
    ),
    (
        "mmbench_cn",
        "lmms_eval",
        example("哪?", truth=OPTIONS, published_hint="nan", published_options=OPTIONS["options"]),
        "nan 哪? There are several options:\nA. stone\nB. banana\n\n请直接使用所提供的选项字母作为答案回答。",
    ),
    (
        "mmbench_cn",
        "llava",
        example("哪?", truth=OPTIONS, hint=""),
        "哪?\nA. stone\nB. banana\n请直接回答选项字母。",
    ),
    ("refcoco", "vscan", example("the red cup"), "Locate red cup in this image and output the bbox coordinates in JSON format."),
    ("refcoco", "vscan", example("An a man "), "Locate a man in this image and output the bbox coordinates in JSON format."),
    ("refcoco", "vscan", example("theatre"), "Locate theatre in this image and output the bbox coordinates in JSON format."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "protocol", "one", "text"), PROMPTS)
def test_prompts_are_the_harnesss(name, protocol, one, text):
    base, _, variant = name.partition(":")
    assert get_benchmark(base, variant or None, protocol).prompt(one, "llava_v1") == text


def test_mmmu_keeps_its_tags_and_counts_what_it_does_not_show(published):
    source = published("mmmu")
    image = source.row["image_1"]
    two = {"id": "validation_Art_4", "question": "<image 1> or <image 2>?", "image_2": image}
    table = source.table({}, two)

    shown = list(get_benchmark("mmmu", None, "lmms_eval_0_3").examples(table, "f", notes := Counter()))
    assert [(one.question, len(one.images)) for one in shown] == [
        ("<image 1> Who painted this?", 1),
        ("<image 1> or <image 2>?", 2),
    ]
    assert not notes

    tagged = get_benchmark("mmmu", "single_image", "lmms_eval")
    notes = Counter()
    (one,) = tagged.examples(table, "f", notes)
    lines = "A. Claude Monet\nB. Max Ernst\nC. O'Keeffe\n"
    assert tagged.prompt(one, "llava_v1") == "<image 1> Who painted this?\n" + lines + LETTER
    assert notes == {"rows left out": 1}

    notes = Counter()
    both = list(get_benchmark("mmmu", "first_image", "lmms_eval_0_3").examples(table, "f", notes))
    assert [one.question for one in both] == ["<image 1> Who painted this?", "<image 1> or <image 2>?"]
    assert notes == {"the first of 2 images is shown": 1}


def test_rows_that_are_no_questions_are_counted(published):
    source = published("seedbench")
    notes: Counter[str] = Counter()
    assert len(list(get_benchmark("seedbench").examples(source.table({}, {"data_type": "video"}), "f", notes))) == 1
    assert notes == {"rows left out": 1}


@pytest.mark.parametrize(
    ("answer", "now", "before"),
    [("B", 1, 1), ("b", 1, 1), ("B.", 1, 0), ("B. Utah", 1, 0), ("b.", 0, 0), ("Utah", 0, 0), ("A", 0, 0)],
)
def test_scienceqa_took_the_bare_letter_alone(answer, now, before):
    truth = {"answer": "B", "options": {"A": "Ohio", "B": "Utah"}}
    assert get_benchmark("scienceqa", None, "lmms_eval").score(answer, truth)["accuracy"] == now
    assert get_benchmark("scienceqa", None, "lmms_eval_0_3").score(answer, truth)["accuracy"] == before


def test_vqav2_left_answers_alone_where_all_agree():
    score = {name: get_benchmark("vqav2", None, name).score for name in ("lmms_eval", "lmms_eval_0_3")}
    unanimous = {"answers": ["The two"] * 10}
    assert score["lmms_eval"]("the 2", unanimous)["accuracy"] == 1
    assert score["lmms_eval_0_3"]("the 2", unanimous)["accuracy"] == 0, "'2' is not 'The two'"
    divided = {"answers": [*["two"] * 9, "dog"]}
    assert score["lmms_eval_0_3"]("two", divided)["accuracy"] == score["lmms_eval"]("2", divided)["accuracy"] == 1


REALWORLD = "Which?\n\nA. cat\nB. dog\nC. bird\nPlease"


@pytest.mark.parametrize(
    ("question", "truth", "right", "wrong"),
    [
        (REALWORLD, "B", ["__B.", "b_", "dog", "dogs"], ["(A)"]),
        ("How many?", "2", [":}*%;2_>", "two", "2_"], ["two."]),
        ("Where to?", "N.W.", ["NW", "n.w.", "_nw"], ["N W"]),
        ("What is it?", "U-turn", ["U-turn", "uturn"], ["u turn"]),
        ("Is it?", "No", ["\tno_", "no ."], ["none"]),
    ],
)
def test_realworldqa_was_compared_without_any_punctuation(published, question, truth, right, wrong):
    """Values of lmms-eval 0.3.4's own filters and metric."""
    benchmark = get_benchmark("realworldqa", None, "lmms_eval_0_3")
    (example,) = benchmark.examples(published("realworldqa").table({"question": question, "answer": truth}))
    scores = {answer: benchmark.score(answer, example.truth)["accuracy"] for answer in right + wrong}
    assert scores == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)


# Boxes


def slow_pixel_iou(one: list[int], other: list[int]) -> float:
    """By counting pixels: the overlap of boxes whose last row and column belong to them."""

    def cells(box: list[int]) -> set[tuple[int, int]]:
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    both = cells(one) & cells(other)
    columns, rows = {x for x, _ in both}, {y for _, y in both}
    overlap = len(both) if len(columns) > 1 and len(rows) > 1 else 0
    return overlap / (len(cells(one)) + len(cells(other)) - overlap)


@pytest.mark.parametrize("seed", range(60))
def test_the_pixel_formula_counts_pixels(seed):
    import random

    draw = random.Random(seed)
    boxes = []
    for _ in range(2):
        x, y = draw.randrange(8), draw.randrange(8)
        boxes.append([x, y, x + draw.randrange(1, 8), y + draw.randrange(1, 8)])
    assert pixel_iou(*boxes) == pytest.approx(slow_pixel_iou(*boxes))


def test_any_box_counts_and_a_half_is_not_enough():
    benchmark = get_benchmark("refcoco", None, "vscan")
    truth = {"box": [0.0, 0.0, 0.5, 1.0], "size": [280, 140], "photo": [200, 100]}
    right = "[0, 0, 140, 140]"  # on the image as the model sees it
    for answer in (right, f'[{{"bbox_2d": [200, 0, 280, 140]}}, {{"bbox_2d": {right}}}]'):
        scores = benchmark.score(answer, truth)
        assert scores["acc@0.5"] == 1 and scores["iou"] == 1 and scores["center"] == 1
    assert benchmark.score("[0, 0, 70, 140]", truth)["acc@0.5"] == 0, "exactly a half"
    assert benchmark.score("[0, 0, 72, 140]", truth)["acc@0.5"] == 1
    for answer in ("[0.0, 0, 140, 140]", "[0, 0, 140]", ""):
        assert benchmark.score(answer, truth)["parse_failure"] == 1
    assert whole_boxes("[1,2, 3 ,4] [5, 6, 7, -8] [9, 10, 11, 12]") == [[1, 2, 3, 4], [9, 10, 11, 12]]


def test_the_testbeds_pixels_read_the_first_box():
    truth = {"box": [0.0, 0.0, 0.5, 1.0], "size": [280, 140]}
    answer = "[200, 0, 280, 140] [0, 0, 140, 140]"
    assert get_benchmark("refcoco", "pixels").score(answer, truth)["acc@0.5"] == 0


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (640, 481), (37, 37), (3, 1000)])
def test_unpadding_undoes_padding(width, height):
    """Of a made photo: pad it as LLaVA-1.5 does and follow a pixel."""
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    box = [0.25 * width, 0.5 * height, 0.75 * width, float(height)]
    told = [(box[0] + left) / side, (box[1] + top) / side, (box[2] + left) / side, (box[3] + top) / side]
    assert unpad_box(told, (width, height)) == pytest.approx([0.25, 0.5, 0.75, 1.0])

    answer = "[" + ", ".join(f"{value:.6f}" for value in told) + "]"
    truth = {"box": [0.25, 0.5, 0.75, 1.0], "padded": [width, height]}
    assert get_benchmark("refcoco", "unpadded").score(answer, truth)["iou"] == pytest.approx(1, abs=2e-3)
    as_published = get_benchmark("refcoco").score(answer, truth)["iou"]
    assert math.isclose(as_published, 1, abs_tol=1e-3) == (width == height)


def test_both_readings_ask_the_same(published):
    table: pa.Table = published("refcoco").table()
    plain, unpadded = (list(get_benchmark("refcoco", name).examples(table)) for name in ("as_published", "unpadded"))
    assert [one.question for one in plain] == [one.question for one in unpadded]
    assert plain[0].truth == {"box": [0.25, 0.25, 0.75, 0.75]}
    assert unpadded[0].truth == plain[0].truth | {"padded": [20, 10]}
