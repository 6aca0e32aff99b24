"""The reverse proxies of docs/proxy, nginx and Caddy: what is for clients passes, and nothing else."""

from __future__ import annotations

import http.client
import http.server
import shutil
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="comes with Flower (the extra `flower`)")

from deployed import reverse_proxy

from fedtune.deploy.keys import make_keys


class Upstream(http.server.BaseHTTPRequestHandler):
    """Stands for Flower's server: tells what path it was asked for."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        text = f"{self.path} {len(body)}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module", params=["nginx", "caddy"])
def sites(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, int, int]]:
    """The authority, and the ports of a proxy to our server and of one to a server of another authority."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp("proxy")
    ports, started = [], []
    for name in ("ours", "other"):
        make_keys(folder / name, ["localhost"], ["north"], days=1)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / name / "server/server.crt", folder / name / "server/server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = folder / f"proxy-{name}"
        place.mkdir()
        process, port = reverse_proxy(request.param, place, folder / "ours", server.server_address[1])
        ports.append(port)
        started.append((process, server))
    yield folder / "ours/server/ca.crt", ports[0], ports[1]
    for process, server in started:
        process.terminate()
        process.wait(20)
        server.shutdown()


def ask(authority: Path, port: int, path: str, size: int = 10) -> tuple[int, str]:
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    try:
        connection.request("POST", path, body=b"x" * size)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_what_is_for_clients_passes(sites: tuple[Path, int, int]) -> None:
    authority, port, _ = sites
    for path in ("activate-node", "pull-messages", "push-object", "send-node-heartbeat"):
        assert ask(authority, port, f"/v1/fleet/{path}") == (200, f"/v1/fleet/{path} 10")
    piece = 5 * 1024 * 1024 + 1000  # the largest that Flower sends
    assert ask(authority, port, "/v1/fleet/push-object", piece) == (200, f"/v1/fleet/push-object {piece}")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/push-messages",
        "/v1/fleet",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "//v1/control/start-run",
        "/v1/fleet//../control/start-run",
        "/v1/fleet/./register-node",
        "/docs",
        "/health",
    ],
)
def test_everything_else_does_not(path: str, sites: tuple[Path, int, int]) -> None:
    authority, port, _ = sites
    status, text = ask(authority, port, path)
    assert status in (301, 400, 404)  # 301 from /v1/fleet to /v1/fleet/, where there is nothing
    assert "control" not in text and "register" not in text


def test_a_body_larger_than_any_piece_is_refused(sites: tuple[Path, int, int]) -> None:
    authority, port, _ = sites
    try:
        status, _ = ask(authority, port, "/v1/fleet/push-object", 17 * 1024 * 1024)
    except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
        return  # nginx hangs up while the body is still coming
    assert status == 413


def test_another_program_on_the_servers_port_gets_nothing(sites: tuple[Path, int, int]) -> None:
    authority, _, port = sites
    assert ask(authority, port, "/v1/fleet/pull-messages")[0] == 502
