# SPDX-License-Identifier: Apache-2.0

"""The command ``stfpm-ext``: its subcommands, their options and errors."""

import csv
import inspect
import io
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_stfpm_ext import StfpmExt, diagnosis, load_model
from anomalib_stfpm_ext.cli import main
from anomalib_stfpm_ext.cli.parser import GROUPS
from anomalib_stfpm_ext.convert import save_checkpoint
from anomalib_stfpm_ext.reproduce import make_parser


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cli") / "model.ckpt"
    save_checkpoint(StfpmExt(teacher_weights=False), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(folder / "one.png")
    return folder


def test_it_is_installed():
    (script,) = entry_points(group="console_scripts", name="stfpm-ext")
    assert script.load() is main


def test_pictures_in_a_folder_that_the_terminal_cannot_name(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    output = tmp_path / "Fehlergröße ≥ 1"
    main(["draw", "levels", "--checkpoint", str(checkpoint), "--images", str(folder), "--output", str(output)])
    assert list(output.iterdir())


def test_help_names_all_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("info", "watch", "draw", "convert", "reproduce"))


def modules_after(python, *arguments: str) -> list[str]:
    """Return the modules that a command has imported at its end."""
    script = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules))\n"
    ended = python(f"{script}from anomalib_stfpm_ext.cli import main; main({list(arguments)})", check=False)
    return ended.stdout.partition("MODULES")[2].split()


COMMANDS = [["info"], ["watch"], ["reproduce"], *([group, task] for group in GROUPS for task in GROUPS[group][1])]
AT_ONCE = [["--help"], ["--print_shtab", "bash"], ["--mispelt"]]
AT_ONCE += [[*command, option] for command in COMMANDS for option in ("--help", "--mispelt")]


@pytest.mark.parametrize("arguments", AT_ONCE, ids=" ".join)
def test_what_scores_nothing_imports_little(python, arguments):
    modules = modules_after(python, *arguments)
    assert 100 < len(modules) < 500  # torch alone has 1000
    assert {name.partition(".")[0] for name in modules} & {"anomalib", "lightning", "numpy", "rich", "torch"} == set()


def test_info_imports_torch_but_no_models(python):
    modules = modules_after(python, "info")
    assert "torch" in modules
    assert {"anomalib.models", "lightning", "timm", "torchvision"} & set(modules) == set()


def test_options_of_the_model_are_its_arguments():
    """The parser reads them from the source of StfpmExt, which it does not import."""
    options = inspect.signature(StfpmExt).parameters.keys() - {"seed"}
    options -= {"pre_processor", "post_processor", "evaluator", "visualizer"}
    described = {action.dest: action.help for action in make_parser()._actions}
    assert options <= described.keys()
    assert all(described[name] for name in options)


def test_info(capsys):
    main(["info"])
    assert "scores correctly     yes" in capsys.readouterr().out


@pytest.mark.parametrize("is_found", [True, False])
def test_info_knows_without_an_import_whether_anomalib_will_know_the_model(monkeypatch, is_found):
    monkeypatch.delitem(sys.modules, "anomalib.models")
    if is_found:
        assert diagnosis._registered() == "yes, it imports StfpmExt after its own models"
        return
    others = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "StfpmExtFinder"]
    monkeypatch.setattr(sys, "meta_path", others)
    with pytest.raises(LookupError, match=r"autoload\.pth"):
        diagnosis._registered()


def test_watch(checkpoint, folder, tmp_path):
    table = tmp_path / "scores.csv"
    main(["watch", "--checkpoint", str(checkpoint), "--folder", str(folder), "--csv", str(table), "--once"])
    (row,) = csv.DictReader(table.open())
    assert row["file"] == "one.png"
    assert float(row["score"]) >= 0


def test_draw(checkpoint, folder, tmp_path):
    main(["draw", "levels", "--checkpoint", str(checkpoint), "--images", str(folder), "--output", str(tmp_path)])
    assert Image.open(tmp_path / "one.png").width > 64
    picture = tmp_path / "histogram.png"
    options = ["--checkpoint", checkpoint, "--good", folder, "--defective", folder, "--output", picture]
    main(["draw", "histogram", *map(str, options)])
    assert picture.is_file()


def test_convert_there_and_back(checkpoint, tmp_path):
    student, back = tmp_path / "best.pth.tar", tmp_path / "back.ckpt"
    main(["convert", "to-authors", "--checkpoint", str(checkpoint), "--output", str(student)])
    teacher = tmp_path / "teacher.pth"
    torch.save(load_model(checkpoint).model.teacher_model.feature_extractor.state_dict(), teacher)
    options = ["--student", student, "--output", back, "--teacher_weights", teacher]
    main(["convert", "from-authors", *map(str, options)])
    before, after = load_model(checkpoint).state_dict(), load_model(back).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "layer" in name)
    again = tmp_path / "again.ckpt"
    options = ["--checkpoint", checkpoint, "--output", again, "--backbone", "resnet18.tv_in1k"]
    main(["convert", "from-anomalib", *map(str, options), "--layers", "[layer1,layer2,layer3]"])
    assert again.is_file()


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["watch", "--checkpoint", "no.ckpt", "--folder", "."], "FileNotFoundError: checkpoint: wanted a checkpoint"),
        (
            ["convert", "to-authors", "--checkpoint", "no.ckpt", "--output", "o"],
            "FileNotFoundError: checkpoint: wanted",
        ),
        (["draw", "levels", "--checkpoint", "no.ckpt", "--images", ".", "--output", "o"], "FileNotFoundError"),
        (["reproduce", "--data", "MVTecAD", "--root", "nowhere"], "FileNotFoundError: root: wanted the folder"),
    ],
)
def test_errors_are_one_line(command, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=error):
        main(command)


def test_completion_knows_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print_shtab", "bash"])
    script = capsys.readouterr().out
    assert all(name in script for name in ("info", "watch", "from-anomalib", "histogram", "--teacher_weights"))


def test_lists_are_lists(tmp_path):
    """The categories are looked for before the seeds are used, so both have been read."""
    (tmp_path / "bottle" / "train" / "good").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bottle" / "train" / "good" / "0.png")
    options = ["--data", "MVTecAD", "--root", str(tmp_path), "--seeds", "[0,1]", "--categories", "[bottle,pill]"]
    with pytest.raises(SystemExit, match=r"ValueError: categories: wanted some of bottle, .* got pill"):
        main(["reproduce", *options])
