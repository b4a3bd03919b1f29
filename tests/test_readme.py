"""The README is short, its example runs as it stands, and its figures are those of the measured rows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from perpo_kernels import objectives

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
TABLES = (ROOT / "docs" / "benchmarks" / "tables.md").read_text(encoding="utf-8")


def table(text: str, heading: str) -> list[list[str]]:
    """The rows below the heading row that begins with `heading`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1500
    assert len(re.findall(r"!\[", README)) == 1


def test_its_example_runs_as_it_stands() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(example, "README.md", "exec"), scope)
    model, inputs, labels, rewards, out = (scope[name] for name in ("model", "inputs", "labels", "rewards", "out"))
    assert out.metrics.keys() >= {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    assert not out.scores.any()

    # the same by the definition: log-probs through all logits, and PerPO over all pairs with γ = 0.5
    ours = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    answer, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    log_probs = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    scores = (log_probs * answer).sum(1)
    assert torch.allclose(out.log_probs, scores, atol=1e-4)
    scores = scores - scope["ref_log_probs"]
    i, j = (rewards[:, None] > rewards[None, :]).nonzero(as_tuple=True)
    weights = (rewards[i] - rewards[j]).sqrt()
    loss = (weights * torch.nn.functional.softplus(-0.1 * (scores[i] - scores[j]))).sum() / weights.sum()
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-5)
    model.zero_grad()
    loss.backward()
    assert torch.allclose(ours, model.model.layers[0].mlp.up_proj.weight.grad, atol=1e-6)


def test_it_counts_what_there_is() -> None:
    from perpo.model.sharing import VERIFIED

    assert f"**{len(objectives.PRESETS)} [objectives]" in README
    assert f"on {len(VERIFIED)} architectures" in README


def test_its_table_is_that_of_the_benchmarks_page() -> None:
    assert table(README, "P, R, k") == table(BENCHMARKS, "P, R, k")


@pytest.mark.parametrize("row", table(README, "P, R, k"), ids=lambda row: row[0])
def test_a_row_of_its_table_is_measured(row: list[str]) -> None:
    case, *figures, memory = row
    prompt, answer, k = case.split(", ")
    rows = TABLES.split("\n## step\n")[1].split(f"**llava P{prompt} R{answer} k{k}, float32**")[1]
    peers = {cells[0]: cells for cells in table(rows, "peer")}  # peer, ms, × floor, × ours, extra MiB, notes
    (ideal,) = re.findall(r"ideal_ratio: ([\d.]+)", peers["perpo_kernels, rows"][5])
    names = ("perpo_kernels, rows", "the authors' way", "TRL, k / 2 pairs", "TRL, best and worst")
    for figure, measured in zip(figures, [ideal, *(peers[name][3] for name in names)], strict=True):
        digits = len(figure.partition(".")[2])
        assert abs(float(figure) - float(measured)) <= 0.5 * 10**-digits + 1e-9, f"{case}: {figure} for {measured}"
    assert memory == f"{float(peers['perpo_kernels'][4]):.0f} / {peers[names[1]][4]} MiB"


def test_what_it_says_of_the_demo_is_recorded() -> None:
    results = json.loads((ROOT / "docs" / "demo" / "results.json").read_text())["results"]

    def mean(task: str, model: str, metric: str) -> float:
        values = [one["metrics"][metric] for one in results if (one["task"], one["model"]) == (task, model)]
        assert len(values) == 5
        return sum(values) / 5

    lifted = [mean("grounding", model, "ap50") for model in ("sft", "perpo")]
    exact = [100 * mean("ocr", model, "exact") for model in ("sft", "perpo")]
    words = " ".join(README.split())
    assert "lifts AP@50 from {:.2f} to {:.2f}".format(*lifted) in words
    assert "from {:.0f} % to {:.0f} %".format(*exact) in words
    assert f"{lifted[1] - mean('grounding', 'dpo', 'ap50'):.3f} ± " in words
