"""Methods as the command line names them: NAME, NAME:window=256, FILE.py:NAME."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from methods import METHODS, Method
from methods.presets import resolve

# What code of a method's author may raise, besides what kernels do.
AUTHOR_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip

OWN_MODULES = "user_methods_"  # with which the names of modules from files of the user's own begin
_NOTATION = "parameters are written name=value,name=value in Python's notation"


def parse_method(spec: str) -> Method:
    """The Method of a specification.

    Args:
        spec: a preset's name, or FILE.py:NAME for a preset in a file of the user's own; either may
            be followed by `:parameter=value,...` in Python's notation.

    Raises:
        ValueError: in one line, what is wrong and what is allowed.
    """
    path = source_file(spec)
    if path is None:
        name, _, parameters = spec.partition(":")
        # A preset is one whatever files lie here; of another name a file may be meant.
        if name not in METHODS and (name.endswith(".py") or Path(f"{name}.py").is_file()):
            raise ValueError(f"method is {spec!r}; one in a file is written FILE.py:NAME")
        method = resolve(name)
    else:
        name, _, parameters = spec.partition(".py:")[2].partition(":")
        method = _load(path, name)
    return _with_parameters(method, parameters, spec) if parameters else method


def source_file(spec: str) -> Path | None:
    """The user's file that a specification names, or None for a preset of the suite."""
    stem, separator, _ = spec.partition(".py:")
    return Path(stem + ".py").resolve() if separator else None


def parameters_text(method: Method) -> str | None:
    """Every parameter as `name=value`, comma-separated; None for a method without any."""
    values = [(f.name, getattr(method, f.name)) for f in dataclasses.fields(method)]
    return ",".join(f"{name}={value!r}" for name, value in values) or None


def _with_parameters(method: Method, text: str, spec: str) -> Method:
    known = [field.name for field in dataclasses.fields(method)]
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except SyntaxError:
        raise ValueError(f"method {spec!r}: {_NOTATION}") from None
    try:
        values = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except ValueError:
        raise ValueError(
            f"method {spec!r}: a value is no number, text in quotes, True, False, "
            "None or tuple of such"
        ) from None
    if call.args or not values or None in values:
        raise ValueError(f"method {spec!r}: {_NOTATION}")
    for name in values:
        if name not in known:
            allowed = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{method.name} has no parameter {name!r}; {allowed}")
    try:
        return dataclasses.replace(method, **values)
    except TypeError as error:
        raise ValueError(f"method {spec!r}: {error}") from None


def _load(path: Path, name: str) -> Method:
    if not path.is_file():
        raise ValueError(f"method file {path} does not exist")
    module = _module(path, path.stat().st_mtime_ns)
    found = [key for key, value in vars(module).items() if isinstance(value, Method)]
    method = vars(module).get(name)
    if isinstance(method, type) and issubclass(method, Method):
        raise ValueError(
            f"{name} in {path} is a class, and has to be one of its instances: "
            f"{name} = {method.__name__}()"
        )
    if not isinstance(method, Method):
        has = f"it has {', '.join(found)}" if found else "it has no Method at its top level"
        raise ValueError(f"method file {path} has no Method named {name!r}; {has}")
    parameters = getattr(method, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen or not getattr(method, "name", None):
        raise ValueError(
            f"{name} in {path} must be a frozen dataclass with a class attribute name"
        )
    if type(method).mask_mod is Method.mask_mod:
        raise ValueError(f"{name} in {path} defines no mask_mod, which says what a query sees")
    if method.name in METHODS and type(method) is not type(METHODS[method.name]):
        raise ValueError(f"{name} in {path} is named {method.name!r}, which is a preset's name")
    return method


@lru_cache(maxsize=64)
def _module(path: Path, changed: int) -> ModuleType:
    """A file of the user's own, run once as long as it does not change."""
    module_name = OWN_MODULES + path.stem
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (*AUTHOR_ERRORS, SystemExit) as error:
        raise ValueError(f"method file {path}: {type(error).__name__}: {error}") from None
    return module
