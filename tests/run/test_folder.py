"""A run is a folder: what counts as done, what a crash leaves, what may change, and who may write."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hf_contmerge.errors import ResourceError, RunError
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace, MergePlace, Place
from hf_contmerge.run.recipe.phases import Phase
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe
from hf_contmerge.runtime.files import FolderLock

Data = dict[str, Any]

LAW, CODE = {"name": "law", "dataset": "law.jsonl"}, {"name": "code", "dataset": "code.jsonl", "tasks": ["quiz"]}
TEST = {"name": "exam", "kind": "exact_match", "dataset": {"path": "exam.jsonl", "split": "test"}}
MAGMAX, EMA = {"rule": "magmax"}, {"rule": "ema", "parameters": {"beta": 0.9}}


def recipe(**changes: Any) -> Recipe:
    data = {
        "name": "two",
        "base_model": "owner/base",
        "stages": [LAW, CODE],
        "train": {"max_steps": 5},
        "merge": [MAGMAX, EMA],
        "evaluate": {"general_tasks": ["hellaswag"]},
    }  # fmt: skip
    return parse_recipe(data | changes)


def do(place: Place, phase: Phase, **record: Any) -> None:
    """Do a phase: its outputs first, its record last."""
    for name in place.outputs(phase):
        if not name.startswith(".") and "." not in name and name != "checkpoints":
            (place.scratch(name) / "weights").write_text(phase)
            place.publish(name)
    place.finish(phase, record)


def carry_out(run: Run) -> None:
    """Do all phases in the order of the loop: magmax on `previous` experts, ema on experts of its own."""
    do(run.base, "score")
    for t in run.stage_numbers():
        kinds = ("previous", "merged-ema") if t > 1 else ("base",)
        for kind in kinds:
            do(run.expert(t, kind), "train")
        for entry in run.recipe.merge:
            do(run.merged(t, entry), "merge")
            if t > 1:
                run.merged(t - 1, entry).prune()
        for place in [*(run.expert(t, k) for k in kinds), *(run.merged(t, e) for e in run.recipe.merge)]:
            do(place, "score")
    do(run.report, "report", recipe_sha256=run.recipe_sha256())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has just been started."""
    return Run.open(recipe(), tmp_path / "run")


@pytest.fixture
def done(run: Run) -> Run:
    """A run of which everything is done."""
    carry_out(run)
    return run


def records(run: Run) -> set[str]:
    """Return the phases that are done, as `<folder>/<phase>`."""
    found = (p.relative_to(run.folder / "stages") for p in (run.folder / "stages").rglob("*.json"))
    return {str(p.with_suffix("")) for p in found}


# A phase is done when its record exists


def test_outputs_without_a_record_are_not_done(run: Run) -> None:
    place = run.expert(1, "base")
    (place.scratch("expert") / "weights").write_text("half")
    assert not place.is_done("train")
    place.publish("expert")
    assert not place.is_done("train")
    place.finish("train", {"seed": 7})
    assert place.is_done("train")
    record = place.record("train")
    assert record["seed"] == 7
    assert re.match(r"\d{4}-\d\d-\d\dT.*\+00:00$", record["finished"])
    assert record["versions"]["torch"]
    assert {p.name for p in place.folder.iterdir()} == {"expert", "train.json"}


def test_scratch_of_a_crashed_phase_is_emptied(run: Run) -> None:
    place = run.merged(1, run.recipe.merge[0])
    (place.scratch("merged") / "weights").write_text("of the crashed phase")
    assert list(place.scratch("merged").iterdir()) == []


def test_publish_replaces_what_a_crash_left_without_a_record(run: Run) -> None:
    place = run.merged(1, run.recipe.merge[0])
    for text in ("old", "new"):
        (place.scratch("merged") / text).write_text(text)
        place.publish("merged")
    assert [p.name for p in place.model.iterdir()] == ["new"]
    assert not (place.folder / ".merged").exists()


DIE_BEFORE_RENAME = """
import os, signal, sys
from pathlib import Path
from hf_contmerge.run.places import Place

def hook(event, args):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
Place(Path(sys.argv[1])).finish("score", {"turn": "second"})
"""


