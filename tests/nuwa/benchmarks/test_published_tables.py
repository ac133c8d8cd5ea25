"""Tables of the published schemas become examples and prompts; damaged ones are refused in one clear line."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from nuwa.benchmarks import BENCHMARKS, Example, RecordError, SchemaError, check_schema, get_benchmark
from nuwa.benchmarks.records import image_size

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
BOX_PROMPT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. "
    "Please provide the bounding box coordinate of the region this sentence describes: "
)
# (id, question, truth, category, prompt) of the sample rows
EXPECTED = {
    "gqa": ("gqa:2011", "What color is the sky?", {"answer": "blue"}, "", "What color is the sky?" + WORD),
    "pope": (
        "pope:popular/1",
        "Is there a dog in the image?",
        {"answer": "yes"},
        "popular",
        "Is there a dog in the image?" + WORD,
    ),
    "scienceqa": (
        None,
        "Which is north?",
        {"answer": "B", "options": {"A": "Ohio", "B": "Utah", "C": "Iowa"}},
        "social science",
        "Context: Look at the map.\nWhich is north?\nA. Ohio\nB. Utah\nC. Iowa" + LETTER,
    ),
    "textvqa": (
        "textvqa:34602",
        "what is the brand of this CAMERA?",
        {"answers": ["Nous", "nous les gosses", "", *["dakota"] * 7]},
        "",
        "What is the brand of this camera?" + WORD,
    ),
    "vqav2": ("vqav2:262148000", "How many dogs?", {"answers": ["2"] * 10}, "number", "How many dogs?" + WORD),
    "mme": (
        "mme:count/0001.png:yes",
        "Are there two dogs? Please answer yes or no.",
        {"answer": "yes", "group": "count/count/0001.png"},
        "count",
        "Are there two dogs?" + WORD,
    ),
    "mmbench": (
        "mmbench:2000241",
        "Which is a fruit?",
        {"answer": "B", "options": {"A": "stone", "B": "banana"}, "group": "241"},
        "identity_reasoning",
        "Which is a fruit? There are several options:\nA. stone\nB. banana\n" + LETTER,
    ),
    "mmbench_cn": (
        "mmbench_cn:2000241",
        "哪一个是水果？",
        {"answer": "B", "options": {"A": "石头", "B": "香蕉"}, "group": "241"},
        "identity_reasoning",
        "哪一个是水果？ There are several options:\nA. 石头\nB. 香蕉\n\n请直接使用所提供的选项字母作为答案回答。",
    ),
    "seedbench": (
        "seedbench:101669",
        "How many towels are there?",
        {"answer": "C", "options": {"A": "One", "B": "Two", "C": "Three", "D": "Four"}},
        "image",
        "How many towels are there?\nA. One\nB. Two\nC. Three\nD. Four" + LETTER,
    ),
    "mmmu": (
        "mmmu:validation_Art_Theory_3",
        "Who painted this?",
        {
            "id": "validation_Art_Theory_3",
            "type": "multiple-choice",
            "options": {"A": "Claude Monet", "B": "Max Ernst", "C": "O'Keeffe"},
            "answer": "B",
        },
        "Art_Theory",
        "Who painted this?\nA. Claude Monet\nB. Max Ernst\nC. O'Keeffe\n" + LETTER,
    ),
    "mmvet": (
        "mmvet:v1_0",
        "What is x in the equation?",
        {"question": "What is x in the equation?", "answer": "-1<AND>-5"},
        "ocr,math",
        "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
        "What is x in the equation?",
    ),
}
for _name, _question_id in (("docvqa", 49153), ("infovqa", 98313)):
    EXPECTED[_name] = (
        f"{_name}:{_question_id}",
        "What is the date?",
        {"answers": ["Jan 8", "January 8"]},
        "",
        "What is the date?" + WORD,
    )
EXPECTED |= {
    "ocrbench": (
        None,
        "what is written in the image?",
        {"answers": ["CENTRE"], "dataset": "IIIT5K", "part": "recognition"},
        "Regular Text Recognition",
        "what is written in the image?",
    ),
    "chartqa": (
        None,
        "How many bars are there?",
        {"answer": "14", "type": "human_test"},
        "human_test",
        "How many bars are there?\nAnswer the question with a single word.",
    ),
    "mmstar": (
        "mmstar:7",
        "Is it red? Please answer yes or no.\nOptions: A: Yes, B: No, C: Both, D: Neither",
        {"answer": "A"},
        "coarse perception: image style & quality",
        "Is it red?\nOptions: A: Yes, B: No, C: Both, D: Neither\n"
        "Answer with the option's letter from the given choices directly",  # without its period
    ),
    "hallusionbench": (
        "hallusionbench:VD/illusion/0/2/1",
        "Is the left circle smaller?",
        {
            "answer": "no",
            "group": "VD/illusion/0/figure 2 | VD/illusion/0/question 1",
            "question": "Is the left circle smaller?",
            "details": "They are of one size.",
        },
        "VD",
        "Is the left circle smaller?",
    ),
    "realworldqa": (
        None,
        "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter.",
        {"answer": "B", "options": ["Left", "Right"]},
        "",
        "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter.",
    ),
    "ai2d": (
        None,
        "Which stage comes after the egg?",
        {"answer": "C", "options": {"A": "larva", "B": "adult", "C": "pupa", "D": "none"}},
        "",
        "Which stage comes after the egg?\nA. larva\nB. adult\nC. pupa\nD. none" + LETTER,
    ),
    "vizwiz": (
        "vizwiz:VizWiz_val_00000000.jpg",
        "what IS this?",
        {"answers": ["unanswerable", *["can of soup"] * 9]},
        "other",
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD,
    ),
}
# a 20×10 image; x, y, w, h = 5, 2.5, 10, 5
BOX = {"box": [0.25, 0.25, 0.75, 0.75]}
MEND = "; mend or drop the row, or fetch the file again"
SIZES = {
    "ocrbench": 128,
    "hallusionbench": 128,
    "mmmu": 128,
    "mmvet": 1024,
    "refcoco": 64,
    "refcocoplus": 64,
    "refcocog": 64,
    "docvqa": 32,
    "infovqa": 32,
}

every_benchmark = pytest.mark.parametrize("name", list(BENCHMARKS))


def examples(name: str, table: pa.Table, variant: str | None = None) -> list[Example]:
    return list(get_benchmark(name, variant).examples(table, "f.parquet"))


@every_benchmark
def test_every_benchmark_has_a_published_table(name, published):
    assert set(BENCHMARKS) == set(EXPECTED) | {"refcoco", "refcocoplus", "refcocog"}
    benchmark = get_benchmark(name)
    assert benchmark.schema.equals(published(name).schema)
    assert benchmark.max_new_tokens == SIZES.get(name, 16)
    assert benchmark.family == ("grounding" if name.startswith("refcoco") else "vqa")


@every_benchmark
def test_a_row_becomes_its_example_and_prompts(name, published):
    benchmark, source = get_benchmark(name), published(name)
    found = examples(name, source.read(source.table()))
    if benchmark.family == "grounding":
        assert [(one.example_id, one.question, one.truth, one.category) for one in found] == [
            (f"{name}:17:0", "left dog", BOX, ""),
            (f"{name}:17:1", "the brown dog", BOX, ""),
        ]
        assert benchmark.prompt(found[0], "llava_v1") == BOX_PROMPT + "left dog"
        assert benchmark.prompt(found[1], "testbed") == "locate the brown dog"
    else:
        (one,) = found
        example_id, question, truth, category, prompt = EXPECTED[name]
        assert example_id in (None, one.example_id)
        assert (one.question, one.truth, one.category) == (question, truth, category)
        assert benchmark.prompt(one, "llava_v1") == prompt
        assert benchmark.prompt(one, "testbed") == question
    image = source.row["image_1" if name == "mmmu" else "image"]
    assert all(one.image == (image[0] if isinstance(image, list) else image)["bytes"] for one in found)


@every_benchmark
def test_truths_survive_json(name, published):
    for benchmark in BENCHMARKS[name]:
        for one in benchmark.examples(published(name).table()):
            assert json.loads(json.dumps(one.truth)) == one.truth


def large(kind: pa.DataType) -> pa.DataType:
    """The same type with 64-bit offsets."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_binary(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.large_list(large(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, large(field.type)) for field in kind])
    return kind


