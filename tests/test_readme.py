"""The README's examples run as they stand."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import perpo_kernels as pk

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def names() -> dict[str, Any]:
    """What a reader has at hand: two lists of three answers, a model, its batch."""
    torch.manual_seed(0)
    n_answers, n_tokens, n_vocab, n_hidden = 6, 9, 32, 8
    answer = torch.zeros(n_answers, n_tokens, dtype=torch.bool)
    answer[:, 4:7] = True
    states = torch.randn(n_answers, n_tokens, n_hidden, requires_grad=True)
    labels = torch.randint(n_vocab, (n_answers, n_tokens))
    return {
        "model": SimpleNamespace(
            model=lambda ids: SimpleNamespace(last_hidden_state=states),
            lm_head=SimpleNamespace(weight=torch.randn(n_vocab, n_hidden)),
        ),
        "batch": {"ids": labels},
        "predicts_response": answer.flatten(),
        "labels": labels[answer],
        "rewards": torch.rand(n_answers),
        "cu_seqlens": pk.layout.cumulative([3] * n_answers),
        "cu_lists": pk.layout.cumulative([3, 3]),
        "ref_log_probs": -10 * torch.rand(n_answers),
    }


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 2


def test_from_hidden_states() -> None:
    scope = names()
    exec(EXAMPLES[0], scope)
    assert torch.isfinite(scope["out"].loss)
    assert set(scope["out"].metrics) >= {"rewards/chosen", "rewards/rejected", "rewards/margins"}


def test_from_logits() -> None:
    scope = names()
    logits = torch.randn(6, 9, 32, requires_grad=True)
    scope |= {"pk": pk, "logits": logits, "labels": torch.randint(32, (6, 9)), "G": 2, "k": 3}
    scope |= {name: scope[name].view(2, 3) for name in ("rewards", "ref_log_probs")}
    exec(EXAMPLES[1], scope)
    scope["loss"].backward()
    assert logits.grad is not None
    assert float(logits.grad[:, -1].abs().max()) == 0  # nothing follows the last position


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"\]\(((?:docs|perpo|perpo_kernels)/[^)]+)\)", README.read_text())))
)
def test_every_link_leads_somewhere(target: str) -> None:
    name, _, heading = target.partition("#")
    file = README.parent / name
    assert file.exists()
    if heading:
        headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {one.lower().replace(" ", "-") for one in headings}
