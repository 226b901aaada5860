"""Made-up runs with known scores, and a reader of their pages."""

import math
import random
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import Block, Sample, TaskScore, load_scores, write_scores

KEPT = {"previous": 0.6, "magmax": 0.1, "opcm": 0.02, "average": 0.3}
"""How much of a stage a line forgets with each later one, in nats."""


Values = dict[str, float]


def make_score(utility: float, block: Block = "perplexity", *, seed: str = "", documents: int = 24) -> TaskScore:
    """Return a score of exactly this utility; documents of one seed are equally hard in all scores."""
    rng, noise = random.Random(seed), random.Random(f"{seed} {utility}")
    if block == "accuracy":
        right = round(utility * documents)
        gains, words = (1.0,) * right + (0.0,) * (documents - right), (1.0,) * documents
    else:
        words = tuple(float(rng.randint(50, 150)) for _ in range(documents))
        raw = [w * (rng.gauss(0, 0.3) + noise.gauss(0, 0.02)) for w in words]
        gains = tuple(g + w * (utility - sum(raw) / sum(words)) for g, w in zip(raw, words, strict=True))
    sample = Sample(gains, words)
    metric, value = ("acc", sample.utility) if block == "accuracy" else ("word_perplexity", math.exp(-sample.utility))
    return TaskScore(block, metric, value, sample.utility, sample.stderr(), gains, words, {})


def put(place: Place, values: Values, **record: object) -> None:
    scores = {t: make_score(u, "accuracy" if t == "quiz" else "perplexity", seed=t) for t, u in values.items()}
    place.finish("score", {"tasks": write_scores(place, scores, texts=True), **record})


def make_run(folder: Path, stages: int = 3, done: int | None = None, forget: dict[str, float] = KEPT, **more) -> Run:
    names = [f"s{i}" for i in range(1, stages + 1)]
    rules = more.pop("merge", ["magmax", "opcm", "average"])
    data = {"name": "toy", "base_model": "me/base", "stages": [{"name": n, "dataset": "a.jsonl"} for n in names],
            "merge": rules, "evaluate": {"general_tasks": ["quiz", "prose"]}, **more}  # fmt: skip
    run = Run.open(parse_recipe(data), folder)
    put(run.base, {f"{n}_heldout": -3.6 for n in names} | {"quiz": 0.5, "prose": -3.0}, seconds=1.5)
    for t in range(1, (stages if done is None else done) + 1):
        for kind in ("previous", "base"):
            alone = kind == "base" and t > 1
            values = {f"s{t}_heldout": -2.8} if alone else utilities(t, 0.9, forget["previous"])
            run.expert(t, kind).finish("train", {"seconds": 90.0, "peak_memory_bytes": 3 * 2**30})
            put(run.expert(t, kind), values)
        for entry in run.recipe.merge:
            run.merged(t, entry).finish("merge", {"seconds": 2.0, "scale": 0.5, "parameters": {}})
            put(run.merged(t, entry), utilities(t, 0.5, forget[entry.rule]))
    return run


def with_token(run: Run) -> None:
    """Put a token into a run's recipe, as an earlier version did; recipes refuse it when they are read."""
    fields = run.recipe.train.model_extra
    assert fields is not None
    fields["hub_token"] = "hf_verysecret"


def utilities(t: int, gain: float, drop: float) -> Values:
    """Return the utilities after stage t of a line that gains and drops this much on every stage."""
    own = {f"s{j}_heldout": -3.6 + gain - drop * (t - j) for j in range(1, t + 1)}
    return own | {"quiz": 0.5 - round(drop / 5 * 24) / 24, "prose": -3.0 - drop * t / 10}


class Page(HTMLParser):
    """Collects addresses and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


NASTY = "<script>alert('x')</script> # not a heading | nor a table *or bold*"


def change_scores(place: Place, change: Any) -> None:
    scores = {name: change(name, score) for name, score in load_scores(place).items()}
    record = {k: v for k, v in place.record("score").items() if k != "tasks"}
    place.finish("score", {**record, "tasks": write_scores(place, scores, texts=True)})


def texts(place: Place) -> None:
    change_scores(place, lambda name, s: replace(s, texts=tuple(f"{name} {i} {NASTY}" for i in range(len(s.gains)))))


def merge_record(t: int) -> dict[str, Any]:
    square = [[None if i == j else 0.1 * (i + j) for j in range(t + 1)] for i in range(t + 1)]
    shares = {"base": 0.0} | {f"s{i}": 1 / t for i in range(1, t + 1)}
    return {
        "start_from": "previous", "scale": 0.5,
        "norms": {"experts": [1.0 * i for i in range(1, t + 1)], "running": 4.0},
        "geometry": {"sampled": 0.001, "lengths": [1.0] * t + [2.5], "cosines": square, "conflicts": square},
        "ownership": {"layer 0": shares, "all": shares}, "parameters": {}, "seconds": 2.0,
    }  # fmt: skip


def with_models(run: Run, model: Path, base: Path) -> Run:
    """Give each merge of a made-up run a model's files, a state, and the records that a push reads."""
    from hf_contmerge.models.identity import Identity
    from hf_contmerge.models.weights import weights_sha256
    from hf_contmerge.runtime.records import write_record

    write_record(run.inputs, {"folder": str(run.folder.resolve()), "tasks": {}, "base": {
        "name": run.recipe.base_model, **Identity.of(base).to_json()}})  # fmt: skip
    for t, entry in ((t, entry) for t in run.stage_numbers() for entry in run.recipe.merge):
        place = run.merged(t, entry)
        shutil.copytree(model, place.model, ignore=shutil.ignore_patterns("merge.json"))
        (place.running).mkdir()
        shutil.copyfile(model / "model.safetensors", place.running / "model.safetensors")
        digests = [f"{i}e" * 32 for i in range(1, t + 1)]
        place.finish("merge", {
            **merge_record(t), "rule": entry.rule, "parameters": {}, "expert_sha256": digests,
            "model_sha256": weights_sha256(place.model),
        })  # fmt: skip
    return run
