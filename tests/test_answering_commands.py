"""`fedtune generate`, `fedtune chat`: a result, and the model that its run began with, asked from a shell."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from model_families import save_folder

import fedtune
from fedtune.cli.main import main
from fedtune.models.load import load_model

LORA: dict[str, Any] = {
    "data": {"train": "bundled", "clients": 2, "max_examples": 8, "max_length": 64},
    "method": {"name": "fedavg", "rounds": 1, "batch_size": 4, "lr": 0.05, "lora": {"rank": 2}},
    "evaluation": {"tasks": ["loss"], "max_examples": 8},
}
PROMPTS = ["Add 2 and 3.", "Reverse: a b c"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> fedtune.Run:
    return fedtune.run(LORA, out=tmp_path_factory.mktemp("lora") / "run", progress=False)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command with something on standard input; its status, and what it printed and complained of."""

    def run(*arguments: str | Path, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedtune", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_prompts_are_answered_as_in_python(lora: fedtune.Run, said: Any) -> None:
    tuned = lora.generate(PROMPTS, max_new_tokens=6)
    assert said("generate", lora.path, PROMPTS[0], "--max-new-tokens", "6") == (0, f"{tuned[0]}\n", "")
    both = "".join(f"> {prompt}\n{answer}\n" for prompt, answer in zip(PROMPTS, tuned, strict=True))
    assert said("generate", lora.path, *PROMPTS, "--max-new-tokens", "6") == (0, both, "")
    typed = f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n"
    assert said("generate", lora.path, "--max-new-tokens", "6", typed=typed) == (0, both, "")


def test_what_the_model_said_before_stands_beside(lora: fedtune.Run, said: Any) -> None:
    base = load_model("bundled", dtype="float32", initial="pretrained", seed=0, base=Path("."))
    began = lora.model("zero-shot")
    for name, weight in base.model.state_dict().items():
        assert weight.equal(began.state_dict()[name])
    status, out, _ = said("generate", lora.path, *PROMPTS, "--zero-shot", "--json")
    before, after = lora.generate(PROMPTS, name="zero-shot"), lora.generate(PROMPTS)
    assert (status, json.loads(out)) == (
        0,
        [
            {"prompt": prompt, "zero-shot": one, "global": two}
            for prompt, one, two in zip(PROMPTS, before, after, strict=True)
        ],
    )
    plain = said("generate", lora.path, PROMPTS[0], "--zero-shot")[1]
    assert plain == f"zero-shot: {before[0]}\nglobal: {after[0]}\n"


def test_before_tuning_an_adapter_that_the_run_went_on_from_is_there(
    lora: fedtune.Run, tmp_path: Path
) -> None:
    again = fedtune.run(
        LORA | {"model": {"adapter": str(lora.folder)}}, out=tmp_path / "again", progress=False
    )
    found, wanted = again.model("zero-shot").state_dict(), lora.model().state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_a_conversation_sees_its_turns_until_an_empty_line(lora: fedtune.Run, said: Any) -> None:
    asked = ["Add 2 and 3.", "And 4?"]
    first = lora.generate(asked[:1], max_new_tokens=4)[0]
    turns = [
        {"role": "user", "content": asked[0]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": asked[1]},
    ]
    second = lora.generate([{"messages": turns}], max_new_tokens=4)[0]
    anew = lora.generate(asked[1:], max_new_tokens=4)[0]
    typed = f"{asked[0]}\n{asked[1]}\n\n{asked[1]}\n"
    got = said("chat", lora.path, "--max-new-tokens", "4", typed=typed)
    assert got == (0, f"{first}\n{second}\n{anew}\n", "")


def test_a_turn_that_is_too_long_is_taken_back(lora: fedtune.Run, said: Any) -> None:
    typed = f"{'a ' * 600}\nAdd 2 and 3.\n"
    status, out, err = said("chat", lora.path, "--max-new-tokens", "4", typed=typed)
    assert (status, out) == (0, f"{lora.generate(['Add 2 and 3.'], max_new_tokens=4)[0]}\n")
    assert "too long" in err and "an empty line begins anew" in err and "Traceback" not in err


def test_a_classifier_names_classes_and_holds_no_conversation(tmp_path: Path, said: Any) -> None:
    save_folder(tmp_path / "classifier", "roberta")
    rows = [{"instruction": f"w{4 + i}", "output": "abcd"[i % 4]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = LORA | {
        "model": {"name": str(tmp_path / "classifier"), "task": "classification"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "clients": 2, "holdout": {"fraction": 0.3}},
    }
    made = fedtune.run(document, out=tmp_path / "run", progress=False)
    status, out, _ = said("generate", made.path, "w5", "--zero-shot")
    began, tuned = made.generate(["w5"], name="zero-shot")[0], made.generate(["w5"])[0]
    assert (status, out) == (0, f"zero-shot: {began}\nglobal: {tuned}\n")
    assert {began, tuned} <= set("abcd")
    status, out, err = said("chat", made.path, typed="w5\n")
    assert (status, out) == (2, "") and "is of task classification and holds no conversation" in err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["RUN"], ["there is no prompt", "fedtune generate"]),
        (["RUN", " "], ["prompt 0 must be a text"]),
        (["RUN", "x", "--out", "x.png"], ["--out is for text-to-image models"]),
        (["RUN", "x", "--name", "other"], ["no result named 'other'", "global, zero-shot"]),
        (["RUN", "x", "--top-p", "2"], ["top_p must be above 0 and at most 1, got 2.0"]),
        (["RUN", "x", "--max-new-tokens", "0"], ["max-new-tokens"]),
        (["RUN", "x", "--temperature", "nan"], ["temperature"]),
        (["nowhere", "x"], ["nowhere: no such folder"]),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(
    lora: fedtune.Run, said: Any, arguments: list[str], parts: list[str]
) -> None:
    given = [str(lora.path) if one == "RUN" else one for one in arguments]
    status, out, err = said("generate", *given)
    assert (status, out) == (2, "")
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
