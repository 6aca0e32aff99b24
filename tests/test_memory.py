"""Live tensor bytes against numbers worked out by hand. All tensors are float32: 4 bytes an element."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.measure.memory import MemoryMeter, paused

KIB = 256  # float32 elements in 1 KiB


def peak(work: Callable[[], object], *resident: object) -> int:
    meter = MemoryMeter("cpu")
    with meter.whole(resident):  # type: ignore[arg-type]
        work()
    return meter.peak_bytes


def tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        )


def test_says_how_it_measures() -> None:
    assert MemoryMeter("cpu").how == "live tensor bytes"
    assert MemoryMeter("cpu").peak_bytes == 0
    assert MemoryMeter("cpu").by_device == {}
    assert MemoryMeter("cuda").by_device == {"device_bytes": 0, "host_bytes": 0}


def test_tensors_alive_together_add_up() -> None:
    def work() -> None:
        a = torch.zeros(KIB)
        b = torch.zeros(2 * KIB)
        del a, b

    assert peak(work) == 3 * 1024


def test_tensors_one_after_another_do_not() -> None:
    def work() -> None:
        for _ in range(5):
            torch.zeros(2 * KIB)

    assert peak(work) == 2 * 1024


def test_freed_then_allocated_again() -> None:
    def work() -> None:
        a = torch.zeros(4 * KIB)
        del a  # 0
        b = torch.zeros(KIB)  # 1
        c = torch.zeros(2 * KIB)  # 3
        del b, c

    assert peak(work) == 4 * 1024


def test_views_and_in_place_operations_cost_nothing() -> None:
    def work() -> None:
        a = torch.zeros(KIB)
        b = a.view(2, -1)
        del a  # the view keeps the storage
        b.add_(1).t()[0].mul_(2)

    assert peak(work) == 1024


def test_an_operation_holds_its_inputs_and_its_output() -> None:
    def work() -> None:
        a = torch.zeros(KIB)
        a = a + 1  # both until the sum is there
        a = a * 2

    assert peak(work) == 2 * 1024


def test_residents_count_from_the_start_and_tied_weights_once() -> None:
    first, second = nn.Linear(KIB, 1, bias=False), nn.Linear(KIB, 1, bias=False)
    second.weight = first.weight
    buffers = nn.BatchNorm1d(KIB, affine=False)  # mean, variance (1 KiB each) and an int64 counter
    extra = {"state": torch.zeros(KIB), "list": [torch.zeros(KIB)], "name": "x"}
    extra["view"] = extra["state"][:10]  # type: ignore[index]
    assert peak(lambda: None, first, second, buffers, extra) == 1024 + 2 * 1024 + 8 + 2 * 1024


def test_a_resident_gradient_counts() -> None:
    layer = nn.Linear(KIB, 1, bias=False)
    layer.weight.grad = torch.zeros_like(layer.weight)
    assert peak(lambda: None, layer) == 2 * 1024


def test_a_resident_freed_inside_is_subtracted() -> None:
    held = {"old": torch.zeros(4 * KIB)}

    def work() -> None:
        del held["old"]  # 0 left
        keep = torch.zeros(3 * KIB)  # 3
        del keep

    assert peak(work, held) == 4 * 1024


def test_a_tensor_nobody_told_of_counts_when_it_is_used() -> None:
    unknown = torch.zeros(KIB)
    assert peak(lambda: None) == 0
    assert peak(lambda: unknown.sum()) == 1024 + 4


def test_tensors_that_outlive_the_scope_do_not_disturb_the_next() -> None:
    meter = MemoryMeter("cpu")
    kept = []
    with meter.whole():
        kept.append(torch.zeros(KIB))
    kept.clear()
    with meter.whole():
        kept.append(torch.zeros(2 * KIB))
    assert meter.peak_bytes == 2 * 1024


def test_replaced_and_resized_storages() -> None:
    def replaced() -> None:
        a = torch.zeros(4 * KIB)
        a.data = torch.zeros(KIB)  # 5 for a moment, then 1
        b = torch.zeros(3 * KIB)
        del a, b

    assert peak(replaced) == 5 * 1024

    def resized() -> None:
        a = torch.zeros(KIB)
        a.resize_(6 * KIB)

    assert peak(resized) == 6 * 1024


def test_lists_out_of_one_operation() -> None:
    def work() -> None:
        tensors = [torch.zeros(KIB), torch.zeros(KIB)]
        torch._foreach_add_(tensors, 1.0)  # in place
        torch._foreach_mul(tensors, 2.0)  # two more

    assert peak(work) == 4 * 1024


def test_sparse_gradients_count_indices_and_values() -> None:
    table = nn.Embedding(KIB, 4, sparse=True)  # 4 KiB
    ids = torch.tensor([1, 2])  # 16 bytes

    def work() -> None:
        out = table(ids)
        del out

    # resident table and ids, output 2 x 4
    assert peak(work, table, {"ids": ids}) == 4096 + 16 + 32
    table(ids).sum().backward()
    # its gradient: int64 indices (1, 2) and values (2, 4)
    assert peak(lambda: None, table) == 4096 + 16 + 32


def test_linear_forward_and_backward() -> None:
    # y = x W, loss = sum(y); x (64, 32), W (32, 16)
    x = torch.ones(64, 32)  # 8192
    weight = torch.ones(32, 16, requires_grad=True)  # 2048
    out = 64 * 16 * 4  # 4096

    def forward() -> None:
        (x @ weight).sum()

    # y and the 4 byte loss beside x and W
    assert peak(forward, x, weight) == 8192 + 2048 + out + 4

    def forward_backward() -> None:
        loss = (x @ weight).sum()  # y is freed: the sum's backward needs its shape alone
        loss.backward()

    # backward holds: loss (4), its gradient 1.0 (4, expanded as a view to y's shape), then grad W (2048);
    # forward held y (4096) and loss (4), which is more.
    assert peak(forward_backward, x, weight) == 8192 + 2048 + out + 4
    assert weight.grad.tolist() == [[64.0] * 16] * 32


def test_backward_can_hold_the_peak() -> None:
    x = torch.ones(KIB)
    weight = torch.ones(KIB, requires_grad=True)  # 1 KiB each

    def work() -> None:
        loss = (x * weight).exp().sum()
        loss.backward()

    # Forward: x, w, x*w, exp(x*w) and the loss: 4 KiB + 4 (x*w is freed when exp keeps its own output).
    # Backward of exp: x, w, exp (saved), grad * exp, the loss and its gradient: 4 KiB + 8.
    # Backward of mul: exp is freed by then; x, w, grad of x*w, grad of w: 4 KiB + 8.
    assert peak(work, x, weight) == 4 * 1024 + 8


def test_gradients_that_accumulate_take_no_second_copy_in_the_end() -> None:
    weight = torch.ones(KIB, requires_grad=True)
    scale = torch.ones(KIB)
    meter = MemoryMeter("cpu")
    with meter.whole([weight, scale]):
        (weight * scale).sum().backward()
    assert meter.peak_bytes == 3 * 1024 + 8  # weight, scale, gradient; loss and its gradient
    with meter.whole([weight, scale]):
        (weight * scale).sum().backward()
    assert meter.peak_bytes == 4 * 1024 + 8  # the old gradient and the new one, until they are added


# foreach: sqrt(v), divided in place; one by one: sqrt(v) and the quotient are there together
@pytest.mark.parametrize(("foreach", "temporaries"), [(True, 1), (False, 2)])
def test_adamw_state_appears_in_the_first_step(foreach: bool, temporaries: int) -> None:
    weight = torch.ones(1024, requires_grad=True)  # 4 KiB
    weight.grad = torch.ones(1024)
    optimizer = torch.optim.AdamW([weight], lr=0.1, foreach=foreach)
    unit = 4096

    def begin_and_end() -> int:
        return peak(lambda: None, optimizer)

    assert begin_and_end() == 2 * unit
    first = peak(optimizer.step, optimizer)
    assert begin_and_end() == 4 * unit + 4  # two moments and a step counter of 4 bytes
    second = peak(optimizer.step, optimizer)
    # weights, gradient, two moments, the step counter
    assert first == second == (4 + temporaries) * unit + 4


def test_the_loop_of_a_client_counts_the_optimizer_state() -> None:
    layer = nn.Linear(64, 64, bias=False)  # 16 KiB
    optimizer = torch.optim.AdamW(layer.parameters())
    meter = MemoryMeter("cpu")
    peaks = []
    for _ in range(3):
        with meter.step(1, [layer, optimizer]):
            optimizer.zero_grad()
            layer(torch.ones(1, 64)).sum().backward()
            optimizer.step()
        peaks.append(meter.peak_bytes)
    # weights, gradient, two moments, two temporaries, the step counter (batch and output are gone by then,
    # and so is the loss)
    assert peaks == [6 * 16384 + 4] * 3


def test_only_steps_that_can_set_a_peak_are_followed() -> None:
    meter = MemoryMeter("cpu")
    seen = []
    for size in [100, 50, 50, 100, 100, 80, 101]:
        before = meter.peak_bytes
        with meter.step(size):
            torch.zeros(before // 4 + 1)  # sets a new peak whenever someone looks
        seen.append(meter.peak_bytes > before)
    # 100 is followed a second time: the first time there was no optimizer state yet
    assert seen == [True, True, False, True, False, False, True]


def test_a_step_like_an_earlier_one_of_the_run_is_not_followed_again() -> None:
    known: dict[int, Sequence[int]] = {}
    layer, wider = nn.Linear(4, 4), nn.Linear(4, 5)

    def kib(number: int, module: nn.Module, like: object, about: object = "", by_value: bool = False) -> int:
        """The peak, in KiB beyond the module, that a client's first step is said to have."""
        meter = MemoryMeter("cpu", known=known, about=about)
        with meter.step(1, [module], like=like):  # type: ignore[arg-type]
            torch.zeros(number * KIB)
            if by_value:
                torch.ones(KIB).nonzero()
        return (meter.peak_bytes - sum(p.nbytes for p in module.parameters())) // 1024

    assert [kib(1, layer, "a"), kib(2, layer, "a"), kib(2, layer, "b")] == [1, 1, 2]
    assert kib(3, wider, "a") == 3  # other residents
    assert kib(4, layer.requires_grad_(False), "a") == 4  # the same, of which less trains
    assert kib(5, layer.eval(), "a") == 5
    assert kib(6, layer, "a", about="other order") == 6
    assert [kib(7, layer, None), kib(8, layer, None)] == [7, 8]  # nobody says what it is like
    layer.weight.grad = torch.zeros(4, 4)
    assert kib(9, layer, "a") == 9
    # as many numbers come out as the values say: 8 bytes of each of 256
    assert [kib(n, layer, "c", by_value=True) for n in (9, 10, 9)] == [9, 10, 9]
    second = MemoryMeter("cpu", known=known)
    for like in ("a", "a"):  # a client's second step is another than its first
        with second.step(2, [wider], like=like):
            torch.zeros(11 * KIB)
    assert (second.peak_bytes - sum(p.nbytes for p in wider.parameters())) // 1024 == 11


