"""Names of layers and tokens in a model's files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ContmergeError, ModelError
from hf_contmerge.runtime.foreign import read_object, read_text, require_shape

COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Endings of a model's other files: config, tokenizer, chat template, generation config."""

_LARGEST_TEMPLATE = 2**22
MOST_LAYERS = 2000
_COUNT = re.compile(r"(num_|n_|num_hidden_|\w*_)?(layers?|blocks?|experts|depth)")
_FIELDS: dict[str, Any] = {
    "vocab_size?": (int, None), "tie_word_embeddings?": (bool, None), "model_type?": (str, None),
    "rope_scaling?": ({}, None), "rope_parameters?": ({}, None), "auto_map?": ({}, None),
}  # fmt: skip
_CONFIG = {**_FIELDS, "text_config?": (_FIELDS, None), "architectures?": ([str], None), "transformers_weights?":
           (str, None), "quantization_config?": ({}, None)}  # fmt: skip
_TOKENIZER = {
    "model": {"vocab": ({str: int}, [[str, float]])}, "added_tokens?": ([{"content": str, "id": int}], None),
}  # fmt: skip
_LAYER = re.compile(r"\.(\d+)\.")
_STACK = re.compile(r"(?P<stack>(?:^|.*?\.)(?:layers?|h|blocks?))\.(?P<number>\d+)\.")
_NOT_A_LINEAR_MAP = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|shared|router|gate|\w*_router|\w*expert_gate|A_log|D|\w*bias)(\.|$)"
)
_EMBEDDING = re.compile(r"(^|\.)(?!embed_out\b)(\w*embed\w*|wte|wpe|shared)(\.|$)")
_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)\.weight$")
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
    """Return the depth outside layers: 0 for embeddings, else 1.

    Embeddings are tables of tokens, positions and patches; a head of its own and final norms come after the layers.
    """
    return 0.0 if _EMBEDDING.search(name) else 1.0


def is_matrix(name: str, shape: Sequence[int], vocabulary: int | None) -> bool:
    """Say if a weight is a linear map or a stack.

    Vocabulary tables (embeddings, output heads; by name or by their size) and routers of expert mixtures are not, and
    neither are convolutions (channels, inputs, width) or stacks of vectors, such as the kernels (channels, 1, width) of
    a depthwise convolution and the biases (experts, outputs) of a mixture.
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


@dataclass(frozen=True)
class _Source:
    """A folder, known by the content of its tokenizer.json."""

    sha256: str
    folder: Path = field(compare=False)


def tokens_of(folder: Path) -> Mapping[str, int] | None:
    """Return token -> id of a fast tokenizer.

    Includes added tokens. None without a tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            source = _Source(hashlib.file_digest(file, "sha256").hexdigest(), folder)
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error}. Fetch it again.") from error
    return _tokens_in(source)


@lru_cache(maxsize=2)  # a base and an expert; as a rule they have one file, and 50,000 words take 0.15 s
def _tokens_in(source: _Source) -> Mapping[str, int]:
    values = _tokenizer(source.folder)
    if values is None:
        raise ModelError(f"{source.folder / 'tokenizer.json'} went missing while it was read. Fetch it again.")
    vocabulary = values["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in values.get("added_tokens") or ()}}


def special_tokens(folder: Path) -> dict[str, int]:
    """Return token -> id of a fast tokenizer's special tokens."""
    added = (_tokenizer(folder) or {}).get("added_tokens") or ()
    return {token["content"]: token["id"] for token in added if token.get("special")}


def _tokenizer(folder: Path) -> Mapping[str, Any] | None:
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        values = read_object(folder / "tokenizer.json")
        require_shape(values, _TOKENIZER)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {folder / 'tokenizer.json'}: {error}. Fetch it again.") from error
    return values


def config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder."""
    try:
        values = read_object(folder / "config.json")
        require_shape(values, _CONFIG)
        _require_few_layers(values)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {folder / 'config.json'}: {error}. Fetch or save the model again.") from error
    return values


def _require_few_layers(values: Mapping[str, Any]) -> None:
    """Raise ValueError for more layers than a model has.

    transformers would make them one by one.
    """
    for word, value in values.items():
        if isinstance(value, dict):
            _require_few_layers(value)
        elif isinstance(value, int | float) and value > MOST_LAYERS and _COUNT.fullmatch(word):
            raise ValueError(f"{word} is {value}, more than {MOST_LAYERS}")


def text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text part of a multimodal config, else an empty mapping."""
    return values.get("text_config") or {}


def setting(values: Mapping[str, Any], word: str) -> Any:
    """Return a field of a config, or of its text part."""
    return values.get(word, text_config(values).get(word))


def vocabulary_size(values: Mapping[str, Any]) -> int | None:
    """Return the rows of the vocabulary tables."""
    return values.get("vocab_size") or text_config(values).get("vocab_size")


def learned_positions(values: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the length of a table of positions, if any.

    Longer texts have no position there. Some tables hold two rows more.
    """
    most = setting(values, "max_position_embeddings") or setting(values, "n_positions")
    tables = [shape for name, shape in shapes.items() if _POSITIONS.search(name) and len(shape) == 2]
    return most if isinstance(most, int) and any(0 <= shape[0] - most <= 2 for shape in tables) else None


def optional_json(file: Path) -> dict[str, Any]:
    """Read a JSON file, {} without one. Raises ModelError if damaged."""
    try:
        return read_object(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {file}: {error}. Fetch it again.") from error


def chat_template(folder: Path) -> Any:
    """Return a model's chat template as stored: text, list or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_template(file)
    places = (optional_json(folder / f"{name}.json") for name in ("chat_template", "tokenizer_config"))
    return next((found for values in places if (found := values.get("chat_template"))), None)


@contextmanager
def foreign_errors(file: Path, library: str) -> Iterator[None]:
    """Turn a library's exceptions about a foreign file into a ModelError."""
    try:
        yield
    except (ContmergeError, OSError, MemoryError):  # of the disk, the Hub, the machine
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"{library} cannot read {file} ({why:.300}). Fetch or save it again.") from error


def read_template(file: Path) -> str:
    """Read a chat template. Raises ModelError for damage or size."""
    try:
        return read_text(file, most=_LARGEST_TEMPLATE)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {file}: {error}. Fetch it again.") from error
