"""GPM: gradient projection memory, over the inputs of earlier stages.

Saha, Garg and Roy, ICLR 2021, arXiv 2103.09762. Differences: each token's input is scaled to length 1, because a few
channels of an LLM hold most of the energy; not only gradients are projected but whole steps, because Adam leaves the
subspace; wide maps are sketched, in one pass (Tropp, Yurtsever, Udell and Cevher, arXiv 1706.05736).
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor.experimental import implicit_replication
from transformers import PreTrainedModel

from hf_contmerge.models.loading import plain_model
from hf_contmerge.models.weights import write_tensors
from hf_contmerge.runtime.foreign import read_object
from hf_contmerge.train_strategies import Likelihoods, StageSize, TrainStrategy
from hf_contmerge.train_strategies._ranks import is_main, sum_over_ranks
from hf_contmerge.train_strategies._weights import laid_out_like, trained

LOG = logging.getLogger(__name__)

_FILE, _ABOUT = "directions.safetensors", "directions.json"
_NEARLY_FULL = 0.8
_NEGLIGIBLE = 1e-6
"""Share of the energy below which a direction may be rounding."""


@dataclass
class Gpm(TrainStrategy):
    """G <- G - (G M) M' and, after each step, W <- W - (W M - W0 M) M', with W0 at the start: W M stays W0 M.

    M (in, k) is an orthonormal basis of the inputs that a linear map had in earlier stages. After a stage, leading
    directions of what its inputs X have outside M are added, until all of M holds the share `energy` of |X|^2 or has
    `rank` directions. The first stage is plain training. Embeddings, norms, biases, the head are not held, nor what no
    torch.nn.Linear has: the stacked experts and the routers of mixtures, which a warning names.
    """

    carriers = ("full",)
    texts_only = True
    opens_on_meta = True
    turn = 1

    energy: Annotated[float, Field(gt=0, le=1)] = 0.9
    rank: Annotated[int, Field(ge=1)] = 256
    examples: Annotated[int, Field(ge=1)] = 128
    """How many of a stage's examples its inputs are measured on."""
    _bases: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Layer -> M; layers that read the same input share one."""
    _outputs: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    """Layer -> W0 M."""
    _same: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    """Layer -> the first one with the same input."""

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        layers = linear_maps(model)
        if not layers:
            raise ValueError("gpm finds no linear map that is trained")
        if not memory:  # the first stage; later ones would say the same
            _warn_of_others(model, layers)
        self._bases = _remembered(memory, layers) if memory else {}
        self._outputs = {n: layers[n].weight.detach() @ basis.to(layers[n].weight) for n, basis in self._bases.items()}
        return model

    def adjust_gradients(self, model: nn.Module) -> None:
        for _, weight, basis in self._held(model):
            if weight.grad is not None:
                weight.grad.sub_((weight.grad @ basis) @ basis.T)

    def adjust_weights(self, model: nn.Module) -> None:
        for name, weight, basis in self._held(model):
            outputs = self._outputs[name] = laid_out_like(weight, self._outputs[name])
            weight.sub_((weight @ basis - outputs) @ basis.T)

    def _held(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        layers = linear_maps(model)
        with implicit_replication():  # under FSDP2 each rank has some rows of a weight, and all of M
            for name in self._bases:
                weight = layers[name].weight
                basis = self._bases[name] = self._bases[name].to(weight.device, weight.dtype)
                yield name, weight, basis

    def review(self, model: nn.Module, likelihoods: Likelihoods) -> None:
        layers, seen = linear_maps(model), _Inputs(self.rank, self._bases)
        with _watching(layers, seen) as self._same, torch.no_grad():
            for _ in likelihoods(self.examples):
                pass
        leaders = {leader: seen[leader].enlarged(self.energy, self.rank) for leader in sorted({*self._same.values()})}
        self._same |= {name: name for name in self._bases if name not in self._same}  # an expert without tokens
        self._bases = {name: leaders[x] if x in leaders else self._bases[name] for name, x in self._same.items()}
        self._outputs = {}

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        used = {name: basis.shape[1] / basis.shape[0] for name, basis in self._bases.items()}
        if not is_main():
            return
        write_tensors(out / _FILE, {name: self._bases[name].cpu() for name in sorted({*self._same.values()})})
        about = {"same": self._same, "used": {name: round(share, 4) for name, share in used.items()}}
        (out / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _report(used)

    def added_bytes(self, model: nn.Module) -> int:
        maps = linear_maps(model).values()
        kept = (min(self.rank, layer.in_features) * (layer.in_features + layer.out_features) for layer in maps)
        return 4 * sum(kept)

    def memory_bytes(self, stage: StageSize) -> int:
        return 4 * self.rank * stage.inputs


class Seen:
    """Inputs of a linear map: energy inside M, sketch of the rest.

    The sketch is C P, with C the rest's second moment: C itself, or its products with 2 * rank random vectors P.
    """

    def __init__(self, width: int, rank: int, basis: Tensor | None) -> None:
        self._basis = torch.empty(width, 0) if basis is None else basis
        self._probe = _probe(width, 2 * rank) if 2 * rank < width else None
        self._sketch = torch.zeros(width, min(2 * rank, width))
        self._inside = self._total = torch.zeros(())

    def add(self, inputs: Tensor) -> None:
        """Add the inputs (..., width) of some tokens, in float32."""
        with torch.autocast(inputs.device.type, enabled=False):  # a trainer with `bf16` would round the products
            self._add(inputs)

    def _add(self, inputs: Tensor) -> None:
        rows = F.normalize(inputs.reshape(-1, inputs.shape[-1]).float(), dim=-1)
        basis, sketch = self._basis.to(rows), self._sketch.to(rows.device)
        along = rows @ basis
        rest = rows - along @ basis.T
        self._sketch = sketch.addmm_(rest.T, rest if self._probe is None else rest @ self._probe.to(rows))
        self._inside = self._inside.to(rows.device) + along.square().sum()
        self._total = self._total.to(rows.device) + rows.square().sum()

    def enlarged(self, energy: float, rank: int) -> Tensor:
        """Return M with the leading directions of the rest; collective."""
        sketch, inside, total = (sum_over_ranks(part) for part in (self._sketch, self._inside, self._total))
        values, directions = _leading(sketch.double(), None if self._probe is None else self._probe.to(sketch).double())
        missing, real = energy * total - inside, values > _NEGLIGIBLE * total
        before = values.cumsum(0) - values
        wanted = int(((before < missing) & real).sum())
        basis = self._basis.to(directions)
        chosen = directions[:, : max(0, min(wanted, rank - basis.shape[1]))]
        return torch.linalg.qr(torch.cat([basis, chosen], dim=1))[0].float()


@functools.cache
def _probe(width: int, columns: int) -> Tensor:
    """Return random vectors, the same on all ranks."""
    return torch.randn(width, columns, generator=torch.Generator().manual_seed(width))


class _Inputs(dict[str, Seen]):
    """Inputs by layer, made on first use; none for shared ones."""

    def __init__(self, rank: int, bases: dict[str, Tensor]) -> None:
        super().__init__()
        self._rank, self._bases = rank, bases

    def add(self, name: str, inputs: Tensor) -> None:
        if name not in self:
            self[name] = Seen(inputs.shape[-1], self._rank, self._bases.get(name))
        self[name].add(inputs)


def _leading(sketch: Tensor, probe: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of a moment, largest first, from its sketch."""
    if probe is None:
        values, vectors = torch.linalg.eigh((sketch + sketch.T) / 2)
        return values.flip(0), vectors.flip(1)
    shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(sketch)
    shifted = sketch + shift * probe
    core = probe.T @ shifted
    root = torch.linalg.cholesky((core + core.T) / 2)
    vectors, sizes, _ = torch.linalg.svd(
        torch.linalg.solve_triangular(root, shifted.T, upper=False).T, full_matrices=False
    )
    return (sizes.square() - shift).clamp(min=0), vectors


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the trained linear maps by name, without the head."""
    plain = plain_model(model)
    head = plain.get_output_embeddings()
    named = ((name, module) for name, module in plain.named_modules() if isinstance(module, nn.Linear))
    return {name: module for name, module in named if module is not head and module.weight.requires_grad}


def _warn_of_others(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Warn of trained matrices that are not held, by name.

    Tables and the head are not named.
    """
    plain = plain_model(model)
    known = [
        *layers.values(),
        plain.get_output_embeddings(),
        *(m for m in plain.modules() if isinstance(m, nn.Embedding)),
    ]
    skipped = {id(weight) for module in known if module is not None for weight in module.parameters(recurse=False)}
    named = ((name, w) for name, w in trained(plain) if w.dim() > 1 and id(w) not in skipped)
    if others := {name: weight.numel() for name, weight in named}:
        held = sum(layer.weight.numel() for layer in layers.values())
        LOG.warning(
            "gpm holds %d linear maps and not %s and %d more weights, which belong to no torch.nn.Linear: %.0f %% of "
            "the parameters of both change as in plain training.",
            len(layers), min(others), len(others) - 1, 100 * sum(others.values()) / (held + sum(others.values())),
        )  # fmt: skip


