"""How many machines a load takes, on paper: `bdh-batch plan`. Knows nothing about servers."""
