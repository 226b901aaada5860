"""OPCM as FusionBench has it, on Hugging Face folders. Runs in FusionBench's environment: see against_fusionbench.py.

    ENV/bin/python tests/benchmarks/fusionbench_peer.py OUT BASE EXPERT EXPERT ...

Writes the merged model, float32, to OUT and prints one line of JSON: seconds of the imports, of loading, of the merge
alone (`run` less loading), of its decomposition of the output head, and of writing. The models are given as a dict with
`_pretrained_`, each described rather than loaded, so that FusionBench loads one expert at a time, at its least memory.
"""

import json
import sys
import time

STARTED = time.perf_counter()

from fusion_bench import BaseModelPool  # pyright: ignore[reportMissingImports]
from fusion_bench.method.opcm.opcm_general import OPCM  # pyright: ignore[reportMissingImports]

IMPORTED = time.perf_counter() - STARTED


class TimedPool(BaseModelPool):
    """Counts the seconds that loading takes."""

    loading = 0.0

    def load_model(self, *args, **kwargs):
        start = time.perf_counter()
        model = super().load_model(*args, **kwargs)
        self.loading += time.perf_counter() - start
        return model


class TimedOPCM(OPCM):
    """Counts the seconds that the output head takes."""

    head = 0.0

    def merge_linear_weights(self, *args, **kwargs):
        start = time.perf_counter()
        merged = super().merge_linear_weights(*args, **kwargs)
        if kwargs["param_name"] == "lm_head.weight":
            self.head += time.perf_counter() - start
        return merged


def described(folder: str) -> dict:
    return {
        "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": folder,
        "torch_dtype": "float32",
    }


def main() -> None:
    out, base, *experts = sys.argv[1:]
    models = {f"expert_{i}": described(folder) for i, folder in enumerate(experts)}
    pool = TimedPool(models={"_pretrained_": described(base), **models})
    method = TimedOPCM(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    start = time.perf_counter()
    merged = method.run(pool)
    ran = time.perf_counter() - start
    start = time.perf_counter()
    merged.save_pretrained(out)
    found = {"imports": IMPORTED, "loading": pool.loading, "merge": ran - pool.loading, "head": method.head}
    print(json.dumps({**found, "writing": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
