"""Settings of the ways to reach clients, the operator's limits, and keys."""

from __future__ import annotations

import datetime
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from command import fedtune, write_config

from fedtune.config.file import parse_config
from fedtune.config.yaml_text import load_yaml
from fedtune.deploy.keys import make_keys, read_identity
from fedtune.errors import InputError
from fedtune.federation.data import prepare_data
from fedtune.transport.acceptance import (
    EXAMPLE,
    Acceptance,
    NotAccepted,
    check_bytes,
    check_data,
    check_server,
    read_acceptance,
)

NETWORK = {"data": {"train": "clients", "holdout": {"source": "bundled"}}, "transport": {"name": "flower"}}


def merged(*changes: dict[str, Any]) -> dict[str, Any]:
    document = json.loads(json.dumps(NETWORK))
    for change in changes:
        for block, values in change.items():
            document.setdefault(block, {}).update(values)
    return document


def test_over_a_network_the_server_has_held_out_examples_alone() -> None:
    config = parse_config(merged({"evaluation": {"max_examples": 5}}), "test")
    split = prepare_data(config, pooled=False)
    assert (split.clients, len(split.evaluation), split.partition["clients"]) == ({}, 5, [])
    here = prepare_data(parse_config({"evaluation": {"max_examples": 5}}, "test"), pooled=False)
    assert split.evaluation == here.evaluation  # the same ones as on one machine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": "bundled"}}, "data.train is bundled and transport.name flower"),
        ({"transport": {"name": "in-process"}}, "data.train is clients and transport.name in-process"),
        ({"data": {"holdout": {"fraction": 0.1}}}, "data.holdout.source is missing"),
        ({"data": {"partition": {"name": "shards"}}}, "for examples that the server has"),
        ({"data": {"max_examples": 5}}, "for examples that the server has"),
        ({"federation": {"simulate": {"dropout": 0.1}}}, "federation.simulate is for one machine"),
        (
            {"model": {"task": "classification"}, "evaluation": {"tasks": ["loss", "accuracy"]}},
            "data.labels is missing",
        ),
        ({"data": {"labels": ["a", "b"]}}, "data.labels are for model.task: classification"),
        ({"transport": {"workers": 2}}, "workers are for simulated clients .name: in-process., got flower"),
    ],
)
def test_what_a_network_does_not_go_with(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config(merged(change), "test")


def test_waiting_belongs_to_a_network() -> None:
    with pytest.raises(InputError, match="wait_s belongs to name: flower, got in-process"):
        parse_config({"transport": {"wait_s": 5.0}}, "test")
    assert parse_config(merged({"transport": {"wait_s": 5.0}}), "test").transport.wait_s == 5.0


def test_run_does_not_start_a_network_and_writes_nothing(tmp_path: Path) -> None:
    write_config(tmp_path / "c.yaml", NETWORK)
    done = fedtune("run", "c.yaml", "--out", "run", cwd=tmp_path)
    assert done.status == 2
    assert "fedtune server" in done.err or "not installed" in done.err
    assert not (tmp_path / "run").exists()


def test_labels_fix_the_classes_and_their_order(tmp_path: Path) -> None:
    rows = [{"instruction": f"w{i}", "output": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "model": {"name": "roberta", "task": "classification"},
        "data": {"train": str(tmp_path / "d.jsonl"), "clients": 2, "labels": ["b", "a", "c"]},
        "evaluation": {"tasks": ["loss"]},
    }
    assert prepare_data(parse_config(document, "test"), pooled=False).labels == ("b", "a", "c")
    document["data"]["labels"] = ["a", "c"]  # type: ignore[index]
    with pytest.raises(InputError, match=r"not in data.labels: \['b'\]"):
        prepare_data(parse_config(document, "test"), pooled=False)


LIMITS = {"methods": ["fedavg"], "max_bytes": 1000, "max_local_steps": 10}


def test_what_an_operator_accepts(tmp_path: Path) -> None:
    limits = read_acceptance({**LIMITS, "data_folder": str(tmp_path / "data")}, "accept.yaml")
    check_bytes(limits, 1000, "order")
    with pytest.raises(NotAccepted, match="the reply has 1,001 bytes, and its operator accepts 1,000"):
        check_bytes(limits, 1001, "reply")
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jsonl").touch()
    (tmp_path / "data/link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "data/own.jsonl").touch()
    check_data(limits, tmp_path / "data/own.jsonl")
    for outside in ("secret.jsonl", "data/link.jsonl", "data/../secret.jsonl"):
        with pytest.raises(InputError, match=r"is not in .*data, the data_folder"):
            check_data(limits, tmp_path / outside)
    anything = read_acceptance(None, "accept.yaml")
    check_bytes(anything, 10**12, "order")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": ["fedavg"]}, r'method: is not known here\. Did you mean "methods"\?'),
        ({"max_epsilom": 3.0}, r'max_epsilom: is not known here\. Did you mean "max_epsilon"\?'),
        ({"max_bytes": "1 GB"}, "max_bytes: Input should be a valid integer, got '1 GB'"),
        ({"max_bytes": 0}, "max_bytes: Input should be greater than or equal to 1, got 0"),
        ({"methods": []}, "methods: List should have at least 1 item"),
        ({"models": ["abc"]}, r"models\.0: String should match pattern .* got 'abc'"),
        ({"min_threshold": 1}, "min_threshold: Input should be greater than or equal to 2, got 1"),
        ({"min_threshold": 5, "min_clients": 4}, "min_threshold 5 is above min_clients 4: no run has both"),
        ({"min_clip": 2.0, "max_clip": 1.0}, "min_clip 2 is above max_clip 1: no run has both"),
        ({"noise_by": "me"}, "noise_by: Input should be 'clients' or 'server', got 'me'"),
        (["methods"], "Input should be a valid dictionary"),
    ],
)
def test_wrong_limits_are_named(wrong: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"^accept.yaml: {said}.*") as refused:
        read_acceptance(wrong, "accept.yaml")
    assert str(refused.value).endswith(f"here are known: {', '.join(Acceptance.model_fields)}")


def test_the_example_names_every_demand_and_limits_nothing_until_its_lines_are_taken_up() -> None:
    assert read_acceptance(load_yaml(EXAMPLE, "example"), "example") == Acceptance()
    lines = [line.removeprefix("# ") for line in EXAMPLE.splitlines() if re.match(r"# \w+: ", line)]
    document = load_yaml("\n".join(lines), "example")
    assert set(document) == set(Acceptance.model_fields)
    read_acceptance(document, "example")


def test_what_is_trained_goes_to_no_other_server(tmp_path: Path) -> None:
    limits = read_acceptance({"servers": ["fed.example.org:443"]}, "accept.yaml")
    check_server(limits, "fed.example.org:443")
    for other in ("fed.example.org:444", "evil.example.org:443"):
        with pytest.raises(InputError, match=f"--server is {other}, and the servers of this machine's"):
            check_server(limits, other)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography", reason="comes with Flower (the extra `flower`)")
    from fedtune.deploy.keys import make_keys

    make_keys(tmp_path / "fed", ["fed.example.org", "10.0.0.1"], ["north", "south"], days=2)
    return tmp_path / "fed"


def test_keys_are_private_and_more_clients_can_come(made: Path) -> None:
    from fedtune.deploy.keys import check_client, check_server, make_keys, read_clients

    secrets = [made / "ca.key", made / "server/server.key", made / "clients/north/client.key"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}
    assert not [path for path in made.rglob("ca.key") if path.parent != made]
    own = made / "clients/north/accept.yaml"
    assert own.read_text() == EXAMPLE
    own.write_text("methods: [fedavg]\n")  # its operator's, and no new keys take it away
    before = {path: path.read_bytes() for path in secrets}
    assert make_keys(made, [], ["west", "north"], days=2) == ["north", "south", "west"]
    assert {path: path.read_bytes() for path in secrets} == before
    assert own.read_text() == "methods: [fedavg]\n" and (made / "clients/west/accept.yaml").exists()
    check_server(made / "server")
    assert [check_client(made / "clients" / name) for name in ("north", "south", "west")] == list(
        read_clients(made / "server").values()
    )


def test_what_is_wrong_with_keys_is_said(made: Path, tmp_path: Path) -> None:
    from fedtune.deploy.keys import check_client, check_server, make_keys

    for name in ("a,b", "../up", "", "-x"):
        with pytest.raises(InputError, match="cannot be a client's name"):
            make_keys(made, [], [name], days=1)
    with pytest.raises(InputError, match="--server"):
        make_keys(tmp_path / "new", [], ["north"], days=1)
    (made / "clients/north/client.key").chmod(0o640)
    with pytest.raises(InputError, match=r"client.key is open to other users \(mode 640\).*chmod 600"):
        check_client(made / "clients/north")
    (made / "clients/north/client.key").chmod(0o600)
    (made / "clients/north/client.key").write_text("nothing")
    with pytest.raises(InputError, match="not a private key"):
        check_client(made / "clients/north")
    with pytest.raises(InputError, match=r"client.key: there is no such file; fedtune keys makes it"):
        check_client(made / "server")
    make_keys(tmp_path / "other", ["x"], ["north"], days=1)
    (made / "server/ca.crt").write_bytes((tmp_path / "other/server/ca.crt").read_bytes())
    with pytest.raises(InputError, match=r"was not signed by ca.crt"):
        check_server(made / "server")


def test_an_expired_certificate_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.deploy import keys

    in_three_days = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=3)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return in_three_days

    monkeypatch.setattr(keys.datetime, "datetime", Later)
    with pytest.raises(InputError, match=r"server.crt expired on \d{4}-\d\d-\d\d"):
        keys.check_server(made / "server")


