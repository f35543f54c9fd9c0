"""`launch.submit`: its files against the engines' own schemas and parsers.

Slurm's script is also run on a real cluster, by slurm_submit_test.py, and Ray's
driver by ray_test.py. No Kubernetes and no TPU ran any of this.
"""

import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys

from kubeflow_trainer_api import models
import kubernetes_validate
import pytest
from ray.dashboard.modules.job import cli
from ray.runtime_env import RuntimeEnv
import yaml

from dpdist import errors
from launch.engines import jobset
from launch.engines import ray as ray_engine
from launch.engines import slurm
from launch.engines import tpu_vm
from tests.support import commands
from tests.support import without_jax

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = f"--config={_ROOT}/configs/digits.py"
# What quoting must survive.
_HOSTILE = (
  '--config.data.path=/a b/it\'s "$(touch /tmp/no)" `id` $HOME $$ \\ * ~;#&|>é',
  "--config.data.name=- yes: [no], {null} %s !!python",
)
_ARGUMENTS = ("--config=configs/digits.py", *_HOSTILE)
_COMMON = {"name": "run", "workdir": "/a b/$(x)'", "arguments": _ARGUMENTS}
_JOBS = {
  "slurm": slurm.Job(
    **_COMMON,
    nodes=2,
    processes_per_node=2,
    cpus=3,
    memory="16G",
    time_limit=90,
    partition="main",
    account="us",
  ),
  "jobset": jobset.Job(
    **_COMMON,
    nodes=4,
    image="ghcr.io/a/b:1",
    namespace="ns",
    storage_class="nfs",
    accelerator="tpu-v6e-slice",
    topology="4x4",
    chips_per_node=4,
  ),
  "tpu-vm": tpu_vm.Job(
    **_COMMON,
    image="us-docker.pkg.dev/p/r/i:1",
    accelerator="v6e-16",
    runtime_version="v2-alpha-tpuv6e",
    zone="us-east5-a",
    project="p",
    nfs="10.0.0.2:/sh are",
    secret="s",
    service_account="a@p.iam.gserviceaccount.com",
    spot=True,
  ),
  "ray": ray_engine.Job(**_COMMON, nodes=2, address="http://127.0.0.1:8265"),
}


def _text(engine, name):
  (text,) = engine.files(_JOBS[name]).values()
  return text


# The commands.

_SUBMIT = """
import runpy
sys.argv = ["launch.submit", *sys.argv[1:]]
runpy.run_module("launch.submit", run_name="__main__")
"""
_NEEDED = {
  "slurm": [],
  "jobset": ["--image=a/b:1"],
  "tpu-vm": [
    *("--image=a/b:1", "--accelerator=v6e-16", "--runtime_version=v2"),
    *("--zone=z", "--nfs=server:/share"),
  ],
  "ray": ["--address=http://127.0.0.1:8265"],
}


def _submit(*args):
  return without_jax.run(_SUBMIT, *args)


# One in every run: each starts a command three times.
_ENGINES = [
  pytest.param(name, marks=[pytest.mark.slow] * bool(i))
  for i, name in enumerate(sorted(_NEEDED))
]


@pytest.mark.parametrize("engine", _ENGINES)
@pytest.mark.slow
def test_a_dry_run_prints_all_and_says_what_it_will_spend(engine, tmp_path):
  args = [
    f"--to={engine}",
    "--dry_run",
    _CONFIG,
    "--workdir=/shared/digits",
    "--config.privacy.num_steps=7",
    "--config.privacy.accountant=rdp",  # The quicker one.
    *_NEEDED[engine],
  ]
  done = _submit(*args)
  assert done.returncode == 0, done.stderr
  assert "will spend epsilon 2.0000 at delta 0.0001" in done.stderr
  assert "--config.privacy.num_steps=7" in done.stdout
  assert "--workdir=/shared/digits" in done.stdout
  done = _submit(*args, f"--out={tmp_path / 'files'}")
  assert done.returncode == 0, done.stderr
  (path,) = (tmp_path / "files").iterdir()
  assert str(path) in done.stdout


