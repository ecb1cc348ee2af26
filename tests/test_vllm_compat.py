"""What is borrowed from vLLM exists, in the installed release and in the newest one that the requirement admits."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from vllm_hlwq.vllm_compat import BORROWED, NEWEST_CHECKED, Borrowed, borrow

PACKAGE = Path(__file__).parent.parent / "vllm_hlwq"


@pytest.mark.parametrize("name", BORROWED)
def test_the_installed_vllm_has_it(name: str) -> None:
    found = borrow(name)
    for member in BORROWED[name].members:
        of_instances = set(getattr(found, "__dataclass_fields__", {}))
        if inspect.isclass(found) and not hasattr(found, member):
            of_instances |= set_on_self(ast.parse(textwrap.dedent(inspect.getsource(found))))
        assert hasattr(found, member) or member in of_instances, f"{name}.{member}"


def set_on_self(tree: ast.AST) -> set[str]:
    """Names that the code assigns to attributes of ``self``."""
    targets = [t for node in ast.walk(tree) if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return {
        target.attr
        for target in targets
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }


@pytest.fixture(scope="session")
def newest_wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("vllm-wheel")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), f"vllm=={NEWEST_CHECKED}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and not os.environ.get("CI"):
        pytest.skip(f"vllm {NEWEST_CHECKED} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("vllm-*.whl")))


def definitions(wheel: zipfile.ZipFile, module: str) -> dict[str, ast.stmt]:
    """Top-level names that a module of the wheel defines or assigns, without importing it."""
    path = module.replace(".", "/")
    names = set(wheel.namelist())
    file = f"{path}.py" if f"{path}.py" in names else f"{path}/__init__.py"
    found: dict[str, ast.stmt] = {}
    for statement in ast.parse(wheel.read(file)).body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found.update({t.id: statement for t in targets if isinstance(t, ast.Name)})
        elif isinstance(statement, ast.ImportFrom):
            found.update({alias.asname or alias.name: statement for alias in statement.names})
        elif isinstance(statement, ast.If):  # `if TYPE_CHECKING:` lists what a module's __getattr__ provides
            for inner in ast.walk(statement):
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    found[inner.target.id] = inner
    return found


def members(wheel: zipfile.ZipFile, entry: Borrowed) -> set[str]:
    """Names that a class of the wheel has, with those of its bases in the modules that it names them from."""
    scope = definitions(wheel, entry.module)
    statement = scope[entry.attribute]
    if isinstance(statement, ast.ImportFrom):
        if not str(statement.module).startswith("vllm"):
            return set()
        return members(wheel, Borrowed(str(statement.module), entry.attribute, entry.reason))
    if not isinstance(statement, ast.ClassDef):
        return set()
    found = set()
    for inner in statement.body:
        if isinstance(inner, ast.FunctionDef):
            found |= {inner.name} | set_on_self(inner)
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            found.add(inner.target.id)
        elif isinstance(inner, ast.Assign):
            found.update(target.id for target in inner.targets if isinstance(target, ast.Name))
    for base in statement.bases:
        if isinstance(base, ast.Name) and base.id in scope:
            found |= members(wheel, Borrowed(entry.module, base.id, entry.reason))
    return found


@pytest.mark.parametrize("name", BORROWED)
def test_the_newest_checked_vllm_has_it(name: str, newest_wheel: zipfile.ZipFile) -> None:
    entry = BORROWED[name]
    assert entry.attribute in definitions(newest_wheel, entry.module)
    if entry.members:
        assert set(entry.members) <= members(newest_wheel, entry)


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports from, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def test_nothing_else_imports_vllm() -> None:
    def imports_vllm(path: Path) -> bool:
        return any(module.partition(".")[0] == "vllm" for module in imports_of(path))

    importers = [path.name for path in PACKAGE.rglob("*.py") if imports_vllm(path)]
    assert importers == []  # vllm_compat itself imports by name, through importlib.import_module
    users = [path.name for path in PACKAGE.rglob("*.py") if "importlib" in imports_of(path)]
    assert users == ["vllm_compat.py"]


def test_every_borrowed_name_is_used_and_every_used_name_is_listed() -> None:
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "borrow":
                used |= {inner.value for inner in ast.walk(node.args[0]) if isinstance(inner, ast.Constant)}
    types = {"WNA16_SUPPORTED_TYPES_MAP", "WNA16_ZP_SUPPORTED_TYPES_MAP"}  # chosen by a variable
    assert used | types == set(BORROWED)
