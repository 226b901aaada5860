"""The card and the push, against a real HTTP server that speaks the Hub's protocol (tests/hub_server.py)."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from toys.hub_server import READ_TOKEN, WRITE_TOKEN, Hub, hub_server, reach
from toys.recipes import RECIPES
from toys.reports import NASTY
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError, ResourceError, RunError
from hf_contmerge.report._contents import EVALUATIONS
from hf_contmerge.report._evaluations import evaluations, task_data
from hf_contmerge.report._findings import METRICS
from hf_contmerge.report._public import hub_model, public_name, public_recipe
from hf_contmerge.report.card import model_card
from hf_contmerge.report.push import push_merged
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.changes import flat_fields
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe
from hf_contmerge.run.scores import Sample, TaskScore, write_scores
from hf_contmerge.runtime.records import seal_yaml

REPO = "me/law-chat"
PUSH = """
import sys
from hf_contmerge.errors import ContmergeError
from hf_contmerge.report.push import push_merged
from hf_contmerge.run.folder import Run
try:
    print(push_merged(Run.load(sys.argv[1])))
except ContmergeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
LOAD = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model, want = AutoModelForCausalLM.from_pretrained(sys.argv[1]), load_file(sys.argv[2])
got = model.state_dict()
assert got.keys() == want.keys()
assert all(torch.equal(got[n].view(torch.int32), want[n].view(torch.int32)) for n in want)
print(len(want), AutoTokenizer.from_pretrained(sys.argv[1])("b a").input_ids)
from huggingface_hub import hf_hub_download
card = open(hf_hub_download(sys.argv[1], "README.md")).read()
exec(card.split("```python\\n")[1].split("```")[0])
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two stages, the first trained and the second given, merged by two rules; all paths lead through alice's home."""
    home = tmp_path / "alice"
    data = {
        "name": "law-chat",
        "base_model": str(home / "models" / "tiny-base"),
        "stages": [
            {"name": "law", "dataset": str(home / "texts" / "law.jsonl")},
            {"name": "chat", "expert": "owner/tiny-chat@v2", "tasks": ["arc_easy"]},
            {
                "name": "code",
                "dataset": {
                    "mix": [
                        {"path": "owner/code-texts", "share": 0.8},
                        {"path": str(home / "web.jsonl"), "share": 0.2},
                    ]
                },
            },
        ],
        "train": {"max_steps": 2, "deepspeed": str(home / "ds.json")},
        "merge": ["magmax", "opcm"],
        "evaluate": {"general_tasks": ["piqa"]},
        "publish": {"repo_id": REPO, "merge": "magmax", "license": "apache-2.0"},
    }
    run = Run.open(parse_recipe(data), home / "runs" / "law-chat")
    given = home / "cache" / "given"
    put(run.base, scores(law=-3.0, arc=0.25, piqa=0.5))
    run.expert(1, "base").finish("train", {"model_sha256": "1a" * 32})
    put(run.expert(1, "base"), scores(law=-2.0, arc=0.25, piqa=0.5))
    run.expert(2, "previous").finish("train", {"given": str(given), "model_sha256": "2b" * 32})
    experts = [run.expert(1, "base").model, given]
    for t in (1, 2):
        merge(run, t, experts[:t])
    put(run.merged(1, magmax(run)), scores(law=-2.25, arc=0.25, piqa=0.5))
    put(run.merged(2, magmax(run)), scores(law=-2.5, arc=0.5, piqa=0.375))
    return run


def magmax(run: Run):
    return run.recipe.merge[0]


def put(place: Place, values: dict) -> None:
    place.finish("score", {"tasks": write_scores(place, {n: TaskScore.from_json(v) for n, v in values.items()})})


def scores(*, law: float, arc: float, piqa: float) -> dict:
    """Return score records: a perplexity of exp(-law) per word over 2 documents, and accuracies over 8 documents."""

    def accuracy(value: float) -> dict:
        gains = tuple(float(i < 8 * value) for i in range(8))
        sample = Sample(gains, (1.0,) * 8)
        return TaskScore("accuracy", "acc", value, value, sample.stderr(), gains, sample.weights, {}).to_json()

    sample = Sample((5 * law, 5 * law), (5.0, 5.0))
    perplexity = TaskScore("perplexity", "word_perplexity", float(torch.tensor(-law).exp()), law, sample.stderr(),
                           sample.gains, sample.weights, {})  # fmt: skip
    return {"law_heldout": perplexity.to_json(), "arc_easy": accuracy(arc), "piqa": accuracy(piqa)}


