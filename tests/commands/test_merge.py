"""`contmerge merge ...`, as a user types it: what it says, what it leaves, and how it refuses."""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys.loras import lora
from toys.models import perturbed, toy_llama
from transformers import AutoModelForCausalLM

from hf_contmerge.commands.main import main
from hf_contmerge.merging._log import own_name
from hf_contmerge.models.experts import first_twin
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.files import FolderLock
from hf_contmerge.runtime.records import read_record, record_text

Captured = pytest.CaptureFixture[str]
Run = Callable[..., str]
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def home(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three experts, two adapters, and a state that holds the first expert. Not to be written to."""
    home = tmp_path_factory.mktemp("home")
    for name, source in zip(("base", "law", "medicine", "code"), (base_folder, *expert_folders), strict=True):
        shutil.copytree(source, home / name)
    for i in (1, 2):
        lora(home / "base", home / f"lora{i}", seed=i, target_modules=["q_proj"], r=1)
    assert main(["merge", "init", str(home / "state"), "--base", str(home / "base"), "--rule", "magmax"]) == 0
    assert main(["merge", "add", str(home / "state"), str(home / "law")]) == 0
    return home


@pytest.fixture
def state(home: Path, tmp_path: Path) -> Path:
    """A copy of the state, to be changed."""
    return shutil.copytree(home / "state", tmp_path / "state")


@pytest.fixture
def done(capsys: Captured) -> Run:
    """Return a function that carries out a command, and gives what it prints."""

    def done(*words: object) -> str:
        capsys.readouterr()
        assert main(["merge", *map(str, words)]) == 0
        printed = capsys.readouterr()
        assert not printed.err
        return printed.out

    return done


@pytest.fixture
def refused(capsys: Captured) -> Run:
    """Return a function that gives a command in vain, and returns its one line without the word Error."""

    def refused(*words: object, lines: int = 1) -> str:
        capsys.readouterr()
        assert main(["merge", *map(str, words)]) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert printed.err.startswith("Error: ")
        assert printed.err.count("\n") == lines
        return printed.err.removeprefix("Error: ").rstrip("\n")

    return refused


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of a folder, but for the lock, which holds nothing."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = Weights(one), Weights(other)
    return ours.names == theirs.names and all(torch.equal(ours.tensor(n), theirs.tensor(n)) for n in ours.names)


# What the commands do


@pytest.mark.parametrize("word", [(), ("once",)])
def test_a_merge_in_one_command(word: tuple[str, ...], home: Path, tmp_path: Path, done: Run) -> None:
    """The same bytes as by a state, with a lineage that can be verified."""
    out, models = tmp_path / "out", [home / "base", home / "law", home / "medicine"]
    said = done(*word, *models, "--rule", "magmax", "--set", "lambda=0.5", "--out", out)
    assert [line.split()[1] for line in said.splitlines()[1:3]] == ["law", "medicine"]
    done("init", tmp_path / "state", "--base", models[0], "--rule", "magmax", "--set", "lambda=0.5")
    done("add", tmp_path / "state", *models[1:])
    done("export", tmp_path / "state", tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    assert main(["verify", str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "state"]  # nothing is left over


def test_mistakes_of_a_merge_in_one_command(
    home: Path, tmp_path: Path, refused: Run, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, out = [home / "base", home / "law"], tmp_path / "out"
    assert refused(*models, "--rule", "magmacks", "-o", out).startswith("Unknown rule 'magmacks'")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "exists and is not empty" in refused(*models, "--rule", "magmax", "-o", tmp_path / "full")
    refused(home / "base", home / "nothing", "--rule", "magmax", "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    for words, said in (
        (["exprot", "state", "out"], "Unknown command 'exprot'. Did you mean 'export'?"),
        (["gpt2", "owner/law", "-o", "x"], "The following arguments are required: --rule"),
        (["owner/log", "--rule", "magmax"], "The following arguments are required: EXPERT, -o/--out"),
    ):
        with pytest.raises(SystemExit):
            main(["merge", *words])
        assert capsys.readouterr().err.startswith(f"Error: {said}")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("owner/law@main", "law"),
        ("owner/expert", "owner"),
        ("runs/x/stages/01-law/experts/base/expert", "law"),
        ("runs/x/stages/02-code.v2/merges/magmax/merged/", "code.v2"),
        ("experts/law/expert", "law"),
        ("out/law/checkpoint-500", "law"),
        ("law-adapter", "law-adapter"),
        ("cache/hub/models--owner--law/snapshots/0123456789abcdef0123456789abcdef01234567", "law"),
    ],
)
def test_experts_are_named_after_what_they_learnt(model: str, name: str, tmp_path: Path) -> None:
    assert own_name(model) == name
    (tmp_path / model).mkdir(parents=True)
    assert own_name(tmp_path / model) == name


def test_from_nothing_to_a_model(home: Path, tmp_path: Path, done: Run) -> None:
    state = tmp_path / "state"
    init = ("--base", home / "base", "--rule", "opcm", "--set", "alpha=0.4", "--set", "variant=block")
    said = done("init", state, *init)
    assert said == f"{state} is ready. Next: contmerge merge add {state} EXPERT\n"
    assert done("log", state).splitlines() == [f"opcm(alpha=0.4, variant=block) on {home / 'base'}", "no expert yet"]
    done("add", state, home / "law", home / "medicine", "--workers", 1)
    said = done("add", state, home / "code", "--as", "python")
    assert done("log", state) == said
    lines = said.splitlines()
    assert [line.split()[:3] for line in lines[1:4]] == [
        ["1", "law", "model"], ["2", "medicine", "model"], ["3", "python", "model"],
    ]  # fmt: skip
    assert lines[4].startswith("scale ")
    log = json.loads(done("log", state, "--json"))
    assert [e["model"] for e in log["experts"]] == [str(home / n) for n in ("law", "medicine", "code")]
    assert lines[4] == f"scale {log['scale']:.6g}, |running| {log['running_norm']:.4f}"

    out = tmp_path / "out"
    words = ("--dtype", "bfloat16", "--shard-size", "40KB", "--tokenizer-from", home / "code")
    said = done("export", state, out, *words)
    assert said.startswith(f"Wrote {out}. bfloat16, stochastic rounding: 100.0 % of the update kept, relative error ")
    assert len(list(out.glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    assert json.loads((out / "merge.json").read_text())["experts"] == log["experts"]

    said = done("drop", state, "medicine", "--workers", 2)
    *experts, scale, written = said.splitlines()[1:]
    assert [line.split()[1] for line in experts] == ["law", "python"]
    assert scale.startswith("scale ")
    assert written.startswith(f"written after 3 experts: {out}, bfloat16")
    done("init", tmp_path / "never", *init)
    done("add", tmp_path / "never", home / "law", home / "code")
    running = [json.loads((folder / "state.json").read_text())["running"] for folder in (state, tmp_path / "never")]
    assert digests(state / running[0]) == digests(tmp_path / "never" / running[1])


def test_who_owns_what(home: Path, state: Path, tmp_path: Path, done: Run) -> None:
    done("add", state, home / "medicine")
    said = done("owners", state, "--out", tmp_path / "owners")
    assert said == f"Shares:  {tmp_path}/owners/owners.json\nPicture: {tmp_path}/owners/owners.png\n"
    shares = json.loads((tmp_path / "owners/owners.json").read_text())
    assert shares["stages"] == ["law", "medicine"]
    for layer in shares["layers"].values():
        assert sum(layer.values()) == pytest.approx(1)
    assert (tmp_path / "owners/owners.png").read_bytes().startswith(b"\x89PNG")
    done("owners", state)
    assert json.loads((state / "owners.json").read_text()) == shares


def test_adapters_in_and_out(home: Path, tmp_path: Path, done: Run) -> None:
    done("init", tmp_path / "state", "--base", home / "base", "--rule", "average")
    said = done("add", tmp_path / "state", home / "lora1", home / "lora2")
    assert [line.split()[2] for line in said.splitlines()[1:3]] == ["adapter", "adapter"]
    assert "2 modules; largest relative error " in done("export", tmp_path / "state", tmp_path / "one", "--as-adapter")
    assert (tmp_path / "one/adapter_config.json").is_file()


@pytest.mark.parametrize("rule", ["magmax", "opcm"])
def test_a_recipe_of_mergekit_is_the_same_merge(rule: str, home: Path, tmp_path: Path, done: Run) -> None:
    """The bytes of a state's export."""
    recipe = write_recipe(home, tmp_path, rule, ("law", "medicine", "code"))
    said = done("from-recipe", recipe, tmp_path / "out", "--shard-size", "1GB")
    assert said.startswith(f"Wrote {tmp_path}/out: {rule}, scale ")
    done("init", tmp_path / "state", "--base", home / "base", "--rule", rule)
    done("add", tmp_path / "state", home / "law", home / "medicine", home / "code")
    done("export", tmp_path / "state", tmp_path / "exported")
    assert same_weights(tmp_path / "out", tmp_path / "exported")
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yml", "out", "state", "exported"}


def write_recipe(home: Path, folder: Path, rule: str, experts: tuple[str | Path, ...]) -> Path:
    path = folder / "recipe.yml"
    recipe = {
        "merge_method": rule, "base_model": str(home / "base"),
        "models": [{"model": str(home / e)} for e in experts], "dtype": "float32",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe))
    return path


