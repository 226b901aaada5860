"""Checks a job's scoring settings before a model is loaded or trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError, RecipeError, ResourceError
from hf_contmerge.models.loading import load_tokenizer
from hf_contmerge.run.recipe.parts import Evaluate

AUTO_BATCH_SIZE = 8
"""Batch size for `auto` on CPUs and for sharded weights."""


def check_evaluate(evaluate: Evaluate, *, processes: int, per_machine: int = 1, adapter: bool = False) -> None:
    """Check `evaluate` against this machine and the number of processes.

    Args:
        evaluate: scoring settings of the recipe.
        processes: number of ranks in the job.
        per_machine: number of ranks per machine.
        adapter: True if adapters will be scored.

    Raises:
        ResourceError: vLLM or its hardware is missing, or the number of processes is wrong.
        RecipeError: two settings contradict each other.
    """
    if evaluate.backend == "vllm":
        _check_vllm(evaluate, processes=processes, adapter=adapter)
    if evaluate.parallel == "layers" and per_machine > 1:
        raise ResourceError(
            f"`evaluate.parallel: layers` spreads one process over all GPUs of a machine; got {per_machine} processes "
            "per machine. Start one per machine (`--nproc-per-node 1`), or set `parallel: tensor`."
        )
    if evaluate.parallel == "tensor" and evaluate.backend == "hf" and processes < 2:
        raise ResourceError(
            "`evaluate.parallel: tensor` spreads each matrix over the ranks of a job; this job has one rank. Start a "
            "rank per GPU (`torchrun --nproc-per-node N`), or set `parallel: layers`."
        )
    if evaluate.parallel == "tensor" and adapter:
        raise RecipeError(
            "`evaluate.parallel: tensor` cannot load adapters, the result of stages with `keep: true`. Set `parallel: "
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
            f"`evaluate.backend: vllm` starts its own processes and needs a job of one process; this one has "
            f"{processes}. Start one process, with `parallel: tensor` to use all its GPUs, or set `backend: hf`."
        )
    if evaluate.parallel == "layers" or adapter:
        raise RecipeError(
            "`evaluate.backend: vllm` loads whole models with `parallel: data` (one GPU) or `parallel: tensor` (all "
            "GPUs). It supports neither `parallel: layers` nor adapters. Set `backend: hf`."
        )
    # Last, because this import takes seconds.
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.is_unspecified():
        raise ResourceError(
            "`evaluate.backend: vllm`: the installed vLLM supports no device of this machine, probably because it is "
            "a GPU build and no GPU is available. Remove the line."
        )


def require_template(tokenizer: Any) -> None:
    """Check for a chat template in a tokenizer.

    Raises:
        ModelError: the template is missing.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template; `evaluate.chat_template: true` "
            "needs one. Remove the line, or use a base model with a chat template."
        )


def check_template(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Check for a chat template in a model folder's tokenizer.

    Raises:
        ModelError: the template is missing.
    """
    require_template(load_tokenizer(folder, trust_remote_code=trust_remote_code))