def test_clients_know_each_others_keys(tmp_path: Path) -> None:
    federation = tmp_path / "federation"
    make_keys(federation, ["localhost"], ["north", "south"], days=30)
    north, south = (read_identity(federation / "clients" / name) for name in ("north", "south"))
    assert north is not None and south is not None
    assert (north.number(), south.number()) == (0, 1)
    signature = north.sign(3, 0, b"keys")
    assert len(signature) == 96 and south.vouches(3, 0, b"keys", signature)
    others = [(2, 0, b"keys"), (3, 1, b"keys"), (3, 0, b"key"), (3, 2, b"keys"), (3, -1, b"keys")]
    assert not any(south.vouches(*what, signature) for what in others)
    assert not south.vouches(3, 0, b"keys", bytes(96))
    make_keys(federation, [], ["west"], days=30)  # who comes later is in everyone's new list
    again = read_identity(federation / "clients/north")
    assert again is not None and len(again.known) == 3
    (federation / "clients/south/clients.json").unlink()
    assert read_identity(federation / "clients/south") is None
    stranger = federation / "clients/west/clients.json"
    stranger.write_text(json.dumps(dict(list(json.loads(stranger.read_text()).items())[:2])))
    with pytest.raises(InputError, match=r"clients\.json does not have the key of .*client\.key"):
        read_identity(federation / "clients/west")
    stranger.write_text('{"north": "no key"}')
    with pytest.raises(InputError, match=r"clients\.json: the key of north is none"):
        read_identity(federation / "clients/west")


