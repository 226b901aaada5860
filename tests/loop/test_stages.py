"""One phase at one place: done work is not repeated, scores measured in another way do not count."""

import errno
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import PartialState
from toys.models import perturbed, write_jsonl

from hf_contmerge.errors import FullDiskError, ResourceError, RunError
from hf_contmerge.loop._record import Recorder
from hf_contmerge.loop.stages import Measuring, measure_at, train_at
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.run.places import ExpertPlace, Place
from hf_contmerge.run.recipe.parts import Dataset, Evaluate, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.run.scores import load_scores
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.scoring.files import write_task
from hf_contmerge.scoring.keys import SCORES_VERSION
from hf_contmerge.training.data import load_stage_data
from hf_contmerge.training.job import TrainJob

TEXTS = [{"text": f"the quick brown fox {i} sings songs of law and medicine"} for i in range(12)]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path, PartialState(cpu=True), Crew())


def test_a_record_that_no_longer_fits_names_the_missing_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for any other file of the phase."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Place, "finish", full)
    recorder = Recorder(tmp_path, PartialState(cpu=True), Crew(), need=lambda: 3 * 2**20)
    with pytest.raises(ResourceError) as error, recorder.phase(Place(tmp_path / "stages/01-a"), "merge"):
        pass
    assert re.fullmatch(
        rf"merge 01-a: Cannot write {tmp_path}/stages/01-a: the disk is full\. Free some space, then rerun the "
        rf"command: finished phases are kept\. The unfinished phases need about 3\.0 MiB in {tmp_path}; "
        r".* of its disk are free\.",
        str(error.value),
    )


def test_a_merge_without_room_names_what_the_other_phases_need(tmp_path: Path) -> None:
    """It says itself what it writes, before it writes."""
    recorder = Recorder(tmp_path, PartialState(cpu=True), Crew(), need=lambda: 3 * 2**20)
    with pytest.raises(FullDiskError) as error, recorder.phase(Place(tmp_path / "stages/01-a"), "merge"):
        raise FullDiskError("Merging writes 1.0 MiB to a disk. Free some space, then rerun the command.")
    assert str(error.value).startswith(
        "merge 01-a: Merging writes 1.0 MiB to a disk. Free some space, then rerun the command. The unfinished phases "
        f"need about 3.0 MiB in {tmp_path}; "
    )


@pytest.fixture
def measuring(base_folder: Path, tmp_path: Path, recorder: Recorder) -> tuple[Measuring, list[Task]]:
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    tasks = [
        Task(name=name, kind="perplexity", dataset=Dataset(path=str(tmp_path / "texts.jsonl"))) for name in ("a", "b")
    ]
    for task in tasks:
        write_task(tmp_path / "tasks", task)
    return Measuring(Evaluate(dtype="float32", cache=False), tmp_path / "tasks", base_folder, recorder), tasks


def test_only_missing_tasks_are_measured(
    base_folder: Path, tmp_path: Path, measuring: tuple[Measuring, list[Task]]
) -> None:
    how, tasks = measuring
    place, logged = Place(tmp_path / "place"), []
    for wanted in (tasks[:1], tasks, tasks):
        measure_at(place, base_folder, wanted, how, on_log=lambda have, values: logged.append((have, sorted(values))))
    assert logged == [(0, ["a/word_perplexity"]), (1, ["b/word_perplexity"])]
    assert set(load_scores(place)) == {"a", "b"}
    record = place.record("score")
    assert {"seconds", "peak_memory_bytes", "device", "scored_sha256", "measured_by"} <= set(record)
    assert record["scored_in"] == "float32"


def test_scores_measured_otherwise_are_replaced(
    base_folder: Path, tmp_path: Path, measuring: tuple[Measuring, list[Task]]
) -> None:
    how, tasks = measuring
    place = Place(tmp_path / "place")
    measure_at(place, base_folder, tasks, how)
    assert len(load_scores(place)["a"].gains) == 12
    fewer = replace(how, evaluate=how.evaluate.model_copy(update={"limit": 5}))
    measure_at(place, base_folder, tasks[:1], fewer)
    scores = load_scores(place)
    assert set(scores) == {"a"}
    assert len(scores["a"].gains) == 5