@pytest.mark.parametrize("existed", [False, True])
def test_a_record_is_there_whole_or_not_at_all(run: Run, existed: bool) -> None:
    place = run.base
    if existed:
        place.finish("score", {"turn": "first"})
    place.folder.mkdir(parents=True, exist_ok=True)
    killed = subprocess.run([sys.executable, "-c", DIE_BEFORE_RENAME, str(place.folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(place.folder.glob(".score.json.*"))) == 1  # it had been written, and was not yet put in place
    assert place.is_done("score") == existed
    if existed:
        assert place.record("score")["turn"] == "first"
    place.finish("score", {"turn": "third"})
    assert place.record("score")["turn"] == "third"


def test_a_record_that_cannot_be_written_leaves_the_old_one(run: Run) -> None:
    run.base.finish("score", {"turn": "first"})
    with pytest.raises(TypeError):
        run.base.finish("score", {"turn": object()})
    assert run.base.record("score")["turn"] == "first"


def test_undo_forgets_the_phase_and_removes_its_outputs_only(done: Run) -> None:
    place = done.expert(1, "base")
    place.undo("train")
    assert {p.name for p in place.folder.iterdir()} == {"score.json", "validation"}
    place.undo("train")  # again, as after a crash
    place.undo("score")
    assert list(place.folder.iterdir()) == []


# Places


def test_where_things_lie(run: Run) -> None:
    stages, magmax = run.folder / "stages", run.recipe.merge[0]
    assert run.base.folder == stages / "00-base"
    assert run.expert(2, "previous").model == stages / "02-code/experts/previous/expert"
    assert run.expert(1, "previous") == run.expert(1, "base") == ExpertPlace(stages / "01-law/experts/base", "base")
    assert run.merged(2, magmax) == MergePlace(stages / "02-code/merges/magmax", magmax, 2)
    assert run.merged(2, magmax).mergekit_recipe == stages / "02-code/merges/magmax/merge.yml"


def test_a_given_expert_stays_where_it_is(run: Run, tmp_path: Path) -> None:
    run.expert(1, "base").finish("train", {"given": str(tmp_path / "given")})
    assert run.expert(1, "base").model == tmp_path / "given"


def test_links_out_of_a_run_are_refused_but_the_one_of_wandb(run: Run, tmp_path: Path) -> None:
    """W&B links its log in its own cache; the cache may be gone."""
    own = run.folder / "trackers/wandb/offline-run-1-a/logs"
    own.mkdir(parents=True)
    (own / "debug-core.log").symlink_to(tmp_path / "cache/wandb/logs/core-debug-1.log")
    assert Run.load(run.folder).recipe == run.recipe
    (own / "debug.log").symlink_to(tmp_path / "other.log")
    with pytest.raises(RunError, match=r"debug.log links to .*other.log, outside"):
        Run.load(run.folder)


def test_the_link_to_the_base_can_be_moved(run: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run.link_base(tmp_path / name)
        assert run.base_model.resolve() == tmp_path / name
    assert (tmp_path / "one").exists()


def test_places_and_expert_kinds_are_what_is_on_disk(run: Run, tmp_path: Path) -> None:
    assert [p for _, p in run.places()] == [run.base]
    assert run.expert_kinds() == ("base",)
    carry_out(run)
    magmax, ema = run.recipe.merge
    assert list(run.places()) == [
        (0, run.base),
        (1, run.expert(1, "base")), (1, run.merged(1, magmax)), (1, run.merged(1, ema)),
        (2, run.expert(2, "merged-ema")), (2, run.expert(2, "previous")),
        (2, run.merged(2, magmax)), (2, run.merged(2, ema)),
    ]  # fmt: skip
    assert run.expert_kinds() == ("merged-ema", "previous")


# Start and resume


def test_a_run_keeps_its_recipe_and_is_loaded_with_it(run: Run) -> None:
    assert load_recipe(run.folder / "recipe.yml") == run.recipe
    assert Run.load(run.folder) == run


def test_a_first_start_that_was_killed_is_started_again(tmp_path: Path) -> None:
    (tmp_path / ".recipe.yml.123").write_text("name: tw")
    (tmp_path / ".lock").write_text("")
    Run.open(recipe(), tmp_path)
    assert Run.load(tmp_path).recipe == recipe()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"is not empty and holds no run \(no recipe.yml\). Name another with --run."):
        Run.open(recipe(), tmp_path)
    with pytest.raises(RunError, match=r"holds no run \(no recipe.yml\). Give the folder that `contmerge run` wrote"):
        Run.load(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_folder_of_a_study_is_told_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "study.yml").write_text("name: s")
    with pytest.raises(RunError, match=r"is the folder of a study\. Name one of its runs, which are in .*runs;"):
        Run.load(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as error:
        Run.open(recipe(), tmp_path / "file" / "run")
    assert str(error.value) == (
        f"Cannot write the run folder {tmp_path / 'file' / 'run'}: Not a directory. Name another with --run."
    )


def test_complete_is_for_this_very_recipe(run: Run) -> None:
    assert not run.is_complete()
    carry_out(run)
    assert run.is_complete()
    assert Run.load(run.folder).is_complete()
    assert not Run(run.folder, recipe(seed=1)).is_complete()
    assert not Run(run.folder / "elsewhere", run.recipe).is_complete()


# A changed recipe


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": [LAW, CODE, {"name": "chat", "expert": "owner/chat"}]},
        {"merge": ["opcm", MAGMAX, EMA]},
        {"merge": [EMA, MAGMAX]},
        {"evaluate": {"general_tasks": ["winogrande", "hellaswag"]}},
        {"stages": [LAW | {"tasks": ["bar_exam"]}, CODE]},
        {"name": "three", "output": "elsewhere", "publish": {"repo_id": "me/two"}},
        {"evaluate": {"general_tasks": ["hellaswag"], "matrix": "full"}},
    ],
    ids=lambda c: "+".join(c),
)
def test_what_is_added_or_used_by_no_phase_may_change(done: Run, changes: Data) -> None:
    again = Run.open(recipe(**changes), done.folder)
    assert Run.load(done.folder).recipe == again.recipe == recipe(**changes)
    assert not again.is_complete()
    assert records(again) == records(done)


@pytest.mark.parametrize(
    ("changes", "line", "command"),
    [
        (
            {"train": {"max_steps": 6}},
            "  train.max_steps: 5 -> 6   used by train of 01-law/experts/base, 02-code/experts/merged-ema, "
            "02-code/experts/previous",
            "train",
        ),
        ({"train": {}}, "  train.max_steps: 5 -> '(not set)'   used by train of 01-law", "train"),
        (
            {"base_model": "owner/other"},
            "  base_model: 'owner/base' -> 'owner/other'   used by score of 00-base; train of 01-law/experts/base, ",
            "train",
        ),
        (
            {"stages": [LAW, CODE | {"dataset": "rust.jsonl"}]},
            "  stages.2.dataset.path: 'code.jsonl' -> 'rust.jsonl'   used by score of 00-base; train of "
            "02-code/experts/merged-ema, 02-code/experts/previous",
            "train",
        ),
        ({"stages": [CODE, LAW]}, "  stages.1.name: 'law' -> 'code'   used by train of 01-law/experts/base, ", "train"),
        ({"stages": [LAW]}, "  stages.2.name: 'code' -> '(not set)'   used by train of 02-code", "train"),
        (
            {"merge": [MAGMAX, {"rule": "ema", "parameters": {"beta": 0.8}}]},
            "  merge.ema.parameters.beta: 0.9 -> 0.8   used by merge of 01-law/merges/ema, 02-code/merges/ema",
            "merge",
        ),
        ({"merge": [MAGMAX]}, "  merge.ema.rule: 'ema' -> '(not set)'   used by merge of 01-law/merges/ema", "merge"),
        (
            {"evaluate": {"general_tasks": ["hellaswag"], "limit": 9}},
            "  evaluate.limit: None -> 9   used by score of 00-base, 01-law/experts/base, 01-law/merges/magmax",
            "score",
        ),
        (
            {"stages": [LAW, CODE | {"tasks": [{"name": "quiz", "num_fewshot": 5}]}]},
            "  stages.2.tasks.quiz.num_fewshot: None -> 5   used by score of 00-base, 02-code/experts/merged-ema, ",
            "score",
        ),
        (
            {"train": {"max_steps": 6}, "evaluate": {"limit": 9}},
            "  evaluate.limit: None -> 9   used by score of ",
            "train",
        ),
    ],
    ids=lambda c: "+".join(c) if isinstance(c, dict) else "",
)
def test_what_a_done_phase_has_used_may_not_change(done: Run, changes: Data, line: str, command: str) -> None:
    with pytest.raises(RunError) as error:
        Run.open(recipe(**changes), done.folder)
    told = str(error.value)
    assert told.startswith(f"{done.folder} was made by another recipe:\n")
    assert f"\n{line}" in told
    assert f"undo these phases with `contmerge redo {done.folder} {command}` and run again" in told
    assert Run.load(done.folder).recipe == done.recipe
    done.redo(command)
    assert Run.open(recipe(**changes), done.folder).recipe == recipe(**changes), "the command that was told must help"


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"max_steps": 6}},
        {"stages": [LAW, {"name": "chat", "dataset": "chat.jsonl"}]},
        {"stages": [{"name": "chat", "dataset": "chat.jsonl"}, LAW, CODE]},
        {"stages": [LAW]},
        {"merge": ["opcm"]},
    ],
    ids=lambda c: "+".join(c),
)
def test_what_no_phase_has_used_yet_may_change(run: Run, changes: Data) -> None:
    do(run.base, "score")
    assert Run.open(recipe(**changes), run.folder).recipe == recipe(**changes)


