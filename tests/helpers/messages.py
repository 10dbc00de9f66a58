"""Collects, from the source, the messages that a user can meet: errors, warnings, and the reasons for refusals.

A message is a text with ``..`` for each value. An argument that is a local name, a module's constant or a call
of a function of the package is followed to its texts; a message without a letter of its own (``f"{path}: {error}"``)
only passes another one on and is not collected.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("molsaki", "molsaki_kernels")
HOLE = ".."
SPECIFIC = 3  # words
EXCEPTIONS = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
}
INTERNAL = {"StopIteration", "AssertionError"}  # never shown
WARNERS = {"warnings.warn": 0, "logger.warning": 0, "logger.error": 0, "parser.error": 0, "self._warn": 1}
WARNERS["torch._assert_async"] = 1  # in compiled code, instead of an error
# Functions that return the reason why something cannot be used, and variables that hold one.
REASONS = re.compile(r"_?(why_\w+|available|unavailable|fault|mismatch|loaded)$")
REASON = "reason"


@dataclasses.dataclass(frozen=True)
class Message:
    """A text with ``..`` for values, and the place where it is written, ``FILE:LINE``."""

    text: str
    place: str


@dataclasses.dataclass
class _Module:
    path: Path
    tree: ast.Module
    constants: dict[str, ast.expr]
    functions: dict[str, ast.FunctionDef]


def collect(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> list[Message]:
    """All messages of the packages, in the order of files and lines."""
    modules = [_read(path) for package in packages for path in sorted((root / package).rglob("*.py"))]
    constants = {name: node for module in modules for name, node in module.constants.items() if name.isupper()}
    functions = {name: node for module in modules for name, node in module.functions.items()}
    exceptions = set(EXCEPTIONS)
    while True:
        found = {
            node.name
            for module in modules
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ClassDef) and any(_name(base) in exceptions for base in node.bases)
        }
        if found <= exceptions:
            break
        exceptions |= found
    messages: dict[Message, None] = {}
    for module in modules:
        texts = _Texts(constants | module.constants, functions | module.functions, module.tree)
        for scope, node in _with_function(module.tree):
            for argument in _arguments(node, exceptions):
                for text in texts.of(argument, scope, frozenset()):
                    if any(character.isalpha() for character in normalised(text)):
                        place = f"{module.path.relative_to(root).as_posix()}:{node.lineno}"
                        messages[Message(normalised(text), place)] = None
    return list(messages)


def normalised(text: str) -> str:
    """One line, with ``..`` for every run of values."""
    text = re.sub(r"%[-+.\d]*[sdrfgx]", HOLE, " ".join(text.split()))
    return re.sub(r"\.{2,}", HOLE, text)


def matches(pattern: str, message: str) -> bool:
    """Whether a pattern, in which ``..`` stands for any text, describes a message.

    A pattern of fewer than `SPECIFIC` words, such as ``..: expected one of .., got ..``, whose *expected* and *got* do
    not count, describes only what is written so.
    """
    return _compiled(pattern).fullmatch(message) is not None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    pattern = normalised(pattern)
    words = re.findall(r"[^\W\d_]{2,}", pattern)
    if sum(word not in ("expected", "got") for word in words) < SPECIFIC:
        return re.compile(re.escape(pattern))
    return re.compile(".*".join(map(re.escape, pattern.split(HOLE))))


def _read(path: Path) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants: dict[str, ast.expr] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.Assign):
            continue
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            constants |= {_dotted(name): one for name, one in zip(target.elts, value.elts, strict=True)}
        else:
            constants[_dotted(target)] = value
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return _Module(path, tree, constants, functions)


def _with_function(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.expr | ast.stmt]]:
    """Every expression and statement with the function that it is in, the innermost one."""
    stack: list[tuple[ast.AST, ast.AST]] = [(tree, tree)]
    while stack:
        scope, node = stack.pop()
        if isinstance(node, ast.expr | ast.stmt):
            yield scope, node
        inner = node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else scope
        stack.extend((inner, child) for child in reversed(list(ast.iter_child_nodes(node))))


def _arguments(node: ast.AST, exceptions: set[str]) -> list[ast.expr]:
    """The expressions of the messages that this node makes."""
    if isinstance(node, ast.Call) and node.args:
        name = _dotted(node.func)
        if (at := WARNERS.get(name)) is not None:
            return node.args[at : at + 1]
        if _name(node.func) in exceptions - INTERNAL:
            return node.args[:1]
    if isinstance(node, ast.FunctionDef) and REASONS.match(node.name):
        values = _returns(node)
        return [part for value in values for part in (value.elts if isinstance(value, ast.Tuple) else [value])]
    if isinstance(node, ast.Assign) and _dotted(node.targets[0]) == REASON:
        return [node.value]
    return []


def _returns(function: ast.FunctionDef) -> list[ast.expr]:
    inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function]
    hidden = {id(node) for other in inner for node in ast.walk(other)}
    return [
        node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and node.value is not None and id(node) not in hidden
    ]


def _name(node: ast.AST) -> str:
    return _dotted(node).rpartition(".")[2]


def _dotted(node: ast.AST) -> str:
    """``self.name`` of an attribute, ``name`` of a name, and nothing of other expressions."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


