"""Encoding by client: arrays that hold what a plain encoder gives, on disk too, of those who were asked."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_families import save_folder, tokenizer
from test_data_control import byte_level, unigram, word_piece
from transformers import PreTrainedTokenizerFast

import fedtune
from fedtune.data.cache import EncodedCache, key_of, tokenizer_sha256
from fedtune.data.encode import encode_causal, encode_classification
from fedtune.data.encoded import IGNORED, Counts, Encoded, EncodedList, EncodedSet, longest_of
from fedtune.data.examples import Example
from fedtune.data.objects import ObjectData
from fedtune.data.templates import register_template
from fedtune.errors import InputError
from fedtune.federation.client import join
from fedtune.federation.consent import Consent
from fedtune.federation.data import prepare_data
from fedtune.federation.encoding import Keys
from fedtune.federation.recorded import examples_of
from fedtune.models.load import load_model

TOKENIZERS = {
    "words": tokenizer(),
    "bytes": byte_level(),
    "unigram": unigram(),
    "pieces": word_piece(at_punctuation=True),
}
KEY = "0" * 64


def plainly(example: Example, made: PreTrainedTokenizerFast, loss_on: str, most: int) -> Encoded:
    """One example, one call of the tokenizer a text, lists all along."""
    about = f"{example.input}\n" if example.input else ""
    prompt = made(f"{example.instruction}\n{about}Answer:", add_special_tokens=False)["input_ids"]
    answer = [*made(f" {example.output}", add_special_tokens=False)["input_ids"], made.eos_token_id]
    room = most - 1  # beside the begin token
    while len(prompt) + len(answer) > room and len(prompt) > min(max(1, room // 4), room - 1):
        prompt = prompt[1:]
    if prompt and len(prompt) + len(answer) == room + 1:
        prompt = prompt[1:]
    answer = answer[: room - len(prompt)]
    shown = prompt if loss_on == "all" else [IGNORED] * len(prompt)
    return Encoded((made.bos_token_id, *prompt, *answer), (IGNORED, *shown, *answer))


texts = st.text(st.sampled_from("abcxyz äß中🙂\n.!?19w"), max_size=30)
examples = st.lists(st.builds(Example, texts, texts, texts), min_size=1, max_size=5)


@given(
    examples, st.integers(3, 60), st.sampled_from(["response", "all"]), st.sampled_from(sorted(TOKENIZERS))
)
def test_arrays_hold_what_a_plain_encoder_gives(
    rows: list[Example], most: int, loss_on: str, name: str
) -> None:
    made = TOKENIZERS[name]
    found = encode_causal(rows, made, template="plain", loss_on=loss_on, max_length=most)
    assert found.items[:] == [plainly(row, made, loss_on, most) for row in rows]
    assert found.items[-1] == found.items[len(rows) - 1] and len(found.items) == len(rows)
    assert [item.trained for item in found.items] == [
        sum(label != IGNORED for label in item.labels[1:]) for item in found.items
    ]


def test_more_examples_than_are_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        Example(f"w{4 + i % 50} w{5 + i % 7}", "", f"w{6 + i % 9}", ["no", "yes"][i % 2]) for i in range(9)
    ]
    named = [
        Example(row.instruction, row.output if i % 3 else "", row.category) for i, row in enumerate(rows)
    ]

    def both() -> tuple[EncodedSet, EncodedSet]:
        return (
            encode_causal(rows, tokenizer(), template="plain", loss_on="all", max_length=16),
            encode_classification(named, tokenizer(), labels=["yes", "no"], max_length=8),
        )

    whole = both()
    monkeypatch.setattr("fedtune.data.encode.AT_ONCE", 2)
    for once, parts in zip(whole, both(), strict=True):
        assert once.items[:] == parts.items[:] and once.counts == parts.counts
    alone = [
        encode_classification([one], tokenizer(), labels=["yes", "no"], max_length=8).items[0]
        for one in named
    ]
    assert whole[1].items[:] == alone


def test_a_token_takes_less_than_six_bytes() -> None:
    rows = [Example(" ".join(["w9"] * 30), "", " ".join(["w8"] * 30))] * 50
    items = encode_causal(rows, tokenizer(), template="plain", loss_on="response", max_length=512).items
    assert items.ids.dtype == items.heads.dtype == items.lengths.dtype == np.int32
    assert len(items.ids) == 50 * 63 and items.nbytes == 4 * 50 * 63 + 16 * 50  # 4.25 a token
    assert [len(item.input_ids) for item in longest_of(items, 2)] == [63, 63]
    with pytest.raises(IndexError, match="example 50 of 50"):
        items[50]


@pytest.mark.parametrize(
    ("lengths", "heads"), [([2], [1, 1]), ([3], [1]), ([2], [3]), ([-2], [0]), ([2], [-1])]
)
def test_arrays_that_do_not_go_together_are_refused(lengths: list[int], heads: list[int]) -> None:
    with pytest.raises(ValueError, match=r"same examples|not possible"):
        EncodedList(*(np.array(a, np.int32) for a in (lengths, heads, [1, 2])), classes=False)


def encoded() -> EncodedSet:
    rows = [Example("w5 w6", "", "w7"), Example("w8", "", " ".join(["w9"] * 40))]
    return encode_causal(rows, tokenizer(), template="plain", loss_on="response", max_length=16)


def begun(folder: Path) -> EncodedCache:
    cache = EncodedCache(folder)
    assert cache.begin()
    return cache


def same(found: EncodedSet | None, wanted: EncodedSet) -> bool:
    return found is not None and found.items[:] == wanted.items[:] and found.counts == wanted.counts


def test_nothing_is_written_before_the_run_has_begun(tmp_path: Path) -> None:
    cache, made = EncodedCache(tmp_path / "new/cache"), encoded()
    assert cache.fetch(KEY, lambda: made) == (made, False)
    assert cache.get(KEY) is made and not (tmp_path / "new").exists()
    assert cache.begin()
    found, on_disk = cache.fetch(KEY, lambda: pytest.fail("it is there"))
    assert same(found, made) and on_disk
    assert isinstance(found.items.ids.base, np.memmap) or isinstance(found.items.ids.base.base, np.memmap)


def test_files_are_the_users_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        begun(tmp_path / "cache").fetch(KEY, encoded)
    finally:
        os.umask(before)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [f"{KEY}.tokens"]
    modes = [
        stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache", tmp_path / f"cache/{KEY}.tokens")
    ]
    assert modes == [0o700, 0o600]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _head(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"counts": {"examples"', b'"counts": {"exambles"'))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (_flip, "its sha256 is not"),
    "its end is missing": (lambda file: os.truncate(file, file.stat().st_size - 4), "its length is not"),
    "empty": (lambda file: file.write_bytes(b""), "Expecting value"),
    "something else": (lambda file: file.write_bytes(b"[1]\n" + bytes(64)), "of another version"),
    "no text": (lambda file: file.write_bytes(b"\xff\xfe\n"), "codec can't decode"),
    "other counts": (_head, "exambles"),
    "writable by others": (lambda file: file.chmod(0o666), "other users may write"),
    "a link": (_link, "symbolic link"),
    "a pipe": (_pipe, "it is no file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_foreign_is_named_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    made, file = encoded(), tmp_path / f"{KEY}.tokens"
    begun(tmp_path).fetch(KEY, lambda: made)
    do, why = DAMAGE[damage]
    do(file)
    assert same(begun(tmp_path).fetch(KEY, lambda: made)[0], made)
    assert f"{file} is not usable and is made again: " in caplog.text and why in caplog.text
    assert same(begun(tmp_path).get(KEY), made) and stat.S_IMODE(file.lstat().st_mode) == 0o600


def test_a_file_of_other_examples_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begun(tmp_path).fetch(KEY, encoded)
    (tmp_path / f"{KEY}.tokens").rename(tmp_path / f"{'1' * 64}.tokens")
    assert begun(tmp_path).get("1" * 64) is None and "or of other examples" in caplog.text
    assert begun(tmp_path).get("2" * 64) is None


def test_another_users_file_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path).fetch(KEY, encoded)
    uid = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: uid)
    assert begun(tmp_path).get(KEY) is None and "it is another user's" in caplog.text


def test_a_place_that_cannot_be_written_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache, made = EncodedCache(tmp_path / "file/cache"), encoded()
    cache.fetch(KEY, lambda: made)
    assert not cache.begin()
    assert cache.fetch("1" * 64, lambda: made) == (made, False)
    assert caplog.text.count("are not kept there (data.cache)") == 1


def test_a_disk_that_is_full_leaves_no_part_of_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, made = begun(tmp_path), encoded()

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)  # of the file, whole, to its name
    assert cache.fetch(KEY, lambda: made) == (made, False)
    assert list(tmp_path.iterdir()) == [] and "are not kept there" in caplog.text


def test_who_write_the_same_file_at_once_leave_a_whole_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = encoded()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: begun(tmp_path).fetch(KEY, lambda: made)[0], range(40)))
    assert all(same(one, made) for one in found) and not caplog.text
    assert [file.name for file in tmp_path.iterdir()] == [f"{KEY}.tokens"]


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    old.touch(), new.touch()
    os.utime(old, (0, 0))
    begun(tmp_path)
    assert new.exists() and not old.exists()


def test_all_that_encoding_depends_on_is_in_the_key() -> None:
    @register_template("cache-test")
    def mutable(example: Example) -> str:
        """Another text with the same name."""
        return f"{prefix[0]}{example.instruction}"

    prefix, rows = ["w4 "], [Example("w5", "", "w6"), Example("w7", "", "w8")]

    def key(made: Any = None, rows: Any = rows, most: int = 32, **data: Any) -> str | None:
        config = fedtune.load({"data": {"template": "cache-test", **data}, "method": {"name": "fedavg"}})
        return Keys(config, made or tokenizer(), (), most)(rows)

    more = tokenizer()
    more.add_tokens(["w5w"])
    keys = [
        key(),
        key(more),
        key(rows=rows[::-1]),
        key(rows=rows[:1]),
        key(most=31),
        key(loss_on="all"),
        key(too_long="drop"),
    ]
    prefix[0] = "w4 w4 "
    keys.append(key())
    assert None not in keys and len(set(keys)) == len(keys)
    prefix[0] = "w4 "
    used = tokenizer()
    used("w4 w5 w6", truncation=True, max_length=2)  # leaves its setting in the library's part
    assert key(used) == keys[0]
    # where one field ends and the next begins
    assert key_of("", {}, [Example("a", "b", "c")], [[]]) != key_of("", {}, [Example("ab", "", "c")], [[]])
    assert tokenizer_sha256(tokenizer()) == tokenizer_sha256(tokenizer())


def answer(words: int) -> dict[str, str]:
    return {"instruction": "w9 w8", "output": " ".join(f"w{10 + i % 40}" for i in range(words))}


LONG, SHORT = answer(60), answer(4)
CLIENTS = {"a": [SHORT, SHORT], "b": [LONG], "c": [LONG, SHORT], "d": [answer(5)], "e": [answer(6)]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_folder(tmp_path_factory.mktemp("models") / "llama")
    (folder.parent / "held.jsonl").write_text(json.dumps(SHORT))
    return folder


def config(model: Path, asked: int | None = None, rounds: int = 1, **data: Any) -> dict[str, Any]:
    held = str(model.parent / "held.jsonl")
    return {
        "model": {"name": str(model)},
        "data": {"template": "plain", "max_length": 32, "holdout": {"source": held}, **data},
        "method": {"name": "fedavg", "rounds": rounds, "trainable": "lora", "batch_size": 2},
        "federation": {"clients_per_round": asked, "quorum": 1.0, "max_loss_jump": None},
        "evaluation": {"bootstrap": 0},
    }


def files(folder: Path) -> int:
    return len(list(folder.glob("*.tokens")))


def result(run: Any) -> tuple[bytes, list[Any], bytes]:
    rounds = [{key: value for key, value in entry.items() if key != "seconds"} for entry in run.rounds]
    return (
        (run.path / "final/adapter_model.safetensors").read_bytes(),
        rounds,
        (run.path / "wire.jsonl").read_bytes(),
    )


def test_a_round_of_few_encodes_few_and_says_what_it_knows(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = fedtune.run(config(model, asked=1, rounds=2), out=tmp_path / "run", data=CLIENTS)
    asked = [entry["clients"] for entry in made.rounds[1:]]
    assert len(asked[0]) == len(asked[1]) == 1 and asked[0] != asked[1]
    assert files(tmp_path / ".encoded") == 2
    known = {*asked[0], *asked[1]}
    partition = json.loads((tmp_path / "run/partition.json").read_text())
    assert all(entry["labels"] == {"": entry["examples"]} for entry in partition["clients"])  # and no answer
    for client, (entry, rows) in enumerate(zip(partition["clients"], CLIENTS.values(), strict=True)):
        assert entry["encoded"].get("waiting", 0) == (0 if client in known else len(rows))
        assert entry["encoded"]["examples"] == len(rows)
        assert entry["encoded"]["cut"] == (rows.count(LONG) if client in known else 0)
        assert entry["encoded"]["duplicates"] == (client == 0)  # seen without encoding
    train = made.summary["examples"]["train"]
    assert train == partition["encoded"]["train"]
    assert train["examples"] == 7 and train["duplicates"] == 1
    waiting = sum(len(rows) for client, rows in enumerate(CLIENTS.values()) if client not in known)
    cut = sum(rows.count(LONG) for client, rows in enumerate(CLIENTS.values()) if client in known)
    assert train["waiting"] == waiting and train["cut"] == cut
    said = " ".join(capfd.readouterr().err.split())
    assert f"{waiting} are of clients that no round has asked yet" in said  # at the end


def test_results_are_the_same_without_a_cache_and_from_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fedtune.run(config(model), out=tmp_path / "one/run", data=CLIENTS, progress=False)
    none = fedtune.run(config(model, cache="none"), out=tmp_path / "none/run", data=CLIENTS, progress=False)
    assert files(tmp_path / "one/.encoded") == 5 and not (tmp_path / "none/.encoded").exists()
    elsewhere = config(model, cache=str(tmp_path / "one/.encoded"))

    def only_held_out(config: Any, examples: Any, *args: Any, whose: str, **settings: Any) -> EncodedSet:
        assert not whose.startswith("client"), whose
        return real(config, examples, *args, whose=whose, **settings)

    from fedtune.federation import assembly

    real = assembly.encode_for
    monkeypatch.setattr(assembly, "encode_for", only_held_out)
    again = fedtune.run(elsewhere, out=tmp_path / "two/run", data=CLIENTS, progress=False)
    assert result(one) == result(none) == result(again)
    assert one.summary["examples"] == again.summary["examples"] == none.summary["examples"]
    assert not (tmp_path / "two/.encoded").exists()


def test_a_length_that_decides_is_looked_at_in_everyone(model: Path, tmp_path: Path) -> None:
    dropped = {**CLIENTS, "b": [LONG, SHORT]}
    made = fedtune.run(
        config(model, asked=1, too_long="drop"), out=tmp_path / "run", data=dropped, progress=False
    )
    assert made.summary["examples"]["train"] == Counts(examples=6, dropped=2, duplicates=1).document()
    assert files(tmp_path / ".encoded") == 4  # b and c have the same
    for how, wrong in (("drop", "client 1"), ("error", "client 1")):
        with pytest.raises(InputError, match=wrong):
            fedtune.run(
                config(model, asked=1, too_long=how), out=tmp_path / how / "run", data=CLIENTS, progress=False
            )
        assert not (tmp_path / how).exists()  # and so no file of encoded examples


odd = st.text(max_size=8)


@given(st.lists(st.builds(Example, odd, odd, odd, odd), min_size=3, max_size=4))
def test_data_have_the_digest_that_they_always_had(rows: list[Example]) -> None:
    """Written with json.dumps, as the version that began older runs did."""
    document = {"method": {"name": "fedavg"}, "evaluation": {"max_examples": 1}}
    document["data"] = {"train": "objects", "clients": 1, "holdout": {"fraction": 0.3}}
    split = prepare_data(fedtune.load(document), pooled=False, objects=ObjectData(tuple(rows), {}))
    assert len(split.trained) == len(rows) - 1
    text, keys = b"", ("category", "input", "instruction", "output")
    for part in (split.trained, split.evaluation):
        rows_of = ({key: getattr(e, key) for key in keys} for e in part)
        text += b"".join(json.dumps(row).encode() + b"\n" for row in rows_of) + b"\0"
    assert split.sha256 == sha256(text).hexdigest()
    e = split.held_out[0]
    said = json.dumps([e.instruction, e.input, e.output, e.category]).encode()
    assert examples_of(split)["held_out"] == [sha256(said).hexdigest()[:16]]


def test_a_run_goes_on_with_another_place(model: Path, tmp_path: Path) -> None:
    made = fedtune.run(config(model, asked=2, rounds=2), out=tmp_path / "run", data=CLIENTS, progress=False)
    fresh = config(model, asked=2, rounds=2, cache=str(tmp_path / "elsewhere"))
    for name in ("summary.json", "final"):
        path = made.path / name
        path.unlink() if path.is_file() else path.rename(tmp_path / "final-before")
    (made.path / "checkpoints/round-0002").rename(tmp_path / "later")
    again = fedtune.run(fresh, out=made.path, data=CLIENTS, resume=True, progress=False)
    assert (again.path / "final/adapter_model.safetensors").read_bytes() == (
        tmp_path / "final-before/adapter_model.safetensors"
    ).read_bytes()
    assert files(tmp_path / "elsewhere") > 0


def test_a_cache_that_is_no_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        InputError, match=r"data.cache is .*file, which is no folder; give a folder, beside or none"
    ):
        fedtune.run(config(model, cache=str(tmp_path / "file")), out=tmp_path / "run", data=CLIENTS)
    assert not (tmp_path / "run").exists()


def test_a_server_has_nothing_written_at_a_client(model: Path, tmp_path: Path) -> None:
    document = config(model, cache=str(tmp_path / "cache"))
    document["data"] |= {"train": "clients", "clients": None}
    document["transport"] = {"name": "flower"}
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps(SHORT))
    weights = load_model(str(model), dtype="float32", initial="pretrained", seed=0, base=Path("."))
    asked = {"config": json.dumps(fedtune.load(document).resolved()), "client": 0}
    asked["weights"] = weights.weights_sha256
    joined = join(asked, data=own, fields={}, model=None, device="cpu", consent=Consent())
    assert joined.examples == 1
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]
