"""What is timed side by side is one and the same thing."""

import pytest
import torch

from benchmarks import small_models
from benchmarks.problems import Prefix, Setting
from benchmarks.test_shared_prefix import dense
from benchmarks.test_step import Step
from perpo import prefix_sharing
from perpo.attention import prefix_attention
from perpo.prefix_layout import prefix_layout

CPU = Setting("cpu", "tiny")


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_a_shared_step_a_row_an_answer_and_the_authors_way_have_one_loss_and_gradient(family):
    torch.manual_seed(0)
    step = Step(family, Prefix(40, 4, 4), CPU)
    prefix_sharing.prepare(step.model, "on")
    loss, gradients = step.ours(step.packed())
    for other_loss, others in (step.ours(step.rows()), step.authors(step.rows())):
        torch.testing.assert_close(other_loss, loss, atol=1e-5, rtol=1e-4)
        for ours, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", small_models.FAMILIES)
@pytest.mark.parametrize("prefix", [Prefix(40, 4, 3), Prefix(91, 7, 2)])
def test_prompts_have_the_length_they_are_asked_for_and_the_picture_matters(family, prefix):
    torch.manual_seed(0)
    step = Step(family, prefix, CPU)
    assert step.prompt["input_ids"].shape == (1, prefix.n_prompt)
    before = step.model(**step.rows().inputs).logits
    step.prompt["pixel_values"] = -step.prompt["pixel_values"]
    assert not torch.equal(step.model(**step.rows().inputs).logits, before)


def test_only_the_layers_of_the_language_model_are_trained():
    model, _ = small_models.build("llava", "tiny", 40)
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained
    assert all("language_model.layers" in name or name.endswith("language_model.norm.weight") for name in trained)


def test_attention_under_a_dense_mask_is_that_of_the_layout():
    torch.manual_seed(0)
    layout = prefix_layout([24], [[5, 5, 5]])
    q, k, v = (torch.randn(1, n, 39, 8, dtype=torch.float64) for n in (4, 2, 2))
    torch.testing.assert_close(dense(layout, "cpu")(q, k, v), prefix_attention(q, k, v, layout))
