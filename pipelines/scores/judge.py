"""Grades by a model behind an address that speaks OpenAI's chat protocol. Nothing is asked unless someone names one.

The words are this project's, so grades are not those of a benchmark's own judge; say with a figure which model graded it.
"""

from __future__ import annotations

import http.client
import json
import re
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.error import HTTPError, URLError

from nuwa.errors import in_one_line
from pipelines.scores.grades import GradesError

INSTRUCTION = (
    "You grade an answer to a question about a picture that you do not see. The accepted answer is right. <AND> in it "
    "joins parts that all have to be there, <OR> joins parts of which one is enough. Where options are listed, the "
    "answer is right if it means the accepted letter's option. Reply with one number: 1 for a right answer, 0 for a wrong "
    "one, a number between for a part of it."
)
NUMBER = re.compile(r"(?<![\d.])(?:0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\d.]*\d)")
SECONDS = 120  # that an answer may take


def judged(
    lines: Iterable[Mapping[str, Any]], address: str, model: str, key: str | None = None
) -> Iterator[dict[str, Any]]:
    """``lines`` of :func:`pipelines.scores.grades.ungraded`, each with its grade; null where the reply holds none.

    Args:
        address: up to ``/v1``, as OpenAI's clients take it; ``http`` or ``https``.
        model: the name that the server knows it by.
        key: sent as a bearer token where there is one.

    Raises:
        GradesError: the address is none, cannot be reached, refuses, or answers otherwise than the protocol says.
    """
    if not re.match(r"https?://[^/]", address):
        raise GradesError(
            f"{address!r} is no address of a judge; it begins with http:// or https:// and ends before /chat"
        )
    for line in lines:
        yield dict(line) | {"grade": grade_of(_reply(_question(line), address, model, key))}


def grade_of(reply: str) -> float | None:
    """The first number from 0 to 1 in ``reply`` that stands for itself."""
    found = NUMBER.search(reply)
    return float(found[0]) if found else None


def _question(line: Mapping[str, Any]) -> str:
    options = "".join(f"\n{letter}. {option}" for letter, option in (line.get("options") or {}).items())
    return f"Question: {line['question']}{options}\nAccepted answer: {line['answer']}\nAnswer to grade: {line['prediction']}"


def _reply(question: str, address: str, model: str, key: str | None) -> str:
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": question}]
    request = urllib.request.Request(
        f"{address.rstrip('/')}/chat/completions",
        json.dumps({"model": model, "temperature": 0, "messages": messages}).encode(),
        {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])
    except HTTPError as error:
        raise GradesError(f"{address}: the judge refuses: HTTP {error.code} {error.reason}") from None
    except (URLError, OSError, http.client.HTTPException) as error:
        raise GradesError(f"{address}: the judge cannot be asked ({in_one_line(error)})") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise GradesError(f"{address}: no answer of OpenAI's chat protocol; does the address end in /v1?") from None
