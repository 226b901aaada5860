"""A merge that grows in a folder: what it holds, what it refuses, and what is left of it when it is killed."""

import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.forks import Forks, forks
from toys.loras import lora
from toys.models import perturbed
from toys.rules import PLAIN
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_contmerge
from hf_contmerge.errors import ModelError, RecipeError, ResourceError, RunError
from hf_contmerge.merge_rules import get_rule
from hf_contmerge.merging.state import MergeState
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import FolderLock
from hf_contmerge.runtime.records import read_record, record_text


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    home = tmp_path_factory.mktemp("adapters")
    return tuple(lora(base_folder, home / f"lora{i}", seed=i, r=1, target_modules=["q_proj"]) for i in (1, 2, 3))


def started(base: Path, folder: Path, rule: str = "magmax", experts: Sequence[Path] = ()) -> MergeState:
    state = MergeState.create(folder, base=base, rule=rule)
    return state.add(*experts) if experts else state


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a folder, but for the lock and the list of exports."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in (".lock", "exports.jsonl")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def merged(state: MergeState) -> dict[str, Any]:
    """Return what a state holds: the experts with their norms, and the running state's files."""
    log, running = state.log(), state.running()
    return {
        "experts": [(e.stage, e.sha256, e.norm, e.kind) for e in log.experts],
        "norm": log.running_norm,
        "running": digests(running) if running else {},
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = Weights(folder)
    return {n: weights.tensor(n) for n in weights.names}


def changed(folder: Path, out: Path, name: str = "model.norm.weight") -> Path:
    """Copy a model; one value of one weight differs by a bit."""
    shutil.copytree(folder, out)
    values = load_file(out / "model.safetensors")
    values[name].view(torch.int32).reshape(-1)[0] ^= 1
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})
    return out


# Growing


def test_a_merge_in_python(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = hf_contmerge.MergeState.create(tmp_path / "state", base=base_folder, rule="opcm", alpha=0.4)
    assert state.log().experts == ()
    assert state.running() is None
    state.add(expert_folders[0]).add(str(expert_folders[1]), stages=["law"])
    assert state.log() == MergeState.load(tmp_path / "state").log()
    log = state.log()
    assert (log.rule, log.parameters) == ("opcm", {"alpha": 0.4, "variant": "block"})
    assert log.base == log.base_folder == str(base_folder.resolve())
    assert [e.stage for e in log.experts] == [expert_folders[0].name, "law"]
    assert [e.folder for e in log.experts] == [str(e) for e in expert_folders[:2]]
    assert all(len(e.sha256) == 64 and e.norm > 0 and e.kind == "model" and e.added for e in log.experts)
    assert state.scale() == pytest.approx(sum(e.norm for e in log.experts) / 2 / log.running_norm)
    out = state.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in tensors(out).items())
    lineage = json.loads((out / "merge.json").read_text())
    assert lineage["scale"] == state.scale()
    assert [e["stage"] for e in lineage["experts"]] == [expert_folders[0].name, "law"]


