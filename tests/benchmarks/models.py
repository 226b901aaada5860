"""Random Llamas of realistic proportions, and experts of them: what the benchmarks merge.

    python tests/benchmarks/models.py 60M FOLDER [--experts 4] [--untied]

A model is written in bf16, as Hugging Face folders are (config.json, model.safetensors), without a tokenizer. An expert
is the base plus Gaussian noise of a tenth of its weights' size. What exists already is taken as it is.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

INIT, NOISE = 0.02, 0.002
"""Standard deviations of the base's weights and of an expert's distance from it."""


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def shapes(self, *, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name and shape of each stored tensor."""
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        attention = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
        mlp = {"gate": (self.intermediate, h), "up": (self.intermediate, h), "down": (h, self.intermediate)}
        yield "model.embed_tokens.weight", (self.vocabulary, h)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            yield from ((f"{layer}.self_attn.{n}_proj.weight", s) for n, s in attention.items())
            yield from ((f"{layer}.mlp.{n}_proj.weight", s) for n, s in mlp.items())
            yield f"{layer}.input_layernorm.weight", (h,)
            yield f"{layer}.post_attention_layernorm.weight", (h,)
        yield "model.norm.weight", (h,)
        if not tied:
            yield "lm_head.weight", (self.vocabulary, h)

    def parameters(self, *, tied: bool) -> int:
        """Return the number of stored weights."""
        return sum(torch.Size(shape).numel() for _, shape in self.shapes(tied=tied))

    def projections(self) -> list[tuple[int, int]]:
        """Return (smaller side, larger side) of each matrix that a projection rule decomposes."""
        shapes = (shape for name, shape in self.shapes(tied=True) if len(shape) == 2 and "embed" not in name)
        return [(min(shape), max(shape)) for shape in shapes]


SIZES = {
    "tiny": Size(64, 176, 2, 4, 2, 512),
    "8M": Size(256, 704, 6, 4, 4, 12000),
    "20M": Size(320, 880, 12, 5, 5, 16000),
    "60M": Size(512, 1408, 14, 8, 4, 32000),
    "176M": Size(768, 2048, 24, 12, 4, 32000),
    "400M": Size(1024, 2816, 31, 16, 8, 32000),
}


def base_model(root: Path, size: str, *, tied: bool = True, device: str | torch.device = "cpu") -> Path:
    """Return the folder of a random base model, written if need be. `device`: where the numbers are drawn."""
    folder = root / f"{size}-{'tied' if tied else 'untied'}" / "base"
    if not folder.exists():
        noise = torch.Generator(device).manual_seed(0)
        tensors = {n: _start(shape, noise) for n, shape in SIZES[size].shapes(tied=tied)}
        _write(folder, _config(SIZES[size], tied=tied), tensors)
    return folder


def expert(base: Path, number: int, *, device: str | torch.device = "cpu") -> Path:
    """Return the folder of expert `number` (from 1 on) of a base model, written if need be."""
    folder = base.with_name(f"expert-{number}")
    if not folder.exists():
        noise, tensors = torch.Generator(device).manual_seed(number), {}
        with safe_open(base / "model.safetensors", framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a dict: it has no __iter__)
                start = weights.get_tensor(name)
                change = torch.randn(start.shape, generator=noise, device=device) * NOISE
                tensors[name] = (start.to(device).float() + change).bfloat16().cpu()
        _write(folder, json.loads((base / "config.json").read_text(encoding="utf-8")), tensors)
    return folder


def experts(base: Path, count: int, *, device: str | torch.device = "cpu") -> list[Path]:
    """Return the folders of the first experts of a base model."""
    return [expert(base, number, device=device) for number in range(1, count + 1)]


def recipe(
    path: Path, method: str, base: Path, models: list[Path], *, dtype: str, out_dtype: str = "", **values
) -> Path:
    """Write a mergekit recipe; `values` are the method's parameters, the same for all models. Return its path."""
    each = [{"model": str(m), "parameters": {"weight": 1.0}} if method == "task_arithmetic" else {"model": str(m)}
            for m in models]  # fmt: skip
    words = {"merge_method": method, "base_model": str(base), "models": each, "parameters": values, "dtype": dtype}
    path.write_text(yaml.safe_dump(words | ({"out_dtype": out_dtype} if out_dtype else {}), sort_keys=False))
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what all benchmarks take."""
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that the script works")
    parser.add_argument("--models", type=Path, default=Path("/tmp/contmerge-bench"), help="where models are kept")


def _start(shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=noise, device=noise.device) * INIT).bfloat16().cpu()


def _config(size: Size, *, tied: bool) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a model beside its place and move it there, so that a broken-off run leaves no half model."""
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    scratch.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--untied", action="store_true")
    args = parser.parse_args()
    base = base_model(args.folder, args.size, tied=not args.untied)
    made = [base, *experts(base, args.experts)]
    print(f"{SIZES[args.size].parameters(tied=not args.untied):,} parameters:", *made, sep="\n")


if __name__ == "__main__":
    main()
