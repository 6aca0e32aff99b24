"""Every registered method through Flower's simulation on Ray: the same bits as in process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import fedtune, lines, outcome, write_config
from other_processes import TRIED, answer, payloads, same_bits
from threads_of import threads

from fedtune.transport.flower import SimulatedChannel, simulation


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedChannel]:
    held = str(tmp_path_factory.mktemp("held"))
    with threads(1), simulation(partial(answer, held=held), workers=1) as found:
        yield found


@pytest.mark.parametrize(("name", "label"), TRIED)
def test_every_method_ends_with_the_bits_of_a_run_in_process(
    name: str, label: str, channel: SimulatedChannel
) -> None:
    same_bits(name, label, channel)


def test_secure_aggregation_has_the_same_sums(tmp_path: Path) -> None:
    pytest.importorskip("Crypto", reason="secure aggregation is not installed (the extra `privacy`)")
    document = {
        "data": {"clients": 3, "max_examples": 12, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 4, "every": 0},
        "federation": {"secure_aggregation": {"threshold": 0.6}},
    }
    write_config(tmp_path / "c.yaml", document)
    here = fedtune("run", "c.yaml", "--out", "here", "--quiet", cwd=tmp_path)
    assert here.status == 0, here.err
    there = fedtune(
        *("run", "c.yaml", "transport.name=flower-simulation", "--quiet", "--out", "there"), cwd=tmp_path
    )
    assert there.status == 0, there.err
    wanted, found = outcome(tmp_path / "here"), outcome(tmp_path / "there")
    assert found["final"] == wanted["final"]
    assert payloads(found["wire"]) == payloads(wanted["wire"])
    assert {entry["kind"] for entry in found["wire"]} == {"train", "secure-aggregation"}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_and_a_file_a_client_have_the_same_bits(kind: str, tmp_path: Path) -> None:
    """In process, in processes of this machine and on Ray."""
    pytest.importorskip("bitsandbytes", reason="quantisation is not installed (the extra `quant`)")
    (tmp_path / "sites" / "east").mkdir(parents=True)
    rows = [json.dumps({"instruction": f"Add {n} and 1.", "output": str(n + 1)}) for n in range(14)]
    (tmp_path / "sites" / "north.jsonl").write_text("\n".join(rows[:4]))
    (tmp_path / "sites" / "south.csv").write_text("instruction,output\nAdd 1 and 1.,2\nAdd 2 and 2.,4\n")
    (tmp_path / "sites" / "east" / "a.jsonl").write_text("\n".join(rows[4:10]))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "north.jsonl").write_text("\n".join(rows[10:]))
    document = {
        "model": {"name": "bundled", "quantization": kind},
        "data": {"train": "sites", "clients": "files", "holdout": {"source": "held"}, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 2, "lr": 0.01, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "every": 0},
    }
    write_config(tmp_path / "c.yaml", document)
    ways: dict[str, tuple[str, ...]] = {"here": (), "workers": ("transport.workers=2",)}
    if kind == "nf4":  # of int8 a second start of Ray would show nothing new
        ways["flower"] = ("transport.name=flower-simulation",)
    found = {}
    for name, settings in ways.items():
        done = fedtune("run", "c.yaml", *settings, "--out", name, "--quiet", cwd=tmp_path)
        assert done.status == 0, done.err
        found[name] = outcome(tmp_path / name)
    about = json.loads((tmp_path / "here" / "environment.json").read_text())["model"]
    assert about["quantization"] == kind
    for name in ways:
        assert found[name]["final"] == found["here"]["final"]
        assert found[name]["rounds"] == found["here"]["rounds"]
        assert payloads(found[name]["wire"]) == payloads(found["here"]["wire"])


def test_a_config_runs_unchanged_with_drop_outs_delays_and_a_resume(tmp_path: Path) -> None:
    document = {
        "seed": 6,  # one client drops out in each of the first two rounds
        "data": {"clients": 3, "max_examples": 24, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
        "evaluation": {"tasks": ["loss"], "max_examples": 8},
        "federation": {"quorum": 1, "simulate": {"dropout": 0.2, "delay_s": 1.0}, "deadline_s": 1.9},
        "checkpoints": {"journal": "always"},
    }
    write_config(tmp_path / "c.yaml", document)
    here = fedtune("run", "c.yaml", "--out", "here", "--quiet", cwd=tmp_path)
    assert here.status == 0, here.err
    flower = ("transport.name=flower-simulation", "--quiet")
    killed = fedtune(
        "run", "c.yaml", *flower, "--out", "there", cwd=tmp_path, die_at=2, watched="round-0002.replies"
    )
    assert killed.status == -9, killed.err
    there = fedtune("run", "c.yaml", *flower, "--resume", "there", cwd=tmp_path)
    assert there.status == 0, there.err
    wanted, found = outcome(tmp_path / "here"), outcome(tmp_path / "there")
    assert found["final"] == wanted["final"]
    assert found["rounds"] == wanted["rounds"]
    assert any(entry["left_out"] for entry in wanted["rounds"][1:])
    assert found["wire"] == wanted["wire"]
    assert lines(tmp_path / "there/memory.jsonl") == lines(tmp_path / "here/memory.jsonl")
