"""The command line, as a user meets it."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

typer_testing = pytest.importorskip("typer.testing")
for module in ("torch", "sklearn", "joblib", "plotly", "jinja2", "rich"):
    pytest.importorskip(module)

import batchnorm
from batchnorm import cli
from batchnorm.errors import InputError
from batchnorm.study import output, terminal

SMALL = ("--quick", "--seeds", "1", "--epochs", "1", "--claims", "rates,gradients,renorm-mends")
FILES = ["report.html", "report.md", "results.json", "runs.csv", "runs.jsonl"]


def run(*arguments: object) -> Any:
    return typer_testing.CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("study") / "report"
    return run("study", *SMALL, "--out", folder), folder


def test_the_study_prints_and_writes(studied: tuple[Any, Path]) -> None:
    result, folder = studied
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for words in ("Largest rate", "undecided", "Written:", "report.html"):
        assert words in result.stdout
    assert "Steps to 95%" not in result.stdout, "no claim that was not asked for"
    assert result.stderr == "", "no progress bar where nobody watches"


def test_the_results(studied: tuple[Any, Path]) -> None:
    results = json.loads((studied[1] / "results.json").read_text(), parse_constant=pytest.fail)
    assert [claim["id"] for claim in results["claims"]] == [
        "higher-learning-rates",
        "gradient-flow-sigmoid",
        "gradient-flow-relu",
        "renorm-mends",
    ]
    for claim in results["claims"]:
        assert claim["verdict"] in ("supported", "not supported", "contradicted", "undecided")
        assert claim["interval"] is None or claim["interval"][0] <= claim["effect"] <= claim["interval"][1]
    assert {(run["variant"], run["rate"], run["seed"]) for run in results["runs"]} >= {("plain", 0.001, 0)}
    assert results["environment"]["dataset"]["name"] == "scikit-learn digits"
    assert str(studied[1]) not in json.dumps(results)


def test_the_same_command_gives_the_same_files(studied: tuple[Any, Path], tmp_path: Path) -> None:
    assert run("study", *SMALL, "--out", tmp_path).exit_code == 0
    for name in FILES[:4]:
        assert (tmp_path / name).read_bytes() == (studied[1] / name).read_bytes()


def test_other_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    np.savez(tmp_path / "blobs [1].npz", x=generator.normal(labels[:, None], 0.3, (120, 5)), y=labels)
    result = run(
        "study", *SMALL, "--batch-size", 8, "--target", 0.8, "--data", tmp_path / "blobs [1].npz", "--out", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert "blobs [1]" in result.stdout
    assert json.loads((tmp_path / "results.json").read_text())["environment"]["dataset"]["shape"] == [5]


# --- What cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seeds", 0), "seeds must be 1 or more, got 0."),
        (("--epochs", -1), "epochs must be 1 or more, got -1."),
        (("--batch-size", 1), "batch size must be 2 or more"),
        (("--batch-size", 5000), "1149 images to train on, fewer than one batch of 5000"),
        (("--quick", "--full"), "--quick and --full exclude each other; give at most one of them."),
        (("--claims", "a,rates"), "there is no claim a; choose of faster-at-same-rate"),
        (("--model", "unknown"), "there is no network 'unknown'; choose mlp, cnn, resnet"),
        (("--model", "os:getcwd"), "os:getcwd must return a torch.nn.Module, but returns a str."),
        (("--target", 95), "target must be an accuracy between 0 and 1, got 95.0."),
        (("--data", "nowhere"), "nowhere cannot be read (No such file or directory)"),
        (("--data", "empty"), "empty contains no images; it should contain train-images-idx3-ubyte[.gz]"),
        (("--data", "bad.npz"), "bad.npz is not a valid .npz file"),
        (("--out", "bad.npz"), "bad.npz is a file, but the study writes a folder"),
        (("--out", "bad.npz/below"), "bad.npz/below cannot be written"),
    ],
)
def test_one_sentence_on_stderr_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("bad.npz").write_text("not what it says")
    result = run("study", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.startswith("batchnorm: ")
    assert result.stderr.endswith(".\n")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.npz", "empty"]


def test_an_option_that_is_no_number() -> None:
    result = run("study", "--seeds", "many")
    assert result.exit_code == 2
    assert "--seeds" in result.stderr


def test_an_interrupt_is_one_line_that_counts_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first round, in the second, and before the second goes on."""
    perform_all, calls = terminal.perform_all, iter(range(5))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) != 1:
            raise KeyboardInterrupt
        return perform_all(*arguments)

    monkeypatch.setattr(terminal, "perform_all", interrupted)
    gradients = ("--quick", "--seeds", 1, "--doublings", 1, "--claims", "gradients", "--out", tmp_path / "report")
    for kept, more in ((0, ()), (4, ("--resume",)), (4, ("--resume",))):
        result = run("study", *gradients, *more)
        said = f"batchnorm: interrupted; {kept} runs are kept, and the same command with --resume goes on.\n"
        assert (result.exit_code, result.stderr, result.stdout) == (130, said, "")
    monkeypatch.setattr(terminal.Store, "load", interrupted)
    result = run("study", *gradients, "--resume")
    assert (result.exit_code, result.stderr) == (130, "batchnorm: interrupted.\n"), "nobody has counted"


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_was_stopped_goes_on_and_ends_with_the_same_results(
    tmp_path: Path, kind: signal.Signals, studied: tuple[Any, Path]
) -> None:
    code = (
        "import os, signal, batchnorm.study.runner as r, batchnorm.study.terminal as t\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background it may be ignored
        "from batchnorm.cli import main\n"
        "def perform_all(*a):\n"
        "    for number, run in enumerate(r.perform_all(*a)):\n"
        "        if number == 7:\n"
        f"            os.kill(os.getpid(), {int(kind)})\n"
        "        yield run\n"
        "t.perform_all = perform_all\n"
        "main()\n"
    )
    folder = tmp_path / "report"
    command = [sys.executable, "-c", code, "study", *SMALL, "--out", str(folder)]
    # Workers take long to start, and two signals are enough for them.
    environment = os.environ | ({"LOKY_MAX_CPU_COUNT": "1"} if kind == signal.SIGINT else {})
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    if kind == signal.SIGKILL:  # nobody is left to end the workers
        process.wait(timeout=900)
        os.killpg(process.pid, signal.SIGKILL)
    # The pipes are closed, and `communicate` returns, only when the last worker is gone.
    stdout, stderr = process.communicate(timeout=900)
    assert stdout == ""
    if kind != signal.SIGKILL:
        said = "batchnorm: interrupted; 7 runs are kept, and the same command with --resume goes on.\n"
        assert process.returncode == 130
        assert stderr.startswith(said)
        rest = stderr[len(said) :].splitlines()  # on a busy machine, the library of the workers may add a warning
        assert all("resource_tracker" in line or line.startswith("  ") for line in rest), stderr
    assert [path.name for path in folder.iterdir()] == ["runs.jsonl"]
    kept = (folder / "runs.jsonl").read_text()
    assert kept.count("\n") == 8, "a line on what it is of, and one for every run"
    (folder / "runs.jsonl").write_text(kept + '{"task": {"measure": "trai')  # as if it was cut short
    trained: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        perform_all = terminal.perform_all
        patch.setattr(
            terminal, "perform_all", lambda source, tasks: perform_all(source, trained.append(tasks) or tasks)
        )
        assert run("study", *SMALL, "--out", folder, "--resume").exit_code == 0
    assert len(trained[0]) == 26 - 7
    for name in FILES[:4]:
        assert (folder / name).read_bytes() == (studied[1] / name).read_bytes(), name


