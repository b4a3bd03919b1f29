"""The demo's model folder, and a run of the whole that is too short to learn anything but long enough to break."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from perpo.cli import main as cli
from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.demo.__main__ import QUICK, main, parse
from perpo.demo.compare import BEST_OF_K, Result
from perpo.demo.model import SHIPPED, WEIGHTS, build_model
from perpo.demo.pages import make_pages
from perpo.demo.report import comparisons, mean_and_error, sample_caption, sampled, table
from perpo.demo.scenes import box_text, make_scenes
from perpo.demo.steps import Job, Recipe, claim, run
from perpo.demo.tasks import SEEDS, TASKS, make_records
from perpo.demo.train_sft import TURN, _continuations, normalised, page_turns, scene_turns, train_sft
from perpo.demo.vocabulary import IMAGE, PATCHES, TOKENS, build_processor
from perpo.encoding.encoder import Encoder
from perpo.evaluation.answers import ask
from perpo.model.load import load_model, load_processor
from perpo.rewards import parse_box
from perpo.rewards.scoring import Tally, score_record
from perpo.sampling.sampler import Sampling
from perpo.sampling.with_transformers import TransformersSampler
from perpo.storage.identity import StaleError

TINY = Recipe(objectives=("perpo",), lists=6, k=4, held_out=8, batch=3, resamples=10, examples=2)


# ------------------------------------------------------------------------------------------------------- the vocabulary


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(build_processor())


def test_a_box_is_four_tokens_that_decode_to_what_the_reward_reads(encoder: Encoder) -> None:
    for box in make_scenes(100, "train", 0).boxes[:, 0].tolist():
        ids = encoder.response(box_text(box))
        assert len(ids) == 5
        assert encoder.decode(ids) == box_text(box)
        assert parse_box(encoder.decode(ids)) == pytest.approx(box, abs=0.00501)


def test_a_number_is_one_token_a_digit(encoder: Encoder) -> None:
    assert [TOKENS[i] for i in encoder.response("40719")] == ["4", "0", "7", "1", "9", "<end>"]
    assert encoder.decode(encoder.response("40719")) == "40719"


def test_any_sequence_of_tokens_is_trained_as_it_was_sampled(encoder: Encoder) -> None:
    """Whatever a model says, its text must lead back to tokens that say the same."""
    generator = torch.Generator().manual_seed(0)
    answers = list(range(len(TOKENS) - 303, len(TOKENS)))
    for _ in range(200):
        said = torch.tensor(answers)[torch.randint(0, len(answers), (4,), generator=generator)].tolist()
        text = encoder.decode(said)
        assert encoder.decode(encoder.response(text)) == text


def test_supervised_training_sees_tokens_and_pixels_as_the_commands_encode_them(encoder: Encoder) -> None:
    for make, turns_of in ((make_scenes, scene_turns), (make_pages, page_turns)):
        pictures = make(3, "train", 0)
        turns = turns_of(pictures, 0)
        for i, ((question, answer), *_) in enumerate(turns):
            encoded = encoder.prompt(question, Image.fromarray(pictures.pixels[i].numpy()))
            prefix = [TOKENS.index("USER:"), *[TOKENS.index(IMAGE)] * PATCHES]
            tokens, labels = _continuations([(question, answer)])
            assert [*prefix, *tokens[0].tolist()] == [*encoded["input_ids"][0].tolist(), *encoder.response(answer)]
            assert labels[0][labels[0] >= 0].tolist() == encoder.response(answer)
            assert tokens[0, labels[0].eq(-1).sum() - 1] == TOKENS.index(TURN)
            torch.testing.assert_close(encoded["pixel_values"][0], normalised(pictures)[i], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------------ the model


def test_the_shipped_folder_is_a_stock_llava_of_a_few_megabytes() -> None:
    model, processor = load_model(str(SHIPPED)), load_processor(str(SHIPPED))
    assert type(model) is LlavaForConditionalGeneration
    assert model.dtype == torch.float32
    assert processor.tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    with safe_open(SHIPPED / WEIGHTS, "pt") as file:
        shipped = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    built = build_model()
    assert sum(map(torch.Size.numel, map(torch.Size, shipped.values()))) == sum(p.numel() for p in built.parameters())
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 4_000_000


@pytest.mark.parametrize(("name", "least"), [("grounding", 0.35), ("ocr", 0.5)])
def test_the_shipped_model_answers_far_above_chance_with_room_above_it(name: str, least: float, tmp_path: Path) -> None:
    task = TASKS[name]
    records, _ = read_records(make_records(task, 100, "validation", 0, tmp_path, "held_out"), require=("answer",))
    model, processor = load_model(str(SHIPPED)).eval(), load_processor(str(SHIPPED))
    greedy = Sampling(temperature=0, max_new_tokens=task.max_new_tokens)
    sampler = TransformersSampler(model, Encoder.for_model(processor, model), greedy)
    mean = {}
    for blank in (False, True):
        answers, tally = ask(sampler, records, 1, tmp_path, blank=blank), Tally()
        scored = [
            score_record(type(r)(r.id, r.image, r.prompt, r.answer, r.task, answer.texts), None, tally).rewards
            for r, answer in zip(records, answers, strict=True)
        ]
        mean[blank] = sum(rewards[0] for rewards in scored if rewards) / len(records)
        assert blank or tally.unreadable <= 2
    assert least < mean[False] < 0.85
    assert mean[False] > mean[True] + 0.2  # it looks


def test_supervised_training_runs_and_is_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perpo.demo.train_sft.BATCH", 2)
    first, second = train_sft(2, 2).state_dict(), train_sft(2, 2).state_dict()
    start = build_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], start[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    main(["--quick", "--objectives", "perpo,lipo", "--workers", "1", "--output", str(output)])
    return output


def test_a_run_leaves_pictures_figures_reports_and_models(quick: Path) -> None:
    for name in ("boxes.png", "pages.png", "methods.png"):
        with Image.open(quick / name) as picture:
            assert min(picture.size) > 300
    figures = json.loads((quick / "results.json").read_text())
    rows = {(row["task"], row["model"]) for row in figures["results"]}
    assert rows == {(task, model) for task in TASKS for model in ("sft", "perpo", "lipo", BEST_OF_K)}
    for row in figures["results"]:
        assert row["metrics"].keys() - {"gap"} == TASKS[row["task"]].metrics.keys()
        assert all(-1 <= value <= 1 for value in row["metrics"].values())
    for task in TASKS:
        folder = quick / task / "seed0"
        assert "<html" in (folder / "evaluation" / "report.html").read_text()
        assert load_model(str(folder / "perpo")).dtype == torch.float32


def test_all_objectives_train_once_through_the_same_lists(quick: Path) -> None:
    for task in TASKS:
        commands = (quick / task / "seed0" / "commands.sh").read_text().splitlines()
        words = [shlex.split(line) for line in commands]
        assert [line[:2] for line in words] == [["perpo", "generate"], *[["perpo", "train"]] * 2, ["perpo", "evaluate"]]
        trained = [dict(zip(line[2::2], line[3::2], strict=True)) for line in words[1:3]]
        assert [settings.pop("--objective") for settings in trained] == ["perpo", "lipo"]
        assert [Path(settings.pop("--output_dir")).name for settings in trained] == ["perpo", "lipo"]
        assert trained[0] == trained[1]


def test_held_out_pictures_are_drawn_from_digits_that_are_never_trained_on(quick: Path) -> None:
    for name, task in TASKS.items():
        folder = quick / name / "seed0"
        for part, split, count in (("train", "train", QUICK.lists), ("held_out", "test", QUICK.held_out)):
            expected = task.pictures(count, split, SEEDS[split]).pixels
            files = sorted((folder / part).iterdir())
            assert len(files) == count
            for file, pixels in zip(files, expected, strict=True):
                with Image.open(file) as picture:
                    assert picture.tobytes() == pixels.numpy().tobytes()


def test_a_command_that_the_demo_ran_runs_as_it_stands(quick: Path) -> None:
    _, *generate = shlex.split((quick / "grounding" / "seed0" / "commands.sh").read_text().splitlines()[0])
    before = (quick / "grounding" / "seed0" / "lists.jsonl").read_bytes()
    assert cli.main(generate) == 0  # resumed: all answers are there
    assert (quick / "grounding" / "seed0" / "lists.jsonl").read_bytes() == before


def test_a_finished_job_is_not_done_again_and_the_same_job_elsewhere_gives_the_same(tmp_path: Path) -> None:
    jobs = [Job("grounding", 3, TINY, tmp_path / name) for name in ("one", "other")]
    for job in jobs:
        run(job)
    files = [(job.folder / "lists.jsonl").read_text() for job in jobs]
    assert files[0] == files[1]
    weights = [(job.folder / "perpo" / WEIGHTS).read_bytes() for job in jobs]
    assert weights[0] == weights[1]
    assert weights[0] != (SHIPPED / WEIGHTS).read_bytes()
    times = (jobs[0].folder / "perpo" / WEIGHTS).stat().st_mtime_ns
    run(jobs[0])
    assert (jobs[0].folder / "perpo" / WEIGHTS).stat().st_mtime_ns == times


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    claim(tmp_path, TINY)
    claim(tmp_path, Recipe(**{**vars(TINY), "objectives": ("dpo",)}))  # one more objective
    with pytest.raises(StaleError, match=r"different: learning_rate \(0.0001 there, 1.0 now\)"):
        claim(tmp_path, Recipe(**{**vars(TINY), "learning_rate": 1.0}))


def test_a_folder_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ocr" / "seed0").mkdir(parents=True)
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(StaleError, match=r"holds runs .*has no identity"):
        claim(tmp_path, TINY)


def test_a_command_that_fails_says_where_its_log_is(tmp_path: Path) -> None:
    job = Job("ocr", 0, Recipe(**{**vars(TINY), "k": 0}), tmp_path)
    with pytest.raises(RuntimeError, match=r"generate failed.*log\.txt"):
        run(job)
    assert "k must be" in (job.folder / "log.txt").read_text()


def test_a_difference_within_twice_its_error_is_called_a_tie() -> None:
    recipe = Recipe(objectives=("dpo", "perpo"))
    values = {"sft": (0.4, 0.4, 0.4), "dpo": (0.5, 0.52, 0.54), "perpo": (0.6, 0.62, 0.65), BEST_OF_K: (0.9, 0.9, 0.9)}
    results = [
        Result(
            "grounding",
            seed,
            model,
            {"ap50": value, "ap75": value / 2, "mean_iou": 0.5 + 0.01 * seed * (model == "dpo")},
        )
        for model, row in values.items()
        for seed, value in enumerate(row)
    ]
    (line,) = comparisons("grounding", results, recipe)
    assert "AP@50 +0.103 ± 0.003, more than twice its error" in line
    assert "mean IoU -0.010 ± 0.006, a tie" in line
    assert "0.520 ± 0.012" in table("grounding", results, recipe)
    assert mean_and_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


def test_pictures_are_a_stated_random_sample_in_the_order_of_their_change(tmp_path: Path) -> None:
    scored = [(ListRecord(f"r{i}", None, "?"), 0.5, (i * 37 % 100) / 100) for i in range(100)]
    chosen = sampled(scored)
    assert len(chosen) == 12
    changes = [after - before for _, before, after in chosen]
    assert changes == sorted(changes)
    assert changes != [
        after - before for _, before, after in sorted(scored[:12], key=lambda one: one[2])
    ]  # not the first
    assert chosen == sampled(scored)
    assert sampled(scored[:3]) == sorted(scored[:3], key=lambda one: one[2])
    caption = sample_caption(Job("grounding", 4, TINY, tmp_path), scored)
    assert "12 of 100 held-out pictures of seed 4, drawn at random (seed 0), from the largest fall" in caption
    assert "Of all 100: mean IoU 0.50 → 0.49; it rises in 49, falls in 50, stays in 1" in caption


def test_the_defaults_compare_three_objectives_on_both_tasks_with_five_seeds() -> None:
    options = parse([])
    assert options.seeds == [0, 1, 2, 3, 4]
    assert options.tasks == tuple(TASKS)
    assert options.objectives == ("dpo", "uniform_pairs", "perpo")
    with pytest.raises(SystemExit):
        parse(["--objectives", "perpo,nothing"])
