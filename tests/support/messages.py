"""Messages as tests write them."""


def short(row):
    """A row of pairs whose messages have no `more` where they have none."""
    return {name: _short(value) if name in ("prompt", "chosen", "rejected") else value for name, value in row.items()}


def _short(messages):
    if messages is None:
        return None
    return [{key: value for key, value in message.items() if key != "more" or value} for message in messages]
