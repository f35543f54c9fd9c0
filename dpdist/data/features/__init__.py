"""Features in the place of inputs."""
