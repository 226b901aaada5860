"""TRL's loss against the model's own: caps, scales and layers behind the last hidden state."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys.architectures import ARCHITECTURES, PAIR, VISION, Tiny, build
from toys.models import toy_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from hf_contmerge.errors import ModelError
from hf_contmerge.loop.plan.rehearsal import rehearse
from hf_contmerge.models.loading import complete_names
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.training.data import StageData
from hf_contmerge.training.head import check_head

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
CAUSAL = [t for t in ARCHITECTURES if t.kind not in (PAIR, VISION) and not t.name.endswith("MaskedLM")]


def trainer_of(model: Any) -> Any:
    add_fused_lm_head(model)
    accelerator = SimpleNamespace(autocast=nullcontext, mixed_precision="no")
    return SimpleNamespace(model=model, accelerator=accelerator, is_fsdp_enabled=False, is_deepspeed_enabled=False)


def check(model: Any) -> None:
    complete_names(model)
    check_head(trainer_of(model))


@pytest.mark.parametrize("tiny", CAUSAL, ids=lambda tiny: tiny.name)
def test_loss_is_the_models_own(tiny: Tiny) -> None:
    model = build(tiny).train()
    check(model)
    assert model.training


def capped_gemma() -> Any:
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SMALL, num_key_value_heads=1, logits_soft_cap=0.1))


def capped_xlstm() -> Any:
    return xLSTMForCausalLM(
        xLSTMConfig(vocab_size=64, hidden_size=32, num_heads=2, num_hidden_layers=1, output_logit_soft_cap=0.1)
    )


@pytest.mark.parametrize("make", [capped_gemma, capped_xlstm])
def test_cap_by_another_name(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails with the name that TRL does not know: the model would be trained without its cap."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for weight in model.get_output_embeddings().parameters():
            weight.mul_(20)
    text = type(model.config)
    monkeypatch.setattr(text, "attribute_map", {k: v for k, v in text.attribute_map.items() if "logit" not in v})
    with pytest.raises(ModelError, match="log-probability of a token is another by"):
        check_head(trainer_of(model))
    check(model)


class Scaled(LlamaForCausalLM):
    """A model of somebody's own, which scales its logits in its code."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


def test_scale_in_a_models_own_code() -> None:
    torch.manual_seed(0)
    model = Scaled(LlamaConfig(**SMALL, initializer_range=0.5))
    with pytest.raises(ModelError, match=r"^Scaled cannot be trained here: its log-probability of a token is"):
        check(model)


def behind_the_layers() -> list[Any]:
    words = {**SMALL, "vocab_size": len(toy_tokenizer()), "pad_token_id": 0}
    return [
        ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**words)),
        RobertaForCausalLM(RobertaConfig(**words, is_decoder=True)),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_layers_behind_the_last_state_are_refused_before_work(number: int, tmp_path: Path) -> None:
    """The loss of TRL leaves them out; they would keep their start, and the others would learn a wrong loss."""
    model = behind_the_layers()[number]
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be trained here: it has weights behind its layers \(lm_head.dense"):
        rehearse(Train(), StageData(train=[], heldout=None, form="text"), tmp_path, "train")  # pyright: ignore[reportArgumentType]
