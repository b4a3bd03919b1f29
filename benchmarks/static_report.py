"""python -m benchmarks.static_report: what the compilers make of every kernel, for GPUs that are not there.

Hypothesis. At every configuration that the launchers choose, no kernel spills or touches local memory, its
shared memory fits, and whatever streams through a loop does so in 16-byte loads and stores, however a row is
aligned.

How. `benchmarks.kernel_cases` compiles what the launchers would launch. Registers, stack, local memory and machine code
are read from the cubin with the cuobjdump inside Triton, and from the assembly for AMD.

Columns. regs: a thread's (AMD: VGPRs). spill, stack, local: bytes a thread. shared: bytes a program. load,
store: bits of the narrowest and widest global access inside innermost loops. hints: what their loads and
stores ask of the caches, EL to keep the line and EF to let it go. The last columns are of the hot loop (the
innermost loop with the most exponentials): instructions, global loads, exponentials, shuffles, shared-memory
accesses and barriers; ex2/el and ins/el are per element that its loads bring in.
"""

import argparse
import fnmatch
import json
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from benchmarks.kernel_cases import TARGETS, Case, available, cases, compile_for
from benchmarks.machine_code import (
    ACCESS,
    bits,
    gcn_instructions,
    hint,
    innermost,
    kind,
    loops,
    nvidia,
    sass_instructions,
)

# ---- what is read off ------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One compiled kernel. Bytes are per thread, shared memory's per program; of loads and stores, bits."""

    kernel: str
    case: str
    target: str
    meta: dict[str, Any]
    registers: int
    spilled: int
    stack: int
    local: int
    shared: int
    shared_limit: int
    loads: tuple[int, int] | None  # narrowest and widest inside innermost loops
    stores: tuple[int, int] | None
    load_hints: list[str]  # EL and EF, of the same
    store_hints: list[str]
    hot_loads: list[int]
    hot_stores: list[int]
    hot: dict[str, int]  # instructions and counts of ACCESS
    elements: int  # that the hot loop's loads bring to a thread in one turn
    fp64: int
    wide_offsets: bool
    globals: list[str]  # that Triton compares with what they were, at each launch

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.case}/{self.target}"


def offsets_are_64_bit(ttir: str) -> bool:
    """No scalar product is taken in 32 bits, and what is added to the pointers of a matrix has 64."""
    narrow = re.search(r"arith\.muli .*: i32( |$)", ttir, re.MULTILINE)
    rows = re.findall(r"tt\.addptr %(?:logits|out)\b[^:\n]*: [^,\n]*, (\w+)", ttir)
    return narrow is None and all(width == "i64" for width in rows) and ("%stride" not in ttir or bool(rows))


def read(case: Case, target: str) -> Row:
    gpu, limit = TARGETS[target]
    kernel = compile_for(gpu, case.call)
    amd = gpu.backend == "hip"
    if amd:
        assembly = kernel.asm["amdgcn"]
        code = gcn_instructions(assembly)

        def number(key: str) -> int:
            return int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[0])

        registers, stack = number("vgpr_count"), number("private_segment_fixed_size")
        spilled, local = 4 * (number("vgpr_spill_count") + number("sgpr_spill_count")), stack
    else:
        cubin = kernel.asm["cubin"]
        code = sass_instructions(cubin)
        usage = nvidia("cuobjdump", "--dump-resource-usage", cubin)
        registers, stack, local = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
        spilled = sum(bits(x.text) // 8 for x in code if re.search(r"\bSTL\b", x.text))

    whole = loops(code)
    leaves = [leaf for loop in whole for leaf in innermost(code, loop)]
    looping = [code[i].text for i in sorted(set().union(*leaves))]
    bodies = [[code[i].text for i in sorted(leaf)] for leaf in leaves]
    hot = max(bodies, key=lambda body: (len(kind("ex2", body, amd)), len(body)), default=[])
    hot_loads = [bits(x) for x in kind("load", hot, amd)]

    def span(name: str) -> tuple[int, int] | None:
        widths = [bits(x) for x in kind(name, looping, amd)]
        return (min(widths), max(widths)) if widths else None

    def hints(name: str) -> list[str]:
        return sorted({hint(x) for x in kind(name, looping, amd)} - {""})

    constants = {k: v for k, v in kernel.metadata._asdict().items() if k in ("num_warps", "num_stages")}
    return Row(
        kernel=case.kernel,
        case=case.case,
        target=target,
        meta=constants,
        registers=registers,
        spilled=spilled,
        stack=stack,
        local=local,
        shared=kernel.metadata.shared,
        shared_limit=limit,
        loads=span("load"),
        stores=span("store"),
        load_hints=hints("load"),
        store_hints=hints("store"),
        hot_loads=hot_loads,
        hot_stores=[bits(x) for x in kind("store", hot, amd)],
        hot={"instructions": len(hot)} | {name: len(kind(name, hot, amd)) for name in ACCESS},
        elements=sum(hot_loads) // (8 * case.itemsize),
        fp64=len(kind("fp64", (x.text for x in code), amd)),
        wide_offsets=offsets_are_64_bit(kernel.asm["ttir"]),
        globals=[name for name, _ in kernel.src.fn.used_global_vals],
    )


# ---- the report ------------------------------------------------------------------------------------------------------


def line(row: Row) -> list[str]:
    def width(span: tuple[int, int] | None) -> str:
        return "-" if span is None else str(span[0]) if span[0] == span[1] else f"{span[0]}..{span[1]}"

    per = (lambda n: f"{n / row.elements:.2f}") if "rows" in row.kernel and row.elements else lambda n: ""
    hot = row.hot
    numbers = [row.meta["num_warps"], row.registers, row.spilled, row.stack, row.local, row.shared]
    return [
        row.kernel,
        row.case,
        row.target,
        *map(str, numbers),
        width(row.loads),
        width(row.stores),
        "/".join("+".join(h) or "-" for h in (row.load_hints, row.store_hints)),
        *(str(hot[x]) for x in ("instructions", "load", "ex2", "shuffle", "shared", "barrier")),
        per(hot["ex2"]),
        per(hot["instructions"]),
    ]


HEADER = "kernel,case,target,warps,regs,spill,stack,local,shared,load,store,hints,"
HEADER += "hot:ins,load,ex2,shfl,shm,bar,ex2/el,ins/el"


def table(rows: Iterable[Row]) -> str:
    lines = [HEADER.split(","), *map(line, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(cells, widths, strict=True)).rstrip() for cells in lines)


def read_named(name: str) -> Row:
    """A worker's job: cases hold closures, so it is their name that travels."""
    kernel, case, target = name.split("/")
    return read(next(c for c in cases() if (c.kernel, c.case) == (kernel, case)), target)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of kernel/case/target, * and ?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compile in so many processes")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the kernels are Python functions then. Unset it, or set it to 0.")

    targets = [t for t in TARGETS if available(t)]
    for missing in TARGETS.keys() - set(targets):
        print(f"{missing}: left out, this Triton has no assembler for it", file=sys.stderr)
    names = [f"{c.kernel}/{c.case}/{t}" for t in targets for c in cases()]
    names = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in options.only)]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(read_named, names))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
