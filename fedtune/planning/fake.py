"""The runs' own code on tensors without content: shapes, dtypes and lifetimes are real, values are not.

A model of any size is built from its config.json on PyTorch's fake tensors, which say they lie on a CPU and
take no memory. What a method does with them then takes the path of a real run: the same operations, the same
kernels chosen, the same tensors kept for the backward pass. Small tensors that values depend on (token ids,
masks, seeds, permutations) stay real.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fedtune.models.load import meta_model

_aten = torch.ops.aten


class Fakes:
    """One world of fake tensors; tensors of two do not mix."""

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._mode.fake_tensor_converter = _Forgetful()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without content."""
        with self._mode:
            return torch.empty(shape, dtype=dtype, device="cpu")

    def model(
        self,
        name: str,
        *,
        base: Path,
        initial: str,
        task: str,
        num_labels: int | None,
        dtype: str,
        quantization: str = "none",
        attention: str = "auto",
    ) -> PreTrainedModel:
        """The model of a config.json, eval mode, all parameters trainable, as `load_model` gives it.

        Raises:
            InputError: As `meta_model`.
        """
        model = meta_model(
            name,
            base=base,
            initial=initial,
            task=task,
            num_labels=num_labels,
            dtype=dtype,
            quantization=quantization,
            attention=attention,
        )
        self.empty_out(model)
        return model

    def empty_out(self, model: nn.Module) -> None:
        """Makes every tensor of a model a fake one, in place: what was attached to a fake model is real."""
        made: dict[int, Tensor] = {}  # by the id of what was there: tied ones stay tied

        def fake(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                empty = self.empty(tuple(tensor.shape), tensor.dtype)
                trains = tensor.requires_grad
                made[id(tensor)] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
            return made[id(tensor)]

        for module in list(model.modules()):
            everything: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
            for held in everything:
                for key, value in held.items():
                    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
                        held[key] = fake(value)


class _Forgetful(FakeTensorConverter):
    """Keeps no reference to what it made: `Module.to` refuses tensors that anything refers to weakly."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        pass


@contextmanager
def values() -> Iterator[None]:
    """Inside, code may ask fake tensors for values, which are all 1, and index them with real masks."""
    with _Values():
        yield


class _Values(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._world: FakeTensorMode | None = None  # of the fake tensors that were met

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], FakeTensor):
            self._world = args[0].fake_mode
        if op is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
            return args[0].fake_device  # asked for more often than anything is computed
        if op is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if op is _aten._unique2.default and isinstance(args[0], FakeTensor):  # BERT's own ids of token types
            args = (torch.ones(args[0].shape, dtype=args[0].dtype), *args[1:])
        if op is _aten.where.self and self._world is not None and _is_large_and_real(*args):
            # a mask of attention as numbers, made anew in every block; nobody asks for its values
            args = (self._world.from_tensor(args[0]), *args[1:])
        if op in _INDEXED and isinstance(args[0], FakeTensor):
            args = (args[0], _whole_numbers(args[1]), *args[2:])
        return op(*args, **kwargs)


LARGE = 2**20  # elements of a mask


def _is_large_and_real(condition: Tensor, *chosen: Tensor) -> bool:
    return condition.numel() >= LARGE and not any(isinstance(t, FakeTensor) for t in (condition, *chosen))


_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


def _whole_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Masks among indices as places: how many a mask chooses is known of a real one alone."""
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            whole += index.nonzero().unbind(1)
        else:
            whole.append(index)
    return whole
