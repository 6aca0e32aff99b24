"""Parts of one's own that a plugin file or a package brings, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from command import fedtune, write_config
from plugin_parts import DOCUMENT, METRIC, TEMPLATE, refused

from fedtune import registry
from fedtune.config.file import parse_config
from fedtune.data.templates import register_template
from fedtune.errors import InputError
from fedtune.evaluation.registry import TASKS
from fedtune.federation.client import join
from fedtune.federation.consent import Consent
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.transport.acceptance import NotAccepted

pytestmark = pytest.mark.usefixtures("parts_as_before")


# --- plugin files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nif:\n", "plugin mine.py, line 2: SyntaxError: invalid syntax"),
        (
            "def f():\n    return 1 / 0\n\nf()\n",
            "plugin mine.py, line 2: ZeroDivisionError: division by zero",
        ),
        ("import nowhere_to_be_found", "line 1: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("import sys\nsys.exit(7)", "plugin mine.py, line 2: SystemExit: 7"),
        (
            METRIC.replace('"length"', '"loss"'),
            "line 4: the task name 'loss' is taken: fedtune has registered it",
        ),
        (METRIC + METRIC, "line 11: the task name 'length' is taken: file mine.py has registered it already"),
        ("\0", "plugin mine.py: "),
        (None, "plugin mine.py cannot be read: No such file or directory"),
    ],
)
def test_a_broken_plugin_is_one_message(text: str | None, message: str, tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", DOCUMENT)
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    before = sorted(path.name for path in tmp_path.iterdir())
    result = fedtune("run", "c.yaml", "--out", "run", "--plugin", "mine.py", cwd=tmp_path)
    refused(result, "fedtune: plugin mine.py" if text != "\0" else "", message)
    assert len(result.err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in (".out", ".err")) == before


def test_a_failed_plugin_leaves_nothing_and_can_be_mended(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(METRIC + "\n1 / 0\n")
    with pytest.raises(InputError, match="line 9: ZeroDivisionError"):
        registry.load_plugin(path)
    assert "length" not in TASKS and registry.plugins() == ()
    path.write_text(METRIC)
    plugin = registry.load_plugin(path)
    assert registry.load_plugin(path) == plugin and registry.plugins() == (plugin,)
    assert TASKS.part("length").origin == f"file {path}"
    path.write_text(METRIC + "# changed\n")
    with pytest.raises(InputError, match="has changed since it was loaded; start Python anew"):
        registry.load_plugin(path)


OPTION = ("run", "compare", "validate", "plan", "diagnose", "eval", "report", "export", "replay", "ls")


@pytest.mark.parametrize("command", [*OPTION, "server", "client"])
def test_every_command_that_reads_a_configuration_takes_plugins(command: str, tmp_path: Path) -> None:
    assert "--plugin" in fedtune(command, "--help", cwd=tmp_path).out


def test_a_run_is_resumed_with_the_plugins_that_it_was_made_with(tmp_path: Path) -> None:
    document = {**DOCUMENT, "evaluation": {"tasks": ["loss", "length"], "max_examples": 2, "every": 0}}
    write_config(tmp_path / "c.yaml", document)
    (tmp_path / "mine.py").write_text(METRIC)
    plugin = ("--plugin", "mine.py")
    killed = fedtune(
        *("run", "c.yaml", "--out", "run", "--quiet", *plugin), cwd=tmp_path, die_at=1, watched=".final.tmp"
    )
    assert killed.status == -9
    about = json.loads((tmp_path / "run/environment.json").read_text())
    assert [found["path"] for found in about["plugins"]] == ["mine.py"]
    assert about["parts"] == {"task length": "file mine.py"}
    resume = ("run", "c.yaml", "--resume", "run", "--quiet")
    without = "run was made with the plugin mine.py; pass it again: --plugin mine.py"
    refused(fedtune(*resume, cwd=tmp_path), without)
    for command in (("eval", "run", "--tasks", "loss"), ("export", "run", "--out", "x"), ("report", "run")):
        refused(fedtune(*command, cwd=tmp_path), without)
    (tmp_path / "mine.py").write_text(METRIC + "# changed\n")
    refused(fedtune(*resume, *plugin, cwd=tmp_path), "run began with another plugin mine.py: sha256 was ")
    (tmp_path / "mine.py").rename(tmp_path / "other.py")
    refused(fedtune(*resume, "--plugin", "other.py", cwd=tmp_path), without)
    (tmp_path / "other.py").write_text(METRIC)  # the same content, wherever it is
    done = fedtune(*resume, "--plugin", "other.py", cwd=tmp_path)
    assert done.status == 0, done.err
    report = fedtune("report", "run", "--plugin", "other.py", cwd=tmp_path)
    assert report.status == 0, report.err


def test_what_this_process_alone_knows_is_refused_by_the_simulation(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    register_template("mine", summary="as it is")(lambda example: example.instruction)
    document = {**DOCUMENT, "data": {**DOCUMENT["data"], "template": "mine"}}
    document["transport"] = {"name": "flower-simulation"}
    message = (
        "the template mine was registered in this process alone; put it in a file and pass that as a plugin"
    )
    with pytest.raises(InputError, match=message):
        run(parse_config(document, "c.yaml"), tmp_path / "run", Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_client_elsewhere_has_to_bring_the_part_itself(tmp_path: Path) -> None:
    text = json.dumps({"method": {"name": "clip-mean"}})
    with pytest.raises(
        NotAccepted, match=r"cannot read the configuration: .*method.name 'clip-mean' is not known"
    ):
        join(
            {"config": text, "client": 0, "weights": ""},
            data=tmp_path / "x.jsonl",
            fields={},
            model=None,
            device="cpu",
            consent=Consent(),
        )


# --- packages -----------------------------------------------------------------------------------------------

PACKAGE = '''
from pathlib import Path

from fedtune.data.templates import register_template

Path(__file__).with_name("imported").touch()

@register_template("loud")
def loud(example):
    """In capitals."""
    return example.instruction.upper()

def quiet(example):
    """Not registered."""
    return example.instruction
'''


@dataclass
class Site:
    """A folder of packages, made by hand, that commands find."""

    folder: Path

    def add(
        self, name: str, points: dict[str, dict[str, str]], code: str = PACKAGE, version: str = "1.0"
    ) -> None:
        module = name.replace("-", "_")
        (self.folder / module).mkdir()
        (self.folder / module / "__init__.py").write_text(code)
        about = self.folder / f"{module}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [
            f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in named.items())
            for group, named in points.items()
        ]
        (about / "entry_points.txt").write_text("\n".join(lines))

    def imported(self, name: str) -> bool:
        return (self.folder / name / "imported").exists()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)  # the processes of `fedtune` begin with this process's path
    return Site(folder)


def listed(kind: str, cwd: Path) -> dict[str, dict[str, str]]:
    result = fedtune("ls", kind, "--json", cwd=cwd)
    assert result.status == 0, result.err
    return {row["name"]: row for row in result.json()}


def test_a_package_is_known_without_being_imported(site: Site, tmp_path: Path) -> None:
    site.add("loud-pack", {"fedtune.templates": {"loud": "loud_pack:loud"}})
    write_config(tmp_path / "c.yaml", DOCUMENT)
    assert fedtune("validate", "c.yaml", cwd=tmp_path).status == 0
    refused(
        fedtune("validate", "c.yaml", "data.template=x", cwd=tmp_path),
        "data.template: template 'x' is not known",
    )
    write_config(tmp_path / "d.yaml", {**DOCUMENT, "data": {**DOCUMENT["data"], "template": "lout"}})
    refused(
        fedtune("validate", "d.yaml", cwd=tmp_path), "known are alpaca, plain, loud.", 'Did you mean "loud"'
    )
    assert not site.imported("loud_pack")
    row = {"name": "loud", "summary": "In capitals.", "origin": "loud-pack 1.0"}
    assert listed("templates", tmp_path)["loud"] == row
    assert site.imported("loud_pack")
    assert "loud    loud-pack 1.0  In capitals." in fedtune("ls", "templates", cwd=tmp_path).out
    done = fedtune("run", "c.yaml", "data.template=loud", "--out", "run", "--quiet", cwd=tmp_path)
    assert done.status == 0, done.err
    about = json.loads((tmp_path / "run/environment.json").read_text())
    assert about["parts"] == {"template loud": "loud-pack 1.0"}


@pytest.mark.parametrize(
    ("code", "place", "message"),
    [
        (
            "import nowhere_at_all",
            "bad:loud",
            "its module bad cannot be imported: ModuleNotFoundError: No module named ",
        ),
        (
            PACKAGE + "\n1 / 0",
            "bad:loud",
            "its module bad cannot be imported: ZeroDivisionError: division by zero",
        ),
        ("raise SystemExit(3)", "bad:loud", "its module bad cannot be imported: SystemExit: 3"),
        (
            PACKAGE,
            "bad:laud",
            "its module bad cannot be imported: AttributeError: module 'bad' has no attribute 'laud'",
        ),
        (
            PACKAGE,
            "bad:quiet",
            "bad:quiet is not registered under that name; its author has to put the decorator",
        ),
    ],
)
def test_a_package_that_cannot_be_used(
    code: str, place: str, message: str, site: Site, tmp_path: Path
) -> None:
    site.add("bad", {"fedtune.templates": {"loud": place, "again": place}}, code)
    site.add("good", {"fedtune.templates": {"soft": "good:soft"}}, PACKAGE.replace("loud", "soft"))
    rows = listed("templates", tmp_path)
    assert list(rows) == ["auto", "chat", "alpaca", "plain", "again", "loud", "soft"]
    for name in ("loud", "again"):
        assert rows[name]["summary"].startswith(
            f"cannot be loaded: bad 1.0 brings the template '{name}', but "
        )
        assert rows[name]["origin"] == "bad 1.0"
    assert message in rows["loud"]["summary"]
    assert rows["soft"]["summary"] == "In capitals."
    for template, status in (("plain", 0), ("soft", 0), ("loud", 2)):
        write_config(tmp_path / "c.yaml", {**DOCUMENT, "data": {**DOCUMENT["data"], "template": template}})
        found = fedtune("validate", "c.yaml", cwd=tmp_path)
        assert found.status == status, found.err
    refused(found, f"c.yaml: data.template: bad 1.0 brings the template 'loud', but {message}")


def test_names_that_two_claim(site: Site, tmp_path: Path) -> None:
    site.add("one", {"fedtune.templates": {"loud": "one:loud", "alpaca": "one:loud"}})
    site.add("two", {"fedtune.templates": {"loud": "two:loud"}, "fedtune.tasks": {"loss": "two:loud"}})
    rows = listed("templates", tmp_path)
    assert rows["loud"]["origin"] == "one 1.0 and two 1.0"
    assert rows["alpaca"]["origin"] == "fedtune and one 1.0"
    assert rows["plain"]["summary"].startswith("instruction")
    assert not site.imported("one") and not site.imported("two")
    for data, evaluation, message in (
        (
            "loud",
            "accuracy",
            "data.template: one 1.0 and two 1.0 each bring a template 'loud'; it can be used when",
        ),
        ("alpaca", "accuracy", "fedtune and one 1.0 each bring a template 'alpaca'"),
        ("plain", "loss", "fedtune and two 1.0 each bring a task 'loss'"),
        ("plain", "accuracy", ""),
    ):
        document = {**DOCUMENT, "data": {**DOCUMENT["data"], "template": data}}
        write_config(tmp_path / "c.yaml", {**document, "evaluation": {"tasks": [evaluation]}})
        found = fedtune("validate", "c.yaml", cwd=tmp_path)
        if message:
            refused(found, message)
        else:
            assert found.status == 0, found.err


def test_a_file_and_a_package_of_one_name(site: Site, tmp_path: Path) -> None:
    site.add("one", {"fedtune.templates": {"loud": "one:loud"}})
    (tmp_path / "mine.py").write_text(TEMPLATE)
    write_config(tmp_path / "c.yaml", {**DOCUMENT, "data": {**DOCUMENT["data"], "template": "loud"}})
    refused(fedtune("validate", "c.yaml", "--plugin", "mine.py", cwd=tmp_path), "one 1.0", "file mine.py")
    (tmp_path / "imports.py").write_text("import one\n")  # then it is the package's own, as without
    assert fedtune("validate", "c.yaml", "--plugin", "imports.py", cwd=tmp_path).status == 0


def test_importing_fedtune_and_asking_its_version_looks_for_no_packages() -> None:
    program = """
import sys
import fedtune
sys.argv = ["fedtune", "--version"]
from fedtune.cli.main import main
try:
    main()
except SystemExit as done:
    assert not done.code
import fedtune.config.file, fedtune.federation.run
import fedtune.registry
assert fedtune.registry._entry_points.cache_info().currsize == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
