"""Prompt lookup: the text so far drafts."""
