"""A server that speaks S3, for as long as a test wants it."""

from collections.abc import Iterator
import contextlib
import http.client

from moto import server as moto_server

# What clients want to know, beside the server's address.
VARIABLES = {
  "AWS_ACCESS_KEY_ID": "test",
  "AWS_SECRET_ACCESS_KEY": "test",
  "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def serving(bucket: str) -> Iterator[int]:
  """Starts a server with an empty bucket; yields its port."""
  server = moto_server.ThreadedMotoServer(port=0, verbose=False)
  server.start()
  try:
    port = int(server.get_host_and_port()[1])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/{bucket}")
    connection.getresponse().read()
    connection.close()
    yield port
  finally:
    server.stop()
