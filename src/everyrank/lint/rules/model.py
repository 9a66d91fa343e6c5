"""Rules about the wrapped model: ER301, ER302, ER304, ER305."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from everyrank.lint.finding import Finding, Fix
from everyrank.lint.guards import Assignment, targets_of
from everyrank.lint.module import PythonModule, constant, keyword, last_name, values_given
from everyrank.lint.program import Program
from everyrank.lint.rule import Rule

# What nn.Module and DistributedDataParallel have themselves; anything else is the bare model's.
_NAMESOF_WRAPPER = """
    module train eval training to cuda cpu float half double bfloat16 type parameters named_parameters buffers
    named_buffers modules named_modules children named_children state_dict load_state_dict zero_grad
    requires_grad_ apply forward no_sync join register_comm_hook register_forward_hook
    register_forward_pre_hook register_buffer register_parameter register_module add_module get_submodule
    get_parameter get_buffer set_submodule share_memory extra_repr ipu xpu mtia to_empty compile
    register_full_backward_hook register_full_backward_pre_hook register_backward_hook
    register_state_dict_pre_hook register_state_dict_post_hook register_load_state_dict_pre_hook
    register_load_state_dict_post_hook get_extra_state set_extra_state device device_ids output_device
    process_group dim broadcast_buffers find_unused_parameters require_backward_grad_sync
    require_forward_param_sync reducer logger static_graph gradient_as_bucket_view mixed_precision device_type
    is_multi_device_module device_mesh bucket_bytes_cap parameters_to_ignore _set_static_graph call_super_init
    dump_patches _get_ddp_logging_data gather scatter scatter_gather to_kwargs forward_pre_hooks
    will_sync_module_buffers modules_buffers named_module_params join_hook join_device join_process_group
    delay_all_reduce_named_params lazy_init_ran find_unused _modules _parameters _buffers
