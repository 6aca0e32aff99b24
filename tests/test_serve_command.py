"""The command `fedtune serve`: its key, its end, other engines, and what it cannot serve."""

from __future__ import annotations

import http.client
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Command
from command import fedtune as command
from served_run import CHAT, KEY, RIGHT, run_to_serve

import fedtune
from fedtune.cli.main import main
from fedtune.deploy.openai_api import read_key
from fedtune.errors import InputError


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    return run_to_serve(tmp_path_factory.mktemp("serve"))


def test_where_a_key_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    file.chmod(0o600)
    assert read_key(file, {}) == KEY == read_key(None, {"FEDTUNE_API_KEY": KEY})
    assert read_key(None, {}) is None
    with pytest.raises(InputError, match="give one of them"):
        read_key(file, {"FEDTUNE_API_KEY": KEY})
    for text in ("", "short", "words with blanks between", "ü" * 20):
        with pytest.raises(InputError, match="16 or more letters"):
            read_key(None, {"FEDTUNE_API_KEY": text})
    file.chmod(0o644)
    with pytest.raises(InputError, match="can be read by others; chmod 600"):
        read_key(file, {})
    with pytest.raises(InputError, match="cannot be read"):
        read_key(tmp_path / "none", {})


def url_of(cwd: Path) -> int | None:
    """The port that a started server says, once it does."""
    said = (cwd / ".out").read_text()
    return int(said.rpartition(":")[2].split("/")[0]) if said.endswith("/v1\n") else None


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_status_0(lora: fedtune.Run, tmp_path: Path, by: int) -> None:
    before = sorted(lora.path.rglob("*"))
    running = Command("serve", lora.path.absolute(), "--port", "0", cwd=tmp_path)
    answers: list[Any] = []

    def answered() -> bool:
        port = url_of(tmp_path)
        if port is None:
            return False
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", CHAT, json.dumps(RIGHT), {"Content-Type": "application/json"})
        answers.append(json.loads(connection.getresponse().read()))
        return True  # the connection is still open when the signal comes

    ended = running.when(answered, by)
    assert ended.status == 0, ended.err
    (said,) = lora.generate([{"messages": RIGHT["messages"]}])
    assert answers[0]["choices"][0]["message"]["content"] == said
    assert ended.out.startswith("mine answers at http://127.0.0.1:") and "Traceback" not in ended.err
    assert "POST /v1/chat/completions 200" in ended.err and "Add 2" not in ended.err
    assert sorted(lora.path.rglob("*")) == before  # nothing of it is written anywhere


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines, and there is no key"),
        (
            ["--host", "0.0.0.0", "--engine", "vllm"],
            "can be reached from other machines, and there is no key",
        ),
        (["--host", "203.0.113.7", "--key-file", "KEY"], "cannot listen on 203.0.113.7"),
        (["--port", "70000"], "--port"),
        (["--name", "other"], "no result named 'other'"),
        (["--key-file", "KEY", "--engine", "transformers"], "transformers' server knows no key"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    lora: fedtune.Run, tmp_path: Path, more: list[str], part: str
) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    more = [str(file) if one == "KEY" else one for one in more]
    ended = command("serve", lora.path.absolute(), *more, cwd=tmp_path)
    assert (ended.status, ended.out) == (2, "") and part in ended.err and "Traceback" not in ended.err


def test_vllm_is_given_the_whole_model_and_the_key(
    lora: fedtune.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a program of that name which says what it was given: the real one needs a GPU."""
    program, said = tmp_path / "vllm", tmp_path / "given"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time\n"
        "given = {'arguments': sys.argv[1:], 'key': os.environ.get('VLLM_API_KEY')}\n"
        "given['files'] = os.listdir(sys.argv[2])\n"
        f"open({str(said)!r} + '~', 'w').write(json.dumps(given))\n"
        f"os.rename({str(said)!r} + '~', {str(said)!r})\ntime.sleep(float(os.environ['LASTS']))\n"
    )
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(
        sys, "argv", ["fedtune", "serve", str(lora.path), "--host", "0.0.0.0", "--port", "81"]
    )
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--engine", "vllm"])
    monkeypatch.setenv("FEDTUNE_API_KEY", KEY)
    monkeypatch.setenv("LASTS", "600")

    def interrupt() -> None:
        while not said.is_file() and not ended.wait(0.01):
            pass
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # who was started in the background ignores SIGINT

    ended = threading.Event()
    watching = threading.Thread(target=interrupt)
    watching.start()
    try:
        main()
    finally:
        ended.set()
        watching.join()
    assert capsys.readouterr().out == "vllm serves mine at http://0.0.0.0:81/v1\n"
    given = json.loads(said.read_text())
    assert given["arguments"] == ["serve", "mine", "--host", "0.0.0.0", "--port", "81"]
    assert given["key"] == KEY
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(given["files"])
    assert "adapter_model.safetensors" not in given["files"]
    monkeypatch.setenv("LASTS", "0")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 3 and "vllm ended with status 0" in capsys.readouterr().err


def test_a_classifier_has_no_such_routes(lora: fedtune.Run, tmp_path: Path) -> None:
    settings = yaml.safe_load((lora.path / "config.yaml").read_text())
    settings["model"]["task"] = "classification"
    settings["data"]["labels"] = ["a", "b"]
    settings["evaluation"]["tasks"] = ["accuracy"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(
        InputError, match="is of task classification, which the OpenAI-compatible routes have no form"
    ):
        fedtune.open(tmp_path).serve_api()