@pytest.mark.parametrize("engine", _ENGINES)
@pytest.mark.slow
def test_a_missing_tool_is_named(engine, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "launch.submit", f"--to={engine}"),
      *(_CONFIG, "--workdir=/shared/digits", *_NEEDED[engine]),
      "--config.privacy.accountant=rdp",
    ],
    cwd=_ROOT,
    env={**os.environ, "PATH": str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2, done.stderr
  tool = {"jobset": "kubectl", "tpu-vm": "gcloud", "slurm": "sbatch"}
  said = f"error: {tool.get(engine, engine)} is missing"
  assert any(line.startswith(said) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--to=pbs"], "pbs"),
    (["--to=slurm", "--image=a"], "--image does not go with --to=slurm"),
    (["--to=slurm", "--name=A b"], "name must be"),
    (["--to=slurm", "--nodes=0"], "nodes must be an integer >= 1, got 0"),
    (["--to=slurm", "--partition=a b"], "partition must be"),
    (["--to=slurm", "--workdir=here"], "workdir must be an absolute path"),
    (["--to=slurm", "--config.data.path=a\nb"], "line breaks"),
    (["--to=slurm", "--config.privacy.target_delta=2.0"], "target_delta"),
    (["--to=slurm", "--config.privcy=1"], "privacy"),
    (["--to=jobset"], "image must be given"),
    (["--to=jobset", "--image=a", "--topology=4x4"], "go together"),
    (
      ["--to=jobset", "--image=a", "--secret=s", "--config.secret_file=/s"],
      "config.secret_file must be empty",
    ),
    (["--to=tpu-vm", "--image=a"], "accelerator must be given"),
    (["--to=tpu-vm", *_NEEDED["tpu-vm"], "--nodes=2"], "nodes must not"),
    (["--to=ray", "--address=host:8265"], "address must begin with http://"),
    (["--to=ray", "--cpus=0"], "cpus must be an integer >= 1"),
    (["--to=slurm", "--out="], "--out must be a folder, got ''"),
  ],
)
def test_wrong_usage_is_refused_before_anything_is_written(args, message):
  done = commands.run("submit", "--dry_run", _CONFIG, "--workdir=/w", *args)
  assert done.code == 2
  assert message in done.err
  assert "Traceback" not in done.err
  assert not done.out


