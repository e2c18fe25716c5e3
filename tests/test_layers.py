"""Imports point down, and never in a circle; functions and files stay short. All is read from the source."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"hfclip": ROOT / "src", "training": ROOT, "conversion": ROOT}
MODULES = {
    ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): path
    for layer, base in LAYERS.items()
    for path in sorted((base / layer).rglob("*.py"))
}


def imported_by(module: str) -> Iterator[str]:
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            for name in node.names:
                submodule = f"{origin}.{name.name}"
                yield submodule if submodule in MODULES else origin


IMPORTS = {module: set(imported_by(module)) for module in MODULES}


def test_library_imports_nothing_above_it_nor_trainer_and_converters_each_other():
    assert "hfclip.losses.exchange" in IMPORTS["hfclip.losses.tiles"] and "hfclip.losses" in IMPORTS["hfclip"]
    for module, imports in IMPORTS.items():
        # In the wheel, trainer and converters are hfclip.training and hfclip.conversion.
        layers = {name.removeprefix("hfclip.").split(".")[0] for name in imports} & {"training", "conversion"}
        assert layers <= {module.split(".")[0]}, module


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imports & set(MODULES) - {module} for module, imports in IMPORTS.items()}
    TopologicalSorter(graph).prepare()  # names the circle, if there is one


def test_no_function_has_more_than_60_lines_and_no_file_more_than_500():
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    functions = [
        (f"{module}.{node.name}", node.end_lineno - node.lineno + 1)
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert not [(name, count) for name, count in functions if count > 60]
    assert not {module: count for module, count in lines.items() if count > 500}
