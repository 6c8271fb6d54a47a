"""Translate CUDA C++ to C++ for the emulated device: the syntax alone, line by line.

    python tests/emulator/translate.py SOURCE DESTINATION

What differs from C++ in csrc/cuda is little: launches, __shared__ variables, inline assembly, the
macro that tells architectures apart, and the key that a kernel is registered for. Each is rewritten
by a regular expression, and whatever is left over of it is an error. Names such as threadIdx are
defined in device.h.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ASSEMBLY = re.compile(r'asm volatile\(\s*"([^"]+)"\s*:\s*:\s*(.*?)\s*:\s*"memory"\);', re.DOTALL)
SHARED = re.compile(r"__shared__\s+([\w:]+)\s+(\w+)((?:\[[^\]]+\])*);")
LAUNCH = re.compile(r"([\w:]+)\s*(<[^;{}()]*?>)?\s*<<<(.*?)>>>\s*\(", re.DOTALL)

# Opcode: the function that stands for it, the letter of its operands. The type's is in the opcode.
OPCODES = {"red.relaxed.gpu.global.add": "add_values", "st.global": "store_values"}
TYPES = {"f32": "float", "f64": "double", "b32": "unsigned"}

LEFT_OVER = ("asm", "__shared__", "<<<", "__CUDA_ARCH__", "kCUDA", "CUDA, m)")


def closing(text: str, at: int) -> int:
    """The place of the parenthesis that closes the one at `at`."""
    depth = 0
    for place in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"no parenthesis closes {text[at : at + 40]!r}")


def operands(text: str) -> list[str]:
    """The expressions of '"l"(pointer), "f"(value)'."""
    found, at = [], 0
    while (letter := re.compile(r'\s*,?\s*"\w"\s*\(').match(text, at)) is not None:
        end = closing(text, letter.end() - 1)
        found.append(" ".join(text[letter.end() : end].split()))
        at = end + 1
    if text[at:].strip():
        raise ValueError(f"operands that are not understood: {text!r}")
    return found


def keep_lines(old: str, new: str) -> str:
    """The new text with as many lines as the old, so that messages name the right ones."""
    return new + "\n" * (old.count("\n") - new.count("\n"))


def translate_assembly(match: re.Match[str]) -> str:
    instruction, places = match.group(1).split(None, 1)
    opcode = re.fullmatch(r"(.+?)(?:\.v(\d))?\.(\w+)", instruction)
    assert opcode is not None and opcode.group(1) in OPCODES, instruction
    count = int(opcode.group(2) or 1)
    pointer, *values = operands(match.group(2))
    expected = ", ".join(f"%{number + 1}" for number in range(count))
    expected = f"[%0], {expected};" if opcode.group(2) is None else f"[%0], {{{expected}}};"
    if places != expected or len(values) != count:
        raise ValueError(f"an instruction that is not understood: {match.group()}")
    function = f"::emulator::{OPCODES[opcode.group(1)]}<{TYPES[opcode.group(3)]}>"
    return keep_lines(match.group(), f"{function}({pointer}, {{{', '.join(values)}}});")


def translate_shared(match: re.Match[str]) -> str:
    kind, name, extents = match.groups()
    pointer = f"{kind}(*){extents}" if extents else f"{kind}*"
    memory = f"::emulator::shared_variable(__COUNTER__, sizeof({kind}{extents}), alignof({kind}))"
    return f"auto& {name} = *static_cast<{pointer}>({memory});"


def translate_launches(text: str) -> str:
    while (match := LAUNCH.search(text)) is not None:
        end = closing(text, match.end() - 1)
        arguments = text[match.end() : end]
        kernel = match.group(1) + (match.group(2) or "")
        new = (
            f'::emulator::launch_kernel("{match.group(1)}", {match.group(3)}, '
            f"[](const auto&... given) {{ {kernel}(given...); }}, {arguments})"
        )
        old = text[match.start() : end + 1]
        text = text[: match.start()] + keep_lines(old, new) + text[end + 1 :]
    return text


def without_comments(text: str) -> str:
    return re.sub(r"//.*", "", text)


def translate(text: str, name: str) -> str:
    """The text of a .cu, .cuh or .h file as C++."""
    text = ASSEMBLY.sub(translate_assembly, text)
    text = SHARED.sub(translate_shared, text)
    text = translate_launches(text)
    text = re.sub(r"__CUDA_ARCH__(?= >=)", "EMULATED_ARCH", text)
    text = text.replace("#if defined(__CUDA_ARCH__)", "#if 1")
    text = text.replace(
        "TORCH_LIBRARY_IMPL(embed_ext, CUDA, m)", "TORCH_LIBRARY_IMPL(embed_ext, CPU, m)"
    )
    text = re.sub(r"(?<=register_)(\w+)\(c10::kCUDA", r"\1(c10::kCPU", text)
    for word in LEFT_OVER:
        if word in without_comments(text):
            raise ValueError(f"{name}: {word!r} is left over")
    return f'#line 1 "{name}"\n{text}'


def main() -> None:
    source, destination = Path(sys.argv[1]), Path(sys.argv[2])
    text = translate(source.read_text(), str(source))
    if not destination.exists() or destination.read_text() != text:
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main()
