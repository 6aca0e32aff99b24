"""FedAvg in every form (McMahan et al. 2017), one-shot fine-tuning included (Wang et al. 2024).

Read `method.py` first: a round from order to result. `settings.py` has its settings,
`lora_aggregation.py` is what a mean of LoRA factors can be, `server_optimizer.py` what the server does with
the mean update, `personal.py` what a client keeps as its own.
"""
