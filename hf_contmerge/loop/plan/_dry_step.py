"""Dry run of a training step or scoring batch.

The model is made from its config under PyTorch's FakeTensorMode: tensors have shape, dtype and storage but no data. A
dispatch mode counts live bytes, moved bytes and floating-point operations. This measures the memory of activations,
logits, checkpointing and adapters for any architecture, without a formula for each.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import config
from hf_contmerge.models.loading import complete_names, recompute_activations
from hf_contmerge.runtime.versions import version
from hf_contmerge.train_strategies import Combined
from hf_contmerge.train_strategies.full import Full
from hf_contmerge.train_strategies.gpm import linear_maps
from hf_contmerge.train_strategies.lora import Lora

_ADAM_BYTES = 8  # two float32 moments per trained parameter
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")  # the last two arguments are matrices or stacks of matrices
_FUSED_OUTPUTS = ("log_probs", "entropy", "is_top1")  # the outputs requested by SFTTrainer
_METERED: dict[str, StepCost] = {}
"""Costs of this process, by model and step."""


@dataclass
class Work:
    """Counted operations."""

    products: Counter[tuple[int, int, int, torch.dtype]] = field(default_factory=Counter)
    """Floating-point operations of matrix products, by (rows, inner, columns, dtype of the factors)."""
    flops: Counter[torch.dtype] = field(default_factory=Counter)
    """Other floating-point operations (attention), by the dtype of the factors."""
    moved: int = 0
    """Bytes read and written by all other operations."""
    calls: int = 0


@dataclass(frozen=True)
class StepCost:
    """Memory (bytes) and work of one step."""

    held: int
    """Weights and optimizer state."""
    peak: int
    """`held`, gradients and activations."""
    trained: int
    """Number of trained parameters."""
    work: Work
    lora_a: int = 0
    """Number of trained parameters in LoRA's A matrices."""
    inputs: int = 0
    """Widths of the trained linear maps' inputs, added up."""


def training_step(
    folder: Path, strategies: Combined, settings: Any, *, batch: int, length: int, init: dict[str, Any]
) -> StepCost:
    """Return the cost of one training step.

    Args:
        folder: model folder; only config.json is read.
        strategies: the stage's strategies. The carrier selects the trained parameters; the others add their bytes per
            parameter.
        settings: the stage's SFTConfig; dtype, accumulation and checkpointing are used.
        batch: rows of a micro-batch.
        length: tokens of the longest example of a batch.
        init: keyword arguments of `from_pretrained`.

    Raises:
        ModelError: transformers cannot make a model from this config.
    """
    carrier = strategies.carrier
    step = _TrainingStep(
        lora=carrier if isinstance(carrier, Lora) else None,
        shape=(batch, length),
        passes=min(settings.gradient_accumulation_steps, 2),
        autocast=settings.bf16 or settings.fp16,
        checkpointing=(settings.gradient_checkpointing_kwargs or {}) if settings.gradient_checkpointing else None,
        moments=_moments(str(settings.optim)),
    )
    cost = _once(folder, init, step, partial(_meter_training, folder, init, step))
    added = _added_bytes(strategies, _model(folder, init))
    return replace(cost, held=cost.held + added, peak=cost.peak + added)


class _TrainingStep(NamedTuple):
    """What the cost of a step depends on, next to the model."""

    lora: Lora | None
    shape: tuple[int, int]
    """Rows and tokens of a micro-batch."""
    passes: int
    """Micro-batches, at most two: from the second on, gradients exist."""
    autocast: bool
    checkpointing: dict[str, Any] | None
    """Arguments of gradient checkpointing; None: without."""
    moments: int
    """The optimizer's bytes per trained parameter."""


def _meter_training(folder: Path, init: dict[str, Any], step: _TrainingStep) -> StepCost:
    from trl.trainer.utils import add_fused_lm_head

    model = _model(folder, init).train()
    if step.checkpointing is not None:
        recompute_activations(model, step.checkpointing or None)
    add_fused_lm_head(model, outputs=_FUSED_OUTPUTS)
    # Other carriers may decompose weights at the start, which needs data; their bytes per parameter cover that.
    # QLoRA is LoRA on smaller weights.
    opened = Lora.open(step.lora, model, None) if step.lora else model
    with _metering(folder) as meter:
        _materialise(opened)
        weights = meter.restart()
        inputs = torch.zeros(step.shape, dtype=torch.long)
        for _ in range(step.passes):
            meter.work = Work()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step.autocast):
                out = opened(input_ids=inputs, labels=inputs, fused_lm_head=True, use_cache=False)
                loss = -out.log_probs.sum()
            loss.backward()
            del out, loss
    counts = {name: p.numel() for name, p in opened.named_parameters() if p.requires_grad}
    trained, lora_a = sum(counts.values()), sum(count for name, count in counts.items() if ".lora_A." in name)
    held = weights + trained * step.moments
    widths = sum(layer.in_features for layer in linear_maps(opened).values())
    return StepCost(held, held + meter.peak - weights, trained, meter.work, lora_a, widths)


def scoring_batch(folder: Path, *, batch: int, length: int, init: dict[str, Any]) -> StepCost:
    """Return lm-eval's cost of one batch.

    It is a forward pass and a float32 softmax over all logits. `init`: keyword arguments of `from_pretrained`.
    """
    return _once(folder, init, (batch, length), partial(_meter_scoring, folder, init, (batch, length)))


