"""What generates completions for the HTTP layer."""
