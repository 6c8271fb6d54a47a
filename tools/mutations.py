"""Try single mistakes on the sources, and say which of them no test notices.

    python tools/mutations.py                      # those whose outcome is not known yet
    python tools/mutations.py --only 'sort-*' --only 'routing-*' --again
    python tools/mutations.py --list

The mistakes are in tools/mutations/*.txt (see mutation_table.py). Each is made in a copy of this
tree, never here; what it changes of the compiled part is compiled again, and the tests that ought
to notice are run, those of csrc/cuda on the emulated device (tests/emulator). Outcomes are appended
to the result file at once, so that an interrupted run goes on where it was. Exit status 1: a
mistake that was tried went unnoticed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mutation_table import FOLDER, ROOT, Mutation, problem, read_table
from source_tree import mirror

RESULTS = FOLDER / "results.jsonl"
NOTICED, UNNOTICED, NOT_BUILT = "noticed", "UNNOTICED", "does not compile"


@dataclass
class Outcome:
    """A line of the result file."""

    name: str
    outcome: str
    by: str  # the first test that failed, or how the run ended
    seconds: float
    commit: str
    key: str


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """The latest outcome of each mistake."""
    lines = path.read_text().splitlines() if path.exists() else []
    outcomes = [Outcome(**json.loads(line)) for line in lines]
    return {outcome.name: outcome for outcome in outcomes}


def first_failure(output: str, status: int) -> str:
    """What pytest's last lines name first."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return found.group(1) if found else f"exit status {status}"


class Copy:
    """A copy of the tree, in which mistakes are made one after the other."""

    def __init__(self, source: Path, tree: Path, limit: float) -> None:
        self.tree, self.limit = tree, limit
        self.pristine = tree.with_name(tree.name + ".built")
        mirror(source, tree)
        for library in (source / "embed_ext").glob("_C*.so"):
            if not list((tree / "embed_ext").glob("_C*.so")):
                shutil.copy2(library, tree / "embed_ext")
        # A module that changes twice within a second may pass for the one that was compiled.
        self.environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "EMBED_EXT_CUDA": "0"}
        self.environment.pop("PYTHONPATH", None)
        for cache in list(tree.rglob("__pycache__")):
            shutil.rmtree(cache)

    def run(self, *arguments: str, limit: float | None = None) -> tuple[int, str]:
        """A Python command in the copy: its exit status, None of a time limit, and its output."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.tree,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            return -signal.SIGKILL, output
        return process.returncode, output

    def build(self, emulated: bool) -> tuple[int, str]:
        if emulated:
            return self.run("tests/emulator/build.py")
        return self.run("setup.py", "build_ext", "--inplace")

    def build_and_remember(self, mutations: Sequence[Mutation]) -> None:
        """Everything that the next mistakes do not change is compiled once."""
        for emulated in sorted({m.is_emulated for m in mutations if m.is_compiled}):
            status, output = self.build(emulated)
            if status != 0:
                raise SystemExit(f"the tree does not build as it is:\n{output[-3000:]}")
        shutil.rmtree(self.pristine, ignore_errors=True)
        shutil.copytree(self.tree / "build", self.pristine / "build")
        for library in (self.tree / "embed_ext").glob("_C*.so"):
            shutil.copy2(library, self.pristine)

    def _restore_build(self) -> None:
        # Objects and what ninja knows of them, with their times: nothing is compiled twice.
        shutil.rmtree(self.tree / "build")
        shutil.copytree(self.pristine / "build", self.tree / "build")
        for library in self.pristine.glob("_C*.so"):
            shutil.copy2(library, self.tree / "embed_ext")

    def test(
        self,
        tests: Sequence[str],
        emulated: bool,
        limit: float | None = None,
        traceback: str = "no",
    ) -> tuple[int, str]:
        options = ["-x", "-q", "--no-header", f"--tb={traceback}", "-p", "no:cacheprovider"]
        runner = ["tests/emulator/run.py"] if emulated else ["-m", "pytest"]
        return self.run(*runner, *options, *tests, limit=limit)

    def attempt(self, mutation: Mutation) -> tuple[str, str]:
        """Make the mistake, run its tests, undo it: the outcome, and by what."""
        path = self.tree / mutation.file
        text, times = path.read_text(), path.stat()
        path.write_text(mutation.applied_to(text))
        try:
            if mutation.is_compiled:
                status, output = self.build(mutation.is_emulated)
                if status != 0:
                    error = re.search(r"error: .*", output)
                    return NOT_BUILT, error.group() if error else output[-200:]
            status, output = self.test(mutation.tests, mutation.is_emulated, self.limit)
        finally:
            path.write_text(text)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if mutation.is_compiled:
                self._restore_build()
        if status == 0:
            return UNNOTICED, ""
        if status == -signal.SIGKILL:
            return NOTICED, f"no end within {self.limit:g} s"
        return NOTICED, first_failure(output, status)


def commit_of(root: Path) -> str:
    """The commit, and "+" if what is tested differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()

    sources = ("csrc", "embed_ext", "tests", "setup.py", "pyproject.toml")
    changed = git("status", "--porcelain", "--", *sources)
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def select(table: Sequence[Mutation], patterns: Sequence[str]) -> list[Mutation]:
    """The entries whose name matches one of the patterns; all if there are none."""
    return [m for m in table if not patterns or any(fnmatchcase(m.name, p) for p in patterns)]