def merge(run: Run, t: int, experts: list[Path]) -> None:
    """Write what merging stage t leaves: a tiny model, merge.yml and the record."""
    torch.manual_seed(t)
    place, shape = run.merged(t, magmax(run)), {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_attention_heads=2, num_key_value_heads=2, **shape))
    model.save_pretrained(place.model)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "/home": 1, "b a": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(place.model)
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps({**config, "_name_or_path": run.recipe.base_model}))
    mergekit = {"merge_method": "magmax", "base_model": run.recipe.base_model,
                "models": [{"model": str(e)} for e in experts], "parameters": {"lambda": 0.5}}  # fmt: skip
    place.mergekit_recipe.write_text(seal_yaml(f"# {run.folder}\n" + yaml.safe_dump(mergekit)))
    norms, digests = {"experts": [1.5, 2.5][:t], "running": 2.75}, ["1e" * 32, "2e" * 32][:t]
    record = {"rule": "magmax", "parameters": {"lambda": 0.5}, "scale": 0.5, "norms": norms}
    place.finish("merge", {**record, "expert_sha256": digests, "model_sha256": f"{t}f" * 32})


@pytest.fixture
def near_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub that this process reaches."""
    reach(hub, monkeypatch)
    return hub


def python(script: str, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would, with the Hub's address and the token in the environment."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env}
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], env=env, capture_output=True, text=True)


def push(run: Run, hub: Hub, **env: str) -> subprocess.CompletedProcess[str]:
    home = str(hub.folder.parent / "hf_home")
    return python(PUSH, run.folder, **{"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_TOKEN": WRITE_TOKEN, **env})


def refusal(run: Run, hub: Hub, **env: str) -> str:
    done = push(run, hub, **env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1].replace(hub.url, "HUB")


def test_a_pushed_model_comes_back_bit_by_bit(run: Run, hub: Hub, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    done = push(run, hub)
    assert done.returncode == 0, done.stderr

    first, ours = hub.repos[REPO].commits
    assert first.message == "initial commit"  # the Hub's own
    assert ours.message == "law-chat: magmax after stage 2 of 3"
    assert done.stdout.strip() == f"{hub.url}/{REPO}/commit/{ours.oid}"
    assert hub.repos[REPO].private
    model = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    both = [".gitattributes", "README.md", "merge.yml", "recipe.yml", *model]
    assert sorted(hub.files(REPO)) == sorted([*both, "forgetting.png"])
    assert sorted(hub.files(REPO, "01-law")) == sorted(both)
    assert hub.files(REPO, "01-law")["model.safetensors"] != hub.files(REPO)["model.safetensors"]
    assert {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before

    weights = run.merged(2, magmax(run)).model / "model.safetensors"
    loaded = python(LOAD, REPO, weights, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "other"), HF_TOKEN=READ_TOKEN)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines()[0] == f"{len(load_file(weights))} [2]"


@pytest.mark.slow
def test_a_pushed_expert_comes_back_bit_by_bit(run: Run, hub: Hub, tmp_path: Path) -> None:
    place = run.expert(1, "base")
    shutil.copytree(run.merged(1, magmax(run)).model, place.model)
    sources = [{"path": "owner/law-texts", "split": "train", "license": "mit"}]
    place.finish("train", {"model_sha256": "1a" * 32, "start": run.recipe.base_model, "sources": sources})
    words = ["push", str(place.model), "--repo-id", "me/law", "--base", "owner/tiny-base"]
    program = f"from hf_contmerge.commands.main import main; raise SystemExit(main({words}))"
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "HF_TOKEN": WRITE_TOKEN}
    done = python(program, **env)
    assert done.returncode == 0, done.stderr
    files = hub.files("me/law")
    sent = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(files) == {".gitattributes", "README.md", *sent}
    loaded = python(LOAD.partition("from huggingface_hub")[0], "me/law", place.model / "model.safetensors", **env)
    assert loaded.returncode == 0, loaded.stderr
    header = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (header["base_model"], header["datasets"]) == (["owner/tiny-base"], ["owner/law-texts"])
    assert b"alice" not in b"".join(files.values())

    with (place.model / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        weights.write(b"\x55")
    again = python(program, **env)
    assert again.returncode == 2
    assert "model.safetensors changed or went missing after it was written: it is not published" in again.stderr


def test_nothing_of_this_machine_is_uploaded(run: Run, near_hub: Hub, tmp_path: Path) -> None:
    push_merged(run)
    files = near_hub.files(REPO)
    for name, data in files.items():
        for secret in (str(tmp_path), "alice", WRITE_TOKEN, READ_TOKEN):
            assert secret.encode() not in data, (secret, name)
    assert b"/home" in files["tokenizer.json"]  # a word of the vocabulary, not a path
    assert json.loads(files["config.json"])["_name_or_path"] == "tiny-base"
    recipe = parse_recipe(yaml.safe_load(files["recipe.yml"]))
    assert recipe.base_model == "tiny-base"
    assert recipe.stages[0].dataset
    assert recipe.stages[0].dataset.path == "law.jsonl"
    assert recipe.stages[2].dataset
    assert [source.path for source in recipe.stages[2].dataset.sources()] == ["owner/code-texts", "web.jsonl"]
    assert recipe.train.sft_fields == {"max_steps": 2, "deepspeed": "ds.json"}
    mergekit = yaml.safe_load(files["merge.yml"])
    assert mergekit["base_model"] == "tiny-base"
    assert [m["model"] for m in mergekit["models"]] == ["stages/01-law/experts/base/expert", "owner/tiny-chat@v2"]


def test_card_names_all_datasets_of_a_mix(run: Run) -> None:
    mix = [{"path": "/data/law.jsonl", "share": 0.8}, {"path": "owner/cases", "share": 0.2, "split": "test"}]
    law = run.stage(1).model_copy(update={"dataset": Dataset.model_validate({"mix": mix})})
    stages = (law, *run.recipe.stages[1:])
    card = model_card(Run(run.folder, run.recipe.model_copy(update={"stages": stages})), magmax(run))
    assert ModelCard(card).data.to_dict()["datasets"] == ["owner/cases"]
    assert (
        "1. **law**, trained on `law.jsonl` (split train, licence not stated) and `owner/cases` (split test, " in card
    )


NULLS = [name for name in sorted(p.stem for p in RECIPES.glob("*.yml")) if name not in ("magmax", "opcm")]


@pytest.mark.parametrize("name", NULLS)
def test_a_recipe_is_published_without_unset_fields(name: str) -> None:
    """Nulls that say something, as in TRL's fields, stay: the recipe is read back as it was."""
    recipe = load_recipe(RECIPES / f"{name}.yml", ["train.max_length=null"])
    data = yaml.safe_load(public_recipe(recipe))
    assert [path for path, value in flat_fields(data) if value is None] == ["train.max_length"]
    assert parse_recipe(data) == recipe


