"""What the neurons of a model stand for: where in a text they fire, found without a server."""
