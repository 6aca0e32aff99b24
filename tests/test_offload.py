"""Frozen weights on disk: no bit of training changes, and what is in memory is what is being used."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import ATTACH, FAMILIES, batch, build, wake
from reproduced import load
from threads_of import threads
from torch import Tensor, nn
from toy import Bench

from fedtune.config.file import parse_config
from fedtune.core.store import Store
from fedtune.core.types import ClientError, Payload
from fedtune.data.encoded import Encoded
from fedtune.errors import InputError
from fedtune.measure.memory import MemoryMeter
from fedtune.methods import registry
from fedtune.models import offload
from fedtune.models.blocks import find_blocks
from fedtune.models.lean_loss import batch_loss
from fedtune.models.memory_efficient import computed_again
from fedtune.models.offload import offloaded
from fedtune.planning.plan import plan

plan_measured = load("plan_measured")
KINDS: dict[str, Callable[[nn.Module], object]] = {
    **{how: partial(lambda how, model: ATTACH[how](model, 0), how) for how in ("lora", "adapter", "prompt")},
    "last block": lambda model: only(model, -1),
    "first block": lambda model: only(model, 0),
}


def only(model: nn.Module, block: int) -> nn.Module:
    model.requires_grad_(False)
    find_blocks(model).modules[block].requires_grad_(True)
    return model


def step(family: str, kind: str, dtype: torch.dtype, again: str, where: str) -> dict[str, Tensor]:
    """Loss and gradients of a step, with dropout where the family has it, and the weights behind it."""
    model: Any = KINDS[kind](build(family, dtype, 3))
    wake(model)
    model.train()
    with torch.random.fork_rng(devices=[]), computed_again(model, again), offloaded(model, where):
        torch.manual_seed(5)
        loss = batch_loss(model, batch(family))
        loss.backward()
    gradients = {f"{n}, gradient": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients, **model.state_dict()}


@pytest.mark.parametrize("again", ["none", "full"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [*((family, "first block") for family in FAMILIES), *(("llama", k) for k in KINDS), ("gpt2", "lora")],
)
def test_a_step_has_the_same_bits(family: str, kind: str, again: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wanted, got = (step(family, kind, dtype, again, where) for where in ("none", "disk"))
        assert wanted.keys() == got.keys() and any(name.endswith("gradient") for name in wanted)
        assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []


CLIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedcybgd": ("fedcybgd", {"rounds": 2}),
    "fedcybgd, lora": ("fedcybgd", {"trainable": "lora"}),
    "fedcybgd, two blocks and the norm": ("fedcybgd", {"blocks_per_client": 2, "extra_blocks": ["norm"]}),
    "fedcybgd, hybrid": ("fedcybgd", {"compression": "hybrid"}),
    "fedbavg, layer-drop": ("fedbavg", {"compression": "layer-drop", "drop_ratio": 0.5}),
    "badam": ("badam", {"switch_interval": 1, "extra_blocks": ["embeddings"]}),
    "fedavg, lora": ("fedavg", {"trainable": "lora"}),
    "fedavg, adapter": ("fedavg", {"trainable": "adapter"}),
    "fedavg, prompt": ("fedavg", {"trainable": "prompt"}),
    "fedbiot": ("fedbiot", {"adapter_layers": 1, "alignment": {"steps_before": 0, "steps": 0}}),
    "centralized, lora": ("centralized", {"trainable": "lora"}),
}


def trained(name: str, where: str, folder: Path | None, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """All weights after two rounds of three clients."""
    method, settings = CLIENTS[name]
    config = registry.config_class(method).model_validate(
        {"batch_size": 2, "local_steps": 3, "lr": 1e-2, "offload_params": where, **settings}
    )
    data: dict[int, list[Encoded]] = {client: [] for client in range(3)}
    for client, k in product(data, range(3)):
        ids = tuple(3 + (client * 7 + k * 5 + j * 11) % 60 for j in range(4 + k))
        data[client].append(Encoded(ids, ids))
    built = registry.build(config, 0)
    if built.pools_data:
        data = {0: [item for items in data.values() for item in items]}
    bench = Bench(built, build("llama", dtype, 4), data)
    if folder is not None:
        bench.runner.store = Store(folder)
    for round in range(1, min(2, built.rounds) + 1):
        assert not bench.round(round).left_out
    exported = bench.method.export(bench.state, bench.model)
    return {n: p.detach().clone() for n, p in next(exported)[1].named_parameters()}


@pytest.mark.parametrize(
    ("name", "count", "dtype"),
    [
        *((name, 1, torch.bfloat16) for name in CLIENTS),
        *((name, 2, torch.float32) for name in ("fedcybgd", "fedavg, lora")),
        ("badam", 1, torch.float32),
    ],
)
def test_what_is_trained_has_the_same_bits(name: str, count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    with threads(count):
        wanted = trained(name, "none", None, dtype=dtype)
        for folder in (None, tmp_path) if name.startswith(("fedcybgd", "fedbavg")) else (None,):
            got = trained(name, "disk", folder, dtype=dtype)
            assert wanted.keys() == got.keys()
            assert [n for n in wanted if not torch.equal(wanted[n], got[n])] == []


# a block of the tiny Llama: two norms of 32, q and o 32 x 32, k and v 16 x 32, three matrices 32 x 48
ATTENTION, MLP = 4 * (2 * 32 * 32 + 2 * 16 * 32), 4 * 3 * 32 * 48
BLOCK = 4 * 2 * 32 + ATTENTION + MLP
AROUND = 4 * (2 * 64 * 32 + 32)  # embeddings, head, the last norm


def test_what_is_in_memory_worked_out_by_hand() -> None:
    model = only(build("llama", blocks=6), 2).train()
    alive: list[weakref.ref[Tensor]] = []
    most = dict.fromkeys(("forward", "backward"), 0)
    now = "forward"

    def look(module: nn.Module, *_: object) -> None:
        alive.extend(weakref.ref(p.untyped_storage()) for p in module.parameters() if not p.requires_grad)
        there = {s._cdata: s.nbytes() for r in alive if (s := r()) is not None}
        most[now] = max(most[now], sum(there.values()))

    with computed_again(model, "full"), offloaded(model, "disk"):
        meter = MemoryMeter("cpu")
        with meter.whole([model]):
            pass
        frequencies = sum(b.nbytes for b in model.buffers())
        assert meter.peak_bytes == AROUND + BLOCK + frequencies  # the block that trains, no other
        for block in find_blocks(model).modules:
            for child in block.children():
                child.register_forward_pre_hook(look)
        loss = batch_loss(model, batch("llama"))
        assert most["forward"] == MLP  # a module at a time
        assert not any(r() for r in alive)  # and no graph has any
        now = "backward"
        loss.backward()
        assert most["backward"] == BLOCK  # that of the block whose activations are computed again
        assert not any(r() for r in alive)
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_weights_that_were_changed_are_written_again_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []

    class Counted(offload.Copies):
        def __init__(self, parameters: Any) -> None:
            written.append(len(parameters))
            super().__init__(parameters)

    monkeypatch.setattr(offload, "Copies", Counted)
    model = only(build("llama", blocks=3), 0)
    of_a_block = len(list(find_blocks(model).modules[0].parameters()))
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        with offloaded(model, "disk"):
            pass
    only(model, 1)
    with torch.no_grad():  # as training leaves a block behind
        for p in find_blocks(model).modules[0].parameters():
            p.add_(1)
    with offloaded(model, "disk"):
        got = batch_loss(model, batch("llama"))
    assert written == [2 * of_a_block, of_a_block]
    plain = build("llama", blocks=3)
    plain.load_state_dict({n: t + (".layers.0." in n) for n, t in first.items()})
    assert torch.equal(got, plain(**batch("llama")).loss)


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model: Any = ATTACH["lora"](build("gpt2"), 0)
    before = dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), offloaded(model, "disk"):
        assert any(p.device.type == "meta" for p in model.parameters())
        raise ZeroDivisionError
    assert all(p is before[n] for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for b in find_blocks(model).modules for m in b.children())


def test_what_a_client_was_sent_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[set[str]] = []
    monkeypatch.setattr(offload, "Copies", lambda parameters: written.append(set(parameters)))
    trained("fedcybgd", "disk", tmp_path, dtype=torch.float32)
    assert written == []


def test_content_that_is_gone_is_said(tmp_path: Path) -> None:
    payload = Payload({"w": torch.arange(3.0)})
    for store in (Store(), Store(tmp_path)):
        key = store.put(payload)
        assert store.read(key, "w").tolist() == [0, 1, 2]
    (tmp_path / f"{key}.safetensors").unlink()
    with pytest.raises(ClientError, match="does not have"):
        store.read(key, "w")


def test_what_cannot_be_offloaded_is_refused() -> None:
    model = build("llama").requires_grad_(False)
    with pytest.raises(
        InputError, match=r"offload_params: disk is for weights on a CPU or a GPU, got some on meta"
    ):
        offloaded(model.to("meta"), "disk").__enter__()
    for method in ("fedavg", "standalone", "centralized"):
        settings = {"name": method, "trainable": "full", "offload_params": "disk"}
        with pytest.raises(InputError, match="full freezes none"):
            parse_config({"method": settings}, "test")


PLANNED = {
    "fedavg, lora": plan_measured.METHODS["fedavg, lora"] | {"gradient_checkpointing": "full"},
    "fedcybgd": plan_measured.METHODS["fedcybgd"],
}


@pytest.mark.parametrize("form", PLANNED)
def test_a_plan_is_what_a_run_measures(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for where in ("none", "disk"):
        monkeypatch.setitem(plan_measured.FORMS, where, PLANNED[form] | {"offload_params": where})
        found[where] = plan_measured.compare("bundled", where)
        assert found[where]["planned_memory"] == pytest.approx(found[where]["memory"], rel=0.01)
    assert found["disk"]["planned_memory"] < found["none"]["planned_memory"]
    same = ("down", "up", "planned_down", "planned_up", "trainable")
    assert [found["disk"][key] for key in same] == [found["none"][key] for key in same]


def test_a_plan_says_that_the_card_holds_the_model_while_it_is_loaded() -> None:
    found = {}
    for where in ("none", "disk"):
        method = {"name": "fedavg", "trainable": "lora", "gradient_checkpointing": "full"}
        config = parse_config({"method": method | {"offload_params": where}}, "test")
        document = plan(config).document
        found[where] = {name: one["device_bytes"] for name, one in document["memory_by_device"].items()}
        weights = 4 * document["total_parameters"]  # the bundled model is in float32, and has few buffers
        assert weights <= found[where]["loading"] < weights + 4096
        assert found[where]["simulation"] == max(found[where].values())
    assert found["disk"]["loading"] == found["none"]["loading"] < found["none"]["client"]
    assert found["disk"]["client"] < found["none"]["client"]
    sent = plan(parse_config({"method": {"name": "fedcybgd"}}, "test")).document["memory_by_device"]
    assert sent["loading"] == {"device_bytes": 0, "host_bytes": 0}  # the server's model stays on the host
