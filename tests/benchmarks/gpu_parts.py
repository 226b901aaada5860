"""The parts of gpu.py: each adds rows to a table."""

import functools
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lora_stream
import models
import scoring as scores
import torch
from gpu import TESTS, Table, kill, tail
from safetensors import safe_open

from hf_contmerge.merge_rules import Weight, get_rule
from hf_contmerge.merging._factored import fold_factors
from hf_contmerge.merging._pieces import updated
from hf_contmerge.merging.state import MergeState
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.testing.strategies import falls

CPU = torch.device("cpu")
models.SIZES["1300M"] = models.Size(2048, 5632, 24, 16, 8, 32000)


def device_of(table: Table) -> torch.device:
    return torch.device("cuda", 0) if table.device == "cuda" else CPU


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best(work: Callable[[], object], times: int = 3) -> float:
    """Return the seconds of the fastest run, the device's work included."""
    found = []
    for _ in range(times):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return min(found)


def child(*words: object, limit: float = 600, **env: str) -> str:
    """Run Python in a process of its own; return what it printed. Raises RuntimeError with its last lines."""
    with subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **env},
    ) as process:  # fmt: skip
        try:
            out, error = process.communicate(timeout=limit)
            ended = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            kill(process)
            out, error = process.communicate()  # all that it had said
            ended = f"more than {limit:.0f} s"
    print(out, error, sep="\n", flush=True)
    if process.returncode:
        raise RuntimeError(f"{ended}: {words}\n{tail(out + error)}")
    return out


def largest(values: Iterable[float]) -> float:
    """Return the largest value; not a number if one is none, which `max` passes over."""
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


CONTMERGE = ("-m", "hf_contmerge.commands.main")
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


# What the card can do


def machine(table: Table, _: Path) -> None:
    """Bandwidths that the others are held against."""
    device = device_of(table)
    numel = 2**22 if table.quick else 2**30
    a, b = (torch.randn(numel, device=device) for _ in range(2))
    speed = 2 * a.nbytes / best(lambda: a.copy_(b))
    table.add("copy on the device, read and written", f"{speed / 1e9:.0f} GB/s")
    host = torch.randn(min(numel, 2**28))
    table.add("copy to the device, pageable", f"{host.nbytes / best(lambda: host.to(device)) / 1e9:.1f} GB/s")
    table.add("copy from the device", f"{host.nbytes / best(lambda: a[: len(host)].cpu()) / 1e9:.1f} GB/s")
    if device.type == "cuda":
        pinned = host.pin_memory()
        table.add("copy to the device, pinned", f"{host.nbytes / best(lambda: pinned.to(device)) / 1e9:.1f} GB/s")
    n = 512 if table.quick else 8192
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(n, n, device=device, dtype=dtype)
        name = str(dtype).removeprefix("torch.")
        table.add(
            f"product of {n} x {n}, {name}", f"{2e-12 * n**3 / best(functools.partial(torch.mm, x, x)):.1f} TFLOP/s"
        )


def tests(table: Table, home: Path) -> None:
    """The tests marked `gpu`."""
    out = home / "junit.xml"
    words = [
        "-m",
        "pytest",
        "-v",
        "-m",
        "gpu and not slow",
        str(TESTS / "gpu"),
        f"--junitxml={out}",
        "-p",
        "no:cacheprovider",
    ]
    words += ["-o", "addopts=--import-mode=importlib --strict-markers"]  # not ours, which need pytest-timeout
    if table.quick:
        words += ["-k", "test_a_card_that_is_not_there"]
    done = subprocess.run([sys.executable, *words], cwd=TESTS.parent, check=False)
    suite = next(ElementTree.parse(out).getroot().iter("testsuite"))
    bad, skipped = int(suite.get("failures", 0)) + int(suite.get("errors", 0)), int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - bad - skipped
    met = done.returncode == 0 and (passed > 0 or table.quick)  # where torch finds no card, all are skipped
    table.add("tests marked `gpu`", f"{passed} passed, {bad} failed, {skipped} skipped", met=met)
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            for found in case.iter(kind):
                table.add(str(case.get("name")), kind, met=False, more=tail(found.text or found.get("message", "")))
        for found in case.iter("skipped"):
            if not table.quick:
                table.add(str(case.get("name")), f"skipped: {found.get('message')}")


# Merging


