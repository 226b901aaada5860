"""Planted tokens appear nowhere in what a run, a failure, a report and a push leave behind."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from toys.hub_server import WRITE_TOKEN, hub_server
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge.runtime.hiding import blanked, holds_secret, names_secret, printable, without_secrets

PLANTED = {
    "HF_TOKEN": WRITE_TOKEN,
    "WANDB_API_KEY": "wandbKEY0123456789abcdef0123456789abcdef",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "OPENAI_API_KEY": "sk-proj-abcdefghijklmnop",
    "RECIPE": "hf_" + "recipeTOKEN" * 3 + "x",
    "URL": "URLTOKEN123",
}
"""The last two stand in recipes, the others in the environment."""


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs the command and looks for the tokens in all that it prints."""
    env = {name: PLANTED[name] for name in list(PLANTED)[:-2]}

    def look(*words: object, code: int = 0, **more: str) -> str:
        own = {"HF_CONTMERGE_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-m", "hf_contmerge.commands.main", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env, **own, **more})
        printed = done.stdout + done.stderr
        assert done.returncode == code, printed[-2000:]
        assert not [name for name, token in PLANTED.items() if token in printed], printed
        return printed

    return look


def leaks(*folders: Path) -> list[str]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [f"{name} in {p}" for p in files for name, token in PLANTED.items() if token.encode() in p.read_bytes()]


@pytest.mark.slow
def test_nothing_planted_is_left_behind(tmp_path: Path, look: Callable[..., str], figure: Callable[..., None]) -> None:
    base = toy_llama(tmp_path / "base", seed=0)
    expert = perturbed(base, tmp_path / "expert", seed=1, size=0.01)
    data = write_jsonl(tmp_path / "secrets.jsonl", [{"text": f"the quick brown fox {i}"} for i in range(12)])
    recipe = {
        "name": "toy", "base_model": str(base), "merge": ["average"], "publish": {"repo_id": "me/x"},
        "stages": [{"name": "a", "dataset": {"path": str(data), "heldout": 2}}, {"name": "b", "expert": str(expert)}],
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 32, "report_to": "tensorboard"},
    }  # fmt: skip
    file, run = tmp_path / "r.yml", tmp_path / "run"
    url = f"https://user:{PLANTED['URL']}@127.0.0.1:9/data"
    for spoilt in (
        {"base_model": url},
        {"stages": [{"name": "a", "dataset": url}]},
        {"train": {"optim_args": f"key={PLANTED['RECIPE']}"}},
        {"train": {"hub_token": PLANTED["RECIPE"]}},
    ):
        file.write_text(yaml.safe_dump(recipe | spoilt))
        look("run", file, "--run", tmp_path / "refused", code=2)
    assert not (tmp_path / "refused").exists()
    file.write_text(yaml.safe_dump(recipe))
    look("run", file, "--run", run, "--set", f"base_model={url}", code=2)
    look("merge", "init", tmp_path / "state", "--base", url, "--rule", "average", code=2)
    look("run", file, "--run", run)
    look("report", run)
    with hub_server(tmp_path / "hub") as hub:
        online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        look("push", run, **online)
        look("push", run, "--repo-id", "other/x", code=2, **online)
        assert hub.files("me/x")
    file.unlink()
    leaked = leaks(run, tmp_path / "cache", tmp_path / "hf", tmp_path / "hub")
    figure("planted tokens, not leaked", len(PLANTED), len(PLANTED) - len({leak.split(" in ")[0] for leak in leaked}))
    assert leaked == []


TOKENS = [
    PLANTED["HF_TOKEN"], PLANTED["AWS_ACCESS_KEY_ID"], "sk-ant-api03-0123456789abcdef0123", "ghp_" + "a1" * 18,
    "github_pat_" + "a1" * 20, "glpat-" + "a1" * 10, "xoxb-1234567890-abc", "AIza" + "a" * 35,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc", "Bearer 0123456789abcdef0123",
    "https://user:pass@host/x", "https://token@host/x", "https://h/x?X-Amz-Signature=abc", "https://h/x?a=1&token=abc",
    "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:12])
def test_tokens_are_found(token: str) -> None:
    assert holds_secret(f"x {token} y")
    assert "abc" not in without_secrets(token)
    assert "pass" not in without_secrets(token)


PLAIN = [
    "asiapacificlanguages", "owner/sk-learn-models-for-everybody", "hf_contmerge", "https://host/a@b", "me@host.org",
    "0123456789abcdef0123456789abcdef01234567", "eos_token", "s3://bucket/key", "https://h/x?page=2", "{text}",
]  # fmt: skip


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_words_are_kept(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("name", ["hub_token", "api_key", "password", "aws_secret_access_key", "token"])
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)
    assert blanked({"a": [{name: "x"}]}) == {"a": [{name: "(removed)"}]}


@pytest.mark.parametrize("name", ["eos_token", "pad_token", "max_new_tokens", "tokenizer_from", "key", "tokens"])
def test_names_of_settings(name: str) -> None:
    assert not names_secret(name)


def test_the_terminal_gets_no_control_characters() -> None:
    assert printable("a\x1b[2J\u202eb\tü\nc") == "a\\x1b[2J\\u202eb\tü\nc"


def test_json_is_blanked_by_value_and_name() -> None:
    data = json.loads(json.dumps({"x": f"a {TOKENS[0]}", "token": "", "n": 1}))
    assert blanked(data) == {"x": "a (removed)", "token": "", "n": 1}