class _Texts:
    """Follows an expression to the texts that it can have."""

    def __init__(self, constants: dict[str, ast.expr], functions: dict[str, ast.FunctionDef], module: ast.Module):
        self._constants, self._functions, self._module = constants, functions, module
        self._assigned: dict[ast.AST, list[ast.Assign]] = {}

    def of(self, node: ast.expr, scope: ast.AST, seen: frozenset[str]) -> list[str]:
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else [HOLE]
        if isinstance(node, ast.JoinedStr):
            return self._joined([self._part(value, scope, seen) for value in node.values])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([self.of(node.left, scope, seen), self.of(node.right, scope, seen)])
        if isinstance(node, ast.IfExp):
            return self.of(node.body, scope, seen) + self.of(node.orelse, scope, seen)
        if isinstance(node, ast.BoolOp):
            return [text for value in node.values for text in self.of(value, scope, seen)]
        if isinstance(node, ast.Name) and node.id not in seen:
            return self._of_name(node.id, scope, seen | {node.id})
        if isinstance(node, ast.Attribute) and (text := _dotted(node)) not in seen:
            return self._of_name(text, self._module, seen | {text})
        function = self._functions.get(_name(node.func)) if isinstance(node, ast.Call) else None
        if function is None or function.name in seen or REASONS.match(function.name):
            return [HOLE]
        found = [self.of(value, function, seen | {function.name}) for value in _returns(function)]
        return [text for texts in found for text in texts] or [HOLE]

    def _part(self, node: ast.expr, scope: ast.AST, seen: frozenset[str]) -> list[str]:
        """A part of an f-string. Constants and texts of three words and more are put in; all other values are holes."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        assert isinstance(node, ast.FormattedValue)
        if node.conversion != -1 or not isinstance(node.value, ast.Name | ast.Call | ast.IfExp):
            return [HOLE]
        texts = self.of(node.value, scope, seen)
        if isinstance(node.value, ast.Name) and node.value.id.isupper():
            return texts
        return [text if len(re.findall(r"[a-z]+", text)) > 2 else HOLE for text in texts]

    def _of_name(self, name: str, scope: ast.AST, seen: frozenset[str]) -> list[str]:
        if scope not in self._assigned:
            self._assigned[scope] = [node for node in ast.walk(scope) if isinstance(node, ast.Assign)]
        assigned = self._assigned[scope]
        values = [node.value for node in assigned if any(_dotted(target) == name for target in node.targets)]
        if not values and name in self._constants:
            values = [self._constants[name]]
        return [text for value in values for text in self.of(value, scope, seen)] or [HOLE]

    @staticmethod
    def _joined(parts: list[list[str]]) -> list[str]:
        texts = [""]
        for part in parts:
            texts = [text + value for text in texts for value in dict.fromkeys(part)]
        return texts