@every_benchmark
def test_large_types_extra_columns_and_other_orders_are_fine(name, published):
    source = published(name)
    table = source.table()
    wide = table.cast(pa.schema([(field.name, large(field.type)) for field in table.schema]))
    shuffled = wide.select(list(reversed(wide.column_names))).append_column("note", pa.array(["x"]))
    assert examples(name, source.read(shuffled)) == examples(name, table)


@every_benchmark
def test_every_missing_column_is_named(name, published):
    schema = published(name).schema
    for position, field in enumerate(schema):
        with pytest.raises(SchemaError) as error:
            check_schema(schema.remove(position), get_benchmark(name), "data/f.parquet")
        assert str(error.value).startswith(f"data/f.parquet: column {field.name!r} of {name} should be ")
        assert ", found missing; " in str(error.value)


@every_benchmark
def test_every_wrong_type_is_named(name, published):
    schema = published(name).schema
    for position, field in enumerate(schema):
        with pytest.raises(
            SchemaError, match=rf"^f: column {field.name!r} of {name} should be .*, found date32\[day\]"
        ):
            check_schema(schema.set(position, pa.field(field.name, pa.date32())), get_benchmark(name), "f")


def test_the_whole_message_of_a_schema_error(published):
    remedy = "; give the table as published, or name the benchmark this file belongs to"
    schema = published("refcoco").schema
    broken = {
        schema.remove(5): "column 'bbox' of refcoco should be list<float>, found missing",
        schema.set(5, pa.field("bbox", pa.list_(pa.string()))): "column 'bbox' of refcoco should be list<float>, "
        "found list<string>",
        schema.set(1, pa.field("image", pa.string())): "column 'image' of refcoco should be "
        "struct{bytes: binary, path: string}, found string",
        schema.set(6, pa.field("iscrowd", pa.bool_())): "column 'iscrowd' of refcoco should be int8, found bool",
    }
    for damaged, message in broken.items():
        with pytest.raises(SchemaError) as error:
            check_schema(damaged, get_benchmark("refcoco"), "testA.parquet")
        assert str(error.value) == f"testA.parquet: {message}{remedy}"


