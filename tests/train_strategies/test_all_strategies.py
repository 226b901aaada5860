"""One suite for all training strategies, alone and in every pair: it finds a new file in train_strategies/ by itself.

The checks are those of hf_contmerge.testing.check_strategy, which is for strategies in packages of others. Here they
are joined by what needs several processes: two ranks, and weights that FSDP2 shares out. What only one strategy does is
in its own tests.
"""

import functools
import gc
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import pytest
import torch
import torch.distributed as dist
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_contmerge.errors import ContmergeError, RecipeError
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.testing import check_strategy
from hf_contmerge.testing.course import Course, texts_of, write_texts
from hf_contmerge.testing.strategies import CHECKS, Check
from hf_contmerge.testing.toys import toy_llama
from hf_contmerge.train_strategies import Combined, TrainStrategy, combine, strategy_class, strategy_names
from hf_contmerge.training.settings import training_checks

Row = dict[str, Any]

PARAMETERS: dict[str, Row] = {
    "low_perplexity": {"threshold": 0.001},  # to a random model, no token is likely
    "rates": {"factors": {"layers": 0.5}},
}
"""Of strategies whose defaults cannot train a toy, by name."""


def parameters_of(case: str) -> dict[str, Row]:
    return {name: PARAMETERS[name] for name in case.split() if name in PARAMETERS}


@functools.cache
def refused_here(case: str) -> str | None:
    """Return what strategies say of a machine that they cannot work on, or of each other."""
    try:
        combine(case.split(), parameters_of(case))
    except (ContmergeError, ValueError) as error:
        return str(error)
    return None


NAMES = strategy_names()
EVERY_PAIR = [" ".join(pair) for pair in itertools.combinations(NAMES, 2)]
PAIRS = [pair for pair in EVERY_PAIR if "full" not in pair.split() and not refused_here(pair)]
"""All that are allowed. A strategy that carries nothing is with `full` anyway."""
CASES = (*NAMES, *PAIRS, "anchor migu distill")
MANY = [pytest.param(case, marks=[pytest.mark.slow] if " " in case else []) for case in CASES]


def course_of(case: str, home: Path) -> Course:
    """Return two stages of some strategies, in a folder with a base."""
    return Course(home, {name: strategy_class(name) for name in case.split()}, parameters_of(case))


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Course]]:
    """Return a function that gives the course of some strategies, whose trainings the tests share."""
    base = toy_llama(tmp_path_factory.mktemp("base") / "base", seed=0)

    @functools.cache
    def course(case: str) -> Course:
        home = tmp_path_factory.mktemp(case.replace(" ", "-"))
        (home / "base").symlink_to(base)
        return course_of(case, home)

    gc.collect()
    gc.freeze()  # what the libraries have made need not be gone through again after each training
    yield course
    gc.unfreeze()


def works_here(case: str) -> str:
    why = refused_here(case)
    if why:
        pytest.skip(why)
    return case


def contract() -> Iterator[Any]:
    """Yield each case with each check; pairs are slow."""
    for case, check in itertools.product(CASES, CHECKS):
        yield pytest.param(
            case, check, marks=[pytest.mark.slow] if case in PAIRS else [], id=f"{case}-{check.__name__}"
        )


@pytest.mark.parametrize(("case", "check"), list(contract()))
def test_contract(case: str, check: Check, course: Callable[[str], Course]) -> None:
    check(course(works_here(case)))


# Two ranks

TRAINED = ("test_two_ranks_with_half_the_batch_are_one", "test_two_ranks_remember_what_one_does")
"""The tests that need more than a step."""
RANKS = """
import gc, json, sys
from pathlib import Path
from accelerate import PartialState
import peft, trl.trainer.sft_trainer
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from hf_contmerge.testing.course import texts_of
from test_all_strategies import course_of, sharded_step

gc.collect()
gc.freeze()
for case, home in json.loads(Path(sys.argv[2]).read_text()).items():
    course = course_of(case, Path(home))
    with PartialState(cpu=True).main_process_first():
        data = texts_of(course.home / "shared.jsonl")
    if sys.argv[3] == "train":
        course.train(2, "shared", data, per_device_train_batch_size=2)
    (course.home / "sharded").write_text(str(sharded_step(case, course.home)))
"""