@pytest.mark.parametrize(
    "changes", [{"base_model": "owner/other"}, {"stages": [LAW, CODE | {"dataset": "rust.jsonl"}]}], ids=str
)
def test_row_0_holds_the_base_model_and_the_texts_that_it_was_measured_on(run: Run, changes: Data) -> None:
    do(run.base, "score")
    with pytest.raises(RunError, match=rf"used by score of 00-base\n.*`contmerge redo {run.folder} score`"):
        Run.open(recipe(**changes), run.folder)


def test_a_later_stage_may_change_while_an_earlier_one_is_done(run: Run) -> None:
    do(run.expert(1, "base"), "train")
    Run.open(recipe(stages=[LAW, CODE | {"dataset": "rust.jsonl"}]), run.folder)
    with pytest.raises(RunError, match=r"stages\.1\.dataset\.path"):
        Run.open(recipe(stages=[LAW | {"dataset": "tax.jsonl"}, CODE]), run.folder)


def mixed(*shares: float) -> Data:
    return {"name": "code", "dataset": {"mix": [{"path": f"{i}.jsonl", "share": s} for i, s in enumerate(shares, 1)]}}


@pytest.mark.parametrize(
    ("new", "lines"),
    [
        (mixed(0.7, 0.3), ["dataset.mix.1.share: 0.6 -> 0.7", "dataset.mix.2.share: 0.4 -> 0.3"]),
        (
            mixed(0.6, 0.3, 0.1),
            [
                "dataset.mix.2.share: 0.4 -> 0.3", "dataset.mix.3.path: '(not set)' -> '3.jsonl'",
                "dataset.mix.3.split: '(not set)' -> 'train'", "dataset.mix.3.streaming: '(not set)' -> False",
                "dataset.mix.3.share: '(not set)' -> 0.1",
            ],
        ),
        (mixed(0.6, 0.4) | {"tasks": [TEST]}, []),
    ],
    ids=["shares", "a third", "a task"],
)  # fmt: skip
def test_a_mix_is_compared_part_by_part(new: Data, lines: list[str], run: Run) -> None:
    """What was trained on it must be trained again; the first stage need not."""
    old = Run.open(recipe(stages=[LAW, mixed(0.6, 0.4)]), run.folder)
    do(old.expert(1, "base"), "train")
    do(old.expert(2, "previous"), "train")
    again = recipe(stages=[LAW, new])
    if not lines:
        Run.open(again, run.folder)
        return
    with pytest.raises(RunError) as error:
        Run.open(again, run.folder)
    told = [line for line in str(error.value).splitlines() if line.startswith("  ")]
    assert told == [f"  stages.2.{line}   used by train of 02-code/experts/previous" for line in lines]


