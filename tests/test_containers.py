"""Containers, units and manifests: every command, flag, path, name and port in them is one that exists."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from fedtune.api.commands import load
from fedtune.cli.main import app

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONTAINERS, UNITS = DOCS / "containers", DOCS / "systemd"
COMPOSE = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((CONTAINERS / "kubernetes.yaml").read_text()))
CLIENTS = ("north", "south", "west")
PATHS = ("config", "keys", "data", "accept", "state")


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """The parameters of a command line of fedtune. Raises click's error for what it does not know."""
    name, *arguments = words
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group)
    found = command.get_command(click.Context(command), name)
    assert found is not None, name
    given = found.make_context(name, list(arguments)).params
    return {key: Path(value) if key in PATHS and value else value for key, value in given.items()}


def lines_of(script: str) -> Iterator[list[str]]:
    """The words of each command `fedtune` in a shell script, without its name; a variable is a word."""
    script = re.sub(r"\\\n", " ", script)
    for found in re.finditer(r"(?m)(?:^|exec |srun |/bin/)fedtune (.*?)(?:$|;| \|\||')", script):
        yield shlex.split(found.group(1).replace("$$way", "$way").replace('"$way"', "$way"))


def taken(words: Sequence[str]) -> dict[str, Any]:
    """As `parsed`, with the option that a script chooses."""
    for option in ("--out", "--resume"):
        found = parsed([option if word == "$way" else word for word in words])
    return found


