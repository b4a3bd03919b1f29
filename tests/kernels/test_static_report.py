"""What the compilers make of the kernels, checked without a GPU: no spills, 16-byte streams, 64-bit row offsets.

The cases cover each kernel, each target, each type and each alignment of a row at least once;
`python -m benchmarks.static_report` prints all of them. The kernels are compiled in a process of their own: in this one
they may be interpreted functions.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CASES = (
    "*rows*/bf16 32000/sm_90",  # every row kernel, aligned rows
    "fused_rows_/bf16 32001/sm_80",  # an odd row length: a row may start anywhere
    "log_prob_rows/bf16 32004/sm_90",
    "grad_rows_/bf16 32008/sm_80",  # divisible by 8 and not by 16
    "*_rows*/bf16 262208 capped/sm_90",  # the most registers
    "fused_rows_/bf16 152064/sm_100",  # the most threads
    "grad_rows_/fp32 32000/sm_90",
    "log_prob_rows/fp16 32000/sm_80",
    "list_loss*/k 20/sm_90",
    "list_loss (tokens)/k 64/sm_100",
    "list_loss (sequences)/k 64/sm_80",
    "list_loss*/k 20 mdpo/sm_80",  # the most registers of the family
    "list_loss*/k 20 */sm_90",  # every objective
    "fused_rows_/bf16 32000/gfx942",
    "list_loss (tokens)/k 1024/gfx942",
)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    file = tmp_path_factory.mktemp("static_report") / "rows.json"
    command = [sys.executable, "-m", "benchmarks.static_report", "--jobs", "2", "--json", str(file), "--only", *CASES]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def failing(rows: list[Row], good: Any) -> list[str]:
    return [f"{r['kernel']}/{r['case']}/{r['target']}: {r}" for r in rows if not good(r)]


def of_rows(rows: list[Row]) -> list[Row]:
    return [r for r in rows if "rows" in r["kernel"]]


def reading(rows: list[Row]) -> list[Row]:
    """Row kernels that read rows: `clear_rows_` writes alone."""
    return [r for r in of_rows(rows) if r["kernel"] != "clear_rows_"]


def test_every_kernel_and_target_is_covered(rows: list[Row]) -> None:
    from benchmarks.kernel_cases import TARGETS, available, cases

    assert {r["kernel"] for r in rows} == {c.kernel for c in cases()}
    assert {r["target"] for r in rows} == {t for t in TARGETS if available(t)}


def test_nothing_spills_or_lives_in_local_memory(rows: list[Row]) -> None:
    assert not failing(rows, lambda r: r["spilled"] == r["stack"] == r["local"] == 0)


def test_shared_memory_fits_the_chip(rows: list[Row]) -> None:
    assert not failing(rows, lambda r: r["shared"] <= r["shared_limit"])


def test_registers_allow_the_launched_threads(rows: list[Row]) -> None:
    on_cuda = [r for r in rows if r["target"].startswith("sm_")]
    assert not failing(on_cuda, lambda r: r["registers"] <= min(128, 65536 // (32 * r["meta"]["num_warps"])))


def test_rows_stream_in_16_byte_vectors_at_every_alignment(rows: list[Row]) -> None:
    """Also where V is odd: the body of a row is aligned, the few elements around it lie outside the loops."""
    assert not failing(reading(rows), lambda r: r["loads"] == [128, 128])
    writing = [r for r in of_rows(rows) if not r["kernel"].startswith("log_prob")]
    assert not failing(writing, lambda r: r["stores"] == [128, 128])


def test_row_loops_exchange_nothing_between_threads(rows: list[Row]) -> None:
    assert not failing(reading(rows), lambda r: r["hot"]["shuffle"] == r["hot"]["shared"] == r["hot"]["barrier"] == 0)


def resident_threads(r: Row) -> int:
    """That run at once on a multiprocessor of 65536 registers."""
    threads, granules = 32 * r["meta"]["num_warps"], -(-r["registers"] // 8)
    return threads * min(2048 // threads, 65536 // (8 * granules * threads))


def test_a_multiprocessor_has_32_kib_of_rows_in_flight(rows: list[Row]) -> None:
    """A multiprocessor's share of memory bandwidth, 25 to 36 bytes/ns, times the latency of 0.8 µs is 20 to 29 KB."""
    on_cuda = [r for r in reading(rows) if r["target"].startswith("sm_")]
    assert not failing(on_cuda, lambda r: resident_threads(r) * sum(r["hot_loads"]) // 8 >= 32 << 10)


def test_two_rows_at_least_are_summed_up_at_once_on_a_multiprocessor(rows: list[Row]) -> None:
    """One streams while the other waits at its end."""
    summed = [r for r in reading(rows) if r["target"].startswith("sm_") and not r["kernel"].startswith("grad")]
    assert not failing(summed, lambda r: resident_threads(r) >= 2 * 32 * r["meta"]["num_warps"])


def test_a_row_that_is_swept_again_is_to_stay_in_the_caches_and_else_to_go(rows: list[Row]) -> None:
    on_cuda = [r for r in reading(rows) if r["target"].startswith("sm_")]
    assert not failing(on_cuda, lambda r: r["load_hints"] == ["EF", "EL"][: 1 + r["kernel"].startswith("fused")])
    assert not failing(on_cuda, lambda r: r["store_hints"] == ["EF"][: not r["kernel"].startswith("log_prob")])


def test_an_element_under_a_soft_cap_costs_at_most_24_instructions_and_30_with_its_slope(rows: list[Row]) -> None:
    """Without a cap it is 9. One division, and an exponential more where the slope is taken."""
    capped = [r for r in rows if "cap" in r["case"] and r["target"].startswith("sm_")]
    assert capped
    assert not failing(capped, lambda r: r["hot"]["rcp"] == r["elements"])
    with_slope = 2 * 1.01
    assert not failing(capped, lambda r: r["hot"]["ex2"] <= with_slope * r["elements"])
    assert not failing(capped, lambda r: r["hot"]["instructions"] <= 30 * r["elements"])
    read = [r for r in capped if r["kernel"] == "log_prob_rows"]
    assert not failing(read, lambda r: r["hot"]["instructions"] <= 24 * r["elements"])


def test_row_loops_divide_nothing(rows: list[Row]) -> None:
    plain = [r for r in of_rows(rows) if "cap" not in r["case"]]  # tanh is a quotient
    assert not failing(plain, lambda r: r["hot"]["rcp"] == 0)


def test_list_loops_exchange_nothing_between_threads(rows: list[Row]) -> None:
    perpo = [r for r in rows if r["kernel"].startswith("list") and r["case"][2:].isdigit()]
    assert not failing(perpo, lambda r: r["hot"]["shuffle"] == r["hot"]["shared"] == r["hot"]["barrier"] == 0)


def test_a_row_costs_at_most_an_eighth_more_exponentials_than_elements(rows: list[Row]) -> None:
    plain = [r for r in of_rows(rows) if "cap" not in r["case"]]
    vector = {"bf16": 8, "fp16": 8, "fp32": 4}
    assert not failing(plain, lambda r: r["hot"]["ex2"] <= r["elements"] * (1 + 1 / vector[r["case"][:4]]))


def test_nothing_is_computed_in_double_precision(rows: list[Row]) -> None:
    assert not failing(rows, lambda r: r["fp64"] == 0)


def test_a_launch_compares_no_globals(rows: list[Row]) -> None:
    """Triton does so on the host: seventeen constants were a third of the time of a launch of the list loss."""
    assert not failing(rows, lambda r: r["globals"] == [])


def test_row_offsets_are_64_bit(rows: list[Row]) -> None:
    """A row's number times its stride passes 2³¹ in real use."""
    assert not failing(of_rows(rows), lambda r: r["wide_offsets"])
