"""Members of packages of each kind, made by hand."""

import io
import tarfile
import zipfile

import pytest

from dpdist.assets import archives

MEMBER = "./usr/share/some/data"


def _tar(mode):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode=mode) as archive:
    info = tarfile.TarInfo(MEMBER)
    info.size = 3
    archive.addfile(info, io.BytesIO(b"abc"))
  return out.getvalue()


def _zip():
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    archive.writestr(MEMBER, b"abc")
  return out.getvalue()


def _deb(*, members=("debian-binary", "control.tar.xz", "data.tar.xz")):
  # The format of ar: each header ends in a backquote, each size is made even.
  out = b"!<arch>\n"
  for name in members:
    content = _tar("w:xz") if name == "data.tar.xz" else b"odd"
    out += f"{name:16}{0:<12}{0:<6}{0:<6}{644:<8}{len(content):<10}`\n".encode()
    out += content + b"\n" * (len(content) % 2)
  return out


@pytest.mark.parametrize(
  "content",
  [_zip(), _tar("w:gz"), _tar("w"), _deb()],
  ids=["zip", "tgz", "tar", "deb"],
)
def test_a_member_of_any_kind_of_package_is_read(tmp_path, content):
  path = tmp_path / "package"
  path.write_bytes(content)
  with archives.opened(path, MEMBER) as file:
    assert file.read() == b"abc"
  with (
    pytest.raises(ValueError, match=r"must hold .*other"),
    archives.opened(path, "other"),
  ):
    pass


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "must be a zip, tar"),
    (b"what", "must be a zip, tar"),
    (_deb(members=["debian-binary"]), "one without files"),
  ],
)
def test_what_is_no_package_is_named(tmp_path, content, message):
  path = tmp_path / "package"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message), archives.opened(path, MEMBER):
    pass
