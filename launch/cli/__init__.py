"""What the launch commands share: flags, errors, exit codes."""
