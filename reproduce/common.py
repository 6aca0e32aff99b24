"""What the files of this folder share: heads, commands, runs that are taken over, and the blocks of pages.

A file that makes tables has in its docstring, for each of them, a head of five words:

    Table:   which table or figure of the paper, and where it stands: a page and its block, or a whole file
    Command: what makes it
    Time:    how long that takes, on two cores
    Needs:   data, models and extras, beside the bundled ones
    Result:  what came out, in the numbers of the page

and gives `main` an `Entry` for each command. No number in README.md or docs/ is typed by hand: what an entry
makes is put into the blocks that its head names, between `<!-- NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[1]
# Relative to ROOT, where all commands run.
RESULTS = Path("runs/results")
SHARED = Path("../shared")  # real data sets and small pre-trained models
MODELS, DATA = SHARED / "models", SHARED / "data"
DOLLY = DATA / "dolly15k/databricks-dolly-15k.jsonl"

WORDS = ("Table", "Command", "Time", "Needs", "Result")
PLACE = re.compile(r"\b(README\.md|docs/[\w-]+\.\w+), (?:block ([\w-]+)|whole file)")


@dataclass(frozen=True)
class Head:
    """The five words about a table."""

    table: str
    command: str
    time: str
    needs: str
    result: str

    @property
    def name(self) -> str:
        """The entry's name, the last word of its command."""
        return self.command.split()[-1]

    @property
    def places(self) -> list[tuple[str, str]]:
        """Page and block of each place where it stands; the block is empty for a whole file."""
        return PLACE.findall(self.table)

    def __str__(self) -> str:
        return "\n".join(f"{word + ':':<9}{getattr(self, word.lower())}" for word in WORDS)


def heads(text: str) -> dict[str, Head]:
    """The heads of a file's docstring by entry. Raises ValueError for one that lacks a word."""
    found: dict[str, Head] = {}
    for part in re.split(r"(?m)^(?=Table:)", text)[1:]:
        lines: list[str] = []
        for line in part.split("\n\n")[0].splitlines():
            if line.startswith(" ") and lines:
                lines[-1] += f" {line.strip()}"
            else:
                lines.append(line)
        words = [line.partition(":") for line in lines]
        if tuple(word for word, _, _ in words) != WORDS or not all(said.strip() for _, _, said in words):
            raise ValueError(f"a head has the words {', '.join(WORDS)}, one after another; got:\n{part}")
        head = Head(*(said.strip() for _, _, said in words))
        if head.name in found:
            raise ValueError(f"two heads have the command {head.command}")
        found[head.name] = head
    return found


def finished(made: Path) -> bool:
    """Whether a file is there; the summary of a run that was stopped does not count."""
    if not made.exists():
        return False
    return made.name != "summary.json" or json.loads(made.read_text(encoding="utf-8"))["status"] == "done"


@dataclass(frozen=True)
class Step:
    """A command. It is not run again once `made` is there."""

    command: tuple[str, ...]
    made: Path | None = None
    kept: bool = False  # what it prints is what it makes

    def __str__(self) -> str:
        return shlex.join(self.command) + (f" > {self.made}" if self.kept else "")

    def do(self) -> None:
        """Runs the command."""
        if self.made is not None and finished(self.made):
            return
        print(self, file=sys.stderr, flush=True)
        if not self.kept:
            call(self.command)
        elif self.made is not None:
            self.made.parent.mkdir(parents=True, exist_ok=True)
            new = self.made.with_name(f"{self.made.name}.new")
            new.write_text(call(self.command), encoding="utf-8")
            new.replace(self.made)


@dataclass(frozen=True)
class Prepared:
    """What a function of ours writes before the commands that read it."""

    what: str
    made: Path
    make: Callable[[Path], None]

    def __str__(self) -> str:
        return f"# {self.what}: {self.made}"

    def do(self) -> None:
        """Makes it unless it is there."""
        if not self.made.exists():
            print(self, file=sys.stderr, flush=True)
            self.made.parent.mkdir(parents=True, exist_ok=True)
            self.make(self.made)


