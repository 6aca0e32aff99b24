"""A step's loss is the mean over its trained tokens: by hand, and against examples taken one at a time.

The reference knows nothing of batches: it runs each example alone, without padding, and divides the sum of
the losses of its trained tokens by their number.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from model_families import ATTACH, COMMON, FAMILIES, GROUPED, build
from torch import Tensor, nn
from toy import Bench

import fedtune
from fedtune.core.cohort import RoundOutcome
from fedtune.core.seeds import derive_seed, torch_generator
from fedtune.data.batches import collate, trained_labels
from fedtune.data.encoded import Encoded
from fedtune.methods import registry
from fedtune.methods.step_loss import StepBatches, add_gradient, trained_tokens
from fedtune.models.tuning import trainable

FORMS = ((8, 1), (2, 4), (1, 8))  # batch_size x gradient_accumulation
ANSWERS = (1, 40, 2, 25, 3, 13, 5, 8)  # trained tokens of eight examples
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "lr_schedule": "constant"}
MIXTRAL = transformers.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
BERT = transformers.BertConfig(**COMMON, num_labels=3)
NAMES = ("llama", "gpt2", "opt", "mixtral", "bert")


def quiet(family: str, blocks: int = 2, **changes: Any) -> nn.Module:
    """A tiny model without dropout, whose draws would depend on the batches."""
    config = copy.deepcopy({**FAMILIES, "mixtral": MIXTRAL, "bert": BERT}[family])
    for name, value in config.to_dict().items():
        if "drop" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0 if isinstance(value, float) else value)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, config)
        return build(family, blocks=blocks)


def examples(family: str, answers: Sequence[int] = ANSWERS, first: int = 0) -> list[Encoded]:
    """Four tokens of prompt and an answer each; for BERT, texts of these lengths and a class."""
    generator = torch.Generator().manual_seed(first)
    found = []
    for number, length in enumerate(answers):
        ids = tuple(torch.randint(3, 64, (4 + length,), generator=generator).tolist())
        found.append(Encoded(ids, (number % 3,) if family == "bert" else (-100,) * 4 + ids[4:]))
    return found


def bench(method: str, family: str, form: tuple[int, int], data: Any = None, **settings: Any) -> Bench:
    size, together = form
    blocks = settings.pop("blocks", 3)
    given = {**SGD, "batch_size": size, "gradient_accumulation": together, **settings}
    model = quiet(family, blocks, **given.pop("model", {}))
    config = registry.config_class(method).model_validate(given)
    return Bench(registry.build(config, 0), model, data or {0: examples(family)})


def weights(bench: Bench) -> dict[str, Tensor]:
    exported = bench.method.export(bench.state, bench.model)
    found = {name: p.detach().clone() for name, p in next(exported)[1].named_parameters()}
    for _ in exported:
        pass
    return found


def change(bench: Bench, rounds: int = 1) -> tuple[dict[str, Tensor], RoundOutcome]:
    """What the rounds change of the exported model, and what came of the last."""
    before = weights(bench)
    for round in range(1, rounds + 1):
        outcome = bench.round(round)
    return {name: after - before[name] for name, after in weights(bench).items()}, outcome


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """How far two changes lie apart, against the size of the second."""
    size = math.sqrt(sum(float(d.double().square().sum()) for d in other.values()))
    assert size > 1e-4
    return math.sqrt(sum(float((one[n] - other[n]).double().square().sum()) for n in other)) / size


def one_at_a_time(model: nn.Module, items: Sequence[Encoded]) -> tuple[Tensor, int]:
    """Σ of the trained tokens' losses, and their number."""
    total, count = torch.zeros(()), 0
    for item in items:
        logits = model(input_ids=torch.tensor([item.input_ids])).logits[0]
        if len(item.labels) == 1:
            total, count = total + F.cross_entropy(logits[None], torch.tensor(item.labels)), count + 1
            continue
        guesses, targets = logits[-len(item.labels) :][:-1], torch.tensor(item.labels[1:])
        counted = targets != -100
        total = total + F.cross_entropy(guesses[counted], targets[counted], reduction="sum")
        count += int(counted.sum())
    return total, count


