"""Code of a model runs only if both the recipe and the command say so; pickles never."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from toys.models import toy_llama, write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.loop.functions import finetune_stage, score_stage
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.run.recipe.text import load_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe over a base with code, and a pickle next to its weights; either would write the file `ran`."""
    from transformers import dynamic_module_utils

    base = toy_llama(tmp_path / "base", seed=0)
    values = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (base / "config.json").write_text(json.dumps({**values, "model_type": "own", "auto_map": auto}))
    (base / "own_code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel\n"
    )
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(tmp_path / "ran")))
    data = write_jsonl(tmp_path / "trust.jsonl", [{"text": f"the quick brown fox {i}"} for i in range(12)])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return {
        "name": "trust", "base_model": str(base), "trust_remote_code": True, "merge": ["average"],
        "stages": [{"name": "a", "dataset": {"path": str(data), "heldout": 2}}],
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 32, "save_strategy": "no"},
    }  # fmt: skip


class _Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def written(recipe: dict[str, Any], tmp_path: Path) -> Path:
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "r.yml"


@pytest.mark.parametrize("command", ["plan", "run"])
def test_the_recipe_alone_lets_no_code_run(
    command: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [command, str(written(recipe, tmp_path)), "--run", str(tmp_path / "run")]
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "which happens only if you say so too: read that code, then add `--trust-remote-code`" in printed
    assert main(["plan", str(written({**recipe, "trust_remote_code": False}, tmp_path)), "--trust-remote-code"]) == 2
    assert not (tmp_path / "ran").exists()


def test_python_needs_the_word_too(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only if you say so too"):
        run_recipe(load_recipe(written(recipe, tmp_path)), tmp_path / "run")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("loading", [{"weights_only": False}, {"use_safetensors": False, "dtype": "auto"}])
def test_no_setting_opens_a_pickle(
    loading: dict[str, Any], recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {**recipe["train"], "model_init_kwargs": loading}
    file = written({**recipe, "train": train, "trust_remote_code": False}, tmp_path)
    assert main(["run", str(file), "--run", str(tmp_path / "run"), "--trust-remote-code"]) == 2
    assert "model_init_kwargs must be a mapping with" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("known", ["own code", "unknown"])
def test_a_base_that_cannot_load_is_one_sentence_everywhere(
    known: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code of the model's own without consent, or an architecture that transformers lacks. Merging needs neither."""
    base, data = tmp_path / "base", tmp_path / "trust.jsonl"
    if known == "unknown":
        values = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({w: v for w, v in values.items() if w != "auto_map"}))
    expert = shutil.copytree(base, tmp_path / "expert")
    tensors = {n: t * 1.01 for n, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    del recipe["trust_remote_code"]
    task = {"name": "own_text", "kind": "perplexity", "dataset": str(data)}
    given = {**recipe, "stages": [{"name": "a", "expert": str(expert), "tasks": [task]}]}
    models = {
        "merge_method": "average",
        "base_model": str(base),
        "models": [{"model": str(expert)}],
        "dtype": "float32",
    }
    yml = tmp_path / "mergekit.yml"
    yml.write_text(yaml.safe_dump(models))
    expected = (
        "needs code of its own (own_code.OwnConfig, own_code.OwnModel). Read that code, then allow it"
        if known == "own code"
        else "does not know the model_type 'own'"
    )
    for words in (
        ["plan", str(written(recipe, tmp_path))], ["run", str(written(recipe, tmp_path)), "--run", str(tmp_path / "r")],
        ["run", str(written(given, tmp_path)), "--run", str(tmp_path / "g")],
        ["score", str(base), "--tasks", "arc_easy"], ["statistics", str(base), "--data", str(data)],
    ):  # fmt: skip
        assert main(words) == 2
        assert expected in capsys.readouterr().err
    for call in (lambda: finetune_stage(base, data, tmp_path / "f", max_steps=1), lambda: score_stage(base, [task])):
        with pytest.raises(ModelError, match=re.escape(expected)):
            call()
    under = subprocess.run(
        [Path(sys.executable).with_name("mergekit-yaml"), yml, tmp_path / "by-mergekit"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert under.returncode == 2
    assert expected in under.stderr
    assert main(["merge", "from-recipe", str(yml), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "own_code.py").is_file() == (known == "own code")
    assert not (tmp_path / "ran").exists()
