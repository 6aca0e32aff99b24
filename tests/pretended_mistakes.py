"""The pretended GPU: what it refuses and counts, mistakes that it finds, and how often the program waits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from contract import Federation, examples
from model_families import batch, build, tokenizer
from pretended_gpu import DeviceError, OnGpu, PretendedGpu
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.core.types import Payload
from fedtune.data.batches import collate
from fedtune.errors import ProgramError
from fedtune.evaluation import likelihoods
from fedtune.evaluation.generation import generate
from fedtune.evaluation.likelihoods import example_losses
from fedtune.methods import step_loss, stepping
from fedtune.methods.fedavg import method as fedavg
from fedtune.methods.fedbiot import method as fedbiot
from fedtune.methods.fedkseed.step import step_weights
from fedtune.models import alignment, lean_loss
from fedtune.models.at_work import at_work
from fedtune.zeroth import SeedPool
from fedtune.zeroth import gpu as kernels

Patch = pytest.MonkeyPatch


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu() as device:
        yield device


def cause(call: Callable[[], object]) -> BaseException:
    """What a call fails with, behind what was made of it."""
    with pytest.raises((DeviceError, ProgramError)) as caught:
        call()
    error: BaseException = caught.value
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def test_it_computes_what_a_cpu_computes(gpu: PretendedGpu) -> None:
    here, there = build("llama"), build("llama").to("cuda")
    moved = {name: tensor.to("cuda") for name, tensor in batch("llama").items()}
    for model, inputs in ((here, batch("llama")), (there, moved)):
        model.set_attn_implementation("eager")
        model(**inputs, use_cache=False).loss.backward()
    for name, parameter in there.named_parameters():
        assert parameter.device == torch.device("cuda", 0) and isinstance(parameter, nn.Parameter)
        wanted = here.get_parameter(name)
        assert torch.equal(parameter.cpu(), wanted) and torch.equal(parameter.grad.cpu(), wanted.grad), name


def test_a_tensor_is_where_it_was_put(gpu: PretendedGpu) -> None:
    x = torch.arange(6.0).view(2, 3).to("cuda")
    assert x.is_cuda and not x.is_cpu and x.to("cuda") is x and x[1].device.type == "cuda"
    assert x.cpu().device.type == "cpu" and torch.device("cuda").type == "cuda"
    row = x[1]
    row.add_(1)  # a view: of the same memory
    assert x.tolist() == [[0, 1, 2], [4, 5, 6]]
    twin = copy.deepcopy(x)
    twin.zero_()
    assert x[1].tolist() == [4, 5, 6] and twin.device == x.device
    parameter = nn.Parameter(x)
    parameter.data = torch.ones(2, 3, device="cuda")
    assert parameter.tolist() == [[1, 1, 1], [1, 1, 1]] and (parameter * 2).sum().item() == 12
    torch.empty(2, device="cpu").copy_(x[0, :2])


@pytest.mark.parametrize(
    "mistake",
    {
        "two devices": lambda x: x + torch.ones(3),
        "an index on the GPU for a host's tensor": lambda x: torch.ones(3)[x.long()],
        "a mask on the GPU for a host's tensor": lambda x: torch.ones(3)[x > 0],
        "a host's values for what is indexed": lambda x: x.index_put_((torch.tensor([0, 1]),), torch.ones(2)),
        "a host's output": lambda x: torch.add(x, x, out=torch.ones(3)),
        "a host's generator": lambda x: x.normal_(generator=torch.Generator()),
        "a host's generator for a new tensor": lambda x: torch.randn(
            3, device="cuda", generator=torch.Generator()
        ),
        "a GPU's generator on the host": lambda x: torch.randn(3, generator=torch.Generator("cuda")),
        "numpy": lambda x: x.numpy(),
        "an array": lambda x: np.asarray(x),
        "a host's memory in the place of its own": lambda x: setattr(x, "data", torch.ones(3)),
        "a parameter's loss on the host": lambda x: nn.functional.mse_loss(nn.Parameter(x), torch.zeros(3)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_cuda_refuses_is_refused(
    gpu: PretendedGpu, mistake: tuple[str, Callable[[Tensor], Any]]
) -> None:
    with pytest.raises(DeviceError):
        mistake[1](torch.ones(3, device="cuda"))


def test_numbers_without_dimensions_may_lie_on_either_side(gpu: PretendedGpu) -> None:
    x = torch.ones(3, device="cuda")
    assert (x * torch.tensor(2.0)).tolist() == [2, 2, 2] and x[torch.tensor([0, 2])].tolist() == [1, 1]


def test_nothing_is_left_of_it() -> None:
    before = torch.cuda.is_available(), torch.Generator, kernels.Update
    with PretendedGpu():
        x = torch.ones(2, device="cuda")
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available(), torch.Generator, kernels.Update) == before
    with pytest.raises(DeviceError, match="closed"):
        _ = x + 1


def test_memory_is_counted_and_ends(gpu: PretendedGpu) -> None:
    x = torch.ones(1000, device="cuda")  # 4,000 bytes are 8 times 512
    assert gpu.allocated == torch.cuda.memory_allocated() == 4096
    y = x.view(10, 100)
    assert gpu.allocated == 4096
    del x, y
    assert gpu.allocated == 0 and gpu.peak == 4096
    gpu.limit = 8192
    kept = [torch.ones(1000, device="cuda") for _ in range(2)]
    with pytest.raises(torch.OutOfMemoryError, match="8,192, of which 0 are free"):
        torch.ones(1, device="cuda")
    del kept
    torch.ones(2000, device="cuda")


def test_counts(gpu: PretendedGpu) -> None:
    x = torch.ones(4).to("cuda")
    assert (gpu.of("to the device"), gpu.stops(), sum(gpu.bytes.values())) == (1, 1, 16)
    torch.ones(4).to("cuda", non_blocking=True)
    assert (gpu.of("to the device"), gpu.stops()) == (2, 1)
    gpu.forget()
    assert x.sum().item() == 4 and x.tolist() == [1] * 4  # a number asked for, and a copy
    assert (gpu.stops(), gpu.of("to the host"), gpu.of("launch")) == (2, 1, 2)
    gpu.forget()
    x[x > 0], x[torch.tensor([0])], x.view(2, 2), x.double() * 2
    assert (gpu.stops(), gpu.of("float64")) == (2, 1)  # how many are above 0, and an index of the host's
    gpu.forget()
    model, rows = build("llama").to("cuda"), [collate(examples("llama")[0], 0)]
    gpu.forget()
    step_loss.add_gradient(model, step_loss.StepBatches.of(model, rows), torch.device("cuda"))
    assert gpu.stops("step_loss.py") == 1 and gpu.of("to the device", "batches.py") == 3
    assert "batches.py" in gpu.report("to the device") and gpu.of("launch") > 100


# Mistakes that a machine without a GPU does not notice, each put into the program.


def _batch_stays(patch: Patch) -> Federation:
    patch.setattr(step_loss, "on_device", lambda batch, device: dict(batch))
    return Federation("fedavg", "full", device="cuda")


def _public_batch_stays(patch: Patch) -> Federation:
    patch.setattr(alignment, "on_device", lambda batch, device: dict(batch))
    return Federation("fedbiot", "last-block", device="cuda")


def _model_stays(patch: Patch) -> Federation:
    federation = Federation("fedavg", "full", device="cuda")
    federation.runner.use(federation.method.client_model(lambda: build("llama")))
    return federation


def _correction_stays(patch: Patch) -> Federation:
    """What SCAFFOLD adds to each gradient, after it was moved."""
    made = stepping.Stepper.__init__

    def wrong(self: Any, parameters: Any, settings: Any, *, correction: Any = None, **more: Any) -> None:
        host = {name: c.cpu() for name, c in (correction or {}).items()}
        add = {"filter": lambda found: [p.grad.add_(host[name]) for name, p in found.items()]}
        made(self, parameters, settings, **more, **(add if host else {}))

    patch.setattr(stepping.Stepper, "__init__", wrong)
    return Federation("fedavg", "scaffold", device="cuda")


def _start_stays(patch: Patch) -> Federation:
    """What the proximal term pulls towards."""
    made = stepping.Stepper.__init__

    def wrong(self: Any, *args: Any, start: Any = None, **more: Any) -> None:
        made(self, *args, start={n: t.cpu() for n, t in (start or {}).items()}, **more)

    patch.setattr(stepping.Stepper, "__init__", wrong)
    return Federation("fedavg", "proximal-momentum", device="cuda")


def _state_stays(patch: Patch) -> Federation:
    """An optimiser's moments, restored from a file."""
    build = stepping.build_optimizer

    def wrong(parameters: Any, settings: Any) -> Any:
        optimizer = build(parameters, settings)
        for parameter in parameters:
            zeros = torch.zeros(parameter.shape)
            optimizer.state[parameter] = {"momentum_buffer": zeros}
        return optimizer

    patch.setattr(stepping, "build_optimizer", wrong)
    return Federation("fedavg", "full", device="cuda", optimizer="sgd", momentum=0.9)