TRAINABLES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"rank": 2, "alpha": 4.0, "targets": None}},
    "adapter": {"adapter": {"size": 3}},
    "prompt": {"prompt": {"tokens": 3}},
    "p-tuning": {"p_tuning": {"tokens": 3, "hidden": 6}},
}
STEP: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("fedavg", {"trainable": name, **own}) for name, own in TRAINABLES.items()},
    "centralized": ("centralized", {"trainable": "full"}),
    "badam": ("badam", {"block_order": "descending"}),
    "badam, all kept": ("badam", {"block_order": "descending", "gradient_checkpointing": False}),
    "fedcybgd": ("fedcybgd", {"block_order": "descending"}),
}
ONE_STEP = [
    *(("llama", name) for name in STEP),
    ("gpt2", "full"),
    ("opt", "lora"),
    ("mixtral", "full"),
    ("mixtral", "fedcybgd"),
    ("bert", "full"),
    ("bert", "badam"),
]


@pytest.mark.parametrize(("family", "name"), ONE_STEP)
def test_a_step_is_that_of_its_tokens_however_it_is_cut(family: str, name: str) -> None:
    """SGD at 0.1: each trained parameter moves by -0.1 times the reference's gradient, in every form."""
    method, settings = STEP[name]
    reference = bench(method, family, (8, 1), **settings).model.train()
    total, count = one_at_a_time(reference, examples(family))
    assert count == (8 if family == "bert" else sum(ANSWERS))
    parameters = [p.requires_grad_() for p in reference.parameters()]
    names = [name for name, _ in reference.named_parameters()]
    found = torch.autograd.grad(total / count, parameters, allow_unused=True)
    gradients = dict(zip(names, found, strict=True))
    for form in FORMS:
        moved, outcome = change(bench(method, family, form, **settings))
        assert outcome.metrics[0]["trained_tokens"] == count
        assert outcome.mean("train_loss") == pytest.approx(total.item() / count, rel=1e-6)
        trained = {n: d for n, d in moved.items() if bool(d.any())}
        assert trained
        wanted = {n: -0.1 * g for n in trained if (g := gradients[n]) is not None}
        assert trained.keys() == wanted.keys()
        # what is read off is a difference of weights, which are rounded to 6e-8 of themselves
        assert apart(trained, wanted) < 2e-5


MORE: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "fedprox": ("fedavg", "gpt2", 1, {"trainable": "full", "local_epochs": 3, "proximal": 5.0}),
    "clipped": ("fedavg", "llama", 1, {"trainable": "full", "local_epochs": 2, "max_grad_norm": 1.0}),
    "decayed": ("fedavg", "llama", 1, {"trainable": "full", "local_epochs": 2, "weight_decay": 0.5}),
    "scaffold": ("fedavg", "llama", 2, {"trainable": "full", "control_variates": True}),
    "fedadam": ("fedavg", "opt", 2, {"trainable": "lora", "server_optimizer": {"name": "adam", "lr": 0.1}}),
    "stack": ("fedavg", "llama", 2, {"trainable": "lora", "aggregation": "stack"}),
    "one-shot": ("fedavg", "llama", 1, {"trainable": "lora", "rounds": 1, "arrival": "asynchronous"}),
    "powersgd": ("fedcybgd", "llama", 2, {"powersgd": {"rank": 4}}),
    "layer-drop": ("fedcybgd", "llama", 2, {"compression": "layer-drop", "blocks": 4}),
    "hybrid": ("fedcybgd", "llama", 2, {"compression": "hybrid", "blocks": 4}),
    "two blocks": ("fedcybgd", "bert", 1, {"blocks_per_client": 2}),
    "fedbavg": ("fedbavg", "llama", 1, {}),
    "standalone": ("standalone", "llama", 1, {"trainable": "lora"}),
}
EMULATED: dict[str, Any] = {
    "blocks": 6,
    "adapter_layers": 1,
    "layer_dropout": 0.4,
    "lora": {"rank": 2, "alpha": 4.0},
    "alignment": {"steps_before": 0, "steps": 0},
    "betas": [0.9, 0.999],
    "local_epochs": 3,
}
for _name in ("fedbiot", "fedot", "offsite-tuning"):
    _ends = {} if _name == "fedbiot" else {"adapter_layers": 2}
    MORE[_name] = (_name, "llama", 1, {**EMULATED, **_ends, "proximal": 0.5})