def test_a_step_that_raises_is_like_no_other() -> None:
    known: dict[int, Sequence[int]] = {}
    with pytest.raises(ZeroDivisionError), MemoryMeter("cpu", known=known).step(1, like="a"):
        raise ZeroDivisionError
    meter = MemoryMeter("cpu", known=known)
    with meter.step(1, like="a"):
        torch.zeros(KIB)
    assert meter.peak_bytes == 1024


def test_a_step_that_raises_closes_and_keeps_what_it_saw() -> None:
    meter = MemoryMeter("cpu")
    with pytest.raises(ZeroDivisionError), meter.step(1):
        torch.zeros(KIB)
        raise ZeroDivisionError
    assert meter.peak_bytes == 1024
    torch.zeros(100 * KIB)
    assert meter.peak_bytes == 1024
    with meter.step(1):
        torch.zeros(2 * KIB)
    assert meter.peak_bytes == 2048


def test_nesting_is_refused_and_does_not_break_the_outer_scope() -> None:
    outer, inner = MemoryMeter("cpu"), MemoryMeter("cpu")
    with outer.whole():
        with pytest.raises(RuntimeError, match="cannot be nested"), inner.whole():
            raise AssertionError("was entered")
        with pytest.raises(RuntimeError, match="cannot be nested"):
            outer.step(1)
        torch.zeros(KIB)
    assert outer.peak_bytes == 1024
    assert inner.peak_bytes == 0


