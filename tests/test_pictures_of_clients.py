"""Pictures that lie with their owners: a folder a client, here and over TLS; runs that were killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

pytest.importorskip("diffusers")

from command import fedtune as command
from command import outcome, write_config
from small_pipelines import PROMPTS, configuration, drawn_plainly, save_pictures, save_pipeline

import fedtune
from fedtune.config.file import load_config
from fedtune.data.examples import Example
from fedtune.data.pictures import pictures_by_client
from fedtune.data.reading import Reading
from fedtune.errors import InputError
from fedtune.federation.client import local_examples, local_records
from fedtune.federation.data import prepare_data
from fedtune.models.picture_results import LORA

OWNERS = {"north": 4, "south": 3}
BOTH = ["q_proj", "to_q"]  # of the text encoder and of the UNet


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, the pictures of two owners, and some that the server scores."""
    folder = tmp_path_factory.mktemp("site")
    save_pipeline(folder / "pipeline")
    made = save_pictures(folder / "made", {**OWNERS, "held": 2}, caption=False)
    for name in OWNERS:
        shutil.move(made / name, folder / "owners" / name)
    shutil.move(made / "held", folder / "held")
    return folder


def document(**method: Any) -> dict[str, Any]:
    """Two rounds on pictures of two owners; paths start from the folder of `site`."""
    found = configuration(Path("pipeline"), Path("owners"), **method)
    found["data"] = {
        "train": "owners",
        "clients": "files",
        "holdout": {"source": "held"},
        "pictures": {"caption": "a photo of {folder}"},
    }
    return found


def test_every_folder_is_a_client(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site)
    split = prepare_data(load_config(write_config(site / "c.yaml", document())), pooled=False)
    assert [client["name"] for client in split.partition["clients"]] == ["north", "south"]
    assert {client: len(items) for client, items in split.clients.items()} == {0: 4, 1: 3}
    assert {example.instruction for example in split.clients[1]} == {"a photo of south"}
    assert len(split.evaluation) == 2
    # over a network a client reads its own folder, and has the same
    settings = load_config(site / "c.yaml").data.pictures
    own = local_examples(Path("owners/north"), {}, Reading(), settings)
    assert [whole(one) for one in own] == [whole(one) for one in split.clients[0]]
    assert local_records(Path("owners/south")) == 3


def whole(example: Example) -> tuple[str, ...]:
    """All of an example but where its file is said to be."""
    return example.instruction, example.output, example.category, Path(example.picture).name


def test_held_out_pictures_of_each_owner(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site / "owners" / "south", tmp_path / "own" / "south")
    config = document()
    config["data"] |= {"train": str(site / "owners"), "holdout": {"source": str(tmp_path / "own")}}
    split = prepare_data(load_config(write_config(tmp_path / "c.yaml", config)), pooled=False)
    assert split.owners == (1, 1, 1)
    (tmp_path / "own" / "south").rename(tmp_path / "own" / "nobody")
    with pytest.raises(InputError, match='file of "nobody", and no client'):
        prepare_data(load_config(tmp_path / "c.yaml"), pooled=False)


def test_what_folders_of_clients_can_lack(tmp_path: Path) -> None:
    def refused(said: str, source: Path = tmp_path / "owners") -> None:
        with pytest.raises(InputError, match=said) as error:
            pictures_by_client(str(source), "c", Reading(what="data.train"))
        assert "\n" not in str(error.value)

    refused("is not there")
    owners = save_pictures(tmp_path / "owners", {"north": 1}, caption=False)
    assert list(pictures_by_client(str(owners), "c", Reading())) == ["north"]
    (owners / "empty").mkdir()
    refused("data.train, client empty: .* holds no examples; at least one is needed")
    (owners / "empty").rmdir()
    shutil.copy(owners / "north" / "0.png", owners / "stray.png")
    refused(r"stray\.png is of no client; with data\.clients: files")
    (owners / "stray.png").rename(owners / "north" / "bad.png")
    (owners / "metadata.jsonl").write_text("")
    refused(r"metadata\.jsonl is of no client; with data\.clients: files")
    (owners / "metadata.jsonl").unlink()
    (owners / "north" / "bad.png").write_bytes(b"x")
    refused("bad.png: it is no picture that can be read")
    reading = Reading(skip=True, what="data.train")
    assert len(pictures_by_client(str(owners), "c", reading)["north"]) == 1
    assert [place for place, _ in reading.skipped] == ["bad.png"]
    with pytest.raises(InputError, match="is no folder"):
        local_examples_of(owners / "north" / "0.png")


