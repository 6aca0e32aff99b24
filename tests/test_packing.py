"""Rows of several examples: which share one, by hand; and that in a row each is what it is alone.

The reference knows nothing of rows: it runs each example alone, without padding, and divides the sum of the
losses of its trained tokens by their number.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from model_families import COMMON, DECODERS, FAMILIES, GROUPED, TOKENS, build
from torch import Tensor, nn
from toy import Bench

from fedtune.data.batches import collate, padding
from fedtune.data.batching import Batching
from fedtune.data.encoded import Encoded
from fedtune.data.packing import Packed, joined, pack
from fedtune.errors import InputError
from fedtune.methods import registry
from fedtune.methods.step_loss import StepBatches, add_gradient
from fedtune.models import lean_loss
from fedtune.models.alignment import alignment_loss, entering
from fedtune.models.blocks import find_blocks
from fedtune.models.lean_loss import ends
from fedtune.models.packable import check_packable

SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
GPT_NEO = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64}
OSS = {"num_local_experts": 4, **SLIDING}
MORE: dict[str, transformers.PretrainedConfig] = {
    "mistral, sliding": transformers.MistralConfig(**GROUPED, sliding_window=4),
    "gemma3, sliding": transformers.Gemma3TextConfig(**GROUPED, **SLIDING),
    "gemma2, sliding": transformers.Gemma2Config(**GROUPED, sliding_window=4),
    "falcon, alibi": transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **TOKENS
    ),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, **GPT_NEO, **TOKENS
    ),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "mixtral, router": transformers.MixtralConfig(**GROUPED, num_local_experts=4, output_router_logits=True),
    "mpt": transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, **TOKENS),
    "mamba": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, **TOKENS),
    "lfm2": transformers.Lfm2Config(
        **COMMON, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    ),
    "gpt_oss": transformers.GptOssConfig(**GROUPED, **OSS),
    "openai-gpt": transformers.OpenAIGPTConfig(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS
    ),
}  # fmt: skip
ALL = {**DECODERS, **MORE}
NOT_APART = {"opt", "bloom", "mixtral, router", "mpt", "mamba", "lfm2", "gpt_oss", "openai-gpt"}
APART = sorted(set(ALL) - NOT_APART)
DOUBLE = [name for name in APART if name not in ("mixtral", "gemma2, sliding", "gpt_neo")]  # float32 inside
ANSWERS = (1, 17, 2, 9, 3, 13, 5, 8)  # trained tokens of eight examples


def model_of(name: str, dtype: torch.dtype = torch.float32, blocks: int = 2) -> transformers.PreTrainedModel:
    """Without dropout, whose draws would depend on the batches."""
    config = copy.deepcopy(ALL[name])
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, name, config)
        return build(name, dtype, blocks)


def examples(answers: Sequence[int] = ANSWERS) -> list[Encoded]:
    """Three tokens of prompt and an answer each; of the first the prompt counts too."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number, length in enumerate(answers):
        ids = tuple(torch.randint(3, 64, (3 + length,), generator=generator).tolist())
        found.append(Encoded(ids, ids if number == 0 else (-100,) * 3 + ids[3:]))
    return found


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alone(model: nn.Module, items: Sequence[Encoded]) -> Tensor:
    """The mean loss over trained tokens of examples that are run one at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for item in items:
        logits = model(input_ids=torch.tensor([item.input_ids]), use_cache=False).logits[0, :-1].double()
        targets = torch.tensor(item.labels[1:])
        total = total + F.cross_entropy(logits, targets, reduction="sum")
        count += int((targets != -100).sum())
    return total / count


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_rows_by_hand() -> None:
    # longest first: 8 fills a row; 7, 5 and 4 begin one each (1, 3 and 4 left); 3 fills the one of 5; 2 goes
    # to the 4, where 2 are left, and 1 to the 7
    assert pack([5, 3, 8, 2, 4, 1, 7], 8, range(7)) == [[2], [6, 5], [0, 1], [4, 3]]
    # the fullest row that has room, not the first: 6, 3, 3 in rows of 9 leave 0 and 6; then 1 with the 3
    assert pack([3, 6, 3, 1], 9, range(4)) == [[1, 0], [2, 3]]
    # of equally long ones the shuffle decides
    assert pack([2, 2, 2], 4, [2, 0, 1]) == [[2, 0], [1]]
    assert pack([], 4, []) == []
    with pytest.raises(ValueError, match="an example has 5 tokens, and a row room for 4"):
        pack([1, 5], 4, range(2))


def slow_pack(lengths: Sequence[int], room: int, order: Sequence[int]) -> list[list[int]]:
    """Best fit, decreasing, as a textbook has it; of equally full rows the one that came to it first."""
    rows: list[tuple[list[int], int, int]] = []  # examples, room left, when that became so
    for time, example in enumerate(sorted(order, key=lambda at: -lengths[at])):
        fitting = [row for row in range(len(rows)) if rows[row][1] >= lengths[example]]
        if not fitting:
            rows.append(([], room, time))
            fitting = [len(rows) - 1]
        best = min(fitting, key=lambda row: rows[row][1:])
        rows[best] = ([*rows[best][0], example], rows[best][1] - lengths[example], time)
    return [row[0] for row in rows]


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30), st.randoms(use_true_random=False))
def test_each_example_is_in_one_row_that_has_room(lengths: list[int], room: int, random: Any) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    rows = pack(lengths, room, order)
    assert rows == slow_pack(lengths, room, order) == pack(lengths, room, order)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[example] for example in row) <= room for row in rows)
    # of any two rows, the examples of one do not fit into the other
    fill = sorted(sum(lengths[example] for example in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > room
    # how many rows, and how full, depends on no shuffle: steps are known before
    assert fill == sorted(sum(lengths[e] for e in row) for row in pack(lengths, room, sorted(order)))


def test_a_row_and_its_batch_by_hand() -> None:
    one, two = Encoded((5, 6, 7), (-100, 6, 7)), Encoded((8, 9), (8, 9))
    row = joined([one, two])
    # nothing is before the 8, though something stands there
    assert row == Encoded((5, 6, 7, 8, 9), (-100, 6, 7, -100, 9), (3, 2))
    assert row.trained == one.trained + two.trained == 3
    batch = collate([row, joined([two])], 1)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 9, -100, -100, -100]]
    with pytest.raises(ValueError, match="examples or rows of them, got both"):
        collate([row, one], 1)


def test_packed_examples() -> None:
    items = examples()
    rows = Packed.of(items, 24, generator(3))
    assert [rows[at] for at in range(len(rows))] == list(rows) == rows[:]
    assert sorted(token for row in rows for token in row.input_ids) == sorted(
        token for item in items for token in item.input_ids
    )
    assert sum(row.trained for row in rows) == sum(item.trained for item in items)
    assert rows.lengths == [len(row.input_ids) for row in rows] and max(rows.lengths) <= 24
    assert list(Packed.of(items, 24, generator(3))) == list(rows)
    # 4, 20, 5, 12, 6, 16, 8, 11 tokens: 20+4, 16+8, 12+11, 6+5
    assert sorted(rows.lengths) == [11, 23, 24, 24]
    assert padding([[0, 1, 2, 3]], rows.lengths) == (4 * 24, 4 * 24 - 82)
    assert Batching().rows(items, generator()) is items
    assert list(Batching("packed", 24).rows(items, generator(3))) == list(rows)


@pytest.mark.parametrize("name", APART)
def test_in_a_row_each_example_is_what_it_is_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_loss, "FEW", 0)  # of so few words the loss would not be taken in pieces
    model, items = model_of(name), examples()
    check_packable(model)
    wanted = alone(model, items)
    wanted.backward()
    reference = gradients(model)
    rows = Packed.of(items, 24, generator(3))
    for together in (4, 2, 1):  # rows a batch; the step's loss is the mean over all their tokens
        batches = [collate(rows[at : at + together], 0) for at in range(0, 4, together)]
        loss = add_gradient(model, StepBatches.of(model, batches), torch.device("cpu"))
        assert loss.value == pytest.approx(float(wanted.detach()), rel=1e-5)
        assert (loss.tokens, loss.computed - loss.padding) == (sum(ANSWERS) + 2, 82)
        assert close(gradients(model), reference, 1e-4)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], far: float) -> bool:
    size = sum(float(g.square().sum()) for g in wanted.values())
    assert size > 1e-6 and found.keys() == wanted.keys()
    return sum(float((found[n] - wanted[n]).square().sum()) for n in wanted) < far**2 * size


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("lean", [False, True])
def test_exactly_in_float64(name: str, lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_loss, "FEW", 0 if lean else 2**20)
    model, items = model_of(name, torch.float64), examples()
    assert model.config._attn_implementation == "sdpa"  # the other has a softmax in float32
    wanted = alone(model, items)
    wanted.backward()
    reference = gradients(model)
    batch = collate(Packed.of(items, 24, generator(3))[:], 0)
    loss = add_gradient(model, StepBatches.of(model, [batch]), torch.device("cpu"))
    # transformers' own loss is taken in float32 in any dtype
    assert loss.value == pytest.approx(float(wanted.detach()), rel=1e-10 if lean else 1e-6)
    assert close(gradients(model), reference, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(ALL))
def test_who_cannot_keep_examples_apart_is_refused(name: str, dtype: torch.dtype) -> None:
    model = model_of(name, dtype).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    if name in APART:
        check_packable(model)
    else:
        with pytest.raises(InputError, match=f"packed does not go with {type(model).__name__}: .*length-gr"):
            check_packable(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_whose_positions_do_not_begin_anew_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples do not see each other, but the second stands at other places than alone."""
    model = model_of("gpt2")
    own, length = model.transformer.wpe.forward, iter([7])

    def wrong(places: Tensor) -> Tensor:
        return own(places + (torch.arange(places.shape[1]) > 3 if places.shape[1] > next(length, 99) else 0))

    monkeypatch.setattr(model.transformer.wpe, "forward", wrong)
    with pytest.raises(InputError, match="an example in a row is not what it is alone"):
        check_packable(model)


