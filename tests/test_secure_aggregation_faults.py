"""Clients that break or lie under secure aggregation, and a server that asks for too much."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from protected import Bent, federation
from secure_rounds import SECURE, equal
from torch import Tensor
from toy import items

from fedtune.core.cohort import QuorumError
from fedtune.core.types import ClientError, Payload
from fedtune.core.wire import Content, encode
from fedtune.protection.settings import SecureAggregation


def changed(phase: str, client: int, **new: Any) -> Any:
    """A change of one client's reply in one phase; each value makes the new tensor from the old."""
    return lambda at, c, tensors: (
        tensors | {name: make(tensors[name]) for name, make in new.items()}
        if (at, c) == (phase, client)
        else None
    )


BROKEN: dict[str, tuple[Any, str]] = {
    "a vector too short": (changed("masked", 2, masked=lambda t: t[:-1]), r"shape \(80, 8\) was asked"),
    "a vector of floats": (changed("masked", 2, masked=lambda t: t.float()), "float32"),
    "a key of zeros": (changed("keys", 2, keys=lambda t: t * 0), "a key that came twice"),
    "a key that fixes the secret": (
        changed("keys", 2, keys=lambda t: torch.stack([t[0], t[1] * 0])),
        "a key that gives everyone the same secret",
    ),
    "a key too short": (changed("keys", 2, keys=lambda t: t[:, :-1]), r"shape \(2, 32\) was asked"),
    "shares that do not open": (
        changed("shares", 2, sealed=lambda t: t ^ 1),
        r"the shares it sent do not open, so clients \[0, 1, 3\] say",
    ),
    "shares that are not as committed": (
        changed("shares", 2, commitments=lambda t: t ^ 1),
        r"the shares it sent do not open, so clients \[0, 1, 3\] say",
    ),
    "says that no share opens": (
        changed("opened", 2, opened=lambda t: torch.tensor([False, False, True, False])),
        r"it could not open the shares of clients \[0, 1, 3\], which others could",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_client_is_left_out_and_named(what: str, caplog: pytest.LogCaptureFixture) -> None:
    bench, bent = federation(SECURE)
    bent.reply, reason = BROKEN[what]
    outcome = bench.round(1, quorum=0.5)
    assert sorted(outcome.clients) == [0, 1, 3]
    assert list(outcome.left_out) == [2]
    assert re.search(reason, outcome.left_out[2])
    assert "client 2 is left out" in caplog.text
    plain, other = federation()
    other.reply = lambda at, client, tensors: "no battery" if client == 2 else None
    plain.round(1, quorum=0.5)
    assert equal(plain, bench)


def test_of_three_one_that_accuses_both_others_is_left_out_alone() -> None:
    bench, bent = federation(SECURE, data={c: items(c, 1) for c in range(3)})
    bent.reply = changed("opened", 0, opened=lambda t: torch.tensor([True, False, False]))
    outcome = bench.round(1, quorum=0.5)
    assert sorted(outcome.clients) == [1, 2]
    assert list(outcome.left_out) == [0]


def test_two_clients_with_one_key_are_both_left_out() -> None:
    bench, bent = federation(SecureAggregation(threshold=3), data={c: items(c, 1) for c in range(5)})
    bent.reply = lambda at, client, tensors: (
        tensors | {"keys": bent.of("keys")[0]["keys"]} if (at, client) == ("keys", 4) else None
    )
    outcome = bench.round(1, quorum=0.5)
    assert sorted(outcome.clients) == [1, 2, 3]
    assert {c: "came twice" in reason for c, reason in outcome.left_out.items()} == {0: True, 4: True}


def test_who_returns_other_shares_is_named_and_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    bench, bent = federation(SECURE)
    bent.reply = changed("unmask", 2, shares=lambda t: t ^ 1)
    bench.round(1)
    assert "client 2 returned other shares of clients [0, 1, 2, 3] than it was given" in caplog.text
    plain, _ = federation()
    plain.round(1)
    assert equal(plain, bench)


def test_who_commits_to_another_secret_stops_the_round_and_is_named() -> None:
    bench, bent = federation(SECURE)
    bent.reply = changed("shares", 2, secret=lambda t: t ^ 1)
    with pytest.raises(QuorumError, match="shares that client 2 dealt do not give the secret"):
        bench.round(1)


# A server that asks for too much


def refused(bent: Bent, bench: Any, reason: str) -> None:
    with pytest.raises(QuorumError, match=reason):
        bench.round(1, quorum=0.5)


def test_a_client_answers_each_phase_once() -> None:
    bench, bent = federation(SECURE)
    bench.round(1)
    for phase in ("shares", "opened", "masked", "unmask"):
        frame = next(frame for at, client, frame in bent.orders if (at, client) == (phase, 1))
        with pytest.raises(ClientError, match=f"phase {phase} of round 1.*answered once; it holds nothing"):
            bench.runner.handle(1, frame)
    assert all(not state.tensors for state in bench.runner.states.values())  # secrets are gone


@pytest.mark.parametrize("phase", ["shares", "opened", "masked"])
def test_a_client_does_not_go_back(phase: str) -> None:
    bench, bent = federation(SECURE)
    frames: dict[str, bytes] = {}

    def twice(at: str, client: int, tensors: dict[str, Tensor]) -> None:
        if client == 1:
            frames[at] = next(f for p, c, f in reversed(bent.orders) if (p, c) == (at, 1))
            if at == phase:
                with pytest.raises(ClientError, match="answered once; it holds phase"):
                    bench.runner.handle(1, frames[at])

    bent.reply = twice
    bench.round(1)
    assert phase in frames


def test_a_client_refuses_to_unmask_for_too_few() -> None:
    bench, bent = federation(SECURE)
    bent.order = lambda at, client, tensors: {"survivors": torch.tensor([0, 1])} if at == "unmask" else None
    refused(bent, bench, r"0 of 4 clients were there after phase unmask")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("terms", [2, 3, 14, 4], "a threshold of 2 of 4 clients is not safe"),
        ("terms", [1, 3, 14, 4], "a threshold of 1 of 4 clients is not safe"),
        ("terms", [3, 0, 14, 4], "0 of 4 clients are said to make the whole noise"),
        ("terms", [3, 5, 14, 4], "5 of 4 clients are said to make the whole noise"),
        ("terms", [3, 3, 13, 4], r"weigh \(2, 3, 4, 5\) of 13; each must weigh at least 1"),
        ("terms", [3, 3, 14], "the terms of the round are not as they must be"),
        ("weights", [1, 2, 3], "the terms of the round are not as they must be"),
        ("clients", [0, 1, 2, 2], r"are said to be of clients \[0, 1, 2, 2\]"),
        ("clients", [5, 6, 7, 8], r"are said to be of clients \[5, 6, 7, 8\]"),
    ],
)
def test_a_client_refuses_unsafe_terms(name: str, value: list[int], reason: str) -> None:
    bench, bent = federation(SECURE)
    bent.order = lambda at, client, tensors: tensors | {name: torch.tensor(value)} if at == "shares" else None
    refused(bent, bench, reason)


