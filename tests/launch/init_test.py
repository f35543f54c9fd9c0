"""`dpdist init` writes projects that pass their own test and train."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from launch.cli import config_files
from launch.init import project

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_KINDS = ("tabular", "image", "text")


def _init(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["init", *map(str, args)])
  try:
    return project.main()
  except SystemExit as end:
    return end.code


@pytest.mark.parametrize("kind", _KINDS)
def test_a_project_has_what_its_readme_names(
  kind, tmp_path, monkeypatch, capsys
):
  folder = tmp_path / "a" / "my_project"
  assert _init(monkeypatch, folder, f"--kind={kind}") == 0
  out = capsys.readouterr().out.splitlines()[-1]
  assert out.startswith(f"try: python -m launch.train --config={folder}/conf")
  text = (folder / "README.md").read_text()
  assert text.startswith("# my_project\n")
  data = project._KINDS[kind][2]
  assert f"`{data}` holds made-up data" in text
  assert {x.name for x in folder.iterdir()} == {
    *("README.md", "config.py", "config_test.py", data.rstrip("/"))
  }


@pytest.mark.parametrize("kind", _KINDS)
def test_its_number_of_examples_is_that_of_its_data(
  kind, tmp_path, monkeypatch
):
  assert _init(monkeypatch, tmp_path, f"--kind={kind}") == 0
  spec = importlib.util.spec_from_file_location(
    f"new_{kind}", tmp_path / "config.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  dataset = module.get_dataset(config)
  assert len(dataset.train) == config.privacy.num_examples
  assert len(dataset.test) > 100


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
  (tmp_path / "file").write_text("mine")
  for place in (tmp_path, tmp_path / "file"):
    assert _init(monkeypatch, place) == 2
    assert "folder must be new or empty, got " in capsys.readouterr().err
  assert [x.name for x in tmp_path.iterdir()] == ["file"]
  assert (tmp_path / "file").read_text() == "mine"


def test_an_unknown_kind_is_refused(tmp_path, monkeypatch, capsys):
  assert _init(monkeypatch, tmp_path / "new", "--kind=sound") == 2
  assert "tabular" in capsys.readouterr().err
  assert not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
def test_a_project_passes_its_test_and_trains(kind, tmp_path, monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(_ROOT))
  monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)

  def run(*args):
    done = subprocess.run(
      [sys.executable, "-m", *args],
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done

  run("dpdist", "init", "mine", f"--kind={kind}")
  assert "3 passed" in run("pytest", "-p", "no:xdist", "mine").stdout
  steps = ["--config.privacy.num_steps=40"] if kind == "text" else []
  run("dpdist", "train", "--config=mine/config.py", "--workdir=run", *steps)
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  # By chance it would be 0.5, 0.33 and 0.08.
  assert result["test"]["accuracy"] > {"image": 0.7, "text": 0.2}.get(kind, 0.8)


def test_a_kind_is_no_config_that_comes_with_dpdist():
  assert not {*config_files.names()} & {*_KINDS}
