# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules of the code that no linter knows; the import law itself is in pyproject.toml."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from luksrotd import errors

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "luksrotd"
MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_HANDLER_STATEMENTS = 8

#: Who may import what, by path under luksrotd/: also where import-linter cannot see it, in functions say.
CONTAINED = {
    "cffi": ("cryptsetup/",),
    "_cffi_backend": ("cryptsetup/",),
    "dbus_next": ("bus/", "ctl/"),
    "pyudev": ("host/udev.py",),
    "systemd": ("host/",),
    "luksrotd.daemon": ("__main__.py",),
}

SPDX = "SPDX-License-Identifier: GPL-2.0-or-later"
#: Text whose first two lines (a script starts with #!) say under which licence it is.
LICENSED = ("*.py", "*.service", "*.socket", "*.tmpfiles", "*.sysusers", "*.toml", "*.in", "*.rules", "*.conf", "*.sh")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def within(path: Path, folders: tuple[str, ...]) -> bool:
    return path.relative_to(PACKAGE).as_posix().startswith(folders)


def imports(path: Path) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where(path, node)}: imports are absolute"
            yield node, node.module or ""
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def named(node: ast.AST) -> str:
    """The last identifier of an expression: ``device`` for ``self.device``, '' for what has none."""
    match node:
        case ast.Name(name) | ast.Attribute(_, name):
            return name
        case ast.Call(function):
            return named(function)
        case _:
            return ""


def device_writes(path: Path) -> Iterator[ast.AST]:
    """Every use of an attribute ``write`` that can be ``HeaderDevice.write(offset, data)``.

    Streams take one argument.  A shadow takes the same two, and must be called a shadow.  The attribute without a call
    would be a way to hide one.
    """
    calls = {id(node.func): node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr == "write":
            call = calls.get(id(node))
            one_argument = (
                call and len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred)
            )
            if not one_argument and not named(node.value).endswith("shadow"):
                yield node


def shadows_that_are_devices(path: Path) -> Iterator[ast.AST]:
    """Names ``…shadow`` with a device's type."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.arg(name, annotation) | ast.AnnAssign(ast.Name(name), annotation):
                if name.endswith("shadow") and annotation and "HeaderDevice" in ast.unparse(annotation):
                    yield node
            case _:
                pass


def test_import_law():
    # The console script of this very environment.
    linter = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("library", CONTAINED)
def test_libraries_stay_behind_their_seam(library):
    assert not [
        where(path, node)
        for path in MODULES
        if not within(path, CONTAINED[library])
        for node, name in imports(path)
        if name == library or name.startswith(library + ".")
    ]


def test_no_import_by_name():
    """It would go past every rule above."""
    assert not [
        where(path, node)
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and named(node.func) in {"__import__", "import_module"}
    ]


def test_modules_are_short():
    assert not [path for path in MODULES if len(path.read_text(encoding="utf-8").splitlines()) > MAX_MODULE_LINES]


def test_functions_are_short():
    assert not [
        f"{where(path, node)} {node.name}"
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def test_system_calls_that_write_are_the_hosts():
    calls = {"os.write", "os.writev", "os.pwrite", "os.pwritev", "os.sendfile", "os.copy_file_range", "os.truncate"}
    assert not [
        where(path, node)
        for path in MODULES
        if not within(path, ("host/", "worker/"))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in calls
    ] + [
        where(path, node)
        for path in MODULES
        for node, name in imports(path)
        if isinstance(node, ast.ImportFrom) and name in calls
    ]


def test_only_the_commit_writes_to_a_device():
    assert not [
        where(path, node)
        for path in MODULES
        if not within(path, ("service/commit.py", "host/", "worker/"))
        for node in (*device_writes(path), *shadows_that_are_devices(path))
    ]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("device.write(0, data)", 1),
        ("self.device.write(offset, data=data)", 1),
        ("device.write(*arguments)", 1),
        ("device.write(**arguments)", 1),
        ("put = device.write", 1),
        ("devices[0].write(0, data)", 1),
        ("stream.write(data)", 0),
        ("shadow.write(0, data)", 0),
        ("self._shadow.write(0, data)", 0),
    ],
)
def test_what_counts_as_a_write_to_a_device(code, found, tmp_path):
    path = tmp_path / "code.py"
    path.write_text(code, encoding="utf-8")
    assert len(list(device_writes(path))) == found


@pytest.mark.parametrize("code", ["def f(shadow: HeaderDevice): ...", "old_shadow: HeaderDevice | None = None"])
def test_a_device_cannot_be_called_a_shadow(code, tmp_path):
    path = tmp_path / "code.py"
    path.write_text(code, encoding="utf-8")
    assert len(list(shadows_that_are_devices(path))) == 1


LOGIC = (
    ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar, ast.With, ast.AsyncWith, ast.Match, ast.FunctionDef,
    ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Yield, ast.YieldFrom, ast.Global, ast.Nonlocal, ast.Delete,
)  # fmt: skip
TASKS = {"create_task", "ensure_future", "gather", "wait", "TaskGroup", "run_in_executor"}


def handlers(path: Path) -> Iterator[ast.AsyncFunctionDef]:
    """Methods under ``@exposed``, and what else of their classes can be awaited."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.AsyncFunctionDef)]
            if any(named(decorator) == "exposed" for method in methods for decorator in method.decorator_list):
                yield from methods