@pytest.mark.parametrize("name", MORE)
def test_every_method_takes_the_same_steps_in_every_form(name: str) -> None:
    """Two clients; terms of the weights alone, clipping and filters come once a step."""
    method, family, rounds, settings = MORE[name]
    data = {0: examples(family, (1, 20, 3, 8)), 1: examples(family, (7, 1), 1)}
    if registry.build(registry.config_class(method).model_validate({}), 0).pools_data:
        data = {0: [*data[0], *data[1]]}
    ends = []
    for form in ((8, 1), (1, 8)):
        ends.append(change(bench(method, family, form, data, **settings), rounds))
    (wanted, whole), (moved, outcome) = ends
    assert apart(moved, wanted) < 2e-5
    assert outcome.mean("train_loss") == pytest.approx(whole.mean("train_loss"), rel=1e-5)
    for client, metrics in whole.metrics.items():
        for name in ("steps", "trained_tokens"):
            assert outcome.metrics[client][name] == metrics[name]


def test_the_last_step_of_an_epoch_is_the_mean_over_what_is_left() -> None:
    """Seven examples: steps of four and three, twice, cut into batches of four, of two (2 + 1) and of one."""
    data = {0: examples("gpt2", ANSWERS[:7])}
    ends = []
    for form in ((4, 1), (2, 2), (1, 4)):
        run = bench("fedavg", "gpt2", form, data, trainable="full", local_epochs=2)
        ends.append(change(run))
    (wanted, whole), *others = ends
    assert whole.metrics[0]["steps"] == 4 and whole.metrics[0]["trained_tokens"] == 2 * sum(ANSWERS[:7])
    assert all(apart(moved, wanted) < 2e-5 for moved, _ in others)
    assert all(outcome.metrics[0]["trained_tokens"] == 178 for _, outcome in others)


def test_equal_lengths_keep_the_bits_of_a_mean_of_means() -> None:
    """Three batches of two examples with five trained tokens each; before, their losses were divided by 3."""
    data = [examples("llama", (5, 5), first)[k] for first in range(3) for k in range(2)]
    run = bench("centralized", "llama", (2, 3), {0: data}, trainable="full")
    model = quiet("llama", 3)
    order = torch.randperm(6, generator=_batches(run)).tolist()
    for at in (0, 2, 4):
        ids = torch.tensor([data[i].input_ids for i in order[at : at + 2]])
        labels = torch.tensor([data[i].labels for i in order[at : at + 2]])
        (model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss / 3).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    run.round(1)
    after = weights(run)
    assert all(torch.equal(after[name], p) for name, p in model.named_parameters())


def _batches(run: Bench) -> torch.Generator:
    return torch_generator(derive_seed(0, "client", 0, 1), "batches")


# By hand: two words, of which a model gives the first with probability 3/4 at first, whatever came before


