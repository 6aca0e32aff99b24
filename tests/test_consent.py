"""What a run asks of a client over a network: shown, recorded, and held to what its operator accepts."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from protected import federation
from secure_rounds import SECURE
from torch import Tensor

from fedtune.config.file import parse_config
from fedtune.core.cohort import QuorumError
from fedtune.core.types import ClientError, Payload
from fedtune.errors import InputError
from fedtune.federation.asked import Asked, settings_digest
from fedtune.federation.client import join
from fedtune.federation.consent import Consent, check
from fedtune.federation.spending import Record, together
from fedtune.protection.settings import Privacy
from fedtune.transport.acceptance import Acceptance, NotAccepted
from fedtune.transport.messages import Message
from fedtune.transport.worker import Worker

pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")

WEIGHTS = "ab" * 32
PLAIN = Asked(
    method="fedavg",
    trainable="lora",
    rounds=3,
    local_steps=12,
    model="bundled",
    weights=WEIGHTS,
    holds_model=True,
    fields=("question", "answer"),
    examples=24,
    threshold=None,
    signed=True,
    clip=None,
    noise=None,
    delta=None,
    everyone=True,
)
MASKED = replace(PLAIN, threshold=3)
NOISY = replace(MASKED, clip=0.5, noise=1.0, delta=1e-3)
NOISY_BY_SERVER = replace(NOISY, threshold=None)

DEMANDS: list[tuple[dict[str, Any], Asked, Asked, str]] = [
    (
        {"methods": ["fedavg", "fedbiot"]},
        PLAIN,
        replace(PLAIN, method="fedkseed"),
        "accepts fedavg, fedbiot, and the method is fedkseed; set method.name, or have `methods` changed",
    ),
    (
        {"trainable": ["lora"]},
        PLAIN,
        replace(PLAIN, trainable="full"),
        "accepts what trains lora, and fedavg trains full; set method.trainable",
    ),
    ({"models": [WEIGHTS]}, PLAIN, replace(PLAIN, weights="cd" * 32), "run's is cdcd.*; set model.name"),
    ({"models": [WEIGHTS]}, PLAIN, replace(PLAIN, holds_model=False), "parts that they cannot check"),
    (
        {"fields": ["question", "answer"]},
        PLAIN,
        replace(PLAIN, fields=("question", "answer", "diagnosis")),
        "the run trains on diagnosis of its examples, which its operator does not accept; name other keys",
    ),
    (
        {"max_local_steps": 12},
        PLAIN,
        replace(PLAIN, local_steps=13),
        "take 13 local steps there, and its operator accepts 12; lower method.local_steps",
    ),
    ({"secure_aggregation": True}, MASKED, PLAIN, "only runs with federation.secure_aggregation, and this"),
    (
        {"secure_aggregation": True},
        MASKED,
        replace(MASKED, signed=False),
        r"without a clients\.json beside its key it cannot tell the other clients' keys from the server's",
    ),
    ({"min_clients": 5}, MASKED, PLAIN, "or have `min_clients` left out there"),
    ({"min_clients": 5}, MASKED, replace(MASKED, signed=False), "whose updates are masked"),
    (
        {"min_threshold": 3},
        MASKED,
        replace(MASKED, threshold=2),
        "a sum could be of 2 clients, and its operator accepts 3 or more; raise federation.secure_agg",
    ),
    ({"min_clip": 0.5}, NOISY, replace(NOISY, clip=0.4), r"clip is 0.4, and its operator accepts 0.5 or mor"),
    ({"max_clip": 0.5}, NOISY, replace(NOISY, clip=0.6), r"clip is 0.6, and its operator accepts 0.5 at mos"),
    ({"min_noise": 1.0}, NOISY, replace(NOISY, noise=0.9), "noise_multiplier is 0.9, and its operator accep"),
    ({"min_noise": 1.0}, NOISY, MASKED, "only runs with federation.privacy, and this one has none"),
    (
        {"max_clip": 1.0},
        NOISY,
        NOISY_BY_SERVER,
        "a client has nothing but its word. Set it, or have `noise_b",
    ),
    ({"max_clip": 1.0, "noise_by": "server"}, NOISY_BY_SERVER, PLAIN, "only runs with federation.privacy"),
]


@pytest.mark.parametrize(("demand", "good", "bad", "said"), DEMANDS)
def test_each_demand_says_what_is_asked_what_is_accepted_and_what_to_change(
    demand: dict[str, Any], good: Asked, bad: Asked, said: str
) -> None:
    check(Acceptance(), bad)
    check(Acceptance(**demand), good)
    with pytest.raises(NotAccepted, match=said):
        check(Acceptance(**demand), bad)


# --- what a run spends ----------------------------------------------------------------------------------


def test_sums_with_unlike_noise_are_one_with_less() -> None:
    assert together([(1.0, 1)], 1e-5) == pytest.approx(4.377, abs=1e-3)  # docs/privacy.md, and Balle and Wang
    # 1/15² + 1/20² = 1/12²; nine sums at z = 36 are one at 12 too
    assert together([(15.0, 1), (20.0, 1)], 1e-5) == pytest.approx(together([(12.0, 1)], 1e-5))
    assert together([(36.0, 9)], 1e-5) == pytest.approx(together([(12.0, 1)], 1e-5))
    assert together([], 1e-5) == together([(0.0, 0)], 1e-5) == 0.0
    assert together([(12.0, 1), (0.0, 1)], 1e-5) is None


def test_the_record_counts_every_sum_once_and_is_its_users(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        record = Record(tmp_path / "r.jsonl")
        record.asked("a", {"method": "fedavg"})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r.jsonl").stat().st_mode) == 0o600
    for run, noise in (("a", 15.0), ("b", 20.0)):
        record.sent(run, 1, noise, masked=True, check=lambda: None)
    again = Record(tmp_path / "r.jsonl")  # another process, or the same after a kill
    assert again.epsilon("a", 0.0, 0, 1e-5) == pytest.approx(together([(15.0, 1)], 1e-5))
    assert again.epsilon(None, 0.0, 0, 1e-5) == pytest.approx(together([(12.0, 1)], 1e-5))
    assert again.epsilon("a", 20.0, 1, 1e-5) == pytest.approx(together([(12.0, 1)], 1e-5))
    # the server's word counts for those who take it
    again.sent("c", 1, 12.0, masked=False, check=lambda: None)
    assert again.epsilon("c", 0.0, 0, 1e-5) is None
    assert again.epsilon("c", 0.0, 0, 1e-5, servers_word=True) == pytest.approx(together([(12.0, 1)], 1e-5))


def test_a_line_that_a_kill_cut_short_is_of_nothing_that_left(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Record(path).sent("a", 1, 2.0, masked=True, check=lambda: None)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:30])
    record = Record(path)
    assert record.epsilon("a", 0.0, 0, 1e-5) == together([(2.0, 1)], 1e-5)
    record.sent("a", 2, 2.0, masked=True, check=lambda: None)
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "damage", ["{", '{"run": "a"}', '{"run": "a", "round": 1, "noise": -1, "masked": true}']
)
def test_a_damaged_record_is_no_record(damage: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(damage + "\n")
    with pytest.raises(InputError, match=r"is damaged \(.*\): what this client has spent is not known"):
        Record(tmp_path / "r.jsonl")


def test_epsilon_is_limited_before_a_run_before_an_order_and_over_runs(tmp_path: Path) -> None:
    """At δ = 1e-5 one sum with z = 1 is ε = 4.377, two 6.38, three 8.09 (noise 1/√3)."""
    record = Record(tmp_path / "r.jsonl")
    tight = Consent(Acceptance(max_epsilon=8.0), record)
    with pytest.raises(
        NotAccepted, match=r"of this run would be 8\.\d+ at δ = 1e-05 after 3 more noisy sums"
    ):
        tight.invited("aa", NOISY)
    tight.invited("aa", replace(NOISY, everyone=False))  # it may be asked less often; who knows
    for round in (1, 2):
        tight.before(round, "keys", Payload())
        tight.sending(round, "masked")
        tight.sending(round, "unmask")  # only what holds an update counts
    for phase in ("keys", "shares", "masked"):
        with pytest.raises(ClientError, match="after 1 more noisy sums, and its operator accepts 8"):
            tight.before(3, phase, Payload())
    with pytest.raises(ClientError, match="`max_epsilon` changed there"):
        tight.sending(3, "masked")
    # the next run begins at nothing by itself, and not with the others
    Consent(Acceptance(max_epsilon=8.0), record).invited("bb", replace(NOISY, rounds=2))
    with pytest.raises(NotAccepted, match="ε of all runs in its record would be 9"):
        Consent(Acceptance(max_epsilon_total=8.0), record).invited("bb", replace(NOISY, rounds=2))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(line["run"], line.get("round")) for line in lines] == [
        *[("aa", None)] * 2, ("aa", 1), ("aa", 2), ("bb", None), ("bb", None),
    ]  # fmt: skip


def test_an_update_without_noise_leaves_nothing_to_spend(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.jsonl")
    plain = Consent(Acceptance(), record)
    plain.invited("aa", PLAIN)
    plain.before(1, "", Payload())
    plain.sending(1, "")
    with pytest.raises(NotAccepted, match="ε of all runs in its record would be infinite"):
        Consent(Acceptance(max_epsilon_total=100.0), record).invited("bb", NOISY)
    with pytest.raises(NotAccepted, match=r"only runs with federation\.privacy"):
        Consent(Acceptance(max_epsilon_total=100.0), record).invited("bb", PLAIN)


def test_a_small_delta_of_the_runs_own_buys_nothing(tmp_path: Path) -> None:
    """At δ = 0.5 any noise would do: ε is at the operator's δ."""
    consent = Consent(Acceptance(max_epsilon=4.0), Record(tmp_path / "r.jsonl"))
    with pytest.raises(NotAccepted, match=r"ε of this run would be 4\.377 at δ = 1e-05"):
        consent.invited("aa", replace(NOISY, rounds=1, delta=0.5))


