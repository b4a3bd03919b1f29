"""The list loss in other people's trainers: thin, and each tested against the real thing."""