def try_all(selected: Sequence[Mutation], arguments: argparse.Namespace) -> None:
    """Try each, and append its outcome to the result file."""
    from tqdm import tqdm  # of the benchmarks' packages: what reads the table goes without

    copy = Copy(ROOT, arguments.tree.resolve(), arguments.limit)
    if any(mutation.is_compiled for mutation in selected):
        print("building the copy ...", flush=True)
        copy.build_and_remember(selected)
    for emulated in () if arguments.unchecked else (False, True):
        entries = [mutation for mutation in selected if mutation.is_emulated == emulated]
        tests = sorted({test for mutation in entries for test in mutation.tests})
        if not tests:
            continue
        print(f"running {len(tests)} tests or files of tests without a mistake ...", flush=True)
        status, output = copy.test(tests, emulated, traceback="short")
        if status != 0:
            raise SystemExit(f"the tests fail without a mistake:\n{output[-3000:]}")
    commit = commit_of(ROOT)
    progress = tqdm(selected, unit="mistake", dynamic_ncols=True)
    for mutation in progress:
        progress.set_postfix_str(mutation.name)
        began = time.monotonic()
        outcome, by = copy.attempt(mutation)
        seconds = round(time.monotonic() - began, 1)
        line = Outcome(mutation.name, outcome, by, seconds, commit, mutation.key(ROOT))
        with arguments.results.open("a") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        if outcome != NOTICED:
            progress.write(f"{mutation.name}: {outcome} {by}")


def report(selected: Sequence[Mutation], outcomes: dict[str, Outcome]) -> int:
    """Print what is known of the selected ones; return how many went unnoticed."""
    known = [m for m in selected if m.name in outcomes and outcomes[m.name].key == m.key(ROOT)]
    bad = [m for m in known if outcomes[m.name].outcome != NOTICED]
    print(
        f"{len(selected)} mistakes: {len(known) - len(bad)} noticed, {len(bad)} not, "
        f"{len(selected) - len(known)} not tried on these sources"
    )
    for mutation in bad:
        print(f"  {outcomes[mutation.name].outcome}: {mutation.name} ({mutation.file})")
    return len(bad)


def main() -> int:
    parser = argparse.ArgumentParser(description="Which single mistakes does no test notice?")
    parser.add_argument("--only", action="append", default=[], help="a pattern of names; repeat it")
    parser.add_argument(
        "--list", action="store_true", help="what there is, and what is known of it"
    )
    parser.add_argument("--again", action="store_true", help="also those whose outcome is known")
    parser.add_argument("--unchecked", action="store_true", help="no run without a mistake first")
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds for the tests of one (300)"
    )
    parser.add_argument("--tree", type=Path, default=ROOT / "build" / "mutations")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    table = read_table()
    if problems := [found for mutation in table if (found := problem(mutation))]:
        raise SystemExit("\n".join(["the table has errors:", *problems]))
    selected = select(table, arguments.only)
    outcomes = read_outcomes(arguments.results)
    if arguments.list:
        for mutation in selected:
            last = outcomes.get(mutation.name)
            known = last.outcome if last and last.key == mutation.key(ROOT) else "?"
            print(f"{mutation.name:<36} {mutation.file:<42} {known}")
        return 0
    to_try = [
        m
        for m in selected
        if arguments.again or m.name not in outcomes or outcomes[m.name].key != m.key(ROOT)
    ]
    if to_try:
        try_all(to_try, arguments)
    return 1 if report(selected, read_outcomes(arguments.results)) else 0


if __name__ == "__main__":
    sys.exit(main())
