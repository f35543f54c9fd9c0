"""The parts that all commands share: flags, errors, exit codes."""
