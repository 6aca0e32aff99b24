"""FedBiOT, FedOT and Offsite-tuning (Wu et al. 2024; Kuang et al. 2023; Xiao et al. 2023).

Read `method.py` first, beside Algorithms 1 and 2 of the paper. `server.py` is the
server's part: the emulator that it compresses, aligns and takes back.
"""
