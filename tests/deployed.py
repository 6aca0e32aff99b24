"""A federation over TLS on this machine's loopback: real processes, and a proxy that counts and cuts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from command import lines, write_config

from fedtune.config.file import load_config
from fedtune.deploy.processes import free_port, stop
from fedtune.federation.data import prepare_data

PROGRAM = Path(sys.executable).with_name("fedtune")
HERE = Path(__file__).parent
PROXIES = HERE.parent / "docs/proxy"


class Proxy:
    """Passes TCP connections on, counts their bytes, and can be cut off for some time."""

    def __init__(self, port: int) -> None:
        self.up = self.down = 0  # bytes to and from the server
        self._to, self._cut_until, self._open = port, 0.0, list[socket.socket]()
        self._lose, self.lost = range(0), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Ends all connections, and passes none on for so long."""
        self._cut_until = time.monotonic() + seconds
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()

    def lose(self, sizes: range) -> None:
        """Breaks the next connection on which so many bytes come down at once, and does not pass them on."""
        self._lose = sizes

    def close(self) -> None:
        self._listener.close()
        self.cut(1e9)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if time.monotonic() < self._cut_until:
                    raise OSError("cut off")
                far = socket.create_connection(("127.0.0.1", self._to), timeout=5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for source, target, up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass_on, args=(source, target, up), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                    if len(data) in self._lose:
                        self._lose, self.lost = range(0), self.lost + 1
                        break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def reverse_proxy(
    program: str, folder: Path, keys: Path, upstream: int
) -> tuple[subprocess.Popen[bytes], int]:
    """nginx or caddy with the page's configuration, moved to a free port and to the folder."""
    port, log = free_port(), folder / "error.log"
    if program == "nginx":
        name, command = "nginx.conf", ["nginx", "-e", str(log), "-c"]
        before = f"pid {folder}/pid; daemon off; user root;\n"
        changes = {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "access_log off;": f"access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};",
        }
    else:
        name, command = "Caddyfile", ["caddy", "run", "--adapter", "caddyfile", "--config"]
        before, changes = "", {"https://fed.example.org:443": f"https://localhost:{port}"}
    text = (PROXIES / name).read_text()
    changes |= {"127.0.0.1:9443": f"127.0.0.1:{upstream}", "/etc/fedtune/server": str(keys / "server")}
    for there, here in changes.items():
        assert there in text
        text = text.replace(there, here)
    (folder / name).write_text(before + text)
    with log.open("ab") as said:
        process = subprocess.Popen([*command, folder / name], stdout=said, stderr=said)
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, port
        time.sleep(0.05)
    process.kill()
    raise AssertionError(log.read_text())


class Site:
    """One federation in a folder. Use as a context manager: every process that it started ends with it."""

    def __init__(self, folder: Path, names: str, seconds: float) -> None:
        self.folder, self.names = folder, names.split(",")
        self.port, self._end = free_port(), time.monotonic() + seconds
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._proxies: list[Proxy] = []
        made = self.run("keys", "keys", "--server", "localhost", "--clients", names)
        assert made.returncode == 0, made.stderr

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._processes):
            self.end(name)
        for proxy in self._proxies:
            proxy.close()

    def run(self, *arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        return subprocess.run(
            [PROGRAM, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=_env(),
        )

    def split(self, document: dict[str, Any]) -> None:
        """Writes the examples of each client of a configuration for one machine as a file of its own."""
        path = write_config(self.folder / "split.yaml", document)
        for client, examples in prepare_data(load_config(path), pooled=False).clients.items():
            rows = "".join(json.dumps(asdict(example)) + "\n" for example in examples)
            (self.folder / f"data-{client}.jsonl").write_text(rows)

    def proxy(self) -> Proxy:
        """A proxy in front of the server."""
        self._proxies.append(Proxy(self.port))
        return self._proxies[-1]

    def client(
        self,
        number: int,
        *extra: str | Path,
        port: int | None = None,
        program: tuple[str, ...] = (),
        name: str = "",
        state: str = "",
    ) -> None:
        """Starts a client; `program` stands for `fedtune client`, for one that does not behave."""
        own = self.names[number]
        self.start(
            name or own,
            *(program or (str(PROGRAM), "client")),
            *("--server", f"localhost:{port or self.port}", "--keys", f"keys/clients/{own}"),
            *("--data", f"data-{number}.jsonl", "--device", "cpu", *map(str, extra)),
            *(("--state", state) if state else ()),
        )

    def server(self, config: str, *arguments: str) -> None:
        """Starts the server."""
        self.start(
            "server",
            *(str(PROGRAM), "server", config, "--keys", "keys/server", "--port", str(self.port), *arguments),
        )

    def start(self, name: str, *command: str) -> None:
        with self.log(name).open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, cwd=self.folder, env=_env(), stdout=log, stderr=log, start_new_session=True
            )

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def says(self, name: str, text: str) -> bool:
        """Whether a process has said something, wherever its lines were broken."""
        path = self.log(name)
        return path.exists() and text in " ".join(path.read_text(errors="replace").split())

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Waits for something, as long as the whole test may still take."""
        while not condition():
            assert time.monotonic() < self._end, f"{what} did not happen\n{self.logs()}"
            server = self._processes.get("server")  # one that was killed ends with less than 0
            assert what == "the end of server" or server is None or (server.poll() or 0) <= 0, self.logs()
            time.sleep(0.1)

    def status(self, name: str) -> int:
        """The exit status of a process, once it has ended."""
        self.wait(lambda: self._processes[name].poll() is not None, f"the end of {name}")
        return self._processes[name].returncode

    def signal(self, name: str, number: int) -> None:
        """To that process alone."""
        os.kill(self._processes[name].pid, number)

    def kill(self, name: str) -> None:
        """As if its machine had lost power: the process and all that it started, at once."""
        for pid in [self._processes[name].pid, *descendants(self._processes[name].pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._processes[name].wait()

    def end(self, name: str) -> None:
        process = self._processes.pop(name)
        children = descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        stop(process, 1)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def server_files(self, run: str) -> list[Path]:
        """Everything that the server has written: its run, and what Flower stored and logged."""
        files = [
            *(self.folder / run).rglob("*"),
            *(self.folder / "keys/server").rglob("*"),
            self.log("server"),
        ]
        return [path for path in files if path.is_file()]

    def rounds(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / run / "rounds.jsonl"
        return lines(path) if path.exists() else []

    def logs(self) -> str:
        paths = [*self.folder.glob("*.log"), *self.folder.glob("keys/server/flower/*.log")]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in paths)


def _env() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def descendants(pid: int) -> list[int]:
    """Every process that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, new = list[int](), [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found
