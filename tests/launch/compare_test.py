"""Runs side by side, as a command."""

import json
import subprocess
import sys

import pytest

from dpdist.reporting import metrics


def _run(path):
  path.mkdir()
  with metrics.Writer(path, unsafe_metrics=False) as writer:
    for step in (1, 2):
      writer.write(step, {"epsilon": step / 2, "test/accuracy": step / 4})
  result = {"epsilon": 1.0, "delta": 1e-5, "num_steps": 2}
  result |= {"noise_multiplier": 1.5, "guarantee": "holds"}
  (path / "result.json").write_text(json.dumps(result))
  return str(path)


def _compare(*arguments, cwd):
  # Without jax, as on a laptop that only looks at runs.
  code = (
    "import sys; sys.modules['jax'] = None\n"
    "from launch.compare import command\n"
    "sys.exit(command.main())"
  )
  return subprocess.run(
    [sys.executable, "-c", code, *arguments],
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
  )


def test_runs_are_compared_and_mistakes_named(tmp_path, monkeypatch, request):
  monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
  runs = [_run(tmp_path / name) for name in "ab"]
  done = _compare(*runs, cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, "")
  first, second, third, last = done.stdout.splitlines()
  assert first.split()[:3] == ["run", "accuracy", "epsilon"]
  assert second.split() == ["1", "a", "0.5", "1", "1e-05", "2", "1.5", "holds"]
  assert third.split()[1] == "b"
  assert last == "page: compare.html"
  assert "Held-out accuracy by epsilon" in (
    tmp_path / "compare.html"
  ).read_text("utf-8")
  for wrong, said in (
    ([str(tmp_path / "none")], "must be the directory of a run"),
    ([], "required: workdir"),
    ([*runs, "--out=/nowhere/page.html"], "--out must be in a directory"),
  ):
    done = _compare(*wrong, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_is_found_by_its_name(tmp_path, request):
  runs = [_run(tmp_path / name) for name in "ab"]
  command = [sys.executable, "-m", "dpdist", "compare", *runs]
  command += [f"--out={tmp_path}/page.html"]
  subprocess.run(command, check=True, cwd=request.config.rootpath)
  assert (tmp_path / "page.html").exists()
