"""Several reference models as one (MRPO): the loss of the definition, one cache each, and no silent mix-up."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perpo.cli import main as cli
from perpo.encoding.collator import ListCollator
from perpo.storage.identity import StaleError
from perpo.training.trainer import PerPOTrainer

from .. import tiny_models, tiny_runs
from .test_trainer import full_log_probs, full_logits_loss

MODELS = (0, 1, 2)


def reference(number: int) -> nn.Module:
    """The tiny LLaVA, the more disturbed the higher the number."""
    model, _ = tiny_models.build("llava")
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * number * torch.randn(parameter.shape, generator=generator)
    return model


def trainer(folder: Path, ref_model: Any, **options: Any) -> PerPOTrainer:
    model, processor = tiny_models.build("llava")
    torch.manual_seed(1)
    lora = tiny_runs.language_lora(model, r=4, alpha=8)
    lora.init_lora_weights = False
    config = tiny_runs.config(folder, **{"reference": "model", **options})
    return PerPOTrainer(model, config, tiny_runs.records(), processor, peft_config=lora, ref_model=ref_model)


@pytest.mark.parametrize("alpha", [None, [0.7, 0.1, 0.2], [0.0, 1.0, 0.0]])
def test_the_loss_is_that_of_the_harmonic_mean_of_the_references(alpha: list[float] | None, tmp_path: Path) -> None:
    runner = trainer(tmp_path, [reference(n) for n in MODELS], ref_model_weights=alpha)
    separate = ListCollator(runner.encoder)(tiny_runs.records())
    with torch.no_grad():
        each = torch.stack([full_log_probs(reference(n).double().eval(), double(separate)) for n in MODELS])
    weights = torch.tensor(alpha or [1 / 3] * 3, dtype=torch.float64)
    combined = -(weights[:, None] / each.exp()).sum(0).log()  # 1 / Σ α_n / π_n
    assert (combined - each[0]).abs().max() > 0.1
    attached = [x for record in runner.train_dataset for x in record.ref_log_probs]
    torch.testing.assert_close(torch.tensor(attached).double(), combined, rtol=1e-5, atol=1e-5)
    loss = runner.compute_loss(runner.model.eval(), runner.data_collator(runner.train_dataset))
    expected = full_logits_loss(runner.model, separate, combined, 0.1, 0.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)


def double(batch: Any) -> Any:
    batch.inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.inputs.items()}
    return batch


def test_each_model_is_run_once_whatever_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(tmp_path, [reference(0), reference(1)])
    folders = sorted((tmp_path / "reference").iterdir())
    assert [len((folder / "part-00000.jsonl").read_text().splitlines()) for folder in folders] == [4, 4]
    trainer(tmp_path, [reference(n) for n in MODELS])
    assert len(list((tmp_path / "reference").iterdir())) == 3
    monkeypatch.setattr("perpo.training.reference.sequence_log_probs", None)  # any use of it fails
    other = trainer(tmp_path, [reference(1), reference(0)], ref_model_weights=[0.9, 0.1])
    assert first.train_dataset[0].ref_log_probs != other.train_dataset[0].ref_log_probs
    again = trainer(tmp_path, [reference(1), reference(0)])
    assert again.train_dataset[0].ref_log_probs == pytest.approx(first.train_dataset[0].ref_log_probs, rel=1e-12)


def test_an_iterator_never_holds_two_models(tmp_path: Path) -> None:
    def one_by_one() -> Iterator[nn.Module]:
        for number in MODELS:
            assert len(list((tmp_path / "reference").glob("*/part-00000.jsonl"))) == number  # those before are done
            yield reference(number)

    whole = trainer(tmp_path / "list", [reference(n) for n in MODELS])
    assert trainer(tmp_path, one_by_one()).train_dataset[:] == whole.train_dataset[:]


def test_mdpo_has_references_under_the_corrupted_image(tmp_path: Path) -> None:
    runner = trainer(tmp_path, [reference(0), reference(1)], objective="mdpo", ref_model_weights=[1.0, 0.0])
    alone = trainer(tmp_path / "alone", reference(0), objective="mdpo")
    batch, theirs = (one.data_collator(one.train_dataset) for one in (runner, alone))
    loss, expected = runner.compute_loss(runner.model.eval(), batch), alone.compute_loss(alone.model.eval(), theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_a_run_with_other_references_or_weights_is_another_run(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, [reference(0), reference(1)], **options).train()
    options["max_steps"] = 2
    for models, alpha in (([0, 2], None), ([0, 1], [0.9, 0.1])):
        with pytest.raises(StaleError, match="different: reference weights"):
            trainer(tmp_path, [reference(n) for n in models], ref_model_weights=alpha, **options).train(True)
    runner = trainer(tmp_path, [reference(0), reference(1)], **options)
    runner.train(resume_from_checkpoint=True)
    assert runner.state.global_step == 2


def test_from_the_command_line(tmp_path: Path) -> None:
    project = tiny_runs.save_run(tmp_path)
    for number in (1, 2):
        reference(number).save_pretrained(project / f"reference{number}")
    names = [str(project / "reference1"), str(project / "reference2")]
    given = ["--reference", "model", "--ref_model_name_or_path", *names, "--ref_model_weights", "0.25", "0.75"]
    assert cli.main(["train", "--config", str(project / "run.yaml"), *given]) == 0
    assert len(list((project / "out" / "reference").iterdir())) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ref_model_name_or_path": ["a", "a"]}, "must name a model, or several that differ; got "),
        ({"ref_model_name_or_path": []}, "must name a model, or several that differ; got "),
        ({"ref_model_name_or_path": ["a", "b"], "ref_model_weights": [1.0]}, "one number for each model"),
        ({"ref_model_name_or_path": "a", "ref_model_weights": [0.5, 0.5]}, "one number for each model"),
        ({"ref_model_weights": [0.5, 0.6]}, "numbers ≥ 0 that add up to 1, got"),
        ({"ref_model_weights": [1.5, -0.5]}, "numbers ≥ 0 that add up to 1, got"),
        ({"ref_model_weights": [1.0], "reference": "data"}, "ref_model_weights is given, but reference='data'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_runs.config(tmp_path, **{"reference": "model", **settings})


@pytest.mark.parametrize(
    ("ref_model", "options", "message"),
    [
        ([], {}, "ref_model: expected one model or more, got none"),
        (["one"], {"ref_model_weights": [0.5, 0.5]}, "ref_model_weights must hold one number for each reference model"),
    ],
)
def test_models_that_do_not_fit_are_refused(ref_model: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, ref_model, **options)


def test_sharded_weights_are_refused_with_degrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sharded(self: Any) -> None:
        plain(self)
        self.is_fsdp_enabled = True

    plain = PerPOTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(PerPOTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="degree_weight > 0 is not supported under FSDP"):
        trainer(tmp_path, None, reference="none", degree_weight=0.1)
