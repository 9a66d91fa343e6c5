"""Carrying a plan out with LibCST, which keeps every blank and comment of the rest."""

from __future__ import annotations

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from everyrank.lint.module import PythonModule
from everyrank.lint.to_ddp import helpers
from everyrank.lint.to_ddp.plan import Plan, Span, make_plan

_MARK = "# everyrank: "


def to_ddp(text: str, path: str) -> tuple[str, list[tuple[int, str]]]:
    """Return a single-device program as one for DistributedDataParallel, and what is not sure: row and sentence.

    Raises:
        UserError: There is nothing to change.
        SyntaxError: The text is no Python.
    """
    module = PythonModule(text, path)
    plan = make_plan(module)
    wrapper = MetadataWrapper(cst.parse_module(text))
    return wrapper.visit(_Rewriter(plan, module)).code, sorted(set(plan.notes))


class _Rewriter(cst.CSTTransformer):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, plan: Plan, module: PythonModule) -> None:
        super().__init__()
        self.plan = plan
        self.imported = set(module.imports)
        self._hoisted: dict[str, str] | None = None

    def _span(self, node: cst.CSTNode) -> Span:
        place = self.get_metadata(PositionProvider, node)
        return place.start.line, place.start.column, place.end.line, place.end.column

    def on_visit(self, node: cst.CSTNode) -> bool:
        """Begin to collect what must be computed outside of a statement that only rank 0 will run."""
        if isinstance(node, cst.SimpleStatementLine | cst.With) and self._span(node)[0] in self.plan.wrapped:
            self._hoisted = {} if self._hoisted is None else self._hoisted
        return super().on_visit(node)

    def on_leave(self, original_node, updated_node):  # type: ignore[no-untyped-def]
        """Put a new expression in the old one's place."""
        updated = super().on_leave(original_node, updated_node)
        if isinstance(original_node, cst.BaseExpression):
            text = self.plan.expressions.get(self._span(original_node))
            if text is not None:
                return self._expression(text)
        return updated

    def _expression(self, text: str) -> cst.BaseExpression:
        if text.startswith("global_mean(") and self._hoisted is not None:
            # A collective under "if RANK == 0" would wait for ever: it is computed before, on every rank.
            text = self._hoisted.setdefault(text, f"mean_{text[len('global_mean(') :].split(',')[0]}")
        if ", disable=" in text and text.endswith("RANK != 0"):
            text, _, _ = text.partition(", disable=")
        return cst.parse_expression(text)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        """Give a progress bar ``disable=``: one argument becomes two, which an expression cannot."""
        for argument in original_node.args:
            text = self.plan.expressions.get(self._span(argument.value), "")
            if text.endswith(", disable=RANK != 0"):
                extra = cst.Arg(
                    cst.parse_expression("RANK != 0"),
                    keyword=cst.Name("disable"),
                    equal=cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace("")),
                )
                return updated_node.with_changes(args=[*updated_node.args, extra])
        return updated_node

    def _placed(
        self, original: cst.CSTNode, updated: cst.SimpleStatementLine | cst.With | cst.For
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement]:
        """Wrap a statement, and put what belongs before it."""
        row = self._span(original)[0]
        lines = list(updated.leading_lines)
        lines += [cst.EmptyLine(comment=cst.Comment(_MARK + c)) for c in self.plan.comments.get(row, ())]
        before: list[cst.BaseStatement] = [cst.parse_statement(text) for text in self.plan.before.get(row, ())]
        statement: cst.BaseStatement = updated
        header = self.plan.wrapped.get(row)
        if header is not None:
            before += [cst.parse_statement(f"{name} = {text}") for text, name in (self._hoisted or {}).items()]
            self._hoisted = None
            block = cst.ensure_type(cst.parse_statement(f"{header}\n    pass"), cst.If | cst.With)  # type: ignore[arg-type]
            statement = block.with_changes(body=cst.IndentedBlock([updated.with_changes(leading_lines=[])]))
        if not before:
            return statement.with_changes(leading_lines=lines)
        return cst.FlattenSentinel(
            [before[0].with_changes(leading_lines=lines), *before[1:], statement.with_changes(leading_lines=[])]
        )

    leave_SimpleStatementLine = leave_With = leave_For = _placed  # type: ignore[assignment]

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.If:
        """Join at the beginning of the program's own part, and leave at its end."""
        if self._span(original_node)[0] != self.plan.entry or not isinstance(updated_node.body, cst.IndentedBlock):
            return updated_node
        body = [
            cst.parse_statement("join()"),
            *updated_node.body.body,
            cst.parse_statement("dist.destroy_process_group()"),
        ]
        return updated_node.with_changes(body=updated_node.body.with_changes(body=body))

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        """Put imports and helpers behind the last import; join and leave at the top level if there is no entry."""
        body = list(updated_node.body)
        last = max((i for i, statement in enumerate(body) if _is_import(statement)), default=-1)
        block = "".join(self.plan.helpers)
        used = [line for name, line in helpers.IMPORTS.items() if name in block or name == "DistributedDataParallel"]
        needed = {line: name for name, line in helpers.IMPORTS.items() if line in used and name not in self.imported}
        imports = [cst.parse_statement(line) for line in helpers.merged(needed)]
        added = list(cst.parse_module("\n".join(self.plan.helpers)).body)
        added[0] = added[0].with_changes(leading_lines=[cst.EmptyLine(indent=False)])
        if self.plan.entry is None:
            added.append(cst.parse_statement("\n\njoin()"))
            body.append(cst.parse_statement("dist.destroy_process_group()"))
        return updated_node.with_changes(body=[*body[: last + 1], *imports, *added, *body[last + 1 :]])


def _is_import(statement: cst.CSTNode) -> bool:
    return isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[0], cst.Import | cst.ImportFrom)
