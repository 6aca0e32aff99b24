"""A federation over TLS on loopback, with real processes, ends as the same one in a process."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import fedtune, outcome, write_config
from deployed import Site, reverse_proxy

from fedtune.core.wire import Content, decode, encode
from fedtune.federation import checkpoint
from fedtune.federation.folder import RunFolder

METHODS: dict[str, dict[str, Any]] = {
    "fedavg-lora": {"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.01, "lora": {"rank": 2}},
    "one-shot": {
        **{"name": "fedavg", "rounds": 1, "local_epochs": 2, "batch_size": 4, "lr": 0.01},
        **{"lora": {"rank": 2}, "arrival": "asynchronous"},
    },
    "scaffold": {
        **{"name": "fedavg", "rounds": 2, "batch_size": 4, "lr": 0.05, "lora": {"rank": 2}},
        **{"control_variates": True, "optimizer": "sgd"},
    },
    "fedkseed": {
        **{"name": "fedkseed", "rounds": 2, "seeds": 4096, "local_steps": 10, "batch_size": 4},
        **{"lr": 1e-4, "epsilon": 1e-3},
    },
    "fedbiot": {
        **{"name": "fedbiot", "rounds": 2, "local_steps": 2, "batch_size": 4, "lr": 0.01},
        **{"adapter_layers": 1, "lora": {"rank": 2, "alpha": 4.0}},
        **{"alignment": {"steps_before": 2, "steps": 1, "batch_size": 4}},
    },
    "fedcybgd": {"name": "fedcybgd", "rounds": 1, "local_epochs": 1, "batch_size": 4, "lr": 1e-3},
}
METHODS["secure"] = METHODS["fewer-bytes"] = METHODS["fedavg-lora"]
METHODS["scored"] = METHODS["scored-secure"] = METHODS["fedavg-lora"]
METHODS["own-and-tuned"] = METHODS["fedavg-lora"] | {"own": ["lora_B"], "fine_tune": {"local_steps": 1}}
METHODS["residual"] = METHODS["fedavg-lora"] | {"aggregation": "residual"}
FEDERATIONS = {
    "secure": {"secure_aggregation": {"threshold": 0.6}},
    "scored-secure": {"secure_aggregation": {"threshold": 0.6}},
    "fewer-bytes": {"wire": {"dtype": "int4", "top_k": 0.3, "error_feedback": True}},
}
HERE = {"train": "bundled", "clients": 3, "max_examples": 24, "max_length": 64}
THERE = {"train": "clients", "clients": 3, "max_length": 64, "holdout": {"source": "bundled"}}
PUBLIC = {"source": "bundled", "max_examples": 20}


def config(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """One of the methods above, with data here or with the clients."""
    public = {"public": PUBLIC} if name == "fedbiot" else {}
    evaluation: dict[str, Any] = {"tasks": ["loss"], "max_examples": 8, "every": 0}
    if name.startswith("scored"):  # the server has no example of its own
        public, evaluation = {"holdout": {"client_fraction": 0.25}}, {"tasks": ["loss"], "where": "clients"}
    return {
        "data": {**data, **public},
        "method": METHODS[name],
        "model": {"device": "cpu"},
        "evaluation": evaluation,
        "federation": FEDERATIONS.get(name, {}),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ["fedavg-lora", "one-shot", "scaffold"],
        ["fedkseed", "fedbiot", "fedcybgd"],
        ["secure", "fewer-bytes", "residual"],
        ["own-and-tuned"],
        ["scored", "scored-secure"],
    ],
)
def test_three_clients_over_tls_end_with_the_bits_of_one_process(names: list[str], tmp_path: Path) -> None:
    with Site(tmp_path, "north,south,west", seconds=900) as site, ExitStack() as closing:
        site.split(config("fedavg-lora" if names[0] == "scored" else names[0], HERE))
        behind = None
        if shutil.which("nginx"):  # one client comes through the reverse proxy of the docs
            proxy, behind = reverse_proxy("nginx", tmp_path, tmp_path / "keys", site.port)
            closing.callback(proxy.wait, 20)
            closing.callback(proxy.terminate)
        for client in range(3):
            site.client(client, port=behind if client == 2 else None)
        for name in names:  # the clients stay, and come back to each new server by themselves
            write_config(tmp_path / "here.yaml", config(name, HERE))
            write_config(tmp_path / "there.yaml", config(name, THERE))
            site.server("there.yaml", "--out", f"{name}-there", "--quiet")
            here = fedtune("run", "here.yaml", "--out", f"{name}-here", "--quiet", cwd=tmp_path)
            assert here.status == 0, here.err
            assert site.status("server") == 0, site.logs()
            found, wanted = outcome(tmp_path / f"{name}-there"), outcome(tmp_path / f"{name}-here")
            if "own" in METHODS[name]:  # each has its own part in its own folder, and nobody else has it
                assert kept_there(site, tmp_path) == kept_here(tmp_path / f"{name}-here")
                assert not any("client-" in file for file in found["final"])
            else:
                assert found["final"] == wanted["final"], name
                assert found["summary"]["evaluation"] == wanted["summary"]["evaluation"]
            if name.startswith("scored"):
                assert [r["eval"] for r in found["rounds"]] == [r["eval"] for r in wanted["rounds"]]
                assert found["summary"]["scored"] == {"clients": [0, 1, 2], "left_out": {}}
                assert found["summary"]["evaluation_bytes"] == wanted["summary"]["evaluation_bytes"]
                assert found["summary"]["per_client"] == wanted["summary"]["per_client"]
                assert (found["summary"]["per_client"] == {}) == (name == "scored-secure")
            assert found["summary"]["payload_bytes"] == wanted["summary"]["payload_bytes"]
            assert [r["clients"] for r in found["rounds"]] == [r["clients"] for r in wanted["rounds"]]
        servers = [path for path in site.server_files(f"{names[0]}-there") if b"data-" in path.read_bytes()]
        assert servers == []  # nobody but the client knows where its data are


def kept_here(run: Path) -> dict[int, bytes]:
    """What each client of a simulation keeps, in the newest checkpoint."""
    digest = RunFolder.open(run).config_sha256()
    newest = checkpoint.rounds(run / "checkpoints")[-1]
    kept = checkpoint.load(run / "checkpoints", newest, config_sha256=digest).clients
    return {client: encode(Content(state)) for client, state in kept.items()}


def kept_there(site: Site, folder: Path) -> dict[int, bytes]:
    """The same of clients over a network, from their own folders."""
    kept = {}
    for client, name in enumerate(site.names):
        newest = max((folder / "keys/clients" / name / "state").glob("*/round-*"))
        kept[client] = encode(Content(decode(newest.read_bytes()).payload))
    return kept


@pytest.mark.network
@pytest.mark.slow
def test_a_client_comes_back_after_its_network_and_its_server_were_away(tmp_path: Path) -> None:
    """Through a proxy that takes connections when the server behind it is away, and ends them."""
    document = config("fedavg-lora", {**THERE, "clients": 1})
    document["method"] = {**document["method"], "rounds": 3}
    write_config(tmp_path / "c.yaml", document)
    with Site(tmp_path, "north", seconds=900) as site:
        site.split(config("fedavg-lora", {**HERE, "clients": 1}))
        proxy = site.proxy()
        site.client(0, port=proxy.port)
        site.server("c.yaml", "--out", "run")
        site.wait(lambda: len(site.rounds("run")) >= 2, "round 1")
        site.kill("server")
        site.wait(lambda: site.says("north", "the connection ended; trying again"), "the client's notice")
        site.server("c.yaml", "--resume", "run")
        site.wait(lambda: len(site.rounds("run")) >= 3, "round 2")
        proxy.cut(10)
        assert site.status("server") == 0, site.logs()
        assert [entry["clients"] for entry in site.rounds("run")] == [[], [0], [0], [0]]
