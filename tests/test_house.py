"""The house around the code: floors, packaging, links, and what no file may name."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "routing_jax"
LINKED = ("kernels", "train", "evals")
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders() -> dict[str, Path]:
    """Dotted name → folder of every package, links followed."""
    walk = os.walk(PACKAGE, followlinks=True)
    paths = [Path(folder) for folder, _, files in walk if any(f.endswith(".py") for f in files)]
    return {".".join(path.relative_to(ROOT).parts): path for path in paths}


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_imports_point_only_downwards() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 broken" in run.stdout


def test_contributing_tells_what_ci_makes() -> None:
    made = re.findall(r"^make (\S+)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    told = re.search(r"^`bash \.ci/run` is .*", text, re.MULTILINE)
    assert told
    assert re.findall(r"`make (\S+)`", told[0]) == made


def test_linked_rooms_are_imported_as_subpackages() -> None:
    bare = []
    for path in tracked_files():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] if node.level == 0 else []
            else:
                continue
            bare += [f"{path}: {name}" for name in names if name.split(".")[0] in LINKED]
    assert bare == []


def test_links_are_relative() -> None:
    for name in LINKED:
        assert (PACKAGE / name).is_symlink()
        assert (PACKAGE / name).readlink() == Path("..") / name


def test_pyproject_lists_every_package() -> None:
    assert CONFIG["tool"]["setuptools"]["packages"] == sorted(folders())


def test_every_package_folder_has_an_init() -> None:
    assert [name for name, path in folders().items() if not (path / "__init__.py").is_file()] == []


# Written so that this file does not match itself.
FORBIDDEN = {
    "a registry's host": r"pypi[.]org|pythonhosted[.]org|npmjs[.]org|crates[.]io|debian[.]org",
    "a path of some machine": r"(?<![\w.$}])/(work|root|home)/[\w.]",
    "a folder beside the checkout": r"[.][.]/shar[e]d",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what].encode())
    hits = {str(path): pattern.findall(path.read_bytes()) for path in tracked_files()}
    assert {path: found for path, found in hits.items() if found} == {}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist and the wheel built from it, made in a copy: setuptools leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("routing_jax", *LINKED):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    build = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return copy / "dist"


def python_files() -> set[str]:
    return {
        f"{name.replace('.', '/')}/{path.name}"
        for name, folder in folders().items()
        for path in folder.glob("*.py")
    }


def test_sdist_holds_each_source_once(distributions: Path) -> None:
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as sdist:
        names = [name.split("/", 1)[1] for name in sdist.getnames() if name.endswith(".py")]
        assert not any(member.issym() for member in sdist.getmembers())
    assert sorted(names) == sorted(python_files())


IMPORT_ALL = """
import importlib, pkgutil, sys
site, checkout = sys.argv[1:]
sys.path = [site] + [path for path in sys.path if path != checkout]
import routing_jax
modules = list(pkgutil.walk_packages(routing_jax.__path__, "routing_jax.", onerror=print))
for found in modules:
    if not found.name.endswith(".__main__"):
        module = importlib.import_module(found.name)
        assert module.__file__.startswith(site), module.__file__
print(len(modules))
"""


def test_wheel_imports_outside_the_checkout(distributions: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    info = next(site.glob("*.dist-info"))
    assert sorted(path.name for path in site.iterdir()) == sorted([info.name, "routing_jax"])
    assert {str(path.relative_to(site)) for path in site.rglob("*.py")} == python_files()
    assert (info / "licenses" / "LICENSE").is_file()

    command = [sys.executable, "-I", "-c", IMPORT_ALL, str(site), str(ROOT)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(python_files()) - 1  # the package itself is not walked
