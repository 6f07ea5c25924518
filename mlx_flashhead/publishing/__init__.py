"""A checkpoint's way to the Hugging Face Hub: name, card, licence, upload."""
