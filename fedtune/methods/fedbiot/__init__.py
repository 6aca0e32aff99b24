"""FedBiOT, FedOT and Offsite-tuning (Wu et al. 2024; Kuang et al. 2023; Xiao et al. 2023).

Read `method.py` first, beside Algorithms 1 and 2 of the paper. `settings.py` has its settings,
`state.py` what the server keeps, `server.py` the server's models: the emulator that it compresses, aligns
and takes back.
"""
