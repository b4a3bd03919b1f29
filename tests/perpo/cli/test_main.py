"""`perpo` and `perpo train`: from files to a saved model, and errors that say what to do."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel

from perpo.cli import main as cli
from perpo.cli import train as train_command
from perpo.cli.settings import ModelConfig, parse
from perpo.encoding.encoder import Encoder
from perpo.model.load import load_model, load_processor
from perpo.sampling.candidates import parts_folder

from .. import tiny_models, tiny_runs


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return tiny_runs.save_run(
        tmp_path,
        learning_rate="1e-3",
        lora_alpha=8,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def test_from_files_to_a_saved_adapter(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(project / "model")]
    assert cli.main(["train", "--config", str(project / "run.yaml"), "--max_steps", "3", *model]) == 0
    assert "4 lists of 2–3 answers" in capsys.readouterr().out
    state = json.loads((project / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3  # the command line wins
    assert "lists/kendall_tau" in state["log_history"][0]
    adapted = PeftModel.from_pretrained(load_model(str(project / "model")), str(project / "out"))
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in adapted.named_parameters())
    assert load_processor(str(project / "out")).chat_template == tiny_models.LLAVA_TEMPLATE
    # again, with resume: all is done already
    again = ["train", "--config", str(project / "run.yaml"), "--max_steps", "3", "--resume_from_checkpoint", "true"]
    assert cli.main(again) == 0
    assert json.loads((project / "out" / "trainer_state.json").read_text())["global_step"] == 3


def test_lists_sampled_at_another_image_size_are_noticed(project: Path, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(train_command.logger, "propagate", True)
    parts = parts_folder(project / "lists.jsonl")
    parts.mkdir()
    processor = load_processor(str(project / "model"))
    same = Encoder.for_model(processor, load_model(str(project / "model"))).fingerprint()["image processor"]
    for sampled, expected in ((same, False), ("another", True)):
        (parts / "identity.json").write_text(json.dumps({"image processor": sampled}))
        caplog.clear()
        given = ["--max_steps", "1", "--save_strategy", "no"]
        assert cli.main(["train", "--config", str(project / "run.yaml"), *given]) == 0
        assert ("other settings of the image processor" in caplog.text) == expected


def test_an_objective_from_the_command_line_and_from_yaml(project: Path) -> None:
    run = project / "run.yaml"
    run.write_text(run.read_text() + "\nsave_strategy: 'no'\n")
    given = ["--objective", "cdpo", "--objective_options", '{"epsilon": 0.2}', "--max_steps", "1"]
    assert cli.main(["train", "--config", str(run), *given]) == 0
    of_command_line = json.loads((project / "out" / "trainer_state.json").read_text())["log_history"][0]
    settings = yaml.safe_load(run.read_text()) | {
        "objective": "cdpo",
        "objective_options": {"epsilon": 0.2},
        "max_steps": 1,
    }
    run.write_text(yaml.safe_dump(settings))
    assert cli.main(["train", "--config", str(run)]) == 0
    of_yaml = json.loads((project / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert of_yaml["grad_norm"] == of_command_line["grad_norm"]
    assert cli.main(["train", "--config", str(run), "--objective", "dpo", "--objective_options", "{}"]) == 0
    of_dpo = json.loads((project / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert of_yaml["grad_norm"] == pytest.approx(0.6 * of_dpo["grad_norm"], rel=1e-3)  # (1 − 2ε) where scores are 0


def test_mdpo_from_the_command_line(project: Path) -> None:
    given = ["--objective", "mdpo", "--image_corruption", "noise", "--max_steps", "1"]
    assert cli.main(["train", "--config", str(project / "run.yaml"), *given]) == 0
    log = json.loads((project / "out" / "trainer_state.json").read_text())["log_history"][0]
    assert log["loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betta", "1"], "--betta"),
        (["--beta", "0"], "beta must be a finite number > 0, got 0.0"),
        (["--gamma", "-1"], "gamma must be a finite number >= 0"),
        (["--objective", "lippo"], "objective must be one of perpo, uniform_pairs, dpo,"),
        (["--objective", "lipo", "--gamma", "1"], "gamma: objective='lipo' does not take it; it takes beta"),
        (["--objective", "rosepo"], "train_dataset record 'r0' has no flip_probs, which objective='rosepo' takes"),
        (["--reference", "nothing"], "invalid choice: 'nothing'"),
        (["--max_candidates", "1"], "max_candidates must be ≥ 2"),
        (["--ref_model_name_or_path", "x"], "set reference='model'"),
        (["--train_lm_head"], "train_lm_head needs --lora false"),
        (["--reference", "adapter_off", "--lora", "false"], "needs a model with adapters"),
        (["--reference", "data"], "train_dataset record 'r0' has no ref_log_probs"),
        (["--min_candidates", "9"], "no list has min_candidates=9 candidates"),
        (["--max_prompt_length", "7"], "record 'r0': max_prompt_length=7: this prompt has"),
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_name_or_path", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_settings_are_named(
    arguments: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["train", "--config", str(project / "run.yaml"), *arguments])
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_misspelt_setting_in_the_file_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = project / "run.yaml"
    file.write_text(file.read_text() + "\nbetaa: 0.2\n")
    with pytest.raises(SystemExit):
        cli.main(["train", "--config", str(file)])
    assert "sets 'betaa', which is not a setting; did you mean 'beta'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modle", "x"], "perpo train: --modle is not a setting; did you mean 'model'?"),
        (["--learning_rte=1"], "--learning_rte is not a setting; did you mean 'learning_rate'?"),
        (["--learn", "1"], "--learn is not a setting"),  # no abbreviations: a new setting would change what they mean
        (["--qqqq"], "--qqqq is not a setting; perpo train --help lists them"),
        (["run.yaml"], "'run.yaml' does not belong to a setting; write --name value"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_what_is_no_setting_is_named_with_what_is_near(
    arguments: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(project / "run.yaml"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: \xff", "run.yaml: not valid YAML: 'utf-8' codec can't decode"),
        (b"seed: " + b"9" * 5000, "run.yaml: not valid YAML: Exceeds the limit"),
        (b"fsdp: " + b"[" * 5000, "run.yaml: not valid YAML: it is nested too deeply"),
        (b"seed: [1", "run.yaml: not valid YAML: while parsing a flow sequence"),
        (b"seed: 1\nseed: 2", "run.yaml: not valid YAML: 'seed' is set twice"),
        (b"model: a\nmodel_name_or_path: b", "run.yaml sets 'model_name_or_path' twice"),
        (b"- seed", "run.yaml must hold lines `name: value`"),
        (b"no_lora: true", "sets 'no_lora', which is not a setting"),
        (b"config: x.yaml", "sets 'config', which only the command line can"),
        (None, "run.yaml' is not a regular file but a folder, a pipe or a device"),
        (..., "No such file or directory: "),
    ],
)
def test_a_file_that_cannot_be_read_is_a_message(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is None:
        os.mkfifo(tmp_path / "run.yaml")
    elif content is not ...:
        (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", str(tmp_path / "run.yaml")])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "perpo train: config: " in shown
    assert message in shown


def test_every_command_shows_where_an_error_comes_from_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*settings: Any) -> None:
        raise ValueError("no such luck")

    (tmp_path / "run.yaml").write_text("")
    for name, command in cli.COMMANDS.items():
        monkeypatch.setattr(f"{command.module}.run", fail)
        monkeypatch.setattr("perpo.cli.settings.parse", lambda *_: ())
        monkeypatch.delenv("PERPO_TRACEBACK", raising=False)
        assert cli.main([name]) == 1
        assert f"perpo {name}: no such luck\n(PERPO_TRACEBACK=1 shows" in capsys.readouterr().err
        monkeypatch.setenv("PERPO_TRACEBACK", "1")
        with pytest.raises(ValueError, match="no such luck"):
            cli.main([name])


@dataclass
class Settings:
    names: list[str] = field(default_factory=list)
    engine: str = field(default="plain", metadata={"choices": ["plain", "fast"]})
    n: int = 1
    share: float | None = None
    check: bool = True
    options: dict[str, Any] | str | None = None
    folder: str = "."


def given(tmp_path: Path, **settings: Any) -> Settings:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return parse([Settings], ["--config", str(tmp_path / "run.yaml")], "perpo")[0]


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("names", "base=path", ["base=path"]),  # not its letters
        ("names", ["a", 5], ["a", "5"]),
        ("names", {"base": "path"}, ["base=path"]),
        ("engine", "fast", "fast"),
        ("n", "3", 3),
        ("share", "5e-1", 0.5),
        ("share", None, None),
        ("share", 1, 1.0),
        ("check", False, False),
        ("check", "no", False),
        ("options", {"a": [1]}, {"a": [1]}),
        ("folder", 2024, "2024"),
        ("folder", True, "true"),
    ],
)
def test_a_file_sets_what_the_command_line_would(name: str, value: Any, read: Any, tmp_path: Path) -> None:
    found = getattr(given(tmp_path, **{name: value}), name)
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("engine", "Fast", "invalid choice: 'Fast' (choose from"),
        ("n", 2.5, "invalid int value: '2.5'"),
        ("n", True, "invalid int value: 'true'"),
        ("n", None, "must be a single value, got None"),
        ("n", [1], "must be a single value, got [1]"),
        ("share", "half", "invalid float value: 'half'"),
        ("check", "perhaps", "Truthy value expected"),
        ("folder", {"a": 1}, "must be a single value, got {'a': 1}"),
        ("names", [["a"]], "must be a single value, got ['a']"),
    ],
)
def test_a_file_is_checked_as_the_command_line_is(
    name: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        given(tmp_path, **{name: value})
    shown = capsys.readouterr().err
    assert message in shown
    assert f"run.yaml: argument --{name}" in shown


def test_an_error_names_the_source_of_the_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("n: 2\nshare: half\n")
    config = ["--config", str(tmp_path / "run.yaml")]
    assert parse([Settings], [*config, "--share", "0.5"], "perpo")[0].share == 0.5  # the file's own is not used
    with pytest.raises(SystemExit):
        parse([Settings], [*config, "--share", "0.5", "--n", "half"], "perpo")
    assert "perpo: argument --n: invalid int value: 'half'" in capsys.readouterr().err


def test_help_is_quick_and_lists_the_commands() -> None:
    code = "import sys, perpo.cli.main; perpo.cli.main.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, "torch was imported"
    assert "train " in done.stdout


FIRST_LINES = """\
perpo align: sample, train and evaluate in rounds, from labelled images to an aligned model
perpo coco: grounding records from a COCO-style file
perpo generate: sample and score candidate answers: lists for `perpo train`
perpo score: rewards for answers that exist, from any source: lists for `perpo train`
perpo plan: what a training step costs and what fits on a GPU
perpo train: align a vision-language model with lists of scored answers
perpo evaluate: compare models on held-out records, with and without the image
perpo merge: add an adapter to its base model's weights
"""


def test_help_begins_with_what_a_command_does(capsys: pytest.CaptureFixture[str]) -> None:
    first = []
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        line, empty, usage = capsys.readouterr().out.split("\n")[:3]
        assert not empty
        assert usage.startswith(f"usage: perpo {command} ")
        first.append(line + "\n")
    assert "".join(first) == FIRST_LINES


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_takes_a_file(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--config FILE.yaml holds them" in cli.usage()
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert "--config" in capsys.readouterr().out


def test_an_unknown_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_the_help_of_train_shows_what_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in ("--model_name_or_path", "--train_file", "--lora_r", "--beta", "--reference", "--bf16", "--output_dir"):
        assert name in shown
    assert "--hub_token" not in shown
    assert len(shown.splitlines()) < 200


def test_processor_options_are_a_mapping_on_the_command_line() -> None:
    (model,) = parse(
        [ModelConfig], ["--model_name_or_path", "m", "--processor_options", '{"max_pixels": 401408}'], "perpo"
    )
    assert model.processor_options == {"max_pixels": 401408}


@pytest.mark.parametrize("value", ['{"size": 1e-3, "a": {}}', "{size: 0.001, a: {}}", "size: 0.001\na: {}"])
def test_json_and_yaml_mappings_are_taken_alike(value: str, tmp_path: Path) -> None:
    given = ["--model", "m", f"--processor_options={value}"]
    assert parse([ModelConfig], given, "perpo")[0].processor_options == {"size": 0.001, "a": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": "m", "processor_options": value}))
    given = ["--config", str(tmp_path / "run.yaml")]
    assert parse([ModelConfig], given, "perpo")[0].processor_options == {"size": 0.001, "a": {}}


@pytest.mark.parametrize("value", ["[1]", "{"])
def test_processor_options_that_are_no_mapping_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([ModelConfig], ["--model_name_or_path", "m", "--processor_options", value], "perpo")
    assert "processor_options must be a" in capsys.readouterr().err
