"""`contmerge export`: a model as a GGUF file, for llama.cpp and Ollama."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from hf_contmerge.commands._models import ANY_MODEL, opened_model
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.foreign import expanded
from hf_contmerge.runtime.hiding import printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge export`."""
    parser.add_argument("model", metavar="MODEL", help=ANY_MODEL)
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--gguf", action="store_true", required=True, help="as GGUF, for llama.cpp and Ollama")
    parser.add_argument(
        "--quantise", metavar="TYPE", help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m ... (default: as stored)"
    )
    parser.add_argument("--name", metavar="NAME", help="of the file (default: the model's)")
    parser.add_argument("--llama-cpp", metavar="DIR", help="a checkout of llama.cpp (default: its installed commands)")
    parser.set_defaults(do=export_command)


def export_command(args: argparse.Namespace) -> None:
    """Write the file, a Modelfile and a card; print their use.

    Raises:
        ContmergeError: a user error.
    """
    from hf_contmerge.models.export import LlamaCpp, export_gguf
    from hf_contmerge.models.folder import resolve_model
    from hf_contmerge.report.exports import gguf_card

    out, checkout = Path(args.out), Path(args.llama_cpp) if args.llama_cpp else None
    name = _plain(args.name or _last_name(args.model))
    with opened_model(args.model) as model:
        file = export_gguf(
            resolve_model(model), out, name=name, kind=args.quantise and args.quantise.lower(), tools=LlamaCpp(checkout)
        )
    write_atomically(out / "README.md", gguf_card(args.model, file.name, name))
    print(printable(f"Wrote {file} ({file.stat().st_size / 1e6:,.0f} MB) and {out / 'Modelfile'}."))
    print(printable(f"Next: ollama create {name.lower()} -f {out / 'Modelfile'}"))


def _last_name(model: str) -> str:
    path = expanded(model)
    return path.resolve().name if path.exists() else re.split(r"[/:]", model)[-1]


def _plain(name: str) -> str:
    """Return a name with the characters that file names and Ollama allow."""
    return re.sub(r"[^\w.-]+", "-", name.removesuffix(".gguf"), flags=re.ASCII).strip("-.") or "model"
