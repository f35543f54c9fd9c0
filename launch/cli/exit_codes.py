"""The exit codes of commands, for a shell or a scheduler.

Any other code is a failure; Python's own for an uncaught exception is 1.
"""

DONE = 0
UNSOUND = 1
USAGE = 2
# Not 0: a scheduler would take the job for complete and never requeue it.
PREEMPTED = 75
# The code of shells for a program that Ctrl-C ended.
INTERRUPTED = 130
# The code of shells for a program whose reader has ended.
NOBODY_READS = 141
