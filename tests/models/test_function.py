"""Equal shapes, another meaning: refused before any work."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from toys.models import perturbed, toy_llama

from hf_contmerge.errors import ModelError
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.config import _tokens_in
from hf_contmerge.models.function import check_function


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    perturbed(toy_llama(folder / "base", seed=0), folder / "expert", seed=1, size=0.01)
    return folder


def changed(family: Path, folder: Path, file: str = "config.json", **values: Any) -> Path:
    shutil.copytree(family / "expert", folder)
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**data, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters.rope_theta 1000000.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters.factor 2.0"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "head_dim 4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps 0.001"),
        ({"model_type": "mistral"}, "model_type 'mistral'"),
    ],
)
def test_another_function(family: Path, tmp_path: Path, values: dict[str, Any], word: str) -> None:
    other = changed(family, tmp_path / "other", **values)
    with pytest.raises(ModelError) as error:
        check_function(family / "base", other)
    assert f"{other} has {word} in config.json" in str(error.value)


def test_a_forced_merge_skips_the_check(family: Path, tmp_path: Path) -> None:
    other = changed(family, tmp_path / "other", rms_norm_eps=1e-3)
    state = MergeState.create(tmp_path / "state", base=family / "base", rule="average")
    with pytest.raises(ModelError, match="--force"):
        state.add(other)
    state.add(other, force=True)


def test_old_spellings_and_harmless_fields_are_equal(family: Path, tmp_path: Path) -> None:
    other = changed(
        family, tmp_path / "other", rope_theta=1e4, rope_scaling=None, rope_parameters=None, use_cache=False,
        attention_dropout=0.1, torch_dtype="bfloat16", transformers_version="4.30.0", unsloth_version="1",
    )  # fmt: skip
    check_function(family / "base", other)


def test_moved_tokens(family: Path, tmp_path: Path) -> None:
    other = changed(family, tmp_path / "other")
    data = json.loads((other / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)[5:]
    numbers = [vocabulary[word] for word in words]
    random.Random(0).shuffle(numbers)
    vocabulary.update(zip(words, numbers, strict=True))
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match="The embedding rows do not correspond"):
        check_function(family / "base", other)


def test_a_tokenizer_is_parsed_once_and_again_when_it_changes(family: Path, tmp_path: Path) -> None:
    """50,000 words take 0.15 s, and each expert is compared with the base several times."""
    other = changed(family, tmp_path / "other")
    check_function(family / "base", other)
    read = _tokens_in.cache_info().misses
    check_function(family / "base", other)
    assert _tokens_in.cache_info().misses == read
    data = json.loads((other / "tokenizer.json").read_text())
    words = data["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"differ: .* The embedding rows do not correspond"):
        check_function(family / "base", other)


def test_what_a_merged_model_does_not_take_is_said(
    family: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = changed(family, tmp_path / "other", eos_token_id=4)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (other / "added_tokens.json").write_text(json.dumps({"<|new|>": 400}))
    check_function(family / "base", other)
    said = "\n".join(caplog.messages)
    for words in ("adds '<|new|>' to the tokenizer", "has eos_token_id 4", "has another chat template"):
        assert words in said
