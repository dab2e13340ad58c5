"""Who may import whom: arrows point from run.py down to the activations, never up."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "kwta_exp"

LAYERS = [
    {"allocator", "compiled", "errors", "failures", "fields", "hardware", "progress", "received"},
    {"gpu_slots", "interruption", "randomness_numba", "randomness_triton"},
    {"orphans", "randomness"},
    {"activations", "environment", "storage", "runtime", "explain", "naming", "settings"},
    {"sealed", "download", "trust", "attempts", "sweeps"},
    {"results_file"},
    {"run_folder"},
    {"recorded"},
    {"attacks", "models", "data", "checkpoint"},
    {"training", "evaluation", "analysis"},
    {"report"},
    {"draw"},
    {"tracking"},
    {"config", "shell"},
    {"adjust", "conventions", "suggest", "grid"},
    {"plan"},
    {"parts", "processes"},
    {"audit", "trained_networks"},
    {"experiment", "verify", "transfer_matrix"},
    {"command", "examples"},
    {"figures"},
    {"cli"},
    {"__main__"},
]
HYDRA_ALLOWED = {"command.py", "conventions.py", "grid.py", "adjust.py", "config.py", "suggest.py", "shell.py"}
MODULES = sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "kwta_exp" else {module}
    return found


def layer(part: str) -> int:
    return next(depth for depth, parts in enumerate(LAYERS) if part in parts)


def violations(path: Path, name: str) -> list[str]:
    part = name.split(".")[0]
    found = []
    for imported in imports(path):
        top = imported.split(".")
        if top[0] in ("hydra", "omegaconf") and path.name not in HYDRA_ALLOWED:
            found.append(f"{name} imports {imported}")
        if top[0] == "kwta_exp" and len(top) > 1 and top[1] != part and layer(top[1]) >= layer(part):
            found.append(f"{name} imports {imported}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    if name != "__init__":
        assert violations(path, name) == []


def test_the_guard_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "kwta.py"
    bad.write_text(
        "from kwta_exp.evaluation import evaluate\nfrom kwta_exp import experiment\nimport hydra.utils\n"
    )
    assert len(violations(bad, "activations.kwta")) == 3


COMPILED = {"jit", "_jit", "typed_intrinsic"}
"""Decorators of compiled kernels, which take scalars and arrays one by one."""


def too_many_parameters(path: Path) -> list[str]:
    """The functions with more than seven parameters, apart from kernels and constructors that mirror a YAML."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            names = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
            decorators = {ast.unparse(each).partition("(")[0] for each in node.decorator_list}
            is_constructor = node.name == "__init__" and "validate_call" in decorators
            if len(names) > 7 and not is_constructor and not decorators & COMPILED:
                found.append(f"{path.name}: {node.name} takes {len(names)}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_function_takes_more_than_seven_parameters(path: Path) -> None:
    assert too_many_parameters(path) == []


def test_the_guard_of_parameters_can_fail(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f(a, b, c, d, e, g, h, *, i): ...\n")
    assert too_many_parameters(bad) == ["bad.py: f takes 8"]
