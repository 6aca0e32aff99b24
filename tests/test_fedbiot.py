"""FedBiOT: Table 5, what crosses the wire and what a client holds, and who changes what."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fedbiot_bench import ALIGNED, CPU, SIZES, SMALL, Run, items, tensors_of
from model_families import build
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.bench import emulator as emulator_bench
from fedtune.bench import random_model
from fedtune.core import client as client_module
from fedtune.core.cohort import Cohort, QuorumError
from fedtune.core.store import Store
from fedtune.core.types import MODEL, Frame, Payload, ServerEnv
from fedtune.core.wire import Content, decode, encode
from fedtune.methods import registry
from fedtune.methods.fedbiot import method as fedbiot_module
from fedtune.methods.fedbiot.server import ADAPTER, EMULATOR, factors
from fedtune.models.blocks import find_blocks
from fedtune.models.emulator import ARCHITECTURE, flops_per_token, kept_blocks, take
from fedtune.models.pruning import find_mlp, largest_channels


@pytest.mark.parametrize(
    ("name", "layers", "dropout", "trainable", "mb", "gflop"),
    [
        ("fedbiot", 2, 0.2, 262_144, "14.68", "5.47"),
        ("fedbiot", 4, 0.2, 524_288, "15.73", "5.87"),
        ("fedbiot", 2, 0.5, 262_144, "9.96", "3.65"),
        ("fedbiot", 4, 0.5, 524_288, "11.53", "4.25"),
        ("fedot", 4, 0.2, 524_288, "4.19", "10.33"),
        ("fedot", 4, 0.5, 524_288, "4.19", "7.09"),
    ],
)
def test_table_5(name: str, layers: int, dropout: float, trainable: int, mb: str, gflop: str) -> None:
    settings = {"adapter_layers": layers, "layer_dropout": dropout, "alignment": {"steps_before": 0}}
    method: Any = registry.build(registry.config_class(name).model_validate(settings), 0)
    method.prepare(ServerEnv(items(1, 0) if name == "fedbiot" else [], 0, CPU))
    with torch.device("meta"):
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32000,
                hidden_size=4096,
                intermediate_size=11008,
                num_hidden_layers=32,
                num_attention_heads=32,
            )
        ).to(torch.float16)
    block = sum(p.numel() for p in find_blocks(llama).modules[0].parameters())
    state = method.init(method.client_model(lambda: llama))
    (order,) = method.plan(state, 1, Cohort((0,), {0: 1}, 1))
    sent = order.payload.tensors
    down = sum(t.nbytes for n, t in sent.items() if not n.startswith(MODEL))
    up = sum(spec.dtype.itemsize * torch.Size(spec.shape).numel() for spec in order.expects.values())
    assert up == 4 * trainable == 4 * layers * 131_072
    assert f"{(down + up) / 1e6:.2f}" == mb
    # the emulator and the adapter are among what is sent once
    emulated = method.at_server().emulate(state.merged)
    places = method.division(emulated)
    count = len({n.split(".")[2] for n in sent if n.startswith(f"{MODEL}model.layers.")})
    assert count == len(places.adapter) + len(places.middle) == len(find_blocks(emulated).modules)
    assert block == 202_383_360
    assert f"{flops_per_token(block + 131_072, places) / 1e9:.2f}" == gflop


def rows(tensor: Tensor) -> list[bytes]:
    matrix = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
    return [row.numpy().tobytes() for row in matrix]


def everything(model: nn.Module) -> bytes:
    return b"".join(row for tensor in tensors_of(model).values() if tensor.ndim for row in rows(tensor))


def secrets(emulator: str, dropout: float) -> list[bytes]:
    """Rows of weights of the 6-block model that no client may see, pre-aligned on query and value."""
    model = build("llama", blocks=6)
    modules = find_blocks(model).modules
    kept = [j for j in kept_blocks(5, dropout)] if emulator == "layer-dropout" else range(5)
    hidden: list[bytes] = []
    for index in range(5):
        weights = take(model, [index])[0].tensors
        if index not in kept:
            hidden += [row for tensor in weights.values() for row in rows(tensor)]
            continue
        for name in ("q_proj", "v_proj"):  # what pre-alignment has changed
            hidden += rows(weights[f"self_attn.{name}.weight"])
        if emulator == "channel-pruning":
            mlp = find_mlp(modules[index])
            taken = set(largest_channels(modules[index], weights, dropout).tolist())
            for path in mlp.ups:
                each = rows(weights[f"{path}.weight"])
                hidden += [row for channel, row in enumerate(each) if channel not in taken]
            hidden += rows(weights[f"{mlp.down}.weight"])  # whole rows: across all channels
    return hidden


@pytest.mark.parametrize("emulator", ["layer-dropout", "channel-pruning"])
def test_nothing_of_the_model_but_emulator_and_adapter_crosses_the_wire_or_is_held(emulator: str) -> None:
    run = Run(emulator=emulator, **ALIGNED)
    for round in (1, 2):
        assert run.round(round).clients == [0, 1]
    hidden = secrets(emulator, 0.4)
    assert len(hidden) > 500
    frames = [*run.down.values(), *run.up.values()]
    assert len(frames) == 8
    held = [everything(run.client_module(client)) for client in SIZES]
    whole = everything(build("llama", blocks=6))
    assert all(secret in whole for secret in hidden)  # the search would find them
    assert [
        (k, i) for k, data in enumerate([*frames, *held]) for i, s in enumerate(hidden) if s in data
    ] == []
    # and exactly the rest is there: what the server says the client's model is, and LoRA
    sent = decode(run.down[1, 0]).payload.tensors
    model = {n.removeprefix(MODEL): t for n, t in sent.items() if n.startswith(MODEL)}
    own = tensors_of(build("llama", blocks=6))
    same = {n for n, t in model.items() for o in own.values() if t.shape == o.shape and torch.equal(t, o)}
    tuned = {n for n in model if "q_proj" in n or "v_proj" in n} - {
        n for n in model if n.startswith(f"model.layers.{run.method.division(run.client_module(0)).back[0]}.")
    }
    pruned = {n for n in model if "mlp" in n and n not in same}
    assert model.keys() - same == {ARCHITECTURE} | tuned | pruned
    assert bool(pruned) == (emulator == "channel-pruning")
    lora = {n for n in sent if not n.startswith(MODEL)}
    assert lora == run.state.adapter.keys() | run.state.emulator.keys()
    assert decode(run.up[2, 1]).payload.tensors.keys() == run.state.adapter.keys()
    size = sum(p.numel() for p in run.model.parameters())
    assert sum(p.numel() for p in run.client_module(0).parameters()) < 0.9 * size


CLIENT = """
import json, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import torch
from safetensors.torch import save_file
from fedtune.core.client import ClientRunner
from fedtune.data.encoded import Encoded
from fedtune.methods import registry
torch.set_num_threads(1)
about = json.loads(Path("client.json").read_text())
config = registry.config_class("fedbiot").model_validate(about["config"])
data = {about["client"]: [Encoded(tuple(i), tuple(l)) for i, l in about["items"]]}
method = registry.build(config, 4)
runner = ClientRunner(method, torch.nn.Module(), data, pad_id=0, seed=4, device=torch.device("cpu"))
for round in about["rounds"]:
    Path(f"reply{round}").write_bytes(runner.handle(about["client"], Path(f"order{round}").read_bytes()))
