"""Keeps lm-eval from running code of task files.

A task file can call Python (`!function`), name a metric that is a Hub script, and hold Jinja templates, which reach all
of Python. Code runs with consent only, templates always in Jinja's sandbox. lm-eval's own task files are its package.
Data is read from the files that a task names, never from the current folder for want of a name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, partialmethod
from pathlib import Path
from typing import Any

from jinja2 import BaseLoader, StrictUndefined
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import SandboxedEnvironment
from yaml import YAMLError

from hf_contmerge.errors import ContmergeError, RecipeError
from hf_contmerge.runtime.foreign import expanded
from hf_contmerge.runtime.patterns import require_quick
from hf_contmerge.scoring._formats import LOCAL_READERS, UnknownInputError, functions_in, included_in, read_task_file

_PATTERNS = ("regex_pattern", "regexes_to_ignore")
_PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs")  # a text of any size
_LARGEST = 10_000_000  # characters, or bits of a number, that a template may make at once


@contextmanager
def foreign_tasks(*, trust_remote_code: bool) -> Iterator[None]:
    """Check each task file loaded by lm-eval inside.

    Raises RecipeError for a file in use that would run code without consent.
    """
    from lm_eval import utils
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import _factory, _index, manager

    loaders: tuple[Any, ...] = (_factory, _index, manager)
    loaded: Any = ConfigurableTask
    before, environment, download = _factory.load_yaml, utils.env, loaded.download
    checked: set[Path] = set()
    for module in loaders:
        module.load_yaml = partial(_load_yaml, before, checked, trust_remote_code)
    utils.env = _sandbox(environment.filters)
    loaded.download = partialmethod(_download, download)
    try:
        yield
    except SecurityError as error:
        raise RecipeError(f"A task's template reaches for Python, or makes too much text: {error}") from error
    except TemplateError as error:
        raise RecipeError(f"A task's template is no Jinja, or does not fit its documents: {error}") from error
    finally:
        for module in loaders:
            module.load_yaml = before
        utils.env = environment
        loaded.download = download


@contextmanager
def task_errors(name: str = "a task") -> Iterator[None]:
    """Turn lm-eval's exceptions about settings of a task file into a RecipeError."""
    try:
        yield
    except (ContmergeError, TemplateError, OSError, MemoryError):
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise RecipeError(f"lm-eval cannot use {name} ({why:.300}). Correct its file, or remove it.") from error


def _load_yaml(
    load: Callable[..., dict[str, Any]], checked: set[Path], trusted: bool, path: str | Path, **how: Any
) -> dict[str, Any]:
    """Load a task file by lm-eval's own function, once it is checked."""
    runs = how.get("resolve_func", True)
    if not runs and str(path).startswith(_package()):
        return _indexed(load, str(path))
    file = expanded(path).resolve()
    if file not in checked and not _is_of_lm_eval(file):
        _require_harmless(file, trusted=trusted or not runs, seen=set())
        if runs:
            checked.add(file)
    return load(path, **how)


@cache
def _indexed(load: Callable[..., dict[str, Any]], path: str) -> dict[str, Any]:
    """Read one of lm-eval's own task files, once a process.

    Its index is made for each scoring, and all 14,000 files take seconds.
    """
    return load(path, resolve_func=False, recursive=True)


@cache
def _package() -> str:
    """Return how the paths of lm-eval's own files begin in its index."""
    import lm_eval

    return str(Path(lm_eval.__path__[0], "tasks")) + os.sep


def _download(task: Any, download: Callable[..., None], options: Any = None, **more: Any) -> None:
    """Load a task's data, if it names its files."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as readers

    name, reader = task.config.task, task.DATASET_PATH
    named = options if isinstance(options, dict) else {}
    if reader in readers and reader not in LOCAL_READERS:
        known = ", ".join(sorted(LOCAL_READERS))
        raise RecipeError(f"The task {name} reads by `dataset_path: {reader}`. Supported here are {known}.")
    if reader in readers and not (named.get("data_files") or named.get("data_dir")):
        raise RecipeError(
            f"The task {name} reads {reader} and names no files, so `datasets` would search the current folder. "
            f"Name them, such as `dataset_kwargs: {{data_files: {{test: FILE.{reader}}}}}`."
        )
    download(task, options, **more)


def _is_of_lm_eval(file: Path) -> bool:
    import lm_eval

    return file.is_relative_to(Path(lm_eval.__path__[0]).resolve())


def _require_harmless(file: Path, *, trusted: bool, seen: set[Path]) -> None:
    """Raise RecipeError for a task file beyond bounds or with code."""
    if file in seen or _is_of_lm_eval(file):
        return
    seen.add(file)
    try:
        config = read_task_file(file)
    except (UnknownInputError, OSError, YAMLError) as error:
        raise RecipeError(f"Cannot read the task file {file}: {error}. Correct or remove it.") from error
    for name in included_in(config):
        _require_harmless((file.parent / name).resolve(), trusted=trusted, seen=seen)
    if trusted:
        return
    code = [f"`!function {name}`" for name in functions_in(config)] + [f"the metric {m}" for m in _scripts(config)]
    code += [f"`use_prompt: {config['use_prompt']}`"] if config.get("use_prompt") else []
    if code:
        raise RecipeError(
            f"The task file {file} runs Python of others ({', '.join(code[:3])}), which happens only if you say so: "
            "read that code, then set `trust_remote_code: true` in the recipe and add `--trust-remote-code` (in "
            "Python: trust_remote_code=True)."
        )
    for pattern in _patterns(config):
        try:
            require_quick(pattern)
        except ValueError as error:
            raise RecipeError(f"The task file {file}: {error}.") from error


def _scripts(config: Any) -> Iterator[str]:
    """Yield metrics fetched as scripts by lm-eval."""
    from lm_eval.api import metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import metric_registry

    for entry in _mappings(config):
        name = entry.get("metric")
        if isinstance(name, str) and (entry.get("hf_evaluate") or name not in metric_registry):
            yield name


def _patterns(config: Any) -> Iterator[str]:
    for entry in _mappings(config):
        for word in _PATTERNS:
            value = entry.get(word)
            yield from (p for p in (value if isinstance(value, list) else [value]) if isinstance(p, str))


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _mappings(part)


class _Sandbox(SandboxedEnvironment):
    """Jinja without access to Python, and with bounded operators."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _PADDING and super().is_safe_attribute(obj, attr, value)

    intercepted_binops = frozenset(["*", "**", "<<", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = _size(left) * (right if operator == "**" and isinstance(right, int) else 1)
        if operator == "*":
            size = max(_size(left) * _times(right), _size(right) * _times(left))
        if size > _LARGEST or (operator == "%" and isinstance(left, str)):  # "%1000000000d"
            raise SecurityError(f"a template makes too large a value ({operator})")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | list | tuple) else 1


def _times(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1


def _sandbox(filters: dict[str, Any]) -> SandboxedEnvironment:
    environment = _Sandbox(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters = {**filters, "regex_replace": partial(_replace, filters["regex_replace"])}
    return environment


def _replace(replace: Callable[..., str], text: str, pattern: str, *more: Any, **options: Any) -> str:
    require_quick(pattern)
    return replace(text, pattern, *more, **options)