class Work(Protocol):
    """What an entry's table is made of, shown as the commands that make it. Hashable: none is done twice."""

    def do(self) -> None:
        """Makes what is not there."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Printed:
    """A table that a command prints."""

    command: tuple[str, ...]
    columns: int = 80
    fenced: bool = True

    def __str__(self) -> str:
        return shlex.join(self.command)

    def __call__(self) -> str:
        """What it prints, in a fence unless that is Markdown itself."""
        print(self, file=sys.stderr, flush=True)
        lines = [line.rstrip() for line in call(self.command, self.columns).splitlines()]
        text = "\n".join(line for line in lines if not line.startswith("Run folder"))
        return f"```text\n{text}\n```" if self.fenced else text


def call(command: Sequence[str], columns: int = 80) -> str:
    """What a command prints. Ends the program if it fails; its own message then stands on stderr."""
    beside = Path(sys.executable).parent
    program = [str(beside / "fedtune")] if command[0] == "fedtune" else [sys.executable]
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = subprocess.run(
        [*program, *command[1:]], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"exit status {done.returncode}: {shlex.join(command)}")
    return done.stdout


@dataclass(frozen=True)
class Entry:
    """What is done for a table, and what makes it."""

    table: Callable[[], str | bytes]
    steps: Sequence[Work] = ()
    needs: Sequence[Path | str] = ()  # paths, and names of packages; without them it is left out
    partly: bool = False  # has rows that need SHARED, and is made without them too
    full: Sequence[Step] = ()  # the paper's own size: models and data of a hub, a card
    plots: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)  # by file under docs/


def run(config: str, out: Path, *settings: str) -> Step:
    """One federation. Goes on with what was interrupted."""
    command = ("fedtune", "run", f"configs/{config}.yaml", *settings, "--resume", str(out))
    return Step(command, out / "summary.json")


def compare(
    configs: Sequence[str], out: Path, *settings: str, seeds: str = "0,1,2", references: bool = True
) -> Step:
    """Several configurations; the command itself takes over those of its runs that are done."""
    files = (f"configs/{name}.yaml" for name in configs)
    changed = (word for setting in settings for word in ("--set", setting))
    also = () if references else ("--no-references",)
    return Step(("fedtune", "compare", *files, "--seeds", seeds, *changed, *also, "--out", str(out)))


def compared(out: Path) -> str:
    """The table of a comparison, as `fedtune compare` wrote it."""
    return (out / "table.md").read_text(encoding="utf-8")


def bench(name: str, *options: str, columns: int = 118) -> Entry:
    """What `fedtune bench` prints."""
    return Entry(Printed(("fedtune", "bench", name, *options), columns))


BENCH_MEMORY = Step(("fedtune", "bench", "memory", "--json"), RESULTS / "memory.json", kept=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several values, their sample standard deviation."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.4f}"


def climbed(loss: Callable[[float], float], start: float) -> float:
    """The learning rate whose loss is lower than that of both its neighbours on a grid (1, 3, 10, 30, …).

    A search on a fixed grid says nothing where the best rate is at its edge; this one goes on from there,
    for ten steps at most.

    Args:
        loss: Of a rate; infinite where training ends without a result.
        start: A rate of the grid.

    Raises:
        ValueError: After ten steps there is still a better one beside it, or all that was tried is infinite.
    """
    at = 2 * math.floor(math.log10(start) + 1e-9) + (f"{start:e}"[0] == "3")
    found = dict[int, float]()

    def of(place: int) -> float:
        if place not in found:
            found[place] = loss(on_grid(place))
        return found[place]

    for _ in range(10):
        best = min((at, at - 1, at + 1), key=of)
        if best == at and math.isfinite(of(at)):
            return on_grid(at)
        at = best if math.isfinite(of(best)) else at - 1
    raise ValueError(f"no best rate between {on_grid(min(found))} and {on_grid(max(found))}: {found}")


def on_grid(place: int) -> float:
    """The rate at a place of 1, 3, 10, 30, …; 0 is 1."""
    return float(f"{3 if place % 2 else 1}e{place // 2}")


def insert(page: str, name: str, text: str) -> str:
    """The page with the block's content replaced. Raises ValueError if the page has no such block."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page needs the lines {begin} and {end}")
    return f"{before}{begin}\n{text.strip(chr(10))}\n{end}{after}"


