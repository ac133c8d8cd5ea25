"""Files that are whole or absent, one driver at a time, folders behind URIs."""
