"""CUTLASS's headers as a C++ compiler takes them: every inline PTX statement becomes a call of native/emulator90,
which is handed the PTX and the operands, and `__CUDA_ARCH__`, which must stay undefined for CUDA's own headers, becomes
EMULATED_ARCH. Everything else stays as it is, so what runs is the shipped code down to the single instruction.
"""

import re
from pathlib import Path

# What a kernel for sm_90a is made of. Left as they are: conversions and arithmetic (cutlass/half.h, array.h,
# functional.h, ...), which have a portable way beside that of the GPU.
TRANSLATED = (
    "cute/arch/*.hpp",
    "cute/util/debug.hpp",
    "cute/algorithm/cooperative_copy.hpp",
    "cutlass/cutlass.h",
    "cutlass/barrier.h",
    "cutlass/arch/*.h",
    "cutlass/arch/*.hpp",
    "cutlass/pipeline/*.hpp",
    "cutlass/gemm/kernel/*.hpp",
    "cutlass/epilogue/fusion/*.hpp",
)
LEFT = ("*_ext.hpp", "mma_sm[5678]*", "mma_sparse*")
# Kernels of other chips.
EMPTY = ("cutlass/arch/wmma*.h", "cutlass/gemm/kernel/sm1??_*gemm*.hpp")
LEXEME = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|/\*.*?\*/|::|[(){}\[\],:;]|[^"/(){}\[\],:;]+|/', re.S)
ASM = re.compile(r"\basm\s*(?:volatile\b\s*)?\(")
OPERAND = re.compile(r'\s*"([=+&]*)(\w)"\s*\((.*)\)\s*', re.S)
PREFETCH = re.compile(r"#if CUTLASS_ENABLE_L2_PREFETCH\n.*?#else\n(.*?)#endif\n", re.S)  # amid asm statements
SHARED = re.compile(r"\bextern\s+__shared__\s+char\s+(\w+)\[\];")


def statement(text, start):
    """(sections, end): what stands between the colons of an asm statement whose `(` is before start."""
    sections, depth = [[""]], 1
    for found in LEXEME.finditer(text, start):
        token = found.group()
        if token.startswith(("//", "/*")):
            continue
        depth += (token in "([{") - (token in ")]}")
        if depth == 0:
            return sections, found.end()
        if depth == 1 and token in (":", "::"):
            sections += [[""] for _ in token]
        elif depth == 1 and token == ",":
            sections[-1].append("")
        else:
            sections[-1][-1] += token
    raise ValueError(f"an asm statement without an end: {text[start : start + 80]}")


def call(sections):
    """The statement as a call of the emulator."""
    if sections[0][0].strip() == '""':
        return "((void)0)"  # it only keeps the compiler from moving something
    operands = []
    for section in sections[1:3]:
        for operand in section:
            if not operand.strip():
                continue
            how, kind, value = OPERAND.fullmatch(operand).groups()
            written = "out" if "=" in how else "inout" if "+" in how else "in"
            operands.append(f"::emulator::{written}<'{kind}'>({value})")
    return f"::emulator::ptx({sections[0][0].strip()}, {{{', '.join(operands)}}})"


def translate(text):
    parts, at = [], 0
    text = PREFETCH.sub(r"\1", text.replace("__CUDA_ARCH__", "EMULATED_ARCH"))
    for found in ASM.finditer(text):
        if found.start() < at or text.rfind("//", text.rfind("\n", 0, found.start()) + 1, found.start()) >= 0:
            continue
        sections, end = statement(text, found.end())
        replaced = call(sections).replace("\\\n", " ").replace("\n", " ")
        parts += [text[at : found.start()], replaced]
        at = end
    text = "".join([*parts, text[at:]])
    return SHARED.sub(r"char* \1 = ::emulator::shared_memory();", text)


def translate_headers(include, to):
    """The headers below `include` again in the folder `to`: translated, empty, or a link to the original."""
    for path in sorted(Path(include).rglob("*.*")):
        if not path.is_file():
            continue
        name = path.relative_to(include)
        target = Path(to) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if any(name.match(pattern) for pattern in EMPTY):
            target.write_text("#pragma once\n")
        elif any(name.match(pattern) for pattern in TRANSLATED) and not any(name.match(pattern) for pattern in LEFT):
            target.write_text(translate(path.read_text()))
        else:
            target.symlink_to(path)