LORA = {"trainable": "lora", "lora": {"rank": 2, "alpha": 4.0, "targets": None}}
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "lr_schedule": "constant", "local_epochs": 1}
ZEROTH: dict[str, Any] = {"lr": 0.01, "local_steps": 2}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("fedavg", {**SGD, "trainable": "full"}),
    "lora": ("fedavg", {**SGD, **LORA}),
    "lora, scaffold": ("fedavg", {**SGD, **LORA, "control_variates": True}),
    "adapter": ("fedavg", {**SGD, "trainable": "adapter", "adapter": {"size": 3}}),
    "recomputed": ("fedavg", {**SGD, "trainable": "full", "gradient_checkpointing": "full"}),
    "accumulated": ("fedavg", {**SGD, "trainable": "full", "batch_size": 1, "gradient_accumulation": 8}),
    "centralized": ("centralized", {**SGD, "trainable": "full"}),
    "badam": ("badam", {**SGD}),
    "fedcybgd": ("fedcybgd", {**SGD}),
    "fedcybgd, powersgd": ("fedcybgd", {**SGD, "powersgd": {"rank": 2}}),
    "fedkseed": ("fedkseed", {**ZEROTH, "seeds": 8}),
    "infinite-pool": ("infinite-pool", ZEROTH),
}


