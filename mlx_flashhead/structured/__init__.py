"""Structured output: text that a JSON schema, a regular expression or a grammar allows."""
