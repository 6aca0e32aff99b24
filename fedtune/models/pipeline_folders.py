"""Where a Stable Diffusion pipeline's files are: the bundled folder, one of diffusers or the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from fedtune.data.places import require_hub_name, say_asking
from fedtune.errors import InputError
from fedtune.models.boundary import first_line
from fedtune.models.folders import PIPELINE, files_sha256, of_revision
from fedtune.models.names import BUNDLED, bundled_pipeline

PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (),  # any that diffusers has
}
PART_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def pipeline_folder(name: str, base: Path, *, weights: bool = True) -> Path:
    """The local folder of a pipeline, downloaded from the hub if that is where it is, with weights or not.

    Args:
        name: "bundled", a folder (relative to `base`) or a hub name, with @ and a revision behind it or not.
        base: The folder that relative names start from.
        weights: Whether to download the weights too.

    Raises:
        InputError: There is neither such a folder nor such a hub name within reach.
    """
    if name == BUNDLED:
        return bundled_pipeline()
    folder = base / Path(name).expanduser()
    if folder.is_dir():
        return folder
    hub, revision = of_revision(name)
    require_hub_name(hub, base, "model.name", [BUNDLED])
    say_asking(f"model {name}")
    wanted = [PIPELINE, *(f"{kind}/*.{end}" for kind in PARTS for end in ("json", "txt"))]
    wanted += [f"{kind}/{file}" for kind, file in PART_WEIGHTS.items() if weights]
    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise InputError(
            f'model.name: {folder} is not there, and the hub did not give "{name}": {first_line(error)} Give '
            "a pipeline's folder or bundled, or check the name, the network and HF_HUB_OFFLINE."
        ) from error


def local_pipeline(name: str) -> Path | None:
    """The folder of a pipeline that is on this machine, in the hub's cache too; None if it is not."""
    if name == BUNDLED or Path(name).expanduser().is_dir():
        return pipeline_folder(name, Path("."))
    hub, revision = of_revision(name)
    on_hub = hub.count("/") == 1 and hub[:1] != "/"
    cached = try_to_load_from_cache(hub, PIPELINE, revision=revision) if on_hub else None
    return Path(cached).parent if isinstance(cached, str) else None


def part_weights(folder: Path) -> list[Path]:
    """The safetensors files of a pipeline's parts."""
    return [folder / part / file for part, file in PART_WEIGHTS.items()]


def part_settings_sha256(folder: Path) -> dict[str, str]:
    """SHA-256 of each file beside the weights that loading reads: configurations, tokenizer, scheduler."""
    files = sorted(
        file for kind in PARTS for file in (folder / kind).glob("*.[jt][sx][ot]*") if file.is_file()
    )
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def pipeline_sha256(name: str, folder: Path) -> str:
    """SHA-256 over the bytes of all parts' weights. Raises InputError where one is damaged or missing."""
    return files_sha256(name, part_weights(folder))
