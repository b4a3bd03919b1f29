"""Does memory stay flat as T · V grows?

Hypothesis. Beyond its inputs the fused loss holds one chunk of logits (a constant of the device), the gradient of the
hidden states [T, H] and, where the head is trained, that of the head [V, H]; plain PyTorch holds the logits, their
log-softmax and their gradient, each T · V. At T 1600, V 32000 on the CPU ours is at most a quarter of plain PyTorch's;
from one chunk on (100 MiB on the CPU) it grows with [T, H] and [V, H] alone.

Floor. None: memory is counted by the allocator, exactly. `extra.logits_bytes` is the size of one [T, V],
`extra.gradient_bytes` that of the gradients that must be returned: nobody can hold less.

Shapes. One curve over T at the head's V, one over V at a fixed T, one over k at a fixed length of the answers (so that
T grows with it); frozen and trainable head. H 1024 on the CPU and few points, one run each; H 3584 on a GPU. The curve
over V passes the 32768 from which TRL works in chunks.
"""

from typing import Any

import pytest

from benchmarks import peers
from benchmarks.harness import OURS, Case
from benchmarks.problems import Point, Setting, problem, shapes
from benchmarks.test_linear_loss import ours, theirs


@pytest.mark.parametrize("mode", ["frozen", "trainable"])
def test_memory(benchmark: Any, inspect: Any, setting: Setting, point: Point, mode: str) -> None:
    _, head, lists = point
    p = problem(head, lists, setting, mode == "trainable")
    size = p.hidden.element_size()
    gradients = lists.n_tokens * head.n_hidden + (head.n_vocab * head.n_hidden if mode == "trainable" else 0)
    extra = {"logits_bytes": lists.n_tokens * head.n_vocab * size, "gradient_bytes": gradients * size}
    cases = [Case(OURS, ours(p, True), extra=extra)]
    for peer in peers.for_task("linear_log_probs"):
        case = theirs(peer, p, True)
        case.extra.update(extra)
        elsewhere = "its memory is counted with its time"
        case.problem = case.problem or peers.compiles_elsewhere(peer, setting.size, False, elsewhere)
        cases.append(case)
    name = f"over {point.curve}, {mode} T{lists.n_tokens} V{head.n_vocab} k{lists.k}"
    measured = {**shapes(head, lists), "curve": point.curve, "head": mode}
    inspect("memory", name, cases, measured, setting.dtype, memory=True)