class TwoWords(nn.Module):
    """Logits (w, 0) at every position, and the usual loss."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([math.log(3.0)]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = torch.stack([self.w, torch.zeros(1)], 1).expand(*labels.shape, 2)
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


SHORT = Encoded((7, 0), (-100, 0))  # an answer of one token, the first word: loss ln 4/3, slope -1/4
LONG = Encoded((7, 1, 1, 1), (-100, 1, 1, 1))  # one of three, the second word: loss ln 4, slope 3/4
CUT = Encoded((7, 5), (-100, -100))  # nothing is left of its answer
BY_TOKENS = (math.log(4 / 3) + 3 * math.log(4)) / 4
HAND: dict[str, Any] = {"trainable": "full", **SGD, "lr": 1.0}


def by_hand(method: str, data: dict[int, list[Encoded]], **settings: Any) -> Bench:
    given = HAND if method in ("fedavg", "standalone", "centralized") else {}
    config = registry.config_class(method).model_validate({**given, **settings})
    return Bench(registry.build(config, 0), TwoWords(), data)


@pytest.mark.parametrize(("size", "together"), [(2, 1), (1, 2)])
def test_answers_of_one_and_three_tokens_by_hand(size: int, together: int) -> None:
    run = by_hand("fedavg", {0: [SHORT, LONG]}, batch_size=size, gradient_accumulation=together)
    outcome = run.round(1)
    # slope (-1/4 + 3 · 3/4) / 4 = 1/2; a mean of means has (-1/4 + 3/4) / 2 = 1/4
    assert run.state.weights["w"].item() == pytest.approx(math.log(3) - 0.5, abs=1e-6)
    assert outcome.metrics[0]["train_loss"] == pytest.approx(BY_TOKENS, abs=1e-6)
    assert outcome.metrics[0]["trained_tokens"] == 4


def test_a_penalty_and_clipping_come_once_a_step_by_hand() -> None:
    settings = {"batch_size": 1, "gradient_accumulation": 2, "local_epochs": 2, "proximal": 0.5}
    run = by_hand("fedavg", {0: [SHORT, LONG]}, **settings, max_grad_norm=0.25)
    run.round(1)
    # first step: slope 1/2, cut to 1/4: w = ln 3 - 1/4, which gives the first word with probability p
    p = 1 / (1 + math.exp(-(math.log(3) - 0.25)))
    slope = (4 * p - 1) / 4 + 0.5 * -0.25  # second: (-(1 - p) + 3 p) / 4 and the pull μ (w - w(t))
    assert slope > 0.25  # cut again; torch divides by the norm and a millionth
    assert run.state.weights["w"].item() == pytest.approx(math.log(3) - 0.5, abs=1e-5)
    run = by_hand("fedavg", {0: [SHORT, LONG]}, **settings, max_grad_norm=9.0)
    run.round(1)
    p = 1 / (1 + math.exp(-(math.log(3) - 0.5)))
    slope = (4 * p - 1) / 4 + 0.5 * -0.5
    assert run.state.weights["w"].item() == pytest.approx(math.log(3) - 0.5 - slope, abs=1e-6)


ZEROTH = {"local_steps": 2, "lr": 1e-6, "epsilon": 1e-4, "batch_size": 1}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "steps": ("fedavg", {"batch_size": 1, "lr": 1e-6}),
    "fedkseed": ("fedkseed", {**ZEROTH, "seeds": 8}),
    "fedkseed, twice": ("fedkseed", {**ZEROTH, "seeds": 8, "perturbations": 2}),
    "infinite-pool": ("infinite-pool", ZEROTH),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_clients_loss_is_the_mean_over_the_tokens_of_its_steps(name: str) -> None:
    """Two steps of one example each: of one trained token and of three."""
    method, settings = LOSSES[name]
    outcome = by_hand(method, {0: [SHORT, LONG]}, **settings).round(1)
    assert outcome.metrics[0]["train_loss"] == pytest.approx(BY_TOKENS, abs=2e-5)
    assert outcome.metrics[0]["trained_tokens"] == 4


def test_a_rounds_loss_is_the_mean_over_the_tokens_of_its_clients() -> None:
    """Clients of one and three tokens, and of three examples and one: the model's mean stays by examples."""
    run = by_hand("fedavg", {0: [SHORT, CUT, CUT], 1: [LONG]})
    outcome = run.round(1)
    assert outcome.mean("train_loss") == pytest.approx(BY_TOKENS, abs=1e-6)
    assert outcome.mean("trained_tokens") == (3 * 1 + 1 * 3) / 4  # any other metric's is by examples
    # client 0: ln 3 + 1/4; client 1: ln 3 - 3/4; weighted 3 : 1 by examples, as the paper has it
    assert run.state.weights["w"].item() == pytest.approx(math.log(3), abs=1e-6)


def test_a_method_that_does_not_count_its_tokens_has_its_losses_weighted_by_examples() -> None:
    outcome = RoundOutcome(1, (0, 1), [0, 1], {}, {}, {0: 3, 1: 1})
    outcome.metrics = {0: {"train_loss": 1.0}, 1: {"train_loss": 5.0, "trained_tokens": 9.0}}
    assert outcome.mean("train_loss") == (3 * 1.0 + 1 * 5.0) / 4
    outcome.metrics[0] = {"train_loss": 1.0, "trained_tokens": 1.0}
    assert outcome.mean("train_loss") == (1 * 1.0 + 9 * 5.0) / 10
    outcome.metrics = {0: {"trained_tokens": 0.0}, 1: {"trained_tokens": 0.0}}
    assert outcome.mean("train_loss") is None


