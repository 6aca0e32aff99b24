"""Every setting of `data.public` changes what the server trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedtune.config.file import parse_config
from fedtune.config.schema import RunConfig
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.federation.sources import public_examples


def config(**public: Any) -> RunConfig:
    document: dict[str, Any] = {"method": {"name": "zero-shot"}}
    if public:
        document["data"] = {"public": public}
    return parse_config(document, "test")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    rows = [{"instruction": f"w{i}", "output": f"v{i}", "better": f"u{i}"} for i in range(20)]
    named = {}
    for name, some in (("a", rows), ("b", rows[:5])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        named[name] = str(path)
    return named


def test_without_the_block_there_are_none() -> None:
    assert public_examples(config()) == []


def test_source_fields_and_size(files: dict[str, str]) -> None:
    assert len(public_examples(config(source=files["a"]))) == 20
    assert [e.output for e in public_examples(config(source=files["b"]))] == [f"v{i}" for i in range(5)]
    other = public_examples(config(source=files["b"], fields={"output": "better"}))
    assert [e.output for e in other] == [f"u{i}" for i in range(5)]
    some = public_examples(config(source=files["a"], max_examples=7))
    assert len(some) == 7 and some == public_examples(config(source=files["a"], max_examples=7))
    assert {e.output for e in some} < {f"v{i}" for i in range(20)}
    assert len(public_examples(config(source=files["b"], max_examples=7))) == 5


def test_fields_of_public_data_are_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"input": "w", "label": "v", "category": "c"}) + "\n")
    fields: dict[str, Any] = {"instruction": "input", "output": "label"}
    assert public_examples(config(source=str(path), fields=fields)) == [Example("w", "", "v", "c")]
    fields["category"] = None
    assert public_examples(config(source=str(path), fields=fields)) == [Example("w", "", "v", "")]


def test_conversations_are_no_public_data(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"conversations": [{"from": "human", "value": "w"}], "output": "v"}) + "\n")
    fields = {"instruction": "conversations.0.value"}
    with pytest.raises(InputError, match=r'd\.jsonl:1: "conversations\.0\.value" .*read whole'):
        public_examples(config(source=str(path), fields=fields))


def test_split_of_a_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, *args: Any, split: str, **kwargs: Any) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"instruction": "w", "output": "v"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    public_examples(config(source="owner/set"))
    public_examples(config(source="owner/set", split="validation"))
    assert asked == [("owner/set", "train"), ("owner/set", "validation")]