# --- orders that say another thing than the invitation --------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        ({"min_clients": 5}, "round 1 has 4 clients, and its operator accepts 5 or more; ask more"),
        ({"min_threshold": 4}, "a sum could be of 3 clients, and its operator accepts 4 or more"),
    ],
)
def test_a_round_of_too_few_gets_no_shares(demand: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """The invitation names a fraction; how many clients that is, only the round says."""
    consent = Consent(Acceptance(**demand))
    consent.invited("aa", replace(MASKED, threshold=0.6))
    bench, bent = federation(SECURE, gate=consent)
    with pytest.raises(QuorumError, match=reason):
        bench.round(1, quorum=0.5)
    assert not bent.of("shares") and not bent.of("masked")


def test_the_last_sum_that_is_accepted_is_the_last(tmp_path: Path) -> None:
    privacy = Privacy(clip=0.5, noise_multiplier=1.0, delta=1e-3)
    consent = Consent(Acceptance(max_epsilon=35.0), Record(tmp_path / "r.jsonl"))  # four clients, one record
    consent.invited("aa", replace(NOISY, everyone=False))
    bench, bent = federation(SECURE, privacy, gate=consent)
    asked: list[str] = []

    def order(phase: str, client: int, tensors: dict[str, Tensor]) -> None:
        asked.append(phase)

    bent.order = order
    rounds = 0
    with pytest.raises(QuorumError, match="of this run would be"):
        for round in range(1, 9):
            asked.clear()
            bench.round(round, quorum=1.0)
            rounds += 1
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    sums = [line["round"] for line in lines if "round" in line]
    assert rounds >= 1 and sums == sorted(sums) and sums.count(1) == 4
    limit, more = (together([(1.0, count)], 1e-5) for count in (len(sums), len(sums) + 1))
    assert limit is not None and more is not None and limit <= 35.0 < more


# --- joining ----------------------------------------------------------------------------------------------


def document(**changes: Any) -> dict[str, Any]:
    base = {
        "data": {"train": "clients", "clients": 2, "holdout": {"source": "bundled"}, "max_length": 64},
        "method": {"name": "fedavg", "rounds": 3, "batch_size": 2, "lora": {"rank": 2}},
        "transport": {"name": "flower"},
    }
    for block, values in changes.items():
        base[block] = {**base.get(block, {}), **values}  # type: ignore[dict-item]
    return parse_config(base, "test").resolved()


class Home:
    """A client's machine: a worker whose join is the real one."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.data, self.said = folder / "own.jsonl", list[str]()
        rows = [{"q": f"say {i}", "a": "yes", "ssn": "123"} for i in range(5)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.record = folder / "record.jsonl"
        acceptance = Acceptance(**limits)
        consent = Consent(acceptance, Record(self.record), "fed.example.org:443", self.said.append)

        def joins(invitation: Mapping[str, Any]) -> Any:
            return join(invitation, data=self.data, fields={}, model=None, device="cpu", consent=consent)

        self.worker = Worker(joins, acceptance, folder / "state", self.said.append)

    def invited(self, config: dict[str, Any], weights: str = WEIGHTS) -> str:
        fields = {"do": "join", "run": "ab12", "client": 0, "config": json.dumps(config), "weights": weights}
        return str(self.worker.answer(Message(fields)).fields.get("fault", ""))


FIELDS = {"instruction": "q", "output": "a", "input": None, "category": None}


def test_what_a_run_asks_is_shown_and_recorded_also_if_it_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path, methods=["fedkseed"])
    said = home.invited(document(data={"fields": FIELDS}))
    assert said.startswith("its operator accepts fedkseed, and the method is fedavg")
    assert home.said == [
        "run ab12 asks:",
        "    it trains bundled by fedavg (lora) on your 5 examples: 3 rounds of up to 3 steps",
        "    it reads of each example: q, a",
        "    what is trained goes to fed.example.org:443 after every round; what is done with it there this "
        "machine cannot see",
        "    the server sees this client's update as it is",
        "    there is no noise: who gets the models may learn of single examples",
        f"left out: {said}",
    ]
    (line,) = [json.loads(text) for text in home.record.read_text().splitlines()]
    assert line["run"] == "ab12" and line["asked"]["words"] == [text.strip() for text in home.said[1:6]]
    assert line["asked"]["fields"] == ["q", "a"] and line["asked"]["rounds"] == 3


def test_a_server_that_names_a_key_that_is_not_its_business_gets_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path, fields=["q", "a"])
    for fields in ({**FIELDS, "output": "ssn"}, {**FIELDS, "input": "ssn"}, {**FIELDS, "category": "ssn"}):
        said = home.invited(document(data={"fields": fields}))
        assert said.startswith("the run trains on ssn of its examples, which its operator does not accept")
    assert "has other weights" in home.invited(document(data={"fields": FIELDS}))  # as far as the model


def test_a_run_is_checked_before_a_model_is_loaded_or_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation import client

    monkeypatch.setattr(client, "load_base", lambda *a, **k: pytest.fail("a model was loaded"))
    home = Home(tmp_path, models=["cd" * 32])
    config = document(data={"fields": FIELDS, "template": "alpaca"}, model={"name": "evil/model"})
    assert "accepts models with the SHA-256 cdcdcdcdcdcd, and the run's is abab" in home.invited(config)


def test_invited_anew_to_the_same_run_it_is_checked_anew(tmp_path: Path) -> None:
    from fedtune.models.load import load_model

    loaded = load_model("bundled", dtype="float32", initial="pretrained", seed=0, base=Path("."))
    home = Home(tmp_path, max_local_steps=3)
    assert home.invited(document(data={"fields": FIELDS}), loaded.weights_sha256) == ""
    more = document(data={"fields": FIELDS}, method={"name": "fedavg", "local_epochs": 9, "batch_size": 2})
    assert "would take 27 local steps" in home.invited(more, loaded.weights_sha256)


def test_what_clients_seal_for_each_other_names_all_that_they_go_by() -> None:
    def digest(weights: str = WEIGHTS, **changes: Any) -> bytes:
        return settings_digest(parse_config(document(**changes), "test"), weights)

    same = digest()
    assert digest(model={"name": "elsewhere/bundled", "device": "cuda"}, data={"template": "plain"}) == same
    assert digest(evaluation={"every": 2}) == digest(checkpoints={"keep": 5}) == same
    others = [
        digest("cd" * 32),
        digest(method={"name": "fedavg", "rounds": 3, "lr": 0.5}),
        digest(data={"template": "alpaca"}),
        digest(data={"fields": FIELDS}),
        digest(federation={"quorum": 2}),
        digest(federation={"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}),
    ]
    assert len({same, *others}) == 7