def test_a_server_does_not_pay_for_the_clients_it_waits_for() -> None:
    server, client = MemoryMeter("cpu"), MemoryMeter("cpu")

    def reply(size: int) -> Tensor:
        with paused(), client.whole():
            torch.zeros(50 * KIB)
            return torch.ones(size)

    with server.whole():
        total = torch.zeros(KIB)
        for _ in range(3):
            total += reply(KIB)
    assert server.peak_bytes == 2 * 1024  # the sum and one reply
    assert client.peak_bytes == 50 * 1024
    assert total.tolist() == [3.0] * KIB


def test_paused_without_a_scope_does_nothing() -> None:
    with paused():
        torch.zeros(1)
    assert peak(lambda: torch.zeros(KIB)) == 1024


@pytest.mark.parametrize("wrong", [3, "model", None, [torch.zeros(1)]])
def test_resident_refuses_what_it_cannot_count(wrong: object) -> None:
    meter = MemoryMeter("cpu")
    with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"), meter.whole([wrong]):  # type: ignore[list-item]
        raise AssertionError("was entered")
    with meter.whole():  # still usable
        torch.zeros(KIB)
    assert meter.peak_bytes == 1024


def test_inference_mode_sees_inside_composite_operations() -> None:
    x, weight = torch.ones(2, 8, 4), torch.ones(4, 4)

    def work() -> None:
        (x @ weight + x).relu()

    with torch.no_grad():
        expected = peak(work, x, weight)
    # x (256), W (64), the product, the sum, both alive for a moment
    assert expected == 256 + 64 + 256 + 256
    with torch.inference_mode():
        assert peak(work, x, weight) == expected


