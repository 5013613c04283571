"""The command line: parsing only. A command's code is imported when the command runs, so that `--help` is quick."""

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import batchnorm
from batchnorm.errors import InputError
from batchnorm.extras import EXTRAS, missing

try:
    import typer
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    sys.exit(
        "batchnorm: the command line needs typer, which each command's extra installs: "
        'pip install "batchnorm[study]", "batchnorm[bench]", "batchnorm[diagnose]" or, to fold, "batchnorm[onnx]".'
    )

__all__ = ["app", "main"]

NEEDS = {package for packages in EXTRAS.values() for package in packages}

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


@contextmanager
def _one_sentence(what: str, extra: str) -> Iterator[None]:
    """Report what the user can fix in one sentence on stderr. Anything else is a bug and keeps its traceback."""
    try:
        yield
    except InputError as error:
        _stop(str(error), 2)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDS:
            raise
        _stop(missing(what, str(error.name), extra), 2)
    except KeyboardInterrupt as error:
        _stop(str(error) or "interrupted.", 130)


@contextmanager
def _bugs_exit_with(code: int) -> Iterator[None]:
    """Give an error that nobody expected an exit code of its own, where Python's 1 says something else."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        traceback.print_exc()
        raise typer.Exit(code) from error


def _stop(sentence: str, code: int) -> None:
    if os.environ.get("RANK", "0") == "0":  # only one of the processes that torchrun starts prints
        typer.echo(f"batchnorm: {sentence}", err=True)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {batchnorm.__version__}")
        raise typer.Exit


def _flag(name: str, help: str, **options: Any) -> Any:
    """An option without a value."""
    return typer.Option(name, help=help, metavar="", **options)


@app.callback()
def _batchnorm(
    version: Annotated[
        bool, _flag("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Batch normalization: fast layers, tools for whole models, and a study of what it does."""


@app.command()
def study(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report; created if missing.")] = Path(
        "study-report"
    ),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Images to train on: a folder with the files of MNIST, Fashion-MNIST (IDX) or CIFAR-10, gzipped or "
            "not, or an .npz file with x_train, y_train, x_test, y_test (or MedMNIST's names, or x, y, which are "
            "split). "
            "[default: scikit-learn's digits]",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="mlp, cnn, resnet, or MODULE:FACTORY: a function that builds your own network with batch "
            "normalization. It may have the arguments `shape`, `inputs` and `classes`.",
        ),
    ] = "mlp",
    claims: Annotated[
        str, typer.Option(metavar="A,B", help="Check only these claims or sections, by id. [default: all]")
    ] = "",
    quick: Annotated[bool, _flag("--quick", help="Fewer seeds and steps: a shorter study.")] = False,
    full: Annotated[bool, _flag("--full", help="More seeds and steps: many times as long.")] = False,
    resume: Annotated[
        bool, _flag("--resume", help="Keep the runs that an interrupted study left in DIR, and train the rest.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", help="Seeds that every claim gets. [default: 6; quick 5, full 12]")
    ] = None,
    doublings: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How often the seeds are doubled for claims that they leave undecided. [default: 5, to 192 seeds at "
            "most; quick 0, full 4]",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", help="Passes through the training images. [default: 6; quick 4, full 15]")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images per step.")] = 32,
    target: Annotated[
        float, typer.Option(metavar="ACCURACY", help="Steps are counted until this test accuracy, from 0 to 1.")
    ] = 0.95,
    base_seed: Annotated[
        int, typer.Option(metavar="N", help="First seed: another one gives other weights and batch orders.")
    ] = 0,
    paper_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps of the paper's network; the paper has 50000. [default: 1000; quick 600, full 10000]",
        ),
    ] = None,
) -> None:
    """Check the claims about batch normalization by training.

    The study trains a network with batch normalization, without it, and with its alternatives, from several seeds. It
    prints a verdict for each claim and writes a report and the numbers behind it. Claims that the first seeds leave
    undecided get more. The default takes a few minutes. Processes started by torchrun train together.
    """
    with _one_sentence("the study", "study"):
        if quick and full:
            raise InputError("--quick and --full exclude each other; give at most one of them.")
        from batchnorm.study.settings import Settings
        from batchnorm.study.terminal import study

        study(
            Settings(
                "quick" if quick else "full" if full else "default",
                seeds, epochs, batch_size, target, model, base_seed, paper_steps, doublings,
            ),
            out,
            data,
            [name.strip() for name in claims.split(",") if name.strip()],
            resume,
        )  # fmt: skip


