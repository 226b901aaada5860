"""Checks names and shapes against the base model, before training."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from hf_contmerge.errors import ModelError
from hf_contmerge.models._converted import Converted
from hf_contmerge.models.architecture import Architecture, find_architecture, load_config
from hf_contmerge.models.config import config
from hf_contmerge.models.contents import auto_classes, code_refused
from hf_contmerge.models.lora.matching import StoredNames
from hf_contmerge.models.reading import known_architecture, read, tied_flag
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.versions import version

LOG = logging.getLogger(__name__)

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|proj_out|decoder|output\w*)\.(weight|bias)$")
_FIX = "Use the base's architecture and tokenizer, without added tokens."


def check_layout(model: Any, base: Weights) -> None:
    """Raise ModelError if a model's tensors differ from the base's.

    Some architectures hold weights in another form in memory than in their files (stacks of experts). For those, only
    names in both forms are compared here; the trained weights are compared in full when they are added.
    """
    ours = _tensors(model)
    names = StoredNames(base)
    stored = {name: names.find(name) for name in ours}
    common = {name: match for name, match in stored.items() if match}
    for name, match in common.items():
        if ours[name] != base.shape(match):
            raise ModelError(
                f"{name} has shape {ours[name]} in the model to train, {base.shape(match)} in {base.folder}. {_FIX}"
            )
    extra = [name for name in ours if name not in common]
    missing = sorted(set(base.names) - set(common.values()))
    if not common or (extra and not missing):
        raise ModelError(f"The model to train has {_brief(extra)}, which {base.folder} lacks. {_FIX}")
    if missing and not extra:
        raise ModelError(f"The model to train lacks {_brief(missing)} of {base.folder}. {_FIX}")


def _tensors(model: Any) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors saved by `save_pretrained`."""
    kept = model.state_dict()
    tensors = [*model.named_parameters(), *model.named_buffers()]  # lists tied tensors once
    return {name: tuple(t.shape) for name, t in tensors if name in kept}


def _brief(names: Iterable[str]) -> str:
    listed = list(names)
    return listed[0] + (f" and {len(listed) - 1} more tensors" if len(listed) > 1 else "")


def check_same_layout(base: Path, other: Path) -> None:
    """Raise ModelError if names, shapes or vocabulary of two models differ."""
    weights_like(Weights(base), other)


def weights_like(base: Weights, folder: Path) -> Weights:
    """Open a model's weights under the names of its base.

    Names may differ where transformers loads both into the same weight: an old prefix, a renamed module, a head stored
    or tied. Tensors that transformers does not load keep the base's values where this model lacks them.

    Raises:
        ModelError: the model does not fit the base.
    """
    other = Weights(folder)
    if base.vocabulary != other.vocabulary:
        raise ModelError(
            f"{folder} has a vocabulary of {other.vocabulary}, {base.folder} of {base.vocabulary}: their rows do not "
            "correspond. Train the expert with the base's tokenizer, without new tokens."
        )
    if set(base.names) == set(other.names) and tied_flag(base.folder) == tied_flag(folder):
        return _view(base, other, {name: name for name in base.names})
    ours = known_architecture(base.folder, base.names)
    theirs = ours and find_architecture(base.folder, tied=_is_tied(folder, ours))
    if ours and theirs:
        return _view(base, other, *_matched(base, other, ours, theirs))
    _require(base, other, set(base.names) - set(other.names), set(other.names) - set(base.names))
    return _view(base, other, {name: name for name in base.names})


def _view(base: Weights, other: Weights, names: Mapping[str, str], made: Converted | None = None) -> Weights:
    for name, own in names.items():
        if base.shape(name) != other.shape(own):
            raise ModelError(
                f"{name} has shape {other.shape(own)} in {other.folder}, {base.shape(name)} in {base.folder}. "
                "Both must have the same architecture and size."
            )
    return other.renamed(names, base, made.readers if made else None)


