"""`fedtune export --format`, `fedtune push`: results for others, a card that is true, nothing private."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

import fedtune
from fedtune.errors import FederationError, InputError

SECRET = "zebra-ward"
ROWS = {
    f"{SECRET}-{site}": [
        {"instruction": f"Add {a} and {b}.", "output": str(a + b), "category": f"{SECRET}-{a % 2}"}
        for a in range(4)
        for b in range(3)
    ]
    for site in range(3)
}
LORA: dict[str, Any] = {
    "data": {"clients": 3, "holdout": {"fraction": 0.2}, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.02, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss", "accuracy"]},
}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    return fedtune.run(LORA, data=ROWS, out=tmp_path_factory.mktemp("push") / "mine", progress=False)


def front(card: str) -> dict[str, Any]:
    """The head of a card, as the hub reads it."""
    _, head, _ = card.split("---\n", 2)
    found = yaml.safe_load(head)
    assert isinstance(found, dict)
    return found


def row(card: str, name: str) -> list[str]:
    """The cells of a table's line behind its first."""
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_pushed_folder_is_a_model_of_its_own_with_a_true_card(lora: fedtune.Run, tmp_path: Path) -> None:
    out = Path(lora.push(tmp_path / "given"))
    model = AutoModelForCausalLM.from_pretrained(out)  # without fedtune, and without a base
    lora.export(tmp_path / "merged", merge=True)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())
    card, summary = (out / "README.md").read_text(), lora.summary
    assert "More Information Needed" not in card
    assert front(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["federated-learning", "fedtune", "fedavg"],
    }
    assert row(card, "rounds") == ["2"] and row(card, "lr") == ["0.02"]
    assert row(card, "clients") == ["3, all in each round"]
    sizes = [client["examples"] for client in lora.clients]
    assert row(card, "split")[0].endswith(f"{min(sizes)} to {max(sizes)} examples a client")
    assert row(card, "data") == ["not public"]
    assert row(card, "loss | loss")[1] == f"{summary['zero_shot']['loss']['loss']:.4f}"
    assert row(card, "loss | loss")[2].startswith(f"{summary['evaluation']['loss']['loss']:.4f}")
    assert row(card, "trained parameters") == [
        f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,}"
    ]
    assert row(card, "payload down, up") == [
        f"{summary['payload_bytes']['down'] / 1e3:.2f} kB, {summary['payload_bytes']['up'] / 1e3:.2f} kB"
    ]
    assert row(card, "torch") == [torch.__version__]
    assert "No differential privacy" in card and "No secure aggregation" in card


def test_nothing_private_is_in_any_file(lora: fedtune.Run, tmp_path: Path) -> None:
    out = Path(lora.push(tmp_path / "given"))
    told = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert told
    for file, content in told.items():
        for word in (SECRET, "Add 1 and 2", str(lora.folder), str(tmp_path), "/home/", "/tmp/"):
            if file.name != "tokenizer.json":
                assert word.encode() not in content, (file, word)


