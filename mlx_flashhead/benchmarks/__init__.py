"""Speed and memory: of a head, of a model, of a conversion. No entry point in here."""