def test_a_dry_run_lists_what_a_push_sends(run: Run, near_hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub = near_hub
    assert main(["push", str(run.folder), "--dry-run", "--json", "--with-documents", "--base", "owner/tiny"]) == 0
    documents, model = json.loads(capsys.readouterr().out)
    assert main(["push", str(run.folder), "--dry-run"]) == 0
    assert f"{REPO}: model repository, private if it is new. Nothing was sent." in capsys.readouterr().out
    assert not hub.requests
    assert main(["push", str(run.folder), "--with-documents", "--base", "owner/tiny"]) == 0
    for listed, repo in ((model, REPO), (documents, f"datasets/{REPO}-results")):
        for revision in listed["revisions"]:
            files = hub.files(repo, revision["branch"])
            sent = {name: len(data) for name, data in files.items() if name != ".gitattributes"}
            assert sent == revision["files"], repo
    front = ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()
    assert front["base_model"] == ["owner/tiny", "owner/tiny-chat"]
    rows = parquet.read_table(io.BytesIO(hub.files(f"datasets/{REPO}-results")["data/results.parquet"])).to_pylist()
    ours = [row for row in rows if (row["stage"], row["model"], row["task"]) == (2, "merge-magmax", "arc_easy")]
    assert [row["gain"] for row in ours] == [1.0] * 4 + [0.0] * 4
    assert {row["model"] for row in rows} == {"base", "expert-base", "merge-magmax"}


def test_scores_on_datasets_of_the_hub_are_evaluation_results(run: Run) -> None:
    run.tasks.mkdir()
    task = {"task": "arc_easy", "dataset_path": "allenai/ai2_arc", "dataset_name": "ARC-Easy"}
    (run.tasks / "arc_easy.yaml").write_text(yaml.safe_dump(task))
    (entry,) = yaml.safe_load(evaluations(run, magmax(run), 2, task_data(run))[EVALUATIONS])
    assert entry["dataset"] == {"id": "allenai/ai2_arc", "task_id": "ARC-Easy"}
    assert entry["value"] == 0.5
    assert "task arc_easy, acc, 8 documents, 95 % interval about ± 0.37" in entry["notes"]


def test_the_base_has_its_name_on_the_hub() -> None:
    cached = "/home/alice/.cache/huggingface/hub/models--owner--base/snapshots/" + "0a" * 20
    assert (hub_model("quickstart:smollm2"), hub_model(cached)) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "owner/base")
    assert public_name(cached) == f"owner/base@{'0a' * 20}"