def test_wrong_usage_is_refused_without_jax():
  done = _submit("--dry_run", _CONFIG, "--workdir=/w")
  assert done.returncode == 2
  assert "--to" in done.stderr
  assert "Traceback" not in done.stderr
  assert not done.stdout


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b", "a\x1b[0m"])
def test_what_no_file_can_hold_is_refused(bad):
  for field in ("workdir", "arguments"):
    value = f"/{bad}" if field == "workdir" else (bad,)
    with pytest.raises(errors.ArgumentError, match=field):
      slurm.Job(**{**_COMMON, field: value})


# Shell.


def _bash(script, before, **variables):
  """Runs a script in real bash, where functions stand before it."""
  return subprocess.run(
    ["bash", "-c", f"{before}\n{script}"],
    env={**os.environ, **variables},
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.parametrize(
  ("engine", "name"), [(slurm, "slurm"), (tpu_vm, "tpu-vm")]
)
def test_scripts_pass_shellcheck_which_bites(engine, name, tmp_path):
  text = _text(engine, name)
  path = tmp_path / "script.sh"
  for script, code in (
    (text, 0),
    (text.replace("status=$?", "status = $?"), 1),
    (text.replace("\nfi\n", "\n").replace("esac", "fi"), 1),
  ):
    path.write_text(script)
    done = subprocess.run(
      # Words in single quotes that look like expansions are meant so.
      ["shellcheck", "--exclude=SC2016", str(path)],
      capture_output=True,
      text=True,
    )
    assert done.returncode == code, done.stdout


def test_slurm_hands_every_word_on_as_it_is():
  done = _bash(
    _text(slurm, "slurm"),
    r"""srun() { printf '%s\0' "$@"; }""",
    SLURM_JOB_ID="7",
  )
  assert done.returncode == 0, done.stderr
  words = done.stdout.split("\0")[:-1]
  assert "--cpus-per-task=3" in words
  assert words[-len(_HOSTILE) - 1 :] == [
    *_HOSTILE,
    f"--workdir={_COMMON['workdir']}",
  ]


@pytest.mark.parametrize(
  ("status", "failures", "requeued", "counted"),
  [
    (0, "3", False, None),
    (1, "", True, "1"),
    (2, "3", False, None),
    (75, "", True, None),
    (75, "1000", True, "1000"),
    (137, "", True, "1"),
    (137, "19", True, "20"),
    (137, "20", False, None),
  ],
)
def test_slurm_requeues_what_can_go_on(
  tmp_path, monkeypatch, status, failures, requeued, counted
):
  monkeypatch.chdir(tmp_path)
  count = tmp_path / "run-7.failures"
  if failures:
    count.write_text(failures + "\n")
  before = f"srun() {{ return {status}; }}; scontrol() {{ echo SCONTROL $*; }};"
  before += "sleep() { echo SLEEP $*; }"
  # Slurm restarts a job whose node is lost, which this script does not see.
  done = _bash(
    _text(slurm, "slurm"), before, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1000"
  )
  assert done.returncode == status
  assert ("SCONTROL requeue 7" in done.stdout) == requeued
  assert (count.read_text().strip() if count.exists() else None) == counted
  waits = {"1": "SLEEP 20", "20": "SLEEP 600"}.get(counted or "")
  assert ("SLEEP" in done.stdout) == (waits is not None)
  assert (waits or "") in done.stdout


# The machine's programs that are not here, as functions: what is tested is the
# script around them.
_MACHINE = r"""
mkdir() { :; }; mountpoint() { return 0; }; gcloud() { echo "gcloud $*"; }
"""


def test_a_tpu_machine_hands_every_word_on_as_it_is():
  before = _MACHINE + r"""docker() { printf '%s\0' "$@"; }"""
  done = _bash(_text(tpu_vm, "tpu-vm"), before)
  assert done.returncode == 0, done.stderr
  words = done.stdout.split("\0")[:-1]
  for word in (*_HOSTILE, f"--workdir={_COMMON['workdir']}"):
    assert word in words
  assert "--config.secret_file=/run/dpdist/secret" in words


@pytest.mark.parametrize(
  ("codes", "status", "runs"),
  [
    ([0], 0, 1),
    ([2], 2, 1),
    ([75, 75, 0], 0, 3),
    ([1, 137, 75, 0], 0, 4),
    ([1] * 30, 1, 21),
    ([75] * 30 + [2], 2, 31),
  ],
)
def test_a_tpu_machine_starts_again_but_not_after_a_refusal(
  codes, status, runs, tmp_path
):
  # Each run is in a process of its own: what is left to return is a file.
  (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
  before = _MACHINE + (
    'docker() { echo run; read -r code < "$CODES";'
    ' sed -i 1d "$CODES"; exit "$code"; }'
  )
  done = _bash(
    _text(tpu_vm, "tpu-vm"),
    before,
    CODES=str(tmp_path / "codes"),
    RESTART_SECONDS="0",
  )
  assert done.returncode == status, done.stderr
  assert done.stdout.split("\n").count("run") == runs


def test_a_tpu_machine_passes_sigterm_on_and_waits():
  before = _MACHINE + (
    "docker() { trap 'sleep 0.3; echo saved; exit 75' TERM; kill -TERM $$;"
    " while :; do sleep 0.05; done; }"
  )
  done = _bash(_text(tpu_vm, "tpu-vm"), before, RESTART_SECONDS="1000")
  assert done.returncode == 75, done.stderr
  assert "saved" in done.stdout


_no_gcloud = pytest.mark.skipif(
  shutil.which("gcloud") is None, reason="wants the Google Cloud CLI"
)


@_no_gcloud
def test_gcloud_itself_parses_the_command(tmp_path):
  (text,) = tpu_vm.files(_JOBS["tpu-vm"]).values()
  (tmp_path / "run.startup.sh").write_text(text)
  words = tpu_vm.command(_JOBS["tpu-vm"], str(tmp_path))

  def refusal(words):
    done = subprocess.run(
      words,
      env={
        **os.environ,
        # No account: it parses, and then stops.
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
      },
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert done.returncode
    return done.stderr

  assert "active account" in refusal(words)
  wrong = [word.replace("--spot", "--spott") for word in words]
  assert "unrecognized arguments: --spott" in refusal(wrong)


# Kubernetes.


def _objects():
  return list(yaml.safe_load_all(_text(jobset, "jobset")))


def _problem(document):
  """What a strict reader of the schemas says; "" where nothing is wrong."""
  latest = kubernetes_validate.latest_version()
  try:
    if document["kind"] != "JobSet":
      kubernetes_validate.validate(document, latest, strict=True)
      return ""
    read = models.JobsetV1alpha2JobSet.from_dict(document).to_dict()
    for group in document["spec"]["replicatedJobs"]:
      job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "x"},
        "spec": group["template"]["spec"],
      }
      kubernetes_validate.validate(job, latest, strict=True)
  except (kubernetes_validate.ValidationError, ValueError, KeyError) as error:
    return str(error) or repr(error)
  return _lost(document, read)


def _lost(given, read, path=""):
  """The first thing that a reader passed over, as a path."""
  if isinstance(given, dict):
    for key, value in given.items():
      if key not in (read or {}):
        return f"{path}/{key}"
      if problem := _lost(value, read[key], f"{path}/{key}"):
        return problem
    return ""
  if isinstance(given, list):
    pairs = zip(given, read, strict=True)
    return next(filter(None, (_lost(a, b, path) for a, b in pairs)), "")
  return "" if given == read else path


# Maps whose keys are anybody's.
_FREE = {"nodeSelector", "requests", "limits"}


def _keys(document, path=()):
  if isinstance(document, dict):
    for key, value in document.items():
      if path and path[-1] in _FREE:
        continue
      yield (*path, key)
      yield from _keys(value, (*path, key))
  elif isinstance(document, list):
    for i, value in enumerate(document):
      yield from _keys(value, (*path, i))


def test_kubernetes_objects_fit_the_schemas_and_a_misspelt_key_does_not():
  kinds = [document["kind"] for document in _objects()]
  assert kinds == ["ServiceAccount", "PersistentVolumeClaim", "JobSet"]
  tried = 0
  for document in _objects():
    assert not _problem(document)
    for *path, key in _keys(document):
      wrong = copy.deepcopy(document)
      parent = wrong
      for part in path:
        parent = parent[part]
      parent[f"{key}x"] = parent.pop(key)
      assert _problem(wrong), (*path, key)
      tried += 1
  assert tried > 80


def test_a_jobset_is_what_its_page_says():
  account, claim, document = _objects()
  assert account["automountServiceAccountToken"] is False
  assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
  (group,) = document["spec"]["replicatedJobs"]
  job = group["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert job["completions"] == job["parallelism"] == 4
  assert pod["terminationGracePeriodSeconds"] >= 30
  # By the rules of JobSet: <set>-<group>-<job>-<pod>.<subdomain>.
  address = {v["name"]: v.get("value") for v in container["env"]}
  assert address["JAX_COORDINATOR_ADDRESS"] == "run-train-0-0.run:8476"
  assert document["spec"]["network"]["subdomain"] == "run"
  # The secret is a file for its owner alone, and in no variable or argument.
  (secret,) = (v["secret"] for v in pod["volumes"] if "secret" in v)
  assert secret["defaultMode"] == 0o400
  assert secret["secretName"] == "run-secret"
  assert not any("secretKeyRef" in str(v) for v in container["env"])
  assert (
    "--config.secret_file=/run/secrets/dpdist/secret" in container["command"]
  )
  rules = {
    rule["onExitCodes"]["values"][0]: rule["action"]
    for rule in job["podFailurePolicy"]["rules"]
  }
  assert rules == {2: "FailJob", 75: "Ignore"}
  # Kubernetes makes one dollar of two, and expands what follows a single one.
  words = [word.replace("$$", "\0") for word in container["command"]]
  assert not any("$" in word for word in words)
  words = [word.replace("\0", "$") for word in words]
  for word in (*_HOSTILE, f"--workdir={_COMMON['workdir']}"):
    assert word in words


# Ray.


def test_ray_itself_parses_the_command_and_the_environment(tmp_path):
  job = _JOBS["ray"]
  (name, text), *_ = ray_engine.files(job).items()
  (tmp_path / name).write_text(text)
  words = ray_engine.command(job, str(tmp_path))
  assert words[:3] == ["ray", "job", "submit"]
  parsed = cli.submit.make_context("submit", words[3:]).params
  assert parsed["entrypoint"][:3] == (
    "python",
    "-m",
    "launch.engines.ray_driver",
  )
  for word in (*_HOSTILE, f"--workdir={_COMMON['workdir']}"):
    assert word in parsed["entrypoint"]
  assert json.loads(parsed["metadata_json"]) == {"name": "run"}
  wrong = [word.replace("--runtime-env=", "--runtime-envx=") for word in words]
  with pytest.raises(Exception, match="runtime-envx"):
    cli.submit.make_context("submit", wrong[3:])
  environment = yaml.safe_load((tmp_path / name).read_text())
  environment["working_dir"] = "/tmp"
  assert set(environment) <= RuntimeEnv.known_fields
  RuntimeEnv(**environment)
  with pytest.raises(TypeError):
    RuntimeEnv(**{**environment, "env_vars": {"A": 1}})
