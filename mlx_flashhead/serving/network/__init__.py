"""Connections and who may use them: addresses, access, limits, the page's files."""