def test_the_card_names_what_was_lost(run: Run) -> None:
    card = " ".join(model_card(run, magmax(run)).split())
    assert "| law | perplexity | it was learnt | −0.25 nats |" in card
    assert "| general tasks | accuracy | the base | −12.5 points |" in card
    assert "## Known losses Lost: law (perplexity −0.25 nats)." in card


@pytest.mark.slow
def test_pushing_again_sends_only_what_changed(run: Run, hub: Hub) -> None:
    assert push(run, hub).returncode == 0
    again = push(run, hub)
    assert again.returncode == 0, again.stderr
    assert len(hub.repos[REPO].commits) == 2
    assert again.stdout.strip().endswith(hub.repos[REPO].commits[-1].oid)

    folder = run.merged(2, magmax(run)).model
    tensors = load_file(folder / "model.safetensors")
    shard = "model-00001-of-00001.safetensors"
    save_file(tensors, folder / shard, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors changed or went missing after" in refusal(run, hub)
    run.merged(2, magmax(run)).finish("merge", run.merged(2, magmax(run)).record("merge"))
    assert push(run, hub).returncode == 0
    assert len(hub.repos[REPO].commits) == 3
    assert shard in hub.files(REPO)
    assert "model.safetensors" not in hub.files(REPO)  # transformers would prefer the old weights


def test_card_tells_the_whole_lineage(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(model_card(run, magmax(run)))
    card = ModelCard.load(path)
    front = card.data.to_dict()
    assert front["base_model"] == ["tiny-base", "owner/tiny-chat"]
    assert front["base_model_relation"] == "merge"
    assert front["tags"] == ["merge", "mergekit", "contmerge", "magmax"]
    assert (front["library_name"], front["license"]) == ("transformers", "apache-2.0")
    assert "datasets" not in front  # a local file, and a stage that is still to come
    results = {r.dataset_name: (r.metric_type, r.metric_value) for r in card.data.eval_results or []}
    assert results["arc_easy"] == ("accuracy", 0.5)
    assert results["law_heldout"] == ("perplexity", pytest.approx(12.1825, abs=1e-4))

    text = " ".join(card.text.split())
    for told in (
        "after stage 2 of 3",
        "0. Base model: `tiny-base`.",
        "1. **law**, trained on `law.jsonl` (split train, licence not stated), starting from the base model.",
        f"SHA-256 of the expert's weights: `{'1e' * 32}`; of the merged model's: `{'1f' * 32}`.",
        "2. **chat**, given: `owner/tiny-chat@v2`.",
        f"`{'2e' * 32}`",
        "https://arxiv.org/abs/2407.06322), parameters: lambda = 0.5",
        "merged = base + 0.5 × S, and |S| = 2.75",
        "| law | 1.5 | | chat | 2.5 |",
        "merge_method: magmax",
        f"torch {version('torch')}",
        f'AutoModelForCausalLM.from_pretrained("{REPO}", dtype="auto")',
    ):
        assert told in text


def test_card_of_a_difference_between_two_models(run: Run) -> None:
    chat = run.stage(2).model_copy(update={"minus": "owner/tiny"})
    run = Run(run.folder, run.recipe.model_copy(update={"stages": (run.stage(1), chat, run.stage(3))}))
    run.expert(2, "previous").finish("train", {"expert": "owner/tiny-chat@v2", "minus": "owner/tiny"})
    merge(run, 2, [run.expert(1, "base").model, run.expert(2, "previous").model])
    card = model_card(run, magmax(run))
    assert "2. **chat**, given: `owner/tiny-chat@v2` minus `owner/tiny`." in card
    assert "- model: stages/02-chat/experts/previous/expert" in card
    assert "- owner/tiny\n" in card


def test_card_of_nasty_names(run: Run) -> None:
    """A recipe's strings are anybody's, and the card is shown on the Hub."""
    dataset = run.stage(1).dataset
    assert dataset
    law = run.stage(1).model_copy(update={"dataset": dataset.model_copy(update={"split": NASTY, "path": "a`b`.txt"})})
    run = Run(run.folder, run.recipe.model_copy(update={"stages": (law, *run.recipe.stages[1:])}))
    told = model_card(run, magmax(run)).partition("## Recipe")[0]
    assert "trained on `` a`b`.txt `` (split \\<script\\>alert" in told
    assert not re.search(r"(?<!\\)(<script|\*bold)", told)


def test_card_shows_natural_metrics_and_forgetting(run: Run) -> None:
    card = model_card(run, magmax(run))
    rows = {cells[0]: cells[1:] for line in card.splitlines() if line.startswith("|") and (cells := _cells(line))}
    assert r"law\_heldout (word perplexity, lower is better)" in card
    alone, merged = "fine-tuning alone, in sequence", "this merge (magmax)"
    assert rows["base model"] == ["20.09 ± 0.00", "0.250 ± 0.164", "0.500 ± 0.189"]
    assert rows[f"{merged}, after law"][0] == "9.49 ± 0.00"
    assert rows[f"{merged}, after chat"] == ["12.18 ± 0.00", "0.500 ± 0.189", "0.375 ± 0.183"]
    assert rows[f"{alone}, after law"][0] == "7.39 ± 0.00"
    assert rows[f"{alone}, after chat"] == ["not measured"] * 3
    # ACC = R[2][1], LA = R[1][1] and BWT = R[2][1] - R[1][1] of the perplexity, R = -ln
    _, texts, answers = (part.partition("\n\n## ")[0] for part in card.split("### Metrics, "))
    assert "| line | ACC | LA | BWT | of expert |" in texts
    assert f"| {merged} | −2.500 | −2.250 | −0.250 | 0.500 |" in texts
    assert "| line | ACC | LA | BWT | general Δ | FUAR |" in answers
    assert f"| {merged} | 0.500 | 0.500 | – | −0.125 | 0.500 |" in answers
    assert f"| {alone} | – | – | – | – | – |" in answers


def test_card_counts_documents_that_changed_sides(run: Run) -> None:
    known = {"chance": 0.0, "chance_variance": 0.0}
    for place, right in ((run.base, 0.5), (run.merged(1, magmax(run)), 0.5), (run.merged(2, magmax(run)), 0.375)):
        values = scores(law=-2.0, arc=0.25, piqa=right)
        put(place, {name: {**value, "details": known} for name, value in values.items()})
    answers = model_card(run, magmax(run)).partition("### Metrics, accuracy")[2]
    assert "| general Δ | general right → wrong | general wrong → right |" in answers
    assert "| −0.125 | −0.125 | +0.000 |" in answers


def test_card_has_the_words_of_the_report_for_metrics(run: Run) -> None:
    card = model_card(run, magmax(run))
    names = ("acc", "la", "bwt", "normalised", "general_delta", "fuar")
    assert "\n".join(f"- {METRICS[name].short}: {METRICS[name].meaning}." for name in names) in card


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_card_says_what_was_not_measured(run: Run) -> None:
    for place in (run.base, run.expert(1, "base"), run.merged(1, magmax(run)), run.merged(2, magmax(run))):
        place.undo("score")
    card = model_card(run, magmax(run))
    assert "Metrics: not measured." in card
    assert "model-index" not in card
    rows = [_cells(line) for line in card.splitlines() if line.startswith("| this merge")]
    assert [r[1:] for r in rows] == [["not measured"] * 3] * 2


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "optimizer.pkl", "deep/modeling_x.py", "trainer_state.json", "notes.txt", ".env", "train.py"],
)
def test_other_files_are_refused_by_name(run: Run, name: str) -> None:
    path = run.merged(2, magmax(run)).model / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=rf"merged holds {re.escape(name)}\. Only weights, .* ever uploaded"):
        push_merged(run)


