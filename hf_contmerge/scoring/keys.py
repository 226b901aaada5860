"""Cache keys of scores, found without torch for known files.

A key is a digest of everything the numbers depend on:

    the weights (as stored, and their dtype when scored), config, tokenizer and template, model code
    the task (_task_digest.py): its YAML as resolved, its code, its data;  few-shot, limit, length, part
    the versions of lm-eval, torch and transformers

Batch size, device and number of processes are excluded: they change only the last digits of a score.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from hf_contmerge.errors import ModelError
from hf_contmerge.models.config import COMPANIONS, optional_json
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.runtime.versions import version
from hf_contmerge.scoring._formats import Listing
from hf_contmerge.scoring._task_digest import TaskDigests
from hf_contmerge.scoring.cache import JsonStore, digest, file_sha256, remembered, stamp
from hf_contmerge.scoring.locate import ModelFolders

SCORES_VERSION = 4  # raise it when scores of the same inputs change
_IN_KEY_OTHERWISE = {"dtype", "validation"}
"""`evaluate` fields keyed elsewhere: dtype with the model, `validation` with the part."""
_NOT_OF_A_TASK = {
    "name", "suite", "dataset", "kind", "question", "choices", "answer", "max_new_tokens", "stop",
}  # fmt: skip
"""Task fields covered by the digest of the task's files."""
_NO_MATTER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""config.json fields without effect on scores once the dtype is chosen; they differ between copies of a model."""

DocumentPart = Literal["all", "test", "validation"]
"""Document subset to measure: choices made on the validation part are judged on the test part."""


class Shown(Protocol):
    """Examples in front of the questions (in_context.py)."""

    def digest(self, task: str) -> str:
        """Return a digest of a task's possible examples."""
        ...

    def begin(self, leaves: Mapping[str, str]) -> None:
        """Start a round of scoring. `leaves`: lm-eval's task -> the recipe's."""
        ...

    def facts(self, task: str) -> dict[str, Any]:
        """Return a scored task's counts, for its details."""
        ...


@dataclass(frozen=True)
class ScoreRequest:
    """A request to score a model on tasks."""

    tasks: Sequence[Task]
    task_folder: Path
    evaluate: Evaluate
    part: DocumentPart = "all"
    trust_remote_code: bool = False
    shown: Shown | None = None


@dataclass(frozen=True)
class ModelKey:
    """Identity of a model and its dtype when scored."""

    sha256: str
    """Digest of the stored weights, companion files and dtype."""
    dtype: str
    """float32, bfloat16 or float16."""


def model_key(model: ModelFolders, request: ScoreRequest, store: JsonStore, *, read: bool = True) -> ModelKey | None:
    """Return a model's part of the keys.

    Args:
        model: its folders.
        request: dtype and trust in the model's code.
        store: cache of digests.
        read: allow reading weights. If False and a digest is missing, return None.

    Raises:
        ModelError: the folder holds no model.
    """
    folders = list(dict.fromkeys((model.whole, model.folder)))
    weights = [_weights_sha256(folder, store, read=read) for folder in folders]
    dtype = _dtype(model.whole, request.evaluate, store, read=read)
    if dtype is None or None in weights:
        return None
    companions = [_companions(folder, store) for folder in folders]
    return ModelKey(digest([weights, companions, dtype, request.trust_remote_code]), dtype)


def score_keys(
    model: ModelKey, request: ScoreRequest, store: JsonStore, own: Listing | None = None
) -> dict[str, str | None]:
    """Return task -> cache key; None for unidentifiable tasks.

    Args:
        model: identity of the model.
        request: tasks and settings.
        store: cache of digests.
        own: lm-eval's own tasks, if loaded; default: the remembered listing.
    """
    digests = TaskDigests.open(request.evaluate.task_folders(request.task_folder), store, own)
    keys: dict[str, str | None] = {}
    for task in request.tasks:
        sha256 = digests.sha256(task.name)
        keys[task.name] = None if sha256 is None else digest([model.sha256, sha256, _settings(request, task)])
    return keys