# What has nothing to train


@pytest.mark.parametrize("method", ["fedavg", "fedkseed", "infinite-pool"])
def test_a_batch_without_a_trained_token_counts_nothing(method: str) -> None:
    settings = {"fedavg": {"batch_size": 1}, "fedkseed": {**ZEROTH, "seeds": 8}, "infinite-pool": ZEROTH}
    outcome = by_hand(method, {0: [LONG, CUT]}, **settings[method]).round(1)
    assert outcome.left_out == {}
    assert outcome.metrics[0]["train_loss"] == pytest.approx(math.log(4), abs=2e-5)
    assert outcome.metrics[0]["trained_tokens"] == 3


WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("llama", {"trainable": "lora"}),
    "centralized": ("llama", {"trainable": "prompt"}),
    "badam": ("gpt2", {}),
    "fedcybgd": ("llama", {"compression": "hybrid", "blocks": 4, "optimizer": "adamw"}),
    "fedbiot": ("llama", EMULATED),
    "fedkseed": ("llama", {"local_steps": 4, "seeds": 8}),
}


@pytest.mark.parametrize("method", WHOLE)
def test_a_client_goes_on_without_what_cannot_be_trained_and_is_named_where_that_is_all(method: str) -> None:
    """A client with one example of two trains it; one that has nothing but such a one is left out."""
    family, settings = WHOLE[method]
    given = {k: v for k, v in {**SGD, **settings, "batch_size": 1}.items() if k not in ("model", "blocks")}
    if method == "fedkseed":
        given = {"batch_size": 1, **settings}
    config = registry.config_class(method).model_validate(given)
    nothing = Encoded((5, 6, 7, 8), (-100,) * 4)
    data = {0: [examples(family, (5,))[0], nothing], 1: [nothing, nothing]}
    if registry.build(config, 0).pools_data:
        del data[1]
    run = Bench(registry.build(config, 0), quiet(family, settings.get("blocks", 3)), data)
    outcome = run.round(1, quorum=1)
    assert outcome.clients == [0]
    assert math.isfinite(outcome.metrics[0]["train_loss"])
    assert outcome.metrics[0]["trained_tokens"] % 5 == 0
    assert all("none of its 2 examples has a token to train" in why for why in outcome.left_out.values())
    assert list(outcome.left_out) == ([1] if 1 in data else [])
    assert all(bool(tensor.isfinite().all()) for tensor in weights(run).values())


def test_labels_that_carry_loss_are_counted_alike_on_both_sides() -> None:
    rows = [(-100, -100, 4), (9, -100, 4), (-100, -100, -100), (1, 2, 3)]
    assert [Encoded(row, row).trained for row in rows] == [1, 1, 0, 2]
    assert [trained_labels(torch.tensor([row])) for row in rows] == [1, 1, 0, 2]
    # behind a soft prompt the first token is predicted as well
    assert trained_labels(torch.tensor(rows), first=True) == 1 + 2 + 0 + 3
    assert Encoded((1, 2), (0,)).trained == 1
    assert trained_labels(torch.tensor([[0], [2]])) == trained_labels(torch.tensor([0, 2])) == 2
    assert trained_labels(torch.tensor([[-100]])) == 0


def test_behind_a_soft_prompt_the_first_token_counts_where_it_has_a_label() -> None:
    data = {0: [Encoded(e.input_ids, e.input_ids) for e in examples("llama", (1, 9, 3, 1))]}
    (wanted, whole), (moved, outcome) = (
        change(bench("fedavg", "llama", form, data, trainable="prompt", prompt={"tokens": 3}))
        for form in ((4, 1), (1, 4))
    )
    assert whole.metrics[0]["trained_tokens"] == outcome.metrics[0]["trained_tokens"] == 4 * 4 + 14
    assert apart(moved, wanted) < 2e-5


