"""reproduce/: every table of the pages has a head and an entry, and what heads say stands there."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from reproduced import FOLDER, load

from fedtune.config.file import load_config
from fedtune.errors import InputError

common, contents, claims = load("common"), load("contents"), load("claims")
PROJECT = FOLDER.parent
HEADS = {file.stem: heads for file, heads in contents.files().items()}
EVERY = [(stem, name) for stem, heads in HEADS.items() for name in heads]
NEED = {"network_cost": "flwr", "network_memory": "flwr", "privacy": "Crypto", "evaluation": "lm_eval"}
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def entries(stem: str) -> dict[str, Any]:
    if stem in NEED:
        pytest.importorskip(NEED[stem])
    found: dict[str, Any] = load(stem).ENTRIES
    return found


def block_of(page: str, block: str) -> str:
    text = (PROJECT / page).read_text(encoding="utf-8")
    _, begin, rest = text.partition(f"<!-- {block} -->")
    inside, end, _ = rest.partition(f"<!-- end {block} -->")
    assert begin and end, f"{page} has no block {block}"
    return inside


def test_there_are_files_for_all_papers() -> None:
    assert {"one_shot", "fedkseed", "fedbiot", "fedcybgd"} < HEADS.keys()
    assert len(EVERY) > 50 and len(set(EVERY)) == len(EVERY)


@pytest.mark.parametrize("stem", HEADS)
def test_heads_and_entries_are_the_same(stem: str) -> None:
    assert entries(stem).keys() == HEADS[stem].keys()
    assert (FOLDER / f"{stem}.py").read_text(encoding="utf-8").endswith("    main(__doc__, ENTRIES)\n")
    for name, head in HEADS[stem].items():
        assert head.command == f"python reproduce/{stem}.py {name}"


def test_what_has_entries_has_heads() -> None:
    files = [file for file in FOLDER.glob("*.py") if "\nENTRIES = {" in file.read_text(encoding="utf-8")]
    assert {file.stem for file in files} == HEADS.keys()
    assert [file.name for file in FOLDER.iterdir() if file.is_file() and file.suffix != ".py"] == []


@pytest.mark.parametrize(("stem", "name"), EVERY)
def test_a_head_says_what_stands_in_the_page(stem: str, name: str) -> None:
    head = HEADS[stem][name]
    assert head.places
    said = NUMBER.findall(head.result)
    for page, block in head.places:
        assert (PROJECT / page).is_file()
        if block:
            found = NUMBER.findall(block_of(page, block))
            assert said and [number for number in said if number not in found] == []
        else:
            assert said == []


def test_every_block_is_made_by_one_command() -> None:
    named = [place for stem, name in EVERY for place in HEADS[stem][name].places if place[1]]
    there = [
        (str(page.relative_to(PROJECT)), block)
        for page in (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"))
        for block in re.findall(r"<!-- end ([\w-]+) -->", page.read_text(encoding="utf-8"))
    ]
    assert sorted(named) == sorted(there)


def of_command(words: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Configurations of a fedtune command, and the settings on top of them."""
    given = list(words)
    while "--resume" in given or "--out" in given:
        at = given.index("--resume") if "--resume" in given else given.index("--out")
        del given[at : at + 2]
    return [word for word in given if word.endswith(".yaml")], [word for word in given if "=" in word]


@pytest.mark.parametrize("stem", HEADS)
def test_commands_name_files_and_settings_that_exist(stem: str) -> None:
    for entry in entries(stem).values():
        printed = [entry.table] if isinstance(entry.table, common.Printed) else []
        for step in (*entry.steps, *entry.full, *printed):
            if isinstance(step, claims.Trials):
                for side in step.sides:
                    own = [*step.settings, *side.settings]
                    load_config(PROJECT / f"configs/{side.config}.yaml", [*own, *step.scored])
                    load_config(PROJECT / f"configs/{side.config}.yaml", [*own, *step.validated])
            if not isinstance(step, common.Step | common.Printed):
                continue
            if step.command[0] == "python":
                assert (PROJECT / step.command[1]).is_file()
            configs, settings = of_command(step.command)
            for config in configs:
                load_config(PROJECT / config, settings)
    if stem in ("one_shot", "fedkseed", "fedbiot", "fedcybgd"):
        steps = [step for entry in entries(stem).values() for step in entry.steps]
        assert sum("compare" in step.command for step in steps if isinstance(step, common.Step)) > 2