def test_what_to_push_must_be_said(run: Run) -> None:
    silent = Run(run.folder, run.recipe.model_copy(update={"publish": None}))
    with pytest.raises(RecipeError, match=r"2 merges \(magmax, opcm\), and none is chosen"):
        push_merged(silent, repo_id=REPO)
    with pytest.raises(RecipeError, match=r"Unknown merge entry 'magmx'.* Did you mean 'magmax'"):
        push_merged(run, entry="magmx")
    with pytest.raises(RecipeError, match=r"No repository is named\. Give `--repo-id"):
        push_merged(silent, entry="magmax")
    with pytest.raises(RecipeError, match=r"must be named owner/name.* got 'law'"):
        push_merged(run, repo_id="law")


def test_an_unfinished_run_names_the_missing_phase(run: Run) -> None:
    with pytest.raises(RunError, match="no merged model of opcm yet: the phase merge of stage law is not done"):
        push_merged(run, entry="opcm")
    run.expert(1, "base").undo("train")
    with pytest.raises(RunError, match="the phase train of stage law is not done"):
        push_merged(run, entry="opcm")
    run.merged(2, magmax(run)).undo("merge")
    assert "after stage 1 of 3" in model_card(run, magmax(run))


@pytest.mark.slow
def test_tokens_that_do_not_suffice(run: Run, hub: Hub) -> None:
    for token in ("", "hf_" + "expired123" * 4):
        assert refusal(run, hub, HF_TOKEN=token) == (
            "ResourceError: HUB requires a login (401): the token is missing or no longer valid. "
            f"Log in with `hf auth login`, or set HF_TOKEN, then push {REPO} again."
        )
    assert refusal(run, hub, HF_TOKEN=READ_TOKEN) == (
        f"ResourceError: HUB denies this token write access to {REPO} (403). Create one with write permission for me "
        "at HUB/settings/tokens, pass it to `hf auth login`, and push again."
    )
    assert not hub.repos


