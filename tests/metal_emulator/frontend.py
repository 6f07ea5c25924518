"""From Metal to what clang reads, and the rules of Apple's compiler that clang does not know.

clang compiles C++ for OpenCL, where ``device``, ``threadgroup``, ``constant`` and ``thread`` are
real address spaces. Three things have no counterpart there. They are rewritten in place, so that
lines and columns of error messages stay right:

* ``[[attributes]]`` are checked by name and blanked;
* ``threadgroup T name[n];`` in a kernel becomes a reference to memory of the runtime;
* comments are blanked.

The syntax tree then shows what clang accepts and Apple refuses: a pointer without an address space,
and a conversion to bfloat that is not written out.
"""

import re

from .faults import KernelFault
from .signature import ATTRIBUTES

KNOWN_ATTRIBUTES = {*ATTRIBUTES, "maybe_unused", "fallthrough", "nodiscard"}
KNOWN_ATTRIBUTES |= {"kernel", "host_name", "buffer", "max_total_threads_per_threadgroup"}

ATTRIBUTE = re.compile(r"\[\[\s*([a-z_]\w*(?:[^\[\]]|\[[^\]]*\])*?)\]\]")


def blank(text: str) -> str:
    """Spaces in place of everything but newlines."""
    return re.sub(r"[^\n]", " ", text)


def strip_comments(text: str) -> str:
    """Blanks comments, leaves strings alone."""
    pattern = r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*")'
    return re.sub(pattern, lambda match: match[1] or blank(match[0]), text, flags=re.DOTALL)


def line_of(text: str, position: int) -> int:
    """Line number, from 1, of a position in the text."""
    return text.count("\n", 0, position) + 1


def refuse(name: str, text: str, position: int, reason: str):
    """Raises a KernelFault in the form of a compiler's message."""
    raise KernelFault("compile", f"{name}:{line_of(text, position)}: error: {reason}")


def matching(text: str, start: int, opening: str, closing: str) -> int:
    """Position of the bracket that closes the one at ``start``; the text's end if none does."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == opening) - (text[position] == closing)
        if depth == 0:
            return position
    return len(text)


def split_commas(text: str) -> list[str]:
    """Splits at the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


def check_kernel_parameters(text: str, name: str) -> None:
    """Each parameter of a kernel needs an attribute that says what it is bound to."""
    blanked = ATTRIBUTE.sub(lambda match: blank(match[0]), text)
    for match in re.finditer(r"\bkernel\b", text):
        start = blanked.find("(", match.end())
        if start < 0 or re.search(r"[;{}]", blanked[match.end() : start]):
            continue
        end = matching(text, start, "(", ")")
        if text[end + 1 :].lstrip()[:1] != "{":  # an instantiation, or another declaration
            continue
        for parameter in split_commas(text[start + 1 : end]):
            if parameter.strip() and "[[" not in parameter:
                reason = f"kernel parameter '{' '.join(parameter.split())}' has no attribute"
                refuse(name, text, start, reason)


def blank_attributes(text: str, name: str) -> str:
    """Blanks ``[[...]]``, after a check of the names in it."""

    def replace(match):
        for attribute in split_commas(match[1]):
            word = re.match(r"\s*(\w*)", attribute)[1]
            if word not in KNOWN_ATTRIBUTES:
                refuse(name, text, match.start(), f"unknown attribute '{word}'")
        return blank(match[0])

    return ATTRIBUTE.sub(replace, text)


def in_kernel(text: str, position: int) -> bool:
    """Whether a position lies in the body of a ``[[kernel]]`` function."""
    stack = []
    for match in re.finditer(r"[{}]", text[:position]):
        if match[0] == "{":
            stack.append(match.start())
        elif stack:
            stack.pop()
    for brace in stack:
        head_start = max((text.rfind(mark, 0, brace) for mark in ";{}"), default=-1)
        if re.search(r"\bkernel\b", text[head_start + 1 : brace]):
            return True
    return False


