"""The code that Triton makes of every kernel configuration at its real shapes, for every target, as hashes.

    python -m tests.golden.kernels            # name the configurations that differ from kernels.json
    python -m tests.golden.kernels --ir       # the same by the front end alone: seconds instead of minutes
    python -m tests.golden.kernels --write    # renew it, after a change that is meant to change the kernels

A configuration has two hashes. `ir` is of Triton's IR after inlining and simplification, with the options of the
launch: all that the kernels and their launchers decide, what follows is the compiler's. `code` is of the PTX, or AMD's
assembly, that comes of it: another IR may still give the same code. Neither holds names, paths or line numbers.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import triton.compiler

from benchmarks.kernel_cases import TARGETS, cases, compile_for

FILE = Path(__file__).with_suffix(".json")
ASSEMBLY = ("ptx", "amdgcn")
Hashes = dict[str, str]  # "ir" and "code"


class Compiled:
    """In place of `triton.compile`: the front end, and on request the stages up to the assembly."""

    def __init__(self, ir_only: bool) -> None:
        self.ir_only = ir_only

    def __call__(self, src: Any, target: Any, options: dict[str, Any]) -> Hashes:
        from triton._C.libtriton import ir

        backend = triton.compiler.make_backend(target)
        chosen, default = backend.parse_options(dict(options)), backend.parse_options({})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        generators = backend.get_codegen_implementation(chosen), backend.get_module_map()
        module = src.make_ir(target, chosen, *generators, context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, chosen, src.language)
        metadata = {"target": target, **vars(chosen)}
        module = stages.pop("ttir")(module, metadata)
        launch = {key: value for key, value in sorted(vars(chosen).items()) if value != getattr(default, key)}
        hashes = {"ir": digest(f"{launch}\n{anonymous(module.str_nodebug(), src.name)}")}
        for stage in () if self.ir_only else stages:
            module = stages[stage](module, metadata)
            if stage in ASSEMBLY:
                hashes["code"] = digest(anonymous(re.sub(r"(//|;).*", "", module), src.name))
                break
        return hashes


def anonymous(text: str, kernel: str) -> str:
    """Without the kernel's name, indentation and empty lines."""
    lines = (line.strip() for line in text.replace(kernel, "kernel").splitlines())
    return "\n".join(line for line in lines if line)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hashes_of(name: str, ir_only: bool) -> Hashes:
    """Of a kernel/case/target: the cases hold closures, so it is the name that travels to a process."""
    kernel, case, target = name.split("/")
    call = next(c.call for c in cases() if (c.kernel, c.case) == (kernel, case))
    with (
        mock.patch.object(triton.compiler, "compile", Compiled(ir_only)),
        mock.patch.object(triton.knobs.compilation, "disable_line_info", True),
    ):
        return compile_for(TARGETS[target].gpu, call)


def names() -> list[str]:
    return [f"{case.kernel}/{case.case}/{target}" for target in TARGETS for case in cases()]


def kept() -> dict[str, Any]:
    """The file: the `triton` that wrote it, and `hashes` by kernel/case/target."""
    return json.loads(FILE.read_text())


def differences(kept: dict[str, Hashes], made: dict[str, Hashes]) -> dict[str, str]:
    """The configurations whose hashes are not the kept ones, and what of each is another."""
    found = {name: "gone" for name in kept.keys() - made.keys()} | {name: "new" for name in made.keys() - kept.keys()}
    for name in kept.keys() & made.keys():
        if changed := [key for key, value in made[name].items() if kept[name].get(key) != value]:
            found[name] = f"other {' and '.join(changed)}"
    return found


def report(found: dict[str, str]) -> str:
    """A line a kernel, case and kind of difference, with the targets."""
    targets: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, what in sorted(found.items()):
        case, _, target = name.rpartition("/")
        targets[case, what].append(target)
    return "\n".join(f"{case}: {what} ({', '.join(where)})" for (case, what), where in targets.items())


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--ir", action="store_true", help="leave the assembly out")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of kernel/case/target, * and ?")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compile in so many processes")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: the kernels are Python functions then. Unset it, or set it to 0.")
    for variable in [name for name in os.environ if name.startswith("TRITON_") and name != "TRITON_CACHE_DIR"]:
        del os.environ[variable]  # the shell's settings are not the kernels'
    if options.write and (options.ir or options.only != ["*"]):
        sys.exit("--write takes every configuration with both hashes; leave --ir and --only out")
    chosen = [name for name in names() if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    with ProcessPoolExecutor(options.jobs) as pool:
        made = dict(zip(chosen, pool.map(partial(hashes_of, ir_only=options.ir), chosen, chunksize=8), strict=True))
    before = kept() if FILE.exists() else {"triton": "none", "hashes": {}}
    if not options.write and before["triton"] != triton.__version__:
        sys.exit(f"{FILE.name} is of Triton {before['triton']}, this is {triton.__version__}: no two hashes compare")
    expected = before["hashes"] if options.only == ["*"] else {n: h for n, h in before["hashes"].items() if n in chosen}
    found = differences(expected, made)
    print(f"{len(made)} kernel configurations, {len(found)} not as kept in {FILE.name}", report(found), sep="\n")
    if options.write:
        lines = ",\n".join(f'  "{name}": {json.dumps(hashes)}' for name, hashes in made.items())
        FILE.write_text(f'{{"triton": "{triton.__version__}", "hashes": {{\n{lines}\n}}}}\n')
    elif found:
        sys.exit(1)


if __name__ == "__main__":
    main()