# Words


def test_words_that_are_wrong(home: Path, tmp_path: Path, refused: Run) -> None:
    init, out = ("init", tmp_path / "state", "--base", home / "base", "--rule"), tmp_path / "out"
    assert refused(*init, "magmx").startswith("Unknown rule 'magmx'. Did you mean 'magmax'? Known: average, blend, ")
    for setting, text in {
        "alpha": "--set alpha: expected NAME=VALUE, as in --set alpha=0.5.",
        "alpha=high": "opcm's alpha must be a finite float; got 'high'",
        "alpha=[": "opcm's alpha must be a finite float; got '['",
        "alpha=": "opcm's alpha must be a finite float; got None",
        "alfa=0.5": "opcm has no parameter 'alfa'; it has: alpha, variant",
        "base=x": "opcm has no parameter 'base'; it has: alpha, variant",
        "crew=1": "opcm has no parameter 'crew'; it has: alpha, variant",
        "folder=x": "opcm has no parameter 'folder'; it has: alpha, variant",
    }.items():
        assert refused(*init, "opcm", "--set", setting) == text
    export = ("export", home / "state", out)
    for size in ("5 pounds", "GB", " ", "infGB", "5GBB"):
        assert refused(*export, "--shard-size", size) == (
            f"Invalid size {size!r}. Give a number and KB, MB, GB or TB, as in 5GB."
        )
    assert refused(*export, "--shard-size", "0").startswith("A shard of 0 is empty")
    assert refused(*export, "--dtype", "int8") == "Unknown dtype 'int8'. Known: bfloat16, float16, float32."
    assert refused(*export, "--rank", "4").startswith("--rank belongs to --as-adapter")
    assert refused(*export, "--as-adapter", "--rank", "0") == "--rank 0: an adapter's rank must be at least 1."
    for device in ("tpu", "meta", "cuda:x"):
        assert refused(*export, "--device", device) == f"--device {device}: unknown device. Give cpu, cuda or cuda:N."
    assert refused(*export, "--workers", "-1") == (
        "--workers -1: give a number of threads, or omit it for one per core."
    )
    assert refused("add", home / "state", home / "code", "--as", "a", "--as", "b").startswith("1 experts but 2 stage")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(home: Path, tmp_path: Path, refused: Run) -> None:
    assert refused("export", home / "state", tmp_path / "out", "--device", "cuda") == (
        "--device cuda: CUDA is missing on this machine or in this torch. Use cpu."
    )