def put(text: str | bytes, places: Sequence[tuple[str, str]]) -> None:
    """Writes what was made to the places of its head."""
    for name, block in places:
        page = ROOT / name
        if isinstance(text, bytes):
            page.write_bytes(text)
        else:
            whole = insert(page.read_text(encoding="utf-8"), block, text) if block else text
            page.write_text(whole, encoding="utf-8")


def lacking(entry: Entry) -> list[str]:
    """What an entry needs and is not here."""
    return [
        str(need)
        for need in entry.needs
        if not ((ROOT / need).exists() if isinstance(need, Path) else find_spec(need))
    ]


def make(entry: Entry, head: Head, done: set[Work], *, dry_run: bool, to_print: bool) -> None:
    """Does the steps of an entry that are not `done`, makes its table, and puts it where its head says."""
    missing = lacking(entry)
    if missing:
        print(f"{head.name}: left out, because it needs {', '.join(missing)}")
    elif entry.partly and not (ROOT / SHARED).is_dir():
        print(f"{head.name}: the rows that need {SHARED} are left out")
    steps = [step for step in dict.fromkeys(entry.steps) if step not in done]
    if dry_run:
        for command in (*steps, *([entry.table] if isinstance(entry.table, Printed) else [])):
            print(command)
        done.update(steps)
    elif not missing:
        for step in steps:
            step.do()
            done.add(step)
        made = entry.table()
        if to_print and isinstance(made, str):
            print(made)
        else:
            put(made, head.places)
            for name, draw in entry.plots.items():
                put(draw(), [(f"docs/{name}", "")])
            print(f"{head.name}: put into {', '.join(page for page, _ in head.places)}")


def make_full(name: str, entry: Entry, *, dry_run: bool) -> None:
    """Does the full form of an entry, whose commands print their tables; a page keeps the small form's."""
    if not entry.full:
        print(f"{name}: has no form but the small one")
    for step in entry.full:
        print(step if dry_run else call(step.command))


def main(text: str | None, entries: Mapping[str, Entry]) -> None:
    """The command line of a file, whose docstring is `text`: makes the entries that are named."""
    found, story = heads(text or ""), (text or "").partition("\n")[0]
    parser = argparse.ArgumentParser(
        description=story, epilog=f"entries: {', '.join(entries)}; all of them: all"
    )
    parser.add_argument("names", nargs="*", metavar="ENTRY")
    parser.add_argument("--list", action="store_true", help="show all entries with their heads")
    parser.add_argument("--dry-run", action="store_true", help="show the commands and run none")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--small", action="store_true", help="what the pages show, on two cores (the default)")
    form.add_argument(
        "--full", action="store_true", help="the paper's own size, on a card, into runs/results"
    )
    parser.add_argument("--print", action="store_true", help="print the tables and leave the pages alone")
    arguments = parser.parse_args()
    names = list(entries) if "all" in arguments.names else arguments.names
    if unknown := [name for name in names if name not in entries]:
        parser.error(f"no entry {', '.join(unknown)}; there are {', '.join(entries)}, and all of them: all")
    if arguments.list:
        print("\n\n".join(str(found[name]) for name in names or entries))
    elif not names:
        parser.print_help()
    else:
        os.chdir(ROOT)
        done: set[Work] = set()
        for name in names:
            if arguments.full:
                make_full(name, entries[name], dry_run=arguments.dry_run)
                continue
            make(entries[name], found[name], done, dry_run=arguments.dry_run, to_print=arguments.print)
