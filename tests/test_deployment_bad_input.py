"""Wrong files, names and certificates: one clear message on the side that can mend it, exit 2."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (the extra `flower`)")

from command import Result, fedtune, write_config
from test_deployment import METHODS, THERE

from fedtune.deploy import keys as key_files
from fedtune.deploy.keys import make_keys
from fedtune.deploy.processes import free_port

EXAMPLE = json.dumps({"instruction": "Name the capital.", "input": "France", "output": "Paris"}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", ["localhost"], ["north", "south"], days=2)
    (tmp_path / "data.jsonl").write_text(EXAMPLE)
    write_config(tmp_path / "c.yaml", {"data": {**THERE, "clients": 2}, "method": METHODS["fedavg-lora"]})
    return tmp_path


def client(folder: Path, *extra: str, data: str = "data.jsonl", port: int = 1) -> Result:
    common = ("--server", f"localhost:{port}", "--keys", "keys/clients/north", "--data", data)
    return fedtune("client", *common, *extra, cwd=folder)


def refused(done: Result, message: str) -> None:
    assert done.status == 2, done.err
    assert message in " ".join(done.err.split()), done.err
    assert "Traceback" not in done.err


@contextmanager
def tls(folder: Path) -> Iterator[int]:
    """A server with the certificate in a folder, which ends every connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server/server.crt", folder / "server/server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                near, _ = listener.accept()
                context.wrap_socket(near, server_side=True).close()
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


def test_a_client_without_usable_data(folder: Path) -> None:
    refused(client(folder, data="none.jsonl"), "none.jsonl: there is no such file")
    (folder / "data.xlsx").write_text("a")
    refused(client(folder, data="data.xlsx"), "data.xlsx: this kind of file is not read")
    (folder / "empty.jsonl").write_text("")
    refused(client(folder, data="empty.jsonl"), "empty.jsonl")
    (folder / "accept.yaml").write_text("data_folder: elsewhere\n")
    refused(
        client(folder, "--accept", "accept.yaml"),
        "the data_folder that this machine's acceptance file allows",
    )
    (folder / "accept.yaml").write_text("max_byte: 5\n")
    refused(client(folder, "--accept", "accept.yaml"), "accept.yaml: max_byte")


def test_a_client_with_wrong_options(folder: Path) -> None:
    refused(
        fedtune("client", "--server", "localhost", "--keys", "keys", "--data", "d", cwd=folder),
        "write HOST:PORT",
    )
    refused(client(folder, "--field", "instruction"), "write OURS=THEIRS")
    refused(client(folder, "--field", "=question"), "write OURS=THEIRS")
    refused(client(folder, "--field", "output="), "data.fields: output is null, but every example needs one")
    refused(client(folder, "--device", "tpu"), "device must be auto, cpu, cuda or a GPU's name as cuda:1")
    (folder / "keys/clients/north/client.key").chmod(0o644)
    refused(client(folder), "is open to other users (mode 644)")


def test_a_server_of_another_authority_or_with_an_expired_certificate(folder: Path) -> None:
    make_keys(folder / "other", ["localhost"], ["north"], days=2)
    with tls(folder / "other") as port:
        refused(client(folder, port=port), "ca.crt does not vouch for")
    make_keys(folder / "elsewhere", ["other.example.org"], ["north"], days=2)
    for name in ("server.crt", "server.key"):
        (folder / "keys/server" / name).unlink()
    authority, key = key_files.open_authority(folder / "keys")
    own = key_files.ec.generate_private_key(key_files.CURVE())
    expired = key_files.server_certificate(authority, key, own, ["localhost"], 0)
    (folder / "keys/server/server.crt").write_bytes(expired.public_bytes(key_files.Encoding.PEM))
    (folder / "keys/server/server.key").write_bytes(key_files.private_pem(own))
    (folder / "keys/server/server.key").chmod(0o600)
    with tls(folder / "keys") as port:
        refused(client(folder, port=port), "certificate has expired")
    done = fedtune("server", "c.yaml", "--keys", "keys/server", "--out", "run", cwd=folder)
    refused(done, "server.crt expired on")
    assert not (folder / "run").exists()


def test_a_busy_port_too_few_keys_and_no_keys(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = fedtune(
            "server", "c.yaml", "--keys", "keys/server", "--port", port, "--out", "run", cwd=folder
        )
        refused(done, f"port {port} of this machine is in use")
    free = ("--port", str(free_port()), "--out", "run")
    done = fedtune("server", "c.yaml", "data.clients=5", "--keys", "keys/server", *free, cwd=folder)
    refused(done, "data.clients is 5, but keys/server/clients.json knows 2 clients: north, south")
    done = fedtune("server", "c.yaml", "--keys", "nowhere", *free, cwd=folder)
    refused(done, "nowhere/ca.crt: there is no such file; fedtune keys makes it")
    done = fedtune("server", "c.yaml", "data.train=bundled", "--keys", "keys/server", *free, cwd=folder)
    refused(done, "data.train is bundled and transport.name flower")
    assert not (folder / "run").exists() and not (folder / "keys/server/flower").exists()


def test_keys_says_what_to_copy_where(tmp_path: Path) -> None:
    done = fedtune("keys", "fed", "--server", "localhost", "--clients", "north, south", cwd=tmp_path)
    assert done.status == 0, done.err
    assert "Copy to client 1 (south): fed/clients/south/" in done.out
    assert (tmp_path / "fed/clients/south/client.key").is_file()
    refused(fedtune("keys", "new", "--clients", "north", cwd=tmp_path), "--server HOST")
    refused(fedtune("keys", "fed", "--clients", "a/b", cwd=tmp_path), "cannot be a client's name")
