"""List records: the schema, reading and checking them, their files and images."""
