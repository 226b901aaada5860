"""Loads whole models and peft adapters for training and scoring.

Safetensors only, and a model's own code only with consent. transformers and peft round to the nearest value, which
drops most of a usual update. Here weights of 16 bits get the values that a merge written in that dtype has.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config, foreign_errors, vocabulary_size
from hf_contmerge.models.contents import code_refused
from hf_contmerge.models.filling import held_tensors
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.lora.settings import check_loadable
from hf_contmerge.models.rounding import compared, rounded
from hf_contmerge.models.survival import Kept
from hf_contmerge.models.weights import Weights

LOG = logging.getLogger(__name__)

_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Kinds of models whose `out_proj` peft refuses: their kernels read the weight past the module."""

_OTHER_NAMES = {
    "num_local_experts": "num_experts",
    "logits_soft_cap": "final_logit_softcapping",
    "output_logit_soft_cap": "final_logit_softcapping",
}
"""Field of some configurations -> what others, and TRL, call it."""


def load_model(folder: Path, base: Path, *, as_adapter: bool = False, **init: Any) -> Any:
    """Load a model for training or scoring.

    Args:
        folder: a whole model, or an adapter of the base.
        base: the pretrained model below an adapter.
        as_adapter: keep an adapter separate, for further training; else merge it into the base in memory.
        init: dtype and other arguments of `from_pretrained`.

    Returns:
        A PreTrainedModel with the base's tensor names; a PeftModel for an adapter kept separate.

    Raises:
        ModelError: the model needs code of its own, or the adapter is a pickle or names other code.
    """
    if not is_adapter(folder):
        return _whole_model(folder, init)
    from peft import PeftModel

    model = _whole_model(base, init)
    check_loadable(folder)
    opened = PeftModel.from_pretrained(model, str(folder), is_trainable=as_adapter, torch_device=str(model.device))
    if as_adapter:
        return opened
    merged, _ = fold_adapter(opened)
    merged.requires_grad_(True)  # peft froze what the adapter was on
    merged.name_or_path = str(folder)
    return merged


def _whole_model(folder: Path, init: dict[str, Any]) -> Any:
    with code_by_consent(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, **{"trust_remote_code": False, **init, "use_safetensors": True}
        )
    complete_names(model)
    _round_again(model, Weights(folder))
    return model


def complete_names(model: Any) -> None:
    """Add the names by which TRL finds a model's parts.

    transformers (5.23) has `num_experts` for Mixtral and others, and not for Granite's, Phi's and Jet's mixtures;
    RecurrentGemma and xLSTM call the cap of their logits otherwise than Gemma, and would be trained without it;
    `base_model` of Llama 4's language model is the model itself. Nothing of this is written to files.
    """
    text = model.config.get_text_config()
    kind: Any = type(text)
    for own, name in _OTHER_NAMES.items():
        if hasattr(text, own) and not hasattr(text, name):
            kind.attribute_map = {**kind.attribute_map, name: own}
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


@torch.no_grad()
def _round_again(model: Any, weights: Weights) -> None:
    """Replace values rounded to nearest by transformers.

    Tensors on the meta device (offloaded) and sharded ones are left alone.
    """
    wide = {name for name in weights.floating() if weights.dtype(name).itemsize > 2}
    if not wide or not any(_is_half(t) for t in model.state_dict(keep_vars=True).values()):
        return
    halves = [each for each in held_tensors(model, weights) if _is_half(each.tensor)]
    for each in halves:
        each.fill(lambda name: weights.tensor(name).float(), wide)
    unknown = [f"{each.name} ({each.held.form})" for each in halves if each.held.form]
    if unknown:
        LOG.warning("%s: %d weights are rounded to nearest: %s ...", weights.folder, len(unknown), unknown[0])


def _is_half(tensor: Tensor) -> bool:
    return (
        tensor.is_floating_point() and tensor.itemsize == 2 and not tensor.is_meta and not hasattr(tensor, "placements")
    )


