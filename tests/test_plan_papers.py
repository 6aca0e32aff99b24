"""Plans of the papers' configurations, held to the costs that the papers print."""

from __future__ import annotations

import pytest
from reproduced import load

plans = load("plan_papers")
KIB, MIB, GIB = 2**10, 2**20, 2**30


@pytest.mark.parametrize(
    ("shape", "config", "setting", "parameters", "count"),
    [
        ("datajuicer-1.3b", "fedptuning", "method.p_tuning.hidden=2048", 12.63e6, 96.36 * MIB),
        ("datajuicer-1.3b", "fedprompt", "seed=0", 40.96e3, 320.0 * KIB),
        ("datajuicer-1.3b", "fedit_sgd", "seed=0", 1.57e6, 12.00 * MIB),
        ("datajuicer-1.3b", "fedit", "seed=0", 1.57e6, 12.00 * MIB),
        ("datajuicer-1.3b", "fedkseed_ni_1b", "seed=0", 1.35e9, 17_988),
        ("datajuicer-1.3b", "fedkseed_pro_ni_1b", "seed=0", 1.35e9, 9_796),
        ("llama-3b", "fedptuning", "method.p_tuning.hidden=3200", 30.79e6, 234.94 * MIB),
        ("llama-3b", "fedprompt", "seed=0", 64.00e3, 500.0 * KIB),
        ("llama-3b", "fedit_sgd", "seed=0", 2.66e6, 20.31 * MIB),
        ("llama-3b", "fedit", "seed=0", 2.66e6, 20.31 * MIB),
        ("llama-3b", "fedkseed_ni_3b", "seed=0", 3.43e9, 17_988),
        ("llama-3b", "fedkseed_pro_ni_3b", "seed=0", 3.43e9, 17_988),
    ],
)
def test_fedkseed_table_3(shape: str, config: str, setting: str, parameters: float, count: float) -> None:
    found = plans.paper(config, shape, setting)
    assert found["trainable_parameters"] == pytest.approx(parameters, rel=0.004)  # three digits are printed
    if "fedkseed" in config:
        assert found["published"]["bytes_per_client_round"] == count
        # the same numbers, in fewer bytes a seed, with what they belong to and a checksum
        assert found["payload_bytes"]["total"] == pytest.approx(count, rel=0.05)
    else:
        assert found["payload_bytes"]["total"] == pytest.approx(count, rel=0.0005)


@pytest.mark.parametrize(
    ("method", "adapter", "dropout", "parameters", "flops", "count"),
    [
        ("fedot", 4, 0.2, 524_288, 10.33, 4.19),
        ("fedbiot", 2, 0.2, 262_144, 5.47, 14.68),
        ("fedbiot", 4, 0.2, 524_288, 5.87, 15.73),
        ("fedot", 4, 0.5, 524_288, 7.09, 4.19),
        ("fedbiot", 2, 0.5, 262_144, 3.65, 9.96),
        ("fedbiot", 4, 0.5, 524_288, 4.25, 11.53),
    ],
)
def test_fedbiot_table_5(
    method: str, adapter: int, dropout: float, parameters: int, flops: float, count: float
) -> None:
    found = plans.fedbiot(method, adapter, dropout)
    assert found["trainable_parameters"] == parameters
    assert round(found["published"]["flops_per_token"] / 1e9, 2) == flops
    assert round(found["published"]["bytes_per_client_round"] / 1e6, 2) == count
    first = found["payload_bytes"]["first_time"]  # besides, once: the adapter and the emulator
    assert first["down"] - first["model_down"] + first["up"] == found["published"]["bytes_per_client_round"]
    assert first["model_down"] > 2 * 202_383_360 * (adapter + 14)


WEIGHTS, LAYER, AROUND = 6_738_415_616, 202_383_360, 2 * 32_000 * 4096 + 4096


def test_fedcybgd_tables_1_and_6() -> None:
    full = plans.paper("fed_full", "llama-2-7b")["payload_bytes"]["first_time"]
    assert full["down"] == full["up"] == 2 * WEIGHTS
    assert full["down"] / GIB == pytest.approx(12.48, rel=0.006)  # printed: of 6.7e9 weights, rounded
    lora = plans.paper("fedlora", "llama-2-7b")["payload_bytes"]["first_time"]
    assert lora["up"] / MIB == 32.00  # printed 32.03

    def cyclic(name: str) -> tuple[int, int]:
        first = plans.paper(name, "llama-2-7b")["payload_bytes"]["first_time"]
        return first["down"], first["up"]

    whole, up = cyclic("fedcybgd_llama2_alpaca")
    assert up == 4 * LAYER and up / MIB == pytest.approx(770.37, rel=0.003)
    assert 0 <= whole - 2 * WEIGHTS < 4000  # besides the weights: the architecture, and frequencies
    assert (whole + up) / GIB == pytest.approx(13.23, rel=0.007)
    half, up = cyclic("fedcybgd_llama2_alpaca_layer_drop")
    assert 0 <= half - 2 * (16 * LAYER + AROUND) < 4000  # embeddings, norm and head always come
    assert (half - 2 * (AROUND // 2)) / GIB == pytest.approx(6.24, rel=0.01)  # the paper halves those too
    assert (half + up) / GIB == pytest.approx(6.99, rel=0.05)


def test_fedcybgd_table_6_with_lora_or_adapters_in_the_block() -> None:
    def both_ways(name: str) -> tuple[int, int]:
        first = plans.paper(name, "llama-2-7b")["payload_bytes"]["first_time"]
        return first["down"], first["up"]

    down, up = both_ways("fedcybgd_llama2_alpaca_lora")  # ii, 12.49 GB: the model, and factors of a block
    factors = 2 * 16 * (4096 + 4096)  # rank 16, of the query and value projections
    assert up == 4 * factors
    assert 0 <= down - 2 * WEIGHTS - 4 * 32 * factors < 4000  # all blocks' factors come with the model
    assert (2 * WEIGHTS + up) / GIB == pytest.approx(12.49, rel=0.006)
    down, up = both_ways("fedcybgd_llama2_alpaca_adapter")  # iii, 6.30 GB: half of the blocks
    adapter = 2 * 64 * 4096 + 64 + 4096
    assert up == 4 * adapter
    assert 0 <= down - 2 * (16 * LAYER + AROUND) - 4 * 16 * adapter < 4000
    assert (2 * (16 * LAYER + AROUND // 2) + up) / GIB == pytest.approx(6.30, rel=0.01)


def test_one_shot_section_5() -> None:
    several, one = (plans.one_shot(rounds)["payload_bytes"] for rounds in (3, 1))
    s = 4 * 13_015_864_320  # "approximately 50 GB"
    assert several["total"] == 2 * 10 * 3 * s and one["total"] == 2 * 10 * s
    assert several["total"] == pytest.approx(3000e9, rel=0.05)
    assert one["total"] == pytest.approx(1000e9, rel=0.05)