@contextmanager
def _watching(layers: dict[str, nn.Linear], seen: _Inputs) -> Iterator[dict[str, str]]:
    """Add up the inputs of layers, each input once.

    Yields layer -> first layer with the same input.
    """
    same: dict[str, str] = {}
    latest: tuple[str, Tensor] | None = None

    def watch(name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal latest
            if latest is None or latest[1] is not inputs[0]:  # q, k and v read one tensor
                latest = (name, inputs[0])
                seen.add(name, inputs[0])
            same[name] = latest[0]

        return note

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield same
    finally:
        for handle in handles:
            handle.remove()


def _remembered(memory: Path, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Return layer -> M of earlier stages. Raises ValueError.

    Another model's maps do not fit, and full ones leave nothing to train.
    """
    stored, same = load_file(memory / _FILE), read_object(memory / _ABOUT)["same"]
    bases = {name: stored[same[name]] for name in layers if same.get(name) in stored}
    for name, basis in bases.items():
        width = layers[name].in_features
        if basis.shape[0] != width:
            raise ValueError(
                f"{memory / _FILE} has directions of width {basis.shape[0]} for {name}, and the model {width}; train "
                "the earlier stages again"
            )
    if all(basis.shape[1] == basis.shape[0] for basis in bases.values()):
        raise ValueError(
            f"no direction is left in {next(iter(bases), memory)} and all other maps: earlier stages use all. Lower "
            "gpm's `energy` or `rank`, and train the earlier stages again"
        )
    return bases


def _report(used: dict[str, float]) -> None:
    """Log the share of directions in use; warn where few are left."""
    LOG.info("gpm holds %.1f %% to %.1f %% of the input directions of %d maps (%s)",
             100 * min(used.values()), 100 * max(used.values()), len(used), _ABOUT)  # fmt: skip
    full = sorted((name for name, share in used.items() if share > _NEARLY_FULL), key=lambda name: -used[name])
    if full:
        LOG.warning(
            "gpm holds %.0f %% of the input directions of %s (and of %d more maps over %.0f %%): later stages can "
            "hardly change them. Lower `energy` or `rank`.",
            100 * used[full[0]], full[0], len(full) - 1, 100 * _NEARLY_FULL,
        )  # fmt: skip