def test_more_seeds_go_on_from_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = ("--quick", "--claims", "gradients", "--out", tmp_path)
    assert run("study", *gradients, "--seeds", 1).exit_code == 0
    trained: list[Any] = []
    perform_all = terminal.perform_all
    monkeypatch.setattr(
        terminal, "perform_all", lambda source, tasks: perform_all(source, trained.append(len(tasks)) or tasks)
    )
    assert run("study", *gradients, "--seeds", 2, "--resume").exit_code == 0
    assert run("study", *gradients, "--seeds", 2, "--resume").exit_code == 0
    assert trained == [4, 0]


def test_an_earlier_study_is_not_thrown_away(studied: tuple[Any, Path]) -> None:
    _, folder = studied
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = run("study", *SMALL, "--out", folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"batchnorm: {folder} contains an earlier study (results.json, report.html, report.md, runs.csv, runs.jsonl); "
        "keep its runs and train the rest with --resume, or begin anew in another folder with --out, or remove this "
        "one.\n"
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("name", "text", "lost"), [("runs.jsonl", "{}\n", False), ("results.json", "{}", True)])
def test_what_is_worth_keeping(tmp_path: Path, name: str, text: str, lost: bool) -> None:
    (tmp_path / name).write_text(text)
    if lost:
        with pytest.raises(InputError, match=r"contains an earlier study \(results.json\); keep its runs"):
            output.check_nothing_lost(tmp_path, ("results.json", "runs.jsonl"), "runs.jsonl")
    else:
        output.check_nothing_lost(tmp_path, ("results.json", "runs.jsonl"), "runs.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "contains runs of another study (other batchnorm, torch, network, code, data, fingerprint, together)"),
        ('{"batchnorm": "0.0.1"}\n', "contains runs of another study"),
        ("not JSON\n", "contains runs of another study"),
    ],
)
def test_runs_of_another_study_are_not_mixed_with_these(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "runs.jsonl").write_text(text)
    result = run("study", *SMALL, "--out", tmp_path, "--resume")
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "runs.jsonl").read_text() == text, "nothing is lost"


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import batchnorm.study.runner as runner

    def full(value: dict[str, Any]) -> str:
        lines.append(line(value))
        if len(lines) > 6:
            raise OSError(28, "No space left on device")
        return lines[-1]

    lines: list[str] = []
    line = runner._line
    monkeypatch.setattr(runner, "_line", full)
    result = run("study", *SMALL, "--out", tmp_path)
    assert result.exit_code == 2
    assert "runs.jsonl cannot be written: No space left on device; what is in it is kept" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "runs.jsonl").read_text() == "".join(lines[:6])