def test_a_setting_that_is_not_there_would_be_seen() -> None:
    configs, settings = of_command(
        common.compare(["fedkseed"], Path("out"), "method.sedes=64", "data={clients: 3}").command
    )
    assert configs == ["configs/fedkseed.yaml"] and settings == ["method.sedes=64", "data={clients: 3}"]
    with pytest.raises(InputError, match="sedes"):
        load_config(PROJECT / configs[0], settings)


def test_pairs_on_real_data_have_valid_settings() -> None:
    one_shot = load("one_shot")
    real = {**one_shot.STORIES, "instruct-7m": one_shot.INSTRUCT, **one_shot.TEST_ON_REAL}
    configs = [load_config(PROJECT / f"configs/{one_shot.MULTI}.yaml", list(own)) for own in real.values()]
    assert [config.data.clients for config in configs] == [8, 8, 8, 4, 12, 6, 8]
    assert [config.method.lr for config in configs[3:]] == [1e-2, 5e-4, 3e-3, 1e-2]  # type: ignore[attr-defined]


def test_the_page_of_all_tables_is_current() -> None:
    now = (PROJECT / "docs/reproduce.md").read_text(encoding="utf-8")
    assert contents.page() == now, "run reproduce/contents.py contents"
    assert all(f"| `{name}` |" in now for _, name in EVERY)


