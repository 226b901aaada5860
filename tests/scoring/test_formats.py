"""Files of other libraries, read without these libraries: each reading against the library itself."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys.hub_server import Hub, Repo, hub_server

from hf_contmerge.scoring._formats import (
    LOCAL_READERS,
    UnknownInputError,
    dataset_commit,
    hub_snapshot,
    list_tasks,
    read_task,
    task_code,
)


def python(code: str, *words: str, **env: str) -> Any:
    """Run code in a new process, where libraries read the environment; return what it prints as JSON."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# The folders of huggingface_hub and datasets

PLACES = """
import importlib, json, os, sys
from pathlib import Path
import datasets.config
from huggingface_hub import constants
from hf_contmerge.scoring import _formats
words = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE",
         "TRANSFORMERS_OFFLINE")
places = []
for env in json.loads(sys.argv[1]):
    for word in words:
        os.environ.pop(word, None)
    os.environ.update(env)
    importlib.reload(constants)
    importlib.reload(datasets.config)
    theirs = [constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    ours = [_formats.hugging_face_home(), _formats._hub_cache(), _formats._datasets_cache()]
    places.append([[*(str(Path(p).expanduser()) for p in theirs), constants.HF_HUB_OFFLINE],
                   [*map(str, ours), _formats.hub_offline()]])
print(json.dumps(places))
"""
ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"XDG_CACHE_HOME": "/x"},
    {"HF_HOME": "~/h", "XDG_CACHE_HOME": "/x"},
    {"HF_HOME": "/h", "HF_HUB_CACHE": "~/c", "HF_DATASETS_CACHE": "~/d"},
    {"HUGGINGFACE_HUB_CACHE": "/old"},
    {"HF_HUB_CACHE": "$HOME/c", "HUGGINGFACE_HUB_CACHE": "/old"},
    *({"HF_HUB_OFFLINE": value} for value in ("1", "on", "true", "YES", "0", "", "no")),
    {"TRANSFORMERS_OFFLINE": "1"},
    {"TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "0"},
]


def test_folders_and_offline_mode() -> None:
    for env, (theirs, ours) in zip(ENVIRONMENTS, python(PLACES, json.dumps(ENVIRONMENTS)), strict=True):
        assert ours == theirs, env


# The caches, filled from a Hub on this machine


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a process that may reach the Hub; this one has the same cache, and no network."""
    home = {"HF_HOME": str(tmp_path / "home")}
    for word in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setenv("HF_HOME", home["HF_HOME"])
    return {**home, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


RESOLVE = """
import json, sys
from hf_contmerge.models.folder import resolve_model
print(json.dumps([str(resolve_model(name)) for name in sys.argv[1:]]))
"""


def test_snapshot_of_a_model(hub: Hub, online: dict[str, str]) -> None:
    hub.repos["me/Some.Model"] = Repo(private=False)
    old, new = (
        hub.commit(
            "me/Some.Model", text, {"config.json": hub.store(b"{}"), "model.safetensors": hub.store(text.encode())}
        )
        for text in ("old", "new")
    )
    names = ["me/Some.Model", f"me/Some.Model@{old}"]
    fetched = python(RESOLVE, *names, **online)
    assert fetched == [str(hub_snapshot(name)) for name in names]
    assert [Path(folder).name for folder in fetched] == [new, old]
    assert hub_snapshot("me/Some.Model@dev") is hub_snapshot("me/other") is None


LOAD = """
import json, sys
import datasets
for words in json.loads(sys.argv[1]):
    datasets.load_dataset(*words)
