"""Speed: of a head, of a model, of a conversion. No command and no printing in here."""
