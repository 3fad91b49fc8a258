"""`fastres train`: a run on the command line, called again, interrupted; its options, every refusal as one line."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from cli_cases import FASTRES, one_line, started  # noqa: E402
from fastres import cli  # noqa: E402
from fastres.lab import datasets, loop, train_command  # noqa: E402
from fastres.lab.train_command import Request  # noqa: E402
from train_runs import write_images  # noqa: E402

QUICK = ["train", "resnet8", "--recipe", "digits-quick", "--device", "cpu", "--threads", "1"]


def spec(*arguments, **options):
    return train_command._spec(Request(*arguments, **options))


def test_a_run_on_the_command_line(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main([*QUICK, "--out", str(out), "--stop-after", "10"]) == 0
    text, err = capsys.readouterr()
    assert err == "" and "training error" in text and "10 of 24 iterations" in text
    assert cli.main([*QUICK, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    head, *_, last = text.splitlines()
    wanted = "resnet8 on digits: recipe digits-quick, 24 iterations of 64, lr 0.1, / 10 at 12, 18; "
    assert head == f"{wanted}{out}"
    assert re.search(r"^training 24/24, epoch 2/2  loss \d\.\d{3}  \d+ images/s$", text, re.M)
    data = json.loads((out / "result.json").read_text())
    assert f"test error {data['test_error']:.2%}" in last and "75,002 parameters" in last
    assert data["command"].startswith("fastres train resnet8 --recipe digits-quick")
    assert cli.main([*QUICK, "--out", str(out)]) == 0  # done: says what it came to
    assert capsys.readouterr().out == last + "\n"


def test_without_out_the_folder_is_named_by_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*QUICK, "--seed", "3", "--stop-after", "1"]) == 0
    assert (tmp_path / "out/train/resnet8-digits-digits-quick-seed3/checkpoint.pt").exists()


def test_ctrl_c_is_one_line_and_the_run_goes_on(tmp_path):
    command = [*FASTRES, *QUICK, "--iterations", "400", "--out", str(tmp_path)]
    with started(command) as process:
        assert process.stdout.readline().startswith("resnet8 on digits")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "fastres: interrupted\n")
    assert f"interrupted; run the same command again to resume from {tmp_path}" in out
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["iteration"]
    assert 1 <= done < 400
    with started([*command, "--stop-after", str(done + 1)]) as rest:
        out, err = rest.communicate(timeout=120)
    assert rest.returncode == 0 and f"{done + 1} of 400 iterations" in out, err


def test_options_become_the_spec():
    options = ("shortcut=B", "layers_per_block=2", "zero_init_residual=true")
    how = {"batch_size": 32, "bn_batch": 16, "lr": 0.05, "decay": "convolutions", "dtype": "bf16"}
    found = spec("resnet20", options=options, swap=False, channels_last=False, seed=7, **how)
    assert found.options == (("shortcut", "B"), ("layers_per_block", 2), ("zero_init_residual", True))
    recipe = found.recipe
    assert (recipe.batch_size, recipe.bn_batch, recipe.lr, recipe.decay) == (32, 16, 0.05, "convolutions")
    assert (found.dtype, found.swap, found.channels_last, found.seed) == ("bf16", False, False, 7)
    assert loop.RunSpec.from_dict(found.to_dict()) == found


def test_fewer_iterations_keep_the_schedules_shape():
    recipe = spec("resnet20", "cifar10", iterations=640).recipe
    assert (recipe.iterations, recipe.milestones, recipe.test_every) == (640, (320, 480), 160)
    assert spec("resnet20", "cifar10", iterations=64_000).recipe.name == "cifar10"
    assert spec("resnet110", "cifar10", "cifar10-110").recipe.warmup_lr == 0.01
    assert spec("resnet8", iterations=1).recipe.milestones == (1,)


def test_every_data_set_has_a_recipe():
    assert {name: spec("resnet20", name).recipe.name for name in datasets.NAMES} == train_command.DEFAULT_RECIPE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet21"], "network resnet21: depth"),
        (["vgg16"], "network: got 'vgg16', expected one of"),
        (["resnet8", "--data", "mnist"], "--data: got 'mnist', expected one of digits, digits8, cifar10, imagenet"),
        (["resnet8", "--data", "cifar10"], "data root: got none, expected the folder of CIFAR-10 (--data-root)"),
        (["resnet8", "--recipe", "sgd"], "recipe: got 'sgd', expected one of cifar10, cifar10-110"),
        (["resnet8", "--option", "shortcut"], "--option: got 'shortcut', expected name=value"),
        (["resnet8", "--option", "shortcut=D"], "shortcut: got 'D', expected one of 'A', 'B', 'C'"),
        (["resnet8", "--option", "width=2"], "got 'width', expected"),
        (["resnet8", "--iterations", "0"], "Invalid value for '--iterations'"),
        (["resnet8", "--batch-size", "0"], "batch_size: got 0"),
        (["resnet8", "--bn-batch", "48"], "bn_batch: got 48, expected a divisor of batch_size, 64"),
        (["resnet8", "--lr", "nan"], "lr: got nan"),
        (["resnet8", "--decay", "bn"], "decay: got 'bn', expected one of all, convolutions"),
        (["resnet8", "--dtype", "fp8"], "dtype: got 'fp8', expected fp32, bf16, fp16"),
        (["resnet8", "--device", "tpu"], "device: got 'tpu'"),
        (["resnet8", "--seed", "-1"], "Invalid value for '--seed'"),
        (["resnet8", "--stop-after", "0"], "Invalid value for '--stop-after'"),
        (["resnet8", "--workers", "-1"], "Invalid value for '--workers'"),
        (["resnet8", "--threads", "0"], "--threads"),
        (["resnet8", "--fast"], "--fast"),
    ],
)
def test_bad_arguments_are_one_line_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


# ---- images in folders, with worker processes ------------------------------------------------------------------------


def test_ctrl_c_with_worker_processes(tmp_path):
    """A terminal sends it to all of them: the workers stay till the loop has ended its iteration."""
    write_images(tmp_path / "data", {"train": 3, "val": 3}, (230, 250))
    out = tmp_path / "run"
    command = [*FASTRES, "train", "resnet8", "--data", "imagenet", "--data-root", str(tmp_path / "data"), "--workers"]
    command += ["1", "--batch-size", "4", "--device", "cpu", "--threads", "1", "--iterations", "500", "--out", str(out)]
    with started(command, start_new_session=True) as process:
        assert process.stdout.readline().startswith("resnet8 on imagenet")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "fastres: interrupted\n")
    assert torch.load(out / "checkpoint.pt", weights_only=True)["progress"]["iteration"] >= 1
