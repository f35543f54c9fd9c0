"""What a command's exit status means to a shell or a scheduler.

Anything else is a failure; Python's own for an uncaught exception is 1.
"""

DONE = 0
UNSOUND = 1
USAGE = 2
# Not 0: a scheduler would take the job for complete and never requeue it.
PREEMPTED = 75
# As a shell says of what Ctrl-C ended.
INTERRUPTED = 130
# As it says of what was printing to a program that has ended.
NOBODY_READS = 141
