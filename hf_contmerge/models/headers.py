"""Model folders with empty weights: config, tokenizer and safetensors headers.

Weight files have their full length but no data: sparse files without disk space. Code that reads names, shapes and
dtypes therefore works on such a folder as on the model, and nothing larger than a header is fetched.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from hf_contmerge.errors import ModelError
from hf_contmerge.models._gguf import opened_gguf
from hf_contmerge.models.contents import INDEX, SINGLE, read_weight_map
from hf_contmerge.models.folder import TEXTS, check_hub_id, converted_folder, hub_errors, model_path, resolve_model
from hf_contmerge.models.weights import WeightsWriter, header_bytes


def resolve_headers(name: str, scratch: Path, *, adapters: bool = False) -> Path:
    """Return a local model's folder, else one with its headers below `scratch`.

    `adapters`: accept a peft adapter as well. Raises as `folder.resolve_model` does.
    """
    path = model_path(name)
    if path.suffix == ".gguf" and path.is_file():
        converted = converted_folder(path)[1]
        return converted if (converted / "converted.json").is_file() else _of_gguf(path, scratch / converted.name)
    if path.is_dir():
        return resolve_model(name, adapters=adapters)
    check_hub_id(name)
    return _cached(name) or _of_hub(name, scratch / name.replace("/", "--"), adapters=adapters)


def needs_converting(name: str) -> bool:
    """Return True for a GGUF file not yet dequantised on this machine."""
    path = model_path(name)
    if path.suffix != ".gguf" or not path.is_file():
        return False
    return not (converted_folder(path)[1] / "converted.json").is_file()


def _cached(name: str) -> Path | None:
    """Return a Hub model's cached folder, if complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, local_files_only=True))
        return resolve_model(str(folder), adapters=True)
    except (LocalEntryNotFoundError, ModelError):  # missing or incomplete
        return None


def _of_hub(name: str, folder: Path, *, adapters: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import SafetensorsParsingError

    repo, _, revision = name.partition("@")
    at = revision or None
    api = HfApi()
    with hub_errors(name):
        texts = Path(snapshot_download(repo, revision=at, allow_patterns=list(TEXTS)))
        folder.mkdir(parents=True, exist_ok=True)
        for path in texts.iterdir():
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
        for file in _weight_files(texts, api.list_repo_files(repo, revision=at)):
            try:
                metadata = api.parse_safetensors_file_metadata(repo, file, revision=at)
            except SafetensorsParsingError as error:
                raise ModelError(
                    f"{file} of {name} is not a safetensors file: {error}. Name another model or revision."
                ) from error
            _write_empty(folder / file, metadata)
    return resolve_model(str(folder), adapters=adapters)


def _weight_files(texts: Path, files: list[str]) -> list[str]:
    """Return the weight files read by `from_pretrained`, and an adapter's."""
    if SINGLE not in files and (texts / INDEX).is_file():
        return sorted(set(read_weight_map(texts / INDEX).values()))
    return [name for name in (SINGLE, "adapter_model.safetensors") if name in files]


def _write_empty(path: Path, metadata: Any) -> None:
    """Write a safetensors file from huggingface_hub's parsed header, its data a hole."""
    entries = {
        name: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in metadata.tensors.items()
    }
    header = header_bytes(entries)
    end = max((info.data_offsets[1] for info in metadata.tensors.values()), default=0)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)


def _of_gguf(path: Path, folder: Path) -> Path:
    """Write a GGUF file's bfloat16 folder without data."""
    if (folder / "model.safetensors").is_file():
        return folder
    with opened_gguf(path):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {id(tensor): (name, tensor) for name, tensor in reversed(model.state_dict(keep_vars=True).items())}
    plan = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in stored.values()]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WeightsWriter(folder, plan, shard_size=2**62).create()
    return folder
