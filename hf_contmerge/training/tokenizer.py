"""The tokenizer of a recipe's stages: base, end, padding, chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from hf_contmerge.errors import RecipeError
from hf_contmerge.models.config import read_template
from hf_contmerge.models.folder import hub_errors, model_path
from hf_contmerge.models.loading import load_tokenizer
from hf_contmerge.models.tokenizer import UNCHANGED, Token, TokenizerChange
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.foreign import expanded
from hf_contmerge.training._extras import EXTRAS, template_arguments

LOG = logging.getLogger(__name__)

_JINJA = (".jinja", ".j2")


def stage_tokenizer(base: Path, train: Train, *, trust_remote_code: bool = False) -> Any:
    """Load the stages' tokenizer.

    Raises RecipeError for a token or a template that would need other weights than the base's.
    """
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    fields = train.sft_fields
    if fields.get("chat_template_path"):
        _take_template(tokenizer, fields["chat_template_path"], base)
    for field in ("eos_token", "pad_token"):
        if fields.get(field):
            _require_token(tokenizer, fields[field], f"train.{field}", base)
            setattr(tokenizer, field, fields[field])
    return tokenizer


def stage_change(base: Path, train: Train, *, trust_remote_code: bool = False) -> TokenizerChange:
    """Return how a recipe changes the base's tokenizer. Raises RecipeError."""
    if not train.changes_tokenizer:
        return UNCHANGED
    plain = load_tokenizer(base, trust_remote_code=trust_remote_code)
    tokenizer = stage_tokenizer(base, train, trust_remote_code=trust_remote_code)
    eos, pad = (
        Token(getattr(tokenizer, name), tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)))
        if getattr(tokenizer, name) != getattr(plain, name)
        else None
        for name in ("eos_token", "pad_token")
    )
    template = tokenizer.chat_template if tokenizer.chat_template != plain.chat_template else None
    return TokenizerChange(eos, pad, template)


def _take_template(tokenizer: Any, path: str, base: Path) -> None:
    """Set a template from a file, or another tokenizer's with its end."""
    file = expanded(path)
    if file.suffix in _JINJA:
        if not file.is_file():
            raise RecipeError(f"train.chat_template_path: there is no file {file}. Give a .jinja file, or a tokenizer.")
        tokenizer.chat_template = read_template(file)
    else:
        other = _other_tokenizer(path)
        missing = [token for token in _used_tokens(other) if token not in tokenizer.get_vocab()]
        if missing:
            raise RecipeError(
                f"train.chat_template_path: {path} has {len(missing)} tokens that the tokenizer of {base} lacks "
                f"({', '.join(map(repr, missing[:3]))}{', ...' if len(missing) > 3 else ''}). The embedding would grow "
                "for them, and the expert could not be merged. Give a .jinja file that uses the base's tokens, or a "
                "base model that has these tokens."
            )
        tokenizer.chat_template, tokenizer.eos_token = other.get_chat_template(), other.eos_token
    _check_syntax(tokenizer, path)


def _other_tokenizer(path: str) -> Any:
    folder = model_path(path)
    if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
        raise RecipeError(f"train.chat_template_path: {folder} has no tokenizer. Give a .jinja file, or a tokenizer.")
    with hub_errors(path):
        other = load_tokenizer(folder if folder.is_dir() else path)
    if not other.chat_template:
        raise RecipeError(f"train.chat_template_path: the tokenizer of {path} has no chat template. Name another.")
    return other


def _used_tokens(tokenizer: Any) -> list[str]:
    """Return the added tokens, and the end."""
    return list(dict.fromkeys([*(t.content for t in tokenizer.added_tokens_decoder.values()), tokenizer.eos_token]))


def _check_syntax(tokenizer: Any, path: str) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateSyntaxError, SyntaxError, RecursionError) as error:
        raise RecipeError(f"train.chat_template_path: {path} is no Jinja template: {error}.") from error
    except MemoryError:
        raise
    except Exception:  # a template may refuse these turns; the stage's are rendered before any training
        LOG.debug("%s refuses the turns %s", path, turns)


def _require_token(tokenizer: Any, token: str, where: str, base: Path) -> None:
    if token not in tokenizer.get_vocab():
        raise RecipeError(
            f"{where}: the tokenizer of {base} has no token {token!r}. Name one of its tokens; another would need a "
            "larger embedding, and the expert could not be merged."
        )


def count_tokens(tokenizer: Any, example: Mapping[str, Any]) -> list[int]:
    """Return the tokens of an example, or of a pair's two."""
    extras = template_arguments(example)
    values = {name: value for name, value in example.items() if name not in EXTRAS and not isinstance(value, bool)}
    if "rejected" not in values:
        return [_tokens(tokenizer, list(values.values()), extras)]
    return [_tokens(tokenizer, [values["prompt"], values[answer]], extras) for answer in ("chosen", "rejected")]


def _tokens(tokenizer: Any, values: list[Any], extras: dict[str, Any]) -> int:
    if any(isinstance(value, list) for value in values):
        turns = [turn for value in values for turn in (value if isinstance(value, list) else [])]
        text = tokenizer.apply_chat_template(turns, tokenize=False, **extras)
        return len(tokenizer(text, verbose=False)["input_ids"])
    return 1 + len(tokenizer("".join(map(str, values)), verbose=False)["input_ids"])