def logic_of(handler: ast.AsyncFunctionDef) -> list[str]:
    """What is too much for a handler, which reads arguments, calls the service once and says what that said."""
    inner = [node for statement in handler.body for node in ast.walk(statement)]
    statements = [node for node in inner if isinstance(node, ast.stmt)]
    branches = [node for node in statements if isinstance(node, ast.If)]
    too_much = [type(node).__name__ for node in inner if isinstance(node, LOGIC)]
    too_much += ["tasks"] * any(named(node) in TASKS for node in inner if isinstance(node, ast.Call))
    too_much += ["else"] * any(branch.orelse for branch in branches) + ["branches"] * (len(branches) > 1)
    has_docstring = ast.get_docstring(handler) is not None
    return too_much + ["statements"] * (len(statements) - has_docstring > MAX_HANDLER_STATEMENTS)


def test_handlers_hold_no_logic():
    found = {
        f"{where(path, handler)} {handler.name}": logic_of(handler)
        for path in MODULES
        if within(path, ("bus/",))
        for handler in handlers(path)
    }
    assert len(found) > 20, "handlers are found"
    assert {name: too_much for name, too_much in found.items() if too_much} == {}


@pytest.mark.parametrize(
    ("body", "too_much"),
    [
        (["'''Doc.'''; a = 1; b = 2; c = 3; d = 4; e = 5; f = 6; g = 7; return await self.service.do(a)"], []),
        (["'''Doc.'''; a = 1; b = 2; c = 3; d = 4; e = 5; f = 6; g = 7; h = 8; return h"], ["statements"]),
        (["return [row(item) for item in await self.service.do()]"], []),
        (["for item in items: self.service.do(item)"], ["For"]),
        (["try: self.service.do()", "except Busy: pass"], ["Try"]),
        (["async with self.lock: pass"], ["AsyncWith"]),
        (["asyncio.create_task(self.service.do())"], ["tasks"]),
        (["if caller.uid: raise NotAuthorized()", "return self.service.do()"], []),
        (["if caller.uid: self.service.do()", "else: self.service.undo()"], ["else"]),
        (["if caller.uid: self.service.do()", "if caller.name: self.service.undo()"], ["branches"]),
        (["return await self.service.do(lambda: 1)"], ["Lambda"]),
    ],
)
def test_what_counts_as_logic(body, too_much, tmp_path):
    lines = [
        "class A:",
        " @exposed()",
        " async def x(self): ...",
        " async def y(self):",
        *(f"  {line}" for line in body),
    ]
    path = tmp_path / "code.py"
    path.write_text("\n".join(lines), encoding="utf-8")
    x, y = handlers(path)
    assert (logic_of(x), logic_of(y)) == ([], too_much)


def test_error_codes_are_unique():
    coded = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.LuksrotdError) and cls.__dict__.get("code")
    ]
    assert sorted(cls.code for cls in coded) == sorted(errors.leaves())


def test_no_print_outside_the_client():
    assert not [
        where(path, node)
        for path in MODULES
        if not within(path, ("ctl/",))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def test_nothing_is_left_to_do():
    marks = ["TO" + "DO", "FIX" + "ME", "X" * 3]
    assert not [
        f"{path.relative_to(ROOT)}: {mark}"
        for path in MODULES + TESTS
        for mark in marks
        if mark in path.read_text(encoding="utf-8")
    ]


def test_every_file_names_its_licence():
    top = ("luksrotd", "tests", "systemd", "dbus", "polkit", "packaging")
    files = {path for folder in top for pattern in LICENSED for path in (ROOT / folder).rglob(pattern)}
    files |= {ROOT / name for name in ("Makefile", "pyproject.toml", ".ci/run", "packaging/install-deps")}
    assert not [
        path.relative_to(ROOT)
        for path in sorted(files)
        if not any(SPDX in line for line in path.read_text(encoding="utf-8").splitlines()[:5])
    ]


def test_tests_neither_skip_nor_mock():
    forbidden = {"skip", "skipif", "importorskip", "SkipTest", "skipTest", "skipUnless"}
    assert not [
        where(path, node)
        for path in TESTS
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Attribute) and node.attr in forbidden)
        or (isinstance(node, ast.Import) and any(alias.name.startswith("unittest") for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest"))
    ]