weights = [name for name in opened if name.endswith((".safetensors", ".bin", ".pt"))]
(module,) = runner.store._built.values()
save_file({n: t.detach().clone() for n, t in [*module.named_parameters(), *module.named_buffers()]}, "held")
print(json.dumps(weights))
"""


def test_a_process_of_its_own_needs_its_orders_alone(tmp_path: Path) -> None:
    run = Run(proximal=0.1, **ALIGNED)
    for round in (1, 2):
        run.round(round)
        (tmp_path / f"order{round}").write_bytes(run.down[round, 1])
    about = {
        "config": run.config.model_dump(),
        "client": 1,
        "items": [[item.input_ids, item.labels] for item in items(SIZES[1], 1)],
        "rounds": [1, 2],
    }
    (tmp_path / "client.json").write_text(json.dumps(about))
    done = subprocess.run(
        [sys.executable, "-c", CLIENT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []  # it read no weights from anywhere
    for round in (1, 2):  # the same bits as in process, its metrics too
        reply = decode((tmp_path / f"reply{round}").read_bytes())
        other = decode(run.up[round, 1])
        assert encode(Content(reply.payload)) == encode(Content(other.payload))
        assert reply.meta["train_loss"] == other.meta["train_loss"]
    ours, theirs = tensors_of(run.client_module(1)), load_file(tmp_path / "held")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_client_is_sent_its_model_once_and_again_when_it_has_lost_it() -> None:
    run = Run(**ALIGNED, rounds=6)
    run.round(1)
    held = sum(t.nbytes for t in run.method.at_server().client_tensors(run.state.merged).values())
    lora = 4 * sum(t.numel() for t in (run.state.adapter | run.state.emulator).values())
    assert run.sent("model") == [(1, 0, held), (1, 1, held)]
    assert run.sent("train") == [(1, 0, lora), (1, 1, lora)]
    run.round(2)
    assert len(run.sent("model")) == 2 and len(run.sent("train")) == 4  # cached

    run.runners[1].store.clear()
    outcome = run.round(3)
    assert outcome.clients == [0]
    assert "it does not have the emulator any more; it will be sent again" in outcome.left_out[1]
    outcome = run.round(4)
    assert outcome.clients == [0, 1] and not outcome.left_out
    assert run.sent("model")[2:] == [(4, 1, held)]

    run.round(5, clients=(0,))  # one that is not asked keeps what it has, and catches up by LoRA alone
    before = run.state
    assert run.round(6).clients == [0, 1]
    assert len(run.sent("model")) == 3
    order = decode(run.down[6, 1]).payload.tensors
    assert order.keys() == before.adapter.keys() | before.emulator.keys()
    assert all(torch.equal(order[n], t) for n, t in (before.adapter | before.emulator).items())
    assert run.sent("train")[-1] == (6, 1, lora)


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_order_is_not_in_memory_while_a_client_trains_that_holds_it_on_disk(
    on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(**ALIGNED, rounds=1)
    came, there = dict[str, Any](), list[bool]()
    decoded, train = client_module.decode, fedbiot_module.train

    def noted(frame: Frame) -> Content:
        found = decoded(frame)
        came.update((n, weakref.ref(t)) for n, t in found.payload.tensors.items() if n.startswith(MODEL))
        return found

    def trained(*given: Any, **more: Any) -> Any:
        there.append(any(ref() is not None for ref in came.values()))
        return train(*given, **more)

    monkeypatch.setattr(client_module, "decode", noted)
    monkeypatch.setattr(fedbiot_module, "train", trained)
    if on_disk:
        for client, runner in run.runners.items():
            runner.store = Store(tmp_path / str(client))
    assert run.round(1).clients == [0, 1] and came
    assert there == [not on_disk] * 2


def test_a_client_that_did_not_answer_is_sent_its_model_again() -> None:
    run = Run(**ALIGNED)
    run.absent = {1}
    assert run.round(1).left_out == {1: "it dropped out"}
    run.absent = set()
    assert run.round(2).clients == [0, 1]
    assert [entry[:2] for entry in run.sent("model")] == [(1, 0), (1, 1), (2, 1)]
    run.absent = {0, 1}
    with pytest.raises(QuorumError, match=r"clients 0, 1: it dropped out"):
        run.round(3)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_client_with_another_emulator_on_disk_is_as_one_that_has_lost_it(forgotten: bool) -> None:
    run = Run(**ALIGNED)
    run.round(1)
    if forgotten:
        del run.runners[0].states[0]
    else:
        run.runners[0].states[0] = Payload(scalars={"model": "0" * 64})
    outcome = run.round(2)
    assert "does not have the emulator any more" in outcome.left_out[0] and outcome.clients == [1]


@pytest.mark.parametrize(
    "settings", [ALIGNED, {"proximal": 0.5, **ALIGNED}, {"emulator": "channel-pruning", **ALIGNED}]
)
def test_on_a_client_only_the_adapters_lora_changes(settings: dict[str, Any]) -> None:
    run = Run(**settings)
    run.round(1)
    module = run.client_module(0)
    places = run.method.division(module)
    adapter = {id(p) for p in factors(module, places.adapter, ADAPTER).values()}
    names = {n for n, p in module.named_parameters() if id(p) in adapter}
    loaded = {id(p) for p in factors(module, places.middle, EMULATOR).values()}
    received = {n for n, p in module.named_parameters() if id(p) in loaded}
    assert names and received and {n for n, p in module.named_parameters() if p.requires_grad} == names
    before = tensors_of(module)
    run.round(2)
    after = tensors_of(module)
    # the emulator's LoRA is what round 2's order brought, everything else is what it was
    different = {n for n in before if not torch.equal(before[n], after[n])}
    assert different - received == names
    order = decode(run.down[2, 0]).payload.tensors
    for name, parameter in factors(module, places.middle, EMULATOR).items():
        assert torch.equal(parameter, order[name])


def test_the_average_is_weighted_by_examples() -> None:
    run = Run(**ALIGNED)
    before = run.state.adapter
    run.round(1)
    updates = [decode(run.up[1, client]).payload.tensors for client in (0, 1)]
    for name, tensor in run.state.adapter.items():  # 2 and 6 examples
        mean = updates[0][name].double() * 2 / 8 + updates[1][name].double() * 6 / 8
        torch.testing.assert_close(tensor.double(), before[name].double() + mean, rtol=0, atol=1e-7)
        assert not torch.equal(updates[0][name], updates[1][name])


def test_the_proximal_term_holds_an_adapter_back() -> None:
    def moved(epsilon: float) -> float:
        run = Run(proximal=epsilon, optimizer="sgd", lr=0.05, local_steps=8, **ALIGNED)
        run.round(1)
        a, b = run.state.adapter, decode(run.down[1, 0]).payload.tensors
        total = 0.0
        for name in a:
            if name.endswith("lora_A.weight"):
                partner = name.replace("lora_A", "lora_B")
                total += float((a[partner] @ a[name] - b[partner] @ b[name]).square().sum())
        return total

    assert moved(0.5) < 0.9 * moved(0.0)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["self_attn.q_proj", "self_attn.v_proj"]),
        ("gpt2", ["attn.c_attn"]),
        ("bloom", ["self_attention.query_key_value"]),
    ],
)
def test_with_nothing_left_out_it_is_fedavg_on_the_last_layers(family: str, targets: list[str]) -> None:
    """β = 0, ε = 0: the same bits, round after round, dropout of GPT-2 included."""
    run = Run(family=family, blocks=5, adapter_layers=2, layer_dropout=0.0, public=False)
    lora = {"rank": 2, "alpha": 4.0, "targets": [f"{k}.{t}" for k in (3, 4) for t in targets]}
    keys = ("rounds", "local_steps", "batch_size", "lr")
    alike = {**{key: SMALL[key] for key in keys}, "betas": [0.9, 0.95], "lora": lora}
    plain = Run("fedavg", family=family, blocks=5, public=False, **alike)

    def same(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> bool:
        path = find_blocks(build(family, blocks=5)).path
        renamed = {
            n.replace(f"{path}.3.", "adapter.0.").replace(f"{path}.4.", "adapter.1."): t
            for n, t in theirs.items()
        }
        assert renamed.keys() == ours.keys()
        return all(torch.equal(tensor, ours[name]) for name, tensor in renamed.items())

    start = run.state.adapter
    assert same(plain.state.weights, start)
    for round in (1, 2, 3):
        losses = [each.round(round, quorum=2).metrics for each in (plain, run)]
        assert losses[0] == losses[1]
        assert same(plain.state.weights, run.state.adapter)
    assert any(not torch.equal(start[name], tensor) for name, tensor in run.state.adapter.items())
    (_, theirs), *rest = plain.method.export(plain.state, plain.model)
    results = run.method.export(run.state, run.model)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        wanted = theirs.eval()(**ids).logits
        for _, model in results:  # AdapFu is AdapEmu then
            assert torch.equal(model.eval()(**ids).logits, wanted)
    assert not rest


def test_fedot_sends_no_emulator_lora() -> None:
    run = Run("fedot", adapter_layers=2, alignment={"steps_before": 3, "batch_size": 2})
    run.round(1), run.round(2)
    assert not run.state.emulator and run.state.merged
    assert decode(run.down[2, 0]).payload.tensors.keys() == run.state.adapter.keys()
    blocks = {name.split(".")[1] for name in run.state.adapter}
    assert blocks == {"0", "1"}


def test_the_benchmark_measures_a_client_that_holds_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "TOKENS", 32)
    monkeypatch.setattr(random_model, "VOCABULARY", 500)
    rows, ratios = emulator_bench.measure(hidden=64, layers=6, repeats=1)
    assert [row["parameters"] for row in rows] == sorted((row["parameters"] for row in rows), reverse=True)
    small = [ratio for name, ratio in ratios.items() if name.startswith("peak_bytes")]
    assert len(small) == 2 and all(0 < ratio < 1 for ratio in small)
    assert len([name for name in ratios if name.startswith("seconds")]) == 2
