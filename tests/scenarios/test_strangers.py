"""Hostile files end with exit code 2 and one sentence: nothing runs, nothing hangs, nothing is written elsewhere."""

import json
import os
import pickle
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (its log handler writes to the stderr of the moment it is imported)
import pytest
import torch
import yaml
from safetensors.torch import save_file
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError
from hf_contmerge.models.headers import _weight_files
from hf_contmerge.models.loading import load_model
from hf_contmerge.runtime.foreign import parse_json
from hf_contmerge.runtime.patterns import require_quick
from hf_contmerge.scoring._formats import list_tasks
from hf_contmerge.scoring._strangers import _sandbox, foreign_tasks
from hf_contmerge.scoring.tasks import task_manager

TOKEN = "hf_" + "strangersTOKEN" * 3
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
SLOW = "(a+)+$"
SECONDS = 60


class Place:
    """A toy home to spoil: a base, an expert, an adapter, texts and a recipe over them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "EXECUTED"
        self.base, self.adapter, self.state, self.run = (folder / n for n in ("base", "adapter", "state", "run"))
        self.secret = folder.parent / f"secret-of-{folder.name}"
        self.secret.write_text("aws_secret_access_key = EXAMPLEKEY")

    def recipe(self, **fields: Any) -> list[str]:
        values = {
            "name": "strange", "base_model": str(self.base), "merge": ["average"],
            "stages": [{"name": "a", "dataset": {"path": str(self.folder / "strange.jsonl"), "heldout": 2}}],
            "train": {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 32, "save_strategy": "no"},
        }  # fmt: skip
        return self.text(yaml.safe_dump(values | fields))

    def text(self, text: str) -> list[str]:
        (self.folder / "r.yml").write_text(text)
        return ["run", str(self.folder / "r.yml"), "--run", str(self.folder / "run-of-it")]

    def train(self, **fields: Any) -> list[str]:
        return self.recipe(train={"max_steps": 1, "max_length": 32, **fields})

    def task(self, text: str, **files: str) -> list[str]:
        """A recipe with a task file of this text, over the texts."""
        folder = self.folder / "tasks"
        folder.mkdir()
        data = f"{{data_files: {{test: {self.folder / 'strange.jsonl'}}}}}"
        start = f"task: t\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
        kind = "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        (folder / "t.yaml").write_text(start + kind + text)
        (folder / "evil.py").write_text(f"open({str(self.canary)!r}, 'w').write('x')\ndef f(doc): return doc['text']\n")
        for name, content in files.items():
            (folder / f"{name}.yaml").write_text(content)
        return self.recipe(evaluate={"include_path": str(folder), "general_tasks": ["t"], "cache": False})

    def init(self) -> list[str]:
        return ["merge", "init", str(self.folder / "new"), "--base", str(self.base), "--rule", "average"]

    def add(self) -> list[str]:
        return ["merge", "add", str(self.state), str(self.adapter)]

    def edit(self, file: Path, **values: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def config(self, **values: Any) -> list[str]:
        self.edit(self.base / "config.json", **values)
        return self.init()

    def settings(self, **values: Any) -> list[str]:
        self.edit(self.adapter / "adapter_config.json", **values)
        return self.add()

    def tensors(self, tensors: dict[str, torch.Tensor]) -> list[str]:
        save_file(tensors, self.base / "model.safetensors")
        return self.init()

    def index(self, file: str) -> list[str]:
        (self.base / "model.safetensors").unlink()
        (self.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
        return self.init()

    def header(self, data: bytes) -> list[str]:
        (self.base / "model.safetensors").write_bytes(data)
        return self.init()

    def link(self, name: str) -> list[str]:
        (self.base / name).unlink(missing_ok=True)
        (self.base / name).symlink_to(self.secret)
        return self.init()

    def pipe(self, name: str) -> list[str]:
        (self.base / name).unlink()
        os.mkfifo(self.base / name)
        return self.init()

    def log(self, **values: Any) -> list[str]:
        self.edit(self.state / "state.json", **values)
        return self.add()

    def stage(self, name: str) -> list[str]:
        entry = {"stage": name, "model": "m", "folder": "f", "sha256": "0", "norm": 1.0, "kind": "full"}
        return self.log(experts=[entry])

    def escaping(self) -> list[str]:
        """An adapter whose weight is named out of the state."""
        name = "../../../../OUTSIDE"
        save_file({"model.embed_tokens.weight": torch.zeros(16, 8), f"{name}.weight": torch.zeros(8, 8)},
                  self.base / "model.safetensors")  # fmt: skip
        (self.base / "config.json").write_text(json.dumps({"model_type": "strange", "vocab_size": 16}))
        parts = {f"base_model.model.{name}.lora_{p}.weight": torch.randn(s) for p, s in (("A", (1, 8)), ("B", (8, 1)))}
        save_file(parts, self.adapter / "adapter_model.safetensors")
        shutil.rmtree(self.state)
        assert main(["merge", "init", str(self.state), "--base", str(self.base), "--rule", "average"]) == 0
        return self.add()

    def pickled(self, folder: Path, weights: str, name: str, words: Callable[[], list[str]]) -> list[str]:
        (folder / weights).unlink()
        (folder / name).write_bytes(pickle.dumps(_Touch(self.canary)))
        return words()

    def spoilt_run(self, spoil: Callable[[Path], None], command: str) -> list[str]:
        """A run of somebody else's."""
        self.recipe(stages=[{"name": "a", "expert": str(self.base)}])
        self.run.mkdir()
        shutil.copyfile(self.folder / "r.yml", self.run / "recipe.yml")
        spoil(self.run)
        return [command, str(self.run)]


