"""A quicker start: torch's compiler is imported when something needs it.

Optimizers, DistributedDataParallel, FSDP2 and ``torch.utils.checkpoint`` import it only to tell it what it may not
compile, or to read a setting of it, as do ``torch.use_deterministic_algorithms`` and torch's profiler: two seconds of a
core, and seventy megabytes, in each rank. So do torch.distributed.checkpoint and torch_geometric, to ask whether a
model is compiled. And torch's checks of what an operator is given, for each sample of a cross entropy among others,
import its symbolic shapes, half a second of a core, to find that True is true.
"""

from __future__ import annotations

import os
import sys

from .at_import import AtImport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_COMPILER, _BACKEND = "torch._dynamo", "torch._inductor"
# Who imports what of the compiler, and then uses nothing of it but what its stand-ins have.
_CONTENT = {
    "torch._compile": _COMPILER,
    "torch._logging._internal": _COMPILER,  # where it tells of an exception
    "torch._subclasses.fake_tensor": f"{_COMPILER}.config",
    "torch": f"{_BACKEND}.config",  # use_deterministic_algorithms
    "torch.profiler.profiler": f"{_BACKEND}.config",
    f"{_BACKEND}.config": f"{_BACKEND}.custom_graph_pass",
}
# The modules among them, of settings, which need nothing of their package.
_SETTINGS = {*_CONTENT.values()} - {_COMPILER}
# Modules that keep the compiler from a function for one call of it.
_CALL_AT_ONCE = ("torch._compile", "torch.distributed.fsdp._fully_shard._fsdp_common", "torch.utils.checkpoint")
# What imports the compiler to ask, when it is called, whether something is compiled.
_ASK_ONLY = ("torch_geometric.isinstance",)
_IMPORTERS = ("importlib._bootstrap", "_frozen_importlib")


def compile_on_demand(torch: Any) -> None:
    """Let training go on without torch's compiler until something asks for it, such as ``torch.compile``.

    As long as nobody has imported it, nothing is compiled, so a function that it must leave alone is called as it is.
    From its import on, what torch has made of the function is.
    """
    if "_dynamo" in vars(torch):
        return
    import contextlib

    functions: list[Any] = []

    def disable(*args: Any, **options: Any) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__")
        if asking not in _CALL_AT_ONCE:
            return _import(_COMPILER).disable(*args, **options)
        if asking == "torch._compile":
            functions.append(args[0])  # it keeps the answer, as an attribute of the function
        return args[0]

    stand_in = _OnDemand(
        _COMPILER,
        disable=disable,
        utils=_OnDemand(f"{_COMPILER}.utils", get_optimize_ddp_mode=_mode),
        eval_frame=_OnDemand(f"{_COMPILER}.eval_frame", OptimizedModule=_Compiled),
        compiled_autograd=_OnDemand(f"{_COMPILER}.compiled_autograd", _disable=contextlib.nullcontext),
    )
    vars(torch)["_dynamo"] = stand_in
    optimizers: list[Any] = [cls for cls in vars(torch.optim).values() if isinstance(cls, type)]
    for optimizer in optimizers:
        step = vars(optimizer).get("step")
        if _COMPILER in getattr(getattr(step, "__code__", None), "co_names", ()):
            optimizer.step = _step_without_compiler(torch, step)

    def with_stand_in(execute: Callable[[Any], None], module: Any) -> None:
        if vars(torch).get("_dynamo") is stand_in:
            sys.modules.setdefault(_COMPILER, stand_in)
        try:
            execute(module)
        finally:
            _stand_aside(_COMPILER)

    for name in _ASK_ONLY:
        if name not in sys.modules:
            sys.meta_path.insert(0, AtImport(name, with_stand_in))

    check, stand_in_check = torch._check_with, _check_at_once(torch._check_with)
    torch._check_with = stand_in_check

    def forget() -> None:
        for function in functions:
            vars(function).pop("__dynamo_disable", None)
        if torch._check_with is stand_in_check:  # the compiler knows torch's own by what it is
            torch._check_with = check

    sys.meta_path.insert(0, _BeforeCompiler(stand_in, forget))
    if "_inductor" not in vars(torch):
        vars(torch)["_inductor"] = _OnDemand(_BACKEND)
        sys.meta_path.insert(0, _BeforeCompiler(vars(torch)["_inductor"]))


