"""Where a model's files are: the bundled folder, a Hugging Face folder or the hub; safetensors only."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from fedtune.errors import InputError

BUNDLED = "bundled"
CONFIG = "config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def model_folder(name: str, base: Path, *, weights: bool) -> Path:
    """The local folder of a model, downloaded from the hub if that is where it is.

    Args:
        name: "bundled", a folder (relative to `base`) or a hub name.
        base: The folder that relative names start from.
        weights: Whether to download the weights too.

    Raises:
        InputError: There is neither such a folder nor such a hub model within reach.
    """
    if name == BUNDLED:
        return Path(str(importlib.resources.files("fedtune.models") / BUNDLED))
    folder = base / Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or folder.exists():
        raise InputError(
            f"model.name: {folder} is no folder. "
            "Give a Hugging Face model folder, a hub name such as owner/model, or bundled."
        )
    patterns = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        # Nothing from subfolders, and no second copy of the weights in another layout.
        found = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
    except (OSError, ValueError) as error:  # every error of huggingface_hub and of a network is one of these
        raise InputError(
            f'model.name: {folder} is no folder, and the hub did not give "{name}": {first_line(error)} '
            "Give a model folder, or check the name, the network and HF_HUB_OFFLINE."
        ) from error
    return Path(found)


def require_config(name: str, folder: Path) -> None:
    """Raises InputError unless the folder holds a model's config.json."""
    if (folder / CONFIG).is_file():
        return
    hint = "Give a folder made by save_pretrained."
    if (folder / "adapter_config.json").is_file():
        hint = "It holds a PEFT adapter, not a model: give its base model."
    raise InputError(f"model {name}: no {CONFIG} in {folder}. {hint}")


def require_tokenizer(name: str, folder: Path) -> None:
    """Raises InputError unless the folder holds a tokenizer's files.

    Asked before transformers is: for some families it would build an empty tokenizer without a word.
    """
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise InputError(
            f"model {name}: no tokenizer in {folder}. Expected one of {', '.join(TOKENIZER_FILES)}."
        )


def weight_files(name: str, folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights, in name order.

    Raises:
        InputError: There are none, only pickled ones, or fewer than the index names.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"model {name}: {index} is no index of weights: {first_line(error)}") from error
        missing = [part for part in parts if not (folder / part).is_file()]
        if missing:
            raise InputError(
                f"model {name}: {folder} lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names. "
                "Fetch the model again."
            )
        return [folder / part for part in parts]
    pickled = sorted(file.name for pattern in PICKLED_WEIGHTS for file in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"model {name}: {folder} has its weights as pickle only ({', '.join(pickled)}), which can run "
            "code when it is read. Convert them to safetensors with save_pretrained."
        )
    raise InputError(
        f"model {name}: no weights in {folder}, expected {WEIGHTS} or {WEIGHTS_INDEX}. "
        "To start from random weights set model.initial=scratch."
    )


def has_weights(folder: Path) -> bool:
    """Whether there are weights in safetensors, whole or not."""
    return (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file()


def tensor_shapes(name: str, files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in safetensors files, by name; reads the files' headers alone.

    Raises:
        InputError: A file is cut short or no safetensors file.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stream:
                names = list(stream.keys())
                shapes |= {name: tuple(stream.get_slice(name).get_shape()) for name in names}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"model {name}: {file} is damaged: {first_line(error)} Fetch the model again."
            ) from error
    return shapes


def files_sha256(name: str, files: list[Path]) -> str:
    """SHA-256 over the bytes of safetensors files, one after the other.

    Raises:
        InputError: A file is cut short or no safetensors file.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # checks the header against the file's length
                pass
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"model {name}: {file} is damaged: {first_line(error)} Fetch the model again."
            ) from error
    return digest.hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, as a sentence."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
