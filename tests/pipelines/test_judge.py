"""A judge behind an address: what it is sent, how its replies are read, and failures in one line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from pipelines.scores.grades import GradesError, read_grades
from pipelines.scores.judge import grade_of, judged
from pipelines.settings import parse_settings
from stages.grades import grades

PARAMS = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())

LINE = {"example_id": "mmvet:1", "question": "Why?", "answer": "a <AND> b", "prediction": "a", "grade": None}
CHOICE = LINE | {"options": {"A": "red", "B": "blue"}, "answer": "A", "prediction": "crimson"}


class Judge(HTTPServer):
    """Answers with ``replies`` in turn: a text is a reply, a number a status, anything else the whole body."""

    def __init__(self, replies: list[Any]) -> None:
        self.replies, self.asked = list(replies), []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Answer(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        reply = self.server.replies.pop(0)
        if isinstance(reply, str):
            reply = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
        self.send_response(reply if isinstance(reply, int) else 200)
        self.end_headers()
        if not isinstance(reply, int):
            self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *words: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def judge(request, monkeypatch) -> Iterator[Judge]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Judge(request.param) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("judge", [["0.5", "It is right: 1", "no idea"]], indirect=True)
def test_grades_are_filled_in_and_a_reply_without_one_leaves_null(judge):
    lines = list(judged([LINE, CHOICE, LINE], judge.address, "m", "k"))
    assert lines == [LINE | {"grade": 0.5}, CHOICE | {"grade": 1.0}, LINE]
    paths, keys, bodies = zip(*judge.asked, strict=True)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer k"}
    assert {(body["model"], body["temperature"]) for body in bodies} == {("m", 0)}
    assert bodies[1]["messages"][1]["content"] == (
        "Question: Why?\nA. red\nB. blue\nAccepted answer: A\nAnswer to grade: crimson"
    )


@pytest.mark.parametrize("judge", [["1", 401]], indirect=True)
def test_what_came_before_a_refusal_is_kept(judge):
    answers = judged([LINE, LINE], judge.address, "m")
    assert next(answers)["grade"] == 1
    with pytest.raises(GradesError) as caught:
        next(answers)
    assert str(caught.value) == f"{judge.address}: the judge refuses: HTTP 401 Unauthorized"
    assert judge.asked[0][1] is None, "no key, no header"


@pytest.mark.parametrize("judge", [[{"choices": []}]], indirect=True)
def test_another_protocol_is_one_line(judge):
    with pytest.raises(GradesError) as caught:
        list(judged([LINE], judge.address, "m"))
    assert str(caught.value) == f"{judge.address}: no answer of OpenAI's chat protocol; does the address end in /v1?"


def test_an_address_that_is_none_and_one_where_nobody_is_are_one_line(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(GradesError) as caught:
        list(judged([LINE], "gpt-4", "m"))
    assert str(caught.value) == (
        "'gpt-4' is no address of a judge; it begins with http:// or https:// and ends before /chat"
    )
    with Judge([]) as server:
        address = server.address
    with pytest.raises(GradesError, match=rf"^{address}: the judge cannot be asked \(.*refused.*\)$"):
        list(judged([LINE], address, "m"))


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("1", 1), ("0", 0), ("0.75.", 0.75), ("Grade: .5", 0.5), ("1.0", 1), ("10", None), ("2.0", None), ("", None)],
)
def test_the_first_number_from_0_to_1_is_the_grade(reply, grade):
    assert grade_of(reply) == grade


@pytest.mark.parametrize("judge", [["0.25", 500]], indirect=True)
def test_the_stage_keeps_what_was_graded_before_a_failure(judge, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    name = "mmvet/test:judged"
    params = PARAMS | {
        "model": PARAMS["model"] | {"prompt_style": "llava_v1"},
        "prepare": PARAMS["prepare"] | {"tables": {name: "tables"}},
        "sweep": PARAMS["sweep"] | {"benchmarks": [name], "images": None},
    }
    settings = parse_settings(yaml.safe_dump(params), "params.yaml")
    Path("data").mkdir()
    truth = json.dumps({"question": "Why?", "answer": "so"})
    examples = {
        "example_id": ["mmvet:1", "mmvet:2"],
        "benchmark": name,
        "question": "Why?",
        "truth": truth,
        "image": "i",
    }
    pd.DataFrame(examples).to_parquet("data/examples.parquet")
    pd.DataFrame({"example_id": ["mmvet:1", "mmvet:2"], "prediction": "thus"}).to_parquet("data/predictions.parquet")

    with pytest.raises(GradesError, match="HTTP 500"):
        grades(settings, [judge.address, "m"])
    assert capsys.readouterr().out == "data/to_grade.jsonl: 1 answers to grade, 1 graded already\n"
    assert read_grades(Path("data/to_grade.jsonl")) == {("mmvet:1", "thus"): 0.25}
    assert judge.asked[0][1] == "Bearer k"

    grades(settings)  # nobody is asked, and what is there stays
    assert len(judge.asked) == 2
    judge.replies.append("1")
    grades(settings, [judge.address, "m"])
    assert len(judge.asked) == 3
    assert read_grades(Path("data/to_grade.jsonl")) == {("mmvet:1", "thus"): 0.25, ("mmvet:2", "thus"): 1}
    with pytest.raises(GradesError) as caught:
        grades(settings, [judge.address])
    assert str(caught.value) == f"a judge is an address and a model's name, found {judge.address!r}"
