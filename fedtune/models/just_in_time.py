"""Weights formed just in time: the model stays as it was loaded and computes with others.

While `JustInTimeWeights` is open, every operation of PyTorch that is given a parameter gets what `form` makes
of it, for that operation alone. On a CPU a linear layer's matrix never exists whole: some of its rows at a
time are formed where a core's cache holds them, multiplied and forgotten. A GPU waits for launches sooner
than for memory: there it is formed at once. Of an embedding only the rows that are looked up are formed,
and on a GPU what lies between them. Nothing is ever written into the model, so nothing drifts however many
forward passes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedtune.models.openmp import team

Form = Callable[[str, Tensor, Tensor, int], None]

# Bytes of a weight that are formed at a time: what a core's cache holds; on a GPU any matrix of today.
CHUNK = {"cpu": 2 << 20, "cuda": 2 << 30}
# Bytes between two rows of an embedding that are formed sooner than another call is made.
GAP = {"cpu": 1 << 17, "cuda": 16 << 20}
SHARE = 1 << 19  # bytes of a weight for which one more thread pays

# An attribute says something about a tensor, or is made of its values.
_OF_VALUES = {getattr(Tensor, name).__get__ for name in ("T", "H", "mT", "mH", "data", "real", "imag")}
_ABOUT = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.is_floating_point,
}


class JustInTimeWeights(TorchFunctionMode):
    """Inside, each of `parameters` acts as what `form` makes of it; may be entered again and again.

    For inference only: gradients would not reach the parameters. Compiled or scripted modules do not call
    PyTorch in a way that is seen here; they would compute with the parameters' own values.

    Args:
        parameters: By name, each once. Others act as they are.
        form: Gets a parameter's name, a flat piece of its own values, which it must not change, a tensor of
            the same size, dtype and device to write to, and the index in the flattened parameter where both
            begin. Several threads call it at once; it must not share its work out further.
        threads: How many threads share the work on a CPU; PyTorch's setting by default.
        as_on: The type of device whose pieces they are formed in; the parameters' own by default.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        form: Form,
        *,
        threads: int | None = None,
        as_on: str | None = None,
    ) -> None:
        super().__init__()
        self._form, self._threads, self._as_on = form, threads, as_on
        self._parameters = dict(parameters)  # kept: an id stands for one object only while that lives
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes `func` with formed weights; PyTorch calls this for each operation."""
        kwargs = kwargs or {}
        if not self._among(args) and not self._among(kwargs.values()):
            return func(*args, **kwargs)
        if func in _ABOUT or (func.__name__ == "__get__" and func not in _OF_VALUES):
            return func(*args, **kwargs)
        if len(args) > 1 and id(args[1]) in self._names:
            if func is functional.linear and not args[0].shape[:-1].numel():
                return func(*args, **kwargs)  # no position: nothing of the weight is in the result
            if func is functional.linear and _multiplies(*args[:2]):
                return self._linear(*args, **kwargs)
            if func is functional.embedding and _looks_up(*args, **kwargs):
                return self._embedding(*args[:2])
        return func(
            *map(self._effective, args), **{key: self._effective(value) for key, value in kwargs.items()}
        )

    def _among(self, values: Iterable[Any]) -> bool:
        """Whether there is a parameter among them, or in a list of them."""
        for value in values:
            if id(value) in self._names or (type(value) in (list, tuple) and self._among(value)):
                return True
        return False

    def _effective(self, value: Any) -> Any:
        if id(value) in self._names:
            return self._whole(value)
        return type(value)(map(self._effective, value)) if type(value) in (list, tuple) else value

    def _whole(self, parameter: Tensor) -> Tensor:
        """The parameter, formed."""
        own = parameter.detach()
        formed = torch.empty_like(own)
        name, source, out = self._names[id(parameter)], own.view(-1), formed.view(-1)
        threads, pieces = self._shares(own, own.numel())
        todo = iter(pieces)

        def work() -> None:
            for begin, end in todo:
                self._form(name, source[begin:end], out[begin:end], begin)

        team(work, threads)
        return formed

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A linear layer, W (outputs, inputs): each chunk of W's rows gives columns of x Wᵀ + b."""
        name, own = self._names[id(weight)], weight.detach()
        outputs, inputs = own.shape
        rows_of_x, source = x.reshape(-1, inputs), own.view(-1)
        added = self._effective(bias)
        result = x.new_empty(rows_of_x.shape[0], outputs)
        threads, chunks = self._shares(own, outputs)
        room = chunks[0][1] * inputs
        buffers, todo = [own.new_empty(room) for _ in range(threads)], iter(chunks)

        def work() -> None:
            buffer = buffers.pop()
            for begin, end in todo:
                chunk = buffer[: (end - begin) * inputs]
                self._form(name, source[begin * inputs : end * inputs], chunk, begin * inputs)
                matrix, columns = chunk.view(-1, inputs).t(), result[:, begin:end]
                if added is None:
                    torch.mm(rows_of_x, matrix, out=columns)
                else:
                    torch.addmm(added[begin:end], rows_of_x, matrix, out=columns)

        team(work, threads)
        return result.view(*x.shape[:-1], outputs)

    def _embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """The rows of a weight (entries, width) that `ids` (...) names, each formed once."""
        name, own = self._names[id(weight)], weight.detach()
        width = own.shape[1]
        used, position = ids.unique(return_inverse=True)
        wanted: list[int] = used.tolist()
        if not 0 <= wanted[0] <= wanted[-1] < own.shape[0]:
            return functional.embedding(ids, own)  # PyTorch's own error
        source, rows = own.view(-1), own.new_empty(len(wanted), width)
        row_bytes = width * own.element_size()
        kind = self._as_on or own.device.type
        for first, last in _runs(wanted, GAP[kind] // row_bytes, CHUNK[kind] // row_bytes):
            begin, end = wanted[first], wanted[last - 1] + 1
            dense = end - begin == last - first
            span = rows[first:last] if dense else own.new_empty(end - begin, width)
            self._form(name, source[begin * width : end * width], span.view(-1), begin * width)
            if not dense:
                torch.index_select(span, 0, used[first:last] - begin, out=rows[first:last])
        return functional.embedding(position, rows)

    def _shares(self, own: Tensor, units: int) -> tuple[int, list[tuple[int, int]]]:
        """How many threads work on a parameter, and the ranges of `units` they take: as many for each."""
        most = torch.get_num_threads() if self._threads is None else self._threads
        kind = self._as_on or own.device.type
        threads = max(1, min(most, own.nbytes // SHARE)) if kind == "cpu" else 1
        chunks = -(-own.nbytes // CHUNK[kind])
        chunks = min(-(-chunks // threads) * threads, units)
        size = -(-units // max(chunks, 1))
        return threads, [(begin, min(begin + size, units)) for begin in range(0, units, max(size, 1))]


def _runs(wanted: list[int], gap: int, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions in ascending row numbers: rows no further apart than `gap`, over `most` in all."""
    first = 0
    for i in range(1, len(wanted) + 1):
        if i == len(wanted) or wanted[i] - wanted[i - 1] > max(gap, 1) or wanted[i] - wanted[first] >= most:
            yield first, i
            first = i


def _multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether a product can be taken in chunks."""
    return x.dtype == weight.dtype and x.numel() > 0 and weight.numel() > 0 and weight.is_contiguous()


def _looks_up(
    ids: Tensor, weight: Tensor, padding: Any = None, max_norm: Any = None, *rest: Any, **more: Any
) -> bool:
    """Whether a look-up reads rows and nothing else."""
    return max_norm is None and ids.numel() > 0 and weight.is_contiguous()