def test_generation_under_inference_mode_holds_its_cache() -> None:
    model = tiny_llama().eval()
    ids = torch.tensor([[5]])  # short, so that reading the prompt is not the peak
    weights = peak(lambda: None, model)

    def generate(tokens: int) -> int:
        def work() -> None:
            model.generate(ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0)

        with torch.inference_mode():
            return peak(work, model, ids)

    # a cached token: 2 layers x (key + value) x 2 heads x 8 x 4 bytes
    cached = 2 * 2 * 2 * 8 * 4
    assert generate(4) < weights + 44 * cached < generate(45)


def test_measuring_changes_no_bit() -> None:
    def train(measured: bool) -> list[Tensor]:
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        meter = MemoryMeter("cpu")
        ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))

        def step() -> None:
            optimizer.zero_grad()
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
            optimizer.step()

        for _ in range(2):
            if measured:
                with meter.whole([model, optimizer]):
                    step()
            else:
                step()
        model.eval()
        with torch.inference_mode(), meter.whole([model]) if measured else paused():
            return [*model.parameters(), model(ids).logits.clone()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_agrees_with_torchs_own_tracker() -> None:
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker", reason="torch has no MemTracker")
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    x = torch.ones(32, 64)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()

    ours = []
    for _ in range(2):
        ours.append(peak(step, model, optimizer, x))
    theirs = []
    model.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    optimizer.zero_grad()
    for _ in range(2):
        mem = tracker.MemTracker()
        mem.track_external(model, optimizer, x)
        with mem:
            step()
        theirs.append(mem.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    assert ours == theirs


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 64), st.none()), max_size=40))
def test_any_pattern_of_allocation(pattern: list[int | None]) -> None:
    """A number allocates that many elements, None frees the oldest: the peak is the largest sum alive."""
    alive: list[Tensor] = []
    sizes: list[int] = []
    expected = 0
    meter = MemoryMeter("cpu")
    with meter.whole():
        for size in pattern:
            if size is None:
                if alive:
                    alive.pop(0)
                    sizes.pop(0)
            else:
                alive.append(torch.zeros(size))
                sizes.append(size)
            expected = max(expected, 4 * sum(sizes))
    assert meter.peak_bytes == expected


def test_leaves_nothing_behind() -> None:
    meter = MemoryMeter("cpu")
    tensor = torch.zeros(KIB)
    with meter.whole([tensor]):
        kept = tensor + 1
    ref = weakref.ref(kept)
    del kept
    gc.collect()
    assert ref() is None
