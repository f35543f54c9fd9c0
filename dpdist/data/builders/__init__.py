"""Data sets made of what people have: files, arrays, other libraries' sets."""
