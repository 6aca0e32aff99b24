"""Training that goes on: from an adapter, and to more rounds than a run was to have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from command import fedtune as command
from model_families import save_folder
from safetensors.torch import load_file, save_file

import fedtune
from fedtune.errors import InputError

WORDS = [f"w{index}" for index in range(4, 64)]
ROWS = [
    {"instruction": " ".join(WORDS[i : i + 6]), "output": " ".join(WORDS[i + 1 : i + 5])} for i in range(16)
]
LORA = {"name": "fedavg", "rounds": 1, "local_steps": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}}
ADAPTER = {**LORA, "trainable": "adapter", "lora": None}
PROMPT = {**LORA, "trainable": "prompt", "lora": None, "prompt": {"tokens": 3}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", blocks=3)


def config(tiny: Path, method: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny), **more.pop("model", {})},
        "data": {"clients": 2, "template": "plain", "max_length": 32},
        "method": method,
        "evaluation": {"tasks": ["loss"], "max_examples": 2, "bootstrap": 0, "every": 0},
        **more,
    }


def ran(document: dict[str, Any], out: Path) -> fedtune.Run:
    return fedtune.run(document, data=ROWS, out=out, progress=False)


def final(run: fedtune.Run) -> str:
    files = sorted((run.path / "final").rglob("*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("method", [LORA, ADAPTER, PROMPT], ids=["lora", "adapter", "prompt"])
def test_training_goes_on_from_a_runs_adapter(method: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """With a rate so small that nothing moves, the result is what it began with."""
    first = ran(config(tiny, method), tmp_path / "first")
    still = {**method, "lr": 1e-30}
    again = ran(config(tiny, still, model={"adapter": str(first.path)}), tmp_path / "again")
    assert final(again) == final(first)
    from_folder = ran(
        config(tiny, still, model={"adapter": str(first.path / "final")}), tmp_path / "from-folder"
    )
    assert final(from_folder) == final(first) != final(ran(config(tiny, still), tmp_path / "anew"))
    assert len(json.loads((again.path / "environment.json").read_text())["model"]["adapter_sha256"]) == 64


def test_an_adapter_that_was_changed_since_is_not_gone_on_with(tiny: Path, tmp_path: Path) -> None:
    first = ran(config(tiny, LORA), tmp_path / "first")
    run = ran(config(tiny, {**LORA, "rounds": 2}, model={"adapter": str(first.path)}), tmp_path / "run")
    file = first.path / "final" / "adapter_model.safetensors"
    save_file({name: t + 1 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="began with another adapter"):
        run.rollback(1, progress=False)


def test_an_adapter_of_another_form_or_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    first = ran(config(tiny, LORA), tmp_path / "first")

    def refused(match: str, method: dict[str, Any], place: Path = first.path, base: Path = tiny) -> None:
        with pytest.raises(InputError, match=match):
            ran(config(base, method, model={"adapter": str(place)}), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused("its r is 2, and the run's 4", {**LORA, "lora": {"rank": 4}})
    refused("its lora_alpha is 32.0, and the run's 8.0", {**LORA, "lora": {"rank": 2, "alpha": 8.0}})
    refused("24 tensors are others", {**LORA, "lora": {"rank": 2, "targets": ["k_proj", "o_proj"]}})
    refused("its peft_type is LORA, and the run's PROMPT_TUNING", PROMPT)
    refused("of another form than method.trainable", ADAPTER)
    refused("trains no adapter; merge", {"name": "fedavg", "trainable": "full"})
    refused("aggregation: stack clients draw factors anew", {**LORA, "aggregation": "stack"})
    refused("no P-tuning encoder to go on with", {"name": "fedavg", "trainable": "p-tuning"})
    refused("does not go with fedkseed: it trains no adapter", {"name": "fedkseed"})
    refused("no such folder", LORA, place=tmp_path / "nowhere")
    refused("neither adapter_config.json nor adapter.json in it", LORA, place=tiny)
    other = save_folder(tmp_path / "other", blocks=2)
    refused("trained on a base model with SHA-256", LORA, base=other)


FORMS: dict[str, dict[str, Any]] = {
    "adam": {**LORA, "server_optimizer": {"name": "adam"}},
    "scaffold": {**LORA, "optimizer": "sgd", "control_variates": True, "lr_schedule": "cosine"},
    "diloco": {**LORA, "keep_optimizer": True, "server_optimizer": {"name": "nesterov", "lr": 0.7}},
    "own": {**LORA, "own": ["lora_B"]},
    "ditto": {**LORA, "ditto": 0.5},
    "stack": {**LORA, "aggregation": "stack"},
    "fedkseed-pro": {"name": "fedkseed-pro", "local_steps": 2, "lr": 1e-3, "seeds": 64},
    "infinite-pool": {"name": "infinite-pool", "local_steps": 2, "lr": 1e-3},
    "fedcybgd": {"name": "fedcybgd", "local_steps": 2, "batch_size": 4, "lr": 0.01},
    "fedbavg": {"name": "fedbavg", "local_steps": 2, "batch_size": 4, "lr": 0.01},
    "fedbiot": {
        "name": "fedbiot",
        "local_steps": 2,
        "batch_size": 4,
        "lr": 0.01,
        "adapter_layers": 1,
        "layer_dropout": 0.0,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_more_rounds_end_with_the_bits_of_a_run_that_had_them_from_the_start(
    form: str, tiny: Path, tmp_path: Path
) -> None:
    def document(rounds: int) -> dict[str, Any]:
        return config(tiny, {**FORMS[form], "rounds": rounds})

    whole = ran(document(2), tmp_path / "whole")
    run = ran(document(1), tmp_path / "run")
    before = final(run)
    more = run.resume(rounds=2, progress=False)
    assert final(more) == final(whole) != before
    assert [entry["round"] for entry in more.rounds] == [0, 1, 2]
    assert (run.path / "config.yaml").read_text() == (whole.path / "config.yaml").read_text()
    assert json.loads((run.path / "more-rounds.jsonl").read_text()) == {"from": 1, "to": 2, "after": 1}
    assert json.loads((run.path / "rounds-1" / "summary.json").read_text())["status"] == "done"
    assert more.summary["status"] == "done" and more.config == whole.config
    opened = fedtune.open(run.path, data=ROWS)
    assert opened.resume(progress=False).rounds[-1] == more.rounds[-1]  # nothing is left to do


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_extension_that_was_cut_short_is_finished(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation import reopening

    whole = ran(config(tiny, {**LORA, "rounds": 2}), tmp_path / "whole")
    run = ran(config(tiny, LORA), tmp_path / "run")
    for module, broken in ((reopening.checkpoint, "rename"), (reopening, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(module, broken, interrupted)
            with pytest.raises(KeyboardInterrupt):
                run.resume(rounds=2, progress=False)
    assert (run.path / "more-rounds.json").exists()
    again = fedtune.open(run.path, data=ROWS)
    assert final(again.resume(rounds=2, progress=False)) == final(whole)
    assert not (run.path / "more-rounds.json").exists()


def test_what_cannot_have_more_rounds_says_why(tiny: Path, tmp_path: Path) -> None:
    run = ran(config(tiny, {**LORA, "rounds": 2, "lr_over": "run"}), tmp_path / "run")
    with pytest.raises(InputError, match="lr_over: run the rates of the rounds that are done"):
        run.resume(rounds=3, progress=False)
    with pytest.raises(InputError, match=r"none taken away; checkpoints\.rollback=N"):
        run.resume(rounds=1, progress=False)
    privacy = {"noise_multiplier": 1.0, "clip": 1.0, "delta": 1e-3}
    pytest.importorskip("dp_accounting")
    private = ran(config(tiny, LORA, federation={"privacy": privacy, "quorum": 0.01}), tmp_path / "private")
    with pytest.raises(InputError, match="privacy was promised to its clients for so many rounds"):
        private.resume(rounds=2, progress=False)
    asynchronous = ran(config(tiny, {**LORA, "arrival": "asynchronous"}), tmp_path / "asynchronous")
    with pytest.raises(InputError, match="one-shot: set rounds: 1"):
        asynchronous.resume(rounds=2, progress=False)


def test_the_command_takes_a_run_and_its_rounds(tmp_path: Path) -> None:
    demo = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
    settings = ["data.clients=2", "data.max_examples=8", "method.local_steps=1", "method.local_epochs=null"]
    settings += ["evaluation.max_examples=2", "method.rounds=1", "--out", "run"]
    begun = command("run", demo, *settings, cwd=tmp_path)
    assert begun.status == 0, begun.err
    more = command("run", "--resume", "run", "method.rounds=2", "--json", cwd=tmp_path)
    assert more.status == 0, more.err
    assert json.loads(more.out)["rounds"] == 2
    wrong = command("run", "--resume", "nowhere", "method.rounds=2", cwd=tmp_path)
    assert wrong.status == 2 and "no config.yaml" in wrong.err
    none = command("run", "--out", "other", cwd=tmp_path)
    assert none.status == 2 and "a run needs a settings file" in none.err
