"""The model card says what was done, and the hub gets it with the model and nothing else."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors import safe_open

from perpo.cli import main as cli
from perpo.cli.settings import command, parse
from perpo.cli.train import SETTINGS
from perpo.model.load import load_model
from perpo.storage.checksums import check_weights
from perpo.training.card import MARK, with_evaluation

from .. import tiny_models, tiny_runs


def test_the_card_says_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_runs.save_run(tmp_path, lora_alpha=8, seed=7, beta=0.2, hub_token="hf_secret")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists.jsonl.parts").mkdir()
    (tmp_path / "lists.jsonl.parts" / "identity.json").write_text(
        json.dumps({"storage format": "2", "temperature": "1.3", "weights": "abc", "k": "3"})
    )
    assert cli.main(["train", "--config", str(run / "run.yaml")]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.tags == ["lora", "perpo"]
    assert card.data.base_model is None  # a local folder means nothing to others
    records = [tuple(r.rewards or ()) for r in tiny_runs.records()]
    answers = [value for rewards in records for value in rewards]
    for words in (
        "# out\n",
        "a model in a local folder `model`",
        "objective is `perpo` (beta 0.2, gamma 0.5, pairs all, weight power",
        "| lists | lists.jsonl |",
        "| number | 4 lists of 2 to 3 answers |",
        f"| reward before training, mean of all answers | {sum(answers) / len(answers):.4g} |",
        f"| reward before training, mean of the best in a list | {sum(map(max, records)) / 4:.4g} |",
        "| lists with a preference | 75.0% |",
        "| answers | k 3, temperature 1.3 |",
        "| adapters | r 4, lora_alpha 8, lora_dropout 0.0 |",
        "| steps | 2, of 1 lists |",
        "| learning rate | 5e-06, cosine |",
        "| seed | 7 |",
        "| reference | precomputed |",
        "at step 2 (",
        "| transformers | ",
        "arXiv:2502.04371",
        "Not evaluated yet",
    ):
        assert words in card.text, words
    assert "hf_secret" not in card.text
    line = next(line for line in card.text.splitlines() if line.startswith("perpo train "))
    again = parse(SETTINGS, shlex.split(line)[2:], "perpo train")
    told = parse(SETTINGS, ["--config", str(run / "run.yaml")], "perpo train")
    assert command("perpo train", again) == command("perpo train", told)
    assert again[3].seed == 7
    assert again[3].beta == 0.2


def test_a_text_model_and_a_full_one_are_of_their_kind(tmp_path: Path) -> None:
    records = [r.__class__(r.id, None, r.prompt, "", "", r.responses, r.rewards) for r in tiny_runs.records()]
    trainer = tiny_runs.trainer("llama", tmp_path, lora=False, data=records, objective="simpo")
    trainer.model.config._name_or_path = "owner/base-model"
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model == "owner/base-model"
    assert card.data.tags == ["perpo"]
    assert "owner/base-model, aligned by perpo" in card.text
    assert "`simpo`" in card.text
    assert "weight power" not in card.text
    assert "| lists | records given in Python |" in card.text


def test_a_card_of_somebody_else_is_left_as_it_is(tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perpo.training.publish.logger.propagate", True)
    trainer = tiny_runs.trainer("llava", tmp_path)
    trainer.save_model()
    card = tmp_path / "README.md"
    assert MARK in card.read_text()
    trainer.save_model()
    assert not caplog.records
    card.write_text("---\nlicense: mit\n---\n\n# My own words\n")
    trainer.save_model()
    assert "# My own words" in card.read_text()
    assert MARK not in card.read_text()
    assert "was not written by perpo, and is left as it is" in caplog.text


class Hub:
    """Keeps what would be uploaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created: list[str] = []
        self.uploads: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **options: self.create(name))
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **options: self.upload(**options))

    def create(self, name: str) -> SimpleNamespace:
        self.created.append(name)
        return SimpleNamespace(repo_id=f"me/{name.rpartition('/')[2]}")

    def upload(self, **options: Any) -> str:
        self.uploads.append(options)
        folder = Path(options["folder_path"])
        self.files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        return "https://hub/commit"