@pytest.mark.parametrize("missing", ["torch", "sklearn", "joblib", "plotly", "jinja2", "rich.progress"])
def test_a_missing_package_is_named_with_the_way_to_get_it(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from batchnorm.cli import main; main()"
    result = python(code, "study", *SMALL, cwd=tmp_path)
    assert result.returncode == 2
    assert f"needs {missing}" in result.stderr
    assert 'pip install "batchnorm[study]"' in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_the_benchmark_misses() -> None:
    code = "import sys; sys.modules['torch'] = None; from batchnorm.cli import main; main()"
    result = python(code, "bench")
    said = "batchnorm: the benchmark needs torch, which is not installed; install it with pip install "
    said += '"batchnorm[bench]".\n'
    assert (result.returncode, result.stderr, result.stdout) == (2, said, "")


def test_without_typer() -> None:
    result = python("import sys; sys.modules['typer'] = None; from batchnorm.cli import main; main()", "--help")
    assert result.returncode == 1
    assert result.stderr == (
        "batchnorm: the command line needs typer, which each command's extra installs: "
        'pip install "batchnorm[study]", "batchnorm[bench]", "batchnorm[diagnose]" or, to fold, "batchnorm[onnx]".\n'
    )


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"batchnorm {batchnorm.__version__}\n")


def test_help() -> None:
    assert "study" in run("--help").stdout
    text = run("study", "--help").stdout
    for option in ("--out", "--data", "--model", "--claims", "--resume", "--seeds", "--target"):
        assert option in text


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("study", ["--quick", "--full", "--resume"]),
        ("bench", ["--compile", "--jax"]),
        ("fold", ["--no-check", "--quiet"]),
        ("env", ["--json"]),
        ("diagnose", ["--quiet"]),
    ],
)
def test_flags_take_no_value(command: str, flags: list[str]) -> None:
    lines = run(command, "--help").stdout.splitlines()
    for flag in flags:
        (line,) = (line for line in lines if f"{flag} " in line)
        assert "<bool>" not in line
        assert "BOOL" not in line.upper()


def test_as_a_module_and_without_importing_a_framework() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "batchnorm", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"batchnorm {batchnorm.__version__}\n"
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "sklearn", "plotly", "numpy", "joblib"}
