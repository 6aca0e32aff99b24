"""The configurations in the tree: all are valid, and those on the bundled model and data run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from reproduced import load

from fedtune.config.file import dump_config, dump_settings, load_config, parse_config
from fedtune.config.schema import RunConfig
from fedtune.config.selection import AtRandom
from fedtune.core import loop, wire
from fedtune.core.types import TensorSpec
from fedtune.federation.progress import Silent
from fedtune.federation.run import run
from fedtune.methods import registry
from fedtune.models.load import load_model
from fedtune.models.save import load_result

PROJECT = Path(__file__).resolve().parents[1]
ROOT = PROJECT / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))
BUNDLED = [  # of models of text; test_text_to_image.py runs the other
    path
    for path in FILES
    if (c := load_config(path)).model.name == "bundled"
    and c.data.train == "bundled"
    and c.model.task != "text-to-image"
]


def ident(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


@pytest.mark.parametrize("path", FILES, ids=ident)
def test_every_file_is_valid_and_says_what_it_is(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    (tmp_path / "short.yaml").write_text(dump_settings(config), encoding="utf-8")
    assert load_config(tmp_path / "short.yaml").resolved() == config.resolved()
    assert path.read_text().startswith("# ")


def test_files_that_differ_in_name_differ_in_settings() -> None:
    seen: dict[str, Path] = {}
    for path in FILES:
        other = seen.setdefault(load_config(path).sha256(), path)
        assert other == path, f"{ident(path)} repeats {ident(other)}"


def quick(config: RunConfig) -> RunConfig:
    """The same run with two clients, or as many as it chooses from, one step each, and a few examples."""
    settings: dict[str, Any] = config.resolved()
    evenly = config.federation.selection == AtRandom()
    clients = 2 if evenly else settings["data"]["clients"]
    settings["data"] |= {"max_examples": 100 if clients > 2 else 40, "clients": clients}
    settings["evaluation"] |= {"tasks": ["loss"], "max_examples": 8, "every": 0}
    if "local_steps" in settings["method"]:
        settings["method"] |= {"local_steps": 1, "batch_size": 2}
        if "local_epochs" in settings["method"]:
            settings["method"]["local_epochs"] = None
    if "rounds" in settings["method"]:
        regions = settings["method"].get("regions")
        settings["method"]["rounds"] = regions["rounds"] if regions else 1
    return parse_config(settings, "quick")


@pytest.mark.parametrize("path", BUNDLED, ids=ident)
def test_the_bundled_ones_run(path: Path, tmp_path: Path) -> None:
    config = quick(load_config(path))
    sends = registry.build(config.method, config.seed).uses_wire
    summary = run(config, tmp_path / "run", Silent())
    assert summary["status"] == "done"
    assert summary["evaluation"]["loss"].keys() == summary["zero_shot"]["loss"].keys()
    assert (summary["trainable_parameters"] > 0) == (config.method_name != "zero-shot")
    assert (summary["payload_bytes"]["up"] > 0) == sends

    def base(name: str) -> Any:
        return load_model(name, dtype="float32", initial="pretrained", seed=0, base=tmp_path)

    final = tmp_path / "run" / "final"
    results = [folder for folder in final.iterdir() if folder.is_dir()]
    beside = {"standalone": 2, "fedbiot": 1, "fedot": 1, "offsite-tuning": 1}  # one a client, or AdapEmu
    personal = getattr(config.method, "personal", "")
    peers = getattr(config.method, "graph", None) is not None
    assert len(results) == (2 if personal or peers else beside.get(config.method_name, 0))
    alone = config.method_name == "standalone" or personal == "instead" or peers
    for folder in results if alone else [final, *results]:
        assert load_result(folder, base).tokenizer.pad_token_id is not None


def test_fedkseed_on_sst2_beats_the_untrained_model(shared_data: Path, tmp_path: Path) -> None:
    """Two of its five rounds, 160 steps of forward passes, take more than half a nat off what is held out."""
    config = load_config(ROOT / "fedkseed_sst2.yaml", ["method.rounds=2", "evaluation.max_examples=64"])
    model = shared_data.parent / "models" / Path(config.model.name).name
    paths = {"train": shared_data / "glue/sst2_train.jsonl", "holdout": shared_data / "glue/sst2_dev.jsonl"}
    settings: dict[str, Any] = config.resolved()
    settings["model"]["name"], settings["data"]["train"] = str(model), str(paths["train"])
    settings["data"]["holdout"]["source"] = str(paths["holdout"])
    summary = run(parse_config(settings, "sst2"), tmp_path / "run", Silent())
    after, before = summary["evaluation"]["loss"]["loss"], summary["zero_shot"]["loss"]["loss"]
    assert after < before - 0.5


def test_the_configuration_page_says_which_settings_are_needed() -> None:
    """A setting without a default is needed, whatever its type; only the method has one from the parser."""
    rows = load("configuration").page().splitlines()
    said = {row.split("`")[1]: row.split(" | ")[2] for row in rows if row.startswith("| `")}
    assert said["federation.privacy.clip"] == said["federation.privacy.noise_multiplier"] == "needed"
    assert said["evaluation.judge.url"] == "needed"
    assert said["federation.privacy.delta"] == "`1e-05`"
    assert [setting for setting, default in said.items() if "fedavg" in default] == ["method"]


def test_the_configuration_page_is_current() -> None:
    page = load("configuration").page()
    now = (PROJECT / "docs/configuration.md").read_text(encoding="utf-8")
    assert now == page, "run reproduce/configuration.py configuration"
    for setting in ("`seed`", "`data.partition.alpha`", "`method.lora.client_ranks`", "`checkpoints.keep`"):
        assert f"| {setting} |" in page


def test_the_pages_name_files_and_limits_that_exist() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in (PROJECT / "docs").glob("*.md")}
    named = {
        file
        for text in pages.values()  # `/a/path` is another project's
        for file in re.findall(
            r"\b(?:configs|docs|tests|fedtune)/[\w/-]+(?:\.\w+)+", re.sub("`/[^`]*`", "", text)
        )
    }
    assert "configs/fedit.yaml" in named
    assert [file for file in sorted(named) if not (PROJECT / file).is_file()] == []
    format_page = pages["wire.md"]
    assert f"`{wire.MAGIC.decode()}`" in format_page and f"| version | 1 | {wire.VERSION} |" in format_page
    assert f"the header has {wire.HEADER.size} bytes" in format_page
    assert [name for name in wire.DTYPES if f"`{name}`" not in format_page] == []
    room = wire.manifest_bytes({}), wire.manifest_bytes({"a": TensorSpec(torch.int8, (1,))})
    assert f"{room[1] - room[0] - 3} bytes more for each, and {room[0] >> 10} KiB" in format_page
    assert f"open, {loop.OPEN_SHAPE_LIMIT >> 30} GiB" in format_page
    assert f"inflate to {wire.MANIFEST_LIMIT >> 20} MiB and to no more than" in format_page
    assert f"{wire.MANIFEST_FREE >> 10} KiB and four bytes" in format_page and wire.MANIFEST_RATIO == 4
    assert f"at\n  most {wire.RANK_LIMIT} dimensions" in format_page