def folders(table: Table, home: Path, size: str, count: int) -> list[Path]:
    """Return a base and its experts, made on the device, where random numbers are fast."""
    base = models.base_model(home, "tiny" if table.quick else size, device=device_of(table))
    return [base, *models.experts(base, count, device=device_of(table))]


def timed_merge(rule: Any, made: Sequence[Path], out: Path, crew: Crew, *, dtype: torch.dtype | None = None) -> float:
    """Merge twice; return the seconds of the second time, when files are cached and libraries loaded."""
    base = Weights(made[0])
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        experts = [open_expert(folder, base) for folder in made[1:]]
        os.sync()
        start = time.perf_counter()
        merge_experts(rule, base, experts, merged_out=Output(out, dtype), crew=crew)
        seconds = time.perf_counter() - start
    return seconds


def apart(one: Path, other: Path, base: Path) -> float:
    """Return |one - other| / |other - base|, tensor by tensor."""
    gap = moved = 0.0
    files = [safe_open(folder / "model.safetensors", framework="pt") for folder in (one, other, base)]
    for name in files[0].keys():  # noqa: SIM118  (not a dict)
        a, b, c = (file.get_tensor(name).float() for file in files)
        gap, moved = gap + float((a - b).norm()) ** 2, moved + float((b - c).norm()) ** 2
    return (gap / moved) ** 0.5


def gigabytes(made: Sequence[Path], out: Path) -> float:
    return sum((folder / "model.safetensors").stat().st_size for folder in (*made, out)) / 1e9


def merging(table: Table, home: Path) -> None:
    """Rules that work element by element: bound by what moves."""
    device = device_of(table)
    made = folders(table, home, "1300M", 4)
    count = Weights(made[0]).numel() / 1e6
    table.add("models", f"4 experts of {count:.0f}M parameters, bf16")
    for name in ("magmax", "average", "ties"):
        with table.attempt(f"{name}"):
            rule, outs = get_rule(name), {}
            for where in (device, CPU):
                outs[where] = home / f"{name}-{where.type}"
                seconds = timed_merge(rule, made, outs[where], Crew(device=where))
                speed = gigabytes(made, outs[where]) / seconds
                table.add(f"{name} on {where.type}", f"{seconds:.2f} s, {speed:.2f} GB/s in and out")
            gap = apart(outs[device], outs[CPU], made[0])
            if name == "ties":  # of equal magnitudes at its threshold, which bf16 has many of, any may be kept
                table.add(f"{name}, against the CPU's", f"{gap:.2g}, from equal magnitudes")
            else:
                table.within(f"{name}, against the CPU's", gap, 1e-5)
    with table.attempt("magmax in 1, 4 and 16 threads"):
        out = home / "threads"
        walls = [timed_merge(get_rule("magmax"), made, out, Crew(device=device, workers=n)) for n in (1, 4, 16)]
        table.add("magmax in 1, 4 and 16 threads", ", ".join(f"{s:.2f} s" for s in walls))
    arithmetic(table)


def arithmetic(table: Table) -> None:
    """One fold of tensors that lie on the device, against a copy there."""
    device, numel = device_of(table), 2**20 if table.quick else 2**28
    a, b = (torch.randn(numel, device=device) for _ in range(2))
    copied = 2 * a.nbytes / best(lambda: a.copy_(b))
    for name, moved in (("magmax", 3), ("average", 3), ("ema", 3)):
        with table.attempt(f"{name}'s arithmetic"):
            work = functools.partial(updated, get_rule(name), {"": a}, b, Weight("w", False, 2, (numel,)))
            speed = moved * a.nbytes / best(work)
            what = f"{name}'s arithmetic alone, state and change read and state written"
            table.add(what, f"{speed / 1e9:.0f} GB/s, {speed / copied:.0%} of a copy's")


def opcm(table: Table, home: Path) -> None:
    """Projections, by variant: bound by decompositions in float64."""
    device = device_of(table)
    made = folders(table, home, "400M", 2)
    count = Weights(made[0]).numel() / 1e6
    table.add("models", f"2 experts of {count:.0f}M parameters, bf16")
    for variant in ("fusionbench", "block", "paper"):
        with table.attempt(f"opcm {variant}"):
            rule, outs = get_rule("opcm", variant=variant), {}
            for where in (device, CPU):
                outs[where] = home / f"{variant}-{where.type}"
                # float32, as the gap is that of a few neighbours in bf16 otherwise
                seconds = timed_merge(rule, made, outs[where], Crew(device=where), dtype=torch.float32)
                table.add(f"opcm {variant} on {where.type}", f"{seconds:.2f} s")
            limit = 1e-5 if variant == "block" else 1e-3
            table.within(f"opcm {variant}, against the CPU's", apart(outs[device], outs[CPU], made[0]), limit)
    with table.attempt("opcm in 1, 4 and 16 threads"):
        out = home / "threads"
        walls = [timed_merge(get_rule("opcm"), made, out, Crew(device=device, workers=n)) for n in (1, 4, 16)]
        table.add("opcm in 1, 4 and 16 threads", ", ".join(f"{s:.2f} s" for s in walls))


