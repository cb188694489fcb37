"""Files, objects of stores, artifacts and the accounts of what is done."""
