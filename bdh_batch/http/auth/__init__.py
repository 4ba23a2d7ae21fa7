"""Who asks, and what it may do: keys, hosts, rates."""
