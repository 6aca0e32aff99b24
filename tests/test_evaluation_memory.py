"""Evaluation within its memory: the numbers of whole logits, which never exist, in batches that fit."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from answering_models import MODELS
from answering_models import tokenizer as words
from model_families import ATTACH, DECODERS, ENCODERS, FAMILIES, GROUPED, TOKENS, batch, build, wake
from torch import nn

from fedtune.bench import evaluation as bench
from fedtune.config.file import parse_config
from fedtune.data.batches import collate
from fedtune.data.encoded import IGNORED, Encoded
from fedtune.data.examples import Example
from fedtune.errors import InputError
from fedtune.evaluation import harness_names
from fedtune.evaluation import peaks as peaks_module
from fedtune.evaluation.batches import Room, answering_room, cut, head_rows, scoring_room
from fedtune.evaluation.generation import generate_ids
from fedtune.evaluation.likelihoods import class_losses, example_losses, likelihoods, token_losses
from fedtune.evaluation.peaks import Peaks
from fedtune.evaluation.tasks import score
from fedtune.evaluation.types import EvalSettings
from fedtune.measure.memory import MemoryMeter
from fedtune.models import lean_loss
from fedtune.planning.plan import plan


def test_batches_by_hand() -> None:
    lengths = [3, 5, 2, 5, 3]
    assert list(cut(lengths, 2, None)) == [[1, 3], [0, 4], [2]]  # longest first, equal ones in their order
    assert list(cut([], 2, None)) == []
    # 80 bytes, of which each token takes 5: 3 examples of 5 tokens, 5 of 3
    room = Room(80, lambda tokens: 5.0 * tokens)
    assert list(cut(lengths, 9, room)) == [[1, 3, 0], [4, 2]]
    assert list(cut(lengths, 2, room)) == [[1, 3], [0, 4], [2]]
    assert room.largest([[1, 3, 0], [4, 2]], lengths) == [1, 3, 0] and room.largest([], lengths) == []
    # where nothing fits one is tried
    assert list(cut(lengths, 9, Room(80, lambda tokens: 81.0))) == [[1], [3], [0], [4], [2]]


def whole(model: nn.Module, rows: dict[str, torch.Tensor]) -> list[list[float]]:
    """Losses of each row's labelled tokens from logits of all positions, in float64."""
    inputs = {key: value for key, value in rows.items() if key != "labels"}
    labels = rows["labels"]
    logs = model(**inputs).logits[:, -labels.shape[1] :].double().log_softmax(-1)
    return [
        [-float(logs[row, at - 1, word]) for at, word in enumerate(line) if at and word != IGNORED]
        for row, line in enumerate(labels.tolist())
    ]


