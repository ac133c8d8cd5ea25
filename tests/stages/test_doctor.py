"""What `make plan` finds before anything runs: one line each, exit code 2 where one is an error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from nuwa.benchmarks import get_benchmark
from nuwa.vlm import LlavaAdapter
from nuwa.vlm.weights import shape_numbers
from pipelines.settings import Settings, load_settings
from stages import doctor
from stages.doctor import examine, memory_for, room_for
from stages.entry import run_stage
from stages.plan import plan, weight_numbers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The project's own model and settings, in a folder where nothing has run."""
    shutil.copytree(ROOT / "models/testbed", tmp_path / "models/testbed")
    shutil.copytree(ROOT / "models/pruner", tmp_path / "models/pruner")
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEP", raising=False)
    return tmp_path


def changed(**sections: dict) -> Settings:
    raw = yaml.safe_load(Path("params.yaml").read_text())
    for name, values in sections.items():
        raw[name] |= values
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    return load_settings()


def lines(settings: Settings, **options) -> list[str]:
    return [str(finding) for finding in examine(settings, **options)]


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, 0, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def pope(folder: str, images: list[bytes], name: str = "test", **options) -> None:
    """A question about each of ``images``."""
    rows = [
        {
            **{"id": str(number), "question_id": str(number), "question": "a dog?", "answer": "yes"},
            "image": {"bytes": image, "path": None},
            "category": "random",
        }
        for number, image in enumerate(images)
    ]
    Path(folder).mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, get_benchmark("pope").schema)
    pq.write_table(table, Path(folder, f"{name}.parquet"), **options)


def with_tables(folder: str = "tables") -> Settings:
    return changed(prepare={"tables": {"pope/test": folder}}, sweep={"benchmarks": ["pope/test"], "images": None})


def test_the_project_itself_is_well(project):
    assert lines(load_settings()) == []
    assert lines(load_settings(), deep=True) == []


def edit(name: str, **values) -> None:
    path = Path("models/testbed", name)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def no_end() -> None:
    path = Path("models/testbed/config.json")
    held = json.loads(path.read_text())
    held["text_config"]["eos_token_id"] = None
    path.write_text(json.dumps(held | {"eos_token_id": None}))
    edit("generation_config.json", eos_token_id=None)


def other_tower() -> None:
    path = Path("models/testbed/config.json")
    held = json.loads(path.read_text())
    held["vision_config"]["model_type"] = "siglip_vision_model"
    path.write_text(json.dumps(held))


def without(name: str) -> None:
    path = Path("models/testbed/model.safetensors")
    held = load_file(path)
    del held[name]
    save_file(held, path, metadata={"format": "pt"})


FOLDERS = {
    "no chat template": (lambda: Path("models/testbed/chat_template.jinja").unlink(), "has no chat template; fetch"),
    "text-only template": (
        lambda: Path("models/testbed/chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}"),
        "puts no image placeholder",
    ),
    "strategy full": (lambda: edit("config.json", vision_feature_select_strategy="full"), "'full' with layer -2"),
    "several layers": (lambda: edit("config.json", vision_feature_layer=[-2, -3]), "[-2, -3]: only one layer"),
    "no end token": (no_end, "the model has no token that ends an answer; name it as eos_token_id"),
    "no preprocessor": (lambda: Path("models/testbed/processor_config.json").unlink(), "no preprocessor_config.json"),
    "damaged tokenizer": (lambda: Path("models/testbed/tokenizer.json").write_text("{"), "no valid JSON"),
    "another tower": (other_tower, "config.vision_config.model_type = 'siglip_vision_model'"),
    "beams": (lambda: edit("generation_config.json", num_beams=3), "generation_config.num_beams = 3 is not supported"),
    "a tensor missing": (lambda: without("lm_head.weight"), "of the model missing from its files"),
}


@pytest.mark.parametrize("kind", list(FOLDERS))
def test_kinds_of_model_folders_are_one_line_each(kind, project):
    damage, message = FOLDERS[kind]
    if kind == "a tensor missing" and "lm_head.weight" not in load_file("models/testbed/model.safetensors"):
        damage = lambda: without("language_model.model.norm.weight")  # noqa: E731 (heads are tied)
    damage()
    (line,) = lines(load_settings())
    assert line.startswith("error: model.path = 'models/testbed': ") and message in line and "\n" not in line


def test_the_plan_shows_all_findings_and_exits_with_2(project, capsys):
    edit("generation_config.json", num_beams=3)
    Path("models/testbed/chat_template.jinja").unlink()
    pope("tables", [b"no picture"])
    with_tables()
    with pytest.raises(SystemExit) as stopped:
        run_stage(plan, needs_model=False)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    errors = said.err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert "has no chat template" in said.err and "num_beams" in said.err and "row 0 of pope" in said.err