def rewrite_threadgroup_variables(text: str, original: str, name: str) -> str:
    """Turns declarations of threadgroup variables into references to the runtime's memory."""
    code = re.sub(r"^[ \t]*#(?:[^\n\\]|\\.)*", lambda m: blank(m[0]), text, flags=re.M | re.DOTALL)
    pieces, done, index = [], 0, 0
    for match in re.finditer(r"\bthreadgroup\s+", code):
        before = code[: match.start()].rstrip()
        end = code.find(";", match.end())
        declaration = code[match.end() : end]
        head = declaration.split("[", 1)[0]
        if (before and before[-1] not in ";{}") or end < 0 or re.search(r"[*&=(){}]", head):
            continue
        at = match.start()
        if not in_kernel(original, at):
            reason = "a threadgroup variable can only be declared in the body of a kernel"
            refuse(name, text, at, reason)
        first, *others = split_commas(declaration)
        matches = [re.fullmatch(r"\s*(.*\S)\s+(\w+)\s*((?:\[.*\])?)\s*", first, re.DOTALL)]
        matches += [re.fullmatch(r"(\s*)(\w+)\s*((?:\[.*\])?)\s*", x, re.DOTALL) for x in others]
        if not all(matches):
            refuse(name, text, at, "declaration of a threadgroup variable not understood")
        pieces.append(text[done:at])
        element = matches[0][1]
        for _, variable, dimensions in (found.groups() for found in matches):
            pieces.append(
                f"threadgroup {element} (&{variable}){dimensions} = "
                f"*(threadgroup {element} (*){dimensions})metal_emulator_threadgroup("
                f'"{variable}", {index}, sizeof({element}{dimensions})); '
            )
            index += 1
        pieces.append("\n" * text.count("\n", at, end))  # lines keep their numbers
        done = end + 1
    return "".join(pieces) + text[done:]


def translate(text: str, name: str) -> str:
    """Metal text, of a file of this name, to what clang compiles.

    A KernelFault for an unknown attribute, a kernel parameter without one, or a threadgroup
    variable outside a kernel.
    """
    blanked = strip_comments(text)
    check_kernel_parameters(blanked, name)
    return rewrite_threadgroup_variables(blank_attributes(blanked, name), blanked, name)


# In the tree a named declaration reads: ParmVarDecl 0x5f <col:9, col:16> col:16 used x 'float *'.
DECLARATION = re.compile(
    r"(?:ParmVarDecl|VarDecl|FieldDecl|TypedefDecl|TypeAliasDecl) 0x\w+ [^']*? ([a-zA-Z_]\w*) "
    r"'[^']*__generic "
)
RETURN_TYPE = re.compile(
    r"(?:FunctionDecl|CXXMethodDecl) 0x\w+ [^']*? (\w+) '[^'(]*__generic [^'(]*\("
)
CAST = re.compile(r"(?:CStyleCastExpr|CXXReinterpretCastExpr) 0x\w+ [^']*'([^']*__generic [^']*)'")
TO_BFLOAT = re.compile(
    r"ImplicitCastExpr 0x\w+ [^']*'[^']*'?:?'?__bf16' <(?:FloatingCast|IntegralToFloating)>"
)
COMPOUND = re.compile(
    r"CompoundAssignOperator .*__bf16' lvalue.*ComputeResultTy='(?!\w*bf)([^']*)'"
)
LOCATION = re.compile(r"(?:line|\w+\.metal):(\d+):\d+")


def check_syntax_tree(rows: list[str], name: str) -> None:
    """Refuses what clang accepts and Apple's compiler does not, by clang's ``-ast-dump``."""
    for index, row in enumerate(rows):
        if "__generic" in row and " implicit " not in row:
            if match := RETURN_TYPE.search(row):
                reason = f"the pointer or reference that '{match[1]}' returns has no address space"
            elif match := CAST.search(row):
                type_name = match[1].replace("__generic ", "")
                reason = f"the cast to '{type_name}' has no address space"
            elif (match := DECLARATION.search(row)) and match[1] not in ("used", "referenced"):
                reason = f"pointer or reference '{match[1]}' has no address space"
            else:
                continue
        elif "__bf16" in row and "part_of_explicit_cast" not in row:
            if TO_BFLOAT.search(row):
                reason = "no implicit conversion to 'bfloat': write bfloat16_t(...)"
            elif match := COMPOUND.search(row):
                reason = f"no implicit conversion from '{match[1]}' to 'bfloat' in an assignment"
            else:
                continue
        else:
            continue
        lines = (LOCATION.findall(earlier) for earlier in reversed(rows[: index + 1]))
        line = next((found[0] for found in lines if found), "?")
        raise KernelFault("compile", f"{name}:{line}: error: {reason}")
