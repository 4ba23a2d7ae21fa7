"""A request: head and body, from bytes to checked values, within bounds."""