def test_tables_are_opened_at_both_ends_and_read_whole_when_asked(project):
    middle = [png(), png(1), b"no picture", png(3), png(4)]
    pope("tables", middle, row_group_size=2)
    settings = with_tables()
    assert lines(settings) == []
    (line,) = lines(settings, deep=True)
    assert line == (
        "error: prepare.tables.pope/test: tables/test.parquet: row 2 of pope: column 'image': its 10 image bytes cannot be "
        "opened (UnidentifiedImageError); mend or drop the row, or fetch the file again"
    )
    pope("tables", [png(), b"no picture"], row_group_size=1)
    (line,) = lines(settings)
    assert "tables/test.parquet: row 1 of pope: column 'image'" in line


def test_a_picture_that_is_cut_off_is_found(project):
    pope("tables", [png(), png(1)[:-30]])
    (line,) = lines(with_tables())
    assert (
        line.startswith("error: prepare.tables.pope/test: tables/test.parquet: row 1 of pope: ")
        and "cut" not in line[:40]
    )


def test_tables_that_are_not_here_yet_are_a_warning_and_others_an_error(project):
    settings = with_tables()
    assert lines(settings) == ["warning: prepare.tables.pope/test: tables: not here yet; put the published files there"]
    pope("tables", [png()], name="val")
    (line,) = lines(settings)
    assert line.startswith("error: prepare.tables.pope/test: tables/**: no test.parquet")
    pope("tables", [])
    assert lines(settings) == [
        "error: prepare.tables.pope/test: tables: no question of pope/test in it; fetch the table again"
    ]
    Path("tables/test.parquet").write_bytes(b"PAR1")
    (line,) = lines(settings)
    assert line.startswith("error: prepare.tables.pope/test: tables/test.parquet: no whole Parquet file (")


def test_a_checkpoint_that_is_to_come_is_a_warning(project):
    settings = changed(model={"path": "models/llava-hf/llava-1.5-7b-hf", "prompt_style": "llava_v1"})
    assert lines(settings) == [
        "warning: model.path = 'models/llava-hf/llava-1.5-7b-hf': not here yet; `hf download llava-hf/llava-1.5-7b-hf "
        "--local-dir models/llava-hf/llava-1.5-7b-hf`"
    ]


def test_a_text_tower_is_looked_at(project):
    assert lines(changed(model={"text_tower": "models/clip"})) == [
        "warning: model.text_tower = 'models/clip': not here yet; fetch the CLIP model that the encoder is of"
    ]
    (line,) = lines(changed(model={"text_tower": "models/testbed"}))
    assert line.startswith(
        "error: text_tower 'models/testbed': model_type 'llava' there; name a folder that holds a whole"
    )


def test_numbers_that_are_not_finite_are_found_when_all_is_read(project):
    path = Path("models/testbed/model.safetensors")
    held = load_file(path)
    name = sorted(held)[0]
    held[name].view(-1)[0] = float("nan")
    save_file(held, path, metadata={"format": "pt"})
    assert lines(load_settings()) == []
    (line,) = lines(load_settings(), deep=True)
    assert f"tensor {name} holds numbers that are not finite" in line


def test_instruction_data_weights_stores_and_tracking(project):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    Path("lessons.json").write_text('{"id": 1}')
    Path("file").write_text("x")
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["sweep"]["grids"].append(
        {"name": "w", "method": "learnpruner", "budget": 16, "parameters": {"weights": "lost.safetensors"}}
    )
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    found = lines(
        changed(
            pruner={"data": "lessons.json"},
            sweep={"store": "file/results"},
            tracking={"uri": f"http://127.0.0.1:{closed}"},
        )
    )
    assert found[0] == "error: pruner.data = 'lessons.json': no list of conversations in JSON; fetch it again"
    assert found[1].startswith("error: learnpruner.weights 'lost.safetensors': no such file")
    assert found[2].startswith("error: sweep.store = 'file/results': ") and "may not be written" in found[2]
    assert found[3] == (
        f"warning: tracking.uri: 127.0.0.1:{closed} does not answer (Connection refused); results are kept all the same, and "
        "`make track` shows them once it does"
    )
    assert len(found) == 4


def test_a_tracking_server_that_never_says_a_word(project, monkeypatch):
    monkeypatch.setattr(doctor, "REACH_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert lines(changed(tracking={"uri": f"http://127.0.0.1:{port}"})) == [
            f"warning: tracking.uri: 127.0.0.1:{port} does not answer (timed out); results are kept all the same, and `make "
            "track` shows them once it does"
        ]


