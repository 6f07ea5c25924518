"""The commands: arguments and printing, no mathematics."""