class _Touch:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


DEEP = "[" * 100_000
URL = f"https://user:{TOKEN}@127.0.0.1:9/x"
RANK = {"r": 1, "lora_alpha": 1}
HUGE = struct.pack("<Q", 2**40) + b"{}"
NESTED = b'{"__metadata__": ' + b'{"a":' * 5000
METRIC = "doc_to_target: text\nmetric_list: [{{metric: {}}}]\n"
FILTER = "doc_to_target: text\nmetric_list: [{metric: word_perplexity}]\nfilter_list: [{name: x, filter: [%s]}]\n"
FUNCTION = "doc_to_target: !function evil.f\nmetric_list: [{metric: word_perplexity}]\n"

HOSTILE: dict[str, Callable[[Place], list[str]]] = {
    # Recipes
    "aliases that multiply": lambda p: p.text(ALIASES + "name: *k\nbase_model: x\nstages: []\nmerge: [average]\n"),
    "aliases in a list": lambda p: p.text("".join(f"- {x.partition(': ')[2]}\n" for x in ALIASES.splitlines())),
    "an alias in itself": lambda p: p.text("name: &a [*a]\n"),
    "a long text by alias": lambda p: p.text(f"a: &x {'y' * 100_000}\nb: [{'*x,' * 1000}]\n"),
    "100,000 brackets": lambda p: p.text(f"a: {DEEP}"),
    "100,000 braces": lambda p: p.text("{a: " * 100_000),
    "100,000 dashes": lambda p: p.text("- " * 100_000),
    "a number of 5,000 digits": lambda p: p.text(f"name: {'9' * 5000}"),
    "a number in base 60": lambda p: p.text(f"name: {'1:' * 100_000}1"),
    "no date": lambda p: p.text("name: 2001-99-99"),
    "an empty integer": lambda p: p.text("name: !!int ''"),
    "a Python object": lambda p: p.text("name: !!python/object/apply:os.system ['touch EXECUTED']"),
    "5 MB": lambda p: p.text("# " + "x" * 5_000_000),
    "a device": lambda p: ["run", "/dev/zero", "--run", str(p.run)],
    "an escape in a path": lambda p: p.recipe(base_model="base\x1b[2J"),
    "turned text in a path": lambda p: p.recipe(base_model="base\u202etxt"),
    "a path of 5,000 characters": lambda p: p.recipe(base_model="m" * 5000),
    "a dataset of 5,000 characters": lambda p: p.recipe(stages=[{"name": "a", "dataset": f"{'d' * 5000}.jsonl"}]),
    "a stage that leaves": lambda p: p.recipe(stages=[{"name": "../a", "dataset": "a.jsonl"}]),
    "a merge that leaves": lambda p: p.recipe(merge=[{"name": "../../a", "rule": "average"}]),
    "a task that leaves": lambda p: p.recipe(evaluate={"general_tasks": ["../../a"]}),
    "a revision that leaves": lambda p: p.recipe(base_model="owner/model@../../../x"),
    "push_to_hub": lambda p: p.train(push_to_hub=True),
    "hub_model_id": lambda p: p.train(hub_model_id="me/x"),
    "hub_token": lambda p: p.train(hub_token=TOKEN),
    "a token as a word": lambda p: p.train(optim_args=f"key={TOKEN}"),
    "a token as a wrong value": lambda p: p.train(max_steps=TOKEN),
    "a password as parameter": lambda p: p.train(parameters={"password": "secret"}),
    "an address with a password": lambda p: p.recipe(base_model=URL),
    "a dataset with a password": lambda p: p.recipe(stages=[{"name": "a", "dataset": URL}]),
    "a signed address": lambda p: p.recipe(base_model="https://h/x?X-Amz-Signature=0123456789"),
    "weights_only off": lambda p: p.train(model_init_kwargs={"weights_only": False}),
    "use_safetensors off": lambda p: p.train(model_init_kwargs={"use_safetensors": False}),
    "code by the recipe alone": lambda p: p.recipe(trust_remote_code=True),
    "a plugin by the recipe alone": lambda p: p.recipe(plugins=["evil.py"]),
    "a slow pattern of anchor": lambda p: p.train(
        strategy=["full", "anchor"], parameters={"anchor": {"modules": SLOW}}
    ),
    "a slow pattern of LoRA": lambda p: p.train(strategy="lora", parameters={"target_modules": SLOW}),
    "a slow pattern of optim": lambda p: p.train(optim_target_modules=SLOW),
    "a format of a gigabyte": lambda p: p.recipe(
        stages=[{"name": "a", "dataset": {"path": str(p.folder / "strange.jsonl"), "text": "{text:9999999999}"}}]
    ),
    # Task files
    "a function": lambda p: p.task(FUNCTION),
    "a function by include": lambda p: p.task("include: o.yaml\n" + METRIC.format("word_perplexity"), o=FUNCTION),
    "a metric from a file": lambda p: p.task(METRIC.format("./evil.py")),
    "a metric from the Hub": lambda p: p.task(METRIC.format("owner/metric")),
    "a registered metric as a script": lambda p: p.task(METRIC.format("acc, hf_evaluate: true")),
    "a prompt of others": lambda p: p.task(METRIC.format("word_perplexity") + "use_prompt: promptsource:x\n"),
    "a slow filter": lambda p: p.task(FILTER % f"{{function: regex, regex_pattern: '{SLOW}'}}"),
    "a template with Python": lambda p: p.task(
        "doc_to_target: \"{{ cycler.__init__.__globals__.os.system('touch EXECUTED') }}\"\n"
        "metric_list: [{metric: word_perplexity}]\n"
    ),
    # Models
    "a tensor that leaves": Place.escaping,
    "an escape in a tensor's name": lambda p: p.tensors({"a\x1b[2J.weight": torch.zeros(2)}),
    "a tensor's name of 9,000 characters": lambda p: p.tensors({"a" * 9000: torch.zeros(2)}),
    "an index that leaves": lambda p: p.index("../../model.safetensors"),
    "an absolute index": lambda p: p.index("/etc/model.safetensors"),
    "an index to a pipe": lambda p: (os.mkfifo(p.base / "x.safetensors"), p.index("x.safetensors"))[1],
    "brackets in an index": lambda p: (
        (p.base / "model.safetensors").rename(p.base / "other"),
        (p.base / "model.safetensors.index.json").write_text(DEEP),
        p.init(),
    )[2],
    "weights_name that leaves": lambda p: p.config(transformers_weights="../x.safetensors"),
    "brackets in a config": lambda p: ((p.base / "config.json").write_text(DEEP), p.init())[1],
    "digits in a config": lambda p: ((p.base / "config.json").write_text(f'{{"a": {"9" * 5000}}}'), p.init())[1],
    "a list as a config": lambda p: ((p.base / "config.json").write_text("[]"), p.init())[1],
    "a config that is a pipe": lambda p: p.pipe("config.json"),
    "weights that are a pipe": lambda p: p.pipe("model.safetensors"),
    "weights that are a folder": lambda p: (
        (p.base / "model.safetensors").unlink(), (p.base / "model.safetensors").mkdir(), p.init()
    )[2],
    "weights that are a device": lambda p: (
        (p.base / "model.safetensors").unlink(), (p.base / "model.safetensors").symlink_to("/dev/zero"), p.init()
    )[2],
    "a header of a terabyte": lambda p: p.header(HUGE),
    "a header of 7 bytes": lambda p: p.header(b"1234567"),
    "a nested header": lambda p: p.header(struct.pack("<Q", len(NESTED)) + NESTED),
    "an empty tensor of any size": lambda p: p.tensors({"w": torch.zeros(0, 2**50)}),
    "a vocabulary that is a link": lambda p: p.link("vocab.txt"),
    "a template that is a link": lambda p: p.link("chat_template.jinja"),
    "a licence that is a link": lambda p: p.link("LICENSE"),
    "a config that is a link": lambda p: p.link("config.json"),
    "code that is a link": lambda p: (p.link("own.py"), p.config(auto_map={"AutoModel": "own.Own"}))[1],
    "a pickle": lambda p: p.pickled(p.base, "model.safetensors", "pytorch_model.bin", p.init),
    # Adapters
    "an adapter's pickle": lambda p: p.pickled(p.adapter, "adapter_model.safetensors", "adapter_model.bin", p.add),
    "a slow rank_pattern": lambda p: p.settings(rank_pattern={SLOW: 4}),
    "a slow alpha_pattern": lambda p: p.settings(alpha_pattern={"(x|x)*y": 4}),
    "slow target_modules": lambda p: p.settings(target_modules=SLOW),
    "a slow layers_pattern": lambda p: p.settings(layers_pattern=[SLOW]),
    "a broken rank_pattern": lambda p: p.settings(rank_pattern={"(": 4}),
    "megatron_core": lambda p: p.settings(megatron_config={"x": 1}, megatron_core="evil"),
    "brackets in an adapter": lambda p: ((p.adapter / "adapter_config.json").write_text(DEEP), p.add())[1],
    "lora_alpha of 300 digits": lambda p: p.settings(lora_alpha=10**300),
    # States
    "a running state that leaves": lambda p: p.log(running="../base"),
    "a stage of a state that leaves": lambda p: p.stage("../../base"),
    "an escape in a state": lambda p: p.stage("a\x1b[2J"),
    "brackets in a state": lambda p: ((p.state / "state.json").write_text(DEEP), p.add())[1],
    "a link out of a state": lambda p: ((p.state / "exports.jsonl").symlink_to(p.secret), p.add())[1],
    "a state with a pipe": lambda p: (os.mkfifo(p.state / "owners.json"), p.add())[1],
    "an expert named out of the state": lambda p: [*p.add(), "--as", "../x"],
    # Runs
    "a run's scratch file as a link": lambda p: p.spoilt_run(
        lambda run: (run / ".recipe.yml.new").symlink_to(p.secret), "status"
    ),
    "a report that is a link": lambda p: p.spoilt_run(lambda run: (run / "report").symlink_to(p.folder), "report"),
    "a run with a pipe": lambda p: p.spoilt_run(lambda run: os.mkfifo(run / "report.json"), "status"),
    "an escape in a run": lambda p: p.spoilt_run(lambda run: (run / "a\x1b[2J").touch(), "status"),
    "a token in a run's recipe": lambda p: p.spoilt_run(
        lambda run: (run / "recipe.yml").write_text((run / "recipe.yml").read_text() + f"output: {TOKEN}\n"), "push"
    ),
    # Data
    "brackets in data": lambda p: ((p.folder / "strange.jsonl").write_text(DEEP), p.recipe())[1],
    "a line of 17 MB": lambda p: (
        (p.folder / "strange.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "{"x" * 17_000_000}"}}\n'), p.recipe()
    )[1],
    "data that are a pipe": lambda p: (
        (p.folder / "strange.jsonl").unlink(), os.mkfifo(p.folder / "strange.jsonl"), p.recipe()
    )[2],
}  # fmt: skip


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unspoilt home."""
    home = tmp_path_factory.mktemp("strangers")
    base = toy_llama(home / "base", seed=0)
    perturbed(base, home / "expert", seed=1, size=0.01)
    adapter = home / "adapter"
    adapter.mkdir()
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    parts = {"A": torch.zeros(1, hidden), "B": torch.zeros(hidden, 1)}
    save_file(
        {f"{module}.lora_{p}.weight": t for p, t in parts.items()},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "target_modules": ["q_proj"], **RANK}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    write_jsonl(home / "strange.jsonl", [{"text": f"the quick brown fox {i}"} for i in range(12)])
    assert main(["merge", "init", str(home / "state"), "--base", str(base), "--rule", "average"]) == 0
    return home


@pytest.fixture
def place(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / f"home-{tmp_path.name}"
    shutil.copytree(clean, folder)
    monkeypatch.chdir(folder)
    (folder / "evil.py").write_text("open('EXECUTED', 'w')\n")
    before = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    yield Place(folder)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _too_long(*_: Any) -> None:
    raise AssertionError(f"more than {SECONDS} s")


def _files_around(place: Place) -> set[Path]:
    return {p for p in place.folder.parent.rglob("*") if not p.is_relative_to(place.folder)}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_refused(what: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    words = HOSTILE[what](place)
    secret, around = place.secret.read_text(), _files_around(place)
    capfd.readouterr()
    assert main(words) == 2
    printed = capfd.readouterr()
    assert printed.err.count("Error: ") == 1, printed.err
    assert "Traceback" not in printed.err
    assert TOKEN not in printed.err + printed.out
    assert "\x1b" not in printed.err + printed.out
    assert not place.canary.exists()
    assert place.secret.read_text() == secret
    assert _files_around(place) == around
    assert place.base.exists()
    kept = [p for p in place.folder.rglob("*") if p.is_file() and p != place.folder / "r.yml" and p.parent != place.run]
    assert not [p for p in kept if TOKEN.encode() in p.read_bytes()]


def test_plan_runs_nobodys_code(place: Place) -> None:
    words = place.task(FUNCTION)
    assert main(["plan", words[1]]) == 2
    assert not place.canary.exists()


def test_code_of_a_task_runs_if_recipe_and_command_say_so(place: Place) -> None:
    words = place.task(FUNCTION)
    recipe = yaml.safe_load((place.folder / "r.yml").read_text())
    assert main([*words, "--trust-remote-code", "--until", "train"]) == 2  # the recipe does not say so
    assert not place.canary.exists()
    (place.folder / "r.yml").write_text(yaml.safe_dump({**recipe, "trust_remote_code": True}))
    assert main([*words, "--until", "train"]) == 2
    assert not place.canary.exists()
    assert main([*words, "--trust-remote-code", "--until", "train"]) == 0
    assert place.canary.exists()


@pytest.mark.parametrize("data", ["json\n", "text\ndataset_kwargs: {data_files: null}\n", "pandas\ndataset_kwargs: "
                                  "{data_files: {test: here.pkl}}\n", "iceberg\ndataset_name: x\n"])  # fmt: skip
def test_a_task_without_files_does_not_read_the_current_folder(
    data: str, place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = place.folder / "here"
    here.mkdir()
    for name in ("here.jsonl", "here.json", "here.txt", "test.pkl"):
        (here / name).write_text('{"text": "found by chance"}\n' * 4)
    monkeypatch.chdir(here)
    words = place.task("doc_to_target: text\nmetric_list: [{metric: word_perplexity}]\n")
    file = place.folder / "tasks" / "t.yaml"
    first, rest = file.read_text().split("dataset_path: json\n")
    file.write_text(f"{first}dataset_path: {data}{rest.partition(chr(10))[2]}")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "The task t read" in error, error
    assert "names no files" in error or "Supported here are" in error


def test_peft_unpickles_nothing(place: Place) -> None:
    place.pickled(place.adapter, "adapter_model.safetensors", "adapter_model.bin", list)
    with pytest.raises(ModelError, match="a pickle"):
        load_model(place.adapter, place.base)
    assert not place.canary.exists()


def test_an_index_of_the_hub_names_files_only(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../../x.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        _weight_files(tmp_path, [])


@pytest.mark.parametrize("text", [f"x: {DEEP}\n", ALIASES, "- " * 100_000, "a: 1"], ids=range(4))
def test_task_files_have_bounds(text: str, tmp_path: Path) -> None:
    """One beyond them is skipped, as lm-eval skips a damaged file; its own reader would end the process."""
    (tmp_path / "t.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text("task: good\n")
    with foreign_tasks(trust_remote_code=False):
        assert task_manager(["good"], [tmp_path]).all_tasks == ["good"]
    assert set(list_tasks(tmp_path).files) == {"good"}


HARMLESS = [
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up_proj))",
    r"(-?[$0-9.,]{2,})|(-?[0-9]+)", r"#### (\-?[0-9\.\,]+)", r"attn\.|attention\.", r".*\.(q|k|v)_proj$", "all-linear",
    r"model\.layers\.(0|1|2|3)\.self_attn\.(q|v)_proj", r"(?s).*answer is:? *([A-D])",
]  # fmt: skip
"""Patterns in use: of unsloth, lm-eval and peft."""


@pytest.mark.parametrize("pattern", HARMLESS)
def test_ordinary_patterns_are_read(pattern: str) -> None:
    require_quick(pattern)


SLOW_ONES = [SLOW, "(a|a)*b", "a?" * 60 + "a" * 60, "(.*)*", "(x*){1,50}", ".*" * 8, "(?:a{0,9}){0,9}", "(?=(a+)+)b",
             "((ab)*c?)*", "(" * 5000, "a{99999999999}", "x" * 20_000, "(a|b|ab)*c", r"(\w+\s?)+:"]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW_ONES, ids=lambda p: p[:20])
def test_exponential_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|time"):
        require_quick(pattern)


TEMPLATES = [
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os }}", "{{ 'x' * 10**9 }}", "{{ [0] * 10**9 }}",
    "{{ 10 ** (10**8) }}", "{{ '%1000000000d' % 1 }}", "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' | regex_replace('(a+)+$', '') }}", "{{ '{0.__class__}'.format(1) }}", "{{ 'a'.ljust(10**10) }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_reach_no_python(template: str) -> None:
    from lm_eval.utils import env

    with pytest.raises(Exception, match=r"(?i)unsafe|large|range|exponential"):
        _sandbox(env.filters).from_string(template).render()


def test_templates_of_tasks_still_work() -> None:
    from lm_eval.utils import env

    text = (
        "{{ question.strip() | upper }}{{ 3 * 'ab' }}{{ choices | join(', ') }}{{ 'a1' | regex_replace('[0-9]', '') }}"
    )
    assert _sandbox(env.filters).from_string(text).render(question=" q ", choices=["x", "y"]) == "Qabababx, ya"


@pytest.mark.parametrize("text", [DEEP, "[" * 200 + "]" * 200, "9" * 5000, '{"a": ' * 2000], ids=range(4))
def test_json_has_bounds(text: str) -> None:
    with pytest.raises(ValueError, match=r"deep|digits"):
        parse_json(text)


def test_a_vocabulary_may_hold_digits() -> None:
    assert parse_json(json.dumps({"9" * 200: 1})) == {"9" * 200: 1}
