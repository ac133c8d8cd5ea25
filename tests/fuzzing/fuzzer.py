"""Two hundred damaged inputs, seeded: each is refused in one line, or read for what it now says, and nothing else.

    python tests/fuzzing/fuzzer.py 200        # make fuzz; the suite takes the first 40

Inputs are real files: published tables, a table in JSON Lines, a model folder (configuration, tokenizer, weights),
``params.yaml``, photos, instruction data and LearnPruner's module. Bytes are flipped or cut, types and columns exchanged, fields emptied, files swapped. What an input says after that
is asked of an *oracle* that shares no code with what is tested: pyarrow's own reader, Pillow, safetensors and PyYAML. An
outcome is

* ``refused``: an error that a user can mend, of one line;
* ``read``: exactly what the oracle says of the file as it stands (a flipped byte of a question is another question);
* ``wrong``: anything else without an error, ``trace``: any other error, ``slow``: more than 60 s.
"""

from __future__ import annotations

import collections
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import nuwa  # noqa: E402 (started as a script)
from nuwa.benchmarks import get_benchmark  # noqa: E402 (started as a script)
from nuwa.benchmarks.own_tables import JsonLines, own_benchmark  # noqa: E402 (started as a script)
from nuwa.errors import UserError  # noqa: E402 (started as a script)
from nuwa.images import read_image  # noqa: E402 (started as a script)
from nuwa.pruner.instructions import read_instructions  # noqa: E402 (started as a script)
from nuwa.stage1.learnpruner import read_lpm  # noqa: E402 (started as a script)
from nuwa.vlm import adapter_class, load_adapter  # noqa: E402 (started as a script)
from nuwa.vlm.folder import check_folder, load_processor  # noqa: E402 (started as a script)
from pipelines.data.datasets import write_examples  # noqa: E402 (started as a script)
from pipelines.files.surroundings import surroundings  # noqa: E402 (started as a script)
from pipelines.settings import load_settings  # noqa: E402 (started as a script)

LIMIT_S = 60.0
NEW_TOKENS = 3
SEED = 2602
Damage = Callable[[np.random.Generator, bytes], bytes]


class StockFails(Exception):
    """Answered here, and not by transformers."""


class Outcome(NamedTuple):
    number: int
    kind: str
    damage: str
    verdict: str
    seconds: float
    said: str


# Damage to bytes


def flip(rng: np.random.Generator, content: bytes) -> bytes:
    """One to eight bytes get other values."""
    held = bytearray(content)
    for place in rng.integers(0, len(held), rng.integers(1, 9)):
        held[place] ^= int(rng.integers(1, 256))
    return bytes(held)


