"""The page at /ui, over HTTP."""
