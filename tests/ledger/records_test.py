"""The log's promises, one test each: damage, races, pauses, crashes."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dpdist import errors
from dpdist.ledger import records


def _open(path, take=lambda record: None):
  return records.Log(path, take)


def _writer(path):
  log = _open(path)
  log.acquire()
  return log


@pytest.fixture
def history(tmp_path):
  """A closed log of two writers."""
  log = _writer(tmp_path)
  log.append("a", value=1)
  log.append("b", text="ü", number=0.1)
  log.close()
  log = _writer(tmp_path)
  log.append("c")
  log.close()
  return tmp_path


def _files(path):
  return sorted(p for p in path.iterdir() if p.name != "head.json")


def test_what_append_returned_from_is_there(tmp_path):
  log = _writer(tmp_path)
  log.append("a", value=1)
  seen = []
  other = _open(tmp_path, seen.append)
  assert [r["kind"] for r in other.records] == ["writer", "a"]
  assert seen == other.records == log.records
  assert other.head == log.head
  assert other.records[1]["value"] == 1
  log.close()


def test_a_note_is_kept_in_the_head_until_another_replaces_it(history):
  before = json.loads((history / "head.json").read_text())
  assert "note" not in before  # Nothing was noted.
  log = _writer(history)
  log.put_note("one")
  log.append("d")
  assert _open(history).note == "one"
  log.close()
  assert json.loads((history / "head.json").read_text())["seq"] == 7
  log = _writer(history)
  assert log.note == _open(history).note == "one"
  log.put_note("other")
  log.close()
  after = _open(history)
  assert after.note == "other"
  assert len(after.records) == 8  # A note is no record.
  with pytest.raises(errors.LedgerError, match="must acquire"):
    after.put_note("more")


def test_reading_leaves_nothing_behind(tmp_path):
  _open(tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_who_did_not_acquire_cannot_write(history):
  with pytest.raises(errors.LedgerError, match="must acquire"):
    _open(history).append("d")


def test_every_flipped_byte_is_found(history):
  """In the head too; and told where."""
  for file in [*_files(history), history / "head.json"]:
    good = file.read_bytes()
    what = (
      "head.json"
      if file.name == "head.json"
      else f"record {int(file.stem)} was altered"
    )
    for position in range(len(good)):
      bad = bytearray(good)
      bad[position] ^= 1
      file.write_bytes(bytes(bad))
      with pytest.raises(errors.LedgerError, match=what):
        _open(history)
    file.write_bytes(good)
  _open(history)


def test_every_deleted_record_is_found(history):
  files = _files(history)
  for number, file in enumerate(files):
    good = file.read_bytes()
    file.unlink()
    with pytest.raises(
      errors.LedgerError, match=rf"records? {number} .*(missing|rolled back)"
    ):
      _open(history)
    file.write_bytes(good)
  head = history / "head.json"
  head.unlink()
  with pytest.raises(errors.LedgerError, match=r"head\.json is missing"):
    _open(history)


def test_a_reader_that_looked_just_before_the_first_writer_is_no_alarm(
  history, monkeypatch
):
  look, looks = records.Log._read_head, []

  def late(self):
    looks.append(self)
    return None if len(looks) == 1 else look(self)

  monkeypatch.setattr(records.Log, "_read_head", late)
  assert len(_open(history).records) == 5
  assert len(looks) == 2


def test_every_swapped_or_repeated_record_is_found(history):
  files = _files(history)
  contents = [file.read_bytes() for file in files]
  for i, one in enumerate(files):
    for j, other in enumerate(files):
      if i == j:
        continue
      one.write_bytes(contents[j])
      with pytest.raises(errors.LedgerError, match=f"record {i} does not"):
        _open(history)
      other.write_bytes(contents[i])
      with pytest.raises(
        errors.LedgerError, match=f"record {min(i, j)} does not"
      ):
        _open(history)
      one.write_bytes(contents[i])
      other.write_bytes(contents[j])
  history.joinpath(f"{len(files):012d}.json").write_bytes(contents[-1])
  with pytest.raises(errors.LedgerError, match=f"record {len(files)} does"):
    _open(history)


def test_every_rollback_is_found(history):
  files = _files(history)
  for number in range(len(files)):
    saved = {file: file.read_bytes() for file in files[number:]}
    for file in saved:
      file.unlink()
    with pytest.raises(errors.LedgerError, match="rolled back"):
      _open(history)
    for file, content in saved.items():
      file.write_bytes(content)


def test_a_record_forged_without_its_digest_is_found(history):
  head = _open(history).head
  record = {"seq": 5, "prev": head, "kind": "refund"}
  value = json.dumps(record, sort_keys=True, separators=(",", ":"))
  # Beyond the head it passes for one that was being written.
  (history / "000000000005.json").write_text(value)
  assert _open(history).records[-1] == {"seq": 5, "kind": "lost"}


@pytest.mark.parametrize("torn", [b"", b'{"kind":', b"\0" * 100])
def test_a_torn_tail_is_kept_as_lost(history, torn):
  (history / "000000000005.json").write_bytes(torn)
  log = _writer(history)
  log.append("after")
  log.close()
  log = _writer(history)
  log.close()
  kinds = [r["kind"] for r in _open(history).records]
  assert kinds[5:] == ["lost", "writer", "after", "writer"]
  # It stays what it was when it was found.
  (history / "000000000005.json").write_bytes(torn + b"?")
  with pytest.raises(errors.LedgerError, match="record 5 was altered"):
    _open(history)


@pytest.mark.parametrize("name", ["000000000005.json", "head.json"])
def test_what_a_killed_writer_left_half_written_does_no_harm(history, name):
  """tensorstore writes over it, and does not cut off what is longer."""
  (history / (name + ".__lock")).write_bytes(b'{"kind":"open"}' * 100)
  log = _writer(history)
  assert log.records == _open(history).records
  log.append("d")
  log.close()
  _writer(history).close()
  kinds = [r["kind"] for r in _open(history).records]
  assert kinds[5:] == ["writer", "d", "writer"]


def test_a_record_that_the_head_speaks_of_is_never_taken_for_torn(history):
  _files(history)[-1].write_bytes(b"")
  with pytest.raises(errors.LedgerError, match="record 4 was altered"):
    _open(history)


def test_a_record_whose_head_was_not_written_counts(history):
  head = (history / "head.json").read_bytes()
  log = _writer(history)
  log.append("d")
  log.close()
  (history / "head.json").write_bytes(head)
  assert _open(history).records[-1]["kind"] == "d"


def test_what_makes_no_sense_is_refused_by_number(history):
  def take(record):
    if record["kind"] == "b":
      raise KeyError("text")

  with pytest.raises(errors.LedgerError, match="record 2 cannot be underst"):
    _open(history, take)


def test_two_that_read_the_same_cannot_both_write(history):
  one, other = _open(history), _open(history)
  one.acquire()
  one.close()
  with pytest.raises(errors.LedgerError, match="another process wrote"):
    other.acquire()
  # The one that lost is no writer.
  with pytest.raises(errors.LedgerError, match="must acquire"):
    other.append("d")


class _Overtaken:
  """A store; another writes just after it was seen that nobody had."""

  def __init__(self, store, key, overtake):
    self._store, self._key, self._overtake = store, key, overtake

  def __getattr__(self, name):
    return getattr(self._store, name)

  def read(self, key):
    found = self._store.read(key)
    if key == self._key and found.result().state == "missing":
      self._overtake()
    return found


def test_a_record_written_meanwhile_is_not_overwritten(history, monkeypatch):
  one, other = _open(history), _open(history)
  key = records._key(len(one.records))
  monkeypatch.setattr(
    other,
    "_store",
    _Overtaken(other._store, key, lambda: (one.acquire(), one.close())),
  )
  with pytest.raises(errors.LedgerError, match="another process wrote"):
    other.acquire()
  assert _open(history).records == one.records


_CHILD = """
import sys
from dpdist import errors
from dpdist.ledger import records
log = records.Log(sys.argv[1], lambda record: None)
try:
  log.acquire()
  print("acquired", flush=True)
  for line in sys.stdin:
    log.append("from the child")
    print("appended", flush=True)
  log.close()
