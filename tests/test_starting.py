"""A first configuration: written, copied, or named, in a source tree and from an installed wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import fedtune
from fedtune.api import starting
from fedtune.cli.main import app
from fedtune.config import shipped
from fedtune.config.yaml_text import read_yaml
from fedtune.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("template", starting.starts())
def test_each_template_is_a_configuration_with_a_comment_beside_each_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = starting.init(Path("mine"), template=template)
    assert path == Path("mine.yaml")
    text = path.read_text(encoding="utf-8")
    fedtune.load(path)
    assert "FILE" not in text and str(path) in text  # the commands at the top can be pasted
    assert max(map(len, text.splitlines())) <= 120
    blocks = {key: value for key, value in read_yaml(path).items() if isinstance(value, dict)}
    for line in text.splitlines():
        setting = re.match(r"  (\w+): [^{]\S*", line)
        if setting and setting[1] not in ("name", "trainable", "batch_size", "source", "max_examples"):
            assert "# " in line, line
    assert "method" in blocks and starting.starts()[template] in text


def test_a_model_and_data_of_ones_own_are_put_in_place(tmp_path: Path) -> None:
    for template in starting.starts():
        given = {"model": "owner/model", "data": None if template == "deploy" else "my rows.jsonl"}
        path = starting.init(tmp_path / template, template=template, **given)  # type: ignore[arg-type]
        config = fedtune.load(path)
        assert config.model.name == "owner/model" and config.method_name != "owner/model"
        assert config.data.train == ("clients" if template == "deploy" else "my rows.jsonl")
    path = starting.init(tmp_path / "odd", model="no", data="12")
    assert (fedtune.load(path).model.name, fedtune.load(path).data.train) == ("no", "12")
    with pytest.raises(InputError, match="every template but deploy"):
        starting.init(tmp_path / "network", template="deploy", data="rows.jsonl")
    assert not (tmp_path / "network.yaml").exists()


def test_nothing_that_is_there_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 7")
    (tmp_path / "demo.yaml").write_text("seed: 7")
    for write in (lambda: starting.init(tmp_path / "mine"), lambda: starting.copy("demo", tmp_path)):
        with pytest.raises(InputError, match="is there already, and is left as it is"):
            write()
    assert (tmp_path / "mine.yaml").read_text() == (tmp_path / "demo.yaml").read_text() == "seed: 7"
    with pytest.raises(InputError, match=r"there are chat, classifier, .*Did you mean .lora"):
        starting.init(tmp_path / "other", template="lorra")
    with pytest.raises(InputError, match=r"cannot be written: No such file"):
        starting.init(tmp_path / "none" / "other")
    with pytest.raises(InputError, match=r"no configuration named fedlor .*Did you mean"):
        starting.copy("fedlor", None)


def test_what_comes_with_fedtune_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names = shipped.shipped()
    assert names == {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix(): path
        for path in sorted((ROOT / "configs").rglob("*.yaml"))
    }
    demo = fedtune.load("demo")
    assert demo == fedtune.load(ROOT / "configs" / "demo.yaml") and not caplog.messages
    assert fedtune.load("configs/demo.yaml") == demo
    assert caplog.messages == [
        f"configs/demo.yaml is not in {tmp_path}; taken is the one that comes with fedtune"
    ]
    (tmp_path / "demo").mkdir()  # a folder is no configuration
    assert fedtune.load("demo") == demo
    copied = starting.copy("papers/fedlora", None)
    assert copied.read_bytes() == (ROOT / "configs" / "papers" / "fedlora.yaml").read_bytes()
    copied.rename("demo.yaml")
    assert fedtune.load("demo.yaml").method_name == "fedavg"  # one's own goes first
    with pytest.raises(InputError, match=r"dem: no such configuration file in .* Did you mean"):
        fedtune.load("dem")
    with pytest.raises(InputError, match="no such configuration file"):
        fedtune.load(tmp_path / "demo.yml")


def test_each_has_a_line_that_says_what_it_is() -> None:
    listing = fedtune.available("configs")
    assert [entry["name"] for entry in listing] == list(shipped.shipped())
    assert all(entry["summary"] and len(entry["summary"]) < 240 for entry in listing)
    summaries = {entry["name"]: entry["summary"] for entry in listing}
    assert summaries["fedadam"] == ("FedAdam (Reddi et al. 2021, Algorithm 2): FedIT with Adam on the server")


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    listed = runner.invoke(app, ["init", "--list"])
    assert [line.split()[0] for line in listed.output.splitlines()] == list(starting.starts())
    assert not list(tmp_path.iterdir())
    made = runner.invoke(app, ["init", "mine", "--template", "lora", "--data", "rows.jsonl"])
    assert made.exit_code == 0 and made.output.splitlines()[-1].endswith("fedtune run mine.yaml")
    copied = runner.invoke(app, ["cp", "demo"])
    assert (copied.exit_code, copied.output) == (0, "demo.yaml\n")


def test_a_wheel_has_them_all(tmp_path: Path) -> None:
    """Built as for a release, and imported from there, outside of the source tree."""
    pip = (sys.executable, "-m", "pip")
    built = subprocess.run(
        (*pip, "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, ROOT),
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site'); import fedtune; from fedtune.config import shipped;"
        "from fedtune.api import starting; starting.init(__import__('pathlib').Path('mine'));"
        "print(shipped.folder()); print(*shipped.shipped()); print(fedtune.load('demo').method_name)"
    )
    ran = subprocess.run(
        (sys.executable, "-I", "-c", code), capture_output=True, text=True, cwd=tmp_path, check=True
    )
    place, names, method = ran.stdout.splitlines()
    assert place == str((tmp_path / "site" / "fedtune" / "configs").resolve())
    assert names.split() == list(shipped.shipped()) and method == "fedavg"
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["method"]["name"] == "fedavg"
    shutil.rmtree(tmp_path / "site")


def test_a_shell_completes_commands_and_configurations(tmp_path: Path) -> None:
    """As bash asks for it, with words that were begun."""
    (tmp_path / "sub").mkdir()
    for name in ("mine.yaml", "mine.txt", "sub/more.yml", ".hidden"):
        (tmp_path / name).touch()
    program = f"import sys; sys.argv = ['fedtune']; sys.path.insert(0, {str(ROOT)!r}); "
    program += "from fedtune.cli.main import main; main(); assert 'torch' not in sys.modules"

    def completed(*words: str) -> list[str]:
        asked = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        how = {**os.environ, **asked, "_FEDTUNE_COMPLETE": "complete_bash"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=how, capture_output=True, text=True, check=True
        )
        assert not done.stderr
        return done.stdout.split()

    assert completed("fedtune", "re") == ["report", "replay"]
    assert completed("fedtune", "run", "mi") == ["mine.yaml"]
    assert completed("fedtune", "plan", "sub/") == ["sub/more.yml"]
    assert completed("fedtune", "compare", "papers/fedl") == ["papers/fedlora"]
    assert completed("fedtune", "validate", "su") == ["sub/"]
    assert completed("fedtune", "data", "nothing-of-that-name") == []
    assert "demo" in completed("fedtune", "run", "d")
