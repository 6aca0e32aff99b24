"""Where a model's files are: the bundled folder, a Hugging Face folder or the hub; safetensors only."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from fedtune.data.places import require_hub_name, say_asking
from fedtune.errors import InputError
from fedtune.models.boundary import first_line
from fedtune.models.names import BUNDLED, bundled_folder

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
# Beside the weights, whatever else loading reads: what these hold changes what a model does.
SETTINGS_FILES = (
    *TOKENIZER_FILES,
    CONFIG,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
ADAPTER = "adapter_config.json"
PIPELINE = "model_index.json"  # of diffusers

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions"),
)


def model_folder(name: str, base: Path, *, weights: bool) -> Path:
    """The local folder of a model, downloaded from the hub if that is where it is.

    Args:
        name: "bundled", a folder (relative to `base`) or a hub name, with @ and a revision behind it or not.
        base: The folder that relative names start from.
        weights: Whether to download the weights too.

    Raises:
        InputError: There is neither such a folder nor such a hub model within reach. A name that means a
            place on this machine is not looked for on the hub.
    """
    if name == BUNDLED:
        return bundled_folder()
    folder = base / Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(
            f"model.name: {folder} is no folder. "
            "Give a Hugging Face model folder, a hub name such as owner/model, or bundled."
        )
    name, revision = of_revision(name)
    require_hub_name(name, base, "model.name", [BUNDLED])
    if not isinstance(try_to_load_from_cache(name, CONFIG, revision=revision), str):
        say_asking(f"model {name}")
    patterns = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        # Nothing from subfolders, and no second copy of the weights in another layout.
        found = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]
        )
    except (OSError, ValueError) as error:  # every error of huggingface_hub and of a network is one of these
        raise InputError(
            f'model.name: {folder} is not there, and the hub did not give "{name}"'
            f"{f' at model.revision {revision}' if revision else ''}: {first_line(error)} "
            "Give a model folder, or check the name, the network and HF_HUB_OFFLINE."
        ) from error
    return Path(found)


def local_folder(name: str) -> Path | None:
    """The folder of a model that is on this machine, in the hub's cache too; None if it is not."""
    if name == BUNDLED or Path(name).expanduser().is_dir():
        return model_folder(name, Path("."), weights=False)
    name, revision = of_revision(name)
    on_hub = name.count("/") == 1 and name[:1] != "/"
    cached = try_to_load_from_cache(name, CONFIG, revision=revision) if on_hub else None
    return Path(cached).parent if isinstance(cached, str) else None


def of_revision(name: str) -> tuple[str, str | None]:
    """A hub name and the revision behind its @; None where it has none."""
    hub, at, revision = name.partition("@")
    return (hub, revision) if at else (name, None)


def require_config(name: str, folder: Path) -> None:
    """Raises InputError unless the folder holds a model's config.json, with sizes that a model can have.

    Nor may an adapter lie beside it.
    """
    if (folder / CONFIG).is_file():
        if (folder / ADAPTER).exists():
            raise InputError(
                f"model {name}: {folder} has an adapter ({ADAPTER}) beside the model, which would be loaded "
                "with it unasked. Merge it into the weights, or move its files to a folder of their own."
            )
        _check_sizes(name, folder / CONFIG)
        return
    if (folder / PIPELINE).is_file():
        raise InputError(
            f"model {name}: {folder} holds a pipeline of diffusers; it goes with model.task: text-to-image."
        )
    hint = "Give a folder made by save_pretrained."
    if (folder / ADAPTER).is_file():
        hint = "It holds a PEFT adapter, not a model: give its base model."
    raise InputError(f"model {name}: no {CONFIG} in {folder}. {hint}")


def _check_sizes(name: str, file: Path) -> None:
    """Asked before transformers is, whose errors would not say which number it was."""
    try:
        whole = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"model {name}: {file} is no configuration: {first_line(error)}") from error
    if not isinstance(whole, dict):
        raise InputError(f"model {name}: {file} is no configuration: it must hold one JSON object.")
    for part in (whole, whole.get("text_config")):
        about = part if isinstance(part, dict) else {}
        sizes = {key: about[key] for key in SIZES if isinstance(about.get(key), int | float)}
        for key, size in sizes.items():
            if isinstance(size, float) or size < 1:
                raise InputError(
                    f"model {name}: {file} is no configuration: {key} must be a whole number of 1 or more, "
                    f"got {size}."
                )
        heads, groups = sizes.get("num_attention_heads", 1), sizes.get("num_key_value_heads", 1)
        if heads % groups:
            raise InputError(
                f"model {name}: {file} is no configuration: num_key_value_heads {groups} must divide "
                f"num_attention_heads {heads}."
            )


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
        InputError: There are none, only pickled ones, fewer than the index names, or the index names files
            outside of the folder.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        try:
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"model {name}: {index} is no index of weights: {first_line(error)}") from error
        outside = [part for part in parts if not _inside(folder, part)]
        if outside:
            raise InputError(
                f"model {name}: {index} names {outside[0]!r}, which is not in that folder. "
                "Put the weights beside their index."
            )
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


def _inside(folder: Path, part: object) -> bool:
    """Whether a name in an index is that of a file in its folder, and no way out of it."""
    if not isinstance(part, str) or Path(part).name != part:
        return False
    homes = [folder.resolve()]
    if folder.parent.name == "snapshots":  # the hub's cache: its files are links to these
        homes.append(folder.parent.parent.resolve() / "blobs")
    return (folder / part).resolve().parent in homes


def settings_sha256(folder: Path) -> dict[str, str]:
    """SHA-256 of each file beside the weights that loading reads: configuration, tokenizer, chat template."""
    files = [folder / name for name in SETTINGS_FILES] + sorted(
        (folder / "additional_chat_templates").glob("*.jinja")
    )
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.is_file()
    }


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