except errors.LedgerError as error:
  print(error, flush=True)
"""


def _child(path):
  return subprocess.Popen(
    [sys.executable, "-c", _CHILD, str(path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
  )


def test_a_living_writer_is_left_alone(tmp_path, monkeypatch):
  child = _child(tmp_path)
  assert child.stdout.readline() == "acquired\n"
  # Longer than a beat, so that one is seen for certain.
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 600.0)
  with pytest.raises(errors.LedgerError, match=f"process {child.pid} on "):
    _open(tmp_path).acquire()
  assert child.communicate("one more\n")[0] == "appended\n"
  _writer(tmp_path).close()


def test_a_dead_writer_is_replaced_at_once(tmp_path):
  child = _child(tmp_path)
  assert child.stdout.readline() == "acquired\n"
  child.kill()  # And not yet waited for: a zombie.
  while pathlib.Path(f"/proc/{child.pid}/stat").read_text().split()[2] != "Z":
    time.sleep(0.01)
  started = time.monotonic()
  _writer(tmp_path).close()
  assert time.monotonic() - started < records.PATIENCE_SECONDS
  child.communicate()


def test_a_paused_writer_wakes_shut_out(tmp_path, monkeypatch):
  child = _child(tmp_path)
  assert child.stdout.readline() == "acquired\n"
  child.send_signal(signal.SIGSTOP)
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.5)
  log = _writer(tmp_path)
  log.append("d")
  child.send_signal(signal.SIGCONT)
  out, _ = child.communicate("one more\n")
  assert "another process wrote ledger record 1" in out
  assert "appended" not in out
  log.append("e")
  log.close()
  assert [r["kind"] for r in _open(tmp_path).records] == [
    *["writer"] * 2,
    "d",
    "e",
  ]
  # What it notes of itself on waking does not stand in the next one's way.
  _writer(tmp_path).close()


def test_a_writer_paused_before_it_writes_the_head_cannot_turn_it_back(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.0)
  log = _writer(tmp_path)
  look = log._is_shut_out

  def pause():
    answer = look()
    other = _writer(tmp_path)
    other.append("d")
    other.close()
    return answer

  monkeypatch.setattr(log, "_is_shut_out", pause)
  before = json.loads((tmp_path / "head.json").read_text())
  log.close()
  after = json.loads((tmp_path / "head.json").read_text())
  assert (before["seq"], after["seq"]) == (1, 3)


def test_confirm_tells_a_writer_that_it_was_shut_out(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.1)
  one = _writer(tmp_path)
  one.confirm()
  other = _writer(tmp_path)
  with pytest.raises(errors.LedgerError, match="another process wrote"):
    one.confirm()
  one.close()
  other.append("d")
  other.close()


@pytest.mark.slow
def test_of_twenty_at_once_exactly_one_writes(tmp_path):
  children = [_child(tmp_path) for _ in range(20)]
  said = [child.stdout.readline() for child in children]
  assert said.count("acquired\n") == 1
  for line in said:
    assert line == "acquired\n" or "one run directory takes one writer" in line
  for child, line in zip(children, said, strict=True):
    out, _ = child.communicate("one\ntwo\n")
    assert out == ("appended\n" * 2 if line == "acquired\n" else "")
  kinds = [r["kind"] for r in _open(tmp_path).records]
  assert kinds == ["writer", "from the child", "from the child"]


def test_the_store_that_fails_is_reported(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.LedgerError, match="store failed"):
    _writer(tmp_path / "file" / "below")


@pytest.mark.parametrize(
  "location",
  [
    "nosuch://bucket",
    "memory://bucket",
    "{",
    '{"driver":"x"}',
    '{"driver":"file","path":"/tmp/x/","file_io_locking":{"mode":"none"}}',
    '{"driver":"file","path":"/tmp/x/","file_io_sync":false}',
  ],
)
def test_a_location_that_is_none_is_named(location):
  with pytest.raises(ValueError, match="location must be .*" + location[0]):
    _open(location)


def test_two_torn_records_in_a_row_are_both_lost(history):
  """The process that came after the first one was stopped, too."""
  for seq in (5, 6):
    (history / f"{seq:012d}.json").write_bytes(b"{")
  log = _writer(history)
  log.append("after")
  log.close()
  kinds = [r["kind"] for r in _open(history).records]
  assert kinds[5:] == ["lost", "lost", "writer", "after"]
  (history / "000000000005.json").write_bytes(b"")
  with pytest.raises(errors.LedgerError, match="record 5 was altered"):
    _open(history)


def test_a_stray_file_is_named(history):
  (history / "notes.txt").write_text("mine")
  with pytest.raises(errors.LedgerError, match=r"'notes\.txt' is no record"):
    _open(history)


def test_a_writer_that_closes_meanwhile_is_no_living_writer(
  tmp_path, monkeypatch
):
  child = _child(tmp_path)
  assert child.stdout.readline() == "acquired\n"
  log, sleep = _open(tmp_path), time.sleep

  def close(seconds):
    child.communicate("")
    sleep(seconds)

  monkeypatch.setattr(time, "sleep", close)
  log.acquire()
  log.close()


_PROPOSER = """
import sys
from dpdist.ledger import records
log = records.Log(sys.argv[1], lambda record: None)
for i in range(5):
  def decide():
    if len(log.records) < 30:
      return "turn", {"number": len(log.records)}
  log.propose(decide)
"""


def test_many_that_propose_lose_nothing(tmp_path):
  """What each decided on rests on all that was written before it."""
  children = [
    subprocess.Popen(
      [sys.executable, "-c", _PROPOSER, str(tmp_path)],
      cwd=pathlib.Path(__file__).parents[2],
    )
    for _ in range(8)
  ]
  assert [child.wait() for child in children] == [0] * 8
  log = _open(tmp_path)
  assert [r["number"] for r in log.records] == list(range(30))
  assert json.loads((tmp_path / "head.json").read_text())["seq"] == 30


def test_a_proposal_after_a_torn_record(tmp_path):
  log = _open(tmp_path)
  log.propose(lambda: ("a", {}))
  (tmp_path / "000000000001.json").write_bytes(b"{")
  log.propose(lambda: ("b", {"seen": len(log.records)}))
  assert [r["kind"] for r in _open(tmp_path).records] == ["a", "lost", "b"]
  assert log.records[-1]["seen"] == 2
