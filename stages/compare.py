"""Which answers differ between two trials or two runs, by how much scores do, and the worst questions.

A and B: a folder of tables (a project, or its data/), a revision of git whose tables DVC has, both for runs; or the id or
label of a trial in data/ here, both for trials. TABLE.csv: where the rows of all trials go, besides what is printed.

    make compare A=main B=.
    make compare A=/backup/project B=. OUT=changes.csv
    make compare A="nuwa · 16 · pesp" B="visionzip · 16 · perc"

Lost: right in A, wrong in B. Of two runs the trials with the same id are compared, wherever and in whatever dtype they ran;
what differs in that is said first. Differences are B's headline scores less A's, with 95 % intervals over images; p is of
one comparison, not corrected for how many are looked at. The worst questions are those that most trials lost; among equals
those whose box lost most overlap, then the first id.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nuwa.errors import UserError
from pipelines.files.atomic import atomic_path
from pipelines.scores.changes import Changes, Side, changes
from pipelines.settings import SettingsError
from stages.entry import BAD_INPUT, DATA

USAGE = "make compare A=... B=... [OUT=TABLE.csv], each a folder with tables, a revision of git or a trial of data/"
TABLES = ("trials", "examples", "predictions")
FACTS = "sweep.json"
WORST, MOST, LONGEST = 8, 12, 60  # questions, trials, characters of an answer that are printed


@dataclass(frozen=True)
class Run:
    """The tables of a run. ``trials``: labels by id; ``facts``: what its answers came from."""

    trials: dict[str, str]
    side: Side
    facts: dict[str, str]


def compare(a: str, b: str) -> tuple[Changes, list[str]]:
    """What changed from ``a`` to ``b``, and lines on what was compared."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [_tables(word, Path(scratch) / name) for word, name in ((a, "a"), (b, "b"))]
        if folders == [None, None]:
            run = _read("data", DATA)
            ids = [_trial(name, word, run) for name, word in (("A", a), ("B", b))]
            pairs = [(f"{run.trials[ids[1]]}", ids[0], ids[1])]
            return changes(run.side, run.side, pairs), [f"A: {run.trials[ids[0]]}", f"B: {run.trials[ids[1]]}"]
        for name, word, folder in (("A", a, folders[0]), ("B", b, folders[1])):
            if folder is None:
                raise SettingsError(f"{name} = {word!r} is no folder with tables and no revision of git; {USAGE}")
        first, second = (_read(word, folder) for word, folder in zip((a, b), folders, strict=True) if folder)

    pairs = [(label, trial, trial) for trial, label in first.trials.items() if trial in second.trials]
    lines = [f"A: {a}, {len(first.trials)} trials; B: {b}, {len(second.trials)} trials; both have {len(pairs)}"]
    for name in sorted(first.facts | second.facts):
        ours, theirs = first.facts.get(name, "unknown"), second.facts.get(name, "unknown")
        if ours != theirs:
            lines.append(f"{name}: {ours} in A, {theirs} in B")
    return changes(first.side, second.side, pairs), lines


def _tables(word: str, scratch: Path) -> Path | None:
    """The folder of a run's tables; those of a revision are brought into ``scratch``. Null where ``word`` is neither."""
    if Path(word).is_dir():
        places = [folder for folder in (Path(word), Path(word) / DATA) if (folder / "predictions.parquet").is_file()]
        if not places:
            raise SettingsError(f"{word}: no predictions.parquet in it or in its data/; run `dvc repro sweep` there")
        return places[0]
    known = ["git", "rev-parse", "--verify", "--quiet", f"{word}^{{commit}}"]
    if subprocess.run(known, capture_output=True).returncode:
        return None
    _bring(word, scratch)
    return scratch


def _bring(revision: str, scratch: Path) -> None:
    """The tables of a revision, from DVC's cache or its remote."""
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException

    scratch.mkdir()
    try:
        files = DVCFileSystem(url=".", rev=revision)
        for name in (*(f"{table}.parquet" for table in TABLES), FACTS):
            files.get_file(f"{DATA}/{name}", str(scratch / name))
    except (DvcException, OSError) as error:
        raise SettingsError(
            f"{revision}: DVC does not have that revision's tables ({error}); `dvc pull --rev {revision}` or `git checkout "
            f"{revision} && dvc repro sweep` brings them"
        ) from None


