"""The commands: each parses, calls the library and prints. Nothing heavy is imported before a command runs."""
