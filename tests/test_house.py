"""The house: no import circle, no hidden import, no file or function that does not fit a screen or two."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "bem").rglob("*.py"))
OPTIONAL = {
    "gguf",  # the extras of pyproject.toml, and what they bring
    "datasets",
    "faiss",
    "sentence_transformers",
    "tensorboard",
    "accelerate",
    "llguidance",
    "sqlalchemy",
    "huggingface_hub",
    "torch.utils.tensorboard",
}
LIGHT = {"bem/__init__.py", "bem/cli"}  # what must start fast loads heavy things when they are used


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(node: ast.AST) -> list[str]:
    """Modules that an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def functions(tree: ast.AST):
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_no_module_imports_itself_over_others():
    """Every import counts, inside functions and under TYPE_CHECKING too."""
    edges = {
        name: {
            target
            for node in ast.walk(ast.parse(path.read_text()))
            for target in imported(node)
            if target in MODULES and target != name and target.count(".")
        }
        for name, path in MODULES.items()
        if name != "bem"  # the list of public names, loaded when first used
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(edges.get(name, ())):
                visit(target, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_optional_libraries_are_imported_inside_functions(path):
    where = str(path.relative_to(ROOT))
    if any(where == light or where.startswith(light + "/") for light in LIGHT):
        return
    hidden = {
        name
        for function in functions(ast.parse(path.read_text()))
        for node in ast.walk(function)
        for name in imported(node)
    }
    assert not {name for name in hidden if not any(name.startswith(o) for o in OPTIONAL)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    long = {f.name: n for f in functions(ast.parse(text)) if (n := length(f)) > 40}
    assert not long
