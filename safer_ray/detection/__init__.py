"""What makes a pair suspicious, and how well that finds planted errors."""
