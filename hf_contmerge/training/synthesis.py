"""Documents that a stage's start model writes, for replay without kept data.

Sun et al., "LAMOL", ICLR 2020, arXiv 1909.03329: a language model replays what it learnt by sampling. Conversations
begin with the chat template's first tokens, so that the model asks and answers: Xu et al., "Magpie", arXiv 2406.08464.

    synthesised/settings.json           what the documents depend on
    synthesised/parts/00003.jsonl       a part, while others are missing
    synthesised/documents.jsonl         all of them, as they were written; its existence means that they are complete

Each part has a fixed size and its own seed, so the documents depend neither on the number of ranks nor on kills.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import GenerationConfig

from hf_contmerge.errors import DataError, ModelError, RecipeError
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.loading import load_model
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import DataSource
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.device import bf16_pays, free_memory
from hf_contmerge.runtime.files import make_folder, remove, write_atomically
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.train_strategies import Synthesis
from hf_contmerge.training._forms import Form, Row, fit_rows
from hf_contmerge.training._rows import Rows
from hf_contmerge.training.data import StageData, require_chat_template, stage_data_of
from hf_contmerge.training.general import in_form, without_heldouts
from hf_contmerge.training.job import TrainJob, rows_sha256
from hf_contmerge.training.limits import trainer_limits
from hf_contmerge.training.settings import make_strategies
from hf_contmerge.training.tokenizer import stage_tokenizer

LOG = logging.getLogger(__name__)

SOURCE_NAME = "synthesised"
PART = 8
"""Documents written at once, by one rank."""
_FORMS: tuple[Form, ...] = ("text", "prompt_completion", "messages")
_EXAMPLES, _SHOWN = 3, 300
_MARK = "QQMARKQQ"
"""Stands for the words of a turn in a chat template."""


def check_synthesis(train: Train, data: StageData, load_tokenizer: Callable[[], Any], where: str) -> None:
    """Raise an error if a stage's start model cannot write its examples."""
    if not make_strategies(train).synthesis():
        return
    if data.form not in _FORMS:
        raise RecipeError(
            f"{where}: replay's `synthesise` writes texts and conversations, and the stage has {data.form}. Leave "
            "`synthesise` out, or give the stage another form."
        )
    tokenizer = load_tokenizer()
    if talks(data):
        _frame(tokenizer)
    elif _first_token(tokenizer) is None:
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has neither `bos_token` nor `eos_token`, with which a document "
            "that replay synthesises would begin. Set `train.eos_token`."
        )


def with_synthesis(job: TrainJob, folder: Path, ranks: Ranks) -> TrainJob:
    """Return a job with the documents that its start model writes.

    All ranks call this together. A killed call continues.

    Args:
        job: the training.
        folder: where the documents are kept.
        ranks: the processes of the job.

    Raises:
        DataError: none of the documents can be used.
    """
    wanted = job.make(job.train).synthesis()
    if wanted is None:
        return job
    ranks.first(_prepare, folder, job, wanted)
    file = folder / "documents.jsonl"
    if not ranks.first(file.is_file):
        if ranks.is_main:
            LOG.info("replay: the start model writes %d documents", wanted.count)
        missing = ranks.first(_missing, folder, wanted.count)
        ranks.all(write_parts, job, folder, missing[ranks.rank :: ranks.size])
        ranks.first(_join, folder)
    written = ranks.all(_usable, job, file)
    if ranks.is_main:
        _tell(written)
    return replace(job, written=written)


def synthesis_record(job: TrainJob) -> dict[str, Any]:
    """Return the counts, the digest and three examples of written documents."""
    if not job.written:
        return {}
    counts = job.written.sources[0]
    return {"synthesised": {
        "written": counts.train + sum(counts.left_out.values()), "used": counts.train,
        "left_out": dict(counts.left_out), "sha256": rows_sha256(job.written.train),
        "examples": _examples(job.written),
    }}  # fmt: skip


# Files


