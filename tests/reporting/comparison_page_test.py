"""Runs on one page; see `dpdist.reporting.compare`."""

import json
import math

import pytest

from dpdist import errors
from dpdist.reporting import compare
from dpdist.reporting import metrics


def _run(path, *, epsilon=2.0, result=True, name="accuracy"):
  path.mkdir(parents=True)
  with metrics.Writer(path, unsafe_metrics=False, held_out=[name]) as writer:
    for step in range(1, 21):
      share = step / 20
      row = {"epsilon": epsilon * math.sqrt(share), f"test/{name}": share / 2}
      writer.write(step, row)
  if result:
    values = {"epsilon": epsilon, "delta": 1e-5, "num_steps": 20}
    values |= {"noise_multiplier": 1.25, "guarantee": "holds"}
    (path / "result.json").write_text(json.dumps(values))
  return path


def test_runs_stand_side_by_side(tmp_path):
  first = _run(tmp_path / "runs" / "a")
  second = _run(tmp_path / "runs" / "b", epsilon=3.0, result=False)
  runs = compare.read([first, second])
  metric = compare.metric_of(runs)
  assert metric == "accuracy"
  _, *rows = compare.table(runs, metric)
  assert rows == [
    ("1 a", "0.5", "2", "1e-05", "20", "1.25", "holds"),
    ("2 b", "0.5", "3", "-", "20", "-", "has not ended"),
  ]
  page = compare.write(runs, tmp_path / "page.html").read_text()
  for text in ("Held-out accuracy by epsilon", "1 a", "2 b", "epsilon spent"):
    assert text in page
  assert "all of them together spent more" in page
  assert "http" not in page.replace("http://www.w3.org", "")


def test_a_void_run_is_shown_as_such(tmp_path):
  path = _run(tmp_path / "a")
  result = json.loads((path / "result.json").read_text())
  result["guarantee"] = "void: <insecure_seed>"
  (path / "result.json").write_text(json.dumps(result))
  page = compare.write(compare.read([path]), tmp_path / "page.html")
  assert "void: &lt;insecure_seed&gt;" in page.read_text()
  assert "1 a: no guarantee: &lt;insecure_seed&gt;" in page.read_text()


def test_a_model_of_no_use_is_shown_as_such(tmp_path):
  paths = [_run(tmp_path / x) for x in "ab"]
  page = compare.write(compare.read(paths), tmp_path / "page.html")
  assert "Not to be relied on" not in page.read_text()
  result = json.loads((paths[1] / "result.json").read_text())
  result["held_out_problem"] = (
    "the held-out loss is nan: the model is of no use"
  )
  (paths[1] / "result.json").write_text(json.dumps(result))
  page = compare.write(compare.read(paths), tmp_path / "page.html").read_text()
  assert "<section class='notices' role='alert'>" in page
  assert "<p>2 b: the held-out loss is nan" in page


def test_curves_that_end_in_one_place_have_one_label(tmp_path):
  paths = [_run(tmp_path / x) for x in "abc"]
  _run(tmp_path / "d", epsilon=8.0)
  page = compare.write(compare.read([*paths, tmp_path / "d"]), tmp_path / "p")
  text = page.read_text()
  assert text.count(">1, 2, 3</text>") == 1  # By epsilon; by step all meet.
  assert text.count(">1, 2, 3, 4</text>") == 1


def test_runs_without_a_metric_in_common_have_no_curves(tmp_path):
  runs = compare.read([_run(tmp_path / "a"), _run(tmp_path / "b", name="mse")])
  assert compare.metric_of(runs) == ""
  page = compare.write(runs, tmp_path / "p.html").read_text()
  assert "No held-out metric is in all of these runs" in page
  assert "<svg" not in page


@pytest.mark.parametrize("given", [[], ["a", "a"], ["a", "nothing"]])
def test_what_is_no_run_is_named(tmp_path, given):
  _run(tmp_path / "a")
  (tmp_path / "nothing").mkdir()
  with pytest.raises(errors.ArgumentError, match="director"):
    compare.read([tmp_path / x for x in given])