def cut(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


def hole(rng: np.random.Generator, content: bytes) -> bytes:
    """A stretch of zeros, as a torn write leaves it."""
    start = int(rng.integers(0, len(content)))
    length = int(rng.integers(1, max(2, len(content) // 8)))
    return content[:start] + bytes(min(length, len(content) - start)) + content[start + length :]


def head(rng: np.random.Generator, content: bytes) -> bytes:
    """Bytes are flipped where formats keep their headers."""
    return flip(rng, content[:64]) + content[64:]


def tail(rng: np.random.Generator, content: bytes) -> bytes:
    return content[:-128] + flip(rng, content[-128:])


BYTES: dict[str, Damage] = {"flip": flip, "cut": cut, "hole": hole, "head": head, "tail": tail}

# Published tables


def photo(shade: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(shade).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def pope() -> pa.Table:
    rows = [
        {
            **{"id": str(number), "question_id": str(number), "question": f"Is there a dog {number}?"},
            **{"answer": ("yes", "no")[number % 2], "category": "random"},
            "image": {"bytes": photo(number), "path": None},
        }
        for number in range(6)
    ]
    return pa.Table.from_pylist(rows, get_benchmark("pope").schema)


def exchanged_types(rng: np.random.Generator, table: pa.Table) -> pa.Table:
    """One column becomes numbers, dates, bytes or nothing but nulls."""
    column = int(rng.integers(0, table.num_columns))
    rows = len(table)
    others = [
        pa.array(range(rows)),
        pa.array([1.5] * rows),
        pa.nulls(rows),
        pa.array([b"x"] * rows),
        pa.array([True] * rows),
        pa.array([["a"]] * rows),
        pa.array([0] * rows, pa.date32()),
    ]
    return table.set_column(column, table.column_names[column], others[int(rng.integers(0, len(others)))])


def exchanged_columns(rng: np.random.Generator, table: pa.Table) -> pa.Table:
    names = list(table.column_names)
    one, other = rng.choice(len(names), 2, replace=False)
    names[one], names[other] = names[other], names[one]
    return table.rename_columns(names)


def lost_column(rng: np.random.Generator, table: pa.Table) -> pa.Table:
    return table.remove_column(int(rng.integers(0, table.num_columns)))


def empty_fields(rng: np.random.Generator, table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    for _ in range(int(rng.integers(1, 4))):
        row = rows[int(rng.integers(0, len(rows)))]
        row[table.column_names[int(rng.integers(0, table.num_columns))]] = None
    return pa.Table.from_pylist(rows, table.schema)


def damaged_picture(rng: np.random.Generator, table: pa.Table) -> pa.Table:
    rows = table.to_pylist()
    row = rows[int(rng.integers(0, len(rows)))]
    row["image"]["bytes"] = list(BYTES.values())[int(rng.integers(0, len(BYTES)))](rng, row["image"]["bytes"])
    return pa.Table.from_pylist(rows, table.schema)


def no_rows(_rng: np.random.Generator, table: pa.Table) -> pa.Table:
    return table.slice(0, 0)


TABLES: dict[str, Callable[[np.random.Generator, pa.Table], pa.Table]] = {
    "types": exchanged_types,
    "columns": exchanged_columns,
    "lost column": lost_column,
    "nulls": empty_fields,
    "picture": damaged_picture,
    "no rows": no_rows,
}


def table_input(rng: np.random.Generator, folder: Path) -> tuple[str, Callable[[], bool]]:
    path, name = folder / "pope.parquet", str(rng.choice([*TABLES, *BYTES]))
    table = TABLES[name](rng, pope()) if name in TABLES else pope()
    pq.write_table(table, path, row_group_size=2)
    if name in BYTES:
        path.write_bytes(BYTES[name](rng, path.read_bytes()))

    def read() -> bool:
        write_examples({"pope": folder}, "llava_v1", folder / "e.parquet", folder / "i.parquet")
        got = pq.read_table(folder / "e.parquet", columns=["example_id", "question", "truth"]).to_pylist()
        held = pq.read_table(path).to_pylist()  # the oracle: what the file says now, column by column
        wanted = collections.Counter((row["question"], row["answer"]) for row in held)
        return wanted == collections.Counter((row["question"], json.loads(row["truth"])["answer"]) for row in got)

    return f"table: {name}", read


# Model folders


def model_input(rng: np.random.Generator, folder: Path) -> tuple[str, Callable[[], bool]]:
    shutil.copytree(ROOT / "models/testbed", folder / "model", symlinks=True)
    files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    files += ["processor_config.json", "chat_template.jinja", "model.safetensors", "model.safetensors"]
    path = folder / "model" / str(rng.choice([name for name in files if (folder / "model" / name).exists()]))
    if path.suffix == ".json" and rng.random() < 0.6:
        name = _damage_json(rng, path)
    else:
        name = str(rng.choice([*BYTES, "swapped"]))
        others = sorted(one for one in path.parent.iterdir() if one != path)
        content = others[int(rng.integers(0, len(others)))].read_bytes() if name == "swapped" else path.read_bytes()
        path.write_bytes(content if name == "swapped" else BYTES[name](rng, content))

    def read() -> bool:
        """A folder that passes is whole: every tensor has the shape of the sound one, and is finite; the prompt shows
        one image and the question; and it answers what stock transformers answers from the same files."""
        check_folder(folder / "model", adapter_class, deep=True)
        processor = load_processor(folder / "model")
        with safe_open(ROOT / "models/testbed/model.safetensors", "np") as sound:
            shapes = {name: tuple(sound.get_slice(name).get_shape()) for name in sound.keys()}  # noqa: SIM118 (no mapping)
        with safe_open(folder / "model/model.safetensors", "np") as held:
            for name, shape in shapes.items():
                tensor = held.get_tensor(name)
                if tuple(tensor.shape) != shape or not np.isfinite(tensor).all():
                    return False
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]
        shown = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return shown.count("<image>") == 1 and "red?" in shown and _answers_as_stock(folder / "model")

    return f"model: {path.name}: {name}", read


def _answers_as_stock(folder: Path) -> bool:
    """Raises :class:`StockFails` where transformers itself cannot answer from these files."""
    photo = Image.effect_mandelbrot((96, 96), (-2, -1, 1, 1), 40).convert("RGB")
    vlm = load_adapter(folder)
    (ours,) = nuwa.generate(vlm.model, vlm.processor, [photo], ["red?"], method="unpruned", max_new_tokens=NEW_TOKENS)

    turn = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "red?"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        processor, stock = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
        asked = processor.apply_chat_template(turn, **options)
        whole = stock.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)
    except Exception as error:
        raise StockFails(f"{type(error).__name__}: {error}") from None
    said, end = whole[0, asked["input_ids"].shape[1] :].tolist(), stock.generation_config.eos_token_id
    ends = [place for place, token in enumerate(said) if token in (end if isinstance(end, list) else [end])]
    return list(ours.tokens) == said[: ends[0] if ends else None]


def _damage_json(rng: np.random.Generator, path: Path) -> str:
    """A value somewhere becomes null, a list, a word, a negative number or huge; or its key goes."""
    held = json.loads(path.read_text())
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            places.append((value, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    walk(held)
    value, key = places[int(rng.integers(0, len(places)))]
    others: list[Any] = [None, [], "word", -1, 10**9, 0.5, {}, True]
    if rng.random() < 0.2:
        del value[key]
        name = f"{key} gone"
    else:
        value[key] = others[int(rng.integers(0, len(others)))]
        name = f"{key} = {value[key]!r}"
    path.write_text(json.dumps(held))
    return name


# Settings and photos


def settings_input(rng: np.random.Generator, folder: Path) -> tuple[str, Callable[[], bool]]:
    path = folder / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    name = str(rng.choice([*BYTES, "value", "value", "value"]))
    if name == "value":
        raw = yaml.safe_load(path.read_text())
        (folder / "raw.json").write_text(json.dumps(raw))
        name = _damage_json(rng, folder / "raw.json")
        path.write_text(yaml.safe_dump(json.loads((folder / "raw.json").read_text())))
    else:
        path.write_bytes(BYTES[name](rng, path.read_bytes()))

    def read() -> bool:
        settings = load_settings(path).model_dump()
        raw = yaml.safe_load(path.read_bytes())
        plain = ("evaluate", "report")  # sections whose values stand as they were written
        return all(settings[section][key] == value for section in plain for key, value in raw[section].items())

    return f"settings: {name}", read


def photo_input(rng: np.random.Generator, folder: Path) -> tuple[str, Callable[[], bool]]:
    noise = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((64, 48)).save(buffer, str(rng.choice(["JPEG", "PNG", "WEBP"])))
    name = str(rng.choice(list(BYTES)))
    content = BYTES[name](rng, buffer.getvalue())

    def read() -> bool:
        seen = read_image(content)
        with Image.open(io.BytesIO(content)) as held:
            plain = held.mode == "RGB" and not held.info.get("icc_profile") and not held.getexif()
            return not plain or bool((np.asarray(seen) == np.asarray(held.convert("RGB"))).all())

    return f"photo: {name}", read


# Tables of one's own, instruction data and a trained module


def lines_input(rng: np.random.Generator, folder: Path) -> tuple[str, Callable[[], bool]]:
    """JSON Lines: a value or bytes of it are damaged."""
    path, name = folder / "clocks.jsonl", str(rng.choice([*BYTES, "value", "value", "value"]))
    (folder / "a.png").write_bytes(photo(1))
    rows = [{"image": "a.png", "question": f"What time is it in {n}?", "answers": ["10:45", "noon"]} for n in range(4)]
    if name == "value":
        (folder / "row.json").write_text(json.dumps(rows))
        name = _damage_json(rng, folder / "row.json")
        rows = json.loads((folder / "row.json").read_text())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if name in BYTES:
        path.write_bytes(BYTES[name](rng, path.read_bytes()))

    def read() -> bool:
        clocks = own_benchmark("clocks", "Clocks", "exact")
        got = [(one.question, one.truth["answers"]) for one in clocks.examples(JsonLines(path), str(path), whole=True)]
        held = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
        return got == [(row["question"], row["answers"]) for row in held]

    return f"lines: {name}", read


def lessons_input(rng: np.random.Generator, folder: Path) -> tuple[str, Callable[[], bool]]:
    path, name = folder / "lessons.json", str(rng.choice([*BYTES, "value", "value", "value"]))
    (folder / "a.png").write_bytes(photo(1))
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dög."}]
    path.write_text(json.dumps([{"id": n, "image": "a.png", "conversations": said} for n in range(3)]))
    if name == "value":
        name = _damage_json(rng, path)
    else:
        path.write_bytes(BYTES[name](rng, path.read_bytes()))

    def read() -> bool:
        found = read_instructions(path, folder, seed=0, share=1.0)
        held = [entry for entry in json.loads(path.read_bytes()) if "image" in entry]
        turns = [[turn["value"].replace("<image>", "").strip() for turn in entry["conversations"]] for entry in held]
        return [[text for turn in found.conversation(row).turns for text in turn] for row in found.taught] == turns

    return f"lessons: {name}", read


def weights_input(rng: np.random.Generator, folder: Path) -> tuple[str, Callable[[], bool]]:
    path, name = folder / "lpm.safetensors", str(rng.choice([*BYTES, "not finite"]))
    content = (ROOT / "models/pruner/lpm.safetensors").read_bytes()
    if name == "not finite":
        place = len(content) - 4 * int(rng.integers(1, 100))
        content = content[:place] + np.float32(rng.choice([np.nan, np.inf])).tobytes() + content[place + 4 :]
    path.write_bytes(content if name == "not finite" else BYTES[name](rng, content))

    def read() -> bool:
        got = read_lpm(path).lpm.state_dict()
        with safe_open(path, "np") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (no mapping)
        same = {name: np.array_equal(got[name].numpy(), tensor) for name, tensor in tensors.items()}
        return (
            same.keys() == got.keys() and all(same.values()) and all(np.isfinite(one).all() for one in tensors.values())
        )

    return f"weights: {name}", read


INPUTS = (
    *(table_input, table_input, table_input, model_input, model_input, model_input),
    *(settings_input, photo_input, lines_input, lessons_input, weights_input),
)


def attempt(number: int) -> Outcome:
    """Make damaged input ``number``, always the same, and have it read."""
    rng = np.random.default_rng([SEED, number])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        kind, read = INPUTS[number % len(INPUTS)](rng, folder)
        began, said = time.monotonic(), ""
        try:
            verdict = "read" if read() else "wrong"
        except UserError as error:
            said = str(error)
            verdict = "refused" if "\n" not in said else "trace"
        except OSError as error:
            said = surroundings(error) or f"{type(error).__name__}: {error}"
            verdict = "refused" if surroundings(error) else "trace"
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            said, verdict = f"{type(error).__name__}: {error}", "trace"
        seconds = time.monotonic() - began
    kind, _, damage = kind.partition(": ")
    return Outcome(number, kind, damage, "slow" if seconds > LIMIT_S else verdict, seconds, said.replace(place, ""))


def main() -> int:
    """Prints a line for each that is neither refused nor read, then the figures; exit code 1 where there is one."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    outcomes = [attempt(number) for number in range(count)]
    bad = [one for one in outcomes if one.verdict not in ("refused", "read")]
    for one in bad:
        print(f"{one.verdict}: {one.number} {one.kind}: {one.damage}: {one.said}"[:300])
    verdicts = collections.Counter(one.verdict for one in outcomes)
    print(
        f"{count} damaged inputs: {dict(sorted(verdicts.items()))}, slowest {max(one.seconds for one in outcomes):.1f} s"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
