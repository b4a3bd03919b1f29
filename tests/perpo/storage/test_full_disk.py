"""A disk that fills up, and a picture that is damaged: a message that says what to do, and nothing lost.

The system itself refuses to write past a size (RLIMIT_FSIZE), as it would past the end of a disk.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from perpo.cli import main as cli
from perpo.data.record import ListRecord, write_records

from .. import counting_sampler, tiny_models, tiny_runs
from ..evaluating import ocr_records, save_records

resource = pytest.importorskip("resource", reason="limits are Unix")
pytestmark = pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers")


@contextlib.contextmanager
def files_up_to(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made, processor = tiny_models.build("llava")
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    torch.set_num_threads(1)
    return folder


def settings(folder: Path, **values: object) -> list[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump({"image_root": str(folder), **values}))
    return ["--config", str(folder / "run.yaml")]


def test_generating_keeps_what_was_finished(tmp_path: Path) -> None:
    with files_up_to(600), pytest.raises(OSError, match=r"record 'r\d' was not kept, all before is in .*shard-00000"):
        counting_sampler.run(tmp_path)
    shard = tmp_path / "out.jsonl.parts" / "shard-00000.jsonl"
    kept = [json.loads(line)["id"] for line in shard.read_text().splitlines()]
    assert 0 < len(kept) < 7
    made = counting_sampler.Counting()
    counting_sampler.run(tmp_path, made=made)
    assert kept + made.asked == [f"r{i}" for i in range(7)]


@pytest.mark.parametrize(("n_bytes", "file"), [(40_000, "adapter_model.safetensors"), (100_000, "optimizer.pt")])
def test_a_checkpoint_that_does_not_fit_says_what_to_go_on_from(
    n_bytes: int, file: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = []
    for record in tiny_runs.records():
        record.image.save(tmp_path / f"{record.id}.png")
        lists.append(ListRecord(record.id, f"{record.id}.png", record.prompt, "", "", record.responses, record.rewards))
    write_records(lists, tmp_path / "lists.jsonl")
    options = {"model_name_or_path": str(model), "train_file": str(tmp_path / "lists.jsonl")}
    options |= {"output_dir": str(tmp_path / "out"), "use_cpu": True, "disable_tqdm": True}
    command = ["train", *settings(tmp_path, **options, save_steps=1, lora_r=16), "--max_steps"]
    with files_up_to(n_bytes):
        assert cli.main([*command, "2"]) == 1
    shown = capsys.readouterr().err
    assert f"{tmp_path / 'out'} could not be written, the disk may be full" in shown
    assert "no checkpoint is whole" in shown
    assert "Traceback" not in shown
    assert cli.main([*command, "1"]) == 0
    size = (tmp_path / "out" / "checkpoint-1" / file).stat().st_size
    assert size > n_bytes  # it was this one that did not fit
    with files_up_to(n_bytes):
        assert cli.main([*command, "2", "--resume_from_checkpoint", "true"]) == 1
    assert "checkpoint-1 is whole: set resume_from_checkpoint=true" in capsys.readouterr().err
    assert cli.main([*command, "2", "--resume_from_checkpoint", "true"]) == 0
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


def evaluation(model: Path, folder: Path) -> list[str]:
    save_records(folder, ocr_records(3))
    options = {"models": [f"base={model}"], "records": str(folder / "held_out.jsonl"), "output": str(folder / "out")}
    options |= {"n": 0, "batch_size": 1, "max_new_tokens": 4, "resamples": 20, "device": "cpu"}
    return ["evaluate", *settings(folder, **options)]


@pytest.mark.parametrize(("n_bytes", "message"), [(800, "what was answered to 'r"), (1500, "evaluation.json was not")])
def test_evaluating_keeps_what_was_answered(
    n_bytes: int, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = evaluation(model, tmp_path)
    with files_up_to(n_bytes):
        assert cli.main(command) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    answers = tmp_path / "out" / "answers.jsonl"
    before = answers.read_bytes()
    assert before.endswith(b"\n")
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert cli.main(command) == 0
    assert answers.read_bytes().startswith(before)


def test_evaluating_names_a_picture_that_is_damaged(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = evaluation(model, tmp_path)
    (tmp_path / "r2.png").write_bytes((tmp_path / "r2.png").read_bytes()[:60])
    assert cli.main(command) == 1
    shown = capsys.readouterr().err
    assert "r2.png' cannot be" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out" / "answers.jsonl").exists()  # before anything was asked
