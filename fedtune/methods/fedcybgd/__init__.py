"""FedCyBGD, FedBAvg and BAdam (Wang et al. 2024; Luo et al. 2024): one block at a time.

Read `method.py` first, beside Algorithm 1 of the paper. `settings.py` has the settings, `state.py` what
the server keeps; `client.py` and `server.py` are what the two sides do in a turn, `training.py` the steps on
one block, `order.py` whose turn it is, `powersgd.py` compressed uploads, `badam.py` the same descent with all
data in one place.
"""
