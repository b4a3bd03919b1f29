"""The measuring itself: memory to the byte, cases in turn, ratios between neighbours in time."""

import pytest
import torch

from benchmarks.harness import BARE, FLOOR, OURS, Case, Race, peak_extra_bytes
from benchmarks.peers import list_loss_of_tokens, loop_list_loss, plain_linear_log_probs, plain_list_loss
from benchmarks.problems import HeadShape, ListShape, Setting, problem
from benchmarks.test_linear_loss import ours
from perpo_kernels import reference
from perpo_kernels.problem import ListProblem

CPU = Setting("cpu", "tiny")


def test_peak_memory_is_exact_on_the_cpu():
    def run():
        a, b = torch.empty(1 << 20), torch.empty(1 << 19)
        del a
        c = torch.empty(1 << 18)
        return b, c

    assert peak_extra_bytes(run, "cpu") == 4 * ((1 << 20) + (1 << 19))


def test_frozen_head_takes_a_quarter_of_the_memory_of_plain_pytorch_and_no_more_for_more_logits():
    """T 1600, V 32000, k 20, as required; a narrow H, which the logits do not depend on."""

    lists = ListShape(2, 20, 40)
    p = problem(HeadShape("", 32000, 16), lists, CPU)

    def plain():
        tokens = plain_linear_log_probs(p.hidden, p.weight, p.labels)
        return torch.autograd.grad(list_loss_of_tokens(tokens, p), p.hidden)

    small = peak_extra_bytes(ours(p, True), "cpu")
    assert small <= peak_extra_bytes(plain, "cpu") / 4
    twice = problem(HeadShape("", 64000, 16), lists, CPU)
    assert peak_extra_bytes(ours(twice, True), "cpu") <= 1.1 * small


def test_cases_take_turns_and_ratios_are_of_the_same_round():
    order = []
    ticks = iter(range(1000))
    speeds = {OURS: 3, FLOOR: 1}  # a slow second half: both by ten

    def case(name):
        def run():
            order.append(name)
            for _ in range(speeds[name] * (1 if len(order) < 8 else 10)):
                next(ticks)

        return Case(name, run, prepare=lambda: None)

    race = Race([case(OURS), case(FLOOR)], "cpu", memory=False, clock=lambda: next(ticks))
    race.warm_up()
    for _ in range(4):
        race.round()
    assert sorted(order[4:6]) == sorted(order[6:8]) == sorted([OURS, FLOOR])
    first = [ours / floor for ours, floor in zip(race.cases[0].samples, race.cases[1].samples, strict=True)]
    assert race.ratio(race.cases[0], FLOOR) == pytest.approx(sorted(first)[1] / 2 + sorted(first)[2] / 2)


def test_a_peer_that_fails_is_a_row_with_its_reason_and_ours_is_an_error():
    def broken():
        raise RuntimeError("no such luck\nwith a second line")

    race = Race([Case(OURS, lambda: None), Case("peer", broken)], "cpu", memory=False)
    race.warm_up()
    race.round()
    row = race.rows("q", "c", {}, "float32")[1]
    assert not row["ok"]
    assert row["reason"] == "RuntimeError: no such luck"
    with pytest.raises(RuntimeError, match="no such luck"):
        Race([Case(OURS, broken)], "cpu", memory=False).warm_up()


def test_every_case_runs_before_it_is_timed_and_a_slow_one_is_sampled_twice():
    ticks = iter(range(0, 1000, 25))  # every look at the clock is 25 s after the last
    runs = []
    slow = Case("slow", lambda: runs.append("slow"))
    race = Race([slow], "cpu", memory=False, clock=lambda: next(ticks))
    race.warm_up()
    assert runs == ["slow"]
    for _ in range(4):
        race.round()
    assert slow.samples == [25, 25]


def test_what_a_sample_prepares_is_released_after_it():
    held = []
    most = []
    case = Case(FLOOR, lambda: most.append(len(held)), prepare=lambda: held.append(1), release=held.clear)
    race = Race([case], "cpu", memory=True)
    race.warm_up()
    race.round()
    assert set(most) == {1}
    assert not held


@pytest.mark.parametrize("name", [OURS, f"{OURS}, rows", FLOOR, f"{BARE}, in chunks"])
def test_what_is_ours_may_not_fail_but_for_want_of_memory(name):
    def broken():
        raise RuntimeError("no such luck")

    def too_large():
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(RuntimeError, match="no such luck"):
        Race([Case(name, broken)], "cpu").warm_up()
    race = Race([Case(name, too_large)], "cpu")
    race.warm_up()
    assert race.rows("q", "c", {}, "float32")[0]["reason"] == "out of memory"


@pytest.mark.parametrize("head", [HeadShape("", 32000, 512), HeadShape("", 131072, 256)])
def test_logits_are_peaked_at_the_label_as_those_of_a_trained_model(head):
    torch.manual_seed(0)
    p = problem(head, ListShape(1, 4, 40), CPU)
    mean = plain_linear_log_probs(p.hidden.detach(), p.weight, p.labels).mean()
    assert -1.3 < mean < -0.7


def test_the_peers_written_here_compute_the_same_loss():
    log_probs = torch.randn(3, 6, dtype=torch.float64)
    rewards = torch.rand(3, 6, dtype=torch.float64).sort(descending=True).values
    ref = torch.randn(3, 6, dtype=torch.float64)
    problem = ListProblem(rewards.flatten(), torch.arange(4) * 6, ref_log_probs=ref.flatten())
    exact = reference.list_losses(log_probs.flatten(), problem).mean()
    torch.testing.assert_close(plain_list_loss(log_probs, rewards, ref), exact)
    torch.testing.assert_close(loop_list_loss(log_probs, rewards, ref), exact)
