"""Every docstring example runs, and the public functions of the mathematical rooms have one."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import routing_jax

PACKAGE = Path(routing_jax.__file__).parent
MODULES = ["routing_jax"] + [
    module.name
    for module in pkgutil.walk_packages(routing_jax.__path__, "routing_jax.")
    if not module.name.endswith(".__main__")
]
ROOMS_WITH_EXAMPLES = ("kernels", "routers", "attention", "models")
# Kernels for one accelerator: their examples would not run on another, the API's do.
ONE_DEVICE_PREFIX = "mosaic_"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=flags).failed == 0


def public_functions() -> list[tuple[str, str | None]]:
    """Name and docstring of each public top-level function of those rooms."""
    found = []
    for room in ROOMS_WITH_EXAMPLES:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            inside = path.relative_to(PACKAGE)
            if path.name.startswith("_") or any(
                part.startswith(ONE_DEVICE_PREFIX) for part in inside.parts
            ):
                continue
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                    found.append(
                        (f"{path.relative_to(PACKAGE)}:{node.name}", ast.get_docstring(node))
                    )
    return found


def test_public_functions_show_an_example() -> None:
    functions = public_functions()
    assert functions
    assert [name for name, doc in functions if doc is None or ">>> " not in doc] == []
