"""Fleets of engines on a virtual clock: the server's own scheduler, routing and failover, many times over."""