def _host_generator(patch: Patch) -> Federation:
    round = stepping.stochastically
    patch.setattr(stepping, "stochastically", lambda wide, dtype, _: round(wide, dtype, torch.Generator()))
    return Federation("fedavg", "full-bfloat16", device="cuda", masters="stochastic")


def _labels_stay(patch: Patch) -> Federation:
    """Targets of the loss that were chosen on the host and not moved."""
    patch.setattr(lean_loss, "FEW", 0)

    def wrong(self: Any, logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
        hidden = self.hidden
        chosen = labels.cpu() != -100
        return nn.functional.cross_entropy(self.logits(hidden[chosen]), labels.cpu()[chosen])

    patch.setattr(lean_loss.Head, "loss", wrong)
    return Federation("fedavg", "full", device="cuda")


def _read_as_array(patch: Patch) -> Federation:
    """A norm taken with NumPy."""
    load = fedavg.load

    def wrong(parameters: Any, tensors: Any) -> None:
        load(parameters, tensors)
        _ = [np.linalg.norm(parameter.detach().numpy()) for parameter in parameters.values()]

    patch.setattr(fedavg, "load", wrong)
    return Federation("fedavg", "lora", device="cuda")


def _sent_model_stays(patch: Patch) -> Federation:
    """The model that a client was sent, built and left where it came."""
    patch.setattr(fedbiot, "at_work", lambda models, device: nullcontext())
    return Federation("fedbiot", "nothing-left-out", device="cuda")


PLANTED = {
    "a batch stays on the host": _batch_stays,
    "a public batch stays on the host": _public_batch_stays,
    "the model stays on the host": _model_stays,
    "a control variate stays on the host": _correction_stays,
    "a round's start stays on the host": _start_stays,
    "an optimiser's state stays on the host": _state_stays,
    "labels stay on the host": _labels_stay,
    "a model that was sent stays on the host": _sent_model_stays,
    "a host's generator": _host_generator,
    "a weight read as an array": _read_as_array,
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_in_a_method_is_found(mistake: str, gpu: PretendedGpu, monkeypatch: Patch) -> None:
    assert isinstance(cause(lambda: PLANTED[mistake](monkeypatch).round(1)), DeviceError)


def test_a_kernel_that_is_given_the_hosts_memory_is_found(gpu: PretendedGpu) -> None:
    update = kernels.Update(SeedPool(1, 64, "hadamard4"), np.ones(64))
    there, here = torch.ones(300, device="cuda"), torch.ones(300)
    with pytest.raises(DeviceError, match="Pointer argument"):
        update.jobs(there, here, "w")
    for job in update.jobs(there, there, "w"):
        job()
    assert gpu.of("kernel") == 1 and not torch.equal(there.cpu(), here)


def test_a_batch_that_is_scored_on_the_host_is_found(gpu: PretendedGpu, monkeypatch: Patch) -> None:
    monkeypatch.setattr(likelihoods, "on_device", lambda batch, device: dict(batch))
    model, items = build("llama").to("cuda"), examples("llama")[1]
    with pytest.raises(DeviceError):
        example_losses(model, items, batch_size=2, memory=1 << 20, pad_id=0)


def test_too_small_a_gpu_is_said(gpu: PretendedGpu) -> None:
    federation = Federation("fedavg", "full", device="cuda")
    gpu.limit = gpu.allocated + 10_000
    with pytest.raises(ProgramError, match=r"CUDA out of memory[\s\S]*lower method.batch_size"):
        federation.round(1)


# What a loop must not do, and does not: each would go unnoticed but for the counts below.


def inside_forward(gpu: PretendedGpu, kind: str) -> int:
    """How often something happened inside a model's own code: that of `outputs`, and of what wraps a body."""
    return gpu.of(kind, " outputs") + gpu.of(kind, " forward")


def a_step(gpu: PretendedGpu, *form: str, **changes: object) -> dict[str, float]:
    """What one step more of a client adds, by kind, in lines of our own.

    What transformers does inside the forward pass is counted apart, as "forward".
    """
    counted = []
    for number in (1, 3):
        settings = {"local_epochs": None, **changes} if form[0] == "fedavg" else changes
        federation = Federation(*form, device="cuda", **{**settings, "local_steps": number})
        assert all(isinstance(parameter, OnGpu) for parameter in federation.model.parameters())
        gpu.forget()
        federation.round(1)
        inside = {kind: inside_forward(gpu, kind) for kind in ("stop", "to the device", "float64")}
        own = {kind: gpu.of(kind) - n for kind, n in inside.items()}
        counted.append({**own, "to the host": gpu.of("to the host"), "forward": inside["stop"]})
    print(gpu.report("stop", "to the device", "to the host", "float64"))
    steps = 2 * len(federation.sizes)
    return {kind: (n - counted[0][kind]) / steps for kind, n in counted[1].items()}


WHOLE = 1 << 20  # logits that are left to the model's own loss; a step of these tests has fewer


@pytest.mark.parametrize(
    ("form", "changes", "batches", "few"),
    [
        (("fedavg", "full"), {}, 1, 0),
        (("fedavg", "full"), {"gradient_accumulation": 4}, 4, WHOLE),
        (("fedavg", "full"), {"control_variates": True, "optimizer": "sgd"}, 1, WHOLE),
        (("fedavg", "lora"), {"proximal": 0.1, "max_grad_norm": 1.0}, 1, WHOLE),
        (("fedavg", "full"), {"optimizer": "adamw-8bit"}, 1, WHOLE),
        (("fedavg", "full-bfloat16"), {"masters": "stochastic", "optimizer_in_backward": True}, 1, 0),
    ],
)
def test_a_step_waits_once_and_copies_its_batches_alone(
    form: tuple[str, str],
    changes: dict[str, Any],
    batches: int,
    few: int,
    gpu: PretendedGpu,
    monkeypatch: Patch,
) -> None:
    monkeypatch.setattr(lean_loss, "FEW", few)
    found = a_step(gpu, *form, **changes)
    assert found["stop"] == found["to the host"] == 1  # the losses of all its batches
    # a batch's three tensors; in pieces also which positions have a label, and which
    assert found["to the device"] == batches * (3 if few else 5)
    assert found["forward"] <= 2 * batches  # transformers looks whether the mask hides anything
    assert found["float64"] == 0


@pytest.mark.parametrize("few", [0, WHOLE], ids=["in-pieces", "whole"])
def test_a_zeroth_order_step_waits_for_its_losses_and_rows(
    few: int, gpu: PretendedGpu, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(lean_loss, "FEW", few)
    found = a_step(gpu, "fedkseed", "hadamard4")
    # of each of two passes the loss, and which rows of the embeddings there are to form
    assert 2 <= found["stop"] <= 8 and found["to the host"] <= 2 and found["float64"] == 0
    assert found["forward"] <= 4


@pytest.mark.parametrize("few", [0, 1 << 20], ids=["in-pieces", "whole"])
def test_scoring_waits_once_a_batch(few: int, gpu: PretendedGpu, monkeypatch: Patch) -> None:
    monkeypatch.setattr(lean_loss, "FEW", few)
    model, items = build("llama").to("cuda"), [item for some in examples("llama").values() for item in some]
    here = build("llama")
    for each in (model, here):
        each.set_attn_implementation("eager")
    gpu.forget()
    with torch.no_grad():
        found = example_losses(model, items, batch_size=2, memory=1 << 20, pad_id=0)
        batches = -(-len(items) // 2)
        assert gpu.stops() - inside_forward(gpu, "stop") == gpu.of("to the host") == batches
        assert found == example_losses(here, items, batch_size=2, memory=1 << 20, pad_id=0)


def test_a_classifier_is_scored_in_two_waits_a_batch(gpu: PretendedGpu) -> None:
    model, items = build("roberta").to("cuda"), examples("roberta")[1]
    gpu.forget()
    with torch.no_grad():
        example_losses(model, items, batch_size=8, memory=1 << 20, pad_id=0, classes=True)
    assert gpu.stops("likelihoods.py") <= 4 and gpu.of("to the host") == 2


def test_a_token_is_generated_in_one_wait(gpu: PretendedGpu) -> None:
    answers, stops = {}, {}
    for tokens in (2, 6):
        for where in ("cpu", "cuda"):
            model = build("llama").to(where)
            model.set_attn_implementation("eager")
            gpu.forget()
            prompts = [[1, 9, 33], [1, 41, 12, 7]]
            answers[where, tokens] = generate(
                model, tokenizer(), prompts, max_new_tokens=tokens, batch_size=2
            )
            stops[where, tokens] = gpu.stops()
        assert answers["cpu", tokens] == answers["cuda", tokens]
    assert stops["cpu", 6] == 0 and stops["cuda", 6] - stops["cuda", 2] <= 2 * 4


@pytest.mark.parametrize("form", [("fedbiot", "last-block"), ("fedcybgd", "hybrid"), ("fedbavg", "none")])
def test_one_card_holds_one_role_at_a_time(
    form: tuple[str, str], gpu: PretendedGpu, monkeypatch: Patch
) -> None:
    federation = Federation(*form, device="cuda")
    assert all(parameter.device.type == "cpu" for parameter in federation.model.parameters())
    step, before, inside = type(federation.method).client_step, [], []

    def noted(self: Any, job: Payload, env: Any) -> Any:
        before.append(gpu.allocated)
        torch.cuda.reset_peak_memory_stats()
        result = step(self, job, env)
        inside.append(gpu.peak)
        return result

    monkeypatch.setattr(type(federation.method), "client_step", noted)
    federation.run()
    assert before == [0] * len(before) and gpu.allocated == 0 and min(inside) > 0


def test_models_come_to_work_and_go(gpu: PretendedGpu) -> None:
    one, other = build("llama"), nn.Linear(32, 64, bias=False)
    other.weight = nn.Parameter(one.get_parameter("lm_head.weight").detach())  # of the same memory
    before = {name: (id(p), p.data_ptr(), p.detach().clone()) for name, p in one.named_parameters()}
    with pytest.raises(ZeroDivisionError), at_work([one, other], torch.device("cuda")):
        assert all(isinstance(p, OnGpu) for p in (*one.parameters(), *one.buffers(), other.weight))
        assert other.weight.data_ptr() == one.get_parameter("lm_head.weight").data_ptr()
        sizes = {p.data_ptr(): -(-p.nbytes // 512) * 512 for p in (*one.parameters(), *one.buffers())}
        assert gpu.allocated == sum(sizes.values())
        with torch.no_grad():
            other.weight.zero_()  # what is not read in here is lost
        raise ZeroDivisionError
    assert gpu.allocated == 0 and other.weight.data_ptr() == before["lm_head.weight"][1]
    for name, parameter in one.named_parameters():
        assert (id(parameter), parameter.data_ptr()) == before[name][:2]
        assert torch.equal(parameter, before[name][2]) and parameter.requires_grad
    with at_work([one], torch.device("cpu")):
        assert one.get_parameter("lm_head.weight").data_ptr() == before["lm_head.weight"][1]


def test_a_pass_of_fedkseed_launches_one_kernel_a_weight(gpu: PretendedGpu) -> None:
    """A matrix of 12 MB, which a CPU forms in six pieces."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()  # type: ignore[arg-type]
    inputs = {name: tensor.to("cuda") for name, tensor in batch("llama").items()}
    with step_weights(model, SeedPool(0, 64, "hadamard4"), torch.zeros(64), 1e-3) as weights:
        assert gpu.of("kernel") == 1  # it is compiled on this device before a step is measured
        gpu.forget()
        weights.loss(inputs, 4, 1e-3)
    # the embedding's rows, seven matrices, three norms, the head
    assert gpu.of("kernel") == len(list(model.parameters())) == 12
    assert gpu.of("to the device") == 1  # the pass's K numbers
