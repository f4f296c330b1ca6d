"""Encoders in other libraries: each module here needs the extra of its name."""
