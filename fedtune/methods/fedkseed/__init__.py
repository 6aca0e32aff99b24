"""FedKSeed and FedKSeed-Pro (Qin et al. 2024): all weights tuned by forward passes alone.

Read `method.py` first, beside Algorithm 1 of the paper. `settings.py` has its settings,
`state.py` what the server keeps, `step.py` is one zeroth-order step, `aggregation.py` how the server sums
what clients send, `order.py` what an order says, and `infinite_pool.py` the paper's baselines, whose seeds
never end.
"""
