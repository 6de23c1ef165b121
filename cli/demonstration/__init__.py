"""What `guard demo` shows: its data and victim, its HTTP client, its steps."""
