"""Names of layers and tokens in a model's files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError
from hf_contmerge.runtime.foreign import read_object, read_text

COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Endings of a model's other files: config, tokenizer, chat template, generation config."""

_LARGEST_TEMPLATE = 2**22
_LAYER = re.compile(r"\.(\d+)\.")
_STACK = re.compile(r"(?P<stack>(?:^|.*?\.)(?:layers?|h|blocks?))\.(?P<number>\d+)\.")
_NOT_A_LINEAR_MAP = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|shared|router|gate|\w*_router|\w*expert_gate|A_log)(\.|$)"
)
_EMBEDDING = re.compile(r"(^|\.)(?!embed_out\b)(\w*embed\w*|wte|wpe|shared)(\.|$)")
_CONVOLUTION = re.compile(r"(^|\.)\w*conv\w*(\.|$)")


def layer_of(name: str) -> str:
    """Return a weight's layer, else its bare name.

    For example "layer 3", embed_tokens, norm.
    """
    number = _LAYER.search(name)
    return f"layer {number.group(1)}" if number else name.removesuffix(".weight").rsplit(".", 1)[-1]


def depths(names: Iterable[str]) -> dict[str, float]:
    """Return weight -> its layer's relative depth, from 0 to 1.

    Each stack counts by itself (encoder, decoder, vision tower). Weights outside the layers are left out.
    """
    places = {name: (found["stack"], int(found["number"])) for name in names if (found := _STACK.match(name))}
    last: dict[str, int] = {}
    for stack, number in places.values():
        last[stack] = max(number, last.get(stack, 0))
    return {name: number / max(last[stack], 1) for name, (stack, number) in places.items()}


def outer_depth(name: str) -> float:
    """Return the depth of a weight outside the layers: 0 for embeddings, else 1.

    Embeddings are tables of tokens, positions and patches; a head of its own and final norms come after the layers.
    """
    return 0.0 if _EMBEDDING.search(name) else 1.0


def is_matrix(name: str, shape: Sequence[int], vocabulary: int | None) -> bool:
    """Say if a weight is a linear map or a stack.

    Vocabulary tables (embeddings, output heads; by name or by their size) and routers of expert mixtures are not, and
    neither are convolutions (channels, inputs, width) or stacks of vectors, such as the kernels (channels, 1, width) of
    a depthwise convolution.
    """
    if len(shape) not in (2, 3) or _NOT_A_LINEAR_MAP.search(name):
        return False
    if len(shape) == 3 and (1 in shape[1:] or _CONVOLUTION.search(name)):
        return False
    return shape[0] != vocabulary


def layer_order(layer: str) -> tuple[int, int, str]:
    """Return a layer's sort key: forward order, `all` last."""
    number = layer.removeprefix("layer ")
    if number.isdigit():
        return (1, int(number), "")
    return (3, 0, "") if layer == "all" else (0 if "embed" in layer else 2, 0, layer)


def tokens_of(folder: Path) -> dict[str, int] | None:
    """Return token -> id of a fast tokenizer.

    Includes added tokens. None without a tokenizer.json.
    """
    values = _tokenizer(folder)
    if values is None:
        return None
    try:
        vocabulary = values["model"]["vocab"]
        added = {token["content"]: token["id"] for token in values.get("added_tokens") or ()}
    except (KeyError, TypeError) as error:
        raise ModelError(f"Cannot read {folder / 'tokenizer.json'}: {error!r}. Fetch it again.") from error
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **added}


def special_tokens(folder: Path) -> dict[str, int]:
    """Return token -> id of a fast tokenizer's special tokens."""
    added = (_tokenizer(folder) or {}).get("added_tokens") or ()
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _tokenizer(folder: Path) -> Mapping[str, Any] | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return read_object(folder / "tokenizer.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {folder / 'tokenizer.json'}: {error!r}. Fetch it again.") from error


def config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder."""
    try:
        return read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {folder / 'config.json'}: {error}. Fetch or save the model again.") from error


def text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text part of a multimodal config, else an empty mapping."""
    return values.get("text_config") or {}


def setting(values: Mapping[str, Any], word: str) -> Any:
    """Return a field of a config, or of its text part."""
    return values.get(word, text_config(values).get(word))


def vocabulary_size(values: Mapping[str, Any]) -> int | None:
    """Return the rows of the vocabulary tables."""
    return values.get("vocab_size") or text_config(values).get("vocab_size")


def optional_json(file: Path) -> dict[str, Any]:
    """Read a JSON file, {} without one. Raises ModelError if damaged."""
    try:
        return read_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {file}: {error!r}. Fetch it again.") from error


def chat_template(folder: Path) -> Any:
    """Return a model's chat template as stored: text, list or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    places = (optional_json(folder / f"{name}.json") for name in ("chat_template", "tokenizer_config"))
    return next((found for values in places if (found := values.get("chat_template"))), None)


def read_template(file: Path) -> str:
    """Read a chat template. Raises ModelError for one that is damaged, or as large as no template is."""
    try:
        return read_text(file, most=_LARGEST_TEMPLATE)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {file}: {error}. Fetch it again.") from error
