"""Records that cannot be used: every command names each, whatever is wrong with it, or leaves it out and counts it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from perpo.cli import main as cli
from perpo.data.read import read_records
from perpo.encoding.encoder import Encoder
from perpo.encoding.prompt_check import PromptCheck

from .. import tiny_models
from ..data.test_images import encoded, exif_with

COMMANDS = ("train", "generate", "evaluate")
Shown = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers", "ignore:Corrupt EXIF")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    made, processor = tiny_models.build("llava")
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("a", (40, 28)), ("b", (28, 40)), ("thin", (900, 3))):
        tiny_models.picture(size).save(tmp_path / f"{name}.png")
    (tmp_path / "exif.jpg").write_bytes(
        encoded(Image.new("RGB", (28, 28)), "JPEG", exif=exif_with(0x0128, 2, b"abc\0"))
    )
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:-200])
    return tmp_path


def record(name: str, **changes: Any) -> dict[str, Any]:
    made = {"id": name, "image": "a.png", "prompt": "Read it.", "answer": "ab1", "task": "ocr"}
    made |= {"responses": ["ab", "ab1"], "rewards": [0.5, 1.0]}
    return {key: value for key, value in (made | changes).items() if value is not ...}


def run(command: str, model: Path, folder: Path, rows: list[dict[str, Any]], *extra: str) -> int:
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--image_root", str(folder), *extra]
    records, out = str(folder / "records.jsonl"), str(folder / "out")
    if command == "train":
        settings = ["--train_file", records, "--output_dir", out, "--model", str(model), "--max_steps", "1"]
        settings += ["--use_cpu", "true", "--report_to", "none", "--save_strategy", "no", "--lora_r", "2"]
    elif command == "generate":
        settings = ["--records", records, "--output", f"{out}.jsonl", "--model", str(model), "--k", "2"]
        settings += ["--max_new_tokens", "3"]
    else:
        settings = ["--records", records, "--output", out, "--models", f"m={model}", "--n", "0", "--resamples", "10"]
        settings += ["--max_new_tokens", "3", "--device", "cpu", "--blank_test", "false"]
    return cli.main([command, *settings, *common])


BAD = [
    ({"prompt": "what \ud83d"}, ":2: prompt: holds half of a surrogate pair"),
    ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, ":2: prompt: a text part of message 0 must be"),
    ({"prompt": "What is in <video>?"}, ":2: record 'bad': prompt: '<video>' stands for a video"),
    ({"prompt": "<image> and <image>"}, ":2: record 'bad': prompt: 2 places for a picture"),
    ({"prompt": [{"role": "system", "content": "x"}]}, ":2: record 'bad': prompt: no message of role 'user'"),
    ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, ":2: record 'bad': prompt: a message part must"),
    ({"image": "half.png"}, ":2: record 'bad': image '"),
    ({"image": "gone.png"}, ":2: record 'bad': image '"),
    ({"image": ..., "images": ["a.png", "b.png"]}, ":2: images: holds 2 images"),
]


@pytest.fixture
def video_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptCheck, "_video", ["<video>"])


@pytest.mark.usefixtures("video_token")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_bad_record_is_named_before_a_model_is_loaded(
    command: str, model: Path, folder: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perpo.model.settings.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for changes, message in BAD:
        assert run(command, model, folder, [record("good"), record("bad", **changes)]) == 1
        error = capsys.readouterr().err
        assert f"records.jsonl{message}" in error
        assert "skip_bad leaves out such records and counts them" in error


@pytest.mark.usefixtures("video_token")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_bad_record_can_be_skipped(command: str, model: Path, folder: Path, capsys: Shown) -> None:
    bad = [record(f"bad{i}", **changes) for i, (changes, _) in enumerate(BAD)]
    rows = [record("good"), *bad, record("exif", image="exif.jpg"), record("named", image=..., images=["b.png"])]
    assert run(command, model, folder, rows, "--skip_bad") == 0
    shown = capsys.readouterr()
    assert f"3 lists of 2 answers; {len(BAD)} bad records skipped" in shown.out
    assert shown.err.count("  skipped: ") == len(BAD)
    if command == "generate":
        assert [one.id for one in read_records(folder / "out.jsonl")[0]] == ["good", "exif", "named"]


def test_a_picture_that_a_processor_refuses_is_named(folder: Path) -> None:
    _, processor = tiny_models.build("qwen2_5_vl")
    check = PromptCheck(processor)
    assert set(check._video) == {"<video>"}
    (thin, good), _ = read_records([record("thin", image="thin.png"), record("good")])
    check(good, Image.open(folder / "a.png"))
    with pytest.raises(ValueError, match="absolute aspect ratio must be smaller than 200"):
        check(thin, Image.open(folder / "thin.png"))


def test_whatever_a_processor_raises_makes_a_bad_record(
    model: Path, folder: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: PromptCheck, one: Any, image: Any) -> None:
        if one.id == "bad":
            raise RuntimeError("no such tile")

    monkeypatch.setattr(PromptCheck, "__call__", check)
    assert run("generate", model, folder, [record("good"), record("bad")]) == 1
    assert "records.jsonl:2: record 'bad': RuntimeError: no such tile" in capsys.readouterr().err
    assert run("generate", model, folder, [record("good"), record("bad")], "--skip_bad") == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_a_record_that_only_encoding_refuses_can_be_skipped(
    command: str, model: Path, folder: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing about it is odd, and the processor does not even raise a ValueError."""
    encode = Encoder.prompt

    def prompt(self: Encoder, asked: Any, image: Any = None) -> Any:
        if "refused" in str(asked):
            raise RuntimeError("no such tile")
        return encode(self, asked, image)

    monkeypatch.setattr(Encoder, "prompt", prompt)
    rows = [record("good"), record("bad", prompt="To be refused."), record("fine", prompt="What is it?")]
    assert run(command, model, folder, rows, "--skip_bad") == 0
    shown = capsys.readouterr()
    assert "1 bad records skipped" in shown.out
    assert "record 'bad': RuntimeError: no such tile" in shown.out + shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_records_without_any_picture_are_refused_unless_that_is_meant(
    command: str, model: Path, folder: Path, capsys: Shown
) -> None:
    for changes, hint in (({"imgae": "a.png"}, "the column 'imgae' looks like one"), ({}, "its field is 'image'")):
        rows = [record("a", image=..., **changes), record("b", image=...)]
        assert run(command, model, folder, rows) == 1
        error = capsys.readouterr().err
        assert "none of 2 records has an image, and the model takes images: " + hint in error
        assert "set text_only" in error
    assert run(command, model, folder, rows, "--text_only") == 0
    assert "2 without an image" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_model_is_a_folder_that_is_not_there(
    command: str, model: Path, folder: Path, capsys: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tiny").mkdir()
    monkeypatch.chdir(folder)
    assert run(command, Path("tinny"), folder, [record("a")]) == 1
    assert "model: there is no folder 'tinny'; did you mean 'tiny'?" in capsys.readouterr().err


def test_unscored_records_are_sent_to_generate(model: Path, folder: Path, capsys: Shown) -> None:
    assert run("train", model, folder, [record("a", rewards=...)]) == 1
    assert ":1: rewards: is missing or empty: run `perpo generate` first" in capsys.readouterr().err