def containers(manifest: Any) -> list[Any]:
    spec = manifest["spec"]["template"]["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def test_a_command_that_is_wrong_is_found() -> None:
    with pytest.raises(click.ClickException):
        parsed(["server", "fed.yaml", "--keys", "k", "--no-such-flag"])
    with pytest.raises(click.ClickException):
        parsed(["client", "--server", "a:1"])
    assert list(lines_of("  exec fedtune server a.yaml --keys k \\\n  --port 1; x\nfedtune keys k\n")) == [
        ["server", "a.yaml", "--keys", "k", "--port", "1"],
        ["keys", "k"],
    ]


def test_the_image_is_made_of_what_is_there() -> None:
    text = re.sub(r"\\\n", " ", (CONTAINERS / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {step for step, _ in steps} <= {
        *("ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "ENTRYPOINT", "CMD")
    }
    ignored = (CONTAINERS / "Dockerfile.dockerignore").read_text().splitlines()
    for step, rest in steps:
        if step == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert (DOCS.parent / source).exists() and f"!{source}" in ignored
    arguments = [rest.split("=")[0] for step, rest in steps if step == "ARG"]
    assert all(re.search(rf"\$\{{?{name}\b", text) for name in arguments)
    project = (DOCS.parent / "pyproject.toml").read_text()
    (extras,) = (rest.split("=")[1].split(",") for step, rest in steps if rest.startswith("EXTRAS="))
    assert all(f"\n{extra} = [" in project for extra in extras)
    assert ("ENTRYPOINT", '["fedtune"]') in {(step, rest) for step, rest in steps}


def test_the_image_has_no_fault_that_hadolint_knows() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, CONTAINERS / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_compose_starts_is_there() -> None:
    services = COMPOSE["services"]
    assert services.keys() == {"keys", "server", "proxy", *CLIENTS}
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (CONTAINERS / source).exists(), volume
        for other, about in service.get("depends_on", {}).items():
            assert about["condition"] in ("service_completed_successfully", "service_healthy")
            assert other in services and (
                about["condition"] != "service_healthy" or "healthcheck" in services[other]
            )
    build = services["keys"]["build"]
    context = (CONTAINERS / build["context"]).resolve()
    assert context == DOCS.parent and (context / build["dockerfile"]).is_file()
    server = parsed(services["server"]["command"])
    mounted = dict(volume.split(":")[:2] for volume in services["server"]["volumes"])
    assert mounted["."] == "/opt/federation" and (CONTAINERS / server["config"].name).is_file()
    assert server["config"].parent == Path(mounted["."])
    assert f"127.0.0.1:{server['health_port']}/health" in services["server"]["healthcheck"]["test"][-1]
    nginx = (DOCS / "proxy/nginx.conf").read_text()
    assert f"127.0.0.1:{server['port']};" in nginx and f"{server['keys']}/server.crt" in nginx
    assert services["proxy"]["network_mode"] == "service:server"
    listens = re.search(r"listen (\d+) ssl", nginx)
    assert listens is not None
    for name in CLIENTS:
        client = parsed(services[name]["command"])
        assert client["server"] == f"server:{listens[1]}"
    script = services["keys"]["command"][0]
    assert (CONTAINERS / Path(script).name).is_file() and Path(script).parent == Path(mounted["."])


def test_its_settings_are_of_a_federation_of_three() -> None:
    config = load(CONTAINERS / "fed.yaml", "transport.name=flower")
    assert config.data.clients == len(CLIENTS) and config.model.name == "bundled"


def test_it_prepares_the_keys_and_the_data_that_the_others_name(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="comes with Flower (the extra `flower`)")
    (tmp_path / "keys").mkdir()
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "KEYS": str(tmp_path / "keys"),
        "WORK": str(tmp_path),
        "PYTHONPATH": str(DOCS.parent),
    }
    for _ in range(2):  # what is there stays
        done = subprocess.run(
            ["sh", CONTAINERS / "prepare.sh"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        kept = (tmp_path / "keys/server/server.key").read_bytes()
    assert (tmp_path / "keys/server/server.key").read_bytes() == kept
    rows = (DOCS.parent / "fedtune/data/bundled_train.jsonl").read_text().splitlines()
    dealt = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in CLIENTS}
    assert [len(part) for part in dealt.values()] == [
        len(rows) // 3 + (place < len(rows) % 3) for place in (2, 0, 1)
    ]
    assert sorted(row for part in dealt.values() for row in part) == sorted(rows)
    assert list(json.loads((tmp_path / "keys/server/clients.json").read_text())) == list(CLIENTS)
    for name in CLIENTS:
        client = parsed(COMPOSE["services"][name]["command"])
        assert (tmp_path / "keys" / client["keys"].relative_to("/etc/fedtune") / "client.key").is_file()
        assert (tmp_path / client["data"].relative_to("/srv/fedtune")).is_file()
    assert parsed(COMPOSE["services"]["server"]["command"])["keys"] == Path("/etc/fedtune/server")


@pytest.mark.parametrize("unit", sorted(UNITS.glob("*.service")), ids=lambda unit: unit.stem)
def test_units_run_commands_that_exist(unit: Path) -> None:
    read = configparser.ConfigParser(interpolation=None)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read(unit)
    (words,) = lines_of(read["Service"]["ExecStart"])
    found = taken(words)
    assert found["log_format"] == "json"
    if words[0] == "server":
        assert str(found["keys"]) == read["Service"]["ReadWritePaths"]
        assert found["health_port"] == 9444
    else:
        assert found["accept"].parent == found["keys"]


@pytest.mark.parametrize("unit", sorted(UNITS.glob("*.service")), ids=lambda unit: unit.stem)
def test_units_have_no_fault_that_systemd_knows(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    name = unit.name.replace("@", "@north")
    (tmp_path / name).write_text(unit.read_text().replace("/opt/fedtune/bin/fedtune", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and name not in done.stderr, done.stderr


def test_what_kubernetes_starts_is_there() -> None:
    kinds = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in MANIFESTS]
    assert kinds == [
        ("Service", "fedtune-server"),
        ("PersistentVolumeClaim", "fedtune-server"),
        ("Job", "fedtune-server"),
        ("Deployment", "fedtune-north"),
    ]
    service, _, job, deployment = MANIFESTS
    for manifest in (job, deployment):
        volumes = {volume["name"] for volume in manifest["spec"]["template"]["spec"]["volumes"]}
        mounts = {mount["name"] for one in containers(manifest) for mount in one["volumeMounts"]}
        assert volumes == mounts
    server = next(one for one in containers(job) if one["name"] == "server")
    (words,) = lines_of(server["args"][0])
    found = taken(words)
    mounted = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert {str(found["config"].parent), str(found["keys"].parent)} < mounted
    assert f"127.0.0.1:{found['health_port']}/health" in server["livenessProbe"]["exec"]["command"][-1]
    proxy = next(one for one in containers(job) if one["name"] == "proxy")
    assert proxy["ports"][0]["containerPort"] == service["spec"]["ports"][0]["targetPort"] == 443
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == server["name"]
    client = next(one for one in containers(deployment) if one["name"] == "client")
    words = parsed(client["args"])
    mounted = {Path(mount["mountPath"]) for mount in client["volumeMounts"]}
    assert {words["keys"], words["data"].parent, words["state"].parent, words["accept"].parent} == mounted
    template = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == template and deployment["spec"]["replicas"] == 1


def test_slurm_runs_and_goes_on(tmp_path: Path) -> None:
    """With stand-ins of srun and scontrol: a new folder first, the same one after a requeue."""
    script = CONTAINERS / "slurm.sh"
    (words,) = lines_of(script.read_text())
    found = taken([word.replace("$1", "mine.yaml") for word in words])
    assert found["config"] == Path("mine.yaml") and list(found["overrides"]) == ["transport.workers=auto"]
    for name, text in (
        ("srun", 'echo "$@" >>calls; mkdir -p "$6"; exit "$ENDS"'),
        ("scontrol", 'echo scontrol "$@" >>calls'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for ends in (143, 0, 3):
        done = subprocess.run(
            ["sh", script, "settings/mine.yaml"],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "ENDS": str(ends)},
        )
        assert done.returncode == (0 if ends == 143 else ends)
    run = "fedtune run settings/mine.yaml transport.workers=auto {} runs/mine-7 --log-format json"
    assert (tmp_path / "calls").read_text().splitlines() == [
        run.format("--out"),
        "scontrol requeue 7",
        run.format("--resume"),
        run.format("--resume"),
    ]
