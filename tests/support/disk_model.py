"""What of a process's writes must be on the disk, and what may be lost.

File data must be there once it was synced, and a name in a directory once the
directory was. Everything else may be there or not, each part of it for itself
and whatever the order in which it was written.
"""

import ast
import os
import re

# The system calls that it understands.
ON_DESCRIPTORS = (
  *("write", "writev", "pwrite64", "lseek", "ftruncate", "fsync", "fdatasync"),
)
ON_PATHS = (
  *("openat", "mkdir", "mkdirat", "rename", "renameat", "renameat2"),
  *("link", "linkat", "unlink", "unlinkat", "rmdir"),
)


class _File:
  """What it reads as, what of that is synced, and what came after that."""

  def __init__(self):
    self.data, self.synced = bytearray(), b""
    self.pending = []  # (offset, bytes), or (size, None) that cuts.

  def change(self, offset, piece):
    _change(self.data, offset, piece)
    self.pending.append((offset, piece))

  def sync(self):
    self.synced, self.pending = bytes(self.data), []

  def after(self, has_name, kept):
    data = bytearray(self.synced)
    for offset, piece in self.pending:
      if piece is None:
        if has_name():
          _change(data, offset, None)
      elif size := kept(len(piece)):
        _change(data, offset, piece[:size])
    return bytes(data)


def _change(data, offset, piece):
  if piece is None:
    del data[offset:]
  else:
    data.extend(bytes(max(0, offset - len(data))))
    data[offset : offset + len(piece)] = piece


class _Folder:
  """The same of the names in a directory; a rename is one change."""

  def __init__(self):
    self.names, self.synced = {}, {}
    self.pending = []  # {name: what it is from now on, None for nothing}

  def change(self, **names):
    _rename(self.names, names)
    self.pending.append(names)

  def sync(self):
    self.synced, self.pending = dict(self.names), []

  def after(self, has_name, kept):
    names = dict(self.synced)
    for change in self.pending:
      if has_name():
        _rename(names, change)
    return {
      name: item.after(has_name, kept) for name, item in sorted(names.items())
    }


def _rename(names, change):
  names.update(change)
  for name in [name for name, item in names.items() if item is None]:
    del names[name]


class Disk:
  """What a process has done below a directory that was empty and synced."""

  def __init__(self, path):
    self._path, self._root = path, _Folder()
    self._offsets = {}  # Of open files, by descriptor.

  def after(self, has_name, kept):
    """What is there after a power cut: bytes, or a dict, by name.

    Args:
      has_name: whether an unsynced change of names was kept.
      kept: how many bytes of an unsynced write, of so many, were kept.
    """
    return self._root.after(has_name, kept)

  def do(self, call, text, result):
    """Takes a system call that succeeded into account."""
    strings = [
      ast.literal_eval(f'b"{s}"')
      for s in re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    ]
    opened = re.findall(r"(\d+|AT_FDCWD)<([^>]*)>", text)
    if call in ON_DESCRIPTORS:
      descriptor, path = opened[0]
      item, last = self._find(path), text.rpartition(", ")[2]
      if item is None:
        return
      if call in ("write", "writev"):
        piece = b"".join(strings)[:result]
        item.change(self._offsets[descriptor], piece)
        self._offsets[descriptor] += result
      elif call == "pwrite64":
        item.change(int(last), strings[0][:result])
      elif call == "lseek":
        self._offsets[descriptor] = result
      elif call == "ftruncate":
        item.change(int(last), None)
      else:
        item.sync()
      return
    start = opened[0][1] if opened else "/"
    paths = [os.path.join(start, string.decode()) for string in strings]
    folder, name = self._place(paths[0])
    if folder is None:
      return
    if call == "openat":
      if "O_CREAT" in text and name not in folder.names:
        folder.change(**{name: _File()})
      item = folder.names.get(name)
      if isinstance(item, _File):
        if "O_TRUNC" in text and item.data:
          item.change(0, None)
        end = len(item.data) if "O_APPEND" in text else 0
        self._offsets[str(result)] = end
    elif call.startswith("mkdir"):
      folder.change(**{name: _Folder()})
    elif call.startswith("rename"):
      other, new = self._place(paths[1])
      item = folder.names[name]
      if other is folder:
        folder.change(**{name: None, new: item})
      else:
        other.change(**{new: item})
        folder.change(**{name: None})
    elif call.startswith("link"):
      other, new = self._place(paths[1])
      other.change(**{new: folder.names[name]})
    else:
      folder.change(**{name: None})

  def _find(self, path):
    folder, name = self._place(path)
    if folder is None:
      return None
    return folder.names.get(name) if name else folder

  def _place(self, path):
    """The folder that a path is in, and its name there."""
    if path != self._path and not path.startswith(self._path + "/"):
      return None, ""
    *parts, name = path[len(self._path) :].strip("/").split("/")
    folder = self._root
    for part in parts:
      folder = folder.names.get(part)
      if not isinstance(folder, _Folder):
        return None, ""
    return folder, name