def test_examples_check_the_schema_themselves(published):
    table = published("pope").table().drop_columns("answer")
    with pytest.raises(SchemaError, match=r"^f.parquet: column 'answer' of pope should be string, found missing"):
        examples("pope", table)


NO_BYTES = {"bytes": None, "path": "a.jpg"}
DAMAGE = [
    ("refcoco", {"image": None}, "column 'image' holds no image"),
    ("refcoco", {"image": NO_BYTES}, "column 'image' holds no image bytes but only the path 'a.jpg'"),
    ("refcoco", {"image": {"bytes": b"", "path": None}}, "column 'image' holds no image bytes"),
    (
        "refcoco",
        {"image": {"bytes": b"no png", "path": None}},
        "column 'image': its 6 image bytes cannot be opened (UnidentifiedImageError)",
    ),
    ("refcocog", {"answer": []}, "column 'answer' is empty"),
    ("refcocog", {"answer": None}, "column 'answer' is empty"),
    ("refcocog", {"answer": ["dog", " "]}, "column 'answer' has an empty entry at position 1"),
    ("refcocog", {"answer": [None]}, "column 'answer' has an empty entry at position 0"),
    ("refcoco", {"question_id": None}, "column 'question_id' is empty"),
    (
        "refcoco",
        {"bbox": [1.0, 2.0]},
        "column 'bbox' should be four finite numbers x, y, w, h in pixels, found [1.0, 2.0]",
    ),
    ("refcoco", {"bbox": None}, "column 'bbox' should be four finite numbers x, y, w, h in pixels, found None"),
    (
        "refcoco",
        {"bbox": [1.0, 2.0, float("nan"), 3.0]},
        "column 'bbox' should be four finite numbers x, y, w, h in pixels, found [1.0, 2.0, nan, 3.0]",
    ),
    ("refcoco", {"bbox": [1.0, 2.0, 0.0, 3.0]}, "column 'bbox' has no area: width 0, height 3"),
    ("gqa", {"question": "  "}, "column 'question' is empty"),
    ("gqa", {"answer": None}, "column 'answer' is empty"),
    ("pope", {"answer": "maybe"}, "column 'answer' is 'maybe', allowed are yes, no"),
    ("pope", {"category": None}, "column 'category' is empty"),
    ("textvqa", {"answers": []}, "column 'answers' should hold 10 answers, found 0"),
    ("textvqa", {"answers": None}, "column 'answers' should hold 10 answers, found 0"),
    ("textvqa", {"answers": ["x"] * 9}, "column 'answers' should hold 10 answers, found 9"),
    ("textvqa", {"answers": ["x"] * 9 + [None]}, "column 'answers' has a null at position 9"),
    ("textvqa", {"answers": [" "] * 10}, "column 'answers' holds blank answers only"),
    ("vqav2", {"answers": None}, "column 'answers' should hold 10 answers, found 0"),
    ("vqav2", {"answers": [None] * 10}, "column 'answers' has a null at position 0"),
    ("scienceqa", {"answer": 3}, "column 'answer' is 3, allowed are 0 to 2"),
    ("scienceqa", {"answer": -1}, "column 'answer' is -1, allowed are 0 to 2"),
    ("scienceqa", {"answer": None}, "column 'answer' is None, allowed are 0 to 2"),
    ("scienceqa", {"choices": []}, "column 'choices' is empty"),
    ("mme", {"answer": "other"}, "column 'answer' is 'other', allowed are yes, no"),
    (
        "mme",
        {"category": "colour"},
        "column 'category' is 'colour', allowed are existence, count, position, color, posters, celebrity, scene, "
        "landmark, artwork, OCR, commonsense_reasoning, numerical_calculation, text_translation, code_reasoning",
    ),
    ("mmbench", {"A": "nan"}, "columns 'A' to 'D' hold 1 options, at least 2 are needed"),
    ("mmbench", {"answer": "C"}, "column 'answer' is 'C', allowed are A, B"),
    ("mmbench", {"index": None}, "column 'index' is empty"),
    ("seedbench", {"image": []}, "column 'image' should hold 1 image, found 0"),
    ("seedbench", {"image": [None]}, "column 'image' holds no image"),
    ("seedbench", {"data_type": "audio"}, "column 'data_type' is 'audio', allowed are image, video"),
    ("seedbench", {"choice_d": None}, "column 'choice_d' is null"),
    ("mmmu", {"image_1": None}, "column 'image_1' holds no image"),
    ("mmmu", {"options": "['A'"}, "column 'options' should be the text of a list of two or more, found \"['A'\""),
    (
        "mmmu",
        {"options": "('A', 'B')"},
        "column 'options' should be the text of a list of two or more, found \"('A', 'B')\"",
    ),
    ("mmmu", {"answer": "D"}, "column 'answer' is 'D', allowed are A, B, C"),
    ("mmmu", {"question_type": "essay"}, "column 'question_type' is 'essay', allowed are multiple-choice, open"),
    ("docvqa", {"answers": []}, "column 'answers' is empty"),
    ("infovqa", {"answers": [" ", None]}, "column 'answers' is empty"),
    ("mmvet", {"answer": ""}, "column 'answer' is empty"),
]


