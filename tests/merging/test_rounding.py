"""What a written merge keeps of its update: measured, recorded, warned of, and kept where the dtype allows it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys.loras import lora
from toys.models import toy_llama
from transformers import AutoModelForCausalLM

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError, RunError
from hf_contmerge.loop.functions import merge_stage
from hf_contmerge.merging._log import write_log
from hf_contmerge.merging.adapter import export_adapter
from hf_contmerge.merging.state import MergeState

RULES: dict[str, dict[str, float]] = {"magmax": {}, "opcm": {}, "average": {}, "task_arithmetic": {"lambda": 0.5}}
SMALL = 1e-5  # of an update: a tenth of the usual weight's last bit in bfloat16


def changed(model: Path, out: Path, *, seed: int, size: float, dtype: torch.dtype = torch.float32) -> Path:
    """Write an expert: the model plus noise, in a dtype."""
    shutil.copytree(model, out)
    draw, tensors = torch.Generator().manual_seed(seed), load_file(model / "model.safetensors")
    new = {n: (t.float() + size * torch.randn(t.shape, generator=draw)).to(dtype) for n, t in sorted(tensors.items())}
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 with two experts in float32, a usual update away."""
    home = tmp_path_factory.mktemp("half-rounding")
    toy_llama(home / "base", seed=0, hidden=64, dtype=torch.bfloat16)
    for seed in (1, 2):
        changed(home / "base", home / f"e{seed}", seed=seed, size=SMALL)
    return home


def started(home: Path, folder: Path, rule: str = "average", **parameters: Any) -> MergeState:
    return MergeState.create(folder, base=home / "base", rule=rule, **parameters).add(home / "e1", home / "e2")


def kept_by_hand(base: Path, out: Path, exact: Path) -> tuple[float, float]:
    start, stored, wide = (load_file(f / "model.safetensors") for f in (base, out, exact))
    dot = square = lost = 0.0
    for name, tensor in start.items():
        s, e, b = stored[name].double(), wide[name].double(), tensor.double()
        dot, square = dot + float(((s - b) * (e - b)).sum()), square + float((e - b).square().sum())
        lost += float((s - e).square().sum())
    return dot / square, (lost / square) ** 0.5


