"""The page at /ui: its files, and what is known of them without HTTP."""