@pytest.mark.parametrize(("benchmark", "change", "message"), DAMAGE)
def test_damaged_rows_are_refused(benchmark, change, message, published):
    source = published(benchmark)
    with pytest.raises(RecordError) as error:
        examples(benchmark, source.read(source.table({}, change)))
    assert str(error.value) == f"f.parquet: row 1 of {benchmark}: {message}{MEND}"


@every_benchmark
def test_a_missing_image_is_refused_everywhere(name, published):
    column = "image_1" if name == "mmmu" else "image"
    table = published(name).table({column: [NO_BYTES] if name == "seedbench" else NO_BYTES})
    with pytest.raises(RecordError, match=f"column '{column}' holds no image bytes but only the path 'a.jpg'"):
        examples(name, table)


@every_benchmark
def test_a_damaged_image_is_named_by_row_and_column_everywhere(name, published):
    column, damaged = "image_1" if name == "mmmu" else "image", {"bytes": b"GIF89a, cut off", "path": None}
    table = published(name).table({}, {column: [damaged] if name == "seedbench" else damaged})
    with pytest.raises(RecordError) as caught:
        list(get_benchmark(name).examples(table, "f.parquet", whole=True))
    assert str(caught.value) == (
        f"f.parquet: row 1 of {name}: column {column!r}: its 15 image bytes cannot be opened (UnidentifiedImageError); mend "
        "or drop the row, or fetch the file again"
    )


def test_rows_are_counted_across_batches(published):
    table = published("gqa").table(*[{"id": str(number)} for number in range(700)], {"question": None})
    with pytest.raises(RecordError, match=r"row 700 of gqa: column 'question' is empty"):
        examples("gqa", table)