@pytest.mark.parametrize("rule", RULES)
def test_the_record_says_what_is_kept(half: Path, rule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = started(half, tmp_path / "state", rule, **RULES[rule])
    exact = state.export(tmp_path / "float32", dtype="float32")
    for rounding, words in ((None, "stochastic"), ("nearest", "nearest")):
        out = state.export(tmp_path / words, rounding=rounding)
        record = json.loads((out / "merge.json").read_text())["stored"]
        assert (record["dtype"], record["rounding"]) == ("bfloat16", words)
        survival, error = kept_by_hand(half / "base", out, exact)
        assert record["survival"] == pytest.approx(survival, abs=1e-3)
        assert record["error"] == pytest.approx(error, rel=1e-3)
        if words == "nearest":
            assert survival < 0.5
            assert record["worst"][0][1] < 0.1
        else:
            assert survival == pytest.approx(1, abs=0.1)
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [str(tmp_path / "nearest")]
    assert json.loads((exact / "merge.json").read_text())["stored"]["survival"] == pytest.approx(1, abs=1e-4)


def test_the_log_lists_what_was_written(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = started(half, tmp_path / "state")
    assert main(["merge", "export", str(state.folder), str(tmp_path / "out"), "--rounding", "nearest"]) == 0
    assert "% of the update kept" in capsys.readouterr().out
    state.export(tmp_path / "wide", dtype="float32")
    assert main(["merge", "log", str(state.folder)]) == 0
    near, wide = capsys.readouterr().out.splitlines()[-2:]
    assert near.startswith(f"written after 2 experts: {tmp_path / 'out'}, bfloat16, nearest rounding: ")
    assert wide.startswith(f"written after 2 experts: {tmp_path / 'wide'}, float32: 100.0 % of the update kept")
    assert main(["merge", "log", str(state.folder), "--json"]) == 0
    exports = json.loads(capsys.readouterr().out)["exports"]
    assert [e["rounding"] for e in exports] == ["nearest", "none"]


def test_the_word_of_every_door(half: Path, tmp_path: Path) -> None:
    nearest = started(half, tmp_path / "a").export(tmp_path / "nearest", rounding="nearest")
    merge_stage(tmp_path / "b", half / "e1", base=half / "base", rule="average")
    merge_stage(tmp_path / "b", half / "e2", export=tmp_path / "by-function", rounding="nearest")
    same = [load_file(f / "model.safetensors") for f in (nearest, tmp_path / "by-function")]
    assert all(torch.equal(same[0][n], same[1][n]) for n in same[0])
    merge_stage(tmp_path / "b", half / "e2", export=tmp_path / "by-function")  # no word: as it is
    with pytest.raises(RunError, match="holds this merge in bfloat16 and nearest; this call asks for float32"):
        merge_stage(tmp_path / "b", half / "e2", export=tmp_path / "by-function", dtype="float32")
    with pytest.raises(RecipeError, match=r"Unknown rounding 'up'\. Known: nearest, stochastic\."):
        MergeState.load(tmp_path / "a").export(tmp_path / "up", rounding="up")


def test_one_expert_taken_whole(half: Path, tmp_path: Path) -> None:
    """In float32 its own bits; in 16 bits the update all the same."""
    state = MergeState.create(tmp_path / "state", base=half / "base", rule="average").add(half / "e1")
    exact = load_file(state.export(tmp_path / "wide", dtype="float32") / "model.safetensors")
    assert all(torch.equal(exact[n], t) for n, t in load_file(half / "e1" / "model.safetensors").items())
    state.export(tmp_path / "half")
    assert state.exports()[-1]["survival"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_float32_beside_16_bits_stays(half: Path, dtype: str | None, tmp_path: Path) -> None:
    """Router biases and norms, as transformers saves them."""
    base = shutil.copytree(half / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {n: t.float() + 1e-5 if "norm" in n else t for n, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    expert = changed(base, tmp_path / "expert", seed=3, size=1e-3)
    out = (
        MergeState.create(tmp_path / "state", base=base, rule="average")
        .add(expert)
        .export(tmp_path / "out", dtype=dtype)
    )
    stored = load_file(out / "model.safetensors")
    other = getattr(torch, dtype or "bfloat16")
    assert {n: t.dtype for n, t in stored.items()} == {n: torch.float32 if "norm" in n else other for n in stored}
    exact = load_file(expert / "model.safetensors")
    assert all(torch.equal(t, exact[n]) for n, t in stored.items() if "norm" in n)
    assert json.loads((out / "merge.json").read_text())["stored"]["dtype"] == (dtype or "bfloat16")


def test_a_base_in_float32_is_written_in_16_bits_throughout(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0)
    state = MergeState.create(tmp_path / "state", base=base, rule="average")
    out = state.add(changed(base, tmp_path / "e", seed=1, size=1e-3)).export(tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_adapters(half: Path, tmp_path: Path) -> None:
    """The weights that adapters leave alone are the base's; an exported adapter's whole tensors are measured too."""
    expert = lora(half / "base", tmp_path / "x", seed=1, modules_to_save=["norm"])
    state = MergeState.create(tmp_path / "state", base=half / "base", rule="average").add(expert)
    out = state.export(tmp_path / "out")
    start, stored = load_file(half / "base" / "model.safetensors"), load_file(out / "model.safetensors")
    assert torch.equal(stored["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert state.exports()[-1]["survival"] == pytest.approx(1, abs=0.05)
    export_adapter(state, tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "rounding.json").read_text())
    assert record["rounding"] == "stochastic"
    AutoModelForCausalLM.from_pretrained(out, dtype="auto")


@pytest.mark.parametrize("touched", [True, False])
def test_values_too_large_for_float16_are_refused(tmp_path: Path, touched: bool) -> None:
    """Infinity is never written where the merge is finite."""
    base = toy_llama(tmp_path / "base", seed=0)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][5] = 1e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    expert = changed(base, tmp_path / "e", seed=1, size=1e-3) if touched else lora(base, tmp_path / "x", seed=1)
    state = MergeState.create(tmp_path / "state", base=base, rule="average").add(expert)
    with pytest.raises(ModelError, match=r"model.norm.weight: merged values as large as 1e\+05 do not fit float16"):
        state.export(tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    state.export(tmp_path / "fine", dtype="bfloat16")


def test_a_scale_beyond_float32_starts_no_state(half: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lambda must be a finite float; got 1e\\+300"):
        started(half, tmp_path / "state", "task_arithmetic", **{"lambda": 1e300})
    assert not (tmp_path / "state").exists()


def test_a_state_has_finite_numbers(half: Path, tmp_path: Path) -> None:
    log = started(half, tmp_path / "state").log()
    before = (tmp_path / "state" / "state.json").read_bytes()
    with pytest.raises(ModelError, match=r"infinite or NaN\. The state is unchanged"):
        write_log(tmp_path / "state", replace(log, running_norm=float("inf")))
    assert (tmp_path / "state" / "state.json").read_bytes() == before


@pytest.mark.slow
def test_a_stale_record_of_rounding_goes(half: Path, tmp_path: Path) -> None:
    """mergekit writes into folders that hold an earlier merge."""
    recipe = {"base_model": str(half / "base"), "models": [{"model": str(half / "e1")}], "dtype": "float32"}
    for method, exists in (("average", True), ("task_arithmetic", False)):
        yml = tmp_path / f"{method}.yml"
        yml.write_text(
            json.dumps({"merge_method": method, **recipe, "parameters": {"weight": 1.0} if not exists else {}})
        )
        subprocess.run([Path(sys.executable).with_name("mergekit-yaml"), yml, tmp_path / "out"], check=True)
        assert (tmp_path / "out" / "rounding.json").is_file() == exists


@pytest.mark.parametrize("rule", RULES)
def test_an_expert_in_float64_is_merged_as_any_other(rule: str, half: Path, tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=half / "base", rule=rule, **RULES[rule])
    state.add(changed(half / "e1", tmp_path / "e1", seed=4, size=0, dtype=torch.float64), half / "e2")
    same = started(half, tmp_path / "other", rule, **RULES[rule])
    found, wanted = (load_file(s.export(tmp_path / s.folder.name / "out") / "model.safetensors") for s in (state, same))
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