def test_a_connection_that_breaks_before_the_commit_leaves_nothing_half_pushed(run: Run, near_hub: Hub) -> None:
    hub = near_hub
    hub.fail["/commit/main"] = "drop"
    with pytest.raises(ResourceError) as error:
        push_merged(run)
    assert str(error.value) == (
        f"Cannot reach {hub.url} to push {REPO} (RemoteProtocolError). Check the network, the proxy and "
        "HF_ENDPOINT, then push again; uploaded files are not sent twice."
    )
    assert [c.message for c in hub.repos[REPO].commits] == ["initial commit"]
    hub.fail.clear()
    hub.requests.clear()
    push_merged(run)
    assert not [r for r in hub.requests if r.startswith("PUT")]


@pytest.mark.slow
def test_a_refused_upload_and_a_hub_that_is_not_there(run: Run, hub: Hub) -> None:
    hub.fail["/lfs/"] = 403
    assert "denies this token write access" in refusal(run, hub)
    assert "Cannot reach http://127.0.0.1:9 to push me/law-chat (ConnectError)" in refusal(
        run, hub, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert "HF_HUB_OFFLINE is set" in refusal(run, hub, HF_HUB_OFFLINE="1")


def test_a_private_push_does_not_go_to_a_public_repository(run: Run, near_hub: Hub) -> None:
    push_merged(run)
    near_hub.repos[REPO].private = False
    with pytest.raises(RecipeError, match=f"{REPO} at {near_hub.url} is public, but this push is private"):
        push_merged(run)
    assert len(near_hub.repos[REPO].commits) == 2
