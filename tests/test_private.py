"""The private attributes of other libraries that ``src`` uses, and that the installed versions have them."""

import ast
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from src.tokenizer import gpt2_tokenizer

SRC = Path(__file__).parents[1] / "src"

# attribute: (what has it, why no public one serves)
PRIVATE = {
    "_linear_pointwise": (lambda: torch.ops.mkldnn, "oneDNN's product with packed weights has no public operator"),
    "_reorder_linear_weight": (lambda: torch.ops.mkldnn, "packs the weights for _linear_pointwise"),
    "_pat_str": (gpt2_tokenizer, "the pattern that splits a text before the merges"),
    "_python_dispatch": (lambda: torch.utils, "TorchDispatchMode, which sees each operation, has no public module"),
    "_subclasses": (lambda: torch, "FakeTensorMode, tensors of a device without data, has no public module"),
    "_signal_connector": (
        lambda: Trainer(logger=False, barebones=True),
        "the run handles signals itself; Lightning's handlers would wait for all ranks in the middle of a step",
    ),
    "_broadcast_sigterm_tensor": (
        lambda: Trainer(logger=False, barebones=True).fit_loop.epoch_loop,
        "ranks agree on signals once per step; Lightning would wait for the GPU after each batch",
    ),
}


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def defined_in(tree: ast.AST, own_bases: set[str]) -> set[str]:
    """The private names that a file defines: functions, classes, variables, fields and attributes of ``self``. A class
    with a base outside of ``src`` defines its attributes in ``__init__``; elsewhere it could overwrite its base's."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            own = all(isinstance(base, ast.Name) and base.id in own_bases for base in node.bases)
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and (own or method.name == "__init__"):
                    names |= {
                        target.attr
                        for target in ast.walk(method)
                        if isinstance(target, ast.Attribute)
                        and isinstance(target.ctx, ast.Store)
                        and ast.unparse(target.value) == "self"
                    }
    return {name for name in names if is_private(name)}


def used_in(tree: ast.AST) -> set[tuple[str, bool]]:
    """The private names that a file uses as an attribute or imports, and whether of ``self`` or ``cls``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add((node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")))
        elif isinstance(node, ast.ImportFrom):
            found |= {(name, False) for name in [*(node.module or "").split("."), *(one.name for one in node.names)]}
        elif isinstance(node, ast.Import):
            found |= {(part, False) for one in node.names for part in one.name.split(".")}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            found |= {(argument.value, False) for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
    return {(name, own) for name, own in found if is_private(name)}


TREES = {str(path.relative_to(SRC)): ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}
CLASSES = {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
DEFINED = {path: defined_in(tree, CLASSES | {"NamedTuple", "ABC"}) for path, tree in TREES.items()}


def foreign(path: str) -> set[str]:
    """``self._x`` may be defined anywhere in ``src``, as in a base class; ``other._x`` only in the same file."""
    anywhere = set().union(*DEFINED.values())
    return {name for name, of_self in used_in(TREES[path]) if name not in (anywhere if of_self else DEFINED[path])}


@pytest.mark.parametrize("path", TREES)
def test_no_other_private_attribute_is_used(path):
    assert foreign(path) <= set(PRIVATE)


def test_the_table_is_short_and_lists_what_is_used():
    assert len(PRIVATE) <= 7
    text = "".join(path.read_text() for path in SRC.rglob("*.py"))  # two are operators, looked up by their names
    assert all(name in text for name in PRIVATE)


@pytest.mark.parametrize("attribute", PRIVATE)
def test_the_installed_versions_have_it(attribute):
    owner, _ = PRIVATE[attribute]
    assert hasattr(owner(), attribute)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("trainer._signals = 1", {"_signals"}),
        ("class A(Trainer):\n    def setup(self):\n        self._size = 1", {"_size"}),
        ("class A(Trainer):\n    def __init__(self):\n        self._size = 1", set()),
        ("class A:\n    def setup(self):\n        self._size = 1\n        return self._size", set()),
        ("class A:\n    def __eq__(self, other):\n        return other._f()\n    def _f(self): ...", set()),
        ("from torch._dynamo import config", {"_dynamo"}),
        ("from tiktoken import _educational", {"_educational"}),
        ("import torch._inductor", {"_inductor"}),
        ("getattr(optimizer, '_fused', None)", {"_fused"}),
    ],
)
def test_what_counts_as_foreign(code, found):
    tree = ast.parse(code)
    assert {name for name, _ in used_in(tree)} - defined_in(tree, set()) == found
