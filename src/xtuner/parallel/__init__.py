"""The processes that train together: their ranks, how they start and how they share work."""
