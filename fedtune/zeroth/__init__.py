"""Counter-based noise for seed-replayed zeroth-order tuning (FedKSeed, arXiv 2312.06353).

`pool.py` says what noise is a function of, `reference.py` defines every kind of it in plain NumPy,
`kernels.py`, `vector.py` and `fast.py` compute the same bits quickly, `gpu.py` and `triton_kernels.py` do so
on GPUs, `subspace.py` has kinds of low rank, and `tensors.py` applies them to weights by name.
"""

from fedtune.zeroth.pool import KINDS, MAX_SEEDS, NOISE_VERSION, SHAPED, SeedPool, canonical_name, tensor_id
from fedtune.zeroth.reference import delta, z
from fedtune.zeroth.tensors import (
    Prepared,
    perturb_,
    perturb_all_,
    perturbed_names,
    rebuild_,
    rebuild_all_,
    rebuild_perturbed_,
    rebuild_perturbed_all_,
)

__all__ = [
    "KINDS",
    "MAX_SEEDS",
    "NOISE_VERSION",
    "SHAPED",
    "Prepared",
    "SeedPool",
    "canonical_name",
    "delta",
    "perturb_",
    "perturb_all_",
    "perturbed_names",
    "rebuild_",
    "rebuild_all_",
    "rebuild_perturbed_",
    "rebuild_perturbed_all_",
    "tensor_id",
    "z",
]