def test_a_client_refuses_keys_in_the_name_of_others() -> None:
    """The server puts a key of its own in the place of the client's, or one key in two places."""
    for change, reason in (
        (lambda keys: keys.flip(0), "as its own are not those that it made"),
        (lambda keys: torch.stack([keys[0], keys[1], keys[2], keys[2]]), "two of the keys .* are the same"),
    ):
        bench, bent = federation(SECURE)
        bent.order = lambda at, client, tensors, change=change: (  # type: ignore[misc]
            tensors | {"keys": change(tensors["keys"])} if at == "shares" else None
        )
        refused(bent, bench, reason)


def test_a_client_sends_no_plain_update_where_its_configuration_says_masks() -> None:
    bench, _ = federation()
    secure, _ = federation(SECURE)
    frame = encode(Content(Payload({"w": torch.zeros(1), "more": torch.zeros(7, 11)}), {"round": 1}))
    assert bench.runner.handle(1, frame)
    with pytest.raises(ClientError, match="asked for a plain update"):
        secure.runner.handle(1, frame)
    keys = encode(Content(Payload(), {"round": 1, "phase": "keys"}))
    assert secure.runner.handle(1, keys)
    with pytest.raises(ClientError, match="which its configuration does not have"):
        bench.runner.handle(1, keys)