def drivers(table: Table, _: Path) -> None:
    """Ways to decompose, CUDA's drivers among them."""
    largest = 64 if table.quick else 1100
    printed = child(Path(__file__).with_name("svd_routes.py"), "--largest", largest, limit=220)
    table.add("ways to decompose a matrix", "below", more=printed)


def factors(table: Table, _: Path) -> None:
    """16 LoRA experts of rank 16 at 7B shapes, one module of each shape."""
    device = device_of(table)
    shapes = [(256, 512)] if table.quick else list(dict.fromkeys(lora_stream.LAYER.values()))
    for rule in (get_rule("opcm"), get_rule("average")):
        for shape in shapes:
            with table.attempt(f"factors {shape}"):
                experts = lora_stream.adapters(shape, 16, 16, seed=str(shape))
                there = [(a.to(device), b.to(device)) for a, b in experts]
                weight = Weight("w", True, 1, shape)
                (one, _), (other, _) = (fold_factors(rule, None, e, weight) for e in (there, experts))
                what = f"{type(rule).__name__.lower()}, {shape[0]} x {shape[1]}"
                gap = float((one.dense().cpu() - other.dense()).norm() / other.dense().norm())
                table.within(f"{what}: factors on the device against the CPU's", gap, 1e-5)
                fold = functools.partial(fold_factors, rule, None)
                walls = [best(functools.partial(fold, e, weight), 2) for e in (there, experts)]
                dense = [best(state.dense) for state in (one, other)]
                figure = (
                    f"{walls[0] * 1e3:.0f} / {walls[1] * 1e3:.0f} ms (all cores); "
                    f"dense {dense[0] * 1e3:.1f} / {dense[1] * 1e3:.1f} ms"
                )
                table.add(f"{what}: fold on the device / on the CPU", figure)


# Training

COURSES = """
import json, sys, time, traceback
from pathlib import Path
from toys.models import toy_llama
from hf_contmerge.testing.course import texts_of, write_texts
from hf_contmerge.testing.strategies import losses_of
from train_strategies.test_all_strategies import CASES, PAIRS, course_of, refused_here

home, bf16, steps, few = Path(sys.argv[1]), sys.argv[2] == "bf16", int(sys.argv[3]), sys.argv[4] == "quick"
cases = [case for case in CASES if case not in PAIRS][: 2 if few else None]
found = {case: {"failed": "not reached"} for case in cases}
for case in cases:
    folder = home / case.replace(" ", "-")
    try:
        if why := refused_here(case):
            found[case] = {"refused": why}
            continue
        folder.mkdir(parents=True)
        toy_llama(folder / "base", seed=0, hidden=64)
        start, losses, course = time.perf_counter(), [], course_of(case, folder)
        for stage, name in enumerate(("first", "second"), 1):
            data = texts_of(write_texts(folder / f"{name}.jsonl", stage))
            record = course.train(stage, name, data, bf16=bf16, max_steps=steps, learning_rate=2e-3)
            losses.append(losses_of(course, stage, record))
        found[case] = {"losses": losses, "seconds": time.perf_counter() - start}
    except Exception:
        found[case] = {"failed": traceback.format_exc()}
    (home / "found.new").write_text(json.dumps(found))
    (home / "found.new").replace(home / "found.json")
"""


_TO_COMPARE = 30
"""Seconds that are left to compare strategies."""