def moved(case: str, home: Path) -> tuple[Combined, Any]:
    """Return strategies and what they train, some way into the second stage: the same on each rank."""
    strategies, memory = combine(case.split(), parameters_of(case)), home / "first-memory"
    strategies.begin(2, home / "base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(home / "first").train()
    opened = strategies.open(model, memory if memory.exists() else None)
    for weight in opened.parameters():
        if weight.requires_grad:
            weight.data += 0.01 * torch.randn(weight.shape)
    return strategies, opened


def sharded_step(case: str, home: Path) -> float | None:
    """Return by how much a step on shared-out weights (FSDP2) differs from one on whole weights; None: not for it."""
    if combine(case.split(), parameters_of(case)).not_sharded():
        return None
    ids = torch.randint(5, 384, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    found = []
    for shard in (True, False):
        strategies, model = moved(case, home)
        if shard:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in [m for m in model.modules() if isinstance(m, LlamaDecoderLayer)]:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        weights = {n: w for n, w in model.named_parameters() if w.requires_grad}
        model(input_ids=ids, labels=ids).loss.backward()
        if not shard:
            for weight in weights.values():
                assert weight.grad is not None
                dist.all_reduce(weight.grad.div_(dist.get_world_size()))
        with torch.no_grad():
            strategies.adjust_gradients(model)
            torch.optim.SGD(weights.values(), lr=0.1).step()
            strategies.adjust_weights(model)
        found.append([w.full_tensor() if isinstance(w, DTensor) else w for w in weights.values()])
    return max(float((one - other).abs().max()) for one, other in zip(*found, strict=True))


def on_two_ranks(cases: Iterable[str], course: Callable[[str], Course], folder: Path, *, train: bool) -> None:
    """Take a step of the second stage on two ranks; `train`: and train it with half the batch, as `shared`."""
    homes = {}
    for case in cases:
        assert course(case).second
        homes[case] = str(course(case).home)
        write_texts(course(case).home / "shared.jsonl", 2)
        (course(case).home / "shared").mkdir()
    (folder / "ranks.py").write_text(RANKS)
    (folder / "homes.json").write_text(json.dumps(homes))
    start = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2", "--"]
    done = subprocess.run(
        [*start, folder / "ranks.py", Path(__file__).parent, folder / "homes.json", "train" if train else "step"],
        capture_output=True, text=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shared(
    request: pytest.FixtureRequest, course: Callable[[str], Course], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that gives a case's folder after `on_two_ranks`, for single strategies or all combinations."""
    train = any(item.originalname in TRAINED for item in request.session.items if isinstance(item, pytest.Function))

    @functools.cache
    def trained(several: bool) -> None:
        cases = [case for case in CASES if (" " in case) == several and not refused_here(case)]
        on_two_ranks(cases, course, tmp_path_factory.mktemp("ranks"), train=train)

    def shared(case: str) -> Path:
        trained(" " in works_here(case))
        return course(case).home

    return shared


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY)
def test_two_ranks_with_half_the_batch_are_one(case: str, shared: Callable[[str], Path]) -> None:
    """Their gradients differ from those of one rank in the order of the sums only."""
    start, alone, together = (weights(shared(case) / f) for f in ("first", "second", "shared"))
    assert together.keys() == alone.keys()
    learnt = torch.stack([torch.dist(alone[n], start[n]) for n in alone]).norm()
    apart = torch.stack([torch.dist(alone[n], together[n]) for n in alone]).norm()
    assert apart <= 1e-3 * learnt


@pytest.mark.slow
@pytest.mark.parametrize("case", MANY)
def test_two_ranks_remember_what_one_does(case: str, shared: Callable[[str], Path]) -> None:
    one, two = (shared(case) / f"{f}-memory" for f in ("second", "shared"))
    assert [p.relative_to(two) for p in sorted(two.rglob("*"))] == [p.relative_to(one) for p in sorted(one.rglob("*"))]
    for path in one.rglob("*.safetensors"):
        theirs = load_file(two / path.relative_to(one))
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-2, atol=1e-3 * float(tensor.abs().max()))


@pytest.mark.parametrize("case", MANY)
def test_step_on_shared_out_weights(case: str, shared: Callable[[str], Path]) -> None:
    """It is that on whole ones, for those that do not say that they need the weights whole."""
    written = (shared(case) / "sharded").read_text()
    assert (written == "None") == (not all(strategy_class(name).sharded for name in case.split()))
    assert written == "None" or float(written) < 1e-6


# What is refused


def refused(base: Path, names: list[str], parameters: Row) -> str:
    with pytest.raises(RecipeError) as caught:
        [check() for check in training_checks(Train(strategy=tuple(names), parameters=parameters), base)]
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "parameters", "message"),
    [
        (["low_perplexity"], {"threshold": 1.0}, "low_perplexity's threshold must be less than 1; got 1.0"),
        (["talr"], {"tau": 0.0}, "talr's tau must be"),
        (["talr"], {"floor": 2}, "talr's floor must be less than or equal to 1; got 2"),
        (["asft"], {"teacher": "both of them"}, "asft's teacher must be 'start', 'base' or 'both'; got 'both of them'"),
        (["anchor"], {"strength": -1.0}, "anchor's strength must be greater than or equal to 0; got -1.0"),
        (["anchor"], {"strength": "much"}, "anchor's strength must be a valid number; got 'much'"),
        (["anchor"], {"modules": "("}, "anchor's modules is no regular expression: '(' (missing ), unterminated subpa"),
        (["ewc"], {"gamma": 1.5}, "ewc's gamma must be less than or equal to 1; got 1.5"),
        (["ewc"], {"examples": 0}, "ewc's examples must be greater than or equal to 1; got 0"),
        (["distill"], {"temperature": float("nan")}, "distill's temperature must be a finite number; got nan"),
        (["migu"], {"fraction": True}, "migu's fraction must be a valid number; got True"),
        (["lora", "full"], {}, "lora and full cannot be combined: each says which tensors are trained; keep one"),
        (["anchor", "anchor"], {}, "the same strategy twice: anchor, anchor"),
        (["lora", "anchor"], {}, "anchor works with full, not with lora"),
        (["ewc", "olora"], {}, "ewc works with full, not with olora"),
        (["osf", "migu"], {}, "migu works with full or lora or qlora or olora or slao, not with osf"),
    ],
)
def test_what_cannot_be(names: list[str], parameters: Row, message: str, base_folder: Path) -> None:
    of = parameters if len(names) == 1 else {}
    assert refused(base_folder, names, of).startswith(f"train.parameters: {message}")