def test_commands_that_are_named_elsewhere_exist() -> None:
    texts = [PROJECT / "README.md", *PROJECT.glob("docs/*.md"), *PROJECT.glob("configs/**/*.yaml")]
    texts += [*PROJECT.glob("fedtune/**/*.py"), *PROJECT.glob("fedtune/**/*.md"), *FOLDER.glob("*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in texts)
    files = set(re.findall(r"\breproduce/([\w/]+\.\w+)", text))
    assert "pretrain_encoder.py" in files and [file for file in files if not (FOLDER / file).is_file()] == []
    commands = re.findall(r"python reproduce/(\w+)\.py((?: [a-z][\w-]+)+)", text)
    assert len(commands) > len(EVERY)
    for stem, words in commands:
        assert set(words.split()) - {"all"} <= HEADS[stem].keys()


def test_rates_are_searched_until_both_neighbours_are_worse() -> None:
    def away(rate: float) -> float:
        return math.inf if rate > 0.05 else abs(math.log(rate / 7e-3))

    assert [common.on_grid(place) for place in (-3, -2, -1, 0, 1)] == [0.03, 0.1, 0.3, 1.0, 3.0]
    for start in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3):
        assert common.climbed(away, start) == 1e-2
    for endless in (lambda rate: rate, lambda rate: math.inf):
        with pytest.raises(ValueError, match="no best rate between"):
            common.climbed(endless, 1e-2)


GOOD = """A story.

Table:   a table; docs/page.md, block one
Command: python reproduce/toy.py one
Time:    a second,
         or two
Needs:   nothing
Result:  5
"""


def test_heads_are_read() -> None:
    (head,) = common.heads(GOOD).values()
    assert (head.name, head.time, head.places) == ("one", "a second, or two", [("docs/page.md", "one")])
    two = common.heads(GOOD + "\n" + GOOD.split("\n\n")[1].replace("toy.py one", "toy.py two"))
    assert list(two) == ["one", "two"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Needs:   nothing\n", "", "a head has the words"),
        ("Needs:   nothing", "Needs:", "a head has the words"),
        ("Result:  5", "Result:  5\n\n" + GOOD.split("\n\n")[1], "two heads have the command"),
    ],
)
def test_a_wrong_head_is_an_error(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        common.heads(GOOD.replace(old, new))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with one block, in a project of its own."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text("before\n<!-- one -->\nold\n<!-- end one -->\nafter\n")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert not (tmp_path.parent / "shared").exists()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(monkeypatch: pytest.MonkeyPatch, entry: Any, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["toy.py", *words])
    common.main(GOOD, {"one": entry})


def test_an_entry_fills_its_block_and_takes_over_what_is_done(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step = common.Step(("python", "-c", "print(6)"), Path("made.txt"), kept=True)
    read = common.Entry(lambda: Path("made.txt").read_text(), [step, step])
    make(monkeypatch, read, "one", "--print")
    assert capfd.readouterr().out == "6\n\n" and "old" in (project / "docs/page.md").read_text()
    (project / "made.txt").write_text("7")  # as an earlier call made it
    make(monkeypatch, read, "all")
    assert (project / "docs/page.md").read_text() == "before\n<!-- one -->\n7\n<!-- end one -->\nafter\n"


def test_a_printed_table_is_fenced_and_as_wide_as_asked(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os; print('wide', os.environ['COLUMNS'], '  '); print('Run folder: x')"
    make(monkeypatch, common.Entry(common.Printed(("python", "-c", code), 97)), "one")
    assert "<!-- one -->\n```text\nwide 97\n```\n<!-- end one -->" in (project / "docs/page.md").read_text()


def test_what_cannot_be_made_is_said(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page = (project / "docs/page.md").read_text()
    step = common.Step(("fedtune", "run", "configs/demo.yaml"))
    entry = common.Entry(lambda: "new", [step], [Path("no/data"), "no_such_package", Path("docs"), "json"])
    make(monkeypatch, entry, "one")
    left_out = "one: left out, because it needs no/data, no_such_package\n"
    assert capfd.readouterr().out == left_out
    make(monkeypatch, entry, "one", "--dry-run")
    assert capfd.readouterr().out == f"{left_out}fedtune run configs/demo.yaml\n"
    make(monkeypatch, common.Entry(lambda: "new", [step], partly=True), "one", "--dry-run")
    rest = "one: the rows that need ../shared are left out\nfedtune run configs/demo.yaml\n"
    assert capfd.readouterr().out == rest
    with pytest.raises(SystemExit, match="exit status 3: python -c"):
        make(monkeypatch, common.Entry(common.Printed(("python", "-c", "raise SystemExit(3)"))), "one")
    with pytest.raises(SystemExit):
        make(monkeypatch, entry, "two")
    assert "no entry two; there are one" in capfd.readouterr().err
    make(monkeypatch, entry, "--list")
    assert capfd.readouterr().out.startswith("Table:   a table; docs/page.md, block one\nCommand: python")
    make(monkeypatch, entry)
    assert "usage: toy.py" in capfd.readouterr().out
    assert (project / "docs/page.md").read_text() == page


def test_the_full_form_is_asked_for_and_leaves_the_page_alone(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    page = (project / "docs/page.md").read_text()
    entry = common.Entry(
        lambda: "new", full=[common.Step(("python", "-c", "print('as large as the paper')"))]
    )
    make(monkeypatch, entry, "one", "--full", "--dry-run")
    assert capfd.readouterr().out == "python -c 'print('\"'\"'as large as the paper'\"'\"')'\n"
    make(monkeypatch, entry, "one", "--full")
    assert capfd.readouterr().out == "as large as the paper\n\n"
    make(monkeypatch, common.Entry(lambda: "new"), "one", "--full")
    assert capfd.readouterr().out == "one: has no form but the small one\n"
    with pytest.raises(SystemExit):
        make(monkeypatch, entry, "one", "--full", "--small")
    assert (project / "docs/page.md").read_text() == page


def test_a_plot_is_written_beside_the_page(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = common.Entry(lambda: "new", plots={"claims_one.svg": lambda: b"<svg/>"})
    make(monkeypatch, entry, "one", "--print")
    assert not (project / "docs/claims_one.svg").exists()
    make(monkeypatch, entry, "one", "--small")
    assert (project / "docs/claims_one.svg").read_bytes() == b"<svg/>"
    assert "new" in (project / "docs/page.md").read_text()


def test_a_page_without_the_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="the page needs the lines <!-- two --> and <!-- end two -->"):
        common.insert("<!-- one -->\n<!-- end one -->", "two", "text")