def _step_without_compiler(torch: Any, step: Any) -> Any:
    import functools

    @functools.wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _COMPILER in sys.modules:
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step.__wrapped__(self, *args, **kwargs)

    return stepped


def _check_at_once(check: Any) -> Any:
    import functools

    @functools.wraps(check)
    def checked(error_type: Any, cond: Any, message: Any) -> None:
        if cond is not True:
            check(error_type, cond, message)

    return checked


def _mode() -> str:
    """What the compiler would do with DistributedDataParallel if nobody changes its settings."""
    return "ddp_optimizer"


class _Compiled:
    """What a module is not, as long as nothing is compiled."""


class _OnDemand(type(sys)):  # type: ignore[misc]
    """Stands for a module until something of it is used that torch's own modules are not given here.

    Whatever it is asked for, it is no longer found by an import after that.
    """

    def __init__(self, name: str, **given: object) -> None:
        super().__init__(name)
        self.__dict__["__given"] = given

    def __getattr__(self, name: str) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        is_torch = asking.partition(".")[0] == "torch"
        if asking in _IMPORTERS or (is_torch and name == "__path__"):  # as `from package import module` does
            raise AttributeError(name)
        _stand_aside(self.__name__)
        if is_torch and self.__name__ not in sys.modules:
            if name in self.__dict__["__given"]:
                return self.__dict__["__given"][name]
            if f"{self.__name__}.{name}" in _SETTINGS:
                return _alone(f"{self.__name__}.{name}")
        return getattr(_import(self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("__"):  # by the import
            super().__setattr__(name, value)
        else:
            setattr(_import(self.__name__), name, value)


def _alone(name: str) -> ModuleType:
    """One module of a package, without the package; where another thread imports it, when it is there."""
    import importlib.util

    if name in _CONTENT:  # what it imports is there before its lock is held
        _alone(_CONTENT[name])
    file = os.path.join(sys.modules["torch"].__path__[0], *name.split(".")[1:]) + ".py"
    with _import_lock(name):
        if name not in sys.modules:
            _bootstrap()._load_unlocked(importlib.util.spec_from_file_location(name, file))
    return sys.modules[name]


def _bootstrap() -> Any:
    return sys.modules["_frozen_importlib"]


def _import_lock(name: str) -> Any:
    """What the import machinery holds while it imports a module."""
    return _bootstrap()._ModuleLockManager(name)


def _import(name: str) -> Any:
    import importlib

    _stand_aside(name)
    return importlib.import_module(name)


def _stand_aside(name: str) -> None:
    """Let the next import of a module find itself, and not what stands for it."""
    if isinstance(sys.modules.get(name), _OnDemand):
        with _import_lock(name):
            if isinstance(sys.modules.get(name), _OnDemand):
                del sys.modules[name]


class _BeforeCompiler:
    """Gives the stand-in to whom it is enough; at any other import of the package, takes it away.

    Args:
        stand_in: What stands for the package.
        forget: Called before that other import.
    """

    def __init__(self, stand_in: Any, forget: Callable[[], None] = lambda: None) -> None:
        self._stand_in = stand_in
        self._forget = forget

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._stand_in.__name__ or self not in sys.meta_path:
            return None
        importer, wanted = _asking()
        if _CONTENT.get(importer) == wanted:
            from importlib.machinery import ModuleSpec

            if wanted in _SETTINGS:
                _alone(wanted)
            return ModuleSpec(name, self)  # type: ignore[arg-type]
        sys.meta_path.remove(self)
        vars(sys.modules["torch"]).pop(name.rpartition(".")[2], None)
        self._forget()
        finder = AtImport(name, _with_what_is_there)
        sys.meta_path.insert(0, finder)
        return finder.find_spec(name, path, target)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        stand_in: ModuleType = self._stand_in
        return stand_in

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it is there."""


def _with_what_is_there(execute: Callable[[Any], None], module: Any) -> None:
    """Import a package of which some modules have been imported before."""
    for name in _SETTINGS:
        if name.startswith(f"{module.__name__}.") and name in sys.modules:
            setattr(module, name.rpartition(".")[2], sys.modules[name])
    execute(module)


def _asking() -> tuple[str, str]:
    """The module whose import statement the import machinery works on, and what that imports."""
    frame: Any = sys._getframe(2)
    wanted = ""
    while frame is not None and frame.f_globals.get("__name__") in _IMPORTERS:
        wanted = frame.f_locals.get("name", "") if frame.f_code.co_name == "_find_and_load" else wanted
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame is not None else "", wanted
