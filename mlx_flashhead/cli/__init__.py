"""Shared by the commands: arguments, errors, tables, pictures, the terminal, processes."""
