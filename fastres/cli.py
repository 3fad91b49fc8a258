"""The command line: fastres demo | train | paper | freeze | info | bench. Needs typer and rich; `main` says so if not.

Exit codes: 0 done, 1 a result short of what it must be, 2 bad input, 130 interrupted.
"""

# Annotations are evaluated here, not kept as strings: typer reads them from functions that import it locally.

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from typer import Typer

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs `fastres` with `arguments` (default: the process's) and returns its exit code; one line per user error."""
    if arguments is None:
        arguments = sys.argv[1:]
        if arguments[:1] in (["demo"], ["train"], ["paper"], ["freeze"]):
            _wait_passively_when_busy()
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(f'fastres: the command line needs {names}: pip install "fastres[cli]"', file=sys.stderr)
        return 2
    import typer

    from fastres.lab.errors import AccuracyError, LabError, RefereeError

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
    except BrokenPipeError:  # the reader went away, as in `fastres info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except usage_error as error:  # an unknown command or option, a value of the wrong type
        return _fail(f"{error.format_message()} (see fastres --help)", 2)  # type: ignore[attr-defined]
    return _fail("interrupted", INTERRUPTED) if code == INTERRUPTED else int(code)


def _wait_passively_when_busy() -> None:
    """Starts over with OMP_WAIT_POLICY=PASSIVE where other programs keep the cores busy.

    OpenMP's threads spin while they wait for one another; on busy cores they so keep out the one they wait for: a
    training step takes twenty times as long, freezing a ResNet-50 nine times. The setting is read when torch loads,
    hence the new start.
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

    @app.command()
    def demo(
        out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("out/demo"),
        weights: Annotated[
            Path | None, typer.Option(help="A torchvision ResNet-50 checkpoint; random weights without it.")
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice without it.")] = None,
        quick: Annotated[bool, typer.Option("--quick", help="A smoke test: a few steps, small images.")] = False,
    ) -> None:
        """Train ResNet-20 on real digits, freeze it, then time ResNet-50 on real photographs.

        Writes the table as JSON and as a chart. Under four minutes on two cores; uses a GPU where there is one.
        """
        from rich.console import Console

        from fastres.lab.demo import run

        run(Console(highlight=False), out, weights, device, threads, quick, shlex.join(["fastres", *arguments]))

    @app.command()
    def train(
        network: Annotated[
            str, typer.Argument(metavar="NETWORK", help="resnet20, plain56, resnet50-v1 ...", show_default=False)
        ],
        data: Annotated[str, typer.Option(help="digits, digits8, cifar10 or imagenet.")] = "digits",
        recipe: Annotated[
            str | None,
            typer.Option(help="cifar10, cifar10-110, imagenet, digits, digits-quick; by the data."),
        ] = None,
        out: Annotated[Path | None, typer.Option(help="The run's folder; out/train/... without it.")] = None,
        seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
        option: Annotated[list[str] | None, typer.Option(help="Of the network, such as shortcut=B.")] = None,
        iterations: Annotated[int | None, typer.Option(help="Instead of the recipe's, with its drops.")] = None,
        batch_size: Annotated[int | None, typer.Option(help="Of all processes together.")] = None,
        bn_batch: Annotated[int | None, typer.Option(help="Images that share BN statistics.")] = None,
        lr: Annotated[float | None, typer.Option(help="The first learning rate.")] = None,
        decay: Annotated[str | None, typer.Option(help="Weight decay on: all or convolutions.")] = None,
        dtype: Annotated[str, typer.Option(help="fp32, or autocast's bf16 or fp16.")] = "fp32",
        channels_last: Annotated[bool, typer.Option("--channels-last/--nchw", help="The layout.")] = True,
        swap: Annotated[bool, typer.Option("--swap/--no-swap", help="Fused blocks, or PyTorch's own.")] = True,
        data_root: Annotated[Path | None, typer.Option(help="The folder of CIFAR-10 or ImageNet.")] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's choice without it.")] = None,
        workers: Annotated[int | None, typer.Option(help="That decode ImageNet; a core each without it.")] = None,
        stop_after: Annotated[int | None, typer.Option(help="Iterations after which to stop for now.")] = None,
        checkpoint_every: Annotated[int | None, typer.Option(help="In iterations; every 30 s without it.")] = None,
    ) -> None:
        """Train one of the paper's networks by one of its recipes; the same command again goes on.

        The folder holds checkpoint.pt, log.csv, TensorBoard's events where that is installed, and result.json.
        Several processes: torchrun --nproc-per-node 2 -m fastres train ...
        """
        from rich.console import Console

        from fastres.lab.train_command import Request, run

        # in Request's order
        asked = Request(
            *(network, data, recipe, out, seed, tuple(option or ()), iterations, batch_size, bn_batch, lr, decay),
            *(dtype, channels_last, swap, data_root, device, threads, workers, stop_after, checkpoint_every),
        )
        run(Console(highlight=False, emoji=False), asked, shlex.join(["fastres", *arguments]))

    @app.command()
    def freeze(
        model: Annotated[
            str,
            typer.Argument(
                metavar="MODEL",
                help="torchvision:resnet50, timm:resnet50d, fastres:resnet18, hf:FOLDER or net.py:function.",
                show_default=False,
            ),
        ],
        report: Annotated[bool, typer.Option("--report", help="The whole report, not its first line.")] = False,
        image_size: Annotated[str, typer.Option(help="Pixels a side, or HEIGHTxWIDTH.")] = "224",
        batch: Annotated[int, typer.Option(help="Images in the example; any number runs.")] = 1,
        dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
        channels: Annotated[int | None, typer.Option(help="Of the images; 3 without it.")] = None,
        weights: Annotated[
            Path | None, typer.Option(help="A state_dict (.safetensors, .pt, .pth); random weights without it.")
        ] = None,
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        tune: Annotated[bool, typer.Option("--tune/--no-tune", help="Measure layouts, packs and eager.")] = True,
        save: Annotated[Path | None, typer.Option(help="Where the frozen model goes.")] = None,
        json_file: Annotated[Path | None, typer.Option("--json", help="Where the report goes as JSON.")] = None,
    ) -> None:
        """Freeze a network for inference: what was folded and fused, how fast it is, the referee's verdict.

        Nothing is downloaded: weights are random unless --weights or the folder of hf: holds some.
        """
        from rich.console import Console

        from fastres.lab.freeze_command import Request, run

        asked = Request(model, report, image_size, batch, dtype, channels, weights, device, tune, save, json_file)
        run(Console(highlight=False, emoji=False), asked, shlex.join(["fastres", *arguments]))

    @app.command()
    def paper(
        experiment: Annotated[
            str | None,
            typer.Argument(
                metavar="EXPERIMENT",
                help="degradation, shortcuts, responses, depth, skips, imagenet; or report.",
                show_default=False,
            ),
        ] = None,
        listing: Annotated[bool, typer.Option("--list", help="Experiments, published numbers, costs.")] = False,
        preset: Annotated[str, typer.Option(help="digits, cifar10 or ci.")] = "digits",
        out: Annotated[Path, typer.Option(help="Folder for runs, tables, plots.")] = Path("out/paper"),
        device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
        workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time; on a CPU one a core.")] = None,
        data_root: Annotated[Path | None, typer.Option(help="Folder of CIFAR-10 or ImageNet.")] = None,
        page: Annotated[str, typer.Option("--format", help="Of report: md or html.")] = "md",
        network: Annotated[str | None, typer.Option(help="imagenet: resnet50, resnet50-v1, plain34 ...")] = None,
        weights: Annotated[Path | None, typer.Option(help="imagenet: a state_dict, torchvision's too.")] = None,
        shortcut: Annotated[str | None, typer.Option(help="imagenet: A, B or C; B without it.")] = None,
        views: Annotated[str, typer.Option(help="imagenet: which evaluations.")] = "1-crop,10-crop,multi-scale",
    ) -> None:
        """Run an experiment of the ResNet paper: its table beside the published one, a plot, a JSON.

        Stopped, it goes on when called again with the same --out.
        """
        from rich.console import Console

        from fastres.lab.paper.experiment import Evaluation
        from fastres.lab.paper_command import Request, run

        evaluation = Evaluation(network, weights, shortcut, tuple(view for view in views.split(",") if view))
        asked = Request(experiment, listing, preset, out, device, workers, data_root, page, evaluation)
        run(Console(highlight=False, emoji=False), asked, shlex.join(["fastres", *arguments]))

    @app.command()
    def info(
        as_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    ) -> None:
        """Show versions, the machine, each operator's backends and why not, and how to fix what is missing."""
        from fastres._info import info as collect

        found = collect(init_cuda=True)
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))

    @app.command(context_settings={"ignore_unknown_options": True})
    def bench(
        pytest_arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to pytest.")] = None,
    ) -> int:
        """Run the benchmarks of a source checkout: pytest benchmarks/, with whatever options follow."""
        from fastres.lab.errors import MissingExtra

        folder = _benchmarks()
        if importlib.util.find_spec("pytest_benchmark") is None:
            raise MissingExtra('bench: needs pytest-benchmark, which is not installed: pip install "fastres[bench]"')
        command = [sys.executable, "-m", "pytest", str(folder), *(pytest_arguments or [])]
        return subprocess.run(command, cwd=folder.parent).returncode

    return app


def _benchmarks() -> Path:
    """The benchmarks/ of the checkout around this file or around the working directory."""
    from fastres.lab.errors import LabError

    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "benchmarks").is_dir() and (root / "csrc").is_dir():
            return root / "benchmarks"
    raise LabError(
        f"bench: found no source checkout around {Path(__file__).parent} or in {Path.cwd()}; the benchmarks are not in"
        " the installed package: git clone the repository and run it there"
    )