@app.command()
def bench(
    only: Annotated[str, typer.Option(metavar="TEXT", help="Time only the cases whose name contains this.")] = "",
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Seconds per case, in training and in evaluation each.")
    ] = 1.0,
    compile: Annotated[
        bool, _flag("--compile", help="Time torch.compile, too. Compiling takes seconds per case.")
    ] = False,
    jax: Annotated[bool, _flag("--jax", help="Time JAX and TensorFlow, too, if they are installed.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the numbers and all versions to this CSV file.")
    ] = None,
) -> None:
    """Time the layers on this machine.

    Each case is a normalization and its activation, in the shape of a layer of a real network, or a small one. Three
    candidates take turns: this package's layer, PyTorch's, and a plain copy of the tensor, which is the unit of time.
    The default takes about three minutes.
    """
    with _one_sentence("the benchmark", "bench"):
        from batchnorm.bench import terminal

        terminal.bench(only, seconds, compile, jax, out)


@app.command()
def fold(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The model, with its external data beside it.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="The file to write; it may be IN.onnx.")],
    inputs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Inputs on which to compare the two models: an .npz file with an array for each input, by name, or an "
            ".npy file for a model with one input. [default: random inputs]",
        ),
    ] = None,
    no_check: Annotated[bool, _flag("--no-check", help="Do not compare the two models before writing.")] = False,
    quiet: Annotated[bool, _flag("--quiet", help="Print only errors, and what could not be compared.")] = False,
) -> None:
    """Fold the batch normalizations of an ONNX model into the layers beside them.

    The command prints the layer into which each one was folded, or why it was not. It writes the new model only if each
    of its parts, given the same values, computes the same as the old model up to rounding. The comparison needs
    onnxruntime.
    """
    with _one_sentence("folding", "onnx"):
        from batchnorm.onnx.command import fold_file

        fold_file(source, target, inputs, not no_check, quiet)


@app.command()
def env(
    as_json: Annotated[bool, _flag("--json", help="Print JSON.")] = False,
) -> None:
    """Print where the package runs: versions, threads, caches, devices and routes.

    Add this to a bug report, but read it first: it contains paths and the value of CUDA_VISIBLE_DEVICES.
    """
    import json

    from batchnorm.environment import environment, text

    found = environment()
    typer.echo(json.dumps(found, indent=2) if as_json else text(found))


@app.command()
def diagnose(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A .pt, .pth, .ckpt, .safetensors, .keras or .weights.h5 file.")
    ],
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as a page with plots (HTML).")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the report as JSON.")] = None,
    quiet: Annotated[bool, _flag("--quiet", help="Print nothing; the exit code tells.")] = False,
) -> None:
    """Find what is wrong with the batch normalizations in a file of weights.

    Looks for statistics that were never updated or are not finite, for dead channels, and for variances below eps. It
    runs no code from the file. The exit code is 0 for a healthy file, 1 if there is an error among the findings, 2 if
    the file cannot be read, and 3 if this program fails. With data, `diagnose(model, data)` in Python finds more.
    """
    with _bugs_exit_with(3), _one_sentence("diagnosing this file", "torch"):
        from batchnorm.checkpoints.command import diagnose_file

        code = diagnose_file(checkpoint, html, json, quiet)
    raise typer.Exit(code)


def main() -> None:
    """Run the command line. SIGTERM is handled like Ctrl-C, so that worker processes do not outlive the command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