def local_examples_of(place: Path) -> list[Example]:
    config = load_config(write_config(place.parent / "c.yaml", document()))
    return local_examples(place, {}, Reading(), config.data.pictures)


def test_a_killed_run_ends_with_the_same_bits(site: Path) -> None:
    """SIGKILL in the second round, while its checkpoint is written; UNet and text encoder are trained."""
    write_config(site / "both.yaml", document(lora={"rank": 2, "alpha": 2, "targets": BOTH}))
    whole = command("run", "both.yaml", "--out", "whole", "--quiet", cwd=site)
    assert whole.status == 0, whole.err
    cut = command(
        "run", "both.yaml", "--out", "cut", "--quiet", cwd=site, die_at=2, watched="cut/checkpoints/round"
    )
    assert cut.status < 0 and not (site / "cut" / "final").exists()
    again = command("run", "both.yaml", "--resume", "cut", "--quiet", cwd=site)
    assert again.status == 0, again.err
    found, wanted = outcome(site / "cut"), outcome(site / "whole")
    assert found["final"] == wanted["final"] and found["rounds"] == wanted["rounds"]
    parts = {name.split(".")[0] for name in load_file(site / "cut" / "final" / LORA)}
    assert parts == {"unet", "text_encoder"}


def test_plain_diffusers_takes_the_text_encoders_lora(site: Path, tmp_path: Path) -> None:
    from fedtune.models.pipelines import Drawing, draw_pictures

    config = document(lora={"rank": 2, "alpha": 4, "targets": BOTH}, lr=0.1)
    config["model"]["name"] = str(site / "pipeline")
    config["data"] |= {"train": str(site / "owners"), "holdout": {"source": str(site / "held")}}
    run = fedtune.run(config, out=tmp_path / "run", progress=False)
    factors = load_file(run.path / "final" / LORA)
    moved = [n for n, t in factors.items() if n.startswith("text_encoder.") and "lora_B" in n and t.any()]
    assert moved
    (folder,) = run.export(tmp_path / "lora")
    ours = draw_pictures(run.model(), run.tokenizer(), PROMPTS, [5, 6], Drawing(steps=3, guidance=2.0))
    theirs = drawn_plainly(site / "pipeline", folder)
    assert np.array_equal(theirs, ours.numpy())
    # without the text encoder's part it would be another picture
    from safetensors.torch import save_file

    unet = {name: tensor for name, tensor in factors.items() if name.startswith("unet.")}
    (tmp_path / "half").mkdir()
    save_file(unet, tmp_path / "half" / LORA)
    half = drawn_plainly(site / "pipeline", tmp_path / "half")
    assert not np.array_equal(half, theirs)


@pytest.mark.slow
def test_two_owners_over_tls_end_with_the_bits_of_one_process(site: Path, tmp_path: Path) -> None:
    """Each has its folder; the server has the pipeline, and the pictures that it scores, and no others."""
    pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")
    from deployed import Site

    for name in ("pipeline", "held", "owners"):
        shutil.copytree(site / name, tmp_path / name)
    here = document(lora={"rank": 2, "alpha": 2, "targets": BOTH})
    here |= {"evaluation": {"every": 0, "tasks": ["denoising-loss"]}}
    there = {**here, "data": {**here["data"], "train": "clients", "clients": 2}}
    write_config(tmp_path / "here.yaml", here)
    write_config(tmp_path / "there.yaml", there)
    with Site(tmp_path, "north,south", seconds=600) as federation:
        for number, name in enumerate(OWNERS):
            federation.client(number, "--data", f"owners/{name}")
        federation.server("there.yaml", "--out", "there", "--quiet")
        done = command("run", "here.yaml", "--out", "here", "--quiet", cwd=tmp_path)
        assert done.status == 0, done.err
        assert federation.status("server") == 0, federation.logs()
        found, wanted = outcome(tmp_path / "there"), outcome(tmp_path / "here")
        assert found["final"] == wanted["final"]
        assert found["summary"]["evaluation"] == wanted["summary"]["evaluation"]
        assert found["summary"]["payload_bytes"] == wanted["summary"]["payload_bytes"]
        assert federation.says("north", "4 examples in owners/north")
        assert federation.says("south", "it reads of each example: picture, caption")