BF16: dict[str, Row] = {**PARAMETERS, "gpm": {"rank": 4}}
"""As on wide maps: where a toy's are so narrow that another path is taken."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_stages_in_bf16(name: str, tmp_path: Path) -> None:
    """The default on hardware that has it, with autocast in whatever a strategy computes inside the model."""
    works_here(name)
    course = Course(tmp_path, {name: strategy_class(name)}, {name: BF16[name]} if name in BF16 else {})
    for stage, folder in ((1, "first"), (2, "second")):
        path = write_texts(tmp_path / f"{folder}.jsonl", stage)
        record = course.train(stage, folder, texts_of(path), bf16=True, max_steps=2)
        assert math.isfinite(record["loss"])


@pytest.mark.parametrize("pair", [pair for pair in EVERY_PAIR if pair not in PAIRS and "full" not in pair.split()])
def test_a_pair_that_cannot_be_is_refused_with_a_sentence(pair: str, base_folder: Path) -> None:
    """Before any work, in either order; a pair is in PAIRS or here."""
    names = pair.split()
    if any(refused_here(name) for name in names):
        pytest.skip("one of them cannot work on this machine")
    for order in (names, names[::-1]):
        message = refused(base_folder, order, {})
        assert all(name in message for name in names)
        assert "cannot be combined: each says which tensors are trained" in message or " works with " in message


def test_a_machine_that_lacks_something_is_told_what_to_use_instead() -> None:
    for name in NAMES:
        assert "Use " in (refused_here(name) or "Use ")


# check_strategy, for strategies of others: what it accepts, and what it says of one that breaks a promise


@dataclass
class Calm(TrainStrategy):
    """Gradients times a factor: g <- factor * g. See https://example.org/calm; nothing is wrong with it."""

    factor: Annotated[float, Field(ge=0)] = 0.5

    def adjust_gradients(self, model: nn.Module) -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(self.factor)