def strategies(table: Table, home: Path) -> None:
    """Two stages of 20 steps with each strategy on both devices, in float32 and in bfloat16."""
    steps = 3 if table.quick else 20
    (home / "courses.py").write_text(COURSES)
    there = {} if table.device == "cuda" else ON_CPU
    started = []
    for precision in ("float32", "bf16"):
        for where, env in (("device", there), ("cpu", ON_CPU)):
            folder = home / f"{precision}-{where}"
            folder.mkdir()
            words = [home / "courses.py", folder, precision, steps, "quick" if table.quick else "all"]
            log = (folder / "log").open("w")
            env = {**os.environ, "OMP_NUM_THREADS": "2", **env}
            process = subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log, env=env)
            started.append((f"strategies, {precision}, on the {where}", process, folder))
    for what, process, folder in started:
        try:
            code = process.wait(max(0.0, table.ends - _TO_COMPARE - time.monotonic()))
            why = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            code, why = kill(process), "not done when the part's time was over"
        print(f"{what}: exit code {code}", (folder / "log").read_text(errors="replace"), sep="\n", flush=True)
        if code:
            table.add(what, why, met=False, more=tail((folder / "log").read_text(errors="replace")))
    for precision, limit in (("float32", 0.02), ("bf16", 0.3)):
        compare_courses(table, home / f"{precision}-device", home / f"{precision}-cpu", precision, limit)


def compare_courses(table: Table, device: Path, cpu: Path, precision: str, limit: float) -> None:
    """Compare what was learnt in the first stage, and the losses of both."""
    with table.attempt(f"strategies, {precision}"):
        found = [json.loads((folder / "found.json").read_text()) for folder in (device, cpu)]
        for case in found[0]:
            name = case.replace(" ", "-")
            with table.attempt(f"{case}, {precision}"):
                ours, theirs = (each[case] for each in found)
                compare_course(table, f"{case}, {precision}", device / name, cpu / name, ours, theirs, limit)


