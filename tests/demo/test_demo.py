"""The demo's parts, and a run of the whole that is too short to learn anything but long enough to break."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import perpo_kernels as pk
from perpo.demo import vocabulary
from perpo.demo.__main__ import main, parse
from perpo.demo.align import Recipe, align, list_loss, sample_lists
from perpo.demo.compare import ROWS
from perpo.demo.model import PATCHES, SHIPPED, build_model, continuation_states, load_model, normalised, sample_answers
from perpo.demo.scenes import make_scenes
from perpo.rewards import parse_box


def nothing(scenes: int) -> None:
    pass


def test_the_shipped_weights_are_exactly_the_models() -> None:
    with safe_open(SHIPPED, "pt") as file:
        shipped = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shipped == {name: tuple(weight.shape) for name, weight in build_model().state_dict().items()}
    assert SHIPPED.stat().st_size < 8_000_000
    load_model()


def test_the_vocabulary_writes_boxes_that_the_reward_reads_back() -> None:
    boxes = make_scenes(200, "train", 0).boxes
    texts = vocabulary.box_texts(vocabulary.box_ids(boxes))
    assert torch.allclose(torch.tensor([parse_box(text) for text in texts]), boxes, atol=0.00501)
    assert parse_box(vocabulary.box_texts(torch.tensor([[2, 3, 4, 5]]))[0]) is None


def test_answers_from_a_shared_prefix_are_what_separate_forwards_give() -> None:
    model, scenes = build_model().eval(), make_scenes(3, "train", 0)
    answers, sampled_from = sample_answers(model, scenes, 4, torch.Generator().manual_seed(0))
    questions = vocabulary.question_ids(scenes.asked)
    shared = continuation_states(model, scenes.images, questions, answers)
    image = torch.full((3, PATCHES), vocabulary.IMAGE)
    for candidate in range(4):
        ids = torch.cat((image, questions, answers[:, candidate, :-1]), dim=1)
        alone = model.model(input_ids=ids, pixel_values=normalised(scenes.images)).last_hidden_state[:, -4:]
        torch.testing.assert_close(shared[:, candidate], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sampled_from, shared, atol=1e-5, rtol=1e-4)


def test_the_loss_of_the_sampling_policy_is_that_of_a_coin() -> None:
    model, scenes = load_model().eval(), make_scenes(4, "train", 0)
    lists = sample_lists(model, scenes, 8, torch.Generator().manual_seed(0), nothing)
    # Policy and reference are one here, so every score is 0 and every pair's loss is log 2.
    assert list_loss(model, lists, beta=1.0, gamma=0.5).item() == pytest.approx(
        torch.log(torch.tensor(2.0)).item(), abs=1e-4
    )
    pair = lists.best_and_worst()
    assert torch.equal(pair.rewards, torch.stack((lists.rewards.amax(1), lists.rewards.amin(1)), dim=1))


def test_a_step_raises_the_likelihood_of_better_answers_and_leaves_the_head_and_the_eyes_alone() -> None:
    sft, scenes = load_model().eval(), make_scenes(16, "train", 1_000_000)
    recipe = Recipe(rounds=1, lists=16, k=8, batch=16)
    lists = sample_lists(sft, scenes, 8, torch.Generator().manual_seed(1_000_000), nothing)
    aligned = align(sft, "PerPO", recipe, seed=0, advance=nothing)
    assert list_loss(aligned, lists, 1.0, 0.5).item() < list_loss(sft, lists, 1.0, 0.5).item()
    for name, weight in sft.state_dict().items():
        frozen = name.startswith(("lm_head", "model.vision_tower"))
        if frozen:
            assert torch.equal(weight, aligned.state_dict()[name]), name


def test_dpo_is_the_list_loss_on_two_answers() -> None:
    log_probs = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = pk.perpo_loss(
        log_probs, torch.tensor([0.9, 0.2]), cu_lists=torch.tensor([0, 2], dtype=torch.int32), beta=1.0
    )
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(-2.0)).item())


def test_the_whole_demo_runs_and_leaves_its_table_pictures_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert all(row in printed for row in ROWS)
    for name in ("boxes.png", "methods.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 300
    figures = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["method"] for row in figures["results"]} == set(ROWS)
    assert all(0 <= row["ap50"] <= 1 and 0 <= row["mean_iou"] <= 1 for row in figures["results"])


def test_the_defaults_are_three_seeds_and_the_shipped_weights() -> None:
    options = parse([])
    assert options.seeds == [0, 1, 2]
    assert not options.from_scratch