def _prepare(folder: Path, job: TrainJob, wanted: Synthesis) -> None:
    """Make the folder; remove documents of other settings."""
    facts = {"start_sha256": expert_sha256(job.start), "seed": job.seed, "stage": job.stage, "form": job.data.form,
             "talks": talks(job.data), **asdict(wanted)}  # fmt: skip
    text, file = json.dumps(facts, sort_keys=True), folder / "settings.json"
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):
        remove(folder)
        make_folder(folder / "parts")
        write_atomically(file, text)


def _part_file(folder: Path, number: int) -> Path:
    return folder / "parts" / f"{number:06d}.jsonl"


def _missing(folder: Path, count: int) -> list[tuple[int, int]]:
    """Return the numbers and sizes of parts to write."""
    sizes = [min(PART, count - start) for start in range(0, count, PART)]
    return [(number, size) for number, size in enumerate(sizes) if not _part_file(folder, number).is_file()]


def _join(folder: Path) -> None:
    """Put the parts into one file; remove them."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((folder / "parts").glob("*.jsonl"))]
    write_atomically(folder / "documents.jsonl", "".join(texts))
    remove(folder / "parts")


def write_parts(job: TrainJob, folder: Path, parts: list[tuple[int, int]]) -> None:
    """Write parts of the documents, given by number and size."""
    if not parts:
        return
    wanted = job.make(job.train).synthesis()
    assert wanted
    writer = _Writer.open(job, wanted)
    for number, size in parts:
        rows = writer.write(size, _seed(job, number))
        write_atomically(_part_file(folder, number), "".join(json.dumps(row) + "\n" for row in rows))
    del writer
    free_memory()


def _seed(job: TrainJob, part: int) -> int:
    words = f"{job.seed} {job.stage} {part}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")


# Use


def _usable(job: TrainJob, file: Path) -> StageData:
    """Return the documents as data in the stage's form.

    Raises DataError if none is left.
    """
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kept, left_out = _distinct(rows)
    spec = DataSource(path=SOURCE_NAME, license="as the model's output")
    written = None
    if kept:
        limits = trainer_limits(job.train, job.base, trust_remote_code=job.trust_remote_code)
        fit = fit_rows(Rows(SOURCE_NAME, datasets.Dataset.from_list(kept)), spec, limits)
        fit = replace(fit, left_out=fit.left_out + left_out)
        written = stage_data_of(fit, spec, seed=job.seed, limits=limits) if len(fit.rows) else None
    written = without_heldouts(in_form(written, job.data, SOURCE_NAME), (job.data, *job.others)) if written else None
    if written is None or not len(written.train):
        raise DataError(
            f"None of the {len(rows)} documents that {job.start} wrote for replay can be used ({_words(left_out)}). "
            "Raise `synthesise`, or leave it out."
        )
    return written


def _distinct(rows: list[Row]) -> tuple[list[Row], Counter[str]]:
    """Return rows without blank and repeated ones, and counts of these."""
    kept: dict[str, Row] = {}
    left_out = Counter[str]()
    for row in rows:
        words = json.dumps(row, sort_keys=True)
        if not all(text.strip() for text in _texts(row)):
            left_out["are empty"] += 1
        elif words in kept:
            left_out["repeat another"] += 1
        else:
            kept[words] = row
    return list(kept.values()), left_out


def _texts(row: Row) -> Iterator[str]:
    for value in row.values():
        yield from [value] if isinstance(value, str) else (turn["content"] for turn in value)


def _tell(written: StageData) -> None:
    counts = written.sources[0]
    others = f" ({_words(counts.left_out)})" if counts.left_out else ""
    total = counts.train + sum(counts.left_out.values())
    LOG.info("replay: %d of %d written documents are used%s", counts.train, total, others)
    for text in _examples(written):
        LOG.info("replay wrote: %s", " ".join(text.split()))


def _words(left_out: Any) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items()) or "all were too short or too long"


def _examples(written: StageData) -> list[str]:
    first = written.train.select(range(min(_EXAMPLES, len(written.train))))
    return ["\n".join(text for text in _texts(dict(row)) if text)[:_SHOWN] for row in first]  # pyright: ignore


def talks(data: StageData) -> bool:
    """Say if a stage's examples are conversations."""
    return data.form == "messages" or (
        data.form == "prompt_completion" and not isinstance(data.train.features["prompt"], datasets.Value)
    )