def test_the_card_says_what_privacy_was_spent(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    private = {"privacy": {"clip": 0.1, "noise_multiplier": 1.5, "delta": 1e-5}, "secure_aggregation": {}}
    made = fedtune.run(LORA | {"federation": private}, data=ROWS, out=tmp_path / "run", progress=False)
    card = (Path(made.push(f"{tmp_path}/given")) / "README.md").read_text()
    spent = made.summary["privacy"]
    assert f"Differential privacy spent: ε = {spent['epsilon']:.4g} at δ = 1e-05." in card
    assert "the server saw sums of updates and no single one" in card


def test_an_adapter_is_named_with_a_base_that_others_find(
    lora: fedtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the base were on the hub: the adapter alone, with its name; a place here loses its path."""
    final = tmp_path / "run" / "final"
    copied(lora.path, tmp_path / "run", base="someone/base")
    made = fedtune.open(tmp_path / "run")
    monkeypatch.setattr(
        fedtune.Run, "export", lambda self, out, **how: asked.append(how) or copied_final(final, out)
    )
    asked: list[Any] = []
    out = Path(made.push(tmp_path / "given"))
    assert asked == [{"format": "peft"}]
    card = (out / "README.md").read_text()
    about = front(card)
    assert (about["base_model"], about["base_model_relation"]) == ("someone/base", "adapter")
    assert about["library_name"] == "peft" and "it needs that base model" in card
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/base"
    edited = json.loads((final / "adapter_config.json").read_text()) | {
        "auto_mapping": {"base_model": str(final)}
    }
    (final / "adapter_config.json").write_text(json.dumps(edited))
    made.push(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {"base_model": "final"}


def copied(run: Path, to: Path, base: str) -> None:
    """A run's folder, as if its base were called otherwise."""
    shutil.copytree(run, to)
    document = yaml.safe_load((to / "config.yaml").read_text())
    document["model"]["name"] = base
    (to / "config.yaml").write_text(yaml.safe_dump(document))
    file = to / "final" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def copied_final(final: Path, out: Path) -> list[Path]:
    shutil.copytree(final, out)
    return [out]


def test_a_place_in_any_file_stops_it(
    lora: fedtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(self: fedtune.Run, out: Path, **how: Any) -> list[Path]:
        copied_final(lora.path / "final", out)
        (out / "notes.jinja").write_text(f"made in {lora.folder}")
        return [out]

    monkeypatch.setattr(fedtune.Run, "export", export)
    with pytest.raises(FederationError, match=r"notes\.jinja names a place of this machine"):
        lora.push(tmp_path / "given")
    assert not (tmp_path / "given").exists()


class Hub:
    """A hub in memory; `there` are its repositories, by name whether they are private."""

    there: ClassVar[dict[str, bool]] = {}
    uploaded: ClassVar[list[tuple[str, list[str]]]] = []
    fails: Exception | None = None

    def repo_info(self, repo: str, *, repo_type: str) -> Any:
        if self.fails is not None:
            raise self.fails
        if repo not in self.there:
            raise RepositoryNotFoundError("none", response=response(404))
        return SimpleNamespace(private=self.there[repo])

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool, repo_type: str) -> None:
        self.there.setdefault(repo, private)

    def upload_folder(self, *, repo_id: str, folder_path: Path, repo_type: str, commit_message: str) -> Any:
        self.uploaded.append((repo_id, sorted(file.name for file in folder_path.iterdir())))
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")


def response(status: int) -> Any:
    import httpx

    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example/x"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "there", {})
    monkeypatch.setattr(Hub, "uploaded", [])
    return Hub


def test_a_repository_is_private_unless_public_was_said(lora: fedtune.Run, hub: type[Hub]) -> None:
    assert lora.push("someone/new") == "https://hub.example/someone/new/commit/1"
    assert hub.there == {"someone/new": True}
    ((repo, files),) = hub.uploaded
    assert repo == "someone/new" and {"README.md", "model.safetensors", "config.json"} <= set(files)
    hub.there["someone/open"] = False
    with pytest.raises(InputError, match="everybody sees it; --public allows that"):
        lora.push("someone/open")
    lora.push("someone/open", public=True)
    lora.push("someone/other", public=True)
    assert hub.there["someone/other"] is False and len(hub.uploaded) == 3


@pytest.mark.parametrize(
    ("fails", "kind", "said"),
    [
        (HfHubHTTPError("Unauthorized", response=response(401)), InputError, "Log in with: hf auth login"),
        (HfHubHTTPError("Gone", response=response(500)), InputError, "status 500: Gone"),
        (ConnectionError("no network"), FederationError, "the hub cannot be reached"),
    ],
)
def test_a_hub_that_refuses_is_one_sentence(
    lora: fedtune.Run, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, fails: Exception, kind: Any, said: str
) -> None:
    monkeypatch.setattr(hub, "fails", fails)
    with pytest.raises(kind, match=said):
        lora.push("someone/new")
    assert hub.uploaded == []


def test_what_is_no_target_is_one_sentence(lora: fedtune.Run, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"name a folder as \./mine, and a repository of the hub as owner/name"
    ):
        lora.push("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="exists already"):
        lora.push(tmp_path / "taken")
    copied(lora.path, tmp_path / "half", base="bundled")
    (tmp_path / "half" / "summary.json").unlink()
    with pytest.raises(InputError, match="has not ended"):
        fedtune.open(tmp_path / "half", data=ROWS).push(tmp_path / "given")
    assert not (tmp_path / "given").exists()


def test_export_by_format(lora: fedtune.Run, tmp_path: Path) -> None:
    lora.export(tmp_path / "plain")
    lora.export(tmp_path / "peft", format="peft")
    lora.export(tmp_path / "merged", format="merged")
    lora.export(tmp_path / "merge", merge=True)
    for one, other, file in (
        ("plain", "peft", "adapter_model.safetensors"),
        ("merge", "merged", "model.safetensors"),
    ):
        assert (tmp_path / one / file).read_bytes() == (tmp_path / other / file).read_bytes()
    with pytest.raises(InputError, match="merge writes a whole model, and format is peft"):
        lora.export(tmp_path / "x", merge=True, format="peft")
    with pytest.raises(InputError, match="format must be one of peft, merged, gguf, got 'onnx'"):
        lora.export(tmp_path / "x", format="onnx")
    assert not (tmp_path / "x").exists()


def converter(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of llama.cpp's name, for which the real one stands in nobody's environment."""
    folder.mkdir()
    program = folder / "convert_hf_to_gguf.py"
    program.write_text(f"#!{sys.executable}\nimport os, sys\nfolder, flag, out = sys.argv[1:]\n{body}")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(folder))


def test_gguf_is_the_converters_of_the_whole_model(
    lora: fedtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = "assert flag == '--outfile'\nopen(out, 'w').write(' '.join(sorted(os.listdir(folder))))\n"
    converter(tmp_path / "bin", body, monkeypatch)
    assert lora.export(tmp_path / "out", format="gguf") == [tmp_path / "out" / "model.gguf"]
    files = (tmp_path / "out" / "model.gguf").read_text().split()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert "adapter_config.json" not in files


def test_a_converter_that_fails_or_is_not_there_leaves_nothing(
    lora: fedtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError) as missing:
        lora.export(tmp_path / "out", format="gguf")
    said = str(missing.value)
    assert f"fedtune export {lora.path} --out {tmp_path}/out-merged --format merged" in said
    assert f"convert_hf_to_gguf.py {tmp_path}/out-merged --outfile {tmp_path}/out/model.gguf" in said
    converter(tmp_path / "bin", "sys.exit('Model X is not supported')", monkeypatch)
    with pytest.raises(InputError, match="ended with status 1: Model X is not supported"):
        lora.export(tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()