# What a model adds to its loss by itself


def test_a_routers_balance_counts_once_a_step_as_the_mean_over_the_batches_tokens() -> None:
    """Its loss is of a batch as a whole, so that no cut gives another's; each batch counts by its tokens."""
    routed = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    items = examples("mixtral")
    for size, together in ((8, 1), (2, 4)):
        model = quiet("mixtral", 3, **routed).train()
        run = bench("fedavg", "mixtral", (size, together), trainable="full", model=routed)
        order = torch.randperm(8, generator=_batches(run)).tolist()
        total = torch.zeros(())
        for at in range(0, 8, size):
            part = [items[i] for i in order[at : at + size]]
            tokens, count = one_at_a_time(model, part)
            width = max(len(item.input_ids) for item in part)
            rows = [(*item.input_ids, *[0] * (width - len(item.input_ids))) for item in part]
            mask = [[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in part]
            balance = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask)).aux_loss
            total = total + (tokens + count * 0.7 * balance) / sum(ANSWERS)
        total.backward()
        moved, outcome = change(run)
        wanted = {n: -0.1 * p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert apart(moved, wanted) < 2e-5
        assert outcome.mean("train_loss") == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("name", TRAINABLES)
def test_the_gradient_itself_is_the_same_to_a_millionth(family: str, name: str) -> None:
    """In float64, but for the loss, which transformers takes in float32."""
    settings = {"trainable": name, **TRAINABLES[name]}
    config = registry.config_class("fedavg").model_validate(settings)
    model = registry.build(config, 0).client_model(lambda: quiet(family)).double().train()
    parameters, items = trainable(model), examples(family)
    total, count = one_at_a_time(model, items)
    wanted = torch.autograd.grad(total / count, list(parameters.values()))
    for size in (8, 3, 1):
        for parameter in parameters.values():
            parameter.grad = None
        batches = [collate(items[at : at + size], 0) for at in range(0, 8, size)]
        loss = add_gradient(model, StepBatches.of(model, batches), torch.device("cpu"))
        assert loss.tokens == count and loss.value == pytest.approx(total.item() / count, rel=1e-6)
        found = [p.grad for p in parameters.values() if p.grad is not None]
        apart_by = sum(float((g - w).square().sum()) for g, w in zip(found, wanted, strict=True))
        assert math.sqrt(apart_by) < 1e-6 * math.sqrt(sum(float(w.square().sum()) for w in wanted))


def test_a_run_is_the_same_however_its_steps_are_cut(tmp_path: Path) -> None:
    """From rows to summary: answers of one to six words, in steps of one batch of six or of six batches."""
    rows = [{"instruction": f"Count to {n}.", "output": " ".join("123456"[:n])} for n in range(1, 7)]
    config: dict[str, Any] = {"data": {"clients": 1, "template": "plain", "max_length": 64}}
    config["evaluation"] = {"tasks": ["loss"], "bootstrap": 0, "max_examples": 8}
    config["data"]["holdout"] = {"source": "bundled"}
    ends = []
    for size, together in ((6, 1), (1, 6)):
        settings = {**SGD, "rounds": 2, "batch_size": size, "gradient_accumulation": together}
        config["method"] = {"name": "fedavg", "trainable": "full", **settings}
        ends.append(fedtune.run(config, data=rows, out=tmp_path / f"{size}", progress=False))
    whole, cut = (
        [(e["train_loss"], e["eval"]["loss"]["loss"]) for e in run.rounds if e["clients"]] for run in ends
    )
    assert len(whole) == 2 and whole[0] != whole[1]
    for one, other in zip(whole, cut, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
    assert ends[0].summary["train_loss"] == whole[1][0]


@pytest.mark.parametrize(
    ("how", "tokens"), [("full", 2), ("lora", 2), ("adapter", 2), ("prompt", 3), ("p-tuning", 3)]
)
def test_the_first_label_counts_behind_a_soft_prompt_alone(how: str, tokens: int) -> None:
    model = ATTACH[how](build("llama"), 3)
    assert trained_tokens(model, {"labels": torch.tensor([[5, 6, 7]])}) == tokens
