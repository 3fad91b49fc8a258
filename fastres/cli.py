"""The command line: fastres demo | train | freeze | predict | paper | info | bench.

It needs typer and rich; `main` says so if not.
Exit codes: 0 done, 1 a result that falls short, 2 bad input, 130 interrupted.
"""

# Annotations are evaluated here, not kept as strings: typer reads them from functions that import it locally.

import errno
import importlib.util
import inspect
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from typer import Typer

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run `fastres` with `arguments` (default: the process's) and return its exit code; one line per user error."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as in `fastres info >&-`: what is written is lost
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if arguments is None:
        arguments = sys.argv[1:]
        if arguments[:1] in (["demo"], ["train"], ["paper"], ["freeze"], ["predict"]):
            _wait_passively_when_busy()
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(f'fastres: the command line needs {names}: pip install "fastres[cli]"', file=sys.stderr)
        return 2
    import typer

    from fastres._dispatch import environment_problem
    from fastres._extension import isa_problem
    from fastres.lab.errors import AccuracyError, LabError, RefereeError

    problem = environment_problem() or isa_problem()
    if problem is not None and arguments[:1] in (["demo"], ["train"], ["paper"], ["freeze"], ["predict"], ["bench"]):
        return _fail(problem, 2)
    usage_error: type[Exception] = next(
        base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
    )
    try:
        code = _app(arguments)(arguments or ["--help"], prog_name="fastres", standalone_mode=False) or 0
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (AccuracyError, RefereeError) as error:
        return _fail(str(error), 1)
    except LabError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:  # the reader is gone, as in `fastres info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail(f"standard output: {error.strerror}", 2)
    except usage_error as error:  # an unknown command or option, a value of the wrong type
        return _fail(f"{error.format_message()} (see fastres --help)", 2)  # type: ignore[attr-defined]
    return _fail("interrupted", INTERRUPTED) if code == INTERRUPTED else int(code)


def _wait_passively_when_busy() -> None:
    """Restart with OMP_WAIT_POLICY=PASSIVE where other programs keep the cores busy.

    OpenMP's threads spin while they wait for one another, and on busy cores they keep out the very thread they wait
    for: a training step takes twenty times as long, freezing a ResNet-50 nine times. The setting is read when torch
    loads, hence the restart.
    """
    from fastres._info import load_average, usable_cores

    load = load_average()
    if load is None or load <= usable_cores() or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})


def _fail(message: str, code: int) -> int:
    print(f"fastres: {message}", file=sys.stderr)
    return code


def _app(arguments: list[str]) -> "Typer":
    import typer

    from fastres.lab import demo, freeze_command, paper_command, predict_command, train_command

    app = typer.Typer(
        help="fastres: residual networks at the speed of the hardware, with the answers proven the same.",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(value: bool) -> None:
        if value:
            import fastres

            typer.echo(f"fastres {fastres.__version__}")
            raise typer.Exit()

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True)
        ] = False,
    ) -> None:
        pass

    commands = {"demo": demo, "train": train_command, "freeze": freeze_command, "predict": predict_command}
    commands["paper"] = paper_command
    for name, module in commands.items():
        app.command(name)(_command(module, shlex.join(["fastres", *arguments])))

    @app.command()
    def info(
        as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    ) -> None:
        """Show versions, the machine, each operator's backends, and how to fix what is missing."""
        from fastres._info import info as collect

        found = collect(init_cuda=True)
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))

    @app.command(context_settings={"ignore_unknown_options": True})
    def bench(
        pytest_arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to pytest.")] = None,
    ) -> int:
        """Run the benchmarks of a source checkout: pytest benchmarks/ with the given options.

        All of them take 15 to 20 minutes on two cores. Fewer: a file, -k EXPRESSION, --peers eager, --budget tiny.
        """
        from fastres.lab.errors import require

        folder = _benchmarks()
        require("pytest_benchmark", "bench", "bench")
        if not pytest_arguments:
            typer.echo(
                f"fastres bench: every benchmark of {folder}, 15 to 20 minutes on two cores; for less, -k EXPRESSION "
                "chooses some, --peers eager leaves the other engines out, --budget tiny tries that all run",
                err=True,
            )
        command = [sys.executable, "-m", "pytest", str(folder), *(pytest_arguments or [])]
        return subprocess.run(command, cwd=folder.parent).returncode

    return app


def _command(module: ModuleType, command_line: str) -> Any:
    """A command as typer reads it: the options are the fields of the module's Request, the help is its docstring."""

    def command(**options: Any) -> None:
        from rich.console import Console

        module.run(Console(highlight=False, emoji=False), module.Request(**options), command_line)

    command.__signature__ = inspect.signature(module.Request, eval_str=True)  # type: ignore[attr-defined]
    command.__doc__ = module.Request.__doc__
    return command


def _benchmarks() -> Path:
    """The benchmarks/ of the checkout around this file or around the working directory."""
    from fastres.lab.errors import LabError

    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "benchmarks").is_dir() and (root / "csrc").is_dir():
            return root / "benchmarks"
    raise LabError(
        f"bench: found no source checkout around {Path(__file__).parent} or in {Path.cwd()}; the installed package has"
        " no benchmarks: git clone the repository and run it there"
    )