print("null")
"""
NAME = "Me/CAMELCase-2Set_v2"


def test_commit_of_a_dataset(hub: Hub, online: dict[str, str]) -> None:
    """One configuration is prepared, then another; then the newest commit, so that there are two."""
    hub.repos[f"datasets/{NAME}"] = Repo(private=False)
    card = (
        "---\nconfigs:\n" + "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("one", "two")) + "---\n"
    )
    files = {"README.md": hub.store(card.encode())}
    files |= {f"{n}.jsonl": hub.store(f'{{"text": "{n}"}}\n'.encode()) for n in ("one", "two")}
    first = hub.commit(f"datasets/{NAME}", "first", files)
    assert dataset_commit(NAME, None, None) is None
    python(LOAD, json.dumps([(NAME, "one")]), **online)
    assert [dataset_commit(NAME, name, None) for name in (None, "one", "two")] == [first, first, None]
    assert dataset_commit(NAME, "one", "main") is None
    assert dataset_commit(NAME, "one", "f" * 40) == "f" * 40
    second = hub.commit(f"datasets/{NAME}", "second", {**files, "two.jsonl": hub.store(b'{"text": "2"}\n')})
    python(LOAD, json.dumps([(NAME, "two")]), **online)
    assert [dataset_commit(NAME, name, None) for name in (None, "one", "two")] == [None, first, second]


def test_readers_of_local_files() -> None:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    assert _PACKAGED_DATASETS_MODULES.keys() >= LOCAL_READERS


# Task files of lm-eval

TASKS = {
    "plain.yaml": "task: plain\ntag: [a, b]\nnum_fewshot: 1\n",
    "again.yaml": "task: again\ntag: a\ninclude: plain.yaml\nmetric_list: [{metric: acc}]\n",
    "z_plain.yaml": "task: plain\nnum_fewshot: 2\n",
    "group.yaml": "group: group\ntag: a\ntask: [plain, again]\n",
    "list.yaml": "task: list\ninclude: [deep/part, again.yaml]\nnum_fewshot: null\n",
    "deep/part": "task_list: [{task: x}]\ndoc_to_text: '{{x}}'\nnested: {list: [1, 2.5, yes, 1e-3]}\n",
    "deep/inner.yaml": "task: inner\ninclude: ../plain.yaml\n",
    "coded/coded.yaml": "task: coded\ntag: b\nprocess_docs: !function utils.prepare\n"
    "metric_list:\n- {aggregation: !function more.utils.mean}\n",
    "coded/included.yaml": "task: included\ninclude: coded.yaml\n",
    "coded/utils.py": "def prepare(docs):\n    return docs\n",
    "coded/more/utils.py": "def mean(values):\n    return values\n",
    "coded/helper.py": "",
    "circle.yaml": "task: circle\ninclude: circle.yaml\n",
    "lost.yaml": "task: lost\ninclude: nowhere.yaml\n",
    "list_of.yaml": "- task: x\n",
    "broken.yaml": "task: [\n",
    "nothing.yaml": "num_fewshot: 1\n",
    "__pycache__/hidden.yaml": "task: hidden\n",
    "sub/.ipynb_checkpoints/hidden.yaml": "task: hidden\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TASKS.items():
        (tmp_path / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tasks" / name).write_text(text)
    return tmp_path / "tasks"


def theirs(path: Path) -> dict[str, Any] | None:
    """Return what lm-eval reads from a file, with functions by name; None for a file that it skips."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(path, resolve_func=False)
    except Exception:  # as its index does
        return None


def ours(path: Path) -> dict[str, Any] | None:
    """Return what we read from a file, with functions as lm-eval names them."""
    try:
        config = read_task(path)
    except (UnknownInputError, OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    return _with_functions(config, path.parent)


def _with_functions(value: Any, folder: Path) -> Any:
    if isinstance(value, dict) and set(value) == {"!function"}:
        return str(folder / value["!function"])
    if isinstance(value, dict):
        return {k: _with_functions(v, folder) for k, v in value.items()}
    return [_with_functions(v, folder) for v in value] if isinstance(value, list) else value


def test_task_files(folder: Path) -> None:
    read = {path.name: (ours(path), theirs(path)) for path in sorted(folder.rglob("*.yaml"))}
    assert {name for name, (found, _) in read.items() if found is None} == {
        "circle.yaml", "lost.yaml", "list_of.yaml", "broken.yaml",
    }  # fmt: skip
    for name, (found, wanted) in read.items():
        assert found == wanted, name


def test_listing(folder: Path) -> None:
    from lm_eval.tasks._index import TaskIndex

    index, listing = TaskIndex.build([folder]), list_tasks(folder)
    assert listing.files == {name: entry.yaml_path for name, entry in index.items() if entry.yaml_path}
    tags = {name: entry.tags for name, entry in index.items() if not entry.yaml_path}
    assert {name: set(tasks) for name, tasks in listing.tags.items()} == tags


@pytest.mark.parametrize("name", ["coded", "included"])
def test_code(name: str, folder: Path) -> None:
    """The files that lm-eval takes functions from, and those that these may import."""
    from lm_eval.tasks._yaml_loader import load_yaml

    path = folder / f"coded/{name}.yaml"
    config = load_yaml(path)
    functions = [config["process_docs"], config["metric_list"][0]["aggregation"]]
    files = task_code(read_task(path), path.parent)
    assert {Path(f.__code__.co_filename) for f in functions} <= set(files)
    assert [str(f.relative_to(path.parent)) for f in files] == ["helper.py", "more/utils.py", "utils.py"]


@pytest.mark.slow
def test_all_task_files_of_lm_eval() -> None:
    """Of its thousands, we read as lm-eval does all but the few with code of another folder."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec
    assert spec.origin
    files = sorted((Path(spec.origin).parent / "tasks").rglob("*.yaml"))
    read = {path: (ours(path), theirs(path)) for path in files}
    wrong = [path for path, (found, wanted) in read.items() if found is not None and found != wanted]
    assert wrong == []
    unread = [path for path, (found, wanted) in read.items() if found is None and wanted is not None]
    assert len(unread) < len(files) / 50