@pytest.mark.parametrize("how", ["full", "lora", "prompt"])
@pytest.mark.parametrize("family", DECODERS)
def test_losses_are_those_of_whole_logits(family: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_loss, "FEW", 0)
    for dtype, within in ((torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
        model = ATTACH[how](build(family, dtype), 0).to(dtype).eval()
        wake(model)
        rows = batch(family)
        rows["labels"][0, 2] = IGNORED
        with torch.no_grad():
            wanted = whole(model, rows)
            sums, counts = token_losses(model, rows, 2)
        assert counts == [3, 2] == [len(each) for each in wanted]
        assert sums == pytest.approx([sum(each) for each in wanted], rel=within)


def test_examples_without_a_label() -> None:
    rows = batch("llama")
    rows["labels"][1] = IGNORED
    with torch.no_grad():
        sums, counts = token_losses(build("llama"), rows, 2)
        assert (sums[1], counts) == (0.0, [4, 0])
        rows["labels"][0] = IGNORED
        assert token_losses(build("llama"), rows, 2) == ([0.0, 0.0], [0, 0])


def test_a_body_that_is_not_asked_and_a_model_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("llama", torch.float64)

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    monkeypatch.setattr(lean_loss, "FEW", 0)
    with torch.no_grad():
        wanted = [sum(each) for each in whole(build("llama", torch.float64), batch("llama"))]
        assert token_losses(Own().eval(), batch("llama"), 2)[0] == pytest.approx(wanted, rel=1e-13)
        itself = build("llama", torch.float64)
        monkeypatch.setattr(itself, "get_decoder", lambda: itself)
        assert token_losses(itself, batch("llama"), 2)[0] == pytest.approx(wanted, rel=1e-13)


EXAMPLES = [
    Example("w3 w4 w5", "", "w6 w7"),
    Example("w8 w9", "w10 w11 w12", "w13"),
    Example("w14", "", "w15 w16 w17 w18"),
    Example("w19 w20 w21 w22 w23", "", "w24 w25"),
    Example("w26 w27", "", "w28"),
]


@pytest.mark.parametrize("name", MODELS)
def test_scores_do_not_depend_on_memory(name: str) -> None:
    """A batch each, and all together: each example has its own loss and answer, in its place."""
    model = MODELS[name]()
    found = [
        score(
            model,
            words(),
            EXAMPLES,
            ["loss", "accuracy"],
            EvalSettings("plain", "response", 64, memory=memory, max_new_tokens=5),
        )
        for memory in (1, 2 * 10**9)
    ]
    alone, together = (each["loss"].metrics["loss"] for each in found)
    assert list(alone.items) == pytest.approx(list(together.items), rel=1e-5)
    assert alone.weights == together.weights and len(set(alone.items)) == len(EXAMPLES)
    assert found[0]["accuracy"].metrics["accuracy"].items == found[1]["accuracy"].metrics["accuracy"].items


def wide(words: int = 8192) -> nn.Module:
    config = transformers.LlamaConfig(**{**GROUPED, "vocab_size": words, "hidden_size": 8, "head_dim": 2})
    return transformers.LlamaForCausalLM(config).eval()


def items(count: int, tokens: int) -> list[Encoded]:
    return [Encoded(tuple(range(3, 3 + tokens)), (IGNORED, *range(4, 3 + tokens)))] * count


def peak(model: nn.Module, work: Any) -> int:
    """The most that tensors take beside the weights, in bytes."""
    meter = MemoryMeter("cpu")
    with torch.no_grad(), meter.whole([model]):
        work()
    return meter.peak_bytes - sum(p.numel() * p.element_size() for p in model.parameters())


def test_no_whole_logits_exist() -> None:
    """8 examples of 32 tokens and 8192 words: 8.4 MB of logits, of which the usual loop holds two or more."""
    model = wide()
    logits, memory = 8 * 32 * 8192 * 4, 2 * 10**6

    def losses(batches: int, memory: int) -> int:
        given = items(8 * batches, 32)
        return peak(model, lambda: example_losses(model, given, batch_size=8, memory=memory, pad_id=0))

    assert losses(1, memory) < memory < logits / 4
    assert losses(3, memory) == losses(1, memory)
    assert losses(1, 2 * 10**9) < 2.1 * logits  # all of it at once, and its logarithms
    assert head_rows(model, memory) == 5  # a quarter of 2 MB, for 12 bytes a logit
    texts = [[(4, [7, 9]), (10, [5])]] * 8
    ids = torch.arange(32).repeat(8, 1)
    assert peak(model, lambda: likelihoods(model, ids, texts, 5)) < memory


def test_whole_logits_of_a_family_that_has_no_other_are_gone_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = wide()
    monkeypatch.setattr(model, "get_decoder", lambda: model)
    once, thrice = (
        peak(
            model,
            lambda n=n: example_losses(model, items(n, 32), batch_size=8, memory=2 * 10**9, pad_id=0),
        )
        for n in (8, 24)
    )
    assert once == thrice
    assert scoring_room(model, 10**7).rows(32) < 8  # they count


@pytest.mark.parametrize("kind", ["losses", "classes"])
def test_no_keys_and_values_are_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_loss, "FEW", 0)
    config = transformers.LlamaConfig(**GROUPED, num_labels=3)
    auto = transformers.LlamaForCausalLM if kind == "losses" else transformers.LlamaForSequenceClassification
    model, seen = auto(config).eval(), []
    model.model.register_forward_hook(lambda module, given, out: seen.append(out.past_key_values))
    rows = batch("llama") if kind == "losses" else batch("roberta")
    with torch.no_grad():
        model(**{key: value for key, value in rows.items() if key != "labels"})
        _ = token_losses(model, rows, 2) if kind == "losses" else class_losses(model, rows)
    assert seen.pop(0) is not None and seen and not any(seen)
    assert model.config.use_cache


def larger(family: str, dtype: torch.dtype) -> Any:
    """The family with a width of 128, eight heads and an ordinary size of everything else."""
    config = copy.deepcopy(FAMILIES[family])
    sizes = {"hidden_size": 128, "n_embd": 128, "intermediate_size": 352, "ffn_dim": 512, "head_dim": 16}
    sizes |= {"num_attention_heads": 8, "n_head": 8, "word_embed_proj_dim": 128, "vocab_size": 600}
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    causal = transformers.AutoModelForCausalLM
    auto = transformers.AutoModelForSequenceClassification if family in ENCODERS else causal
    return auto.from_config(config, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_takes_what_is_thought(family: str, dtype: torch.dtype) -> None:
    """Never more, and a third of it at least: beside the weights, with padding, so that there is a mask."""
    model, classes = larger(family, dtype), family in ENCODERS
    given = [*items(3, 48), *items(1, 40)]
    given = [Encoded(item.input_ids, (1,)) for item in given] if classes else given
    rows, thought = collate(given, 0), 4 * scoring_room(model, 1).row(48)
    took = peak(model, lambda: class_losses(model, rows) if classes else token_losses(model, rows, 8))
    assert thought / 3 < took <= thought


def test_a_mixture_of_experts_and_a_model_without_attention() -> None:
    shape = {**GROUPED, "hidden_size": 128, "head_dim": 16, "num_attention_heads": 8, "vocab_size": 600}
    mixture = transformers.MixtralConfig(
        **{**shape, "intermediate_size": 352}, num_local_experts=4, num_experts_per_tok=2
    )
    state = transformers.MambaConfig(
        vocab_size=600, hidden_size=128, num_hidden_layers=2, state_size=8, **TOKENS
    )
    for config in (mixture, state):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        took = peak(model, lambda m=model: token_losses(m, collate(items(4, 48), 0), 8))
        assert took <= 4 * scoring_room(model, 1).row(48)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt"])
def test_answers_take_what_is_thought(family: str) -> None:
    model, new = larger(family, torch.float32), 12
    model.generation_config.eos_token_id = None
    prompts = [list(range(3, 43))] * 3 + [list(range(3, 33))]
    endless: Any = words()
    endless.eos_token = None
    room = answering_room(model, 10**9, new, whole=False, drawn=False)
    took = peak(
        model, lambda: generate_ids(model, endless, prompts, max_new_tokens=new, batch_size=4, memory=10**9)
    )
    assert 4 * room.row(40) / 4 < took <= 4 * room.row(40)
    # less room, smaller batches, the same answers
    few = generate_ids(
        model, endless, prompts, max_new_tokens=new, batch_size=4, memory=int(2 * room.row(40))
    )
    assert few == generate_ids(model, endless, prompts, max_new_tokens=new, batch_size=4)


def test_likelihoods_are_the_harnesss() -> None:
    """Options of one token that share what is read, of several tokens, and one that is the likeliest."""
    if not harness_names.installed():
        pytest.skip("needs the extra eval")
    from fedtune.evaluation.harness import plain_likelihoods

    model = build("llama")
    before = [[1, 9, 33], [1, 5, 6, 7, 8, 9, 10, 11], [1, 40]]
    with torch.no_grad():
        best = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in before]
        options = [[[best[0]], [7], [9]], [[best[1], 8, 9], [12]], [[30, 31], [30, 32]]]
        asked = [(ids, option) for ids, each in zip(before, options, strict=True) for option in each]
        theirs = plain_likelihoods(model, words(), asked, batch_size=2)
        ids = torch.tensor([[1, 9, 33] + [0] * 7, [*before[1], best[1], 8], [1, 40, 30] + [0] * 7])
        texts = [[(len(b) - 1, option) for option in each] for b, each in zip(before, options, strict=True)]
        for rows in (1, 3, 256):
            ours = [pair for each in likelihoods(model, ids, texts, rows) for pair in each]
            assert [log for log, _ in ours] == pytest.approx(theirs, rel=1e-5)
            assert [likeliest for _, likeliest in ours][:3] == [True, False, False]


def test_only_larger_batches_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        def __init__(self, device: Any) -> None:
            self.device, self.peak_bytes, self.how = torch.device(device), 0, "counted"

        @contextmanager
        def whole(self, resident: Any) -> Any:
            followed.append(resident)
            yield

    followed: list[Any] = []
    monkeypatch.setattr(peaks_module, "MemoryMeter", Meter)
    small, large = nn.Linear(2, 2), nn.Linear(3, 3)
    counts = []
    for device in ("cpu", "cuda"):
        peaks = Peaks(torch.device(device))
        steps = [
            ("loss", 4, 5, small),
            ("loss", 5, 4, small),
            ("loss", 5, 5, small),
            ("answers", 1, 1, small),
        ]
        for kind, rows, tokens, model in [*steps, ("loss", 1, 1, large)]:
            with peaks.batch(kind, rows, tokens, model):
                pass
        counts.append(len(followed))
        followed.clear()
    assert counts == [4, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lots", r"evaluation\.memory: a size must be a number with a unit \(B, kB, .*got 'lots'"),
        (2000, r"evaluation\.memory: a size needs a unit, one of B, kB, .*got '2000'"),
        ("2GG", r"evaluation\.memory: a size: unit 'GG' is not known.*mean \"GB\"\?"),
        ("0GB", r"evaluation\.memory: a size must be above zero, got '0GB'"),
    ],
)
def test_a_memory_that_is_none(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_config({"method": {"name": "fedavg"}, "evaluation": {"memory": given}}, "test")


def test_a_plan_keeps_to_the_memory(tmp_path: Path) -> None:
    """64 examples of 512 tokens and 151,936 words, of which all logits are 19.9 GB."""
    config = transformers.LlamaConfig(**{**GROUPED, "vocab_size": 151936, "max_position_embeddings": 512})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    document: dict[str, Any] = {
        "model": {"name": str(tmp_path)},
        "data": {"train": "owner/not-here", "clients": 2, "max_length": 512, "holdout": {"fraction": 0.1}},
        "method": {"name": "zero-shot"},
    }
    for memory, least in (("2GB", 2e8), ("100MB", 1e7)):
        found = plan(parse_config(document | {"evaluation": {"memory": memory}}, "test")).document
        parts = found["evaluation_peak_memory_bytes"]
        assert least < parts["total"] - parts["weights"] < {"2GB": 2e9, "100MB": 1e8}[memory]
        assert parts["gradients"] == parts["optimizer"] == 0


def test_the_bench_finds_the_same_losses_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(bench, "SHAPES", {"tiny": shape})
    monkeypatch.setattr(bench, "REPEATS", 1)
    rows, ratios = bench.measure(["tiny"], 8)
    assert [row["case"] for row in rows][:3] == [
        "tiny: as written",
        "tiny: the model's own loss",
        "tiny: fedtune",
    ]
    assert ratios["peak_bytes: tiny: fedtune / as written"] < 0.4
    assert set(ratios) == {
        f"{key}: {row['case']} / as written" for key in ("cpu_seconds", "peak_bytes") for row in rows[1:]
    }
