"""The recipes: each trains a tiny model of its architecture for a step; their launchers know every setting; their page.

The models have the sizes of images that the recipes set, and one patch where the real ones have many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser as torch_launcher
from transformers import AutoConfig, AutoModelForImageTextToText, TrainingArguments

import perpo.model.load
from perpo.cli import main as cli
from perpo.cli import train
from perpo.cli.settings import parse
from perpo.data.record import ListRecord, write_records
from perpo.model.settings import LoadSettings

from .perpo import tiny_models
from .test_readme import table

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
MODELS = sorted((RECIPES / "models").glob("*.yaml"))
SHAPES = {
    str(file.parent.relative_to(RECIPES / "shapes")): file.parent for file in RECIPES.glob("shapes/*/*/config.json")
}
PAGE = RECIPES / "README.md"
K = 20
# Parameters, as the pages of the models on the hub count them.
PARAMETERS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "OpenGVLab/InternVL3-8B-hf": 7_944_373_760,
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2_246_784_880,
}


def settings(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def read(file: Path, *extra: str) -> Any:
    """As `perpo train` reads it: its four objects."""
    options = ["--config", str(file), "--train_file", "lists.jsonl", "--output_dir", "run", "--use_cpu", "true"]
    return parse(train.SETTINGS, [*options, *extra], "perpo train")


# ------------------------------------------------------------------------------------------------------------- models


def tiny(family: str) -> tuple[Any, Any]:
    """A tiny model of a family, which takes images of the size that the recipe gives it; with its processor."""
    model, processor = tiny_models.build(family)
    images, config = processor.image_processor, model.config
    if family == "llava":  # as on the hub: it crops unless told otherwise
        images.do_center_crop, images.size = True, {"shortest_edge": 336}
        images.crop_size = {"height": 336, "width": 336}
        config.vision_config.image_size, config.vision_config.patch_size, processor.patch_size = 336, 84, 84
    elif family == "smolvlm":  # at most 4 × 4 tiles of 384 pixels
        images.max_image_size = {"longest_edge": 384}
        config.vision_config.image_size, config.vision_config.patch_size = 384, 96
    else:
        return model, processor
    return type(model)(config), processor


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_a_step_with_the_settings_of_the_recipe(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = settings(file)
    model, processor = tiny(AutoConfig.from_pretrained(SHAPES[recipe["model_name_or_path"]]).model_type)
    model.save_pretrained(tmp_path / "model")
    processor.image_processor.save_pretrained(tmp_path / "model")
    given = {}

    class Processor:  # the real one of some families wants torchvision, for videos
        @staticmethod
        def from_pretrained(folder: str, trust_remote_code: bool = False, **options: Any) -> Any:
            given.update(options)
            processor.image_processor = type(processor.image_processor).from_pretrained(folder, **options)
            processor.save_pretrained = lambda folder: None
            return processor

    monkeypatch.setattr(perpo.model.load, "AutoProcessor", Processor)
    torch.set_num_threads(1)
    n = recipe["per_device_train_batch_size"]
    for i in range(n):
        tiny_models.picture((80, 60), i).save(tmp_path / f"{i}.png")
    answers, rewards = [f"[0.{i}]" for i in range(K)], [i / K for i in range(K)]
    lists = [ListRecord(f"r{i}", f"{i}.png", "Where?", "", "", answers, rewards) for i in range(n)]
    write_records(lists, tmp_path / "lists.jsonl")
    places = {"model": "model", "train_file": "lists.jsonl", "image_root": "", "output_dir": "run"}
    options = [word for name, place in places.items() for word in (f"--{name}", str(tmp_path / place))]
    here = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
    assert cli.main(["train", "--config", str(file), *options, *here]) == 0
    shown = capsys.readouterr()
    assert "not shared" not in shown.err
    (first, last) = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert last["step"] == 1
    assert first["loss"] == pytest.approx(0.693, abs=0.01)  # ln 2: before the first step nothing is preferred
    assert first["grad_norm"] > 0
    assert given == recipe["processor_options"]
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all("lora_" in name or "projector" in name for name in saved)
    assert any("projector" in name for name in saved) == recipe.get("train_projector", False)
    assert not any("vision_tower" in name or "visual." in name or "lm_head" in name for name in saved)


def test_llava_is_trained_as_published() -> None:
    _, _, trainable, args = read(RECIPES / "models" / "llava-1.5-7b.yaml")
    assert (trainable.lora, trainable.lora_r, trainable.lora_alpha) == (True, 128, 256)
    assert trainable.train_projector
    assert not trainable.train_vision_tower
    assert not trainable.train_lm_head
    assert (args.objective, args.beta, args.gamma) == ("perpo", 0.1, 0.5)
    assert (args.learning_rate, args.lr_scheduler_type, args.num_train_epochs) == (5e-6, "cosine", 1)
    assert args.get_warmup_steps(1000) == 0
    assert args.bf16
    assert (args.per_device_train_batch_size, args.max_length) == (2, 2048)


def test_models_differ_in_what_their_architecture_asks_for() -> None:
    """One optimisation for all; of the published one, all others than LLaVA leave the projector as it is."""
    own = {"model_name_or_path", "processor_options", "train_projector", "max_length", "per_device_train_batch_size"}
    shared = [{name: value for name, value in settings(file).items() if name not in own} for file in MODELS]
    assert all(one == shared[0] for one in shared)
    assert {settings(file)["model_name_or_path"] for file in MODELS} == set(SHAPES) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_those_of_the_models(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(SHAPES[name]))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


# ------------------------------------------------------------------------------------------------------------ engines


def launched(file: str) -> Any:
    """What `accelerate launch` makes of a file."""
    parser = launch.launch_command_parser()
    words = ["--config_file", str(RECIPES / "engines" / file), "-m", "perpo", "train"]
    args, _, _ = launch._validate_launch_command(parser.parse_args(words))
    return args


@pytest.mark.parametrize("file", sorted(path.name for path in RECIPES.glob("engines/*.yaml")))
def test_accelerate_knows_every_setting(file: str) -> None:
    args = launched(file)  # raises for an unknown name
    known = {action.dest for action in launch.launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(settings(RECIPES / "engines" / file).get(section, {})) <= known
    assert args.num_processes == (1 if file == "one_gpu.yaml" else 8)
    assert (args.use_fsdp, args.use_deepspeed) == (file == "fsdp2.yaml", file == "zero3.yaml")
    assert args.multi_gpu == (file == "ddp.yaml")
    if args.use_deepspeed:  # it gets them from the other file, and refuses them here
        assert args.mixed_precision == "no"
        assert (ROOT / args.deepspeed_config_file).is_file()


def test_fsdp2_is_the_same_by_both_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        for name, value in prepare_multi_gpu_env(launched("fsdp2.yaml")).items():
            patched.setenv(name, value)
        by_accelerate = FullyShardedDataParallelPlugin()
    file = RECIPES / "engines" / "fsdp2.json"
    given = json.loads(file.read_text())
    known = inspect.getsource(TrainingArguments._process_fsdp_args)
    assert all(f'"{name}"' in known for name in given), "a name that nothing reads"
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # set by what follows, and taken back after the test
    *_, args = read(MODELS[0], "--fsdp", "--fsdp_config", str(file))
    by_trainer = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    assert by_trainer.fsdp_version == 2
    for field in dataclasses.fields(by_trainer):
        one, other = (getattr(plugin, field.name) for plugin in (by_trainer, by_accelerate))
        assert one == other, field.name


def test_deepspeed_knows_every_setting() -> None:
    """pip install --target FOLDER --no-deps deepspeed hjson py-cpuinfo einops msgpack, then PYTHONPATH=FOLDER."""
    given = json.loads((RECIPES / "engines" / "zero3.json").read_text())
    assert given["zero_optimization"]["stage"] == 3
    assert given["bf16"] == {"enabled": "auto"}
    zero = pytest.importorskip("deepspeed.runtime.zero.config", reason="deepspeed is no part of perpo[test]")
    constants = pytest.importorskip("deepspeed.runtime.constants")
    numbers = {name: 1 if value == "auto" else value for name, value in given["zero_optimization"].items()}
    zero.DeepSpeedZeroConfig(**numbers)  # refuses unknown names
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert set(given) <= known | {"bf16", "zero_optimization"}


# --------------------------------------------------------------------------------------------------------------- page

# Tokens of prompt and answer: of boxes, and for SmolVLM, which was trained with none, of a line of text.
TOKENS = {
    "llava-1.5-7b": (640, 30),
    "qwen2.5-vl-3b": (1100, 60),
    "qwen2.5-vl-7b": (1100, 60),
    "qwen2.5-vl-32b": (1100, 60),
    "internvl3-8b": (1350, 40),
    "smolvlm2-2.2b": (1500, 60),
}
HEADER = (
    "| recipe | shards | lists × k | P + R | weights | gradients, moments "
    "| activations, momentary | gathered | in all |"
)
ROWS = [(name, shards) for name in TOKENS for shards in (1, 8)]


def row(name: str, shards: int) -> str:
    """What `perpo plan` prints of a recipe."""
    file, (prompt, response) = RECIPES / "models" / f"{name}.yaml", TOKENS[name]
    shape = SHAPES[settings(file)["model_name_or_path"]]
    lists = {"k": K, "prompt_tokens": prompt, "response_tokens": response, "shards": shards}
    options = [word for name, value in lists.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["plan", "--config", str(file), "--model", str(shape), *options]) == 0
    assert "not counted" not in printed.getvalue()
    lines = (re.fullmatch(r"(.+) \(GiB\) +([\d.]+) +([\d.]+)", line) for line in printed.getvalue().splitlines())
    parts = {found[1]: found[2] for found in lines if found}
    cells = [
        f"`{name}`",
        str(shards),
        f"{settings(file)['per_device_train_batch_size']} × {K}",
        f"{prompt} + {response}",
        parts["weights"],
        f"{parts['gradients']}, {parts['optimizer']}",
        f"{parts['activations']}, {parts['momentary']}",
        parts.get("gathered", ""),
        parts["in all"],
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize(("name", "shards"), [("llava-1.5-7b", 1), ("qwen2.5-vl-32b", 8)])
def test_the_table_has_what_plan_prints(name: str, shards: int) -> None:
    assert row(name, shards) in PAGE.read_text(encoding="utf-8"), "test_the_whole_table, with -m slow, writes it anew"


@pytest.mark.slow
def test_the_whole_table(write_docs: Any) -> None:
    write_docs(PAGE, HEADER, ["|---|---|---|---|---|---|---|---|---|", *(row(*one) for one in ROWS)])


def commands() -> list[list[str]]:
    pages = PAGE.read_text(encoding="utf-8") + (ROOT / "docs" / "eight_gpus.md").read_text(encoding="utf-8")
    text = "".join(re.findall(r"^```bash\n(.*?)^```$", pages, re.DOTALL | re.MULTILINE))
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def test_every_command_of_the_pages_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher that it begins with, and by `perpo` as far as its settings; its files are there."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for command in commands():
        assert all((ROOT / word).exists() for word in command if word.startswith("recipes/"))
        launcher, rest = command[0], command[1:]
        if launcher == "head":
            continue
        if launcher == "torchrun":
            torch_args = torch_launcher().parse_args([word.replace("$RANK", "0") for word in rest])
            assert (torch_args.training_script, torch_args.module) == ("perpo", True)
            rest = torch_args.training_script_args
        elif launcher == "accelerate":
            args = launch.launch_command_parser().parse_args([word.replace("$RANK", "0") for word in rest[1:]])
            assert (rest[0], args.training_script, args.module) == ("launch", "perpo", True)
            rest = args.training_script_args
        else:
            assert launcher == "perpo"
        name, *words = rest
        module = importlib.import_module(cli.COMMANDS[name].module)
        if name == "train":
            words += ["--use_cpu", "true"]
        if "--deepspeed" in words:  # it is no part of perpo[test]
            i = words.index("--deepspeed")
            assert (ROOT / words[i + 1]).name == "zero3.json"
            del words[i : i + 2]
        parse(module.SETTINGS, words, f"perpo {name}")
        seen.add((launcher, name))
    assert {("torchrun", "generate"), ("torchrun", "train"), ("accelerate", "train"), ("perpo", "evaluate")} <= seen


def test_the_page_has_the_settings_of_the_files() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = {cells[0].split("]")[0].strip("["): cells for cells in table(text, "recipe | model")}
    for file in MODELS:
        recipe = settings(file)
        name, model, _, lists, images = rows.pop(file.stem)
        assert f"(models/{file.name})" in name
        assert model == f"`{recipe['model_name_or_path']}`"
        assert lists == str(recipe["per_device_train_batch_size"])
        assert yaml.safe_load(images.strip("`")) == recipe["processor_options"]
    assert not rows
    recipe = settings(RECIPES / "models" / "qwen2.5-vl-7b.yaml")
    for command in commands():
        if "--processor_options" in command:
            assert yaml.safe_load(command[command.index("--processor_options") + 1]) == recipe["processor_options"]
    align = settings(RECIPES / "align.yaml")
    trained = {**align["train"], **{name: align[name] for name in LoadSettings.__dataclass_fields__ if name in align}}
    del trained["gradient_accumulation_steps"], recipe["reference"]
    assert {**trained, "model_name_or_path": align["model_name_or_path"], "image_root": "images"} == recipe
