"""Finding models, and checking that they fit each other."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.models import toy_llama

from hf_contmerge.errors import ModelError, ResourceError
from hf_contmerge.models.experts import check_mergeable
from hf_contmerge.models.folder import copy_companions, resolve_model
from hf_contmerge.models.layout import check_same_layout, check_tokenizer


def test_a_folder_is_itself(base_folder):
    assert resolve_model(str(base_folder)) == base_folder


def test_nothing_there(tmp_path):
    with pytest.raises(ModelError, match=r"There is no model at \./nowhere"):
        resolve_model("./nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"holds no \*.safetensors"):
        resolve_model(str(tmp_path))


def test_no_config(base_folder, tmp_path):
    save_file(load_file(base_folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no config.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelError, match="holds no tokenizer"):
        check_tokenizer(tmp_path)


def test_a_hub_id_without_network():
    with pytest.raises(ResourceError) as error:
        resolve_model("some-owner/some-model")
    assert "Cannot fetch some-owner/some-model" in str(error.value)
    assert "name a local folder" in str(error.value)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


NORM, TABLE = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop(NORM), f"it lacks {NORM}"),
        (lambda t: t.update({"lm_head.weight": t[TABLE] + 1}), "stores lm_head.weight apart from its input table"),
        (lambda t: t.update({NORM: torch.zeros(3)}), rf"{NORM} has shape \(3,\)"),
    ],
)
def test_layouts_that_differ(base_folder, tmp_path, change, text):
    other = toy_llama(tmp_path / "other", seed=1)
    check_same_layout(base_folder, other)
    change_weights(other, change)
    with pytest.raises(ModelError, match=text):
        check_same_layout(base_folder, other)


def test_vocabularies_that_differ(base_folder, tmp_path):
    other = toy_llama(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    with pytest.raises(ModelError, match="has a vocabulary of 99"):
        check_same_layout(base_folder, other)


def test_quantised_models_are_refused(tmp_path):
    other = toy_llama(tmp_path / "other", seed=1)
    config = json.loads((other / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
    (other / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ModelError, match=r"is quantised \(bitsandbytes\)"):
        check_mergeable(other)


def test_companions(base_folder, tmp_path):
    copy_companions(base_folder, tmp_path, dtype=torch.bfloat16)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not any(n.endswith(".safetensors") for n in names)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


PRIVATE = (
    "trainer_state.json",
    "all_results.json",
    "notes.txt",
    ".env",
    "training_args.bin",
    "train.py",
    "vocab.json.bak",
)


def test_only_what_makes_a_model_is_copied(base_folder, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(base_folder, source)
    target.mkdir()
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "auto_map": {"AutoModel": "modeling_x.X"}}))
    (source / "modeling_x.py").write_text("from .parts_x import Part\n")
    for name in ("parts_x.py", "LICENSE", *PRIVATE):
        (source / name).write_text("x")
    copy_companions(source, target)
    names = {p.name for p in target.iterdir()}
    assert {"modeling_x.py", "parts_x.py", "LICENSE", "tokenizer.json"} <= names
    assert not names & set(PRIVATE)


def test_a_link_out_of_the_model_is_refused(tmp_path):
    base = toy_llama(tmp_path / "base", seed=0)
    (tmp_path / "credentials").write_text("secret")
    (base / "vocab.txt").symlink_to(tmp_path / "credentials")
    with pytest.raises(ModelError, match=r"vocab.txt links to .*credentials, outside the model"):
        resolve_model(str(base))


def test_model_and_adapter_in_one_folder_are_refused(tmp_path):
    base = toy_llama(tmp_path / "base", seed=0)
    (base / "adapter_config.json").write_text("{}")
    for adapters in (False, True):
        with pytest.raises(ModelError, match=r"holds a whole model \(model.safetensors\) and an adapter"):
            resolve_model(str(base), adapters=adapters)


def test_a_weight_that_all_lack_is_refused(tmp_path):
    base = toy_llama(tmp_path / "base", seed=0)
    change_weights(base, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks model.layers.1.mlp.up_proj.weight: transformers would make them up"):
        check_mergeable(base)


@pytest.mark.slow
def test_gguf_is_dequantised_once_and_checked(tmp_path):
    code = (
        "import logging; logging.basicConfig(level=logging.WARNING)\n"
        "from hf_contmerge.models.folder import resolve_model; print(resolve_model('quickstart:smollm2'))"
    )

    def resolve():
        env = {"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)

    first, second = resolve(), resolve()
    folder = second.stdout.strip()
    assert first.stdout.strip() == folder
    assert "dequantising it to bfloat16" in first.stderr
    assert "dequantising" not in second.stderr
    weights = Path(folder) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "dequantising" in resolve().stderr  # a damaged copy is made again