@pytest.mark.parametrize("lora", [True, False])
def test_the_hub_gets_model_card_and_checksums(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    trainer = tiny_runs.trainer(
        "llava", tmp_path / "run", lora=lora, push_to_hub=True, hub_model_id="me/boxes", hub_token="hf_secret"
    )
    assert hub.created == ["me/boxes"]
    trainer.train()
    trainer.save_model()  # pushes
    (upload,) = hub.uploads
    assert (upload["repo_id"], upload["token"]) == ("me/boxes", "hf_secret")
    card = hub.files["README.md"].decode()
    assert MARK in card
    assert "name: boxes" in card
    assert "hf_secret" not in card
    assert b"reference/" in hub.files[".gitignore"]
    assert b".lock" in hub.files[".gitignore"]
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in hub.files.items():
        (downloaded / name).write_bytes(content)
    check_weights(downloaded)  # the checksums are of what was uploaded
    assert "checksums.json" in hub.files
    withheld = hub.files[".gitignore"].decode().split()
    assert [name for name, content in hub.files.items() if b"hf_secret" in content and name not in withheld] == []
    if not lora:
        trainer.model.save_pretrained(tmp_path / "plain")  # under the names that every version loads
        with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as plain:
            names = set(plain.keys())
        with safe_open(downloaded / "model.safetensors", "pt") as uploaded:
            assert set(uploaded.keys()) == names
        given = tiny_runs.trained(trainer.model)
        assert all(
            (p == given[name]).all() for name, p in load_model(str(downloaded)).named_parameters() if name in given
        )
    trainer.push_to_hub(tags="mine", license="mit")
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "mit"
    assert "mine" in card.data.tags


def test_pushing_at_every_save_leaves_out_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    options: dict[str, Any] = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "steps"}
    trainer = tiny_runs.trainer("llava", tmp_path / "run", save_steps=1, hub_always_push=True, **options)
    trainer._finish_current_push = lambda: None  # there is no job
    assert (tmp_path / "run" / ".gitignore").read_text().splitlines()[:3] == [".lock", ".*.lock", "reference/"]
    (tmp_path / "run" / ".gitignore").write_text("mine\n")
    trainer.init_hf_repo()
    assert (tmp_path / "run" / ".gitignore").read_text().startswith("mine\n.lock\n")
    assert hub.created == ["run", "run"]


def test_an_evaluation_fills_its_place_only() -> None:
    card = "a\n<!-- perpo evaluate -->\nold\n<!-- /perpo evaluate -->\nb"
    assert with_evaluation(card, "new\n") == "a\n<!-- perpo evaluate -->\nnew\n<!-- /perpo evaluate -->\nb"
    assert with_evaluation("a", "new") is None


def test_evaluating_and_merging_take_the_card_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_runs.save_run(tmp_path)
    rows = [{"id": f"r{i}", "image": f"r{i}.png", "prompt": "Read.", "answer": "a", "task": "ocr"} for i in range(2)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["train", "--config", str(run / "run.yaml")]) == 0
    models = [f"base={tmp_path / 'model'}", f"aligned={tmp_path / 'out'}"]
    settings = {"n": 0, "max_new_tokens": 3, "resamples": 20, "image_root": str(tmp_path), "device": "cpu"}
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(settings))
    given = ["--records", str(tmp_path / "held_out.jsonl"), "--output", str(tmp_path / "out" / "evaluation")]
    before = (tmp_path / "out" / "README.md").read_text()
    assert cli.main(["evaluate", "--config", str(tmp_path / "evaluate.yaml"), "--models", *models, *given]) == 0
    assert f"card:    {tmp_path / 'out' / 'README.md'}" in capsys.readouterr().out
    after = (tmp_path / "out" / "README.md").read_text()
    assert "| task | records | metric | aligned | base | difference |" in after
    assert "| ocr | 2 | " in after
    assert after.partition("## Evaluation")[0] == before.partition("## Evaluation")[0]
    assert after.partition("## Versions")[2] == before.partition("## Versions")[2]
    assert not (tmp_path / "model" / "README.md").exists()
    assert cli.main(["merge", "--model", str(tmp_path / "out"), "--output", str(tmp_path / "merged")]) == 0
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.library_name, card.data.tags) == ("transformers", ["perpo"])
    assert "| ocr | 2 | " in card.text
    assert tiny_models.LLAVA_TEMPLATE in (tmp_path / "merged" / "chat_template.jinja").read_text()
