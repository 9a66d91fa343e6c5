"""Cures of torch for any program: leaving a gloo group without its deadlock, listening on loopback, a quicker start.

In torch 2.13 a ``backward()`` leaves a Python object in what gloo's work keeps, and gloo's thread needs Python's lock
to let it go. Two things go wrong when that meets an end:

- ``dist.destroy_process_group()`` while a DistributedDataParallel lives: the model's C++ reducer then holds the group's
  last reference. When the model is freed, its destructor joins gloo's thread while it holds the lock: for ever.
- The end of the interpreter: gloo's thread asks for a lock that nobody will give it, and the process hangs or aborts
  ("terminate called without an active exception").

The cure for the first: Python keeps the group until the reducer is gone, for Python gives its lock free when it drops a
group. For the second: the lock is free, before the interpreter ends, until gloo's threads have nothing left to do.

Where no launcher holds the store (``mpirun``, ``srun``, Ray), rank 0 of a plain program does, and torch then listens on
every address of the machine. If all ranks are on this machine, the store gets a socket that listens on 127.0.0.1 alone.

Optimizers, DistributedDataParallel, FSDP2 and ``torch.utils.checkpoint`` import torch's compiler, only to tell it what
it may not compile, or to read a setting of it: two seconds of a core, and seventy megabytes, in each rank. So does
torch_geometric, to ask whether a model is compiled. Here it is imported when something needs it.

This file needs neither torch nor the rest of everyrank: ``startup/sitecustomize.py`` loads it by its path, in every
Python program that we start.
"""

from __future__ import annotations

import gc
import os
import sys

# Every Python program that we start pays for these imports: there are few, and the rest is made where it is used.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from socket import socket
    from types import ModuleType
    from typing import Any

_COMPILER = "torch._dynamo"
# Modules that import the compiler and then use nothing of it but what its stand-in has.
_CONTENT = ("torch._compile", "torch._subclasses.fake_tensor")
# Modules that keep the compiler from a function for one call of it.
_CALL_AT_ONCE = ("torch._compile", "torch.distributed.fsdp._fully_shard._fsdp_common", "torch.utils.checkpoint")
# What imports the compiler to ask, when it is called, whether something is compiled.
_ASK_ONLY = ("torch_geometric.isinstance",)
_IMPORTERS = ("importlib._bootstrap", "_frozen_importlib")
_THREAD_NAME = "pt_gloo_runloop"
_LOOK_S = 0.006  # a thread that waits for Python's lock looks again every 5 ms, which the kernel counts
_SETTLE_S = 30.0  # on a machine where a thread that could run is not let for long


def install() -> None:
    """Cure this process: now what it has imported of torch, else right after that import."""
    for name, cure in (("torch.distributed.distributed_c10d", _cure), ("torch", _compile_on_demand)):
        module = sys.modules.get(name)
        if module is not None:
            cure(module)
        elif not any(getattr(finder, "finds", None) == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _AtImport(name, _cured_by(cure)))


class _AtImport:
    """Lets the other finders find one module, and has a say in its import.

    Args:
        name: The module.
        execute: Called in place of what executes the module: with that, and the module.
    """

    def __init__(self, name: str, execute: Callable[[Callable[[Any], None], Any], None]) -> None:
        self.finds = name
        self._execute = execute

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.finds:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._have_a_say(spec.loader)
                return spec
        return None

    def _have_a_say(self, loader: Any) -> None:
        execute = loader.exec_module
        loader.exec_module = lambda module: self._execute(execute, module)


def _cured_by(cure: Callable[[Any], None]) -> Callable[[Callable[[Any], None], Any], None]:
    def execute_and_cure(execute: Callable[[Any], None], module: Any) -> None:
        was_enabled = gc.isenabled()
        gc.disable()  # a tenth of the import is spent on looking for garbage that it does not make
        try:
            execute(module)
        finally:
            if was_enabled:
                gc.enable()
        cure(module)

    return execute_and_cure


def _cure(module: Any) -> None:
    import atexit
    import functools

    original = module.destroy_process_group
    if hasattr(original, "_outlives_reducers"):
        return

    last_ids: list[int] = []

    def noting_the_end(leave: Any) -> Any:
        @functools.wraps(leave)
        def left(*args: Any, **kwargs: Any) -> None:
            newest, was_joined = _newest_group(), module.is_initialized()
            leave(*args, **kwargs)
            if was_joined and not module.is_initialized():
                last_ids.append(newest)

        return left

    @functools.wraps(original)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        _keep_for_reducers(list(module._world.pg_map))
        destroy(*args, **kwargs)

    destroy = noting_the_end(original)
    destroy_process_group._outlives_reducers = True  # type: ignore[attr-defined]
    destroy_process_group.last_ids = last_ids  # type: ignore[attr-defined]
    module.destroy_process_group = destroy_process_group
    module._abort_process_group = noting_the_end(module._abort_process_group)
    package: Any = sys.modules["torch.distributed"]
    if getattr(package, "destroy_process_group", None) is original:
        package.destroy_process_group = destroy_process_group
    atexit.register(_settle)
    _meet_on_loopback(sys.modules["torch.distributed.rendezvous"])


def _keep_for_reducers(groups: list[Any]) -> None:
    """Hold each group until the C++ parts of the models that use it are freed.

    A weak reference to an object of C++ is told after that object's destructor has run.
    """
    import gc
    import weakref

    for referrer in gc.get_referrers(*groups) if groups else ():
        attributes = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", {})
        if "reducer" in attributes and "process_group" in attributes:
            for part in (attributes["reducer"], attributes.get("logger")):  # each can be the last to hold the group
                if part is not None:
                    weakref.finalize(part, _let_go, attributes["process_group"]).atexit = False


