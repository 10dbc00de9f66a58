"""Tests that every engine follows the protocol, and that the operators know no engine by its name."""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import pytest
import torch

import molsaki_kernels as mk
from molsaki_kernels import engine_selection
from molsaki_kernels.attention import ENGINES, defaults, eager, native, protocol
from molsaki_kernels.attention_map import MAP_ENGINES, SERVES_EVERY_CALL
from molsaki_kernels.spec import AttentionInputs
from molsaki_kernels.value_pooling import POOLING_ENGINES

FUNCTIONS = [name for name, value in vars(protocol.Engine).items() if inspect.isfunction(value) and name[0] != "_"]
REQUIRED_FUNCTIONS = [
    name for name, value in vars(protocol.RequiredNames).items() if inspect.isfunction(value) and name[0] != "_"
]


def test_the_names_of_the_protocol():
    constants = [*protocol.RequiredNames.__annotations__, *protocol.Engine.__annotations__]
    assert {*protocol.RequiredNames.__annotations__, *REQUIRED_FUNCTIONS} == set(engine_selection.REQUIRED)
    assert {*constants, *FUNCTIONS} - set(engine_selection.REQUIRED) == defaults.OPTIONAL.keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_follows_the_protocol(engine):
    """The functions have its parameters and types, also those that mypy does not compare because they are optional."""
    for name in (*REQUIRED_FUNCTIONS, *FUNCTIONS):
        _, *expected = inspect.signature(getattr(protocol.Engine, name)).parameters.values()
        found = inspect.signature(getattr(ENGINES[engine], name))
        assert list(found.parameters.values()) == expected, name
        assert found.return_annotation == inspect.signature(getattr(protocol.Engine, name)).return_annotation, name
    module = ENGINES[engine]
    assert engine == module.NAME and isinstance(module.COMPUTES_MAP, bool) and isinstance(module.DIFFERENTIABLE, bool)
    assert module.HEAD_DIM_MULTIPLE >= 1 and (module.FUSED_MAP is None or module.FUSED_MAP in MAP_ENGINES)


def test_the_defaults(monkeypatch):
    """An engine that fuses no map and pads nothing; they are added to the engine itself, and only what it lacks."""
    assert native.HEAD_DIM_MULTIPLE == 16 and eager.HEAD_DIM_MULTIPLE == 1 and eager.FUSED_MAP is None
    x = torch.zeros(1, 2, 3, 4)
    inputs = AttentionInputs(x, x, x)
    assert eager.folds_dlse is defaults.folds_dlse and not eager.folds_dlse(inputs)
    for function, arguments in ((eager.why_not_fused, 3), (eager.backward_with_map, 5)):
        with pytest.raises(NotImplementedError):  # never called without FUSED_MAP
            function(*[None] * arguments)
    assert eager.gradient_strides(x) == x.stride()
    assert eager.gradient_strides(x.transpose(1, 2)) == x.transpose(1, 2).stride()
    assert eager.gradient_strides(x[..., ::2]) == (12, 6, 2, 1)


@pytest.fixture
def registered(monkeypatch):
    for table in ("ENGINES", "FIRST"):
        before = dict(getattr(engine_selection, table))
        monkeypatch.setattr(engine_selection, table, before)


def test_a_registered_engine_gets_the_optional_names(registered):
    names = {name: getattr(eager, name) for name in engine_selection.REQUIRED} | {"NAME": "mine"}
    mine = types.SimpleNamespace(**names, folds_dlse=lambda inputs: True)
    mk.register_engine(mine)
    assert defaults.OPTIONAL.keys() <= vars(mine).keys() and mine.folds_dlse(None)

    class Closed:
        __slots__ = ()

    for name, value in (names | {"NAME": "closed"}).items():
        setattr(Closed, name, value)
    with pytest.raises(AttributeError, match="HEAD_DIM_MULTIPLE"):
        mk.register_engine(Closed())
    assert "closed" not in engine_selection.ENGINES


def test_the_operators_know_no_engine_by_name():
    names = {*ENGINES, *MAP_ENGINES, *POOLING_ENGINES}
    assert SERVES_EVERY_CALL in MAP_ENGINES
    for path in sorted((Path(mk.__file__).parent / "ops").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        written = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not names & {value for value in written if isinstance(value, str)}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in (
                "molsaki_kernels.attention", "molsaki_kernels.attention_map", "molsaki_kernels.value_pooling"
            ):  # fmt: skip
                assert not names & {alias.name for alias in node.names}, path


class Inheriting(protocol.Engine):
    """An engine that is written as a subclass of the protocol, and computes by engine "eager"."""

    NAME, COMPUTES_MAP, DIFFERENTIABLE = "inheriting", False, False
    available = staticmethod(eager.available)
    why_not = staticmethod(eager.why_not)
    takes_value_dim = staticmethod(eager.takes_value_dim)
    forward = staticmethod(eager.forward)
    backward = staticmethod(eager.backward)


def test_a_subclass_of_the_protocol_gets_the_defaults(monkeypatch):
    """It inherits the protocol's own functions, which return None; a required one that it does not define is missed."""
    for table in (ENGINES, engine_selection.FIRST):
        for name, value in dict(table).items():
            monkeypatch.setitem(table, name, value)  # the tables are as before afterwards
    monkeypatch.setitem(ENGINES, "inheriting", engine := Inheriting())
    engine_selection.register_engine(engine)
    q, k, v = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(3))
    out, maps = mk.stepwise_attention(q, k, v, mk.StepPlan.from_spans([[(2, 5)]], [[[0], [1]]]), engine="inheriting")
    (out.sum() + maps.sum()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))

    class Incomplete(protocol.Engine):
        NAME, COMPUTES_MAP, DIFFERENTIABLE = "incomplete", False, False

    with pytest.raises(TypeError, match="engine: expected available, why_not, .*forward, backward"):
        engine_selection.register_engine(Incomplete())


@pytest.mark.parametrize("names", [["FUSED_MAP"], ["why_not_fused", "backward_with_map"]])
def test_an_engine_that_fuses_the_map_has_all_its_names(registered, names):
    values = {"FUSED_MAP": "triton", "why_not_fused": lambda *_: None, "backward_with_map": eager.backward}
    engine = types.SimpleNamespace(
        NAME="partly", COMPUTES_MAP=False, DIFFERENTIABLE=False, available=eager.available, why_not=eager.why_not,
        takes_value_dim=eager.takes_value_dim, forward=eager.forward, backward=eager.backward,
        **{name: values[name] for name in names},
    )  # fmt: skip
    with pytest.raises(TypeError, match="engine: expected all or none of FUSED_MAP, why_not_fused, backward_with_map"):
        engine_selection.register_engine(engine)
