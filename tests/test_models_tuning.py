"""Every family: blocks are found, training changes what it should and nothing else, seeds decide the bits."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from model_families import ATTACH, BLOCKS, DECODERS, DTYPES, ENCODERS, FAMILIES, batch, build, wake
from torch import nn

from fedtune.errors import InputError
from fedtune.models.blocks import find_blocks
from fedtune.models.bottleneck import find_bottlenecks, remove_bottlenecks
from fedtune.models.load import meta_model
from fedtune.models.lora import attach_lora
from fedtune.models.tuning import (
    attach_adapter,
    attach_prompt,
    count_parameters,
    train_all,
    trainable,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_find_blocks_finds_the_list_that_the_model_runs(family):
    model = build(family)
    blocks = find_blocks(model)
    assert len(blocks.modules) == BLOCKS
    assert model.get_submodule(blocks.path) is blocks.modules
    runs = []
    for index, block in enumerate(blocks.modules):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    model(**batch(family))
    assert runs == list(range(BLOCKS))


@pytest.mark.parametrize("how", ["lora", "adapter", "prompt", "p-tuning"])
def test_find_blocks_sees_through_wrapping(how):
    model = build("llama")
    inner = find_blocks(model).modules
    wrapped = ATTACH[how](model, 0)
    blocks = find_blocks(wrapped)
    assert blocks.modules is inner
    assert wrapped.get_submodule(blocks.path) is inner


def test_find_blocks_names_what_it_saw():
    with pytest.raises(InputError, match=r"Sequential.*got none.*top-level modules are: 0"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))
    two = nn.Module()
    two.encoder = nn.ModuleList([nn.Linear(2, 2)])
    two.decoder = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(InputError, match=r"encoder \(1\), decoder \(2\)"):
        find_blocks(two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ATTACH)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_changes_exactly_the_trainable_tensors(family, how, dtype):
    model = ATTACH[how](build(family, dtype), 1)
    wake(model)
    parameters = trainable(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    assert (len(frozen) == 0) == (how == "full")

    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    model(**batch(family)).loss.backward()
    optimizer.step()

    expected_dtype = dtype if how == "full" else torch.float32
    for name, parameter in parameters.items():
        assert parameter.dtype == expected_dtype, name
        assert torch.isfinite(parameter).all(), name
        assert parameter.grad is not None and parameter.grad.any(), name
        assert torch.equal(parameter, before[name].add(parameter.grad, alpha=-0.5)), name
        # A key bias shifts all scores of a query alike: in full training its step may round to nothing.
        assert how == "full" or not torch.equal(parameter, before[name]), name
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("how", ["lora", "adapter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_lora_or_adapter_changes_no_bit_of_the_logits(family, dtype, how):
    plain = build(family, dtype)
    with torch.no_grad():
        expected = plain(**batch(family)).logits
        got = ATTACH[how](plain, 5)(**batch(family)).logits
    if family in ENCODERS and dtype == torch.bfloat16:
        torch.testing.assert_close(got, expected.float(), rtol=0.02, atol=0.05)  # the head is float32 now
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("how", ["lora", "adapter", "prompt", "p-tuning"])
def test_the_seed_alone_decides_the_new_parameters(how):
    def draw(seed, disturb):
        torch.manual_seed(disturb)
        state = torch.get_rng_state()
        model = ATTACH[how](build("llama"), seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: p.detach().clone() for name, p in trainable(model).items()}

    first, again, other = draw(1, 10), draw(1, 11), draw(2, 10)
    assert list(first) == list(again) == sorted(first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_canonical_names():
    lora = attach_lora(build("llama"), rank=2, alpha=4, dropout=0.0, targets=["down_proj"], seed=0)
    assert list(trainable(lora)) == [
        f"model.layers.{index}.mlp.down_proj.lora_{part}.weight" for index in range(BLOCKS) for part in "AB"
    ]
    assert list(trainable(attach_prompt(build("llama"), tokens=3, seed=0))) == [
        "prompt_encoder.embedding.weight"
    ]
    adapter = attach_adapter(build("gpt2"), size=3, seed=0)
    assert list(trainable(adapter)) == [
        f"transformer.h.{index}.bottleneck.{part}"
        for index in range(BLOCKS)
        for part in ("down.bias", "down.weight", "up.bias", "up.weight")
    ]
    head = ["classifier.dense.bias", "classifier.dense.weight"]
    head += ["classifier.out_proj.bias", "classifier.out_proj.weight"]
    for how in ("lora", "adapter", "prompt", "p-tuning"):
        assert set(head) <= set(trainable(ATTACH[how](build("roberta"), 0))), how
    full = trainable(train_all(build("llama")))
    assert list(full) == sorted(name for name, _ in build("llama").named_parameters())


def test_counts_and_tied_embeddings():
    model = build("gpt2")  # ties lm_head to wte
    # wte + wpe, per block: two norms, attention in and out, MLP up (4 x 32 wide) and down, and a last norm.
    block = 2 * 64 + (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32)
    base = 64 * 32 + 64 * 32 + BLOCKS * block + 64
    assert count_parameters(train_all(model)) == (base, base)
    names = list(trainable(model))
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    adapter = BLOCKS * (32 * 3 + 3 + 3 * 32 + 32)
    assert count_parameters(attach_adapter(model, size=3, seed=0)) == (base + adapter, adapter)

    bert = build("bert")
    whole = count_parameters(train_all(bert)).total
    lora, head = BLOCKS * 2 * (2 * 32 + 32 * 2), 32 * 3 + 3
    wrapped = ATTACH["lora"](bert, 0)
    assert count_parameters(wrapped) == (whole + lora, lora + head)


def test_lora_starts_at_zero_and_scales_by_alpha_over_rank():
    model = attach_lora(build("llama"), rank=2, alpha=6, dropout=0.0, targets=["q_proj"], seed=0)
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert not layer.lora_B["default"].weight.any()
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(1.0)
    x = torch.ones(1, 1, 32)
    # B A x = 2 ones of rank times 32 ones of x, scaled by 6 / 2.
    torch.testing.assert_close(layer(x) - layer.base_layer(x), torch.full((1, 1, 32), 192.0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unknown_lora_targets_are_refused_with_what_there_is(family):
    model = build(family)
    linear = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}[family]
    with pytest.raises(InputError, match=rf'named "q_prj".*{linear}'):
        attach_lora(model, rank=2, alpha=4, dropout=0.0, targets=["q_prj"], seed=0)
    with pytest.raises(InputError, match="lm_head"):  # outside the blocks
        attach_lora(model, rank=2, alpha=4, dropout=0.0, targets=["lm_head"], seed=0)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_the_bottleneck_sits_after_the_last_linear_layer_and_before_the_residual():
    model = attach_adapter(build("llama"), size=1, seed=0)
    adapter = find_bottlenecks(model)["model.layers.0.bottleneck"]
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    x = torch.ones(1, 1, 48)
    plain = nn.functional.linear(x, layer.weight)
    with torch.no_grad():
        adapter.down.weight.zero_()
        adapter.down.bias.fill_(2.0)
        adapter.up.weight.fill_(0.5)
        adapter.up.bias.fill_(1.0)
    # gelu(2) = 2 * Phi(2) = 1.9544997
    torch.testing.assert_close(layer(x), plain + 1.0 + 0.5 * 1.9544997)


def test_bottlenecks_come_out_without_a_trace_also_from_a_copy():
    model = build("llama")
    expected = model(**batch("llama")).logits
    names = list(dict(model.named_parameters()))
    attach_adapter(model, size=3, seed=0)
    wake(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():  # the copy uses its own adapters
        for parameter in trainable(model).values():
            parameter.zero_()
    assert torch.equal(model(**batch("llama")).logits, expected)
    assert not torch.equal(twin(**batch("llama")).logits, expected)
    for each in (model, twin):
        remove_bottlenecks(each)
        assert torch.equal(each(**batch("llama")).logits, expected)
        assert list(dict(each.named_parameters())) == names


def greedy(model, ids: list[int], new: int) -> list[int]:
    """Greedy decoding by whole forward passes, without cache, padding or position ids."""
    for _ in range(new):
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return ids[-new:]


@pytest.mark.parametrize("how", ["lora", "adapter", "prompt", "p-tuning"])
@pytest.mark.parametrize("family", DECODERS)
def test_cached_generation_of_a_left_padded_batch_equals_plain_decoding(family, how):
    model = ATTACH[how](build(family), 2)
    wake(model)
    model.eval()
    prompts = [[1, 9, 33, 50, 17, 23, 8], [1, 41, 12]]
    width, new = 7, 5
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a name that transformers is about to drop
        expected = [greedy(model, prompt, new) for prompt in prompts]
        got = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None
        )
    assert got[:, -new:].tolist() == expected


@pytest.mark.parametrize("how", ["prompt", "p-tuning"])
def test_a_prompt_carries_no_loss_of_its_own(how):
    model = ATTACH[how](build("llama"), 2).eval()
    data = batch("llama")
    output = model(**data)
    # 4 prompt positions lie before the text. The loss is the mean over the text's own tokens, also the first,
    # which the last prompt position predicts.
    assert output.logits.shape == (2, 4 + 5, 64)
    logprobs = output.logits[:, 3:-1].log_softmax(-1).gather(2, data["input_ids"][..., None])[..., 0]
    wanted = -(logprobs * data["attention_mask"]).sum() / data["attention_mask"].sum()
    torch.testing.assert_close(output.loss, wanted)


@pytest.mark.parametrize("how", ATTACH)
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_everything_attaches_to_a_meta_model_too(tmp_path, family, how):
    FAMILIES[family].save_pretrained(tmp_path)
    task = "classification" if family in ENCODERS else "causal-lm"
    meta = ATTACH[how](meta_model(str(tmp_path), base=tmp_path, task=task, dtype="bfloat16"), 0)
    real = ATTACH[how](build(family, torch.bfloat16), 0)
    assert count_parameters(meta) == count_parameters(real)
    described = {name: (p.shape, p.dtype) for name, p in trainable(real).items()}
    assert {name: (p.shape, p.dtype) for name, p in trainable(meta).items()} == described
    assert {p.device.type for p in trainable(meta).values()} == {"meta"}
