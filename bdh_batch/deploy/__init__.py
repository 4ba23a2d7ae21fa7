"""The server on clusters of others. Each module of it needs an extra."""
