"""Numba kernels of one_pass.py and watch.py, over contiguous float32 arrays; compiled at their first call."""

from __future__ import annotations

import numpy as np

from fedtune.zeroth.kernels import jit


@jit
def add_rounded(sums, values, scale):  # type: ignore[no-untyped-def]
    """sums[i] += round(values[i] * scale), the product in float64, rounded to even; int64."""
    for i in range(values.size):
        sums[i] += np.int64(np.rint(np.float64(values[i]) * scale))


@jit
def add_rows(twice, squares, rows, signs, shifts, of_rows):  # type: ignore[no-untyped-def]
    """Adds each of the rows (n, w), by signs of columns and rows, to twice from its shift on; squares (w)."""
    for r in range(rows.shape[0]):
        row, sign = rows[r], of_rows[r]
        out = twice[shifts[r] : shifts[r] + row.size]
        for j in range(row.size):
            squares[j] += np.float64(row[j]) * np.float64(row[j])
            out[j] += np.float64(sign * signs[j] * row[j])
