"""Runs whose examples are longer than the model sees, or than the configuration allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from model_families import edit_json, save_folder, tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import fedtune
from fedtune.data.encode import encode_causal, encode_classification
from fedtune.data.encoded import IGNORED, Counts
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.federation.client import join
from fedtune.federation.consent import Consent
from fedtune.federation.room import Room, known_room, shortening
from fedtune.models.load import load_model
from fedtune.transport.acceptance import Acceptance
from fedtune.transport.messages import Message
from fedtune.transport.worker import Worker

POSITIONS = 32


def text(words: int, start: int = 4) -> str:
    return " ".join(f"w{4 + (start + i) % 60}" for i in range(words))


# "plain" puts two tokens of its own around a prompt, and <s> and </s> go around all
LONG = {"instruction": text(40), "output": text(50, 1)}
MIDDLE = {"instruction": text(10), "output": text(6, 2)}
SHORT = {"instruction": text(5), "output": text(3, 3)}
EMPTY = {"instruction": text(4), "output": ""}
CLIENTS = {"long": [LONG, LONG], "middle": [MIDDLE, SHORT], "short": [SHORT, EMPTY]}
NONE = {"cut": 0, "without_prompt": 0, "without_eos": 0, "empty": 0, "duplicates": 0, "dropped": 0}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 learnt positions: a token beyond them is an index error."""
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.set_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=POSITIONS, **ids)
    ).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config(model: Path, trainable: str = "lora", **data: Any) -> dict[str, Any]:
    held_out = data.pop("held_out", [SHORT])
    own = {"prompt": {"tokens": 20}} if trainable == "prompt" else {}
    own |= {"p_tuning": {"tokens": 20, "hidden": 4}} if trainable == "p-tuning" else {}
    (model.parent / "held.jsonl").write_text("\n".join(map(json.dumps, held_out)))
    return {
        "model": {"name": str(model)},
        "data": {
            "template": "plain",
            "max_length": 128,
            "holdout": {"source": str(model.parent / "held.jsonl")},
            **data,
        },
        "method": {"name": "fedavg", "rounds": 1, "trainable": trainable, "batch_size": 2, **own},
        "federation": {"quorum": 1.0},
    }


@pytest.mark.parametrize(
    ("trainable", "room"), [("lora", 32), ("full", 32), ("prompt", 12), ("p-tuning", 12), ("adapter", 32)]
)
def test_every_client_trains_however_long_its_texts_are(
    gpt2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], trainable: str, room: int
) -> None:
    made = fedtune.run(config(gpt2, trainable), out=tmp_path / "run", data=CLIENTS)
    assert made.rounds[-1]["clients"] == [0, 1, 2] and not made.rounds[-1]["left_out"]
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("data.max_length is 128") == 1
    assert f"sees 32 tokens{', of which the soft prompt takes 20' if room == 12 else ''}" in said
    assert f"an example has at most {room}" in said
    # by hand: the prompts have 2 tokens more, the whole examples 95, 21 and 11; SHORT's 11 fit in 12
    cut = 2 + (room == 12)
    long = NONE | {"examples": 2, "cut": 2, "without_eos": 2, "duplicates": 1}
    middle = NONE | {"examples": 2, "cut": int(room == 12)}
    short = NONE | {"examples": 2, "empty": 1}
    of_clients = [
        entry["encoded"] for entry in json.loads((tmp_path / "run/partition.json").read_text())["clients"]
    ]
    assert of_clients == [long, middle, short]
    assert made.summary["examples"] == {
        "train": NONE | {"examples": 6, "cut": cut, "without_eos": 2, "empty": 1, "duplicates": 1},
        "held_out": NONE | {"examples": 1},
    }
    assert f"of 6 training examples {cut} are cut to {room} tokens" in said
    assert "2 lost the end of the answer and have no end token" in said and "1 have an empty answer" in said