def _settings(request: ScoreRequest, task: Task) -> Mapping[str, Any]:
    """Return the settings and versions in a key."""
    values = request.evaluate.measured_by()
    versions = [version("lm_eval"), version("torch", 2), version("transformers", 2), version("datasets", 1)]
    if request.evaluate.backend != "hf":
        versions.append(version(request.evaluate.backend, 2))
    shown = {"shown": request.shown.digest(task.name)} if request.shown else {}
    return {
        "format": SCORES_VERSION,
        "task": task.model_dump(mode="json", exclude=_NOT_OF_A_TASK),
        "evaluate": {field: value for field, value in values.items() if field not in _IN_KEY_OTHERWISE},
        "part": [request.part, values["validation"] if request.part != "all" else None],
        "versions": versions,
        **shown,
    }


def _weights_sha256(folder: Path, store: JsonStore, *, read: bool) -> str | None:
    files = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    files += [path for path in [folder / "adapter_config.json"] if path.is_file()]
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors. Give a model folder written by `save_pretrained`.")

    def find() -> str | None:
        if not read:
            return None
        from hf_contmerge.models.experts import expert_sha256  # imports torch: needless for known files

        return expert_sha256(folder)

    return remembered(store, "weights", files, find)


def _companions(folder: Path, store: JsonStore) -> dict[str, str]:
    """Return digests of the files next to the weights.

    These are config, tokenizer, template, generation settings and code.
    """
    digests = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if not path.is_file():
            continue
        if (
            path.suffix not in (*COMPANIONS, ".py")
            or name.endswith(".index.json")
            or name in ("converted.json", "merge.json", "README.txt")
        ):
            continue
        if name in ("config.json", "generation_config.json"):
            values = optional_json(path)
            digests[name] = digest({k: v for k, v in values.items() if k not in _NO_MATTER})
        elif name != "adapter_config.json":  # covered by the weights' digest
            digests[name] = file_sha256(path, store)
    return digests


def _dtype(folder: Path, evaluate: Evaluate, store: JsonStore, *, read: bool) -> str | None:
    """Return the dtype to score in.

    `auto` is one dtype for all models of a machine, so that they are comparable. vLLM and tensor parallelism round to
    the nearest value themselves, which may drop a merge's update: files in float32 stay so there.

    None if it depends on hardware or file, the answer is not cached and `read` is False.
    """
    if evaluate.dtype != "auto":
        return evaluate.dtype
    rounds = evaluate.backend == "vllm" or evaluate.parallel == "tensor"
    key = digest(["dtype", _machine(), stamp(folder.glob("*.safetensors"))[0], *(["as stored"] if rounds else [])])
    cached = store.find(key)
    if cached is not None or not read:
        return cached
    from hf_contmerge.models.weights import Weights
    from hf_contmerge.runtime.device import bf16_pays

    weights = Weights(folder)
    wide = rounds and weights.main_dtype.itemsize > 2
    dtype = "bfloat16" if bf16_pays(weights.numel()) and not wide else "float32"
    store.keep(key, dtype)
    return dtype


def _machine() -> list[str]:
    """Return the facts behind the choice of dtype, without torch.

    They are the hardware, the torch version and environment variables.
    """
    words = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ACCELERATE_USE_CPU")
    devices = sorted(str(p) for p in Path("/dev").glob("nvidia*")) + [
        p for p in ("/dev/kfd", "/dev/dxg") if os.path.exists(p)
    ]
    flags: list[str] = []
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = [w for w in next((s for s in lines if s.startswith("flags")), "").split() if "bf16" in w or "amx" in w]
    environment = [f"{word}={os.environ.get(word, '')}" for word in words]
    return [version("torch"), platform.node(), platform.machine(), *devices, *flags, *environment]
