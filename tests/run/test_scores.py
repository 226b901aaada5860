"""score.parquet: what comes back is what was written, bytes repeat, a crash or damage is told."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_contmerge.errors import RunError
from hf_contmerge.run.places import Place
from hf_contmerge.run.scores import Sample, TaskScore, load_scores, scored_tasks, write_scores


def score(gains: tuple[float, ...], weights: tuple[float, ...] | None = None, **kept: Any) -> TaskScore:
    weights = weights or (1.0,) * len(gains)
    sample = Sample(gains, weights)
    details = {"documents_sha256": "x", "metrics": {"acc": 0.1}}
    return TaskScore(
        "accuracy", "acc", sample.utility, sample.utility, sample.stderr(), gains, weights, details, **kept
    )


SCORES = {
    "choice": score(
        (1.0, 0.0, 1.0),
        documents=("d1", "d2", "d3"),
        texts=("Ist 1 = 1?", "", "naïve — 漢字\n"),
        answers=("a", "", "c"),
    ),
    "texts": score((-10.1, -0.1 + 1e-17), (3.0, 2.0), documents=("e1", "e2"), texts=("one", "two")),
    "bare": score((0.1, 1 / 3, -1e-300)),
}


def written(folder: Path, scores: Mapping[str, TaskScore], *, texts: bool = True) -> Place:
    place = Place(folder)
    place.finish("score", {"tasks": write_scores(place, scores, texts=texts)})
    return place


def test_scores_come_back_exactly(tmp_path: Path) -> None:
    place = written(tmp_path / "place", SCORES)
    assert load_scores(place) == SCORES
    assert list(load_scores(place)) == list(scored_tasks(place)) == list(SCORES)
    assert load_scores(Place(tmp_path / "elsewhere")) == {}
    assert scored_tasks(Place(tmp_path / "elsewhere")) == ()


def test_texts_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    found = load_scores(written(tmp_path, SCORES, texts=False))
    assert all(s.texts == () for s in found.values())
    assert found["choice"].answers == SCORES["choice"].answers
    assert found["choice"].gains == SCORES["choice"].gains


def test_record_holds_no_documents(tmp_path: Path) -> None:
    tasks = written(tmp_path, SCORES).record("score")["tasks"]
    assert tasks["choice"].keys() == {
        "block", "metric", "value", "utility", "stderr", "details", "documents_digest",
    }  # fmt: skip


def test_bytes_repeat(tmp_path: Path) -> None:
    first, second = (written(tmp_path / name, SCORES).folder / "score.parquet" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_file_is_small(tmp_path: Path) -> None:
    """Ten thousand questions at the most that is kept of each."""
    many = score((1.0, 0.0) * 5000, texts=("x" * 300,) * 10000, documents=tuple(f"{i:064x}" for i in range(10000)))
    assert (written(tmp_path, {"many": many}).folder / "score.parquet").stat().st_size < 400_000


def test_killed_between_the_file_and_the_record(tmp_path: Path) -> None:
    """What the record tells is read, whatever the file has beyond it."""
    place = written(tmp_path, {"texts": SCORES["texts"]})
    write_scores(place, SCORES, texts=True)
    assert load_scores(place) == {"texts": SCORES["texts"]}


@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "of other tasks"])
def test_damaged_file(damage: str, tmp_path: Path) -> None:
    place = written(tmp_path, SCORES)
    path = tmp_path / "score.parquet"
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "of other tasks":
        write_scores(place, {"texts": SCORES["texts"]})
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.raises(RunError) as caught:
        load_scores(place)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("or score again with `contmerge redo RUN score`, then `contmerge run`.")


def test_undo_removes_the_file(tmp_path: Path) -> None:
    place = written(tmp_path, SCORES)
    place.undo("score")
    assert list(tmp_path.iterdir()) == []
