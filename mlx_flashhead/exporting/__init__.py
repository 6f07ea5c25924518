"""The head as functions for an app."""
