"""Does memory stay flat as T · V grows?

Hypothesis. Beyond its inputs the fused loss holds one chunk of logits (a constant of the device) and the gradient
of the hidden states [T, H]; plain PyTorch holds the logits, their log-softmax and their gradient, each T · V. At
T 1600, V 32000 on the CPU ours is at most a quarter of plain PyTorch's, and it stays where it is as T and V grow.

Floor. None: memory is counted by the allocator, exactly. `extra.logits_bytes` is the size of one [T, V].

Shapes. One curve over T at the head's V, one over V at a fixed T, one over k at a fixed length of the answers (so that
T grows with it); frozen and trainable head. The hidden size is narrow on the CPU (it does not change what is asked) and
full on a GPU.
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
    extra = {"logits_bytes": lists.n_tokens * head.n_vocab * p.hidden.element_size()}
    cases = [Case(OURS, ours(p, True), extra=extra)]
    for peer in peers.for_task("linear_log_probs"):
        if not peer.slow_start:
            case = theirs(peer, p, True)
            case.extra.update(extra)
            cases.append(case)
    name = f"over {point.curve}, {mode} T{lists.n_tokens} V{head.n_vocab} k{lists.k}"
    told = {**shapes(head, lists), "curve": point.curve, "head": mode}
    inspect("memory", name, cases, told, setting.dtype, memory=True)
