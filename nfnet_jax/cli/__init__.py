"""What the commands share: start-up, flags, sessions, summaries."""
