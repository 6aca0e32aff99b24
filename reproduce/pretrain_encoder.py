"""Pre-train a small encoder, as RoBERTa is made: masked words are guessed from the text around them.

    nice -n 5 python reproduce/pretrain_encoder.py --text FILE [FILE ...] [--steps 2000] [--out runs/encoder]

It is made for the classification configurations (configs/fedcybgd_encoder_*.yaml), which name its folder, and
is not shipped. Text comes from .txt files, a piece a line, and .jsonl files, whose texts are a piece each.
Without --text it is the generated corpus of the bundled model, which knows few words. The same machine,
files, seed and number of threads give the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from make_bundled_data import SEED, instruction_set
from pretrain_bundled import corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"  # in RoBERTa's order: padding is 1
VOCABULARY = 4096  # at most
CONTEXT = 256  # tokens that the model can take
LENGTH, BATCH = 64, 32  # tokens of a training sequence, sequences a step
MASKED = 0.15  # of the tokens; of those 80 % become MASK, 10 % any token, 10 % stay (Devlin et al. 2019)
LR, WARM_UP = 2e-3, 100
WORDS_FOR_TOKENIZER = 20_000  # pieces


def pieces(files: Sequence[Path]) -> list[str]:
    """All texts of the files, in order; without files, of the generated corpus."""
    if not files:
        used = instruction_set()[2]
        return [f"{prompt}{answer}" for prompt, answer in islice(corpus(SEED, used), 50_000)]
    found: list[str] = []
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            if file.suffix == ".jsonl":
                found += [text.strip() for text in json.loads(line).values() if isinstance(text, str)]
            else:
                found.append(line.strip())
    return [piece for piece in found if piece]


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; a text is `<s> text </s>`, a pair `<s> one </s></s> two </s>`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, PAD, EOS, UNK, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts[:: max(1, len(texts) // WORDS_FOR_TOKENIZER)], trainer)
    core.post_processor = processors.RobertaProcessing((EOS, 2), (BOS, 0))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        cls_token=BOS,
        eos_token=EOS,
        sep_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        mask_token=MASK,
    )


def batches(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], seed: int) -> Iterator[Tensor]:
    """Endless batches of sequences cut out of the texts one after another, (BATCH, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    while True:
        for place in torch.randperm(len(texts), generator=generator).tolist():
            waiting += tokenizer(texts[place], verbose=False)["input_ids"]
            while len(waiting) >= BATCH * LENGTH:
                taken, waiting = waiting[: BATCH * LENGTH], waiting[BATCH * LENGTH :]
                yield torch.tensor(taken).reshape(BATCH, LENGTH)


def mask(
    ids: Tensor, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What the model sees, and the labels: -100 where nothing is to be guessed."""
    chosen = (torch.rand(ids.shape, generator=generator) < MASKED) & (ids > tokenizer.mask_token_id)
    fate = torch.rand(ids.shape, generator=generator)
    drawn = torch.randint(tokenizer.mask_token_id + 1, len(tokenizer), ids.shape, generator=generator)
    seen = torch.where(chosen & (fate < 0.8), torch.full_like(ids, tokenizer.mask_token_id), ids)
    seen = torch.where(chosen & (fate >= 0.9), drawn, seen)
    return seen, ids.masked_fill(~chosen, -100)


def pretrain(
    texts: Sequence[str], steps: int, seed: int, every: int
) -> tuple[RobertaForMaskedLM, PreTrainedTokenizerFast]:
    """Trains tokenizer and model, printing progress."""
    tokenizer = train_tokenizer(texts)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT + 2,  # RoBERTa counts positions from 2
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    model = RobertaForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed + 1)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{total} parameters, {len(tokenizer)} tokens in the vocabulary, {steps} steps", flush=True)
    began, shown = time.monotonic(), 0.0
    for step, ids in enumerate(islice(batches(tokenizer, texts, seed), steps), start=1):
        optimizer.param_groups[0]["lr"] = LR * min(
            step / WARM_UP, (steps - step + 1) / max(1, steps - WARM_UP)
        )
        seen, labels = mask(ids, tokenizer, generator)
        loss = model(input_ids=seen, labels=labels).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown = 0.98 * shown + 0.02 * loss.item()
        if step % every == 0 or step == steps:
            print(
                f"step {step} loss {shown / (1 - 0.98**step):.3f} {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train a small encoder.")
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=100, help="steps between two lines of progress")
    parser.add_argument("--out", type=Path, default=Path("runs/encoder"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = pretrain(pieces(arguments.text), arguments.steps, arguments.seed, arguments.every)
    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{(arguments.out / 'model.safetensors').stat().st_size} bytes of weights in {arguments.out}")


if __name__ == "__main__":
    main()
