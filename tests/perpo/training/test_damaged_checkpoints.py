"""A checkpoint that is damaged is noticed, its file is named, and the newest whole checkpoint is offered."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from perpo.evaluation.models import ModelSource
from perpo.model.load import load_model
from perpo.model.settings import LoadSettings
from perpo.storage.checksums import CHECKSUMS
from perpo.storage.identity import IDENTITY, DamagedError
from perpo.training.checkpoints import finished_checkpoints, last_whole_checkpoint
from perpo.training.trainer import PerPOTrainer

from .. import tiny_models, tiny_runs

ADAPTER = "adapter_model.safetensors"


def trainer(folder: Path, **options: object) -> PerPOTrainer:
    saving: dict[str, object] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "reference": "none"}
    return tiny_runs.trainer("llava", folder, **(saving | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder).train()
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(file: Path, place: int = -9) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-64])


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt is missing"),
    (lambda c: flip(c / ADAPTER), f"{ADAPTER} is damaged: its checksum differs"),
    (lambda c: cut(c / ADAPTER), rf"{ADAPTER} is damaged: \d+ bytes"),
    (lambda c: flip(c / "optimizer.pt", 5000), "optimizer.pt is damaged: its checksum differs"),
    (lambda c: flip(c / "trainer_state.json"), "trainer_state.json is damaged"),
    (lambda c: (c / CHECKSUMS).write_text(""), f"{CHECKSUMS} is damaged"),
]


@pytest.mark.parametrize(("harm", "named"), DAMAGE)
@pytest.mark.parametrize("by_path", [False, True])
def test_damage_is_named_and_the_last_whole_checkpoint_offered(
    harm: Callable[[Path], None], named: str, by_path: bool, run: Path
) -> None:
    harm(run / "checkpoint-4")
    way_out = (
        f"{named}.* The newest whole checkpoint is {run}/checkpoint-2: set resume_from_checkpoint={run}/checkpoint-2"
    )
    again = trainer(run, max_steps=5)
    with pytest.raises(DamagedError, match=f"^resume_from_checkpoint: {run}/checkpoint-4/{way_out}$"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-4") if by_path else True)
    assert last_whole_checkpoint(run) == run / "checkpoint-2"


def test_the_offer_can_be_taken(run: Path) -> None:
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert last_whole_checkpoint(run) == run / "checkpoint-4"


@pytest.mark.parametrize(("harm", "named"), DAMAGE[:2] + DAMAGE[3:4])
def test_without_checksums_missing_and_short_files_are_noticed(
    harm: Callable[[Path], None], named: str, run: Path
) -> None:
    """A checkpoint of an older version, or whose run was killed right after it."""
    (run / "checkpoint-4" / CHECKSUMS).unlink()
    harm(run / "checkpoint-4")
    with pytest.raises(DamagedError, match=f"checkpoint-4/{named}.* is {run}/checkpoint-2: set"):
        trainer(run, max_steps=5).train(resume_from_checkpoint=True)


def test_where_none_is_whole_it_says_so(run: Path) -> None:
    for step in (2, 4):
        flip(run / f"checkpoint-{step}" / ADAPTER)
    with pytest.raises(DamagedError, match=f"checkpoint-4/{ADAPTER} is damaged.* No other checkpoint is whole"):
        trainer(run, max_steps=5).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds checkpoints"):  # nor is anything deleted
        trainer(run).train()


def test_a_checkpoint_without_optimizer_cannot_be_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(DamagedError, match=r"checkpoint-4/optimizer.pt is missing: .*save_only_model"):
        trainer(tmp_path, save_only_model=True, max_steps=5).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("content", ["[]", "", "{"])
def test_an_identity_that_is_damaged_is_named(content: str, run: Path) -> None:
    (run / IDENTITY).write_text(content)
    message = (
        f"{run / IDENTITY} is damaged .* delete {run / IDENTITY} and resume; the newest whole one is {run}/checkpoint-4"
    )
    with pytest.raises(DamagedError, match=message):
        trainer(run, max_steps=5).train(resume_from_checkpoint=True)
    (run / IDENTITY).unlink()
    trainer(run, max_steps=5).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_over_is_not_whole_until_it_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in between must not leave the new weights with the old optimizer, as if they belonged together."""
    finished: list[list[Path]] = []
    again = trainer(run)
    write = again._save_optimizer_and_scheduler

    def watched(folder: str) -> None:
        finished.append(finished_checkpoints(run))
        write(folder)

    monkeypatch.setattr(again, "_save_optimizer_and_scheduler", watched)
    again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert finished == [[run / "checkpoint-2"]]
    assert last_whole_checkpoint(run) == run / "checkpoint-4"


def test_a_saved_adapter_that_is_damaged_is_not_evaluated(tmp_path: Path) -> None:
    model, processor = tiny_models.build("llava")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trainer(tmp_path / "run").save_model(str(tmp_path / "adapter"))
    source = ModelSource("aligned", str(tmp_path / "base"), str(tmp_path / "adapter"))
    source.load(LoadSettings(), "cpu")
    before = source.identity({})
    (tmp_path / "adapter" / CHECKSUMS).touch()  # not a part of the model
    assert source.identity({}) == before
    flip(tmp_path / "adapter" / ADAPTER)
    with pytest.raises(DamagedError, match=f"{tmp_path}/adapter/{ADAPTER} is damaged: its checksum differs"):
        source.load(LoadSettings(), "cpu")


def test_a_model_that_is_cut_off_is_named(tmp_path: Path) -> None:
    """What the library says is "incomplete metadata, file not fully covered"."""
    tiny_models.build("llava")[0].save_pretrained(tmp_path)
    cut(tmp_path / "model.safetensors")
    with pytest.raises(DamagedError, match=rf"{tmp_path}/model.safetensors is damaged: \d+ bytes, and its header says"):
        load_model(str(tmp_path))
