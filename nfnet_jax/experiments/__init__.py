"""The doors: commands that a person runs."""
