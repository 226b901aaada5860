"""Whether this job can score as a recipe asks, told before a model is loaded or trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from hf_contmerge.errors import ModelError, RecipeError, ResourceError
from hf_contmerge.run.recipe.parts import Evaluate

AUTO_BATCH_SIZE = 8
"""Batch size for `auto` on CPUs and for sharded weights."""


def check_evaluate(evaluate: Evaluate, *, processes: int, per_machine: int = 1, adapter: bool = False) -> None:
    """Raise an error unless this machine can run models in the way that `evaluate` asks for.

    Args:
        evaluate: of the recipe.
        processes: how many ranks the job has.
        per_machine: how many of them run on a machine.
        adapter: whether adapters, which are no whole models, will be scored.

    Raises:
        ResourceError: there is no vLLM, nothing that it can compute on, or the wrong number of processes.
        RecipeError: two words contradict each other.
    """
    if evaluate.backend == "vllm":
        _check_vllm(evaluate, processes=processes, adapter=adapter)
    if evaluate.parallel == "layers" and per_machine > 1:
        raise ResourceError(
            f"`evaluate.parallel: layers` spreads one process over all GPUs of a machine, and {per_machine} processes "
            "run on this one. Start one a machine (`--nproc-per-node 1`), or set `parallel: tensor`."
        )
    if evaluate.parallel == "tensor" and evaluate.backend == "hf" and processes < 2:
        raise ResourceError(
            "`evaluate.parallel: tensor` spreads each matrix over the ranks of a job, and this one has one. Start a "
            "rank for each GPU (`torchrun --nproc-per-node N`), or set `parallel: layers`."
        )
    if evaluate.parallel == "tensor" and adapter:
        raise RecipeError(
            "`evaluate.parallel: tensor` cannot load adapters, which stages leave with `keep: true`. Set `parallel: "
            "layers`, or remove `keep`."
        )


def _check_vllm(evaluate: Evaluate, *, processes: int, adapter: bool) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ResourceError(
            "`evaluate.backend: vllm` needs vLLM, which is not installed. Install it with "
            "`pip install 'lm_eval[vllm]'`, or remove the line."
        )
    if processes > 1:
        raise ResourceError(
            f"`evaluate.backend: vllm` starts processes of its own, and this job has {processes}. Score in a job of "
            "one process, with `parallel: tensor` to use all its GPUs; or set `backend: hf`."
        )
    if evaluate.parallel == "layers" or adapter:
        raise RecipeError(
            "`evaluate.backend: vllm` loads whole models, by `parallel: data` (one GPU) or `parallel: tensor` (all of "
            "them); neither `layers` nor adapters. Set `backend: hf`."
        )
    # Last: it takes seconds to load.
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.is_unspecified():
        raise ResourceError(
            "`evaluate.backend: vllm`: the vLLM that is installed finds nothing here to compute on; mostly it is built "
            "for GPUs, and this machine has none. Remove the line."
        )


def require_template(tokenizer: Any) -> None:
    """Raise ModelError if a tokenizer cannot put prompts into a chat template."""
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template, which `evaluate.chat_template: true` "
            "needs. Remove the line, or give the base model a tokenizer with one."
        )


def check_template(folder: Path) -> None:
    """Raise ModelError if the tokenizer of a model folder has no chat template."""
    require_template(AutoTokenizer.from_pretrained(folder))
