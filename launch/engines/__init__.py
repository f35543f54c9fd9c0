"""Writes job files for engines that run several processes, a module each."""
