"""From files of text to token ids and masks."""
