"""Plans: held to what small runs measure, to hand-worked numbers, and to clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import fedtune, write_config
from hypothesis import given
from hypothesis import strategies as st
from reproduced import load
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fedtune.config.file import parse_config
from fedtune.errors import InputError
from fedtune.measure.flops import FlopCounter
from fedtune.measure.quantities import BITS_PER_SECOND, BYTES, quantity
from fedtune.methods.registry import METHODS
from fedtune.planning.block_turns import Cost, Turn, mean_cost
from fedtune.planning.fake import Fakes, values
from fedtune.planning.memory import PARTS, PartsMeter
from fedtune.planning.plan import plan
from fedtune.planning.rank import CANDIDATES, Candidate, ClientResources, judge, plan_all

PROJECT = Path(__file__).resolve().parents[1]
plan_measured = load("plan_measured")


@pytest.mark.parametrize("method", plan_measured.METHODS)
@pytest.mark.parametrize("model", ["bundled", "stories260K-hf", "babyllama105-hf"])
def test_a_plan_is_what_a_run_measures(model: str, method: str, request: pytest.FixtureRequest) -> None:
    if model != "bundled":
        model = str(request.getfixturevalue("shared_models") / model)
    row = plan_measured.compare(model, method)
    assert (row["planned_down"], row["planned_up"]) == (row["down"], row["up"])
    assert row["planned_trainable"] == row["trainable"]
    assert row["planned_memory"] == pytest.approx(row["memory"], rel=0.15)
    assert row["planned_evaluation_memory"] == pytest.approx(row["evaluation_memory"], rel=0.01)
    assert row["planned_flops"] == pytest.approx(row["flops"], rel=0.05)
    sends = method not in ("badam", "standalone", "centralized", "zero-shot")
    assert (row["up"] > 0) == sends and (row["memory"] > 0) == (method != "zero-shot")


@pytest.mark.parametrize(
    "form",
    [  # each with its own way through the planner; docs/planning.md has all
        "fedavg, lora, one-shot, asynchronous",
        "fedavg, lora, stacked (FLoRA)",
        "fedavg, lora, unlike ranks",
        "fedavg, p-tuning (FedPTuning)",
        "fedavg, full, FedProx, accumulation",
        "fedavg, full, FedProx, one batch to accumulate",
        "fedavg, full, FedAdam",
        "fedavg, full, SCAFFOLD",
        "fedkseed, dense sums",
        "infinite-pool, model sent",
        "fedbiot, layer-dropout",
        "fedcybgd, hybrid",
        "fedcybgd, adapter, layer-drop",
        "fedcybgd, embeddings and norm too",
        "badam, embeddings too",
    ],
)
def test_a_plan_of_a_form_is_what_a_run_measures(form: str, request: pytest.FixtureRequest) -> None:
    row = plan_measured.compare(str(request.getfixturevalue("shared_models") / "stories260K-hf"), form)
    assert (row["planned_down"], row["planned_up"]) == (row["down"], row["up"])
    assert row["planned_trainable"] == row["trainable"]
    assert row["planned_memory"] == pytest.approx(row["memory"], rel=0.01)
    assert row["planned_server_memory"] == pytest.approx(row["server_memory"], rel=0.02)
    assert row["planned_evaluation_memory"] == pytest.approx(row["evaluation_memory"], rel=0.03)
    assert row["planned_flops"] == pytest.approx(row["flops"], rel=0.05) and row["flops"] > 0


def test_operations_of_turns_worked_out_by_hand() -> None:
    # around the blocks 10 forward, 20 backward; a block 3 and 5; the trained one 7, embeddings 30 more
    low = Cost(Turn.of("0", dict.fromkeys(range(4), False)), 10 + 4 * 3, 20 + 7 + 3 * 5)
    high = Cost(Turn.of("3", dict.fromkeys(range(4), False)), 10 + 4 * 3, 20 + 7)
    embeddings = Cost(Turn.of("embeddings", dict.fromkeys(range(4), False)), 10 + 4 * 3, 20 + 30 + 4 * 5)
    assert (low.turn.whole_above, high.turn.whole_above, embeddings.turn.whole_above) == (3, 0, 4)
    second = Turn.of("1.added", dict.fromkeys(range(4), False))
    assert mean_cost([low, high], [second]) == (22, 27 + 2 * 5)
    assert mean_cost([low, high, embeddings], [embeddings.turn, high.turn]) == (22, (70 + 27) // 2 + 0)
    # of six blocks three are there, one of them pruned to a third, above the one that is trained
    whole = Cost(Turn.of("0", dict.fromkeys(range(6), False)), 10 + 6 * 3, 20 + 7 + 5 * 5)
    pruned = Cost(Turn.of("5", {0: True, 3: True, 5: False}), 10 + 3 + 2, 27)
    turn = Turn.of("2", {2: False, 3: True, 5: False})
    assert turn == Turn("block", whole=2, pruned=1, whole_above=1, pruned_above=1)
    forward, backward = mean_cost([whole, low, high, pruned], [turn])
    assert (forward, backward) == (10 + 2 * 3 + 1, round(27 + 5 + 5 / 3))


def test_every_method_is_compared_and_ranked() -> None:
    assert {settings["name"] for settings in plan_measured.METHODS.values()} == set(METHODS)
    assert {settings["name"] for settings in CANDIDATES.values()} == set(METHODS)


def document(tmp_path: Path, method: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": {"name": str(tiny(tmp_path))}, "method": method, **more}


def tiny(tmp_path: Path, **other: int) -> Path:
    """A config.json and nothing else: two blocks of width 8, untied, 10 tokens, unless told otherwise."""
    shape = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 10,
        "tie_word_embeddings": False,
        **other,
    }
    folder = tmp_path / "tiny"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


BLOCK = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8  # attention, MLP, two norms
ALL = 2 * BLOCK + 2 * 10 * 8 + 8


def test_numbers_worked_out_by_hand(tmp_path: Path) -> None:
    config = document(
        tmp_path,
        {"name": "fedavg", "trainable": "full", "rounds": 3, "local_steps": 7, "batch_size": 2},
        data={"train": "owner/not-here", "clients": 4, "max_length": 16, "holdout": {"fraction": 0.1}},
        federation={"clients_per_round": 2},
    )
    found = plan(parse_config(config, "test")).document
    assert (found["total_parameters"], found["trainable_parameters"]) == (ALL, ALL)
    payload = found["payload_bytes"]
    assert payload["down_per_client_round"] == payload["up_per_client_round"] == 4 * ALL
    assert payload["total"] == 3 * 2 * 2 * 4 * ALL
    assert found["local_steps"] == {"least": 7, "most": 7}
    assert found["batch"].items() >= {"examples": 2, "longest": 16}.items()
    memory = found["client_peak_memory_bytes"]
    buffers = 4 * 2  # rotary frequencies of a head: half of its width of 4
    assert memory["weights"] in (4 * ALL + buffers, 4 * ALL + 2 * buffers)
    assert 2 * 4 * ALL <= memory["optimizer"] <= 2 * 4 * ALL + 4 * 22  # two moments, and steps' counters
    assert sum(memory[part] for part in PARTS) == memory["total"]
    # a matrix costs 2 operations an entry and token; backward twice that, but for the first block's input
    linear, attention = 2 * (2 * (BLOCK - 16) + 80), 2 * 2 * (2 * 16 * 8)
    assert found["flops_per_token"]["forward"] == linear + attention
    assert 2 * linear <= found["flops_per_token"]["backward"] <= 2 * linear + 3 * attention
    assert any("owner/not-here" in note for note in found["notes"])


def test_what_is_sent_once_is_told_from_what_is_sent_each_round(tmp_path: Path) -> None:
    config = document(tmp_path, {"name": "fedcybgd", "rounds": 2, "local_steps": 1}, data={"clients": 2})
    payload = plan(parse_config(config, "test"), steps=False).document["payload_bytes"]
    first, later = payload["first_time"], payload["later"]
    assert first["down"] > 4 * ALL and first["up"] == later["up"] == 4 * BLOCK
    assert 4 * BLOCK < later["down"] < 2 * 4 * BLOCK + 2000  # only what has changed, a block or both
    assert payload["down"] == 2 * first["down"] + 2 * later["down"]


def test_a_plan_does_not_depend_on_threads(tmp_path: Path) -> None:
    # matrices so large that runs share out their forming among three threads
    model = {"name": str(tiny(tmp_path, hidden_size=512, intermediate_size=1024, num_hidden_layers=3))}
    data: dict[str, Any] = {"train": "owner/not-here", "holdout": {"fraction": 0.1}, "max_length": 16}
    data |= {"clients": 2}
    few = {"rounds": 2, "local_steps": 2}
    public = {"public": {"source": "rows.jsonl"}}
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 8)
    pruned = {"adapter_layers": 1, "emulator": "channel-pruning", "alignment": {"steps": 1}}
    configs: list[dict[str, Any]] = [
        {"method": {"name": "fedkseed", **few}},
        {"method": {"name": "fedkseed-pro", **few}},
        {"method": {"name": "infinite-pool", **few}},
        {"method": {"name": "fedavg", "trainable": "lora", **few}},
        {"method": {"name": "fedbiot", **few, **pruned}, "data": {**data, **public}},
        {"method": {"name": "fedcybgd", **few}},
    ]
    configs = [{"data": data, **config, "model": model} for config in configs]
    plans = {}
    for threads in (1, 2, 3):
        plans[threads] = subprocess.run(
            [sys.executable, "-c", PLANS, str(threads)],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            input=json.dumps(configs),
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        ).stdout
    assert plans[1] == plans[2] == plans[3]
    assert len(json.loads(plans[1])) == len(configs)


PLANS = """
import json, sys
import torch
from fedtune.config.file import parse_config
from fedtune.planning.plan import plan
torch.set_num_threads(int(sys.argv[1]))  # of itself PyTorch takes no more than there are cores
print(json.dumps([plan(parse_config(config, "test")).document for config in json.load(sys.stdin)]))
"""


def test_unknown_steps_stay_unknown(tmp_path: Path) -> None:
    data = {"train": "owner/not-here", "holdout": {"fraction": 0.1}, "max_length": 8}
    config = document(tmp_path, {"name": "fedavg", "local_epochs": 1}, data=data)
    found = plan(parse_config(config, "test")).document
    assert found["local_steps"] == {"least": None, "most": None} and found["flops_per_client_round"] is None
    data = {**data, "clients": None, "partition": {"name": "by-field"}}
    with pytest.raises(InputError, match=r"data\.clients"):
        plan(parse_config(document(tmp_path, {"name": "fedavg"}, data=data), "test"))


def test_parts_of_a_step_worked_out_by_hand() -> None:
    layer = nn.Linear(64, 32, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    x = torch.ones(16, 64)

    def step(meter: PartsMeter) -> None:
        with meter.whole([layer, optimizer]):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    once, repeated, second = PartsMeter(), PartsMeter(repeats=True), PartsMeter()
    step(once)
    optimizer.state.clear()
    step(repeated)
    step(second)  # a second step, really taken
    assert repeated.peak_bytes == second.peak_bytes > 0
    weight = 4 * 64 * 32
    assert second.parts["weights"] == weight and second.parts["optimizer"] == 2 * weight + 4
    # the gradient has just been made of input and output's gradient; the loss and its own are scalars
    assert second.peak_bytes == 3 * weight + 4 + weight + 4 * 16 * 64 + 4 * 16 * 32 + 2 * 4
    assert once.parts["optimizer"] == 2 * weight + 4
    assert (second.forward, second.backward) == (2 * 16 * 64 * 32, 2 * 16 * 64 * 32)


def test_flops_of_attention_on_a_cpu() -> None:
    q = torch.zeros(2, 3, 5, 8, requires_grad=True)
    with FlopCounter() as counter:
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.forward == 2 * (2 * 2 * 3 * 5 * 5 * 8)
    assert counter.backward == 5 * (2 * 2 * 3 * 5 * 5 * 8)  # scores again, and four gradients


def test_a_large_mask_of_attention_becomes_numbers_without_content() -> None:
    """Each block makes such numbers anew; a small mask keeps its values, on which a model may branch."""
    least, most = torch.zeros((), dtype=torch.bfloat16), torch.tensor(-3.0, dtype=torch.bfloat16)
    large, small = (torch.arange(n) % 3 == 0 for n in (2**20, 2**20 - 1))
    with values():
        before = torch.where(large, least, most)  # nothing without content was met
        Fakes().empty((2,), torch.float32) + 1
        without, kept = torch.where(large, least, most), torch.where(small, least, most)
        assert without.untyped_storage().nbytes() == before.untyped_storage().nbytes() == 2 * 2**20
    assert isinstance(without, FakeTensor) and without.dtype == torch.bfloat16
    for real in (before, kept):
        assert not isinstance(real, FakeTensor) and real[:4].tolist() == [0.0, -3.0, -3.0, 0.0]


def test_fake_tensors_answer_and_take_real_masks() -> None:
    tensor = Fakes().empty((4, 3), torch.float32)
    with values():
        assert float(tensor.sum()) == 1.0 and bool(torch.isfinite(tensor).all())
        assert tensor[torch.tensor([True, False, True, False])].shape == (2, 3)


@given(st.floats(1e-3, 1e6), st.sampled_from(sorted(BYTES)), st.booleans())
def test_figures_with_units(value: float, unit: str, blank: bool) -> None:
    assert quantity(f"{value!r}{' ' if blank else ''}{unit}", BYTES, "--x") == value * BYTES[unit]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "needs a unit"),
        ("-8GB", "above zero"),
        ("0GB", "above zero"),
        ("8gb", "not known"),
        ("nanGB", "number"),
        ("GB", "number"),
        ("", "number"),
        ("8 G B", "number"),
    ],
)
def test_figures_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantity(text, BYTES, "--client-memory")


def test_bits_and_bytes_of_links() -> None:
    assert quantity("5Mbps", BITS_PER_SECOND, "--uplink") == 5e6
    assert quantity("5MB/s", BITS_PER_SECOND, "--uplink") == 40e6
    assert quantity("1GiB", BYTES, "--client-memory") == 2**30


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> list[Candidate]:
    folder = tiny(tmp_path_factory.mktemp("models"))
    deep = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(deep))
    return plan_all(str(folder), ["data.max_length=8", "data.clients=3"], examples=4)


PLENTY = ClientResources(memory=1e12, uplink=1e6, downlink=8e6, model_private=False)


def test_ranking_orders_by_time_and_says_why_not(candidates: list[Candidate]) -> None:
    found = judge(candidates, PLENTY)
    rows = {row["method"]: row for row in found["methods"]}
    assert rows.keys() == CANDIDATES.keys()
    fitting = [row for row in found["methods"] if row["fits"]]
    times = [row["seconds"]["total"] for row in fitting]
    assert times == sorted(times) and found["pick"]["method"] == fitting[0]["method"]
    assert "least time" in found["pick"]["why"]
    for name in ("offsite-tuning", "centralized", "badam"):
        assert rows[name]["reasons"] == ["all examples have to be in one place"]
    assert "reference" in rows["standalone"]["reasons"][0] and not rows["zero-shot"]["fits"]
    full = rows["fedavg, full"]
    payload = full["plan"]["payload_bytes"]["down_per_client_round"]
    assert full["seconds"]["first_round"] == pytest.approx(8 * payload / 8e6 + 8 * payload / 1e6)
    assert full["seconds"]["wire"] == pytest.approx(3 * full["seconds"]["first_round"])
    turn = rows["fedcybgd"]["plan"]["payload_bytes"]  # its clients come one after another
    in_turn = 3 * (8 * turn["first_time"]["down"] / 8e6 + 8 * turn["first_time"]["up"] / 1e6)
    assert rows["fedcybgd"]["seconds"]["first_round"] == pytest.approx(in_turn)


def test_methods_are_ranked_with_the_same_settings(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = judge(candidates, PLENTY)["same_settings"]
    assert found == {"gradient_checkpointing": "full", "offload_params": "none"}
    again = {c.name: getattr(c.config.method, "gradient_checkpointing", None) for c in candidates}
    gradientless = {"fedkseed", "fedkseed-pro", "infinite-pool", "zero-shot"}
    assert {name for name, value in again.items() if value != "full"} == gradientless
    for name in CANDIDATES.keys() - {"fedavg, full", "fedavg, lora", "fedkseed", "fedcybgd", "zero-shot"}:
        monkeypatch.delitem(CANDIDATES, name)
    changed = ["method.gradient_checkpointing=2", "method.offload_params=disk", "data.max_length=8"]
    other = plan_all(str(tiny(tmp_path)), changed)
    assert judge(other, PLENTY)["same_settings"] == {"gradient_checkpointing": 2, "offload_params": "disk"}
    where = {c.name: getattr(c.config.method, "offload_params", None) for c in other}
    assert where.pop("fedavg, full") == "none"  # freezes nothing
    assert where == {"fedavg, lora": "disk", "fedkseed": None, "fedcybgd": "disk", "zero-shot": None}


def test_a_private_model_and_little_memory(candidates: list[Candidate]) -> None:
    private = judge(candidates, ClientResources(1e12, 1e6, 8e6, model_private=True))
    fitting = {row["method"] for row in private["methods"] if row["fits"]}
    assert fitting == {"fedbiot", "fedot"} and private["pick"]["method"] in fitting
    rows = {row["method"]: row for row in judge(candidates, PLENTY)["methods"]}
    peak = rows["fedavg, full"]["plan"]["client_peak_memory_bytes"]["total"]
    less = judge(candidates, ClientResources(peak - 1, 1e6, 8e6, model_private=False))
    refused = {row["method"]: row for row in less["methods"]}["fedavg, full"]
    assert not refused["fits"] and "of memory and has" in refused["reasons"][0]
    nothing = judge(candidates, ClientResources(1.0, 1e6, 8e6, model_private=False))
    assert nothing["pick"]["method"] is None


def test_computing_counts_where_the_speed_is_known(candidates: list[Candidate]) -> None:
    slow = judge(candidates, ClientResources(1e12, 1e12, 1e12, model_private=False, speed=1e6))
    row = {row["method"]: row for row in slow["methods"]}["fedavg, lora"]
    steps = row["plan"]["local_steps"]["most"]
    assert steps == 1  # four examples, batches of eight
    operations = sum(row["plan"]["flops_per_token"].values()) * 4 * 8 * steps * 3
    assert row["seconds"]["compute"] == pytest.approx(operations / 1e6, rel=1e-3)
    assert row["seconds"]["total"] == row["seconds"]["wire"] + row["seconds"]["compute"]


def test_a_method_that_does_not_apply_is_a_row_with_its_reason(tmp_path: Path) -> None:
    rows = judge(plan_all(str(tiny(tmp_path)), ["data.max_length=8"]), PLENTY)["methods"]
    refused = {row["method"]: row["reasons"][0] for row in rows if row["plan"] is None}
    too_few_blocks = {"fedbiot", "fedot", "offsite-tuning", "fedcybgd, layer-drop", "fedcybgd, hybrid"}
    assert set(refused) == too_few_blocks
    assert all(reason.startswith("does not apply: method.") for reason in refused.values())


def test_the_command(tmp_path: Path) -> None:
    config = document(tmp_path, {"name": "fedavg", "local_steps": 1}, data={"max_length": 16})
    path = write_config(tmp_path / "config.json", config)
    found = fedtune("plan", path, "method.rounds=2", "--json", cwd=tmp_path)
    assert found.status == 0 and found.err == ""
    keys = ("method", "model", "total_parameters", "trainable_parameters", "payload_bytes")
    assert all(key in found.json() for key in keys) and found.json()["rounds"] == 2
    shown = fedtune("plan", path, cwd=tmp_path)
    assert shown.status == 0 and "trainable parameters" in shown.out and "Peak memory" in shown.out
    assert "local steps" in shown.out and "not known" not in shown.out
    elsewhere = fedtune("plan", path, "data.train=some/where", "method.local_steps=null", cwd=tmp_path)
    assert elsewhere.status == 0 and "not known" in elsewhere.out
    assert "some/where is not on this machine" in elsewhere.out


FIGURES = ("--client-memory", "8GB", "--uplink", "5Mbps", "--downlink", "50Mbps")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "bundled", *FIGURES[:4]), "--downlink"),
        (("--model", "bundled", "--client-memory", "8", *FIGURES[2:]), "needs a unit"),
        (("--model", "bundled", "--client-memory", "-8GB", *FIGURES[2:]), "above zero"),
        (("--model", "bundled", *FIGURES[:2], "--uplink", "5", *FIGURES[4:]), "needs a unit"),
        (("--model", "bundled", *FIGURES, "method.rounds=3"), "cannot be set for all"),
        (("--model", "bundled", *FIGURES, "--client-speed", "1TFLOPS"), "needs examples"),
        (("--model", "./nowhere", *FIGURES), 'there is no "./nowhere" on this machine'),
        (("--model", "bundled", *FIGURES, "config.json"), "not both"),
        (("config.json", "--uplink", "8Mbps"), "only together with --model"),
        (("config.json", "method.name=fedfoo"), "not known"),
        (("config.json", "method.name=fedbiot"), "public"),
        (("config.json", "method.name=fedbiot", "data.public={source: bundled}"), "layer_dropout"),
        (("config.json", "model.name=empty"), "no config.json"),
        (("missing.yaml",), "no such configuration"),
        (("rounds=1",), "needs a CONFIG"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_config(tmp_path / "config.json", {"method": {"name": "fedavg"}})
    found = fedtune("plan", *arguments, cwd=tmp_path)
    assert found.status == 2 and message in found.err and found.out == ""
    assert "Traceback" not in found.err
