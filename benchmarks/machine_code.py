"""Machine code as a graph: what the loops of a compiled kernel are, and which instructions stand in them.

A cubin is disassembled by the cuobjdump inside Triton (SASS); for AMD the compiler's assembly is read as it is. A loop
is a strongly connected part of the control flow.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import triton

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Instruction:
    text: str
    next: list[int] = field(default_factory=list)  # indices of what may run after it


def sass_instructions(cubin: bytes) -> list[Instruction]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", nvidia("cuobjdump", "-sass", cubin))
    index = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    code = [Instruction(text) for _, text in lines]
    joins: dict[str, int] = {}
    for i, ins in enumerate(code):
        predicated = ins.text.startswith("@")
        words = ins.text.split()[predicated:]
        op = words[0]
        jump = [index[int(x, 16)] for x in re.findall(r"0x([0-9a-f]+)", ins.text)[-1:] if int(x, 16) in index]
        if op.startswith("BSSY"):
            joins[words[1].strip(",")] = jump[0]
        if op.startswith("BRA"):
            ins.next = jump + ([i + 1] if predicated or len(words) > 2 else [])
        elif op.startswith(("EXIT", "RET")):
            ins.next = [i + 1] if predicated else []
        elif op.startswith("BSYNC"):
            ins.next = [i + 1] + [joins[w] for w in words[1:] if w in joins]
        else:
            ins.next = [i + 1]
    return closed(code)


def gcn_instructions(assembly: str) -> list[Instruction]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    body = assembly.split(".Lfunc_begin0:", 1)[1].split(".Lfunc_end", 1)[0]
    for line in body.splitlines():
        text = line.split(";")[0].strip()
        if label := re.match(r"(\.LBB\w+):", text):
            labels[label[1]] = len(code)
        elif text and not text.startswith("."):
            code.append(Instruction(text))
    for i, ins in enumerate(code):
        jump = [labels[x] for x in re.findall(r"\.LBB\w+", ins.text) if x in labels]
        if ins.text.startswith("s_branch"):
            ins.next = jump
        elif ins.text.startswith("s_cbranch"):
            ins.next = [*jump, i + 1]
        elif not ins.text.startswith("s_endpgm"):
            ins.next = [i + 1]
    return closed(code)


def closed(code: list[Instruction]) -> list[Instruction]:
    for ins in code:
        ins.next = [i for i in ins.next if i < len(code)]
    return code


def loops(code: list[Instruction], nodes: Iterable[int] | None = None) -> list[set[int]]:
    """The strongly connected parts of the control flow, as indices: each is a loop with the loops inside it."""
    inside = set(range(len(code)) if nodes is None else nodes)
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    path: list[int] = []
    on_path: set[int] = set()
    found: list[set[int]] = []
    for root in sorted(inside):  # Tarjan, without recursion
        work = [(root, 0)] if root not in order else []
        while work:
            node, edge = work.pop()
            if edge == 0:
                order[node] = low[node] = len(order)
                path.append(node)
                on_path.add(node)
            successors = [n for n in code[node].next if n in inside]
            if edge < len(successors):
                work.append((node, edge + 1))
                after = successors[edge]
                if after not in order:
                    work.append((after, 0))
                elif after in on_path:
                    low[node] = min(low[node], order[after])
                continue
            if low[node] == order[node]:
                part = set(path[path.index(node) :])
                del path[path.index(node) :]
                on_path -= part
                if len(part) > 1:
                    found.append(part)
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[node])
    return found


def innermost(code: list[Instruction], loop: set[int]) -> list[set[int]]:
    """The loops inside `loop` that hold no other: its entry is taken out until nothing goes round any more."""
    entries = {i for j in set(range(len(code))) - loop for i in code[j].next if i in loop}
    inner = loops(code, loop - (entries or {min(loop)}))
    return [leaf for part in inner for leaf in innermost(code, part)] or [loop]


ACCESS = {  # what an instruction does -> (NVIDIA, AMD)
    "load": (r"\bLDG\b", r"(global|buffer|flat)_load"),
    "store": (r"\bSTG\b", r"(global|buffer|flat)_store"),
    "ex2": (r"MUFU\.EX2", r"v_exp_f32"),
    "shuffle": (r"\bSHFL\b", r"ds_(bpermute|permute|swizzle)|v_permlane|_dpp\b|row_|quad_perm"),
    "shared": (r"\b(LDS|STS|LDSM|STSM)\b", r"ds_(read|write|load|store)"),
    "barrier": (r"\bBAR\b", r"s_barrier"),
    "fp64": (r"\b(DADD|DMUL|DFMA|DSETP)\b", r"v_(add|mul|fma)_f64"),
    "rcp": (r"MUFU\.RCP|I2F", r"v_rcp|v_cvt_f32_u32"),
}


def kind(name: str, code: Iterable[str], amd: bool) -> list[str]:
    pattern = re.compile(ACCESS[name][amd])
    return [text for text in code if pattern.search(text)]


def bits(text: str) -> int:
    """Width of a global access of one thread."""
    if found := re.search(r"dwordx?(\d*)|_b(\d+)", text):
        return int(found[2]) if found[2] else 32 * int(found[1] or 1)
    if found := re.search(r"\.(?:[US])?(8|16|64|128|256)\b", text.split("[")[0]):
        return int(found[1])
    if found := re.search(r"_(load|store)_[us]?(byte|short)", text):
        return 8 if found[2] == "byte" else 16
    return 32


def hint(text: str) -> str:
    """What a global access asks of the caches: EL (evict last), EF (evict first; AMD: nt), or nothing."""
    if found := re.search(r"\.(EL|EF)\b", text):
        return found[1]
    return "EF" if re.search(r"\bnt\b", text) else ""


def nvidia(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(NVIDIA_TOOLS / tool), option, file.name], check=True, capture_output=True, text=True
        ).stdout
