"""A smaller model of the same tokenizer drafts."""