"""
OF_WRAPPER = frozenset(_NAMESOF_WRAPPER.split())


_LOADER = re.compile(r"load|restore|restart|resume", re.IGNORECASE)


def wrapped_state_saved(program: Program) -> Iterator[Finding]:
    """The wrapped model's state dict is saved, with "module." in every name.

    Finds: `torch.save(model.state_dict(), ...)` where `model` is surely a DistributedDataParallel, in a file that
    does not load such a state into the wrapped model or take the prefix away.

    Why it hurts: One process, a server or a fine-tuning script makes the bare model, and `load_state_dict` refuses
    every name: "Missing key(s) in state_dict".

    The change: Save `model.module.state_dict()`.

    Before:

        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def train(net):
            model = DistributedDataParallel(net)
            if dist.get_rank() == 0:
                torch.save(model.state_dict(), "model.pt")

    After:

        import torch
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def train(net):
            model = DistributedDataParallel(net)
            if dist.get_rank() == 0:
                torch.save(model.module.state_dict(), "model.pt")
    """
    module = program.module
    text = module.text
    if re.search(r"['\"]module\.", text) or "consume_prefix" in text:
        return
    for call, name in module.calls:
        if not name.endswith(".state_dict") or call.args or call.keywords:
            continue
        model = name.removesuffix(".state_dict")
        if not _surely_wrapped(program, model, call) or not _is_saved(program, call):
            continue
        if any(n == f"{model}.load_state_dict" for _, n in module.calls) or _is_tested(program, call):
            continue
        loads = [c for c, n in module.calls if _LOADER.search(last_name(n))]
        if any(model == module.dotted(value) for c in loads for value in values_given(c)):
            continue
        assert isinstance(call.func, ast.Attribute)
        yield module.finding(
            "ER301",
            call,
            f'{model} is wrapped: every name that is saved begins with "module.", and the bare model refuses them. '
            f"Fix: {model}.module.state_dict().",
            _take_bare(module, call.func.value, "Save the bare model", safe=False),
        )


def _is_saved(program: Program, call: ast.Call) -> bool:
    """Whether a state dict goes to torch.save, itself or in a dictionary or name of the same function."""
    module = program.module
    for parent in module.ancestors(call):
        if isinstance(parent, ast.Call) and module.dotted(parent.func) == "torch.save":
            return True
        if isinstance(parent, ast.Assign):
            names = {module.dotted(target) for target in parent.targets}
            return any(
                n == "torch.save"
                and c.args
                and module.dotted(c.args[0]) in names
                and module.function_of(c) is module.function_of(call)
                for c, n in module.calls
            )
    return False


def _surely_wrapped(program: Program, name: str, node: ast.expr) -> bool:
    """Whether ``name`` holds a wrapped model at ``node``: on every way there, and never anything else."""
    module = program.module
    function = module.function_of(node)
    wraps = [
        w for w in program.wrapped_names.get(name, []) if module.function_of(w) is function and w.lineno < node.lineno
    ]
    if not wraps:
        return False
    last = max(wraps, key=lambda w: w.lineno)
    branches = {p for p in module.ancestors(last) if isinstance(p, ast.If | ast.Try | ast.For | ast.While | ast.With)}
    if any(isinstance(b, ast.If | ast.Try) and b not in set(module.ancestors(node)) for b in branches):
        return False
    for parent in branches & set(module.ancestors(node)):
        if isinstance(parent, ast.If) and module.in_body(parent, last) != module.in_body(parent, node):
            return False
    assigns: list[Assignment] = [*module.of_type(ast.Assign), *module.of_type(ast.AnnAssign)]
    return not any(
        name in (module.dotted(part) for part in (target, *getattr(target, "elts", [])))
        for assign in assigns
        if last.lineno < assign.lineno <= node.lineno and module.function_of(assign) is function
        for target in targets_of(assign)
    )


def wrapped_model_used(program: Program) -> Iterator[Finding]:
    """The wrapped model is used where the bare one is meant.

    Finds: `model.attribute` or `model.method()` that neither `nn.Module` nor DistributedDataParallel has, where `model`
    is surely wrapped.

    Why it hurts: "'DistributedDataParallel' object has no attribute ...".

    The change: `model.module.attribute`.

    Before:

        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def train(net):
            model = DistributedDataParallel(net)
            return model.generate(3)

    After:

        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def train(net):
            model = DistributedDataParallel(net)
            return model.module.generate(3)
    """
    module = program.module
    attributes = module.of_type(ast.Attribute)
    set_on_wrapper = {(module.dotted(a.value), a.attr) for a in attributes if isinstance(a.ctx, ast.Store)}
    for node in attributes:
        if node.attr in OF_WRAPPER or node.attr.startswith("__") or not isinstance(node.ctx, ast.Load):
            continue
        name = module.dotted(node.value)
        if name not in program.wrapped_names or not _surely_wrapped(program, name, node) or _is_tested(program, node):
            continue
        if (name, node.attr) in set_on_wrapper:
            continue
        yield module.finding(
            "ER302",
            node,
            f"{name} is wrapped, and DistributedDataParallel has no {node.attr}. Fix: {name}.module.{node.attr}.",
            _take_bare(module, node.value, "Use the bare model", safe=True),
        )


def _take_bare(module: PythonModule, model: ast.expr, message: str, *, safe: bool) -> Fix:
    return Fix(message, (module.replace(model, f"{module.source(model)}.module"),), safe)


def _is_tested(program: Program, node: ast.AST) -> bool:
    for parent in program.module.ancestors(node):
        if isinstance(parent, ast.If | ast.IfExp) and re.search(
            r"hasattr|isinstance|distrib|ddp|module|world_size|parallel", ast.unparse(parent.test), re.I
        ):
            return True
        if isinstance(parent, ast.Try | ast.FunctionDef):
            return isinstance(parent, ast.Try)
    return False


def batch_norm_per_rank(program: Program) -> Iterator[Finding]:
    """BatchNorm is not synchronised (hint).

    Finds: A model of the file with `BatchNorm` layers that is wrapped without `SyncBatchNorm`.

    Why it hurts: Each rank normalises by its own share of the batch. With few samples a rank the statistics are noisy,
    and the result depends on the world size.

    The change: `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` before wrapping (GPUs only), or another
    normaliser.

    Before:

        import torch
        from torch.nn.parallel import DistributedDataParallel

        def make():
            net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
            return DistributedDataParallel(net)

    After:

        import torch
        from torch.nn.parallel import DistributedDataParallel

        def make():
            net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
            return DistributedDataParallel(torch.nn.SyncBatchNorm.convert_sync_batchnorm(net))
    """
    module = program.module
    if re.search(r"SyncBatchNorm|convert_sync|sync_?bn", module.text, re.IGNORECASE):
        return
    if any(re.match(r"BatchNorm[123]d$", last_name(name)) for _, name in module.calls):
        for call in program.wraps:
            yield module.finding(
                "ER304",
                call,
                "BatchNorm takes each rank's share for the batch. Fix: SyncBatchNorm.convert_sync_batchnorm.",
            )


def unused_parameters(program: Program) -> Iterator[Finding]:
    """find_unused_parameters=True is set (hint).

    Finds: `DistributedDataParallel(..., find_unused_parameters=True)`, and `find_unused_parameters: true` in option
    files.

    Why it hurts: Every step walks the whole graph. Where all parameters are used, this is time for nothing, and it
    hides a parameter that was forgotten.

    The change: Leave it out; set it back if torch says that a parameter got no gradient.

    Before:

        from torch.nn.parallel import DistributedDataParallel

        def make(net):
            return DistributedDataParallel(net, find_unused_parameters=True)

    After:

        from torch.nn.parallel import DistributedDataParallel

        def make(net):
            return DistributedDataParallel(net)
    """
    for call in program.wraps:
        given = keyword(call, "find_unused_parameters")
        if given and constant(given.value) is True:
            yield program.module.finding("ER305", given, _UNUSED)


def unused_parameters_in_options(options: object) -> Iterator[Finding]:
    """The same in an option file."""
    for scalar in options.scalars:  # type: ignore[attr-defined]
        if scalar.key == "find_unused_parameters" and scalar.value.lower() == "true":
            yield Finding("ER305", _UNUSED, scalar.start, scalar.end)


_UNUSED = (
    "Every step looks for unused parameters. Fix: leave it out, unless torch says that a parameter got no gradient."
)

RULES = (
    Rule("ER301", "wrapped-state-saved", {"python": wrapped_state_saved}, fixes="unsafe"),
    Rule("ER302", "wrapped-model-used", {"python": wrapped_model_used}, fixes="safe"),
    Rule("ER304", "batch-norm-per-rank", {"python": batch_norm_per_rank}, default=False),
    Rule(
        "ER305",
        "unused-parameters",
        {"python": unused_parameters, "options": unused_parameters_in_options},
        default=False,
    ),
)