def _matched(
    base: Weights, other: Weights, ours: Architecture, theirs: Architecture
) -> tuple[dict[str, str], Converted]:
    """Match all weights loaded by transformers.

    Returns:
        The base's name -> the other model's, and the tensors that it holds in another form.
    """
    mine, yours = read(ours, base.shapes(), base.equal), read(theirs, other.shapes(), other.equal)
    own = {place.key: name for name, place in yours.places.items()}
    held = {**yours.shared, **own}
    keys = {name: mine.places[name].key for name in base.names if name in mine.places}
    made = Converted(ours, base, other)
    for name, key in keys.items():
        if key not in held:
            made.add(name, mine.places, yours.places)
    missing = {name for name, key in keys.items() if key not in held} - made.readers.keys()
    extra = {name for key, name in own.items() if key not in keys.values()} - made.taken
    _require(base, other, missing, extra)
    found = {name: held[key] for name, key in keys.items() if name not in made.readers}
    return found | _ignored(base, other, set(keys), set(own.values())), made


def _ignored(base: Weights, other: Weights, loaded: set[str], theirs: set[str]) -> dict[str, str]:
    """Return the tensors loaded from neither model: they keep the base's values."""
    rest = [name for name in base.names if name not in loaded]
    both = {name: name for name in rest if name in other.names and base.shape(name) == other.shape(name)}
    if kept := [name for name in rest if name not in both]:
        LOG.info("%s lacks %s, not loaded by transformers: the base's is kept", other.folder, _brief(kept))
    if left := sorted(set(other.names) - theirs - both.keys()):
        own = known_architecture(other.folder, other.names)  # may be deeper than the base's
        _require(base, other, set(), set(own.places(left)) if own else set())
        LOG.info("%s holds %s, not loaded by transformers: left out", other.folder, _brief(left))
    return both


def _is_tied(folder: Path, architecture: Architecture) -> bool:
    """Return a model's `tie_word_embeddings`, by default the base's."""
    flag = tied_flag(folder)
    if flag is None and (settings := load_config(folder)):
        flag = getattr(settings, "tie_word_embeddings", None)
    return bool(architecture.model.config.tie_word_embeddings if flag is None else flag)


def _require(base: Weights, other: Weights, missing: set[str], extra: set[str]) -> None:
    """Raise ModelError for weights of one model only."""
    if not missing and not extra:
        return
    if extra and not missing and tied_flag(base.folder) is not False and all(_HEAD.search(name) for name in extra):
        raise ModelError(
            f"{other.folder} stores {min(extra)} apart from its input table, while {base.folder} ties both: one stored "
            "table cannot hold two. Save the base with `tie_word_embeddings: false` and its head, or tie the expert."
        )
    which = f"lacks {_brief(sorted(missing))}" if missing else f"has {_brief(sorted(extra))}, which the base lacks"
    raise ModelError(f"{other.folder} does not fit {base.folder}: it {which}. Both must have the same architecture.")


def check_loads(folder: Path, *, trusted: bool, language: bool = True) -> None:
    """Raise ModelError for a model beyond transformers.

    Args:
        folder: of a whole model.
        trusted: whether the user allows code of the model's own.
        language: whether it is to be trained or run, as a language model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer

    classes, mapping = auto_classes(folder), cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)
    if trusted and classes:
        return
    settings = load_config(folder)
    if settings is None and not classes:
        raise ModelError(
            f"transformers {version('transformers')} does not know the model_type {config(folder).get('model_type')!r} "
            f"of {folder}. Update transformers. Merging alone (`contmerge merge`) needs no architecture."
        )
    known = settings is not None and ("AutoModelForCausalLM" not in classes or type(settings) in mapping)
    if known and "AutoTokenizer" in classes:
        try:
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except ValueError:
            known = False
    if not known:
        raise code_refused(folder)
    if language and "AutoModelForCausalLM" not in classes and type(settings) not in mapping:
        kind = (config(folder).get("architectures") or [type(settings).__name__])[0]
        raise ModelError(
            f"{folder} is a {kind}, which transformers does not load as a language model (AutoModelForCausalLM). It "
            "can be merged (`contmerge merge`, `mergekit-yaml`, a recipe without datasets and tasks), and not be "
            "trained, measured or talked to here."
        )


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError if a model folder has no tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json or tokenizer.model). Save the model's tokenizer there."
        )