@pytest.mark.parametrize("rule", PLAIN)
def test_appending_is_merging_in_one_go(
    rule: str, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    one = started(base_folder, tmp_path / "one", rule, expert_folders)
    each = started(base_folder, tmp_path / "each", rule)
    for expert in expert_folders:
        each.add(expert, crew=Crew(workers=1))
    assert merged(each) == merged(one)
    weights = Weights(base_folder)
    (tmp_path / "batch").mkdir()
    merge_experts(get_rule(rule), weights, [open_expert(e, weights) for e in expert_folders],
                  merged_out=Output(tmp_path / "batch"))  # fmt: skip
    out = digests(each.export(tmp_path / "out"))
    assert out.pop("merge.json")
    assert out == digests(tmp_path / "batch")


@pytest.mark.parametrize("rule", ["opcm", "magmax", "null_space"])
def test_experts_may_be_deleted_once_they_are_in(
    rule: str, base_folder: Path, expert_folders: tuple[Path, ...], adapters: tuple[Path, ...], tmp_path: Path
) -> None:
    kept = started(base_folder, tmp_path / "kept", rule)
    state = started(base_folder, tmp_path / "state", rule)
    for expert in (adapters[0], expert_folders[0], expert_folders[1]):
        shutil.copytree(expert, tmp_path / expert.name)
        state.add(tmp_path / expert.name)
        shutil.rmtree(tmp_path / expert.name)
        kept.add(expert)
    assert merged(state) == merged(kept)
    assert (
        digests(state.export(tmp_path / "a"))["model.safetensors"]
        == digests(kept.export(tmp_path / "b"))["model.safetensors"]
    )


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda f: (f / "model.safetensors").unlink()])
def test_the_only_expert_gives_its_bits_while_it_is_there(
    damage: Callable[[Path], None], base_folder: Path, tmp_path: Path
) -> None:
    """And a value beside them by rounding when it is not."""
    expert = perturbed(base_folder, tmp_path / "expert", seed=1, size=1.0)
    state = started(base_folder, tmp_path / "state", "average", [expert])
    wanted = load_file(expert / "model.safetensors")
    here = tensors(state.export(tmp_path / "here"))
    assert all(torch.equal(here[k], v) for k, v in wanted.items())
    damage(expert)
    gone = tensors(state.export(tmp_path / "gone"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(gone[name], tensor, rtol=1e-5, atol=1e-6)


def test_adapters_are_kept_as_factors(base_folder: Path, adapters: tuple[Path, ...], tmp_path: Path) -> None:
    state = started(base_folder, tmp_path / "state", "opcm", adapters)
    running = state.running()
    assert running is not None
    assert len(list((running / "factors").glob("*.safetensors"))) == 2  # one module, two layers
    assert not (running / "model.safetensors").exists()
    assert [e.kind for e in state.log().experts] == ["adapter"] * 3


def test_names_of_stages_differ(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    twins = [shutil.copytree(e, tmp_path / f"{i}/law") for i, e in enumerate(expert_folders)]
    state = started(base_folder, tmp_path / "state", experts=twins[:2])
    state.add(twins[2])
    assert [e.stage for e in state.log().experts] == ["law", "law-2", "law-3"]
    before = digests(state.folder)
    other = perturbed(base_folder, tmp_path / "other", seed=9, size=0.01)
    with pytest.raises(RecipeError, match=r"A stage law-2 exists already. Choose a name other than law, law-2"):
        state.add(other, stages=["law-2"])
    with pytest.raises(RecipeError, match="1 experts but 2 stage names: pass one name per expert, or none"):
        state.add(other, stages=["a", "b"])
    with pytest.raises(RecipeError, match="No expert to add: pass at least one"):
        state.add()
    assert digests(state.folder) == before


# The base


def test_a_base_that_has_changed(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    state = started(base, tmp_path / "state", experts=expert_folders[:1])
    before = digests(state.folder)
    shutil.rmtree(base)
    changed(base_folder, base)
    for do in (
        lambda: state.add(expert_folders[1]),
        lambda: state.export(tmp_path / "out"),
        lambda: state.drop(expert_folders[0].name),
    ):
        with pytest.raises(ModelError) as error:
            do()
        assert str(error.value) == (
            f"The base at {base} has other weights than at the start of {state.folder}: model.safetensors differs. "
            "Restore it, or start a new state with `contmerge merge init`."
        )
    assert digests(state.folder) == before
    assert not (tmp_path / "out").exists()


def test_a_base_that_was_only_touched(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    state = started(base, tmp_path / "state", experts=expert_folders[:1])
    os.utime(base / "model.safetensors", ns=(0, 0))
    state.add(expert_folders[1])
    shutil.rmtree(base)
    shutil.copytree(base_folder, base)  # other inodes, same weights
    state.export(tmp_path / "out")
    assert merged(state) == merged(started(base_folder, tmp_path / "other", experts=expert_folders[:2]))


def test_a_base_that_is_gone(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    state = started(base, tmp_path / "state")
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=f"There is no model at {base}"):
        state.add(expert_folders[0])


# What is refused, and leaves the state as it was


def test_the_same_expert_twice(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:2])
    before, copy = digests(state.folder), shutil.copytree(expert_folders[0], tmp_path / "copy")
    for again in ([copy], [expert_folders[2], copy], [expert_folders[0]]):
        with pytest.raises(ModelError) as error:
            state.add(*again)
        assert str(error.value) == (
            f"{again[-1]} has the same weights as {expert_folders[0].name}; an expert must not be folded twice. "
            "Leave it out, or name the right one. Nothing was merged."
        )
    with pytest.raises(ModelError, match=f"{copy} has the same weights as .*; an expert must not be folded twice"):
        started(base_folder, tmp_path / "other", experts=[expert_folders[0], copy])
    assert digests(state.folder) == before


def test_a_value_that_is_no_number(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    """It is found half way through: what was written until then goes."""
    bad = shutil.copytree(expert_folders[1], tmp_path / "bad")
    values = load_file(bad / "model.safetensors")
    values["model.norm.weight"][1] = float("nan")
    save_file(values, bad / "model.safetensors", metadata={"format": "pt"})
    for rule in ("magmax", "opcm"):
        state = started(base_folder, tmp_path / rule, rule, expert_folders[:1])
        before = digests(state.folder)
        with pytest.raises(ModelError, match=f"model.norm.weight in {bad} has 1 values that are NaN or infinite"):
            state.add(bad)
        assert digests(state.folder) == before
        assert not (state.folder / "running-2").exists()
        state.add(expert_folders[1])


def test_a_folder_that_holds_something_else(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(RunError, match=f"{folder} is not empty. Choose a new folder for the state"):
            started(base_folder, folder)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError) as error:
            MergeState.load(folder)
        assert str(error.value) == (
            f"{folder} holds no state. Start one: contmerge merge init {folder} --base MODEL --rule NAME"
        )
        with pytest.raises(RunError, match="holds no state"):
            MergeState(folder).add(base_folder)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    state = started(base_folder, tmp_path / "state")
    before = digests(state.folder)
    with pytest.raises(RunError, match="is not empty"):
        started(base_folder, tmp_path / "state", "opcm")
    assert digests(state.folder) == before


def test_rules_and_parameters_that_are_unknown(base_folder: Path, tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("magmx", {}, "Unknown rule 'magmx'. Did you mean 'magmax'"),
        ("opcm", {"alfa": 0.5}, "opcm has no parameter 'alfa'"),
        ("opcm", {"alpha": "half"}, "opcm's alpha must be a finite float; got 'half'"),
    ]
    for rule, parameters, text in wrong:
        with pytest.raises(RecipeError, match=text):
            MergeState.create(tmp_path / "state", base=base_folder, rule=rule, **parameters)
    assert not (tmp_path / "state").exists()


def edited(state: MergeState, change: Callable[[dict[str, Any]], Any]) -> None:
    file = state.folder / "state.json"
    file.write_text(record_text(change(read_record(file, ""))))


def test_a_state_of_another_version(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    edited(state, lambda v: {**v, "format": 3, "versions": {"hf_contmerge": "9.1"}, "new": 1})
    before = digests(state.folder)
    with pytest.raises(RunError) as error:
        state.add(expert_folders[1])
    assert str(error.value) == (
        f"{state.folder}/state.json has format 3, but this program reads format 2, whose records hold digests. "
        "Continue with the version that wrote it (hf_contmerge 9.1). If it is this version's, it is damaged. Restore "
        "it from a copy, or start a new state from the experts with `contmerge merge init` and `merge add`."
    )
    assert digests(state.folder) == before


def test_a_state_with_a_rule_that_is_not_here(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    edited(state, lambda v: {**v, "rule": "soup"})
    before = digests(state.folder)
    for do in (lambda: state.add(expert_folders[1]), lambda: state.export(tmp_path / "out")):
        with pytest.raises(RecipeError, match="Unknown rule 'soup'"):
            do()
    assert digests(state.folder) == before


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut": lambda text: text[: len(text) // 2],
    "list": lambda _: "[]",
    "null": lambda _: "null",
    "no experts": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "experts"}),
    "no rule": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "rule"}),
    "unknown field": lambda text: json.dumps({**json.loads(text), "colour": "red"}),
    "expert without norm": lambda text: re.sub(r'"norm": [^,]+,', "", text),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_log_that_is_damaged(
    damage: str, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    file = state.folder / "state.json"
    whole = file.read_text()
    file.write_text(DAMAGES[damage](whole))
    before = digests(state.folder)
    for do in (state.log, lambda: state.add(expert_folders[1]), lambda: state.export(tmp_path / "out")):
        with pytest.raises(RunError, match=rf"{file} (is damaged: .*|has format 1.*). Restore it from a copy"):
            do()
    assert digests(state.folder) == before
    file.write_text(whole)
    state.add(expert_folders[1])


def test_a_running_state_that_is_gone_does_not_pass_for_zeros(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    shutil.rmtree(state.folder / "running-1")
    for do in (
        lambda: state.add(expert_folders[1]),
        lambda: state.export(tmp_path / "out"),
    ):
        with pytest.raises(RunError, match=r"running-1/.* changed or went missing after .*state.json was written"):
            do()
    assert [e.stage for e in state.log().experts] == [expert_folders[0].name]


def test_a_running_state_that_is_truncated(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    file = state.folder / "running-1/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    before = digests(state.folder)
    with pytest.raises(RunError, match=f"{file} changed or went missing"):
        state.add(expert_folders[1])
    assert digests(state.folder) == before


@pytest.fixture
def little_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that leaves so many bytes on every disk."""

    def leave(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=2**40, used=2**40, free=free))

    return leave


@pytest.mark.parametrize("rule", ["magmax", "opcm", "ties"])
def test_not_enough_disk(
    rule: str, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path,
    little_disk: Callable[[int], None],
) -> None:  # fmt: skip
    state = started(base_folder, tmp_path / "state", rule, expert_folders[:1])
    before, parameters = digests(state.folder), Weights(base_folder).numel()
    need = {"magmax": 5, "opcm": 4, "ties": 16}[rule] * parameters  # float32, and a byte for the owner or four slots
    little_disk(need - 1)
    with pytest.raises(ResourceError) as error:
        state.add(expert_folders[1])
    assert str(error.value).startswith(f"Merging writes {need / 2**20:.1f} MiB to the disk of {state.folder}/running-2")
    assert str(error.value).endswith(
        "Free some space or name a folder on another disk, then rerun the command. Nothing was written."
    )
    little_disk(4 * parameters - 1)
    with pytest.raises(ResourceError, match="Nothing was written"):
        state.export(tmp_path / "out")
    assert digests(state.folder) == before
    assert {p.name for p in tmp_path.iterdir()} == {"state"}
    little_disk(need)
    state.add(expert_folders[1])
    state.export(tmp_path / "out")


# Dropping


@pytest.mark.parametrize("rule", PLAIN)
@pytest.mark.parametrize("which", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_a_dropped_stage_was_never_there(
    rule: str, which: int, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    state = started(base_folder, tmp_path / "state", rule, expert_folders)
    state.drop(expert_folders[which].name)
    without = started(base_folder, tmp_path / "without", rule)
    for i, expert in enumerate(expert_folders):
        if i != which:
            without.add(expert)
    assert merged(state) == merged(without)
    assert len(list(state.folder.glob("running-*"))) == 1
    state.add(expert_folders[which])


def test_a_dropped_adapter_was_never_there(base_folder: Path, adapters: tuple[Path, ...], tmp_path: Path) -> None:
    state = started(base_folder, tmp_path / "state", "opcm", adapters)
    state.drop(adapters[1].name)
    without = started(base_folder, tmp_path / "without", "opcm", [adapters[0], adapters[2]])
    assert merged(state) == merged(without)


def test_dropping_all_gives_an_empty_state(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    state.drop(expert_folders[0].name)
    assert merged(state) == merged(started(base_folder, tmp_path / "other"))
    assert not list(state.folder.glob("running-*"))
    with pytest.raises(RunError, match=r"holds no expert yet. Add one: contmerge merge add"):
        state.export(tmp_path / "out")
    state.add(expert_folders[0])
    assert merged(state) == merged(started(base_folder, tmp_path / "third", experts=expert_folders[:1]))


def test_what_dropping_needs_is_named(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    a, b, c = (shutil.copytree(e, tmp_path / n) for e, n in zip(expert_folders, "abc", strict=True))
    d = perturbed(base_folder, tmp_path / "d", seed=7, size=0.01)
    state = started(base_folder, tmp_path / "state", experts=[a, b, c, d])
    shutil.rmtree(a)
    shutil.rmtree(c)
    changed(expert_folders[2], c)
    (d / "model.safetensors").write_bytes(b"")
    before = digests(state.folder)
    with pytest.raises(ModelError) as error:
        state.drop("b")
    assert str(error.value) == (
        "To drop b, the state is folded again from the other experts, but these are missing or changed:\n"
        f"  a: {a} is missing\n"
        f"  c: {c} now holds other weights\n"
        f"  d: {d} now holds other weights\n"
        "Restore them and rerun the command. The state is unchanged."
    )
    assert digests(state.folder) == before
    for folder, source in ((a, expert_folders[0]), (c, expert_folders[2])):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
    perturbed(base_folder, d, seed=7, size=0.01)
    state.drop("b")  # itself not needed
    with pytest.raises(RecipeError, match=r"Unknown stage 'b' in .*state. Known: a, c, d."):
        state.drop("b")


# Exporting


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_export_loads_in_transformers(
    dtype: str, base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    state = started(base_folder, tmp_path / "state", "opcm", expert_folders)
    before = digests(state.folder)
    out = state.export(tmp_path / "out", dtype=dtype, rounding="nearest", shard_size=30_000)
    assert digests(state.folder) == before
    assert len(list(out.glob("*.safetensors"))) > 2
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    model, info = loaded
    assert model.dtype == getattr(torch, dtype)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    wide = tensors(state.export(tmp_path / "wide"))
    assert all(torch.equal(model.state_dict()[k], v.to(model.dtype)) for k, v in wide.items())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template
    assert tokenizer("a court")["input_ids"] == AutoTokenizer.from_pretrained(base_folder)("a court")["input_ids"]


def test_the_tokenizer_of_another_model(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    """With its chat template and generation config; the config stays the base's."""
    chat = shutil.copytree(expert_folders[0], tmp_path / "chat")
    (chat / "chat_template.jinja").write_text("another template")
    (chat / "generation_config.json").write_text('{"temperature": 0.25}')
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    state = started(base_folder, tmp_path / "state", experts=expert_folders)
    out = state.export(tmp_path / "out", tokenizer_from=str(chat))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (chat / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["rms_norm_eps"] != 0.5
    assert AutoTokenizer.from_pretrained(out).chat_template == "another template"
    with pytest.raises(ModelError, match="There is no model at nowhere"):
        state.export(tmp_path / "other", tokenizer_from="nowhere")
    assert not (tmp_path / "other").exists()


def test_where_an_export_goes(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    for name in ("full", "empty", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(RunError) as error:
            state.export(tmp_path / name)
        assert str(error.value) == (
            f"{tmp_path / name} exists and is not empty. Name a new folder, or remove that one."
        )
    assert (tmp_path / "full/notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    state.export(tmp_path / "empty")
    state.export(tmp_path / "new/deep")
    monkeypatch.chdir(tmp_path / "here")
    state.export("relative")
    with pytest.raises(RunError, match="exists and is not empty"):
        state.export(".")
    wanted = digests(tmp_path / "empty")
    assert digests(tmp_path / "new/deep") == digests(tmp_path / "here/relative") == wanted
    with pytest.raises(RecipeError, match="Unknown dtype 'int8'"):
        state.export("other", dtype="int8")
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["relative"]


# Several at once


def test_a_second_process_is_kept_out(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = started(base_folder, tmp_path / "state", experts=expert_folders[:1])
    before = digests(state.folder)
    with FolderLock(state.folder):
        for do in (lambda: state.add(expert_folders[1]), lambda: state.drop(expert_folders[0].name)):
            with pytest.raises(RunError, match=f"{state.folder} is in use by another process. Wait for it"):
                do()
        assert digests(state.folder) == before
        state.export(tmp_path / "out")  # reads only
    state.add(expert_folders[1])


def test_whoever_adds_at_the_same_time_loses_nothing(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path
) -> None:
    """One is refused, or comes second: what the other has added is kept either way."""
    for attempt in range(5):
        state, barrier = started(base_folder, tmp_path / str(attempt)), threading.Barrier(3)

        def add(expert: Path, state: MergeState = state, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(20)
            while True:
                try:
                    state.add(expert, crew=Crew(workers=1))
                    return
                except RunError as error:
                    if "is in use by another process" not in str(error):
                        raise
                    time.sleep(0.001)

        threads = [threading.Thread(target=add, args=(e,)) for e in expert_folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        order = [Path(e.folder) for e in state.log().experts]
        assert sorted(order) == sorted(expert_folders)
        assert merged(state) == merged(started(base_folder, tmp_path / f"{attempt}-again", experts=order))


# Crashes; tests/scenarios/test_disk.py has those before each change.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with forks(tmp_path_factory.mktemp("forks") / "root") as server:
        yield server


@pytest.mark.slow
def test_killed_while_it_writes(
    base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path, server: Forks
) -> None:
    """At moments that the tensors' writing, of which Python tells nobody, decides."""
    state = started(base_folder, tmp_path / "state", "opcm", expert_folders[:2])
    old = merged(state)
    new = merged(started(base_folder, tmp_path / "new", "opcm", expert_folders))
    for delay in (0.0, 0.001, 0.002, 0.004, 0.008, 0.016):
        child = server.start("merge", "add", state.folder, expert_folders[2])
        while not (state.folder / "running-2").exists() and len(state.log().experts) == 2:
            pass
        time.sleep(delay)
        with suppress(ProcessLookupError):  # it was faster
            os.kill(child, signal.SIGKILL)
        server.wait()
        assert merged(state) in (old, new)
        if merged(state) == new:
            break
    if merged(state) == old:
        assert server.run("merge", "add", state.folder, expert_folders[2]) == 0, server.log.read_text()
    assert merged(state) == new


def test_parameters_may_have_the_names_of_fields(base_folder: Path, tmp_path: Path) -> None:
    """As docs/merging.md says: `lambda` is no name in Python."""
    for number, words in enumerate(({"lambda_": 0.25}, {"lambda": 0.25})):
        state = MergeState.create(tmp_path / str(number), base=base_folder, rule="magmax", **words)
        assert (state.log().parameters, state.scale()) == ({"lambda": 0.25}, 0.25)
