"""What the two packages promise: what they import, what they export, and what they say where something is lacking."""

import ast
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

import expvae
from expvae_book import training
from expvae_book.places import REPOSITORY

LIB = REPOSITORY / "lib"
PACKAGES = ("expvae", "expvae.metrics", "expvae.models")
NEEDED = {"torch", "numpy", "scipy", "jaxtyping"}
COMMAND = {"matplotlib", "PIL", "safetensors", "tqdm"}  # what the extra cli brings


def run(code: str, *, cwd: Path = REPOSITORY, path: Path = LIB) -> subprocess.CompletedProcess:
    """Run Python code in a process of its own that sees the packages in one folder only."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    environment.pop("EXPVAE_DATA", None)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def imports(file: Path) -> set[tuple[str, bool]]:
    """Names of the packages that a module imports, and whether that is done when it is imported itself."""
    tree, found = ast.parse(file.read_text()), set()
    inner = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found |= {(name.partition(".")[0], node not in inner) for name in names}
    return found


def test_the_library_needs_four_packages_and_never_the_book():
    for file in (LIB / "expvae").rglob("*.py"):
        foreign = {(name, top) for name, top in imports(file) if name not in sys.stdlib_module_names}
        allowed = {(name, top) for name in (*NEEDED, "expvae") for top in (True, False)}
        if file.name == "_mvtec.py":
            allowed.add(("torchvision", True))
        if file.name == "_disentanglement.py":
            allowed.add(("sklearn", False))
        if file.name == "__main__.py":
            allowed |= {(name, True) for name in COMMAND}
        assert foreign <= allowed, file


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_exported_to_python_and_to_type_checkers(package):
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    tree = ast.parse(Path(module.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    told = [alias.asname for node in checked.body for alias in node.names]
    assert sorted(told) == module.__all__
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing


def test_a_wrong_shape_raises_in_both_packages():
    with pytest.raises(TypeCheckError):
        expvae.kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeCheckError):
        training.to_unit(torch.zeros(3, 3))


@pytest.mark.parametrize("name", ["expvae", "expvae_book"])
def test_a_second_copy_of_a_package_is_refused(name):
    done = run(f"import lib.{name}")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"ImportError: import this package as {name}, not as lib.{name}: ")


def test_records_are_read_and_drawn_as_tables_without_torch():
    code = """
import sys
from expvae_book import chapters, claims, figures, matching, publications, report, runs, tables
from expvae_book.pages import disentanglement
stored = runs.find()
assert stored
claims.verdicts(stored)
report.to_html(report.wide(matching.beside(publications.read(), stored)), "all")
tables.every_run("layer2.1.conv1", "liu2020_code")
disentanglement.results(runs.find("disentanglement"))
figures.training_curves(runs.find("mnist")[0].record["losses"])
print({"torch", "torchvision", "sklearn"} & set(sys.modules))
"""
    done = run(code)
    assert done.stdout == "set()\n", done.stderr


def test_the_pages_on_the_library_import_nothing_of_it():
    code = """
import sys
from expvae_book import api
shown = {package: api.exported(package) for package in ("expvae", "expvae.metrics", "expvae.models")}
for one in shown["expvae"].values():
    assert list(api.described(one, 6))
print({"expvae", "torch"} & set(sys.modules), sorted(map(len, shown.values()))[0] > 9)
"""
    done = run(code)
    assert done.stdout == "set() True\n", done.stderr


def test_the_handler_of_chapters_needs_nothing_but_click():
    # Papermill loads it in every environment where the package is installed, whatever else is.
    code = """
import sys
before = set(sys.modules)
from expvae_book.chapters import ChapterHandler
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(name for name in loaded if not name.startswith("_")))
"""
    assert run(code).stdout == "['click', 'expvae_book']\n"


def test_papermill_starts_with_what_it_is_taught_and_nothing_else_of_the_book():
    code = """
import sys, papermill
print("expvae_book.engine" in sys.modules, {"torch", "jupytext", "myst_nb", "matplotlib"} & set(sys.modules))
"""
    assert run(code).stdout == "True set()\n"
    assert run("import expvae_book.engine").returncode == 0  # also before papermill


def test_without_a_repository_the_book_says_what_it_needs(tmp_path):
    installed = tmp_path / "python3" / "site-packages"
    shutil.copytree(LIB, installed)
    for code in ("runs.find()", "publications.read()", "data.root()"):
        module = code.partition(".")[0]
        done = run(
            f"from expvae_book import {module}; {code}", cwd=tmp_path, path=tmp_path / "python3" / "site-packages"
        )
        last = done.stderr.splitlines()[-1]
        assert last.startswith("FileNotFoundError: expvae_book needs the repository that it belongs to"), done.stderr


def test_measures_take_arrays_and_tensors_alike():
    # They recognise a tensor without importing torch.
    score = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)
    truth = score > 0
    truth[0, 0, 0] ^= True
    auroc = expvae.metrics.auroc
    assert auroc(score, truth) == auroc(torch.from_numpy(score), torch.from_numpy(truth))
