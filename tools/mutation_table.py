"""The table of single mistakes in tools/mutations/*.txt, that tools/mutations.py tries.

An entry is its name and file, why it is there if that is not plain, the lines that are replaced and
those in their place, and the tests that ought to notice:

    [sort-unstable] csrc/cpu/sort_by_row.h
    # Tokens of a row are summed in the order of the batch.
    -tokens[j - 1].row > token.row
    +tokens[j - 1].row >= token.row
    @ tests/ops/test_token_order.py::test_order_decides_the_sum_of_few_tokens

What is replaced need not be whole lines, and occurs exactly once in its file.
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tools" / "mutations"


@dataclass
class Mutation:
    """One mistake."""

    name: str
    file: str
    why: str = ""
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)

    @property
    def is_compiled(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def is_emulated(self) -> bool:
        """Whether it is built for, and its tests run on, the device of tests/emulator."""
        return self.file.startswith("csrc/cuda/")

    def applied_to(self, text: str) -> str:
        """The file's text with the mistake in it."""
        count = text.count("\n".join(self.old))
        if count != 1:
            raise ValueError(
                f"[{self.name}] {count} times in {self.file}, expected once: {self.old}"
            )
        return text.replace("\n".join(self.old), "\n".join(self.new))

    def key(self, root: Path) -> str:
        """Of the texts that an outcome depends on most: of another key it is worth nothing."""
        texts = [*self.old, "", *self.new, *self.tests, (root / self.file).read_text()]
        texts += [source_of(test, root) or "" for test in self.tests]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def source_of(test: str, root: Path) -> str | None:
    """The text of a test, or of a file of tests; None if there is none of that name."""
    file, _, name = test.partition("::")
    if not (root / file).is_file():
        return None
    text = (root / file).read_text()
    if not name:
        return text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    return None


def parse(text: str) -> list[Mutation]:
    """Read one file of the table."""
    mutations: list[Mutation] = []
    for number, line in enumerate(text.splitlines(), 1):
        if found := re.fullmatch(r"\[([\w-]+)\] (\S+)", line):
            mutations.append(Mutation(found.group(1), found.group(2)))
        elif line == "" or (line.startswith("#") and not mutations):
            continue
        elif not mutations:
            raise ValueError(f"line {number}: expected [name] file, but got {line!r}")
        elif line.startswith("#"):
            mutations[-1].why = f"{mutations[-1].why} {line[1:].strip()}".strip()
        elif line.startswith("-"):
            mutations[-1].old.append(line[1:])
        elif line.startswith("+"):
            mutations[-1].new.append(line[1:])
        elif line.startswith("@ "):
            mutations[-1].tests += line[2:].split()
        else:
            raise ValueError(f"line {number}: expected #, -, + or @, but got {line!r}")
    return mutations


def read_table(folder: Path = FOLDER) -> list[Mutation]:
    """All entries, in the order of the files and in them."""
    return [entry for path in sorted(folder.glob("*.txt")) for entry in parse(path.read_text())]


def problem(mutation: Mutation, root: Path = ROOT) -> str | None:
    """What is wrong with an entry of the table, or None."""
    if not mutation.old or not mutation.tests or mutation.old == mutation.new:
        return f"[{mutation.name}] needs something to replace, something else for it, and tests"
    try:
        mutation.applied_to((root / mutation.file).read_text())
    except (OSError, ValueError) as error:
        return str(error)
    missing = [test for test in mutation.tests if source_of(test, root) is None]
    return f"[{mutation.name}] there is no {missing[0]}" if missing else None
