"""How long each client's update is, and whether it points where the others' do.

A round keeps of each update its norm, which is exact, and a count sketch of `WIDTH` numbers (Charikar et
al. 2002), from which cosines follow. An update of at most `WIDTH` numbers has an exact cosine; a longer one's
is off by about 1/64 (one standard deviation, 1/√WIDTH). The sketch is fixed, so that a round that is done
again says the same; who knows it can build an update whose cosine lies. The norm cannot lie.

A client is compared with the mean of the others, each at length 1: at their own lengths, one update that is a
thousand times as long would turn all the others' cosines.

A client stands out if

    its norm is above NORM_TIMES · a · (median of the others' norms), a = n_i / (median of the others' n),
    not below 1 and at most MOST_ALLOWED: who has more examples may well train for more steps; of parts after
    the first (control variates, which few steps make large) OTHER_PARTS times as much is allowed;
    or, of at least FEWEST clients, its cosine is below −AGAINST.

The bounds are about twice what was seen of honest clients: norms up to 4.2 times the median, control variates
up to 11.5 times, cosines down to −0.26 (prompt tuning and SCAFFOLD on ten clients of unlike data).

Time: one pass over the update. Memory: 16 KiB a client of the round, and some MB while one is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from fedtune.core.one_pass import PIECE, floats, large
from fedtune.zeroth.fast import run

WIDTH = 4096
NORM_TIMES = 8.0
OTHER_PARTS = 4.0
MOST_ALLOWED = 10.0
FEWEST = 4
AGAINST = 0.5

_ROWS = 32  # worked on at once: 1 MiB as float64


@dataclass(frozen=True)
class Sketch:
    """What is kept of an update.

    Attributes:
        norm: Its Euclidean norm.
        direction: The sketch over the norm, float32 (WIDTH); zeros of an update that is zero.
    """

    norm: float
    direction: Tensor


Seen = Mapping[str, Sketch]  # by part


@dataclass(frozen=True)
class Standing:
    """Where one client's update stands among those of its round.

    Attributes:
        norm: Of the update; by part.
        cosine: To the mean of the others, each at length 1; by part, and None where there is none.
        times: The norm over a · (median of the others' norms), and OTHER_PARTS for parts after the first; the
            largest of the parts'. None where there is nothing to compare with.
        why: Why it stands out; empty if it does not.
    """

    norm: Mapping[str, float]
    cosine: Mapping[str, float | None]
    times: float | None = None
    why: str = ""

    @property
    def entry(self) -> dict[str, float | None]:
        """What rounds.jsonl says of it: the first part's as norm and cosine, others' with their names."""
        said: dict[str, float | None] = {}
        for place, part in enumerate(self.norm):
            before = f"{part}_" if place else ""
            said[f"{before}norm"] = float(f"{self.norm[part]:.6g}")
            cosine = self.cosine[part]
            if cosine is not None:
                said[f"{before}cosine"] = round(cosine, 3) + 0.0  # no -0.0
        return said


def sketch(update: Iterable[Tensor]) -> Sketch:
    """Norm and count sketch of tensors, as one long vector in their order.

    Entry c · WIDTH + j is added, with a random sign, at place j + s_c mod WIDTH, s_c random.
    """
    twice, at = torch.zeros(2 * WIDTH, dtype=torch.float64), 0
    squares = torch.zeros(WIDTH, dtype=torch.float64)  # by column: with one sum the bits depend on threads
    signs = _random(1 << 62, WIDTH)[1]
    for tensor in update:
        flat, done = tensor.detach().cpu().reshape(-1), 0
        kernel = large(flat)  # for whole rows; their ends are taken as small tensors are
        while done < flat.numel():
            place, rows_left = at % WIDTH, (len(flat) - done) // WIDTH
            if kernel and rows_left and not place:
                whole = flat[done : done + rows_left * WIDTH]
                _add_rows(twice, squares, whole, signs, at // WIDTH)
                done, at = done + len(whole), at + len(whole)
                continue
            most = (1 if kernel else _ROWS) * WIDTH - place
            piece = flat[done : done + most].to(torch.float64)
            rows = torch.zeros(-(-(place + len(piece)) // WIDTH), WIDTH, dtype=torch.float64)
            rows.view(-1)[place : place + len(piece)] = piece
            squares += rows.square().sum(0)
            shifts, of_rows = _random(at // WIDTH, len(rows))
            drawn = zip(rows.mul_(signs), shifts.tolist(), of_rows.tolist(), strict=True)
            for row, shift, sign in drawn:
                twice[shift : shift + WIDTH].add_(row, alpha=sign)
            done, at = done + len(piece), at + len(piece)
    norm, sums = math.sqrt(float(squares.sum())), twice[:WIDTH] + twice[WIDTH:]
    return Sketch(norm, (sums / norm if norm else sums).to(torch.float32))


def _add_rows(twice: Tensor, squares: Tensor, whole: Tensor, signs: Tensor, first: int) -> None:
    """Adds the whole rows of a large tensor, `first` and those behind it."""
    from fedtune.core import kernels  # imports Numba

    starts = range(0, len(whole), PIECE)
    sums = np.zeros((len(starts), 2 * WIDTH))  # each piece's own, so that the bits do not depend on threads
    square = np.zeros((len(starts), WIDTH))
    of_columns = signs.to(torch.float32).numpy()

    def add(number: int) -> None:
        rows = floats(whole[starts[number] : starts[number] + PIECE]).reshape(-1, WIDTH)
        shifts, of_rows = _random(first + starts[number] // WIDTH, len(rows))
        of = of_rows.to(torch.float32).numpy()
        kernels.add_rows(sums[number], square[number], rows, of_columns, shifts.numpy(), of)

    run([partial(add, number) for number in range(len(starts))])
    twice += torch.from_numpy(sums.sum(0))
    squares += torch.from_numpy(square.sum(0))


def standings(
    seen: Mapping[int, Seen], examples: Mapping[int, int], *, alike: bool = True
) -> dict[int, Standing]:
    """Where each client's update stands.

    Args:
        seen: The updates of a round, by client.
        examples: Each client's, as registered.
        alike: Whether all changed the same parts of the model; where they did not, no cosine is taken.
    """
    parts = list(next(iter(seen.values()), {}))
    clients = sorted(seen)
    cosines = {part: _cosines({c: seen[c][part] for c in clients}) if alike else {} for part in parts}
    return {
        client: _standing(
            {part: {c: seen[c][part].norm for c in clients} for part in parts}, cosines, examples, client
        )
        for client in clients
    }


def _standing(
    norms: Mapping[str, Mapping[int, float]],
    cosines: Mapping[str, Mapping[int, float]],
    examples: Mapping[int, int],
    client: int,
) -> Standing:
    why, times = "", list[float]()
    for place, (part, of) in enumerate(norms.items()):
        others = [norm for c, norm in of.items() if c != client]
        usual = median(others) if others else 0.0
        if usual > 0:
            more = examples[client] / max(1.0, median(examples[c] for c in of if c != client))
            allowed = min(max(more, 1.0), MOST_ALLOWED) * (OTHER_PARTS if place else 1.0)
            times.append(of[client] / (usual * allowed))
            if times[-1] > NORM_TIMES:
                why = why or (
                    f"the norm of its {_called(part)}, {of[client]:.4g}, is {of[client] / usual:,.4g} times "
                    "the median of the others'"
                )
        cosine = cosines[part].get(client)
        against = [value for c, value in cosines[part].items() if c != client]
        if cosine is not None and len(of) >= FEWEST and cosine < -AGAINST:
            why = why or (
                f"its {_called(part)} points against the others': the cosine to their mean is {cosine:.2f}, "
                f"the median of theirs is {median(against):.2f}"
            )
    return Standing(
        {part: of[client] for part, of in norms.items()},
        {part: cosines[part].get(client) for part in norms},
        max(times, default=None),
        why,
    )


def _called(part: str) -> str:
    return "update" if part in ("update", "weights") else f"update of the {part}"


def _cosines(sketches: Mapping[int, Sketch]) -> dict[int, float]:
    """To the mean of the others' directions, by client; without those that have none."""
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for found in sketches.values():
        total += found.direction
    cosines = {}
    for client, found in sketches.items():
        own = found.direction.to(torch.float64)
        others = total - own
        lengths = float(own.norm() * others.norm())
        if lengths > 1e-9:
            cosines[client] = float(own.dot(others)) / lengths
    return cosines


def _random(first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Shifts, int64, and signs, float64, of `rows` rows from `first` on: splitmix64 of their numbers."""
    with np.errstate(over="ignore"):
        x = (np.arange(rows, dtype=np.uint64) + np.uint64(first)) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    shifts = torch.from_numpy((x % np.uint64(WIDTH)).astype(np.int64))
    return shifts, torch.from_numpy(np.where(x >> np.uint64(63), -1.0, 1.0))