def _read(name: str, folder: Path) -> Run:
    missing = [table for table in TABLES if not (folder / f"{table}.parquet").is_file()]
    if missing:
        raise SettingsError(f"{folder}: {missing[0]}.parquet is missing; run `dvc repro sweep` there")
    try:
        trials, examples = (pd.read_parquet(folder / f"{table}.parquet") for table in TABLES[:2])
        columns = ["trial_id", "example_id", "prediction"]
        answers = pq.read_table(folder / "predictions.parquet", columns=columns).to_pandas()
    except (pa.ArrowInvalid, KeyError) as error:
        raise SettingsError(f"{folder}: its tables cannot be read ({error}); run `dvc repro sweep` there") from None
    facts = json.loads((folder / FACTS).read_text()) if (folder / FACTS).is_file() else {}
    told = {key: str(value)[:12] for key, value in facts.get("fingerprints", {}).items()}
    told["answers"] = "; ".join(facts.get("provenance", [])) or "unknown"

    texts = answers.pivot(index="example_id", columns="trial_id", values="prediction")
    return Run(dict(zip(trials["trial_id"], trials["label"], strict=True)), Side(name, examples, texts), told)


def _trial(name: str, word: str, run: Run) -> str:
    """The id of a trial, by its id or label."""
    found = [trial for trial, label in run.trials.items() if word in (trial, label)]
    if len(found) == 1:
        return found[0]
    some = ", ".join(repr(label) for label in list(run.trials.values())[:3])
    what = "are several trials" if found else "is no trial of data/, no folder and no revision of git"
    raise SettingsError(f"{name} = {word!r} {what}; trials are {some} and others of data/trials.parquet; {USAGE}")


def report(found: Changes) -> list[str]:
    """What is printed, line by line."""
    table = found.table
    lines = [f"{found.questions:,} questions compared" + (
        f"; {found.left_out:,} left out, whose words, truth or image differ" if found.left_out else ""
    )]  # fmt: skip
    by_benchmark = table.groupby("benchmark", sort=True)[["n", "changed", "lost", "gained"]].sum()
    lines += ["", f"{'benchmark':<24}{'answers':>10}{'changed':>10}{'lost':>8}{'gained':>8}"]
    for name, row in by_benchmark.iterrows():
        lines.append(f"{name!s:<24}{row['n']:>10,}{row['changed']:>10,}{row['lost']:>8,}{row['gained']:>8,}")

    moved = table[table["changed"] > 0].copy()
    moved["far"] = moved["difference"].abs()
    moved = moved.sort_values(["p", "far", "trial", "benchmark"], ascending=[True, False, True, True], kind="stable")
    if len(moved):
        lines += ["", f"{'surest differences, B less A':<60}{'A':>8}{'B':>8}{'difference':>12}  95 % interval       p"]
    for row in moved.head(MOST).itertuples():
        lines.append(
            f"{_short(f'{row.trial} · {row.benchmark}', 59):<60}{row.score_a:>8.3f}{row.score_b:>8.3f}"
            f"{row.difference:>+12.3f}  {row.low:+.3f} to {row.high:+.3f}  {row.p:.3f}"
        )
    if found.lost:
        lines += ["", f"worst questions, of {len(found.lost):,} that were lost"]
    for one in found.lost[:WORST]:
        where = f"in {one.trials} trials, first {one.first}" if one.trials > 1 else f"in {one.first}"
        lines.append(f"{one.example_id}: {_short(one.question)} ({_short(one.truth)})")
        lines.append(f"  A said {_short(one.answer_a)!r}, B {_short(one.answer_b)!r} {where}")
    return lines


def _short(text: str, most: int = LONGEST) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def main(arguments: list[str]) -> None:
    if len(arguments) not in (2, 3) or not all(arguments[:2]):
        raise SettingsError(f"A and B say what is compared: {USAGE}")
    found, about = compare(*arguments[:2])
    print("\n".join([*about, *report(found)]))
    if len(arguments) == 3 and arguments[2]:
        target = Path(arguments[2])
        with atomic_path(target) as path:
            found.table.to_csv(path, index=False)
        print(f"\n{target}: {len(found.table):,} rows, a trial and benchmark each")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(BAD_INPUT)
