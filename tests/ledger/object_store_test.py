"""The log on an object store that enforces conditional writes."""

import http.client
import http.server
import json
import threading

import pytest

from dpdist import errors
from dpdist.ledger import budgets
from dpdist.ledger import data_budget
from dpdist.ledger import records
from tests.support import object_store

_BUCKET = "ledgers"


class _Proxy(http.server.ThreadingHTTPServer):
  """Stands before the store, and can lose its answers or its requests.

  Attributes:
    lose: called with (method, key); "answer" to drop an answer after the store
      has acted, "request" to drop it before, "" to let all through.
    seen: (method, key, status) of what the store answered.
  """

  daemon_threads = True

  def __init__(self, port):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.store_port = port
    self.lose = lambda method, key: ""
    self.seen = []

  def handle_error(self, request, client_address):
    pass  # Connections that were cut on purpose.


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def _pass_on(self):
    size = int(self.headers.get("Content-Length", 0))
    body = self.rfile.read(size)
    key = self.path.partition("?")[0].rpartition("/")[2]
    lost = self.server.lose(self.command, key)
    if lost == "request":
      self.close_connection = True
      return
    store = http.client.HTTPConnection("127.0.0.1", self.server.store_port)
    store.request(self.command, self.path, body, dict(self.headers))
    answer = store.getresponse()
    content = answer.read()
    self.server.seen.append((self.command, key, answer.status))
    if lost == "answer":
      self.close_connection = True
      return
    self.send_response(answer.status)
    for name, value in answer.getheaders():
      if name.lower() not in ("content-length", "connection", "date", "server"):
        self.send_header(name, value)
    length = answer.getheader("Content-Length", "0")
    is_head = self.command == "HEAD"
    self.send_header("Content-Length", length if is_head else str(len(content)))
    self.end_headers()
    if not is_head:
      self.wfile.write(content)

  do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

  def log_message(self, *args):
    pass


@pytest.fixture(scope="module")
def store():
  with object_store.serving(_BUCKET) as port:
    yield port


@pytest.fixture
def proxy(store, monkeypatch):
  for name, value in object_store.VARIABLES.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(records, "PATIENCE_SECONDS", 0.1)
  proxy = _Proxy(store)
  thread = threading.Thread(target=proxy.serve_forever)
  thread.start()
  yield proxy
  proxy.shutdown()
  thread.join()
  proxy.server_close()


@pytest.fixture
def location(proxy, request):
  """A tensorstore spec of a place of the test's own."""
  return json.dumps(
    {
      "driver": "s3",
      "bucket": _BUCKET,
      "path": f"{request.node.name}/",
      "endpoint": f"http://127.0.0.1:{proxy.server_port}",
      "aws_region": "us-east-1",
    }
  )


def _open(location):
  return records.Log(location, lambda record: None)


def _writer(location):
  log = _open(location)
  log.acquire()
  return log


def _kinds(location):
  return [record["kind"] for record in _open(location).records]


def test_records_are_kept(location):
  log = _writer(location)
  log.append("a", value=1)
  log.close()
  log = _writer(location)
  log.append("b")
  log.close()
  assert _kinds(location) == ["writer", "a", "writer", "b"]


def test_amazons_variable_names_the_server_of_a_url(
  location, proxy, monkeypatch
):
  endpoint = f"http://127.0.0.1:{proxy.server_port}"
  monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
  monkeypatch.delenv("AWS_REGION", raising=False)
  monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
  path = json.loads(location)["path"]
  _writer(f"s3://{_BUCKET}/{path}").close()
  assert _kinds(location) == ["writer"]


def test_a_budget_is_below_its_root_in_any_form(location, proxy, monkeypatch):
  monkeypatch.setenv(
    "AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}"
  )
  spec = json.loads(location)
  bare = json.dumps({**spec, "path": spec["path"].rstrip("/")})
  url = f"s3://{_BUCKET}/{spec['path']}"
  for number, root in enumerate((location, bare, url)):
    data = f"{number}" * 64
    data_budget.DataBudget(root, data).make(
      epsilon=1.0, delta=1e-5, neighboring_relation="add_or_remove_one"
    )
  expected = ["0" * 64, "1" * 64, "2" * 64]
  assert records.folders(location) == expected
  assert [budget.data for budget in budgets.all_below(bare)] == expected
  assert records.folders(url) == expected


def test_a_lost_race_is_told(location):
  one, other = _open(location), _open(location)
  one.acquire()
  with pytest.raises(errors.LedgerError, match="another process wrote"):
    other.acquire()
  one.append("a")
  one.close()
  assert _kinds(location) == ["writer", "a"]


def test_the_store_refuses_a_write_on_a_condition_that_no_longer_holds(
  location, proxy
):
  """It is not our having looked before that keeps a second writer out."""
  log, other = _writer(location), _open(location)
  log.append("a")
  other.heads, other.records = log.heads[:-1], log.records[:-1]
  other._token = "forged"
  read = other._store.read
  missing = read("nothing").result()

  class _Blind:
    def __init__(self, store):
      self.store = store
      self.write = store.write
      self.blind = True

    def read(self, key):
      if self.blind and key != "head.json":
        self.blind = False

        class _Missing:
          result = staticmethod(lambda seconds: missing)

        return _Missing
      return self.store.read(key)

  other._store = _Blind(other._store)
  with pytest.raises(errors.LedgerError, match="another process wrote"):
    other.append("b")
  assert {s for _, k, s in proxy.seen if k == _key(1)} == {404, 200, 412}
  log.close()
  assert _kinds(location) == ["writer", "a"]


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["answer", "request"])
def test_a_write_is_repeated_until_it_is_known_to_be_there(
  location, proxy, lost
):
  log = _writer(location)
  left = [3]

  def lose(method, key):
    if method == "PUT" and key == "000000000001.json" and left[0]:
      left[0] -= 1
      return lost
    return ""

  proxy.lose = lose
  log.append("a")
  assert left[0] < 3
  statuses = [s for m, k, s in proxy.seen if (m, k) == ("PUT", _key(1))]
  # Where it had succeeded the first time, the store said so by refusing.
  assert statuses[0] == 200
  assert (412 in statuses) == (lost == "answer")
  log.append("b")
  log.close()
  assert _kinds(location) == ["writer", "a", "b"]


def test_a_write_that_comes_late_shuts_its_writer_out_and_no_other(location):
  """The answer is lost, and before the writer asks again another took over."""
  log = _writer(location)
  other = _writer(location)
  with pytest.raises(errors.LedgerError, match="another process wrote"):
    log.append("a")
  other.append("b")
  log.close()
  other.close()
  assert _kinds(location) == ["writer", "writer", "b"]


@pytest.mark.parametrize("lost", ["answer", "request"])
@pytest.mark.slow
def test_a_proposal_is_written_once_whatever_is_lost(location, proxy, lost):
  left = [3]

  def lose(method, key):
    if method == "PUT" and key == _key(1) and left[0]:
      left[0] -= 1
      return lost
    return ""

  log = _open(location)
  log.propose(lambda: ("a", {}))
  proxy.lose = lose
  log.propose(lambda: ("b", {}))
  assert left[0] < 3
  assert _kinds(location) == ["a", "b"]


@pytest.mark.slow
def test_many_threads_propose_at_once(location):
  """Each has a log of its own; what it decides on rests on all before it."""

  def work():
    log = _open(location)
    for _ in range(4):
      log.propose(lambda: ("turn", {"number": len(log.records)}))

  threads = [threading.Thread(target=work) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [r["number"] for r in _open(location).records] == list(range(16))


def _key(seq):
  return f"{seq:012d}.json"
