"""tools/mutations.py: its table fits the sources, and it tells what is noticed from what is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import mutations  # noqa: E402
from mutation_table import FOLDER, Mutation, parse, problem, read_table  # noqa: E402

TABLE = read_table()


def test_every_entry_fits_its_file_and_its_tests_exist() -> None:
    assert [found for mutation in TABLE if (found := problem(mutation))] == []


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    assert len(TABLE) >= 60
    assert len({mutation.name for mutation in TABLE}) == len(TABLE)
    for folder in ("csrc/cpu/", "csrc/cuda/", "csrc/autograd/", "embed_ext/"):
        assert sum(mutation.file.startswith(folder) for mutation in TABLE) >= 15


def test_the_committed_outcomes_are_of_entries_that_there_are() -> None:
    assert set(mutations.read_outcomes(mutations.RESULTS)) <= {m.name for m in TABLE}


ENTRY = """\
# Of a file.

[one] package/code.py
# Why,
# in two lines.
-    return a + b
-
+    return a - b
+
@ tests/test_code.py::test_sum tests/test_code.py
"""


def test_an_entry_is_read() -> None:
    (entry,) = parse(ENTRY)
    assert entry == Mutation(
        "one",
        "package/code.py",
        "Why, in two lines.",
        ["    return a + b", ""],
        ["    return a - b", ""],
        ["tests/test_code.py::test_sum", "tests/test_code.py"],
    )
    assert entry.applied_to("    return a + b\n\n") == "    return a - b\n\n"


@pytest.mark.parametrize("text", ["-old", "[one] a.py\nold", "[two words] a.py"])
def test_what_is_no_entry_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="line"):
        parse(text)


@pytest.mark.parametrize(
    ("replaced", "by", "found"),
    [
        ("return a + b", "return a * b", "0 times"),
        ("-    return a + b\n-\n", "-a\n", "3 times"),
        ("::test_sum", "::test_other", "no tests/test_code.py::test_other"),
        ("tests/test_code.py::test_sum", "tests/test_none.py", "no tests/test_none.py"),
        ("@ tests", "# tests", "needs"),
    ],
)
def test_an_entry_that_does_not_fit_is_found(
    tmp_path: Path, replaced: str, by: str, found: str
) -> None:
    make_project(tmp_path)
    (entry,) = parse(ENTRY)
    assert problem(entry, tmp_path) is None
    (entry,) = parse(ENTRY.replace(replaced, by))
    assert found in problem(entry, tmp_path)


def make_project(root: Path) -> None:
    for folder in ("package", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "package" / "code.py").write_text("def add(a, b):\n    return a + b\n\n")
    (root / "tests" / "test_code.py").write_text(
        "import sys\nsys.path.insert(0, '.')\nfrom package.code import add\n\n\n"
        "def test_sum():\n    assert add(2, 0) == 2\n\n\n"
        "def test_all():\n    assert add(2, 1) == 3\n"
    )


def test_a_mistake_is_made_in_a_copy_tried_and_undone(tmp_path: Path) -> None:
    source, tree = tmp_path / "source", tmp_path / "copy"
    make_project(source)
    before = (source / "package" / "code.py").read_text()
    copy = mutations.Copy(source, tree, limit=60)
    (entry,) = parse(ENTRY)
    assert copy.attempt(entry) == (mutations.NOTICED, "tests/test_code.py::test_all")
    entry.tests = ["tests/test_code.py::test_sum"]
    assert copy.attempt(entry) == (mutations.UNNOTICED, "")
    entry.new = ["    while True:", "        pass"]
    copy.limit = 3
    assert copy.attempt(entry) == (mutations.NOTICED, "no end within 3 s")
    for root in (source, tree):
        assert (root / "package" / "code.py").read_text() == before


def test_an_outcome_is_worth_nothing_once_the_texts_have_changed(tmp_path: Path) -> None:
    make_project(tmp_path)
    (entry,) = parse(ENTRY)
    keys = {entry.key(tmp_path)}
    for file in ("package/code.py", "tests/test_code.py"):
        with (tmp_path / file).open("a") as text:
            text.write("# more\n")
        keys.add(entry.key(tmp_path))
    entry.new = ["    return b"]
    assert len(keys | {entry.key(tmp_path)}) == 4


def test_the_latest_outcome_counts(tmp_path: Path) -> None:
    lines = [
        {"name": "one", "outcome": outcome, "by": "", "seconds": 1.0, "commit": "c", "key": "k"}
        for outcome in (mutations.UNNOTICED, mutations.NOTICED)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mutations.read_outcomes(path)["one"].outcome == mutations.NOTICED
    assert mutations.read_outcomes(tmp_path / "none") == {}


def test_the_list() -> None:
    command = [sys.executable, str(ROOT / "tools" / "mutations.py"), "--list", "--only", "sort-*"]
    listed = subprocess.check_output(command, text=True).splitlines()
    assert [line.split()[0] for line in listed] == [
        mutation.name for mutation in TABLE if mutation.name.startswith("sort-")
    ]
    assert FOLDER.is_dir()
