"""The whole server, as its clients see it, and the baselines that it is measured against."""