def test_without_progress_a_warning_is_still_said(
    gpt2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fedtune.run(config(gpt2), out=tmp_path / "run", data=CLIENTS, progress=False)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2, said
    assert "an example has at most 32" in said[0]
    assert said[1].startswith("of 6 training examples 2 are cut to 32 tokens")


def test_a_rotary_model_is_not_trained_beyond_its_context(tmp_path: Path) -> None:
    model = save_folder(tmp_path / "llama")
    edit_json(model / "config.json", max_position_embeddings=24)
    made = fedtune.run(config(model), out=tmp_path / "run", data=CLIENTS, progress=False)
    assert made.summary["examples"]["train"]["cut"] == 2
    document = fedtune.plan(config(model), data=CLIENTS)
    assert document["batch"]["longest"] == 24
    assert any("sees 24 tokens: an example has at most 24" in note for note in document["notes"])


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_written(
    gpt2: Path, tmp_path: Path
) -> None:
    document = config(gpt2, "prompt")
    document["method"]["prompt"]["tokens"] = 28
    for do in (
        lambda: fedtune.run(document, out=tmp_path / "run", data=CLIENTS, progress=False),
        lambda: fedtune.plan(document, data=CLIENTS),
    ):
        with pytest.raises(
            InputError, match="sees 32 tokens, of which the soft prompt takes 28: no example fits"
        ):
            do()
    assert not (tmp_path / "run").exists()


def test_an_answer_that_cannot_fit_beside_the_prompt_is_refused_before_training(
    gpt2: Path, tmp_path: Path
) -> None:
    """16 tokens fit in the bare model's 32, but not beside a prompt of 20: seen before, not after round 1."""
    document = config(gpt2, "prompt") | {"evaluation": {"tasks": ["rouge-l"], "max_new_tokens": 16}}
    with pytest.raises(InputError, match=r"max_new_tokens must be at most 10.* sees 12 tokens"):
        fedtune.run(document, out=tmp_path / "run", data=CLIENTS, progress=False)
    assert not (tmp_path / "run").exists()
    document["evaluation"]["max_new_tokens"] = 4
    made = fedtune.run(document, out=tmp_path / "run", data=CLIENTS, progress=False)
    assert made.summary["status"] == "done"


def test_dropped_examples_are_counted_and_weigh_nothing(gpt2: Path, tmp_path: Path) -> None:
    data = {"a": [LONG, SHORT], "b": [MIDDLE, SHORT]}
    made = fedtune.run(config(gpt2, too_long="drop"), out=tmp_path / "run", data=data, progress=False)
    assert made.summary["examples"]["train"] == NONE | {"examples": 3, "dropped": 1}
    # exactly the run in which the long example never was
    alone = fedtune.run(
        config(gpt2), out=tmp_path / "alone", data={"a": [SHORT], "b": [MIDDLE, SHORT]}, progress=False
    )
    weights = [(one.path / "final/adapter_model.safetensors").read_bytes() for one in (made, alone)]
    assert weights[0] == weights[1]


def test_a_client_left_with_nothing_is_named(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"client 0 \(long\): each of its 2 examples is longer than 32 tokens"
    ):
        fedtune.run(config(gpt2, too_long="drop"), out=tmp_path / "run", data=CLIENTS, progress=False)
    assert not (tmp_path / "run").exists()


def test_error_names_client_example_and_lengths(gpt2: Path, tmp_path: Path) -> None:
    data = {"north": [SHORT], "south": [SHORT, LONG]}
    with pytest.raises(
        InputError,
        match=r"client 1 \(south\): example 1 \('w8 w9.*'\) is too long: 41 tokens of prompt and 50 of "
        r"answer, and 30 fit",
    ):
        fedtune.run(config(gpt2, too_long="error"), out=tmp_path / "run", data=data, progress=False)
    with pytest.raises(InputError, match="the held-out examples: example 0"):
        fedtune.run(
            config(gpt2, too_long="error", held_out=[LONG]),
            out=tmp_path / "run",
            data={"north": [SHORT], "south": [SHORT]},
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_held_out_examples_are_counted_and_said_of_the_loss(gpt2: Path, tmp_path: Path) -> None:
    document = config(gpt2, too_long="drop", held_out=[LONG, SHORT])
    made = fedtune.run(document, out=tmp_path / "run", data={"a": [SHORT]}, progress=False)
    assert made.summary["examples"]["held_out"] == NONE | {"examples": 2, "cut": 1, "without_eos": 1}
    assert made.rounds[-1]["eval_notes"] == {"loss": ["1 of 2 examples are cut to 32 tokens"]}
    assert made.rounds[-1]["eval"]["loss"]["examples"] == 2


def test_pooled_data_are_counted_as_a_whole(gpt2: Path, tmp_path: Path) -> None:
    document = config(gpt2)
    document["method"] = {"name": "centralized", "batch_size": 2}
    made = fedtune.run(document, out=tmp_path / "run", data=CLIENTS, progress=False)
    partition = json.loads((tmp_path / "run/partition.json").read_text())
    assert partition["encoded"]["train"] == made.summary["examples"]["train"]
    assert made.summary["examples"]["train"]["duplicates"] == 2  # SHORT is with two clients, here with one
    assert not any("encoded" in entry for entry in partition["clients"])


def test_a_default_that_does_no_harm_is_not_warned_of(
    gpt2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = config(gpt2)
    del document["data"]["max_length"]
    fedtune.run(document, out=tmp_path / "run", data={"a": [SHORT], "b": [MIDDLE]})
    assert "data.max_length" not in capfd.readouterr().err


def test_counts_add_up() -> None:
    assert Counts(1, 2, 3, 4, 5, 6, 7) + Counts(cut=1) == Counts(1, 3, 3, 4, 5, 6, 7)


def test_a_client_over_a_network_counts_its_own_file(gpt2: Path, tmp_path: Path) -> None:
    document = config(gpt2)
    document["data"] |= {"train": "clients", "clients": None}
    document["transport"] = {"name": "flower"}
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(map(json.dumps, [LONG, LONG, SHORT, EMPTY])))
    loaded = load_model(str(gpt2), dtype="float32", initial="pretrained", seed=0, base=Path("."))
    joined = join(
        {
            "config": json.dumps(fedtune.load(document).resolved()),
            "weights": loaded.weights_sha256,
            "client": 0,
        },
        data=own,
        fields={},
        model=None,
        device="cpu",
        consent=Consent(),
    )
    assert joined.examples == 4
    assert joined.notes[1:] == (
        "of 4 training examples 2 are cut to 32 tokens (2 lost the end of the answer and have no end token), "
        "1 repeat an earlier one of the same owner, 1 have an empty answer",
    )
    said: list[str] = []
    worker = Worker(lambda fields: joined, Acceptance(), tmp_path / "state", said.append)
    worker.answer(Message({"do": "join", "run": "a" * 16, "client": 0}))
    assert said[-1] == joined.notes[-1]


@pytest.mark.parametrize("length", [128, 64])
def test_validation_knows_the_model(gpt2: Path, length: int) -> None:
    settings = fedtune.load(config(gpt2, "prompt", max_length=length))
    assert shortening(settings, known_room(settings) or Room(0)) == [
        f"data.max_length is {length}, but {gpt2} sees 32 tokens, of which the soft prompt takes 20: an "
        "example has at most 12"
    ]
    assert shortening(settings, Room(32)) == []
    elsewhere = fedtune.load(config(gpt2) | {"model": {"name": "owner/model"}})
    assert known_room(elsewhere) is None  # nothing is downloaded to look


def test_a_quarter_of_the_length_is_the_prompts() -> None:
    """By hand: 40 tokens are room for 39; 50 of answer leave the prompt 9, and 20 leave it 18."""
    made = tokenizer()
    asked = Example(text(38), "", text(50)), Example(text(38), "", text(20)), Example(text(38), "", text(29))
    found = encode_causal(asked, made, template="plain", loss_on="response", max_length=40)
    trained = [[label for label in item.labels if label != IGNORED] for item in found.items]
    assert [len(item.input_ids) for item in found.items] == [40, 40, 40]
    assert [len(one) for one in trained] == [30, 21, 30]
    # of 29 tokens the end token alone would be cut: it takes one more from the prompt
    assert [one[-1] == 2 for one in trained] == [False, True, True]
    assert found.counts == Counts(examples=3, cut=3, without_eos=1)


def test_text_of_a_classifier_is_cut_dropped_or_refused() -> None:
    made, rows = tokenizer(), [Example(text(9), text(4), "a"), Example(text(3), "", "b")]
    kept = encode_classification(rows, made, labels=["a", "b"], max_length=8)
    assert [len(item.input_ids) for item in kept.items] == [8, 3]
    assert kept.counts == Counts(examples=2, cut=1)
    left = encode_classification(rows, made, labels=["a", "b"], max_length=8, too_long="drop")
    assert [item.labels for item in left.items] == [(1,)] and left.counts == Counts(examples=1, dropped=1)
    with pytest.raises(InputError, match=r"example 0 \(.*\) is too long: 13 tokens, and 8 fit"):
        encode_classification(rows, made, labels=["a", "b"], max_length=8, too_long="error")