def _newest_group() -> int:
    """The highest id of a group in torch's Flight Recorder, by which those of the next world are told from it."""
    import pickle

    c10d: Any = sys.modules.get("torch._C._distributed_c10d")
    try:
        trace = pickle.loads(c10d._dump_fr_trace(True, False, False))
    except Exception:  # a torch that has none: no trouble of the program's
        return -1
    return max((int(entry["pg_id"]) for entry in trace.get("entries") or ()), default=-1)


def _let_go(_group: Any) -> None:
    """The caller drops its reference after this."""


def _settle() -> None:
    """Leave Python's lock free until gloo's threads sleep and have not been awake since the look before."""
    import time

    deadline = time.monotonic() + _SETTLE_S
    before: set[tuple[str, str, str]] | None = None
    while time.monotonic() < deadline:
        now = set(_gloo_threads())
        if not now or (now == before and all(state == "S" for _, state, _ in now)):
            return
        before = now
        time.sleep(_LOOK_S)


def _gloo_threads() -> Iterator[tuple[str, str, str]]:
    """Id, state and number of sleeps of each thread of gloo's; nothing where the kernel does not tell (not Linux)."""

    tasks = "/proc/self/task"
    for task in os.listdir(tasks) if os.path.isdir(tasks) else ():
        try:
            with open(f"{tasks}/{task}/comm") as file:
                if file.read().strip() != _THREAD_NAME:
                    continue
            with open(f"{tasks}/{task}/status") as file:
                facts = dict(line.split(":", 1) for line in file.read().splitlines())
            yield task, facts["State"].split()[0], facts["voluntary_ctxt_switches"].strip()
        except (OSError, KeyError):
            continue  # it has ended meanwhile


def _meet_on_loopback(rendezvous: Any) -> None:
    original = rendezvous.TCPStore

    def make_store(*args: Any, **options: Any) -> Any:
        listener = _loopback_listener(options)
        if listener is not None:
            options["master_listen_fd"] = listener.detach()
        return original(*args, **options)

    rendezvous.TCPStore = make_store


def _loopback_listener(options: dict[str, Any]) -> socket | None:
    """A socket for the store that torch is about to serve; None if torch is to open its own."""

    # Some operators of Kubernetes call the master localhost in its own pod: what counts is where the ranks are.
    on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "")
    host = options.get("host_name", "")
    if not (on_one_machine and options.get("is_master") and (host == "localhost" or host.startswith("127."))):
        return None
    import socket

    try:
        return socket.create_server(("127.0.0.1", options["port"]), backlog=4096)
    except OSError:  # this process serves it already, or the port is taken: torch's to find out
        return None


def _compile_on_demand(torch: Any) -> None:
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
            sys.meta_path.insert(0, _AtImport(name, with_stand_in))

    def undo() -> None:
        vars(torch).pop("_dynamo", None)
        for function in functions:
            vars(function).pop("__dynamo_disable", None)

    sys.meta_path.insert(0, _BeforeCompiler(stand_in, undo))


def _step_without_compiler(torch: Any, step: Any) -> Any:
    import functools

    @functools.wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _COMPILER in sys.modules:
            return step(self, *args, **kwargs)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step.__wrapped__(self, *args, **kwargs)

    return stepped


def _mode() -> str:
    """What the compiler would do with DistributedDataParallel if nobody changes its settings."""
    return "ddp_optimizer"


class _OnDemand(type(sys)):  # type: ignore[misc]
    """Stands for a module until something of it is used that torch's own modules are not given here.

    Whatever it is asked for, it is no longer found by an import after that.
    """

    def __init__(self, name: str, **given: object) -> None:
        super().__init__(name)
        self.__dict__["__given"] = given

    def __getattr__(self, name: str) -> Any:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking in _IMPORTERS:
            raise AttributeError(name)
        _stand_aside(self.__name__)
        if asking.startswith("torch."):
            if name in self.__dict__["__given"]:
                return self.__dict__["__given"][name]
            if name == "config":
                return _settings()
        return getattr(_import(self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("__"):  # by the import
            super().__setattr__(name, value)
        else:
            setattr(_import(self.__name__), name, value)


def _settings() -> ModuleType:
    """The compiler's module of settings, which needs nothing of the compiler."""
    import importlib.util

    name = f"{_COMPILER}.config"
    if name not in sys.modules:
        file = os.path.join(sys.modules["torch"].__path__[0], *name.split(".")[1:]) + ".py"
        spec: Any = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _import(name: str) -> Any:
    import importlib

    _stand_aside(name)
    return importlib.import_module(name)


def _stand_aside(name: str) -> None:
    """Let the next import of a module find itself, and not what stands for it."""
    if isinstance(sys.modules.get(name), _OnDemand):
        del sys.modules[name]


class _BeforeCompiler:
    """Gives the stand-in to whom it is enough; before any other import of the compiler, undoes what stands for it."""

    def __init__(self, stand_in: _OnDemand, undo: Callable[[], None]) -> None:
        self._stand_in = stand_in
        self._undo = undo

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COMPILER or self not in sys.meta_path:
            return None
        if _importer() in _CONTENT:
            from importlib.machinery import ModuleSpec

            _settings()
            return ModuleSpec(name, self)  # type: ignore[arg-type]
        sys.meta_path.remove(self)
        self._undo()
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._stand_in

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it is there."""


def _importer() -> str:
    """The module whose import statement the import machinery works on."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in _IMPORTERS:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")) if frame is not None else ""