def test_another_split_of_a_task_is_scored_again_and_nothing_trained(run: Run) -> None:
    old = Run.open(recipe(stages=[LAW | {"tasks": [TEST]}, CODE]), run.folder)
    do(old.expert(1, "base"), "train")
    other = TEST | {"dataset": {"path": "exam.jsonl", "split": "validation"}}
    again = recipe(stages=[LAW | {"tasks": [other]}, CODE])
    Run.open(again, run.folder)
    do(old.expert(1, "base"), "score")
    with pytest.raises(
        RunError, match=r"stages\.1\.tasks\.exam\.dataset\.split: 'validation' -> 'test' +used by score"
    ):
        Run.open(recipe(stages=[LAW | {"tasks": [TEST]}, CODE]), run.folder)


# redo

TRAINED = {"01-law/experts/base/train", "02-code/experts/merged-ema/train", "02-code/experts/previous/train"}
MERGED = {f"{s}/merges/{m}/merge" for s in ("01-law", "02-code") for m in ("magmax", "ema")}
SCORED = {"00-base/score"} | {f"{place.rpartition('/')[0]}/score" for place in TRAINED | MERGED}


def test_all_is_recorded(done: Run) -> None:
    assert records(done) == TRAINED | MERGED | SCORED


def of_ema_2(phase: str) -> set[str]:
    return {f"02-code/experts/merged-ema/{phase}"}


