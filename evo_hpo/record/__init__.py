"""What happened: journals, profiles, and the comparison's folder."""
