"""find and fix the classic mistakes of distributed scripts"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from everyrank.errors import EXIT_FAILURE, EXIT_OK, UserError

_FORMATS = ("text", "json", "github", "sarif")
_EPILOG = """\
A rule is named by its code. "# noqa: ER003" at the end of a line allows one there, "# noqa" all of them. The table
[tool.everyrank.check] of pyproject.toml may hold select, ignore and exclude (lists of strings).

Exit code: 0 if nothing is left, 1 if something is, 2 if the command itself is wrong.
"""


def main(argv: Sequence[str]) -> int:
    """Check files, mend them if asked to, and tell what is left; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        _list_rules()
        return EXIT_OK
    if not arguments.paths:
        raise UserError("No path was given. Fix: everyrank check PATH ..., such as everyrank check .")
    if arguments.unsafe and not (arguments.fix or arguments.diff):
        raise UserError("--unsafe was given without --fix or --diff. Fix: everyrank check --fix --unsafe PATH ...")
    return _to_ddp(arguments) if arguments.to_ddp else _check(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="everyrank check",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="files, and folders to search for Python, notebooks, shell and Slurm scripts, Markdown, JSON and YAML",
    )
    parser.add_argument("--fix", action="store_true", help="apply the safe fixes to the files")
    parser.add_argument(
        "--unsafe", action="store_true", help="with --fix or --diff: the other fixes too; read what they did"
    )
    parser.add_argument("--diff", action="store_true", help="show what --fix would do; write nothing")
    parser.add_argument(
        "--to-ddp",
        action="store_true",
        help="show the change of single-device programs to DistributedDataParallel; with --fix write it",
    )
    parser.add_argument(
        "--select", action="append", default=[], metavar="CODES", help="only these rules: ER003, ER4, ALL"
    )
    parser.add_argument("--ignore", action="append", default=[], metavar="CODES", help="not these rules")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="not these files or folders")
    parser.add_argument("--output-format", choices=_FORMATS, default="text", help="how to tell (default: text)")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes (default: one a core)")
    parser.add_argument("--no-config", action="store_true", help="do not read pyproject.toml")
    parser.add_argument("--list", action="store_true", help="list the rules and stop")
    return parser


def _list_rules() -> None:
    from everyrank.lint.rules import RULES

    for rule in RULES:
        print(f"{rule.code}  {'default' if rule.default else 'hint   '}  {rule.fixes:<6}  {rule.page.title}")


def _check(arguments: argparse.Namespace) -> int:
    from everyrank.lint import output, selection
    from everyrank.lint.engine import Settings, check_files

    config = selection.Configured() if arguments.no_config else selection.configured(os.getcwd())
    select = _codes(arguments.select) or list(config.select)
    codes = selection.choose(select, [*_codes(arguments.ignore), *config.ignore])
    paths = list(selection.find_files(arguments.paths, [*config.exclude, *arguments.exclude]))
    settings = Settings(codes, arguments.fix or arguments.diff, arguments.unsafe, arguments.fix and not arguments.diff)
    num_workers = arguments.jobs or len(os.sched_getaffinity(0))
    results = list(check_files(paths, settings, num_workers=num_workers))
    if arguments.diff:
        sys.stdout.writelines(output.as_diff(results))
        return EXIT_FAILURE if any(c.before is not None for c in results) else EXIT_OK
    if arguments.output_format == "json":
        print(output.as_json(results))
    elif arguments.output_format == "sarif":
        from everyrank import __version__

        print(output.as_sarif(results, __version__))
    elif arguments.output_format == "github":
        print("\n".join(output.as_github(results)), end="\n" if any(c.findings for c in results) else "")
    else:
        for line in output.as_text(results):
            print(line)
        print(output.summary(results, len(paths)))
    return EXIT_FAILURE if any(c.findings for c in results) else EXIT_OK


def _to_ddp(arguments: argparse.Namespace) -> int:
    """Show or write the change of each program; returns 1 if something of it is not sure."""
    from everyrank.lint import output, source
    from everyrank.lint.to_ddp.rewrite import to_ddp

    unsure = 0
    for path in arguments.paths:
        if not path.endswith(".py"):
            raise UserError(
                f"{path} was given with --to-ddp, which changes Python files. Fix: give one that ends in .py."
            )
        try:
            before = source.read(path)
            after, notes = to_ddp(before.text, path)
        except (source.DoesNotParse, SyntaxError) as error:
            raise UserError(f"{path} does not parse: {error}. Fix: mend it first.") from error
        unsure += len(notes)
        if arguments.fix and not arguments.diff:
            source.write(before.with_text(after))
        else:
            sys.stdout.write(output.diff(path, before.text, after))
        for row, sentence in notes:
            print(f"{path}:{row}: {sentence}", file=sys.stderr)
    return EXIT_FAILURE if unsure else EXIT_OK


def _codes(values: Sequence[str]) -> list[str]:
    return [code.strip().upper() for value in values for code in value.split(",") if code.strip()]