# Writing


@dataclass(frozen=True)
class _Writer:
    """A stage's start model, ready to write."""

    model: Any
    tokenizer: Any
    wanted: Synthesis
    form: Form
    talks: bool

    @classmethod
    def open(cls, job: TrainJob, wanted: Synthesis) -> _Writer:
        dtype = torch.bfloat16 if bf16_pays(Weights(job.base).numel()) else torch.float32
        model = load_model(job.start, job.base, dtype=dtype, trust_remote_code=job.trust_remote_code)
        tokenizer = stage_tokenizer(job.base, job.train, trust_remote_code=job.trust_remote_code)
        model = model.to(PartialState().device).eval()
        return cls(model, tokenizer, wanted, job.data.form, talks(job.data))

    def write(self, count: int, seed: int) -> list[Row]:
        """Return new documents, determined by model, number and seed."""
        device = self.model.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            torch.manual_seed(seed)
            return self._talk(count) if self.talks else self._texts(count)

    def _texts(self, count: int) -> list[Row]:
        return [{"text": text} for text in self._sampled([[_first_token(self.tokenizer)]] * count, "")]

    def _talk(self, count: int) -> list[Row]:
        start, end = _frame(self.tokenizer)
        asked = self._sampled([self._ids(start)] * count, end)
        prompts = [_rendered(self.tokenizer, text, answer=True) for text in asked]
        answers = self._sampled([self._ids(prompt) for prompt in prompts], end)
        pairs = [({"role": "user", "content": q}, {"role": "assistant", "content": a})
                 for q, a in zip(asked, answers, strict=True)]  # fmt: skip
        if self.form == "messages":
            return [{"messages": list(pair)} for pair in pairs]
        return [{"prompt": [question], "completion": [answer]} for question, answer in pairs]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @torch.no_grad()
    def _sampled(self, starts: list[list[int]], end: str) -> list[str]:
        """Return continuations up to an end token, or the text `end`."""
        ends, longest = self._ends(end), max(map(len, starts))
        pad = ends[0]
        ids = torch.tensor([[pad] * (longest - len(start)) + start for start in starts])
        mask = torch.tensor([[0] * (longest - len(start)) + [1] * len(start) for start in starts])
        config = GenerationConfig(
            do_sample=True, temperature=self.wanted.temperature, top_k=0, top_p=1.0, eos_token_id=ends,
            pad_token_id=pad, max_new_tokens=self.wanted.tokens,
        )  # fmt: skip
        self.model.generation_config = config
        device = self.model.device
        found = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return [self._decoded(row, ends, end) for row in found[:, longest:].tolist()]

    def _ends(self, end: str) -> list[int]:
        """Return the ids of the end tokens of text and turn."""
        turn = [i for i in self._ids(end)[:1] if i in self.tokenizer.added_tokens_decoder]
        own = [i for i in (self.tokenizer.eos_token_id, _first_token(self.tokenizer)) if i is not None]
        return list(dict.fromkeys([*own[:1], *turn]))

    def _decoded(self, ids: list[int], ends: list[int], end: str) -> str:
        stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode(ids[:stop], skip_special_tokens=True)
        return (text.partition(end)[0] if end else text).strip()


def _first_token(tokenizer: Any) -> Any:
    """Return the token with which a document begins, or None."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _rendered(tokenizer: Any, question: str, *, answer: bool) -> str:
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)


def _frame(tokenizer: Any) -> tuple[str, str]:
    """Return what a chat template puts before and after a user's words.

    Raises ModelError for a template that changes them.
    """
    require_chat_template(tokenizer)
    start, mark, end = _rendered(tokenizer, _MARK, answer=False).partition(_MARK)
    if not mark:
        raise ModelError(
            f"The chat template of {tokenizer.name_or_path} does not show a user's words unchanged, so replay cannot "
            "synthesise conversations. Leave `synthesise` out."
        )
    return start, end.strip()