@pytest.mark.parametrize("words", [["add"], ["log"], ["export", "OUT"], ["drop", "law"], ["owners"]])
def test_a_folder_without_a_state(words: list[str], tmp_path: Path, refused: Run, home: Path) -> None:
    more = [home / "law"] if words[0] == "add" else [tmp_path / w if w == "OUT" else w for w in words[1:]]
    folder = tmp_path / "nowhere"
    assert refused(words[0], folder, *more) == (
        f"{folder} holds no state. Start one: contmerge merge init {folder} --base MODEL --rule NAME"
    )
    assert not list(tmp_path.iterdir())


def test_a_state_without_an_expert(home: Path, tmp_path: Path, done: Run, refused: Run) -> None:
    state = tmp_path / "state"
    done("init", state, "--base", home / "base", "--rule", "magmax")
    for words in (["export", state, tmp_path / "out"], ["owners", state],
                  ["export", state, tmp_path / "out", "--as-adapter"]):  # fmt: skip
        assert refused(*words) == f"{state} holds no expert yet. Add one: contmerge merge add {state} EXPERT"
    assert refused("init", state, "--base", home / "base", "--rule", "opcm") == (
        f"{state} is not empty. Choose a new folder for the state, or add to the existing state."
    )


def test_a_stage_that_is_unknown(state: Path, refused: Run) -> None:
    before = digests(state)
    assert refused("drop", state, "lwa") == f"Unknown stage 'lwa' in {state}. Did you mean 'law'? Known: law."
    assert digests(state) == before


