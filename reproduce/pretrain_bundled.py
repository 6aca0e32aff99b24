"""Pre-train the bundled model from nothing: corpus, tokenizer and weights, all from one seed, on a CPU.

    nice -n 5 python reproduce/pretrain_bundled.py [--steps 3400] [--out fedtune/models/bundled]
    python reproduce/pretrain_bundled.py --evaluate   # zero-shot accuracy of the weights in --out
    python reproduce/pretrain_bundled.py --width 32 --layers 2 --steps 600 --out runs/32x2   # another size

The corpus teaches the prompt format and part of what the instruction set asks: some skills in the same
wording, some only in other words or easier ranges, two not as tasks at all. None of its tasks is one of the
instruction set's (``make_bundled_data.instance``). The same machine and thread count give the same weights;
another CPU may round otherwise.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from make_bundled_data import (
    CLASS_OF,
    LETTERS,
    OPPOSITE,
    SEED,
    SKILLS,
    WORDS,
    Instance,
    instance,
    instruction_set,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedtune.data.examples import Example
from fedtune.evaluation.tasks import evaluate as evaluate_tasks
from fedtune.evaluation.types import EvalSettings

OUT = Path(__file__).resolve().parent.parent / "fedtune" / "models" / "bundled"
VOCABULARY = 768  # at most; the corpus has words for fewer
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
WIDTH, LAYERS, HEAD = 128, 4, 32  # the bundled model; HEAD is the width of one attention head
BATCH = 64  # documents
CHUNK = 64  # batches whose documents are sorted by length together, so that little is padded
MUON_LR, ADAMW_LR = 0.02, 3e-3  # peaks: matrices of the blocks; embedding and norms
WARM_UP = 200  # steps
# Weights of tokens in the loss, beside 1 for a response: most of a prompt is random and cannot be predicted.
PROMPT_WEIGHT, PLAIN_WEIGHT = 0.1, 0.3

Document = tuple[str, str]  # prompt, response; plain text has an empty prompt

# (share, skill, wordings, sizes). The first three are taught as the instruction set asks them.
TASKS: tuple[tuple[float, str, tuple[str, ...], tuple[int, ...]], ...] = (
    (1.0, "last", (*SKILLS["last"].wordings, "Give the final word."), (2, 3, 4, 5, 6)),
    (2.0, "lookup", SKILLS["lookup"].wordings, (2, 3, 4)),
    (1.5, "largest", ("Which number is the largest?", "Name the maximum."), (20, 50, 99)),
    (1.5, "pick", ("Which word is {}?", "Which of them is {}?"), (2, 3, 4)),
    (1.0, "count", ("How many words are there?", "Give the length of the list."), (1, 2, 3, 4, 5)),
    (2.0, "add", ("Add the numbers.", "Give the total."), (20, 40)),
    (2.0, "reverse", ("Reverse the letters.", "Write the letters backwards."), (2, 3, 4)),
    (1.5, "sort", ("Write the letters from a to z.",), (2, 3, 4)),
)
TASK_SHARE = 0.85  # of the documents; the rest is plain text


def _distractor(rng: random.Random) -> Document:
    """Tasks the instruction set does not have, so that the instruction must be read."""
    kind = rng.randrange(4)
    if kind == 0:
        words = rng.sample(WORDS, rng.randint(2, 6))
        return _prompt("Name the first word of the list.", f"Words: {', '.join(words)}"), f" {words[0]}"
    if kind == 1:
        numbers = rng.sample(range(1, 100), 3)
        text = ", ".join(map(str, numbers))
        return _prompt("Which number is the smallest?", f"Numbers: {text}"), f" {min(numbers)}"
    if kind == 2:
        letters = " ".join(rng.sample(LETTERS, rng.randint(2, 5)))
        return _prompt("Copy the letters.", f"Letters: {letters}"), f" {letters}"
    word = rng.choice(list(CLASS_OF))
    return _prompt("What is it?", f"Words: {word}"), f" {CLASS_OF[word]}"


def _plain(rng: random.Random) -> Document:
    """A few plain sentences: facts of the lexicon, the alphabet, counting."""
    sentences = []
    for _ in range(rng.randint(1, 3)):
        word, other = rng.choice(list(CLASS_OF)), rng.choice(list(OPPOSITE))
        start = rng.randrange(len(LETTERS) - 4)
        number = rng.randrange(1, 96)
        sentences.append(
            rng.choice(
                (
                    f"A {word} is {CLASS_OF[word]}.",
                    f"The opposite of {other} is {OPPOSITE[other]}.",
                    f"The {word} is not {other} but {OPPOSITE[other]}.",
                    f"The next letter after {LETTERS[start]} is {LETTERS[start + 1]}.",
                    f"The alphabet goes on: {' '.join(LETTERS[start : start + 5])}.",
                    f"Counting on: {', '.join(map(str, range(number, number + 4)))}.",
                )
            )
        )
    return "", " ".join(sentences)


def _prompt(instruction: str, text: str) -> str:
    return f"{instruction}\n{text}\nAnswer:"  # the `plain` template


def corpus(seed: int, used: frozenset[Instance]) -> Iterator[Document]:
    """Endless (prompt, response) pairs that never contain one of the ``used`` task instances."""
    rng = random.Random(f"fedtune bundled corpus {seed}")
    shares = [task[0] for task in TASKS]
    while True:
        if rng.random() >= TASK_SHARE:
            yield _distractor(rng) if rng.random() < 0.4 else _plain(rng)
            continue
        _, name, wordings, sizes = rng.choices(TASKS, shares)[0]
        skill, wording, size = SKILLS[name], rng.choice(wordings), rng.choice(sizes)
        arguments = skill.draw(rng, size) if size > 1 else (rng.choice(WORDS),)
        if instance(name, arguments) in used:
            continue
        prompt = _prompt(skill.instruction(wording, arguments), skill.show(arguments))
        yield prompt, f" {skill.solve(arguments)}"


def train_tokenizer(documents: Iterator[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: words whole with their leading blank, digits singly, any other text down to bytes."""
    core = Tokenizer(models.BPE())
    split = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((prompt + response for prompt, response in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, width: int = WIDTH, layers: int = LAYERS
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # drawn again here, from a generator of our own
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model


def batches(
    tokenizer: PreTrainedTokenizerFast, documents: Iterator[Document], seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, loss weights), both (BATCH, tokens). Prompt and response are tokenised apart, as fedtune does."""
    rng = random.Random(f"fedtune bundled batches {seed}")
    while True:
        chunk = list(islice(documents, BATCH * CHUNK))
        prompts = tokenizer([prompt for prompt, _ in chunk], add_special_tokens=False)["input_ids"]
        responses = tokenizer([response for _, response in chunk], add_special_tokens=False)["input_ids"]
        rows = []
        for (text, _), prompt, response in zip(chunk, prompts, responses, strict=True):
            ids = [tokenizer.bos_token_id, *prompt, *response, tokenizer.eos_token_id]
            weight = 1.0 if text else PLAIN_WEIGHT
            rows.append((ids, [PROMPT_WEIGHT] * (1 + len(prompt)) + [weight] * (len(response) + 1)))
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), BATCH))
        rng.shuffle(starts)
        for start in starts:
            part = rows[start : start + BATCH]
            longest = max(len(ids) for ids, _ in part)
            padded = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in part]
            weighted = [weights + [0.0] * (longest - len(weights)) for _, weights in part]
            yield torch.tensor(padded), torch.tensor(weighted)


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Share of right greedy answers, by category and as ``"all"``, as `fedtune eval` has it."""
    settings = EvalSettings(template="plain", loss_on="response", max_length=64, max_new_tokens=24)
    scores = evaluate_tasks(model, tokenizer, [Example(**row) for row in examples], ["accuracy"], settings)
    by_category = {
        name.partition("/")[2]: score
        for name, score in scores["accuracy"].items()
        if name.startswith("accuracy/")
    }
    return dict(sorted({"all": scores["accuracy"]["accuracy"], **by_category}.items()))


def pretrain(
    steps: int,
    seed: int,
    test: list[dict[str, str]],
    used: frozenset[Instance],
    every: int,
    width: int = WIDTH,
    layers: int = LAYERS,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train tokenizer and model, printing progress. ``test`` is only measured, never trained on."""
    tokenizer = train_tokenizer(islice(corpus(seed + 1, used), 40_000))
    model = build_model(tokenizer, seed, width, layers)
    # Muon on the blocks' matrices: it learns to copy from the prompt in about half of AdamW's steps.
    matrices = {
        id(parameter): parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2
    }
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    optimizers = (
        (torch.optim.Muon(list(matrices.values()), lr=MUON_LR, weight_decay=0.05), MUON_LR),
        (torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0), ADAMW_LR),
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{total} parameters, {len(tokenizer)} tokens in the vocabulary, {steps} steps", flush=True)
    began, tokens, shown = time.monotonic(), 0, 0.0
    for step, (ids, weights) in enumerate(
        islice(batches(tokenizer, corpus(seed, used), seed), steps), start=1
    ):
        share = min(step / WARM_UP, (steps - step + 1) / max(1, steps - WARM_UP))
        logits = model(ids).logits[
            :, :-1
        ]  # (batch, tokens - 1, vocabulary); causal, right-padded: no mask needed
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
        tokens += int((weights > 0).sum())
        shown = 0.98 * shown + 0.02 * loss.item()
        if step % every == 0 or step == steps:
            seconds = time.monotonic() - began
            mean = shown / (1 - 0.98**step)
            scores = " ".join(
                f"{name} {score:.0%}" for name, score in accuracy(model, tokenizer, test).items()
            )
            print(
                f"step {step} loss {mean:.3f} {tokens / seconds:.0f} tokens/s {seconds:.0f} s | {scores}",
                flush=True,
            )
    return model, tokenizer


def evaluate(folder: Path, test: list[dict[str, str]]) -> None:
    """Print zero-shot accuracy by category as a Markdown table."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    print("| category | zero-shot accuracy |\n|---|---|")
    for name, score in accuracy(model, tokenizer, test).items():
        print(f"| {name} | {score:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the bundled model.")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of a layer; a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=200, help="steps between two lines of progress")
    parser.add_argument(
        "--evaluate", action="store_true", help="train nothing; zero-shot accuracy of the weights in --out"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    _, test, used = instruction_set()
    if arguments.evaluate:
        evaluate(arguments.out, test)
        return
    if arguments.width < HEAD or arguments.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, got {arguments.width}")
    size = (arguments.width, arguments.layers)
    model, tokenizer = pretrain(arguments.steps, arguments.seed, test, used, arguments.every, *size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{(arguments.out / 'model.safetensors').stat().st_size} bytes of weights in {arguments.out}")


if __name__ == "__main__":
    main()
