"""A FlashHead as files: its settings, reading and writing, a new folder or nothing."""
