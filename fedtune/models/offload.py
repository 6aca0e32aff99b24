"""Frozen weights of blocks off memory: mapped from disk for the forward pass that needs them, then not.

From there they are copied to a GPU, if that is where the model is; its own memory for them is free meanwhile.

What torch and DeepSpeed call offloading of parameters, for those that do not train. Each module of a block
(its attention, its MLP, a norm) gets its frozen weights mapped when it is called, and gives them up when it
is done. What the backward pass needs of them its graph keeps until then: where activations are computed again
that is one block's, and nothing of blocks below the first that trains. The weights are the same bits.

They lie where they came to lie (`lies`), as what a client of FedCyBGD was sent does, or are written, once, to
a file without a name in the system's folder for temporary files. accelerate's hooks do the same for
inference; here they would not do: they take what trains too, and a forward pass that is computed again ends
by an exception, behind which they leave a module's weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.on_disk import Copies

Read = Callable[[], Tensor]


class _Place(NamedTuple):
    """Where a parameter's values lie on disk, for as long as it holds these values."""

    read: Read
    address: int
    version: int


def lies(parameter: nn.Parameter, read: Read) -> None:
    """Says where a parameter's values lie: `read` maps them anew. Nothing is read now."""
    setattr(parameter, _PLACE, _Place(read, *_marks(parameter)))


def blank(like: Tensor) -> Tensor:
    """Another tensor without content, of a plan's kind; `like` is not looked at, and so not in memory."""
    assert isinstance(like, FakeTensor)
    with like.fake_mode:
        made = torch.empty(like.shape, dtype=like.dtype, device="cpu")
    return made.view(made.shape)  # in memory from here on, as what is mapped


def largest_weight(model: nn.Module) -> int:
    """Bytes of the largest weight of a block: what is mapped at a time on its way to a GPU."""
    return max(p.nbytes for block in find_blocks(model).modules for p in block.parameters())


@contextmanager
def offloaded(model: nn.Module, where: str) -> Iterator[None]:
    """Inside, frozen weights of blocks are in memory only while they are used; then all is as before.

    What had no place on disk yet is mapped from there afterwards too, in memory of its own no more.

    Args:
        model: Any model of transformers, wrapped by PEFT or not. On a GPU it has its weights back afterwards.
        where: As `method.offload_params`: none or disk.

    Raises:
        InputError: The weights are on neither, or cannot be written.
    """
    if where == "none":
        yield
        return
    called = [each for block in find_blocks(model).modules for each in _called(block)]
    frozen = {id(p): p for each in called for _, _, p in _frozen(each)}
    for parameter in frozen.values():
        if parameter.device.type not in ("cpu", "cuda"):
            raise InputError(
                f"method.offload_params: {where} is for weights on a CPU or a GPU, got some on "
                f"{parameter.device}; set it to none"
            )
    if elsewhere := {str(key): p for key, p in frozen.items() if not _in_place(p)}:
        _put(elsewhere)
    on_gpu = [parameter for parameter in frozen.values() if parameter.device.type != "cpu"]
    handles, held = [], list[_Held]()
    try:
        for each in called:
            own = [_Held(module, name, parameter) for module, name, parameter in _frozen(each)]
            held += own
            handles.append(each.register_forward_pre_hook(partial(_take, own), prepend=True))
            handles.append(each.register_forward_hook(partial(_give, own), always_call=True))
        _give(held)
        for parameter in on_gpu:
            parameter.data = parameter.data.new_empty(0)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in on_gpu:
            read: Read = getattr(parameter, _PLACE).read
            parameter.data = read().to(parameter.device)
            lies(parameter, read)
        for one in held:
            one.module._parameters[one.name] = one.parameter


class _Held:
    """A frozen parameter of a module that is offloaded."""

    def __init__(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self.module, self.name, self.parameter = module, name, parameter
        self._read: Read = getattr(parameter, _PLACE).read
        self._device = parameter.device
        none = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        self._none = nn.Parameter(none, requires_grad=False)

    def take(self) -> None:
        """Into memory."""
        there = self._read().to(self._device)
        self.module._parameters[self.name] = nn.Parameter(there, requires_grad=False)

    def give(self) -> None:
        """Out of the module; a graph that needs it keeps it."""
        self.module._parameters[self.name] = self._none


def _take(own: Iterable[_Held], *_: Any) -> None:
    """The hook before a module's forward pass."""
    for one in own:
        one.take()


def _give(own: Iterable[_Held], *_: Any) -> None:
    """The hook after it, also where it ended by an exception."""
    for one in own:
        one.give()


def _called(block: nn.Module) -> Iterator[nn.Module]:
    """What a block calls; a list of modules is none itself. A block's own parameters stay in memory."""
    for child in block.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called(child)
        else:
            yield child


def _frozen(called: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in called.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]


def _in_place(parameter: nn.Parameter) -> bool:
    place: _Place | None = getattr(parameter, _PLACE, None)
    return place is not None and place[1:] == _marks(parameter)


def _marks(parameter: nn.Parameter) -> tuple[int, int]:
    """Another pair where a parameter has got other values; a plan's have none."""
    return 0 if isinstance(parameter, FakeTensor) else parameter.data_ptr(), parameter._version


def _put(parameters: Mapping[str, nn.Parameter]) -> None:
    """Writes parameters, and leaves those of the host mapped from there."""
    if any(isinstance(parameter, FakeTensor) for parameter in parameters.values()):
        for parameter in parameters.values():  # a plan's, without content
            lies(parameter, partial(blank, parameter))
        return
    copies = Copies(parameters)
    for name, parameter in parameters.items():
        if parameter.device.type == "cpu":
            parameter.data = copies.read(name)
        lies(parameter, partial(copies.read, name))


_PLACE = "_lies_on_disk"  # an attribute of a parameter; a copy of it has none
