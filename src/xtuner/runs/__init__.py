"""What runs leave behind: read it, list runs, and show one in a report. Imports no torch."""
