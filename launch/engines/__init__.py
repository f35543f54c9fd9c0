"""Job files for engines that run several processes: one module an engine."""
