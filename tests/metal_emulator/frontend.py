"""From Metal to what clang reads, and the rules of Apple's compiler that clang does not know.

clang compiles C++ for OpenCL, where ``device``, ``threadgroup``, ``constant`` and ``thread`` are
real address spaces. Comments and ``[[attributes]]`` are blanked, and ``threadgroup T name[n];`` in
a kernel becomes a reference to memory of the runtime, so that lines of error messages stay right.

The syntax tree then shows what clang accepts and Apple refuses: a pointer without an address space,
and a conversion to bfloat that is not written out.
"""

import re

from .signature import ATTRIBUTES

KNOWN_ATTRIBUTES = {*ATTRIBUTES, "maybe_unused", "fallthrough", "nodiscard"}
KNOWN_ATTRIBUTES |= {"kernel", "host_name", "buffer", "max_total_threads_per_threadgroup"}
ATTRIBUTE = re.compile(r"\[\[\s*([a-z_]\w*(?:[^\[\]]|\[[^\]]*\])*?)\]\]")


class KernelFault(RuntimeError):
    """A kernel that Apple's compiler would refuse, or that breaks a rule while it runs."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        # It is ``compile``, or one of ``run.KINDS``.
        self.kind = kind


def refuse(name: str, text: str, position: int, reason: str):
    """Raises a KernelFault in the form of a compiler's message."""
    line = text.count("\n", 0, position) + 1
    raise KernelFault("compile", f"{name}:{line}: error: {reason}")


def blank(match: re.Match) -> str:
    """Spaces in place of everything but newlines."""
    return re.sub(r"[^\n]", " ", match[0])


def split_commas(text: str) -> list[str]:
    """Splits at the commas outside all brackets."""
    parts = [""]
    depth = 0
    for character in text:
        depth += (character in "([{<") - (character in ")]}>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def blank_attributes(text: str, name: str) -> str:
    """Blanks ``[[...]]``, after a check of the names in it."""

    def replace(match):
        for attribute in split_commas(match[1]):
            word = re.match(r"\s*(\w*)", attribute)[1]
            if word not in KNOWN_ATTRIBUTES:
                refuse(name, text, match.start(), f"unknown attribute '{word}'")
        return blank(match)

    return ATTRIBUTE.sub(replace, text)


def in_kernel(text: str, position: int) -> bool:
    """Whether a position lies in the body of a ``[[kernel]]`` function."""
    stack = []
    for match in re.finditer(r"[{}]", text[:position]):
        if match[0] == "{":
            stack.append(match.start())
        elif stack:
            stack.pop()
    starts = (max(text.rfind(mark, 0, brace) for mark in ";{}") + 1 for brace in stack)
    return any(re.search(r"\bkernel\b", text[i:j]) for i, j in zip(starts, stack, strict=True))


def rewrite_threadgroup_variables(text: str, original: str, name: str) -> str:
    """Turns declarations of threadgroup variables into references to the runtime's memory."""
    code = re.sub(r"^[ \t]*#(?:[^\n\\]|\\.)*", blank, text, flags=re.M | re.DOTALL)
    pieces = []
    done = 0
    index = 0
    for match in re.finditer(r"\bthreadgroup\s+", code):
        before = code[: match.start()].rstrip()
        at = match.start()
        end = code.find(";", match.end())
        declaration = code[match.end() : end]
        head = declaration.split("[", 1)[0]
        if (before and before[-1] not in ";{}") or end < 0 or re.search(r"[*&=(){}]", head):
            continue
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
        # Lines keep their numbers.
        pieces.append("\n" * text.count("\n", at, end))
        done = end + 1
    return "".join(pieces) + text[done:]


def translate(text: str, name: str) -> str:
    """Metal text, of a file of this name, to what clang compiles; a KernelFault for an unknown
    attribute, or a threadgroup variable outside a kernel."""
    comments_and_strings = r'//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*")'

    def without_comment(match: re.Match) -> str:
        string = match[1]
        if string is not None:
            return string
        return blank(match)

    blanked = re.sub(comments_and_strings, without_comment, text, flags=re.DOTALL)
    return rewrite_threadgroup_variables(blank_attributes(blanked, name), blanked, name)


# In the tree a named declaration reads: ParmVarDecl 0x5f <col:9, col:16> col:16 used x 'float *'.
DECLARATION = re.compile(
    r"(?:ParmVarDecl|VarDecl|FieldDecl|TypedefDecl|TypeAliasDecl) 0x\w+ [^']*? ([a-zA-Z_]\w*) "
    r"'[^']*__generic "
)
CAST = re.compile(r"(?:CStyleCastExpr|CXXReinterpretCastExpr) 0x\w+ [^']*'([^']*__generic [^']*)'")
TO_BFLOAT = re.compile(
    r"ImplicitCastExpr 0x\w+ [^']*'[^']*'?:?'?__bf16' <(?:FloatingCast|IntegralToFloating)>"
)
COMPOUND = re.compile(
    r"CompoundAssignOperator .*__bf16' lvalue.*ComputeResultTy='(?!\w*bf)([^']*)'"
)
LOCATION = re.compile(r"(?:line|\w+\.metal):(\d+):\d+")


def objection(row: str) -> str | None:
    """What Apple's compiler refuses in a row of the tree, or None."""
    if "__generic" in row and " implicit " not in row:
        cast = CAST.search(row)
        if cast is not None:
            kind = cast[1].replace("__generic ", "")
            return f"the cast to '{kind}' has no address space"
        declaration = DECLARATION.search(row)
        if declaration is not None and declaration[1] not in ("used", "referenced"):
            return f"pointer or reference '{declaration[1]}' has no address space"
    elif "__bf16" in row and "part_of_explicit_cast" not in row:
        if TO_BFLOAT.search(row):
            return "no implicit conversion to 'bfloat': write bfloat16_t(...)"
        compound = COMPOUND.search(row)
        if compound is not None:
            return f"no implicit conversion from '{compound[1]}' to 'bfloat' in an assignment"
    return None


def check_syntax_tree(rows: list[str], name: str) -> None:
    """Refuses what clang accepts and Apple's compiler does not, by clang's ``-ast-dump``."""
    for index, row in enumerate(rows):
        reason = objection(row)
        if reason is not None:
            places = (LOCATION.search(earlier) for earlier in reversed(rows[: index + 1]))
            line = next((place[1] for place in places if place), "?")
            raise KernelFault("compile", f"{name}:{line}: error: {reason}")
