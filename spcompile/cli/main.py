"""What may be typed, and how each way of ending looks.

ends                      stderr                                              exit code
done                      (warnings)                                          0
doctor found a fault      (the faults are on stdout)                          1
the user's mistake        spcompile: error: what is wrong, and what to do     2
Ctrl-C                    nothing                                             130
the reader left           nothing (``spcompile plan ... | head``)             141
a bug of this package     its traceback                                       1
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from spcompile.errors import CommandError, SuperpipelineError, VerificationError

MISTAKE, INTERRUPTED, READER_LEFT = 2, 130, 141
"""Exit codes; the last two are those of shells: 128 and the number of the signal."""

Value = TypeVar("Value")

DESCRIPTION = """\
Plans and checks for models that are larger than the GPU: which weights move when, and what more memory would buy.
"""

EXAMPLES = """\
examples:
  spcompile doctor                                       is everything here that is needed?
  spcompile plan ./Llama-3.1-8B --budget 8GiB            a folder with a config.json; no weights are read
  spcompile plan timm:resnet50 --machine rtx4090         for a GPU that is not here
  spcompile plan my_models:make --tradeoff               what every further GiB would buy
  spcompile show plan.json                               a plan that was written before

"spcompile COMMAND --help" shows the options of a command.
"""

PLAN_EXAMPLES = """\
examples:
  spcompile plan config.json --budget 8GiB --shape 1x2048
  spcompile plan ./Llama-3.1-8B --machine rtx4090 --tradeoff
  spcompile plan ./Llama-3.1-8B --max-slowdown 1.1 --dtype bfloat16 -o plan.html
  spcompile plan timm:convnext_base --shape 8x3x224x224 --train --k 4
  spcompile plan my_models:make --k 2 --m 1 -o plan.json

MODEL is a config.json of Hugging Face or a folder with one, the name of a timm model (timm:NAME, or NAME alone), or
module:callable, where the callable takes no arguments and returns a torch.nn.Module. Models are made without values,
and nothing is downloaded.
"""

SHOW_EXAMPLES = """\
examples:
  spcompile show plan.json
  spcompile show plan.json -o plan.html
"""

DOCTOR_EXAMPLES = """\
examples:
  spcompile doctor
  spcompile doctor --json

The exit code is 1 where something is wrong that prevents use. That there is no GPU is not: the CPU then stands in.
"""

OUTPUT_HELP = "write to FILE instead: .txt, .json (the plan), .trace.json (for Perfetto), .html, .svg or .png"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code.
    """
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()  # a reader that has left is noticed here, not at exit
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else 0
    except VerificationError:
        raise  # a bug of this package
    except SuperpipelineError as error:
        sys.stderr.write(f"spcompile: error: {' '.join(str(error).split())}\n")
        return MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        return READER_LEFT
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like everything else here."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} ('{self.prog} --help' shows what is allowed)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="spcompile",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, epilog: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(run=run)
        return made

    doctor = command("doctor", "show what is here, what is wrong, and how to mend it", DOCTOR_EXAMPLES, _run_doctor)
    doctor.add_argument("--json", action="store_true", help="as JSON")
    _add_plan_options(command("plan", "plan a model, without its weights and without a GPU", PLAN_EXAMPLES, _run_plan))
    show = command("show", "print or draw a plan that was written as JSON", SHOW_EXAMPLES, _run_show)
    show.add_argument("plan", metavar="plan.json", type=Path, help="what 'spcompile plan -o plan.json' wrote")
    _add_output_options(show)
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="config.json or its folder, timm:NAME, or module:callable")
    what = parser.add_argument_group("what is asked for (one of budget, k, max-slowdown; else what fits the device)")
    what.add_argument("--budget", metavar="BYTES", help="most device memory at any moment: 8GiB, 7.5GB or bytes")
    what.add_argument("--k", type=int, metavar="N", help="most pages that hold a slot at any time")
    what.add_argument("--m", type=int, metavar="N", help="pages that move together (with --k; default 1)")
    what.add_argument("--max-slowdown", type=float, metavar="X", help="the least memory with at most X times the time")
    where = parser.add_argument_group("where it is to run")
    where.add_argument("--machine", metavar="NAME", help="whose rates and memory count: h100 or rtx4090")
    where.add_argument("--device", default="cuda", help="cuda (default, also where there is none), cuda:N or cpu")
    how = parser.add_argument_group("how the model is called")
    how.add_argument("--shape", type=_converted(_parse_shape), metavar="AxBx..", help="main input: 1x2048, 8x3x224x224")
    how.add_argument("--train", action="store_true", help="plan forward and backward (default: inference)")
    how.add_argument(
        "--dtype", metavar="NAME", help="of the weights: bfloat16, float16, float32 (default: the model's)"
    )
    how.add_argument("--real", action="store_true", help="make the model with values: where it fails without")
    parser.add_argument("--tradeoff", action="store_true", help="the curve of memory against time instead of the plan")
    _add_output_options(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=("text", "json"), default="text", help="what stdout gets (default: text)")
    group.add_argument("-o", "--output", type=Path, metavar="FILE", help=OUTPUT_HELP)


def _parse_shape(text: str) -> tuple[int, ...]:
    """``8x3x224x224``"""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise CommandError(f"a shape is numbers with x between them, such as 1x2048 or 8x3x224x224, not {text!r}")
    return shape


def _converted(convert: Callable[[str], Value]) -> Callable[[str], Value]:
    """A converter for argparse, which shows the messages of its own exceptions only."""

    def checked(text: str) -> Value:
        try:
            return convert(text)
        except SuperpipelineError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked


class _Version(argparse.Action):
    """Looked up only when asked for: it reads the metadata of the installation."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from spcompile.cli.checks import version_of

        sys.stdout.write(f"spcompile {version_of('spcompile') or '(not installed)'}\n")
        parser.exit()


def _run_doctor(arguments: argparse.Namespace) -> int:
    from spcompile.cli.doctor import run

    return run(as_json=arguments.json)


def _run_plan(arguments: argparse.Namespace) -> int:
    from spcompile.cli.plan import run

    return run(arguments)


def _run_show(arguments: argparse.Namespace) -> int:
    from spcompile.cli.show import run

    return run(arguments.plan, arguments.output, arguments.format)


def _discard_stdout() -> None:
    """Python flushes stdout once more at exit, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