def change(name: str, batching: Batching) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a round changes of the exported model, and what its client reports."""
    method, settings = METHODS[name]
    config = registry.config_class(method).model_validate({"batch_size": 8, **settings})
    bench = Bench(registry.build(config, 0), model_of("llama"), {0: examples()}, batching=batching)

    def weights() -> dict[str, Tensor]:
        exported = bench.method.export(bench.state, bench.model)
        found = {name: p.detach().double() for name, p in next(exported)[1].named_parameters()}
        for _ in exported:
            pass
        return found

    before = weights()
    outcome = bench.round(1)
    return {n: after - before[n] for n, after in weights().items()}, dict(outcome.metrics[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_round_on_rows_is_a_round_on_their_examples(name: str) -> None:
    """One batch of all eight examples, and one of the four rows that hold them."""
    plain, reported = change(name, Batching())
    packed, of_rows = change(name, Batching("packed", 24))
    assert close(packed, plain, 1e-3 if name in ("fedkseed", "infinite-pool") else 1e-4)
    assert of_rows["train_loss"] == pytest.approx(reported["train_loss"], rel=1e-5)
    times = reported["trained_tokens"] // (sum(ANSWERS) + 2)
    assert of_rows["trained_tokens"] == reported["trained_tokens"] == times * (sum(ANSWERS) + 2)
    if name != "accumulated":  # there each example is a batch, and nothing is padded
        assert (reported["computed_tokens"], reported["padding_tokens"]) == (times * 160, times * 78)
        assert (of_rows["computed_tokens"], of_rows["padding_tokens"]) == (times * 96, times * 14)


@pytest.mark.parametrize("form", ["mean", "rms-normalized"])
def test_alignment_on_rows(form: Any) -> None:
    """Eq. 7 is a mean over tokens in both its terms, whatever row they stand in."""
    student, teacher, items = model_of("llama"), model_of("qwen2"), examples()
    block, other = find_blocks(student).modules[1], find_blocks(teacher).modules[1]

    def loss(rows: Sequence[Encoded]) -> float:
        batch = collate(rows, 0)
        answer = F.pad(batch["labels"][:, 1:] != -100, (0, 1))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad(), entering(other) as seen:
            end = ends(teacher, inputs, answer)
            return float(alignment_loss(student, block, batch, seen[0], end, 0.7, form))

    rows = Packed.of(items, 24, generator(3))
    assert loss(rows[:]) == pytest.approx(loss(items), rel=1e-5)