def test_owners_where_none_are(home: Path, tmp_path: Path, done: Run, refused: Run) -> None:
    done("init", tmp_path / "state", "--base", home / "base", "--rule", "opcm")
    done("add", tmp_path / "state", home / "law")
    assert refused("owners", tmp_path / "state") == (
        "opcm mixes experts in every weight, so no weight has an owner. Use magmax or random_mix."
    )


# Bad experts. EXPERT, BASE and FILE stand for the folders and the file of weights.


def edit_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        edit(values)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def set_value(value: float) -> Change:
    def edit(values: dict[str, torch.Tensor]) -> None:
        values["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    return edit_weights(edit)


def edit_bytes(edit: Callable[[bytes], bytes]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return change


def in_shards(edit: Callable[[Path, dict[str, Any]], None]) -> Change:
    """Cut an expert's weights into two files, then spoil them or their index."""

    def change(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(values)
        files = {n: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, n in enumerate(names)}
        for file in set(files.values()):
            save_file({n: values[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": files}
        edit(folder, index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def fp8(values: dict[str, torch.Tensor]) -> None:
    values["model.layers.0.mlp.up_proj.weight"] = values["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)


def garbled(raw: bytes) -> bytes:
    """Return the file with a header that promises a tensor elsewhere than it can be."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def point(target: str) -> Callable[[Path, dict[str, Any]], None]:
    return lambda _, index: index["weight_map"].update({"model.norm.weight": target})


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
NO_NUMBER = (
    f"{UP} in EXPERT has 1 values that are NaN or infinite. The training diverged or the file is damaged: lower "
    "learning_rate and train that stage again, or fetch the model again. Nothing was merged."
)
INDEX = "EXPERT/model.safetensors.index.json"
BAD: dict[str, tuple[Change, str]] = {
    "shape": (
        edit_weights(lambda v: v.update({NORM: torch.ones(31)})),
        f"{NORM} has shape (31,) in EXPERT, (32,) in BASE. Both must have the same architecture and size.",
    ),
    "shape of the same size": (
        edit_weights(lambda v: v.update({UP: v[UP].T.contiguous()})),
        f"{UP} has shape (32, 64) in EXPERT, (64, 32) in BASE. Both must have the same architecture and size.",
    ),
    "name": (
        edit_weights(lambda v: v.update({"model.nrom.weight": v.pop(NORM)})),
        f"EXPERT does not fit BASE: it lacks {NORM}. Both must have the same architecture.",
    ),
    "fp8": (
        edit_weights(fp8),
        "EXPERT: model.layers.0.mlp.up_proj.weight is stored as F8_E4M3, which cannot be merged. Dequantise the model "
        "first: load it with dequantisation and save it as bfloat16.",
    ),
    "integers": (
        edit_weights(lambda v: v.update({NORM: torch.ones(32, dtype=torch.int8)})),
        f"{NORM} is stored as torch.int8 in EXPERT, as torch.float32 in BASE. An expert's weights must be floating: "
        "save it again in the base's dtype.",
    ),
    "quantised": (
        edit_config(quantization_config={"quant_method": "bitsandbytes"}),
        "EXPERT is quantised (bitsandbytes). Dequantise it and save it as bfloat16 before merging.",
    ),
    "vocabulary": (
        edit_config(vocab_size=392),
        "EXPERT has a vocabulary of 392, BASE of 384: their rows do not correspond. Train the expert with the base's "
        "tokenizer, without new tokens.",
    ),
    "missing shard": (
        in_shards(lambda folder, _: (folder / "model-00002-of-00002.safetensors").unlink()),
        f"{INDEX} names a missing file: model-00002-of-00002.safetensors. Fetch the model again.",
    ),
    "missing tensor": (
        in_shards(
            lambda _, index: index["weight_map"].update({"model.more.weight": "model-00001-of-00002.safetensors"})
        ),
        "EXPERT: the index lists model.more.weight, which no file holds. Fetch the model again.",
    ),
    "index that leaves the folder": (
        in_shards(point("../base/model.safetensors")),
        f"{INDEX} points outside its folder: ../base/model.safetensors. Fetch the model again.",
    ),
    "index to the root": (
        in_shards(point("/etc/hostname")),
        f"{INDEX} points outside its folder: /etc/hostname. Fetch the model again.",
    ),
    "truncated": (
        edit_bytes(lambda raw: raw[:-1000]),
        "FILE is truncated or not a safetensors file (REASON). Fetch or write it again.",
    ),
    "truncated header": (
        edit_bytes(lambda raw: raw[:100]),
        "FILE is truncated or not a safetensors file (REASON). Fetch or write it again.",
    ),
    "corrupted header": (
        edit_bytes(garbled),
        "FILE is truncated or not a safetensors file (REASON). Fetch or write it again.",
    ),
    "no safetensors": (
        edit_bytes(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "FILE is truncated or not a safetensors file (REASON). Fetch or write it again.",
    ),
    "pickled": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin").touch(),
        "EXPERT holds no *.safetensors of a model: expected model.safetensors or model.safetensors.index.json. It has "
        "pytorch_model.bin, which is not read. Pickled weights (.bin, .pt) are not read: load the model once with "
        "transformers and call save_pretrained.",
    ),
    "NaN": (set_value(math.nan), NO_NUMBER),
    "Inf": (set_value(math.inf), NO_NUMBER),
    "minus Inf": (set_value(-math.inf), NO_NUMBER),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "EXPERT has no config.json. Give a folder written by `save_pretrained`.",
    ),
    "broken config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "Cannot read EXPERT/config.json: REASON. Fetch or save the model again.",
    ),
    "nothing": (shutil.rmtree, "There is no model at EXPERT. Give a folder, a .gguf file, or a Hub id (owner/model)."),
}


def spelled(message: str, folder: Path, base: Path, wanted: str) -> str:
    """Return a message with the folders' names replaced, and the library's own reason, as far as one is expected."""
    text = message.replace(str(folder / "model.safetensors") + " ", "FILE ").replace(str(folder), "EXPERT")
    text = text.replace(str(base), "BASE")
    before, reason, after = wanted.partition("REASON")
    if reason and text.startswith(before) and text.endswith(after):
        assert len(text) > len(before) + len(after)
        return wanted
    return text


@pytest.fixture(scope="module")
def bad_experts(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bad")
    found = {}
    for i, (name, (change, _)) in enumerate(BAD.items()):
        found[name] = shutil.copytree(home / "code", folder / f"expert{i}")
        change(found[name])
    return found


@pytest.mark.parametrize("case", BAD)
def test_a_bad_expert(case: str, home: Path, state: Path, bad_experts: dict[str, Path], refused: Run) -> None:
    """Alone, and after a good one."""
    before, wanted, bad = digests(state), BAD[case][1], bad_experts[case]
    for experts in ([bad], [home / "medicine", bad]):
        assert spelled(refused("add", state, *experts), bad, home / "base", wanted) == wanted
        assert digests(state) == before
        assert sorted(p.name for p in state.iterdir()) == [".lock", "running-1", "state.json"]


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("rule", ["magmax", "opcm"])
def test_a_bad_expert_in_a_recipe(
    case: str, rule: str, home: Path, tmp_path: Path, bad_experts: dict[str, Path], refused: Run
) -> None:
    wanted, bad = BAD[case][1], bad_experts[case]
    recipe = write_recipe(home, tmp_path, rule, ("law", bad))
    assert spelled(refused("from-recipe", recipe, tmp_path / "out"), bad, home / "base", wanted) == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yml"]


@pytest.mark.parametrize("case", ["fp8", "quantised", "missing shard", "truncated", "no config", "nothing"])
def test_a_bad_base(case: str, home: Path, tmp_path: Path, bad_experts: dict[str, Path], refused: Run) -> None:
    wanted, bad = BAD[case][1], bad_experts[case]
    message = refused("init", tmp_path / "state", "--base", bad, "--rule", "magmax")
    assert spelled(message, bad, home / "base", wanted) == wanted
    assert not list(tmp_path.iterdir())


def test_the_same_expert_twice(home: Path, state: Path, tmp_path: Path, refused: Run) -> None:
    before, copy = digests(state), shutil.copytree(home / "law", tmp_path / "copy")
    assert refused("add", state, copy) == (
        f"{copy} has the same weights as law; an expert must not be folded twice. "
        "Leave it out, or name the right one. Nothing was merged."
    )
    assert "is listed twice; an expert" in refused("add", state, home / "code", home / "code")
    assert digests(state) == before
    recipe = write_recipe(home, tmp_path, "magmax", ("law", "code", "law"))
    assert "is listed twice; an expert must not be folded twice" in refused("from-recipe", recipe, tmp_path / "out")
    recipe.write_text(recipe.read_text().replace(str(home / "law"), str(copy), 1))
    message = refused("from-recipe", recipe, tmp_path / "out")
    assert f"{home / 'law'} has the same weights as {copy}; an expert must not be folded twice" in message
    assert not (tmp_path / "out").exists()


def test_nearly_the_same_expert_is_no_twin(home: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(home / "law", tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    last = list(tensors)[-1]
    tensors[last].view(-1)[-1] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert first_twin([home / "law", home / "code", copy]) is None
    assert first_twin([copy, home / "code", home / "law", home / "law"]) == (3, 2)


def test_an_expert_of_another_size(home: Path, state: Path, tmp_path: Path, refused: Run) -> None:
    before = digests(state)
    deep = toy_llama(tmp_path / "deep", seed=3, layers=3)
    wide = toy_llama(tmp_path / "wide", seed=3, hidden=64)
    assert refused("add", state, deep) == (
        f"{deep} does not fit {home}/base: it has model.layers.2.input_layernorm.weight and 8 more tensors, which the "
        "base lacks. Both must have the same architecture."
    )
    assert refused("add", state, wide) == (
        f"model.embed_tokens.weight has shape (384, 64) in {wide}, (384, 32) in {home}/base. Both must have the "
        "same architecture and size."
    )
    assert digests(state) == before


def test_an_adapter_of_another_base(home: Path, state: Path, tmp_path: Path, done: Run, refused: Run) -> None:
    other = shutil.copytree(home / "lora1", tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/other"}))
    before = digests(state)
    assert refused("add", state, other).startswith(f"{other} was trained on owner/other, not on {home}/base:")
    assert digests(state) == before
    assert "other" in done("add", state, other, "--force")


# A state that does not fit


def test_a_state_of_another_base(home: Path, tmp_path: Path, done: Run, refused: Run) -> None:
    base, state = shutil.copytree(home / "base", tmp_path / "base"), tmp_path / "state"
    done("init", state, "--base", base, "--rule", "magmax")
    done("add", state, home / "law")
    before = digests(state)
    set_value(0.5)(base)
    for words in (["add", state, home / "code"], ["export", state, tmp_path / "out"], ["owners", state],
                  ["export", state, tmp_path / "out", "--as-adapter", "--rank", 1]):  # fmt: skip
        assert refused(*words) == (
            f"The base at {base} has other weights than at the start of {state}: model.safetensors differs. Restore "
            "it, or start a new state with `contmerge merge init`."
        )
    shutil.rmtree(base)
    assert refused("add", state, home / "code").startswith(f"There is no model at {base}. Give a folder")
    assert digests(state) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"format": 3, "versions": {"hf_contmerge": "9.1"}}, "FILE has format 3, but this program reads format 2, "
         "whose records hold digests. Continue with the version that wrote it (hf_contmerge 9.1)."),
        ({"format": None}, "FILE has format None, but this program reads format 2, whose records hold digests."),
        ({"rule": "soup"}, "Unknown rule 'soup'."),
        ({"parameters": {"lamda": 1}}, "magmax has no parameter 'lamda'; it has: lambda"),
        ({"experts": 7}, "FILE is damaged: "),
        ({"colour": "red"}, "FILE is damaged: "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("words", [["add", "code"], ["export", "out"], ["drop", "law"], ["log"]])
def test_a_state_of_another_rule_or_version(
    values: dict[str, Any], wanted: str, words: list[str], home: Path, state: Path, tmp_path: Path, refused: Run
) -> None:
    file = state / "state.json"
    file.write_text(record_text({**read_record(file, ""), **values}))
    before = digests(state)
    more = [{"code": home / "code", "out": tmp_path / "out"}.get(w, w) for w in words[1:]]
    assert refused(words[0], state, *more).replace(str(file), "FILE").startswith(wanted)
    assert digests(state) == before
    assert not (tmp_path / "out").exists()


def test_a_damaged_state(home: Path, state: Path, refused: Run) -> None:
    running = state / "running-1/model.safetensors"
    running.write_bytes(running.read_bytes()[:-8])
    before = digests(state)
    assert refused("add", state, home / "code").startswith(f"{running} changed or went missing after")
    assert digests(state) == before
    shutil.rmtree(running.parent)
    assert refused("add", state, home / "code").startswith(f"{running} changed or went missing after")


def test_a_state_in_use(home: Path, state: Path, refused: Run) -> None:
    before = digests(state)
    with FolderLock(state):
        for words in (["add", state, home / "code"], ["drop", state, "law"]):
            assert refused(*words) == f"{state} is in use by another process. Wait for it, or name another folder."
    assert digests(state) == before


def test_what_dropping_needs(home: Path, state: Path, tmp_path: Path, done: Run, refused: Run) -> None:
    expert = perturbed(home / "base", tmp_path / "extra", seed=8, size=0.01)
    done("add", state, expert, home / "code")
    shutil.rmtree(expert)
    before = digests(state)
    message = refused("drop", state, "law", lines=3)
    assert message.splitlines()[1:] == [
        f"  extra: {expert} is missing", "Restore them and rerun the command. The state is unchanged.",
    ]  # fmt: skip
    assert digests(state) == before
    done("drop", state, "extra")


# The machine


def test_not_enough_disk(
    home: Path, state: Path, tmp_path: Path, refused: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told before the first byte is written: of all that a command writes, at once or one after the other."""
    before, parameters = digests(state), Weights(home / "base").numel()
    recipes = {}
    for rule in ("magmax", "opcm"):
        (tmp_path / rule).mkdir()
        recipes[rule] = write_recipe(home, tmp_path / rule, rule, ("law", "code"))
    commands: list[tuple[int, list[Any]]] = [
        (5, ["add", state, home / "code"]),  # float32 and the owners' bytes
        (4, ["export", state, tmp_path / "out"]),
        (2, ["export", state, tmp_path / "out", "--dtype", "bfloat16"]),
        (4, ["from-recipe", recipes["magmax"], tmp_path / "out"]),
        (8, ["from-recipe", recipes["opcm"], tmp_path / "out"]),  # the state in between too
    ]
    for width, words in commands:
        free = width * parameters - 1
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        message = refused(*words)
        assert message.startswith(f"Merging writes {width * parameters / 2**20:.1f} MiB to the disk of {tmp_path}/")
        assert message.endswith(
            "Free some space or name a folder on another disk, then rerun the command. Nothing was written."
        )
        assert {p.name for p in tmp_path.iterdir()} == {"state", "magmax", "opcm"}
    assert digests(state) == before


def test_where_nothing_may_be_written(home: Path, tmp_path: Path, refused: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    for words in (["export", home / "state"], ["from-recipe", write_recipe(home, tmp_path, "magmax", ("law",))]):
        assert refused(*words, tmp_path / "out") == (
            f"{tmp_path}/out exists and is not empty. Name a new folder, or remove that one."
        )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