def _meter_scoring(folder: Path, init: dict[str, Any], shape: tuple[int, int]) -> StepCost:
    model = _model(folder, init).eval()
    with _metering(folder) as meter, torch.no_grad():
        _materialise(model)
        weights = meter.restart()
        logits = model(input_ids=torch.zeros(shape, dtype=torch.long)).logits
        scores = torch.nn.functional.log_softmax(logits, dim=-1, dtype=torch.float32)
        del logits, scores
    return StepCost(weights, meter.peak, 0, meter.work)


def _once(folder: Path, init: dict[str, Any], step: tuple[Any, ...], meter: Callable[[], StepCost]) -> StepCost:
    """Meter a step of a model; give an equal step's known cost.

    The settings of a study mostly differ in what costs nothing. The key has the config, since each plan has its own
    copy of the file, and the folder where a model brings code.
    """
    code = folder if init["trust_remote_code"] else None
    key = repr((config(folder), code, sorted(init.items()), step))
    if key not in _METERED:
        _METERED[key] = meter()
    return _METERED[key]


def _model(folder: Path, init: dict[str, Any]) -> Any:
    """Make a model on the meta device.

    peft cannot move fake tensors.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=init["trust_remote_code"])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **init)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(f"transformers cannot make a model from {folder / 'config.json'}: {error}") from error
    complete_names(model)
    return model


def _materialise(model: torch.nn.Module) -> None:
    """Replace meta tensors by fake ones; keep ties."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                own[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]


def _added_bytes(strategies: Combined, model: Any) -> int:
    """Return the strategies' bytes missing from the dry step."""
    carrier = strategies.carrier
    counted = Lora if isinstance(carrier, Lora) else Full
    more = (carrier.bytes_per_parameter - counted.bytes_per_parameter) * sum(p.numel() for p in model.parameters())
    return more + sum(part.added_bytes(model) for part in strategies.parts.values() if part is not carrier)


def _moments(optimizer: str) -> int:
    """Return an optimizer's bytes per trained parameter."""
    name = optimizer.lower()
    if "8bit" in name:
        return 2
    return 0 if "sgd" in name or "adafactor" in name else _ADAM_BYTES


@contextmanager
def _metering(folder: Path) -> Iterator[_Meter]:
    try:
        with FakeTensorMode(), _Meter() as meter:
            yield meter
    except DataDependentOutputException as error:
        raise ModelError(
            f"The layers of {folder} compute what their data says ({error}), so a plan cannot estimate them without "
            "weights. Training and scoring are not affected: start the run without a plan."
        ) from error
    except Exception as error:  # code of others may fail in any way
        raise ModelError(
            f"A step of {folder} without weights ends with {type(error).__name__}: {error}. Either this trl "
            f"({version('trl')}) and transformers ({version('transformers')}) cannot run it, or not without weights. "
            "Try one step: --set train.max_steps=1 --until train."
        ) from error


class _Meter(TorchDispatchMode):
    """Counts live storages, moved bytes and floating-point operations."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.work = Work()
        self._sizes: dict[int, int] = {}

    def restart(self) -> int:
        """Reset peak and work; return the live bytes."""
        self.peak, self.work = self.live, Work()
        return self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        grouped = func is torch.ops.aten._grouped_mm.default
        out = _grouped_product(*args, **kwargs) if grouped else func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        inputs = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in inputs]
        for tensor in fresh:
            self._watch(tensor.untyped_storage())
        if fresh or func._schema.is_mutable:
            self._count(func, args, kwargs, out, [*given, *made])
        self.peak = max(self.peak, self.live)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, tensors: list[Tensor]) -> None:
        self.work.calls += 1
        packet = func._overloadpacket
        name = str(packet).rpartition(".")[2]
        if name == "_grouped_mm":
            rows, inner, columns, groups = _grouped_sizes(args[0], args[1], args[2])
            self.work.products[rows, inner, columns, args[0].dtype] += 2 * groups * rows * inner * columns
            return
        flops = flop_registry.get(packet) or flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
        if flops and name in _PRODUCTS:
            left, right = [t for t in args if isinstance(t, Tensor)][-2:]
            shape = (left.shape[-2], left.shape[-1], right.shape[-1], left.dtype)
            self.work.products[shape] += flops(*args, **kwargs, out_val=out)
        elif flops:
            self.work.flops[tensors[0].dtype] += flops(*args, **kwargs, out_val=out)
        else:
            self.work.moved += sum(t.numel() * t.element_size() for t in tensors)


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, _bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Return an empty product of a mixture's experts.

    PyTorch's own shape rule takes bfloat16 only, unlike its kernels.
    """
    groups = [len(offs)] if left.dim() == right.dim() == 2 else []
    return left.new_empty((*groups, left.shape[-2], right.shape[-1]), dtype=out_dtype or left.dtype)


def _grouped_sizes(left: Tensor, right: Tensor, offs: Tensor) -> tuple[int, int, int, int]:
    """Return one expert's rows, inner size, columns, and the number of experts.

    Tokens are taken to be spread evenly.
    """
    groups = len(offs)
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    if left.dim() == right.dim() == 2:
        return rows, max(inner // groups, 1), columns, groups
    return (max(rows // groups, 1), inner, columns, groups) if left.dim() == 2 else (rows, inner, columns, groups)