def test_the_servers_list_can_say_how_many_examples_a_client_has(made: Path) -> None:
    from fedtune.deploy.keys import expected_examples, make_keys, read_clients

    path, keys = made / "server/clients.json", read_clients(made / "server")
    assert expected_examples(made / "server") == {}
    path.write_text(
        json.dumps({"north": {"key": keys["north"], "examples": 24}, "south": {"key": keys["south"]}})
    )
    assert read_clients(made / "server") == keys
    assert expected_examples(made / "server") == {"north": 24}
    make_keys(made, [], ["west"], days=2)  # keeps what is expected, and tells clients nothing of it
    assert expected_examples(made / "server") == {"north": 24}
    assert read_clients(made / "server").keys() == {"north", "south", "west"}
    told = json.loads((made / "clients/west/clients.json").read_text())
    assert told == read_clients(made / "server")
    for entry in (
        24,
        {"examples": 3},
        {"key": 1},
        {"key": "x", "examples": 0},
        {"key": "x", "examples": True},
    ):
        path.write_text(json.dumps({"north": entry}))
        with pytest.raises(InputError, match=r"north must have its public key, or .*that it may register"):
            read_clients(made / "server")
    for entry in ({"key": "x", "examples": 2.5}, {"key": "x", "example": 3}):
        path.write_text(json.dumps({"north": entry}))
        with pytest.raises(InputError, match="1 or more; fedtune keys makes it"):
            expected_examples(made / "server")
