"""Public features that replace inputs."""