@pytest.mark.parametrize(
    ("strategy", "parameters"),
    [
        ("lora", {"keep": True, "r": 4}),
        ("osf", {"adaptive": True, "growth": 0.1}),
        (["lora", Calm], {"lora": {"r": 4}, "calm": {"factor": 0.1}}),
    ],
    ids=["adapter", "adaptive", "list"],
)
def test_check_strategy_takes_words_classes_and_parameters(strategy: Any, parameters: Row) -> None:
    check_strategy(strategy, **parameters)


@pytest.mark.parametrize(
    ("strategy", "parameters", "message"),
    [
        ("clam", {}, r"Unknown strategy 'clam'"),
        (Calm, {"factor": -1.0}, "calm's factor must be greater than or equal to 0"),
        (["lora", "osf"], {}, "lora and osf cannot be combined"),
        ([Calm, Calm], {}, "the same strategy twice: calm, calm"),
        (["lora", Calm], {"factor": 1.0}, "parameters.factor: with several strategies, put the parameters of each"),
    ],
)
def test_check_strategy_refuses_what_recipes_refuse(strategy: Any, parameters: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_strategy(strategy, **parameters)


BROKEN: dict[str, tuple[type[TrainStrategy], str]] = {}


def broken(said: str) -> Callable[[type[TrainStrategy]], type[TrainStrategy]]:
    """Return a decorator for strategies that check_strategy must refuse with these words."""

    def keep(cls: type[TrainStrategy]) -> type[TrainStrategy]:
        BROKEN[cls.__name__] = (cls, said)
        return cls

    return keep


@broken("says_what_it_is: the class Silent has no docstring")
@dataclass
class Silent(Calm):
    pass


@broken("says_what_it_is: the docstring of Vague has no equation")
@dataclass
class Vague(Calm):
    """Gradients times a factor, as in arXiv 0000.00000."""


@broken("says_what_it_is: neither Unsourced nor its module names a reference")
@dataclass
class Unsourced(Calm):
    """g <- factor * g."""


@broken("says_what_it_is: weightless is a carrier, and its `bytes_per_parameter` is 0")
@dataclass
class Weightless(Calm):
    """g <- factor * g, as in arXiv 0000.00000."""

    carrier = True


@broken("refuses_what_it_does_not_have: generous accepts the unknown parameter `lamda`")
@dataclass(init=False)
class Generous(Calm):
    """g <- factor * g, as in arXiv 0000.00000."""

    def __init__(self, *, factor: float = 0.5, **_: Any) -> None:
        super().__init__(factor=factor)


@broken(
    "refuses_what_it_does_not_have: untyped accepts an object() as `size`, or refuses it without its name; annotate"
)
@dataclass
class Untyped(Calm):
    """g <- factor * g, as in arXiv 0000.00000."""

    size: Any = None


@broken("opens_on_meta: on a model without values, `open` ends with RuntimeError: Tensor.item() cannot be called on")
@dataclass
class Measures(Calm):
    """g <- factor * |w| * g, as in arXiv 0000.00000."""

    opens_on_meta = True

    def open(self, model: Any, memory: Path | None) -> Any:
        self._size = float(model.lm_head.weight.norm())
        return model


@broken("needs_no_earlier_data: the first stage's dataset was deleted, and the second ends with FileNotFoundError: ")
@dataclass
class Rereads(Calm):
    """g <- factor * g, as in arXiv 0000.00000."""

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        (out / "path").write_text(data.cache_files[0]["filename"])

    def mix(self, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        old = [datasets.Dataset.from_file((memory / "path").read_text())] if memory else []
        return datasets.concatenate_datasets([fresh, *old])


@broken("leaves_its_inputs_alone: `token_weights` changes `log_probs`")
@dataclass
class InPlace(Calm):
    """weight = -log_prob, as in arXiv 0000.00000."""

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        return log_probs.abs_()


@broken("leaves_its_inputs_alone: `loss` changes `inputs`")
@dataclass
class Relabels(Calm):
    """label <- the first token, as in arXiv 0000.00000."""

    def loss(self, model: nn.Module, inputs: Any) -> None:
        inputs["labels"][:, 1:] = inputs["labels"][:, :1]


@broken("leaves_its_inputs_alone: `loss` changes `model`")
@dataclass
class Decays(Calm):
    """w <- 0.99 * w, as in arXiv 0000.00000."""

    def loss(self, model: nn.Module, inputs: Any) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.99)


@broken("leaves_its_inputs_alone: `before_step` leaves gradients in the model")
@dataclass
class Leaves(Calm):
    """g <- g + factor * g, as in arXiv 0000.00000."""

    def before_step(self, model: nn.Module, gradient: Any) -> None:
        slope = gradient()
        for name, weight in model.named_parameters():
            weight.grad = slope[name]


@broken("leaves_its_inputs_alone: `remember` changes `memory`")
@dataclass
class Moves(Calm):
    """memory <- memory + 1, as in arXiv 0000.00000."""

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        if memory:
            (memory / "count").rename(out / "count")
        (out / "count").write_text("1")


@broken("leaves_its_inputs_alone: `review` changes `model`")
@dataclass
class Rounds(Calm):
    """w <- 0 * w after training, as in arXiv 0000.00000."""

    def review(self, model: nn.Module, likelihoods: Any) -> None:
        for weight in model.parameters():
            weight.data.zero_()


@broken("learns: the loss does not fall in the first stage: ")
@dataclass
class Climbs(Calm):
    """g <- -g, as in arXiv 0000.00000."""

    factor: float = -1.0


@broken("keeps_names_shapes_and_finite_values: the first stage's expert does not fit the base: ")
@dataclass
class Renames(Calm):
    """W <- P W, as in arXiv 0000.00000."""

    def close(self, model: Any) -> Any:
        model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
        return model


@broken(
    "keeps_names_shapes_and_finite_values: model.norm.weight of the first stage's expert has values that are not fi"
)
@dataclass
class Divides(Calm):
    """w <- w / 0, as in arXiv 0000.00000."""

    def close(self, model: Any) -> Any:
        model.model.norm.weight.data /= 0
        return model


@broken("keeps_names_shapes_and_finite_values: the first stage's expert is the model that the stage starts from")
@dataclass
class Restores(Calm):
    """w <- w0 at the end, as in arXiv 0000.00000."""

    def open(self, model: Any, memory: Path | None) -> Any:
        self._start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return model

    def close(self, model: Any) -> Any:
        model.load_state_dict(self._start, strict=False)
        return model


@broken("resumes_to_the_same_bytes: the expert of training that was killed and resumed differs in model.safetensors")
@dataclass
class Warms(Calm):
    """g <- g / t at step t, counted by the object, as in arXiv 0000.00000."""

    def open(self, model: Any, memory: Path | None) -> Any:
        self._steps = 0
        return model

    def adjust_weights(self, model: nn.Module) -> None:
        self._steps += 1
        for weight in model.parameters():
            weight.mul_(1 + 1e-3 * self._steps)


@broken("resumes_to_the_same_bytes: the memory of training that was killed and resumed differs in counts/steps")
@dataclass
class Counts(Warms):
    """n <- n + 1 at each step, as in arXiv 0000.00000."""

    def adjust_weights(self, model: nn.Module) -> None:
        self._steps += 1

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        (out / "steps").write_text(str(self._steps))


@pytest.mark.parametrize("name", BROKEN)
def test_check_strategy_says_what_is_wrong(name: str) -> None:
    cls, said = BROKEN[name]
    with pytest.raises(AssertionError) as error:
        check_strategy(cls)
    assert str(error.value).startswith(f"{name.lower()} breaks ")
    assert said in str(error.value)


def test_every_promise_has_a_strategy_that_breaks_it() -> None:
    assert {said.partition(":")[0] for _, said in BROKEN.values()} == {check.__name__ for check in CHECKS}
