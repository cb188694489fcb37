"""Preference formats in the wild: each is one declaration, from its columns to pairs or reasons to refuse a row."""