@torch.no_grad()
def fold_adapter(model: Any) -> tuple[Any, dict[str, Kept]]:
    """Fold an adapter into its model.

    Returns:
        The plain model, and what each folded weight of 16 bits keeps of its update.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[nn.Module, list[tuple[str, Any]]] = defaultdict(list)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer):
            layers[layer.get_base_layer()].append((name, layer))
    kept: dict[str, Kept] = {}
    for inner, around in layers.items():
        kept |= _fold_layer(inner, around)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return model.merge_and_unload(), kept


def _fold_layer(inner: nn.Module, around: list[tuple[str, Any]]) -> dict[str, Kept]:
    """Merge a layer's adapters in float32; round its weights once."""
    halves = {name: p for name, p in inner.named_parameters(recurse=False) if _is_half(p)}
    starts = {name: p.data for name, p in halves.items()}
    for name, p in halves.items():
        p.data = starts[name].float()
    for _, layer in around if halves else ():
        layer.merge()
    kept = {}
    for name, p in halves.items():
        start, exact, full = starts[name].float(), p.data, f"{around[0][0]}.{name}"
        p.data = rounded(exact, starts[name].dtype, name=full)
        kept[full] = compared(p.data, start, exact - start)
    return kept


def refused_targets(model_type: str) -> frozenset[str]:
    """Return last names of linear maps not adapted by peft.

    In mixtures, peft takes `gate_proj` outside the experts too for a part of the experts' stacks.
    """
    from peft.utils import transformers_weight_conversion as peft_rules

    if model_type in _MAMBA:
        return frozenset({"out_proj"})
    kind = getattr(peft_rules, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    fused = getattr(peft_rules, "_MOE_FUSED_TARGETS", {}).get(kind)
    return frozenset(getattr(peft_rules, "_MOE_TARGET_MODULE_MAPPING", {}).get(kind, ())) if fused else frozenset()


def load_tokenizer(folder: Path | str, *, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer.

    Raises ModelError if it needs custom code, or has tokens that the model in its folder lacks.
    """
    with foreign_errors(Path(folder), "transformers"), code_by_consent(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _check_tokens(tokenizer, Path(folder))
    return tokenizer


def _check_tokens(tokenizer: Any, folder: Path) -> None:
    """Raise ModelError for tokens beyond the rows of the model's table.

    Added tokens that nothing uses are warned of: some published models have them.
    """
    rows = vocabulary_size(config(folder)) if (folder / "config.json").is_file() else None
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows} if rows else {}
    if not beyond:
        return
    added = tokenizer.get_added_vocab()
    used = [token for token in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) if token in beyond]
    first = min(used or beyond, key=beyond.__getitem__)
    what = f"{folder}: the tokenizer has {first!r} at {beyond[first]}, and the model's table has {rows} rows"
    if not used and beyond.keys() <= added.keys():
        LOG.warning("%s. A text with one of these tokens (%d) cannot be read.", what, len(beyond))
        return
    raise ModelError(
        f"{what}. Save the model's own tokenizer there; or give the table those rows with "
        "`model.resize_token_embeddings(len(tokenizer))`, and save both."
    )


@contextmanager
def code_by_consent(folder: Path | str) -> Iterator[None]:
    """Turn transformers' refusal of a model's own code into a ModelError."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise code_refused(Path(folder)) from error


def plain_model(model: Any) -> Any:
    """Return the model inside peft's wrapper, with adapter layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def runs_own_code(model: Any) -> bool:
    """Say if a model in memory has custom code: it is trusted."""
    return type(plain_model(model)).__module__.startswith("transformers_modules.")


def recompute_activations(model: Any, options: Mapping[str, Any] | None = None) -> None:
    """Let layers compute their activations again in the backward pass.

    Not reentrant: a reentrant layer would have a backward pass of its own, and so several gradients per parameter.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, **(options or {})})


def keep_activations(model: Any) -> None:
    """Undo `recompute_activations`."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
