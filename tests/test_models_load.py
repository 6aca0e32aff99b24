"""Loading: dtypes, seeds and hashes, and one clear error for each thing that can be wrong with a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from model_families import DECODERS, FAMILIES, batch, build, edit_json, save_folder, tokenizer
from safetensors.torch import load_file, save_file

from fedtune.config.model import ModelSettings
from fedtune.errors import InputError
from fedtune.models import folders
from fedtune.models.load import load_model, load_tokenizer, meta_model, quiet

PRETRAINED = {"dtype": "float32", "initial": "pretrained", "seed": 0}
SCRATCH = {**PRETRAINED, "initial": "scratch"}


@pytest.fixture
def folder(tmp_path):
    return save_folder(tmp_path / "model")


def test_loads_the_weights_that_were_saved(folder, tmp_path):
    loaded = load_model("model", **PRETRAINED, base=tmp_path)
    assert all(
        torch.equal(p, q) for p, q in zip(loaded.model.parameters(), build("llama").parameters(), strict=True)
    )
    assert (loaded.name, loaded.model.name_or_path, loaded.model.training) == ("model", "model", False)
    assert loaded.weights_sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.tokenizer("w5 w9")["input_ids"] == [5, 9]


def test_any_stored_dtype_loads_as_any_dtype(tmp_path):
    save_folder(tmp_path / "half", dtype=torch.bfloat16)
    half = load_model("half", **{**PRETRAINED, "dtype": "bfloat16"}, base=tmp_path).model
    whole = load_model("half", **PRETRAINED, base=tmp_path).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert all(torch.equal(p.float(), q) for p, q in zip(half.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scratch_depends_on_the_seed_alone(folder, tmp_path, dtype):
    def draw(seed, disturb):
        torch.manual_seed(disturb)
        state = torch.get_rng_state()
        loaded = load_model("model", **{**SCRATCH, "seed": seed, "dtype": dtype}, base=tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        return loaded

    (folder / "model.safetensors").unlink()  # not needed
    first, again, other = draw(1, 10), draw(1, 11), draw(2, 10)
    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert {p.dtype for p in first.model.parameters()} == {getattr(torch, dtype)}


def test_a_new_head_is_drawn_from_the_seed(tmp_path):
    save_folder(tmp_path / "whole", "bert")
    save_folder(tmp_path / "model", "bert")
    build("bert").bert.save_pretrained(tmp_path / "model")  # no head at all

    def head(name, labels, seed):
        state = torch.get_rng_state()
        loaded = load_model(
            name, **{**PRETRAINED, "seed": seed}, task="classification", num_labels=labels, base=tmp_path
        )
        assert torch.equal(torch.get_rng_state(), state)
        assert loaded.model.config.num_labels == loaded.model.classifier.weight.shape[0]
        body = loaded.model.bert.parameters()
        assert all(map(torch.equal, body, build("bert").bert.parameters()))
        return loaded.model.classifier.weight

    for name in ("model", "whole"):  # absent, and there but for 3 classes
        assert head(name, 5, 1).shape == (5, 32)
        assert torch.equal(head(name, 5, 1), head(name, 5, 1))
        assert not torch.equal(head(name, 5, 1), head(name, 5, 2))
    assert torch.equal(head("whole", 3, 1), build("bert").classifier.weight)
    assert torch.equal(head("whole", None, 1), build("bert").classifier.weight)


def test_a_decoder_classifies_too(folder, tmp_path):
    loaded = load_model("model", **PRETRAINED, task="classification", num_labels=4, base=tmp_path)
    ids = torch.tensor([[1, 5, 9], [1, 7, 0]])
    assert loaded.model(input_ids=ids, attention_mask=(ids != 0).long()).logits.shape == (2, 4)
    assert loaded.model.config.pad_token_id == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_model_has_the_shapes_and_no_storage(tmp_path, family):
    FAMILIES[family].save_pretrained(tmp_path)
    task = "causal-lm" if family in DECODERS else "classification"
    state = torch.get_rng_state()
    model = meta_model(str(tmp_path), base=tmp_path, task=task, dtype="bfloat16")
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in build(family).named_parameters()}


def test_sharded_weights(folder, tmp_path):
    build("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shutil.copy(folder / "tokenizer.json", tmp_path / "shards")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "shards")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded = load_model("shards", **PRETRAINED, base=tmp_path)
    assert all(map(torch.equal, loaded.model.parameters(), build("llama").parameters()))
    assert loaded.weights_sha256 == hashlib.sha256(b"".join(s.read_bytes() for s in shards)).hexdigest()
    shards[1].unlink()
    with pytest.raises(InputError, match=f"lacks {shards[1].name}"):
        load_model("shards", **PRETRAINED, base=tmp_path)
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="no index of weights"):
        load_model("shards", **PRETRAINED, base=tmp_path)


def without(file, *keys):
    about = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in about.items() if key not in keys}))


def test_a_missing_pad_token_is_the_models_or_the_end_token(folder, tmp_path):
    without(folder / "tokenizer_config.json", "pad_token")
    assert load_tokenizer("model", tmp_path).pad_token == "<pad>"  # number 0 of both files
    without(folder / "generation_config.json", "pad_token_id")
    assert load_tokenizer("model", tmp_path).pad_token == "<pad>"
    without(folder / "config.json", "pad_token_id")
    loaded = load_model("model", **PRETRAINED, base=tmp_path)
    assert loaded.tokenizer.pad_token == "</s>"
    assert loaded.model.generation_config.pad_token_id == 2


def test_a_missing_end_token_is_the_first_that_the_models_files_name(folder, tmp_path):
    without(folder / "tokenizer_config.json", "pad_token", "eos_token")
    edit_json(folder / "generation_config.json", eos_token_id=[9, 2], pad_token_id=None)
    tokenizer = load_tokenizer("model", tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("w9", "<pad>")
    without(folder / "generation_config.json", "eos_token_id", "pad_token_id")
    edit_json(folder / "config.json", eos_token_id=2, pad_token_id=-1)
    tokenizer = load_tokenizer("model", tmp_path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    edit_json(folder / "config.json", eos_token_id=None, text_config={"eos_token_id": 5})
    assert load_tokenizer("model", tmp_path).eos_token == "w5"
    without(folder / "config.json", "eos_token_id", "pad_token_id", "text_config")
    with pytest.raises(InputError, match="neither a pad nor an eos"):
        load_tokenizer("model", tmp_path)


def refused(message, base, name="model", **changes):
    with pytest.raises(InputError, match=message):
        load_model(name, **{**PRETRAINED, **changes}, base=base)


def test_wrong_arguments(folder, tmp_path):
    dtypes = "float32, bfloat16, float16"
    refused(f'model.dtype must be one of {dtypes}, got "bfloat".* "bfloat16"', tmp_path, dtype="bfloat")
    refused('model.initial must be one of pretrained, scratch, got "random"', tmp_path, initial="random")
    refused('task must be one of causal-lm, classification, got "causal"', tmp_path, task="causal")
    with pytest.raises(InputError, match=r"model\.dtype must be"):
        meta_model("model", base=tmp_path, dtype="float64")


def test_no_such_folder(tmp_path, monkeypatch):
    """A name that means a place here is not looked for on the hub."""
    monkeypatch.setattr(
        folders, "snapshot_download", lambda *args, **kwargs: pytest.fail("the hub was asked")
    )
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", "..\\model", "models/", "bundeld", "~/nowhere"):
        refused("there is no ", tmp_path, name)
    (tmp_path / "models" / "base").mkdir(parents=True)
    refused('no "models/bsae" on this machine.*Did you mean "models/base"', tmp_path, "models/bsae")
    refused('no "bundeld" .*Did you mean "bundled".*written OWNER/NAME', tmp_path, "bundeld")
    with pytest.raises(InputError) as found:
        load_model("/nowhere/at/all", **PRETRAINED, base=tmp_path)
    assert (
        str(found.value) == 'model.name: there is no "/nowhere/at/all" on this machine.'
    )  # nowhere else to look
    (tmp_path / "file").write_text("")
    refused("is no folder", tmp_path, "file")


def test_the_hub_is_asked_for_its_own_names_and_that_is_said(folder, tmp_path, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(
        folders, "snapshot_download", lambda name, **kwargs: asked.append(name) or str(folder)
    )
    assert load_model("owner/model-1.5", **PRETRAINED, base=tmp_path).name == "owner/model-1.5"
    assert asked == ["owner/model-1.5"]
    assert caplog.messages == [
        "model owner/model-1.5 is not on this machine; asking the Hugging Face hub for it"
    ]


def test_an_adapter_beside_the_model_is_refused(folder, tmp_path):
    """transformers would load it too, and the digest would not know."""
    (folder / "adapter_config.json").write_text("{}")
    refused("has an adapter .* beside the model", tmp_path)
    with pytest.raises(InputError, match="beside the model"):
        meta_model("model", base=tmp_path)


@pytest.mark.parametrize("part", ["../out.safetensors", "/out.safetensors", "link.safetensors", "in/x", 3])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, part):
    build("llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tokenizer().save_pretrained(tmp_path / "model")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    (tmp_path / "model" / "in").mkdir()
    for place in (tmp_path / "out.safetensors", tmp_path / "model" / "in" / "x"):
        shutil.copy(shards[0], place)
    (tmp_path / "model" / "link.safetensors").symlink_to(tmp_path / "out.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    about = json.loads(index.read_text())
    for name, file in about["weight_map"].items():
        about["weight_map"][name] = part if file == shards[0].name else file
    index.write_text(json.dumps(about))
    refused("not in that folder|no index of weights", tmp_path)


def test_weights_in_the_hubs_cache_are_links_and_load(tmp_path):
    snapshot, blobs = tmp_path / "models--o--m" / "snapshots" / "abc", tmp_path / "models--o--m" / "blobs"
    build("llama").save_pretrained(snapshot, max_shard_size="20KB")
    tokenizer().save_pretrained(snapshot)
    blobs.mkdir()
    for file in snapshot.iterdir():
        file.rename(blobs / f"blob-{file.name}")
        file.symlink_to(Path("..") / ".." / "blobs" / f"blob-{file.name}")
    loaded = load_model(str(snapshot), **PRETRAINED, base=tmp_path)
    assert all(map(torch.equal, loaded.model.parameters(), build("llama").parameters()))


def test_hub_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused('the hub did not give "owner/model".*HF_HUB_OFFLINE', tmp_path, "owner/model")
    with pytest.raises(InputError, match="the hub did not give"):
        meta_model("owner/model", base=tmp_path)
    with pytest.raises(InputError, match="the hub did not give"):
        load_tokenizer("owner/model", tmp_path)


def test_no_config(folder, tmp_path):
    (folder / "config.json").unlink()
    refused("no config.json", tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    refused("PEFT adapter, not a model", tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "unheard-of"}', '{"model_type": 3}'])
def test_damaged_config(folder, tmp_path, text):
    (folder / "config.json").write_text(text)
    refused("config.json is no configuration", tmp_path)


def test_no_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refused("no weights in .*model.initial=scratch", tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    refused(r"pickle only \(pytorch_model.bin\)", tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_weights_cut_short(folder, tmp_path, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused("model.safetensors is damaged", tmp_path)


def test_weights_of_another_shape_or_incomplete(folder, tmp_path):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path, metadata={"format": "pt"})
    refused(f"lack 1 tensors .*{name}", tmp_path)
    refused(f"lack 1 tensors .*{name}", tmp_path, task="classification")
    save_file({**tensors, name: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    refused(f"lack 1 tensors .*{name}", tmp_path)


def test_no_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{")
    refused("tokenizer in .* cannot be read", tmp_path)
    (folder / "tokenizer.json").unlink()
    refused("no tokenizer in", tmp_path)
    assert meta_model("model", base=tmp_path).config.model_type == "llama"  # reads no tokenizer


def test_a_tokenizer_with_more_tokens_than_embeddings(folder, tmp_path):
    edit_json(folder / "config.json", vocab_size=32)
    refused("tokenizer has 64 tokens.* embeddings for 32", tmp_path, initial="scratch")


def test_an_encoder_does_not_generate(tmp_path):
    save_folder(tmp_path / "model", "roberta")
    refused('"roberta" is an encoder', tmp_path)


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama105-hf", "instruct-7m"])
def test_real_models(shared_models, name):
    loaded = load_model(name, **PRETRAINED, base=shared_models)
    ids = loaded.tokenizer("Once upon a time there was a little girl", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = loaded.model(input_ids=ids, labels=ids).loss
    scratch = load_model(name, **SCRATCH, base=shared_models)
    with torch.no_grad():
        untrained = scratch.model(input_ids=ids, labels=ids).loss
    assert loss < 0.6 * untrained


def test_a_hub_model_is_asked_for_without_subfolders_and_second_copies(folder, tmp_path, monkeypatch):
    asked = []

    def download(name, **patterns):
        asked.append((name, patterns))
        return str(folder)

    monkeypatch.setattr(folders, "snapshot_download", download)
    load_model("owner/model", **PRETRAINED, base=tmp_path)
    load_tokenizer("owner/model", tmp_path)
    text, ignored = ["*.json", "*.model", "*.txt"], ["*/*", "consolidated*"]
    assert {name for name, _ in asked} == {"owner/model"}
    common = {"revision": None, "ignore_patterns": ignored}
    assert {**common, "allow_patterns": [*text, "*.safetensors"]} in [p for _, p in asked]
    assert asked[-1][1] == {**common, "allow_patterns": text}


@pytest.mark.parametrize("bars", [True, False])
def test_loading_is_quiet_and_leaves_the_libraries_as_talkative_as_they_were(folder, tmp_path, bars, capfd):
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        with quiet():
            assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() == bars
        with pytest.raises(KeyError), quiet():
            raise KeyError
        load_model(str(folder), **PRETRAINED, base=tmp_path)
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled() == bars
        assert capfd.readouterr().err == ""
    finally:
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_is_never_run(folder, tmp_path, known):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class Own(LlamaConfig):\n    pass\n\nclass Model(LlamaForCausalLM):\n    config_class = Own\n"
    (folder / "own.py").write_text(code)
    places = {
        "AutoConfig": "own.Own",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Own", None],
    }
    edit_json(folder / "config.json", auto_map=places, **({} if known else {"model_type": "unheard-of"}))
    edit_json(folder / "tokenizer_config.json", auto_map=places)
    if known:  # transformers' own class of that type
        assert type(load_model("model", **PRETRAINED, base=tmp_path).model).__module__.startswith(
            "transformers"
        )
        load_model("model", **SCRATCH, base=tmp_path)
        meta_model("model", base=tmp_path)
        load_tokenizer("model", tmp_path)
    else:
        refused("contains custom code which must be executed", tmp_path)
        with pytest.raises(InputError, match="contains custom code which must be executed"):
            load_tokenizer("model", tmp_path)
    assert not ran.exists()


def test_every_file_beside_the_weights_that_loading_reads_has_a_digest(tmp_path):
    names = {
        *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json"),
        *("vocab.txt", "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    }
    for name in [*names, "README.md", "model.safetensors"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("t")
    found = folders.settings_sha256(tmp_path)
    assert set(found) == {*names, "additional_chat_templates/tools.jinja"}
    assert found["config.json"] == hashlib.sha256(b"config.json").hexdigest()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_implementation_of_attention_is_taken(folder, tmp_path, attention):
    loaded = load_model("model", **PRETRAINED, base=tmp_path, attention=attention)
    planned = meta_model("model", base=tmp_path, attention=attention)
    for model in (loaded.model, planned):
        assert model.config._attn_implementation == attention
    plain = load_model("model", **PRETRAINED, base=tmp_path)
    torch.testing.assert_close(loaded.model(**batch("llama")).logits, plain.model(**batch("llama")).logits)


def test_flash_attention_says_what_is_missing(folder, tmp_path):
    refused(
        "flash_attention_2 needs the package flash-attn and .*model.dtype: bfloat16 or float16; set",
        tmp_path,
        attention="flash_attention_2",
    )
    refused('model.attention must be one of auto, sdpa, .* got "flash"', tmp_path, attention="flash")


def test_a_revision_is_asked_of_the_hub(folder, tmp_path, monkeypatch):
    asked = []

    def download(name, revision, **patterns):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr(folders, "snapshot_download", download)
    settings = ModelSettings(name="owner/model", revision="v1.0")
    loaded = load_model(settings.place, **PRETRAINED, base=tmp_path)
    assert set(asked) == {("owner/model", "v1.0")} and loaded.name == "owner/model@v1.0"
    for name in ("bundled", str(folder)):
        with pytest.raises(ValueError, match=r"v1\.0 is of a hub model, and name: .* is on this machine"):
            ModelSettings(name=name, revision="v1.0")