def compare_course(
    table: Table, what: str, device: Path, cpu: Path, ours: dict[str, Any], theirs: dict[str, Any], limit: float
) -> None:
    """Add the row of a case."""
    if "refused" in ours:
        table.add(what, f"not run: {ours['refused']}")
        return
    if bad := ours.get("failed") or theirs.get("failed"):
        table.add(what, "failed", met=False, more=tail(bad))
        return
    gap = apart(device / "first", cpu / "first", cpu / "base")
    ends = " ".join(f"{a[-1]:.3f}/{b[-1]:.3f}" for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    figure = f"{gap:.2g} apart; last losses {ends}; {ours['seconds']:.0f} s, on the CPU {theirs['seconds']:.0f} s"
    table.add(what, figure, f"<= {limit:g}, losses fall", met=gap <= limit and all(map(falls, ours["losses"])))


TRAIN = """
import json, sys, time
from pathlib import Path
import torch
from hf_contmerge.loop.plan._dry_step import training_step
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.settings import make_strategies, sft_settings, trl_classes

home, strategy, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
steps, batch, length = map(int, sys.argv[4:7])
fields = dict(max_steps=steps, per_device_train_batch_size=batch, max_length=length, learning_rate=1e-5,
    save_strategy="no", logging_steps=1, gradient_checkpointing=mode == "checkpointing", bf16=True)
train = Train(strategy=strategy.split(), **fields)
data = load_stage_data(Dataset(path=str(home / "text.jsonl"), heldout=0), seed=0)
out = home / f"{strategy}-{mode}".replace(" ", "-")
out.mkdir()
ticks = []
if mode == "trl":
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Ticks(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                ticks.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    settings = sft_settings(train, data, tokenizer, numel=10**9)
    trainer_class, config = trl_classes("text")
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    trainer = trainer_class(model=model, args=config(**settings, output_dir=str(out), seed=0), train_dataset=data.train,
        processing_class=tokenizer, callbacks=[Ticks()])
    trainer.train()
else:
    job = TrainJob(start=home / "base", base=home / "base", data=data, train=train, seed=0, memory=None)
    train_expert(job, out, checkpoints=home / "checkpoints",
        on_log=lambda _, point: ticks.append(time.perf_counter()) if "loss" in point else None)
first = len(ticks) // 4  # kernels are loaded in the first steps
found = {"speed": (len(ticks) - 1 - first) * batch * length / (ticks[-1] - ticks[first])}
if torch.cuda.is_available():
    found["peak"] = torch.cuda.max_memory_allocated()
if mode != "trl":
    from transformers import AutoTokenizer
    fields = sft_settings(train, data, AutoTokenizer.from_pretrained(home / "base"), numel=10**9)
    settings = trl_classes("text")[1](**fields, output_dir="unused")
    cost = training_step(home / "base", make_strategies(train), settings, batch=batch, length=length,
        init={"dtype": torch.float32, "trust_remote_code": False})
    found["planned"] = cost.peak
print("FOUND " + json.dumps(found))
"""


def written_model(table: Table, home: Path, size: str) -> Path:
    """Return the folder of a random model with the toys' tokenizer."""
    from toys.models import toy_tokenizer

    (base,) = folders(table, home, size, 0)
    toy_tokenizer().save_pretrained(base)
    if not (home / "base").exists():
        (home / "base").symlink_to(base)
    return home / "base"


def training(table: Table, home: Path) -> None:
    """Tokens per second of a model of a billion weights, against TRL's own trainer and the plan's memory."""
    from toys.models import TEXT, write_jsonl

    written_model(table, home, "1300M")
    write_jsonl(home / "text.jsonl", [{"text": f"{i} {TEXT * 3}"} for i in range(40 if table.quick else 1200)])
    (home / "train.py").write_text(TRAIN)
    steps, batch, length = (4, 2, 64) if table.quick else (24, 8, 1024)
    env = ON_CPU if table.device == "cpu" else {}
    speeds = {}
    for strategy, mode in (("full", "plain"), ("full", "trl"), ("full", "checkpointing"), ("lora", "plain")):
        with table.attempt(f"training {strategy}, {mode}"):
            printed = child(home / "train.py", home, strategy, mode, steps, batch, length, **env)
            found = json.loads(printed.split("FOUND ")[-1])
            speeds[strategy, mode] = speed = found["speed"]
            table.add(f"{strategy}, {mode}, {batch} x {length} tokens a step", f"{speed:.0f} tokens/s")
            if "peak" in found and "planned" in found:
                share = found["planned"] / found["peak"]
                figure = f"{found['peak'] / 1e9:.1f} GB; the plan says {found['planned'] / 1e9:.1f} GB"
                table.add(f"{strategy}, {mode}: peak on the card", figure, "within 25 %", met=0.75 <= share <= 1.25)
    if ("full", "trl") in speeds and ("full", "plain") in speeds:
        share = speeds["full", "plain"] / speeds["full", "trl"]
        table.add("tokens per second, ours / TRL's trainer", f"{share:.2f}", ">= 0.97", met=share >= 0.97)


PACKED = """
import sys
from pathlib import Path
import torch
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob

home, name, attention, packing = Path(sys.argv[1]), *sys.argv[2:5]
fields = dict(packing=True, packing_strategy=packing) if packing != "none" else dict(packing=False)
train = Train(max_steps=1, per_device_train_batch_size=1 if fields["packing"] else 3, max_length=256, optim="sgd",
    learning_rate=1.0, max_grad_norm=1e9, lr_scheduler_type="constant", save_strategy="no", bf16=False,
    gradient_checkpointing=False, model_init_kwargs={"attn_implementation": attention}, **fields)
data = load_stage_data(Dataset(path=str(home / "text.jsonl"), heldout=0), seed=0)
(home / name).mkdir()
train_expert(TrainJob(start=home / "base", base=home / "base", data=data, train=train, seed=0, memory=None),
    home / name, checkpoints=home / f"{name}-checkpoints")
"""


def packing(table: Table, home: Path) -> None:
    """One step of gradient descent on three documents in one row, against the same in three rows.

    The gradients are equal if no document attends to another, and if each has positions from 0 on.
    """
    from toys.models import TEXT, toy_llama, write_jsonl

    toy_llama(home / "base", seed=0)
    write_jsonl(home / "text.jsonl", [{"text": line} for line in TEXT.strip().splitlines()[:3]])
    (home / "packed.py").write_text(PACKED)
    env = ON_CPU if table.device == "cpu" else {}
    child(home / "packed.py", home, "apart", "sdpa", "none", **env)
    cases = [("sdpa", "bfd"), ("sdpa", "wrapped"), ("eager", "bfd"), ("flex_attention", "bfd")]
    for attention, kind in cases[:1] if table.quick else cases:
        with table.attempt(f"packing {kind}, {attention}"):
            name = f"{attention}-{kind}"
            child(home / "packed.py", home, name, attention, kind, **env)
            gap = apart(home / name, home / "apart", home / "base")
            apart_ = gap < 1e-3
            figure = f"{gap:.1e}: documents {'do not ' if apart_ else ''}attend to each other"
            target = {} if kind == "wrapped" else {"target": "they do not", "met": apart_}
            table.add(f"packing_strategy {kind}, {attention}: gradients against unpacked", figure, **target)


# Scoring


def scoring(table: Table, home: Path) -> None:
    """Values against the stock command's on the same device, and the time of both."""
    from toys.models import toy_llama

    on = "cuda:0" if table.device == "cuda" else "cpu"
    scores.write_tasks(home / "tasks", few=True)
    (home / "score.py").write_text(scores.SCORE)
    toy_llama(home / "base", seed=0, hidden=256, layers=8)
    for dtype in ("bfloat16",) if table.quick else ("float32", "bfloat16"):
        with table.attempt(f"scoring, {dtype}"):
            mine, found = scores.ours(home, home / "base", dtype, scores.AGREE, device=on)
            gaps, wall = [], 0.0
            for name in scores.AGREE[-1:] if table.quick else scores.AGREE:
                theirs, value = scores.stock(home, home / "base", dtype, name, device=on)
                ours, wall = found["tasks"][name]["value"], wall + theirs.wall
                gaps.append(abs(ours - value) / max(abs(value), 1e-12) if value or ours else 0.0)
            limit = 1e-4 if dtype == "float32" else 2e-2
            table.within(
                f"{len(scores.AGREE)} tasks in {dtype} against the `lm_eval` command, largest", largest(gaps), limit
            )
            table.add(f"the same, time of ours / `lm_eval` once a task, {dtype}", f"{mine.wall:.1f} / {wall:.1f} s")


# Ranks

ONE_CARD = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist

if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    os.environ["LOCAL_RANK"] = "0"  # both ranks take the first card, on which NCCL would refuse to join them
    dist.init_process_group("gloo")
from hf_contmerge.runtime.launching import join_ranks, leave_ranks
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.scoring.score import score_model
from hf_contmerge.testing.course import texts_of
from train_strategies.test_all_strategies import course_of

home, name, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ranks, crew = join_ranks()
if ranks.is_main_process:
    (home / name).mkdir(exist_ok=True)
ranks.wait_for_everyone()
course_of(sys.argv[4], home).train(
    1, name, texts_of(home / "text.jsonl"), per_device_train_batch_size=batch, bf16=False)
_, scores = score_model(home / "base", [Task(name=n) for n in ("bible", "topics")], task_folder=home / "tasks",
    ranks=crew.ranks, evaluate=Evaluate(dtype="float32", batch_size=4))
if ranks.is_main_process:
    (home / f"{name}.json").write_text(json.dumps({n: s.gains for n, s in scores.items()}))
leave_ranks()
"""
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def ranks(table: Table, home: Path) -> None:
    """Two ranks on one card, joined by gloo."""
    from toys.models import toy_llama

    from hf_contmerge.testing.course import write_texts

    env = ON_CPU if table.device == "cpu" else {}
    made = folders(table, home, "176M", 2)
    with table.attempt("merging on two ranks"):
        digests, walls = [], []
        for name, launcher in (("one", ()), ("two", TWO)):
            state = MergeState.create(home / f"state-{name}", base=made[0], rule="opcm").folder
            start = time.perf_counter()
            child(*launcher, *CONTMERGE, "merge", "add", state, *made[1:], "--device", table.device, **env)
            walls.append(time.perf_counter() - start)
            running = MergeState.load(state).require_running()
            digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in running.glob("*.safetensors")})
        same = digests[0] == digests[1]
        figure = f"the bytes are {'the same' if same else 'OTHERS'}; {walls[0]:.1f} s on one, {walls[1]:.1f} s on two"
        table.add("opcm, 176M parameters, two ranks against one", figure, "the same bytes", met=same)
    toy_llama(home / "base", seed=0, hidden=64)
    scores.write_tasks(home / "tasks", few=True)
    write_texts(home / "text.jsonl", 1)
    (home / "ranks.py").write_text(ONE_CARD)
    for case in ("full",) if table.quick else ("full", "lora", "migu", "ewc"):
        with table.attempt(f"training and scoring on two ranks, {case}"):
            one, two = f"{case}-one", f"{case}-two"
            child(home / "ranks.py", home, one, 4, case, **env)
            child(*TWO, home / "ranks.py", home, two, 2, case, **env)
            gap = apart(home / two, home / one, home / "base")
            table.within(f"{case}: 6 steps on two ranks with half the batch against one", gap, 1e-2)
            gains = [json.loads((home / f"{name}.json").read_text()) for name in (one, two)]
            pairs = [p for n in gains[0] for p in zip(*(g[n] for g in gains), strict=True)]
            worst = largest(abs(a - b) for a, b in pairs)
            table.within(f"scores of {len(pairs)} documents on two ranks against one, largest gap", worst, 1e-5)