def test_a_database_that_is_none(project):
    place, kept = (
        project / "mlflow.db",
        "results are kept all the same, and `make track` shows them once it can be used",
    )
    place.mkdir()
    assert lines(load_settings()) == [
        f"warning: tracking.uri: {place} is a folder and no database; move it away: {kept}"
    ]
    place.rmdir()
    place.write_bytes(b"no database")
    assert lines(load_settings()) == [f"warning: tracking.uri: {place} is no SQLite database; move it away: {kept}"]
    place.unlink()
    with contextlib.closing(sqlite3.connect(place)) as held:
        held.execute("CREATE TABLE held (value)")
    assert lines(load_settings()) == []


def test_links_that_lead_nowhere(project):
    Path("cache").symlink_to("/scratch/gone")
    Path("report").symlink_to("report")
    assert lines(load_settings()) == [
        "error: cache: a link to /scratch/gone, which is not there; make that folder, or take the link away",
        "error: report: a link to report, which is not there; make that folder, or take the link away",
    ]


def test_a_machine_without_git_is_a_warning(project, monkeypatch):
    monkeypatch.setenv("PATH", str(project))
    assert lines(load_settings()) == ["warning: git is not installed: runs are logged without a revision; install git"]


def test_a_cluster_that_is_gone_is_an_error(project, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    (line,) = lines(load_settings())
    assert line.startswith(f"error: {address}: no Ray cluster answers there (ConnectionRefusedError")


def test_folders_in_the_way_and_rights(project):
    Path("data").write_text("x")
    assert lines(load_settings()) == [
        f"error: {project}/data: a file stands where a folder should be; move it away",
    ]
    Path("data").unlink()
    Path("data").mkdir()
    os.chmod("data", 0o555)
    before = os.geteuid()
    if before == 0:
        for folder in (project, *project.parents):
            if folder.stat().st_uid == 0:
                folder.chmod(folder.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        found = lines(load_settings())
    finally:
        os.seteuid(before)
    line = f"error: {project}/data: may not be written; give yourself the rights (`ls -ld` shows them)"
    assert line in found


def test_disks_that_are_too_small(project):
    free = shutil.disk_usage(project).free
    assert list(room_for(load_settings(), 1000, 1000)) == [] or free < 1_000_000_000
    (finding,) = room_for(load_settings(), free, 10**9)
    assert finding.level == "warning" and "features and results of the whole grid need" in finding.line
    assert list(room_for(changed(features={"store": "s3://b/f"}, sweep={"store": "s3://b/r"}), free, free)) == []


GB = 10**9


@pytest.mark.parametrize(
    ("cluster", "numbers", "line"),
    [
        ({"gpus": 1}, 7 * GB, None),
        ({"gpus": 2}, 36 * GB, None),
        ({"gpus": 0, "workers": 2}, 7 * GB, None),
        (
            {"gpus": 1},
            72 * GB,
            "its weights take 144.0 GB in bfloat16, and a worker has 80.0 GB (cluster.gpus = 1); set cluster.gpus: 3, over "
            "which its layers are spread, or take a smaller model",
        ),
        ({"gpus": 0.25}, 13 * GB, "its weights take 26.0 GB in bfloat16, and a worker has 20.0 GB (cluster.gpus = 0.25); set "
         "cluster.gpus: 1, over which its layers are spread, or take a smaller model"),
        (
            {"gpus": 0, "workers": 3},
            13 * GB,
            "its weights take 26.0 GB in bfloat16, 78.0 GB for cluster.workers = 3, and this machine has 64.0 GB; take fewer "
            "workers or a smaller model",
        ),
        ({"gpus": 1, "address": "head:6379"}, 72 * GB, None),
    ],
)  # fmt: skip
def test_a_model_that_no_worker_here_can_hold(project, cluster, numbers, line):
    settings = changed(model={"dtype": "bfloat16"}, cluster=cluster)
    found = list(memory_for(settings, numbers, gpu=80 * GB, machine=64 * GB))
    assert [finding.line for finding in found] == ([] if line is None else [f"model.path = 'models/testbed': {line}"])
    assert not list(memory_for(settings, 1, gpu=None, machine=64 * GB))


def test_weights_are_counted_by_their_files_and_by_their_shape_alike(project):
    vlm = LlavaAdapter.load("models/testbed")
    count = sum(parameter.numel() for parameter in vlm.model.parameters())
    assert weight_numbers("models/testbed") == count == shape_numbers(type(vlm.model), vlm.model.config)
