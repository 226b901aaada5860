"""LoRA: low-rank additions, folded in or kept as an adapter.

Hu et al., ICLR 2022, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_contmerge.models.loading import fold_adapter, plain_model
from hf_contmerge.models.lora.settings import check_to_train
from hf_contmerge.runtime.patterns import require_quick_lora
from hf_contmerge.train_strategies import TrainStrategy
from hf_contmerge.train_strategies._weights import trained


@dataclass(init=False)
class Lora(TrainStrategy):
    """W <- W + (alpha / r) B A. Parameters: peft's LoraConfig.

    With `keep` the expert is a peft adapter of the base, not a whole model, and a stage that starts from the one before
    goes on training that same adapter, with the settings that it has.
    """

    carrier = True
    bytes_per_parameter = 5
    opens_on_meta = True

    config: dict[str, Any]
    keep: bool

    def __init__(self, *, keep: bool = False, **config: Any) -> None:
        from peft import LoraConfig

        chosen = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
        require_quick_lora(chosen)
        LoraConfig(**chosen)  # says at once what it does not know
        check_to_train(chosen, keep=keep)
        self.config, self.keep = chosen, keep

    def keeps_adapter(self) -> bool:
        return self.keep

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        from peft import LoraConfig, PeftModel, get_peft_model

        if isinstance(model, PeftModel):
            return model
        config = LoraConfig(**self.config)
        if self.config["target_modules"] == "all-linear" and not config.exclude_modules:
            config.exclude_modules = _tuple_routers(model) or None
        tied = _is_tied(model)
        opened = get_peft_model(model, config)
        _check_tables(opened, config, tied=tied)
        if config.lora_bias:
            _check_biases(opened)
        return opened

    def close(self, model: Any) -> PreTrainedModel:
        if self.keep:
            return model
        plain, self.kept_by_rounding = fold_adapter(model)
        return plain


def _is_tied(model: Any) -> bool:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(table, "weight", head)


def _check_tables(opened: Any, config: Any, *, tied: bool) -> None:
    """Raise ValueError for tables that cannot be adapted.

    `tied`: whether head and token embedding are one, of which peft adapts one use alone: folded in, it changes both.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    plain = plain_model(opened)
    tables = [plain.get_output_embeddings(), plain.get_input_embeddings()]
    changed = [table for table in tables if isinstance(table, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    kept_one = config.ensure_weight_tying and all(isinstance(table, ModulesToSaveWrapper) for table in changed)
    if tied and changed and not kept_one:
        raise ValueError(
            "the token embedding and the head are one table here (tie_word_embeddings), and the adapter would change "
            "one use of it alone. Leave it out of target_modules and trainable_token_indices; or train all of it: "
            "`modules_to_save: [embed_tokens]` with `ensure_weight_tying: true`"
        )
    if isinstance(tables[0], TrainableTokensWrapper):
        raise ValueError(
            "trainable_token_indices cannot be of the head, whose weight TRL reads itself; name the embedding"
        )


def _check_biases(opened: nn.Module) -> None:
    """Raise ValueError for a bias that nothing can take."""
    from peft.tuners.lora import LoraLayer

    for name, layer in opened.named_modules():
        if isinstance(layer, LoraLayer) and getattr(layer.base_layer, "bias", None) is None:
            raise ValueError(f"lora_bias needs layers with a bias to fold it into, and {name} has none; remove it")


def _tuple_routers(model: nn.Module) -> list[str]:
    """Return the last names of linear layers that return several tensors.

    peft would wrap the routers of Phi's and Llama 4's mixtures, and fail in the first step.
    """
    layers = ((name, type(layer).__name__) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    return sorted({name.rpartition(".")[2] for name, kind in layers if kind.endswith("Router")})


def trained_a(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each linear layer's name and its A (r, in)."""
    for name, weight in trained(model):
        module, found, _ = name.partition(".lora_A.")
        if found:
            yield module, weight


def whole(weight: Tensor) -> Tensor:
    """Return a whole weight on the CPU; all ranks call this."""
    full = getattr(weight.detach(), "full_tensor", None)  # of a DTensor
    return (full() if full else weight.detach()).float().cpu().contiguous()
