"""Compares the meaning of two models' weights: configuration and tokens.

Shapes do not show another rotary base, number of heads or activation, nor a vocabulary with other words at the same
numbers. Sums of such weights belong to no model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError
from hf_contmerge.models.architecture import load_config
from hf_contmerge.models.config import chat_template, config, optional_json, setting, tokens_of

LOG = logging.getLogger(__name__)

_HARMLESS = re.compile(
    r"(^|\.)(architectures|auto_map|_?name_or_path|transformers_version|(torch_)?dtype|use_cache|tie_\w+|initializer_\w+"
    r"|\w*dropout\w*|pdrop|\w+_pdrop|(id2label|label2id)(\..*)?|num_labels|problem_type|task_specific_params(\..*)?"
    r"|finetuning_task|pretraining_tp|output_\w+|return_dict|use_return_dict|router_\w+|\w*aux_loss\w*|gradient_\w+"
    r"|_?attn_implementation\w*|_experts_implementation\w*|torchscript|use_bfloat16|chunk_size_feed_forward|is_decoder"
    r"|summary_\w+|prefix|\w+_token_id|(forced|begin|suppress)_\w+|quantization_config(\..*)?|vocab_size"
    r"|max_position_embeddings|transformers_weights|_\w+)$"
)
_NOTED = ("eos_token_id", "bos_token_id", "max_position_embeddings")
_MEANING = re.compile(
    r"(^|\.)(model_type|hidden_act\w*|activation\w*|\w*num_\w*heads|n_head|head_dim|rope_\w+(\..*)?|rotary\w*|\w*_eps"
    r"|\w*norm_epsilon|sliding_window|layer_types(\..*)?|num_experts_per_tok|norm_topk_prob)$"
)
"""Fields compared for architectures unknown to transformers, whose other fields may be notes of a trainer."""

_KEPT = "a merged model has the base's, unless hf_contmerge trained the expert."
_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def check_function(base: Path, other: Path) -> None:
    """Compare an expert's configuration and tokens with the base's; log losses.

    Raises:
        ModelError: equal weights or tokens mean something else than in the base.
    """
    check_meaning(base, other)
    for sentence in _notes(base, other):
        LOG.warning("%s", sentence)


def check_meaning(base: Path, other: Path) -> None:
    """Raise ModelError if config.json or the tokenizer give weights another meaning."""
    check_config(base, other)
    check_tokens(base, other)


def check_config(base: Path, other: Path) -> None:
    """Raise ModelError if config.json gives equal weights another function."""
    ours, theirs = _meanings(base, other)
    different = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if different:
        word = next((key for key in different if key == "model_type"), different[0])
        more = f" (also {', '.join(w for w in different if w != word)})" if len(different) > 1 else ""
        raise ModelError(
            f"{other} has {word} {theirs.get(word)!r} in config.json, {base} has {ours.get(word)!r}{more}: equal "
            "weights compute another function there. Use a model that was trained from this base. If its weights do "
            "fit, correct config.json, or give --force to `contmerge merge`."
        )


def _meanings(base: Path, other: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of both configurations with an effect on weights' meaning.

    Spellings and defaults change between releases, so that files that differ are read by transformers.
    """
    files = config(base), config(other)
    ours, theirs = (dict(_fields(values)) for values in files)
    if ours == theirs or files[0].get("model_type") != files[1].get("model_type"):
        return ours, theirs
    settings = [load_config(folder) for folder in (base, other)]
    if None in settings:
        return tuple({k: v for k, v in _raw(f).items() if _MEANING.search(k)} for f in files)  # pyright: ignore
    known = dict(_fields(type(settings[0])().to_dict())).keys()
    both = [dict(_fields(s.to_dict())) for s in settings]
    kept = [{k: v for k, v in fields.items() if k.partition(".")[0] in _tops(known)} for fields in both]
    return kept[0], kept[1]


def _tops(keys: Any) -> set[str]:
    return {key.partition(".")[0] for key in keys} | {"rope_parameters", "rope_scaling", "layer_types"}


def _raw(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's fields with one spelling for rotary embeddings."""
    fields = dict(_fields(values))
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    rope = {"rope_theta": values.get("rope_theta"), **rope, "rope_type": rope.get("rope_type", rope.get("type"))}
    return {k: v for k, v in fields.items() if not k.startswith("rope_")} | {
        f"rope_parameters.{k}": v for k, v in rope.items() if k != "type" and v not in (None, "default")
    }


def _fields(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of a configuration, without harmless and empty fields."""
    for word, value in values.items():
        name = f"{before}{word}"
        if isinstance(value, Mapping) and not _HARMLESS.search(name):
            yield from _fields(value, f"{name}.")
        elif value is not None and not _HARMLESS.search(name):
            yield name, value


def check_tokens(base: Path, other: Path) -> None:
    """Raise ModelError if equal numbers are other tokens in another model."""
    ours, theirs = _tokens(base), _tokens(other)
    if ours is None or theirs is None:  # another kind of tokenizer; vocabulary sizes were compared before
        return _check_files(base, other)
    moved = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    numbers = {number: token for token, number in ours.items()}
    renamed = sorted(t for t, number in theirs.items() if t not in ours and number in numbers)
    if moved or renamed:
        token = (moved or renamed)[0]
        was = ours.get(token, numbers.get(theirs[token]))
        raise ModelError(
            f"The tokenizers of {other} and {base} differ: {token!r} is token {theirs[token]} there, but {was!r} here. "
            "The embedding rows do not correspond. Use models with one tokenizer."
        )
    return None


def _tokens(folder: Path) -> dict[str, int] | None:
    """Return token -> id, with the tokens added outside tokenizer.json."""
    tokens = tokens_of(folder)
    if tokens is None:
        return None
    added = optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    entries = added.items() if isinstance(added, dict) else ()
    listed = {t.get("content"): int(n) for n, t in entries if isinstance(t, dict) and n.isdecimal()}
    more = {**listed, **optional_json(folder / "added_tokens.json")}
    return {**tokens, **{t: n for t, n in more.items() if isinstance(t, str) and isinstance(n, int)}}


def _check_files(base: Path, other: Path) -> None:
    """Compare the vocabularies of tokenizers without tokenizer.json, byte by byte."""
    for name in _VOCABULARIES:
        pair = base / name, other / name
        if all(path.is_file() for path in pair) and pair[0].read_bytes() != pair[1].read_bytes():
            raise ModelError(
                f"The tokenizers of {other} and {base} differ: {name} is another file. The embedding rows may not "
                "correspond. Use models with one tokenizer."
            )


def _notes(base: Path, other: Path) -> Iterator[str]:
    """Yield the properties taken from the base alone."""
    ours, theirs = _tokens(base) or {}, _tokens(other) or {}
    if new := sorted(theirs.keys() - ours.keys()) if ours else []:
        more = f" and {len(new) - 1} more tokens" if len(new) > 1 else ""
        yield f"{other} adds {new[0]!r}{more} to the tokenizer of {base}; a merged model has the base's tokenizer."
    files = config(base), config(other)
    for word in _NOTED:
        pair = [setting(values, word) for values in files]
        if None not in pair and pair[0] != pair[1]:
            yield f"{other} has {word} {pair[1]}, {base} has {pair[0]}; {_KEPT}"
    if ours and theirs and chat_template(base) != chat_template(other) and chat_template(other):
        yield f"{other} has another chat template than {base}; {_KEPT}"
