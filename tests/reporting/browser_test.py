"""The report in a real browser: on a phone and a desk, light and dark.

Pictures go to $DPDIST_SCREENSHOTS, if it is set, to be looked at. Needs
Chromium: `apt-get install chromium`.
"""

import json
import math
import os
import pathlib
import struct

import pytest

from dpdist.reporting import compare
from dpdist.reporting import metrics
from dpdist.reporting import report
from dpdist.reporting import telemetry
from tests.support import browser

pytestmark = pytest.mark.slow

_SIZES = ((390, 844), (320, 568), (1280, 800))
_RESULT = {
  "epsilon": 2.0,
  "delta": 1e-5,
  "guarantee": "holds",
  "noise_multiplier": 1.1,
  "num_steps": 60_000,
  "params_sha256": "9f" * 32,
  "ledger_head": "ab" * 32,
  "test": {"accuracy": 0.98123, "loss": 0.21234},
  "test_ema": {"accuracy": 0.9844, "loss": 0.1999},
  "environment": {
    "packages": {"jax": "0.10.2", "a-package-of-a-long-name": "1.2.3.post4"},
    "code_sha256": "5c" * 32,
    "device_kind": "NVIDIA H100 80GB HBM3",
  },
}
# Elements whose right edge is outside of the window, and what they say.
_OUTSIDE = """
[...document.querySelectorAll("body *")]
  .filter(x => x.getBoundingClientRect().right > WIDTH + 0.5
    || x.getBoundingClientRect().left < -0.5)
  .map(x => x.tagName + ": " + x.textContent.slice(0, 60))
"""
# Text that is cut off by what it is in.
_CUT = """
[...document.querySelectorAll("main *:not(svg *)")]
  .filter(x => x.scrollWidth > x.clientWidth + 1 && x.clientWidth > 0)
  .map(x => x.tagName + ": " + x.textContent.slice(0, 60))
"""
# The contrast of an element's text to what is behind it.
_CONTRAST = """
(name => {
  const at = x => x.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = x => { const [r, g, b] = at(x).map(v => {
    v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const text = document.querySelector(name);
  let back = text;
  while (getComputedStyle(back).backgroundColor == "rgba(0, 0, 0, 0)")
    back = back.parentElement;
  const [a, b] = [light(getComputedStyle(text).color),
    light(getComputedStyle(back).backgroundColor)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
})(NAME)
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  with browser.chromium(tmp_path_factory.mktemp("profile")) as page:
    yield page


def _write(workdir, **changes):
  with metrics.Writer(workdir, unsafe_metrics=False) as writer:
    for step in range(600, 60_001, 600):
      done = step / 60_000
      writer.write(
        step,
        {
          "epsilon": 2 * math.sqrt(done),
          "learning_rate": 0.5 * (1 + math.cos(math.pi * done)),
          "noisy_gradient_norm": 1.3 - 0.2 * done + 0.02 * math.sin(step),
          "noise_norm": 1.0,
          "test/accuracy": 0.98 - 0.9 * math.exp(-6 * done),
          "test_ema/accuracy": 0.984 - 0.9 * math.exp(-5 * done),
        },
      )
  given = {
    "result": _RESULT,
    "statement": "The unit of privacy is one example of 60,000. " * 9,
    "rows": [
      ("examples", "60,000"),
      ("sampling probability q", "0.0341333, Poisson, cut to 2,100"),
      ("mesh", "data 16 x fsdp 16 x model 1 (NVIDIA H100 80GB HBM3)"),
    ],
    "notices": [],
  }
  return report.write(workdir, **(given | changes))


def _look(page, path, width, height, scheme, name):
  page.open(path, width=width, height=height, scheme=scheme)
  folder = pathlib.Path(os.environ.get("DPDIST_SCREENSHOTS", path.parent))
  folder.mkdir(parents=True, exist_ok=True)
  picture = folder / f"{name}_{width}_{scheme}.png"
  page.picture(picture)
  return picture


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), _SIZES)
def test_the_report_fits_the_window(tmp_path, page, width, height, scheme):
  path = _write(tmp_path)
  picture = _look(page, path, width, height, scheme, "report")
  assert page.ask("innerWidth") == width
  assert page.ask("document.documentElement.scrollWidth") <= width
  assert page.ask(_OUTSIDE.replace("WIDTH", str(width))) == []
  assert page.ask(_CUT) == []
  assert page.ask("document.querySelectorAll('svg').length") == 4
  assert page.errors == []
  # It is a picture of the whole page, at two dots a pixel.
  wide, high = struct.unpack(">II", picture.read_bytes()[16:24])
  assert wide == 2 * width
  assert high > 2 * height


def test_the_owner_s_page_fits_a_phone(tmp_path, page):
  machine = {
    "step_seconds": 1.25,
    "input_wait_seconds": 0.01,
    "own_seconds": 1.0,
    "host_bytes": 3e9,
  }
  with telemetry.Writer(tmp_path, start_step=0) as writer:
    for step in range(600, 60_001, 600):
      speed = {"examples_per_second": 9000.0 + step % 7}
      writer.write(step, [json.dumps(machine)], speed)
  path = report.write_speed(tmp_path / telemetry.FOLDER)
  _look(page, path, 390, 844, "light", "speed")
  assert page.ask("document.documentElement.scrollWidth") <= 390
  assert page.ask(_OUTSIDE.replace("WIDTH", "390")) == []
  assert page.ask(_CUT) == []
  assert page.ask("document.querySelectorAll('svg').length") == 3
  assert page.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), _SIZES)
def test_runs_side_by_side_fit_the_window(
  tmp_path, page, width, height, scheme
):
  """All of the table is seen on a phone, too: nothing is behind its edge."""
  names = ["first", "a_name_of_a_run_that_is_as_long_as_names_get", "no_use"]
  for name in names:
    result = _RESULT | {"guarantee": "void: insecure_seed fixes all streams"}
    result |= {
      "held_out_problem": "the held-out loss is nan" * (name != "first")
    }
    _write(tmp_path / name, result=result)
    (tmp_path / name / "result.json").write_text(json.dumps(result))
  runs = compare.read([tmp_path / name for name in names])
  path = compare.write(runs, tmp_path / "compare.html")
  _look(page, path, width, height, scheme, "compare")
  assert page.ask("document.documentElement.scrollWidth") <= width
  if width < 600:
    assert page.ask(_OUTSIDE.replace("WIDTH", str(width))) == []
    assert page.ask(_CUT) == []
  assert page.ask("document.querySelectorAll('svg').length") == 2
  for name in ("td", ".label", ".notices strong", ".notices p", "h2"):
    assert page.ask(_CONTRAST.replace("NAME", repr(name))) >= 4.5, name
  assert page.errors == []


def test_a_long_name_of_a_metric_stays_in_its_card(tmp_path, page):
  held_out = {"a_metric_of_a_user_with_a_name_that_does_not_end": 1e-5}
  path = _write(tmp_path, result=_RESULT | {"test": held_out})
  _look(page, path, 390, 844, "dark", "long")
  assert page.ask(_CUT) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_read_stands_out_from_the_page(tmp_path, page, scheme):
  """Contrast of at least 4.5 to 1, as WCAG 2 asks of text (1.4.3)."""
  _look(page, _write(tmp_path), 390, 844, scheme, "contrast")
  for name in ("td", "th", ".label", ".badge", ".statement p", "h1", "h2"):
    assert page.ask(_CONTRAST.replace("NAME", repr(name))) >= 4.5, name


def test_a_void_guarantee_cannot_be_missed_on_a_phone(tmp_path, page):
  path = _write(
    tmp_path,
    result=_RESULT | {"guarantee": "void: insecure_seed is set"},
    notices=["insecure_seed is set", "checkpoint of step 40 passed over"],
  )
  _look(page, path, 390, 844, "light", "void")
  top = page.ask(
    "document.querySelector('.badge.red').getBoundingClientRect().bottom"
  )
  assert top < 844
  box = page.ask(
    "document.querySelector('.notices.red').getBoundingClientRect().top"
  )
  assert box < 844
  struck = "getComputedStyle(document.querySelector('.void .figure'))"
  assert page.ask(f"{struck}.textDecorationLine") == "line-through"
  assert page.ask(_OUTSIDE.replace("WIDTH", "390")) == []


def test_complaints_and_overflow_would_be_seen(tmp_path, page):
  """The checks can fail: a page that is broken on purpose."""
  path = tmp_path / "broken.html"
  path.write_text(
    "<meta name='viewport' content='width=device-width'><main>"
    "<p style='width: 900px'>wide</p></main>"
    "<script>console.error('oh'); missing()</script>"
  )
  page.open(path, width=390, height=844)
  assert page.ask("document.documentElement.scrollWidth") > 390
  assert page.ask(_OUTSIDE.replace("WIDTH", "390")) != []
  assert len(page.errors) == 2
  page.errors.clear()