def test_scores_of_earlier_numbers_are_replaced(
    base_folder: Path, tmp_path: Path, measuring: tuple[Measuring, list[Task]], monkeypatch: pytest.MonkeyPatch
) -> None:
    how, tasks = measuring
    place = Place(tmp_path / "place")
    monkeypatch.setattr("hf_contmerge.loop.stages.SCORES_VERSION", SCORES_VERSION - 1)
    measure_at(place, base_folder, tasks, how)
    monkeypatch.undo()
    measure_at(place, base_folder, tasks[:1], how)
    assert set(load_scores(place)) == {"a"}


def test_an_expert_appears_whole_with_its_record(base_folder: Path, tmp_path: Path, recorder: Recorder) -> None:
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    data = load_stage_data(Dataset(path=str(tmp_path / "texts.jsonl"), heldout=0), seed=0)
    fields = {"max_steps": 2, "per_device_train_batch_size": 1, "max_length": 32, "report_to": "none"}
    job = TrainJob(base_folder, base_folder, data, Train(strategy=("full", "replay"), **fields))
    place, points = ExpertPlace(tmp_path / "expert", "base"), []
    record = train_at(place, job, recorder, on_log=lambda step, _: points.append(step), more={"note": 1})
    assert {p.name for p in place.folder.iterdir()} == {"expert", "memory", "train.json"}
    saved = json.loads((place.folder / "train.json").read_text())
    assert (saved["note"], saved["steps"], points[-1]) == (1, 2, 2)
    assert saved["model_sha256"] == record["model_sha256"] == weights_sha256(place.model)
    forgetful = ExpertPlace(tmp_path / "other", "base")
    train_at(forgetful, replace(job, remembers=False), recorder)
    assert not forgetful.memory.exists()
    assert weights_sha256(forgetful.model) == record["model_sha256"]


def test_a_failed_phase_has_no_record(tmp_path: Path, recorder: Recorder) -> None:
    place = Place(tmp_path / "place")
    with pytest.raises(ResourceError, match=r"Out of memory \(score place\)"), recorder.phase(place, "score"):
        raise MemoryError
    assert not place.is_done("score")
    with pytest.raises(ZeroDivisionError), recorder.phase(place, "score"):
        raise ZeroDivisionError
    assert not place.is_done("score")
    with recorder.phase(place, "score") as record:
        record["tasks"] = {}
    assert place.is_done("score")


def test_half_of_a_training_goes_on_with_its_own_data_and_settings_only(
    base_folder: Path, tmp_path: Path, recorder: Recorder
) -> None:
    """A rate that is lowered after a stop would be recorded, and the checkpoint's obeyed."""
    path, other = tmp_path / "texts.jsonl", tmp_path / "other.jsonl"
    write_jsonl(path, TEXTS)
    write_jsonl(other, TEXTS[:-1])
    data, changed = (load_stage_data(Dataset(path=str(p), heldout=0), seed=0) for p in (path, other))
    fields = {"max_steps": 4, "per_device_train_batch_size": 1, "max_length": 32, "save_steps": 1}
    job = TrainJob(base_folder, base_folder, data, Train(**fields))
    place = ExpertPlace(tmp_path / "expert", "base")

    def stop(step: int, _: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_at(place, job, recorder, on_log=stop)
    others = {
        "examples": replace(job, data=changed),
        "general": replace(job, data=replace(data, general=changed)),
        "start": replace(job, start=perturbed(base_folder, tmp_path / "start", seed=1, size=0.01)),
        "seed": replace(job, seed=1),
        "train.learning_rate": replace(job, train=Train(**fields, learning_rate=1e-6)),
    }
    for word, changed_job in others.items():
        with pytest.raises(RunError, match=rf"was begun with other values of {word}, and it cannot go on with these"):
            train_at(place, changed_job, recorder)
    record = train_at(place, replace(job, train=Train(**fields, disable_tqdm=True)), recorder)
    whole = train_at(ExpertPlace(tmp_path / "whole", "base"), job, recorder)
    assert record["model_sha256"] == whole["model_sha256"]
