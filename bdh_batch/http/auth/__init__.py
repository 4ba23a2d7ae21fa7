"""Authentication and limits: keys, hosts, rates."""