def test_repeated_question_ids_stay_apart(published):
    found = examples("refcoco", published("refcoco").table({}, {"answer": ["a cat"]}, {}))
    assert [one.example_id for one in found] == [
        "refcoco:17:0",
        "refcoco:17:1",
        "refcoco:17:0#2",
        "refcoco:17:0#3",
        "refcoco:17:1#2",
    ]


def test_pope_ids_do_not_depend_on_which_categories_a_file_holds(published):
    source = published("pope")
    alone = examples("pope", source.table({"category": "random"}))
    among = examples("pope", source.table({"category": "adversarial"}, {"category": "random"}))
    assert [one.example_id for one in among] == ["pope:adversarial/1", "pope:random/1"]
    assert among[1] == alone[0]


def test_scienceqa_ids_are_content(published):
    source = published("scienceqa")
    one, other = examples("scienceqa", source.table({}, {"question": "Which is south?"}))
    assert one.example_id != other.example_id
    assert examples("scienceqa", source.table({"question": "Which is south?"}))[0].example_id == other.example_id


def test_a_missing_hint_leaves_no_trace(published):
    for hint in (None, "", "nan"):
        (one,) = examples("scienceqa", published("scienceqa").table({"hint": hint}))
        assert get_benchmark("scienceqa").prompt(one, "llava_v1").startswith("Which is north?\nA. Ohio")
    (one,) = examples("mmbench", published("mmbench").table({"hint": "It grows."}))
    assert get_benchmark("mmbench").prompt(one, "llava_v1").startswith("It grows. Which is a fruit? There are several")


def test_textvqa_with_ocr(published):
    (one,) = examples("textvqa", published("textvqa").table(), "ocr")
    expected = "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL" + WORD
    assert get_benchmark("textvqa", "ocr").prompt(one, "llava_v1") == expected


def test_seedbench_leaves_out_videos(published):
    video = {"data_type": "video", "question_id": "2", "image": [published("seedbench").row["image"][0]] * 8}
    assert [one.example_id for one in examples("seedbench", published("seedbench").table(video, {}))] == [
        "seedbench:101669"
    ]


def test_mmmu_with_several_images(published):
    second = {"bytes": b"second", "path": None}
    both = {"question": "Compare <image 2> and <image 1>.", "image_2": second}
    only_second = {"question": "See <image 2>", "image_1": None, "image_2": second}
    in_options = {"question": "Which?", "options": "['<image 1>', '<image 2>']", "image_2": second}
    table = published("mmmu").table(both, only_second, in_options)
    every, alone, options = examples("mmmu", table)
    assert every.images == (published("mmmu").row["image_1"]["bytes"], b"second"), "in the order of their numbers"
    assert (every.question, alone.question) == ("Compare <image 2> and <image 1>.", "See")
    assert alone.images == (b"second",) and not every.note
    assert (options.truth["options"], len(options.images)) == ({"A": "<image 1>", "B": "<image 2>"}, 2)

    (single,) = examples("mmmu", table, "single_image")
    assert (single.question, single.image) == ("See", b"second")
    first = examples("mmmu", table, "first_image")
    assert [one.question for one in first] == ["Compare <image 2> and.", "See", "Which?"]
    assert first[2].truth["options"] == {"A": "", "B": "<image 2>"}


def test_open_questions_of_mmmu(published):
    change = {"question_type": "open", "options": "[]", "answer": "['7', 'seven']"}
    (one,) = examples("mmmu", published("mmmu").table(change))
    assert one.truth == {"id": "validation_Art_Theory_3", "type": "open", "answers": ["7", "seven"]}
    assert get_benchmark("mmmu").prompt(one, "llava_v1") == "Who painted this?\n" + WORD


def test_mmes_two_questions_of_an_image_share_a_group(published):
    yes, no = examples("mme", published("mme").table({}, {"question": "Are there three dogs?", "answer": "No"}))
    assert yes.truth["group"] == no.truth["group"]
    assert (yes.example_id, no.example_id) == ("mme:count/0001.png:yes", "mme:count/0001.png:no")


def test_pixel_boxes_keep_the_size_of_their_image(published):
    one, _ = examples("refcoco", published("refcoco").table(), "pixels")
    assert one.truth == BOX | {"size": [20, 10]}


def test_image_size_reads_any_encoded_image(published):
    assert image_size(published("gqa").row["image"]["bytes"]) == (20, 10)
    with pytest.raises(RecordError, match=r"^its 0 image bytes cannot be opened \(UnidentifiedImageError\)$"):
        image_size(b"")