@pytest.mark.parametrize(
    ("phase", "kept"),
    [
        ("train", set()),
        ("merge", TRAINED - of_ema_2("train") | {p for p in SCORED if "/merges/" not in p} - of_ema_2("score")),
        ("score", TRAINED | MERGED),
        ("report", TRAINED | MERGED | SCORED),
    ],
)
def test_redo_drops_a_phase_and_what_follows_from_it(done: Run, phase: str, kept: set[str]) -> None:
    before = records(done)
    undone = done.redo(phase)
    assert records(done) == kept
    assert not done.is_complete()
    assert not (done.folder / "report").exists()
    told = {f"{p.rpartition('/')[2]} of stages/{p.rpartition('/')[0]}" for p in before - kept}
    assert set(undone) == told | {"the report"}
    for name, held in (("expert", "train"), ("merged", "merge")):
        outputs = {str(p.parent.relative_to(done.folder / "stages")) for p in done.folder.rglob(name)}
        assert outputs == {p.removesuffix(f"/{held}") for p in kept if p.endswith(f"/{held}")}
    assert done.redo(phase) == []


def test_redo_of_a_stage_keeps_the_earlier_ones(done: Run) -> None:
    done.redo("score", stage="code")
    assert records(done) == TRAINED | MERGED | {p for p in SCORED if not p.startswith("02-code")}


def test_redo_goes_backwards_so_that_a_crash_leaves_no_gap(done: Run) -> None:
    before = records(done)
    stuck = done.merged(2, done.recipe.merge[1]).folder / "merge.json"  # of the last place that the loop came to
    stuck.unlink()
    stuck.mkdir()  # which cannot be unlinked
    with pytest.raises(OSError, match=r"merge\.json"):
        done.redo("train")
    assert records(done) == before - {"02-code/merges/ema/score"}
    stuck.rmdir()
    stages = [re.sub(r"\D*(\d+).*", r"\1", line) for line in done.redo("train")]
    assert stages == sorted(stages)  # told in the order of the loop


def test_redo_from_a_stage_whose_state_was_pruned_is_refused(done: Run) -> None:
    for phase in ("train", "merge"):
        before = records(done)
        with pytest.raises(RunError) as error:
            done.redo(phase, stage="code")
        assert str(error.value) == (
            "The running state after law was pruned for magmax, ema when code was merged. "
            f"Use `contmerge redo {done.folder} {phase}` to redo all stages."
        )
        assert records(done) == before
        assert done.is_complete()


def test_redo_from_a_stage_whose_state_is_still_there(done: Run) -> None:
    for entry in done.recipe.merge:
        done.merged(1, entry).running.mkdir()
    done.redo("merge", stage="code")
    experts = {p for p in TRAINED | SCORED if "/merges/" not in p}
    assert records(done) == experts | {p for p in MERGED | SCORED if p.startswith("01-law")}


def test_a_merge_entry_that_has_never_run_is_in_nobody_s_way(done: Run) -> None:
    for entry in done.recipe.merge:
        done.merged(1, entry).running.mkdir()
    wider = Run.open(recipe(merge=[MAGMAX, EMA, "opcm"]), done.folder)
    wider.redo("merge", stage="code")
    assert not wider.merged(2, wider.recipe.merge[0]).is_done("merge")


def test_redo_of_what_is_not_there_names_what_is(done: Run) -> None:
    with pytest.raises(
        RunError, match=r"Unknown phase 'merg'. Did you mean 'merge'\? Known: merge, report, score, train"
    ):
        done.redo("merg")
    with pytest.raises(RunError, match=r"Unknown stage 'cod'. Did you mean 'code'\? Known: code, law"):
        done.redo("merge", stage="cod")
    assert done.is_complete()


# The lock

HOLD = """
import sys
from hf_contmerge.runtime.files import FolderLock
from hf_contmerge.run.folder import Run
with FolderLock(Run.load(sys.argv[1]).folder):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_kept_out_until_the_first_is_dead(run: Run) -> None:
    with holder(run) as process:
        with (
            pytest.raises(RunError, match=rf"{run.folder} is in use by another process. Wait for it, or name"),
            FolderLock(run.folder),
        ):
            pass
        process.kill()  # SIGKILL: it has no chance to let go
        assert process.wait() == -signal.SIGKILL
        with FolderLock(run.folder):
            pass


def test_a_lock_is_let_go_at_the_end_even_by_an_error(run: Run) -> None:
    with pytest.raises(KeyError), FolderLock(run.folder):
        raise KeyError
    with FolderLock(run.folder):
        pass
    with holder(run):
        pass


def test_records_are_plain_json(done: Run) -> None:
    for path in done.folder.rglob("*.json"):
        assert {"finished", "versions"} <= json.loads(path.read_text()).keys()
